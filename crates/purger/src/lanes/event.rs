//! Questions from the loop to the lanes, and reports from the lanes to the loop.

use std::sync::Arc;

use barid_core::{LogPosition, Shard};

use crate::flight::{Assignment, Flight, Reading};

/// A lane's report to the loop.
#[derive(Debug)]
pub enum Event {
    /// These records are finished.
    Finished(Vec<Arc<Flight>>),
    /// The shard has forgotten the messages after `back_to`: the log must be read again from there.
    Gap {
        /// The reading in which this was found; it has ended.
        reading: Arc<Reading>,
        /// The shard.
        shard: Shard,
        /// The last position that the shard knows; `None`: no position of this partition.
        back_to: Option<LogPosition>,
    },
    /// The answer to a question, or to a probe of idle shards.
    Answered(Answer),
}

/// Asks shards of an assignment whether they still know the positions that they have confirmed.
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
    /// Shards that know their confirmed position, and whose stored position was raised if the question asked for it.
    pub knowing: Vec<Shard>,
    /// Shards that have forgotten messages, each with the last position that it knows.
    pub gaps: Vec<(Shard, Option<LogPosition>)>,
}

impl Answer {
    /// Creates an answer without shards.
    pub fn new(assignment: Arc<Assignment>, round: u64) -> Self {
        Self { assignment, round, knowing: Vec::new(), gaps: Vec::new() }
    }
}
