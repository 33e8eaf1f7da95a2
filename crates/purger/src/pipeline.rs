//! The pipeline moves records from the log into the lanes: it takes them while the window has room, decodes and
//! queues them, or leaves them in the log while their master is unavailable. It handles finished records, and records
//! that have to be read again.

use std::collections::HashMap;
use std::sync::Arc;

use barid_bus::DeadLetter;
use barid_bus::consumer::{Partition, Record};
use barid_core::UserId;
use barid_runtime::TraceEvent;
use barid_wire::record::Refusal;
use barid_wire::v1::Receipt;

use crate::config::Config;
use crate::flight::{Flight, Parcel};
use crate::intake::{Decoded, Intake};
use crate::lanes::{Event, Lanes, Shared};
use crate::metrics::Metrics;
use crate::partitions::{Open, Partitions};
use crate::ports::{Log, Mailboxes};
use crate::skips::{LeftOut, Skips};
use crate::window::{PRIORITIES, Window};

/// The partitions, and the records in flight.
pub struct Pipeline<M> {
    /// The partitions held.
    pub partitions: Partitions,
    /// The lanes.
    pub lanes: Lanes<M>,
    intake: Intake,
    window: Window,
    left_out: LeftOut,
    /// The topics of records, by priority.
    topics: Vec<Arc<str>>,
    metrics: Metrics,
    /// Records were finished since [`Self::has_finished`] was called.
    finished: bool,
}

impl<M: Mailboxes> Pipeline<M> {
    /// Starts the lanes. Call within a runtime.
    pub fn start(config: &Config, shared: Shared<M>) -> Self {
        let metrics = shared.metrics.clone();
        let topics: Vec<Arc<str>> =
            config.kafka.topics.pushes().iter().map(|topic| Arc::from(*topic)).collect();
        // Exports every label from the start, as zero.
        for topic in &topics {
            let _ = metrics.taken.with_label_values(&[topic]);
            let _ = metrics.taken_bytes.with_label_values(&[topic]);
        }
        let shards = shared.mailboxes.shards();
        Self {
            partitions: Partitions::new(shards),
            lanes: Lanes::start(shared),
            intake: Intake::new(config, shards, metrics.traces_ignored.clone()),
            window: Window::new(&config.window),
            left_out: LeftOut::new(config.window.skipped_records_max),
            topics,
            metrics,
            finished: false,
        }
    }

    /// The priority of a topic; the lowest for one that is not configured.
    pub fn priority(&self, topic: &str) -> usize {
        self.topics.iter().position(|known| **known == *topic).unwrap_or(PRIORITIES - 1)
    }

    /// Handles a lane's report.
    pub fn lane_event(&mut self, event: Event) {
        match event {
            Event::Finished(flights) => {
                for flight in &flights {
                    self.partitions.finish(flight);
                }
                self.leave_window(&flights);
                self.finished = true;
            }
            Event::Gap { reading, shard, back_to } => {
                let dropped = self.partitions.gap(&reading, shard, back_to);
                self.leave_window(&dropped);
            }
            Event::Answered(answer) => {
                let dropped = self.partitions.answered(&answer);
                self.leave_window(&dropped);
            }
        }
    }

    /// Takes one turn's records of each priority, as far as there is room. Returns how many.
    pub fn fill(&mut self, log: &mut impl Log) -> usize {
        self.read_left_out();
        self.admit_stalled();
        let mut count = 0;
        for priority in 0..PRIORITIES {
            let grant = self.window.grant(priority);
            if let Some(bound) = grant.reached {
                self.metrics.stalls.with_label_values(&[bound.label()]).inc();
            }
            if grant.records == 0 {
                continue;
            }
            let mut records = Vec::new();
            let wants = |p: &Partition| {
                self.partitions.get(p).is_some_and(Open::wants) && !self.left_out.is_returning(p)
            };
            count += log.take(priority, grant.records, wants, &mut records);
            records.into_iter().for_each(|record| self.process(record));
        }
        count
    }

