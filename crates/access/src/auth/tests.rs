use std::io::Write as _;
use std::path::PathBuf;

use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaKeyPair,
};
use barid_core::Secret;
use barid_runtime::SecretUrl;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use futures::FutureExt as _;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::*;
use crate::config::{JwksConfig, KeyAlgorithmName, KeyConfig};

const NOW: u64 = 1_800_000_000;
const SECRET: &str = "a secret of at least thirty-two bytes";
const OTHER: &str = "another secret of thirty-two bytes...";

fn hmac_key(id: &str, secret: &str) -> KeyConfig {
    KeyConfig { id: id.into(), secret: Secret::new(secret), ..Default::default() }
}

fn verifier(keys: Vec<KeyConfig>) -> Verifier {
    Verifier::new(&AuthConfig { keys, ..Default::default() }).unwrap()
}

fn claims() -> Value {
    json!({ "app": "demo", "sub": "alice", "exp": NOW + 60 })
}

fn with(change: Value) -> Value {
    let mut all = claims();
    for (name, value) in change.as_object().unwrap() {
        all[name] = value.clone();
    }
    all
}

fn sign(kid: Option<&str>, claims: &Value, secret: &str) -> String {
    let mut header = Header::new(Algorithm::HS256);
    header.kid = kid.map(Into::into);
    encode(&header, claims, &EncodingKey::from_secret(secret.as_bytes())).unwrap()
}

async fn refusal(verifier: &Verifier, token: &str) -> AuthError {
    verifier.verify(token, NOW).await.unwrap_err()
}

#[tokio::test]
async fn a_token_can_be_revoked_by_its_time_its_id_and_the_key_that_verified_it() {
    let facts = async |key: &str, kid: Option<&str>, change: Value| {
        let token = sign(kid, &with(change), SECRET);
        verifier(vec![hmac_key(key, SECRET)]).verify(&token, NOW).await.unwrap().token
    };
    let app = AppId::new("demo").unwrap();
    let whole = facts("k", Some("k"), json!({ "iat": NOW - 7, "jti": "t" })).await;
    let issued_s = (NOW - 7) as u32;
    assert_eq!(whole, TokenFingerprint { issued_s, id: id_hash(&app, "t"), key: key_hash("k") });
    // Without a `kid` in the token, the id of its key counts.
    assert_eq!(facts("k", None, json!({})).await.key, key_hash("k"));
    assert_eq!(facts("", Some("k2"), json!({})).await.key, key_hash("k2"));
    assert_eq!(facts("", None, json!({})).await, TokenFingerprint::default());
    for (iat, issued_s) in [(json!(1.9), 1), (json!(-5), 0)] {
        assert_eq!(facts("k", None, json!({ "iat": iat })).await.issued_s, issued_s);
    }
}

#[tokio::test]
async fn hazard_135_a_token_of_the_future_or_with_milliseconds_escapes_no_revocation() {
    let verifier = verifier(vec![hmac_key("", SECRET)]);
    let verify = async |iat: Value| {
        let token = sign(None, &with(json!({ "iat": iat })), SECRET);
        let verified = verifier.verify(&token, NOW).await;
        verified.map(|claims| (claims.token.issued_s, claims.issued_ahead_s))
    };
    let s = |seconds: u64| seconds as u32;
    assert_eq!(verify(json!(NOW + 60)).await, Ok((s(NOW + 60), None)));
    let ahead = verify(json!(NOW + 61)).await;
    assert_eq!(ahead, Ok((0, Some(s(NOW + 61)))), "as without iat: each revocation hits it");
    for iat in [json!(NOW * 1000), json!(1e300)] {
        let Err(AuthError::Malformed(why)) = verify(iat).await else { panic!("it is accepted") };
        assert!(why.starts_with("claim iat is later than the year 9999"), "{why}");
    }
}

/// A key pair: how tokens are signed, and the public half as PEM.
struct Pair {
    algorithm: Algorithm,
    signing: EncodingKey,
    pem: String,
    /// Where the library cannot make one.
    jwk: Option<Value>,
}

impl Pair {
    fn rsa() -> Self {
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let pkcs8: Pkcs8V1Der<'_> = pair.as_der().unwrap();
        let pem = pem("PRIVATE KEY", pkcs8.as_ref());
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
        let signing = EncodingKey::from_rsa_pem(pem.as_bytes()).unwrap();
        let pem = self::pem("PUBLIC KEY", public.as_ref());
        Self { algorithm: Algorithm::RS256, signing, pem, jwk: None }
    }

