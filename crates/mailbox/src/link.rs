//! One connection to one Redis node, made again whenever it breaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, RedisError, ServerErrorKind, Value};

use crate::layout::LAYOUT;
use crate::redis_clock::RedisClock;
use crate::scripts::{Call, Script};
use crate::{Error, RedisConfig, keys};

/// A new connection asks for the time so often: the fastest answer tells it best.
const FIRST_TIMES: usize = 8;
/// After a failed attempt to connect, calls fail at once for so long.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// A node of Redis: its address, its connection while there is one, its time.
pub(crate) struct Link {
    client: Client,
    shards: u32,
    connect_timeout: Duration,
    response_timeout: Duration,
    live: RwLock<Option<Live>>,
    /// One attempt at a time; when the last one failed, and how.
    attempt: tokio::sync::Mutex<Option<(Instant, Error)>>,
    clock: RedisClock,
    /// Whether a connection records shard count and layout where nobody has: not before it is known
    /// that no process of another layout is at work.
    founds: AtomicBool,
    on_connect: Box<dyn Fn() + Send + Sync>,
}

#[derive(Clone)]
struct Live {
    connection: MultiplexedConnection,
    number: u64,
}

impl Link {
    /// A link to `client`'s node; nothing is connected yet. `founds`: as after [`Self::found`].
    /// `on_connect` hears of each connection.
    pub fn new(
        client: Client,
        config: &RedisConfig,
        founds: bool,
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
            founds: AtomicBool::new(founds),
            on_connect: Box::new(on_connect),
        })
    }

    /// Runs a script; loads it first where this node does not know it.
    pub async fn run(&self, script: &Script, call: &Call) -> Result<Value, RedisError> {
        let cmd = script.command(call);
        match self.send(&cmd).await {
            Err(e) if e.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                self.send(&script.load()).await?;
                self.send(&cmd).await
            }
            done => done,
        }
    }

    /// Sends one command. A connection that fails or does not answer in time is dropped.
    pub async fn send(&self, cmd: &Cmd) -> Result<Value, RedisError> {
        let mut live = self.live().await?;
        let sent = live.connection.send_packed_command(cmd).await;
        let sent = sent.and_then(Value::extract_error);
        if let Err(error) = &sent
            && breaks_connection(error)
        {
            self.drop_connection(live.number);
        }
        sent
    }

    /// Runs calls of a script, and behind them WAIT, in one pipeline: what follows on another
    /// connection would not wait for them, and on one that was made anew it would answer at once. What
    /// failed or was redirected was not executed, so WAIT says nothing of it; a connection that breaks
    /// fails all of them.
    pub async fn run_replicated(
        &self,
        script: &Script,
        calls: &[&Call],
        replicas: u32,
        timeout_ms: u64,
    ) -> Vec<Result<Value, RedisError>> {
        let mut results = self.round(script, calls, replicas, timeout_ms).await;
        let unknown = |result: &Result<Value, RedisError>| matches!(result, Err(e) if e.kind() == ErrorKind::Server(ServerErrorKind::NoScript));
        let again: Vec<usize> = (0..calls.len()).filter(|i| unknown(&results[*i])).collect();
        if !again.is_empty() && self.send(&script.load()).await.is_ok() {
            let calls: Vec<&Call> = again.iter().map(|index| calls[*index]).collect();
            let second = self.round(script, &calls, replicas, timeout_ms).await;
            again.into_iter().zip(second).for_each(|(index, result)| results[index] = result);
        }
        results
    }

    async fn round(
        &self,
        script: &Script,
        calls: &[&Call],
        replicas: u32,
        timeout_ms: u64,
    ) -> Vec<Result<Value, RedisError>> {
        let mut pipeline = redis::Pipeline::with_capacity(calls.len() + 1);
        for call in calls {
            pipeline.add_command(script.command(call));
        }
        pipeline.cmd("WAIT").arg(replicas).arg(timeout_ms);
        let failed = |error: RedisError| calls.iter().map(|_| Err(error.clone())).collect();
        let mut live = match self.live().await {
            Ok(live) => live,
            Err(error) => return failed(error),
        };
        let sent = live.connection.send_packed_commands(&pipeline, 0, calls.len() + 1).await;
        let mut answers = match sent {
            Ok(answers) if answers.len() == calls.len() + 1 => answers,
            // Whatever came back, it is not known which call it belongs to.
            sent => {
                self.drop_connection(live.number);
                let other = || RedisError::from((ErrorKind::Io, "WAIT", "another answer".into()));
                return failed(sent.err().unwrap_or_else(other));
            }
        };
        let have = match answers.pop().map(Value::extract_error) {
            Some(Ok(Value::Int(have))) => Ok(u32::try_from(have).unwrap_or(0)),
            Some(Err(error)) => Err(error),
            _ => Err(RedisError::from((ErrorKind::Io, "WAIT", "no number".into()))),
        };
        let mut results: Vec<_> = answers.into_iter().map(Value::extract_error).collect();
        for result in &mut results {
            match (&result, &have) {
                (Ok(_), Ok(have)) if *have < replicas => *result = Err(unreplicated(*have)),
                (Ok(_), Err(error)) => *result = Err(error.clone()),
                // What was refused tells why, whatever WAIT says: a former master answers both with errors.
                (Err(error), _) if breaks_connection(error) => self.drop_connection(live.number),
                _ => {}
            }
        }
        results
    }

    /// How many replicas are connected to this node.
    pub async fn replicas(&self) -> Result<u32, Error> {
        let role = self.send(&redis::cmd("ROLE")).await?;
        let (_, _, replicas): (String, u64, Vec<Value>) =
            redis::from_redis_value(role).map_err(|e| Error::Unexpected(e.to_string()))?;
        Ok(u32::try_from(replicas.len()).unwrap_or(u32::MAX))
    }

    /// Warns of a setting that stops more than accepting when a replica is away.
    pub async fn warn_of_min_replicas(&self) {
        let mut get = redis::cmd("CONFIG");
        get.arg("GET").arg("min-replicas-to-write");
        // Some do not let CONFIG be read.
        let Ok(value) = self.send(&get).await else { return };
        let Ok(pairs) = redis::from_redis_value::<std::collections::HashMap<String, String>>(value)
        else {
            return;
        };
        let min = pairs.get("min-replicas-to-write").map_or("0", String::as_str);
        if min != "0" {
            tracing::warn!(
                min,
                "min-replicas-to-write is set: with a replica away this redis refuses \
                 acknowledgements and connects as well; redis.wait_replicas holds up accepting alone"
            );
        }
    }

    /// Answers when the node does, with its time: a process that runs no scripts learns it from here.
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

    /// Where it connects to.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// This node's time.
    pub fn clock(&self) -> &RedisClock {
        &self.clock
    }

    /// From now on its connections record shard count and layout where nobody has; this one does at
    /// once, if there is one.
    pub async fn found(&self) -> Result<(), Error> {
        self.founds.store(true, Ordering::Relaxed);
        let live = self.live.read().clone();
        match live {
            Some(mut live) => check_meta(&mut live.connection, self.shards, true).await,
            None => Ok(()),
        }
    }

    /// As at each new connection: shard count and layout are what the cluster was set up with.
    pub async fn check_meta(&self) -> Result<(), Error> {
        let mut live = self.live().await?;
        check_meta(&mut live.connection, self.shards, true).await
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
                tracing::warn!(%error, "redis refused a connection");
                *attempt = Some((Instant::now(), error));
                Err(refusal)
            }
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, Error> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(Some(self.response_timeout));
        let mut connection =
            self.client.get_multiplexed_async_connection_with_config(&config).await?;
        check_node(&mut connection).await?;
        let founds = self.founds.load(Ordering::Relaxed);
        check_meta(&mut connection, self.shards, founds).await?;
        self.clock.reset();
        for _ in 0..FIRST_TIMES {
            let sent = Instant::now();
            let time = redis::cmd("TIME").query_async(&mut connection).await?;
            self.observe(time, sent)?;
        }
        Ok(connection)
    }
}

