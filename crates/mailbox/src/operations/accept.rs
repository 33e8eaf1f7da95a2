//! accept: groups of messages, in one call a slot.

use std::time::Instant;

use bytes::{BufMut as _, BytesMut};
use redis::Value;

use super::{entry, epoch_candidate, ttl_ms};
use crate::batcher::timed_reply;
use crate::reply::{Reply, bytes, unknown_tag};
use crate::scripts::{self, Call};
use crate::topology::Topology;
use crate::{
    AcceptGroup, AcceptMessage, AcceptOutcome, Error, GroupOutcome, LogPosition, RedisConfig, keys,
};
use barid_wire::envelope::HEADER_BYTES;

/// Fixed part of a message's packed arguments.
const PACKED_BYTES: usize = 30;

/// Accepts groups, one result each, in order. Groups of one shard share a call, so that they keep
/// their order; in a Redis Cluster each shard has its own.
pub(crate) async fn accept(
    topology: &Topology,
    groups: &[AcceptGroup],
) -> Vec<Result<GroupOutcome, Error>> {
    let indices: Vec<usize> = (0..groups.len()).collect();
    let calls = topology.calls(&indices, |index| groups[*index].shard);
    let sent = calls.iter().map(|indices| {
        let groups: Vec<&AcceptGroup> = indices.iter().map(|index| &groups[**index]).collect();
        async move { accept_call(topology, &groups).await }
    });
    let answers = futures::future::join_all(sent).await;
    let mut results: Vec<_> = groups.iter().map(|_| None).collect();
    for (indices, answer) in calls.into_iter().zip(answers) {
        for (index, result) in indices.into_iter().zip(answer) {
            results[*index] = Some(result);
        }
    }
    let missing = || Err(Error::Unexpected("a group was not answered".into()));
    results.into_iter().map(|result| result.unwrap_or_else(missing)).collect()
}

async fn accept_call(
    topology: &Topology,
    groups: &[&AcceptGroup],
) -> Vec<Result<GroupOutcome, Error>> {
    let (script, metrics) = (&scripts::ACCEPT, topology.metrics());
    let items = groups.iter().map(|group| group.messages.len()).sum();
    let timer = metrics.timer(script.name, items).start_timer();
    let reply = send(topology, groups).await;
    timer.observe_duration();
    let results: Vec<_> = match reply {
        Ok(mut reply) => groups
            .iter()
            .map(|group| reply.array().and_then(|reply| read_group(group, reply)))
            .collect(),
        Err(error) => groups.iter().map(|_| Err(error.clone())).collect(),
    };
    for result in &results {
        count(topology, result);
    }
    results
}

fn count(topology: &Topology, result: &Result<GroupOutcome, Error>) {
    let metrics = topology.metrics();
    match result {
        Ok(GroupOutcome::Gap(_)) => metrics.gaps.inc(),
        Ok(GroupOutcome::Done(outcomes)) => {
            for outcome in outcomes {
                match outcome {
                    AcceptOutcome::Accepted { evicted, .. } => {
                        metrics.evicted.inc_by(u64::from(*evicted));
                    }
                    AcceptOutcome::Failed(why) => {
                        metrics.failed(scripts::ACCEPT.name, &Error::Unexpected(why.clone()));
                    }
                    AcceptOutcome::AcceptedBefore | AcceptOutcome::Duplicate => {}
                }
            }
        }
        Err(error) => metrics.failed(scripts::ACCEPT.name, error),
    }
}

async fn send(topology: &Topology, groups: &[&AcceptGroup]) -> Result<Reply, Error> {
    let shard = groups[0].shard;
    let mut call = Call::default();
    shared(topology.config(), groups.len(), &mut call);
    for group in groups {
        encode_group(group, &mut call);
    }
    let sent = Instant::now();
    let value = topology.run(shard, &scripts::ACCEPT, &call).await?;
    timed_reply(value, topology.link(shard).clock(), sent)
}

fn shared(config: &RedisConfig, groups: usize, call: &mut Call) {
    call.arg(config.entries_max).arg(ttl_ms(config)).arg(config.retry_base_ms);
    call.arg(config.retry_jitter).arg(epoch_candidate()).arg(groups);
}

