//! Redis unreachable, restarted, without loaded scripts, full, or unusable.

use std::time::{Duration, Instant};

use barid_core::Seq;
use barid_mailbox::{AcceptOutcome, ConnectOutcome, Error, GroupOutcome, Mailbox, RedisConfig};
use barid_runtime::SecretUrl;
use barid_testkit::Redis;
use barid_testkit::redis::RedisOptions;

use crate::support::{Bed, ack, at, config, hello, message, open, sleep_ms, until};

#[tokio::test]
async fn scripts_are_loaded_again_after_a_flush_in_mid_stream() {
    let bed = Bed::own(|_| {}).await;
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    let mut prev = None;
    for offset in 1..=60 {
        if offset % 7 == 0 {
            let () = bed.query(&["SCRIPT", "FLUSH"]).await;
        }
        let messages = vec![message(&user, offset, &format!("m{offset}"))];
        let outcome = bed.accept_group(messages, prev).await;
        assert!(matches!(outcome, GroupOutcome::Done(_)), "{outcome:?}");
        prev = Some(at(offset));
        if offset % 5 == 0 {
            bed.ack(&user, "phone", 1, offset as u64).await;
        }
    }
    assert_eq!(bed.page(&user, 0).await.newest, Seq(60));
}

/// Retries until Redis is there again.
async fn accept_at_last(mailbox: &Mailbox, bed: &Bed, offset: i64) -> AcceptOutcome {
    let user = bed.user("alice");
    let group = bed.group(vec![message(&user, offset, &format!("m{offset}"))], None);
    for _ in 0..500 {
        match mailbox.accept(std::slice::from_ref(&group)).await.remove(0) {
            Ok(GroupOutcome::Done(mut outcomes)) => return outcomes.remove(0),
            Ok(gap) => panic!("{gap:?}"),
            Err(Error::Away(_)) => sleep_ms(20).await,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("Redis never came back");
}

#[tokio::test]
async fn killed_connections_are_made_again_and_told() {
    let bed = Bed::own(|_| {}).await;
    let mut reconnections = bed.mailbox.reconnections();
    for offset in 1..=5 {
        let () = bed.query(&["CLIENT", "KILL", "TYPE", "normal"]).await;
        let outcome = accept_at_last(&bed.mailbox, &bed, offset).await;
        assert!(matches!(outcome, AcceptOutcome::Accepted { .. } | AcceptOutcome::AcceptedBefore));
    }
    assert_eq!(bed.page(&bed.user("alice"), 0).await.newest, Seq(5));
    let told = reconnections.try_recv().expect("a new connection is told");
    assert_eq!(told.shards.len(), 64);
}

#[tokio::test]
async fn a_restarted_redis_is_found_again() {
    let mut bed = Bed::own(|_| {}).await;
    let user = bed.user("alice");
    bed.fill(&user, 1..=3).await;
    bed.redis().kill().unwrap();
    let began = Instant::now();
    let error = bed.mailbox.connect(hello(&user, "phone", 1)).await.unwrap_err();
    assert!(matches!(error, Error::Away(_)), "{error}");
    assert!(bed.mailbox.ping().await.is_err());
    assert!(began.elapsed() < Duration::from_secs(2), "a refused connection is told at once");
    bed.redis().restart().await.unwrap();
    accept_at_last(&bed.mailbox, &bed, 4).await;
    assert_eq!(bed.page(&user, 0).await.newest, Seq(4), "appendonly: nothing was forgotten");
    bed.mailbox.ping().await.unwrap();
}

#[tokio::test]
async fn hazard_14_a_connect_that_runs_after_its_deadline_does_nothing() {
    let mut bed = Bed::own(|config| config.response_timeout_ms = 300).await;
    let user = bed.user("alice");
    bed.connect(&user, "tablet", 1).await;
    bed.redis().stop().unwrap();
    let error = bed.mailbox.connect(hello(&user, "phone", 1)).await.unwrap_err();
    assert!(matches!(error, Error::Away(_)), "{error}");
    sleep_ms(100).await;
    bed.redis().cont().unwrap();
    // The call that was on its way is executed now.
    sleep_ms(100).await;
    let calls: String = bed.query(&["INFO", "commandstats"]).await;
    assert!(calls.contains("cmdstat_evalsha"));
    let routes: Vec<String> = bed.query(&["HKEYS", &bed.key("r", &user)]).await;
    assert_eq!(routes, ["tablet"]);
}

#[tokio::test]
async fn redis_time_is_estimated_anew_on_each_connection_and_never_late() {
    let mut bed = Bed::own(|_| {}).await;
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.redis().restart().await.unwrap();
    until("a connect is let in", async || {
        bed.mailbox.connect(hello(&user, "phone", 2)).await.is_ok()
    })
    .await;
    let shard = bed.shard(&user);
    let estimate = bed.mailbox.redis_now_ms(shard).unwrap();
    let now = bed.mailbox.inspect(&user).await.unwrap().now_ms;
    assert!(estimate <= now && now - estimate < 2_000, "{estimate} {now}");
}

#[tokio::test]
async fn hazard_21_a_full_redis_takes_everything_but_messages() {
    let bed = Bed::own(|_| {}).await;
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=5).await;
    bed.make_due(&user).await;
    let () = bed.query(&["CONFIG", "SET", "maxmemory", "1mb"]).await;
    let () = bed.query(&["SCRIPT", "FLUSH"]).await;
    let group = bed.group(vec![message(&user, 6, "m6")], None);
    let refused = bed.mailbox.accept(std::slice::from_ref(&group)).await.remove(0);
    assert!(matches!(refused, Err(Error::Full(_))), "{refused:?}");
    assert_eq!(bed.fire(&user).await.unwrap().devices.len(), 1);
    bed.ack(&user, "phone", 1, 5).await;
    assert_eq!(bed.page(&user, 0).await.entries.len(), 0);
    bed.connect(&user, "tablet", 2).await;
    bed.disconnect(&user, "tablet", 2).await;
    // A full Redis can also be connected to.
    open(&bed.config).await;
    let () = bed.query(&["CONFIG", "SET", "maxmemory", "0"]).await;
    let done = bed.mailbox.accept(&[group]).await.remove(0).unwrap();
    assert!(matches!(done, GroupOutcome::Done(_)));
}

#[tokio::test]
async fn hazard_132_a_full_redis_takes_no_new_users() {
    let bed = Bed::own(|_| {}).await;
    let (known, routed, stranger) = (bed.user("alice"), bed.user("carol"), bed.user("bob"));
    bed.connect(&known, "phone", 1).await;
    bed.connect(&routed, "phone", 1).await;
    let () = bed.query(&["CONFIG", "SET", "maxmemory", "1mb"]).await;
    assert_eq!(bed.hello(hello(&stranger, "phone", 1)).await, ConnectOutcome::NotCreated);
    assert_eq!(bed.mailbox.inspect(&stranger).await.unwrap().epoch.0, 0);
    bed.connect(&known, "phone", 2).await;
    bed.connect(&routed, "tablet", 2).await;
    let () = bed.query(&["CONFIG", "SET", "maxmemory", "0"]).await;
    bed.connect(&stranger, "phone", 2).await;
}

async fn refusal(config: &RedisConfig) -> Error {
    Mailbox::open(config, &prometheus::Registry::new()).await.err().expect("refused")
}

#[tokio::test]
async fn a_redis_that_evicts_is_refused() {
    let settings = [("maxmemory", "100mb"), ("maxmemory-policy", "allkeys-lru")];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    let options = RedisOptions { settings, ..Default::default() };
    let redis = Redis::start_with(options).await.unwrap();
    let error = refusal(&config(&redis.url())).await;
    assert!(matches!(&error, Error::Unusable(why) if why.contains("allkeys-lru")), "{error}");
}

#[tokio::test]
async fn another_shard_count_is_refused_also_on_a_reconnect() {
    let mut bed = Bed::own(|config| config.shards = 8).await;
    let error = refusal(&RedisConfig { shards: 16, ..bed.config.clone() }).await;
    assert!(matches!(&error, Error::Unusable(why) if why.contains('8')), "{error}");
    let () = bed.query(&["HSET", "barid:meta", "shards", "32"]).await;
    bed.redis().restart().await.unwrap();
    let user = bed.user("alice");
    until("the other shard count is noticed", async || {
        let outcome = bed.mailbox.connect(hello(&user, "phone", 1)).await;
        matches!(outcome, Err(Error::Unusable(_)))
    })
    .await;
}

#[tokio::test]
async fn a_replica_is_not_written_to() {
    let bed = Bed::own(|_| {}).await;
    let replica = Redis::start().await.unwrap();
    let port = bed.config.url.expose().rsplit(':').next().unwrap().to_owned();
    let _: redis::Value = replica.query(&["REPLICAOF", "127.0.0.1", &port]).await.unwrap();
    let error = refusal(&config(&replica.url())).await;
    assert!(matches!(&error, Error::Away(why) if why.contains("slave")), "{error}");
}

#[tokio::test]
async fn an_unreachable_redis_is_away_and_a_wrong_setting_unusable() {
    let away = refusal(&config("redis://127.0.0.1:1")).await;
    assert!(matches!(away, Error::Away(_)), "{away}");
    let wrong = RedisConfig { shards: 0, url: SecretUrl::new("redis://h"), ..Default::default() };
    assert!(matches!(refusal(&wrong).await, Error::Unusable(_)));
}

#[tokio::test]
async fn single_calls_are_batched_under_load_and_fail_alone() {
    let redis = Redis::start().await.unwrap();
    let registry = prometheus::Registry::new();
    let mailbox = Mailbox::open(&config(&redis.url()), &registry).await.unwrap();
    let bed = Bed::alone().await; // only for its names
    let users: Vec<_> = (0..400).map(|i| bed.user(&format!("u{i}"))).collect();
    let corrupt = bed.key("h", &users[7]);
    let _: redis::Value = redis.query(&["SET", corrupt.as_str(), "no hash"]).await.unwrap();
    let calls = users.iter().map(|user| mailbox.connect(hello(user, "phone", 1)));
    let outcomes = futures::future::join_all(calls).await;
    for (index, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.is_err(), index == 7, "{index} {outcome:?}");
    }
    let (calls, items) = batches(&registry, "connect");
    assert_eq!(items, 400.0);
    assert!(calls < 40, "{calls} calls");
    let errors = metric(&registry, "barid_mailbox_errors_total", &["connect", "unexpected"]);
    assert_eq!(errors.get_counter().get_value(), 1.0);
}

