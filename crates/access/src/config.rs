//! Configuration of an access node.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use barid_bus::KafkaConfig;
use barid_core::Secret;
use barid_core::limits::GROUPS_MAX;
use barid_mailbox::{LeaseConfig, RedisConfig, check_text};
use barid_mesh::{GrpcConfig, InternalTlsConfig};
use barid_runtime::bounds::{
    self, Bound, Bounded, DAY_SECONDS, HOUR_MS, TEBIBYTE, real, whole, within,
};
use barid_runtime::config::listen;
use barid_runtime::words::{is_host, is_host_port, is_url, shown, url_parts};
use barid_runtime::{AdminConfig, LogConfig, SecretUrl};
use barid_wire::frames::BODY_BYTES_MAX;
use serde::{Deserialize, Serialize};

/// Maximum accept loops: `acceptors` keeps a bit for each.
pub(crate) const ACCEPTORS_MAX: u32 = u64::BITS;
/// Maximum length of a burst, s.
const BURST_SECONDS_MAX: u64 = 600;
/// Maximum of a connection limit; no machine has memory for more sockets.
const CONNECTIONS_MAX: u64 = 10_000_000;
/// Maximum of a timeout, ms.
const WAIT_MS_MAX: u64 = HOUR_MS / 6;
/// Maximum bytes of a WebSocket frame's head.
const FRAME_HEAD_BYTES_MAX: u64 = 14;
/// Maximum bytes of a queue of messages.
const QUEUE_BYTES_MAX: u64 = 4 << 30;

impl Bounded for JwksConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("refresh_seconds", 1..=7 * DAY_SECONDS, "s"),
            whole("refresh_min_seconds", 0..=DAY_SECONDS, "s"),
            whole("timeout_ms", 1..=60_000, "ms"),
            whole("age_max_seconds", 1..=30 * DAY_SECONDS, "s").or_zero("no limit"),
            whole("keys_max", 1..=10_000, ""),
        ]
    }
}

impl Bounded for AuthConfig {
    fn bounds() -> Vec<Bound> {
        let own = vec![
            whole("nbf_leeway_seconds", 0..=DAY_SECONDS, "s"),
            whole("lifetime_max_seconds", 1..=3_660 * DAY_SECONDS, "s").or_zero("no limit"),
            whole("revocations_max", 1..=10_000_000, ""),
        ];
        [own, within::<JwksConfig>("jwks")].concat()
    }
}

impl Bounded for LimitsConfig {
    fn bounds() -> Vec<Bound> {
        let connections = |key| whole(key, 1..=CONNECTIONS_MAX, "");
        let a_second = |key| whole(key, 1..=CONNECTIONS_MAX, "a second");
        vec![
            connections("connections_max"),
            whole("handshakes_max", 1..=1_000_000, ""),
            a_second("handshakes_per_second").or_zero("no limit"),
            whole("handshakes_burst_seconds", 1..=BURST_SECONDS_MAX, "s"),
            connections("address_connections_max").or_zero("no limit"),
            whole("address_handshakes_max", 1..=1_000_000, "").or_zero("no limit"),
            whole("network_handshakes_max", 1..=1_000_000, "").or_zero("no limit"),
            a_second("address_handshakes_per_second").or_zero("no limit"),
            connections("addresses_max"),
            whole("address_refusals_max", 1..=1_000_000, "a minute")
                .or_zero("no address is blocked"),
            whole("network_refusals_max", 1..=1_000_000, "a minute").or_zero("no /48 is blocked"),
            whole("block_seconds", 1..=DAY_SECONDS, "s"),
            whole("block_seconds_max", 1..=DAY_SECONDS, "s"),
            whole("user_connections_max", 1..=10_000, "").or_zero("no limit"),
            connections("app_connections_max").or_zero("no limit"),
            a_second("app_new_users_per_second").or_zero("no limit"),
            connections("unidentified_max"),
            connections("address_unidentified_max").or_zero("no limit"),
            connections("user_unidentified_max").or_zero("no limit"),
            whole("first_byte_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("handshake_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("handshake_keep_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("handshake_keep_tls_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("hello_timeout_min_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("hello_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("attempt_ahead_ms", 0..=DAY_SECONDS * 1000, "ms"),
            // Room for a Hello, or a token.
            whole("frame_bytes_max", 1024..=BODY_BYTES_MAX.into(), "bytes"),
            whole("fragments_max", 1..=1 << 20, ""),
            whole("upstream_frames_per_second", 1..=1_000_000, "a second").or_zero("no limit"),
            whole("upstream_bytes_per_second", 1..=1 << 30, "bytes a second").or_zero("no limit"),
            whole("upstream_burst_seconds", 1..=BURST_SECONDS_MAX, "s"),
            whole("queued_bytes_max", 1..=QUEUE_BYTES_MAX, "bytes"),
            // The kernel takes half an i32, and doubles it.
            whole("send_buffer_bytes", 1..=1 << 30, "bytes").or_zero("as the system has it"),
            whole("node_queued_bytes_max", 1..=TEBIBYTE, "bytes"),
            whole("metric_names_max", 0..=1_000, ""),
            whole("subscriptions_max", 0..=GROUPS_MAX as u64, ""),
            whole("fanout_bytes_max", 1..=QUEUE_BYTES_MAX, "bytes"),
            whole("node_fanout_bytes_max", 1..=TEBIBYTE, "bytes"),
            whole("fanout_seconds", 1..=DAY_SECONDS, "s"),
            whole("memory_bytes_max", 1..=TEBIBYTE, "bytes").or_zero("80 % of the cgroup's limit"),
            whole("unacked_max", 1..=1_000_000, ""),
            whole("close_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("batches_max", 1..=100_000, ""),
            whole("kicks_per_second", 1..=CONNECTIONS_MAX, "a second"),
        ]
    }
}

impl Bounded for HeartbeatConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("interval_seconds", 1..=3_600, "s"),
            whole("timeout_seconds", 1..=3_600, "s"),
            whole("interval_min_seconds", 1..=3_600, "s"),
            whole("interval_max_seconds", 1..=3_600, "s"),
            whole("idle_seconds", 1..=30 * DAY_SECONDS, "s").or_zero("never"),
        ]
    }
}

impl Bounded for BalanceConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            real("shed_above", 1.01..=1_000.0, "").or_zero("never"),
            whole("shed_slack", 0..=CONNECTIONS_MAX, ""),
            whole("sheds_per_second", 1..=CONNECTIONS_MAX, "a second"),
        ]
    }
}

