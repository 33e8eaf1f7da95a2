use std::task::{Context, Waker};

use barid_core::{Chain, Epoch, Seq};
use barid_wire::envelope::{Envelope, Header, encode_body, set_payload};
use barid_wire::frames::{Encoding, ServerFrame, decode_server};
use barid_wire::v1::BodyKind;
use proptest::prelude::*;

use barid_wire::frames::Format;

use super::*;
use crate::fanout::Listener;
use crate::handle::tests::handle;

const NOW: Received = Received { now_ms: 0, now: 0, dispatched_after_us: None };

fn fanout(fanout_bytes_max: usize) -> (Fanout, Metrics) {
    let metrics = Metrics::new(&prometheus::Registry::new(), 1).unwrap();
    let limits = LimitsConfig { fanout_bytes_max, ..Default::default() };
    (Fanout::new(&limits, 600, &metrics), metrics)
}

fn demo() -> AppId {
    AppId::new("demo").unwrap()
}

fn eng() -> GroupId {
    GroupId::new("eng").unwrap()
}

fn entry(seq: u64, bytes: usize) -> Bytes {
    let (seq, chain) = (Seq(seq), Chain(0));
    let header = Header { epoch: Epoch(1), seq, prev_chain: chain, chain, accepted_at_us: 0 };
    let mut envelope = Envelope { id: format!("m{seq}"), ..Default::default() };
    set_payload(&mut envelope, vec![b'x'; bytes].into(), 1000, 3);
    [&header.encode()[..], &encode_body(envelope)].concat().into()
}

/// Redis lists the node for all audiences; their mailboxes do not exist yet.
fn open(fanout: &Fanout) {
    let head = Point { epoch: Epoch(0), seq: Seq(0), chain: Chain::START };
    loop {
        let due = fanout.listings.lock().next();
        let Some(due) = due else { return };
        fanout.listed(&due, head);
    }
}

/// The messages that a session would write, and the number that it missed.
fn read_all(listener: &mut Listener, format: Format) -> (Vec<Bytes>, u32) {
    let (mut frames, mut missed) = (Vec::new(), 0);
    loop {
        let read = listener.read(format);
        missed += read.missed;
        match read.run {
            Some(run) => frames.push(run.frame),
            None if read.restart.is_some() => {}
            None => return (frames, missed),
        }
    }
}

fn seqs(frame: &Bytes) -> Vec<u64> {
    let head = match frame[1] {
        126 => 4,
        127 => 10,
        _ => 2,
    };
    match decode_server(Encoding::Proto, frame.slice(head..)).unwrap() {
        ServerFrame::Deliver(deliver) => deliver.messages.iter().map(|m| m.seq).collect(),
        other => panic!("no delivery: {other:?}"),
    }
}

#[test]
fn each_member_is_on_the_hops_with_one_message_in_sixteen_and_a_trace_is_told_once() {
    let (fanout, _) = fanout(1 << 20);
    let mut listeners: Vec<_> =
        (0..3).map(|n| Listener::new(&fanout, &handle(n), vec![], vec![])).collect();
    open(&fanout);
    let mut counted = Vec::new();
    let mut traced = Vec::new();
    for seq in 0..64 {
        let header = Header {
            epoch: Epoch(1),
            seq: Seq(seq + 1),
            prev_chain: Chain(0),
            chain: Chain(0),
            accepted_at_us: 1_000_000 * seq,
        };
        let mut envelope = Envelope { produced_at_ms: 7 + seq, ..Default::default() };
        if seq % 32 == 5 {
            envelope.id = format!("m{seq}");
            envelope.traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into();
        }
        let entry = [&header.encode()[..], &encode_body(envelope)].concat().into();
        let received = Received { dispatched_after_us: Some(5), ..NOW };
        fanout.receive(&demo(), &Name::Everyone, entry, received).unwrap();
        for (member, listener) in listeners.iter_mut().enumerate() {
            let read = listener.read(Format::Proto);
            let Some(report) = read.report else { continue };
            assert_eq!(&*report.mailbox, "everyone");
            if let Some(hop) = report.hop {
                assert_eq!(hop, (1_000_000 * seq + 5, 7 + seq));
                counted.push((member, seq));
            }
            traced.extend(report.traced.into_iter().map(|entry| (member, entry.id)));
        }
    }
    let of = |member| counted.iter().filter(|(of, _)| *of == member).count();
    assert_eq!([of(0), of(1), of(2)], [4, 4, 4], "{counted:?}");
    assert!(counted.windows(2).all(|two| two[0].1 != two[1].1), "not all at once: {counted:?}");
    assert_eq!(traced, [(0, "m5".to_owned()), (0, "m37".to_owned())]);
    // Of a burst that is read at once, the oldest counts.
    for seq in 65..81 {
        fanout.receive(&demo(), &Name::Everyone, self::entry(seq, 1), NOW).unwrap();
    }
    let reports = listeners.iter_mut().filter_map(|listener| listener.read(Format::Proto).report);
    assert_eq!(reports.filter_map(|report| report.hop).collect::<Vec<_>>(), [(0, 0)]);
    // Messages that have left the log are not waited for.
    fanout.sweep(Seconds::MAX);
    assert_eq!(fanout.audience(&demo(), &Name::Everyone).unwrap().held(), 0);
}

