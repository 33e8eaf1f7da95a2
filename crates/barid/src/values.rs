//! Options that several commands have, and their defaults.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use barid_access::auth::SECRET_BYTES_MIN;
use barid_bus::KafkaConfig;
use barid_core::Secret;
use barid_core::limits::TTL_SECONDS_MAX;
use barid_mailbox::RedisConfig;
use barid_mesh::{Credentials, InternalTlsConfig, Party};
use barid_runtime::SecretUrl;
use barid_runtime::words::is_host_port;
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfig;
use rdkafka::error::KafkaError;
use tempfile::TempDir;

use crate::authority;
use crate::output::Coded;
use crate::state::DevState;

/// More than the certificates or the secret in a file have, bytes.
const CONTENT_BYTES_MAX: u64 = 1 << 20;

/// Parses `30s`, `15m`, `1h`, `7d`, `500ms`; a number without a unit is in seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis_each: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err("a duration is a number and a unit: 500ms, 30s, 15m, 1h, 7d".into()),
    };
    let number: u64 = number.parse().map_err(|_| "a duration is 500ms, 30s, 15m, 1h, 7d")?;
    let millis = number.checked_mul(millis_each).filter(|ms| *ms <= TTL_SECONDS_MAX * 1000);
    millis
        .map(Duration::from_millis)
        .ok_or_else(|| "the longest duration is ten years (3660d)".into())
}

/// As [`duration`], but longer than 0.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("it must be longer than 0, such as 30s".into()),
        duration => Ok(duration),
    }
}

/// Parses `HOST:PORT`; HOST is a name or an address, an IPv6 one in brackets.
pub fn host_port(text: &str) -> Result<String, String> {
    if is_host_port(text) {
        return Ok(text.to_owned());
    }
    Err("write HOST:PORT, such as 127.0.0.1:7082".into())
}

/// Parses the name of a topic.
pub fn topic(text: &str) -> Result<String, String> {
    barid_bus::check_topic(text).map(|()| text.to_owned())
}

/// The content of a file that an option names, at most 1 MiB.
///
/// # Errors
/// Returns an error that names the option and the file if it is larger, or cannot be read.
pub fn content(option: &str, file: &Path) -> anyhow::Result<Vec<u8>> {
    let mut content = Vec::new();
    // Some files have no end.
    let read = std::fs::File::open(file)
        .and_then(|file| file.take(CONTENT_BYTES_MAX + 1).read_to_end(&mut content));
    let shown = file.display();
    read.map_err(|error| Coded::config(format!("{option} {shown}: cannot be read: {error}")))?;
    if content.len() as u64 > CONTENT_BYTES_MAX {
        bail!(Coded::config(format!("{option} {shown}: more than {CONTENT_BYTES_MAX} bytes")));
    }
    Ok(content)
}

/// A temporary directory, removed on drop.
///
/// # Errors
/// Returns an error that names the place if it cannot be created.
pub fn temporary_dir(prefix: &str) -> anyhow::Result<TempDir> {
    let refused = |error: std::io::Error| {
        let (place, why) = (std::env::temp_dir(), error.kind());
        let place = place.display();
        Coded::config(format!(
            "cannot create a directory in {place}: {why}; set TMPDIR to a directory that can be written"
        ))
    };
    Ok(tempfile::Builder::new().prefix(prefix).tempdir().map_err(refused)?)
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Parses a setting of librdkafka. Never fails, because clap would print the text, which may hold a password;
/// [`kafka_client`] refuses a setting without a key.
pub fn property(text: &str) -> Result<(String, String), std::convert::Infallible> {
    let (key, value) = text.split_once('=').unwrap_or_default();
    Ok((key.trim().into(), value.trim().into()))
}

/// Creates a client with further settings. Errors show no values: they may be secrets.
pub fn kafka_client<T: FromClientConfig>(
    mut client: ClientConfig,
    properties: &[(String, String)],
) -> anyhow::Result<T> {
    if properties.iter().any(|(key, _)| key.is_empty()) {
        bail!(Coded::config("-X: a setting is KEY=VALUE"));
    }
    client.extend(properties.iter().cloned());
    let created = client.create().map_err(|error| match error {
        KafkaError::ClientConfig(_, why, name, _) => Coded::config(format!("-X {name}: {why}")),
        error => Coded::config(format!("cannot make a Kafka client: {error}")),
    });
    Ok(created?)
}

/// A random name: `<prefix>-` and 10 letters and digits.
pub fn random_name(prefix: &str) -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let bits: u64 = rand::random();
    let name: String =
        (0..10).map(|i| char::from(ALPHABET[(bits >> (5 * i)) as usize & 31])).collect();
    format!("{prefix}-{name}")
}

