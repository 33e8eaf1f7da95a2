//! connect, confirm and disconnect.

use barid_core::{Attempt, Chain, Epoch, Generation, Incarnation, Position, Seq};
use barid_mailbox::{AcceptOutcome, AckOutcome, ConfirmOutcome, ConnectOutcome};

use crate::support::{Bed, confirmation, contract, hello, session, sleep_ms};

contract!(
    a_device_new_to_a_user_reads_from_the_oldest_entry,
    a_device_new_to_a_user_starts_at_the_furthest_cursor_of_the_others,
    a_device_without_positions_resumes_at_its_cursor,
    a_device_resumes_where_it_says,
    a_forgotten_device_resumes_at_the_position_in_its_hello,
    what_was_evicted_below_a_position_can_be_told,
    hazard_03_a_fork_resets_the_device_with_a_new_generation,
    another_epoch_resets_the_device,
    a_position_ahead_of_the_mailbox_resets_the_device,
    an_older_generation_without_a_chain_is_reset_again,
    a_newer_session_is_told_what_it_replaced,
    hazard_14_a_late_connect_of_an_older_attempt_is_superseded,
    the_fence_stays_when_the_newer_session_is_gone,
    hazard_24_the_device_unused_for_longest_is_forgotten,
    devices_that_are_online_are_never_forgotten,
    only_the_routes_own_session_removes_it,
    a_message_after_connect_finds_the_device_online,
    hazard_12_confirm_restores_a_forgotten_route,
    hazard_03_a_confirmed_position_of_another_history_is_not_believed,
    confirm_under_a_new_incarnation_takes_over_its_own_route,
    confirm_of_a_replaced_session_is_superseded,
    hazard_18_confirm_tells_of_a_new_epoch,
);

async fn a_device_new_to_a_user_reads_from_the_oldest_entry(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=3).await;
    let connected = bed.connect(&user, "phone", 1).await;
    assert_eq!((connected.cursor.seq, connected.newest), (Seq(0), Seq(3)));
    assert_eq!(connected.cursor.chain, Some(Chain::START));
    assert_eq!((connected.reset, connected.replaced), (false, None));
    assert_eq!(connected.cursor.epoch, bed.page(&user, 0).await.epoch);
}

async fn a_device_new_to_a_user_starts_at_the_furthest_cursor_of_the_others(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=5).await;
    for (device, n, seq) in [("phone", 1, 2), ("tablet", 2, 4)] {
        bed.connect(&user, device, n).await;
        bed.ack(&user, device, n, seq).await;
    }
    let connected = bed.connect(&user, "watch", 3).await;
    assert_eq!(connected.cursor.seq, Seq(4));
    assert_eq!(connected.cursor.chain, bed.position(&user, 4).await.chain);
}

async fn a_device_without_positions_resumes_at_its_cursor(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=5).await;
    bed.connect(&user, "phone", 1).await;
    bed.ack(&user, "phone", 1, 3).await;
    bed.disconnect(&user, "phone", 1).await;
    let connected = bed.connect(&user, "phone", 2).await;
    assert_eq!((connected.cursor.seq, connected.reset), (Seq(3), false));
}

async fn a_device_resumes_where_it_says(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=5).await;
    bed.connect(&user, "phone", 1).await;
    let place = bed.position(&user, 4).await;
    let connected = bed.resume(&user, "phone", 2, place).await;
    assert_eq!((connected.cursor, connected.reset), (place, false));
    // Also where it computes no chain.
    let place = Position { chain: None, ..bed.position(&user, 2).await };
    let connected = bed.resume(&user, "phone", 3, place).await;
    assert_eq!((connected.cursor.seq, connected.reset), (Seq(2), false));
    assert_eq!(connected.cursor.chain, bed.position(&user, 2).await.chain);
}

