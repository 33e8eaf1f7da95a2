//! From a socket to an authenticated WebSocket: the request is read, judged and answered here, so
//! that a refusal is a plain HTTP answer with a reason, and a connection that is refused costs little.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_wire::frames::Encoding;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{timeout, timeout_at};
use tokio_tungstenite::tungstenite::Error as WsError;
use tokio_tungstenite::tungstenite::error::CapacityError;
use tokio_tungstenite::tungstenite::error::ProtocolError::{
    MissingConnectionUpgradeHeader, MissingSecWebSocketVersionHeader,
    MissingUpgradeWebSocketHeader, WrongHttpMethod, WrongHttpVersion,
};
use tokio_tungstenite::tungstenite::handshake::machine::TryParse as _;
use tokio_tungstenite::tungstenite::handshake::server::{
    Request, Response, create_response, write_response,
};
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, ORIGIN, SEC_WEBSOCKET_EXTENSIONS,
    SEC_WEBSOCKET_PROTOCOL, TRANSFER_ENCODING, UPGRADE,
};

use crate::admission::{Admitted, Refused};
use crate::auth::{AuthError, Claims};
use crate::balance;
use crate::config::LimitsConfig;
use crate::node::Node;
use crate::proxy;
use crate::socket::Socket;
use crate::stream::Stream;

const PATH: &str = "/v1/connect";
/// When to come back where nobody knows when there is room.
const RETRY_AFTER: Duration = Duration::from_secs(2);
const NODES_PATH: &str = "/v1/nodes";
const REQUEST_BYTES_MAX: usize = 16 << 10;
const BEARER_PROTOCOL: &str = "bearer.";
const FORWARDED_FOR: &str = "x-forwarded-for";
const BAD_REQUEST: &str = "400 Bad Request";
const TOO_LARGE: &str = "431 Request Header Fields Too Large";
const UNAVAILABLE: &str = "503 Service Unavailable";
const TOO_MANY: &str = "429 Too Many Requests";
const VERSION: &str = "505 HTTP Version Not Supported";

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

/// What is answered with something else than 101, and is over with that.
struct Refusal {
    status: &'static str,
    label: &'static str,
    text: String,
    /// When to come back, where the status says so.
    after: Duration,
    /// The text is JSON; these headers stand beside it.
    json: Option<String>,
}

impl Refusal {
    fn new(status: &'static str, label: &'static str, text: impl Into<String>) -> Self {
        Self { status, label, text: text.into(), after: RETRY_AFTER, json: None }
    }

    fn limit(node: &Node, refused: Refused) -> Self {
        node.metrics.limit(refused.limit);
        let after = refused.after.unwrap_or(RETRY_AFTER);
        let (status, label) =
            if refused.own { (TOO_MANY, "limited") } else { (UNAVAILABLE, "overloaded") };
        Self { after, ..Self::new(status, label, refused.text) }
    }
}

/// A socket that was accepted and for which there is room.
pub struct Arrival {
    /// Where.
    pub node: Arc<Node>,
    /// The socket.
    pub stream: TcpStream,
    /// The other end.
    pub address: IpAddr,
    /// Its places.
    pub admitted: Admitted,
}

/// Reads and answers a handshake; `None` if it was refused or the device went away. Counts itself.
pub async fn accept(arrival: Arrival) -> Option<(Accepted, Admitted)> {
    let Arrival { node, stream, mut address, mut admitted } = arrival;
    let node = &*node;
    let deadline = Instant::now() + Duration::from_millis(node.limits.handshake_timeout_ms);
    let opening = introduce(node, stream, &mut address, &mut admitted);
    let opened = timeout_at(deadline.into(), opening).await;
    let mut stream = match opened.unwrap_or(Err(Unopened { label: "timeout", told: None })) {
        Ok(stream) => stream,
        Err(Unopened { label, told: None }) => {
            tracing::debug!(%address, label, "no connection was opened");
            return count(node, label);
        }
        Err(Unopened { told: Some((stream, refusal)), .. }) => {
            drop(admitted);
            turn_away(node, stream, refusal).await;
            return None;
        }
    };
    let refusal = match judge(node, &mut stream, &mut address, &mut admitted, deadline).await {
        Ok(judged) => {
            node.metrics.handshake("accepted");
            admitted.handshaken();
            tracing::debug!(%address, user = %judged.claims.user.user, "handshake accepted");
            return Some((upgrade(node, stream, judged), admitted));
        }
        Err(Failure::Gone) => return count(node, "gone"),
        Err(Failure::Refused(refusal)) => refusal,
    };
    tracing::debug!(
        %address,
        status = refusal.status,
        reason = refusal.text,
        "handshake refused"
    );
    // Others have its places while it is told.
    drop(admitted);
    turn_away(node, stream, refusal).await;
    None
}

