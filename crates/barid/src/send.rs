//! `barid send`: what any business service does, from the command line.

use std::collections::HashSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use barid_bus::KafkaConfig;
use barid_core::{AppId, DeviceId, MessageId, UserId};
use barid_wire::record::{CONTENT_TYPE, Format, RecordLimits, decode_push};
use barid_wire::v1::{Receipt, ReceiptKind};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::ValueEnum;
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::time::{Instant as Deadline, timeout_at};

use crate::output::{Output, Tone, clean};
use crate::receipts::Receipts;
use crate::values;

/// How long Kafka may take: people wait.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Options of `barid send`.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("audience").required(true).args(["user", "users"]),
    group = clap::ArgGroup::new("body").required(true).args(["text", "text_option", "json_body", "data", "file"]),
)]
pub struct Args {
    /// The app
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
    /// The user whom it is for
    #[arg(long)]
    pub user: Option<UserId>,
    /// Several users, with commas between
    #[arg(long, value_delimiter = ',', value_name = "USER,USER")]
    pub users: Vec<UserId>,
    /// Only this device of the user
    #[arg(long, conflicts_with = "users")]
    pub device: Option<DeviceId>,

    /// What it says
    #[arg(value_name = "TEXT")]
    pub text: Option<String>,
    /// What it says, if it begins with a dash
    #[arg(long = "text", value_name = "TEXT", allow_hyphen_values = true)]
    pub text_option: Option<String>,
    /// A JSON value instead of text
    #[arg(long, value_name = "JSON")]
    pub json_body: Option<String>,
    /// Bytes instead of text, in base64
    #[arg(long, value_name = "BASE64")]
    pub data: Option<String>,
    /// The content of a file, - for standard input: .json as JSON, .txt as text, others as bytes
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// How to send the file, whatever its name
    #[arg(long = "as", value_name = "KIND", requires = "file")]
    pub kind: Option<Kind>,

    /// The message's id; the same id again is a duplicate, and not delivered [default: random]
    #[arg(long)]
    pub id: Option<MessageId>,
    /// Which of the three topics
    #[arg(long, default_value = "normal")]
    pub priority: Priority,
    /// How long it is worth delivering: 30s, 15m, 1h, 7d
    #[arg(long, value_parser = values::duration)]
    pub ttl: Option<Duration>,
    /// Takes the place of an older message with this key that still waits
    #[arg(long, value_name = "KEY")]
    pub collapse_key: Option<String>,
    /// Receipts to ask for, with commas between
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND")]
    pub receipts: Vec<Milestone>,
    /// Ask for these receipts, and wait for them from every user
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND")]
    pub wait: Vec<Milestone>,
    /// How long to wait
    #[arg(long, default_value = "30s", value_parser = values::duration)]
    pub timeout: Duration,
    /// Kafka: HOST:PORT, several with commas between
    #[arg(long, env = "BARID_BROKERS", value_name = "HOST:PORT")]
    pub brokers: Option<String>,
    /// A setting of librdkafka, as security.protocol=ssl; may be repeated
    #[arg(short = 'X', value_name = "KEY=VALUE", value_parser = property)]
    pub properties: Vec<(String, String)>,
}

fn property(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a setting is KEY=VALUE")?;
    Ok((key.trim().into(), value.trim().into()))
}

/// How applications read a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Text,
    Json,
    Data,
}

/// Which topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Priority {
    High,
    Normal,
    Bulk,
}

/// A receipt that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Milestone {
    Accepted,
    Duplicate,
    Sent,
    Acked,
    Expired,
    Exhausted,
}

/// A record as the least of producers would write it.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub id: String,
    pub app: String,
    pub to: To,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collapse_key: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub receipts: Vec<&'static str>,
}

/// A record's audience.
#[derive(Debug, Default, Serialize)]
pub struct To {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<String>,
}

#[derive(Serialize)]
struct Sent<'a> {
    event: &'static str,
    id: &'a str,
    topic: &'a str,
    bytes: usize,
    elapsed_ms: f64,
}

#[derive(Serialize)]
struct Heard<'a> {
    event: &'static str,
    kind: &'static str,
    id: &'a str,
    user: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    device: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    seq: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    code: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
    elapsed_ms: f64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Sends one message; exit code 1 if the receipts waited for do not come.
