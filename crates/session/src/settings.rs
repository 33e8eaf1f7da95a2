//! Bounds of a session.

/// Bounds of a session; the same for all sessions of a node.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Messages that may be on their way to a device without its acknowledgement.
    pub unacked_max: usize,
    /// Entries read from a mailbox at once.
    pub page_entries_max: u32,
    /// Bytes read from a mailbox at once.
    pub page_bytes_max: u32,
    /// How long the next acknowledgement waits for others after the last one, ms.
    pub ack_interval_ms: u32,
    /// From the claim of a retry timer until its re-send is here, ms at most: what a busy machine takes, and
    /// less than lies between two re-sends.
    pub crossing_ms: u32,
}
