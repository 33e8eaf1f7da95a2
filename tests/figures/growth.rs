//! Thousands of users connect and leave, with kills in between, while an hour passes for Redis. Afterwards the
//! processes hold no more than before.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use barid_testkit::cluster::Business;
use barid_testkit::raw::{Raw, TEXT, frame};
use barid_testkit::{Cluster, Role, alone};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const USERS: usize = 10_000;
const WAVES: usize = 20;
const WAVE: usize = USERS / WAVES;
/// The time that passes for Redis in all.
const REDIS_TIME: Duration = Duration::from_secs(3_600);
/// The time to live of mailboxes and routes in Redis, which are confirmed four times in it: those of the first
/// half expire within the second.
const TTL_SECONDS: i64 = 1_200;
/// Longer than any session of the test: a session that has ended is removed from the wheel long before.
const HEARTBEAT_SECONDS: i64 = 300;
/// The time to live of L1. Invalidations remove users within half of it; those that a push looked up just after
/// they had left, and those of a killed node, stay for all of it.
const L1_TTL: Duration = Duration::from_secs(14);
/// The largest number of the latter in each dispatcher after the first wave, which has no kills. Without
/// invalidations there are more than twice as many.
const L1_LEFT: f64 = 0.2 * WAVE as f64;
/// The largest growth of tasks and files since before the first wave. None is measured, except four files of
/// each restarted process, which belong to the test.
const TASKS: f64 = 2.0;
const FILES: f64 = 8.0;
/// The largest growth of resident bytes from the end of the first half to the end of the second, of a process
/// that was not killed; less than 1 MiB is measured.
const MEMORY: f64 = 4.0 * 1024.0 * 1024.0;
/// For a phase of a wave, on a machine that runs other tests as well.
const PATIENCE: Duration = Duration::from_secs(60);

/// Gauges that are 0 when nobody is connected, except for L1.
const HELD: [(Role, &[&str]); 4] = [
    (Role::Purger, &["barid_purger_in_flight_records", "barid_purger_mesh_links_pending_items"]),
    (Role::Dispatcher, &["barid_dispatcher_node_links_pending_items"]),
    (Role::Delayer, &["barid_delayer_claims", "barid_delayer_mesh_links_pending_items"]),
    (
        Role::Access,
        &[
            "barid_access_connections",
            "barid_access_sessions",
            "barid_access_users",
            "barid_access_wheel_entries",
            "barid_access_queued_bytes",
        ],
    ),
];
const L1: &str = "barid_dispatcher_l1_entries";

#[tokio::test(flavor = "multi_thread")]
async fn what_processes_hold_of_users_who_came_and_went_is_given_back() -> Result<()> {
    let _alone = alone().await;
    let cluster = Cluster::builder()
        .pairs()
        .set("redis.ttl_seconds", TTL_SECONDS)
        .set_of(Role::Access, "limits.app_new_users_per_second", 0)
        .set_of(Role::Access, "sync.confirm_interval_seconds", TTL_SECONDS / 4)
        .set_of(Role::Access, "heartbeat.interval_seconds", HEARTBEAT_SECONDS)
        .set_of(Role::Dispatcher, "l1.ttl_seconds", i64::try_from(L1_TTL.as_secs())?)
        .start()
        .await?;
    let business = cluster.business()?;
    let mut growth = Growth { cluster, business };
    let before = growth.levels().await?;
    let keys = growth.keys().await?;
    let mut halves = Vec::new();
    for number in 0..WAVES {
        growth.wave(number).await?;
        if number == 0 {
            growth.left(L1_LEFT, L1_TTL / 2).await?;
        }
        growth.cluster.redis.grow_old(REDIS_TIME / WAVES as u32).await?;
        if number + 1 == WAVES / 2 || number + 1 == WAVES {
            growth.left(f64::INFINITY, PATIENCE).await?;
            halves.push(growth.memory().await?);
        }
    }
    growth.returned(before).await?;
    for (process, bytes) in &halves[0] {
        let grown = halves[1][process] - bytes;
        ensure!(grown < MEMORY, "{process} grew by {grown} bytes: {halves:?}");
    }
    growth.forgotten(&keys).await
}

