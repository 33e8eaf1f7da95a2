//! Loops that no outside means can stop while the process runs on: each is wedged by the one thing
//! that it waits for, a session's lock, and `/readyz` is asked as an orchestrator asks it.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use barid_core::Secret;
use barid_runtime::{AdminConfig, SecretUrl, admin};
use barid_testkit::device::PATIENCE;
use barid_testkit::{Device, Redis, http, token};
use tokio::runtime::Builder;

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

/// Waits until `/readyz` names these conditions: no others where none is named, else these at least.
/// A worker that blocks may leave nobody to wait for the sockets of its runtime
/// (<https://github.com/tokio-rs/tokio/issues/4730>), and then more of the node stands still.
async fn fails(admin: SocketAddr, conditions: &[&str]) {
    let begun = Instant::now();
    loop {
        let (_, body) = http::get(admin, "/readyz").await.unwrap();
        let named: Vec<_> =
            body.lines().filter_map(|line| Some(line.split_once(": ")?.0)).collect();
        let there = conditions.iter().all(|condition| named.contains(condition));
        if there && named.is_empty() == conditions.is_empty() {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{conditions:?} wanted: {body}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The node as it runs alone, but for its dispatchers; and where devices find it.
async fn start(config: Config, context: Context) -> (Arc<Node>, SocketAddr) {
    admin::serve(&AdminConfig::local(0), "access", &context).unwrap();
    let wheel = context.progress("wheel", "turn of the heartbeat wheel");
    let confirming = context.progress("confirming", "look at the sessions to confirm");
    let devices = Acceptors::bind(&config).unwrap();
    let dispatchers = bind("grpc_listen", config.grpc_listen).await.unwrap();
    let there = context.progress("redis", "answer");
    let address = devices.address();
    let (node, mut lease) =
        build(&config, &context, &dispatchers, address, &there).await.unwrap().unwrap();
    tokio::spawn(tick(Arc::clone(&node), wheel));
    tokio::spawn(watch_redis(Arc::clone(&node), there));
    let listening = context.progress("listener", "turn of the listeners");
    devices.serve(&node, listening).detach_all();
    let kept = Arc::clone(&node);
    tokio::spawn(async move { Keeping::new(&config).run(&kept, &mut lease, &confirming).await });
    (node, address)
}

#[tokio::test]
async fn a_wedged_wheel_and_a_wedged_confirmation_make_the_node_not_ready() {
    let redis = Redis::start().await.unwrap();
    let mut context = Context::new();
    context.stalled_after = STALLED;
    // Who asks is not on the runtime that is wedged.
    let own = Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    let (node, address) = own.spawn(start(config(&redis), context.clone())).await.unwrap();
    let admin = context.announcements().get("admin").unwrap();
    let token = token::token("demo", "alice", Duration::from_secs(600));
    let url = format!("ws://{address}/v1/connect");
    let _phone = Device::connect(&url, &token, "phone").await.unwrap();
    fails(admin, &[]).await;

    let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
    let handle = node.sessions.registry.all().remove(0);
    let holder = std::thread::spawn(move || {
        handle.notify(|_| {
            let _ = held.recv();
        });
    });
    fails(admin, &["confirming", "wheel"]).await;
    drop(release);
    holder.join().unwrap();
    fails(admin, &[]).await;
    own.shutdown_background();
}
