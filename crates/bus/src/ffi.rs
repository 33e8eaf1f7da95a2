//! Functions of librdkafka that the rdkafka crate does not wrap.
#![allow(
    unsafe_code,
    reason = "leader epochs, topic ids and the mock cluster's delay exist only in the C interface; \
              all of it is confined to this file"
)]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::time::Duration;

use rdkafka::TopicPartitionList;
use rdkafka::bindings as sys;
use rdkafka::client::{Client, ClientContext};
use rdkafka::message::BorrowedMessage;
use rdkafka::types::RDKafkaErrorCode;

use crate::Error;

/// The epoch of the leader that wrote a record; -1 if the broker does not report it.
pub(crate) fn leader_epoch(message: &BorrowedMessage<'_>) -> i32 {
    // SAFETY: the message is borrowed, so librdkafka's struct behind the pointer lives, and the
    // function only reads it.
    unsafe { sys::rd_kafka_message_leader_epoch(message.ptr()) }
}

/// Whether a broker names an existing controller, without which it cannot describe topics. librdkafka's in-process
/// broker names none; a request to describe topics would time out.
///
/// # Errors
/// No broker answered within `timeout`.
pub(crate) fn has_controller<C: ClientContext>(
    client: &Client<C>,
    topic: Option<&str>,
    timeout: Duration,
) -> Result<bool, Error> {
    let metadata = client.fetch_metadata(topic, timeout)?;
    // SAFETY: the client lives; after the metadata above this does not wait.
    let controller = unsafe { sys::rd_kafka_controllerid(client.native_ptr(), 100) };
    Ok(metadata.brokers().iter().any(|broker| broker.id() == controller))
}

/// The ids of topics, base64. Topics that do not exist, or whose broker has no ids, are absent.
/// Blocks for up to `timeout`.
///
/// # Errors
/// No broker answered in time, or it cannot describe topics.
pub(crate) fn topic_ids<C: ClientContext>(
    client: &Client<C>,
    topics: &[String],
    timeout: Duration,
) -> Result<HashMap<String, String>, Error> {
    // SAFETY: the event that it is given lives while it runs.
    describe(client, topics, timeout, |event| unsafe { read_topic_ids(event) })
}

/// The `topics` that do not exist or cannot be described (then the reason follows the name).
/// Blocks for up to `timeout`.
///
/// # Errors
/// As [`topic_ids`].
pub(crate) fn missing_topics<C: ClientContext>(
    client: &Client<C>,
    topics: &[String],
    timeout: Duration,
) -> Result<Vec<String>, Error> {
    // SAFETY: the event that it is given lives while it runs.
    describe(client, topics, timeout, |event| unsafe { read_missing(event) })
}

/// Requests the descriptions of topics, and reads the answer.
fn describe<C: ClientContext, T>(
    client: &Client<C>,
    topics: &[String],
    timeout: Duration,
    read: impl FnOnce(*mut sys::rd_kafka_event_t) -> Result<T, Error>,
) -> Result<T, Error> {
    let timeout_ms = c_int::try_from(timeout.as_millis()).unwrap_or(c_int::MAX);
    let names: Vec<CString> = topics.iter().filter_map(|t| CString::new(t.as_str()).ok()).collect();
    let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    // SAFETY: the client outlives this call, so its handle is valid throughout. Every object made
    // here is destroyed once by its guard, in reverse order: the event before the queue it came
    // from. The names outlive the collection's making, which copies them.
    unsafe {
        let handle = client.native_ptr();
        let queue = Guard(sys::rd_kafka_queue_new(handle), sys::rd_kafka_queue_destroy);
        let options = Guard(
            sys::rd_kafka_AdminOptions_new(
                handle,
                sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS,
            ),
            sys::rd_kafka_AdminOptions_destroy,
        );
        let mut text = [0 as c_char; 128];
        sys::rd_kafka_AdminOptions_set_request_timeout(
            options.0,
            timeout_ms,
            text.as_mut_ptr(),
            text.len(),
        );
        let collection = Guard(
            sys::rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len()),
            sys::rd_kafka_TopicCollection_destroy,
        );
        sys::rd_kafka_DescribeTopics(handle, collection.0, options.0, queue.0);
        // A little longer than the request's own timeout.
        let event = sys::rd_kafka_queue_poll(queue.0, timeout_ms.saturating_add(500));
        if event.is_null() {
            return Err(Error::Away("no broker described the topics in time".into()));
        }
        let event = Guard(event, sys::rd_kafka_event_destroy);
        read(event.0)
    }
}