impl Bounded for SyncConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("page_entries_max", 1..=10_000, ""),
            whole("page_bytes_max", 1..=64 << 20, "bytes"),
            whole("confirm_interval_seconds", 1..=DAY_SECONDS, "s"),
            whole("confirms_per_second", 1..=CONNECTIONS_MAX, "a second"),
            whole("ack_interval_ms", 0..=60_000, "ms"),
        ]
    }
}

impl Bounded for Config {
    fn bounds() -> Vec<Bound> {
        let own = vec![
            whole("drain_seconds", 1..=DAY_SECONDS, "s"),
            whole("acceptors", 1..=ACCEPTORS_MAX.into(), ""),
        ];
        [
            own,
            LeaseConfig::bounds(),
            within::<AdminConfig>("admin"),
            within::<LogConfig>("log"),
            within::<GrpcConfig>("grpc"),
            within::<RedisConfig>("redis"),
            within::<AuthConfig>("auth"),
            within::<LimitsConfig>("limits"),
            within::<HeartbeatConfig>("heartbeat"),
            within::<BalanceConfig>("balance"),
            within::<SyncConfig>("sync"),
            within::<KafkaConfig>("kafka"),
        ]
        .concat()
    }
}

/// The access node's configuration; an empty file is valid.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Metrics and health.
    pub admin: AdminConfig,
    /// Logs.
    pub log: LogConfig,
    /// Maximum duration of a drain after SIGTERM, s. GoAways are spread over it.
    pub drain_seconds: u64,
    /// File to which the bound addresses are written as JSON once the role is up.
    pub ready_file: Option<PathBuf>,
    /// Name of this node, unique in the cluster. Empty: derived from the address in its lease.
    pub node: String,
    /// Zone of the node, shown to operators and used for placement; may be empty.
    pub zone: String,
    /// Address for devices (`/v1/connect`).
    #[serde(deserialize_with = "listen")]
    pub listen: SocketAddr,
    /// Accept loops on `listen`, 1 to 64. More than one use a listener each (SO_REUSEPORT), among which the kernel
    /// distributes connections by a hash of their addresses.
    pub acceptors: u32,
    /// Address for dispatchers and other access nodes (gRPC).
    #[serde(deserialize_with = "listen")]
    pub grpc_listen: SocketAddr,
    /// `host:port` at which dispatchers reach `grpc_listen`. Empty: the bound address.
    pub advertise: String,
    /// URL at which devices reach `listen` (`wss://HOST/v1/connect`), returned by `GET /v1/nodes`. Empty: `ws://` and
    /// the bound address; none if that is a wildcard.
    pub advertise_url: String,
    /// Time to live of the lease without renewal, ms.
    pub lease_ttl_ms: u64,
    /// The dispatchers' `void_after_seconds`, s. A node that could not renew its lease for more than half of it starts
    /// a new incarnation.
    pub void_after_seconds: u64,
    /// The port for other roles, `grpc_listen`.
    pub grpc: GrpcConfig,
    /// Mutual TLS with other roles.
    pub internal_tls: InternalTlsConfig,
    /// Redis.
    pub redis: RedisConfig,
    /// Authentication of devices.
    pub auth: AuthConfig,
    /// TLS on `listen`.
    pub tls: TlsConfig,
    /// Load balancers in front of this node.
    pub proxy: ProxyConfig,
    /// Limits of connections, frames, queues and memory.
    pub limits: LimitsConfig,
    /// Pings, and timeouts of silent devices.
    pub heartbeat: HeartbeatConfig,
    /// Shedding of sessions to other nodes.
    pub balance: BalanceConfig,
    /// Mailbox reads, confirmations and acknowledgements.
    pub sync: SyncConfig,
    /// Whether receipts are produced for messages that ask for them.
    pub receipts: bool,
    /// Whether the topic of revocations is followed. Then no device is admitted until it has been read once.
    pub revocations: bool,
    /// Kafka, for receipts and revocations.
    pub kafka: KafkaConfig,
}

