//! Announcements of changed leases, so that readers notice at once that a node joined, ended or drains. They only save
//! time: without them, the periodic readings of the leases find the same.
//!
//! The subscriber is fred's, which reconnects and re-subscribes by itself, on a connection of its own.

use std::time::Duration;

use fred::clients::SubscriberClient;
use fred::interfaces::{ClientLike as _, EventInterface as _, PubsubInterface as _};
use fred::types::config::{Config, ReconnectPolicy, Server, ServerConfig};
use fred::types::{Builder, Message};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;
use tracing::Instrument as _;

use crate::lease::node::NodeRole;
use crate::{RedisConfig, keys};

/// Pending announcements; one is as good as many.
const BACKLOG_MAX: usize = 64;
/// Waits between attempts to reconnect: minimum ms, maximum ms, factor.
const RECONNECT_MS: (u32, u32, u32) = (100, 5_000, 2);

/// A subscription; it ends when this is dropped.
pub struct Announcements {
    messages: Option<Receiver<Message>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Announcements {
    /// Subscribes in the background, as soon as Redis can be reached.
    pub fn subscribe(config: &RedisConfig) -> Self {
        match subscriber(config) {
            Ok(client) => {
                let messages = Some(client.message_rx());
                Self { messages, tasks: vec![tokio::spawn(subscribe(client).in_current_span())] }
            }
            Err(error) => {
                tracing::warn!(%error, "no announcements of leases, which are only read periodically");
                Self { messages: None, tasks: Vec::new() }
            }
        }
    }

    /// Waits until a node of `role` announces a change. Cancel-safe.
    pub async fn next(&mut self, role: NodeRole) {
        let Some(messages) = &mut self.messages else { return std::future::pending().await };
        loop {
            match messages.recv().await {
                Ok(message) if message.value.as_str().as_deref() != Some(role.as_str()) => {}
                Ok(_) | Err(RecvError::Lagged(_)) => return,
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    }
}

impl Drop for Announcements {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn subscriber(config: &RedisConfig) -> Result<SubscriberClient, fred::error::Error> {
    let (min, max, factor) = RECONNECT_MS;
    Builder::from_config(client_config(config)?)
        .with_connection_config(|connection| {
            connection.connection_timeout = config.connect_timeout();
        })
        .with_performance_config(|performance| {
            performance.default_command_timeout = Duration::ZERO;
            performance.broadcast_channel_capacity = BACKLOG_MAX;
        })
        .set_policy(ReconnectPolicy::new_exponential(0, min, max, factor))
        .build_subscriber_client()
}

fn client_config(config: &RedisConfig) -> Result<Config, fred::error::Error> {
    let parse = if config.cluster { Config::from_url_clustered } else { Config::from_url };
    let mut client = parse(config.url.expose())?;
    if let ServerConfig::Clustered { hosts, .. } = &mut client.server {
        for url in &config.urls {
            if let ServerConfig::Centralized { server } = Config::from_url(url.expose())?.server {
                hosts.push(Server::new(server.host, server.port));
            }
        }
    }
    // The trusted authorities of all other connections, not the system's.
    client.tls = crate::tls::connector(config)
        .map_err(|why| fred::error::Error::new(fred::error::ErrorKind::Tls, why))?
        .map(Into::into);
    if !config.sentinel_master.is_empty() {
        client.server = sentinels(config);
    }
    // Redis may start after this process.
    client.fail_fast = false;
    Ok(client)
}

/// fred uses one user and password for all Sentinels: those of the first URL that has any.
fn sentinels(config: &RedisConfig) -> ServerConfig {
    let named = config.sentinels.iter().filter_map(|url| Config::from_url(url.expose()).ok());
    let (mut hosts, mut username, mut password) = (Vec::new(), None, None);
    for sentinel in named {
        if let ServerConfig::Centralized { server } = sentinel.server {
            hosts.push(Server::new(server.host, server.port));
        }
        if password.is_none() {
            (username, password) = (sentinel.username, sentinel.password);
        }
    }
    let service_name = config.sentinel_master.clone();
    ServerConfig::Sentinel { hosts, service_name, username, password }
}

/// Keeps the subscription for as long as the task lives.
async fn subscribe(client: SubscriberClient) {
    let connection = client.connect();
    let _keeper = AbortOnDrop(client.manage_subscriptions());
    let _connection = AbortOnDrop(connection);
    while let Err(error) = client.subscribe(keys::NODES_CHANGED).await {
        tracing::debug!(%error, "subscribing to announcements failed");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    std::future::pending().await
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
