//! Access to a session from outside its task: an inbox with a waker, and the time of its next clock tick. An inbox is
//! smaller than a channel: an idle session costs a lock and two empty vectors.

use std::mem;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use barid_core::{Attempt, ConnectionId, DeviceId, Incarnation};
use barid_mailbox::{LiveSession, UserKey};
use barid_session::{Close, Seconds, TokenFingerprint};
use barid_wire::envelope::{Envelope, EnvelopeError, Header};
use barid_wire::frames::{Encoding, Format, encode_deliver};
use bytes::Bytes;
use parking_lot::Mutex;

/// Devices that are sent away reconnect within this time, at random, ms.
const RECONNECT_SPREAD_MS: u32 = 1_000;

/// An entry for all sessions of a user on this node, encoded once per encoding.
#[derive(Debug)]
pub struct Push {
    /// Its position.
    pub header: Header,
    /// The entry.
    pub envelope: Envelope,
    /// When its dispatcher queued it for this node, µs in Redis's time; 0: unknown.
    pub dispatched_us: u64,
    bytes: usize,
    frames: [OnceLock<Result<Bytes, EnvelopeError>>; Format::COUNT],
}

impl Push {
    /// Decodes an entry. `dispatched_after_us`: time from its acceptance until its dispatcher queued it.
    ///
    /// # Errors
    /// `entry` is not a valid envelope.
    pub fn new(entry: Bytes, dispatched_after_us: Option<u32>) -> Result<Self, EnvelopeError> {
        let bytes = entry.len();
        let (header, envelope) = barid_wire::envelope::decode(entry)?;
        let dispatched_us =
            dispatched_after_us.map_or(0, |after| header.accepted_at_us + u64::from(after));
        Ok(Self { header, envelope, dispatched_us, bytes, frames: Default::default() })
    }

    /// A frame with this entry only.
    ///
    /// # Errors
    /// The payload cannot be decompressed.
    pub fn frame(
        &self,
        encoding: Encoding,
        generation: u32,
        zstd: bool,
    ) -> Result<Bytes, EnvelopeError> {
        let encode = || {
            encode_deliver(encoding, generation, [&self.envelope], zstd).map_err(|(_, error)| error)
        };
        if generation != 0 {
            return encode();
        }
        self.frames[Format::new(encoding, zstd) as usize].get_or_init(encode).clone()
    }
}

/// Everything that a session has to handle.
#[derive(Debug, Default)]
pub struct Inbox {
    /// Pushed entries, in order.
    pub pushes: Vec<Arc<Push>>,
    /// Their bytes.
    pub bytes: usize,
    /// Pushes were dropped because the inbox was full.
    pub missed: bool,
    /// A clock tick is due.
    pub tick: bool,
    /// The retry timer fired: re-send.
    pub resend: bool,
    /// An audience of the session has messages to read.
    pub fanout: bool,
    /// Confirm the route.
    pub confirm: bool,
    /// Send GoAway; the device shall reconnect after this many ms.
    pub go_away: Option<u32>,
    /// Close the connection. Boxed, because almost no inbox has one.
    pub close: Option<Box<Close>>,
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.pushes.is_empty()
            && !(self.missed || self.tick || self.resend || self.fanout || self.confirm)
            && self.go_away.is_none()
            && self.close.is_none()
    }
}

#[derive(Debug, Default)]
struct State {
    inbox: Inbox,
    waker: Option<Waker>,
    token: TokenFingerprint,
    over: bool,
}

/// One session, as other tasks see it.
#[derive(Debug)]
pub struct Handle {
    /// Its number, unique in this process.
    pub connection: ConnectionId,
    /// The attempt of its Hello.
    pub attempt: Attempt,
    user: UserKey,
    device: DeviceId,
    state: Mutex<State>,
    due: AtomicU32,
    slotted: AtomicU32,
    place: AtomicU32,
    queued_bytes: AtomicU32,
    confirmed_incarnation: AtomicU64,
}

