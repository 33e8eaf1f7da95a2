//! connect, confirm and disconnect.

use std::time::Instant;

use barid_core::{Attempt, Position, Seq};

use crate::batcher::{Item, Operation};
use crate::encoding::{
    epoch_candidate, head, number, queue, read_epoch, read_position, read_session, retry_args,
    routes, session,
};
use crate::reply::{Reply, unknown_tag};
use crate::scripts::{self, Call, Script};
use crate::{
    ConfirmOutcome, ConfirmRequest, ConnectOutcome, ConnectRequest, DisconnectRequest, Error,
    RedisConfig, keys,
};

/// How long the attempt of an ended session refuses lower ones, ms. Longer than any call may be on its way.
const ATTEMPT_TTL_MS: u64 = 60_000;

/// `CREATES`: users of whom Redis holds nothing get a mailbox. Without it, the call is allowed when Redis is full.
pub(crate) struct Connect<const CREATES: bool>;

impl<const CREATES: bool> Operation for Connect<CREATES> {
    type Request = ConnectRequest;
    type Outcome = ConnectOutcome;

    fn script() -> &'static Script {
        if CREATES { &scripts::CONNECT } else { &scripts::CONNECT_KNOWN }
    }

    fn shared(config: &RedisConfig, call: &mut Call) {
        retry_args(config, call);
        call.arg(config.devices_max).arg(ATTEMPT_TTL_MS);
    }

    fn item(item: &Item<'_, ConnectRequest>, call: &mut Call) {
        let request = item.request;
        user_keys(item.shard, &request.user, call);
        call.arg(keys::member(&request.user.app, &request.user.user)).arg(&request.device);
        session(call, &request.session);
        call.arg(number(request.attempt.0)).arg(platform(&request.platform)).arg(deadline(item));
        call.arg(epoch_candidate());
        // A client that has never received anything names epoch 0.
        let position = request.position.filter(|position| position.epoch.0 != 0);
        call.arg(u8::from(position.is_some()));
        position_args(position.unwrap_or_default(), call);
        call.arg(u8::from(CREATES));
    }

    fn outcome(mut reply: Reply) -> Result<ConnectOutcome, Error> {
        match reply.tag()? {
            b'C' => {
                let cursor = read_position(&mut reply)?;
                Ok(ConnectOutcome::Connected {
                    cursor,
                    newest: Seq(reply.number()?),
                    reset: reply.number()? == 1,
                    replaced: read_session(&mut reply)?,
                    evicted: reply.number()? == 1,
                    created: reply.number()? == 1,
                })
            }
            b'N' => Ok(ConnectOutcome::NotCreated),
            b'S' => Ok(ConnectOutcome::Superseded { by: Attempt(reply.number()?) }),
            b'M' => Ok(ConnectOutcome::TooManyDevices),
            b'L' => Ok(ConnectOutcome::TooLate),
            tag => Err(unknown_tag(tag)),
        }
    }
}

/// The deadline in Redis's time, ms. Never 0, which means none: the clock is known once a link is ready.
fn deadline<R>(item: &Item<'_, R>) -> u64 {
    let left = item.deadline.saturating_duration_since(Instant::now()).as_millis() as u64;
    item.clock.at(Instant::now()).map_or(1, |now| now + left)
}

pub(crate) struct Confirm;

impl Operation for Confirm {
    type Request = ConfirmRequest;
    type Outcome = ConfirmOutcome;

    fn script() -> &'static Script {
        &scripts::CONFIRM
    }

    fn shared(config: &RedisConfig, call: &mut Call) {
        retry_args(config, call);
        call.arg(config.devices_max);
    }

    fn item(item: &Item<'_, ConfirmRequest>, call: &mut Call) {
        let request = item.request;
        user_keys(item.shard, &request.user, call);
        call.arg(keys::member(&request.user.app, &request.user.user)).arg(&request.device);
        session(call, &request.session);
        call.arg(number(request.attempt.0)).arg(platform(&request.platform)).arg(epoch_candidate());
        position_args(request.position, call);
    }

    fn outcome(mut reply: Reply) -> Result<ConfirmOutcome, Error> {
        match reply.tag()? {
            b'C' => Ok(ConfirmOutcome::Confirmed {
                restored: reply.number()? == 1,
                epoch: read_epoch(&mut reply)?,
                newest: Seq(reply.number()?),
            }),
            b'S' => Ok(ConfirmOutcome::Superseded),
            tag => Err(unknown_tag(tag)),
        }
    }
}

pub(crate) struct Disconnect;

impl Operation for Disconnect {
    type Request = DisconnectRequest;
    type Outcome = ();

    fn script() -> &'static Script {
        &scripts::DISCONNECT
    }

    fn shared(_config: &RedisConfig, _call: &mut Call) {}

    fn item(item: &Item<'_, DisconnectRequest>, call: &mut Call) {
        let request = item.request;
        head(call, item.shard, &request.user);
        routes(call, item.shard, &request.user);
        call.key(keys::timers(item.shard));
        call.arg(keys::member(&request.user.app, &request.user.user)).arg(&request.device);
        session(call, &request.session);
    }

    fn outcome(mut reply: Reply) -> Result<(), Error> {
        match reply.tag()? {
            b'R' | b'K' => Ok(()),
            tag => Err(unknown_tag(tag)),
        }
    }
}

/// Head, queue, routes, timers.
fn user_keys(shard: barid_core::Shard, user: &crate::UserKey, call: &mut Call) {
    head(call, shard, user);
    queue(call, shard, user);
    routes(call, shard, user);
    call.key(keys::timers(shard));
}

/// A route's fields are separated by spaces.
fn platform(text: &str) -> String {
    text.replace(char::is_whitespace, "-")
}

fn position_args(position: Position, call: &mut Call) {
    call.arg(number(position.epoch.0)).arg(position.generation).arg(number(position.seq.0));
    call.arg(position.chain.map_or_else(String::new, |chain| chain.to_string()));
}
