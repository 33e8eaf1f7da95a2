//! Formats a sample: problems first, then its sections, one below the other in 80 columns, side by side in a wide
//! terminal.

use std::collections::BTreeMap;

use crate::output::{Output, Tone, bytes, clean, clock, span};

use super::sample::{Hop, NodeState, RoleState, Sample, Sessions};

/// From this width on, rates and lags are left of processes and nodes.
const WIDE: usize = 132;
/// Width of rates and lags, and of everything in a narrow terminal.
const NARROW: usize = 78;
const LEFT: usize = 62;

/// A line of pieces of coloured text.
#[derive(Debug, Default, Clone)]
struct Line(Vec<(Option<Tone>, String)>);

impl Line {
    fn plain(text: impl Into<String>) -> Self {
        Self::default().and(None, text)
    }

    fn of(tone: Tone, text: impl Into<String>) -> Self {
        Self::default().and(Some(tone), text)
    }

    fn and(mut self, tone: Option<Tone>, text: impl Into<String>) -> Self {
        self.0.push((tone, text.into()));
        self
    }

    fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text.chars().count()).sum()
    }

    fn contains(&self, text: &str) -> bool {
        self.0.iter().map(|(_, part)| part.as_str()).collect::<String>().contains(text)
    }

    /// The coloured text, cut at `width`.
    fn paint(&self, width: usize, out: Output) -> String {
        let mut left = width;
        let mut painted = String::new();
        for (tone, text) in &self.0 {
            let text: String = text.chars().take(left).collect();
            left -= text.chars().count();
            match tone {
                Some(tone) => painted += &out.paint(*tone, text),
                None => painted += &text,
            }
        }
        painted
    }
}

/// All lines of a sample, for a terminal with this many columns.
pub fn lines(sample: &Sample, columns: usize, every: &str, out: Output) -> Vec<String> {
    let lines = [vec![heading(sample, columns, every)], body(sample, columns, "")].concat();
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
}

/// A screen of a sample: the heading, a part of the body, and the keys. Moves the view back to what there is.
pub fn page(
    sample: &Sample,
    (columns, rows): (usize, usize),
    every: &str,
    view: &mut View,
    out: Output,
) -> Vec<String> {
    let body = if view.help { help() } else { body(sample, columns, &view.filter) };
    let room = rows.saturating_sub(2);
    view.from = view.from.min(body.len().saturating_sub(room));
    let to = body.len().min(view.from + room);
    let mut lines = vec![heading(sample, columns, every)];
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
    let mut keys = " q quit  ? help  / filter".to_owned();
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
    ]
    .map(|text| Line::plain(format!("  {text}")))
    .into()
}

/// Problems, then rates and lags, processes and nodes; side by side in a wide terminal.
fn body(sample: &Sample, columns: usize, filter: &str) -> Vec<Line> {
    let mut lines = problems(sample, columns, filter);
    let flow = flow(sample);
    if columns >= WIDE {
        lines.extend(beside(flow, who(sample, columns - LEFT, filter)));
    } else {
        lines.extend(flow);
        lines.extend(who(sample, columns.min(NARROW), filter));
    }
    lines
}

/// The problems, in lines of the terminal's width.
fn problems(sample: &Sample, columns: usize, filter: &str) -> Vec<Line> {
    let width = columns.saturating_sub(4).max(20);
    let mut lines = Vec::new();
    for problem in &sample.problems {
        let text = format!("{}: {}", clean(&problem.of), clean(&problem.problem));
        if !text.contains(filter) {
            continue;
        }
        let wrapped = wrap(&text, width).into_iter().enumerate();
        lines.extend(wrapped.map(|(at, part)| {
            Line::of(Tone::Bad, if at == 0 { "! " } else { "  " }).and(None, part)
        }));
    }
    if !lines.is_empty() {
        lines.push(Line::default());
    }
    lines
}

/// Lines of at most `width` characters, broken at spaces where there are any.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let line = lines.last_mut().expect("there is a first line");
            let used = line.chars().count();
            let gap = usize::from(used > 0);
            if used + gap + word.len() <= width {
                line.extend(" ".chars().take(gap).chain(word));
                break;
            }
            if used > 0 {
                lines.push(String::new());
            } else {
                line.extend(word.drain(..width));
                lines.push(String::new());
            }
        }
    }
    lines
}

