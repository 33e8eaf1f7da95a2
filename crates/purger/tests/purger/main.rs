//! The purger over real Redis, and over both brokers: Apache Kafka and librdkafka's in-process one.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

mod bad_input;
mod kafka;
mod repair;
mod replicas;
mod support;
mod wedge;

use std::time::{Duration, Instant};

use barid_bus::{Producer, ensure_topics};
use barid_core::{ReceiptSet, UserId};
use barid_mailbox::Mailbox;
use barid_runtime::{Context, SecretUrl, Stopped};
use barid_testkit::{Kafka, RedisCluster, records};
use barid_wire::envelope;
use barid_wire::record::{Push, ReceiptKind, Recipients};

use support::*;

async fn accepts_in_order_and_commits(world: World) {
    let purger = world.start().await;
    world.produce_to_alice(0, 30).await;
    world.has("alice", 30).await;
    assert_eq!(world.ids("alice").await, expected(30));
    assert_eq!(purger.stop().await, Stopped::Clean);
    // Committed records are not taken again.
    let again = world.start().await;
    world.produce_to_alice(30, 5).await;
    world.has("alice", 35).await;
    assert_eq!(again.metric("records_taken_total"), 5.0);
    assert_eq!(again.stop().await, Stopped::Clean);
    drop(world.embedded);
}

