//! Devices that do not read, or read one byte a second: they cost a bounded memory, lose nothing, and
//! delay nobody else.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use barid_testkit::Device;
use barid_testkit::raw::*;
use barid_wire::envelope::set_payload;
use barid_wire::internal::NodePush;
use bytes::Bytes;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::*;

const CLOSES: &str = "barid_access_closes_total";
const LIMITS: &str = "barid_access_limits_total";
const QUEUED: &str = "barid_access_queued_bytes";

/// Incompressible bytes.
fn noise(bytes: u32) -> Bytes {
    (0..bytes).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

async fn accept_noise(world: &World, user: &str, id: &str, noise: &Bytes) -> Result<Bytes> {
    let entry = world.accept_with(user, id, |envelope| {
        envelope.set_kind(barid_wire::v1::BodyKind::Data);
        set_payload(envelope, noise.clone(), usize::MAX, 3);
    });
    Ok(entry.await?.0)
}

/// A welcomed device whose socket takes little and that reads only what it is told to.
async fn reluctant(node: &Node, user: &str, device: &str) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut stream = socket.connect(node.addresses["ws"]).await?;
    let path = format!("/v1/connect?token={}", token_of(user));
    let protocol = "Sec-WebSocket-Protocol: barid.v1.json\r\n";
    stream.write_all(request(&path, protocol).as_bytes()).await?;
    let head = read_head(&mut stream).await?;
    anyhow::ensure!(head.starts_with("HTTP/1.1 101"), "{head}");
    let hello = json!({ "hello": { "device": device } });
    stream.write_all(&frame(TEXT, hello.to_string())).await?;
    // The first byte of Welcome.
    tokio::time::timeout(barid_testkit::device::PATIENCE, stream.read_u8()).await??;
    Ok(stream)
}

#[tokio::test]
async fn what_a_slow_device_was_closed_for_is_there_when_it_comes_back() -> Result<()> {
    let world = World::new().await?;
    let node = world.node().await?;
    let mut dispatcher = node.dispatcher().await?;
    let slow = reluctant(&node, "alice", "phone").await?;
    let noise = noise(60_000);
    let mut sent = Vec::new();
    for n in 0..250 {
        let id = format!("m{n}");
        let entry = accept_noise(&world, "alice", &id, &noise).await?;
        dispatcher.push(&world, "alice", entry).await?;
        sent.push(id);
        if node.metric(CLOSES, "slow_consumer") > 0.0 {
            break;
        }
    }
    world.routes_become("alice", 0).await?;
    assert_eq!(node.metric(CLOSES, "slow_consumer"), 1.0, "after {} messages", sent.len());
    eventually("nothing is queued", async || Ok(node.metric(QUEUED, "") == 0.0)).await?;
    drop(slow);
    let mut back = node.device("alice", "phone").await?;
    assert_eq!(back.receive(sent.len()).await?, sent);
    world.cursor_becomes("alice", "phone", sent.len() as u64).await
}

