//! Accept with WAIT behind it, in one pipeline on a connection of its own (hazard 4).

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use barid_core::{AppId, Shard, UserId};
use barid_mailbox::{
    AcceptGroup, AcceptOutcome, Error, GroupOutcome, RedisConfig, Source, UserKey,
};
use barid_runtime::SecretUrl;
use barid_testkit::{Redis, RedisCluster, Relay};
use redis::Value;

use crate::support::{config, message, open};

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

#[tokio::test]
async fn hazard_04_a_connection_that_breaks_before_wait_answers_confirms_nothing() {
    let master = Redis::start().await.unwrap();
    let target = SocketAddr::from((Ipv4Addr::LOCALHOST, master.port()));
    let relay = Relay::to(target).await.unwrap();
    let replica = Redis::start().await.unwrap();
    replica.follow(relay.address().port()).await.unwrap();
    let mailbox = open(&waiting(config(&master.url()), 8_000)).await;
    let alice = user("alice");
    let shard = mailbox.shard_of(&alice);
    let first = mailbox.accept(&[group_of(shard, &alice, 1)]).await;
    assert!(matches!(&first[0], Ok(GroupOutcome::Done(_))), "{first:?}");
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
    let cluster = RedisCluster::start(2).await.unwrap();
    let replicas = [cluster.replicate(0).await.unwrap(), cluster.replicate(1).await.unwrap()];
    let mut urls = cluster.urls().into_iter().map(SecretUrl::new);
    let url = urls.next().unwrap();
    let config = RedisConfig { cluster: true, urls: urls.collect(), ..config(url.expose()) };
    let mailbox = open(&waiting(config, 5_000)).await;
    let alice = user("alice");
    let shard = mailbox.shard_of(&alice);
    let first = mailbox.accept(&[group_of(shard, &alice, 1)]).await;
    assert!(matches!(&first[0], Ok(GroupOutcome::Done(_))), "{first:?}");
    // The empty slot of another shard goes to the other master; all replicas follow.
    let moved = mailbox.shard_of(&user("bob"));
    let bob = user("bob");
    assert_ne!(moved, shard);
    let tag = format!("{{{moved}}}");
    let slot: i64 = cluster.nodes()[0].query(&["CLUSTER", "KEYSLOT", &tag]).await.unwrap();
    let owns_it = cluster.nodes()[0].query::<Option<String>>(&["GET", &tag]).await.is_ok();
    let to = usize::from(owns_it);
    let id: String = cluster.nodes()[to].query(&["CLUSTER", "MYID"]).await.unwrap();
    let slot = slot.to_string();
    for node in [to, 1 - to] {
        let node = &cluster.nodes()[node];
        let _: Value = node.query(&["CLUSTER", "SETSLOT", &slot, "NODE", &id]).await.unwrap();
    }
    let second = group_of(moved, &bob, 1);
    let redirected = mailbox.accept(std::slice::from_ref(&second)).await;
    assert!(matches!(&redirected[0], Err(Error::Away(_))), "{redirected:?}");
    let done = async {
        loop {
            match &mailbox.accept(std::slice::from_ref(&second)).await[0] {
                Ok(GroupOutcome::Done(outcomes)) => return outcomes.clone(),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    let outcomes = tokio::time::timeout(Duration::from_secs(30), done).await.unwrap();
    assert!(matches!(outcomes[..], [AcceptOutcome::Accepted { .. }]), "{outcomes:?}");
    drop(replicas);
}