fn count<T>(node: &Node, label: &'static str) -> Option<T> {
    node.metrics.handshake(label);
    None
}

/// Answers a connection for which there is no room, without reading its request; with TLS it is hung up
/// on, for a handshake costs more than is left.
pub fn no_room(node: &Arc<Node>, stream: TcpStream, refused: Refused) {
    let refusal = Refusal::limit(node, refused);
    if node.tls.is_some() {
        return node.metrics.handshake(refusal.label);
    }
    let node = Arc::clone(node);
    tokio::spawn(async move { turn_away(&node, Stream::Plain(stream), refusal).await });
}

/// Says why, if there is still room to say so.
async fn turn_away(node: &Node, stream: Stream, refusal: Refusal) {
    node.metrics.handshake(refusal.label);
    let Some(_place) = node.admission.turn_away() else {
        return node.metrics.limit("turned_away");
    };
    let limit = Duration::from_millis(node.limits.close_timeout_ms);
    let _ = timeout(limit, refuse(stream, &refusal)).await;
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

async fn judge(
    node: &Node,
    stream: &mut Stream,
    address: &mut IpAddr,
    admitted: &mut Admitted,
    deadline: Instant,
) -> Result<Judged, Failure> {
    let over = |refused| Failure::Refused(Refusal::limit(node, refused));
    let read = timeout_at(deadline.into(), read_request(stream)).await;
    let (mut request, rest) = read.map_err(|_| no_request())??;
    join_lists(&mut request);
    if node.proxies.forwards(*address) {
        let values = request.headers().get_all(FORWARDED_FOR).iter();
        let values: Vec<_> = values.map(|value| value.to_str().unwrap_or_default()).collect();
        *address = node.proxies.client(*address, values.into_iter());
        limit_address(node, *address, admitted).map_err(Failure::Refused)?;
    }
    let limit = Duration::from_millis(node.limits.handshake_timeout_ms);
    match request.uri().path() {
        PATH => (),
        NODES_PATH => return Err(nodes(node, &request, limit).await?),
        _ => {
            return Err(refused(
                "404 Not Found",
                "not_found",
                format!("devices connect to {PATH}"),
            ));
        }
    }
    if node.is_draining() {
        return Err(refused(UNAVAILABLE, "draining", "this node is being drained"));
    }
    check_headers(&request)?;
    check_origin(node, &request)?;
    let mut response = create_response(&request).map_err(unreadable)?;
    let offered = protocols(&request);
    let Some(encoding) = offered.iter().find_map(|name| Encoding::from_subprotocol(name)) else {
        let text = "offer subprotocol barid.v1.json or barid.v1.proto";
        return Err(refused(BAD_REQUEST, "subprotocol", text));
    };
    let claims = verify(node, &request, &offered, limit).await?;
    admitted.for_app(&claims.user.app).map_err(over)?;
    let protocol = HeaderValue::from_static(encoding.subprotocol());
    response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, protocol);
    respond(stream, &response).await?;
    Ok(Judged { rest, encoding, claims })
}

fn no_request() -> Failure {
    refused("408 Request Timeout", "timeout", "no whole request came in time")
}

