//! An attacker of the devices' port: a process of its own, so that its CPU time is its own, with a fixed pace whatever
//! the server answers. And the barest server that it can attack instead of a node: what honest clients lose beside
//! that attack is the cost of the attacker and of the kernel.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use barid_testkit::certificates;
use barid_testkit::raw::{CONTINUATION, LAST, PING, TEXT, announced, frame, request};
use clap::{Args, ValueEnum, value_parser};
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::agent::announce;
use crate::process;

/// Pause between two bytes of a dripping request.
const DRIP: Duration = Duration::from_millis(500);
/// Pause between two bursts of a flood.
const BURST: Duration = Duration::from_millis(10);
const PINGS_PER_BURST: usize = 100;
const FRAGMENTS_PER_BURST: usize = 100;
const HALF_FRAME_BYTES: usize = 16 << 10;
/// The frame size that a half frame announces: the default of `limits.frame_bytes_max`.
const FRAME_BYTES: u64 = 64 << 10;

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Half a request, and silence.
    Half,
    /// A request, one byte every 500 ms.
    Drip,
    /// A whole handshake with one of many valid tokens, and no Hello.
    Silent,
    /// The same, and floods instead of Hello: pings, empty continuations, half frames.
    Flood,
    /// A whole handshake with a token that is refused.
    Tokens,
    /// Over TLS: a whole TLS handshake, half a request, and silence.
    HalfTls,
    /// Half a ClientHello, and silence.
    ClientHello,
}

impl Kind {
    /// Whether it attacks a port with TLS.
    pub fn is_over_tls(self) -> bool {
        matches!(self, Self::HalfTls | Self::ClientHello)
    }

    /// Whether its handshakes have valid tokens.
    pub fn has_tokens(self) -> bool {
        matches!(self, Self::Silent | Self::Flood)
    }

    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// The attacker's options.
#[derive(Debug, Clone, Args)]
pub struct Options {
    #[arg(long)]
    pub kind: Kind,
    /// The server.
    #[arg(long)]
    pub node: SocketAddr,
    /// The attacker's addresses are 127.NETWORK.x.y.
    #[arg(long, value_parser = value_parser!(u8).range(1..=254))]
    pub network: u8,
    /// Number of its addresses.
    #[arg(long, value_parser = value_parser!(u16).range(1..=10_000))]
    pub addresses: u16,
    /// Connections begun per second.
    #[arg(long, value_parser = value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// A connection is dropped when so many younger ones were begun.
    #[arg(long, value_parser = value_parser!(u32).range(1..=19_000))]
    pub hold: u32,
    /// How long it attacks, unless it gets SIGTERM before.
    #[arg(long, value_parser = value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// File with valid tokens, one a line, used in turn (`silent` and `flood`).
    #[arg(long)]
    pub tokens: Option<PathBuf>,
}

/// What the attacker has done and seen. Field names are stable.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Connections begun.
    pub attempts: u64,
    /// How long it attacked.
    pub seconds: f64,
    /// Most connections that were open at once.
    pub open_max: u64,
    /// Most connections that were upgraded (101) and open at once.
    pub upgraded_max: u64,
    /// Answers by HTTP status.
    pub answers: BTreeMap<String, u64>,
    /// Connections that the server ended with a reset, or that it did not accept.
    pub reset: u64,
    /// Connections that the server closed without an answer, or after its 101.
    pub closed: u64,
    /// Without those that TLS adds.
    pub sent_bytes: u64,
    /// CPU time of the attacker's process.
    pub cpu_s: f64,
}

impl Outcome {
    /// Connections begun per second.
    pub fn per_second(&self) -> f64 {
        self.attempts as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }
}

#[derive(Default)]
struct Counts {
    attempts: AtomicU64,
    open: Gauge,
    upgraded: Gauge,
    sent_bytes: AtomicU64,
    outcome: Mutex<Outcome>,
}

