//! `barid send`: produces a record, as a business service does.

use std::collections::HashSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use barid_bus::KafkaConfig;
use barid_core::{AppId, Audience, DeviceId, GroupId, MessageId, ReceiptSet, UserId};
use barid_wire::record::{
    BodyKind, CONTENT_TYPE, Format, Push, Recipients, RecordLimits, decode_base64, encode_push,
};
use barid_wire::v1::ReceiptKind;
use bytes::Bytes;
use clap::ValueEnum;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer as _};
use serde::Serialize;
use tokio::time::{Instant as Deadline, timeout_at};

use crate::kafka_reader::Tail;
use crate::output::{Coded, Output, Tone, clean, span};
use crate::receipts;
use crate::values::{self, KafkaArgs};

/// The largest record that is sent, bytes.
const MESSAGE_BYTES_MAX: u64 = 100_000_000;

/// Options of `barid send`.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("audience").required(true).args(["user", "users", "group", "everyone"]),
    group = clap::ArgGroup::new("body").required(true).args(["text", "text_option", "json_body", "data", "file"]),
)]
pub struct Args {
    /// App
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
    /// Recipient user
    #[arg(long)]
    pub user: Option<UserId>,
    /// Recipient users, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "USER,USER")]
    pub users: Vec<UserId>,
    /// Recipients: the members of a group
    #[arg(long)]
    pub group: Option<GroupId>,
    /// Recipients: all devices of the app
    #[arg(long)]
    pub everyone: bool,
    /// Only this device of the user
    #[arg(long, conflicts_with_all = ["users", "group", "everyone"])]
    pub device: Option<DeviceId>,

    /// Text; one that begins with a dash follows --
    #[arg(value_name = "TEXT")]
    pub text: Option<String>,
    /// Text that begins with a dash
    #[arg(long = "text", value_name = "TEXT", allow_hyphen_values = true)]
    pub text_option: Option<String>,
    /// JSON value instead of text
    #[arg(long, value_name = "JSON", allow_negative_numbers = true)]
    pub json_body: Option<String>,
    /// Bytes instead of text, in base64
    #[arg(long, value_name = "BASE64", value_parser = decode_base64)]
    pub data: Option<Bytes>,
    /// Content of a file (-: standard input): .json as JSON, .txt as text, others as bytes
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Type of the file's content, whatever its name
    #[arg(long = "as", value_name = "KIND", requires = "file")]
    pub kind: Option<Kind>,

    /// Message id; a second message with the same id is not delivered [default: random]
    #[arg(long)]
    pub id: Option<MessageId>,
    /// Priority
    #[arg(long, default_value = "normal")]
    pub priority: Priority,
    /// Time to live: 30s, 15m, 1h, 7d [default: as long as the mailbox keeps it]
    #[arg(long, value_parser = values::positive_duration)]
    pub ttl: Option<Duration>,
    /// Replace an undelivered message that has the same key
    #[arg(long, value_name = "KEY")]
    pub collapse_key: Option<String>,
    /// Receipts to ask for, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND")]
    pub receipts: Vec<Milestone>,
    /// Receipts to ask for and to wait for, for every user, or for the group, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND")]
    pub wait: Vec<Milestone>,
    /// How long to wait for Kafka, and then for receipts
    #[arg(long, default_value = "30s", value_parser = values::positive_duration)]
    pub timeout: Duration,
    /// Trace this message: every role logs its hops under the trace id that is printed
    #[arg(long)]
    pub trace: bool,
    #[command(flatten)]
    pub kafka: KafkaArgs,
}

/// The type of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Text,
    Json,
    Data,
}

/// The topic.
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

#[derive(Serialize)]
struct Sent<'a> {
    event: &'static str,
    id: &'a str,
    topic: &'a str,
    bytes: usize,
    elapsed_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
}

