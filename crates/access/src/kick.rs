//! Kick: closes sessions (4503) on an operator's order, at a bounded rate, and reports the progress.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use barid_core::{AppId, CloseCode, DeviceId, UserId};
use barid_mailbox::UserKey;
use barid_session::Close;
use barid_wire::internal::access_admin_server::AccessAdmin;
use barid_wire::internal::{KickProgress, KickRequest};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::handle::Handle;
use crate::node::Node;
use crate::registry::Registry;

/// Concurrent orders.
const ORDERS_MAX: usize = 8;
/// Bound of an order's reason, bytes.
const REASON_BYTES_MAX: usize = 256;
/// Time between two progress reports, and between two checks of sessions that are ending.
const REPORT_EVERY: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(20);
/// A closed session ends within this time, unless its task does not run.
const END_LIMIT: Duration = Duration::from_secs(5);

/// The admin service, for operators.
pub struct AdminService {
    node: Arc<Node>,
    orders: Arc<Semaphore>,
}

impl AdminService {
    /// Creates the service of a node.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node, orders: Arc::new(Semaphore::new(ORDERS_MAX)) }
    }
}

#[tonic::async_trait]
impl AccessAdmin for AdminService {
    type KickStream = ReceiverStream<Result<KickProgress, Status>>;

    async fn kick(
        &self,
        request: Request<KickRequest>,
    ) -> Result<Response<Self::KickStream>, Status> {
        let order = request.into_inner();
        let target = target(&order)?;
        if order.reason.len() > REASON_BYTES_MAX {
            let text = format!("a reason has at most {REASON_BYTES_MAX} bytes");
            return Err(Status::invalid_argument(text));
        }
        let busy = |_| Status::resource_exhausted("too many kicks are under way");
        let permit = Arc::clone(&self.orders).try_acquire_owned().map_err(busy)?;
        let kicking = Kicking {
            handles: target.select(&self.node.sessions.registry),
            per_second: match order.per_second {
                0 => self.node.policy.limits.kicks_per_second,
                given => given,
            },
            reason: match order.reason.as_str() {
                "" => "closed by an operator".into(),
                given => given.to_owned(),
            },
            progress: KickProgress::default(),
            reported: Instant::now(),
            _permit: permit,
        };
        tracing::info!(
            %target,
            matched = kicking.handles.len(),
            per_second = kicking.per_second,
            reason = kicking.reason,
            "kick started"
        );
        let (replies, stream) = mpsc::channel(4);
        tokio::spawn(kicking.run(replies));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// The sessions that an order selects.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Device(UserKey, DeviceId),
    User(UserKey),
    App(AppId),
    Everyone,
}

fn target(order: &KickRequest) -> Result<Target, Status> {
    let KickRequest { app, user, device, everyone, .. } = order;
    let invalid = |error: barid_core::InvalidName| Status::invalid_argument(error.to_string());
    match (everyone, app.as_str(), user.as_str(), device.as_str()) {
        (true, "", "", "") => Ok(Target::Everyone),
        (true, ..) => Err(Status::invalid_argument("everyone excludes app, user and device")),
        (false, app, "", "") => Ok(Target::App(AppId::new(app).map_err(invalid)?)),
        (false, _, "", _) => Err(Status::invalid_argument("device needs user")),
        (false, app, user, device) => {
            let app = AppId::new(app).map_err(invalid)?;
            let user = UserKey { app, user: UserId::new(user).map_err(invalid)? };
            Ok(match device {
                "" => Target::User(user),
                device => Target::Device(user, DeviceId::new(device).map_err(invalid)?),
            })
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(UserKey { app, user }, device) => {
                write!(f, "device {device} of user {user} of app {app}")
            }
            Self::User(UserKey { app, user }) => write!(f, "user {user} of app {app}"),
            Self::App(app) => write!(f, "app {app}"),
            Self::Everyone => f.write_str("everyone"),
        }
    }
}

impl Target {
    /// The selected sessions that exist now.
    fn select(&self, registry: &Registry) -> Vec<Weak<Handle>> {
        let mut selected = Vec::new();
        match self {
            Self::Device(user, device) => registry.each(user, |handle| {
                if handle.device() == device {
                    selected.push(Arc::downgrade(handle));
                }
            }),
            Self::User(user) => {
                registry.each(user, |handle| selected.push(Arc::downgrade(handle)));
            }
            Self::App(app) => {
                let all = registry.all();
                let theirs = all.iter().filter(|handle| handle.user().app == *app);
                selected.extend(theirs.map(Arc::downgrade));
            }
            Self::Everyone => selected.extend(registry.all().iter().map(Arc::downgrade)),
        }
        selected
    }
}

/// An order under way.
struct Kicking {
    handles: Vec<Weak<Handle>>,
    per_second: u32,
    reason: String,
    progress: KickProgress,
    reported: Instant,
    _permit: OwnedSemaphorePermit,
}

type Replies = mpsc::Sender<Result<KickProgress, Status>>;

impl Kicking {
    async fn run(mut self, replies: Replies) {
        let begun = Instant::now();
        let handles = std::mem::take(&mut self.handles);
        self.progress.matched = handles.len() as u64;
        // Closed sessions that have not ended yet.
        let mut ending: Vec<Arc<Handle>> = Vec::new();
        for (index, handle) in handles.into_iter().enumerate() {
            let at = begun + Duration::from_secs_f64(index as f64 / f64::from(self.per_second));
            while at > Instant::now() {
                sleep_until(at.min(Instant::now() + REPORT_EVERY)).await;
                if !self.report(&mut ending, &replies).await {
                    return;
                }
            }
            // A session that has ended by itself is not counted as closed.
            if let Some(handle) = handle.upgrade().filter(|handle| !handle.is_over()) {
                handle.close(Close::new(CloseCode::Kicked, self.reason.clone()));
                ending.push(handle);
            }
        }
        let limit = Instant::now() + END_LIMIT;
        while !ending.is_empty() && Instant::now() < limit {
            sleep_until(Instant::now() + LOOK).await;
            if !self.report(&mut ending, &replies).await {
                return;
            }
        }
        tracing::info!(
            matched = self.progress.matched,
            closed = self.progress.closed,
            unfinished = ending.len(),
            "kick finished"
        );
        // Fails if the caller has gone, which no longer matters.
        let _ = replies.send(Ok(KickProgress { done: true, ..self.progress })).await;
    }

