//! The deadlines of a connection: the next ping, the heartbeat timeout, the token's expiry, the end after GoAway.
//! Times are seconds of the node's coarse clock. On traffic only two values are stored.

/// A time or duration in seconds.
pub type Seconds = u32;

/// The deadline that has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// None.
    Nothing,
    /// Ping the device.
    Ping,
    /// The device was silent for too long.
    Dead,
    /// The device answered pings, but sent nothing else for too long.
    Idle,
    /// The token has expired.
    Expired,
    /// The time after GoAway has passed.
    Leave,
}

/// A time that is never reached.
const NEVER: Seconds = Seconds::MAX;

/// The times of a connection, packed, because every session has them.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    interval: u16,
    patience: u16,
    heard: Seconds,
    written: Seconds,
    /// When the device was pinged without having sent anything since; otherwise [`NEVER`].
    pinged: Seconds,
    expires: Seconds,
    /// When the connection ends after GoAway.
    leaves: Seconds,
    /// When the connection ends unless the device sends more than pongs.
    idles: Seconds,
}

impl Heartbeat {
    /// Pings when either direction was silent for `interval`, and times out `patience` after a ping.
    pub fn new(interval: u16, patience: u16, now: Seconds, expires: Seconds) -> Self {
        let (heard, written) = (now, now);
        let (pinged, leaves, idles) = (NEVER, NEVER, NEVER);
        Self { interval, patience, heard, written, pinged, expires, leaves, idles }
    }

    /// Records that the device sent something.
    pub fn heard(&mut self, now: Seconds) {
        self.heard = now;
        self.pinged = NEVER;
    }

    /// Records that the device sent more than a pong. It must do so again within `idle`; 0: no limit.
    pub fn used(&mut self, now: Seconds, idle: Seconds) {
        self.idles = if idle == 0 { NEVER } else { now.saturating_add(idle) };
    }

    /// Records that something was written to the device.
    pub fn written(&mut self, now: Seconds) {
        self.written = now;
    }

    /// Sets the token's expiry.
    pub fn expires(&mut self, expires: Seconds) {
        self.expires = expires;
    }

    /// Ends the connection at `at` at the latest.
    pub fn leave(&mut self, at: Seconds) {
        self.leaves = self.leaves.min(at);
    }

    /// Whether GoAway was sent.
    pub fn is_leaving(&self) -> bool {
        self.leaves != NEVER
    }

    /// Returns what is due now. A ping counts as sent.
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

    /// When the next deadline is.
    pub fn due(&self) -> Seconds {
        self.beats_at().min(self.expires).min(self.leaves).min(self.idles)
    }

    /// When the next ping is due, or the timeout of the last one.
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
