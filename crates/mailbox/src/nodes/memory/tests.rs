use super::*;
use crate::NodeRole;

const STALE: Duration = Duration::from_secs(4);
const SECOND: Duration = Duration::from_secs(1);

fn id(id: &str) -> NodeId {
    NodeId::new(id).unwrap()
}

fn record(name: &str, incarnation: u64) -> NodeRecord {
    NodeRecord::new(NodeRole::Access, id(name), Incarnation(incarnation), "127.0.0.1:1")
}

fn stamp(incarnation: u64, number: u64) -> Stamp {
    Stamp { incarnation: Incarnation(incarnation), number }
}

fn ids(view: &[NodeRecord]) -> Vec<&str> {
    view.iter().map(|record| record.id.as_str()).collect()
}

/// A copy at a master whose time is 1000.
fn copy(name: &str, incarnation: u64, number: u64, ends: u64) -> Copy {
    let record = Some(record(name, incarnation));
    Copy { stamp: stamp(incarnation, number), ends, released: false, layout: Some(3), record }
}

fn seen(copies: impl IntoIterator<Item = Copy>, own: Own) -> Evidence {
    let mut evidence = Evidence { own, ..Evidence::default() };
    copies.into_iter().for_each(|copy| evidence.add(copy, 1000));
    evidence
}

fn all(nodes: impl IntoIterator<Item = (&'static str, Evidence)>) -> Reading {
    let nodes = nodes.into_iter().map(|(name, evidence)| (id(name), evidence)).collect();
    Reading { nodes, began: Instant::now(), complete: true, any: true }
}

/// Those that live, in these incarnations; those that should and do not.
fn read(living: &[(&'static str, u64)], lapsed: &'static str) -> Reading {
    let living = living.iter().map(|(name, incarnation)| {
        let held = Own::Held(stamp(*incarnation, 1), record(name, *incarnation));
        (*name, seen([], held))
    });
    let lapsed = lapsed.split_whitespace().map(|name| (name, seen([], Own::Absent)));
    all(living.chain(lapsed))
}

fn held(name: &str) -> Evidence {
    seen([], Own::Held(stamp(1, 1), record(name, 1)))
}

fn released_copy(name: &str, incarnation: u64, number: u64) -> Copy {
    Copy { released: true, ..copy(name, incarnation, number, 1000) }
}

#[test]
fn hazard_13_mass_death_is_believed_only_after_a_while() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    let b = id("b");
    memory.update(read(&[("a", 1), ("b", 1), ("c", 1)], ""), t);
    assert_eq!(ids(&memory.update(read(&[("a", 1)], "b c"), t)), ["a", "b", "c"]);
    assert_eq!(memory.void_since(&b, Incarnation(1), t), None);
    let t = t + DISBELIEF;
    assert_eq!(ids(&memory.update(read(&[("a", 1)], "b c"), t)), ["a"]);
    assert_eq!(memory.void_since(&b, Incarnation(1), t), Some(Duration::ZERO));
}

#[test]
fn leases_that_were_given_up_are_gone_at_once() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    memory.update(read(&[("a", 1), ("b", 1)], ""), t);
    let released = || seen([released_copy("a", 1, 9), copy("a", 1, 8, 2000)], Own::Absent);
    let both = all([("a", released()), ("b", seen([released_copy("b", 1, 9)], Own::Unreadable))]);
    assert!(memory.update(both, t).is_empty());
    // A failover brings an older copy back, without the news that it was given up.
    let back = all([("a", seen([copy("a", 1, 8, 2000)], Own::Absent))]);
    assert!(memory.update(back, t).is_empty());
    // But not when the index was lost with them.
    memory.update(read(&[("a", 2), ("b", 2)], ""), t);
    assert_eq!(ids(&memory.update(read(&[], "a b"), t)), ["a", "b"]);
}

#[test]
fn one_death_is_believed_at_once_and_its_time_counts() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    memory.update(read(&[("a", 1), ("b", 1)], ""), t);
    assert_eq!(ids(&memory.update(read(&[("a", 1)], "b c"), t)), ["a"]);
    let later = Duration::from_secs(9);
    for second in 1..=9 {
        memory.update(read(&[("a", 1)], "b c"), t + SECOND * second);
    }
    assert_eq!(memory.void_since(&id("b"), Incarnation(1), t + later), Some(later));
}

