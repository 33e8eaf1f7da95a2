//! A device that speaks `barid.v1.json` and does exactly what a test tells it: nothing is
//! acknowledged, answered or reconnected behind the test's back.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// How long a device waits for what must come, on a machine that runs other tests as well.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// What the node sent.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// `welcome`, with its fields.
    Welcome(Value),
    /// One message out of a `deliver`.
    Message(Delivered),
    /// `skip`, with its fields.
    Skip(Value),
    /// Another frame: its kind and fields.
    Other(String, Value),
    /// The connection is closed: code (1006 where none was sent) and reason.
    Closed(u16, String),
}

/// A message as the device got it.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivered {
    /// The group that it is for, `everyone`, or empty: the user.
    pub mailbox: String,
    /// How often the device's cursor was reset before it was sent.
    pub generation: u64,
    /// Position in the mailbox.
    pub seq: u64,
    /// The business's id.
    pub id: String,
    /// The body by its kind: `{"text": …}`, `{"json": …}` or `{"data": …}`.
    pub body: Value,
    /// When it was read off the socket.
    pub at: Instant,
}

/// A connected device.
#[derive(Debug)]
pub struct Device {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    waiting: std::collections::VecDeque<Heard>,
    /// Of the last frame that the test saw.
    generation: u64,
}

impl Device {
    /// Opens a WebSocket to `url` (`ws://…/v1/connect`) with `token` and says nothing yet.
    ///
    /// # Errors
    /// The handshake is refused; the message holds the status.
    pub async fn open(url: &str, token: &str) -> Result<Self> {
        let mut request = url.into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("sec-websocket-protocol", HeaderValue::from_static("barid.v1.json"));
        headers.insert("authorization", format!("Bearer {token}").parse()?);
        let opened = tokio::time::timeout(PATIENCE, connect_async(request)).await;
        let (socket, _) = opened.context("handshake takes too long")??;
        Ok(Self { socket, waiting: Default::default(), generation: 0 })
    }

    /// Opens, says Hello as `device` and waits for Welcome.
    ///
    /// # Errors
    /// The handshake is refused, or something else than Welcome comes.
    pub async fn connect(url: &str, token: &str, device: &str) -> Result<Self> {
        Self::connect_with(url, token, json!({ "device": device })).await.map(|(device, _)| device)
    }

    /// As [`Device::connect`] with a Hello of one's own; gives the Welcome as well.
    ///
    /// # Errors
    /// As [`Device::connect`].
    pub async fn connect_with(url: &str, token: &str, hello: Value) -> Result<(Self, Value)> {
        let mut device = Self::open(url, token).await?;
        device.send(&json!({ "hello": hello })).await?;
        match device.next(PATIENCE).await? {
            Heard::Welcome(welcome) => Ok((device, welcome)),
            other => bail!("expected welcome, got {other:?}"),
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The connection is broken.
    pub async fn send(&mut self, frame: &Value) -> Result<()> {
        Ok(self.socket.send(Frame::text(frame.to_string())).await?)
    }

    /// Acknowledges everything up to `seq`, in the generation of the last frame that was read.
    ///
    /// # Errors
    /// The connection is broken.
    pub async fn ack(&mut self, seq: u64) -> Result<()> {
        self.send(&json!({ "ack": { "seq": seq, "generation": self.generation } })).await
    }

    /// What comes next.
    ///
    /// # Errors
    /// Nothing comes within `limit`, or what comes is not a frame of the protocol.
    pub async fn next(&mut self, limit: Duration) -> Result<Heard> {
        self.next_before(Instant::now() + limit)
            .await?
            .with_context(|| format!("the device heard nothing for {limit:?}"))
    }

    /// The next message, passing over skips and repeated Welcomes.
    ///
    /// # Errors
    /// Nothing comes, or the connection closes.
    pub async fn message(&mut self) -> Result<Delivered> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next_before(deadline).await? {
                Some(Heard::Message(message)) => return Ok(message),
                Some(Heard::Closed(code, reason)) => {
                    bail!("closed with {code} ({reason}) instead of a message")
                }
                Some(_) => {}
                None => bail!("no message within {PATIENCE:?}"),
            }
        }
    }

