//! An access node in this process on a real Redis, and what stands around it: a mailbox that accepts
//! as a purger does, a dispatcher's stream, devices.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use barid_access::{Access, Config};
use barid_core::{AppId, Audience, IdHash, NodeId, Owner, Secret, UserId};
use barid_mailbox::{
    AcceptGroup, AcceptMessage, AcceptOutcome, GroupOutcome, Inspection, LogPosition, Mailbox,
    RedisConfig, Source, UserKey,
};
use barid_runtime::{Context, Role as _, RunError, SecretUrl, Stopped};
use barid_testkit::grpc::NodeStream;
use barid_testkit::redis::Redis;
use barid_testkit::{Device, token};
use barid_wire::envelope::{Envelope, encode_body, set_payload};
use barid_wire::internal::{NodeBatch, NodePush, NodeReply, NodeResend};
use bytes::Bytes;
use tokio::task::JoinHandle;

pub const APP: &str = "demo";

/// A node with its Redis, as most tests need it.
pub struct World {
    pub redis: Redis,
    pub mailbox: Mailbox,
    offset: AtomicI64,
}

impl World {
    pub async fn new() -> Result<Self> {
        Self::with_shards(RedisConfig::default().shards).await
    }

    /// With so many shards; its nodes have to be told.
    pub async fn with_shards(shards: u32) -> Result<Self> {
        let redis = Redis::start().await?;
        let config = RedisConfig { shards, ..redis_config(&redis) };
        let mailbox = Mailbox::open(&config, &prometheus::Registry::new()).await?;
        Ok(Self { redis, mailbox, offset: AtomicI64::new(0) })
    }

    /// A node with its defaults changed.
    pub async fn node_with(&self, change: impl FnOnce(&mut Config)) -> Result<Node> {
        let mut config = config(&self.redis);
        change(&mut config);
        Node::start(config).await
    }

    pub async fn node(&self) -> Result<Node> {
        self.node_with(|_| ()).await
    }

    /// Accepts a text for a user; the entry and whether the user is online.
    pub async fn accept(&self, user: &str, id: &str) -> Result<(Bytes, bool)> {
        self.accept_with(user, id, |_| ()).await
    }

    pub async fn accept_with(
        &self,
        user: &str,
        id: &str,
        change: impl FnOnce(&mut Envelope),
    ) -> Result<(Bytes, bool)> {
        self.accept_for(&user_key(user), id, change).await
    }

    /// As [`Self::accept_with`], for a user of any app.
    pub async fn accept_for(
        &self,
        user: &UserKey,
        id: &str,
        change: impl FnOnce(&mut Envelope),
    ) -> Result<(Bytes, bool)> {
        let (app, owner) = (user.app.clone(), Owner::User(user.user.clone()));
        let (envelope, online, _) = self.accept_any(app, owner, id, change).await?;
        Ok((envelope, online))
    }

    /// Accepts a text for an audience of the test's app; the entry and the nodes with members.
    pub async fn accept_for_audience(
        &self,
        audience: &Audience,
        id: &str,
    ) -> Result<(Bytes, Arc<[NodeId]>)> {
        let owner = Owner::Audience(audience.clone());
        let (envelope, _, nodes) = self.accept_any(AppId::new(APP)?, owner, id, |_| ()).await?;
        Ok((envelope, nodes))
    }

    async fn accept_any(
        &self,
        app: AppId,
        owner: Owner,
        id: &str,
        change: impl FnOnce(&mut Envelope),
    ) -> Result<(Bytes, bool, Arc<[NodeId]>)> {
        let mut envelope = Envelope { id: id.into(), ..Default::default() };
        set_payload(&mut envelope, format!("text of {id}").into(), 128, 3);
        change(&mut envelope);
        let offset = self.offset.fetch_add(1, Ordering::SeqCst);
        let shard = self.mailbox.shards().shard_of(app.as_str(), owner.as_str());
        let message = AcceptMessage {
            position: LogPosition { leader_epoch: 0, offset, index: 0 },
            app,
            owner,
            id: IdHash::of(id),
            collapse_key: None,
            body: encode_body(envelope),
        };
        let group = AcceptGroup {
            shard,
            source: Source { topic_id: Arc::from("test"), partition: 0 },
            prev: None,
            raise: None,
            messages: vec![message],
        };
        let mut outcomes = self.mailbox.accept(&[group]).await;
        match outcomes.remove(0)? {
            GroupOutcome::Done(mut done) => match done.remove(0) {
                AcceptOutcome::Accepted { envelope, online, nodes, .. } => {
                    Ok((envelope, online, nodes))
                }
                other => anyhow::bail!("not accepted: {other:?}"),
            },
            gap @ GroupOutcome::Gap(_) => anyhow::bail!("not accepted: {gap:?}"),
        }
    }

    pub async fn inspect(&self, user: &str) -> Result<Inspection> {
        Ok(self.mailbox.inspect(&user_key(user)).await?)
    }

    /// The cursor of a device once it is `seq`.
    pub async fn cursor_becomes(&self, user: &str, device: &str, seq: u64) -> Result<()> {
        eventually(&format!("cursor of {user}/{device} at {seq}"), async || {
            let state = self.inspect(user).await?;
            let device = state.devices.iter().find(|d| d.device.as_str() == device);
            Ok(device.is_some_and(|device| device.cursor.seq.0 == seq))
        })
        .await
    }

