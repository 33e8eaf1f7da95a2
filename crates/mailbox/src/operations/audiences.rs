//! join, read of an audience's mailbox, and the journal.

use barid_core::{Chain, Generation, Position, Seq};

use crate::batcher::{Item, Operation};
use crate::encoding::{number, read_epoch};
use crate::operations::ack::Read;
use crate::reply::{Reply, unknown_tag};
use crate::scripts::{self, Call, Script};
use crate::{
    AudienceReadRequest, Error, JoinOutcome, JoinRequest, Journal, JournalRequest, Page,
    RedisConfig, keys,
};

pub(crate) struct Join;

impl Operation for Join {
    type Request = JoinRequest;
    type Outcome = JoinOutcome;

    fn script() -> &'static Script {
        &scripts::JOIN
    }

    fn shared(config: &RedisConfig, call: &mut Call) {
        call.arg(config.audience_lease_seconds * 1000);
    }

    fn item(item: &Item<'_, JoinRequest>, call: &mut Call) {
        let JoinRequest { audience, node, incarnation, number: of_request, has_members } =
            item.request;
        let (shard, app, audience) = (item.shard, &audience.app, &audience.audience);
        call.key(keys::audience_nodes(shard, app, audience));
        call.key(keys::audience_head(shard, app, audience));
        call.key(keys::audience_queue(shard, app, audience));
        call.arg(node).arg(number(incarnation.0)).arg(number(*of_request));
        call.arg(u8::from(*has_members));
    }

    fn outcome(mut reply: Reply) -> Result<JoinOutcome, Error> {
        match reply.tag()? {
            b'J' => {
                let newest = Position {
                    epoch: read_epoch(&mut reply)?,
                    generation: Generation::default(),
                    seq: Seq(reply.number()?),
                    chain: Some(Chain(reply.number_u32()?)),
                };
                Ok(JoinOutcome::Joined { newest, oldest: Seq(reply.number()?) })
            }
            b'S' => Ok(JoinOutcome::Superseded),
            tag => Err(unknown_tag(tag)),
        }
    }
}

pub(crate) struct ReadAudience;

impl Operation for ReadAudience {
    type Request = AudienceReadRequest;
    type Outcome = Page;
    const ITEMS_MAX: usize = Read::ITEMS_MAX;

    fn script() -> &'static Script {
        &scripts::READ
    }

    fn shared(_config: &RedisConfig, _call: &mut Call) {}

    fn item(item: &Item<'_, AudienceReadRequest>, call: &mut Call) {
        let AudienceReadRequest { audience, after, entries_max, bytes_max } = item.request;
        call.key(keys::audience_head(item.shard, &audience.app, &audience.audience));
        call.key(keys::audience_queue(item.shard, &audience.app, &audience.audience));
        call.arg(after).arg(entries_max).arg(bytes_max).arg("");
    }

    fn outcome(reply: Reply) -> Result<Page, Error> {
        Read::outcome(reply)
    }
}

pub(crate) struct ReadJournal;

impl Operation for ReadJournal {
    type Request = JournalRequest;
    type Outcome = Journal;

    fn script() -> &'static Script {
        &scripts::JOURNAL
    }

    fn shared(_config: &RedisConfig, _call: &mut Call) {}

    fn item(item: &Item<'_, JournalRequest>, call: &mut Call) {
        call.key(keys::journal(item.shard));
        call.arg(number(item.request.after)).arg(item.request.audiences_max);
    }

    fn outcome(mut reply: Reply) -> Result<Journal, Error> {
        match reply.tag()? {
            b'N' => {
                let (trimmed, highest) = (reply.number()?, reply.number()?);
                let mut changed = Vec::new();
                while !reply.is_empty() {
                    let (member, number) = (reply.text()?, reply.number()?);
                    changed.extend(keys::parse_audience_member(&member).map(|key| (key, number)));
                }
                Ok(Journal { trimmed, highest, changed })
            }
            tag => Err(unknown_tag(tag)),
        }
    }
}