impl Counts {
    fn outcome(&self) -> Outcome {
        Outcome {
            attempts: self.attempts.load(Ordering::Relaxed),
            open_max: self.open.most.load(Ordering::Relaxed),
            upgraded_max: self.upgraded.most.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            ..self.outcome.lock().clone()
        }
    }
}

/// Attacks, and prints an [`Outcome`] as JSON.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let (attack, mut term) = (Arc::new(Attack::new(options)?), signal(SignalKind::terminate())?);
    let begun = Instant::now();
    tokio::select! {
        () = begin(&attack, begun) => (),
        () = sleep(Duration::from_secs(options.seconds)) => (),
        _ = term.recv() => (),
    }
    let seconds = begun.elapsed().as_secs_f64();
    let outcome =
        Outcome { seconds, cpu_s: process::cpu_s(std::process::id())?, ..attack.counts.outcome() };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(&outcome)?)?;
    out.flush()?;
    Ok(true)
}

/// Begins connections at the attack's rate, without end.
async fn begin(attack: &Arc<Attack>, begun: Instant) {
    let mut held = VecDeque::new();
    for number in 0.. {
        let due = number as f64 / f64::from(attack.options.rate);
        sleep_until(begun + Duration::from_secs_f64(due)).await;
        if held.len() >= attack.options.hold as usize
            && let Some(oldest) = held.pop_front()
        {
            let oldest: tokio::task::JoinHandle<()> = oldest;
            oldest.abort();
        }
        let attack = Arc::clone(attack);
        held.push_back(tokio::spawn(async move { attack.once(number).await }));
    }
}

struct Attack {
    options: Options,
    /// Handshakes that are sent in turn.
    handshakes: Vec<String>,
    tls: Arc<ClientConfig>,
    client_hello: Vec<u8>,
    counts: Counts,
}

/// How a connection ended.
enum End {
    Answer(String),
    Closed,
    Reset,
}

impl Attack {
    fn new(options: &Options) -> anyhow::Result<Self> {
        let tokens = match &options.tokens {
            Some(file) => std::fs::read_to_string(file)
                .with_context(|| format!("reading {}", file.display()))?,
            None => "eyJhbGciOiJIUzI1NiJ9.e30.c2ln".to_owned(),
        };
        let handshake = |token: &str| {
            let path = format!("/v1/connect?token={token}");
            request(&path, "Sec-WebSocket-Protocol: barid.v1.json\r\n")
        };
        let handshakes: Vec<_> = tokens.lines().map(handshake).collect();
        ensure!(!handshakes.is_empty(), "the file of --tokens is empty");
        let (tls, mut client_hello) = (certificates::trusting(certificates::ONE.pem)?, Vec::new());
        ClientConnection::new(Arc::clone(&tls), server_name())?.write_tls(&mut client_hello)?;
        let (options, counts) = (options.clone(), Counts::default());
        Ok(Self { options, handshakes, tls, client_hello, counts })
    }

    async fn once(&self, number: u64) {
        // Counted here, because a task that is dropped before it runs has begun nothing.
        self.counts.attempts.fetch_add(1, Ordering::Relaxed);
        let end = match self.connect(number).await {
            Ok(stream) => {
                let _open = self.counts.open.enter();
                self.attack_over(stream, number).await
            }
            Err(_) => End::Reset,
        };
        let mut outcome = self.counts.outcome.lock();
        match end {
            End::Answer(status) => *outcome.answers.entry(status).or_default() += 1,
            End::Closed => outcome.closed += 1,
            End::Reset => outcome.reset += 1,
        }
    }

    async fn connect(&self, number: u64) -> std::io::Result<TcpStream> {
        let host = (number % u64::from(self.options.addresses)) as u16 + 1;
        let [high, low] = host.to_be_bytes();
        let source = IpAddr::from(Ipv4Addr::new(127, self.options.network, high, low));
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(source, 0))?;
        let stream = socket.connect(self.options.node).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn attack_over(&self, stream: TcpStream, number: u64) -> End {
        if self.options.kind != Kind::HalfTls {
            return self.attack(stream, number).await;
        }
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        match connector.connect(server_name(), stream).await {
            Ok(stream) => self.attack(stream, number).await,
            Err(_) => End::Reset,
        }
    }

