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
use crate::flight::Assignment;

/// How often assignments that are over are looked for, in new tracks.
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
    confirmed: Option<LogPosition>,
}

impl History {
    /// The group as Redis is asked.
    pub(super) fn request(&mut self, group: &Group) -> AcceptGroup {
        AcceptGroup {
            shard: group.shard,
            source: group.reading.assignment.source.clone(),
            prev: self.track(group).confirmed,
            messages: group.parcels.iter().map(|parcel| parcel.message.clone()).collect(),
        }
    }

    /// The group was executed.
    pub(super) fn done(&mut self, group: &Group) {
        let last = group.parcels.last().map(|parcel| parcel.message.position);
        let track = self.track(group);
        track.confirmed = track.confirmed.max(last);
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
            confirmed: None,
        });
        if track.reading != reading.number() {
            track.reading = reading.number();
            if let Some(known) = reading.repairs(group.shard) {
                track.confirmed = known;
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
