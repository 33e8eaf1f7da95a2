//! Readiness as a set of named conditions, each kept true by whoever does the work. A condition that
//! lapses has to be kept true again and again: silence alone fails it, so a loop that hangs, or a
//! task that is gone, cannot look healthy.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGaugeVec, Opts};

/// The conditions of a role; ready when all hold. Cheap to clone. As a collector it is the metric
/// `barid_ready{condition}`: 1 where one holds, else 0.
#[derive(Debug, Clone)]
pub struct Health(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    conditions: Mutex<BTreeMap<&'static str, State>>,
    metric: IntGaugeVec,
}

#[derive(Debug)]
struct State {
    /// Why it was said to fail.
    failing: Option<String>,
    lapse: Option<Lapse>,
    /// Only a restart helps where it fails.
    vital: bool,
    /// Whether the log was told last that it holds.
    held: bool,
}

#[derive(Debug)]
struct Lapse {
    /// What has to happen, a noun: `poll`.
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
    /// No conditions yet.
    pub fn new() -> Self {
        let opts = Opts::new("barid_ready", "Whether a condition of readiness holds: 1 or 0");
        let metric = IntGaugeVec::new(opts, &["condition"]).expect("constants that make sense");
        Self(Arc::new(Inner { conditions: Mutex::default(), metric }))
    }

    /// Adds a condition, which fails as `starting` until it is set, and then stays as it was set.
    pub fn condition(&self, name: &'static str) -> Condition {
        self.add(name, None)
    }

    /// Adds a condition that fails as `starting` until it is set, and again (`no poll for 12 s`, where
    /// `deed` is `poll`) when nobody has said for longer than `within` that it holds.
    pub fn lapsing(&self, name: &'static str, deed: &'static str, within: Duration) -> Condition {
        self.add(name, Some(Lapse { deed, within, last: Instant::now() }))
    }

    fn add(&self, name: &'static str, lapse: Option<Lapse>) -> Condition {
        let state = State { failing: Some("starting".into()), lapse, vital: false, held: false };
        self.0.conditions.lock().insert(name, state);
        Condition { health: self.clone(), name }
    }

    /// The conditions that fail, with their reasons; empty: ready.
    pub fn not_ready(&self) -> Vec<(&'static str, String)> {
        self.not_ready_at(Instant::now())
    }

    /// Those of [`Self::not_ready`] that only a restart helps.
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
            state.tell(name, reason.as_deref());
            Some((*name, reason?))
        });
        failing.collect()
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
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

    /// Logs when it comes to hold, and when it ceases to.
    fn tell(&mut self, name: &str, reason: Option<&str>) {
        match (self.held, reason) {
            (false, None) => tracing::info!(condition = name, "condition holds"),
            (true, Some(reason)) => tracing::warn!(condition = name, reason, "condition fails"),
            _ => return,
        }
        self.held = reason.is_none();
    }
}

impl Condition {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Makes it one that only a restart helps where it fails, and which holds at first.
    #[must_use]
    pub fn vital(self) -> Self {
        if let Some(state) = self.health.0.conditions.lock().get_mut(self.name) {
            state.vital = true;
        }
        self.ready();
        self
    }

    /// Removes the condition: whoever kept it true ends as planned.
    pub fn retire(&self) {
        self.health.0.conditions.lock().remove(self.name);
    }

    /// It holds; one that lapses, from now on.
    pub fn ready(&self) {
        self.set(None);
    }

    /// It fails, and why, until it is said to hold.
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

    fn set(&self, failing: Option<String>) {
        let now = Instant::now();
        let mut conditions = self.health.0.conditions.lock();
        let Some(state) = conditions.get_mut(self.name) else { return };
        if let Some(lapse) = state.lapse.as_mut().filter(|_| failing.is_none()) {
            lapse.last = now;
        }
        state.failing = failing;
        let reason = state.reason(now);
        state.tell(self.name, reason.as_deref());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn ready_when_every_condition_holds() {
        let health = Health::new();
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
        let health = Health::new();
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
        let health = Health::new();
        let (redis, tasks) = (health.condition("redis"), health.condition("tasks").vital());
        assert!(!redis.is_ready() && tasks.is_ready() && health.dying().is_empty());
        tasks.failing("one ended");
        assert_eq!(health.dying(), [("tasks", "one ended".to_owned())]);
    }

    #[test]
    fn the_metric_says_which_condition_holds() {
        let health = Health::new();
        health.condition("redis").ready();
        health.lapsing("consumer", "poll", SECOND).failing("fenced");
        let family = health.collect().remove(0);
        let value = |name: &str| {
            let named = |m: &&prometheus::proto::Metric| m.get_label()[0].value() == name;
            family.get_metric().iter().find(named).map(|m| m.get_gauge().get_value())
        };
        assert_eq!((value("redis"), value("consumer")), (Some(1.0), Some(0.0)));
    }
}
