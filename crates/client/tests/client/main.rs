//! The client against a server that the test plays.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

mod fake;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use barid_client::{Client, Closed, Disconnect, Event, FileStore, Message, Seq, Token};
use barid_wire::v1::{self, client_frame, server_frame};
use base64::Engine as _;
use fake::{PATIENCE, Server};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Messages that a client shows, in order.
struct Shown(mpsc::Receiver<Message>);

impl Shown {
    async fn next(&mut self) -> String {
        let message = timeout(PATIENCE, self.0.recv()).await.expect("a message in time");
        message.expect("an open client").id
    }

    fn nothing_more(&mut self) -> bool {
        self.0.try_recv().is_err()
    }
}

fn start(builder: barid_client::Builder) -> (Client, Shown) {
    let (tx, rx) = mpsc::channel(64);
    let client = builder.start(move |message| {
        let tx = tx.clone();
        async move { Ok(tx.send(message).await?) }
    });
    (client.unwrap(), Shown(rx))
}

#[tokio::test]
async fn messages_are_shown_and_acknowledged() {
    let server = Server::start().await;
    let (client, mut shown) = start(server.client());
    let (mut peer, hello) = server.welcome(7, 1, 0).await;
    assert_eq!((peer.token.as_str(), hello.device.as_str()), ("Bearer secret", "phone"));
    assert!(hello.positions.is_empty() && hello.accepts_zstd && hello.attempt > 0);
    peer.deliver(1, 1..=3).await;
    while peer.ack().await != (1, 3) {}
    assert_eq!([shown.next().await, shown.next().await, shown.next().await], ["m1", "m2", "m3"]);
    let (closed, ()) = tokio::join!(client.shutdown(), peer.closed());
    assert_eq!(closed, Closed::Shutdown);
}

#[tokio::test]
async fn a_lost_connection_resumes_where_it_was() {
    let server = Server::start().await;
    let (_client, mut shown) = start(server.client());
    let (mut peer, first) = server.welcome(7, 1, 4).await;
    peer.deliver(1, 5..=6).await;
    while peer.ack().await != (1, 6) {}
    drop(peer);
    let (mut peer, second) = server.welcome(7, 1, 6).await;
    let position = &second.positions[0];
    assert_eq!((position.epoch, position.generation, position.seq), (7, 1, 6));
    let chain = barid_client::Chain::START.next("m5").next("m6");
    assert_eq!(position.chain, Some(chain.0));
    assert!(second.attempt > first.attempt);
    peer.deliver(1, 6..=7).await; // 6 once too often
    while peer.ack().await != (1, 7) {}
    let ids = [shown.next().await, shown.next().await, shown.next().await];
    assert_eq!(ids, ["m5", "m6", "m7"]);
    assert!(shown.nothing_more());
}

#[tokio::test]
async fn after_a_fork_what_was_seen_is_not_shown_again() {
    let server = Server::start().await;
    let (_client, mut shown) = start(server.client());
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    peer.deliver(1, 1..=2).await;
    while peer.ack().await != (1, 2) {}
    peer.send_welcome(8, 1, 0).await; // in mid-connection
    peer.deliver(1, 1..=3).await;
    while peer.ack().await != (1, 3) {}
    assert_eq!([shown.next().await, shown.next().await, shown.next().await], ["m1", "m2", "m3"]);
    assert!(shown.nothing_more());
}

