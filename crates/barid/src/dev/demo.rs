//! The demonstration: a push to a device that is online, and a push to the same device while it is offline.
//! Both pass through Kafka and the SDK. Times are measured from just before the record is produced.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use barid_bus::{KafkaConfig, Producer};
use barid_client::{Client, Deliveries, Event, Position};
use barid_core::{AppId, MessageId, ReceiptSet, UserId};
use barid_mailbox::{RedisConfig, UserKey};
use barid_wire::record::{
    BodyKind, CONTENT_TYPE, Format, Push as Record, RecordLimits, encode_push,
};
use barid_wire::v1::ReceiptKind;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::inspect;
use crate::kafka_reader::Tail;
use crate::output::{Output, Tone, clean};
use crate::receipts;
use crate::token::{Holder, sign};
use crate::values::{KafkaArgs, Key, random_name};

/// An app of its own, so that the demonstration does not disturb other messages.
const APP: &str = "barid-demo";
const USER: &str = "alice";
const DEVICE: &str = "phone";
/// How long the device stays offline.
const AWAY: Duration = Duration::from_secs(1);
/// For each step of the demonstration.
const PATIENCE: Duration = Duration::from_secs(15);

struct Demo<'a> {
    kafka: &'a KafkaConfig,
    redis: &'a RedisConfig,
    url: &'a str,
    key: &'a Key,
    producer: Producer,
    receipts: Tail,
    out: Output,
}

/// The device.
struct Phone {
    client: Client,
    deliveries: Deliveries,
}

/// A push that was produced.
struct Push {
    id: String,
    text: &'static str,
    case: &'static str,
    began: Instant,
}

#[derive(Serialize)]
struct Step<'a> {
    event: &'static str,
    case: &'a str,
    step: &'a str,
    elapsed_ms: f64,
    detail: &'a str,
}

/// Runs the demonstration. An error names the step that failed.
pub async fn run(
    kafka: &KafkaConfig,
    redis: &RedisConfig,
    url: &str,
    key: &Key,
    out: Output,
) -> anyhow::Result<()> {
    let producer = Producer::new(kafka)?;
    let brokers = Some(kafka.brokers.join(","));
    let args = KafkaArgs { brokers, properties: Vec::new() };
    let receipts = Tail::open(&args, &kafka.topics.receipts, PATIENCE, true).await?;
    let demo = Demo { kafka, redis, url, key, producer, receipts, out };
    let phone = demo.online().await?;
    demo.away(phone).await
}

