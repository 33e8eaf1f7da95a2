//! How long L1 resolves to a route that is no longer: real routes in a real Redis that change all
//! the time, and somebody who knows when each change was answered. `make l1` prints the exact figures
//! of a longer run; here the bound is generous, because other tests run beside it.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that is also a measurement")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use barid_core::{AppId, Attempt, ConnectionId, DeviceId, Incarnation, NodeId, SessionRef, UserId};
use barid_dispatcher::metrics::Metrics;
use barid_dispatcher::resolve::{Limits, Lookup, Resolver};
use barid_dispatcher::{RedisRoutes, follow_tracking};
use barid_mailbox::{
    ConnectOutcome, ConnectRequest, DisconnectRequest, Mailbox, RedisConfig, Route, TrackedRoutes,
    UserKey,
};
use barid_runtime::SecretUrl;
use barid_testkit::Redis;
use prometheus::Registry;
use tokio::time::{Instant, sleep};

const USERS: u64 = 1_000;
/// Devices that reconnect at once.
const STORMING: u64 = 32;
/// Lookups a second, as purgers' batches make them.
const LOOKUPS_PER_S: f64 = 20_000.0;
/// On a machine that runs other tests. The goal is 100 ms.
const P99_MAX: Duration = Duration::from_secs(1);
/// A change that is not seen for so long never will be.
const LOST: Duration = Duration::from_secs(15);

