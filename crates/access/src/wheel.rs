//! One coarse timing wheel for all sessions: slots of a second. A session says when it wants to look
//! at the clock; that costs a store. The wheel moves it to that slot when its old one comes round,
//! and only a session that is due is woken.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::handle::Handle;
use crate::session::Seconds;

/// Sessions that are due later than this many seconds are looked at in between.
const SLOTS: usize = 512;

/// All sessions by the second at which they are looked at.
#[derive(Debug)]
pub struct Wheel {
    slots: Vec<Mutex<Vec<Arc<Handle>>>>,
}

impl Wheel {
    /// Without sessions.
    pub fn new() -> Self {
        Self { slots: (0..SLOTS).map(|_| Mutex::default()).collect() }
    }

    /// Sets when a session wants to look at the clock.
    pub fn set_due(&self, handle: &Arc<Handle>, due: Seconds, now: Seconds) {
        if handle.set_due(due) {
            self.put(Arc::clone(handle), due, now);
        }
    }

    /// A second has passed: wakes who is due.
    pub fn turn(&self, now: Seconds) {
        let slot = std::mem::take(&mut *self.slots[now as usize % SLOTS].lock());
        for handle in slot {
            // An entry that was overtaken by an earlier one of the same session is dropped.
            if handle.slotted() > now || handle.is_over() {
                continue;
            }
            handle.set_slotted(Seconds::MAX);
            let due = handle.due();
            if due <= now {
                handle.tell(|inbox| inbox.tick = true);
            }
            self.put(handle, due.max(now + 1), now);
        }
    }

    fn put(&self, handle: Arc<Handle>, due: Seconds, now: Seconds) {
        let at = due.clamp(now + 1, now + SLOTS as Seconds - 1);
        handle.set_slotted(at);
        self.slots[at as usize % SLOTS].lock().push(handle);
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
    fn a_session_that_is_over_is_forgotten() {
        let (wheel, handle) = (Wheel::new(), handle(1));
        wheel.set_due(&handle, 2, 0);
        handle.finish();
        (1..=2).for_each(|now| wheel.turn(now));
        assert_eq!(Arc::strong_count(&handle), 1);
    }
}