/// Keys under `auth`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Configured keys. Several are valid at once, so that they can be rotated.
    pub keys: Vec<KeyConfig>,
    /// Key sets (JWKS).
    pub jwks: Vec<JwksConfig>,
    /// Accepted values of `aud`, one of which a token must name. Empty: tokens must not name any.
    pub audience: Vec<String>,
    /// Accepted values of `iss`. Empty: `iss` is not checked.
    pub issuer: Vec<String>,
    /// Tolerated clock difference for `nbf`, s. `exp` has none.
    pub nbf_leeway_seconds: u64,
    /// Longest time until `exp` of a token, s. 0: no limit.
    pub lifetime_max_seconds: u64,
    /// Web origins that may connect, as in a browser's `Origin` header: `https://app.example.com`,
    /// `https://*.example.com`, `null`. Empty: all. Clients other than browsers send no origin and are not checked.
    pub origins: Vec<String>,
    /// Maximum revocations that the node keeps; beyond it the oldest of a user or a token is dropped, and its tokens are
    /// valid again.
    pub revocations_max: usize,
}

impl Default for AuthConfig {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            jwks: Vec::new(),
            audience: Vec::new(),
            issuer: Vec::new(),
            nbf_leeway_seconds: 0,
            lifetime_max_seconds: 0,
            origins: Vec::new(),
            revocations_max: 100_000,
        }
    }
}

impl AuthConfig {
    /// Checks names and relations.
    ///
    /// # Errors
    /// Returns the invalid keys, one a line.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.keys.is_empty() && self.jwks.is_empty() {
            return Err(
                "auth: no device can connect without an entry in auth.keys or auth.jwks".into()
            );
        }
        let keys =
            self.keys.iter().enumerate().map(|(at, key)| {
                key.check().map_err(|problem| format!("auth.keys[{at}].{problem}"))
            });
        let sets =
            self.jwks.iter().enumerate().map(|(at, set)| {
                set.check().map_err(|problem| format!("auth.jwks[{at}].{problem}"))
            });
        let names = [("audience", &self.audience), ("issuer", &self.issuer)];
        let names =
            names.into_iter().map(|(key, names)| match names.iter().position(String::is_empty) {
                Some(at) => {
                    Err(format!("auth.{key}[{at}] is empty; write a name, or clear the list"))
                }
                None => Ok(()),
            });
        bounds::all(keys.chain(sets).chain(names))
    }
}

impl KeyConfig {
    /// Refuses what the algorithm has no use for: a key that was meant for another one.
    fn check(&self) -> Result<(), String> {
        let algorithm = self.algorithm;
        match (algorithm, &self.public_key_file) {
            (KeyAlgorithmName::HS256, Some(_)) => Err("public_key_file has no effect with HS256; \
                set algorithm to RS256, ES256 or EdDSA"
                .into()),
            (KeyAlgorithmName::HS256, None) => Ok(()),
            _ if !self.secret.is_empty() => {
                Err(format!("secret has no effect with {algorithm:?}; write public_key_file"))
            }
            _ if self.secret_file.is_some() => {
                Err(format!("secret_file has no effect with {algorithm:?}; write public_key_file"))
            }
            _ => Ok(()),
        }
    }
}

impl JwksConfig {
    /// Errors do not show the URL, which may hold a secret.
    fn check(&self) -> Result<(), String> {
        if self.refresh_min_seconds > self.refresh_seconds {
            return Err(format!(
                "refresh_min_seconds must be at most its refresh_seconds, {}",
                self.refresh_seconds
            ));
        }
        let (refresh, age) = (self.refresh_seconds, self.age_max_seconds);
        if (1..refresh).contains(&age) {
            return Err(format!(
                "age_max_seconds ({age}) must be at least its refresh_seconds, {refresh}, or 0"
            ));
        }
        let url = self.url.expose();
        if url.is_empty() {
            return Ok(());
        }
        let Some((_, authority)) = url_parts(url) else {
            return Err("url has no scheme; write https://HOST[:PORT]/PATH".into());
        };
        let bare = authority.rsplit('@').next().unwrap_or_default();
        bounds::refuse_if(!(is_host(bare) || is_host_port(bare)), || {
            "url has no host, or a port that does not exist; write https://HOST[:PORT]/PATH".into()
        })
    }
}

/// One key under `auth.keys`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyConfig {
    /// Key id (`kid`). Empty: tried for every token of its algorithm.
    pub id: String,
    /// Signature algorithm; tokens of other algorithms do not match the key.
    pub algorithm: KeyAlgorithmName,
    /// HS256: the secret, at least 32 bytes.
    pub secret: Secret,
    /// HS256: file that contains the secret.
    pub secret_file: Option<PathBuf>,
    /// Other algorithms: public key, PEM.
    pub public_key_file: Option<PathBuf>,
    /// Apps whose tokens the key may sign. Empty: all.
    pub apps: Vec<String>,
}

/// Signature algorithms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum KeyAlgorithmName {
    /// HMAC with SHA-256.
    #[default]
    HS256,
    /// RSA PKCS #1 v1.5 with SHA-256.
    RS256,
    /// ECDSA on P-256 with SHA-256.
    ES256,
    /// Ed25519.
    EdDSA,
}

