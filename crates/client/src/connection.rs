//! A WebSocket connection: opening it, sending and receiving frames.

use std::sync::{Arc, Once};
use std::time::Duration;

use barid_core::limits::{GENERATION_MAX, WIRE_NUMBER_MAX};
use barid_wire::v1::{ClientFrame, ServerFrame, client_frame};
use futures::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::{HeaderValue, Response, Uri, header};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message};
use tokio_tungstenite::tungstenite::{self, error::ProtocolError};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_tls_with_config};

use crate::event::Disconnect;
use crate::token::Token;
use crate::trust::Trust;

const SUBPROTOCOL: &str = "barid.v1.proto";
/// Bound of a frame from the server, far above what a node sends.
const FRAME_BYTES_MAX: usize = 64 << 20;
/// If a frame cannot be written for this long, the network is lost.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Upper bound of a `Retry-After`, so that the device reconnects eventually.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);
/// How long to wait for the answer to a close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// An open WebSocket.
pub(crate) struct Connection {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Connection {
    /// Connects and authenticates. `trust` replaces the public authorities.
    pub(crate) async fn open(
        uri: &Uri,
        token: &Token,
        trust: Option<&Trust>,
    ) -> Result<Self, Disconnect> {
        install_tls_provider();
        let place = match (uri.host(), uri.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (host, _) => host.unwrap_or_default().to_owned(),
        };
        let network = |error: &dyn std::fmt::Display| {
            Disconnect::Network(format!("cannot connect to {place}: {error}"))
        };
        let mut request = uri.clone().into_client_request().map_err(|e| network(&e))?;
        let mut bearer = HeaderValue::try_from(format!("Bearer {}", token.expose()))
            .map_err(|_| Disconnect::Token("it has characters that no header may have".into()))?;
        bearer.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
        let subprotocol = HeaderValue::from_static(SUBPROTOCOL);
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, subprotocol);
        let config = WebSocketConfig::default()
            .read_buffer_size(8 << 10)
            .write_buffer_size(0)
            .max_message_size(Some(FRAME_BYTES_MAX))
            .max_frame_size(Some(FRAME_BYTES_MAX));
        let connector = trust.map(Trust::connector);
        match connect_async_tls_with_config(request, Some(config), true, connector).await {
            Ok((socket, _)) => Ok(Self { socket }),
            Err(tungstenite::Error::Http(response)) => Err(http_error(&response)),
            Err(tungstenite::Error::Io(error)) => Err(network(&error)),
            Err(error) => Err(network(&error)),
        }
    }

    /// Receives the next frame. Pings are answered. Cancel-safe.
    /// `Ok(None)`: a message without a frame, such as a ping.
    pub(crate) async fn receive(&mut self) -> Result<Option<ServerFrame>, Disconnect> {
        match self.socket.next().await {
            Some(Ok(Message::Binary(bytes))) => {
                let frame = ServerFrame::decode(bytes)
                    .map_err(|error| Disconnect::Violation(error.to_string()))?;
                check_numbers(&frame)?;
                Ok(Some(frame))
            }
            Some(Ok(Message::Text(_))) => {
                Err(Disconnect::Violation("a text frame on a binary protocol".into()))
            }
            Some(Ok(Message::Close(frame))) => Err(closed(frame)),
            Some(Ok(_)) => Ok(None),
            Some(Err(error)) => Err(failed(&error)),
            None => Err(closed(None)),
        }
    }

    pub(crate) async fn send(&mut self, kind: client_frame::Kind) -> Result<(), Disconnect> {
        let frame = Message::Binary(ClientFrame { kind: Some(kind) }.encode_to_vec().into());
        match timeout(WRITE_TIMEOUT, self.socket.send(frame)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(failed(&error)),
            Err(_) => Err(Disconnect::Timeout("progress of a write")),
        }
    }

    /// Closes, and waits briefly for the answer, which shows that everything before has arrived.
    pub(crate) async fn close(mut self, reason: &'static str) {
        let frame = CloseFrame { code: CloseCode::Normal, reason: reason.into() };
        let goodbye = async {
            if self.socket.close(Some(frame)).await.is_ok() {
                while let Some(Ok(_)) = self.socket.next().await {}
            }
        };
        let _ = timeout(CLOSE_TIMEOUT, goodbye).await;
    }
}

/// Refuses numbers that no node sends: they could overflow when incremented, or be refused when sent back.
fn check_numbers(frame: &ServerFrame) -> Result<(), Disconnect> {
    use barid_wire::v1::server_frame::Control;
    let number = |what: &str, number: u64, max: u64| match number <= max {
        true => Ok(()),
        false => Err(Disconnect::Violation(format!("{what} {number} is above {max}"))),
    };
    let generation = |value: u32| number("generation", value.into(), GENERATION_MAX.into());
    generation(frame.generation)?;
    for message in &frame.deliver {
        number("seq", message.seq, WIRE_NUMBER_MAX)?;
    }
    match &frame.control {
        Some(Control::Welcome(welcome)) => welcome.positions.iter().try_for_each(|position| {
            number("epoch", position.epoch, WIRE_NUMBER_MAX)?;
            number("seq", position.seq, WIRE_NUMBER_MAX)?;
            generation(position.generation)
        }),
        Some(Control::Skip(skip)) => {
            number("skip.to", skip.to, WIRE_NUMBER_MAX)?;
            generation(skip.generation)
        }
        _ => Ok(()),
    }
}

fn http_error(response: &Response<Option<Vec<u8>>>) -> Disconnect {
    let body = response.body().as_deref().unwrap_or_default();
    let text: String = String::from_utf8_lossy(body).trim().chars().take(200).collect();
    let retry_after = response.headers().get(header::RETRY_AFTER);
    let retry_after = retry_after.and_then(|value| value.to_str().ok()?.parse().ok());
    let retry_after = retry_after.map(|s: u64| Duration::from_secs(s).min(RETRY_AFTER_MAX));
    Disconnect::Http { status: response.status().as_u16(), text, retry_after }
}

fn closed(frame: Option<CloseFrame>) -> Disconnect {
    match frame {
        Some(frame) => {
            Disconnect::Closed { code: frame.code.into(), reason: frame.reason.as_str().to_owned() }
        }
        None => Disconnect::Network("the connection ended without a close frame".into()),
    }
}

fn failed(error: &tungstenite::Error) -> Disconnect {
    use tungstenite::Error;
    match error {
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)
        | Error::ConnectionClosed
        | Error::AlreadyClosed => closed(None),
        Error::Protocol(_) | Error::Capacity(_) | Error::Utf8(_) => {
            Disconnect::Violation(error.to_string())
        }
        _ => Disconnect::Network(error.to_string()),
    }
}

/// Installs the process-wide cryptography provider for `wss://`, unless the application has installed one.
fn install_tls_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let provider: Arc<_> = rustls::crypto::aws_lc_rs::default_provider().into();
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            let _ = Arc::unwrap_or_clone(provider).install_default();
        }
    });
}
