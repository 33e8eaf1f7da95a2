//! A trial of the promises: a cluster, applications, messages that flow to them, and faults that a test causes.
//! At the end the audit finds every broken promise.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use barid_testkit::cluster::{Builder, Business};
use barid_testkit::{Cluster, Role};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::listener::{Listener, SharedAudit};

/// Users who are connected from the beginning. The first one has two devices.
const ONLINE: usize = 9;
/// The user who connects after everything was produced.
const LATECOMER: usize = ONLINE;
/// After this time without a delivery, missing messages count as lost. Longer than a restart of Kafka on a machine
/// that runs other tests as well.
const STANDSTILL: Duration = Duration::from_secs(40);
/// Time for re-sends of messages that were shown already: longer than the longest wait between two re-sends.
const AFTERMATH: Duration = Duration::from_millis(2_500);
/// The largest number of faults that are printed.
const TOLD_MAX: usize = 50;

/// A running trial.
pub struct Trial {
    pub cluster: Cluster,
    pub audit: SharedAudit,
    business: Business,
    listeners: Vec<Listener>,
    chance: StdRng,
    began: Instant,
    /// Events of the trial so far, printed if it fails.
    story: String,
}

impl Trial {
    /// Starts the cluster and connects the devices, spread over its access nodes.
    pub async fn start(cluster: Builder) -> Result<Self> {
        let mut trial = Self::with_phones_only(cluster).await?;
        trial.listen(0, "tablet").await?;
        trial.listeners[ONLINE].connected().await?;
        Ok(trial)
    }

    /// As [`Trial::start`], with one device for each user.
    pub async fn with_phones_only(cluster: Builder) -> Result<Self> {
        let cluster = cluster.start().await?;
        let seed = match std::env::var("BARID_SEED") {
            Ok(seed) => seed.parse()?,
            Err(_) => rand::random(),
        };
        let mut trial = Self {
            business: cluster.business()?,
            cluster,
            audit: SharedAudit::default(),
            listeners: Vec::new(),
            chance: StdRng::seed_from_u64(seed),
            began: Instant::now(),
            story: format!("BARID_SEED={seed}\n"),
        };
        for user in 0..ONLINE {
            trial.listen(user, "phone").await?;
        }
        for listener in &trial.listeners {
            listener.connected().await?;
        }
        Ok(trial)
    }

    async fn listen(&mut self, user: usize, device: &str) -> Result<()> {
        let number = self.listeners.len() % self.cluster.count(Role::Access);
        let (node, url) = (name(Role::Access, number), self.cluster.url(number).await?);
        let whose = (&*format!("u{user}"), device);
        let listener = Listener::watched(&self.audit, (&node, &url), whose, |m| vec![m])?;
        self.listeners.push(listener);
        Ok(())
    }

    /// Produces `messages` over `time`, by all users' producers at once.
    pub fn flow(&self, messages: usize, time: Duration) -> Flow {
        let users = ONLINE + 1;
        let each = messages / users;
        let mut producers = JoinSet::new();
        for user in 0..users {
            let (business, audit) = (self.business.clone(), self.audit.clone());
            let mut clock = tokio::time::interval(time / u32::try_from(each).unwrap_or(u32::MAX));
            producers.spawn(async move {
                for number in 0..each {
                    clock.tick().await;
                    say(&business, &audit, user, number).await?;
                }
                Ok(())
            });
        }
        Flow { each, task: tokio::spawn(join(producers)) }
    }

    /// A random number below `end`.
    pub fn pick(&mut self, end: usize) -> usize {
        self.chance.random_range(0..end)
    }

