//! `barid listen`: a device that uses the SDK.

mod skips;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use barid_client::{
    AckHandle, Body, Client, Closed, Deliveries, Delivery, Event, FileStore, InvalidBuilder,
    Message,
};
use barid_core::{AppId, DeviceId, GroupId, UserId};
use barid_runtime::SecretUrl;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

use self::skips::Skips;
use crate::output::{Coded, Output, Tone, clean, clock, span};
use crate::token::{Holder, sign};
use crate::values::{self, KeyArgs, now_ms};

/// Unacknowledged messages at once with `--no-ack`.
const HELD_MAX: usize = 10_000;
/// How often it is said that the cluster does not answer.
const SILENCE: Duration = Duration::from_secs(2);
/// A skip waits for the messages before it; after this time without one, they were messages that the SDK does not show.
const SKIPS_WAIT: Duration = Duration::from_secs(1);
/// The time to live of the tokens that this command signs.
const TOKEN_TTL: Duration = Duration::from_secs(3600);

/// Options of `barid listen`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("who").required(true).multiple(true).args(["user", "token"]))]
pub struct Args {
    /// App
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
    /// User; not needed with --token
    #[arg(long)]
    pub user: Option<UserId>,
    /// Device; a second session of the same device replaces the first
    #[arg(long, default_value = "terminal")]
    pub device: DeviceId,
    /// URL for devices: ws://HOST:PORT
    #[arg(long, env = "BARID_URL")]
    pub url: Option<String>,
    /// Trust only servers with a certificate in this file, or one signed by these (PEM)
    #[arg(long, env = "BARID_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<std::path::PathBuf>,
    /// Subscribe to this group as well; may be repeated
    #[arg(long = "group", value_name = "GROUP")]
    pub groups: Vec<GroupId>,
    /// Token; without it, the command signs one with the secret
    #[arg(long, env = "BARID_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    #[command(flatten)]
    pub key: KeyArgs,
    /// Acknowledge nothing, to see messages sent again
    #[arg(long)]
    pub no_ack: bool,
    /// Stop after N messages
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 53))]
    pub count: Option<u64>,
    /// Stop after this time: 30s, 15m; the exit code is 3 if fewer than --count messages have arrived
    #[arg(long = "for", value_name = "TIME", value_parser = values::positive_duration)]
    pub period: Option<Duration>,
    /// Save the position in this file, instead of relying on the position in the cluster
    #[arg(long, value_name = "FILE")]
    pub position_file: Option<std::path::PathBuf>,
}

#[derive(Serialize)]
struct Received<'a> {
    event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<&'a str>,
    seq: u64,
    id: &'a str,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    json: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    received_at_ms: u64,
}

/// Prints messages until the count, the time, a signal, or the end of the client.
pub async fn run(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let (events, reported) = mpsc::channel(1024);
    let at_once = if args.no_ack { HELD_MAX } else { 1 };
    let (client, deliveries) = builder(&args)?
        .on_event(move |event| {
            // A blocked terminal must not block the connection.
            let _ = events.try_send(event);
        })
        .open(at_once)
        .map_err(|error| invalid(error, &args))?;
    let result = show(&args, &client, deliveries, reported, out).await;
    let closed = client.shutdown().await;
    let seen = result?;
    match closed {
        Closed::Shutdown => seen.verdict(&args),
        Closed::Refused(why) => bail!("the cluster refused this device: {why}"),
        Closed::Failed(why) => bail!("the client failed: {why}"),
    }
}

fn builder(args: &Args) -> anyhow::Result<barid_client::Builder> {
    let builder = Client::builder(values::url(args.url.clone())?)
        .device(args.device.as_str())
        .platform("terminal");
    let builder = args.groups.iter().fold(builder, |builder, group| builder.group(group.as_str()));
    let builder = match &args.ca_file {
        Some(file) => builder.root_certificates(values::content("--ca-file", file)?),
        None => builder,
    };
    let builder = match &args.position_file {
        Some(file) => builder.positions(FileStore::new(file)),
        None => builder,
    };
    if let Some(token) = args.token.clone() {
        return Ok(builder.token(move || std::future::ready(Ok(token.as_str().into()))));
    }
    let Some(user) = args.user.clone() else { bail!("give --user or --token") };
    let holder = Holder { app: args.app.clone(), user, device: None, groups: args.groups.clone() };
    let key = Arc::new(args.key.key()?);
    Ok(builder.token(move || {
        let token = sign(&key, &holder, TOKEN_TTL);
        std::future::ready(token.map(|(token, _)| token.into()).map_err(Into::into))
    }))
}

/// The option that the SDK refuses, and what to write. A URL may hold a password.
fn invalid(error: InvalidBuilder, args: &Args) -> Coded {
    let file = |file: &Option<std::path::PathBuf>| {
        file.as_ref().map_or(String::new(), |file| file.display().to_string())
    };
    Coded::config(match error {
        InvalidBuilder::Url { url, problem } => {
            let shown =
                if url.contains("://") { format!(" {}", SecretUrl::new(url)) } else { "".into() };
            format!("--url{shown}: {problem}; write ws://HOST:PORT, or wss://HOST with TLS")
        }
        InvalidBuilder::Certificates(why) => {
            format!("--ca-file {}: {why}; name a file of certificates in PEM", file(&args.ca_file))
        }
        InvalidBuilder::Store(error) => {
            let file = file(&args.position_file);
            format!("--position-file {file}: cannot be read: {error}; remove it, or name another")
        }
        other => other.to_string(),
    })
}

