//! Formats a sample: problems first, then its sections, one below the other in 80 columns, side by side in a wide
//! terminal. A small cluster fits in 80x24. An unknown number is a question mark.

use std::collections::BTreeMap;

use crate::output::{Output, Tone, bytes, clean, clock, span};

use super::line::{Line, beside, cut, milliseconds, number, wrap};
use super::sample::{Hop, NodeState, RoleState, Sample, Sessions};

/// From this width on, rates and lags are left of processes and nodes.
const WIDE: usize = 132;
/// Width of rates, hops and lags in a wide terminal.
const LEFT: usize = 62;
/// From this width on, that is [`LEFT_WITH_LAGS`]: the lags are right of the hops.
const WIDER: usize = 150;
const LEFT_WITH_LAGS: usize = 78;
/// Width of what waits.
const WAITING: usize = 20;
/// The place of a number that is not known.
const UNKNOWN: &str = "?";

/// All lines of a sample, for a terminal with this many columns.
pub fn lines(sample: &Sample, columns: usize, every: &str, out: Output) -> Vec<String> {
    let lines = [
        vec![heading(sample, columns, every)],
        body(sample, columns, usize::MAX, &View::default()),
    ]
    .concat();
    lines.iter().map(|line| line.paint(columns, out)).collect()
}

/// The view that the user has chosen.
#[derive(Debug, Default)]
pub struct View {
    /// First line of the body that is shown.
    pub from: usize,
    /// Processes, nodes and problems that contain this text are shown; empty: all.
    pub filter: String,
    /// Whether the filter is being typed.
    pub typing: bool,
    /// Whether the keys are explained.
    pub help: bool,
    /// Whether the words of each endpoint, consequences of problems, and every hop are shown.
    pub details: bool,
}

/// A screen of a sample: the heading, a part of the body, and the keys. Moves the view back to what there is.
pub fn page(
    sample: &Sample,
    (columns, rows): (usize, usize),
    every: &str,
    view: &mut View,
    out: Output,
) -> Vec<String> {
    let room = rows.saturating_sub(2);
    let body = if view.help { help() } else { body(sample, columns, room, view) };
    frame(heading(sample, columns, every), &body, (columns, rows), view, out)
}

/// A screen before the first sample.
pub fn first_page((columns, rows): (usize, usize), view: &mut View, out: Output) -> Vec<String> {
    let heading = Line::of(Tone::Strong, "Barid ").and(None, " reading the admin endpoints…");
    let body = if view.help { help() } else { Vec::new() };
    frame(heading, &body, (columns, rows), view, out)
}

fn frame(
    heading: Line,
    body: &[Line],
    (columns, rows): (usize, usize),
    view: &mut View,
    out: Output,
) -> Vec<String> {
    let room = rows.saturating_sub(2);
    view.from = view.from.min(body.len().saturating_sub(room));
    let to = body.len().min(view.from + room);
    let mut lines = vec![heading];
    lines.extend_from_slice(&body[view.from..to]);
    lines.resize(rows.saturating_sub(1).max(1), Line::default());
    lines.push(keys(view, to, body.len()));
    lines.truncate(rows);
    lines.iter().map(|line| line.paint(columns, out)).collect()
}

fn keys(view: &View, to: usize, all: usize) -> Line {
    if view.typing {
        let text = format!(" /{}", clean(&view.filter));
        return Line::of(Tone::Strong, text).and(Some(Tone::Faint), "   Enter keep  Esc clear");
    }
    let mut keys = " q quit  ? help  / filter  d details".to_owned();
    if view.from > 0 || to < all {
        keys += &format!("  \u{2191}\u{2193} scroll, lines {} to {to} of {all}", view.from + 1);
    }
    let filter = match view.filter.as_str() {
        "" => String::new(),
        filter => format!("  only: {}", clean(filter)),
    };
    Line::of(Tone::Faint, keys).and(Some(Tone::Strong), filter)
}

