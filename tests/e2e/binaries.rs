//! The roles' command lines.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use barid_runtime::exposition::Metrics;
use barid_testkit::device::PATIENCE;
use barid_testkit::process::Process;
use barid_testkit::{Role, certificates, http, paths, ports, token};

fn run(role: Role, arguments: &[&str], variables: &[(&str, &str)]) -> Result<Output> {
    let mut command = Command::new(role.binary()?);
    command.args(arguments).envs(variables.iter().copied());
    command.output().context("running the role")
}

/// Exit code, standard output, standard error.
fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn config(dir: &Path, text: &str) -> String {
    let path = dir.join("config.toml");
    std::fs::write(&path, text).expect("the temporary directory takes a file");
    path.display().to_string()
}

const SECRET: &str = "secret = 'hunter2-hunter2-hunter2-hunter2-hunter2'";

/// The required settings of a role.
fn least(role: Role) -> String {
    match role {
        // Nobody could connect without a key.
        Role::Access => format!("[[auth.keys]]\nid = 'k'\n{SECRET}\n"),
        _ => String::new(),
    }
}

#[test]
fn a_key_that_nobody_knows_refuses_to_start_and_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for role in Role::ALL {
        for (text, key) in [
            ("colour = 'red'", "colour"),
            ("[redis]\nurll = 'redis://h'", "redis.urll"),
            ("[admin]\nlisten = '127.0.0.1:0'\nport = 1", "admin.port"),
        ] {
            let path = config(dir.path(), text);
            for flags in [&["--config", &path][..], &["--config", &path, "--check-config"]] {
                let (code, _, complaint) = told(&run(role, flags, &[])?);
                assert_eq!(code, Some(2), "{role:?}: {complaint}");
                assert!(complaint.contains(key), "{role:?}: {complaint}");
            }
        }
        let variable = format!("BARID_{}_REDIS__URLL", role.name().to_uppercase());
        let (code, _, complaint) = told(&run(role, &["--check-config"], &[(&variable, "x")])?);
        assert_eq!(code, Some(2), "{role:?}: {complaint}");
        assert!(complaint.contains(&variable), "{role:?}: {complaint}");
    }
    Ok(())
}

#[test]
fn values_that_make_no_sense_are_named_before_anything_starts() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let missing = dir.path().join("missing.toml").display().to_string();
    for role in Role::ALL {
        for (text, key) in [
            ("drain_seconds = 'soon'", "drain_seconds"),
            ("[redis]\nshards = 0", "redis.shards: 0 is out of range; write 1 to 16384"),
            (
                "[redis]\nttl_seconds = 9223372036854775807",
                "redis.ttl_seconds: 9223372036854775807 is out of range; write 1 to 316224000 s",
            ),
            ("[admin]\nlisten = 'here'", "admin.listen"),
        ] {
            let path = config(dir.path(), &format!("{text}\n{}", least(role)));
            let (code, _, complaint) =
                told(&run(role, &["--config", &path, "--check-config"], &[])?);
            assert_eq!(code, Some(2), "{role:?}: {complaint}");
            assert!(complaint.contains(key), "{role:?}: {complaint}");
        }
        let (code, _, complaint) = told(&run(role, &["--config", &missing], &[])?);
        assert_eq!(code, Some(2), "{role:?}: {complaint}");
        assert!(complaint.contains("missing.toml"), "{role:?}: {complaint}");
    }
    Ok(())
}

#[test]
fn the_printed_configuration_is_complete_valid_and_without_secrets() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for role in Role::ALL {
        let mut text = "[redis]\nurl = 'redis://me:hunter2@example.test:6380/3'\n".to_owned();
        if matches!(role, Role::Purger | Role::Access) {
            text += "[kafka.properties]\n'sasl.password' = 'hunter2'\n'sasl.username' = 'me'\n\
                     'sasl.mechanism' = 'PLAIN'\n'security.protocol' = 'SASL_PLAINTEXT'\n";
        }
        let path = config(dir.path(), &(text + &least(role)));
        let prefix = format!("BARID_{}_", role.name().to_uppercase());
        let variable = format!("{prefix}REDIS__SHARDS");
        let print = run(role, &["--config", &path, "--print-config"], &[(&variable, "32")])?;
        let (code, printed, complaint) = told(&print);
        assert_eq!(code, Some(0), "{role:?}: {complaint}");
        assert!(!printed.contains("hunter2"), "{role:?}: {printed}");
        for part in ["shards = 32", "example.test:6380", "drain_seconds", "[admin]", "[log]"] {
            assert!(printed.contains(part), "{role:?} does not print {part}: {printed}");
        }
        // The printed configuration is valid, except for masked secrets.
        let path = config(dir.path(), &printed.replace("secret = \"***\"", SECRET));
        let (code, said, complaint) =
            told(&run(role, &["--config", &path, "--check-config"], &[])?);
        assert_eq!(code, Some(0), "{role:?}: {complaint}");
        assert_eq!(said, "configuration is valid\n");
    }
    Ok(())
}

