//! Two purgers at once, connect concurrent with accept, and a Redis that loses data.

use std::time::Duration;

use barid_core::{Generation, Position, Seq};
use barid_mailbox::{
    AcceptGroup, AcceptOutcome, AckOutcome, ConfirmOutcome, DeviceState, GroupOutcome, Lease,
    LeaseEvent, LogPosition, NodeRole, UserKey,
};
use barid_wire::envelope;

use crate::leases::{next, record};
use crate::support::{Bed, at, confirmation, connected, contract, hello, message, open};

contract!(
    two_purgers_accept_the_same_record_once,
    two_purgers_at_once_keep_one_order,
    a_message_beside_a_connect_is_pushed_or_read,
    a_redis_that_lost_everything_says_so_and_takes_all_again,
    hazard_03_a_redis_that_went_back_by_ten_writes_and_moved_on_shows_what_took_their_place,
    hazard_48_a_shard_is_raised_to_what_it_must_know_and_never_lowered,
    hazard_14_what_a_replaced_session_still_sends_changes_nothing_of_the_newer_one,
);

fn accepted(outcome: &GroupOutcome) -> usize {
    let GroupOutcome::Done(outcomes) = outcome else { panic!("{outcome:?}") };
    outcomes.iter().filter(|outcome| matches!(outcome, AcceptOutcome::Accepted { .. })).count()
}

async fn two_purgers_accept_the_same_record_once(bed: Bed) {
    let user = bed.user("alice");
    let records = |offsets: std::ops::RangeInclusive<i64>| {
        offsets.map(|offset| message(&user, offset, &format!("m{offset}"))).collect::<Vec<_>>()
    };
    assert_eq!(accepted(&bed.accept_group(records(1..=3), None).await), 3);
    // The partition moved; the second begins at the commit, the first does not know yet.
    assert_eq!(accepted(&bed.accept_group(records(2..=5), None).await), 2);
    assert_eq!(accepted(&bed.accept_group(records(4..=6), Some(at(3))).await), 1);
    assert_eq!(accepted(&bed.accept_group(records(6..=7), Some(at(5))).await), 1);
    assert_eq!(ids(&bed, &user).await, ["m1", "m2", "m3", "m4", "m5", "m6", "m7"]);
}

async fn hazard_48_a_shard_is_raised_to_what_it_must_know_and_never_lowered(bed: Bed) {
    let user = bed.user("alice");
    let ask = async |prev: Option<i64>, raise: Option<i64>| {
        let (shard, source) = (bed.shard(&user), bed.source());
        let (prev, raise) = (prev.map(at), raise.map(at));
        let group = AcceptGroup { shard, source, prev, raise, messages: Vec::new() };
        bed.mailbox.accept(&[group]).await.pop().unwrap().unwrap()
    };
    let (done, forgot) = (GroupOutcome::Done(Vec::new()), |known| GroupOutcome::Gap(known));
    // The log no longer has 1 to 49, which somebody once confirmed.
    let newest = || vec![message(&user, 61, "m")];
    assert_eq!(bed.accept_group(newest(), Some(at(49))).await, forgot(None));
    assert_eq!(ask(None, Some(49)).await, done);
    assert_eq!(accepted(&bed.accept_group(newest(), Some(at(49))).await), 1);
    assert_eq!(ask(Some(49), Some(55)).await, done);
    assert_eq!(ask(Some(61), None).await, done, "it was not lowered");
    // A shard that has forgotten more since is not raised over what it has forgotten.
    assert_eq!(ask(Some(70), Some(80)).await, forgot(Some(at(61))));
    assert_eq!(ask(Some(62), None).await, forgot(Some(at(61))));
}

async fn two_purgers_at_once_keep_one_order(bed: Bed) {
    let user = bed.user("alice");
    let other = open(&bed.config).await;
    let mut prev = None;
    for offset in 1..=20 {
        let group = [bed.group(vec![message(&user, offset, &format!("m{offset}"))], prev)];
        let (one, two) =
            futures::future::join(bed.mailbox.accept(&group), other.accept(&group)).await;
        let once = accepted(one[0].as_ref().unwrap()) + accepted(two[0].as_ref().unwrap());
        assert_eq!(once, 1);
        prev = Some(at(offset));
    }
    let expected: Vec<_> = (1..=20).map(|offset| format!("m{offset}")).collect();
    assert_eq!(ids(&bed, &user).await, expected);
}

