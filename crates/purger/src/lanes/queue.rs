//! What waits for a lane: one queue a priority, by shard. A call that cannot carry everything takes all
//! that waits for some shards, then for the next ones: what a user's messages have in common is paid
//! once for many of them, just when there are many.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use barid_core::Shard;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::event::Question;
use crate::flight::{Assignment, Parcel};
use crate::history::Tracks;
use crate::window::PRIORITIES;

/// A lane's queues, one for each priority. Bounded by whoever fills them, who looks at [`Queue::load`] first.
///
/// A shard moves to another lane's queue in three steps, so that it stays in order and has one group in a call at
/// once: the loop calls [`Queue::redirect`], and fills the new queue from then on, which keeps what it gets for the
/// shard; the old lane, between two calls, gives everything it has of the shard to [`Queue::deliver`]; the new lane
/// puts that before what came meanwhile ([`Queue::arrivals`]).
#[derive(Debug, Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    load: AtomicUsize,
    closed: AtomicBool,
    bell: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: [Waiting; PRIORITIES],
    questions: Vec<Question>,
    /// Shards that another lane has not delivered yet.
    awaited: HashSet<Shard>,
    arrived: Vec<Handover>,
    /// Shards that are to be delivered to other queues.
    departing: Vec<(Shard, Arc<Queue>)>,
}

/// Everything that a lane has of a shard.
#[derive(Debug)]
pub struct Handover {
    /// The shard.
    pub shard: Shard,
    /// Its parcels by priority, in order.
    pub parcels: [VecDeque<Parcel>; PRIORITIES],
    /// What it has confirmed.
    pub tracks: Tracks,
    /// The assignments that the tracks are about.
    pub assignments: HashMap<u64, Weak<Assignment>>,
}

/// Parcels of one priority.
#[derive(Debug, Default)]
struct Waiting {
    by_shard: HashMap<Shard, VecDeque<Parcel>>,
    /// Shards that have some, each once; the first has its turn.
    turns: VecDeque<Shard>,
    /// Parcels taken in this turn.
    taken: usize,
}

impl Waiting {
    /// Adds a parcel. `awaited`: its shard gets no turn before [`Self::admit`].
    fn push(&mut self, parcel: Parcel, awaited: bool) {
        let shard = parcel.shard;
        let parcels = self.by_shard.entry(shard).or_default();
        if parcels.is_empty() && !awaited {
            self.turns.push_back(shard);
        }
        parcels.push_back(parcel);
    }

    /// Puts parcels of an awaited shard before those that were pushed, and gives it its turn.
    fn admit(&mut self, shard: Shard, mut parcels: VecDeque<Parcel>) {
        parcels.append(&mut self.by_shard.remove(&shard).unwrap_or_default());
        if !parcels.is_empty() {
            self.by_shard.insert(shard, parcels);
            self.turns.push_back(shard);
        }
    }

    /// Removes all parcels of a shard.
    fn release(&mut self, shard: Shard) -> VecDeque<Parcel> {
        if self.turns.front() == Some(&shard) {
            self.taken = 0;
        }
        self.turns.retain(|other| *other != shard);
        self.by_shard.remove(&shard).unwrap_or_default()
    }

    /// The next parcel of the shard whose turn it is, which is over after `turn_max` of them.
    fn pop(&mut self, turn_max: usize) -> Option<Parcel> {
        if self.taken >= turn_max {
            self.end_turn();
        }
        let shard = self.turns.front()?;
        let parcels = self.by_shard.get_mut(shard)?;
        let parcel = parcels.pop_front()?;
        self.taken += 1;
        if parcels.is_empty() {
            self.by_shard.remove(shard);
            self.turns.pop_front();
            self.taken = 0;
        }
        Some(parcel)
    }

    /// One that always has more does not keep the others waiting.
    fn end_turn(&mut self) {
        if self.taken > 0 {
            self.turns.rotate_left(1);
            self.taken = 0;
        }
    }
}

impl Queue {
    /// Adds a parcel.
    pub fn push(&self, priority: usize, parcel: Parcel) {
        self.load.fetch_add(1, Ordering::Relaxed);
        let mut inner = self.inner.lock();
        let awaited = inner.awaited.contains(&parcel.shard);
        inner.waiting[priority.min(PRIORITIES - 1)].push(parcel, awaited);
        drop(inner);
        self.bell.notify_one();
    }

