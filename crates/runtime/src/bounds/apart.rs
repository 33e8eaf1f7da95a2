//! Checks that the listeners of a process use different ports.

use std::net::SocketAddr;

/// Checks that no two of these keys have the same address. Port 0 never conflicts.
///
/// # Errors
/// Returns the two keys and the address.
pub fn check_apart(listeners: &[(&str, SocketAddr)]) -> Result<(), String> {
    for (at, (key, address)) in listeners.iter().enumerate() {
        let before = listeners[..at].iter().find(|(_, other)| meets(*other, *address));
        if let Some((other, _)) = before {
            return Err(format!(
                "{other} and {key} are both {address}; write another port for one"
            ));
        }
    }
    Ok(())
}

fn meets(one: SocketAddr, other: SocketAddr) -> bool {
    let same_ip =
        one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && same_ip
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
        assert_eq!(told, "listen and admin.listen are both 0.0.0.0:1; write another port for one");
    }
}
