//! `barid inspect`: the state of a user or a group in Redis, without changing it.

use std::process::ExitCode;

use anyhow::Context as _;
use barid_core::{AppId, Audience, AudienceKey, NodeId, Seq, UserId};
use barid_mailbox::{Contents, DeviceState, Inspection, Mailbox, RedisConfig, Route, UserKey};
use barid_wire::envelope::{self, BodyKind, SkipReason};
use serde::Serialize;

use crate::output::{Output, Tone, bytes, clean, span};
use crate::values::RedisArgs;

/// Options of `barid inspect user`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The user
    pub user: UserId,
    /// App
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
    #[command(flatten)]
    pub redis: RedisArgs,
}

/// Options of `barid inspect group`.
#[derive(Debug, clap::Args)]
pub struct GroupArgs {
    /// The group; `everyone`: all devices of the app
    pub group: Audience,
    /// App
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
    #[command(flatten)]
    pub redis: RedisArgs,
}

#[derive(Serialize)]
struct Group<'a> {
    app: &'a str,
    group: &'a str,
    #[serde(flatten)]
    mailbox: Kept,
    now_ms: u64,
    nodes: Vec<Listed<'a>>,
    entries: Vec<Entry>,
}

/// What a mailbox holds.
#[derive(Serialize)]
struct Kept {
    shard: u16,
    epoch: u64,
    oldest: u64,
    newest: u64,
    kept: u64,
    bytes: u64,
}

/// An access node with members.
#[derive(Serialize)]
struct Listed<'a> {
    node: &'a str,
    confirmed_ms: u64,
}

#[derive(Serialize)]
struct User<'a> {
    app: &'a str,
    user: &'a str,
    #[serde(flatten)]
    mailbox: Kept,
    timer_due_ms: Option<u64>,
    now_ms: u64,
    devices: Vec<Device<'a>>,
    entries: Vec<Entry>,
}

#[derive(Serialize)]
struct Device<'a> {
    device: &'a str,
    seq: u64,
    generation: u32,
    behind: u64,
    resends: u32,
    due_ms: Option<u64>,
    used_ms: u64,
    online: bool,
    session: Option<String>,
    platform: Option<&'a str>,
}

#[derive(Serialize)]
struct Entry {
    seq: u64,
    id: String,
    kind: &'static str,
    stored_bytes: usize,
    raw_bytes: usize,
    device: Option<String>,
    accepted_at_ms: u64,
    ttl_ms: Option<u64>,
}

