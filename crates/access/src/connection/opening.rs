//! From the first frame to a welcomed session.

use std::sync::Arc;
use std::time::Duration;

use barid_core::{Audience, CloseCode, Position};
use barid_mailbox::ConnectOutcome;
use barid_session::{Close, Connected, Connecting, Refusal, TokenFingerprint, Unidentified};
use barid_wire::frames::{Encoding, Ignored};
use tokio::time::{Instant, sleep, timeout};

use crate::connection::codec::{Codec, decode, refusal};
use crate::connection::ending::forget;
use crate::handle::Handle;
use crate::handshake::Accepted;
use crate::labels::{Call, Limit, RevokedAt};
use crate::node::Node;
use crate::revocations::REVOKED;
use crate::socket::{Received, Socket};
use crate::upstream::Spent;

/// How often a connection without Hello looks at how much time it has, and whether its token has been revoked.
const LOOK: Duration = Duration::from_secs(1);

/// A session that waits for its Welcome.
pub(super) struct Identified {
    pub session: Connected,
    pub handle: Arc<Handle>,
    pub codec: Codec,
    /// The name and version of the device's SDK.
    pub sdk: String,
    /// Where the device stands in mailboxes of audiences.
    pub positions: Vec<(Audience, Position)>,
    /// A field of Hello that is unknown here.
    pub ignored: Option<String>,
}

/// Reads Hello and creates the session. The error says why the device is refused; `None`: it has gone.
pub(super) async fn identify(
    node: &Arc<Node>,
    accepted: &mut Accepted,
) -> Result<Identified, Option<Refusal>> {
    let hello = hello_in_time(node, accepted).await;
    let (mut connecting, ignored) = hello.map_err(|close| close.map(Refusal::from))?;
    accepted.unidentified.identified();
    if connecting.attempt_ahead.is_some() {
        node.metrics.limit(Limit::AttemptAhead);
    }
    let codec = Codec {
        encoding: accepted.encoding,
        zstd: connecting.accepts_zstd,
        visible_pings: connecting.visible_pings,
        ping_interval: node.policy.heartbeat.interval(connecting.ping_interval_ms),
    };
    let sdk = std::mem::take(&mut connecting.sdk);
    let positions = std::mem::take(&mut connecting.audiences);
    let as_named = connecting.clone();
    let token = accepted.claims.token;
    let entered = match enter(node, connecting, token).await {
        Err(refusal) => match as_named.counted_on(refusal.attempt) {
            Some(connecting) => enter(node, connecting, token).await,
            None => Err(refusal),
        },
        entered => entered,
    };
    let (session, handle) = entered.map_err(Some)?;
    Ok(Identified { session, handle, codec, sdk, positions, ignored })
}

/// Waits for Hello, and returns its first unknown field with it; for less time the more connections do, and until the
/// token is revoked: no revocation finds a connection before it is registered.
async fn hello_in_time(
    node: &Node,
    accepted: &mut Accepted,
) -> Result<(Connecting, Option<String>), Option<Close>> {
    let begun = Instant::now();
    let Accepted { socket, encoding, claims, at_ms, evicted, spent, .. } = accepted;
    let unidentified = Unidentified::new(claims.clone(), *at_ms);
    let hello = first_frame(node, socket, spent, *encoding, unidentified);
    tokio::pin!(hello);
    loop {
        let left = node.policy.admission.hello_timeout().saturating_sub(begun.elapsed());
        if left.is_zero() {
            // Only a client that had the full time is to blame.
            let code = match begun.elapsed() < node.policy.limits.hello_timeout() {
                true => CloseCode::Overloaded,
                false => CloseCode::Heartbeat,
            };
            return Err(Some(Close::new(code, "no hello arrived in time")));
        }
        tokio::select! {
            biased;
            hello = &mut hello => return hello,
            _ = &mut *evicted => {
                node.metrics.limit(Limit::Evicted);
                let text = "no hello arrived, and other devices wait";
                return Err(Some(Close::new(CloseCode::Overloaded, text)));
            }
            () = sleep(left.min(LOOK)) => (),
        }
        if node.revocations.hit(&claims.user, &claims.token, node.clock.now_s()).is_some() {
            node.metrics.revoked(RevokedAt::Session);
            return Err(Some(Close::new(CloseCode::TokenExpired, REVOKED)));
        }
    }
}

