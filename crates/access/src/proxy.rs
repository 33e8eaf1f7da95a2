//! The client's address behind a balancer: the PROXY protocol, versions 1 and 2
//! (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>), and `X-Forwarded-For`. Both are accepted only from
//! peers in networks that the operator trusts. Pure: bytes in, addresses out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use barid_runtime::words::shown;
use ipnet::IpNet;

use crate::config::ProxyConfig;

/// Bound of a header of version 1, by its specification.
const V1_BYTES_MAX: usize = 107;
/// Length of the shortest header of version 1, `PROXY UNKNOWN` with its line end.
const V1_BYTES_MIN: usize = 15;
/// Bound of a header of version 2 behind its first 16 bytes; balancers send far less.
const V2_BODY_BYTES_MAX: usize = 4 << 10;
const V1_START: &[u8] = b"PROXY ";
const V2_START: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const V2_HEAD_BYTES: usize = 16;

/// The trusted balancers, and the headers that are accepted from them.
#[derive(Debug, Clone, Default)]
pub struct Proxies {
    trusted: Vec<IpNet>,
    protocol: bool,
    forwarded_for: bool,
}

impl Proxies {
    /// Parses the configuration.
    ///
    /// # Errors
    /// A network is invalid, or `proxy.trusted` is empty while headers are to be accepted.
    pub fn new(config: &ProxyConfig) -> Result<Self, String> {
        let trusted: Vec<_> =
            config.trusted.iter().map(|text| network(text)).collect::<Result<_, _>>()?;
        let ProxyConfig { protocol, forwarded_for, .. } = *config;
        if trusted.is_empty() && (protocol || forwarded_for) {
            return Err("proxy.trusted must name the networks of your balancers".into());
        }
        Ok(Self { trusted, protocol, forwarded_for })
    }

    /// Whether a connection from this peer begins with a PROXY protocol header.
    pub fn speaks_first(&self, peer: IpAddr) -> bool {
        self.protocol && self.trusts(peer)
    }

    /// Whether `X-Forwarded-For` is accepted in a request from this address.
    pub fn forwards(&self, address: IpAddr) -> bool {
        self.forwarded_for && self.trusts(address)
    }

    /// The client's address, given the values of a balancer's `X-Forwarded-For` headers in order: the last address that
    /// is not a trusted balancer's. Each balancer appends the address of its peer, so that the client may have invented
    /// everything before that, in any bytes. `None`: the balancer names nobody.
    pub fn client<'a>(
        &self,
        forwarded_for: impl DoubleEndedIterator<Item = &'a [u8]>,
    ) -> Option<IpAddr> {
        let mut client = None;
        for part in forwarded_for.rev().flat_map(|value| value.rsplit(|byte| *byte == b',')) {
            let Some(address) = std::str::from_utf8(part).ok().and_then(address) else { break };
            client = Some(address);
            if !self.trusts(address) {
                break;
            }
        }
        client
    }

    /// Whether this is the address of a trusted balancer.
    pub fn trusts(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        // IPv6 networks contain IPv4 addresses in their mapped form.
        let mapped = match address {
            IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
            IpAddr::V6(_) => address,
        };
        self.trusted.iter().any(|network| network.contains(&address) || network.contains(&mapped))
    }
}

/// Parses an address in `X-Forwarded-For`; some balancers add the port.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let plain = || text.parse::<IpAddr>().ok();
    let with_port = || text.parse::<std::net::SocketAddr>().ok().map(|address| address.ip());
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<IpAddr>().ok();
    plain().or_else(with_port).or_else(bracketed).map(|address| address.to_canonical())
}

/// Parses `10.0.0.0/8`, `2001:db8::/32`, or one address.
fn network(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    let network = text.parse::<IpNet>().ok().or_else(address).ok_or_else(|| {
        format!("proxy.trusted: {} is not a network (10.0.0.0/8) or an address", shown(text))
    })?;
    if network.addr() != network.network() {
        return Err(format!("proxy.trusted: {text:?} has bits beyond its length"));
    }
    Ok(network)
}

