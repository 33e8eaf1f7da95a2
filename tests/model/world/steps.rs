//! Executes a step.

use super::{BURST, CLIENTS, Checked, STRANGERS, USERS, World};
use crate::Step;
use crate::purger::Record;

/// The largest number of a user's records, so that the mailbox remembers all ids.
const RECORDS_MAX: usize = 56;
/// The largest number of rounds of the final repairs.
const ROUNDS: usize = 12;
/// The time that passes on the nodes' clocks: a re-send may cross an acknowledgement of the previous step, but not of
/// the previous round.
const STEP_US: u64 = 1_000;
const ROUND_US: u64 = 10_000;
const NAMES: [&str; 4] = ["phone", "tablet", "watch", "browser"];

impl World<'_> {
    pub async fn step(&mut self, step: &Step) -> Checked {
        self.now_us += STEP_US;
        match *step {
            Step::Produce { source, user, repeat, key } => self.produce(source, user, repeat, key),
            Step::Send { source, user } => {
                self.produce(source, user, None, None);
                self.pump(source, 0, 3).await?;
            }
            Step::Burst { source, user, again } => {
                for _ in 0..BURST {
                    self.produce(source, user, None, None);
                }
                self.pump(source, 0, BURST / 2).await?;
                self.pump(source, 0, BURST / 2).await?;
                self.produce(source, user, Some(again), None);
                self.pump(source, 0, 1).await?;
            }
            Step::Accept { source, purger, count } => {
                self.pump(source, purger, count).await?;
            }
            Step::Rebalance { source } => {
                self.log[source].assign(1);
                self.pump(source, 1, 2).await?;
            }
            Step::ReadAgain { source, back } => self.log[source].read_again(0, back),
            Step::Redeliver { source } => self.redeliver(source).await?,
            Step::Push { user, nth } => self.push(user, nth).await?,
            Step::Serve { user, handled } => self.serve(user, handled).await?,
            Step::LosePushes { user, told } => self.lose_pushes(user, told),
            Step::Connect { client } => self.connect(client, false).await?,
            Step::ConnectLate { client } => self.connect(client, true).await?,
            Step::Disconnect { client, ghost } => {
                if let Some(index) = self.find(client, ghost) {
                    self.close(index).await?;
                }
            }
            Step::Vanish { client } => {
                if let Some(index) = self.find(client, false) {
                    self.sessions.remove(index);
                    self.clients[client].current = None;
                }
            }
            Step::Handle { client, count, newest } => {
                self.handle(client, count, newest).map(|_| ())?
            }
            Step::Refuse { client } => self.clients[client].refuse()?,
            Step::Restart { client, crash } => {
                if let Some(index) = self.find(client, false) {
                    self.sessions.remove(index);
                }
                self.clients[client].restart(crash);
            }
            Step::Turn { client, ghost, ahead } => {
                if let Some(index) = self.find(client, ghost) {
                    self.turn(index, ahead).await?;
                }
            }
            Step::Confirm { client, ghost } => {
                if let Some(index) = self.find(client, ghost) {
                    self.confirm(index).await?;
                }
            }
            Step::Fire { user, only, away } => {
                self.fire(user, only.map(|device| NAMES[device]), away).await?;
            }
            Step::Defer { nth, why } => self.defer(nth, why).await?,
            Step::DisconnectLate { nth } => self.disconnect_late(nth).await?,
            Step::Stranger { who, call, ref claim } => self.stranger(who, call, claim).await?,
            Step::Lapse => self.incarnation += 1,
            Step::GrowOld { quarters } => self.grow_old(quarters).await,
            Step::AckLate { nth } => self.ack_late(nth).await?,
            Step::Expire { user } => self.expire(user).await,
            Step::Replicate => {
                self.store.replicate().await;
                self.replica = self.now.clone();
                self.expired_there.clear();
            }
            Step::FailOver => self.fail_over().await,
            Step::Fork { source, user } => {
                self.fail_over().await;
                self.produce(source, user, None, None);
                self.pump(source, 0, 3).await?;
            }
        }
        self.look().await
    }

    fn produce(&mut self, source: usize, user: usize, repeat: Option<usize>, key: Option<usize>) {
        let of = |record: &&Record| record.user == user;
        if self.log.iter().flat_map(|log| &log.records).filter(of).count() >= RECORDS_MAX {
            return;
        }
        let records = &mut self.log[source].records;
        let earlier = repeat.and_then(|nth| records.iter().rev().filter(of).nth(nth)).cloned();
        let key = key.map(|key| format!("key-{key}"));
        let fresh = Record { user, id: format!("{source}-{}", records.len()), key };
        records.push(earlier.unwrap_or(fresh));
    }

    /// Returns whether everything was sent.
    async fn pump(&mut self, source: usize, purger: usize, count: usize) -> Checked<bool> {
        let group = self.log[source].group(purger, count);
        let gap = self.accept(source, &group).await?;
        let partition = &mut self.log[source];
        match gap {
            Some(known) => partition.gap(purger, known),
            None => {
                partition.done(purger, &group);
                partition.last = Some(group);
            }
        }
        Ok(gap.is_none() && partition.purgers[purger].next == partition.records.len())
    }

    /// A late call arrives: one that was given up, or one of a purger that has lost the partition.
    async fn redeliver(&mut self, source: usize) -> Checked {
        if let Some(group) = self.log[source].last.clone() {
            self.accept(source, &group).await?;
        }
        Ok(())
    }

    async fn grow_old(&mut self, quarters: u64) {
        self.store.grow_old(quarters).await;
        self.clock += quarters;
        for user in 0..USERS {
            self.now.boxes[user].forget_routes(self.clock);
            self.replica.boxes[user].forget_routes(self.clock);
            if self.now.boxes[user].is_forgotten(self.clock) {
                self.forget(user);
            }
            if self.replica.boxes[user].is_forgotten(self.clock) {
                let ids = self.replica.boxes[user].expire();
                self.expired.extend(ids.iter().cloned());
                self.expired_there.push((user, ids));
            }
        }
    }

    async fn expire(&mut self, user: usize) {
        self.store.expire(&super::user_key(user)).await;
        self.forget(user);
    }

    fn forget(&mut self, user: usize) {
        let ids = self.now.boxes[user].expire();
        self.missed(user, &ids);
        self.expired.extend(ids);
    }

    async fn fail_over(&mut self) {
        self.store.fail_over().await;
        self.now = self.replica.clone();
        // Devices need not be shown those, and may be shown another record with the same id later.
        for (user, ids) in std::mem::take(&mut self.expired_there) {
            self.missed(user, &ids);
        }
        for partition in &mut self.log {
            partition.last = None;
        }
    }

    /// Runs all repairs until nothing is left to do, and checks that everything was shown.
    pub async fn settle(&mut self) -> Checked {
        for who in 0..STRANGERS {
            self.send_away(who).await?;
        }
        for client in 0..CLIENTS {
            while let Some(ghost) = self.find(client, true) {
                self.close(ghost).await?;
            }
        }
        self.look().await?;
        for round in 0..ROUNDS {
            self.round = round;
            self.round().await?;
            if self.is_settled() {
                return self.all_was_shown();
            }
        }
        Err(format!("it does not settle: {:?} {:?}", self.held, self.sessions))
    }

    async fn round(&mut self) -> Checked {
        self.now_us += ROUND_US;
        for source in 0..2 {
            for _ in 0..ROUNDS {
                if self.pump(source, 0, BURST).await? {
                    break;
                }
            }
        }
        for client in 0..CLIENTS {
            match self.find(client, false) {
                Some(index) => self.confirm(index).await?,
                None => self.connect(client, false).await?,
            }
        }
        self.pushes.iter_mut().for_each(|pushes| pushes.clear());
        self.look().await?;
        for user in 0..USERS {
            self.fire(user, None, None).await?;
        }
        for client in 0..CLIENTS {
            self.exhaust(client, true).await?;
        }
        self.look().await
    }
}
