//! From a socket to an authenticated WebSocket. The request is read, checked and answered here, so that a refusal is a
//! plain HTTP response with a reason, and costs little.

mod nodes;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use barid_core::CloseCode;
use barid_runtime::repeats;
use barid_session::{Claims, Close};
use barid_wire::frames::Encoding;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::{timeout, timeout_at};
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::ORIGIN;

use crate::admission::{self, AddressKey, Admitted, Evicted, Unidentified};
use crate::auth::AuthError;
use crate::config::LimitsConfig;
use crate::http::{self, Answer, Ended, Request, refused};
use crate::labels::{Handshake, Limit, RevokedAt};
use crate::metrics::Metrics;
use crate::node::Node;
use crate::policy::Policy;
use crate::proxy;
use crate::socket::Socket;
use crate::stream::Stream;
use crate::tls::Tls;
use crate::upstream::Spent;

const PATH: &str = "/v1/connect";
const FORWARDED_FOR: &str = "x-forwarded-for";

/// An accepted socket that admission has let in.
pub struct Arrival {
    /// The node that accepted it.
    pub node: Arc<Node>,
    /// The socket.
    pub stream: TcpStream,
    /// The peer.
    pub address: IpAddr,
    /// Its share of the limits, released on drop.
    pub admitted: Admitted,
    /// Its handshake has to end.
    pub evicted: Evicted,
}

/// A handshake that succeeded.
pub struct Accepted {
    /// The client's address.
    pub address: IpAddr,
    /// The WebSocket.
    pub socket: Socket,
    /// Encoding of its frames.
    pub encoding: Encoding,
    /// The token's claims.
    pub claims: Claims,
    /// Time of the handshake, ms since the Unix epoch, by the clock of the user's mailbox, which all nodes share. It
    /// orders the attempts of devices that do not count them.
    pub at_ms: u64,
    /// Its share of the limits on connections without Hello.
    pub unidentified: Unidentified,
    /// Another connection has its place among these.
    pub evicted: Evicted,
    /// Frames and bytes that it has sent, from the first byte after the handshake on.
    pub spent: Spent,
}

/// A handshake that was refused after its upgrade, because the client asked for a close code.
pub struct Refused {
    /// The WebSocket.
    pub socket: Socket,
    /// Encoding of its frames.
    pub encoding: Encoding,
    /// The close.
    pub close: Close,
    /// When a retry may succeed.
    pub after: Option<Duration>,
    /// Another connection has its place among those without Hello.
    pub evicted: Evicted,
    _unidentified: Unidentified,
    _admitted: Admitted,
}

/// An open WebSocket.
pub enum Outcome {
    /// It becomes a session.
    Accepted(Accepted, Admitted),
    /// It is to be closed.
    Refused(Refused),
}

/// Reads and answers a handshake, and counts its result; `None` if it was refused or the device has gone.
pub async fn accept(arrival: Arrival) -> Option<Outcome> {
    let Arrival { node, stream, mut address, mut admitted, mut evicted } = arrival;
    let node = &*node;
    let deadline = Instant::now() + node.policy.limits.handshake_timeout();
    let opened = async {
        let opening = open(&node.policy, &node.metrics, stream, &mut address, &mut admitted);
        let opened = within(deadline, &mut evicted, opening).await;
        let stream = opened.map_err(|cut| cut.unopened(false))??;
        let has_hello = AtomicBool::new(false);
        let securing = secure(&node.policy, stream, &admitted, &has_hello);
        let secured = within(deadline, &mut evicted, securing).await;
        // After its first message the time is the node's as well.
        secured.map_err(|cut| cut.unopened(!has_hello.load(Ordering::Relaxed)))?
    };
    let mut stream = match opened.await {
        Ok(stream) => stream,
        Err(unopened) => {
            unopened.end(node, address, admitted).await;
            return None;
        }
    };
    let read = within(deadline, &mut evicted, http::read_request(&mut stream)).await;
    let request = read.unwrap_or_else(|cut| match cut {
        CutOff::Late => Err(http::no_request()),
        CutOff::Evicted => Err(http::evicted()),
    });
    let judged = match request {
        Err(ended) => Err(ended),
        Ok((request, rest)) => {
            let (address, admitted) = (&mut address, &mut admitted);
            judge(node, &mut stream, request, rest, address, admitted, &mut evicted).await
        }
    };
    let answer = match judged {
        Ok(Verdict::Open(opening)) => {
            admitted.handshaken();
            return Some(upgraded(node, address, stream, *opening, admitted));
        }
        Err(Ended::Gone) => {
            node.metrics.handshake(Handshake::Gone);
            return None;
        }
        Ok(Verdict::Answer(answer)) => answer,
        Err(Ended::Answered(answer)) => {
            let (status, reason) = (answer.status, &answer.text);
            tracing::debug!(%address, status, reason, "handshake refused");
            answer
        }
    };
    end(node, address, stream, answer, admitted).await;
    None
}

