//! Settings of everything that speaks to Kafka.

use std::collections::BTreeMap;
use std::fmt;

use barid_runtime::bounds::{Bound, Bounded, HOUR_MS, whole};
use barid_wire::record::Format;
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

/// Keys under `kafka`. Roles that only produce ignore those of the consumer group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KafkaConfig {
    /// `host:port` of one or more brokers.
    pub brokers: Vec<String>,
    /// Names of the topics.
    pub topics: Topics,
    /// Whether missing topics are created at start-up.
    pub create_topics: bool,
    /// Partitions of created push and receipts topics; other topics get one.
    pub partitions: u16,
    /// Replicas of created topics; 0: the broker's default.
    pub replication: u16,
    /// Name of the consumer group.
    pub group: String,
    /// Rebalance protocol of the group.
    pub group_protocol: GroupProtocol,
    /// Static member id (`barid-purger-0`): the partitions of a restarted process wait for it. Empty: none.
    pub group_instance_id: String,
    /// Format of receipts.
    pub receipts_format: Format,
    /// Maximum records queued in a producer.
    pub producer_queue_records_max: u32,
    /// Maximum size of the records queued in a producer, KiB.
    pub producer_queue_kbytes_max: u32,
    /// `max.message.bytes` of a created dead-letter topic. Keep it above that of the push topics, or large dead letters
    /// are truncated.
    pub dead_bytes_max: u32,
    /// Timeout for delivering a produced record, ms.
    pub delivery_timeout_ms: u32,
    /// Maximum prefetched data of a partition, KiB.
    pub prefetch_kbytes_max: u32,
    /// Maximum time for which a broker holds an empty fetch, ms. A new record ends the wait at once; low values cost
    /// more empty answers.
    pub fetch_wait_max_ms: u32,
    /// Maximum bytes of metadata of a committed offset. Keep it below the broker's `offset.metadata.max.bytes` (4096);
    /// otherwise the purger lowers it to what the broker accepts.
    pub metadata_bytes_max: u32,
    /// Further librdkafka settings, such as `security.protocol` and `sasl.password`. They override Barid's own, except
    /// those that correctness depends on.
    pub properties: Properties,
}

/// Names of the topics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Topics {
    /// Urgent messages.
    pub push_high: String,
    /// Normal messages.
    pub push: String,
    /// Bulk messages.
    pub push_bulk: String,
    /// Receipts for the business.
    pub receipts: String,
    /// Dead letters (refused records).
    pub dead: String,
    /// Revocations of devices' tokens; compacted.
    pub revocations: String,
}

/// Rebalance protocol of the consumer group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupProtocol {
    /// KIP-848 if the broker supports it, otherwise classic.
    Auto,
    /// KIP-848: the broker assigns partitions, incrementally.
    Consumer,
    /// The range assignor; all members stop during a rebalance.
    Classic,
}

impl Default for KafkaConfig {
    fn default() -> Self {
        Self {
            brokers: vec!["127.0.0.1:9092".into()],
            topics: Topics::default(),
            create_topics: false,
            partitions: 12,
            replication: 0,
            group: "barid-purger".into(),
            group_protocol: GroupProtocol::Auto,
            group_instance_id: String::new(),
            receipts_format: Format::Json,
            producer_queue_records_max: 100_000,
            producer_queue_kbytes_max: 65_536,
            dead_bytes_max: 16 << 20,
            delivery_timeout_ms: 30_000,
            prefetch_kbytes_max: 4_096,
            fetch_wait_max_ms: 100,
            metadata_bytes_max: 3_000,
            properties: Properties::default(),
        }
    }
}

impl Default for Topics {
    fn default() -> Self {
        Self {
            push_high: "barid.push.high".into(),
            push: "barid.push".into(),
            push_bulk: "barid.push.bulk".into(),
            receipts: "barid.receipts".into(),
            dead: "barid.dead".into(),
            revocations: "barid.revocations".into(),
        }
    }
}

impl Topics {
    /// The topics that businesses produce to, most urgent first.
    pub fn pushes(&self) -> [&str; 3] {
        [&self.push_high, &self.push, &self.push_bulk]
    }

    /// The topics that purgers read and write.
    pub fn of_purgers(&self) -> Vec<String> {
        let others = [self.receipts.as_str(), &self.dead];
        self.pushes().into_iter().chain(others).map(str::to_owned).collect()
    }

    /// The compacted topics, of one partition each, which every access node follows.
    pub fn compacted(&self) -> [&str; 1] {
        [&self.revocations]
    }