#[tokio::test(flavor = "multi_thread")]
async fn accepts_in_order_and_commits_embedded() {
    accepts_in_order_and_commits(World::new(true).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn accepts_in_order_and_commits_apache() {
    accepts_in_order_and_commits(World::new(false).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_for_online_users_is_handed_on() {
    let world = World::new(true).await;
    world.connect("alice").await;
    let purger = world.start().await;
    let both = r#"{"id":"7","app":"demo","to":{"users":["alice","bob","alice"]},"text":"hi"}"#;
    world.produce("k", both).await;
    world.has("alice", 1).await;
    world.has("bob", 1).await;
    purger.until("handed", |purger| purger.metric("handed_total") == 1.0).await;
    assert_eq!(purger.stop().await, Stopped::Clean);
    let handed = world.handed.0.lock().await;
    assert_eq!((handed.len(), &*handed[0].user), (1, "alice"));
    let (header, envelope) = envelope::decode(handed[0].envelope.clone()).unwrap();
    assert_eq!((header.seq.0, &*envelope.id), (1, "7"));
    assert!(envelope.taken_at_ms >= envelope.produced_at_ms && envelope.produced_at_ms > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_purger_loses_nothing_and_repeats_nothing() {
    let mut world = World::new(false).await;
    // Nothing is ever committed by the first: all of it is redelivered to the second.
    world.config.commit_interval_ms = 1_000_000;
    let first = world.start().await;
    world.produce_to_alice(0, 20).await;
    world.has("alice", 20).await;
    first.kill();
    let second = world.start().await;
    world.produce_to_alice(20, 5).await;
    world.has("alice", 25).await;
    assert_eq!(world.ids("alice").await, expected(25));
    assert_eq!(second.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_25_what_is_redelivered_after_a_crash_is_told_accepted_not_duplicate() {
    let mut world = World::new(false).await;
    world.config.commit_interval_ms = 1_000_000;
    let asked = |id: &str| asking(id, "alice", ReceiptSet::ACCEPTED.with(ReceiptSet::DUPLICATE));
    let first = world.start().await;
    world.produce("alice", asked("once")).await;
    assert_eq!(world.receipts(1).await[0].kind(), ReceiptKind::Accepted);
    first.kill(); // behind the receipt, before the commit
    let second = world.start().await;
    world.produce("alice", asked("later")).await;
    world.produce("alice", asked("once")).await; // the business sends it again
    let receipts = world.receipts(4).await;
    let told: Vec<_> = receipts.iter().map(|r| (r.id.as_str(), r.kind())).collect();
    let accepted = |id| (id, ReceiptKind::Accepted);
    let again = ("once", ReceiptKind::Duplicate);
    assert_eq!(told, [accepted("later"), accepted("once"), accepted("once"), again]);
    assert_eq!(second.stop().await, Stopped::Clean);
    assert_eq!(world.ids("alice").await, ["once", "later"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_away_loses_nothing_and_is_told() {
    let mut world = World::new(false).await;
    let purger = world.start().await;
    world.produce_to_alice(0, 5).await;
    world.has("alice", 5).await;
    purger.ready().await;
    world.redis.stop().unwrap();
    world.produce_to_alice(5, 5).await;
    let redis_fails = |p: &Running| p.context.health.not_ready().iter().any(|(n, _)| *n == "redis");
    purger.until("redis is missed", redis_fails).await;
    world.redis.cont().unwrap();
    world.has("alice", 10).await;
    assert_eq!(world.ids("alice").await, expected(10));
    purger.ready().await;
    assert_eq!(purger.stop().await, Stopped::Clean);
}

/// Hazard 22.
#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_is_away_stops_its_own_shards_only() {
    let mut world = World::new(false).await;
    let (mut cluster, users) = three_masters(&mut world).await;
    let purger = world.start().await;
    let send = async |from: usize, to: usize| {
        for i in from..to {
            for user in &users {
                world.produce(&format!("{i}"), record(&format!("{i}"), user)).await;
            }
        }
    };
    send(0, 5).await;
    for user in &users {
        world.has(user, 5).await;
    }
    cluster.node(0).stop().unwrap();
    send(5, 40).await;
    // Two of three go on; which master serves whom is the cluster's business.
    let newest = async |user: &String| {
        let inspection = world.mailbox.inspect(&key(user)).await;
        inspection.map_or(0, |inspection| inspection.newest.0)
    };
    let end = Instant::now() + LIMIT;
    loop {
        let done = futures::future::join_all(users.iter().map(&newest)).await;
        if done.iter().filter(|newest| **newest == 40).count() == 2 {
            break;
        }
        assert!(Instant::now() < end, "{done:?}");
    }
    cluster.node(0).cont().unwrap();
    for user in &users {
        world.has(user, 40).await;
    }
    assert_eq!(purger.stop().await, Stopped::Clean);
}

/// A cluster of three masters, and a user of each.
async fn three_masters(world: &mut World) -> (RedisCluster, Vec<String>) {
    let cluster = RedisCluster::start(3).await.unwrap();
    let mut urls = cluster.urls().into_iter().map(SecretUrl::new);
    world.config.redis.cluster = true;
    world.config.redis.url = urls.next().unwrap();
    world.config.redis.urls = urls.collect();
    world.mailbox = Mailbox::open(&world.config.redis, &Context::new().metrics).await.unwrap();
    let lane = |user: &str| world.mailbox.lane_of(world.mailbox.shard_of(&key(user)));
    let user_of =
        |wanted: usize| (0..).map(|i| format!("u{i}")).find(|u| lane(u) == wanted).unwrap();
    let users = (0..3).map(user_of).collect();
    (cluster, users)
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_47_users_of_living_masters_are_reached_however_long_one_is_away() {
    let mut world = World::new(false).await;
    world.config.redis.entries_max = 10_000;
    // So small that the messages of one master fill them many times.
    world.config.window.records_max = 120;
    world.config.window.lane_messages_max = 100;
    let (mut cluster, users) = three_masters(&mut world).await;
    let purger = world.start().await;
    let send = async |from: usize, to: usize| {
        for i in from..to {
            for user in &users {
                let value = asking(&i.to_string(), user, ReceiptSet::ACCEPTED);
                world.produce(&format!("{i}"), value).await;
            }
            // One for all three, in one record.
            let all = Push {
                to: Recipients::Users(users.iter().map(|u| UserId::new(u).unwrap()).collect()),
                receipts: ReceiptSet::ACCEPTED,
                ..message(&format!("all{i}"), "alice")
            };
            world.produce(&format!("{i}"), records::json(&all)).await;
        }
    };
    let newest = async |user: &String| {
        let inspection = world.mailbox.inspect(&key(user)).await;
        inspection.map_or(0, |inspection| inspection.newest.0)
    };
    send(0, 5).await;
    cluster.node(0).stop().unwrap();
    send(5, 405).await;
    let end = Instant::now() + 3 * LIMIT;
    loop {
        let done = futures::future::join_all(users.iter().map(&newest)).await;
        if done.iter().filter(|newest| **newest == 810).count() == 2 {
            break;
        }
        assert!(Instant::now() < end, "{done:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(purger.metric("skipped_records") > 300.0, "{}", purger.metric("skipped_records"));
    cluster.node(0).cont().unwrap();
    // In between, new ones come for all of them.
    send(405, 425).await;
    for user in &users {
        let end = Instant::now() + 3 * LIMIT;
        while newest(user).await < 850 {
            assert!(Instant::now() < end, "{user} has {}", newest(user).await);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(newest(user).await, 850, "once");
    }
    purger.until("all is finished", |p| p.metric("in_flight_records") == 0.0).await;
    assert_eq!(purger.metric("skipped_records"), 0.0);
    let (accepted, before) = (
        purger.metric_of("messages_total", "accepted"),
        purger.metric_of("messages_total", "before"),
    );
    assert_eq!(accepted + before, 2550.0, "nothing was accepted again: {before}");
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_66_a_master_that_comes_and_goes_loses_nothing() {
    let mut world = World::new(false).await;
    world.config.redis.entries_max = 10_000;
    // Small enough that records wait for room beside those that are left out; and quick, so that a master is
    // asked whenever it is back.
    let window = &mut world.config.window;
    (window.lane_messages_max, window.away_messages_max) = (30, 3);
    (window.skipped_records_max, window.call_messages_max) = (60, 2);
    (window.retry_base_ms, window.retry_max_ms) = (1, 5);
    let (cluster, users) = three_masters(&mut world).await;
    // A record that asks for a receipt is under way for longer.
    let send = async |user: &String, i: usize| {
        let value = asking(&i.to_string(), user, ReceiptSet::ACCEPTED);
        world.produce(&i.to_string(), value).await;
    };
    for i in 0..500 {
        futures::future::join_all(users.iter().map(|user| send(user, i))).await;
    }
    let purger = world.start().await;
    let maxmemory = async |bytes: &str| {
        let set = ["CONFIG", "SET", "maxmemory", bytes];
        let _: () = cluster.nodes()[0].query(&set).await.unwrap();
    };
    let mut left_out: f64 = 0.0;
    let end = Instant::now() + 3 * LIMIT;
    // The first master comes and goes until the users of the others have everything.
    for pause in (1..).map(|i| Duration::from_millis(i % 20)) {
        maxmemory("1").await;
        tokio::time::sleep(pause + Duration::from_millis(5)).await;
        left_out = left_out.max(purger.metric("skipped_records"));
        maxmemory("0").await;
        tokio::time::sleep(pause / 2).await;
        if purger.metric_of("messages_total", "accepted") >= 1000.0 {
            break;
        }
        assert!(Instant::now() < end, "{:?}", purger.context.health.not_ready());
    }
    assert!(left_out > 0.0);
    for user in &users {
        let end = Instant::now() + 3 * LIMIT;
        while world.inspect(user).await.newest.0 < 500 {
            let newest = world.inspect(user).await.newest;
            assert!(
                Instant::now() < end,
                "{user} has {newest}: {:?}",
                purger.context.health.not_ready()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    purger.until("all is finished", |p| p.metric("in_flight_records") == 0.0).await;
    assert_eq!(purger.metric("skipped_records"), 0.0);
    assert_eq!(purger.metric_of("messages_total", "accepted"), 1500.0);
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_forgets_is_read_again_below_the_commit() {
    let world = World::new(false).await;
    let purger = world.start().await;
    world.produce_to_alice(0, 10).await;
    world.has("alice", 10).await;
    tokio::time::sleep(Duration::from_millis(300)).await; // committed
    let _: () = world.redis.query(&["FLUSHALL"]).await.unwrap();
    world.produce_to_alice(10, 1).await;
    world.has("alice", 11).await;
    assert_eq!(world.ids("alice").await, expected(11));
    assert!(purger.metric("gaps_total") >= 1.0);
    assert_eq!(purger.stop().await, Stopped::Clean);
}

/// Hazard 5.
#[tokio::test(flavor = "multi_thread")]
async fn what_redis_forgets_is_noticed_without_new_messages() {
    let mut world = World::new(false).await;
    world.config.window.probe_interval_ms = 200;
    let purger = world.start().await;
    world.produce_to_alice(0, 10).await;
    world.has("alice", 10).await;
    let _: () = world.redis.query(&["FLUSHALL"]).await.unwrap();
    world.has("alice", 10).await;
    assert_eq!(world.ids("alice").await, expected(10));
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_01_scripts_that_redis_forgot_lose_no_batch() {
    let world = World::new(false).await;
    let purger = world.start().await;
    for round in 0..10 {
        let _: () = world.redis.query(&["SCRIPT", "FLUSH"]).await.unwrap();
        world.produce_to_alice(round * 10, 10).await;
    }
    world.has("alice", 100).await;
    assert_eq!(world.ids("alice").await, expected(100));
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_redis_holds_the_commit_until_there_is_room() {
    let world = World::new(false).await;
    let purger = world.start().await;
    world.produce_to_alice(0, 3).await;
    world.has("alice", 3).await;
    let _: () = world.redis.query(&["CONFIG", "SET", "maxmemory", "1"]).await.unwrap();
    world.produce_to_alice(3, 3).await;
    let full = |p: &Running| p.metric("shards_away") >= 1.0;
    purger.until("full", full).await;
    let _: () = world.redis.query(&["CONFIG", "SET", "maxmemory", "0"]).await.unwrap();
    world.has("alice", 6).await;
    assert_eq!(world.ids("alice").await, expected(6));
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_move_between_purgers_and_everything_arrives_once_in_order() {
    let world = World::new(false).await;
    let first = world.start().await;
    first.until("assigned", |p| p.metric("partitions") == 12.0).await;
    let producing = async {
        for i in 0..300 {
            world.produce("alice", record(&i.to_string(), "alice")).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let moving = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let second = world.start().await;
        second.until("shared", |p| p.metric("partitions") >= 1.0).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(first.stop().await, Stopped::Clean);
        second
    };
    let ((), second) = tokio::join!(producing, moving);
    let end = Instant::now() + LIMIT;
    while world.inspect("alice").await.newest.0 < 300 {
        assert!(Instant::now() < end, "alice has {}", world.inspect("alice").await.newest);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(world.inspect("alice").await.newest.0, 300);
    // An inspection shows the newest hundred.
    assert_eq!(world.ids("alice").await, expected(300)[200..]);
    assert_eq!(second.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_created_again_is_accepted_from_its_start() {
    let world = World::new(false).await;
    let purger = world.start().await;
    world.produce_to_alice(0, 5).await;
    world.has("alice", 5).await;
    let topic = world.config.kafka.topics.push.clone();
    Kafka::shared().await.delete_topics(&[&topic]).await.unwrap();
    ensure_topics(&world.config.kafka, LIMIT).await.unwrap();
    let fresh = World { producer: Producer::new(&world.config.kafka).unwrap(), ..world };
    fresh.produce_to_alice(5, 3).await;
    fresh.has("alice", 8).await;
    assert_eq!(fresh.ids("alice").await, expected(8));
    assert_eq!(purger.stop().await, Stopped::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_bulk_does_not_delay_what_is_urgent() {
    let mut world = World::new(false).await;
    // A mailbox call of 20 ms a message, as it were: a slow store makes the backlog last.
    world.config.window.call_messages_max = 4;
    let topics = world.config.kafka.topics.clone();
    let bulk = (0..3000).map(|i| {
        let (producer, topic) = (world.producer.clone(), topics.push_bulk.clone());
        async move {
            let value = record(&i.to_string(), &format!("u{}", i % 50));
            producer.send(&topic, format!("{i}").as_bytes(), value, &[]).await.unwrap();
        }
    });
    futures::future::join_all(bulk).await;
    let purger = world.start().await;
    purger.until("bulk is under way", |p| p.metric("messages_total") > 50.0).await;
    let before = purger.metric("messages_total");
    let high = record("urgent", "alice");
    world.producer.send(&topics.push_high, b"k", high, &[]).await.unwrap();
    world.has("alice", 1).await;
    let passed = purger.metric("messages_total") - before;
    purger.until("bulk is done", |p| p.metric("messages_total") == 3001.0).await;
    assert!(passed < 2900.0, "{passed} bulk messages went first");
    assert_eq!(purger.stop().await, Stopped::Clean);
}
