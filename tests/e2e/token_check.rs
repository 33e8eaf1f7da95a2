//! `barid token check` says what the nodes of a running cluster say.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use barid_testkit::device::{Device, PATIENCE};
use barid_testkit::{Cluster, Role, paths, raw, token};
use serde_json::{Value, json};

const SHOP_SECRET: &str = "a-secret-of-the-shop-32-bytes-long";

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn claims(change: Value) -> Value {
    let mut claims = json!({
        "app": token::APP, "sub": "alice", "iat": now_s() - 60, "exp": now_s() + 600,
        "aud": "push", "iss": "idp", "groups": ["eng"],
    });
    for (name, value) in change.as_object().into_iter().flatten() {
        claims[name] = value.clone();
    }
    claims
}

/// The keys, audience, issuer and lifetime of the nodes.
fn auth() -> Result<toml::Table> {
    let key =
        |id, secret, apps| format!("[[keys]]\nid = '{id}'\nsecret = '{secret}'\napps = {apps}\n");
    let keys = key(token::KEY_ID, token::SECRET, "[]") + &key("shop", SHOP_SECRET, "['shop']");
    let others = "audience = ['push']\nissuer = ['idp']\nlifetime_max_seconds = 3600\n";
    Ok((others.to_owned() + &keys).parse()?)
}

/// Runs the command with the token on standard input.
async fn run(config: &str, given: &str, more: &[&str]) -> Result<Output> {
    let mut command = Command::new(paths::binary("barid")?);
    command.args(["--json", "token", "check", "-", "--config", config]).args(more);
    command.env("BARID_DEV_STATE", "/nonexistent/dev.json");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let input = given.to_owned();
    let run = move || -> Result<_> {
        let mut child = command.spawn()?;
        child.stdin.take().context("a pipe")?.write_all(input.as_bytes())?;
        Ok(child.wait_with_output()?)
    };
    let output = tokio::task::spawn_blocking(run).await??;
    for text in [&output.stdout, &output.stderr] {
        let text = String::from_utf8_lossy(text);
        ensure!(given.len() < 9 || !text.contains(given), "it prints the token: {text}");
        ensure!(!text.contains(token::SECRET) && !text.contains(SHOP_SECRET), "{text}");
    }
    Ok(output)
}

/// The exit code, and what it prints.
async fn check(config: &str, token: &str) -> Result<(Option<i32>, Value)> {
    let output = run(config, token, &[]).await?;
    let said = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    Ok((output.status.code(), said))
}

