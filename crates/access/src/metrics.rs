//! All metrics of an access node.

use std::sync::Arc;
use std::time::Duration;

use barid_core::{AppId, CloseCode};
use barid_runtime::{Hop, Hops, MetricSet};
use barid_session::{Dropped, Seconds, SyncCause};
use barid_wire::envelope::SkipReason;
use prometheus::{
    Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
};

use crate::labels::{
    Call, CertificateRead, Confirmation, FanoutResult, Frame, Handshake, Limit, PageResult,
    PushDrop, RevokedAt, RevokedBy, TokenRefusal, Unknown,
};
use crate::names::{Name, Names};

const SKIPS: [SkipReason; 7] = [
    SkipReason::Unspecified,
    SkipReason::Expired,
    SkipReason::Evicted,
    SkipReason::OtherDevice,
    SkipReason::Collapsed,
    SkipReason::Recalled,
    SkipReason::Acknowledged,
];

/// Buckets of how long sessions last, s.
const SESSION_SECONDS: [f64; 8] = [1.0, 10.0, 60.0, 600.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0];

/// The hops that an access node measures.
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
    /// Open sockets.
    pub connections: IntGauge,
    accepted: IntCounterVec,
    /// Client addresses in the table of address limits.
    pub addresses: IntGauge,
    /// Client addresses that are blocked, updated once a second.
    pub blocked_addresses: IntGauge,
    /// Connections without Hello, updated once a second.
    pub unidentified: IntGauge,
    /// Sessions that were sent Welcome.
    pub sessions: IntGauge,
    /// Users in the registry, updated once a second.
    pub users: IntGauge,
    /// Sessions on the heartbeat wheel, updated once a second.
    pub wheel_entries: IntGauge,
    /// Resident bytes per session, beyond the node's resident memory without sessions.
    pub session_bytes: IntGauge,
    handshakes: IntCounterVec,
    tokens_refused: IntCounterVec,
    /// Time since the least recently read key set was read, s.
    pub key_set_age: IntGauge,
    closes: IntCounterVec,
    session_seconds: HistogramVec,
    platforms: Arc<Names>,
    sdks: Arc<Names>,
    apps: Arc<Names>,
    /// Messages written from a dispatcher's push.
    pub delivered_fast: IntCounter,
    /// Messages written from a mailbox's page.
    pub delivered_sync: IntCounter,
    /// Messages written that were for an audience.
    pub delivered_fanout: IntCounter,
    fanouts: IntCounterVec,
    /// Subscriptions of sessions to groups.
    pub subscriptions: IntGauge,
    /// Readings of audiences' mailboxes.
    pub audience_reads: IntCounter,
    audience_pages: IntCounterVec,
    /// Audiences for which the node is, or is to be, listed in Redis.
    pub audiences: IntGauge,
    subscriptions_refused: IntCounter,
    /// Messages for an audience that left its log before a session had read them.
    pub fanout_missed: IntCounter,
    pub fanout_behind: IntCounter,
    /// Bytes in the logs of audiences.
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
    /// Connections that dispatchers named and that are not on this node.
    pub gone: IntCounter,
    /// Bytes of pushes that are queued for devices.
    pub queued_bytes: IntGauge,
    redis_retries: IntCounterVec,
    confirms: IntCounterVec,
    limits: IntCounterVec,
    ignored: IntCounterVec,
    certificates: IntCounterVec,
    /// When the certificate of the devices' port expires, s since the Unix epoch; 0: no TLS there.
    pub certificate_expires: IntGauge,
    /// Receipts dropped because the producer's queue was full.
    pub receipts_dropped: IntCounter,
    revocations: IntGaugeVec,
    /// 1 while revocations are read as they are made; 0: Kafka is away, or has not been read yet.
    pub revocations_current: IntGauge,
    /// Malformed records of the topic of revocations.
    pub revocations_malformed: IntCounter,
    /// Revocations that were evicted because there are too many.
    pub revocations_evicted: IntCounter,
    revoked: IntCounterVec,
    /// Devices sent to another node by shedding.
    pub shed: IntCounter,
    /// Messages that devices acknowledged.
    pub acked: IntCounter,
    /// Latencies of the hops.
    pub hops: Hops,
}

/// Where a session is counted.
#[derive(Debug)]
pub struct Counted {
    app: Name,
    platform: Name,
    sdk: Name,
    /// Bytes to devices of its app.
    pub bytes: Option<IntCounter>,
}

