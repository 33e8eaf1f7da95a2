//! Detects shards that lost writes, for processes that have no lease.

use std::time::Duration;

use barid_core::{Clock as _, Incarnation, Shard, SystemClock};
use futures::future::join_all;
use tokio::time::Instant;

use super::life::{Life, News, Place};
use super::places::{CopyOf, KEPT};
use crate::{Error, Mailbox};

/// How long a canary counts as alive after it was written.
const TTL: Duration = Duration::from_secs(60);

/// A number beside every shard, raised by each [`Canary::look`]. A shard that has another one than was
/// written last has lost that writing, and whatever was written before it since.
///
/// Each look costs Redis a few microseconds a shard, so it may run every few seconds.
pub struct Canary {
    mailbox: Mailbox,
    id: String,
    life: Life,
}

/// What a look showed.
#[derive(Debug, Default)]
pub struct Looked {
    /// These lost what was there, in order.
    pub forgot: Vec<Shard>,
    /// These did not answer, and why.
    pub failed: Vec<(Shard, Error)>,
}

impl Canary {
    /// A canary called `id`, which no other process uses at the same time.
    pub fn new(mailbox: &Mailbox, id: &str) -> Self {
        let incarnation = Incarnation(SystemClock.now_ms());
        Self {
            mailbox: mailbox.clone(),
            // No node is called so.
            id: format!("canary:{id}"),
            life: Life::new(incarnation, Duration::MAX, Instant::now()),
        }
    }

    /// Writes the next number beside every shard. The first look beside a shard shows nothing. A master
    /// that does not answer within `patience` keeps the others from nothing.
    pub async fn look(&mut self, patience: Duration) -> Looked {
        let began = Instant::now();
        let sweep = !self.life.is_held();
        let (stamp, _) = self.life.attempt(began, SystemClock.now_ms());
        let copy = CopyOf {
            id: self.id.clone(),
            stamp,
            ttl: TTL,
            given_up: false,
            kept: sweep.then_some(KEPT),
            text: "role\0canary".into(),
        };
        let topology = self.mailbox.topology();
        let lanes = topology.shards_by_lane();
        let written = lanes.iter().map(|shards| copy.write(topology, shards, began + patience));
        let mut looked = Looked::default();
        for (shard, answer) in join_all(written).await.into_iter().flatten() {
            let now_ms = SystemClock.now_ms();
            match answer {
                Ok(wrote) => {
                    let news = self.life.answered(Place::Copy(shard), stamp, wrote, began, now_ms);
                    if matches!(news, Some(News::Forgot(_))) {
                        looked.forgot.push(shard);
                    }
                }
                Err(error) => looked.failed.push((shard, error)),
            }
        }
        looked.forgot.sort();
        looked
    }
}
