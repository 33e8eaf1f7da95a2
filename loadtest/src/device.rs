//! Devices that use few resources, so that a measurement shows the cluster's: one task and one socket each,
//! protobuf frames, acknowledgements as the protocol advises. They do not reconnect; the Rust SDK does
//! ([`crate::run`]).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use barid_core::limits::EVERYONE;
use barid_wire::frames::{Encoding, ServerFrame, decode_server, encode_client};
use barid_wire::v1::{Ack, Hello, Message, client_frame::Kind};
use futures::{FutureExt as _, SinkExt as _, StreamExt as _};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{Connector, MaybeTlsStream, WebSocketStream, client_async_tls_with_config};

/// Receive buffer of a slow device's socket.
const NARROW_BYTES: u32 = 4 << 10;

pub type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// How a device connects to its node.
#[derive(Debug, Clone)]
pub struct Path {
    pub node: SocketAddr,
    /// A source address of this machine.
    pub source: Option<IpAddr>,
    /// Use a small receive buffer.
    pub narrow: bool,
    /// The ping interval to ask for, ms; 0: the node's default.
    pub ping_interval_ms: u32,
    /// Use TLS.
    pub tls: Option<Arc<rustls::ClientConfig>>,
}

impl Path {
    fn url(&self, path: &str) -> String {
        let scheme = if self.tls.is_some() { "wss" } else { "ws" };
        format!("{scheme}://{}{path}", self.node)
    }

    fn connector(&self) -> Connector {
        self.tls.clone().map_or(Connector::Plain, Connector::Rustls)
    }
}

async fn stream(path: &Path) -> anyhow::Result<TcpStream> {
    let Path { node, source, narrow, .. } = path;
    let socket = if node.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(source) = source {
        socket.bind(SocketAddr::new(*source, 0))?;
    }
    if *narrow {
        socket.set_recv_buffer_size(NARROW_BYTES)?;
    }
    let stream = socket.connect(*node).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn config() -> WebSocketConfig {
    WebSocketConfig::default().read_buffer_size(4 << 10).write_buffer_size(0)
}

/// Opens a connection to the floor.
pub async fn open_plain(path: &Path) -> anyhow::Result<Socket> {
    let (stream, url, connector) = (stream(path).await?, path.url("/"), path.connector());
    Ok(client_async_tls_with_config(url, stream, Some(config()), Some(connector)).await?.0)
}

/// Reads one byte per second until the connection ends. Returns why it ended.
pub async fn read_slowly(mut socket: Socket) -> anyhow::Result<()> {
    loop {
        socket.get_mut().read_u8().await?;
        sleep(Duration::from_secs(1)).await;
    }
}

/// Counts the floor's messages until the connection ends. Returns why it ended.
pub async fn read_plain(mut socket: Socket, delivered: &AtomicU64) -> anyhow::Result<()> {
    while let Some(frame) = socket.next().await {
        if let Frame::Binary(_) = frame? {
            delivered.fetch_add(1, Ordering::Relaxed);
        }
    }
    bail!("end of stream")
}

/// Opens a session for the token's user.
pub async fn open(path: &Path, token: &str) -> anyhow::Result<Socket> {
    let (stream, connector) = (stream(path).await?, path.connector());
    let mut request = path.url("/v1/connect").into_client_request()?;
    let headers = request.headers_mut();
    headers.insert("authorization", format!("Bearer {token}").parse()?);
    headers.insert("sec-websocket-protocol", Encoding::Proto.subprotocol().parse()?);
    let opened = client_async_tls_with_config(request, stream, Some(config()), Some(connector));
    let (mut socket, _) = opened.await?;
    let hello = Hello {
        device: "load".into(),
        platform: "loadtest".into(),
        ping_interval_ms: path.ping_interval_ms,
        ..Hello::default()
    };
    socket.send(Frame::Binary(encode_client(Encoding::Proto, &Kind::Hello(hello)))).await?;
    loop {
        match socket.next().await.context("connection closed before Welcome")?? {
            Frame::Binary(bytes) => match decode_server(Encoding::Proto, bytes)? {
                ServerFrame::Welcome(_) => return Ok(socket),
                other => bail!("expected Welcome, got {other:?}"),
            },
            Frame::Close(close) => bail!("connection closed before Welcome: {close:?}"),
            _ => (),
        }
    }
}

/// The application behind the devices.
pub trait Seen: Send + Sync + 'static {
    /// Shows the message `id` to a user.
    fn shown(&self, number: u32, id: &str);

    /// A message that was shown before arrived again.
    fn resent(&self) {}

    /// Messages to everyone arrived.
    fn for_everyone(&self, _messages: usize) {}
}

/// A session that acknowledges what it is shown.
pub struct Device<S> {
    socket: Socket,
    number: u32,
    ack_delay: Duration,
    seen: S,
    /// The newest position that was shown; 0 before the first.
    position: Arc<AtomicU64>,
    acked: u64,
    /// The position of the last message to everyone.
    everyone: u64,
}

impl<S: Seen> Device<S> {
    /// The device of user `number`. It acknowledges at once, but not sooner than `ack_delay` after its last
    /// acknowledgement.
    pub fn new(socket: Socket, number: u32, ack_delay: Duration, seen: S) -> Self {
        Self { socket, number, ack_delay, seen, position: Arc::default(), acked: 0, everyone: 0 }
    }

