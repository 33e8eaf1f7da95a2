//! How calls to Redis fail.

use redis::{ErrorKind, RedisError, ServerErrorKind};

/// A call did not come through. Nothing is known of its effect unless it says so.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Redis, or the master of this shard, cannot be reached or does not answer in time.
    #[error("redis is away: {0}")]
    Away(String),
    /// Redis is full (OOM): only accept is refused so.
    #[error("redis is full: {0}")]
    Full(String),
    /// The master executed the call, and too few replicas have confirmed it so far: nothing counts.
    #[error("redis: {have} of {want} replicas have confirmed")]
    Unreplicated {
        /// So many have.
        have: u32,
        /// So many should.
        want: u32,
    },
    /// Redis answered something that no script answers: a bug, or another program writes there.
    #[error("redis answered unexpectedly: {0}")]
    Unexpected(String),
    /// A newer version has marked what it keeps of this user so that this version must not touch it:
    /// nothing was written. Wait, and ask again: this process is about to be upgraded.
    #[error("{0}")]
    Newer(String),
    /// Start-up refused this Redis (it evicts, or it belongs to a cluster with another shard count).
    #[error("this redis cannot be used: {0}")]
    Unusable(String),
}

impl Error {
    /// What [`Self::kind`] may be.
    pub(crate) const KINDS: [&str; 6] =
        ["away", "full", "newer", "unreplicated", "unexpected", "unusable"];

    /// A stable word for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Away(_) => "away",
            Self::Full(_) => "full",
            Self::Newer(_) => "newer",
            Self::Unreplicated { .. } => "unreplicated",
            Self::Unexpected(_) => "unexpected",
            Self::Unusable(_) => "unusable",
        }
    }

    /// Whether it is worth waiting: Redis may come, or come back.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Away(_))
    }

    /// What the answer 'U' of a script means.
    pub(crate) fn newer() -> Self {
        Self::Newer(
            "a newer version keeps what this one does not know: upgrade this process".into(),
        )
    }

    /// What an item's error inside a script means.
    pub(crate) fn of_item(text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text).into_owned();
        if text.contains("OOM ") { Self::Full(text) } else { Self::Unexpected(text) }
    }
}

impl From<RedisError> for Error {
    fn from(error: RedisError) -> Self {
        let text = error.to_string();
        if error.code() == Some("OOM") {
            return Self::Full(text);
        }
        match error.kind() {
            ErrorKind::Io
            | ErrorKind::ClusterConnectionNotFound
            | ErrorKind::Server(
                ServerErrorKind::BusyLoading
                | ServerErrorKind::TryAgain
                | ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown
                | ServerErrorKind::ReadOnly
                | ServerErrorKind::Moved
                | ServerErrorKind::Ask,
            ) => Self::Away(text),
            ErrorKind::AuthenticationFailed | ErrorKind::InvalidClientConfig => {
                Self::Unusable(text)
            }
            _ if matches!(error.code(), Some("BUSY" | "NOREPLICAS" | "MISCONF")) => {
                Self::Away(text)
            }
            _ if error.is_connection_dropped() || error.is_timeout() => Self::Away(text),
            _ => Self::Unexpected(text),
        }
    }
}
