//! Mutual TLS between roles, and the bounds of the port on which roles are called.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use barid_core::{Incarnation, NodeId, Shard, ShardCount};
use barid_mesh::{
    Credentials, DispatchPool, GrpcConfig, InternalTlsConfig, MeshConfig, MeshMetrics, Party, Peer,
    Server, dial,
};
use barid_runtime::Context;
use barid_testkit::certificates::Authority;
use barid_testkit::grpc::FakeDispatcher;
use barid_wire::internal::dispatcher_client::DispatcherClient;
use barid_wire::internal::dispatcher_server::DispatcherServer;
use barid_wire::internal::{DispatchBatch, DispatchReply, Push, Resend, ResendDevice};
use prometheus::Registry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;

const SOON: Duration = Duration::from_secs(5);

/// Writes the files of a role whose certificate is valid for `names`.
fn files(dir: &Path, authority: &Authority, names: &[&str]) -> InternalTlsConfig {
    let issued = authority.issue_for(names).unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    };
    InternalTlsConfig {
        ca_file: file("ca.pem", &authority.pem()),
        certificate_file: file("own.pem", &issued.pem),
        key_file: file("own.key", &issued.key),
    }
}

fn credentials(authority: &Authority, party: Party) -> Credentials {
    let dir = tempfile::tempdir().unwrap();
    Credentials::read(&files(dir.path(), authority, &[party.dns_name()]), party).unwrap()
}

struct Dispatcher {
    address: SocketAddr,
    registry: Registry,
}

impl Dispatcher {
    /// A dispatcher that answers every batch.
    async fn start(credentials: Credentials, config: GrpcConfig) -> Self {
        let registry = Registry::new();
        let server = Server::new(config, credentials, &registry).unwrap();
        let fake = FakeDispatcher::new(|batch| {
            Some(DispatchReply { batch: batch.batch, ..Default::default() })
        });
        let callers = server.only(&[Party::Purger, Party::Delayer]);
        let routes = Routes::new(DispatcherServer::with_interceptor(fake, callers));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(server.serve(listener, routes, |server| server, std::future::pending()));
        Self { address, registry }
    }

    async fn of(authority: &Authority) -> Self {
        Self::start(credentials(authority, Party::Dispatcher), GrpcConfig::default()).await
    }

    /// Calls it once; returns how that failed.
    async fn called_by(&self, caller: &Credentials, peer: Party) -> Result<(), String> {
        let address = self.address.to_string();
        let channel = dial(caller, peer, &address, SOON, |endpoint| endpoint).await?;
        let (batches, outbound) = mpsc::channel(1);
        batches.send(DispatchBatch { batch: 1, ..Default::default() }).await.unwrap();
        let mut client = DispatcherClient::new(channel);
        let answered = timeout(SOON, async {
            client.dispatch(ReceiverStream::new(outbound)).await?.into_inner().message().await
        });
        match answered.await.map_err(|_| "no answer")? {
            Ok(_) => Ok(()),
            Err(status) => Err(format!("{}: {}", status.code(), status.message())),
        }
    }