fn heading(sample: &Sample, columns: usize, every: &str) -> Line {
    let sessions: u64 = sample.nodes.iter().map(|node| node.sessions).sum();
    let (tone, state) = match sample.problems.len() {
        0 => (Tone::Good, "all is well".to_owned()),
        count => (Tone::Bad, counted(count as u64, "problem", "problems")),
    };
    let processes = counted(sample.processes() as u64, "process", "processes");
    let sessions = counted(sessions, "session", "sessions");
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

/// Rates, hops, lags.
fn flow(sample: &Sample) -> Vec<Line> {
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
        let bad = matches!(name, "re-sent" | "refused") && rate > 0.0;
        let tone = if bad { Tone::Warn } else { Tone::Strong };
        values = values.and(Some(tone), format!("{:>9}", number(rate.round() as u64)));
    }
    let mut lines = vec![Line::of(Tone::Faint, format!(" {names}  /s")), values, Line::default()];
    lines.push(header(format!("{:<26}{:>10}{:>10}{:>11}", "hop", "p50", "p99", "messages")));
    let hops: Vec<&Hop> = sample.hops.iter().filter(|hop| hop.count > 0).collect();
    lines.extend(hops.iter().map(|one| hop(one)));
    if hops.is_empty() {
        lines.push(Line::of(Tone::Faint, "  no messages yet"));
    } else if hops.iter().all(|hop| hop.since_start) {
        lines.push(Line::of(Tone::Faint, "  no messages in the last seconds: all since the start"));
    }
    lines.push(Line::default());
    lines.extend(waiting(sample));
    lines.push(Line::default());
    lines
}

fn header(text: impl Into<String>) -> Line {
    Line::of(Tone::Faint, format!("  {}", text.into()))
}

fn hop(hop: &Hop) -> Line {
    let name = clean(&hop.hop).replacen('_', " to ", 1);
    let ms = |value: Option<f64>| value.map_or_else(|| "-".into(), milliseconds);
    let tone = hop.since_start.then_some(Tone::Faint);
    let text = format!(
        "  {name:<26}{:>10}{:>10}{:>11}",
        ms(hop.p50_ms),
        ms(hop.p99_ms),
        number(hop.count)
    );
    Line::default().and(tone, text)
}

fn waiting(sample: &Sample) -> Vec<Line> {
    let lags = &sample.lags;
    let late = match lags.timers_late_ms {
        0..1_000 => "on time".to_owned(),
        ms => format!("{} late", span(ms)),
    };
    let cells = [
        ("Kafka lag", format!("{} records", number(lags.kafka_records))),
        ("in flight", format!("{} records", number(lags.in_flight_records))),
        ("timers", format!("{late}, {} claimed", number(lags.timers_claimed))),
        ("queued for devices", bytes(lags.queued_bytes)),
    ];
    let mut lines = vec![header("waiting")];
    for pair in cells.chunks(2) {
        let mut line = Line::plain("  ");
        for (name, value) in pair {
            line = line.and(None, format!("{:<30}", format!("{name} {value}")));
        }
        lines.push(line);
    }
    lines
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
        lines.push(Line::default());
    }
    lines.extend(nodes(&sample.nodes, columns, filter));
    lines.extend(sessions(&sample.sessions, columns));
    lines
}

