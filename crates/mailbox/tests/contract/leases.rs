//! Leases and the node table.

use std::time::Duration;

use barid_core::{Incarnation, NodeId};
use barid_mailbox::{Lease, LeaseEvent, NodeRecord, NodeRole, NodeTable};

use crate::support::{Bed, contract, until};

contract!(
    a_node_is_seen_changes_and_leaves,
    a_change_is_heard_of_before_the_next_reading,
    hazard_13_a_lapsed_lease_is_taken_as_another_life
);

const REFRESH: Duration = Duration::from_millis(50);

fn record(id: &str, role: NodeRole) -> NodeRecord {
    NodeRecord {
        id: NodeId::new(id).unwrap(),
        role,
        address: "10.0.0.1:7081".into(),
        incarnation: Incarnation(11),
        load: 0,
        draining: false,
        zone: "riyadh".into(),
        admin: "127.0.0.1:7082".into(),
        devices: String::new(),
    }
}

/// Node names are shared by the tests of a Redis: each bed has its own.
fn name(bed: &Bed, node: &str) -> String {
    let user = bed.user(node);
    let kind = if bed.config.cluster { "c" } else { "a" };
    format!("{kind}-{}", user.user)
}

async fn next(lease: &mut Lease) -> LeaseEvent {
    let event = tokio::time::timeout(Duration::from_secs(10), lease.next_event()).await;
    event.expect("an event")
}

async fn a_node_is_seen_changes_and_leaves(bed: Bed) {
    let table = NodeTable::watch(&bed.mailbox, NodeRole::Access, REFRESH);
    let others = NodeTable::watch(&bed.mailbox, NodeRole::Dispatcher, REFRESH);
    let mine = record(&name(&bed, "one"), NodeRole::Access);
    let see = || table.snapshot().iter().find(|node| node.id == mine.id).cloned();
    // A second one, so that one's leaving is not the death of most.
    let second = record(&name(&bed, "two"), NodeRole::Access);
    let _second = Lease::acquire(&bed.mailbox, second, Duration::from_secs(30)).await.unwrap();
    let ttl = Duration::from_millis(1_500);
    let lease = Lease::acquire(&bed.mailbox, mine.clone(), ttl).await.unwrap();
    until("it is seen", async || see().is_some()).await;
    assert_eq!(see().unwrap(), mine);
    assert!(!others.snapshot().iter().any(|node| node.id == mine.id));
    assert_eq!(table.void_since(&mine.id, mine.incarnation), None);
    lease.set_load(7);
    lease.set_draining();
    until("it is draining", async || see().is_some_and(|node| node.draining && node.load == 7))
        .await;
    tokio::time::sleep(ttl * 2).await;
    assert!(see().is_some(), "it renews itself");
    lease.release().await;
    until("it is gone", async || see().is_none()).await;
    assert!(table.void_since(&mine.id, mine.incarnation).is_some());
}

async fn a_change_is_heard_of_before_the_next_reading(bed: Bed) {
    let table = NodeTable::watch(&bed.mailbox, NodeRole::Access, Duration::from_secs(600));
    let ttl = Duration::from_secs(30);
    let second = record(&name(&bed, "five"), NodeRole::Access);
    // The subscription may come after the first announcement: another one is made until it is heard.
    let mut leases = vec![Lease::acquire(&bed.mailbox, second.clone(), ttl).await.unwrap()];
    until("the subscription stands", async || {
        leases.push(Lease::acquire(&bed.mailbox, second.clone(), ttl).await.unwrap());
        table.snapshot().iter().any(|node| node.id == second.id)
    })
    .await;
    let mine = record(&name(&bed, "six"), NodeRole::Access);
    let see = || table.snapshot().iter().find(|node| node.id == mine.id).cloned();
    let lease = Lease::acquire(&bed.mailbox, mine.clone(), ttl).await.unwrap();
    until("it is seen", async || see().is_some()).await;
    lease.set_draining();
    until("it is draining", async || see().is_some_and(|node| node.draining)).await;
    // The subscriber heals itself.
    let () = bed.query(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    lease.release().await;
    until("it is gone", async || {
        leases.push(Lease::acquire(&bed.mailbox, second.clone(), ttl).await.unwrap());
        see().is_none()
    })
    .await;
}

async fn hazard_13_a_lapsed_lease_is_taken_as_another_life(bed: Bed) {
    let table = NodeTable::watch(&bed.mailbox, NodeRole::Access, REFRESH);
    let mine = record(&name(&bed, "three"), NodeRole::Access);
    let ttl = Duration::from_millis(1_500);
    let mut lease = Lease::acquire(&bed.mailbox, mine.clone(), ttl).await.unwrap();
    let see = || table.snapshot().iter().find(|node| node.id == mine.id).cloned();
    until("it is seen", async || see().is_some()).await;
    // The lease's master failed over, or the process was stopped for too long.
    let () = bed.query(&["DEL", &format!("barid:node:{}", mine.id)]).await;
    assert_eq!(next(&mut lease).await, LeaseEvent::Lapsed);
    lease.renew_as(Incarnation(12));
    assert_eq!(next(&mut lease).await, LeaseEvent::Renewed);
    until("the new life is seen", async || {
        see().is_some_and(|node| node.incarnation == Incarnation(12))
    })
    .await;
    assert_eq!(table.void_since(&mine.id, Incarnation(11)), Some(Duration::MAX));
    // Another process took the name: this one has to yield.
    let usurper = NodeRecord { incarnation: Incarnation(13), ..mine.clone() };
    let _usurper = Lease::acquire(&bed.mailbox, usurper, ttl).await.unwrap();
    assert_eq!(next(&mut lease).await, LeaseEvent::Lapsed);
}

#[tokio::test]
async fn hazard_12_a_new_connection_is_an_event_and_a_full_redis_renews() {
    let mut bed = Bed::own(|_| {}).await;
    let mine = record("node", NodeRole::Access);
    let ttl = Duration::from_millis(2_000);
    let mut lease = Lease::acquire(&bed.mailbox, mine, ttl).await.unwrap();
    let () = bed.query(&["CONFIG", "SET", "maxmemory", "1mb"]).await;
    tokio::time::sleep(ttl).await;
    let () = bed.query(&["CLIENT", "KILL", "TYPE", "normal"]).await;
    assert_eq!(next(&mut lease).await, LeaseEvent::Reconnected);
    bed.redis().kill().unwrap();
    assert_eq!(next(&mut lease).await, LeaseEvent::Lapsed, "away for longer than it lasts");
}
