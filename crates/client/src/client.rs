//! The client: its builder, its messages, and its shutdown.

use std::any::Any;
use std::collections::BTreeSet;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use barid_core::{DeviceId, GroupId, InvalidName, limits};
use futures::FutureExt as _;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::delivery::{Deliveries, Delivery};
use crate::driver::Driver;
use crate::event::{Closed, Event};
use crate::inbox::Inbox;
use crate::message::Message;
use crate::settings::{BODY_BYTES_LIMIT, InvalidBuilder, Settings, Timing, address};
use crate::store::PositionStore;
use crate::token::{Token, TokenError, TokenSource};
use crate::trust::Trust;

/// Why a handler failed to handle a message.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// A running client. Dropping it ends the connection without waiting for the last acknowledgement;
/// [`Client::shutdown`] waits.
#[derive(Debug)]
pub struct Client {
    stop: CancellationToken,
    closed: watch::Receiver<Option<Closed>>,
    groups: watch::Sender<BTreeSet<GroupId>>,
    /// The handler's panic message, if it panicked.
    failed: Arc<OnceLock<String>>,
}

/// The settings of a client. Created by [`Client::builder`].
pub struct Builder {
    url: String,
    device: Option<String>,
    platform: String,
    token: Option<TokenSource>,
    store: Option<Arc<dyn PositionStore>>,
    on_event: Arc<dyn Fn(Event) + Send + Sync>,
    timing: Timing,
    body_bytes_max: usize,
    ping_interval: Option<Duration>,
    zone: Option<String>,
    roots: Option<Vec<u8>>,
    groups: BTreeSet<String>,
}

/// Bound of the messages that the application has at a time.
const AT_ONCE_MAX: usize = 100_000;

impl Client {
    /// Creates a builder for a client of the cluster at `url`: `ws://HOST:PORT` or `wss://HOST`. The path is
    /// `/v1/connect` unless the URL has one.
    pub fn builder(url: impl Into<String>) -> Builder {
        Builder {
            url: url.into(),
            device: None,
            platform: std::env::consts::OS.into(),
            token: None,
            store: None,
            on_event: Arc::new(|_| {}),
            timing: Timing {
                reconnect_min: Duration::from_millis(500),
                reconnect_max: Duration::from_secs(20),
                connect: Duration::from_secs(10),
                ack_delay: Duration::from_millis(20),
                shutdown: Duration::from_secs(5),
            },
            body_bytes_max: 16 << 20,
            ping_interval: None,
            zone: None,
            roots: None,
            groups: BTreeSet::new(),
        }
    }

    /// Subscribes to a group, which the token must list, also after reconnects. The answer is an event. A repeated
    /// subscription has no effect.
    ///
    /// # Errors
    /// The name is not a valid group name.
    pub fn subscribe(&self, group: &str) -> Result<(), InvalidName> {
        let group = GroupId::new(group)?;
        self.groups.send_if_modified(|groups| groups.insert(group));
        Ok(())
    }

    /// Ends the subscription to a group.
    ///
    /// # Errors
    /// The name is not a valid group name.
    pub fn unsubscribe(&self, group: &str) -> Result<(), InvalidName> {
        let group = GroupId::new(group)?;
        self.groups.send_if_modified(|groups| groups.remove(&group));
        Ok(())
    }

    /// Waits until the client has ended: shut down, refused for good, or failed.
    pub async fn closed(&self) -> Closed {
        let mut closed = self.closed.clone();
        let ended = closed.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        ended.unwrap_or_else(|| Closed::Failed("its task was ended".into()))
    }

