//! Routes in Redis: a tracked connection for L1, and the mailbox for everything else.

use barid_core::{Shard, ShardCount};
use barid_mailbox::{
    DisconnectRequest, Error, Invalidation, Mailbox, RedisTime, Route, TrackedRoutes, UserKey,
};

use crate::resolve::{Resolver, Routes};

/// Access to the routes in Redis.
pub struct RedisRoutes {
    /// For reads that are not tracked, and for removals.
    pub mailbox: Mailbox,
    /// For tracked reads: Redis reports changes of what was read.
    pub tracked: TrackedRoutes,
}

impl Routes for RedisRoutes {
    async fn tracked(&self, user: &UserKey) -> Result<Vec<Route>, Error> {
        self.tracked.get(user).await
    }

    async fn untracked(&self, user: &UserKey) -> Result<Vec<Route>, Error> {
        self.mailbox.read_routes(user).await
    }

    async fn remove(&self, request: DisconnectRequest) -> Result<(), Error> {
        self.mailbox.disconnect(request).await
    }

    fn shard_of(&self, user: &UserKey) -> Shard {
        self.mailbox.shard_of(user)
    }

    fn shards(&self) -> ShardCount {
        self.mailbox.shards()
    }

    fn redis_time(&self, shard: Shard) -> Option<RedisTime> {
        self.mailbox.redis_time(shard)
    }
}

/// Forwards Redis's reports of changes to L1. `report` is called with whether all shards are tracked. Ends when all other
/// clones of `tracked` are dropped.
pub async fn follow_tracking(
    tracked: TrackedRoutes,
    resolver: Resolver<RedisRoutes>,
    mut report: impl FnMut(bool),
) {
    // The resolver holds `tracked`: a strong reference here would keep both alive for ever.
    let listener = resolver.downgrade();
    drop(resolver);
    tracked.on_invalidate(move |invalidation| {
        let Some(listener) = listener.upgrade() else { return };
        match invalidation {
            Invalidation::User(user) => listener.invalidate(&user),
            Invalidation::Shards(shards) => listener.invalidate_shards(&shards),
        }
    });
    let mut tracking = tracked.tracking();
    loop {
        let now = *tracking.borrow_and_update();
        report(now);
        if tracking.changed().await.is_err() {
            return;
        }
    }
}
