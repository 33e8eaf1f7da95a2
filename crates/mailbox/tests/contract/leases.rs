//! Leases and the node table.

use std::time::Duration;

use barid_core::{Incarnation, NodeId};
use barid_mailbox::{Lease, LeaseEvent, NodeRecord, NodeRole, NodeTable};

use crate::support::{Bed, contract, until};

contract!(
    a_node_is_seen_changes_and_leaves,
    a_change_is_heard_of_before_the_next_reading,
    hazard_27_a_lease_that_was_gone_stands_again_in_the_same_incarnation,
    a_name_that_another_process_took_is_fought_for_in_another_incarnation
);

const REFRESH: Duration = Duration::from_millis(50);

pub fn record(id: &str, role: NodeRole) -> NodeRecord {
    let id = NodeId::new(id).unwrap();
    NodeRecord {
        zone: "riyadh".into(),
        admin: "127.0.0.1:7082".into(),
        ..NodeRecord::new(role, id, Incarnation(11), "10.0.0.1:7081")
    }
}

/// Node names are shared by the tests of a Redis: each bed has its own.
fn name(bed: &Bed, node: &str) -> String {
    let user = bed.user(node);
    let kind = if bed.config.cluster { "c" } else { "a" };
    format!("{kind}-{}", user.user)
}

pub async fn next(lease: &mut Lease) -> LeaseEvent {
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
    let mut lease = Some(Lease::acquire(&bed.mailbox, second.clone(), ttl).await.unwrap());
    let mut announce = async || {
        drop(lease.take());
        lease = Some(Lease::acquire(&bed.mailbox, second.clone(), ttl).await.unwrap());
    };
    until("the subscription stands", async || {
        announce().await;
        table.snapshot().iter().any(|node| node.id == second.id)
    })
    .await;
    let mine = record(&name(&bed, "six"), NodeRole::Access);
    let see = || table.snapshot().iter().find(|node| node.id == mine.id).cloned();
    let six = Lease::acquire(&bed.mailbox, mine.clone(), ttl).await.unwrap();
    until("it is seen", async || see().is_some()).await;
    six.set_draining();
    until("it is draining", async || see().is_some_and(|node| node.draining)).await;
    // The subscriber heals itself.
    let () = bed.query(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    six.release().await;
    until("it is gone", async || {
        announce().await;
        see().is_none()
    })
    .await;
}

async fn hazard_27_a_lease_that_was_gone_stands_again_in_the_same_incarnation(bed: Bed) {
    let table = NodeTable::watch(&bed.mailbox, NodeRole::Access, REFRESH);
    let mine = record(&name(&bed, "three"), NodeRole::Access);
    let ttl = Duration::from_millis(1_500);
    let mut lease = Lease::acquire(&bed.mailbox, mine.clone(), ttl).await.unwrap();
    let see = || table.snapshot().iter().find(|node| node.id == mine.id).cloned();
    until("it is seen", async || see().is_some()).await;
    // The lease's master failed over, or the process was stopped for too long.
    let key = format!("barid:node:{}", mine.id);
    let () = bed.query(&["DEL", &key]).await;
    assert_eq!(next(&mut lease).await, LeaseEvent::WasGone);
    assert_eq!(see(), Some(mine.clone()));
    assert_eq!(table.void_since(&mine.id, mine.incarnation), None);
    // A failover brings the incarnation before back.
    let () = bed.query(&["HSET", &key, "incarnation", "9", "number", "400"]).await;
    assert_eq!(next(&mut lease).await, LeaseEvent::WasGone);
    let incarnation: String = bed.query(&["HGET", &key, "incarnation"]).await;
    assert_eq!(incarnation, "11");
}

async fn a_name_that_another_process_took_is_fought_for_in_another_incarnation(bed: Bed) {
    let table = NodeTable::watch(&bed.mailbox, NodeRole::Access, REFRESH);
    let mine = record(&name(&bed, "four"), NodeRole::Access);
    let ttl = Duration::from_millis(1_500);
    let mut lease = Lease::acquire(&bed.mailbox, mine.clone(), ttl).await.unwrap();
    // Its clock is behind: it outbids what it finds.
    let usurper = NodeRecord { incarnation: Incarnation(7), ..mine.clone() };
    let usurper = Lease::acquire(&bed.mailbox, usurper, ttl).await.unwrap();
    assert!(usurper.record().incarnation > Incarnation(11));
    assert_eq!(next(&mut lease).await, LeaseEvent::Lapsed);
    drop(usurper);
    let LeaseEvent::NewIncarnation(incarnation) = next(&mut lease).await else {
        panic!("no new incarnation")
    };
    let see = || table.snapshot().iter().find(|node| node.id == mine.id).cloned();
    until("the new incarnation is seen", async || {
        see().is_some_and(|node| node.incarnation == incarnation)
    })
    .await;
    assert_eq!(table.void_since(&mine.id, Incarnation(11)), None, "its sessions live on");
    lease.set_confirmed(incarnation);
    until("the former incarnation is void", async || {
        table.void_since(&mine.id, Incarnation(11)) == Some(Duration::MAX)
    })
    .await;
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
    let all = LeaseEvent::Forgot(bed.mailbox.shards().all().collect());
    assert_eq!(next(&mut lease).await, all);
    // Away for longer than the lease lasts: nobody was told that it is void.
    bed.redis().kill().unwrap();
    tokio::time::sleep(ttl * 2).await;
    bed.redis().restart().await.unwrap();
    let mut events = vec![next(&mut lease).await];
    while events.len() < 2 {
        events.push(next(&mut lease).await);
    }
    assert!(events.contains(&LeaseEvent::WasGone), "{events:?}");
    assert!(events.contains(&all), "{events:?}");
    assert_eq!(lease.record().incarnation, Incarnation(11));
}

/// Each master holds still for longer than the leases last: those whose own keys it has are on the others,
/// and so is what each process has to know.
#[tokio::test]
async fn hazard_27_no_single_master_ends_an_incarnation() {
    let mut bed = Bed::own_cluster(|config| config.response_timeout_ms = 500).await;
    let ttl = Duration::from_millis(2_000);
    let mut leases = Vec::new();
    for n in 0..12 {
        let node = record(&format!("n{n}"), NodeRole::Access);
        leases.push(Lease::acquire(&bed.mailbox, node, ttl).await.unwrap());
    }
    let table = NodeTable::watch(&bed.mailbox, NodeRole::Access, REFRESH);
    until("all are seen", async || table.snapshot().len() == 12).await;
    for master in 0..3 {
        bed.masters().node(master).stop().unwrap();
        let began = std::time::Instant::now();
        while began.elapsed() < ttl * 3 {
            tokio::time::sleep(REFRESH).await;
            assert_eq!(table.snapshot().len(), 12, "master {master} away");
        }
        bed.masters().node(master).cont().unwrap();
        until("it answers", async || bed.mailbox.ping().await.is_ok()).await;
    }
    for lease in &mut leases {
        assert_eq!(lease.record().incarnation, Incarnation(11));
        while let Ok(event) =
            tokio::time::timeout(Duration::from_millis(1), lease.next_event()).await
        {
            assert!(
                !matches!(event, LeaseEvent::Lapsed | LeaseEvent::NewIncarnation(_)),
                "{event:?}"
            );
        }
    }
}

/// Usage counters of all masters, summed.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    scripts: f64,
    script_us: f64,
    reads: f64,
    cpu_s: f64,
}

