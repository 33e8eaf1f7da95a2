//! Push records that tests produce.

use barid_core::{AppId, MessageId, UserId};
use barid_wire::record::{BodyKind, Format, Push, RecordLimits, encode_push};
use bytes::Bytes;

use crate::token::APP;

/// The shortest record: a text to a user of [`APP`].
///
/// # Panics
/// Panics if a name is invalid.
pub fn text(user: &str, id: &str, text: &str) -> Push {
    let id = MessageId::new(id).expect("a valid message id");
    let app = AppId::new(APP).expect("a valid app");
    let user = UserId::new(user).expect("a valid user");
    Push::new(id, app, user, BodyKind::Text, text.to_owned())
}

/// A record's JSON.
///
/// # Panics
/// Panics if every cluster would refuse the record.
pub fn json(push: &Push) -> Bytes {
    encode_push(push, Format::Json, &RecordLimits::HIGHEST).expect("a valid record")
}
