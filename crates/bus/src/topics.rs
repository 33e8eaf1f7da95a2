//! Creation of topics, and a description of them by a new client.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::types::RDKafkaErrorCode;

use crate::consumer::Pending;
use crate::context::Logged;
use crate::{Error, KafkaConfig, ffi};

/// For the answer about settings, once the broker has told of its topics.
const SETTINGS_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes that a dead letter has over the record: headers with the reason and the source.
const DEAD_OVERHEAD: u64 = 4096;

/// Creates the topics of `config` that are missing, and returns their names. Existing ones are not changed.
///
/// # Errors
/// No broker answered within `timeout`, or one refused.
pub async fn ensure_topics(config: &KafkaConfig, timeout: Duration) -> Result<Vec<String>, Error> {
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
    .chain(topics.compacted().map(|name| (name, 1)))
    .map(|(name, partitions)| {
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(replication));
        if name == topics.dead {
            topic.set("max.message.bytes", &dead_bytes_max)
        } else if topics.compacted().contains(&name) {
            // Not a lower max.message.bytes, although its records are short: it bounds batches.
            topic.set("cleanup.policy", "compact")
        } else {
            topic
        }
    })
    .collect();
    let options =
        AdminOptions::new().request_timeout(Some(timeout)).operation_timeout(Some(timeout));
    let answered = admin.create_topics(&wanted, &options).await;
    let answered = answered.map_err(|error| match Error::from(error) {
        Error::Away(why) => Error::Away(format!("{}: {why}", config.brokers.join(","))),
        other => other,
    })?;
    let mut created = Vec::new();
    for outcome in answered {
        match outcome {
            Ok(name) => created.push(name),
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                return Err(Error::Refused(format!("creating topic {name}: {code}")));
            }
        }
    }
    Ok(created)
}

/// A topic as Kafka has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its name.
    pub name: String,
    /// Its partitions; 0: it does not exist.
    pub partitions: usize,
    /// Replicas of its first partition.
    pub replicas: usize,
    /// Its settings, as the broker names them; empty if it does not tell them.
    pub settings: BTreeMap<String, String>,
    /// Settings that do not fit Barid, each with the value to set.
    pub problems: Vec<String>,
}

impl Topic {
    fn number(&self, setting: &str) -> Option<i64> {
        self.settings.get(setting)?.parse().ok()
    }
}

/// Describes the topics of `config`, and what does not fit.
///
/// # Errors
/// No broker answered within `timeout`, or one refused.
pub async fn describe_topics(config: &KafkaConfig, timeout: Duration) -> Result<Vec<Topic>, Error> {
    describe(config, config.topics.all(), timeout).await
}

/// As [`describe_topics`], for the topic of revocations only.
///
/// # Errors
/// As [`describe_topics`].
pub async fn describe_revocations(config: &KafkaConfig, timeout: Duration) -> Result<Topic, Error> {
    let name = config.topics.revocations.clone();
    let mut topics = describe(config, vec![name], timeout).await?;
    topics.pop().ok_or_else(|| Error::Away("the topic was not described".into()))
}

