//! Redis's memory while users, devices and nodes come and never return: it stays bounded.

use std::collections::BTreeMap;
use std::time::Duration;

use barid_core::{Attempt, Generation, NodeId, Seq, Shard};
use barid_mailbox::{
    AcceptMessage, AcceptOutcome, AckRequest, ConfirmRequest, ConnectOutcome, ConnectRequest,
    DisconnectRequest, GroupOutcome, ReadRequest, Unreached, UserKey,
};
use barid_wire::envelope::{self, Envelope, Header};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::support::{Bed, confirmation, hello, message, session};

const DAY_MS: u64 = 24 * 3600 * 1000;

/// Sessions of this node were connected by another one than `node-1`.
fn at_node_2(mut request: ConnectRequest) -> ConnectRequest {
    request.session.node = NodeId::new("node-2").unwrap();
    request
}

async fn fire_all(bed: &Bed) {
    let retry = bed.config.retry().unwrap();
    let shards: Vec<_> = bed.mailbox.shards().all().collect();
    while !bed.mailbox.fire(&shards, 1_000, &retry).await.unwrap().is_empty() {}
}

#[tokio::test]
async fn hazard_30_a_week_after_a_node_was_killed_nothing_of_its_users_is_left() {
    let bed = Bed::own(|_| {}).await;
    let users: Vec<_> = (0..200).map(|n| bed.user(&format!("u{n}"))).collect();
    for (user, offset) in users.iter().zip(1..) {
        bed.connect(user, "phone", 1).await;
        if offset % 2 == 0 {
            bed.fill(user, offset..=offset).await;
        }
    }
    assert_eq!(bed.keys("r").await.len(), 200);
    // Its lease is gone, and nobody connects, confirms or sends.
    bed.grow_old(6 * DAY_MS).await;
    assert_eq!(bed.keys("r").await.len(), 200, "a route lives as long as a mailbox at least");
    bed.grow_old(2 * DAY_MS).await;
    fire_all(&bed).await;
    for kind in ["h", "q", "r", "t"] {
        assert_eq!(bed.keys(kind).await, Vec::<String>::new(), "{kind}");
    }
}

#[tokio::test]
async fn hazard_30_a_living_session_keeps_its_routes_and_a_ghost_beside_it_is_one_field() {
    let bed = Bed::own(|_| {}).await;
    let user = bed.user("alice");
    bed.connect(&user, "tablet", 1).await; // its node is killed
    let phone = at_node_2(hello(&user, "phone", 2));
    bed.hello(phone.clone()).await;
    let position = bed.position(&user, 0).await;
    let confirm = ConfirmRequest {
        session: phone.session.clone(),
        attempt: Attempt(2),
        ..confirmation(&user, "phone", 2, position)
    };
    for day in 1..=30 {
        bed.grow_old(DAY_MS).await;
        bed.confirm(confirm.clone()).await;
        let routes = bed.mailbox.read_routes(&user).await.unwrap();
        assert_eq!(routes.len(), 2, "after {day} days");
    }
    // A message finds that the tablet's node is gone: the dispatcher has its route removed.
    bed.fill(&user, 1..=1).await;
    let device = hello(&user, "tablet", 1).device;
    let gone = DisconnectRequest { user: user.clone(), device, session: session(1) };
    bed.mailbox.disconnect(gone).await.unwrap();
    // The phone's own confirmation has not forgotten it: it might have been living.
    let routes = bed.mailbox.read_routes(&user).await.unwrap();
    assert_eq!(routes.len(), 1);
    bed.grow_old(8 * DAY_MS).await;
    assert!(bed.keys("r").await.is_empty());
}

