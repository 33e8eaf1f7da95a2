//! Line plots as inline SVG, in the colours of the page.

use std::error::Error;

use plotters::coord::ranged1d::{
    AsRangedCoord, DefaultFormatting, KeyPointHint, Ranged, ValueFormatter,
};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::escape::escaped;

/// plotters draws at whole pixels, so plots are drawn large and the page scales them down.
const SIZE: (u32, u32) = (1440, 864);
const LEFT: u32 = 170;
const TEXT: u32 = 42;
const LETTER: f64 = 20.0;
/// plotters knows no CSS variables; these colours are replaced by them.
const COLOURS: [(RGBColor, &str); 4] = [
    (RGBColor(1, 0, 0), "var(--barid)"),
    (RGBColor(2, 0, 0), "var(--floor)"),
    (RGBColor(3, 0, 0), "var(--grid)"),
    (RGBColor(4, 0, 0), "var(--soft)"),
];
const TICKS: usize = 6;
/// More points than this are not visible.
const POINTS_MAX: usize = 300;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axes {
    /// Linear from zero.
    Linear,
    /// Shares from 0 to 1 on the x axis, with equal distances from 0.9 to 0.99 and from 0.99 to 0.999; the y
    /// axis is logarithmic.
    Percentiles,
}

#[derive(Debug)]
pub struct Plot<'a> {
    pub title: &'a str,
    pub x_name: &'a str,
    pub y_name: &'a str,
    pub axes: Axes,
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

impl Plot<'_> {
    /// The plot as SVG; `None` if it has fewer than two points.
    pub fn svg(&self) -> Option<String> {
        let points = || self.lines.iter().flat_map(|line| line.points.iter().copied());
        if points().count() < 2 {
            return None;
        }
        let largest = |value: fn((f64, f64)) -> f64| points().map(value).fold(1e-6, f64::max);
        let (x, y) = (largest(|(x, _)| x), largest(|(_, y)| y));
        let mut svg = String::new();
        let drawn = match self.axes {
            Axes::Linear => {
                let ticks = RangedCoordf64::from(0.0..y).key_points(TICKS);
                let step = ticks.get(1).copied().unwrap_or(y);
                self.draw(&mut svg, 0.0..x, 0.0..(y / step).ceil() * step, &|x| short(*x))
            }
            Axes::Percentiles => {
                let least = points().map(|(_, y)| y).fold(f64::INFINITY, f64::min).max(y / 1e5);
                let decades = decade(least, f64::floor)..decade(y.max(least * 1.01), f64::ceil);
                let percent = |x: &f64| format!("{}%", trimmed(x * 100.0));
                self.draw(&mut svg, Shares { end: x }, decades.log_scale(), &percent)
            }
        };
        drawn.ok()?;
        let coloured = COLOURS.iter().fold(svg, |svg, (RGBColor(r, g, b), css)| {
            svg.replace(&format!("#{r:02X}{g:02X}{b:02X}"), css)
        });
        let [title, x, y] = [self.title, self.x_name, self.y_name].map(escaped);
        let label = format!("<svg role=\"img\" aria-label=\"{title}: {y} over {x}\"");
        // HTML needs no namespace.
        Some(
            coloured
                .replacen("<svg", &label, 1)
                .replace("xmlns=\"http://www.w3.org/2000/svg\"", ""),
        )
    }

    fn draw<X, Y>(
        &self,
        svg: &mut String,
        x: X,
        y: Y,
        x_label: &dyn Fn(&f64) -> String,
    ) -> Result<(), Box<dyn Error>>
    where
        X: AsRangedCoord<Value = f64>,
        X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let [barid, floor, grid, soft] = COLOURS.map(|(colour, _)| colour);
        let text = ("sans-serif", TEXT).into_font().color(&soft);
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(60)
            .margin_left(20)
            .x_label_area_size(110)
            .y_label_area_size(LEFT)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(grid.stroke_width(4))
            .axis_style(floor.stroke_width(4))
            .x_labels(TICKS)
            .y_labels(TICKS)
            .x_desc(self.x_name)
            .y_desc(self.y_name)
            .label_style(text.clone())
            .x_label_formatter(&x_label)
            .y_label_formatter(&|y| short(*y))
            .draw()?;
        let y_range = chart.y_range();
        let per_letter = LETTER * chart.x_range().end / f64::from(SIZE.0 - LEFT - 80);
        for (index, (x, name)) in self.marks.iter().enumerate() {
            let bottom_and_top = [(*x, y_range.start), (*x, y_range.end)];
            chart.draw_series(DashedLineSeries::new(bottom_and_top, 24, 30, floor.into()))?;
            // Names that do not fit before the next mark are left out.
            let next = self.marks.get(index + 1).map_or(f64::INFINITY, |(next, _)| *next);
            if x + per_letter * (name.len() as f64) < next {
                let above = EmptyElement::at(bottom_and_top[1])
                    + Text::new(name.clone(), (6, -(TEXT as i32)), text.clone());
                chart.plotting_area().draw(&above)?;
            }
        }
        for Line { class, points } in &self.lines {
            let colour = if *class == "floor" { floor } else { barid };
            chart.draw_series(LineSeries::new(thinned(points), colour.stroke_width(7)))?;
        }
        root.present()?;
        Ok(())
    }
}

