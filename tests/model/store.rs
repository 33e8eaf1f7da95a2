//! A Redis with one shard, which the worlds use one after the other; reads its content, and makes data expire, get lost
//! or older.

use std::collections::BTreeMap;
use std::time::Duration;

use barid_mailbox::{Mailbox, RedisConfig, UserKey};
use barid_runtime::SecretUrl;
use barid_testkit::Redis;
use bytes::Bytes;
use redis::AsyncConnectionConfig;
use redis::aio::MultiplexedConnection;

use crate::mailboxes::{DEVICES_MAX, ENTRIES_MAX, RETRY_BASE, RETRY_MAX, TTL};
use crate::world::{USERS, user_key};

const TIMEOUT_MS: u64 = 30_000;
const TTL_SECONDS: u64 = 7 * 24 * 3600;
const KEEP_SECONDS: u64 = 24 * 3600;

pub struct Store {
    pub mailbox: Mailbox,
    pub config: RedisConfig,
    connection: MultiplexedConnection,
    _redis: Redis,
}

/// A user's data in Redis.
#[derive(Debug, Clone, Default)]
pub struct Held {
    /// Epoch, oldest, the chain before it, newest, its chain, when it expires, …: as the head's state.
    pub state: Option<Vec<u64>>,
    /// Acknowledged entries are not trimmed.
    pub keeps_all: bool,
    /// In the order of their names.
    pub devices: Vec<HeldDevice>,
    /// Collapse key and seq.
    pub keys: BTreeMap<String, u64>,
    pub entries: Vec<Bytes>,
    /// The chain after each of them.
    pub bytes: Vec<u64>,
    /// Device and text.
    pub routes: BTreeMap<String, String>,
    pub timer: Option<u64>,
    /// When head and queue expire, where they are there.
    pub expires: [Option<u64>; 2],
    pub routes_expire: Option<u64>,
    /// Redis's time.
    pub now: u64,
}

#[derive(Debug, Clone)]
pub struct HeldDevice {
    pub name: String,
    pub seq: u64,
    pub chain: u64,
    pub generation: u64,
    pub due: u64,
    pub resends: u64,
    pub used: u64,
    pub fence: u64,
    pub defers: u64,
}

type Fields = Vec<(Vec<u8>, Vec<u8>)>;
/// Head, queue, routes, timer, when head, queue and routes expire.
type Raw = (Fields, Vec<Vec<u8>>, Fields, Option<String>, i64, i64, i64);

impl Store {
    /// `keeps`: mailboxes keep all behind a loss, for longer than a run takes.
    pub async fn start(keeps: bool) -> Self {
        let redis = Redis::start().await.expect("redis-server starts");
        let config = RedisConfig {
            url: SecretUrl::new(redis.url()),
            shards: 1,
            entries_max: u32::try_from(ENTRIES_MAX).expect("few"),
            devices_max: u32::try_from(DEVICES_MAX).expect("few"),
            ttl_seconds: TTL_SECONDS,
            keep_after_loss_seconds: if keeps { KEEP_SECONDS } else { 0 },
            // Nothing is due before `make_due`.
            retry_base_ms: RETRY_BASE,
            retry_max_ms: RETRY_MAX,
            retry_jitter: 0.0,
            // The model makes one call at a time.
            ack_linger_ms: 0,
            // The machine may be busy.
            connect_timeout_ms: TIMEOUT_MS,
            response_timeout_ms: TIMEOUT_MS,
            ..Default::default()
        };
        let mailbox = Mailbox::open(&config, &prometheus::Registry::new()).await;
        let mailbox = mailbox.expect("the mailbox opens");
        let client = redis::Client::open(redis.url()).expect("a URL");
        let timeout = Some(Duration::from_millis(TIMEOUT_MS));
        let options = AsyncConnectionConfig::new().set_response_timeout(timeout);
        let connection = client.get_multiplexed_async_connection_with_config(&options).await;
        let connection = connection.expect("redis-server answers");
        Self { mailbox, connection, config, _redis: redis }
    }

    pub fn keeps(&self) -> bool {
        self.config.keep_after_loss_seconds > 0
    }

    async fn eval<T: redis::FromRedisValue>(&mut self, script: &str, arguments: &[&str]) -> T {
        let mut command = redis::cmd("EVAL");
        command.arg(script).arg(0).arg(arguments);
        let reply: Result<T, _> = command.query_async(&mut self.connection).await;
        reply.expect("redis runs the test's own script")
    }

