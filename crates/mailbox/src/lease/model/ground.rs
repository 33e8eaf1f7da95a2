//! How many masters, nodes, dispatchers and users there are, where each of them is, and the times that all
//! parts of the model share.

use std::sync::LazyLock;
use std::time::Duration;

use barid_core::{NodeId, Shard, ShardCount};
use tokio::time::Instant;

pub const MASTERS: usize = 3;
pub const NODES: usize = 3;
pub const READERS: usize = 2;
/// One in each shard.
pub const USERS: usize = 6;
pub const SHARDS: usize = USERS;
/// Times are a fifth of what is usual, but for those that are constants.
pub const TTL_MS: u64 = 30_000;
pub const VOID_AFTER: Duration = Duration::from_secs(120);
pub const LAPSE_MS: u64 = 60_000;
pub const REFRESH_MS: u64 = 6_000;
pub const STALE: Duration = Duration::from_secs(28);
/// A silence after which a reader that looked away for `STALE` may hold a process for void.
pub const SILENT_MS: u64 = 120_000 - 28_000;
pub const PACE_MS: u64 = 2_000;
pub const RETRY_BASE_MS: u64 = 2_000;
pub const RETRY_MAX_MS: u64 = 30_000;

pub type Checked = Result<(), String>;

static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
static IDS: LazyLock<Vec<NodeId>> =
    LazyLock::new(|| (0..NODES).map(|node| NodeId::new(&format!("n{node}")).unwrap()).collect());
static ALL: LazyLock<Vec<Shard>> =
    LazyLock::new(|| ShardCount::new(SHARDS as u32).unwrap().all().collect());

pub fn at(now_ms: u64) -> Instant {
    *BEGAN + Duration::from_millis(now_ms)
}

pub fn id(node: usize) -> &'static NodeId {
    &IDS[node]
}

pub fn shard(user: usize) -> Shard {
    ALL[user]
}

pub fn index(shard: Shard) -> usize {
    ALL.iter().position(|it| *it == shard).unwrap()
}

pub fn master_of(user: usize) -> usize {
    user % MASTERS
}

pub fn users_of(master: usize) -> impl Iterator<Item = usize> {
    (master..USERS).step_by(MASTERS)
}

pub fn own_master(node: usize) -> usize {
    node % MASTERS
}
