//! Devices that cost as little as devices can, so that a measurement is the cluster's: one task and
//! one socket each, protobuf frames, acknowledgements as the protocol advises. They do not come
//! back after a close; for that there are [`crate::clients`].

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use barid_wire::frames::{Encoding, ServerFrame, decode_server, encode_client};
use barid_wire::v1::{Ack, Hello, client_frame::Kind};
use futures::{FutureExt as _, SinkExt as _, StreamExt as _, TryStreamExt as _, stream};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use crate::audit::Audit;
use crate::producer::user;

/// Handshakes under way at once.
const CONNECTING_MAX: usize = 32;

/// How long one may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Connected devices. Dropped, they vanish.
#[derive(Debug)]
pub struct Fleet {
    devices: JoinSet<anyhow::Result<()>>,
}

impl Fleet {
    /// Connects one device of each user of `audit` to the nodes at `addresses` in turn.
    /// `ack_delay`: a device acknowledges at once, but not sooner than that after its last time.
    ///
    /// # Errors
    /// A device is not welcomed.
    pub async fn connect(
        addresses: &[std::net::SocketAddr],
        token: impl Fn(&str) -> String,
        ack_delay: Duration,
        audit: &Arc<Audit>,
    ) -> anyhow::Result<Self> {
        let users = 0..u32::try_from(audit.users())?;
        let welcomed: Vec<_> = stream::iter(users)
            .map(|number| {
                let address = addresses[number as usize % addresses.len()];
                let token = token(&user(number.into()));
                async move {
                    let opened = tokio::time::timeout(CONNECT_TIMEOUT, open(address, &token));
                    let socket = opened.await.context("a device was not welcomed in time")??;
                    Ok::<_, anyhow::Error>((number, socket))
                }
            })
            .buffer_unordered(CONNECTING_MAX)
            .try_collect()
            .await?;
        let mut devices = JoinSet::new();
        for (number, socket) in welcomed {
            let device = Device { socket, number, ack_delay, audit: Arc::clone(audit) };
            devices.spawn(device.serve());
        }
        Ok(Self { devices })
    }

    /// Fails if a device was closed.
    ///
    /// # Errors
    /// Says why the first of them was.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.devices.try_join_next() {
            None => Ok(()),
            Some(ended) => ended?.context("a device was closed"),
        }
    }
}

type Socket = WebSocketStream<TcpStream>;

async fn open(address: std::net::SocketAddr, token: &str) -> anyhow::Result<Socket> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut request = format!("ws://{address}/v1/connect").into_client_request()?;
    let headers = request.headers_mut();
    headers.insert("authorization", format!("Bearer {token}").parse()?);
    headers.insert("sec-websocket-protocol", Encoding::Proto.subprotocol().parse()?);
    let config = WebSocketConfig::default().read_buffer_size(4 << 10).write_buffer_size(0);
    let (mut socket, _) = client_async_with_config(request, stream, Some(config)).await?;
    let hello = Hello { device: "load".into(), platform: "loadtest".into(), ..Hello::default() };
    socket.send(Frame::Binary(encode_client(Encoding::Proto, &Kind::Hello(hello)))).await?;
    loop {
        match socket.next().await.context("closed before it was welcomed")?? {
            Frame::Binary(bytes) => match decode_server(Encoding::Proto, bytes)? {
                ServerFrame::Welcome(_) => return Ok(socket),
                other => bail!("expected welcome, got {other:?}"),
            },
            Frame::Close(close) => bail!("closed before it was welcomed: {close:?}"),
            _ => (),
        }
    }
}

struct Device {
    socket: Socket,
    number: u32,
    ack_delay: Duration,
    audit: Arc<Audit>,
}

impl Device {
    async fn serve(mut self) -> anyhow::Result<()> {
        let (mut received, mut acked) = (0, 0);
        let mut next_ack = Instant::now();
        loop {
            if received > acked && next_ack <= Instant::now() {
                let ack = Ack { seq: received, ..Ack::default() };
                let frame = encode_client(Encoding::Proto, &Kind::Ack(ack));
                self.socket.send(Frame::Binary(frame)).await?;
                acked = received;
                next_ack = Instant::now() + self.ack_delay;
            }
            let frame = tokio::select! {
                biased;
                frame = self.socket.next() => frame,
                () = sleep_until(next_ack), if received > acked => continue,
            };
            self.read(frame, &mut received)?;
            // What lies in the buffer is acknowledged in one go.
            while let Some(frame) = self.socket.next().now_or_never() {
                self.read(frame, &mut received)?;
            }
        }
    }

    fn read(
        &self,
        frame: Option<Result<Frame, tokio_tungstenite::tungstenite::Error>>,
        received: &mut u64,
    ) -> anyhow::Result<()> {
        match frame.context("end of stream")?? {
            Frame::Binary(bytes) => match decode_server(Encoding::Proto, bytes)? {
                ServerFrame::Deliver(deliver) => {
                    for message in deliver.messages {
                        ensure!(message.seq > *received, "seq {} came again", message.seq);
                        *received = message.seq;
                        self.audit.shown(self.number, &message.id);
                    }
                }
                ServerFrame::Skip(skip) => *received = (*received).max(skip.to),
                _ => (),
            },
            Frame::Close(close) => bail!("{close:?}"),
            _ => (),
        }
        Ok(())
    }
}
