//! Empty groups, which ask shards whether they still know the positions that they have confirmed. Asked are the
//! shards of a partition that was just assigned or in which a shard has forgotten messages, and shards that were idle
//! for a while. A failover may have lost messages of a shard that no later batch would reveal.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use barid_core::Shard;
use barid_mailbox::GroupOutcome;
use tokio::time::Instant;

use super::Lane;
use crate::flight::Reading;
use crate::lanes::batch::Group;
use crate::lanes::event::{Answer, Event, Question};
use crate::ports::Mailboxes;

impl<M: Mailboxes> Lane<M> {
    /// Answers the questions in the queue. A shard whose master is unavailable is left out of the answer; it is asked
    /// again by the next probe and by its next batch.
    pub(super) async fn answer(&mut self) {
        let mut questions = self.queue.questions();
        while !questions.is_empty() {
            // An assignment has at most one group per shard in a call.
            let mut asked = HashSet::new();
            let (now, later) =
                questions.into_iter().partition(|question| asked.insert(question.assignment.id));
            self.answer_to(now).await;
            questions = later;
        }
    }

    async fn answer_to(&mut self, questions: Vec<Question>) {
        let mut groups = Vec::new();
        let mut answers: HashMap<(u64, u64), Answer> = HashMap::new();
        for question in questions {
            let Some(reading) = question.assignment.live() else { continue };
            let key = (question.assignment.id, question.round);
            for (shard, raise) in question.shards {
                groups.push((key, Group::empty(shard, Arc::clone(&reading), raise)));
            }
            answers.insert(key, Answer::new(question.assignment, question.round));
        }
        while !groups.is_empty() {
            let portion = groups.len().min(self.shared.window.call_messages_max);
            let (keys, portion): (Vec<_>, Vec<_>) = groups.drain(..portion).unzip();
            let keys = portion
                .iter()
                .zip(keys)
                .map(|(group, key)| ((group.reading.assignment.id, group.shard), key))
                .collect();
            self.ask(portion, &keys, &mut answers).await;
        }
        for answer in answers.into_values() {
            let _ = self.shared.events.send(Event::Answered(answer)).await;
        }
    }

    /// Asks idle shards.
    pub(super) async fn probe(&mut self) {
        self.probe_at = Instant::now() + self.probe_every;
        let mut answers = HashMap::new();
        for groups in self.idle(self.shared.window.call_messages_max) {
            let mut keys = HashMap::new();
            for group in &groups {
                let assignment = &group.reading.assignment;
                let key = (assignment.id, 0);
                keys.insert((assignment.id, group.shard), key);
                answers.entry(key).or_insert_with(|| Answer::new(Arc::clone(assignment), 0));
            }
            self.ask(groups, &keys, &mut answers).await;
        }
        for answer in answers.into_values().filter(|answer| !answer.gaps.is_empty()) {
            let _ = self.shared.events.send(Event::Answered(answer)).await;
        }
    }

    /// Empty groups for shards that were idle since the last probe, in portions.
    fn idle(&mut self, portion: usize) -> Vec<Vec<Group>> {
        let mut readings: HashMap<u64, Arc<Reading>> = HashMap::new();
        self.assignments.retain(|id, assignment| {
            let live = assignment.upgrade().and_then(|assignment| assignment.live());
            live.map(|reading| readings.insert(*id, reading)).is_some()
        });
        let idle = self.history.idle(|assignment| readings.contains_key(&assignment));
        let group = |(assignment, shard): (u64, Shard)| {
            let reading = readings.get(&assignment).filter(|reading| !reading.ended())?;
            Some(Group::empty(shard, Arc::clone(reading), None))
        };
        let mut idle: Vec<Group> = idle.into_iter().filter_map(group).collect();
        let mut portions = Vec::new();
        while !idle.is_empty() {
            portions.push(idle.split_off(idle.len().saturating_sub(portion)));
        }
        portions
    }

    async fn ask(
        &mut self,
        groups: Vec<Group>,
        keys: &HashMap<(u64, Shard), (u64, u64)>,
        answers: &mut HashMap<(u64, u64), Answer>,
    ) {
        for (group, outcome) in self.exchange(groups).await.into_iter().flatten() {
            let key = keys.get(&(group.reading.assignment.id, group.shard));
            let Some(answer) = key.and_then(|key| answers.get_mut(key)) else { continue };
            match outcome {
                Ok(GroupOutcome::Done(_)) => {
                    self.confirm(&group);
                    answer.knowing.push(group.shard);
                }
                Ok(GroupOutcome::Gap(known)) => {
                    self.gap_seen(&group, known);
                    answer.gaps.push((group.shard, known));
                }
                Err(error) => self.failed(group, error),
            }
        }
    }
}
