//! Detects that this process's Kafka client is broken while Kafka itself works. librdkafka can drop all brokers from
//! its list and never reach one again (<https://github.com/confluentinc/librdkafka/issues/5301>); only a new client
//! helps.

use std::time::Duration;

use tokio::time::Instant;

use crate::errands::Errand;

/// How long the client may be without an answer before a new one is tried. Longer than an election and every back-off.
const SILENT_MAX: Duration = Duration::from_secs(60);
/// Time between two trials of a new client.
const RETRY: Duration = Duration::from_secs(10);

/// Watches the outcomes of the client's requests. A request to the controller alone may fail for long while the client
/// works, so records and commits count as answers, too.
#[derive(Default)]
pub struct ClientWatch {
    silent_since: Option<Instant>,
    tried: Option<Instant>,
    trial: Option<Errand<()>>,
}

impl ClientWatch {
    /// Records that a broker answered the client.
    pub fn answered(&mut self) {
        *self = Self::default();
    }

    /// Records that no broker answered a request of the client.
    pub fn failed(&mut self, now: Instant) {
        self.silent_since.get_or_insert(now);
    }

    /// Returns how long the client has had no answer, if a new client gets one. `None`: the client works, or Kafka is
    /// unavailable to a new client as well. `ask` sends a request with a new client.
    pub fn broken(&mut self, now: Instant, ask: impl FnOnce() -> Errand<()>) -> Option<Duration> {
        let silent = now.saturating_duration_since(self.silent_since?);
        if silent < SILENT_MAX {
            return None;
        }
        if self.trial.is_none() && self.tried.is_none_or(|tried| tried + RETRY <= now) {
            (self.tried, self.trial) = (Some(now), Some(ask()));
        }
        Errand::take(&mut self.trial)?.is_ok().then_some(silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use barid_bus::Error;
    use tokio::sync::Notify;
    use tokio::time::sleep;

    const SECOND: Duration = Duration::from_secs(1);

    /// Lets a client be silent for `seconds`. Returns how long it was silent when it was declared broken, and the number
    /// of new clients tried.
    async fn silent(seconds: u64, answer: fn() -> Result<(), Error>) -> (Option<Duration>, u32) {
        let (mut watch, mut tried) = (ClientWatch::default(), 0);
        watch.failed(Instant::now());
        watch.answered();
        for _ in 0..=seconds {
            watch.failed(Instant::now());
            let ask = || {
                tried += 1;
                Errand::new(Box::pin(async move { answer() }), Arc::new(Notify::new()))
            };
            let broken = watch.broken(Instant::now(), ask);
            if broken.is_some() {
                return (broken, tried);
            }
            sleep(SECOND).await;
        }
        (None, tried)
    }

    #[tokio::test(start_paused = true)]
    async fn hazard_84_a_client_that_no_broker_answers_is_broken_if_a_new_one_is_answered() {
        assert_eq!(silent(59, || Ok(())).await, (None, 0), "an election");
        assert_eq!(silent(90, || Ok(())).await, (Some(SECOND * 61), 1));
        let away = || Err(Error::Away("no broker".into()));
        assert_eq!(silent(300, away).await, (None, 25), "Kafka is away for everybody");
    }
}