struct Growth {
    cluster: Cluster,
    business: Business,
}

/// A gauge of a process: a value of it, or a bound.
#[derive(Debug)]
struct Gauge {
    role: Role,
    number: usize,
    name: &'static str,
    value: f64,
}

/// Upper bounds of each process's gauges while nobody is connected.
fn held(l1: f64) -> Vec<Gauge> {
    let zero =
        HELD.into_iter().flat_map(|(role, names)| names.iter().map(move |name| (role, *name, 0.0)));
    let bounds = zero.chain([(Role::Dispatcher, L1, l1)]);
    bounds
        .flat_map(|(role, name, value)| [0, 1].map(|number| Gauge { role, number, name, value }))
        .collect()
}

impl Growth {
    /// Users connect to both nodes, receive a message each and leave, one in three without a Close frame. During
    /// some waves a process is killed.
    async fn wave(&mut self, number: usize) -> Result<()> {
        let users = number * WAVE..(number + 1) * WAVE;
        let victim = match number % (WAVES / 2) {
            2 => Some(Role::Purger),
            4 => Some(Role::Dispatcher),
            6 => Some(Role::Delayer),
            8 => Some(Role::Access),
            _ => None,
        };
        let nodes = [self.address(0).await?, self.address(1).await?];
        let there = self.come(&nodes, users).await?;
        if number == 0 {
            self.come_in(there.len()).await?;
        }
        if let Some(role) = victim {
            self.cluster.kill(role, 1)?;
            if role != Role::Access {
                self.cluster.spawn(role, 1)?;
            }
        }
        let mut visits = JoinSet::new();
        for (user, session) in there {
            let here = victim != Some(Role::Access) || at(user) == 0;
            let (token, business) = (self.token(user), self.business.clone());
            let visit = Visit { user, session, token, business };
            visits.spawn(timeout(PATIENCE, async move {
                match here {
                    true => visit.go().await,
                    // Half of them reconnect to the other node, half do not.
                    false if (visit.user / 20).is_multiple_of(2) => {
                        visit.elsewhere(nodes[0]).await?.go().await
                    }
                    false => visit.business.send_text(&name(visit.user), "m", "").await.map(|_| ()),
                }
            }));
        }
        while let Some(visited) = visits.join_next().await {
            visited?.context("a visit takes too long")??;
        }
        if victim == Some(Role::Access) {
            self.cluster.spawn(Role::Access, 1)?;
        }
        self.cluster.wait_ready().await
    }

    /// Connects these users. Some of them leave before they are welcomed.
    async fn come(
        &mut self,
        nodes: &[SocketAddr; 2],
        users: Range<usize>,
    ) -> Result<Vec<(usize, Raw)>> {
        const AT_ONCE: usize = 100;
        let (mut coming, mut there) = (JoinSet::new(), Vec::new());
        for user in users {
            let (node, token) = (nodes[at(user)], self.token(user));
            coming.spawn(timeout(PATIENCE, async move {
                let stream = TcpStream::connect(node).await?;
                if user % 10 == 9 {
                    Raw::unanswered(stream, &token).await?;
                    return anyhow::Ok(None);
                }
                Ok(Some((user, Raw::session(stream, &token).await?)))
            }));
            if coming.len() >= AT_ONCE {
                there.extend(coming.join_next().await.context("none")????);
            }
        }
        while let Some(came) = coming.join_next().await {
            there.extend(came???);
        }
        Ok(there)
    }

