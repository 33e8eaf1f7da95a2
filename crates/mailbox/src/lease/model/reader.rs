//! A dispatcher that reads leases and judges routes, with the shipped `Reading`, [`Memory`] and [`Standing`].

use std::collections::VecDeque;

use barid_core::{Incarnation, NodeId};

use super::ground::{
    MASTERS, NODES, REFRESH_MS, STALE, USERS, VOID_AFTER, at, id, own_master, users_of,
};
use super::master::{Master, Route};
use crate::nodes::Standing;
use crate::nodes::memory::{Memory, Own, Reading};
use crate::{NodeRecord, NodeRole};

const ROLE: Option<NodeRole> = Some(NodeRole::Access);

pub struct Reader {
    pub frozen: bool,
    /// Masters that it cannot reach.
    pub cut: u8,
    pub read_at: u64,
    pub view: Vec<NodeRecord>,
    /// Routes as it last read them; they may be outdated.
    pub cached: [Option<Route>; USERS],
    /// Routes to remove; it may be stopped before it does.
    pub to_remove: VecDeque<(usize, Route)>,
    pub holds_removals: bool,
    memory: Memory,
    /// Nodes that have been in its view.
    knew: [bool; NODES],
    turn: usize,
}

impl Reader {
    pub fn new(read_at: u64, cut: u8) -> Self {
        Self {
            frozen: false,
            cut,
            read_at,
            view: Vec::new(),
            cached: [None; USERS],
            to_remove: VecDeque::new(),
            holds_removals: false,
            memory: Memory::new(STALE),
            knew: [false; NODES],
            turn: 0,
        }
    }

    pub fn reaches(&self, master: usize) -> bool {
        self.cut & (1 << master) == 0
    }

    fn hears<'a>(&self, master: usize, masters: &'a [Master]) -> Option<&'a Master> {
        Some(&masters[master]).filter(|it| self.reaches(master) && it.answers())
    }

    /// The shard whose copies it reads in this turn.
    pub fn asks(&self, master: usize) -> usize {
        users_of(master).nth(self.turn % (USERS / MASTERS)).unwrap()
    }

    pub fn read(&mut self, masters: &[Master], now_ms: u64) {
        self.turn += 1;
        let mut reading = Reading::of(self.memory.known().collect::<Vec<_>>(), at(now_ms));
        for master in 0..MASTERS {
            let heard = self.hears(master, masters);
            reading.add_copies(ROLE, heard.map(|it| it.copies(self.asks(master), now_ms)));
        }
        for open in reading.open() {
            let node = number(&open);
            let heard = self.hears(own_master(node), masters);
            reading.add_own(ROLE, &open, heard.map_or(Own::Unreadable, |it| it.own(node, now_ms)));
        }
        self.view = self.memory.update(reading, at(now_ms));
        self.view.iter().for_each(|record| self.knew[number(&record.id)] = true);
        self.read_at = now_ms + REFRESH_MS;
    }

    /// Whether something that it can read shows that this process is running.
    pub fn is_shown(&self, record: &NodeRecord, masters: &[Master], now_ms: u64) -> bool {
        let node = number(&record.id);
        let copied =
            self.shown(node, masters, now_ms).any(|incarnation| incarnation == record.incarnation);
        let own = self.hears(own_master(node), masters).map(|it| it.own(node, now_ms));
        let own =
            matches!(own, Some(Own::Held(stamp, _)) if stamp.incarnation == record.incarnation);
        copied || (own && self.knew[node])
    }

    /// Whether it can read nothing about this node.
    pub fn is_hidden(&self, record: &NodeRecord, masters: &[Master], now_ms: u64) -> bool {
        let node = number(&record.id);
        self.hears(own_master(node), masters).is_none()
            && self.shown(node, masters, now_ms).next().is_none()
    }

    /// The incarnations of a node in the copies that it can read.
    fn shown<'a>(
        &'a self,
        node: usize,
        masters: &'a [Master],
        now_ms: u64,
    ) -> impl Iterator<Item = Incarnation> + 'a {
        let heard = (0..MASTERS).filter_map(move |it| Some((it, self.hears(it, masters)?)));
        heard.filter_map(move |(it, master)| master.shows(self.asks(it), node, now_ms))
    }

    pub fn knows(&self, route: &Route) -> bool {
        let mut named = self.view.iter().filter(|record| record.id == *id(route.node));
        named.any(|record| record.incarnation == route.incarnation)
    }

    pub fn standing(&mut self, route: &Route, now_ms: u64) -> Standing {
        let (node, incarnation) = (id(route.node), route.incarnation);
        Standing::of(self.memory.void_since(node, incarnation, at(now_ms)), VOID_AFTER)
    }
}

fn number(node: &NodeId) -> usize {
    (0..NODES).find(|number| id(*number) == node).unwrap()
}
