//! A master under Sentinel.

use std::time::Duration;

use barid_mailbox::{NodeRole, NodeTable, RedisConfig, TrackedRoutes};
use barid_runtime::SecretUrl;
use barid_testkit::{Redis, Sentinel};
use redis::FromRedisValue;

use crate::support::{config, open, until};

async fn query<T: FromRedisValue>(url: &str, command: &[&str]) -> T {
    let client = redis::Client::open(url).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd(command[0]).arg(&command[1..]).query_async(&mut connection).await.unwrap()
}

/// Every kind of connection that Barid has: calls, the tracked one, the subscriber.
#[tokio::test]
async fn sentinels_are_asked_with_their_password_and_the_master_with_its_own() {
    let redis = Redis::start().await.unwrap();
    let sentinel = Sentinel::start(&redis).await.unwrap();
    let with = |url: String, password: &str| url.replace("//", &format!("//:{password}@"));
    let () =
        query(&sentinel.url(), &["SENTINEL", "SET", "main", "auth-pass", "of-the-master"]).await;
    let all = ["ACL", "SETUSER", "default", "resetpass", ">of-sentinels"];
    let () = query(&sentinel.url(), &all).await;
    let () = redis.query(&["CONFIG", "SET", "requirepass", "of-the-master"]).await.unwrap();
    let master = with(redis.url(), "of-the-master");
    let config = RedisConfig {
        sentinel_master: "main".into(),
        sentinels: vec![SecretUrl::new(with(sentinel.url(), "of-sentinels"))],
        ..config(&master)
    };
    let mailbox = open(&config).await;
    mailbox.nodes().await.unwrap();
    let _table = NodeTable::watch(&mailbox, NodeRole::Access, Duration::from_secs(60));
    let routes = TrackedRoutes::open(&config).await.unwrap();
    until("routes are tracked", async || *routes.tracking().borrow()).await;
    until("the subscriber is there", async || {
        !query::<Vec<String>>(&master, &["PUBSUB", "CHANNELS"]).await.is_empty()
    })
    .await;
}
