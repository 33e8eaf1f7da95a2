//! Computes a sample from the last scrapes of all endpoints.

use std::collections::{BTreeMap, VecDeque};

use barid_mailbox::{NodeRecord, NodeRole};
use barid_runtime as runtime;
use barid_runtime::exposition::{Histogram, Metrics};
use serde::Serialize;

use super::scrape::Scrape;
use crate::output::span;
use crate::values;

/// Time before the end of a certificate from which on it is a problem, s.
const EXPIRES_SOON_S: f64 = 14.0 * 86_400.0;
/// Scrapes kept for each endpoint. Latencies are computed between the first and the last.
const LOOKS: usize = 11;

/// One screen of `barid top`.
#[derive(Debug, Serialize)]
pub struct Sample {
    pub event: &'static str,
    pub at_ms: u64,
    pub rates: Rates,
    pub hops: Vec<Hop>,
    pub lags: Lags,
    pub roles: Vec<RoleState>,
    pub nodes: Vec<NodeState>,
    pub sessions: Sessions,
    pub problems: Vec<Problem>,
}

/// Welcomed sessions by what they name, as access nodes export it; names without a session are left out.
#[derive(Debug, Default, Serialize)]
pub struct Sessions {
    pub by_app: BTreeMap<String, u64>,
    pub by_platform: BTreeMap<String, u64>,
    pub by_sdk: BTreeMap<String, u64>,
}

/// Messages per second since the previous scrape.
#[derive(Debug, Default, Serialize)]
pub struct Rates {
    pub taken_per_s: f64,
    pub accepted_per_s: f64,
    pub written_per_s: f64,
    pub acked_per_s: f64,
    pub resent_per_s: f64,
    pub refused_per_s: f64,
}

/// The latency of one hop in the last seconds.
#[derive(Debug, Serialize)]
pub struct Hop {
    pub hop: String,
    pub count: u64,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    /// There were none in the last seconds: these are all since the roles started.
    pub since_start: bool,
}

/// Messages and timers that wait.
#[derive(Debug, Default, Serialize)]
pub struct Lags {
    pub kafka_records: u64,
    pub in_flight_records: u64,
    /// How late the timers were that were claimed last.
    pub timers_late_ms: u64,
    pub timers_claimed: u64,
    pub queued_bytes: u64,
    pub shards_away: u64,
}

/// A process.
#[derive(Debug, Serialize)]
pub struct RoleState {
    pub role: String,
    pub admin: String,
    pub ready: bool,
    /// Percent of one core.
    pub cpu_percent: f64,
    pub memory_bytes: u64,
    /// Process id; 0: unknown.
    pub process_id: u64,
    /// A purger's partitions by topic; empty for other roles.
    pub partitions: BTreeMap<String, u64>,
}

/// A lease.
#[derive(Debug, Serialize)]
pub struct NodeState {
    pub node: String,
    pub role: &'static str,
    pub state: &'static str,
    pub sessions: u64,
    pub address: String,
    pub zone: String,
}

/// A problem.
#[derive(Debug, Serialize)]
pub struct Problem {
    /// The endpoint, the role, or `leases`.
    pub of: String,
    pub problem: String,
}

/// Keeps the last scrapes.
#[derive(Default)]
pub struct Memory {
    looks: BTreeMap<String, VecDeque<Scrape>>,
}

/// Two scrapes of an endpoint.
struct Pair<'a> {
    now: &'a Scrape,
    before: Option<&'a Scrape>,
}

impl Pair<'_> {
    /// The growth of a counter per second.
    fn rate(&self, of: impl Fn(&Metrics) -> f64) -> f64 {
        let Some(before) = self.before else { return 0.0 };
        let (now, then) = (of(&self.now.metrics), of(&before.metrics));
        let seconds = (self.now.at - before.at).as_secs_f64();
        // The counters of a restarted process begin at zero.
        let grown = if now >= then { now - then } else { now };
        if seconds > 0.0 { grown / seconds } else { 0.0 }
    }
}

impl RoleState {
    /// Whether both run in one process.
    pub fn shares_a_process_with(&self, other: &Self) -> bool {
        let host = |role: &Self| role.admin.rsplit_once(':').map(|(host, _)| host.to_owned());
        self.process_id != 0 && self.process_id == other.process_id && host(self) == host(other)
    }
}

