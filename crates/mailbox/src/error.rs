//! Errors of calls to Redis.

use redis::{ErrorKind, RedisError, ServerErrorKind};

/// How a [`RedisError`] begins that carries the words of an [`Error`] as its detail.
pub(crate) const NOT_CONNECTED: &str = "not connected";

/// A call failed. Whether it had an effect is unknown, unless stated otherwise.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Redis, or the master of this shard, cannot be reached or does not answer in time. Try again.
    #[error("redis is away: {0}")]
    Away(String),
    /// Redis has reached its memory limit (OOM). Only accept fails with it.
    #[error("redis is full: {0}")]
    Full(String),
    /// The master executed the call, but too few replicas confirmed it in time: it does not count as done.
    #[error("redis: {have} of {want} replicas have confirmed")]
    Unreplicated {
        /// Replicas that have confirmed.
        have: u32,
        /// Replicas that must confirm.
        want: u32,
    },
    /// Redis returned a reply that no script returns: a bug, or another program writes to this Redis.
    #[error("redis answered unexpectedly: {0}")]
    Unexpected(String),
    /// A newer version has marked this user's mailbox as critical, so nothing was written. Try again: this process is
    /// about to be upgraded.
    #[error("{0}")]
    Newer(String),
    /// This Redis or its configuration cannot be used, for example because it evicts or has another shard count.
    #[error("this redis cannot be used: {0}")]
    Unusable(String),
}

impl Error {
    /// All values of [`Self::kind`].
    pub(crate) const KINDS: [&str; 6] =
        ["away", "full", "newer", "unreplicated", "unexpected", "unusable"];

    /// The value of the metrics' label `kind`.
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

    /// Whether Redis may become available later.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Away(_))
    }

    /// Whether the configuration, or Redis's, has to be changed.
    pub fn is_config(&self) -> bool {
        matches!(self, Self::Unusable(_))
    }

    /// The error of a script's reply 'U'.
    pub(crate) fn newer() -> Self {
        Self::Newer("a newer version wrote this mailbox: upgrade this process".into())
    }

    /// The error of a script's reply 'E'.
    pub(crate) fn of_item(text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text).into_owned();
        if text.contains("OOM ") { Self::Full(text) } else { Self::Unexpected(text) }
    }
}

impl From<RedisError> for Error {
    fn from(error: RedisError) -> Self {
        let text = cause(&error);
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

/// The cause in words, which tell a stopped Redis from a wrong name and from a silent network.
pub(crate) fn cause(error: &RedisError) -> String {
    // The error of an earlier attempt, which says all.
    if let Some(why) = error.detail().filter(|_| error.to_string().starts_with(NOT_CONNECTED)) {
        return why.into();
    }
    if error.is_connection_refusal() {
        return "connection refused".into();
    }
    if error.is_timeout() {
        return "no answer in time".into();
    }
    let text = error.to_string();
    match text.strip_prefix("failed to lookup address information: ") {
        Some(why) => format!("the host name cannot be resolved: {why}"),
        None => text,
    }
}
