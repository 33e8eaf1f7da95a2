//! The part of HTTP/1.1 that a handshake needs: one bounded request, and one response.

use std::time::Duration;

use barid_core::CloseCode;
use barid_session::Close;
use barid_wire::frames::Encoding;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::Error as WsError;
use tokio_tungstenite::tungstenite::error::CapacityError;
use tokio_tungstenite::tungstenite::error::ProtocolError::{
    MissingConnectionUpgradeHeader, MissingSecWebSocketVersionHeader,
    MissingUpgradeWebSocketHeader, WrongHttpMethod, WrongHttpVersion,
};
use tokio_tungstenite::tungstenite::handshake::machine::TryParse as _;
use tokio_tungstenite::tungstenite::handshake::server::{create_response, write_response};
use tokio_tungstenite::tungstenite::http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HOST, SEC_WEBSOCKET_EXTENSIONS,
    SEC_WEBSOCKET_PROTOCOL, TRANSFER_ENCODING, UPGRADE,
};
use tokio_tungstenite::tungstenite::http::uri::Authority;
use tokio_tungstenite::tungstenite::http::{HeaderValue, Method};

use crate::labels::Handshake;
use crate::stream::Stream;

pub use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

const OPTIONS: &[u8] = b"OPTIONS ";
const REQUEST_BYTES_MAX: usize = 16 << 10;
const BEARER_PROTOCOL: &str = "bearer.";
/// Retry-After, seconds, if it is unknown when a retry can succeed.
const RETRY_AFTER: Duration = Duration::from_secs(2);

pub const BAD_REQUEST: &str = "400 Bad Request";
pub const UNAVAILABLE: &str = "503 Service Unavailable";
pub const FORBIDDEN: &str = "403 Forbidden";
pub const TOO_MANY: &str = "429 Too Many Requests";
const NO_CONTENT: &str = "204 No Content";
const REQUEST_TIMEOUT: &str = "408 Request Timeout";
const TOO_LARGE: &str = "431 Request Header Fields Too Large";
const VERSION: &str = "505 HTTP Version Not Supported";

/// A response other than 101, which ends the connection.
pub struct Answer {
    /// Code and phrase.
    pub status: &'static str,
    /// The label that the handshake is counted by.
    pub label: Handshake,
    /// The body.
    pub text: String,
    content_type: &'static str,
    /// Further header lines, each with its line end.
    headers: String,
    retry_after: Duration,
    /// The close code that says the same, for pages that ask for one.
    close: Option<CloseCode>,
    /// The client has brought the refusal upon itself, and counts towards a block of its address.
    pub is_blamed: bool,
}

impl Answer {
    /// Creates a refusal. `text` is the body.
    pub fn refusal(status: &'static str, label: Handshake, text: impl Into<String>) -> Self {
        Self {
            status,
            label,
            text: text.into(),
            content_type: "text/plain; charset=utf-8",
            headers: String::new(),
            retry_after: RETRY_AFTER,
            close: None,
            is_blamed: is_blamed(status),
        }
    }

    /// Creates an answer without a body. `headers` are lines with their line ends.
    pub fn empty(label: Handshake, headers: String) -> Self {
        Self { headers, ..Self::refusal(NO_CONTENT, label, "") }
    }

    /// Creates a 200 with a JSON body. `headers` are lines with their line ends.
    pub fn json(label: Handshake, text: String, headers: String) -> Self {
        let content_type = "application/json";
        Self { content_type, headers, ..Self::refusal("200 OK", label, text) }
    }

    /// Adds the time after which a retry may succeed.
    #[must_use]
    pub fn retry_after(self, after: Option<Duration>) -> Self {
        Self { retry_after: after.unwrap_or(RETRY_AFTER), ..self }
    }

    /// Adds a close code that says the same.
    #[must_use]
    pub fn or_close(self, code: CloseCode) -> Self {
        Self { close: Some(code), ..self }
    }

    /// Adds header lines with their line ends.
    #[must_use]
    pub fn with_headers(self, headers: &str) -> Self {
        Self { headers: self.headers + headers, ..self }
    }

    /// The close that says the same, and the time after which a retry may succeed; `None`: there is none.
    pub fn close(&self) -> Option<(Close, Option<Duration>)> {
        let close = Close::new(self.close?, self.text.clone());
        let after = matches!(self.status, TOO_MANY | UNAVAILABLE).then(|| self.jittered());
        Some((close, after))
    }

    /// The time after which a retry may succeed. Random, so that clients that were refused together do not retry
    /// together.
    fn jittered(&self) -> Duration {
        let after = self.retry_after.max(Duration::from_secs(1));
        after.mul_f64(rand::random_range(1.0..2.0))
    }