/// One key set under `auth.jwks`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JwksConfig {
    /// File that contains the key set.
    pub file: Option<PathBuf>,
    /// URL of the key set; excludes `file`.
    pub url: SecretUrl,
    /// `https`: trusted authorities, one or several, PEM, read at start-up. Default: Mozilla's public ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Apps whose tokens these keys may sign. Empty: all.
    pub apps: Vec<String>,
    /// Interval between reloads, s.
    pub refresh_seconds: u64,
    /// Minimum interval between reloads caused by tokens with an unknown key id, s.
    pub refresh_min_seconds: u64,
    /// Timeout of a request to the URL, ms.
    pub timeout_ms: u64,
    /// Time since the last successful reading after which the keys are not used any more, s. 0: no limit.
    pub age_max_seconds: u64,
    /// Maximum keys of the set; a larger one is not used.
    pub keys_max: usize,
    /// Whether the URL may be `http`, so that anybody on the way can choose the keys.
    pub insecure_http: bool,
}

impl Default for JwksConfig {
    fn default() -> Self {
        Self {
            file: None,
            url: SecretUrl::default(),
            ca_file: None,
            apps: Vec::new(),
            refresh_seconds: 300,
            refresh_min_seconds: 10,
            timeout_ms: 5_000,
            age_max_seconds: DAY_SECONDS,
            keys_max: 100,
            insecure_http: false,
        }
    }
}

/// Keys under `tls`. Without files, `listen` is plain text, for a load balancer that terminates TLS.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Certificate and its chain, PEM. Reloaded when it changes, and on SIGHUP.
    pub certificate_file: Option<PathBuf>,
    /// Private key of the certificate, PEM.
    pub key_file: Option<PathBuf>,
}

/// Keys under `proxy`: how to learn the clients' addresses behind load balancers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// Networks (`10.0.0.0/8`) or addresses of load balancers. The headers of other peers are ignored.
    pub trusted: Vec<String>,
    /// Whether each of their connections begins with a PROXY protocol header (version 1 or 2).
    pub protocol: bool,
    /// Whether their requests carry the client's address in `X-Forwarded-For`. One that names no client gets 400.
    pub forwarded_for: bool,
}