    /// Resumes an earlier session of the device, which showed everything up to this position.
    #[must_use]
    pub fn resume(self, position: Arc<AtomicU64>) -> Self {
        // Unacknowledged messages before the position are re-sent.
        let acked = position.load(Ordering::Relaxed);
        Self { position, acked, ..self }
    }

    /// Reads and acknowledges until the connection ends or a position is missing. Returns why it ended.
    pub async fn serve(mut self) -> anyhow::Result<()> {
        let mut next_ack = Instant::now();
        loop {
            if self.received() > self.acked && next_ack <= Instant::now() {
                let ack = Ack { seq: self.received(), ..Ack::default() };
                self.acked = ack.seq;
                let frame = encode_client(Encoding::Proto, &Kind::Ack(ack));
                self.socket.send(Frame::Binary(frame)).await?;
                next_ack = Instant::now() + self.ack_delay;
            }
            let frame = tokio::select! {
                biased;
                frame = self.socket.next() => frame,
                () = sleep_until(next_ack), if self.received() > self.acked => continue,
            };
            self.read(frame)?;
            // Everything in the buffer is acknowledged at once.
            while let Some(frame) = self.socket.next().now_or_never() {
                self.read(frame)?;
            }
        }
    }

    fn received(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    fn read(
        &mut self,
        frame: Option<Result<Frame, tokio_tungstenite::tungstenite::Error>>,
    ) -> anyhow::Result<()> {
        match frame.context("end of stream")?? {
            Frame::Binary(bytes) => match decode_server(Encoding::Proto, bytes)? {
                ServerFrame::Deliver(deliver) if deliver.mailbox == EVERYONE => {
                    self.for_everyone(&deliver.messages)?;
                }
                ServerFrame::Deliver(deliver) => {
                    for message in deliver.messages {
                        // The first position is the node's choice; later ones are consecutive.
                        let (seq, before) = (message.seq, self.received());
                        ensure!(before == 0 || seq <= before + 1, "seq {seq} after {before}");
                        if seq <= before {
                            // Re-sent before the acknowledgement arrived, or not yet acknowledged when
                            // the device left. As in every SDK, it is not shown, but acknowledged again.
                            self.acked = self.acked.min(seq.saturating_sub(1));
                            self.seen.resent();
                            continue;
                        }
                        self.position.store(seq, Ordering::Relaxed);
                        self.seen.shown(self.number, &message.id);
                    }
                }
                ServerFrame::Skip(skip) => {
                    self.position.fetch_max(skip.to, Ordering::Relaxed);
                }
                _ => (),
            },
            Frame::Close(close) => bail!("{close:?}"),
            _ => (),
        }
        Ok(())
    }
}

impl<S: Seen> Device<S> {
    /// Checks that each message arrives once and in order.
    fn for_everyone(&mut self, messages: &[Message]) -> anyhow::Result<()> {
        for Message { seq, .. } in messages {
            let before = self.everyone;
            ensure!(*seq == before + 1, "seq {seq} to everyone after {before}");
            self.everyone = *seq;
        }
        self.seen.for_everyone(messages.len());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use barid_wire::v1::{Message, ServerFrame as Wire};
    use prost::Message as _;
    use tokio::net::TcpListener;

    use super::*;

    /// The ids that were shown, and the number of re-sent messages.
    #[derive(Clone, Default)]
    struct Application(Arc<parking_lot::Mutex<(Vec<String>, u32)>>);

    impl Seen for Application {
        fn shown(&self, _: u32, id: &str) {
            self.0.lock().0.push(id.to_owned());
        }

        fn resent(&self) {
            self.0.lock().1 += 1;
        }
    }

    /// Sends these positions to a device. Returns why it ended, the ids that it showed, and the number of
    /// re-sent messages.
    async fn receive(seqs: &'static [u64]) -> (String, String, u32) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let node = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
            for seq in seqs {
                let message = Message { seq: *seq, id: format!("m{seq}"), ..Message::default() };
                let frame = Wire { deliver: vec![message], ..Wire::default() };
                socket.send(Frame::Binary(frame.encode_to_vec().into())).await.unwrap();
            }
        });
        let source = Some("127.0.0.9".parse().unwrap());
        let path = Path { node, source, narrow: false, ping_interval_ms: 0, tls: None };
        let socket = open_plain(&path).await.unwrap();
        let application = Application::default();
        let ended =
            Device::new(socket, 0, Duration::from_secs(9), application.clone()).serve().await;
        serving.await.unwrap();
        let (shown, again) = application.0.lock().clone();
        (ended.unwrap_err().to_string(), shown.join(" "), again)
    }

    #[tokio::test]
    async fn a_device_finds_missing_positions_and_shows_nothing_twice() {
        let (why, shown, again) = receive(&[4, 5, 7]).await;
        assert_eq!((why.as_str(), shown.as_str(), again), ("seq 7 after 5", "m4 m5", 0));
        let (why, shown, again) = receive(&[1, 2, 1, 2, 3]).await;
        assert_eq!((shown.as_str(), again), ("m1 m2 m3", 2));
        assert!(!why.contains("after"), "{why}");
    }
}
