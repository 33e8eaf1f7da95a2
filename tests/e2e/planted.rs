//! Faults planted in a real run: between the SDK and some applications, messages are dropped, repeated, swapped
//! or forged, and one connection is cut. The audit finds each of them, and nothing else.

use std::collections::BTreeSet;

use anyhow::Result;
use barid_client::{Body, Message};
use barid_testkit::audit::Kind;
use barid_testkit::device::PATIENCE;
use barid_testkit::{Cluster, Relay, Role};
use tokio::time::Instant;

use crate::listener::{Listener, SharedAudit};

const EACH: usize = 40;
/// The message at which the fault is planted.
const AT: usize = 20;

/// A filter between the SDK and an application.
type Between = Box<dyn FnMut(Message) -> Vec<Message> + Send>;

fn id(user: &str, number: usize) -> String {
    format!("{user}-{number}")
}

/// Changes one message, and passes on all others.
fn at(user: &str, plant: impl Fn(Message) -> Vec<Message> + Send + 'static) -> Between {
    let id = id(user, AT);
    Box::new(move |message| if message.id == id { plant(message) } else { vec![message] })
}

/// Swaps one message with the next.
fn swapped(user: &str) -> Between {
    let id = id(user, AT);
    let mut held = None;
    Box::new(move |message| {
        if message.id == id {
            held = Some(message);
            return Vec::new();
        }
        [Some(message), held.take()].into_iter().flatten().collect()
    })
}

fn beside(message: Message, id: &str) -> Vec<Message> {
    let other = Message { id: id.into(), ..message.clone() };
    vec![message, other]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_planted_fault_is_found_and_nothing_else() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let url = cluster.url(0).await?;
    let relay = Relay::to(cluster.node(Role::Access, 0).address("ws").await?).await?;
    let cut = format!("ws://{}/v1/connect", relay.address());
    let plants: [(&str, &str, Between); 8] = [
        ("honest", &url, Box::new(|message| vec![message])),
        ("lossy", &url, at("lossy", |_| Vec::new())),
        ("swapped", &url, swapped("swapped")),
        ("repeated", &url, at("repeated", |message| vec![message.clone(), message])),
        ("misled", &url, at("misled", |message| beside(message, &id("honest", AT)))),
        ("fooled", &url, at("fooled", |message| beside(message, "forged"))),
        (
            "altered",
            &url,
            at("altered", |message| vec![Message { body: Body::Text("x".into()), ..message }]),
        ),
        ("cut", &cut, Box::new(|message| vec![message])),
    ];
    let audit = SharedAudit::default();
    let users = plants.each_ref().map(|(user, ..)| *user);
    let mut listeners = Vec::new();
    for (user, url, between) in plants {
        listeners.push(Listener::watched(&audit, ("access-0", url), (user, "phone"), between)?);
    }
    for listener in &listeners {
        listener.connected().await?;
    }
    let business = cluster.business()?;
    for number in 0..EACH {
        if number == AT {
            relay.cut();
        }
        for user in users {
            let id = id(user, number);
            let place = business.send_text(user, &id, "as it was produced").await?;
            audit.lock().produced(user, place, &id, "as it was produced");
        }
    }
    let wanted = BTreeSet::from([
        (Kind::Lost, "lossy", id("lossy", AT)),
        (Kind::OutOfOrder, "swapped", id("swapped", AT)),
        (Kind::Repeated, "repeated", id("repeated", AT)),
        (Kind::WrongUser, "misled", id("honest", AT)),
        (Kind::Foreign, "fooled", "forged".into()),
        (Kind::Altered, "altered", id("altered", AT)),
        (Kind::Closed, "cut", "access-0".into()),
    ]);
    let deadline = Instant::now() + 2 * PATIENCE;
    while audit.lock().missing_count() > 1 && Instant::now() < deadline {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let faults = audit.lock().faults();
    let found: Vec<_> =
        faults.iter().map(|fault| (fault.kind, &*fault.user, fault.what.clone())).collect();
    assert_eq!(found.len(), wanted.len(), "{faults:#?}");
    assert_eq!(BTreeSet::from_iter(found), wanted);
    Ok(())
}
