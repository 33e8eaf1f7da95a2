//! Formats a sample: its sections one below the other in 80 columns, side by side in a wide terminal.

use crate::output::{Output, Tone, bytes, clean, clock, span};

use super::sample::{Hop, NodeState, RoleState, Sample};

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

/// The lines of a sample for a terminal of this size.
pub fn lines(
    sample: &Sample,
    columns: usize,
    rows: usize,
    every: &str,
    out: Output,
) -> Vec<String> {
    let mut lines = vec![heading(sample, columns, every), Line::default()];
    let wide = columns >= WIDE;
    let flow = flow(sample);
    let room = rows.saturating_sub(2);
    if wide {
        let right = columns - LEFT;
        let who = who(sample, right, room);
        lines.extend(beside(flow, who));
    } else {
        let left = room.saturating_sub(flow.len());
        lines.extend(flow);
        lines.extend(who(sample, columns.min(NARROW), left));
    }
    lines.truncate(rows);
    lines.iter().map(|line| line.paint(columns, out)).collect()
}

fn heading(sample: &Sample, columns: usize, every: &str) -> Line {
    let sessions: u64 = sample.nodes.iter().map(|node| node.sessions).sum();
    let (tone, state) = match sample.problems.len() {
        0 => (Tone::Good, "all is well".to_owned()),
        1 => (Tone::Bad, "1 problem".to_owned()),
        count => (Tone::Bad, format!("{count} problems")),
    };
    let line = Line::of(Tone::Strong, "Barid ")
        .and(Some(tone), format!(" {state}"))
        .and(None, format!("  {} processes, {} sessions", sample.roles.len(), number(sessions)));
    let time = clock(sample.at_ms);
    let right = format!("{} UTC, every {every}", time.split('.').next().unwrap_or_default());
    let gap = columns.saturating_sub(line.width() + right.chars().count()).max(2);
    line.and(None, " ".repeat(gap)).and(Some(Tone::Faint), right)
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
    lines.extend(sample.hops.iter().map(hop));
    if sample.hops.is_empty() {
        lines.push(Line::of(Tone::Faint, "  no messages yet"));
    } else if sample.hops.iter().all(|hop| hop.since_start) {
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

/// Problems, then processes and nodes, as far as there is room.
fn who(sample: &Sample, columns: usize, room: usize) -> Vec<Line> {
    let mut lines = Vec::new();
    if !sample.problems.is_empty() {
        lines.push(Line::of(Tone::Bad, "  problems"));
        for problem in &sample.problems {
            let text = format!("  {:<28} {}", clean(&problem.of), clean(&problem.problem));
            lines.push(Line::plain(text));
        }
        lines.push(Line::default());
    }
    if !sample.roles.is_empty() {
        lines.push(header(format!(
            "{:<12}{:>8}{:>11}  {:<10}{}",
            "process", "cpu", "memory", "", "admin"
        )));
        lines.extend(sample.roles.iter().map(role));
        lines.push(Line::default());
    }
    let left = room.saturating_sub(lines.len() + 1);
    lines.extend(nodes(&sample.nodes, left, columns));
    lines
}

fn role(role: &RoleState) -> Line {
    let (tone, state) = if role.ready { (Tone::Good, "ready") } else { (Tone::Bad, "not ready") };
    let cpu = format!("{:.1} %", role.cpu_percent);
    Line::plain(format!("  {:<12}{cpu:>8}{:>11}  ", clean(&role.role), bytes(role.memory_bytes)))
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

/// The nodes with most sessions, as far as there is room.
fn nodes(nodes: &[NodeState], room: usize, columns: usize) -> Vec<Line> {
    if nodes.is_empty() {
        return Vec::new();
    }
    let mut sorted: Vec<&NodeState> = nodes.iter().collect();
    sorted.sort_by(|a, b| a.role.cmp(b.role).then(b.sessions.cmp(&a.sessions)));
    let wide = columns >= 90;
    let name = if wide { 34 } else { 26 };
    let mut lines = vec![header(format!(
        "{:<name$} {:<11}{:>9}  {:<9} {:<22}{}",
        "node",
        "role",
        "sessions",
        "state",
        "address",
        if wide { "zone" } else { "" },
    ))];
    let shown = if sorted.len() > room { room.max(4) - 1 } else { sorted.len() };
    for node in sorted.iter().take(shown) {
        let tone = if node.state == "serving" { Tone::Good } else { Tone::Warn };
        let sessions = if node.role == "access" { number(node.sessions) } else { String::new() };
        let id: String = clean(&node.node).chars().take(name).collect();
        let address = format!("{:<22}", clean(&node.address));
        let zone = if wide { clean(&node.zone) } else { String::new() };
        lines.push(
            Line::plain(format!("  {id:<name$} {:<11}{sessions:>9}  ", node.role))
                .and(Some(tone), format!("{:<9}", node.state))
                .and(None, format!(" {address}{zone}")),
        );
    }
    if shown < sorted.len() {
        lines.push(Line::of(Tone::Faint, format!("  and {} more", sorted.len() - shown)));
    }
    lines
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
            problems: vec![Problem { of: "purger a:1".into(), problem: "kafka: away".repeat(20) }],
        }
    }

    #[test]
    fn no_line_is_wider_and_no_frame_higher_than_the_terminal() {
        let out = Output::plain();
        for (columns, rows) in [(80, 24), (40, 10), (131, 50), (132, 50), (200, 50), (80, 3)] {
            for nodes in [0, 1, 100] {
                let lines = lines(&sample(nodes), columns, rows, "1 s", out);
                assert!(lines.len() <= rows, "{columns}x{rows}");
                for line in lines {
                    assert!(line.chars().count() <= columns, "{columns}: {line}");
                }
            }
        }
    }

    #[test]
    fn everything_that_matters_is_shown() {
        for columns in [80, 200] {
            let text = lines(&sample(2), columns, 50, "1 s", Output::plain()).join("\n");
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
            ] {
                assert!(text.contains(part), "{columns}: no {part} in\n{text}");
            }
        }
    }
}