    fn ec() -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let pkcs8 = pair.to_pkcs8v1().unwrap();
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
        let signing = EncodingKey::from_ec_der(pkcs8.as_ref());
        let pem = pem("PUBLIC KEY", public.as_ref());
        Self { algorithm: Algorithm::ES256, signing, pem, jwk: None }
    }

    fn ed() -> Self {
        let pair = Ed25519KeyPair::generate().unwrap();
        let pkcs8 = pair.to_pkcs8().unwrap();
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
        let signing = EncodingKey::from_ed_der(pkcs8.as_ref());
        let pem = pem("PUBLIC KEY", public.as_ref());
        let x = URL_SAFE_NO_PAD.encode(pair.public_key());
        let jwk = Some(json!({ "kty": "OKP", "crv": "Ed25519", "x": x }));
        Self { algorithm: Algorithm::EdDSA, signing, pem, jwk }
    }

    fn token(&self, kid: &str, claims: &Value) -> String {
        let mut header = Header::new(self.algorithm);
        header.kid = Some(kid.into());
        encode(&header, claims, &self.signing).unwrap()
    }

    fn jwk(&self, kid: &str) -> Value {
        let made = || jsonwebtoken::jwk::Jwk::from_encoding_key(&self.signing, self.algorithm);
        let mut jwk = match &self.jwk {
            Some(jwk) => jwk.clone(),
            None => serde_json::to_value(made().unwrap()).unwrap(),
        };
        jwk["kid"] = kid.into();
        jwk
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn public_key(id: &str, algorithm: KeyAlgorithmName, path: PathBuf) -> KeyConfig {
    KeyConfig { id: id.into(), algorithm, public_key_file: Some(path), ..Default::default() }
}

#[tokio::test]
async fn a_valid_token_says_who_it_is_for() {
    let verifier = verifier(vec![hmac_key("a", SECRET)]);
    let token = sign(Some("a"), &with(json!({ "device": "phone", "groups": ["x"] })), SECRET);
    let claims = verifier.verify(&token, NOW).await.unwrap();
    assert_eq!((claims.user.app.as_str(), claims.user.user.as_str()), ("demo", "alice"));
    assert_eq!(claims.device.unwrap().as_str(), "phone");
    assert_eq!(claims.expires_s, NOW + 60);
}

#[tokio::test]
async fn old_and_new_keys_are_good_at_once() {
    let verifier = verifier(vec![hmac_key("old", SECRET), hmac_key("new", OTHER)]);
    for (kid, secret) in [(Some("old"), SECRET), (Some("new"), OTHER), (None, OTHER)] {
        assert!(verifier.verify(&sign(kid, &claims(), secret), NOW).await.is_ok(), "{kid:?}");
    }
    let crossed = sign(Some("old"), &claims(), OTHER);
    assert_eq!(refusal(&verifier, &crossed).await, AuthError::Signature);
    let unknown = sign(Some("older"), &claims(), SECRET);
    assert_eq!(refusal(&verifier, &unknown).await, AuthError::UnknownKey);
}

#[tokio::test]
async fn refusals_say_why() {
    let verifier = verifier(vec![hmac_key("a", SECRET)]);
    let error = async |change| refusal(&verifier, &sign(Some("a"), &with(change), SECRET)).await;
    assert_eq!(error(json!({ "exp": NOW })).await, AuthError::Expired);
    assert_eq!(error(json!({ "nbf": NOW + 1 })).await, AuthError::TooEarly);
    assert!(error(json!({ "app": "a:b" })).await.to_string().contains("app contains ':'"));
    assert!(error(json!({ "sub": "" })).await.to_string().contains("user is empty"));
    assert!(matches!(error(json!({ "exp": null })).await, AuthError::Malformed(_)));
    assert!(matches!(error(json!({ "sub": 7 })).await, AuthError::Malformed(_)));
    assert!(matches!(refusal(&verifier, "not.a.token").await, AuthError::Malformed(_)));
    assert!(matches!(refusal(&verifier, "").await, AuthError::Malformed(_)));
}

#[tokio::test]
async fn a_missing_claim_is_named() {
    let verifier = verifier(vec![hmac_key("a", SECRET)]);
    let mut claims = claims();
    claims.as_object_mut().unwrap().remove("exp");
    let error = refusal(&verifier, &sign(Some("a"), &claims, SECRET)).await;
    assert!(matches!(error, AuthError::Malformed(_)), "{error}");
}

#[tokio::test]
async fn unsigned_tokens_are_no_tokens() {
    let verifier = verifier(vec![hmac_key("a", SECRET)]);
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    for algorithm in ["none", "None", ""] {
        let head = part(json!({ "alg": algorithm, "kid": "a" }));
        let token = format!("{head}.{}.", part(claims()));
        assert!(matches!(refusal(&verifier, &token).await, AuthError::Malformed(_)));
    }
}

#[tokio::test]
async fn every_algorithm_is_checked_with_its_own_kind_of_key() {
    let pairs = [
        (Pair::rsa(), KeyAlgorithmName::RS256),
        (Pair::ec(), KeyAlgorithmName::ES256),
        (Pair::ed(), KeyAlgorithmName::EdDSA),
    ];
    for (pair, name) in &pairs {
        let pem = file(&pair.pem);
        let verifier = verifier(vec![public_key("k", *name, pem.path().into())]);
        assert!(verifier.verify(&pair.token("k", &claims()), NOW).await.is_ok(), "{name:?}");
        // The public key, which everybody has, is no HMAC secret.
        let forged = sign(Some("k"), &claims(), &pair.pem);
        assert_eq!(refusal(&verifier, &forged).await, AuthError::UnknownKey);
        for (other, _) in pairs.iter().filter(|(other, _)| other.algorithm != pair.algorithm) {
            let token = other.token("k", &claims());
            assert_eq!(refusal(&verifier, &token).await, AuthError::UnknownKey);
        }
    }
}

#[tokio::test]
async fn a_key_of_an_app_opens_nothing_of_another() {
    let shop = KeyConfig { apps: vec!["shop".into()], ..hmac_key("a", SECRET) };
    let verifier = verifier(vec![shop]);
    let token = |app: &str| sign(Some("a"), &with(json!({ "app": app })), SECRET);
    assert!(verifier.verify(&token("shop"), NOW).await.is_ok());
    assert_eq!(refusal(&verifier, &token("demo")).await, AuthError::OtherApp);
}

#[tokio::test]
async fn audience_and_issuer_are_checked_where_configured() {
    let config = AuthConfig {
        keys: vec![hmac_key("a", SECRET)],
        audience: vec!["barid".into()],
        issuer: vec!["login".into()],
        ..Default::default()
    };
    let verifier = Verifier::new(&config).unwrap();
    let token = |change| sign(Some("a"), &with(change), SECRET);
    let good = token(json!({ "aud": ["x", "barid"], "iss": "login" }));
    assert!(verifier.verify(&good, NOW).await.is_ok());
    let audience = token(json!({ "aud": "x", "iss": "login" }));
    assert_eq!(refusal(&verifier, &audience).await, AuthError::Audience);
    let issuer = token(json!({ "aud": "barid", "iss": "x" }));
    assert_eq!(refusal(&verifier, &issuer).await, AuthError::Issuer);
    assert!(verifier.verify(&token(json!({})), NOW).await.is_err());
}

#[tokio::test]
async fn hazard_94_a_token_for_another_service_or_for_too_long_is_refused() {
    let verifier = verifier(vec![hmac_key("a", SECRET)]);
    let token = |change| sign(Some("a"), &with(change), SECRET);
    for foreign in [json!("x"), json!(["x", "y"]), json!([]), json!("")] {
        let token = token(json!({ "aud": foreign }));
        assert_eq!(refusal(&verifier, &token).await, AuthError::Audience, "{foreign}");
    }
    assert!(verifier.verify(&token(json!({ "aud": null })), NOW).await.is_ok());
    let config = AuthConfig {
        keys: vec![hmac_key("a", SECRET)],
        lifetime_max_seconds: 3_600,
        nbf_leeway_seconds: 5,
        ..Default::default()
    };
    let verifier = Verifier::new(&config).unwrap();
    assert!(verifier.verify(&token(json!({ "exp": NOW + 3_605 })), NOW).await.is_ok());
    let long = token(json!({ "exp": NOW + 3_606 }));
    assert_eq!(refusal(&verifier, &long).await, AuthError::Lifetime(3_600));
}

#[tokio::test]
async fn key_sets_are_read_again_for_an_unknown_key_and_the_last_good_one_stays() {
    let (old, new) = (Pair::ec(), Pair::ed());
    let set = |keys: &[Value]| json!({ "keys": keys }).to_string();
    let secret = json!({ "kty": "oct", "kid": "sym", "k": URL_SAFE_NO_PAD.encode(SECRET) });
    let path = file(&set(&[old.jwk("old"), secret]));
    let jwks =
        JwksConfig { file: Some(path.path().into()), refresh_min_seconds: 0, ..Default::default() };
    let config = AuthConfig { jwks: vec![jwks], ..Default::default() };
    let verifier = Verifier::new(&config).unwrap();
    verifier.refresh().await;
    assert!(verifier.verify(&old.token("old", &claims()), NOW).await.is_ok());
    let symmetric = sign(Some("sym"), &claims(), SECRET);
    assert_eq!(refusal(&verifier, &symmetric).await, AuthError::UnknownKey);

    std::fs::write(path.path(), set(&[old.jwk("old"), new.jwk("new")])).unwrap();
    assert!(verifier.verify(&new.token("new", &claims()), NOW).await.is_ok());
    std::fs::write(path.path(), "broken").unwrap();
    assert_eq!(refusal(&verifier, &new.token("newer", &claims())).await, AuthError::UnknownKey);
    assert!(verifier.verify(&new.token("new", &claims()), NOW).await.is_ok());
}

#[tokio::test]
async fn hazard_95_a_key_set_that_was_not_read_or_long_ago_is_no_reason_to_refuse_for_good() {
    let pair = Pair::ed();
    let path = file("nothing yet");
    let jwks = JwksConfig {
        file: Some(path.path().into()),
        refresh_min_seconds: 0,
        refresh_seconds: 1,
        age_max_seconds: 1,
        ..Default::default()
    };
    let keys = vec![hmac_key("own", OTHER)];
    let config = AuthConfig { keys, jwks: vec![jwks], ..Default::default() };
    let verifier = Verifier::new(&config).unwrap();
    let token = pair.token("k", &claims());
    assert_eq!(refusal(&verifier, &token).await, AuthError::NoKeys);
    assert_eq!(verifier.missing(), Some(path.path().display().to_string()));
    // A key of the configuration needs no set.
    assert!(verifier.verify(&sign(Some("own"), &claims(), OTHER), NOW).await.is_ok());
    let set = |keys: &[Value]| json!({ "keys": keys }).to_string();
    std::fs::write(path.path(), set(&[pair.jwk("k")])).unwrap();
    assert!(verifier.verify(&token, NOW).await.is_ok());
    assert_eq!(verifier.missing(), None);
    // No keys are an answer: all were revoked.
    std::fs::write(path.path(), set(&[])).unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    verifier.refresh().await;
    assert_eq!(refusal(&verifier, &token).await, AuthError::UnknownKey);
    // Too old.
    std::fs::write(path.path(), set(&[pair.jwk("k")])).unwrap();
    assert!(verifier.verify(&token, NOW).await.is_ok());
    std::fs::write(path.path(), "broken").unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(refusal(&verifier, &token).await, AuthError::NoKeys);
    assert!(verifier.key_set_age().is_some_and(|age| age >= Duration::from_secs(1)));
}

#[tokio::test]
async fn hazard_95_a_set_has_so_many_keys_and_one_is_tried() {
    let (one, two) = (Pair::ed(), Pair::ed());
    let verifier = async |keys: Vec<Value>| {
        let path = file(&json!({ "keys": keys }).to_string());
        let jwks = JwksConfig { file: Some(path.path().into()), ..Default::default() };
        let config = AuthConfig { jwks: vec![jwks], ..Default::default() };
        let verifier = Verifier::new(&config).unwrap();
        verifier.refresh().await;
        verifier
    };
    let nameless = |pair: &Pair| {
        let mut jwk = pair.jwk("x");
        jwk.as_object_mut().unwrap().remove("kid");
        jwk
    };
    let token = one.token("one", &claims());
    let many = verifier((0..101).map(|n| one.jwk(&format!("k{n}"))).collect()).await;
    assert_eq!(refusal(&many, &token).await, AuthError::NoKeys, "too many");
    let both = verifier(vec![two.jwk("two"), one.jwk("one")]).await;
    assert!(both.verify(&token, NOW).await.is_ok());
    assert_eq!(refusal(&both, &one.token("two", &claims())).await, AuthError::Signature);
    // Without an id on either side, only the one key of its algorithm is tried.
    assert!(verifier(vec![nameless(&one)]).await.verify(&token, NOW).await.is_ok());
    let nameless = verifier(vec![nameless(&two), nameless(&one)]).await;
    assert_eq!(refusal(&nameless, &token).await, AuthError::UnknownKey);
}

#[tokio::test]
async fn hazard_95_a_key_set_comes_from_where_it_is_configured() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let pair = Pair::ed();
    let body = json!({ "keys": [pair.jwk("k")] }).to_string();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 1024];
            let read = stream.read(&mut request).await.unwrap_or(0);
            let head = match request[..read].starts_with(b"GET /moved") {
                true => "HTTP/1.1 302 Found\r\nLocation: /keys\r\nContent-Length: 0\r\n\r\n".into(),
                false => format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()),
            };
            let _ = stream.write_all(head.as_bytes()).await;
        }
    });
    let with = |path: &str, insecure_http| {
        let url = format!("http://{address}{path}");
        let jwks = JwksConfig { url: SecretUrl::new(url), insecure_http, ..Default::default() };
        Verifier::new(&AuthConfig { jwks: vec![jwks], ..Default::default() })
    };
    let token = pair.token("k", &claims());
    assert!(with("/keys", true).unwrap().verify(&token, NOW).await.is_ok());
    assert_eq!(refusal(&with("/moved", true).unwrap(), &token).await, AuthError::NoKeys);
    let plain = with("/keys", false).unwrap_err().to_string();
    assert!(plain.contains("set insecure_http"), "{plain}");
}

