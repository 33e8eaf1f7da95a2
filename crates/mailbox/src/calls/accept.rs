//! accept: groups of messages, in one call per hash slot.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use barid_core::{Chain, Epoch, NodeId, Owner, Seq, Shard};
use barid_wire::envelope::Header;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use redis::Value;

use crate::config::AudienceBounds;
use crate::encoding::{entry, epoch_candidate, ttl_ms};
use crate::reply::{Reply, bytes, timed_reply, unknown_tag};
use crate::scripts::{self, Call};
use crate::topology::Topology;
use crate::{
    AcceptGroup, AcceptMessage, AcceptOutcome, Error, GroupOutcome, LogPosition, RedisConfig, keys,
};

/// Packed sizes of a group, a message, and a mailbox in the reply.
const GROUP_BYTES: usize = 57;
const MESSAGE_BYTES: usize = 29;
const MAILBOX_BYTES: usize = 24;
/// Packed size of an audience's bounds.
const BOUNDS_BYTES: usize = 24;

/// Accepts groups; returns one result per group, in order. Groups of one shard share a call, which keeps their order;
/// in a Redis Cluster each shard has a call of its own.
pub(crate) async fn accept(
    topology: &Topology,
    groups: &[AcceptGroup],
) -> Vec<Result<GroupOutcome, Error>> {
    let indices: Vec<usize> = (0..groups.len()).collect();
    let calls = topology.calls(&indices, |index| groups[*index].shard);
    if topology.config().wait_replicas > 0 {
        return accept_replicated(topology, groups, &calls).await;
    }
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

/// As [`accept`], with all calls to a master in one pipeline, followed by WAIT.
async fn accept_replicated(
    topology: &Topology,
    groups: &[AcceptGroup],
    calls: &[Vec<&usize>],
) -> Vec<Result<GroupOutcome, Error>> {
    let (script, metrics) = (&scripts::ACCEPT, topology.metrics());
    let mut results: Vec<Result<GroupOutcome, Error>> = Vec::with_capacity(groups.len());
    results.extend(groups.iter().map(|_| Err(out_of_order())));
    let mut asked: Vec<(&[&usize], Vec<ByOwner<'_>>)> = Vec::with_capacity(calls.len());
    for indices in calls {
        let of_call = indices.iter().map(|&&index| &groups[index]);
        let of_call: Vec<ByOwner<'_>> = of_call.map(ByOwner::new).collect();
        if of_call.iter().all(ByOwner::is_in_order) {
            asked.push((indices, of_call));
        }
    }
    let encoded: Vec<(Shard, Call)> = asked
        .iter()
        .map(|(_, groups)| (groups[0].group.shard, encode(topology.config(), groups)))
        .collect();
    let items = asked.iter().flat_map(|(_, groups)| groups).map(|of| of.group.messages.len()).sum();
    let sent = Instant::now();
    let timer = metrics.timer(script.name, items).start_timer();
    let values = topology.run_replicated(script, &encoded).await;
    timer.observe_duration();
    for ((indices, of_call), ((shard, _), value)) in asked.iter().zip(encoded.iter().zip(values)) {
        let reply = value.and_then(|v| timed_reply(v, topology.link(*shard).clock(), sent));
        for (index, result) in indices.iter().zip(read(of_call, reply)) {
            results[**index] = result;
        }
    }
    results.iter().for_each(|result| count(topology, result));
    results
}

fn out_of_order() -> Error {
    Error::Unexpected("a group is not in the log's order".into())
}

/// The result of each group of a call.
fn read(
    groups: &[ByOwner<'_>],
    reply: Result<(Reply, u64), Error>,
) -> Vec<Result<GroupOutcome, Error>> {
    match reply {
        Ok((mut reply, at_us)) => groups
            .iter()
            .map(|group| reply.array().and_then(|reply| read_group(group, reply, at_us)))
            .collect(),
        Err(error) => groups.iter().map(|_| Err(error.clone())).collect(),
    }
}

/// A group, and the indices of each owner's messages.
struct ByOwner<'a> {
    group: &'a AcceptGroup,
    owners: Vec<Vec<usize>>,
    has_audiences: bool,
}

async fn accept_call(
    topology: &Topology,
    groups: &[&AcceptGroup],
) -> Vec<Result<GroupOutcome, Error>> {
    let (script, metrics) = (&scripts::ACCEPT, topology.metrics());
    let items = groups.iter().map(|group| group.messages.len()).sum();
    let groups: Vec<ByOwner<'_>> = groups.iter().map(|&group| ByOwner::new(group)).collect();
    let timer = metrics.timer(script.name, items).start_timer();
    let reply = send(topology, &groups).await;
    timer.observe_duration();
    let results = read(&groups, reply);
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

/// Returns the reply and Redis's time in it, µs.
async fn send(topology: &Topology, groups: &[ByOwner<'_>]) -> Result<(Reply, u64), Error> {
    if !groups.iter().all(ByOwner::is_in_order) {
        return Err(out_of_order());
    }
    let shard = groups[0].group.shard;
    let call = encode(topology.config(), groups);
    let sent = Instant::now();
    let value = topology.run(shard, &scripts::ACCEPT, &call).await?;
    timed_reply(value, topology.link(shard).clock(), sent)
}

fn encode(config: &RedisConfig, groups: &[ByOwner<'_>]) -> Call {
    let mut call = Call::default();
    shared(config, groups.len(), &mut call);
    for group in groups {
        encode_group(group, config, &mut call);
    }
    call
}

fn is_for_audience(message: &AcceptMessage) -> bool {
    matches!(message.owner, Owner::Audience(_))
}

impl<'a> ByOwner<'a> {
    fn new(group: &'a AcceptGroup) -> Self {
        let has_audiences = group.messages.iter().any(is_for_audience);
        Self { group, owners: by_owner(&group.messages), has_audiences }
    }

    /// The first message of each owner.
    fn firsts(&self) -> impl Iterator<Item = &'a AcceptMessage> {
        self.owners.iter().map(|indices| &self.group.messages[indices[0]])
    }

    fn is_in_order(&self) -> bool {
        self.group.messages.is_sorted_by(|a, b| a.position < b.position)
    }
}

fn shared(config: &RedisConfig, groups: usize, call: &mut Call) {
    call.arg(config.entries_max).arg(config.mailbox_bytes_max).arg(ttl_ms(config));
    call.arg(config.retry_base_ms);
    call.arg(config.retry_jitter).arg(epoch_candidate());
    call.arg(config.keep_after_loss_seconds * 1000).arg(groups);
}

fn encode_group(by_owner: &ByOwner<'_>, config: &RedisConfig, call: &mut Call) {
    let ByOwner { group, owners, has_audiences } = by_owner;
    call.key(keys::positions(group.shard)).key(keys::timers(group.shard));
    call.key(keys::copies(group.shard));
    let messages = || owners.iter().flatten().map(|index| &group.messages[*index]);
    let collapse_keys = messages().filter(|m| m.collapse_key.is_some()).count();
    let arguments = 4 + owners.len() + group.messages.len() + collapse_keys;
    let none = LogPosition { leader_epoch: -1, offset: 0, index: 0 };
    let raise = group.raise.filter(|_| group.messages.is_empty());
    let position =
        |message: Option<&AcceptMessage>| message.map_or(raise.unwrap_or(none), |m| m.position);
    let mut packed = BytesMut::with_capacity(GROUP_BYTES);
    packed.put_u8(
        u8::from(group.prev.is_some())
            + 2 * u8::from(raise.is_some())
            + 4 * u8::from(*has_audiences),
    );
    put_position(&mut packed, group.prev.unwrap_or(none));
    put_position(&mut packed, position(group.messages.first()));
    put_position(&mut packed, position(group.messages.last()));
    put_count(&mut packed, owners.len());
    put_count(&mut packed, arguments);
    let mut counts = BytesMut::with_capacity(4 * owners.len());
    let mut metas = BytesMut::with_capacity(MESSAGE_BYTES * group.messages.len());
    for indices in owners {
        put_count(&mut counts, indices.len());
    }
    for message in messages() {
        metas.put_u64_le(message.id.ring);
        metas.put_u32_le(message.id.crc32);
        let has_key = u8::from(message.collapse_key.is_some());
        metas.put_u8(has_key + 2 * u8::from(is_for_audience(message)));
        put_position(&mut metas, message.position);
    }
    call.arg(format!("{}:{}", group.source.topic_id, group.source.partition));
    call.bytes(packed.freeze()).bytes(counts.freeze()).bytes(metas.freeze());
    for AcceptMessage { app, owner, .. } in by_owner.firsts() {
        for key in keys::of_owner(group.shard, app, owner) {
            call.key(key);
        }
        match owner {
            Owner::User(user) => call.arg(keys::member(app, user)),
            Owner::Audience(audience) => {
                let member = keys::audience_member(app, audience);
                call.bytes(pack_bounds(config.audience_bounds(audience), &member))
            }
        };
    }
    if *has_audiences {
        call.key(keys::journal(group.shard));
    }
    for message in messages() {
        call.bytes(message.body.clone());
        if let Some(key) = &message.collapse_key {
            call.arg(key);
        }
    }
}

/// Packed for the script, with the audience's member of the journal.
fn pack_bounds(
    AudienceBounds { entries_max, bytes_max, ttl_ms }: AudienceBounds,
    member: &str,
) -> Bytes {
    let mut packed = BytesMut::with_capacity(BOUNDS_BYTES + member.len());
    packed.put_f64_le(entries_max.into());
    packed.put_f64_le(bytes_max as f64);
    packed.put_f64_le(ttl_ms as f64);
    packed.put_slice(member.as_bytes());
    packed.freeze()
}

fn put_position(packed: &mut BytesMut, position: LogPosition) {
    packed.put_i32_le(position.leader_epoch);
    packed.put_f64_le(position.offset as f64);
    packed.put_u32_le(position.index);
}

fn put_count(packed: &mut BytesMut, count: usize) {
    packed.put_u32_le(u32::try_from(count).unwrap_or(u32::MAX)); // batches are far below
}

/// The indices of each owner's messages, in log order; owners in the order of their first messages.
fn by_owner(messages: &[AcceptMessage]) -> Vec<Vec<usize>> {
    let mut numbers = HashMap::with_capacity(messages.len());
    let mut owners: Vec<Vec<usize>> = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        let number = *numbers.entry((&message.app, &message.owner)).or_insert(owners.len());
        match owners.get_mut(number) {
            Some(indices) => indices.push(index),
            None => owners.push(vec![index]),
        }
    }
    owners
}

fn read_group(group: &ByOwner<'_>, mut reply: Reply, at_us: u64) -> Result<GroupOutcome, Error> {
    match reply.tag()? {
        b'G' => match reply.value()? {
            Value::Nil => Ok(GroupOutcome::Gap(None)),
            value => read_position(&bytes(value)?).map(|at| GroupOutcome::Gap(Some(at))),
        },
        b'D' => read_outcomes(group, reply, at_us).map(GroupOutcome::Done),
        b'U' => Err(Error::newer()),
        tag => Err(unknown_tag(tag)),
    }
}

/// The script returns the position before each mailbox's new entries; their headers follow from it. Before the
/// texts of failures come the nodes of each audience, if there is one.
fn read_outcomes(
    by_owner: &ByOwner<'_>,
    mut reply: Reply,
    at_us: u64,
) -> Result<Vec<AcceptOutcome>, Error> {
    let ByOwner { group, owners, has_audiences } = by_owner;
    let (letters, mailboxes) = (reply.bytes()?, reply.bytes()?);
    if letters.len() != group.messages.len() || mailboxes.len() != owners.len() * MAILBOX_BYTES {
        return Err(Error::Unexpected("accept returned another number of outcomes".into()));
    }
    let mut nodes = if *has_audiences { Some(reply.array()?) } else { None };
    let mut letters = letters.into_iter();
    let mut outcomes = vec![AcceptOutcome::Duplicate; group.messages.len()]; // each is set below
    for (indices, mailbox) in owners.iter().zip(mailboxes.chunks(MAILBOX_BYTES)) {
        let nodes = match &mut nodes {
            Some(nodes) if is_for_audience(&group.messages[indices[0]]) => {
                read_nodes(nodes.array()?)?
            }
            _ => Arc::default(),
        };
        let mut mailbox = Mailbox::read(mailbox, nodes);
        for (index, letter) in indices.iter().zip(letters.by_ref()) {
            let message = &group.messages[*index];
            outcomes[*index] = match letter {
                b'A' | b'O' => mailbox.append(message, letter == b'O', at_us),
                b'B' => AcceptOutcome::AcceptedBefore,
                b'D' => AcceptOutcome::Duplicate,
                b'F' => AcceptOutcome::Failed(String::from_utf8_lossy(&reply.bytes()?).into()),
                letter => return Err(unknown_tag(letter)),
            };
        }
    }
    Ok(outcomes)
}

/// Names that are not valid are left out: nothing else writes them.
fn read_nodes(mut names: Reply) -> Result<Arc<[NodeId]>, Error> {
    let mut nodes = Vec::new();
    while !names.is_empty() {
        nodes.extend(std::str::from_utf8(&names.bytes()?).ok().and_then(|n| NodeId::new(n).ok()));
    }
    Ok(nodes.into())
}

/// Position of a mailbox while its new entries' headers are derived.
struct Mailbox {
    epoch: Epoch,
    newest: Seq,
    chain: Chain,
    evicted: u32,
    nodes: Arc<[NodeId]>,
}

impl Mailbox {
    /// As the script packs it.
    fn read(mut packed: &[u8], nodes: Arc<[NodeId]>) -> Self {
        Self {
            nodes,
            epoch: Epoch(packed.try_get_f64_le().unwrap_or_default() as u64),
            newest: Seq(packed.try_get_f64_le().unwrap_or_default() as u64),
            chain: Chain(packed.try_get_u32_le().unwrap_or_default()),
            evicted: packed.try_get_u32_le().unwrap_or_default(),
        }
    }

    /// The next entry. Evicted entries are counted in the first outcome.
    fn append(&mut self, message: &AcceptMessage, online: bool, at_us: u64) -> AcceptOutcome {
        let header = Header {
            epoch: self.epoch,
            seq: self.newest.next(),
            prev_chain: self.chain,
            chain: self.chain.step(message.id.crc32),
            accepted_at_us: at_us,
        };
        (self.newest, self.chain) = (header.seq, header.chain);
        AcceptOutcome::Accepted {
            seq: header.seq,
            envelope: entry(&header.encode(), &message.body),
            online,
            nodes: Arc::clone(&self.nodes),
            evicted: std::mem::take(&mut self.evicted),
        }
    }
}

/// Parses `leader offset index`, as the script writes it.
fn read_position(text: &[u8]) -> Result<LogPosition, Error> {
    let parse = || {
        let mut parts = std::str::from_utf8(text).ok()?.split(' ');
        Some(LogPosition {
            leader_epoch: parts.next()?.parse().ok()?,
            offset: parts.next()?.parse().ok()?,
            index: parts.next()?.parse().ok()?,
        })
    };
    parse().ok_or_else(|| Error::Unexpected("malformed log position".into()))
}