fn help() -> Vec<Line> {
    [
        "q, Ctrl-C      quit",
        "?              show or hide these lines",
        "/              show only processes, nodes and problems that contain a text",
        "Esc            clear the filter",
        "d              show or hide what each endpoint says, what follows, and every hop",
        "up, down, j, k scroll by a line",
        "PgUp, PgDn     scroll by ten lines",
        "g, G           to the first, to the last line",
        "",
        "taken      records that purgers have read from Kafka",
        "accepted   messages that are in mailboxes",
        "written    messages that access nodes have written to sockets",
        "acked      messages that devices have acknowledged",
        "re-sent    messages that were written again, because no acknowledgement came",
        "refused    records that went to the dead letters",
        "",
        "A hop is the time between two of these events; p99: 99 % are faster.",
        "Hops are of the last seconds; * there were none: all since the roles started.",
        "A number that no role can tell at present is ?.",
    ]
    .map(|text| Line::plain(format!("  {text}")))
    .into()
}

/// Problems, then rates, hops and lags, processes and nodes; side by side in a wide terminal. With a filter, problems,
/// processes and nodes alone. Hops that span others are left out if everything else then fits in `rows`.
fn body(sample: &Sample, columns: usize, rows: usize, view: &View) -> Vec<Line> {
    let filter = view.filter.as_str();
    let problems = problems(sample, columns, view);
    if !filter.is_empty() {
        return [problems, who(sample, columns, filter)].concat();
    }
    let left = if columns >= WIDER { LEFT_WITH_LAGS } else { LEFT };
    let with = |hops: Vec<&Hop>| {
        let rest = match columns >= WIDE {
            true => {
                beside(flow(sample, &hops, left - 2), who(sample, columns - left, filter), left)
            }
            false => [flow(sample, &hops, columns), who(sample, columns, filter)].concat(),
        };
        [problems.clone(), rest].concat()
    };
    let hops: Vec<&Hop> = sample.hops.iter().filter(|hop| hop.count > 0).collect();
    let all = with(hops.clone());
    if all.len() <= rows || view.details {
        return all;
    }
    let single = with(hops.into_iter().filter(|hop| !spans_others(hop)).collect());
    if single.len() <= rows { single } else { all }
}

/// Whether a hop is the sum of others that are shown.
fn spans_others(hop: &Hop) -> bool {
    hop.hop.contains("produced_") && hop.hop != "produced_taken"
}

/// The problems, in lines of the terminal's width.
fn problems(sample: &Sample, columns: usize, view: &View) -> Vec<Line> {
    let width = columns.saturating_sub(4).max(20);
    let mut lines = Vec::new();
    for problem in &sample.problems {
        let text = format!("{}: {}", clean(&problem.of), clean(&problem.problem));
        let details = problem.reports.iter().chain(&problem.consequences);
        let details: Vec<String> = details.map(|one| clean(one)).collect();
        let mut all = std::iter::once(&text).chain(&details);
        if !all.any(|line| line.contains(&view.filter)) {
            continue;
        }
        let wrapped = wrap(&text, width).into_iter().enumerate();
        lines.extend(wrapped.map(|(at, part)| {
            Line::of(Tone::Bad, if at == 0 { "! " } else { "  " }).and(None, part)
        }));
        if view.details {
            let wrapped = details.iter().flat_map(|one| wrap(one, width - 2));
            lines.extend(wrapped.map(|part| Line::of(Tone::Faint, format!("    {part}"))));
        }
    }
    lines
}

fn heading(sample: &Sample, columns: usize, every: &str) -> Line {
    let (tone, state) = match sample.problems.len() {
        0 => (Tone::Good, "all is well".to_owned()),
        count => (Tone::Bad, counted(count as u64, "problem", "problems")),
    };
    let processes = counted(sample.processes() as u64, "process", "processes");
    let sessions = match sample.sessions.total {
        Some(total) => counted(total, "session", "sessions"),
        None => format!("{UNKNOWN} sessions"),
    };
    let line = Line::of(Tone::Strong, "Barid ")
        .and(Some(tone), format!(" {state}"))
        .and(None, format!("  {processes}, {sessions}"));
    let time = clock(sample.at_ms);
    let right = format!("{} UTC, every {every}", time.split('.').next().unwrap_or_default());
    let gap = columns.saturating_sub(line.width() + right.chars().count()).max(2);
    line.and(None, " ".repeat(gap)).and(Some(Tone::Faint), right)
}

fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{} {}", number(count), if count == 1 { one } else { many })
}

/// Rates, hops, lags: in `width` columns, with the lags right of the hops if they fit.
fn flow(sample: &Sample, hops: &[&Hop], width: usize) -> Vec<Line> {
    let table = table(sample, hops);
    let left = table.iter().map(Line::width).max().unwrap_or_default();
    let below = match left + 1 + WAITING <= width {
        true => beside(table, waiting(sample), (left + 3).min(width - WAITING)),
        false => [table, beside(Vec::new(), waiting(sample), 2)].concat(),
    };
    [rates(sample), below].concat()
}

fn rates(sample: &Sample) -> Vec<Line> {
    let rates = &sample.rates;
    let cells = [
        ("taken", rates.taken_per_s),
        ("accepted", rates.accepted_per_s),
        ("written", rates.written_per_s),
        ("acked", rates.acked_per_s),
        ("re-sent", rates.resent_per_s),
        ("refused", rates.refused_per_s),
    ];
    let names: String = cells.iter().map(|(name, _)| format!("{name:>9}")).collect();
    let mut values = Line::plain(" ");
    for (name, rate) in cells {
        let bad = matches!(name, "re-sent" | "refused") && rate > Some(0.0);
        let tone = if bad { Tone::Warn } else { Tone::Strong };
        let rate = rate.map(|rate| rate.round() as u64);
        values = values.and(Some(tone), format!("{:>9}", or_unknown(rate, number)));
    }
    vec![Line::of(Tone::Faint, format!(" {names}  /s")), values]
}

fn or_unknown<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), show)
}

fn header(text: impl Into<String>) -> Line {
    Line::of(Tone::Faint, format!("  {}", text.into()))
}

/// The table of hops.
fn table(sample: &Sample, hops: &[&Hop]) -> Vec<Line> {
    let old = hops.iter().filter(|hop| hop.since_start).count();
    let title = match old {
        0 => "hop",
        some if some == hops.len() => "hop, since the start",
        _ => "hop (*since start)",
    };
    let names: Vec<String> = hops
        .iter()
        .map(|hop| name(hop) + if hop.since_start && old < hops.len() { "*" } else { "" })
        .collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(21);
    let mut lines =
        vec![header(format!("{title:<width$}{:>9}{:>9}{:>9}", "p50", "p99", "messages"))];
    let ms = |value: Option<f64>| value.map_or_else(|| "-".into(), milliseconds);
    lines.extend(hops.iter().zip(names).map(|(hop, name)| {
        let (p50, p99, count) = (ms(hop.p50_ms), ms(hop.p99_ms), number(hop.count));
        let tone = hop.since_start.then_some(Tone::Faint);
        Line::default().and(tone, format!("  {name:<width$}{p50:>9}{p99:>9}{count:>9}"))
    }));
    if hops.is_empty() {
        let none = if sample.roles.is_empty() { UNKNOWN } else { "no messages yet" };
        lines.push(Line::of(Tone::Faint, format!("  {none}")));
    }
    lines
}

/// `taken to accepted`; `fan-out dispatched to written`.
fn name(hop: &Hop) -> String {
    match hop.hop.strip_prefix("fanout_") {
        Some(fanout) => format!("fan-out {}", clean(fanout).replacen('_', " to ", 1)),
        None => clean(&hop.hop).replacen('_', " to ", 1),
    }
}

