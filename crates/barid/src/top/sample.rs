//! Computes a sample from the last scrapes of all endpoints. A number that no endpoint tells is `None`, not 0.

use std::collections::{BTreeMap, VecDeque};

use barid_mailbox::{NodeRecord, NodeRole};
use barid_runtime as runtime;
use barid_runtime::exposition::{Histogram, Metrics};
use serde::Serialize;

use super::problems::{About, LEASES, Problem, Report, SHARDS, problems};
use super::scrape::{Scrape, ScrapeError};
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
    /// `None`: unknown.
    pub nodes: Option<Vec<NodeState>>,
    /// Why the nodes are unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes_unknown: Option<&'static str>,
    pub sessions: Sessions,
    pub problems: Vec<Problem>,
}

/// Welcomed sessions, and by what they name, as access nodes export it; names without a session are left out.
#[derive(Debug, Default, Serialize)]
pub struct Sessions {
    /// Of the access nodes that answer; of others as their leases tell. `None`: unknown.
    pub total: Option<u64>,
    pub by_app: BTreeMap<String, u64>,
    pub by_platform: BTreeMap<String, u64>,
    pub by_sdk: BTreeMap<String, u64>,
}

/// Messages per second since the previous scrape. `None`: no role that counts them was read twice.
#[derive(Debug, Default, Serialize)]
pub struct Rates {
    pub taken_per_s: Option<f64>,
    pub accepted_per_s: Option<f64>,
    pub written_per_s: Option<f64>,
    pub acked_per_s: Option<f64>,
    pub resent_per_s: Option<f64>,
    pub refused_per_s: Option<f64>,
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

/// Messages and timers that wait. `None`: no role knows, or one of those that have to know it cannot reach Kafka or
/// Redis.
#[derive(Debug, Default, Serialize)]
pub struct Lags {
    pub kafka_records: Option<u64>,
    pub in_flight_records: Option<u64>,
    /// How late the timers were that were claimed last.
    pub timers_late_ms: Option<u64>,
    pub timers_claimed: Option<u64>,
    pub queued_bytes: Option<u64>,
    pub shards_away: Option<u64>,
}

/// A process.
#[derive(Debug, Serialize)]
pub struct RoleState {
    pub role: String,
    pub admin: String,
    pub ready: bool,
    /// Percent of one core; `None` before the second scrape.
    pub cpu_percent: Option<f64>,
    /// `None`: the role does not tell.
    pub memory_bytes: Option<u64>,
    /// `None`: the role does not tell.
    pub process_id: Option<u64>,
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

/// What is known of the leases.
pub enum Leases {
    Read(Vec<NodeRecord>),
    /// Why they cannot be read.
    Unread(String),
    NoRedis,
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
    /// The growth of a counter per second; `None` before the second scrape.
    fn rate(&self, of: impl Fn(&Metrics) -> f64) -> Option<f64> {
        let before = self.before?;
        let (now, then) = (of(&self.now.metrics), of(&before.metrics));
        let seconds = (self.now.at - before.at).as_secs_f64();
        // The counters of a restarted process begin at zero.
        let grown = if now >= then { now - then } else { now };
        (seconds > 0.0).then(|| grown / seconds)
    }

    fn role(&self) -> &str {
        self.now.metrics.role().unwrap_or_default()
    }

    /// The value of a metric without labels; `None`: the role has none.
    fn value(&self, name: &str) -> Option<u64> {
        let metrics = &self.now.metrics;
        metrics.series().any(|(known, _)| known == name).then(|| metrics.sum(name) as u64)
    }