    /// Waits until the gauges count the connected users: otherwise they could not show users that remain.
    async fn come_in(&mut self, users: usize) -> Result<()> {
        let begun = Instant::now();
        loop {
            let mut seen = [0.0; 2];
            for node in 0..2 {
                for (seen, of) in seen.iter_mut().zip(["users", "wheel_entries"]) {
                    let access = self.cluster.node(Role::Access, node);
                    *seen += access.metric(&format!("barid_access_{of}")).await?;
                }
            }
            if seen.iter().all(|seen| *seen >= users as f64) {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "{users} are connected, {seen:?} are seen");
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until each of these gauges was at its bound or below it once. Not all at the same time: users of a killed
    /// node who never return are claimed again and again.
    async fn fall(&mut self, mut gauges: Vec<Gauge>, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            let mut above = Vec::new();
            for gauge in gauges {
                let value = self.cluster.node(gauge.role, gauge.number).metric(gauge.name).await?;
                if value > gauge.value {
                    above.push((gauge, value));
                }
            }
            if above.is_empty() {
                return Ok(());
            }
            ensure!(
                begun.elapsed() < limit,
                "everybody left, and above their bounds are {above:?}"
            );
            gauges = above.into_iter().map(|(gauge, _)| gauge).collect();
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Waits until nothing is held of any user, except `l1_left` in L1.
    async fn left(&mut self, l1_left: f64, limit: Duration) -> Result<()> {
        self.fall(held(l1_left), limit).await
    }

    /// Waits until tasks and files of each process are as before, and L1 is empty.
    async fn returned(&mut self, before: Vec<Gauge>) -> Result<()> {
        let bounds = before.into_iter().map(|gauge| {
            let more = if gauge.name == "barid_tasks" { TASKS } else { FILES };
            Gauge { value: gauge.value + more, ..gauge }
        });
        self.fall(held(0.0).into_iter().chain(bounds).collect(), PATIENCE).await
    }

    /// Checks that every key of mailboxes and sessions has expired.
    async fn forgotten(&mut self, before: &[String]) -> Result<()> {
        self.cluster.redis.grow_old(Duration::from_secs(2 * TTL_SECONDS.unsigned_abs())).await?;
        let begun = Instant::now();
        loop {
            let mut keys = self.keys().await?;
            // The positions of partitions, which a shard keeps.
            keys.retain(|key| !before.contains(key) && !key.ends_with("}:o"));
            if keys.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                bail!("{} keys are left: {:?}", keys.len(), &keys[..keys.len().min(10)]);
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    async fn keys(&self) -> Result<Vec<String>> {
        self.cluster.redis.query(&["KEYS", "*"]).await
    }

    /// Tasks and open files of each process.
    async fn levels(&mut self) -> Result<Vec<Gauge>> {
        let mut levels = Vec::new();
        for (role, number) in all() {
            for name in ["barid_tasks", "process_open_fds"] {
                let value = self.cluster.node(role, number).metric(name).await?;
                levels.push(Gauge { role, number, name, value });
            }
        }
        Ok(levels)
    }

    /// Resident bytes of the processes that were not killed.
    async fn memory(&mut self) -> Result<BTreeMap<&'static str, f64>> {
        let mut bytes = BTreeMap::new();
        for role in Role::ALL {
            let value = self.cluster.node(role, 0).metric("process_resident_memory_bytes").await?;
            bytes.insert(role.name(), value);
        }
        Ok(bytes)
    }

    async fn address(&mut self, node: usize) -> Result<SocketAddr> {
        self.cluster.node(Role::Access, node).address("ws").await
    }

    fn token(&self, user: usize) -> String {
        self.cluster.token(&name(user))
    }
}

fn all() -> impl Iterator<Item = (Role, usize)> {
    Role::ALL.into_iter().flat_map(|role| [(role, 0), (role, 1)])
}

/// The node of a user.
fn at(user: usize) -> usize {
    user / 10 % 2
}

fn name(user: usize) -> String {
    format!("u{user}")
}

/// A user who is connected.
struct Visit {
    user: usize,
    session: Raw,
    token: String,
    business: Business,
}

impl Visit {
    async fn go(mut self) -> Result<()> {
        self.business.send_text(&name(self.user), "m", "").await?;
        if self.user % 10 == 8 {
            return Ok(()); // leaves before the message arrives, without a Close frame
        }
        self.session.read_until(r#""id":"m""#).await?;
        self.session.send(&frame(TEXT, r#"{"ack":{"seq":1}}"#)).await;
        match self.user % 10 {
            7 => Ok(()), // leaves without a Close frame
            _ => self.session.close().await,
        }
    }

    /// Connects to another node, after the first was killed.
    async fn elsewhere(mut self, node: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(node).await?;
        self.session = Raw::session(stream, &self.token).await?;
        Ok(self)
    }
}