async fn respond(stream: &mut Stream, response: &Response) -> Result<(), Failure> {
    let mut bytes = Vec::with_capacity(256);
    write_response(&mut bytes, response).map_err(unreadable)?;
    stream.write_all(&bytes).await?;
    Ok(())
}

/// A socket on which no request was read: how it is counted, or to whom it is said why.
struct Unopened {
    label: &'static str,
    told: Option<(Stream, Refusal)>,
}

impl From<std::io::Error> for Unopened {
    fn from(_: std::io::Error) -> Self {
        Self { label: "gone", told: None }
    }
}

/// What comes before the request: the balancer's header, the limits of the address (`address` is the
/// peer's at first), and TLS.
async fn introduce(
    node: &Node,
    mut stream: TcpStream,
    address: &mut IpAddr,
    admitted: &mut Admitted,
) -> Result<Stream, Unopened> {
    if node.proxies.speaks_first(*address) {
        *address = read_proxy_header(&mut stream).await?.unwrap_or(*address);
    }
    if !node.proxies.forwards(*address)
        && let Err(refusal) = limit_address(node, *address, admitted)
    {
        return Err(match node.tls {
            Some(_) => Unopened { label: refusal.label, told: None },
            None => Unopened { label: refusal.label, told: Some((Stream::Plain(stream), refusal)) },
        });
    }
    let Some(tls) = &node.tls else { return Ok(Stream::Plain(stream)) };
    match tls.accept(stream).await {
        Ok(stream) => Ok(Stream::Tls(Box::new(stream))),
        Err(error) => {
            tracing::debug!(%address, %error, "no TLS");
            Err(Unopened { label: "tls", told: None })
        }
    }
}

fn limit_address(node: &Node, address: IpAddr, admitted: &mut Admitted) -> Result<(), Refusal> {
    if admitted.coming_from(address).map_err(|refused| Refusal::limit(node, refused))? {
        node.metrics.limit("addresses");
    }
    Ok(())
}

/// Reads the header of the PROXY protocol, and not a byte of what follows it.
async fn read_proxy_header(stream: &mut TcpStream) -> Result<Option<IpAddr>, Unopened> {
    let mut bytes = Vec::with_capacity(64);
    loop {
        match proxy::header(&bytes) {
            proxy::Header::Whole { source, .. } => return Ok(source),
            proxy::Header::Malformed => return Err(Unopened { label: "proxy", told: None }),
            proxy::Header::Partial(more) => {
                let seen = bytes.len();
                bytes.resize(seen + more, 0);
                stream.read_exact(&mut bytes[seen..]).await?;
            }
        }
    }
}

/// Answers which nodes a device should go to: whoever has a token may ask.
async fn nodes(node: &Node, request: &Request, limit: Duration) -> Result<Failure, Failure> {
    check_headers(request)?;
    check_origin(node, request)?;
    verify(node, request, &protocols(request), limit).await?;
    let zone = query(request, "zone").map_or_else(|| node.zone.clone(), percent_decoded);
    let nodes = node.peers.snapshot();
    let text = serde_json::to_string(&balance::offer(&nodes, &zone)).unwrap_or_default();
    // A page may read what it may connect by.
    let origin = request.headers().get(ORIGIN).and_then(|origin| origin.to_str().ok());
    let allow = origin.map(|origin| format!("Access-Control-Allow-Origin: {origin}\r\n"));
    let beside =
        format!("Cache-Control: no-store\r\nVary: Origin\r\n{}", allow.unwrap_or_default());
    Ok(Failure::Refused(Refusal { json: Some(beside), ..Refusal::new("200 OK", "nodes", text) }))
}

