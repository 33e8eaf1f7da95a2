//! What each shard has confirmed of each assignment: the `prev` of its next group. With it Redis
//! tells a batch that was never executed, or that it has forgotten.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use barid_core::Shard;
use barid_mailbox::{AcceptGroup, LogPosition};

use super::Group;
use crate::flight::Assignment;

/// Ends of groups that are remembered a shard and assignment. More than one, because a reading that
/// goes back asks for the end before its own start.
const ENDS_MAX: usize = 16;
/// How often dead assignments are looked for, in new tracks.
const SWEEP_EVERY: usize = 256;

/// Per assignment and shard.
#[derive(Debug, Default)]
pub(super) struct History {
    tracks: HashMap<(u64, Shard), Track>,
    until_sweep: usize,
}

#[derive(Debug)]
struct Track {
    assignment: Weak<Assignment>,
    reading: u64,
    /// Ascending.
    ends: VecDeque<LogPosition>,
}

impl History {
    /// The group as Redis is asked: `prev` is the last confirmed position before its first. In a
    /// reading that repairs this shard, it is what the shard said it knows.
    pub(super) fn request(&mut self, group: &Group) -> AcceptGroup {
        let first = group.parcels.first().map(|parcel| parcel.message.position);
        let track = self.track(group);
        let prev =
            track.ends.iter().rev().find(|end| first.is_none_or(|first| **end < first)).copied();
        AcceptGroup {
            shard: group.shard,
            source: group.reading.assignment.source.clone(),
            prev,
            messages: group.parcels.iter().map(|parcel| parcel.message.clone()).collect(),
        }
    }

    /// The group was executed.
    pub(super) fn done(&mut self, group: &Group) {
        let Some(last) = group.parcels.last().map(|parcel| parcel.message.position) else { return };
        let ends = &mut self.track(group).ends;
        if ends.back().is_none_or(|end| *end < last) {
            if ends.len() == ENDS_MAX {
                ends.pop_front();
            }
            ends.push_back(last);
        }
    }

    fn track(&mut self, group: &Group) -> &mut Track {
        let reading = &group.reading;
        let key = (reading.assignment.id, group.shard);
        if !self.tracks.contains_key(&key) {
            self.sweep();
        }
        let track = self.tracks.entry(key).or_insert_with(|| Track {
            assignment: Arc::downgrade(&reading.assignment),
            reading: 0,
            ends: VecDeque::new(),
        });
        if track.reading != reading.number() {
            track.reading = reading.number();
            if let Some(known) = reading.repairs(group.shard) {
                track.ends = known.into_iter().collect();
            }
        }
        track
    }

    fn sweep(&mut self) {
        self.until_sweep = self.until_sweep.saturating_sub(1);
        if self.until_sweep == 0 {
            self.until_sweep = SWEEP_EVERY;
            self.tracks.retain(|_, track| track.assignment.strong_count() > 0);
        }
    }
}
