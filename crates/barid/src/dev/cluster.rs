//! The four roles in this process, started as their binaries start them.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use barid_access::Access;
use barid_bus::KafkaConfig;
use barid_delayer::Delayer;
use barid_dispatcher::Dispatcher;
use barid_mailbox::RedisConfig;
use barid_mesh::Party;
use barid_purger::Purger;
use barid_runtime::{AdminConfig, Context, HasCommon as _, Role, RunError, Stopped, admin, exit};
use futures::future::select_all;
use serde::Serialize;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{Instrument as _, Span, error_span};

use crate::authority;
use crate::output::{Output, Tone};
use crate::values::Key;

/// For all roles to become ready.
const START: Duration = Duration::from_secs(30);
/// For a role to drain.
const DRAIN: Duration = Duration::from_secs(3);
/// For a role to end after its drain time.
const OVERTIME: Duration = Duration::from_secs(2);
/// How often roles read the table of nodes: often, so that they find each other at once.
const NODES_REFRESH_MS: u64 = 100;

/// The running roles, in the order in which they stop.
pub struct Cluster {
    roles: Vec<Running>,
}

struct Running {
    name: &'static str,
    /// Default port of its admin endpoint.
    usual_admin: u16,
    context: Context,
    task: JoinHandle<Result<Stopped, RunError>>,
}

/// Where a role has its admin endpoint.
pub struct AdminPort {
    pub role: &'static str,
    pub port: u16,
    /// The default.
    pub usual: u16,
}

#[derive(Serialize)]
struct Drained<'a> {
    event: &'static str,
    role: &'a str,
    elapsed_ms: u64,
}

impl Cluster {
    /// Starts all roles. Devices connect to `listen`.
    pub fn start(
        kafka: &KafkaConfig,
        redis: &RedisConfig,
        key: &Key,
        tls: &Path,
        listen: SocketAddr,
    ) -> anyhow::Result<Self> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let auth_key = barid_access::config::KeyConfig {
            id: key.id.clone().unwrap_or_default(),
            secret: key.secret.clone(),
            ..Default::default()
        };
        let access = barid_access::Config {
            listen,
            grpc_listen: any,
            internal_tls: authority::files(tls, Party::Access),
            kafka: kafka.clone(),
            redis: redis.clone(),
            auth: barid_access::config::AuthConfig { keys: vec![auth_key], ..Default::default() },
            drain_seconds: DRAIN.as_secs(),
            ..Default::default()
        };
        let dispatcher = barid_dispatcher::Config {
            listen: any,
            internal_tls: authority::files(tls, Party::Dispatcher),
            redis: redis.clone(),
            // Its callers are in this process and stop before it.
            drain_settle_ms: 50,
            nodes_refresh_ms: NODES_REFRESH_MS,
            drain_seconds: DRAIN.as_secs(),
            ..Default::default()
        };
        let delayer = barid_delayer::Config {
            internal_tls: authority::files(tls, Party::Delayer),
            redis: redis.clone(),
            nodes_refresh_ms: NODES_REFRESH_MS,
            drain_seconds: DRAIN.as_secs(),
            ..Default::default()
        };
        let purger = barid_purger::Config {
            internal_tls: authority::files(tls, Party::Purger),
            kafka: kafka.clone(),
            redis: redis.clone(),
            nodes_refresh_ms: NODES_REFRESH_MS,
            drain_seconds: DRAIN.as_secs(),
            ..Default::default()
        };
        Ok(Self {
            roles: vec![
                start::<Purger>(purger)?,
                start::<Dispatcher>(dispatcher)?,
                start::<Delayer>(delayer)?,
                start::<Access>(access)?,
            ],
        })
    }

    /// Waits until every role is ready. Returns the address for devices.
    pub async fn ready(&mut self) -> anyhow::Result<SocketAddr> {
        let contexts: Vec<_> = self.roles.iter().map(|r| (r.name, r.context.clone())).collect();
        let all = async {
            let mut access = None;
            for (_, context) in &contexts {
                let listeners = context.announcements().wait().await;
                access = access.or(listeners.get("ws").copied());
                while !context.health.not_ready().is_empty() {
                    sleep(Duration::from_millis(2)).await;
                }
            }
            // A dispatcher is ready without nodes, but the demonstration needs them.
            while !contexts.iter().all(|(_, context)| has_links(context)) {
                sleep(Duration::from_millis(2)).await;
            }
            access.ok_or_else(|| anyhow!("access has not announced its listener"))
        };
        tokio::select! {
            ready = timeout(START, all) => match ready {
                Ok(access) => access,
                Err(_) => bail!("not ready after {START:?}: {}", missing(&contexts)),
            },
            ended = self.failed() => Err(match ended {
                Err(why) => why,
                Ok(()) => anyhow!("a role ended before it was ready"),
            }),
        }
    }

    /// The addresses of the roles' admin endpoints.
    pub fn admins(&self) -> Vec<SocketAddr> {
        let admin = |role: &Running| role.context.announcements().get("admin");
        self.roles.iter().filter_map(admin).collect()
    }

    /// The port of each role's admin endpoint.
    pub fn admin_ports(&self) -> Vec<AdminPort> {
        let port = |role: &Running| {
            let port = role.context.announcements().get("admin")?.port();
            Some(AdminPort { role: role.name, port, usual: role.usual_admin })
        };
        self.roles.iter().filter_map(port).collect()
    }

    /// Waits until a role ends, which is an error.
    pub async fn failed(&mut self) -> anyhow::Result<()> {
        let tasks: Vec<_> = self.roles.iter_mut().map(|role| &mut role.task).collect();
        let (ended, index, _) = select_all(tasks).await;
        let name = self.roles.remove(index).name;
        match ended {
            Ok(Ok(_)) => bail!("{name} ended unexpectedly"),
            Ok(Err(error)) => bail!("{name} failed: {error}"),
            Err(error) => bail!("{name} failed: {error}"),
        }
    }

    /// Drains the roles one after the other.
    pub async fn stop(&mut self, out: Output) -> anyhow::Result<ExitCode> {
        let mut exit = ExitCode::SUCCESS;
        for role in self.roles.drain(..) {
            let began = Instant::now();
            role.context.shutdown.begin(DRAIN);
            let problem = match timeout(DRAIN + OVERTIME, role.task).await {
                Ok(Ok(Ok(Stopped::Clean))) => None,
                Ok(Ok(Ok(Stopped::Cut { what, count }))) => Some(format!("{count} {what} cut off")),
                Ok(Ok(Err(error))) => Some(error.to_string()),
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some("does not end".into()),
            };
            match problem {
                None => print_drained(role.name, began, out)?,
                Some(problem) => {
                    exit = ExitCode::from(exit::CUT);
                    out.note(format_args!("{}: {problem}", role.name));
                }
            }
        }
        Ok(exit)
    }
}

