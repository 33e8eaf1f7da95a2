//! What `latency` and `unicast` have in common: how they push, and what the processes spend meanwhile.

use std::time::Duration;

use clap::Args;

use super::Trial;
use crate::live::say;
use crate::target::Target;

/// How it is pushed.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Latency and unicast")]
pub struct PushOptions {
    /// Users, one device each.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub push_users: u32,
    /// Bytes of each payload.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub push_bytes: u32,
    /// How long is measured, seconds; without, 30 for `latency` and 20 for `unicast`.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub push_seconds: Option<u64>,
    /// How long the cluster works before that, seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub push_warmup_seconds: u64,
    /// Messages a second of `latency`.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    pub push_rate: u32,
    /// Messages of `unicast` between Kafka and the devices at once.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub push_window: u64,
    /// How long records of `unicast` wait in the business's producer for others of their batch, ms.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=60_000))]
    pub push_linger_ms: u32,
    /// Says the process ids, and waits so many seconds before it measures, for who wants to attach a
    /// profiler.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    attach_seconds: u64,
}

impl PushOptions {
    /// What is done for how long: with warming up, unless that is left out.
    pub fn phases(&self, seconds: u64) -> Vec<(&'static str, u64)> {
        let phases = [("warming up", self.push_warmup_seconds), ("pushing", seconds)];
        phases.into_iter().filter(|(_, seconds)| *seconds > 0).collect()
    }
}

/// Names the processes and waits, if that is wanted.
///
/// # Errors
/// Standard error is closed.
pub async fn attach(trial: &Trial<'_>, target: &Target) -> std::io::Result<()> {
    let seconds = trial.options.push.attach_seconds;
    if seconds > 0 {
        trial.live.phase("waiting");
        if let Target::Sandbox(sandbox) = target {
            say(&format!("{:?}", sandbox.pids()))?;
        }
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
    Ok(())
}