/// # Safety
/// `event` is a live event of librdkafka.
unsafe fn read_topic_ids(
    event: *mut sys::rd_kafka_event_t,
) -> Result<HashMap<String, String>, Error> {
    // SAFETY: all of these read the event, which lives while this runs; the strings are copied.
    unsafe {
        let mut ids = HashMap::new();
        for &topic in described(event)? {
            let error = sys::rd_kafka_TopicDescription_error(topic);
            let failed = !error.is_null()
                && sys::rd_kafka_error_code(error)
                    != sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR;
            let id = sys::rd_kafka_TopicDescription_topic_id(topic);
            if failed || id.is_null() || is_zero(id) {
                continue;
            }
            let text = sys::rd_kafka_Uuid_base64str(id);
            if text.is_null() {
                continue;
            }
            let name = CStr::from_ptr(sys::rd_kafka_TopicDescription_name(topic));
            ids.insert(
                name.to_string_lossy().into_owned(),
                CStr::from_ptr(text).to_string_lossy().into_owned(),
            );
        }
        Ok(ids)
    }
}

/// # Safety
/// `event` is a live event of librdkafka.
unsafe fn read_missing(event: *mut sys::rd_kafka_event_t) -> Result<Vec<String>, Error> {
    // SAFETY: all of these read the event, which lives while this runs; the strings are copied.
    unsafe {
        let topics = described(event)?;
        let missing = topics.iter().filter_map(|topic| {
            let error = sys::rd_kafka_TopicDescription_error(*topic);
            if error.is_null() {
                return None;
            }
            let name = CStr::from_ptr(sys::rd_kafka_TopicDescription_name(*topic));
            let name = name.to_string_lossy();
            match sys::rd_kafka_error_code(error) {
                sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR => None,
                sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART => {
                    Some(name.into_owned())
                }
                _ => {
                    let why = CStr::from_ptr(sys::rd_kafka_error_string(error));
                    Some(format!("{name} ({})", why.to_string_lossy()))
                }
            }
        });
        Ok(missing.collect())
    }
}

/// The topics that an answer describes.
///
/// # Safety
/// `event` is a live event of librdkafka, and outlives what is returned.
unsafe fn described<'a>(
    event: *mut sys::rd_kafka_event_t,
) -> Result<&'a [*const sys::rd_kafka_TopicDescription_t], Error> {
    // SAFETY: all of these read the event, which lives; the array belongs to it.
    unsafe {
        if sys::rd_kafka_event_error(event) != sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR
        {
            let text = CStr::from_ptr(sys::rd_kafka_event_error_string(event)).to_string_lossy();
            return Err(Error::Away(text.into_owned()));
        }
        let result = sys::rd_kafka_event_DescribeTopics_result(event);
        if result.is_null() {
            return Err(Error::Away("another answer than topics".into()));
        }
        let mut count = 0;
        let topics = sys::rd_kafka_DescribeTopics_result_topics(result, &mut count);
        if topics.is_null() {
            return Ok(&[]);
        }
        Ok(std::slice::from_raw_parts(topics.cast_const().cast(), count))
    }
}

/// # Safety
/// `id` points to a live id.
unsafe fn is_zero(id: *const sys::rd_kafka_Uuid_t) -> bool {
    // SAFETY: both only read the id.
    unsafe {
        sys::rd_kafka_Uuid_most_significant_bits(id) == 0
            && sys::rd_kafka_Uuid_least_significant_bits(id) == 0
    }
}

/// The last known end of a partition, from fetch responses, without a request; -1: unknown.
pub(crate) fn cached_high_watermark<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
    partition: i32,
) -> i64 {
    let Ok(topic) = CString::new(topic) else { return -1 };
    let (mut low, mut high) = (-1, -1);
    // SAFETY: the client lives, the name is a C string, and the two numbers are written before the
    // function returns.
    unsafe {
        sys::rd_kafka_get_watermark_offsets(
            client.native_ptr(),
            topic.as_ptr(),
            partition,
            &mut low,
            &mut high,
        );
    }
    if high < 0 { -1 } else { high }
}

