//! Groups what endpoints report: failing conditions with one cause are one problem, with what follows from it.

use serde::Serialize;

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
    /// Failing conditions that follow from it: `role HOST:PORT: condition: reason`.
    pub consequences: Vec<String>,
}

/// What an endpoint reports, or does not.
#[derive(Debug)]
pub struct Report {
    /// Empty: the endpoint does not answer, or it is no endpoint's problem.
    pub role: String,
    /// Its address, or `leases`.
    pub at: String,
    /// `condition: reason`, or the reason alone.
    pub text: String,
}

impl Report {
    /// The failing condition; empty: none.
    fn condition(&self) -> &str {
        match self.text.split_once(": ") {
            Some((condition, _)) if !self.role.is_empty() => condition,
            _ => "",
        }
    }

    fn whose(&self) -> String {
        if self.role.is_empty() { self.at.clone() } else { format!("{} {}", self.role, self.at) }
    }

    /// Whether it is a consequence of `other`.
    fn follows(&self, other: &Self) -> bool {
        let of_same = self.role == other.role && self.at == other.at;
        let (own, cause) = (self.condition(), other.condition());
        let follows =
            |(from, conditions): &(&str, &[&str])| *from == cause && conditions.contains(&own);
        let unread = self.at == LEASES && other.at != LEASES;
        of_same && CONSEQUENCES.iter().any(follows)
            || unread && system(&other.text) == Some("redis")
    }
}

/// [`Report::at`] of leases that cannot be read.
pub const LEASES: &str = "leases";
/// The condition that stands for `barid_purger_shards_away`.
pub const SHARDS: &str = "shards";

/// The problems of `reports`. `endpoints`: role and address of each one that answers.
pub fn problems(reports: &[Report], endpoints: &[(String, String)]) -> Vec<Problem> {
    let mut groups: Vec<(Cause, Vec<&Report>)> = Vec::new();
    let (later, first): (Vec<_>, Vec<_>) =
        reports.iter().partition(|one| reports.iter().any(|other| one.follows(other)));
    for report in first {
        let cause = Cause::of(&report.text);
        match groups.iter_mut().find(|(known, _)| known.key == cause.key) {
            Some((_, members)) => members.push(report),
            None => groups.push((cause, vec![report])),
        }
    }
    let problem = |(cause, members): (Cause, Vec<&Report>)| {
        let follows = |one: &&&Report| members.iter().any(|member| one.follows(member));
        let consequences = later.iter().filter(follows);
        Problem {
            of: whose(&members, endpoints),
            problem: cause.problem,
            consequences: consequences
                .map(|one| format!("{}: {}", one.whose(), one.text))
                .collect(),
        }
    };
    groups.into_iter().map(problem).collect()
}

struct Cause {
    /// Equal for reports that have the same cause.
    key: String,
    problem: String,
}

impl Cause {
    fn of(text: &str) -> Self {
        if let Some(system) = system(text)
            && let Some((_, why)) = text.split_once(&format!("{system} is away: "))
        {
            return match why.split_once(": ").filter(|(address, _)| is_address(address)) {
                // Each role may have another reason: one waits for an answer, the next for a connection.
                Some((address, why)) => {
                    let key = format!("{system} {address}");
                    Self { problem: format!("{key} is away: {why}"), key }
                }
                None => Self { key: why.into(), problem: format!("{system} is away: {why}") },
            };
        }
        // Ages differ.
        Self { key: text.replace(|c: char| c.is_ascii_digit(), ""), problem: text.into() }
    }
}

/// The system that a text reports as away.
fn system(text: &str) -> Option<&'static str> {
    ["redis", "kafka"].into_iter().find(|system| text.contains(&format!("{system} is away: ")))
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
        Report { role: role.into(), at: at.into(), text: text.into() }
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
