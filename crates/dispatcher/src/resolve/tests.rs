use std::sync::atomic::AtomicUsize;

use barid_core::{AppId, Attempt, ConnectionId, DeviceId, Incarnation, NodeId, SessionRef, UserId};
use prometheus::Registry;
use tokio::sync::{mpsc, oneshot};

use super::*;

/// Redis whose reads are answered by hand.
struct Held {
    reads: mpsc::Sender<Read>,
    count: AtomicUsize,
}

struct Read {
    tracked: bool,
    answer: oneshot::Sender<Result<Vec<Route>, Error>>,
}

impl Held {
    async fn read(&self, tracked: bool) -> Result<Vec<Route>, Error> {
        self.count.fetch_add(1, Ordering::SeqCst);
        let (answer, answered) = oneshot::channel();
        self.reads.send(Read { tracked, answer }).await.unwrap();
        answered.await.unwrap()
    }
}

impl Routes for Held {
    async fn tracked(&self, _: &UserKey) -> Result<Vec<Route>, Error> {
        self.read(true).await
    }
    async fn untracked(&self, _: &UserKey) -> Result<Vec<Route>, Error> {
        self.read(false).await
    }
    async fn remove(&self, _: DisconnectRequest) -> Result<(), Error> {
        Ok(())
    }
    fn shard_of(&self, user: &UserKey) -> Shard {
        shard(user.user.as_str().len() % 2)
    }
    fn shards(&self) -> ShardCount {
        ShardCount::new(2).unwrap()
    }
    fn redis_time(&self, _: Shard) -> Option<RedisTime> {
        None
    }
}

fn shard(number: usize) -> Shard {
    ShardCount::new(2).unwrap().all().nth(number).unwrap()
}

/// As when the connections of both masters are lost.
fn lose(resolver: &Resolver<Held>) {
    resolver.invalidate_shards(&[shard(0), shard(1)]);
}

fn user(name: &str) -> UserKey {
    UserKey { app: AppId::new("demo").unwrap(), user: UserId::new(name).unwrap() }
}

fn routes(connection: u64) -> Vec<Route> {
    let session = SessionRef {
        node: NodeId::new("n1").unwrap(),
        incarnation: Incarnation(7),
        connection: ConnectionId(connection),
    };
    let device = DeviceId::new("phone").unwrap();
    vec![Route { device, session, attempt: Attempt(1), platform: "ios".into() }]
}

fn setup() -> (Resolver<Held>, mpsc::Receiver<Read>) {
    setup_of(1 << 20)
}

fn setup_of(bytes_max: u64) -> (Resolver<Held>, mpsc::Receiver<Read>) {
    let (reads, held) = mpsc::channel(16);
    let limits = Limits {
        bytes_max,
        ttl: Duration::from_secs(600),
        load_timeout: Duration::from_millis(200),
        away: Duration::from_millis(100),
    };
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let resolver =
        Resolver::new(Arc::new(Held { reads, count: AtomicUsize::new(0) }), limits, metrics);
    (resolver, held)
}

fn connection(loaded: Loaded) -> u64 {
    loaded.unwrap()[0].session.connection.0
}

async fn answer(held: &mut mpsc::Receiver<Read>, connection: u64) -> bool {
    let read = held.recv().await.unwrap();
    read.answer.send(Ok(routes(connection))).unwrap();
    read.tracked
}