/// Keys under `limits`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Maximum connections.
    pub connections_max: usize,
    /// Maximum concurrent handshakes. Further ones are answered with 503, at most as many at once; beyond that,
    /// connections are closed without an answer.
    pub handshakes_max: usize,
    /// Maximum handshakes per second; further ones are answered with 503. 0: unlimited, here and in the limits below
    /// that allow 0.
    pub handshakes_per_second: u32,
    /// Maximum burst of handshakes, of the node and of an address, and of an app's new users: the rates times this many
    /// seconds.
    pub handshakes_burst_seconds: u64,
    /// Maximum connections of one client address (IPv6: of a /64); further ones are answered with 429. May be 0.
    pub address_connections_max: u32,
    /// Maximum concurrent handshakes of one client address. A further one gets the place of the oldest, if that is
    /// older than `first_byte_timeout_ms`, or is answered with 429. May be 0.
    pub address_handshakes_max: u32,
    /// The same for one IPv6 /48. May be 0.
    pub network_handshakes_max: u32,
    /// Maximum handshakes of one client address per second; further ones are answered with 429. May be 0.
    pub address_handshakes_per_second: u32,
    /// Maximum client addresses tracked for these limits; further ones are not limited. As many refused ones, and IPv6
    /// /48s, are tracked for blocks; further ones take the place of others.
    pub addresses_max: usize,
    /// Maximum refusals of one client address per minute, beyond one for each of its welcomed sessions: bad tokens,
    /// malformed or slow handshakes, too many connections, violations before Hello. Above it the address is blocked.
    /// May be 0: nothing is blocked.
    pub address_refusals_max: u32,
    /// The same for all addresses of one IPv6 /48 together. May be 0: no /48 is blocked.
    pub network_refusals_max: u32,
    /// First block of an address, s; each further one is ten times as long.
    pub block_seconds: u64,
    /// Longest block, s. After as much time without one, and a minute at least, the next block is a first one.
    pub block_seconds_max: u64,
    /// Maximum devices of one user connected to this node; a further one is closed with 4504. May be 0; at most
    /// `redis.devices_max`, which limits the devices on all nodes.
    pub user_connections_max: u32,
    /// Maximum lead of a Hello's `attempt` over the clock of the user's mailbox, ms. A later one is replaced by the
    /// time of the handshake.
    pub attempt_ahead_ms: u64,
    /// Maximum connections of one app to this node; further ones are answered with 429. May be 0.
    pub app_connections_max: u32,
    /// Maximum users of one app per second, of whom Redis holds nothing, that may connect to this node; further ones are
    /// closed with 4005, while known users connect. A burst may bring `handshakes_burst_seconds` of them. May be 0.
    pub app_new_users_per_second: u32,
    /// Maximum connections without Hello; further ones are answered with 503.
    pub unidentified_max: usize,
    /// Maximum connections without Hello of one client address; further ones are answered with 429. May be 0.
    pub address_unidentified_max: u32,
    /// Maximum connections of one user without Welcome; further ones are answered with 429. May be 0.
    pub user_unidentified_max: u32,
    /// Timeout of the first byte of a handshake, ms.
    pub first_byte_timeout_ms: u64,
    /// Timeout of a handshake, ms.
    pub handshake_timeout_ms: u64,
    /// Time for which an unfinished handshake keeps its place when all are taken, ms; `first_byte_timeout_ms` if that is
    /// less. After it, a newcomer gets the place.
    pub handshake_keep_ms: u64,
    /// The same from the first message of TLS (ClientHello) on, ms, where that is later: the client's next message
    /// takes a round trip, and with TLS 1.2 two.
    pub handshake_keep_tls_ms: u64,
    /// Timeout of a device's Hello while as many connections as allowed have not said theirs, ms. Up to half as many,
    /// it is `hello_timeout_ms`.
    pub hello_timeout_min_ms: u64,
    /// Timeout of a device's Hello, and of the mailbox's answer to it, ms each.
    pub hello_timeout_ms: u64,
    /// Maximum bytes of a frame from a device.
    pub frame_bytes_max: usize,
    /// Maximum fragments of a message from a device; beyond it the device is closed with 4501.
    pub fragments_max: u32,
    /// Maximum WebSocket frames of one device per second, including fragments, pings and pongs; a device above it is
    /// closed with 4504. May be 0.
    pub upstream_frames_per_second: u32,
    /// Maximum bytes of one device per second, including the heads of frames; a device above it is closed with 4504.
    /// May be 0.
    pub upstream_bytes_per_second: u32,
    /// Maximum burst of one device: the two rates above times this many seconds.
    pub upstream_burst_seconds: u64,
    /// Maximum bytes of pushes queued for one device; beyond it the device is closed with 4002.
    pub queued_bytes_max: usize,
    /// Send buffer of one device's socket (SO_SNDBUF), in addition to `queued_bytes_max`; the kernel doubles it for its
    /// bookkeeping. 0: the system's default, which may grow to the maximum of `net.ipv4.tcp_wmem`.
    pub send_buffer_bytes: u32,
    /// Maximum bytes of pushes queued for all devices; beyond it new handshakes are answered with 503, and the devices
    /// with the largest queues are closed with 4002.
    pub node_queued_bytes_max: u64,
    /// Maximum platforms that metrics name at once, and SDKs, and apps; sessions of further ones count together.
    pub metric_names_max: usize,
    /// Maximum subscribed groups of a session; a further one is refused with 4504. At most 254.
    pub subscriptions_max: usize,
    /// Maximum bytes of unread messages held for one audience (everyone of an app, or a group); beyond it the oldest is
    /// dropped.
    pub fanout_bytes_max: usize,
    /// The same for all audiences together; beyond it new messages are dropped.
    pub node_fanout_bytes_max: u64,
    /// Maximum age of these messages, s.
    pub fanout_seconds: u32,
    /// Maximum resident memory of the process, bytes; beyond it new handshakes are answered with 503, and the devices
    /// with the largest queues are closed with 4002. 0: 80 % of the cgroup's limit, if there is one.
    pub memory_bytes_max: u64,
    /// Maximum unacknowledged messages of one device.
    pub unacked_max: usize,
    /// Timeout for sending a closing connection's last frames, ms.
    pub close_timeout_ms: u64,
    /// Maximum unanswered batches of one dispatcher.
    pub batches_max: usize,
    /// Maximum kicked sessions per second, unless the kick gives another rate.
    pub kicks_per_second: u32,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            connections_max: 100_000,
            handshakes_max: 1_024,
            handshakes_per_second: 10_000,
            handshakes_burst_seconds: 2,
            address_connections_max: 0,
            address_handshakes_max: 128,
            network_handshakes_max: 256,
            address_handshakes_per_second: 0,
            addresses_max: 100_000,
            address_refusals_max: 300,
            network_refusals_max: 1_200,
            block_seconds: 1,
            block_seconds_max: 600,
            user_connections_max: 16,
            attempt_ahead_ms: 10_000,
            app_connections_max: 0,
            app_new_users_per_second: 500,
            unidentified_max: 10_000,
            address_unidentified_max: 2_000,
            user_unidentified_max: 32,
            first_byte_timeout_ms: 2_000,
            handshake_timeout_ms: 5_000,
            handshake_keep_ms: 250,
            handshake_keep_tls_ms: 1_000,
            hello_timeout_min_ms: 2_000,
            hello_timeout_ms: 10_000,
            frame_bytes_max: 64 << 10,
            fragments_max: 256,
            upstream_frames_per_second: 1_000,
            upstream_bytes_per_second: 256 << 10,
            upstream_burst_seconds: 10,
            queued_bytes_max: 1 << 20,
            send_buffer_bytes: 64 << 10,
            node_queued_bytes_max: 512 << 20,
            metric_names_max: 32,
            subscriptions_max: 64,
            fanout_bytes_max: 1 << 20,
            node_fanout_bytes_max: 64 << 20,
            fanout_seconds: 5,
            memory_bytes_max: 0,
            unacked_max: 256,
            close_timeout_ms: 2_000,
            batches_max: 64,
            kicks_per_second: 1_000,
        }
    }
}