#[tokio::test]
async fn hazard_52_a_key_that_cannot_be_read_spoils_itself_alone() {
    let pair = Pair::ec();
    let numeric = json!({ "kty": "EC", "kid": 7, "crv": "P-256", "x": "AA", "y": "AA" });
    let keys = [numeric, json!("no object"), json!(null), pair.jwk("good")];
    let path = file(&json!({ "keys": keys }).to_string());
    let jwks = JwksConfig { file: Some(path.path().into()), ..Default::default() };
    let verifier = Verifier::new(&AuthConfig { jwks: vec![jwks], ..Default::default() }).unwrap();
    verifier.refresh().await;
    assert!(verifier.verify(&pair.token("good", &claims()), NOW).await.is_ok());
    assert_eq!(verifier.keys_skipped.get(), 3);
}

#[tokio::test]
async fn key_sets_come_over_http_at_a_bounded_rate() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let pair = Pair::ed();
    let body = json!({ "keys": [pair.jwk("k")] }).to_string();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/keys?secret=1", listener.local_addr().unwrap());
    let fetches = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let counted = fetches.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let _ = stream.read(&mut [0; 1024]).await;
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all((head + &body).as_bytes()).await;
        }
    });
    let config = AuthConfig {
        jwks: vec![JwksConfig {
            url: SecretUrl::new(url),
            insecure_http: true,
            ..Default::default()
        }],
        ..Default::default()
    };
    let verifier = Verifier::new(&config).unwrap();
    assert!(verifier.verify(&pair.token("k", &claims()), NOW).await.is_ok(), "read on demand");
    for _ in 0..5 {
        let error = refusal(&verifier, &pair.token("unknown", &claims())).await;
        assert_eq!(error, AuthError::UnknownKey);
    }
    assert_eq!(fetches.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[tokio::test]
async fn hazard_105_a_reading_goes_on_when_the_handshake_that_asked_for_it_has_gone() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let pair = Pair::ed();
    let body = json!({ "keys": [pair.jwk("k")] }).to_string();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = SecretUrl::new(format!("http://{}/keys", listener.local_addr().unwrap()));
    let jwks = JwksConfig { url, insecure_http: true, ..Default::default() };
    let config = AuthConfig { jwks: vec![jwks], ..Default::default() };
    let verifier = std::sync::Arc::new(Verifier::new(&config).unwrap());
    let token = pair.token("k", &claims());
    let ask = || {
        let (verifier, token) = (verifier.clone(), token.clone());
        tokio::spawn(async move { verifier.verify(&token, NOW).await })
    };
    let first = ask();
    let (mut stream, _) = listener.accept().await.unwrap();
    let _ = stream.read(&mut [0; 1024]).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    // The reading is under way: another one waits for it instead of being refused.
    let second = ask();
    tokio::task::yield_now().await;
    let head =
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    drop(stream);
    second.await.unwrap().unwrap();
    assert_eq!(verifier.missing(), None);
}

