//! `barid revoke`: revokes tokens of devices on every access node, lists what is revoked, and withdraws it.
//!
//! A revocation is a record of a compacted topic that every access node follows: nodes refuse the token within a second
//! of the record being in Kafka, and so do nodes that start later.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use barid_bus::{
    Change, Followed, Follower, KafkaConfig, Producer, Properties, describe_revocations,
};
use barid_core::limits::EPOCH_SECONDS_MAX;
use barid_core::mailbox::UserKey;
use barid_core::{AppId, UserId};
use barid_wire::revocation::{Name, Revocation, Subject, check_reason};
use bytes::Bytes;
use clap::Subcommand;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::{sleep, timeout};

use crate::confirm::{ConfirmArgs, Step};
use crate::output::{Coded, Output, Tone, clean};
use crate::values::{self, KafkaArgs};

/// Writings of a revocation while another operator overwrites it.
const WRITES_MAX: u32 = 10;
/// For a producer to be ready to write at once.
const PRODUCER_SETUP: Duration = Duration::from_secs(1);

/// The actions of `barid revoke`. Each revocation is kept until it is withdrawn, or for the time of --for. Another one of the same tokens
/// only extends it: withdraw it first to shorten it.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Revoke the tokens that were issued to a user so far
    User {
        #[command(flatten)]
        user: UserArgs,
        #[command(flatten)]
        issued: IssuedArgs,
        #[command(flatten)]
        revoke: RevokeArgs,
    },
    /// Revoke the token with an id (`jti`)
    Token {
        #[command(flatten)]
        token: TokenArgs,
        #[command(flatten)]
        revoke: RevokeArgs,
    },
    /// Revoke the tokens of a key, by its id (`kid`)
    Key {
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        revoke: RevokeArgs,
    },
    /// Revoke the tokens that were issued to all users of an app so far
    App {
        #[command(flatten)]
        app: AppArgs,
        #[command(flatten)]
        confirm: ConfirmArgs,
        #[command(flatten)]
        issued: IssuedArgs,
        #[command(flatten)]
        revoke: RevokeArgs,
    },
    /// Revoke the tokens that were issued to all users of all apps so far
    Everyone {
        #[command(flatten)]
        confirm: ConfirmArgs,
        #[command(flatten)]
        issued: IssuedArgs,
        #[command(flatten)]
        revoke: RevokeArgs,
    },
    /// List what is revoked
    List(TopicArgs),
    /// Withdraw a revocation
    #[command(subcommand)]
    Withdraw(Withdraw),
}

/// What to withdraw.
#[derive(Debug, Subcommand)]
pub enum Withdraw {
    /// That of a user's tokens
    User {
        #[command(flatten)]
        user: UserArgs,
        #[command(flatten)]
        topic: TopicArgs,
    },
    /// That of the token with an id
    Token {
        #[command(flatten)]
        token: TokenArgs,
        #[command(flatten)]
        topic: TopicArgs,
    },
    /// That of the tokens of a key
    Key {
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        topic: TopicArgs,
    },
    /// That of an app's tokens
    App {
        #[command(flatten)]
        app: AppArgs,
        #[command(flatten)]
        topic: TopicArgs,
    },
    /// That of everyone's tokens
    Everyone(TopicArgs),
    /// All that have ended: until then they stay in the topic
    Ended(TopicArgs),
    /// The record with a key, as `barid revoke list` shows it; for malformed ones
    Record {
        /// Key of the record
        #[arg(value_name = "KEY", allow_hyphen_values = true)]
        key: String,
        #[command(flatten)]
        topic: TopicArgs,
    },
}

#[derive(Debug, clap::Args)]
pub struct UserArgs {
    /// User
    #[arg(value_name = "USER", allow_hyphen_values = true)]
    pub user: UserId,
    /// The user's app
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
}

#[derive(Debug, clap::Args)]
pub struct TokenArgs {
    /// Id of the token (`jti`)
    #[arg(value_name = "JTI", allow_hyphen_values = true)]
    pub jti: Name,
    /// The token's app
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
}

#[derive(Debug, clap::Args)]
pub struct KeyArgs {
    /// Id of the key (`kid`)
    #[arg(value_name = "KID", allow_hyphen_values = true)]
    pub kid: Name,
}

#[derive(Debug, clap::Args)]
pub struct AppArgs {
    /// App
    #[arg(value_name = "APP")]
    pub app: AppId,
}

