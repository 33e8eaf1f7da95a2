//! The lanes to the Redis masters, `calls_per_lane` for each master. A lane is a queue and a task that accepts the
//! messages in it ([`Lane`]). A shard belongs to one lane at a time, so that its messages stay in order.

mod away;
mod batch;
mod event;
mod hand_on;
mod lane;
mod queue;
mod settle;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use barid_core::{LogPosition, Shard};
use tokio::sync::mpsc;

pub use self::away::Away;
pub use self::event::{Answer, Event, Question};
pub use self::hand_on::HandOn;
#[cfg(test)]
pub(crate) use self::hand_on::tests::Nobody;
#[cfg(test)]
pub(crate) use self::lane::tests::record_of;
pub use self::lane::{Lane, Shared};
pub use self::queue::Queue;
pub use self::settle::Outbox;
use crate::flight::{Assignment, Parcel};
use crate::ports::Mailboxes;

/// All lanes, and the assignment of shards to them.
pub struct Lanes<M> {
    shared: Shared<M>,
    queues: Vec<Arc<Queue>>,
    /// The lane of each shard, an index of `queues`.
    by_shard: Vec<usize>,
    /// The lanes of each master, by its number: lanes `calls_per_lane * group` and following.
    groups: Vec<usize>,
}

impl<M: Mailboxes> Lanes<M> {
    /// Starts the lanes of all masters. Call within a runtime.
    pub fn start(shared: Shared<M>) -> Self {
        let (queues, by_shard, groups) = Default::default();
        let mut lanes = Self { shared, queues, by_shard, groups };
        lanes.add_missing();
        let shards = lanes.shared.mailboxes.shards();
        lanes.groups = (0..lanes.queues.len() / lanes.shared.window.calls_per_lane).collect();
        lanes.by_shard = shards.all().map(|shard| lanes.place(shard)).collect();
        lanes
    }

    /// Starts lanes for new masters. The lanes of removed masters stay, and are reused for masters that are added
    /// later.
    fn add_missing(&mut self) {
        while !self.has_all_lanes() {
            let queue: Arc<Queue> = Arc::default();
            let lane = Lane::new(self.shared.clone(), Arc::clone(&queue));
            self.shared.outbox.tasks.spawn("a lane to Redis", lane.run());
            self.queues.push(queue);
        }
    }

    /// Whether there are lanes for all masters.
    fn has_all_lanes(&self) -> bool {
        let masters = self.shared.mailboxes.lanes().max(1);
        self.queues.len() >= masters * self.shared.window.calls_per_lane
    }

    /// Moves shards whose master has changed to the lanes of the new one. A shard whose last move is not complete is
    /// moved by a later call.
    pub fn follow_masters(&mut self) {
        let shards = self.shared.mailboxes.shards();
        // `groups` may be longer: it names masters that were numbered since the lanes were counted.
        let all_known = self.has_all_lanes();
        if all_known && shards.all().all(|shard| self.place(shard) == self.lane_of(shard)) {
            return;
        }
        self.add_missing();
        // Masters may have been renumbered: each keeps the lanes that have most of its shards.
        let per_master = self.shared.window.calls_per_lane;
        let masters: Vec<usize> =
            shards.all().map(|shard| self.shared.mailboxes.lane_of(shard)).collect();
        let now: Vec<usize> = self.by_shard.iter().map(|lane| lane / per_master).collect();
        self.groups = groups(&masters, &now, self.queues.len() / per_master);
        let mut moved = 0;
        for shard in shards.all() {
            let (from, to) = (self.lane_of(shard), self.place(shard));
            if from != to && self.queues[from].redirect(shard, &self.queues[to]) {
                self.by_shard[usize::from(shard.get())] = to;
                moved += 1;
            }
        }
        if moved > 0 {
            tracing::info!(
                shards = moved,
                lanes = self.queues.len(),
                "moved shards to the lanes of their new masters"
            );
        }
    }

    /// The lane for a shard under its current master.
    fn place(&self, shard: Shard) -> usize {
        let per_master = self.shared.window.calls_per_lane;
        let within = usize::from(shard.get()) % per_master;
        let master = self.shared.mailboxes.lane_of(shard);
        // A master that was added since `groups` was made shares the lanes of another one until the next call.
        let group = self.groups.get(master).copied().unwrap_or(master);
        (group * per_master + within) % self.queues.len()
    }

    fn queue(&self, shard: Shard) -> &Queue {
        &self.queues[self.lane_of(shard)]
    }

    fn lane_of(&self, shard: Shard) -> usize {
        self.by_shard[usize::from(shard.get())]
    }

