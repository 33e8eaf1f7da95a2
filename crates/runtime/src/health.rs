//! Readiness, as a set of named conditions, which the code that does the work sets. A lapsing condition has to be
//! renewed: it fails by silence alone, so that a loop that hangs or a task that is gone does not look healthy.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGaugeVec, Opts};
use tokio::time::{MissedTickBehavior, interval};

use tracing::Span;

use crate::Shutdown;

const DRAINING: &str = "draining";

/// The conditions of a role, which is ready if all hold. Cheap to clone. As a collector it is the metric
/// `barid_ready{condition}`: 1 if the condition holds, otherwise 0.
#[derive(Debug, Clone)]
pub struct Health(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Not ready while it drains: the condition `draining`.
    shutdown: Shutdown,
    /// Names the role in the lines about its conditions, where a process has several roles.
    span: Span,
    conditions: Mutex<BTreeMap<&'static str, State>>,
    metric: IntGaugeVec,
}

#[derive(Debug)]
struct State {
    /// The reason if it was set to fail.
    failing: Option<String>,
    lapse: Option<Lapse>,
    /// If it fails, only a restart helps.
    vital: bool,
    /// Whether it held when it was last logged.
    held: bool,
}

#[derive(Debug)]
struct Lapse {
    /// The event that has to happen, a noun: `poll`.
    deed: &'static str,
    within: Duration,
    last: Instant,
}

/// One condition. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Condition {
    health: Health,
    name: &'static str,
}

impl Health {
    /// Creates a set with the condition `draining`, which holds until `shutdown` begins.
    pub fn new(shutdown: Shutdown) -> Self {
        Self::within(shutdown, Span::none())
    }

    /// As [`Self::new`]; changes of conditions are logged within `span`.
    pub fn within(shutdown: Shutdown, span: Span) -> Self {
        let opts = Opts::new("barid_ready", "Whether a condition of readiness holds: 1 or 0");
        let metric = IntGaugeVec::new(opts, &["condition"]).expect("constants in range");
        Self(Arc::new(Inner { shutdown, span, conditions: Mutex::default(), metric }))
    }

    /// Adds a condition. It fails as `starting` until it is set, and stays as it is set.
    pub fn condition(&self, name: &'static str) -> Condition {
        self.add(name, None)
    }

    /// Adds a lapsing condition. It fails as `starting` until it is set, and also when it is not renewed for longer
    /// than `within` (`no poll for 12 s`, where `deed` is `poll`).
    pub fn lapsing(&self, name: &'static str, deed: &'static str, within: Duration) -> Condition {
        self.add(name, Some(Lapse { deed, within, last: Instant::now() }))
    }

    fn add(&self, name: &'static str, lapse: Option<Lapse>) -> Condition {
        let state = State { failing: Some("starting".into()), lapse, vital: false, held: false };
        self.0.conditions.lock().insert(name, state);
        Condition { health: self.clone(), name }
    }

    /// The failing conditions with their reasons; empty if the role is ready.
    pub fn not_ready(&self) -> Vec<(&'static str, String)> {
        self.not_ready_at(Instant::now())
    }

    /// The failing conditions that only a restart solves.
    pub fn dying(&self) -> Vec<(&'static str, String)> {
        let now = Instant::now();
        let conditions = self.0.conditions.lock();
        let vital = conditions.iter().filter(|(_, state)| state.vital);
        vital.filter_map(|(name, state)| Some((*name, state.reason(now)?))).collect()
    }

    fn not_ready_at(&self, now: Instant) -> Vec<(&'static str, String)> {
        let mut conditions = self.0.conditions.lock();
        let failing = conditions.iter_mut().filter_map(|(name, state)| {
            let reason = state.reason(now);
            state.log_change(name, reason.as_deref(), &self.0.span);
            Some((*name, reason?))
        });
        let draining = self.0.shutdown.is_draining();
        failing.chain(draining.then(|| (DRAINING, "the process is draining".into()))).collect()
    }
}

impl Collector for Health {
    fn desc(&self) -> Vec<&Desc> {
        self.0.metric.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let now = Instant::now();
        for (name, state) in &*self.0.conditions.lock() {
            let holds = i64::from(state.reason(now).is_none());
            self.0.metric.with_label_values(&[name]).set(holds);
        }
        let holds = i64::from(!self.0.shutdown.is_draining());
        self.0.metric.with_label_values(&[DRAINING]).set(holds);
        self.0.metric.collect()
    }
}

impl State {
    /// Why it fails; `None`: it holds.
    fn reason(&self, now: Instant) -> Option<String> {
        if self.failing.is_some() {
            return self.failing.clone();
        }
        let lapse = self.lapse.as_ref()?;
        let silence = now.saturating_duration_since(lapse.last);
        let seconds = silence.as_secs();
        (silence > lapse.within).then(|| format!("no {} for {seconds} s", lapse.deed))
    }