    pub async fn empty(&mut self) {
        // Without a node's lease, the first accept would consider the shard empty after a loss.
        let script = "for _, k in ipairs(redis.call('KEYS', '*{0}:*')) do redis.call('DEL', k) end
            redis.call('HSET', '{0}:n', 'node-1', '1 1 0 H ')";
        self.eval(script, &[]).await
    }

    /// Reads everything at one point in time.
    pub async fn look(&mut self) -> Vec<Held> {
        let script = "local all = {}
            for i, user in ipairs(ARGV) do
              local name = 'u:' .. string.gsub(user, '%z', ':')
              local head, queue = '{0}:h:' .. name, '{0}:q:' .. name
              all[i] = { redis.call('HGETALL', head), redis.call('LRANGE', queue, 0, -1),
                redis.call('HGETALL', '{0}:r:' .. string.sub(name, 3)),
                redis.call('ZSCORE', '{0}:t', user),
                redis.call('PEXPIRETIME', head), redis.call('PEXPIRETIME', queue),
                redis.call('PEXPIRETIME', '{0}:r:' .. string.sub(name, 3)) }
            end
            return { redis.call('TIME'), all }";
        let members: Vec<String> = (0..USERS).map(|user| member(&user_key(user))).collect();
        let members: Vec<&str> = members.iter().map(String::as_str).collect();
        let ((seconds, micros), users): ((u64, u64), Vec<Raw>) = self.eval(script, &members).await;
        users.into_iter().map(|raw| held(raw, seconds * 1_000 + micros / 1_000)).collect()
    }

    /// The replica copies the master.
    pub async fn replicate(&mut self) {
        let script = "for _, k in ipairs(redis.call('KEYS', 'copy:*')) do redis.call('DEL', k) end
            for _, k in ipairs(redis.call('KEYS', '{0}:*')) do redis.call('COPY', k, 'copy:' .. k) end";
        self.eval(script, &[]).await
    }

    /// The replica is promoted: everything written since the last copy is lost.
    pub async fn fail_over(&mut self) {
        let script = "for _, k in ipairs(redis.call('KEYS', '{0}:*')) do redis.call('DEL', k) end
            for _, k in ipairs(redis.call('KEYS', 'copy:*')) do
              redis.call('COPY', k, string.sub(k, 6))
            end
            redis.call('HSET', '{0}:n', 'node-1', '1 1 0 H ')";
        self.eval(script, &[]).await
    }

    /// Makes all retries of a user due, or only that of one device.
    pub async fn make_due(&mut self, user: &UserKey, device: Option<&str>) {
        let script = "local fields = redis.call('HGETALL', ARGV[1])
            for i = 1, #fields, 2 do
              local state = fields[i + 1]
              if string.sub(fields[i], 1, 2) == 'd:' and struct.unpack('<I6', state, 17) > 0
                and (not ARGV[3] or fields[i] == 'd:' .. ARGV[3]) then
                redis.call('HSET', ARGV[1], fields[i],
                  string.sub(state, 1, 16) .. struct.pack('<I6', 1) .. string.sub(state, 23))
              end
            end
            redis.call('ZADD', '{0}:t', 'XX', '1', ARGV[2])";
        let head = format!("{{0}}:h:u:{}:{}", user.app, user.user);
        let member = member(user);
        let arguments = [&head, &member].into_iter().map(String::as_str).chain(device);
        self.eval(script, &arguments.collect::<Vec<_>>()).await
    }

    /// Head and queue expire together.
    pub async fn expire(&mut self, user: &UserKey) {
        let name = format!("u:{}:{}", user.app, user.user);
        let script = "redis.call('DEL', '{0}:h:' .. ARGV[1], '{0}:q:' .. ARGV[1])";
        self.eval(script, &[&name]).await
    }

