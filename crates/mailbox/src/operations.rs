//! The scripts' items: how they are asked, and how their answers read.

mod accept;
mod ack;
mod inspect;
mod sessions;
mod timers;

pub(crate) use accept::accept;
pub(crate) use ack::{Ack, Read};
pub(crate) use inspect::{inspect, parse_route, routes as read_routes};
pub(crate) use sessions::{Confirm, Connect, Disconnect};
pub(crate) use timers::{defer, fire};

use barid_core::{Epoch, NodeId, SessionRef, Shard};
use barid_wire::envelope;
use bytes::Bytes;

use crate::reply::Reply;
use crate::scripts::Call;
use crate::{Error, RedisConfig, UserKey, keys};
use barid_core::limits::TTL_SECONDS_MAX;

/// A random epoch for a mailbox that has no head: below 2^53, not 0.
fn epoch_candidate() -> u64 {
    (rand::random::<u64>() >> 11).max(1)
}

fn head(call: &mut Call, shard: Shard, user: &UserKey) {
    call.key(keys::head(shard, &user.app, &user.user));
}

fn queue(call: &mut Call, shard: Shard, user: &UserKey) {
    call.key(keys::queue(shard, &user.app, &user.user));
}

fn routes(call: &mut Call, shard: Shard, user: &UserKey) {
    call.key(keys::routes(shard, &user.app, &user.user));
}

fn session(call: &mut Call, session: &SessionRef) {
    call.arg(&session.node).arg(session.incarnation).arg(session.connection);
}

fn ttl_ms(config: &RedisConfig) -> u64 {
    config.ttl_seconds.min(TTL_SECONDS_MAX) * 1000
}

/// An entry as devices are sent it; Redis holds its two parts apart, and more behind the header.
fn entry(header: &[u8], body: &[u8]) -> Bytes {
    let header = header.get(..envelope::HEADER_BYTES).unwrap_or(header);
    [header, body].concat().into()
}

/// A number as the scripts take it: they hold whole numbers to 2^53.
fn number(value: u64) -> u64 {
    value.min(1 << 53)
}

/// Three elements: node, incarnation, connection.
fn read_session(reply: &mut Reply) -> Result<Option<SessionRef>, Error> {
    let node = reply.text()?;
    let (incarnation, connection) = (reply.number()?, reply.number()?);
    if node.is_empty() {
        return Ok(None);
    }
    let node = NodeId::new(&node).map_err(|e| Error::Unexpected(e.to_string()))?;
    Ok(Some(SessionRef {
        node,
        incarnation: barid_core::Incarnation(incarnation),
        connection: barid_core::ConnectionId(connection),
    }))
}

fn read_epoch(reply: &mut Reply) -> Result<Epoch, Error> {
    reply.number().map(Epoch)
}
