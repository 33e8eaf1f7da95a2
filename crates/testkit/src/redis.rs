//! Real redis-server processes: alone, as a Redis Cluster, or as a Sentinel, on private ports and in
//! temporary directories.

use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use redis::{FromRedisValue, Value};

use crate::ports::free_port;
use crate::process::Process;
use crate::spawner::Scratch;

/// For a start, which takes 30 ms on an idle machine.
const START_LIMIT: Duration = Duration::from_secs(30);
/// For an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// After this time without an answer, a node of a Redis Cluster counts as down.
const NODE_TIMEOUT: Duration = Duration::from_secs(1);
/// Hash slots of a Redis Cluster.
const SLOTS: u16 = 16_384;

/// Options of a server.
#[derive(Debug, Clone, Default)]
pub struct RedisOptions {
    /// Keep data over a `kill -9` (appendonly yes, appendfsync everysec), except writes answered while an fsync was
    /// under way.
    pub append_only: bool,
    /// Further settings, as on the command line without the dashes: `("maxmemory", "10mb")`.
    pub settings: Vec<(String, String)>,
}

/// A running redis-server. Killed, and its data removed, on drop and with the test process.
#[derive(Debug)]
pub struct Redis {
    // First: the process ends before its directory is removed.
    process: Option<Process>,
    port: u16,
    options: RedisOptions,
    dir: Scratch,
}

impl Redis {
    /// Starts a server that keeps nothing on disk.
    ///
    /// # Errors
    /// Returns an error if redis-server is not installed, or with the end of its log if it does not start.
    pub async fn start() -> Result<Self> {
        Self::start_with(RedisOptions::default()).await
    }

    /// Starts a server and waits until it answers.
    ///
    /// # Errors
    /// As [`Redis::start`].
    pub async fn start_with(options: RedisOptions) -> Result<Self> {
        let mut redis = Self::down(options)?;
        redis.restart().await?;
        Ok(redis)
    }

    /// A server that is not running: start it with [`Redis::restart`].
    pub(crate) fn down(options: RedisOptions) -> Result<Self> {
        let dir = Scratch::new("barid-redis-").context("directory for Redis's data")?;
        Ok(Self { process: None, port: free_port(), options, dir })
    }

