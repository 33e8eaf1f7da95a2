//! TLS on the devices' port, and a certificate that changes while devices are connected.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use barid_testkit::certificates::trusting;
use barid_testkit::raw::*;
use barid_testkit::relay::Relay;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::support::*;

const HANDSHAKES: &str = "barid_access_handshakes_total";
const READS: &str = "barid_access_certificate_reads_total";

/// A certificate of these tests, and its key.
fn files(name: &str) -> [String; 2] {
    let place = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/node/certificates");
    [format!("{place}/{name}.pem"), format!("{place}/{name}.key")]
}

/// Puts one where the node looks.
fn install(name: &str, directory: &Path) -> Result<()> {
    for (from, to) in files(name).iter().zip(["tls.pem", "tls.key"]) {
        std::fs::copy(from, directory.join(to))?;
    }
    Ok(())
}

/// Configures the certificate that [`install`] puts there.
fn installed_in(directory: &Path, config: &mut barid_access::Config) {
    config.tls.certificate_file = Some(directory.join("tls.pem"));
    config.tls.key_file = Some(directory.join("tls.key"));
}

async fn node(world: &World, directory: &Path) -> Result<Node> {
    world
        .node_with(|config| {
            installed_in(directory, config);
        })
        .await
}

/// Connects a client that trusts this certificate and no other.
async fn connect(node: &Node, name: &str) -> Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(node.addresses["ws"]).await?;
    secured(stream, name).await
}

async fn secured(stream: TcpStream, name: &str) -> Result<TlsStream<TcpStream>> {
    let config = trusting(&std::fs::read_to_string(&files(name)[0])?)?;
    let server = ServerName::try_from(format!("{name}.test"))?;
    Ok(TlsConnector::from(config).connect(server, stream).await?)
}

