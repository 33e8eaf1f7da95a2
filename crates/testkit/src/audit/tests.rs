//! A clean run is found clean, and every kind of fault that is planted into it is found.

use super::*;

const IN_A: [&str; 4] = ["a0", "a1", "a2", "a3"];

fn place(partition: i32, offset: i64) -> Place {
    Place { partition, offset }
}

fn payload(id: &str) -> String {
    format!("the payload of {id}")
}

/// Records for two users, entered in another order than Kafka's: reports of deliveries race.
fn audit() -> (Audit, Application, Application) {
    let mut audit = Audit::default();
    let (a, b) = (audit.application("a", "phone"), audit.application("b", "phone"));
    for (offset, id) in IN_A.iter().enumerate().rev() {
        audit.produced("a", place(0, 10 + offset as i64), id, &payload(id));
    }
    audit.produced("b", place(1, 0), "b0", &payload("b0"));
    audit.connected(a, "one");
    audit.connected(b, "two");
    audit.shown(b, "b0", &payload("b0"));
    (audit, a, b)
}

/// The run in which the first application is shown `ids`.
fn shown(ids: &[&str]) -> Vec<(Kind, String)> {
    let (mut audit, a, _) = audit();
    for id in ids {
        audit.shown(a, id, &payload(id));
    }
    found(&audit)
}

fn found(audit: &Audit) -> Vec<(Kind, String)> {
    audit.faults().into_iter().map(|fault| (fault.kind, fault.what)).collect()
}

fn one(kind: Kind, what: &str) -> Vec<(Kind, String)> {
    vec![(kind, what.into())]
}

#[test]
fn a_clean_run_has_no_faults() {
    assert_eq!(shown(&IN_A), []);
}

#[test]
fn what_is_owed_is_counted_down() {
    let (mut audit, a, _) = audit();
    assert_eq!(audit.missing_count(), 4);
    for id in IN_A {
        audit.shown(a, id, &payload(id));
    }
    assert_eq!(
        (audit.missing_count(), audit.shown_count(), audit.shown_to(a)),
        (0, 5, IN_A.to_vec())
    );
}

#[test]
fn a_loss_is_found_wherever_it_is() {
    assert_eq!(shown(&["a1", "a2", "a3"]), one(Kind::Lost, "a0"));
    assert_eq!(shown(&["a0", "a2", "a3"]), one(Kind::Lost, "a1"));
    assert_eq!(shown(&["a0", "a1", "a2"]), one(Kind::Lost, "a3"));
    assert_eq!(shown(&[]), IN_A.map(|id| (Kind::Lost, id.to_owned())));
}

#[test]
fn every_device_of_a_user_is_owed_everything() {
    let (mut audit, a, _) = audit();
    let tablet = audit.application("a", "tablet");
    for id in IN_A {
        audit.shown(a, id, &payload(id));
    }
    for id in &IN_A[..3] {
        audit.shown(tablet, id, &payload(id));
    }
    let faults = audit.faults();
    assert_eq!(found(&audit), one(Kind::Lost, "a3"));
    assert_eq!((faults[0].user.as_str(), faults[0].device.as_str()), ("a", "tablet"));
}

#[test]
fn disorder_is_found_and_those_that_kept_their_order_are_not_blamed() {
    assert_eq!(shown(&["a0", "a2", "a1", "a3"]), one(Kind::OutOfOrder, "a1"));
    assert_eq!(shown(&["a1", "a2", "a3", "a0"]), one(Kind::OutOfOrder, "a0"));
    let last_first = [(Kind::OutOfOrder, "a0".into()), (Kind::OutOfOrder, "a1".into())];
    assert_eq!(shown(&["a2", "a0", "a1", "a3"]), last_first);
}

#[test]
fn no_order_is_asked_across_partitions() {
    let (mut audit, a, _) = audit();
    audit.produced("a", place(3, 1), "other", "");
    for id in ["a0", "a1", "a2", "a3"] {
        audit.shown(a, id, &payload(id));
    }
    audit.shown(a, "other", "");
    assert_eq!(found(&audit), []);
}

