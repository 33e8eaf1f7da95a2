//! Routes in the real Redis: a tracked connection for L1, the mailbox for everything else.

use barid_core::{Shard, ShardCount};
use barid_mailbox::{
    DisconnectRequest, Error, Invalidation, Mailbox, RedisTime, Route, TrackedRoutes, UserKey,
};

use crate::resolve::{Resolver, Routes};

/// Both ways to the routes.
pub struct RedisRoutes {
    /// Ordinary reads, and removals.
    pub mailbox: Mailbox,
    /// Reads that Redis remembers, to report changes.
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

    fn redis_time(&self, user: &UserKey) -> Option<RedisTime> {
        self.mailbox.redis_time(self.mailbox.shard_of(user))
    }
}

/// Hands on to L1 what Redis reports; `told` hears whether it does so for every shard. Ends with the last
/// other hold of `tracked`.
pub async fn follow_tracking(
    tracked: TrackedRoutes,
    resolver: Resolver<RedisRoutes>,
    mut told: impl FnMut(bool),
) {
    // The resolver reads through `tracked`: holding it here would keep both for ever.
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
        told(now);
        if tracking.changed().await.is_err() {
            return;
        }
    }
}
