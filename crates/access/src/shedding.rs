//! Shedding: a node with far more sessions than its peers asks some of its devices to reconnect elsewhere.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use barid_core::NodeId;
use barid_mailbox::NodeRecord;
use rand::seq::SliceRandom as _;

use crate::config::BalanceConfig;
use crate::handle::Handle;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::sessions::Sessions;

/// Pause between two episodes, seconds: longer than the nodes take to learn each other's loads.
const REST_SECONDS: u32 = 15;

/// Mean sessions per node of the zone; `None` if there is no other node.
fn mean(own: &NodeId, sessions: u64, nodes: &[NodeRecord], zone: &str) -> Option<u64> {
    let others: Vec<u64> = nodes
        .iter()
        .filter(|node| !node.draining && node.zone == zone && node.id != *own)
        .map(|node| node.load)
        .collect();
    let all = sessions + others.iter().sum::<u64>();
    (!others.is_empty()).then(|| all.div_ceil(others.len() as u64 + 1))
}

/// Sends GoAway to some devices each second, from the time that the node is far above the mean until it is at the mean.
pub struct Shedding {
    zone: String,
    episodes: Episodes,
    /// Sessions to choose from next, shuffled.
    waiting: VecDeque<Weak<Handle>>,
    /// Sessions that were sent GoAway and have not ended.
    leaving: Vec<Arc<Handle>>,
}

impl Shedding {
    /// Creates the shedding of a node in this zone.
    pub fn new(config: BalanceConfig, zone: String) -> Self {
        let episodes = Episodes { config, target: None, rest: 0 };
        Self { zone, episodes, waiting: VecDeque::new(), leaving: Vec::new() }
    }

    /// Sends GoAway to this second's devices. Call it once a second until the node drains.
    pub fn step(&mut self, sessions: &Sessions, peers: &Peers, metrics: &Metrics) {
        if self.episodes.config.shed_above == 0.0 {
            return;
        }
        self.leaving.retain(|handle| !handle.is_over());
        let welcomed = u64::try_from(metrics.sessions.get()).unwrap_or(0);
        let staying = welcomed.saturating_sub(self.leaving.len() as u64);
        let mean = || mean(&sessions.node, staying, &peers.snapshot(), &self.zone);
        let before = self.episodes.target;
        let count = self.episodes.next(staying, mean);
        if before != self.episodes.target {
            let target = self.episodes.target;
            let event = if target.is_some() { "shedding sessions" } else { "shedding finished" };
            tracing::info!(sessions = welcomed, target, "{event}");
            self.waiting.clear();
        }
        self.shed(sessions, metrics, count);
    }

    fn shed(&mut self, sessions: &Sessions, metrics: &Metrics, count: u64) {
        if count > 0 && self.waiting.is_empty() {
            let mut all = sessions.registry.all();
            all.shuffle(&mut rand::rng());
            self.waiting = all.iter().map(Arc::downgrade).collect();
        }
        let mut left = count;
        while left > 0
            && let Some(handle) = self.waiting.pop_front()
        {
            if let Some(handle) = handle.upgrade().filter(|handle| !handle.is_over()) {
                handle.send_go_away();
                metrics.shed.inc();
                self.leaving.push(handle);
                left -= 1;
            }
        }
    }
}

/// When to shed, and how many sessions. Other nodes' loads are known with a delay of some seconds. So an episode ends
/// at the mean of its beginning, and the next one waits until the other nodes have counted the sessions they received.
#[derive(Debug)]
struct Episodes {
    config: BalanceConfig,
    target: Option<u64>,
    /// Remaining pause, seconds.
    rest: u32,
}

impl Episodes {
    /// How many of the `staying` sessions to send away in this second.
    fn next(&mut self, staying: u64, mean: impl FnOnce() -> Option<u64>) -> u64 {
        if self.target.is_none() {
            if self.rest > 0 {
                self.rest -= 1;
                return 0;
            }
            let Some(mean) = mean() else { return 0 };
            let high = (mean as f64 * self.config.shed_above) as u64 + self.config.shed_slack;
            self.target = (staying > high).then_some(mean);
        }
        let Some(target) = self.target else { return 0 };
        if staying <= target {
            self.target = None;
            self.rest = REST_SECONDS;
            return 0;
        }
        (staying - target).min(self.config.sheds_per_second.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offer::tests::node;

    #[test]
    fn a_node_far_above_the_mean_sheds_down_to_it_and_not_further() {
        let config = BalanceConfig { shed_above: 1.2, shed_slack: 10, sheds_per_second: 50 };
        let own = NodeId::new("a").unwrap();
        let mean = |sessions, others: &[u64]| {
            let others: Vec<_> = others.iter().map(|load| node("b", "x", *load)).collect();
            super::mean(&own, sessions, &others, "x")
        };
        assert_eq!(mean(1000, &[0]), Some(500));
        assert_eq!(mean(1000, &[]), None);
        // Itself, another zone, and who is leaving do not count.
        let mut others = vec![node("a", "x", 999), node("b", "y", 0), node("c", "x", 0)];
        others[2].draining = true;
        assert_eq!(super::mean(&own, 1000, &others, "x"), None);

        let mut episodes = Episodes { config, target: None, rest: 0 };
        assert_eq!(episodes.next(610, || Some(500)), 0, "not far enough");
        assert_eq!(episodes.next(1000, || None), 0, "nowhere to go");
        assert_eq!(episodes.next(611, || Some(500)), 50);
        // Other nodes' loads are known late: they do not move the target.
        assert_eq!(episodes.next(561, || Some(100)), 50);
        assert_eq!(episodes.next(511, || Some(100)), 11);
        assert_eq!(episodes.next(500, || Some(100)), 0);
        for _ in 0..REST_SECONDS {
            assert_eq!(episodes.next(500, || Some(100)), 0);
        }
        assert_eq!(episodes.next(500, || Some(100)), 50);
    }
}
