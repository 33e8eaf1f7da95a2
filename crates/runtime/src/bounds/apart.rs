//! Checks that the listeners of a process use different ports.

use std::net::{IpAddr, SocketAddr};

/// Checks that no two of these keys have addresses that conflict. Port 0 never conflicts.
///
/// # Errors
/// Returns the two keys and their addresses.
pub fn check_apart(listeners: &[(&str, SocketAddr)]) -> Result<(), String> {
    for (at, (key, address)) in listeners.iter().enumerate() {
        let before = listeners[..at].iter().find(|(_, other)| meets(*other, *address));
        if let Some((other, taken)) = before {
            return Err(format!(
                "{other} {taken} and {key} {address} use the same port; write another port for one"
            ));
        }
    }
    Ok(())
}

fn meets(one: SocketAddr, other: SocketAddr) -> bool {
    // `[::ffff:127.0.0.1]` binds 127.0.0.1.
    let (a, b) = (one.ip().to_canonical(), other.ip().to_canonical());
    // Linux binds `::` to IPv4 as well, unless net.ipv6.bindv6only is set.
    let covers = |a: IpAddr, b: IpAddr| a.is_unspecified() && (a.is_ipv6() || b.is_ipv4());
    one.port() != 0 && one.port() == other.port() && (a == b || covers(a, b) || covers(b, a))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_59_two_listeners_on_one_port_are_named() {
        let check = |texts: [&str; 3]| {
            let [a, b, c] = texts.map(|text| text.parse().unwrap());
            check_apart(&[("listen", a), ("grpc_listen", b), ("admin.listen", c)])
        };
        assert_eq!(check(["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]), Ok(()));
        assert_eq!(check(["127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"]), Ok(()));
        assert_eq!(check(["127.0.0.1:1", "127.0.0.2:1", "[::1]:1"]), Ok(()));
        let told = check(["127.0.0.1:1", "127.0.0.1:2", "0.0.0.0:1"]).unwrap_err();
        let both = "listen 127.0.0.1:1 and admin.listen 0.0.0.0:1 use the same port";
        assert_eq!(told, format!("{both}; write another port for one"));
        assert_eq!(check(["0.0.0.0:1", "127.0.0.1:2", "[::1]:1"]), Ok(()));
        assert!(check(["[::]:1", "127.0.0.1:1", "127.0.0.1:3"]).is_err());
        assert!(check(["127.0.0.1:1", "[::ffff:127.0.0.1]:1", "127.0.0.1:3"]).is_err());
        assert!(check(["127.0.0.1:1", "[::ffff:0.0.0.0]:1", "127.0.0.1:3"]).is_err());
        assert_eq!(check(["127.0.0.1:1", "[::ffff:127.0.0.2]:1", "[::1]:1"]), Ok(()));
    }
}