#[tokio::test(start_paused = true)]
async fn loads_of_one_user_are_coalesced_and_kept() {
    let (resolver, mut held) = setup();
    let (first, second) = (resolver.look(&user("alice")), resolver.look(&user("alice")));
    assert!(answer(&mut held, 1).await);
    assert_eq!((connection(first.routes().await), connection(second.routes().await)), (1, 1));
    assert!(matches!(resolver.look(&user("alice")), Lookup::Hit(_)));
    assert_eq!(resolver.inner.routes.count.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn hazard_20_a_value_that_an_invalidation_overtook_is_not_kept() {
    let (resolver, mut held) = setup();
    let old = resolver.look(&user("alice"));
    let read = held.recv().await.unwrap();
    resolver.invalidate(&user("alice")); // Redis read the old route, and tells of the change
    let new = resolver.look(&user("alice")); // asks anew: it does not join the overtaken load
    read.answer.send(Ok(routes(1))).unwrap();
    assert_eq!(connection(old.routes().await), 1);
    assert!(matches!(resolver.look(&user("alice")), Lookup::Loading(_)));
    answer(&mut held, 2).await;
    assert_eq!(connection(new.routes().await), 2);
    assert_eq!(connection(resolver.look(&user("alice")).routes().await), 2);
    assert_eq!(resolver.inner.metrics.l1_discarded.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_invalidation_removes_what_was_kept() {
    let (resolver, mut held) = setup();
    let look = resolver.look(&user("alice"));
    answer(&mut held, 1).await;
    look.routes().await.unwrap();
    resolver.invalidate(&user("bob"));
    assert!(matches!(resolver.look(&user("alice")), Lookup::Hit(_)));
    resolver.invalidate(&user("alice"));
    assert!(matches!(resolver.look(&user("alice")), Lookup::Loading(_)));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_kept_while_tracking_is_lost_nor_over_its_return() {
    let (resolver, mut held) = setup();
    let before = resolver.look(&user("alice"));
    let read = held.recv().await.unwrap();
    lose(&resolver); // the tracked read's connection is another one now
    read.answer.send(Ok(routes(1))).unwrap();
    before.routes().await.unwrap();
    for _ in 0..2 {
        let look = resolver.look(&user("alice"));
        let tracked = held.recv().await.unwrap();
        tracked.answer.send(Err(Error::Away("not tracked".into()))).unwrap();
        assert!(!answer(&mut held, 2).await, "reads on the ordinary connection");
        assert_eq!(connection(look.routes().await), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn hazard_46_what_a_shard_forgets_is_a_miss_at_once_and_others_keep_theirs() {
    let (resolver, mut held) = setup();
    let (even, odd) = (user("even"), user("odd"));
    for name in [&even, &odd] {
        let look = resolver.look(name);
        answer(&mut held, 1).await;
        look.routes().await.unwrap();
    }
    resolver.invalidate_shards(&[shard(0)]);
    assert!(matches!(resolver.look(&odd), Lookup::Hit(_)));
    let look = resolver.look(&even);
    assert!(matches!(look, Lookup::Loading(_)));
    answer(&mut held, 2).await;
    assert_eq!(connection(look.routes().await), 2);
    lose(&resolver);
    for name in [&even, &odd] {
        assert!(matches!(resolver.look(name), Lookup::Loading(_)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_master_that_is_away_fails_its_own_users_fast_and_no_others() {
    let (resolver, mut held) = setup();
    let (even, odd) = (user("even"), user("odd"));
    let begun = Instant::now();
    let look = resolver.look(&even);
    let unanswered = held.recv().await.unwrap();
    assert_eq!(look.routes().await, Err(Away));
    assert_eq!(begun.elapsed().as_millis(), 200);
    assert!(matches!(resolver.look(&even), Lookup::Away));
    let look = resolver.look(&odd);
    answer(&mut held, 3).await;
    assert_eq!(connection(look.routes().await), 3);
    drop(unanswered);
}

#[tokio::test(start_paused = true)]
async fn hazard_20_a_resend_reads_again_and_writes_back() {
    let (resolver, mut held) = setup();
    let look = resolver.look(&user("alice"));
    answer(&mut held, 1).await;
    look.routes().await.unwrap();
    let again = resolver.look_again(&user("alice"));
    answer(&mut held, 2).await;
    assert_eq!(connection(again.routes().await), 2);
    assert_eq!(connection(resolver.look(&user("alice")).routes().await), 2);
}

#[tokio::test(start_paused = true)]
async fn only_what_has_no_room_counts_as_evicted() {
    // An entry weighs some 370 bytes: two fit.
    let (resolver, mut held) = setup_of(800);
    for count in 1..=6_u64 {
        let look = resolver.look(&user(&format!("user-{count}")));
        answer(&mut held, count).await;
        look.routes().await.unwrap();
    }
    assert_eq!(resolver.entries(), 2);
    assert_eq!(resolver.inner.metrics.l1_evicted.get(), 4);
    lose(&resolver);
    assert_eq!((resolver.entries(), resolver.inner.metrics.l1_evicted.get()), (0, 4));
}
