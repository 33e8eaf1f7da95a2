//! librdkafka's in-process broker, for `barid dev` and for tests. It listens on TCP, so that any Kafka client can
//! produce to it, and keeps everything in memory.

use std::time::Duration;

use rdkafka::config::FromClientConfig as _;
use rdkafka::producer::{BaseProducer, Producer as _};

use crate::{Error, KafkaConfig, ffi};

/// A running in-process broker, which is stopped on drop.
pub struct EmbeddedKafka {
    // The broker belongs to this client.
    client: BaseProducer,
}

impl EmbeddedKafka {
    /// Starts one broker with the topics of `config`, and names it in `config.brokers`.
    ///
    /// # Errors
    /// librdkafka could not start it.
    pub fn start(config: &mut KafkaConfig) -> Result<Self, Error> {
        let mut client = rdkafka::ClientConfig::new();
        client.set("test.mock.num.brokers", "1");
        let client = BaseProducer::from_config(&client)?;
        ffi::set_mock_rebalance_delay(client.client(), Duration::from_millis(0));
        let this = Self { client };
        config.brokers = vec![this.brokers()];
        // Unlike Kafka, this broker answers a waiting fetch only at the end of its wait.
        config.fetch_wait_max_ms = config.fetch_wait_max_ms.min(5);
        let topics = config.topics.pushes();
        for topic in topics.iter().chain([&config.topics.receipts.as_str()]) {
            this.create_topic(topic, config.partitions)?;
        }
        for topic in config.topics.compacted().into_iter().chain([config.topics.dead.as_str()]) {
            this.create_topic(topic, 1)?;
        }
        Ok(this)
    }

    /// `host:port` for clients.
    pub fn brokers(&self) -> String {
        self.client.client().mock_cluster().map(|c| c.bootstrap_servers()).unwrap_or_default()
    }

    /// Tells clients that the broker is at `127.0.0.1:port`, where somebody else forwards to [`Self::brokers`].
    pub fn advertise(&self, port: u16) {
        ffi::advertise_mock(self.client.client(), port);
    }

    /// Creates a topic.
    ///
    /// # Errors
    /// The topic exists.
    pub fn create_topic(&self, name: &str, partitions: u16) -> Result<(), Error> {
        let Some(cluster) = self.client.client().mock_cluster() else {
            return Err(Error::Away("the in-process broker is gone".into()));
        };
        cluster.create_topic(name, i32::from(partitions), 1).map_err(Error::from)
    }

    /// Delays the answers to the next `count` requests of a kind (by Kafka's API key) by `delay`; for tests.
    pub fn delay_answers(&self, api_key: i16, count: usize, delay: Duration) {
        ffi::delay_mock_answers(self.client.client(), api_key, count, delay);
    }
}
