//! Rounds: both servers get the same messages, one server after the other.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use barid_testkit::redis::RedisOptions;
use barid_wire::envelope;

use crate::barid::{self, Barid};
use crate::floor::{self, Floor};
use crate::options::Options;
use crate::report::{Pairs, Report, Sample};
use crate::server::{Server, Usage};
use crate::workload::{Acked, Case, Message, Plan, Side};

/// Rounds that are not measured: caches warm up, mailboxes fill.
pub const WARM_UP: u32 = 9;

/// Measures all cases with one batch size.
pub async fn run(options: &Options, batch: usize, report: &mut Report) -> Result<()> {
    for case in Case::ALL {
        let redis = RedisOptions { append_only: options.append_only, ..Default::default() };
        let mut floors = Server::start(redis.clone()).await?;
        let mut barids = Server::start(redis).await?;
        let config = |server: &Server| barid::config(server.redis.url(), batch, case);
        let mut floor = Floor::open(floors.connection.clone(), config(&floors)).await?;
        let mut barid = Barid::open(&config(&barids)).await?;
        let users = options.users as usize;
        if case.is_online() {
            barid.connect(case, users).await?;
            Barid::open(&config(&floors)).await?.connect(case, users).await?;
        }
        let mut plan = Plan::new(options, case, users);
        let (mut accepts, mut acks) = (Pairs::default(), Pairs::default());
        for round in 0..WARM_UP + options.rounds {
            let messages = plan.round(batch);
            let of_floor = play(&mut floors, &mut floor, case, batch, &messages).await?;
            let of_barid = play(&mut barids, &mut barid, case, batch, &messages).await?;
            if round >= WARM_UP {
                accepts.push((of_floor.accept, of_barid.accept));
                acks.extend(of_floor.ack.zip(of_barid.ack));
            }
        }
        compare_state(&floors, &barids, case, users).await?;
        // Accept in this case is accept in the others.
        if case != Case::Behind {
            report.add("accept", case, batch, &accepts);
        }
        if case.is_online() {
            report.add("ack", case, batch, &acks);
        }
    }
    Ok(())
}

struct Played {
    accept: Sample,
    ack: Option<Sample>,
}

/// One round on one server. In [`Case::Behind`] each user has two messages: acknowledging the first one
/// is measured, acknowledging the second one is not.
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
        let acked = |(message, header): (&Message, _)| Acked { user: message.user, header };
        acks.extend(batch.iter().zip(headers).map(acked));
    }
    let accepted = server.usage().await?;
    let accept = sample(before, accepted, messages.len(), batch)?;
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

/// Usage per message. Fails unless there was one call per batch.
fn sample(before: Usage, after: Usage, messages: usize, batch: usize) -> Result<Sample> {
    let (calls, batches) = (after.calls - before.calls, messages.div_ceil(batch) as f64);
    // The first call on a connection loads its script and is repeated.
    ensure!(calls >= batches && calls <= batches + 1.0, "{calls} calls for {batches} batches");
    Ok(Sample {
        cpu_us: (after.cpu_us - before.cpu_us) / messages as f64,
        script_us: (after.script_us - before.script_us) / messages as f64,
    })
}

/// Fails unless both servers hold the same state: otherwise the floor does less than Barid.
async fn compare_state(floor: &Server, barid: &Server, case: Case, users: usize) -> Result<()> {
    for user in (0..users).step_by(users.div_ceil(20)) {
        let (floor, barid) = (state(floor, case, user).await?, state(barid, case, user).await?);
        ensure!(floor == barid, "state of user {user}: the floor {floor:?}, Barid {barid:?}");
    }
    Ok(())
}

/// A user's state without epoch and times, whose values differ between servers.
async fn state(server: &Server, case: Case, user: usize) -> Result<Vec<(String, Vec<u8>)>> {
    let mut connection = server.connection.clone();
    let [head, queue, routes] = floor::keys(case, user)?;
    let fields: HashMap<String, Vec<u8>> =
        redis::cmd("HGETALL").arg(&head).query_async(&mut connection).await?;
    let mut state: Vec<_> = fields.into_iter().collect();
    for (field, value) in &mut state {
        // Epoch, times, and the bytes before the oldest entry, which the floor of ack does not look up.
        let ignored: &[std::ops::Range<usize>] = match field.as_str() {
            "s" => &[2..9, 29..41, 48..52],
            "d:phone" => &[16..22, 23..29],
            _ => &[],
        };
        for range in ignored {
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
        state.push(("q".into(), entry));
    }
    for (what, command, key) in
        [("h", "PTTL", &head), ("q", "PTTL", &queue), ("r", "HLEN", &routes)]
    {
        let number: i64 = redis::cmd(command).arg(key).query_async(&mut connection).await?;
        state.push((what.into(), vec![u8::from(number > 0)]));
    }
    let timers: u64 = redis::cmd("ZCARD").arg("{0}:t").query_async(&mut connection).await?;
    state.push(("t".into(), timers.to_le_bytes().into()));
    state.sort();
    Ok(state)
}