/// Kafka's brokers: as given, else those of the running `barid dev`.
pub fn brokers(given: Option<String>) -> anyhow::Result<Vec<String>> {
    let brokers = match given {
        Some(brokers) => brokers,
        None => DevState::running()?
            .map(|dev| dev.brokers)
            .ok_or_else(|| missing("Kafka", "--brokers HOST:PORT", "BARID_BROKERS"))?,
    };
    broker_list("--brokers", &brokers)
}

/// The brokers in the value of an option.
///
/// # Errors
/// Returns an error if there are none, or one is not `HOST:PORT`.
pub fn broker_list(option: &str, text: &str) -> anyhow::Result<Vec<String>> {
    let form = "write HOST:PORT, or several, comma-separated";
    let all = text.split(',').map(str::trim).filter(|broker| !broker.is_empty());
    let brokers: Vec<String> = all.map(str::to_owned).collect();
    if brokers.is_empty() {
        bail!(Coded::config(format!("{option} is empty; {form}")));
    }
    let config = KafkaConfig { brokers, ..Default::default() };
    config.check().map_err(|problems| {
        let first = problems.lines().next().unwrap_or_default();
        let problem = first.split_once("]: ").map_or(first, |(_, problem)| problem);
        Coded::config(format!("{option}: {problem}; {form}"))
    })?;
    Ok(config.brokers)
}

/// The options of commands that read Kafka or produce to it.
#[derive(Debug, Clone, clap::Args)]
pub struct KafkaArgs {
    /// Kafka brokers: HOST:PORT, comma-separated [default: those of the running `barid dev`]
    #[arg(long, env = "BARID_BROKERS", value_name = "HOST:PORT")]
    pub brokers: Option<String>,
    /// Setting of librdkafka, such as security.protocol=ssl; may be repeated
    #[arg(short = 'X', value_name = "KEY=VALUE", value_parser = property)]
    pub properties: Vec<(String, String)>,
}

impl KafkaArgs {
    /// The brokers: as given, else those of the running `barid dev`.
    ///
    /// # Errors
    /// None are known, or the state of `barid dev` cannot be read.
    pub fn brokers(&self) -> anyhow::Result<Vec<String>> {
        brokers(self.brokers.clone())
    }
}

/// The options of commands that read Redis.
#[derive(Debug, Clone, clap::Args)]
pub struct RedisArgs {
    /// Redis: redis://HOST:PORT [default: that of the running `barid dev`]
    #[arg(id = "redis", long = "redis", env = "BARID_REDIS", value_name = "URL")]
    #[arg(hide_env_values = true)]
    pub url: Option<String>,
    /// Trust only rediss:// servers with a certificate in this file, or one signed by these (PEM)
    #[arg(long = "redis-ca-file", env = "BARID_REDIS_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Client certificate for a rediss:// server (PEM)
    #[arg(long = "redis-certificate-file", value_name = "FILE", requires = "key_file")]
    #[arg(env = "BARID_REDIS_CERTIFICATE_FILE")]
    pub certificate_file: Option<PathBuf>,
    /// Private key of the client certificate (PEM)
    #[arg(id = "key_file", long = "redis-key-file", value_name = "FILE")]
    #[arg(env = "BARID_REDIS_KEY_FILE")]
    pub key_file: Option<PathBuf>,
    /// Redis is a Redis Cluster
    #[arg(id = "redis_cluster", long = "redis-cluster")]
    pub cluster: bool,
    /// Number of shards, as configured in the roles
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub shards: u32,
}

impl RedisArgs {
    /// As given, else that of the running `barid dev`, if there is one.
    ///
    /// # Errors
    /// Returns an error if an option is invalid, or the state of `barid dev` cannot be read.
    pub fn known(&self) -> anyhow::Result<Option<RedisConfig>> {
        if let Some(config) = self.given()? {
            return Ok(Some(config));
        }
        DevState::running()?.map(|dev| self.at(&dev.redis)).transpose()
    }

    /// As given.
    ///
    /// # Errors
    /// Returns an error if an option is invalid.
    pub fn given(&self) -> anyhow::Result<Option<RedisConfig>> {
        self.url.as_deref().map(|url| self.at(url)).transpose()
    }

