//! ack: cursors, resets and trimming.

use barid_core::{Chain, DeviceId, Epoch, Generation, Position, Seq};
use barid_mailbox::{AcceptOutcome, AckOutcome, ConnectOutcome, ConnectRequest, ReadRequest};

use crate::support::{Bed, contract, hello};

contract!(
    an_ack_trims_and_removes_the_timer,
    the_slowest_known_device_keeps_its_entries,
    an_ack_never_goes_back,
    hazard_56_a_read_tells_what_the_device_acknowledged_itself,
    hazard_03_an_ack_of_another_history_resets_its_device_only,
    hazard_03_an_ack_of_another_history_resets_an_only_device,
    hazard_08_an_absurd_ack_resets_its_own_device_only,
    an_ack_of_another_epoch_resets,
    an_ack_of_an_older_generation_is_ignored,
    an_ack_below_the_oldest_entry_is_harmless,
    an_ack_of_an_unknown_device_makes_it_known,
    an_ack_without_a_mailbox_resets_into_a_new_epoch,
    progress_starts_the_retries_over,
    no_progress_leaves_the_retries_alone,
);

async fn an_ack_trims_and_removes_the_timer(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=3).await;
    assert!(bed.timer(&user).await.is_some());
    let last = bed.position(&user, 3).await;
    assert_eq!(bed.ack(&user, "phone", 1, 3).await, AckOutcome::Advanced { cursor: Seq(3) });
    assert_eq!(bed.timer(&user).await, None);
    let page = bed.page(&user, 0).await;
    assert_eq!((page.oldest, page.newest, page.entries.len()), (Seq(4), Seq(3), 0));
    assert_eq!(Some(page.chain_before_oldest), last.chain);
    // The next entry goes on from there.
    bed.fill(&user, 4..=4).await;
    let header = bed.headers(&user, 3).await[0];
    assert_eq!((header.seq, Some(header.prev_chain)), (Seq(4), last.chain));
}

async fn the_slowest_known_device_keeps_its_entries(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.connect(&user, "tablet", 2).await;
    bed.fill(&user, 1..=5).await;
    bed.disconnect(&user, "tablet", 2).await;
    bed.ack(&user, "phone", 1, 5).await;
    assert_eq!(bed.page(&user, 0).await.oldest, Seq(1));
    bed.connect(&user, "tablet", 3).await;
    bed.ack(&user, "tablet", 3, 2).await;
    assert_eq!(bed.page(&user, 0).await.oldest, Seq(3));
    bed.ack(&user, "tablet", 3, 5).await;
    assert_eq!(bed.page(&user, 0).await.oldest, Seq(6));
}

async fn an_ack_never_goes_back(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.connect(&user, "tablet", 2).await;
    bed.fill(&user, 1..=5).await;
    bed.ack(&user, "phone", 1, 4).await;
    assert_eq!(bed.ack(&user, "phone", 1, 2).await, AckOutcome::Advanced { cursor: Seq(4) });
}

async fn hazard_56_a_read_tells_what_the_device_acknowledged_itself(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=5).await;
    let third = bed.position(&user, 3).await;
    // The next session was told a cursor of 0 before this one's last word came.
    bed.ack(&user, "phone", 1, 3).await;
    let read = async |after, device: Option<&str>| {
        let device = device.map(|device| DeviceId::new(device).unwrap());
        let (entries_max, bytes_max, after) = (10, 1 << 20, Seq(after));
        let request = ReadRequest { user: user.clone(), after, entries_max, bytes_max, device };
        bed.mailbox.read(request).await.unwrap()
    };
    let page = read(0, Some("phone")).await;
    assert_eq!((page.oldest, page.entries.len()), (Seq(4), 2));
    assert_eq!(page.cursor, Some(third));
    // A device that names a position below is told of an eviction, though its cursor was moved over it.
    let first = Position { seq: Seq(1), chain: None, ..page.cursor.unwrap() };
    let request = ConnectRequest { position: Some(first), ..hello(&user, "phone", 2) };
    let outcome = bed.hello(request).await;
    assert!(matches!(outcome, ConnectOutcome::Connected { evicted: true, .. }), "{outcome:?}");
    let outcome = bed.hello(hello(&user, "phone", 3)).await;
    assert!(matches!(outcome, ConnectOutcome::Connected { evicted: false, .. }), "{outcome:?}");
    // It is told where something is gone, of a device that is known.
    for (after, device) in [(3, Some("phone")), (0, Some("tablet")), (0, None)] {
        assert_eq!(read(after, device).await.cursor, None, "{after} {device:?}");
    }
}

async fn hazard_03_an_ack_of_another_history_resets_its_device_only(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.connect(&user, "tablet", 2).await;
    bed.fill(&user, 1..=8).await;
    bed.ack(&user, "tablet", 2, 6).await;
    // The session saw another entry 7 before a failover.
    let forked = Position { chain: Some(Chain(99)), ..bed.position(&user, 8).await };
    let AckOutcome::Reset { cursor } = bed.ack_at(&user, "phone", 1, forked).await else {
        panic!()
    };
    assert_eq!((cursor.seq, cursor.generation), (Seq(0), Generation(1)));
    assert_eq!(cursor.chain, Some(Chain::START));
    assert_eq!(bed.state(&user, "tablet").await.unwrap().cursor.seq, Seq(6));
    assert_eq!(bed.page(&user, 0).await.oldest, Seq(1), "nothing is lost to it");
    assert!(bed.timer(&user).await.is_some());
}

