//! The exit codes of all programs are those of the table in README.md.

use std::net::TcpListener;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use barid_runtime::exit;
use barid_testkit::process::Process;
use barid_testkit::{Redis, Role, paths, ports, token};

/// Runs a program with words and variables; `barid` itself, or a role.
fn run(program: &str, words: &[&str], variables: &[(&str, &str)]) -> Result<Output> {
    let mut command = Command::new(paths::binary(program)?);
    command.args(words).env("BARID_DEV_STATE", "/nonexistent/dev.json");
    command.envs(variables.iter().copied()).output().context("running a program")
}

fn ends(output: &Output, code: u8) -> Result<String> {
    let said = [&*output.stdout, &*output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(output.status.code() == Some(code.into()), "{code}: {:?} {said}", output.status);
    Ok(said)
}

/// The variables of a role that listens on free ports, with a Redis at `redis`.
fn settings(role: Role, redis: &str) -> Vec<(String, String)> {
    let mut all = vec![("ADMIN__LISTEN", "localhost:0"), ("REDIS__URL", redis)];
    match role {
        Role::Access => {
            all.extend([("LISTEN", "localhost:0"), ("GRPC_LISTEN", "localhost:0")]);
            all.push(("AUTH__KEYS", r#"[{secret = "01234567890123456789012345678901"}]"#));
        }
        Role::Dispatcher => all.push(("LISTEN", "localhost:0")),
        Role::Purger | Role::Delayer => {}
    }
    let prefix = format!("BARID_{}_", role.name().to_uppercase());
    all.into_iter().map(|(name, value)| (format!("{prefix}{name}"), value.to_owned())).collect()
}

fn with<'a>(
    settings: &'a [(String, String)],
    more: &[(&'a str, &'a str)],
) -> Vec<(&'a str, &'a str)> {
    let own = settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    own.chain(more.iter().copied()).collect()
}

#[test]
fn hazard_113_every_help_and_the_page_tell_the_codes() -> Result<()> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"))?;
    for (code, role, line) in exit::ALL {
        let row = format!("| {code} | {role} | {line} |");
        ensure!(page.contains(&row), "README.md lacks {row}");
    }
    for role in Role::ALL {
        let said = ends(&run(&format!("barid-{}", role.name()), &["--help"], &[])?, exit::DONE)?;
        ensure!(said.contains(&exit::help(|row| row.1)), "{said}");
    }
    let said = ends(&run("barid", &["--help"], &[])?, exit::DONE)?;
    ensure!(said.contains(&exit::help(|row| row.2)), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_113_roles_end_with_the_code_of_the_table() -> Result<()> {
    let redis = Redis::start().await?;
    let nobody = format!("redis://127.0.0.1:{}", ports::free_port());
    for role in Role::ALL {
        let program = format!("barid-{}", role.name());
        let name = |key: &str| format!("BARID_{}_{key}", role.name().to_uppercase());
        let away = settings(role, &nobody);
        let check = ["--check-config"];
        ends(&run(&program, &check, &with(&away, &[]))?, exit::DONE)?;
        ends(
            &run(&program, &check, &with(&away, &[(&name("DRAIN_SECONDS"), "0")]))?,
            exit::CONFIG,
        )?;
        ends(&run(&program, &["--bogus"], &[])?, exit::CONFIG)?;
        let kafka = format!("127.0.0.1:{}", ports::free_port());
        let brokers = name("KAFKA__BROKERS");
        let mut asked = away.clone();
        if matches!(role, Role::Purger | Role::Access) {
            asked.push((brokers, kafka));
        }
        let said = run(&program, &["--check-config", "--connect"], &with(&asked, &[]))?;
        let said = ends(&said, exit::AWAY)?;
        ensure!(said.contains(&format!("redis.url {nobody}: does not answer: ")), "{said}");

        let taken = TcpListener::bind("127.0.0.1:0")?;
        let address = taken.local_addr()?.to_string();
        let said = run(&program, &[], &with(&away, &[(&name("ADMIN__LISTEN"), &address)]))?;
        let said = ends(&said, exit::FAILED)?;
        let told = format!("{program}: cannot listen on admin.listen {address}: ");
        ensure!(said.contains(&told), "{said}");

        // It listens and never answers, so that a drain runs into its deadline.
        let silent = TcpListener::bind("127.0.0.1:0")?;
        let silent = settings(role, &format!("redis://{}", silent.local_addr()?));
        let dir = tempfile::tempdir()?;
        let log = dir.path().join("log");
        let mut process = Process::spawn(role.name(), paths::binary(&program)?, &log, |command| {
            command.envs(with(&silent, &[]));
            command.env(name("REDIS__CONNECT_TIMEOUT_MS"), "600000");
            command.env(name("DRAIN_SECONDS"), "1");
            if role == Role::Dispatcher {
                command.env(name("DRAIN_SETTLE_MS"), "0");
            }
        })?;
        let begun = Instant::now();
        while !process.output().contains("listening") {
            ensure!(begun.elapsed() < Duration::from_secs(30), "{}", process.tail(20));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        process.term()?;
        let status = process.wait(Duration::from_secs(30)).await?;
        ensure!(status.code() == Some(exit::CUT.into()), "{role:?}: {status} {}", process.tail(20));
    }
    // A Redis that cannot be used with this configuration.
    let mine = settings(Role::Delayer, &redis.url());
    let odd = ("BARID_DELAYER_REDIS__CLUSTER", "true");
    let said = run("barid-delayer", &["--check-config", "--connect"], &with(&mine, &[odd]))?;
    let said = ends(&said, exit::CONFIG)?;
    ensure!(said.contains("it is not a Redis Cluster; write redis.cluster = false"), "{said}");
    let said = run("barid-delayer", &["--check-config", "--connect"], &with(&mine, &[]))?;
    let said = ends(&said, exit::DONE)?;
    ensure!(said.contains(": Redis ") && said.contains("master"), "{said}");
    redis_cli(&redis.url(), &["HSET", "barid:meta", "shards", "32", "schema", "3"])?;
    let said = ends(&run("barid-delayer", &[], &with(&mine, &[]))?, exit::CONFIG)?;
    ensure!(said.contains("set up with 32 shards, but redis.shards is 64"), "{said}");
    Ok(())
}

fn redis_cli(url: &str, words: &[&str]) -> Result<()> {
    let output = Command::new("redis-cli").args(["-u", url]).args(words).output()?;
    if !output.status.success() {
        bail!("redis-cli: {output:?}");
    }
    Ok(())
}

#[test]
fn hazard_113_the_command_line_ends_with_the_code_of_the_table() -> Result<()> {
    let nobody = format!("127.0.0.1:{}", ports::free_port());
    let redis = format!("redis://{nobody}");
    let url = format!("ws://{nobody}");
    let secret = token::SECRET;
    for (line, code, told) in [
        (&["token", "--user", "a", "--secret", secret][..], exit::DONE, ""),
        (&["token", "--user", "a", "--secret-file", "/nowhere"], exit::CONFIG, "/nowhere"),
        (&["token", "--user", "a", "--ttl", "0s"], exit::CONFIG, "longer than 0"),
        (&["token", "--user", "a"], exit::CONFIG, "BARID_SECRET_FILE"),
        (&["listen", "--user", "a", "--secret", secret], exit::CONFIG, "BARID_URL"),
        (
            &["listen", "--user", "a", "--secret", secret, "--url", &url, "--for", "1s"],
            exit::AWAY,
            "the cluster has not answered",
        ),
        (&["send", "--user", "a", "x"], exit::CONFIG, "BARID_BROKERS"),
        (&["inspect", "user", "a", "--redis", &redis], exit::AWAY, ""),
        (&["kick", "--user", "a", "--redis", &redis], exit::AWAY, ""),
        (&["top", "--once", "--admin", &nobody, "--interval", "100ms"], exit::AWAY, &nobody),
    ] {
        let said = ends(&run("barid", line, &[])?, code).with_context(|| line.join(" "))?;
        ensure!(said.contains(told), "{said}");
    }
    let begun = Instant::now();
    let words =
        ["send", "--user", "a", "x", "--brokers", &nobody, "--timeout", "1s", "--wait", "acked"];
    let said = ends(&run("barid", &words, &[])?, exit::AWAY)?;
    ensure!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    ensure!(said.matches("does not answer").count() == 1, "{said}");
    Ok(())
}

/// Arguments that only the command itself can check: the words, and a part of what is told.
const INVALID: [(&[&str], &str); 42] = [
    // Addresses.
    (&["top", "--admin", "garbage"], "'--admin <HOST:PORT>': write HOST:PORT, such as"),
    (&["top", "--admin", "h:1,http://h:1"], "'http://h:1' for '--admin"),
    (&["top", "--admin", "h:0"], "write HOST:PORT"),
    (&["top", "--redis", "garbage", "--once"], "--redis is not a Redis URL; write redis://"),
    (&["top", "--admin", "h:1", "--redis", "http://h"], "--redis is not a Redis URL"),
    (&["inspect", "user", "a", "--redis", "garbage"], "--redis is not a Redis URL"),
    (&["inspect", "user", "a", "--redis", "redis://h:0"], "--redis: port 0"),
    (&["kick", "--user", "a", "--redis", "http://h"], "--redis is not a Redis URL"),
    (&["dev", "--redis", "garbage"], "--redis is not a Redis URL"),
    (&["dev", "--kafka", "kafka://h"], "--kafka: "),
    (&["dev", "--kafka", "h"], "\"h\" is not HOST:PORT; write HOST:PORT"),
    (&["send", "--user", "a", "x", "--brokers", "h"], "--brokers: \"h\" is not HOST:PORT"),
    (&["send", "--user", "a", "x", "--brokers", ","], "--brokers is empty; write HOST:PORT"),
    (&["inspect", "dead", "--brokers", "http://h:1"], "is not HOST:PORT"),
    (&["inspect", "receipts", "--brokers", "h"], "is not HOST:PORT"),
    (&["revoke", "list", "--brokers", "h"], "is not HOST:PORT"),
    (&["revoke", "user", "a", "--brokers", "h"], "is not HOST:PORT"),
    (&["topics", "check", "--brokers", "h"], "is not HOST:PORT"),
    (&["topics", "create", "--brokers", "h"], "is not HOST:PORT"),
    (&["listen", "--token", "t", "--url", "http://h"], "--url http://h: the scheme is neither"),
    (&["listen", "--token", "t", "--url", "garbage"], "write ws://HOST:PORT, or wss://HOST"),
    (&["listen", "--token", "t", "--url", "ws://me:hush@"], "--url ws://me:***@"),
    // Files.
    (
        &["listen", "--token", "t", "--url", "wss://h", "--ca-file", "/nowhere"],
        "--ca-file /nowhere",
    ),
    (
        &["listen", "--token", "t", "--url", "wss://h", "--ca-file", "/dev/null"],
        "--ca-file /dev/null",
    ),
    (&["listen", "--token", "t", "--url", "ws://h", "--position-file", "/"], "--position-file /"),
    (
        &["listen", "--user", "a", "--url", "ws://h", "--secret-file", "/nowhere"],
        "/nowhere: cannot",
    ),
    (&["dev", "--secret-file", "/dev/null"], "--secret-file /dev/null: the secret has 0 bytes"),
    (
        &["token", "check", "t", "--secret-file", "/nowhere"],
        "--secret-file /nowhere: cannot be read",
    ),
    (&["token", "check", "t", "--config", "/nowhere"], "/nowhere"),
    (&["send", "--user", "a", "--file", "/nowhere"], "--file /nowhere: cannot be read"),
    (&["topics", "check", "--config", "/nowhere"], "/nowhere"),
    (&["cluster", "ca", "/dev/null/x"], "cannot create /dev/null/x"),
    (
        &["inspect", "user", "a", "--redis", "rediss://h", "--redis-ca-file", "/nowhere"],
        "--redis-ca-file",
    ),
    (
        &["kick", "--user", "a", "--redis", "rediss://h", "--redis-ca-file", "/nowhere"],
        "--redis-ca-file",
    ),
    // Secrets, names, durations.
    (
        &["token", "--user", "a", "--secret", "short"],
        "the secret has 5 bytes, and access nodes refuse",
    ),
    (&["listen", "--user", "a", "--url", "ws://h", "--secret", "short"], "has 5 bytes"),
    (&["inspect", "dead", "--topic", "a b"], "is not a name for a topic; write letters"),
    (&["revoke", "list", "--topic", ""], "is empty; write letters"),
    (&["send", "--user", "a", "x", "--ttl", "500ms"], "--ttl must be whole seconds"),
    (&["send", "--user", "a", "x", "-X", "linger"], "-X: a setting is KEY=VALUE"),
    (&["send", "--user", "a", "-hello"], "a text that begins with a dash follows --"),
    (&["top", "--interval", "1w"], "500ms, 30s, 15m, 1h, 7d"),
];

#[test]
fn hazard_113_invalid_arguments_end_with_2_and_say_what_to_write() -> Result<()> {
    let nobody = format!("127.0.0.1:{}", ports::free_port());
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("dev.json").display().to_string();
    let mut wrong = Vec::new();
    for (line, told) in INVALID {
        let mut variables = vec![("BARID_DEV_STATE", state.as_str())];
        if matches!(line[0], "send" | "revoke") && !line.contains(&"--brokers") {
            variables.push(("BARID_BROKERS", &nobody));
        }
        let output = run("barid", line, &variables)?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        // clap adds how to get help.
        let lines =
            errors.lines().filter(|line| !line.is_empty() && !line.starts_with("For more "));
        let is_told = lines.count() == 1 && errors.contains(told) && !errors.contains("hush");
        if output.status.code() != Some(exit::CONFIG.into()) || !is_told {
            wrong.push(format!("{line:?}, {}: {errors}", output.status));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    let kick = ["kick", "--user", "a", "--redis", "redis://h"];
    let said = ends(&run("barid", &kick, &[("BARID_APP", "a:b")])?, exit::CONFIG)?;
    ensure!(said.contains("BARID_APP: "), "{said}");
    let output = run("barid", &["top", "--once"], &[("BARID_ADMIN", "h")])?;
    ensure!(ends(&output, exit::CONFIG)?.contains("--admin <HOST:PORT>"));
    let odd = tempfile::tempdir()?;
    let odd = odd.path().join("dev.json");
    std::fs::write(&odd, "odd")?;
    let odd = odd.display().to_string();
    for line in [&["send", "--user", "a", "x"][..], &["top", "--once"], &["dev", "--once"]] {
        let said = ends(&run("barid", line, &[("BARID_DEV_STATE", &odd)])?, exit::CONFIG)?;
        ensure!(said.contains("is not a state file of `barid dev`"), "{said}");
    }
    Ok(())
}