    /// Decodes a record that was taken; queues its messages, or refuses it.
    fn process(&mut self, record: Record) {
        let partition = Partition { topic: Arc::clone(&record.topic), number: record.partition };
        let Some(open) = self.partitions.get_mut(&partition) else { return };
        // The log went back: records behind that are taken again later.
        if open.suspect.is_some() || !open.track(record.offset, record.leader_epoch) {
            return;
        }
        let now_ms = self.lanes.shared().outbox.clock.now_ms();
        self.metrics.taken.with_label_values(&[&record.topic]).inc();
        let bytes = self.metrics.taken_bytes.with_label_values(&[&record.topic]);
        bytes.inc_by(record.value.len() as u64);
        let offset = record.offset;
        let skips = self.left_out.known(&partition, open.reading.id());
        let reported =
            open.reading.was_finished(offset) || skips.is_some_and(|skips| skips.is_again(offset));
        let tracer = &self.lanes.shared().outbox.tracer;
        match self.intake.decode(&open.reading, record, now_ms) {
            // Its dead letter and its receipt were written when it was first read.
            Decoded::Refused(..) if reported => {
                open.ledger.finish(offset, []);
            }
            Decoded::Refused(flight, refusal) => {
                tracer.log(TraceEvent {
                    id: &refusal.id,
                    app: &refusal.app,
                    how: refusal.code.as_str(),
                    ..flight.trace_event("refused", &refusal.user, now_ms * 1000)
                });
                self.enter_window(&flight);
                self.refuse(flight, refusal, now_ms);
            }
            Decoded::Parcels(parcels) => {
                if let Some(parcel) = parcels.first() {
                    let flight = Arc::clone(&parcel.flight);
                    // A record for several users is taken once.
                    let user = parcel.message.owner.user().filter(|_| parcels.len() == 1);
                    let user = user.map_or("", UserId::as_str);
                    tracer.log(flight.trace_event("taken", user, now_ms * 1000));
                    self.enter_window(&flight);
                }
                self.admit(&partition, parcels);
            }
        }
    }

    /// Queues a record's parcels if their lanes have room; otherwise the record stalls, and its partition with it.
    fn admit(&mut self, partition: &Partition, parcels: Vec<Parcel>) {
        let parcels = self.without_accepted(partition, parcels);
        let waits = self.partitions.get(partition).is_none_or(|open| !open.stalled.is_empty());
        let left = if waits { Some(parcels) } else { self.try_admit(partition, parcels) };
        let (Some(parcels), Some(open)) = (left, self.partitions.get_mut(partition)) else {
            return;
        };
        if parcels.is_empty() {
            return;
        }
        if open.stalled.is_empty() {
            self.metrics.stalls.with_label_values(&["lane"]).inc();
        }
        open.stalled.push_back(parcels);
    }

    fn admit_stalled(&mut self) {
        let stalled = self.partitions.iter().filter(|open| !open.stalled.is_empty());
        let partitions: Vec<Partition> =
            stalled.map(|open| open.assignment.partition.clone()).collect();
        for partition in partitions {
            while let Some(parcels) =
                self.partitions.get_mut(&partition).and_then(|open| open.stalled.pop_front())
            {
                if let Some(parcels) = self.try_admit(&partition, parcels) {
                    if let Some(open) = self.partitions.get_mut(&partition) {
                        open.stalled.push_front(parcels);
                    }
                    break;
                }
            }
        }
    }

