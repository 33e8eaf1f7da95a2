//! The process of a role: arguments, configuration, admin endpoint, signals, draining, exit code.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgAction, Command};
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::Loaded;
use crate::words::shown_path;
use crate::{
    Context, HasCommon as _, Probe, Role, RunError, Stopped, Unfit, Workers, admin, bounds, config,
    exit, listening, telemetry,
};

/// How long after the drain deadline the process waits for the role to end.
const OVERTIME: Duration = Duration::from_secs(2);

/// Time within which a dependency has to answer to `--connect`.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Runs a role as this process, and returns one of the codes of [`exit`].
pub fn main<R: Role>() -> ExitCode {
    let arguments = Arguments::parse::<R>();
    let ignored = ignored_variables::<R>(arguments.check_config);
    if arguments.print_config {
        // Warnings may wait to be written.
        telemetry::flush();
        return match load::<R>(&arguments) {
            Ok(loaded) => print_config::<R>(&loaded.config),
            Err(problems) => fail_as::<R>(exit::CONFIG, &problems),
        };
    }
    let config = match load_checked::<R>(&arguments) {
        Ok(_) if arguments.check_config && ignored => return fail_as::<R>(exit::CONFIG, ""),
        Ok(loaded) => loaded.config,
        Err(problems) => return fail_as::<R>(exit::CONFIG, &problems),
    };
    let workers = match Workers::find() {
        Ok(workers) => workers,
        Err(problem) => return fail_as::<R>(exit::CONFIG, &problem),
    };
    if arguments.check_config {
        telemetry::flush();
        let said = say("configuration is valid\n");
        return if arguments.connect { probe::<R>(&config) } else { said };
    }
    telemetry::init(&config.common().log);
    telemetry::set_role(R::NAME);
    let runtime =
        match Builder::new_multi_thread().worker_threads(workers.count).enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                return fail_as::<R>(exit::FAILED, &format!("cannot start the runtime: {error}"));
            }
        };
    let exit = runtime.block_on(serve::<R>(config, workers, &arguments));
    runtime.shutdown_timeout(Duration::from_secs(1));
    telemetry::flush();
    exit
}

/// Names the environment variables that look as if they should set keys of this role, and do not. Returns whether some
/// are surely Barid's, which fails a check. A role starts in spite of them.
fn ignored_variables<R: Role>(is_check: bool) -> bool {
    let known = config::known::<R::Config>();
    let ours = config::without_role(&prefix::<R>(), &known, std::env::vars_os());
    // Variables of other programs may look alike.
    let alike = config::misspelt(std::env::vars_os());
    let say = |severity: &str, (variable, meant): &(String, String)| {
        say_as::<R>(&format!("{severity}{variable} sets nothing; did you mean {meant}?"));
    };
    alike.iter().for_each(|one| say("warning: ", one));
    ours.iter().for_each(|one| say(if is_check { "" } else { "warning: " }, one));
    !ours.is_empty()
}

/// Asks the dependencies, and prints a line for each.
fn probe<R: Role>(config: &R::Config) -> ExitCode {
    let runtime = match Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return fail_as::<R>(exit::FAILED, &format!("cannot start the runtime: {error}"));
        }
    };
    let mut probes = listening::probe(R::NAME, &listeners::<R>(config));
    probes.extend(runtime.block_on(R::probe(config, PROBE_TIMEOUT)));
    runtime.shutdown_background();
    let mut code = exit::DONE;
    for Probe { name, found } in probes {
        let line = match found {
            Ok(what) => format!("{name}: {what}\n"),
            Err(Unfit::Unusable(why)) => {
                code = exit::CONFIG;
                format!("{name}: cannot be used: {why}\n")
            }
            Err(Unfit::Away(why)) => {
                code = if code == exit::DONE { exit::AWAY } else { code };
                format!("{name}: does not answer: {why}\n")
            }
            Err(Unfit::InUse(why)) => format!("{name}: warning: {why}\n"),
        };
        say(&line);
    }
    ExitCode::from(code)
}

async fn serve<R: Role>(config: R::Config, workers: Workers, arguments: &Arguments) -> ExitCode {
    let common = config.common().to_owned();
    let running = keys_of::<R>(&config);
    let context = Context::of(&common.admin, &common.log, common.ready_file.clone());
    let signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => {
            return fail_as::<R>(exit::FAILED, &format!("cannot listen for signals: {error}"));
        }
    };
    if let Err(error) = admin::serve(&common.admin, R::NAME, &context) {
        let listen = common.admin.listen;
        let problem = format!("cannot listen on admin.listen {listen}: {error}");
        return fail_as::<R>(exit::FAILED, &problem);
    }
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        workers = workers.count,
        workers_from = workers.from,
        "starting"
    );
    let drain = Duration::from_secs(common.drain_seconds);
    tokio::select! {
        outcome = R::run(config, context.clone()) => exit_code::<R>(outcome),
        () = signals.drain_then_abort(&context, drain, || reload_apart::<R>(arguments, &running)) => {
            let overtime_s = OVERTIME.as_secs();
            tracing::error!(overtime_s, "did not end after the drain deadline, aborted");
            ExitCode::from(exit::CUT)
        }
    }
}