    /// The ids of the next `count` messages, each acknowledged as it comes.
    ///
    /// # Errors
    /// As [`Device::message`]; or the order has a gap or a repeat.
    pub async fn take(&mut self, count: usize) -> Result<Vec<String>> {
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

    /// Waits for the connection's end, passing over everything else; gives the close code.
    ///
    /// # Errors
    /// It is still open after `limit`.
    pub async fn closed(&mut self, limit: Duration) -> Result<u16> {
        let deadline = Instant::now() + limit;
        loop {
            match self.next_before(deadline).await? {
                Some(Heard::Closed(code, _)) => return Ok(code),
                Some(_) => {}
                None => bail!("still open after {limit:?}"),
            }
        }
    }

    /// Fails if a message or a close comes within `time`.
    ///
    /// # Errors
    /// Says what came.
    pub async fn silent(&mut self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        while let Some(heard) = self.next_before(deadline).await? {
            if matches!(heard, Heard::Message(_) | Heard::Closed(..)) {
                bail!("expected silence, got {heard:?}");
            }
        }
        Ok(())
    }

    /// Goes away without a word, as a phone in a tunnel whose operator resets the connection.
    pub fn vanish(self) {}

    /// Closes in good order.
    ///
    /// # Errors
    /// The connection was broken before.
    pub async fn close(mut self) -> Result<()> {
        Ok(self.socket.close(None).await?)
    }

    async fn next_before(&mut self, deadline: Instant) -> Result<Option<Heard>> {
        loop {
            if let Some(heard) = self.waiting.pop_front() {
                let of = |fields: &Value| fields["generation"].as_u64().unwrap_or_default();
                match &heard {
                    Heard::Welcome(welcome) => self.generation = of(&welcome["positions"][0]),
                    Heard::Skip(skip) => self.generation = of(skip),
                    Heard::Message(message) if message.mailbox.is_empty() => {
                        self.generation = message.generation;
                    }
                    _ => (),
                }
                return Ok(Some(heard));
            }
            let Ok(frame) = timeout_at(deadline, self.socket.next()).await else { return Ok(None) };
            match frame {
                Some(Ok(Frame::Text(text))) => self.read(&text)?,
                Some(Ok(Frame::Binary(_))) => bail!("a binary frame on barid.v1.json"),
                Some(Ok(Frame::Close(close))) => {
                    let (code, reason) = close
                        .map_or((1005, String::new()), |c| (c.code.into(), c.reason.to_string()));
                    self.waiting.push_back(Heard::Closed(code, reason));
                }
                // tungstenite answers pings while it is read.
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    self.waiting.push_back(Heard::Closed(1006, error.to_string()));
                }
                None => self.waiting.push_back(Heard::Closed(1006, "end of stream".into())),
            }
        }
    }

    fn read(&mut self, text: &str) -> Result<()> {
        let frame: Value = serde_json::from_str(text).with_context(|| text.to_owned())?;
        let object = frame.as_object().filter(|o| o.len() == 1);
        let (kind, fields) =
            object.and_then(|o| o.iter().next()).with_context(|| format!("not one key: {text}"))?;
        match kind.as_str() {
            "welcome" => self.waiting.push_back(Heard::Welcome(fields.clone())),
            "skip" => self.waiting.push_back(Heard::Skip(fields.clone())),
            "deliver" => {
                let messages = fields["messages"].as_array();
                let mailbox = fields["mailbox"].as_str().unwrap_or_default();
                let generation = fields["generation"].as_u64().unwrap_or_default();
                for message in messages.with_context(|| format!("no messages: {text}"))? {
                    let message = delivered(mailbox, generation, message)?;
                    self.waiting.push_back(Heard::Message(message));
                }
            }
            other => self.waiting.push_back(Heard::Other(other.into(), fields.clone())),
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
