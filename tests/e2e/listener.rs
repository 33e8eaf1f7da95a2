//! A device that uses the Rust SDK, as an application does, and remembers what it was shown.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use barid_client::{Client, Event, Token};
use barid_testkit::cluster::Business;
use barid_testkit::device::PATIENCE;
use barid_testkit::token::token;
use tokio::time::Instant;

#[derive(Debug, Default)]
struct Seen {
    ids: Vec<String>,
    connections: usize,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An application on a device.
pub struct Listener {
    seen: Arc<Mutex<Seen>>,
    client: Client,
}

impl Listener {
    /// Connects and stays connected.
    pub fn start(url: &str, user: &str, device: &str) -> Result<Self> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (shown, events, user) = (seen.clone(), seen.clone(), user.to_owned());
        let client = Client::builder(url)
            .device(device)
            .token(move || {
                let token = token("demo", &user, Duration::from_secs(600));
                async move { Ok(Token::new(token)) }
            })
            .reconnect_between(Duration::from_millis(50), Duration::from_millis(500))
            .on_event(move |event| {
                if let Event::Connected { .. } = event {
                    lock(&events).connections += 1;
                }
            })
            .start(move |message| {
                lock(&shown).ids.push(message.id);
                async { Ok(()) }
            })?;
        Ok(Self { seen, client })
    }

    /// What the application was shown, in order.
    pub fn ids(&self) -> Vec<String> {
        lock(&self.seen).ids.clone()
    }

    /// How often it was welcomed.
    pub fn connections(&self) -> usize {
        lock(&self.seen).connections
    }

    /// Waits until it is connected.
    pub async fn connected(&self) -> Result<()> {
        self.until("it is connected", |seen| seen.connections > 0).await
    }

    /// Waits until the application has been shown `count` messages.
    pub async fn count(&self, count: usize) -> Result<()> {
        self.until(&format!("{count} messages came"), |seen| seen.ids.len() >= count).await
    }

    async fn until(&self, what: &str, done: impl Fn(&Seen) -> bool) -> Result<()> {
        let deadline = Instant::now() + 2 * PATIENCE;
        while !done(&lock(&self.seen)) {
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

/// Messages that a business keeps producing to users `u0`, `u1`, …, in a task of its own, while the
/// test breaks things.
pub struct Flow {
    users: usize,
    each: usize,
    task: tokio::task::JoinHandle<Result<()>>,
}

impl Flow {
    /// `each` messages to each of `users`, a round every `pause`.
    pub fn start(business: Business, users: usize, each: usize, pause: Duration) -> Self {
        let task = tokio::spawn(async move {
            for number in 0..each {
                for user in 0..users {
                    let (user, id) = (format!("u{user}"), format!("m{number:04}"));
                    business.say(&user, &id, "hello").await?;
                }
                tokio::time::sleep(pause).await;
            }
            Ok(())
        });
        Self { users, each, task }
    }

    /// Waits until everything was produced and shown: each message once, in order. `listeners` are
    /// those of `u0`, `u1`, … in this order.
    pub async fn finish(self, listeners: &[Listener]) -> Result<()> {
        assert_eq!(listeners.len(), self.users);
        self.task.await??;
        let wanted: Vec<String> = (0..self.each).map(|n| format!("m{n:04}")).collect();
        for (user, listener) in listeners.iter().enumerate() {
            listener.count(self.each).await?;
            ensure!(listener.ids() == wanted, "u{user} was shown {:?}", listener.ids());
        }
        // What would come twice comes now.
        tokio::time::sleep(Duration::from_millis(300)).await;
        for listener in listeners {
            ensure!(listener.ids().len() == self.each, "repeats: {:?}", listener.ids());
        }
        Ok(())
    }
}
