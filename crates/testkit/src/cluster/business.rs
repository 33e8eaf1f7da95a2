//! The business service's part: produces records to the cluster's push topics.

use std::time::Duration;

use anyhow::Result;
use barid_wire::record::Push;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};

use super::topics::Topics;
use crate::audit::Place;
use crate::records;

/// A producer to one cluster.
#[derive(Clone)]
pub struct Business {
    producer: FutureProducer,
    topics: Topics,
}

impl Business {
    pub(super) fn new(mut client: ClientConfig, topics: Topics) -> Result<Self> {
        client.set("enable.idempotence", "true").set("linger.ms", "0");
        Ok(Self { producer: client.create()?, topics })
    }

    /// Produces the shortest record: a text to a user of [`crate::token::APP`].
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn send_text(&self, user: &str, id: &str, text: &str) -> Result<Place> {
        self.send(&records::text(user, id, text)).await
    }

    /// Produces a record as JSON to the topic of normal priority.
    ///
    /// # Errors
    /// As [`Self::send_to`].
    pub async fn send(&self, push: &Push) -> Result<Place> {
        self.send_to(&self.topics.push, push).await
    }

    /// Produces a record as JSON to any topic.
    ///
    /// # Errors
    /// Returns an error if Kafka does not store the record within 30 s.
    pub async fn send_to(&self, topic: &str, push: &Push) -> Result<Place> {
        self.produce(topic, push.key(), &records::json(push)).await
    }

    /// Produces any bytes to any topic.
    ///
    /// # Errors
    /// Returns an error if Kafka does not store the record within 30 s.
    pub async fn produce(&self, topic: &str, key: &str, payload: &[u8]) -> Result<Place> {
        self.produce_with(topic, key, payload, &[]).await
    }

    /// As [`Self::produce`], with headers.
    ///
    /// # Errors
    /// Returns an error if Kafka does not store the record within 30 s.
    pub async fn produce_with(
        &self,
        topic: &str,
        key: &str,
        payload: &[u8],
        headers: &[(&str, &str)],
    ) -> Result<Place> {
        let header = |all: OwnedHeaders, (key, value): &(&str, &str)| {
            all.insert(Header { key, value: Some(*value) })
        };
        let headers = headers.iter().fold(OwnedHeaders::new(), header);
        let record = FutureRecord::to(topic).key(key).payload(payload).headers(headers);
        match self.producer.send(record, Duration::from_secs(30)).await {
            Ok(at) => Ok(Place { partition: at.partition, offset: at.offset }),
            Err((error, _)) => Err(error.into()),
        }
    }
}