/// Result of a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queued {
    /// The inbox was full; the session reads its mailbox instead.
    pub overflow: bool,
    /// The inbox was empty: the caller has to wake the session.
    pub first: bool,
}

impl LiveSession for Handle {
    fn is_over(&self) -> bool {
        Handle::is_over(self)
    }

    fn confirmed_incarnation(&self) -> Incarnation {
        Incarnation(self.confirmed_incarnation.load(Ordering::Relaxed))
    }

    fn confirm(&self) {
        self.notify(|inbox| inbox.confirm = true);
    }
}

impl Handle {
    /// Creates the handle of a session.
    pub fn new(
        connection: ConnectionId,
        attempt: Attempt,
        user: UserKey,
        device: DeviceId,
        token: TokenFingerprint,
    ) -> Self {
        Self {
            connection,
            attempt,
            user,
            device,
            state: Mutex::new(State { token, ..State::default() }),
            due: AtomicU32::new(Seconds::MAX),
            slotted: AtomicU32::new(Seconds::MAX),
            place: AtomicU32::new(0),
            queued_bytes: AtomicU32::new(0),
            confirmed_incarnation: AtomicU64::new(0),
        }
    }

    /// Records that a confirmation under this incarnation was answered.
    pub fn set_confirmed_incarnation(&self, incarnation: Incarnation) {
        self.confirmed_incarnation.fetch_max(incarnation.0, Ordering::Relaxed);
    }

    /// The session's user.
    pub fn user(&self) -> &UserKey {
        &self.user
    }

    /// The session's device.
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// Fingerprint of the session's token.
    pub fn token(&self) -> TokenFingerprint {
        self.state.lock().token
    }

    /// The session's token was replaced.
    pub fn set_token(&self, token: TokenFingerprint) {
        self.state.lock().token = token;
    }

    /// Queues an entry; drops it if `count_max` entries or `bytes_max` bytes are queued. If [`Queued::first`] is set,
    /// call [`Self::wake`] after the last push of a batch.
    pub fn push(&self, push: &Arc<Push>, count_max: usize, bytes_max: usize) -> Queued {
        let mut state = self.state.lock();
        let inbox = &mut state.inbox;
        let first = inbox.is_empty();
        let room = inbox.pushes.len() < count_max && inbox.bytes + push.bytes <= bytes_max;
        if room && !inbox.missed {
            inbox.bytes += push.bytes;
            inbox.pushes.push(Arc::clone(push));
        } else {
            inbox.missed = true;
        }
        Queued { overflow: inbox.missed, first }
    }

    /// Wakes the session.
    pub fn wake(&self) {
        Self::wake_locked(self.state.lock());
    }

