//! A lane: claims the due timers of one Redis master, sends them to dispatchers, and gives back the claims that no
//! dispatcher accepted. An unavailable master delays only its own lane.

use std::sync::Arc;
use std::time::Duration;

use barid_core::{Backoff, Clock as _, DeviceId, Shard, SystemClock};
use barid_mailbox::{
    DeferRequest, DeferWaits, DueDevice, DueUser, Mailbox, NodeTable, Unreached, UserKey,
};
use barid_mesh::DispatchPool;
use barid_runtime::{Shutdown, TraceEvent, Tracer, repeats};
use barid_wire::envelope::{self, Envelope};
use barid_wire::internal::{Resend, ResendDevice, Sampled, Unreachable};
use futures::future::join_all;
use parking_lot::Mutex;
use rand::RngExt as _;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::Metrics;
use crate::schedule::{Polled, Schedule};

/// State shared by all lanes. Cheap to clone.
#[derive(Clone)]
pub struct Lanes {
    /// The mailboxes in Redis.
    pub mailbox: Mailbox,
    /// The dispatchers.
    pub pool: DispatchPool,
    /// The access nodes.
    pub nodes: NodeTable,
    /// The metrics.
    pub metrics: Metrics,
    /// Logs sampled messages.
    pub tracer: Tracer,
    /// The times between re-sends.
    pub retry: Backoff,
    /// Users claimed in one poll.
    pub page_users_max: u32,
    /// Concurrent pages of one lane.
    pub pages_max: usize,
    /// When a claim that is given back is due again.
    pub defer: DeferWaits,
    /// How long after the end of an access node's lease its devices are deferred without asking a dispatcher. After
    /// that, a dispatcher is asked, and removes their routes.
    pub void_after: Duration,
    /// Ends the lanes.
    pub shutdown: Shutdown,
}

/// The state of a lane, for readiness.
#[derive(Debug, Clone)]
pub struct Pulse {
    /// When it last polled, or skipped a poll.
    pub polled: Instant,
    /// Why its master did not answer.
    pub away: Option<String>,
    /// The largest delay of the timers that it claimed last.
    pub late: Duration,
}

/// Polls until draining begins, then finishes its claims. Keeps `pulse` up to date.
pub async fn run(lanes: Lanes, lane: usize, mut schedule: Schedule, pulse: Arc<Mutex<Pulse>>) {
    let mut pages = JoinSet::new();
    while !lanes.shutdown.is_draining() {
        while pages.len() >= lanes.pages_max {
            pages.join_next().await;
        }
        let polled = lanes.poll(lane, &pulse, &mut pages).await;
        let wait = schedule.after(polled);
        tokio::select! {
            () = sleep(wait) => {}
            () = lanes.shutdown.draining() => {}
        }
        while pages.try_join_next().is_some() {}
    }
    while pages.join_next().await.is_some() {}
}

impl Lanes {
    async fn poll(&self, lane: usize, pulse: &Mutex<Pulse>, pages: &mut JoinSet<()>) -> Polled {
        let shards = self.shards_of(lane);
        // Without a dispatcher, a claim would only be given back.
        if shards.is_empty() || !self.pool.any_available() {
            pulse.lock().polled = Instant::now();
            return Polled::None;
        }
        let begun = Instant::now();
        let gone = self.nodes.gone_for_less_than(self.void_after);
        let fired = self.mailbox.fire_past(&shards, self.page_users_max, &self.retry, &gone).await;
        self.metrics.poll_seconds.observe(begun.elapsed().as_secs_f64());
        let mut pulse = pulse.lock();
        pulse.polled = Instant::now();
        match fired {
            Ok(mut due) => {
                pulse.away = None;
                let late_ms = due.iter().map(|user| user.late_ms).max().unwrap_or_default();
                pulse.late = Duration::from_millis(late_ms);
                let users = due.len();
                self.metrics.fired.inc_by(users as u64);
                for user in &due {
                    self.metrics.due_lag.observe(user.late_ms as f64 / 1000.0);
                    self.metrics.deferred_for(Unreached::Void).inc_by(user.put_off.into());
                }
                due.retain(|user| !user.devices.is_empty());
                let polled = match due.len() {
                    _ if users >= self.page_users_max as usize => Polled::Full,
                    // Timers of nodes that are gone do not shorten the next wait.
                    0 => return Polled::None,
                    _ => Polled::Some,
                };
                pages.spawn(self.clone().hand_on(due));
                polled
            }
            Err(error) => {
                let why = error.to_string();
                if pulse.away.is_none()
                    && let Some(repeated) = repeats::due(&why)
                {
                    tracing::warn!(lane, error = why, repeated, "cannot claim timers");
                }
                pulse.away = Some(why);
                self.metrics.poll_failures.inc();
                Polled::Away
            }
        }
    }

