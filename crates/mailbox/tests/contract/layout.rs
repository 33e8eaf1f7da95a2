//! Layout 3: what a newer version adds is preserved, or prevents writes by this version; heads stay in Redis's compact
//! encoding; no number wraps.

use barid_core::{AppId, Attempt, Chain, Epoch, Generation, Incarnation, Position, Seq, UserId};
use barid_mailbox::{
    AcceptOutcome, AckOutcome, ConfirmOutcome, ConnectOutcome, ConnectRequest, DisconnectRequest,
    DueDevice, DueUser, Error, GroupOutcome, Mailbox, ReadRequest, Unreached, UserKey,
};
use bytes::Bytes;

use crate::support::{
    Bed, ack, config, confirmation, connected, contract, hello, message, session,
};

contract!(
    hazard_36_what_a_newer_version_adds_is_kept_by_every_script,
    hazard_36_a_mailbox_that_a_newer_version_marked_as_critical_is_left_alone,
    hazard_36_a_group_with_a_critical_mailbox_waits_as_a_whole,
    hazard_36_a_route_with_more_behind_the_platform_is_read_and_kept,
    hazard_36_numbers_at_their_bounds_do_not_wrap,
    hazard_36_a_mailbox_without_a_seq_left_refuses_and_keeps_what_it_has,
);

/// Where a flag byte is, and what is behind: the state, or the record of a device.
const RECORDS: [&str; 2] = ["s", "d:phone"];

impl Bed {
    /// As a newer version of layout 3 writes it: other flags, and more behind.
    async fn newer(&self, user: &UserKey, field: &str, mark: [u8; 2], tail: &str) {
        let script = "local text = redis.call('HGET', KEYS[1], ARGV[1])
            redis.call('HSET', KEYS[1], ARGV[1],
              string.char(ARGV[2], ARGV[3]) .. string.sub(text, 3) .. ARGV[4])
            return 'OK'";
        let [version, flags] = mark.map(|byte| byte.to_string());
        let head = self.key("h", user);
        let () = self.query(&["EVAL", script, "1", &head, field, &version, &flags, tail]).await;
    }

    /// Flags and tail.
    async fn added(&self, user: &UserKey, field: &str) -> (u8, String) {
        let script = "return string.byte(redis.call('HGET', KEYS[1], ARGV[1]), 2)";
        let flags: u8 = self.query(&["EVAL", script, "1", &self.key("h", user), field]).await;
        let script = "return string.sub(redis.call('HGET', KEYS[1], ARGV[1]), ARGV[2] + 1)";
        let bytes = if field == "s" { "56" } else { "37" };
        let head = self.key("h", user);
        (flags, self.query(&["EVAL", script, "1", &head, field, bytes]).await)
    }

    /// All that Redis holds of a user and of its shard, but for the timers.
    async fn all_of(&self, user: &UserKey) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for kind in ["h", "q", "r", "o"] {
            let dump: Option<Vec<u8>> = self.query(&["DUMP", &self.key(kind, user)]).await;
            all.push(dump.unwrap_or_default());
        }
        all
    }
}

async fn hazard_36_what_a_newer_version_adds_is_kept_by_every_script(bed: Bed) {
    // A longer tail, a flag that may be ignored, and both; of the state, of a device, and of both.
    let additions = [(0, "more"), (6, ""), (14, "even more")];
    for (n, (flags, tail)) in additions.into_iter().enumerate() {
        for (m, fields) in [&RECORDS[..1], &RECORDS[1..], &RECORDS[..]].into_iter().enumerate() {
            let user = bed.timed_user(&format!("alice-{n}-{m}"));
            bed.connect(&user, "phone", 1).await;
            let before = 100 * (3 * n + m) as i64;
            bed.fill(&user, before + 1..=before + 2).await;
            for field in fields {
                bed.newer(&user, field, [3, flags], tail).await;
            }
            every_script(&bed, &user, before, async |script| {
                for field in fields {
                    let added = bed.added(&user, field).await;
                    assert_eq!(added, (flags, tail.to_owned()), "{field} after {script}");
                }
            })
            .await;
        }
    }
}

