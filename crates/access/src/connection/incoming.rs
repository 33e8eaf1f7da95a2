//! Handling of a device's frames.

use std::sync::Arc;
use std::task::{Context, Poll};

use barid_core::{CloseCode, GroupId};
use barid_runtime::{Hop, TraceEvent};
use barid_session::Close;
use barid_wire::frames::{ClientFrame, Decoded, Ignored, ServerFrame};
use barid_wire::{cut, v1};

use crate::connection::codec::{decode, refusal};
use crate::connection::state::Connection;
use crate::connection::trace::of;
use crate::fanout::Refused;
use crate::labels::{Limit, Unknown};
use crate::socket::Received;

/// Bytes of an ignored name that are quoted to the client.
const IGNORED_BYTES_MAX: usize = 64;

impl Connection {
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> bool {
        if self.refreshing.is_some() {
            return false; // frames behind a Refresh wait for its outcome
        }
        let mut received = Received::default();
        let next = self.socket.poll_next(cx, &mut received);
        let now_us = || self.node.clock.uptime_us();
        if let Err(over) = self.node.policy.upstream.charge(&mut self.spent, received, now_us) {
            self.node.metrics.limit(over.limit);
            self.end(Some(Close::new(CloseCode::Limit, over.text)));
            return true;
        }
        let message = match next {
            Poll::Pending => return false,
            Poll::Ready(Some(Ok(None))) => return true,
            Poll::Ready(Some(Ok(Some(message)))) => message,
            Poll::Ready(Some(Err(error))) => {
                let close = refusal(&self.node.metrics, &error);
                self.end(close);
                return true;
            }
            Poll::Ready(None) => {
                self.end(None);
                return true;
            }
        };
        self.beat.heard(self.node.clock.seconds());
        self.handle.set_due(self.beat.due());
        match decode(&self.node.metrics, self.codec.encoding, &message) {
            Ok(Some(Decoded { frame, ignored })) => {
                if let Some(frame) = frame {
                    self.frame_in(frame);
                }
                match ignored {
                    Some(Ignored::Kind(kind)) => self.ignored(Unknown::Kind, &kind),
                    Some(Ignored::Field(field)) => self.ignored(Unknown::Field, &field),
                    None => (),
                }
            }
            Ok(None) if message.is_close() => self.end(None),
            Ok(None) => (),
            Err(close) => self.end(Some(close)),
        }
        true
    }

    /// Counts an unknown field, kind or mailbox, which is ignored. The first one of a connection is also reported to
    /// the client, so that its developer notices a mistake. At most `IGNORED_BYTES_MAX` of `name` are quoted, because
    /// escaping can make it six times as long.
    pub(super) fn ignored(&mut self, what: Unknown, name: &str) {
        self.node.metrics.ignored(what);
        if !std::mem::replace(&mut self.reported_ignored, true) {
            let name = cut(name, IGNORED_BYTES_MAX);
            let what = what.as_str();
            let text = format!("{what} {name:?} is not known here and was ignored");
            self.control(&ServerFrame::Error(v1::Error { text, ..Default::default() }));
        }
    }

    fn frame_in(&mut self, frame: ClientFrame) {
        if !matches!(frame, ClientFrame::Pong(_)) {
            self.beat.used(self.node.clock.seconds(), self.node.policy.heartbeat.idle_seconds);
        }
        match frame {
            ClientFrame::Ack(ack) if !ack.mailbox.is_empty() => {
                // This version takes acknowledgements for the user's own mailbox only.
                self.ignored(Unknown::Mailbox, &ack.mailbox);
            }
            ClientFrame::Ack(ack) => {
                let now_us = self.node.mailboxes.now_us(self.handle.user());
                let hops = &self.node.metrics.hops;
                let before = self.session.unacked();
                let (tracer, handle) = (&self.node.tracer, &self.handle);
                self.session.ack(&ack, now_us, &mut self.effects, |sent| {
                    if let Some(pushed) = sent.pushed {
                        hops.observe(Hop::WrittenAcked, pushed.written_us, now_us);
                        let produced_us = pushed.produced_ms.saturating_mul(1000);
                        hops.observe(Hop::ProducedAcked, produced_us, now_us);
                    }
                    if let Some(wanted) = &sent.receipt
                        && !wanted.traceparent.is_empty()
                    {
                        let (id, traceparent) = (&*wanted.id, &*wanted.traceparent);
                        let produced_ms = wanted.produced_ms;
                        let seen =
                            TraceEvent { id, traceparent, produced_ms, ..Default::default() };
                        tracer.log(TraceEvent { hop: "acked", at_us: now_us, ..of(handle, seen) });
                    }
                });
                let acked = before.saturating_sub(self.session.unacked());
                self.node.metrics.acked.inc_by(acked as u64);
                self.apply();
            }
            ClientFrame::Refresh(refresh) => {
                let node = Arc::clone(&self.node);
                self.refreshing = Some(Box::pin(async move {
                    node.policy.verifier.verify(&refresh.token, node.clock.now_s()).await
                }));
            }
            ClientFrame::Pong(_) => (),
            ClientFrame::Subscribe(subscribe) => self.subscribe(&subscribe.group),
            ClientFrame::Unsubscribe(unsubscribe) => self.unsubscribe(&unsubscribe.group),
            ClientFrame::Hello(_) => {
                self.end(Some(Close::new(CloseCode::BadFrame, "a second hello")));
            }
        }
    }

    fn subscribe(&mut self, group: &str) {
        let Some(group) = self.group("subscribe", group) else { return };
        let groups_max = self.node.policy.limits.subscriptions_max;
        match self.listener.subscribe(&self.node.fanout, &self.handle, &group, groups_max) {
            Ok(()) => {
                self.confirm_subscriptions();
            }
            Err(why) => {
                match why {
                    Refused::NotListed => self.node.metrics.subscription_refused(),
                    Refused::TooMany => self.node.metrics.limit(Limit::Subscriptions),
                }
                self.refused(&group, why);
            }
        }
    }

    fn unsubscribe(&mut self, group: &str) {
        let Some(group) = self.group("unsubscribe", group) else { return };
        self.listener.unsubscribe(&self.node.fanout, &self.handle.user().app, &group);
        let unsubscribed = v1::Unsubscribed { group: group.to_string(), ..Default::default() };
        self.control(&ServerFrame::Unsubscribed(unsubscribed));
    }

    fn group(&mut self, frame: &str, group: &str) -> Option<GroupId> {
        match GroupId::new(group) {
            Ok(group) => Some(group),
            Err(error) => {
                self.end(Some(Close::new(CloseCode::BadFrame, format!("{frame}: {error}"))));
                None
            }
        }
    }

    pub(super) fn refused(&mut self, group: &GroupId, why: Refused) {
        let (code, text) = why.reply();
        self.control(&ServerFrame::Unsubscribed(v1::Unsubscribed {
            group: group.to_string(),
            code: code.code().into(),
            text: text.into(),
        }));
    }
}
