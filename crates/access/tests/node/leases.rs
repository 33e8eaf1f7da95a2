//! Effect of a node's lease on its sessions, on a redis-server and on a Redis Cluster of three masters.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use barid_access::Config;
use barid_core::Incarnation;
use barid_mailbox::{Mailbox, NodeRole, NodeTable, RedisConfig};
use barid_runtime::SecretUrl;
use barid_testkit::{Device, RedisCluster};
use barid_wire::internal::NodePush;

use crate::support::{APP, Node, World, config, eventually, user_key};

/// Users enough for each master to have some.
const USERS: usize = 30;
/// Additional time allowed on a busy machine.
const SLACK: Duration = Duration::from_secs(3);

async fn incarnation(mailbox: &Mailbox, user: &str) -> Result<Incarnation> {
    let routes = mailbox.read_routes(&user_key(user)).await?;
    Ok(routes.first().context("a route")?.session.incarnation)
}

#[tokio::test]
async fn hazard_27_a_lease_that_was_gone_leaves_the_life_and_has_sessions_confirmed() -> Result<()>
{
    let world = World::new().await?;
    let node = world.node_with(|config| config.lease_ttl_ms = 1500).await?;
    let mut phone = node.device("alice", "phone").await?;
    let before = incarnation(&world.mailbox, "alice").await?;
    for pattern in ["barid:node:*", "*:r:demo:alice"] {
        let keys: Vec<String> = world.redis.query(&["KEYS", pattern]).await?;
        let _: i64 = world.redis.query(&["DEL", &keys[0]]).await?;
    }
    world.routes_become("alice", 1).await?;
    assert_eq!(incarnation(&world.mailbox, "alice").await?, before);
    let (entry, _) = world.accept("alice", "m1").await?;
    assert!(node.dispatcher().await?.push(&world, "alice", entry).await?.gone.is_empty());
    assert_eq!(phone.receive(1).await?, ["m1"]);
    world.cursor_becomes("alice", "phone", 1).await
}

#[tokio::test]
async fn hazard_82_a_node_that_drains_confirms_sessions_that_redis_forgot() -> Result<()> {
    let world = World::new().await?;
    let node = world.node_with(|config| config.lease_ttl_ms = 1500).await?;
    let mut phones = Vec::new();
    for n in 0..4 {
        phones.push(node.device(&format!("u{n}"), "phone").await?);
    }
    // Each is told to go 6 s after the one before.
    node.context.shutdown.begin(Duration::from_secs(40));
    let _: String = world.redis.query(&["FLUSHALL"]).await?;
    eventually("those who wait for their turn have routes", async || {
        let mut routes = 0;
        for n in 0..4 {
            routes += world.mailbox.read_routes(&user_key(&format!("u{n}"))).await?.len();
        }
        Ok(routes >= 3)
    })
    .await
}

#[tokio::test]
async fn hazard_13_a_long_lapse_begins_another_life_in_which_sessions_live_on() -> Result<()> {
    let mut world = World::new().await?;
    let slow = |config: &mut Config| {
        (config.lease_ttl_ms, config.void_after_seconds) = (1_500, 6);
        // Tells sessions confirmed early from those confirmed late.
        config.sync.confirms_per_second = 10;
    };
    let node = world.node_with(slow).await?;
    let mut phones = Vec::new();
    for n in 0..USERS {
        phones.push(node.device(&format!("u{n}"), "phone").await?);
    }
    let before = incarnation(&world.mailbox, "u0").await?;
    let table = NodeTable::watch(&world.mailbox, NodeRole::Access, Duration::from_millis(50));
    eventually("the table shows the node", async || Ok(!table.snapshot().is_empty())).await?;
    let id = table.snapshot()[0].id.clone();
    world.redis.stop()?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    world.redis.cont()?;
    let listed = || table.snapshot().first().map(|node| (node.incarnation, node.confirmed));
    eventually("another incarnation", async || Ok(listed().is_some_and(|(now, _)| now != before)))
        .await?;
    // A route of the former incarnation leads to the session as well, and is not void.
    let mut dispatcher = node.dispatcher().await?;
    for (n, phone) in phones.iter_mut().enumerate().rev() {
        let user = format!("u{n}");
        let (envelope, _) = world.accept(&user, "m1").await?;
        let void = table.void_since(&id, before);
        let route = world.inspect(&user).await?.routes.remove(0);
        if route.session.incarnation == before {
            assert_eq!(void, None);
        }
        let push = NodePush {
            app: APP.into(),
            user,
            envelope,
            connections: vec![route.session.connection.0],
            dispatched_after_us: None,
        };
        assert!(dispatcher.send(before.0, vec![push], vec![]).await?.gone.is_empty());
        assert_eq!(phone.receive(1).await?, ["m1"]);
    }
    eventually("all are confirmed", async || Ok(listed().is_some_and(|(_, done)| done))).await?;
    for n in 0..USERS {
        assert_ne!(incarnation(&world.mailbox, &format!("u{n}")).await?, before);
    }
    assert_eq!(table.void_since(&id, before), Some(Duration::MAX));
    Ok(())
}

