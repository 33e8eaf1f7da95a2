//! Why a connection is closed, and whether the device should come back.

/// WebSocket close codes. The range says what a client does (as in Centrifuge's `disconnect.go`):
/// 4000–4499 reconnect, 4500–4999 do not. Below are those of RFC 6455 (section 7.4.1) that a node sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum CloseCode {
    /// What came is not WebSocket.
    ProtocolError = 1002,
    /// A text message that is not UTF-8.
    InvalidPayload = 1007,
    /// The node is being drained.
    Draining = 4000,
    /// Five re-sends brought no acknowledgement.
    AckTimeout = 4001,
    /// More bytes waited for the device than may wait.
    SlowConsumer = 4002,
    /// Nothing was heard from the device for too long.
    Heartbeat = 4003,
    /// The token's time is over and no new one came.
    TokenExpired = 4004,
    /// The node has no room.
    Overloaded = 4005,
    /// The mailbox's history is not the one that was written to the device.
    HistoryChanged = 4006,
    /// The token is not valid.
    BadToken = 4500,
    /// A frame that cannot be understood.
    BadFrame = 4501,
    /// A newer connection of the same device took over.
    Replaced = 4502,
    /// An operator or the business closed it.
    Kicked = 4503,
    /// A limit of the app or user was passed.
    Limit = 4504,
}

impl CloseCode {
    /// All of them, by number.
    pub const ALL: [Self; 14] = [
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
    ];

    /// The number on the wire.
    pub fn code(self) -> u16 {
        self as u16
    }

    /// Whether it is RFC 6455's, and tells of what lies below frames of Barid's.
    pub fn is_websockets(self) -> bool {
        matches!(self, Self::ProtocolError | Self::InvalidPayload)
    }

    /// The number's meaning; `None` for codes that no node sends.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.code() == code)
    }

    /// Whether a client that is closed with `code` should connect again. Codes outside Barid's
    /// ranges (1006 and the like) are accidents: it should.
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