async fn describe(
    config: &KafkaConfig,
    names: Vec<String>,
    timeout: Duration,
) -> Result<Vec<Topic>, Error> {
    let mut client = config.overlay(config.client());
    // An admin client is a producer: by default, asking for a topic would create it.
    client.set("allow.auto.create.topics", "false");
    let ask = move || -> Result<(AdminClient<Logged>, bool, Vec<Topic>), Error> {
        let client: AdminClient<Logged> = AdminClient::from_config_and_context(&client, Logged)?;
        let ask = |name: String| -> Result<Topic, Error> {
            let metadata = client.inner().fetch_metadata(Some(&name), timeout)?;
            let found = metadata.topics().first().map(|topic| topic.partitions());
            let partitions = found.unwrap_or_default();
            let replicas = partitions.first().map_or(0, |partition| partition.replicas().len());
            let (settings, problems) = (BTreeMap::new(), Vec::new());
            Ok(Topic { name, partitions: partitions.len(), replicas, settings, problems })
        };
        let topics: Vec<Topic> = names.into_iter().map(ask).collect::<Result<_, _>>()?;
        let first = topics.first().map(|topic| topic.name.as_str());
        // librdkafka's in-process broker does not answer requests for settings.
        let has_settings = ffi::has_controller(client.inner(), first, timeout)?;
        Ok((client, has_settings, topics))
    };
    let asked = tokio::task::spawn_blocking(ask).await;
    let (client, has_settings, mut topics) =
        asked.map_err(|error| Error::Away(format!("worker thread: {error}")))??;
    let there: Vec<_> = topics.iter().filter(|topic| topic.partitions > 0).collect();
    let resources: Vec<_> =
        there.iter().map(|topic| ResourceSpecifier::Topic(&topic.name)).collect();
    let options = AdminOptions::new().request_timeout(Some(timeout.min(SETTINGS_TIMEOUT)));
    let mut settings = Vec::new();
    if has_settings && !resources.is_empty() {
        let described = client.describe_configs(&resources, &options).await.map_err(Error::from);
        for described in
            described.or_else(|error| if error.is_away() { Ok(vec![]) } else { Err(error) })?
        {
            // A right may be missing.
            let entries = described.map(|described| described.entries).unwrap_or_default();
            let entries = entries.into_iter();
            let pairs = entries.filter_map(|entry| Some((entry.name, entry.value?)));
            settings.push(pairs.collect::<BTreeMap<_, _>>());
        }
    }
    for (topic, settings) in topics.iter_mut().filter(|topic| topic.partitions > 0).zip(settings) {
        topic.settings = settings;
    }
    let largest = topics.iter().filter(|topic| topic.name != config.topics.dead);
    let largest = largest.filter_map(|topic| topic.number("max.message.bytes")).max();
    for topic in &mut topics {
        let usage = match &topic.name {
            name if *name == config.topics.dead => Usage::Dead,
            name if config.topics.compacted().contains(&name.as_str()) => Usage::Compacted,
            _ => Usage::Log,
        };
        topic.problems = problems(topic, usage, largest);
    }
    Ok(topics)
}

/// What a topic is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Usage {
    /// Records that are kept for a time.
    Log,
    /// Dead letters.
    Dead,
    /// The newest record of each key.
    Compacted,
}

/// Settings that do not fit. `largest`: the largest record of topics other than that of dead letters, bytes.
fn problems(topic: &Topic, usage: Usage, largest: Option<i64>) -> Vec<String> {
    if topic.partitions == 0 {
        return vec!["it does not exist, or may not be seen; `barid topics create`".into()];
    }
    let mut problems = Vec::new();
    let policy = topic.settings.get("cleanup.policy").map(String::as_str);
    match (usage, policy) {
        // With `compact,delete`, what is old is removed as well.
        (Usage::Compacted, Some(policy)) if policy != "compact" => problems.push(format!(
            "its records are removed after a time (cleanup.policy={policy}), and are then not in force \
             on nodes that start; set cleanup.policy=compact"
        )),
        (Usage::Log | Usage::Dead, Some(policy)) if policy.contains("compact") => {
            problems
                .push("it is compacted, which removes messages; set cleanup.policy=delete".into());
        }
        _ => {}
    }
    if usage == Usage::Compacted && topic.partitions > 1 {
        problems.push(format!(
            "it has {} partitions, among which clients of other languages place a key differently; \
             create it with one",
            topic.partitions
        ));
    }
    let needed = largest.map(|largest| largest.saturating_add(DEAD_OVERHEAD as i64));
    if let (Usage::Dead, Some(needed), Some(max)) =
        (usage, needed, topic.number("max.message.bytes"))
        && max < needed
    {
        problems.push(format!(
            "dead letters of the largest records are cut; set max.message.bytes={needed}"
        ));
    }
    if let Some(insync) = topic.number("min.insync.replicas")
        && insync > topic.replicas as i64
    {
        let replicas = topic.replicas;
        problems.push(format!(
            "nothing can be written: min.insync.replicas is {insync}, and it has {replicas} \
             replicas; lower it, or add replicas"
        ));
    }
    problems
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
