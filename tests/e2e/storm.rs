//! Random processes are killed or stopped at random times, several at once. `BARID_STORM_SECONDS` sets the
//! duration, and `BARID_SEED` the seed.

use std::time::Duration;

use anyhow::Result;
use barid_testkit::{Cluster, Role};
use tokio::time::Instant;

use crate::trial::{Trial, name};

/// Default duration, seconds.
const SECONDS: u64 = 12;
/// Messages per second.
const RATE: usize = 150;
/// The longest time between two kills.
const PAUSE_MS: u64 = 500;
/// The longest time that a process is down; longer than a lease for those that are stopped.
const DEAD_MS: usize = 1_500;
const STOPPED_MS: usize = 4_000;

/// A process that can be killed or stopped.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Victim {
    Node(Role, usize),
    Redis,
    Kafka,
}

struct Storm {
    trial: Trial,
    down: Vec<Down>,
    /// Restarted, and not known to be ready yet.
    rising: Vec<(Role, usize)>,
}

/// A killed or stopped process, and until when.
struct Down {
    victim: Victim,
    until: Instant,
    stopped: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_kills() -> Result<()> {
    let seconds = match std::env::var("BARID_STORM_SECONDS") {
        Ok(seconds) => seconds.parse()?,
        Err(_) => SECONDS,
    };
    let messages = RATE * usize::try_from(seconds)?;
    let settings = Cluster::builder()
        .pairs()
        .own_kafka()
        .durable_redis()
        .set_of(Role::Access, "lease_ttl_ms", 2_000)
        // The messages of the user who connects last must fit into the mailbox.
        .set("redis.entries_max", i64::try_from(messages.max(500))?);
    let trial = Trial::start(settings).await?;
    let flow = trial.flow(messages, Duration::from_secs(seconds));
    let mut storm = Storm { trial, down: Vec::new(), rising: Vec::new() };
    while flow.runs() {
        storm.trial.pause(PAUSE_MS).await;
        storm.recover(Instant::now()).await?;
        storm.strike()?;
        storm.see_who_is_well().await;
    }
    let all = storm.down.iter().map(|one| one.until).max();
    storm.recover(all.unwrap_or(Instant::now())).await?;
    for (role, number) in storm.rising {
        storm.trial.cluster.node(role, number).ready().await?;
        storm.trial.well(role, number);
    }
    storm.trial.finish(flow).await
}

impl Storm {
    /// Kills or stops a running process.
    fn strike(&mut self) -> Result<()> {
        let trial = &mut self.trial;
        let victim = match trial.pick(40) {
            0 => Victim::Kafka,
            1 | 2 => Victim::Redis,
            dice => Victim::Node(Role::ALL[dice % Role::ALL.len()], trial.pick(2)),
        };
        if self.down.iter().any(|one| one.victim == victim) {
            return Ok(());
        }
        let stopped = victim != Victim::Kafka && trial.pick(4) == 0;
        match victim {
            Victim::Node(role, number) if stopped => {
                trial.tell(&format!("stop {}", name(role, number)));
                trial.cluster.node(role, number).process()?.stop()?;
            }
            Victim::Node(role, number) => {
                trial.kill(role, number)?;
                self.rising.retain(|one| *one != (role, number));
            }
            Victim::Redis if stopped => {
                trial.tell("stop Redis");
                trial.cluster.redis.stop()?;
            }
            Victim::Redis => {
                trial.tell("kill Redis");
                trial.cluster.redis.kill()?;
            }
            Victim::Kafka => {
                trial.tell("kill Kafka");
                trial.cluster.kafka()?.kill()?;
            }
        }
        let time = trial.pick(if stopped { STOPPED_MS } else { DEAD_MS });
        let until = Instant::now() + Duration::from_millis(u64::try_from(time)?);
        self.down.push(Down { victim, until, stopped });
        Ok(())
    }

    /// Restarts or continues those whose time is over.
    async fn recover(&mut self, now: Instant) -> Result<()> {
        let trial = &mut self.trial;
        for Down { victim, stopped, .. } in self.down.extract_if(.., |one| one.until <= now) {
            match victim {
                Victim::Node(role, number) if stopped => {
                    trial.tell(&format!("continue {}", name(role, number)));
                    trial.cluster.node(role, number).process()?.cont()?;
                }
                Victim::Node(role, number) => {
                    trial.spawn(role, number)?;
                    self.rising.push((role, number));
                }
                Victim::Redis if stopped => {
                    trial.tell("continue Redis");
                    trial.cluster.redis.cont()?;
                }
                Victim::Redis => {
                    trial.cluster.redis.restart().await?;
                    trial.tell("Redis is back");
                }
                Victim::Kafka => {
                    trial.cluster.kafka()?.restart().await?;
                    trial.tell("Kafka is back");
                }
            }
        }
        Ok(())
    }

    /// From the time that a node is ready, its sessions must not end until it is killed again.
    async fn see_who_is_well(&mut self) {
        let mut rising = Vec::new();
        for (role, number) in self.rising.drain(..) {
            let ready = self.trial.cluster.node(role, number).ready();
            match tokio::time::timeout(Duration::from_millis(20), ready).await {
                Ok(Ok(())) => self.trial.well(role, number),
                _ => rising.push((role, number)),
            }
        }
        self.rising = rising;
    }
}
