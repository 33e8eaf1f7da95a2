//! Redis loses the last seconds, as in a failover without `wait_replicas`, while the partitions belong to other
//! purgers than those that filled it. The lost records are below the committed offsets.

use std::time::Duration;

use anyhow::{Result, ensure};
use barid_testkit::device::PATIENCE;
use barid_testkit::{Cluster, Role};

const USERS: usize = 8;
/// Messages of a user before and after Redis is saved.
const KEPT: usize = 5;
const FORGOTTEN: usize = 10;

/// A cluster with two purgers, whose Redis can be reset to what was saved.
struct Bed {
    cluster: Cluster,
    said: usize,
}

impl Bed {
    async fn start() -> Result<Self> {
        let cluster = Cluster::builder()
            .nodes(Role::Purger, 2)
            .set_of(Role::Purger, "window.probe_interval_ms", 500)
            .set_of(Role::Purger, "commit_interval_ms", 200)
            .start()
            .await?;
        let mut bed = Self { cluster, said: 0 };
        bed.say(KEPT).await?;
        bed.committed(&[0, 1]).await?;
        let _: String = bed.cluster.redis.query(&["SAVE"]).await?;
        bed.say(FORGOTTEN).await?;
        bed.committed(&[0, 1]).await?;
        Ok(bed)
    }

    async fn say(&mut self, count: usize) -> Result<()> {
        let business = self.cluster.business()?;
        for number in self.said..self.said + count {
            for user in 0..USERS {
                business.send_text(&format!("u{user}"), &number.to_string(), "").await?;
            }
        }
        self.said += count;
        Ok(())
    }

    /// Waits until these purgers have accepted and committed everything.
    async fn committed(&mut self, purgers: &[usize]) -> Result<()> {
        let begun = tokio::time::Instant::now();
        loop {
            let (mut accepted, mut lag) = (0.0, 0.0);
            for number in purgers {
                let node = self.cluster.node(Role::Purger, *number);
                accepted += node.metric("barid_purger_messages_total").await?;
                lag += node.metric("barid_purger_lag_records").await?;
            }
            if accepted >= (self.said * USERS) as f64 && lag == 0.0 {
                // The lag of a partition without a commit is unknown.
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "{accepted} accepted, {lag} not committed");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Resets Redis to what was saved.
    async fn redis_goes_back(&mut self) -> Result<()> {
        self.cluster.redis.kill()?;
        self.cluster.redis.restart().await
    }

    /// Checks that every user's phone receives everything, once and in order.
    async fn everything_is_there(&mut self) -> Result<()> {
        let expected: Vec<String> = (0..self.said).map(|number| number.to_string()).collect();
        for user in 0..USERS {
            let mut phone = self.cluster.device(&format!("u{user}"), "phone").await?;
            let shown = phone.receive(self.said).await?;
            ensure!(shown == expected, "u{user} was shown {shown:?}");
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_26_a_killed_purgers_partitions_are_repaired_by_another_process() -> Result<()> {
    let mut bed = Bed::start().await?;
    bed.cluster.kill(Role::Purger, 0)?;
    bed.redis_goes_back().await?;
    // The message behind the gap would hide it from a purger that does not know of it.
    bed.say(1).await?;
    bed.everything_is_there().await
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_26_purgers_that_were_rolled_notice_a_redis_that_goes_back() -> Result<()> {
    let mut bed = Bed::start().await?;
    for number in 0..2 {
        bed.cluster.restart(Role::Purger, number).await?;
    }
    bed.redis_goes_back().await?;
    // Nothing more is produced: the purgers must notice by themselves.
    bed.everything_is_there().await
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_26_a_redis_that_goes_back_while_no_purger_runs_is_repaired() -> Result<()> {
    let mut bed = Bed::start().await?;
    for number in 0..2 {
        ensure!(bed.cluster.drain(Role::Purger, number).await? == 0);
    }
    bed.redis_goes_back().await?;
    bed.cluster.spawn(Role::Purger, 1)?;
    bed.everything_is_there().await
}
