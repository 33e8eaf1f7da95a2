//! The gRPC server of a role: it bounds connections, handshakes and streams, and knows who calls.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use barid_runtime::bounds::{Bound, Bounded, whole};
use barid_runtime::{MetricSet, repeats, words};
use prometheus::{IntCounter, IntCounterVec, IntGauge, Registry};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::either::Either;
use tonic::service::{Interceptor, Routes};
use tonic::transport::server::Connected;
use tonic::{Request, Status};
use tracing::Instrument as _;

use crate::{Credentials, InternalTlsConfig, Party};

/// Bound of a batch between roles, bytes: twice what [`crate::LinkConfig`] allows, because it estimates sizes.
pub const BATCH_BYTES_MAX: usize = 8 << 20;
/// Wait after an error of accept, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);
/// The first bytes of HTTP/2 (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Interval between looks at a preface that is not complete.
const PREFACE_LOOK: Duration = Duration::from_millis(10);
const ACCEPTS: [&str; 4] = ["accepted", "over_limit", "timeout", "failed"];

/// Keys under `grpc`: the port for other roles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpcConfig {
    /// Allows a port that other machines reach without `internal_tls`. Everybody who reaches such a port can send messages
    /// to every device and close every session.
    pub insecure: bool,
    /// Maximum connections; further ones are closed.
    pub connections_max: usize,
    /// Maximum concurrent handshakes; for a further one the oldest is aborted.
    pub handshakes_max: usize,
    /// Maximum concurrent calls of one connection. The roles use one a connection.
    pub streams_max: u32,
    /// Timeout of the TLS handshake or, without TLS, of the first bytes, ms.
    pub handshake_timeout_ms: u64,
}

impl Default for GrpcConfig {
    fn default() -> Self {
        Self {
            insecure: false,
            connections_max: 1024,
            handshakes_max: 256,
            streams_max: 4,
            handshake_timeout_ms: 5_000,
        }
    }
}

impl Bounded for GrpcConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("connections_max", 1..=100_000, ""),
            whole("handshakes_max", 1..=100_000, ""),
            whole("streams_max", 1..=1_000, ""),
            whole("handshake_timeout_ms", 1..=600_000, "ms"),
        ]
    }
}

impl GrpcConfig {
    /// Checks that a port without TLS is reached from this machine only, or is wanted so. `key` is the key of `listen`.
    ///
    /// # Errors
    /// Returns the key, the address and what to write instead.
    pub fn check(
        &self,
        key: &str,
        listen: SocketAddr,
        tls: &InternalTlsConfig,
    ) -> Result<(), String> {
        if tls.is_set() || self.insecure || listen.ip().to_canonical().is_loopback() {
            return Ok(());
        }
        Err(format!(
            "{key}: other machines reach {listen}, and internal_tls is not set; write \
             internal_tls.ca_file, .certificate_file and .key_file (`barid cluster ca` creates \
             them), or grpc.insecure = true if only trusted machines reach the port"
        ))
    }
}

/// The caller, in the extensions of each request.
#[derive(Debug, Clone)]
struct Caller {
    address: SocketAddr,
    /// The parties that its certificate names; `None`: there is no TLS, everybody may call everything.
    parties: Option<Arc<[Party]>>,
}

/// Admits calls by callers that are one of `allowed`.
#[derive(Clone)]
pub struct Only {
    allowed: &'static [Party],
    denied: IntCounter,
}

impl Interceptor for Only {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(caller) = request.extensions().get::<Caller>() else {
            return Err(Status::internal("the caller is unknown"));
        };
        let Some(parties) = &caller.parties else { return Ok(request) };
        if parties.iter().any(|party| self.allowed.contains(party)) {
            return Ok(request);
        }
        self.denied.inc();
        let names = |parties: &[Party]| match parties {
            [] => "no role".to_owned(),
            _ => parties.iter().map(|party| party.as_str()).collect::<Vec<_>>().join(" or "),
        };
        let (is, needed) = (names(parties), names(self.allowed));
        tracing::warn!(address = %caller.address, is, needed, "call denied");
        Err(Status::permission_denied(format!("your certificate is for {is}; needed: {needed}")))
    }
}

/// The server before it listens.
pub struct Server {
    config: GrpcConfig,
    credentials: Credentials,
    metrics: ServerMetrics,
}

#[derive(Debug, Clone)]
struct ServerMetrics {
    connections: IntGauge,
    accepts: IntCounterVec,
    denied: IntCounter,
}

impl Server {
    /// Creates a server that uses TLS if there are credentials.
    ///
    /// # Errors
    /// The metrics are registered already.
    pub fn new(
        config: GrpcConfig,
        credentials: Credentials,
        registry: &Registry,
    ) -> Result<Self, prometheus::Error> {
        let set = MetricSet::new(registry, "barid_grpc");
        let metrics = ServerMetrics {
            connections: set.gauge("connections", "Connections of other roles and operators.")?,
            accepts: set.counters(
                "accepts_total",
                "Connections, by result.",
                "result",
                &ACCEPTS,
            )?,
            denied: set.counter("denied_total", "Calls whose certificate does not allow them.")?,
        };
        Ok(Self { config, credentials, metrics })
    }

