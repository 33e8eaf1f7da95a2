//! Accept followed by WAIT, in one pipeline on a connection of its own (hazard 4). WAIT covers the connection's last
//! *executed* command: after a refused one it says nothing of it, so both replies are judged together.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use barid_core::{AppId, Shard, UserId};
use barid_mailbox::{
    AcceptGroup, AcceptOutcome, Error, GroupOutcome, Mailbox, RedisConfig, Source, UserKey,
};
use barid_runtime::SecretUrl;
use barid_testkit::redis::RedisOptions;
use barid_testkit::{Redis, RedisCluster, Relay};
use redis::Value;
use redis::aio::ConnectionLike as _;

use crate::support::{config, message, open, until};

fn group_of(shard: Shard, user: &UserKey, offset: i64) -> AcceptGroup {
    let source = Source { topic_id: "topic".into(), partition: 0 };
    let messages = vec![message(user, offset, &offset.to_string())];
    AcceptGroup { shard, source, prev: None, raise: None, messages }
}

fn user(name: &str) -> UserKey {
    UserKey { app: AppId::new("app").unwrap(), user: UserId::new(name).unwrap() }
}

fn waiting(config: RedisConfig, wait_timeout_ms: u64) -> RedisConfig {
    RedisConfig { wait_replicas: 1, wait_timeout_ms, response_timeout_ms: 10_000, ..config }
}

/// A Redis Cluster of two masters with a replica each.
async fn two_pairs(wait_timeout_ms: u64) -> (RedisCluster, [Redis; 2], Mailbox) {
    let cluster = RedisCluster::start(2).await.unwrap();
    let replicas = [cluster.replicate(0).await.unwrap(), cluster.replicate(1).await.unwrap()];
    let mut urls = cluster.urls().into_iter().map(SecretUrl::new);
    let url = urls.next().unwrap();
    let config = RedisConfig { cluster: true, urls: urls.collect(), ..config(url.expose()) };
    let mailbox = open(&waiting(config, wait_timeout_ms)).await;
    (cluster, replicas, mailbox)
}

/// A mailbox that waits for the master's replica; the first message of a user is accepted.
async fn first_accepted(master: &Redis, wait_timeout_ms: u64) -> (Mailbox, UserKey, Shard) {
    let mailbox = open(&waiting(config(&master.url()), wait_timeout_ms)).await;
    let alice = user("alice");
    let shard = mailbox.shard_of(&alice);
    let first = mailbox.accept(&[group_of(shard, &alice, 1)]).await;
    assert!(matches!(&first[0], Ok(GroupOutcome::Done(_))), "{first:?}");
    (mailbox, alice, shard)
}

/// Asks until it is accepted.
async fn accepted_at_last(mailbox: &Mailbox, group: AcceptGroup) -> Vec<AcceptOutcome> {
    let done = async {
        loop {
            match &mailbox.accept(std::slice::from_ref(&group)).await[0] {
                Ok(GroupOutcome::Done(outcomes)) => return outcomes.clone(),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), done).await.expect("it is accepted")
}

/// Sends a write and a WAIT on a new connection, and returns both answers: a number, or an error's code.
async fn write_and_wait(redis: &Redis, key: &str) -> [String; 2] {
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut pair = redis::Pipeline::new();
    pair.cmd("SET").arg(key).arg("x").cmd("WAIT").arg(1).arg(200);
    let answers = connection.req_packed_commands(&pair, 0, 2).await.unwrap();
    let told = |answer: Value| match answer.extract_error() {
        Ok(Value::Int(replicas)) => replicas.to_string(),
        Ok(_) => "done".to_owned(),
        Err(error) => error.code().unwrap_or_default().to_owned(),
    };
    let told: Vec<_> = answers.into_iter().map(told).collect();
    told.try_into().unwrap()
}

#[tokio::test]
async fn hazard_04_a_connection_that_breaks_before_wait_answers_confirms_nothing() {
    let master = Redis::start().await.unwrap();
    let target = SocketAddr::from((Ipv4Addr::LOCALHOST, master.port()));
    let relay = Relay::to(target).await.unwrap();
    let replica = Redis::start().await.unwrap();
    replica.follow(relay.address().port()).await.unwrap();
    let (mailbox, alice, shard) = first_accepted(&master, 8_000).await;
    relay.hold();
    let second = group_of(shard, &alice, 2);
    let call = tokio::spawn({
        let (mailbox, second) = (mailbox.clone(), second.clone());
        async move { mailbox.accept(&[second]).await }
    });
    // The script was executed, and the client is blocked.
    let blocked = async {
        while !master.info("clients").await.unwrap().contains("blocked_clients:1") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), blocked).await.unwrap();
    assert_eq!(mailbox.inspect(&alice).await.unwrap().newest.0, 2);
    let _: Value = master.query(&["CLIENT", "KILL", "TYPE", "normal"]).await.unwrap();
    let broken = call.await.unwrap();
    assert!(matches!(&broken[0], Err(Error::Away(_))), "{broken:?}");
    // Executed before, and still on no replica: that counts as little.
    let short = open(&waiting(config(&master.url()), 100)).await;
    let again = short.accept(std::slice::from_ref(&second)).await;
    assert!(matches!(&again[0], Err(Error::Unreplicated { have: 0, want: 1 })), "{again:?}");
    relay.release();
    let again = mailbox.accept(&[second]).await;
    let before = [AcceptOutcome::AcceptedBefore];
    assert!(matches!(&again[0], Ok(GroupOutcome::Done(o)) if o[..] == before), "{again:?}");
    // The connection for everything else was closed as well.
    let _ = mailbox.ping().await;
    assert_eq!(mailbox.inspect(&alice).await.unwrap().newest.0, 2, "once");
}