/// The client that a balancer names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A client with this address.
    Client(IpAddr),
    /// Itself (`LOCAL`): a health check.
    Balancer,
    /// A client without an address (`UNKNOWN`, `AF_UNSPEC`, or a Unix socket).
    Unknown,
}

/// Result of reading a connection's first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// The header is not complete; at least this many further bytes belong to it. Bytes behind the header must not be
    /// read.
    Partial(usize),
    /// A complete header.
    Whole {
        /// Its length; the request follows.
        length: usize,
        /// Who has connected to the balancer.
        source: Source,
    },
    /// The bytes do not begin with a PROXY protocol header.
    Malformed,
}

/// Reads a header.
pub fn header(bytes: &[u8]) -> Header {
    let begins = |start: &[u8]| bytes.iter().zip(start).all(|(byte, expected)| byte == expected);
    if begins(V1_START) {
        v1(bytes)
    } else if begins(V2_START) {
        v2(bytes)
    } else {
        Header::Malformed
    }
}

fn v1(bytes: &[u8]) -> Header {
    let line = &bytes[..bytes.len().min(V1_BYTES_MAX)];
    let Some(end) = line.windows(2).position(|pair| pair == b"\r\n") else {
        return match bytes.len() {
            V1_BYTES_MAX.. => Header::Malformed,
            length => Header::Partial(V1_BYTES_MIN.saturating_sub(length).max(1)),
        };
    };
    let source = std::str::from_utf8(&line[V1_START.len().min(end)..end]).ok().and_then(v1_source);
    match source {
        Some(source) => Header::Whole { length: end + 2, source },
        None => Header::Malformed,
    }
}

/// The source in `TCP4 192.0.2.1 198.51.100.1 4711 443`.
fn v1_source(text: &str) -> Option<Source> {
    let mut words = text.split(' ');
    let (protocol, rest) = (words.next()?, words.collect::<Vec<_>>());
    if protocol == "UNKNOWN" {
        return Some(Source::Unknown);
    }
    let [source, destination, source_port, destination_port] = rest[..] else { return None };
    let parse = |text: &str| match protocol {
        "TCP4" => text.parse().map(IpAddr::V4).ok(),
        "TCP6" => text.parse().map(IpAddr::V6).ok(),
        _ => None,
    };
    parse(destination)?;
    source_port.parse::<u16>().ok()?;
    destination_port.parse::<u16>().ok()?;
    parse(source).map(client)
}

fn client(address: impl Into<IpAddr>) -> Source {
    Source::Client(address.into().to_canonical())
}