    /// Queues the parcels of a record, except those that are left in the log for an unavailable master. Returns all
    /// of them if a lane has no room.
    fn try_admit(&mut self, partition: &Partition, parcels: Vec<Parcel>) -> Option<Vec<Parcel>> {
        let (Some(first), Some(open)) = (parcels.first(), self.partitions.get(partition)) else {
            return None;
        };
        let (offset, flight) = (first.flight.record.offset, Arc::clone(&first.flight));
        let (priority, reading) = (open.assignment.priority, open.reading.id());
        let (full, newly_full) = self.left_out.is_full();
        if newly_full {
            self.metrics.stalls.with_label_values(&["skipped"]).inc();
        }
        // Messages are left in the log only while other shards can be served.
        let some_serve = self.lanes.some_serve();
        let much = self.window.is_half_full(priority);
        let skips = self.left_out.known(partition, reading);
        let leaves = |parcel: &Parcel| {
            skips.as_ref().is_some_and(|skips| skips.blocks(parcel.shard))
                || (some_serve
                    && (much || self.lanes.is_laden(parcel.shard))
                    && self.lanes.away().is_failing(parcel.shard))
        };
        let (left, queued): (Vec<Parcel>, Vec<Parcel>) = parcels.into_iter().partition(leaves);
        if !self.lanes.has_room(&queued) || (full && !left.is_empty()) {
            let mut parcels = [left, queued].concat();
            parcels.sort_by_key(|parcel| parcel.message.position);
            return Some(parcels);
        }
        if !left.is_empty() {
            let shards = left.iter().map(|parcel| parcel.shard);
            let skips = self.left_out.leave(partition, reading, offset, shards);
            if !queued.is_empty() {
                skips.leave_part(Arc::clone(&flight), left.len());
            }
            // This flight is never finished: the messages that are left out are read again in another one.
            self.leave_window(&[flight]);
        }
        self.lanes.enqueue(priority, queued);
        None
    }

    /// For a record that is read again for messages left in the log: finishes its other messages, which were accepted.
    fn without_accepted(&mut self, partition: &Partition, parcels: Vec<Parcel>) -> Vec<Parcel> {
        let Some(open) = self.partitions.get(partition) else { return parcels };
        let Some(skips) = self.left_out.known(partition, open.reading.id()) else { return parcels };
        let (wanted, done): (Vec<Parcel>, Vec<Parcel>) = parcels
            .into_iter()
            .partition(|parcel| skips.wants(parcel.message.position.offset, parcel.shard));
        let finished = done.into_iter().filter(|parcel| parcel.flight.part_done());
        let finished: Vec<Arc<Flight>> = finished.map(|parcel| parcel.flight).collect();
        for flight in &finished {
            self.partitions.finish(flight);
        }
        self.leave_window(&finished);
        wanted
    }

    /// Starts to read messages that were left in the log, once their masters are available.
    fn read_left_out(&mut self) {
        self.left_out.retain(|partition| self.partitions.get(partition).is_some());
        let away = self.lanes.away();
        let others_away = away.count() > 0;
        let mut dropped = Vec::new();
        for open in self.partitions.iter_mut() {
            let known = self.left_out.known(&open.assignment.partition, open.reading.id());
            let Some(skips) = known else { continue };
            skips.returning = skips.records() > 0
                && open.may_return()
                && !skips.shards().any(|shard| away.is_failing(shard));
            let waiting = skips.records() + open.stalled.len();
            let drained = skips.is_settled() && open.ledger.open() == waiting;
            if !skips.returning || (!drained && !others_away) {
                continue;
            }
            // Not earlier: if the master failed again in the next turn, messages behind these would be left out.
            dropped.extend(open.drop_stalled());
            read_again(open, skips, drained);
        }
        self.leave_window(&dropped);
        self.metrics.skipped.set(self.left_out.recount() as i64);
    }

    /// Writes a dead letter and a receipt for a refused record; the partition continues (P6).
    fn refuse(&self, flight: Arc<Flight>, refusal: Refusal, now_ms: u64) {
        self.metrics.refused.with_label_values(&[refusal.code.as_str()]).inc();
        let (outbox, events) = (self.lanes.shared().outbox.clone(), self.lanes.events().clone());
        // Bounded: the flight counts in the window until this is done.
        self.lanes.shared().outbox.tasks.spawn_finite("the refusal of a record", async move {
            let (code, reason) = (refusal.code.as_str(), refusal.reason.as_str());
            outbox.dead.write(&DeadLetter { record: &flight.record, code, reason }).await;
            let receipt = Receipt {
                id: refusal.id.clone(),
                app: refusal.app.clone(),
                user: refusal.user.clone(),
                mailbox: refusal.mailbox.to_string(),
                ..flight.refusal(None, code, reason, now_ms)
            };
            outbox.receipts.deliver(&receipt).await;
            let _ = events.send(Event::Finished(vec![flight])).await;
        });
    }

