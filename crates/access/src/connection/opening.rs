//! From the first frame to a welcomed session.

use std::sync::Arc;
use std::time::Duration;

use barid_core::CloseCode;
use barid_wire::frames::Ignored;
use tokio::time::timeout;

use super::{Codec, decode, forget, refusal};
use crate::handle::Handle;
use crate::handshake::Accepted;
use crate::node::Node;
use crate::session::{Close, Connected, Connecting, Refusal, Unidentified};

/// From the first frame to a welcomed session. The error says why it is refused; `None`: the device left.
pub(super) async fn identify(
    node: &Arc<Node>,
    accepted: &mut Accepted,
) -> Result<(Connected, Arc<Handle>, Codec), Option<Refusal>> {
    let limit = Duration::from_millis(node.limits.hello_timeout_ms);
    let hello = timeout(limit, first_frame(node, accepted)).await;
    let late = || Close::new(CloseCode::Heartbeat, "no hello came in time");
    let connecting =
        hello.unwrap_or_else(|_| Err(Some(late()))).map_err(|close| close.map(Refusal::from))?;
    if connecting.attempt_ahead.is_some() {
        node.metrics.limit("attempt_ahead");
    }
    let codec = Codec {
        encoding: accepted.encoding,
        zstd: connecting.accepts_zstd,
        visible_pings: connecting.visible_pings,
        ping_interval: node.heartbeat.interval(connecting.ping_interval_ms),
    };
    let as_named = connecting.clone();
    let entered = match enter(node, connecting).await {
        Err(refusal) => match as_named.counted_on(refusal.attempt) {
            Some(connecting) => enter(node, connecting).await,
            None => Err(refusal),
        },
        entered => entered,
    };
    let (session, handle) = entered.map_err(Some)?;
    Ok((session, handle, codec))
}

/// Registers a session and asks the mailbox for it.
async fn enter(
    node: &Arc<Node>,
    connecting: Connecting,
) -> Result<(Connected, Arc<Handle>), Refusal> {
    let identity = &connecting.identity;
    let connection = node.next_connection();
    let handle = Arc::new(Handle::new(
        connection,
        identity.attempt,
        identity.user.clone(),
        identity.device.clone(),
    ));
    // Before the route is written: a push must find the session that its route names.
    if !node.registry.insert(Arc::clone(&handle), node.limits.user_connections_max) {
        node.metrics.limit("user_connections");
        let text = "this user has as many devices connected here as it may have";
        return Err(Close::new(CloseCode::Limit, text).into());
    }
    match connect(node, connecting, &handle).await {
        Ok(session) => Ok((session, handle)),
        Err(refusal) => {
            node.registry.remove(handle.user(), connection);
            handle.finish();
            forget(node, &handle).await;
            Err(refusal)
        }
    }
}

async fn first_frame(node: &Node, accepted: &mut Accepted) -> Result<Connecting, Option<Close>> {
    let unidentified = Unidentified::new(accepted.claims.clone(), accepted.at_ms);
    loop {
        let message = match accepted.socket.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => return Err(refusal(node, &error)),
            None => return Err(None),
        };
        if let Some(heard) = decode(node, accepted.encoding, &message).map_err(Some)? {
            let ahead_ms = node.limits.attempt_ahead_ms;
            let unknown = || Close::new(CloseCode::BadFrame, "the first frame is hello");
            if matches!(heard.ignored, Some(Ignored::Field(_))) {
                node.metrics.ignored("field");
            }
            let frame = heard.frame.ok_or_else(|| Some(unknown()))?;
            return unidentified.frame(frame, ahead_ms).map_err(Some);
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
    let request = connecting.request(node.session(handle.connection));
    let limit = Duration::from_millis(node.limits.hello_timeout_ms);
    let call = node.until_answered("connect", || node.mailbox.connect(request.clone()));
    let away = |_| Close::new(CloseCode::Overloaded, "the mailbox did not answer in time");
    let outcome = timeout(limit, call).await.map_err(away)?;
    let (session, replaced) = connecting.answered(outcome, node.settings)?;
    let text = "a newer connection of this device took over";
    node.registry.each(handle.user(), |other| {
        if other.device() == handle.device() && other.attempt < handle.attempt {
            other.close(Close::new(CloseCode::Replaced, text));
        }
    });
    if let Some(replaced) = replaced {
        if replaced.node == node.id {
            if let Some(other) = node.registry.get(handle.user(), replaced.connection)
                && other.device() == handle.device()
                && other.connection != handle.connection
            {
                other.close(Close::new(CloseCode::Replaced, text));
            }
        } else {
            node.peers.close(handle.user(), handle.device(), replaced);
        }
    }
    Ok(session)
}
