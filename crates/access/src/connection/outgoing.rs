//! The queue of frames to the device. Everything in it is written in one flush.

use std::task::{Context, Poll};

use barid_core::{AudienceKey, Seq};
use barid_mailbox::Page;
use barid_runtime::Hop;
use barid_wire::envelope::Envelope;
use barid_wire::frames::{Format, ServerFrame, encode_deliver, encode_server, join_delivers};
use barid_wire::v1;
use bytes::Bytes;

use crate::connection::codec::{Codec, message, refusal};
use crate::connection::state::{Connection, Out};
use crate::connection::trace::wrote;
use crate::fanout::{Begun, Read, Report};
use crate::frames::JOINED_BYTES_MAX;
use crate::socket::{self, Message};

/// What became of one run of messages of an audience.
enum Fanned {
    Written,
    /// Its log has left the session behind.
    Behind,
    /// The device is gone.
    Gone,
}

impl Connection {
    pub(super) fn welcome(&mut self) {
        let position = self.session.position();
        let limit = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        self.control(&ServerFrame::Welcome(v1::Welcome {
            session: self.node.sessions.reference(self.handle.connection).to_string(),
            ping_interval_ms: u32::from(self.codec.ping_interval) * 1000,
            max_frame_bytes: limit(self.node.policy.limits.frame_bytes_max),
            max_unacked: limit(self.node.policy.limits.unacked_max),
            positions: vec![v1::Position::new("", position)],
            server_time_ms: self.node.clock.now_ms(),
            ack_interval_ms: self.node.policy.settings.ack_interval_ms,
        }));
    }

    pub(super) fn control(&mut self, frame: &ServerFrame) {
        // Only bodies can fail to encode, and these frames have none.
        if let Ok(frame) = encode_server(self.codec.encoding, frame) {
            self.frame(frame);
        }
    }

    fn frame(&mut self, frame: Bytes) {
        self.out_bytes += frame.len();
        self.out.push_back(Out::Frame(frame));
    }

