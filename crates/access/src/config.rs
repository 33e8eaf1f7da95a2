//! Configuration of an access node.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use barid_bus::KafkaConfig;
use barid_core::Secret;
use barid_core::limits::GROUPS_MAX;
use barid_mailbox::{LeaseConfig, RedisConfig, check_text};
use barid_runtime::bounds::{
    self, Bound, Bounded, DAY_SECONDS, HOUR_MS, TEBIBYTE, real, whole, within,
};
use barid_runtime::{AdminConfig, LogConfig};
use barid_wire::frames::BODY_BYTES_MAX;
use serde::{Deserialize, Serialize};

/// Accept loops: `acceptors` keeps a bit for each.
pub(crate) const ACCEPTORS_MAX: u32 = u64::BITS;
/// A burst of minutes is no limit.
const BURST_SECONDS_MAX: u64 = 600;
/// Connections, of a node or a part of it: a node's sockets and their memory end before.
const CONNECTIONS_MAX: u64 = 10_000_000;
/// Waits for a device, ms.
const WAIT_MS_MAX: u64 = HOUR_MS / 6;
/// A queue of messages in memory.
const QUEUE_BYTES_MAX: u64 = 4 << 30;

impl Bounded for JwksConfig {
    fn bounds() -> Vec<Bound> {
        vec![
            whole("refresh_seconds", 1..=7 * DAY_SECONDS, "s"),
            whole("refresh_min_seconds", 0..=DAY_SECONDS, "s"),
            whole("timeout_ms", 1..=60_000, "ms"),
        ]
    }
}

