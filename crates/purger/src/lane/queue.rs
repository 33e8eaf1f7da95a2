//! What waits for a lane: one queue a priority.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::flight::Parcel;

/// Three queues. Bounded by whoever fills it, which looks at [`Queue::load`] first.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Mutex<[VecDeque<Parcel>; 3]>,
    load: AtomicUsize,
    closed: AtomicBool,
    bell: Notify,
}

impl Queue {
    /// Adds a parcel.
    pub fn push(&self, priority: usize, parcel: Parcel) {
        self.load.fetch_add(1, Ordering::Relaxed);
        self.waiting.lock()[priority.min(2)].push_back(parcel);
        self.bell.notify_one();
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
            if self.waiting.lock().iter().any(|queue| !queue.is_empty()) {
                return true;
            }
            if self.closed() {
                return false;
            }
            self.bell.notified().await;
        }
    }

    /// Takes up to `max` parcels and about `bytes_max` bytes, by weight while all have some.
    pub fn take(&self, weights: &[usize; 3], max: usize, bytes_max: usize) -> Vec<Parcel> {
        let mut waiting = self.waiting.lock();
        let (mut taken, mut bytes) = (Vec::new(), 0);
        loop {
            let before = taken.len();
            for (queue, weight) in waiting.iter_mut().zip(weights) {
                for _ in 0..*weight {
                    if taken.len() >= max || bytes >= bytes_max {
                        return taken;
                    }
                    let Some(parcel) = queue.pop_front() else { break };
                    bytes += parcel.message.body.len();
                    taken.push(parcel);
                }
            }
            if taken.len() == before {
                return taken;
            }
        }
    }
}
