//! A TCP relay whose connections a test can cut, hold or delay.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant, sleep, sleep_until};

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// Connections from an earlier generation are cut.
    generation: u64,
    /// Nothing is forwarded and connections stay open, as behind a dead link.
    held: bool,
}

/// Forwards connections to one address. Ends on drop.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    state: watch::Sender<State>,
    task: JoinHandle<()>,
}

impl Relay {
    /// Listens on a port of its own and forwards to `target`.
    ///
    /// # Errors
    /// Returns an error if no port can be bound.
    pub async fn to(target: SocketAddr) -> Result<Self> {
        Self::delayed(target, Duration::ZERO).await
    }

    /// As [`Relay::to`]; whatever is sent, in either direction, arrives after `delay`: half of a round trip.
    ///
    /// # Errors
    /// Returns an error if no port can be bound.
    pub async fn delayed(target: SocketAddr, delay: Duration) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let state = watch::Sender::new(State::default());
        let task = tokio::spawn(accept(listener, target, delay, state.clone()));
        Ok(Self { address, state, task })
    }

    /// The address that the relay listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Breaks every connection. New ones are forwarded.
    pub fn cut(&self) {
        self.state.send_modify(|state| state.generation += 1);
    }

    /// Forwards nothing until [`Relay::release`]. Connections stay open.
    pub fn hold(&self) {
        self.state.send_modify(|state| state.held = true);
    }

    /// Forwards again, beginning with what was held.
    pub fn release(&self) {
        self.state.send_modify(|state| state.held = false);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        self.cut();
    }
}

async fn accept(
    listener: TcpListener,
    target: SocketAddr,
    delay: Duration,
    state: watch::Sender<State>,
) {
    while let Ok((from, _)) = listener.accept().await {
        let watch = state.subscribe();
        tokio::spawn(async move {
            sleep(delay).await;
            let Ok(to) = TcpStream::connect(target).await else { return };
            let _ = (from.set_nodelay(true), to.set_nodelay(true));
            let ((from_read, from_write), (to_read, to_write)) =
                (from.into_split(), to.into_split());
            tokio::select! {
                () = pump(from_read, to_write, delay, watch.clone()) => {}
                () = pump(to_read, from_write, delay, watch) => {}
            }
        });
    }
}

/// Forwards one direction until it ends or is cut.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    delay: Duration,
    mut state: watch::Receiver<State>,
) {
    let generation = state.borrow().generation;
    let mut buffer = vec![0; 16 * 1024];
    // What was sent, each with the time when it arrives.
    let mut sent = VecDeque::new();
    let mut has_ended = false;
    while !(has_ended && sent.is_empty()) {
        let now = *state.borrow_and_update();
        if now.generation != generation {
            return;
        }
        let next = sent.front().map(|(arrives, _)| *arrives);
        tokio::select! {
            // The change first: nothing is forwarded that arrives after `hold` has returned.
            biased;
            changed = state.changed() => if changed.is_err() { return },
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                let (_, bytes) = sent.pop_front().unwrap_or_else(|| (Instant::now(), Vec::new()));
                if to.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            read = from.read(&mut buffer), if !now.held && !has_ended => match read {
                Ok(count @ 1..) => sent.push_back((Instant::now() + delay, buffer[..count].to_vec())),
                _ => has_ended = true,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_are_forwarded_held_and_cut() {
        let echo = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let relay = Relay::to(echo.local_addr().unwrap()).await.unwrap();
        let mut here = TcpStream::connect(relay.address()).await.unwrap();
        let (mut there, _) = echo.accept().await.unwrap();
        let mut byte = [0; 1];
        here.write_all(b"a").await.unwrap();
        there.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"a");
        relay.hold();
        here.write_all(b"b").await.unwrap();
        let held = tokio::time::timeout(Duration::from_millis(50), there.read_exact(&mut byte));
        assert!(held.await.is_err());
        relay.release();
        there.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"b");
        relay.cut();
        assert!(!matches!(here.read(&mut byte).await, Ok(1..)));
        TcpStream::connect(relay.address()).await.unwrap();
    }
}