    /// Stops receiving, waits up to [`Builder::shutdown_timeout`] until the application has finished its messages,
    /// sends the last acknowledgement, and closes the connection.
    pub async fn shutdown(self) -> Closed {
        self.stop.cancel();
        self.closed().await
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Builder {
    /// The device's name, 1 to 64 bytes. May be left out if the token names the device.
    #[must_use]
    pub fn device(mut self, device: impl Into<String>) -> Self {
        self.device = Some(device.into());
        self
    }

    /// The platform: free text, truncated to 32 bytes. Default: the operating system.
    #[must_use]
    pub fn platform(mut self, platform: impl Into<String>) -> Self {
        self.platform = platform.into();
        while self.platform.len() > limits::PLATFORM_BYTES_MAX {
            self.platform.pop();
        }
        self
    }

    /// The callback that returns tokens. It is called at every connection attempt, and before a token with an expiry
    /// time expires.
    #[must_use]
    pub fn token<F, Fut>(mut self, source: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Token, TokenError>> + Send + 'static,
    {
        self.token = Some(Arc::new(move || Box::pin(source())));
        self
    }

    /// Stores the position. Without a store it is lost with the client, and the server's position of the device is
    /// used.
    #[must_use]
    pub fn positions(mut self, store: impl PositionStore) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// The callback for events. It must return soon.
    #[must_use]
    pub fn on_event(mut self, on_event: impl Fn(Event) + Send + Sync + 'static) -> Self {
        self.on_event = Arc::new(on_event);
        self
    }

    /// The bounds of the wait before a reconnect, 1 ms to a day. Default: 500 ms to 20 s.
    #[must_use]
    pub fn reconnect_between(mut self, min: Duration, max: Duration) -> Self {
        (self.timing.reconnect_min, self.timing.reconnect_max) = (min, max);
        self
    }

    /// How long a connection attempt may take, up to the server's welcome. Default: 10 s.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.timing.connect = timeout;
        self
    }

    /// How long an acknowledgement waits for others while further messages are to be handled. Default: 20 ms.
    #[must_use]
    pub fn ack_delay(mut self, delay: Duration) -> Self {
        self.timing.ack_delay = delay;
        self
    }

    /// How long [`Client::shutdown`] waits for the application. Default: 5 s.
    #[must_use]
    pub fn shutdown_timeout(mut self, timeout: Duration) -> Self {
        self.timing.shutdown = timeout;
        self
    }

    /// The ping interval, within the server's bounds. Default: the server's. A longer interval saves battery on a
    /// network that keeps idle connections; a shorter one notices sooner that the network has dropped the connection.
    #[must_use]
    pub fn ping_interval(mut self, interval: Duration) -> Self {
        self.ping_interval = Some(interval);
        self
    }

    /// Before each connection, asks the server for the least loaded nodes of a zone, and connects to one of them, or
    /// to the client's URL if the server does not answer. An empty zone is the server's own. Devices must be able to
    /// reach the nodes directly.
    #[must_use]
    pub fn least_loaded(mut self, zone: impl Into<String>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// Trusts only these certificate authorities (PEM, one or several) for `wss:` URLs. Default: Mozilla's public ones.
    #[must_use]
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.roots = Some(pem.into());
        self
    }

    /// Subscribes to a group from the start; see [`Client::subscribe`].
    #[must_use]
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.groups.insert(group.into());
        self
    }

    /// Bound of a decompressed body, up to 1 GiB. Default: 16 MiB.
    #[must_use]
    pub fn body_bytes_max(mut self, max: usize) -> Self {
        self.body_bytes_max = max;
        self
    }

    /// Starts a client that calls `handler` with one message at a time, in order, and acknowledges it when the
    /// handler returns `Ok`. After an error the server sends a message of the user again, and no newer one is shown
    /// before it. Group messages are not sent again.
    ///
    /// # Errors
    /// A setting is invalid. An unreachable server is reported as an event instead.
    pub fn start<H, Fut>(self, handler: H) -> Result<Client, InvalidBuilder>
    where
        H: Fn(Message) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), HandlerError>> + Send,
    {
        let (client, mut deliveries) = self.open(1)?;
        let failed = Arc::clone(&client.failed);
        tokio::spawn(async move {
            while let Some(Delivery { message, ack }) = deliveries.next().await {
                let (seq, id) = (message.seq, message.id.clone());
                match AssertUnwindSafe(async { handler(message).await }).catch_unwind().await {
                    Ok(Ok(())) => ack.ack(),
                    Ok(Err(error)) => tracing::warn!(%seq, id, %error, "handler failed"),
                    Err(panic) => {
                        let why = format!("the handler of message {seq}: {}", panic_text(&*panic));
                        let _ = failed.set(why);
                        break;
                    }
                }
            }
        });
        Ok(client)
    }