#[test]
fn hazard_28_a_node_that_cannot_be_read_keeps_its_last_record_and_is_not_missing() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    memory.update(read(&[("a", 1), ("b", 1), ("c", 1)], ""), t);
    let hidden = |name| (name, seen([], Own::Unreadable));
    let half = || {
        let mut half = all([hidden("a"), hidden("b"), ("c", seen([], Own::Absent))]);
        half.complete = false;
        half
    };
    // Of those that can be read, most are missing.
    assert_eq!(ids(&memory.update(half(), t)), ["a", "b", "c"]);
    let later = t + DISBELIEF;
    assert_eq!(ids(&memory.update(half(), later)), ["a", "b"]);
    assert_eq!(memory.void_since(&id("a"), Incarnation(1), later), None);
    // Unknown incarnations may be on the master that does not answer.
    assert_eq!(memory.void_since(&id("d"), Incarnation(1), later), None);
    // Once c cannot be read either, nobody can tell since when it is gone.
    let last = later + SECOND * 60;
    memory.update(all([hidden("a"), hidden("b"), hidden("c")]), last);
    assert_eq!(memory.void_since(&id("c"), Incarnation(1), last), Some(Duration::ZERO));
    // Nobody answers at all.
    let silence = last + STALE + SECOND;
    let nothing = Reading { nodes: HashMap::new(), began: silence, complete: false, any: false };
    memory.update(nothing, silence);
    assert_eq!(memory.void_since(&id("c"), Incarnation(1), silence), None);
}

#[test]
fn hazard_62_a_life_is_void_only_by_readings_in_which_every_master_answered() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    let (a, b) = (id("a"), id("b"));
    memory.update(read(&[("a", 1), ("b", 1), ("c", 1)], ""), t);
    // The reader reaches the master of a's own key only, and a reaches the others only.
    let mut now = t;
    for _ in 0..600 {
        now += SECOND;
        let mut half = read(&[("b", 1), ("c", 1)], "a");
        half.complete = false;
        assert_eq!(ids(&memory.update(half, now)), ["b", "c"]);
    }
    assert!(memory.void_since(&a, Incarnation(1), now).unwrap() <= SECOND);
    // A moment without a master is none in which a lease could come and end.
    let half = |complete| {
        let mut half = read(&[("c", 1)], "a b");
        half.complete = complete;
        half
    };
    memory.update(half(true), now);
    for second in 1..20 {
        memory.update(half(second % 3 == 0), now + SECOND * second);
    }
    let nineteen = now + SECOND * 19;
    assert_eq!(memory.void_since(&b, Incarnation(1), nineteen), Some(SECOND * 19));
    // Nor can a reader tell that was stopped itself.
    let later = now + SECOND * 700;
    memory.update(half(true), later);
    assert_eq!(memory.void_since(&b, Incarnation(1), later), Some(Duration::ZERO));
}

#[test]
fn hazard_64_a_life_that_was_given_up_does_not_hide_the_end_of_a_later_one() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    // The later one could not be written where the former one was given up.
    let released = |own| all([("a", seen([released_copy("a", 1, 9)], own)), ("b", held("b"))]);
    let all = released(Own::Held(stamp(2, 1), record("a", 2)));
    assert_eq!(ids(&memory.update(all, t)), ["a", "b"]);
    assert_eq!(ids(&memory.update(released(Own::Unreadable), t)), ["a", "b"]);
    assert_eq!(ids(&memory.update(released(Own::Absent), t)), ["b"]);
}

#[test]
fn hazard_85_a_late_copy_of_an_earlier_life_does_not_hide_the_later_one() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    memory.update(read(&[("a", 9), ("b", 1), ("c", 1)], ""), t);
    // The only master that answers executed queued writings of the earlier incarnation.
    let late = |own| {
        let mut evidence = seen([copy("a", 4, 7, 2000)], own);
        evidence.known = Some(stamp(9, 1));
        evidence
    };
    assert!(late(Own::Unasked).is_open(), "its own key is asked");
    let reading = |own| all([("a", late(own)), ("b", held("b")), ("c", held("c"))]);
    let held = Own::Held(stamp(9, 2), record("a", 9));
    for own in [Own::Unreadable, held] {
        assert_eq!(ids(&memory.update(reading(own), t)), ["a", "b", "c"]);
        assert_eq!(memory.void_since(&id("a"), Incarnation(9), t), None);
    }
    // Its own key is gone: Redis went back, and shows the earlier incarnation only.
    memory.update(reading(Own::Absent), t);
    assert_eq!(memory.void_since(&id("a"), Incarnation(9), t), Some(Duration::ZERO));
}

