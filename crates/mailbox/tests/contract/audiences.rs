//! Mailboxes of groups and of everyone, and the nodes that are listed for them.

use barid_core::{AppId, Audience, AudienceKey, GroupId, Incarnation, NodeId, Owner, Seq};
use barid_mailbox::{
    AcceptMessage, AcceptOutcome, AudienceReadRequest, GroupOutcome, JoinOutcome, JoinRequest,
    Journal, JournalRequest, Page,
};
use barid_wire::envelope;

use crate::support::{Bed, contract, message, sleep_ms};

contract!(
    a_groups_message_is_stored_once_and_names_the_nodes_that_have_joined,
    users_and_audiences_of_one_call_keep_their_own_bounds_and_mailboxes,
    hazard_160_a_message_is_in_the_head_that_a_join_returns_or_names_the_node,
    hazard_161_a_late_removal_does_not_undo_a_later_join,
    a_node_that_no_longer_confirms_is_removed_by_another_ones_join,
    a_replayed_record_is_accepted_before_and_another_one_with_its_id_a_duplicate,
    an_emptied_audience_begins_a_new_epoch,
    hazard_166_the_journal_names_each_audience_with_new_messages_once,
);

/// A group with the name of a user of the bed; others share its servers.
fn group(bed: &Bed, name: &str) -> AudienceKey {
    let user = bed.user(name);
    let audience = Audience::Group(GroupId::new(user.user.as_str()).unwrap());
    AudienceKey { app: user.app, audience }
}

/// Everyone of an app of the bed.
fn everyone(bed: &Bed) -> AudienceKey {
    let app = AppId::new(&bed.user("app").user.as_str().replace(':', ".")).unwrap();
    AudienceKey { app, audience: Audience::Everyone }
}

fn to(bed: &Bed, key: &AudienceKey, offset: i64, id: &str) -> AcceptMessage {
    let owner = Owner::Audience(key.audience.clone());
    AcceptMessage { app: key.app.clone(), owner, ..message(&bed.user("x"), offset, id) }
}

fn request(key: &AudienceKey, node: &str, number: u64, has_members: bool) -> JoinRequest {
    let (node, incarnation) = (NodeId::new(node).unwrap(), Incarnation(7));
    JoinRequest { audience: key.clone(), node, incarnation, number, has_members }
}

/// The epoch, oldest and newest seq that a join returns.
async fn join(bed: &Bed, request: JoinRequest) -> (u64, u64, u64) {
    match bed.mailbox.join(request).await.unwrap() {
        JoinOutcome::Joined { newest, oldest } => (newest.epoch.0, oldest.0, newest.seq.0),
        JoinOutcome::Superseded => panic!("superseded"),
    }
}

async fn page(bed: &Bed, key: &AudienceKey) -> Page {
    let (after, entries_max, bytes_max) = (Seq(0), 10_000, 32 << 20);
    let request = AudienceReadRequest { audience: key.clone(), after, entries_max, bytes_max };
    bed.mailbox.read_audience(request).await.unwrap()
}

fn ids(page: &Page) -> Vec<String> {
    page.entries.iter().map(|entry| envelope::decode(entry.clone()).unwrap().1.id).collect()
}

/// The seq and the nodes, sorted, of an accepted message.
fn accepted(outcome: &AcceptOutcome) -> (u64, Vec<String>) {
    let AcceptOutcome::Accepted { seq, nodes, online: false, .. } = outcome else {
        panic!("{outcome:?}")
    };
    let mut nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
    nodes.sort();
    (seq.0, nodes)
}

async fn a_groups_message_is_stored_once_and_names_the_nodes_that_have_joined(bed: Bed) {
    for key in [group(&bed, "eng"), everyone(&bed)] {
        assert_eq!(join(&bed, request(&key, "a", 1, true)).await, (0, 1, 0), "no mailbox yet");
        join(&bed, request(&key, "b", 9, true)).await;
        let first = bed.accept_message(to(&bed, &key, 1, "m1")).await;
        assert_eq!(accepted(&first), (1, vec!["a".into(), "b".into()]));
        let (epoch, oldest, newest) = join(&bed, request(&key, "a", 2, false)).await;
        assert_eq!((oldest, newest), (1, 1));
        let second = bed.accept_message(to(&bed, &key, 2, "m2")).await;
        assert_eq!(accepted(&second), (2, vec!["b".into()]));
        join(&bed, request(&key, "b", 10, false)).await;
        let third = bed.accept_message(to(&bed, &key, 3, "m3")).await;
        assert_eq!(accepted(&third), (3, vec![]));
        let page = page(&bed, &key).await;
        assert_eq!(
            (page.epoch.0, ids(&page)),
            (epoch, vec!["m1".into(), "m2".into(), "m3".into()])
        );
    }
}

