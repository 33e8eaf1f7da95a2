//! The report as a self-contained HTML page.

use std::fmt::Write as _;

use super::data::{Repeated, Report, Scenario};
use super::escape::escaped;
use super::plot::{Axes, Line, Plot};
use crate::live::{Latencies, Series, clock, thousands};

const STYLE: &str = include_str!("report.css");
const MIB: f64 = 1024.0 * 1024.0;
/// Memory is drawn for scenarios that take at least this long.
const MEMORY_SECONDS: f64 = 20.0;
/// A line over time needs this many points above zero.
const POINTS_MIN: usize = 5;
/// A line over connections needs this many different numbers of them.
const CONNECTIONS_MIN: usize = 6;

pub fn page(report: &Report) -> String {
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>Barid bench {}</title><style>{STYLE}</style></head><body>",
        escaped(&report.started)
    );
    head(&mut page, report);
    measures(&mut page, &report.measures);
    for scenario in &report.scenarios {
        section(&mut page, scenario);
    }
    foot(&mut page, report);
    page.push_str("</body></html>\n");
    page
}

fn head(page: &mut String, report: &Report) {
    let goals: Vec<bool> = report.measures.iter().filter_map(|row| row.measure.met).collect();
    let met = goals.iter().filter(|met| **met).count();
    let failed = report.scenarios.iter().filter(|scenario| scenario.failed.is_some()).count();
    let date = report.started.replace('T', " ").replace('Z', " UTC");
    let commit = report.commit.as_ref().map(|commit| format!(" · {}", escaped(commit)));
    let _ = write!(
        page,
        "<header><h1>Barid bench</h1><p class=\"sub\">{} · version {}{}</p><ul class=\"chips\">",
        escaped(&date),
        escaped(&report.version),
        commit.unwrap_or_default()
    );
    if !goals.is_empty() {
        let class = if met == goals.len() { "good" } else { "bad" };
        let _ =
            write!(page, "<li class=\"{class}\"><b>{met}</b> of {} goals met</li>", goals.len());
    }
    if failed > 0 {
        let _ = write!(page, "<li class=\"bad\"><b>{failed}</b> failed</li>");
    }
    let scenarios = match report.scenarios.len() {
        1 => "<b>1</b> scenario".to_owned(),
        number => format!("<b>{number}</b> scenarios"),
    };
    let _ = write!(
        page,
        "<li><b>{}</b> minutes</li><li>{scenarios}</li></ul></header>",
        clock(report.seconds)
    );
}

fn measures(page: &mut String, rows: &[Repeated]) {
    page.push_str(
        "<section><h2>Measures</h2><p class=\"key\"><span><i class=\"barid\"></i>Barid</span>\
         <span><i class=\"floor\"></i>floor: the barest program in the same run</span>\
         <span><i class=\"goal\"></i>goal</span></p>\
         <table><thead><tr><th>Measure<th class=\"n\">Barid<th class=\"n\">Floor<th class=\"n\">Ratio\
         <th class=\"n\">Goal<th><th class=\"v\"></tr></thead><tbody>",
    );
    for row in rows {
        measure(page, row);
    }
    page.push_str("</tbody></table></section>");
}

fn measure(page: &mut String, row: &Repeated) {
    let measure = &row.measure;
    let sign = if measure.more_is_better() { "≥" } else { "≤" };
    let verdict = match measure.met {
        Some(true) => "<span class=\"tag good\">met</span>",
        Some(false) => "<span class=\"tag bad\">missed</span>",
        None => "",
    };
    let goal = measure.goal.map(|goal| format!("{sign} {}", number(goal)));
    let unit = if measure.unit.is_empty() { "" } else { " " };
    let spread = spread(&row.values).map(|spread| format!("<small>{spread}</small>"));
    let _ = write!(
        page,
        "<tr><td class=\"m\"><code>{}</code><td class=\"n\" data-of=\"Barid\"><b>{}</b>{unit}<u>{}</u>{}\
         <td class=\"n\" data-of=\"Floor\">{}<td class=\"n\" data-of=\"Ratio\">{}\
         <td class=\"n\" data-of=\"Goal\">{}<td class=\"bar\">{}<td class=\"v\">{verdict}</tr>",
        escaped(&measure.measure).replace('_', "_<wbr>"),
        number(measure.barid),
        escaped(&measure.unit),
        spread.unwrap_or_default(),
        measure.floor.map_or_else(|| "–".into(), number),
        measure.ratio.map_or_else(|| "–".into(), |ratio| format!("{}×", number(ratio))),
        goal.unwrap_or_else(|| "–".into()),
        bar(measure.barid, measure.floor, measure.goal, measure.met),
    );
}