    pub(super) fn entries(&mut self, entries: Vec<Envelope>) {
        self.out_bytes += payload_bytes(&entries);
        self.out.push_back(Out::Entries(entries));
    }

    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>) -> bool {
        let mut busy = false;
        loop {
            while self.socket.has_room()
                && let Some(out) = self.out.pop_front()
            {
                if let Err(error) = self.feed(out) {
                    let close = refusal(&self.node.metrics, &error);
                    self.end(close);
                    return true;
                }
            }
            if self.socket.fed() == 0 {
                return busy;
            }
            match self.socket.poll_flush(cx) {
                Poll::Pending => return busy,
                Poll::Ready(Ok(())) => {
                    self.beat.written(self.node.clock.seconds());
                    busy = true;
                }
                Poll::Ready(Err(_)) => {
                    self.end(None);
                    return true;
                }
            }
        }
    }

    /// Tells the device of subscriptions that have begun. Returns whether there were any.
    pub(super) fn confirm_subscriptions(&mut self) -> bool {
        let mut any = false;
        while let Some(begun) = self.listener.confirmed() {
            any = true;
            self.begun(&begun);
        }
        any
    }

    fn begun(&mut self, Begun { audience, position }: &Begun) {
        self.control(&ServerFrame::Subscribed(v1::Subscribed {
            group: audience.to_string(),
            position: Some(v1::Position::new("", *position)),
        }));
    }

    /// Queues what a page of an audience's mailbox has for the device.
    pub(super) fn audience_page(&mut self, key: &AudienceKey, after: Seq, page: &Page) {
        let now_ms = self.node.clock.now_ms();
        let (entries, reset) = self.listener.page(&key.audience, after, page, now_ms);
        if let Some(begun) = reset {
            self.begun(&begun);
        }
        let Codec { encoding, zstd, .. } = self.codec;
        let format = Format::new(encoding, zstd);
        // A body that cannot be written in this encoding is left out, as in fan-out.
        let frames: Vec<Bytes> =
            entries.iter().filter_map(|entry| format.encode(entry).ok()).collect();
        self.node.metrics.delivered_fanout.inc_by(frames.len() as u64);
        let mut rest = &frames[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |frame: &&Bytes| {
                bytes += frame.len();
                bytes <= JOINED_BYTES_MAX
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (joined, later) = rest.split_at(count);
            self.frame(join_delivers(encoding, key.audience.as_str(), 0, joined));
            rest = later;
        }
    }

    /// Writes messages of audiences, once the queue is empty: while the socket is full, they stay in the audience's
    /// log. Returns whether it has queued frames, or has to read a mailbox.
    pub(super) fn poll_fanout(&mut self, cx: &mut Context<'_>) -> bool {
        let mut queued = false;
        while self.fanned_out && self.end.is_none() {
            if self.confirm_subscriptions() {
                return true;
            }
            if !self.is_flushed() {
                break;
            }
            let before = self.out.len();
            match self.write_fanout(cx) {
                Fanned::Written => (),
                Fanned::Behind => queued = true,
                Fanned::Gone => self.end(None),
            }
            queued |= self.out.len() > before;
        }
        queued
    }

    /// Writes one run of messages.
    fn write_fanout(&mut self, cx: &mut Context<'_>) -> Fanned {
        let format = Format::new(self.codec.encoding, self.codec.zstd);
        let Read { missed, behind, restart, begun, run, report } = self.listener.read(format);
        if missed > 0 {
            self.node.metrics.fanout_missed.inc_by(missed.into());
        }
        if behind {
            self.node.metrics.fanout_behind.inc();
            return Fanned::Behind;
        }
        if restart.is_some() {
            // The messages follow once the device has been told.
            begun.iter().for_each(|begun| self.begun(begun));
            return Fanned::Written;
        }
        let Some(run) = run else {
            self.fanned_out = false;
            return Fanned::Written;
        };
        if run.messages == 0 {
            return Fanned::Written;
        }
        self.node.metrics.delivered_fanout.inc_by(run.messages.into());
        self.count_bytes(run.frame.len());
        self.beat.written(self.node.clock.seconds());
        if self.socket.write_shared(cx, &run.frame).is_err() {
            return Fanned::Gone;
        }
        if let Some(report) = report {
            self.report(&report);
        }
        Fanned::Written
    }

    /// Records the hops and trace events of messages that were written.
    fn report(&self, report: &Report) {
        let app = &self.handle.user().app;
        let now_us = self.node.mailboxes.audience_now_us(app, &report.mailbox);
        if let Some((dispatched_us, produced_ms)) = report.hop {
            let hops = &self.node.metrics.hops;
            hops.observe(Hop::FanoutDispatchedWritten, dispatched_us, now_us);
            hops.observe(Hop::FanoutProducedWritten, produced_ms.saturating_mul(1000), now_us);
        }
        for entry in &report.traced {
            wrote(&self.node.tracer, &self.handle, entry, "fanout", now_us);
        }
    }

    fn feed(&mut self, out: Out) -> Result<(), socket::Error> {
        let frame = match out {
            Out::Ping => return self.socket.feed(Message::Ping(Bytes::new())),
            Out::Frame(frame) => {
                self.out_bytes -= frame.len();
                frame
            }
            Out::Pushed { frame, generation } => {
                let frames = self.pushed_with(frame, generation);
                self.out_bytes -= frames.iter().map(Bytes::len).sum::<usize>();
                match frames.as_slice() {
                    [alone] => alone.clone(),
                    several => join_delivers(self.codec.encoding, "", generation, several),
                }
            }
            Out::Entries(entries) => {
                self.out_bytes -= payload_bytes(&entries);
                match self.encode(entries) {
                    Some(frame) => frame,
                    None => return Ok(()),
                }
            }
        };
        self.count_bytes(frame.len());
        self.socket.feed(message(self.codec.encoding, frame))
    }

    fn count_bytes(&self, count: usize) {
        let count = count as u64;
        self.node.metrics.bytes_out.inc_by(count);
        if let Some(bytes) = self.counted.as_ref().and_then(|counted| counted.bytes.as_ref()) {
            bytes.inc_by(count);
        }
    }

    /// Takes the queued pushes that are joined with `first` into one frame.
    fn pushed_with(&mut self, first: Bytes, generation: u32) -> Vec<Bytes> {
        let mut bytes = first.len();
        let mut frames = vec![first];
        while let Some(Out::Pushed { frame, generation: of }) = self.out.front()
            && *of == generation
            && bytes + frame.len() <= JOINED_BYTES_MAX
        {
            bytes += frame.len();
            frames.push(frame.clone());
            self.out.pop_front();
        }
        frames
    }

    /// Encodes entries into one frame. An entry that cannot be encoded is skipped, and the rest is queued again.
    fn encode(&mut self, mut entries: Vec<Envelope>) -> Option<Bytes> {
        let generation = self.session.generation().0;
        let Codec { encoding, zstd, .. } = self.codec;
        let (broken, error) = match encode_deliver(encoding, generation, &entries, zstd) {
            Ok(frame) => return Some(frame),
            Err(broken) => broken,
        };
        let rest = entries.split_off(broken + 1);
        let seq = barid_core::Seq(entries.pop().map_or(0, |entry| entry.seq));
        tracing::warn!(seq = seq.0, %error, "entry cannot be delivered");
        let waiting = std::mem::take(&mut self.out);
        if !entries.is_empty() {
            self.entries(entries);
        }
        let skip = self.session.undeliverable(seq);
        self.effects.push(skip);
        self.apply();
        if !rest.is_empty() {
            self.entries(rest);
        }
        self.out.extend(waiting);
        None
    }

    pub(super) fn report_queued(&mut self) {
        let queued = self.out_bytes + self.socket.fed();
        if queued != self.handle.queued_bytes() {
            self.node.metrics.queued_bytes.add(self.handle.set_queued_bytes(queued));
        }
    }
}

fn payload_bytes(entries: &[Envelope]) -> usize {
    entries.iter().map(|entry| entry.payload.len()).sum()
}