#[test]
fn nodes_that_are_gone_for_good_are_forgotten() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    memory.update(read(&[("a", 1), ("b", 1), ("c", 1)], ""), t);
    let after = |seconds| t + SECOND * seconds;
    for seconds in (2..3_602).step_by(3) {
        memory.update(read(&[("a", 1), ("b", 1)], "c"), after(seconds));
        assert_eq!(memory.known().count(), 3, "{seconds}");
    }
    let now = after(3_602);
    memory.update(read(&[("a", 1), ("b", 1)], "c"), now);
    assert_eq!(memory.known().count(), 2);
    // A route that it left somewhere counts from when it is found, as one of a stranger.
    assert_eq!(memory.void_since(&id("c"), Incarnation(1), now), Some(Duration::ZERO));
}

#[test]
fn hazard_28_a_fresh_reader_sees_whoever_has_one_readable_copy() {
    let t = Instant::now();
    let cases: [(&str, Evidence); 5] = [
        ("a", seen([copy("a", 1, 3, 2000)], Own::Unreadable)),
        ("b", seen([copy("b", 1, 3, 900), copy("b", 1, 4, 1001)], Own::Absent)),
        ("c", seen([copy("c", 1, 3, 1000)], Own::Unreadable)),
        ("d", seen([released_copy("d", 1, 3), copy("d", 1, 4, 2000)], Own::Absent)),
        ("e", seen([released_copy("e", 1, 5), copy("e", 1, 4, 2000)], Own::Unreadable)),
    ];
    assert_eq!(ids(&Memory::new(STALE).update(all(cases), t)), ["a", "b", "d"]);
}

#[test]
fn hazard_27_a_former_life_is_void_once_the_later_one_is_confirmed() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    let a = id("a");
    memory.update(read(&[("a", 4)], ""), t);
    let found = |confirmed, number| {
        let record = NodeRecord { confirmed, ..record("a", 9) };
        all([("a", seen([], Own::Held(stamp(9, number), record)))])
    };
    memory.update(found(false, 1), t);
    for after in [0, 3_600, 86_400] {
        let now = t + SECOND * after;
        memory.update(found(false, 1), now);
        assert_eq!(memory.void_since(&a, Incarnation(4), now), None, "it lives on");
    }
    let now = t + SECOND * 86_401;
    memory.update(found(true, 2), now);
    assert_eq!(memory.void_since(&a, Incarnation(4), now), Some(Duration::MAX));
    assert_eq!(memory.void_since(&a, Incarnation(9), now), None);
    // A failover brings the record of the former incarnation back.
    memory.update(read(&[("a", 4)], ""), now);
    assert_eq!(memory.void_since(&a, Incarnation(9), now), None);
    assert_eq!(memory.void_since(&a, Incarnation(4), now), Some(Duration::MAX));
    // Newer than the view, perhaps: nothing is removed for it soon.
    assert_eq!(memory.void_since(&a, Incarnation(10), now), Some(Duration::ZERO));
    // Redis away: nobody can tell.
    assert_eq!(memory.void_since(&a, Incarnation(11), now + STALE * 2), None);
}

#[test]
fn nodes_are_known_to_be_gone_only_for_a_while_after_a_reading() {
    let (mut memory, t) = (Memory::new(STALE), Instant::now());
    let reading =
        |living: &[(&'static str, u64)], lapsed| Reading { began: t, ..read(living, lapsed) };
    memory.update(reading(&[("a", 1), ("b", 1)], ""), t);
    memory.update(reading(&[("a", 1)], "b"), t);
    let gone = |at| memory.gone_for_less_than(SECOND * 10, at);
    assert_eq!(gone(t + FRESH), [(id("b"), Incarnation(1))]);
    assert_eq!(gone(t + FRESH + Duration::from_millis(1)), []);
}
