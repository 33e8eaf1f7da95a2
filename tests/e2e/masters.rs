//! A Redis Cluster of three masters, one of which is down or comes back with other data: users of the other two
//! are not affected, and no node is considered dead because its lease is on that master.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use barid_testkit::cluster::Business;
use barid_testkit::token::APP;
use barid_testkit::{Cluster, Device, Role};

/// Enough users for each master.
const USERS: usize = 12;
const LEASE_MS: i64 = 2_000;
/// After half of it without a renewal a node's life ends, and after all of it the routes of a dead node are
/// removed.
const VOID_AFTER: Duration = Duration::from_secs(12);

/// A user, its master, and its phone.
struct Phone {
    user: String,
    master: usize,
    device: Device,
}

impl Phone {
    /// Waits until it receives a message, and acknowledges all until then.
    async fn shown(&mut self, id: &str) -> Result<()> {
        loop {
            let message = self.device.message().await;
            let message = message.with_context(|| format!("{} waits for {id}", self.user))?;
            self.device.ack(message.seq).await?;
            if message.id == id {
                return Ok(());
            }
        }
    }
}

struct Bed {
    cluster: Cluster,
    business: Business,
    phones: Vec<Phone>,
    said: usize,
}

impl Bed {
    async fn start() -> Result<Self> {
        let mut builder = Cluster::builder()
            .redis_cluster(3)
            .set("redis.response_timeout_ms", 500)
            .set("redis.connect_timeout_ms", 500);
        for role in [Role::Access, Role::Dispatcher] {
            builder = builder.set_of(role, "lease_ttl_ms", LEASE_MS);
        }
        for role in [Role::Access, Role::Dispatcher, Role::Delayer] {
            let seconds = i64::try_from(VOID_AFTER.as_secs())?;
            builder = builder.set_of(role, "void_after_seconds", seconds);
        }
        let mut cluster = builder.start().await?;
        let mut phones = Vec::new();
        for user in (0..USERS).map(|n| format!("u{n}")) {
            let device = cluster.device(&user, "phone").await?;
            let master = lives_on(&mut cluster, &user).await?;
            phones.push(Phone { user, master, device });
        }
        for master in 0..3 {
            ensure!(phones.iter().any(|phone| phone.master == master), "nobody is on {master}");
        }
        Ok(Self { business: cluster.business()?, cluster, phones, said: 0 })
    }

    /// Sends a message to every user. Returns its id.
    async fn say(&mut self) -> Result<String> {
        let id = self.said.to_string();
        self.said += 1;
        for phone in &self.phones {
            self.business.send_text(&phone.user, &id, "").await?;
        }
        Ok(id)
    }

    /// Sends a message to every user. Those whose master is not `away` receive it.
    async fn reaches(&mut self, away: Option<usize>) -> Result<()> {
        let id = self.say().await?;
        for phone in self.phones.iter_mut().filter(|phone| Some(phone.master) != away) {
            phone.shown(&id).await?;
        }
        Ok(())
    }

