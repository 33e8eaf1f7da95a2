//! Delivery of a batch: looks up the routes of all its users at once, then queues the items for their nodes, in order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use barid_core::{
    AppId, Audience, AudienceKey, ConnectionId, DeviceId, Incarnation, NodeId, SessionRef, UserId,
};
use barid_mailbox::{RedisTime, Route, Standing, UserKey};
use barid_runtime::{Hop, TraceEvent, Tracer};
use barid_wire::envelope::{self, Header};
use barid_wire::internal::{
    DispatchBatch, DispatchReply, NodeFanout, NodePush, NodeResend, Push, PushAudience, Resend,
    ResendDevice, Sampled, Unreachable,
};

use crate::metrics::Metrics;
use crate::nodes::{NodeItem, Nodes, Unsent};
use crate::reap::{Reaper, Void};
use crate::resolve::{Away, Loaded, Lookup, Resolver, Routes};

/// The parts that handle a batch. Cheap to clone.
pub struct Delivery<R> {
    /// The routes.
    pub resolver: Resolver<R>,
    /// The links to access nodes.
    pub nodes: Arc<Nodes>,
    /// Removes void routes.
    pub reaper: Reaper,
    /// How long a node must be gone until its routes are removed.
    pub void_after: Duration,
    /// The metrics.
    pub metrics: Metrics,
    /// Logs sampled messages.
    pub tracer: Tracer,
}

/// A batch with the routes of its users.
pub struct Resolved {
    batch: u64,
    pushes: Vec<(Push, Option<(UserKey, Loaded)>)>,
    resends: Vec<(Resend, Option<(UserKey, Loaded)>)>,
}

impl<R: Routes> Delivery<R> {
    /// Looks up every user of a batch. All lookups start at once. Several batches may be looked up concurrently.
    pub async fn resolve(&self, batch: DispatchBatch) -> Resolved {
        let looked: Vec<_> = batch
            .pushes
            .into_iter()
            .map(|push| {
                let looked = key(&push.app, &push.user).map(|user| {
                    let lookup = self.resolver.look(&user);
                    (user, lookup)
                });
                (push, looked)
            })
            .collect();
        let looked_again: Vec<_> = batch
            .resends
            .into_iter()
            .map(|resend| {
                let looked = key(&resend.app, &resend.user).map(|user| {
                    let lookup = self.resolver.look_again(&user);
                    (user, lookup)
                });
                (resend, looked)
            })
            .collect();
        Resolved {
            batch: batch.batch,
            pushes: arrived(looked).await,
            resends: arrived(looked_again).await,
        }
    }

    /// Queues the items of a batch for their nodes, in order. Never waits.
    pub fn hand_on(&self, resolved: Resolved) -> DispatchReply {
        let now = Instant::now();
        for (push, user) in resolved.pushes {
            if let Some(audience) = &push.audience {
                self.fan_out(&push, audience, now);
                continue;
            }
            match user {
                Some((user, Ok(routes))) => self.push(push, &user, &routes, now),
                Some((_, Err(Away))) => self.count_push("away"),
                None => self.count_push("invalid"),
            }
        }
        let mut reply = DispatchReply { batch: resolved.batch, ..Default::default() };
        for (index, (resend, user)) in resolved.resends.into_iter().enumerate() {
            let reached = match user {
                Some((user, Ok(routes))) => self.resend(&resend, &user, &routes),
                Some((_, Err(Away))) => {
                    self.count_resend("away");
                    Err(Unreachable::Away)
                }
                None => {
                    self.count_resend("invalid");
                    Ok(())
                }
            };
            if let Err(why) = reached {
                reply.unreachable.push(u32::try_from(index).unwrap_or(u32::MAX));
                reply.why.push(why.into());
            }
        }
        self.metrics.batches.inc();
        reply
    }

    fn push(&self, push: Push, user: &UserKey, routes: &[Route], now: Instant) {
        if routes.is_empty() {
            return self.count_push("no_route");
        }
        let dispatched_after_us = self.dispatched(&push, self.resolver.redis_time(user), now);
        for (at, route) in routes.iter().enumerate() {
            let session = &route.session;
            let same_incarnation = |other: &Route| {
                other.session.node == session.node
                    && other.session.incarnation == session.incarnation
            };
            if routes[..at].iter().any(same_incarnation) {
                continue; // the node has it already, with another route
            }
            let there = routes[at..].iter().filter(|other| same_incarnation(other));
            let connections = there.map(|other| other.session.connection.0).collect();
            let item = NodeItem::Push(NodePush {
                app: push.app.clone(),
                user: push.user.clone(),
                envelope: push.envelope.clone(),
                connections,
                dispatched_after_us,
            });
            match self.nodes.send(session, item) {
                Ok(()) => self.count_push("handed"),
                Err(unsent) => {
                    self.count_push(unsent.label());
                    if unsent == Unsent::Void {
                        routes[at..].iter().filter(|r| same_incarnation(r)).for_each(|route| {
                            self.reap_if_void(user, route);
                        });
                    }
                }
            }
        }
    }

    /// Queues a message for an audience for each node that had members when it was accepted. A node without a lease has
    /// no members any more.
    fn fan_out(&self, push: &Push, audience: &PushAudience, now: Instant) {
        let Some(key) = audience_key(&push.app, &audience.mailbox) else {
            return self.count_fanout("invalid");
        };
        let time = self.resolver.redis_time_of(&key);
        let dispatched_after_us = self.dispatched(push, time, now);
        for name in &audience.nodes {
            let Ok(node) = NodeId::new(name) else {
                self.count_fanout("invalid");
                continue;
            };
            let item = NodeItem::Fanout(NodeFanout {
                app: push.app.clone(),
                mailbox: audience.mailbox.clone(),
                envelope: push.envelope.clone(),
                dispatched_after_us,
            });
            match self.nodes.send_to_any(&node, item) {
                Ok(()) => self.count_fanout("handed"),
                Err(unsent) => self.count_fanout(unsent.label()),
            }
        }
    }

