//! What the loop and the lanes say to each other besides parcels.

use std::sync::Arc;

use barid_core::{LogPosition, Shard};

use crate::flight::{Assignment, Flight, Reading};

/// A lane's report to the loop.
#[derive(Debug)]
pub enum Event {
    /// Everything about these records is done.
    Finished(Vec<Arc<Flight>>),
    /// Redis has forgotten what this shard was given after `back_to`: the log must be read again from there.
    Gap {
        /// The reading that found it; it has ended.
        reading: Arc<Reading>,
        /// The shard.
        shard: Shard,
        /// The last position that the shard knows; `None`: no position of this partition.
        back_to: Option<LogPosition>,
    },
    /// Positions of shards that were asked or idle.
    Answered(Answer),
}

/// Asks shards of an assignment whether they still know what they have confirmed.
#[derive(Debug, Clone)]
pub struct Question {
    /// The assignment.
    pub assignment: Arc<Assignment>,
    /// Counts the questions of an assignment, from 1.
    pub round: u64,
    /// The shards, each with the position to raise it to if its repair is over.
    pub shards: Vec<(Shard, Option<LogPosition>)>,
}

/// The positions of some shards of an assignment.
#[derive(Debug)]
pub struct Answer {
    /// The assignment.
    pub assignment: Arc<Assignment>,
    /// The question's round; 0: a probe of idle shards.
    pub round: u64,
    /// Shards that know what they have confirmed, and were raised if that was asked.
    pub knowing: Vec<Shard>,
    /// Shards that have forgotten what came after a position.
    pub gaps: Vec<(Shard, Option<LogPosition>)>,
}

impl Answer {
    /// An answer without any shard yet.
    pub fn new(assignment: Arc<Assignment>, round: u64) -> Self {
        Self { assignment, round, knowing: Vec::new(), gaps: Vec::new() }
    }
}