#[tokio::test]
async fn hazard_30_routes_that_were_empty_in_between_expire_as_well() {
    let bed = Bed::own(|_| {}).await;
    let user = bed.user("alice");
    let lives = async |user: &UserKey| bed.query::<i64>(&["PTTL", &bed.key("r", user)]).await;
    let ttl_ms = Duration::from_secs(bed.config.ttl_seconds).as_millis() as i64;
    for n in 1..=3 {
        bed.connect(&user, "phone", n).await;
        let left = lives(&user).await;
        assert!((ttl_ms..=ttl_ms + ttl_ms / 16).contains(&left), "{left}");
        bed.disconnect(&user, "phone", n).await;
    }
    // A confirmation that changes nothing renews them, and seldom.
    bed.connect(&user, "phone", 4).await;
    let confirm = confirmation(&user, "phone", 4, bed.position(&user, 0).await);
    bed.grow_old(DAY_MS / 4).await;
    let before = lives(&user).await;
    bed.confirm(confirm.clone()).await;
    assert!(lives(&user).await <= before, "every renewal is told to all dispatchers");
    bed.grow_old(DAY_MS / 2).await;
    bed.confirm(confirm).await;
    assert!(lives(&user).await >= ttl_ms - 10_000);
}

async fn calls(bed: &Bed, command: &str) -> u64 {
    let info: String = bed.query(&["INFO", "commandstats"]).await;
    let line =
        info.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
    line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
}

#[tokio::test]
async fn hazard_38_distinct_collapse_keys_do_not_make_a_full_mailbox_dear() {
    let bed = Bed::own(|config| config.entries_max = 100).await;
    let user = bed.user("alice");
    let mut offset = 0;
    let mut fill = async |count: i64| {
        for _ in 0..count {
            offset += 1;
            let mut message = message(&user, offset, &format!("m{offset}"));
            message.collapse_key = Some(format!("key-{offset}").into());
            bed.accept_message(message).await;
        }
    };
    fill(100).await;
    let before = calls(&bed, "hgetall").await;
    fill(320).await;
    let sweeps = calls(&bed, "hgetall").await - before;
    assert!(sweeps <= 320 / 64, "{sweeps} times all of the head was read for 320 messages");
    // The same where it is acknowledged one by one.
    bed.connect(&user, "phone", 1).await;
    let before = calls(&bed, "hgetall").await;
    for seq in 321..420 {
        bed.ack(&user, "phone", 1, seq).await;
    }
    let sweeps = calls(&bed, "hgetall").await - before;
    assert!(sweeps <= 2, "{sweeps} times for 99 acknowledgements");
}

#[tokio::test]
async fn hazard_49_a_mailbox_is_bounded_in_bytes_and_what_leaves_is_told() {
    let bed = Bed::own(|config| config.mailbox_bytes_max = 1 << 20).await;
    let user = bed.user("alice");
    bed.connect(&user, "tablet", 1).await; // it is away, and holds everything back
    bed.disconnect(&user, "tablet", 1).await;
    let large = |offset: i64, bytes: usize| {
        let envelope = Envelope {
            id: format!("m{offset}"),
            payload: vec![b'x'; bytes].into(),
            ..Default::default()
        };
        let body = envelope::encode_body(envelope);
        AcceptMessage { body, ..message(&user, offset, &format!("m{offset}")) }
    };
    let held = async || {
        let page = bed.mailbox.read(ReadRequest {
            user: user.clone(),
            after: Seq(0),
            entries_max: 1_000,
            bytes_max: u32::MAX,
            device: None,
        });
        let page = page.await.unwrap();
        (page.oldest.0, page.entries.iter().map(Bytes::len).sum::<usize>())
    };
    // One by one, many at once, and one that fills nearly all of it.
    let mut told = 0;
    let mut offset = 0;
    for (messages, bytes) in [(40, 60_000), (3, 10), (1, 1_000_000), (20, 100_000), (400, 5_000)] {
        for batch in [1, 7] {
            let mut left = messages;
            while left > 0 {
                let count = batch.min(left);
                left -= count;
                let messages = (1..=count).map(|n| large(offset + n, bytes)).collect();
                offset += count;
                let GroupOutcome::Done(done) = bed.accept_group(messages, None).await else {
                    panic!("a gap")
                };
                for outcome in done {
                    let AcceptOutcome::Accepted { evicted, .. } = outcome else {
                        panic!("{outcome:?}")
                    };
                    told += u64::from(evicted);
                }
                let (oldest, held) = held().await;
                assert!(held <= 1 << 20, "{held} bytes after {offset}");
                assert_eq!(told, oldest - 1, "what was evicted was told");
            }
        }
    }
    // Acknowledged messages make room: nothing more is evicted.
    let newest = bed.page(&user, offset as u64).await.newest.0;
    bed.connect(&user, "tablet", 2).await;
    for seq in newest - 30..newest {
        bed.ack(&user, "tablet", 2, seq).await;
        let outcome = bed.accept_message(large(offset + 1, 5_000)).await;
        offset += 1;
        assert!(matches!(outcome, AcceptOutcome::Accepted { evicted: 0, .. }), "{outcome:?}");
    }
    // A message that is larger than the bound is kept all the same, alone.
    let bed = bed.with(|config| config.mailbox_bytes_max = 64 << 10).await;
    let outcome = bed.accept_message(large(offset + 1, 200_000)).await;
    assert!(matches!(outcome, AcceptOutcome::Accepted { evicted: 1.., .. }), "{outcome:?}");
    assert_eq!(bed.page(&user, 0).await.entries.len(), 1);
}

