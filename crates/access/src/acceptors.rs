//! The listeners for devices: one, or several on one port, each with an accept loop of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use barid_runtime::Condition;
use prometheus::IntCounter;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::config::Config;
use crate::connection;
use crate::error::Error;
use crate::handshake::{self, Arrival};
use crate::node::Node;

/// Connections that the kernel queues for a listener until they are accepted; also bounded by `net.core.somaxconn`.
const BACKLOG: u32 = 4_096;
/// How often an accept loop reports that it runs.
const TURN: Duration = Duration::from_secs(1);
/// Pause after a failed accept, which mostly means that the process is out of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// The bound listeners; at least one.
pub struct Acceptors {
    listeners: Vec<TcpListener>,
    address: SocketAddr,
}

impl Acceptors {
    /// Binds `listen` as often as `acceptors` says; port 0 is picked once.
    ///
    /// # Errors
    /// The port is in use.
    pub fn bind(config: &Config) -> Result<Self, Error> {
        let bound = || {
            let several = config.acceptors > 1;
            if several {
                // Fails if another node has the port: SO_REUSEPORT would let one of the same system user bind it,
                // too, and take a share of the devices.
                socket(config)?.bind(config.listen)?;
            }
            let first = listen(config, config.listen, several)?;
            let address = first.local_addr()?;
            let others = (1..config.acceptors).map(|_| listen(config, address, several));
            let listeners = std::iter::once(Ok(first)).chain(others).collect::<Result<_, _>>()?;
            Ok(Self { listeners, address })
        };
        bound().map_err(|error| Error::Listen { key: "listen", address: config.listen, error })
    }

    /// The address that devices connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until the node drains. Keeps `listening` true while all loops run.
    pub fn serve(self, node: &Arc<Node>, listening: Condition) -> JoinSet<()> {
        let turns = Arc::new(Turns::new(listening, self.listeners.len()));
        let acceptors = self.listeners.into_iter().enumerate().map(|(number, listener)| {
            let (node, turns) = (Arc::clone(node), Arc::clone(&turns));
            let accepted = node.metrics.acceptor(number);
            accept(node, listener, accepted, turns, number)
        });
        acceptors.collect()
    }
}

/// Connections inherit the size of their send buffer from the listener.
fn socket(config: &Config) -> std::io::Result<TcpSocket> {
    let is_v4 = config.listen.is_ipv4();
    let socket = if is_v4 { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    if config.limits.send_buffer_bytes > 0 {
        socket.set_send_buffer_size(config.limits.send_buffer_bytes)?;
    }
    Ok(socket)
}

fn listen(config: &Config, address: SocketAddr, several: bool) -> std::io::Result<TcpListener> {
    let socket = socket(config)?;
    socket.set_reuseport(several)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// One accept loop.
async fn accept(
    node: Arc<Node>,
    listener: TcpListener,
    accepted: IntCounter,
    turns: Arc<Turns>,
    number: usize,
) {
    let mut turn = tokio::time::interval(TURN);
    let mut failed_at: Option<Instant> = None;
    loop {
        let arrived = tokio::select! {
            arrived = listener.accept() => arrived,
            _ = turn.tick() => {
                if failed_at.is_none_or(|at| at.elapsed() >= TURN) {
                    turns.ran(number);
                }
                continue;
            }
            () = node.shutdown.draining() => return,
        };
        match arrived {
            Ok((stream, peer)) => {
                accepted.inc();
                let _ = stream.set_nodelay(true);
                admit(&node, stream, peer);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept");
                turns.failed(number, &error);
                failed_at = Some(Instant::now());
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn admit(node: &Arc<Node>, stream: TcpStream, peer: SocketAddr) {
    let (policy, address) = (&node.policy, peer.ip().to_canonical());
    let is_known = !policy.proxies.speaks_first(address) && !policy.proxies.forwards(address);
    let key = is_known.then(|| policy.address_key(address)).flatten();
    if key.is_some_and(|key| policy.admission.blocked(key).is_some()) {
        return handshake::blocked(node, stream);
    }
    match policy.admission.admit(key) {
        Ok((admitted, evicted)) => {
            let node = Arc::clone(node);
            let arrival = Arrival { node, stream, address, admitted, evicted };
            tokio::spawn(connection::serve(Box::new(arrival)));
        }
        Err(refused) => handshake::no_room(node, stream, refused),
    }
}

/// The loops that have run since the last report. The condition is renewed once all of them have, because the kernel
/// gives connections to a loop that hangs, too.
struct Turns {
    condition: Condition,
    had: AtomicU64,
    all: u64,
}

impl Turns {
    fn new(condition: Condition, loops: usize) -> Self {
        let all = (0..loops).fold(0, |all, number| all | bit(number));
        Self { condition, had: AtomicU64::new(0), all }
    }

    fn ran(&self, number: usize) {
        let had = self.had.fetch_or(bit(number), Ordering::Relaxed) | bit(number);
        if had == self.all {
            self.had.store(0, Ordering::Relaxed);
            self.condition.ready();
        }
    }

    fn failed(&self, number: usize, error: &std::io::Error) {
        self.had.fetch_and(!bit(number), Ordering::Relaxed);
        self.condition.failing(format!("cannot accept: {error}"));
    }
}

fn bit(number: usize) -> u64 {
    1 << number
}

#[cfg(test)]
mod tests {
    use barid_runtime::Context;

    use super::*;
    use crate::config::ACCEPTORS_MAX;

    #[test]
    fn a_loop_that_hangs_or_fails_is_not_covered_by_the_others() {
        let listening = Context::new().progress("listener", "turn of the listeners");
        let turns = Turns::new(listening.clone(), 3);
        for number in [0, 1, 0, 1] {
            turns.ran(number);
            assert!(!listening.is_ready(), "the third has not accepted yet");
        }
        turns.ran(2);
        assert!(listening.is_ready());
        turns.ran(1);
        turns.failed(1, &std::io::Error::other("no files"));
        turns.ran(0);
        turns.ran(2);
        assert_eq!(listening.reason().as_deref(), Some("cannot accept: no files"));
        turns.ran(1);
        assert!(listening.is_ready());
    }

    #[test]
    fn every_loop_has_a_bit() {
        let listening = Context::new().progress("listener", "turn of the listeners");
        let turns = Turns::new(listening.clone(), ACCEPTORS_MAX as usize);
        (0..ACCEPTORS_MAX as usize).for_each(|number| turns.ran(number));
        assert!(listening.is_ready());
    }
}
