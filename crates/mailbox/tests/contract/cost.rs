//! Not a promise: what the scripts cost. `cargo test -p barid-mailbox cost -- --ignored --nocapture`

use std::time::Instant;

use barid_mailbox::GroupOutcome;

use crate::support::{Bed, message};

/// CPU time that the server has used, microseconds.
async fn cpu(bed: &Bed) -> f64 {
    let info: String = bed.query(&["INFO", "cpu"]).await;
    let fields = ["used_cpu_sys:", "used_cpu_user:"];
    let value = |field| info.lines().find_map(|line| line.strip_prefix(field)?.parse::<f64>().ok());
    fields.into_iter().filter_map(value).sum::<f64>() * 1e6
}

#[tokio::test]
#[ignore = "a measurement"]
async fn cost_of_accept_and_ack() {
    let bed = Bed::own(|config| config.shards = 1).await;
    let () = bed.query(&["CONFIG", "SET", "appendonly", "no"]).await;
    let users: Vec<_> = (0..1000).map(|i| bed.user(&format!("u{i}"))).collect();
    let mut offset = 0;
    for (online, batch) in [(false, 64), (false, 4), (true, 64), (true, 4)] {
        if online && batch == 64 {
            for user in &users {
                bed.connect(user, "phone", 1).await;
                bed.ack(user, "phone", 1, bed.page(user, 0).await.newest.0).await;
            }
        }
        let (before, began, mut count) = (cpu(&bed).await, Instant::now(), 0);
        for _ in 0..(40_000 / 64) {
            let messages = (0..batch).map(|_| {
                offset += 1;
                let user = &users[offset as usize * 7919 % users.len()];
                let mut message = message(user, offset, &format!("id-{offset}"));
                message.body = [&message.body[..], &[0_u8; 200][..]].concat().into();
                message
            });
            let outcome = bed.accept_group(messages.collect(), None).await;
            assert!(matches!(outcome, GroupOutcome::Done(_)), "{outcome:?}");
            count += batch;
        }
        println!(
            "accept online={online} batch={batch}: {:.1} us of the server a message, {:.1} in all",
            (cpu(&bed).await - before) / f64::from(count),
            began.elapsed().as_secs_f64() * 1e6 / f64::from(count)
        );
    }
    for round in 0..3 {
        let mut acks = Vec::new();
        for user in &users {
            let page = bed.page(user, 0).await;
            if let Some(entry) = page.entries.get(round) {
                let header = barid_wire::envelope::Header::parse(entry).expect("a header");
                acks.push((user, bed.position(user, header.seq.0).await));
            }
        }
        let (before, began) = (cpu(&bed).await, Instant::now());
        let all = acks.iter().map(|(user, at)| bed.ack_at(user, "phone", 1, *at));
        futures::future::join_all(all).await;
        println!(
            "ack: {:.1} us of the server an item, {:.1} in all",
            (cpu(&bed).await - before) / acks.len() as f64,
            began.elapsed().as_secs_f64() * 1e6 / acks.len() as f64,
        );
    }
}