/// Prints the state of a user.
pub async fn user(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let config = args.redis.needed()?;
    let shown = config.url.to_string();
    let key = UserKey { app: args.app, user: args.user };
    let found =
        read(&config, &key).await.with_context(|| format!("cannot read Redis at {shown}"))?;
    let user = describe(&key, &found);
    if out.is_json() {
        out.object(&user)?;
    } else {
        show(&user, out)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the state of a group, or of everyone.
pub async fn group(args: GroupArgs, out: Output) -> anyhow::Result<ExitCode> {
    let config = args.redis.needed()?;
    let shown = config.url.to_string();
    let key = AudienceKey { app: args.app, audience: args.group };
    let reading = async {
        let mailbox = Mailbox::open(&config, &barid_runtime::Context::new().metrics).await?;
        anyhow::Ok(mailbox.inspect_audience(&key).await?)
    };
    let found = reading.await.with_context(|| format!("cannot read Redis at {shown}"))?;
    let group = Group {
        app: key.app.as_str(),
        group: key.audience.as_str(),
        mailbox: kept(&found.mailbox),
        now_ms: found.mailbox.now_ms,
        nodes: found.nodes.iter().map(listed).collect(),
        entries: found.mailbox.entries.iter().filter_map(entry).collect(),
    };
    if out.is_json() {
        out.object(&group)?;
    } else {
        show_group(&group, out)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the state of a user.
pub async fn read(config: &RedisConfig, key: &UserKey) -> anyhow::Result<Inspection> {
    let mailbox = Mailbox::open(config, &barid_runtime::Context::new().metrics).await?;
    Ok(mailbox.inspect(key).await?)
}

fn describe<'a>(key: &'a UserKey, found: &'a Inspection) -> User<'a> {
    let known = found.devices.iter().map(|state| {
        let route = found.routes.iter().find(|route| route.device == state.device);
        device(state, route, found.newest)
    });
    User {
        app: key.app.as_str(),
        user: key.user.as_str(),
        mailbox: kept(found),
        timer_due_ms: found.timer_due_ms,
        now_ms: found.now_ms,
        devices: known.collect(),
        entries: found.entries.iter().filter_map(entry).collect(),
    }
}

fn listed((node, confirmed_ms): &(NodeId, u64)) -> Listed<'_> {
    Listed { node: node.as_str(), confirmed_ms: *confirmed_ms }
}

fn kept(mailbox: &Contents) -> Kept {
    let (oldest, newest) = (mailbox.oldest.0, mailbox.newest.0);
    Kept {
        shard: mailbox.shard.get(),
        epoch: mailbox.epoch.0,
        oldest,
        newest,
        kept: (newest + 1).saturating_sub(oldest),
        bytes: mailbox.bytes,
    }
}

fn device<'a>(state: &'a DeviceState, route: Option<&'a Route>, newest: Seq) -> Device<'a> {
    Device {
        device: state.device.as_str(),
        seq: state.cursor.seq.0,
        generation: state.cursor.generation.0,
        behind: newest.0.saturating_sub(state.cursor.seq.0),
        resends: state.resends,
        due_ms: (state.due_ms > 0).then_some(state.due_ms),
        used_ms: state.used_ms,
        online: route.is_some(),
        session: route.map(|route| route.session.to_string()),
        platform: route.map(|route| &*route.platform),
    }
}

fn entry(stored: &bytes::Bytes) -> Option<Entry> {
    let stored_bytes = stored.len();
    let (header, envelope) = envelope::decode(stored.clone()).ok()?;
    let raw =
        if envelope.raw_bytes > 0 { envelope.raw_bytes as usize } else { envelope.payload.len() };
    let kind = match (envelope.voided(), envelope.kind()) {
        (SkipReason::Unspecified, BodyKind::Text) => "text",
        (SkipReason::Unspecified, BodyKind::Json) => "json",
        (SkipReason::Unspecified, BodyKind::Data) => "data",
        _ => "voided",
    };
    Some(Entry {
        seq: header.seq.0,
        kind,
        stored_bytes,
        raw_bytes: raw,
        device: (!envelope.device.is_empty()).then_some(envelope.device),
        accepted_at_ms: header.accepted_at_us / 1000,
        ttl_ms: (envelope.ttl_ms > 0).then_some(envelope.ttl_ms),
        id: envelope.id,
    })
}

fn show(user: &User<'_>, out: Output) -> anyhow::Result<()> {
    let place =
        out.paint(Tone::Faint, format_args!("in {}, shard {}", user.app, user.mailbox.shard));
    out.line(format_args!("{}  {place}", out.paint(Tone::Strong, clean(user.user))))?;
    if user.mailbox.epoch == 0 {
        out.line("no data for this user")?;
        return Ok(());
    }
    out.line(format_args!("mailbox  {}", shown_kept(&user.mailbox)))?;
    out.line(format_args!("timer    {}", timer(user)))?;
    show_devices(user, out)?;
    show_entries(&user.entries, user.now_ms, out)
}

fn show_group(group: &Group<'_>, out: Output) -> anyhow::Result<()> {
    let place =
        out.paint(Tone::Faint, format_args!("in {}, shard {}", group.app, group.mailbox.shard));
    out.line(format_args!("{}  {place}", out.paint(Tone::Strong, clean(group.group))))?;
    if group.mailbox.epoch == 0 {
        out.line("mailbox  empty")?;
    } else {
        out.line(format_args!("mailbox  {}", shown_kept(&group.mailbox)))?;
    }
    if group.nodes.is_empty() {
        out.line("nodes    none has members")?;
    }
    for (at, node) in group.nodes.iter().enumerate() {
        let title = if at == 0 { "nodes" } else { "" };
        let ago = span(group.now_ms.saturating_sub(node.confirmed_ms));
        let ago = out.paint(Tone::Faint, format_args!("confirmed {ago} ago"));
        out.line(format_args!("{title:<7}  {}  {ago}", clean(node.node)))?;
    }
    show_entries(&group.entries, group.now_ms, out)
}

fn shown_kept(Kept { kept, oldest, newest, bytes: size, .. }: &Kept) -> String {
    match kept {
        0 => format!("empty; the newest was #{newest}"),
        1 => format!("1 entry (#{newest}), {}", bytes(*size)),
        n => format!("{n} entries (#{oldest} to #{newest}), {}", bytes(*size)),
    }
}

fn timer(user: &User<'_>) -> String {
    match user.timer_due_ms {
        None => "not armed".into(),
        Some(due) if due >= user.now_ms => format!("due in {}", span(due - user.now_ms)),
        Some(due) => format!("overdue by {}", span(user.now_ms - due)),
    }
}

fn show_devices(user: &User<'_>, out: Output) -> anyhow::Result<()> {
    if user.devices.is_empty() {
        out.line("\nno device is known")?;
        return Ok(());
    }
    let heading = format!("\n{:<16} {:>7} {:>7} {:>9}  ", "device", "cursor", "behind", "re-sends");
    out.line(out.paint(Tone::Faint, heading + "state"))?;
    for device in &user.devices {
        let state = match &device.session {
            Some(session) => {
                let platform = device.platform.unwrap_or_default();
                let place = out.paint(Tone::Faint, format_args!("{session} {}", clean(platform)));
                format!("{}  {place}", out.paint(Tone::Good, "online"))
            }
            None => {
                let ago = span(user.now_ms.saturating_sub(device.used_ms));
                format!("offline  {}", out.paint(Tone::Faint, format_args!("seen {ago} ago")))
            }
        };
        let (name, cursor) = (clean(device.device), format!("#{}", device.seq));
        let numbers = format!("{cursor:>7} {:>7} {:>9}", device.behind, device.resends);
        out.line(format_args!("{name:<16} {numbers}  {state}"))?;
    }
    Ok(())
}

fn show_entries(entries: &[Entry], now_ms: u64, out: Output) -> anyhow::Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    let heading = format!("\n{:<8} {:<24} {:<6} {:>10}  ", "entry", "id", "kind", "size");
    out.line(out.paint(Tone::Faint, heading + "waits since"))?;
    for entry in entries {
        let age = span(now_ms.saturating_sub(entry.accepted_at_ms));
        let only = entry.device.as_deref().map(|d| format!("  only for {}", clean(d)));
        out.line(format_args!(
            "{:<8} {:<24} {:<6} {:>10}  {age}{}",
            format!("#{}", entry.seq),
            clean(&entry.id),
            entry.kind,
            bytes(entry.raw_bytes as u64),
            only.unwrap_or_default(),
        ))?;
    }
    Ok(())
}