/// Calls each script so that it changes the head and the phone; `look` looks after each.
async fn every_script(bed: &Bed, user: &UserKey, before: i64, look: impl AsyncFn(&str)) {
    bed.ack(user, "phone", 1, 1).await;
    look("ack of some").await;
    bed.make_due(user).await;
    let due = bed.fire(user).await.expect("it is behind");
    look("fire").await;
    bed.defer(&due, Unreached::Down).await;
    look("defer").await;
    assert!(matches!(bed.ack(user, "phone", 1, 2).await, AckOutcome::Advanced { .. }));
    look("ack of all").await;
    bed.fill(user, before + 3..=before + 3).await;
    look("accept of one, which arms").await;
    bed.fill(user, before + 4..=before + 4).await;
    look("accept of one").await;
    let batch = (before + 5..=before + 20).map(|at| message(user, at, &format!("m{at}")));
    bed.accept_group(batch.collect(), None).await;
    look("accept of many").await;
    let position = bed.position(user, 1).await;
    let forked = Position { chain: Some(Chain(99)), ..bed.position(user, 7).await };
    assert!(matches!(bed.ack_at(user, "phone", 1, forked).await, AckOutcome::Reset { .. }));
    look("ack of a fork").await;
    let confirmed = bed.confirm(confirmation(user, "phone", 1, position)).await;
    assert!(matches!(confirmed, ConfirmOutcome::Confirmed { restored: false, .. }));
    look("confirm").await;
    assert_eq!(bed.page(user, 2).await.entries.len(), 18);
    look("read").await;
    bed.connect(user, "tablet", 2).await;
    look("connect of another").await;
    bed.connect(user, "phone", 3).await;
    look("connect").await;
    bed.disconnect(user, "phone", 3).await;
    look("disconnect").await;
}

async fn hazard_36_a_mailbox_that_a_newer_version_marked_as_critical_is_left_alone(bed: Bed) {
    let marks = [[3, 16], [3, 128], [3, 17], [4, 0]];
    for (n, mark) in marks.into_iter().enumerate() {
        for (m, field) in RECORDS.into_iter().enumerate() {
            let user = bed.timed_user(&format!("alice-{n}-{m}"));
            bed.connect(&user, "phone", 1).await;
            let before = 100 * (2 * n + m) as i64;
            bed.fill(&user, before + 1..=before + 2).await;
            let (all, first) = (bed.position(&user, 2).await, bed.position(&user, 1).await);
            bed.make_due(&user).await;
            bed.newer(&user, field, mark, "").await;
            let held = bed.all_of(&user).await;
            let newer = |answer: Option<Error>, script: &str| {
                assert!(matches!(answer, Some(Error::Newer(_))), "{script}: {answer:?}");
            };
            let mailbox = &bed.mailbox;
            for at in [first, all] {
                newer(mailbox.ack(ack(&user, "phone", 1, at)).await.err(), "ack");
            }
            newer(mailbox.connect(hello(&user, "phone", 2)).await.err(), "connect");
            newer(mailbox.confirm(confirmation(&user, "phone", 1, first)).await.err(), "confirm");
            for messages in [1, 3] {
                let batch = (before + 10..before + 10 + messages)
                    .map(|at| message(&user, at, &format!("m{at}")));
                let group = bed.group(batch.collect(), None);
                newer(mailbox.accept(&[group]).await.remove(0).err(), "accept");
            }
            let device = hello(&user, "phone", 1).device;
            let request = DisconnectRequest {
                user: user.clone(),
                device: device.clone(),
                session: session(1),
            };
            newer(mailbox.disconnect(request).await.err(), "disconnect");
            if field == "s" {
                let request = ReadRequest {
                    user: user.clone(),
                    after: Seq(0),
                    entries_max: 10,
                    bytes_max: 1_000,
                    device: None,
                };
                newer(mailbox.read(request).await.err(), "read");
            }
            assert_eq!(bed.fire(&user).await, None, "fire");
            let later = bed.timer(&user).await.expect("its time is remembered");
            let now = bed.mailbox.redis_now_ms(bed.shard(&user)).unwrap();
            assert!(later > now + 30_000, "it must not stand in the way of those who are due");
            let device =
                DueDevice { device, session: session(1), resends: 1, sampled: Bytes::new() };
            let due = DueUser {
                user: user.clone(),
                claimed_score: later,
                late_ms: 0,
                put_off: 0,
                devices: vec![device],
            };
            bed.defer(&due, Unreached::Down).await;
            assert_eq!(bed.timer(&user).await, Some(later), "defer");
            assert_eq!(bed.all_of(&user).await, held, "{field} {mark:?}");
        }
    }
}

