//! Tokens that open nothing: the same ones in handshakes (401) and in Refresh frames (4500).
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use barid_access::config::{KeyAlgorithmName, KeyConfig};
use barid_core::Secret;
use barid_testkit::device::{Incoming, PATIENCE};
use barid_testkit::raw::{http, request};
use barid_testkit::{Device, token};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::support::*;

/// Public halves of keys whose private halves nobody has kept.
const RSA: &str = "-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAnXJA1nw7GGQ98VExnvT+
u3qMnByTsItRmMpH6tO1wWTkXe74uOSG9W6QoSnvVsYpWfL2+4A/0kx5npO0uLmD
o0+6ksblf1AzpnVqbTsgRzEAMGH5eVSnkYure9tl+lXAOCfyHbbEKCYtJszVmIrx
CjHZl5dCD3ROAa8htyFEOgzY7LOPxbw8MgQTotQqCxi0dQT+c9cHMgzHZPMFMSXR
yZSBJOq54qFfIfcMZbLurEWXR65rq3c/4R/oU9pQZbua8lEaPm86mpm5YDMdsES8
+lz6VsGaaoiu+/e2nRltLy9iLS6FPX/xDC3XAftoAsbzVw7sRVaxZSO4BIIr+HWr
uQIDAQAB
-----END PUBLIC KEY-----
";
const P256: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEGx+JQqAkL+zZgAkPvJtjFxJEkiUP
7rw2JyPAA2iyT0KZlNPzfOL33qjqUhZ9tPrAED+C2bJsrIcp7+0hf7ra2g==
-----END PUBLIC KEY-----
";
/// Of another tenant: it speaks for `shop` only.
const SHOP_SECRET: &str = "a secret of the shop, 32 bytes long";

struct Keys {
    configs: Vec<KeyConfig>,
    _files: [NamedTempFile; 2],
}

