//! Waiting at start-up for Kafka or Redis.

use std::time::Duration;

use barid_core::Backoff;
use tokio::time::sleep;

use crate::{Condition, Context, repeats};

impl Context {
    /// Repeats `attempt` while it fails with an error for which `is_away` is true; `condition` fails with that error
    /// meanwhile. `None`: draining began. An attempt that is under way is never cancelled.
    ///
    /// # Errors
    /// Returns the first other error.
    pub async fn until_there<T, E, F>(
        &self,
        condition: &Condition,
        is_away: impl Fn(&E) -> bool,
        mut attempt: impl FnMut() -> F,
    ) -> Result<Option<T>, E>
    where
        E: std::fmt::Display,
        F: Future<Output = Result<T, E>>,
    {
        let mut failures = 0;
        while !self.shutdown.is_draining() {
            match attempt().await {
                Err(error) if is_away(&error) => {
                    let why = error.to_string();
                    if let Some(repeated) = repeats::due(&why) {
                        tracing::warn!(error = why, repeated, "waiting for {}", condition.name());
                    }
                    condition.failing(why);
                }
                done => return done.map(Some),
            }
            tokio::select! {
                () = sleep(pauses().delay(failures)) => failures = failures.saturating_add(1),
                () = self.shutdown.draining() => {}
            }
        }
        Ok(None)
    }
}

/// The pauses between attempts.
fn pauses() -> Backoff {
    Backoff::new(Duration::from_millis(100), Duration::from_secs(2), 0.3)
        .expect("constants in range")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_away(error: &&str) -> bool {
        *error == "away"
    }

    #[tokio::test]
    async fn waits_for_what_is_away_and_for_nothing_else() {
        let context = Context::new();
        let redis = context.health.condition("redis");
        let mut answers = vec![Ok(7), Err("away"), Err("away")];
        let there =
            context.until_there(&redis, is_away, || std::future::ready(answers.pop().unwrap()));
        assert_eq!(there.await, Ok(Some(7)));
        assert_eq!(context.health.not_ready(), [("redis", "away".to_owned())]);
        let refused = context.until_there(&redis, is_away, || async { Err::<u8, _>("refused") });
        assert_eq!(refused.await, Err("refused"));
    }

    #[tokio::test]
    async fn draining_ends_the_wait() {
        let context = Context::new();
        let redis = context.health.condition("redis");
        let waiting = context.until_there(&redis, is_away, || async { Err::<u8, _>("away") });
        let draining = async { context.shutdown.begin(Duration::from_secs(1)) };
        assert_eq!(tokio::join!(waiting, draining).0, Ok(None));
    }
}