/// An [`Error`] on its way through a function that fails with a [`RedisError`].
fn refused(error: &Error) -> RedisError {
    let kind = match error {
        Error::Unusable(_) => ErrorKind::InvalidClientConfig,
        _ => ErrorKind::Io,
    };
    RedisError::from((kind, "not connected", error.to_string()))
}

/// Marks an [`Error::Unreplicated`] on its way through a function that fails with a [`RedisError`].
const UNREPLICATED: &str = "too few replicas have confirmed";

fn unreplicated(have: u32) -> RedisError {
    RedisError::from((ErrorKind::Client, UNREPLICATED, have.to_string()))
}

/// How many replicas had confirmed, where that was too few.
pub(crate) fn replicas_of(error: &RedisError) -> Option<u32> {
    let text = error.to_string();
    text.contains(UNREPLICATED).then(|| error.detail()?.parse().ok()).flatten()
}

fn breaks_connection(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly)
}

/// It must be a master, and must not evict: an evicted head is a lost mailbox.
async fn check_node(connection: &mut MultiplexedConnection) -> Result<(), Error> {
    let info: String = redis::cmd("INFO").query_async(connection).await?;
    let field = |name: &str| {
        info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or("")
    };
    if field("role") != "master" {
        return Err(Error::Away(format!("it is a {}, not a master", field("role"))));
    }
    let (limit, policy) = (field("maxmemory"), field("maxmemory_policy"));
    if limit != "0" && policy != "noeviction" {
        return Err(Error::Unusable(format!(
            "maxmemory-policy is {policy}: it would evict mailboxes; set it to noeviction"
        )));
    }
    Ok(())
}

/// Shard count and layout are what the cluster was created with; recorded by whoever comes first and
/// `founds`.
async fn check_meta(
    connection: &mut MultiplexedConnection,
    shards: u32,
    founds: bool,
) -> Result<(), Error> {
    match meta(connection, shards, founds).await {
        Ok(None) => Ok(()),
        Ok(Some((recorded, LAYOUT))) if recorded == shards => Ok(()),
        Ok(Some((recorded, LAYOUT))) => Err(Error::Unusable(format!(
            "it was set up with {recorded} shards, the configuration says {shards}"
        ))),
        Ok(Some((_, layout))) => Err(Error::Unusable(format!(
            "its keys have layout {layout}, this program knows layout {LAYOUT}"
        ))),
        // In a Redis Cluster another master holds it, and its link checks it.
        Err(e) if e.kind() == ErrorKind::Server(ServerErrorKind::Moved) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Shard count and layout; `None`: nobody has recorded them.
async fn meta(
    connection: &mut MultiplexedConnection,
    shards: u32,
    founds: bool,
) -> Result<Option<(u32, u32)>, RedisError> {
    let mut read = redis::cmd("HMGET");
    read.arg(keys::META).arg("shards").arg("schema");
    if let (Some(shards), Some(layout)) = read.query_async(connection).await? {
        return Ok(Some((shards, layout)));
    }
    if !founds {
        return Ok(None);
    }
    for (field, value) in [("shards", shards), ("schema", LAYOUT)] {
        let mut write = redis::cmd("HSETNX");
        write.arg(keys::META).arg(field).arg(value);
        let () = write.query_async(connection).await?;
    }
    read.query_async(connection).await.map(Some)
}
