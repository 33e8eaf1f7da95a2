//! Work that follows an accept call: hand-on to a dispatcher, receipts and dead letters. Then the record is finished.

use std::sync::Arc;

use barid_bus::{DeadLetter, DeadLetters, Receipts};
use barid_core::{Clock, NodeId, Owner, UserId};
use barid_mailbox::{AcceptMessage, AcceptOutcome, RedisTime};
use barid_runtime::{Hop, Spawner, Tracer};
use barid_wire::envelope::Header;
use barid_wire::internal::{Push, PushAudience};
use barid_wire::record::ReceiptKind;
use barid_wire::v1::Receipt;
use futures::future::join_all;
use tokio::sync::mpsc;

use super::event::Event;
use super::hand_on::HandOn;
use crate::flight::{Flight, Parcel, last_parts};
use crate::metrics::{ACCEPT_FAILED, Metrics};

/// Handles the outcomes of accept calls. Cheap to clone.
#[derive(Clone)]
pub struct Outbox {
    /// Receipts to the business.
    pub receipts: Receipts,
    /// Dead letters for the operator.
    pub dead: DeadLetters,
    /// Pushes to the dispatchers.
    pub hand_on: HandOn,
    /// The clock of receipts.
    pub clock: Arc<dyn Clock>,
    /// The purger's metrics.
    pub metrics: Metrics,
    /// Logs sampled messages.
    pub tracer: Tracer,
    /// Starts the lanes, and the delivery of receipts and dead letters.
    pub tasks: Spawner,
}

/// Kafka records that must be delivered before a message is done.
struct Owed {
    flight: Arc<Flight>,
    receipt: Option<Receipt>,
    /// Why Redis refused the message.
    dead: Option<String>,
}

impl Outbox {
    /// Handles the outcomes of a call. Hands on first, for latency; a record is finished once its receipts and dead
    /// letters are delivered. `clock` is that of the master that was called.
    pub async fn settle(
        &self,
        done: Vec<(Parcel, AcceptOutcome)>,
        clock: Option<RedisTime>,
        events: &mpsc::Sender<Event>,
    ) {
        let now_ms = self.clock.now_ms();
        let mut settled = Vec::with_capacity(done.len());
        let (mut owed, mut pushes) = (Vec::new(), Vec::new());
        for (parcel, outcome) in done {
            let Parcel { flight, shard, message } = parcel;
            let owner = &message.owner;
            self.metrics.messages.with_label_values(&[word(&outcome)]).inc();
            let mut dead = None;
            let receipt = match outcome {
                AcceptOutcome::Accepted { seq, envelope, online, nodes, evicted } => {
                    if let Some(clock) = clock {
                        let user = owner.user().map_or("", UserId::as_str);
                        self.hops(&flight, user, &envelope, clock);
                    }
                    self.metrics.evicted.inc_by(u64::from(evicted));
                    if online || !nodes.is_empty() {
                        let sampled = flight.is_sampled();
                        let push = Push { envelope, sampled, ..push_to(&message, &nodes) };
                        pushes.push((shard, push));
                    }
                    flight.receipt(ReceiptKind::Accepted, owner, seq.0, now_ms)
                }
                AcceptOutcome::AcceptedBefore => {
                    flight.receipt(ReceiptKind::Accepted, owner, 0, now_ms)
                }
                AcceptOutcome::Duplicate => {
                    flight.receipt(ReceiptKind::Duplicate, owner, 0, now_ms)
                }
                AcceptOutcome::Failed(reason) => {
                    let receipt = flight.refusal(Some(owner), ACCEPT_FAILED, &reason, now_ms);
                    dead = Some(reason);
                    Some(receipt)
                }
            };
            if receipt.is_some() || dead.is_some() {
                owed.push(Owed { flight, receipt, dead });
            } else {
                settled.push(flight);
            }
        }
        self.hand_on.hand_on(pushes).await;
        self.finish(settled, owed, events).await;
    }

