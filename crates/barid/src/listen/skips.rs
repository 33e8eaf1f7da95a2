//! The order of skips: the SDK reports a skip when it arrives, while messages before it may still wait to be shown. Pure.

use std::collections::VecDeque;

use barid_client::Event;

/// Skips that wait. With a further one, all of them are shown.
const HELD_MAX: usize = 1_024;

/// Holds skips back until the user's messages before them are shown.
#[derive(Debug, Default)]
pub struct Skips {
    /// Up to this position all messages are shown or skipped.
    shown: u64,
    held: VecDeque<Event>,
}

impl Skips {
    /// Takes an event. Returns those to show now, in this order.
    pub fn event(&mut self, event: Event) -> Vec<Event> {
        let mut now = Vec::new();
        match &event {
            // Messages after this position follow.
            Event::Connected { position, .. } => self.shown = self.shown.max(position.seq.0),
            // Other positions follow: what waits will not be reached any more.
            Event::Reset { now: position, .. } => {
                now.extend(self.all());
                self.shown = position.seq.0;
            }
            Event::Skipped { first, .. } if !self.is_next(first.0) => {
                if self.held.len() >= HELD_MAX {
                    now.extend(self.all());
                }
                self.held.push_back(event);
                return now;
            }
            Event::Skipped { last, .. } => self.shown = self.shown.max(last.0),
            _ => {}
        }
        now.push(event);
        now.extend(self.next());
        now
    }

    /// The skips to show before the message at a position.
    pub fn before(&mut self, seq: u64) -> Vec<Event> {
        // Messages in between that the SDK recognized are never shown.
        self.shown = self.shown.max(seq.saturating_sub(1));
        self.next()
    }

    /// The skips to show after the message at a position.
    pub fn after(&mut self, seq: u64) -> Vec<Event> {
        self.shown = self.shown.max(seq);
        self.next()
    }

    /// All that wait.
    pub fn all(&mut self) -> Vec<Event> {
        let all: Vec<Event> = self.held.drain(..).collect();
        all.iter().for_each(|event| self.pass(event));
        all
    }

    /// Whether skips wait.
    pub fn are_held(&self) -> bool {
        !self.held.is_empty()
    }

    /// The skips that nothing precedes any more.
    fn next(&mut self) -> Vec<Event> {
        let mut next = Vec::new();
        while let Some(Event::Skipped { first, .. }) = self.held.front()
            && self.is_next(first.0)
            && let Some(event) = self.held.pop_front()
        {
            self.pass(&event);
            next.push(event);
        }
        next
    }

    fn pass(&mut self, event: &Event) {
        if let Event::Skipped { last, .. } = event {
            self.shown = self.shown.max(last.0);
        }
    }

    fn is_next(&self, first: u64) -> bool {
        first <= self.shown.saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use barid_client::SkipReason;
    use barid_core::{Position, Seq};

    use super::*;

    fn skip(first: u64, last: u64) -> Event {
        Event::Skipped { first: Seq(first), last: Seq(last), why: SkipReason::Expired }
    }

    fn at(seq: u64) -> Position {
        Position { seq: Seq(seq), ..Position::default() }
    }

    fn connected(seq: u64) -> Event {
        Event::Connected { session: "s".into(), position: at(seq) }
    }

    #[test]
    fn a_skip_follows_the_messages_before_it_and_precedes_those_after_it() {
        let mut skips = Skips::default();
        assert_eq!(skips.event(connected(4)), [connected(4)]);
        assert_eq!(skips.event(skip(5, 6)), [skip(5, 6)], "nothing is before it");
        for held in [skip(8, 8), skip(9, 9), skip(12, 14)] {
            assert!(skips.event(held).is_empty());
        }
        assert!(skips.before(7).is_empty());
        assert_eq!(skips.after(7), [skip(8, 8), skip(9, 9)]);
        assert!(skips.before(10).is_empty() && skips.after(10).is_empty() && skips.are_held());
        // The SDK knew 11, and does not show it again.
        assert_eq!(skips.before(15), [skip(12, 14)]);
        assert!(skips.after(15).is_empty() && !skips.are_held());
        assert_eq!(skips.event(skip(3, 3)), [skip(3, 3)], "one that was given back");
    }

    #[test]
    fn what_waits_is_shown_before_positions_start_anew_and_at_the_end() {
        let mut skips = Skips::default();
        assert!(skips.event(skip(3, 3)).is_empty());
        let reset = Event::Reset { before: at(1), now: at(0) };
        assert_eq!(skips.event(reset.clone()), [skip(3, 3), reset]);
        assert!(skips.event(skip(2, 2)).is_empty(), "positions are those of the new history");
        assert_eq!(skips.all(), [skip(2, 2)]);
        for n in 0..HELD_MAX as u64 {
            assert!(skips.event(skip(10 + 2 * n, 10 + 2 * n)).is_empty());
        }
        assert_eq!(skips.event(skip(9_999, 9_999)).len(), HELD_MAX, "the bound");
        assert_eq!(skips.all(), [skip(9_999, 9_999)]);
    }
}
