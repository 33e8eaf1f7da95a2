//! accept and read.

use barid_core::{Chain, Seq, ShardCount};
use barid_mailbox::{
    AcceptMessage, AcceptOutcome, GroupOutcome, LogPosition, ReadRequest, UserKey,
};
use barid_wire::envelope::{self, SkipReason};

use bytes::Bytes;

use crate::support::{Bed, at, contract, message, sleep_ms};

contract!(
    entries_are_contiguous_and_stored_as_they_were_returned,
    lua_and_rust_compute_the_same_chain,
    hazard_25_a_redelivered_position_is_accepted_before_and_another_record_a_duplicate,
    the_last_56_ids_are_remembered_and_few_more,
    hazard_01_an_overtaken_batch_is_a_gap_and_writes_nothing,
    hazard_06_a_later_leader_epoch_passes_earlier_offsets,
    parts_of_one_record_are_ordered_by_index,
    an_empty_group_probes_the_position,
    hazard_02_a_corrupt_head_fails_its_own_message_only,
    what_failed_is_failed_again_when_redelivered,
    several_shards_go_in_one_call,
    a_shard_whose_positions_are_corrupt_fails_alone,
    hazard_09_names_that_look_alike_stay_apart,
    eviction_by_length_is_counted_and_told,
    eviction_by_age_is_counted_and_told,
    hazard_18_head_and_queue_expire_together_into_a_new_epoch,
    a_collapse_key_voids_the_older_entry_in_its_place,
    hazard_24_collapse_keys_are_dropped_below_the_oldest_entry,
    reading_is_bounded_by_entries_and_bytes,
    reading_a_mailbox_that_is_not_there_is_an_empty_page,
);

async fn entries_are_contiguous_and_stored_as_they_were_returned(bed: Bed) {
    let user = bed.user("alice");
    let mut envelopes = Vec::new();
    for offset in 1..=5 {
        match bed.accept(&user, offset, &format!("id-{offset}")).await {
            AcceptOutcome::Accepted { seq, envelope, online, evicted, .. } => {
                assert_eq!((seq, online, evicted), (Seq(offset as u64), false, 0));
                envelopes.push(envelope);
            }
            other => panic!("{other:?}"),
        }
    }
    let page = bed.page(&user, 0).await;
    assert_eq!(page.entries, envelopes);
    assert_eq!((page.oldest, page.newest), (Seq(1), Seq(5)));
    let (header, decoded) = envelope::decode(page.entries[4].clone()).unwrap();
    assert_eq!((header.epoch, decoded.id.as_str()), (page.epoch, "id-5"));
    let (before, after) =
        (header.accepted_at_us / 1000, bed.mailbox.inspect(&user).await.unwrap().now_ms);
    assert!(before <= after && after - before < 10_000);
    assert_eq!(bed.page(&user, 3).await.entries, envelopes[3..]);
}

async fn lua_and_rust_compute_the_same_chain(bed: Bed) {
    let user = bed.user("alice");
    let ids: Vec<String> = (0..450).map(|i| format!("{}-ü-{i}", "x".repeat(i % 90))).collect();
    let messages = ids.iter().zip(1..).map(|(id, offset)| message(&user, offset, id)).collect();
    bed.accept_group(messages, None).await;
    let mut chain = Chain::START;
    for (header, id) in bed.headers(&user, 0).await.iter().zip(&ids) {
        assert_eq!((header.prev_chain, header.chain), (chain, chain.next(id)), "{id}");
        chain = header.chain;
    }
    assert_ne!(chain, Chain::START);
}

async fn hazard_25_a_redelivered_position_is_accepted_before_and_another_record_a_duplicate(
    bed: Bed,
) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=3).await;
    assert_eq!(bed.accept(&user, 2, "m2").await, AcceptOutcome::AcceptedBefore);
    assert_eq!(bed.accept(&user, 4, "m2").await, AcceptOutcome::Duplicate);
    assert_eq!(bed.accept(&user, 4, "m2").await, AcceptOutcome::AcceptedBefore);
    assert_eq!(bed.page(&user, 0).await.newest, Seq(3));
}

async fn the_last_56_ids_are_remembered_and_few_more(bed: Bed) {
    let user = bed.user("alice");
    let mut offset = 0;
    let mut accept = async |id: i64| {
        offset += 1;
        bed.accept(&user, offset, &format!("m{id}")).await
    };
    for newest in 1..=100 {
        let outcome = accept(newest).await;
        assert!(matches!(outcome, AcceptOutcome::Accepted { .. }), "{newest}: {outcome:?}");
        let oldest = (newest - 55).max(1);
        assert_eq!(accept(oldest).await, AcceptOutcome::Duplicate, "{oldest} after {newest}");
    }
    let outcome = accept(100 - 64).await;
    assert!(matches!(outcome, AcceptOutcome::Accepted { .. }), "{outcome:?}");
}

