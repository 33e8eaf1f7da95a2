//! Calls to the session's mailbox and to the token's verifier. The connection never waits for one: it polls them,
//! and handles each answer when it arrives.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use barid_core::AudienceKey;
use barid_mailbox::{AckRequest, ConfirmOutcome, ConfirmRequest, ReadRequest};
use barid_session::{AckPoint, AckUrgency, Claims, Close};
use tokio::time::sleep;

use crate::auth::AuthError;
use crate::connection::state::{Answer, Confirming, Connection};
use crate::fanout::{Refused, Wanted};
use crate::handle::Handle;
use crate::labels::{Call, Confirmation, RevokedAt, TokenRefusal};
use crate::node::Node;

impl Connection {
    pub(super) fn poll_calls(&mut self, cx: &mut Context<'_>) -> bool {
        let mut busy = self.poll_refresh(cx);
        let mut index = 0;
        while let Some(call) = self.calls.get_mut(index) {
            let Poll::Ready(answer) = call.as_mut().poll(cx) else {
                index += 1;
                continue;
            };
            drop(self.calls.swap_remove(index));
            busy = true;
            match answer {
                Answer::Page(page) => {
                    let now_us = self.node.mailboxes.now_us(self.handle.user());
                    self.session.page(page, now_us, &mut self.effects);
                }
                Answer::AudiencePage(key, after, page) => self.audience_page(&key, after, &page),
                Answer::AckDue => self.ack_waits = false,
                Answer::Acked(outcome) => {
                    let now_us = self.node.mailboxes.now_us(self.handle.user());
                    self.session.acked(outcome, now_us, &mut self.effects);
                }
                Answer::Confirmed(outcome, incarnation) => {
                    self.handle.set_confirmed_incarnation(incarnation);
                    self.node.metrics.confirm(match outcome {
                        ConfirmOutcome::Confirmed { restored: false, .. } => Confirmation::Stood,
                        ConfirmOutcome::Confirmed { restored: true, .. } => Confirmation::Restored,
                        ConfirmOutcome::Superseded => Confirmation::Superseded,
                    });
                    self.session.confirmed(outcome, &mut self.effects);
                    if std::mem::take(&mut self.confirming) == Confirming::Again {
                        self.confirm();
                    }
                }
            }
            self.apply();
        }
        busy
    }

    fn poll_refresh(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(refreshing) = &mut self.refreshing else { return false };
        let Poll::Ready(result) = refreshing.as_mut().poll(cx) else { return false };
        self.refreshing = None;
        let checked = result
            .map_err(refused)
            .and_then(|claims| match self.session.refresh(&claims) {
                Ok(()) => Ok(claims),
                Err(close) => Err((TokenRefusal::SomebodyElse, close)),
            })
            .and_then(|claims| self.check_revocations(claims).map_err(refused));
        match checked {
            Ok(claims) => {
                self.beat.expires(self.node.clock.seconds_at(claims.expires_s));
                self.node.sessions.set_due(&self.handle, self.beat.due());
                let app = &self.handle.user().app;
                for group in self.listener.allow(&self.node.fanout, app, claims.groups) {
                    self.refused(&group, Refused::NotListed);
                }
            }
            Err((why, close)) => {
                self.node.metrics.token_refused(why);
                self.end(Some(close));
            }
        }
        true
    }

    /// The session has the new token before it is checked: a revocation that arrives meanwhile finds it.
    fn check_revocations(&self, claims: Claims) -> Result<Claims, AuthError> {
        self.handle.set_token(claims.token);
        let now_s = self.node.clock.now_s();
        let checked = self.node.revocations.check(&claims, now_s);
        checked.map(|()| claims).map_err(|refusal| {
            self.node.metrics.revoked(RevokedAt::Refresh);
            refusal.into()
        })
    }