fn query<'a>(request: &'a Request, name: &str) -> Option<&'a str> {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, others)) = rest.split_first() {
        let hex = |digit: u8| char::from(digit).to_digit(16);
        if *first == b'%'
            && let [high, low, after @ ..] = others
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            bytes.push((high * 16 + low) as u8);
            rest = after;
        } else {
            bytes.push(*first);
            rest = others;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn verify(
    node: &Node,
    request: &Request,
    offered: &[String],
    limit: Duration,
) -> Result<Claims, Failure> {
    let verifying = async {
        let token = token(request, offered).ok_or(AuthError::Missing)?;
        node.verifier.verify(&token, node.now_ms() / 1000).await
    };
    let late = |_| refused(UNAVAILABLE, "timeout", "the token could not be checked in time");
    timeout(limit, verifying).await.map_err(late)?.map_err(|error| {
        node.metrics.token_refused(error.as_str());
        refused("401 Unauthorized", "unauthorized", error.to_string())
    })
}

fn refused(status: &'static str, label: &'static str, text: impl Into<String>) -> Failure {
    Failure::Refused(Refusal::new(status, label, text))
}

async fn read_request(stream: &mut Stream) -> Result<(Request, Vec<u8>), Failure> {
    let mut bytes = Vec::with_capacity(1024);
    // Looked through and parsed once, however slowly it trickles in.
    let mut seen = 0;
    loop {
        if let Some(first) = bytes.first() {
            check_first_byte(*first)?;
        }
        if bytes.len() > REQUEST_BYTES_MAX {
            let text = format!("the request has more than {REQUEST_BYTES_MAX} bytes");
            return Err(refused(TOO_LARGE, "headers", text));
        }
        if bytes[seen..].windows(4).any(|end| end == b"\r\n\r\n") {
            if bytes.starts_with(b"PRI * HTTP/2.0") {
                return Err(refused(VERSION, "version", "this port speaks HTTP/1.1, not HTTP/2"));
            }
            return match Request::try_parse(&bytes).map_err(unreadable)? {
                Some((length, request)) => Ok((request, bytes.split_off(length))),
                None => Err(refused(BAD_REQUEST, "bad_request", "not a request")),
            };
        }
        seen = bytes.len().saturating_sub(3);
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(Failure::Gone);
        }
    }
}

/// Refuses a client that does not speak HTTP at its first byte, instead of waiting for a whole request:
/// methods are written in capitals, and line ends may stand before them.
fn check_first_byte(first: u8) -> Result<(), Failure> {
    const TLS_HANDSHAKE: u8 = 0x16;
    match first {
        b'A'..=b'Z' | b'\r' | b'\n' => Ok(()),
        TLS_HANDSHAKE => {
            let text = "this port speaks plain HTTP; TLS ends before it";
            Err(refused(BAD_REQUEST, "bad_request", text))
        }
        _ => Err(refused(BAD_REQUEST, "bad_request", "not an HTTP request")),
    }
}

/// Joins list fields that stand on several lines, which mean the same as one line (RFC 9110, 5.3):
/// tungstenite reads the first line only.
fn join_lists(request: &mut Request) {
    let headers = request.headers_mut();
    for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_EXTENSIONS] {
        let lines: Vec<_> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
        if lines.len() > 1
            && let Ok(joined) = HeaderValue::from_bytes(&lines.join(&b", "[..]))
        {
            headers.insert(name, joined);
        }
    }
}

/// A header that stands twice is read differently by whoever stands between, and so is a body that
/// a handshake cannot have: both are how requests are smuggled.
fn check_headers(request: &Request) -> Result<(), Failure> {
    let headers = request.headers();
    let single = ["authorization", "host", "origin", "sec-websocket-key", "sec-websocket-version"];
    if let Some(name) = single.iter().find(|name| headers.get_all(**name).iter().count() > 1) {
        return Err(refused(BAD_REQUEST, "bad_request", format!("header {name} stands twice")));
    }
    let no_length = headers.get_all(CONTENT_LENGTH).iter().all(|length| length == "0");
    let tokens = request.uri().query().unwrap_or_default().split('&');
    if tokens.filter(|pair| pair.starts_with("token=")).count() > 1 {
        return Err(refused(BAD_REQUEST, "bad_request", "parameter token stands twice"));
    }
    if headers.contains_key(TRANSFER_ENCODING) || !no_length {
        return Err(refused(BAD_REQUEST, "bad_request", "a handshake has no body"));
    }
    Ok(())
}

