//! A mailbox on a Redis of its own, and short names for what tests ask of it.
#![allow(dead_code)] // each test file uses its part

use barid_core::{
    AppId, Attempt, Chain, ConnectionId, DeviceId, Epoch, Generation, IdHash, Incarnation, NodeId,
    Position, Seq, SessionRef, Shard, UserId,
};
use barid_mailbox::*;
use barid_runtime::SecretUrl;
use barid_testkit::{Redis, RedisCluster};
use barid_wire::envelope::{self, Envelope, Header};
use bytes::Bytes;

/// A Redis of either kind.
pub enum Store {
    Alone(Redis),
    Cluster(RedisCluster),
}

/// A mailbox and what it is tested with.
pub struct Bed {
    pub store: Store,
    pub config: RedisConfig,
    pub mailbox: Mailbox,
}

/// A configuration with short times.
pub fn config(url: &str) -> RedisConfig {
    RedisConfig {
        url: SecretUrl::new(url),
        retry_base_ms: 100,
        retry_max_ms: 1_000,
        retry_jitter: 0.0,
        response_timeout_ms: 2_000,
        ..Default::default()
    }
}

pub async fn open(config: &RedisConfig) -> Mailbox {
    Mailbox::open(config, &prometheus::Registry::new()).await.expect("mailbox opens")
}

/// On a redis-server alone.
pub async fn alone() -> Bed {
    alone_with(|_| {}).await
}

pub async fn alone_with(change: impl FnOnce(&mut RedisConfig)) -> Bed {
    let redis = Redis::start().await.expect("redis-server starts");
    let mut config = config(&redis.url());
    change(&mut config);
    let mailbox = open(&config).await;
    Bed { store: Store::Alone(redis), config, mailbox }
}

/// On a Redis Cluster of three masters.
pub async fn cluster_with(change: impl FnOnce(&mut RedisConfig)) -> Bed {
    let cluster = RedisCluster::start(3).await.expect("redis cluster starts");
    let urls = cluster.urls();
    let mut config = config(&urls[0]);
    config.cluster = true;
    config.urls = urls[1..].iter().map(SecretUrl::new).collect();
    change(&mut config);
    let mailbox = open(&config).await;
    Bed { store: Store::Cluster(cluster), config, mailbox }
}

impl Bed {
    pub fn redis(&mut self) -> &mut Redis {
        match &mut self.store {
            Store::Alone(redis) => redis,
            Store::Cluster(_) => panic!("this bed is a cluster"),
        }
    }

    /// Runs a command on the node that holds the keys of `user`.
    pub async fn query<T: redis::FromRedisValue>(&self, command: &[&str]) -> T {
        match &self.store {
            Store::Alone(redis) => redis.query(command).await.expect("redis answers"),
            Store::Cluster(cluster) => {
                for node in cluster.nodes() {
                    if let Ok(value) = node.query(command).await {
                        return value;
                    }
                }
                panic!("no master took {command:?}");
            }
        }
    }

    pub fn shard(&self, user: &UserKey) -> Shard {
        self.mailbox.shard_of(user)
    }

    /// The name of one of the user's keys: `h` head, `q` queue, `r` routes.
    pub fn key(&self, kind: &str, user: &UserKey) -> String {
        let (shard, UserKey { app, user: name }) = (self.shard(user), user);
        match kind {
            "r" => format!("{{{shard}}}:r:{app}:{name}"),
            _ => format!("{{{shard}}}:{kind}:u:{app}:{name}"),
        }
    }

    /// Accepts one message after `offset - 1`.
    pub async fn accept(&self, user: &UserKey, offset: i64, id: &str) -> AcceptOutcome {
        self.accept_message(message(user, offset, id)).await
    }

