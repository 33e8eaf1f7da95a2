//! `barid inspect dead`: the newest dead letters, each with its reason. Joins no group and commits nothing.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{BorrowedMessage, Headers as _};
use rdkafka::{Message as _, Offset, TopicPartitionList};
use serde::Serialize;

use crate::output::{Output, Tone, clean};
use crate::values;

/// Options of `barid inspect dead`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How many letters, the newest first
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub count: u16,
    /// Bytes of each record to print
    #[arg(long, default_value_t = 1024, value_name = "BYTES")]
    pub body_bytes: u32,
    /// Topic of dead letters
    #[arg(long, default_value = "barid.dead")]
    pub topic: String,
    /// How long to wait for Kafka
    #[arg(long, default_value = "10s", value_parser = values::positive_duration)]
    pub timeout: Duration,
    /// Kafka brokers: HOST:PORT, comma-separated [default: those of the running `barid dev`]
    #[arg(long, env = "BARID_BROKERS", value_name = "HOST:PORT")]
    pub brokers: Option<String>,
    /// Setting of librdkafka, such as security.protocol=ssl; may be repeated
    #[arg(short = 'X', value_name = "KEY=VALUE", value_parser = values::property)]
    pub properties: Vec<(String, String)>,
}

#[derive(Debug, Serialize)]
struct Letter {
    at_ms: u64,
    code: String,
    reason: String,
    topic: String,
    partition: String,
    offset: String,
    key: String,
    /// The beginning of the record; bytes that are not text are replaced.
    body: String,
    /// The length of the letter's value.
    body_bytes: usize,
}

/// Prints the letters.
pub async fn run(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let brokers = values::brokers(args.brokers.clone())?.join(",");
    let letters = tokio::task::spawn_blocking(move || {
        read(&args, &brokers)
            .with_context(|| format!("cannot read topic {} of Kafka at {brokers}", args.topic))
    });
    let letters = letters.await??;
    if letters.is_empty() && !out.is_json() {
        out.line("no dead letters")?;
    }
    for letter in &letters {
        out.either(letter, || {
            let Letter { topic, partition, offset, code, reason, .. } = letter;
            let title = out.paint(Tone::Bad, clean(code));
            let at = format!("{} [{}] offset {}", clean(topic), clean(partition), clean(offset));
            let cut = letter.body.len() < letter.body_bytes;
            let more =
                if cut { format!("… ({} bytes)", letter.body_bytes) } else { String::new() };
            format!("{title}  {}\n  from {at}\n  {}{more}", clean(reason), clean(&letter.body))
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the last `count` records of each partition, as far as they exist, and returns the newest of all.
fn read(args: &Args, brokers: &str) -> anyhow::Result<Vec<Letter>> {
    let deadline = Instant::now() + args.timeout;
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut client = values::reader_config(brokers);
    client.set("enable.partition.eof", "true").set("queued.max.messages.kbytes", "16384");
    let consumer: BaseConsumer = values::kafka_client(client, &args.properties)?;
    let topic = args.topic.as_str();
    let metadata = consumer.fetch_metadata(Some(topic), left())?;
    let partitions = metadata.topics().first().map(|t| t.partitions()).unwrap_or_default();
    if partitions.is_empty() {
        bail!("the topic does not exist");
    }
    let (mut list, mut unread) = (TopicPartitionList::new(), 0_usize);
    for partition in partitions {
        let (low, high) = consumer.fetch_watermarks(topic, partition.id(), left())?;
        let from = low.max(high - i64::from(args.count));
        if from < high {
            list.add_partition_offset(topic, partition.id(), Offset::Offset(from))?;
            unread += 1;
        }
    }
    consumer.assign(&list)?;
    let mut letters = Vec::new();
    // A partition is read once its end is reached: transactions leave offsets without a record.
    while unread > 0 {
        match consumer.poll(left()) {
            Some(Ok(record)) => {
                letters.push(letter(&record, args.body_bytes as usize));
                if letters.len() > 2 * usize::from(args.count) {
                    keep_newest(&mut letters, args.count);
                }
            }
            Some(Err(rdkafka::error::KafkaError::PartitionEOF(_))) => unread -= 1,
            Some(Err(error)) => return Err(error.into()),
            None => bail!("no answer within {:?}", args.timeout),
        }
    }
    keep_newest(&mut letters, args.count);
    Ok(letters)
}

fn keep_newest(letters: &mut Vec<Letter>, count: u16) {
    letters.sort_by_key(|letter| std::cmp::Reverse(letter.at_ms));
    letters.truncate(count.into());
}

fn letter(record: &BorrowedMessage<'_>, bytes_max: usize) -> Letter {
    let header = |name: &str| {
        let mut all = record.headers().into_iter().flat_map(|headers| headers.iter());
        let value = all.find(|header| header.key == name).and_then(|header| header.value);
        String::from_utf8_lossy(value.unwrap_or_default()).into_owned()
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(bytes_max)]).into();
    let body = record.payload().unwrap_or_default();
    Letter {
        at_ms: record.timestamp().to_millis().and_then(|ms| u64::try_from(ms).ok()).unwrap_or(0),
        code: header("barid-code"),
        reason: header("barid-reason"),
        topic: header("barid-topic"),
        partition: header("barid-partition"),
        offset: header("barid-offset"),
        key: text(record.key().unwrap_or_default()),
        body: text(body),
        body_bytes: body.len(),
    }
}