    /// Counts the sessions that have ended, and reports once per interval. Returns whether the caller is still
    /// connected.
    async fn report(&mut self, ending: &mut Vec<Arc<Handle>>, replies: &Replies) -> bool {
        if replies.is_closed() {
            tracing::info!(closed = self.progress.closed, "kick cancelled: the caller has gone");
            return false;
        }
        let before = ending.len();
        ending.retain(|handle| !handle.is_over());
        self.progress.closed += (before - ending.len()) as u64;
        if self.reported.elapsed() >= REPORT_EVERY {
            self.reported = Instant::now();
            return replies.send(Ok(self.progress)).await.is_ok();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(app: &str, user: &str, device: &str, everyone: bool) -> KickRequest {
        let (app, user, device) = (app.into(), user.into(), device.into());
        KickRequest { app, user, device, everyone, ..Default::default() }
    }

    #[test]
    fn an_order_names_whom_it_means() {
        let user = || UserKey { app: AppId::new("a").unwrap(), user: UserId::new("u").unwrap() };
        let device = DeviceId::new("d").unwrap();
        assert_eq!(target(&order("", "", "", true)).unwrap(), Target::Everyone);
        assert_eq!(target(&order("a", "", "", false)).unwrap(), Target::App(user().app));
        assert_eq!(target(&order("a", "u", "", false)).unwrap(), Target::User(user()));
        assert_eq!(target(&order("a", "u", "d", false)).unwrap(), Target::Device(user(), device));
        // Nothing that is left out means everyone.
        for bad in [
            order("", "", "", false),
            order("", "u", "", false),
            order("a", "", "d", false),
            order("a", "", "", true),
            order("a:b", "u", "", false),
        ] {
            let status = target(&bad).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{bad:?}");
        }
    }
}