#[tokio::test]
async fn hazard_60_key_sets_come_over_https_from_whom_an_authority_of_ones_own_vouches_for() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let authority = barid_testkit::certificates::Authority::new().unwrap();
    let issued = authority.issue().unwrap();
    let (certificate, key) = (file(&issued.pem), file(&issued.key));
    let tls = crate::tls::Tls::new(&crate::config::TlsConfig {
        certificate_file: Some(certificate.path().into()),
        key_file: Some(key.path().into()),
    });
    let tls = tls.unwrap().unwrap();
    let pair = Pair::ed();
    let body = json!({ "keys": [pair.jwk("k")] }).to_string();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/keys", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A client that does not trust it hangs up.
            let Ok(hello) = crate::tls::Tls::hello(stream).await else { continue };
            let Ok(mut stream) = tls.accept(hello).await else { continue };
            let _ = stream.read(&mut [0; 1024]).await;
            let length = body.len();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
            let _ = stream.write_all((head + &body).as_bytes()).await;
            let _ = stream.flush().await;
        }
    });
    let with = |ca_file: Option<std::path::PathBuf>, url: &str| {
        let jwks = JwksConfig { url: SecretUrl::new(url), ca_file, ..Default::default() };
        Verifier::new(&AuthConfig { jwks: vec![jwks], ..Default::default() })
    };
    let (own, other) = (file(&authority.pem()), barid_testkit::certificates::ONE.pem);
    let other = file(other);
    let token = pair.token("k", &claims());
    let trusting = with(Some(own.path().into()), &url).unwrap();
    assert!(trusting.verify(&token, NOW).await.is_ok());
    for ca_file in [None, Some(other.path().to_owned())] {
        let verifier = with(ca_file, &url).unwrap();
        assert_eq!(refusal(&verifier, &token).await, AuthError::NoKeys);
    }
    let error = |ca_file: &str, url| with(Some(ca_file.into()), url).unwrap_err().to_string();
    let absent = error("/nowhere/ca.pem", "https://h");
    assert!(absent.starts_with("auth.jwks[0].ca_file /nowhere/ca.pem: No such file"), "{absent}");
    let empty = file("nothing");
    let empty = error(&empty.path().display().to_string(), "https://h");
    assert!(empty.contains(": it holds no certificate; write"), "{empty}");
    let plain = error(&own.path().display().to_string(), "http://h");
    assert!(plain.contains("write an https url"), "{plain}");
}

