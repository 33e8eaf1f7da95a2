//! Accept rounds with `redis.wait_replicas` at 0, 1 and 2, each with as many replicas.

use std::time::Instant;

use anyhow::{Result, ensure};
use barid_mailbox::RedisConfig;
use barid_testkit::Redis;
use barid_testkit::redis::RedisOptions;

use crate::barid::{self, Barid};
use crate::floor;
use crate::options::Options;
use crate::report::Report;
use crate::rounds::WARM_UP;
use crate::server::Server;
use crate::workload::{Case, Message, Plan};

/// Values of `redis.wait_replicas`.
const REPLICAS: std::ops::RangeInclusive<u32> = 0..=2;
/// Messages of a turn, or one batch if that is larger.
const TURN_MESSAGES: usize = 1_000;
/// Accept rounds of a turn, at most.
const TURN_ROUNDS: usize = 200;
const CASE: Case = Case::Offline;

/// A master, its replicas, and a mailbox that waits for all of them.
struct Group {
    master: Server,
    replicas: Vec<Redis>,
    barid: Barid,
    /// Duration of each accept round.
    times_ms: Vec<f64>,
    /// The master's CPU time per message, of each turn.
    cpu_us: Vec<f64>,
}

/// Measures all values of `redis.wait_replicas` with one batch size, in turn.
pub async fn run(options: &Options, batch: usize, report: &mut Report) -> Result<()> {
    let rounds = (TURN_MESSAGES / batch).clamp(1, TURN_ROUNDS);
    let mut groups = Vec::new();
    for count in REPLICAS {
        groups.push(Group::start(options, batch, count).await?);
    }
    let mut plan = Plan::new(options, CASE, batch.max(options.users as usize));
    for turn in 0..WARM_UP + options.rounds {
        let mut messages = plan.round(batch);
        messages.truncate(rounds * batch);
        for group in &mut groups {
            group.turn(turn, batch, &messages).await?;
        }
    }
    for (count, group) in REPLICAS.zip(groups) {
        report.add_wait(batch, count, group.times_ms, group.cpu_us);
    }
    Ok(())
}

impl Group {
    async fn start(options: &Options, batch: usize, count: u32) -> Result<Self> {
        // A replica is attached at once, and an idle link is checked every second.
        let settings = [("repl-diskless-sync-delay", "0"), ("repl-ping-replica-period", "1")];
        let settings = settings.map(|(key, value)| (key.into(), value.into())).into();
        let redis = RedisOptions { append_only: options.append_only, settings };
        let master = Server::start(redis.clone()).await?;
        let mut replicas = Vec::new();
        for _ in 0..count {
            let replica = Redis::start_with(redis.clone()).await?;
            replica.follow(master.redis.port()).await?;
            replicas.push(replica);
        }
        let config = RedisConfig {
            wait_replicas: count,
            wait_timeout_ms: 30_000,
            accept_batch_max: batch,
            ..barid::config(master.redis.url(), batch, CASE)
        };
        let barid = Barid::open(&config).await?;
        Ok(Self { master, replicas, barid, times_ms: Vec::new(), cpu_us: Vec::new() })
    }

    async fn turn(&mut self, turn: u32, batch: usize, messages: &[Message]) -> Result<()> {
        let before = self.master.usage().await?;
        let mut times_ms = Vec::new();
        for batch in messages.chunks(batch) {
            let group = self.barid.group(CASE, batch)?;
            let started = Instant::now();
            let outcomes = self.barid.send(group).await?;
            times_ms.push(started.elapsed().as_secs_f64() * 1e3);
            ensure!(outcomes.len() == batch.len(), "{} accepted", outcomes.len());
        }
        let after = self.master.usage().await?;
        self.check_waits(turn, after.waits - before.waits, times_ms.len())?;
        if let Some(last) = messages.last() {
            self.check_replicas(last.user).await?;
        }
        if turn >= WARM_UP {
            self.times_ms.extend(times_ms);
            self.cpu_us.push((after.cpu_us - before.cpu_us) / messages.len() as f64);
        }
        Ok(())
    }

    /// Fails unless each accept round had its WAIT.
    fn check_waits(&self, turn: u32, waits: f64, rounds: usize) -> Result<()> {
        let expected = if self.replicas.is_empty() { 0.0 } else { rounds as f64 };
        // The first round on a connection loads the script and is repeated with another WAIT.
        let most = if turn == 0 { expected + 1.0 } else { expected };
        ensure!(waits >= expected && waits <= most, "{waits} WAITs in {rounds} accept rounds");
        Ok(())
    }

    /// Fails unless each replica holds as many of the user's entries as the master.
    async fn check_replicas(&self, user: usize) -> Result<()> {
        let [_, queue, _] = floor::keys(CASE, user)?;
        let length = ["LLEN", &queue];
        let written: u64 = self.master.redis.query(&length).await?;
        for replica in &self.replicas {
            let held: u64 = replica.query(&length).await?;
            ensure!(held == written, "a replica holds {held} of {written} elements of {queue}");
        }
        Ok(())
    }
}