#[derive(Debug, clap::Args)]
pub struct IssuedArgs {
    /// Only tokens issued before this time (2026-12-01T09:00:00Z, or seconds since 1970), and tokens that do not say
    /// when [default: the next full second, which the command waits for]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub issued_before: Option<u64>,
    /// Also tokens issued within this time from now: as much as the issuer's clock may be ahead of this machine's. A
    /// device needs another token if it gets one meanwhile
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = values::duration)]
    #[arg(conflicts_with = "issued_before")]
    pub margin: Duration,
}

#[derive(Debug, clap::Args)]
pub struct RevokeArgs {
    /// End the revocation after this time: 30m, 24h, 7d. As long as the longest life of a token is enough
    #[arg(long = "for", value_name = "TIME", value_parser = values::positive_duration)]
    pub period: Option<Duration>,
    /// Reason, for operators: devices are not told
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = reason)]
    pub reason: String,
    #[command(flatten)]
    pub topic: TopicArgs,
}

#[derive(Debug, Clone, clap::Args)]
pub struct TopicArgs {
    /// Topic of revocations
    #[arg(long, default_value = "barid.revocations", value_parser = values::topic)]
    pub topic: String,
    /// How long to wait for Kafka
    #[arg(long, default_value = "30s", value_parser = values::positive_duration)]
    pub timeout: Duration,
    #[command(flatten)]
    pub kafka: KafkaArgs,
}

/// A revocation, as it is shown.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    event: &'static str,
    key: String,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    issued_before: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<u64>,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
    at: u64,
}

#[derive(Serialize)]
struct Withdrawn<'a> {
    event: &'static str,
    key: &'a str,
}

#[derive(Serialize)]
struct Malformed<'a> {
    event: &'static str,
    key: &'a str,
    why: &'a str,
}

/// Runs one action.
pub async fn run(action: Action, out: Output) -> anyhow::Result<ExitCode> {
    let (subject, issued, args) = match action {
        Action::User { user, issued, revoke } => (user.subject(), Some(issued), revoke),
        Action::Token { token, revoke } => (token.subject(), None, revoke),
        Action::Key { key, revoke } => (Subject::Key(key.kid), None, revoke),
        Action::App { app: AppArgs { app }, confirm, issued, revoke } => {
            confirm.ask(&Step {
                given: "revoke app",
                effect: &format!("closes all sessions of app {app} until devices have new tokens"),
                word: app.as_str(),
            })?;
            (Subject::App(app), Some(issued), revoke)
        }
        Action::Everyone { confirm, issued, revoke } => {
            confirm.ask(&Step {
                given: "revoke everyone",
                effect: "closes all sessions of all apps until devices have new tokens",
                word: "everyone",
            })?;
            (Subject::Everyone, Some(issued), revoke)
        }
        Action::List(topic) => return list(&topic, out).await,
        Action::Withdraw(what) => return withdraw(what, out).await,
    };
    revoke(subject, issued, args, out).await
}

impl UserArgs {
    fn subject(self) -> Subject {
        Subject::User(UserKey { app: self.app, user: self.user })
    }
}

impl TokenArgs {
    fn subject(self) -> Subject {
        Subject::Token(self.app, self.jti)
    }
}

async fn revoke(
    subject: Subject,
    issued: Option<IssuedArgs>,
    args: RevokeArgs,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let kafka = args.topic.config()?;
    args.topic.check(&kafka).await?;
    // Its set-up takes half a second, in which the topic may change.
    let producer = Producer::new(&kafka)?;
    let issued_before_s = match issued {
        None => None,
        Some(IssuedArgs { issued_before: Some(given), .. }) => Some(given),
        Some(IssuedArgs { margin, .. }) => Some(next_second().await + margin.as_secs()),
    };
    let at_s = values::now_ms() / 1000;
    let mut revocation = Revocation {
        subject,
        issued_before_s,
        until_s: args.period.map(|period| at_s.saturating_add(period.as_secs().max(1))),
        reason: args.reason,
        at_s,
    };
    let began = Instant::now();
    establish(&mut revocation, &producer, &kafka, args.topic.timeout).await?;
    confirm(&revocation, began, &kafka, out)
}