#[tokio::test]
async fn hazard_04_what_is_redirected_is_not_confirmed_by_the_wait_behind_it() {
    let (cluster, _replicas, mailbox) = two_pairs(5_000).await;
    let alice = user("alice");
    let shard = mailbox.shard_of(&alice);
    accepted_at_last(&mailbox, group_of(shard, &alice, 1)).await;
    // The empty slot of another shard goes to the other master; all replicas follow.
    let bob = user("bob");
    let moved = mailbox.shard_of(&bob);
    assert_ne!(moved, shard);
    let tag = format!("{{{moved}}}");
    let owner = cluster.master_of(&tag).await.unwrap();
    let moving = cluster.depart(&tag, 1 - owner).await.unwrap();
    cluster.arrive(moving).await.unwrap();
    let second = group_of(moved, &bob, 1);
    let redirected = mailbox.accept(std::slice::from_ref(&second)).await;
    assert!(matches!(&redirected[0], Err(Error::Away(_))), "{redirected:?}");
    let outcomes = accepted_at_last(&mailbox, second).await;
    assert!(matches!(outcomes[..], [AcceptOutcome::Accepted { .. }]), "{outcomes:?}");
}

#[tokio::test]
async fn hazard_04_what_is_on_its_way_elsewhere_is_not_confirmed_by_the_wait_behind_it() {
    let (cluster, mut replicas, mailbox) = two_pairs(500).await;
    let alice = user("alice");
    let shard = mailbox.shard_of(&alice);
    accepted_at_last(&mailbox, group_of(shard, &alice, 1)).await;
    // The empty slot of another shard of the same master is leaving: ASK.
    let here = cluster.master_of(&format!("{{{shard}}}")).await.unwrap();
    let mut others = (0..).map(|n| user(&format!("bob{n}")));
    let (bob, leaving) = loop {
        let bob = others.next().unwrap();
        let leaving = mailbox.shard_of(&bob);
        let owner = cluster.master_of(&format!("{{{leaving}}}")).await.unwrap();
        if leaving != shard && owner == here {
            break (bob, leaving);
        }
    };
    let moving = cluster.depart(&format!("{{{leaving}}}"), 1 - here).await.unwrap();
    for replica in &mut replicas {
        replica.stop().unwrap();
    }
    // Redis itself: the replica has all that this connection executed, which is nothing.
    let (master, key) = (&cluster.nodes()[here], format!("{{{leaving}}}:x"));
    assert_eq!(write_and_wait(master, &key).await, ["ASK", "1"]);
    assert_eq!(write_and_wait(master, &format!("{{{shard}}}:x")).await, ["done", "0"]);
    let to_bob = group_of(leaving, &bob, 1);
    // On a busy machine the cluster counts as down at times; confirmed it must never be.
    until("ASK", async || match &mailbox.accept(std::slice::from_ref(&to_bob)).await[0] {
        Err(Error::Away(why)) => why.contains("Ask"),
        other => panic!("{other:?}"),
    })
    .await;
    // Beside one that was executed, and that no replica has.
    let both = mailbox.accept(&[group_of(shard, &alice, 2), to_bob.clone()]).await;
    assert!(matches!(&both[0], Err(Error::Unreplicated { have: 0, want: 1 })), "{both:?}");
    assert!(matches!(&both[1], Err(Error::Away(_))), "{both:?}");
    for replica in &mut replicas {
        replica.cont().unwrap();
    }
    let before = accepted_at_last(&mailbox, group_of(shard, &alice, 2)).await;
    assert_eq!(before, [AcceptOutcome::AcceptedBefore]);
    cluster.arrive(moving).await.unwrap();
    let outcomes = accepted_at_last(&mailbox, to_bob).await;
    assert!(matches!(outcomes[..], [AcceptOutcome::Accepted { .. }]), "{outcomes:?}");
}

