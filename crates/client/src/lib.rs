//! Barid's Rust SDK: a device's connection to the cluster, which reconnects until the program ends it.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use barid_client::{Client, Message};
//!
//! let client = Client::builder("ws://127.0.0.1:7080")
//!     .device("phone")
//!     .token(|| async { Ok("a token from your own service".into()) })
//!     .start(|message: Message| async move {
//!         println!("{}: {:?}", message.id, message.body);
//!         Ok(()) // acknowledged; after an error the message is sent again
//!     })?;
//! client.closed().await; // returns only if a reconnect cannot help
//! # Ok(()) }
//! ```
//!
//! The SDK keeps messages in order and shows none twice, resumes where the device stopped, acknowledges cumulatively,
//! reconnects with jitter, refreshes tokens, and distinguishes a failover (the mailbox's history forked) from an
//! ordinary reconnect.

mod client;
mod connection;
mod delivery;
mod driver;
mod event;
pub mod inbox;
mod live;
mod message;
mod nodes;
mod reconnect;
mod settings;
mod store;
mod token;
mod trust;

pub use client::{Builder, Client, HandlerError};
pub use delivery::{AckHandle, Deliveries, Delivery};
pub use event::{Closed, Disconnect, Event, SkipReason};
pub use message::{Body, Message};
pub use settings::InvalidBuilder;
pub use store::{Checkpoint, FileStore, MemoryStore, PositionStore};
pub use token::{Token, TokenError};

pub use barid_core::{Chain, Epoch, Generation, GroupId, InvalidName, Position, Seq};
