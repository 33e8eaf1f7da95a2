//! When to ping, when a connection counts as dead, when its token is over, when it has to leave.
//! Seconds of the node's coarse clock; nothing here runs on traffic but two stores.

/// Seconds.
pub type Seconds = u32;

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// Nothing.
    Nothing,
    /// Ping the device.
    Ping,
    /// Nothing was heard from it for too long.
    Dead,
    /// It answers pings, and has sent nothing else for too long.
    Idle,
    /// Its token's time is over.
    Expired,
    /// It was told to go, and time is up.
    Leave,
}

/// Not at any time that will come.
const NEVER: Seconds = Seconds::MAX;

/// The times of one connection. Packed: every session has them.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    interval: u16,
    patience: u16,
    heard: Seconds,
    written: Seconds,
    /// When the device was pinged and nothing was heard since; else [`NEVER`].
    pinged: Seconds,
    expires: Seconds,
    /// When it ends at the latest, having been told to go.
    leaves: Seconds,
    /// When it ends unless the device sends something of use.
    idles: Seconds,
}

impl Heartbeat {
    /// Pings where a direction was silent for `interval`; gives up `patience` after a ping.
    pub fn new(interval: u16, patience: u16, now: Seconds, expires: Seconds) -> Self {
        let (heard, written) = (now, now);
        let (pinged, leaves, idles) = (NEVER, NEVER, NEVER);
        Self { interval, patience, heard, written, pinged, expires, leaves, idles }
    }

    /// Something came from the device.
    pub fn heard(&mut self, now: Seconds) {
        self.heard = now;
        self.pinged = NEVER;
    }

    /// The device sent something else than a pong: it may do without for another `idle`; 0: for ever.
    pub fn used(&mut self, now: Seconds, idle: Seconds) {
        self.idles = if idle == 0 { NEVER } else { now.saturating_add(idle) };
    }

    /// Something was written to the device.
    pub fn written(&mut self, now: Seconds) {
        self.written = now;
    }

    /// The token now holds until `expires`.
    pub fn expires(&mut self, expires: Seconds) {
        self.expires = expires;
    }

    /// The connection ends at `at` at the latest.
    pub fn leave(&mut self, at: Seconds) {
        self.leaves = self.leaves.min(at);
    }

    /// Whether it was told to go.
    pub fn is_leaving(&self) -> bool {
        self.leaves != NEVER
    }

    /// What is due now. A ping is taken as sent.
    pub fn tick(&mut self, now: Seconds) -> Beat {
        if now >= self.leaves {
            return Beat::Leave;
        }
        if now >= self.expires {
            return Beat::Expired;
        }
        if now >= self.idles {
            return Beat::Idle;
        }
        if now < self.beats_at() {
            return Beat::Nothing;
        }
        if self.pinged != NEVER {
            return Beat::Dead;
        }
        self.pinged = now;
        self.written = now;
        Beat::Ping
    }

    /// When to tick next.
    pub fn due(&self) -> Seconds {
        self.beats_at().min(self.expires).min(self.leaves).min(self.idles)
    }

    /// When to ping, or to give up.
    fn beats_at(&self) -> Seconds {
        match self.pinged {
            NEVER => self.heard.min(self.written) + Seconds::from(self.interval),
            at => at + Seconds::from(self.patience),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_connection_is_pinged_then_dead() {
        let mut beat = Heartbeat::new(25, 10, 0, 1000);
        assert_eq!((beat.due(), beat.tick(24)), (25, Beat::Nothing));
        assert_eq!((beat.tick(25), beat.due()), (Beat::Ping, 35));
        assert_eq!(beat.tick(34), Beat::Nothing);
        assert_eq!(beat.tick(35), Beat::Dead);
    }

    #[test]
    fn an_answer_keeps_it_and_traffic_in_both_directions_needs_no_ping() {
        let mut beat = Heartbeat::new(25, 10, 0, 1000);
        assert_eq!(beat.tick(25), Beat::Ping);
        beat.heard(26);
        assert_eq!((beat.tick(40), beat.due()), (Beat::Nothing, 50));
        beat.heard(49);
        beat.written(49);
        assert_eq!((beat.tick(50), beat.due()), (Beat::Nothing, 74));
    }

    #[test]
    fn a_device_that_only_listens_is_pinged_so_that_it_can_be_heard() {
        let mut beat = Heartbeat::new(25, 10, 0, 1000);
        (1..25).for_each(|now| beat.written(now));
        assert_eq!(beat.tick(25), Beat::Ping);
    }

    #[test]
    fn tokens_end_connections_and_new_ones_prolong_them() {
        let mut beat = Heartbeat::new(25, 10, 0, 5);
        assert_eq!(beat.due(), 5);
        beat.expires(100);
        assert_eq!(beat.tick(5), Beat::Nothing);
        beat.heard(99);
        beat.written(99);
        assert_eq!(beat.tick(100), Beat::Expired);
    }

    #[test]
    fn who_only_answers_pings_is_idle_and_who_sends_anything_else_is_not() {
        let mut beat = Heartbeat::new(25, 10, 0, 1000);
        beat.used(0, 60);
        for now in (20..60).step_by(20) {
            beat.heard(now);
            beat.written(now);
        }
        assert_eq!((beat.tick(59), beat.due(), beat.tick(60)), (Beat::Nothing, 60, Beat::Idle));
        beat.used(59, 60);
        beat.heard(60);
        beat.written(60);
        assert_eq!((beat.tick(60), beat.due()), (Beat::Nothing, 85));
        beat.used(70, 0);
        beat.heard(900);
        beat.written(900);
        assert_eq!(beat.tick(900), Beat::Nothing, "no limit");
    }

    #[test]
    fn who_was_told_to_go_goes() {
        let mut beat = Heartbeat::new(25, 10, 0, 100);
        beat.leave(7);
        beat.leave(9);
        assert_eq!((beat.due(), beat.tick(6), beat.tick(7)), (7, Beat::Nothing, Beat::Leave));
    }
}