/// Sends a handshake of a user, reads its answer, says Hello and reads the first byte of Welcome.
async fn session(stream: &mut TlsStream<TcpStream>, user: &str) -> Result<()> {
    let path = format!("/v1/connect?token={}", token_of(user));
    let protocol = "Sec-WebSocket-Protocol: barid.v1.json\r\n";
    stream.write_all(request(&path, protocol).as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    anyhow::ensure!(head.starts_with(b"HTTP/1.1 101"), "{}", head.escape_ascii());
    stream.write_all(&frame(TEXT, r#"{"hello":{"device":"phone"}}"#)).await?;
    expect(stream, "welcome").await
}

/// A frame that holds this text.
async fn expect(stream: &mut TlsStream<TcpStream>, text: &str) -> Result<()> {
    let mut bytes = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&bytes).contains(text) {
            let mut some = [0; 1024];
            let read = stream.read(&mut some).await?;
            anyhow::ensure!(read > 0, "the end instead of {text}");
            bytes.extend_from_slice(&some[..read]);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(barid_testkit::device::PATIENCE, reading).await.context("nothing")?
}

#[tokio::test]
async fn a_certificate_is_replaced_without_a_restart_and_sessions_go_on() -> Result<()> {
    let world = World::new().await?;
    let directory = tempfile::tempdir()?;
    install("one", directory.path())?;
    let node = node(&world, directory.path()).await?;
    let expires = node.metric("barid_access_certificate_expires_timestamp_seconds", "");
    assert_eq!(expires, 4_948_889_510.0, "2126-10-28, as openssl x509 -enddate shows it");
    let mut before = connect(&node, "one").await?;
    session(&mut before, "alice").await?;
    assert!(connect(&node, "two").await.is_err(), "it is the other one's");

    // Half of a change, or nonsense: the last good one stays.
    std::fs::write(directory.path().join("tls.pem"), "nonsense")?;
    eventually("it was looked at", async || Ok(node.metric(READS, "failed") >= 1.0)).await?;
    session(&mut connect(&node, "one").await?, "bob").await?;
    install("two", directory.path())?;
    eventually("the new one is served", async || Ok(connect(&node, "two").await.is_ok())).await?;
    assert!(node.metric(READS, "read") >= 1.0);
    assert!(connect(&node, "one").await.is_err());
    session(&mut connect(&node, "two").await?, "carol").await?;

    // Devices connected before are still connected, and receive messages.
    let (entry, _) = world.accept("alice", "m1").await?;
    node.dispatcher().await?.push(&world, "alice", entry).await?;
    expect(&mut before, "text of m1").await
}

#[tokio::test]
async fn hazard_107_a_certificate_that_is_replaced_while_redis_is_away_is_served() -> Result<()> {
    let mut world = World::new().await?;
    let directory = tempfile::tempdir()?;
    install("one", directory.path())?;
    world.redis.kill()?;
    let mut config = config(&world.redis);
    installed_in(directory.path(), &mut config);
    let starting = tokio::spawn(Node::start(config));
    tokio::time::sleep(Duration::from_secs(1)).await;
    install("two", directory.path())?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.redis.restart().await?;
    let node = starting.await??;
    eventually("the new one is served", async || Ok(connect(&node, "two").await.is_ok())).await
}

/// Opens a session through a relay.
async fn far_away(relay: SocketAddr, user: &str) -> Result<TlsStream<TcpStream>> {
    let mut stream = secured(TcpStream::connect(relay).await?, "one").await?;
    session(&mut stream, user).await?;
    Ok(stream)
}

/// Connects clients that are 200 ms away, all at once; each tries again until it has a session. Returns how long each
/// took, except those that had none after `time`.
async fn storm(node: &Node, clients: usize, time: Duration) -> Result<Vec<Duration>> {
    let relay = Relay::delayed(node.addresses["ws"], Duration::from_millis(100)).await?;
    let (address, begun) = (relay.address(), Instant::now());
    let mut storm = tokio::task::JoinSet::new();
    for client in 0..clients {
        storm.spawn(timeout(time, async move {
            loop {
                if let Ok(stream) = far_away(address, &format!("u{client}")).await {
                    return (begun.elapsed(), stream);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }));
    }
    let mut open = Vec::new();
    while let Some(ended) = storm.join_next().await {
        open.extend(ended?.ok());
    }
    Ok(open.iter().map(|(after, _)| *after).collect())
}

#[tokio::test]
async fn hazard_129_a_tls_handshake_keeps_its_place_for_a_round_trip() -> Result<()> {
    let world = World::new().await?;
    let directory = tempfile::tempdir()?;
    install("one", directory.path())?;
    let node = world
        .node_with(|config| {
            installed_in(directory.path(), config);
            config.limits.handshakes_max = 8;
        })
        .await?;
    // Newcomers that send nothing take each place after 320 ms, while a client is 600 ms away.
    let address = node.addresses["ws"];
    let newcomers = tokio::spawn(async move {
        let mut held = std::collections::VecDeque::new();
        loop {
            held.extend(TcpStream::connect(address).await);
            if held.len() > 50 {
                held.pop_front();
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    });
    eventually("all places are taken", async || {
        Ok(node.metric("barid_access_limits_total", "evicted") > 0.0)
    })
    .await?;
    let relay = Relay::delayed(address, Duration::from_millis(300)).await?;
    let mut attempts = 1;
    while let Err(error) = far_away(relay.address(), "alice").await {
        assert!(attempts < 5, "{error}");
        attempts += 1;
    }
    newcomers.abort();
    let _ = newcomers.await;
    // Eight places of 200 ms each: 40 a second at most.
    let mut sessions = storm(&node, 30, Duration::from_secs(60)).await?;
    sessions.sort_unstable();
    println!(
        "after {attempts} attempts; {} in, the last after {:?}",
        sessions.len(),
        sessions.last()
    );
    assert_eq!(sessions.len(), 30, "the last after {:?}", sessions.last());
    Ok(())
}

#[tokio::test]
async fn hazard_141_half_a_hello_and_too_many_connections_block_their_address_with_tls_too()
-> Result<()> {
    let world = World::new().await?;
    let directory = tempfile::tempdir()?;
    install("one", directory.path())?;
    let with = async |change: fn(&mut barid_access::config::LimitsConfig)| {
        world
            .node_with(|config| {
                installed_in(directory.path(), config);
                config.limits.address_refusals_max = 4;
                config.limits.block_seconds = 60;
                change(&mut config.limits);
            })
            .await
    };
    let node = with(|limits| limits.handshake_timeout_ms = 1_500).await?;
    let mut held = Vec::new();
    // Those that send nothing do not count.
    for bytes in [&[][..]; 6].into_iter().chain([&[0x16, 3, 1, 2, 0, 1][..]; 6]) {
        let mut stream = TcpStream::connect(node.addresses["ws"]).await?;
        stream.write_all(bytes).await?;
        held.push(stream);
        if held.len() % 6 == 0 {
            eventually("they are late", async || {
                Ok(node.metric(HANDSHAKES, "timeout") == held.len() as f64)
            })
            .await?;
            assert_eq!(connect(&node, "one").await.is_ok(), held.len() == 6);
        }
    }
    let node = with(|limits| limits.address_connections_max = 1).await?;
    let mut only = connect(&node, "one").await?;
    session(&mut only, "alice").await?;
    for _ in 0..10 {
        assert!(connect(&node, "one").await.is_err());
    }
    assert_eq!(node.metric("barid_access_limits_total", "address_connections"), 6.0);
    assert_eq!(node.metric(HANDSHAKES, "blocked"), 4.0, "one refusal more for its session");
    Ok(())
}

#[tokio::test]
async fn who_speaks_no_tls_there_is_counted_and_harms_nobody() -> Result<()> {
    let world = World::new().await?;
    let directory = tempfile::tempdir()?;
    install("one", directory.path())?;
    let node = node(&world, directory.path()).await?;
    let answer = http(node.addresses["ws"], request("/v1/connect", "").as_bytes()).await?;
    assert!(!answer.starts_with("HTTP"), "{answer}");
    assert_eq!(node.metric(HANDSHAKES, "tls"), 1.0);
    let mut stream = connect(&node, "one").await?;
    session(&mut stream, "alice").await?;
    // Refusals are readable.
    let mut other = connect(&node, "one").await?;
    other.write_all(request("/elsewhere", "").as_bytes()).await?;
    let mut answer = String::new();
    let _ = other.read_to_string(&mut answer).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    Ok(())
}

#[tokio::test]
async fn a_balancer_names_the_client_before_tls_begins() -> Result<()> {
    let world = World::new().await?;
    let directory = tempfile::tempdir()?;
    install("one", directory.path())?;
    let node = world
        .node_with(|config| {
            installed_in(directory.path(), config);
            config.proxy.trusted = vec!["127.0.0.1".into()];
            config.proxy.protocol = true;
            config.limits.address_connections_max = 1;
        })
        .await?;
    let open = async |client: &str| {
        let mut stream = TcpStream::connect(node.addresses["ws"]).await?;
        let header = format!("PROXY TCP4 {client} 198.51.100.1 4711 443\r\n");
        stream.write_all(header.as_bytes()).await?;
        secured(stream, "one").await
    };
    let mut first = open("192.0.2.1").await?;
    session(&mut first, "alice").await?;
    assert!(open("192.0.2.1").await.is_err(), "hung up on");
    assert_eq!(node.metric("barid_access_limits_total", "address_connections"), 1.0);
    session(&mut open("192.0.2.2").await?, "bob").await
}

#[test]
fn files_that_do_not_serve_refuse_to_start() {
    use barid_access::Access;
    use barid_runtime::Role as _;
    let mut config = barid_access::Config::default();
    config.auth.keys = vec![barid_access::config::KeyConfig {
        secret: barid_core::Secret::new(barid_testkit::token::SECRET),
        ..Default::default()
    }];
    let ([one, one_key], [_, two_key]) = (files("one"), files("two"));
    config.tls.certificate_file = Some(one.clone().into());
    let error = Access::check(&config).unwrap_err();
    assert_eq!(error, "tls.certificate_file and tls.key_file belong together");
    for (certificate, key, expected) in [
        ("/nowhere.pem", &*one_key, "tls.certificate_file /nowhere.pem"),
        (&*one_key, &*one_key, "tls.certificate_file"),
        (&*one, "/nowhere.key", "tls.key_file /nowhere.key"),
        (&*one, &*two_key, "tls.key_file"),
    ] {
        config.tls.certificate_file = Some(certificate.into());
        config.tls.key_file = Some(key.into());
        let error = Access::check(&config).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }
    config.tls.key_file = Some(one_key.into());
    assert_eq!(Access::check(&config), Ok(()));
}