impl Usage {
    async fn of(bed: &Bed) -> Self {
        let mut usage = Self::default();
        for node in bed.nodes() {
            let info: String = node.query(&["INFO", "everything"]).await.unwrap();
            let line = |name: &str| {
                let value =
                    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
                value.unwrap_or("0").to_owned()
            };
            let number = |name: &str| line(name).parse::<f64>().unwrap();
            let scripts = line("cmdstat_evalsha");
            let of_scripts = |name: &str| {
                let value = scripts.split(',').find_map(|pair| pair.strip_prefix(name));
                value.map_or(0.0, |value| value.parse::<f64>().unwrap())
            };
            usage.scripts += of_scripts("calls=");
            usage.script_us += of_scripts("usec=");
            usage.reads += number("total_reads_processed");
            usage.cpu_s += number("used_cpu_user") + number("used_cpu_sys");
        }
        usage
    }

    fn since(self, before: Self) -> Self {
        Self {
            scripts: self.scripts - before.scripts,
            script_us: self.script_us - before.script_us,
            reads: self.reads - before.reads,
            cpu_s: self.cpu_s - before.cpu_s,
        }
    }
}

/// docs/benchmarks.md has the figures of `BARID_LEASES=100`, which are of leases of 10 s over half a minute.
#[tokio::test]
async fn a_renewal_is_a_call_a_shard_and_its_calls_reach_a_master_together() {
    let many = std::env::var("BARID_LEASES").map(|count| count.parse::<usize>().unwrap());
    let (ttl_ms, seconds) = if many.is_ok() { (10_000, 30) } else { (1_500, 4) };
    let nodes = many.unwrap_or(4);
    let bed = Bed::own_cluster(|_| {}).await;
    let pass = async || tokio::time::sleep(Duration::from_secs(seconds)).await;
    let before = Usage::of(&bed).await;
    pass().await;
    let idle = Usage::of(&bed).await.since(before);
    let mut leases = Vec::new();
    for n in 0..nodes {
        // Each with connections of its own, as another process has them.
        let mailbox = crate::support::open(&bed.config).await;
        let node = record(&format!("n{n}"), NodeRole::Access);
        let ttl = Duration::from_millis(ttl_ms);
        leases.push(Lease::acquire(&mailbox, node, ttl).await.unwrap());
    }
    let renewals = async || {
        let mut sum = 0.0;
        for n in 0..nodes {
            let number: String = bed.query(&["HGET", &format!("barid:node:n{n}"), "number"]).await;
            sum += number.parse::<f64>().unwrap();
        }
        sum
    };
    let (counted, before) = (renewals().await, Usage::of(&bed).await);
    pass().await;
    let busy = Usage::of(&bed).await.since(before);
    let renewed = renewals().await - counted;
    let (calls, reads) = (busy.scripts / renewed, (busy.reads - idle.reads) / renewed);
    let cpu_us = (busy.cpu_s - idle.cpu_s) * 1e6 / busy.scripts;
    eprintln!(
        "{renewed} renewals of {nodes} nodes in {seconds} s: {calls:.1} calls each, read in {reads:.1} pieces; \
         {:.1} µs a script, {cpu_us:.1} µs of Redis's time a call, {:.2} % of a core in all",
        busy.script_us / busy.scripts,
        100.0 * (busy.cpu_s - idle.cpu_s) / seconds as f64
    );
    assert!(renewed >= nodes as f64 * 5.0, "{renewed} renewals");
    // 64 shards and its own key; a renewal may be counted at one end and not at the other.
    assert!((58.0..72.0).contains(&calls), "{calls} calls a renewal");
    assert!(reads < 16.0, "{reads} reads a renewal of three masters");
}