    /// Starts a client whose messages are received from [`Deliveries`] and acknowledged explicitly. The application
    /// has at most `at_once` messages (1 to 100,000) at a time.
    ///
    /// # Errors
    /// As [`Builder::start`].
    pub fn open(mut self, at_once: usize) -> Result<(Client, Deliveries), InvalidBuilder> {
        let groups = std::mem::take(&mut self.groups);
        let groups: BTreeSet<_> =
            groups.iter().map(|group| GroupId::new(group)).collect::<Result<_, _>>()?;
        let (groups, wanted) = watch::channel(groups);
        let settings = Arc::new(self.settings()?);
        let checkpoint = match &settings.store {
            Some(store) => {
                store.load().map_err(InvalidBuilder::Store)?.unwrap_or_default().bounded()
            }
            None => Default::default(),
        };
        let stop = CancellationToken::new();
        let (closed_tx, closed) = watch::channel(None);
        let at_once = at_once.clamp(1, AT_ONCE_MAX);
        let (deliver, messages) = mpsc::channel(at_once);
        let (finish, finished) = mpsc::channel(at_once);
        let driver = Driver::new(
            settings,
            Inbox::resume(&checkpoint),
            checkpoint.attempt,
            stop.clone(),
            deliver,
            (finish, finished),
            wanted,
        );
        let failed = Arc::new(OnceLock::<String>::new());
        let handler = Arc::clone(&failed);
        let ended = stop.clone();
        tokio::spawn(async move {
            let why = AssertUnwindSafe(driver.run()).catch_unwind().await;
            ended.cancel();
            closed_tx.send_replace(Some(match (why, handler.get()) {
                (Ok(Closed::Shutdown), Some(handler)) => Closed::Failed(handler.clone()),
                (Ok(why), _) => why,
                (Err(panic), _) => Closed::Failed(panic_text(&*panic)),
            }));
        });
        let deliveries = Deliveries { messages, stop: stop.clone() };
        Ok((Client { stop, closed, groups, failed }, deliveries))
    }

    fn settings(self) -> Result<Settings, InvalidBuilder> {
        self.timing.check()?;
        if !(1..=BODY_BYTES_LIMIT).contains(&self.body_bytes_max) {
            let (what, allowed) = ("body_bytes_max", "1 byte to 1 GiB");
            return Err(InvalidBuilder::OutOfRange { what, allowed });
        }
        let uri = address(&self.url)?;
        let device = match self.device {
            Some(device) => DeviceId::new(&device)?.to_string(),
            None => String::new(),
        };
        let trust = self.roots.map(|pem| Trust::new(&pem)).transpose();
        Ok(Settings {
            uri,
            device,
            platform: self.platform,
            token: self.token.ok_or(InvalidBuilder::NoToken)?,
            store: self.store,
            on_event: self.on_event,
            timing: self.timing,
            body_bytes_max: self.body_bytes_max,
            zone: self.zone,
            trust: trust.map_err(InvalidBuilder::Certificates)?,
            // 0 would mean the server's interval.
            ping_interval_ms: self.ping_interval.map_or(0, |interval| {
                u32::try_from(interval.as_millis()).unwrap_or(u32::MAX).max(1)
            }),
        })
    }
}

/// The message of a panic.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("without a text"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::TIME_MAX;

    #[tokio::test]
    async fn hazard_61_every_number_of_a_client_is_bounded() {
        let builder = || Client::builder("ws://127.0.0.1:1").token(|| async { Ok("t".into()) });
        let told = |builder: Builder| match builder.open(usize::MAX) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        let (ms, day) = (Duration::from_millis(1), TIME_MAX);
        let beyond = [Duration::ZERO, day + ms, Duration::from_secs(1 << 53), Duration::MAX];
        for time in beyond {
            let reconnect = told(builder().reconnect_between(time, Duration::MAX));
            assert!(
                reconnect.starts_with("reconnect_between is out of range: 1 ms"),
                "{reconnect}"
            );
            assert!(told(builder().reconnect_between(ms, time)).starts_with("reconnect_between"));
            assert!(told(builder().connect_timeout(time)).starts_with("connect_timeout"));
            let zero = time.is_zero();
            assert_eq!(told(builder().ack_delay(time)).is_empty(), zero, "{time:?}");
            assert_eq!(told(builder().shutdown_timeout(time)).is_empty(), zero, "{time:?}");
        }
        for bytes in [0, BODY_BYTES_LIMIT + 1, 1 << 53, usize::MAX] {
            assert!(told(builder().body_bytes_max(bytes)).starts_with("body_bytes_max"));
        }
        for interval in [Duration::ZERO, ms, Duration::from_secs(1 << 53), Duration::MAX] {
            assert_eq!(told(builder().ping_interval(interval)), "");
        }
        for (least, most) in [(ms, ms), (ms, day), (day, day)] {
            let all = builder().reconnect_between(least, most).connect_timeout(most);
            assert_eq!(told(all.ack_delay(day).shutdown_timeout(day).body_bytes_max(1)), "");
        }
    }

    #[test]
    fn long_platform_names_are_cut_at_a_character() {
        let builder = Client::builder("ws://h").platform("ä".repeat(40));
        assert_eq!(builder.platform, "ä".repeat(16));
    }
}