    /// Whether the lanes of all these parcels have room.
    pub fn has_room(&self, parcels: &[Parcel]) -> bool {
        let max = self.shared.window.lane_messages_max;
        parcels.iter().all(|parcel| self.queue(parcel.shard).load() < max)
    }

    /// Queues each parcel in its shard's lane.
    pub fn enqueue(&self, priority: usize, parcels: Vec<Parcel>) {
        for parcel in parcels {
            self.queue(parcel.shard).push(priority, parcel);
        }
    }

    /// Whether the shard's lane holds as many messages as may be queued for an unavailable master.
    pub fn is_laden(&self, shard: Shard) -> bool {
        let window = &self.shared.window;
        // All lanes together use at most half of the window for this.
        let share = window.records_max / (2 * self.queues.len());
        self.queue(shard).load() >= window.away_messages_max.min(share).max(1)
    }

    /// Whether the master of at least one shard is available.
    pub fn some_serve(&self) -> bool {
        self.away().count() < self.by_shard.len()
    }

    /// Asks shards of an assignment for their positions, through their lanes. Returns how many lanes will answer.
    pub fn ask(
        &self,
        assignment: &Arc<Assignment>,
        round: u64,
        shards: impl Iterator<Item = (Shard, Option<LogPosition>)>,
    ) -> usize {
        let mut by_lane: HashMap<usize, Vec<_>> = HashMap::new();
        for (shard, raise) in shards {
            by_lane.entry(self.lane_of(shard)).or_default().push((shard, raise));
        }
        let lanes = by_lane.len();
        for (lane, shards) in by_lane {
            let assignment = Arc::clone(assignment);
            self.queues[lane].ask(Question { assignment, round, shards });
        }
        lanes
    }

    /// Shards whose last call failed.
    pub fn away(&self) -> &Away {
        &self.shared.away
    }

    /// The mailboxes in Redis.
    pub fn mailboxes(&self) -> &M {
        &self.shared.mailboxes
    }

    /// The state that the lanes share.
    pub fn shared(&self) -> &Shared<M> {
        &self.shared
    }

    /// The sender of the lanes' reports.
    pub fn events(&self) -> &mpsc::Sender<Event> {
        &self.shared.events
    }

    /// Closes the queues: each lane ends once its queue is empty.
    pub fn close(self) {
        self.queues.iter().for_each(|queue| queue.close());
    }

    /// Messages in the lanes that are not done.
    #[cfg(test)]
    pub fn load(&self) -> usize {
        self.queues.iter().map(|queue| queue.load()).sum()
    }
}

/// Assigns one of `count` groups of lanes to each master, given the master and the current group of each shard. A
/// master gets the group that has most of its shards, or else one that no other master needs.
fn groups(masters: &[usize], now: &[usize], count: usize) -> Vec<usize> {
    let mut shared: HashMap<(usize, usize), usize> = HashMap::new();
    for (master, group) in masters.iter().zip(now) {
        *shared.entry((*master, *group)).or_default() += 1;
    }
    let mut shared: Vec<((usize, usize), usize)> = shared.into_iter().collect();
    shared.sort_unstable_by_key(|(pair, shards)| (std::cmp::Reverse(*shards), *pair));
    let last = masters.iter().max().map_or(0, |last| last + 1);
    let mut of_master = vec![None; last.max(count)];
    let mut used = HashSet::new();
    for ((master, group), _) in shared {
        if of_master[master].is_none() && used.insert(group) {
            of_master[master] = Some(group);
        }
    }
    let mut free = (0..count).filter(|group| !used.contains(group));
    let of_master = of_master.into_iter().enumerate();
    // There are as many groups as masters, unless one was added just now.
    of_master.map(|(master, group)| group.or_else(|| free.next()).unwrap_or(master)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shards_whose_master_changes_move() {
        // A third master takes shards of both others, and is numbered first.
        assert_eq!(groups(&[0, 1, 1, 0, 2, 2], &[0, 0, 0, 1, 1, 1], 3), [2, 0, 1]);
        // The masters are only renumbered.
        assert_eq!(groups(&[1, 1, 0, 0], &[0, 0, 1, 1], 2), [1, 0]);
        // A master was removed.
        assert_eq!(groups(&[0, 0, 0, 1, 1, 1], &[0, 0, 2, 1, 1, 2], 3), [0, 1, 2]);
        // A master was added since the lanes were counted.
        assert_eq!(groups(&[0, 1, 2], &[0, 1, 1], 2), [0, 1, 2]);
    }
}
