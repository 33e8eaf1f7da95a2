//! Which sessions say next that they live: those whose routes may be gone or are void, as fast as is
//! allowed, and all of them in turn.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{Incarnation, Shard};
use tokio::time::Instant;

use crate::config::SyncConfig;
use crate::handle::Handle;
use crate::node::Node;

/// Sessions to confirm, at a bounded rate.
pub struct Confirming {
    /// Those that must not wait.
    urgent: VecDeque<Weak<Handle>>,
    /// What became urgent while others were. They are finished first: nobody starves where this is
    /// asked for again and again.
    again: Option<Whose>,
    /// Those whose turn it is.
    calm: VecDeque<Weak<Handle>>,
    calm_per_pace: usize,
    per_pace: usize,
    pace: Duration,
    every: Duration,
    next: Instant,
    /// A new life, and those whose routes named another one when it began.
    life: Option<(Incarnation, VecDeque<Weak<Handle>>)>,
}

enum Whose {
    All,
    Of(BTreeSet<Shard>),
}

impl Confirming {
    /// [`Self::go_on`] will be called each `pace`.
    pub fn new(config: &SyncConfig, pace: Duration) -> Self {
        let every = Duration::from_secs(config.confirm_interval_seconds);
        let per_pace = (f64::from(config.confirms_per_second) * pace.as_secs_f64()).ceil();
        Self {
            urgent: VecDeque::new(),
            again: None,
            calm: VecDeque::new(),
            calm_per_pace: 1,
            per_pace: (per_pace as usize).max(1),
            pace,
            every,
            next: Instant::now() + every,
            life: None,
        }
    }

    /// All of them, as fast as is allowed.
    pub fn all(&mut self, node: &Node) {
        self.ask(node, Whose::All);
    }

    /// Those of some shards, as fast as is allowed.
    pub fn of(&mut self, node: &Node, shards: impl IntoIterator<Item = Shard>) {
        self.ask(node, Whose::Of(shards.into_iter().collect()));
    }

    /// All of them, until each route names this life: [`Self::finished_life`] then tells.
    pub fn begin_life(&mut self, node: &Node, incarnation: Incarnation) {
        let all = node.registry.all();
        self.life = Some((incarnation, all.iter().map(Arc::downgrade).collect()));
        self.all(node);
    }

    /// The life that [`Self::begin_life`] named, once: no session has a route of an earlier one.
    pub fn finished_life(&mut self) -> Option<Incarnation> {
        let (incarnation, waiting) = self.life.as_mut()?;
        while let Some(first) = waiting.front() {
            let over =
                |handle: &Arc<Handle>| handle.is_over() || handle.confirmed_life() >= incarnation.0;
            if first.upgrade().as_ref().is_some_and(|handle| !over(handle)) {
                return None;
            }
            waiting.pop_front();
        }
        self.life.take().map(|(incarnation, _)| incarnation)
    }

    fn ask(&mut self, node: &Node, whose: Whose) {
        if self.urgent.is_empty() {
            self.urgent = sessions(node, &whose);
            return;
        }
        self.again = Some(match (self.again.take(), whose) {
            (Some(Whose::Of(mut known)), Whose::Of(more)) => {
                known.extend(more);
                Whose::Of(known)
            }
            (None, Whose::Of(shards)) => Whose::Of(shards),
            _ => Whose::All,
        });
    }

    /// Tells as many as one pace allows.
    pub fn go_on(&mut self, node: &Node) {
        if self.urgent.is_empty()
            && let Some(whose) = self.again.take()
        {
            self.urgent = sessions(node, &whose);
        }
        if self.calm.is_empty() && Instant::now() >= self.next {
            self.calm = sessions(node, &Whose::All);
            self.next = Instant::now() + self.every;
            // Spread over half the interval.
            let paces = (self.every.as_secs_f64() / 2.0 / self.pace.as_secs_f64()).max(1.0);
            let calm = (self.calm.len() as f64 / paces).ceil() as usize;
            self.calm_per_pace = calm.clamp(1, self.per_pace);
        }
        let half = if self.urgent.is_empty() { self.per_pace } else { self.per_pace.div_ceil(2) };
        let calm = self.calm_per_pace.min(half).min(self.calm.len());
        tell(&mut self.calm, calm);
        tell(&mut self.urgent, (self.per_pace - calm).max(1));
    }
}

fn sessions(node: &Node, whose: &Whose) -> VecDeque<Weak<Handle>> {
    let all = node.registry.all();
    let wanted = |handle: &&Arc<Handle>| match whose {
        Whose::All => true,
        Whose::Of(shards) => shards.contains(&node.mailbox.shard_of(handle.user())),
    };
    all.iter().filter(wanted).map(Arc::downgrade).collect()
}

fn tell(waiting: &mut VecDeque<Weak<Handle>>, count: usize) {
    for handle in waiting.drain(..count.min(waiting.len())) {
        if let Some(handle) = handle.upgrade() {
            handle.tell(|inbox| inbox.confirm = true);
        }
    }
}
