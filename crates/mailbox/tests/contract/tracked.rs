//! Routes on a tracked connection.

use std::sync::Arc;
use std::time::Duration;

use barid_mailbox::{Invalidation, TrackedRoutes, UserKey};
use barid_testkit::Redis;
use tokio::sync::mpsc;

use crate::support::{Bed, contract, session, until};

contract!(
    a_read_route_is_reported_when_it_changes,
    hazard_20_a_change_is_reported_before_any_later_reply
);

async fn open(bed: &Bed) -> (TrackedRoutes, mpsc::Receiver<Invalidation>) {
    let tracked = TrackedRoutes::open(&bed.config).await.unwrap();
    let (reports, heard) = mpsc::channel(1_000);
    tracked.on_invalidate(move |invalidation| {
        let _full = reports.try_send(invalidation);
    });
    let mut tracking = tracked.tracking();
    tracking.wait_for(|on| *on).await.unwrap();
    (tracked, heard)
}

/// The next report about `user` or its shard.
async fn report(heard: &mut mpsc::Receiver<Invalidation>, user: &UserKey) -> Invalidation {
    let next = async {
        loop {
            match heard.recv().await.unwrap() {
                Invalidation::User(other) if other != *user => {}
                report => return report,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), next).await.expect("a report")
}

async fn a_read_route_is_reported_when_it_changes(bed: Bed) {
    let (tracked, mut heard) = open(&bed).await;
    let user = bed.user("alice");
    assert!(tracked.get(&user).await.unwrap().is_empty());
    bed.connect(&user, "phone", 1).await;
    assert_eq!(report(&mut heard, &user).await, Invalidation::User(user.clone()));
    assert_eq!(tracked.get(&user).await.unwrap()[0].session, session(1));
    // A message changes no route: it reports nothing, and the removal is the next report.
    bed.fill(&user, 1..=1).await;
    bed.disconnect(&user, "phone", 1).await;
    assert_eq!(report(&mut heard, &user).await, Invalidation::User(user.clone()));
    assert!(tracked.get(&user).await.unwrap().is_empty());
}

async fn hazard_20_a_change_is_reported_before_any_later_reply(bed: Bed) {
    let (tracked, mut heard) = open(&bed).await;
    let user = bed.user("alice");
    for n in 1..=50 {
        tracked.get(&user).await.unwrap();
        bed.connect(&user, "phone", n).await;
        // No waiting: the report stands in front of this reply.
        assert_eq!(tracked.get(&user).await.unwrap()[0].session, session(n));
        let reports: Vec<_> = std::iter::from_fn(|| heard.try_recv().ok()).collect();
        assert!(reports.contains(&Invalidation::User(user.clone())), "{n}: {reports:?}");
    }
}

fn everything(bed: &Bed) -> Invalidation {
    Invalidation::Shards(bed.mailbox.shards().all().collect())
}

#[tokio::test]
async fn losing_the_connection_or_all_data_reports_everything() {
    let mut bed = Bed::own(|_| {}).await;
    let (tracked, mut heard) = open(&bed).await;
    let user = bed.user("alice");
    tracked.get(&user).await.unwrap();
    let () = bed.query(&["FLUSHALL"]).await;
    assert_eq!(report(&mut heard, &user).await, everything(&bed));

    let states = Arc::new(tracked.tracking());
    let () = bed.query(&["CLIENT", "KILL", "TYPE", "normal"]).await;
    assert_eq!(report(&mut heard, &user).await, everything(&bed));
    let mut state = (*states).clone();
    state.wait_for(|on| *on).await.unwrap();
    let gone = async || {
        let mut state = (*states).clone();
        tokio::time::timeout(Duration::from_secs(5), state.wait_for(|on| !*on)).await.is_ok()
    };
    // A connection that is open and silent.
    bed.redis().stop().unwrap();
    assert!(gone().await, "noticed by its ping");
    assert!(tracked.get(&user).await.is_err());
    bed.redis().cont().unwrap();
    state.wait_for(|on| *on).await.unwrap();
    tracked.get(&user).await.unwrap();
}

/// While a slot moves, and once it has moved, only what was read of it is forgotten.
#[tokio::test]
async fn hazard_46_a_slot_that_moves_costs_the_others_nothing() {
    let mut bed = Bed::own_cluster(|_| {}).await;
    let (tracked, mut heard) = open(&bed).await;
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    let (shard, key) = (bed.shard(&user), bed.key("t", &user));
    assert_eq!(tracked.get(&user).await.unwrap().len(), 1);
    // Nothing is there of this one: also that is known by no report but this.
    let mut others = (0..).map(|n| bed.user(&format!("none{n}")));
    let absent = others.find(|other| bed.shard(other) == shard).unwrap();
    assert!(tracked.get(&absent).await.unwrap().is_empty());
    let other = others.find(|other| bed.shard(other) != shard).unwrap();
    bed.connect(&other, "phone", 1).await;
    tracked.get(&other).await.unwrap();

    let cluster = bed.masters();
    let source = cluster.master_of(&key).await.unwrap();
    while heard.try_recv().is_ok() {}
    let moving = cluster.depart(&key, (source + 1) % 3).await.unwrap();
    assert_eq!(report(&mut heard, &user).await, Invalidation::User(user.clone()));
    // ASK: the key is there, the slot is still here.
    for _ in 0..20 {
        assert!(tracked.get(&user).await.is_err());
    }
    assert!(*tracked.tracking().borrow());
    tracked.get(&other).await.unwrap();
    bed.masters().arrive(moving).await.unwrap();
    // MOVED, until the slots were looked at: noticed also where nobody reads.
    assert_eq!(report(&mut heard, &absent).await, Invalidation::Shards([shard].into()));
    bed.connect(&absent, "phone", 1).await;
    until("it is read where it is", async || {
        tracked.get(&absent).await.is_ok_and(|routes| routes.len() == 1)
    })
    .await;
    bed.disconnect(&absent, "phone", 1).await;
    assert_eq!(report(&mut heard, &absent).await, Invalidation::User(absent.clone()));
    // A master that goes away takes its own shards with it.
    let key = bed.key("t", &other);
    let with_other = bed.masters().master_of(&key).await.unwrap();
    bed.masters().node((with_other + 1) % 3).kill().unwrap();
    let Invalidation::Shards(lost) = report(&mut heard, &absent).await else { panic!("no shards") };
    assert!((10..=32).contains(&lost.len()) && !lost.contains(&bed.shard(&other)), "{lost:?}");
    bed.disconnect(&other, "phone", 1).await;
    let next = report(&mut heard, &other).await;
    assert!(next == Invalidation::User(other.clone()) || matches!(next, Invalidation::Shards(_)));
    assert!(tracked.get(&other).await.unwrap().is_empty());
}

#[tokio::test]
async fn hazard_80_a_master_that_became_a_replica_is_not_tracked() {
    let bed = Bed::own(|_| {}).await;
    let other = Redis::start().await.unwrap();
    let (tracked, mut heard) = open(&bed).await;
    let user = bed.user("alice");
    tracked.get(&user).await.unwrap();
    // As Sentinel does with an old master that is back; connections stay open.
    let port = other.port().to_string();
    let _: redis::Value = bed.query(&["REPLICAOF", "127.0.0.1", &port]).await;
    let mut tracking = tracked.tracking();
    let off = async { tracking.wait_for(|on| !*on).await.map(drop) };
    let off = tokio::time::timeout(Duration::from_secs(10), off).await;
    assert!(off.is_ok(), "a replica is tracked");
    assert_eq!(report(&mut heard, &user).await, everything(&bed));
    assert!(tracked.get(&user).await.is_err());
    let _: redis::Value = bed.query(&["REPLICAOF", "NO", "ONE"]).await;
    until("it is a master again", async || tracked.get(&user).await.is_ok()).await;
}

/// The server counts every connection; one that is killed at once is made again after a pause.
#[tokio::test]
async fn a_connection_that_breaks_at_once_is_made_again_after_a_pause() {
    let bed = Bed::own(|_| {}).await;
    let (tracked, _heard) = open(&bed).await;
    let client = redis::Client::open(bed.config.url.expose()).unwrap();
    let mut own = client.get_multiplexed_async_connection().await.unwrap();
    let mut info = redis::cmd("INFO");
    info.arg("stats");
    let connections = async |own: &mut _| {
        let info: String = info.query_async(own).await.unwrap();
        let count = info.lines().find_map(|line| line.strip_prefix("total_connections_received:"));
        count.unwrap().trim_end().parse::<u64>().unwrap()
    };
    let before = connections(&mut own).await;
    let mut kill = redis::cmd("CLIENT");
    kill.arg("KILL").arg("TYPE").arg("normal").arg("SKIPME").arg("yes");
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        let _: u64 = kill.query_async(&mut own).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let pauses = began.elapsed().as_millis() as u64 / 300;
    let made = connections(&mut own).await - before;
    assert!((2..=pauses + 2).contains(&made), "{made} in {:?}", began.elapsed());
    let mut tracking = tracked.tracking();
    tracking.wait_for(|on| *on).await.unwrap();
}