/// With one device the script takes its short path, which has a branch for the newest entry and one for the others.
async fn hazard_03_an_ack_of_another_history_resets_an_only_device(bed: Bed) {
    for seq in [2, 3] {
        let user = bed.user(&format!("alice-{seq}"));
        bed.connect(&user, "phone", 1).await;
        bed.fill(&user, 1..=3).await;
        let forked = Position { chain: Some(Chain(99)), ..bed.position(&user, seq).await };
        let outcome = bed.ack_at(&user, "phone", 1, forked).await;
        assert!(matches!(outcome, AckOutcome::Reset { .. }), "{outcome:?}");
        assert_eq!(bed.page(&user, 0).await.oldest, Seq(1), "nothing is lost to it");
    }
}

async fn hazard_08_an_absurd_ack_resets_its_own_device_only(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.connect(&user, "tablet", 2).await;
    bed.fill(&user, 1..=3).await;
    let absurd = Position { seq: Seq(1_000_000_000), ..bed.position(&user, 3).await };
    let outcome = bed.ack_at(&user, "phone", 1, absurd).await;
    assert!(matches!(outcome, AckOutcome::Reset { .. }), "{outcome:?}");
    assert_eq!(bed.state(&user, "tablet").await.unwrap().cursor.generation, Generation(0));
    assert_eq!(bed.page(&user, 0).await.entries.len(), 3);
}

async fn an_ack_of_another_epoch_resets(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=3).await;
    let old = Position { epoch: Epoch(5), ..bed.position(&user, 3).await };
    let outcome = bed.ack_at(&user, "phone", 1, old).await;
    assert!(matches!(outcome, AckOutcome::Reset { .. }), "{outcome:?}");
    assert_eq!(bed.page(&user, 0).await.entries.len(), 3);
}

async fn an_ack_of_an_older_generation_is_ignored(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=3).await;
    let good = bed.position(&user, 3).await;
    bed.ack_at(&user, "phone", 1, Position { chain: Some(Chain(1)), ..good }).await;
    assert_eq!(bed.ack_at(&user, "phone", 1, good).await, AckOutcome::Stale);
    let renewed = Position { generation: Generation(1), ..good };
    let outcome = bed.ack_at(&user, "phone", 1, renewed).await;
    assert_eq!(outcome, AckOutcome::Advanced { cursor: Seq(3) });
}

async fn an_ack_below_the_oldest_entry_is_harmless(bed: Bed) {
    let bed = bed.with(|config| config.entries_max = 3).await;
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=3).await;
    let second = bed.position(&user, 2).await;
    bed.fill(&user, 4..=9).await;
    let outcome = bed.ack_at(&user, "phone", 1, second).await;
    assert!(matches!(outcome, AckOutcome::Advanced { .. }), "{outcome:?}");
    assert_eq!(bed.page(&user, 0).await.entries.len(), 3);
}

async fn an_ack_of_an_unknown_device_makes_it_known(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=3).await;
    assert_eq!(bed.ack(&user, "phone", 1, 2).await, AckOutcome::Advanced { cursor: Seq(2) });
    assert_eq!(bed.state(&user, "phone").await.unwrap().cursor.seq, Seq(2));
    assert_eq!(bed.timer(&user).await, None, "it has no route");
}

async fn an_ack_without_a_mailbox_resets_into_a_new_epoch(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=3).await;
    let last = bed.position(&user, 3).await;
    let () = bed.query(&["DEL", &bed.key("h", &user), &bed.key("q", &user)]).await;
    let AckOutcome::Reset { cursor } = bed.ack_at(&user, "phone", 1, last).await else { panic!() };
    assert_eq!((cursor.seq, cursor.generation), (Seq(0), Generation(1)));
    assert!(cursor.epoch != last.epoch && cursor.epoch.0 != 0);
    let outcome = bed.accept(&user, 4, "m4").await;
    assert!(matches!(outcome, AcceptOutcome::Accepted { seq: Seq(1), online: true, .. }));
    assert_eq!(bed.page(&user, 0).await.epoch, cursor.epoch);
}

async fn progress_starts_the_retries_over(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=3).await;
    bed.make_due(&user).await;
    assert_eq!(bed.fire(&user).await.unwrap().devices[0].resends, 1);
    bed.ack(&user, "phone", 1, 1).await;
    let state = bed.state(&user, "phone").await.unwrap();
    assert_eq!(state.resends, 0);
    assert_eq!(Some(state.due_ms), bed.timer(&user).await);
}

async fn no_progress_leaves_the_retries_alone(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=3).await;
    bed.ack(&user, "phone", 1, 1).await;
    let place = Position {
        chain: Some(bed.page(&user, 0).await.chain_before_oldest),
        ..bed.position(&user, 2).await
    };
    bed.make_due(&user).await;
    bed.fire(&user).await.unwrap();
    let before = bed.state(&user, "phone").await.unwrap();
    bed.ack_at(&user, "phone", 1, Position { seq: Seq(1), ..place }).await;
    let after = bed.state(&user, "phone").await.unwrap();
    assert_eq!((after.due_ms, after.resends), (before.due_ms, before.resends));
}