#[derive(Clone)]
struct Bed {
    mailbox: Mailbox,
    resolver: Resolver<RedisRoutes>,
    over: Arc<AtomicBool>,
    /// Loads by who watches the changes: lookups would have made them otherwise.
    loads: Arc<AtomicU64>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_20_a_changed_route_leaves_l1_soon_also_in_a_storm_of_reconnects() {
    let seconds = std::env::var("BARID_L1_SECONDS").map_or(3, |text| text.parse().unwrap());
    let redis = Redis::start().await.unwrap();
    let config = RedisConfig {
        url: SecretUrl::new(redis.url()),
        response_timeout_ms: 30_000,
        ..Default::default()
    };
    let mailbox = Mailbox::open(&config, &Registry::new()).await.unwrap();
    let tracked = TrackedRoutes::open(&config).await.unwrap();
    let routes = Arc::new(RedisRoutes { mailbox: mailbox.clone(), tracked: tracked.clone() });
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let limits = Limits {
        bytes_max: 64 << 20,
        // An hour, so that nothing but a report makes it forget; and no load is given up here.
        ttl: Duration::from_secs(3_600),
        load_timeout: Duration::from_secs(30),
        away: Duration::from_millis(1),
    };
    let resolver = Resolver::new(routes, limits, metrics);
    let (told, mut tracking) = tokio::sync::watch::channel(false);
    tokio::spawn(follow_tracking(tracked, resolver.clone(), move |now| {
        told.send_replace(now);
    }));
    tracking.wait_for(|now| *now).await.unwrap();

    let bed = Bed { mailbox, resolver, over: Arc::default(), loads: Arc::default() };
    let storm: Vec<_> = (0..STORMING).map(|n| tokio::spawn(reconnect(bed.clone(), n))).collect();
    let lookups = tokio::spawn(look_up(bed.clone()));
    sleep(Duration::from_secs(seconds)).await;
    bed.over.store(true, Ordering::Relaxed);
    let mut stale = Vec::new();
    for task in storm {
        stale.extend(task.await.unwrap());
    }
    let (hits, asked) = lookups.await.unwrap();
    report(stale, hits, asked + bed.loads.load(Ordering::Relaxed), seconds);
}

fn report(mut stale: Vec<Duration>, hits: u64, lookups: u64, seconds: u64) {
    stale.sort();
    let at = |share: f64| stale[((stale.len() - 1) as f64 * share) as usize];
    let hit_rate = hits as f64 / lookups as f64;
    println!(
        "L1 over {} changes of routes, {} a second, of {USERS} users: stale for p50 {:.2} ms, p99 {:.2} \
         ms, max {:.2} ms; hit rate {:.1} % of {lookups} lookups",
        stale.len(),
        stale.len() as u64 / seconds,
        at(0.5).as_secs_f64() * 1e3,
        at(0.99).as_secs_f64() * 1e3,
        at(1.0).as_secs_f64() * 1e3,
        hit_rate * 100.0,
    );
    assert!(stale.len() > 100 && lookups > 100, "it measured nothing");
    assert!(at(0.99) <= P99_MAX, "stale for {:?} at p99", at(0.99));
    assert!(hit_rate > 0.1, "L1 serves nobody: {hit_rate}");
}

/// Some users' devices connect again and again, and at times go away. Returns for how long L1 still
/// gave the old route after each change had been answered.
async fn reconnect(bed: Bed, first: u64) -> Vec<Duration> {
    let mut stale = Vec::new();
    for number in 1.. {
        for user in (first..USERS).step_by(STORMING as usize) {
            if bed.over.load(Ordering::Relaxed) {
                return stale;
            }
            let session = change(&bed, user, number).await;
            stale.push(stale_for(&bed, user, session.as_ref()).await);
        }
    }
    stale
}

/// Writes a route, or every eighth time removes it; returns what is there once it was answered.
async fn change(bed: &Bed, user: u64, number: u64) -> Option<SessionRef> {
    let device = DeviceId::new("phone").unwrap();
    let request = ConnectRequest {
        user: key(user),
        device: device.clone(),
        session: session(number),
        attempt: Attempt(number),
        platform: "test".into(),
        position: None,
    };
    if number > 1 && (number + user).is_multiple_of(8) {
        let gone = DisconnectRequest { user: key(user), device, session: session(number - 1) };
        bed.mailbox.disconnect(gone).await.unwrap();
        return None;
    }
    let outcome = bed.mailbox.connect(request).await.unwrap();
    assert!(matches!(outcome, ConnectOutcome::Connected { .. }), "{outcome:?}");
    Some(session(number))
}

async fn stale_for(bed: &Bed, user: u64, there: Option<&SessionRef>) -> Duration {
    let (answered, mut seen) = (Instant::now(), Duration::ZERO);
    loop {
        let asked = answered.elapsed();
        let routes = match bed.resolver.look(&key(user)) {
            Lookup::Hit(routes) => routes,
            loading => {
                bed.loads.fetch_add(1, Ordering::Relaxed);
                loading.routes().await.unwrap()
            }
        };
        if routes.first().map(|route: &Route| &route.session) == there {
            return seen;
        }
        seen = asked.max(Duration::from_nanos(1));
        assert!(seen < LOST, "{user} is at {there:?} and L1 says {routes:?}");
        tokio::task::yield_now().await;
    }
}

/// Messages to all users. Returns how many lookups L1 answered, of how many.
async fn look_up(bed: Bed) -> (u64, u64) {
    let (began, mut hits, mut asked) = (Instant::now(), 0, 0);
    while !bed.over.load(Ordering::Relaxed) {
        let due = (began.elapsed().as_secs_f64() * LOOKUPS_PER_S) as u64;
        while asked < due {
            asked += 1;
            // Any step that shares no factor with the number of users.
            let lookup = bed.resolver.look(&key(asked * 7_919 % USERS));
            hits += u64::from(matches!(lookup, Lookup::Hit(_)));
        }
        sleep(Duration::from_millis(1)).await;
    }
    (hits, asked)
}

fn key(user: u64) -> UserKey {
    let name = format!("user-{user}");
    UserKey { app: AppId::new("demo").unwrap(), user: UserId::new(&name).unwrap() }
}

fn session(number: u64) -> SessionRef {
    let node = NodeId::new("access-1").unwrap();
    SessionRef { node, incarnation: Incarnation(1), connection: ConnectionId(number) }
}
