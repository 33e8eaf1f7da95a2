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
}

impl Server {
    pub async fn start(append_only: bool) -> Result<Self> {
        let options = RedisOptions { append_only, ..Default::default() };
        let redis = Redis::start_with(options).await?;
        let client = redis::Client::open(redis.url())?;
        // A busy machine may keep an answer waiting; that is no reason to lose a run.
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        let connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        Ok(Self { redis, connection })
    }

    pub fn url(&self) -> String {
        self.redis.url()
    }

    pub fn connection(&self) -> MultiplexedConnection {
        self.connection.clone()
    }

    pub async fn usage(&mut self) -> Result<Usage> {
        let calls: String = self.info("commandstats").await?;
        let script = calls.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:"));
        let of_script = |name: &str| {
            let mut pairs = script.unwrap_or_default().split(',');
            pairs.find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
        };
        let cpu: String = self.info("cpu").await?;
        let seconds = |name: &str| -> Result<f64> {
            let mut values = cpu.lines().filter_map(|line| line.strip_prefix(name));
            Ok(values.next().with_context(|| format!("redis names no {name}"))?.parse()?)
        };
        Ok(Usage {
            cpu_us: (seconds("used_cpu_sys:")? + seconds("used_cpu_user:")?) * 1e6,
            script_us: of_script("usec").unwrap_or(0.0),
            calls: of_script("calls").unwrap_or(0.0),
        })
    }

    async fn info(&mut self, section: &str) -> Result<String> {
        Ok(redis::cmd("INFO").arg(section).query_async(&mut self.connection).await?)
    }
}
