//! The cluster that is measured: one that was started for it, or one that runs already.

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
use crate::sandbox::{ACK_DELAY_MS, CpuTimes, PARTITIONS, Sandbox};
use crate::usage::Usage;

/// A cluster that runs already; without nodes, one is started for each scenario.
#[derive(Debug, Args)]
#[command(next_help_heading = "A cluster that runs already")]
pub struct ClusterOptions {
    /// Its access nodes; users are spread over them.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', env = "BARID_NODES")]
    nodes: Vec<String>,
    /// Its Kafka.
    #[arg(long, alias = "kafka", value_name = "HOST:PORT", env = "BARID_BROKERS")]
    brokers: Option<String>,
    /// Topic to produce to.
    #[arg(long, default_value = "barid.push")]
    topic: String,
    /// A file with the certificates (PEM) that its access nodes' certificates go back to; without, they are
    /// spoken to without TLS.
    #[arg(long, value_name = "FILE")]
    roots: Option<PathBuf>,
    /// App of the users.
    #[arg(long, default_value = "loadtest", env = "BARID_APP")]
    app: String,
    /// A file that holds the HS256 secret which signs the users' tokens.
    #[arg(long, value_name = "FILE", env = "BARID_SECRET_FILE")]
    secret_file: Option<PathBuf>,
    /// Which of the cluster's keys it is.
    #[arg(long, value_name = "ID", env = "BARID_KEY_ID")]
    key_id: Option<String>,
    /// Admin addresses of the access nodes: their memory and CPU time are read from `/metrics`.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', env = "BARID_ADMIN")]
    admin: Vec<String>,
    /// The process of the only access node, if it is on this machine, instead of --admin.
    #[arg(long, conflicts_with = "admin", value_parser = clap::value_parser!(u32).range(1..=4_194_304))]
    pid: Option<u32>,
}

impl ClusterOptions {
    /// Whether a cluster is named.
    pub fn is_given(&self) -> bool {
        !self.nodes.is_empty()
    }
}

/// A cluster.
pub enum Target {
    /// Started for a measurement, with one node of each role.
    Sandbox(Box<Sandbox>),
    /// Somebody else's.
    Running(Box<Running>),
}

/// What is known of a cluster that runs already.
pub struct Running {
    way: ConnectRequest,
    brokers: Option<String>,
    topic: String,
    usage: Usage,
}

impl Target {
    /// The one that is named, or a new one.
    ///
    /// # Errors
    /// It does not come up, or too little is known of it.
    pub async fn start(options: &ClusterOptions) -> anyhow::Result<Self> {
        if options.is_given() {
            return Ok(Self::Running(Box::new(Running::of(options).await?)));
        }
        Ok(Self::Sandbox(Box::new(Sandbox::start().await?)))
    }

    /// How agents connect to it; nothing is said about users.
    ///
    /// # Errors
    /// The access node is gone.
    pub async fn way(&mut self) -> anyhow::Result<ConnectRequest> {
        match self {
            Self::Sandbox(sandbox) => sandbox.way().await,
            Self::Running(running) => Ok(running.way.clone()),
        }
    }

