//! `/metrics`, `/healthz` and `/readyz` of a role. They have a thread of their own, so that they answer even if the
//! role's runtime is blocked.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Encoder as _, IntCounter, IntGauge, TextEncoder};
use tokio::runtime::{Builder, Handle};
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::process::Process;
use crate::{AdminConfig, Condition, Context, telemetry};

/// How often the role's runtime reports that it runs tasks, and changes of the conditions are logged.
const BEAT: Duration = Duration::from_millis(250);
const LOOK: Duration = Duration::from_secs(1);
/// Wait after an error of accept, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);
/// Bound of a request's head, bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Bound of a connection's life: clients open another one.
const LIFETIME: Duration = Duration::from_secs(600);

/// Binds, and serves on a thread of its own until the process ends. Call it on the role's runtime, which it watches.
///
/// # Errors
/// The address cannot be bound, or no thread can be started.
pub fn serve(config: &AdminConfig, role: &'static str, context: &Context) -> std::io::Result<()> {
    let listener = std::net::TcpListener::bind(config.listen)?;
    listener.set_nonblocking(true)?;
    context.announce("admin", listener.local_addr()?);
    register(context, role);
    let blocked_after = Duration::from_secs(config.blocked_after_seconds);
    let runtime = context.health.lapsing("runtime", "heartbeat of the runtime", blocked_after);
    tokio::spawn(beat(runtime.vital()));
    let (config, context) = (config.clone(), context.clone());
    let own = Builder::new_current_thread().enable_all().build()?;
    let thread = std::thread::Builder::new().name("admin".into());
    thread.spawn(move || own.block_on(run(listener, config, context)))?;
    Ok(())
}

async fn run(listener: std::net::TcpListener, config: AdminConfig, context: Context) {
    let health = context.health.clone();
    tokio::spawn(async move {
        let mut look = interval(LOOK);
        loop {
            look.tick().await;
            // Logs changes of the conditions.
            health.not_ready();
        }
    });
    match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => accept(listener, &config, context).await,
        Err(error) => tracing::error!(%error, "admin endpoint stopped"),
    }
}

/// Serves connections. If there are too many, the oldest is closed, so that a flood of silent ones locks nobody out.
/// Never returns.
async fn accept(listener: tokio::net::TcpListener, config: &AdminConfig, context: Context) {
    let closed = closed_counter(&context);
    let service = TowerToHyperService::new(router(context));
    let head = Duration::from_secs(config.request_timeout_seconds);
    let mut open: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of the admin endpoint");
                sleep(PAUSE).await;
                continue;
            }
        };
        open.retain(|connection| !connection.is_finished());
        if open.len() >= config.connections_max
            && let Some(oldest) = open.pop_front()
        {
            oldest.abort();
            closed.inc();
        }
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(head)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service.clone());
        let task = tokio::spawn(async move {
            let connection = std::pin::pin!(connection);
            // Errors are those of the peer.
            let _ = timeout(LIFETIME, connection).await;
        });
        open.push_back(task.abort_handle());
    }
}

fn closed_counter(context: &Context) -> IntCounter {
    let text = "Connections of the admin endpoint that were closed for newer ones";
    let counter = IntCounter::new("barid_admin_connections_closed_total", text);
    let counter = counter.expect("constants in range");
    if let Err(error) = context.metrics.register(Box::new(counter.clone())) {
        tracing::warn!(%error, "cannot register a metric of the admin endpoint");
    }
    counter
}

async fn beat(runtime: Condition) {
    let mut beat = interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        runtime.ready();
    }
}

fn router(context: Context) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(async || (StatusCode::NOT_FOUND, "/metrics, /healthz and /readyz are here\n"))
        .method_not_allowed_fallback(async || (StatusCode::METHOD_NOT_ALLOWED, "GET and HEAD\n"))
        .with_state(context)
}

/// Registers the metrics of the process (CPU, memory, open files, start time), its build, its worker threads, and its
/// conditions.
fn register(context: &Context, role: &'static str) {
    let build = IntGauge::with_opts(
        prometheus::Opts::new("barid_build_info", "1, with the role and version as labels")
            .const_label("role", role)
            .const_label("version", env!("CARGO_PKG_VERSION")),
    );
    let workers = IntGauge::new(
        "barid_worker_threads",
        "Worker threads: one per CPU of the quota, or TOKIO_WORKER_THREADS",
    );
    let registered = context
        .metrics
        .register(Box::new(context.health.clone()))
        .and_then(|()| context.metrics.register(Box::new(Process::this()?)))
        .and_then(|()| {
            let build = build?;
            build.set(1);
            context.metrics.register(Box::new(build))
        })
        .and_then(|()| {
            let workers = workers?;
            workers.set(Handle::current().metrics().num_workers() as i64);
            context.metrics.register(Box::new(workers))
        })
        .and_then(|()| context.metrics.register(Box::new(Tasks::of(Handle::current())?)))
        .and_then(|()| telemetry::register(&context.metrics));
    if let Err(error) = registered {
        tracing::warn!(%error, "cannot register process metrics");
    }
}

/// The number of a runtime's tasks, read at each scrape.
struct Tasks {
    runtime: Handle,
    gauge: IntGauge,
}

impl Tasks {
    fn of(runtime: Handle) -> prometheus::Result<Self> {
        let gauge = IntGauge::new("barid_tasks", "Tasks of the runtime that have not ended")?;
        Ok(Self { runtime, gauge })
    }
}