pub async fn run(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let record = record(&args)?;
    let payload = encode(&record)?;
    let config =
        KafkaConfig { brokers: values::brokers(args.brokers.clone())?, ..Default::default() };
    let receipts = match args.wait.is_empty() {
        true => None,
        false => {
            let topic = &config.topics.receipts;
            Some(Receipts::open(&config.brokers, topic, args.properties.clone()).await?)
        }
    };
    let topic = match args.priority {
        Priority::High => &config.topics.push_high,
        Priority::Normal => &config.topics.push,
        Priority::Bulk => &config.topics.push_bulk,
    };
    let began = Instant::now();
    produce(&config, &args.properties, topic, &record, &payload).await?;
    let elapsed_ms = millis(began);
    let bytes = payload.len();
    let sent = Sent { event: "sent", id: &record.id, topic, bytes, elapsed_ms };
    out.either(&sent, || {
        let to = out.paint(Tone::Strong, clean(&record.to.shown()));
        let took = out.paint(Tone::Faint, format_args!("{topic}, {elapsed_ms:.1} ms"));
        format!("{}  {} to {to}  {took}", column(out, "sent"), clean(&record.id))
    })?;
    match receipts {
        Some(receipts) => wait(&args, &record, &receipts, began, out).await,
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Produces one record, keyed by its user so that a user's messages keep their order. Not
/// idempotent, which takes half a second to set up: the message's id does the same.
async fn produce(
    config: &KafkaConfig,
    properties: &[(String, String)],
    topic: &str,
    record: &Record,
    payload: &[u8],
) -> anyhow::Result<()> {
    let brokers = config.brokers.join(",");
    let key = record.to.user.as_ref().or(record.to.users.first()).map_or("", String::as_str);
    let content_type = Header { key: CONTENT_TYPE, value: Some(Format::Json.content_type()) };
    let headers = OwnedHeaders::new_with_capacity(1).insert(content_type);
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", &brokers)
        .set("client.id", "barid-cli")
        .set("acks", "all")
        .set("linger.ms", "0")
        .set("message.max.bytes", "100000000")
        .set("message.timeout.ms", SEND_TIMEOUT.as_millis().to_string())
        .set_log_level(RDKafkaLogLevel::Emerg);
    client.extend(properties.iter().cloned());
    let producer: FutureProducer = client.create().context("cannot make a Kafka client")?;
    let record = FutureRecord::to(topic).key(key).payload(payload).headers(headers);
    match producer.send(record, SEND_TIMEOUT).await {
        Ok(_) => Ok(()),
        Err((error, _)) => {
            Err(error).with_context(|| format!("cannot send through Kafka at {brokers}"))
        }
    }
}

async fn wait(
    args: &Args,
    record: &Record,
    receipts: &Receipts,
    began: Instant,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let users = record.to.user.iter().chain(&record.to.users);
    let mut awaited: HashSet<(Milestone, String)> = users
        .flat_map(|user| args.wait.iter().map(|milestone| (*milestone, user.clone())))
        .collect();
    let deadline = Deadline::now() + args.timeout;
    while !awaited.is_empty() {
        let Ok(receipt) = timeout_at(deadline, receipts.next()).await else {
            bail!("{} after {:?}", missing(&awaited), args.timeout);
        };
        let receipt = receipt?;
        if receipt.id != record.id || receipt.app != record.app {
            continue;
        }
        tell(&receipt, began, out)?;
        if receipt.kind() == ReceiptKind::Refused {
            return Ok(ExitCode::FAILURE);
        }
        awaited.retain(|(m, user)| !(m.kind() == receipt.kind() && *user == receipt.user));
    }
    Ok(ExitCode::SUCCESS)
}

fn missing(awaited: &HashSet<(Milestone, String)>) -> String {
    let mut names: Vec<String> =
        awaited.iter().map(|(m, user)| format!("{} of {}", m.as_str(), clean(user))).collect();
    names.sort();
    format!("no receipt {}", names.join(", "))
}

fn tell(receipt: &Receipt, began: Instant, out: Output) -> anyhow::Result<()> {
    let elapsed_ms = millis(began);
    let kind = kind_word(receipt.kind());
    let heard = Heard {
        event: "receipt",
        kind,
        id: &receipt.id,
        user: &receipt.user,
        device: &receipt.device,
        seq: receipt.seq,
        code: &receipt.code,
        reason: &receipt.reason,
        elapsed_ms,
    };
    out.either(&heard, || {
        let mut who = clean(&receipt.user);
        if !receipt.device.is_empty() {
            who = format!("{who}/{}", clean(&receipt.device));
        }
        let what = match receipt.kind() {
            ReceiptKind::Refused => format!("{}: {}", receipt.code, clean(&receipt.reason)),
            _ if receipt.seq > 0 => format!("seq {}", receipt.seq),
            _ => String::new(),
        };
        let took = out.paint(Tone::Faint, format_args!("{elapsed_ms:.1} ms"));
        format!("{}  {who}  {what}  {took}", column(out, kind))
    })?;
    Ok(())
}

fn column(out: Output, word: &str) -> String {
    let tone = match word {
        "refused" | "exhausted" | "expired" => Tone::Bad,
        "duplicate" => Tone::Warn,
        _ => Tone::Good,
    };
    out.paint(tone, format_args!("{word:<9}"))
}

fn millis(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e4).round() / 10.0
}

/// A receipt kind's word on the wire.
pub fn kind_word(kind: ReceiptKind) -> &'static str {
    match kind {
        ReceiptKind::Unspecified => "unknown",
        ReceiptKind::Accepted => "accepted",
        ReceiptKind::Duplicate => "duplicate",
        ReceiptKind::Sent => "sent",
        ReceiptKind::Acked => "acked",
        ReceiptKind::Expired => "expired",
        ReceiptKind::Exhausted => "exhausted",
        ReceiptKind::Refused => "refused",
    }
}