#[test]
fn a_burst_is_joined_once_an_encoding_for_all_members() {
    let (fanout, _) = fanout(1 << 20);
    let handles: Vec<_> = (0..3).map(handle).collect();
    let mut listeners: Vec<_> =
        handles.iter().map(|handle| Listener::new(&fanout, handle, vec![], vec![])).collect();
    open(&fanout);
    for seq in 1..=100 {
        let taken = fanout.receive(&demo(), &Name::Everyone, entry(seq, 100), NOW).unwrap();
        assert_eq!(taken, FanoutResult::Told);
    }
    let mut frames = Vec::new();
    for listener in &mut listeners[..2] {
        let (read, missed) = read_all(listener, Format::Proto);
        assert_eq!((read.len(), missed), (1, 0), "one frame for all of them");
        frames.extend(read);
    }
    assert_eq!(frames[0].as_ptr(), frames[1].as_ptr());
    assert_eq!(seqs(&frames[0]), (1..=100).collect::<Vec<_>>());
    let (json, _) = read_all(&mut listeners[2], Format::Json);
    assert_eq!(json[0][0], 0x81, "text");
    assert!(json[0].ends_with(b",\"mailbox\":\"everyone\"}}"));
    fanout.sweep(100);
    assert_eq!(fanout.room.held(), 0);
}

#[test]
fn a_body_that_is_no_json_is_left_out_of_json_and_of_nothing_else() {
    let (fanout, _) = fanout(1 << 20);
    let (one, other) = (handle(1), handle(2));
    let mut proto = Listener::new(&fanout, &one, vec![], vec![]);
    let mut json = Listener::new(&fanout, &other, vec![], vec![]);
    open(&fanout);
    let header = Header::parse(&entry(1, 1)).unwrap();
    let mut envelope = Envelope { id: "m1".into(), ..Default::default() };
    envelope.set_kind(BodyKind::Json);
    envelope.payload = Bytes::from_static(b"{");
    let broken = [&header.encode()[..], &encode_body(envelope)].concat().into();
    fanout.receive(&demo(), &Name::Everyone, broken, NOW).unwrap();
    assert_eq!(read_all(&mut proto, Format::Proto).0.len(), 1);
    let read = json.read(Format::Json);
    assert_eq!(read.run.map(|run| run.messages), Some(0), "it goes on behind it");
    fanout.receive(&demo(), &Name::Everyone, entry(2, 1), NOW).unwrap();
    assert_eq!(read_all(&mut json, Format::Json).0.len(), 1);
}

#[test]
fn audiences_are_there_while_they_have_members() {
    let (fanout, metrics) = fanout(1 << 20);
    let (one, other) = (handle(1), handle(2));
    let mut first = Listener::new(&fanout, &one, vec![eng()], vec![]);
    let second = Listener::new(&fanout, &other, vec![], vec![]);
    first.subscribe(&fanout, &one, &eng(), 1).unwrap();
    open(&fanout);
    assert_eq!(metrics.subscriptions.get(), 1);
    let to_eng = || fanout.receive(&demo(), &Name::Group(eng()), entry(1, 1), NOW).unwrap();
    assert_eq!(to_eng(), FanoutResult::Told);
    first.leave(&fanout, &demo());
    assert_eq!((to_eng(), metrics.subscriptions.get()), (FanoutResult::Nobody, 0));
    assert_eq!(fanout.apps.lock().len(), 1);
    second.leave(&fanout, &demo());
    assert!(fanout.apps.lock().is_empty());
    assert_eq!(
        fanout.receive(&demo(), &Name::Everyone, entry(2, 1), NOW).unwrap(),
        FanoutResult::Nobody
    );
    fanout.sweep(100);
    assert!(fanout.holding.lock().is_empty());
    assert_eq!(fanout.room.held(), 0);
}

#[test]
fn a_busy_audience_does_not_silence_a_sessions_others() {
    let (fanout, _) = fanout(1 << 20);
    let one = handle(1);
    let mut listener = Listener::new(&fanout, &one, vec![eng()], vec![]);
    listener.subscribe(&fanout, &one, &eng(), 1).unwrap();
    open(&fanout);
    fanout.receive(&demo(), &Name::Group(eng()), entry(1, 1), NOW).unwrap();
    let mut turns = 0;
    for seq in 1..10 {
        fanout.receive(&demo(), &Name::Everyone, entry(seq, 1), NOW).unwrap();
        // The first message of each begins a history.
        let run = std::iter::from_fn(|| Some(listener.read(Format::Json)));
        let run = run.take(3).find_map(|read| read.run).unwrap();
        turns += 1;
        if run.frame.ends_with(b"\"eng\"}}") {
            break;
        }
    }
    assert!(turns <= 2, "after {turns} runs");
}

