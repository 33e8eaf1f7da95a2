//! `barid topics`: creates and checks the topics that a cluster needs.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use barid_bus::{KafkaConfig, Topic, describe_topics, ensure_topics};
use barid_runtime::exit;
use serde::Serialize;

use crate::output::{Coded, Output, Tone};
use crate::state::DevState;
use crate::values::brokers;

/// For each answer of Kafka.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Options of `barid topics create` and `barid topics check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kafka [default: that of the running `barid dev`]
    #[arg(long, value_name = "HOST:PORT,…", env = "BARID_BROKERS", conflicts_with = "config")]
    pub brokers: Option<String>,
    /// Configuration file of a purger: its brokers, topics, TLS and SASL (with BARID_PURGER_… variables)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Options of `barid topics create`.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    #[command(flatten)]
    pub kafka: Args,
    /// Partitions of the push topics and the receipts [default: kafka.partitions of the file, or 12]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub partitions: Option<u16>,
    /// Replicas of each partition [default: kafka.replication of the file, or the brokers' default]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    pub replication: Option<u16>,
}

#[derive(Serialize)]
struct Shown<'a> {
    topic: &'a str,
    partitions: usize,
    replicas: usize,
    retention_ms: Option<&'a str>,
    max_message_bytes: Option<&'a str>,
    created: bool,
    problems: &'a [String],
}

/// Creates what is missing, and checks everything.
pub async fn create(args: CreateArgs, out: Output) -> anyhow::Result<ExitCode> {
    let mut config = kafka(args.kafka)?;
    if DevState::running()?
        .is_some_and(|dev| dev.in_process_kafka && config.brokers == [dev.brokers])
    {
        bail!(Coded::config(
            "the in-process broker of `barid dev` has its topics and cannot create others; \
             give --brokers of an Apache Kafka"
        ));
    }
    config.partitions = args.partitions.unwrap_or(config.partitions);
    config.replication = args.replication.unwrap_or(config.replication);
    let created = ensure_topics(&config, TIMEOUT).await?;
    show(&config, &created, out).await
}

/// Checks the topics.
pub async fn check(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let config = kafka(args)?;
    show(&config, &[], out).await
}

/// The configuration: that of a purger's file, or the default one with these brokers.
fn kafka(args: Args) -> anyhow::Result<KafkaConfig> {
    let Some(file) = args.config else {
        return Ok(KafkaConfig { brokers: brokers(args.brokers)?, ..Default::default() });
    };
    let loaded = barid_runtime::config::load::<barid_purger::Config>(
        Some(&file),
        "BARID_PURGER_",
        std::env::vars_os(),
    );
    let config = loaded.map_err(|error| Coded::config(error.to_string()))?.config.kafka;
    config.check().map_err(Coded::config)?;
    Ok(config)
}

async fn show(config: &KafkaConfig, created: &[String], out: Output) -> anyhow::Result<ExitCode> {
    let topics = describe_topics(config, TIMEOUT).await?;
    for topic in &topics {
        show_topic(topic, created.contains(&topic.name), out)?;
    }
    let fits = topics.iter().all(|topic| topic.problems.is_empty());
    Ok(ExitCode::from(if fits { exit::DONE } else { exit::CONFIG }))
}

fn show_topic(topic: &Topic, created: bool, out: Output) -> anyhow::Result<()> {
    let setting = |name: &str| topic.settings.get(name).map(String::as_str);
    let shown = Shown {
        topic: &topic.name,
        partitions: topic.partitions,
        replicas: topic.replicas,
        retention_ms: setting("retention.ms"),
        max_message_bytes: setting("max.message.bytes"),
        created,
        problems: &topic.problems,
    };
    if out.is_json() {
        return Ok(out.object(&shown)?);
    }
    let state = match (created, topic.problems.is_empty()) {
        (true, _) => out.paint(Tone::Good, "created"),
        (false, true) if topic.settings.is_empty() => {
            out.paint(Tone::Warn, "exists, settings unavailable")
        }
        (false, true) => out.paint(Tone::Good, "fits"),
        (false, false) => out.paint(Tone::Bad, "does not fit"),
    };
    let counts = format!("{} partitions, {} replicas", topic.partitions, topic.replicas);
    out.line(format_args!("{:<18} {counts:<28} {state}", topic.name))?;
    for problem in &topic.problems {
        out.line(format_args!("  {problem}"))?;
    }
    Ok(())
}