    /// Logs a change of the condition.
    fn log_change(&mut self, name: &str, reason: Option<&str>, span: &Span) {
        match (self.held, reason) {
            (false, None) => tracing::info!(parent: span, condition = name, "condition holds"),
            (true, Some(reason)) => {
                tracing::warn!(parent: span, condition = name, reason, "condition fails");
            }
            _ => return,
        }
        self.held = reason.is_none();
    }
}

impl Condition {
    /// The condition's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Marks it as one that only a restart solves if it fails. It holds at first.
    #[must_use]
    pub fn vital(self) -> Self {
        if let Some(state) = self.health.0.conditions.lock().get_mut(self.name) {
            state.vital = true;
        }
        self.ready();
        self
    }

    /// Removes the condition, when the code that renews it ends as planned.
    pub fn retire(&self) {
        let mut conditions = self.health.0.conditions.lock();
        conditions.remove(self.name);
        // Under the lock, because collecting the metrics sets the label again. Fails if it was never collected.
        let _ = self.health.0.metric.remove_label_values(&[self.name]);
    }

    /// Sets the condition to hold, and renews it.
    pub fn ready(&self) {
        self.set(None);
    }

    /// Sets the condition to fail, with a reason, until [`Self::ready`] is called.
    pub fn failing(&self, reason: impl Into<String>) {
        self.set(Some(reason.into()));
    }

    /// Why it fails; `None`: it holds.
    pub fn reason(&self) -> Option<String> {
        let conditions = self.health.0.conditions.lock();
        conditions.get(self.name).and_then(|state| state.reason(Instant::now()))
    }

    /// Whether it holds.
    pub fn is_ready(&self) -> bool {
        self.reason().is_none()
    }

    /// Calls `ask` every `every`, and sets the condition by its result; an error is the reason for failing. Never
    /// returns.
    pub async fn probe<E: Display, F: Future<Output = Result<(), E>>>(
        self,
        every: Duration,
        mut ask: impl FnMut() -> F,
    ) {
        let mut turn = interval(every);
        turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            turn.tick().await;
            match ask().await {
                Ok(()) => self.ready(),
                Err(error) => self.failing(error.to_string()),
            }
        }
    }

    fn set(&self, failing: Option<String>) {
        let now = Instant::now();
        let mut conditions = self.health.0.conditions.lock();
        let Some(state) = conditions.get_mut(self.name) else { return };
        if let Some(lapse) = state.lapse.as_mut().filter(|_| failing.is_none()) {
            lapse.last = now;
        }
        state.failing = failing;
        let reason = state.reason(now);
        state.log_change(self.name, reason.as_deref(), &self.health.0.span);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn ready_when_every_condition_holds() {
        let health = Health::new(Shutdown::new());
        let (kafka, redis) = (health.condition("kafka"), health.condition("redis"));
        assert_eq!(health.not_ready().len(), 2);
        kafka.ready();
        redis.ready();
        assert!(health.not_ready().is_empty());
        redis.failing("no answer for 3 s");
        assert_eq!(health.not_ready(), [("redis", "no answer for 3 s".to_owned())]);
        assert!(kafka.is_ready() && !redis.is_ready());
    }

    #[test]
    fn silence_fails_what_lapses_and_a_word_mends_it() {
        let health = Health::new(Shutdown::new());
        let poll = health.lapsing("consumer", "poll", 10 * SECOND);
        assert_eq!(health.not_ready(), [("consumer", "starting".to_owned())]);
        poll.ready();
        let now = Instant::now();
        assert!(health.not_ready_at(now + 9 * SECOND).is_empty());
        let lapsed = health.not_ready_at(now + 12 * SECOND);
        assert_eq!(lapsed, [("consumer", "no poll for 12 s".to_owned())]);
        poll.failing("fenced");
        assert_eq!(health.not_ready(), [("consumer", "fenced".to_owned())]);
        poll.ready();
        assert!(health.not_ready().is_empty());
    }

    #[test]
    fn only_what_is_vital_asks_for_a_restart() {
        let health = Health::new(Shutdown::new());
        let (redis, tasks) = (health.condition("redis"), health.condition("tasks").vital());
        assert!(!redis.is_ready() && tasks.is_ready() && health.dying().is_empty());
        tasks.failing("one ended");
        assert_eq!(health.dying(), [("tasks", "one ended".to_owned())]);
    }

    #[test]
    fn the_metric_says_which_condition_holds() {
        let shutdown = Shutdown::new();
        let health = Health::new(shutdown.clone());
        health.condition("redis").ready();
        health.lapsing("consumer", "poll", SECOND).failing("fenced");
        let value = |name: &str| {
            let family = health.collect().remove(0);
            let named = |m: &&prometheus::proto::Metric| m.get_label()[0].value() == name;
            family.get_metric().iter().find(named).map(|m| m.get_gauge().get_value())
        };
        assert_eq!((value("redis"), value("consumer")), (Some(1.0), Some(0.0)));
        assert_eq!(value("draining"), Some(1.0));
        shutdown.begin(SECOND);
        assert_eq!(value("draining"), Some(0.0));
    }
}
