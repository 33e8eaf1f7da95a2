//! Partitions whose next records cannot be fetched: a codec that this build does not know, a right
//! that was taken away, a damaged batch. librdkafka tells of some of them at each attempt, ten times a
//! second, and of others once and never again, also when they are mended.

use std::time::{Duration, Instant};

/// A cause that was not told again for so long is asked for once more.
const SILENT: Duration = Duration::from_secs(3);

/// Why a partition cannot be fetched.
#[derive(Debug, Clone)]
pub struct Stuck {
    /// The offset that is not had; `None`: not known.
    pub offset: Option<i64>,
    /// For people.
    pub cause: String,
    /// When it was told last.
    told: Instant,
    /// When it was asked for again since.
    asked: Option<Instant>,
}

/// What to do about a silent partition.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing yet.
    Wait,
    /// Have librdkafka fetch afresh, so that it tells again.
    Ask,
    /// It was asked, and said nothing: it can be fetched.
    Over,
}

impl Stuck {
    pub(crate) fn new(offset: Option<i64>, cause: String, now: Instant) -> Self {
        Self { offset, cause, told: now, asked: None }
    }

    /// The same cause was told again.
    pub(crate) fn again(&mut self, now: Instant) {
        (self.told, self.asked) = (now, None);
    }

    /// Told at `now`; [`Next::Ask`] counts as done.
    pub(crate) fn next(&mut self, now: Instant) -> Next {
        match self.asked {
            Some(asked) if now.duration_since(asked) > SILENT => Next::Over,
            None if now.duration_since(self.told) > SILENT => {
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
