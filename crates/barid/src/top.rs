//! `barid top`: the live state of a running cluster.

mod line;
mod problems;
mod sample;
mod scrape;
mod screen;
mod show;

use std::io::{self, IsTerminal as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use barid_mailbox::{Mailbox, RedisConfig};
use barid_runtime::exit;
use futures::future::join_all;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};

use crate::output::{Coded, Output, span};
use crate::state::DevState;
use crate::values::{self, RedisArgs};
use sample::{Leases, Memory, Sample};
use scrape::{ScrapeError, Unread};
use screen::Screen;
use show::View;

/// The default admin ports of the roles: purger, dispatcher, delayer, access.
const USUAL: [&str; 4] = ["127.0.0.1:7102", "127.0.0.1:7092", "127.0.0.1:7112", "127.0.0.1:7082"];
/// For reading the leases.
const LEASES_LIMIT: Duration = Duration::from_secs(2);
/// The width of output that goes to no terminal.
const COLUMNS: usize = 80;

/// Options of `barid top`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Admin endpoints of roles, comma-separated or repeated [default: those of the running `barid dev`, else
    /// the default ports of this machine]
    #[arg(long, value_name = "HOST:PORT", env = "BARID_ADMIN", value_delimiter = ',')]
    #[arg(value_parser = values::host_port)]
    pub admin: Vec<String>,
    #[command(flatten)]
    pub redis: RedisArgs,
    /// Refresh interval
    #[arg(long, default_value = "1s", value_parser = values::duration)]
    pub interval: Duration,
    /// Print one sample and exit; the exit code is 4 if no endpoint answers
    #[arg(long)]
    pub once: bool,
}

/// Which endpoints to read.
struct Places {
    /// Endpoints that were given. An endpoint that does not answer is a problem.
    named: Vec<String>,
    /// Endpoints that may exist.
    usual: &'static [&'static str],
    redis: Option<RedisConfig>,
    mailbox: Option<Mailbox>,
}

/// Shows samples until Ctrl-C, or one.
pub async fn run(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let mut places = Places::of(&args)?;
    let mut memory = Memory::default();
    let mut looks = interval(args.interval.max(Duration::from_millis(100)));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let every = span(args.interval.as_millis() as u64);
    if args.once {
        looks.tick().await;
        places.look(&mut memory).await;
        looks.tick().await;
        let sample = places.look(&mut memory).await;
        if sample.roles.is_empty() && !out.is_json() {
            let said = sample.problems.iter().map(|one| format!("{}: {}", one.of, one.problem));
            bail!(Coded::away(said.collect::<Vec<_>>().join("; ")));
        }
        print(&sample, &every, out)?;
        return Ok(ExitCode::from(if sample.roles.is_empty() { exit::AWAY } else { exit::DONE }));
    }
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let screen = (!out.is_json() && io::stdout().is_terminal()).then(Screen::open).transpose()?;
    let mut keys = screen.as_ref().map(Screen::keys);
    let mut resized = signal(SignalKind::window_change())?;
    let mut samples = sampling(places, memory, looks);
    let showing = async {
        let (mut view, mut last) = (View::default(), None);
        loop {
            if let Some(screen) = &screen {
                screen.draw(last.as_ref(), &every, &mut view, out)?;
            }
            let pressed = async {
                match &mut keys {
                    Some(keys) => keys.recv().await,
                    None => None,
                }
            };
            tokio::select! {
                Some(key) = pressed => {
                    if view.press(key) {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
                _ = resized.recv() => {}
                sample = samples.recv() => {
                    let sample = sample.context("the task that reads the endpoints has ended")?;
                    if screen.is_none() {
                        print(&sample, &every, out)?;
                    }
                    last = Some(sample);
                }
            }
        }
    };
    tokio::select! {
        ended = showing => ended,
        _ = interrupt.recv() => Ok(ExitCode::SUCCESS),
        _ = terminate.recv() => Ok(ExitCode::SUCCESS),
    }
}

/// Takes a sample at each tick, in a task of its own: a key that is pressed neither waits for a sample nor begins it anew.
fn sampling(mut places: Places, mut memory: Memory, mut looks: Interval) -> mpsc::Receiver<Sample> {
    let (taken, samples) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            looks.tick().await;
            let sample = places.look(&mut memory).await;
            if taken.send(sample).await.is_err() {
                return;
            }
        }
    });
    samples
}

impl Places {
    fn of(args: &Args) -> anyhow::Result<Self> {
        // Endpoints that are given are of another cluster than a running `barid dev`.
        let (named, redis) = match args.admin.as_slice() {
            [] => {
                let dev = DevState::running()?;
                (dev.map(|dev| dev.admin).unwrap_or_default(), args.redis.known()?)
            }
            given => (given.to_vec(), args.redis.given()?),
        };
        let usual: &[&str] = if named.is_empty() { &USUAL } else { &[] };
        Ok(Self { named, usual, redis, mailbox: None })
    }

    /// Reads every endpoint that was given, is in a lease, or has a default port.
    async fn look(&mut self, memory: &mut Memory) -> Sample {
        let leases = self.leases().await;
        let mut addresses = self.named.clone();
        let known = match &leases {
            Leases::Read(nodes) => nodes.as_slice(),
            Leases::Unread(_) | Leases::NoRedis => &[],
        };
        for node in known.iter().filter(|node| !node.admin.is_empty()) {
            if !addresses.contains(&node.admin) {
                addresses.push(node.admin.clone());
            }
        }
        let maybe = self.usual.iter().map(|usual| (*usual).to_owned());
        let maybe: Vec<String> = maybe.filter(|usual| !addresses.contains(usual)).collect();
        let required = addresses.len();
        addresses.extend(maybe);
        let looks = addresses.into_iter().enumerate().map(|(index, address)| async move {
            let look = scrape::scrape(&address).await;
            (index < required || look.is_ok()).then_some((address, look))
        });
        let mut looks: Vec<_> = join_all(looks).await.into_iter().flatten().collect();
        if looks.is_empty() {
            let hint = "nothing answers here; name a role's admin endpoint with --admin HOST:PORT";
            let nowhere = ScrapeError::new(Unread::Nowhere, hint);
            looks.push((self.usual.join(", "), Err(nowhere)));
        }
        memory.take(looks, leases)
    }

    async fn leases(&mut self) -> Leases {
        let Some(config) = &self.redis else { return Leases::NoRedis };
        let reading = async {
            let mailbox = match &self.mailbox {
                Some(mailbox) => mailbox.clone(),
                None => Mailbox::open(config, &barid_runtime::Context::new().metrics).await?,
            };
            let nodes = mailbox.nodes().await?;
            Ok::<_, barid_mailbox::Error>((mailbox, nodes))
        };
        match timeout(LEASES_LIMIT, reading).await {
            Ok(Ok((mailbox, nodes))) => {
                self.mailbox = Some(mailbox);
                Leases::Read(nodes)
            }
            Ok(Err(error)) => Leases::Unread(error.to_string()),
            Err(_) => {
                Leases::Unread(format!("redis does not answer within {} s", LEASES_LIMIT.as_secs()))
            }
        }
    }
}

/// Prints samples one below the other.
fn print(sample: &Sample, every: &str, out: Output) -> io::Result<()> {
    if out.is_json() {
        return out.object(sample);
    }
    let columns = screen::size().map_or(COLUMNS, |(columns, _)| columns);
    for line in show::lines(sample, columns, every, out) {
        out.line(line.trim_end())?;
    }
    Ok(())
}