/// What to write instead of a text that begins with a dash, which clap takes for options: `-hello` is `-h`. `words`: the
/// arguments, after the program's name. `None`: clap's own words serve.
pub fn dash_hint(words: &[String], error: &clap::Error) -> Option<String> {
    let is_send = words.iter().find(|word| !word.starts_with('-')).is_some_and(|it| it == "send");
    let begin = match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::DisplayHelp, _) => "-h",
        // The first letter that is no option; the word may go on behind it.
        (ErrorKind::UnknownArgument, Some(ContextValue::String(bad)))
            if bad.starts_with('-') && !bad.starts_with("--") =>
        {
            bad.as_str()
        }
        _ => return None,
    };
    // A setting of Kafka may be a secret.
    let is_text = |word: &&String| {
        word.starts_with(begin) && word.len() > 1 && *word != "-h" && !word.starts_with("-X")
    };
    let text = words.iter().take_while(|word| *word != "--").find(is_text)?;
    is_send.then(|| {
        format!("{text} is not an option; a text that begins with a dash follows --: -- '{text}'")
    })
}

/// Sends one message. The exit code is 1 if the cluster refuses it or knows its id, and 3 if an awaited receipt does not
/// arrive in time.
pub async fn run(mut args: Args, out: Output) -> anyhow::Result<ExitCode> {
    if args.wait.is_empty() && is_large(&args)? {
        // Kafka takes what a purger may refuse.
        out.note("larger than the default limits of purgers: waiting for what they answer");
        args.wait.push(Milestone::Accepted);
    }
    let push = push(&args)?;
    let value = encode(&push, &RecordLimits::HIGHEST)?;
    let config = KafkaConfig { brokers: args.kafka.brokers()?, ..Default::default() };
    let topic = match args.priority {
        Priority::High => &config.topics.push_high,
        Priority::Normal => &config.topics.push,
        Priority::Bulk => &config.topics.push_bulk,
    };
    let receipts = async {
        let topic = &config.topics.receipts;
        match args.wait.is_empty() {
            true => Ok(None),
            false => Tail::open(&args.kafka, topic, args.timeout, true).await.map(Some),
        }
    };
    // At once: each waits up to the time-out where Kafka does not answer.
    let (receipts, producer) = tokio::join!(receipts, connect(&config, &args, topic));
    let (producer, receipts) = (producer?, receipts?);
    let trace = args.trace.then(Trace::new);
    let began = Instant::now();
    produce(&producer, &config, &args, topic, (push.key(), &value), trace.as_ref()).await?;
    let elapsed_ms = millis(began);
    let (id, bytes) = (push.id.as_str(), value.len());
    let trace_id = trace.map(|trace| format!("{:032x}", trace.id));
    let sent = Sent { event: "sent", id, topic, bytes, elapsed_ms, trace_id };
    out.either(&sent, || {
        let to = out.paint(Tone::Strong, clean(&shown(&push.to)));
        let took = out.paint(Tone::Faint, format_args!("{topic}, {elapsed_ms:.1} ms"));
        let traced = sent
            .trace_id
            .as_ref()
            .map(|id| format!("\ntraced     as {id} in the logs of the roles"));
        let word = receipts::column(out, "sent");
        format!("{word}  {} to {to}  {took}{}", clean(id), traced.unwrap_or_default())
    })?;
    match receipts {
        Some(receipts) => wait(&args, &push, &receipts, began, out).await,
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Whether purgers with default limits would refuse the record.
fn is_large(args: &Args) -> anyhow::Result<bool> {
    let push = push(args)?;
    encode(&push, &RecordLimits::HIGHEST)?;
    Ok(encode(&push, &RecordLimits::default()).is_err())
}

/// Connects a producer to the topic's brokers, so that the time of a record does not contain that. The producer is not
/// idempotent, which takes half a second to set up; the message id makes repeats harmless.
async fn connect(config: &KafkaConfig, args: &Args, topic: &str) -> anyhow::Result<FutureProducer> {
    let brokers = config.brokers.join(",");
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", &brokers)
        .set("client.id", "barid-cli")
        .set("acks", "all")
        .set("linger.ms", "0")
        .set("message.max.bytes", MESSAGE_BYTES_MAX.to_string())
        .set("message.timeout.ms", args.timeout.as_millis().max(1).to_string())
        .set_log_level(RDKafkaLogLevel::Emerg);
    let producer: FutureProducer = values::kafka_client(client, &args.kafka.properties)?;
    let (asking, topic, limit) = (producer.clone(), topic.to_owned(), args.timeout);
    let asked = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        let metadata = asking.client().fetch_metadata(Some(&topic), limit)?;
        if metadata.topics().first().is_none_or(|topic| topic.partitions().is_empty()) {
            bail!("topic {topic} does not exist");
        }
        Ok(())
    });
    match asked.await? {
        Ok(()) => Ok(producer),
        Err(error) if error.is::<KafkaError>() => Err(away(&brokers, args.timeout, &error).into()),
        Err(error) => Err(error.context(format!("cannot send through Kafka at {brokers}"))),
    }
}

