//! Words of errors: values, and what may have been meant.

use std::error::Error;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;

use strsim::damerau_levenshtein;

use crate::secret_url::masked;

/// Maximum length of a number that is shown, bytes: 64 bits and a unit.
const QUANTITY_BYTES_MAX: usize = 24;
/// Maximum length of a part of a path that is shown, bytes.
const PATH_PART_BYTES_MAX: usize = 64;
/// Endings by which a path without directories is recognized.
const FILE_ENDINGS: [&str; 9] =
    ["cer", "crt", "json", "key", "pem", "pub", "secret", "toml", "txt"];

/// A value for an error, in quotes and not too long. User info and query are masked as in a URL, whatever it is.
pub fn shown(text: &str) -> String {
    const SHOWN_MAX: usize = 64;
    let text = masked(text);
    match text.char_indices().nth(SHOWN_MAX) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}…", &text[..end]),
    }
}

/// As [`shown`], for a `host:port`.
pub fn shown_address(text: &str) -> String {
    shown(&masked_address(text))
}

/// A `host:port` with `***` in place of what may be secret: the password of a URL, and in place of the port what is no
/// number.
pub(crate) fn masked_address(text: &str) -> String {
    let is_ip = |host: &str| host.starts_with('[') || host.parse::<Ipv6Addr>().is_ok();
    match text.rsplit_once(':') {
        // `user:password:port`, where `user:password@host:port` was meant.
        Some((host, _)) if !text.contains(['@', '/']) && host.contains(':') && !is_ip(text) => {
            match host.split_once(':') {
                Some((user, _)) if !is_ip(host) => format!("{user}:***"),
                _ => masked(text),
            }
        }
        Some((host, port)) if !port.ends_with(']') && !is_quantity(port) && !port.is_empty() => {
            masked(&format!("{host}:***"))
        }
        _ => masked(text),
    }
}

/// A value for an error where something else was wanted, so that it may be a secret: its length only.
pub fn described(text: &str) -> String {
    match text.len() {
        0 => "an empty text".to_owned(),
        1 => "a text of 1 byte".to_owned(),
        bytes => format!("a text of {bytes} bytes"),
    }
}

/// Whether a text is a number, perhaps with a short unit (`20s`, `5 MiB`): no secret.
pub fn is_quantity(text: &str) -> bool {
    let number = text.trim_start_matches(['+', '-']);
    let unit = number.trim_start_matches(|c: char| c.is_ascii_digit() || "._ ".contains(c));
    let is_unit = unit.len() <= 3 && unit.chars().all(|c| c.is_ascii_alphabetic() || c == '%');
    text.len() <= QUANTITY_BYTES_MAX && number.starts_with(|c: char| c.is_ascii_digit()) && is_unit
}

/// The path of a file for an error. What does not look like one may be a secret in the wrong key: its length only.
pub fn shown_path(path: &Path) -> String {
    match path.to_str().filter(|text| is_path(text)) {
        Some(text) => text.to_owned(),
        None => format!("({}, not a path)", described(&path.to_string_lossy())),
    }
}

/// Whether a text looks like the path of a file: it begins with `/`, `./`, `../` or `~/`, or has the ending of a file;
/// its parts have at most 64 bytes, of letters, digits and `._-@~`. URLs and most secrets in base64 do not.
pub fn is_path(text: &str) -> bool {
    let is_rooted = ["/", "./", "../", "~/"].iter().any(|start| text.starts_with(start));
    let ending = text.rsplit_once('.').map_or("", |(_, ending)| ending);
    let is_plain = |c: char| c.is_alphanumeric() || "/._-@~".contains(c);
    let is_short = |part: &str| part.len() <= PATH_PART_BYTES_MAX;
    (is_rooted || FILE_ENDINGS.contains(&ending))
        && text.chars().all(is_plain)
        && text.split('/').all(is_short)
}

/// Texts of libraries that name variants of Rust enums or say nothing, and what they mean.
const PLAIN: [(&str, &str); 6] = [
    ("invalid peer certificate: BadSignature", "another authority has signed the certificate"),
    ("invalid peer certificate: UnknownIssuer", "another authority has signed the certificate"),
    ("received corrupt message of type InvalidContentType", "the peer does not speak TLS"),
    (
        "received fatal alert: DecryptError",
        "the peer refuses this certificate: another authority has signed it",
    ),
    (
        "received fatal alert: UnknownCA",
        "the peer refuses this certificate: another authority has signed it",
    ),
    (
        "keys may not be consistent: KeyMismatch",
        "the private key does not belong to the certificate",
    ),
];
/// Errors that say nothing beside their cause.
const EMPTY: [&str; 3] = ["transport error", "connection error", "client error (Connect)"];