    /// `redis://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Runs a command, on a connection of its own: `redis.query(&["SCRIPT", "FLUSH"])`.
    ///
    /// # Errors
    /// Returns an error if Redis does not answer, or refuses the command.
    pub async fn query<T: FromRedisValue>(&self, command: &[impl AsRef<[u8]>]) -> Result<T> {
        let client = redis::Client::open(self.url())?;
        let patience = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER_LIMIT))
            .set_response_timeout(Some(ANSWER_LIMIT));
        let mut connection = client.get_multiplexed_async_connection_with_config(&patience).await?;
        let mut cmd = redis::Cmd::new();
        for part in command {
            cmd.arg(part.as_ref());
        }
        Ok(cmd.query_async(&mut connection).await?)
    }

    /// `kill -9`. The port, and with `append_only` the data, stay for [`Redis::restart`].
    ///
    /// # Errors
    /// Returns an error if it is not running.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("Redis is not running")?.kill()
    }

    /// SIGSTOP: connections stay open and nothing is answered.
    ///
    /// # Errors
    /// Returns an error if it is not running.
    pub fn stop(&mut self) -> Result<()> {
        self.process.as_mut().context("Redis is not running")?.stop()
    }

    /// SIGCONT, after [`Redis::stop`].
    ///
    /// # Errors
    /// Returns an error if it is not running.
    pub fn cont(&mut self) -> Result<()> {
        self.process.as_mut().context("Redis is not running")?.cont()
    }

    /// Makes it a replica of the server at a port of this machine, and waits until it has the data.
    ///
    /// # Errors
    /// Returns an error if it does not within the time limit.
    pub async fn follow(&self, port: u16) -> Result<()> {
        let port = port.to_string();
        let _: Value = self.query(&["REPLICAOF", "127.0.0.1", &port]).await?;
        self.follows().await
    }

    /// Waits until it is a replica with a link to its master.
    ///
    /// # Errors
    /// Returns an error if it does not within the time limit.
    pub async fn follows(&self) -> Result<()> {
        self.until_replication(&["master_link_status:up"], START_LIMIT).await
    }

    /// Waits until INFO's section `replication` contains all these words. Calls that fail are repeated: a
    /// Sentinel closes all clients' connections of a server whose role it changes (CLIENT KILL TYPE normal).
    ///
    /// # Errors
    /// It does not within `limit`; shows the last answer.
    pub async fn until_replication(&self, words: &[&str], limit: Duration) -> Result<()> {
        let began = Instant::now();
        loop {
            let info = self.info("replication").await;
            if info.as_ref().is_ok_and(|info| words.iter().all(|word| info.contains(word))) {
                return Ok(());
            }
            ensure!(began.elapsed() < limit, "replication is never {words:?}: {info:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A section of INFO.
    ///
    /// # Errors
    /// Returns an error if it does not answer.
    pub async fn info(&self, section: &str) -> Result<String> {
        self.query(&["INFO", section]).await
    }

    /// Makes everything in mailboxes and all timers older by this time, as if it had passed. Leases are not
    /// changed, because their nodes renew them.
    ///
    /// # Errors
    /// Returns an error if it does not answer.
    pub async fn grow_old(&self, time: Duration) -> Result<()> {
        const SCRIPT: &str = "local ms = tonumber(ARGV[1])
            for i = 2, #ARGV do
              local k = ARGV[i]
              local at = redis.call('PEXPIRETIME', k)
              if string.find(k, '}:h:', 1, true) then
                local s = redis.call('HGET', k, 's')
                if s then
                  local x, ct = struct.unpack('<I6I6', s, 30)
                  redis.call('HSET', k, 's', string.sub(s, 1, 29)
                    .. struct.pack('<I6I6', x - ms, ct - ms) .. string.sub(s, 42))
                end
                if redis.call('HEXISTS', k, 'y') == 1 then redis.call('HINCRBY', k, 'y', -ms) end
              elseif string.find(k, '}:o$') then
                if redis.call('HEXISTS', k, 'lost') == 1 then redis.call('HINCRBY', k, 'lost', -ms) end
              elseif string.find(k, '}:t$') then
                local members = redis.call('ZRANGE', k, 0, -1)
                for _, member in ipairs(members) do redis.call('ZINCRBY', k, -ms, member) end
              end
              if at > 0 then redis.call('PEXPIREAT', k, string.format('%d', at - ms)) end
            end
            return 'OK'";
        /// Few enough that a call takes little time on a busy machine.
        const KEYS: usize = 500;
        let keys: Vec<String> = self.query(&["KEYS", "{*}:*"]).await?;
        let ms = time.as_millis().to_string();
        for keys in keys.chunks(KEYS) {
            let mut command = vec!["EVAL", SCRIPT, "0", &ms];
            command.extend(keys.iter().map(String::as_str));
            let _: Value = self.query(&command).await?;
        }
        Ok(())
    }

    /// Kills it if it is running, starts it on the same port and waits until it answers.
    ///
    /// # Errors
    /// Returns an error with the end of its log if it does not start.
    pub async fn restart(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill()?;
        }
        let log = self.dir.path().join("redis.log");
        let mut process = Process::spawn("redis-server", "redis-server", &log, |command| {
            command.current_dir(self.dir.path()).args(arguments(self.port, &self.options));
        })?;
        let began = Instant::now();
        while !answers(self.port) {
            process.must_run()?;
            if began.elapsed() > START_LIMIT {
                bail!("redis-server does not answer:\n{}", process.tail(20));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.process = Some(process);
        Ok(())
    }

    /// The directory of its data and its log.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// A Redis Cluster of masters without replicas. Slots are spread evenly over them.
#[derive(Debug)]
pub struct RedisCluster {
    nodes: Vec<Redis>,
}

impl RedisCluster {
    /// Starts `masters` servers and joins them.
    ///
    /// # Errors
    /// Returns an error if a server does not start, or the cluster is not formed in time.
    pub async fn start(masters: u16) -> Result<Self> {
        Self::start_with(masters, NODE_TIMEOUT).await
    }

    /// As [`RedisCluster::start`], with a long node timeout, for tests without promotions: on a busy machine,
    /// masters that do not hear from each other for a second consider the cluster down.
    ///
    /// # Errors
    /// As [`RedisCluster::start`].
    pub async fn start_patient(masters: u16) -> Result<Self> {
        Self::start_with(masters, 5 * NODE_TIMEOUT).await
    }

    async fn start_with(masters: u16, node_timeout: Duration) -> Result<Self> {
        ensure!(masters > 0, "a cluster has at least one master");
        let mut nodes = Vec::new();
        for _ in 0..masters {
            nodes.push(cluster_node(node_timeout).await?);
        }
        let cluster = Self { nodes };
        cluster.join().await?;
        Ok(cluster)
    }

    /// The masters.
    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    /// One of the masters.
    pub fn node(&mut self, index: usize) -> &mut Redis {
        &mut self.nodes[index]
    }

    /// The URLs of all masters.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Redis::url).collect()
    }

    /// The master that serves a key.
    ///
    /// # Errors
    /// Returns an error if no master serves it, or none answers.
    pub async fn master_of(&self, key: &str) -> Result<usize> {
        for (index, node) in self.nodes.iter().enumerate() {
            if node.query::<i64>(&["EXISTS", key]).await.is_ok() {
                return Ok(index);
            }
        }
        bail!("no master serves {key}")
    }

    /// Begins to move the slot of `key` to another master: the other one has the keys, this one still has the
    /// slot and answers ASK. [`RedisCluster::arrive`] completes the move.
    ///
    /// # Errors
    /// Returns an error if a master does not answer, or refuses.
    pub async fn depart(&self, key: &str, to: usize) -> Result<Moving> {
        let from = self.master_of(key).await?;
        let (source, target) = (&self.nodes[from], &self.nodes[to]);
        let slot: u16 = source.query(&["CLUSTER", "KEYSLOT", key]).await?;
        let moving = Moving { slot: slot.to_string(), from, to };
        let (here, there) = (source.id().await?, target.id().await?);
        target.set_slot(&moving.slot, "IMPORTING", &here).await?;
        source.set_slot(&moving.slot, "MIGRATING", &there).await?;
        let keys: Vec<String> =
            source.query(&["CLUSTER", "GETKEYSINSLOT", &moving.slot, "10000"]).await?;
        let port = target.port().to_string();
        for key in &keys {
            let _: Value = source.query(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]).await?;
        }
        Ok(moving)
    }

    /// Completes the move of a slot: other masters answer MOVED from now on.
    ///
    /// # Errors
    /// Returns an error if a master does not answer, or refuses.
    pub async fn arrive(&self, moving: Moving) -> Result<()> {
        let there = self.nodes[moving.to].id().await?;
        // The new master first: otherwise no master serves the slot for a moment.
        for index in [moving.to, moving.from] {
            self.nodes[index].set_slot(&moving.slot, "NODE", &there).await?;
        }
        Ok(())
    }

    /// Adds a node as a replica of a master.
    ///
    /// # Errors
    /// As [`RedisCluster::start`].
    pub async fn replicate(&self, master: usize) -> Result<Redis> {
        self.replicate_of(&self.nodes[master]).await
    }

    /// Adds a node as a replica of a node that has become a master.
    ///
    /// # Errors
    /// As [`RedisCluster::start`].
    pub async fn replicate_of(&self, master: &Redis) -> Result<Redis> {
        let replica = cluster_node(NODE_TIMEOUT).await?;
        let id = master.id().await?;
        let bus: Vec<String> = master.query(&["CONFIG", "GET", "cluster-port"]).await?;
        let port = master.port().to_string();
        let _: Value = replica.query(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus[1]]).await?;
        let began = Instant::now();
        // It has to know its master.
        while replica.query::<Value>(&["CLUSTER", "REPLICATE", &id]).await.is_err() {
            ensure!(began.elapsed() < START_LIMIT, "the replica does not join");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        replica.follows().await?;
        Ok(replica)
    }

    async fn join(&self) -> Result<()> {
        let masters = u16::try_from(self.nodes.len())?;
        let first = &self.nodes[0];
        for (index, node) in (0..masters).zip(&self.nodes) {
            let slot = |i: u16| u32::from(SLOTS) * u32::from(i) / u32::from(masters);
            let (from, to) = (slot(index).to_string(), (slot(index + 1) - 1).to_string());
            let epoch = (index + 1).to_string();
            let _: Value = node.query(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch]).await?;
            let _: Value = node.query(&["CLUSTER", "ADDSLOTSRANGE", &from, &to]).await?;
            if index > 0 {
                let bus: Vec<String> = node.query(&["CONFIG", "GET", "cluster-port"]).await?;
                let (port, bus) = (node.port().to_string(), &bus[1]);
                let _: Value = first.query(&["CLUSTER", "MEET", "127.0.0.1", &port, bus]).await?;
            }
        }
        let began = Instant::now();
        while !self.agrees().await? {
            ensure!(began.elapsed() < START_LIMIT, "the cluster does not agree");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn agrees(&self) -> Result<bool> {
        for node in &self.nodes {
            let info: String = node.query(&["CLUSTER", "INFO"]).await?;
            let all = info.contains("cluster_state:ok")
                && info.contains(&format!("cluster_slots_ok:{SLOTS}"))
                && info.contains(&format!("cluster_known_nodes:{}", self.nodes.len()));
            if !all {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A slot that is being moved; see [`RedisCluster::depart`].
#[derive(Debug)]
#[must_use]
pub struct Moving {
    slot: String,
    from: usize,
    to: usize,
}

impl Redis {
    /// The node's id in a Redis Cluster.
    async fn id(&self) -> Result<String> {
        self.query(&["CLUSTER", "MYID"]).await
    }

    async fn set_slot(&self, slot: &str, verb: &str, id: &str) -> Result<()> {
        let _: Value = self.query(&["CLUSTER", "SETSLOT", slot, verb, id]).await?;
        Ok(())
    }
}

async fn cluster_node(node_timeout: Duration) -> Result<Redis> {
    let node_timeout = node_timeout.as_millis().to_string();
    let settings = [
        ("cluster-enabled", "yes"),
        ("cluster-node-timeout", &*node_timeout),
        // A master that is down affects its own slots only.
        ("cluster-require-full-coverage", "no"),
        // Replicas stay with their master.
        ("cluster-allow-replica-migration", "no"),
    ];
    let settings = settings.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
    // By default the bus port is 10,000 above, which may be the port of another server.
    let bus = ("cluster-port".to_owned(), free_port().to_string());
    let settings = [settings, vec![bus]].concat();
    Redis::start_with(RedisOptions { settings, ..Default::default() }).await
}

/// A Redis Sentinel that watches one master under the name `main`, with a quorum of one.
#[derive(Debug)]
pub struct Sentinel {
    // First: the process ends before its directory is removed.
    process: Process,
    port: u16,
    _dir: Scratch,
}

impl Sentinel {
    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// Returns an error if redis-server is not installed, or with the end of its log if it does not start.
    pub async fn start(master: &Redis) -> Result<Self> {
        let dir = Scratch::new("barid-sentinel-").context("directory for a Sentinel")?;
        let port = free_port();
        let config = dir.path().join("sentinel.conf");
        // Do not reconfigure replicas that follow through a relay while a failover may take place.
        let text = format!(
            "port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {} 1\n\
             sentinel down-after-milliseconds main 3000\n\
             sentinel failover-timeout main 600000\n",
            master.port()
        );
        std::fs::write(&config, text)?;
        let log = dir.path().join("sentinel.log");
        let mut process = Process::spawn("sentinel", "redis-server", &log, |command| {
            command.current_dir(dir.path()).arg(config).arg("--sentinel");
        })?;
        let began = Instant::now();
        while !answers(port) {
            process.must_run()?;
            if began.elapsed() > START_LIMIT {
                bail!("the Sentinel does not answer:\n{}", process.tail(20));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let sentinel = Self { process, port, _dir: dir };
        // A replica is promoted only if its last INFO is less than 5 s old. It is asked every 10 s, and once more in
        // the tick before the choice, for the answer to which a busy machine leaves too little time. Without a
        // replica to promote, the Sentinel gives up for twice the failover-timeout.
        let _: Value = sentinel.query(&["SENTINEL", "DEBUG", "INFO-PERIOD", "1000"]).await?;
        Ok(sentinel)
    }

    async fn query<T: FromRedisValue>(&self, command: &[&str]) -> Result<T> {
        let client = redis::Client::open(self.url())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        Ok(redis::cmd(command[0]).arg(&command[1..]).query_async(&mut connection).await?)
    }

    /// `redis://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The last lines of its log.
    pub fn log(&self) -> String {
        self.process.tail(20)
    }

    /// Waits until it knows `count` replicas: before, it cannot promote one.
    ///
    /// # Errors
    /// Returns an error if it does not within the time limit.
    pub async fn knows_replicas(&self, count: usize) -> Result<()> {
        let began = Instant::now();
        while self.query::<Vec<Value>>(&["SENTINEL", "REPLICAS", "main"]).await?.len() < count {
            ensure!(began.elapsed() < START_LIMIT, "the Sentinel does not know the replicas");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

fn arguments(port: u16, options: &RedisOptions) -> Vec<String> {
    let append_only = if options.append_only { "yes" } else { "no" };
    let mut settings = vec![
        ("port".into(), port.to_string()),
        ("bind".into(), "127.0.0.1".into()),
        ("save".into(), String::new()),
        ("appendonly".into(), append_only.into()),
        ("appendfsync".into(), "everysec".into()),
        ("maxmemory-policy".into(), "noeviction".into()),
    ];
    settings.extend(options.settings.iter().cloned());
    settings.into_iter().flat_map(|(key, value)| [format!("--{key}"), value]).collect()
}

/// Whether the server answers PING and has loaded its data.
fn answers(port: u16) -> bool {
    use std::io::{Read as _, Write as _};
    let ping = || {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"PING\r\n")?;
        let mut answer = [0; 5];
        stream.read_exact(&mut answer)?;
        std::io::Result::Ok(&answer == b"+PONG")
    };
    ping().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn data_survives_kill_9_with_append_only() {
        let options = RedisOptions { append_only: true, ..Default::default() };
        let mut redis = Redis::start_with(options).await.unwrap();
        let _: Value = redis.query(&["SET", "key", "kept"]).await.unwrap();
        redis.kill().unwrap();
        assert!(redis.query::<Value>(&["PING"]).await.is_err());
        redis.restart().await.unwrap();
        assert_eq!(redis.query::<String>(&["GET", "key"]).await.unwrap(), "kept");
    }

    #[tokio::test]
    async fn a_cluster_of_three_serves_all_slots() {
        let cluster = RedisCluster::start(3).await.unwrap();
        let slots: Vec<Value> = cluster.nodes()[2].query(&["CLUSTER", "SLOTS"]).await.unwrap();
        assert_eq!(slots.len(), 3);
    }
}