#[tokio::test]
async fn who_reads_too_slowly_to_answer_a_ping_is_closed_with_4003_and_loses_nothing() -> Result<()>
{
    const MESSAGES: usize = 10;
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.heartbeat.interval_seconds = 1;
            config.heartbeat.interval_min_seconds = 1;
            config.heartbeat.timeout_seconds = 2;
            config.limits.send_buffer_bytes = 16 << 10;
        })
        .await?;
    let mut dispatcher = node.dispatcher().await?;
    let mut slow = reluctant(&node, "alice", "phone").await?;
    let noise = noise(20_000);
    let mut sent = Vec::new();
    for n in 0..MESSAGES {
        let entry = accept_noise(&world, "alice", &format!("m{n}"), &noise).await?;
        dispatcher.push(&world, "alice", entry).await?;
        sent.push(format!("m{n}"));
    }
    // It reads all the time, and its socket takes more now and then: that is no sign of life.
    let reading = tokio::spawn(async move {
        let mut some = [0; 256];
        while slow.read(&mut some).await.is_ok_and(|bytes| bytes > 0) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    world.routes_become("alice", 0).await?;
    assert!(!reading.is_finished(), "what the kernel held is read long after");
    assert_eq!(node.metric(CLOSES, "heartbeat"), 1.0);
    assert_eq!(node.metric(CLOSES, "slow_consumer"), 0.0);
    reading.abort();
    let mut back = node.device("alice", "phone").await?;
    assert_eq!(back.receive(sent.len()).await?, sent);
    Ok(())
}

#[tokio::test]
async fn what_a_device_does_not_take_is_in_the_queue_that_is_counted_and_not_in_the_kernel()
-> Result<()> {
    const MESSAGES: u32 = 25;
    let world = World::new().await?;
    let noise = noise(20_000);
    let mut queued = Vec::new();
    // 0: as the system has it, which is megabytes.
    for send_buffer_bytes in [16 << 10, 0] {
        let node =
            world.node_with(|config| config.limits.send_buffer_bytes = send_buffer_bytes).await?;
        let mut dispatcher = node.dispatcher().await?;
        let user = format!("user-{send_buffer_bytes}");
        let slow = reluctant(&node, &user, "phone").await?;
        for n in 0..MESSAGES {
            let entry = accept_noise(&world, &user, &format!("m{n}"), &noise).await?;
            dispatcher.push(&world, &user, entry).await?;
        }
        // Until everything has been written that can be.
        tokio::time::sleep(Duration::from_millis(500)).await;
        queued.push(node.metric(QUEUED, ""));
        drop(slow);
        world.routes_become(&user, 0).await?;
    }
    // base64 in JSON
    let all = f64::from(MESSAGES) * noise.len() as f64 * 4.0 / 3.0;
    assert!((0.8 * all..1.1 * all).contains(&queued[0]), "{queued:?} of {all}");
    assert!(queued[1] < 0.5 * all, "{queued:?} of {all}: the system's buffers are small here");
    Ok(())
}

#[tokio::test]
async fn above_the_high_water_mark_the_largest_queue_goes_and_the_others_stay() -> Result<()> {
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.limits.queued_bytes_max = 4 << 20;
            config.limits.node_queued_bytes_max = 4 << 20;
        })
        .await?;
    let mut dispatcher = node.dispatcher().await?;
    let _small = reluctant(&node, "alice", "phone").await?;
    let _large = reluctant(&node, "bob", "phone").await?;
    let mut healthy = node.device("carol", "phone").await?;
    let noise = noise(60_000);
    let mut numbers = 0..;
    let mut grow = async |user: &str, until: f64| {
        while node.metric(QUEUED, "") < until && node.metric(LIMITS, "memory_closed") == 0.0 {
            let id = format!("m{}", numbers.next().context("a number")?);
            let entry = accept_noise(&world, user, &id, &noise).await?;
            dispatcher.push(&world, user, entry).await?;
            // The session takes it over.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        anyhow::Ok(())
    };
    grow("alice", f64::from(1 << 20)).await?;
    grow("bob", f64::from(5 << 20)).await?;
    world.routes_become("bob", 0).await?;
    assert_eq!(node.metric(LIMITS, "memory_closed"), 1.0);
    assert_eq!(node.metric(CLOSES, "slow_consumer"), 1.0);
    assert_eq!(world.inspect("alice").await?.routes.len(), 1, "the smaller one stays");
    assert!(node.metric(QUEUED, "") < 0.9 * f64::from(4 << 20));
    let (entry, _) = world.accept("carol", "hello").await?;
    dispatcher.push(&world, "carol", entry).await?;
    assert_eq!(healthy.receive(1).await?, ["hello"]);
    eventually("there is room again", async || Ok(node.device("dave", "phone").await.is_ok())).await
}

#[tokio::test]
async fn a_node_that_is_short_of_memory_takes_nobody_and_keeps_whom_it_has() -> Result<()> {
    let world = World::new().await?;
    // This process has more, whatever it does.
    let node = world.node_with(|config| config.limits.memory_bytes_max = 1 << 20).await?;
    eventually("refused", async || {
        Ok(node.metric(LIMITS, "memory") > 0.0 || {
            drop(Device::open(&node.url(), &token_of("alice")).await);
            false
        })
    })
    .await?;
    let answer = http(node.addresses["ws"], request("/v1/connect", "").as_bytes()).await?;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("Retry-After: "), "{answer}");
    assert!(answer.contains("short of memory"), "{answer}");
    assert_eq!(node.metric(LIMITS, "memory_closed"), 0.0);
    Ok(())
}

