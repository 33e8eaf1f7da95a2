//! Decoding of replies.

use std::time::Instant;

use bytes::Bytes;
use redis::Value;

use crate::Error;
use crate::redis_clock::RedisClock;

/// The elements of an array, taken from the front.
pub(crate) struct Reply(std::vec::IntoIter<Value>);

impl Reply {
    pub fn new(value: Value) -> Result<Self, Error> {
        match value {
            Value::Array(values) => Ok(Self(values.into_iter())),
            other => Err(unexpected("an array", &other)),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    /// The next element, of any type.
    pub fn value(&mut self) -> Result<Value, Error> {
        self.0.next().ok_or_else(|| Error::Unexpected("a script's reply is too short".into()))
    }

    /// The next element, an array.
    pub fn array(&mut self) -> Result<Self, Error> {
        Self::new(self.value()?)
    }

    /// The next element, an item's reply: an array, or a single value, which counts as an array of one element.
    pub fn item(&mut self) -> Result<Self, Error> {
        match self.value()? {
            Value::Array(values) => Ok(Self(values.into_iter())),
            alone => Ok(Self(vec![alone].into_iter())),
        }
    }

    /// The number, if the reply is a single number.
    pub fn lone_number(&self) -> Option<u64> {
        match self.0.as_slice() {
            [Value::Int(number)] => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// The next element, any bytes.
    pub fn bytes(&mut self) -> Result<Bytes, Error> {
        bytes(self.value()?)
    }

    /// The next element, text.
    pub fn text(&mut self) -> Result<String, Error> {
        let bytes = self.bytes()?;
        String::from_utf8(bytes.into()).map_err(|e| Error::Unexpected(e.to_string()))
    }

    /// The next element, a number or its text.
    pub fn number(&mut self) -> Result<u64, Error> {
        match self.value()? {
            Value::Int(number) => {
                u64::try_from(number).map_err(|e| Error::Unexpected(e.to_string()))
            }
            Value::BulkString(text) => std::str::from_utf8(&text)
                .ok()
                .and_then(|t| t.parse().ok())
                .ok_or_else(|| Error::Unexpected("a script's reply is not a number".into())),
            other => Err(unexpected("a number", &other)),
        }
    }

    /// As [`Self::number`], 32 bits.
    pub fn number_u32(&mut self) -> Result<u32, Error> {
        u32::try_from(self.number()?).map_err(|e| Error::Unexpected(e.to_string()))
    }

    /// The next element, a one-letter tag. `E` becomes the error that follows it, `U` becomes [`Error::Newer`].
    pub fn tag(&mut self) -> Result<u8, Error> {
        match self.bytes()?.as_ref() {
            b"E" => Err(Error::of_item(&self.bytes()?)),
            b"U" => Err(Error::newer()),
            [tag] => Ok(*tag),
            other => Err(Error::Unexpected(format!("a script's reply has the tag {other:?}"))),
        }
    }
}

/// Splits a reply into what follows its first element and that element, Redis's time in µs since the Unix epoch. The
/// call was sent at `sent` or later.
pub(crate) fn timed_reply(
    value: Value,
    clock: &RedisClock,
    sent: Instant,
) -> Result<(Reply, u64), Error> {
    let mut reply = Reply::new(value)?;
    let now_us = reply.number()?;
    clock.observe(now_us, sent, Instant::now());
    Ok((reply, now_us))
}

pub(crate) fn bytes(value: Value) -> Result<Bytes, Error> {
    match value {
        Value::BulkString(bytes) => Ok(bytes.into()),
        other => Err(unexpected("bytes", &other)),
    }
}

pub(crate) fn unexpected(wanted: &str, got: &Value) -> Error {
    let kind = match got {
        Value::Nil => "nil",
        Value::Int(_) => "a number",
        Value::BulkString(_) => "bytes",
        Value::Array(_) => "an array",
        _ => "something else",
    };
    Error::Unexpected(format!("a script's reply has {kind} instead of {wanted}"))
}

pub(crate) fn unknown_tag(tag: u8) -> Error {
    Error::Unexpected(format!("a script's reply has the tag {:?}", char::from(tag)))
}
