//! The age of each partition's first unfinished record, which keeps everything behind it from being committed.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use barid_bus::consumer::Partition;
use tokio::time::Instant;

use crate::partitions::Partitions;

/// Tracks the first unfinished records. Ages are as precise as the interval of the calls.
#[derive(Debug, Default)]
pub struct OldestWatch {
    first: HashMap<Partition, (i64, Instant)>,
}

/// The oldest unfinished record.
#[derive(Debug)]
pub struct Oldest {
    /// Its partition.
    pub partition: Partition,
    /// Its offset.
    pub offset: i64,
    /// How long it has been its partition's first unfinished record.
    pub age: Duration,
}

impl OldestWatch {
    /// Returns the oldest record of all partitions; `None`: no record is in flight.
    pub fn look(&mut self, partitions: &Partitions, now: Instant) -> Option<Oldest> {
        self.first.retain(|partition, _| partitions.get(partition).is_some());
        for open in partitions.iter() {
            let partition = &open.assignment.partition;
            let first = open.ledger.committable().filter(|_| open.ledger.open() > 0);
            match (first, self.first.get_mut(partition)) {
                (None, _) => drop(self.first.remove(partition)),
                (Some(offset), Some((known, _))) if *known == offset => {}
                (Some(offset), _) => {
                    self.first.insert(partition.clone(), (offset, now));
                }
            }
        }
        let (partition, (offset, since)) =
            self.first.iter().min_by_key(|(_, (_, since))| *since)?;
        let age = now.saturating_duration_since(*since);
        Some(Oldest { partition: partition.clone(), offset: *offset, age })
    }
}

impl fmt::Display for Oldest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { partition: Partition { topic, number }, offset, age } = self;
        write!(f, "{topic}/{number} offset {offset} has not been finished for {} s", age.as_secs())
    }
}