/// Messages and timers that wait.
fn waiting(sample: &Sample) -> Vec<Line> {
    let lags = &sample.lags;
    let late = |ms| match ms {
        0..1_000 => "on time".to_owned(),
        ms => format!("{} late", span(ms)),
    };
    let cells = [
        ("Kafka lag", or_unknown(lags.kafka_records, number)),
        ("in flight", or_unknown(lags.in_flight_records, number)),
        ("timers", or_unknown(lags.timers_late_ms, late)),
        ("claimed", or_unknown(lags.timers_claimed, number)),
        ("to devices", or_unknown(lags.queued_bytes, bytes)),
    ];
    let cell = |(name, value)| Line::plain(format!("{name:<10}{value:>10}"));
    let header = Line::of(Tone::Faint, "waiting");
    std::iter::once(header).chain(cells.map(cell)).collect()
}

/// Processes and nodes.
fn who(sample: &Sample, columns: usize, filter: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    if !sample.roles.is_empty() {
        lines.push(header(format!(
            "{:<12}{:>8}{:>11}  {:<10}{}",
            "role", "cpu", "memory", "", "admin"
        )));
        let rows = sample.roles.iter().enumerate().map(|(at, one)| {
            let first = sample.roles[..at].iter().find(|other| other.shares_a_process_with(one));
            role(one, first)
        });
        lines.extend(rows.filter(|line| line.contains(filter)));
    }
    match (&sample.nodes, sample.nodes_unknown) {
        (Some(known), _) => lines.extend(nodes(known, columns, filter)),
        (None, why) => {
            let why = why.unwrap_or_default();
            lines.push(header("nodes  ").and(None, format!("{UNKNOWN}  {why}")));
        }
    }
    if filter.is_empty() {
        lines.extend(sessions(&sample.sessions, columns));
    }
    lines
}

/// Sessions by app, platform and SDK, the most frequent names first, as many as a line holds.
fn sessions(sessions: &Sessions, columns: usize) -> Vec<Line> {
    let kinds =
        [("app", &sessions.by_app), ("platform", &sessions.by_platform), ("SDK", &sessions.by_sdk)];
    if kinds.iter().all(|(_, names)| names.is_empty()) {
        return Vec::new();
    }
    let room = columns.saturating_sub(24).max(20);
    let line = |(at, (kind, names)): (usize, (&str, &BTreeMap<String, u64>))| {
        let title = if at == 0 { "sessions by" } else { "" };
        header(format!("{title:<12}{kind:<9}")).and(None, most_frequent(names, room))
    };
    kinds.into_iter().enumerate().map(line).collect()
}

/// `web 1,203, ios 800, 3 more`, in at most `room` characters.
fn most_frequent(names: &BTreeMap<String, u64>, room: usize) -> String {
    let mut sorted: Vec<_> = names.iter().collect();
    sorted.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), *name));
    let mut text = String::new();
    for (at, (name, count)) in sorted.iter().enumerate() {
        let gap = if at > 0 { ", " } else { "" };
        let next = format!("{gap}{} {}", cut(&clean(name), 40), number(**count));
        let rest = format!(", {} more", sorted.len() - at);
        let last = if at + 1 < sorted.len() { rest.len() } else { 0 };
        if at > 0 && text.chars().count() + next.chars().count() + last > room {
            return text + &rest;
        }
        text += &next;
    }
    text
}

/// `first`: a role above in the same process, whose CPU time and memory are this one's as well.
fn role(role: &RoleState, first: Option<&RoleState>) -> Line {
    let (tone, state) = if role.ready { (Tone::Good, "ready") } else { (Tone::Bad, "not ready") };
    let usage = match first {
        Some(first) => format!("{:>19}", format!("with {}", clean(&first.role))),
        None => {
            let cpu = or_unknown(role.cpu_percent, |cpu| format!("{cpu:.1} %"));
            format!("{cpu:>8}{:>11}", or_unknown(role.memory_bytes, bytes))
        }
    };
    Line::plain(format!("  {:<12}", clean(&role.role)))
        .and(first.map(|_| Tone::Faint), format!("{usage}  "))
        .and(Some(tone), format!("{state:<10}"))
        .and(Some(Tone::Faint), clean(&role.admin))
        .and(Some(Tone::Faint), share(role))
}

