//! A mailbox on a real Redis, and helpers for its calls.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barid_core::{
    AppId, Attempt, Chain, ConnectionId, DeviceId, Generation, IdHash, Incarnation, NodeId, Owner,
    Position, Seq, SessionRef, Shard, UserId,
};
use barid_mailbox::{
    AcceptGroup, AcceptMessage, AcceptOutcome, AckOutcome, AckRequest, ConfirmOutcome,
    ConfirmRequest, ConnectOutcome, ConnectRequest, DeferRequest, DeferWaits, DeviceState,
    DisconnectRequest, DueUser, GroupOutcome, LogPosition, Mailbox, Page, ReadRequest, RedisConfig,
    Source, Unreached, UserKey,
};
use barid_runtime::SecretUrl;
use barid_testkit::redis::RedisOptions;
use barid_testkit::{Redis, RedisCluster};
use barid_wire::envelope::{self, Envelope, Header};
use bytes::Bytes;
use tokio::sync::OnceCell;

/// Runs each function on a redis-server alone and on a Redis Cluster.
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod alone {
            $(#[tokio::test]
            async fn $name() {
                super::$name(crate::support::Bed::alone().await).await;
            })*
        }
        mod cluster {
            $(#[tokio::test]
            async fn $name() {
                super::$name(crate::support::Bed::cluster().await).await;
            })*
        }
    };
}
pub(crate) use contract;

static ALONE: OnceCell<Redis> = OnceCell::const_new();
static CLUSTER: OnceCell<RedisCluster> = OnceCell::const_new();
static BEDS: AtomicU64 = AtomicU64::new(0);