async fn hazard_36_a_group_with_a_critical_mailbox_waits_as_a_whole(bed: Bed) {
    let plain = bed.user("plain");
    let mut names = (0..).map(|n| bed.user(&format!("marked-{n}")));
    let marked = names.find(|user| bed.shard(user) == bed.shard(&plain)).unwrap();
    bed.fill(&plain, 1..=1).await;
    bed.fill(&marked, 2..=2).await;
    bed.newer(&marked, "s", [3, 32], "").await;
    let group = bed.group(
        vec![message(&plain, 3, "a"), message(&marked, 4, "b"), message(&plain, 5, "c")],
        None,
    );
    let before = (bed.all_of(&plain).await, bed.all_of(&marked).await);
    for _ in 0..2 {
        let answer = bed.mailbox.accept(std::slice::from_ref(&group)).await.remove(0);
        assert!(matches!(answer, Err(Error::Newer(_))), "{answer:?}");
        assert_eq!((bed.all_of(&plain).await, bed.all_of(&marked).await), before);
    }
    // The newer version is here, or has taken it back: nothing was taken for accepted.
    bed.newer(&marked, "s", [3, 0], "").await;
    let GroupOutcome::Done(outcomes) = bed.mailbox.accept(&[group]).await.remove(0).unwrap() else {
        panic!("a gap")
    };
    let accepted = |outcome: &AcceptOutcome| matches!(outcome, AcceptOutcome::Accepted { .. });
    assert!(outcomes.iter().all(accepted), "{outcomes:?}");
}

async fn hazard_36_a_route_with_more_behind_the_platform_is_read_and_kept(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    let routes = bed.key("r", &user);
    let () = bed.query(&["HSET", &routes, "phone", "node-1 1 1 1 ios riyadh blue"]).await;
    let read = bed.mailbox.read_routes(&user).await.unwrap();
    assert_eq!((&*read[0].platform, &read[0].session), ("ios", &session(1)));
    bed.make_due(&user).await;
    assert_eq!(bed.fire(&user).await.unwrap().devices[0].session, session(1));
    let mut request = confirmation(&user, "phone", 1, bed.position(&user, 0).await);
    request.platform = "ios".into();
    request.session.incarnation = Incarnation(2);
    bed.confirm(request.clone()).await;
    let text: String = bed.query(&["HGET", &routes, "phone"]).await;
    assert_eq!(text, "node-1 2 1 1 ios riyadh blue");
    let gone =
        DisconnectRequest { user: user.clone(), device: request.device, session: request.session };
    bed.mailbox.disconnect(gone).await.unwrap();
    assert!(bed.mailbox.read_routes(&user).await.unwrap().is_empty());
}

#[tokio::test]
async fn hazard_36_a_head_stays_packed() {
    // One routed device; bytes that a head takes after so many messages, with a key of 12 bytes.
    let table = [(1, 216), (7, 248), (9, 312), (20, 440), (40, 696), (100, 824)];
    let bed = Bed::own(|_| {}).await;
    let app = AppId::new("a").unwrap();
    let users = (0..10).map(|n| UserId::new(&format!("u{n}")).unwrap());
    let user = users.map(|user| UserKey { app: app.clone(), user });
    let user = user.clone().find(|user| bed.shard(user).get() < 10).unwrap();
    bed.connect(&user, "phone", 1).await;
    let mut taken = Vec::new();
    for offset in 1..=100 {
        bed.fill(&user, offset..=offset).await;
        if let Some((_, most)) = table.iter().find(|(messages, _)| *messages == offset) {
            let bytes: u64 = bed.query(&["MEMORY", "USAGE", &bed.key("h", &user)]).await;
            taken.push((offset, bytes, *most));
        }
    }
    assert!(taken.iter().all(|(_, bytes, most)| bytes <= most), "{taken:?}");
    // As many devices as it may know, with names as long as UUIDs.
    for n in 2..=16 {
        bed.connect(&user, &format!("123e4567-e89b-12d3-a456-{n:012}"), n).await;
    }
    bed.ack(&user, "phone", 1, 50).await;
    let encoding: String = bed.query(&["OBJECT", "ENCODING", &bed.key("h", &user)]).await;
    assert_eq!(encoding, "listpack");
}