impl Keys {
    fn new() -> Result<Self> {
        let mut files = [NamedTempFile::new()?, NamedTempFile::new()?];
        files[0].write_all(RSA.as_bytes())?;
        files[1].write_all(P256.as_bytes())?;
        let public = |id: &str, algorithm, file: &NamedTempFile| KeyConfig {
            id: id.into(),
            algorithm,
            public_key_file: Some(file.path().into()),
            ..Default::default()
        };
        let shop = KeyConfig {
            id: "shop".into(),
            secret: Secret::new(SHOP_SECRET),
            apps: vec!["shop".into()],
            ..Default::default()
        };
        let configs = vec![
            public("rsa", KeyAlgorithmName::RS256, &files[0]),
            public("p256", KeyAlgorithmName::ES256, &files[1]),
            shop,
        ];
        Ok(Self { configs, _files: files })
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn claims(change: Value) -> Value {
    let mut claims = json!({ "app": APP, "sub": "alice", "exp": now_s() + 3600 });
    for (name, value) in change.as_object().into_iter().flatten() {
        claims[name] = value.clone();
    }
    claims
}

fn unsigned(header: &Value, claims: &str) -> String {
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    format!("{}.{}", part(&header.to_string()), part(claims))
}

/// With any header, HMAC by `secret`.
fn sign(header: Value, claims: &str, secret: &str) -> String {
    let message = unsigned(&header, claims);
    let key = EncodingKey::from_secret(secret.as_bytes());
    let signature = crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
    format!("{message}.{signature}")
}

fn good(change: Value) -> String {
    token::sign(&claims(change), token::SECRET)
}

fn headed(header: Value) -> String {
    sign(header, &claims(json!({})).to_string(), token::SECRET)
}

/// Name of the case, token, a part of the reason, label of the counter.
type Bad = (&'static str, String, &'static str, &'static str);

fn table() -> Vec<Bad> {
    let kid = token::KEY_ID;
    let valid = good(json!({}));
    let plain = claims(json!({})).to_string();
    let parts: Vec<&str> = valid.split('.').collect();
    let other = good(json!({ "sub": "bob" }));
    let bob = other.split('.').nth(1).unwrap_or_default();
    let claim = |change| good(change);
    let lacking = |name: &str| {
        let mut claims = claims(json!({}));
        claims.as_object_mut().unwrap().remove(name);
        token::sign(&claims, token::SECRET)
    };
    let hs = json!({ "alg": "HS256", "kid": kid });
    let twice = r#"{"app":"demo","app":"shop","sub":"alice","exp":4000000000}"#;
    let jwk = json!({ "kty": "oct", "k": URL_SAFE_NO_PAD.encode(SHOP_SECRET) });
    let embedded = json!({ "alg": "HS256", "jwk": jwk });
    let p256 = unsigned(&json!({ "alg": "ES256", "kid": "p256" }), &plain);
    let rs256 = unsigned(&json!({ "alg": "RS256", "kid": "rsa" }), &plain);
    let zeros = |bytes: usize| URL_SAFE_NO_PAD.encode(vec![0; bytes]);
    let none = |alg: &str| format!("{}.", unsigned(&json!({ "alg": alg, "kid": kid }), &plain));
    vec![
        ("nothing", String::new(), "three parts", "malformed"),
        ("a word", "token".into(), "three parts", "malformed"),
        ("dots", "..".into(), "header", "malformed"),
        ("no base64", "!!!.@@@.###".into(), "header", "malformed"),
        ("an encrypted one", "e30.a.b.c.d".into(), "three parts", "malformed"),
        ("without its signature", format!("{}.{}", parts[0], parts[1]), "three parts", "malformed"),
        ("an empty signature", format!("{}.{}.", parts[0], parts[1]), "signature", "signature"),
        ("half a signature", valid[..valid.len() - 11].into(), "signature", "signature"),
        ("padding", format!("{valid}="), "base64url", "malformed"),
        (
            "somebody else's claims",
            format!("{}.{bob}.{}", parts[0], parts[2]),
            "signature",
            "signature",
        ),
        ("alg none", none("none"), "HS256", "malformed"),
        ("alg None", none("None"), "HS256", "malformed"),
        ("no alg", format!("{}.x", unsigned(&json!({ "kid": kid }), &plain)), "HS256", "malformed"),
        ("alg HS512", headed(json!({ "alg": "HS512", "kid": kid })), "no key", "unknown_key"),
        (
            "the RSA key as a secret",
            sign(json!({ "alg": "HS256", "kid": "rsa" }), &plain, RSA),
            "no key",
            "unknown_key",
        ),
        (
            "the RSA key as a secret, no kid",
            sign(json!({ "alg": "HS256" }), &plain, RSA),
            "signature",
            "signature",
        ),
        (
            "HMAC called RSA",
            sign(json!({ "alg": "RS256", "kid": "rsa" }), &plain, RSA),
            "signature",
            "signature",
        ),
        ("an RSA signature of zeros", format!("{rs256}.{}", zeros(256)), "signature", "signature"),
        ("an ECDSA signature of zeros", format!("{p256}.{}", zeros(64)), "signature", "signature"),
        ("an unknown kid", headed(json!({ "alg": "HS256", "kid": "x" })), "no key", "unknown_key"),
        (
            "a kid of SQL",
            headed(json!({ "alg": "HS256", "kid": "' OR 1=1 --" })),
            "no key",
            "unknown_key",
        ),
        (
            "a kid that is a path",
            headed(json!({ "alg": "HS256", "kid": "/dev/null" })),
            "no key",
            "unknown_key",
        ),
        (
            "a kid of another type",
            headed(json!({ "alg": "HS256", "kid": 7 })),
            "header",
            "malformed",
        ),
        (
            "a key of its own",
            sign(embedded, &plain, "any secret at all, 32 bytes long."),
            "signature",
            "signature",
        ),
        ("another secret", sign(hs.clone(), &plain, SHOP_SECRET), "signature", "signature"),
        (
            "crit",
            headed(json!({ "alg": "HS256", "kid": kid, "crit": ["b64"] })),
            "crit",
            "malformed",
        ),
        (
            "another app's key",
            sign(json!({ "alg": "HS256", "kid": "shop" }), &plain, SHOP_SECRET),
            "not allowed for this app",
            "other_app",
        ),
        (
            "another app's key, no kid",
            sign(json!({ "alg": "HS256" }), &plain, SHOP_SECRET),
            "not allowed for this app",
            "other_app",
        ),
        (
            "claims that are no object",
            sign(hs.clone(), "[]", token::SECRET),
            "not a JSON object",
            "malformed",
        ),
        (
            "claims that are no JSON",
            sign(hs.clone(), "alice", token::SECRET),
            "JSON object",
            "malformed",
        ),
        ("a claim twice", sign(hs.clone(), twice, token::SECRET), "each name once", "malformed"),
        ("no app", lacking("app"), "claim app is missing", "malformed"),
        ("no sub", lacking("sub"), "claim sub is missing", "malformed"),
        ("no exp", lacking("exp"), "claim exp is missing", "malformed"),
        (
            "an app of another type",
            claim(json!({ "app": ["demo"] })),
            "app is not a string",
            "malformed",
        ),
        ("a user of another type", claim(json!({ "sub": 7 })), "sub is not a string", "malformed"),
        (
            "an end in words",
            claim(json!({ "exp": "tomorrow" })),
            "exp is not a number",
            "malformed",
        ),
        ("a begin in words", claim(json!({ "nbf": "today" })), "nbf is not a number", "malformed"),
        ("an issue in words", claim(json!({ "iat": "today" })), "iat is not a number", "malformed"),
        ("an id of another type", claim(json!({ "jti": 7 })), "jti is not a string", "malformed"),
        (
            "a device of another type",
            claim(json!({ "device": true })),
            "device is not",
            "malformed",
        ),
        ("a colon in the app", claim(json!({ "app": "demo:u" })), "app contains ':'", "malformed"),
        ("an empty app", claim(json!({ "app": "" })), "app is empty", "malformed"),
        ("a long app", claim(json!({ "app": "a".repeat(65) })), "65 bytes", "malformed"),
        ("a long user", claim(json!({ "sub": "u".repeat(129) })), "129 bytes", "malformed"),
        ("an empty user", claim(json!({ "sub": "" })), "user is empty", "malformed"),
        ("NUL in the user", claim(json!({ "sub": "a\0b" })), "user contains", "malformed"),
        ("a long device", claim(json!({ "device": "d".repeat(65) })), "65 bytes", "malformed"),
        ("an end in ms", claim(json!({ "exp": now_s() * 1000 })), "not milliseconds", "malformed"),
        ("an audience", claim(json!({ "aud": "shop" })), "another audience", "audience"),
        ("no end", claim(json!({ "exp": 1e300 })), "later than the year 9999", "malformed"),
        ("an end long ago", claim(json!({ "exp": 1 })), "expired", "expired"),
        ("an end before time began", claim(json!({ "exp": -1e300 })), "expired", "expired"),
        ("a begin to come", claim(json!({ "nbf": now_s() + 1000 })), "not valid yet", "too_early"),
    ]
}

#[tokio::test]
async fn bad_tokens_open_nothing_and_are_told_why() -> Result<()> {
    let world = World::new().await?;
    let keys = Keys::new()?;
    let node = world.node_with(|config| config.auth.keys.extend(keys.configs.clone())).await?;
    let mut healthy = node.device("bob", "phone").await?;
    let mut refused = BTreeMap::new();
    for (count, (what, token, text, word)) in (1..).zip(table()) {
        // HTTP trims what follows Bearer: there, an empty token is none.
        let (path, bearer) = match token.as_str() {
            "" => ("/v1/connect?token=", String::new()),
            token => ("/v1/connect", format!("Authorization: Bearer {token}\r\n")),
        };
        let head = format!("Sec-WebSocket-Protocol: barid.v1.json\r\n{bearer}");
        let answer = http(node.addresses["ws"], request(path, &head).as_bytes()).await?;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{what}: {answer}");
        assert!(answer.contains(text), "{what}: {answer}");
        assert!(token.len() < 9 || !answer.contains(&token), "{what}: a token is never sent back");

        let mut phone = node.device("alice", "phone").await?;
        phone.send(&json!({ "refresh": { "token": token } })).await?;
        let Incoming::Other(kind, error) = phone.next(PATIENCE).await? else { panic!("{what}") };
        assert_eq!((kind.as_str(), &error["code"]), ("error", &json!(4500)), "{what}");
        assert!(error["text"].as_str().is_some_and(|told| told.contains(text)), "{what}: {error}");
        assert_eq!(phone.closed(PATIENCE).await?, 4500, "{what}");
        assert_eq!(node.metric("barid_access_closes_total", "bad_token"), f64::from(count));
        let counter = refused.entry(word).or_insert(0.0);
        *counter += 2.0;
        assert_eq!(node.metric("barid_access_tokens_refused_total", word), *counter, "{what}");
    }
    let (entry, _) = world.accept("bob", "m1").await?;
    node.dispatcher().await?.push(&world, "bob", entry).await?;
    assert_eq!(healthy.receive(1).await?, ["m1"]);
    Ok(())
}

#[tokio::test]
async fn tokens_that_are_odd_but_valid_are_taken() -> Result<()> {
    let world = World::new().await?;
    let keys = Keys::new()?;
    let node = world.node_with(|config| config.auth.keys.extend(keys.configs.clone())).await?;
    for change in [
        json!({ "exp": 253_402_300_799_u64 }),
        json!({ "exp": now_s() as f64 + 100.5, "nbf": -7, "device": null }),
        json!({ "aud": null, "iss": 7, "app2": "shop", "deep": [[[[{}]]]] }),
    ] {
        Device::connect(&node.url(), &good(change), "phone").await?.close().await?;
    }
    let shop = claims(json!({ "app": "shop" })).to_string();
    let shop = sign(json!({ "alg": "HS256", "kid": "shop" }), &shop, SHOP_SECRET);
    Device::connect(&node.url(), &shop, "phone").await?.close().await
}

#[tokio::test]
async fn tokens_of_a_device_open_no_other() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let of_phone = good(json!({ "device": "phone" }));
    let mut tablet = Device::open(&node.url(), &of_phone).await?;
    tablet.send(&json!({ "hello": { "device": "tablet" } })).await?;
    assert_eq!(tablet.closed(PATIENCE).await?, 4501);
    let mut tablet = node.device("alice", "tablet").await?;
    tablet.send(&json!({ "refresh": { "token": of_phone } })).await?;
    assert_eq!(tablet.closed(PATIENCE).await?, 4500);
    assert_eq!(node.metric("barid_access_tokens_refused_total", "somebody_else"), 1.0);
    // Hello need not name it then.
    let _phone = Device::connect(&node.url(), &of_phone, "").await?;
    world.routes_become("alice", 1).await?;
    let routes = world.inspect("alice").await?.routes;
    assert_eq!(routes[0].device.as_str(), "phone");
    // A token of 100 KB is more than a handshake, and more than a frame.
    let huge = good(json!({ "x": "x".repeat(100_000) }));
    let refused = Device::open(&node.url(), &huge).await.unwrap_err();
    assert!(format!("{refused:?}").contains("431"), "{refused:?}");
    let mut tablet = node.device("alice", "tablet").await?;
    tablet.send(&json!({ "refresh": { "token": huge } })).await?;
    assert_eq!(tablet.closed(PATIENCE).await?, 4501);
    Ok(())
}
