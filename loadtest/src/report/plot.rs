//! Line plots as inline SVG, in the colours of the page. One unit is about one pixel of a phone.

use std::fmt::Write as _;

use super::escape::escaped;

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 216.0;
/// Edges of the area that the lines are drawn in.
const LEFT: f64 = 46.0;
const RIGHT: f64 = 344.0;
const TOP: f64 = 22.0;
const BOTTOM: f64 = 178.0;
/// Estimated widths of an x axis label and of a letter in a mark's name.
const LABEL_WIDTH: f64 = 40.0;
const LETTER_WIDTH: f64 = 4.8;
/// More points than this are not visible.
const POINTS_MAX: usize = 300;

/// How values map to positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Linear from zero.
    Linear,
    /// Logarithmic.
    Log,
    /// Shares from 0 to 1; the distances from 0.9 to 0.99 and from 0.99 to 0.999 are equal.
    Nines,
}

#[derive(Debug)]
pub struct Plot<'a> {
    pub title: &'a str,
    pub x_name: &'a str,
    pub x_scale: Scale,
    pub y_name: &'a str,
    pub y_scale: Scale,
    pub lines: Vec<Line>,
    /// Named positions on the x axis.
    pub marks: Vec<(f64, String)>,
}

#[derive(Debug)]
pub struct Line {
    /// `floor` or `barid`; the page has a colour for each.
    pub class: &'static str,
    pub points: Vec<(f64, f64)>,
}

/// An axis from `low` to `high`, drawn between two positions.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn position(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log => value.max(1e-9).log10(),
            Self::Nines => -(1.0 - value).max(1e-9).log10(),
        }
    }
}

impl Axis {
    /// The x axis ends with the largest value.
    fn x(scale: Scale, values: impl Iterator<Item = f64> + Clone) -> Self {
        let largest = values.clone().fold(f64::NEG_INFINITY, f64::max);
        let low = if scale == Scale::Log { values.fold(f64::INFINITY, f64::min) } else { 0.0 };
        let least_high = if scale == Scale::Nines { 0.9 } else { 1e-6 };
        Self { scale, low, high: largest.max(least_high), from: LEFT, to: RIGHT }
    }

    /// The y axis ends at a tick.
    fn y(scale: Scale, values: impl Iterator<Item = f64> + Clone) -> Self {
        let largest = values.clone().fold(f64::NEG_INFINITY, f64::max).max(1e-6);
        let (low, high) = match scale {
            Scale::Log => {
                let least = values.fold(f64::INFINITY, f64::min).max(largest / 1e5);
                (step_of(least, false), step_of(largest.max(least * 2.0), true))
            }
            Scale::Linear => (0.0, (largest / linear_step(largest)).ceil() * linear_step(largest)),
            Scale::Nines => (0.0, largest),
        };
        Self { scale, low, high, from: BOTTOM, to: TOP }
    }

    fn at(&self, value: f64) -> f64 {
        let (low, high) = (self.scale.position(self.low), self.scale.position(self.high));
        let share = (self.scale.position(value) - low) / (high - low).max(1e-12);
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let step = linear_step(self.high);
                let ticks = (self.high / step * 1.0001).floor() as u32;
                (0..=ticks).map(|tick| f64::from(tick) * step).collect()
            }
            Scale::Log => {
                let is_wide = self.high / self.low > 200.0;
                let steps: &[f64] = if is_wide { &[1.0] } else { &[1.0, 2.0, 5.0] };
                let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
                let each =
                    decades.flat_map(|d| steps.iter().map(move |step| step * 10_f64.powi(d)));
                let is_within = |tick: &f64| (self.low * 0.999..=self.high * 1.001).contains(tick);
                each.filter(is_within).collect()
            }
            Scale::Nines => {
                let known = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999];
                known.into_iter().filter(|tick| *tick <= self.high).collect()
            }
        }
    }

    fn label(&self, tick: f64) -> String {
        match self.scale {
            Scale::Nines if tick == 0.0 => "0".into(),
            Scale::Nines => format!("{}%", trimmed(tick * 100.0)),
            _ => short(tick),
        }
    }
}

/// 1, 2, 2.5 or 5 times a power of ten, such that the value has three to five ticks.
fn linear_step(value: f64) -> f64 {
    let wanted = value / 5.0;
    let power = 10_f64.powf(wanted.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * power);
    steps.into_iter().find(|step| *step >= wanted * 0.9999).unwrap_or(10.0 * power)
}

/// The next 1, 2 or 5 times a power of ten, upwards or downwards.
fn step_of(value: f64, up: bool) -> f64 {
    let steps = [0.0, 2_f64.log10(), 5_f64.log10(), 1.0];
    let (whole, rest) = (value.log10().floor(), value.log10().rem_euclid(1.0));
    let step = if up {
        steps.into_iter().find(|step| *step >= rest - 1e-9)
    } else {
        steps.into_iter().rev().find(|step| *step <= rest + 1e-9)
    };
    10_f64.powf(whole + step.unwrap_or(0.0))
}

/// The number in few characters.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1e9 => format!("{}G", trimmed(value / 1e9)),
        size if size >= 1e6 => format!("{}M", trimmed(value / 1e6)),
        size if size >= 1e3 => format!("{}k", trimmed(value / 1e3)),
        _ => trimmed(value),
    }
}