async fn hazard_36_numbers_at_their_bounds_do_not_wrap(bed: Bed) {
    const NUMBERS: [u64; 12] = [
        0,
        1,
        (1 << 31) - 1,
        (1 << 32) - 1,
        1 << 32,
        (1 << 48) - 1,
        1 << 48,
        (1 << 53) - 1,
        1 << 53,
        1 << 56,
        1 << 63,
        u64::MAX,
    ];
    for (n, number) in NUMBERS.into_iter().enumerate() {
        let user = bed.user(&format!("alice-{n}"));
        let before = 10 * n as i64;
        bed.fill(&user, before + 1..=before + 3).await;
        // An attempt fences all below it, also when its session is over.
        let request = ConnectRequest { attempt: Attempt(number), ..hello(&user, "phone", 7) };
        connected(bed.hello(request.clone()).await);
        bed.disconnect(&user, "phone", 7).await;
        let again = bed.hello(request.clone()).await;
        assert!(matches!(again, ConnectOutcome::Connected { .. }), "{number}: {again:?}");
        bed.disconnect(&user, "phone", 7).await;
        for lower in NUMBERS.into_iter().filter(|lower| *lower < number.min(1 << 53)) {
            let request = ConnectRequest { attempt: Attempt(lower), ..request.clone() };
            let late = bed.hello(request).await;
            let by = Attempt(number.min(1 << 53));
            assert_eq!(late, ConnectOutcome::Superseded { by }, "{lower} after {number}");
        }
        // A generation that a device names leaves room for resets that it can still acknowledge under.
        let generation = u32::try_from(number).unwrap_or(u32::MAX);
        let mut at = Position {
            generation: Generation(generation),
            chain: Some(Chain(99)),
            ..bed.position(&user, 2).await
        };
        for resets in 1..=3 {
            let request = ConnectRequest {
                position: Some(at),
                ..ConnectRequest { attempt: Attempt(u64::MAX), ..request.clone() }
            };
            let connected = connected(bed.hello(request).await);
            let expected = u64::from(generation.min((1 << 30) - 1)) + resets;
            assert_eq!(u64::from(connected.cursor.generation.0), expected, "after {number}");
            at.generation = connected.cursor.generation;
        }
        // Positions that are nowhere move nothing.
        let cursor = bed.state(&user, "phone").await.unwrap().cursor;
        for (epoch, seq) in [(cursor.epoch.0, number), (number, 2)] {
            let at = Position { epoch: Epoch(epoch), seq: Seq(seq), ..cursor };
            if (1..=3).contains(&seq) && epoch == cursor.epoch.0 {
                continue;
            }
            bed.ack_at(&user, "tablet", 8, at).await;
            bed.confirm(confirmation(&user, "watch", 9, at)).await;
            let request = ConnectRequest { position: Some(at), ..hello(&user, "watch", 10) };
            let cursor = connected(bed.hello(request).await).cursor;
            assert!(cursor.seq.0 <= 3 && cursor.epoch.0 < 1 << 53, "{cursor:?}");
            let page = bed.page(&user, number).await;
            assert_eq!((page.newest, page.oldest), (Seq(3), Seq(1)));
        }
    }
}

async fn hazard_36_a_mailbox_without_a_seq_left_refuses_and_keeps_what_it_has(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    bed.ack(&user, "phone", 1, 1).await;
    // b, n at 19 + 1, and the phone's cursor at the last but one.
    let last = (1_u64 << 48) - 1;
    let script = "local s, d = unpack(redis.call('HMGET', KEYS[1], 's', 'd:phone'))
        local n = struct.pack('<I6', ARGV[1] - 1)
        redis.call('HSET', KEYS[1], 's', string.sub(s, 1, 9) .. struct.pack('<I6', ARGV[1])
          .. string.sub(s, 16, 19) .. n .. string.sub(s, 26),
          'd:phone', string.sub(d, 1, 2) .. n .. string.sub(d, 9))
        return 'OK'";
    let () = bed.query(&["EVAL", script, "1", &bed.key("h", &user), &last.to_string()]).await;
    let outcome = bed.accept(&user, 2, "the last").await;
    assert!(matches!(outcome, AcceptOutcome::Accepted { seq, .. } if seq.0 == last), "{outcome:?}");
    for (offset, messages) in [(3, 1), (10, 2)] {
        let batch = (0..messages).map(|n| message(&user, offset + n, &format!("{offset} {n}")));
        let GroupOutcome::Done(outcomes) = bed.accept_group(batch.collect(), None).await else {
            panic!("a gap")
        };
        assert!(matches!(&outcomes[0], AcceptOutcome::Failed(why) if why.contains("seq")));
    }
    let page = bed.page(&user, last - 1).await;
    assert_eq!((page.newest.0, page.entries.len()), (last, 1));
    let at = bed.headers(&user, last - 1).await[0];
    let at =
        Position { epoch: at.epoch, generation: Generation(0), seq: at.seq, chain: Some(at.chain) };
    assert_eq!(bed.ack_at(&user, "phone", 1, at).await, AckOutcome::Advanced { cursor: Seq(last) });
    assert_eq!(bed.state(&user, "phone").await.unwrap().cursor.seq, Seq(last));
}

