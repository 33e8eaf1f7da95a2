//! Revoked tokens: handshakes, open sessions and Refresh frames.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use barid_access::Config;
use barid_bus::{EmbeddedKafka, KafkaConfig, Producer};
use barid_testkit::device::{Incoming, PATIENCE};
use barid_testkit::raw::{Raw, http, request};
use barid_testkit::{Device, token};
use barid_wire::frames::Encoding;
use barid_wire::revocation::Revocation;
use serde_json::{Value, json};

use crate::support::*;

const JSON: &str = "Sec-WebSocket-Protocol: barid.v1.json\r\n";
/// From the record in Kafka to a closed session; the median, because tests share the cores.
const IN_FORCE: Duration = Duration::from_secs(1);

/// A node that follows the topic of revocations.
struct Bed {
    world: World,
    node: Node,
    producer: Producer,
    kafka: KafkaConfig,
    _broker: EmbeddedKafka,
}

impl Bed {
    async fn new(change: impl FnOnce(&mut Config)) -> Result<Self> {
        let mut kafka = KafkaConfig::default();
        let broker = EmbeddedKafka::start(&mut kafka)?;
        let world = World::new().await?;
        let follows = |config: &mut Config| {
            config.revocations = true;
            config.kafka = kafka.clone();
            change(config);
        };
        let node = world.node_with(follows).await?;
        eventually("it is ready", async || Ok(node.context.health.not_ready().is_empty())).await?;
        Ok(Self { world, node, producer: Producer::new(&kafka)?, kafka, _broker: broker })
    }

    /// Revokes; tokens must have been issued before now. Returns when the record is in Kafka.
    async fn revoke(&self, what: &str) -> Result<Instant> {
        self.revoke_with(what, |_| ()).await
    }

    async fn revoke_with(
        &self,
        what: &str,
        change: impl FnOnce(&mut Revocation),
    ) -> Result<Instant> {
        let subject: barid_wire::revocation::Subject = what.parse()?;
        let issued_before_s = subject.has_time().then(now_s);
        let reason = String::new();
        let mut revocation =
            Revocation { subject, issued_before_s, until_s: None, reason, at_s: now_s() };
        change(&mut revocation);
        let (key, value) = revocation.encode()?;
        self.put(key.as_bytes(), value).await
    }

    async fn put(&self, key: &[u8], value: Vec<u8>) -> Result<Instant> {
        let topic = &self.kafka.topics.revocations;
        self.producer.send(topic, key, value.into(), &[]).await?;
        Ok(Instant::now())
    }

    async fn withdraw(&self, what: &str) -> Result<()> {
        Ok(self.producer.delete(&self.kafka.topics.revocations, what.as_bytes()).await?)
    }

    /// Waits until the node holds so many revocations.
    async fn holds(&self, count: usize) -> Result<()> {
        eventually(&format!("{count} revocations"), async || {
            Ok(self.node.metric("barid_access_revocations", "") == count as f64)
        })
        .await
    }

    async fn answer(&self, token: &str, query: &str) -> Result<String> {
        let bytes = request(&format!("/v1/connect?token={token}{query}"), JSON);
        http(self.node.addresses["ws"], bytes.as_bytes()).await
    }