impl Metrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    /// A metric of the same name is registered already.
    pub fn new(registry: &Registry, names_max: usize) -> Result<Self, prometheus::Error> {
        let set = MetricSet::new(registry, "barid_access");
        let closes = CloseCode::ALL.iter().map(|code| code.as_str());
        let closes: Vec<_> = closes.chain(["device"]).collect();
        let syncs = SyncCause::ALL.map(SyncCause::as_str);
        let delivered = set.counters(
            "delivered_total",
            "Messages written, by path",
            "path",
            &["fast", "sync", "fanout"],
        )?;
        Ok(Self {
            connections: set.gauge("connections", "Open sockets")?,
            accepted: set.counters(
                "accepted_total",
                "Sockets accepted, by accept loop",
                "acceptor",
                &[],
            )?,
            addresses: set.gauge("addresses", "Client addresses in the table of address limits")?,
            blocked_addresses: set
                .gauge("blocked_addresses", "Client addresses and IPv6 /48s that are blocked")?,
            unidentified: set.gauge("unidentified", "Connections without Hello")?,
            sessions: set.gauge("sessions", "Welcomed sessions")?,
            users: set.gauge("users", "Users with a session, welcomed or about to be")?,
            wheel_entries: set.gauge("wheel_entries", "Sessions on the heartbeat wheel")?,
            session_bytes: set.gauge(
                "session_bytes",
                "Resident bytes per session, beyond the node without sessions",
            )?,
            handshakes: set.counters(
                "handshakes_total",
                "Handshakes, by result",
                "result",
                Handshake::VALUES,
            )?,
            tokens_refused: set.counters(
                "tokens_refused_total",
                "Tokens refused in handshakes and refreshes, by reason",
                "why",
                TokenRefusal::VALUES,
            )?,
            key_set_age: set.gauge(
                "key_set_age_seconds",
                "Time since the least recently read key set was read",
            )?,
            closes: set.counters("closes_total", "Closed connections, by code", "code", &closes)?,
            session_seconds: set.histograms(
                "session_seconds",
                "Time from Welcome to the end of a session, by close code",
                "code",
                &closes,
                SESSION_SECONDS,
            )?,
            platforms: Arc::new(Names::new(
                set.gauges("platform_sessions", "Welcomed sessions, by platform", "platform")?,
                None,
                names_max,
            )),
            sdks: Arc::new(Names::new(
                set.gauges("sdk_sessions", "Welcomed sessions, by SDK and its version", "sdk")?,
                None,
                names_max,
            )),
            apps: Arc::new(Names::new(
                set.gauges("app_sessions", "Welcomed sessions, by app", "app")?,
                Some(set.counters(
                    "app_bytes_out_total",
                    "Bytes of frames to welcomed devices, by app",
                    "app",
                    &[],
                )?),
                names_max,
            )),
            delivered_fast: delivered.with_label_values(&["fast"]),
            delivered_sync: delivered.with_label_values(&["sync"]),
            delivered_fanout: delivered.with_label_values(&["fanout"]),
            fanouts: set.counters(
                "fanouts_total",
                "Messages for an audience, by result",
                "result",
                FanoutResult::VALUES,
            )?,
            subscriptions: set.gauge("subscriptions", "Groups that sessions are subscribed to")?,
            audience_reads: set
                .counter("audience_reads_total", "Readings of mailboxes of groups and everyone")?,
            audience_pages: set.counters(
                "audience_pages_total",
                "Pages of mailboxes of groups and everyone, for devices that catch up",
                "result",
                PageResult::VALUES,
            )?,
            audiences: set
                .gauge("audiences", "Groups and apps with sessions here, as listed in Redis")?,
            subscriptions_refused: set.counter(
                "subscriptions_refused_total",
                "Subscriptions to groups that the token does not list",
            )?,
            fanout_missed: set.counter(
                "fanout_missed_total",
                "Messages that left an audience's log before a member read them",
            )?,
            fanout_behind: set.counter(
                "fanout_behind_total",
                "Times that an audience's log left a session behind, which then read the mailbox",
            )?,
            fanout_held_bytes: set.gauge("fanout_held_bytes", "Bytes in the logs of audiences")?,
            fanout_seconds: set.histogram(
                "fanout_seconds",
                "Time from a message's arrival until all members were woken",
                prometheus::exponential_buckets(0.0001, 2.0, 16)?,
            )?,
            skips: set.counters(
                "skips_total",
                "Skip frames sent, by reason",
                "why",
                &SKIPS.map(skip_label),
            )?,
            frames_in: set.counters(
                "frames_in_total",
                "Frames of devices, by kind",
                "kind",
                Frame::VALUES,
            )?,
            ignored: set.counters(
                "ignored_total",
                "Unknown kinds, fields and mailboxes in devices' frames",
                "what",
                Unknown::VALUES,
            )?,
            bytes_out: set.counter("bytes_out_total", "Bytes of frames to devices")?,
            syncs: set.counters("syncs_total", "Reads of mailboxes, by cause", "cause", &syncs)?,
            dropped: set.counters(
                "pushes_dropped_total",
                "Pushes not written, by reason",
                "why",
                PushDrop::VALUES,
            )?,
            resends: set.counter("resends_total", "Re-sends written")?,
            gone: set.counter(
                "gone_total",
                "Connections that dispatchers named and this node does not have",
            )?,
            queued_bytes: set.gauge("queued_bytes", "Bytes queued for devices")?,
            redis_retries: set.counters(
                "redis_retries_total",
                "Failed calls to Redis that are repeated, by call",
                "call",
                Call::VALUES,
            )?,
            confirms: set.counters(
                "confirms_total",
                "Confirmations, by outcome",
                "outcome",
                Confirmation::VALUES,
            )?,
            limits: set.counters(
                "limits_total",
                "Limits reached, by limit",
                "limit",
                Limit::VALUES,
            )?,
            certificate_expires: set.gauge(
                "certificate_expires_timestamp_seconds",
                "When the certificate of the devices' port expires",
            )?,
            certificates: set.counters(
                "certificate_reads_total",
                "Reloads of the certificate, by outcome",
                "outcome",
                CertificateRead::VALUES,
            )?,
            receipts_dropped: set.counter(
                "receipts_dropped_total",
                "Receipts dropped because the producer's queue was full",
            )?,
            revocations: {
                let gauges =
                    set.gauges("revocations", "Revocations in force, by what they revoke", "kind")?;
                RevokedBy::VALUES.iter().for_each(|kind| gauges.with_label_values(&[kind]).set(0));
                gauges
            },
            revocations_current: set.gauge(
                "revocations_current",
                "1 while new revocations arrive; 0: Kafka is away, or was not read yet",
            )?,
            revocations_malformed: set.counter(
                "revocations_malformed_total",
                "Malformed records in the topic of revocations: each revokes all tokens of its key",
            )?,
            revocations_evicted: set.counter(
                "revocations_evicted_total",
                "Revocations evicted because there are too many: they are not in force",
            )?,
            revoked: set.counters(
                "revoked_total",
                "Revoked tokens refused, and sessions closed, by where the token was met",
                "where",
                RevokedAt::VALUES,
            )?,
            shed: set.counter("shed_total", "Devices sent to another node by shedding")?,
            acked: set.counter("acked_total", "Messages acknowledged")?,
            hops: Hops::new(registry, &HOPS)?,
        })
    }

    /// The counter of sockets accepted by one accept loop. A node has at most 64 loops.
    pub fn acceptor(&self, number: usize) -> IntCounter {
        self.accepted.with_label_values(&[&number.to_string()])
    }

    /// Counts a limit that was reached.
    pub fn limit(&self, limit: Limit) {
        self.limits.with_label_values(&[limit.as_str()]).inc();
    }

    /// Counts a welcomed session by what it names. [`Self::leave`] must follow.
    pub fn enter(&self, app: &AppId, platform: &str, sdk: &str) -> Counted {
        let app = self.apps.enter(app.as_str());
        Counted {
            app,
            platform: self.platforms.enter(platform),
            sdk: self.sdks.enter(sdk),
            bytes: self.apps.bytes(app),
        }
    }

    /// Ends the count of a session.
    pub fn leave(&self, counted: Counted) {
        self.apps.leave(counted.app);
        self.platforms.leave(counted.platform);
        self.sdks.leave(counted.sdk);
    }

    /// Counts a reading of the certificate's files.
    pub fn certificate_read(&self, outcome: CertificateRead) {
        self.certificates.with_label_values(&[outcome.as_str()]).inc();
    }

    /// Counts a finished handshake.
    pub fn handshake(&self, result: Handshake) {
        self.handshakes.with_label_values(&[result.as_str()]).inc();
    }

    /// Counts a token that was refused in a handshake or a Refresh.
    pub fn token_refused(&self, why: TokenRefusal) {
        self.tokens_refused.with_label_values(&[why.as_str()]).inc();
    }

    /// Sets the number of revocations of each kind, in the order of [`RevokedBy::VALUES`].
    pub fn revocations(&self, counts: [usize; RevokedBy::VALUES.len()]) {
        for (kind, count) in RevokedBy::VALUES.iter().zip(counts) {
            self.revocations.with_label_values(&[kind]).set(count as i64);
        }
    }

    /// Counts a revoked token that was refused, or whose session was closed.
    pub fn revoked(&self, at: RevokedAt) {
        self.revoked.with_label_values(&[at.as_str()]).inc();
    }

    /// Counts a closed connection; `None`: closed by the device.
    pub fn close(&self, code: Option<CloseCode>) {
        self.closes.with_label_values(&[code.map_or("device", CloseCode::as_str)]).inc();
    }

    /// Records how long a session lasted; `None`: closed by the device.
    pub fn session_ended(&self, code: Option<CloseCode>, seconds: Seconds) {
        let code = code.map_or("device", CloseCode::as_str);
        self.session_seconds.with_label_values(&[code]).observe(seconds.into());
    }

    /// Counts a message for an audience.
    pub fn fanout(&self, result: FanoutResult) {
        self.fanouts.with_label_values(&[result.as_str()]).inc();
    }

    /// Records the time from a message's arrival until all members of its audience were woken.
    pub fn fanout_finished(&self, took: Duration) {
        self.fanout_seconds.observe(took.as_secs_f64());
    }

    /// Counts a page for a device that catches up.
    pub fn audience_page(&self, result: PageResult) {
        self.audience_pages.with_label_values(&[result.as_str()]).inc();
    }

    /// Counts a subscription to a group that the token does not list.
    pub fn subscription_refused(&self) {
        self.subscriptions_refused.inc();
    }

    /// Counts a Skip frame.
    pub fn skip(&self, why: SkipReason) {
        self.skips.with_label_values(&[skip_label(why)]).inc();
    }

    /// Counts a device's frame.
    pub fn frame_in(&self, kind: Frame) {
        self.frames_in.with_label_values(&[kind.as_str()]).inc();
    }

    /// Counts something unknown that a device sent.
    pub fn ignored(&self, what: Unknown) {
        self.ignored.with_label_values(&[what.as_str()]).inc();
    }

    /// Counts a reading of a mailbox.
    pub fn sync(&self, cause: SyncCause) {
        self.syncs.with_label_values(&[cause.as_str()]).inc();
    }

    /// Counts a push that a session did not write.
    pub fn dropped(&self, why: Dropped) {
        self.push_drop(match why {
            Dropped::Known => PushDrop::Known,
            Dropped::Syncing => PushDrop::Syncing,
            Dropped::Window => PushDrop::Window,
            Dropped::Gap => PushDrop::Gap,
            Dropped::Fork => PushDrop::Fork,
        });
    }

    /// Counts a push for which the session's queue had no room.
    pub fn overflow(&self) {
        self.push_drop(PushDrop::Overflow);
    }

    fn push_drop(&self, why: PushDrop) {
        self.dropped.with_label_values(&[why.as_str()]).inc();
    }

    /// Counts a failed call to Redis that is repeated.
    pub fn redis_retry(&self, call: Call) {
        self.redis_retries.with_label_values(&[call.as_str()]).inc();
    }

    /// Counts an answered confirmation.
    pub fn confirm(&self, outcome: Confirmation) {
        self.confirms.with_label_values(&[outcome.as_str()]).inc();
    }
}

fn skip_label(why: SkipReason) -> &'static str {
    match why {
        SkipReason::Unspecified => "unspecified",
        SkipReason::Expired => "expired",
        SkipReason::Evicted => "evicted",
        SkipReason::OtherDevice => "other_device",
        SkipReason::Collapsed => "collapsed",
        SkipReason::Recalled => "recalled",
        SkipReason::Acknowledged => "acknowledged",
    }
}