/// How a session went.
#[derive(Default)]
struct Seen {
    messages: u64,
    connected: bool,
}

impl Seen {
    fn verdict(&self, args: &Args) -> anyhow::Result<ExitCode> {
        match (args.count, self.connected) {
            (Some(count), true) if self.messages < count => {
                bail!(Coded::cut(format!("{} of {count} messages have arrived", self.messages)))
            }
            (_, true) => Ok(ExitCode::SUCCESS),
            (_, false) => bail!(Coded::away("the cluster has not answered")),
        }
    }
}

/// Prints until the count, the time, a signal, or the end of the client.
async fn show(
    args: &Args,
    client: &Client,
    mut deliveries: Deliveries,
    mut reported: mpsc::Receiver<Event>,
    out: Output,
) -> anyhow::Result<Seen> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut over = std::pin::pin!(tokio::time::sleep(args.period.unwrap_or(Duration::MAX)));
    let count = args.count.unwrap_or(u64::MAX);
    let mut seen = Seen::default();
    let mut held: Vec<AckHandle> = Vec::new();
    // When the attempt began that has not been answered.
    let mut waiting: Option<Instant> = None;
    let mut silence = interval(SILENCE);
    silence.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut skips = Skips::default();
    let mut skips_over = std::pin::pin!(tokio::time::sleep(SKIPS_WAIT));
    while seen.messages < count {
        tokio::select! {
            biased;
            Some(event) = reported.recv() => {
                match &event {
                    Event::Connecting { .. } => {
                        waiting = Some(Instant::now());
                        silence.reset();
                    }
                    Event::Connected { .. } => (waiting, seen.connected) = (None, true),
                    Event::Disconnected { .. } => waiting = None,
                    _ => {}
                }
                skips_over.as_mut().reset(Instant::now() + SKIPS_WAIT);
                print_events(skips.event(event), out)?;
            }
            Some(Delivery { message, ack }) = deliveries.next() => {
                // A group has positions of its own.
                let seq = message.group.is_none().then_some(message.seq.0);
                print_events(seq.map(|seq| skips.before(seq)).unwrap_or_default(), out)?;
                show_message(&message, out)?;
                print_events(seq.map(|seq| skips.after(seq)).unwrap_or_default(), out)?;
                skips_over.as_mut().reset(Instant::now() + SKIPS_WAIT);
                seen.messages += 1;
                if args.no_ack { held.push(ack) } else { ack.ack() }
            }
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            _ = hangup.recv() => break,
            () = &mut over => break,
            _ = silence.tick(), if waiting.is_some() => {
                print_silence(waiting.map_or(Duration::ZERO, |since| since.elapsed()), out)?;
            }
            () = &mut skips_over, if skips.are_held() => print_events(skips.all(), out)?,
            _ = client.closed() => break,
        }
    }
    while let Ok(event) = reported.try_recv() {
        seen.connected |= matches!(event, Event::Connected { .. });
        print_events(skips.event(event), out)?;
    }
    print_events(skips.all(), out)?;
    Ok(seen)
}

fn print_events(events: Vec<Event>, out: Output) -> anyhow::Result<()> {
    events.iter().try_for_each(|event| print_event(event, out))
}

/// A node answers a Hello once it has read the device's mailbox.
fn print_silence(since: Duration, out: Output) -> anyhow::Result<()> {
    let for_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    out.either(&serde_json::json!({"event": "waiting", "for_ms": for_ms}), || {
        let time = out.paint(Tone::Faint, clock(now_ms()));
        let text = format!("no answer for {}; the node may be waiting for Redis", span(for_ms));
        format!("{time}  {}", out.paint(Tone::Warn, text))
    })?;
    Ok(())
}

fn show_message(message: &Message, out: Output) -> anyhow::Result<()> {
    let received_at_ms = now_ms();
    let mut received = Received {
        event: "message",
        group: message.group.as_deref(),
        seq: message.seq.0,
        id: &message.id,
        kind: "text",
        text: None,
        json: None,
        data: None,
        received_at_ms,
    };
    match &message.body {
        Body::Text(text) => received.text = Some(text),
        Body::Json(json) => {
            received.kind = "json";
            // One object per line: JSON text may contain line breaks, which RawValue would keep.
            match serde_json::from_str::<&RawValue>(json) {
                Ok(raw) if !json.contains(['\n', '\r']) => received.json = Some(raw),
                _ => received.text = Some(json),
            }
        }
        Body::Data(data) => {
            received.kind = "data";
            received.data = Some(STANDARD.encode(data));
        }
    }
    out.either(&received, || {
        let time = out.paint(Tone::Faint, clock(received_at_ms));
        let seq = out.paint(Tone::Strong, format_args!("#{:<5}", message.seq));
        let id = format!("{:<16}", clean(&message.id));
        let group = message.group.as_deref();
        let group = group.map_or_else(String::new, |group| format!("[{}] ", clean(group)));
        format!("{time}  {seq} {group}{id}  {}", body(&message.body, out))
    })?;
    Ok(())
}

