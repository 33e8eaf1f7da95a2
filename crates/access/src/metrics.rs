//! Every metric of an access node, as a closed set.

use std::time::Duration;

use barid_core::CloseCode;
use barid_runtime::{Hop, Hops};
use barid_wire::envelope::SkipReason;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::fanout::{Refused, Taken};
use crate::session::{Dropped, SyncCause};

const HANDSHAKES: [&str; 18] = [
    "accepted",
    "gone",
    "timeout",
    "overloaded",
    "limited",
    "forbidden",
    "proxy",
    "tls",
    "nodes",
    "not_found",
    "draining",
    "subprotocol",
    "bad_request",
    "unauthorized",
    "headers",
    "version",
    "method",
    "upgrade",
];
const TOKENS: [&str; 10] = [
    "missing",
    "malformed",
    "unknown_key",
    "signature",
    "expired",
    "too_early",
    "audience",
    "issuer",
    "other_app",
    "somebody_else",
];
const SKIPS: [&str; 7] =
    ["unspecified", "expired", "evicted", "other_device", "collapsed", "recalled", "acknowledged"];
const IGNORED: [&str; 3] = ["kind", "field", "mailbox"];
const FRAMES: [&str; 6] = ["hello", "ack", "refresh", "pong", "subscribe", "unsubscribe"];
const DROPS: [&str; 6] = ["known", "syncing", "window", "gap", "fork", "overflow"];
const CALLS: [&str; 5] = ["connect", "read", "ack", "confirm", "disconnect"];
const CONFIRMS: [&str; 3] = ["stood", "restored", "superseded"];
const LIMITS: [&str; 20] = [
    "attempt_ahead",
    "connections",
    "handshakes",
    "handshake_rate",
    "turned_away",
    "address_connections",
    "address_handshakes",
    "address_rate",
    "addresses",
    "user_connections",
    "app_connections",
    "frame_bytes",
    "upstream_frames",
    "upstream_bytes",
    "idle",
    "subscriptions",
    "memory",
    "memory_closed",
    "forgets",
    "close_timeout",
];

/// The hops that end here.
const HOPS: [Hop; 6] = [
    Hop::DispatchedWritten,
    Hop::WrittenAcked,
    Hop::ProducedWritten,
    Hop::ProducedAcked,
    Hop::FanoutDispatchedWritten,
    Hop::FanoutProducedWritten,
];

/// The node's metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Sockets that are open.
    pub connections: IntGauge,
    accepted: IntCounterVec,
    /// Client addresses that are remembered for their limits.
    pub addresses: IntGauge,
    /// Sessions whose device said Hello and was welcomed.
    pub sessions: IntGauge,
    /// Users in the registry, once a second.
    pub users: IntGauge,
    /// Sessions on the heartbeat wheel, once a second.
    pub wheel_entries: IntGauge,
    /// Bytes in RAM that each of them takes, all that the node took since it had none included.
    pub session_bytes: IntGauge,
    handshakes: IntCounterVec,
    tokens_refused: IntCounterVec,
    closes: IntCounterVec,
    /// Messages written from a dispatcher's push.
    pub delivered_fast: IntCounter,
    /// Messages written from a mailbox's page.
    pub delivered_sync: IntCounter,
    /// Messages written that were for a whole audience.
    pub delivered_fanout: IntCounter,
    fanouts: IntCounterVec,
    /// Groups that sessions are subscribed to.
    pub subscriptions: IntGauge,
    subscriptions_refused: IntCounter,
    /// Messages for an audience that a session did not keep up with.
    pub fanout_missed: IntCounter,
    /// Bytes of messages for audiences that are held for their members.
    pub fanout_held_bytes: IntGauge,
    fanout_seconds: Histogram,
    skips: IntCounterVec,
    frames_in: IntCounterVec,
    /// Bytes of frames written to devices, without WebSocket headers.
    pub bytes_out: IntCounter,
    syncs: IntCounterVec,
    dropped: IntCounterVec,
    /// Re-sends written.
    pub resends: IntCounter,
    /// Connections that dispatchers named and that are not here.
    pub gone: IntCounter,
    /// Bytes of pushes that wait for a device.
    pub queued_bytes: IntGauge,
    redis_retries: IntCounterVec,
    confirms: IntCounterVec,
    limits: IntCounterVec,
    ignored: IntCounterVec,
    certificates: IntCounterVec,
    /// Receipts that found no room on their way to Kafka.
    pub receipts_dropped: IntCounter,
    /// Devices that were told to go because there are fewer elsewhere.
    pub shed: IntCounter,
    /// Messages that devices acknowledged.
    pub acked: IntCounter,
    /// Where a message's time goes.
    pub hops: Hops,
}

