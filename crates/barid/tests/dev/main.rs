//! `barid dev` and the commands beside it, as users run them: the real program, its own redis-server
//! and broker, nothing played.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

mod place;
mod sdk;
mod terminal;

use std::time::Instant;

use place::{PATIENCE, Place, pause};

/// Whether somebody listens at `redis://HOST:PORT`.
fn is_up(redis: &str) -> bool {
    std::net::TcpStream::connect(redis.trim_start_matches("redis://")).is_ok()
}

#[test]
fn once_shows_an_online_and_an_offline_push_and_leaves_nothing_behind() {
    let place = Place::new();
    let (shown, status) = place.run("dev --once --port 0");
    assert!(status.success(), "{shown:#?}");
    let steps: Vec<(&str, &str)> = shown
        .iter()
        .filter(|line| line["event"] == "demo")
        .map(|line| (line["case"].as_str().unwrap(), line["step"].as_str().unwrap()))
        .collect();
    for case in ["online", "offline"] {
        for step in ["connected", "produced", "accepted", "received", "acked"] {
            assert!(steps.contains(&(case, step)), "{case} {step} in {steps:?}");
        }
    }
    let at = |step| steps.iter().position(|s| *s == ("offline", step)).unwrap();
    assert!(at("accepted") < at("connected") && at("connected") < at("received"));
    let order: Vec<&str> = shown
        .iter()
        .filter(|line| line["event"] == "drained")
        .map(|line| line["role"].as_str().unwrap())
        .collect();
    assert_eq!(order, ["purger", "dispatcher", "delayer", "access"]);
    assert!(shown.iter().any(|line| line["event"] == "ready"));
    assert!(!place.redis_runs(), "redis-server is still there");
    assert!(!place.state().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn once_runs_on_apache_kafka_and_a_given_redis() {
    let redis = barid_testkit::Redis::start().await.unwrap();
    let kafka = barid_testkit::Kafka::shared().await.brokers();
    let place = Place::new();
    let line = format!("dev --once --port 0 --kafka {kafka} --redis {}", redis.url());
    let (shown, status) = tokio::task::spawn_blocking(move || place.run(&line)).await.unwrap();
    assert!(status.success(), "{shown:#?}");
    let acked = shown.iter().filter(|line| line["step"] == "acked").count();
    assert_eq!(acked, 2, "{shown:#?}");
    assert!(is_up(&redis.url()), "a given redis is left alone");
}

#[test]
fn hazard_115_the_other_commands_find_the_running_cluster_and_say_how_they_ended() {
    let place = Place::new();
    let mut dev = place.start("dev --port 0");
    dev.event("ready");
    while !place.state().exists() {
        pause();
    }

    assert!(place.redis_runs());
    let (sent, status) = place.run("send --user alice --id order-7 --wait accepted hello");
    assert!(status.success(), "{sent:?}");
    assert_eq!(
        (sent[0]["event"].as_str(), sent[0]["id"].as_str()),
        (Some("sent"), Some("order-7"))
    );
    assert_eq!((sent[1]["kind"].as_str(), sent[1]["seq"].as_u64()), (Some("accepted"), Some(1)));

    let (held, _) = place.run("inspect user alice");
    assert_eq!((held[0]["kept"].as_u64(), held[0]["newest"].as_u64()), (Some(1), Some(1)));
    assert_eq!(held[0]["entries"][0]["id"], "order-7");

    let listener = place.start("listen --user alice --device phone --count 2");
    let first = listener.event("message");
    assert_eq!((first["seq"].as_u64(), first["text"].as_str()), (Some(1), Some("hello")));
    let (sent, status) =
        place.run("send --user alice --json-body {\"n\":1} --priority high --wait acked");
    assert!(status.success(), "{sent:?}");
    let second = listener.event("message");
    assert_eq!((second["kind"].as_str(), second["json"]["n"].as_u64()), (Some("json"), Some(1)));

    let mut listener = listener;
    assert!(listener.end().success());
    let (held, _) = place.run("inspect user alice");
    assert_eq!(held[0]["kept"].as_u64(), Some(0));
    assert_eq!(held[0]["devices"][0]["seq"].as_u64(), Some(2));

    let (token, _) = place.run("token --user bob --ttl 1h");
    let with_token = format!("listen --for 200ms --token {}", token[0]["token"].as_str().unwrap());
    let (events, status) = place.run(&with_token);
    assert!(status.success() && events.iter().any(|e| e["event"] == "connected"), "{events:?}");
    let (_, status) = place.run("listen --user bob --secret not-the-secret-of-this-cluster-at-all");
    assert!(!status.success());

    let code = |line: &str| {
        let output = place.barid(line).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    // A duplicate is not a time-out, and a message that is too large is not "sent".
    let (status, said) = code("send --user alice --id order-7 --wait acked --timeout 20s again");
    assert!(status == Some(1) && said.contains("was accepted before"), "{status:?} {said}");
    let file = place.dir.path().join("large.txt");
    std::fs::write(&file, "x".repeat(70_000)).unwrap();
    let (status, said) = code(&format!("send --user alice --file {}", file.display()));
    assert!(status == Some(1) && said.contains("larger than the default limits"), "{said}");
    let (status, said) = code("send --user nobody --wait acked --timeout 1s hello");
    assert!(status == Some(3) && said.contains("no receipt acked of nobody"), "{said}");
    let (status, said) = code("listen --user eve --count 1 --for 1s");
    assert!(status == Some(3) && said.contains("0 of 1 messages have arrived"), "{said}");
    // The time of a record does not contain the set-up of a client.
    let (sent, _) = place.run("send --user bob hello");
    assert!(sent[0]["elapsed_ms"].as_f64().unwrap() < 60.0, "{sent:?}");

    // Receipts, by the id of a message, with the trace that it was sent in.
    let (sent, _) = place.run("send --user bob --id traced --trace --wait accepted hello");
    let (receipts, status) = place.run("inspect receipts --id traced --app demo");
    assert!(status.success() && receipts.len() == 1, "{receipts:?}");
    assert_eq!((&receipts[0]["kind"], &receipts[0]["user"]), (&"accepted".into(), &"bob".into()));
    let trace_id = sent[0]["trace_id"].as_str().unwrap();
    assert_eq!(receipts[0]["traceparent"].as_str().unwrap().split('-').nth(1), Some(trace_id));
    let (none, status) = place.run("inspect receipts --id traced --user alice");
    assert!(status.success() && none.is_empty(), "{none:?}");

    // A record that no purger accepts, and where it is found.
    let (_, status) = place.run("inspect dead");
    assert!(status.success());
    let invalid = "send --user dave --ttl 3660d too-long --wait accepted --timeout 20s";
    assert!(!place.run(invalid).1.success());
    let (dead, status) = place.run("inspect dead --count 5");
    assert!(status.success(), "{dead:?}");
    let codes: Vec<_> = dead.iter().map(|letter| letter["code"].as_str().unwrap()).collect();
    assert_eq!(codes, ["ttl_too_long", "payload_too_large"], "the newest first");
    assert!(dead[0]["body_bytes"].as_u64() > Some(0) && dead[0]["topic"] == "barid.push");

    let second = place.barid("dev").output().unwrap();
    let complaint = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && complaint.contains("is already running"), "{complaint}");

    dev.signal("TERM");
    assert!(dev.end().success());
    assert!(!place.redis_runs() && !place.state().exists());
}

#[test]
fn tokens_are_checked_and_revoked_beside_it_without_flags() {
    let place = Place::new();
    let mut dev = place.start("dev --port 0");
    dev.event("ready");
    while !place.state().exists() {
        pause();
    }
    let (made, _) = place.run("token --user alice");
    let token = made[0]["token"].as_str().unwrap().to_owned();
    let check = format!("token check {token}");
    let (said, status) = place.run(&check);
    assert!(status.success(), "{said:?}");
    assert_eq!((&said[0]["event"], &said[0]["user"]), (&"accepted".into(), &"alice".into()));
    assert_eq!((&said[0]["revoked"], &said[0]["key_id"]), (&false.into(), &"dev".into()));

    let (said, _) = place.run("revoke list");
    assert!(said.is_empty(), "{said:?}");
    let mut listener = place.start(&format!("listen --token {token}"));
    listener.event("connected");
    let (said, status) = place.run("revoke user alice --reason stolen --for 1h");
    assert!(status.success(), "{said:?}");
    let gone = listener.event("disconnected");
    assert!(gone["why"].as_str().unwrap().contains("4004"), "{gone}");
    // It comes back with the same token, which is final.
    assert!(!listener.end().success());
    let (said, status) = place.run(&check);
    assert_eq!(status.code(), Some(1));
    assert_eq!((&said[0]["status"], &said[0]["close_code"]), (&401.into(), &4004.into()));
    assert!(said[0]["hint"].as_str().unwrap().contains("user:demo:alice"), "{said:?}");
    let (made, _) = place.run("token --user alice");
    let fresh = made[0]["token"].as_str().unwrap();
    let (said, status) = place.run(&format!("token check {fresh}"));
    assert!(status.success(), "{said:?}");

    let (said, _) = place.run("revoke list");
    assert_eq!((said.len(), &said[0]["reason"]), (1, &"stolen".into()));
    let (said, status) = place.run("revoke withdraw user alice");
    assert!(status.success() && said[0]["event"] == "withdrawn", "{said:?}");
    assert!(place.run(&check).1.success());
    assert_eq!(place.run("revoke withdraw user alice").1.code(), Some(1));
    dev.signal("TERM");
    assert!(dev.end().success());
}

#[test]
fn listen_shows_a_skip_between_the_messages_around_it() {
    let place = Place::new();
    let mut dev = place.start("dev --port 0");
    dev.event("ready");
    while !place.state().exists() {
        pause();
    }
    for number in 1..=8 {
        let ttl = if number == 6 { "--ttl 1s" } else { "" };
        let line = format!("send --user zoe --wait accepted {ttl} m{number}");
        assert!(place.run(&line).1.success());
    }
    std::iter::repeat_n((), 60).for_each(|()| pause());
    let (events, status) = place.run("listen --user zoe --count 7");
    assert!(status.success(), "{events:?}");
    let seq = |event: &serde_json::Value| match event["event"].as_str() {
        Some("message") => event["seq"].as_u64(),
        Some("skipped") => event["first"].as_u64(),
        _ => None,
    };
    let order: Vec<u64> = events.iter().filter_map(seq).collect();
    assert_eq!(order, [1, 2, 3, 4, 5, 6, 7, 8], "{events:#?}");
    dev.signal("TERM");
    assert!(dev.end().success());
}

#[test]
fn a_killed_cluster_takes_its_redis_with_it() {
    let place = Place::new();
    let mut dev = place.start("dev --port 0");
    dev.event("ready");
    assert!(place.redis_runs());
    dev.signal("KILL");
    dev.end();
    let deadline = Instant::now() + PATIENCE;
    while place.redis_runs() {
        assert!(Instant::now() < deadline, "redis-server outlives barid");
        pause();
    }
    // The state file that it left names a process that is gone: not taken for a running cluster.
    let (_, status) = place.run("token --user alice");
    assert!(!status.success());
}

#[test]
fn hazard_58_a_closed_terminal_drains_the_cluster() {
    let place = Place::new();
    // The tests may run under nohup, which makes every process below it ignore the signal.
    let mut dev = place.start_through("env --default-signal=HUP", "dev --port 0");
    dev.event("ready");
    dev.signal("HUP");
    let order: Vec<String> =
        (0..4).map(|_| dev.event("drained")["role"].as_str().unwrap().to_owned()).collect();
    assert_eq!(order, ["purger", "dispatcher", "delayer", "access"]);
    assert!(dev.end().success());
    assert!(!place.redis_runs() && !place.state().exists());
}

#[test]
fn hazard_58_nohup_outlives_its_terminal() {
    let place = Place::new();
    let mut dev = place.start_through("nohup", "dev --port 0");
    dev.event("ready");
    dev.signal("HUP");
    let (_, status) = place.run("send --user alice --wait accepted hello");
    assert!(status.success());
    dev.signal("TERM");
    assert!(dev.end().success());
}

#[test]
fn hazard_53_a_cluster_outlives_the_reader_of_what_it_prints() {
    let place = Place::new();
    let mut command = place.barid("dev --port 0 --log debug");
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut child = command.stdout(std::process::Stdio::piped()).stderr(full).spawn().unwrap();
    drop(child.stdout.take());
    let mut dev = place::Running::unheard(child);
    let deadline = Instant::now() + PATIENCE;
    while !place.state().exists() {
        assert!(Instant::now() < deadline && dev.child.try_wait().unwrap().is_none());
        pause();
    }
    let (_, status) = place.run("send --user alice --wait accepted hello");
    assert!(status.success());
    dev.signal("TERM");
    assert!(dev.end().success());
}

#[test]
fn hazard_53_a_reader_that_has_seen_enough_ends_listen_without_an_error() {
    let place = Place::new();
    let mut dev = place.start("dev --port 0");
    dev.event("ready");
    while !place.state().exists() {
        pause();
    }
    let mut command = place.barid("listen --user alice --device phone");
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut listener = place::Running::unheard(child);
    assert!(listener.end().success());
    dev.signal("TERM");
    assert!(dev.end().success());
}

#[test]
fn a_missing_redis_server_is_named_with_its_remedy() {
    let place = Place::new();
    let nothing = place.dir.path().join("bin");
    std::fs::create_dir(&nothing).unwrap();
    let output = place.barid("dev --once").env("PATH", nothing).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(complaint.contains("apt-get install"), "{complaint}");
}

#[test]
fn hazard_122_addresses_and_tokens_outlive_a_restart() {
    let place = Place::new();
    let free = barid_testkit::ports::free_port;
    let (port, kafka, redis) = (free(), free(), free());
    let line = format!("dev --port {port} --kafka-port {kafka} --redis-port {redis}");
    let mut token = String::new();
    for _ in 0..2 {
        let mut dev = place.start(&line);
        let ready = dev.event("ready");
        assert_eq!(ready["url"], format!("ws://127.0.0.1:{port}"));
        assert_eq!(ready["brokers"], format!("127.0.0.1:{kafka}"));
        assert_eq!(ready["redis"], format!("redis://127.0.0.1:{redis}"));
        if token.is_empty() {
            let (signed, _) = place.run("token --user bob --ttl 1h");
            token = signed[0]["token"].as_str().unwrap().to_owned();
        }
        // The token of the first start opens the door of the second one.
        let listen = format!("listen --for 500ms --token {token}");
        let (events, status) = place.run(&listen);
        assert!(status.success() && events.iter().any(|e| e["event"] == "connected"), "{events:?}");
        let (_, status) = place.run("send --user bob --wait accepted hello");
        assert!(status.success());
        dev.signal("TERM");
        assert!(dev.end().success());
    }
    let _taken = std::net::TcpListener::bind(("127.0.0.1", kafka)).unwrap();
    let output =
        place.barid(&format!("dev --once --port 0 --kafka-port {kafka}")).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains(&format!("cannot listen on port {kafka}")), "{told}");
}

#[test]
fn hazard_122_a_usual_port_in_use_is_told() {
    let place = Place::new();
    // If this fails, somebody else listens there.
    let _taken = std::net::TcpListener::bind("127.0.0.1:7080");
    let output = place.barid("dev --once").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    assert!(told.contains("port 7080 is in use: --port is "), "{told}");
}

#[test]
fn hazard_123_a_wrong_kafka_or_redis_is_told_in_one_line() {
    let place = Place::new();
    for (option, address) in [
        ("--redis redis://me:hush@127.0.0.1:1", "127.0.0.1:1"),
        ("--kafka 127.0.0.1:1", "127.0.0.1:1"),
    ] {
        let output = place.barid(&format!("dev --port 0 {option}")).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(4), "{told}");
        let lines: Vec<&str> = told.lines().filter(|line| !line.contains(" is in use")).collect();
        assert!(lines.len() <= 2, "{told}");
        assert!(told.contains(address) && told.to_lowercase().contains("refused"), "{told}");
        assert!(told.contains("start it, or omit") && !told.contains("hush"), "{told}");
    }
}