    /// Writes the answer and closes the stream.
    ///
    /// # Errors
    /// The other end is gone.
    pub async fn write(&self, mut stream: Stream) -> std::io::Result<()> {
        let Self { status, text, content_type, headers, .. } = self;
        let after_s = self.jittered().as_secs_f64().ceil();
        let retry_after = format!("Retry-After: {after_s}\r\n");
        // Headers that RFC 9110 and RFC 6455 require with some statuses.
        let required = match &status[..3] {
            "401" => "WWW-Authenticate: Bearer\r\n",
            "405" => "Allow: GET\r\n",
            "426" => "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
            "429" | "503" => &retry_after,
            _ => "",
        };
        let (content, body) = match *status {
            NO_CONTENT => (String::new(), String::new()),
            _ => {
                let length = text.len() + 1;
                let content =
                    format!("Content-Type: {content_type}\r\nContent-Length: {length}\r\n");
                (content, format!("{text}\n"))
            }
        };
        let response = format!(
            "HTTP/1.1 {status}\r\n{content}{required}{headers}Connection: close\r\n\r\n{body}"
        );
        stream.write_all(response.as_bytes()).await?;
        stream.shutdown().await?;
        // Read to the end: closing a socket with unread bytes would reset it and could discard the answer.
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
}

/// Whether a refusal with this status is the client's own doing, as a rule. A page of another origin (403) says nothing
/// about its visitor, and 429 depends on the limit.
fn is_blamed(status: &str) -> bool {
    let is_of_client = status.starts_with('4') || status == VERSION;
    is_of_client && !matches!(status, TOO_MANY | FORBIDDEN)
}

/// How a handshake ends without an upgrade.
pub enum Ended {
    /// The other end is gone.
    Gone,
    /// The client gets this answer.
    Answered(Answer),
}

impl From<std::io::Error> for Ended {
    fn from(_: std::io::Error) -> Self {
        Self::Gone
    }
}

/// [`Answer::refusal`], as an error.
pub fn refused(status: &'static str, label: Handshake, text: impl Into<String>) -> Ended {
    Ended::Answered(Answer::refusal(status, label, text))
}

/// The request was not complete in time.
pub fn late() -> Answer {
    let text = "the request was not complete in time";
    Answer::refusal(REQUEST_TIMEOUT, Handshake::Timeout, text)
}

/// As [`late`], as an error.
pub fn no_request() -> Ended {
    Ended::Answered(late())
}

/// No byte arrived in time. The client may have connected in advance.
pub fn nothing_sent() -> Answer {
    Answer { is_blamed: false, ..late() }
}

/// The request was not complete when another client needed its place.
pub fn evicted() -> Ended {
    let text = "the request was not complete, and other clients wait";
    let answer = Answer::refusal(REQUEST_TIMEOUT, Handshake::Evicted, text);
    Ended::Answered(Answer { is_blamed: false, ..answer })
}

/// Reads one request of at most 16 KiB. Also returns the bytes that follow it. List fields on several lines are joined.
///
/// # Errors
/// The request is malformed or too large, or the client has gone.
pub async fn read_request(stream: &mut Stream) -> Result<(Request, Vec<u8>), Ended> {
    let mut bytes = Vec::with_capacity(1024);
    // The end is searched in new bytes only, and the request is parsed once, however slowly it arrives.
    let mut seen = 0;
    loop {
        if let Some(first) = bytes.first() {
            check_first_byte(*first)?;
        }
        if bytes.len() > REQUEST_BYTES_MAX {
            let text = format!("the request has more than {REQUEST_BYTES_MAX} bytes");
            return Err(refused(TOO_LARGE, Handshake::Headers, text));
        }
        if bytes[seen..].windows(4).any(|end| end == b"\r\n\r\n") {
            if bytes.starts_with(b"PRI * HTTP/2.0") {
                return Err(refused(
                    VERSION,
                    Handshake::Version,
                    "this port speaks HTTP/1.1, not HTTP/2",
                ));
            }
            let is_options = bytes.starts_with(OPTIONS);
            if is_options {
                // tungstenite parses GET only.
                bytes.splice(..OPTIONS.len(), *b"GET ");
            }
            return match Request::try_parse(&bytes).map_err(unreadable)? {
                Some((length, mut request)) => {
                    if is_options {
                        *request.method_mut() = Method::OPTIONS;
                    }
                    join_lists(&mut request);
                    Ok((request, bytes.split_off(length)))
                }
                None => Err(refused(BAD_REQUEST, Handshake::BadRequest, "not a request")),
            };
        }
        seen = bytes.len().saturating_sub(3);
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(Ended::Gone);
        }
    }
}

/// Refuses a client that does not speak HTTP by its first byte, instead of waiting for a whole request. A method is in
/// capitals, and line ends may precede it.
fn check_first_byte(first: u8) -> Result<(), Ended> {
    const TLS_HANDSHAKE: u8 = 0x16;
    match first {
        b'A'..=b'Z' | b'\r' | b'\n' => Ok(()),
        TLS_HANDSHAKE => {
            let text = "this port serves plain HTTP; TLS is terminated before it";
            Err(refused(BAD_REQUEST, Handshake::BadRequest, text))
        }
        _ => Err(refused(BAD_REQUEST, Handshake::BadRequest, "not an HTTP request")),
    }
}

