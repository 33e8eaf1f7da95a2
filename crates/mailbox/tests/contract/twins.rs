//! accept and ack have short paths for the usual case. Each must leave what the long path would leave: the same random
//! calls go to two sets of mailboxes, of which one meets a condition that short paths leave to the long ones.

use std::collections::BTreeMap;
use std::sync::Arc;

use barid_core::{Chain, Generation, Position, Seq};
use barid_mailbox::{AcceptMessage, AcceptOutcome, AckOutcome, GroupOutcome, UserKey};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use crate::support::{Bed, ack, contract, message};

contract!(
    short_paths_leave_what_long_ones_would,
    groups_of_single_new_messages_leave_what_other_groups_would
);

/// A flag without a meaning, which every version preserves.
const PLAIN_FLAG: u8 = 8;
const ENTRIES_MAX: u32 = 6;
/// Three large bodies are too much.
const MAILBOX_BYTES_MAX: u64 = 64 << 10;
const LARGE_BODY: usize = 25_000;
const RUNS: u64 = 12;
const STEPS: u32 = 100;
const DEVICES: [&str; 2] = ["phone", "tablet"];

/// One of the two mailboxes, and what its devices were told last.
struct Twin {
    user: UserKey,
    generations: BTreeMap<&'static str, Generation>,
}

/// A mailbox's content without times, epoch and flags.
#[derive(Debug, PartialEq)]
struct Held {
    fields: BTreeMap<String, Vec<u8>>,
    queue: Vec<Vec<u8>>,
    armed: bool,
}

impl Bed {
    async fn bounded(self) -> Self {
        self.with(|config| {
            config.entries_max = ENTRIES_MAX;
            config.mailbox_bytes_max = MAILBOX_BYTES_MAX;
        })
        .await
    }

    /// `name`: which of the two it is.
    fn twin(&self, name: &str) -> Twin {
        Twin { user: self.timed_user(name), generations: BTreeMap::new() }
    }
}

async fn short_paths_leave_what_long_ones_would(bed: Bed) {
    let bed = bed.bounded().await;
    for seed in 0..RUNS {
        let mut random = StdRng::seed_from_u64(seed);
        let [mut short, mut long] =
            ["short", "long"].map(|name| bed.twin(&format!("{name}-{seed}")));
        let mut steps = Vec::new();
        for n in 1..=STEPS {
            let step = Step::random(&mut random, seed, n);
            steps.push(step.clone());
            let answers = [short.take(&bed, &step).await, long.take(&bed, &step).await];
            assert_eq!(answers[0], answers[1], "seed {seed}: {steps:#?}");
            let held = [bed.held(&short.user).await, bed.held(&long.user).await];
            assert_eq!(held[0], held[1], "seed {seed}: {steps:#?}");
            bed.flag(&long.user).await;
        }
    }
}

/// accept takes three short cuts where all messages of a group are new, each is its user's only one, and none has a
/// collapse key. One group of each pair also has two messages of another user, who rules all of that out.
async fn groups_of_single_new_messages_leave_what_other_groups_would(bed: Bed) {
    let bed = bed.bounded().await;
    for seed in 0..RUNS {
        let mut random = StdRng::seed_from_u64(seed);
        let [short, long] = ["short", "long"].map(|name| {
            let twins = (0..4).map(|user| bed.twin(&format!("{name}-{seed}-{user}")));
            twins.collect::<Vec<_>>()
        });
        let other = bed.timed_user(&format!("other-{seed}"));
        for n in 1..=STEPS / 2 {
            if random.random_bool(0.1) {
                let user = random.random_range(0..short.len());
                for twin in [&short[user], &long[user]] {
                    bed.connect(&twin.user, DEVICES[0], n.into()).await;
                }
            }
            let at = i64::from(n) * 10;
            let mut users: Vec<usize> = (0..short.len()).collect();
            users.shuffle(&mut random);
            users.truncate(random.random_range(1..=users.len()));
            let sent: Vec<(usize, Sent)> = (at + 1..)
                .zip(users)
                .map(|(offset, user)| (user, Sent::random(&mut random, offset)))
                .collect();
            let messages = |twins: &[Twin]| -> Vec<AcceptMessage> {
                sent.iter().map(|(user, sent)| sent.message(&twins[*user].user)).collect()
            };
            // The first is passed from the second step on.
            let mut keyed = message(&other, at, &format!("m{n}"));
            keyed.collapse_key = Some("k".into());
            let others = vec![message(&other, at - 10, &format!("m{}", n - 1)), keyed];
            let mut answers = Vec::new();
            for (name, twins, others) in [("short", &short, vec![]), ("long", &long, others)] {
                let skipped = others.len();
                let messages = [others, messages(twins)].concat();
                let mut group = bed.group(messages, None);
                group.source.topic_id = format!("{name}-{}", other.user).into();
                let outcome = bed.mailbox.accept(&[group]).await.remove(0).unwrap();
                let GroupOutcome::Done(outcomes) = outcome else { panic!("{outcome:?}") };
                if skipped > 0 && n > 1 {
                    assert_eq!(outcomes[0], AcceptOutcome::AcceptedBefore, "seed {seed}, step {n}");
                }
                answers.push(told(outcomes.into_iter().skip(skipped)));
            }
            assert!(answers.iter().all(|it| *it == answers[0]), "seed {seed}: {answers:?}");
            for (short, long) in short.iter().zip(&long) {
                let held = [bed.held(&short.user).await, bed.held(&long.user).await];
                assert_eq!(held[0], held[1], "seed {seed}, step {n}: {sent:?}");
            }
        }
    }
}