    fn at(&self, url: &str) -> anyhow::Result<RedisConfig> {
        let config = RedisConfig {
            url: SecretUrl::new(url),
            cluster: self.cluster,
            ca_file: self.ca_file.clone(),
            certificate_file: self.certificate_file.clone(),
            key_file: self.key_file.clone(),
            shards: self.shards,
            ..Default::default()
        };
        check_redis(&config)?;
        Ok(config)
    }

    /// As [`Self::known`], for commands that need Redis.
    ///
    /// # Errors
    /// Returns an error if no Redis is known, an option is invalid, or the state of `barid dev` cannot be read.
    pub fn needed(&self) -> anyhow::Result<RedisConfig> {
        self.known()?.ok_or_else(|| missing("Redis", "--redis redis://HOST:PORT", "BARID_REDIS"))
    }
}

/// Checks the Redis that options describe.
///
/// # Errors
/// Returns the first problem, with the option in place of the key.
pub fn check_redis(config: &RedisConfig) -> anyhow::Result<()> {
    let reword = |problems: String| {
        let first = problems.lines().next().unwrap_or_default().to_owned();
        let files = ["ca", "certificate", "key"].iter().fold(first, |text, key| {
            text.replace(&format!("redis.{key}_file"), &format!("--redis-{key}-file"))
        });
        Coded::config(files.replace("redis.url", "--redis"))
    };
    Ok(config.check().map_err(reword)?)
}

/// The options of commands that call access nodes as an operator.
#[derive(Debug, Clone, clap::Args)]
pub struct InternalArgs {
    /// Authority of the roles' certificates (PEM) [default: that of the running `barid dev`]
    #[arg(
        id = "internal_ca",
        long = "ca-file",
        env = "BARID_INTERNAL_CA_FILE",
        value_name = "FILE"
    )]
    #[arg(requires_all = ["internal_certificate", "internal_key"])]
    pub ca_file: Option<PathBuf>,
    /// Certificate of an operator (PEM): operator.pem of `barid cluster ca`
    #[arg(id = "internal_certificate", long = "certificate-file", value_name = "FILE")]
    #[arg(env = "BARID_INTERNAL_CERTIFICATE_FILE", requires_all = ["internal_ca", "internal_key"])]
    pub certificate_file: Option<PathBuf>,
    /// Private key of the certificate (PEM)
    #[arg(
        id = "internal_key",
        long = "key-file",
        env = "BARID_INTERNAL_KEY_FILE",
        value_name = "FILE"
    )]
    #[arg(requires_all = ["internal_ca", "internal_certificate"])]
    pub key_file: Option<PathBuf>,
}

impl InternalArgs {
    /// As given, else those of the running `barid dev`, else none: then the nodes must not use TLS.
    ///
    /// # Errors
    /// Returns an error if a file, or the state of `barid dev`, cannot be used.
    pub fn credentials(&self, redis: &RedisArgs) -> anyhow::Result<Credentials> {
        let mut files = InternalTlsConfig {
            ca_file: self.ca_file.clone(),
            certificate_file: self.certificate_file.clone(),
            key_file: self.key_file.clone(),
        };
        if !files.is_set()
            && redis.url.is_none()
            && let Some(dev) = DevState::running()?
        {
            files = authority::files(&dev.tls, Party::Operator);
        }
        let reword = |error: String| {
            let keys = ["ca", "certificate", "key"];
            keys.iter().fold(error, |error, key| {
                error.replace(&format!("internal_tls.{key}_file"), &format!("--{key}-file"))
            })
        };
        let reword = |error| Coded::config(reword(error));
        Ok(Credentials::read(&files, Party::Operator).map_err(reword)?)
    }
}

/// The URL for devices: as given, else that of the running `barid dev`.
pub fn url(given: Option<String>) -> anyhow::Result<String> {
    match given {
        Some(url) => Ok(url),
        None => DevState::running()?
            .map(|dev| dev.url)
            .ok_or_else(|| missing("an access node", "--url ws://HOST:PORT", "BARID_URL")),
    }
}

fn missing(what: &str, option: &str, variable: &str) -> anyhow::Error {
    let write = format!("give {option}, set {variable}, or start `barid dev` in another terminal");
    Coded::config(format!("the address of {what} is unknown: {write}")).into()
}