impl LimitsConfig {
    pub(crate) fn handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.handshake_timeout_ms)
    }

    pub(crate) fn first_byte_timeout(&self) -> Duration {
        Duration::from_millis(self.first_byte_timeout_ms)
    }

    pub(crate) fn hello_timeout_min(&self) -> Duration {
        Duration::from_millis(self.hello_timeout_min_ms)
    }

    pub(crate) fn hello_timeout(&self) -> Duration {
        Duration::from_millis(self.hello_timeout_ms)
    }

    pub(crate) fn close_timeout(&self) -> Duration {
        Duration::from_millis(self.close_timeout_ms)
    }

    fn check(&self, page_bytes_max: u32) -> Result<(), String> {
        let burst =
            u64::from(self.upstream_bytes_per_second).saturating_mul(self.upstream_burst_seconds);
        let whole = self.frame_bytes_max as u64 + FRAME_HEAD_BYTES_MAX;
        if burst != 0 && burst < whole {
            return Err(format!(
                "limits.frame_bytes_max must be at most upstream_bytes_per_second times \
                 upstream_burst_seconds, {burst}, less a frame's head of {FRAME_HEAD_BYTES_MAX}"
            ));
        }
        let (address, network) = (self.address_handshakes_max, self.network_handshakes_max);
        if network != 0 && address > network {
            return Err(format!(
                "limits.address_handshakes_max must be at most network_handshakes_max, {network}"
            ));
        }
        let (address, network) = (self.address_refusals_max, self.network_refusals_max);
        if network != 0 && address > network {
            return Err(format!(
                "limits.address_refusals_max must be at most network_refusals_max, {network}"
            ));
        }
        if self.block_seconds > self.block_seconds_max {
            return Err("limits.block_seconds must be at most block_seconds_max".into());
        }
        if self.queued_bytes_max < page_bytes_max as usize {
            return Err("limits.queued_bytes_max must be at least sync.page_bytes_max".into());
        }
        if self.node_fanout_bytes_max < self.fanout_bytes_max as u64 {
            return Err("limits.node_fanout_bytes_max must be at least fanout_bytes_max".into());
        }
        if self.node_queued_bytes_max < self.queued_bytes_max as u64 {
            return Err("limits.node_queued_bytes_max must be at least queued_bytes_max".into());
        }
        Ok(())
    }
}

/// Keys under `heartbeat`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeartbeatConfig {
    /// Silence in either direction after which a connection is pinged, s.
    pub interval_seconds: u16,
    /// Timeout of a ping, s; the connection is closed with 4003 after it.
    pub timeout_seconds: u16,
    /// Minimum interval that a device may ask for in its Hello, s.
    pub interval_min_seconds: u16,
    /// Maximum interval that a device may ask for in its Hello, s.
    pub interval_max_seconds: u16,
    /// Time without any frame but pongs after which a session is closed with 4003, s. 0: never.
    pub idle_seconds: u32,
}

impl HeartbeatConfig {
    fn check(&self) -> Result<(), String> {
        if self.interval_min_seconds > self.interval_max_seconds {
            return Err(
                "heartbeat.interval_min_seconds must be at most interval_max_seconds".into()
            );
        }
        let (idle, interval) = (self.idle_seconds, u32::from(self.interval_seconds));
        if idle != 0 && idle < interval {
            return Err("heartbeat.idle_seconds must be at least interval_seconds, or 0".into());
        }
        Ok(())
    }

    /// Heartbeat interval of a device that asked for `wanted_ms` (0 if it did not ask), seconds.
    pub(crate) fn interval(&self, wanted_ms: u32) -> u16 {
        if wanted_ms == 0 {
            return self.interval_seconds;
        }
        let wanted = u16::try_from(wanted_ms.div_ceil(1000)).unwrap_or(u16::MAX);
        wanted.clamp(self.interval_min_seconds, self.interval_max_seconds)
    }
}

impl Default for HeartbeatConfig {
    fn default() -> Self {
        Self {
            interval_seconds: 25,
            timeout_seconds: 10,
            interval_min_seconds: 5,
            interval_max_seconds: 600,
            idle_seconds: 0,
        }
    }
}

/// Keys under `balance`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalanceConfig {
    /// A node sheds sessions, down to the mean of its zone's nodes, once it has more than this many times the mean.
    /// Above 1; 0: never. Only for clients that ask `GET /v1/nodes` or sit behind a load balancer: others reconnect to
    /// the same node.
    pub shed_above: f64,
    /// Sessions above that threshold before shedding begins.
    pub shed_slack: u64,
    /// Maximum shed sessions per second.
    pub sheds_per_second: u32,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self { shed_above: 0.0, shed_slack: 1_000, sheds_per_second: 50 }
    }
}

/// Keys under `sync`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SyncConfig {
    /// Maximum entries of one mailbox read.
    pub page_entries_max: u32,
    /// Maximum bytes of one mailbox read.
    pub page_bytes_max: u32,
    /// Interval at which every session is confirmed, s.
    pub confirm_interval_seconds: u64,
    /// Maximum confirmed sessions per second after a lapsed lease or a new connection to Redis.
    pub confirms_per_second: u32,
    /// Minimum interval between a session's writes of acknowledgements to Redis, ms; they are cumulative. Devices are
    /// advised to use it as well. 0: each acknowledgement is written.
    pub ack_interval_ms: u32,
}

