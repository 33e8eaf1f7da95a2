//! A cluster whose roles speak mutual TLS, with the certificates of `barid cluster ca`.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use barid_mesh::{Credentials, InternalTlsConfig, Party, dial};
use barid_testkit::device::PATIENCE;
use barid_testkit::{Cluster, Role, paths};
use barid_wire::internal::access_admin_client::AccessAdminClient;
use barid_wire::internal::access_client::AccessClient;
use barid_wire::internal::access_peer_client::AccessPeerClient;
use barid_wire::internal::{CloseRequest, KickRequest};
use serde_json::Value;
use tonic::Code;

fn barid(args: &[&str]) -> Result<Output> {
    let mut command = Command::new(paths::binary("barid")?);
    // Do not use a running `barid dev`.
    command.arg("--json").args(args).env("BARID_DEV_STATE", "/nonexistent/dev.json");
    command.output().context("running barid")
}

/// The options for the files of a role or an operator, as configuration keys or as flags.
fn files(dir: &Path, name: &str, keys: [&str; 3]) -> [(String, String); 3] {
    let files = ["ca.pem".to_owned(), format!("{name}.pem"), format!("{name}.key")];
    let path = |file: String| dir.join(file).display().to_string();
    let mut files = files.into_iter().map(path);
    keys.map(|key| (key.to_owned(), files.next().unwrap_or_default()))
}

fn kick(cluster: &Cluster, dir: &Path, name: &str) -> Result<(bool, String)> {
    let flags = files(dir, name, ["--ca-file", "--certificate-file", "--key-file"]);
    let redis = cluster.redis.url();
    let mut args = vec!["kick", "--user", "alice", "--redis", &redis];
    args.extend(flags.iter().flat_map(|(flag, file)| [flag.as_str(), file]));
    let output = barid(&args)?;
    let told = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8(told)?))
}

/// Calls each service of an access node as each party.
async fn only_the_right_roles_call(access: &str, dir: &Path) -> Result<()> {
    for party in Party::ALL {
        let [(_, ca), (_, certificate), (_, key)] = files(dir, party.as_str(), ["", "", ""]);
        let config = InternalTlsConfig {
            ca_file: Some(ca.into()),
            certificate_file: Some(certificate.into()),
            key_file: Some(key.into()),
        };
        let own = Credentials::read(&config, party).map_err(anyhow::Error::msg)?;
        let channel = dial(&own, Party::Access, access, PATIENCE, |endpoint| endpoint).await;
        let channel = channel.map_err(anyhow::Error::msg)?;
        let delivered = AccessClient::new(channel.clone()).deliver(tokio_stream::empty()).await;
        let closed = AccessPeerClient::new(channel.clone()).close(CloseRequest::default()).await;
        let kicked = AccessAdminClient::new(channel).kick(KickRequest::default()).await;
        let codes = [delivered.err(), closed.err(), kicked.err()]
            .map(|status| status.map_or(Code::Ok, |status| status.code()));
        for (call, (code, caller)) in
            codes.into_iter().zip([Party::Dispatcher, Party::Access, Party::Operator]).enumerate()
        {
            let denied = code == Code::PermissionDenied;
            ensure!(denied == (party != caller), "{party:?}, call {call}: {code}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_with_mutual_tls_serves_and_renews_its_certificates() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let dir = scratch.path().join("tls");
    let tls = dir.display().to_string();
    let created: Value = serde_json::from_slice(&barid(&["cluster", "ca", &tls])?.stdout)?;
    ensure!(created["new_authority"] == true, "{created}");
    let mut builder = Cluster::builder().nodes(Role::Access, 2);
    for role in Role::ALL {
        let keys =
            ["internal_tls.ca_file", "internal_tls.certificate_file", "internal_tls.key_file"];
        for (key, file) in files(&dir, role.name(), keys) {
            builder = builder.set_of(role, &key, file);
        }
    }
    let mut cluster = builder.start().await?;
    let business = cluster.business()?;
    let mut old = cluster.device_at(0, "alice", "phone").await?;
    business.send_text("alice", "m1", "through every hop").await?;
    ensure!(old.receive(1).await? == ["m1"]);
    // A node asks another one to close the session that is replaced.
    let mut phone = cluster.device_at(1, "alice", "phone").await?;
    ensure!(old.closed(PATIENCE).await? == 4502);
    ensure!(phone.receive(1).await? == ["m1"]);

    let renewed: Value = serde_json::from_slice(&barid(&["cluster", "ca", &tls])?.stdout)?;
    ensure!(renewed["new_authority"] == false, "{renewed}");
    for number in 0..2 {
        let access = cluster.node(Role::Access, number);
        let read = r#"barid_internal_certificate_reads_total{result="read"} "#;
        let begun = std::time::Instant::now();
        while access.metrics_text().await?.contains(&format!("{read}0")) {
            ensure!(begun.elapsed() < Duration::from_secs(10), "the certificate is not read again");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    cluster.kill(Role::Dispatcher, 0)?;
    cluster.launch(Role::Dispatcher, 0).await?;
    business.send_text("alice", "m2", "after the renewal").await?;
    ensure!(phone.receive(1).await? == ["m2"]);

    let access = cluster.node(Role::Access, 1).address("grpc").await?.to_string();
    only_the_right_roles_call(&access, &dir).await?;
    let (kicked, told) = kick(&cluster, &dir, "purger")?;
    ensure!(!kicked && told.contains("refuse it as operator.barid.internal"), "{told}");
    let (kicked, told) = kick(&cluster, &dir, "operator")?;
    ensure!(kicked, "{told}");
    ensure!(phone.closed(PATIENCE).await? == 4503);
    Ok(())
}
