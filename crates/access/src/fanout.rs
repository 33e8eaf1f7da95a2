//! Fan-out: delivers one record of a dispatcher to every session of an audience on this node. An audience is
//! everyone of an app, or one of its groups.
//!
//! Nothing is queued per session. An audience has a short log, and each member a read position in it. A message is
//! stored once and encoded once; members that read at the same pace share frames. A device that falls behind the
//! log misses the messages that have left it. One task wakes the members of all audiences, a limited number at a
//! time, so that other work of the node runs in between.

mod audience;
mod catching;
mod hub;
mod joining;
mod listener;
mod listings;
mod pages;
mod place;
mod report;
mod room;

pub use audience::{Begun, Read};
pub use hub::{Fanout, Received};
pub use joining::{follow_redis, keep_listed, read_journals, read_missing};
pub use listener::{Listener, Refused, Wanted};
pub use report::Report;
