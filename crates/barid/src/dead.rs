//! `barid inspect dead`: the newest dead letters, each with its reason.

use std::process::ExitCode;
use std::time::Duration;

use rdkafka::Message as _;
use rdkafka::message::{BorrowedMessage, Headers as _};
use serde::Serialize;

use crate::kafka_reader::newest;
use crate::output::{Output, Tone, clean};
use crate::values::{self, KafkaArgs};

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
    #[arg(long, default_value = "barid.dead", value_parser = values::topic)]
    pub topic: String,
    /// How long to wait for Kafka
    #[arg(long, default_value = "10s", value_parser = values::positive_duration)]
    pub timeout: Duration,
    #[command(flatten)]
    pub kafka: KafkaArgs,
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
    let Args { kafka, topic, timeout, .. } = &args;
    let bytes_max = args.body_bytes as usize;
    let count = usize::from(args.count);
    let letter = move |record: &BorrowedMessage<'_>| Some(letter(record, bytes_max));
    let letters = newest(kafka, topic, (count, count), *timeout, letter).await?;
    if letters.is_empty() && !out.is_json() {
        out.line("no dead letters")?;
    }
    for (_, letter) in &letters {
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