fn v2(bytes: &[u8]) -> Header {
    let Some(head) = bytes.first_chunk::<V2_HEAD_BYTES>() else {
        return Header::Partial(V2_HEAD_BYTES - bytes.len());
    };
    let body_bytes = usize::from(u16::from_be_bytes([head[14], head[15]]));
    let (version, command) = (head[12] >> 4, head[12] & 0x0f);
    if version != 2 || command > 1 || body_bytes > V2_BODY_BYTES_MAX {
        return Header::Malformed;
    }
    let length = V2_HEAD_BYTES + body_bytes;
    let Some(body) = bytes.get(V2_HEAD_BYTES..length) else {
        return Header::Partial(length - bytes.len());
    };
    const LOCAL: u8 = 0;
    let source = match (command, head[13]) {
        (LOCAL, _) => Some(Source::Balancer),
        // TCP over IPv4, over IPv6.
        (_, 0x11) if body_bytes >= 12 => {
            body.first_chunk::<4>().map(|octets| client(Ipv4Addr::from(*octets)))
        }
        (_, 0x21) if body_bytes >= 36 => {
            body.first_chunk::<16>().map(|octets| client(Ipv6Addr::from(*octets)))
        }
        // An unspecified address, or a Unix socket.
        (_, 0x00 | 0x31) => Some(Source::Unknown),
        _ => None,
    };
    source.map_or(Header::Malformed, |source| Header::Whole { length, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn proxies(trusted: &[&str]) -> Result<Proxies, String> {
        let trusted = trusted.iter().map(|text| (*text).to_owned()).collect();
        Proxies::new(&ProxyConfig { trusted, protocol: true, forwarded_for: true })
    }

    fn v2_of(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [V2_START, &[0x20 | command, family], &length, body].concat()
    }

    fn v2_tcp4() -> Vec<u8> {
        v2_of(1, 0x11, &[192, 0, 2, 1, 198, 51, 100, 1, 0x12, 0x34, 1, 0xbb])
    }

    #[test]
    fn headers_of_both_versions_name_the_client() {
        let v6 = "2001:db8::7".parse::<Ipv6Addr>().unwrap().octets();
        let v6_body = [&v6[..], &[0; 16], &[1, 2, 3, 4], &[3, 0, 1, 9]].concat();
        let client = |text: &str| Source::Client(ip(text));
        for (bytes, source) in [
            (b"PROXY TCP4 192.0.2.1 198.51.100.1 4711 443\r\n".to_vec(), client("192.0.2.1")),
            (b"PROXY TCP6 2001:db8::7 ::1 1 65535\r\n".to_vec(), client("2001:db8::7")),
            (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n".to_vec(), client("192.0.2.1")),
            (b"PROXY UNKNOWN\r\n".to_vec(), Source::Unknown),
            (b"PROXY UNKNOWN ::1 ::1 1 2\r\n".to_vec(), Source::Unknown),
            (v2_tcp4(), client("192.0.2.1")),
            (v2_of(1, 0x21, &v6_body), client("2001:db8::7")),
            (v2_of(0, 0x11, &[]), Source::Balancer),
            (v2_of(1, 0, &[1, 2, 3]), Source::Unknown),
            (v2_of(1, 0x31, &[0; 216]), Source::Unknown),
        ] {
            let whole = Header::Whole { length: bytes.len(), source };
            assert_eq!(header(&bytes), whole, "{bytes:?}");
            let with_more = [&bytes[..], b"GET / HTTP/1.1\r\n\r\n"].concat();
            assert_eq!(header(&with_more), whole);
            for cut in 0..bytes.len() {
                let Header::Partial(more) = header(&bytes[..cut]) else {
                    panic!("{cut} of {bytes:?}");
                };
                assert!(more > 0 && cut + more <= bytes.len(), "{more} after {cut} of {bytes:?}");
            }
        }
    }

    #[test]
    fn what_is_no_header_is_malformed_and_no_header_is_long() {
        let long = [b"PROXY TCP4 ".to_vec(), vec![b'1'; 97]].concat();
        for bytes in [
            b"GET /v1/connect HTTP/1.1\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 198.51.100.1 4711\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 198.51.100.1 4711 443 1\r\n".to_vec(),
            b"PROXY TCP4  192.0.2.1 198.51.100.1 4711 443\r\n".to_vec(),
            b"PROXY TCP4 2001:db8::7 ::1 1 2\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 198.51.100.1 4711 65536\r\n".to_vec(),
            b"PROXY TCP5 192.0.2.1 198.51.100.1 1 2\r\n".to_vec(),
            b"PROXY \r\n".to_vec(),
            b"PROXY \xff\xff\r\n".to_vec(),
            b"proxy UNKNOWN\r\n".to_vec(),
            long[..V1_BYTES_MAX].to_vec(),
            v2_of(2, 0x11, &[0; 12]),
            v2_of(1, 0x11, &[0; 11]),
            v2_of(1, 0x21, &[0; 12]),
            v2_of(1, 0x12, &[0; 12]),
            v2_of(1, 0x11, &[0; V2_BODY_BYTES_MAX + 1]),
            [V2_START, &[0x11, 0x11, 0, 0]].concat(),
        ] {
            assert_eq!(header(&bytes), Header::Malformed, "{}", bytes.escape_ascii());
        }
        assert_eq!(header(&long[..V1_BYTES_MAX - 1]), Header::Partial(1));
    }

    #[test]
    fn only_balancers_are_believed_and_only_what_they_saw() {
        let proxies = proxies(&["10.0.0.0/8", "2001:db8:ff::/48"]).unwrap();
        assert!(proxies.forwards(ip("10.1.2.3")) && proxies.speaks_first(ip("::ffff:10.1.2.3")));
        assert!(!proxies.forwards(ip("192.0.2.1")) && !proxies.speaks_first(ip("11.0.0.1")));
        let client = |forwarded: &[&[u8]]| proxies.client(forwarded.iter().copied());
        assert_eq!(client(&[b"192.0.2.7"]), Some(ip("192.0.2.7")));
        assert_eq!(client(&[b"1.1.1.1, 192.0.2.7, 10.0.0.2"]), Some(ip("192.0.2.7")));
        let lines: [&[u8]; 3] = [b"1.1.1.1", b"192.0.2.7", b"2001:db8:ff::1"];
        assert_eq!(client(&lines), Some(ip("192.0.2.7")));
        assert_eq!(client(&[b"[2001:db8::7]:1"]), Some(ip("2001:db8::7")));
        // What a client has invented is not read, whatever its bytes are.
        for invented in [&b"junk"[..], b"\xff", b"\"\x80\"", b",,"] {
            let value = [invented, b", 192.0.2.7:4711"].concat();
            assert_eq!(client(&[&value]), Some(ip("192.0.2.7")), "{}", value.escape_ascii());
        }
        // Nothing, or nothing that can be read: the balancer names nobody.
        assert_eq!(client(&[]), None);
        for none in ["", "junk", "192.0.2.7, junk", "192.0.2.7,"] {
            assert_eq!(client(&[none.as_bytes()]), None, "{none:?}");
        }
        assert_eq!(client(&[b"junk, 10.0.0.9"]), Some(ip("10.0.0.9")));
    }

    #[test]
    fn networks_are_networks() {
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "2001:db8::1/32",
            "10.0.0.0/",
            "example.com",
            "10.0.0.0/-1",
        ] {
            let error = proxies(&[bad]).unwrap_err();
            assert!(error.starts_with("proxy.trusted: "), "{error}");
        }
        let error = proxies(&[]).unwrap_err();
        assert_eq!(error, "proxy.trusted must name the networks of your balancers");
        let all = proxies(&["0.0.0.0/0"]).unwrap();
        assert!(all.forwards(ip("1.2.3.4")) && !all.forwards(ip("2001:db8::1")));
        assert!(proxies(&["::/0"]).unwrap().forwards(ip("1.2.3.4")));
        assert!(proxies(&["192.0.2.1"]).unwrap().forwards(ip("192.0.2.1")));
        let mapped = proxies(&["::ffff:10.0.0.0/104"]).unwrap();
        assert!(mapped.forwards(ip("10.1.2.3")) && mapped.forwards(ip("::ffff:10.1.2.3")));
        assert!(!mapped.forwards(ip("11.1.2.3")));
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_within_the_bounds(
            start in prop::sample::select(vec![&b""[..], V1_START, V2_START]),
            rest in prop::collection::vec(any::<u8>(), 0..6000),
        ) {
            let bytes = [start, &rest].concat();
            match header(&bytes) {
                Header::Whole { length, .. } => prop_assert!(length <= bytes.len()),
                Header::Partial(_) => prop_assert!(bytes.len() < V2_HEAD_BYTES + V2_BODY_BYTES_MAX),
                Header::Malformed => (),
            }
        }
    }
}