/// A purger's partitions of each topic, ordered by the topics' names; empty for other roles.
fn share(role: &RoleState) -> String {
    if role.partitions.is_empty() {
        return String::new();
    }
    let counts: Vec<String> = role.partitions.values().map(u64::to_string).collect();
    format!("  {} partitions", counts.join("+"))
}

/// The nodes, those with most sessions first.
fn nodes(nodes: &[NodeState], columns: usize, filter: &str) -> Vec<Line> {
    if nodes.is_empty() {
        return Vec::new();
    }
    let mut sorted: Vec<&NodeState> = nodes.iter().collect();
    sorted.sort_by(|a, b| a.role.cmp(b.role).then(b.sessions.cmp(&a.sessions)));
    let widest =
        |of: &dyn Fn(&NodeState) -> usize, least| nodes.iter().map(of).fold(least, usize::max);
    let address_width = widest(&|node| clean(&node.address).chars().count(), 7).min(40);
    let zone_width = widest(&|node| clean(&node.zone).chars().count(), 0).min(20);
    let zone_width = if columns >= 90 && zone_width > 0 { zone_width.max(4) } else { 0 };
    let role_width = widest(&|node| node.role.len(), 4);
    // Beside the name: the gaps, the sessions and the state.
    let others = 2 + 1 + role_width + 1 + 8 + 2 + 8 + 1 + address_width + 1 + zone_width;
    let longest = widest(&|node| clean(&node.node).chars().count(), 4);
    let width = longest.min(columns.saturating_sub(others).max(12));
    let mut lines = vec![header(format!(
        "{:<width$} {:<role_width$} {:>8}  {:<8} {:<address_width$} {}",
        "node",
        "role",
        "sessions",
        "state",
        "address",
        if zone_width > 0 { "zone" } else { "" },
    ))];
    let rows = sorted.into_iter().map(|node| {
        let tone = if node.state == "serving" { Tone::Good } else { Tone::Warn };
        let sessions = if node.role == "access" { number(node.sessions) } else { String::new() };
        let id = cut(&clean(&node.node), width);
        let address = cut(&clean(&node.address), address_width);
        let zone = if zone_width > 0 { cut(&clean(&node.zone), zone_width) } else { String::new() };
        Line::plain(format!("  {id:<width$} {:<role_width$} {sessions:>8}  ", node.role))
            .and(Some(tone), format!("{:<8}", node.state))
            .and(None, format!(" {address:<address_width$} {zone}"))
    });
    lines.extend(rows.filter(|line| line.contains(filter)));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::problems::Problem;
    use crate::top::sample::{Lags, Rates};

    fn sample(nodes: usize) -> Sample {
        let hop = |name: &str| Hop {
            hop: name.into(),
            count: 12_345,
            p50_ms: Some(0.421),
            p99_ms: Some(1234.0),
            since_start: false,
        };
        let node = |number: usize| NodeState {
            node: format!("access-{number}-with-quite-a-long-name-of-its-own-and-more"),
            role: "access",
            state: "serving",
            sessions: 19_000,
            address: "10.120.130.140:7081".into(),
            zone: "riyadh".into(),
        };
        let role = |name: &str| RoleState {
            role: name.into(),
            admin: "127.0.0.1:7082".into(),
            ready: true,
            cpu_percent: Some(99.9),
            memory_bytes: Some(123_000_000),
            process_id: None,
            partitions: match name {
                "purger" => ["high", "push", "bulk"].map(|topic| (topic.to_owned(), 4)).into(),
                _ => Default::default(),
            },
        };
        Sample {
            event: "sample",
            at_ms: 3_723_004,
            rates: Rates { taken_per_s: Some(1_002.4), ..Default::default() },
            hops: vec![hop("produced_taken"), hop("dispatched_written")],
            lags: Lags { timers_late_ms: Some(2_500), ..Default::default() },
            roles: ["purger", "dispatcher", "delayer", "access"].map(role).into(),
            nodes: Some((0..nodes).map(node).collect()),
            nodes_unknown: None,
            sessions: Sessions {
                total: Some(19_000 * nodes as u64),
                by_app: (0..50).map(|n| (format!("app-{n}"), 1_000 - n)).collect(),
                by_platform: [("ios".into(), 700), ("web".into(), 7_000)].into(),
                by_sdk: BTreeMap::new(),
            },
            problems: vec![Problem {
                of: "purger a:1".into(),
                problem: "kafka: away".repeat(20),
                reports: vec![],
                consequences: vec!["access-99: lease: no renewal".into()],
            }],
        }
    }

    #[test]
    fn no_line_is_wider_and_no_frame_higher_than_the_terminal() {
        let out = Output::plain();
        for (columns, rows) in [(80, 24), (40, 10), (131, 50), (132, 50), (200, 50), (80, 3)] {
            for nodes in [0, 1, 100] {
                for from in [0, 7, 10_000] {
                    let mut view = View { from, ..Default::default() };
                    let lines = page(&sample(nodes), (columns, rows), "1 s", &mut view, out);
                    assert_eq!(lines.len(), rows, "{columns}x{rows}");
                    for line in lines {
                        assert!(line.chars().count() <= columns, "{columns}: {line}");
                    }
                }
            }
        }
    }

    #[test]
    fn hazard_117_problems_come_first_and_nothing_is_out_of_reach() {
        let mut view = View::default();
        let shown =
            |view: &mut View| page(&sample(100), (80, 24), "1 s", view, Output::plain()).join("\n");
        let first = shown(&mut view);
        let second_line = first.lines().nth(1).unwrap();
        assert!(second_line.starts_with("! purger a:1: kafka: away"), "{first}");
        let problem: String = first.lines().filter(|line| line.contains("away")).collect();
        assert_eq!(problem.matches("away").count(), 20, "wrapped, not cut: {first}");
        assert!(
            first.contains("scroll, lines 1 to 22 of ") && first.contains("q quit  ? help"),
            "{first}"
        );
        view.from = usize::MAX;
        let last = shown(&mut view);
        assert!(last.contains("access-99-with") && last.contains("platform"), "{last}");
        view = View { filter: "access-77-".into(), ..Default::default() };
        let one = shown(&mut view);
        assert!(one.contains("access-77-") && !one.contains("access-78-"), "{one}");
        assert!(!one.contains("accepted") && !one.contains("scroll"), "{one}");
        view.help = true;
        assert!(shown(&mut view).contains("scroll by a line"));
    }

    #[test]
    fn hazard_117_roles_of_one_process_are_one_process() {
        let mut sample = sample(1);
        sample.sessions.total = Some(1);
        sample.roles.iter_mut().for_each(|role| role.process_id = Some(7));
        let text = lines(&sample, 80, "1 s", Output::plain()).join("\n");
        assert!(text.contains("1 process, 1 session "), "{text}");
        assert_eq!(text.matches("with purger").count(), 3, "{text}");
        sample.roles[3].process_id = Some(8);
        assert_eq!(sample.processes(), 2);
        // Another machine has processes with the same ids.
        sample.roles[3].process_id = Some(7);
        sample.roles[3].admin = "10.0.0.2:7082".into();
        assert_eq!(sample.processes(), 2);
    }

    #[test]
    fn everything_that_matters_is_shown() {
        for columns in [80, 200] {
            let text = lines(&sample(2), columns, "1 s", Output::plain()).join("\n");
            for part in [
                "1,002",
                "produced to taken",
                "0.42 ms",
                "1.23 s",
                "2.5 s late",
                "19,000",
                "1 problem",
                "kafka: away",
                "38,000 sessions",
                "dispatcher",
                "01:02:03 UTC",
                "4+4+4 partitions",
                "platform web 7,000, ios 700",
                "sessions by app      app-0 1,000, app-1 999, ",
                " more",
            ] {
                assert!(text.contains(part), "{columns}: no {part} in\n{text}");
            }
        }
    }

    /// A cluster of four roles and two nodes, with every hop of single messages.
    fn small() -> Sample {
        let mut small = sample(2);
        let hops = runtime_hops().into_iter().filter(|name| !name.starts_with("fanout"));
        small.hops = hops
            .map(|name| Hop {
                hop: name.into(),
                count: 12_345,
                p50_ms: Some(0.421),
                p99_ms: Some(1234.0),
                since_start: false,
            })
            .collect();
        let nodes = small.nodes.as_mut().unwrap();
        for (node, name) in
            nodes.iter_mut().zip(["access-127.0.0.1-7081", "dispatcher-127.0.0.1-7091"])
        {
            (node.node, node.address) = (name.into(), "127.0.0.1:7091".into());
        }
        small.problems.clear();
        small
    }

    fn runtime_hops() -> Vec<&'static str> {
        barid_runtime::Hop::ALL.iter().map(|hop| hop.as_str()).collect()
    }

    #[test]
    fn hazard_128_a_small_cluster_fits_in_80x24() {
        let shown = |sample: &Sample, view: &mut View| {
            page(sample, (80, 24), "1 s", view, Output::plain()).join("\n")
        };
        let mut small = small();
        let text = shown(&small, &mut View::default());
        assert!(!text.contains("scroll"), "{text}");
        for part in ["produced to acked", "dispatcher-127.0.0.1-7091 ", "SDK", "to devices"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        // Redis is away: one line more, and no leases.
        small.nodes = None;
        small.nodes_unknown = Some("Redis does not return the leases");
        let problem = "redis 127.0.0.1:7379 is away: no answer in time";
        let consequences = vec!["access h:4: lease: no renewal for 15 s".into(); 4];
        small.problems = vec![Problem {
            of: "all roles".into(),
            problem: problem.into(),
            reports: vec![],
            consequences,
        }];
        let text = shown(&small, &mut View::default());
        assert!(!text.contains("scroll") && !text.contains("no renewal"), "{text}");
        assert!(text.contains("1 problem ") && text.contains("nodes  ?  Redis does not"), "{text}");
        let mut view = View { details: true, ..Default::default() };
        assert!(shown(&small, &mut view).contains("access h:4: lease: no renewal"), "details");
    }

    #[test]
    fn hazard_128_hops_that_span_others_give_way_only_if_the_rest_then_fits() {
        let mut small = small();
        let hop = |name: &str| Hop {
            hop: name.into(),
            count: 1,
            p50_ms: Some(0.421),
            p99_ms: Some(1234.0),
            since_start: true,
        };
        small.hops.extend(["fanout_dispatched_written", "fanout_produced_written"].map(hop));
        let shown = |sample: &Sample, rows| {
            page(sample, (80, rows), "1 s", &mut View::default(), Output::plain()).join("\n")
        };
        let text = shown(&small, 24);
        assert!(!text.contains("scroll") && !text.contains("produced to acked"), "{text}");
        assert!(text.contains("fan-out dispatched to written*"), "{text}");
        assert!(shown(&small, 30).contains("fan-out produced to written*"));
        assert!(shown(&small, 15).contains("produced to acked"), "out of reach otherwise");
    }

    #[test]
    fn hazard_127_unknown_numbers_are_question_marks() {
        let mut gone = sample(0);
        (gone.roles, gone.hops, gone.nodes) = (vec![], vec![], None);
        (gone.lags, gone.rates, gone.sessions) = Default::default();
        let text = lines(&gone, 80, "1 s", Output::plain()).join("\n");
        assert!(text.contains("? sessions"), "{text}");
        for name in ["Kafka lag", "in flight", "timers", "claimed", "to devices"] {
            let line = text.lines().find(|line| line.contains(name)).unwrap();
            assert!(line.ends_with(" ?"), "{line}");
        }
        let numbers = text.lines().skip(1).collect::<String>();
        assert!(!numbers.contains(" 0") && !numbers.contains("on time"), "{text}");
        assert!(!text.contains("no messages yet"), "{text}");
    }
}
