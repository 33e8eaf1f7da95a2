//! `barid kick`: closes sessions on every access node that has a lease.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use barid_core::{AppId, DeviceId, UserId};
use barid_mailbox::{Mailbox, NodeRecord, NodeRole};
use barid_mesh::{Credentials, Party, dial};
use barid_runtime::exit;
use barid_wire::internal::access_admin_client::AccessAdminClient;
use barid_wire::internal::{KickProgress, KickRequest};
use futures::StreamExt as _;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::confirm::{ConfirmArgs, Step};
use crate::output::{Coded, Output, Tone, clean, span};
use crate::values::{InternalArgs, RedisArgs};

/// After an error without certificates.
const PLAIN_HINT: &str =
    "; if the cluster has internal_tls, give --ca-file, --certificate-file and --key-file";
/// For a node's first answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// For each further answer: a node reports its progress every second.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// Options of `barid kick`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("whom").required(true).multiple(false))]
pub struct Args {
    /// All devices of this user (or one: --device)
    #[arg(long, group = "whom")]
    pub user: Option<UserId>,
    /// All devices of all users of this app
    #[arg(long, value_name = "APP", group = "whom")]
    pub whole_app: Option<AppId>,
    /// All devices of all users of all apps
    #[arg(long, group = "whom")]
    pub everyone: bool,
    /// Only this device of the user
    // clap ignores `requires` if the required option conflicts with a given one.
    #[arg(long, requires = "user", conflicts_with_all = ["whole_app", "everyone"])]
    pub device: Option<DeviceId>,
    /// The user's app [default: demo] [env: BARID_APP]
    // Without clap's `env`: the variable alone would conflict with --everyone.
    #[arg(long, requires = "user", conflicts_with_all = ["whole_app", "everyone"])]
    pub app: Option<AppId>,
    /// Sessions to close per second, in the whole cluster
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub rate: u32,
    /// Reason that is sent to the devices
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub reason: String,
    #[command(flatten)]
    pub confirm: ConfirmArgs,
    #[command(flatten)]
    pub redis: RedisArgs,
    #[command(flatten)]
    pub internal: InternalArgs,
}

#[derive(Debug, Default, Serialize)]
struct Outcome {
    matched: u64,
    closed: u64,
    nodes: BTreeMap<String, NodeOutcome>,
}

#[derive(Debug, Default, Clone, Serialize)]
struct NodeOutcome {
    matched: u64,
    closed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The error is that it does not answer.
    #[serde(skip)]
    is_away: bool,
}

/// Why a node was not asked, or did not finish.
struct Failed {
    text: String,
    is_away: bool,
}

impl Failed {
    fn away(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_away: true }
    }
}

impl From<tonic::Status> for Failed {
    fn from(status: tonic::Status) -> Self {
        // A connection that breaks has any code, and the error of the transport as its source.
        let broke = std::error::Error::source(&status).is_some();
        let text = format!("{}: {}", status.code(), status.message());
        Self { text, is_away: broke || status.code() == tonic::Code::Unavailable }
    }
}

