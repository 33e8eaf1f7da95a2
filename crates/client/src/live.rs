//! Messages of groups and of everyone. They arrive in order and are not acknowledged; after a reconnect a group goes on
//! from the position that the client names. Pure: no socket, no clock, no task.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use barid_core::{Position, Seq};

use crate::event::Event;
use crate::message::Message;

/// Bound of the messages that wait for the application. If it is reached, the oldest is dropped.
const WAITING_MAX: usize = 1024;

/// The queue of group messages.
#[derive(Debug, Default)]
pub(crate) struct Live {
    /// Each with the life of its group's history in which it was received.
    waiting: VecDeque<(u32, Message)>,
    groups: HashMap<Arc<str>, Group>,
}

/// What is known of a group, kept over reconnects.
#[derive(Debug, Default)]
struct Group {
    /// The last received position; `None`: nothing was received.
    received: Option<Seq>,
    /// The position of the last message that the application was given; `None`: the server has told no position.
    shown: Option<Position>,
    /// Counts the histories of the group.
    life: u32,
}

impl Live {
    /// Handles a confirmed subscription, which delivers what follows a position. Returns what may be missing of another
    /// history, which no longer has its first messages.
    pub(crate) fn subscribed(&mut self, group: &str, position: Option<Position>) -> Option<Event> {
        let known = self.groups.entry(group.into()).or_default();
        let position = position?;
        // The server goes on from where the client stood: what waits for the application will be sent again.
        let goes_on = known.shown.is_some_and(|shown| {
            (shown.epoch, shown.seq) == (position.epoch, position.seq)
                && (shown.chain.is_none() || shown.chain == position.chain)
        });
        if goes_on {
            return None;
        }
        let is_other = known.shown.is_some_and(|shown| shown.epoch != position.epoch);
        (known.received, known.shown) = (Some(position.seq), Some(position));
        known.life = known.life.wrapping_add(1);
        let count = position.seq.0;
        (is_other && count > 0).then(|| Event::Missed { group: group.into(), count })
    }

    /// Handles a message of a group.
    pub(crate) fn deliver(&mut self, group: &str, message: Message, events: &mut Vec<Event>) {
        let known = self.groups.get_key_value(group).map(|(group, _)| Arc::clone(group));
        let group = known.unwrap_or_else(|| group.into());
        let known = self.groups.entry(Arc::clone(&group)).or_default();
        if known.shown.is_some() && known.received >= Some(message.seq) {
            return; // it waits for the application already
        }
        let missed =
            known.received.map_or(0, |last| message.seq.0.saturating_sub(last.0.saturating_add(1)));
        known.received = Some(message.seq);
        let life = known.life;
        if missed > 0 {
            events.push(Event::Missed { group: Arc::clone(&group), count: missed });
        }
        if self.waiting.len() == WAITING_MAX
            && let Some((_, Message { group: Some(group), .. })) = self.waiting.pop_front()
        {
            events.push(Event::Missed { group, count: 1 });
        }
        self.waiting.push_back((life, Message { group: Some(group), ..message }));
    }

    /// The next message for the application.
    pub(crate) fn next(&mut self) -> Option<Message> {
        let (life, message) = self.waiting.pop_front()?;
        let known = message.group.as_ref().and_then(|group| self.groups.get_mut(group));
        let known = known.filter(|known| known.life == life);
        if let Some(shown) = known.and_then(|known| known.shown.as_mut())
            && message.seq > shown.seq
        {
            // Behind messages that were missed the chain is unknown.
            let follows = message.seq == shown.seq.next();
            shown.chain = shown.chain.filter(|_| follows).map(|chain| chain.next(&message.id));
            shown.seq = message.seq;
        }
        Some(message)
    }

    /// The positions from which to go on, by mailbox.
    pub(crate) fn positions(&self) -> impl Iterator<Item = (&Arc<str>, Position)> {
        self.groups.iter().filter_map(|(group, known)| Some((group, known.shown?)))
    }

    /// Forgets a group that the application has unsubscribed from.
    pub(crate) fn forget(&mut self, group: &str) {
        self.groups.remove(group);
    }
}

#[cfg(test)]
mod tests {
    use barid_core::{Chain, Epoch};

