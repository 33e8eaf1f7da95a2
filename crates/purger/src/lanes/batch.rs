//! The groups of one accept call, within the call's bounds.

use std::collections::HashMap;
use std::sync::Arc;

use barid_core::{LogPosition, Shard};

use crate::config::WindowConfig;
use crate::flight::{Parcel, Reading};

/// Parcels of one reading for one shard, in order.
pub struct Group {
    /// The shard.
    pub shard: Shard,
    /// The reading.
    pub reading: Arc<Reading>,
    /// Empty in a group that only asks for the shard's position.
    pub parcels: Vec<Parcel>,
    /// The position that an empty group raises the shard's stored one to.
    pub raise: Option<LogPosition>,
}

impl Group {
    /// Creates a group that only asks the shard for its position.
    pub fn empty(shard: Shard, reading: Arc<Reading>, raise: Option<LogPosition>) -> Self {
        Self { shard, reading, parcels: Vec::new(), raise }
    }

    /// The shard's position once the group is executed; `None`: unchanged.
    pub fn last(&self) -> Option<LogPosition> {
        self.parcels.last().map(|parcel| parcel.message.position).or(self.raise)
    }
}

/// The groups of a call that is being prepared.
pub struct Batch {
    groups: Vec<Group>,
    index: HashMap<(Shard, u64, u64), usize>,
    room: usize,
    room_bytes: usize,
    group_max: usize,
}

impl Batch {
    /// Creates an empty batch. `group_max` bounds the messages of one shard.
    pub fn new(window: &WindowConfig, group_max: usize) -> Self {
        Self {
            groups: Vec::new(),
            index: HashMap::new(),
            room: window.call_messages_max,
            room_bytes: window.call_bytes_max,
            group_max,
        }
    }

    /// Adds a parcel; returns it if there is no room for it.
    pub fn add(&mut self, parcel: Parcel) -> Option<Parcel> {
        if self.room == 0 || self.room_bytes == 0 {
            return Some(parcel);
        }
        let reading = &parcel.flight.reading;
        let key = (parcel.shard, reading.assignment.id, reading.number());
        let at = *self.index.entry(key).or_insert_with(|| {
            let reading = Arc::clone(reading);
            self.groups.push(Group::empty(parcel.shard, reading, None));
            self.groups.len() - 1
        });
        let group = &mut self.groups[at];
        if group.parcels.len() >= self.group_max {
            return Some(parcel);
        }
        self.room -= 1;
        self.room_bytes = self.room_bytes.saturating_sub(parcel.message.body.len());
        group.parcels.push(parcel);
        None
    }

    /// Messages that still fit.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Bytes that still fit.
    pub fn room_bytes(&self) -> usize {
        self.room_bytes
    }

    /// The groups, in the order of their first parcels.
    pub fn into_groups(self) -> Vec<Group> {
        self.groups
    }
}