    /// The lane's shards, from a random one on, so that several delayers do not begin with the same one.
    fn shards_of(&self, lane: usize) -> Vec<Shard> {
        let all = self.mailbox.shards().all();
        let mut shards: Vec<_> = all.filter(|shard| self.mailbox.lane_of(*shard) == lane).collect();
        if !shards.is_empty() {
            let from = rand::rng().random_range(0..shards.len());
            shards.rotate_left(from);
        }
        shards
    }

    async fn hand_on(self, due: Vec<DueUser>) {
        self.metrics.claims.add(due.len() as i64);
        let claimed = Instant::now();
        let count = due.len();
        let back = join_all(due.into_iter().map(|user| self.resend(user))).await;
        self.metrics.claim_to_answer.observe(claimed.elapsed().as_secs_f64());
        let back: Vec<DeferRequest> = back.into_iter().flatten().collect();
        if !back.is_empty()
            && let Err(error) = self.mailbox.defer(&back, self.defer, &self.retry).await
        {
            let devices: usize = back.iter().map(|request| request.devices.len()).sum();
            self.metrics.defer_failures.inc_by(devices as u64);
            if let Some(repeated) = repeats::due(&error.to_string()) {
                tracing::warn!(%error, devices, repeated, "cannot give claims back");
            }
        }
        self.metrics.claims.sub(count as i64);
    }

    /// Logs a re-send if its message is sampled.
    fn trace(&self, user: &UserKey, device: &DueDevice, sampled: Option<&Sampled>) {
        let Some(Sampled { id, traceparent, produced_at_ms }) = sampled else { return };
        self.tracer.log(TraceEvent {
            hop: "resent",
            traceparent,
            id,
            app: user.app.as_str(),
            user: user.user.as_str(),
            device: device.device.as_str(),
            how: &device.resends.to_string(),
            produced_ms: *produced_at_ms,
            at_us: SystemClock.now_ms() * 1000,
        });
    }

    /// Sends one user's devices to a dispatcher. Returns the claims to give back.
    async fn resend(&self, due: DueUser) -> Option<DeferRequest> {
        let shard = self.mailbox.shard_of(&due.user);
        let samples: Vec<_> = due.devices.iter().map(sampled).collect();
        let devices = due.devices.iter().zip(&samples).map(|(device, sampled)| ResendDevice {
            device: device.device.as_str().to_owned(),
            node: device.session.node.as_str().to_owned(),
            incarnation: device.session.incarnation.0,
            connection: device.session.connection.0,
            number: device.resends,
            sampled: sampled.clone(),
        });
        let resend = Resend {
            app: due.user.app.as_str().to_owned(),
            user: due.user.user.as_str().to_owned(),
            devices: devices.collect(),
        };
        let back = match self.pool.resend(shard, resend).await {
            Ok(unreachable) => unreachable.into_iter().map(|(at, why)| (at, reason(why))).collect(),
            Err(_) => (0..due.devices.len()).map(|at| (at, Unreached::Away)).collect::<Vec<_>>(),
        };
        for (index, (device, sampled)) in due.devices.iter().zip(&samples).enumerate() {
            if !back.iter().any(|(at, _)| *at == index) {
                self.metrics.resends_of(device.resends).inc();
                self.trace(&due.user, device, sampled.as_ref());
            }
        }
        let devices: Vec<(DeviceId, Unreached)> = back
            .into_iter()
            .filter_map(|(index, why)| Some((due.devices.get(index)?.device.clone(), why)))
            .inspect(|(_, why)| self.metrics.deferred_for(*why).inc())
            .collect();
        if devices.is_empty() {
            return None;
        }
        Some(DeferRequest { user: due.user, claimed_score: due.claimed_score, devices })
    }
}

fn reason(why: Unreachable) -> Unreached {
    match why {
        Unreachable::Down => Unreached::Down,
        Unreachable::Full => Unreached::Full,
        Unreachable::Void => Unreached::Void,
        Unreachable::Away => Unreached::Away,
    }
}

/// The message of a re-send, if it is sampled.
fn sampled(device: &DueDevice) -> Option<Sampled> {
    if device.sampled.is_empty() {
        return None;
    }
    let (_, entry) = envelope::decode(device.sampled.clone()).ok()?;
    let Envelope { id, traceparent, produced_at_ms, .. } = entry;
    Some(Sampled { id, traceparent, produced_at_ms })
}
