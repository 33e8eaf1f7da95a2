//! Handling of what other tasks put into a session's inbox: pushes, clock ticks, requests to leave or to close.

use std::task::{Context, Poll};

use barid_core::CloseCode;
use barid_runtime::Hop;
use barid_session::{Beat, Close, Pushed};
use barid_wire::frames::ServerFrame;
use barid_wire::v1;

use crate::connection::state::{Connection, Out};
use crate::connection::trace::wrote;
use crate::handle::{Inbox, Push};
use crate::labels::Limit;
use crate::socket::WRITE_BUFFER_BYTES;

/// How long a device that was told to go may still acknowledge, seconds.
const LEAVE_SECONDS: u32 = 2;

impl Connection {
    pub(super) fn poll_inbox(&mut self, cx: &Context<'_>) -> bool {
        let Poll::Ready(inbox) = self.handle.poll_take(cx) else { return false };
        let Inbox { pushes, missed, tick, resend, fanout, confirm, go_away, close, .. } = inbox;
        if fanout {
            self.fanned_out = true;
            self.listener.resume();
        }
        if let Some(close) = close {
            self.end(Some(*close));
            return true;
        }
        let now_us = self.node.mailboxes.now_us(self.handle.user());
        for push in pushes {
            self.push(&push, now_us);
        }
        if missed {
            self.session.missed();
        }
        if resend {
            let flushed = self.is_flushed();
            if self.session.resend(flushed, now_us, &mut self.effects) {
                self.node.metrics.resends.inc();
            }
            self.apply();
        }
        if confirm {
            self.confirm();
        }
        if let Some(reconnect_after_ms) = go_away
            && !self.beat.is_leaving()
        {
            let draining = self.node.shutdown.is_draining();
            let why = if draining { "draining" } else { "balance" }.to_owned();
            self.control(&ServerFrame::GoAway(v1::GoAway { why, reconnect_after_ms }));
            self.beat.leave(self.node.clock.seconds() + LEAVE_SECONDS);
            self.node.sessions.set_due(&self.handle, self.beat.due());
        }
        if tick {
            self.listener.resume();
            self.tick();
        }
        true
    }

    fn push(&mut self, push: &Push, now_us: u64) {
        let pushed = self.session.push(&push.header, &push.envelope, now_us, &mut self.effects);
        match pushed {
            Pushed::Write => {
                let generation = self.session.generation().0;
                match push.frame(self.codec.encoding, generation, self.codec.zstd) {
                    Ok(frame) => {
                        self.node.metrics.delivered_fast.inc();
                        let hops = &self.node.metrics.hops;
                        hops.observe(Hop::DispatchedWritten, push.dispatched_us, now_us);
                        let produced_us = push.envelope.produced_at_ms.saturating_mul(1000);
                        hops.observe(Hop::ProducedWritten, produced_us, now_us);
                        self.out_bytes += frame.len();
                        self.out.push_back(Out::Pushed { frame, generation });
                        wrote(&self.node.tracer, &self.handle, &push.envelope, "fast", now_us);
                    }
                    Err(error) => {
                        tracing::warn!(seq = push.header.seq.0, %error, "entry cannot be delivered");
                        let effect = self.session.undeliverable(push.header.seq);
                        self.effects.push(effect);
                    }
                }
            }
            Pushed::Skipped => (),
            Pushed::Dropped(why) => self.node.metrics.dropped(why),
        }
        self.apply();
        let queued_max = self.node.policy.limits.queued_bytes_max;
        if self.out_bytes + self.socket.fed() > queued_max.max(WRITE_BUFFER_BYTES) {
            let text = "too many bytes are queued for the device";
            self.end(Some(Close::new(CloseCode::SlowConsumer, text)));
        }
    }

    fn tick(&mut self) {
        let now = self.node.clock.seconds();
        match self.beat.tick(now) {
            Beat::Nothing => (),
            Beat::Ping if self.codec.visible_pings => self.control(&ServerFrame::Ping(v1::Ping {})),
            Beat::Ping => self.out.push_back(Out::Ping),
            Beat::Dead => {
                let text = "the device answered no ping in time";
                self.end(Some(Close::new(CloseCode::Heartbeat, text)));
            }
            Beat::Idle => {
                self.node.metrics.limit(Limit::Idle);
                let text = "the device sent nothing but pongs for too long";
                self.end(Some(Close::new(CloseCode::Heartbeat, text)));
            }
            Beat::Expired => {
                let text = "the token has expired";
                self.end(Some(Close::new(CloseCode::TokenExpired, text)));
            }
            Beat::Leave => {
                self.end(Some(Close::new(
                    CloseCode::Draining,
                    "the device stayed connected after GoAway",
                )));
            }
        }
        self.node.sessions.set_due(&self.handle, self.beat.due());
    }
}
