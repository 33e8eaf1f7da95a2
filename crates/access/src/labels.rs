//! The label values of this role's metrics, as enums, so that an unlisted value does not compile.

/// Defines enums of label values.
macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident { $($variant:ident => $text:literal,)+ })+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($variant,)+ }

        impl $name {
            /// All values as metrics show them.
            pub const VALUES: &[&str] = &[$($text,)+];

            /// The value as metrics show it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }
    )+};
}

labels! {
    /// Result of a handshake.
    Handshake {
        Accepted => "accepted",
        Gone => "gone",
        Timeout => "timeout",
        Evicted => "evicted",
        Blocked => "blocked",
        Overloaded => "overloaded",
        Limited => "limited",
        Forbidden => "forbidden",
        Proxy => "proxy",
        Tls => "tls",
        Nodes => "nodes",
        Preflight => "preflight",
        NotFound => "not_found",
        Draining => "draining",
        Subprotocol => "subprotocol",
        BadRequest => "bad_request",
        Unauthorized => "unauthorized",
        NoKeys => "no_keys",
        NoRevocations => "no_revocations",
        Headers => "headers",
        Version => "version",
        Method => "method",
        Upgrade => "upgrade",
    }

    /// Why a token was refused.
    TokenRefusal {
        Missing => "missing",
        Malformed => "malformed",
        UnknownKey => "unknown_key",
        NoKeys => "no_keys",
        NoRevocations => "no_revocations",
        Revoked => "revoked",
        IssuedAhead => "issued_ahead",
        Signature => "signature",
        Expired => "expired",
        Lifetime => "lifetime",
        TooEarly => "too_early",
        Audience => "audience",
        Issuer => "issuer",
        OtherApp => "other_app",
        SomebodyElse => "somebody_else",
    }

    /// Kind of the tokens that a revocation names.
    RevokedBy {
        User => "user",
        App => "app",
        Everyone => "everyone",
        Token => "token",
        Key => "key",
    }

    /// Where a revoked token was met.
    RevokedAt {
        Handshake => "handshake",
        Refresh => "refresh",
        Session => "session",
    }

    /// Unknown parts of a device's frame.
    Unknown {
        Kind => "kind",
        Field => "field",
        Mailbox => "mailbox",
    }

    /// Kind of a device's frame.
    Frame {
        Hello => "hello",
        Ack => "ack",
        Refresh => "refresh",
        Pong => "pong",
        Subscribe => "subscribe",
        Unsubscribe => "unsubscribe",
    }

    /// Why a push was not written.
    PushDrop {
        Known => "known",
        Syncing => "syncing",
        Window => "window",
        Gap => "gap",
        Fork => "fork",
        Overflow => "overflow",
    }

    /// A call to Redis.
    Call {
        Connect => "connect",
        Read => "read",
        Ack => "ack",
        Confirm => "confirm",
        Disconnect => "disconnect",
    }

    /// Outcome of a confirmation.
    Confirmation {
        Stood => "stood",
        Restored => "restored",
        Superseded => "superseded",
    }

    /// Outcome of reading the certificate's files.
    CertificateRead {
        Read => "read",
        Failed => "failed",
    }

    /// Result of a message for an audience.
    FanoutResult {
        Told => "told",
        Nobody => "nobody",
        NoRoom => "no_room",
        NotNext => "not_next",
        Expired => "expired",
    }

    /// How a device that catches up got a page of an audience's mailbox.
    PageResult {
        Read => "read",
        Shared => "shared",
    }

    /// A limit of docs/limits.md.
    Limit {
        AttemptAhead => "attempt_ahead",
        Connections => "connections",
        Handshakes => "handshakes",
        HandshakeRate => "handshake_rate",
        TurnedAway => "turned_away",
        AddressConnections => "address_connections",
        AddressHandshakes => "address_handshakes",
        AddressRate => "address_rate",
        Addresses => "addresses",
        ClientUnknown => "client_unknown",
        Blocks => "blocks",
        Unidentified => "unidentified",
        AddressUnidentified => "address_unidentified",
        UserUnidentified => "user_unidentified",
        Evicted => "evicted",
        Blocked => "blocked",
        UserConnections => "user_connections",
        AppConnections => "app_connections",
        AppNewUsers => "app_new_users",
        FrameBytes => "frame_bytes",
        Fragments => "fragments",
        UpstreamFrames => "upstream_frames",
        UpstreamBytes => "upstream_bytes",
        Idle => "idle",
        Subscriptions => "subscriptions",
        Memory => "memory",
        MemoryClosed => "memory_closed",
        Forgets => "forgets",
        PeerCloses => "peer_closes",
        CloseTimeout => "close_timeout",
    }
}
