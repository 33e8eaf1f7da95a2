//! A trial of the promises: a cluster, applications, messages that flow to them, and verbs that
//! harm it; at the end the checker has the word.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use barid_testkit::cluster::{Builder, Business};
use barid_testkit::{Cluster, Role};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::listener::{Listener, Shared};

/// Users who are connected from the beginning; the first has two devices.
const ONLINE: usize = 9;
/// And one who comes when everything has been produced.
const LATECOMER: usize = ONLINE;
/// How long nothing may be shown to anybody before what is owed counts as lost. Longer than a
/// restart of Kafka on a machine that runs other tests as well.
const STANDSTILL: Duration = Duration::from_secs(40);
/// Re-sends of what was shown already would come within it: it is beyond the longest wait between
/// two of them.
const AFTERMATH: Duration = Duration::from_millis(2_500);
/// Faults that are told one by one.
const TOLD_MAX: usize = 50;

/// Two of each role.
pub fn pairs() -> Builder {
    Role::ALL.into_iter().fold(Cluster::builder(), |builder, role| builder.nodes(role, 2))
}

/// See the module.
pub struct Trial {
    pub cluster: Cluster,
    pub books: Shared,
    business: Business,
    listeners: Vec<Listener>,
    chance: StdRng,
    began: Instant,
    /// What was done when, for people.
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
            books: Shared::default(),
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
        let listener = Listener::watched(&self.books, (&node, &url), whose, |m| vec![m])?;
        self.listeners.push(listener);
        Ok(())
    }

    /// Produces `messages` over `time`, by all users' producers at once.
    pub fn flow(&self, messages: usize, time: Duration) -> Flow {
        let users = ONLINE + 1;
        let each = messages / users;
        let mut producers = JoinSet::new();
        for user in 0..users {
            let (business, books) = (self.business.clone(), self.books.clone());
            let mut clock = tokio::time::interval(time / u32::try_from(each).unwrap_or(u32::MAX));
            producers.spawn(async move {
                for number in 0..each {
                    clock.tick().await;
                    say(&business, &books, user, number).await?;
                }
                Ok(())
            });
        }
        Flow { each, task: tokio::spawn(join(producers)) }
    }

    /// A number below `end`, by chance.
    pub fn pick(&mut self, end: usize) -> usize {
        self.chance.random_range(0..end)
    }

    /// Waits between nothing and `longest_ms`, by chance.
    pub async fn pause(&mut self, longest_ms: u64) {
        let pause = self.chance.random_range(0..=longest_ms);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    /// Adds a line to what a failing run tells.
    pub fn tell(&mut self, what: &str) {
        let _ = writeln!(self.story, "{:6.2} s {what}", self.began.elapsed().as_secs_f64());
    }

    /// `kill -9`.
    pub fn kill(&mut self, role: Role, number: usize) -> Result<()> {
        let name = name(role, number);
        self.tell(&format!("kill {name}"));
        self.books.open().harm(&name);
        self.cluster.kill(role, number)
    }

    /// Starts what was killed, and waits until it is ready.
    pub async fn launch(&mut self, role: Role, number: usize) -> Result<()> {
        self.spawn(role, number)?;
        self.cluster.node(role, number).ready().await?;
        self.well(role, number);
        Ok(())
    }

    /// Starts what was killed.
    pub fn spawn(&mut self, role: Role, number: usize) -> Result<()> {
        self.tell(&format!("start {}", name(role, number)));
        self.cluster.spawn(role, number)
    }

    /// The node is ready: from now on its sessions must hold.
    pub fn well(&mut self, role: Role, number: usize) {
        self.tell(&format!("{} is ready", name(role, number)));
        self.books.open().heal(&name(role, number));
    }

    /// Drains a node, as for an upgrade, and starts it again.
    pub async fn restart(&mut self, role: Role, number: usize) -> Result<()> {
        self.tell(&format!("drain {}", name(role, number)));
        self.books.open().harm(&name(role, number));
        self.cluster.restart(role, number).await?;
        self.well(role, number);
        Ok(())
    }

    /// SIGSTOP, for `time`. No session may end of it.
    pub async fn freeze(&mut self, role: Role, number: usize, time: Duration) -> Result<()> {
        self.tell(&format!("stop {} for {time:?}", name(role, number)));
        self.cluster.node(role, number).process()?.stop()?;
        tokio::time::sleep(time).await;
        self.cluster.node(role, number).process()?.cont()
    }

    /// Waits until everything was produced and shown, and asks the checker.
    ///
    /// # Errors
    /// Promises were broken.
    pub async fn finish(&mut self, flow: Flow) -> Result<()> {
        let each = flow.each;
        flow.produced().await?;
        self.tell("everything was produced");
        self.cluster.wait_ready().await?;
        self.listen(LATECOMER, "phone").await?;
        if self.all_shown().await {
            // It all works after as it did before.
            for user in 0..=LATECOMER {
                say(&self.business, &self.books, user, each).await?;
            }
            self.all_shown().await;
            tokio::time::sleep(AFTERMATH).await;
        }
        self.check()
    }

    /// Asks the checker.
    ///
    /// # Errors
    /// Promises were broken.
    pub fn check(&self) -> Result<()> {
        let faults = self.books.open().faults();
        let told: Vec<String> = faults.iter().take(TOLD_MAX).map(ToString::to_string).collect();
        ensure!(faults.is_empty(), "{} faults:\n{}", faults.len(), told.join("\n"));
        Ok(())
    }

    /// Waits until nothing is owed any more; false: nothing comes any more, and something is owed.
    async fn all_shown(&mut self) -> bool {
        let (mut count, mut since) = (0, Instant::now());
        while self.books.open().owed() > 0 && since.elapsed() < STANDSTILL {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = self.books.open().shown_count();
            if now > count {
                (count, since) = (now, Instant::now());
            }
        }
        let owed = self.books.open().owed();
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

/// Messages that businesses keep producing while the test breaks things.
pub struct Flow {
    each: usize,
    task: JoinHandle<Result<()>>,
}

impl Flow {
    /// Whether there are messages to be produced still.
    pub fn runs(&self) -> bool {
        !self.task.is_finished()
    }

    /// Waits until everything was produced.
    ///
    /// # Errors
    /// Kafka did not take a record.
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

/// As the cluster names its nodes.
pub fn name(role: Role, number: usize) -> String {
    format!("{}-{number}", role.name())
}

async fn say(business: &Business, books: &Shared, user: usize, number: usize) -> Result<()> {
    let (user, id) = (format!("u{user}"), format!("u{user}-{number:04}"));
    // From a few bytes, which travel as they are, to some KiB, which are compressed.
    let payload = format!("{id} {}", "barid ".repeat([0, 3, 30, 600][number % 4]));
    let place = business.say(&user, &id, &payload).await?;
    books.open().produced(&user, place, &id, &payload);
    Ok(())
}