    /// Waits for a random time of at most `longest_ms`.
    pub async fn pause(&mut self, longest_ms: u64) {
        let pause = self.chance.random_range(0..=longest_ms);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    /// Adds a line to what a failing trial prints.
    pub fn tell(&mut self, what: &str) {
        let _ = writeln!(self.story, "{:6.2} s {what}", self.began.elapsed().as_secs_f64());
    }

    /// `kill -9`.
    pub fn kill(&mut self, role: Role, number: usize) -> Result<()> {
        let name = name(role, number);
        self.tell(&format!("kill {name}"));
        self.audit.lock().harm(&name);
        self.cluster.kill(role, number)
    }

    /// Starts a killed node, and waits until it is ready.
    pub async fn launch(&mut self, role: Role, number: usize) -> Result<()> {
        self.spawn(role, number)?;
        self.cluster.node(role, number).ready().await?;
        self.well(role, number);
        Ok(())
    }

    /// Starts a killed node.
    pub fn spawn(&mut self, role: Role, number: usize) -> Result<()> {
        self.tell(&format!("start {}", name(role, number)));
        self.cluster.spawn(role, number)
    }

    /// The node is ready: its sessions must not end from now on.
    pub fn well(&mut self, role: Role, number: usize) {
        self.tell(&format!("{} is ready", name(role, number)));
        self.audit.lock().heal(&name(role, number));
    }

    /// Drains and restarts a node, as in an upgrade.
    pub async fn restart(&mut self, role: Role, number: usize) -> Result<()> {
        self.tell(&format!("drain {}", name(role, number)));
        self.audit.lock().harm(&name(role, number));
        self.cluster.restart(role, number).await?;
        self.well(role, number);
        Ok(())
    }

    /// SIGSTOP, for `time`. No session may end because of it.
    pub async fn freeze(&mut self, role: Role, number: usize, time: Duration) -> Result<()> {
        self.tell(&format!("stop {} for {time:?}", name(role, number)));
        self.cluster.node(role, number).process()?.stop()?;
        tokio::time::sleep(time).await;
        self.cluster.node(role, number).process()?.cont()
    }

    /// Waits until everything was produced and shown, and audits the run.
    ///
    /// # Errors
    /// Returns an error if promises were broken.
    pub async fn finish(&mut self, flow: Flow) -> Result<()> {
        let each = flow.each;
        flow.produced().await?;
        self.tell("everything was produced");
        self.cluster.wait_ready().await?;
        self.listen(LATECOMER, "phone").await?;
        if self.all_shown().await {
            // Everything works as before.
            for user in 0..=LATECOMER {
                say(&self.business, &self.audit, user, each).await?;
            }
            self.all_shown().await;
            tokio::time::sleep(AFTERMATH).await;
        }
        self.check()
    }

    /// Audits the run.
    ///
    /// # Errors
    /// Returns an error if promises were broken.
    pub fn check(&self) -> Result<()> {
        let faults = self.audit.lock().faults();
        let told: Vec<String> = faults.iter().take(TOLD_MAX).map(ToString::to_string).collect();
        ensure!(faults.is_empty(), "{} faults:\n{}", faults.len(), told.join("\n"));
        Ok(())
    }

    /// Waits until no message is missing. Returns false if some are missing and deliveries have stopped.
    async fn all_shown(&mut self) -> bool {
        let (mut count, mut since) = (0, Instant::now());
        while self.audit.lock().missing_count() > 0 && since.elapsed() < STANDSTILL {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = self.audit.lock().shown_count();
            if now > count {
                (count, since) = (now, Instant::now());
            }
        }
        let owed = self.audit.lock().missing_count();
        self.tell(&format!("{count} were shown, {owed} are owed"));
        owed == 0
    }
}

impl Drop for Trial {
    #[expect(clippy::print_stderr, reason = "the harness captures what tests print")]
    fn drop(&mut self) {
        eprintln!("{}", self.story);
    }
}

/// Messages that are produced while the test causes faults.
pub struct Flow {
    each: usize,
    task: JoinHandle<Result<()>>,
}

impl Flow {
    /// Whether there are more messages to produce.
    pub fn runs(&self) -> bool {
        !self.task.is_finished()
    }

    /// Waits until everything was produced.
    ///
    /// # Errors
    /// Returns an error if Kafka did not store a record.
    pub async fn produced(self) -> Result<()> {
        self.task.await?
    }
}

async fn join(mut producers: JoinSet<Result<()>>) -> Result<()> {
    while let Some(done) = producers.join_next().await {
        done??;
    }
    Ok(())
}

/// The name of a node.
pub fn name(role: Role, number: usize) -> String {
    format!("{}-{number}", role.name())
}

async fn say(business: &Business, audit: &SharedAudit, user: usize, number: usize) -> Result<()> {
    let (user, id) = (format!("u{user}"), format!("u{user}-{number:04}"));
    // From a few bytes, which are not compressed, to some KiB, which are.
    let payload = format!("{id} {}", "barid ".repeat([0, 3, 30, 600][number % 4]));
    let place = business.send_text(&user, &id, &payload).await?;
    audit.lock().produced(&user, place, &id, &payload);
    Ok(())
}