#[test]
fn hazard_111_the_password_of_kafka_comes_from_the_environment() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for role in [Role::Purger, Role::Access] {
        let path = config(dir.path(), &least(role));
        let name = |property: &str| {
            format!("BARID_{}_KAFKA__PROPERTIES__{property}", role.name().to_uppercase())
        };
        let names = ["SECURITY_PROTOCOL", "SASL_MECHANISM", "SASL_USERNAME", "SASL_PASSWORD"];
        let values = ["SASL_PLAINTEXT", "PLAIN", "barid", "12345"];
        let names = names.map(name);
        let all: Vec<_> = names.iter().map(String::as_str).zip(values).collect();
        // A shell, which refuses names with dots.
        let exports = all.iter().map(|(name, value)| format!("export {name}={value}; "));
        let line = exports.collect::<String>() + "exec \"$0\" \"$@\"";
        for (flag, part) in [("--check-config", "valid"), ("--print-config", "\"***\"")] {
            let mut shell = Command::new("sh");
            shell.args(["-c", &line]).arg(role.binary()?).args(["--config", &path, flag]);
            let (code, said, complaint) = told(&shell.output()?);
            assert_eq!(code, Some(0), "{role:?}: {complaint}");
            assert!(said.contains(part) && !said.contains("12345"), "{role:?}: {said}");
        }
        // Without its password, librdkafka refuses the rest.
        let (code, _, complaint) =
            told(&run(role, &["--config", &path, "--check-config"], &all[..3])?);
        assert_eq!(code, Some(2), "{role:?}: {complaint}");
        assert!(complaint.contains("sasl.password"), "{role:?}: {complaint}");
    }
    Ok(())
}

