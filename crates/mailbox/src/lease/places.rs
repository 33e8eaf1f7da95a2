//! Writes a lease in all its places at once.

use std::sync::Arc;
use std::time::Duration;

use barid_core::{Incarnation, Shard};
use redis::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::node::{NodeRecord, NodeRole};
use super::record::{fields, text};
use super::state::{Place, Stamp, Wrote};
use crate::reply::Reply;
use crate::scripts::{self, Call};
use crate::topology::Topology;
use crate::{Error, keys};

/// How long copies are kept after their lease ended.
pub(super) const KEEP_ENDED: Duration = Duration::from_secs(3600);

/// The state of the lease in a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Held; announced to readers if `announce`.
    Held { announce: bool },
    /// Released and announced: the node counts as gone at once.
    Released,
}

/// One write of a lease.
pub(super) struct Writing<'a> {
    pub record: &'a NodeRecord,
    pub stamp: Stamp,
    pub ttl: Duration,
    pub state: State,
    /// Whether to delete copies of leases that ended more than [`KEEP_ENDED`] ago.
    pub sweep: bool,
}

/// A place and its answer.
type Answer = (Place, Result<Wrote, Error>);

/// The answers to a write; dropping it cancels the write.
pub(super) struct Answers {
    answers: mpsc::Receiver<Answer>,
    _tasks: JoinSet<()>,
}

impl Answers {
    /// The next answer; `None`: all were received.
    pub async fn recv(&mut self) -> Option<Answer> {
        self.answers.recv().await
    }
}

impl Writing<'_> {
    /// Sends it to every master at once. Each has `timeout` to answer.
    pub fn start(&self, topology: &Arc<Topology>, timeout: Duration) -> Answers {
        let deadline = Instant::now() + timeout;
        let fields = fields(self.record);
        let copy = CopyOf {
            id: self.record.id.to_string(),
            stamp: self.stamp,
            ttl: self.ttl,
            released: self.state == State::Released,
            keep_ended: self.sweep.then_some(KEEP_ENDED),
            text: text(&fields),
        };
        let (out, answers) = mpsc::channel(64);
        let mut tasks = JoinSet::new();
        let (key, own) = self.own(&fields);
        let (answers_to, to) = (out.clone(), Arc::clone(topology));
        tasks.spawn(async move {
            let written = timeout_at(deadline, to.run_on(&key, &scripts::LEASE, &own)).await;
            let answer = written.map_err(late).and_then(|done| wrote(Reply::new(done?)?));
            let _cancelled = answers_to.send((Place::Own, answer)).await;
        });
        let announced = matches!(self.state, State::Held { announce: true } | State::Released);
        let role = announced.then_some(self.record.role);
        let copy = Arc::new(copy);
        for shards in topology.shards_by_lane() {
            let (answers_to, to, copy) = (out.clone(), Arc::clone(topology), Arc::clone(&copy));
            tasks.spawn(async move {
                for (shard, answer) in copy.write(&to, &shards, deadline).await {
                    let _cancelled = answers_to.send((Place::Copy(shard), answer)).await;
                }
                if let (Some(role), Some(shard)) = (role, shards.first()) {
                    let _late = timeout_at(deadline, announce(&to, *shard, role)).await;
                }
            });
        }
        Answers { answers, _tasks: tasks }
    }

    fn own(&self, fields: &[(&str, String)]) -> (String, Call) {
        let key = keys::node(self.record.id.as_str());
        let verb = if self.state == State::Released { "release" } else { "hold" };
        let mut call = Call::default();
        call.key(key.clone()).arg(verb).arg(self.ttl.as_millis());
        call.arg(self.stamp.incarnation).arg(self.stamp.number);
        for (name, value) in fields {
            call.arg(name).arg(value);
        }
        (key, call)
    }
}

fn late(_: tokio::time::error::Elapsed) -> Error {
    Error::Away("no answer in time".into())
}

/// A write of a lease's copy beside shards.
pub(crate) struct CopyOf {
    pub id: String,
    pub stamp: Stamp,
    pub ttl: Duration,
    pub released: bool,
    /// Copies of leases that ended longer ago are deleted; `None`: none are.
    pub keep_ended: Option<Duration>,
    pub text: String,
}

impl CopyOf {
    /// Writes the copy beside shards of one master; returns one answer per shard.
    pub async fn write(
        &self,
        topology: &Topology,
        shards: &[Shard],
        deadline: Instant,
    ) -> Vec<(Shard, Result<Wrote, Error>)> {
        let calls = topology.calls(shards, |shard| *shard);
        let sent = calls.iter().map(|shards| async {
            let written = timeout_at(deadline, self.call(topology, shards)).await;
            match written.map_err(late).and_then(|replies| replies) {
                Ok(wrote) => {
                    shards.iter().map(|shard| **shard).zip(wrote.into_iter().map(Ok)).collect()
                }
                Err(error) => {
                    let failed = |shard: &&Shard| (**shard, Err(error.clone()));
                    shards.iter().map(failed).collect::<Vec<_>>()
                }
            }
        });
        futures::future::join_all(sent).await.concat()
    }

    async fn call(&self, topology: &Topology, shards: &[&Shard]) -> Result<Vec<Wrote>, Error> {
        let mut call = Call::default();
        for shard in shards {
            call.key(keys::copies(**shard)).key(keys::positions(**shard));
        }
        let keep_ended = self.keep_ended.map_or(-1, |keep| keep.as_millis() as i64);
        call.arg(&self.id).arg(self.stamp.incarnation).arg(self.stamp.number);
        call.arg(self.ttl.as_millis()).arg(if self.released { "G" } else { "H" });
        call.arg(keep_ended).arg(&self.text);
        let mut replies = Reply::new(topology.run(*shards[0], &scripts::COPY, &call).await?)?;
        replies.number()?;
        shards.iter().map(|_| wrote(replies.array()?)).collect()
    }
}

fn wrote(mut reply: Reply) -> Result<Wrote, Error> {
    let done = reply.number()? == 1;
    let before = Stamp { incarnation: Incarnation(reply.number()?), number: reply.number()? };
    Ok(Wrote { done, before: (before != Stamp::default()).then_some(before) })
}

/// Makes readers read at once instead of at their next turn. Published through every master, because any of them may be
/// unreachable; in a Redis Cluster each message reaches all subscribers.
async fn announce(topology: &Topology, shard: Shard, role: NodeRole) {
    let mut publish = redis::cmd("PUBLISH");
    publish.arg(keys::NODES_CHANGED).arg(role.as_str());
    if let Err(error) = topology.query::<Value>(shard, &publish).await {
        tracing::debug!(%error, "announcing a lease failed");
    }
}