fn away(brokers: &str, limit: Duration, error: &anyhow::Error) -> Coded {
    let limit = span(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
    Coded::away(format!("Kafka at {brokers} does not answer within {limit}: {error}"))
}

/// Produces one record.
async fn produce(
    producer: &FutureProducer,
    config: &KafkaConfig,
    args: &Args,
    topic: &str,
    (key, value): (&str, &[u8]),
    trace: Option<&Trace>,
) -> anyhow::Result<()> {
    let brokers = config.brokers.join(",");
    let content_type = Header { key: CONTENT_TYPE, value: Some(Format::Json.content_type()) };
    let mut headers = OwnedHeaders::new_with_capacity(2).insert(content_type);
    if let Some(trace) = trace {
        let traceparent = trace.traceparent();
        headers = headers.insert(Header { key: "traceparent", value: Some(&traceparent) });
    }
    let record = FutureRecord::to(topic).key(key).payload(value).headers(headers);
    match producer.send(record, args.timeout).await {
        Ok(_) => Ok(()),
        Err((error, _)) => match barid_bus::Error::from(error.clone()) {
            barid_bus::Error::Away(_) => Err(away(&brokers, args.timeout, &error.into()).into()),
            other => Err(other).with_context(|| format!("cannot send through Kafka at {brokers}")),
        },
    }
}

async fn wait(
    args: &Args,
    push: &Push,
    receipts: &Tail,
    began: Instant,
    out: Output,
) -> anyhow::Result<ExitCode> {
    // Receipts of a group, or of everyone, name it instead of a user.
    let owners = push.to.owners();
    let mut awaited: HashSet<(Milestone, String)> = owners
        .iter()
        .flat_map(|owner| args.wait.iter().map(|milestone| (*milestone, owner.as_str().to_owned())))
        .collect();
    let deadline = Deadline::now() + args.timeout;
    let mut is_repeat = false;
    while !awaited.is_empty() {
        let Ok(receipt) = timeout_at(deadline, receipts.next(receipts::decode)).await else {
            bail!(Coded::cut(format!("{} after {:?}", missing(&awaited), args.timeout)));
        };
        let receipt = receipt?;
        if receipt.id != push.id.as_str() || receipt.app != push.app.as_str() {
            continue;
        }
        receipts::print(&receipt, Some(millis(began)), out)?;
        if receipt.kind() == ReceiptKind::Refused {
            return Ok(ExitCode::FAILURE);
        }
        let of = if receipt.mailbox.is_empty() { &receipt.user } else { &receipt.mailbox };
        awaited.retain(|(m, owner)| !(m.kind() == receipt.kind() && owner == of));
        if receipt.kind() == ReceiptKind::Duplicate && !args.wait.contains(&Milestone::Duplicate) {
            // No other receipt follows.
            is_repeat = true;
            awaited.retain(|(_, owner)| owner != of);
        }
    }
    if is_repeat {
        bail!("a message with this id was accepted before, and is not delivered again");
    }
    Ok(ExitCode::SUCCESS)
}

fn missing(awaited: &HashSet<(Milestone, String)>) -> String {
    let mut names: Vec<String> =
        awaited.iter().map(|(m, owner)| format!("{} of {}", m.as_str(), clean(owner))).collect();
    names.sort();
    format!("no receipt {}", names.join(", "))
}

/// A sampled W3C trace of which the record is the first span.
struct Trace {
    id: u128,
    span: u64,
}

impl Trace {
    /// A new trace. Neither number may be 0.
    fn new() -> Self {
        Self { id: rand::random::<u128>().max(1), span: rand::random::<u64>().max(1) }
    }

    /// The header, with the flag `sampled`.
    fn traceparent(&self) -> String {
        format!("00-{:032x}-{:016x}-01", self.id, self.span)
    }
}

fn millis(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e4).round() / 10.0
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
        self.kind().word()
    }
}