/// Name of the case, token, close code, a part of the reason, a part of the hint.
type Case = (&'static str, String, u16, &'static str, &'static str);

fn cases() -> Vec<Case> {
    let good = |change| token::sign(&claims(change), token::SECRET);
    let by = |kid, secret| token::sign_by(kid, &claims(json!({})), secret);
    let whole = good(json!({}));
    let changed = whole[..whole.len() - 8].to_owned() + "AAAAAAAA";
    let stolen = "by \"token:demo:stolen\": found on a bus";
    vec![
        ("no token", String::new(), 4500, "no token", "standard input"),
        ("a word", "word".into(), 4500, "three parts", ""),
        ("no user", good(json!({ "sub": null })), 4500, "claim sub is missing", ""),
        ("another key", by("k9", token::SECRET), 4500, "no key for", "kid \"k9\""),
        ("changed", changed, 4500, "signature", "another key"),
        ("expired", good(json!({ "exp": now_s() - 1 })), 4004, "expired", "it expired"),
        ("too early", good(json!({ "nbf": now_s() + 500 })), 4500, "not valid yet", "nbf"),
        ("too long", good(json!({ "exp": now_s() + 9_000 })), 4500, "longer than", "3600"),
        ("audience", good(json!({ "aud": "web" })), 4500, "another audience", "aud \"web\""),
        ("issuer", good(json!({ "iss": "me" })), 4500, "another issuer", "iss \"me\""),
        ("another app", by("shop", SHOP_SECRET), 4500, "not allowed for this app", "kid \"shop\""),
        ("revoked", good(json!({ "jti": "stolen" })), 4004, "has been revoked", stolen),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_101_a_token_is_refused_as_the_nodes_refuse_it_and_said_why() -> Result<()> {
    let auth = auth()?;
    let mut builder = Cluster::builder();
    for (key, value) in &auth {
        builder = builder.set_of(Role::Access, &format!("auth.{key}"), value.clone());
    }
    let mut cluster = builder.start().await?;
    let address = cluster.node(Role::Access, 0).address("ws").await?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("access.toml");
    let topic = cluster.topics().revocations.clone();
    let kafka = format!(
        "[kafka]\nbrokers = ['{}']\ntopics.revocations = '{topic}'\n[auth]\n",
        cluster.brokers()
    );
    std::fs::write(&path, kafka + &auth.to_string().replace("[[keys]]", "[[auth.keys]]"))?;
    let config = path.display().to_string();

    let mut revoke = Command::new(paths::binary("barid")?);
    revoke.args(["revoke", "token", "stolen", "--reason", "found on a bus", "--topic", &topic]);
    let output = revoke.env("BARID_BROKERS", cluster.brokers()).output()?;
    ensure!(output.status.success(), "{output:?}");
    for (what, token, code, reason, hint) in cases() {
        let (exit, said) = check(&config, &token).await?;
        assert_eq!(exit, Some(1), "{what}: {said}");
        assert_eq!((&said["status"], &said["close_code"]), (&json!(401), &json!(code)), "{what}");
        let text = said["reason"].as_str().unwrap_or_default();
        assert!(text.contains(reason), "{what}: {said}");
        let told = said["hint"].as_str().unwrap_or_default();
        assert!(told.contains(hint) && (told.is_empty() == hint.is_empty()), "{what}: {said}");

        let query = if token.is_empty() { String::new() } else { format!("?token={token}") };
        let head = "Sec-WebSocket-Protocol: barid.v1.json\r\n";
        let request = raw::request(&format!("/v1/connect{query}"), head);
        let answer = raw::http(address, request.as_bytes()).await?;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{what}: {answer}");
        assert!(answer.trim_end().ends_with(text), "{what}: {answer}");
        if !token.is_empty() {
            let url = format!("ws://{address}/v1/connect?refuse=close");
            let mut page = Device::open(&url, &token).await?;
            assert_eq!(page.closed(PATIENCE).await?, code, "{what}");
        }
    }
    let (exit, said) = check(&config, &token::sign(&claims(json!({})), token::SECRET)).await?;
    assert_eq!((exit, &said["event"]), (Some(0), &json!("accepted")), "{said}");
    assert_eq!((&said["user"], &said["groups"]), (&json!("alice"), &json!(["eng"])));
    assert_eq!((&said["key_id"], &said["revoked"]), (&json!(token::KEY_ID), &json!(false)));
    assert!(said["expires_in_seconds"].as_u64().is_some_and(|left| (500..=600).contains(&left)));

    // A node that holds one revocation has dropped the first for the second.
    let stolen = token::sign(&claims(json!({ "jti": "stolen" })), token::SECRET);
    let mut revoke = Command::new(paths::binary("barid")?);
    revoke.args(["revoke", "token", "lost", "--topic", &topic]);
    let output = revoke.env("BARID_BROKERS", cluster.brokers()).output()?;
    ensure!(output.status.success(), "{output:?}");
    let text = std::fs::read_to_string(&path)?;
    std::fs::write(&path, text.replace("[auth]\n", "[auth]\nrevocations_max = 1\n"))?;
    let (exit, said) = check(&config, &stolen).await?;
    assert_eq!(
        (exit, &said["event"], &said["revoked"]),
        (Some(0), &json!("accepted"), &json!(false))
    );
    let evicted = said["revocation_evicted"].as_str().unwrap_or_default();
    assert!(evicted.contains("token:demo:stolen") && evicted.contains("revocations_max"), "{said}");
    std::fs::write(&path, &text)?;

    // Kafka does not answer, or has no such topic: nobody knows whether the token is revoked.
    let good = token::sign(&claims(json!({})), token::SECRET);
    let text = std::fs::read_to_string(&path)?;
    for (from, to, code) in [(cluster.brokers(), "127.0.0.1:1", 4), (topic, "nowhere", 2)] {
        std::fs::write(&path, text.replace(&from, to))?;
        let output = run(&config, &good, &["--timeout", "2s"]).await?;
        assert_eq!((output.status.code(), output.stdout.len()), (Some(code), 0), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--offline"), "{output:?}");
        let output = run(&config, &good, &["--offline"]).await?;
        let said: Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!((output.status.code(), said.get("revoked")), (Some(0), None), "{said}");
        assert_eq!(said["revocations_unknown"], "Kafka was not asked (--offline)");
    }
    Ok(())
}
