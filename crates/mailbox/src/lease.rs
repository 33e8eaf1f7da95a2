//! A node's lease: its routes are valid while the lease is held.
//!
//! ```text
//! Lease ── Keeper (its task) ── places: writes it everywhere ── record: encodes it
//!             └─ LeaseState: state machine     events: for the owner     copies: reads it
//! ```
//!
//! An incarnation of a node lasts from its first write of a lease to a restart, or to a lapse that is too long.

mod config;
mod confirming;
pub(crate) mod copies;
mod events;
mod keeper;
#[cfg(test)]
mod model;
mod name;
pub(crate) mod node;
pub(crate) mod places;
pub(crate) mod record;
pub(crate) mod state;

use std::sync::Arc;
use std::time::Duration;

use barid_core::Incarnation;
use barid_runtime::Health;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::Instrument as _;

pub use self::config::LeaseConfig;
pub use self::confirming::{Confirming, LiveSession, LiveSessions};
use self::events::Happened;
pub use self::events::LeaseEvent;
use self::keeper::{Keeper, Order, Reported};
pub use self::node::{NodeRecord, NodeRole, check_text};
use self::state::LeaseState;
use crate::{Error, Mailbox};

/// How long the routes of a node that is gone are kept by default.
const VOID_AFTER: Duration = Duration::from_secs(600);

/// A lease that renews itself until it is released. If it is dropped instead, it expires.
pub struct Lease {
    orders: mpsc::Sender<Order>,
    wanted: watch::Sender<NodeRecord>,
    happened: Arc<Happened>,
    reported: Reported,
    task: JoinHandle<()>,
}

impl LeaseConfig {
    /// Takes the lease, and renews it every third of `ttl`. Its incarnation may be higher than in `record`, if a
    /// higher one of this name is found ([`Lease::record`]).
    ///
    /// # Errors
    /// Returns [`Error::Away`] if the lease could not be written anywhere.
    pub async fn acquire(&self, mailbox: &Mailbox, record: NodeRecord) -> Result<Lease, Error> {
        Lease::acquire_with(mailbox, record, self.ttl, self.void_after).await
    }
}

impl Lease {
    /// As [`LeaseConfig::acquire`], with this `ttl` and routes that are kept for ten minutes.
    ///
    /// # Errors
    /// Returns [`Error::Away`] if the lease could not be written anywhere.
    pub async fn acquire(
        mailbox: &Mailbox,
        record: NodeRecord,
        ttl: Duration,
    ) -> Result<Self, Error> {
        Self::acquire_with(mailbox, record, ttl, VOID_AFTER).await
    }

    async fn acquire_with(
        mailbox: &Mailbox,
        record: NodeRecord,
        ttl: Duration,
        void_after: Duration,
    ) -> Result<Self, Error> {
        let reconnections = mailbox.reconnections();
        let state = LeaseState::new(record.incarnation, ttl, void_after, Instant::now());
        let (orders, inbox) = mpsc::channel(16);
        let (wanted, _) = watch::channel(record);
        let (happened, reported) = (Arc::<Happened>::default(), Reported::default());
        let mut keeper = Keeper {
            mailbox: mailbox.clone(),
            ttl,
            state,
            wanted: wanted.clone(),
            happened: Arc::clone(&happened),
            reported: Arc::clone(&reported),
        };
        keeper.acquire().await?;
        keeper.state.begin_work();
        // The events so far are those of acquiring it.
        happened.clear();
        let task = tokio::spawn(keeper.run(inbox, reconnections).in_current_span());
        Ok(Self { orders, wanted, happened, reported, task })
    }

    /// Adds the condition `lease` to `health`, which is ready while this lease is renewed in time.
    pub fn report_to(&self, health: &Health, ttl: Duration) {
        let condition = health.lapsing("lease", "renewal", ttl);
        condition.ready();
        // A second call would change nothing.
        let _first = self.reported.set(condition);
    }

    /// The current record, which is published with the next write.
    pub fn record(&self) -> NodeRecord {
        self.wanted.borrow().clone()
    }

    /// Publishes the number of sessions with the next renewal.
    pub fn set_load(&self, load: u64) {
        self.wanted.send_modify(|record| record.load = load);
    }

    /// Publishes at once that the node drains.
    pub fn set_draining(&self) {
        self.wanted.send_modify(|record| record.draining = true);
        self.order(Order::Publish);
    }

    /// Publishes at once that all routes of earlier incarnations are void.
    pub fn set_confirmed(&self, incarnation: Incarnation) {
        if self.wanted.send_if_modified(|record| record.set_confirmed(incarnation)) {
            self.order(Order::Publish);
        }
    }

    /// Waits for the next event. Cancel-safe.
    pub async fn next_event(&mut self) -> LeaseEvent {
        self.happened.next().await
    }

    /// Releases the lease. Where Redis cannot be reached, it expires.
    pub async fn release(mut self) {
        if self.orders.send(Order::Release).await.is_ok() {
            let _cancelled = (&mut self.task).await;
        }
    }

    fn order(&self, order: Order) {
        // If the queue is full, the keeper is about to publish anyway.
        let _full = self.orders.try_send(order);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.task.abort();
    }
}
