//! What waits for a lane: one queue a priority, by shard. A call that cannot carry everything takes all
//! that waits for some shards, then for the next ones: what a user's messages have in common is paid
//! once for many of them, just when there are many.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use barid_core::Shard;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::event::Question;
use crate::flight::Parcel;

/// Three queues. Bounded by whoever fills it, which looks at [`Queue::load`] first.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Mutex<[Waiting; 3]>,
    questions: Mutex<Vec<Question>>,
    load: AtomicUsize,
    closed: AtomicBool,
    bell: Notify,
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
    fn push(&mut self, parcel: Parcel) {
        let shard = parcel.shard;
        let parcels = self.by_shard.entry(shard).or_default();
        if parcels.is_empty() {
            self.turns.push_back(shard);
        }
        parcels.push_back(parcel);
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
        self.waiting.lock()[priority.min(2)].push(parcel);
        self.bell.notify_one();
    }

    /// Asks, before anything that was added later is accepted.
    pub fn ask(&self, question: Question) {
        self.questions.lock().push(question);
        self.bell.notify_one();
    }

    /// What was asked since this was called last.
    pub fn questions(&self) -> Vec<Question> {
        std::mem::take(&mut *self.questions.lock())
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

    /// Waits until something may be there. False: the queue is closed and empty.
    pub async fn filled(&self) -> bool {
        loop {
            if self.waiting.lock().iter().any(|waiting| !waiting.turns.is_empty())
                || !self.questions.lock().is_empty()
            {
                return true;
            }
            if self.closed() {
                return false;
            }
            self.bell.notified().await;
        }
    }

    /// Removes up to `max` parcels and about `bytes_max` bytes, by weight while all priorities have
    /// some; of one priority and shard `turn_max` at a time.
    pub fn pop_batch(
        &self,
        weights: &[usize; 3],
        max: usize,
        bytes_max: usize,
        turn_max: usize,
    ) -> Vec<Parcel> {
        let mut waiting = self.waiting.lock();
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
}
