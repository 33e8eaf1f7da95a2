//! One run of one scenario: its agents, the servers that are measured in turn, and its live display.

use std::time::Duration;

use anyhow::Context as _;

use super::options::{Options, Scenario};
use crate::controller::{Agents, Floor};
use crate::live::{Live, say};
use crate::measure::Measure;
use crate::rpc::ConnectRequest;
use crate::sandbox::Access;
use crate::target::Target;
use crate::usage::{Source, Usage};

pub struct Trial<'a> {
    pub options: &'a Options,
    /// No device is connected when a scenario begins.
    pub agents: Agents,
    pub live: Live,
    /// Whether the roles of a cluster that is started speak mutual TLS.
    internal_tls: bool,
}

/// The server that is measured.
pub enum Server {
    /// The barest server.
    Floor(Box<Floor>),
    /// A cluster.
    Barid(Target),
}

impl Server {
    /// A request that connects to it, without users.
    pub async fn connect_request(&mut self) -> anyhow::Result<ConnectRequest> {
        match self {
            Self::Floor(floor) => Ok(floor.connect_request()),
            Self::Barid(target) => target.connect_request().await,
        }
    }

    /// Its present usage, if that can be read.
    pub async fn usage(&self) -> anyhow::Result<Option<Usage>> {
        self.source().read().await
    }

    /// Its present usage, for a scenario that measures nothing else.
    pub async fn known_usage(&self) -> anyhow::Result<Usage> {
        let unknown = "memory and CPU time of the access nodes are unknown: set --admin or --pid";
        self.usage().await?.context(unknown)
    }

    fn source(&self) -> Source {
        match self {
            Self::Floor(floor) => Source::Processes(vec![floor.pid()]),
            Self::Barid(target) => target.usage(),
        }
    }
}

/// A result for the floor, unless `--no-floor` is set, and for Barid.
pub struct Both<T> {
    pub floor: Option<T>,
    pub barid: T,
}

impl<T> Both<T> {
    pub fn row(&self, measure: &str, unit: &str, value: impl Fn(&T) -> f64) -> Measure {
        Measure::new(measure, unit, self.floor.as_ref().map(&value), value(&self.barid))
    }

    /// A row, if Barid's value is known.
    pub fn row_if(
        &self,
        measure: &str,
        unit: &str,
        value: impl Fn(&T) -> Option<f64>,
    ) -> Option<Measure> {
        let floor = self.floor.as_ref().and_then(&value);
        value(&self.barid).map(|barid| Measure::new(measure, unit, floor, barid))
    }
}

impl<'a> Trial<'a> {
    pub async fn start(options: &'a Options, scenario: Scenario) -> anyhow::Result<Self> {
        let agents = Agents::start(&options.agents, options.local_agents.into()).await?;
        // Named agents may hold connections of an earlier scenario.
        agents.drop_all().await?;
        let live = Live::start(&scenario.name(), agents.watch());
        let internal_tls = scenario.has_internal_tls(options.internal_tls);
        Ok(Self { options, agents, live, internal_tls })
    }

    /// Measures the floor, then Barid.
    pub async fn both<T>(
        &mut self,
        measure: impl AsyncFn(&mut Trial<'a>, &mut Server) -> anyhow::Result<T>,
    ) -> anyhow::Result<Both<T>> {
        let mut floor = None;
        if !self.options.no_floor {
            let started = Floor::start(self.options.floor_address).await?;
            let mut server = self.measured("floor", Server::Floor(Box::new(started)));
            floor = Some(measure(self, &mut server).await.context("the floor")?);
        }
        let mut server = self.barid().await?;
        Ok(Both { floor, barid: measure(self, &mut server).await? })
    }

    /// A single access node, without TLS towards devices.
    pub fn access(&self) -> Access {
        Access { nodes: 1, tls: false, internal_tls: self.internal_tls, handshakes_max: None }
    }

    /// Takes the named cluster, or starts one with a single access node.
    pub async fn barid(&self) -> anyhow::Result<Server> {
        self.barid_with(self.access()).await
    }

    /// Takes the named cluster, or starts one with these access nodes.
    pub async fn barid_with(&self, access: Access) -> anyhow::Result<Server> {
        let target = Target::start(&self.options.target, access).await?;
        Ok(self.measured("barid", Server::Barid(target)))
    }

    /// As [`Trial::barid`]; the live display reads `/metrics`, which also counts tasks.
    pub async fn barid_with_tasks(&self) -> anyhow::Result<Server> {
        let mut target = Target::start(&self.options.target, self.access()).await?;
        self.live.server("barid", target.scraped().await?);
        Ok(Server::Barid(target))
    }

    /// Fails if a running cluster is named.
    pub fn needs_own_cluster(&self) -> anyhow::Result<()> {
        let is_own = !self.options.target.is_given();
        anyhow::ensure!(is_own, "this scenario needs a cluster of its own; remove --nodes");
        Ok(())
    }

    fn measured(&self, name: &str, server: Server) -> Server {
        self.live.server(name, server.source());
        server
    }

    pub async fn settle(&self, seconds: u64) {
        self.live.phase("settling");
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    /// Prints the process ids and waits for `--attach-seconds`, if set.
    pub async fn attach(&self, target: &Target) -> std::io::Result<()> {
        let seconds = self.options.push.attach_seconds;
        if seconds > 0 {
            self.live.phase("waiting");
            if let Target::Sandbox(sandbox) = target {
                say(&format!("{:?}", sandbox.pids()))?;
            }
            tokio::time::sleep(Duration::from_secs(seconds)).await;
        }
        Ok(())
    }
}
