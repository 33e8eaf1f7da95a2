//! What a role's admin endpoint says: its metrics, and what it is not ready for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// For one endpoint, both questions.
const LIMIT: Duration = Duration::from_secs(2);
/// Of an answer; a role's metrics are some 50 KB.
const ANSWER_BYTES_MAX: u64 = 8 << 20;

/// One look at one endpoint.
#[derive(Debug, Clone)]
pub struct Scrape {
    pub at: Instant,
    pub metrics: Metrics,
    /// `condition: reason`; empty: ready.
    pub not_ready: Vec<String>,
}

/// Asks an endpoint.
///
/// # Errors
/// It does not answer in time, or is none of Barid's.
pub async fn scrape(address: &str) -> anyhow::Result<Scrape> {
    let asked = async {
        let (status, text) = get(address, "/metrics").await?;
        if status != 200 {
            bail!("/metrics answers {status}");
        }
        let metrics = Metrics::parse(&text);
        if metrics.role().is_none() {
            bail!("not an admin endpoint of Barid");
        }
        let (status, reasons) = get(address, "/readyz").await?;
        let not_ready = match status {
            200 => Vec::new(),
            _ => reasons.lines().map(str::to_owned).collect(),
        };
        Ok(Scrape { at: Instant::now(), metrics, not_ready })
    };
    timeout(LIMIT, asked).await.unwrap_or_else(|_| bail!("no answer within {} s", LIMIT.as_secs()))
}

async fn get(address: &str, path: &str) -> anyhow::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    // HTTP/1.0: the body comes in one piece and ends with the connection.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.context("not an HTTP answer")?, body.to_owned()))
}

/// Values in Prometheus's text format.
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
    /// Lines that are none are left out.
    pub fn parse(text: &str) -> Self {
        let mut metrics = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some((name, value)) = parse_line(line) {
                metrics.0.entry(name.to_owned()).or_default().push(value);
            }
        }
        metrics
    }

    fn values(&self, name: &str) -> &[Value] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The sum over all labels; 0 where there is none.
    pub fn sum(&self, name: &str) -> f64 {
        self.values(name).iter().map(|value| value.value).sum()
    }

    /// The sum where a label has this value.
    pub fn sum_of(&self, name: &str, label: &str, wanted: &str) -> f64 {
        let of = |value: &&Value| value.label(label) == Some(wanted);
        self.values(name).iter().filter(of).map(|value| value.value).sum()
    }

    /// The role whose endpoint it is.
    pub fn role(&self) -> Option<&str> {
        self.values("barid_build_info").first()?.label("role")
    }

    /// A histogram for each value of `label`.
    pub fn histograms(&self, name: &str, label: &str) -> BTreeMap<String, Histogram> {
        let mut found: BTreeMap<String, Histogram> = BTreeMap::new();
        for value in self.values(&format!("{name}_bucket")) {
            let (Some(of), Some(bound)) = (value.label(label), value.label("le")) else { continue };
            let Ok(bound) = bound.parse() else { continue };
            found.entry(of.to_owned()).or_default().0.push((bound, value.value));
        }
        found
    }
}

/// `name{a="b",c="d"} 1.5`; names and labels of strangers are taken as they are.
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

/// The text up to the closing quote, and what follows it.
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

/// Buckets as (upper bound, how many are at or below it), in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram(Vec<(f64, f64)>);

impl Histogram {
    /// How many were observed.
    pub fn count(&self) -> f64 {
        self.0.last().map_or(0.0, |(_, count)| *count)
    }

    /// Adds another one of the same bounds.
    pub fn add(&mut self, other: &Self) {
        if self.0.is_empty() {
            self.0.clone_from(&other.0);
            return;
        }
        for ((_, count), (_, more)) in self.0.iter_mut().zip(&other.0) {
            *count += more;
        }
    }

    /// What was observed since `earlier`; all of it, if the process started anew in between.
    pub fn since(&self, earlier: &Self) -> Self {
        if earlier.0.len() != self.0.len() || earlier.count() > self.count() {
            return self.clone();
        }
        let each = self.0.iter().zip(&earlier.0);
        Self(each.map(|((bound, now), (_, before))| (*bound, now - before)).collect())
    }

    /// The value below which a share (0 to 1) lies, evenly spread within its bucket; `None`: nothing
    /// was observed. Above the last bound, that bound.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let wanted = share * self.count();
        let (mut low, mut below) = (0.0, 0.0);
        for (bound, count) in &self.0 {
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
not a metric
"#;

    #[test]
    fn the_text_format_is_read() {
        let metrics = Metrics::parse(TEXT);
        assert_eq!(metrics.role(), Some("purger"));
        assert_eq!((metrics.sum("barid_x_total"), metrics.sum("barid_lag")), (7.0, 1500.0));
        assert_eq!(metrics.sum_of("barid_x_total", "why", "say \"no\", {now}"), 3.0);
        assert_eq!(metrics.sum("absent"), 0.0);
    }

    #[test]
    fn quantiles_lie_within_their_bucket() {
        let all = &Metrics::parse(TEXT).histograms("barid_hop_seconds", "hop")["h"];
        assert_eq!(all.quantile(0.5), Some(0.001));
        assert!((all.quantile(0.75).unwrap() - 0.0015).abs() < 1e-9);
        let more = TEXT.replace("+Inf\"} 100", "+Inf\"} 102");
        let more = &Metrics::parse(&more).histograms("barid_hop_seconds", "hop")["h"];
        let since = more.since(all);
        assert_eq!((since.count(), since.quantile(0.5)), (2.0, Some(0.002)));
        assert_eq!(all.since(more), *all, "a restart begins at zero");
        assert_eq!(Histogram::default().quantile(0.5), None);
    }
}
