//! An application that uses the Rust SDK, and enters what it is shown into an audit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use barid_client::{Client, Event, Message, Token};
use barid_testkit::audit::{Application, Audit};
use barid_testkit::device::PATIENCE;
use barid_testkit::token::token;
use tokio::time::Instant;

/// The audit of a run, shared by its producers and applications.
#[derive(Debug, Clone, Default)]
pub struct SharedAudit(Arc<Mutex<Audit>>);

impl SharedAudit {
    /// Locks the audit.
    pub fn lock(&self) -> MutexGuard<'_, Audit> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An application on a device.
pub struct Listener {
    audit: SharedAudit,
    application: Application,
    client: Client,
}

impl Listener {
    /// Connects to `url` and stays connected, with an audit of its own.
    pub fn start(url: &str, user: &str, device: &str) -> Result<Self> {
        Self::watched(&SharedAudit::default(), ("node", url), (user, device), |message| {
            vec![message]
        })
    }

    /// Connects to `node`'s `url` as an application of `audit`. `between` turns each message of the SDK into the
    /// messages that the application is shown.
    pub fn watched(
        audit: &SharedAudit,
        (node, url): (&str, &str),
        (user, device): (&str, &str),
        between: impl FnMut(Message) -> Vec<Message> + Send + 'static,
    ) -> Result<Self> {
        let application = audit.lock().application(user, device);
        let (shown, events) = (audit.clone(), audit.clone());
        let (node, user, between) = (node.to_owned(), user.to_owned(), Mutex::new(between));
        let client = Client::builder(url)
            .device(device)
            .token(move || {
                let token = token("demo", &user, Duration::from_secs(600));
                async move { Ok(Token::new(token)) }
            })
            .reconnect_between(Duration::from_millis(50), Duration::from_millis(500))
            .on_event(move |event| match event {
                Event::Connected { .. } => events.lock().connected(application, &node),
                Event::Disconnected { why, retry_in } => {
                    events.lock().disconnected(application, &why.to_string(), retry_in.is_none());
                }
                _ => {}
            })
            .start(move |message| {
                let mut between = between.lock().unwrap_or_else(PoisonError::into_inner);
                for message in between(message) {
                    let payload = String::from_utf8_lossy(message.body.as_bytes());
                    shown.lock().shown(application, &message.id, &payload);
                }
                async { Ok(()) }
            })?;
        Ok(Self { audit: audit.clone(), application, client })
    }

    /// The ids of the messages that the application was shown, in order.
    pub fn ids(&self) -> Vec<String> {
        self.audit.lock().shown_to(self.application).into_iter().map(str::to_owned).collect()
    }

    /// The number of sessions so far.
    pub fn connections(&self) -> usize {
        self.audit.lock().sessions_of(self.application)
    }

    /// Waits until it is connected.
    pub async fn connected(&self) -> Result<()> {
        self.until("it is connected", || self.connections() > 0).await
    }

    /// Waits until the application has been shown `count` messages.
    pub async fn count(&self, count: usize) -> Result<()> {
        self.until(&format!("{count} messages came"), || self.ids().len() >= count).await
    }

    async fn until(&self, what: &str, done: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + 2 * PATIENCE;
        while !done() {
            ensure!(Instant::now() < deadline, "{what}: not so; it was shown {:?}", self.ids());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Shuts down the client.
    pub async fn shutdown(self) {
        self.client.shutdown().await;
    }
}
