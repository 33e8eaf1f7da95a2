//! Everything around the scripts, one step at a time. Redis's answers and what it holds are compared
//! with the shard in memory, and with the promises.

mod checks;
mod steps;

use std::collections::{HashSet, VecDeque};

use barid_core::{
    AppId, Attempt, ConnectionId, DeviceId, IdHash, Incarnation, NodeId, SessionRef, Shard, UserId,
};
use barid_mailbox::{
    AcceptGroup, AcceptMessage, AckRequest, DueUser, Inspection, LogPosition, Mailbox, RedisConfig,
    Source, UserKey,
};
use barid_runtime::SecretUrl;
use barid_testkit::Redis;
use barid_wire::envelope::{self, Envelope};
use bytes::Bytes;
use redis::aio::MultiplexedConnection;

use crate::client::Client;
use crate::mailboxes::{self, ENTRIES_MAX};
use crate::purger::{Group, Partition};
use crate::session::Session;

/// What was broken, in words.
pub type Checked<T = ()> = Result<T, String>;

macro_rules! check {
    ($holds:expr, $($words:tt)*) => {
        if !$holds {
            return Err(format!($($words)*));
        }
    };
}
pub(crate) use check;

pub const USERS: usize = 2;
/// Two of each user.
pub const CLIENTS: usize = 4;

/// A Redis whose only shard the worlds share, one after the other.
pub struct Store {
    pub mailbox: Mailbox,
    connection: MultiplexedConnection,
    config: RedisConfig,
    _redis: Redis,
}

pub struct World<'a> {
    store: &'a mut Store,
    now: mailboxes::Shard,
    replica: mailboxes::Shard,
    log: [Partition; 2],
    /// On their way from the purger to the nodes.
    pushes: [VecDeque<Bytes>; USERS],
    /// Also those whose device has gone elsewhere and that nobody has told.
    sessions: Vec<Session>,
    clients: [Client; CLIENTS],
    claims: Vec<DueUser>,
    /// Every acknowledgement so far, with the index of its client.
    acks: Vec<(usize, AckRequest)>,
    /// Ids whose mailbox expired.
    expired: HashSet<String>,
    connections: u64,
    /// What Redis held after the last step.
    seen: Vec<Inspection>,
}

impl Store {
    pub async fn start() -> Self {
        let redis = Redis::start().await.expect("redis-server starts");
        let config = RedisConfig {
            url: SecretUrl::new(redis.url()),
            shards: 1,
            entries_max: u32::try_from(ENTRIES_MAX).expect("few"),
            // Nothing is due before `make_due` says so.
            retry_base_ms: 600_000,
            retry_max_ms: 600_000,
            retry_jitter: 0.0,
            ..Default::default()
        };
        let mailbox = Mailbox::open(&config, &prometheus::Registry::new()).await;
        let mailbox = mailbox.expect("the mailbox opens");
        let client = redis::Client::open(redis.url()).expect("a URL");
        let connection = client.get_multiplexed_async_connection().await;
        let connection = connection.expect("redis-server answers");
        Self { mailbox, connection, config, _redis: redis }
    }

    async fn eval(&mut self, script: &str, arguments: &[&str]) {
        let mut command = redis::cmd("EVAL");
        command.arg(script).arg(0).arg(arguments);
        let reply: Result<redis::Value, _> = command.query_async(&mut self.connection).await;
        reply.expect("redis runs the test's own script");
    }

    /// A replica has what the master has.
    async fn replicate(&mut self) {
        let script = "for _, k in ipairs(redis.call('KEYS', 'copy:*')) do redis.call('DEL', k) end
            for _, k in ipairs(redis.call('KEYS', '{0}:*')) do redis.call('COPY', k, 'copy:' .. k) end";
        self.eval(script, &[]).await;
    }

