//! A server that does what a test tells it, frame by frame.

use barid_client::{Builder, Client};
use barid_wire::v1::{self, ClientFrame, ServerFrame, client_frame, server_frame};
use futures::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async};

pub const PATIENCE: Duration = Duration::from_secs(10);

pub struct Server {
    listener: TcpListener,
}

pub struct Peer {
    pub token: String,
    socket: WebSocketStream<TcpStream>,
}

impl Server {
    pub async fn start() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    /// A client of this server that reconnects fast.
    pub fn client(&self) -> Builder {
        let address = self.listener.local_addr().unwrap();
        Client::builder(format!("ws://{address}"))
            .device("phone")
            .token(|| async { Ok("secret".into()) })
            .reconnect_between(Duration::from_millis(5), Duration::from_millis(20))
    }

    async fn stream(&self) -> TcpStream {
        timeout(PATIENCE, self.listener.accept()).await.expect("a client in time").unwrap().0
    }

    /// The next connection, handshake done.
    #[allow(clippy::result_large_err)]
    pub async fn accept(&self) -> Peer {
        let mut token = String::new();
        let check = |request: &Request, mut response: Response| {
            assert_eq!(request.uri().path(), "/v1/connect");
            let header = |name: &str| request.headers()[name].to_str().unwrap().to_owned();
            assert_eq!(header("sec-websocket-protocol"), "barid.v1.proto");
            token = header("authorization");
            let protocol = request.headers()["sec-websocket-protocol"].clone();
            response.headers_mut().insert("sec-websocket-protocol", protocol);
            Ok::<_, ErrorResponse>(response)
        };
        let socket = accept_hdr_async(self.stream().await, check).await.unwrap();
        Peer { token, socket }
    }

    /// The next connection, up to welcome.
    pub async fn welcome(&self, epoch: u64, generation: u32, seq: u64) -> (Peer, v1::Hello) {
        let mut peer = self.accept().await;
        let hello = peer.hello().await;
        peer.send_welcome(epoch, generation, seq).await;
        (peer, hello)
    }

    /// Answers the next connection with an HTTP error.
    pub async fn refuse(&self, status: u16, text: &str) {
        let mut response = ErrorResponse::new(Some(text.to_owned()));
        *response.status_mut() = status.try_into().unwrap();
        self.answer(response).await;
    }

    /// Answers the next connection with 503 and `Retry-After`.
    pub async fn refuse_for(&self, seconds: u64) {
        let mut response = ErrorResponse::new(None);
        *response.status_mut() = 503.try_into().unwrap();
        response.headers_mut().insert("retry-after", seconds.into());
        self.answer(response).await;
    }

    #[allow(clippy::result_large_err)]
    async fn answer(&self, response: ErrorResponse) {
        let refuse = move |_: &Request, _: Response| Err(response);
        assert!(accept_hdr_async(self.stream().await, refuse).await.is_err());
    }
}

impl Peer {
    async fn message(&mut self) -> Message {
        loop {
            let message = timeout(PATIENCE, self.socket.next()).await.expect("a frame in time");
            match message.expect("an open connection").unwrap() {
                Message::Ping(_) | Message::Pong(_) => {}
                message => return message,
            }
        }
    }

    pub async fn receive(&mut self) -> client_frame::Kind {
        match self.message().await {
            Message::Binary(bytes) => ClientFrame::decode(bytes).unwrap().kind.unwrap(),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub async fn hello(&mut self) -> v1::Hello {
        match self.receive().await {
            client_frame::Kind::Hello(hello) => hello,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub async fn ack(&mut self) -> (u32, u64) {
        match self.receive().await {
            client_frame::Kind::Ack(ack) => (ack.generation.unwrap(), ack.seq),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub async fn closed(&mut self) {
        match self.message().await {
            Message::Close(_) => while let Some(Ok(_)) = self.socket.next().await {},
            other => panic!("unexpected {other:?}"),
        }
    }

    pub async fn send(&mut self, frame: ServerFrame) {
        self.socket.send(Message::Binary(frame.encode_to_vec().into())).await.unwrap();
    }

    pub async fn control(&mut self, control: server_frame::Control) {
        self.send(ServerFrame { control: Some(control), ..Default::default() }).await;
    }

    pub async fn send_welcome(&mut self, epoch: u64, generation: u32, seq: u64) {
        self.send_paced_welcome(epoch, generation, seq, 0).await;
    }

    /// As [`Self::send_welcome`], with an interval between acks.
    pub async fn send_paced_welcome(&mut self, epoch: u64, generation: u32, seq: u64, ms: u32) {
        let position =
            v1::Position { epoch, generation, seq, chain: Some(0), ..Default::default() };
        let welcome = v1::Welcome {
            session: "n/1/1".into(),
            ping_interval_ms: 25_000,
            max_unacked: 256,
            ack_interval_ms: ms,
            positions: vec![position],
            ..Default::default()
        };
        self.control(server_frame::Control::Welcome(welcome)).await;
    }

    pub async fn deliver(&mut self, generation: u32, seqs: std::ops::RangeInclusive<u64>) {
        self.send(ServerFrame { generation, ..deliver(seqs) }).await;
    }

    /// To a group, or everyone.
    pub async fn deliver_to(&mut self, mailbox: &str, seqs: std::ops::RangeInclusive<u64>) {
        self.send(ServerFrame { mailbox: mailbox.into(), ..deliver(seqs) }).await;
    }

    pub async fn close(mut self, code: u16, reason: &'static str) {
        let frame = CloseFrame { code: code.into(), reason: reason.into() };
        self.socket.close(Some(frame)).await.unwrap();
        while let Some(Ok(_)) = self.socket.next().await {}
    }
}

fn deliver(seqs: std::ops::RangeInclusive<u64>) -> ServerFrame {
    let message = |seq| v1::Message {
        seq,
        id: format!("m{seq}"),
        body: Some(v1::message::Body::Text(format!("text {seq}"))),
    };
    ServerFrame { deliver: seqs.map(message).collect(), ..Default::default() }
}
