//! Creation of topics, and a description of them by a new client.

use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::types::RDKafkaErrorCode;

use crate::consumer::Pending;
use crate::context::Logged;
use crate::{Error, KafkaConfig, ffi};

/// Creates the topics of `config` that are missing. Existing ones are not changed.
///
/// # Errors
/// No broker answered within `timeout`, or one refused.
pub async fn ensure_topics(config: &KafkaConfig, timeout: Duration) -> Result<(), Error> {
    let admin: AdminClient<Logged> =
        AdminClient::from_config_and_context(&config.overlay(config.client()), Logged)?;
    // -1 is the cluster's default number of replicas, which brokers know since Kafka 2.4.
    let replication = match config.replication {
        0 => -1,
        replicas => i32::from(replicas),
    };
    let topics = &config.topics;
    let spread = i32::from(config.partitions);
    let dead_bytes_max = config.dead_bytes_max.to_string();
    let wanted: Vec<NewTopic<'_>> = [
        (topics.push_high.as_str(), spread),
        (&topics.push, spread),
        (&topics.push_bulk, spread),
        (&topics.receipts, spread),
        (&topics.dead, 1),
    ]
    .into_iter()
    .map(|(name, partitions)| {
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(replication));
        if name == topics.dead { topic.set("max.message.bytes", &dead_bytes_max) } else { topic }
    })
    .collect();
    let options =
        AdminOptions::new().request_timeout(Some(timeout)).operation_timeout(Some(timeout));
    let created = admin.create_topics(&wanted, &options).await;
    let created = created.map_err(|error| match Error::from(error) {
        Error::Away(why) => Error::Away(format!("{}: {why}", config.brokers.join(","))),
        other => other,
    })?;
    for outcome in created {
        match outcome {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                return Err(Error::Refused(format!("creating topic {name}: {code}")));
            }
        }
    }
    Ok(())
}

/// Describes the push topics with a new client, as [`Consumer::topic_ids`] does with its own.
///
/// # Errors
/// No broker answers within 5 s.
///
/// [`Consumer::topic_ids`]: crate::Consumer::topic_ids
pub fn describe_topics_anew(config: &KafkaConfig) -> Pending<()> {
    let client = config.overlay(config.client());
    let topics = config.topics.pushes().map(str::to_owned);
    let ask = move || -> Result<(), Error> {
        let client: AdminClient<Logged> = AdminClient::from_config_and_context(&client, Logged)?;
        ffi::topic_ids(client.inner(), &topics, Duration::from_secs(5)).map(drop)
    };
    Box::pin(async move {
        let asked = tokio::task::spawn_blocking(ask).await;
        asked.map_err(|error| Error::Away(format!("worker thread: {error}")))?
    })
}