async fn a_forgotten_device_resumes_at_the_position_in_its_hello(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=5).await;
    bed.connect(&user, "tablet", 1).await;
    bed.ack(&user, "tablet", 1, 4).await;
    let place = bed.position(&user, 2).await;
    let connected = bed.resume(&user, "phone", 2, place).await;
    assert_eq!((connected.cursor, connected.reset), (place, false));
}

async fn what_was_evicted_below_a_position_can_be_told(bed: Bed) {
    let bed = bed.with(|config| config.entries_max = 3).await;
    let user = bed.user("alice");
    bed.fill(&user, 1..=2).await;
    let place = bed.position(&user, 1).await;
    bed.fill(&user, 3..=9).await;
    let connected = bed.resume(&user, "phone", 1, place).await;
    assert_eq!((connected.cursor.seq, connected.reset), (Seq(1), false));
    let page = bed.page(&user, 1).await;
    assert_eq!((page.oldest, page.entries.len()), (Seq(7), 3));
}

async fn hazard_03_a_fork_resets_the_device_with_a_new_generation(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=5).await;
    bed.connect(&user, "tablet", 1).await;
    bed.connect(&user, "phone", 1).await;
    bed.ack(&user, "tablet", 1, 4).await;
    let place = Position { chain: Some(Chain(1)), ..bed.position(&user, 3).await };
    let connected = bed.resume(&user, "phone", 2, place).await;
    assert!(connected.reset);
    assert_eq!((connected.cursor.seq, connected.cursor.generation), (Seq(0), Generation(1)));
    // Hazard 8: what was sent before the reset is void, and the other device stays where it was.
    assert_eq!(bed.ack(&user, "phone", 2, 5).await, AckOutcome::Stale);
    assert_eq!(bed.state(&user, "phone").await.unwrap().cursor.seq, Seq(0));
    assert_eq!(bed.state(&user, "tablet").await.unwrap().cursor.seq, Seq(4));
    assert_eq!(bed.page(&user, 0).await.oldest, Seq(1));
}

async fn another_epoch_resets_the_device(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=5).await;
    let place = Position { epoch: Epoch(7), ..bed.position(&user, 3).await };
    let connected = bed.resume(&user, "phone", 1, place).await;
    assert!(connected.reset);
    assert_eq!((connected.cursor.seq, connected.cursor.generation), (Seq(0), Generation(1)));
}

async fn a_position_ahead_of_the_mailbox_resets_the_device(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=5).await;
    let place = Position { seq: Seq(6), ..bed.position(&user, 3).await };
    assert!(bed.resume(&user, "phone", 1, place).await.reset);
}

async fn an_older_generation_without_a_chain_is_reset_again(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=5).await;
    let forked = Position { chain: Some(Chain(1)), ..bed.position(&user, 3).await };
    assert!(bed.resume(&user, "phone", 1, forked).await.reset);
    // The device never heard of its reset.
    let place = Position { chain: None, ..forked };
    let connected = bed.resume(&user, "phone", 2, place).await;
    assert!(connected.reset);
    assert_eq!((connected.cursor.seq, connected.cursor.generation), (Seq(0), Generation(1)));
    // With a chain that agrees, it need not start over.
    let place = bed.position(&user, 3).await;
    let connected = bed.resume(&user, "phone", 3, place).await;
    assert_eq!((connected.reset, connected.cursor.seq), (false, Seq(3)));
    assert_eq!(connected.cursor.generation, Generation(1));
}

async fn a_newer_session_is_told_what_it_replaced(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    assert_eq!(bed.connect(&user, "phone", 2).await.replaced, Some(session(1)));
    let again = bed.connect(&user, "phone", 2).await; // the same call, sent again
    assert_eq!(again.replaced, None);
    let routes = bed.mailbox.read_routes(&user).await.unwrap();
    assert_eq!(routes.len(), 1);
    assert_eq!((&routes[0].session, &*routes[0].platform), (&session(2), "test-platform"));
}

