//! The cluster under test: started for the measurement, or running already.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use barid_runtime::exposition::Metrics;
use barid_testkit::{Role, http};
use clap::Args;
use tokio::net::lookup_host;

use crate::controller::Agents;
use crate::producer::Plan;
use crate::rpc::ConnectRequest;
use crate::sandbox::{ACK_DELAY_MS, Access, ByRole, PARTITIONS, Sandbox};
use crate::usage::Source;

/// A running cluster. Without `--nodes`, each scenario starts a cluster of its own.
#[derive(Debug, Args)]
#[command(next_help_heading = "Running cluster")]
pub struct ClusterOptions {
    /// Access nodes; users are spread over them.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', env = "BARID_NODES")]
    nodes: Vec<String>,
    /// Kafka.
    #[arg(long, alias = "kafka", value_name = "HOST:PORT", env = "BARID_BROKERS")]
    brokers: Option<String>,
    /// Topic to produce to.
    #[arg(long, default_value = "barid.push")]
    topic: String,
    /// File with trusted root certificates (PEM); connections then use TLS.
    #[arg(long, value_name = "FILE")]
    roots: Option<PathBuf>,
    /// App of the users.
    #[arg(long, default_value = "loadtest", env = "BARID_APP")]
    app: String,
    /// File with the HS256 secret that signs the users' tokens.
    #[arg(long, value_name = "FILE", env = "BARID_SECRET_FILE")]
    secret_file: Option<PathBuf>,
    /// Key id of that secret.
    #[arg(long, value_name = "ID", env = "BARID_KEY_ID")]
    key_id: Option<String>,
    /// Admin addresses of the access nodes, to read memory and CPU time from `/metrics`.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', env = "BARID_ADMIN")]
    admin: Vec<String>,
    /// Process id of the only access node, if it runs on this machine; replaces --admin.
    #[arg(long, conflicts_with = "admin", value_parser = clap::value_parser!(u32).range(1..=4_194_304))]
    pid: Option<u32>,
}

impl ClusterOptions {
    /// Whether a running cluster is named.
    pub fn is_given(&self) -> bool {
        !self.nodes.is_empty()
    }
}

pub enum Target {
    /// A cluster that was started for the measurement.
    Sandbox(Box<Sandbox>),
    /// A cluster that runs already. Only its access nodes can be measured.
    Running(Box<Running>),
}

pub struct Running {
    connect_request: ConnectRequest,
    brokers: Option<String>,
    topic: String,
    usage: Source,
}

impl Target {
    /// Takes the named cluster, or starts one with these access nodes.
    pub async fn start(options: &ClusterOptions, access: Access) -> anyhow::Result<Self> {
        if options.is_given() {
            return Ok(Self::Running(Box::new(Running::new(options).await?)));
        }
        Ok(Self::Sandbox(Box::new(Sandbox::start(access).await?)))
    }

    /// A request that connects to it, without users.
    pub async fn connect_request(&mut self) -> anyhow::Result<ConnectRequest> {
        match self {
            Self::Sandbox(sandbox) => sandbox.connect_request().await,
            Self::Running(running) => Ok(running.connect_request.clone()),
        }
    }

    /// Where the usage of its access nodes is read.
    pub fn usage(&self) -> Source {
        match self {
            Self::Sandbox(sandbox) => Source::Processes(sandbox.access_pids()),
            Self::Running(running) => running.usage.clone(),
        }
    }

    /// The same from `/metrics`, which also counts tasks.
    pub async fn scraped(&mut self) -> anyhow::Result<Source> {
        match self {
            Self::Sandbox(sandbox) => Ok(Source::Scraped(vec![sandbox.admin().await?])),
            Self::Running(running) => Ok(running.usage.clone()),
        }
    }