    /// Asks, before anything that was added later is accepted.
    pub fn ask(&self, question: Question) {
        self.inner.lock().questions.push(question);
        self.bell.notify_one();
    }

    /// Questions since this was called last, except those about shards that are awaited.
    pub fn questions(&self) -> Vec<Question> {
        let mut inner = self.inner.lock();
        let Inner { questions, awaited, .. } = &mut *inner;
        questions.extract_if(.., |question| !is_about(question, awaited)).collect()
    }

    /// Lets a shard move to the queue `to`, which keeps what is pushed for the shard until this lane has delivered
    /// it. False: this lane does not have the shard itself yet, and nothing changes.
    pub fn redirect(&self, shard: Shard, to: &Arc<Self>) -> bool {
        let mut inner = self.inner.lock();
        if inner.awaited.contains(&shard) {
            return false;
        }
        to.inner.lock().awaited.insert(shard);
        inner.departing.push((shard, Arc::clone(to)));
        drop(inner);
        self.bell.notify_one();
        true
    }

    /// Shards to deliver to other queues, except those of which a question is not answered yet.
    pub fn departures(&self) -> Vec<(Shard, Arc<Self>)> {
        let mut inner = self.inner.lock();
        let Inner { departing, questions, .. } = &mut *inner;
        departing.extract_if(.., |(shard, _)| !is_asked(questions, *shard)).collect()
    }

    /// Removes all parcels of a shard, which this queue gets no more of. They stay in [`Self::load`].
    pub fn release(&self, shard: Shard) -> [VecDeque<Parcel>; PRIORITIES] {
        self.inner.lock().waiting.each_mut().map(|waiting| waiting.release(shard))
    }

    /// Brings an awaited shard.
    pub fn deliver(&self, handover: Handover) {
        let parcels: usize = handover.parcels.iter().map(VecDeque::len).sum();
        self.load.fetch_add(parcels, Ordering::Relaxed);
        self.inner.lock().arrived.push(handover);
        self.bell.notify_one();
    }

    /// Queues the parcels of shards that were delivered; returns the rest.
    pub fn arrivals(&self) -> Vec<Handover> {
        let mut inner = self.inner.lock();
        let mut arrived = std::mem::take(&mut inner.arrived);
        for Handover { shard, parcels, .. } in &mut arrived {
            inner.awaited.remove(shard);
            for (waiting, parcels) in inner.waiting.iter_mut().zip(parcels) {
                waiting.admit(*shard, std::mem::take(parcels));
            }
        }
        arrived
    }

    /// Parcels that are not done: waiting here, waiting for Redis, or in a call.
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// So many parcels are done.
    pub fn done(&self, parcels: usize) {
        self.load.fetch_sub(parcels, Ordering::Relaxed);
    }

    /// Nothing more will be added.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.bell.notify_one();
    }

    /// Whether nothing more will be added.
    pub fn closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Waits until there is something to do. False: the queue is closed and empty, and no shard is awaited.
    pub async fn filled(&self) -> bool {
        loop {
            {
                let inner = self.inner.lock();
                if inner.is_filled() {
                    return true;
                }
                if self.closed() && inner.awaited.is_empty() {
                    return false;
                }
            }
            self.bell.notified().await;
        }
    }

    /// Removes up to `max` parcels and about `bytes_max` bytes, by weight while all priorities have
    /// some; of one priority and shard `turn_max` at a time.
    pub fn pop_batch(
        &self,
        weights: &[usize; PRIORITIES],
        max: usize,
        bytes_max: usize,
        turn_max: usize,
    ) -> Vec<Parcel> {
        let mut inner = self.inner.lock();
        let waiting = &mut inner.waiting;
        let (mut taken, mut bytes) = (Vec::new(), 0);
        'full: loop {
            let before = taken.len();
            for (waiting, weight) in waiting.iter_mut().zip(weights) {
                for _ in 0..*weight {
                    if taken.len() >= max || bytes >= bytes_max {
                        break 'full;
                    }
                    let Some(parcel) = waiting.pop(turn_max) else { break };
                    bytes += parcel.message.body.len();
                    taken.push(parcel);
                }
            }
            if taken.len() == before {
                break;
            }
        }
        waiting.iter_mut().for_each(Waiting::end_turn);
        taken
    }
}