async fn hazard_14_a_late_connect_of_an_older_attempt_is_superseded(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 2).await;
    // hazard 37: told which attempt that is, so that a device whose clock went back can count on.
    let superseded = ConnectOutcome::Superseded { by: Attempt(2) };
    assert_eq!(bed.hello(hello(&user, "phone", 1)).await, superseded);
    assert_eq!(bed.mailbox.read_routes(&user).await.unwrap()[0].session, session(2));
}

async fn the_fence_stays_when_the_newer_session_is_gone(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 2).await;
    bed.disconnect(&user, "phone", 2).await;
    let superseded = ConnectOutcome::Superseded { by: Attempt(2) };
    assert_eq!(bed.hello(hello(&user, "phone", 1)).await, superseded);
    let late = confirmation(&user, "phone", 1, bed.position(&user, 0).await);
    assert_eq!(bed.confirm(late).await, ConfirmOutcome::Superseded);
    bed.connect(&user, "phone", 3).await;
}

async fn hazard_24_the_device_unused_for_longest_is_forgotten(bed: Bed) {
    let bed = bed.with(|config| config.devices_max = 3).await;
    let user = bed.user("alice");
    for (n, device) in (1..).zip(["a", "b", "c"]) {
        bed.connect(&user, device, n).await;
        bed.disconnect(&user, device, n).await;
        sleep_ms(2).await;
    }
    bed.connect(&user, "a", 10).await;
    bed.disconnect(&user, "a", 10).await;
    bed.connect(&user, "d", 11).await;
    assert!(bed.state(&user, "b").await.is_none());
    for device in ["a", "c", "d"] {
        assert!(bed.state(&user, device).await.is_some(), "{device}");
    }
}

async fn devices_that_are_online_are_never_forgotten(bed: Bed) {
    let bed = bed.with(|config| config.devices_max = 2).await;
    let user = bed.user("alice");
    bed.connect(&user, "a", 1).await;
    bed.connect(&user, "b", 2).await;
    assert_eq!(bed.hello(hello(&user, "c", 3)).await, ConnectOutcome::TooManyDevices);
    assert_eq!(bed.mailbox.read_routes(&user).await.unwrap().len(), 2);
    bed.disconnect(&user, "b", 2).await;
    bed.connect(&user, "c", 4).await;
    assert!(bed.state(&user, "b").await.is_none());
}

async fn only_the_routes_own_session_removes_it(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.connect(&user, "phone", 2).await;
    bed.disconnect(&user, "phone", 1).await;
    assert_eq!(bed.mailbox.read_routes(&user).await.unwrap().len(), 1);
    bed.disconnect(&user, "phone", 2).await;
    assert!(bed.mailbox.read_routes(&user).await.unwrap().is_empty());
}

async fn a_message_after_connect_finds_the_device_online(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    let outcome = bed.accept(&user, 1, "a").await;
    assert!(matches!(outcome, AcceptOutcome::Accepted { online: true, .. }), "{outcome:?}");
    bed.disconnect(&user, "phone", 1).await;
    let outcome = bed.accept(&user, 2, "b").await;
    assert!(matches!(outcome, AcceptOutcome::Accepted { online: false, .. }), "{outcome:?}");
}

async fn hazard_12_confirm_restores_a_forgotten_route(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=3).await;
    bed.connect(&user, "phone", 1).await;
    bed.ack(&user, "phone", 1, 2).await;
    let place = Position { seq: Seq(2), ..bed.position(&user, 3).await };
    let place = Position { chain: Some(bed.headers(&user, 2).await[0].prev_chain), ..place };
    let confirmation = confirmation(&user, "phone", 1, place);
    let ConfirmOutcome::Confirmed { restored, epoch, newest } =
        bed.confirm(confirmation.clone()).await
    else {
        panic!()
    };
    assert_eq!((restored, epoch, newest), (false, place.epoch, Seq(3)));
    // A failover forgets the connect.
    let () = bed.query(&["DEL", &bed.key("r", &user)]).await;
    let () = bed.query(&["HDEL", &bed.key("h", &user), "d:phone", "n0"]).await;
    let () = bed.query(&["ZREM", &bed.key("t", &user), &format!("demo\0{}", user.user)]).await;
    let outcome = bed.confirm(confirmation).await;
    assert!(matches!(outcome, ConfirmOutcome::Confirmed { restored: true, .. }), "{outcome:?}");
    assert_eq!(bed.mailbox.read_routes(&user).await.unwrap()[0].session, session(1));
    assert_eq!(bed.state(&user, "phone").await.unwrap().cursor.seq, Seq(2));
    assert!(bed.timer(&user).await.is_some(), "it is behind: the timer is armed again");
}