    pub(super) fn start_calls(&mut self) -> bool {
        let before = self.calls.len();
        if let Some((point, urgency)) = self.next_ack() {
            let request = ack_request(&self.node, &self.handle, point);
            let node = Arc::clone(&self.node);
            self.calls.push(Box::pin(async move {
                let call = async || match urgency {
                    AckUrgency::Urgent => node.mailboxes.store().ack(request.clone()).await,
                    AckUrgency::Paced => node.mailboxes.store().ack_soon(request.clone()).await,
                };
                Answer::Acked(node.mailboxes.until_answered(Call::Ack, call).await)
            }));
        }
        if let Some((read, cause)) = self.session.next_read(self.is_flushed()) {
            self.node.metrics.sync(cause);
            let request = ReadRequest {
                user: self.handle.user().clone(),
                after: read.after,
                entries_max: read.entries_max,
                bytes_max: read.bytes_max,
                device: Some(self.handle.device().clone()),
            };
            let node = Arc::clone(&self.node);
            self.calls.push(Box::pin(async move {
                let call = || node.mailboxes.store().read(request.clone());
                Answer::Page(node.mailboxes.until_answered(Call::Read, call).await)
            }));
        }
        if self.is_flushed() {
            let (reached, page) = self.listener.catch_up();
            self.fanned_out |= reached;
            if let Some(wanted) = page {
                self.read_audience(wanted);
            }
        }
        self.calls.len() > before
    }

    /// Reads an audience's mailbox, for a device that is behind its log.
    fn read_audience(&mut self, Wanted { audience, after, not_before }: Wanted) {
        let key = AudienceKey { app: self.handle.user().app.clone(), audience };
        let node = Arc::clone(&self.node);
        self.calls.push(Box::pin(async move {
            let page = node.fanout.page_for(&node.mailboxes, &key, after, not_before).await;
            Answer::AudiencePage(key, after, page)
        }));
    }

    /// The acknowledgement to send now. If it has to wait for its interval, a timer is started.
    fn next_ack(&mut self) -> Option<(AckPoint, AckUrgency)> {
        let urgency = self.session.ack_urgency()?;
        let (now_ms, interval_ms) =
            (self.node.clock.uptime_ms(), self.node.policy.settings.ack_interval_ms);
        // The clock wraps: a time in the past appears further ahead than any interval.
        let early_ms = self.next_ack_ms.wrapping_sub(now_ms);
        if urgency == AckUrgency::Paced && (1..=interval_ms).contains(&early_ms) {
            if !std::mem::replace(&mut self.ack_waits, true) {
                self.calls.push(Box::pin(async move {
                    sleep(Duration::from_millis(early_ms.into())).await;
                    Answer::AckDue
                }));
            }
            return None;
        }
        self.next_ack_ms = now_ms.wrapping_add(interval_ms);
        self.session.next_ack().map(|point| (point, urgency))
    }

    /// Starts a confirmation; at most one is under way. A request during one is repeated after it, because the first
    /// may have begun under another incarnation.
    pub(super) fn confirm(&mut self) {
        if self.confirming != Confirming::No {
            self.confirming = Confirming::Again;
            return;
        }
        self.confirming = Confirming::Once;
        let identity = self.session.identity();
        let request = ConfirmRequest {
            user: identity.user.clone(),
            device: identity.device.clone(),
            session: self.node.sessions.reference(self.handle.connection),
            attempt: identity.attempt,
            platform: identity.platform.clone(),
            position: self.session.position(),
        };
        let node = Arc::clone(&self.node);
        self.calls.push(Box::pin(async move {
            let call = || node.mailboxes.store().confirm(request.clone());
            let outcome = node.mailboxes.until_answered(Call::Confirm, call).await;
            Answer::Confirmed(outcome, request.session.incarnation)
        }));
    }
}

fn refused(error: AuthError) -> (TokenRefusal, Close) {
    (error.label(), Close::new(error.refresh_code(), error.to_string()))
}

pub(super) fn ack_request(node: &Node, handle: &Handle, point: AckPoint) -> AckRequest {
    AckRequest {
        user: handle.user().clone(),
        device: handle.device().clone(),
        session: node.sessions.reference(handle.connection),
        epoch: point.epoch,
        generation: point.generation,
        seq: point.mark.seq,
        chain: point.mark.chain,
    }
}
