//! Readiness as a set of named conditions, each kept true by whoever does the work.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// The conditions of a role; ready when all hold. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<&'static str, Option<String>>>>);

/// One condition. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Condition {
    health: Health,
    name: &'static str,
}

impl Health {
    /// No conditions yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition, which fails as `starting` until it is set.
    pub fn condition(&self, name: &'static str) -> Condition {
        self.0.lock().insert(name, Some("starting".into()));
        Condition { health: self.clone(), name }
    }

    /// The conditions that fail, with their reasons; empty: ready.
    pub fn not_ready(&self) -> Vec<(&'static str, String)> {
        let conditions = self.0.lock();
        conditions.iter().filter_map(|(name, reason)| Some((*name, reason.clone()?))).collect()
    }
}

impl Condition {
    /// It holds.
    pub fn ready(&self) {
        self.set(None);
    }

    /// It fails, and why.
    pub fn failing(&self, reason: impl Into<String>) {
        self.set(Some(reason.into()));
    }

    /// Whether it holds.
    pub fn is_ready(&self) -> bool {
        self.health.0.lock().get(self.name).is_some_and(Option::is_none)
    }

    fn set(&self, state: Option<String>) {
        let Some(old) = self.health.0.lock().insert(self.name, state.clone()) else { return };
        match (&old, &state) {
            (Some(_), None) => tracing::info!(condition = self.name, "condition holds"),
            (None, Some(reason)) => {
                tracing::warn!(condition = self.name, reason, "condition fails");
            }
            _ => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