impl Demo<'_> {
    async fn online(&self) -> anyhow::Result<Phone> {
        self.heading("A push to a device that is online")?;
        let began = Instant::now();
        let (mut phone, position) = self.connect().await?;
        self.print_step(
            "online",
            "connected",
            began,
            &format!("{USER}'s {DEVICE}, over WebSocket, received up to #{}", position.seq),
        )?;
        let push = self.produce("online", "hello, you are online").await?;
        self.follow(&push, &mut phone, &["accepted", "received", "acked"]).await?;
        Ok(phone)
    }

    async fn away(&self, phone: Phone) -> anyhow::Result<()> {
        self.heading("The same device is offline")?;
        phone.client.shutdown().await;
        self.quiet_remark("offline", &format!("{USER}'s {DEVICE} has closed its connection"))?;
        let push = self.produce("offline", "hello, you were away").await?;
        self.follow_receipt(&push).await?;
        let kept = self.kept().await?;
        if kept == 0 {
            bail!("the mailbox holds nothing for the offline device");
        }
        self.remark("offline", &format!("{kept} held in the mailbox; no device is online"))?;
        sleep(AWAY.saturating_sub(push.began.elapsed())).await;
        let (mut phone, position) = self.connect().await?;
        let back = format!("{USER}'s {DEVICE} is back, received up to #{}", position.seq);
        self.print_step(push.case, "connected", push.began, &back)?;
        self.follow(&push, &mut phone, &["received", "acked"]).await?;
        phone.client.shutdown().await;
        match self.kept().await? {
            0 => self.quiet_remark("offline", "the mailbox is empty again"),
            n => bail!("the mailbox still holds {n} messages"),
        }
    }

    async fn connect(&self) -> anyhow::Result<(Phone, Position)> {
        let holder = Holder {
            app: AppId::new(APP)?,
            user: UserId::new(USER)?,
            device: None,
            groups: Vec::new(),
        };
        let (token, _) = sign(self.key, &holder, Duration::from_secs(3600))?;
        let (events, mut told) = mpsc::channel(64);
        let (client, deliveries) = Client::builder(self.url)
            .device(DEVICE)
            .token(move || std::future::ready(Ok(token.as_str().into())))
            .on_event(move |event| {
                let _ = events.try_send(event);
            })
            .open(1)?;
        let connected = async {
            while let Some(event) = told.recv().await {
                match event {
                    Event::Connected { position, .. } => return Ok(position),
                    Event::Disconnected { why, retry_in: None } => bail!("refused: {why}"),
                    _ => {}
                }
            }
            bail!("the client ended")
        };
        let position =
            timeout(PATIENCE, connected).await.context("the device cannot connect")??;
        Ok((Phone { client, deliveries }, position))
    }

    async fn produce(&self, case: &'static str, text: &'static str) -> anyhow::Result<Push> {
        let id = random_name("demo");
        let (app, user) = (AppId::new(APP)?, UserId::new(USER)?);
        let record = Record {
            receipts: ReceiptSet::ACCEPTED.with(ReceiptSet::ACKED),
            ..Record::new(MessageId::new(&id)?, app, user, BodyKind::Text, text)
        };
        let headers = [(CONTENT_TYPE, Format::Json.content_type().as_bytes())];
        let value = encode_push(&record, Format::Json, &RecordLimits::default())?;
        let topic = &self.kafka.topics.push;
        let push = Push { id, text, case, began: Instant::now() };
        self.producer
            .send(topic, USER.as_bytes(), value, &headers)
            .await
            .context("cannot produce to Kafka")?;
        let detail = format!("{} to Kafka topic {topic}", push.id);
        self.print_step(case, "produced", push.began, &detail)?;
        Ok(push)
    }

    /// Prints what happens to a push, until every one of `steps` has happened.
    async fn follow(&self, push: &Push, phone: &mut Phone, steps: &[&str]) -> anyhow::Result<()> {
        let mut left: Vec<&str> = steps.to_vec();
        while !left.is_empty() {
            let step = tokio::select! {
                step = self.receipt(push) => step?,
                step = self.received(push, phone) => step?,
                () = sleep(PATIENCE) => bail!("missing after {PATIENCE:?}: {}", left.join(", ")),
            };
            left.retain(|awaited| *awaited != step);
        }
        Ok(())
    }

    async fn follow_receipt(&self, push: &Push) -> anyhow::Result<()> {
        timeout(PATIENCE, self.receipt(push)).await.context("no accepted receipt")??;
        Ok(())
    }

    /// The next receipt of this push. Cancel-safe.
    async fn receipt(&self, push: &Push) -> anyhow::Result<&'static str> {
        loop {
            let receipt = self.receipts.next(receipts::decode).await?;
            if receipt.id != push.id {
                continue;
            }
            let kind = receipt.kind();
            let detail = match kind {
                ReceiptKind::Accepted => {
                    format!("receipt: in {USER}'s mailbox as #{}", receipt.seq)
                }
                ReceiptKind::Acked => {
                    format!(
                        "receipt: {}'s {} has handled #{}",
                        receipt.user, receipt.device, receipt.seq
                    )
                }
                _ => bail!("unexpected receipt: {} {}", kind.word(), receipt.reason),
            };
            self.print_step(push.case, kind.word(), push.began, &detail)?;
            return Ok(kind.word());
        }
    }

    /// Waits until the device receives the push. Cancel-safe.
    async fn received(&self, push: &Push, phone: &mut Phone) -> anyhow::Result<&'static str> {
        loop {
            let Some(delivery) = phone.deliveries.next().await else {
                bail!("the device's client was closed")
            };
            let is_it = delivery.message.id == push.id;
            if is_it {
                if delivery.message.body.as_bytes() != push.text.as_bytes() {
                    bail!("the device received a body that differs from what was sent");
                }
                let detail = format!("#{} \"{}\"", delivery.message.seq, clean(push.text));
                self.print_step(push.case, "received", push.began, &detail)?;
            }
            delivery.ack.ack();
            if is_it {
                return Ok("received");
            }
        }
    }

    async fn kept(&self) -> anyhow::Result<u64> {
        let key = UserKey { app: AppId::new(APP)?, user: UserId::new(USER)? };
        let found = inspect::read(self.redis, &key).await?;
        Ok((found.newest.0 + 1).saturating_sub(found.oldest.0))
    }

    fn heading(&self, text: &str) -> anyhow::Result<()> {
        if !self.out.is_json() {
            self.out.line(self.out.paint(Tone::Strong, text))?;
        }
        Ok(())
    }

    fn print_step(
        &self,
        case: &str,
        step: &str,
        began: Instant,
        detail: &str,
    ) -> anyhow::Result<()> {
        let elapsed_ms = (began.elapsed().as_secs_f64() * 1e4).round() / 10.0;
        let object = Step { event: "demo", case, step, elapsed_ms, detail };
        // The first screen of a terminal has no room for these.
        if !self.out.is_json()
            && matches!((case, step), ("online", "connected") | ("offline", "produced"))
        {
            return Ok(());
        }
        self.out.either(&object, || {
            let tone = if step == "acked" { Tone::Good } else { Tone::Strong };
            let step = self.out.paint(tone, format_args!("{step:<9}"));
            let time = self.out.paint(Tone::Faint, format_args!("{elapsed_ms:>8.1} ms"));
            format!("{time}  {step}  {detail}")
        })?;
        Ok(())
    }

    /// A remark that the first screen of a terminal has no room for.
    fn quiet_remark(&self, case: &str, detail: &str) -> anyhow::Result<()> {
        if self.out.is_json() { self.remark(case, detail) } else { Ok(()) }
    }

    fn remark(&self, case: &str, detail: &str) -> anyhow::Result<()> {
        #[derive(Serialize)]
        struct Remark<'a> {
            event: &'static str,
            case: &'a str,
            detail: &'a str,
        }
        let remark = Remark { event: "remark", case, detail };
        self.out.either(&remark, || format!("{:24}{}", "", self.out.paint(Tone::Faint, detail)))?;
        Ok(())
    }
}