    async fn attack(&self, stream: impl AsyncRead + AsyncWrite + Unpin, number: u64) -> End {
        let (mut reading, mut writing) = tokio::io::split(stream);
        let handshake =
            self.handshakes[(number % self.handshakes.len() as u64) as usize].as_bytes();
        let begin = match self.options.kind {
            Kind::Half | Kind::HalfTls => &handshake[..handshake.len() / 2],
            Kind::ClientHello => &self.client_hello[..self.client_hello.len() / 2],
            Kind::Drip => &handshake[..1],
            Kind::Silent | Kind::Flood | Kind::Tokens => handshake,
        };
        if self.send(&mut writing, begin).await.is_err() {
            return End::Reset;
        }
        let mut answer = [0; 512];
        let dripping = async {
            if self.options.kind == Kind::Drip {
                for byte in handshake.get(1..).unwrap_or_default() {
                    sleep(DRIP).await;
                    self.send(&mut writing, &[*byte]).await?;
                }
            }
            std::future::pending::<std::io::Result<()>>().await
        };
        let read = tokio::select! {
            read = reading.read(&mut answer) => read,
            _ = dripping => return End::Reset,
        };
        let status = match read {
            Ok(0) => return End::Closed,
            Ok(read) => {
                String::from_utf8_lossy(answer[..read].get(9..12).unwrap_or_default()).into_owned()
            }
            Err(_) => return End::Reset,
        };
        if status != "101" || self.options.kind == Kind::Tokens {
            return End::Answer(status);
        }
        *self.counts.outcome.lock().answers.entry(status).or_default() += 1;
        let _upgraded = self.counts.upgraded.enter();
        let until_closed =
            async { while reading.read(&mut answer).await.is_ok_and(|read| read > 0) {} };
        tokio::select! {
            () = until_closed => (),
            () = self.flood(&mut writing, number) => (),
        }
        End::Closed
    }

    /// Sends until that fails.
    async fn flood(&self, writing: &mut (impl AsyncWrite + Unpin), number: u64) {
        if self.options.kind != Kind::Flood {
            return std::future::pending().await;
        }
        let bursts = match number % 3 {
            0 => vec![frame(PING, [b'x'; 9]).repeat(PINGS_PER_BURST)],
            1 => {
                let begin = frame(TEXT - LAST, "");
                vec![begin, frame(CONTINUATION - LAST, "").repeat(FRAGMENTS_PER_BURST)]
            }
            _ => vec![announced(TEXT, FRAME_BYTES), vec![b' '; HALF_FRAME_BYTES]],
        };
        let (first, rest) = (bursts.first(), bursts.last());
        let mut next = first;
        while let Some(burst) = next {
            if self.send(writing, burst).await.is_err() {
                return;
            }
            next = rest;
            sleep(BURST).await;
        }
    }

    async fn send(
        &self,
        writing: &mut (impl AsyncWrite + Unpin),
        bytes: &[u8],
    ) -> std::io::Result<()> {
        writing.write_all(bytes).await?;
        self.counts.sent_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// The name that the certificate of the devices' port has.
fn server_name() -> ServerName<'static> {
    ServerName::from(IpAddr::from(Ipv4Addr::LOCALHOST))
}

/// A number of connections, and its maximum.
#[derive(Default)]
struct Gauge {
    now: AtomicU64,
    most: AtomicU64,
}

impl Gauge {
    /// Counts a connection until the result is dropped.
    fn enter(&self) -> Counted<'_> {
        let now = self.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.most.fetch_max(now, Ordering::Relaxed);
        Counted(self)
    }
}