impl Bounded for AuthConfig {
    fn bounds() -> Vec<Bound> {
        let own = vec![whole("nbf_leeway_seconds", 0..=DAY_SECONDS, "s")];
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
            a_second("address_handshakes_per_second").or_zero("no limit"),
            connections("addresses_max"),
            whole("user_connections_max", 1..=10_000, "").or_zero("no limit"),
            connections("app_connections_max").or_zero("no limit"),
            whole("handshake_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("hello_timeout_ms", 1..=WAIT_MS_MAX, "ms"),
            whole("attempt_ahead_ms", 0..=DAY_SECONDS * 1000, "ms"),
            // Room for a Hello, or a token.
            whole("frame_bytes_max", 1024..=BODY_BYTES_MAX.into(), "bytes"),
            whole("upstream_frames_per_second", 1..=1_000_000, "a second").or_zero("no limit"),
            whole("upstream_bytes_per_second", 1..=1 << 30, "bytes a second").or_zero("no limit"),
            whole("upstream_burst_seconds", 1..=BURST_SECONDS_MAX, "s"),
            whole("queued_bytes_max", 1..=QUEUE_BYTES_MAX, "bytes"),
            // The kernel takes half an i32, and doubles it.
            whole("send_buffer_bytes", 1..=1 << 30, "bytes").or_zero("as the system has it"),
            whole("node_queued_bytes_max", 1..=TEBIBYTE, "bytes"),
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

/// The whole configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Metrics and health.
    pub admin: AdminConfig,
    /// Logs.
    pub log: LogConfig,
    /// How long draining may take; GoAways are spread over it.
    pub drain_seconds: u64,
    /// Where the bound addresses are written as JSON.
    pub ready_file: Option<PathBuf>,
    /// The node's name, unique in the cluster; empty: made from the address in its lease.
    pub node: String,
    /// Where the node stands, for people and placement; may be empty.
    pub zone: String,
    /// Where devices connect (`/v1/connect`).
    pub listen: SocketAddr,
    /// Accept loops on `listen`, 1 to 64. With more than one each has a listener of its own (SO_REUSEPORT),
    /// and the kernel spreads connections over them by a hash of the addresses.
    pub acceptors: u32,
    /// Where dispatchers connect. Not for devices: it asks for no credentials.
    pub grpc_listen: SocketAddr,
    /// `host:port` at which dispatchers reach `grpc_listen`; empty: the bound address.
    pub advertise: String,
    /// The URL at which devices reach `listen`, `wss://HOST/v1/connect`, told by `GET /v1/nodes`; empty:
    /// `ws://` and the bound address, or nothing if that names none.
    pub advertise_url: String,
    /// How long the node's lease holds without renewal, ms.
    pub lease_ttl_ms: u64,
    /// How long dispatchers keep the routes of a node whose lease ended, as their `void_after_seconds`
    /// says. A node that could not renew its lease for longer than half of it begins another life.
    pub void_after_seconds: u64,
    /// Redis.
    pub redis: RedisConfig,
    /// Who may connect.
    pub auth: AuthConfig,
    /// TLS on `listen`.
    pub tls: TlsConfig,
    /// Balancers between the devices and this node.
    pub proxy: ProxyConfig,
    /// Bounds.
    pub limits: LimitsConfig,
    /// Pings.
    pub heartbeat: HeartbeatConfig,
    /// Letting devices go to other nodes.
    pub balance: BalanceConfig,
    /// Reading and confirming.
    pub sync: SyncConfig,
    /// Whether receipts are produced for messages that ask for them.
    pub receipts: bool,
    /// Kafka, for receipts.
    pub kafka: KafkaConfig,
}

/// Keys under `auth`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Keys by hand. Several may be good at once: that is how they are rotated.
    pub keys: Vec<KeyConfig>,
    /// Key sets.
    pub jwks: Vec<JwksConfig>,
    /// If not empty: `aud` must be one of these.
    pub audience: Vec<String>,
    /// If not empty: `iss` must be one of these.
    pub issuer: Vec<String>,
    /// How far ahead `nbf` may lie for clocks that differ, seconds. `exp` is taken at its word.
    pub nbf_leeway_seconds: u64,
    /// The web pages that may connect, as browsers name them in `Origin`: `https://app.example.com`,
    /// `https://*.example.com`, `null`. Empty: all. Clients that are no browsers send none.
    pub origins: Vec<String>,
}

/// One key under `auth.keys`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyConfig {
    /// Its `kid`; empty: tried for every token of its algorithm.
    pub id: String,
    /// The only algorithm that it is good for.
    pub algorithm: KeyAlgorithmName,
    /// HS256: the secret, at least 32 bytes.
    pub secret: Secret,
    /// HS256: a file that holds the secret.
    pub secret_file: Option<PathBuf>,
    /// The others: a public key in PEM.
    pub public_key_file: Option<PathBuf>,
    /// The apps that it speaks for; empty: all.
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
    /// A file that holds it.
    pub file: Option<PathBuf>,
    /// Or a URL.
    pub url: String,
    /// `https`: the only authorities that are trusted, PEM, one or several; Mozilla's public ones if not
    /// given. Read when the node starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The apps that its keys speak for; empty: all.
    pub apps: Vec<String>,
    /// Read again after so many seconds.
    pub refresh_seconds: u64,
    /// A token with an unknown key id has it read again, but not sooner than so many seconds after
    /// the last time.
    pub refresh_min_seconds: u64,
    /// How long a URL may take, ms.
    pub timeout_ms: u64,
}

impl Default for JwksConfig {
    fn default() -> Self {
        Self {
            file: None,
            url: String::new(),
            ca_file: None,
            apps: Vec::new(),
            refresh_seconds: 300,
            refresh_min_seconds: 10,
            timeout_ms: 5_000,
        }
    }
}

/// Keys under `tls`. Without files the port is plain, and TLS ends before it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// The certificate and those that it was issued by, PEM. Read again when it changes, and at SIGHUP.
    pub certificate_file: Option<PathBuf>,
    /// Its private key, PEM.
    pub key_file: Option<PathBuf>,
}

/// Keys under `proxy`: how clients' addresses are learnt where balancers stand before the node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// Their networks, `10.0.0.0/8`, or addresses. Nobody else is believed.
    pub trusted: Vec<String>,
    /// Every connection of theirs begins with a header of the PROXY protocol (version 1 or 2).
    pub protocol: bool,
    /// Their requests say in `X-Forwarded-For` who the client is.
    pub forwarded_for: bool,
}

