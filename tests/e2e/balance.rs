//! A node that is added to a loaded cluster gets its share of the sessions, and no message is lost.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use barid_client::{Client, Token};
use barid_testkit::token::token;
use barid_testkit::{Cluster, Role};
use tokio::time::Instant;

const DEVICES: usize = 40;

type Shown = Arc<Mutex<BTreeMap<String, usize>>>;

fn device(url: &str, user: String, shown: &Shown) -> Result<Client> {
    let (shown, of) = (Arc::clone(shown), user.clone());
    let client = Client::builder(url)
        .device("phone")
        .least_loaded("")
        .token(move || {
            let token = token("demo", &user, Duration::from_secs(600));
            async move { Ok(Token::new(token)) }
        })
        .reconnect_between(Duration::from_millis(50), Duration::from_millis(500))
        .start(move |message| {
            let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
            *shown.entry(format!("{of} {}", message.id)).or_default() += 1;
            async { Ok(()) }
        })?;
    Ok(client)
}

async fn sessions(cluster: &mut Cluster) -> Result<Vec<f64>> {
    let mut sessions = Vec::new();
    for number in 0..cluster.count(Role::Access) {
        let node = cluster.node(Role::Access, number);
        sessions.push(node.metric("barid_access_sessions").await?);
    }
    Ok(sessions)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_added_to_a_loaded_cluster_gets_its_share() -> Result<()> {
    let mut cluster = Cluster::builder()
        .set_of(Role::Access, "lease_ttl_ms", 3_000)
        .set_of(Role::Access, "balance.shed_above", 1.2)
        .set_of(Role::Access, "balance.shed_slack", 2)
        .set_of(Role::Access, "balance.sheds_per_second", 10)
        .start()
        .await?;
    let url = cluster.url(0).await?;
    let (shown, business) = (Shown::default(), cluster.business()?);
    let devices: Vec<Client> =
        (0..DEVICES).map(|n| device(&url, format!("u{n}"), &shown)).collect::<Result<_>>()?;
    let until = async |cluster: &mut Cluster, even: fn(&[f64]) -> bool| {
        let begun = Instant::now();
        loop {
            let sessions = sessions(cluster).await?;
            if even(&sessions) {
                return anyhow::Ok((sessions, begun.elapsed()));
            }
            ensure!(begun.elapsed() < Duration::from_secs(60), "for a minute {sessions:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    until(&mut cluster, |sessions| sessions == [DEVICES as f64]).await?;
    // Messages flow during the whole test.
    let flowing = tokio::spawn(async move {
        for round in 0..40 {
            for n in 0..DEVICES {
                business.send_text(&format!("u{n}"), &format!("m{round}"), "hello").await?;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        anyhow::Ok(())
    });
    cluster.add(Role::Access, 1)?;
    cluster.wait_ready().await?;
    let (sessions, took) = until(&mut cluster, |sessions| {
        sessions.iter().sum::<f64>() == DEVICES as f64
            && sessions.iter().all(|count| (14.0..=26.0).contains(count))
    })
    .await?;
    println!("{sessions:?} {took:?} after the second node was there");
    flowing.await??;
    let begun = Instant::now();
    loop {
        let shown = shown.lock().unwrap_or_else(PoisonError::into_inner).clone();
        ensure!(shown.values().all(|times| *times == 1), "shown again: {shown:?}");
        if shown.len() == DEVICES * 40 {
            break;
        }
        ensure!(begun.elapsed() < Duration::from_secs(30), "{} were shown", shown.len());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for device in devices {
        device.shutdown().await;
    }
    Ok(())
}