async fn a_message_beside_a_connect_is_pushed_or_read(bed: Bed) {
    let other = open(&bed.config).await;
    // One before the other, the other before the one, and at once.
    for round in 0..30_u64 {
        let user = bed.user(&format!("user{round}"));
        let group = [bed.group(vec![message(&user, round as i64, "m")], None)];
        let accept = other.accept(&group);
        let connect = bed.mailbox.connect(hello(&user, "phone", 1));
        let (outcomes, connect) = match round % 3 {
            0 => {
                let outcomes = accept.await;
                (outcomes, connect.await)
            }
            1 => {
                let connect = connect.await;
                (accept.await, connect)
            }
            _ => futures::future::join(accept, connect).await,
        };
        let connected = connected(connect.unwrap());
        let GroupOutcome::Done(done) = outcomes[0].as_ref().unwrap() else { panic!("a gap") };
        let AcceptOutcome::Accepted { online, .. } = done[0] else { panic!("{done:?}") };
        assert_eq!(online, connected.newest == Seq(0), "round {round}: {connected:?}");
        match round % 3 {
            0 => assert!(!online),
            1 => assert!(online),
            _ => (),
        }
        assert!(bed.timer(&user).await.is_some(), "armed by whichever came second");
    }
}

async fn a_redis_that_lost_everything_says_so_and_takes_all_again(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=5).await;
    bed.ack(&user, "phone", 1, 3).await;
    let place = bed.position(&user, 5).await;
    forget(&bed, &user).await;
    // The purger's next batch finds out, and it begins again from what Kafka holds.
    let next = vec![message(&user, 6, "m6")];
    assert_eq!(bed.accept_group(next, Some(at(5))).await, GroupOutcome::Gap(None));
    bed.fill(&user, 1..=6).await;
    // The session that lives on is told that its mailbox is another, and is reset by its next ack.
    let ConfirmOutcome::Confirmed { restored, epoch, .. } =
        bed.confirm(confirmation(&user, "phone", 1, place)).await
    else {
        panic!()
    };
    assert!(restored && epoch != place.epoch);
    let AckOutcome::Reset { cursor } = bed.ack_at(&user, "phone", 1, place).await else { panic!() };
    assert_eq!((cursor.seq, cursor.epoch), (Seq(0), epoch));
    assert_eq!(ids(&bed, &user).await, ["m1", "m2", "m3", "m4", "m5", "m6"]);
    assert!(bed.timer(&user).await.is_some());
}

async fn hazard_03_a_redis_that_went_back_by_ten_writes_and_moved_on_shows_what_took_their_place(
    bed: Bed,
) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.connect(&user, "tablet", 2).await;
    bed.fill(&user, 1..=5).await;
    bed.ack(&user, "phone", 1, 5).await;
    keep(&bed, &user).await;
    bed.fill(&user, 6..=10).await;
    for seq in 6..=10 {
        bed.ack(&user, "phone", 1, seq).await;
    }
    let before: Position = bed.position(&user, 10).await;
    go_back(&bed, &user, at(5)).await;
    let next = vec![message(&user, 11, "m11")];
    let gap = bed.accept_group(next, Some(at(10))).await;
    assert_eq!(gap, GroupOutcome::Gap(Some(at(5))));
    // Another partition is faster than the one that has to be read again.
    for n in 0..5 {
        let mut other = bed.group(vec![message(&user, n, &format!("other{n}"))], None);
        other.source.partition += 1;
        assert_eq!(accepted(bed.mailbox.accept(&[other]).await[0].as_ref().unwrap()), 1);
    }
    bed.fill(&user, 6..=11).await;
    // The phone's acknowledged position is not in this history: nothing is trimmed for it.
    let AckOutcome::Reset { cursor } = bed.ack_at(&user, "phone", 1, before).await else {
        panic!()
    };
    assert_eq!(cursor.seq, Seq(0), "the oldest that the tablet needs");
    let connected = bed.resume(&user, "phone", 3, before).await;
    assert!(connected.reset && connected.cursor.seq == Seq(0), "{connected:?}");
    let all = ids(&bed, &user).await;
    assert_eq!(all.len(), 16);
    assert_eq!(all[5..7], ["other0", "other1"]);
    assert_eq!(all[10..12], ["m6", "m7"]);
}

