//! Everything around the scripts, one step at a time. Redis's answers and what it holds are compared
//! with the shard in memory, and with the promises.

mod calls;
mod checks;
mod sessions;
mod steps;
mod strangers;

use std::collections::{HashSet, VecDeque};

use barid_core::{
    AppId, ConnectionId, DeviceId, IdHash, Incarnation, NodeId, SessionRef, Shard, UserId,
};
use barid_mailbox::{
    AcceptGroup, AcceptMessage, AckRequest, DisconnectRequest, DueUser, Source, UserKey,
};
use barid_wire::envelope::{self, Envelope};
use bytes::Bytes;

use crate::client::Client;
use crate::mailboxes;
use crate::purger::{Group, Partition, Record, at};
use crate::session::Session;
use crate::store::{Held, Store};

/// What was broken, in words.
pub type Checked<T = ()> = Result<T, String>;

macro_rules! check {
    ($holds:expr, $($words:tt)*) => {
        if !$holds {
            return Err(format!($($words)*));
        }
    };
}
pub(crate) use check;

pub const USERS: usize = 2;
/// Two of each user.
pub const CLIENTS: usize = 4;
/// Records that are written at once; half of them are more than the newest ids of a mailbox.
pub const BURST: usize = 34;
/// Devices that nobody promises anything, because they say what they like: two of each user.
pub const STRANGERS: usize = 4;

/// What every device says it runs on.
const PLATFORM: &str = "model";

pub struct World<'a> {
    store: &'a mut Store,
    now: mailboxes::Shard,
    replica: mailboxes::Shard,
    log: [Partition; 2],
    /// On their way from the purger to the nodes.
    pushes: [VecDeque<Bytes>; USERS],
    /// Also those whose device has gone elsewhere and that nobody has told.
    sessions: Vec<Session>,
    clients: [Client; CLIENTS],
    strangers: [strangers::Stranger; STRANGERS],
    claims: Vec<DueUser>,
    /// Every acknowledgement so far, with the name of its device.
    acks: Vec<(&'static str, AckRequest)>,
    /// Every session that ended or goes by another incarnation, with the name of its device.
    left: Vec<(&'static str, DisconnectRequest)>,
    /// Ids whose mailbox expired.
    expired: HashSet<String>,
    /// By user, those whose mailbox expired at the replica, since it last heard of the master.
    expired_there: Vec<(usize, Vec<String>)>,
    connections: u64,
    /// Of the node's lease.
    incarnation: u64,
    /// In units: a mailbox keeps its entries for a few.
    clock: u64,
    /// The nodes' clocks, µs.
    now_us: u64,
    /// Of the repairs at the end.
    round: usize,
    /// What Redis held after the last call.
    held: Vec<Held>,
}

impl<'a> World<'a> {
    /// With an empty Redis.
    pub async fn new(store: &'a mut Store) -> Self {
        store.empty().await;
        let held = store.look().await;
        let empty = mailboxes::Shard { keeps: store.keeps(), ..Default::default() };
        Self {
            store,
            now: empty.clone(),
            replica: empty,
            log: Default::default(),
            pushes: Default::default(),
            sessions: Vec::new(),
            clients: Default::default(),
            strangers: Default::default(),
            claims: Vec::new(),
            acks: Vec::new(),
            left: Vec::new(),
            expired: HashSet::new(),
            expired_there: Vec::new(),
            connections: 0,
            incarnation: 1,
            clock: 0,
            now_us: 1_000_000_000,
            round: 0,
            held,
        }
    }
}

pub fn text(error: barid_mailbox::Error) -> String {
    error.to_string()
}

pub fn user_key(user: usize) -> UserKey {
    let user = ["alice", "bob"][user];
    UserKey { app: AppId::new("demo").expect("a name"), user: UserId::new(user).expect("a name") }
}

/// Whose device a client is.
pub fn user_of(client: usize) -> usize {
    client / 2
}

pub fn device_of(client: usize) -> &'static str {
    ["phone", "tablet"][client % 2]
}

pub fn device_id(name: &str) -> DeviceId {
    DeviceId::new(name).expect("a name")
}

pub fn session_ref(number: u64, incarnation: u64) -> SessionRef {
    let node = NodeId::new("node-1").expect("a name");
    SessionRef { node, incarnation: Incarnation(incarnation), connection: ConnectionId(number) }
}

fn accept_group(shard: Shard, source: usize, group: &Group) -> AcceptGroup {
    let message = |(offset, record): &(i64, Record)| AcceptMessage {
        position: at(*offset),
        app: user_key(record.user).app,
        user: user_key(record.user).user,
        id: IdHash::of(&record.id),
        collapse_key: record.key.as_deref().map(Into::into),
        body: envelope::encode_body(Envelope { id: record.id.clone(), ..Default::default() }),
    };
    AcceptGroup {
        shard,
        source: Source { topic_id: "topic".into(), partition: source as i32 },
        prev: group.prev.map(at),
        raise: None,
        messages: group.messages.iter().map(message).collect(),
    }
}
