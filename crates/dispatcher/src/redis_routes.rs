//! Routes in the real Redis: a tracked connection for L1, the mailbox for everything else.

use barid_mailbox::{DisconnectRequest, Error, Mailbox, RedisTime, Route, TrackedRoutes, UserKey};

use crate::resolve::Routes;

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

    fn lane_of(&self, user: &UserKey) -> usize {
        self.mailbox.lane_of(self.mailbox.shard_of(user))
    }

    fn lanes(&self) -> usize {
        self.mailbox.lanes()
    }

    fn redis_time(&self, user: &UserKey) -> Option<RedisTime> {
        self.mailbox.redis_time(self.mailbox.shard_of(user))
    }
}
