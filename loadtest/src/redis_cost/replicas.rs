//! Waiting for replicas: `redis.wait_replicas` at 0, 1 and 2, each with as many replicas.

use std::time::Instant;

use anyhow::{Result, ensure};
use barid_mailbox::RedisConfig;
use barid_testkit::Redis;
use barid_testkit::redis::RedisOptions;

use crate::Arguments;
use crate::barid::{self, Barid};
use crate::case::Case;
use crate::floor;
use crate::report::{Report, Waits};
use crate::rounds::{Plan, WARM_UP};
use crate::server::Server;

/// Values of `redis.wait_replicas`.
const REPLICAS: std::ops::RangeInclusive<u32> = 0..=2;
/// Messages of a turn, unless a single batch has more; and its accept rounds, at most.
const TURN_MESSAGES: usize = 1_000;
const TURN_CALLS: usize = 200;

/// A master, its replicas, and a mailbox that waits for all of them.
struct Group {
    master: Server,
    replicas: Vec<Redis>,
    barid: Barid,
    waits: Waits,
}

/// All values of `redis.wait_replicas` with one batch size, in turn.
pub async fn run(arguments: &Arguments, batch: usize, report: &mut Report) -> Result<()> {
    let case = Case::Offline;
    let calls = (TURN_MESSAGES / batch).clamp(1, TURN_CALLS);
    let users = batch.max(arguments.users as usize);
    let mut groups = Vec::new();
    for count in REPLICAS {
        groups.push(Group::start(arguments, case, batch, count).await?);
    }
    let mut plan = Plan::new(arguments, case, users);
    for round in 0..WARM_UP + arguments.rounds {
        let mut messages = plan.round(batch);
        messages.truncate(calls * batch);
        for group in &mut groups {
            let before = group.master.usage().await?;
            let mut times_ms = Vec::with_capacity(calls);
            for batch in messages.chunks(batch) {
                let request = group.barid.group(case, batch)?;
                let began = Instant::now();
                let outcomes = group.barid.send(request).await?;
                times_ms.push(began.elapsed().as_secs_f64() * 1e3);
                ensure!(outcomes.len() == batch.len(), "{} accepted", outcomes.len());
            }
            let after = group.master.usage().await?;
            group.check_waits(round, after.waits - before.waits, times_ms.len())?;
            if let Some(last) = messages.last() {
                group.check_replicas(&floor::keys(case, last.user)?).await?;
            }
            if round >= WARM_UP {
                let cpu_us = (after.cpu_us - before.cpu_us) / messages.len() as f64;
                group.waits.push(times_ms, cpu_us);
            }
        }
    }
    for (count, group) in REPLICAS.zip(&groups) {
        report.add_waits(batch, count, &group.waits);
    }
    Ok(())
}

impl Group {
    async fn start(arguments: &Arguments, case: Case, batch: usize, count: u32) -> Result<Self> {
        // A replica is attached at once, and a link that is idle is known to live.
        let settings = [("repl-diskless-sync-delay", "0"), ("repl-ping-replica-period", "1")];
        let settings = settings.map(|(key, value)| (key.into(), value.into())).into();
        let options = RedisOptions { append_only: arguments.append_only, settings };
        let master = Server::start_with(options.clone()).await?;
        let mut replicas = Vec::new();
        for _ in 0..count {
            let replica = Redis::start_with(options.clone()).await?;
            replica.follow(master.redis().port()).await?;
            replicas.push(replica);
        }
        let config = RedisConfig {
            wait_replicas: count,
            wait_timeout_ms: 30_000,
            accept_batch_max: batch,
            ..barid::config(&master.url(), batch, case)
        };
        let barid = Barid::open(&config).await?;
        Ok(Self { master, replicas, barid, waits: Waits::default() })
    }

    /// Each accept round had its WAIT.
    fn check_waits(&self, round: u32, waits: f64, rounds: usize) -> Result<()> {
        let meant = if self.replicas.is_empty() { 0.0 } else { rounds as f64 };
        // The first round of a connection loads the script and is asked again, with another WAIT.
        let most = if round == 0 { meant + 1.0 } else { meant };
        ensure!(waits >= meant && waits <= most, "{waits} WAITs in {rounds} accept rounds");
        Ok(())
    }

    /// Each replica holds as many entries of the last accepted user as the master.
    async fn check_replicas(&self, [_, queue, _]: &[String; 3]) -> Result<()> {
        let length = ["LLEN", queue];
        let written: u64 = self.master.redis().query(&length).await?;
        for replica in &self.replicas {
            let held: u64 = replica.query(&length).await?;
            ensure!(held == written, "a replica holds {held} of {written} elements of {queue}");
        }
        Ok(())
    }
}