/// Writes a revocation until Kafka has it, extended by what is in force of the same tokens. Another operator may write or
/// remove the same key meanwhile: each writing is read back, with the record that it has replaced.
async fn establish(
    revocation: &mut Revocation,
    producer: &Producer,
    kafka: &KafkaConfig,
    limit: Duration,
) -> anyhow::Result<()> {
    let key = revocation.subject.to_string();
    for written in 0..WRITES_MAX {
        let last = last_records(&[key.clone().into_bytes()], kafka, limit).await?;
        let last = last.into_values().next().unwrap_or_default();
        let now_s = values::now_ms() / 1000;
        let present = last.present(&key, now_s)?;
        present.iter().for_each(|present| revocation.extend(present));
        if written > 0 {
            last.replaced(&key, now_s).iter().for_each(|replaced| revocation.extend(replaced));
        }
        if present.is_some_and(|present| present.covers(revocation)) {
            return Ok(());
        }
        let encoded = revocation.encode().map_err(|error| Coded::config(error.to_string()));
        let (key, value) = encoded?;
        let topic = &kafka.topics.revocations;
        let sent = producer.send(topic, key.as_bytes(), value.into(), &[]).await;
        sent.with_context(|| cannot("revoke", kafka))?;
    }
    bail!("another operator writes {} all the time", clean(&key))
}

