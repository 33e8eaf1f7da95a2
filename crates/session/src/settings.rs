//! Settings of sessions.

/// Settings that all sessions of a node share.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Bound of the unacknowledged messages.
    pub unacked_max: usize,
    /// Bound of the entries of a page.
    pub page_entries_max: u32,
    /// Bound of the bytes of a page.
    pub page_bytes_max: u32,
    /// Interval between two acknowledgements to the mailbox, ms.
    pub ack_interval_ms: u32,
    /// Upper bound of the time from the claim of a retry timer until its re-send arrives, ms. Less than the time
    /// between two re-sends.
    pub crossing_ms: u32,
}