/// An error with its causes in one line. A cause that the line contains is left out: many errors repeat their source.
pub fn causes(error: &(dyn Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(one) = next {
        next = one.source();
        let text = plain(&one.to_string());
        let says_nothing = next.is_some() && EMPTY.contains(&text.as_str());
        if !says_nothing && !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

/// The text of a library's error in words, on one line.
pub fn plain(text: &str) -> String {
    let text = PLAIN.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The one that may have been meant: at most a third of its letters differ.
pub fn nearest<'a>(word: &str, all: &'a [impl AsRef<str>]) -> Option<&'a str> {
    let word = word.to_lowercase();
    let distance = |one: &&'a str| damerau_levenshtein(&one.to_lowercase(), &word);
    let near = all.iter().map(AsRef::as_ref).min_by_key(distance)?;
    (distance(&near) <= (near.chars().count() / 3).clamp(1, 4)).then_some(near)
}

/// Whether a text is `host:port` as others can reach it: IPv6 addresses stand in brackets, and the port is not 0.
pub fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    is_host(host) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

/// Whether a text is a host: a name, an IPv4 address, or an IPv6 address in brackets.
pub fn is_host(text: &str) -> bool {
    let bare = text.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    match bare {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
        None => {
            let good =
                |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
            !text.is_empty() && text.bytes().all(good)
        }
    }
}

/// Whether the host of a `host:port` is a wildcard, which nobody can connect to.
pub fn is_wildcard(text: &str) -> bool {
    text.parse::<SocketAddr>().is_ok_and(|address| address.ip().to_canonical().is_unspecified())
}

/// Whether a URL is `scheme://host[:port][/path]`, with one of `schemes`, and without user info.
pub fn is_url(url: &str, schemes: &[&str]) -> bool {
    url_parts(url).is_some_and(|(scheme, authority)| {
        schemes.contains(&scheme) && (is_host(authority) || is_host_port(authority))
    })
}

/// The scheme and the authority (`[user:password@]host[:port]`) of a URL.
pub fn url_parts(url: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = url.split_once("://")?;
    Some((scheme, rest.split(['/', '?', '#']).next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_have_a_host_and_a_port_that_exists() {
        let good = |url: &str| is_url(url, &["ws", "wss"]);
        for url in ["ws://h", "wss://h/v1/connect", "ws://[::1]:7080/v1", "ws://10.0.0.1:1?a=b"] {
            assert!(good(url), "{url}");
        }
        for url in ["ws://", "ws://h:99999/", "ws://h:0", "http://h", "ws:h", "ws://:1", "ws://a b"]
        {
            assert!(!good(url), "{url}");
        }
        assert!(
            is_wildcard("0.0.0.0:1") && is_wildcard("[::]:1") && is_wildcard("[::ffff:0.0.0.0]:1")
        );
        assert!(!is_wildcard("h:1") && !is_wildcard("10.0.0.1:1"));
    }

    #[test]
    fn hazard_150_a_value_is_shown_only_in_the_form_that_was_wanted() {
        for quantity in ["7", "-1.5", "20s", "5 MiB", "100%", "1_000", "18446744073709551616"] {
            assert!(is_quantity(quantity), "{quantity}");
        }
        for other in ["", "hunter2", "12345hush", "s", "-", "7 apples", "1234567890123456789012345"]
        {
            assert!(!is_quantity(other), "{other}");
        }
        for path in ["/etc/barid/token-secret", "./key", "certs/ca.pem", "ca.pem", "/run/a@1.b/c"] {
            assert!(is_path(path), "{path}");
            assert_eq!(shown_path(Path::new(path)), path);
        }
        let long = format!("/etc/{}", "a".repeat(65));
        let base64 = "/Vt0bGQ9wS+z7o/1rN0=";
        for other in ["hush5ecret", "", "https://me:hush@h/a.pem", "a b.txt", base64, &long] {
            assert!(!is_path(other), "{other}");
        }
        assert_eq!(shown_path(Path::new("hush5ecret")), "(a text of 10 bytes, not a path)");
        assert_eq!(shown_address("me:hush"), "\"me:***\"");
        assert_eq!(shown_address("me:hush@h:1"), "\"me:***@h:1\"");
        assert_eq!(shown_address("h:99999"), "\"h:99999\"");
        assert_eq!(shown_address("me:hush:9092"), "\"me:***\"");
        assert_eq!(shown_address("::1:9092"), "\"::1:9092\"");
        assert_eq!(shown_address("[::1]:9092"), "\"[::1]:9092\"");
        assert_eq!(shown_address("[::1]"), "\"[::1]\"");
    }

    #[test]
    fn hazard_137_an_error_is_one_line_of_words_with_each_cause_once() {
        #[derive(Debug)]
        struct Layer(&'static str, Option<Box<Layer>>);
        impl std::fmt::Display for Layer {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.0)
            }
        }
        impl Error for Layer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                self.1.as_deref().map(|source| source as _)
            }
        }
        let chain = |texts: &[&'static str]| {
            let each = texts.iter().rev();
            let error = each.fold(None, |source, text| Some(Box::new(Layer(text, source))));
            causes(&*error.unwrap())
        };
        let refused = "invalid peer certificate: BadSignature";
        let words = "another authority has signed the certificate";
        assert_eq!(chain(&["transport error", refused, refused]), words);
        assert_eq!(chain(&["a: b", "b"]), "a: b");
        assert_eq!(chain(&["a", "transport error", "b\n  c"]), "a: b c");
        assert_eq!(chain(&["transport error"]), "transport error");
    }

    #[test]
    fn a_slip_is_recognized_and_another_word_is_not() {
        let all = ["listen", "level", "HS256", "drain_seconds"];
        for (word, near) in [
            ("lisen", Some("listen")),
            ("hs256", Some("HS256")),
            ("drain_second", Some("drain_seconds")),
            ("drainseconds", Some("drain_seconds")),
            ("port", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, &all), near, "{word}");
        }
    }
}
