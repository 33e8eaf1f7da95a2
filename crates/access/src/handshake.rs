//! From a socket to an authenticated WebSocket: the request is read, judged and answered here, so
//! that a refusal is a plain HTTP answer with a reason, and a connection that is refused costs little.

use std::sync::Arc;
use std::time::Duration;

use barid_wire::frames::Encoding;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::machine::TryParse as _;
use tokio_tungstenite::tungstenite::handshake::server::{Request, create_response, write_response};
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use crate::auth::{AuthError, Claims};
use crate::node::Node;

const PATH: &str = "/v1/connect";
const REQUEST_BYTES_MAX: usize = 16 << 10;
const BEARER_PROTOCOL: &str = "bearer.";
/// Small on purpose: it is there for every connection. Larger frames make it grow.
const READ_BUFFER_BYTES: usize = 512;
/// What is written goes out in one flush of about this size.
pub(crate) const WRITE_BUFFER_BYTES: usize = 128 << 10;

/// A device's WebSocket.
pub type Socket = WebSocketStream<TcpStream>;

/// A handshake that succeeded.
pub struct Accepted {
    /// The WebSocket.
    pub socket: Socket,
    /// How it speaks.
    pub encoding: Encoding,
    /// Who it may be.
    pub claims: Claims,
    /// When, ms since the Unix epoch by the clock of the user's mailbox, which all nodes share: it
    /// orders the attempts of devices that do not count them.
    pub at_ms: u64,
}

/// A handshake that is answered with something else than 101.
struct Refusal {
    status: &'static str,
    label: &'static str,
    text: String,
}

impl Refusal {
    fn new(status: &'static str, label: &'static str, text: impl Into<String>) -> Self {
        Self { status, label, text: text.into() }
    }
}

/// Reads and answers a handshake; `None` if it was refused or the device went away. Counts itself.
pub async fn accept(node: &Node, mut stream: TcpStream) -> Option<Accepted> {
    let limit = Duration::from_millis(node.limits.handshake_timeout_ms);
    let judged = tokio::time::timeout(limit, judge(node, &mut stream)).await;
    let refusal = match judged {
        Err(_) => return count(node, "timeout"),
        Ok(Err(Failure::Gone)) => return count(node, "gone"),
        Ok(Err(Failure::Refused(refusal))) => refusal,
        Ok(Ok(judged)) => {
            node.metrics.handshake("accepted");
            return Some(upgrade(node, stream, judged).await);
        }
    };
    tracing::debug!(status = refusal.status, reason = refusal.text, "handshake refused");
    let _ = tokio::time::timeout(limit, refuse(stream, &refusal)).await;
    count(node, refusal.label)
}

fn count<T>(node: &Node, label: &'static str) -> Option<T> {
    node.metrics.handshake(label);
    None
}

/// Answers a connection for which there is no room, without reading its request.
pub async fn turn_away(node: &Node, stream: TcpStream) {
    let refusal = Refusal::new("503 Service Unavailable", "overloaded", "no room: come back later");
    let limit = Duration::from_millis(node.limits.close_timeout_ms);
    let _ = tokio::time::timeout(limit, refuse(stream, &refusal)).await;
    node.metrics.handshake(refusal.label);
}

enum Failure {
    Gone,
    Refused(Refusal),
}

impl From<std::io::Error> for Failure {
    fn from(_: std::io::Error) -> Self {
        Self::Gone
    }
}

struct Judged {
    rest: Vec<u8>,
    encoding: Encoding,
    claims: Claims,
}

async fn judge(node: &Node, stream: &mut TcpStream) -> Result<Judged, Failure> {
    let (request, rest) = read_request(stream).await?;
    if request.uri().path() != PATH {
        return Err(refused("404 Not Found", "not_found", format!("devices connect to {PATH}")));
    }
    if node.is_draining() {
        return Err(refused("503 Service Unavailable", "draining", "this node is being drained"));
    }
    let offered = protocols(&request);
    let Some(encoding) = offered.iter().find_map(|name| Encoding::from_subprotocol(name)) else {
        let text = "offer subprotocol barid.v1.json or barid.v1.proto";
        return Err(refused("400 Bad Request", "subprotocol", text));
    };
    let mut response = create_response(&request)
        .map_err(|error| refused("400 Bad Request", "bad_request", error.to_string()))?;
    let claims = match token(&request, &offered) {
        Some(token) => node.verifier.verify(&token, node.now_ms() / 1000).await,
        None => Err(AuthError::Missing),
    };
    let claims =
        claims.map_err(|error| refused("401 Unauthorized", "unauthorized", error.to_string()))?;
    let protocol = HeaderValue::from_static(encoding.subprotocol());
    response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, protocol);
    let mut bytes = Vec::with_capacity(256);
    write_response(&mut bytes, &response)
        .map_err(|error| refused("400 Bad Request", "bad_request", error.to_string()))?;
    stream.write_all(&bytes).await?;
    Ok(Judged { rest, encoding, claims })
}

