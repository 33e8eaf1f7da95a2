//! The floor: the barest WebSocket server that can hold connections and broadcast to them. It has one task
//! per connection over tokio-tungstenite, and no sessions, tokens or routes. What Barid takes beyond the
//! floor is the cost of its guarantees.

use std::net::SocketAddr;

use bytes::Bytes;
use clap::Args;
use futures::{SinkExt as _, StreamExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_tungstenite::accept_async_with_config;
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tonic::{Request, Response, Status};

use crate::agent::announce;
use crate::rpc::floor_server::{Floor, FloorServer};
use crate::rpc::{BroadcastRequest, Nothing};

/// Messages that are queued for the slowest connection, at most.
const WAITING_MAX: usize = 128;

/// The floor's listeners.
#[derive(Debug, Args)]
pub struct Options {
    /// Address for devices.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Address for the controller.
    #[arg(long, default_value = "127.0.0.1:0")]
    grpc_listen: SocketAddr,
}

/// Serves until the process is killed.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let connections = TcpListener::bind(options.listen).await?;
    let control = TcpListener::bind(options.grpc_listen).await?;
    announce(&[control.local_addr()?, connections.local_addr()?])?;
    let (messages, _) = broadcast::channel(WAITING_MAX);
    tokio::spawn(accept(connections, messages.clone()));
    let service = FloorServer::new(Service { messages });
    let incoming = TcpListenerStream::new(control);
    tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await?;
    Ok(true)
}

async fn accept(listener: TcpListener, messages: broadcast::Sender<Bytes>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(serve(stream, messages.subscribe()));
    }
}

async fn serve(stream: TcpStream, mut messages: broadcast::Receiver<Bytes>) {
    let config = WebSocketConfig::default().read_buffer_size(128).write_buffer_size(0);
    let _ = stream.set_nodelay(true);
    let Ok(mut socket) = accept_async_with_config(stream, Some(config)).await else { return };
    loop {
        tokio::select! {
            message = messages.recv() => {
                let Ok(message) = message else { return };
                if socket.send(Frame::Binary(message)).await.is_err() {
                    return;
                }
            }
            frame = socket.next() => if !matches!(frame, Some(Ok(_))) { return },
        }
    }
}

struct Service {
    messages: broadcast::Sender<Bytes>,
}

#[tonic::async_trait]
impl Floor for Service {
    async fn broadcast(
        &self,
        request: Request<BroadcastRequest>,
    ) -> Result<Response<Nothing>, Status> {
        let BroadcastRequest { count, payload_bytes } = request.into_inner();
        let message = Bytes::from(vec![b'x'; payload_bytes as usize]);
        for _ in 0..count {
            // A connection that lags behind the channel is closed, so wait for the slowest.
            while self.messages.len() >= WAITING_MAX {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            let _ = self.messages.send(message.clone());
        }
        Ok(Response::new(Nothing {}))
    }
}
