//! librdkafka's callbacks. They forward its log to ours, and turn errors and rebalances into events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use barid_runtime::repeats;
use parking_lot::Mutex;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaRespErr;

use crate::Error;

/// The callbacks of a client that only logs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Logged;

impl ClientContext for Logged {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "kafka client");
    }
}

fn log(level: RDKafkaLogLevel, facility: &str, message: &str) {
    use RDKafkaLogLevel as Level;
    match level {
        Level::Emerg | Level::Alert | Level::Critical | Level::Error | Level::Warning => {
            let message = lasting(message);
            if let Some(repeated) = repeats::due(message) {
                tracing::warn!(target: "librdkafka", facility, message, repeated);
            }
        }
        Level::Notice | Level::Info => tracing::info!(target: "librdkafka", facility, message),
        Level::Debug => tracing::debug!(target: "librdkafka", facility, message),
    }
}

/// A message of librdkafka without what differs at each attempt and in each client: the thread in front, and the times
/// at the end.
pub(crate) fn lasting(message: &str) -> &str {
    let thread = message.strip_prefix("[thrd:").and_then(|rest| rest.split_once("]: "));
    let message = thread.map_or(message, |(_, rest)| rest);
    message.split_once(" (after ").map_or(message, |(lasting, _)| lasting)
}

/// An event from a consumer's callbacks.
#[derive(Debug)]
pub(crate) enum Callback {
    /// Partitions were assigned.
    Assign(Vec<(String, i32)>),
    /// Partitions were revoked; `lost`: another member already has them.
    Revoke { partitions: Vec<(String, i32)>, lost: bool },
    /// A commit was answered.
    Committed(Result<usize, Error>),
}

/// A consumer's callbacks. They do not answer a rebalance: librdkafka waits for the answer, so that a revoked
/// partition can be drained first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Callbacks {
    queue: Arc<Mutex<VecDeque<Callback>>>,
    closing: Arc<AtomicBool>,
    all_down: Arc<AtomicBool>,
}

impl Callbacks {
    /// The next event.
    pub(crate) fn next(&self) -> Option<Callback> {
        self.queue.lock().pop_front()
    }

    /// A commit was answered.
    pub(crate) fn committed(&self, result: Result<usize, Error>) {
        self.queue.lock().push_back(Callback::Committed(result));
    }

    /// From now on, rebalances are answered in the callback.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    /// Whether no broker was reachable since the last call.
    pub(crate) fn take_all_down(&self) -> bool {
        self.all_down.swap(false, Ordering::SeqCst)
    }
}

impl ClientContext for Callbacks {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }
    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.all_down.store(true, Ordering::SeqCst);
        }
        tracing::debug!(%error, reason, "kafka consumer");
    }
}

impl ConsumerContext for Callbacks {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        error: RDKafkaRespErr,
        list: &mut TopicPartitionList,
    ) {
        let assign = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if self.closing.load(Ordering::SeqCst) {
            let incremental =
                matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
            let _ = match (assign, incremental) {
                (true, true) => consumer.incremental_assign(list),
                (true, false) => consumer.assign(list),
                (false, true) => consumer.incremental_unassign(list),
                (false, false) => consumer.unassign(),
            };
            return;
        }
        let partitions = names(list);
        let lost = consumer.assignment_lost();
        self.queue.lock().push_back(if assign {
            Callback::Assign(partitions)
        } else {
            Callback::Revoke { partitions, lost }
        });
    }
}

fn names(list: &TopicPartitionList) -> Vec<(String, i32)> {
    list.elements().iter().map(|e| (e.topic().to_owned(), e.partition())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_118_lines_of_librdkafka_are_the_same_at_each_attempt() {
        let first = "[thrd:h:1/bootstrap]: h:1/bootstrap: Connect to ipv4#127.0.0.1:1 failed: \
                     Connection refused (after 0ms in state CONNECT)";
        let later = "[thrd:h:1/bootstrap]: h:1/bootstrap: Connect to ipv4#127.0.0.1:1 failed: \
                     Connection refused (after 3ms in state CONNECT, 29 identical error(s) suppressed)";
        let lasts = "h:1/bootstrap: Connect to ipv4#127.0.0.1:1 failed: Connection refused";
        assert_eq!((lasting(first), lasting(later)), (lasts, lasts));
        assert_eq!(lasting("1/1 brokers are down"), "1/1 brokers are down");
    }
}
