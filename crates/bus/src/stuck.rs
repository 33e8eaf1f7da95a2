//! Partitions that cannot be fetched, because of an unknown codec, a missing permission or a damaged batch.
//! librdkafka reports some of these causes at each attempt (ten times a second) and others only once, and never
//! reports that a cause is gone.

use std::time::{Duration, Instant};

/// A cause that was not reported for this long is checked by another fetch.
const SILENT: Duration = Duration::from_secs(3);

/// Why a partition cannot be fetched.
#[derive(Debug, Clone)]
pub struct Stuck {
    /// The offset that cannot be fetched; `None`: unknown.
    pub offset: Option<i64>,
    /// The cause, for people.
    pub cause: String,
    /// When librdkafka last reported it.
    reported: Instant,
    /// When a fetch was started to check it.
    asked: Option<Instant>,
}

/// The next step for a partition without a new report.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing yet.
    Wait,
    /// Fetch again, so that librdkafka reports the cause if it persists.
    Ask,
    /// Another fetch reported nothing: the partition can be fetched.
    Over,
}

impl Stuck {
    pub(crate) fn new(offset: Option<i64>, cause: String, now: Instant) -> Self {
        Self { offset, cause, reported: now, asked: None }
    }

    /// The same cause was reported again.
    pub(crate) fn again(&mut self, now: Instant) {
        (self.reported, self.asked) = (now, None);
    }

    /// The next step at `now`. [`Next::Ask`] is returned once: the caller must then fetch.
    pub(crate) fn next(&mut self, now: Instant) -> Next {
        match self.asked {
            Some(asked) if now.duration_since(asked) > SILENT => Next::Over,
            None if now.duration_since(self.reported) > SILENT => {
                self.asked = Some(now);
                Next::Ask
            }
            _ => Next::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_is_told_once_is_asked_for_before_it_counts_as_over() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut stuck = Stuck::new(Some(7), "why".into(), start);
        assert_eq!(stuck.next(at(2)), Next::Wait);
        assert_eq!(stuck.next(at(4)), Next::Ask);
        stuck.again(at(5));
        assert_eq!(stuck.next(at(7)), Next::Wait, "it is still stuck");
        assert_eq!(stuck.next(at(9)), Next::Ask);
        assert_eq!(stuck.next(at(10)), Next::Wait);
        assert_eq!(stuck.next(at(13)), Next::Over);
    }
}
