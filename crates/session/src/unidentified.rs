//! The states before a session is connected: waiting for Hello, and for the mailbox's answer.

use std::sync::Arc;

use barid_core::limits::{PLATFORM_BYTES_MAX, SDK_BYTES_MAX};
use barid_core::mailbox::{ConnectOutcome, ConnectRequest};
use barid_core::{Attempt, Audience, CloseCode, DeviceId, Position, SessionRef};
use barid_wire::frames::ClientFrame;
use barid_wire::v1;

use crate::connected::Connected;
use crate::effect::{Close, Refusal};
use crate::identity::{Claims, Identity};
use crate::settings::Settings;

/// A connection with a valid token that waits for its Hello.
#[derive(Debug)]
pub struct Unidentified {
    claims: Claims,
    handshake_ms: u64,
}

/// A connection that has sent Hello and waits for its mailbox.
#[derive(Debug, Clone)]
pub struct Connecting {
    /// The session's identity.
    pub identity: Identity,
    /// The name and version of the device's SDK, from Hello; may be empty.
    pub sdk: String,
    /// The device accepts zstd.
    pub accepts_zstd: bool,
    /// The device asks for Ping frames.
    pub visible_pings: bool,
    /// The ping interval that the device asks for, ms; 0: the node's.
    pub ping_interval_ms: u32,
    /// The Hello's attempt, if it was too far ahead of the clock and replaced by the time of the handshake.
    pub attempt_ahead: Option<Attempt>,
    position: Option<Position>,
    /// The device's positions in mailboxes of audiences; each audience once.
    pub audiences: Vec<(Audience, Position)>,
}

impl Unidentified {
    /// Creates the state after a handshake at `handshake_ms` (Unix epoch).
    pub fn new(claims: Claims, handshake_ms: u64) -> Self {
        Self { claims, handshake_ms }
    }

    /// Handles the first frame. An attempt that is more than `ahead_ms` ahead of the handshake is replaced by the
    /// time of the handshake. Otherwise the device's later attempts would be refused as lower, for as long as its
    /// clock was ahead or, if an attacker sent it, for ever.
    ///
    /// # Errors
    /// The frame is not a Hello, or not one for this token.
    pub fn frame(self, frame: ClientFrame, ahead_ms: u64) -> Result<Connecting, Close> {
        let ClientFrame::Hello(hello) = frame else {
            return Err(bad("the first frame is hello"));
        };
        let device = self.device(&hello)?;
        check_length("platform", &hello.platform, PLATFORM_BYTES_MAX)?;
        check_length("sdk", &hello.sdk, SDK_BYTES_MAX)?;
        let is_ahead = hello.attempt > self.handshake_ms.saturating_add(ahead_ms);
        let attempt_ahead = is_ahead.then_some(Attempt(hello.attempt));
        let counted = hello.attempt != 0 && !is_ahead;
        let attempt = if counted { hello.attempt } else { self.handshake_ms };
        let position = hello.positions.iter().find(|position| position.mailbox.is_empty());
        let others = hello.positions.iter().filter(|position| !position.mailbox.is_empty());
        let audience = |of: &v1::Position| Some((Audience::new(&of.mailbox).ok()?, of.into()));
        let audiences = others.filter_map(audience).collect();
        Ok(Connecting {
            identity: Identity {
                user: self.claims.user,
                device,
                attempt: Attempt(attempt),
                platform: Arc::from(hello.platform.as_str()),
            },
            sdk: hello.sdk,
            accepts_zstd: hello.accepts_zstd,
            visible_pings: hello.visible_pings,
            ping_interval_ms: hello.ping_interval_ms,
            attempt_ahead,
            position: position.map(Position::from),
            audiences,
        })
    }

    fn device(&self, hello: &v1::Hello) -> Result<DeviceId, Close> {
        match (&self.claims.device, hello.device.as_str()) {
            (Some(device), "") => Ok(device.clone()),
            (Some(device), named) if device.as_str() != named => {
                Err(bad("hello names another device than the token"))
            }
            (Some(device), _) => Ok(device.clone()),
            (None, "") => Err(bad("hello names no device, and neither does the token")),
            (None, named) => DeviceId::new(named).map_err(|error| bad(error.to_string())),
        }
    }
}

impl Connecting {
    /// For a Hello whose attempt was replaced by the time of the handshake, which was then refused as lower than
    /// `known`: returns the same Hello with the attempt after `known`. Otherwise, after Redis's clock went back, the
    /// device would be refused until the clock has caught up. `None`: the refusal names no known attempt (0), or the
    /// Hello's own attempt is not above it.
    pub fn counted_on(mut self, known: Attempt) -> Option<Self> {
        self.attempt_ahead.take().filter(|named| known.0 > 0 && *named > known)?;
        self.identity.attempt = Attempt(known.0 + 1);
        Some(self)
    }

    /// The connect request to the mailbox.
    pub fn request(&self, session: SessionRef) -> ConnectRequest {
        ConnectRequest {
            user: self.identity.user.clone(),
            device: self.identity.device.clone(),
            session,
            attempt: self.identity.attempt,
            platform: self.identity.platform.clone(),
            position: self.position,
        }
    }

    /// Handles the mailbox's answer. Also returns the session that this one replaces.
    ///
    /// # Errors
    /// The mailbox refused the device.
    pub fn answered(
        self,
        outcome: ConnectOutcome,
        settings: Settings,
    ) -> Result<(Connected, Option<SessionRef>), Refusal> {
        let refused = |code, text: &'static str| Err(Close::new(code, text).into());
        match outcome {
            ConnectOutcome::Connected { cursor, newest, replaced, evicted, .. } => {
                Ok((Connected::new(self.identity, cursor, newest, evicted, settings), replaced))
            }
            // Not `Replaced`, after which a client does not reconnect: the device's clock may have gone back, or the
            // clocks of two nodes may differ. The refusal carries the known attempt, so that the device can send a
            // higher one.
            ConnectOutcome::Superseded { by } => {
                let text =
                    "a connection of this device with a higher attempt is known; name a higher one";
                Err(Refusal { close: Close::new(CloseCode::Overloaded, text), attempt: by })
            }
            ConnectOutcome::TooManyDevices => {
                refused(CloseCode::Limit, "this user has too many devices")
            }
            ConnectOutcome::TooLate => {
                refused(CloseCode::Overloaded, "the mailbox answered too late")
            }
            ConnectOutcome::NotCreated => {
                refused(CloseCode::Overloaded, "there is no room for new users at the moment")
            }
        }
    }
}

fn check_length(name: &str, text: &str, bytes_max: usize) -> Result<(), Close> {
    if text.len() <= bytes_max {
        return Ok(());
    }
    Err(bad(format!("hello.{name} has {} bytes, the limit is {bytes_max}", text.len())))
}

fn bad(text: impl Into<std::borrow::Cow<'static, str>>) -> Close {
    Close::new(CloseCode::BadFrame, text)
}
