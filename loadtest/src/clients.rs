//! Devices as applications have them: one SDK client a user, which comes back after any outage.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use barid_client::{Client, Event, Message, Token};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use tokio::sync::mpsc;

use crate::audit::Audit;
use crate::producer::user;
use crate::run::Options;

/// Handshakes under way at once while the fleet connects.
const CONNECTING_MAX: u32 = 64;

/// How long one group of handshakes may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Connects every user's device and waits until all of them were welcomed.
pub async fn connect(options: &Options, audit: &Arc<Audit>) -> anyhow::Result<Vec<Client>> {
    let secret = std::fs::read(&options.secret_file)
        .with_context(|| format!("reading {}", options.secret_file.display()))?;
    let key = EncodingKey::from_secret(secret.trim_ascii_end());
    let life = Duration::from_secs(options.seconds + options.settle_seconds + 3600);
    let (welcomed, mut welcomes) = mpsc::channel(options.users as usize);
    let mut clients = Vec::new();
    for number in 0..options.users {
        let (key_id, user) = (options.key_id.clone(), user(number.into()));
        let token = sign(&key, key_id, &options.app, &user, life)?;
        let url = &options.url[number as usize % options.url.len()];
        let (audit, welcomed) = (Arc::clone(audit), welcomed.clone());
        let client = Client::builder(url)
            .device("load")
            .platform("loadtest")
            .token(move || {
                let token = Token::new(token.clone());
                async move { Ok(token) }
            })
            .on_event(move |event| {
                if let Event::Connected { .. } = event {
                    // Full only when everybody has been counted: reconnects need no count.
                    let _ = welcomed.try_send(());
                }
            })
            .start(move |message: Message| {
                audit.shown(number, &message.id);
                async { Ok(()) }
            })?;
        clients.push(client);
        if (number + 1) % CONNECTING_MAX == 0 || number + 1 == options.users {
            let group = clients.len() - (number / CONNECTING_MAX * CONNECTING_MAX) as usize;
            for _ in 0..group {
                if tokio::time::timeout(CONNECT_TIMEOUT, welcomes.recv()).await.is_err() {
                    bail!("a device was not welcomed within {CONNECT_TIMEOUT:?} at {url}");
                }
            }
        }
    }
    Ok(clients)
}

/// A user's token.
///
/// # Errors
/// The key cannot sign.
pub fn sign(
    key: &EncodingKey,
    key_id: Option<String>,
    app: &str,
    user: &str,
    life: Duration,
) -> anyhow::Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let claims = serde_json::json!({ "app": app, "sub": user, "exp": (now + life).as_secs() });
    let header = Header { kid: key_id, ..Header::new(Algorithm::HS256) };
    Ok(jsonwebtoken::encode(&header, &claims, key)?)
}
