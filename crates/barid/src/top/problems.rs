//! Groups what endpoints report: failing conditions with one cause are one problem, with what follows from it.

use serde::Serialize;

use super::scrape::Unread;

/// Conditions of an endpoint that fail as a consequence when the first, which names the cause, fails.
const CONSEQUENCES: [(&str, &[&str]); 2] = [
    ("redis", &["lease", "tracking", "polling", "records", "commits", "confirming", SHARDS]),
    ("kafka", &["consumer", "topics", "commits", "fetching", "producing"]),
];
/// Endpoints of a problem that are named one by one.
const NAMED: usize = 4;

/// A problem.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The roles or endpoints that have it, or `leases`.
    pub of: String,
    pub problem: String,
    /// What each endpoint reports, if they do not all report the same: `role HOST:PORT: condition: reason`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reports: Vec<String>,
    /// Failing conditions that follow from it: `role HOST:PORT: condition: reason`.
    pub consequences: Vec<String>,
}

/// What an endpoint reports, or why it does not.
#[derive(Debug)]
pub struct Report {
    /// Empty: the endpoint does not answer, or it is no endpoint's problem.
    pub role: String,
    /// Its address, or [`LEASES`].
    pub at: String,
    pub about: About,
    /// What to show: `condition: reason`, or the reason alone.
    pub text: String,
}

/// What a report is about. Numbers and words of its text do not tell reports apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum About {
    /// A condition of readiness that fails, by its name.
    Condition(String),
    /// An endpoint that cannot be read.
    Endpoint(Unread),
    /// The leases, which cannot be read.
    Leases,
    /// A certificate, by its use.
    Certificate { of: &'static str, has_expired: bool },
}

/// The cause of a report. Reports with equal causes are one problem.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cause {
    /// A system does not answer. Each role may have another reason: one waits for an answer, the next for a connection.
    Away {
        system: &'static str,
        address: Option<String>,
    },
    About(About),
}

impl Report {
    /// The failing condition; empty: none.
    fn condition(&self) -> &str {
        match &self.about {
            About::Condition(name) => name,
            _ => "",
        }
    }

    fn whose(&self) -> String {
        if self.role.is_empty() { self.at.clone() } else { format!("{} {}", self.role, self.at) }
    }

    fn full(&self) -> String {
        format!("{}: {}", self.whose(), self.text)
    }

    /// The system that it reports as away, its address if that is known, and why.
    fn away(&self) -> Option<(&'static str, Option<&str>, &str)> {
        if !matches!(self.about, About::Condition(_) | About::Leases) {
            return None;
        }
        let (system, (_, why)) = SYSTEMS.into_iter().find_map(|system| {
            Some((system, self.text.split_once(&format!("{system} is away: "))?))
        })?;
        match why.split_once(": ").filter(|(address, _)| is_address(address)) {
            Some((address, why)) => Some((system, Some(address), why)),
            None => Some((system, None, why)),
        }
    }

    fn cause(&self) -> Cause {
        match self.away() {
            Some((system, address, _)) => {
                Cause::Away { system, address: address.map(str::to_owned) }
            }
            None => Cause::About(self.about.clone()),
        }
    }

    /// The text of a problem of which it is the first report.
    fn problem(&self) -> String {
        match self.away() {
            Some((system, Some(address), why)) => format!("{system} {address} is away: {why}"),
            Some((system, None, why)) => format!("{system} is away: {why}"),
            None => self.text.clone(),
        }
    }

    /// Whether it is a consequence of `other`.
    fn follows(&self, other: &Self) -> bool {
        let of_same = self.role == other.role && self.at == other.at;
        let (own, cause) = (self.condition(), other.condition());
        let follows =
            |(from, conditions): &(&str, &[&str])| *from == cause && conditions.contains(&own);
        let unread = self.about == About::Leases && other.about != About::Leases;
        let is_redis_away = || other.away().is_some_and(|(system, ..)| system == "redis");
        of_same && CONSEQUENCES.iter().any(follows) || unread && is_redis_away()
    }
}

/// [`Report::at`] of leases that cannot be read.
pub const LEASES: &str = "leases";
/// The condition that stands for `barid_purger_shards_away`.
pub const SHARDS: &str = "shards";
/// What roles report as away.
const SYSTEMS: [&str; 2] = ["redis", "kafka"];

/// Reports with one cause, and those that follow from them.
struct Group<'a> {
    cause: Cause,
    members: Vec<&'a Report>,
    consequences: Vec<&'a Report>,
}

