//! Barid's mailbox, called as the purger and the access node call it.

use anyhow::{Context as _, Result, ensure};
use barid_core::{
    AppId, Attempt, ConnectionId, DeviceId, Generation, IdHash, Incarnation, NodeId, Owner,
    SessionRef, UserId,
};
use barid_mailbox::{
    AcceptGroup, AcceptMessage, AcceptOutcome, AckOutcome, AckRequest, ConnectOutcome,
    ConnectRequest, GroupOutcome, LogPosition, Mailbox, RedisConfig, Source, UserKey,
};
use barid_runtime::SecretUrl;
use barid_wire::envelope::Header;
use futures::future::join_all;

use crate::workload::{Acked, Case, Message, Side};

/// `redis.entries_max` in [`Case::OfflineFull`].
const FULL_ENTRIES: u32 = 8;

/// A mailbox with one shard: the server's work per message does not depend on the number of shards.
pub struct Barid {
    mailbox: Mailbox,
    prev: Option<LogPosition>,
}

pub fn config(url: String, batch: usize, case: Case) -> RedisConfig {
    let plain = RedisConfig::default();
    RedisConfig {
        url: SecretUrl::new(url),
        shards: 1,
        batch_max: batch,
        window: 1,
        entries_max: if case == Case::OfflineFull { FULL_ENTRIES } else { plain.entries_max },
        // No timer fires during a run, and no reply is given up on a busy machine.
        retry_base_ms: 3_600_000,
        retry_max_ms: 3_600_000,
        response_timeout_ms: 60_000,
        // No node holds a lease here, which would look like a loss of data.
        keep_after_loss_seconds: 0,
        ..plain
    }
}

impl Barid {
    pub async fn open(config: &RedisConfig) -> Result<Self> {
        let mailbox = Mailbox::open(config, &prometheus::Registry::new()).await?;
        Ok(Self { mailbox, prev: None })
    }

    /// A batch in the purger's form.
    pub fn group(&self, case: Case, batch: &[Message]) -> Result<AcceptGroup> {
        let message = |message: &Message| -> Result<AcceptMessage> {
            let UserKey { app, user } = user_key(case, message.user)?;
            Ok(AcceptMessage {
                position: LogPosition { leader_epoch: 0, offset: message.offset, index: 0 },
                app,
                owner: Owner::User(user),
                id: IdHash::of(&message.id),
                collapse_key: None,
                body: message.body.clone(),
            })
        };
        Ok(AcceptGroup {
            shard: self.mailbox.shard_of(&user_key(case, 0)?),
            source: source(case),
            prev: self.prev,
            raise: None,
            messages: batch.iter().map(message).collect::<Result<_>>()?,
        })
    }

    /// One accept round, including its WAIT if `wait_replicas` is set.
    pub async fn send(&mut self, group: AcceptGroup) -> Result<Vec<AcceptOutcome>> {
        let outcome = self.mailbox.accept(std::slice::from_ref(&group)).await;
        let outcome = outcome.into_iter().next().context("accept returned no outcome")??;
        self.prev = group.messages.last().map(|message| message.position);
        match outcome {
            GroupOutcome::Done(outcomes) => Ok(outcomes),
            GroupOutcome::Gap(position) => anyhow::bail!("gap before log position {position:?}"),
        }
    }

    /// Connects every user's device.
    pub async fn connect(&self, case: Case, users: usize) -> Result<()> {
        for user in 0..users {
            let request = ConnectRequest {
                user: user_key(case, user)?,
                device: device()?,
                session: session(user)?,
                attempt: Attempt(1),
                platform: "loadtest".into(),
                position: None,
            };
            let outcome = self.mailbox.connect(request).await?;
            let is_connected = matches!(outcome, ConnectOutcome::Connected { .. });
            ensure!(is_connected, "user {user} is not connected: {outcome:?}");
        }
        Ok(())
    }
}

pub fn user_key(case: Case, user: usize) -> Result<UserKey> {
    let user = UserId::new(&format!("{}-{user}", case.name()))?;
    Ok(UserKey { app: AppId::new("loadtest")?, user })
}

pub fn source(case: Case) -> Source {
    Source { topic_id: case.name().into(), partition: 0 }
}

fn device() -> Result<DeviceId> {
    Ok(DeviceId::new("phone")?)
}

fn session(user: usize) -> Result<SessionRef> {
    let connection = ConnectionId(user as u64 + 1);
    Ok(SessionRef { node: NodeId::new("access-1")?, incarnation: Incarnation(1), connection })
}

impl Side for Barid {
    async fn accept(&mut self, case: Case, batch: &[Message]) -> Result<Vec<Header>> {
        let header = |outcome: &AcceptOutcome| match outcome {
            AcceptOutcome::Accepted { envelope, .. } => Ok(Header::parse(envelope)?),
            other => anyhow::bail!("message not accepted: {other:?}"),
        };
        let group = self.group(case, batch)?;
        self.send(group).await?.iter().map(header).collect()
    }

    async fn ack(&mut self, case: Case, batch: &[Acked]) -> Result<()> {
        let mut acks = Vec::with_capacity(batch.len());
        for Acked { user, header } in batch {
            acks.push(self.mailbox.ack(AckRequest {
                user: user_key(case, *user)?,
                device: device()?,
                session: session(*user)?,
                epoch: header.epoch,
                generation: Generation(0),
                seq: header.seq,
                chain: header.chain,
            }));
        }
        for (outcome, acked) in join_all(acks).await.into_iter().zip(batch) {
            let (outcome, expected) = (outcome?, AckOutcome::Advanced { cursor: acked.header.seq });
            ensure!(outcome == expected, "ack of {acked:?} returned {outcome:?}");
        }
        Ok(())
    }
}
