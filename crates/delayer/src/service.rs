//! Starts the lanes, derives readiness from their state, and drains them.

use std::sync::Arc;
use std::time::Duration;

use barid_core::Backoff;
use barid_mailbox::{DeferWaits, Mailbox, NodeRole, NodeTable};
use barid_mesh::{Credentials, DispatchPool, Party};
use barid_runtime::{Condition, Context, Stopped, Tasks};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use crate::lane::{self, Lanes, Pulse};
use crate::schedule::Schedule;
use crate::{Config, Error, Metrics};

/// How often readiness is updated.
const WATCH_EVERY: Duration = Duration::from_millis(250);

/// A running delayer.
pub struct Service {
    config: Config,
    context: Context,
    lanes: Lanes,
    conditions: Conditions,
    tasks: Tasks,
}

struct Conditions {
    redis: Condition,
    dispatchers: Condition,
    polling: Condition,
}

impl Service {
    /// Connects; waits while Redis is unavailable. `None`: draining began meanwhile.
    ///
    /// # Errors
    /// Redis cannot be used, or the configuration is invalid.
    pub async fn start(config: Config, context: Context) -> Result<Option<Self>, Error> {
        let metrics = Metrics::new(&context.metrics)?;
        let tasks = Tasks::new(&context);
        let conditions = Conditions {
            redis: context.health.condition("redis"),
            dispatchers: context.health.condition("dispatchers"),
            polling: context.progress("polling", "look at the lanes"),
        };
        let open = || Mailbox::open(&config.redis, &context.metrics);
        let is_away = barid_mailbox::Error::is_away;
        let Some(mailbox) = context.until_there(&conditions.redis, is_away, open).await? else {
            return Ok(None);
        };
        let refresh = Duration::from_millis(config.nodes_refresh_ms);
        let table = NodeTable::watch(&mailbox, NodeRole::Dispatcher, refresh);
        let credentials =
            Credentials::read(&config.internal_tls, Party::Delayer).map_err(Error::Config)?;
        tasks.spawn(Credentials::TASK, credentials.keep_fresh(&context)?);
        let mesh = (config.mesh.clone(), metrics.mesh.clone());
        let pool = DispatchPool::new(table, credentials, mesh.0, mesh.1).map_err(Error::Config)?;
        let nodes = NodeTable::watch(&mailbox, NodeRole::Access, refresh);
        let lanes = Lanes {
            retry: config.redis.retry().map_err(|e| Error::Config(e.to_string()))?,
            page_users_max: config.page_users_max,
            pages_max: config.pages_max,
            defer: DeferWaits { base_ms: config.defer_ms, full_ms: config.defer_full_ms },
            void_after: Duration::from_secs(config.void_after_seconds),
            shutdown: context.shutdown.clone(),
            mailbox,
            pool,
            nodes,
            metrics,
            tracer: context.tracer.clone(),
        };
        context.announce_done();
        Ok(Some(Self { config, context, lanes, conditions, tasks }))
    }

    /// Runs until draining begins, then finishes the claims.
    pub async fn work(self) -> Stopped {
        let mut pulses = Vec::new();
        loop {
            // Masters may be added to a cluster.
            for lane in pulses.len()..self.lanes.mailbox.lanes() {
                let pulse = Arc::new(Mutex::new(Pulse {
                    polled: Instant::now(),
                    away: None,
                    late: Duration::ZERO,
                }));
                pulses.push(Arc::clone(&pulse));
                let schedule = self.schedule();
                self.tasks.spawn("a lane", lane::run(self.lanes.clone(), lane, schedule, pulse));
            }
            self.look(&pulses).await;
            tokio::select! {
                () = sleep(WATCH_EVERY) => {}
                () = self.context.shutdown.draining() => break,
            }
        }
        let claims = || u64::try_from(self.lanes.metrics.claims.get()).unwrap_or(0);
        self.tasks.drained("claims", claims).await
    }

    fn schedule(&self) -> Schedule {
        Schedule::new(self.config.poll(), self.config.poll_idle(), reconnecting())
    }

    async fn look(&self, pulses: &[Arc<Mutex<Pulse>>]) {
        let pulses: Vec<Pulse> = pulses.iter().map(|pulse| pulse.lock().clone()).collect();
        match pulses.iter().find_map(|pulse| pulse.away.as_ref()) {
            Some(why) => self.conditions.redis.failing(why),
            None => self.conditions.redis.ready(),
        }
        if self.lanes.pool.any_available() {
            self.conditions.dispatchers.ready();
        } else {
            let why = self.lanes.pool.failure();
            self.conditions.dispatchers.failing(format!("no dispatcher can be reached: {why}"));
        }
        let oldest = pulses.iter().map(|pulse| pulse.polled.elapsed()).max().unwrap_or_default();
        self.lanes.metrics.poll_age_seconds.set(oldest.as_secs() as i64);
        let late = pulses.iter().map(|pulse| pulse.late).max().unwrap_or_default();
        self.lanes.metrics.late_seconds.set(late.as_secs_f64());
        if oldest < self.context.stalled_after {
            self.conditions.polling.ready();
        } else {
            self.conditions.polling.failing(format!("no poll for {} s", oldest.as_secs()));
        }
    }
}

/// The waits before polling an unavailable master again.
fn reconnecting() -> Backoff {
    Backoff::new(Duration::from_millis(100), Duration::from_secs(2), 0.3)
        .expect("constants in range")
}
