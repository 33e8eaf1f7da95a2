//! The SDK against the real cluster, over a network that breaks.

use std::time::Duration;

use barid_bus::{KafkaConfig, Producer};
use barid_client::{Client, Event, FileStore, Message};
use barid_testkit::Relay;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::place::{PATIENCE, Place};

const COUNT: usize = 300;

/// Addresses from the state file, and a token from `barid token`.
struct Cluster {
    address: std::net::SocketAddr,
    producer: Producer,
    topic: String,
    token: String,
}

fn cluster(place: &Place, ready: &Value) -> Cluster {
    while !place.state().exists() {
        crate::place::pause();
    }
    let (token, _) = place.run("token --user alice");
    let brokers = vec![ready["brokers"].as_str().unwrap().to_owned()];
    let kafka = KafkaConfig { brokers, ..Default::default() };
    Cluster {
        address: ready["url"].as_str().unwrap().trim_start_matches("ws://").parse().unwrap(),
        producer: Producer::new(&kafka).unwrap(),
        topic: kafka.topics.push,
        token: token[0]["token"].as_str().unwrap().to_owned(),
    }
}

impl Cluster {
    async fn push(&self, n: usize) {
        let body =
            json!({"id": format!("m{n}"), "app": "demo", "to": {"user": "alice"}, "text": "x"});
        let payload = body.to_string().into_bytes().into();
        self.producer.send(&self.topic, b"alice", payload, &[]).await.unwrap();
    }

    fn phone(&self, relay: &Relay) -> barid_client::Builder {
        let token = self.token.clone();
        Client::builder(format!("ws://{}", relay.address()))
            .device("phone")
            .token(move || std::future::ready(Ok(token.as_str().into())))
            .reconnect_between(Duration::from_millis(10), Duration::from_millis(50))
    }
}

/// Starts a client that tells every message it shows.
fn listen(builder: barid_client::Builder) -> (Client, mpsc::Receiver<String>) {
    let (tx, rx) = mpsc::channel(COUNT * 2);
    let client = builder.start(move |message: Message| {
        let tx = tx.clone();
        async move { Ok(tx.send(message.id).await?) }
    });
    (client.unwrap(), rx)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_breaks_costs_no_message_and_repeats_none() {
    let place = Place::new();
    let dev = place.start("dev --port 0");
    let cluster = cluster(&place, &dev.event("ready"));
    let relay = Relay::to(cluster.address).await.unwrap();
    let (client, mut shown) = listen(cluster.phone(&relay));
    for n in 0..COUNT {
        cluster.push(n).await;
        if n % 20 == 10 {
            relay.cut();
        }
    }
    for n in 0..COUNT {
        let id = timeout(PATIENCE, shown.recv()).await.expect("a message in time");
        assert_eq!(id, Some(format!("m{n}")));
    }
    client.shutdown().await;
    assert_eq!(shown.recv().await, None);
    let (held, _) = place.run("inspect user alice");
    assert_eq!(held[0]["kept"].as_u64(), Some(0), "every ack arrived: {held:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_restarts_goes_on_from_its_file() {
    let place = Place::new();
    let dev = place.start("dev --port 0");
    let cluster = cluster(&place, &dev.event("ready"));
    let relay = Relay::to(cluster.address).await.unwrap();
    let store = FileStore::new(place.dir.path().join("phone.json"));
    for (round, expected) in [(0, ["m0", "m1"]), (1, ["m2", "m3"])] {
        let (events, mut told) = mpsc::channel(64);
        let builder = cluster.phone(&relay).positions(store.clone()).on_event(move |event| {
            let _ = events.try_send(event);
        });
        cluster.push(round * 2).await;
        let (client, mut shown) = listen(builder);
        cluster.push(round * 2 + 1).await;
        for id in expected {
            let next = timeout(PATIENCE, shown.recv()).await.expect("a message in time");
            assert_eq!(next.as_deref(), Some(id));
        }
        client.shutdown().await;
        let resets = std::iter::from_fn(|| told.try_recv().ok());
        assert!(!resets.into_iter().any(|event| matches!(event, Event::Reset { .. })));
    }
}
