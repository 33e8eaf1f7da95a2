//! Fan-out: one record of a dispatcher goes to every session of an audience that is here: everyone of an
//! app, or one of its groups.
//!
//! Nothing is queued for a session. An audience has a short log, and each of its members a place in it: a
//! message is held once and encoded once, whoever reads at the same pace shares the frames, and a device
//! that does not keep up with the log misses what has left it. One task tells the members of all audiences
//! that there is something to read, some at a time, so that whatever else the node does comes in between.

mod audience;
mod hub;
mod listener;
mod report;
mod room;

pub use audience::Read;
pub use hub::{Fanout, Received};
pub use listener::{Listener, Refused};
pub use report::Report;