/// Keys under `limits`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Connections at once.
    pub connections_max: usize,
    /// Handshakes at once; further ones get 503. As many may be told so at once; those beyond are hung
    /// up on.
    pub handshakes_max: usize,
    /// Handshakes a second; further ones get 503. 0: no limit, as for all limits below where it is allowed.
    pub handshakes_per_second: u32,
    /// Handshakes that may come at once, of the node and of an address: as many as in so many seconds.
    pub handshakes_burst_seconds: u64,
    /// Connections of one client address (IPv6: of a /64) at once; further ones get 429. May be 0.
    pub address_connections_max: u32,
    /// Handshakes of one client address at once; further ones get 429. May be 0.
    pub address_handshakes_max: u32,
    /// Handshakes of one client address a second; further ones get 429. May be 0.
    pub address_handshakes_per_second: u32,
    /// Client addresses that are remembered for these limits; those beyond are not limited.
    pub addresses_max: usize,
    /// Devices of one user connected to this node at once; a further one is closed with 4504. May be 0, and
    /// is at most `redis.devices_max`, which bounds those of all nodes.
    pub user_connections_max: u32,
    /// A Hello's attempt is believed up to so many milliseconds ahead of the clock of the user's mailbox;
    /// the moment of the handshake takes the place of one beyond.
    pub attempt_ahead_ms: u64,
    /// Connections of one app to this node at once; further ones get 429. May be 0.
    pub app_connections_max: u32,
    /// How long a handshake may take, ms.
    pub handshake_timeout_ms: u64,
    /// How long a device may take to say Hello, and the mailbox to answer it, ms each.
    pub hello_timeout_ms: u64,
    /// Bytes of a frame from a device.
    pub frame_bytes_max: usize,
    /// Frames of one device a second, pings and pongs included; one that sends more is closed with
    /// 4504. May be 0.
    pub upstream_frames_per_second: u32,
    /// Bytes of frames of one device a second; one that sends more is closed with 4504. May be 0.
    pub upstream_bytes_per_second: u32,
    /// What one device may send at once: as much as in so many seconds.
    pub upstream_burst_seconds: u64,
    /// Bytes of pushes that may wait for one device; beyond them it is closed with 4002.
    pub queued_bytes_max: usize,
    /// Bytes that the kernel may hold for one device that does not take them, beside `queued_bytes_max`: its
    /// send buffer, which would else grow to what `net.ipv4.tcp_wmem` allows (the kernel takes twice as much
    /// for its own bookkeeping). 0: as the system has it.
    pub send_buffer_bytes: u32,
    /// Bytes of pushes that may wait for all devices together; beyond them new handshakes get 503, and
    /// the largest queues are closed with 4002.
    pub node_queued_bytes_max: u64,
    /// Groups that one session may be subscribed to; a further one is refused with 4504. At most 254.
    pub subscriptions_max: usize,
    /// Bytes of messages that are held for the members of an audience (everyone of an app, or a group) who
    /// have not read them yet; beyond them the oldest is dropped.
    pub fanout_bytes_max: usize,
    /// The same for all audiences together; beyond them new messages are dropped.
    pub node_fanout_bytes_max: u64,
    /// How long they are held, seconds.
    pub fanout_seconds: u32,
    /// Resident memory of the process, bytes; beyond it the same happens. 0: 80 % of what its cgroup may
    /// have, if that is limited.
    pub memory_bytes_max: u64,
    /// Messages in flight to one device without an acknowledgement.
    pub unacked_max: usize,
    /// How long a closing connection may take to take its last frames, ms.
    pub close_timeout_ms: u64,
    /// Batches of one dispatcher that may be unanswered.
    pub batches_max: usize,
    /// Sessions that are kicked a second, unless the order says otherwise.
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
            address_handshakes_max: 512,
            address_handshakes_per_second: 0,
            addresses_max: 100_000,
            user_connections_max: 16,
            attempt_ahead_ms: 10_000,
            app_connections_max: 0,
            handshake_timeout_ms: 5_000,
            hello_timeout_ms: 10_000,
            frame_bytes_max: 64 << 10,
            upstream_frames_per_second: 1_000,
            upstream_bytes_per_second: 256 << 10,
            upstream_burst_seconds: 10,
            queued_bytes_max: 1 << 20,
            send_buffer_bytes: 64 << 10,
            node_queued_bytes_max: 512 << 20,
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
    fn check(&self, page_bytes_max: u32) -> Result<(), String> {
        let burst =
            u64::from(self.upstream_bytes_per_second).saturating_mul(self.upstream_burst_seconds);
        if burst != 0 && burst < self.frame_bytes_max as u64 {
            return Err(format!(
                "limits.frame_bytes_max must be at most upstream_bytes_per_second times \
                 upstream_burst_seconds, {burst}"
            ));
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
    /// A connection with a silent direction is pinged after so many seconds.
    pub interval_seconds: u16,
    /// And closed with 4003 if nothing came so many seconds after the ping.
    pub timeout_seconds: u16,
    /// A device may ask for another interval in its Hello, from this one
    pub interval_min_seconds: u16,
    /// to this one.
    pub interval_max_seconds: u16,
    /// A session whose device sent nothing but pongs for so many seconds is closed with 4003. 0: never.
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

    /// What a device gets that asked for this, seconds; 0: it did not ask.
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
    /// A node with more sessions than so many times the mean of its zone's nodes lets devices go until it
    /// is at the mean. Above 1; 0: never. For clients that ask `GET /v1/nodes`, or whose balancer spreads
    /// them: others come back to where they were.
    pub shed_above: f64,
    /// And with so many more than that.
    pub shed_slack: u64,
    /// So many a second.
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
    /// Entries read at once.
    pub page_entries_max: u32,
    /// Bytes read at once.
    pub page_bytes_max: u32,
    /// Every session is confirmed once in so many seconds.
    pub confirm_interval_seconds: u64,
    /// After a lapsed lease or a new connection to Redis: so many sessions a second.
    pub confirms_per_second: u32,
    /// A session writes acknowledgements to Redis at once, but not sooner than so many ms after its
    /// last one: they are cumulative. Devices are advised to keep to it as well. 0: every one.
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
            redis: RedisConfig::default(),
            auth: AuthConfig::default(),
            tls: TlsConfig::default(),
            proxy: ProxyConfig::default(),
            limits: LimitsConfig::default(),
            heartbeat: HeartbeatConfig::default(),
            balance: BalanceConfig::default(),
            sync: SyncConfig::default(),
            receipts: true,
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
    /// The first key that does not fit, with what to write instead.
    pub fn check(&self) -> Result<(), String> {
        bounds::check(self)?;
        self.lease().check("grpc_listen", self.grpc_listen)?;
        let ports = [
            ("listen", self.listen),
            ("grpc_listen", self.grpc_listen),
            ("admin.listen", self.admin.listen),
        ];
        bounds::check_apart(&ports)?;
        if self.auth.keys.is_empty() && self.auth.jwks.is_empty() {
            return Err(
                "auth: no device can connect without an entry in auth.keys or auth.jwks".into()
            );
        }
        self.heartbeat.check()?;
        let url = &self.advertise_url;
        if !(url.is_empty() || url.starts_with("ws://") || url.starts_with("wss://")) {
            return Err("advertise_url must begin with wss:// or ws://".into());
        }
        check_text("advertise_url", url)?;
        self.limits.check(self.sync.page_bytes_max)?;
        self.check_between_tables()?;
        self.redis.check()?;
        self.kafka.check()
    }

    /// Numbers of one table that a number of another would overrule.
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
        match self.auth.jwks.iter().find(|set| set.refresh_min_seconds > set.refresh_seconds) {
            Some(_) => {
                Err("auth.jwks.refresh_min_seconds must be at most its refresh_seconds".into())
            }
            None => Ok(()),
        }
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
