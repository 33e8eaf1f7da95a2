//! Kafka to device and back as an acknowledgement, as many as go.

use std::sync::Arc;
use std::time::Duration;

use super::{Goal, Measure, Server, Trial};
use crate::audit::{Audit, SETTLE};
use crate::drive::{drive, must_be_clean};
use crate::producer::{Business, Pace};
use crate::rpc::ConnectRequest;

/// One device each.
const USERS: u32 = 1_000;
const PAYLOAD_BYTES: u32 = 200;
/// How long records wait in the business's producer for others of their batch, ms.
const LINGER_MS: u32 = 5;
/// Messages between Kafka and the devices at once.
const WINDOW: u64 = 20_000;
const WARM_UP: Duration = Duration::from_secs(10);
const TIME: Duration = Duration::from_secs(20);
/// How long the last acknowledgements may take.
const ACKED_LIMIT: Duration = Duration::from_secs(10);

pub async fn measure(trial: &mut Trial<'_>) -> anyhow::Result<Vec<Measure>> {
    let mut server = trial.barid().await?;
    let connect = ConnectRequest { count: USERS, at_once_max: 64, ..server.way().await? };
    let Server::Barid(target) = &server else { anyhow::bail!("no cluster") };
    let business = Business::open(&target.plan(PAYLOAD_BYTES, LINGER_MS)?).await?;
    trial.live.phase("connecting");
    trial.agents.connect(&connect).await?;
    let mut acked_per_s = 0.0;
    for (phase, time) in [("warming up", WARM_UP), ("pushing", TIME)] {
        trial.live.phase(phase);
        let audit = Arc::new(Audit::new(USERS, None));
        let pace = Pace::Window { window: WINDOW, time };
        let (made, _) = drive(&trial.agents, &business, pace, &audit, SETTLE).await?;
        target.all_acknowledged(ACKED_LIMIT).await?;
        let seconds = audit.elapsed().as_secs_f64();
        must_be_clean(&trial.agents, &audit).await?;
        acked_per_s = made.records as f64 / seconds;
    }
    trial.agents.drop_all().await?;
    let row = Measure::new("unicast_acked_per_s", "1/s", None, acked_per_s);
    Ok(vec![row.against(Goal::AtLeast(50_000.0))])
}
