//! Ports for servers that must know theirs before they start.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{LazyLock, Mutex, PoisonError};

/// Below Linux's range for outgoing connections (from 32768), so that no client's socket takes the
/// port of a server that is down for a restart.
const FIRST: u16 = 12_000;
const LAST: u16 = 31_999;

static TAKEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);

/// A free port of 127.0.0.1 that this process has not given out before.
///
/// # Panics
/// Panics if every port of the range is in use.
pub fn free_port() -> u16 {
    let span = u32::from(LAST - FIRST) + 1;
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    // Test processes run side by side: each starts to search at another port.
    let start = std::process::id().wrapping_mul(2_654_435_761) % span + u32::from(FIRST);
    for step in 0..span {
        let offset = (start - u32::from(FIRST) + step * 7 + taken.len() as u32) % span;
        let port = FIRST + u16::try_from(offset).expect("offset is below the span");
        if taken.contains(&port) || TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err() {
            continue;
        }
        taken.insert(port);
        return port;
    }
    panic!("no free port between {FIRST} and {LAST}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_given_out_once() {
        let ports: HashSet<u16> = (0..100).map(|_| free_port()).collect();
        assert_eq!(ports.len(), 100);
        assert!(ports.iter().all(|p| (FIRST..=LAST).contains(p)));
    }
}