#[tokio::test]
async fn acknowledgements_of_a_trickle_share_calls_and_a_full_batch_waits_for_nobody() {
    let bed = Bed::alone().await;
    let mut requests = Vec::new();
    for offset in 1..=20 {
        let user = bed.user(&format!("u{offset}"));
        bed.fill(&user, offset..=offset).await;
        bed.connect(&user, "phone", 1).await;
        requests.push(ack(&user, "phone", 1, bed.position(&user, 1).await));
    }
    let acknowledge = async |mailbox: &Mailbox, index: usize| {
        sleep_ms(2 * index as u64).await;
        mailbox.ack_soon(requests[index].clone()).await.unwrap()
    };
    let mut calls = Vec::new();
    for (ack_linger_ms, batch_max) in [(0, 128), (100, 128), (100, 2)] {
        let registry = prometheus::Registry::new();
        let config = RedisConfig { ack_linger_ms, batch_max, ..bed.config.clone() };
        let mailbox = Mailbox::open(&config, &registry).await.unwrap();
        let all = (0..requests.len()).map(|index| acknowledge(&mailbox, index));
        let begun = Instant::now();
        futures::future::join_all(all).await;
        let (made, items) = batches(&registry, "ack");
        assert_eq!(items, 20.0);
        calls.push(made);
        if batch_max == 2 {
            assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
        }
    }
    let mailbox = open(&RedisConfig { ack_linger_ms: 100, ..bed.config.clone() }).await;
    let mut soonest = Duration::MAX; // the machine may be busy with something else
    for _ in 0..5 {
        let begun = Instant::now();
        let hurried = async {
            sleep_ms(5).await;
            mailbox.ack(requests[1].clone()).await.unwrap();
        };
        let _ = futures::future::join(mailbox.ack_soon(requests[0].clone()), hurried).await;
        soonest = soonest.min(begun.elapsed());
    }
    assert!(soonest < Duration::from_millis(80), "{soonest:?}: one was in a hurry");
    assert!(calls[0] > 2 * calls[1] && calls[1] <= 3 && calls[2] >= 10, "{calls:?}");
    let wrong = RedisConfig { ack_linger_ms: 101, ..bed.config.clone() };
    assert!(refusal(&wrong).await.to_string().contains("redis.ack_linger_ms"));
}