fn start<R: Role>(config: R::Config) -> anyhow::Result<Running> {
    R::check(&config).map_err(|problem| anyhow!("{}: {problem}", R::NAME))?;
    // Lines of four roles are on one screen: each begins with its role.
    let span = span::<R>();
    let context = Context::within(span.clone());
    let admin = config.common().admin;
    let usual_admin = admin.listen.port();
    serve_admin(admin, R::NAME, &context)
        .with_context(|| format!("{}: no admin endpoint", R::NAME))?;
    let task = tokio::spawn(R::run(config, context.clone()).instrument(span));
    Ok(Running { name: R::NAME, usual_admin, context, task })
}

/// A span whose name is the role's. Spans have constant names.
fn span<R: Role>() -> Span {
    match R::NAME {
        Purger::NAME => error_span!("purger"),
        Dispatcher::NAME => error_span!("dispatcher"),
        Delayer::NAME => error_span!("delayer"),
        Access::NAME => error_span!("access"),
        name => error_span!("role", name),
    }
}

/// The role's default port, or a free one if it is in use.
fn serve_admin(usual: AdminConfig, role: &'static str, context: &Context) -> std::io::Result<()> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    admin::serve(&usual, role, context)
        .or_else(|_| admin::serve(&AdminConfig { listen: any, ..usual }, role, context))
}

/// Whether a stream to another role is open; true for roles without such streams.
fn has_links(context: &Context) -> bool {
    let families = context.metrics.gather();
    let links = families.iter().find(|family| family.name().ends_with("_links_up"));
    links.is_none_or(|up| up.get_metric().iter().any(|metric| metric.get_gauge().get_value() > 0.0))
}

fn missing(contexts: &[(&str, Context)]) -> String {
    let mut reasons = Vec::new();
    for (name, context) in contexts {
        for (condition, reason) in context.health.not_ready() {
            reasons.push(format!("{name} {condition}: {reason}"));
        }
    }
    if reasons.is_empty() { "a role does not listen".into() } else { reasons.join("; ") }
}

fn print_drained(role: &str, began: Instant, out: Output) -> anyhow::Result<()> {
    let elapsed_ms = began.elapsed().as_millis() as u64;
    let drained = Drained { event: "drained", role, elapsed_ms };
    out.either(&drained, || {
        out.paint(Tone::Faint, format_args!("  {role:<10} drained in {elapsed_ms} ms"))
    })?;
    Ok(())
}