/// Registers a session, and connects it to its mailbox.
async fn enter(
    node: &Arc<Node>,
    connecting: Connecting,
    token: TokenFingerprint,
) -> Result<(Connected, Arc<Handle>), Refusal> {
    let identity = &connecting.identity;
    let connection = node.sessions.next_connection();
    let handle = Arc::new(Handle::new(
        connection,
        identity.attempt,
        identity.user.clone(),
        identity.device.clone(),
        token,
    ));
    // Before the route is written: a push must find the session that its route names.
    if !node.sessions.registry.insert(Arc::clone(&handle), node.policy.limits.user_connections_max)
    {
        node.metrics.limit(Limit::UserConnections);
        let text = "too many devices of this user are connected to this node";
        return Err(Close::new(CloseCode::Limit, text).into());
    }
    // The handshake's check was before the session could be found by a revocation.
    if node.revocations.hit(handle.user(), &token, node.clock.now_s()).is_some() {
        node.sessions.registry.remove(handle.user(), connection);
        let close = Close::new(CloseCode::TokenExpired, REVOKED);
        if handle.close(close.clone()) {
            node.metrics.revoked(RevokedAt::Session);
        }
        handle.finish();
        return Err(close.into());
    }
    match connect(node, connecting, &handle).await {
        Ok(session) => Ok((session, handle)),
        Err(refusal) => {
            node.sessions.registry.remove(handle.user(), connection);
            handle.finish();
            forget(node, &handle).await;
            Err(refusal)
        }
    }
}

async fn first_frame(
    node: &Node,
    socket: &mut Socket,
    spent: &mut Spent,
    encoding: Encoding,
    unidentified: Unidentified,
) -> Result<(Connecting, Option<String>), Option<Close>> {
    let mut charge = |received| {
        let charged = node.policy.upstream.charge(spent, received, || node.clock.uptime_us());
        charged.map_err(|over| {
            node.metrics.limit(over.limit);
            Some(Close::new(CloseCode::Limit, over.text))
        })
    };
    charge(socket.received())?;
    loop {
        let mut received = Received::default();
        let next = socket.next(&mut received).await;
        charge(received)?;
        let message = match next {
            Some(Ok(None)) => continue,
            Some(Ok(Some(message))) => message,
            Some(Err(error)) => return Err(refusal(&node.metrics, &error)),
            None => return Err(None),
        };
        if let Some(heard) = decode(&node.metrics, encoding, &message).map_err(Some)? {
            let ahead_ms = node.policy.limits.attempt_ahead_ms;
            let unknown = || Close::new(CloseCode::BadFrame, "the first frame is hello");
            let ignored = match heard.ignored {
                Some(Ignored::Field(field)) => Some(field),
                _ => None,
            };
            let frame = heard.frame.ok_or_else(|| Some(unknown()))?;
            let connecting = unidentified.frame(frame, ahead_ms).map_err(Some)?;
            return Ok((connecting, ignored));
        }
        if message.is_close() {
            return Err(None);
        }
    }
}

async fn connect(
    node: &Arc<Node>,
    connecting: Connecting,
    handle: &Arc<Handle>,
) -> Result<Connected, Refusal> {
    let request = connecting.request(node.sessions.reference(handle.connection));
    let limit = node.policy.limits.hello_timeout();
    let (store, app) = (node.mailboxes.store(), &handle.user().app);
    // Most users are known: they need no permission, and new ones one call more.
    let connecting_user = async {
        let connect = || store.connect(request.clone());
        if !node.policy.admission.limits_new_users() {
            return Ok(node.mailboxes.until_answered(Call::Connect, connect).await);
        }
        let connect_known = || store.connect_known(request.clone());
        let outcome = node.mailboxes.until_answered(Call::Connect, connect_known).await;
        if outcome != ConnectOutcome::NotCreated {
            return Ok(outcome);
        }
        if !node.policy.admission.permit_new_user(app) {
            node.metrics.limit(Limit::AppNewUsers);
            let text = "the app has too many new users: come back later";
            return Err(Close::new(CloseCode::Overloaded, text));
        }
        Ok(node.mailboxes.until_answered(Call::Connect, connect).await)
    };
    let away = |_| Close::new(CloseCode::Overloaded, "the mailbox did not answer in time");
    let outcome = timeout(limit, connecting_user).await.map_err(away)??;
    let (session, replaced) = connecting.answered(outcome, node.policy.settings)?;
    let text = "a newer connection of this device took over";
    node.sessions.registry.each(handle.user(), |other| {
        if other.device() == handle.device() && other.attempt < handle.attempt {
            other.close(Close::new(CloseCode::Replaced, text));
        }
    });
    if let Some(replaced) = replaced {
        if replaced.node == node.sessions.node {
            if let Some(other) = node.sessions.registry.get(handle.user(), replaced.connection)
                && other.device() == handle.device()
                && other.connection != handle.connection
            {
                other.close(Close::new(CloseCode::Replaced, text));
            }
        } else if !node.peers.close(handle.user(), handle.device(), replaced) {
            node.metrics.limit(Limit::PeerCloses);
        }
    }
    Ok(session)
}
