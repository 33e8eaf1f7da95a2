//! read and ack.

use std::time::Duration;

use barid_core::{Chain, DeviceId, Generation, Position, Seq, SessionRef};
use bytes::{BufMut as _, BytesMut};
use redis::Value;

use crate::batcher::{Item, Operation};
use crate::encoding::{
    entry, epoch_candidate, head, number, queue, read_position, retry_args, routes,
};
use crate::reply::{Reply, unexpected, unknown_tag};
use crate::scripts::{self, Call, Script};
use crate::{AckOutcome, AckRequest, Error, Page, ReadRequest, RedisConfig, keys};

pub(crate) struct Read;

impl Operation for Read {
    type Request = ReadRequest;
    type Outcome = Page;
    /// Pages are large: many in one reply would delay everything behind it.
    const ITEMS_MAX: usize = 16;

    fn script() -> &'static Script {
        &scripts::READ
    }

    fn shared(_config: &RedisConfig, _call: &mut Call) {}

    fn item(item: &Item<'_, ReadRequest>, call: &mut Call) {
        let request = item.request;
        head(call, item.shard, &request.user);
        queue(call, item.shard, &request.user);
        call.arg(request.after).arg(request.entries_max).arg(request.bytes_max);
        call.arg(request.device.as_ref().map_or("", DeviceId::as_str));
    }

    fn outcome(mut reply: Reply) -> Result<Page, Error> {
        let epoch = match reply.value()? {
            Value::Int(epoch) => barid_core::Epoch(epoch as u64),
            Value::BulkString(tag) if tag == b"E" => {
                return Err(Error::of_item(&reply.bytes()?));
            }
            Value::BulkString(tag) if tag == b"U" => return Err(Error::newer()),
            other => return Err(unexpected("an epoch", &other)),
        };
        let oldest = Seq(reply.number()?);
        let chain_before_oldest = Chain(reply.number_u32()?);
        let newest = Seq(reply.number()?);
        let mut values = reply.array()?;
        let mut entries = Vec::new();
        while !values.is_empty() {
            entries.push(entry(&values.bytes()?, &values.bytes()?));
        }
        let cursor = match (reply.value(), reply.value(), reply.value()) {
            (Ok(Value::Int(seq)), Ok(Value::Int(chain)), Ok(Value::Int(generation))) => {
                Some(Position {
                    epoch,
                    generation: Generation(generation as u32),
                    seq: Seq(seq as u64),
                    chain: Some(Chain(chain as u32)),
                })
            }
            _ => None,
        };
        Ok(Page { epoch, oldest, chain_before_oldest, newest, entries, cursor })
    }
}

pub(crate) struct Ack;

impl Operation for Ack {
    type Request = AckRequest;
    type Outcome = AckOutcome;

    fn linger(config: &RedisConfig) -> Duration {
        Duration::from_millis(config.ack_linger_ms)
    }

    fn script() -> &'static Script {
        &scripts::ACK
    }

    fn shared(config: &RedisConfig, call: &mut Call) {
        retry_args(config, call);
        call.arg(config.devices_max).arg(epoch_candidate());
    }

    fn item(item: &Item<'_, AckRequest>, call: &mut Call) {
        let AckRequest { user, device, session, epoch, generation, seq, chain } = item.request;
        head(call, item.shard, user);
        queue(call, item.shard, user);
        routes(call, item.shard, user);
        let timers = call.shared_key(item.shard, keys::timers);
        let mut packed = BytesMut::with_capacity(64);
        packed.put_u16_le(timers);
        packed.put_f64_le(number(epoch.0) as f64);
        packed.put_f64_le(number(seq.0) as f64);
        packed.put_u32_le(generation.0);
        packed.put_u32_le(chain.0);
        let SessionRef { node, incarnation, connection } = session;
        packed.put_slice(format!("{node} {incarnation} {connection} ").as_bytes());
        call.arg(keys::member(&user.app, &user.user)).arg(format!("d:{device}"));
        call.bytes(packed.freeze());
    }

    fn outcome(mut reply: Reply) -> Result<AckOutcome, Error> {
        if let Some(cursor) = reply.lone_number() {
            return Ok(AckOutcome::Advanced { cursor: Seq(cursor) });
        }
        match reply.tag()? {
            b'R' => Ok(AckOutcome::Reset { cursor: read_position(&mut reply)? }),
            b'S' => Ok(AckOutcome::Stale),
            tag => Err(unknown_tag(tag)),
        }
    }
}
