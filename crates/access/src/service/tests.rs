//! Stalled loops. No outside means can stop one of them alone, so each is blocked by what it waits for, a session's
//! lock; then `/readyz` must name it.
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
    let mut config = Config {
        listen: local,
        grpc_listen: local,
        receipts: false,
        revocations: false,
        ..Config::default()
    };
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

/// Starts a node; also returns the address for devices.
async fn start(config: Config, context: Context) -> (Arc<Node>, SocketAddr) {
    admin::serve(&AdminConfig::local(0), "access", &context).unwrap();
    let service = Service::start(config, context.clone()).await.unwrap().unwrap();
    let node = Arc::clone(&service.node);
    tokio::spawn(service.work());
    (node, context.announcements().get("ws").unwrap())
}

#[tokio::test]
async fn a_wedged_wheel_and_a_wedged_confirmation_make_the_node_not_ready() {
    let redis = Redis::start().await.unwrap();
    let mut context = Context::new();
    context.stalled_after = STALLED;
    // The client is not on the runtime that is blocked.
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