fn shown(to: &Recipients) -> String {
    match to {
        Recipients::User { user, device: Some(device) } => format!("{user}/{device}"),
        Recipients::User { user, device: None } => user.to_string(),
        Recipients::Users(users) => users.iter().map(UserId::as_str).collect::<Vec<_>>().join(", "),
        Recipients::Audience(Audience::Group(group)) => format!("group {group}"),
        Recipients::Audience(Audience::Everyone) => "everyone".into(),
    }
}

fn push(args: &Args) -> anyhow::Result<Push> {
    let id = match &args.id {
        Some(id) => id.clone(),
        None => MessageId::new(&values::random_name("cli"))?,
    };
    let to = match (&args.user, &args.group) {
        (Some(user), _) => Recipients::User { user: user.clone(), device: args.device.clone() },
        (None, Some(group)) => Audience::Group(group.clone()).into(),
        (None, None) if args.everyone => Audience::Everyone.into(),
        (None, None) => Recipients::Users(args.users.clone()),
    };
    let (kind, payload) = body(args)?;
    let mut asked: Vec<Milestone> = args.receipts.iter().chain(&args.wait).copied().collect();
    if !args.wait.is_empty() {
        asked.push(Milestone::Duplicate);
    }
    Ok(Push {
        ttl_ms: args.ttl.map(whole_seconds).transpose()?.unwrap_or_default() * 1000,
        collapse_key: args.collapse_key.as_deref().filter(|key| !key.is_empty()).map(Into::into),
        receipts: asked.iter().fold(ReceiptSet::default(), |set, m| set.with(m.kind().into())),
        ..Push::new(id, args.app.clone(), to, kind, payload)
    })
}

fn whole_seconds(ttl: Duration) -> anyhow::Result<u64> {
    match ttl.subsec_millis() {
        0 => Ok(ttl.as_secs()),
        _ => bail!(Coded::config("--ttl must be whole seconds")),
    }
}

fn body(args: &Args) -> anyhow::Result<(BodyKind, Bytes)> {
    if let Some(file) = &args.file {
        return file_body(file, args.kind);
    }
    if let Some(json) = &args.json_body {
        return Ok((BodyKind::Json, json.trim().to_owned().into()));
    }
    if let Some(data) = &args.data {
        return Ok((BodyKind::Data, data.clone()));
    }
    let text = args.text.as_ref().or(args.text_option.as_ref()).cloned();
    Ok((BodyKind::Text, text.unwrap_or_default().into()))
}