/// Why a step of a handshake was cut off.
#[derive(Debug, Clone, Copy)]
enum CutOff {
    /// It was not complete in time.
    Late,
    /// Another connection has its place.
    Evicted,
}

impl CutOff {
    fn label(self) -> Handshake {
        match self {
            Self::Late => Handshake::Timeout,
            Self::Evicted => Handshake::Evicted,
        }
    }

    /// `is_owed`: the client has sent something, and the rest is still to come. A client that gave way is never to blame:
    /// a carrier's phones that all return at once displace each other.
    fn unopened(self, is_owed: bool) -> Unopened {
        let is_blamed = is_owed && matches!(self, Self::Late);
        Unopened { is_blamed, ..Unopened::silent(self.label()) }
    }
}

/// Runs a step of a handshake until its deadline, and as long as the connection has its place. A step that can be
/// completed by then is.
async fn within<T>(
    deadline: Instant,
    evicted: &mut Evicted,
    step: impl Future<Output = T>,
) -> Result<T, CutOff> {
    tokio::select! {
        biased;
        done = timeout_at(deadline.into(), step) => done.map_err(|_| CutOff::Late),
        _ = evicted => Err(CutOff::Evicted),
    }
}

/// Counts a handshake that ended without a session.
fn count_refusal(node: &Node, address: IpAddr, label: Handshake, is_blamed: bool) {
    node.metrics.handshake(label);
    if label == Handshake::Evicted {
        node.metrics.limit(Limit::Evicted);
    }
    if is_blamed {
        node.policy.count_refusal(&node.metrics, address);
    }
}

/// Answers a handshake without an upgrade.
async fn end(node: &Node, address: IpAddr, stream: Stream, answer: Answer, admitted: Admitted) {
    count_refusal(node, address, answer.label, answer.is_blamed);
    // Release the places first: writing the answer may take a while.
    drop(admitted);
    write(&node.policy, &node.metrics, stream, answer).await;
}

/// A WebSocket for which 101 has been written.
fn upgraded(
    node: &Node,
    address: IpAddr,
    stream: Stream,
    opening: Opening,
    admitted: Admitted,
) -> Outcome {
    let Opening { rest, encoding, permit, unidentified, evicted } = opening;
    let socket = Socket::new(stream, rest, &node.policy.limits);
    match permit {
        Permit::Granted(claims) => {
            node.metrics.handshake(Handshake::Accepted);
            tracing::debug!(%address, user = %claims.user.user, "handshake accepted");
            let at_ms = node.mailboxes.now_ms(&claims.user);
            let spent = Spent::default();
            let accepted =
                Accepted { address, socket, encoding, claims, at_ms, unidentified, evicted, spent };
            Outcome::Accepted(accepted, admitted)
        }
        Permit::Refused { answer, close, after } => {
            let (status, reason) = (answer.status, &answer.text);
            tracing::debug!(%address, status, reason, "handshake refused by a close");
            count_refusal(node, address, answer.label, answer.is_blamed);
            Outcome::Refused(Refused {
                socket,
                encoding,
                close,
                after,
                evicted,
                _unidentified: unidentified,
                _admitted: admitted,
            })
        }
    }
}