#[test]
fn hazard_153_all_keys_and_key_sets_that_cannot_be_read_are_named() {
    let secret_file =
        |path: &str| KeyConfig { secret_file: Some(path.into()), ..Default::default() };
    let config = AuthConfig {
        keys: vec![
            secret_file("/nowhere/a"),
            public_key("b", KeyAlgorithmName::RS256, "/nowhere/b.pem".into()),
            hmac_key("c", SECRET),
            secret_file("hush5ecret-hush5ecret-hush5ecret"),
            secret_file("/dev/zero"),
        ],
        jwks: vec![JwksConfig {
            url: SecretUrl::new("https://h"),
            ca_file: Some("/nowhere/ca.pem".into()),
            ..Default::default()
        }],
        ..Default::default()
    };
    let told = Verifier::new(&config).unwrap_err().to_string();
    let lines: Vec<&str> = told.lines().collect();
    let wanted = [
        "auth.keys[0].secret_file /nowhere/a: No such file",
        "auth.keys[1].public_key_file /nowhere/b.pem: No such file",
        "auth.keys[3].secret_file (a text of 32 bytes, not a path): No such file",
        "auth.keys[4].secret_file /dev/zero: it is a device",
        "auth.jwks[0].ca_file /nowhere/ca.pem: No such file",
    ];
    assert_eq!(lines.len(), wanted.len(), "{told}");
    lines.iter().zip(wanted).for_each(|(line, wanted)| assert!(line.starts_with(wanted), "{told}"));
    assert!(lines[2].ends_with("; a secret itself belongs in secret"), "{told}");

    let (none, pipe) = ("/nowhere/keys.json", "/dev/null");
    let set = |file: &str| JwksConfig { file: Some(file.into()), ..Default::default() };
    let config = AuthConfig { jwks: vec![set(none), set(pipe)], ..Default::default() };
    Verifier::new(&config).expect("they may come later");
    let told = check_key_set_files(&config).unwrap_err();
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines[0].starts_with("auth.jwks[0].file /nowhere/keys.json: No such file"), "{told}");
    assert!(lines[1].starts_with("auth.jwks[1].file /dev/null: it is a device"), "{told}");
}