/// Sessions by app, platform and SDK, the most frequent names first, as many as a line holds.
fn sessions(sessions: &Sessions, columns: usize) -> Vec<Line> {
    let kinds =
        [("app", &sessions.by_app), ("platform", &sessions.by_platform), ("SDK", &sessions.by_sdk)];
    if kinds.iter().all(|(_, names)| names.is_empty()) {
        return Vec::new();
    }
    let mut lines = vec![Line::default(), header("sessions by")];
    for (kind, names) in kinds {
        let room = columns.saturating_sub(14).max(20);
        lines.push(Line::plain(format!("  {kind:<10}{}", most_frequent(names, room))));
    }
    lines
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
            format!("{:>8}{:>11}", format!("{:.1} %", role.cpu_percent), bytes(role.memory_bytes))
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
    let wide = columns >= 90;
    let width = if wide { 34 } else { 24 };
    let mut lines = vec![header(format!(
        "{:<width$} {:<10} {:>8}  {:<8} {:<21}{}",
        "node",
        "role",
        "sessions",
        "state",
        "address",
        if wide { " zone" } else { "" },
    ))];
    let rows = sorted.into_iter().map(|node| {
        let tone = if node.state == "serving" { Tone::Good } else { Tone::Warn };
        let sessions = if node.role == "access" { number(node.sessions) } else { String::new() };
        let id = cut(&clean(&node.node), width);
        let address = format!("{:<21}", cut(&clean(&node.address), if wide { 40 } else { 21 }));
        let zone = if wide { format!(" {}", clean(&node.zone)) } else { String::new() };
        Line::plain(format!("  {id:<width$} {:<10} {sessions:>8}  ", node.role))
            .and(Some(tone), format!("{:<8}", node.state))
            .and(None, format!(" {address}{zone}"))
    });
    lines.extend(rows.filter(|line| line.contains(filter)));
    lines
}

/// A text of at most `width` characters, with a mark where it was cut.
fn cut(text: &str, width: usize) -> String {
    match text.chars().count() > width {
        true => text.chars().take(width - 1).chain(['\u{2026}']).collect(),
        false => text.to_owned(),
    }
}

fn beside(left: Vec<Line>, right: Vec<Line>) -> Vec<Line> {
    let rows = left.len().max(right.len());
    let (mut left, mut right) = (left.into_iter(), right.into_iter());
    let joined = (0..rows).map(|_| {
        let (line, more) = (left.next().unwrap_or_default(), right.next().unwrap_or_default());
        let gap = LEFT.saturating_sub(line.width());
        let mut line = line.and(None, " ".repeat(gap));
        line.0.extend(more.0);
        line
    });
    joined.collect()
}

/// With separators: `12,345`.
fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut shown = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

/// Three significant digits.
fn milliseconds(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 100.0 => format!("{ms:.1} ms"),
        ms if ms < 1_000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.2} s", ms / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::sample::{Lags, Problem, Rates};

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
            cpu_percent: 99.9,
            memory_bytes: 123_000_000,
            process_id: 0,
            partitions: match name {
                "purger" => ["high", "push", "bulk"].map(|topic| (topic.to_owned(), 4)).into(),
                _ => Default::default(),
            },
        };
        Sample {
            event: "sample",
            at_ms: 3_723_004,
            rates: Rates { taken_per_s: 1_002.4, ..Default::default() },
            hops: vec![hop("produced_taken"), hop("dispatched_written")],
            lags: Lags { timers_late_ms: 2_500, ..Default::default() },
            roles: ["purger", "dispatcher", "delayer", "access"].map(role).into(),
            nodes: (0..nodes).map(node).collect(),
            sessions: Sessions {
                by_app: (0..50).map(|n| (format!("app-{n}"), 1_000 - n)).collect(),
                by_platform: [("ios".into(), 700), ("web".into(), 7_000)].into(),
                by_sdk: BTreeMap::new(),
            },
            problems: vec![Problem { of: "purger a:1".into(), problem: "kafka: away".repeat(20) }],
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
        view.help = true;
        assert!(shown(&mut view).contains("scroll by a line"));
    }

    #[test]
    fn hazard_117_roles_of_one_process_are_one_process() {
        let mut sample = sample(1);
        sample.nodes[0].sessions = 1;
        sample.roles.iter_mut().for_each(|role| role.process_id = 7);
        let text = lines(&sample, 80, "1 s", Output::plain()).join("\n");
        assert!(text.contains("1 process, 1 session "), "{text}");
        assert_eq!(text.matches("with purger").count(), 3, "{text}");
        sample.roles[3].process_id = 8;
        assert_eq!(sample.processes(), 2);
        // Another machine has processes with the same ids.
        sample.roles[3].process_id = 7;
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
                "platform  web 7,000, ios 700",
                "app       app-0 1,000, app-1 999, ",
                " more",
            ] {
                assert!(text.contains(part), "{columns}: no {part} in\n{text}");
            }
        }
    }
}