impl Milestone {
    fn kind(self) -> ReceiptKind {
        match self {
            Self::Accepted => ReceiptKind::Accepted,
            Self::Duplicate => ReceiptKind::Duplicate,
            Self::Sent => ReceiptKind::Sent,
            Self::Acked => ReceiptKind::Acked,
            Self::Expired => ReceiptKind::Expired,
            Self::Exhausted => ReceiptKind::Exhausted,
        }
    }

    fn as_str(self) -> &'static str {
        kind_word(self.kind())
    }
}

impl To {
    fn shown(&self) -> String {
        match (&self.user, &self.device) {
            (Some(user), Some(device)) => format!("{user}/{device}"),
            (Some(user), None) => user.clone(),
            (None, _) => self.users.join(", "),
        }
    }
}

fn record(args: &Args) -> anyhow::Result<Record> {
    let mut record = Record {
        id: match &args.id {
            Some(id) => id.to_string(),
            None => values::random_name("cli"),
        },
        app: args.app.to_string(),
        to: To {
            user: args.user.as_ref().map(UserId::to_string),
            device: args.device.as_ref().map(DeviceId::to_string),
            users: args.users.iter().map(UserId::to_string).collect(),
        },
        ttl_seconds: args.ttl.map(whole_seconds).transpose()?,
        collapse_key: args.collapse_key.clone(),
        receipts: asked(args),
        ..Default::default()
    };
    put_body(args, &mut record)?;
    Ok(record)
}

fn whole_seconds(ttl: Duration) -> anyhow::Result<u64> {
    match ttl.subsec_millis() {
        0 => Ok(ttl.as_secs()),
        _ => bail!("--ttl counts whole seconds"),
    }
}

fn asked(args: &Args) -> Vec<&'static str> {
    let mut words: Vec<_> = args.receipts.iter().chain(&args.wait).map(|m| m.as_str()).collect();
    words.sort_unstable();
    words.dedup();
    words
}

fn put_body(args: &Args, record: &mut Record) -> anyhow::Result<()> {
    if let Some(file) = &args.file {
        return put_file(file, args.kind, record);
    }
    record.text = args.text.clone().or(args.text_option.clone());
    record.data.clone_from(&args.data);
    if let Some(json) = &args.json_body {
        record.json = Some(raw_json(json.clone()).context("--json-body is not JSON")?);
    }
    Ok(())
}