/// The problems of `reports`: each report is a part of at least one. `endpoints`: role and address of each one that
/// answers.
pub fn problems(reports: &[Report], endpoints: &[(String, String)]) -> Vec<Problem> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    let (mut later, first): (Vec<_>, Vec<_>) =
        reports.iter().partition(|one| reports.iter().any(|other| one.follows(other)));
    first.into_iter().for_each(|one| add(&mut groups, one));
    loop {
        groups.iter_mut().for_each(|group| group.claim(&later));
        later.retain(|one| !groups.iter().any(|group| group.has(one)));
        // Reports that only follow from each other: one of them stands for the cause.
        let Some(unclaimed) = later.pop() else { break };
        add(&mut groups, unclaimed);
    }
    groups.into_iter().map(|group| group.problem(endpoints)).collect()
}

fn add<'a>(groups: &mut Vec<Group<'a>>, report: &'a Report) {
    let cause = report.cause();
    match groups.iter_mut().find(|group| group.cause == cause) {
        Some(group) => group.members.push(report),
        None => groups.push(Group { cause, members: vec![report], consequences: Vec::new() }),
    }
}

impl<'a> Group<'a> {
    /// Adds what follows from its reports, and what follows from that.
    fn claim(&mut self, reports: &[&'a Report]) {
        loop {
            let follows = |one: &&Report| self.all().any(|other| one.follows(other));
            let more = reports.iter().copied().filter(|one| !self.has(one) && follows(one));
            let more: Vec<_> = more.collect();
            if more.is_empty() {
                return;
            }
            self.consequences.extend(more);
        }
    }

    fn all(&self) -> impl Iterator<Item = &'a Report> {
        self.members.iter().chain(&self.consequences).copied()
    }

    fn has(&self, report: &Report) -> bool {
        self.all().any(|one| std::ptr::eq(one, report))
    }

    fn problem(&self, endpoints: &[(String, String)]) -> Problem {
        let full = |reports: &[&Report]| reports.iter().map(|one| one.full()).collect();
        let problem = self.members.first().map(|first| first.problem()).unwrap_or_default();
        let is_same = self.members.iter().all(|one| one.problem() == problem);
        Problem {
            of: whose(&self.members, endpoints),
            problem,
            reports: if is_same { Vec::new() } else { full(&self.members) },
            consequences: full(&self.consequences),
        }
    }
}

fn is_address(text: &str) -> bool {
    let port = text.rsplit_once(':').map(|(_, port)| port);
    !text.contains(' ') && port.is_some_and(|port| port.parse::<u16>().is_ok())
}