#[tokio::test]
async fn hazard_04_a_master_that_loads_its_data_confirms_nothing() {
    let settings = [("enable-debug-command", "local"), ("rdbcompression", "no")];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    let options = RedisOptions { settings, ..Default::default() };
    let master = Redis::start_with(options).await.unwrap();
    let replica = Redis::start().await.unwrap();
    replica.follow(master.port()).await.unwrap();
    let (mailbox, alice, shard) = first_accepted(&master, 500).await;
    let more = "for i = 1, 60 do redis.call('SET', 'pad' .. i, string.rep(i, 2048)) end";
    let () = master.query(&["EVAL", more, "0"]).await.unwrap();
    // Three seconds, in which it answers, and connections stay open.
    for (setting, value) in
        [("loading-process-events-interval-bytes", "1024"), ("key-load-delay", "50000")]
    {
        let () = master.query(&["CONFIG", "SET", setting, value]).await.unwrap();
    }
    let reload = master.query::<Value>(&["DEBUG", "RELOAD"]);
    let early = tokio::time::timeout(Duration::from_millis(500), reload).await;
    assert!(early.is_err(), "{early:?}");
    let second = group_of(shard, &alice, 2);
    let loading = mailbox.accept(std::slice::from_ref(&second)).await;
    assert!(matches!(&loading[0], Err(Error::Away(why)) if why.contains("oading")), "{loading:?}");
    assert_eq!(write_and_wait(&master, "x").await, ["LOADING", "LOADING"]);
    let outcomes = accepted_at_last(&mailbox, second).await;
    assert!(matches!(outcomes[..], [AcceptOutcome::Accepted { .. }]), "{outcomes:?}");
    assert_eq!(mailbox.inspect(&alice).await.unwrap().newest.0, 2);
}

#[tokio::test]
async fn hazard_04_a_master_that_became_a_replica_confirms_nothing() {
    let (master, replica) = (Redis::start().await.unwrap(), Redis::start().await.unwrap());
    replica.follow(master.port()).await.unwrap();
    let (mailbox, alice, shard) = first_accepted(&master, 500).await;
    // A failover by hand: connections to the former master stay open, and it has a replica of its own.
    let () = replica.query(&["REPLICAOF", "NO", "ONE"]).await.unwrap();
    master.follow(replica.port()).await.unwrap();
    let next = Redis::start().await.unwrap();
    next.follow(master.port()).await.unwrap();
    assert_eq!(write_and_wait(&master, "x").await, ["READONLY", "ERR"]);
    let second = group_of(shard, &alice, 2);
    let refused = mailbox.accept(std::slice::from_ref(&second)).await;
    assert!(matches!(&refused[0], Err(Error::Away(_))), "{refused:?}");
    // And back.
    let () = master.query(&["REPLICAOF", "NO", "ONE"]).await.unwrap();
    replica.follow(master.port()).await.unwrap();
    let outcomes = accepted_at_last(&mailbox, second).await;
    assert!(matches!(outcomes[..], [AcceptOutcome::Accepted { .. }]), "{outcomes:?}");
    assert_eq!(mailbox.inspect(&alice).await.unwrap().newest.0, 2);
}
