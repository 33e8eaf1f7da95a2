//! A fixed port for the in-process broker, which chooses its own port. Clients are told the fixed one.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Further connections wait.
const CONNECTIONS_MAX: usize = 512;

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
        Ok(Self { address, task: tokio::spawn(accept(listener, to)) })
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

async fn accept(listener: TcpListener, to: String) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut forwarding = tokio::task::JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        while forwarding.try_join_next().is_some() {}
        let Ok((client, _)) = listener.accept().await else {
            // No file descriptor is left.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let to = to.clone();
        forwarding.spawn(async move {
            // An error ends the connection, which the client then repeats.
            let _ended = forward(client, &to).await;
            drop(permit);
        });
    }
}

async fn forward(mut client: TcpStream, to: &str) -> std::io::Result<()> {
    let mut broker = TcpStream::connect(to).await?;
    client.set_nodelay(true)?;
    broker.set_nodelay(true)?;
    copy_bidirectional(&mut client, &mut broker).await.map(drop)
}
