//! The contract on a redis-server alone.
mod support;

use barid_core::*;
use barid_mailbox::*;
use support::*;

#[tokio::test]
async fn first_light() {
    let bed = alone().await;
    let alice = user("alice");
    let outcome = bed.accept(&alice, 1, "a").await;
    assert!(
        matches!(outcome, AcceptOutcome::Accepted { seq: Seq(1), online: false, .. }),
        "{outcome:?}"
    );
    let c = bed.connect(&alice, "phone", 1).await;
    println!("{c:?}");
    let outcome = bed.accept(&alice, 2, "b").await;
    assert!(
        matches!(outcome, AcceptOutcome::Accepted { seq: Seq(2), online: true, .. }),
        "{outcome:?}"
    );
    println!("{:?}", bed.headers(&alice, 0).await);
    println!("{:?}", bed.mailbox.inspect(&alice).await);
    println!("{:?}", bed.ack(&alice, "phone", 1, 2).await);
    println!("{:?}", bed.mailbox.inspect(&alice).await);
    bed.disconnect(&alice, "phone", 1).await;
    println!("{:?}", bed.mailbox.inspect(&alice).await);
}
