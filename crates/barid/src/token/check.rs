//! `barid token check`: says what an access node would say to a token, and why. It runs the node's own verifier with
//! the node's own configuration, and reads the topic of revocations into the node's own table.
//!
//! It prints claims, and never the token or a secret.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use barid_access::auth::{AuthError, Verifier};
use barid_access::config::{AuthConfig, KeyConfig};
use barid_access::{RevocationTable, key_hash, revokes};
use barid_bus::{Change, KafkaConfig};
use barid_core::GroupId;
use barid_runtime::exit;
use barid_session::{Claims, TokenFingerprint};
use barid_wire::cut;
use barid_wire::revocation::{Revocation, RevocationError, Subject};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Serialize;
use serde_json::Value;

use crate::output::{Coded, Output, Tone, clean, span};
use crate::revoke::{self, Replayed};
use crate::state::DevState;
use crate::values::{self, KeyArgs};

/// How much of a claim a hint shows, bytes.
const SHOWN_BYTES: usize = 64;
/// Why revocations are not read with --offline.
const OFFLINE: &str = "Kafka was not asked (--offline)";
/// No token is longer: a handshake has 16 KiB.
const TOKEN_BYTES_MAX: u64 = 1 << 20;

/// Options of `barid token check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Token; - or none: from standard input (other users can see arguments in the process list)
    #[arg(env = "BARID_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Configuration of the access node: its keys, audience, issuer and Kafka (with BARID_ACCESS_… variables)
    /// [default: that of the running `barid dev`]
    #[arg(long, value_name = "FILE", conflicts_with = "secret")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub key: KeyArgs,
    /// How long to wait for key sets, and for Kafka
    #[arg(long, default_value = "5s", value_parser = values::positive_duration)]
    pub timeout: Duration,
    /// Do not ask Kafka whether the token is revoked
    #[arg(long)]
    pub offline: bool,
}

#[derive(Serialize)]
struct Accepted<'a> {
    event: &'static str,
    app: &'a str,
    user: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<&'a str>,
    groups: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    issued_at: Option<u64>,
    expires_at: u64,
    expires_in_seconds: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<&'a str>,
    /// `None`: unknown, for the reason that follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    revoked: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    revocations_unknown: Option<&'a str>,
    /// The revocation that would hit the token, if the node held more of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    revocation_evicted: Option<&'a str>,
}

#[derive(Serialize)]
struct Refused<'a> {
    event: &'static str,
    status: u16,
    close_code: u16,
    refresh_close_code: u16,
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
}

/// A node, as far as tokens concern it.
struct Node {
    auth: AuthConfig,
    /// The error says why revocations are not read.
    kafka: Result<KafkaConfig, &'static str>,
}

/// What a token says. It is not verified: for hints only.
struct Unverified {
    header: Value,
    claims: Value,
}

/// Prints the verdict. The exit code is 1 if the token is refused, and 4 if Kafka does not say whether it is revoked.
pub async fn run(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let token = read(args.token.clone())?;
    let node = node(&args)?;
    let verifier = Verifier::new(&node.auth).map_err(|error| Coded::config(error.to_string()))?;
    let now_s = values::now_ms() / 1000;
    let unverified = Unverified::of(&token);
    let verified = match token.as_str() {
        "" => Err(AuthError::Missing),
        token => {
            verifier.refresh().await;
            verifier.verify(token, now_s).await
        }
    };
    let claims = match verified {
        Ok(claims) => claims,
        Err(error) => {
            let hint = hint(&error, &unverified, &node.auth, &verifier, now_s);
            return refused(&error, hint.as_deref(), out);
        }
    };
    let mut evicted = None;
    if let Ok(kafka) = &node.kafka {
        let mut held = Held::new(&claims, node.auth.revocations_max, now_s);
        let read = revoke::replay(kafka, args.timeout, |step| held.apply(step)).await;
        read.context("cannot tell whether the token is revoked (--offline does not ask)")?;
        match held.verdict() {
            Verdict::Valid => {}
            Verdict::Revoked(error, hint) => return refused(&error, Some(&hint), out),
            Verdict::Evicted(hint) => evicted = Some(hint),
        }
    }
    accepted(&claims, &unverified, &node, evicted.as_deref(), now_s, out)
}