async fn hazard_14_what_a_replaced_session_still_sends_changes_nothing_of_the_newer_one(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=2).await;
    bed.connect(&user, "phone", 2).await;
    let armed = bed.timer(&user).await;
    bed.disconnect(&user, "phone", 1).await;
    assert_eq!(bed.mailbox.read_routes(&user).await.unwrap()[0].session.connection.0, 2);
    assert_eq!(bed.timer(&user).await, armed);
    let place = bed.position(&user, 0).await;
    let late = bed.confirm(confirmation(&user, "phone", 1, place)).await;
    assert_eq!(late, ConfirmOutcome::Superseded);
}

/// A Redis of one's own: what is lost there makes mailboxes of its shards keep all.
async fn keeping(seconds: u64) -> Bed {
    Bed::own(|config| {
        config.shards = 1;
        config.keep_after_loss_seconds = seconds;
    })
    .await
}

/// A node's lease as its copy stands beside a shard: without any, a shard counts as one that lost everything.
async fn hold_lease(bed: &Bed, user: &UserKey) {
    let () = bed.query(&["HSET", &bed.key("n", user), "node-1", "1 1 0 H "]).await;
}

/// Two devices had three messages when Redis lost everything, and a purger took those and a fourth again.
/// Returns where both stood.
async fn lost_behind_two_devices(bed: &Bed, user: &UserKey) -> Position {
    bed.connect(user, "phone", 1).await;
    bed.connect(user, "tablet", 2).await;
    bed.fill(user, 1..=3).await;
    bed.ack(user, "phone", 1, 2).await;
    bed.ack(user, "tablet", 2, 2).await;
    let place = bed.position(user, 2).await;
    forget(bed, user).await;
    let next = vec![message(user, 4, "m4")];
    assert_eq!(bed.accept_group(next, Some(at(3))).await, GroupOutcome::Gap(None));
    bed.fill(user, 1..=4).await;
    place
}

/// The phone's session is confirmed and has everything.
async fn phone_has_all(bed: &Bed, user: &UserKey, place: Position) {
    bed.confirm(confirmation(user, "phone", 1, place)).await;
    let AckOutcome::Reset { cursor } = bed.ack_at(user, "phone", 1, place).await else { panic!() };
    assert_eq!(cursor.seq, Seq(0));
    let newest = Position { generation: cursor.generation, ..bed.position(user, 4).await };
    let acked = bed.ack_at(user, "phone", 1, newest).await;
    assert_eq!(acked, AckOutcome::Advanced { cursor: Seq(4) });
}

#[tokio::test]
async fn hazard_76_what_one_device_acknowledges_behind_a_loss_is_kept_for_the_others() {
    let bed = keeping(600).await;
    let user = bed.user("alice");
    let place = lost_behind_two_devices(&bed, &user).await;
    phone_has_all(&bed, &user, place).await;
    assert_eq!(ids(&bed, &user).await, ["m1", "m2", "m3", "m4"]);
    // The tablet is confirmed later, comes back, or names no position at all.
    bed.confirm(confirmation(&user, "tablet", 2, place)).await;
    let AckOutcome::Reset { cursor } = bed.ack_at(&user, "tablet", 2, place).await else {
        panic!()
    };
    assert_eq!(cursor.seq, Seq(0));
    assert_eq!(bed.resume(&user, "watch", 3, place).await.cursor.seq, Seq(0));
    assert_eq!(bed.connect(&user, "browser", 4).await.cursor.seq, Seq(0));
    assert_eq!(ids(&bed, &user).await.len(), 4);
}

