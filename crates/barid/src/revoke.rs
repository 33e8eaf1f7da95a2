//! `barid revoke`: revokes tokens of devices on every access node, lists what is revoked, and withdraws it.
//!
//! A revocation is a record of a compacted topic that every access node follows: it is in force within a second of
//! being in Kafka, and on nodes that start later.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use barid_bus::{Change, Followed, Follower, KafkaConfig, Producer, Properties};
use barid_core::mailbox::UserKey;
use barid_core::{AppId, UserId};
use barid_runtime::Unfit;
use barid_wire::revocation::{Name, REASON_BYTES_MAX, Revocation, Revoked};
use clap::Subcommand;
use serde::Serialize;
use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};
use tokio::time::{sleep, timeout};

use crate::output::{Coded, Output, Tone, clean};
use crate::values::{self, KafkaArgs};

/// What to do. Each revocation is kept until it is withdrawn, or for the time of --for.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Revoke the tokens that were issued to a user so far
    User {
        #[command(flatten)]
        user: UserArgs,
        #[command(flatten)]
        when: When,
        #[command(flatten)]
        how: How,
    },
    /// Revoke the token with an id (`jti`)
    Token {
        #[command(flatten)]
        token: TokenArgs,
        #[command(flatten)]
        how: How,
    },
    /// Revoke the tokens of a key, by its id (`kid`)
    Key {
        #[command(flatten)]
        key: KeyArgs,
        #[command(flatten)]
        how: How,
    },
    /// Revoke the tokens that were issued to all users of an app so far
    App {
        #[command(flatten)]
        app: AppArgs,
        #[command(flatten)]
        when: When,
        #[command(flatten)]
        how: How,
    },
    /// Revoke the tokens that were issued to all users of all apps so far
    Everyone {
        #[command(flatten)]
        when: When,
        #[command(flatten)]
        how: How,
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
}

#[derive(Debug, clap::Args)]
pub struct UserArgs {
    /// User
    #[arg(value_name = "USER")]
    pub user: UserId,
    /// The user's app
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
}

#[derive(Debug, clap::Args)]
pub struct TokenArgs {
    /// Id of the token (`jti`)
    #[arg(value_name = "JTI")]
    pub jti: Name,
    /// The token's app
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
}

#[derive(Debug, clap::Args)]
pub struct KeyArgs {
    /// Id of the key (`kid`)
    #[arg(value_name = "KID")]
    pub kid: Name,
}

#[derive(Debug, clap::Args)]
pub struct AppArgs {
    /// App
    #[arg(value_name = "APP")]
    pub app: AppId,
}

#[derive(Debug, clap::Args)]
pub struct When {
    /// Only tokens issued before this time (2026-12-01T09:00:00Z, or seconds since 1970), and tokens that do not say
    /// when [default: the next full second, which the command waits for]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub issued_before: Option<u64>,
}

#[derive(Debug, clap::Args)]
pub struct How {
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
    #[arg(long, default_value = "barid.revocations")]
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
    let (revoked, when, how) = match action {
        Action::User { user, when, how } => (user.revoked(), Some(when), how),
        Action::Token { token, how } => (token.revoked(), None, how),
        Action::Key { key, how } => (Revoked::Key(key.kid), None, how),
        Action::App { app, when, how } => (Revoked::App(app.app), Some(when), how),
        Action::Everyone { when, how } => (Revoked::Everyone, Some(when), how),
        Action::List(topic) => return list(&topic, out).await,
        Action::Withdraw(what) => return withdraw(what, out).await,
    };
    revoke(revoked, when, how, out).await
}

impl UserArgs {
    fn revoked(self) -> Revoked {
        Revoked::User(UserKey { app: self.app, user: self.user })
    }
}

impl TokenArgs {
    fn revoked(self) -> Revoked {
        Revoked::Token(self.app, self.jti)
    }
}

async fn revoke(
    revoked: Revoked,
    when: Option<When>,
    how: How,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let kafka = how.topic.config()?;
    how.topic.check(&kafka).await?;
    let issued_before_s = match when {
        None => 0,
        Some(When { issued_before: Some(given) }) => given,
        Some(When { issued_before: None }) => next_second().await,
    };
    let at_s = values::now_ms() / 1000;
    let revocation = Revocation {
        revoked,
        issued_before_s,
        until_s: how.period.map(|period| at_s.saturating_add(period.as_secs().max(1))),
        reason: how.reason,
        at_s,
    };
    let (key, value) = revocation.encode().map_err(|error| Coded::config(error.to_string()))?;
    let began = Instant::now();
    let producer = Producer::new(&kafka)?;
    let sent = producer.send(&kafka.topics.revocations, key.as_bytes(), value.into(), &[]).await;
    sent.with_context(|| cannot("revoke", &kafka))?;
    let took = began.elapsed().as_millis();
    out.either(&shown("revoked", &revocation), || {
        let title = out.paint(Tone::Good, "revoked");
        let took = out.paint(Tone::Faint, format_args!("{}, {took} ms", kafka.topics.revocations));
        format!("{title}  {}  {took}", line(&revocation, out))
    })?;
    Ok(ExitCode::SUCCESS)
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
    let (revoked, topic) = match what {
        Withdraw::User { user, topic } => (user.revoked(), topic),
        Withdraw::Token { token, topic } => (token.revoked(), topic),
        Withdraw::Key { key, topic } => (Revoked::Key(key.kid), topic),
        Withdraw::App { app, topic } => (Revoked::App(app.app), topic),
        Withdraw::Everyone(topic) => (Revoked::Everyone, topic),
    };
    let config = topic.config()?;
    let key = revoked.to_string();
    if !read(&config, topic.timeout).await?.contains_key(key.as_bytes()) {
        bail!("{} is not revoked", clean(&key));
    }
    let producer = Producer::new(&config)?;
    let deleted = producer.delete(&config.topics.revocations, key.as_bytes()).await;
    deleted.with_context(|| cannot("withdraw", &config))?;
    out.either(&Withdrawn { event: "withdrawn", key: &key }, || {
        format!("{}  {}", out.paint(Tone::Good, "withdrawn"), clean(&key))
    })?;
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
                    format!("{}  {why}; nodes ignore it", clean(&key))
                })?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The newest value of each key, in the order of the keys.
