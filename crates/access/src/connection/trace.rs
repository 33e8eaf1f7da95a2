//! Trace events of sampled messages.

use barid_runtime::{TraceEvent, Tracer};
use barid_wire::envelope::Envelope;

use crate::handle::Handle;

/// Logs that a sampled message was written.
pub(super) fn wrote(
    tracer: &Tracer,
    handle: &Handle,
    entry: &Envelope,
    how: &'static str,
    at_us: u64,
) {
    if !entry.traceparent.is_empty() {
        let (id, traceparent) = (&*entry.id, &*entry.traceparent);
        let produced_ms = entry.produced_at_ms;
        let seen = TraceEvent { id, traceparent, produced_ms, ..Default::default() };
        tracer.log(TraceEvent { hop: "written", how, at_us, ..of(handle, seen) });
    }
}

/// A trace event with the names of the session.
pub(super) fn of<'a>(handle: &'a Handle, seen: TraceEvent<'a>) -> TraceEvent<'a> {
    let user = handle.user();
    let (app, device) = (user.app.as_str(), handle.device().as_str());
    TraceEvent { app, user: user.user.as_str(), device, ..seen }
}
