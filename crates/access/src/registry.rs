//! The sessions of this node, by user. A session is registered before its route is written, so that a push never
//! finds a route without a session. It is removed by its own connection number, so that an old session never removes
//! a newer one.

use std::collections::HashMap;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use barid_core::ConnectionId;
use barid_mailbox::UserKey;
use parking_lot::Mutex;

use crate::handle::Handle;

/// A power of two; each part has its own lock.
const PARTS: usize = 64;
/// Capacity below which a part is not shrunk, users.
const TABLE_MIN: usize = 16;

type Part = HashMap<UserKey, Vec<Arc<Handle>>>;

/// The sessions of a node.
#[derive(Debug)]
pub struct Registry {
    parts: Vec<Mutex<Part>>,
    hasher: std::hash::RandomState,
}

impl Registry {
    /// Creates an empty registry.
    pub fn new() -> Self {
        let parts = (0..PARTS).map(|_| Mutex::default()).collect();
        Self { parts, hasher: std::hash::RandomState::new() }
    }

    /// Adds a session, unless its user has sessions of `others_max` other devices on this node (0: no limit). Returns
    /// whether it was added. A session of the same device, which the new one replaces, does not count.
    #[must_use]
    pub fn insert(&self, handle: Arc<Handle>, others_max: u32) -> bool {
        let mut part = self.part(handle.user()).lock();
        // Most users have one session on a node.
        let sessions = part.entry(handle.user().clone()).or_insert_with(|| Vec::with_capacity(1));
        let others = sessions.iter().filter(|other| other.device() != handle.device());
        let room = others_max == 0 || others.count() < others_max as usize;
        if room {
            sessions.push(handle);
        }
        room
    }

    /// Removes a session by user and connection, atomically.
    pub fn remove(&self, user: &UserKey, connection: ConnectionId) {
        let mut part = self.part(user).lock();
        let Some(handles) = part.get_mut(user) else { return };
        handles.retain(|handle| handle.connection != connection);
        if handles.is_empty() {
            part.remove(user);
            // Frees memory after a peak; a table that is half full is kept.
            if part.capacity() > 4 * part.len().max(TABLE_MIN) {
                let room = 2 * part.len();
                part.shrink_to(room);
            }
        }
    }

    /// Calls `each` for every session of a user.
    pub fn each(&self, user: &UserKey, mut each: impl FnMut(&Arc<Handle>)) {
        let part = self.part(user).lock();
        part.get(user).into_iter().flatten().for_each(&mut each);
    }

    /// One session.
    pub fn get(&self, user: &UserKey, connection: ConnectionId) -> Option<Arc<Handle>> {
        let part = self.part(user).lock();
        part.get(user)?.iter().find(|handle| handle.connection == connection).cloned()
    }

    /// All sessions that exist now.
    pub fn all(&self) -> Vec<Arc<Handle>> {
        let mut all = Vec::new();
        for part in &self.parts {
            all.extend(part.lock().values().flatten().cloned());
        }
        all
    }

    /// Number of users with sessions.
    pub fn users(&self) -> usize {
        self.parts.iter().map(|part| part.lock().len()).sum()
    }

    fn part(&self, user: &UserKey) -> &Mutex<Part> {
        &self.parts[self.hasher.hash_one(user) as usize % PARTS]
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::tests::handle;
    use barid_core::{AppId, Attempt, DeviceId, UserId};
    use barid_session::TokenFingerprint;

    #[test]
    fn old_session_does_not_remove_newer_one() {
        let registry = Registry::new();
        let (old, new) = (handle(1), handle(2));
        assert!(registry.insert(old.clone(), 1));
        assert!(registry.insert(new.clone(), 1), "a device's own older session does not count");
        registry.remove(old.user(), old.connection);
        registry.remove(old.user(), old.connection);
        assert!(registry.get(new.user(), new.connection).is_some());
        assert_eq!((registry.all().len(), registry.users()), (1, 1));
        registry.remove(new.user(), new.connection);
        assert!(registry.all().is_empty());
        assert_eq!(registry.users(), 0);
    }

    #[test]
    fn what_many_sessions_needed_is_given_back() {
        let room = |registry: &Registry| -> usize {
            registry.parts.iter().map(|part| part.lock().capacity()).sum()
        };
        let registry = Registry::new();
        let handles: Vec<_> = (0..4_000).map(handle_of).collect();
        for handle in &handles {
            assert!(registry.insert(handle.clone(), 1));
        }
        assert!(room(&registry) >= 4_000);
        for handle in &handles[10..] {
            registry.remove(handle.user(), handle.connection);
        }
        assert!(room(&registry) <= 4 * PARTS * TABLE_MIN, "{}", room(&registry));
        assert_eq!(registry.all().len(), 10);
    }

    fn handle_of(number: u64) -> Arc<Handle> {
        let app = AppId::new("demo").unwrap();
        let user = UserKey { app, user: UserId::new(&format!("u{number}")).unwrap() };
        let device = DeviceId::new("phone").unwrap();
        let token = TokenFingerprint::default();
        Arc::new(Handle::new(ConnectionId(number), Attempt(number), user, device, token))
    }
}
