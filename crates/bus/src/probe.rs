//! Asks Kafka whether it can be used. Changes nothing there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_runtime::{Probe, Unfit};
use parking_lot::Mutex;
use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::KafkaError;

use crate::context::lasting;
use crate::{Error, KafkaConfig, describe_revocations};

/// Keeps what librdkafka says of the brokers, which the error of a call does not tell.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Option<String>>>);

impl ClientContext for Heard {
    fn log(&self, level: RDKafkaLogLevel, _: &str, message: &str) {
        // The lower, the more severe. Unlike the callback of errors, this one does not wait for a poll.
        if level as i32 <= RDKafkaLogLevel::Warning as i32 {
            self.0.lock().get_or_insert_with(|| lasting(message).to_owned());
        }
    }

    fn error(&self, _: KafkaError, reason: &str) {
        self.0.lock().get_or_insert_with(|| reason.to_owned());
    }
}

impl ConsumerContext for Heard {}

/// Asks for `topics`, for at most `limit`. Missing ones are an error unless they are created at start-up.
pub async fn probe(config: &KafkaConfig, topics: Vec<String>, limit: Duration) -> Probe {
    let name = format!("kafka {}", config.brokers.join(","));
    let config = config.clone();
    let asked = tokio::task::spawn_blocking(move || ask(&config, &topics, limit)).await;
    let found = asked.unwrap_or_else(|error| Err(Unfit::Away(error.to_string())));
    Probe { name, found }
}

/// Describes the topic of revocations, for at most `limit`. `None`: its settings fit, or cannot be read.
pub async fn probe_revocations(config: &KafkaConfig, limit: Duration) -> Option<Probe> {
    let topic = describe_revocations(config, limit).await.ok()?;
    let problems = topic.problems.join("; ");
    let is_unfit = topic.partitions > 0 && !problems.is_empty();
    is_unfit.then(|| Probe {
        name: format!("topic {}", topic.name),
        found: Err(Unfit::Unusable(problems)),
    })
}

fn ask(config: &KafkaConfig, topics: &[String], limit: Duration) -> Result<String, Unfit> {
    let heard = Heard::default();
    let unusable = |error: KafkaError| Unfit::Unusable(error.to_string());
    let client = config.overlay(config.client());
    let client: BaseConsumer<Heard> =
        BaseConsumer::from_config_and_context(&client, heard.clone()).map_err(unusable)?;
    let deadline = Instant::now() + limit;
    let (mut missing, mut found, mut brokers) = (Vec::new(), Vec::new(), 0);
    for topic in topics {
        let left = deadline.saturating_duration_since(Instant::now());
        let metadata = client.fetch_metadata(Some(topic), left).map_err(|error| {
            // Serves the callback.
            let _ = client.poll(Duration::ZERO);
            let why = heard.0.lock().take().unwrap_or_else(|| error.to_string());
            match Error::from(error) {
                _ if why.contains("uthentication") => Unfit::Unusable(why),
                Error::Refused(_) | Error::Config(_) => Unfit::Unusable(why),
                _ => Unfit::Away(why),
            }
        })?;
        brokers = metadata.brokers().len();
        match metadata.topics().first().map_or(0, |topic| topic.partitions().len()) {
            0 => missing.push(topic.as_str()),
            partitions => found.push(format!("{topic} ({partitions})")),
        }
    }
    let brokers = if brokers == 1 { "1 broker".into() } else { format!("{brokers} brokers") };
    match (missing.is_empty(), config.create_topics) {
        (true, _) => Ok(format!("{brokers}; partitions: {}", found.join(", "))),
        (false, true) => {
            Ok(format!("{brokers}; topics that will be created: {}", missing.join(", ")))
        }
        (false, false) => Err(Unfit::Unusable(format!(
            "topics are missing, or may not be seen: {}; create them, or set kafka.create_topics",
            missing.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EmbeddedKafka;

    #[tokio::test(flavor = "multi_thread")]
    async fn hazard_114_a_kafka_without_the_topics_or_without_an_answer_is_told() {
        let mut config = KafkaConfig::default();
        let broker = EmbeddedKafka::start(&mut config).unwrap();
        let ask = async |config: &KafkaConfig| {
            probe(config, config.topics.all(), Duration::from_secs(3)).await.found
        };
        let told = ask(&config).await.unwrap();
        assert!(
            told.starts_with("1 broker; partitions: barid.push.high (12), barid.push"),
            "{told}"
        );
        config.topics.dead = "nowhere".into();
        let Err(Unfit::Unusable(told)) = ask(&config).await else { panic!("it has no such topic") };
        assert!(told.starts_with("topics are missing, or may not be seen: nowhere; "), "{told}");
        config.create_topics = true;
        let told = ask(&config).await.unwrap();
        assert!(told.ends_with("topics that will be created: nowhere"), "{told}");
        drop(broker);
        let began = Instant::now();
        let Err(Unfit::Away(told)) = ask(&config).await else { panic!("the broker is gone") };
        assert!(told.contains("127.0.0.1:") && told.contains("Connection refused"), "{told}");
        assert!(began.elapsed() < Duration::from_secs(10), "each topic within the same limit");
    }
}