/// Calls of a script, and items in all of them.
fn batches(registry: &prometheus::Registry, script: &str) -> (u64, f64) {
    let metric = metric(registry, "barid_mailbox_batch_items", &[script]);
    let items = metric.get_histogram();
    (items.get_sample_count(), items.get_sample_sum())
}

fn metric(
    registry: &prometheus::Registry,
    name: &str,
    labels: &[&str],
) -> prometheus::proto::Metric {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name).unwrap();
    let mut metrics = family.get_metric().iter();
    let has = |metric: &prometheus::proto::Metric, value: &str| {
        metric.get_label().iter().any(|label| label.value() == value)
    };
    let found = metrics.find(|metric| labels.iter().all(|value| has(metric, value)));
    found.unwrap().clone()
}

#[tokio::test]
async fn hazard_22_a_master_that_is_away_stops_its_own_shards_only() {
    let mut bed = Bed::own_cluster(|config| config.response_timeout_ms = 500).await;
    assert_eq!(bed.mailbox.lanes(), 3);
    let users: Vec<_> = (0..60).map(|i| bed.user(&format!("u{i}"))).collect();
    let lane = |bed: &Bed, user| bed.mailbox.lane_of(bed.shard(user));
    let stopped = lane(&bed, &users[0]);
    let key = bed.key("t", &users[0]);
    let index = bed.masters().master_of(&key).await.unwrap();
    bed.masters().node(index).stop().unwrap();
    let began = Instant::now();
    for (user, offset) in users.iter().zip(1..).filter(|(user, _)| lane(&bed, user) != stopped) {
        bed.fill(user, offset..=offset).await;
        bed.connect(user, "phone", 1).await;
        bed.ack(user, "phone", 1, 1).await;
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let group = bed.group(vec![message(&users[0], 100, "a")], None);
    assert!(matches!(bed.mailbox.accept(&[group]).await[0], Err(Error::Away(_))));
    bed.masters().node(index).cont().unwrap();
    let user = users[0].clone();
    until("its shards work again", async || {
        let group = bed.group(vec![message(&user, 100, "a")], None);
        bed.mailbox.accept(&[group]).await[0].is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_slot_that_moved_is_followed() {
    let mut bed = Bed::own_cluster(|_| {}).await;
    let user = bed.user("alice");
    bed.fill(&user, 1..=1).await;
    let key = bed.key("t", &user);
    let cluster = bed.masters();
    let source = cluster.master_of(&key).await.unwrap();
    let moving = cluster.depart(&key, (source + 1) % 3).await.unwrap();
    // The keys are there, the slot is here: the shard is away until both are in one place.
    let group = bed.group(vec![message(&user, 2, "m2")], None);
    let away = bed.mailbox.accept(std::slice::from_ref(&group)).await.remove(0);
    assert!(matches!(away, Err(Error::Away(_))), "{away:?}");
    bed.masters().arrive(moving).await.unwrap();
    bed.fill(&user, 2..=2).await;
    assert_eq!(bed.page(&user, 0).await.newest, Seq(2));
}
