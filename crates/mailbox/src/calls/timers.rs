//! fire and defer: retry timers.

use std::time::Instant;

use barid_core::{Backoff, ConnectionId, DeviceId, Incarnation, NodeId, SessionRef, Shard};

use crate::dial::warn_sparingly;
use crate::encoding::{head, queue, routes};
use crate::reply::{Reply, timed_reply, unknown_tag};
use crate::scripts::{self, Call, Script};
use crate::topology::Topology;
use crate::{DeferRequest, DeferWaits, DueDevice, DueUser, Error, Unreached, UserKey, keys};

/// Claims up to `max` due users of these shards. An error of one call is returned only if no user was claimed.
pub(crate) async fn fire(
    topology: &Topology,
    shards: &[Shard],
    max: u32,
    retry: &Backoff,
    gone: &[(NodeId, Incarnation)],
) -> Result<Vec<DueUser>, Error> {
    let calls = topology.calls(shards, |shard| *shard);
    let gone: Vec<String> = gone.iter().map(|(node, life)| format!("{node} {life}")).collect();
    let gone = gone.join("\0");
    let sent = calls.iter().map(|shards| fire_call(topology, shards, max, retry, &gone));
    let mut due = Vec::new();
    let mut failure = None;
    for result in futures::future::join_all(sent).await {
        match result {
            Ok(mut users) => due.append(&mut users),
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) if due.is_empty() => Err(error),
        _ => Ok(due),
    }
}

async fn fire_call(
    topology: &Topology,
    shards: &[&Shard],
    max: u32,
    retry: &Backoff,
    gone: &str,
) -> Result<Vec<DueUser>, Error> {
    let candidates = candidates(topology, shards, max, retry).await?;
    if candidates.is_empty() {
        return Ok(Vec::new());
    }
    let mut call = Call::default();
    call.arg(retry.base().as_millis()).arg(retry.max().as_millis()).arg(retry.jitter());
    call.arg(gone);
    for (shard, user) in &candidates {
        head(&mut call, *shard, user);
        routes(&mut call, *shard, user);
        call.key(keys::timers(*shard)).arg(keys::member(&user.app, &user.user));
        queue(&mut call, *shard, user);
    }
    let mut replies = run(topology, *shards[0], &scripts::FIRE, &call, candidates.len()).await?;
    let mut due = Vec::new();
    for (_, user) in candidates {
        match replies.array().and_then(|reply| read_claim(user, reply)) {
            Ok(claim) => due.extend(claim),
            Err(error) => {
                topology.metrics().failed(scripts::FIRE.name, &error);
                warn_sparingly!(error, "due timer not claimed");
            }
        }
    }
    Ok(due)
}

/// Users who may be due: the script that claims must declare the keys that it touches.
async fn candidates(
    topology: &Topology,
    shards: &[&Shard],
    max: u32,
    retry: &Backoff,
) -> Result<Vec<(Shard, UserKey)>, Error> {
    let mut call = Call::default();
    call.arg(max).arg(retry.max().mul_f64(1.0 + retry.jitter()).as_millis());
    for shard in shards {
        call.key(keys::timers(**shard));
    }
    let mut replies = run(topology, *shards[0], &scripts::DUE, &call, shards.len()).await?;
    let mut candidates = Vec::new();
    for shard in shards {
        let mut members = replies.array()?;
        while !members.is_empty() {
            let member = members.text()?;
            match keys::parse_member(&member) {
                Some(user) => candidates.push((**shard, user)),
                None => tracing::warn!(?member, "retry timer has an invalid member"),
            }
        }
    }
    Ok(candidates)
}

fn read_claim(user: UserKey, mut reply: Reply) -> Result<Option<DueUser>, Error> {
    match reply.tag()? {
        b'N' => return Ok(None),
        b'C' => {}
        tag => return Err(unknown_tag(tag)),
    }
    let claimed_score = reply.number()?;
    let late_ms = reply.number()?;
    let put_off = reply.number_u32()?;
    let mut devices = Vec::new();
    while !reply.is_empty() {
        let name = |e: barid_core::InvalidName| Error::Unexpected(e.to_string());
        devices.push(DueDevice {
            device: DeviceId::new(&reply.text()?).map_err(name)?,
            session: SessionRef {
                node: NodeId::new(&reply.text()?).map_err(name)?,
                incarnation: Incarnation(reply.number()?),
                connection: ConnectionId(reply.number()?),
            },
            resends: reply.number_u32()?,
            sampled: reply.bytes()?,
        });
    }
    Ok(Some(DueUser { user, claimed_score, late_ms, put_off, devices }))
}

/// Defers claims. Those whose timer has moved since are left alone.
pub(crate) async fn defer(
    topology: &Topology,
    requests: &[DeferRequest],
    waits: DeferWaits,
    retry: &Backoff,
) -> Result<(), Error> {
    let calls = topology.calls(requests, |request| topology.shard_of(&request.user));
    let sent = calls.iter().map(|requests| defer_call(topology, requests, waits, retry));
    futures::future::join_all(sent).await.into_iter().collect()
}

async fn defer_call(
    topology: &Topology,
    requests: &[&DeferRequest],
    waits: DeferWaits,
    retry: &Backoff,
) -> Result<(), Error> {
    let mut call = Call::default();
    call.arg(waits.base_ms).arg(waits.full_ms).arg(retry.max().as_millis()).arg(retry.jitter());
    for request in requests {
        let shard = topology.shard_of(&request.user);
        head(&mut call, shard, &request.user);
        call.key(keys::timers(shard)).arg(keys::member(&request.user.app, &request.user.user));
        let devices: Vec<String> = request.devices.iter().map(deferred).collect();
        call.arg(request.claimed_score).arg(devices.join("\0"));
    }
    let shard = topology.shard_of(&requests[0].user);
    let mut replies = run(topology, shard, &scripts::DEFER, &call, requests.len()).await?;
    for _ in requests {
        if let Err(error) = replies.array().and_then(|mut reply| reply.tag()) {
            topology.metrics().failed(scripts::DEFER.name, &error);
            warn_sparingly!(error, "claimed timer not deferred");
        }
    }
    Ok(())
}

/// Runs a script with metrics; returns its reply without Redis's time.
async fn run(
    topology: &Topology,
    shard: Shard,
    script: &'static Script,
    call: &Call,
    items: usize,
) -> Result<Reply, Error> {
    let sent = Instant::now();
    let timer = topology.metrics().timer(script.name, items).start_timer();
    let value = topology.run(shard, script, call).await;
    timer.observe_duration();
    let value = value.inspect_err(|error| topology.metrics().failed(script.name, error))?;
    timed_reply(value, topology.link(shard).clock(), sent).map(|(reply, _)| reply)
}

/// A device after the letter of its reason.
fn deferred((device, why): &(DeviceId, Unreached)) -> String {
    let letter = match why {
        Unreached::Down => 'D',
        Unreached::Full => 'F',
        Unreached::Void => 'V',
        Unreached::Away => 'A',
    };
    format!("{letter}{device}")
}