async fn hazard_03_a_confirmed_position_of_another_history_is_not_believed(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "tablet", 1).await; // it acknowledges nothing: all entries are kept
    bed.connect(&user, "phone", 2).await;
    bed.fill(&user, 1..=3).await;
    for (chain, cursor) in [(Some(Chain(99)), Seq(0)), (bed.position(&user, 2).await.chain, Seq(2))]
    {
        // A failover forgets the device.
        let () = bed.query(&["HDEL", &bed.key("r", &user), "phone"]).await;
        let () = bed.query(&["HDEL", &bed.key("h", &user), "d:phone"]).await;
        let position = Position { chain, ..bed.position(&user, 2).await };
        bed.confirm(confirmation(&user, "phone", 2, position)).await;
        assert_eq!(bed.state(&user, "phone").await.unwrap().cursor.seq, cursor);
    }
}

async fn confirm_under_a_new_incarnation_takes_over_its_own_route(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    let mut confirmation = confirmation(&user, "phone", 1, bed.position(&user, 0).await);
    confirmation.session.incarnation = Incarnation(2);
    let outcome = bed.confirm(confirmation).await;
    assert!(matches!(outcome, ConfirmOutcome::Confirmed { restored: false, .. }), "{outcome:?}");
    let routes = bed.mailbox.read_routes(&user).await.unwrap();
    assert_eq!(routes[0].session.incarnation, Incarnation(2));
    bed.disconnect(&user, "phone", 1).await; // under the old incarnation
    assert_eq!(bed.mailbox.read_routes(&user).await.unwrap().len(), 1);
}

async fn confirm_of_a_replaced_session_is_superseded(bed: Bed) {
    let user = bed.user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.connect(&user, "phone", 2).await;
    let place = bed.position(&user, 0).await;
    let outcome = bed.confirm(confirmation(&user, "phone", 1, place)).await;
    assert_eq!(outcome, ConfirmOutcome::Superseded);
    // The other way round: the route of an older attempt came back after a failover.
    let mut newer = confirmation(&user, "phone", 3, place);
    newer.attempt = Attempt(3);
    let outcome = bed.confirm(newer).await;
    assert!(matches!(outcome, ConfirmOutcome::Confirmed { .. }), "{outcome:?}");
    assert_eq!(bed.mailbox.read_routes(&user).await.unwrap()[0].session, session(3));
}

async fn hazard_18_confirm_tells_of_a_new_epoch(bed: Bed) {
    let user = bed.user("alice");
    bed.fill(&user, 1..=3).await;
    bed.connect(&user, "phone", 1).await;
    let place = bed.position(&user, 3).await;
    bed.ack_at(&user, "phone", 1, place).await;
    let () = bed.query(&["DEL", &bed.key("h", &user), &bed.key("q", &user)]).await;
    let ConfirmOutcome::Confirmed { epoch, newest, restored } =
        bed.confirm(confirmation(&user, "phone", 1, place)).await
    else {
        panic!()
    };
    assert_ne!(epoch, place.epoch);
    assert_eq!((newest, restored), (Seq(0), false));
    bed.fill(&user, 4..=4).await;
    let header = bed.headers(&user, 0).await[0];
    assert_eq!((header.epoch, header.seq), (epoch, Seq(1)));
}