fn file_body(file: &Path, kind: Option<Kind>) -> anyhow::Result<(BodyKind, Bytes)> {
    let mut content = Vec::new();
    let standard_input = file == Path::new("-");
    // Some files have no end; what is larger than a record is refused when it is encoded.
    let max = MESSAGE_BYTES_MAX + 1;
    let read = match standard_input {
        true => std::io::stdin().lock().take(max).read_to_end(&mut content),
        false => {
            std::fs::File::open(file).and_then(|file| file.take(max).read_to_end(&mut content))
        }
    };
    let shown = file.display();
    read.map_err(|error| Coded::config(format!("--file {shown}: cannot be read: {error}")))?;
    let kind = kind.unwrap_or_else(|| match file.extension().and_then(|e| e.to_str()) {
        Some("json") => Kind::Json,
        Some("txt") => Kind::Text,
        _ if standard_input => Kind::Text,
        _ => Kind::Data,
    });
    let text = |content| {
        String::from_utf8(content)
            .map_err(|_| Coded::config(format!("--file {shown} is not UTF-8; add --as data")))
    };
    Ok(match kind {
        Kind::Data => (BodyKind::Data, content.into()),
        Kind::Text => (BodyKind::Text, text(content)?.into()),
        Kind::Json => (BodyKind::Json, text(content)?.trim().to_owned().into()),
    })
}

/// Encodes a record, and refuses what a cluster with these limits would refuse.
fn encode(push: &Push, limits: &RecordLimits) -> anyhow::Result<Bytes> {
    let refused = |reason| Coded::config(format!("the cluster would refuse this record: {reason}"));
    Ok(encode_push(push, Format::Json, limits).map_err(|refusal| refused(refusal.reason))?)
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
        Ok(String::from_utf8(encode(&push(&line.args)?, &RecordLimits::HIGHEST)?.to_vec())?)
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
            r#"{"id":"a","app":"shop","to":{"users":["x","y"]},"json":{"n":1},"ttlSeconds":3600,"collapseKey":"k","receipts":["duplicate","sent","acked"]}"#
        );
    }

    #[test]
    fn what_the_cluster_would_refuse_is_refused_here() {
        let error = |words: &[&str]| json(&[&["--user", "alice"], words].concat()).unwrap_err();
        let refused = error(&["--json-body", "{"]).to_string();
        let start = "the cluster would refuse this record: `json` is not a JSON value: ";
        assert!(refused.starts_with(start), "{refused}");
        let not_base64 = error(&["--data", "???"]).to_string();
        assert!(not_base64.contains("'???' for '--data <BASE64>'"), "{not_base64}");
        assert_eq!(error(&["--ttl", "500ms", "x"]).to_string(), "--ttl must be whole seconds");
    }

    #[test]
    fn hazard_115_a_message_that_default_purgers_refuse_is_not_sent_unheard() {
        let large = |text: &str| {
            is_large(&Line::try_parse_from(["send", "--user", "a", text]).unwrap().args).unwrap()
        };
        assert!(!large("x") && !large(&"x".repeat(65_536)));
        assert!(large(&"x".repeat(65_537)));
    }

    #[test]
    fn hazard_115_a_text_that_begins_with_a_dash_is_sent_or_told_how() {
        let told = |line: &str| {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            let parsed = crate::cli::Cli::try_parse_from(
                std::iter::once("barid".into()).chain(words.clone()),
            );
            parsed.err().map(|error| dash_hint(&words, &error).unwrap_or_default())
        };
        for line in ["send --user a -hello", "send -hello --user a", "--json send --user a -n"] {
            let hint = told(line).unwrap();
            let text =
                line.split(' ').find(|word| word.starts_with("-h") || *word == "-n").unwrap();
            assert!(hint.ends_with(&format!(": -- '{text}'")) && !hint.contains('\n'), "{hint}");
        }
        for line in ["send --user a -- -hello", "send --user a --text -hello"] {
            assert_eq!(told(line), None, "{line}");
        }
        for line in [
            "send -h",
            "send --help",
            "send --usr a hello",
            "send --usr a -X sasl.username=x hello",
            "send --usr a -Xsasl.password=hush hello",
            "kick -hello",
            "send --user a",
        ] {
            assert_eq!(told(line), Some(String::new()), "clap tells: {line}");
        }
        assert_eq!(
            json(&["--id", "i", "--user", "a", "--", "-hello"]).unwrap(),
            r#"{"id":"i","app":"demo","to":{"user":"a"},"text":"-hello"}"#
        );
        assert!(json(&["--id", "i", "--user", "a", "--json-body", "-5"]).unwrap().contains(":-5}"));
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