enum Store {
    Shared(&'static Redis),
    Own(Redis),
    Cluster(&'static RedisCluster),
    OwnCluster(RedisCluster),
}

/// A mailbox under test. Users and sources of a bed are its own, although servers are shared.
pub struct Bed {
    store: Store,
    pub config: RedisConfig,
    pub mailbox: Mailbox,
    number: u64,
}

/// No jitter, and nothing becomes due while a test runs: [`Bed::make_due`] does that.
pub fn config(url: &str) -> RedisConfig {
    RedisConfig {
        url: SecretUrl::new(url),
        retry_base_ms: 10_000,
        retry_max_ms: 60_000,
        retry_jitter: 0.0,
        ack_linger_ms: 0,
        // Tests share shards, and some of them lose something there.
        keep_after_loss_seconds: 0,
        ..Default::default()
    }
}

/// Session `n` acknowledges a position.
pub fn ack(user: &UserKey, device: &str, n: u64, at: Position) -> AckRequest {
    AckRequest {
        user: user.clone(),
        device: DeviceId::new(device).unwrap(),
        session: session(n),
        epoch: at.epoch,
        generation: at.generation,
        seq: at.seq,
        chain: at.chain.expect("acks carry the chain"),
    }
}

pub async fn open(config: &RedisConfig) -> Mailbox {
    Mailbox::open(config, &prometheus::Registry::new()).await.expect("the mailbox opens")
}

impl Bed {
    /// On the redis-server that the tests share.
    pub async fn alone() -> Self {
        let start = || async { Redis::start().await.expect("redis-server starts") };
        let redis = ALONE.get_or_init(start).await;
        Self::on(Store::Shared(redis), config(&redis.url())).await
    }

    /// On the Redis Cluster that the tests share.
    pub async fn cluster() -> Self {
        let start = || async { RedisCluster::start(3).await.expect("redis cluster starts") };
        let cluster = CLUSTER.get_or_init(start).await;
        Self::on(Store::Cluster(cluster), cluster_config(cluster)).await
    }

    /// On a redis-server that the test may break.
    pub async fn own(change: impl FnOnce(&mut RedisConfig)) -> Self {
        // Each write is in the file before it is answered, so that a kill loses none; `everysec` answers first while an
        // fsync is under way.
        let settings = vec![("appendfsync".into(), "no".into())];
        let options = RedisOptions { append_only: true, settings };
        let redis = Redis::start_with(options).await.expect("redis-server starts");
        let mut config = config(&redis.url());
        change(&mut config);
        Self::on(Store::Own(redis), config).await
    }

    /// On a Redis Cluster that the test may break.
    pub async fn own_cluster(change: impl FnOnce(&mut RedisConfig)) -> Self {
        let cluster = RedisCluster::start(3).await.expect("redis cluster starts");
        let mut config = cluster_config(&cluster);
        change(&mut config);
        Self::on(Store::OwnCluster(cluster), config).await
    }

    async fn on(store: Store, config: RedisConfig) -> Self {
        let mailbox = open(&config).await;
        Self { store, config, mailbox, number: BEDS.fetch_add(1, Ordering::Relaxed) }
    }

    /// Opens the mailbox again with other settings.
    pub async fn with(mut self, change: impl FnOnce(&mut RedisConfig)) -> Self {
        change(&mut self.config);
        self.mailbox = open(&self.config).await;
        self
    }

    /// The server of [`Bed::own`], for its verbs.
    pub fn redis(&mut self) -> &mut Redis {
        match &mut self.store {
            Store::Own(redis) => redis,
            _ => panic!("this server is shared"),
        }
    }

    /// The cluster of [`Bed::own_cluster`], for its verbs.
    pub fn masters(&mut self) -> &mut RedisCluster {
        match &mut self.store {
            Store::OwnCluster(cluster) => cluster,
            _ => panic!("this is no cluster of its own"),
        }
    }

    /// Every server.
    pub fn nodes(&self) -> &[Redis] {
        match &self.store {
            Store::Shared(redis) => std::slice::from_ref(*redis),
            Store::Own(redis) => std::slice::from_ref(redis),
            Store::Cluster(cluster) => cluster.nodes(),
            Store::OwnCluster(cluster) => cluster.nodes(),
        }
    }

    /// Runs a command on the node that has the key.
    pub async fn query<T: redis::FromRedisValue>(&self, command: &[&str]) -> T {
        let mut error = None;
        for node in self.nodes() {
            match node.query(command).await {
                Ok(value) => return value,
                Err(e) => error = Some(e),
            }
        }
        panic!("nobody took {command:?}: {error:?}");
    }

    /// A user of this test alone.
    pub fn user(&self, name: &str) -> UserKey {
        let name = format!("{name}-{}", self.number);
        UserKey { app: AppId::new("demo").unwrap(), user: UserId::new(&name).unwrap() }
    }

    /// As [`Bed::user`], in a shard in which no concurrent test fires timers: [`Bed::fire`] claims everything due in a
    /// shard.
    pub fn timed_user(&self, name: &str) -> UserKey {
        let own = self.number % u64::from(self.config.shards);
        let mut users = (0..).map(|n| self.user(&format!("{name}-{n}")));
        let user = users.find(|user| u64::from(self.shard(user).get()) == own);
        user.expect("some name is there")
    }

    pub fn shard(&self, user: &UserKey) -> Shard {
        self.mailbox.shard_of(user)
    }

    /// The name of a key: `h` head, `q` queue, `r` routes, `t` timers, `o` positions.
    pub fn key(&self, kind: &str, user: &UserKey) -> String {
        let (shard, UserKey { app, user: name }) = (self.shard(user), user);
        match kind {
            "t" | "o" | "n" => format!("{{{shard}}}:{kind}"),
            "r" => format!("{{{shard}}}:r:{app}:{name}"),
            _ => format!("{{{shard}}}:{kind}:u:{app}:{name}"),
        }
    }

    pub fn source(&self) -> Source {
        Source { topic_id: format!("topic-{}", self.number).into(), partition: 3 }
    }

    pub fn group(&self, messages: Vec<AcceptMessage>, prev: Option<LogPosition>) -> AcceptGroup {
        let first = &messages[0];
        let shard = self.mailbox.shards().shard_of(first.app.as_str(), first.owner.as_str());
        AcceptGroup { shard, source: self.source(), prev, raise: None, messages }
    }

    /// Accepts messages of one shard.
    pub async fn accept_group(
        &self,
        messages: Vec<AcceptMessage>,
        prev: Option<LogPosition>,
    ) -> GroupOutcome {
        let group = self.group(messages, prev);
        self.mailbox.accept(&[group]).await.remove(0).expect("accept comes through")
    }

    pub async fn accept_message(&self, message: AcceptMessage) -> AcceptOutcome {
        match self.accept_group(vec![message], None).await {
            GroupOutcome::Done(mut outcomes) => outcomes.remove(0),
            gap => panic!("{gap:?}"),
        }
    }

    pub async fn accept(&self, user: &UserKey, offset: i64, id: &str) -> AcceptOutcome {
        self.accept_message(message(user, offset, id)).await
    }

    /// Accepts messages `m<offset>`; all of them must be new.
    pub async fn fill(&self, user: &UserKey, offsets: std::ops::RangeInclusive<i64>) {
        for offset in offsets {
            let outcome = self.accept(user, offset, &format!("m{offset}")).await;
            assert!(matches!(outcome, AcceptOutcome::Accepted { .. }), "{outcome:?}");
        }
    }

    /// A device sends Hello.
    pub async fn hello(&self, request: ConnectRequest) -> ConnectOutcome {
        self.mailbox.connect(request).await.expect("connect comes through")
    }

    /// A device connects with connection and attempt `n`.
    pub async fn connect(&self, user: &UserKey, device: &str, n: u64) -> Connected {
        connected(self.hello(hello(user, device, n)).await)
    }

    pub async fn resume(
        &self,
        user: &UserKey,
        device: &str,
        n: u64,
        position: Position,
    ) -> Connected {
        let request = ConnectRequest { position: Some(position), ..hello(user, device, n) };
        connected(self.hello(request).await)
    }

    pub async fn disconnect(&self, user: &UserKey, device: &str, n: u64) {
        let device = DeviceId::new(device).unwrap();
        let request = DisconnectRequest { user: user.clone(), device, session: session(n) };
        self.mailbox.disconnect(request).await.expect("disconnect comes through");
    }

    pub async fn confirm(&self, request: ConfirmRequest) -> ConfirmOutcome {
        self.mailbox.confirm(request).await.expect("confirm comes through")
    }

    pub async fn page(&self, user: &UserKey, after: u64) -> Page {
        self.read(user, None, after).await
    }

    /// As [`Bed::page`], with the device's cursor if entries after `after` are gone.
    pub async fn page_of(&self, user: &UserKey, device: &str, after: u64) -> Page {
        self.read(user, Some(DeviceId::new(device).unwrap()), after).await
    }

    async fn read(&self, user: &UserKey, device: Option<DeviceId>, after: u64) -> Page {
        let bounds = (1_000, 1 << 20);
        let request = ReadRequest {
            user: user.clone(),
            after: Seq(after),
            entries_max: bounds.0,
            bytes_max: bounds.1,
            device,
        };
        self.mailbox.read(request).await.expect("read comes through")
    }

    pub async fn headers(&self, user: &UserKey, after: u64) -> Vec<Header> {
        let page = self.page(user, after).await;
        page.entries.iter().map(|entry| Header::parse(entry).expect("an envelope")).collect()
    }

    /// The position at `seq` as the mailbox has it, under generation 0.
    pub async fn position(&self, user: &UserKey, seq: u64) -> Position {
        let page = self.page(user, seq.saturating_sub(1)).await;
        let chain = match page.entries.first() {
            Some(entry) if seq > 0 => Header::parse(entry).expect("an envelope").chain,
            _ => Chain::START,
        };
        let generation = Generation(0);
        Position { epoch: page.epoch, generation, seq: Seq(seq), chain: Some(chain) }
    }

    /// Session `n` acknowledges a position.
    pub async fn ack_at(&self, user: &UserKey, device: &str, n: u64, at: Position) -> AckOutcome {
        self.mailbox.ack(ack(user, device, n, at)).await.expect("ack comes through")
    }

    /// Session `n` acknowledges `seq` as the mailbox has it.
    pub async fn ack(&self, user: &UserKey, device: &str, n: u64, seq: u64) -> AckOutcome {
        self.ack_at(user, device, n, self.position(user, seq).await).await
    }

    pub async fn state(&self, user: &UserKey, device: &str) -> Option<DeviceState> {
        let inspection = self.mailbox.inspect(user).await.expect("inspect comes through");
        inspection.devices.into_iter().find(|state| state.device.as_str() == device)
    }

    pub async fn timer(&self, user: &UserKey) -> Option<u64> {
        self.mailbox.inspect(user).await.expect("inspect comes through").timer_due_ms
    }

    /// Makes the user's timer and its waiting devices due.
    pub async fn make_due(&self, user: &UserKey) {
        for state in self.mailbox.inspect(user).await.expect("inspect comes through").devices {
            if state.due_ms > 0 {
                self.set_device(user, state.device.as_str(), Number::Due, 1).await;
            }
        }
        let member = format!("{}\0{}", user.app, user.user);
        let () = self.query(&["ZADD", &self.key("t", user), "XX", "1", &member]).await;
    }

    /// Writes one number of a device's stored state.
    pub async fn set_device(&self, user: &UserKey, device: &str, number: Number, value: u64) {
        let script = "local state = redis.call('HGET', KEYS[1], ARGV[1])
            local at, bytes = tonumber(ARGV[2]), tonumber(ARGV[3])
            redis.call('HSET', KEYS[1], ARGV[1], string.sub(state, 1, at)
              .. struct.pack('<I' .. bytes, ARGV[4]) .. string.sub(state, at + bytes + 1))
            return 'OK'";
        let (at, bytes) = match number {
            Number::Due => ("16", "6"),
            Number::Attempt => ("22", "1"),
            Number::Used => ("23", "6"),
        };
        let (head, field, value) = (self.key("h", user), format!("d:{device}"), value.to_string());
        let () = self.query(&["EVAL", script, "1", &head, &field, at, bytes, &value]).await;
    }

    /// Simulates that Redis's time passes, for expiries and timers. On a server of its own.
    pub async fn grow_old(&self, ms: u64) {
        for node in self.nodes() {
            node.grow_old(Duration::from_millis(ms)).await.expect("Redis answers");
        }
    }

    /// Names of keys of one kind: `h`, `q`, `r`, `t`.
    pub async fn keys(&self, kind: &str) -> Vec<String> {
        let mut keys: Vec<String> = Vec::new();
        for pattern in [format!("*}}:{kind}:*"), format!("*}}:{kind}")] {
            keys.extend(self.query::<Vec<String>>(&["KEYS", &pattern]).await);
        }
        keys
    }

    /// Defers a claim.
    pub async fn defer(&self, due: &DueUser, why: Unreached) {
        let request = DeferRequest {
            user: due.user.clone(),
            claimed_score: due.claimed_score,
            devices: due.devices.iter().map(|due| (due.device.clone(), why)).collect(),
        };
        let (waits, retry) = (DeferWaits { base_ms: 500, full_ms: 2_000 }, self.config.retry());
        let given = self.mailbox.defer(&[request], waits, &retry.unwrap()).await;
        given.expect("defer comes through");
    }

    /// Claims due timers; returns this user's claim. The user is a [`Bed::timed_user`].
    pub async fn fire(&self, user: &UserKey) -> Option<DueUser> {
        let retry = self.config.retry().unwrap();
        let due = self.mailbox.fire(&[self.shard(user)], 1_000, &retry).await;
        due.expect("fire comes through").into_iter().find(|due| due.user == *user)
    }
}

/// A number that [`Bed::set_device`] writes.
#[derive(Debug, Clone, Copy)]
pub enum Number {
    Due,
    Attempt,
    Used,
}

fn cluster_config(cluster: &RedisCluster) -> RedisConfig {
    let urls = cluster.urls();
    RedisConfig {
        cluster: true,
        urls: urls[1..].iter().map(SecretUrl::new).collect(),
        ..config(&urls[0])
    }
}

#[derive(Debug)]
pub struct Connected {
    pub cursor: Position,
    pub newest: Seq,
    pub replaced: Option<SessionRef>,
    pub reset: bool,
}

pub fn connected(outcome: ConnectOutcome) -> Connected {
    match outcome {
        ConnectOutcome::Connected { cursor, newest, replaced, reset, .. } => {
            Connected { cursor, newest, replaced, reset }
        }
        other => panic!("{other:?}"),
    }
}

pub fn at(offset: i64) -> LogPosition {
    LogPosition { leader_epoch: 0, offset, index: 0 }
}

pub fn message(user: &UserKey, offset: i64, id: &str) -> AcceptMessage {
    let payload = Bytes::copy_from_slice(id.as_bytes());
    AcceptMessage {
        position: at(offset),
        app: user.app.clone(),
        owner: Owner::User(user.user.clone()),
        id: IdHash::of(id),
        collapse_key: None,
        body: envelope::encode_body(Envelope { id: id.into(), payload, ..Default::default() }),
    }
}

pub fn session(n: u64) -> SessionRef {
    SessionRef {
        node: NodeId::new("node-1").unwrap(),
        incarnation: Incarnation(1),
        connection: ConnectionId(n),
    }
}

pub fn hello(user: &UserKey, device: &str, n: u64) -> ConnectRequest {
    ConnectRequest {
        user: user.clone(),
        device: DeviceId::new(device).unwrap(),
        session: session(n),
        attempt: Attempt(n),
        platform: "test platform".into(),
        position: None,
    }
}

pub fn confirmation(user: &UserKey, device: &str, n: u64, position: Position) -> ConfirmRequest {
    ConfirmRequest {
        user: user.clone(),
        device: DeviceId::new(device).unwrap(),
        session: session(n),
        attempt: Attempt(n),
        platform: "test platform".into(),
        position,
    }
}

pub async fn sleep_ms(ms: u64) {
    tokio::time::sleep(std::time::Duration::from_millis(ms)).await;
}

/// Waits until `done` holds, for 10 s at most.
pub async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    for _ in 0..500 {
        if done().await {
            return;
        }
        sleep_ms(20).await;
    }
    panic!("never: {what}");
}