/// Asks all nodes at once. The exit code is 1 if a node refused, otherwise 4 if one could not be asked or broke off.
pub async fn run(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let credentials = args.internal.credentials(&args.redis)?;
    let app = match (&args.user, &args.whole_app) {
        (Some(_), _) => user_app(args.app.as_ref())?.to_string(),
        (None, Some(app)) => app.to_string(),
        (None, None) => String::new(),
    };
    args.redis.needed()?;
    confirm(&args)?;
    let nodes = nodes(&args).await?;
    if nodes.is_empty() {
        anyhow::bail!("no access node has a lease in this Redis");
    }
    let request = KickRequest {
        app,
        user: args.user.as_ref().map(UserId::to_string).unwrap_or_default(),
        device: args.device.as_ref().map(DeviceId::to_string).unwrap_or_default(),
        everyone: args.everyone,
        per_second: 0,
        reason: args.reason,
    };
    let begun = std::time::Instant::now();
    let (told, mut news) = mpsc::channel(64);
    let mut outcome = Outcome::default();
    let mut tasks = Vec::new();
    for (node, per_second) in split(args.rate, &nodes) {
        let id = node.id.to_string();
        outcome.nodes.insert(id.clone(), NodeOutcome::default());
        let request = KickRequest { per_second, ..request.clone() };
        let (credentials, address, told) =
            (credentials.clone(), node.address.clone(), told.clone());
        let of = id.clone();
        let task = tokio::spawn(async move {
            if let Err(mut failed) = kick(&credentials, &address, request, &id, &told).await {
                if failed.is_away && !credentials.is_some() {
                    failed.text += PLAIN_HINT;
                }
                // The receiver is gone once the program ends.
                let _ = told.send((id, Err(failed))).await;
            }
        });
        tasks.push((of, task));
    }
    drop(told);
    while let Some((id, news)) = news.recv().await {
        let node = outcome.nodes.entry(id).or_default();
        match news {
            Ok(progress) => (node.matched, node.closed) = (progress.matched, progress.closed),
            Err(Failed { text, is_away }) => (node.error, node.is_away) = (Some(text), is_away),
        }
    }
    for (id, task) in tasks {
        // A task that panicked has sent nothing.
        if let Err(error) = task.await {
            outcome.nodes.entry(id).or_default().error = Some(error.to_string());
        }
    }
    outcome.matched = outcome.nodes.values().map(|node| node.matched).sum();
    outcome.closed = outcome.nodes.values().map(|node| node.closed).sum();
    let took = span(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
    show(&outcome, &took, out)?;
    Ok(ExitCode::from(outcome.exit_code()))
}

/// Asks where many are concerned.
fn confirm(args: &Args) -> anyhow::Result<()> {
    let rate = args.rate;
    match &args.whole_app {
        Some(app) => args.confirm.ask(&Step {
            given: "--whole-app",
            effect: &format!("closes all sessions of app {app}, {rate} per second"),
            word: app.as_str(),
        }),
        None if args.everyone => args.confirm.ask(&Step {
            given: "--everyone",
            effect: &format!("closes all sessions of all apps, {rate} per second"),
            word: "everyone",
        }),
        None => Ok(()),
    }
}

impl Outcome {
    fn exit_code(&self) -> u8 {
        let mut failed = self.nodes.values().filter(|node| node.error.is_some()).peekable();
        match (failed.peek().is_some(), failed.all(|node| node.is_away)) {
            (false, _) => exit::DONE,
            (true, true) => exit::AWAY,
            (true, false) => exit::FAILED,
        }
    }
}

/// The app of the user: as given, else from the environment, else `demo`.
fn user_app(given: Option<&AppId>) -> anyhow::Result<AppId> {
    if let Some(app) = given {
        return Ok(app.clone());
    }
    let name = std::env::var("BARID_APP").unwrap_or_else(|_| "demo".into());
    Ok(AppId::new(&name).map_err(|error| Coded::config(format!("BARID_APP: {error}")))?)
}

async fn nodes(args: &Args) -> anyhow::Result<Vec<NodeRecord>> {
    let config = args.redis.needed()?;
    let read = async {
        let mailbox = Mailbox::open(&config, &barid_runtime::Context::new().metrics).await?;
        mailbox.nodes().await
    };
    let mut nodes = read.await.with_context(|| format!("cannot read Redis at {}", config.url))?;
    nodes.retain(|node| node.role == NodeRole::Access);
    Ok(nodes)
}

/// Each node's share of the rate, in proportion to its sessions; at least one per second.
fn split(rate: u32, nodes: &[NodeRecord]) -> Vec<(&NodeRecord, u32)> {
    // One more for each, so that a node whose lease says 0 sessions has a share.
    let all: u64 = nodes.iter().map(|node| node.load + 1).sum();
    let share = |node: &NodeRecord| u64::from(rate) * (node.load + 1) / all.max(1);
    nodes.iter().map(|node| (node, u32::try_from(share(node).max(1)).unwrap_or(rate))).collect()
}

type News = (String, Result<KickProgress, Failed>);

async fn kick(
    credentials: &Credentials,
    address: &str,
    request: KickRequest,
    id: &str,
    told: &mpsc::Sender<News>,
) -> Result<(), Failed> {
    let dialed = dial(credentials, Party::Access, address, CONNECT_LIMIT, |endpoint| endpoint);
    let unreachable = |error| Failed::away(format!("cannot be reached: {error}"));
    let mut client = AccessAdminClient::new(dialed.await.map_err(unreachable)?);
    let asked = tokio::time::timeout(CONNECT_LIMIT, client.kick(request)).await;
    let mut stream = asked.map_err(|_| Failed::away("no answer"))??.into_inner();
    loop {
        let next = tokio::time::timeout(SILENCE_LIMIT, stream.next()).await;
        let progress = next
            .map_err(|_| Failed::away("no further answer"))?
            .ok_or_else(|| Failed::away("the node ended the stream"))??;
        let done = progress.done;
        // The receiver is gone once the program ends.
        let _ = told.send((id.to_owned(), Ok(progress))).await;
        if done {
            return Ok(());
        }
    }
}

fn show(outcome: &Outcome, took: &str, out: Output) -> anyhow::Result<()> {
    if out.is_json() {
        return Ok(out.object(outcome)?);
    }
    for (id, node) in &outcome.nodes {
        let counts = format!("{:>8} of {} closed", node.closed, node.matched);
        let error = node.error.as_ref().map(|error| out.paint(Tone::Bad, clean(error)));
        out.line(format_args!("{:<24} {counts}  {}", clean(id), error.unwrap_or_default()))?;
    }
    let sum = format!("{} of {} sessions closed in {took}", outcome.closed, outcome.matched);
    Ok(out.line(out.paint(Tone::Strong, sum))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use barid_core::{Incarnation, NodeId};

    fn node(id: &str, load: u64) -> NodeRecord {
        let id = NodeId::new(id).unwrap();
        NodeRecord { load, ..NodeRecord::new(NodeRole::Access, id, Incarnation(1), "") }
    }

    #[test]
    fn hazard_109_nodes_that_do_not_answer_end_with_4_and_refusals_with_1() {
        let code = |failures: &[Failed]| {
            let nodes = failures.iter().enumerate().map(|(n, failed)| {
                let error = Some(failed.text.clone());
                (
                    n.to_string(),
                    NodeOutcome { error, is_away: failed.is_away, ..Default::default() },
                )
            });
            let well = ("well".to_owned(), NodeOutcome::default());
            Outcome { nodes: nodes.chain([well]).collect(), ..Default::default() }.exit_code()
        };
        let refused = || Failed::from(tonic::Status::permission_denied("not an operator"));
        let gone = || Failed::from(tonic::Status::unavailable("broken pipe"));
        assert_eq!(code(&[]), exit::DONE);
        assert_eq!(code(&[Failed::away("no answer"), gone()]), exit::AWAY);
        assert_eq!(code(&[Failed::away("no answer"), refused()]), exit::FAILED);
    }

    #[test]
    fn nodes_share_the_rate_by_their_sessions() {
        let nodes = [node("a", 2_999), node("b", 999), node("c", 0)];
        let shares = |rate| split(rate, &nodes).into_iter().map(|(_, n)| n).collect::<Vec<_>>();
        assert_eq!(shares(4_001), [3_000, 1_000, 1]);
        assert_eq!(shares(1), [1, 1, 1], "each goes on");
    }
}