pub async fn read(
    config: &KafkaConfig,
    limit: Duration,
) -> anyhow::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut follower = Follower::start(config, &config.topics.revocations)?;
    let (mut all, mut trouble) = (BTreeMap::new(), None);
    let reading = async {
        loop {
            match follower.next().await {
                Followed::Changes(changes) => changes.into_iter().for_each(|change| {
                    let Change { key, value } = change;
                    match value {
                        Some(value) => drop(all.insert(key.to_vec(), value.to_vec())),
                        None => drop(all.remove(&*key)),
                    }
                }),
                Followed::CaughtUp => return Ok(()),
                Followed::Trouble(error) if error.is_away() => trouble = Some(error),
                Followed::Trouble(error) => return Err(error),
                Followed::Healed => trouble = None,
            }
        }
    };
    match timeout(limit, reading).await {
        Ok(read) => read.map(|()| all).with_context(|| cannot("read the revocations", config)),
        Err(_) => {
            let why = trouble.map_or_else(String::new, |error| format!(": {error}"));
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

    /// Fails if Kafka does not answer or has no such topic: producing would create one that is not compacted.
    async fn check(&self, config: &KafkaConfig) -> anyhow::Result<()> {
        let topics = vec![config.topics.revocations.clone()];
        let probe = barid_bus::probe(config, topics, self.timeout).await;
        match probe.found {
            Ok(_) => Ok(()),
            Err(Unfit::Away(why)) => {
                bail!(Coded::away(format!("Kafka does not answer ({}): {why}", probe.name)))
            }
            Err(Unfit::Unusable(why)) => bail!(Coded::config(format!("{}: {why}", probe.name))),
        }
    }
}

fn cannot(what: &str, config: &KafkaConfig) -> String {
    format!("cannot {what} through Kafka at {}", config.brokers.join(","))
}

fn shown<'a>(event: &'static str, revocation: &'a Revocation) -> Shown<'a> {
    Shown {
        event,
        key: revocation.revoked.to_string(),
        kind: revocation.revoked.kind(),
        issued_before: revocation.revoked.has_time().then_some(revocation.issued_before_s),
        until: revocation.until_s,
        reason: &revocation.reason,
        at: revocation.at_s,
    }
}

fn line(revocation: &Revocation, out: Output) -> String {
    let Revocation { revoked, issued_before_s, until_s, reason, .. } = revocation;
    let mut line = out.paint(Tone::Strong, clean(&revoked.to_string()));
    if revoked.has_time() {
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
    at.map_or_else(
        || at_s.to_string(),
        |at| {
            let (date, (h, m, s)) = (at.date(), at.to_hms());
            format!("{date}T{h:02}:{m:02}:{s:02}Z")
        },
    )
}

/// Parses `2026-12-01T09:00:00Z`, or seconds since the Unix epoch.
fn seconds(text: &str) -> Result<u64, String> {
    let form = || "write 2026-12-01T09:00:00Z, or seconds since 1970".to_owned();
    let given = match text.parse::<u64>() {
        Ok(seconds) => seconds,
        Err(_) => utc(text).ok_or_else(form)?,
    };
    match given {
        0 => Err("no token was issued before 1970".into()),
        1..=253_402_300_799 => Ok(given),
        _ => Err("it is later than the year 9999; it counts seconds, not milliseconds".into()),
    }
}

fn utc(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let parts = |text: &str, by: char| -> Option<[u16; 3]> {
        let parts: Option<Vec<u16>> = text.split(by).map(|part| part.parse().ok()).collect();
        parts?.try_into().ok()
    };
    let [year, month, day] = parts(date, '-')?;
    let [hour, minute, second] =
        parts(time, ':')?.map(|part| u8::try_from(part).unwrap_or(u8::MAX));
    let month = Month::try_from(u8::try_from(month).ok()?).ok()?;
    let date = Date::from_calendar_date(year.into(), month, u8::try_from(day).ok()?).ok()?;
    let time = Time::from_hms(hour, minute, second).ok()?;
    u64::try_from(PrimitiveDateTime::new(date, time).assume_utc().unix_timestamp()).ok()
}

fn reason(text: &str) -> Result<String, String> {
    if text.len() > REASON_BYTES_MAX {
        return Err(format!("a reason has at most {REASON_BYTES_MAX} bytes"));
    }
    match text.chars().any(char::is_control) {
        true => Err("a reason has no control characters".into()),
        false => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_date_or_seconds() {
        assert_eq!(seconds("1760000000"), Ok(1_760_000_000));
        assert_eq!(seconds("2025-10-09T08:53:20Z"), Ok(1_760_000_000));
        assert_eq!(date(1_760_000_000), "2025-10-09T08:53:20Z");
        for bad in ["", "0", "now", "2025-13-01T00:00:00Z", "2025-10-09T24:00:00Z", "1760000000000"]
        {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn the_next_second_is_waited_for() {
        let before = values::now_ms();
        let next_s = next_second().await;
        let after = values::now_ms();
        assert!(before < next_s * 1000 && next_s * 1000 <= after && after < before + 1_500);
    }
}
