//! The Kafka topics of one cluster. All clusters of a test process share a broker, so each has names of
//! its own.

use crate::kafka::unique;

/// Topic names.
#[derive(Debug, Clone)]
pub struct Topics {
    /// Push records of high priority.
    pub high: String,
    /// Push records of normal priority.
    pub push: String,
    /// Push records of low priority.
    pub bulk: String,
    /// Receipts.
    pub receipts: String,
    /// Dead letters: refused records.
    pub dead: String,
    /// Revocations of tokens; compacted.
    pub revocations: String,
}

impl Topics {
    pub(super) fn new() -> Self {
        let prefix = unique("t");
        let name = |rest: &str| format!("{prefix}.{rest}");
        Self {
            high: name("push.high"),
            push: name("push"),
            bulk: name("push.bulk"),
            receipts: name("receipts"),
            dead: name("dead"),
            revocations: name("revocations"),
        }
    }

    /// The topics that are not compacted.
    pub(super) fn logs(&self) -> [&str; 5] {
        [&self.high, &self.push, &self.bulk, &self.receipts, &self.dead].map(String::as_str)
    }
}
