//! The steps of a run, and the strategy that generates them.

use proptest::prelude::*;

use super::ground::{MASTERS, NODES, READERS, USERS};

/// A step. One that does not apply does nothing. Sets of masters are bit sets.
#[derive(Debug, Clone)]
pub enum Step {
    /// Time passes.
    Wait { ms: u64 },
    /// A master becomes unreachable.
    Away { master: usize },
    /// It can be reached again.
    Back { master: usize },
    /// A master accepts calls and executes none of them.
    Stall { master: usize },
    /// It executes them; the callers no longer wait.
    Resume { master: usize },
    /// A replica catches up with its master.
    Replicate { master: usize },
    /// The replica is promoted.
    FailOver { master: usize },
    /// Masters are emptied; connections stay open.
    Emptied { masters: u8 },
    /// A master's clock is set forward.
    Ahead { master: usize, seconds: u64 },
    /// A process reaches all masters but these.
    Cut { node: usize, masters: u8 },
    /// A process receives no answers of these masters.
    Deaf { node: usize, masters: u8 },
    /// As `Cut`, for a dispatcher.
    CutReader { reader: usize, masters: u8 },
    /// A process dies.
    Kill { node: usize },
    /// Another process starts with its name; its machine's clock may be wrong.
    Start { node: usize, clock_s: i64, cut: u8 },
    /// A process drains: its sessions end, and it releases its lease.
    Drain { node: usize },
    /// A process is stopped.
    Freeze { node: usize },
    /// It goes on.
    Thaw { node: usize },
    /// A device connects; the node of its earlier session may be told.
    Connect { user: usize, node: usize, told: bool },
    /// A session ends.
    Disconnect { user: usize },
    /// A message is accepted for a user.
    Message { user: usize },
    /// A dispatcher pushes, perhaps by a cached route.
    Push { user: usize, reader: usize, old: bool },
    /// Turns periodic pushes to all users on or off.
    Traffic { on: bool },
    /// A dispatcher restarts without any memory.
    Fresh { reader: usize },
    /// A dispatcher is stopped.
    FreezeReader { reader: usize },
    /// It goes on.
    ThawReader { reader: usize },
    /// A dispatcher holds back removals.
    HoldRemovals { reader: usize },
    /// It executes them.
    Remove { reader: usize },
}

const TRAFFIC: u32 = 15;

impl Step {
    /// Each run has only some kinds of steps, so that rare combinations become frequent.
    fn kind(&self) -> Option<u32> {
        Some(match self {
            Self::Away { .. } | Self::Back { .. } => 0,
            Self::Stall { .. } | Self::Resume { .. } => 1,
            Self::FailOver { .. } | Self::Replicate { .. } => 2,
            Self::Emptied { .. } => 3,
            Self::Ahead { .. } => 4,
            Self::Cut { .. } => 5,
            Self::Deaf { .. } => 6,
            Self::CutReader { .. } => 7,
            Self::Kill { .. } => 8,
            Self::Drain { .. } => 9,
            Self::Freeze { .. } | Self::Thaw { .. } => 10,
            Self::Fresh { .. } => 11,
            Self::FreezeReader { .. } | Self::ThawReader { .. } => 12,
            Self::HoldRemovals { .. } | Self::Remove { .. } => 13,
            Self::Disconnect { .. } => 14,
            Self::Traffic { .. } => TRAFFIC,
            _ => return None,
        })
    }

    /// Each run has only some nodes, users and dispatchers, for the same reason.
    fn be_of(&mut self, (nodes, users, readers): (usize, usize, usize)) {
        match self {
            Self::Cut { node, .. }
            | Self::Deaf { node, .. }
            | Self::Kill { node }
            | Self::Start { node, .. }
            | Self::Drain { node }
            | Self::Freeze { node }
            | Self::Thaw { node } => *node %= nodes,
            Self::Connect { user, node, .. } => (*user, *node) = (*user % users, *node % nodes),
            Self::Disconnect { user } | Self::Message { user } => *user %= users,
            Self::Push { user, reader, .. } => {
                (*user, *reader) = (*user % users, *reader % readers);
            }
            Self::CutReader { reader, .. }
            | Self::Fresh { reader }
            | Self::FreezeReader { reader }
            | Self::ThawReader { reader }
            | Self::HoldRemovals { reader }
            | Self::Remove { reader } => *reader %= readers,
            _ => {}
        }
    }
}

