//! Close codes, and whether a client should reconnect after them.

/// WebSocket close codes. A client reconnects after 4000–4499, and does not after 4500–4999 (as in Centrifuge's
/// `disconnect.go`). Lower codes are those of RFC 6455 (section 7.4.1) that a node sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum CloseCode {
    /// The device violated the WebSocket protocol.
    ProtocolError = 1002,
    /// A text message was not valid UTF-8.
    InvalidPayload = 1007,
    /// The node is being drained.
    Draining = 4000,
    /// No acknowledgement after five re-sends.
    AckTimeout = 4001,
    /// Too many bytes were queued for the device.
    SlowConsumer = 4002,
    /// The device was silent for too long.
    Heartbeat = 4003,
    /// The token expired, and no new one arrived.
    TokenExpired = 4004,
    /// The node is overloaded.
    Overloaded = 4005,
    /// The mailbox's history differs from the one that was sent to the device.
    HistoryChanged = 4006,
    /// The token is not valid.
    BadToken = 4500,
    /// A frame was malformed.
    BadFrame = 4501,
    /// A newer connection of the same device replaced this one.
    Replaced = 4502,
    /// An operator or the business closed the session.
    Kicked = 4503,
    /// A limit of the app or the user was exceeded.
    Limit = 4504,
    /// Pages of this origin may not connect.
    Forbidden = 4505,
}

impl CloseCode {
    /// All codes, ordered by number.
    pub const ALL: [Self; 15] = [
        Self::ProtocolError,
        Self::InvalidPayload,
        Self::Draining,
        Self::AckTimeout,
        Self::SlowConsumer,
        Self::Heartbeat,
        Self::TokenExpired,
        Self::Overloaded,
        Self::HistoryChanged,
        Self::BadToken,
        Self::BadFrame,
        Self::Replaced,
        Self::Kicked,
        Self::Limit,
        Self::Forbidden,
    ];

    /// The number on the wire.
    pub fn code(self) -> u16 {
        self as u16
    }

    /// Whether it is a code of RFC 6455, for errors below Barid's frames.
    pub fn is_websockets(self) -> bool {
        matches!(self, Self::ProtocolError | Self::InvalidPayload)
    }

    /// The code with this number; `None` if no node sends it.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.code() == code)
    }

    /// Whether a client should reconnect after `code`. It should after codes outside Barid's ranges (such as 1006),
    /// which are accidents.
    pub fn reconnects(code: u16) -> bool {
        !(4500..=4999).contains(&code)
    }

    /// A stable word for metrics, logs and the close frame's reason.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ProtocolError => "protocol_error",
            Self::InvalidPayload => "invalid_payload",
            Self::Draining => "draining",
            Self::AckTimeout => "ack_timeout",
            Self::SlowConsumer => "slow_consumer",
            Self::Heartbeat => "heartbeat",
            Self::TokenExpired => "token_expired",
            Self::Overloaded => "overloaded",
            Self::HistoryChanged => "history_changed",
            Self::BadToken => "bad_token",
            Self::BadFrame => "bad_frame",
            Self::Replaced => "replaced",
            Self::Kicked => "kicked",
            Self::Limit => "limit",
            Self::Forbidden => "forbidden",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_say_reconnect_or_stop() {
        for code in CloseCode::ALL {
            assert_eq!(CloseCode::from_code(code.code()), Some(code));
        }
        assert!(CloseCode::reconnects(CloseCode::TokenExpired.code()));
        assert!(!CloseCode::reconnects(CloseCode::BadToken.code()));
        assert!(CloseCode::reconnects(1006));
        for code in CloseCode::ALL {
            assert_eq!(code.is_websockets(), code.code() < 4000);
        }
    }
}
