//! Re-sends of unacknowledged messages.

use std::time::Duration;

use anyhow::Result;
use barid_core::ReceiptSet;
use barid_testkit::cluster::Builder;
use barid_testkit::device::{Incoming, PATIENCE};
use barid_testkit::{Cluster, Role, records};
use barid_wire::record::Push;
use serde_json::json;

/// Five re-sends after 1, 2, 4, 8 and 16 times `base_ms`, and the close after 32 times.
fn impatient(base_ms: i64) -> Builder {
    Cluster::builder().set("redis.retry_base_ms", base_ms).set("redis.retry_max_ms", 60_000)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unacknowledged_message_is_sent_five_times_more_then_waits_for_the_return() -> Result<()>
{
    // Two delayers, which must not both re-send a message.
    let mut cluster = impatient(200).nodes(Role::Delayer, 2).start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    let record = records::text("alice", "m", "hello?");
    business.send(&Push { receipts: ReceiptSet::EXHAUSTED, ..record }).await?;
    let mut times = Vec::new();
    let code = loop {
        match phone.next(PATIENCE).await? {
            Incoming::Message(message) => {
                assert_eq!((message.seq, message.id.as_str()), (1, "m"));
                times.push(message.at);
            }
            Incoming::Closed(code, _) => break code,
            _ => {}
        }
    };
    assert_eq!((code, times.len()), (4001, 6), "the first and five more, then closed");
    let waits: Vec<u128> = times.windows(2).map(|w| (w[1] - w[0]).as_millis()).collect();
    for (wait, nominal) in waits.iter().zip([200, 400, 800, 1_600, 3_200]) {
        // 20 % of jitter, and the delayer's interval on a busy machine.
        let (least, most) = (nominal * 8 / 10, nominal * 12 / 10 + 400);
        assert!((least..=most).contains(wait), "{wait} ms for {nominal}: {waits:?}");
    }
    let receipts = cluster.reader(&cluster.topics().receipts)?;
    let receipt = receipts.next(PATIENCE).await?.json()?;
    assert_eq!((&receipt["kind"], &receipt["device"]), (&json!("exhausted"), &json!("phone")));
    let mut phone = cluster.device("alice", "phone").await?;
    assert_eq!(phone.receive(1).await?, ["m"]);
    phone.expect_silence(Duration::from_millis(800)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ack_ends_the_resends_of_this_device_and_no_other() -> Result<()> {
    let mut cluster = impatient(100).start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    let mut tablet = cluster.device("alice", "tablet").await?;
    business.send_text("alice", "m1", "").await?;
    assert_eq!(phone.receive(1).await?, ["m1"]);
    tablet.message().await?;
    assert_eq!(tablet.message().await?.id, "m1", "sent again");
    // New messages for both must not reset the tablet's count, nor add to the phone's.
    for number in 2..8 {
        business.send_text("alice", &format!("m{number}"), "").await?;
        assert_eq!(phone.receive(1).await?, [format!("m{number}")]);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(tablet.closed(PATIENCE).await?, 4001);
    phone.expect_silence(Duration::from_millis(500)).await?;
    let mut tablet = cluster.device("alice", "tablet").await?;
    assert_eq!(tablet.receive(7).await?, (1..8).map(|n| format!("m{n}")).collect::<Vec<_>>());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_crash_of_a_delayer_closes_or_forgets_a_session() -> Result<()> {
    let mut cluster = impatient(200).start().await?;
    let business = cluster.business()?;
    let mut phone = cluster.device("alice", "phone").await?;
    business.send_text("alice", "m", "").await?;
    phone.message().await?;
    cluster.kill(Role::Delayer, 0)?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.launch(Role::Delayer, 0).await?;
    let again = phone.message().await?;
    assert_eq!(again.id, "m");
    phone.ack(again.seq).await?;
    phone.expect_silence(Duration::from_secs(2)).await
}