impl Default for SyncConfig {
    fn default() -> Self {
        Self {
            page_entries_max: 128,
            page_bytes_max: 256 << 10,
            confirm_interval_seconds: 600,
            confirms_per_second: 2_000,
            ack_interval_ms: 100,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self {
            admin: AdminConfig::local(7082),
            log: LogConfig::default(),
            drain_seconds: 30,
            ready_file: None,
            node: String::new(),
            zone: String::new(),
            listen: local(7080),
            acceptors: 1,
            grpc_listen: local(7081),
            advertise: String::new(),
            advertise_url: String::new(),
            lease_ttl_ms: 10_000,
            void_after_seconds: 600,
            grpc: GrpcConfig::default(),
            internal_tls: InternalTlsConfig::default(),
            redis: RedisConfig::default(),
            auth: AuthConfig::default(),
            tls: TlsConfig::default(),
            proxy: ProxyConfig::default(),
            limits: LimitsConfig::default(),
            heartbeat: HeartbeatConfig::default(),
            balance: BalanceConfig::default(),
            sync: SyncConfig::default(),
            receipts: true,
            revocations: true,
            kafka: KafkaConfig::default(),
        }
    }
}

barid_runtime::has_common!(Config);

impl Config {
    /// Checks numbers and texts, and each key against the others. Keys that name files, networks, and origins are
    /// checked by [`crate::policy::Policy::new`], which parses them.
    ///
    /// # Errors
    /// Returns the invalid keys, one a line, with what to write instead.
    pub fn check(&self) -> Result<(), String> {
        bounds::check(self)?;
        let ports = [
            ("listen", self.listen),
            ("grpc_listen", self.grpc_listen),
            ("admin.listen", self.admin.listen),
        ];
        bounds::all([
            self.lease().check("grpc_listen", self.grpc_listen),
            self.grpc.check("grpc_listen", self.grpc_listen, &self.internal_tls),
            bounds::check_apart(&ports),
            self.auth.check(),
            self.heartbeat.check(),
            self.check_advertise_url(),
            self.limits.check(self.sync.page_bytes_max),
            self.check_between_tables(),
            self.redis.check(),
            self.kafka.check(),
        ])
    }

    fn check_advertise_url(&self) -> Result<(), String> {
        let url = self.advertise_url.as_str();
        check_text("advertise_url", url)?;
        if url.is_empty() || is_url(url, &["ws", "wss"]) {
            return Ok(());
        }
        Err(format!(
            "advertise_url: {} is not a URL for devices; write wss://HOST[:PORT]/v1/connect, or ws://",
            shown(url)
        ))
    }

    /// Checks limits that limits of another table would override.
    fn check_between_tables(&self) -> Result<(), String> {
        let (devices, devices_max) = (self.limits.user_connections_max, self.redis.devices_max);
        if devices > devices_max {
            return Err(format!(
                "limits.user_connections_max must be at most redis.devices_max, {devices_max}: a \
                 mailbox refuses further devices"
            ));
        }
        // Routes expire as mailboxes do; a session whose route is gone is dark until it is confirmed.
        let (ttl, confirm) = (self.redis.ttl_seconds, self.sync.confirm_interval_seconds);
        if confirm > ttl / 4 {
            return Err(format!(
                "sync.confirm_interval_seconds ({confirm}) must be at most a quarter of \
                 redis.ttl_seconds ({ttl})"
            ));
        }
        let keep = self.redis.keep_after_loss_seconds;
        if (1..=confirm).contains(&keep) {
            return Err(format!(
                "redis.keep_after_loss_seconds ({keep}) must be above sync.confirm_interval_seconds \
                 ({confirm}), or 0: by then devices that are connected are known again"
            ));
        }
        Ok(())
    }

    /// The URL at which devices connect, given where the node listens for them; may be empty.
    pub(crate) fn devices_url(&self, bound: SocketAddr) -> String {
        match self.advertise_url.as_str() {
            "" if bound.ip().is_unspecified() => String::new(),
            "" if self.tls.certificate_file.is_some() => format!("wss://{bound}/v1/connect"),
            "" => format!("ws://{bound}/v1/connect"),
            url => url.to_owned(),
        }
    }