/// Five minutes of Redis's time at a step, an hour in all: users come and go on three nodes, one of which is
/// killed now and then with whoever is on it. Then nobody comes any more.
#[tokio::test]
async fn growth_ten_thousand_users_of_an_hour_leave_nothing_behind() {
    const USERS: usize = 10_000;
    const STEPS: usize = 12;
    const STEP_MS: u64 = 5 * 60_000;
    let bed = Bed::own(|config| {
        config.shards = 32;
        config.ttl_seconds = 15 * 60;
        config.entries_max = 20;
        config.retry_base_ms = 2_000;
    })
    .await;
    bed.connect(&bed.user("first"), "phone", 1).await; // all scripts are loaded
    bed.fill(&bed.user("first"), 1..=1).await;
    bed.ack(&bed.user("first"), "phone", 1, 1).await;
    let mut town = Town::new(&bed);
    let before = memory(&bed).await;
    let mut most = 0;
    for step in 0..STEPS {
        town.come(USERS / STEPS).await;
        town.send(600).await;
        town.acknowledge(400).await;
        town.go(USERS / STEPS / 2).await;
        if step % 3 == 2 {
            town.kill(step / 3 % 3);
        }
        town.retry().await;
        bed.grow_old(STEP_MS).await;
        most = most.max(memory(&bed).await);
        if step % 5 == 4 {
            town.heads_are_small().await;
        }
    }
    for _ in 0..7 {
        bed.grow_old(STEP_MS).await;
        town.retry().await;
    }
    for kind in ["h", "q", "r", "t"] {
        assert_eq!(bed.keys(kind).await, Vec::<String>::new(), "{kind}");
    }
    let after = memory(&bed).await;
    println!("redis: {before} bytes before, {most} at most, {after} after");
    assert!(
        most > before + (1 << 20),
        "too little happened: {before} bytes before, {most} at most"
    );
    assert!(after < before + (1 << 20), "{before} bytes before, {after} after");
    let keys: Vec<String> = bed.query(&["KEYS", "*"]).await;
    assert!(keys.iter().all(|key| key.ends_with(":o") || key == "barid:meta"), "{keys:?}");
}

async fn memory(bed: &Bed) -> u64 {
    let info: String = bed.query(&["INFO", "memory"]).await;
    let line = info.lines().find_map(|line| line.strip_prefix("used_memory:"));
    line.unwrap().trim().parse().unwrap()
}

/// Users of a shard-blind producer, their sessions, and the three nodes on which those are.
struct Town<'a> {
    bed: &'a Bed,
    random: StdRng,
    born: usize,
    online: Vec<ConnectRequest>,
    offset: i64,
}

impl<'a> Town<'a> {
    fn new(bed: &'a Bed) -> Self {
        Self { bed, random: StdRng::seed_from_u64(7), born: 0, online: Vec::new(), offset: 1 }
    }

