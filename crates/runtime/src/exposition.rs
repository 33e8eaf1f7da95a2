//! Reads Prometheus's text format, and computes quantiles of histograms. For tools and tests that read
//! the `/metrics` of a role.
//!
//! No parser crate is used: the format takes 40 lines. `prometheus-parse`, the smallest, uses regular
//! expressions that end a label's value at `}`, and brings chrono.

use std::collections::BTreeMap;

/// The values of an answer of `/metrics`.
#[derive(Debug, Clone, Default)]
pub struct Metrics(BTreeMap<String, Vec<Value>>);

#[derive(Debug, Clone)]
struct Value {
    labels: Vec<(String, String)>,
    value: f64,
}

impl Value {
    fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

impl Metrics {
    /// Parses a text; lines that are not metrics are skipped.
    pub fn parse(text: &str) -> Self {
        let mut metrics = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some((name, value)) = parse_line(line) {
                metrics.0.entry(name.to_owned()).or_default().push(value);
            }
        }
        metrics
    }

    /// The name and the labels of every series.
    pub fn series(&self) -> impl Iterator<Item = (&str, &[(String, String)])> {
        self.0.iter().flat_map(|(name, values)| {
            values.iter().map(|value| (name.as_str(), value.labels.as_slice()))
        })
    }

    fn values(&self, name: &str) -> &[Value] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The sum over all labels; 0 if the metric is absent.
    pub fn sum(&self, name: &str) -> f64 {
        self.values(name).iter().map(|value| value.value).sum()
    }

    /// The sum over the series whose `label` has the value `wanted`; `None` if there is no such series.
    pub fn get(&self, name: &str, label: &str, wanted: &str) -> Option<f64> {
        let of = |value: &&Value| value.label(label) == Some(wanted);
        let values = self.values(name).iter().filter(of);
        values.map(|value| value.value).reduce(|sum, value| sum + value)
    }

    /// As [`Self::get`]; 0 if there is no such series.
    pub fn sum_of(&self, name: &str, label: &str, wanted: &str) -> f64 {
        self.get(name, label, wanted).unwrap_or_default()
    }

    /// The sum for each value of `label`.
    pub fn by_label(&self, name: &str, label: &str) -> BTreeMap<String, u64> {
        let mut found = BTreeMap::new();
        for value in self.values(name) {
            if let Some(of) = value.label(label) {
                *found.entry(of.to_owned()).or_default() += value.value as u64;
            }
        }
        found
    }

    /// The role of the endpoint; `None` if it is not one of Barid's.
    pub fn role(&self) -> Option<&str> {
        self.values("barid_build_info").first()?.label("role")
    }

    /// A histogram for each value of `label`.
    pub fn histograms(&self, name: &str, label: &str) -> BTreeMap<String, Histogram> {
        let mut found: BTreeMap<String, Histogram> = BTreeMap::new();
        for value in self.values(&format!("{name}_bucket")) {
            let (Some(of), Some(bound)) = (value.label(label), value.label("le")) else { continue };
            let Ok(bound) = bound.parse() else { continue };
            found.entry(of.to_owned()).or_default().count_below(bound, value.value);
        }
        for value in self.values(&format!("{name}_sum")) {
            if let Some(histogram) = value.label(label).and_then(|of| found.get_mut(of)) {
                histogram.sum += value.value;
            }
        }
        found
    }
}

/// Parses `name{a="b",c="d"} 1.5`. Names and labels are not checked.
fn parse_line(line: &str) -> Option<(&str, Value)> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while let Some((label, after)) = rest.split_once("=\"") {
            let (value, after) = quoted(after)?;
            labels.push((label.trim_start_matches(',').to_owned(), value));
            rest = after;
            if rest.starts_with('}') {
                break;
            }
        }
        rest = rest.strip_prefix('}')?;
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some((name, Value { labels, value }))
}

/// The text up to the closing quote, and the rest after it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                escaped => value.push(escaped),
            },
            c => value.push(c),
        }
    }
    None
}

/// A histogram, in cumulative buckets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// Upper bounds, ascending, each with the number of values up to it.
    buckets: Vec<(f64, f64)>,
    sum: f64,
}

impl Histogram {
    /// Adds buckets of the same bound from several processes.
    fn count_below(&mut self, bound: f64, count: f64) {
        match self.buckets.iter_mut().find(|(known, _)| *known == bound) {
            Some((_, known)) => *known += count,
            None => self.buckets.push((bound, count)),
        }
    }

