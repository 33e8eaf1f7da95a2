//! A lane's queue, by priority and shard. If a call has no room for everything, it takes all messages of some shards,
//! and the next call those of other shards. So the fixed cost per user is shared by many messages when there are
//! many.

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

/// The queue of a lane. The caller bounds it, by checking [`Queue::load`] before it pushes.
///
/// A shard moves to another lane's queue in three steps, which keep its messages in order, with one group in a call
/// at a time. First the loop calls [`Queue::redirect`]; from then on it pushes to the new queue, which holds these
/// messages back. Then the old lane, between two calls, passes its messages of the shard to [`Queue::deliver`].
/// Finally the new lane puts them in front of the others ([`Queue::arrivals`]).
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
    /// Shards that another lane still has to deliver.
    awaited: HashSet<Shard>,
    arrived: Vec<Handover>,
    /// Shards that are to be delivered to other queues.
    departing: Vec<(Shard, Arc<Queue>)>,
}

/// A shard that moves from one lane to another.
#[derive(Debug)]
pub struct Handover {
    /// The shard.
    pub shard: Shard,
    /// Its parcels by priority, in order.
    pub parcels: [VecDeque<Parcel>; PRIORITIES],
    /// The positions that it has confirmed.
    pub tracks: Tracks,
    /// The assignments in `tracks`.
    pub assignments: HashMap<u64, Weak<Assignment>>,
}

/// Parcels of one priority.
#[derive(Debug, Default)]
struct Waiting {
    by_shard: HashMap<Shard, VecDeque<Parcel>>,
    /// Shards with parcels, each once. The first one has its turn.
    turns: VecDeque<Shard>,
    /// Parcels taken in this turn.
    taken: usize,
}

impl Waiting {
    /// Adds a parcel. `awaited`: the shard gets no turn until [`Self::admit`].
    fn push(&mut self, parcel: Parcel, awaited: bool) {
        let shard = parcel.shard;
        let parcels = self.by_shard.entry(shard).or_default();
        if parcels.is_empty() && !awaited {
            self.turns.push_back(shard);
        }
        parcels.push_back(parcel);
    }

    /// Puts the delivered parcels of an awaited shard in front of those that were pushed, and lets it have turns.
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

    /// Pops a parcel of the shard whose turn it is. A turn ends after `turn_max` parcels.
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

    /// Ends the current turn, so that a shard with many parcels does not starve the others.
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

    /// Adds a question. It is answered before parcels that are pushed later are accepted.
    pub fn ask(&self, question: Question) {
        self.inner.lock().questions.push(question);
        self.bell.notify_one();
    }

    /// Takes the questions, except those about awaited shards.
    pub fn questions(&self) -> Vec<Question> {
        let mut inner = self.inner.lock();
        let Inner { questions, awaited, .. } = &mut *inner;
        questions.extract_if(.., |question| !is_about(question, awaited)).collect()
    }

    /// Starts to move a shard to the queue `to`, which holds back new parcels of the shard until this lane has
    /// delivered the old ones. Returns false, and does nothing, if this lane itself still awaits the shard.
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

    /// Takes the shards to deliver to other queues, except those with an open question.
    pub fn departures(&self) -> Vec<(Shard, Arc<Self>)> {
        let mut inner = self.inner.lock();
        let Inner { departing, questions, .. } = &mut *inner;
        departing.extract_if(.., |(shard, _)| !is_asked(questions, *shard)).collect()
    }

    /// Removes all parcels of a shard that leaves this queue. They stay counted in [`Self::load`].
    pub fn release(&self, shard: Shard) -> [VecDeque<Parcel>; PRIORITIES] {
        self.inner.lock().waiting.each_mut().map(|waiting| waiting.release(shard))
    }

    /// Delivers an awaited shard.
    pub fn deliver(&self, handover: Handover) {
        let parcels: usize = handover.parcels.iter().map(VecDeque::len).sum();
        self.load.fetch_add(parcels, Ordering::Relaxed);
        self.inner.lock().arrived.push(handover);
        self.bell.notify_one();
    }

    /// Queues the parcels of delivered shards. Returns the handovers without parcels.
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

    /// Parcels that are not done: queued, held back, or in a call.
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Subtracts parcels that are done from the load.
    pub fn done(&self, parcels: usize) {
        self.load.fetch_sub(parcels, Ordering::Relaxed);
    }

    /// Closes the queue: nothing more will be added.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.bell.notify_one();
    }

    /// Whether the queue is closed.
    pub fn closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Waits for work. Returns false if the queue is closed and empty, and no shard is awaited.
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

    /// Removes up to `max` parcels and about `bytes_max` bytes. Priorities share by weight while all have parcels. A
    /// shard's turn is at most `turn_max` parcels.
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
