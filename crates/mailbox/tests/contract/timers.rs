//! Retry timers: accept and connect arm them, ack and disconnect disarm them, fire claims and defer postpones.

use barid_core::{Incarnation, NodeId, Seq};
use barid_mailbox::{AcceptMessage, AckOutcome, Unreached};
use barid_wire::envelope::{self, Envelope};

use crate::support::{Bed, Number, confirmation, contract, hello, message, session};

contract!(
    a_message_for_an_offline_user_arms_nothing,
    a_device_that_connects_behind_is_armed,
    fire_claims_once_and_backs_off,
    only_one_of_many_delayers_claims,
    hazard_15_a_claim_keeps_the_timer,
    hazard_16_each_device_has_its_own_due_time_and_resends,
    hazard_17_a_defer_after_the_ack_restores_nothing,
    a_defer_takes_the_resend_back,
    a_defer_of_another_claim_is_ignored,
    a_defer_leaves_a_device_whose_retries_began_again,
    hazard_17_fire_drops_who_is_not_behind,
    fire_shows_the_oldest_unacknowledged_entry_if_it_is_sampled,
    fire_drops_who_has_no_route,
    fire_drops_the_timer_of_a_forgotten_mailbox,
    hazard_19_a_time_far_ahead_is_due,
    a_disconnect_leaves_the_other_devices_timer,
    hazard_29_a_claim_given_back_again_and_again_waits_longer_and_longer,
    hazard_29_a_node_that_is_back_is_sent_to_at_once,
    hazard_29_devices_of_a_node_that_is_gone_are_put_off_where_they_are_claimed,
);

async fn a_message_for_an_offline_user_arms_nothing(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.fill(&user, 1..=2).await;
    assert_eq!(bed.timer(&user).await, None);
}

async fn a_device_that_connects_behind_is_armed(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.fill(&user, 1..=2).await;
    bed.connect(&user, "phone", 1).await;
    let state = bed.state(&user, "phone").await.unwrap();
    assert_eq!(Some(state.due_ms), bed.timer(&user).await);
    bed.make_due(&user).await;
    let due = bed.fire(&user).await.unwrap();
    assert_eq!((&due.devices[0].session, due.devices[0].resends), (&session(1), 1));
}

async fn fire_claims_once_and_backs_off(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    assert_eq!(bed.fire(&user).await, None, "not due yet");
    for resend in 1..=4_u32 {
        bed.make_due(&user).await;
        let due = bed.fire(&user).await.unwrap();
        assert_eq!(due.devices[0].resends, resend);
        assert_eq!(bed.timer(&user).await, Some(due.claimed_score));
        assert_eq!(bed.fire(&user).await, None, "claimed");
        let now = bed.mailbox.inspect(&user).await.unwrap().now_ms;
        let next = (bed.config.retry_base_ms << resend).min(bed.config.retry_max_ms);
        let wait = due.claimed_score - now;
        assert!(wait <= next && wait + 8_000 > next, "{resend}: {wait}");
    }
}

async fn only_one_of_many_delayers_claims(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    bed.make_due(&user).await;
    let claims = futures::future::join_all((0..8).map(|_| bed.fire(&user))).await;
    assert_eq!(claims.iter().flatten().count(), 1);
}

async fn hazard_15_a_claim_keeps_the_timer(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    bed.make_due(&user).await;
    bed.fire(&user).await.unwrap(); // and the delayer dies
    bed.make_due(&user).await;
    assert_eq!(bed.fire(&user).await.unwrap().devices[0].resends, 2);
}