    /// All topics.
    pub fn all(&self) -> Vec<String> {
        let compacted = self.compacted().into_iter().map(str::to_owned);
        self.of_purgers().into_iter().chain(compacted).collect()
    }
}

impl Bounded for KafkaConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("partitions", 1..=10_000, ""),
            whole("replication", 1..=100, "").or_zero("the broker's default"),
            whole("producer_queue_records_max", 1..=10_000_000, ""),
            // A dead letter is cut to less than that at most; 64 GiB.
            whole("producer_queue_kbytes_max", 1024..=64 << 20, "KiB"),
            whole("dead_bytes_max", 1 << 20..=100_000_000, "bytes"),
            whole("delivery_timeout_ms", 100..=HOUR_MS, "ms"),
            // librdkafka's own bounds.
            whole("prefetch_kbytes_max", 1..=2_097_151, "KiB"),
            // Its socket.timeout.ms is a minute, and covers the wait.
            whole("fetch_wait_max_ms", 1..=30_000, "ms"),
            // Leaves room for other commits in a batch of `__consumer_offsets`.
            whole("metadata_bytes_max", 0..=65_536, "bytes"),
        ]
    }
}

/// Settings that the delivery guarantees depend on, or that have a key of their own. `kafka.properties` must not set
/// them, under any of their names.
pub(crate) const RESERVED: [&str; 19] = [
    "auto.commit.enable",
    "auto.offset.reset",
    // Only failures would be reported, so that no delivered record would ever be finished.
    "delivery.report.only.error",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    // The end of a partition would be told as an error, and the partition be taken for stuck.
    "enable.partition.eof",
    // Events would take the place of the callbacks.
    "enabled_events",
    "group.id",
    "group.instance.id",
    "group.protocol",
    "group.remote.assignor",
    "isolation.level",
    "message.timeout.ms",
    "metadata.broker.list",
    "partition.assignment.strategy",
    "request.required.acks",
    // A broker in this process, which keeps nothing, would take the place of Kafka.
    "test.mock.num.brokers",
    // Nothing could be produced outside of a transaction.
    "transactional.id",
];

/// Two names of one setting: librdkafka's CONFIGURATION.md of 2.12.1, first the alias.
const ALIASES: [(&str, &str); 11] = [
    ("acks", "request.required.acks"),
    ("bootstrap.servers", "metadata.broker.list"),
    ("compression.type", "compression.codec"),
    ("delivery.timeout.ms", "message.timeout.ms"),
    ("linger.ms", "queue.buffering.max.ms"),
    ("max.in.flight", "max.in.flight.requests.per.connection"),
    ("max.partition.fetch.bytes", "fetch.message.max.bytes"),
    ("retries", "message.send.max.retries"),
    ("sasl.mechanism", "sasl.mechanisms"),
    ("sasl.oauthbearer.client.credentials.client.id", "sasl.oauthbearer.client.id"),
    ("sasl.oauthbearer.client.credentials.client.secret", "sasl.oauthbearer.client.secret"),
];

/// A setting's own name, where `key` is its alias.
pub(crate) fn own_name(key: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == key).map_or(key, |(_, name)| name)
}

impl KafkaConfig {
    /// Settings of every librdkafka client.
    pub(crate) fn client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", self.brokers.join(","))
            .set("client.id", "barid")
            // Brokers that come back are found again within a second.
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("log.connection.close", "false")
            .set_log_level(RDKafkaLogLevel::Info);
        client
    }

    /// The operator's own settings, over the others. librdkafka is told them in any order, so that of two
    /// names of one setting either could win: only one of them is kept.
    pub(crate) fn overlay(&self, mut client: ClientConfig) -> ClientConfig {
        for (key, value) in &self.properties.0 {
            for (alias, name) in ALIASES.iter().filter(|(_, name)| *name == own_name(key)) {
                client.remove(alias).remove(name);
            }
            client.set(key, value);
        }
        client
    }
}

/// Settings of librdkafka by name. Printed and logged are only the values that librdkafka takes, of settings that it
/// knows and that hold no secret: `sasl.pasword` hides its value as well.
#[derive(Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(from = "BTreeMap<String, Written>")]
pub struct Properties(pub BTreeMap<String, String>);

impl From<BTreeMap<String, Written>> for Properties {
    fn from(properties: BTreeMap<String, Written>) -> Self {
        fn add(name: String, written: Written, all: &mut BTreeMap<String, String>) {
            match written {
                Written::Text(value) => drop(all.insert(name, value)),
                Written::Below(below) => {
                    below
                        .into_iter()
                        .for_each(|(last, value)| add(format!("{name}.{last}"), value, all));
                }
            }
        }
        let mut all = BTreeMap::new();
        properties.into_iter().for_each(|(name, written)| add(name, written, &mut all));
        Self(all)
    }
}