#[test]
fn a_repeat_is_found_at_once_or_later_and_is_no_disorder() {
    assert_eq!(shown(&["a0", "a0", "a1", "a2", "a3"]), one(Kind::Repeated, "a0"));
    assert_eq!(shown(&["a0", "a1", "a2", "a3", "a0"]), one(Kind::Repeated, "a0"));
    let twice = [(Kind::Repeated, "a3".into()), (Kind::Repeated, "a3".into())];
    assert_eq!(shown(&["a0", "a1", "a2", "a3", "a3", "a3"]), twice);
}

#[test]
fn what_is_another_users_or_nobodys_is_found() {
    assert_eq!(shown(&["a0", "b0", "a1", "a2", "a3"]), one(Kind::WrongUser, "b0"));
    assert_eq!(shown(&["a0", "zz", "a1", "a2", "a3"]), one(Kind::Foreign, "zz"));
}

#[test]
fn an_altered_payload_is_found() {
    let (mut audit, a, _) = audit();
    for id in IN_A {
        audit.shown(a, id, &if id == "a2" { "something else".into() } else { payload(id) });
    }
    assert_eq!(found(&audit), one(Kind::Altered, "a2"));
}

/// Violations reported if the first application's session sees `events` and is then shown everything.
fn session(events: impl FnOnce(&mut Audit, Application)) -> Vec<(Kind, String)> {
    let (mut audit, a, _) = audit();
    events(&mut audit, a);
    for id in IN_A {
        audit.shown(a, id, &payload(id));
    }
    found(&audit)
}

#[test]
fn a_session_may_end_only_with_its_node() {
    let closed = one(Kind::Closed, "one");
    // Nobody harmed anything; another node was harmed; the node was harmed afterwards.
    assert_eq!(session(|audit, a| audit.disconnected(a, "1006", false)), closed);
    let other = |audit: &mut Audit, a| {
        audit.harm("two");
        audit.disconnected(a, "1006", false);
    };
    assert_eq!(session(other), closed);
    let afterwards = |audit: &mut Audit, a| {
        audit.disconnected(a, "1006", false);
        audit.harm("one");
    };
    assert_eq!(session(afterwards), closed);
    // Its own: while it is down, or noticed only once it is back.
    let harmed = |audit: &mut Audit, a| {
        audit.harm("one");
        audit.disconnected(a, "1006", false);
    };
    assert_eq!(session(harmed), []);
    let noticed_late = |audit: &mut Audit, a| {
        audit.harm("one");
        audit.heal("one");
        audit.disconnected(a, "1006", false);
    };
    assert_eq!(session(noticed_late), []);
}

#[test]
fn a_session_that_began_on_a_healed_node_must_hold() {
    let again = |audit: &mut Audit, a| {
        audit.harm("one");
        audit.disconnected(a, "1006", false);
        audit.disconnected(a, "nobody listens", false);
        audit.heal("one");
        audit.connected(a, "one");
        audit.disconnected(a, "4001", false);
    };
    assert_eq!(session(again), one(Kind::Closed, "one"));
}

#[test]
fn nobody_is_shut_out_for_good() {
    let refused = |audit: &mut Audit, a| {
        audit.harm("one");
        audit.disconnected(a, "4502", true);
    };
    assert_eq!(session(refused), one(Kind::Closed, "one"));
    let at_the_door = |audit: &mut Audit, a| {
        audit.harm("one");
        audit.disconnected(a, "1006", false);
        audit.disconnected(a, "401", true);
    };
    assert_eq!(session(at_the_door), one(Kind::Closed, "(no session)"));
}

#[test]
#[should_panic(expected = "a second time")]
fn ids_that_are_used_twice_cannot_be_checked() {
    let (mut audit, ..) = audit();
    audit.produced("a", place(0, 99), "a0", "");
}