async fn hazard_01_an_overtaken_batch_is_a_gap_and_writes_nothing(bed: Bed) {
    let user = bed.user("alice");
    let batch = |offset: i64| vec![message(&user, offset, &format!("m{offset}"))];
    // The first batch of the assignment met NOSCRIPT; the second overtook it.
    assert_eq!(bed.accept_group(batch(101), Some(at(100))).await, GroupOutcome::Gap(None));
    bed.accept_group(batch(99), None).await;
    let overtaken = bed.accept_group(batch(101), Some(at(100))).await;
    assert_eq!(overtaken, GroupOutcome::Gap(Some(at(99))));
    assert_eq!(bed.page(&user, 0).await.newest, Seq(1));
    // Back to the gap: both go in, in order.
    bed.accept_group(batch(100), Some(at(99))).await;
    let outcome = bed.accept_group(batch(101), Some(at(100))).await;
    assert!(matches!(outcome, GroupOutcome::Done(_)));
    assert_eq!(bed.page(&user, 0).await.newest, Seq(3));
}

async fn hazard_06_a_later_leader_epoch_passes_earlier_offsets(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=9).await;
    let mut again = message(&user, 5, "another record at offset 5");
    assert_eq!(bed.accept_message(again.clone()).await, AcceptOutcome::AcceptedBefore);
    again.position.leader_epoch = 1;
    let outcome = bed.accept_message(again.clone()).await;
    assert!(matches!(outcome, AcceptOutcome::Accepted { seq: Seq(10), .. }), "{outcome:?}");
    assert_eq!(bed.accept_message(again).await, AcceptOutcome::AcceptedBefore);
    assert_eq!(bed.accept(&user, 10, "m10").await, AcceptOutcome::AcceptedBefore);
}

async fn parts_of_one_record_are_ordered_by_index(bed: Bed) {
    let user = bed.user("alice");
    let part = |index: u32| {
        let mut part = message(&user, 7, &format!("part-{index}"));
        part.position = LogPosition { leader_epoch: -1, offset: 7, index };
        part
    };
    let outcome = bed.accept_group(vec![part(0), part(1)], None).await;
    let GroupOutcome::Done(outcomes) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(outcomes[1], AcceptOutcome::Accepted { seq: Seq(2), .. }));
    let outcome = bed.accept_group(vec![part(0), part(1), part(2)], None).await;
    let GroupOutcome::Done(outcomes) = outcome else { panic!("{outcome:?}") };
    assert_eq!(outcomes[..2], [AcceptOutcome::AcceptedBefore, AcceptOutcome::AcceptedBefore]);
    assert!(matches!(outcomes[2], AcceptOutcome::Accepted { seq: Seq(3), .. }));
    for wrong in [[part(4), part(3)], [part(3), part(3)]] {
        let group = bed.group(wrong.into(), None);
        let refused = bed.mailbox.accept(&[group]).await.remove(0);
        assert!(matches!(refused, Err(barid_mailbox::Error::Unexpected(_))), "{refused:?}");
    }
}

async fn an_empty_group_probes_the_position(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=2).await;
    let mut probe = bed.group(vec![message(&user, 1, "m1")], Some(at(2)));
    probe.messages.clear();
    let done = bed.mailbox.accept(std::slice::from_ref(&probe)).await.remove(0).unwrap();
    assert_eq!(done, GroupOutcome::Done(Vec::new()));
    probe.prev = Some(at(3));
    let gap = bed.mailbox.accept(&[probe]).await.remove(0).unwrap();
    assert_eq!(gap, GroupOutcome::Gap(Some(at(2))));
}

/// Two users of one shard.
fn neighbours(bed: &Bed) -> (UserKey, UserKey) {
    let first = bed.user("first");
    let mut names = (0..).map(|i| bed.user(&format!("other{i}")));
    let second = names.find(|user| bed.shard(user) == bed.shard(&first)).unwrap();
    (first, second)
}

async fn hazard_02_a_corrupt_head_fails_its_own_message_only(bed: Bed) {
    let (good, bad) = neighbours(&bed);
    let () = bed.query(&["SET", &bed.key("h", &bad), "not a hash"]).await;
    let messages = vec![message(&good, 1, "a"), message(&bad, 2, "b"), message(&good, 3, "c")];
    let GroupOutcome::Done(outcomes) = bed.accept_group(messages, None).await else { panic!() };
    assert!(matches!(outcomes[0], AcceptOutcome::Accepted { seq: Seq(1), .. }));
    assert!(matches!(&outcomes[1], AcceptOutcome::Failed(why) if why.contains("WRONGTYPE")));
    assert!(matches!(outcomes[2], AcceptOutcome::Accepted { seq: Seq(2), .. }));
    assert_eq!(bed.accept(&good, 3, "c").await, AcceptOutcome::AcceptedBefore);
}