#[tokio::test]
async fn hazard_76_a_source_that_had_nothing_for_a_shard_finds_that_it_is_empty() {
    let bed = keeping(600).await;
    let user = bed.user("alice");
    let drops = async |partition: i32, offset: i64| {
        let mut group =
            bed.group(vec![message(&user, offset, &format!("{partition}-{offset}"))], None);
        group.source.partition = partition;
        assert_eq!(accepted(bed.mailbox.accept(&[group]).await[0].as_ref().unwrap()), 1);
        let newest = bed.position(&user, bed.page(&user, 0).await.newest.0).await;
        let held: Option<DeviceState> = bed.state(&user, "phone").await;
        let generation = held.map_or(Generation(0), |device| device.cursor.generation);
        bed.ack_at(&user, "phone", 1, Position { generation, ..newest }).await;
        ids(&bed, &user).await.is_empty()
    };
    hold_lease(&bed, &user).await;
    bed.connect(&user, "phone", 1).await;
    assert!(drops(1, 1).await, "a shard that is new to a source is not one that lost something");
    let () = bed.query(&["FLUSHALL"]).await;
    bed.connect(&user, "phone", 1).await;
    assert!(!drops(2, 1).await, "nothing is left of the leases");
    // A node renews its lease first, and notes the loss with that.
    let () = bed.query(&["FLUSHALL"]).await;
    let (node, ttl) = (record("node-2", NodeRole::Access), Duration::from_millis(1_500));
    let mut lease = Lease::acquire(&bed.mailbox, node, ttl).await.unwrap();
    bed.connect(&user, "phone", 1).await;
    assert!(drops(3, 1).await, "a lease that begins tells nothing");
    let () = bed.query(&["FLUSHALL"]).await;
    while !matches!(next(&mut lease).await, LeaseEvent::Forgot(_)) {}
    bed.connect(&user, "phone", 1).await;
    assert!(!drops(4, 1).await, "the lease was renewed before");
}

#[tokio::test]
async fn hazard_76_a_mailbox_that_keeps_all_gives_way_when_memory_is_short() {
    let bed = keeping(600).await;
    let user = bed.user("alice");
    let place = lost_behind_two_devices(&bed, &user).await;
    phone_has_all(&bed, &user, place).await;
    assert_eq!(ids(&bed, &user).await.len(), 4);
    let info: String = bed.query(&["INFO", "memory"]).await;
    let used = info.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap();
    let limit = used.trim().parse::<u64>().unwrap() * 3 / 2;
    let () = bed.query(&["CONFIG", "SET", "maxmemory", &limit.to_string()]).await;
    // Also where everything is acknowledged and nobody says a word: by the next message.
    bed.accept(&user, 5, "m5").await;
    assert_eq!(ids(&bed, &user).await, ["m5"]);
    let newest = Position { generation: Generation(1), ..bed.position(&user, 5).await };
    bed.ack_at(&user, "phone", 1, newest).await;
    assert!(ids(&bed, &user).await.is_empty());
    // A device that connects now is told.
    let back = bed.resume(&user, "tablet", 3, place).await;
    assert_eq!((back.cursor.seq, back.newest), (Seq(0), Seq(5)));
}

#[tokio::test]
async fn hazard_76_a_mailbox_keeps_all_behind_a_loss_for_a_time_only() {
    let bed = keeping(600).await;
    let user = bed.user("alice");
    let place = lost_behind_two_devices(&bed, &user).await;
    phone_has_all(&bed, &user, place).await;
    bed.grow_old(599_000).await;
    bed.accept(&user, 5, "m5").await;
    bed.ack_at(
        &user,
        "phone",
        1,
        Position { generation: Generation(1), ..bed.position(&user, 5).await },
    )
    .await;
    assert_eq!(ids(&bed, &user).await.len(), 5);
    // The next call of any kind drops it: an ack, a confirmation, a connect.
    let over = async |then: &str| {
        keep(&bed, &user).await;
        bed.grow_old(2_000).await;
        match then {
            "ack" => {
                bed.accept(&user, 6, "m6").await;
                let newest = Position { generation: Generation(1), ..bed.position(&user, 6).await };
                bed.ack_at(&user, "phone", 1, newest).await;
            }
            "confirm" => {
                bed.confirm(confirmation(&user, "phone", 1, bed.position(&user, 5).await)).await;
            }
            _ => drop(bed.connect(&user, "phone", 7).await),
        }
        assert_eq!(ids(&bed, &user).await, Vec::<String>::new(), "{then}");
        let fields: Vec<String> = bed.query(&["HKEYS", &bed.key("h", &user)]).await;
        assert!(!fields.contains(&"y".to_owned()), "{then}: {fields:?}");
        go_back(&bed, &user, at(5)).await;
    };
    over("confirm").await;
    over("ack").await;
    over("connect").await;
    // A mailbox that is new by then is like any other.
    bed.grow_old(2_000).await;
    let bob = bed.user("bob");
    bed.connect(&bob, "phone", 1).await;
    bed.fill(&bob, 20..=21).await;
    bed.ack(&bob, "phone", 1, 1).await;
    assert_eq!(ids(&bed, &bob).await, ["m21"]);
}