pub fn steps(count: usize) -> impl Strategy<Value = Vec<Step>> {
    let (master, node) = (0..MASTERS, 0..NODES);
    let (user, reader) = (0..USERS, 0..READERS);
    // All, none, one, or two of them.
    let masters = 0..1_u8 << MASTERS;
    let ms = prop_oneof![
        3 => 500..5_000_u64, 4 => 5_000..20_000_u64, 3 => 20_000..70_000_u64,
        3 => 70_000..200_000_u64,
    ];
    let clock_s = prop_oneof![3 => Just(0), 1 => -3_000..3_000_i64];
    let cut = prop_oneof![3 => Just(0), 1 => masters.clone()];
    let step = prop_oneof![
        20 => ms.prop_map(|ms| Step::Wait { ms }),
        12 => (user.clone(), node.clone(), prop::bool::weighted(0.7))
            .prop_map(|(user, node, told)| Step::Connect { user, node, told }),
        9 => (node.clone(), clock_s, cut)
            .prop_map(|(node, clock_s, cut)| Step::Start { node, clock_s, cut }),
        5 => (user.clone(), reader.clone(), any::<bool>())
            .prop_map(|(user, reader, old)| Step::Push { user, reader, old }),
        2 => any::<bool>().prop_map(|on| Step::Traffic { on }),
        3 => user.clone().prop_map(|user| Step::Message { user }),
        2 => user.prop_map(|user| Step::Disconnect { user }),
        4 => node.clone().prop_map(|node| Step::Kill { node }),
        1 => node.clone().prop_map(|node| Step::Drain { node }),
        3 => node.clone().prop_map(|node| Step::Freeze { node }),
        4 => node.clone().prop_map(|node| Step::Thaw { node }),
        4 => (node.clone(), masters.clone()).prop_map(|(node, masters)| Step::Cut { node, masters }),
        2 => (node, masters.clone()).prop_map(|(node, masters)| Step::Deaf { node, masters }),
        4 => (reader.clone(), masters.clone())
            .prop_map(|(reader, masters)| Step::CutReader { reader, masters }),
        2 => reader.clone().prop_map(|reader| Step::Fresh { reader }),
        1 => reader.clone().prop_map(|reader| Step::FreezeReader { reader }),
        2 => reader.clone().prop_map(|reader| Step::ThawReader { reader }),
        1 => reader.clone().prop_map(|reader| Step::HoldRemovals { reader }),
        2 => reader.prop_map(|reader| Step::Remove { reader }),
        3 => master.clone().prop_map(|master| Step::Away { master }),
        4 => master.clone().prop_map(|master| Step::Back { master }),
        2 => master.clone().prop_map(|master| Step::Stall { master }),
        3 => master.clone().prop_map(|master| Step::Resume { master }),
        3 => master.clone().prop_map(|master| Step::Replicate { master }),
        3 => master.clone().prop_map(|master| Step::FailOver { master }),
        3 => masters.prop_map(|masters| Step::Emptied { masters }),
        1 => (master, 1..100_u64).prop_map(|(master, seconds)| Step::Ahead { master, seconds }),
    ];
    let some = prop_oneof![
        14 => step.prop_map(|step| vec![step]),
        1 => (0..NODES, 31_000..45_000_u64, prop::option::of(0..READERS))
            .prop_map(|(node, ms, fresh)| silence(node, ms, fresh)),
        1 => (0..NODES, 0..READERS, 0..7_u8, 30_000..200_000_u64, any::<bool>())
            .prop_map(|(node, reader, masters, ms, stopped)| parted(node, reader, masters, ms, stopped)),
    ];
    let kinds = prop_oneof![1 => Just(u32::MAX), 4 => any::<u32>()];
    let few = (1..=NODES, prop_oneof![Just(1), Just(2), Just(USERS)], 1..=READERS);
    (kinds, few, prop::collection::vec(some, 1..=count)).prop_map(|(kinds, few, some)| {
        let mut steps = some.concat();
        steps.retain(|step| step.kind().is_none_or(|kind| kinds & (1 << kind) != 0));
        steps.iter_mut().for_each(|step| step.be_of(few));
        if kinds & (1 << TRAFFIC) != 0 {
            steps.insert(0, Step::Traffic { on: true });
        }
        steps
    })
}

/// A process is stopped for longer than its lease is valid, but not long enough to begin another incarnation; a
/// dispatcher may start meanwhile.
fn silence(node: usize, ms: u64, fresh: Option<usize>) -> Vec<Step> {
    let mut steps = vec![Step::Freeze { node }, Step::Wait { ms }];
    steps.extend(fresh.map(|reader| Step::Fresh { reader }));
    steps.extend([Step::Wait { ms: 12_000 }, Step::Thaw { node }]);
    steps
}

/// A partition separates a process from a dispatcher for some time; the process may be stopped when it ends.
fn parted(node: usize, reader: usize, masters: u8, ms: u64, stopped: bool) -> Vec<Step> {
    let others = !masters & 7;
    let mut steps = vec![
        Step::Cut { node, masters },
        Step::CutReader { reader, masters: others },
        Step::Wait { ms },
    ];
    if stopped {
        steps.extend([Step::Freeze { node }, Step::Wait { ms: 35_000 }]);
    }
    steps.extend([
        Step::CutReader { reader, masters: 0 },
        Step::Wait { ms: 12_000 },
        Step::Thaw { node },
    ]);
    steps
}