async fn hazard_16_each_device_has_its_own_due_time_and_resends(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "tablet", 1).await;
    bed.connect(&user, "phone", 2).await;
    bed.fill(&user, 1..=1).await;
    bed.ack(&user, "phone", 2, 1).await;
    for resend in 1..=3_u32 {
        // The phone hears and acknowledges everything; the tablet is half-open.
        let before = bed.state(&user, "tablet").await.unwrap();
        let seq = u64::from(resend) + 1;
        bed.fill(&user, seq as i64..=seq as i64).await;
        bed.ack(&user, "phone", 2, seq).await;
        let after = bed.state(&user, "tablet").await.unwrap();
        assert_eq!((after.due_ms, after.resends), (before.due_ms, before.resends));
        assert_eq!(bed.timer(&user).await, Some(after.due_ms), "the tablet's time stands");
        bed.make_due(&user).await;
        let due = bed.fire(&user).await.expect("the tablet is due");
        assert_eq!(due.devices.len(), 1);
        assert_eq!((due.devices[0].device.as_str(), due.devices[0].resends), ("tablet", resend));
    }
    // And the phone's next message starts with its own first attempt.
    bed.fill(&user, 50..=50).await;
    assert_eq!(bed.state(&user, "phone").await.unwrap().resends, 0);
    assert_eq!(bed.state(&user, "tablet").await.unwrap().resends, 3);
    bed.make_due(&user).await;
    let due = bed.fire(&user).await.unwrap();
    let phone = due.devices.iter().find(|due| due.device.as_str() == "phone").unwrap();
    assert_eq!(phone.resends, 1);
}

async fn hazard_17_a_defer_after_the_ack_restores_nothing(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    bed.make_due(&user).await;
    let due = bed.fire(&user).await.unwrap();
    bed.ack(&user, "phone", 1, 1).await;
    bed.defer(&due, Unreached::Down).await;
    assert_eq!(bed.timer(&user).await, None);
    assert_eq!(bed.state(&user, "phone").await.unwrap().due_ms, 0);
}

async fn a_defer_takes_the_resend_back(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    bed.make_due(&user).await;
    for _ in 0..6 {
        let due = bed.fire(&user).await.unwrap();
        assert_eq!(due.devices[0].resends, 1, "an outage inside is not the device's failure");
        bed.defer(&due, Unreached::Away).await;
        let timer = bed.timer(&user).await.unwrap();
        assert!(timer < due.claimed_score, "due again before the claim would have been");
        assert_eq!(bed.fire(&user).await, None);
        bed.make_due(&user).await;
    }
}

async fn a_defer_of_another_claim_is_ignored(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    bed.make_due(&user).await;
    let first = bed.fire(&user).await.unwrap();
    bed.make_due(&user).await;
    let second = bed.fire(&user).await.unwrap();
    bed.defer(&first, Unreached::Down).await;
    assert_eq!(bed.timer(&user).await, Some(second.claimed_score));
    assert_eq!(bed.state(&user, "phone").await.unwrap().resends, 2);
}

async fn a_defer_leaves_a_device_whose_retries_began_again(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "tablet", 1).await;
    bed.connect(&user, "phone", 2).await;
    bed.fill(&user, 1..=1).await;
    bed.make_due(&user).await;
    // Due before a phone that begins anew, but not now: its time is the score of the claim.
    let soon = bed.mailbox.inspect(&user).await.unwrap().now_ms + 500;
    bed.set_device(&user, "tablet", Number::Due, soon).await;
    let due = bed.fire(&user).await.unwrap();
    assert_eq!((due.devices.len(), due.claimed_score), (1, soon));
    bed.connect(&user, "phone", 3).await;
    let began = bed.state(&user, "phone").await.unwrap();
    assert_eq!((began.resends, bed.timer(&user).await), (0, Some(soon)));
    bed.defer(&due, Unreached::Void).await;
    let state = bed.state(&user, "phone").await.unwrap();
    assert_eq!((state.resends, state.due_ms), (0, began.due_ms));
}

async fn hazard_17_fire_drops_who_is_not_behind(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    bed.ack(&user, "phone", 1, 1).await;
    // Somebody's late defer of an older version put it back.
    let member = format!("demo\0{}", user.user);
    let () = bed.query(&["ZADD", &bed.key("t", &user), "1", &member]).await;
    assert_eq!(bed.fire(&user).await, None);
    assert_eq!(bed.timer(&user).await, None);
}