#[tokio::test]
async fn hazard_61_the_end_of_a_token_is_bounded() {
    let verifier = verifier(vec![hmac_key("a", SECRET)]);
    let last = 253_402_300_799_u64;
    for exp in [0, 1, NOW, last, last + 1, NOW * 1000, 1 << 53, 1 << 63, u64::MAX] {
        for nbf in [0, 1, NOW, NOW + 1, 1 << 53, 1 << 63, u64::MAX] {
            let claims = with(json!({ "exp": exp, "nbf": nbf, "iat": nbf }));
            let verified = verifier.verify(&sign(Some("a"), &claims, SECRET), NOW).await;
            let fits = (NOW + 1..=last).contains(&exp) && nbf <= NOW;
            assert_eq!(verified.is_ok(), fits, "exp {exp}, nbf {nbf}: {verified:?}");
            if let Ok(claims) = verified {
                assert_eq!(claims.expires_s, exp);
            }
        }
    }
    for exp in [-1.0, -1e308, 1e308, 0.5] {
        let claims = with(json!({ "exp": exp }));
        assert!(verifier.verify(&sign(Some("a"), &claims, SECRET), NOW).await.is_err(), "{exp}");
    }
}

#[test]
fn keys_that_cannot_work_are_refused_at_start() {
    let error = |key: KeyConfig| {
        Verifier::new(&AuthConfig { keys: vec![key], ..Default::default() })
            .unwrap_err()
            .to_string()
    };
    assert!(error(hmac_key("a", "short")).contains("5 bytes, at least 32"));
    assert!(!error(hmac_key("a", "short")).contains("short"));
    assert!(error(KeyConfig::default()).contains("either secret or secret_file"));
    let missing = public_key("a", KeyAlgorithmName::RS256, "/nowhere.pem".into());
    assert!(error(missing).contains("/nowhere.pem"));
    let pem = file(&Pair::ed().pem);
    let wrong = public_key("a", KeyAlgorithmName::RS256, pem.path().into());
    assert!(error(wrong).contains("not a RS256 public key"));
    let app = KeyConfig { apps: vec!["a:b".into()], ..hmac_key("a", SECRET) };
    assert!(error(app).contains("app contains ':'"));
}

