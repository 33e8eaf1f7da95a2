//! The session of a connection as a typestate: [`Unidentified`] → [`Connecting`] → [`Connected`] → [`Closing`]. Pure:
//! inputs and the time go in, effects come out. It knows no socket, no encoding of frames and no Redis; an access node's
//! connection does the I/O.

mod closing;
mod connected;
mod effect;
mod heartbeat;
mod identity;
mod settings;
mod unidentified;
mod window;

pub use closing::Closing;
pub use connected::{AckUrgency, Connected, Dropped, Pushed};
pub use effect::{AckPoint, Close, Effect, Mark, ReadFrom, Refusal, SyncCause};
pub use heartbeat::{Beat, Heartbeat, Seconds};
pub use identity::{Claims, Identity, TokenFingerprint};
pub use settings::Settings;
pub use unidentified::{Connecting, Unidentified};
pub use window::{PushedAt, Sent, Wanted};

#[cfg(test)]
mod tests;