    fn revoked(&self, place: &str) -> f64 {
        self.node.metric("barid_access_revoked_total", place)
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A token that was issued a minute ago.
fn old(user: &str, change: Value) -> String {
    dated(user, now_s() - 60, change)
}

fn dated(user: &str, issued_s: u64, change: Value) -> String {
    let mut claims = json!({ "app": APP, "sub": user, "iat": issued_s, "exp": now_s() + 3_600 });
    for (name, value) in change.as_object().into_iter().flatten() {
        claims[name] = value.clone();
    }
    token::sign(&claims, token::SECRET)
}

/// The code and the text of the Error frame.
async fn closed(device: &mut Device) -> Result<(u64, String)> {
    let Incoming::Other(kind, error) = device.next(PATIENCE).await? else {
        anyhow::bail!("no error frame")
    };
    anyhow::ensure!(kind == "error", "{kind}");
    let code = device.closed(PATIENCE).await?;
    anyhow::ensure!(error["code"] == code, "{error} and {code}");
    Ok((code.into(), error["text"].as_str().unwrap_or_default().to_owned()))
}

#[tokio::test]
async fn each_kind_closes_its_sessions_within_a_second_and_refuses_their_tokens() -> Result<()> {
    let bed = Bed::new(|_| ()).await?;
    let bob = old("bob", json!({ "app": "shop", "jti": "b1" }));
    let mut times = Vec::new();
    for (what, hits_others) in [
        ("user:demo:alice", false),
        ("token:demo:a1", false),
        ("app:demo", false),
        ("key:test", true),
        ("everyone:", true),
    ] {
        let stolen = old("alice", json!({ "jti": "a1" }));
        let undated = old("alice", json!({ "jti": "a1", "iat": null }));
        let mut alice = Device::connect(&bed.node.url(), &stolen, "phone").await?;
        let mut other = Device::connect(&bed.node.url(), &bob, "phone").await?;
        let made = bed.revoke(what).await?;
        assert_eq!(closed(&mut alice).await?, (4004, "the token has been revoked".into()));
        times.push(made.elapsed());
        for token in [&stolen, &undated] {
            let answer = bed.answer(token, "").await?;
            assert!(answer.starts_with("HTTP/1.1 401 "), "{what}: {answer}");
            assert!(answer.ends_with("the token has been revoked\n"), "{what}: {answer}");
        }
        let page = bed.answer(&stolen, "&refuse=close").await?;
        assert!(page.starts_with("HTTP/1.1 101 "), "{what}: {page}");
        match hits_others {
            true => assert_eq!(closed(&mut other).await?.0, 4004, "{what}"),
            false => other.expect_silence(Duration::from_millis(300)).await?,
        }
        // Issued since, with another id.
        let fresh = dated("alice", now_s() + 1, json!({ "jti": "a2" }));
        let enters = Device::connect(&bed.node.url(), &fresh, "phone").await.is_ok();
        assert_eq!(enters, !what.starts_with("key:"), "{what}");
        bed.withdraw(what).await?;
        bed.holds(0).await?;
        Device::connect(&bed.node.url(), &stolen, "phone").await?;
    }
    times.sort();
    assert!(times[2] < IN_FORCE, "{times:?}");
    assert_eq!([bed.revoked("handshake"), bed.revoked("session")], [16.0, 7.0]);
    assert_eq!(bed.node.metric("barid_access_tokens_refused_total", "revoked"), 16.0);
    Ok(())
}

#[tokio::test]
async fn hazard_99_a_revocation_between_handshake_and_hello_closes_the_session() -> Result<()> {
    let bed = Bed::new(|_| ()).await?;
    let stolen = old("alice", json!({}));
    let mut verified = Device::open(&bed.node.url(), &stolen).await?;
    bed.revoke("user:demo:alice").await?;
    bed.holds(1).await?;
    verified.send(&json!({ "hello": { "device": "phone" } })).await?;
    assert_eq!(closed(&mut verified).await?, (4004, "the token has been revoked".into()));
    assert_eq!(bed.revoked("session"), 1.0);
    bed.world.routes_become("alice", 0).await?;
    // Those that arrive while it is being revoked are refused, or closed.
    for round in 0..20 {
        let user = format!("u{round}");
        let mut racing = Vec::new();
        for _ in 0..4 {
            let mut raw =
                Raw::open(bed.node.addresses["ws"], Encoding::Json, &old(&user, json!({}))).await?;
            raw.send(&barid_testkit::raw::frame(
                barid_testkit::raw::TEXT,
                format!(r#"{{"hello":{{"device":"d{}"}}}}"#, racing.len()),
            ))
            .await;
            racing.push(raw);
        }
        bed.revoke(&format!("user:demo:{user}")).await?;
        for raw in racing {
            let ended = raw.ended().await?;
            assert_eq!(ended.code, 4004, "{ended:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn hazard_148_a_token_that_is_hit_because_of_a_clock_is_counted_as_that() -> Result<()> {
    let bed = Bed::new(|_| ()).await?;
    let refused = |why: &str| bed.node.metric("barid_access_tokens_refused_total", why);
    let long_ago =
        |revocation: &mut Revocation| revocation.issued_before_s = Some(now_s() - 86_400);
    bed.revoke_with("everyone:", long_ago).await?;
    bed.holds(1).await?;
    let ahead = dated("alice", now_s() + 120, json!({ "jti": "a1" }));
    let answer = bed.answer(&ahead, "").await?;
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    assert!(answer.contains("its iat is ahead of this node's clock"), "{answer}");
    let mut alice = Device::connect(&bed.node.url(), &old("alice", json!({})), "phone").await?;
    alice.send(&json!({ "refresh": { "token": ahead } })).await?;
    let (code, text) = closed(&mut alice).await?;
    assert!(code == 4500 && text.contains("its iat is ahead"), "{code} {text}");
    assert_eq!((refused("issued_ahead"), refused("revoked")), (2.0, 0.0));
    // One that is revoked whatever its time.
    bed.revoke("token:demo:a1").await?;
    bed.holds(2).await?;
    assert!(bed.answer(&ahead, "").await?.ends_with("the token has been revoked\n"));
    assert_eq!((refused("issued_ahead"), refused("revoked")), (2.0, 1.0));
    Ok(())
}

#[tokio::test]
async fn hazard_147_a_connection_without_hello_is_closed_when_its_token_is_revoked() -> Result<()> {
    let bed = Bed::new(|config| config.limits.hello_timeout_ms = 60_000).await?;
    let mut silent = Device::open(&bed.node.url(), &old("alice", json!({}))).await?;
    let mut other = Device::open(&bed.node.url(), &old("bob", json!({}))).await?;
    bed.revoke("user:demo:alice").await?;
    assert_eq!(closed(&mut silent).await?, (4004, "the token has been revoked".into()));
    assert_eq!(bed.revoked("session"), 1.0);
    other.expect_silence(Duration::from_millis(1_500)).await
}

#[tokio::test]
async fn the_token_of_the_last_refresh_is_the_one_that_counts() -> Result<()> {
    let bed = Bed::new(|_| ()).await?;
    let token = |jti| old("alice", json!({ "jti": jti }));
    let mut alice = Device::connect(&bed.node.url(), &token("one"), "phone").await?;
    alice.send(&json!({ "refresh": { "token": token("two") } })).await?;
    // An answered frame behind it: the refresh has been handled.
    alice.send(&json!({ "subscribe": { "group": "none" } })).await?;
    let Incoming::Other(..) = alice.next(PATIENCE).await? else { panic!("no answer") };
    bed.revoke("token:demo:one").await?;
    alice.expect_silence(Duration::from_millis(400)).await?;
    bed.revoke("token:demo:two").await?;
    assert_eq!(closed(&mut alice).await?.0, 4004);

    let mut alice = Device::connect(&bed.node.url(), &token("three"), "phone").await?;
    alice.send(&json!({ "refresh": { "token": token("one") } })).await?;
    assert_eq!(closed(&mut alice).await?, (4500, "the token has been revoked".into()));
    assert_eq!([bed.revoked("refresh"), bed.revoked("session")], [1.0, 1.0]);
    Ok(())
}

#[tokio::test]
async fn many_sessions_are_closed_at_a_pace_and_a_users_at_once() -> Result<()> {
    let bed = Bed::new(|config| config.limits.kicks_per_second = 10).await?;
    let mut devices = Vec::new();
    for n in 0..20 {
        let token = old(&format!("u{n}"), json!({}));
        devices.push(Device::connect(&bed.node.url(), &token, "phone").await?);
    }
    let made = bed.revoke("everyone:").await?;
    eventually("the first are closed", async || Ok(bed.revoked("session") >= 2.0)).await?;
    bed.revoke("user:demo:u19").await?;
    assert_eq!(devices[19].closed(PATIENCE).await?, 4004);
    let (closed, most) = (bed.revoked("session"), 3.0 + 10.0 * made.elapsed().as_secs_f64());
    assert!(closed <= most, "{closed} of at most {most}");
    for device in &mut devices[..19] {
        assert_eq!(device.closed(PATIENCE).await?, 4004);
    }
    assert!(made.elapsed() > Duration::from_millis(1_500), "{:?}", made.elapsed());
    assert_eq!(bed.revoked("session"), 20.0);
    Ok(())
}

#[tokio::test]
async fn hazard_133_a_record_that_cannot_be_read_revokes_all_tokens_of_its_key() -> Result<()> {
    let bed = Bed::new(|_| ()).await?;
    let old = old("alice", json!({}));
    let fresh = dated("alice", now_s() + 30, json!({}));
    let is_refused = async |node: &Node, token: &str| -> Result<bool> {
        let bytes = request(&format!("/v1/connect?token={token}"), JSON);
        Ok(http(node.addresses["ws"], bytes.as_bytes()).await?.starts_with("HTTP/1.1 401 "))
    };
    bed.revoke("user:demo:alice").await?;
    bed.holds(1).await?;
    assert_eq!(
        (is_refused(&bed.node, &old).await?, is_refused(&bed.node, &fresh).await?),
        (true, false)
    );
    // A record of a newer version: a live node and one that starts after the compaction, agree.
    let newer = b"{\"v\":2,\"tokens\":\"all\"}".to_vec();
    bed.put(b"user:demo:alice", newer.clone()).await?;
    let mut kafka = KafkaConfig::default();
    let _broker = EmbeddedKafka::start(&mut kafka)?;
    Producer::new(&kafka)?
        .send(&kafka.topics.revocations, b"user:demo:alice", newer.into(), &[])
        .await?;
    let world = World::new().await?;
    let restarted = world
        .node_with(|config| {
            config.revocations = true;
            config.kafka = kafka.clone();
        })
        .await?;
    for node in [&bed.node, &restarted] {
        eventually("it is read", async || {
            Ok(node.context.health.not_ready().is_empty()
                && node.metric("barid_access_revocations_malformed_total", "") == 1.0)
        })
        .await?;
        assert!(is_refused(node, &old).await? && is_refused(node, &fresh).await?);
    }
    bed.withdraw("user:demo:alice").await?;
    bed.holds(0).await?;
    assert!(!is_refused(&bed.node, &old).await?);
    Ok(())
}

#[tokio::test]
async fn hazard_96_malformed_records_are_counted_and_more_than_allowed_evict_the_oldest()
-> Result<()> {
    let bed = Bed::new(|config| config.auth.revocations_max = 3).await?;
    for (key, value) in [
        ("", "hello".as_bytes()),
        ("user:demo:alice", b"\xff"),
        ("user:demo:alice", b"{\"v\":9}"),
        ("flock:7", b"{}"),
    ] {
        bed.put(key.as_bytes(), value.to_vec()).await?;
    }
    bed.withdraw("flock:7").await?;
    for n in 0..5 {
        bed.revoke_with(&format!("user:demo:u{n}"), |revocation| revocation.at_s = n).await?;
    }
    let malformed = || bed.node.metric("barid_access_revocations_malformed_total", "");
    eventually("all are read", async || {
        Ok(malformed() == 5.0
            && bed.node.metric("barid_access_revocations_evicted_total", "") == 3.0)
    })
    .await?;
    assert_eq!(bed.node.metric("barid_access_revocations", "user"), 3.0);
    assert!(bed.answer(&old("alice", json!({})), "").await?.starts_with("HTTP/1.1 101 "));
    for n in 0..5 {
        let answer = bed.answer(&old(&format!("u{n}"), json!({})), "").await?;
        let status = if n < 2 { "101" } else { "401" };
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{n}: {answer}");
    }
    Ok(())
}

#[tokio::test]
async fn a_revocation_ends_with_its_time() -> Result<()> {
    let bed = Bed::new(|_| ()).await?;
    let stolen = old("alice", json!({}));
    bed.revoke_with("user:demo:alice", |revocation| revocation.until_s = Some(now_s() + 2)).await?;
    bed.holds(1).await?;
    assert!(bed.answer(&stolen, "").await?.starts_with("HTTP/1.1 401 "));
    eventually("it ends", async || Ok(bed.answer(&stolen, "").await?.starts_with("HTTP/1.1 101 ")))
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_node_that_follows_no_revocations_has_no_gauge_of_their_arrival() -> Result<()> {
    let has_gauge = |node: &Node| {
        let families = node.context.metrics.gather();
        families.iter().any(|family| family.name() == "barid_access_revocations_current")
    };
    assert!(has_gauge(&Bed::new(|_| ()).await?.node));
    assert!(!has_gauge(&World::new().await?.node_with(|config| config.revocations = false).await?));
    Ok(())
}

#[tokio::test]
async fn a_topic_with_several_partitions_is_a_reason_not_to_be_ready() -> Result<()> {
    let mut kafka = KafkaConfig::default();
    let broker = EmbeddedKafka::start(&mut kafka)?;
    kafka.topics.revocations = "spread".into();
    broker.create_topic("spread", 3)?;
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.revocations = true;
            config.kafka = kafka.clone();
        })
        .await?;
    // It has read them, and serves the devices that reach it.
    eventually("it has read them", async || Ok(node.device("alice", "phone").await.is_ok()))
        .await?;
    let failing = node.context.health.not_ready();
    let [("revocations", why)] = &failing[..] else { panic!("{failing:?}") };
    for word in ["topic spread has 3 partitions", "barid revoke list", "barid topics create"] {
        assert!(why.contains(word), "{why}");
    }
    Ok(())
}

#[tokio::test]
async fn hazard_97_without_the_topic_a_node_is_not_ready_and_asks_to_come_back() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.revocations = true;
            config.kafka.brokers = vec!["127.0.0.1:1".into()];
            config.limits.address_refusals_max = 5;
        })
        .await?;
    eventually("it says so", async || {
        let failing = node.context.health.not_ready();
        Ok(failing.iter().any(|(name, why)| *name == "revocations" && why.contains("127.0.0.1:1")))
    })
    .await?;
    let token = token_of("alice");
    for _ in 0..20 {
        let bytes = request(&format!("/v1/connect?token={token}"), JSON);
        let answer = http(node.addresses["ws"], bytes.as_bytes()).await?;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("Retry-After"), "{answer}");
        assert!(answer.contains("revocations of tokens have not been read"), "{answer}");
    }
    assert_eq!(node.metric("barid_access_handshakes_total", "no_revocations"), 20.0);
    let url = format!("{}?refuse=close", node.url());
    let mut page = Device::open(&url, &token).await.context("refused by a close")?;
    assert_eq!(page.closed(PATIENCE).await?, 4005);
    Ok(())
}
