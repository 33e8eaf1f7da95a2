//! The task of a lease: renews it and reports its events.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use barid_core::{Clock as _, SystemClock};
use barid_runtime::Condition;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;

use super::events::Happened;
use super::node::NodeRecord;
use super::places::{State, Writing};
use super::state::{LeaseState, News, Place};
use crate::{Error, Mailbox};

/// The readiness condition of the lease.
pub(super) type Reported = Arc<OnceLock<Condition>>;

/// A request of the lease's owner.
pub(super) enum Order {
    Publish,
    Release,
}

/// State of the task; [`super::Lease`] is its owner's side.
pub(super) struct Keeper {
    pub mailbox: Mailbox,
    pub ttl: Duration,
    pub state: LeaseState,
    pub wanted: watch::Sender<NodeRecord>,
    pub happened: Arc<Happened>,
    pub reported: Reported,
}

/// Copies beside the shards that one write found lost, or possibly lost.
#[derive(Default)]
struct Copies {
    forgot: Vec<u16>,
    uncertain: Vec<u16>,
}

impl Copies {
    fn add(&mut self, news: Option<News>) {
        match news {
            Some(News::Forgot(Place::Copy(shard))) => self.forgot.push(shard.get()),
            Some(News::Uncertain(shard)) => self.uncertain.push(shard.get()),
            _ => {}
        }
    }

    /// One line each, because a master holds many shards.
    fn log(&self) {
        if !self.forgot.is_empty() {
            let (count, shards) = (self.forgot.len(), &self.forgot);
            tracing::warn!(count, ?shards, "shards of redis have lost data");
        }
        if !self.uncertain.is_empty() {
            let (count, shards) = (self.uncertain.len(), &self.uncertain);
            tracing::info!(
                count,
                ?shards,
                "redis did not answer in time: shards may have lost data"
            );
        }
    }
}

impl Keeper {
    /// Writes until the lease is held. Retries only with a higher incarnation, if one ahead of its own was found.
    pub async fn acquire(&mut self) -> Result<(), Error> {
        loop {
            let before = self.state.incarnation();
            let error = self.write(State::Held { announce: true }).await;
            match error {
                _ if self.state.is_held() => return Ok(()),
                Some(error) if self.state.incarnation() == before => return Err(error),
                _ => {}
            }
        }
    }

    /// Renews the lease until it is released or its owner is dropped.
    pub async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Order>,
        mut reconnections: broadcast::Receiver<crate::Reconnected>,
    ) {
        let mut due = Instant::now() + self.ttl / 3;
        loop {
            let mut announce = false;
            tokio::select! {
                order = inbox.recv() => match order {
                    Some(Order::Publish) => announce = true,
                    Some(Order::Release) | None => return self.release().await,
                },
                reconnected = reconnections.recv() => match reconnected {
                    Ok(reconnected) => {
                        self.happened.add(|pending| pending.forget(reconnected.shards.iter().copied()));
                    }
                    // It is unknown which shards.
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        let all = self.mailbox.shards().all();
                        self.happened.add(|pending| pending.forget(all));
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                () = tokio::time::sleep_until(due) => {}
            }
            let began = Instant::now();
            let announce = announce
                || self.wanted.borrow().draining
                || !self.state.is_held()
                || self.state.has_expired(began);
            self.write(State::Held { announce }).await;
            let renewed = self.state.is_held() && self.state.held_at() >= began;
            due = began + if renewed { self.ttl / 3 } else { self.ttl / 10 };
        }
    }

    /// Writes the lease once in all places. Returns one of the errors, if there were any.
    async fn write(&mut self, state: State) -> Option<Error> {
        let began = Instant::now();
        let (stamp, news) = self.state.attempt(began, SystemClock.now_ms());
        self.act_on(news);
        let record = self.wanted.borrow().clone();
        let sweep = !self.state.is_held();
        let writing = Writing { record: &record, stamp, ttl: self.ttl, state, sweep };
        // A master that does not answer must not delay the next write to the others.
        let mut answers = writing.start(self.mailbox.topology(), self.ttl / 3);
        let (mut failed, mut copies, mut forgot) = (None, Copies::default(), false);
        while let Some((place, answer)) = answers.recv().await {
            match answer {
                Ok(wrote) => {
                    let now_ms = SystemClock.now_ms();
                    let news = self.state.answered(place, stamp, wrote, began, now_ms);
                    forgot |= matches!(news, Some(News::Forgot(_) | News::Uncertain(_)));
                    copies.add(news);
                    self.act_on(news);
                    self.report(began);
                }
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = &failed {
            tracing::debug!(%error, "lease not written in all places");
        }
        copies.log();
        if forgot {
            self.check_meta().await;
        }
        failed
    }

    fn report(&self, began: Instant) {
        if self.state.is_held()
            && self.state.held_at() >= began
            && let Some(condition) = self.reported.get()
        {
            condition.ready();
        }
    }

    fn act_on(&mut self, news: Option<News>) {
        self.wanted.send_if_modified(|record| self.state.enter(record, news));
        let Some(news) = news else { return };
        self.happened.add(|pending| pending.add(news));
        let incarnation = self.state.incarnation();
        let events = &self.mailbox.topology().metrics().lease_events;
        match news {
            News::Lapsed(why) => {
                tracing::warn!(
                    why,
                    incarnation = incarnation.0,
                    "lease lapsed, taking a new incarnation"
                );
                events.with_label_values(&["lapsed"]).inc();
                if let Some(condition) = self.reported.get() {
                    condition.failing(format!("lapsed: {why}"));
                }
            }
            News::Taken(_) => events.with_label_values(&["taken"]).inc(),
            News::Forgot(Place::Own) => {
                tracing::warn!("lease was missing, written again");
                events.with_label_values(&["was_gone"]).inc();
            }
            News::Forgot(Place::Copy(_)) => events.with_label_values(&["forgot"]).inc(),
            News::Uncertain(_) => events.with_label_values(&["uncertain"]).inc(),
        }
    }

    /// Checks `barid:meta` after a shard has lost data: it is written again if Redis was emptied.
    async fn check_meta(&self) {
        let checked = self.mailbox.topology().check_meta();
        match tokio::time::timeout(self.ttl / 3, checked).await {
            Ok(Err(error @ Error::Unusable(_))) => {
                tracing::error!(%error, "redis was emptied and set up differently");
            }
            Ok(Err(error)) => tracing::debug!(%error, "checking barid:meta failed"),
            Ok(Ok(())) | Err(_) => {}
        }
    }

    async fn release(mut self) {
        if let Some(error) = self.write(State::Released).await {
            tracing::warn!(%error, "lease not released in all places, it expires there");
        }
    }
}