    /// Notes that an audience has messages to read, and wakes the session unless this was noted before.
    pub fn notify_fanout(&self) {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.inbox.fanout, true) {
            Self::wake_locked(state);
        }
    }

    /// Changes the inbox, and wakes the session.
    pub fn notify(&self, change: impl FnOnce(&mut Inbox)) {
        let mut state = self.state.lock();
        change(&mut state.inbox);
        Self::wake_locked(state);
    }

    /// Closes the session's connection. Returns false if it is over, or about to be closed.
    pub fn close(&self, close: Close) -> bool {
        let mut state = self.state.lock();
        let is_first = !state.over && state.inbox.close.is_none();
        if is_first {
            state.inbox.close = Some(Box::new(close));
        }
        Self::wake_locked(state);
        is_first
    }

    /// Asks the device to reconnect, after a random time so that devices do not reconnect together.
    pub fn send_go_away(&self) {
        let reconnect_after_ms = rand::random_range(0..=RECONNECT_SPREAD_MS);
        self.notify(|inbox| inbox.go_away = Some(reconnect_after_ms));
    }

    /// Takes the whole inbox.
    pub fn poll_take(&self, cx: &Context<'_>) -> Poll<Inbox> {
        let mut state = self.state.lock();
        if state.inbox.is_empty() {
            match &mut state.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                None => state.waker = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        Poll::Ready(mem::take(&mut state.inbox))
    }

    /// Marks the session as over, and drops its inbox.
    pub fn finish(&self) {
        *self.state.lock() = State { over: true, ..State::default() };
    }

    /// Whether the session is over.
    pub fn is_over(&self) -> bool {
        self.state.lock().over
    }

    /// Bytes queued for the device, as the session last reported.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes.load(Ordering::Relaxed) as usize
    }

    /// Reports the bytes queued for the device. Returns the change.
    pub fn set_queued_bytes(&self, bytes: usize) -> i64 {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let before = self.queued_bytes.swap(bytes, Ordering::Relaxed);
        i64::from(bytes) - i64::from(before)
    }

    /// When the session's next clock tick is due.
    pub fn due(&self) -> Seconds {
        self.due.load(Ordering::Relaxed)
    }

    /// Sets when the next clock tick is due. Returns whether that is before the session's slot on the wheel.
    pub fn set_due(&self, due: Seconds) -> bool {
        self.due.store(due, Ordering::Relaxed);
        due < self.slotted.load(Ordering::Relaxed)
    }

    /// The session's slot on the wheel; [`Seconds::MAX`]: none.
    pub(crate) fn slotted(&self) -> Seconds {
        self.slotted.load(Ordering::Relaxed)
    }

    pub(crate) fn set_slotted(&self, at: Seconds) {
        self.slotted.store(at, Ordering::Relaxed);
    }

    /// The session's index within its slot.
    pub(crate) fn place(&self) -> usize {
        self.place.load(Ordering::Relaxed) as usize
    }

    pub(crate) fn set_place(&self, place: usize) {
        self.place.store(u32::try_from(place).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    fn wake_locked(mut state: parking_lot::MutexGuard<'_, State>) {
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use barid_core::{AppId, Chain, Epoch, Seq, UserId};
    use barid_wire::envelope::encode_body;

    pub(crate) fn handle(connection: u64) -> Arc<Handle> {
        let user =
            UserKey { app: AppId::new("demo").unwrap(), user: UserId::new("alice").unwrap() };
        let device = DeviceId::new("phone").unwrap();
        let token = TokenFingerprint::default();
        Arc::new(Handle::new(ConnectionId(connection), Attempt(connection), user, device, token))
    }

    fn push(seq: u64) -> Arc<Push> {
        let header = Header {
            epoch: Epoch(1),
            seq: Seq(seq),
            prev_chain: Chain(0),
            chain: Chain(1),
            accepted_at_us: 0,
        };
        let body = encode_body(Envelope { id: "a".into(), ..Default::default() });
        Arc::new(Push::new([&header.encode()[..], &body].concat().into(), None).unwrap())
    }

    #[test]
    fn beyond_its_bounds_it_keeps_what_it_has_and_tells() {
        let handle = handle(1);
        let queued = |overflow, first| Queued { overflow, first };
        assert_eq!(handle.push(&push(1), 1, 1000), queued(false, true));
        assert_eq!(handle.push(&push(2), 1, 1000), queued(true, false));
        // Once one is missing, a later one would only be a gap.
        assert_eq!(handle.push(&push(3), 9, 1000), queued(true, false));
        let cx = Context::from_waker(Waker::noop());
        let Poll::Ready(inbox) = handle.poll_take(&cx) else { panic!("nothing waits") };
        assert_eq!((inbox.pushes.len(), inbox.missed), (1, true));
        assert!(handle.poll_take(&cx).is_pending());
    }

    #[test]
    fn one_frame_serves_all_receivers_of_an_encoding() {
        let push = push(1);
        let one = push.frame(Encoding::Proto, 0, false).unwrap();
        assert_eq!(one.as_ptr(), push.frame(Encoding::Proto, 0, false).unwrap().as_ptr());
        assert_ne!(one, push.frame(Encoding::Json, 0, false).unwrap());
        assert_ne!(one, push.frame(Encoding::Proto, 1, false).unwrap());
    }
}