/// The token: as given, or from standard input, without what a header has in front of it.
fn read(given: Option<String>) -> anyhow::Result<String> {
    let text = match given {
        Some(token) if token != "-" => token,
        _ => {
            let mut text = String::new();
            let mut input = std::io::stdin().take(TOKEN_BYTES_MAX);
            input.read_to_string(&mut text).context("cannot read the token")?;
            text
        }
    };
    let text = text.trim();
    let bare = text.strip_prefix("Authorization:").map_or(text, str::trim);
    Ok(bare.strip_prefix("Bearer ").map_or(bare, str::trim).to_owned())
}

fn node(args: &Args) -> anyhow::Result<Node> {
    if let Some(file) = &args.config {
        let loaded = barid_runtime::config::load::<barid_access::Config>(
            Some(file),
            "BARID_ACCESS_",
            std::env::vars_os(),
        );
        let loaded = loaded.map_err(|error| Coded::config(error.to_string()))?;
        let checked = loaded.config.check();
        checked.map_err(|problems| Coded::config(loaded.sources.add_to(&problems)))?;
        let limit_ms = u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX);
        let mut auth = loaded.config.auth;
        auth.jwks.iter_mut().for_each(|set| set.timeout_ms = set.timeout_ms.min(limit_ms));
        let kafka = match (args.offline, loaded.config.revocations) {
            (true, _) => Err(OFFLINE),
            (false, true) => Ok(loaded.config.kafka),
            (false, false) => Err("the node follows no revocations (revocations = false)"),
        };
        return Ok(Node { auth, kafka });
    }
    let key = args.key.key().map_err(|error| match args.key.is_given() {
        true => error,
        false => Coded::config(
            "the node's keys are unknown: give --config FILE or --secret-file FILE, or start \
             `barid dev` in another terminal",
        )
        .into(),
    })?;
    let key =
        KeyConfig { id: key.id.unwrap_or_default(), secret: key.secret, ..Default::default() };
    let dev = if args.key.is_given() { None } else { DevState::running()? };
    let kafka = match dev {
        _ if args.offline => Err(OFFLINE),
        Some(dev) => Ok(KafkaConfig {
            brokers: dev.brokers.split(',').map(str::to_owned).collect(),
            fetch_wait_max_ms: 5,
            ..Default::default()
        }),
        None => Err("no Kafka is known: give --config FILE"),
    };
    Ok(Node { auth: AuthConfig { keys: vec![key], ..Default::default() }, kafka })
}

/// A revocation, with the error of a record that cannot be decoded.
type Found = (Revocation, Option<RevocationError>);

/// What a node would say to a token that these revocations hit, and why; `None`: there are none.
fn revoked(hits: Vec<Found>, claims: &Claims, now_s: u64) -> Option<(AuthError, String)> {
    let hits_anyway = |(revocation, _): &Found| match claims.issued_ahead_s {
        Some(issued_s) => {
            let token = TokenFingerprint { issued_s, ..claims.token };
            revokes(revocation, &claims.user, &token, now_s)
        }
        None => true,
    };
    let is_anyway = hits.iter().any(hits_anyway);
    let newest = |(revocation, _): &Found| revocation.at_s;
    let shown = hits.into_iter().filter(|hit| !is_anyway || hits_anyway(hit)).max_by_key(newest);
    let (revocation, error) = shown?;
    let by = revoked_by(&revocation, error);
    match claims.issued_ahead_s {
        Some(issued_s) if !is_anyway => {
            let issued_s = u64::from(issued_s);
            let ahead = span(issued_s.saturating_sub(now_s).saturating_mul(1000));
            let (at, now) = (revoke::date(issued_s), revoke::date(now_s));
            let hint = format!(
                "its iat is {at}, {ahead} ahead of this machine's clock ({now}): compare the clocks \
                 of issuer and node; hit {by}"
            );
            Some((AuthError::IssuedAhead, hint))
        }
        _ => Some((AuthError::Revoked, by)),
    }
}