/// How many of these were told, and not before.
fn told(handles: &[Arc<Handle>]) -> usize {
    let cx = Context::from_waker(Waker::noop());
    handles.iter().filter(|handle| handle.poll_take(&cx).is_ready()).count()
}

#[tokio::test]
async fn other_tasks_have_their_turn_while_many_are_told() {
    let (fanout, _) = fanout(1 << 20);
    let many: Vec<_> = (0..1000).map(handle).collect();
    let few: Vec<_> = (0..3).map(handle).collect();
    let mut listeners: Vec<_> =
        many.iter().map(|handle| Listener::new(&fanout, handle, vec![], vec![])).collect();
    for handle in &few {
        let mut listener = Listener::new(&fanout, handle, vec![eng()], vec![]);
        listener.subscribe(&fanout, handle, &eng(), 1).unwrap();
        listeners.push(listener);
    }
    open(&fanout);
    let fanout = Arc::new(fanout);
    let telling = tokio::spawn({
        let fanout = Arc::clone(&fanout);
        async move { fanout.run().await }
    });
    fanout.receive(&demo(), &Name::Everyone, entry(1, 1), NOW).unwrap();
    fanout.receive(&demo(), &Name::Group(eng()), entry(1, 1), NOW).unwrap();
    fanout.wake();
    // Half of what a worker's local queue holds.
    const AT_ONCE_MAX: usize = 128;
    let (mut turns, mut all, mut few_after) = (0, 0, None);
    while all < many.len() {
        yield_now().await;
        turns += 1;
        assert!(turns < 1000, "{all} are told");
        let now = told(&many);
        assert!(now <= AT_ONCE_MAX, "{now} at once");
        all += now;
        if few_after.is_none() && told(&few) > 0 {
            few_after = Some(all);
        }
    }
    let before = few_after.expect("the group's members are told");
    assert!(before <= 2 * AT_ONCE_MAX, "after {before} of the others");
    // Something that comes while they are being told is told as well.
    for seq in 2..4 {
        fanout.receive(&demo(), &Name::Everyone, entry(seq, 1), NOW).unwrap();
        fanout.wake();
        yield_now().await;
        yield_now().await;
    }
    let mut again = 0;
    for _ in 0..100 {
        yield_now().await;
        again += told(&many);
    }
    assert!(again >= many.len(), "{again}");
    for listener in &mut listeners[..many.len()] {
        let (frames, missed) = read_all(listener, Format::Proto);
        assert_eq!((frames.iter().flat_map(seqs).collect(), missed), (vec![1, 2, 3], 0));
    }
    telling.abort();
}

proptest! {
    /// Whatever comes and is read when: each member is shown what came since it joined, once and in
    /// order, or it is counted as missed; and what is held is what the logs hold.
    #[test]
    fn members_read_everything_in_order_or_miss_it(
        steps in proptest::collection::vec((0..6_usize, 1..40_usize), 1..120),
    ) {
        let (fanout, _) = fanout(6_000);
        let handles: Vec<_> = (0..3).map(handle).collect();
        let mut listeners: Vec<Option<(Listener, u64, u64)>> = vec![None, None, None];
        let (mut seq, mut now) = (0, 0);
        // So that the audience stays.
        let _stays = Listener::new(&fanout, &handle(9), vec![], vec![]);
        open(&fanout);
        for (step, size) in steps {
            match step {
                0..=2 => match &mut listeners[step] {
                    empty @ None => {
                        *empty = Some((Listener::new(&fanout, &handles[step], vec![], vec![]), seq, 0));
                    }
                    Some((listener, last, missed_all)) => {
                        let (frames, missed) = read_all(listener, Format::Proto);
                        *missed_all += u64::from(missed);
                        let shown: Vec<_> = frames.iter().flat_map(seqs).collect();
                        let first = *last + 1 + u64::from(missed);
                        prop_assert_eq!(&shown, &(first..=seq).collect::<Vec<_>>());
                        *last = seq;
                    }
                },
                3 => {
                    now += 1;
                    fanout.sweep(now);
                }
                _ => {
                    for _ in 0..size {
                        seq += 1;
                        fanout.receive(&demo(), &Name::Everyone, entry(seq, size * 10), Received { now, ..NOW }).unwrap();
                    }
                }
            }
            let held: u64 = {
                let apps = fanout.apps.lock();
                apps.values().map(|app| app.everyone.held() as u64).sum()
            };
            prop_assert_eq!(fanout.room.held(), held);
            prop_assert!(held < 6_000 + 9 * (16 << 10) + 2_000, "{} bytes", held);
        }
        fanout.sweep(now + 100);
        prop_assert_eq!(fanout.room.held(), 0);
    }
}