#[tokio::test]
async fn a_message_that_the_handler_fails_on_comes_again() {
    let server = Server::start().await;
    let tries = Arc::new(AtomicU32::new(0));
    let counted = tries.clone();
    let _client = server.client().start(move |_| {
        let n = counted.fetch_add(1, Ordering::SeqCst);
        async move { if n == 0 { Err("not now".into()) } else { Ok(()) } }
    });
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    peer.deliver(1, 1..=1).await;
    while tries.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    peer.deliver(1, 1..=1).await;
    assert_eq!(peer.ack().await, (1, 1));
    assert_eq!(tries.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn by_hand_an_ack_waits_for_every_earlier_one() {
    let server = Server::start().await;
    let (_client, mut deliveries) = server.client().open(8).unwrap();
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    peer.deliver(1, 1..=3).await;
    let mut taken = Vec::new();
    for _ in 0..3 {
        taken.push(deliveries.next().await.unwrap());
    }
    taken.pop().unwrap().ack.ack();
    let first = taken.remove(0);
    first.ack.ack();
    assert_eq!(peer.ack().await, (1, 1));
    taken.pop().unwrap().ack.ack();
    assert_eq!(peer.ack().await, (1, 3));
}

#[tokio::test]
async fn acks_keep_the_interval_that_the_server_asks_for() {
    let server = Server::start().await;
    let (_client, _shown) = start(server.client());
    let mut peer = server.accept().await;
    peer.hello().await;
    peer.send_paced_welcome(7, 1, 0, 800).await;
    peer.deliver(1, 1..=1).await;
    let first = Instant::now();
    assert_eq!(peer.ack().await, (1, 1)); // at once: nothing came before it
    for seq in 2..=4 {
        peer.deliver(1, seq..=seq).await;
    }
    assert_eq!(peer.ack().await, (1, 4));
    assert!(first.elapsed() >= Duration::from_millis(800), "{:?}", first.elapsed());
}

#[tokio::test]
async fn shutdown_flushes_the_last_ack() {
    let server = Server::start().await;
    let (started, mut began) = mpsc::channel(1);
    let client = server.client().start(move |_| {
        let started = started.clone();
        async move {
            started.send(()).await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok(())
        }
    });
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    peer.deliver(1, 1..=2).await;
    began.recv().await.unwrap();
    let shutdown = tokio::spawn(client.unwrap().shutdown());
    assert_eq!(peer.ack().await, (1, 1)); // the one that was being handled; not the next
    peer.closed().await;
    assert_eq!(shutdown.await.unwrap(), Closed::Shutdown);
}

#[tokio::test]
async fn codes_from_4500_on_stop_the_client_with_the_reason() {
    let server = Server::start().await;
    let (client, _shown) = start(server.client());
    let (peer, _) = server.welcome(7, 1, 0).await;
    peer.close(4000, "draining").await;
    let (peer, _) = server.welcome(7, 1, 0).await;
    peer.close(4502, "replaced").await;
    let replaced = Disconnect::Closed { code: 4502, reason: "replaced".into() };
    assert_eq!(client.closed().await, Closed::Refused(replaced));
}

#[tokio::test]
async fn a_refused_token_stops_the_client_and_a_full_server_does_not() {
    let server = Server::start().await;
    let (client, _shown) = start(server.client());
    server.refuse(503, "full").await;
    server.refuse(401, "token: signature does not match").await;
    let text = "token: signature does not match".into();
    let refused = Disconnect::Http { status: 401, text, retry_after: None };
    assert_eq!(client.closed().await, Closed::Refused(refused));
}

#[tokio::test]
async fn retry_after_is_obeyed() {
    let server = Server::start().await;
    let (_client, _shown) = start(server.client());
    server.refuse_for(1).await;
    let told = Instant::now();
    let _ = server.welcome(7, 1, 0).await;
    assert!(told.elapsed() >= Duration::from_millis(990));
}

#[tokio::test]
async fn go_away_says_when_to_come_back() {
    let server = Server::start().await;
    let (_client, _shown) = start(server.client());
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    let go_away = v1::GoAway { why: "draining".into(), reconnect_after_ms: 300 };
    let told = Instant::now();
    peer.control(server_frame::Control::GoAway(go_away)).await;
    peer.close(4000, "draining").await;
    let _ = server.welcome(7, 1, 0).await;
    let waited = told.elapsed();
    assert!(waited >= Duration::from_millis(290), "came back after {waited:?}");
}

#[tokio::test]
async fn a_fresh_token_is_sent_before_the_old_one_expires() {
    let server = Server::start().await;
    let asked = Arc::new(AtomicU32::new(0));
    let builder = server.client().token(move || {
        let n = asked.fetch_add(1, Ordering::SeqCst);
        async move {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
            let life = if n == 0 { 2 } else { 3600 };
            let claims = format!("{{\"exp\":{},\"n\":{n}}}", now + life);
            let engine = base64::engine::general_purpose::URL_SAFE_NO_PAD;
            Ok(Token::new(format!("e30.{}.sig", engine.encode(claims))))
        }
    });
    let (_client, _shown) = start(builder);
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    match peer.receive().await {
        client_frame::Kind::Refresh(refresh) => {
            assert!(!peer.token.ends_with(&refresh.token) && refresh.token.starts_with("e30."));
        }
        other => panic!("unexpected {other:?}"),
    }
}

#[tokio::test]
async fn a_file_resumes_over_a_restart_of_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let store = FileStore::new(dir.path().join("phone.json"));
    let server = Server::start().await;
    let (client, _shown) = start(server.client().positions(store.clone()));
    let (mut peer, first) = server.welcome(7, 1, 0).await;
    peer.deliver(1, 1..=2).await;
    while peer.ack().await != (1, 2) {}
    tokio::join!(client.shutdown(), peer.closed());

    let (_client, mut shown) = start(server.client().positions(store));
    let (mut peer, second) = server.welcome(7, 2, 0).await; // forked meanwhile
    assert_eq!(second.positions[0].seq, 2);
    assert!(second.attempt > first.attempt);
    peer.deliver(2, 1..=3).await;
    assert_eq!(shown.next().await, "m3");
}

#[tokio::test]
async fn a_gap_makes_the_client_come_back_from_its_position() {
    let server = Server::start().await;
    let (events, mut told) = mpsc::channel(64);
    let builder = server.client().on_event(move |event| {
        let _ = events.try_send(event);
    });
    let (_client, mut shown) = start(builder);
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    peer.deliver(1, 1..=1).await;
    peer.deliver(1, 3..=3).await;
    let (_peer, hello) = server.welcome(7, 1, 1).await;
    assert!(hello.positions[0].seq <= 1);
    assert_eq!(shown.next().await, "m1");
    assert!(shown.nothing_more());
    while let Some(event) = told.recv().await {
        if let Event::Disconnected { why, retry_in } = event {
            assert_eq!(why.to_string(), "protocol violation: message 3 after 1: a gap");
            assert!(retry_in.is_some());
            return;
        }
    }
}

#[tokio::test]
async fn skips_are_told_and_acknowledged() {
    let server = Server::start().await;
    let (events, mut told) = mpsc::channel(64);
    let builder = server.client().on_event(move |event| {
        let _ = events.try_send(event);
    });
    let (_client, _shown) = start(builder);
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    let why = v1::SkipReason::Expired.into();
    let skip = v1::Skip { to: 4, why, chain: 9, generation: 1, ..Default::default() };
    peer.control(server_frame::Control::Skip(skip)).await;
    assert_eq!(peer.ack().await, (1, 4));
    while let Some(event) = told.recv().await {
        if let Event::Skipped { first, last, .. } = event {
            assert_eq!((first, last), (Seq(1), Seq(4)));
            return;
        }
    }
}

/// The client's next `count` Subscribe and Unsubscribe frames, sorted by group.
async fn asked(peer: &mut fake::Peer, count: usize) -> Vec<(bool, String)> {
    let mut asked = Vec::new();
    for _ in 0..count {
        asked.push(match peer.receive().await {
            client_frame::Kind::Subscribe(v1::Subscribe { group }) => (true, group),
            client_frame::Kind::Unsubscribe(v1::Unsubscribe { group }) => (false, group),
            other => panic!("unexpected {other:?}"),
        });
    }
    asked
}

#[tokio::test]
async fn groups_are_subscribed_again_after_a_reconnect_and_their_messages_say_so() {
    let server = Server::start().await;
    let (events, mut told) = mpsc::channel(16);
    let builder = server.client().group("eng").on_event(move |event| {
        if let Event::Missed { .. } | Event::Subscribed { .. } | Event::Unsubscribed { .. } = event
        {
            events.try_send(event).unwrap();
        }
    });
    let (client, mut shown) = start(builder);
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    assert_eq!(asked(&mut peer, 1).await, [(true, "eng".into())]);
    client.subscribe("ops").unwrap();
    client.subscribe("ops").unwrap();
    assert_eq!(asked(&mut peer, 1).await, [(true, "ops".into())]);
    assert!(client.subscribe("everyone").is_err());
    let control =
        server_frame::Control::Subscribed(v1::Subscribed { group: "eng".into(), position: None });
    peer.control(control).await;
    let control = v1::Unsubscribed { group: "ops".into(), code: 4500, text: "no".into() };
    peer.control(server_frame::Control::Unsubscribed(control)).await;
    peer.deliver_to("eng", 5..=6).await;
    peer.deliver_to("everyone", 1..=1).await;
    // A group's messages are not acknowledged: the first ack is of the user's own.
    peer.deliver(1, 1..=1).await;
    assert_eq!(peer.ack().await, (1, 1));
    let mut heard = Vec::new();
    for _ in 0..4 {
        let message = timeout(PATIENCE, shown.0.recv()).await.unwrap().unwrap();
        heard.push((message.group.as_deref().unwrap_or("").to_owned(), message.seq.0));
    }
    heard.sort();
    let wanted = [("", 1), ("eng", 5), ("eng", 6), ("everyone", 1)];
    assert_eq!(heard, wanted.map(|(group, seq)| (group.to_owned(), seq)));
    drop(peer);

    let (mut peer, _) = server.welcome(7, 1, 1).await;
    assert_eq!(asked(&mut peer, 2).await, [(true, "eng".into()), (true, "ops".into())]);
    peer.deliver_to("eng", 9..=9).await;
    assert_eq!(shown.next().await, "m9");
    client.unsubscribe("eng").unwrap();
    assert_eq!(asked(&mut peer, 1).await, [(false, "eng".into())]);
    let told: Vec<_> = std::iter::from_fn(|| told.try_recv().ok()).collect();
    let text = "no".to_owned();
    let wanted = [
        Event::Subscribed { group: "eng".into() },
        Event::Unsubscribed { group: "ops".into(), code: 4500, text },
        Event::Missed { group: "eng".into(), count: 2 },
    ];
    assert_eq!(told, wanted);
}

#[tokio::test]
async fn hazard_37_a_client_whose_attempt_is_too_low_counts_on_from_the_known_one_at_once() {
    let server = Server::start().await;
    let hour = Duration::from_secs(3600);
    // The wait before a reconnect would be an hour.
    let (_client, _shown) = start(server.client().reconnect_between(hour, hour));
    let mut peer = server.accept().await;
    let first = peer.hello().await.attempt;
    let known = first + 86_400_000;
    let error = v1::Error { code: 4005, text: "known".into(), attempt: known };
    peer.control(server_frame::Control::Error(error)).await;
    peer.close(4005, "overloaded").await;
    let (_peer, hello) = server.welcome(7, 1, 0).await;
    assert_eq!(hello.attempt, known + 1);
}

#[tokio::test]
async fn hazard_43_numbers_that_no_node_sends_are_a_violation_and_no_panic() {
    let server = Server::start().await;
    let (events, mut told) = mpsc::channel(64);
    let on_event = move |event| drop(events.try_send(event));
    let (_client, _shown) = start(server.client().on_event(on_event));
    for seq in [1 << 53, 1 << 63, u64::MAX] {
        for group in ["", "news"] {
            let (mut peer, _) = server.welcome(7, 1, 0).await;
            peer.deliver_to(group, seq..=seq).await;
            loop {
                match timeout(PATIENCE, told.recv()).await.expect("an event in time").unwrap() {
                    Event::Disconnected { why: Disconnect::Violation(why), .. } => {
                        assert!(why.contains("above"), "{why}");
                        break;
                    }
                    Event::Disconnected { why, .. } => panic!("{why}"),
                    _ => {}
                }
            }
        }
    }
}

#[tokio::test]
async fn hazard_43_a_handler_that_panics_is_a_failure_and_no_shutdown() {
    let server = Server::start().await;
    let handler = |_| async { panic!("of the application") };
    let client = server.client().start(handler).unwrap();
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    peer.deliver(1, 1..=1).await;
    let closed = timeout(PATIENCE, client.closed()).await.expect("an end in time");
    let Closed::Failed(why) = closed else { panic!("{closed:?}") };
    assert!(why.contains("of the application"), "{why}");
}

#[tokio::test]
async fn hazard_56_what_the_device_acknowledged_itself_is_no_loss() {
    let server = Server::start().await;
    let (events, mut told) = mpsc::channel(64);
    let on_event = move |event| drop(events.try_send(event));
    let (_client, mut shown) = start(server.client().on_event(on_event));
    let (mut peer, _) = server.welcome(7, 1, 0).await;
    let skip = |to, why: v1::SkipReason| {
        let (why, generation) = (why.into(), 1);
        server_frame::Control::Skip(v1::Skip { to, why, generation, ..Default::default() })
    };
    peer.control(skip(3, v1::SkipReason::Acknowledged)).await;
    peer.control(skip(4, v1::SkipReason::Evicted)).await;
    peer.deliver(1, 5..=5).await;
    assert_eq!(shown.next().await, "m5");
    let mut skipped = Vec::new();
    while let Ok(event) = told.try_recv() {
        if let Event::Skipped { first, last, .. } = event {
            skipped.push((first.0, last.0));
        }
    }
    assert_eq!(skipped, [(4, 4)]);
}