#[tokio::test]
async fn hazard_76_a_device_that_is_behind_does_not_prolong_the_time() {
    let bed = keeping(600).await;
    let user = bed.user("alice");
    let place = lost_behind_two_devices(&bed, &user).await;
    bed.confirm(confirmation(&user, "tablet", 2, place)).await;
    bed.grow_old(601_000).await;
    phone_has_all(&bed, &user, place).await;
    assert_eq!(ids(&bed, &user).await.len(), 4, "the tablet needs them");
    let fields: Vec<String> = bed.query(&["HKEYS", &bed.key("h", &user)]).await;
    assert!(!fields.contains(&"y".to_owned()), "{fields:?}");
}

#[tokio::test]
async fn hazard_76_who_comes_too_late_behind_a_loss_is_told_that_something_is_gone() {
    let bed = keeping(0).await;
    let user = bed.user("alice");
    let place = lost_behind_two_devices(&bed, &user).await;
    phone_has_all(&bed, &user, place).await;
    bed.accept(&user, 5, "m5").await;
    // It comes back, or its session lived on and is confirmed, or acknowledges before that.
    let back = bed.resume(&user, "tablet", 3, place).await;
    assert_eq!((back.cursor.seq, back.newest), (Seq(0), Seq(5)));
    bed.confirm(confirmation(&user, "watch", 4, place)).await;
    for device in ["watch", "browser"] {
        let AckOutcome::Reset { cursor } = bed.ack_at(&user, device, 4, place).await else {
            panic!()
        };
        assert_eq!(cursor.seq, Seq(0), "{device}");
    }
    for device in ["tablet", "watch", "browser"] {
        let page = bed.page_of(&user, device, 0).await;
        assert_eq!(
            (page.oldest, page.cursor.unwrap().seq),
            (Seq(5), Seq(0)),
            "{device}: nothing was acknowledged"
        );
    }
}

#[tokio::test]
async fn hazard_76_a_session_whose_device_was_forgotten_is_told_what_was_trimmed_since() {
    let bed = keeping(0).await;
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=3).await;
    let first = bed.position(&user, 1).await;
    // The tablet was connected, had the first, and Redis went back to before that.
    bed.ack(&user, "phone", 1, 3).await;
    bed.confirm(confirmation(&user, "tablet", 2, first)).await;
    let page = bed.page_of(&user, "tablet", 1).await;
    assert_eq!((page.oldest, page.cursor.unwrap().seq), (Seq(4), Seq(1)));
}

async fn ids(bed: &Bed, user: &UserKey) -> Vec<String> {
    let page = bed.page(user, 0).await;
    page.entries.into_iter().map(|entry| envelope::decode(entry).unwrap().1.id).collect()
}

/// Everything of a user and of the test's partition is gone. Shards are shared between tests.
async fn forget(bed: &Bed, user: &UserKey) {
    let keys = ["h", "q", "r"].map(|kind| bed.key(kind, user));
    let () = bed.query(&["DEL", &keys[0], &keys[1], &keys[2]]).await;
    let () = bed.query(&["ZREM", &bed.key("t", user), &format!("demo\0{}", user.user)]).await;
    let field = format!("{}:3", bed.source().topic_id);
    let gone: i64 = bed.query(&["HDEL", &bed.key("o", user), &field]).await;
    assert_eq!(gone, 1);
}

/// Copies what Redis has of a user now; [`go_back`] brings it back.
async fn keep(bed: &Bed, user: &UserKey) {
    for kind in ["h", "q", "r"] {
        let key = bed.key(kind, user);
        let copied: i64 = bed.query(&["COPY", &key, &format!("{key}:before")]).await;
        assert_eq!(copied, 1);
    }
}

async fn go_back(bed: &Bed, user: &UserKey, position: LogPosition) {
    forget(bed, user).await;
    for kind in ["h", "q", "r"] {
        let key = bed.key(kind, user);
        let () = bed.query(&["RENAME", &format!("{key}:before"), &key]).await;
    }
    let LogPosition { leader_epoch, offset, index } = position;
    let (field, text) =
        (format!("{}:3", bed.source().topic_id), format!("{leader_epoch} {offset} {index}"));
    let () = bed.query(&["HSET", &bed.key("o", user), &field, &text]).await;
}
