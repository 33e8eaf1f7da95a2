//! Revocations of tokens: what is in force on this node, and whether a token may be used.
//!
//! Each node follows the compacted topic `barid.revocations` by itself, so that a restarted node knows all of it before
//! it admits a device. Redis is not used: a failover there may forget.
//!
//! | module | what |
//! |---|---|
//! | `fingerprint` | hashes that sessions keep of their token |
//! | `table` | the revocations in force, pure |
//! | `follow` | the task that follows the topic |
//! | `closing` | closes the open sessions of revoked tokens |

mod closing;
mod fingerprint;
pub mod follow;
mod table;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use barid_mailbox::UserKey;
use barid_runtime::repeats;
use barid_session::{Claims, TokenFingerprint};
use parking_lot::{RwLock, RwLockReadGuard};

pub use fingerprint::{id_hash, key_hash};
pub use table::{Table, revokes};

use crate::labels::RevokedBy;

/// The reason that devices are told.
pub const REVOKED: &str = "the token has been revoked";

/// Why a token may not be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAdmitted {
    /// It is revoked.
    Revoked,
    /// It is revoked only because its `iat` is too far ahead of the node's clock.
    IssuedAhead,
    /// The revocations have not been read since the start.
    NotRead,
}

/// The revocations in force.
#[derive(Debug)]
pub struct Revocations {
    table: RwLock<Table>,
    /// Number of entries of `table`: on most nodes 0, which spares the lock.
    held: AtomicUsize,
    is_read: AtomicBool,
}

impl Revocations {
    /// Creates an empty set of at most `entries_max`. Until [`Self::set_read`], all tokens are refused, unless the node
    /// does not follow the topic.
    pub fn new(entries_max: usize, is_followed: bool) -> Self {
        Self {
            table: RwLock::new(Table::new(entries_max)),
            held: AtomicUsize::new(0),
            is_read: AtomicBool::new(!is_followed),
        }
    }

    /// Checks a valid token at `now_s` (seconds since the Unix epoch). A session is checked again once it is registered:
    /// a revocation that arrives between the two either finds the session or is found here.
    ///
    /// # Errors
    /// The token may not be used.
    pub fn check(&self, claims: &Claims, now_s: u64) -> Result<(), NotAdmitted> {
        if !self.is_read.load(Ordering::Acquire) {
            return Err(NotAdmitted::NotRead);
        }
        let is_hit = |token: &TokenFingerprint| self.hit(&claims.user, token, now_s).is_some();
        if !is_hit(&claims.token) {
            return Ok(());
        }
        match claims.issued_ahead_s {
            Some(issued_s) if !is_hit(&TokenFingerprint { issued_s, ..claims.token }) => {
                log_issued_ahead(claims, issued_s, now_s);
                Err(NotAdmitted::IssuedAhead)
            }
            _ => Err(NotAdmitted::Revoked),
        }
    }

    /// The kind of revocation that hits a token; `None`: it is not revoked.
    pub fn hit(&self, user: &UserKey, token: &TokenFingerprint, now_s: u64) -> Option<RevokedBy> {
        if self.held.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.table.read().hit(user, token, now_s)
    }

    /// The table.
    pub fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read()
    }

    /// Changes the table.
    pub fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let mut table = self.table.write();
        let changed = change(&mut table);
        self.held.store(table.len(), Ordering::Release);
        changed
    }

    /// Everything that was in the topic at the start has been read.
    pub fn set_read(&self) {
        self.is_read.store(true, Ordering::Release);
    }
}

fn log_issued_ahead(claims: &Claims, issued_s: u32, now_s: u64) {
    let (app, ahead_seconds) = (&claims.user.app, u64::from(issued_s).saturating_sub(now_s));
    if let Some(repeated) = repeats::due("iat ahead") {
        tracing::warn!(
            %app,
            ahead_seconds,
            repeated,
            "a token is refused as revoked because its iat is ahead: compare this node's clock with the issuer's"
        );
    }
}
