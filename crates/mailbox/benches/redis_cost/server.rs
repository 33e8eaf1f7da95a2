//! A private redis-server and the resources it has used.

use std::time::Duration;

use anyhow::{Context as _, Result};
use barid_testkit::Redis;
use barid_testkit::redis::RedisOptions;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, InfoDict};

/// A busy machine delays replies; that must not end a run.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// A redis-server with one connection for questions about its state.
pub struct Server {
    pub redis: Redis,
    pub connection: MultiplexedConnection,
}

/// Totals since the server started.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// CPU time of the process, µs.
    pub cpu_us: f64,
    /// Wall-clock time inside EVALSHA, µs.
    pub script_us: f64,
    /// EVALSHA calls.
    pub calls: f64,
    /// WAIT calls.
    pub waits: f64,
}

impl Server {
    pub async fn start(options: RedisOptions) -> Result<Self> {
        let redis = Redis::start_with(options).await?;
        let client = redis::Client::open(redis.url())?;
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(REPLY_TIMEOUT));
        let connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        Ok(Self { redis, connection })
    }

    pub async fn usage(&mut self) -> Result<Usage> {
        let mut info = redis::cmd("INFO");
        info.arg("cpu").arg("commandstats");
        let info: InfoDict = info.query_async(&mut self.connection).await?;
        let seconds = |name| info.get::<f64>(name).with_context(|| format!("INFO lacks {name}"));
        Ok(Usage {
            cpu_us: (seconds("used_cpu_sys")? + seconds("used_cpu_user")?) * 1e6,
            script_us: command_stat(&info, "cmdstat_evalsha", "usec"),
            calls: command_stat(&info, "cmdstat_evalsha", "calls"),
            waits: command_stat(&info, "cmdstat_wait", "calls"),
        })
    }
}

/// A field of a line such as `cmdstat_wait:calls=3,usec=12`; 0 if the command was never called.
fn command_stat(info: &InfoDict, command: &str, field: &str) -> f64 {
    let stats: String = info.get(command).unwrap_or_default();
    let mut fields = stats.split(',').filter_map(|stat| stat.split_once('='));
    fields.find(|(name, _)| *name == field).and_then(|(_, value)| value.parse().ok()).unwrap_or(0.0)
}