    /// New users connect, some of them with a second device, and some who were here before.
    async fn come(&mut self, count: usize) {
        let mut requests = Vec::new();
        for n in 0..count {
            let who = if n % 5 == 0 { self.random.random_range(0..=self.born) } else { self.born };
            self.born = self.born.max(who + 1);
            for device in ["phone", "tablet"].into_iter().take(1 + usize::from(n % 4 == 0)) {
                let user = self.bed.user(&format!("user-{who}"));
                let mut request = hello(&user, device, 1_000 + self.offset as u64);
                self.offset += 1;
                let node = format!("node-{}", self.random.random_range(0..3));
                request.session.node = NodeId::new(&node).unwrap();
                requests.push(request);
            }
        }
        let calls = requests.iter().map(|request| self.bed.mailbox.connect(request.clone()));
        let outcomes = futures::future::join_all(calls).await;
        for (request, outcome) in requests.into_iter().zip(outcomes) {
            // One that came twice at once may be refused.
            if matches!(outcome.unwrap(), ConnectOutcome::Connected { .. }) {
                self.online.push(request);
            }
        }
    }

    /// Messages for anybody who was ever here; a third of them replace an older one.
    async fn send(&mut self, count: usize) {
        let mut groups: BTreeMap<Shard, Vec<AcceptMessage>> = BTreeMap::new();
        for _ in 0..count {
            self.offset += 1;
            let user = self.bed.user(&format!("user-{}", self.random.random_range(0..self.born)));
            let mut message = message(&user, self.offset, &format!("m{}", self.offset));
            if self.offset % 3 == 0 {
                let key = self.random.random_range(0..1_000);
                message.collapse_key = Some(format!("key-{key}").into());
            }
            groups.entry(self.bed.shard(&user)).or_default().push(message);
        }
        for messages in groups.into_values() {
            let GroupOutcome::Done(done) = self.bed.accept_group(messages, None).await else {
                panic!("a gap")
            };
            assert!(done.iter().all(|one| matches!(one, AcceptOutcome::Accepted { .. })));
        }
    }

    /// Some who are online acknowledge all that they have.
    async fn acknowledge(&mut self, count: usize) {
        let count = count.min(self.online.len());
        let from = self.random.random_range(0..=self.online.len() - count);
        let calls = self.online[from..from + count].iter().map(|request| async {
            let page = self.bed.page(&request.user, 0).await;
            let Some(last) = page.entries.last() else { return };
            let header = Header::parse(last).unwrap();
            let ack = AckRequest {
                user: request.user.clone(),
                device: request.device.clone(),
                session: request.session.clone(),
                epoch: header.epoch,
                generation: Generation(0),
                seq: header.seq,
                chain: header.chain,
            };
            self.bed.mailbox.ack(ack).await.unwrap();
        });
        futures::future::join_all(calls).await;
    }

    async fn go(&mut self, count: usize) {
        let mut gone = Vec::new();
        for _ in 0..count.min(self.online.len()) {
            let at = self.random.random_range(0..self.online.len());
            let ConnectRequest { user, device, session, .. } = self.online.swap_remove(at);
            let request = DisconnectRequest { user, device, session };
            gone.push(self.bed.mailbox.disconnect(request));
        }
        for left in futures::future::join_all(gone).await {
            left.unwrap();
        }
    }

    /// A node is gone, and nobody says so.
    fn kill(&mut self, node: usize) {
        let name = format!("node-{node}");
        self.online.retain(|request| request.session.node.as_str() != name);
    }

    /// The delayer finds nobody.
    async fn retry(&mut self) {
        let retry = self.bed.config.retry().unwrap();
        let shards: Vec<_> = self.bed.mailbox.shards().all().collect();
        let due = self.bed.mailbox.fire(&shards, 10_000, &retry).await.unwrap();
        for due in due {
            self.bed.defer(&due, Unreached::Void).await;
        }
    }

    async fn heads_are_small(&self) {
        for head in self.bed.keys("h").await.iter().step_by(20) {
            let fields: u64 = self.bed.query(&["HLEN", head]).await;
            // State, ids, two devices; collapse keys of what is kept and of 64 more.
            assert!(fields <= 10 + 4 + 20 + 64, "{fields} fields in {head}");
        }
    }
}
