//! Executes the steps. Redis's answers and its content are compared with the shard in memory, and with the promises.

mod calls;
mod checks;
mod sessions;
mod steps;
mod strangers;

use std::collections::{HashSet, VecDeque};

use barid_core::{
    AppId, ConnectionId, DeviceId, IdHash, Incarnation, NodeId, Owner, SessionRef, Shard, UserId,
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

/// The result of a check; the error describes the violation.
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
/// Devices: two of each user.
pub const CLIENTS: usize = 4;
/// Records that are produced at once. Half of them exceed the newest ids of a mailbox.
pub const BURST: usize = 34;
/// Devices that do not follow the protocol: two of each user.
pub const STRANGERS: usize = 4;

/// The platform of every device.
const PLATFORM: &str = "model";

pub struct World<'a> {
    store: &'a mut Store,
    now: mailboxes::Shard,
    replica: mailboxes::Shard,
    log: [Partition; 2],
    /// Pushes that have not reached the nodes.
    pushes: [VecDeque<Bytes>; USERS],
    /// Sessions, including those whose device has connected elsewhere.
    sessions: Vec<Session>,
    clients: [Client; CLIENTS],
    strangers: [strangers::Stranger; STRANGERS],
    claims: Vec<DueUser>,
    /// All acknowledgements, with the name of their device.
    acks: Vec<(&'static str, AckRequest)>,
    /// All sessions that ended or changed their incarnation, with the name of their device.
    left: Vec<(&'static str, DisconnectRequest)>,
    /// Ids whose mailbox expired.
    expired: HashSet<String>,
    /// Ids whose mailbox expired on the replica since the last copy, with their user.
    expired_there: Vec<(usize, Vec<String>)>,
    connections: u64,
    /// Incarnation of the node's lease.
    incarnation: u64,
    /// In units: a mailbox keeps its entries for a few.
    clock: u64,
    /// The nodes' clocks, µs.
    now_us: u64,
    /// Whether the final repairs are running.
    round: usize,
    /// The content of Redis after the last call.
    held: Vec<Held>,
}

impl<'a> World<'a> {
    /// A world with an empty Redis.
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

/// The user of a client.
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
        owner: Owner::User(user_key(record.user).user),
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
