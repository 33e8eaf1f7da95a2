//! Keys, arguments and answers that several scripts have in common.

use barid_core::limits::TTL_SECONDS_MAX;
use barid_core::{
    Chain, ConnectionId, Epoch, Generation, Incarnation, NodeId, Position, Seq, SessionRef, Shard,
};
use barid_wire::envelope;
use bytes::Bytes;

use crate::reply::Reply;
use crate::scripts::Call;
use crate::{Error, RedisConfig, UserKey, keys};

/// A random epoch for a mailbox that has no head: below 2^53, not 0.
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

/// An entry as devices are sent it; Redis holds its two parts apart, and more behind the header.
pub(crate) fn entry(header: &[u8], body: &[u8]) -> Bytes {
    let header = header.get(..envelope::HEADER_BYTES).unwrap_or(header);
    [header, body].concat().into()
}

/// A number as the scripts take it: they hold whole numbers to 2^53.
pub(crate) fn number(value: u64) -> u64 {
    value.min(1 << 53)
}

/// Three elements: node, incarnation, connection.
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

/// Time to live, first backoff, jitter.
pub(crate) fn retry_args(config: &RedisConfig, call: &mut Call) {
    call.arg(ttl_ms(config)).arg(config.retry_base_ms).arg(config.retry_jitter);
}

/// Four elements: epoch, generation, seq, chain.
pub(crate) fn read_position(reply: &mut Reply) -> Result<Position, Error> {
    Ok(Position {
        epoch: read_epoch(reply)?,
        generation: Generation(reply.number_u32()?),
        seq: Seq(reply.number()?),
        chain: Some(Chain(reply.number_u32()?)),
    })
}