    /// The replica is the master: what was written since it last heard of it is forgotten.
    async fn fail_over(&mut self) {
        let script = "for _, k in ipairs(redis.call('KEYS', '{0}:*')) do redis.call('DEL', k) end
            for _, k in ipairs(redis.call('KEYS', 'copy:*')) do
              redis.call('COPY', k, string.sub(k, 6))
            end";
        self.eval(script, &[]).await;
    }

    /// Whoever waits to be due is.
    async fn make_due(&mut self, user: &UserKey) {
        let script = "local fields = redis.call('HGETALL', ARGV[1])
            for i = 1, #fields, 2 do
              local state = fields[i + 1]
              if string.sub(fields[i], 1, 2) == 'd:' and struct.unpack('<d', state, 25) > 0 then
                redis.call('HSET', ARGV[1], fields[i],
                  string.sub(state, 1, 24) .. struct.pack('<d', 1) .. string.sub(state, 33))
              end
            end
            redis.call('ZADD', '{0}:t', 'XX', '1', ARGV[2])";
        let head = format!("{{0}}:h:u:{}:{}", user.app, user.user);
        self.eval(script, &[&head, &format!("{}\0{}", user.app, user.user)]).await;
    }

    /// Head and queue expire together.
    async fn expire(&mut self, user: &UserKey) {
        let name = format!("u:{}:{}", user.app, user.user);
        let script = "redis.call('DEL', '{0}:h:' .. ARGV[1], '{0}:q:' .. ARGV[1])";
        self.eval(script, &[&name]).await;
    }
}

impl<'a> World<'a> {
    /// With an empty Redis.
    pub async fn new(store: &'a mut Store) -> Checked<Self> {
        store
            .eval(
                "for _, k in ipairs(redis.call('KEYS', '*{0}:*')) do redis.call('DEL', k) end",
                &[],
            )
            .await;
        let mut world = Self {
            store,
            now: mailboxes::Shard::default(),
            replica: mailboxes::Shard::default(),
            log: Default::default(),
            pushes: Default::default(),
            sessions: Vec::new(),
            clients: Default::default(),
            claims: Vec::new(),
            acks: Vec::new(),
            expired: HashSet::new(),
            connections: 0,
            seen: Vec::new(),
        };
        for user in 0..USERS {
            let seen = world.store.mailbox.inspect(&user_key(user)).await.map_err(text)?;
            world.seen.push(seen);
        }
        Ok(world)
    }
}

pub fn text(error: barid_mailbox::Error) -> String {
    error.to_string()
}

pub fn user_key(user: usize) -> UserKey {
    let user = ["alice", "bob"][user];
    UserKey { app: AppId::new("demo").expect("a name"), user: UserId::new(user).expect("a name") }
}

/// Whose device a client is.
pub fn user_of(client: usize) -> usize {
    client / 2
}

pub fn device_of(client: usize) -> DeviceId {
    DeviceId::new(["phone", "tablet"][client % 2]).expect("a name")
}

pub fn session_ref(number: u64) -> SessionRef {
    let node = NodeId::new("node-1").expect("a name");
    SessionRef { node, incarnation: Incarnation(1), connection: ConnectionId(number) }
}

pub fn attempt(number: u64) -> Attempt {
    Attempt(number)
}

fn accept_group(shard: Shard, source: usize, group: &Group) -> AcceptGroup {
    let at = |offset: i64| LogPosition { leader_epoch: 0, offset, index: 0 };
    let message = |(offset, user, id): &(i64, usize, String)| AcceptMessage {
        position: at(*offset),
        app: user_key(*user).app,
        user: user_key(*user).user,
        id: IdHash::of(id),
        collapse_key: None,
        body: envelope::encode_body(Envelope { id: id.clone(), ..Default::default() }),
    };
    AcceptGroup {
        shard,
        source: Source { topic_id: "topic".into(), partition: source as i32 },
        prev: group.prev.map(at),
        messages: group.messages.iter().map(message).collect(),
    }
}
