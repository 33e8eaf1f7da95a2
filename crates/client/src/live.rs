//! Messages of groups. They are delivered live and in order, and neither acknowledged nor sent again. Pure: no
//! socket, no clock, no task.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use barid_core::Seq;

use crate::event::Event;
use crate::message::Message;

/// Bound of the messages that wait for the application. If it is reached, the oldest is dropped.
const WAITING_MAX: usize = 1024;

/// The queue of group messages.
#[derive(Debug, Default)]
pub(crate) struct Live {
    waiting: VecDeque<Message>,
    /// The last received position of each group, kept over reconnects, to count missed messages.
    last: HashMap<Arc<str>, Seq>,
}

impl Live {
    /// Handles a message of a group.
    pub(crate) fn deliver(&mut self, group: &str, message: Message, events: &mut Vec<Event>) {
        let known = self.last.get_key_value(group).map(|(group, last)| (Arc::clone(group), *last));
        let (group, last) = known.unwrap_or_else(|| (group.into(), Seq(0)));
        let missed = message.seq.0.saturating_sub(last.0.saturating_add(1));
        if last != Seq(0) && missed > 0 {
            events.push(Event::Missed { group: Arc::clone(&group), count: missed });
        }
        self.last.insert(Arc::clone(&group), message.seq);
        if self.waiting.len() == WAITING_MAX
            && let Some(Message { group: Some(group), .. }) = self.waiting.pop_front()
        {
            events.push(Event::Missed { group, count: 1 });
        }
        self.waiting.push_back(Message { group: Some(group), ..message });
    }

    /// The next message for the application.
    pub(crate) fn next(&mut self) -> Option<Message> {
        self.waiting.pop_front()
    }

    /// Forgets a group that the application has unsubscribed from.
    pub(crate) fn forget(&mut self, group: &str) {
        self.last.remove(group);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Body;

    fn message(seq: u64) -> Message {
        Message { group: None, seq: Seq(seq), id: format!("m{seq}"), body: Body::Text("x".into()) }
    }

    fn missed(group: &str, count: u64) -> Event {
        Event::Missed { group: group.into(), count }
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
