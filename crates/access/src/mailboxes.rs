//! Calls to the mailboxes in Redis, which are repeated until they are answered, and Redis's time.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_core::{AppId, Backoff, Shard};
use barid_mailbox::{DisconnectRequest, Mailbox, UserKey};

use crate::clock::Clock;
use crate::labels::Call;
use crate::metrics::Metrics;

/// The node's access to mailboxes.
pub struct Mailboxes {
    store: Mailbox,
    clock: Arc<Clock>,
    metrics: Metrics,
    retry: Backoff,
}

impl Mailboxes {
    /// `clock` is used instead of Redis's time until Redis has answered once.
    pub fn new(store: Mailbox, clock: Arc<Clock>, metrics: Metrics) -> Self {
        let retry = Backoff::new(Duration::from_millis(100), Duration::from_secs(5), 0.5)
            .expect("constants in range");
        Self { store, clock, metrics, retry }
    }

    /// The mailbox client, for calls that are made once.
    pub fn store(&self) -> &Mailbox {
        &self.store
    }

    /// Repeats a call to Redis until it is answered. Cancel-safe.
    pub async fn until_answered<T, F>(&self, call: Call, mut make: impl FnMut() -> F) -> T
    where
        F: Future<Output = Result<T, barid_mailbox::Error>>,
    {
        let mut failures = 0;
        loop {
            match make().await {
                Ok(answer) => return answer,
                Err(error) => {
                    tracing::debug!(call = call.as_str(), %error, failures, "redis call failed");
                    self.metrics.redis_retry(call);
                    tokio::time::sleep(self.retry.delay(failures)).await;
                    failures = failures.saturating_add(1);
                }
            }
        }
    }

    /// Removes the route of a session that has ended. Gives up after `limit`: the next push along the route leads to
    /// another attempt.
    pub async fn disconnect(&self, request: DisconnectRequest, limit: Duration) {
        let call = self.until_answered(Call::Disconnect, || self.store.disconnect(request.clone()));
        if tokio::time::timeout(limit, call).await.is_err() {
            tracing::debug!("cannot remove route: redis is unavailable");
        }
    }

    /// A lower estimate of Redis's time at a user's shard, ms since the Unix epoch.
    pub fn now_ms(&self, user: &UserKey) -> u64 {
        let shard = self.store.shard_of(user);
        self.store.redis_now_ms(shard).unwrap_or_else(|| self.clock.now_ms())
    }

    /// The best estimate of Redis's time at a user's shard, µs since the Unix epoch.
    pub fn now_us(&self, user: &UserKey) -> u64 {
        self.shard_now_us(self.store.shard_of(user))
    }

    /// The best estimate of Redis's time at the shard of a group, or of everyone of an app, µs since the Unix epoch.
    pub fn audience_now_us(&self, app: &AppId, mailbox: &str) -> u64 {
        self.shard_now_us(self.store.shard_of_audience(app, mailbox))
    }

    fn shard_now_us(&self, shard: Shard) -> u64 {
        let time = self.store.redis_time(shard);
        time.map_or_else(|| self.clock.now_ms() * 1000, |time| time.us(Instant::now()))
    }
}
