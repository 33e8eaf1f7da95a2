//! Lines of coloured text, and how numbers are written in them.

use crate::output::{Output, Tone};

/// A line of pieces of coloured text.
#[derive(Debug, Default, Clone)]
pub struct Line(Vec<(Option<Tone>, String)>);

impl Line {
    pub fn plain(text: impl Into<String>) -> Self {
        Self::default().and(None, text)
    }

    pub fn of(tone: Tone, text: impl Into<String>) -> Self {
        Self::default().and(Some(tone), text)
    }

    pub fn and(mut self, tone: Option<Tone>, text: impl Into<String>) -> Self {
        self.0.push((tone, text.into()));
        self
    }

    pub fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text.chars().count()).sum()
    }

    pub fn contains(&self, text: &str) -> bool {
        self.0.iter().map(|(_, part)| part.as_str()).collect::<String>().contains(text)
    }

    /// The coloured text, cut at `width`.
    pub fn paint(&self, width: usize, out: Output) -> String {
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

/// Lines of at most `width` characters, broken at spaces where there are any.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
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

/// A text of at most `width` characters, with a mark where it was cut.
pub fn cut(text: &str, width: usize) -> String {
    match text.chars().count() > width {
        true => text.chars().take(width - 1).chain(['\u{2026}']).collect(),
        false => text.to_owned(),
    }
}

/// Two columns, the right one from `at` on.
pub fn beside(left: Vec<Line>, right: Vec<Line>, at: usize) -> Vec<Line> {
    let rows = left.len().max(right.len());
    let (mut left, mut right) = (left.into_iter(), right.into_iter());
    let joined = (0..rows).map(|_| {
        let (line, more) = (left.next().unwrap_or_default(), right.next().unwrap_or_default());
        let gap = at.saturating_sub(line.width());
        let mut line = line.and(None, " ".repeat(gap));
        line.0.extend(more.0);
        line
    });
    joined.collect()
}

/// With separators: `12,345`.
pub fn number(value: u64) -> String {
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
pub fn milliseconds(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 100.0 => format!("{ms:.1} ms"),
        ms if ms < 1_000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.2} s", ms / 1e3),
    }
}