fn exit_code<R: Role>(outcome: Result<Stopped, RunError>) -> ExitCode {
    match outcome {
        Ok(Stopped::Clean) => {
            tracing::info!("drained");
            ExitCode::SUCCESS
        }
        Ok(Stopped::Cut { what, count }) => {
            tracing::error!(what, count, "cut off");
            ExitCode::from(exit::CUT)
        }
        Err(error) => {
            tracing::error!(%error, "failed");
            let code = if error.is_config { exit::CONFIG } else { exit::FAILED };
            fail_as::<R>(code, &error.to_string())
        }
    }
}

struct Signals {
    term: Signal,
    int: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => (),
            _ = self.int.recv() => (),
        }
    }

    /// Begins draining at the first SIGTERM or SIGINT. A second one moves the deadline to now. Returns when the role
    /// overruns the deadline. SIGHUP (`systemctl reload`, a closed terminal) reloads the configuration, and never ends the
    /// process.
    async fn drain_then_abort(mut self, context: &Context, drain: Duration, reload: impl Fn()) {
        loop {
            tokio::select! {
                _ = self.term.recv() => break,
                _ = self.int.recv() => break,
                Some(()) = self.hangup.recv() => reload(),
            }
        }
        tracing::info!(drain_seconds = drain.as_secs(), "draining");
        context.shutdown.begin(drain);
        tokio::select! {
            () = self.next() => {
                tracing::warn!("second signal: cutting off what is unfinished");
                context.shutdown.begin(Duration::ZERO);
            }
            () = tokio::time::sleep(drain) => tracing::warn!("drain deadline passed"),
        }
        tokio::time::sleep(OVERTIME).await;
    }
}

/// Applies the settings that can change while the role runs, which is `log.level`, and names the others that differ
/// from `running`. An invalid configuration changes nothing.
fn reload<R: Role>(arguments: &Arguments, running: &BTreeMap<String, String>) {
    let read = load_checked::<R>(arguments);
    if let Ok(loaded) = &read {
        let read = keys_of::<R>(&loaded.config);
        let ignored = differing(running, &read);
        if !ignored.is_empty() {
            tracing::warn!(
                keys = ignored.join(", "),
                "SIGHUP: changed keys take effect at the next start"
            );
        }
    }
    let level = read.map(|loaded| loaded.config.common().log.level);
    match level.and_then(|level| telemetry::set_level(&level).map(|()| level)) {
        Ok(level) => {
            tracing::info!(level, "SIGHUP: log.level was read again")
        }
        Err(error) => tracing::error!(error, "SIGHUP: the configuration in force stays"),
    }
}

/// On a thread of its own: names of hosts may have to be looked up, and the role goes on meanwhile.
fn reload_apart<R: Role>(arguments: &Arguments, running: &BTreeMap<String, String>) {
    let (arguments, running) = (arguments.clone(), running.clone());
    drop(tokio::task::spawn_blocking(move || reload::<R>(&arguments, &running)));
}

/// Each key with its value, secrets masked: a changed secret is not noticed.
fn keys_of<R: Role>(config: &R::Config) -> BTreeMap<String, String> {
    fn add(key: String, value: &toml::Value, keys: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(table) => {
                for (name, value) in table {
                    let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                    add(key, value, keys);
                }
            }
            value => drop(keys.insert(key, value.to_string())),
        }
    }
    let mut keys = BTreeMap::new();
    let table = toml::Table::try_from(config).unwrap_or_default();
    add(String::new(), &toml::Value::Table(table), &mut keys);
    keys
}

/// The keys whose values differ, except `log.level`, which is applied.
fn differing<'a>(
    running: &'a BTreeMap<String, String>,
    read: &'a BTreeMap<String, String>,
) -> Vec<&'a str> {
    let all: BTreeSet<&String> = running.keys().chain(read.keys()).collect();
    let differs = |key: &&String| running.get(*key) != read.get(*key) && *key != "log.level";
    all.into_iter().filter(differs).map(String::as_str).collect()
}

#[derive(Clone)]
struct Arguments {
    config: Option<PathBuf>,
    check_config: bool,
    connect: bool,
    print_config: bool,
}

