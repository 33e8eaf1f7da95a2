//! Ports for servers that must know theirs before they start.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{LazyLock, Mutex, PoisonError};

/// Below Linux's range for outgoing connections (from 32768), so that no client's socket takes the
/// port of a server that is down for a restart.
const FIRST: u16 = 12_000;
const LAST: u16 = 31_999;

/// The ports of this process, each with the lock that keeps other test processes from it: a server binds its port some
/// time after it was found free, and another process's server on it would be taken for this one's.
static TAKEN: LazyLock<Mutex<HashMap<u16, File>>> = LazyLock::new(Mutex::default);

/// A free port of 127.0.0.1 that neither this process nor another one that is running has given out before.
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
        if taken.contains_key(&port) {
            continue;
        }
        let Some(lock) = lock(port) else { continue };
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err() {
            continue;
        }
        taken.insert(port, lock);
        return port;
    }
    panic!("no free port between {FIRST} and {LAST}");
}

/// The lock of a port, held until the file is closed; `None`: another process has it.
fn lock(port: u16) -> Option<File> {
    let dir = std::env::temp_dir().join("barid-test-ports");
    // Without the directory there is no lock, and all ports are refused: the panic above tells.
    let _ = std::fs::create_dir_all(&dir);
    let mut options = OpenOptions::new();
    let file = options.create(true).append(true).open(dir.join(port.to_string())).ok()?;
    file.try_lock().ok().map(|()| file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_port_of_another_process_is_not_given_out() {
        let port = free_port();
        // Another open file of the same process is refused as another process is.
        assert!(lock(port).is_none());
    }

    #[test]
    fn ports_are_given_out_once() {
        let ports: HashSet<u16> = (0..100).map(|_| free_port()).collect();
        assert_eq!(ports.len(), 100);
        assert!(ports.iter().all(|p| (FIRST..=LAST).contains(p)));
    }
}
