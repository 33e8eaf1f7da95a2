//! Records through Kafka to the devices of agents, checked there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::ensure;
use tokio::time::{Instant, sleep};

use crate::audit::Audit;
use crate::controller::{Agents, Seen};
use crate::producer::{Business, Pace};

/// How often the agents are asked where what is on its way is bounded by what they have shown, and where
/// it is not.
const LOOK_EVERY: Duration = Duration::from_millis(10);
const LOOK_SELDOM: Duration = Duration::from_millis(250);
/// How long before the first record is due the agents are told when that is; each of them makes a place for
/// every user.
const LEAD: Duration = Duration::from_millis(500);
const LEAD_OF_USER: Duration = Duration::from_micros(10);
/// A repeat would follow closely.
const REPEAT_TIME: Duration = Duration::from_millis(200);

/// Produces, and waits until the agents' devices were shown everything, at most for `settle` after the
/// last record; what is missing then is lost. Tells how many records there were. Agents expect `audit` from here on.
/// `is_fine` looks at every report: [`all_open`], unless devices may be closed.
///
/// # Errors
/// Kafka does not take the records, an agent is gone, or something is not fine.
pub async fn drive(
    agents: &Agents,
    business: &Arc<Business>,
    pace: Pace,
    audit: &Arc<Audit>,
    settle: Duration,
    is_fine: impl Fn(&Seen) -> anyhow::Result<()>,
) -> anyhow::Result<(u64, Seen)> {
    let lead = LEAD + LEAD_OF_USER * u32::try_from(audit.users())?;
    audit.start_in(lead);
    agents.expect(audit).await?;
    ensure!(!audit.early().is_zero(), "the agents were not told of the run in {lead:?}");
    sleep(audit.early()).await;
    let look = if let Pace::Scheduled(_) = pace { LOOK_SELDOM } else { LOOK_EVERY };
    let over = AtomicBool::new(false);
    let producing = async {
        let records = business.produce(pace, audit).await?;
        audit.expect(records);
        over.store(true, Ordering::Relaxed);
        Ok(records)
    };
    let watching = async {
        let mut last = Instant::now();
        loop {
            let is_over = over.load(Ordering::Relaxed);
            let seen = agents.report().await?;
            let settled = seen.shown + seen.passed_over;
            audit.settled_elsewhere(settled);
            is_fine(&seen)?;
            if !is_over {
                last = Instant::now();
            } else if settled >= audit.totals().total || last.elapsed() > settle {
                return Ok(seen);
            }
            sleep(look).await;
        }
    };
    tokio::try_join!(producing, watching)
}

/// No device was closed.
///
/// # Errors
/// Some were.
pub fn all_open(seen: &Seen) -> anyhow::Result<()> {
    ensure!(seen.closed == 0, "{} sessions were closed: {}", seen.closed, seen.why_closed);
    Ok(())
}

/// What became of a run's records, after it was [driven](drive).
///
/// # Errors
/// An agent is gone, or something was not shown once and in order.
pub async fn must_be_clean(agents: &Agents, audit: &Audit) -> anyhow::Result<Seen> {
    sleep(REPEAT_TIME).await;
    let seen = agents.report().await?;
    let outcome = seen.outcome(audit.totals().total);
    ensure!(outcome.is_clean(), "{outcome}");
    Ok(seen)
}