/// Answers a connection that admission has refused, without reading its request. With TLS the connection is closed
/// instead, because a TLS handshake costs more than an overloaded node can spend.
pub fn no_room(node: &Arc<Node>, stream: TcpStream, refused: admission::Refused) {
    let answer = over_limit(&node.metrics, refused);
    node.metrics.handshake(answer.label);
    if node.policy.tls.is_some() {
        return;
    }
    let node = Arc::clone(node);
    tokio::spawn(async move {
        write(&node.policy, &node.metrics, Stream::Plain(stream), answer).await;
    });
}

/// Disconnects a client whose address is blocked, for as little work as possible.
pub fn blocked(node: &Node, stream: TcpStream) {
    node.metrics.limit(Limit::Blocked);
    node.metrics.handshake(Handshake::Blocked);
    // A reset: the kernel keeps nothing of the connection.
    let _ = stream.set_zero_linger();
}

/// Writes an answer, unless too many refusals are being written already.
async fn write(policy: &Policy, metrics: &Metrics, stream: Stream, answer: Answer) {
    let Some(_place) = policy.admission.turn_away() else {
        return metrics.limit(Limit::TurnedAway);
    };
    let limit = policy.limits.close_timeout();
    let _ = timeout(limit, answer.write(stream)).await;
}

fn over_limit(metrics: &Metrics, refused: admission::Refused) -> Answer {
    metrics.limit(refused.limit);
    let (status, label) = match (refused.limit, refused.own) {
        (Limit::Blocked, _) => (http::TOO_MANY, Handshake::Blocked),
        (_, true) => (http::TOO_MANY, Handshake::Limited),
        (_, false) => (http::UNAVAILABLE, Handshake::Overloaded),
    };
    let mut answer = Answer::refusal(status, label, refused.text).retry_after(refused.after);
    // Not handshakes and rates, which a carrier's address exceeds when all its phones return at once.
    answer.is_blamed = matches!(refused.limit, Limit::AddressConnections | Limit::UserUnidentified);
    answer
}

/// A socket that failed before its request was read: the label to count it by, and the answer, if one can be written.
struct Unopened {
    label: Handshake,
    answer: Option<(Stream, Answer)>,
    /// Counts towards a block of the address, if there is no answer.
    is_blamed: bool,
}

impl Unopened {
    async fn end(self, node: &Node, address: IpAddr, admitted: Admitted) {
        let Self { label, answer, is_blamed } = self;
        if let Some((stream, answer)) = answer {
            return end(node, address, stream, answer, admitted).await;
        }
        tracing::debug!(%address, label = label.as_str(), "no connection was opened");
        count_refusal(node, address, label, is_blamed);
    }
}

impl Unopened {
    /// Without an answer, and without blame: the client may have had a reason.
    fn silent(label: Handshake) -> Self {
        Self { label, answer: None, is_blamed: false }
    }
}

impl From<std::io::Error> for Unopened {
    fn from(_: std::io::Error) -> Self {
        Self::silent(Handshake::Gone)
    }
}

/// Why there is no TLS. A client that gives up, or refuses the node's certificate, is not blamed: the node may have been
/// busy, or the certificate may have expired.
fn no_tls(error: &std::io::Error) -> Unopened {
    let violation = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match violation {
        None => Unopened::silent(Handshake::Gone),
        Some(rustls::Error::AlertReceived(_)) => Unopened::silent(Handshake::Tls),
        Some(_) => Unopened { is_blamed: true, ..Unopened::silent(Handshake::Tls) },
    }
}