impl Collector for Tasks {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let alive = self.runtime.metrics().num_alive_tasks();
        self.gauge.set(i64::try_from(alive).unwrap_or(i64::MAX));
        self.gauge.collect()
    }
}

/// The metrics in the text format, with its content type, which Prometheus 3 requires.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

async fn metrics(State(context): State<Context>) -> Response {
    let mut text = Vec::new();
    match TextEncoder::new().encode(&context.metrics.gather(), &mut text) {
        Ok(()) => ([(CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// 503 with a line for each problem that only a restart solves; otherwise 200.
async fn healthz(State(context): State<Context>) -> (StatusCode, String) {
    answer(&context.health.dying(), "ok")
}

/// 200 if every condition holds; otherwise 503 with a line for each reason.
async fn readyz(State(context): State<Context>) -> (StatusCode, String) {
    answer(&context.health.not_ready(), "ready")
}

fn answer(reasons: &[(&str, String)], good: &str) -> (StatusCode, String) {
    if reasons.is_empty() {
        return (StatusCode::OK, format!("{good}\n"));
    }
    let lines = reasons.iter().map(|(name, reason)| format!("{name}: {reason}\n")).collect();
    (StatusCode::SERVICE_UNAVAILABLE, lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use std::time::Instant;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    async fn ask(admin: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(admin).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn until(admin: SocketAddr, path: &str, part: &str) {
        let begun = Instant::now();
        loop {
            let answer = ask(admin, path).await;
            if answer.contains(part) {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{path}: {answer}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Method, path, status and type.
    async fn head(admin: SocketAddr, method: &str, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(admin).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, _) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().to_owned();
        let kinds = head.lines().filter_map(|line| line.strip_prefix("content-type: "));
        (status, kinds.collect::<Vec<_>>().join(" and "))
    }

    #[tokio::test]
    async fn hazard_52_every_answer_names_its_type() {
        let context = Context::new();
        serve(&AdminConfig::default(), "test", &context).unwrap();
        context.announce_done();
        let admin = context.announcements().wait().await["admin"];
        until(admin, "/healthz", "200 OK").await;
        let metrics = "text/plain; version=0.0.4; charset=utf-8";
        let text = "text/plain; charset=utf-8";
        for (method, path, status, kind) in [
            ("GET", "/metrics", "200", metrics),
            ("HEAD", "/metrics", "200", metrics),
            ("GET", "/metrics?name[]=up", "200", metrics),
            ("GET", "/healthz", "200", text),
            ("GET", "/readyz", "200", text),
            ("GET", "/", "404", text),
            ("POST", "/metrics", "405", text),
        ] {
            let expected = (status.to_owned(), kind.to_owned());
            assert_eq!(head(admin, method, path).await, expected, "{method} {path}");
        }
        context.shutdown.begin(Duration::ZERO);
        assert_eq!(head(admin, "GET", "/readyz").await, ("503".into(), text.into()));
    }

    #[tokio::test]
    async fn hazard_131_silent_connections_end_and_lock_nobody_out() {
        let context = Context::new();
        let config =
            AdminConfig { connections_max: 8, request_timeout_seconds: 1, ..Default::default() };
        serve(&config, "test", &context).unwrap();
        context.announce_done();
        let admin = context.announcements().wait().await["admin"];
        let mut silent = Vec::new();
        for text in ["", "GET /met", "GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n"] {
            for _ in 0..20 {
                let mut stream = TcpStream::connect(admin).await.unwrap();
                stream.write_all(text.as_bytes()).await.unwrap();
                silent.push(stream);
            }
            assert!(ask(admin, "/metrics").await.contains("barid_ready"));
        }
        for mut stream in silent {
            let end = timeout(Duration::from_secs(5), stream.read_to_end(&mut Vec::new())).await;
            assert!(end.is_ok(), "a silent connection stays");
        }
        let metrics = ask(admin, "/metrics").await;
        let closed = "barid_admin_connections_closed_total ";
        let closed = metrics.lines().find_map(|line| line.strip_prefix(closed)).unwrap();
        assert!(closed.parse::<u32>().unwrap() >= 50, "{closed}");
    }

    #[tokio::test]
    async fn a_blocked_runtime_fails_liveness_until_it_runs_again() {
        let role = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let context = Context::new();
        let config = AdminConfig { blocked_after_seconds: 1, ..Default::default() };
        {
            let _on_it = role.enter();
            serve(&config, "test", &context).unwrap();
        }
        context.announce_done();
        let admin = context.announcements().wait().await["admin"];
        until(admin, "/healthz", "200 OK").await;
        let (unblock, blocked) = std::sync::mpsc::sync_channel::<()>(1);
        role.spawn(async move { blocked.recv() });
        until(admin, "/healthz", "503 Service Unavailable").await;
        let reason = "runtime: no heartbeat of the runtime for";
        assert!(ask(admin, "/healthz").await.contains(reason));
        assert!(ask(admin, "/readyz").await.contains(reason));
        assert!(ask(admin, "/metrics").await.contains("barid_ready{condition=\"runtime\"} 0"));
        unblock.send(()).unwrap();
        until(admin, "/healthz", "200 OK").await;
        until(admin, "/readyz", "200 OK").await;
        role.shutdown_background();
    }
}