impl Metrics {
    /// Registers them.
    ///
    /// # Errors
    /// One of them is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let make = Maker(registry);
        let closes = CloseCode::ALL.iter().map(|code| code.as_str());
        let closes: Vec<_> = closes.chain(["device"]).collect();
        let syncs = SyncCause::ALL.map(SyncCause::as_str);
        let delivered = make.counters(
            "delivered_total",
            "Messages written, by path",
            "path",
            &["fast", "sync", "fanout"],
        )?;
        Ok(Self {
            connections: make.gauge("connections", "Open sockets")?,
            accepted: make.counters(
                "accepted_total",
                "Sockets accepted, by accept loop",
                "acceptor",
                &[],
            )?,
            addresses: make.gauge("addresses", "Client addresses remembered for their limits")?,
            sessions: make.gauge("sessions", "Welcomed sessions")?,
            users: make.gauge("users", "Users with a session, welcomed or about to be")?,
            wheel_entries: make.gauge("wheel_entries", "Sessions on the heartbeat wheel")?,
            session_bytes: make.gauge(
                "session_bytes",
                "Resident memory beyond that of the node without sessions, by session",
            )?,
            handshakes: make.counters(
                "handshakes_total",
                "Handshakes, by result",
                "result",
                &HANDSHAKES,
            )?,
            tokens_refused: make.counters(
                "tokens_refused_total",
                "Tokens refused in handshakes and refreshes, by reason",
                "why",
                &TOKENS,
            )?,
            closes: make.counters(
                "closes_total",
                "Closed connections, by code",
                "code",
                &closes,
            )?,
            delivered_fast: delivered.with_label_values(&["fast"]),
            delivered_sync: delivered.with_label_values(&["sync"]),
            delivered_fanout: delivered.with_label_values(&["fanout"]),
            fanouts: make.counters(
                "fanouts_total",
                "Messages for an audience, by result",
                "result",
                &Taken::ALL.map(Taken::as_str),
            )?,
            subscriptions: make.gauge("subscriptions", "Groups that sessions are subscribed to")?,
            subscriptions_refused: make.counter(
                "subscriptions_refused_total",
                "Subscriptions to groups that the token does not list",
            )?,
            fanout_missed: make.counter("fanout_missed_total", "Messages that members missed")?,
            fanout_held_bytes: make.gauge("fanout_held_bytes", "Bytes held for audiences")?,
            fanout_seconds: make.histogram(
                "fanout_seconds",
                "From a message's arrival until all members were told",
                prometheus::exponential_buckets(0.0001, 2.0, 16)?,
            )?,
            skips: make.counters("skips_total", "Skips told, by reason", "why", &SKIPS)?,
            frames_in: make.counters(
                "frames_in_total",
                "Frames of devices, by kind",
                "kind",
                &FRAMES,
            )?,
            ignored: make.counters(
                "ignored_total",
                "What devices said and this version does not know",
                "what",
                &IGNORED,
            )?,
            bytes_out: make.counter("bytes_out_total", "Bytes of frames to devices")?,
            syncs: make.counters("syncs_total", "Reads of mailboxes, by cause", "cause", &syncs)?,
            dropped: make.counters(
                "pushes_dropped_total",
                "Pushes not written, by reason",
                "why",
                &DROPS,
            )?,
            resends: make.counter("resends_total", "Re-sends written")?,
            gone: make.counter("gone_total", "Connections asked for that are not here")?,
            queued_bytes: make.gauge("queued_bytes", "Bytes that wait for devices")?,
            redis_retries: make.counters(
                "redis_retries_total",
                "Failed calls, by call",
                "call",
                &CALLS,
            )?,
            confirms: make.counters(
                "confirms_total",
                "Confirmations, by outcome",
                "outcome",
                &CONFIRMS,
            )?,
            limits: make.counters("limits_total", "Limits reached, by limit", "limit", &LIMITS)?,
            certificates: make.counters(
                "certificate_reads_total",
                "Times the certificate was read again, by outcome",
                "outcome",
                &["read", "failed"],
            )?,
            receipts_dropped: make.counter("receipts_dropped_total", "Receipts without room")?,
            shed: make.counter("shed_total", "Devices told to go where there are fewer")?,
            acked: make.counter("acked_total", "Messages acknowledged")?,
            hops: Hops::new(registry, &HOPS)?,
        })
    }

    /// Sockets that an accept loop took. A node has at most 64 of them.
    pub fn acceptor(&self, number: usize) -> IntCounter {
        self.accepted.with_label_values(&[&number.to_string()])
    }

    /// A limit was reached, one of those in docs/limits.md.
    pub fn limit(&self, limit: &'static str) {
        self.limits.with_label_values(&[limit]).inc();
    }

    /// The certificate's files were read again.
    pub fn certificate_read(&self, outcome: &'static str) {
        self.certificates.with_label_values(&[outcome]).inc();
    }

    /// A handshake ended.
    pub fn handshake(&self, result: &'static str) {
        self.handshakes.with_label_values(&[result]).inc();
    }

    /// A token was refused, in a handshake or in a Refresh.
    pub fn token_refused(&self, why: &'static str) {
        self.tokens_refused.with_label_values(&[why]).inc();
    }

    /// A connection was closed; `None`: by the device.
    pub fn close(&self, code: Option<CloseCode>) {
        self.closes.with_label_values(&[code.map_or("device", CloseCode::as_str)]).inc();
    }

    /// A message for an audience came.
    pub fn fanout(&self, taken: Taken) {
        self.fanouts.with_label_values(&[taken.as_str()]).inc();
    }

    /// All members of an audience were told, so long after its message came.
    pub fn fanout_told(&self, took: Duration) {
        self.fanout_seconds.observe(took.as_secs_f64());
    }

    /// A session may not subscribe to a group.
    pub fn subscription_refused(&self, why: Refused) {
        match why {
            Refused::NotListed => self.subscriptions_refused.inc(),
            Refused::TooMany => self.limit("subscriptions"),
        }
    }

    /// A skip was told.
    pub fn skip(&self, why: SkipReason) {
        let why = match why {
            SkipReason::Unspecified => "unspecified",
            SkipReason::Expired => "expired",
            SkipReason::Evicted => "evicted",
            SkipReason::OtherDevice => "other_device",
            SkipReason::Collapsed => "collapsed",
            SkipReason::Recalled => "recalled",
            SkipReason::Acknowledged => "acknowledged",
        };
        self.skips.with_label_values(&[why]).inc();
    }

    /// A device sent a frame.
    pub fn frame_in(&self, kind: &'static str) {
        self.frames_in.with_label_values(&[kind]).inc();
    }

    /// A device said what this version does not know.
    pub fn ignored(&self, what: &'static str) {
        self.ignored.with_label_values(&[what]).inc();
    }

    /// A mailbox is read.
    pub fn sync(&self, cause: SyncCause) {
        self.syncs.with_label_values(&[cause.as_str()]).inc();
    }

    /// A push was not written.
    pub fn dropped(&self, why: Dropped) {
        let why = match why {
            Dropped::Known => "known",
            Dropped::Syncing => "syncing",
            Dropped::Window => "window",
            Dropped::Gap => "gap",
            Dropped::Fork => "fork",
        };
        self.dropped.with_label_values(&[why]).inc();
    }

    /// A push found the session's queue full.
    pub fn overflow(&self) {
        self.dropped.with_label_values(&["overflow"]).inc();
    }

    /// A call to Redis failed and is made again.
    pub fn redis_retry(&self, call: &'static str) {
        self.redis_retries.with_label_values(&[call]).inc();
    }

    /// A confirmation was answered.
    pub fn confirm(&self, outcome: &'static str) {
        self.confirms.with_label_values(&[outcome]).inc();
    }
}

struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        let counter = IntCounter::new(format!("barid_access_{name}"), help)?;
        self.0.register(Box::new(counter.clone()))?;
        Ok(counter)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        let options = Opts::new(format!("barid_access_{name}"), help);
        let counters = IntCounterVec::new(options, &[label])?;
        // All of them are there from the start, as zeros.
        values.iter().for_each(|value| drop(counters.with_label_values(&[value])));
        self.0.register(Box::new(counters.clone()))?;
        Ok(counters)
    }

    fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: Vec<f64>,
    ) -> Result<Histogram, prometheus::Error> {
        let options = HistogramOpts::new(format!("barid_access_{name}"), help).buckets(buckets);
        let histogram = Histogram::with_opts(options)?;
        self.0.register(Box::new(histogram.clone()))?;
        Ok(histogram)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        let gauge = IntGauge::new(format!("barid_access_{name}"), help)?;
        self.0.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }
}
