//! The task behind a lease: renews it, and reports what happens to it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use barid_core::{Clock as _, SystemClock};
use barid_runtime::Condition;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;

use super::events::Happened;
use super::life::{Life, News, Place};
use super::node::NodeRecord;
use super::places::{State, Writing};
use crate::{Error, Mailbox};

/// The readiness condition of the lease.
pub(super) type Reported = Arc<OnceLock<Condition>>;

/// What the owner of a lease asks of its keeper.
pub(super) enum Order {
    Publish,
    Release,
}

/// State of the task; [`super::Lease`] is its owner's side.
pub(super) struct Keeper {
    pub mailbox: Mailbox,
    pub ttl: Duration,
    pub life: Life,
    pub wanted: watch::Sender<NodeRecord>,
    pub happened: Arc<Happened>,
    pub reported: Reported,
}

impl Keeper {
    /// Writes until the lease is held. Retries only where another life is ahead, and outbids it.
    pub async fn acquire(&mut self) -> Result<(), Error> {
        loop {
            let before = self.life.incarnation();
            let error = self.write(State::Held { announce: true }).await;
            match error {
                _ if self.life.is_held() => return Ok(()),
                Some(error) if self.life.incarnation() == before => return Err(error),
                _ => {}
            }
        }
    }

    /// Renews the lease until it is given up, or its owner is gone.
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
                    Some(Order::Release) | None => return self.give_up().await,
                },
                reconnected = reconnections.recv() => match reconnected {
                    Ok(reconnected) => {
                        self.happened.add(|pending| pending.forget(reconnected.shards.iter().copied()));
                    }
                    // Which ones is not known any longer.
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
                || !self.life.is_held()
                || self.life.has_expired(began);
            self.write(State::Held { announce }).await;
            let renewed = self.life.is_held() && self.life.held_at() >= began;
            due = began + if renewed { self.ttl / 3 } else { self.ttl / 10 };
        }
    }

    /// Writes the lease once everywhere. The error is one of those that came, if any did.
    async fn write(&mut self, state: State) -> Option<Error> {
        let began = Instant::now();
        let (stamp, news) = self.life.attempt(began, SystemClock.now_ms());
        self.heed(news);
        let record = self.wanted.borrow().clone();
        let sweep = !self.life.is_held();
        let writing = Writing { record: &record, stamp, ttl: self.ttl, state, sweep };
        // A master that does not answer must not keep the others from the next writing.
        let mut answers = writing.start(self.mailbox.topology(), self.ttl / 3);
        let (mut failed, mut forgot) = (None, false);
        while let Some((place, answer)) = answers.recv().await {
            match answer {
                Ok(wrote) => {
                    let now_ms = SystemClock.now_ms();
                    let news = self.life.answered(place, stamp, wrote, began, now_ms);
                    forgot |= matches!(news, Some(News::Forgot(_)));
                    self.heed(news);
                    self.report(began);
                }
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = &failed {
            tracing::debug!(%error, "the lease was not written everywhere");
        }
        if forgot {
            self.look_at_meta().await;
        }
        failed
    }

    fn report(&self, began: Instant) {
        if self.life.is_held()
            && self.life.held_at() >= began
            && let Some(condition) = self.reported.get()
        {
            condition.ready();
        }
    }

    fn heed(&mut self, news: Option<News>) {
        self.wanted.send_if_modified(|record| self.life.enter(record, news));
        let Some(news) = news else { return };
        self.happened.add(|pending| pending.add(news));
        let incarnation = self.life.incarnation();
        let events = &self.mailbox.topology().metrics().lease_events;
        match news {
            News::Lapsed(why) => {
                tracing::warn!(
                    why,
                    incarnation = incarnation.0,
                    "the lease lapsed: a new life begins"
                );
                events.with_label_values(&["lapsed"]).inc();
                if let Some(condition) = self.reported.get() {
                    condition.failing(format!("lapsed: {why}"));
                }
            }
            News::Taken(_) => events.with_label_values(&["taken"]).inc(),
            News::Forgot(Place::Own) => {
                tracing::warn!("the lease was gone: it stands again");
                events.with_label_values(&["was_gone"]).inc();
            }
            News::Forgot(Place::Copy(shard)) => {
                tracing::warn!(%shard, "a shard forgot what was written there");
                events.with_label_values(&["forgot"]).inc();
            }
        }
    }

    /// Checks `barid:meta` after a shard forgot: a Redis that was emptied gets it written again, and one that
    /// was set up otherwise is reported.
    async fn look_at_meta(&self) {
        let looked = self.mailbox.topology().check_meta();
        match tokio::time::timeout(self.ttl / 3, looked).await {
            Ok(Err(error @ Error::Unusable(_))) => {
                tracing::error!(%error, "redis was emptied and set up otherwise");
            }
            Ok(Err(error)) => tracing::debug!(%error, "barid:meta cannot be looked at"),
            Ok(Ok(())) | Err(_) => {}
        }
    }

    async fn give_up(mut self) {
        if let Some(error) = self.write(State::GivenUp).await {
            tracing::warn!(%error, "the lease could not be given up everywhere: it ends by itself");
        }
    }
}
