//! The rounds: one side and then the other is given the same messages.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use barid_wire::envelope::{self, Envelope, Header};
use bytes::Bytes;

use crate::Arguments;
use crate::barid::{self, Barid};
use crate::case::{Acked, Case, Message, Side};
use crate::floor::{self, Floor};
use crate::report::{Measure, Report, Sample};
use crate::server::{Server, Usage};

/// Rounds that are not measured: caches warm up, mailboxes fill.
pub const WARM_UP: u32 = 9;

/// Both servers with one batch size, all cases.
pub async fn run(arguments: &Arguments, batch: usize, report: &mut Report) -> Result<()> {
    for case in [Case::Offline, Case::OfflineFull, Case::Online, Case::Behind] {
        let mut floors = Server::start(arguments.append_only).await?;
        let mut barids = Server::start(arguments.append_only).await?;
        let config = barid::config(&floors.url(), batch, case);
        let mut floor = Floor::open(floors.connection(), config).await?;
        let mut barid = Barid::open(&barid::config(&barids.url(), batch, case)).await?;
        let users = arguments.users as usize;
        if case.is_online() {
            for server in [&floors, &barids] {
                let mailbox = barid::open(&barid::config(&server.url(), batch, case)).await?;
                barid::connect(&mailbox, case, users).await?;
            }
        }
        let (mut plan, mut measures) = (Plan::new(arguments, case, users), HashMap::new());
        for round in 0..WARM_UP + arguments.rounds {
            let messages = plan.round(batch);
            let of_floor = play(&mut floors, &mut floor, case, batch, &messages).await?;
            let of_barid = play(&mut barids, &mut barid, case, batch, &messages).await?;
            if round < WARM_UP {
                continue;
            }
            for (kind, floor, barid) in
                [("accept", of_floor.accept, of_barid.accept), ("ack", of_floor.ack, of_barid.ack)]
            {
                if let (Some(floor), Some(barid)) = (floor, barid) {
                    let measure = measures.entry(kind).or_insert_with(Measure::default);
                    measure.push(floor, barid);
                }
            }
        }
        same_is_left(&floors, &barids, case, users).await?;
        for kind in ["accept", "ack"] {
            // What is accepted in this case is what is accepted in others.
            if let Some(measure) =
                measures.remove(kind).filter(|_| (kind, case) != ("accept", Case::Behind))
            {
                report.add(kind, case, batch, &measure);
            }
        }
    }
    Ok(())
}

#[derive(Default)]
struct Played {
    accept: Option<Sample>,
    ack: Option<Sample>,
}

/// One round of one side. In [`Case::Behind`] the messages come twice: the first of two is
/// acknowledged, measured, and then the second.
async fn play(
    server: &mut Server,
    side: &mut impl Side,
    case: Case,
    batch: usize,
    messages: &[Message],
) -> Result<Played> {
    let mut acks = Vec::with_capacity(messages.len());
    let before = server.usage().await?;
    for batch in messages.chunks(batch) {
        let headers = side.accept(case, batch).await?;
        ensure!(headers.len() == batch.len(), "{} of {} accepted", headers.len(), batch.len());
        let acked = |(message, header): (&Message, Header)| Acked { user: message.user, header };
        acks.extend(batch.iter().zip(headers).map(acked));
    }
    let accepted = server.usage().await?;
    let accept = Some(sample(before, accepted, messages.len(), batch)?);
    if !case.is_online() {
        return Ok(Played { accept, ack: None });
    }
    let measured = if case == Case::Behind { acks.len() / 2 } else { acks.len() };
    for batch in acks[..measured].chunks(batch) {
        side.ack(case, batch).await?;
    }
    let ack = Some(sample(accepted, server.usage().await?, measured, batch)?);
    for batch in acks[measured..].chunks(batch) {
        side.ack(case, batch).await?;
    }
    Ok(Played { accept, ack })
}