/// The steps before the client's first byte, which is left unread: the PROXY header, and the limits of the address.
/// `address` is the peer's, and is replaced by the one in the header, if it names a client.
async fn open(
    policy: &Policy,
    metrics: &Metrics,
    mut stream: TcpStream,
    address: &mut IpAddr,
    admitted: &mut Admitted,
) -> Result<TcpStream, Unopened> {
    let first_byte = policy.limits.first_byte_timeout();
    let late = |_| Unopened::silent(Handshake::Timeout);
    let was_known = !policy.proxies.speaks_first(*address);
    // Without a client's address no limit of an address applies: all such clients would share the balancer's.
    let mut is_named = true;
    if !was_known {
        timeout(first_byte, stream.peek(&mut [0])).await.map_err(late)??;
        match read_proxy_header(&mut stream).await? {
            proxy::Source::Client(client) => *address = client,
            proxy::Source::Balancer => is_named = false,
            proxy::Source::Unknown => {
                is_named = false;
                metrics.limit(Limit::ClientUnknown);
            }
        }
    }
    let answered = |stream, answer: Answer| Unopened {
        label: answer.label,
        is_blamed: answer.is_blamed,
        answer: (policy.tls.is_none() && answer.label != Handshake::Blocked)
            .then(|| (Stream::Plain(stream), answer)),
    };
    if is_named && !policy.proxies.forwards(*address) {
        let key = policy.address_key(*address).filter(|_| !was_known);
        if let Err(answer) = limit_address(metrics, *address, key, admitted) {
            return Err(answered(stream, answer));
        }
    }
    // Nothing is allocated for a client that sends nothing.
    let Ok(peeked) = timeout(first_byte, stream.peek(&mut [0])).await else {
        // A browser may connect in advance.
        return Err(answered(stream, http::nothing_sent()));
    };
    if peeked? == 0 {
        // A health check, for instance.
        return Err(Unopened::silent(Handshake::Gone));
    }
    Ok(stream)
}

/// TLS, if the node terminates it.
async fn secure(
    policy: &Policy,
    stream: TcpStream,
    admitted: &Admitted,
    has_hello: &AtomicBool,
) -> Result<Stream, Unopened> {
    let Some(tls) = &policy.tls else { return Ok(Stream::Plain(stream)) };
    let handshake = async {
        let hello = Tls::hello(stream).await?;
        has_hello.store(true, Ordering::Relaxed);
        // The costly part follows. Without its place the handshake is about to be ended.
        if !admitted.tls_begins() {
            std::future::pending::<()>().await;
        }
        tls.accept(hello).await
    };
    let secured = handshake.await.inspect_err(|error| tracing::debug!(%error, "no TLS"));
    secured.map(|stream| Stream::Tls(Box::new(stream))).map_err(|error| no_tls(&error))
}

/// `learnt`: the key of an address that was unknown when the handshake began.
fn limit_address(
    metrics: &Metrics,
    address: IpAddr,
    learnt: Option<AddressKey>,
    admitted: &mut Admitted,
) -> Result<(), Answer> {
    let refused = |refused| over_limit(metrics, refused);
    if let Some(key) = learnt {
        admitted.coming_from(key).map_err(refused)?;
    }
    if admitted.count_address(address).map_err(refused)? {
        metrics.limit(Limit::Addresses);
    }
    Ok(())
}

/// Reads the PROXY protocol header, and not a byte beyond it.
async fn read_proxy_header(stream: &mut TcpStream) -> Result<proxy::Source, Unopened> {
    let mut bytes = Vec::with_capacity(64);
    loop {
        match proxy::header(&bytes) {
            proxy::Header::Whole { source, .. } => return Ok(source),
            proxy::Header::Malformed => {
                return Err(Unopened::silent(Handshake::Proxy));
            }
            proxy::Header::Partial(more) => {
                let seen = bytes.len();
                bytes.resize(seen + more, 0);
                stream.read_exact(&mut bytes[seen..]).await?;
            }
        }
    }
}

/// Outcome of a valid request.
enum Verdict {
    /// The request upgrades to a WebSocket; 101 has been written.
    Open(Box<Opening>),
    /// The request asks for `/v1/nodes`.
    Answer(Answer),
}

/// A request that upgrades to a WebSocket.
struct Opening {
    /// Bytes that arrived with it.
    rest: Vec<u8>,
    encoding: Encoding,
    permit: Permit,
    unidentified: Unidentified,
    evicted: Evicted,
}