#[tokio::test]
async fn hazard_28_a_process_that_starts_while_a_master_is_away_sees_every_node() {
    let mut bed = Bed::own_cluster(|config| config.response_timeout_ms = 500).await;
    let mut leases = Vec::new();
    for n in 0..12 {
        let node = record(&format!("n{n}"), NodeRole::Access);
        let lease = Lease::acquire(&bed.mailbox, node, Duration::from_secs(6)).await.unwrap();
        leases.push(lease);
    }
    for master in 0..3 {
        bed.masters().node(master).stop().unwrap();
        let mut config = bed.config.clone();
        config.connect_timeout_ms = 500;
        let fresh = crate::support::open(&config).await;
        let table = NodeTable::watch(&fresh, NodeRole::Access, REFRESH);
        until("all are seen", async || table.snapshot().len() == 12).await;
        assert_eq!(fresh.nodes().await.unwrap().len(), 12);
        // Nobody can tell of a node that no readable master knows.
        let stranger = NodeId::new("stranger").unwrap();
        assert_eq!(table.void_since(&stranger, Incarnation(1)), None);
        bed.masters().node(master).cont().unwrap();
        until("it answers", async || bed.mailbox.ping().await.is_ok()).await;
    }
}

#[tokio::test]
async fn hazard_35_the_shards_of_a_master_that_was_emptied_are_told_within_a_renewal() {
    let bed = Bed::own_cluster(|_| {}).await;
    let ttl = Duration::from_secs(3);
    let mine = record("n", NodeRole::Access);
    let mut lease = Lease::acquire(&bed.mailbox, mine.clone(), ttl).await.unwrap();
    let mut all: Vec<_> = bed.mailbox.shards().all().collect();
    for node in bed.nodes() {
        let () = node.query(&["FLUSHALL"]).await.unwrap();
        let mut told = Vec::new();
        let served = async |shard: &barid_core::Shard| {
            let key = format!("{{{shard}}}:n");
            node.query::<redis::Value>(&["HLEN", key.as_str()]).await.is_ok()
        };
        let mut expected = Vec::new();
        for shard in &all {
            if served(shard).await {
                expected.push(*shard);
            }
        }
        assert!((10..=32).contains(&expected.len()), "{}", expected.len());
        while told.len() < expected.len() {
            match next(&mut lease).await {
                LeaseEvent::Forgot(shards) => told.extend(shards),
                LeaseEvent::WasGone => {}
                event => panic!("{event:?}"),
            }
        }
        told.sort();
        assert_eq!(told, expected);
        all.retain(|shard| !expected.contains(shard));
    }
    assert!(all.is_empty());
    until("it is written again what Redis was set up with", async || {
        for node in bed.nodes() {
            let meta = node.query::<Vec<String>>(&["HVALS", "barid:meta"]).await;
            if meta.is_ok_and(|meta| meta.len() == 2 && meta[0] == "64") {
                return true;
            }
        }
        false
    })
    .await;
    assert_eq!(lease.record().incarnation, mine.incarnation);
}
