//! The window of unacknowledged messages. A skip extends the message before it, or the acknowledged position if there
//! is no such message.

use std::collections::VecDeque;

use barid_core::{Chain, Seq};

use crate::effect::Mark;

/// A delivered message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// Its position.
    pub mark: Mark,
    /// The last position that an ack of it covers: its own, or that of the last skip directly after it.
    pub to: Mark,
    /// Its times, if it was written from a push.
    pub pushed: Option<PushedAt>,
    /// Kept only if receipts are requested or its trace is sampled.
    pub receipt: Option<Box<Wanted>>,
}

/// The beginnings of the hops that end with a message's acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushedAt {
    /// When it was written, µs since the Unix epoch.
    pub written_us: u64,
    /// When it was produced, ms since the Unix epoch; 0: unknown.
    pub produced_ms: u64,
}

/// Fields of a message that its receipts and trace events use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The message.
    pub id: String,
    /// The requested kinds.
    pub receipts: u32,
    /// The record's `traceparent`, which receipts return; may be empty.
    pub traceparent: String,
    /// When it was produced, ms since the Unix epoch; 0: unknown.
    pub produced_ms: u64,
}

/// The window. In order: `acked`, the entries, `high`.
#[derive(Debug, Clone)]
pub struct Window {
    acked: Mark,
    high: Mark,
    entries: VecDeque<Sent>,
}

impl Window {
    /// Creates a window: everything up to `cursor` is acknowledged, and nothing after it was written.
    pub fn new(cursor: Mark) -> Self {
        Self { acked: cursor, high: cursor, entries: VecDeque::new() }
    }

    /// The last acknowledged position.
    pub fn acked(&self) -> Mark {
        self.acked
    }

    /// The last position that was sent to the device.
    pub fn high(&self) -> Mark {
        self.high
    }

    /// Number of unacknowledged messages.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether all messages are acknowledged.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The unacknowledged messages, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Sent> {
        self.entries.iter()
    }

    /// Adds a message after `high`.
    pub fn sent(&mut self, sent: Sent) {
        self.high = sent.to;
        self.entries.push_back(sent);
    }

    /// Skips positions after `high`. Returns whether `acked` has moved.
    pub fn skipped(&mut self, to: Mark) -> bool {
        self.high = to;
        match self.entries.back_mut() {
            Some(last) => last.to = to,
            None => self.acked = to,
        }
        self.entries.is_empty()
    }

    /// Turns a written message into a skip, because it has expired or was voided: an ack of the message before covers
    /// it. Returns whether `acked` has moved.
    pub fn withdraw(&mut self, seq: Seq) -> bool {
        let Ok(index) = self.entries.binary_search_by_key(&seq, |sent| sent.mark.seq) else {
            return false;
        };
        let Some(gone) = self.entries.remove(index) else { return false };
        match index.checked_sub(1).and_then(|before| self.entries.get_mut(before)) {
            Some(before) => before.to = gone.to,
            None => self.acked = gone.to,
        }
        index == 0
    }

    /// Acknowledges everything up to `seq`; `done` is called for each message. Returns whether `acked` has moved.
    pub fn ack(&mut self, seq: Seq, mut done: impl FnMut(Sent)) -> bool {
        let before = self.acked;
        while self.entries.front().is_some_and(|sent| sent.mark.seq <= seq)
            && let Some(sent) = self.entries.pop_front()
        {
            self.acked = sent.to;
            done(sent);
        }
        if self.entries.is_empty() {
            self.entries.shrink_to(0);
        }
        self.acked != before
    }

    /// The chain at a position, if the window knows it.
    pub fn chain_at(&self, seq: Seq) -> Option<Chain> {
        let known = [self.acked, self.high];
        known.into_iter().find(|mark| mark.seq == seq).map(|mark| mark.chain).or_else(|| {
            let index = self.entries.binary_search_by_key(&seq, |sent| sent.mark.seq).ok()?;
            Some(self.entries.get(index)?.mark.chain)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mark(seq: u64) -> Mark {
        Mark { seq: Seq(seq), chain: Chain(seq as u32 * 7) }
    }

    fn sent(seq: u64) -> Sent {
        Sent { mark: mark(seq), to: mark(seq), pushed: None, receipt: None }
    }

    #[test]
    fn an_ack_of_the_last_message_covers_the_skips_behind_it() {
        let mut window = Window::new(mark(4));
        window.sent(sent(5));
        assert!(!window.skipped(mark(8)));
        assert!(window.ack(Seq(5), |_| ()));
        assert_eq!((window.acked(), window.is_empty()), (mark(8), true));
    }

    #[test]
    fn a_skip_behind_the_acknowledged_position_is_acknowledged() {
        let mut window = Window::new(mark(4));
        assert!(window.skipped(mark(6)));
        assert_eq!(window.acked(), mark(6));
    }

    #[test]
    fn a_withdrawn_message_is_covered_by_the_one_before() {
        let mut window = Window::new(mark(0));
        (1..=3).for_each(|seq| window.sent(sent(seq)));
        assert!(!window.withdraw(Seq(2)));
        assert!(window.ack(Seq(1), |_| ()));
        assert_eq!(window.acked(), mark(2));
        assert!(window.withdraw(Seq(3)));
        assert_eq!(window.acked(), mark(3));
        assert!(!window.withdraw(Seq(3)));
    }

    proptest! {
        #[test]
        fn stays_ordered_and_acknowledges_only_what_was_asked(
            steps in proptest::collection::vec((0u8..4, 1u64..40), 1..60)
        ) {
            let mut window = Window::new(mark(0));
            let mut next = 1;
            for (step, number) in steps {
                match step {
                    0 => { window.sent(sent(next)); next += 1; }
                    1 => { window.skipped(mark(next)); next += 1; }
                    2 => {
                        window.ack(Seq(number), |_| ());
                        prop_assert!(window.iter().all(|s| s.mark.seq.0 > number));
                    }
                    _ => { window.withdraw(Seq(number)); }
                }
                let seqs: Vec<u64> = window.iter().map(|s| s.mark.seq.0).collect();
                prop_assert!(seqs.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(window.iter().all(|s| s.mark.seq > window.acked().seq && s.to.seq <= window.high().seq));
                prop_assert_eq!(window.high().seq.0, next - 1);
                if window.is_empty() { prop_assert_eq!(window.acked(), window.high()); }
            }
        }
    }
}
