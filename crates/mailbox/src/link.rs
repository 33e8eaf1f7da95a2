//! One connection to one Redis node, re-established whenever it breaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, RedisError, ServerErrorKind, Value};

use crate::dial::{dial, warn_sparingly};
use crate::error::{NOT_CONNECTED, cause};
use crate::layout::LAYOUT;
use crate::redis_clock::RedisClock;
use crate::scripts::{Call, Script};
use crate::{Error, RedisConfig, keys};

/// How often a new connection reads the time: the fastest answer is the most precise.
const FIRST_TIMES: usize = 8;
/// How long calls fail at once after a failed attempt to connect.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// A Redis node: its address, its connection if there is one, and its clock.
pub(crate) struct Link {
    client: Client,
    shards: u32,
    connect_timeout: Duration,
    response_timeout: Duration,
    live: RwLock<Option<Live>>,
    /// Held during an attempt to connect; when the last one failed, and why.
    attempt: tokio::sync::Mutex<Option<(Instant, Error)>>,
    clock: RedisClock,
    /// Whether new connections record shard count and layout in an empty Redis. Not before it is known that no process
    /// of another layout is running.
    records_meta: AtomicBool,
    on_connect: Box<dyn Fn() + Send + Sync>,
}

#[derive(Clone)]
struct Live {
    connection: MultiplexedConnection,
    number: u64,
}