async fn what_failed_is_failed_again_when_redelivered(bed: Bed) {
    let (good, bad) = neighbours(&bed);
    bed.fill(&bad, 1..=1).await;
    let () = bed.query(&["SET", &bed.key("q", &bad), "not a list"]).await;
    let messages = || vec![message(&bad, 2, "b"), message(&good, 3, "c")];
    for _ in 0..2 {
        // The purger died before its dead letter was written.
        let GroupOutcome::Done(outcomes) = bed.accept_group(messages(), None).await else {
            panic!()
        };
        assert!(matches!(&outcomes[0], AcceptOutcome::Failed(_)), "{outcomes:?}");
    }
}

async fn several_shards_go_in_one_call(bed: Bed) {
    let users: Vec<_> = (0..20).map(|i| bed.user(&format!("user{i}"))).collect();
    let group = |user: &UserKey| bed.group(vec![message(user, 1, "a")], None);
    let groups: Vec<_> = users
        .iter()
        .enumerate()
        .map(|(i, user)| {
            let mut group = group(user);
            group.source.partition = i as i32;
            group
        })
        .collect();
    for outcome in bed.mailbox.accept(&groups).await {
        let GroupOutcome::Done(outcomes) = outcome.unwrap() else { panic!() };
        assert!(matches!(outcomes[0], AcceptOutcome::Accepted { seq: Seq(1), .. }));
    }
    for user in &users {
        assert_eq!(bed.page(user, 0).await.entries.len(), 1);
    }
}

async fn a_shard_whose_positions_are_corrupt_fails_alone(bed: Bed) {
    let good = bed.user("good");
    let mut names = (0..).map(|i| bed.user(&format!("bad{i}")));
    let bad = names.find(|user| bed.shard(user) != bed.shard(&good)).unwrap();
    let source = format!("topic-x:{}", bed.source().topic_id);
    let (key, field) = (bed.key("o", &bad), format!("{source}:3"));
    let () = bed.query(&["HSET", &key, &field, "gibberish"]).await;
    let mut groups = [&bad, &good].map(|user| bed.group(vec![message(user, 1, "a")], None));
    groups.iter_mut().for_each(|group| group.source.topic_id = source.as_str().into());
    let outcomes = bed.mailbox.accept(&groups).await;
    assert!(outcomes[0].is_err() && outcomes[1].is_ok(), "{outcomes:?}");
}

async fn hazard_09_names_that_look_alike_stay_apart(bed: Bed) {
    let shards = ShardCount::new(bed.config.shards).unwrap();
    let plain = bed.user("c");
    let mut odd = bed.user("x");
    odd.user = format!("b:{}", plain.user).parse().unwrap();
    assert_eq!(bed.shard(&plain), shards.shard_of("demo", plain.user.as_str()));
    bed.accept(&odd, 1, "for odd").await;
    assert_eq!(bed.page(&plain, 0).await.newest, Seq(0));
    assert_eq!(bed.page(&odd, 0).await.newest, Seq(1));
}

async fn eviction_by_length_is_counted_and_told(bed: Bed) {
    let bed = bed.with(|config| config.entries_max = 5).await;
    let user = bed.user("alice");
    bed.fill(&user, 1..=5).await;
    let third = bed.headers(&user, 2).await[0];
    let second = bed.headers(&user, 1).await[0];
    for offset in 6..=7 {
        let outcome = bed.accept(&user, offset, &format!("m{offset}")).await;
        assert!(matches!(outcome, AcceptOutcome::Accepted { evicted: 1, .. }), "{outcome:?}");
    }
    let page = bed.page(&user, 0).await;
    assert_eq!((page.oldest, page.newest, page.entries.len()), (Seq(3), Seq(7), 5));
    assert_eq!(page.chain_before_oldest, second.chain);
    assert_eq!(bed.headers(&user, 0).await[0], third);
}