    fn enter_window(&mut self, flight: &Flight) {
        self.window.enter(flight.reading.assignment.priority, flight.bytes);
    }

    fn leave_window(&mut self, flights: &[Arc<Flight>]) {
        for flight in flights {
            self.window.leave(flight.reading.assignment.priority, flight.bytes);
        }
    }

    /// Compares the topics' ids with those at assignment; partitions of a topic that was recreated are read
    /// from its start. Returns how many there are.
    pub fn compare_topics(&mut self, ids: &HashMap<String, String>) -> usize {
        let (recreated, dropped) = self.partitions.compare(ids);
        self.leave_window(&dropped);
        self.metrics.recreated.inc_by(recreated as u64);
        recreated
    }

    /// Takes no further record of a partition, which is to be given back.
    pub fn stop(&mut self, partition: &Partition) {
        let Some(open) = self.partitions.get_mut(partition) else { return };
        open.revoking = true;
        let dropped = open.drop_stalled();
        self.leave_window(&dropped);
    }

    /// Takes no further record of any partition.
    pub fn stop_all(&mut self) {
        let all: Vec<Partition> =
            self.partitions.iter().map(|open| open.assignment.partition.clone()).collect();
        all.iter().for_each(|partition| self.stop(partition));
    }

    /// Number of records in flight, without those that are left in the log.
    pub fn unfinished(&self) -> usize {
        self.partitions.unfinished().saturating_sub(self.left_out.records())
    }

    /// Whether these partitions have no record in flight.
    pub fn is_drained(&self, partitions: &[Partition]) -> bool {
        let open = partitions.iter().filter_map(|partition| self.partitions.get(partition));
        let unfinished: usize = open.map(|open| open.ledger.open()).sum();
        unfinished <= self.left_out.records_of(partitions)
    }

    /// Whether records were finished since the last call.
    pub fn has_finished(&mut self) -> bool {
        std::mem::take(&mut self.finished)
    }

    /// Closes the lanes: each ends once its queue is empty.
    pub fn close(self) {
        self.lanes.close();
    }

    /// Sets the gauges of the window and the partitions. `high_watermark`: the end of a partition's log.
    pub fn show(&self, high_watermark: impl Fn(&Partition) -> i64) {
        let metrics = &self.metrics;
        for (priority, topic) in self.topics.iter().enumerate() {
            let (records, bytes) = (self.window.records(priority), self.window.bytes(priority));
            metrics.in_flight.with_label_values(&[topic]).set(records as i64);
            metrics.in_flight_bytes.with_label_values(&[topic]).set(bytes as i64);
        }
        let (mut held, mut paused, mut lag, mut repairing) = ([0; PRIORITIES], 0, 0, 0);
        for open in self.partitions.iter() {
            held[open.assignment.priority] += 1;
            repairing += open.repairing();
            let full = self.window.is_full(open.assignment.priority);
            paused += i64::from(!open.wants() || full);
            if let Some(committed) = open.committed() {
                lag += (high_watermark(&open.assignment.partition) - committed).max(0);
            }
        }
        for (topic, held) in self.topics.iter().zip(held) {
            metrics.partitions.with_label_values(&[topic]).set(held);
        }
        metrics.paused.set(paused);
        metrics.lag.set(lag);
        metrics.repairing.set(repairing as i64);
    }
}

/// Goes back to the first record that was left in the log. `drained`: all other records are finished.
fn read_again(open: &mut Open, skips: &mut Skips, drained: bool) {
    let count = skips.records();
    let again = open.ledger.next().and_then(|next| skips.read_again(next));
    let Some(mut from) = again else { return };
    if !drained {
        // Records in flight may wait for yet another unavailable master. So they are all taken again; for messages that
        // were accepted, Redis answers "accepted before".
        from = from.min(open.ledger.committable().unwrap_or(from));
        open.reading.end();
        open.reading = open.reading.repairing(HashMap::new(), from);
    }
    tracing::info!(
        topic = &*open.assignment.partition.topic,
        partition = open.assignment.partition.number,
        from,
        records = count,
        "masters are available again, reading the records that were left in the log"
    );
    open.read_from(from);
}

#[cfg(test)]
mod tests;