impl Link {
    /// A link to `client`'s node, not connected yet. `records_meta`: as after [`Self::record_meta`]. `on_connect` is
    /// called for each connection.
    pub fn new(
        client: Client,
        config: &RedisConfig,
        records_meta: bool,
        on_connect: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            client,
            shards: config.shards,
            connect_timeout: config.connect_timeout(),
            response_timeout: config.response_timeout(),
            live: RwLock::new(None),
            attempt: tokio::sync::Mutex::new(None),
            clock: RedisClock::new(),
            records_meta: AtomicBool::new(records_meta),
            on_connect: Box::new(on_connect),
        })
    }

    /// Runs a script, and loads it first if this node does not have it.
    pub async fn run(&self, script: &Script, call: &Call) -> Result<Value, RedisError> {
        let cmd = script.command(call);
        match self.send(&cmd).await {
            Err(error) if is_no_script(&error) => {
                self.send(&script.load()).await?;
                self.send(&cmd).await
            }
            done => done,
        }
    }

    /// Sends one command. Drops a connection that fails or does not answer in time.
    pub async fn send(&self, cmd: &Cmd) -> Result<Value, RedisError> {
        let mut live = self.live().await?;
        let sent = live.connection.send_packed_command(cmd).await;
        let sent = sent.and_then(Value::extract_error);
        if let Err(error) = &sent
            && breaks_connection(error)
        {
            self.drop_connection(live.number);
        }
        sent.map_err(|error| self.named(error))
    }

    /// An error of the connection, with the address.
    fn named(&self, error: RedisError) -> RedisError {
        if !error.is_io_error() {
            return error;
        }
        let address = self.client.get_connection_info().addr();
        RedisError::from((ErrorKind::Io, NOT_CONNECTED, format!("{address}: {}", cause(&error))))
    }

    /// Runs calls of a script and then WAIT, in one pipeline: on another connection WAIT would not cover these calls,
    /// and on a new one it would answer at once. WAIT says nothing of a call that failed or was redirected, which was
    /// not executed. A connection that breaks fails all calls.
    pub async fn run_replicated(
        &self,
        script: &Script,
        calls: &[&Call],
        replicas: u32,
        timeout_ms: u64,
    ) -> Vec<Result<Value, ReplicatedError>> {
        let mut results = self.run_and_wait(script, calls, replicas, timeout_ms).await;
        let not_loaded = |result: &Result<_, _>| matches!(result, Err(ReplicatedError::Call(e)) if is_no_script(e));
        let again: Vec<usize> = (0..calls.len()).filter(|i| not_loaded(&results[*i])).collect();
        if !again.is_empty() && self.send(&script.load()).await.is_ok() {
            let calls: Vec<&Call> = again.iter().map(|index| calls[*index]).collect();
            let second = self.run_and_wait(script, &calls, replicas, timeout_ms).await;
            again.into_iter().zip(second).for_each(|(index, result)| results[index] = result);
        }
        results
    }

    async fn run_and_wait(
        &self,
        script: &Script,
        calls: &[&Call],
        replicas: u32,
        timeout_ms: u64,
    ) -> Vec<Result<Value, ReplicatedError>> {
        let mut pipeline = redis::Pipeline::with_capacity(calls.len() + 1);
        for call in calls {
            pipeline.add_command(script.command(call));
        }
        pipeline.cmd("WAIT").arg(replicas).arg(timeout_ms);
        let failed = |error: RedisError| calls.iter().map(|_| Err(error.clone().into())).collect();
        let mut live = match self.live().await {
            Ok(live) => live,
            Err(error) => return failed(error),
        };
        let sent = live.connection.send_packed_commands(&pipeline, 0, calls.len() + 1).await;
        let mut answers = match sent {
            Ok(answers) if answers.len() == calls.len() + 1 => answers,
            // It is unknown to which call an answer belongs.
            sent => {
                self.drop_connection(live.number);
                let error = sent.map_or_else(
                    |error| self.named(error),
                    |_| malformed_wait("another number of answers"),
                );
                return failed(error);
            }
        };
        let have = match answers.pop().map(Value::extract_error) {
            Some(Ok(Value::Int(have))) => Ok(u32::try_from(have).unwrap_or(0)),
            Some(Err(error)) => Err(error),
            _ => Err(malformed_wait("not a number")),
        };
        answers
            .into_iter()
            .map(|answer| match (answer.extract_error(), &have) {
                (Ok(_), Ok(have)) if *have < replicas => {
                    Err(ReplicatedError::TooFew { have: *have })
                }
                (Ok(_), Err(error)) => Err(error.clone().into()),
                (Ok(value), Ok(_)) => Ok(value),
                // The call's own error, whatever WAIT says: a former master answers both with errors.
                (Err(error), _) => {
                    if breaks_connection(&error) {
                        self.drop_connection(live.number);
                    }
                    Err(error.into())
                }
            })
            .collect()
    }

    /// Number of replicas connected to this node.
    pub async fn replicas(&self) -> Result<u32, Error> {
        let role = self.send(&redis::cmd("ROLE")).await?;
        let (_, _, replicas): (String, u64, Vec<Value>) =
            redis::from_redis_value(role).map_err(|e| Error::Unexpected(e.to_string()))?;
        Ok(u32::try_from(replicas.len()).unwrap_or(u32::MAX))
    }

    /// Warns if `min-replicas-to-write` is set, which refuses more than accept while a replica is away.
    pub async fn warn_of_min_replicas(&self) {
        let mut get = redis::cmd("CONFIG");
        get.arg("GET").arg("min-replicas-to-write");
        // Some servers do not allow CONFIG.
        let Ok(value) = self.send(&get).await else { return };
        let Ok(pairs) = redis::from_redis_value::<std::collections::HashMap<String, String>>(value)
        else {
            return;
        };
        let min = pairs.get("min-replicas-to-write").map_or("0", String::as_str);
        if min != "0" {
            tracing::warn!(
                min,
                "min-replicas-to-write is set: while a replica is away, redis refuses acknowledgements and connects \
                 too; redis.wait_replicas delays only accept"
            );
        }
    }

    /// Waits for an answer of the node. Also observes its time, for processes that run no scripts.
    pub async fn ping(&self) -> Result<(), Error> {
        let sent = Instant::now();
        let time = self.send(&redis::cmd("TIME")).await?;
        self.observe(time, sent)
    }

    fn observe(&self, time: Value, sent: Instant) -> Result<(), Error> {
        let arrived = Instant::now();
        let (seconds, micros): (u64, u64) =
            redis::from_redis_value(time).map_err(|e| Error::Unexpected(e.to_string()))?;
        self.clock.observe(seconds * 1_000_000 + micros, sent, arrived);
        Ok(())
    }

    /// The client that connects to this node.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// This node's time.
    pub fn clock(&self) -> &RedisClock {
        &self.clock
    }

    /// From now on, connections record shard count and layout in an empty Redis; the current one does so at once.
    pub async fn record_meta(&self) -> Result<(), Error> {
        self.records_meta.store(true, Ordering::Relaxed);
        let live = self.live.read().clone();
        match live {
            Some(mut live) => check_meta(&mut live.connection, self.shards, true).await.map(drop),
            None => Ok(()),
        }
    }

    /// Checks shard count and layout, as at each new connection.
    pub async fn check_meta(&self) -> Result<(), Error> {
        let mut live = self.live().await?;
        check_meta(&mut live.connection, self.shards, true).await.map(drop)
    }

    /// Connects if there is no connection.
    pub async fn ready(&self) -> Result<(), Error> {
        self.live().await.map(drop).map_err(Error::from)
    }

    fn drop_connection(&self, number: u64) {
        let mut live = self.live.write();
        if live.as_ref().is_some_and(|l| l.number == number) {
            *live = None;
        }
    }

    async fn live(&self) -> Result<Live, RedisError> {
        if let Some(live) = self.live.read().clone() {
            return Ok(live);
        }
        let mut attempt = self.attempt.lock().await;
        if let Some(live) = self.live.read().clone() {
            return Ok(live);
        }
        if let Some((at, error)) = &*attempt
            && at.elapsed() < RETRY_AFTER
        {
            return Err(refused(error));
        }
        match self.connect().await {
            Ok(connection) => {
                *attempt = None;
                let live = Live { connection, number: rand::random() };
                *self.live.write() = Some(live.clone());
                (self.on_connect)();
                Ok(live)
            }
            Err(error) => {
                let refusal = refused(&error);
                warn_sparingly!(error, "cannot connect to redis");
                *attempt = Some((Instant::now(), error));
                Err(refusal)
            }
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, Error> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(Some(self.response_timeout));
        let mut connection = dial(&self.client, &config).await?;
        check_node(&mut connection).await?;
        let records_meta = self.records_meta.load(Ordering::Relaxed);
        check_meta(&mut connection, self.shards, records_meta).await?;
        self.clock.reset();
        for _ in 0..FIRST_TIMES {
            let sent = Instant::now();
            let time = redis::cmd("TIME").query_async(&mut connection).await?;
            self.observe(time, sent)?;
        }
        Ok(connection)
    }
}

