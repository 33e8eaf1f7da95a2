//! `barid inspect receipts`: what the cluster answered to senders.

use std::process::ExitCode;
use std::time::Duration;

use barid_core::limits::EVERYONE;
use barid_core::{AppId, Audience, GroupId, MessageId, UserId};
use barid_wire::record::decode_receipt;
use barid_wire::v1::{Receipt, ReceiptKind};
use rdkafka::Message as _;
use rdkafka::message::BorrowedMessage;
use serde::Serialize;

use crate::kafka_reader::{Tail, newest};
use crate::output::{Output, Tone, clean, clock};
use crate::values::{self, KafkaArgs};

/// Options of `barid inspect receipts`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only receipts of this message
    #[arg(long, value_name = "ID")]
    pub id: Option<MessageId>,
    /// Only receipts of this app
    #[arg(long)]
    pub app: Option<AppId>,
    /// Only receipts of this user
    #[arg(long)]
    pub user: Option<UserId>,
    /// Only receipts of this group
    #[arg(long, conflicts_with = "user")]
    pub group: Option<GroupId>,
    /// Only receipts of messages to everyone
    #[arg(long, conflicts_with_all = ["user", "group"])]
    pub everyone: bool,
    /// How many receipts, the newest first
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub count: u16,
    /// How many records of each partition to look through for them, from the newest on
    #[arg(long, default_value_t = 100_000, value_name = "RECORDS", conflicts_with = "follow")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub depth: u32,
    /// Print the receipts that come from now on, until Ctrl-C
    #[arg(long, conflicts_with = "count")]
    pub follow: bool,
    /// Topic of receipts
    #[arg(long, default_value = "barid.receipts", value_parser = values::topic)]
    pub topic: String,
    /// How long to wait for Kafka
    #[arg(long, default_value = "10s", value_parser = values::positive_duration)]
    pub timeout: Duration,
    #[command(flatten)]
    pub kafka: KafkaArgs,
}

/// A receipt as it is printed.
#[derive(Serialize)]
struct Shown<'a> {
    event: &'static str,
    kind: &'static str,
    id: &'a str,
    app: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    user: &'a str,
    /// A group, or everyone, instead of a user.
    #[serde(skip_serializing_if = "str::is_empty")]
    mailbox: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    device: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    seq: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    code: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
    at_ms: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    traceparent: &'a str,
    /// Since the message was sent, ms; only in `barid send`.
    #[serde(skip_serializing_if = "Option::is_none")]
    elapsed_ms: Option<f64>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Prints receipts.
pub async fn run(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let selection = args.selection();
    let selected =
        move |record: &BorrowedMessage<'_>| decode(record).filter(|it| selection.admits(it));
    if args.follow {
        let tail = Tail::open(&args.kafka, &args.topic, args.timeout, false).await?;
        loop {
            print(&tail.next(&selected).await?, None, out)?;
        }
    }
    let Args { kafka, topic, timeout, .. } = &args;
    let amount = (args.count.into(), args.depth as usize);
    let found = newest(kafka, topic, amount, *timeout, selected).await?;
    if found.is_empty() && !out.is_json() {
        out.line("no receipts")?;
    }
    for (_, receipt) in &found {
        print(receipt, None, out)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The id, app, user and mailbox that a receipt must have; `None`: any.
struct Selection([Option<String>; 4]);

impl Args {
    fn selection(&self) -> Selection {
        let Self { id, app, user, group, everyone, .. } = self;
        let audience =
            group.clone().map(Audience::Group).or(everyone.then_some(Audience::Everyone));
        Selection([
            id.as_ref().map(MessageId::to_string),
            app.as_ref().map(AppId::to_string),
            user.as_ref().map(UserId::to_string),
            audience.as_ref().map(Audience::to_string),
        ])
    }
}

impl Selection {
    fn admits(&self, receipt: &Receipt) -> bool {
        let has = [&receipt.id, &receipt.app, &receipt.user, &receipt.mailbox];
        self.0.iter().zip(has).all(|(wanted, has)| wanted.as_ref().is_none_or(|it| it == has))
    }
}

/// The receipt in a record; `None`: the record is not one.
pub fn decode(record: &BorrowedMessage<'_>) -> Option<Receipt> {
    record.payload().and_then(|payload| decode_receipt(payload).ok())
}

/// Prints a receipt, with the time since the message was sent if that is known, else with its own time.
pub fn print(receipt: &Receipt, elapsed_ms: Option<f64>, out: Output) -> anyhow::Result<()> {
    let kind = receipt.kind().word();
    let shown = Shown {
        event: "receipt",
        kind,
        id: &receipt.id,
        app: &receipt.app,
        user: &receipt.user,
        mailbox: &receipt.mailbox,
        device: &receipt.device,
        seq: receipt.seq,
        code: &receipt.code,
        reason: &receipt.reason,
        at_ms: receipt.at_ms,
        traceparent: &receipt.traceparent,
        elapsed_ms,
    };
    out.either(&shown, || {
        let mut who = match receipt.mailbox.as_str() {
            "" => clean(&receipt.user),
            EVERYONE => EVERYONE.to_owned(),
            group => format!("group {}", clean(group)),
        };
        if !receipt.device.is_empty() {
            who = format!("{who}/{}", clean(&receipt.device));
        }
        let what = match receipt.kind() {
            ReceiptKind::Refused => format!("{}: {}", clean(&receipt.code), clean(&receipt.reason)),
            _ if receipt.seq > 0 => format!("seq {}", receipt.seq),
            _ => String::new(),
        };
        let kind = column(out, kind);
        match elapsed_ms {
            Some(elapsed_ms) => {
                let took = out.paint(Tone::Faint, format_args!("{elapsed_ms:.1} ms"));
                format!("{kind}  {who}  {what}  {took}")
            }
            None => {
                let at = out.paint(Tone::Faint, clock(receipt.at_ms));
                format!("{at}  {kind}  {}  {who}  {what}", clean(&receipt.id)).trim_end().into()
            }
        }
    })?;
    Ok(())
}

/// A kind of receipt, or `sent`, as the first column.
pub fn column(out: Output, word: &str) -> String {
    let tone = match word {
        "refused" | "exhausted" | "expired" => Tone::Bad,
        "duplicate" => Tone::Warn,
        _ => Tone::Good,
    };
    out.paint(tone, format_args!("{word:<9}"))
}
