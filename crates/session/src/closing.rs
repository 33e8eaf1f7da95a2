//! After a session: what is still owed to the mailbox.

use crate::effect::{AckPoint, Close};
use crate::identity::Identity;

/// A session that is over; its socket may be gone already.
#[derive(Debug)]
pub struct Closing {
    /// Whose it was.
    pub identity: Identity,
    /// What the device acknowledged and the mailbox was not told.
    pub ack: Option<AckPoint>,
    /// Why; `None`: the device left by itself.
    pub close: Option<Close>,
}