async fn fire_shows_the_oldest_unacknowledged_entry_if_it_is_sampled(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    let trace =
        |flags: &str| format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}");
    for (offset, traceparent) in [(1, String::new()), (2, trace("01")), (3, trace("00"))] {
        let id = format!("m{offset}");
        let body = Envelope { id: id.clone(), taken_at_ms: 7, traceparent, ..Default::default() };
        let message =
            AcceptMessage { body: envelope::encode_body(body), ..message(&user, offset, &id) };
        bed.accept_message(message).await;
    }
    for (acknowledged, shown) in [(0, None), (1, Some("m2")), (2, None)] {
        bed.ack(&user, "phone", 1, acknowledged).await;
        bed.make_due(&user).await;
        let due = bed.fire(&user).await.unwrap();
        assert!(due.late_ms > 60_000, "it was due in 1970");
        let entry = due.devices[0].sampled.clone();
        let entry = (!entry.is_empty()).then(|| envelope::decode(entry).unwrap().1);
        assert_eq!(entry.as_ref().map(|entry| entry.id.as_str()), shown);
    }
}

async fn fire_drops_who_has_no_route(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    let () = bed.query(&["DEL", &bed.key("r", &user)]).await;
    bed.make_due(&user).await;
    assert_eq!(bed.fire(&user).await, None);
    assert_eq!(bed.timer(&user).await, None);
}

async fn fire_drops_the_timer_of_a_forgotten_mailbox(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    let () = bed.query(&["DEL", &bed.key("h", &user), &bed.key("q", &user)]).await;
    bed.make_due(&user).await;
    assert_eq!(bed.fire(&user).await, None);
    assert_eq!(bed.timer(&user).await, None);
}

async fn hazard_19_a_time_far_ahead_is_due(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    bed.fill(&user, 1..=1).await;
    // The master before this one had a clock an hour ahead.
    let far = bed.timer(&user).await.unwrap() + 3_600_000;
    let member = format!("demo\0{}", user.user);
    let () = bed.query(&["ZADD", &bed.key("t", &user), &far.to_string(), &member]).await;
    for (number, value) in [(Number::Due, far), (Number::Attempt, 2), (Number::Used, far)] {
        bed.set_device(&user, "phone", number, value).await;
    }
    let due = bed.fire(&user).await.expect("due now");
    assert_eq!(due.devices[0].resends, 3);
    assert!(due.claimed_score < far - 3_000_000);
    assert_eq!(bed.fire(&user).await, None, "and backed off from now on");
}

async fn a_disconnect_leaves_the_other_devices_timer(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "tablet", 1).await;
    bed.connect(&user, "phone", 2).await;
    bed.fill(&user, 1..=1).await;
    bed.disconnect(&user, "phone", 2).await;
    let state = bed.state(&user, "tablet").await.unwrap();
    assert_eq!(bed.timer(&user).await, Some(state.due_ms));
    bed.disconnect(&user, "tablet", 1).await;
    assert_eq!(bed.timer(&user).await, None);
}

async fn hazard_29_a_claim_given_back_again_and_again_waits_longer_and_longer(bed: Bed) {
    let waits: [(Unreached, &[u64]); 4] = [
        (Unreached::Down, &[500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]),
        (Unreached::Full, &[2_000, 4_000, 8_000, 16_000, 32_000, 60_000]),
        (Unreached::Void, &[60_000, 60_000]),
        (Unreached::Away, &[500, 500, 500]),
    ];
    for (n, (why, waits)) in waits.into_iter().enumerate() {
        let user = bed.timed_user(&format!("alice-{n}"));
        bed.connect(&user, "phone", 1).await;
        bed.fill(&user, n as i64 + 1..=n as i64 + 1).await;
        for wait in waits {
            bed.make_due(&user).await;
            let due = bed.fire(&user).await.unwrap();
            assert_eq!(due.devices[0].resends, 1);
            let before = bed.mailbox.inspect(&user).await.unwrap().now_ms;
            bed.defer(&due, why).await;
            let inspection = bed.mailbox.inspect(&user).await.unwrap();
            let timer = inspection.timer_due_ms.unwrap();
            let due = before + wait..=inspection.now_ms + wait;
            assert!(due.contains(&timer), "{why:?}: {timer} is not in {due:?}");
        }
    }
}

