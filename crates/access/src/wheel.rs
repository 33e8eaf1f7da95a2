//! A coarse timing wheel for the clock ticks of all sessions, with slots of a second. To set its next tick, a session
//! only stores the time. The wheel moves the session to that slot when its old slot comes round, and wakes only
//! sessions whose tick is due.

use std::sync::Arc;

use barid_session::Seconds;
use parking_lot::Mutex;

use crate::handle::Handle;

/// Number of slots, seconds. Sessions that are due later are revisited in between.
const SLOTS: usize = 512;

/// The sessions, by the second of their slot.
#[derive(Debug)]
pub struct Wheel {
    slots: Vec<Mutex<Vec<Arc<Handle>>>>,
}

impl Wheel {
    /// Creates an empty wheel.
    pub fn new() -> Self {
        Self { slots: (0..SLOTS).map(|_| Mutex::default()).collect() }
    }

    /// Sets when a session's next tick is due.
    pub fn set_due(&self, handle: &Arc<Handle>, due: Seconds, now: Seconds) {
        if handle.set_due(due) {
            self.remove(handle);
            self.put(Arc::clone(handle), due, now);
        }
    }

    /// Removes a session, so that one that has ended takes no memory until its slot comes round. One that a concurrent
    /// [`Self::turn`] has taken stays until then.
    pub fn remove(&self, handle: &Arc<Handle>) {
        let at = handle.slotted();
        let mut slot = self.slots[at as usize % SLOTS].lock();
        let place = handle.place();
        if !slot.get(place).is_some_and(|other| Arc::ptr_eq(other, handle)) {
            return;
        }
        slot.swap_remove(place);
        match slot.get(place) {
            Some(moved) if moved.slotted() == at => moved.set_place(place),
            _ if slot.is_empty() => *slot = Vec::new(),
            _ => (),
        }
    }

    /// Advances by a second, and wakes the sessions whose tick is due.
    pub fn turn(&self, now: Seconds) {
        let slot = std::mem::take(&mut *self.slots[now as usize % SLOTS].lock());
        for handle in slot {
            // Drops an entry that an earlier slot of the same session has superseded.
            if handle.slotted() > now || handle.is_over() {
                continue;
            }
            handle.set_slotted(Seconds::MAX);
            let due = handle.due();
            if due <= now {
                handle.notify(|inbox| inbox.tick = true);
            }
            self.put(handle, due.max(now + 1), now);
        }
    }

    /// Number of sessions on the wheel.
    pub fn entries(&self) -> usize {
        self.slots.iter().map(|slot| slot.lock().len()).sum()
    }

    fn put(&self, handle: Arc<Handle>, due: Seconds, now: Seconds) {
        let at = due.clamp(now + 1, now + SLOTS as Seconds - 1);
        let mut slot = self.slots[at as usize % SLOTS].lock();
        handle.set_slotted(at);
        handle.set_place(slot.len());
        slot.push(handle);
    }
}

impl Default for Wheel {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::tests::handle;
    use std::task::{Context, Waker};

    fn ticked(handle: &Handle) -> bool {
        handle.poll_take(&Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn wakes_who_is_due_and_nobody_else() {
        let (wheel, one, other) = (Wheel::new(), handle(1), handle(2));
        wheel.set_due(&one, 3, 0);
        wheel.set_due(&other, 5, 0);
        let mut wakes = Vec::new();
        for now in 1..=6 {
            wheel.turn(now);
            for (name, handle) in [("one", &one), ("other", &other)] {
                if ticked(handle) {
                    wakes.push((now, name));
                    wheel.set_due(handle, 1000, now);
                }
            }
        }
        assert_eq!(wakes, [(3, "one"), (5, "other")]);
    }

    #[test]
    fn moves_sessions_lazily_and_earlier_ones_at_once() {
        let (wheel, handle) = (Wheel::new(), handle(1));
        wheel.set_due(&handle, 3, 0);
        wheel.set_due(&handle, 6, 1);
        (1..=5).for_each(|now| wheel.turn(now));
        assert!(!ticked(&handle));
        wheel.set_due(&handle, 9, 5);
        wheel.turn(6);
        assert!(!ticked(&handle));
        wheel.set_due(&handle, 7, 6);
        wheel.turn(7);
        assert!(ticked(&handle));
        wheel.set_due(&handle, 9, 7);
        wheel.turn(8);
        assert!(!ticked(&handle));
        wheel.turn(9);
        assert!(ticked(&handle));
    }

    #[test]
    fn who_is_due_beyond_a_turn_of_the_wheel_is_woken_then() {
        let (wheel, handle) = (Wheel::new(), handle(1));
        wheel.set_due(&handle, 2000, 0);
        (1..2000).for_each(|now| wheel.turn(now));
        assert!(!ticked(&handle));
        wheel.turn(2000);
        assert!(ticked(&handle));
    }

    #[test]
    fn who_is_removed_is_forgotten_at_once_and_the_others_are_woken() {
        let (wheel, handles) = (Wheel::new(), [1, 2, 3, 4].map(handle));
        handles.iter().for_each(|handle| wheel.set_due(handle, 3, 0));
        // One that moves to another slot, in place of which the last one moves.
        wheel.set_due(&handles[0], 2, 0);
        assert_eq!(wheel.entries(), 4);
        wheel.remove(&handles[3]);
        wheel.remove(&handles[1]);
        wheel.remove(&handles[1]);
        assert_eq!(handles.each_ref().map(Arc::strong_count), [2, 1, 2, 1]);
        let mut woken = Vec::new();
        for now in 1..=3 {
            wheel.turn(now);
            woken.extend((0..4).filter(|i| ticked(&handles[*i])).map(|i| (now, i)));
        }
        assert_eq!(woken, [(2, 0), (3, 0), (3, 2)], "0 stays due");
        wheel.remove(&handles[0]);
        wheel.remove(&handles[2]);
        assert_eq!(wheel.entries(), 0);
        assert!(wheel.slots.iter().all(|slot| slot.lock().capacity() == 0));
    }

    #[test]
    fn a_session_that_is_over_is_forgotten() {
        let (wheel, handle) = (Wheel::new(), handle(1));
        wheel.set_due(&handle, 2, 0);
        handle.finish();
        (1..=2).for_each(|now| wheel.turn(now));
        assert_eq!(Arc::strong_count(&handle), 1);
    }
}