/// A node on a Redis Cluster of three masters, and a device of each user on it.
struct Three {
    cluster: RedisCluster,
    /// Its mailbox is the cluster's.
    world: World,
    node: Node,
    phones: Vec<Device>,
}

impl Three {
    async fn start(change: impl FnOnce(&mut Config)) -> Result<Self> {
        let cluster = RedisCluster::start(3).await?;
        let urls = cluster.urls();
        let redis = RedisConfig {
            url: SecretUrl::new(&urls[0]),
            urls: urls[1..].iter().map(SecretUrl::new).collect(),
            cluster: true,
            ..RedisConfig::default()
        };
        let mut config = config(&cluster.nodes()[0]);
        config.redis = redis;
        change(&mut config);
        let mut world = World::new().await?;
        world.mailbox = Mailbox::open(&config.redis, &prometheus::Registry::new()).await?;
        let node = Node::start(config).await?;
        let mut phones = Vec::new();
        for n in 0..USERS {
            phones.push(node.device(&format!("u{n}"), "phone").await?);
        }
        Ok(Self { cluster, world, node, phones })
    }

    async fn with_routes(&self) -> Result<usize> {
        let mut count = 0;
        for n in 0..USERS {
            count += self.world.mailbox.read_routes(&user_key(&format!("u{n}"))).await?.len();
        }
        Ok(count)
    }
}

#[tokio::test]
async fn hazard_35_quiet_users_of_a_master_that_was_emptied_are_reached_within_two_renewals()
-> Result<()> {
    let renewal = Duration::from_secs(2);
    let paced = 20;
    let mut three = Three::start(|config| {
        config.lease_ttl_ms = 3 * renewal.as_millis() as u64;
        config.sync.confirms_per_second = paced;
    })
    .await?;
    ensure!(three.with_routes().await? == USERS);
    let mut dispatcher = three.node.dispatcher().await?;
    for master in 0..3 {
        let confirmed = three.node.metric("barid_access_confirms_total", "restored");
        let redis = &three.cluster.nodes()[master];
        let () = redis.query(&["FLUSHALL"]).await?;
        let begun = Instant::now();
        // Sessions are confirmed every ten minutes; nobody sends or acknowledges anything.
        eventually("their routes stand again", async || Ok(three.with_routes().await? == USERS))
            .await?;
        let took = begun.elapsed();
        let restored = three.node.metric("barid_access_confirms_total", "restored") - confirmed;
        ensure!(restored >= 1.0, "no session was on master {master}");
        let bound = 2 * renewal + Duration::from_secs_f64(restored / f64::from(paced)) + SLACK;
        ensure!(took < bound, "{restored} sessions of master {master} took {took:?} of {bound:?}");
        for (n, phone) in three.phones.iter_mut().enumerate() {
            let user = format!("u{n}");
            let shard = three.world.mailbox.shard_of(&user_key(&user));
            if three.cluster.master_of(&format!("{{{shard}}}")).await? == master {
                let (entry, online) = three.world.accept(&user, "m1").await?;
                ensure!(online, "{user} is not online");
                dispatcher.push(&three.world, &user, entry).await?;
                ensure!(phone.receive(1).await? == ["m1"]);
            }
        }
    }
    for phone in &mut three.phones {
        phone.expect_silence(Duration::from_millis(1)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn hazard_27_no_master_that_is_away_makes_sessions_void() -> Result<()> {
    let mut three = Three::start(|config| {
        (config.lease_ttl_ms, config.redis.response_timeout_ms) = (2_000, 500);
    })
    .await?;
    let table = NodeTable::watch(&three.world.mailbox, NodeRole::Access, Duration::from_millis(50));
    eventually("the table shows the node", async || Ok(!table.snapshot().is_empty())).await?;
    let node = table.snapshot()[0].clone();
    for master in 0..3 {
        three.cluster.node(master).stop()?;
        for _ in 0..120 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            ensure!(table.void_since(&node.id, node.incarnation).is_none(), "void: {master} away");
            ensure!(table.snapshot().len() == 1, "not seen while master {master} is away");
        }
        three.cluster.node(master).cont()?;
        eventually("it answers", async || Ok(three.world.mailbox.ping().await.is_ok())).await?;
    }
    for n in 0..USERS {
        let now = incarnation(&three.world.mailbox, &format!("u{n}")).await?;
        ensure!(now == node.incarnation, "another incarnation in the route of u{n}");
    }
    for phone in &mut three.phones {
        phone.expect_silence(Duration::from_millis(1)).await?;
    }
    Ok(())
}