/// The number without trailing zeros.
fn trimmed(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Plot<'_> {
    /// The plot as SVG; `None` if it has fewer than two points.
    pub fn svg(&self) -> Option<String> {
        let points = || self.lines.iter().flat_map(|line| line.points.iter().copied());
        if points().count() < 2 {
            return None;
        }
        let x = Axis::x(self.x_scale, points().map(|(x, _)| x));
        let y = Axis::y(self.y_scale, points().map(|(_, y)| y));
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}: {} over {}\">",
            escaped(self.title),
            escaped(self.y_name),
            escaped(self.x_name)
        );
        self.axes(&mut svg, &x, &y);
        self.marks(&mut svg, &x);
        for line in &self.lines {
            let path = path(&thinned(&line.points), &x, &y);
            let _ = write!(svg, "<path class=\"line {}\" d=\"{path}\"/>", line.class);
        }
        svg.push_str("</svg>");
        Some(svg)
    }

    fn axes(&self, svg: &mut String, x: &Axis, y: &Axis) {
        for tick in y.ticks() {
            let (at, label) = (y.at(tick), y.label(tick));
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/>\
                 <text class=\"tick end\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>",
                LEFT - 5.0,
                at + 3.5
            );
        }
        let mut free_from = 0.0;
        for tick in x.ticks() {
            let (at, label) = (x.at(tick), x.label(tick));
            if at < free_from {
                continue;
            }
            free_from = at + LABEL_WIDTH;
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{at:.1} {BOTTOM}v4\"/>\
                 <text class=\"tick middle\" x=\"{at:.1}\" y=\"{:.1}\">{label}</text>",
                BOTTOM + 16.0
            );
        }
        let _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{LEFT} {BOTTOM}H{RIGHT}\"/>\
             <text class=\"name end\" x=\"{RIGHT}\" y=\"{:.1}\">{}</text>\
             <text class=\"name\" x=\"4\" y=\"8\">{}</text>",
            HEIGHT - 6.0,
            escaped(self.x_name),
            escaped(self.y_name)
        );
    }

    fn marks(&self, svg: &mut String, x: &Axis) {
        for (index, (moment, name)) in self.marks.iter().enumerate() {
            let at = x.at(*moment);
            let _ = write!(svg, "<path class=\"mark\" d=\"M{at:.1} {TOP}V{BOTTOM}\"/>");
            // Names that do not fit before the next mark are left out.
            let end = self.marks.get(index + 1).map_or(WIDTH, |(next, _)| x.at(*next));
            if at + name.len() as f64 * LETTER_WIDTH < end {
                let (at, y, name) = (at + 2.0, TOP - 1.0, escaped(name));
                let _ = write!(svg, "<text class=\"phase\" x=\"{at:.1}\" y=\"{y}\">{name}</text>");
            }
        }
    }
}

fn path(points: &[(f64, f64)], x: &Axis, y: &Axis) -> String {
    let mut path = String::new();
    for (index, (px, py)) in points.iter().enumerate() {
        let command = if index == 0 { 'M' } else { 'L' };
        let _ = write!(path, "{command}{:.1} {:.1}", x.at(*px), y.at(*py));
    }
    path
}

/// At most [`POINTS_MAX`] points: the least and the largest of each group, so that no peak is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= POINTS_MAX {
        return points.to_vec();
    }
    let mut kept = Vec::new();
    for group in points.chunks(points.len().div_ceil(POINTS_MAX / 2)) {
        let by_y = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let ends = group.iter().min_by(by_y).zip(group.iter().max_by(by_y));
        let Some((least, largest)) = ends else { continue };
        let is_first =
            group.iter().position(|p| p == least) < group.iter().position(|p| p == largest);
        let (first, second) = if is_first { (least, largest) } else { (largest, least) };
        kept.extend([*first, *second]);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers_and_nines_are_equally_far_apart() {
        let high = |largest: f64| Axis::y(Scale::Linear, [largest].into_iter()).high;
        assert_eq!([0.7, 1.0, 19_000.0, 101.0].map(high), [0.8, 1.0, 20_000.0, 125.0]);
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
        assert!(close(step_of(0.34, false), 0.2) && close(step_of(0.34, true), 0.5));
        assert!(close(step_of(7.0, true), 10.0) && close(step_of(1.0, false), 1.0));
        let seconds = Axis::x(Scale::Linear, [61.0].into_iter());
        assert_eq!((seconds.ticks(), seconds.high), (vec![0.0, 20.0, 40.0, 60.0], 61.0));
        let axis = Axis { from: 0.0, to: 400.0, ..Axis::x(Scale::Nines, [0.9999].into_iter()) };
        assert!((axis.at(0.9) - 100.0).abs() < 0.1 && (axis.at(0.99) - 200.0).abs() < 0.1);
        assert_eq!(axis.label(0.999), "99.9%");
        assert_eq!([short(12_500.0), short(0.25), short(3e6)], ["12.5k", "0.25", "3M"]);
    }

    #[test]
    fn a_plot_stays_within_its_frame_and_keeps_peaks() {
        let mut points: Vec<_> = (0..10_000).map(|x| (f64::from(x), 1.0)).collect();
        points[7_777].1 = 50.0;
        assert!(thinned(&points).iter().any(|(_, y)| *y == 50.0));
        assert!(thinned(&points).len() <= POINTS_MAX + 2);
        let lines = vec![Line { class: "barid", points }];
        let plot = Plot {
            title: "<t>",
            x_name: "s",
            x_scale: Scale::Linear,
            y_name: "a & b",
            y_scale: Scale::Log,
            lines,
            marks: vec![(5_000.0, "<half>".into())],
        };
        let svg = plot.svg().unwrap();
        assert!(svg.contains("a &amp; b") && svg.contains("&lt;half&gt;") && !svg.contains("<t>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(Plot { lines: Vec::new(), ..plot }.svg().is_none());
    }
}
