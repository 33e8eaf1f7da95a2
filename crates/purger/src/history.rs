//! The highest position that each shard has confirmed, for each assignment of a partition. It is sent as the `prev`
//! of the shard's next group, so that Redis recognizes a batch that it has never executed or has forgotten. A plain
//! state machine: no Redis, no Kafka, no time.
//!
//! A history begins with the positions that the partition's last owner committed. A position is only lowered by a
//! reading that repairs its shard. A reading that goes back for other shards does not lower it, because this shard
//! must still know what it has confirmed.

use std::collections::HashMap;

use barid_core::{LogPosition, Shard};

/// A reading of an assignment's log, for one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Identifies the assignment within the process.
    pub assignment: u64,
    /// Counts the readings of the assignment, from 1.
    pub reading: u64,
    /// The position that the shard had confirmed when the partition was assigned.
    pub committed: Option<LogPosition>,
    /// The position that the shard reported, if this reading repairs it; `Some(None)`: it knew no position of this
    /// partition.
    pub repaired: Option<Option<LogPosition>>,
}

/// Confirmed positions by assignment and shard.
#[derive(Debug, Default)]
pub struct History {
    tracks: HashMap<(u64, Shard), Track>,
}

/// The part of a [`History`] about one shard, to be moved to another lane.
#[derive(Debug, Default)]
pub struct Tracks(Vec<((u64, Shard), Track)>);

impl Tracks {
    /// The assignments in it.
    pub fn assignments(&self) -> impl Iterator<Item = u64> {
        self.0.iter().map(|((assignment, _), _)| *assignment)
    }
}

#[derive(Debug)]
struct Track {
    /// The latest reading seen.
    reading: u64,
    confirmed: Option<LogPosition>,
    /// A group was sent since idle shards were last looked for.
    active: bool,
}

impl History {
    /// The highest position that the shard has confirmed.
    pub fn confirmed(&mut self, shard: Shard, view: View) -> Option<LogPosition> {
        self.track(shard, view).confirmed
    }

    /// Records that messages are sent to the shard, so that it is not idle.
    pub fn mark_active(&mut self, shard: Shard, view: View) {
        self.track(shard, view).active = true;
    }

    /// Records that the shard has executed everything up to `last`; `None`: an empty group.
    pub fn confirm(&mut self, shard: Shard, view: View, last: Option<LogPosition>) {
        let track = self.track(shard, view);
        track.confirmed = track.confirmed.max(last);
    }

    /// Shards of live assignments that have confirmed a position and were sent nothing since the last call, each with
    /// its assignment. Forgets assignments that are not live.
    pub fn idle(&mut self, mut is_live: impl FnMut(u64) -> bool) -> Vec<(u64, Shard)> {
        let mut idle = Vec::new();
        self.tracks.retain(|(assignment, shard), track| {
            if !is_live(*assignment) {
                return false;
            }
            let active = std::mem::replace(&mut track.active, false);
            if !active && track.confirmed.is_some() {
                idle.push((*assignment, *shard));
            }
            true
        });
        idle
    }

    /// Removes a shard's part, for [`History::adopt`] in another lane.
    pub fn release(&mut self, shard: Shard) -> Tracks {
        Tracks(self.tracks.extract_if(|(_, of), _| *of == shard).collect())
    }

    /// Adds the part of a shard that another lane has released.
    pub fn adopt(&mut self, tracks: Tracks) {
        self.tracks.extend(tracks.0);
    }

    fn track(&mut self, shard: Shard, view: View) -> &mut Track {
        let track = self.tracks.entry((view.assignment, shard)).or_insert_with(|| Track {
            reading: 0,
            confirmed: view.committed,
            active: true,
        });
        if view.reading > track.reading {
            track.reading = view.reading;
            if let Some(known) = view.repaired {
                track.confirmed = known;
            }
        }
        track
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use barid_core::ShardCount;

    fn shard(number: usize) -> Shard {
        ShardCount::new(4).unwrap().all().nth(number).unwrap()
    }

    fn at(offset: i64) -> Option<LogPosition> {
        Some(LogPosition { leader_epoch: 0, offset, index: 0 })
    }

    fn view(reading: u64) -> View {
        View { assignment: 7, reading, committed: at(10), repaired: None }
    }

    #[test]
    fn only_a_reading_that_repairs_the_shard_lowers_its_position() {
        let mut history = History::default();
        assert_eq!(history.confirmed(shard(1), view(1)), at(10), "as it was committed");
        history.confirm(shard(1), view(1), at(20));
        history.confirm(shard(1), view(1), None);
        history.confirm(shard(1), view(2), at(12));
        assert_eq!(history.confirmed(shard(1), view(2)), at(20), "it went back for another shard");
        let repairing = View { repaired: Some(at(5)), ..view(3) };
        assert_eq!(history.confirmed(shard(1), repairing), at(5));
        history.confirm(shard(1), repairing, at(6));
        assert_eq!(history.confirmed(shard(1), repairing), at(6), "a reading lowers it once");
        let late = View { repaired: Some(None), ..view(2) };
        assert_eq!(history.confirmed(shard(1), late), at(6), "an earlier reading lowers nothing");
    }

    #[test]
    fn a_shard_is_idle_once_nothing_was_sent_for_a_while_and_ends_with_its_assignment() {
        let mut history = History::default();
        history.confirm(shard(1), view(1), at(20));
        history.confirmed(shard(2), View { committed: None, ..view(1) });
        assert_eq!(history.idle(|_| true), [], "new ones were just sent something");
        assert_eq!(history.idle(|_| true), [(7, shard(1))], "the other has confirmed nothing");
        history.mark_active(shard(1), view(1));
        assert_eq!(history.idle(|_| true), []);
        assert_eq!(history.idle(|_| false), []);
        assert_eq!(history.confirmed(shard(1), view(1)), at(10), "forgotten");
    }

    #[test]
    fn what_is_known_of_a_shard_moves_between_histories_whole() {
        let (mut from, mut to) = (History::default(), History::default());
        from.confirm(shard(1), view(1), at(20));
        from.confirm(shard(2), view(1), at(21));
        to.adopt(from.release(shard(1)));
        assert_eq!(to.confirmed(shard(1), view(1)), at(20));
        assert_eq!(from.confirmed(shard(2), view(1)), at(21));
        assert_eq!(from.release(shard(1)).0.len(), 0);
    }
}