/// The range of several runs.
fn spread(values: &[f64]) -> Option<String> {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (values.len() > 1)
        .then(|| format!("{} to {}, {} runs", number(least), number(largest), values.len()))
}

/// Barid's value as a bar with marks for floor and goal; empty if there is neither.
fn bar(barid: f64, floor: Option<f64>, goal: Option<f64>, met: Option<bool>) -> String {
    let largest = [Some(barid), floor, goal].into_iter().flatten().fold(0.0, f64::max);
    if largest <= 0.0 || floor.or(goal).is_none() {
        return String::new();
    }
    let at = |value: f64| (value / largest * 100.0).clamp(0.0, 100.0);
    // The part between the value and a missed goal.
    let off = goal.filter(|_| met == Some(false)).map_or_else(String::new, |goal| {
        let (from, to) = (at(goal.min(barid)), at(goal.max(barid)));
        format!(
            "<rect class=\"off\" x=\"{from:.2}\" y=\"4\" width=\"{:.2}\" height=\"6\"/>",
            to - from
        )
    });
    let mark = |class: &str, value: Option<f64>| {
        value.map_or_else(String::new, |value| {
            format!(
                "<rect class=\"{class}\" x=\"{:.2}\" width=\"0.8\" height=\"14\"/>",
                at(value) * 0.992
            )
        })
    };
    format!(
        "<svg viewBox=\"0 0 100 14\" preserveAspectRatio=\"none\" aria-hidden=\"true\">\
         <rect class=\"track\" y=\"4\" width=\"100\" height=\"6\"/>\
         <rect class=\"barid\" y=\"4\" width=\"{:.2}\" height=\"6\"/>{off}{}{}</svg>",
        at(barid),
        mark("floor", floor),
        mark("goal", goal)
    )
}

/// The number with three significant digits, or without decimals.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 && value > 0.0 => thousands(value.round() as u64),
        _ => crate::measure::shown(value),
    }
}

fn section(page: &mut String, scenario: &Scenario) {
    let repetition = match scenario.repetition {
        0 | 1 => String::new(),
        number => format!(", repetition {number}"),
    };
    let _ = write!(
        page,
        "<section><h2>{}{repetition} <small>{}</small></h2>",
        escaped(&scenario.scenario),
        clock(scenario.seconds)
    );
    if let Some(why) = &scenario.failed {
        let _ = write!(page, "<p class=\"failed\">Failed: {}</p>", escaped(why));
    }
    let figures: Vec<String> =
        latency_figures(scenario).into_iter().chain(series_figures(scenario)).collect();
    if !figures.is_empty() {
        let has_floor = scenario.recorded.series.iter().any(|series| series.server == "floor")
            || scenario.recorded.latencies.iter().any(|latencies| latencies.server == "floor");
        let floor = if has_floor { "<span><i class=\"floor\"></i>floor</span>" } else { "" };
        let _ =
            write!(page, "<p class=\"key\"><span><i class=\"barid\"></i>Barid</span>{floor}</p>");
        let _ = write!(page, "<div class=\"plots\">{}</div>", figures.concat());
    }
    for table in &scenario.recorded.tables {
        let _ = write!(page, "<pre>{}</pre>", escaped(&table.to_string()));
    }
    page.push_str("</section>");
}

fn figure(plot: &Plot<'_>, caption: &str) -> Option<String> {
    let caption =
        if caption.is_empty() { String::new() } else { format!("<small>{caption}</small>") };
    let title = escaped(plot.title);
    Some(format!("<figure><figcaption>{title}</figcaption>{}{caption}</figure>", plot.svg()?))
}

