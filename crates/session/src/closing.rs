//! The end of a session: what remains to be stored in the mailbox.

use crate::effect::{AckPoint, Close};

/// A session that has ended. Its socket may be closed already.
#[derive(Debug)]
pub struct Closing {
    /// The last acknowledgement, if it is not stored yet.
    pub ack: Option<AckPoint>,
    /// The close; `None` if the device closed the connection.
    pub close: Option<Close>,
}