    pub(crate) fn lease(&self) -> LeaseConfig {
        LeaseConfig {
            node: self.node.clone(),
            advertise: self.advertise.clone(),
            zone: self.zone.clone(),
            ttl: Duration::from_millis(self.lease_ttl_ms),
            void_after: Duration::from_secs(self.void_after_seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_59_a_limit_that_another_one_would_overrule_is_told_with_it() {
        let error = |change: fn(&mut Config)| {
            let mut config = Config::default();
            config.auth.keys = vec![KeyConfig {
                secret: Secret::new("a secret of 32 bytes, or of more"),
                ..Default::default()
            }];
            assert_eq!(config.check(), Ok(()));
            change(&mut config);
            config.check().unwrap_err()
        };
        let told = error(|config| config.limits.user_connections_max = 17);
        assert!(
            told.starts_with("limits.user_connections_max must be at most redis.devices_max, 16")
        );
        let told = error(|config| config.redis.devices_max = 15);
        assert!(
            told.starts_with("limits.user_connections_max must be at most redis.devices_max, 15")
        );
        let told = error(|config| config.redis.ttl_seconds = 2_399);
        assert!(told.starts_with("sync.confirm_interval_seconds (600) must be at most a quarter"));
        let told = error(|config| config.limits.node_fanout_bytes_max = 1);
        assert_eq!(told, "limits.node_fanout_bytes_max must be at least fanout_bytes_max");
        let told = error(|config| config.limits.queued_bytes_max = 1);
        assert_eq!(told, "limits.queued_bytes_max must be at least sync.page_bytes_max");
        let told = error(|config| config.limits.node_queued_bytes_max = 1);
        assert_eq!(told, "limits.node_queued_bytes_max must be at least queued_bytes_max");
        let told = error(|config| config.limits.network_handshakes_max = 127);
        assert!(told.starts_with("limits.address_handshakes_max must be at most network_"));
        let told = error(|config| config.limits.network_refusals_max = 299);
        assert!(told.starts_with("limits.address_refusals_max must be at most network_"));
        let told = error(|config| config.limits.block_seconds = 601);
        assert_eq!(told, "limits.block_seconds must be at most block_seconds_max");
        let told = error(|config| config.limits.upstream_bytes_per_second = 1);
        assert!(
            told.starts_with("limits.frame_bytes_max must be at most upstream_bytes_per_second")
        );
        let told = error(|config| config.heartbeat.idle_seconds = 24);
        assert_eq!(told, "heartbeat.idle_seconds must be at least interval_seconds, or 0");
        let told = error(|config| config.heartbeat.interval_min_seconds = 601);
        assert!(told.starts_with("heartbeat.interval_min_seconds must be at most"));
        let told = error(|config| config.advertise_url = "wss://h/\0".into());
        assert!(told.starts_with("advertise_url contains '\\0'"), "{told}");
        let told = error(|config| config.lease_ttl_ms = 300_001);
        assert!(told.starts_with("lease_ttl_ms must be at most half of void_after_seconds"));
    }

    fn read(text: &str) -> Config {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), text).unwrap();
        barid_runtime::config::load(Some(path.path()), "BARID_ACCESS_", std::iter::empty())
            .unwrap()
            .config
    }

    #[test]
    fn hazard_112_what_start_or_devices_would_stumble_over_is_refused_by_key() {
        let told = |text: &str| {
            let keys = "[[auth.keys]]\nsecret = 'a secret of 32 bytes, or of more'\n";
            read(&format!("{text}\n{keys}")).check().map_or_else(|told| told, |()| String::new())
        };
        for good in ["wss://h", "ws://10.0.0.1:7080/v1/connect", "wss://[::1]:1/"] {
            assert_eq!(told(&format!("advertise_url = '{good}'")), "");
        }
        let secret = told("advertise_url = 'wss://me:hush@h/v1'");
        assert!(
            secret.starts_with("advertise_url: \"wss://me:***@h/v1\" is not a URL"),
            "{secret}"
        );
        for bad in ["ws://", "ws://h:99999/v1", "ws://h:0", "http://h", "h:1", "ws://a b/"] {
            let told = told(&format!("advertise_url = '{bad}'"));
            assert!(told.starts_with(&format!("advertise_url: {bad:?} is not a URL")), "{told}");
        }
        assert!(told("advertise = '0.0.0.0:7081'").contains("reaches nobody"));
        assert!(told("auth.audience = ['a', '']").starts_with("auth.audience[1] is empty"));
        let both = told("advertise = '[::]:1'\nadvertise_url = 'ws://'");
        assert_eq!(both.lines().count(), 2, "{both}");
        let key = |text: &str| read(&format!("[[auth.keys]]\n{text}")).check().unwrap_err();
        let told = key("algorithm = 'RS256'\nsecret = 'hunter2'");
        assert!(told.starts_with("auth.keys[0].secret has no effect with RS256"), "{told}");
        let told = key("public_key_file = '/a.pem'");
        assert!(told.starts_with("auth.keys[0].public_key_file has no effect with HS256"));
        let set = |url: &str| {
            read(&format!("[[auth.jwks]]\nurl = '{url}'"))
                .check()
                .map_or_else(|told| told, |()| String::new())
        };
        assert_eq!(set("https://me:hunter2@idp.example/keys?a=b"), "");
        for bad in ["https://", "https://h:99999/keys", "https://:1/"] {
            assert!(set(bad).starts_with("auth.jwks[0].url has no host"), "{bad}");
        }
        assert!(
            set("id.example.com/jwks").starts_with("auth.jwks[0].url has no scheme; write https")
        );
    }

    #[test]
    fn hazard_30_sessions_are_confirmed_well_before_their_routes_expire() {
        let secret = Secret::new("0123456789abcdef0123456789abcdef");
        let mut config = Config::default();
        config.auth.keys = vec![KeyConfig { secret, ..Default::default() }];
        config.redis.ttl_seconds = 4 * config.sync.confirm_interval_seconds - 1;
        let why = config.check().unwrap_err();
        assert!(why.contains("sync.confirm_interval_seconds") && why.contains("ttl"), "{why}");
        config.redis.ttl_seconds += 1;
        assert_eq!(config.check(), Ok(()));
        config.redis.keep_after_loss_seconds = config.sync.confirm_interval_seconds;
        let why = config.check().unwrap_err();
        assert!(why.starts_with("redis.keep_after_loss_seconds (600) must be above"), "{why}");
        config.redis.keep_after_loss_seconds = 0;
        assert_eq!(config.check(), Ok(()));
    }
}