/// A sample of deploy/config with the settings that are commented out in it.
fn uncommented(sample: &str) -> String {
    let is_name = |key: &str| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let is_setting = |line: &str| {
        line.starts_with('[') || line.split_once(" = ").is_some_and(|(key, _)| is_name(key))
    };
    let line = |line| match str::strip_prefix(line, "# ") {
        Some(setting) if is_setting(setting) => setting,
        _ => line,
    };
    sample.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_sample_configurations_are_valid_and_show_the_limits_that_there_are() -> Result<()> {
    // RFC 8410's example of a key.
    const ED25519: &str = "-----BEGIN PUBLIC KEY-----\n\
        MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n\
        -----END PUBLIC KEY-----\n";
    let dir = tempfile::tempdir()?;
    for (name, text) in [
        ("token-secret", token::SECRET),
        ("shop.pem", ED25519),
        ("tls.pem", certificates::ONE.pem),
        ("jwks-ca.pem", certificates::ONE.pem),
        ("tls.key", certificates::ONE.key),
    ] {
        std::fs::write(dir.path().join(name), text)?;
    }
    let mut ca = Command::new(paths::binary("barid")?);
    let created = ca.args(["cluster", "ca"]).arg(dir.path().join("tls")).output()?;
    ensure!(created.status.success(), "{created:?}");
    let printed = |role, text: &str| -> Result<toml::Table> {
        let path = config(dir.path(), text);
        for flag in ["--check-config", "--print-config"] {
            let (code, said, complaint) = told(&run(role, &["--config", &path, flag], &[])?);
            assert_eq!(code, Some(0), "{role:?}: {complaint}");
            if flag == "--print-config" {
                return Ok(said.parse()?);
            }
        }
        unreachable!("both flags were tried")
    };
    for role in Role::ALL {
        let samples = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/config");
        let sample = std::fs::read_to_string(format!("{samples}/{}.toml", role.name()))?;
        let sample = sample.replace("/etc/barid", &dir.path().display().to_string());
        printed(role, &sample)?;
        let (all, default) = (printed(role, &uncommented(&sample))?, printed(role, &least(role))?);
        for section in ["limits", "heartbeat", "sync", "window"] {
            let Some(defaults) = default.get(section).and_then(toml::Value::as_table) else {
                continue;
            };
            for (key, value) in defaults.iter().filter(|(_, v)| v.as_integer() != Some(0)) {
                assert_eq!(all[section].get(key), Some(value), "{role:?}: {section}.{key}");
            }
        }
        // Alternatives to other lines are indented by two more.
        let under_sentinel = printed(role, &sample.replace("#   sentinel", "sentinel"))?;
        for key in ["sentinel_master", "sentinels"] {
            let shown = under_sentinel["redis"].get(key);
            assert_ne!(shown, default["redis"].get(key), "{role:?}: redis.{key}");
        }
    }
    Ok(())
}

/// A role that waits for a Redis that does not exist. `shell` starts it with "$0" "$@".
struct Waiting {
    role: Role,
    process: Process,
    admin: SocketAddr,
    config: String,
    dir: tempfile::TempDir,
}

impl Waiting {
    async fn start(role: Role, shell: &str) -> Result<Self> {
        Self::start_with(role, shell, "").await
    }

    async fn start_with(role: Role, shell: &str, settings: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (admin, nobody) = (ports::free_port(), ports::free_port());
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, admin));
        let ports = match role {
            Role::Access => "listen = '127.0.0.1:0'\ngrpc_listen = '127.0.0.1:0'\n",
            Role::Dispatcher => "listen = '127.0.0.1:0'\n",
            Role::Purger | Role::Delayer => "",
        };
        let mut text = format!("drain_seconds = 60\n{ports}{}", least(role));
        text +=
            &format!("[admin]\nlisten = '{admin}'\n[redis]\nurl = 'redis://127.0.0.1:{nobody}'\n");
        let path = config(dir.path(), &format!("{text}{settings}"));
        let binary = role.binary()?;
        let log = dir.path().join("log");
        let process = Process::spawn(role.name(), "bash", &log, |command| {
            command.args(["-c", shell]).arg(binary).args(["--config", &path]);
        })?;
        let mut waiting = Self { role, process, admin, config: text, dir };
        waiting.until("/readyz", |body| body.contains("redis: redis is away")).await?;
        Ok(waiting)
    }

    async fn until(&mut self, path: &str, good: impl Fn(&str) -> bool) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.process.must_run()?;
            match http::get(self.admin, path).await {
                Ok((_, body)) if good(&body) => return Ok(()),
                other => ensure!(begun.elapsed() < PATIENCE * 2, "{:?}: {other:?}", self.role),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_logged(&mut self, part: &str) -> Result<()> {
        let begun = Instant::now();
        while !self.process.output().contains(part) {
            self.process.must_run()?;
            ensure!(begun.elapsed() < PATIENCE * 2, "{:?}: no {part:?}", self.role);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn leaves_cleanly(mut self) -> Result<()> {
        self.process.term()?;
        let status = self.process.wait(Duration::from_secs(20)).await?;
        ensure!(status.code() == Some(0), "{:?}: {}", self.role, self.process.tail(20));
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_52_every_endpoint_of_every_role_names_its_type() -> Result<()> {
    for role in Role::ALL {
        let waiting = Waiting::start(role, "exec \"$0\" \"$@\"").await?;
        for (path, kind) in [
            ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
            ("/healthz", "text/plain; charset=utf-8"),
            ("/readyz", "text/plain; charset=utf-8"),
            ("/", "text/plain; charset=utf-8"),
        ] {
            let (_, head, _) = http::get_whole(waiting.admin, path).await?;
            let line = format!("content-type: {kind}");
            ensure!(head.lines().any(|given| given == line), "{role:?} {path}: {head}");
        }
        waiting.leaves_cleanly().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_53_a_role_outlives_the_reader_of_its_log_and_a_full_disk() -> Result<()> {
    for role in Role::ALL {
        for shell in ["exec \"$0\" \"$@\" 2> >(read -r line)", "exec \"$0\" \"$@\" 2>/dev/full"] {
            let mut waiting = Waiting::start(role, shell).await?;
            let dropped = |body: &str| {
                let metrics = Metrics::parse(body);
                metrics.sum_of("barid_log_lines_dropped_total", "why", "failed") > 0.0
            };
            waiting.until("/metrics", dropped).await?;
            waiting.leaves_cleanly().await?;
        }
    }
    Ok(())
}

#[test]
fn hazard_54_a_service_named_like_a_role_harms_none() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for role in Role::ALL {
        let path = config(dir.path(), &least(role));
        let prefix = format!("BARID_{}_", role.name().to_uppercase());
        let named = |name: &str| format!("{prefix}{name}");
        let service = [
            (named("SERVICE_HOST"), "10.96.0.7"),
            (named("SERVICE_PORT"), "7080"),
            (named("SERVICE_PORT_WS"), "7080"),
            (named("PORT"), "tcp://10.96.0.7:7080"),
            (named("PORT_7080_TCP"), "tcp://10.96.0.7:7080"),
            (named("PORT_7080_TCP_PROTO"), "tcp"),
            (named("PORT_7080_TCP_PORT"), "7080"),
            (named("PORT_7080_TCP_ADDR"), "10.96.0.7"),
        ];
        let variables: Vec<_> = service.iter().map(|(name, value)| (&**name, *value)).collect();
        let flags = ["--config", &path, "--check-config"];
        let (code, _, complaint) = told(&run(role, &flags, &variables)?);
        assert_eq!(code, Some(0), "{role:?}: {complaint}");
        let typo = named("PORT");
        let (code, _, complaint) = told(&run(role, &flags, &[(&typo, "7080")])?);
        assert_eq!(code, Some(2), "{role:?}: {complaint}");
        assert!(complaint.contains(&typo), "{role:?}: {complaint}");
    }
    Ok(())
}

#[test]
fn hazard_138_check_config_names_all_files_that_are_missing_and_ignored_variables() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let files = |table: &str, names: &[&str]| {
        let keys = names.iter().map(|name| format!("{name} = '/nonexistent/{table}.{name}'\n"));
        format!("[{table}]\n{}", keys.collect::<String>())
    };
    let internal = files("internal_tls", &["ca_file", "certificate_file", "key_file"]);
    for role in Role::ALL {
        let tls = match role {
            Role::Access => files("tls", &["certificate_file", "key_file"]),
            _ => String::new(),
        };
        let redis = files("redis", &["ca_file", "certificate_file", "key_file"]);
        let wrong = format!("{redis}url = 'localhost'\nshards = 0\n");
        let path = config(dir.path(), &format!("{wrong}{internal}{tls}{}", least(role)));
        let flags = ["--config", &path, "--check-config"];
        let (code, _, complaint) = told(&run(role, &flags, &[])?);
        ensure!(code == Some(2), "{role:?}: {complaint}");
        let files = complaint.lines().filter(|line| line.contains("No such file")).count();
        ensure!(files == if role == Role::Access { 8 } else { 6 }, "{role:?}: {complaint}");
        ensure!(complaint.contains("redis.shards: 0 is out"), "{role:?}: {complaint}");
        ensure!(complaint.contains("redis.url is not a Redis URL"), "{role:?}: {complaint}");

        let path = config(dir.path(), &least(role));
        let name = role.name().to_uppercase();
        let flags = ["--config", &path, "--check-config"];
        let (code, said, complaint) = told(&run(role, &flags, &[("BARID_REDIS__URL", "1")])?);
        ensure!(code == Some(2) && said.is_empty(), "{role:?}: {said} {complaint}");
        let meant = format!("BARID_REDIS__URL sets nothing; did you mean BARID_{name}_REDIS__URL?");
        ensure!(complaint.contains(&meant), "{role:?}: {complaint}");
        let (_, help, _) = told(&run(role, &["--help"], &[])?);
        let sample = format!("deploy/config/{}.toml", role.name());
        ensure!(help.contains(&sample) && help.contains("admin.listen"), "{help}");
    }
    Ok(())
}

#[test]
fn hazard_154_variables_of_other_programs_that_look_alike_fail_no_check() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for role in Role::ALL {
        let path = config(dir.path(), &least(role));
        let own = format!("barid_{}_drain_seconds", role.name());
        let flags = ["--config", &path, "--check-config"];
        for variable in ["BRAID_ACCESS_TOKEN", "BARD_PURGER_KEY", "BARID_ACESS_LISTEN", &own] {
            let (code, said, complaint) = told(&run(role, &flags, &[(variable, "hush")])?);
            ensure!(code == Some(0) && said.contains("is valid"), "{role:?}: {said} {complaint}");
            let warning = format!("warning: {variable} sets nothing; did you mean BARID_");
            ensure!(complaint.contains(&warning), "{role:?}: {complaint}");
        }
        // With exactly the role's prefix it is Barid's.
        let unknown = format!("BARID_{}_TOKEN", role.name().to_uppercase());
        let (code, _, complaint) = told(&run(role, &flags, &[(&unknown, "hush")])?);
        ensure!(code == Some(2) && complaint.contains(&unknown), "{role:?}: {complaint}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_151_files_that_never_end_or_begin_are_refused_at_once() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pipe = dir.path().join("pipe.pem").display().to_string();
    ensure!(Command::new("mkfifo").arg(&pipe).status()?.success());
    let check = async |role: Role, file: &str| -> Result<String> {
        let mut command = tokio::process::Command::new(role.binary()?);
        command.args(["--config", file, "--check-config"]).kill_on_drop(true);
        let output = tokio::time::timeout(PATIENCE, command.output()).await;
        Ok(told(&output.with_context(|| format!("{role:?} reads {file} for ever"))??).2)
    };
    for (bad, kind) in [("/dev/zero", "a device"), (&*pipe, "a pipe"), ("/etc", "a directory")] {
        let refused = |complaint: &str, of: &str| {
            let said = complaint.contains(&format!("it is {kind}"));
            ensure!(said, "{of} = {bad}: {complaint}");
            Ok(())
        };
        for role in Role::ALL {
            refused(&check(role, bad).await?, "--config")?;
            let tls = format!(
                "[internal_tls]\nca_file = '{bad}'\ncertificate_file = '{bad}'\nkey_file = '{bad}'\n"
            );
            refused(&check(role, &config(dir.path(), &(tls + &least(role)))).await?, "TLS")?;
        }
        let with_keys = [
            format!("[tls]\ncertificate_file = '{bad}'\nkey_file = '{bad}'\n"),
            format!("[redis]\nurl = 'rediss://h'\nca_file = '{bad}'\n"),
            format!(
                "[redis]\nurl = 'rediss://h'\ncertificate_file = '{bad}'\nkey_file = '{bad}'\n"
            ),
            format!("[kafka.properties]\n'ssl.certificate.location' = '{bad}'\n"),
            format!("[kafka.properties]\n'ssl.key.location' = '{bad}'\n"),
            format!("[[auth.jwks]]\nfile = '{bad}'\n"),
            format!("[[auth.jwks]]\nurl = 'https://h'\nca_file = '{bad}'\n"),
        ];
        let with_keys = with_keys.map(|text| text + &least(Role::Access));
        let alone = [
            format!("[[auth.keys]]\nsecret_file = '{bad}'\n"),
            format!("[[auth.keys]]\nalgorithm = 'EdDSA'\npublic_key_file = '{bad}'\n"),
        ];
        for text in with_keys.iter().chain(&alone) {
            refused(&check(Role::Access, &config(dir.path(), text)).await?, text)?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_58_sighup_reads_the_log_level_again_and_ends_no_role() -> Result<()> {
    for role in Role::ALL {
        let level = "[log]\nlevel = 'warn'\n";
        let mut waiting = Waiting::start_with(role, "exec \"$0\" \"$@\"", level).await?;
        config(waiting.dir.path(), &format!("nonsense = 1\n{}", waiting.config));
        waiting.process.hang_up()?;
        waiting.until_logged("the configuration in force stays").await?;
        ensure!(!waiting.process.output().contains("INFO"), "{role:?} logs more than it should");
        config(waiting.dir.path(), &format!("{}[log]\nlevel = 'info'\n", waiting.config));
        waiting.process.hang_up()?;
        // This message has level info itself.
        waiting.until_logged("log.level was read again").await?;
        config(waiting.dir.path(), &format!("nodes_refresh_ms = 77\n{}", waiting.config));
        waiting.process.hang_up()?;
        let kept = "changed keys take effect at the next start keys=\"nodes_refresh_ms\"";
        if role != Role::Access {
            waiting.until_logged(kept).await?;
        }
        waiting.leaves_cleanly().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_155_a_failure_that_persists_is_logged_at_the_configured_interval() -> Result<()> {
    let every_second = "[log]\nrepeat_seconds = 1\n";
    let start = "exec \"$0\" \"$@\"";
    let mut waiting = Waiting::start_with(Role::Dispatcher, start, every_second).await?;
    let suppressed = |body: &str| {
        let metrics = Metrics::parse(body);
        metrics.sum_of("barid_log_repeats_total", "outcome", "suppressed") > 0.0
    };
    waiting.until("/metrics", suppressed).await?;
    let begun = Instant::now();
    while waiting.process.output().matches("redis is away: ").count() < 3 {
        // By default the third line would come after twenty seconds.
        ensure!(begun.elapsed() < Duration::from_secs(15), "{}", waiting.process.tail(20));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    waiting.leaves_cleanly().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_waits_for_redis_leaves_cleanly_when_it_is_told_to() -> Result<()> {
    for role in Role::ALL {
        Waiting::start(role, "exec \"$0\" \"$@\"").await?.leaves_cleanly().await?;
    }
    Ok(())
}