/// A message.
#[derive(Debug, Clone)]
struct Sent {
    offset: i64,
    id: String,
    collapse_key: Option<Arc<str>>,
    is_large: bool,
}

impl Sent {
    fn random(random: &mut StdRng, offset: i64) -> Self {
        let id = format!("m{}", random.random_range(0..2 * STEPS));
        let key = random.random_bool(0.1).then(|| random.random_range(0..3));
        let collapse_key = key.map(|key| format!("k{key}").into());
        Self { offset, id, collapse_key, is_large: random.random_bool(0.15) }
    }

    fn message(&self, user: &UserKey) -> AcceptMessage {
        let mut message = message(user, self.offset, &self.id);
        message.collapse_key.clone_from(&self.collapse_key);
        if self.is_large {
            message.body = vec![b'x'; LARGE_BODY].into();
        }
        message
    }
}

/// Outcomes of messages as text, without the epoch.
fn told(outcomes: impl IntoIterator<Item = AcceptOutcome>) -> String {
    let told = outcomes.into_iter().map(|outcome| match outcome {
        AcceptOutcome::Accepted { seq, online, evicted, .. } => {
            format!("{} {online} {evicted}", seq.0)
        }
        other => format!("{other:?}"),
    });
    told.collect::<Vec<_>>().join(", ")
}

#[derive(Debug, Clone)]
enum Step {
    Accept(Vec<Sent>),
    /// A device acknowledges this share of the entries, in sixteenths; 17 is a position beyond the newest. The
    /// generation is the device's own, the one before or the next.
    Ack {
        device: &'static str,
        share: u64,
        forked: bool,
        generation: i32,
    },
    /// A device connects, and may name a position as in `Ack`.
    Connect {
        device: &'static str,
        attempt: u64,
        share: Option<u64>,
    },
    Disconnect {
        device: &'static str,
        attempt: u64,
    },
}

impl Step {
    fn random(random: &mut StdRng, seed: u64, n: u32) -> Self {
        // One device mostly: that is what short paths are for.
        let device = DEVICES[usize::from(random.random_bool(0.1))];
        let attempt = n.into();
        // Every third user has no device: collapse keys stay until 64 positions have passed.
        let steps = if seed.is_multiple_of(3) { 5 } else { 10 };
        match random.random_range(0..steps) {
            0..5 => {
                let count = if random.random_bool(0.8) { 1 } else { 3 };
                let first = i64::try_from(seed).unwrap() * 1_000 + i64::from(n * 8);
                let messages = (0..count).map(|at| Sent::random(random, first + at));
                Self::Accept(messages.collect())
            }
            5..9 => {
                let share = [16, random.random_range(0..=17)][random.random_range(0..2)];
                let generation = [0, 0, 0, 0, 0, 0, 0, 0, -1, 1][random.random_range(0..10)];
                Self::Ack { device, share, forked: random.random_bool(0.15), generation }
            }
            _ if random.random_bool(0.7) => {
                let share = random.random_bool(0.5).then(|| random.random_range(0..=16));
                Self::Connect { device, attempt, share }
            }
            _ => Self::Disconnect { device, attempt },
        }
    }
}

