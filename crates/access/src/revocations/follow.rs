//! Follows the topic of revocations: keeps the node's table, and has the open sessions of revoked tokens closed.

use std::sync::Arc;
use std::time::Duration;

use barid_bus::{Change, Error, Followed, Follower, KafkaConfig};
use barid_runtime::{Condition, repeats};
use barid_wire::cut;
use barid_wire::revocation::{Revocation, Subject};
use tokio::task::yield_now;
use tokio::time::interval;

use crate::node::Node;
use crate::revocations::closing::{self, Unscanned};

/// Time between two removals of revocations that are over.
const SWEEP: Duration = Duration::from_secs(10);
/// How long Kafka's description of the topic is waited for.
const DESCRIBE_LIMIT: Duration = Duration::from_secs(10);
/// How much of a malformed key a log line shows, bytes.
const SHOWN_BYTES: usize = 64;

/// Keeps the revocations of a node. Never returns.
pub async fn run(node: Arc<Node>, follower: Follower, kafka: KafkaConfig, condition: Condition) {
    let unscanned = Unscanned::new();
    let following = Following {
        node: &node,
        condition,
        unscanned: &unscanned,
        topic: kafka.topics.revocations.clone(),
        partitions: 1,
        is_read: false,
        was_fit: false,
        degraded: None,
    };
    // One task: closing yields to following while it scans the sessions.
    tokio::join!(following.run(follower, kafka), closing::run(&node, &unscanned));
}

struct Following<'a> {
    node: &'a Node,
    condition: Condition,
    /// Revocations that were added to the table, for the scans of sessions.
    unscanned: &'a Unscanned,
    topic: String,
    /// Partitions of the topic. With more than one, the order of two records of a key is unknown.
    partitions: usize,
    /// Whether the topic was read to its end once.
    is_read: bool,
    /// Whether that was while it had one partition.
    was_fit: bool,
    /// Why new revocations do not arrive.
    degraded: Option<Error>,
}

enum Step {
    Revoke(Revocation),
    Withdraw(Subject),
}

