//! Devices over TLS with the SDK, and a certificate that is replaced while the node is running.

use std::fs::{File, FileTimes};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use barid_client::{Client, Event, Token};
use barid_testkit::certificates::{Certificate, ONE, TWO};
use barid_testkit::device::PATIENCE;
use barid_testkit::token::token;
use barid_testkit::{Cluster, Role};
use tokio::time::Instant;

const READS: &str = "barid_access_certificate_reads_total";

/// Replaces the node's certificate and key, and keeps the files' times: only SIGHUP tells the node.
fn install(certificate: Certificate, directory: &Path) -> Result<()> {
    for (kind, text) in [("pem", certificate.pem), ("key", certificate.key)] {
        let at = directory.join("tls").with_extension(kind);
        let before = at.metadata().and_then(|metadata| metadata.modified());
        std::fs::write(&at, text)?;
        if let Ok(before) = before {
            let file = File::options().write(true).open(&at)?;
            file.set_times(FileTimes::new().set_modified(before))?;
        }
    }
    Ok(())
}

/// The events of a device, one per line.
type Told = Arc<Mutex<Vec<String>>>;

fn lines(told: &Told) -> Vec<String> {
    told.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// A client of `user` that trusts only this certificate.
fn device(at: SocketAddr, user: &'static str, trusted: Certificate) -> Result<(Client, Told)> {
    let told = Told::default();
    let add = |told: &Told| {
        let told = Arc::clone(told);
        move |line: String| told.lock().unwrap_or_else(PoisonError::into_inner).push(line)
    };
    let (event, shown) = (add(&told), add(&told));
    let client = Client::builder(format!("wss://{at}"))
        .device("phone")
        .root_certificates(trusted.pem)
        .least_loaded("")
        .token(move || async move { Ok(Token::new(token("demo", user, PATIENCE * 10))) })
        .reconnect_between(Duration::from_millis(50), Duration::from_millis(500))
        .on_event(move |told| match told {
            Event::Connected { .. } => event("connected".into()),
            Event::Disconnected { why, .. } => event(format!("disconnected: {why}")),
            _ => (),
        })
        .start(move |message| {
            shown(message.id);
            async { Ok(()) }
        })?;
    Ok((client, told))
}

async fn until(what: &str, told: &Told, wanted: impl Fn(&[String]) -> bool) -> Result<()> {
    let begun = Instant::now();
    while !wanted(&lines(told)) {
        anyhow::ensure!(begun.elapsed() < PATIENCE, "{what}: {:?}", lines(told));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_changed_by_a_signal_and_nobody_is_disconnected() -> Result<()> {
    let directory = tempfile::tempdir()?;
    install(ONE, directory.path())?;
    let file = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    let mut cluster = Cluster::builder()
        .set_of(Role::Access, "tls.certificate_file", file("tls.pem"))
        .set_of(Role::Access, "tls.key_file", file("tls.key"))
        .start()
        .await?;
    let at = cluster.node(Role::Access, 0).address("ws").await?;
    let business = cluster.business()?;
    let (_alice, alice) = device(at, "alice", ONE)?;
    until("alice is welcomed", &alice, |lines| lines == ["connected"]).await?;
    business.send_text("alice", "m1", "over TLS").await?;
    until("alice has m1", &alice, |lines| lines == ["connected", "m1"]).await?;

    install(TWO, directory.path())?;
    // Longer than the interval at which the node checks the files' times.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let access = cluster.node(Role::Access, 0);
    assert_eq!(access.metric(READS).await?, 0.0);
    let asked = access.metrics().await?.sum_of("barid_access_handshakes_total", "result", "nodes");
    assert!(asked >= 1.0, "which node is least loaded is asked over TLS too");
    access.process()?.hang_up()?;
    let begun = Instant::now();
    while access.metric(READS).await? == 0.0 {
        anyhow::ensure!(begun.elapsed() < PATIENCE, "the certificate was not read again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let (_bob, bob) = device(at, "bob", TWO)?;
    until("bob is welcomed", &bob, |lines| lines == ["connected"]).await?;
    let (_carol, carol) = device(at, "carol", ONE)?;
    let refused = |lines: &[String]| lines.iter().any(|line| line.contains("certificate"));
    until("carol trusts the old one only", &carol, refused).await?;
    assert!(!lines(&carol).contains(&"connected".to_owned()), "{:?}", lines(&carol));
    // The first device is still connected.
    for (user, told, all) in [("alice", &alice, 3), ("bob", &bob, 2)] {
        business.send_text(user, "m2", "under the new one").await?;
        until(user, told, |lines| lines.len() == all && lines.last().is_some_and(|id| id == "m2"))
            .await?;
    }
    Ok(())
}