async fn users_and_audiences_of_one_call_keep_their_own_bounds_and_mailboxes(mut bed: Bed) {
    bed.config.entries_max = 3;
    bed.config.group_entries_max = 2;
    bed.config.everyone_entries_max = 5;
    bed.mailbox = crate::support::open(&bed.config).await;
    let (eng, everyone) = (group(&bed, "eng"), everyone(&bed));
    let user = bed.user("eng"); // the same name, in the same shard
    join(&bed, request(&eng, "a", 1, true)).await;
    let mut messages = Vec::new();
    for n in 0..8 {
        messages.push(message(&user, 2 * n + 1, &format!("u{n}")));
        messages.push(to(&bed, &eng, 2 * n + 2, &format!("g{n}")));
    }
    let GroupOutcome::Done(outcomes) = bed.accept_group(messages, None).await else {
        panic!("gap")
    };
    for (n, pair) in outcomes.chunks(2).enumerate() {
        assert_eq!(accepted(&pair[0]), (n as u64 + 1, vec![]));
        assert_eq!(accepted(&pair[1]), (n as u64 + 1, vec!["a".into()]));
    }
    for n in 0..8 {
        bed.accept_message(to(&bed, &everyone, 100 + n, &format!("e{n}"))).await;
    }
    assert_eq!(bed.page(&user, 0).await.oldest, Seq(6));
    assert_eq!(ids(&page(&bed, &eng).await), ["g6", "g7"]);
    assert_eq!(page(&bed, &everyone).await.oldest, Seq(4));
    // An audience leaves no bounds behind for the users after it.
    bed.fill(&user, 200..=201).await;
    assert_eq!(bed.page(&user, 0).await.oldest, Seq(8));
}

async fn hazard_160_a_message_is_in_the_head_that_a_join_returns_or_names_the_node(bed: Bed) {
    let key = group(&bed, "eng");
    let accepting = async {
        let mut outcomes = Vec::new();
        for offset in 1..=200 {
            let outcome = bed.accept_message(to(&bed, &key, offset, &format!("m{offset}"))).await;
            outcomes.push(accepted(&outcome));
        }
        outcomes
    };
    let joining = async {
        let mut heads = Vec::new();
        for number in 1..=20 {
            let node = format!("n{number}");
            heads.push((node.clone(), join(&bed, request(&key, &node, 1, true)).await.2));
            sleep_ms(1).await;
        }
        heads
    };
    let (outcomes, heads) = tokio::join!(accepting, joining);
    for (node, head) in heads {
        for (seq, nodes) in &outcomes {
            assert_eq!(nodes.contains(&node), *seq > head, "{node} joined at {head}: {seq}");
        }
    }
}

async fn hazard_161_a_late_removal_does_not_undo_a_later_join(bed: Bed) {
    let key = group(&bed, "eng");
    join(&bed, request(&key, "a", 1, true)).await;
    join(&bed, request(&key, "a", 3, true)).await;
    let late = bed.mailbox.join(request(&key, "a", 2, false)).await.unwrap();
    assert_eq!(late, JoinOutcome::Superseded);
    // The incarnation that has ended does not remove the new one either, whatever its number.
    let next = JoinRequest { incarnation: Incarnation(8), ..request(&key, "a", 1, true) };
    join(&bed, next).await;
    let late = bed.mailbox.join(request(&key, "a", 99, false)).await.unwrap();
    assert_eq!(late, JoinOutcome::Superseded);
    let outcome = bed.accept_message(to(&bed, &key, 1, "m1")).await;
    assert_eq!(accepted(&outcome), (1, vec!["a".into()]));
}