impl Following<'_> {
    async fn run(mut self, mut follower: Follower, kafka: KafkaConfig) {
        let mut sweep = interval(SWEEP);
        self.publish();
        loop {
            tokio::select! {
                event = follower.next() => match event {
                    Followed::Changes(changes) => self.apply(&changes),
                    Followed::CaughtUp => self.caught_up(&kafka),
                    Followed::Partitions(partitions) => {
                        self.partitions = partitions;
                        if let Some(problem) = self.problem() {
                            tracing::warn!(problem, "the topic of revocations does not fit");
                        }
                    }
                    Followed::Restarted => {
                        self.node.revocations.change(|table| table.restart());
                    }
                    Followed::Degraded(error) => {
                        let (text, is_read) = (error.to_string(), self.is_read);
                        if let Some(repeated) = repeats::due(&text) {
                            tracing::warn!(
                                error = text,
                                repeated,
                                is_read,
                                "new revocations do not arrive; those that were read stay in force"
                            );
                        }
                        self.degraded = Some(error);
                    }
                    Followed::Recovered => {
                        tracing::info!("new revocations arrive again");
                        self.degraded = None;
                    }
                },
                _ = sweep.tick() => {
                    let now_s = self.node.clock.now_s();
                    // In steps, between which handshakes read the table.
                    while self.node.revocations.change(|table| table.sweep(now_s)) {
                        yield_now().await;
                    }
                }
            }
            self.publish();
        }
    }

    fn caught_up(&mut self, kafka: &KafkaConfig) {
        let node = self.node;
        let now_s = node.clock.now_s();
        let (lost, evicted) =
            node.revocations.change(|table| (table.caught_up(now_s), table.evict(now_s)));
        if lost > 0 {
            tracing::warn!(
                lost,
                "the topic no longer has some revocations, whose tokens are valid again"
            );
        }
        self.evicted(evicted);
        node.revocations.set_read();
        self.is_read = true;
        self.was_fit |= self.partitions == 1;
        tracing::info!(revocations = node.revocations.table().len(), "revocations read");
        tokio::spawn(warn_of_problems(kafka.clone()));
    }

    /// Sets the condition and the gauges.
    fn publish(&self) {
        let metrics = &self.node.metrics;
        let problem = self.problem();
        let is_current = self.is_read && self.degraded.is_none() && problem.is_none();
        metrics.revocations_current.set(is_current.into());
        metrics.revocations(self.node.revocations.table().counts());
        // What a node has read stays in force: one change of the topic must not take all nodes out of service.
        match (problem.filter(|_| !self.was_fit), &self.degraded, self.is_read) {
            (Some(problem), _, _) => self.condition.failing(problem),
            (None, _, true) => self.condition.ready(),
            (None, Some(error), false) => self.condition.failing(error.to_string()),
            (None, None, false) => {
                self.condition.failing("the topic of revocations is being read");
            }
        }
    }

    /// Why revocations may not be in force although they arrive.
    fn problem(&self) -> Option<String> {
        let Self { topic, partitions, .. } = self;
        (*partitions > 1).then(|| {
            format!(
                "topic {topic} has {partitions} partitions, among which the order of a revocation and \
                 its withdrawal is lost: note `barid revoke list`, delete the topic, create it with \
                 one partition (`barid topics create`) and revoke again"
            )
        })
    }

    /// Applies changes to the table, and has sessions closed that are revoked now.
    fn apply(&self, changes: &[Change]) {
        let node = self.node;
        let steps: Vec<Step> = changes.iter().filter_map(|change| self.read(change)).collect();
        let now_s = node.clock.now_s();
        let evicted = node.revocations.change(|table| {
            for step in &steps {
                match step {
                    Step::Revoke(revocation) => table.insert(revocation, now_s),
                    Step::Withdraw(subject) => table.remove(subject),
                }
            }
            table.evict(now_s)
        });
        self.evicted(evicted);
        let made = steps.into_iter().filter_map(|step| match step {
            Step::Revoke(revocation) => Some(revocation),
            Step::Withdraw(_) => None,
        });
        let made: Vec<Revocation> = made.collect();
        for revocation in &made {
            tracing::debug!(key = %revocation.subject, reason = revocation.reason, "revoked");
            if let Subject::User(user) = &revocation.subject {
                closing::close_user(node, user);
            }
        }
        self.unscanned.add(&made, now_s);
    }

    /// Reads a record. `None`: its key names no subject.
    fn read(&self, change: &Change) -> Option<Step> {
        let read = match &change.value {
            Some(value) => Revocation::decode_or_all(&change.key, value)
                .map(|(revocation, error)| (Step::Revoke(revocation), error)),
            None => Subject::from_key(&change.key).map(|subject| (Step::Withdraw(subject), None)),
        };
        let (step, error) = match read {
            Ok((step, None)) => return Some(step),
            Ok((step, Some(error))) => (Some(step), error),
            Err(error) => (None, error),
        };
        self.node.metrics.revocations_malformed.inc();
        let key = String::from_utf8_lossy(&change.key);
        let (key, revokes_all) = (cut(&key, SHOWN_BYTES), step.is_some());
        if let Some(repeated) = repeats::due("malformed revocation") {
            tracing::warn!(
                key,
                %error,
                revokes_all,
                repeated,
                "malformed revocation: all tokens of its key are revoked, if it has one"
            );
        }
        step
    }

    fn evicted(&self, evicted: u64) {
        if evicted > 0 {
            self.node.metrics.revocations_evicted.inc_by(evicted);
            tracing::warn!(evicted, "too many revocations: the evicted ones are not in force");
        }
    }
}

/// Logs settings of the topic with which revocations are forgotten.
async fn warn_of_problems(kafka: KafkaConfig) {
    let Ok(topic) = barid_bus::describe_revocations(&kafka, DESCRIBE_LIMIT).await else { return };
    for problem in topic.problems {
        tracing::warn!(topic = topic.name, problem, "the topic of revocations does not fit");
    }
}