    /// So many units of the model's clock pass for all mailboxes, also the replica's: what was written is
    /// older, and what expires does so earlier. Retries and the use of devices stay where they are.
    pub async fn grow_old(&mut self, units: u64) {
        let script = "local ms = tonumber(ARGV[1])
            local function age(key, at)
              redis.call('PEXPIREAT', key, string.format('%d', at - ms))
            end
            for _, k in ipairs(redis.call('KEYS', '*{0}:h:*')) do
              local state = redis.call('HGET', k, 's')
              local expires = redis.call('PEXPIRETIME', k)
              local x, ct = struct.unpack('<I6I6', state, 30)
              redis.call('HSET', k, 's', string.sub(state, 1, 29)
                .. struct.pack('<I6I6', x - ms, ct - ms) .. string.sub(state, 42))
              if expires > 0 then age(k, expires) end
            end
            for _, k in ipairs(redis.call('KEYS', '*{0}:r:*')) do
              age(k, redis.call('PEXPIRETIME', k))
            end
            for _, k in ipairs(redis.call('KEYS', '*{0}:q:*')) do
              local expires, n = redis.call('PEXPIRETIME', k), redis.call('LLEN', k)
              for i = 0, n - 1, 2 do
                local header = redis.call('LINDEX', k, i)
                local at = struct.unpack('<I8', header, 30) - ms * 1000
                redis.call('LSET', k, i, string.sub(header, 1, 29) .. struct.pack('<I8', at) .. string.sub(header, 38))
              end
              if expires > 0 then age(k, expires) end
            end";
        self.eval(script, &[&(TTL_SECONDS * 1_000 / TTL * units).to_string()]).await
    }
}

fn member(user: &UserKey) -> String {
    format!("{}\0{}", user.app, user.user)
}

fn held((head, queue, routes, timer, head_at, queue_at, routes_at): Raw, now: u64) -> Held {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let field = |name: &[u8]| head.iter().find(|(field, _)| field == name).map(|(_, value)| value);
    let key = |(field, seq): &(Vec<u8>, Vec<u8>)| {
        Some((text(field.strip_prefix(b"k:")?), text(seq).parse().expect("a seq")))
    };
    let state = field(b"s").map(|state| numbers(state, &STATE));
    let keeps_all = field(b"s").is_some_and(|state| state[1] == 1);
    assert_eq!(keeps_all, field(b"y").is_some(), "until when it keeps all, and the flag");
    let known = state.as_ref().map_or(0, |state| state[8]);
    let name = |slot: u64| field(format!("n{slot}").as_bytes()).map(|name| text(name));
    let device = |name: String| {
        let state = numbers(field(format!("d:{name}").as_bytes())?, &DEVICE);
        let [seq, chain, generation, due, resends, used, fence, defers] = state[..] else {
            panic!("the state of a device: {state:?}");
        };
        Some(HeldDevice { name, seq, chain, generation, due, resends, used, fence, defers })
    };
    assert_eq!(name(known), None, "a device is named that is not known");
    let packed = head.iter().all(|(field, value)| field.len() <= 64 && value.len() <= 64);
    assert!(packed, "a field of the head is too long to be packed: {head:?}");
    let time = |at: i64| u64::try_from(at).ok();
    Held {
        state,
        keeps_all,
        devices: (0..known).filter_map(name).filter_map(device).collect(),
        keys: head.iter().filter_map(key).collect(),
        bytes: queue.chunks_exact(2).map(|parts| number(&parts[0][37..41])).collect(),
        entries: queue
            .chunks_exact(2)
            .map(|parts| [&parts[0][..37], &parts[1]].concat().into())
            .collect(),
        routes: routes.iter().map(|(device, route)| (text(device), text(route))).collect(),
        timer: timer.map(|score| score.parse::<f64>().expect("a score") as u64),
        expires: [time(head_at), time(queue_at)],
        routes_expire: time(routes_at),
        now,
    }
}

/// Bytes of each number behind the mark.
const STATE: [usize; 11] = [7, 6, 4, 6, 4, 6, 6, 6, 1, 4, 4];
const DEVICE: [usize; 8] = [6, 4, 4, 6, 1, 6, 7, 1];

/// Unpacks a value that the scripts packed: version, no flags, whole numbers.
fn numbers(state: &[u8], sizes: &[usize]) -> Vec<u64> {
    let mut rest = state.strip_prefix(&[3]).and_then(|rest| rest.get(1..)).expect("layout 3");
    let mut numbers = Vec::new();
    for size in sizes {
        let (bytes, left) = rest.split_at(*size);
        numbers.push(number(bytes));
        rest = left;
    }
    assert!(rest.is_empty(), "a tail: {rest:?}");
    numbers
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
