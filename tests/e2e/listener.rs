//! A device that uses the Rust SDK, as an application does; what it is shown goes into the books.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use barid_client::{Client, Event, Message, Token};
use barid_testkit::checker::{Application, Books};
use barid_testkit::device::PATIENCE;
use barid_testkit::token::token;
use tokio::time::Instant;

/// The books of a run, which everybody who takes part in it writes.
#[derive(Debug, Clone, Default)]
pub struct Shared(Arc<Mutex<Books>>);

impl Shared {
    /// The books, for one entry or question.
    pub fn open(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An application on a device.
pub struct Listener {
    books: Shared,
    application: Application,
    client: Client,
}

impl Listener {
    /// Connects to `url` and stays connected; with books of its own.
    pub fn start(url: &str, user: &str, device: &str) -> Result<Self> {
        Self::watched(&Shared::default(), ("node", url), (user, device), |message| vec![message])
    }

    /// Connects to `node`'s `url`, with an account in `books`. `between` stands between the SDK and
    /// the application and turns what the one delivers into what the other is shown.
    pub fn watched(
        books: &Shared,
        (node, url): (&str, &str),
        (user, device): (&str, &str),
        between: impl FnMut(Message) -> Vec<Message> + Send + 'static,
    ) -> Result<Self> {
        let application = books.open().application(user, device);
        let (shown, events) = (books.clone(), books.clone());
        let (node, user, between) = (node.to_owned(), user.to_owned(), Mutex::new(between));
        let client = Client::builder(url)
            .device(device)
            .token(move || {
                let token = token("demo", &user, Duration::from_secs(600));
                async move { Ok(Token::new(token)) }
            })
            .reconnect_between(Duration::from_millis(50), Duration::from_millis(500))
            .on_event(move |event| match event {
                Event::Connected { .. } => events.open().connected(application, &node),
                Event::Disconnected { why, retry_in } => {
                    events.open().disconnected(application, &why.to_string(), retry_in.is_none());
                }
                _ => {}
            })
            .start(move |message| {
                let mut between = between.lock().unwrap_or_else(PoisonError::into_inner);
                for message in between(message) {
                    let payload = String::from_utf8_lossy(message.body.as_bytes());
                    shown.open().shown(application, &message.id, &payload);
                }
                async { Ok(()) }
            })?;
        Ok(Self { books: books.clone(), application, client })
    }

    /// What the application was shown, in order.
    pub fn ids(&self) -> Vec<String> {
        self.books.open().shown_to(self.application).into_iter().map(str::to_owned).collect()
    }

    /// How often it was welcomed.
    pub fn connections(&self) -> usize {
        self.books.open().sessions_of(self.application)
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

    /// Leaves in good order.
    pub async fn shutdown(self) {
        self.client.shutdown().await;
    }
}