fn body(body: &Body, out: Output) -> String {
    match body {
        Body::Text(text) | Body::Json(text) => clean(text),
        Body::Data(data) => {
            let size = out.paint(Tone::Faint, format_args!("{} bytes", data.len()));
            let head = STANDARD.encode(&data[..data.len().min(24)]);
            format!("{size} {head}{}", if data.len() > 24 { "…" } else { "" })
        }
    }
}

/// An event as an object: its kind in `event`, and its fields.
fn object(event: &Event) -> serde_json::Value {
    use serde_json::json;
    match event {
        Event::Connecting { attempt } => json!({"event": "connecting", "attempt": attempt}),
        Event::Connected { session, position } => {
            json!({"event": "connected", "session": session, "seq": position.seq.0})
        }
        Event::Disconnected { why, retry_in } => json!({
            "event": "disconnected",
            "why": why.to_string(),
            "retry_in_ms": retry_in.map(|wait| wait.as_millis() as u64),
        }),
        Event::GoingAway { why, reconnect_after } => json!({
            "event": "going_away",
            "why": why,
            "reconnect_after_ms": reconnect_after.as_millis() as u64,
        }),
        Event::Skipped { first, last, why } => {
            json!({"event": "skipped", "first": first.0, "last": last.0, "why": why.as_str()})
        }
        Event::Reset { before, now } => {
            json!({"event": "reset", "before_seq": before.seq.0, "seq": now.seq.0})
        }
        Event::Duplicate { seq, id } => json!({"event": "duplicate", "seq": seq.0, "id": id}),
        Event::Subscribed { group } => json!({"event": "subscribed", "group": group}),
        Event::Unsubscribed { group, code, text } => {
            json!({"event": "unsubscribed", "group": group, "code": code, "why": text})
        }
        Event::Missed { group, count } => {
            json!({"event": "missed", "group": group.as_ref(), "count": count})
        }
        Event::TokenRefreshed => json!({"event": "token_refreshed"}),
        Event::TokenFailed { reason } => json!({"event": "token_failed", "why": reason}),
        Event::ServerError { code, text } => {
            json!({"event": "server_error", "code": code, "why": text})
        }
        Event::PositionNotSaved { reason } => {
            json!({"event": "position_not_saved", "why": reason})
        }
        other => json!({"event": "other", "why": format!("{other:?}")}),
    }
}

fn print_event(event: &Event, out: Output) -> anyhow::Result<()> {
    if out.is_json() {
        return Ok(out.object(&object(event))?);
    }
    let (tone, text) = match event {
        Event::Connecting { .. } | Event::TokenRefreshed => return Ok(()),
        Event::Connected { session, position } => (
            Tone::Good,
            match position.seq.0 {
                0 => format!("connected as session {}, nothing received yet", clean(session)),
                seq => format!("connected as session {}, received up to #{seq}", clean(session)),
            },
        ),
        Event::Disconnected { why, retry_in: Some(wait) } => {
            let wait = span(wait.as_millis() as u64);
            (Tone::Warn, format!("{}; reconnecting in {wait}", clean(&why.to_string())))
        }
        Event::Disconnected { retry_in: None, .. } => return Ok(()), // printed at the end
        Event::GoingAway { why, reconnect_after } => {
            let wait = span(reconnect_after.as_millis() as u64);
            (Tone::Warn, format!("asked to reconnect in {wait}: {}", clean(why)))
        }
        Event::Skipped { first, last, why } if first == last => {
            (Tone::Warn, format!("#{first} skipped: {}", why.as_str()))
        }
        Event::Skipped { first, last, why } => {
            (Tone::Warn, format!("#{first} to #{last} skipped: {}", why.as_str()))
        }
        Event::Reset { before, now } => {
            (Tone::Warn, format!("position reset: from #{} to #{}", before.seq, now.seq))
        }
        Event::Duplicate { seq, id } => {
            (Tone::Faint, format!("#{seq} {} was sent again", clean(id)))
        }
        Event::Subscribed { group } => (Tone::Good, format!("subscribed to {}", clean(group))),
        Event::Unsubscribed { group, code, text } => {
            (Tone::Warn, format!("not subscribed to {}: {code} {}", clean(group), clean(text)))
        }
        Event::Missed { group, count } => {
            (Tone::Warn, format!("{count} messages of {} were missed", clean(group)))
        }
        Event::ServerError { code, text } => (Tone::Bad, format!("{code} {}", clean(text))),
        Event::TokenFailed { reason } => (Tone::Bad, format!("no fresh token: {reason}")),
        Event::PositionNotSaved { reason } => (Tone::Bad, format!("position not saved: {reason}")),
        other => (Tone::Faint, format!("{other:?}")),
    };
    let time = out.paint(Tone::Faint, clock(now_ms()));
    out.line(format_args!("{time}  {}", out.paint(tone, text)))?;
    Ok(())
}