async fn eviction_by_age_is_counted_and_told(bed: Bed) {
    let bed = bed.with(|config| config.ttl_seconds = 2).await;
    let user = bed.user("alice");
    bed.fill(&user, 1..=2).await;
    sleep_ms(1_400).await;
    bed.fill(&user, 3..=3).await;
    sleep_ms(1_000).await;
    let outcome = bed.accept(&user, 4, "m4").await;
    // A busy machine may sleep for longer, and then one more is too old.
    let AcceptOutcome::Accepted { evicted: first @ 2..=3, .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(bed.page(&user, 0).await.oldest, Seq(u64::from(first) + 1));
    sleep_ms(1_400).await;
    let outcome = bed.accept(&user, 5, "m5").await;
    let AcceptOutcome::Accepted { evicted, .. } = outcome else { panic!("{outcome:?}") };
    assert!((3..=4).contains(&(first + evicted)), "{first}, {outcome:?}");
}

async fn hazard_18_head_and_queue_expire_together_into_a_new_epoch(bed: Bed) {
    let bed = bed.with(|config| config.ttl_seconds = 1).await;
    let user = bed.user("alice");
    bed.fill(&user, 1..=3).await;
    let before = bed.page(&user, 0).await;
    let expiry = async |kind: &str| bed.query::<u64>(&["PEXPIRETIME", &bed.key(kind, &user)]).await;
    assert_eq!(expiry("h").await, expiry("q").await);
    sleep_ms(1_200).await;
    assert_eq!(bed.page(&user, 0).await.newest, Seq(0));
    bed.fill(&user, 4..=4).await;
    let after = bed.page(&user, 0).await;
    assert_eq!((after.newest, after.entries.len()), (Seq(1), 1));
    assert_ne!(before.epoch, after.epoch);
}

fn keyed(user: &UserKey, offset: i64, key: &str) -> AcceptMessage {
    let mut message = message(user, offset, &format!("m{offset}"));
    message.collapse_key = Some(key.into());
    message
}

async fn a_collapse_key_voids_the_older_entry_in_its_place(bed: Bed) {
    let user = bed.user("alice");
    bed.accept_message(keyed(&user, 1, "weather")).await;
    bed.accept_message(keyed(&user, 2, "traffic")).await;
    let before = bed.headers(&user, 0).await;
    bed.accept_message(keyed(&user, 3, "weather")).await;
    let page = bed.page(&user, 0).await;
    assert_eq!(bed.headers(&user, 0).await[..2], before);
    let decoded: Vec<_> =
        page.entries.iter().map(|entry| envelope::decode(entry.clone()).unwrap().1).collect();
    let voided: Vec<_> = decoded.iter().map(|envelope| envelope.voided()).collect();
    assert_eq!(voided, [SkipReason::Collapsed, SkipReason::Unspecified, SkipReason::Unspecified]);
    assert!(decoded[0].payload.is_empty());
    assert_eq!(&decoded[2].payload[..], b"m3");
}

async fn collapse_keys(bed: &Bed, user: &UserKey) -> Vec<String> {
    let fields: Vec<String> = bed.query(&["HKEYS", &bed.key("h", user)]).await;
    fields.into_iter().filter(|field| field.starts_with("k:")).collect()
}

async fn hazard_24_collapse_keys_are_dropped_below_the_oldest_entry(bed: Bed) {
    let bed = bed.with(|config| config.entries_max = 3).await;
    let user = bed.user("alice");
    for offset in 1..=200 {
        bed.accept_message(keyed(&user, offset, &format!("key-{offset}"))).await;
        assert!(collapse_keys(&bed, &user).await.len() <= 3 + 64);
    }
    let keys = collapse_keys(&bed, &user).await;
    for offset in 198..=200 {
        assert!(keys.contains(&format!("k:key-{offset}")), "{keys:?}");
    }
    // One that has gone meanwhile voids nothing.
    let before = bed.headers(&user, 0).await;
    bed.accept_message(keyed(&user, 201, "key-197")).await;
    assert_eq!(bed.headers(&user, 0).await[..2], before[1..]);
    let page = bed.page(&user, 0).await;
    let kept = |entry: &Bytes| !envelope::decode(entry.clone()).unwrap().1.payload.is_empty();
    assert!(page.entries.iter().all(kept));
    bed.connect(&user, "phone", 1).await;
    bed.ack(&user, "phone", 1, 201).await;
    assert_eq!(collapse_keys(&bed, &user).await, Vec::<String>::new());
}

async fn reading_is_bounded_by_entries_and_bytes(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=50).await;
    let bytes = bed.page(&user, 0).await.entries[0].len() as u32;
    let read = async |after: u64, entries_max: u32, bytes_max: u32| {
        let request = ReadRequest {
            user: user.clone(),
            after: Seq(after),
            entries_max,
            bytes_max,
            device: None,
        };
        bed.mailbox.read(request).await.unwrap().entries.len()
    };
    assert_eq!(read(0, 40, 1 << 20).await, 40);
    assert_eq!(read(45, 40, 1 << 20).await, 5);
    assert_eq!(read(50, 40, 1 << 20).await, 0);
    assert_eq!(read(0, 40, bytes * 3).await, 3);
    assert_eq!(read(0, 40, 1).await, 1, "one comes whatever its size");
}

async fn reading_a_mailbox_that_is_not_there_is_an_empty_page(bed: Bed) {
    let page = bed.page(&bed.user("nobody"), 0).await;
    assert_eq!((page.epoch.0, page.oldest, page.newest), (0, Seq(1), Seq(0)));
    assert!(page.entries.is_empty());
}