    /// Whether a condition of readiness holds.
    fn holds(&self, condition: &str) -> bool {
        self.now.metrics.get("barid_ready", "condition", condition) != Some(0.0)
    }
}

impl RoleState {
    /// Whether both run in one process.
    pub fn shares_a_process_with(&self, other: &Self) -> bool {
        let host = |role: &Self| role.admin.rsplit_once(':').map(|(host, _)| host.to_owned());
        self.process_id.is_some()
            && self.process_id == other.process_id
            && host(self) == host(other)
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
        looks: Vec<(String, Result<Scrape, ScrapeError>)>,
        leases: Leases,
    ) -> Sample {
        let mut reports = Vec::new();
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
                    let (about, text) = (About::Endpoint(error.why.clone()), error.to_string());
                    reports.push(Report { role: String::new(), at: address, about, text });
                }
            }
        }
        let (nodes, nodes_unknown) = match leases {
            Leases::Read(nodes) => (Some(nodes), None),
            Leases::NoRedis => (None, Some("name the cluster's Redis with --redis URL")),
            Leases::Unread(text) => {
                let about = About::Leases;
                reports.push(Report { role: String::new(), at: LEASES.into(), about, text });
                (None, Some("Redis does not return the leases"))
            }
        };
        reports.extend(self.not_ready());
        reports.extend(self.expiring(values::now_ms()));
        let endpoints = self.pairs().map(|(at, pair)| (pair.role().to_owned(), at.clone()));
        let problems = problems(&reports, &endpoints.collect::<Vec<_>>());
        Sample {
            event: "sample",
            at_ms: values::now_ms(),
            rates: self.rates(),
            hops: self.hops(),
            lags: self.lags(),
            roles: self.roles(),
            sessions: self.sessions(nodes.as_deref()),
            nodes: nodes.map(|nodes| nodes.iter().map(node).collect()),
            nodes_unknown,
            problems,
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (&String, Pair<'_>)> {
        self.looks.iter().filter_map(|(address, looks)| {
            Some((address, Pair { now: looks.front()?, before: looks.get(1) }))
        })
    }

    fn of_role<'a>(&'a self, role: &'a str) -> impl Iterator<Item = Pair<'a>> {
        self.pairs().map(|(_, pair)| pair).filter(move |pair| pair.role() == role)
    }

    /// The sum of a metric over a role's endpoints; `None` without such an endpoint.
    fn total(&self, role: &str, name: &str) -> Option<u64> {
        let each = self.of_role(role).map(|pair| pair.now.metrics.sum(name));
        each.reduce(|sum, value| sum + value).map(|sum| sum as u64)
    }

    fn rates(&self) -> Rates {
        let rate = |role: &str, of: &dyn Fn(&Metrics) -> f64| {
            self.of_role(role).filter_map(|pair| pair.rate(of)).reduce(|sum, rate| sum + rate)
        };
        let sum = |role, name: &'static str| rate(role, &move |metrics| metrics.sum(name));
        Rates {
            taken_per_s: sum("purger", "barid_purger_records_taken_total"),
            accepted_per_s: rate("purger", &|m| {
                m.sum_of("barid_purger_messages_total", "outcome", "accepted")
            }),
            written_per_s: sum("access", "barid_access_delivered_total"),
            acked_per_s: sum("access", "barid_access_acked_total"),
            resent_per_s: sum("access", "barid_access_resends_total"),
            refused_per_s: sum("purger", "barid_purger_records_refused_total"),
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
        let all = |role: &str, conditions: &[&str]| {
            self.of_role(role).all(|pair| conditions.iter().all(|one| pair.holds(one)))
        };
        // The gauge keeps its last value, at first 0, while no broker answers.
        let kafka = all("purger", &["kafka", "topics"]);
        let timers = all("delayer", &["redis", "polling"]);
        let late = self.of_role("delayer").map(|p| p.now.metrics.sum("barid_delayer_late_seconds"));
        let late = late.reduce(f64::max).map(|seconds| (seconds * 1e3) as u64);
        let away = self.of_role("purger").map(|p| p.now.metrics.sum("barid_purger_shards_away"));
        Lags {
            kafka_records: self.total("purger", "barid_purger_lag_records").filter(|_| kafka),
            in_flight_records: self.total("purger", "barid_purger_in_flight_records"),
            timers_late_ms: late.filter(|_| timers),
            timers_claimed: self.total("delayer", "barid_delayer_claims"),
            queued_bytes: self.total("access", "barid_access_queued_bytes"),
            shards_away: away.reduce(f64::max).map(|shards| shards as u64),
        }
    }

    fn sessions(&self, nodes: Option<&[NodeRecord]>) -> Sessions {
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
        // Admin ports of other machines may be out of reach, so leases come first; they are unknown while Redis is away.
        let of_leases = nodes.map(|nodes| {
            let access = nodes.iter().filter(|node| node.role == NodeRole::Access);
            access.map(|node| node.load).sum::<u64>()
        });
        let total = of_leases.max(self.total("access", "barid_access_sessions"));
        Sessions {
            total,
            by_app: by("barid_access_app_sessions", "app"),
            by_platform: by("barid_access_platform_sessions", "platform"),
            by_sdk: by("barid_access_sdk_sessions", "sdk"),
        }
    }

    /// Certificates that end soon, or have ended.
    fn expiring(&self, now_ms: u64) -> Vec<Report> {
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
                let has_expired = left <= 0.0;
                let text = match has_expired {
                    false => format!("the {what} expires in {}", span((left * 1e3) as u64)),
                    true => format!("the {what} has expired"),
                };
                let about = About::Certificate { of: what, has_expired };
                Report { role: String::new(), at: address.clone(), about, text }
            })
        });
        found.collect()
    }

    fn roles(&self) -> Vec<RoleState> {
        let mut roles: Vec<RoleState> = self
            .pairs()
            .map(|(address, pair)| RoleState {
                role: pair.role().to_owned(),
                admin: address.clone(),
                ready: pair.now.not_ready.is_empty(),
                cpu_percent: pair
                    .rate(|m| m.sum("process_cpu_seconds_total"))
                    .map(|cpu| round(100.0 * cpu, 10.0)),
                memory_bytes: pair.value("process_resident_memory_bytes"),
                process_id: pair.value("barid_process_id"),
                partitions: pair.now.metrics.by_label("barid_purger_partitions", "topic"),
            })
            .collect();
        let place = |role: &RoleState| {
            ["purger", "dispatcher", "delayer", "access"].iter().position(|name| *name == role.role)
        };
        roles.sort_by_key(place);
        roles
    }

    /// The failing conditions, and shards that a purger cannot reach.
    fn not_ready(&self) -> Vec<Report> {
        let said = self.pairs().flat_map(|(address, pair)| {
            let shards = pair.value("barid_purger_shards_away").filter(|shards| *shards > 0);
            let shards = shards.map(|shards| format!("{SHARDS}: {shards} unavailable"));
            let lines = pair.now.not_ready.iter().cloned().chain(shards);
            let (role, at) = (pair.role().to_owned(), address.clone());
            let report = move |text: String| {
                let (condition, _) = text.split_once(": ").unwrap_or((&text, ""));
                let about = About::Condition(condition.to_owned());
                Report { role: role.clone(), at: at.clone(), about, text }
            };
            lines.map(report).collect::<Vec<_>>()
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
    use super::super::scrape::Unread;
    use super::*;
    use std::time::{Duration, Instant};

    fn look(at: Instant, text: &str) -> Result<Scrape, ScrapeError> {
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
            let sample = memory.take(looks, Leases::Read(vec![]));
            let hop = &sample.hops[0];
            (sample.rates.taken_per_s, hop.count, hop.since_start)
        };
        assert_eq!(rate(0, 100, 10), (None, 10, true));
        assert_eq!(rate(2, 300, 15), (Some(100.0), 5, false));
        assert_eq!(rate(3, 50, 2), (Some(50.0), 2, false), "it started anew");
    }

    #[test]
    fn what_does_not_answer_or_is_not_ready_is_a_problem() {
        let mut memory = Memory::default();
        let looks = vec![
            ("a:1".to_owned(), look(Instant::now(), "barid_purger_shards_away 3")),
            ("b:1".to_owned(), Err(ScrapeError::new(Unread::Silent, "refused"))),
        ];
        let sample = memory.take(looks, Leases::Unread("redis is away".into()));
        let told: Vec<_> = sample.problems.iter().map(|p| (&*p.of, &*p.problem)).collect();
        let wanted = [
            ("b:1", "refused"),
            ("leases", "redis is away"),
            ("purger a:1", "kafka: away"),
            ("purger a:1", "shards: 3 unavailable"),
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
        let sample = memory.take(looks.collect(), Leases::Read(vec![]));
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
            let looks = vec![("a:1".to_owned(), look(at, &text))];
            memory.take(looks, Leases::Read(vec![])).roles[0].cpu_percent
        };
        assert_eq!((cpu(0, 7.5), cpu(1, 7.623)), (None, Some(12.3)));
    }

    #[test]
    fn hazard_44_each_purger_shows_its_share_of_each_topic() {
        let mut memory = Memory::default();
        let shares =
            "barid_purger_partitions{topic=\"a\"} 4\nbarid_purger_partitions{topic=\"b\"} 0";
        let looks = vec![("a:1".to_owned(), look(Instant::now(), shares))];
        let sample = memory.take(looks, Leases::Read(vec![]));
        let wanted = BTreeMap::from([("a".to_owned(), 4), ("b".to_owned(), 0)]);
        assert_eq!(sample.roles[0].partitions, wanted);
    }

    #[test]
    fn hazard_127_what_no_role_knows_is_unknown_and_not_zero() {
        let sample = Memory::default().take(vec![], Leases::NoRedis);
        let lags = serde_json::to_value(&sample.lags).unwrap();
        let rates = serde_json::to_value(&sample.rates).unwrap();
        for of in [lags, rates] {
            let values = of.as_object().unwrap();
            assert!(values.values().all(serde_json::Value::is_null), "{values:?}");
        }
        assert_eq!((sample.sessions.total, sample.nodes.is_none()), (None, true));
        assert_eq!(sample.nodes_unknown, Some("name the cluster's Redis with --redis URL"));
    }

    #[test]
    fn hazard_127_a_number_of_a_role_that_cannot_read_it_is_unknown() {
        let with = |role: &str, text: &str| {
            let text = format!("barid_build_info{{role=\"{role}\"}} 1\n{text}");
            let metrics = Metrics::parse(&text);
            Ok(Scrape { at: Instant::now(), metrics, not_ready: vec![] })
        };
        let lags = |kafka: u8, redis: u8| {
            let purger =
                format!("barid_purger_lag_records 0\nbarid_ready{{condition=\"kafka\"}} {kafka}");
            let delayer =
                format!("barid_delayer_late_seconds 0\nbarid_ready{{condition=\"redis\"}} {redis}");
            let access = "barid_access_sessions 1";
            let looks = vec![
                ("a:1".to_owned(), with("purger", &purger)),
                ("b:1".to_owned(), with("delayer", &delayer)),
                ("c:1".to_owned(), with("access", access)),
            ];
            let sample = Memory::default().take(looks, Leases::Unread("redis is away".into()));
            assert_eq!(sample.sessions.total, Some(1), "as the admin port tells");
            (sample.lags.kafka_records, sample.lags.timers_late_ms)
        };
        assert_eq!(lags(1, 1), (Some(0), Some(0)));
        assert_eq!(lags(0, 0), (None, None));
    }
}