    pub async fn routes_become(&self, user: &str, count: usize) -> Result<()> {
        eventually(&format!("{count} routes of {user}"), async || {
            Ok(self.inspect(user).await?.routes.len() == count)
        })
        .await
    }
}

pub fn user_key(user: &str) -> UserKey {
    user_of(APP, user)
}

pub fn user_of(app: &str, user: &str) -> UserKey {
    UserKey { app: AppId::new(app).unwrap(), user: UserId::new(user).unwrap() }
}

/// Waits for what must become true; what fails meanwhile is tried again.
pub async fn eventually(what: &str, check: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let mut last = Ok(false);
    for _ in 0..300 {
        last = check().await;
        if matches!(last, Ok(true)) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("never: {what} (at last: {last:?})")
}

pub fn redis_config(redis: &Redis) -> RedisConfig {
    RedisConfig { url: SecretUrl::new(redis.url()), ..Default::default() }
}

pub fn config(redis: &Redis) -> Config {
    let local = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut config = Config {
        listen: local,
        grpc_listen: local,
        redis: redis_config(redis),
        receipts: false,
        revocations: false,
        ..Default::default()
    };
    config.auth.keys = vec![barid_access::config::KeyConfig {
        id: token::KEY_ID.into(),
        secret: Secret::new(token::SECRET),
        ..Default::default()
    }];
    config
}

pub fn token_of(user: &str) -> String {
    token::token(APP, user, Duration::from_secs(3600))
}

/// A running node.
pub struct Node {
    pub context: Context,
    pub addresses: BTreeMap<&'static str, SocketAddr>,
    run: JoinHandle<Result<Stopped, RunError>>,
}

impl Node {
    pub async fn start(config: Config) -> Result<Self> {
        Access::check(&config).map_err(anyhow::Error::msg)?;
        let context = Context::new();
        let run = tokio::spawn(Access::run(config, context.clone()));
        let up = tokio::time::timeout(Duration::from_secs(20), context.announcements().wait());
        let addresses = up.await.context("the node does not come up")?;
        Ok(Self { context, addresses, run })
    }

    pub fn url(&self) -> String {
        format!("ws://{}/v1/connect", self.addresses["ws"])
    }

    pub async fn device(&self, user: &str, device: &str) -> Result<Device> {
        Device::connect(&self.url(), &token_of(user), device).await
    }

    /// Drains it and waits for its end.
    pub async fn stop(self, grace: Duration) -> Result<Stopped> {
        self.context.shutdown.begin(grace);
        let done = tokio::time::timeout(grace + Duration::from_secs(5), self.run).await;
        done.context("does not stop")??.map_err(|error| anyhow::anyhow!("{error}"))
    }

    /// The value of a counter or gauge, or the sum of a histogram, of the given label or over all; 0
    /// where it was never touched.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        let family = self.context.metrics.gather();
        let family = family.iter().find(|family| family.name() == name);
        let metrics = family.map(|family| family.get_metric()).unwrap_or_default();
        let fits = metrics.iter().filter(|metric| {
            label.is_empty() || metric.get_label().iter().any(|pair| pair.value() == label)
        });
        let value = |m: &prometheus::proto::Metric| {
            m.get_counter().get_value()
                + m.get_gauge().get_value()
                + m.get_histogram().get_sample_sum()
        };
        fits.map(value).sum()
    }

    pub async fn dispatcher(&self) -> Result<Dispatcher> {
        Ok(Dispatcher(NodeStream::connect(self.addresses["grpc"]).await?))
    }
}

/// A dispatcher's stream to one node.
pub struct Dispatcher(NodeStream);

impl Dispatcher {
    pub async fn send(
        &mut self,
        incarnation: u64,
        pushes: Vec<NodePush>,
        resends: Vec<NodeResend>,
    ) -> Result<NodeReply> {
        let batch = NodeBatch { incarnation, pushes, resends, ..Default::default() };
        self.0.send(batch).await
    }

    /// To every session of an audience; `group` is empty for everyone.
    pub async fn fan_out(&mut self, app: &str, group: &str, entries: Vec<Bytes>) -> Result<()> {
        self.0.fan_out(app, group, entries).await
    }

    /// Whatever a dispatcher may send.
    pub async fn batch(&mut self, batch: NodeBatch) -> Result<NodeReply> {
        self.0.send(batch).await
    }

    /// Pushes an entry to where a user's routes say.
    pub async fn push(&mut self, world: &World, user: &str, envelope: Bytes) -> Result<NodeReply> {
        self.push_to(world, &user_key(user), envelope).await
    }

    /// As [`Self::push`], to a user of any app.
    pub async fn push_to(
        &mut self,
        world: &World,
        user: &UserKey,
        envelope: Bytes,
    ) -> Result<NodeReply> {
        let routes = world.mailbox.inspect(user).await?.routes;
        let incarnation = routes.first().map_or(0, |route| route.session.incarnation.0);
        let push = NodePush {
            app: user.app.to_string(),
            user: user.user.to_string(),
            envelope,
            connections: routes.iter().map(|route| route.session.connection.0).collect(),
            dispatched_after_us: None,
        };
        self.send(incarnation, vec![push], vec![]).await
    }

    pub async fn resend(&mut self, world: &World, user: &str) -> Result<NodeReply> {
        let route = world.inspect(user).await?.routes.remove(0);
        let resend = NodeResend {
            app: APP.into(),
            user: user.into(),
            connection: route.session.connection.0,
            device: route.device.to_string(),
        };
        self.send(route.session.incarnation.0, vec![], vec![resend]).await
    }
}