/// A property's value; its errors tell how to write one. A name without quotes (`sasl.password`) is a table in TOML.
enum Written {
    Text(String),
    Below(BTreeMap<String, Written>),
}

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Written;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the value in quotes: \"linger.ms\" = \"5\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Written, E> {
                Ok(Written::Text(text.to_owned()))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Written, A::Error> {
                BTreeMap::deserialize(de::value::MapAccessDeserializer::new(map))
                    .map(Written::Below)
            }
        }
        from.deserialize_any(Reader)
    }
}

impl Properties {
    fn shown(&self) -> BTreeMap<&str, &str> {
        let shown = |(key, value)| {
            let (key, value): (&String, &String) = (key, value);
            let is_hidden = is_secret(key) || !is_valid(key, value);
            (key.as_str(), if is_hidden { "***" } else { value.as_str() })
        };
        self.0.iter().map(shown).collect()
    }
}

/// Whether the value of a setting is a secret.
pub(crate) fn is_secret(name: &str) -> bool {
    ["password", "secret", "key", "token", "jaas", "oauthbearer.config"]
        .iter()
        .any(|word| name.contains(word))
}

/// Whether librdkafka takes this value for this setting. A value that it does not take, or one of an unknown setting, may
/// be a secret under a mistyped name.
fn is_valid(name: &str, value: &str) -> bool {
    ClientConfig::new().set(name, value).create_native_config().is_ok()
}

impl fmt::Debug for Properties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.shown()).finish()
    }
}

impl Serialize for Properties {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.shown().serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_a_valid_configuration() {
        let config: KafkaConfig = toml::from_str("").unwrap();
        assert_eq!((config.check(), &config), (Ok(()), &KafkaConfig::default()));
    }

    #[test]
    fn secrets_are_not_shown() {
        let text = "[properties]\n\"sasl.password\" = \"hunter2\"\n\"sasl.pasword\" = \"hunter2\"\n\
                    \"linger.ms\" = \"hunter2\"\n\"socket.nagle.disable\" = \"true\"";
        let config: KafkaConfig = toml::from_str(text).unwrap();
        for shown in [format!("{config:?}"), toml::to_string(&config).unwrap()] {
            assert!(!shown.contains("hunter2"), "{shown}");
            assert!(shown.contains("sasl.pasword") && shown.contains("true"), "{shown}");
        }
        assert_eq!(config.properties.0["sasl.password"], "hunter2");
    }

    #[test]
    fn hazard_67_what_the_promises_rest_on_cannot_be_set_by_any_name() {
        let aliases = ALIASES.iter().filter(|(_, name)| RESERVED.contains(name));
        let names: Vec<&str> =
            RESERVED.into_iter().chain(aliases.map(|(alias, _)| *alias)).collect();
        for key in [
            "isolation.level",
            "group.remote.assignor",
            "group.instance.id",
            "message.timeout.ms",
            "delivery.timeout.ms",
            "metadata.broker.list",
            "bootstrap.servers",
            "acks",
        ] {
            assert!(names.contains(&key), "{key}");
        }
        for key in names {
            let properties = Properties([(key.to_owned(), "1".to_owned())].into());
            let config = KafkaConfig { properties, ..Default::default() };
            let told = format!("kafka.properties.{key:?} must not be set");
            assert!(config.check().unwrap_err().starts_with(&told));
        }
    }

    #[test]
    fn hazard_67_a_property_wins_by_either_of_its_names() {
        for (alias, name) in ALIASES {
            let value = if name == "compression.codec" { "lz4" } else { "7" };
            let set = |key: &str, value: &str| {
                let mut client = ClientConfig::new();
                client.set(key, value);
                client
            };
            // It is an alias. Builds without SASL have none of its settings.
            if !name.starts_with("sasl.") {
                let native = set(alias, value).create_native_config().unwrap();
                assert_eq!(native.get(name).unwrap(), value, "{alias}");
            }
            for (ours, theirs) in [(alias, name), (name, alias), (name, name)] {
                let properties = Properties([(theirs.to_owned(), value.to_owned())].into());
                let config = KafkaConfig { properties, ..Default::default() };
                let mut client = config.overlay(set(ours, "ours"));
                assert_eq!(client.get(theirs), Some(value));
                assert_eq!(client.remove(theirs).get(ours), None, "{ours} {theirs}");
            }
        }
    }
}
