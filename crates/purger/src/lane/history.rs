//! What each shard has confirmed of each assignment: the `prev` of its next group. With it Redis
//! tells a batch that was never executed, or that it has forgotten.
//!
//! It is the highest confirmed position, even for a group that lies before it because a reading went
//! back for another shard: whatever this shard has confirmed, it must still know. Only a reading that
//! repairs this very shard lowers it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use barid_core::Shard;
use barid_mailbox::{AcceptGroup, LogPosition};

use super::Group;
use crate::flight::{Assignment, Reading};

/// Per assignment and shard.
#[derive(Debug, Default)]
pub(super) struct History {
    tracks: HashMap<(u64, Shard), Track>,
}

#[derive(Debug)]
struct Track {
    assignment: Weak<Assignment>,
    /// The last reading that sent it something, and its number.
    reading: Weak<Reading>,
    number: u64,
    confirmed: Option<LogPosition>,
    /// Asked since the last probe.
    asked: bool,
}

impl History {
    /// The group as Redis is asked.
    pub(super) fn request(&mut self, group: &Group) -> AcceptGroup {
        let track = self.track(group);
        track.asked |= !group.parcels.is_empty();
        AcceptGroup {
            shard: group.shard,
            source: group.reading.assignment.source.clone(),
            prev: track.confirmed,
            messages: group.parcels.iter().map(|parcel| parcel.message.clone()).collect(),
        }
    }

    /// The group was executed.
    pub(super) fn done(&mut self, group: &Group) {
        let last = group.parcels.last().map(|parcel| parcel.message.position);
        let track = self.track(group);
        track.confirmed = track.confirmed.max(last);
    }

    /// Empty groups for shards that were not asked since the last time, in portions.
    pub(super) fn idle(&mut self, portion: usize) -> Vec<Vec<Group>> {
        self.tracks.retain(|_, track| track.assignment.strong_count() > 0);
        let mut idle = Vec::new();
        for ((_, shard), track) in &mut self.tracks {
            let asked = std::mem::replace(&mut track.asked, false);
            let reading = track.reading.upgrade().filter(|reading| !reading.ended());
            if let Some(reading) = reading
                && !asked
                && track.confirmed.is_some()
            {
                idle.push(Group { shard: *shard, reading, parcels: Vec::new() });
            }
        }
        let mut portions = Vec::new();
        while !idle.is_empty() {
            portions.push(idle.split_off(idle.len().saturating_sub(portion)));
        }
        portions
    }

    fn track(&mut self, group: &Group) -> &mut Track {
        let reading = &group.reading;
        let key = (reading.assignment.id, group.shard);
        let track = self.tracks.entry(key).or_insert_with(|| Track {
            assignment: Arc::downgrade(&reading.assignment),
            reading: Weak::new(),
            number: 0,
            confirmed: None,
            asked: true,
        });
        if track.number != reading.number() {
            track.number = reading.number();
            track.reading = Arc::downgrade(reading);
            if let Some(known) = reading.repairs(group.shard) {
                track.confirmed = known;
            }
        }
        track
    }
}