/// Per message. Also: as many calls came as batches were meant.
fn sample(before: Usage, after: Usage, messages: usize, batch: usize) -> Result<Sample> {
    let (calls, meant) = (after.calls - before.calls, messages.div_ceil(batch) as f64);
    // The first call of a connection loads its script and comes again.
    ensure!(calls >= meant && calls <= meant + 1.0, "{calls} calls for {meant} batches");
    Ok(Sample {
        cpu_us: (after.cpu_us - before.cpu_us) / messages as f64,
        script_us: (after.script_us - before.script_us) / messages as f64,
    })
}

/// Deals the messages: every user one in a round, in an order that jumps about.
pub struct Plan {
    case: Case,
    users: usize,
    offset: i64,
    payload: Bytes,
    round: usize,
}

impl Plan {
    pub fn new(arguments: &Arguments, case: Case, users: usize) -> Self {
        let payload = Bytes::from(vec![b'x'; arguments.payload_bytes as usize]);
        Self { case, users, offset: 0, payload, round: 0 }
    }

    /// Whole batches only, no user twice in one.
    pub fn round(&mut self, batch: usize) -> Vec<Message> {
        self.round += 1;
        let count = self.users / batch * batch;
        // Any odd stride that shares no factor with the number of users visits all of them.
        let mut stride = (7_919 + 2 * self.round) % self.users;
        while gcd(stride.max(1), self.users) != 1 {
            stride += 1;
        }
        let times = if self.case == Case::Behind { 2 } else { 1 };
        let users = (0..times).flat_map(|_| 0..count).map(|i| (i * stride.max(1)) % self.users);
        users.collect::<Vec<_>>().into_iter().map(|user| self.message(user)).collect()
    }

    fn message(&mut self, user: usize) -> Message {
        self.offset += 1;
        let id = format!("message-{:08}", self.offset);
        let payload = self.payload.clone();
        let body =
            envelope::encode_body(Envelope { id: id.clone(), payload, ..Default::default() });
        Message { user, offset: self.offset, id, body }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The floor is only a floor if it leaves behind what Barid leaves.
async fn same_is_left(floor: &Server, barid: &Server, case: Case, users: usize) -> Result<()> {
    for user in (0..users).step_by(users.div_ceil(20)) {
        let left = [left(floor, case, user).await?, left(barid, case, user).await?];
        ensure!(left[0] == left[1], "of user {user} the floor leaves other things: {left:?}");
    }
    Ok(())
}

/// What is comparable of a user: all but epoch and times, and how long those are.
async fn left(server: &Server, case: Case, user: usize) -> Result<Vec<(String, Vec<u8>)>> {
    let mut connection = server.connection();
    let [head, queue, routes] = floor::keys(case, user)?;
    let fields: HashMap<String, Vec<u8>> =
        redis::cmd("HGETALL").arg(&head).query_async(&mut connection).await?;
    let mut left: Vec<_> = fields.into_iter().collect();
    for (field, value) in &mut left {
        // Epoch, times, and the bytes before the oldest entry, which the floor of ack does not look up.
        let other: &[std::ops::Range<usize>] = match field.as_str() {
            "s" => &[2..9, 29..41, 48..52],
            "d:phone" => &[16..22, 23..29],
            _ => &[],
        };
        for range in other {
            value[range.clone()].fill(0);
        }
    }
    let entries: Vec<Vec<u8>> =
        redis::cmd("LRANGE").arg(&queue).arg(0).arg(-1).query_async(&mut connection).await?;
    for mut entry in entries {
        if entry.len() == envelope::HEADER_BYTES + 4 {
            entry[1..9].fill(0);
            entry[29..37].fill(0);
        }
        left.push(("q".into(), entry));
    }
    for (what, command) in [("h", "PTTL"), ("q", "PTTL"), ("r", "HLEN")] {
        let key = match what {
            "h" => &head,
            "q" => &queue,
            _ => &routes,
        };
        let number: i64 = redis::cmd(command).arg(key).query_async(&mut connection).await?;
        left.push((what.into(), vec![u8::from(number > 0)]));
    }
    let timers: u64 = redis::cmd("ZCARD").arg("{0}:t").query_async(&mut connection).await?;
    left.push(("t".into(), timers.to_le_bytes().into()));
    left.sort();
    Ok(left)
}