/// Whether a WebSocket stays open.
enum Permit {
    /// The token is valid.
    Granted(Claims),
    /// The WebSocket is closed in place of this answer.
    Refused { answer: Answer, close: Close, after: Option<Duration> },
}

/// Checks a request, and answers 101 to one that upgrades. `rest`: the bytes that arrived with it.
async fn judge(
    node: &Node,
    stream: &mut Stream,
    request: Request,
    rest: Vec<u8>,
    address: &mut IpAddr,
    admitted: &mut Admitted,
    evicted: &mut Evicted,
) -> Result<Verdict, Ended> {
    let policy = &node.policy;
    http::check_headers(&request)?;
    let mut is_named = true;
    if policy.proxies.forwards(*address) {
        let values = request.headers().get_all(FORWARDED_FOR).iter();
        let values: Vec<_> = values.map(HeaderValue::as_bytes).collect();
        match policy.proxies.client(values.into_iter()) {
            Some(client) => {
                *address = client;
                let key = policy.address_key(client);
                limit_address(&node.metrics, client, key, admitted).map_err(Ended::Answered)?;
            }
            None => is_named = false,
        }
    }
    match request.uri().path() {
        // Not other paths, which a balancer may ask for by itself.
        PATH | nodes::PATH if !is_named => return Err(unnamed(*address)),
        PATH => (),
        nodes::PATH => return nodes::answer(node, &request, evicted).await.map(Verdict::Answer),
        _ => {
            let text = format!("devices connect to {PATH}");
            return Err(refused("404 Not Found", Handshake::NotFound, text));
        }
    }
    http::check_method(&request)?;
    let mut response = http::upgrade(&request)?;
    let offered = http::protocols(&request);
    let Some(encoding) = offered.iter().find_map(|name| Encoding::from_subprotocol(name)) else {
        let text = "offer subprotocol barid.v1.json or barid.v1.proto";
        return Err(refused(http::BAD_REQUEST, Handshake::Subprotocol, text));
    };
    let key = policy.address_key(*address);
    let permitted = permit(node, &request, &offered, key, admitted, evicted).await;
    let (permit, unidentified, evicted) = match permitted {
        Ok((claims, unidentified, evicted)) => (Permit::Granted(claims), unidentified, evicted),
        Err(Ended::Answered(answer)) if http::refuses_by_close(&request) => {
            // Such a connection has no user: it may take a place as long as there are many, so that it evicts nobody and
            // shortens nobody's time for Hello.
            let is_roomy = policy.admission.is_roomy();
            let place = is_roomy.then(|| admitted.await_hello(key, None).ok()).flatten();
            let Some(((close, after), (unidentified, evicted))) = answer.close().zip(place) else {
                return Err(Ended::Answered(answer));
            };
            (Permit::Refused { answer, close, after }, unidentified, evicted)
        }
        Err(ended) => return Err(ended),
    };
    http::agree(&mut response, encoding);
    http::respond(stream, &response).await?;
    Ok(Verdict::Open(Box::new(Opening { rest, encoding, permit, unidentified, evicted })))
}

/// The refusal of a request from a trusted balancer that names no client. Without its address no limit of an address
/// would apply, nor a block.
fn unnamed(balancer: IpAddr) -> Ended {
    if let Some(repeated) = repeats::due(&format!("balancer {balancer} names no client")) {
        tracing::warn!(
            %balancer,
            repeated,
            "handshake refused: the balancer must append the client's address to X-Forwarded-For"
        );
    }
    let text = "the balancer does not say in X-Forwarded-For who you are";
    refused(http::BAD_REQUEST, Handshake::Proxy, text)
}