    /// How to produce to it.
    pub fn plan(&self, payload_bytes: u32, linger_ms: u32) -> anyhow::Result<Plan> {
        match self {
            Self::Sandbox(sandbox) => Ok(sandbox.plan(payload_bytes, linger_ms)),
            Self::Running(running) => {
                let brokers = running.brokers.clone().context("--brokers is missing")?;
                let (topic, app) = (running.topic.clone(), running.connect_request.app.clone());
                Ok(Plan { brokers, topic, app, payload_bytes, linger_ms })
            }
        }
    }

    /// A new topic that Barid does not consume, and its partitions; `None` for a running cluster, whose
    /// Kafka gets no new topics.
    pub async fn unconsumed(&mut self, plan: &Plan) -> anyhow::Result<Option<(Plan, i32)>> {
        match self {
            Self::Sandbox(sandbox) => Ok(Some((sandbox.unconsumed(plan).await?, PARTITIONS))),
            Self::Running(_) => Ok(None),
        }
    }

    /// The metrics of all processes, as text; `None` for a running cluster.
    pub async fn metrics(&mut self) -> anyhow::Result<Option<String>> {
        match self {
            Self::Sandbox(sandbox) => sandbox.metrics().await.map(Some),
            Self::Running(_) => Ok(None),
        }
    }

    /// As [`Sandbox::by_role`]; `None` for a running cluster.
    pub fn by_role(
        &self,
        agents: &Agents,
        figure: impl Fn(u32) -> anyhow::Result<f64>,
    ) -> anyhow::Result<Option<ByRole>> {
        match self {
            Self::Sandbox(sandbox) => sandbox.by_role(agents, figure).map(Some),
            Self::Running(_) => Ok(None),
        }
    }

    /// Waits until every device has acknowledged everything. A running cluster cannot be asked: there this
    /// waits until the devices have sent their acknowledgements.
    pub async fn all_acknowledged(&self, limit: Duration) -> anyhow::Result<()> {
        match self {
            Self::Sandbox(sandbox) => sandbox.all_acknowledged(limit).await,
            Self::Running(_) => {
                tokio::time::sleep(Duration::from_millis(u64::from(ACK_DELAY_MS) + 10)).await;
                Ok(())
            }
        }
    }
}

impl Running {
    async fn new(options: &ClusterOptions) -> anyhow::Result<Self> {
        let file = options.secret_file.as_ref().context("--secret-file is missing")?;
        let secret = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        let secret = secret.trim_ascii_end();
        ensure!(!secret.is_empty(), "{} is empty; it must hold the secret", file.display());
        let roots = options.roots.as_ref().map(|file| {
            std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))
        });
        let usage = match options.pid {
            Some(pid) => Source::Processes(vec![pid]),
            None => match access_admins(&options.admin).await? {
                admins if admins.is_empty() => Source::Unknown,
                admins => Source::Scraped(admins),
            },
        };
        // A wrong address is better found now than during the measurement.
        usage.read().await.context("usage of the access nodes")?;
        let connect_request = ConnectRequest {
            nodes: options.nodes.clone(),
            app: options.app.clone(),
            secret: secret.to_vec(),
            key_id: options.key_id.clone().unwrap_or_default(),
            ack_delay_ms: ACK_DELAY_MS,
            roots: roots.transpose()?.unwrap_or_default(),
            ..Default::default()
        };
        let (brokers, topic) = (options.brokers.clone(), options.topic.clone());
        Ok(Self { connect_request, brokers, topic, usage })
    }
}

/// Those of the admin addresses that belong to access nodes. The list may name other roles, as for
/// `barid top`.
async fn access_admins(names: &[String]) -> anyhow::Result<Vec<SocketAddr>> {
    let mut admins = Vec::new();
    for name in names {
        let found = lookup_host(name).await.with_context(|| name.clone())?.next();
        let address = found.with_context(|| format!("{name} has no address"))?;
        let (_, text) = http::get(address, "/metrics").await?;
        if Metrics::parse(&text).role() == Some(Role::Access.name()) {
            admins.push(address);
        }
    }
    ensure!(names.is_empty() || !admins.is_empty(), "no admin address belongs to an access node");
    Ok(admins)
}
