//! Loops that no outside means can stop while the process runs on: each is wedged by the one thing
//! that it waits for, a session's lock, and `/readyz` is asked as an orchestrator asks it.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use barid_core::Secret;
use barid_runtime::{AdminConfig, SecretUrl, admin};
use barid_testkit::device::PATIENCE;
use barid_testkit::{Device, Redis, http, token};

use super::*;
use crate::config::KeyConfig;

/// A loop that shows no progress for so long is stalled.
const STALLED: Duration = Duration::from_secs(2);

fn config(redis: &Redis) -> Config {
    let local = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut config =
        Config { listen: local, grpc_listen: local, receipts: false, ..Config::default() };
    config.redis.url = SecretUrl::new(redis.url());
    config.heartbeat.interval_seconds = 1;
    config.sync.confirm_interval_seconds = 1;
    let (id, secret) = (token::KEY_ID.into(), Secret::new(token::SECRET));
    config.auth.keys = vec![KeyConfig { id, secret, ..KeyConfig::default() }];
    config
}

/// Waits until `/readyz` fails for exactly these conditions.
async fn fails(admin: SocketAddr, conditions: &[&str]) {
    let begun = Instant::now();
    loop {
        let (_, body) = http::get(admin, "/readyz").await.unwrap();
        let named: Vec<_> =
            body.lines().filter_map(|line| Some(line.split_once(": ")?.0)).collect();
        if named == conditions {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{conditions:?} wanted: {body}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn a_wedged_wheel_and_a_wedged_confirmation_make_the_node_not_ready() {
    let redis = Redis::start().await.unwrap();
    let config = config(&redis);
    let mut context = Context::new();
    context.stalled_after = STALLED;
    admin::serve(&AdminConfig::local(0), "access", &context).unwrap();
    let admin = context.announcements().get("admin").unwrap();
    let wheel = context.progress("wheel", "turn of the heartbeat wheel");
    let confirming = context.progress("confirming", "look at the sessions to confirm");
    let devices = bind("listen", config.listen).await.unwrap();
    let dispatchers = bind("grpc_listen", config.grpc_listen).await.unwrap();
    let there = context.progress("redis", "answer");
    let (node, mut lease) =
        build(&config, &context, &dispatchers, &devices, &there).await.unwrap().unwrap();
    let address = local(&devices);
    let mut tasks = JoinSet::new();
    tasks.spawn(tick(Arc::clone(&node), wheel));
    tasks.spawn(watch_redis(Arc::clone(&node), there));
    let listening = context.progress("listener", "turn of the listener");
    tasks.spawn({
        let node = Arc::clone(&node);
        async move {
            handshake::listen(node, devices, listening).await;
            "the listener"
        }
    });
    tasks.spawn({
        let node = Arc::clone(&node);
        async move {
            keep_lease(&node, &mut lease, &confirming, &config).await;
            "the lease"
        }
    });
    let token = token::token("demo", "alice", Duration::from_secs(600));
    let url = format!("ws://{address}/v1/connect");
    let _phone = Device::connect(&url, &token, "phone").await.unwrap();
    fails(admin, &[]).await;

    let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
    let handle = node.registry.all().remove(0);
    let holder = std::thread::spawn(move || {
        handle.tell(|_| {
            let _ = held.recv();
        });
    });
    fails(admin, &["confirming", "wheel"]).await;
    drop(release);
    holder.join().unwrap();
    fails(admin, &[]).await;
}