async fn refusal(bed: &Bed) -> String {
    let opened = Mailbox::open(&bed.config, &prometheus::Registry::new()).await;
    opened.err().expect("refused").to_string()
}

#[tokio::test]
async fn hazard_36_a_process_of_another_layout_that_is_leased_is_named_and_nothing_is_recorded() {
    let bed = Bed::own(|_| {}).await;
    // Redis was emptied under processes of layout 2, which do not say what they are.
    let () = bed.query(&["FLUSHALL"]).await;
    let () =
        bed.query(&["ZADD", "barid:nodes", "9999999999999", "old", "9999999999999", "gone"]).await;
    let lease = ["HSET", "barid:node:old", "role", "access", "address", "10.0.0.1:7081"];
    let () = bed.query(&lease).await;
    let why = refusal(&bed).await;
    for word in ["access old", "10.0.0.1:7081", "layout 2", "layout 3"] {
        assert!(why.contains(word), "{why}");
    }
    let recorded: u64 = bed.query(&["EXISTS", "barid:meta"]).await;
    assert_eq!(recorded, 0, "or the others would be refused at their next reconnect");
    let () = bed.query(&["DEL", "barid:node:old"]).await;
    Mailbox::open(&bed.config, &prometheus::Registry::new()).await.unwrap();
    let schema: String = bed.query(&["HGET", "barid:meta", "schema"]).await;
    assert_eq!(schema, "3");
    let () = bed.query(&["HSET", "barid:meta", "schema", "2"]).await;
    assert!(refusal(&bed).await.contains("layout 2"));
}

#[tokio::test]
async fn hazard_36_an_older_layout_on_one_master_of_several_is_refused() {
    let bed = Bed::own_cluster(|_| {}).await;
    let () = bed.query(&["DEL", "barid:meta"]).await;
    let () = bed.query(&["ZADD", "barid:nodes", "9999999999999", "old"]).await;
    let lease = ["HSET", "barid:node:old", "role", "access", "address", "10.0.0.1:7081"];
    let () = bed.query(&lease).await;
    assert!(refusal(&bed).await.contains("10.0.0.1:7081"));
    let () = bed.query(&["HSET", "barid:node:old", "layout", "3"]).await;
    Mailbox::open(&bed.config, &prometheus::Registry::new()).await.unwrap();
    let schema: String = bed.query(&["HGET", "barid:meta", "schema"]).await;
    assert_eq!(schema, "3");
}

#[test]
fn hazard_39_what_the_scripts_could_not_hold_is_refused_at_start() {
    let good = config("redis://127.0.0.1:1");
    type Change = fn(&mut barid_mailbox::RedisConfig);
    let wrong: [(&str, Change); 7] = [
        ("redis.ttl_seconds", |config| config.ttl_seconds = 0),
        ("redis.ttl_seconds", |config| config.ttl_seconds = 10 * 366 * 24 * 3600 + 1),
        ("redis.ttl_seconds", |config| config.ttl_seconds = u64::MAX),
        ("redis.devices_max", |config| config.devices_max = 65),
        ("redis.devices_max", |config| config.devices_max = u32::MAX),
        ("redis.mailbox_bytes_max", |config| config.mailbox_bytes_max = 65_535),
        ("redis.mailbox_bytes_max", |config| config.mailbox_bytes_max = u64::MAX),
    ];
    for (key, change) in wrong {
        let mut config = good.clone();
        change(&mut config);
        let why = config.check().unwrap_err();
        assert!(why.starts_with(key), "{why}");
    }
    assert_eq!(good.check(), Ok(()));
}