impl Twin {
    /// The position after this share, in sixteenths: of all entries, or if it is odd, of the stored ones.
    async fn position(&self, bed: &Bed, share: u64) -> Position {
        let page = bed.page(&self.user, 0).await;
        let before = if share.is_multiple_of(2) { 0 } else { page.oldest.0 - 1 };
        let seq = before + (page.newest.0 - before) * share / 16;
        bed.position(&self.user, seq).await
    }

    /// Does a step; returns what was answered, without the epoch.
    async fn take(&mut self, bed: &Bed, step: &Step) -> String {
        match step {
            Step::Accept(messages) => {
                let messages = messages.iter().map(|sent| sent.message(&self.user)).collect();
                let mut group = bed.group(messages, None);
                group.source.topic_id = self.user.user.as_str().into();
                match bed.mailbox.accept(&[group]).await.remove(0).unwrap() {
                    GroupOutcome::Done(outcomes) => told(outcomes),
                    gap => format!("{gap:?}"),
                }
            }
            Step::Ack { device, share, forked, generation } => {
                let mut at = self.position(bed, *share).await;
                let own = self.generations.get(device).copied().unwrap_or(Generation(0));
                at.generation = Generation(own.0.saturating_add_signed(*generation));
                if *forked {
                    at.chain = Some(Chain(7));
                }
                match bed.mailbox.ack(ack(&self.user, device, 1, at)).await.unwrap() {
                    AckOutcome::Reset { cursor } => {
                        self.generations.insert(device, cursor.generation);
                        format!("reset {}", without_epoch(cursor))
                    }
                    other => format!("{other:?}"),
                }
            }
            Step::Connect { device, attempt, share } => {
                let connected = match share {
                    Some(share) => {
                        let position = self.position(bed, *share).await;
                        bed.resume(&self.user, device, *attempt, position).await
                    }
                    None => bed.connect(&self.user, device, *attempt).await,
                };
                self.generations.insert(device, connected.cursor.generation);
                format!("{} {}", without_epoch(connected.cursor), connected.newest.0)
            }
            Step::Disconnect { device, attempt } => {
                bed.disconnect(&self.user, device, *attempt - 1).await;
                String::new()
            }
        }
    }
}

fn without_epoch(position: Position) -> String {
    let Position { generation, seq: Seq(seq), chain, .. } = position;
    format!("{generation:?} {seq} {chain:?}")
}

impl Bed {
    /// Sets a plain flag on the state and on each device.
    async fn flag(&self, user: &UserKey) {
        let script = "for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
              if field == 's' or string.sub(field, 1, 2) == 'd:' then
                local text = redis.call('HGET', KEYS[1], field)
                redis.call('HSET', KEYS[1], field,
                  string.sub(text, 1, 1) .. string.char(ARGV[1]) .. string.sub(text, 3))
              end
            end
            return 'OK'";
        let flag = PLAIN_FLAG.to_string();
        let () = self.query(&["EVAL", script, "1", &self.key("h", user), &flag]).await;
    }

    async fn held(&self, user: &UserKey) -> Held {
        let head: BTreeMap<String, Vec<u8>> = self.query(&["HGETALL", &self.key("h", user)]).await;
        let fields = head.into_iter().map(|(name, bytes)| {
            let bytes = match name.as_str() {
                // After mark and epoch; expires_at and age_check_at are times.
                "s" => [&bytes[9..29], &bytes[41..]].concat(),
                // After the mark; due_at and used_at are times.
                name if name.starts_with("d:") => {
                    let due = bytes[16..22].iter().any(|byte| *byte > 0);
                    [&bytes[2..16], &[due.into()], &bytes[22..23], &bytes[29..]].concat()
                }
                _ => bytes,
            };
            (name, bytes)
        });
        let fields = fields.collect();
        let queue: Vec<Vec<u8>> = self.query(&["LRANGE", &self.key("q", user), "0", "-1"]).await;
        let queue = queue.into_iter().enumerate().map(|(at, bytes)| match at % 2 {
            // A header: after its epoch, and without its time.
            0 => [&bytes[9..29], &bytes[37..]].concat(),
            _ => bytes,
        });
        Held { fields, queue: queue.collect(), armed: self.timer(user).await.is_some() }
    }
}