#[test]
fn hazard_112_a_private_key_is_not_a_public_key() {
    for label in ["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"] {
        let pem = file(&pem(label, b"hunter2"));
        let key = public_key("a", KeyAlgorithmName::RS256, pem.path().into());
        let keys = AuthConfig { keys: vec![key], ..Default::default() };
        let told = Verifier::new(&keys).unwrap_err().to_string();
        assert!(told.contains("is a private key; write its public key"), "{told}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(token in "\\PC{0,60}", parts in prop::collection::vec("[A-Za-z0-9_-]{0,30}", 3)) {
        let verifier = verifier(vec![hmac_key("a", SECRET)]);
        for token in [token, parts.join(".")] {
            prop_assert!(verifier.verify(&token, NOW).now_or_never().unwrap().is_err());
        }
    }

    #[test]
    fn a_token_with_one_character_changed_is_refused(
        at in any::<prop::sample::Index>(), character in "[A-Za-z0-9_.=-]",
    ) {
        let verifier = verifier(vec![hmac_key("a", SECRET)]);
        let token = sign(Some("a"), &claims(), SECRET);
        let at = at.index(token.len());
        let changed = format!("{}{character}{}", &token[..at], &token[at + 1..]);
        let verified = verifier.verify(&changed, NOW).now_or_never().unwrap();
        prop_assert_eq!(verified.is_ok(), changed == token);
    }

    #[test]
    fn claims_of_any_numbers_are_judged(exp in any::<f64>(), nbf in any::<f64>(), leeway in any::<u64>()) {
        let auth = AuthConfig {
            keys: vec![hmac_key("a", SECRET)],
            nbf_leeway_seconds: leeway,
            ..Default::default()
        };
        let token = sign(Some("a"), &with(json!({ "exp": exp, "nbf": nbf })), SECRET);
        let verified = Verifier::new(&auth).unwrap().verify(&token, NOW).now_or_never().unwrap();
        prop_assert!(verified.is_err() || exp >= (NOW + 1) as f64);
    }
}