    async fn finish(
        &self,
        settled: Vec<Arc<Flight>>,
        owed: Vec<Owed>,
        events: &mpsc::Sender<Event>,
    ) {
        let finished = last_parts(settled.into_iter());
        if !finished.is_empty() {
            let _ = events.send(Event::Finished(finished)).await;
        }
        if !owed.is_empty() {
            let (this, events) = (self.clone(), events.clone());
            // Bounded: these records count in the window until they are finished.
            self.tasks.spawn_finite("the delivery of receipts", async move {
                this.deliver(owed, &events).await;
            });
        }
    }

    /// Handles messages that a repair has read again and that need no call: `had` are known to their shard, and their
    /// receipts were sent before; `expired` have expired since, and get a receipt that says so.
    pub async fn settle_again(
        &self,
        had: Vec<Parcel>,
        expired: Vec<Parcel>,
        events: &mpsc::Sender<Event>,
    ) {
        let count = |outcome, parcels: usize| {
            self.metrics.messages.with_label_values(&[outcome]).inc_by(parcels as u64);
        };
        count("known", had.len());
        count("expired", expired.len());
        let now_ms = self.clock.now_ms();
        let mut settled: Vec<Arc<Flight>> = had.into_iter().map(|parcel| parcel.flight).collect();
        let mut owed = Vec::new();
        for Parcel { flight, message, .. } in expired {
            match flight.receipt(ReceiptKind::Expired, &message.owner, 0, now_ms) {
                Some(receipt) => owed.push(Owed { flight, receipt: Some(receipt), dead: None }),
                None => settled.push(flight),
            }
        }
        self.finish(settled, owed, events).await;
    }

    /// Records the hops up to acceptance.
    fn hops(&self, flight: &Flight, user: &str, envelope: &[u8], clock: RedisTime) {
        let Ok(header) = Header::parse(envelope) else { return };
        let taken_us = clock.us(flight.taken.into_std());
        let produced_us = flight.produced_at_ms().saturating_mul(1000);
        if flight.is_sampled() {
            self.tracer.log(flight.trace_event("accepted", user, header.accepted_at_us));
        }
        self.metrics.hops.observe(Hop::ProducedTaken, produced_us, taken_us);
        self.metrics.hops.observe(Hop::TakenAccepted, taken_us, header.accepted_at_us);
    }

    async fn deliver(&self, owed: Vec<Owed>, events: &mpsc::Sender<Event>) {
        join_all(owed.iter().map(|owed| self.deliver_one(owed))).await;
        let finished = last_parts(owed.into_iter().map(|owed| owed.flight));
        if !finished.is_empty() {
            let _ = events.send(Event::Finished(finished)).await;
        }
    }

    async fn deliver_one(&self, owed: &Owed) {
        if let Some(reason) = &owed.dead {
            self.metrics.refused.with_label_values(&[ACCEPT_FAILED]).inc();
            let record = &owed.flight.record;
            self.dead.write(&DeadLetter { record, code: ACCEPT_FAILED, reason }).await;
        }
        if let Some(receipt) = &owed.receipt {
            self.receipts.deliver(receipt).await;
        }
    }
}

/// The recipients of a message, for the dispatcher.
fn push_to(message: &AcceptMessage, nodes: &[NodeId]) -> Push {
    let app = message.app.to_string();
    match &message.owner {
        Owner::User(user) => Push { app, user: user.to_string(), ..Default::default() },
        Owner::Audience(audience) => {
            let nodes = nodes.iter().map(NodeId::to_string).collect();
            let audience = PushAudience { mailbox: audience.to_string(), nodes };
            Push { app, audience: Some(Box::new(audience)), ..Default::default() }
        }
    }
}

fn word(outcome: &AcceptOutcome) -> &'static str {
    match outcome {
        AcceptOutcome::Accepted { .. } => "accepted",
        AcceptOutcome::AcceptedBefore => "before",
        AcceptOutcome::Duplicate => "duplicate",
        AcceptOutcome::Failed(_) => "failed",
    }
}