/// One figure for each kind of time, with a line for the floor and one for Barid.
fn latency_figures(scenario: &Scenario) -> Vec<String> {
    let all = &scenario.recorded.latencies;
    let mut kinds: Vec<&str> = Vec::new();
    for latencies in all {
        if !kinds.contains(&latencies.what.as_str()) {
            kinds.push(&latencies.what);
        }
    }
    let of = |kind: &str| {
        let both: Vec<_> = all.iter().filter(|latencies| latencies.what == kind).collect();
        let lines = both.iter().map(|latencies| Line {
            class: class(&latencies.server),
            points: quantile_points(latencies),
        });
        let plot = Plot {
            title: &format!("{kind}: time by percentile"),
            x_name: "percentile",
            y_name: "ms",
            axes: Axes::Percentiles,
            lines: lines.collect(),
            marks: Vec::new(),
        };
        let captions: Vec<String> = both.iter().map(|latencies| caption(latencies)).collect();
        figure(&plot, &captions.join("<br>"))
    };
    kinds.into_iter().filter_map(of).collect()
}

/// The maximum of n values is drawn at the share 1 - 0.5 / n.
fn quantile_points(latencies: &Latencies) -> Vec<(f64, f64)> {
    let end = 1.0 - 0.5 / latencies.count.max(1) as f64;
    latencies.quantiles.iter().map(|at| (at.share.min(end), at.ms)).collect()
}

fn caption(latencies: &Latencies) -> String {
    let at = |share: f64| {
        let found = latencies.quantiles.iter().find(|at| at.share >= share);
        found.map_or_else(|| "–".into(), |at| number(at.ms))
    };
    format!(
        "<i class=\"{}\"></i>p50 {} · p90 {} · p99 {} · p99.9 {} · max {} ms of {}",
        class(&latencies.server),
        at(0.5),
        at(0.9),
        at(0.99),
        at(0.999),
        at(1.0),
        thousands(latencies.count)
    )
}

fn class(server: &str) -> &'static str {
    if server == "floor" { "floor" } else { "barid" }
}

fn series_figures(scenario: &Scenario) -> Vec<String> {
    let all = &scenario.recorded.series;
    let lines = |of: &dyn Fn(&Series) -> Vec<(f64, f64)>| -> Vec<Line> {
        all.iter().map(|series| Line { class: class(&series.server), points: of(series) }).collect()
    };
    let marks = || all.last().map(marks).unwrap_or_default();
    let over_time = |title: &str, y_name: &str, of: &dyn Fn(&Series) -> Vec<(f64, f64)>| {
        let lines = lines(of);
        let above_zero = |line: &Line| line.points.iter().filter(|(_, y)| *y > 0.0).count();
        let is_something = lines.iter().map(above_zero).sum::<usize>() >= POINTS_MIN;
        let plot =
            Plot { title, x_name: "seconds", y_name, axes: Axes::Linear, lines, marks: marks() };
        figure(&plot, "").filter(|_| is_something)
    };
    let mut figures = vec![
        over_time("Deliveries", "a second", &|series| rates(series, |sample| sample.delivered)),
        over_time("Connections opened", "a second", &|series| {
            rates(series, |sample| sample.opened)
        }),
    ];
    let is_long = all.iter().any(|series| span(series) >= MEMORY_SECONDS);
    if is_long {
        figures.push(over_time("Memory of the server", "MiB", &memory_over_time));
    }
    figures.push(over_time("Tasks of the server", "tasks", &tasks_over_time));
    let is_spread = |series: &Series| {
        let mut seen: Vec<u32> = series.samples.iter().map(|sample| sample.sessions).collect();
        seen.sort_unstable();
        seen.dedup();
        seen.len() >= CONNECTIONS_MIN
    };
    if is_long && all.iter().any(is_spread) {
        let plot = Plot {
            title: "Memory over connections",
            x_name: "sessions",
            y_name: "MiB",
            axes: Axes::Linear,
            lines: lines(&memory_over_sessions),
            marks: Vec::new(),
        };
        figures.push(figure(&plot, ""));
    }
    figures.into_iter().flatten().collect()
}

fn begun(series: &Series) -> f64 {
    series.samples.first().map_or(0.0, |sample| sample.at_s)
}

fn span(series: &Series) -> f64 {
    series.samples.last().map_or(0.0, |sample| sample.at_s) - begun(series)
}

fn marks(series: &Series) -> Vec<(f64, String)> {
    let begun = begun(series);
    let phases = series.phases.iter();
    phases.map(|phase| ((phase.at_s - begun).max(0.0), phase.phase.clone())).collect()
}

