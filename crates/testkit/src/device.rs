//! A device that speaks `barid.v1.json` and does only what a test asks: it never acknowledges or reconnects
//! by itself. Tests that need other bytes use [`crate::raw`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// How long a test waits for an event that must happen, on a machine that runs other tests as well.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// A frame of the node, or the end of the connection.
#[derive(Debug, Clone, PartialEq)]
pub enum Incoming {
    /// `welcome`, with its fields.
    Welcome(Value),
    /// One message of a `deliver`.
    Message(Delivered),
    /// `skip`, with its fields.
    Skip(Value),
    /// Another frame, with its kind and fields.
    Other(String, Value),
    /// The connection ended: close code (1006 if there was no Close frame) and reason.
    Closed(u16, String),
}

/// A message as the device received it.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivered {
    /// The group, `everyone`, or empty for the user's own mailbox.
    pub mailbox: String,
    /// The number of times that the device's cursor had been reset.
    pub generation: u64,
    /// Position in the mailbox.
    pub seq: u64,
    /// Message id.
    pub id: String,
    /// The body by its kind: `{"text": …}`, `{"json": …}` or `{"data": …}`.
    pub body: Value,
    /// When it was read from the socket.
    pub at: Instant,
}

/// A connected device.
#[derive(Debug)]
pub struct Device {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    waiting: std::collections::VecDeque<Incoming>,
    /// The generation of the last frame that the test has read.
    generation: u64,
}

impl Device {
    /// Opens a WebSocket to `url` (`ws://…/v1/connect`) with `token`, and sends nothing yet.
    ///
    /// # Errors
    /// Returns an error with the HTTP status if the node refuses the handshake.
    pub async fn open(url: &str, token: &str) -> Result<Self> {
        let mut request = url.into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("sec-websocket-protocol", HeaderValue::from_static("barid.v1.json"));
        headers.insert("authorization", format!("Bearer {token}").parse()?);
        let opened = tokio::time::timeout(PATIENCE, connect_async(request)).await;
        let (socket, _) = opened.context("handshake takes too long")??;
        Ok(Self { socket, waiting: Default::default(), generation: 0 })
    }

    /// Opens a WebSocket, says Hello as `device` and waits for Welcome.
    ///
    /// # Errors
    /// Returns an error if the node refuses the handshake or the Hello.
    pub async fn connect(url: &str, token: &str, device: &str) -> Result<Self> {
        Self::connect_with(url, token, json!({ "device": device })).await.map(|(device, _)| device)
    }

    /// As [`Device::connect`], with other fields in the Hello; gives the fields of Welcome as well.
    ///
    /// # Errors
    /// As [`Device::connect`].
    pub async fn connect_with(url: &str, token: &str, hello: Value) -> Result<(Self, Value)> {
        let mut device = Self::open(url, token).await?;
        device.send(&json!({ "hello": hello })).await?;
        match device.next(PATIENCE).await? {
            Incoming::Welcome(welcome) => Ok((device, welcome)),
            other => bail!("expected welcome, got {other:?}"),
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// Returns an error if the connection is broken.
    pub async fn send(&mut self, frame: &Value) -> Result<()> {
        Ok(self.socket.send(Frame::text(frame.to_string())).await?)
    }

    /// Acknowledges everything up to `seq`, in the generation of the last frame that was read.
    ///
    /// # Errors
    /// Returns an error if the connection is broken.
    pub async fn ack(&mut self, seq: u64) -> Result<()> {
        self.send(&json!({ "ack": { "seq": seq, "generation": self.generation } })).await
    }

    /// The next frame.
    ///
    /// # Errors
    /// Returns an error if there is none within `limit`, or it is not a frame of the protocol.
    pub async fn next(&mut self, limit: Duration) -> Result<Incoming> {
        self.next_before(Instant::now() + limit)
            .await?
            .with_context(|| format!("no frame within {limit:?}"))
    }

    /// The next message; other frames are dropped.
    ///
    /// # Errors
    /// Returns an error if there is none in time, or the connection ends.
    pub async fn message(&mut self) -> Result<Delivered> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next_before(deadline).await? {
                Some(Incoming::Message(message)) => return Ok(message),
                Some(Incoming::Closed(code, reason)) => {
                    bail!("closed with {code} ({reason}) instead of a message")
                }
                Some(_) => {}
                None => bail!("no message within {PATIENCE:?}"),
            }
        }
    }

    /// The ids of the next `count` messages. Each is acknowledged.
    ///
    /// # Errors
    /// As [`Device::message`], or if a position is not above the one before.
    pub async fn receive(&mut self, count: usize) -> Result<Vec<String>> {
        let mut ids = Vec::with_capacity(count);
        let mut last = None;
        for _ in 0..count {
            let message = self.message().await.with_context(|| format!("after {ids:?}"))?;
            if let Some(last) = last.filter(|last| message.seq <= *last) {
                bail!("seq {} came after {last}", message.seq);
            }
            last = Some(message.seq);
            self.ack(message.seq).await?;
            ids.push(message.id);
        }
        Ok(ids)
    }

