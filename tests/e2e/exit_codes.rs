//! The exit codes of all programs are those of the table in README.md.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use barid_runtime::exit;
use barid_testkit::process::Process;
use barid_testkit::{Redis, Role, http, paths, ports, token};

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
    // A Kafka that does not answer beside a Redis that cannot be used.
    let mut both = settings(Role::Purger, &redis.url());
    both.push(("BARID_PURGER_REDIS__CLUSTER".into(), "true".into()));
    both.push(("BARID_PURGER_KAFKA__BROKERS".into(), format!("127.0.0.1:{}", ports::free_port())));
    let said = run("barid-purger", &["--check-config", "--connect"], &with(&both, &[]))?;
    let said = ends(&said, exit::CONFIG)?;
    ensure!(said.contains(": does not answer: ") && said.contains(": cannot be used: "), "{said}");
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
    // One that evicts, for both kinds of programs.
    redis_cli(&redis.url(), &["HSET", "barid:meta", "shards", "64"])?;
    redis_cli(&redis.url(), &["CONFIG", "SET", "maxmemory", "100mb"])?;
    redis_cli(&redis.url(), &["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"])?;
    let said = run("barid-delayer", &["--check-config", "--connect"], &with(&mine, &[]))?;
    ends(&said, exit::CONFIG)?;
    let line = ["inspect", "user", "a", "--app", "demo", "--redis", &redis.url()];
    let said = ends(&run("barid", &line, &[])?, exit::CONFIG)?;
    ensure!(said.contains("maxmemory-policy"), "{said}");
    Ok(())
}

/// A role that runs with these variables and is ready.
async fn running(role: Role, settings: &[(String, String)], log: &Path) -> Result<Process> {
    let program = paths::binary(&format!("barid-{}", role.name()))?;
    let process = Process::spawn(role.name(), program, log, |command| {
        command.envs(with(settings, &[]));
    })?;
    let admin = settings.iter().find(|(name, _)| name.ends_with("ADMIN__LISTEN"));
    let admin = admin.context("it has an admin port")?.1.parse()?;
    let begun = Instant::now();
    while !matches!(http::get(admin, "/readyz").await, Ok((200, _))) {
        ensure!(begun.elapsed() < Duration::from_secs(30), "{}", process.tail(20));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(process)
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_152_a_check_sees_ports_and_names_in_use_and_does_not_fail_beside_its_own_process()
-> Result<()> {
    let (redis, dir) = (Redis::start().await?, tempfile::tempdir()?);
    let connect = ["--check-config", "--connect"];
    for role in [Role::Dispatcher, Role::Access] {
        let program = format!("barid-{}", role.name());
        let prefix = format!("BARID_{}_", role.name().to_uppercase());
        let named = |key: &str| format!("{prefix}{key}");
        let address = || format!("127.0.0.1:{}", ports::free_port());
        let own = if role == Role::Access { "GRPC_LISTEN" } else { "LISTEN" };
        let set = |all: &mut Vec<(String, String)>, key: &str, value: &str| {
            all.retain(|(name, _)| *name != named(key));
            all.push((named(key), value.to_owned()));
        };
        let mut mine = settings(role, &redis.url());
        let node = format!("{}-1", role.name());
        let (grpc, admin, ttl) = (address(), address(), "60000");
        for (key, value) in
            [(own, &*grpc), ("ADMIN__LISTEN", &*admin), ("NODE", &*node), ("LEASE_TTL_MS", ttl)]
        {
            set(&mut mine, key, value);
        }
        if role == Role::Access {
            set(&mut mine, "RECEIPTS", "false");
            set(&mut mine, "REVOCATIONS", "false");
        }
        let check = |settings: &[(String, String)], code: u8| {
            ends(&run(&program, &connect, &with(settings, &[]))?, code)
        };
        let said = check(&mine, exit::DONE)?;
        ensure!(said.contains(&format!("node {node}: its name is free\n")), "{said}");
        ensure!(said.contains(&format!("admin.listen {admin}: free\n")), "{said}");

        let mut process = running(role, &mine, &dir.path().join(role.name())).await?;
        let said = check(&mine, exit::DONE)?;
        ensure!(
            said.contains(&format!("admin.listen {admin}: warning: in use; fine if")),
            "{said}"
        );
        let own_port = format!("{} {grpc}: warning: in use; fine", own.to_lowercase());
        ensure!(said.contains(&own_port), "{said}");
        ensure!(
            said.contains(&format!("node {node}: warning: its name is in use at {grpc}")),
            "{said}"
        );

        let mut other = mine.clone();
        set(&mut other, own, &address());
        set(&mut other, "ADMIN__LISTEN", &address());
        let said = check(&other, exit::CONFIG)?;
        let taken =
            format!("cannot be used: another process has this node's name: a {}", role.name());
        ensure!(said.contains(&taken) && said.contains(&grpc), "{said}");

        // Its lease lasts for another minute.
        process.kill()?;
        process.wait(Duration::from_secs(10)).await?;
        let said = check(&other, exit::DONE)?;
        ensure!(said.contains("which does not answer, has its name until"), "{said}");

        let mut foreign = mine.clone();
        set(&mut foreign, "ADMIN__LISTEN", "192.0.2.1:7000");
        let said = check(&foreign, exit::CONFIG)?;
        ensure!(said.contains("192.0.2.1:7000: cannot be used: cannot be listened on"), "{said}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_113_a_role_ends_with_0_when_it_has_drained_and_with_3_at_a_second_signal()
-> Result<()> {
    let (redis, dir) = (Redis::start().await?, tempfile::tempdir()?);
    let mut settings = settings(Role::Dispatcher, &redis.url());
    settings[0].1 = format!("127.0.0.1:{}", ports::free_port());
    let mut process = running(Role::Dispatcher, &settings, &dir.path().join("drained")).await?;
    process.term()?;
    let status = process.wait(Duration::from_secs(30)).await?;
    ensure!(status.code() == Some(exit::DONE.into()), "{status} {}", process.tail(20));

    let silent = TcpListener::bind("127.0.0.1:0")?;
    let log = dir.path().join("cut");
    let program = paths::binary("barid-delayer")?;
    let mut process = Process::spawn("delayer", program, &log, |command| {
        command.env("BARID_DELAYER_ADMIN__LISTEN", "127.0.0.1:0");
        command.env("BARID_DELAYER_REDIS__CONNECT_TIMEOUT_MS", "600000");
        command
            .env("BARID_DELAYER_REDIS__URL", format!("redis://{}", silent.local_addr().unwrap()));
    })?;
    for said in ["listening", "draining", "second signal"] {
        let begun = Instant::now();
        while !process.output().contains(said) {
            ensure!(begun.elapsed() < Duration::from_secs(30), "{}", process.tail(20));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if said != "second signal" {
            process.term()?;
        }
    }
    let status = process.wait(Duration::from_secs(10)).await?;
    ensure!(status.code() == Some(exit::CUT.into()), "{status} {}", process.tail(20));
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
