//! A private redis-server and what it has used.

use std::time::Duration;

use anyhow::{Context as _, Result};
use barid_testkit::Redis;
use barid_testkit::redis::RedisOptions;
use redis::AsyncConnectionConfig;
use redis::aio::MultiplexedConnection;

const PATIENCE: Duration = Duration::from_secs(60);

/// A redis-server with one connection that asks what it has used.
pub struct Server {
    redis: Redis,
    connection: MultiplexedConnection,
}

/// What a server has used since it started.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// CPU time of the process, microseconds.
    pub cpu_us: f64,
    /// Time inside EVALSHA, microseconds on the clock.
    pub script_us: f64,
    /// EVALSHA calls.
    pub calls: f64,
    /// WAIT calls.
    pub waits: f64,
}

impl Server {
    pub async fn start(append_only: bool) -> Result<Self> {
        Self::start_with(RedisOptions { append_only, ..Default::default() }).await
    }

    pub async fn start_with(options: RedisOptions) -> Result<Self> {
        let redis = Redis::start_with(options).await?;
        let client = redis::Client::open(redis.url())?;
        // A busy machine may keep an answer waiting; that is no reason to lose a run.
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        let connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        Ok(Self { redis, connection })
    }

    pub fn redis(&self) -> &Redis {
        &self.redis
    }

    pub fn url(&self) -> String {
        self.redis.url()
    }

    pub fn connection(&self) -> MultiplexedConnection {
        self.connection.clone()
    }

    pub async fn usage(&mut self) -> Result<Usage> {
        let calls: String = self.info("commandstats").await?;
        // A command that was never called has no line.
        let of = |command: &str, name: &str| {
            let line = calls.lines().find_map(|line| line.strip_prefix(command)?.strip_prefix(':'));
            let mut pairs = line.unwrap_or_default().split(',');
            let value = |pair: &str| pair.strip_prefix(name)?.strip_prefix('=')?.parse().ok();
            pairs.find_map(value).unwrap_or(0.0)
        };
        let cpu: String = self.info("cpu").await?;
        let seconds = |name: &str| -> Result<f64> {
            let mut values = cpu.lines().filter_map(|line| line.strip_prefix(name));
            Ok(values.next().with_context(|| format!("redis names no {name}"))?.parse()?)
        };
        Ok(Usage {
            cpu_us: (seconds("used_cpu_sys:")? + seconds("used_cpu_user:")?) * 1e6,
            script_us: of("cmdstat_evalsha", "usec"),
            calls: of("cmdstat_evalsha", "calls"),
            waits: of("cmdstat_wait", "calls"),
        })
    }

    async fn info(&mut self, section: &str) -> Result<String> {
        Ok(redis::cmd("INFO").arg(section).query_async(&mut self.connection).await?)
    }
}
