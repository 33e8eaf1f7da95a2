//! Addresses to listen on: `HOST:PORT`, where HOST may be a name.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs as _};

use serde::de::{self, Deserializer, Visitor};

use crate::words::shown_address;

/// Reads the address of a listener. A host name is resolved at once; of several addresses an IPv4 one is preferred.
///
/// # Errors
/// Returns the text, and what to write instead.
pub fn listen<'de, D: Deserializer<'de>>(from: D) -> Result<SocketAddr, D::Error> {
    struct Reader;
    impl Visitor<'_> for Reader {
        type Value = SocketAddr;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an address in quotes: \"127.0.0.1:PORT\"")
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<SocketAddr, E> {
            Err(E::custom(format!("{number} is a number; write {}", form(&number.to_string()))))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<SocketAddr, E> {
            parse(text).map_err(E::custom)
        }
    }
    from.deserialize_any(Reader)
}

/// Stands for the key's default port in an error's text; see [`with_port`].
const PORT: &str = "PORT";

/// An error's text with the port of `default`, the key's default value, as the port to write.
pub(super) fn with_port(message: &str, default: Option<&str>) -> String {
    let port = default.and_then(|address| address.rsplit_once(':')).map_or(PORT, |(_, port)| port);
    message
        .replace("127.0.0.1:PORT", &format!("127.0.0.1:{port}"))
        .replace("0.0.0.0:PORT", &format!("0.0.0.0:{port}"))
}

/// How to write an address on `port`.
fn form(port: &str) -> String {
    let port = port.parse::<u16>().map_or_else(|_| PORT.to_owned(), |port| port.to_string());
    format!("\"127.0.0.1:{port}\", or \"0.0.0.0:{port}\" for all interfaces")
}

fn parse(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let is = shown_address(text);
    let Some((host, port)) = text.rsplit_once(':') else {
        let problem = if text.parse::<u16>().is_ok() { "names no host" } else { "names no port" };
        return Err(match text {
            "" => format!("is empty; write {}", form("")),
            _ => format!("{is} {problem}; write {}", form(text)),
        });
    };
    if host.is_empty() {
        return Err(format!("{is} names no host; write {}", form(port)));
    }
    if port.parse::<u16>().is_err() {
        return Err(format!("{is}: the port is not 0 to 65535"));
    }
    if host.contains(':') {
        return Err(format!("{is} is not an address; write IPv6 in brackets: \"[::1]:{port}\""));
    }
    let all: Vec<SocketAddr> = match (host, port.parse().unwrap_or(0)).to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(error) => {
            return Err(format!(
                "{is}: the host cannot be resolved ({error}); write {}",
                form(port)
            ));
        }
    };
    let address = all.iter().find(|address| address.is_ipv4()).or(all.first()).copied();
    address.ok_or_else(|| format!("{is}: the host has no address; write {}", form(port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_resolved_and_anything_else_says_what_to_write() {
        assert_eq!(parse("localhost:7080").unwrap().to_string(), "127.0.0.1:7080");
        assert_eq!(parse("[::1]:0").unwrap().to_string(), "[::1]:0");
        for (text, told) in [
            (":7080", "\":7080\" names no host; write \"127.0.0.1:7080\", or \"0.0.0.0:7080\""),
            ("", "is empty; write \"127.0.0.1:PORT\""),
            ("7081", "\"7081\" names no host; write \"127.0.0.1:7081\""),
            ("localhost", "\"localhost\" names no port; write \"127.0.0.1:PORT\""),
            ("localhost:99999", "\"localhost:99999\": the port is not 0 to 65535"),
            ("localhost:hush", "\"localhost:***\": the port is not 0 to 65535"),
            ("me:hush@h:1", "\"me:***@h:1\" is not an address; write IPv6 in brackets"),
            ("::1:7080", "\"::1:7080\" is not an address; write IPv6 in brackets: \"[::1]:7080\""),
            ("a b:1", "\"a b:1\": the host cannot be resolved ("),
        ] {
            assert!(parse(text).unwrap_err().starts_with(told), "{}", parse(text).unwrap_err());
        }
    }
}