/// A command of docs/audiences.md, which must contain it, without `barid` and quotes.
fn documented(command: &str) -> String {
    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/audiences.md");
    let page = std::fs::read_to_string(PAGE).unwrap();
    assert!(page.contains(&format!("\n    barid {command}\n")), "docs/audiences.md: {command}");
    command.replace('"', "")
}

#[test]
fn the_commands_for_groups_do_what_their_page_says() {
    let place = Place::new();
    let dev = place.start("dev --port 0");
    dev.event("ready");
    while !place.state().exists() {
        pause();
    }
    let listen = documented("listen --user alice --group eng");
    let mut listener = place.start(&format!("{listen} --count 2"));
    assert_eq!(listener.event("subscribed")["group"], "eng");
    let send = documented(r#"send --group eng --id news-7 --wait accepted "hello""#);
    let (sent, status) = place.run(&send);
    assert!(status.success(), "{sent:?}");
    assert_eq!((&sent[1]["kind"], &sent[1]["mailbox"]), (&"accepted".into(), &"eng".into()));
    let first = listener.event("message");
    assert_eq!((&first["group"], &first["id"]), (&"eng".into(), &"news-7".into()));
    let send = documented(r#"send --everyone --id news-8 "hello all""#).replace(" all", "-all");
    let (sent, status) = place.run(&send);
    assert!(status.success(), "{sent:?}");
    let second = listener.event("message");
    assert_eq!((&second["group"], &second["id"]), (&"everyone".into(), &"news-8".into()));
    assert!(listener.end().success());
    let (token, status) = place.run(&documented("token --user alice --group eng"));
    assert!(status.success(), "{token:?}");
    for (group, id) in [("eng", "news-7"), ("everyone", "news-8")] {
        let (shown, status) = place.run(&documented(&format!("inspect group {group}")));
        assert!(status.success() && shown[0]["entries"][0]["id"] == id, "{shown:?}");
        assert_eq!(shown[0]["nodes"].as_array().unwrap().len(), 1, "{shown:?}");
    }
    let (receipts, status) = place.run("inspect receipts --group eng");
    assert!(status.success() && receipts.len() == 1, "{receipts:?}");
    let refused = place.barid("send --group eng --receipts acked hi").output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}