fn refused(status: &'static str, label: &'static str, text: impl Into<String>) -> Failure {
    Failure::Refused(Refusal::new(status, label, text))
}

async fn read_request(stream: &mut TcpStream) -> Result<(Request, Vec<u8>), Failure> {
    let mut bytes = Vec::with_capacity(1024);
    loop {
        // Looked through and parsed once, however slowly it trickles in.
        let seen = bytes.len().saturating_sub(3);
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(Failure::Gone);
        }
        if bytes.len() > REQUEST_BYTES_MAX {
            let text = format!("the request has more than {REQUEST_BYTES_MAX} bytes");
            return Err(refused("431 Request Header Fields Too Large", "bad_request", text));
        }
        if bytes[seen..].windows(4).any(|end| end == b"\r\n\r\n") {
            return match Request::try_parse(&bytes) {
                Ok(Some((length, request))) => Ok((request, bytes.split_off(length))),
                Ok(None) => Err(refused("400 Bad Request", "bad_request", "not a request")),
                Err(error) => Err(refused("400 Bad Request", "bad_request", error.to_string())),
            };
        }
    }
}

fn protocols(request: &Request) -> Vec<String> {
    request
        .headers()
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_owned())
        .collect()
}

fn token(request: &Request, offered: &[String]) -> Option<String> {
    let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    if let Some((scheme, token)) = header.and_then(|value| value.split_once(' '))
        && scheme.eq_ignore_ascii_case("bearer")
    {
        return Some(token.trim().to_owned());
    }
    let query = request.uri().query().unwrap_or_default();
    // A JWT needs no percent-encoding: base64url and dots.
    let in_query = query.split('&').find_map(|pair| pair.strip_prefix("token="));
    let in_protocol = || offered.iter().find_map(|name| name.strip_prefix(BEARER_PROTOCOL));
    in_query.or_else(in_protocol).map(str::to_owned)
}

async fn upgrade(node: &Node, stream: TcpStream, judged: Judged) -> Accepted {
    let frame_bytes_max = Some(node.limits.frame_bytes_max);
    let mut config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES);
    config.max_message_size = frame_bytes_max;
    config.max_frame_size = frame_bytes_max;
    let Judged { rest, encoding, claims } = judged;
    let at_ms = node.mailbox_now_ms(&claims.user);
    let socket =
        WebSocketStream::from_partially_read(stream, rest, Role::Server, Some(config)).await;
    Accepted { socket, encoding, claims, at_ms }
}

async fn refuse(mut stream: TcpStream, refusal: &Refusal) -> std::io::Result<()> {
    let Refusal { status, text, .. } = refusal;
    let retry = if status.starts_with("503") { "Retry-After: 2\r\n" } else { "" };
    let response = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n{retry}Connection: close\r\n\r\n{text}\n",
        text.len() + 1
    );
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await?;
    // Read to the end, so that unread bytes do not turn the answer into a reset.
    let mut rest = [0; 512];
    let mut bytes = 0;
    while bytes < REQUEST_BYTES_MAX {
        match stream.read(&mut rest).await? {
            0 => break,
            read => bytes += read,
        }
    }
    Ok(())
}

/// Accepts sockets until the node drains.
pub async fn listen(node: Arc<Node>, listener: tokio::net::TcpListener) {
    let limits = &node.limits;
    let connections = Arc::new(tokio::sync::Semaphore::new(limits.connections_max));
    let handshakes = Arc::new(tokio::sync::Semaphore::new(limits.handshakes_max));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = node.draining() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: wait for some to come back.
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let connection = Arc::clone(&connections).try_acquire_owned();
        let handshake = Arc::clone(&handshakes).try_acquire_owned();
        let (Ok(connection), Ok(handshake)) = (connection, handshake) else {
            tokio::spawn({
                let node = Arc::clone(&node);
                async move { turn_away(&node, stream).await }
            });
            continue;
        };
        tokio::spawn(crate::connection::serve(Arc::clone(&node), stream, connection, handshake));
    }
}