/// Joins list fields on several lines into one line, which is equivalent (RFC 9110, 5.3); tungstenite reads only the
/// first line.
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

/// Refuses a request without `Host`, and repeated headers and bodies, which enable request smuggling: a proxy may
/// interpret them differently than this node.
///
/// # Errors
/// Returns the 400 answer.
pub fn check_headers(request: &Request) -> Result<(), Ended> {
    let headers = request.headers();
    let single = ["authorization", "host", "origin", "sec-websocket-key", "sec-websocket-version"];
    if let Some(name) = single.iter().find(|name| headers.get_all(**name).iter().count() > 1) {
        return Err(refused(
            BAD_REQUEST,
            Handshake::BadRequest,
            format!("header {name} is repeated"),
        ));
    }
    // RFC 9112, 3.2.
    let host = headers.get(HOST).map(HeaderValue::as_bytes);
    if !host.is_some_and(|host| host.is_empty() || Authority::try_from(host).is_ok()) {
        let text = "header host is missing or malformed";
        return Err(refused(BAD_REQUEST, Handshake::BadRequest, text));
    }
    let no_length = headers.get_all(CONTENT_LENGTH).iter().all(|length| length == "0");
    let tokens = request.uri().query().unwrap_or_default().split('&');
    if tokens.filter(|pair| pair.starts_with("token=")).count() > 1 {
        return Err(refused(BAD_REQUEST, Handshake::BadRequest, "parameter token is repeated"));
    }
    if headers.contains_key(TRANSFER_ENCODING) || !no_length {
        return Err(refused(BAD_REQUEST, Handshake::BadRequest, "a handshake has no body"));
    }
    Ok(())
}

/// The response that accepts an upgrade.
///
/// # Errors
/// The request is not a WebSocket handshake.
pub fn upgrade(request: &Request) -> Result<Response, Ended> {
    create_response(request).map_err(unreadable)
}

/// Names the subprotocol of an accepted upgrade.
pub fn agree(response: &mut Response, encoding: Encoding) {
    let protocol = HeaderValue::from_static(encoding.subprotocol());
    response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, protocol);
}

/// Writes a response without a body.
///
/// # Errors
/// The other end is gone.
pub async fn respond(stream: &mut Stream, response: &Response) -> Result<(), Ended> {
    let mut bytes = Vec::with_capacity(256);
    write_response(&mut bytes, response).map_err(unreadable)?;
    stream.write_all(&bytes).await?;
    Ok(())
}

/// The answer for an error of tungstenite's handshake.
fn unreadable(error: WsError) -> Ended {
    match error {
        WsError::Protocol(WrongHttpMethod) => {
            refused("405 Method Not Allowed", Handshake::Method, "devices connect with GET")
        }
        WsError::Protocol(WrongHttpVersion) => {
            refused(VERSION, Handshake::Version, "this port speaks HTTP/1.1")
        }
        WsError::Capacity(CapacityError::TooManyHeaders) => {
            refused(TOO_LARGE, Handshake::Headers, "the request has too many headers")
        }
        WsError::Protocol(
            error @ (MissingConnectionUpgradeHeader
            | MissingUpgradeWebSocketHeader
            | MissingSecWebSocketVersionHeader),
        ) => refused("426 Upgrade Required", Handshake::Upgrade, error.to_string()),
        error => refused(BAD_REQUEST, Handshake::BadRequest, error.to_string()),
    }
}

/// Refuses a preflight (OPTIONS).
///
/// # Errors
/// Returns the 405 answer.
pub fn check_method(request: &Request) -> Result<(), Ended> {
    if request.method() == Method::GET { Ok(()) } else { Err(unreadable(WrongHttpMethod.into())) }
}

/// Whether the client asks for a close code in place of a status: pages do not see a status.
pub fn refuses_by_close(request: &Request) -> bool {
    query(request, "refuse") == Some("close")
}

/// The subprotocols that a request offers, in order.
pub fn protocols(request: &Request) -> Vec<String> {
    request
        .headers()
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_owned())
        .collect()
}

/// The token of a request: from the Authorization header, the query, or a subprotocol.
pub fn token(request: &Request, offered: &[String]) -> Option<String> {
    let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    if let Some((scheme, token)) = header.and_then(|value| value.split_once(' '))
        && scheme.eq_ignore_ascii_case("bearer")
    {
        return Some(token.trim().to_owned());
    }
    // A JWT consists of base64url and dots, which need no percent-encoding.
    let in_query = query(request, "token");
    let in_protocol = || offered.iter().find_map(|name| name.strip_prefix(BEARER_PROTOCOL));
    in_query.or_else(in_protocol).map(str::to_owned)
}

/// A query parameter, not percent-decoded.
pub fn query<'a>(request: &'a Request, name: &str) -> Option<&'a str> {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}