/// Shares from zero to `end`, by their distance to 1.
struct Shares {
    end: f64,
}

impl Ranged for Shares {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, share: &f64, (from, to): (i32, i32)) -> i32 {
        from + (f64::from(to - from) * nines(*share) / nines(self.end)) as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        let shares = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999];
        shares.into_iter().filter(|share| *share <= self.end).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        0.0..self.end
    }
}

/// The number of nines in a share: 2 for 0.99.
fn nines(share: f64) -> f64 {
    -(1.0 - share).max(1e-9).log10()
}

/// A power of ten beside the value.
fn decade(value: f64, round: fn(f64) -> f64) -> f64 {
    10_f64.powf(round(value.max(1e-9).log10()))
}

/// The number in few characters.
fn short(value: f64) -> String {
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
    fn numbers_are_short() {
        assert_eq!([short(12_500.0), short(0.25), short(3e6)], ["12.5k", "0.25", "3M"]);
        assert_eq!((decade(37.0, f64::floor), decade(37.0, f64::ceil)), (10.0, 100.0));
        assert!((nines(0.999) - 3.0).abs() < 1e-9);
    }

    #[test]
    fn peaks_stay_and_names_that_fit_are_escaped() {
        let mut points: Vec<_> = (0..10_000).map(|x| (f64::from(x), 1.0)).collect();
        points[7_777].1 = 50.0;
        assert!(thinned(&points).iter().any(|(_, y)| *y == 50.0));
        assert!(thinned(&points).len() <= POINTS_MAX + 2);
        let plot = Plot {
            title: "<t>",
            x_name: "s",
            y_name: "a & b",
            axes: Axes::Linear,
            lines: vec![Line { class: "barid", points }],
            marks: vec![(5_000.0, "<half>".into()), (5_001.0, "later".into())],
        };
        let svg = plot.svg().unwrap();
        assert!(svg.contains("a &amp; b") && svg.contains("later") && !svg.contains("half"));
        assert!(svg.contains("var(--barid)") && !svg.contains("#0") && !svg.contains("http"));
        assert!(!svg.contains("<t>") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let shares = vec![Line { class: "floor", points: vec![(0.0, 1.0), (0.9999, 3.0)] }];
        let plot = Plot { axes: Axes::Percentiles, lines: shares, marks: Vec::new(), ..plot };
        let svg = plot.svg().unwrap();
        assert!(["50%", "90%", "99.99%"].iter().all(|label| svg.contains(label)), "{svg}");
        let lines = vec![Line { class: "barid", points: vec![(0.0, 1.0), (2.0, 3.0)] }];
        let plot = Plot { axes: Axes::Linear, lines, marks: vec![(1.0, "<half>".into())], ..plot };
        assert!(plot.svg().unwrap().contains("&lt;half&gt;"));
        assert!(Plot { lines: Vec::new(), ..plot }.svg().is_none());
    }
}
