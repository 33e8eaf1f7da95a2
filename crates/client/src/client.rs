//! The application's side: building a client, taking its messages, shutting it down.

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

/// Why a handler did not handle a message.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// A running client. Dropping it ends the connection without a last acknowledgement being waited
/// for; [`Client::shutdown`] is the polite way.
#[derive(Debug)]
pub struct Client {
    stop: CancellationToken,
    closed: watch::Receiver<Option<Closed>>,
    groups: watch::Sender<BTreeSet<GroupId>>,
    /// Why the handler ended, if it panicked.
    failed: Arc<OnceLock<String>>,
}

/// What a client is to be. Made by [`Client::builder`].
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

/// Messages that are out at a time.
const AT_ONCE_MAX: usize = 100_000;
impl Client {
    /// Begins to describe a client of the cluster at `url`: `ws://HOST:PORT` or `wss://HOST`; the
    /// path is `/v1/connect` unless the URL has one.
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

    /// From now on also shows the messages of a group, which the token has to list; after reconnects as
    /// well. The answer is an event. To subscribe twice does nothing.
    ///
    /// # Errors
    /// No group can have this name.
    pub fn subscribe(&self, group: &str) -> Result<(), InvalidName> {
        let group = GroupId::new(group)?;
        self.groups.send_if_modified(|groups| groups.insert(group));
        Ok(())
    }

    /// And no longer.
    ///
    /// # Errors
    /// No group can have this name.
    pub fn unsubscribe(&self, group: &str) -> Result<(), InvalidName> {
        let group = GroupId::new(group)?;
        self.groups.send_if_modified(|groups| groups.remove(&group));
        Ok(())
    }

    /// Waits until the client is over: shut down, refused for good, or failed.
    pub async fn closed(&self) -> Closed {
        let mut closed = self.closed.clone();
        let ended = closed.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        ended.unwrap_or_else(|| Closed::Failed("its task was ended".into()))
    }

    /// Takes no further messages, lets the application finish those that it has (for
    /// [`Builder::shutdown_timeout`] at most), sends the last acknowledgement and closes.
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
    /// Names the device among its user's; 1 to 64 bytes. May be left out if the token names it.
    #[must_use]
    pub fn device(mut self, device: impl Into<String>) -> Self {
        self.device = Some(device.into());
        self
    }

    /// What kind of machine it is: free text, cut at 32 bytes; the operating system if not given.
    #[must_use]
    pub fn platform(mut self, platform: impl Into<String>) -> Self {
        self.platform = platform.into();
        while self.platform.len() > limits::PLATFORM_BYTES_MAX {
            self.platform.pop();
        }
        self
    }

    /// Where tokens come from. Asked at every connection attempt, and before a token that says
    /// when it expires does so.
    #[must_use]
    pub fn token<F, Fut>(mut self, source: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Token, TokenError>> + Send + 'static,
    {
        self.token = Some(Arc::new(move || Box::pin(source())));
        self
    }

    /// Keeps the position somewhere; without, it is forgotten with the client, and the server's
    /// memory of the device is used.
    #[must_use]
    pub fn positions(mut self, store: impl PositionStore) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// Told of everything that is not a message. Must return soon.
    #[must_use]
    pub fn on_event(mut self, on_event: impl Fn(Event) + Send + Sync + 'static) -> Self {
        self.on_event = Arc::new(on_event);
        self
    }

    /// The bounds of the wait before a reconnect, 1 ms to a day; 500 ms to 20 s if not given.
    #[must_use]
    pub fn reconnect_between(mut self, min: Duration, max: Duration) -> Self {
        (self.timing.reconnect_min, self.timing.reconnect_max) = (min, max);
        self
    }

    /// How long a connection attempt, up to the server's welcome, may take; 10 s if not given.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.timing.connect = timeout;
        self
    }

    /// How long an acknowledgement waits for others while further messages wait to be handled;
    /// 20 ms if not given.
    #[must_use]
    pub fn ack_delay(mut self, delay: Duration) -> Self {
        self.timing.ack_delay = delay;
        self
    }

    /// How long [`Client::shutdown`] waits for the application; 5 s if not given.
    #[must_use]
    pub fn shutdown_timeout(mut self, timeout: Duration) -> Self {
        self.timing.shutdown = timeout;
        self
    }

    /// How often to be pinged where nothing else is sent, as far as the server's bounds allow; as the
    /// server likes if not given. Longer saves battery where the network keeps idle connections; shorter
    /// notices sooner that it does not.
    #[must_use]
    pub fn ping_interval(mut self, interval: Duration) -> Self {
        self.ping_interval = Some(interval);
        self
    }

    /// Asks the server before each connection which nodes of a zone hold the fewest devices, and connects
    /// to one of them; to the client's URL where that is not answered. An empty zone is the server's own.
    /// For clusters whose nodes devices can reach one by one.
    #[must_use]
    pub fn least_loaded(mut self, zone: impl Into<String>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// Trusts servers with these certificates, or with one that these signed (PEM, one or several), and no
    /// others, where the URL begins with `wss:`; Mozilla's public ones if not given.
    #[must_use]
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.roots = Some(pem.into());
        self
    }

    /// Shows the messages of a group as well, from the start: [`Client::subscribe`].
    #[must_use]
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.groups.insert(group.into());
        self
    }

    /// To how many bytes a compressed body may grow, up to 1 GiB; 16 MiB if not given.
    #[must_use]
    pub fn body_bytes_max(mut self, max: usize) -> Self {
        self.body_bytes_max = max;
        self
    }

    /// Starts a client that gives `handler` one message at a time, in order, and acknowledges it
    /// when the handler returns `Ok`. After an error the message comes again, by the server's
    /// re-sends, and nothing newer before it.
    ///
    /// # Errors
    /// [`InvalidBuilder`]; that the server cannot be reached is no error, but an event.
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
                    Ok(Err(error)) => tracing::warn!(%seq, id, %error, "message not handled"),
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

    /// Starts a client whose messages are taken and acknowledged by hand. At most `at_once`
    /// (1 to 100,000) are out at a time.
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
            // 0 would be the server's choice.
            ping_interval_ms: self.ping_interval.map_or(0, |interval| {
                u32::try_from(interval.as_millis()).unwrap_or(u32::MAX).max(1)
            }),
        })
    }
}

/// The text of a panic.
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