async fn hazard_29_a_node_that_is_back_is_sent_to_at_once(bed: Bed) {
    let base = bed.config.retry_base_ms;
    for (n, what) in ["confirm", "connect", "ack of some", "ack of all"].into_iter().enumerate() {
        let user = bed.timed_user(&format!("alice-{n}"));
        bed.connect(&user, "phone", 1).await;
        bed.fill(&user, 10 * n as i64 + 1..=10 * n as i64 + 2).await;
        for _ in 0..8 {
            bed.make_due(&user).await;
            let due = bed.fire(&user).await.unwrap();
            bed.defer(&due, Unreached::Down).await;
        }
        let before = bed.mailbox.inspect(&user).await.unwrap();
        assert!(before.timer_due_ms.unwrap() > before.now_ms + 2 * base);
        match what {
            "confirm" => {
                let position = bed.position(&user, 0).await;
                bed.confirm(confirmation(&user, "phone", 1, position)).await;
            }
            "connect" => drop(bed.connect(&user, "phone", 2).await),
            "ack of some" => {
                assert_eq!(
                    bed.ack(&user, "phone", 1, 1).await,
                    AckOutcome::Advanced { cursor: Seq(1) }
                );
            }
            _ => drop(bed.ack(&user, "phone", 1, 2).await),
        }
        let after = bed.mailbox.inspect(&user).await.unwrap();
        match after.timer_due_ms {
            None => assert_eq!(what, "ack of all"),
            Some(due) => assert!(due <= after.now_ms + base, "{what}"),
        }
        let state = bed.state(&user, "phone").await.unwrap();
        assert_eq!((state.defers, state.resends), (0, 0), "{what}: it begins anew");
    }
}

async fn hazard_29_devices_of_a_node_that_is_gone_are_put_off_where_they_are_claimed(bed: Bed) {
    let user = bed.timed_user("alice");
    bed.connect(&user, "phone", 1).await;
    let mut tablet = hello(&user, "tablet", 2);
    tablet.session.node = NodeId::new("node-2").unwrap();
    bed.hello(tablet).await;
    bed.fill(&user, 1..=1).await;
    let (node, incarnation) = (session(1).node, session(1).incarnation);
    let claim = async |gone: &[(NodeId, Incarnation)]| {
        bed.make_due(&user).await;
        let (shard, retry) = (bed.mailbox.shard_of(&user), bed.config.retry().unwrap());
        let due = bed.mailbox.fire_past(&[shard], 1_000, &retry, gone).await.unwrap();
        due.into_iter().find(|due| due.user == user).expect("it is due")
    };
    let due =
        claim(&[(node.clone(), incarnation), (NodeId::new("node-3").unwrap(), incarnation)]).await;
    assert_eq!((due.put_off, due.devices.len()), (1, 1));
    assert_eq!(due.devices[0].device.as_str(), "tablet");
    let now = bed.mailbox.inspect(&user).await.unwrap().now_ms;
    let phone = bed.state(&user, "phone").await.unwrap();
    assert_eq!((phone.resends, phone.defers), (0, 1), "no try of the device");
    let longest = bed.config.retry_max_ms;
    assert!((now + longest - 10_000..=now + longest).contains(&phone.due_ms), "{phone:?} at {now}");
    assert_eq!(bed.timer(&user).await, Some(due.claimed_score), "the tablet's claim");
    // Nobody is left: it is claimed all the same, and counted.
    let alone =
        claim(&[(node.clone(), incarnation), (NodeId::new("node-2").unwrap(), incarnation)]).await;
    assert_eq!((alone.put_off, alone.devices.len()), (2, 0));
    // A later incarnation of it is not gone.
    let due = claim(&[(node, Incarnation(incarnation.0 + 1))]).await;
    assert_eq!((due.put_off, due.devices.len()), (0, 2));
}
