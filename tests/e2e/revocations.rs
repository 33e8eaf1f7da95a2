//! `barid revoke` on a running cluster of two access nodes, over restarts of a node and an outage of Kafka.

use std::process::{Command, Output};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use barid_testkit::device::{Device, PATIENCE, next_attempt};
use barid_testkit::{Cluster, Role, http, paths, raw, token};
use barid_wire::revocation::Revocation;
use serde_json::{Value, json};

/// From the record in Kafka to closed sessions on all nodes; the median, because tests share the cores.
const IN_FORCE: Duration = Duration::from_secs(1);
/// A second key of the nodes, with an id of its own.
const OTHER_KEY: &str = "rolled";
const OTHER_SECRET: &str = "another-secret-of-the-tests-32-bytes";

async fn barid(cluster: &Cluster, args: &[&str]) -> Result<Output> {
    let mut command = Command::new(paths::binary("barid")?);
    command.args(["--json", "revoke"]).args(args);
    if !args.contains(&"--topic") {
        command.args(["--topic", &cluster.topics().revocations]);
    }
    command.env("BARID_BROKERS", cluster.brokers());
    // Do not use a running `barid dev`.
    command.env("BARID_DEV_STATE", "/nonexistent/dev.json");
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

/// The objects that a successful command prints.
async fn told(cluster: &Cluster, args: &[&str]) -> Result<Vec<Value>> {
    let output = barid(cluster, args).await?;
    ensure!(output.status.success(), "{args:?}: {output:?}");
    let lines = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| Ok(serde_json::from_slice(line)?)).collect()
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A token that was issued at a time.
fn issued(user: &str, at_s: u64, jti: &str) -> String {
    let claims =
        json!({ "app": token::APP, "sub": user, "iat": at_s, "exp": now_s() + 3_600, "jti": jti });
    token::sign(&claims, token::SECRET)
}

fn keys() -> toml::Value {
    let key = |id: &str, secret: &str| {
        toml::Value::Table(
            [("id", id), ("secret", secret)]
                .into_iter()
                .map(|(k, v)| (k.into(), v.into()))
                .collect(),
        )
    };
    toml::Value::Array(vec![key(token::KEY_ID, token::SECRET), key(OTHER_KEY, OTHER_SECRET)])
}

fn of_other_key(user: &str) -> String {
    let claims = json!({ "app": token::APP, "sub": user, "iat": now_s(), "exp": now_s() + 3_600 });
    token::sign_by(OTHER_KEY, &claims, OTHER_SECRET)
}

async fn enter(cluster: &mut Cluster, number: usize, token: &str) -> Result<Device> {
    let url = cluster.url(number).await?;
    let hello = json!({ "device": format!("d{number}"), "attempt": next_attempt() });
    Ok(Device::connect_with(&url, token, hello).await?.0)
}

/// One device on each of two nodes.
async fn pair(cluster: &mut Cluster, token: &str) -> Result<[Device; 2]> {
    Ok([enter(cluster, 0, token).await?, enter(cluster, 1, token).await?])
}

/// The answer with which a node refuses a token.
async fn refused(cluster: &mut Cluster, number: usize, token: &str) -> Result<String> {
    let address = cluster.node(Role::Access, number).address("ws").await?;
    let path = format!("/v1/connect?token={token}");
    let request = raw::request(&path, "Sec-WebSocket-Protocol: barid.v1.json\r\n");
    let answer = raw::http(address, request.as_bytes()).await?;
    ensure!(!answer.starts_with("HTTP/1.1 101"), "node {number} lets it in");
    Ok(answer)
}

/// When both sessions were closed with 4004, after `since`.
async fn closed(devices: [Device; 2], since: Instant) -> Result<Duration> {
    let [mut one, mut two] = devices;
    let (one, two) = tokio::join!(one.closed(PATIENCE), two.closed(PATIENCE));
    let took = since.elapsed();
    ensure!([one?, two?] == [4004, 4004]);
    Ok(took)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_is_in_force_within_a_second_on_all_nodes_and_after_restarts() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(Role::Access, 2)
        .own_kafka()
        .set_of(Role::Access, "auth.keys", keys())
        .start()
        .await?;
    let (stolen, kept) = (issued("alice", now_s() - 60, "a1"), issued("bob", now_s() - 60, "b1"));
    let old = issued("carol", now_s() - 60, "c1");
    let rolled = of_other_key("dave");

    // A user: what was issued so far, and nothing of what is issued from then on.
    let devices = pair(&mut cluster, &stolen).await?;
    let others = pair(&mut cluster, &kept).await?;
    let said = told(&cluster, &["user", "alice", "--reason", "stolen"]).await?;
    let took = closed(devices, Instant::now()).await?;
    eprintln!("user: sessions on two nodes closed {took:?} after the command ended");
    assert_eq!(
        (&said[0]["event"], &said[0]["key"]),
        (&json!("revoked"), &json!("user:demo:alice"))
    );
    for number in [0, 1] {
        let why = refused(&mut cluster, number, &stolen).await?;
        assert!(why.contains("401") && why.contains("the token has been revoked"), "{why}");
    }
    let fresh = issued("alice", now_s(), "a2");
    let _back = enter(&mut cluster, 0, &fresh).await.context("a new token enters")?;
    // A token's id.
    told(&cluster, &["token", "b1"]).await?;
    closed(others, Instant::now()).await?;
    // A key.
    let devices = pair(&mut cluster, &rolled).await?;
    told(&cluster, &["key", OTHER_KEY, "--for", "1h"]).await?;
    closed(devices, Instant::now()).await?;
    // A time of the past.
    let devices = pair(&mut cluster, &old).await?;
    let newer = issued("carol", now_s() - 10, "c2");
    let mut stays = enter(&mut cluster, 0, &newer).await?;
    let before = (now_s() - 30).to_string();
    told(&cluster, &["app", "demo", "--yes", "--issued-before", &before]).await?;
    let [_replaced, mut other] = devices;
    assert_eq!(other.closed(PATIENCE).await?, 4004);
    stays.expect_silence(Duration::from_millis(300)).await?;

    let listed = told(&cluster, &["list"]).await?;
    let keys: Vec<_> = listed.iter().filter_map(|line| line["key"].as_str()).collect();
    assert_eq!(keys, ["app:demo", "key:rolled", "token:demo:b1", "user:demo:alice"]);
    assert_eq!(listed[3]["reason"], "stolen");

    // A killed node has nothing but the topic.
    let is_refused = async |cluster: &mut Cluster, number| -> Result<()> {
        for token in [&stolen, &kept, &rolled, &old] {
            let why = refused(cluster, number, token).await?;
            ensure!(why.contains("401") && why.contains("revoked"), "{why}");
        }
        Ok(())
    };
    cluster.kill(Role::Access, 1)?;
    cluster.launch(Role::Access, 1).await?;
    is_refused(&mut cluster, 1).await?;
    enter(&mut cluster, 1, &fresh).await?;

    // Kafka is away: what was read stays in force, and a node that starts admits nobody.
    cluster.kafka()?.kill()?;
    cluster.kill(Role::Access, 1)?;
    cluster.spawn(Role::Access, 1)?;
    let admin = cluster.node(Role::Access, 1).address("admin").await?;
    let begun = Instant::now();
    loop {
        let (status, body) = http::get(admin, "/readyz").await?;
        if status == 503 && body.contains("revocations: kafka is away") {
            break;
        }
        ensure!(begun.elapsed() < Duration::from_secs(20), "{body}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for token in [&stolen, &fresh] {
        let why = refused(&mut cluster, 1, token).await?;
        assert!(why.contains("503") && why.contains("have not been read"), "{why}");
    }
    is_refused(&mut cluster, 0).await?;
    let begun = Instant::now();
    while cluster.node(Role::Access, 0).metric("barid_access_revocations_current").await? != 0.0 {
        ensure!(begun.elapsed() < Duration::from_secs(20), "the outage is never told");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let output = barid(&cluster, &["everyone", "--yes", "--timeout", "1s"]).await?;
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    cluster.kafka()?.restart().await?;
    cluster.node(Role::Access, 1).ready().await?;
    is_refused(&mut cluster, 1).await?;

    // Withdrawn, it is as if it had never been.
    told(&cluster, &["withdraw", "app", "demo"]).await?;
    told(&cluster, &["withdraw", "user", "alice"]).await?;
    let begun = Instant::now();
    while enter(&mut cluster, 0, &stolen).await.is_err() {
        ensure!(begun.elapsed() < Duration::from_secs(15), "still refused");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let output = barid(&cluster, &["withdraw", "user", "alice"]).await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let output = barid(&cluster, &["list", "--topic", "nowhere"]).await?;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not exist"), "{output:?}");
    let output = barid(&cluster, &["everyone", "--yes", "--topic", "nowhere"]).await?;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    cluster.restart(Role::Access, 0).await?;
    enter(&mut cluster, 0, &stolen).await?;
    let why = refused(&mut cluster, 0, &kept).await?;
    assert!(why.contains("revoked"), "{why}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_126_another_revocation_never_weakens_the_one_before() -> Result<()> {
    let mut cluster = Cluster::builder().start().await?;
    let topic = cluster.topics().revocations.clone();
    told(&cluster, &["user", "alice", "--reason", "stolen"]).await?;
    let listed = told(&cluster, &["list"]).await?;
    let first = listed[0]["issued_before"].as_u64().context("a time")?;
    let said = told(&cluster, &["user", "alice", "--issued-before", "5", "--for", "1h"]).await?;
    assert_eq!((&said[0]["issued_before"], &said[0]["until"]), (&json!(first), &Value::Null));
    let said = told(&cluster, &["user", "alice", "--margin", "1h"]).await?;
    assert!(said[0]["issued_before"].as_u64() >= Some(first + 3_600), "{said:?}");

    // A record that this version cannot read is not replaced by a narrower one.
    let business = cluster.business()?;
    business.produce(&topic, "user:demo:alice", b"{\"v\":2}").await?;
    let output = barid(&cluster, &["user", "alice", "--for", "1h"]).await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("withdraw it first"), "{output:?}");
    business.produce(&topic, "flock:7", b"{}").await?;
    for key in ["flock:7", "user:demo:alice"] {
        told(&cluster, &["withdraw", "record", key]).await?;
    }

    // What has ended leaves the topic, and may be followed by a shorter one. Ids may begin with '-'.
    told(&cluster, &["token", "-x7", "--for", "1s"]).await?;
    told(&cluster, &["token", "kept", "--for", "1h"]).await?;
    let begun = Instant::now();
    while told(&cluster, &["withdraw", "ended"]).await?.is_empty() {
        ensure!(begun.elapsed() < Duration::from_secs(20), "it never ends");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let listed = told(&cluster, &["list"]).await?;
    let keys: Vec<_> = listed.iter().filter_map(|line| line["key"].as_str()).collect();
    assert_eq!(keys, ["token:demo:kept"]);

    // Two operators at once, and one who removes what has ended.
    for round in 0..4 {
        let token = format!("p{round}");
        let for_ever = ["token", &token];
        let (long, short) = (told(&cluster, &for_ever), ["token", &token, "--for", "1s"]);
        let (long, short) = tokio::join!(long, told(&cluster, &short));
        long?;
        short?;
        let (again, ended) = (told(&cluster, &for_ever), ["withdraw", "ended"]);
        let (again, ended) = tokio::join!(again, told(&cluster, &ended));
        again?;
        ended?;
        let listed = told(&cluster, &["list"]).await?;
        let key = format!("token:demo:{token}");
        let kept = listed.iter().find(|line| line["key"] == key.as_str()).context("it is gone")?;
        assert_eq!(kept["until"], Value::Null, "{kept}");
    }

    // A topic that would forget is refused.
    let output = barid(&cluster, &["everyone", "--yes", "--topic", &cluster.topics().push]).await?;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("cleanup.policy"), "{output:?}");
    cluster.node(Role::Access, 0).ready().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_157_two_revocations_at_once_revoke_what_both_of_them_ask_for() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    for round in 0..10 {
        let token = format!("t{round}");
        let (forever, hour) = (["token", &token], ["token", &token, "--for", "1h"]);
        let (one, other) = tokio::join!(told(&cluster, &forever), told(&cluster, &hour));
        one?;
        other?;
        let listed = told(&cluster, &["list"]).await?;
        let key = format!("token:demo:{token}");
        let kept = listed.iter().find(|line| line["key"] == key.as_str()).context("it is gone")?;
        assert_eq!(kept["until"], Value::Null, "{kept}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_100_each_of_many_revocations_is_in_force_within_a_second() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(Role::Access, 2).start().await?;
    let business = cluster.business()?;
    let topic = cluster.topics().revocations.clone();
    let mut times = Vec::new();
    for round in 0..20 {
        let user = format!("u{round}");
        let jti = format!("j{round}");
        let devices = pair(&mut cluster, &issued(&user, now_s() - 60, &jti)).await?;
        let revoked = match round % 2 {
            0 => format!("user:demo:{user}"),
            _ => format!("token:demo:{jti}"),
        };
        let subject: barid_wire::revocation::Subject = revoked.parse()?;
        let issued_before_s = subject.has_time().then(now_s);
        let (until_s, reason, at_s) = (None, String::new(), now_s());
        let (key, value) =
            Revocation { subject, issued_before_s, until_s, reason, at_s }.encode()?;
        business.produce(&topic, &key, &value).await?;
        times.push(closed(devices, Instant::now()).await?);
    }
    times.sort();
    eprintln!(
        "from Kafka's answer to closed sessions on two nodes: median {:?}, longest {:?}",
        times[10], times[19]
    );
    assert!(times[10] < IN_FORCE, "{times:?}");
    Ok(())
}