fn put_file(file: &Path, kind: Option<Kind>, record: &mut Record) -> anyhow::Result<()> {
    let mut content = Vec::new();
    let standard_input = file == Path::new("-");
    let read = match standard_input {
        true => std::io::stdin().lock().read_to_end(&mut content),
        false => std::fs::File::open(file).and_then(|mut file| file.read_to_end(&mut content)),
    };
    let shown = file.display();
    read.with_context(|| format!("cannot read {shown}"))?;
    let kind = kind.unwrap_or_else(|| match file.extension().and_then(|e| e.to_str()) {
        Some("json") => Kind::Json,
        Some("txt") => Kind::Text,
        _ if standard_input => Kind::Text,
        _ => Kind::Data,
    });
    let text = |content| {
        String::from_utf8(content)
            .map_err(|_| anyhow!("{shown} is not UTF-8; send it with --as data"))
    };
    match kind {
        Kind::Data => record.data = Some(STANDARD.encode(&content)),
        Kind::Text => record.text = Some(text(content)?),
        Kind::Json => {
            let json = raw_json(text(content)?).with_context(|| format!("{shown} is not JSON"))?;
            record.json = Some(json);
        }
    }
    Ok(())
}

fn raw_json(text: String) -> anyhow::Result<Box<RawValue>> {
    Ok(RawValue::from_string(text.trim().to_owned())?)
}

/// Encodes a record, and refuses here what the cluster would refuse whatever its configuration.
fn encode(record: &Record) -> anyhow::Result<Vec<u8>> {
    let payload = serde_json::to_vec(record)?;
    let limits = RecordLimits {
        payload_bytes_max: usize::MAX,
        users_max: usize::MAX,
        fanout_bytes_max: usize::MAX,
        ..Default::default()
    };
    let content_type = Format::Json.content_type().as_bytes();
    decode_push(&payload.clone().into(), Some(content_type), &limits)
        .map_err(|refusal| anyhow!("the cluster would refuse it: {}", refusal.reason))?;
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn json(words: &[&str]) -> anyhow::Result<String> {
        let line = Line::try_parse_from(std::iter::once(&"send").chain(words))?;
        Ok(String::from_utf8(encode(&record(&line.args)?)?)?)
    }

    #[test]
    fn a_short_command_makes_a_short_record() {
        assert_eq!(
            json(&["--id", "order-7", "--user", "alice", "hello"]).unwrap(),
            r#"{"id":"order-7","app":"demo","to":{"user":"alice"},"text":"hello"}"#
        );
    }

    #[test]
    fn every_option_finds_its_field() {
        let words = "--id a --app shop --users x,y --json-body {\"n\":1} --ttl 1h --collapse-key k \
                     --receipts sent --wait acked,sent";
        assert_eq!(
            json(&words.split_whitespace().collect::<Vec<_>>()).unwrap(),
            r#"{"id":"a","app":"shop","to":{"users":["x","y"]},"json":{"n":1},"ttlSeconds":3600,"collapseKey":"k","receipts":["acked","sent"]}"#
        );
    }

    #[test]
    fn what_the_cluster_would_refuse_is_refused_here() {
        let error = json(&["--user", "alice", "--data", "???"]).unwrap_err().to_string();
        assert!(error.starts_with("the cluster would refuse it"), "{error}");
        let error = json(&["--user", "alice", "--json-body", "{"]).unwrap_err().to_string();
        assert_eq!(error, "--json-body is not JSON");
        let error = json(&["--user", "alice", "--ttl", "500ms", "x"]).unwrap_err().to_string();
        assert_eq!(error, "--ttl counts whole seconds");
    }

    #[test]
    fn files_are_sent_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.display().to_string()
        };
        let sent = |path: &str| json(&["--id", "a", "--user", "u", "--file", path]).unwrap();
        assert!(sent(&file("a.json", b" [1] \n")).ends_with(r#""json":[1]}"#));
        assert!(sent(&file("a.txt", b"hi")).ends_with(r#""text":"hi"}"#));
        assert!(sent(&file("a.png", b"\xff\x00")).ends_with(r#""data":"/wA="}"#));
    }
}
