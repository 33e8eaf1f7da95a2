//! Writing a lease in all its places at once.

use std::sync::Arc;
use std::time::Duration;

use barid_core::{Incarnation, Shard};
use redis::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::life::{Place, Stamp, Wrote};
use super::node::{NodeRecord, NodeRole};
use super::record::{fields, text};
use crate::reply::Reply;
use crate::scripts::{self, Call};
use crate::topology::Topology;
use crate::{Error, keys};

/// How long a copy stays after its lease ended.
pub(super) const KEPT: Duration = Duration::from_secs(3600);

/// The state of the lease that a writing stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It is held; the others are told at once, if `announce`.
    Held { announce: bool },
    /// It is given up: readers count the node as gone at once.
    GivenUp,
}

/// One writing of a lease.
pub(super) struct Writing<'a> {
    pub record: &'a NodeRecord,
    pub stamp: Stamp,
    pub ttl: Duration,
    pub state: State,
    /// Drop copies of nodes that ended long ago.
    pub sweep: bool,
}

/// The answer of a place.
type Answer = (Place, Result<Wrote, Error>);

/// The answers of a writing; dropping it ends the writing.
pub(super) struct Answers {
    answers: mpsc::Receiver<Answer>,
    _tasks: JoinSet<()>,
}

impl Answers {
    /// The next answer; `None`: that was all.
    pub async fn recv(&mut self) -> Option<Answer> {
        self.answers.recv().await
    }
}

impl Writing<'_> {
    /// Sends it to every master at once; those that do not answer within `patience` are given up.
    pub fn start(&self, topology: &Arc<Topology>, patience: Duration) -> Answers {
        let deadline = Instant::now() + patience;
        let fields = fields(self.record);
        let copy = CopyOf {
            id: self.record.id.to_string(),
            stamp: self.stamp,
            ttl: self.ttl,
            given_up: self.state == State::GivenUp,
            kept: self.sweep.then_some(KEPT),
            text: text(&fields),
        };
        let (out, answers) = mpsc::channel(64);
        let mut tasks = JoinSet::new();
        let (key, own) = self.own(&fields);
        let (told, to) = (out.clone(), Arc::clone(topology));
        tasks.spawn(async move {
            let written = timeout_at(deadline, to.run_on(&key, &scripts::LEASE, &own)).await;
            let answer = written.map_err(late).and_then(|done| wrote(Reply::new(done?)?));
            // Nobody waits for it any longer.
            let _gone = told.send((Place::Own, answer)).await;
        });
        let announced = matches!(self.state, State::Held { announce: true } | State::GivenUp);
        let role = announced.then_some(self.record.role);
        let copy = Arc::new(copy);
        for shards in topology.shards_by_lane() {
            let (told, to, copy) = (out.clone(), Arc::clone(topology), Arc::clone(&copy));
            tasks.spawn(async move {
                for (shard, answer) in copy.write(&to, &shards, deadline).await {
                    let _gone = told.send((Place::Copy(shard), answer)).await;
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
        let verb = if self.state == State::GivenUp { "release" } else { "hold" };
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

/// A copy of a lease, as it is written beside shards.
pub(crate) struct CopyOf {
    pub id: String,
    pub stamp: Stamp,
    pub ttl: Duration,
    pub given_up: bool,
    /// How long copies of others are kept after they ended; `None`: nobody looks.
    pub kept: Option<Duration>,
    pub text: String,
}

impl CopyOf {
    /// Writes it beside shards of one master; one answer a shard.
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
        let kept = self.kept.map_or(-1, |kept| kept.as_millis() as i64);
        call.arg(&self.id).arg(self.stamp.incarnation).arg(self.stamp.number);
        call.arg(self.ttl.as_millis()).arg(if self.given_up { "G" } else { "H" }).arg(kept);
        call.arg(&self.text);
        let mut replies = Reply::new(topology.run(*shards[0], &scripts::COPY, &call).await?)?;
        replies.number()?;
        shards.iter().map(|_| wrote(replies.array()?)).collect()
    }
}

fn wrote(mut reply: Reply) -> Result<Wrote, Error> {
    let done = reply.number()? == 1;
    let stood = Stamp { incarnation: Incarnation(reply.number()?), number: reply.number()? };
    Ok(Wrote { done, stood: (stood != Stamp::default()).then_some(stood) })
}

/// Tells readers to read at once instead of at their next turn. Published through every master, because
/// any of them may be away; in a Redis Cluster each message reaches all subscribers.
async fn announce(topology: &Topology, shard: Shard, role: NodeRole) {
    let mut publish = redis::cmd("PUBLISH");
    publish.arg(keys::NODES_CHANGED).arg(role.as_str());
    if let Err(error) = topology.query::<Value>(shard, &publish).await {
        tracing::debug!(%error, "a change of the nodes was not announced");
    }
}