    use super::*;
    use crate::message::Body;

    fn message(seq: u64) -> Message {
        Message { group: None, seq: Seq(seq), id: format!("m{seq}"), body: Body::Text("x".into()) }
    }

    fn missed(group: &str, count: u64) -> Event {
        Event::Missed { group: group.into(), count }
    }

    fn position(epoch: u64, seq: u64, chain: Option<Chain>) -> Position {
        Position { epoch: Epoch(epoch), seq: Seq(seq), chain, ..Default::default() }
    }

    fn shown(live: &mut Live) -> Vec<u64> {
        std::iter::from_fn(|| live.next()).map(|message| message.seq.0).collect()
    }

    #[test]
    fn what_did_not_come_is_told_by_group() {
        let (mut live, mut events) = (Live::default(), Vec::new());
        for (group, seq) in [("a", 5), ("b", 1), ("a", 6), ("a", 9), ("b", 2), ("a", 1)] {
            live.deliver(group, message(seq), &mut events);
        }
        assert_eq!(events, [missed("a", 2)]);
        let shown: Vec<_> = std::iter::from_fn(|| live.next())
            .map(|message| (message.group.unwrap().to_string(), message.seq.0))
            .collect();
        let shown: Vec<_> = shown.iter().map(|(group, seq)| (group.as_str(), *seq)).collect();
        assert_eq!(shown, [("a", 5), ("b", 1), ("a", 6), ("a", 9), ("b", 2), ("a", 1)]);
        live.forget("a");
        live.deliver("a", message(100), &mut events);
        assert_eq!(events.len(), 1);
    }

    #[test]
    fn hazard_165_a_client_goes_on_from_what_its_application_was_given() {
        let (mut live, mut events) = (Live::default(), Vec::new());
        live.subscribed("a", Some(position(7, 3, Some(Chain(5)))));
        for seq in 4..=6 {
            live.deliver("a", message(seq), &mut events);
        }
        live.next();
        let chain = Chain(5).next("m4");
        let at = position(7, 4, Some(chain));
        assert_eq!(live.positions().collect::<Vec<_>>(), [(&"a".into(), at)]);
        // A reconnect: 5 and 6 wait, and are sent again.
        live.subscribed("a", Some(at));
        for seq in 5..=7 {
            live.deliver("a", message(seq), &mut events);
        }
        assert_eq!(shown(&mut live), [5, 6, 7]);
        // 8 and 9 were evicted: the chain behind them is unknown.
        live.deliver("a", message(10), &mut events);
        assert_eq!((shown(&mut live), &*events), (vec![10], &[missed("a", 2)][..]));
        assert_eq!(live.positions().next().unwrap().1, position(7, 10, None));
        // Another history, with the same seqs. What still waits of the old one does not move the new position.
        live.deliver("a", message(11), &mut events);
        assert_eq!(live.subscribed("a", Some(position(8, 0, Some(Chain::START)))), None);
        assert_eq!(shown(&mut live), [11]);
        assert_eq!(live.positions().next().unwrap().1.seq, Seq(0));
        live.deliver("a", message(1), &mut events);
        assert_eq!((shown(&mut live), events.len()), (vec![1], 1));
        // One that no longer has its first messages.
        let told = live.subscribed("a", Some(position(9, 40, Some(Chain(7)))));
        assert_eq!(told, Some(missed("a", 40)));
    }

    #[test]
    fn hazard_43_the_last_number_of_all_is_followed_by_nothing() {
        let (mut live, mut events) = (Live::default(), Vec::new());
        [u64::MAX, 5, u64::MAX]
            .iter()
            .for_each(|seq| live.deliver("a", message(*seq), &mut events));
        assert_eq!(events, [missed("a", u64::MAX - 6)]);
    }

    #[test]
    fn an_application_that_does_not_keep_up_misses_the_oldest() {
        let (mut live, mut events) = (Live::default(), Vec::new());
        (1..=WAITING_MAX as u64 + 2).for_each(|seq| live.deliver("a", message(seq), &mut events));
        assert_eq!(events, [missed("a", 1), missed("a", 1)]);
        assert_eq!(live.next().map(|message| message.seq), Some(Seq(3)));
    }
}