/// The revocations that a node holds which starts now, and those that hit one token.
struct Held<'a> {
    claims: &'a Claims,
    table: RevocationTable,
    entries_max: usize,
    /// Those that hit the token, by their keys, with the error of a record that cannot be decoded.
    hits: BTreeMap<Vec<u8>, Found>,
    now_s: u64,
}

/// What revocations mean for a token. The text names the revocation.
#[derive(Debug, PartialEq)]
enum Verdict {
    Valid,
    Revoked(AuthError, String),
    /// One would hit it, and the node has evicted that.
    Evicted(String),
}

impl<'a> Held<'a> {
    fn new(claims: &'a Claims, entries_max: usize, now_s: u64) -> Self {
        let table = RevocationTable::new(entries_max);
        Self { claims, table, entries_max, hits: BTreeMap::new(), now_s }
    }

    /// Applies records as a node applies them.
    fn apply(&mut self, step: Replayed) {
        match step {
            Replayed::Changes(changes) => {
                changes.into_iter().for_each(|change| self.apply_change(change));
                self.table.evict(self.now_s);
            }
            Replayed::Restart => {
                self.table = RevocationTable::new(self.entries_max);
                self.hits.clear();
            }
        }
    }

    fn apply_change(&mut self, Change { key, value }: Change) {
        self.hits.remove(&*key);
        let Some(value) = value else {
            if let Ok(subject) = Subject::from_key(&key) {
                self.table.remove(&subject);
            }
            return;
        };
        let Ok((revocation, error)) = Revocation::decode_or_all(&key, &value) else { return };
        self.table.insert(&revocation, self.now_s);
        if revokes(&revocation, &self.claims.user, &self.claims.token, self.now_s) {
            self.hits.insert(key.to_vec(), (revocation, error));
        }
    }

    /// The verdict once the topic is read to its end.
    fn verdict(mut self) -> Verdict {
        self.table.caught_up(self.now_s);
        self.table.evict(self.now_s);
        let table = &self.table;
        let (held, evicted): (Vec<_>, Vec<_>) =
            self.hits.into_values().partition(|(revocation, _)| table.holds(&revocation.subject));
        let said = |hits| revoked(hits, self.claims, self.now_s);
        match (said(held), said(evicted)) {
            (Some((error, text)), _) => Verdict::Revoked(error, text),
            (None, Some((_, text))) => Verdict::Evicted(format!(
                "{text}; a node holds {} revocations (auth.revocations_max) and has dropped this one",
                self.entries_max
            )),
            (None, None) => Verdict::Valid,
        }
    }
}

fn revoked_by(revocation: &Revocation, error: Option<RevocationError>) -> String {
    let mut text = format!("by {:?}", cut(&revocation.subject.to_string(), SHOWN_BYTES * 4));
    if let Some(error) = error {
        let _ = write!(text, ", all its tokens: {error}");
        return text;
    }
    if let Some(issued_before_s) = revocation.issued_before_s {
        let _ = write!(text, ", issued before {}", revoke::date(issued_before_s));
    }
    if let Some(until) = revocation.until_s {
        let _ = write!(text, ", until {}", revoke::date(until));
    }
    if !revocation.reason.is_empty() {
        let _ = write!(text, ": {}", revocation.reason);
    }
    text
}

