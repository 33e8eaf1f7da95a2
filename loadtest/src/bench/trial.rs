//! One run of one scenario: agents, the servers that are measured in turn, and who watches.

use std::time::Duration;

use anyhow::Context as _;

use super::options::Options;
use crate::controller::{Agents, Floor};
use crate::live::{Live, say};
use crate::measure::Measure;
use crate::rpc::ConnectRequest;
use crate::sandbox::{Sandbox, Shape};
use crate::target::Target;
use crate::usage::{Taken, Usage};

/// What a scenario works with.
pub struct Trial<'a> {
    /// As given.
    pub options: &'a Options,
    /// Hold the devices; nobody is connected when a scenario begins.
    pub agents: Agents,
    /// Shows and keeps what happens.
    pub live: Live,
}

/// What is measured: the floor, or Barid.
pub enum Server {
    /// The barest program.
    Floor(Box<Floor>),
    /// A cluster.
    Barid(Target),
}

impl Server {
    /// How agents connect to it; nothing is said about users.
    ///
    /// # Errors
    /// It is gone.
    pub async fn way(&mut self) -> anyhow::Result<ConnectRequest> {
        match self {
            Self::Floor(floor) => Ok(floor.way()),
            Self::Barid(target) => target.way().await,
        }
    }

    /// What it takes now; `None`: it is not known.
    ///
    /// # Errors
    /// It is gone.
    pub async fn taken(&self) -> anyhow::Result<Option<Taken>> {
        self.usage()?.now().await
    }

    /// What it takes now, for a scenario that measures nothing else.
    ///
    /// # Errors
    /// It is gone, or nobody can be asked.
    pub async fn must_know(&self) -> anyhow::Result<Taken> {
        self.taken()
            .await?
            .context("what the access nodes take is not known: give --admin or --pid")
    }

    fn usage(&self) -> anyhow::Result<Usage> {
        match self {
            Self::Floor(floor) => Ok(Usage::Processes(vec![floor.pid()])),
            Self::Barid(target) => target.usage(),
        }
    }
}

/// The same of both; no floor: it was not wanted.
pub struct Both<T> {
    /// Of the floor.
    pub floor: Option<T>,
    /// Of Barid.
    pub barid: T,
}

impl<T> Both<T> {
    /// A row of the table.
    pub fn row(&self, measure: &str, unit: &str, of: impl Fn(&T) -> f64) -> Measure {
        Measure::new(measure, unit, self.floor.as_ref().map(&of), of(&self.barid))
    }

    /// A row of the table, if it is known.
    pub fn row_if(
        &self,
        measure: &str,
        unit: &str,
        of: impl Fn(&T) -> Option<f64>,
    ) -> Option<Measure> {
        let floor = self.floor.as_ref().and_then(&of);
        of(&self.barid).map(|barid| Measure::new(measure, unit, floor, barid))
    }
}

impl<'a> Trial<'a> {
    /// Starts the agents.
    ///
    /// # Errors
    /// One does not start or cannot be reached.
    pub async fn start(options: &'a Options, scenario: &str) -> anyhow::Result<Self> {
        let agents = Agents::start(&options.agents, options.local_agents.into()).await?;
        // Agents that run already may hold what an earlier scenario left.
        agents.drop_all().await?;
        let live = Live::start(scenario, agents.watch());
        Ok(Self { options, agents, live })
    }

    /// Measures the floor, then Barid.
    ///
    /// # Errors
    /// One of them could not be measured.
    pub async fn both<T>(
        &mut self,
        measure: impl AsyncFn(&mut Trial<'a>, &mut Server) -> anyhow::Result<T>,
    ) -> anyhow::Result<Both<T>> {
        let mut floor = None;
        if !self.options.no_floor {
            let mut server = self.floor().await?;
            floor = Some(measure(self, &mut server).await.context("the floor")?);
        }
        let mut server = self.barid().await?;
        Ok(Both { floor, barid: measure(self, &mut server).await? })
    }

    /// Starts the floor, which is measured from now on.
    ///
    /// # Errors
    /// It does not start.
    pub async fn floor(&self) -> anyhow::Result<Server> {
        let server = Server::Floor(Box::new(Floor::start(self.options.floor_address).await?));
        self.live.server("floor", server.usage()?);
        Ok(server)
    }

    /// Starts a cluster, or takes the one that is named; it is measured from now on.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn barid(&self) -> anyhow::Result<Server> {
        let server = Server::Barid(Target::start(&self.options.target).await?);
        self.live.server("barid", server.usage()?);
        Ok(server)
    }

    /// Starts a cluster whose access node is spoken to over TLS; it is measured from now on.
    ///
    /// # Errors
    /// It does not come up, or another cluster was named.
    pub async fn barid_over_tls(&self) -> anyhow::Result<Server> {
        anyhow::ensure!(
            !self.options.target.is_given(),
            "it is measured with a cluster of its own"
        );
        let sandbox = Sandbox::of(Shape { access_nodes: 1, tls: true }).await?;
        let server = Server::Barid(Target::Sandbox(Box::new(sandbox)));
        self.live.server("barid", server.usage()?);
        Ok(server)
    }

    /// The same, watched through its admin endpoints, which count tasks as well.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn barid_with_tasks(&self) -> anyhow::Result<Server> {
        let mut target = Target::start(&self.options.target).await?;
        let usage = target.scraped().await?;
        self.live.server("barid", usage);
        Ok(Server::Barid(target))
    }

    /// Waits, and says what for.
    pub async fn settle(&self, seconds: u64) {
        self.live.phase("settling");
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    /// Names the processes and waits, if that is wanted.
    ///
    /// # Errors
    /// Standard error is closed.
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