fn confirm(
    revocation: &Revocation,
    began: Instant,
    kafka: &KafkaConfig,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let took = began.elapsed().as_millis();
    out.either(&shown("revoked", revocation), || {
        let title = out.paint(Tone::Good, "revoked");
        let took = out.paint(Tone::Faint, format_args!("{}, {took} ms", kafka.topics.revocations));
        format!("{title}  {}  {took}", line(revocation, out))
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The last two records of a key in the log; `None`: a tombstone, or no record.
#[derive(Debug, Default)]
struct Last {
    newest: Option<Bytes>,
    before: Option<Bytes>,
}

impl Last {
    fn add(&mut self, value: Option<Bytes>) {
        self.before = std::mem::replace(&mut self.newest, value);
    }

    /// The revocation that is in force: a new one must not weaken it.
    fn present(&self, key: &str, now_s: u64) -> anyhow::Result<Option<Revocation>> {
        let Some(value) = &self.newest else { return Ok(None) };
        let present = Revocation::decode(key.as_bytes(), value).map_err(|error| {
            anyhow!(
                "{} has a record that this version cannot read, and that revokes all its tokens \
                 ({error}): withdraw it first",
                clean(key)
            )
        })?;
        Ok(Some(present).filter(|present| !present.is_over(now_s)))
    }

    /// The revocation that would be in force without the newest record.
    fn replaced(&self, key: &str, now_s: u64) -> Option<Revocation> {
        let (replaced, _) =
            Revocation::decode_or_all(key.as_bytes(), self.before.as_ref()?).ok()?;
        Some(replaced).filter(|replaced| !replaced.is_over(now_s))
    }

    /// The revocation in force that the newest record, a tombstone, has removed.
    fn removed(&self, key: &str, now_s: u64) -> Option<Revocation> {
        if self.newest.is_some() { None } else { self.replaced(key, now_s) }
    }
}

/// The last records of these keys.
async fn last_records(
    keys: &[Vec<u8>],
    kafka: &KafkaConfig,
    limit: Duration,
) -> anyhow::Result<BTreeMap<Vec<u8>, Last>> {
    let mut all: BTreeMap<Vec<u8>, Last> =
        keys.iter().map(|key| (key.clone(), Last::default())).collect();
    let each = |step| match step {
        Replayed::Changes(changes) => changes.into_iter().for_each(|Change { key, value }| {
            if let Some(last) = all.get_mut(&*key) {
                last.add(value);
            }
        }),
        Replayed::Restart => all.values_mut().for_each(|last| *last = Last::default()),
    };
    replay(kafka, limit, each).await?;
    Ok(all)
}

/// Waits until the present second is over, and returns the next one: tokens that were issued so far are issued before
/// it, and those that devices get afterwards are not.
async fn next_second() -> u64 {
    let next_s = values::now_ms() / 1000 + 1;
    while values::now_ms() / 1000 < next_s {
        sleep(Duration::from_millis(1000 - values::now_ms() % 1000)).await;
    }
    next_s
}

async fn withdraw(what: Withdraw, out: Output) -> anyhow::Result<ExitCode> {
    let (wanted, topic) = match what {
        Withdraw::User { user, topic } => (user.subject().to_string(), topic),
        Withdraw::Token { token, topic } => (token.subject().to_string(), topic),
        Withdraw::Key { key, topic } => (Subject::Key(key.kid).to_string(), topic),
        Withdraw::App { app, topic } => (Subject::App(app.app).to_string(), topic),
        Withdraw::Everyone(topic) => (Subject::Everyone.to_string(), topic),
        Withdraw::Record { key, topic } => (key, topic),
        Withdraw::Ended(topic) => return withdraw_ended(&topic, out).await,
    };
    let config = topic.config()?;
    let producer = Producer::new(&config)?;
    let all = read(&config, topic.timeout).await?;
    // As `list` shows it: malformed keys are not always UTF-8.
    let keys: Vec<_> =
        all.into_keys().filter(|key| String::from_utf8_lossy(key) == wanted).collect();
    if keys.is_empty() {
        bail!("{} is not revoked", clean(&wanted));
    }
    delete(&keys, &producer, &config, out).await
}

async fn withdraw_ended(topic: &TopicArgs, out: Output) -> anyhow::Result<ExitCode> {
    let config = topic.config()?;
    let producer = Producer::new(&config)?;
    // Its set-up takes half a second, in which the topic may change.
    sleep(PRODUCER_SETUP).await;
    let now_s = values::now_ms() / 1000;
    let all = read(&config, topic.timeout).await?;
    let ended = all.into_iter().filter(|(key, value)| {
        Revocation::decode(key, value).is_ok_and(|revocation| revocation.is_over(now_s))
    });
    let keys: Vec<_> = ended.map(|(key, _)| key).collect();
    if keys.is_empty() && !out.is_json() {
        out.line("no revocation has ended")?;
    }
    delete(&keys, &producer, &config, out).await?;
    restore(&keys, &producer, &config, topic.timeout, out).await
}

/// Writes again what [`withdraw_ended`] has removed by mistake: another operator may have revoked the same tokens again
/// after it had read the topic, and before its tombstone.
async fn restore(
    keys: &[Vec<u8>],
    producer: &Producer,
    config: &KafkaConfig,
    limit: Duration,
    out: Output,
) -> anyhow::Result<ExitCode> {
    if keys.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let now_s = values::now_ms() / 1000;
    for (key, last) in last_records(keys, config, limit).await? {
        let key = String::from_utf8_lossy(&key);
        let Some(mut removed) = last.removed(&key, now_s) else { continue };
        establish(&mut removed, producer, config, limit).await?;
        out.either(&shown("restored", &removed), || {
            let title = out.paint(Tone::Warn, "restored");
            format!("{title}  {}: it was revoked again meanwhile", line(&removed, out))
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn delete(
    keys: &[Vec<u8>],
    producer: &Producer,
    config: &KafkaConfig,
    out: Output,
) -> anyhow::Result<ExitCode> {
    for key in keys {
        let deleted = producer.delete(&config.topics.revocations, key).await;
        deleted.with_context(|| cannot("withdraw", config))?;
        let key = String::from_utf8_lossy(key);
        out.either(&Withdrawn { event: "withdrawn", key: &key }, || {
            format!("{}  {}", out.paint(Tone::Good, "withdrawn"), clean(&key))
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(topic: &TopicArgs, out: Output) -> anyhow::Result<ExitCode> {
    let all = read(&topic.config()?, topic.timeout).await?;
    if all.is_empty() && !out.is_json() {
        out.line("nothing is revoked")?;
    }
    for (key, value) in &all {
        match Revocation::decode(key, value) {
            Ok(revocation) => {
                out.either(&shown("revocation", &revocation), || line(&revocation, out))?;
            }
            Err(error) => {
                let key = String::from_utf8_lossy(key);
                let why = error.to_string();
                let malformed = Malformed { event: "malformed", key: &key, why: &why };
                out.either(&malformed, || {
                    let why = out.paint(Tone::Bad, clean(&why));
                    let effect = match key.parse::<Subject>() {
                        Ok(_) => "nodes refuse all tokens of this key",
                        Err(_) => "nodes ignore it",
                    };
                    format!("{}  {why}; {effect}", clean(&key))
                })?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The newest value of each key, in the order of the keys.
async fn read(config: &KafkaConfig, limit: Duration) -> anyhow::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut all = BTreeMap::new();
    let each = |step| match step {
        Replayed::Changes(changes) => changes.into_iter().for_each(|change| match change.value {
            Some(value) => drop(all.insert(change.key.to_vec(), value.to_vec())),
            None => drop(all.remove(&*change.key)),
        }),
        Replayed::Restart => all.clear(),
    };
    replay(config, limit, each).await?;
    Ok(all)
}

/// A step of [`replay`].
#[derive(Debug, Clone)]
pub enum Replayed {
    /// Records, in the order of the log; as many at once as a node applies at once.
    Changes(Vec<Change>),
    /// The topic is read from its beginning again: what was read before does not count.
    Restart,
}

/// Reads the topic of revocations from its beginning to its end: calls `each` with every step.
///
/// # Errors
/// Returns an error if Kafka does not answer within `limit`, or the topic cannot be read.
pub async fn replay(
    config: &KafkaConfig,
    limit: Duration,
    mut each: impl FnMut(Replayed),
) -> anyhow::Result<()> {
    let mut follower = Follower::start(config, &config.topics.revocations)?;
    let mut degraded = None;
    let reading = async {
        loop {
            match follower.next().await {
                Followed::Changes(changes) => each(Replayed::Changes(changes)),
                Followed::CaughtUp => return Ok(()),
                Followed::Restarted => each(Replayed::Restart),
                // Found by `describe_revocations` before anything is written.
                Followed::Partitions(_) => {}
                Followed::Degraded(error) if error.is_away() => degraded = Some(error),
                Followed::Degraded(error) => return Err(error),
                Followed::Recovered => degraded = None,
            }
        }
    };
    match timeout(limit, reading).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            let problem = format!("{}: {error}", cannot("read the revocations", config));
            bail!(Coded::config(problem))
        }
        Err(_) => {
            let why = degraded.map_or_else(String::new, |error| format!(": {error}"));
            let brokers = config.brokers.join(",");
            bail!(Coded::away(format!("Kafka at {brokers} does not answer within {limit:?}{why}")))
        }
    }
}

impl TopicArgs {
    /// The configuration of clients.
    ///
    /// # Errors
    /// No broker is known, or a setting is invalid.
    pub fn config(&self) -> anyhow::Result<KafkaConfig> {
        if self.kafka.properties.iter().any(|(key, _)| key.is_empty()) {
            bail!(Coded::config("-X: a setting is KEY=VALUE"));
        }
        let timeout_ms = u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX);
        let mut config = KafkaConfig {
            brokers: self.kafka.brokers()?,
            properties: Properties(self.kafka.properties.iter().cloned().collect()),
            delivery_timeout_ms: timeout_ms.clamp(100, 3_600_000),
            fetch_wait_max_ms: 5,
            ..Default::default()
        };
        config.topics.revocations.clone_from(&self.topic);
        config.check().map_err(Coded::config)?;
        Ok(config)
    }

    /// Fails if Kafka does not answer, has no such topic, or would forget its records.
    async fn check(&self, config: &KafkaConfig) -> anyhow::Result<()> {
        match describe_revocations(config, self.timeout).await {
            Ok(topic) if topic.problems.is_empty() => Ok(()),
            Ok(topic) => {
                let problems = topic.problems.join("; ");
                bail!(Coded::config(format!("topic {}: {problems}", topic.name)))
            }
            Err(error) if error.is_away() => {
                let brokers = config.brokers.join(",");
                bail!(Coded::away(format!("Kafka at {brokers} does not answer: {error}")))
            }
            Err(error) => bail!(Coded::config(format!("{}: {error}", cannot("revoke", config)))),
        }
    }
}

fn cannot(what: &str, config: &KafkaConfig) -> String {
    format!("cannot {what} through Kafka at {}", config.brokers.join(","))
}

fn shown<'a>(event: &'static str, revocation: &'a Revocation) -> Shown<'a> {
    Shown {
        event,
        key: revocation.subject.to_string(),
        kind: revocation.subject.kind(),
        issued_before: revocation.issued_before_s,
        until: revocation.until_s,
        reason: &revocation.reason,
        at: revocation.at_s,
    }
}

fn line(revocation: &Revocation, out: Output) -> String {
    let Revocation { subject, issued_before_s, until_s, reason, .. } = revocation;
    let mut line = out.paint(Tone::Strong, clean(&subject.to_string()));
    if let Some(issued_before_s) = issued_before_s {
        line += &format!("  issued before {}", date(*issued_before_s));
    }
    if let Some(until) = until_s {
        let is_over = revocation.is_over(values::now_ms() / 1000);
        let verb = if is_over { "ended" } else { "until" };
        line += &format!("  {verb} {}", date(*until));
    }
    if !reason.is_empty() {
        line += &format!("  {}", out.paint(Tone::Faint, clean(reason)));
    }
    line
}

/// A time in UTC.
pub fn date(at_s: u64) -> String {
    let at = i64::try_from(at_s).ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
    at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_else(|| at_s.to_string())
}

/// Parses `2026-12-01T09:00:00Z`, or seconds since the Unix epoch.
fn seconds(text: &str) -> Result<u64, String> {
    let seconds = text.parse::<u64>().ok().or_else(|| {
        let date = OffsetDateTime::parse(text, &Rfc3339).ok()?;
        u64::try_from(date.unix_timestamp()).ok()
    });
    match seconds {
        None => Err("write 2026-12-01T09:00:00Z, or seconds since 1970".into()),
        Some(0) => Err("no token was issued before 1970".into()),
        Some(seconds) if seconds > EPOCH_SECONDS_MAX => {
            Err("it is later than the year 9999; it counts seconds, not milliseconds".into())
        }
        Some(seconds) => Ok(seconds),
    }
}

fn reason(text: &str) -> Result<String, String> {
    check_reason(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_date_or_seconds() {
        assert_eq!(seconds("1760000000"), Ok(1_760_000_000));
        assert_eq!(seconds("2025-10-09T08:53:20Z"), Ok(1_760_000_000));
        assert_eq!(seconds("2025-10-09T10:53:20+02:00"), Ok(1_760_000_000));
        assert_eq!(date(1_760_000_000), "2025-10-09T08:53:20Z");
        for bad in [
            "",
            "0",
            "now",
            "2025-13-01T00:00:00Z",
            "2025-10-09T24:00:00Z",
            "+2025-+1-+1T00:00:00Z",
            "1760000000000",
        ] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hazard_157_what_a_tombstone_or_a_record_has_replaced_unseen_is_found() {
        const NOW: u64 = 1_800_000_000;
        let key = "token:demo:a";
        let record = |until_s: Option<u64>| {
            let subject = key.parse().unwrap();
            let revocation =
                Revocation { subject, issued_before_s: None, until_s, reason: "".into(), at_s: 1 };
            Some(Bytes::from(revocation.encode().unwrap().1))
        };
        let (ended, hour, forever) = (record(Some(NOW)), record(Some(NOW + 3_600)), record(None));
        let last = |records: &[&Option<Bytes>]| {
            let mut last = Last::default();
            records.iter().for_each(|record| last.add((*record).clone()));
            last
        };
        let removed = |records: &[&Option<Bytes>]| {
            last(records).removed(key, NOW).map(|removed| removed.until_s)
        };
        let tombstone = None;
        assert_eq!(removed(&[]), None);
        assert_eq!(removed(&[&ended, &tombstone]), None, "as it was meant");
        assert_eq!(removed(&[&ended, &forever, &tombstone]), Some(None), "revoked meanwhile");
        assert_eq!(removed(&[&ended, &hour, &tombstone]), Some(Some(NOW + 3_600)));
        assert_eq!(removed(&[&ended, &forever, &tombstone, &hour]), None, "and once more");
        let twice = removed(&[&ended, &forever, &tombstone, &tombstone]);
        assert_eq!(twice, None, "another operator has withdrawn it");
        let odd = Some(Bytes::from_static(b"{\"v\":2}"));
        assert_eq!(removed(&[&odd, &tombstone]), Some(None), "it revokes all tokens of its key");

        let replaced = |records: &[&Option<Bytes>]| {
            last(records).replaced(key, NOW).map(|replaced| replaced.until_s)
        };
        assert_eq!(replaced(&[&forever, &hour]), Some(None), "by a shorter one");
        assert_eq!(replaced(&[&ended, &hour]), None);
        assert_eq!(replaced(&[&forever, &tombstone, &hour]), None, "it was withdrawn");
        assert!(last(&[&odd]).present(key, NOW).is_err());
        assert!(last(&[&ended]).present(key, NOW).unwrap().is_none());
    }

    #[tokio::test]
    async fn the_next_second_is_waited_for() {
        let before = values::now_ms();
        let next_s = next_second().await;
        let after = values::now_ms();
        assert!(before < next_s * 1000 && next_s * 1000 <= after);
    }
}
