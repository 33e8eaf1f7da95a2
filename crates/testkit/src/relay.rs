//! A TCP relay whose connections a test can cut or hold.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

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
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let state = watch::Sender::new(State::default());
        let task = tokio::spawn(accept(listener, target, state.clone()));
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

async fn accept(listener: TcpListener, target: SocketAddr, state: watch::Sender<State>) {
    while let Ok((from, _)) = listener.accept().await {
        let watch = state.subscribe();
        tokio::spawn(async move {
            let Ok(to) = TcpStream::connect(target).await else { return };
            let _ = (from.set_nodelay(true), to.set_nodelay(true));
            let ((from_read, from_write), (to_read, to_write)) =
                (from.into_split(), to.into_split());
            tokio::select! {
                () = pump(from_read, to_write, watch.clone()) => {}
                () = pump(to_read, from_write, watch) => {}
            }
        });
    }
}

/// Forwards one direction until it ends or is cut.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut state: watch::Receiver<State>) {
    let generation = state.borrow().generation;
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let now = *state.borrow_and_update();
        if now.generation != generation {
            return;
        }
        tokio::select! {
            // The change first: nothing is forwarded that arrives after `hold` has returned.
            biased;
            changed = state.changed() => if changed.is_err() { return },
            read = from.read(&mut buffer), if !now.held => {
                let Ok(count @ 1..) = read else { return };
                if to.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

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