    /// Waits until the connection ends, and gives the close code; frames are dropped.
    ///
    /// # Errors
    /// Returns an error if the connection is still open after `limit`.
    pub async fn closed(&mut self, limit: Duration) -> Result<u16> {
        let deadline = Instant::now() + limit;
        loop {
            match self.next_before(deadline).await? {
                Some(Incoming::Closed(code, _)) => return Ok(code),
                Some(_) => {}
                None => bail!("still open after {limit:?}"),
            }
        }
    }

    /// Waits for `time`, in which no message may come and the connection may not end.
    ///
    /// # Errors
    /// Returns an error with what happened.
    pub async fn expect_silence(&mut self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        while let Some(incoming) = self.next_before(deadline).await? {
            if matches!(incoming, Incoming::Message(_) | Incoming::Closed(..)) {
                bail!("expected silence, got {incoming:?}");
            }
        }
        Ok(())
    }

    /// Closes with a Close frame.
    ///
    /// # Errors
    /// Returns an error if the connection was broken before.
    pub async fn close(mut self) -> Result<()> {
        Ok(self.socket.close(None).await?)
    }

    async fn next_before(&mut self, deadline: Instant) -> Result<Option<Incoming>> {
        loop {
            if let Some(incoming) = self.waiting.pop_front() {
                let of = |fields: &Value| fields["generation"].as_u64().unwrap_or_default();
                match &incoming {
                    Incoming::Welcome(welcome) => self.generation = of(&welcome["positions"][0]),
                    Incoming::Skip(skip) => self.generation = of(skip),
                    Incoming::Message(message) if message.mailbox.is_empty() => {
                        self.generation = message.generation;
                    }
                    _ => (),
                }
                return Ok(Some(incoming));
            }
            let Ok(frame) = timeout_at(deadline, self.socket.next()).await else { return Ok(None) };
            match frame {
                Some(Ok(Frame::Text(text))) => self.read(&text)?,
                Some(Ok(Frame::Binary(_))) => bail!("a binary frame on barid.v1.json"),
                Some(Ok(Frame::Close(close))) => {
                    let (code, reason) = close
                        .map_or((1005, String::new()), |c| (c.code.into(), c.reason.to_string()));
                    self.waiting.push_back(Incoming::Closed(code, reason));
                }
                // tungstenite answers pings while it is read.
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    self.waiting.push_back(Incoming::Closed(1006, error.to_string()));
                }
                None => self.waiting.push_back(Incoming::Closed(1006, "end of stream".into())),
            }
        }
    }

    fn read(&mut self, text: &str) -> Result<()> {
        let frame: Value = serde_json::from_str(text).with_context(|| text.to_owned())?;
        let object = frame.as_object().filter(|o| o.len() == 1);
        let (kind, fields) =
            object.and_then(|o| o.iter().next()).with_context(|| format!("not one key: {text}"))?;
        match kind.as_str() {
            "welcome" => self.waiting.push_back(Incoming::Welcome(fields.clone())),
            "skip" => self.waiting.push_back(Incoming::Skip(fields.clone())),
            "deliver" => {
                let messages = fields["messages"].as_array();
                let mailbox = fields["mailbox"].as_str().unwrap_or_default();
                let generation = fields["generation"].as_u64().unwrap_or_default();
                for message in messages.with_context(|| format!("no messages: {text}"))? {
                    let message = delivered(mailbox, generation, message)?;
                    self.waiting.push_back(Incoming::Message(message));
                }
            }
            other => self.waiting.push_back(Incoming::Other(other.into(), fields.clone())),
        }
        Ok(())
    }
}

fn delivered(mailbox: &str, generation: u64, message: &Value) -> Result<Delivered> {
    let mut fields =
        message.as_object().with_context(|| format!("not a message: {message}"))?.clone();
    let seq = fields.remove("seq").and_then(|v| v.as_u64());
    let id = fields.remove("id").and_then(|v| v.as_str().map(str::to_owned));
    Ok(Delivered {
        mailbox: mailbox.to_owned(),
        generation,
        seq: seq.with_context(|| format!("no seq: {message}"))?,
        id: id.with_context(|| format!("no id: {message}"))?,
        body: Value::Object(fields),
        at: Instant::now(),
    })
}

/// An attempt number for a Hello: greater than all before, as those of a device must be. Tests reconnect
/// within a millisecond, so the clock alone does not do.
pub fn next_attempt() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let now = u64::try_from(now).unwrap_or(u64::MAX);
    let next = |last: u64| Some(now.max(last + 1));
    let last = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    now.max(last.unwrap_or_default() + 1)
}