    pub async fn accept_message(&self, message: AcceptMessage) -> AcceptOutcome {
        let outcome = self.accept_group(vec![message], None).await;
        match outcome {
            GroupOutcome::Done(mut outcomes) => outcomes.remove(0),
            gap => panic!("{gap:?}"),
        }
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

    pub fn group(&self, messages: Vec<AcceptMessage>, prev: Option<LogPosition>) -> AcceptGroup {
        let first = &messages[0];
        let user = UserKey { app: first.app.clone(), user: first.user.clone() };
        AcceptGroup { shard: self.shard(&user), source: source(), prev, messages }
    }

    /// Connects a device with connection and attempt `n`; it must be let in.
    pub async fn connect(&self, user: &UserKey, device: &str, n: u64) -> Connected {
        match self.mailbox.connect(hello(user, device, n)).await.expect("connect comes through") {
            ConnectOutcome::Connected { cursor, newest, replaced, reset } => {
                Connected { cursor, newest, replaced, reset }
            }
            other => panic!("{other:?}"),
        }
    }

    pub async fn resume(
        &self,
        user: &UserKey,
        device: &str,
        n: u64,
        position: Position,
    ) -> Connected {
        let request = ConnectRequest { position: Some(position), ..hello(user, device, n) };
        match self.mailbox.connect(request).await.expect("connect comes through") {
            ConnectOutcome::Connected { cursor, newest, replaced, reset } => {
                Connected { cursor, newest, replaced, reset }
            }
            other => panic!("{other:?}"),
        }
    }

    pub async fn disconnect(&self, user: &UserKey, device: &str, n: u64) {
        let request = DisconnectRequest {
            user: user.clone(),
            device: DeviceId::new(device).unwrap(),
            session: session(n),
        };
        self.mailbox.disconnect(request).await.expect("disconnect comes through");
    }

    pub async fn page(&self, user: &UserKey, after: u64) -> Page {
        let request = ReadRequest {
            user: user.clone(),
            after: Seq(after),
            entries_max: 1000,
            bytes_max: 1 << 20,
        };
        self.mailbox.read(request).await.expect("read comes through")
    }

    pub async fn headers(&self, user: &UserKey, after: u64) -> Vec<Header> {
        let page = self.page(user, after).await;
        page.entries.iter().map(|entry| Header::parse(entry).expect("an envelope")).collect()
    }

    /// Acknowledges `seq` with the chain that is there.
    pub async fn ack(&self, user: &UserKey, device: &str, n: u64, seq: u64) -> AckOutcome {
        let headers = self.headers(user, seq - 1).await;
        let header = headers.first().expect("the entry is there");
        let (epoch, chain) = (header.epoch, header.chain);
        let request = acked(user, device, n, epoch, seq, chain);
        self.mailbox.ack(request).await.expect("ack comes through")
    }

    pub async fn state(&self, user: &UserKey, device: &str) -> Option<DeviceState> {
        let inspection = self.mailbox.inspect(user).await.expect("inspect comes through");
        inspection.devices.into_iter().find(|state| state.device.as_str() == device)
    }

    pub async fn fire(&self, user: &UserKey) -> Vec<DueUser> {
        let retry = self.config.retry().unwrap();
        self.mailbox.fire(&[self.shard(user)], 100, &retry).await.expect("fire comes through")
    }
}

#[derive(Debug)]
pub struct Connected {
    pub cursor: Position,
    pub newest: Seq,
    pub replaced: Option<SessionRef>,
    pub reset: bool,
}

pub fn user(name: &str) -> UserKey {
    UserKey { app: AppId::new("demo").unwrap(), user: UserId::new(name).unwrap() }
}

pub fn at(offset: i64) -> LogPosition {
    LogPosition { leader_epoch: 0, offset, index: 0 }
}

pub fn source() -> Source {
    Source { topic_id: "topic".into(), partition: 3 }
}

pub fn message(user: &UserKey, offset: i64, id: &str) -> AcceptMessage {
    AcceptMessage {
        position: at(offset),
        app: user.app.clone(),
        user: user.user.clone(),
        id: IdHash::of(id),
        collapse_key: None,
        body: body(id, id.as_bytes()),
    }
}

pub fn body(id: &str, payload: &[u8]) -> Bytes {
    let payload = Bytes::copy_from_slice(payload);
    envelope::encode_body(Envelope { id: id.into(), payload, ..Default::default() })
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

pub fn acked(
    user: &UserKey,
    device: &str,
    n: u64,
    epoch: Epoch,
    seq: u64,
    chain: Chain,
) -> AckRequest {
    AckRequest {
        user: user.clone(),
        device: DeviceId::new(device).unwrap(),
        session: session(n),
        epoch,
        generation: Generation(0),
        seq: Seq(seq),
        chain,
    }
}