/// Commits, and waits up to `timeout` for the answer. Returns the partitions that were refused, with the reasons; the
/// rdkafka crate's own call reports success if only some are refused. After a timeout the commit may have succeeded.
///
/// # Errors
/// No partition was committed, or the outcome is unknown.
pub(crate) fn commit<C: ClientContext>(
    client: &Client<C>,
    list: &TopicPartitionList,
    timeout: Duration,
) -> Result<Vec<(String, i32, RDKafkaErrorCode)>, RDKafkaErrorCode> {
    let timeout_ms = c_int::try_from(timeout.as_millis()).unwrap_or(c_int::MAX);
    let no_error = sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR;
    // SAFETY: the client and the list live throughout, the call copies the list. The queue and the event
    // are destroyed once by their guards, the event before the queue it came from. An answer that comes
    // later finds the queue disabled and is dropped by librdkafka.
    unsafe {
        let handle = client.native_ptr();
        let queue = Guard(sys::rd_kafka_queue_new(handle), sys::rd_kafka_queue_destroy);
        let nobody = std::ptr::null_mut();
        let error = sys::rd_kafka_commit_queue(handle, list.ptr(), queue.0, None, nobody);
        if error != no_error {
            return Err(error.into());
        }
        let event = sys::rd_kafka_queue_poll(queue.0, timeout_ms);
        if event.is_null() {
            return Err(RDKafkaErrorCode::OperationTimedOut);
        }
        let event = Guard(event, sys::rd_kafka_event_destroy);
        let list = sys::rd_kafka_event_topic_partition_list(event.0);
        let refused = if list.is_null() { &[] } else { elements(list) };
        let refused = refused.iter().filter(|element| element.err != no_error);
        let failed = refused.map(|element| {
            let topic = CStr::from_ptr(element.topic).to_string_lossy().into_owned();
            (topic, element.partition, element.err.into())
        });
        let failed: Vec<_> = failed.collect();
        match sys::rd_kafka_event_error(event.0) {
            // If all partitions were refused, librdkafka reports the last one's reason.
            error if error != no_error && failed.is_empty() => Err(error.into()),
            _ => Ok(failed),
        }
    }
}

/// The metadata of a list's elements, in order. The rdkafka crate panics if it is not UTF-8, which another tool may
/// have written.
pub(crate) fn metadata(list: &TopicPartitionList) -> Vec<Vec<u8>> {
    // SAFETY: the list lives, and its elements' metadata is as long as they say.
    unsafe {
        let bytes = |element: &sys::rd_kafka_topic_partition_t| {
            if element.metadata.is_null() || element.metadata_size == 0 {
                return Vec::new();
            }
            std::slice::from_raw_parts(element.metadata.cast::<u8>(), element.metadata_size)
                .to_vec()
        };
        elements(list.ptr()).iter().map(bytes).collect()
    }
}

/// # Safety
/// `list` is a live list of librdkafka, which nobody changes while its elements are looked at.
unsafe fn elements<'a>(
    list: *const sys::rd_kafka_topic_partition_list_t,
) -> &'a [sys::rd_kafka_topic_partition_t] {
    // SAFETY: a list holds `cnt` elements at `elems`.
    unsafe {
        let count = usize::try_from((*list).cnt).unwrap_or(0);
        if count == 0 { &[] } else { std::slice::from_raw_parts((*list).elems, count) }
    }
}

/// Delays the in-process broker's answers to the next `count` requests of a kind (by Kafka's API key). Returns false
/// if the client has no mock cluster.
pub(crate) fn delay_mock_answers<C: ClientContext>(
    client: &Client<C>,
    api_key: i16,
    count: usize,
    delay: Duration,
) -> bool {
    let delay_ms = c_int::try_from(delay.as_millis()).unwrap_or(c_int::MAX);
    // SAFETY: the client lives, its mock cluster as long as it; each call has as many pairs of an
    // error and a round trip as it says.
    unsafe {
        let cluster = sys::rd_kafka_handle_mock_cluster(client.native_ptr());
        if cluster.is_null() {
            return false;
        }
        for _ in 0..count {
            sys::rd_kafka_mock_broker_push_request_error_rtts(
                cluster,
                1,
                api_key,
                1,
                sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR as c_int,
                delay_ms,
            );
        }
    }
    true
}

/// Makes the only broker of a client's mock cluster name `127.0.0.1:port` as its address. Returns false if the client has
/// no mock cluster.
pub(crate) fn advertise_mock<C: ClientContext>(client: &Client<C>, port: u16) -> bool {
    // SAFETY: the client lives, its mock cluster as long as it, and the host is copied.
    unsafe {
        let cluster = sys::rd_kafka_handle_mock_cluster(client.native_ptr());
        if cluster.is_null() {
            return false;
        }
        let host = c"127.0.0.1".as_ptr();
        sys::rd_kafka_mock_broker_set_host_port(cluster, 1, host, c_int::from(port));
    }
    true
}

/// Shortens the time that a client's mock cluster waits for further members of a new group (3 s by default). Returns
/// false if the client has no mock cluster.
pub(crate) fn set_mock_rebalance_delay<C: ClientContext>(
    client: &Client<C>,
    delay: Duration,
) -> bool {
    // SAFETY: the client lives, its mock cluster as long as it, and the setter takes its lock.
    unsafe {
        let cluster = sys::rd_kafka_handle_mock_cluster(client.native_ptr());
        if cluster.is_null() {
            return false;
        }
        let delay_ms = i32::try_from(delay.as_millis()).unwrap_or(i32::MAX);
        sys::rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, delay_ms);
    }
    true
}

/// Destroys what it holds.
struct Guard<T>(*mut T, unsafe extern "C" fn(*mut T));

impl<T> Drop for Guard<T> {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by librdkafka, destroyed nowhere else, by the function that belongs to it.
            unsafe { self.1(self.0) }
        }
    }
}
