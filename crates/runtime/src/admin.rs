//! `/metrics`, `/healthz` and `/readyz` of a role.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus::{Encoder as _, TextEncoder};

use crate::{AdminConfig, Context};

/// Binds and serves in a task of its own, until the process ends: metrics are wanted to the last.
///
/// # Errors
/// The address cannot be bound.
pub(crate) async fn serve(
    config: &AdminConfig,
    role: &'static str,
    context: &Context,
) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(config.listen).await?;
    context.announce("admin", listener.local_addr()?);
    register_process(context, role);
    let app = router(context.clone());
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!(%error, "admin endpoint stopped");
        }
    });
    Ok(())
}

fn router(context: Context) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .with_state(context)
}

/// CPU, memory, open files and start time of the process, and which build it is.
fn register_process(context: &Context, role: &'static str) {
    let process = prometheus::process_collector::ProcessCollector::for_self();
    let build = prometheus::IntGauge::with_opts(
        prometheus::Opts::new("barid_build_info", "1, with the role and version as labels")
            .const_label("role", role)
            .const_label("version", env!("CARGO_PKG_VERSION")),
    );
    let registered = context.metrics.register(Box::new(process)).and_then(|()| {
        let build = build?;
        build.set(1);
        context.metrics.register(Box::new(build))
    });
    if let Err(error) = registered {
        tracing::warn!(%error, "process metrics are missing");
    }
}

async fn metrics(State(context): State<Context>) -> Result<Vec<u8>, (StatusCode, String)> {
    let mut text = Vec::new();
    TextEncoder::new()
        .encode(&context.metrics.gather(), &mut text)
        .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(text)
}

/// 200 when every condition holds and the role is not draining; else 503, a line a reason.
async fn readyz(State(context): State<Context>) -> (StatusCode, String) {
    let mut reasons = context.health.not_ready();
    if context.shutdown.is_draining() {
        reasons.push(("draining", "told to stop".into()));
    }
    if reasons.is_empty() {
        return (StatusCode::OK, "ready\n".into());
    }
    let lines = reasons.iter().map(|(name, reason)| format!("{name}: {reason}\n")).collect();
    (StatusCode::SERVICE_UNAVAILABLE, lines)
}
