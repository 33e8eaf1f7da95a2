//! The `traceparent` header of the W3C trace context.

/// A valid `traceparent`: `<version>-<trace id>-<parent id>-<flags>`, lower-case hex.
///
/// From <https://www.w3.org/TR/trace-context/#traceparent-header>: no zero id, no version `ff`, and
/// exactly 55 bytes in version `00`; later versions may append fields after another hyphen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent<'a>(&'a str);

/// Bound of a header, bytes; version `00` has 55.
const BYTES_MAX: usize = 64;

impl<'a> TraceParent<'a> {
    /// Parses a header's value; `None` if it is malformed, and has to be ignored.
    pub fn parse(value: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(value).ok()?;
        if !text.bytes().all(|b| b.is_ascii_graphic()) || !(55..=BYTES_MAX).contains(&text.len()) {
            return None;
        }
        let hex =
            |part: &str| part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let id = |part: &str| hex(part) && part.bytes().any(|b| b != b'0');
        let hyphens = [2, 35, 52].iter().all(|at| text.as_bytes()[*at] == b'-');
        let version = &text[..2];
        let ends = match text.as_bytes().get(55) {
            None => true,
            Some(next) => version != "00" && *next == b'-',
        };
        let valid = hyphens
            && ends
            && hex(version)
            && version != "ff"
            && id(&text[3..35])
            && id(&text[36..52])
            && hex(&text[53..55]);
        valid.then_some(Self(text))
    }

    /// The value as it was received.
    pub fn as_str(self) -> &'a str {
        self.0
    }

    /// The trace's id, 32 hex digits.
    pub fn trace_id(self) -> &'a str {
        &self.0[3..35]
    }

    /// Whether the business records this trace (the flag `sampled`).
    pub fn is_sampled(self) -> bool {
        u8::from_str_radix(&self.0[53..55], 16).is_ok_and(|flags| flags & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_the_w3c_says_is_read() {
        let trace = TraceParent::parse(GOOD.as_bytes()).unwrap();
        assert_eq!(trace.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(trace.is_sampled());
        assert!(!TraceParent::parse(GOOD.replace("-01", "-02").as_bytes()).unwrap().is_sampled());
        let later = format!("cc{}-more", &GOOD[2..]);
        assert!(TraceParent::parse(later.as_bytes()).unwrap().is_sampled());
    }

    #[test]
    fn what_is_malformed_is_none() {
        for bad in [
            String::new(),
            GOOD[..54].to_owned(),
            format!("{GOOD}-x"),
            format!("{GOOD}0"),
            format!("ff{}", &GOOD[2..]),
            format!("cc{}.more", &GOOD[2..]),
            format!("cc{}-\r\n", &GOOD[2..]),
            format!("cc{}-{}", &GOOD[2..], "x".repeat(9)),
            GOOD.replace("4bf9", "4BF9"),
            GOOD.replace("4bf9", "4bg9"),
            GOOD.replace("-01", "-0x"),
            GOOD.replacen('-', "_", 1),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{}-01", "0".repeat(16)),
            GOOD.replace("4bf9", "\u{e9}f9"),
        ] {
            assert_eq!(TraceParent::parse(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(TraceParent::parse(&[0xff; 55]), None);
    }
}