    /// Restricts a service to these callers, with `tonic::service::interceptor::InterceptedService`.
    pub fn only(&self, allowed: &'static [Party]) -> Only {
        Only { allowed, denied: self.metrics.denied.clone() }
    }

    /// Serves until `stop`, and then until the calls have ended. `settings` adds to the HTTP/2 settings.
    pub async fn serve(
        self,
        listener: TcpListener,
        routes: Routes,
        settings: impl FnOnce(tonic::transport::Server) -> tonic::transport::Server,
        stop: impl Future<Output = ()>,
    ) {
        let server = tonic::transport::Server::builder()
            .max_concurrent_streams(self.config.streams_max)
            .accept_http1(false);
        let (ready, incoming) = mpsc::channel(16);
        let accepting = self.accept(listener, ready);
        let incoming = ReceiverStream::new(incoming);
        let serving =
            settings(server).add_routes(routes).serve_with_incoming_shutdown(incoming, stop);
        tokio::pin!(serving);
        let served = tokio::select! {
            served = &mut serving => served,
            () = accepting => serving.await,
        };
        if let Err(error) = served {
            tracing::error!(%error, "gRPC server failed");
        }
    }

    /// Accepts connections, and gives those whose handshake is done to `ready`. Returns when that is closed.
    async fn accept(self, listener: TcpListener, ready: mpsc::Sender<std::io::Result<Accepted>>) {
        let room = Arc::new(Semaphore::new(self.config.connections_max));
        let limit = Duration::from_millis(self.config.handshake_timeout_ms);
        // In the order of arrival: a flood of silent connections locks nobody out.
        let mut handshakes: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a gRPC connection");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            let metrics = self.metrics.clone();
            handshakes.retain(|handshake| !handshake.is_finished());
            if handshakes.len() >= self.config.handshakes_max
                && let Some(oldest) = handshakes.pop_front()
            {
                oldest.abort();
                metrics.accepts.with_label_values(&["over_limit"]).inc();
            }
            let acceptor = self.credentials.server().map(TlsAcceptor::from);
            let (ready, room) = (ready.clone(), Arc::clone(&room));
            let handshake = tokio::spawn(
                async move {
                    let shaken = timeout(limit, shake(stream, address, acceptor)).await;
                    let result = match shaken {
                        Ok(Ok((stream, caller))) => match room.try_acquire_owned() {
                            Err(_) => "over_limit",
                            Ok(permit) => {
                                let connections = metrics.connections.clone();
                                connections.inc();
                                let _place = Place { connections, _permit: permit };
                                // Fails if the server has ended.
                                let _ = ready.send(Ok(Accepted { stream, caller, _place })).await;
                                "accepted"
                            }
                        },
                        Ok(Err(error)) => {
                            refused(address, &error);
                            "failed"
                        }
                        Err(_) => "timeout",
                    };
                    metrics.accepts.with_label_values(&[result]).inc();
                }
                .in_current_span(),
            );
            handshakes.push_back(handshake.abort_handle());
        }
    }
}

/// Logs a failed handshake, one line a cause in `log.repeat_seconds`. A connection that only opens and closes is a probe.
fn refused(address: SocketAddr, error: &std::io::Error) {
    let why = words::causes(error);
    if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) {
        tracing::debug!(%address, why, "gRPC handshake failed");
    } else if let Some(repeated) = repeats::due(&format!("gRPC handshake: {why}")) {
        tracing::warn!(%address, why, repeated, "gRPC handshake failed");
    }
}

/// A connection's place among `connections_max`.
struct Place {
    connections: IntGauge,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.dec();
    }
}

type MaybeTls = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// The TLS handshake, or a look at the first bytes, so that silent connections end.
async fn shake(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: Option<TlsAcceptor>,
) -> std::io::Result<(MaybeTls, Caller)> {
    stream.set_nodelay(true)?;
    let Some(acceptor) = acceptor else {
        await_preface(&stream).await?;
        return Ok((Either::Left(stream), Caller { address, parties: None }));
    };
    let stream = acceptor.accept(stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let parties = certificate.map(Party::named_by).unwrap_or_default();
    Ok((Either::Right(Box::new(stream)), Caller { address, parties: Some(parties.into()) }))
}

async fn await_preface(stream: &TcpStream) -> std::io::Result<()> {
    let mut first = [0; PREFACE.len()];
    loop {
        let read = stream.peek(&mut first).await?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if first[..read] != PREFACE[..read] {
            return Err(std::io::Error::other("it does not speak HTTP/2 without TLS"));
        }
        if read == PREFACE.len() {
            return Ok(());
        }
        sleep(PREFACE_LOOK).await;
    }
}

/// A connection whose handshake is done.
struct Accepted {
    stream: MaybeTls,
    caller: Caller,
    _place: Place,
}

impl Connected for Accepted {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
