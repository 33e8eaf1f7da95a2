//! Whether the addresses of a configuration are free to listen on.

use std::io::ErrorKind;
use std::net::SocketAddr;

use tokio::net::TcpSocket;

use crate::role::{Probe, Unfit};

/// Binds each address, without listening, and gives it back. Port 0 is never in use.
pub(crate) fn probe(role: &str, listeners: &[(String, SocketAddr)]) -> Vec<Probe> {
    let fixed = listeners.iter().filter(|(_, address)| address.port() != 0);
    fixed
        .map(|(key, address)| Probe {
            name: format!("{key} {address}"),
            found: ask(role, *address),
        })
        .collect()
}

fn ask(role: &str, address: SocketAddr) -> Result<String, Unfit> {
    match bind(address) {
        Ok(()) => Ok("free".into()),
        // The role that the configuration belongs to may run here.
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            Err(Unfit::InUse(format!("in use; fine if this barid-{role} runs here already")))
        }
        // The user who checks may have fewer rights than the one who runs the role.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Err(Unfit::InUse(format!("this user may not listen there: {error}")))
        }
        Err(error) => Err(Unfit::Unusable(format!("cannot be listened on: {error}"))),
    }
}

fn bind(address: SocketAddr) -> std::io::Result<()> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // As the roles do: connections of a process that has ended do not keep its port.
    socket.set_reuseaddr(true)?;
    socket.bind(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn hazard_152_a_port_in_use_is_a_warning_and_a_foreign_address_an_error() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let ask = |address: SocketAddr| {
            let mut probes = probe("access", &[("listen".into(), address)]);
            probes.pop().map(|probe| probe.found)
        };
        let told = "in use; fine if this barid-access runs here already".to_owned();
        assert_eq!(ask(address), Some(Err(Unfit::InUse(told))));
        drop(taken);
        assert_eq!(ask(address), Some(Ok("free".into())));
        assert_eq!(ask("127.0.0.1:0".parse().unwrap()), None);
        // TEST-NET-1.
        let foreign = ask("192.0.2.1:7080".parse().unwrap());
        assert!(matches!(foreign, Some(Err(Unfit::Unusable(_)))), "{foreign:?}");
    }
}
