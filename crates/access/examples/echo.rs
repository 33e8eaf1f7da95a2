//! Echoes every message, over the socket code that serves devices: for conformance suites
//! (`scripts/autobahn.sh`). It asks for no token and no subprotocol.
//!
//!     cargo run -p barid-access --example echo -- [ADDRESS [FRAME_BYTES_MAX]]

use std::future::poll_fn;
use std::io::Write as _;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Result;
use barid_access::accept_anybody;
use barid_access::config::LimitsConfig;
use barid_access::socket::{Close, Message, Received, Socket, refusal};
use tokio::net::{TcpListener, TcpStream};

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:9001".into());
    let mut limits = LimitsConfig::default();
    if let Some(bytes) = arguments.next() {
        limits.frame_bytes_max = bytes.parse()?;
        // The suite sends messages in fragments of 64 bytes.
        limits.fragments_max = 1 << 20;
    }
    let listener = TcpListener::bind(&address).await?;
    writeln!(std::io::stdout(), "ws://{}", listener.local_addr()?)?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(serve(stream, limits.clone()));
    }
}

async fn serve(stream: TcpStream, limits: LimitsConfig) {
    if let Some(mut socket) = accept_anybody(stream, &limits).await {
        let close = poll_fn(|cx| echo(&mut socket, cx)).await;
        let limit = Duration::from_millis(limits.close_timeout_ms);
        socket.hang_up(None, close.as_ref(), limit).await;
    }
}

/// Ready with what to close with; `None` if the other end closed or is gone.
fn echo(socket: &mut Socket, cx: &mut Context<'_>) -> Poll<Option<Close>> {
    loop {
        match socket.poll_flush(cx) {
            Poll::Ready(Err(_)) => return Poll::Ready(None),
            // A client that does not read is not read from.
            Poll::Pending if !socket.has_room() => return Poll::Pending,
            Poll::Pending | Poll::Ready(Ok(())) => (),
        }
        let message = match socket.poll_next(cx, &mut Received::default()) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Ready(Some(Err(error))) => return Poll::Ready(refusal(&error)),
            Poll::Ready(Some(Ok(None))) => continue,
            Poll::Ready(Some(Ok(Some(message)))) => message,
        };
        match message {
            Message::Text(_) | Message::Binary(_) => {
                if let Err(error) = socket.feed(message) {
                    return Poll::Ready(refusal(&error));
                }
            }
            Message::Close(_) => return Poll::Ready(None),
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => (),
        }
    }
}
