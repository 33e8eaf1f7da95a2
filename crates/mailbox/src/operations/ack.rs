//! read, ack.

use barid_core::{Chain, Seq};

use super::sessions::{read_position, retry_args, user_keys};
use super::{epoch_candidate, head, queue, session};
use crate::batcher::{Item, Operation};
use crate::reply::{Reply, unexpected, unknown_tag};
use crate::scripts::{self, Call, Script};
use crate::{AckOutcome, AckRequest, Error, Page, ReadRequest, RedisConfig, keys};

pub(crate) struct Read;

impl Operation for Read {
    type Request = ReadRequest;
    type Outcome = Page;
    /// Pages are large: many in one reply would hold up everything behind it.
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
    }

    fn outcome(mut reply: Reply) -> Result<Page, Error> {
        let epoch = match reply.value()? {
            redis::Value::Int(epoch) => barid_core::Epoch(epoch as u64),
            redis::Value::BulkString(tag) if tag == b"E" => {
                return Err(Error::of_item(&reply.bytes()?));
            }
            other => return Err(unexpected("an epoch", &other)),
        };
        let oldest = Seq(reply.number()?);
        let chain_before_oldest = Chain(reply.number_u32()?);
        let newest = Seq(reply.number()?);
        let mut values = reply.array()?;
        let mut entries = Vec::new();
        while !values.is_empty() {
            entries.push(values.bytes()?);
        }
        Ok(Page { epoch, oldest, chain_before_oldest, newest, entries })
    }
}

pub(crate) struct Ack;

impl Operation for Ack {
    type Request = AckRequest;
    type Outcome = AckOutcome;

    fn script() -> &'static Script {
        &scripts::ACK
    }

    fn shared(config: &RedisConfig, call: &mut Call) {
        retry_args(config, call);
        call.arg(config.devices_max);
    }

    fn item(item: &Item<'_, AckRequest>, call: &mut Call) {
        let request = item.request;
        user_keys(item.shard, &request.user, call);
        call.arg(keys::member(&request.user.app, &request.user.user)).arg(&request.device);
        session(call, &request.session);
        call.arg(epoch_candidate());
        call.arg(request.epoch).arg(request.generation).arg(request.seq).arg(request.chain);
    }

    fn outcome(mut reply: Reply) -> Result<AckOutcome, Error> {
        match reply.tag()? {
            b'A' => Ok(AckOutcome::Advanced { cursor: Seq(reply.number()?) }),
            b'R' => Ok(AckOutcome::Reset { cursor: read_position(&mut reply)? }),
            b'S' => Ok(AckOutcome::Stale),
            tag => Err(unknown_tag(tag)),
        }
    }
}
