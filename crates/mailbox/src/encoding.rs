//! Keys, arguments and replies that several scripts share.

use barid_core::limits::TTL_SECONDS_MAX;
use barid_core::{
    Chain, ConnectionId, Epoch, Generation, Incarnation, NodeId, Position, Seq, SessionRef, Shard,
};
use barid_wire::envelope;
use bytes::Bytes;

use crate::reply::Reply;
use crate::scripts::Call;
use crate::{Error, RedisConfig, UserKey, keys};

/// A random epoch for a new mailbox: 1 to 2^53 - 1.
pub(crate) fn epoch_candidate() -> u64 {
    (rand::random::<u64>() >> 11).max(1)
}

pub(crate) fn head(call: &mut Call, shard: Shard, user: &UserKey) {
    call.key(keys::head(shard, &user.app, &user.user));
}

pub(crate) fn queue(call: &mut Call, shard: Shard, user: &UserKey) {
    call.key(keys::queue(shard, &user.app, &user.user));
}

pub(crate) fn routes(call: &mut Call, shard: Shard, user: &UserKey) {
    call.key(keys::routes(shard, &user.app, &user.user));
}

pub(crate) fn session(call: &mut Call, session: &SessionRef) {
    call.arg(&session.node).arg(session.incarnation).arg(session.connection);
}

pub(crate) fn ttl_ms(config: &RedisConfig) -> u64 {
    config.ttl_seconds.min(TTL_SECONDS_MAX) * 1000
}

/// An entry as it is sent to devices. Redis stores header and body apart, with more bytes behind the header.
pub(crate) fn entry(header: &[u8], body: &[u8]) -> Bytes {
    let header = header.get(..envelope::HEADER_BYTES).unwrap_or(header);
    [header, body].concat().into()
}

/// Clamps a number to what scripts can hold, 2^53.
pub(crate) fn number(value: u64) -> u64 {
    value.min(1 << 53)
}

/// Reads three elements: node (may be empty), incarnation, connection.
pub(crate) fn read_session(reply: &mut Reply) -> Result<Option<SessionRef>, Error> {
    let node = reply.text()?;
    let (incarnation, connection) = (reply.number()?, reply.number()?);
    if node.is_empty() {
        return Ok(None);
    }
    let node = NodeId::new(&node).map_err(|e| Error::Unexpected(e.to_string()))?;
    Ok(Some(SessionRef {
        node,
        incarnation: Incarnation(incarnation),
        connection: ConnectionId(connection),
    }))
}

pub(crate) fn read_epoch(reply: &mut Reply) -> Result<Epoch, Error> {
    reply.number().map(Epoch)
}

/// Adds time to live, first backoff and jitter.
pub(crate) fn retry_args(config: &RedisConfig, call: &mut Call) {
    call.arg(ttl_ms(config)).arg(config.retry_base_ms).arg(config.retry_jitter);
}

/// Reads four elements: epoch, generation, seq, chain.
pub(crate) fn read_position(reply: &mut Reply) -> Result<Position, Error> {
    Ok(Position {
        epoch: read_epoch(reply)?,
        generation: Generation(reply.number_u32()?),
        seq: Seq(reply.number()?),
        chain: Some(Chain(reply.number_u32()?)),
    })
}