    /// Number of values.
    pub fn count(&self) -> f64 {
        self.buckets.last().map_or(0.0, |(_, count)| *count)
    }

    /// The mean; `None` without values.
    pub fn mean(&self) -> Option<f64> {
        (self.count() > 0.0).then(|| self.sum / self.count())
    }

    /// Adds another histogram with the same bounds.
    pub fn add(&mut self, other: &Self) {
        self.sum += other.sum;
        if self.buckets.is_empty() {
            self.buckets.clone_from(&other.buckets);
            return;
        }
        for ((_, count), (_, more)) in self.buckets.iter_mut().zip(&other.buckets) {
            *count += more;
        }
    }

    /// The values since `earlier`; all of them if the process was restarted in between.
    pub fn since(&self, earlier: &Self) -> Self {
        if earlier.buckets.len() != self.buckets.len() || earlier.count() > self.count() {
            return self.clone();
        }
        let each = self.buckets.iter().zip(&earlier.buckets);
        let buckets = each.map(|((bound, now), (_, before))| (*bound, now - before)).collect();
        Self { buckets, sum: self.sum - earlier.sum }
    }

    /// The quantile for a share (0 to 1), interpolated within its bucket; `None` without values. Values above the
    /// last bound count as that bound.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let wanted = share * self.count();
        let (mut low, mut below) = (0.0, 0.0);
        for (bound, count) in &self.buckets {
            if *count >= wanted && *count > below {
                let within = (wanted - below) / (count - below);
                return Some(if bound.is_finite() { low + (bound - low) * within } else { low });
            }
            (low, below) = (*bound, *count);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
# HELP barid_x_total What.
# TYPE barid_x_total counter
barid_build_info{role="purger",version="0.1.0"} 1
barid_x_total{outcome="a b",why="say \"no\", {now}"} 3
barid_x_total{outcome="c"} 4
barid_lag 1.5e3
barid_hop_seconds_bucket{hop="h",le="0.001"} 50
barid_hop_seconds_bucket{hop="h",le="0.002"} 100
barid_hop_seconds_bucket{hop="h",le="+Inf"} 100
barid_hop_seconds_sum{hop="h"} 0.1
not a metric
"#;

    #[test]
    fn the_text_format_is_read() {
        let metrics = Metrics::parse(TEXT);
        assert_eq!(metrics.role(), Some("purger"));
        assert_eq!((metrics.sum("barid_x_total"), metrics.sum("barid_lag")), (7.0, 1500.0));
        assert_eq!(metrics.sum_of("barid_x_total", "why", "say \"no\", {now}"), 3.0);
        assert_eq!(metrics.sum("absent"), 0.0);
        assert_eq!(metrics.get("barid_x_total", "outcome", "c"), Some(4.0));
        assert_eq!(metrics.get("barid_x_total", "outcome", "d"), None);
        let of_x = metrics.series().filter(|(name, _)| *name == "barid_x_total");
        assert_eq!(of_x.map(|(_, labels)| labels.len()).collect::<Vec<_>>(), [2, 1]);
    }

    #[test]
    fn quantiles_lie_within_their_bucket() {
        let all = &Metrics::parse(TEXT).histograms("barid_hop_seconds", "hop")["h"];
        assert_eq!((all.quantile(0.5), all.mean()), (Some(0.001), Some(0.001)));
        assert!((all.quantile(0.75).unwrap() - 0.0015).abs() < 1e-9);
        let more = TEXT.replace("+Inf\"} 100", "+Inf\"} 102");
        let more = &Metrics::parse(&more).histograms("barid_hop_seconds", "hop")["h"];
        let since = more.since(all);
        assert_eq!((since.count(), since.quantile(0.5)), (2.0, Some(0.002)));
        assert_eq!(all.since(more), *all, "a restart begins at zero");
        let none = Histogram::default();
        assert_eq!((none.quantile(0.5), none.mean()), (None, None));
    }

    #[test]
    fn what_two_processes_say_adds_up() {
        let both = Metrics::parse(&TEXT.repeat(2)).histograms("barid_hop_seconds", "hop");
        let mut added = Metrics::parse(TEXT).histograms("barid_hop_seconds", "hop")["h"].clone();
        added.add(&added.clone());
        assert_eq!((&both["h"], both["h"].count()), (&added, 200.0));
    }
}