struct Counted<'a>(&'a Gauge);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Accepts connections and holds them, on a port without TLS and on one with TLS: it answers 101 to every end of a
/// head, and reads everything else.
pub async fn hold() -> anyhow::Result<bool> {
    let plain = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let tls = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let acceptor = acceptor()?;
    announce(&[plain.local_addr()?, tls.local_addr()?])?;
    tokio::try_join!(serve(plain, None), serve(tls, Some(acceptor)))?;
    Ok(true)
}

fn acceptor() -> anyhow::Result<TlsAcceptor> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let certificate = CertificateDer::from_pem_slice(certificates::ONE.pem.as_bytes())?;
    let key = PrivateKeyDer::from_pem_slice(certificates::ONE.key.as_bytes())?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>) -> anyhow::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        let tls = tls.clone();
        tokio::spawn(async move {
            match tls {
                Some(tls) => hold_one(tls.accept(stream).await?).await,
                None => hold_one(stream).await,
            }
        });
    }
}

async fn hold_one(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<()> {
    let mut bytes = vec![0; 4 << 10];
    loop {
        let read = stream.read(&mut bytes).await?;
        if read == 0 {
            return Ok(());
        }
        if bytes[..read].ends_with(b"\r\n\r\n") {
            stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").await?;
            // TLS keeps small writes until they are flushed.
            stream.flush().await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn listen(tls: Option<TlsAcceptor>) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, tls));
        address
    }

    fn attack_of(kind: Kind, node: SocketAddr) -> Attack {
        let (network, addresses, rate, hold, seconds, tokens) = (9, 3, 50, 20, 1, None);
        let options = Options { kind, node, network, addresses, rate, hold, seconds, tokens };
        Attack::new(&options).unwrap()
    }

    async fn attack(kind: Kind, node: SocketAddr) -> Outcome {
        let attack = attack_of(kind, node);
        let attacking = (0..30).map(|number| attack.once(number));
        let _ =
            tokio::time::timeout(Duration::from_millis(500), futures::future::join_all(attacking))
                .await;
        attack.counts.outcome()
    }

    #[tokio::test]
    async fn each_kind_sends_what_it_says_and_counts_what_it_sees() {
        let (node, tls) = (listen(None).await, listen(Some(acceptor().unwrap())).await);
        let sample = attack_of(Kind::Half, node);
        let (whole, hello) = (sample.handshakes[0].len() as u64, sample.client_hello.len() as u64);
        for (kind, node, bytes) in [
            (Kind::Half, node, whole / 2),
            (Kind::HalfTls, tls, whole / 2),
            (Kind::ClientHello, tls, hello / 2),
        ] {
            let half = attack(kind, node).await;
            assert_eq!((half.open_max, half.sent_bytes), (30, 30 * bytes), "{kind:?}");
            assert_eq!((half.attempts, half.upgraded_max, half.reset), (30, 0, 0), "{kind:?}");
            assert_eq!((half.closed, half.answers.len()), (0, 0), "{kind:?}");
        }
        let silent = attack(Kind::Silent, node).await;
        assert_eq!((silent.upgraded_max, silent.sent_bytes), (30, 30 * whole));
        assert_eq!(silent.answers["101"], 30);
        let flood = attack(Kind::Flood, node).await;
        assert!(flood.sent_bytes > 30 * whole + (1 << 20), "{flood:?}");
        assert_eq!(attack(Kind::Tokens, node).await.answers["101"], 30);
        let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, barid_testkit::ports::free_port()));
        assert_eq!(attack(Kind::Tokens, nobody).await.reset, 30);
    }

    #[tokio::test]
    async fn connections_are_begun_at_the_rate_and_counted_as_they_are_begun() {
        let attack = Arc::new(attack_of(Kind::Half, listen(None).await));
        let begun = Instant::now();
        let _ = tokio::time::timeout(Duration::from_secs(1), begin(&attack, begun)).await;
        let seconds = begun.elapsed().as_secs_f64();
        let outcome = Outcome { seconds, ..attack.counts.outcome() };
        assert!((30.0..=51.0).contains(&outcome.per_second()), "{outcome:?}");
    }
}