impl Arguments {
    fn parse<R: Role>() -> Self {
        let name: &'static str = R::NAME;
        let matches = Command::new(name)
            .bin_name(format!("barid-{name}"))
            .display_name(format!("barid-{name}"))
            .version(env!("CARGO_PKG_VERSION"))
            .about(R::ABOUT)
            .after_help(format!(
                "{}A commented sample is deploy/config/{name}.toml in Barid's sources, and\n\
                 docs/configuration.md describes every key.\n\n\
                 Every key can be set by an environment variable: BARID_{}_ADMIN__LISTEN sets admin.listen.\n\
                 TOKIO_WORKER_THREADS overrides how many threads run tasks: by default one a core of the\n\
                 cgroup's CPU quota.\n\n{}",
                default_ports::<R>(),
                name.to_uppercase(),
                exit::help(|row| row.1)
            ))
            .arg(
                Arg::new("config")
                    .long("config")
                    .value_name("FILE")
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("TOML file; without one, defaults and the environment"),
            )
            .arg(
                Arg::new("check-config")
                    .long("check-config")
                    .action(ArgAction::SetTrue)
                    .help("Check the configuration and exit"),
            )
            .arg(
                Arg::new("connect")
                    .long("connect")
                    .action(ArgAction::SetTrue)
                    .requires("check-config")
                    .help(
                        "Also ask Kafka, Redis and key sets whether they can be used, and look \
                         whether ports and the node's name are free",
                    ),
            )
            .arg(
                Arg::new("print-config")
                    .long("print-config")
                    .action(ArgAction::SetTrue)
                    .help("Print the whole configuration in force, secrets masked, and exit"),
            )
            .get_matches();
        Self {
            config: matches.get_one("config").cloned(),
            check_config: matches.get_flag("check-config"),
            connect: matches.get_flag("connect"),
            print_config: matches.get_flag("print-config"),
        }
    }
}

/// The default addresses of the role's listeners, a line each.
fn default_ports<R: Role>() -> String {
    let line = |(key, address): (String, SocketAddr)| format!("{key:<13} {address} by default\n");
    listeners::<R>(&R::Config::default()).into_iter().map(line).collect::<String>() + "\n"
}

/// The addresses that a role listens on, with their keys.
fn listeners<R: Role>(config: &R::Config) -> Vec<(String, SocketAddr)> {
    let keys = keys_of::<R>(config);
    let listeners = keys.into_iter().filter(|(key, _)| key.ends_with("listen"));
    listeners
        .filter_map(|(key, address)| Some((key, address.trim_matches('"').parse().ok()?)))
        .collect()
}

fn prefix<R: Role>() -> String {
    format!("BARID_{}_", R::NAME.to_uppercase())
}

fn load<R: Role>(arguments: &Arguments) -> Result<Loaded<R::Config>, String> {
    config::load(arguments.config.as_deref(), &prefix::<R>(), std::env::vars_os())
        .map_err(|error| error.to_string())
}

fn load_checked<R: Role>(arguments: &Arguments) -> Result<Loaded<R::Config>, String> {
    let file = arguments.config.as_deref();
    let check = |config: &R::Config| {
        if arguments.check_config {
            let late = R::check_late_files(config).err().unwrap_or_default();
            late.lines().for_each(|problem| say_as::<R>(&format!("warning: {problem}")));
        }
        check::<R>(config)
    };
    config::load_checked(file, &prefix::<R>(), std::env::vars_os(), check)
}

fn check<R: Role>(config: &R::Config) -> Result<(), String> {
    let level = telemetry::check_level(&config.common().log.level);
    let ready = config.common().ready_file.map_or(Ok(()), |path| check_ready_file(&path));
    bounds::check(config).and_then(|()| bounds::all([level, ready, R::check(config)]))
}

fn check_ready_file(path: &Path) -> Result<(), String> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match (dir.is_dir(), path.is_dir()) {
        (true, false) => Ok(()),
        (true, true) => Err(format!("ready_file: {} is a directory", shown_path(path))),
        (false, _) => Err(format!("ready_file: {} is in no directory", shown_path(path))),
    }
}

fn print_config<R: Role>(config: &R::Config) -> ExitCode {
    let printed = config::printed(config);
    match printed.and_then(|table| toml::to_string_pretty(&table).map_err(|e| e.to_string())) {
        Ok(text) => say(&text),
        Err(error) => {
            fail_as::<R>(exit::FAILED, &format!("cannot print the configuration: {error}"))
        }
    }
}

fn say(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(exit::FAILED),
    }
}

/// Says each line of `problems` with the role's name in front.
fn fail_as<R: Role>(code: u8, problems: &str) -> ExitCode {
    problems.lines().for_each(say_as::<R>);
    telemetry::flush();
    ExitCode::from(code)
}

fn say_as<R: Role>(line: &str) {
    telemetry::say(&format!("barid-{}: {line}", R::NAME));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_139_a_reload_names_the_changed_keys_that_it_does_not_apply() {
        let keys = |pairs: &[(&str, &str)]| {
            let owned = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            owned.collect::<BTreeMap<_, _>>()
        };
        let running = keys(&[("drain_seconds", "20"), ("log.level", "info"), ("node", "a")]);
        let read =
            keys(&[("drain_seconds", "30"), ("log.level", "debug"), ("zone", "z"), ("node", "a")]);
        assert_eq!(differing(&running, &read), ["drain_seconds", "zone"]);
    }
}
