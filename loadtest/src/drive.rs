//! Sends records through Kafka to the devices of agents, which check every delivery.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::ensure;
use tokio::time::{Instant, sleep};

use crate::audit::{Audit, Start};
use crate::controller::{Agents, Seen};
use crate::producer::{Business, Pace};

/// How often agents report while the number of unacknowledged records is bounded.
const REPORT_INTERVAL: Duration = Duration::from_millis(10);
/// How often agents report on a fixed schedule.
const REPORT_INTERVAL_SCHEDULED: Duration = Duration::from_millis(250);
/// Time from announcing a schedule to the agents until its start; agents allocate state for every user.
const LEAD: Duration = Duration::from_millis(500);
const LEAD_PER_USER: Duration = Duration::from_micros(10);
const LEAD_MAX: Duration = Duration::from_secs(60);
/// Repeats follow closely.
const REPEAT_TIME: Duration = Duration::from_millis(200);

/// Produces records and waits until all of them were delivered, at most for `settle` after the last one;
/// records that are missing then are lost. Returns how many were produced.
///
/// # Errors
/// Fails if Kafka refuses a record, an agent does not answer, or a session is closed.
pub async fn drive(
    agents: &Agents,
    business: &Arc<Business>,
    pace: Pace,
    audit: &Arc<Audit>,
    settle: Duration,
) -> anyhow::Result<u64> {
    let start = announce(agents, audit).await?;
    audit.start(start);
    sleep(start.wait()).await;
    let interval = match pace {
        Pace::Scheduled(_) => REPORT_INTERVAL_SCHEDULED,
        _ => REPORT_INTERVAL,
    };
    let is_produced = AtomicBool::new(false);
    let producing = async {
        let records = business.produce(pace, audit).await?;
        audit.expect(records);
        is_produced.store(true, Ordering::Relaxed);
        Ok(records)
    };
    let watching = async {
        let mut produced_at = Instant::now();
        loop {
            let is_produced = is_produced.load(Ordering::Relaxed);
            let seen = agents.report().await?;
            ensure!(seen.closed == 0, "{} sessions closed: {}", seen.closed, seen.why_closed);
            let settled = seen.shown + seen.passed_over;
            audit.settled_elsewhere(settled);
            if !is_produced {
                produced_at = Instant::now();
            } else if settled >= audit.totals().total || produced_at.elapsed() > settle {
                return Ok(());
            }
            sleep(interval).await;
        }
    };
    let (records, ()) = tokio::try_join!(producing, watching)?;
    Ok(records)
}

/// Tells the agents when the schedule starts. On a busy machine the start may have passed before the last
/// agent knows it: then a later start is announced.
async fn announce(agents: &Agents, audit: &Audit) -> anyhow::Result<Start> {
    let mut lead = LEAD + LEAD_PER_USER * u32::try_from(audit.users())?;
    loop {
        let start = Start::after(lead);
        agents.expect(audit, Some(start)).await?;
        if audit.rate().is_none() || !start.wait().is_zero() {
            return Ok(start);
        }
        lead *= 2;
        ensure!(lead < LEAD_MAX, "agents take more than {:?} to answer", lead / 2);
    }
}

/// Returns what the agents saw of a run after [`drive`].
///
/// # Errors
/// Fails if an agent does not answer, or a record was not delivered exactly once and in order.
pub async fn must_be_clean(agents: &Agents, audit: &Audit) -> anyhow::Result<Seen> {
    sleep(REPEAT_TIME).await;
    let seen = agents.report().await?;
    let outcome = seen.outcome(audit.totals().total);
    ensure!(outcome.is_clean(), "{outcome}");
    Ok(seen)
}
