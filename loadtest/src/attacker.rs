//! An attacker of the devices' port: a process of its own, so that its CPU time is its own, with a fixed pace whatever
//! the server answers. And the barest server that it can attack instead of a node: what honest clients lose beside
//! that attack is the cost of the attacker and of the kernel.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barid_testkit::raw::{CONTINUATION, LAST, PING, TEXT, announced, frame, request};
use clap::{Args, ValueEnum, value_parser};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{Instant, sleep, sleep_until};

use crate::agent::announce;
use crate::process;

/// Environment variable with the token of the attacks that need one.
pub const TOKEN: &str = "BARID_ATTACK_TOKEN";

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
    /// A whole handshake with a valid token, and no Hello.
    Silent,
    /// The same, and floods instead of Hello: pings, empty continuations, half frames.
    Flood,
    /// A whole handshake with a token that is refused.
    Tokens,
}

impl Kind {
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
    #[arg(long, value_parser = value_parser!(u8).range(1..=255))]
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
    /// How long it attacks.
    #[arg(long, value_parser = value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
}

/// What the attacker has done and seen. Field names are stable.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Connections begun.
    pub attempts: u64,
    /// Most connections that were open at once.
    pub open_max: u64,
    /// Answers by HTTP status.
    pub answers: BTreeMap<String, u64>,
    /// Connections that the server ended with a reset, or that it did not accept.
    pub reset: u64,
    /// Connections that the server closed without an answer, or after its 101.
    pub closed: u64,
    pub sent_bytes: u64,
    /// CPU time of the attacker's process.
    pub cpu_s: f64,
}

#[derive(Default)]
struct Counts {
    open: AtomicU64,
    sent_bytes: AtomicU64,
    outcome: Mutex<Outcome>,
}

/// Attacks, and prints an [`Outcome`] as JSON.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let token = match options.kind {
        Kind::Tokens => "eyJhbGciOiJIUzI1NiJ9.e30.c2ln".to_owned(),
        _ => std::env::var(TOKEN).unwrap_or_default(),
    };
    let path = format!("/v1/connect?token={token}");
    let handshake = request(&path, "Sec-WebSocket-Protocol: barid.v1.json\r\n");
    let attack =
        Arc::new(Attack { options: options.clone(), handshake, counts: Counts::default() });
    let (begun, mut held) = (Instant::now(), VecDeque::new());
    let total = u64::from(options.rate) * options.seconds;
    for number in 0..total {
        sleep_until(begun + Duration::from_secs_f64(number as f64 / f64::from(options.rate))).await;
        if held.len() >= options.hold as usize
            && let Some(oldest) = held.pop_front()
        {
            let oldest: tokio::task::JoinHandle<()> = oldest;
            oldest.abort();
        }
        let attack = Arc::clone(&attack);
        held.push_back(tokio::spawn(async move { attack.once(number).await }));
    }
    sleep_until(begun + Duration::from_secs(options.seconds)).await;
    let mut outcome = attack.counts.outcome.lock().clone();
    outcome.attempts = total;
    outcome.sent_bytes = attack.counts.sent_bytes.load(Ordering::Relaxed);
    outcome.cpu_s = process::cpu_s(std::process::id())?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(&outcome)?)?;
    out.flush()?;
    Ok(true)
}

struct Attack {
    options: Options,
    handshake: String,
    counts: Counts,
}

/// How a connection ended.
enum End {
    Answer(String),
    Closed,
    Reset,
}

impl Attack {
    async fn once(&self, number: u64) {
        let end = match self.connect(number).await {
            Ok(stream) => {
                let _open = Open::new(&self.counts);
                self.attack(stream, number).await
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

    async fn attack(&self, stream: TcpStream, number: u64) -> End {
        let (mut reading, mut writing) = stream.into_split();
        let handshake = self.handshake.as_bytes();
        let begin = match self.options.kind {
            Kind::Half => &handshake[..handshake.len() / 2],
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
        let until_closed =
            async { while reading.read(&mut answer).await.is_ok_and(|read| read > 0) {} };
        tokio::select! {
            () = until_closed => (),
            () = self.flood(&mut writing, number) => (),
        }
        End::Closed
    }

    /// Sends until that fails.
    async fn flood(&self, writing: &mut (impl tokio::io::AsyncWrite + Unpin), number: u64) {
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
        writing: &mut (impl tokio::io::AsyncWrite + Unpin),
        bytes: &[u8],
    ) -> std::io::Result<()> {
        writing.write_all(bytes).await?;
        self.counts.sent_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Counts a connection as open until it is dropped.
struct Open<'a>(&'a Counts);

impl<'a> Open<'a> {
    fn new(counts: &'a Counts) -> Self {
        let open = counts.open.fetch_add(1, Ordering::Relaxed) + 1;
        let mut outcome = counts.outcome.lock();
        outcome.open_max = outcome.open_max.max(open);
        Self(counts)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Accepts connections and holds them: it answers 101 to every end of a head, and reads everything else.
pub async fn hold() -> anyhow::Result<bool> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    announce(&[listener.local_addr()?])?;
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(hold_one(stream));
    }
    Ok(true)
}

async fn hold_one(mut stream: TcpStream) -> std::io::Result<()> {
    let mut bytes = vec![0; 4 << 10];
    loop {
        let read = stream.read(&mut bytes).await?;
        if read == 0 {
            return Ok(());
        }
        if bytes[..read].ends_with(b"\r\n\r\n") {
            stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn attack(kind: Kind, node: SocketAddr) -> Outcome {
        let options =
            Options { kind, node, network: 9, addresses: 3, rate: 50, hold: 20, seconds: 1 };
        let handshake = request("/", "");
        let attack = Attack { options, handshake, counts: Counts::default() };
        let attacking = (0..30).map(|number| attack.once(number));
        let _ =
            tokio::time::timeout(Duration::from_millis(500), futures::future::join_all(attacking))
                .await;
        let mut outcome = attack.counts.outcome.lock().clone();
        outcome.sent_bytes = attack.counts.sent_bytes.load(Ordering::Relaxed);
        outcome
    }

    #[tokio::test]
    async fn each_kind_sends_what_it_says_and_counts_what_it_sees() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let node = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(hold_one(stream));
            }
        });
        let whole = request("/", "").len() as u64;
        let half = attack(Kind::Half, node).await;
        assert_eq!((half.open_max, half.sent_bytes, half.answers.len()), (30, 30 * (whole / 2), 0));
        let silent = attack(Kind::Silent, node).await;
        assert_eq!(
            (silent.open_max, silent.sent_bytes, silent.answers["101"]),
            (30, 30 * whole, 30)
        );
        let flood = attack(Kind::Flood, node).await;
        assert!(flood.sent_bytes > 30 * whole + (1 << 20), "{flood:?}");
        assert_eq!(attack(Kind::Tokens, node).await.answers["101"], 30);
        let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, barid_testkit::ports::free_port()));
        assert_eq!(attack(Kind::Tokens, nobody).await.reset, 30);
    }
}
