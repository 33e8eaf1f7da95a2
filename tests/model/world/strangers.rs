//! Devices that do not follow the protocol: positions of another history, acknowledgements of an older generation,
//! confirmations of a replaced session. No message is promised to them, but the answers and the content of Redis are
//! checked.

use barid_core::{Attempt, Chain, Epoch, Generation, Seq};
use barid_mailbox::{AckRequest, ConfirmRequest, ConnectRequest, DisconnectRequest};

use super::calls::position;
use super::{Checked, PLATFORM, World, device_id, session_ref, user_key};
use crate::mailboxes::{Hello, Life, Place, Route};
use crate::{Call, Claim};

#[derive(Debug, Default)]
pub struct Stranger {
    /// The reference of its last session.
    number: u64,
    attempt: u64,
}

impl World<'_> {
    /// `claim` is the position that it names.
    pub(super) async fn stranger(&mut self, who: usize, call: Call, claim: &Claim) -> Checked {
        let (user, name) = (who / 2, name_of(who));
        let at = self.claimed(user, name, claim);
        match call {
            Call::Connect { late, simple } => {
                self.connections += 1;
                let stranger = &mut self.strangers[who];
                let attempt = if late {
                    stranger.attempt.saturating_sub(1)
                } else {
                    stranger.attempt += 2;
                    stranger.number = self.connections;
                    stranger.attempt
                };
                let route =
                    Route { number: self.connections, incarnation: self.incarnation, attempt };
                let at = Some(at).filter(|at| !simple && at.epoch != 0);
                let request = ConnectRequest {
                    user: user_key(user),
                    device: device_id(name),
                    session: session_ref(route.number, route.incarnation),
                    attempt: Attempt(route.attempt),
                    platform: PLATFORM.into(),
                    position: at.map(position),
                };
                self.call_connect(user, Hello { device: name, route, at }, request).await?;
            }
            Call::Confirm { late } => {
                let Stranger { number, attempt } = self.strangers[who];
                let (number, attempt) = if late {
                    (number.saturating_sub(1), attempt.saturating_sub(1))
                } else {
                    (number, attempt)
                };
                let route = Route { number, incarnation: self.incarnation, attempt };
                let request = ConfirmRequest {
                    user: user_key(user),
                    device: device_id(name),
                    session: session_ref(route.number, route.incarnation),
                    attempt: Attempt(route.attempt),
                    platform: PLATFORM.into(),
                    position: position(at),
                };
                let hello = Hello { device: name, route, at: Some(at) };
                self.call_confirm(user, hello, request).await?;
            }
            Call::Ack => {
                let request = AckRequest {
                    user: user_key(user),
                    device: device_id(name),
                    session: session_ref(self.strangers[who].number, self.incarnation),
                    epoch: Epoch(at.epoch),
                    generation: Generation(at.generation),
                    seq: Seq(at.seq),
                    chain: at.chain.unwrap_or(Chain::START),
                };
                self.call_ack(name, request).await?;
            }
            Call::Disconnect => self.send_away(who).await?,
        }
        Ok(())
    }

    pub(super) async fn send_away(&mut self, who: usize) -> Checked {
        let (user, name) = (who / 2, name_of(who));
        let Some(route) = self.now.boxes[user].routes.get(name) else { return Ok(()) };
        let session = session_ref(route.number, route.incarnation);
        let request = DisconnectRequest { user: user_key(user), device: device_id(name), session };
        self.call_disconnect(name, request).await
    }

    fn claimed(&self, user: usize, name: &str, claim: &Claim) -> Place {
        let mailbox = &self.now.boxes[user];
        let epoch = match mailbox.life {
            Life::Known(epoch) => epoch.0,
            _ => 0,
        };
        let seq = (mailbox.newest() + 1).saturating_sub(claim.back);
        let ours = mailbox.device(name).map_or(0, |device| device.generation);
        let chain = match claim.chain {
            0 => None,
            1 => Some(Chain(99)),
            _ => mailbox.chain_at(seq).or(Some(Chain::START)),
        };
        let epoch = if claim.other_epoch { epoch + 1 } else { epoch };
        let generation = ours.saturating_add_signed(claim.generation);
        Place { epoch, generation, seq, chain }
    }
}

pub(super) fn name_of(stranger: usize) -> &'static str {
    ["watch", "browser"][stranger % 2]
}
