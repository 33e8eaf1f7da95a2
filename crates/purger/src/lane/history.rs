//! What each shard has confirmed of each assignment: the `prev` of its next group. With it Redis
//! tells a batch that was never executed, or that it has forgotten.
//!
//! It begins with what the partition's last owner committed. It is the highest confirmed position,
//! even for a group that lies before it because a reading went back for another shard: whatever this
//! shard has confirmed, it must still know. Only a reading that repairs this very shard lowers it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use barid_core::Shard;
use barid_mailbox::{AcceptGroup, LogPosition};

use super::Group;
use crate::flight::{Assignment, Parcel, Reading};

/// Per assignment and shard.
#[derive(Debug, Default)]
pub(super) struct History {
    tracks: HashMap<(u64, Shard), Track>,
}

#[derive(Debug)]
struct Track {
    assignment: Weak<Assignment>,
    /// The number of the last reading that it heard of.
    number: u64,
    confirmed: Option<LogPosition>,
    /// Asked since the last probe.
    asked: bool,
}

impl History {
    /// The group as Redis is asked.
    pub(super) fn request(&mut self, group: &Group) -> AcceptGroup {
        let track = self.track(group.shard, &group.reading);
        track.asked |= !group.parcels.is_empty();
        AcceptGroup {
            shard: group.shard,
            source: group.reading.assignment.source.clone(),
            prev: track.confirmed,
            raise: group.raise,
            messages: group.parcels.iter().map(|parcel| parcel.message.clone()).collect(),
        }
    }

    /// The group was executed.
    pub(super) fn done(&mut self, group: &Group) {
        let last = group.parcels.last().map(|parcel| parcel.message.position).or(group.raise);
        let track = self.track(group.shard, &group.reading);
        track.confirmed = track.confirmed.max(last);
    }

    /// Whether a reading that went back for other shards brings this one what it has confirmed.
    pub(super) fn has(&mut self, parcel: &Parcel) -> bool {
        let reading = &parcel.flight.reading;
        let track = self.track(parcel.shard, reading);
        track.confirmed >= Some(parcel.message.position)
    }

    /// Empty groups for shards that were not asked since the last time, in portions.
    pub(super) fn idle(&mut self, portion: usize) -> Vec<Vec<Group>> {
        let mut idle = Vec::new();
        self.tracks.retain(|(_, shard), track| {
            let Some(reading) = track.assignment.upgrade().and_then(|a| a.live()) else {
                return false;
            };
            let asked = std::mem::replace(&mut track.asked, false);
            if !asked && track.confirmed.is_some() && !reading.ended() {
                idle.push(Group::empty(*shard, reading, None));
            }
            true
        });
        let mut portions = Vec::new();
        while !idle.is_empty() {
            portions.push(idle.split_off(idle.len().saturating_sub(portion)));
        }
        portions
    }

    fn track(&mut self, shard: Shard, reading: &Reading) -> &mut Track {
        let assignment = &reading.assignment;
        let track = self.tracks.entry((assignment.id, shard)).or_insert_with(|| Track {
            assignment: Arc::downgrade(assignment),
            number: 0,
            confirmed: assignment.confirmed.get(&shard).copied(),
            asked: true,
        });
        if reading.number() > track.number {
            track.number = reading.number();
            if let Some(known) = reading.repairs(shard) {
                track.confirmed = known;
            }
        }
        track
    }
}