/// Converts an [`Error`] for a function that fails with a [`RedisError`].
fn refused(error: &Error) -> RedisError {
    let (kind, why) = match error {
        Error::Unusable(why) => (ErrorKind::InvalidClientConfig, why.clone()),
        Error::Away(why) => (ErrorKind::Io, why.clone()),
        other => (ErrorKind::Io, other.to_string()),
    };
    RedisError::from((kind, NOT_CONNECTED, why))
}

/// Why a call that waits for replicas does not count.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplicatedError {
    /// The call or WAIT failed.
    #[error(transparent)]
    Call(#[from] RedisError),
    /// The master executed it, and too few replicas have confirmed it.
    #[error("{have} replicas have confirmed")]
    TooFew { have: u32 },
}

fn malformed_wait(why: &str) -> RedisError {
    RedisError::from((ErrorKind::Io, "malformed answer to WAIT", why.into()))
}

fn is_no_script(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

fn breaks_connection(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly)
}

/// Checks that the node is a master and does not evict: an evicted head is a lost mailbox.
pub(crate) async fn check_node(connection: &mut MultiplexedConnection) -> Result<(), Error> {
    let info: String = redis::cmd("INFO").query_async(connection).await?;
    let field = |name: &str| {
        info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or("")
    };
    if field("role") != "master" {
        return Err(Error::Away(format!("the node is a {}, not a master", field("role"))));
    }
    let (limit, policy) = (field("maxmemory"), field("maxmemory_policy"));
    if limit != "0" && policy != "noeviction" {
        return Err(Error::Unusable(format!(
            "maxmemory-policy is {policy}, which evicts mailboxes; set it to noeviction"
        )));
    }
    Ok(())
}

/// Checks that the recorded shard count and layout are this process's. `records_meta`: records them if they are
/// missing. Returns `None` if this node has no record.
pub(crate) async fn check_meta(
    connection: &mut MultiplexedConnection,
    shards: u32,
    records_meta: bool,
) -> Result<Option<()>, Error> {
    match meta(connection, shards, records_meta).await {
        Ok(None) => Ok(None),
        Ok(Some((recorded, LAYOUT))) if recorded == shards => Ok(Some(())),
        Ok(Some((recorded, LAYOUT))) => Err(Error::Unusable(format!(
            "it was set up with {recorded} shards, but redis.shards is {shards}"
        ))),
        Ok(Some((_, layout))) => Err(Error::Unusable(format!(
            "its keys have layout {layout}, but this program uses layout {LAYOUT}"
        ))),
        // In a Redis Cluster another master has this key, and its link checks it.
        Err(e) if e.kind() == ErrorKind::Server(ServerErrorKind::Moved) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The recorded shard count and layout; `None`: they are missing.
async fn meta(
    connection: &mut MultiplexedConnection,
    shards: u32,
    records_meta: bool,
) -> Result<Option<(u32, u32)>, RedisError> {
    let mut read = redis::cmd("HMGET");
    read.arg(keys::META).arg("shards").arg("schema");
    if let (Some(shards), Some(layout)) = read.query_async(connection).await? {
        return Ok(Some((shards, layout)));
    }
    if !records_meta {
        return Ok(None);
    }
    for (field, value) in [("shards", shards), ("schema", LAYOUT)] {
        let mut write = redis::cmd("HSETNX");
        write.arg(keys::META).arg(field).arg(value);
        let () = write.query_async(connection).await?;
    }
    read.query_async(connection).await.map(Some)
}