    /// Records the hop that ends here. Its end is sent to the node, where the next hop begins. `time` is that of the
    /// mailbox's master.
    fn dispatched(&self, push: &Push, time: Option<RedisTime>, now: Instant) -> Option<u32> {
        let accepted_us = Header::parse(&push.envelope).ok()?.accepted_at_us;
        let now_us = time?.us(now);
        if push.sampled {
            self.trace(push, now_us);
        }
        self.metrics.hops.observe(Hop::AcceptedDispatched, accepted_us, now_us);
        Some(u32::try_from(now_us.saturating_sub(accepted_us)).unwrap_or(u32::MAX))
    }

    fn trace(&self, push: &Push, at_us: u64) {
        let Ok((_, entry)) = envelope::decode(push.envelope.clone()) else { return };
        self.tracer.log(TraceEvent {
            hop: "dispatched",
            traceparent: &entry.traceparent,
            id: &entry.id,
            app: &push.app,
            user: &push.user,
            produced_ms: entry.produced_at_ms,
            at_us,
            ..Default::default()
        });
    }

    fn trace_resend(&self, resend: &Resend, user: &UserKey, device: &ResendDevice) {
        let Some(Sampled { id, traceparent, produced_at_ms }) = &device.sampled else { return };
        let Some(time) = self.resolver.redis_time(user) else { return };
        self.tracer.log(TraceEvent {
            hop: "dispatched",
            traceparent,
            id,
            app: &resend.app,
            user: &resend.user,
            device: &device.device,
            how: "resend",
            produced_ms: *produced_at_ms,
            at_us: time.us(Instant::now()),
        });
    }

    /// Queues a re-send for the node of one of its devices. Returns why the node cannot be reached, if so.
    fn resend(&self, resend: &Resend, user: &UserKey, routes: &[Route]) -> Result<(), Unreachable> {
        let mut reached = Ok(());
        for device in &resend.devices {
            let route = routes.iter().find(|route| route.device.as_str() == device.device);
            let same = route.filter(|route| {
                let session = &route.session;
                session.node.as_str() == device.node
                    && session.incarnation.0 == device.incarnation
                    && session.connection.0 == device.connection
            });
            let Some(route) = same else {
                // The session has ended; a newer one reads the mailbox when it connects.
                self.count_resend("superseded");
                continue;
            };
            let item = NodeItem::Resend(NodeResend {
                app: resend.app.clone(),
                user: resend.user.clone(),
                connection: device.connection,
                device: device.device.clone(),
            });
            match self.nodes.send(&route.session, item) {
                Ok(()) => {
                    self.count_resend("handed");
                    self.trace_resend(resend, user, device);
                }
                Err(unsent) => {
                    self.count_resend(unsent.label());
                    if unsent == Unsent::Void {
                        self.reap_if_void(user, route);
                    }
                    reached = Err(self.unreachable(unsent, route));
                }
            }
        }
        reached
    }

    fn unreachable(&self, unsent: Unsent, route: &Route) -> Unreachable {
        match unsent {
            Unsent::Full => Unreachable::Full,
            Unsent::Down => Unreachable::Down,
            Unsent::Void if self.standing(route) == Standing::Unsure => Unreachable::Down,
            Unsent::Void => Unreachable::Void,
        }
    }

    fn reap_if_void(&self, user: &UserKey, route: &Route) {
        if self.standing(route) == Standing::Over {
            self.reaper.offer(Void {
                user: user.clone(),
                device: Some(route.device.clone()),
                session: route.session.clone(),
            });
        }
    }

    fn standing(&self, route: &Route) -> Standing {
        Standing::of(self.nodes.void_since(&route.session), self.void_after)
    }

    fn count_push(&self, outcome: &str) {
        self.metrics.pushes.with_label_values(&[outcome]).inc();
    }

    fn count_fanout(&self, outcome: &str) {
        self.metrics.fanouts.with_label_values(&[outcome]).inc();
    }

    fn count_resend(&self, outcome: &str) {
        self.metrics.resends.with_label_values(&[outcome]).inc();
    }
}

/// `None` if a name is invalid.
fn audience_key(app: &str, mailbox: &str) -> Option<AudienceKey> {
    Some(AudienceKey { app: AppId::new(app).ok()?, audience: Audience::new(mailbox).ok()? })
}

fn key(app: &str, user: &str) -> Option<UserKey> {
    Some(UserKey { app: AppId::new(app).ok()?, user: UserId::new(user).ok()? })
}

type Looked<T, L> = Vec<(T, Option<(UserKey, L)>)>;

async fn arrived<T>(looked: Looked<T, Lookup>) -> Looked<T, Loaded> {
    let mut arrived = Vec::with_capacity(looked.len());
    for (item, looked) in looked {
        let user = match looked {
            Some((user, lookup)) => Some((user, lookup.routes().await)),
            None => None,
        };
        arrived.push((item, user));
    }
    arrived
}

/// The void route in a node's answer "gone"; `None` if its names are invalid.
pub fn void_of(
    node: &NodeId,
    incarnation: Incarnation,
    gone: &barid_wire::internal::Gone,
) -> Option<Void> {
    let user = key(&gone.app, &gone.user)?;
    let device = match gone.device.as_str() {
        "" => None,
        device => Some(DeviceId::new(device).ok()?),
    };
    let connection = ConnectionId(gone.connection);
    Some(Void { user, device, session: SessionRef { node: node.clone(), incarnation, connection } })
}
