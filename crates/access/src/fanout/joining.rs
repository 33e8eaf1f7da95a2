//! Calls to Redis for audiences: they list this node, and read what it has missed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barid_core::{AudienceKey, Shard};
use barid_mailbox::{
    AudienceReadRequest, Error, JoinOutcome, JoinRequest, Journal, JournalRequest,
};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, MissedTickBehavior};

use crate::clock::Clock;
use crate::fanout::hub::{Fanout, Received};
use crate::fanout::listings::Due;
use crate::fanout::place::Point;
use crate::mailboxes::Mailboxes;
use crate::sessions::Sessions;

/// Requests under way. They are batched on their way to each master.
const REQUESTS_MAX: usize = 256;
/// Readings under way, at most one an audience.
const READS_MAX: usize = 16;
/// Bounds of one page: two of the largest entries fit, of which the first is known.
const MISSING_ENTRIES: u32 = 128;
const MISSING_BYTES: u32 = 5 << 20;
/// How often the journals are read.
const JOURNAL_EVERY: Duration = Duration::from_secs(5);
/// Audiences in one reading: as many as a journal has.
const CHANGED_MAX: u32 = 10_000;
/// How long no request is sent to a master that did not answer one.
const AWAY: Duration = Duration::from_secs(1);

/// Keeps this node listed in Redis for each audience that has members here. Never returns.
pub async fn keep_listed(fanout: &Fanout, mailboxes: &Mailboxes, sessions: &Sessions) {
    let number = AtomicU64::new(0);
    let mut requests = FuturesUnordered::new();
    // Masters that did not answer, by lane: others must not wait for them.
    let mut away: HashMap<usize, Instant> = HashMap::new();
    loop {
        tokio::select! {
            due = fanout.next_due(), if requests.len() < REQUESTS_MAX => {
                let lane = lane_of(mailboxes, &due);
                if away.get(&lane).is_some_and(|until| *until > Instant::now()) {
                    fanout.not_listed(due);
                    continue;
                }
                let request = JoinRequest {
                    audience: due.audience.clone(),
                    node: sessions.node.clone(),
                    incarnation: sessions.incarnation(),
                    number: number.fetch_add(1, Ordering::Relaxed) + 1,
                    has_members: due.has_members,
                };
                requests.push(async move {
                    (lane, mailboxes.store().join(request).await, due)
                });
            }
            Some((lane, outcome, due)) = requests.next() => {
                if matches!(outcome, Err(Error::Away(_))) {
                    away.insert(lane, Instant::now() + AWAY);
                }
                answered(fanout, outcome, due);
            }
        }
    }
}

fn lane_of(mailboxes: &Mailboxes, due: &Due) -> usize {
    let store = mailboxes.store();
    let (app, audience) = (&due.audience.app, due.audience.audience.as_str());
    store.lane_of(store.shard_of_audience(app, audience))
}

fn answered(fanout: &Fanout, outcome: Result<JoinOutcome, Error>, due: Due) {
    match outcome {
        Ok(JoinOutcome::Joined { newest, .. }) => {
            let chain = newest.chain.unwrap_or_default();
            fanout.listed(&due, Point { epoch: newest.epoch, seq: newest.seq, chain });
        }
        // Another process of this name, or an earlier incarnation's request; the next one has a higher number.
        Ok(JoinOutcome::Superseded) => fanout.not_listed(due),
        Err(error) => {
            tracing::debug!(%error, audience = %due.audience, "cannot list the node for an audience");
            fanout.not_listed(due);
        }
    }
}

/// Reads from the mailboxes what did not reach this node. Never returns.
pub async fn read_missing(fanout: &Fanout, mailboxes: &Mailboxes, clock: &Clock) {
    let mut reads = FuturesUnordered::new();
    loop {
        tokio::select! {
            (audience, after) = fanout.next_read(), if reads.len() < READS_MAX => {
                let (entries_max, bytes_max) = (MISSING_ENTRIES, MISSING_BYTES);
                let request =
                    AudienceReadRequest { audience: audience.clone(), after, entries_max, bytes_max };
                reads.push(async move {
                    (mailboxes.store().read_audience(request).await, audience, after)
                });
            }
            Some((outcome, audience, after)) = reads.next() => match outcome {
                Ok(page) => {
                    let (now_ms, now) = (clock.now_ms(), clock.seconds());
                    let received = Received { now_ms, now, dispatched_after_us: None };
                    fanout.page(&audience, after, page, received);
                }
                Err(error) => {
                    tracing::debug!(%error, %audience, "cannot read an audience's mailbox");
                    fanout.not_read(audience);
                }
            },
        }
    }
}

/// Reads the journals of the shards of this node's audiences, for messages that did not reach it and after which none
/// came. Never returns.
pub async fn read_journals(fanout: &Fanout, mailboxes: &Mailboxes) {
    let store = mailboxes.store();
    let mut known: HashMap<Shard, u64> = HashMap::new();
    let mut interval = tokio::time::interval(JOURNAL_EVERY);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let mut shards: HashMap<Shard, Vec<AudienceKey>> = HashMap::new();
        for key in fanout.audiences() {
            let shard = store.shard_of_audience(&key.app, key.audience.as_str());
            shards.entry(shard).or_default().push(key);
        }
        known.retain(|shard, _| shards.contains_key(shard));
        let reads = shards.into_iter().map(async |(shard, audiences)| {
            let before = known.get(&shard).copied();
            let request =
                JournalRequest { shard, after: before.unwrap_or(0), audiences_max: CHANGED_MAX };
            match store.journal(request).await {
                // The first reading, one behind what was trimmed, and one of a Redis that went back do not show what
                // has changed.
                Ok(Journal { trimmed, highest, .. })
                    if before.is_none_or(|before| before < trimmed || before > highest) =>
                {
                    fanout.changed(audiences.into_iter().map(|key| (key, 0)).collect());
                    Some((shard, highest))
                }
                Ok(journal) => {
                    fanout.changed(journal.changed);
                    Some((shard, journal.highest))
                }
                Err(error) => {
                    tracing::debug!(%error, %shard, "cannot read a journal");
                    None
                }
            }
        });
        let read = futures::future::join_all(reads).await;
        known.extend(read.into_iter().flatten());
    }
}

/// Lists the node again for audiences of a master with a new connection, which may have lost them. Never returns.
pub async fn follow_redis(fanout: &Fanout, mailboxes: &Mailboxes) {
    let store = mailboxes.store();
    let mut reconnections = store.reconnections();
    loop {
        match reconnections.recv().await {
            Ok(reconnected) => fanout.forgotten(|audience| {
                let shard = store.shard_of_audience(&audience.app, audience.audience.as_str());
                reconnected.shards.contains(&shard)
            }),
            Err(RecvError::Lagged(_)) => fanout.forgotten(|_| true),
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}