/// Before the token: a page that may not connect learns nothing of whether its token is good.
fn check_origin(node: &Node, request: &Request) -> Result<(), Failure> {
    let origin = request.headers().get(ORIGIN);
    // What is not text is no page that was allowed.
    let allowed = node.origins.allow(origin.map(|origin| origin.to_str().unwrap_or_default()));
    if allowed {
        return Ok(());
    }
    Err(refused("403 Forbidden", "forbidden", "pages of this origin may not connect"))
}

/// What tungstenite could not read, or found not to be a handshake.
fn unreadable(error: WsError) -> Failure {
    match error {
        WsError::Protocol(WrongHttpMethod) => {
            refused("405 Method Not Allowed", "method", "devices connect with GET")
        }
        WsError::Protocol(WrongHttpVersion) => {
            refused(VERSION, "version", "this port speaks HTTP/1.1")
        }
        WsError::Capacity(CapacityError::TooManyHeaders) => {
            refused(TOO_LARGE, "headers", "the request has too many headers")
        }
        WsError::Protocol(
            error @ (MissingConnectionUpgradeHeader
            | MissingUpgradeWebSocketHeader
            | MissingSecWebSocketVersionHeader),
        ) => refused("426 Upgrade Required", "upgrade", error.to_string()),
        error => refused(BAD_REQUEST, "bad_request", error.to_string()),
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
    // A JWT needs no percent-encoding: base64url and dots.
    let in_query = query(request, "token");
    let in_protocol = || offered.iter().find_map(|name| name.strip_prefix(BEARER_PROTOCOL));
    in_query.or_else(in_protocol).map(str::to_owned)
}

fn upgrade(node: &Node, stream: Stream, judged: Judged) -> Accepted {
    let Judged { rest, encoding, claims } = judged;
    let at_ms = node.mailbox_now_ms(&claims.user);
    let socket = Socket::new(stream, rest, node.limits.frame_bytes_max);
    Accepted { socket, encoding, claims, at_ms }
}

/// A handshake that asks for no token and no subprotocol: all that is left of it is HTTP and
/// WebSocket. `None` if it was refused or the other end went away. Of `limits`, those of a handshake,
/// a frame and a close count.
pub async fn accept_anybody(stream: TcpStream, limits: &LimitsConfig) -> Option<Socket> {
    let mut stream = Stream::Plain(stream);
    let limit = Duration::from_millis(limits.handshake_timeout_ms);
    let answered = async {
        let (mut request, rest) = read_request(&mut stream).await?;
        join_lists(&mut request);
        check_headers(&request)?;
        respond(&mut stream, &create_response(&request).map_err(unreadable)?).await?;
        Ok(rest)
    };
    match timeout(limit, answered).await.unwrap_or_else(|_| Err(no_request())) {
        Ok(rest) => Some(Socket::new(stream, rest, limits.frame_bytes_max)),
        Err(Failure::Refused(refusal)) => {
            let limit = Duration::from_millis(limits.close_timeout_ms);
            let _ = timeout(limit, refuse(stream, &refusal)).await;
            None
        }
        Err(Failure::Gone) => None,
    }
}

async fn refuse(mut stream: Stream, refusal: &Refusal) -> std::io::Result<()> {
    let Refusal { status, text, after, json, .. } = refusal;
    let kind = if json.is_some() { "application/json" } else { "text/plain; charset=utf-8" };
    // Those that are told so together do not come back together.
    let after_s = after.as_secs_f64().ceil() as u64;
    let retry_after =
        format!("Retry-After: {}\r\n", rand::random_range(after_s.max(1)..=2 * after_s.max(1)));
    // What RFC 9110 and RFC 6455 want beside a status.
    let beside = match &status[..3] {
        "401" => "WWW-Authenticate: Bearer\r\n",
        "405" => "Allow: GET\r\n",
        "426" => "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
        "429" | "503" => &retry_after,
        _ => json.as_deref().unwrap_or_default(),
    };
    let response = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{beside}Connection: close\r\n\r\n{text}\n",
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
