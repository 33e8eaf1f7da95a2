//! accept and ack have short paths for the usual case. Each must leave what the long path would: the same random
//! calls go to two mailboxes, one of which has a plain flag that short paths leave to the long ones.

use std::collections::BTreeMap;
use std::sync::Arc;

use barid_core::{Chain, Generation, Position, Seq};
use barid_mailbox::{AcceptOutcome, AckOutcome, UserKey};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::support::{Bed, ack, contract, message};

contract!(short_paths_leave_what_long_ones_would);

/// A flag of no meaning that every version keeps.
const PLAIN_FLAG: u8 = 8;
const ENTRIES_MAX: u32 = 6;
const RUNS: u64 = 12;
const STEPS: u32 = 60;
const DEVICES: [&str; 2] = ["phone", "tablet"];

/// One of the two mailboxes, and what its devices were told last.
struct Twin {
    user: UserKey,
    generations: BTreeMap<&'static str, Generation>,
}

/// What a mailbox holds, without times, its epoch and flags.
#[derive(Debug, PartialEq)]
struct Held {
    fields: BTreeMap<String, Vec<u8>>,
    queue: Vec<Vec<u8>>,
    armed: bool,
}

async fn short_paths_leave_what_long_ones_would(bed: Bed) {
    let bed = bed.with(|config| config.entries_max = ENTRIES_MAX).await;
    for seed in 0..RUNS {
        let mut random = StdRng::seed_from_u64(seed);
        let [mut short, mut long] = ["short", "long"].map(|name| Twin {
            user: bed.timed_user(&format!("{name}-{seed}")),
            generations: BTreeMap::new(),
        });
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

#[derive(Debug, Clone)]
enum Step {
    /// Offset, id and collapse key of each message.
    Accept(Vec<(i64, String, Option<Arc<str>>)>),
    /// A device acknowledges this share of the entries, in sixteenths; 17 is a position beyond the newest.
    Ack {
        device: &'static str,
        share: u64,
        forked: bool,
    },
    Connect {
        device: &'static str,
        attempt: u64,
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
        match random.random_range(0..10) {
            0..5 => {
                let count = if random.random_bool(0.8) { 1 } else { 3 };
                let messages = (0..count).map(|at| {
                    let id = format!("m{}", random.random_range(0..2 * STEPS));
                    let key = random.random_bool(0.1).then(|| format!("k{}", n % 3).into());
                    (i64::try_from(seed).unwrap() * 1_000 + i64::from(n * 8 + at), id, key)
                });
                Self::Accept(messages.collect())
            }
            5..9 => {
                let share = [16, 16, random.random_range(0..=17)][random.random_range(0..3)];
                Self::Ack { device, share, forked: random.random_bool(0.05) }
            }
            _ if random.random_bool(0.7) => Self::Connect { device, attempt },
            _ => Self::Disconnect { device, attempt },
        }
    }
}

impl Twin {
    /// Does a step; returns what was answered, without the epoch.
    async fn take(&mut self, bed: &Bed, step: &Step) -> String {
        match step {
            Step::Accept(messages) => {
                let messages = messages.iter().map(|(offset, id, key)| {
                    let mut message = message(&self.user, *offset, id);
                    message.collapse_key.clone_from(key);
                    message
                });
                let mut group = bed.group(messages.collect(), None);
                group.source.topic_id = self.user.user.as_str().into();
                let outcome = bed.mailbox.accept(&[group]).await.remove(0).unwrap();
                let barid_mailbox::GroupOutcome::Done(outcomes) = outcome else {
                    return format!("{outcome:?}");
                };
                let told = outcomes.into_iter().map(|outcome| match outcome {
                    AcceptOutcome::Accepted { seq, online, evicted, .. } => {
                        format!("{} {online} {evicted}", seq.0)
                    }
                    other => format!("{other:?}"),
                });
                told.collect::<Vec<_>>().join(", ")
            }
            Step::Ack { device, share, forked } => {
                let page = bed.page(&self.user, 0).await;
                let seq = page.newest.0 * share / 16;
                let mut at = bed.position(&self.user, seq).await;
                at.generation = self.generations.get(device).copied().unwrap_or(Generation(0));
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
            Step::Connect { device, attempt } => {
                let connected = bed.connect(&self.user, device, *attempt).await;
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
                // Behind mark and epoch; x and ct are times.
                "s" => [&bytes[9..29], &bytes[41..]].concat(),
                // Behind the mark; when it is due and was used are times.
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
            // A header: behind its epoch, and without its time.
            0 => [&bytes[9..29], &bytes[37..]].concat(),
            _ => bytes,
        });
        Held { fields, queue: queue.collect(), armed: self.timer(user).await.is_some() }
    }
}