    fn metric(&self, name: &str, label: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name).unwrap();
        let found = family
            .get_metric()
            .iter()
            .find(|metric| metric.get_label().iter().all(|pair| pair.value() == label))
            .unwrap();
        found.get_counter().get_value() + found.get_gauge().get_value()
    }

    async fn until(&self, name: &str, label: &str, value: f64) {
        let begun = Instant::now();
        while (self.metric(name, label) - value).abs() > 0.1 {
            assert!(begun.elapsed() < SOON, "{name} {label} is {}", self.metric(name, label));
            sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn hazard_130_only_roles_with_a_certificate_of_the_cluster_may_call() {
    let authority = Authority::new().unwrap();
    let dispatcher = Dispatcher::of(&authority).await;
    for party in [Party::Purger, Party::Delayer] {
        dispatcher.called_by(&credentials(&authority, party), Party::Dispatcher).await.unwrap();
    }
    for party in [Party::Access, Party::Dispatcher, Party::Operator] {
        let caller = credentials(&authority, party);
        let error = dispatcher.called_by(&caller, Party::Dispatcher).await.unwrap_err();
        let (is, needed) = (party.as_str(), "purger or delayer");
        assert!(
            error.contains(&format!("your certificate is for {is}; needed: {needed}")),
            "{error}"
        );
    }
    assert_eq!(dispatcher.metric("barid_grpc_denied_total", ""), 3.0);
    let error = dispatcher.called_by(&Credentials::none(), Party::Dispatcher).await;
    assert!(error.is_err(), "plain text");
    let stranger = credentials(&Authority::new().unwrap(), Party::Purger);
    let error = dispatcher.called_by(&stranger, Party::Dispatcher).await.unwrap_err();
    assert!(error.contains("another authority has signed the certificate"), "{error}");
    dispatcher.until("barid_grpc_accepts_total", "failed", 2.0).await;
}

#[tokio::test]
async fn hazard_130_a_caller_checks_that_it_reached_the_right_role() {
    let authority = Authority::new().unwrap();
    let dispatcher = Dispatcher::of(&authority).await;
    let purger = credentials(&authority, Party::Purger);
    let error = dispatcher.called_by(&purger, Party::Access).await.unwrap_err();
    assert!(error.contains("access.barid.internal"), "{error}");
    let plain = Dispatcher::start(Credentials::none(), GrpcConfig::default()).await;
    assert!(plain.called_by(&purger, Party::Dispatcher).await.is_err(), "a port without TLS");
}

/// The credentials of an access node whose certificate has these names.
fn access_named(authority: &Authority, names: &[&str]) -> Credentials {
    let dir = tempfile::tempdir().unwrap();
    let config = files(dir.path(), authority, names);
    Credentials::read(&config, Party::Access).unwrap()
}

#[tokio::test]
async fn hazard_144_a_wildcard_names_no_role() {
    let authority = Authority::new().unwrap();
    let dispatcher = Dispatcher::of(&authority).await;
    let access = Party::Access.dns_name();
    // The certificate of an access node, with a wildcard beside its name.
    let wild = access_named(&authority, &[access, "*.barid.internal"]);
    let error = dispatcher.called_by(&wild, Party::Dispatcher).await.unwrap_err();
    assert!(error.contains("your certificate is for access; needed: purger"), "{error}");
    let wild = Dispatcher::start(wild, GrpcConfig::default()).await;
    let purger = credentials(&authority, Party::Purger);
    let error = wild.called_by(&purger, Party::Dispatcher).await.unwrap_err();
    assert!(error.contains("does not name dispatcher.barid.internal"), "{error}");
    // Alone it is refused at start.
    let dir = tempfile::tempdir().unwrap();
    let config = files(dir.path(), &authority, &["*.barid.internal"]);
    let error = Credentials::read(&config, Party::Dispatcher).unwrap_err();
    assert!(error.contains("dispatcher.barid.internal in full"), "{error}");
    // The case of a name does not matter.
    let upper = access_named(&authority, &["ACCESS.Barid.internal", "Purger.barid.INTERNAL"]);
    dispatcher.called_by(&upper, Party::Dispatcher).await.unwrap();
}

#[tokio::test]
async fn certificates_are_replaced_while_streams_stay_open() {
    let (old, new) = (Authority::new().unwrap(), Authority::new().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let names = [Party::Dispatcher.dns_name()];
    let config = files(dir.path(), &old, &names);
    let context = Context::new();
    let own = Credentials::read(&config, Party::Dispatcher).unwrap();
    tokio::spawn(own.keep_fresh(&context).unwrap());
    let dispatcher = Dispatcher::start(own, GrpcConfig::default()).await;
    let metrics = MeshMetrics::new(&Registry::new(), "test").unwrap();
    let peers = watch::Sender::new(vec![Peer {
        id: NodeId::new("d").unwrap(),
        incarnation: Incarnation(1),
        address: dispatcher.address.to_string(),
        draining: false,
    }]);
    let purger = credentials(&old, Party::Purger);
    let pool =
        DispatchPool::over(peers.subscribe(), purger.clone(), MeshConfig::default(), metrics);
    let pool = pool.unwrap();
    let resend = || Resend {
        app: "demo".into(),
        user: "alice".into(),
        devices: vec![ResendDevice { device: "phone".into(), ..Default::default() }],
    };
    pool.resend(shard(), resend()).await.unwrap();

    // A file that is broken for a while leaves the last good ones.
    std::fs::write(config.ca_file.as_ref().unwrap(), "no certificate").unwrap();
    until_read(&context, "failed", 1.0).await;
    dispatcher.called_by(&purger, Party::Dispatcher).await.unwrap();
    files(dir.path(), &new, &names);
    until_read(&context, "read", 1.0).await;
    assert!(dispatcher.called_by(&purger, Party::Dispatcher).await.is_err(), "the old authority");
    let renewed = credentials(&new, Party::Purger);
    dispatcher.called_by(&renewed, Party::Dispatcher).await.unwrap();
    pool.push(shard(), Push { app: "demo".into(), user: "a".into(), ..Default::default() }).await;
    pool.resend(shard(), resend()).await.unwrap();
}

async fn until_read(context: &Context, result: &str, count: f64) {
    let begun = Instant::now();
    loop {
        let families = context.metrics.gather();
        let reads = families.iter().find(|f| f.name() == "barid_internal_certificate_reads_total");
        let metrics = reads.unwrap().get_metric().to_vec();
        let found = metrics.iter().find(|m| m.get_label()[0].value() == result).unwrap();
        if found.get_counter().get_value() >= count {
            return;
        }
        assert!(begun.elapsed() < SOON, "the files are not read again: {result}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn shard() -> Shard {
    ShardCount::new(64).unwrap().shard_of("demo", "alice")
}

#[test]
fn files_that_peers_would_refuse_are_refused_at_start() {
    let authority = Authority::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let refused = |config: &InternalTlsConfig, party| Credentials::read(config, party).unwrap_err();
    let config = files(dir.path(), &authority, &[Party::Purger.dns_name()]);
    let told = refused(&config, Party::Access);
    let problem = "peers with this ca_file refuse it as access.barid.internal";
    assert!(
        told.starts_with("internal_tls.certificate_file /") && told.contains(problem),
        "{told}"
    );
    let half = InternalTlsConfig { key_file: None, ..config.clone() };
    assert!(refused(&half, Party::Purger).contains("write all three"));
    std::fs::write(dir.path().join("ca.pem"), Authority::new().unwrap().pem()).unwrap();
    assert!(refused(&config, Party::Purger).contains("another authority has signed"));
    let other = authority.issue_for(&[Party::Purger.dns_name()]).unwrap();
    std::fs::write(dir.path().join("ca.pem"), authority.pem()).unwrap();
    std::fs::write(dir.path().join("own.key"), other.key).unwrap();
    assert!(refused(&config, Party::Purger).starts_with("internal_tls.key_file /"));
}

#[test]
fn hazard_130_a_port_for_other_machines_needs_tls_or_the_word_insecure() {
    let check = |listen: &str, insecure, tls: &InternalTlsConfig| {
        let config = GrpcConfig { insecure, ..Default::default() };
        config.check("grpc_listen", listen.parse().unwrap(), tls)
    };
    let none = InternalTlsConfig::default();
    for loopback in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        assert_eq!(check(loopback, false, &none), Ok(()));
    }
    for open in ["0.0.0.0:7081", "[::]:7081", "10.0.0.7:7081", "[::ffff:10.0.0.7]:7081"] {
        let told = check(open, false, &none).unwrap_err();
        assert!(
            told.starts_with("grpc_listen: other machines reach ") && told.contains("insecure")
        );
        assert_eq!(check(open, true, &none), Ok(()));
        let tls = InternalTlsConfig { ca_file: Some("ca.pem".into()), ..Default::default() };
        assert_eq!(check(open, false, &tls), Ok(()));
    }
}

/// Opens `count` connections that send `text` and then nothing; returns when all were closed.
async fn silent(address: SocketAddr, count: usize, text: &[u8]) {
    let mut streams = Vec::new();
    for _ in 0..count {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text).await.unwrap();
        streams.push(stream);
    }
    for mut stream in streams {
        // An alert of TLS may precede the end.
        let ended = timeout(SOON, stream.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "a silent connection stays");
    }
}

#[tokio::test]
async fn hazard_131_silent_connections_end_and_others_are_served_meanwhile() {
    let authority = Authority::new().unwrap();
    let config = GrpcConfig { handshake_timeout_ms: 500, ..Default::default() };
    let tls = Dispatcher::start(credentials(&authority, Party::Dispatcher), config.clone()).await;
    let plain = Dispatcher::start(Credentials::none(), config).await;
    let purger = credentials(&authority, Party::Purger);
    for (dispatcher, caller) in [(&tls, purger), (&plain, Credentials::none())] {
        let silent = async {
            silent(dispatcher.address, 300, b"").await;
            silent(dispatcher.address, 300, b"PRI * HTTP").await;
        };
        let honest = async {
            for _ in 0..20 {
                dispatcher.called_by(&caller, Party::Dispatcher).await.unwrap();
                sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::join!(silent, honest);
        dispatcher.until("barid_grpc_connections", "", 0.0).await;
    }
    silent(plain.address, 1, b"GET / HTTP/1.1\r\n\r\n").await;
    plain.until("barid_grpc_accepts_total", "failed", 1.0).await;
}

#[tokio::test]
async fn hazard_131_connections_and_calls_are_bounded() {
    let config = GrpcConfig { connections_max: 3, streams_max: 2, ..Default::default() };
    let dispatcher = Dispatcher::start(Credentials::none(), config).await;
    let address = dispatcher.address.to_string();
    let plain = Credentials::none();
    let mut channels = Vec::new();
    for _ in 0..3 {
        let dialed = dial(&plain, Party::Dispatcher, &address, SOON, |endpoint| endpoint).await;
        channels.push(dialed.unwrap());
    }
    dispatcher.until("barid_grpc_connections", "", 3.0).await;
    assert!(dispatcher.called_by(&plain, Party::Dispatcher).await.is_err(), "a fourth");
    assert!(dispatcher.metric("barid_grpc_accepts_total", "over_limit") >= 1.0);
    // A third call of one connection waits for another to end.
    let mut client = DispatcherClient::new(channels.pop().unwrap());
    let mut open = Vec::new();
    for _ in 0..2 {
        let (batches, outbound) = mpsc::channel::<DispatchBatch>(1);
        let call = timeout(SOON, client.dispatch(ReceiverStream::new(outbound))).await;
        open.push((batches, call.unwrap().unwrap()));
    }
    let (batches, outbound) = mpsc::channel::<DispatchBatch>(1);
    let third = client.dispatch(ReceiverStream::new(outbound));
    tokio::pin!(third);
    assert!(timeout(Duration::from_millis(300), &mut third).await.is_err(), "a third call");
    drop(open);
    timeout(SOON, third).await.unwrap().unwrap();
    drop((batches, channels));
}