impl Inner {
    fn is_filled(&self) -> bool {
        let askable = |question: &Question| !is_about(question, &self.awaited);
        self.waiting.iter().any(|waiting| !waiting.turns.is_empty())
            || self.questions.iter().any(askable)
            || !self.arrived.is_empty()
            || self.departing.iter().any(|(shard, _)| !is_asked(&self.questions, *shard))
    }
}

/// Whether a question is about this shard.
fn is_asked(questions: &[Question], shard: Shard) -> bool {
    questions.iter().flat_map(|question| &question.shards).any(|(asked, _)| *asked == shard)
}

/// Whether a question is about one of these shards.
fn is_about(question: &Question, shards: &HashSet<Shard>) -> bool {
    !shards.is_empty() && question.shards.iter().any(|(shard, _)| shards.contains(shard))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::lane::tests::parcel;

    fn shards(queue: &Queue, max: usize, turn_max: usize) -> Vec<u16> {
        let taken = queue.pop_batch(&[8, 4, 1], max, usize::MAX, turn_max);
        taken.iter().map(|parcel| parcel.shard.get()).collect()
    }

    #[test]
    fn what_waits_for_a_shard_goes_together_and_each_has_its_turn() {
        let queue = Queue::default();
        for offset in 0..4 {
            for shard in [3, 5, 7] {
                queue.push(1, parcel(shard, offset));
            }
        }
        assert_eq!(shards(&queue, 6, 100), [3, 3, 3, 3, 5, 5]);
        // 5 was cut short: 7 waits no longer for that.
        queue.push(1, parcel(3, 4));
        assert_eq!(shards(&queue, 100, 3), [7, 7, 7, 5, 5, 3, 7]);
        assert_eq!(shards(&queue, 100, 3), [0_u16; 0]);
    }

    #[test]
    fn a_shard_stays_in_order_and_bulk_does_not_starve() {
        let queue = Queue::default();
        for offset in 0..20 {
            queue.push(0, parcel(1, offset));
            queue.push(2, parcel(1, 100 + offset));
        }
        let taken = queue.pop_batch(&[8, 4, 1], 18, usize::MAX, 100);
        let offsets: Vec<i64> = taken.iter().map(|p| p.message.position.offset).collect();
        let (bulk, high): (Vec<i64>, Vec<i64>) = offsets.iter().partition(|offset| **offset >= 100);
        assert_eq!((high, bulk), ((0..16).collect(), vec![100, 101]));
    }

    #[test]
    fn a_shard_moves_whole_and_what_comes_meanwhile_stays_behind_it() {
        let (from, to): (Arc<Queue>, Arc<Queue>) = Default::default();
        for offset in 0..3 {
            from.push(1, parcel(3, offset));
            from.push(1, parcel(5, offset));
        }
        let (moving, other) = (parcel(3, 0).shard, parcel(5, 0).shard);
        assert!(from.redirect(moving, &to));
        assert!(!to.redirect(moving, &from), "not before it has arrived");
        to.push(1, parcel(3, 3));
        assert_eq!(shards(&to, 10, 10), [0_u16; 0], "it is awaited");
        assert_eq!(from.departures().len(), 1);
        let parcels = from.release(moving);
        from.done(3);
        let (tracks, assignments) = Default::default();
        to.deliver(Handover { shard: moving, parcels, tracks, assignments });
        assert_eq!(to.arrivals().len(), 1);
        assert_eq!((from.load(), to.load()), (3, 4));
        let moved = to.pop_batch(&[8, 4, 1], 10, usize::MAX, 10);
        let offsets: Vec<i64> = moved.iter().map(|p| p.message.position.offset).collect();
        assert_eq!(offsets, [0, 1, 2, 3]);
        assert_eq!(shards(&from, 10, 10), [other.get(); 3]);
        assert!(to.redirect(moving, &from));
    }
}