/// Decides on a WebSocket handshake. The errors have close codes.
async fn permit(
    node: &Node,
    request: &Request,
    offered: &[String],
    key: Option<AddressKey>,
    admitted: &mut Admitted,
    evicted: &mut Evicted,
) -> Result<(Claims, Unidentified, Evicted), Ended> {
    if node.shutdown.is_draining() {
        let text = "this node is being drained";
        let answer = Answer::refusal(http::UNAVAILABLE, Handshake::Draining, text);
        return Err(Ended::Answered(answer.or_close(CloseCode::Draining)));
    }
    check_origin(&node.policy, request)?;
    let claims = verify(node, request, offered, evicted).await?;
    let over = |refused| {
        Ended::Answered(over_limit(&node.metrics, refused).or_close(CloseCode::Overloaded))
    };
    admitted.for_app(&claims.user.app).map_err(over)?;
    let (unidentified, evicted) = admitted.await_hello(key, Some(&claims.user)).map_err(over)?;
    Ok((claims, unidentified, evicted))
}

/// Verifies the token, for at most the time of a handshake and as long as the connection has its place.
async fn verify(
    node: &Node,
    request: &Request,
    offered: &[String],
    evicted: &mut Evicted,
) -> Result<Claims, Ended> {
    let deadline = Instant::now() + node.policy.limits.handshake_timeout();
    let verifying = async {
        let token = http::token(request, offered).ok_or(AuthError::Missing)?;
        let now_s = node.clock.now_s();
        let claims = node.policy.verifier.verify(&token, now_s).await?;
        node.revocations.check(&claims, now_s)?;
        Ok(claims)
    };
    let cut_off = |cut: CutOff| {
        let text = match cut {
            CutOff::Late => "the token could not be checked in time",
            CutOff::Evicted => {
                "the token could not be checked yet, and other clients wait: come back later"
            }
        };
        let answer = Answer::refusal(http::UNAVAILABLE, cut.label(), text);
        Ended::Answered(answer.or_close(CloseCode::Overloaded))
    };
    let verified = within(deadline, evicted, verifying).await.map_err(cut_off)?;
    verified.map_err(|error: AuthError| {
        node.metrics.token_refused(error.label());
        let label = match error {
            AuthError::NoKeys => Handshake::NoKeys,
            AuthError::NoRevocations => Handshake::NoRevocations,
            _ => Handshake::Unauthorized,
        };
        if error.is_revoked() {
            node.metrics.revoked(RevokedAt::Handshake);
        }
        let answer = Answer::refusal(error.status(), label, error.to_string());
        Ended::Answered(answer.or_close(error.close_code()))
    })
}

/// Checked before the token, so that a page of another origin cannot find out whether its token is valid.
fn check_origin(policy: &Policy, request: &Request) -> Result<(), Ended> {
    let origin = request.headers().get(ORIGIN);
    // An origin that is not text cannot be an allowed one.
    if policy.origins.allow(origin.map(|origin| origin.to_str().unwrap_or_default())) {
        return Ok(());
    }
    let text = "pages of this origin may not connect";
    let answer = Answer::refusal(http::FORBIDDEN, Handshake::Forbidden, text);
    Err(Ended::Answered(answer.or_close(CloseCode::Forbidden)))
}

/// A handshake without token and subprotocol: HTTP and WebSocket alone, for conformance suites. `None` if it was
/// refused or the other end went away. Of `limits`, those of a handshake, a frame and a close apply.
pub async fn accept_anybody(stream: TcpStream, limits: &LimitsConfig) -> Option<Socket> {
    let mut stream = Stream::Plain(stream);
    let limit = limits.handshake_timeout();
    let answered = async {
        let (request, rest) = http::read_request(&mut stream).await?;
        http::check_headers(&request)?;
        http::respond(&mut stream, &http::upgrade(&request)?).await?;
        Ok(rest)
    };
    match timeout(limit, answered).await.unwrap_or_else(|_| Err(http::no_request())) {
        Ok(rest) => Some(Socket::new(stream, rest, limits)),
        Err(Ended::Answered(answer)) => {
            let limit = limits.close_timeout();
            let _ = timeout(limit, answer.write(stream)).await;
            None
        }
        Err(Ended::Gone) => None,
    }
}