/// The node's incarnation, as the user's routes name it.
async fn incarnation(world: &World, user: &str) -> Result<u64> {
    let routes = world.inspect(user).await?.routes;
    Ok(routes.first().context("a route")?.session.incarnation.0)
}

/// To whatever sessions of the user there are.
fn push_of(user: &str, envelope: Bytes) -> NodePush {
    NodePush { app: APP.into(), user: user.into(), envelope, ..Default::default() }
}

/// From a push to the device that has it, the longest of so many.
async fn longest(
    world: &World,
    node: &Node,
    device: &mut Device,
    user: &str,
    tag: &str,
) -> Result<Duration> {
    let mut dispatcher = node.dispatcher().await?;
    let incarnation = incarnation(world, user).await?;
    let mut longest = Duration::ZERO;
    for n in 0..40 {
        let id = format!("{tag}{n}");
        let (entry, _) = world.accept(user, &id).await?;
        let pushed = Instant::now();
        dispatcher.send(incarnation, vec![push_of(user, entry)], vec![]).await?;
        assert_eq!(device.receive(1).await?, [id]);
        longest = longest.max(pushed.elapsed());
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    Ok(longest)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_readers_of_one_byte_a_second_delay_nobody() -> Result<()> {
    const SLOW: usize = 300;
    const EACH: usize = 50;
    let world = World::new().await?;
    let node = world
        .node_with(|config| {
            config.redis.devices_max = EACH as u32;
            config.limits.user_connections_max = 0;
            config.limits.queued_bytes_max = 256 << 10;
        })
        .await?;
    let mut healthy = node.device("carol", "phone").await?;
    let calm = longest(&world, &node, &mut healthy, "carol", "calm").await?;
    // Of few users: one push is for many of them.
    let crowds: Vec<_> = (0..SLOW / EACH).map(|n| format!("crowd{n}")).collect();
    let mut readers = tokio::task::JoinSet::new();
    for n in 0..SLOW {
        let mut stream = reluctant(&node, &crowds[n / EACH], &format!("d{n}")).await?;
        readers.spawn(async move {
            let mut bytes = 0;
            while stream.read_u8().await.is_ok() {
                bytes += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            bytes
        });
    }
    let noise = noise(20_000);
    let mut dispatcher = node.dispatcher().await?;
    let incarnation = incarnation(&world, &crowds[0]).await?;
    let fill = async {
        let mut pushed = Vec::new();
        while node.metric(CLOSES, "slow_consumer") < SLOW as f64 / 2.0 && pushed.len() < 200 {
            let id = format!("m{}", pushed.len());
            for crowd in &crowds {
                let entry = accept_noise(&world, crowd, &id, &noise).await?;
                dispatcher.send(incarnation, vec![push_of(crowd, entry)], vec![]).await?;
            }
            pushed.push(id);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(pushed)
    };
    let (filled, busy) = tokio::join!(fill, longest(&world, &node, &mut healthy, "carol", "busy"));
    let (filled, busy) = (filled?, busy?);
    // And while those that are left read on.
    let after = longest(&world, &node, &mut healthy, "carol", "after").await?;
    println!("longest: {calm:?} before, {busy:?} while they fill, {after:?} after");
    assert!(node.metric(QUEUED, "") > 0.0 || node.metric(CLOSES, "slow_consumer") > 0.0);
    for slow in [busy, after] {
        assert!(
            slow < calm + Duration::from_secs(1),
            "{calm:?} before, {slow:?} with slow readers"
        );
    }
    readers.shutdown().await;
    // One of them comes back and reads: nothing is missing.
    let mut back = node.device(&crowds[0], "d0").await?;
    assert_eq!(back.receive(filled.len()).await?, filled);
    Ok(())
}