async fn a_node_that_no_longer_confirms_is_removed_by_another_ones_join(mut bed: Bed) {
    bed.config.audience_lease_seconds = 3;
    bed.mailbox = crate::support::open(&bed.config).await;
    let key = group(&bed, "eng");
    join(&bed, request(&key, "dead", 1, true)).await;
    sleep_ms(2_000).await;
    join(&bed, request(&key, "alive", 1, true)).await;
    let outcome = bed.accept_message(to(&bed, &key, 1, "m1")).await;
    assert_eq!(accepted(&outcome).1, ["alive", "dead"]);
    sleep_ms(1_500).await;
    join(&bed, request(&key, "alive", 2, true)).await;
    let outcome = bed.accept_message(to(&bed, &key, 2, "m2")).await;
    assert_eq!(accepted(&outcome).1, ["alive"]);
}

async fn a_replayed_record_is_accepted_before_and_another_one_with_its_id_a_duplicate(bed: Bed) {
    let key = group(&bed, "eng");
    join(&bed, request(&key, "a", 1, true)).await;
    bed.accept_message(to(&bed, &key, 1, "m1")).await;
    assert_eq!(bed.accept_message(to(&bed, &key, 1, "m1")).await, AcceptOutcome::AcceptedBefore);
    assert_eq!(bed.accept_message(to(&bed, &key, 2, "m1")).await, AcceptOutcome::Duplicate);
    // The same id for a user of that name is another message.
    let user = bed.user("eng");
    assert!(matches!(bed.accept(&user, 3, "m1").await, AcceptOutcome::Accepted { .. }));
    assert_eq!(ids(&page(&bed, &key).await), ["m1"]);
}

async fn an_emptied_audience_begins_a_new_epoch(mut bed: Bed) {
    bed.config.group_ttl_seconds = 1;
    bed.mailbox = crate::support::open(&bed.config).await;
    let key = group(&bed, "eng");
    bed.accept_message(to(&bed, &key, 1, "m1")).await;
    let (epoch, ..) = join(&bed, request(&key, "a", 1, true)).await;
    sleep_ms(1_200).await;
    assert_eq!(join(&bed, request(&key, "a", 2, true)).await, (0, 1, 0));
    let outcome = bed.accept_message(to(&bed, &key, 2, "m2")).await;
    assert_eq!(accepted(&outcome), (1, vec!["a".into()]));
    assert_ne!(join(&bed, request(&key, "a", 3, true)).await.0, epoch);
}

async fn hazard_166_the_journal_names_each_audience_with_new_messages_once(bed: Bed) {
    let eng = group(&bed, "eng");
    let shard = bed.mailbox.shard_of_audience(&eng.app, eng.audience.as_str());
    let read = async |after| {
        let journal = bed.mailbox.journal(JournalRequest { shard, after, audiences_max: 1_000 });
        let Journal { changed, highest, trimmed } = journal.await.unwrap();
        assert_eq!(trimmed, 0);
        // Other tests share the shard.
        let mine: Vec<u64> =
            changed.into_iter().filter(|(key, _)| *key == eng).map(|(_, number)| number).collect();
        (mine, highest)
    };
    bed.accept_message(to(&bed, &eng, 1, "m1")).await;
    let (first, after) = read(0).await;
    let header = envelope::Header::parse(&page(&bed, &eng).await.entries[0]).unwrap();
    assert!(first.len() == 1 && first[0] >= header.accepted_at_us, "{first:?} {header:?}");
    assert_eq!(read(after).await.0, [] as [u64; 0]);
    // A duplicate, and a user of that name, are not in it.
    bed.accept_message(to(&bed, &eng, 2, "m1")).await;
    bed.accept(&bed.user("eng"), 3, "m9").await;
    assert_eq!(read(after).await.0, [] as [u64; 0]);
    let messages = (4..=8).map(|offset| to(&bed, &eng, offset, &format!("m{offset}"))).collect();
    bed.accept_group(messages, None).await;
    let (second, _) = read(after).await;
    let header = envelope::Header::parse(page(&bed, &eng).await.entries.last().unwrap()).unwrap();
    assert!(second.len() == 1 && second[0] >= header.accepted_at_us + 4, "{second:?} {header:?}");
}
