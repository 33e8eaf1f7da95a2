//! Barid's mailbox, asked as the purger and the access node ask it.

use anyhow::{Context as _, Result, ensure};
use barid_core::{
    AppId, Attempt, ConnectionId, DeviceId, Generation, IdHash, Incarnation, NodeId, SessionRef,
    UserId,
};
use barid_mailbox::{
    AcceptGroup, AcceptMessage, AcceptOutcome, AckOutcome, AckRequest, ConnectOutcome,
    ConnectRequest, GroupOutcome, LogPosition, Mailbox, RedisConfig, Source, UserKey,
};
use barid_runtime::SecretUrl;
use barid_wire::envelope::Header;
use bytes::Bytes;
use futures::future::join_all;

use crate::case::{Acked, Case, Message, Side};

/// Entries that a mailbox keeps: in [`Case::OfflineFull`] each message evicts one.
const FULL: u32 = 8;

/// A mailbox with one shard: the server's work per message is the same with more.
pub struct Barid {
    mailbox: Mailbox,
    prev: Option<LogPosition>,
}

pub fn config(url: &str, batch: usize, case: Case) -> RedisConfig {
    let plain = RedisConfig::default();
    RedisConfig {
        url: SecretUrl::new(url),
        shards: 1,
        batch_max: batch,
        window: 1,
        entries_max: if case == Case::OfflineFull { FULL } else { plain.entries_max },
        // Nothing is due while it runs; no answer is given up on a busy machine.
        retry_base_ms: 3_600_000,
        retry_max_ms: 3_600_000,
        response_timeout_ms: 60_000,
        // No node has a lease here, which would look like a loss.
        keep_after_loss_seconds: 0,
        ..plain
    }
}

impl Barid {
    pub async fn open(config: &RedisConfig) -> Result<Self> {
        Ok(Self { mailbox: open(config).await?, prev: None })
    }

    /// A batch as the purger would ask it.
    pub fn group(&self, case: Case, batch: &[Message]) -> Result<AcceptGroup> {
        let mut messages = Vec::with_capacity(batch.len());
        for message in batch {
            let UserKey { app, user } = user_key(case, message.user)?;
            messages.push(AcceptMessage {
                position: LogPosition { leader_epoch: 0, offset: message.offset, index: 0 },
                app,
                user,
                id: IdHash::of(&message.id),
                collapse_key: None,
                body: message.body.clone(),
            });
        }
        Ok(AcceptGroup {
            shard: self.mailbox.shard_of(&user_key(case, 0)?),
            source: source(case),
            prev: self.prev,
            raise: None,
            messages,
        })
    }

    /// An accept round: with `wait_replicas` behind it, its WAIT.
    pub async fn send(&mut self, group: AcceptGroup) -> Result<Vec<AcceptOutcome>> {
        let outcome = self.mailbox.accept(std::slice::from_ref(&group)).await;
        let outcome = outcome.into_iter().next().context("an answer")??;
        self.prev = group.messages.last().map(|message| message.position);
        match outcome {
            GroupOutcome::Done(outcomes) => Ok(outcomes),
            GroupOutcome::Gap(position) => anyhow::bail!("a gap: {position:?}"),
        }
    }
}

pub async fn open(config: &RedisConfig) -> Result<Mailbox> {
    Ok(Mailbox::open(config, &prometheus::Registry::new()).await?)
}

pub fn user_key(case: Case, user: usize) -> Result<UserKey> {
    let user = UserId::new(&format!("{}-{user}", case.name()))?;
    Ok(UserKey { app: AppId::new("loadtest")?, user })
}

/// Connects every user's device; the floor's users too, so that both begin with the same.
pub async fn connect(mailbox: &Mailbox, case: Case, users: usize) -> Result<()> {
    for user in 0..users {
        let request = ConnectRequest {
            user: user_key(case, user)?,
            device: device()?,
            session: session(user)?,
            attempt: Attempt(1),
            platform: "loadtest".into(),
            position: None,
        };
        let outcome = mailbox.connect(request).await?;
        ensure!(matches!(outcome, ConnectOutcome::Connected { .. }), "not connected: {outcome:?}");
    }
    Ok(())
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
            let right = AckOutcome::Advanced { cursor: acked.header.seq };
            let outcome = outcome?;
            ensure!(outcome == right, "{outcome:?} on an ack of {acked:?}");
        }
        Ok(())
    }
}

fn header(outcome: &AcceptOutcome) -> Result<Header> {
    match outcome {
        AcceptOutcome::Accepted { envelope, .. } => Ok(Header::parse(envelope)?),
        other => anyhow::bail!("not accepted: {other:?}"),
    }
}

pub fn source(case: Case) -> Source {
    Source { topic_id: case.name().into(), partition: 0 }
}

/// What the floor writes as the position of a source.
pub fn position_text(offset: i64) -> Bytes {
    format!("0 {offset} 0").into()
}
