//! A fixed port for the in-process broker, which chooses its own port. Clients are told the fixed one.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use barid_runtime::repeats;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

/// Connections at once; further ones wait, which is logged. No option sets it: a client has one connection or two, all of
/// them are on this machine, and each takes three file descriptors of this process, which has 1,024 by default. With
/// `--kafka` there is no relay.
const CONNECTIONS_MAX: usize = 256;

/// Forwards connections until it is dropped.
pub struct Relay {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Relay {
    /// Listens on `port` of the loopback interface.
    pub async fn start(port: u16, to: String) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        let address = listener.local_addr()?;
        Ok(Self { address, task: tokio::spawn(accept(listener, to, CONNECTIONS_MAX)) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, to: String, connections_max: usize) {
    let room = Arc::new(Semaphore::new(connections_max));
    let mut forwarding = tokio::task::JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // No file descriptor is left.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Some(permit) = place(&room).await else { return };
        while forwarding.try_join_next().is_some() {}
        let to = to.clone();
        forwarding.spawn(async move {
            // An error ends the connection, which the client then repeats.
            let _ended = forward(client, &to).await;
            drop(permit);
        });
    }
}

/// A place for a connection, as soon as there is one.
async fn place(room: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    if let Ok(permit) = Arc::clone(room).try_acquire_owned() {
        return Some(permit);
    }
    if let Some(repeated) = repeats::due("the in-process Kafka has no place") {
        tracing::warn!(
            repeated,
            "the in-process Kafka has {CONNECTIONS_MAX} connections, and another client waits: end \
             some clients, or give a Kafka of your own with --kafka"
        );
    }
    Arc::clone(room).acquire_owned().await.ok()
}

async fn forward(mut client: TcpStream, to: &str) -> std::io::Result<()> {
    let mut broker = TcpStream::connect(to).await?;
    client.set_nodelay(true)?;
    broker.set_nodelay(true)?;
    copy_bidirectional(&mut client, &mut broker).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    #[tokio::test]
    async fn a_connection_beyond_the_bound_waits_for_a_place() {
        let broker = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = broker.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = broker.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = client.split();
                    let _ended = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener, to, 1));
        let open = || async {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(b"x").await.unwrap();
            client
        };
        let mut first = open().await;
        assert_eq!(first.read_u8().await.unwrap(), b'x');
        let mut second = open().await;
        let waits = timeout(Duration::from_millis(200), second.read_u8()).await;
        assert!(waits.is_err(), "{waits:?}");
        drop(first);
        assert_eq!(second.read_u8().await.unwrap(), b'x');
    }
}