impl Sample {
    /// The number of processes.
    pub fn processes(&self) -> usize {
        let is_first = |(at, role): &(usize, &RoleState)| {
            !self.roles[..*at].iter().any(|other| other.shares_a_process_with(role))
        };
        self.roles.iter().enumerate().filter(is_first).count()
    }
}

impl Memory {
    /// Adds a scrape of every endpoint, and computes a sample.
    pub fn take(
        &mut self,
        looks: Vec<(String, anyhow::Result<Scrape>)>,
        nodes: Result<Vec<NodeRecord>, String>,
    ) -> Sample {
        let mut problems = Vec::new();
        self.looks.retain(|known, _| looks.iter().any(|(address, _)| address == known));
        for (address, look) in looks {
            match look {
                Ok(scrape) => {
                    let kept = self.looks.entry(address).or_default();
                    kept.truncate(LOOKS - 1);
                    kept.push_front(scrape);
                }
                Err(error) => {
                    self.looks.remove(&address);
                    problems.push(Problem { of: address, problem: format!("{error:#}") });
                }
            }
        }
        let (nodes, unread) = match nodes {
            Ok(nodes) => (nodes, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        problems.extend(unread.map(|problem| Problem { of: "leases".into(), problem }));
        let lags = self.lags();
        problems.extend(self.not_ready());
        problems.extend(self.expiring(values::now_ms()));
        if lags.shards_away > 0 {
            let problem = format!("{} shards are unavailable", lags.shards_away);
            problems.push(Problem { of: "purger".into(), problem });
        }
        Sample {
            event: "sample",
            at_ms: values::now_ms(),
            rates: self.rates(),
            hops: self.hops(),
            lags,
            roles: self.roles(),
            nodes: nodes.iter().map(node).collect(),
            sessions: self.sessions(),
            problems,
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (&String, Pair<'_>)> {
        self.looks.iter().filter_map(|(address, looks)| {
            Some((address, Pair { now: looks.front()?, before: looks.get(1) }))
        })
    }

    fn rates(&self) -> Rates {
        let rate = |of: &dyn Fn(&Metrics) -> f64| self.pairs().map(|(_, pair)| pair.rate(of)).sum();
        let sum = |name: &'static str| rate(&move |metrics| metrics.sum(name));
        Rates {
            taken_per_s: sum("barid_purger_records_taken_total"),
            accepted_per_s: rate(&|m| {
                m.sum_of("barid_purger_messages_total", "outcome", "accepted")
            }),
            written_per_s: sum("barid_access_delivered_total"),
            acked_per_s: sum("barid_access_acked_total"),
            resent_per_s: sum("barid_access_resends_total"),
            refused_per_s: sum("barid_purger_records_refused_total"),
        }
    }

    fn hops(&self) -> Vec<Hop> {
        let mut recent: BTreeMap<String, Histogram> = BTreeMap::new();
        let mut all = recent.clone();
        for looks in self.looks.values() {
            let (Some(now), Some(then)) = (looks.front(), looks.back()) else { continue };
            let mut before = then.metrics.histograms(runtime::Hops::FAMILY, "hop");
            for (hop, histogram) in now.metrics.histograms(runtime::Hops::FAMILY, "hop") {
                let since = histogram.since(&before.remove(&hop).unwrap_or_default());
                recent.entry(hop.clone()).or_default().add(&since);
                all.entry(hop).or_default().add(&histogram);
            }
        }
        let hops = recent.into_iter().map(|(name, recent)| {
            let since_start = recent.count() == 0.0;
            let of = if since_start { all.remove(&name).unwrap_or_default() } else { recent };
            let ms = |share| of.quantile(share).map(|seconds| round(seconds * 1e3, 1e3));
            let (p50_ms, p99_ms) = (ms(0.5), ms(0.99));
            Hop { hop: name, count: of.count() as u64, p50_ms, p99_ms, since_start }
        });
        let mut hops: Vec<Hop> = hops.collect();
        // Unknown hops come last.
        let all = runtime::Hop::ALL;
        let place = |hop: &Hop| all.iter().position(|known| known.as_str() == hop.hop);
        hops.sort_by_key(|hop| place(hop).unwrap_or(all.len()));
        hops
    }

    fn lags(&self) -> Lags {
        let sum = |name| self.pairs().map(|(_, pair)| pair.now.metrics.sum(name)).sum::<f64>();
        let max = |name| {
            let each = self.pairs().map(|(_, pair)| pair.now.metrics.sum(name));
            each.fold(0.0, f64::max)
        };
        Lags {
            kafka_records: sum("barid_purger_lag_records") as u64,
            in_flight_records: sum("barid_purger_in_flight_records") as u64,
            timers_late_ms: (max("barid_delayer_late_seconds") * 1e3) as u64,
            timers_claimed: sum("barid_delayer_claims") as u64,
            queued_bytes: sum("barid_access_queued_bytes") as u64,
            shards_away: max("barid_purger_shards_away") as u64,
        }
    }

    fn sessions(&self) -> Sessions {
        let by = |name: &str, label: &str| {
            let mut all: BTreeMap<String, u64> = BTreeMap::new();
            for (_, pair) in self.pairs() {
                for (value, count) in pair.now.metrics.by_label(name, label) {
                    *all.entry(value).or_default() += count;
                }
            }
            all.retain(|_, count| *count > 0);
            all
        };
        Sessions {
            by_app: by("barid_access_app_sessions", "app"),
            by_platform: by("barid_access_platform_sessions", "platform"),
            by_sdk: by("barid_access_sdk_sessions", "sdk"),
        }
    }

    /// Certificates that end soon, or have ended.
    fn expiring(&self, now_ms: u64) -> Vec<Problem> {
        let kinds = [
            ("barid_internal_certificate_expires_timestamp_seconds", "certificate of internal_tls"),
            ("barid_access_certificate_expires_timestamp_seconds", "certificate for devices"),
        ];
        let found = self.pairs().flat_map(|(address, pair)| {
            let left = kinds.map(|(name, what)| {
                // 0: there is none.
                let at = Some(pair.now.metrics.sum(name)).filter(|at| *at > 0.0)?;
                let left = at - now_ms as f64 / 1e3;
                (left < EXPIRES_SOON_S).then_some((what, left))
            });
            left.into_iter().flatten().map(|(what, left)| {
                let problem = match left > 0.0 {
                    true => format!("the {what} expires in {}", span((left * 1e3) as u64)),
                    false => format!("the {what} has expired"),
                };
                Problem { of: address.clone(), problem }
            })
        });
        found.collect()
    }

    fn roles(&self) -> Vec<RoleState> {
        let mut roles: Vec<RoleState> = self
            .pairs()
            .map(|(address, pair)| RoleState {
                role: pair.now.metrics.role().unwrap_or_default().to_owned(),
                admin: address.clone(),
                ready: pair.now.not_ready.is_empty(),
                cpu_percent: round(100.0 * pair.rate(|m| m.sum("process_cpu_seconds_total")), 10.0),
                memory_bytes: pair.now.metrics.sum("process_resident_memory_bytes") as u64,
                process_id: pair.now.metrics.sum("barid_process_id") as u64,
                partitions: pair.now.metrics.by_label("barid_purger_partitions", "topic"),
            })
            .collect();
        let place = |role: &RoleState| {
            ["purger", "dispatcher", "delayer", "access"].iter().position(|name| *name == role.role)
        };
        roles.sort_by_key(place);
        roles
    }

    fn not_ready(&self) -> Vec<Problem> {
        let said = self.pairs().flat_map(|(address, pair)| {
            let of = format!("{} {address}", pair.now.metrics.role().unwrap_or_default());
            let problem = move |line: &String| Problem { of: of.clone(), problem: line.clone() };
            pair.now.not_ready.iter().map(problem).collect::<Vec<_>>()
        });
        said.collect()
    }
}

fn node(record: &NodeRecord) -> NodeState {
    NodeState {
        node: record.id.to_string(),
        role: match record.role {
            NodeRole::Access => "access",
            NodeRole::Dispatcher => "dispatcher",
        },
        state: if record.draining { "draining" } else { "serving" },
        sessions: record.load,
        address: record.address.clone(),
        zone: record.zone.clone(),
    }
}

fn round(value: f64, steps: f64) -> f64 {
    (value * steps).round() / steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn look(at: Instant, text: &str) -> anyhow::Result<Scrape> {
        let metrics = Metrics::parse(&format!("barid_build_info{{role=\"purger\"}} 1\n{text}"));
        Ok(Scrape { at, metrics, not_ready: vec!["kafka: away".into()] })
    }

    fn taken(count: u32, hop: u32) -> String {
        format!(
            "barid_purger_records_taken_total{{topic=\"a\"}} {count}\n\
             barid_hop_seconds_bucket{{hop=\"taken_accepted\",le=\"0.001\"}} {hop}\n\
             barid_hop_seconds_bucket{{hop=\"taken_accepted\",le=\"+Inf\"}} {hop}"
        )
    }

    #[test]
    fn rates_are_those_between_two_looks_and_survive_a_restart() {
        let (mut memory, t) = (Memory::default(), Instant::now());
        let mut rate = |seconds: u64, count, hop| {
            let at = t + Duration::from_secs(seconds);
            let looks = vec![("a:1".to_owned(), look(at, &taken(count, hop)))];
            let sample = memory.take(looks, Ok(vec![]));
            let hop = &sample.hops[0];
            (sample.rates.taken_per_s, hop.count, hop.since_start)
        };
        assert_eq!(rate(0, 100, 10), (0.0, 10, true));
        assert_eq!(rate(2, 300, 15), (100.0, 5, false));
        assert_eq!(rate(3, 50, 2), (50.0, 2, false), "it started anew");
    }

    #[test]
    fn what_does_not_answer_or_is_not_ready_is_a_problem() {
        let mut memory = Memory::default();
        let looks = vec![
            ("a:1".to_owned(), look(Instant::now(), "barid_purger_shards_away 3")),
            ("b:1".to_owned(), Err(anyhow::anyhow!("refused"))),
        ];
        let sample = memory.take(looks, Err("redis is away".into()));
        let told: Vec<_> = sample.problems.iter().map(|p| (&*p.of, &*p.problem)).collect();
        let wanted = [
            ("b:1", "refused"),
            ("leases", "redis is away"),
            ("purger a:1", "kafka: away"),
            ("purger", "3 shards are unavailable"),
        ];
        assert_eq!(told, wanted);
        assert_eq!(sample.roles.len(), 1);
    }

    #[test]
    fn certificates_that_expire_soon_are_problems_and_sessions_add_up() {
        let mut memory = Memory::default();
        let now_s = values::now_ms() as f64 / 1e3;
        let text = |expires: f64| {
            format!(
                "barid_internal_certificate_expires_timestamp_seconds {expires}\n\
                 barid_access_certificate_expires_timestamp_seconds 0\n\
                 barid_access_sdk_sessions{{sdk=\"go/1\"}} 2\n\
                 barid_access_sdk_sessions{{sdk=\"none\"}} 0"
            )
        };
        let days = [-1.0, 3.1, 30.0];
        let looks = ["a:1", "b:1", "c:1"].iter().zip(days).map(|(address, days)| {
            let mut scrape = look(Instant::now(), &text(now_s + days * 86_400.0)).unwrap();
            scrape.not_ready.clear();
            ((*address).to_owned(), Ok(scrape))
        });
        let sample = memory.take(looks.collect(), Ok(vec![]));
        let told: Vec<_> = sample.problems.iter().map(|p| (&*p.of, &*p.problem)).collect();
        let wanted = [
            ("a:1", "the certificate of internal_tls has expired"),
            ("b:1", "the certificate of internal_tls expires in 3 d"),
        ];
        assert_eq!(told, wanted);
        assert_eq!(sample.sessions.by_sdk, [("go/1".to_owned(), 6)].into());
    }

    #[test]
    fn hazard_116_cpu_time_of_a_second_is_shown_to_a_tenth_of_a_percent() {
        let (mut memory, t) = (Memory::default(), Instant::now());
        let mut cpu = |seconds: u64, cpu: f64| {
            let text = format!("process_cpu_seconds_total {cpu}");
            let at = t + Duration::from_secs(seconds);
            memory.take(vec![("a:1".to_owned(), look(at, &text))], Ok(vec![])).roles[0].cpu_percent
        };
        assert_eq!((cpu(0, 7.5), cpu(1, 7.623)), (0.0, 12.3));
    }

    #[test]
    fn hazard_44_each_purger_shows_its_share_of_each_topic() {
        let mut memory = Memory::default();
        let shares =
            "barid_purger_partitions{topic=\"a\"} 4\nbarid_purger_partitions{topic=\"b\"} 0";
        let looks = vec![("a:1".to_owned(), look(Instant::now(), shares))];
        let sample = memory.take(looks, Ok(vec![]));
        let wanted = BTreeMap::from([("a".to_owned(), 4), ("b".to_owned(), 0)]);
        assert_eq!(sample.roles[0].partitions, wanted);
    }
}