/// The key that signs tokens.
#[derive(Debug, clap::Args)]
pub struct KeyArgs {
    /// Shared secret of HS256 tokens (other users can see it in the process list: prefer --secret-file)
    #[arg(long, value_name = "SECRET", conflicts_with = "secret_file")]
    pub secret: Option<String>,
    /// File that contains the secret
    #[arg(long, value_name = "FILE", env = "BARID_SECRET_FILE")]
    pub secret_file: Option<PathBuf>,
    /// Id of the key (`kid` in the token's header)
    #[arg(long, value_name = "ID", env = "BARID_KEY_ID")]
    pub key_id: Option<String>,
}

/// The secret in the file of `--secret-file`, without spaces and line breaks around it, as access nodes read it.
///
/// # Errors
/// Returns an error if the file cannot be read, or access nodes would refuse its secret.
pub fn secret_in(file: &Path) -> anyhow::Result<Secret> {
    let secret = content("--secret-file", file)?;
    let option = format!("--secret-file {}", file.display());
    let secret = String::from_utf8(secret)
        .map_err(|_| Coded::config(format!("{option}: the secret is not UTF-8")))?;
    hs256(&option, secret.trim_ascii())
}

fn hs256(option: &str, secret: &str) -> anyhow::Result<Secret> {
    match secret.len() {
        bytes if bytes < SECRET_BYTES_MIN => bail!(Coded::config(format!(
            "{option}: the secret has {bytes} bytes, and access nodes refuse an HS256 secret of \
             less than {SECRET_BYTES_MIN}; write that of the nodes' auth.keys"
        ))),
        _ => Ok(Secret::new(secret)),
    }
}

/// A key: its secret and its id.
#[derive(Debug)]
pub struct Key {
    pub secret: Secret,
    pub id: Option<String>,
}

impl KeyArgs {
    /// Whether a secret is given.
    pub fn is_given(&self) -> bool {
        self.secret.is_some() || self.secret_file.is_some()
    }

    /// The key: as given, else that of the running `barid dev`.
    ///
    /// # Errors
    /// Returns an error if none is known, or access nodes would refuse its secret.
    pub fn key(&self) -> anyhow::Result<Key> {
        let id = self.key_id.clone();
        if let Some(secret) = &self.secret {
            return Ok(Key { secret: hs256("--secret", secret)?, id });
        }
        if let Some(file) = &self.secret_file {
            return Ok(Key { secret: secret_in(file)?, id });
        }
        let dev = DevState::running()?.ok_or_else(|| {
            Coded::config(
                "the key that signs tokens is unknown: give --secret-file FILE, set \
                 BARID_SECRET_FILE, or start `barid dev` in another terminal",
            )
        })?;
        Ok(Key { secret: Secret::new(dev.secret), id: id.or(Some(dev.key_id)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_numbers_with_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(duration("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for bad in ["", "h", "1w", "-1s", "1.5h", "99999999999999d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for good in ["127.0.0.1:7082", "node-1.example:1", "[::1]:65535"] {
            assert_eq!(host_port(good), Ok(good.into()));
        }
        for bad in
            ["", "h", "h:", ":1", "h:0", "h:65536", "h:x", "::1:80", "[h]:1", "http://h:1", "a b:1"]
        {
            assert!(host_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hazard_113_a_secret_that_nodes_refuse_is_refused() {
        let key = |secret: &str| {
            let args =
                KeyArgs { secret: Some(secret.into()), secret_file: None, key_id: None }.key();
            args.map(|key| key.secret.expose().to_owned()).map_err(|error| error.to_string())
        };
        let error = key(&"x".repeat(31)).unwrap_err();
        assert!(error.starts_with("--secret: the secret has 31 bytes") && !error.contains("xx"));
        assert_eq!(key(&"x".repeat(32)), Ok("x".repeat(32)));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        std::fs::write(&file, format!(" {}\r\n", "y".repeat(32))).unwrap();
        assert_eq!(secret_in(&file).unwrap().expose(), "y".repeat(32), "as nodes read it");
        std::fs::write(&file, format!("{}\n", "y".repeat(31))).unwrap();
        assert!(secret_in(&file).unwrap_err().to_string().contains("has 31 bytes"));
        let endless = secret_in(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(endless.contains("/dev/zero: more than 1048576 bytes"), "{endless}");
    }

    #[test]
    fn random_names_differ() {
        let (a, b) = (random_name("m"), random_name("m"));
        assert!(a != b && a.starts_with("m-") && a.len() == 12);
    }
}