fn rates(series: &Series, of: impl Fn(&crate::live::Sample) -> u64) -> Vec<(f64, f64)> {
    let begun = begun(series);
    let pairs = series.samples.windows(2).map(|pair| {
        let over_s = (pair[1].at_s - pair[0].at_s).max(0.001);
        (pair[1].at_s - begun, of(&pair[1]).saturating_sub(of(&pair[0])) as f64 / over_s)
    });
    pairs.collect()
}

fn memory_over_time(series: &Series) -> Vec<(f64, f64)> {
    let begun = begun(series);
    let known = series.samples.iter().filter_map(|s| Some((s.at_s - begun, s.resident_bytes?)));
    known.map(|(at, bytes)| (at, bytes as f64 / MIB)).collect()
}

fn tasks_over_time(series: &Series) -> Vec<(f64, f64)> {
    let begun = begun(series);
    let known = series.samples.iter().filter_map(|s| Some((s.at_s - begun, s.tasks?)));
    known.map(|(at, tasks)| (at, tasks as f64)).collect()
}

fn memory_over_sessions(series: &Series) -> Vec<(f64, f64)> {
    let known =
        series.samples.iter().filter_map(|s| Some((f64::from(s.sessions), s.resident_bytes?)));
    known.map(|(sessions, bytes)| (sessions, bytes as f64 / MIB)).collect()
}

fn foot(page: &mut String, report: &Report) {
    let machine = &report.machine;
    let gib = machine.memory_bytes as f64 / (1024.0 * MIB);
    let _ = write!(
        page,
        "<footer><h2>Environment</h2><dl><dt>Machine<dd>{} × {}, {gib:.0} GiB<dt>System<dd>{}, {}\
         <dt>Load before<dd>{:.2}<dt>Command<dd><code>{}</code></dl>\
         <p>Every delivery was checked for order, gaps and repeats. Rates are open-loop: times are measured from \
         the moment at which a message or connection was due. Percentiles are from HDR histograms with three \
         significant digits, merged over all agents.</p></footer>",
        machine.cores,
        escaped(&machine.cpu),
        escaped(&machine.os),
        escaped(&machine.kernel),
        machine.load_before,
        escaped(&report.command)
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::{Quantile, Recorded, Sample};
    use crate::measure::{Goal, Measure};
    use crate::table::Table;

    #[test]
    fn a_page_shows_what_was_measured_and_no_text_becomes_markup() {
        let bad = "<script>alert(\"1\" & '2')</script>";
        let sample = |at_s: f64, sessions| Sample {
            at_s,
            sessions,
            opened: u64::from(sessions),
            resident_bytes: Some(30 << 20),
            ..Sample::default()
        };
        let samples = (0..40_u16).map(|s| sample(f64::from(s), u32::from(s) * 10)).collect();
        let series = vec![Series { server: "barid".into(), phases: Vec::new(), samples }];
        let quantiles = [(0.0, 1.0), (0.5, 2.0), (1.0, 90.0)];
        let quantiles = quantiles.map(|(share, ms)| Quantile { share, ms }).to_vec();
        let latencies =
            vec![Latencies { what: bad.into(), server: "barid".into(), count: 100, quantiles }];
        let mut report =
            Report { command: bad.into(), commit: Some(bad.into()), ..Report::begin() };
        report.measures = Repeated::of(&[
            Measure::new(bad, bad, Some(1.0), 2.0).against(Goal::AtMost(1.5)),
            Measure::new("left", "1/s", None, 0.0),
        ]);
        let mut table = Table::new(bad, &[bad]);
        table.row(bad, [Some(0.5)]);
        let recorded = Recorded { series, latencies, tables: vec![table] };
        let scenario = Scenario {
            scenario: bad.into(),
            repetition: 2,
            seconds: 61.0,
            failed: Some(bad.into()),
            recorded,
        };
        report.scenarios = vec![scenario];
        let page = page(&report);
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;"), "{page}");
        for wanted in ["missed", "Memory over connections", "p99.9", "0</b> of 1 goals", "01:01"] {
            assert!(page.contains(wanted), "{wanted}");
        }
        for elsewhere in ["http://", "https://", "src=", "href="] {
            assert!(!page.contains(elsewhere), "{elsewhere}");
        }
        assert!(!page.contains("NaN"));
    }
}