fn encode_group(group: &AcceptGroup, call: &mut Call) {
    call.key(keys::positions(group.shard)).key(keys::timers(group.shard));
    call.arg(format!("{}:{}", group.source.topic_id, group.source.partition));
    call.arg(u8::from(group.prev.is_some()));
    let none = LogPosition { leader_epoch: -1, offset: 0, index: 0 };
    let prev = group.prev.unwrap_or(none);
    call.arg(prev.leader_epoch).arg(prev.offset).arg(prev.index);
    call.arg(group.messages.len());
    for message in &group.messages {
        encode_message(group, message, call);
    }
}

fn encode_message(group: &AcceptGroup, message: &AcceptMessage, call: &mut Call) {
    let AcceptMessage { app, user, .. } = message;
    call.key(keys::head(group.shard, app, user));
    call.key(keys::queue(group.shard, app, user));
    call.key(keys::routes(group.shard, app, user));
    let member = keys::member(app, user);
    let collapse_key = message.collapse_key.as_deref().unwrap_or_default();
    let LogPosition { leader_epoch, offset, index } = message.position;
    let mut packed = BytesMut::with_capacity(PACKED_BYTES + member.len() + collapse_key.len());
    packed.put_i32_le(leader_epoch);
    packed.put_f64_le(offset as f64);
    packed.put_u32_le(index);
    packed.put_u64_le(message.id.ring);
    packed.put_u32_le(message.id.crc32);
    packed.put_u16_le(u16::try_from(member.len()).unwrap_or(u16::MAX)); // names are bounded
    packed.put_slice(member.as_bytes());
    packed.put_slice(collapse_key.as_bytes());
    call.bytes(message.body.clone()).bytes(packed.freeze());
}

fn read_group(group: &AcceptGroup, mut reply: Reply) -> Result<GroupOutcome, Error> {
    match reply.tag()? {
        b'G' => match reply.value()? {
            Value::Nil => Ok(GroupOutcome::Gap(None)),
            value => read_position(&bytes(value)?).map(|at| GroupOutcome::Gap(Some(at))),
        },
        b'D' => group
            .messages
            .iter()
            .map(|message| read_outcome(message, &reply.bytes()?))
            .collect::<Result<_, _>>()
            .map(GroupOutcome::Done),
        tag => Err(unknown_tag(tag)),
    }
}

/// `leader offset index`, as the script writes it.
fn read_position(text: &[u8]) -> Result<LogPosition, Error> {
    let parse = || {
        let mut parts = std::str::from_utf8(text).ok()?.split(' ');
        Some(LogPosition {
            leader_epoch: parts.next()?.parse().ok()?,
            offset: parts.next()?.parse().ok()?,
            index: parts.next()?.parse().ok()?,
        })
    };
    parse().ok_or_else(|| Error::Unexpected("a position that is none".into()))
}

fn read_outcome(message: &AcceptMessage, reply: &[u8]) -> Result<AcceptOutcome, Error> {
    match reply {
        [tag @ (b'A' | b'O'), rest @ ..] => read_accepted(message, rest, *tag == b'O')
            .ok_or_else(|| Error::Unexpected("an accepted message without its header".into())),
        b"B" => Ok(AcceptOutcome::AcceptedBefore),
        b"D" => Ok(AcceptOutcome::Duplicate),
        [b'F', why @ ..] => Ok(AcceptOutcome::Failed(String::from_utf8_lossy(why).into_owned())),
        _ => Err(Error::Unexpected("an outcome of no known kind".into())),
    }
}

/// The script answers the header alone; the body is ours.
fn read_accepted(message: &AcceptMessage, rest: &[u8], online: bool) -> Option<AcceptOutcome> {
    let (header, rest) = rest.split_first_chunk::<HEADER_BYTES>()?;
    let evicted = if rest.is_empty() { 0 } else { u32::from_le_bytes(*rest.first_chunk()?) };
    Some(AcceptOutcome::Accepted {
        seq: barid_wire::envelope::Header::parse(header).ok()?.seq,
        envelope: entry(header, &message.body),
        online,
        evicted,
    })
}