/// `all roles`, `purger, delayer`, or the endpoints' addresses where a role has others without the problem.
fn whose(members: &[&Report], endpoints: &[(String, String)]) -> String {
    if let [one] = members {
        return one.whose();
    }
    let has = |(role, at): &&(String, String)| {
        members.iter().any(|member| member.role == *role && member.at == *at)
    };
    if endpoints.len() > 1 && endpoints.iter().all(|one| has(&one)) {
        return "all roles".into();
    }
    let mut names: Vec<String> = Vec::new();
    for member in members {
        let same = || endpoints.iter().filter(|(role, _)| *role == member.role);
        let name = match (same().filter(has).count(), same().count()) {
            (0, _) => member.whose(),
            (some, all) if some == all => member.role.clone(),
            (some, all) if some > NAMED => format!("{some} of {all} {}", member.role),
            _ => member.whose(),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let more = names.len().saturating_sub(NAMED);
    names.truncate(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    names.join(", ") + &more
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(role: &str, at: &str, text: &str) -> Report {
        let about = match (at, text.split_once(": ")) {
            (LEASES, _) => About::Leases,
            (_, Some((condition, _))) if !role.is_empty() => About::Condition(condition.into()),
            _ => About::Endpoint(Unread::Silent),
        };
        Report { role: role.into(), at: at.into(), about, text: text.into() }
    }

    fn shown(reports: &[Report]) -> Vec<String> {
        let roles = ["purger", "dispatcher", "delayer", "access"].into_iter().zip(1..);
        let endpoints: Vec<_> =
            roles.map(|(role, n)| (role.to_owned(), format!("h:{n}"))).collect();
        let problems = problems(reports, &endpoints).into_iter();
        problems
            .map(|one| format!("{}: {} +{}", one.of, one.problem, one.consequences.len()))
            .collect()
    }

    #[test]
    fn hazard_127_one_cause_is_one_problem_with_its_consequences() {
        let away = "redis: redis is away: 127.0.0.1:7379: no answer in time";
        let all = [
            report("", LEASES, "redis is away: no master returns leases"),
            report(
                "purger",
                "h:1",
                "redis: 8 shards wait: redis is away: 127.0.0.1:7379: connection refused",
            ),
            report("purger", "h:1", "shards: 8 shards are unavailable"),
            report("dispatcher", "h:2", "lease: no renewal for 15 s"),
            report("dispatcher", "h:2", away),
            report("dispatcher", "h:2", "tracking: redis does not report changes of routes"),
            report("delayer", "h:3", away),
            report("access", "h:4", "lease: no renewal for 14 s"),
            report("access", "h:4", away),
        ];
        let told = ["all roles: redis 127.0.0.1:7379 is away: connection refused +5"];
        assert_eq!(shown(&all), told);
        // Another cause stays a problem of its own.
        let some = [
            report("", "h:9", "connection refused"),
            report("access", "h:4", "lease: no renewal for 14 s"),
            report("dispatcher", "h:2", "lease: no renewal for 9 s"),
            report("dispatcher", "h:2", "tasks: one ended"),
        ];
        let told = [
            "h:9: connection refused +0",
            "access, dispatcher: lease: no renewal for 14 s +0",
            "dispatcher h:2: tasks: one ended +0",
        ];
        assert_eq!(shown(&some), told);
    }

    #[test]
    fn hazard_156_a_cause_is_known_by_what_fails_and_not_by_its_words() {
        // One word differs, and a number that is not an age does.
        let reports = [
            report("access", "h:4", "lease: lapsed: no answer"),
            report("dispatcher", "h:2", "lease: no renewal for 9 s"),
            report("purger", "h:1", "topics: kafka has no topic barid.push1: create it"),
            report("purger", "h:1", "consumer: no poll for 31 s"),
        ];
        let told = [
            "access, dispatcher: lease: lapsed: no answer +0",
            "purger h:1: topics: kafka has no topic barid.push1: create it +0",
            "purger h:1: consumer: no poll for 31 s +0",
        ];
        assert_eq!(shown(&reports), told);
        let all = problems(&reports, &[]);
        let words =
            ["access h:4: lease: lapsed: no answer", "dispatcher h:2: lease: no renewal for 9 s"];
        assert_eq!(all[0].reports, words, "each one's words are kept");
        assert!(all[1].reports.is_empty());
        // The words of the errors that are recognized.
        let redis = barid_mailbox::Error::Away("h:1: connection refused".into());
        let kafka = barid_bus::Error::Away("h:2: connection refused".into());
        for (error, of) in [(redis.to_string(), "redis h:1"), (kafka.to_string(), "kafka h:2")] {
            let report = report("access", "h:4", &format!("x: {error}"));
            assert_eq!(report.problem(), format!("{of} is away: connection refused"));
        }
    }

    #[test]
    fn hazard_156_every_report_is_shown() {
        // The lease's report follows from Redis, and that of the leases from the lease's.
        let chain = [
            report("", LEASES, "redis is away: no master returns leases"),
            report("access", "h:4", "lease: lapsed: redis is away: h:6379: no answer in time"),
            report("access", "h:4", "redis: it evicts keys"),
        ];
        assert_eq!(shown(&chain), ["access h:4: redis: it evicts keys +2"]);
        let names = ["redis", "kafka", "lease", "commits", "records", "topics", "other", SHARDS];
        let texts = ["redis is away: h:1: x", "kafka is away: y", "redis is away: z", "broken"];
        // All pairs of conditions and reasons on two roles, with the leases.
        for seed in 0..4_096_usize {
            let pick = |shift: usize, of: usize| (seed >> shift) % of;
            let reports = [
                report("purger", "h:1", &format!("{}: {}", names[pick(0, 8)], texts[pick(3, 4)])),
                report("purger", "h:1", &format!("{}: {}", names[pick(5, 8)], texts[pick(8, 4)])),
                report("access", "h:4", &format!("{}: {}", names[pick(2, 8)], texts[pick(6, 4)])),
                report("", LEASES, texts[pick(10, 4)]),
                report("", "h:9", "no answer within 2 s"),
            ];
            let all = problems(&reports, &[]);
            let told: Vec<String> = all
                .iter()
                .flat_map(|one| {
                    let own = [format!("{}: {}", one.of, one.problem)];
                    own.into_iter().chain(one.reports.clone()).chain(one.consequences.clone())
                })
                .collect();
            for one in &reports {
                let words = [one.full(), format!("{}: {}", one.whose(), one.problem())];
                let is_shared = all.iter().any(|problem| {
                    problem.problem == one.problem() && problem.of.contains(&one.whose())
                });
                let is_told = is_shared || words.iter().any(|words| told.contains(words));
                assert!(is_told, "{words:?} of {reports:?} in {told:?}");
            }
        }
    }

    #[test]
    fn hazard_127_endpoints_are_named_where_others_of_their_role_are_well() {
        let endpoints: Vec<_> = (0..9).map(|n| ("access".to_owned(), format!("h:{n}"))).collect();
        let whose = |count| {
            let members: Vec<_> =
                (0..count).map(|n| report("access", &format!("h:{n}"), "x")).collect();
            whose(&members.iter().collect::<Vec<_>>(), &endpoints)
        };
        assert_eq!(whose(1), "access h:0");
        assert_eq!(whose(2), "access h:0, access h:1");
        assert_eq!(whose(5), "5 of 9 access");
        assert_eq!(whose(9), "all roles");
    }
}