    /// Repeats [`Self::reaches`] for longer than a lease lasts, and longer than routes of a dead node are kept.
    async fn reaches_all_the_while(&mut self, away: usize) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < VOID_AFTER + Duration::from_millis(LEASE_MS.unsigned_abs()) {
            self.reaches(Some(away)).await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// Checks that no node's life ended, and no route was removed.
    async fn nobody_died(&mut self) -> Result<()> {
        self.never(Role::Access, "barid_mailbox_lease_events_total", "event", "lapsed").await?;
        self.never(Role::Dispatcher, "barid_mailbox_lease_events_total", "event", "lapsed").await?;
        self.never(Role::Dispatcher, "barid_dispatcher_reaped_total", "outcome", "removed").await
    }

    /// Checks that no route was considered void.
    async fn nobody_was_missed(&mut self) -> Result<()> {
        self.never(Role::Dispatcher, "barid_dispatcher_pushes_total", "outcome", "void").await?;
        self.never(Role::Dispatcher, "barid_dispatcher_resends_total", "outcome", "void").await
    }

    async fn never(&mut self, role: Role, metric: &str, label: &str, value: &str) -> Result<()> {
        let count = self.cluster.node(role, 0).metrics().await?.get(metric, label, value);
        ensure!(count == Some(0.0), "{role:?}: {metric} of {label} {value}: {count:?}");
        Ok(())
    }
}

/// The master of a connected user.
async fn lives_on(cluster: &mut Cluster, user: &str) -> Result<usize> {
    let pattern = format!("*:r:{APP}:{user}");
    for (index, master) in cluster.masters()?.nodes().iter().enumerate() {
        if !master.query::<Vec<String>>(&["KEYS", &pattern]).await?.is_empty() {
            return Ok(index);
        }
    }
    anyhow::bail!("{user} has no route")
}

/// How a master is unavailable.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Stopped,
    /// Killed, and restarted with older data.
    Older,
    /// Killed, and restarted without data.
    Emptied,
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_27_a_lease_whose_master_is_away_or_back_with_other_data_ends_no_session()
-> Result<()> {
    let mut bed = Bed::start().await?;
    let away = bed.cluster.masters()?.master_of("barid:node:access-0").await?;
    for fault in [Fault::Stopped, Fault::Older, Fault::Emptied] {
        bed.reaches(None).await?;
        let master = bed.cluster.masters()?.node(away);
        match fault {
            Fault::Stopped => master.stop()?,
            Fault::Older => {
                let _: String = master.query(&["SAVE"]).await?;
                bed.reaches(None).await?;
                bed.cluster.masters()?.node(away).kill()?;
            }
            Fault::Emptied => {
                std::fs::remove_file(master.dir().join("dump.rdb"))?;
                master.kill()?;
            }
        }
        bed.reaches_all_the_while(away).await.with_context(|| format!("{fault:?}"))?;
        bed.nobody_died().await.with_context(|| format!("{fault:?}"))?;
        bed.nobody_was_missed().await.with_context(|| format!("{fault:?}"))?;
        let master = bed.cluster.masters()?.node(away);
        match fault {
            Fault::Stopped => master.cont()?,
            Fault::Older | Fault::Emptied => master.restart().await?,
        }
        // Its users receive what they missed, in the same sessions, and the next message.
        bed.cluster.wait_ready().await?;
        bed.reaches(None).await.with_context(|| format!("{fault:?}, back"))?;
        bed.nobody_died().await.with_context(|| format!("{fault:?}, back"))?;
        bed.nobody_was_missed().await.with_context(|| format!("{fault:?}, back"))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_28_processes_that_start_while_a_master_is_away_see_who_lives() -> Result<()> {
    let mut bed = Bed::start().await?;
    for away in 0..3 {
        bed.reaches(None).await?;
        ensure!(bed.cluster.drain(Role::Purger, 0).await? == 0);
        bed.cluster.kill(Role::Delayer, 0)?;
        bed.cluster.kill(Role::Dispatcher, 0)?;
        bed.cluster.masters()?.node(away).stop()?;
        for role in [Role::Dispatcher, Role::Delayer, Role::Purger] {
            bed.cluster.spawn(role, 0)?;
        }
        // A new node is seen, whatever the master of its lease.
        bed.cluster.add(Role::Access, away + 1)?;
        let living = bed.phones.iter().position(|phone| phone.master != away).context("a user")?;
        let user = bed.phones[living].user.clone();
        let tablet = format!("tablet{away}");
        let mut tablet = bed.cluster.device_at(away + 1, &user, &tablet).await?;
        bed.reaches(Some(away)).await.with_context(|| format!("master {away} away"))?;
        let first = tablet.message().await.context("on the new node")?;
        // The new delayer re-sends what is not acknowledged.
        let again = tablet.message().await.context("again, on the new node")?;
        let said = (bed.said - 1).to_string();
        ensure!(first.id == said && again.id == said, "{said}: {first:?} {again:?}");
        tablet.ack(again.seq).await?;
        tablet.close().await?;
        bed.cluster.masters()?.node(away).cont()?;
        bed.cluster.wait_ready().await?;
        bed.reaches(None).await.with_context(|| format!("master {away} back"))?;
        bed.nobody_died().await?;
    }
    Ok(())
}