    /// What its access nodes take.
    ///
    /// # Errors
    /// The access node is gone.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        match self {
            Self::Sandbox(sandbox) => {
                let pid = sandbox.pids().get("access").copied();
                Ok(Usage::Processes(vec![pid.context("no access node")?]))
            }
            Self::Running(running) => Ok(running.usage.clone()),
        }
    }

    /// The same, from its admin endpoints, where they are known.
    ///
    /// # Errors
    /// The access node is gone.
    pub async fn scraped(&mut self) -> anyhow::Result<Usage> {
        match self {
            Self::Sandbox(sandbox) => Ok(Usage::Scraped(vec![sandbox.admin().await?])),
            Self::Running(running) => Ok(running.usage.clone()),
        }
    }

    /// What to produce to it.
    ///
    /// # Errors
    /// Its Kafka was not named.
    pub fn plan(&self, payload_bytes: u32, linger_ms: u32) -> anyhow::Result<Plan> {
        match self {
            Self::Sandbox(sandbox) => Ok(sandbox.plan(payload_bytes, linger_ms)),
            Self::Running(running) => {
                let brokers = running.brokers.clone();
                let brokers = brokers.context("where is Kafka? Give --brokers")?;
                let Running { topic, way, .. } = &**running;
                let (topic, app) = (topic.clone(), way.app.clone());
                Ok(Plan { brokers, topic, app, payload_bytes, linger_ms })
            }
        }
    }

    /// A topic that nobody consumes, and its partitions; `None`: no topics are made in somebody
    /// else's Kafka.
    ///
    /// # Errors
    /// Kafka does not create it.
    pub async fn unconsumed(&mut self, plan: &Plan) -> anyhow::Result<Option<(Plan, i32)>> {
        match self {
            Self::Sandbox(sandbox) => Ok(Some((sandbox.unconsumed(plan).await?, PARTITIONS))),
            Self::Running(_) => Ok(None),
        }
    }

    /// What all roles' metrics say, as text; `None`: of somebody else's cluster not all are known.
    ///
    /// # Errors
    /// A role does not answer.
    pub async fn metrics(&mut self) -> anyhow::Result<Option<String>> {
        match self {
            Self::Sandbox(sandbox) => sandbox.metrics().await.map(Some),
            Self::Running(_) => Ok(None),
        }
    }

    /// CPU time until now, as [`Sandbox::cpu_times`] has it; `None`: it is somebody else's cluster.
    ///
    /// # Errors
    /// A process is gone.
    pub fn cpu_times(&self, agents: &Agents) -> anyhow::Result<Option<CpuTimes>> {
        match self {
            Self::Sandbox(sandbox) => sandbox.cpu_times(agents).map(Some),
            Self::Running(_) => Ok(None),
        }
    }

    /// Waits until every device has acknowledged everything that it was shown. Of a cluster of its own
    /// the tool asks Redis; elsewhere it waits until the devices have sent it.
    ///
    /// # Errors
    /// Some are left after `limit`.
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
    async fn of(options: &ClusterOptions) -> anyhow::Result<Self> {
        let file = options.secret_file.as_ref();
        let file = file.context("which key signs tokens? Give --secret-file")?;
        let secret = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        let secret = secret.trim_ascii_end();
        ensure!(!secret.is_empty(), "{} is empty; it must hold the secret", file.display());
        let roots = options.roots.as_ref().map(|file| {
            std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))
        });
        let mut admin: Vec<SocketAddr> = Vec::new();
        for name in &options.admin {
            let found = lookup_host(name).await.with_context(|| name.clone())?.next();
            let address = found.with_context(|| format!("{name} has no address"))?;
            let (_, text) = http::get(address, "/metrics").await?;
            // Other roles are named to `barid top` as well.
            if Metrics::parse(&text).role() == Some(Role::Access.name()) {
                admin.push(address);
            }
        }
        ensure!(
            options.admin.is_empty() || !admin.is_empty(),
            "no admin address is an access node's"
        );
        let usage = match options.pid {
            Some(pid) => Usage::Processes(vec![pid]),
            None if admin.is_empty() => Usage::Unknown,
            None => Usage::Scraped(admin),
        };
        // Better now than in the middle of a measurement.
        usage.now().await.context("what the access nodes take")?;
        let way = ConnectRequest {
            nodes: options.nodes.clone(),
            app: options.app.clone(),
            secret: secret.to_vec(),
            key_id: options.key_id.clone().unwrap_or_default(),
            ack_delay_ms: ACK_DELAY_MS,
            roots: roots.transpose()?.unwrap_or_default(),
            ..Default::default()
        };
        let (brokers, topic) = (options.brokers.clone(), options.topic.clone());
        Ok(Self { way, brokers, topic, usage })
    }
}