fn accepted(
    claims: &Claims,
    unverified: &Unverified,
    node: &Node,
    evicted: Option<&str>,
    now_s: u64,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let ids = unverified.header["kid"].as_str().into_iter();
    let mut ids = ids.chain(node.auth.keys.iter().map(|key| key.id.as_str()));
    let key_id = ids.find(|id| !id.is_empty() && key_hash(id) == claims.token.key);
    let issued_at = (claims.token.issued_s > 0).then(|| u64::from(claims.token.issued_s));
    let left_s = claims.expires_s.saturating_sub(now_s);
    let unknown = node.kafka.as_ref().err().copied();
    let shown = Accepted {
        event: "accepted",
        app: claims.user.app.as_str(),
        user: claims.user.user.as_str(),
        device: claims.device.as_ref().map(|device| device.as_str()),
        groups: claims.groups.iter().map(GroupId::as_str).collect(),
        issued_at,
        expires_at: claims.expires_s,
        expires_in_seconds: left_s,
        key_id,
        revoked: unknown.is_none().then_some(false),
        revocations_unknown: unknown,
        revocation_evicted: evicted,
    };
    if out.is_json() {
        out.object(&shown)?;
        return Ok(ExitCode::SUCCESS);
    }
    let ago = |at_s: u64| match now_s.checked_sub(at_s) {
        Some(ago_s) => format!("{} ago", span(ago_s * 1000)),
        None => "in the future".into(),
    };
    let title = out.paint(Tone::Good, "accepted");
    out.line(format_args!("{title}  user {} of app {}", clean(shown.user), clean(shown.app)))?;
    let groups = shown.groups.iter().map(|group| clean(group)).collect::<Vec<_>>().join(", ");
    let revoked = match (unknown, evicted) {
        (Some(why), _) => format!("unknown: {why}"),
        (None, Some(text)) => out.paint(Tone::Warn, format_args!("no longer {}", clean(text))),
        (None, None) => "no".into(),
    };
    let dated = |at_s| format!("{} ({})", revoke::date(at_s), ago(at_s));
    let issued = match claims.issued_ahead_s {
        Some(at_s) => format!(
            "{}: too far ahead of this machine's clock, revocations treat it as without iat",
            revoke::date(at_s.into())
        ),
        None => issued_at.map_or("it does not say (no iat)".into(), dated),
    };
    for (name, value) in [
        ("device", shown.device.map_or("any".into(), clean)),
        ("groups", if groups.is_empty() { "none".into() } else { groups }),
        ("issued", issued),
        ("expires", format!("{} (in {})", revoke::date(claims.expires_s), span(left_s * 1000))),
        ("key", key_id.map_or("without an id".into(), clean)),
        ("revoked", revoked),
    ] {
        out.line(format_args!("  {name:<9} {value}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn refused(error: &AuthError, hint: Option<&str>, out: Output) -> anyhow::Result<ExitCode> {
    let (number, _) = error.status().split_once(' ').unwrap_or_default();
    let shown = Refused {
        event: "refused",
        status: number.parse().unwrap_or_default(),
        close_code: error.close_code().code(),
        refresh_close_code: error.refresh_code().code(),
        reason: error.to_string(),
        hint,
    };
    let exit = ExitCode::from(exit::FAILED);
    if out.is_json() {
        out.object(&shown)?;
        return Ok(exit);
    }
    let title = out.paint(Tone::Bad, "refused");
    out.line(format_args!("{title}  {}: {}", error.status(), clean(&shown.reason)))?;
    let codes = (shown.close_code, shown.refresh_close_code);
    out.line(format_args!(
        "  {:<9} {} with ?refuse=close; {} after a Refresh",
        "closes", codes.0, codes.1
    ))?;
    if let Some(hint) = hint {
        out.line(format_args!("  {:<9} {}", "hint", clean(hint)))?;
    }
    Ok(exit)
}

impl Unverified {
    fn of(token: &str) -> Self {
        let mut parts = token.split('.').map(|part| {
            let bytes = URL_SAFE_NO_PAD.decode(part).unwrap_or_default();
            serde_json::from_slice(&bytes).unwrap_or_default()
        });
        let (header, claims) = (parts.next(), parts.next());
        Self { header: header.unwrap_or_default(), claims: claims.unwrap_or_default() }
    }

    /// A claim that is a time, seconds.
    fn seconds(&self, claim: &str) -> Option<u64> {
        self.claims[claim].as_f64().map(|seconds| seconds as u64)
    }
}

/// What the token says, and what the node wants.
fn hint(
    error: &AuthError,
    unverified: &Unverified,
    auth: &AuthConfig,
    verifier: &Verifier,
    now_s: u64,
) -> Option<String> {
    let Unverified { header, claims } = unverified;
    let key = || format!("alg {} and kid {}", shown(&header["alg"]), shown(&header["kid"]));
    Some(match error {
        AuthError::Missing => "write the token, or pass it on standard input".into(),
        AuthError::Malformed(_)
        | AuthError::NoRevocations
        | AuthError::Revoked
        | AuthError::IssuedAhead => return None,
        AuthError::UnknownKey => {
            let own = auth.keys.iter().map(|key| match key.id.as_str() {
                "" => format!("{:?} without an id", key.algorithm),
                id => format!("{:?} {id:?}", key.algorithm),
            });
            let sets = auth.jwks.iter().map(|set| match &set.file {
                Some(file) => format!("the key set {}", file.display()),
                None => format!("the key set {}", set.url),
            });
            let all: Vec<_> = own.chain(sets).collect();
            format!("the token names {}; the node has {}", key(), all.join(", "))
        }
        AuthError::Signature => format!(
            "the token names {}, and another key has signed it, or it was changed: compare the bytes \
             of the secret (is it base64? does it end with a line break?), or the pair of keys",
            key()
        ),
        AuthError::NoKeys => {
            let set = verifier.missing()?;
            format!(
                "the key set {set} cannot be read: barid-access --check-config --connect says why"
            )
        }
        AuthError::Expired => {
            let at_s = unverified.seconds("exp")?;
            let (at, now) = (revoke::date(at_s), revoke::date(now_s));
            let ago = span(now_s.saturating_sub(at_s).saturating_mul(1000));
            format!("it expired {ago} ago, at {at}; this machine's clock says {now}")
        }
        AuthError::TooEarly => {
            let (at, now) = (revoke::date(unverified.seconds("nbf")?), revoke::date(now_s));
            let leeway = auth.nbf_leeway_seconds;
            format!(
                "it begins at {at} (nbf); this machine's clock says {now}, and the node tolerates \
                 {leeway} s (auth.nbf_leeway_seconds)"
            )
        }
        AuthError::Lifetime(max_s) => {
            let left = span(unverified.seconds("exp")?.saturating_sub(now_s).saturating_mul(1000));
            format!("it is valid for another {left}; auth.lifetime_max_seconds is {max_s}")
        }
        AuthError::Audience => {
            let wanted = match auth.audience.as_slice() {
                [] => "none: list it in auth.audience, or issue tokens without aud".into(),
                names => format!("one of {names:?} (auth.audience)"),
            };
            format!("the token names aud {}; the node wants {wanted}", shown(&claims["aud"]))
        }
        AuthError::Issuer => {
            let (named, wanted) = (shown(&claims["iss"]), &auth.issuer);
            format!("the token names iss {named}; the node wants one of {wanted:?} (auth.issuer)")
        }
        AuthError::OtherApp => format!(
            "the token names app {}, and the apps of the key with {} are others (apps)",
            shown(&claims["app"]),
            key()
        ),
    })
}

/// A claim, cut.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        value => cut(&value.to_string(), SHOWN_BYTES),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use barid_access::config::JwksConfig;
    use barid_core::Secret;
    use jsonwebtoken::{Algorithm, EncodingKey, Header};
    use serde_json::json;

    const NOW: u64 = 1_800_000_000;
    const SECRET: &str = "a secret of at least thirty-two bytes";

    fn auth() -> AuthConfig {
        let key = |id: &str, apps: &[&str]| KeyConfig {
            id: id.into(),
            secret: Secret::new(SECRET),
            apps: apps.iter().map(|app| (*app).into()).collect(),
            ..Default::default()
        };
        AuthConfig {
            keys: vec![key("k1", &[]), key("shop", &["shop"])],
            audience: vec!["push".into()],
            issuer: vec!["idp".into()],
            lifetime_max_seconds: 3_600,
            ..Default::default()
        }
    }

    fn sign(kid: &str, change: Value) -> String {
        let mut claims =
            json!({ "app": "demo", "sub": "a", "exp": NOW + 60, "aud": "push", "iss": "idp" });
        for (name, value) in change.as_object().into_iter().flatten() {
            claims[name] = value.clone();
        }
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some(kid.into());
        jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(SECRET.as_bytes()))
            .unwrap()
    }

    async fn told(auth: &AuthConfig, token: &str) -> (AuthError, String) {
        let verifier = Verifier::new(auth).unwrap();
        verifier.refresh().await;
        let error = match token {
            "" => AuthError::Missing,
            token => verifier.verify(token, NOW).await.unwrap_err(),
        };
        let told = hint(&error, &Unverified::of(token), auth, &verifier, NOW).unwrap_or_default();
        assert!(!told.contains(SECRET) && (token.is_empty() || !told.contains(token)), "{told}");
        (error, told)
    }

    #[tokio::test]
    async fn each_refusal_has_a_hint_of_what_is_said_and_what_is_wanted() {
        let good = sign("k1", json!({}));
        let changed = format!("{}AAAA", &good[..good.len() - 4]);
        for (token, error, words) in [
            (String::new(), AuthError::Missing, vec!["standard input"]),
            (sign("k9", json!({})), AuthError::UnknownKey, vec!["\"k9\"", "HS256 \"k1\"", "shop"]),
            (changed, AuthError::Signature, vec!["\"k1\"", "another key"]),
            (
                sign("k1", json!({ "exp": NOW - 120 })),
                AuthError::Expired,
                vec!["2 min ago", "2027-01-15T07:58:00Z", "clock says 2027-01-15T08:00:00Z"],
            ),
            (sign("k1", json!({ "nbf": NOW + 9 })), AuthError::TooEarly, vec!["08:00:09Z", "0 s"]),
            (
                sign("k1", json!({ "exp": NOW + 7_200 })),
                AuthError::Lifetime(3_600),
                vec!["another 2 h", "is 3600"],
            ),
            (
                sign("k1", json!({ "aud": ["shop"] })),
                AuthError::Audience,
                vec!["aud [\"shop\"]", "one of [\"push\"]"],
            ),
            (sign("k1", json!({ "iss": "x" })), AuthError::Issuer, vec!["iss \"x\"", "[\"idp\"]"]),
            (sign("shop", json!({})), AuthError::OtherApp, vec!["app \"demo\"", "kid \"shop\""]),
        ] {
            let (told, hint) = told(&auth(), &token).await;
            assert_eq!(told, error);
            assert!(words.iter().all(|word| hint.contains(word)), "{error:?}: {hint}");
        }
        let (error, hint) = told(&auth(), "a.b.c").await;
        assert!(matches!(error, AuthError::Malformed(_)) && hint.is_empty(), "its reason says it");
        let nowhere = JwksConfig { file: Some("/nowhere/keys.json".into()), ..Default::default() };
        let with_set = AuthConfig { jwks: vec![nowhere], ..auth() };
        let (error, hint) = told(&with_set, &sign("k9", json!({}))).await;
        assert_eq!(error, AuthError::NoKeys);
        assert!(hint.contains("/nowhere/keys.json cannot be read"), "{hint}");
        let long = told(&auth(), &sign("k1", json!({ "aud": "x".repeat(900) }))).await.1;
        assert!(long.len() < 300, "{long}");
    }

    #[tokio::test]
    async fn hazard_148_a_token_that_is_hit_because_of_a_clock_is_told_so() {
        let verifier = Verifier::new(&auth()).unwrap();
        let hit = |subject: &str| {
            let subject: barid_wire::revocation::Subject = subject.parse().unwrap();
            let issued_before_s = subject.has_time().then_some(NOW - 86_400);
            let reason = String::new();
            (Revocation { subject, issued_before_s, until_s: None, reason, at_s: 1 }, None)
        };
        let claims = async |iat: u64| {
            verifier.verify(&sign("k1", json!({ "iat": iat, "jti": "t" })), NOW).await.unwrap()
        };
        let ahead = claims(NOW + 90).await;
        let (error, hint) = revoked(vec![hit("user:demo:a")], &ahead, NOW).unwrap();
        assert_eq!(error, AuthError::IssuedAhead);
        for word in
            ["90.0 s", "ahead of this machine's clock", "2027-01-15T08:01:30Z", "user:demo:a"]
        {
            assert!(hint.contains(word), "{word}: {hint}");
        }
        let both = vec![hit("user:demo:a"), hit("token:demo:t")];
        let (error, hint) = revoked(both, &ahead, NOW).unwrap();
        assert!(error == AuthError::Revoked && hint.contains("token:demo:t"), "{error:?} {hint}");
        let old = claims(NOW - 86_401).await;
        assert_eq!(revoked(vec![hit("user:demo:a")], &old, NOW).unwrap().0, AuthError::Revoked);
        assert_eq!(revoked(Vec::new(), &ahead, NOW), None);
    }

    fn record(key: &str, at_s: u64) -> Change {
        let subject: Subject = key.parse().unwrap();
        let issued_before_s = subject.has_time().then_some(NOW);
        let (until_s, reason) = (None, String::new());
        let (key, value) =
            Revocation { subject, issued_before_s, until_s, reason, at_s }.encode().unwrap();
        Change { key: key.into_bytes().into(), value: Some(value.into()) }
    }

    #[tokio::test]
    async fn hazard_98_a_revocation_that_a_node_has_evicted_hits_no_token() {
        let verifier = Verifier::new(&auth()).unwrap();
        let claims = verifier.verify(&sign("k1", json!({})), NOW).await.unwrap();
        let verdict = |entries_max, steps: &[Replayed]| {
            let mut held = Held::new(&claims, entries_max, NOW);
            steps.iter().cloned().for_each(|step| held.apply(step));
            held.verdict()
        };
        // The writer's clock does not count.
        let mine = record("user:demo:a", NOW + 50);
        let others = (0..3).map(|n| record(&format!("user:demo:u{n}"), 1));
        let all: Vec<_> = std::iter::once(mine.clone()).chain(others).collect();
        let all = Replayed::Changes(all);
        let Verdict::Revoked(_, text) = verdict(4, std::slice::from_ref(&all)) else { panic!() };
        assert!(text.starts_with("by \"user:demo:a\", issued before "), "{text}");
        let Verdict::Evicted(text) = verdict(3, std::slice::from_ref(&all)) else { panic!() };
        assert!(text.contains("user:demo:a") && text.contains("holds 3 revocations"), "{text}");
        // A broader one stays, and so does one that makes room by its tombstone.
        let app = record("app:demo", 1);
        let Verdict::Revoked(_, text) = verdict(3, &[Replayed::Changes(vec![app]), all]) else {
            panic!()
        };
        assert!(text.contains("app:demo"), "{text}");
        let gone = Change { value: None, ..record("user:demo:u0", 1) };
        let two = vec![mine.clone(), record("user:demo:u0", 1), gone];
        assert!(matches!(verdict(1, &[Replayed::Changes(two)]), Verdict::Revoked(..)));
        // Withdrawn, or no longer in a topic that began again.
        let withdrawn = Change { value: None, ..mine.clone() };
        let steps = [Replayed::Changes(vec![mine.clone()]), Replayed::Changes(vec![withdrawn])];
        assert_eq!(verdict(1, &steps), Verdict::Valid);
        let steps = [Replayed::Changes(vec![mine]), Replayed::Restart];
        assert_eq!(verdict(1, &steps), Verdict::Valid);
    }

    #[test]
    fn what_a_header_has_in_front_of_the_token_is_left_out() {
        for text in ["a.b.c", " a.b.c\n", "Bearer a.b.c", "Authorization: Bearer a.b.c\r\n"] {
            assert_eq!(read(Some(text.into())).unwrap(), "a.b.c");
        }
    }
}
