//! Secrets that meet every slip: none is printed, logged or served.

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barid_testkit::paths;
use barid_testkit::ports::free_port;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::{sleep, timeout};

/// In each form; found by this part whatever a parser cuts off.
const SECRET: &str = "hush5ecret";

/// Values that hold it. Nobody listens on the ports, and no such host exists.
const REDIS_URLS: [&str; 7] = [
    "redis://me:hush5ecret@127.0.0.1:1",
    "redis://:hush5ecret@no-such-host.invalid:1",
    "redis://me:a/hush5ecret@127.0.0.1:1",
    "redis://me:a@b#hush5ecret?c@127.0.0.1:1",
    "redis+unix:///nowhere?pass=hush5ecret",
    "redis://127.0.0.1:1?password=hush5ecret",
    "rediss://me:hush5ecret@127.0.0.1:notaport",
];
const KEY_SETS: [&str; 3] = [
    "https://me:hush5ecret@127.0.0.1:1/keys",
    "http://me:hush5ecret@127.0.0.1:1/keys",
    "https://127.0.0.1:1/keys?token=hush5ecret",
];

/// A role with a valid but unreachable configuration, and one slip each in what is appended.
fn valid(role: &str, redis: &str) -> String {
    let kafka = "[kafka]\nbrokers = [\"127.0.0.1:1\"]\n[kafka.properties]\n\"security.protocol\" = \"SASL_PLAINTEXT\"\n\
                 \"sasl.mechanisms\" = \"PLAIN\"\n\"sasl.username\" = \"me\"\n\"sasl.password\" = \"hush5ecret-kafka\"\n";
    let auth = "[[auth.keys]]\nid = \"k\"\nsecret = \"hush5ecret-hush5ecret-hush5ecret\"\n";
    let (kafka, auth) = match role {
        "access" => (kafka, auth),
        "purger" => (kafka, ""),
        _ => ("", ""),
    };
    format!(
        "[log]\nlevel = \"debug\"\n[admin]\nlisten = \"127.0.0.1:0\"\n[redis]\nurl = \"{redis}\"\n{kafka}{auth}"
    )
}

/// An access node whose only keys are in a key set.
fn with_key_set(url: &str) -> String {
    let toml = valid("access", REDIS_URLS[0]);
    let (rest, _) = toml.split_once("[[auth.keys]]").unwrap_or_default();
    format!("{rest}[[auth.jwks]]\nurl = \"{url}\"\n")
}

/// Slips: what to add in front and behind, each with the key of the secret beside it.
fn slips(toml: &str) -> Vec<String> {
    let unquoted = toml.replace(" = \"", " = ").replace("\"\n", "\n");
    let open = toml.replace("\"\n", "\n");
    let as_list: String = toml
        .lines()
        .map(|line| match line.split_once(" = \"") {
            Some((key, value)) => format!("{key} = [\"{value}]\n"),
            None => format!("{line}\n"),
        })
        .collect();
    let beside = toml
        .replace("url = ", "pasword = \"hush5ecret\"\nurl = ")
        .replace("secret = ", "secrret = \"hush5ecret\"\nsecret = ");
    let unknown_table = format!("{toml}\n[hush5]\nx = \"hush5ecret\"\n");
    let number = toml.replace("\"hush5ecret-", "12345 # \"hush5ecret-");
    vec![unquoted, open, as_list, beside, unknown_table, number]
}

fn role(name: &str) -> Result<Command> {
    let mut command = Command::new(paths::binary(&format!("barid-{name}"))?);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    Ok(command)
}

async fn told(mut command: Command) -> Result<String> {
    let run = timeout(Duration::from_secs(30), command.output()).await;
    let Output { stdout, stderr, .. } = run.context("it does not end")??;
    let text = [stdout, stderr].concat();
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Fails with the line that holds the secret.
fn check(told: &str, of: &str) -> Result<()> {
    let leak = told.lines().find(|line| line.contains(SECRET));
    ensure!(leak.is_none(), "{of}: {}", leak.unwrap_or_default());
    Ok(())
}

const MODES: [&[&str]; 3] =
    [&["--check-config"], &["--print-config"], &["--check-config", "--connect"]];

async fn read_by(role_name: &str, toml: &str, dir: &Path, modes: &[&[&str]]) -> Result<()> {
    let file = dir.join(format!("{role_name}.toml"));
    std::fs::write(&file, toml)?;
    for mode in modes {
        let mut command = role(role_name)?;
        command.arg("--config").arg(&file).args(*mode);
        check(&told(command).await?, &format!("{role_name} {mode:?} of\n{toml}\n"))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_121_no_secret_of_a_file_is_printed_whatever_is_wrong_beside_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for url in REDIS_URLS {
        read_by("delayer", &valid("delayer", url), dir.path(), &MODES).await?;
    }
    for name in ["access", "purger"] {
        let toml = valid(name, REDIS_URLS[0]);
        read_by(name, &toml, dir.path(), &MODES).await?;
        for slip in slips(&toml) {
            read_by(name, &slip, dir.path(), &MODES[..2]).await?;
        }
    }
    for url in KEY_SETS {
        let toml = with_key_set(url);
        read_by("access", &toml, dir.path(), &MODES).await?;
        read_by("access", &toml.replace("\"\n", "\n"), dir.path(), &MODES[..2]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_121_no_secret_of_the_environment_is_printed() -> Result<()> {
    let keys = r#"[{id="k",secret="hush5ecret-hush5ecret-hush5ecret"}]"#;
    let variables = [
        ("REDIS__URL", REDIS_URLS[0]),
        ("REDIS__URL", REDIS_URLS[5]),
        ("REDIS__URL", "hush5ecret"),
        ("REDIS__URL__X", "hush5ecret"),
        ("REDIS__PASWORD", "hush5ecret"),
        ("REDIS", "hush5ecret"),
        ("AUTH__KEYS", keys),
        ("AUTH__KEYS", "hush5ecret"),
        ("AUTH__KEYS", "[{secret=hush5ecret}]"),
        ("AUTH__KEYS", "[{secret=\"hush5ecret\",ident=\"hush5ecret\"}]"),
        ("AUTH__KEYS", "[\"hush5ecret\"]"),
        ("AUTH__KEYS", "[{secret=\"hush5ecret"),
        ("AUTH__JWKS", r#"[{url="https://me:hush5ecret@127.0.0.1:1/keys"}]"#),
        ("AUTH__JWKS", KEY_SETS[2]),
        ("KAFKA__PROPERTIES__SASL__PASSWORD", "hush5ecret"),
        ("KAFKA__PROPERTIES__SASL_PASSWORD", "hush5ecret"),
        ("KAFKA__PROPERTIES", "{\"sasl.password\"=\"hush5ecret\"}"),
        ("KAFKA__PROPERTIES", "{\"sasl.password\"=hush5ecret}"),
        ("KAFKA__PROPERTIES", "hush5ecret"),
    ];
    for (name, value) in variables {
        for mode in &MODES[..2] {
            let mut command = role("access")?;
            command.env(format!("BARID_ACCESS_{name}"), value).args(*mode);
            check(&told(command).await?, &format!("{mode:?} with {name}={value}"))?;
        }
    }
    Ok(())
}

/// The secret in keys for other values.
const MISPLACED: [(&str, &str); 27] = [
    ("access", "advertise_url = \"wss://me:hush5ecret@h/v1/connect\""),
    ("access", "advertise_url = \"wss://h/v1/connect?token=hush5ecret\\u0000\""),
    ("access", "advertise = \"me:hush5ecret@h:1\""),
    ("access", "advertise = \"me:hush5ecret\""),
    ("access", "listen = \"me:hush5ecret@127.0.0.1:1\""),
    ("access", "receipts = \"hush5ecret\""),
    ("access", "auth.origins = [\"https://me:hush5ecret@h\"]"),
    ("access", "proxy.trusted = [\"me:hush5ecret@10.0.0.1\"]"),
    ("access", "[[auth.keys]]\nsecret_file = \"hush5ecret-hush5ecret-hush5ecret\""),
    ("access", "[[auth.keys]]\nsecret_file = \"hush5ecret/+hush5ecret/hush5ecret==\""),
    ("access", "[[auth.keys]]\nalgorithm = \"ES256\"\npublic_key_file = \"hush5ecret\""),
    ("access", "[[auth.jwks]]\nfile = \"https://me:hush5ecret@h/keys\""),
    ("access", "[[auth.jwks]]\nurl = \"https://h\"\nca_file = \"hush5ecret\""),
    ("access", "[tls]\ncertificate_file = \"hush5ecret\"\nkey_file = \"hush5ecret\""),
    ("delayer", "redis.url = \"rediss://h\"\nredis.ca_file = \"hush5ecret\""),
    ("delayer", "redis.url = \"redis:///me:hush5ecret@h\""),
    ("delayer", "drain_seconds = \"hush5ecret\""),
    ("delayer", "redis.retry_jitter = \"1hush5ecret\""),
    ("delayer", "log.format = \"hush5ecret\""),
    ("delayer", "log.level = \"me:hush5ecret@h\""),
    ("delayer", "ready_file = \"hush5ecret/ready\""),
    ("purger", "kafka.brokers = [\"me:hush5ecret@127.0.0.1:1\"]"),
    ("purger", "kafka.brokers = [\"kafka://me:hush5ecret@127.0.0.1:1\", \"me:hush5ecret\"]"),
    ("purger", "kafka.topics.push = \"me:hush5ecret@h:1\""),
    ("purger", "kafka.properties = { \"sasl.pasword\" = \"hush5ecret\" }"),
    ("purger", "kafka.properties = { \"linger.ms\" = \"hush5ecret\" }"),
    ("purger", "kafka.properties = { \"ssl.ca.location\" = \"hush5ecret\" }"),
];

#[tokio::test(flavor = "multi_thread")]
async fn hazard_150_no_secret_in_the_wrong_key_is_printed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (role, toml) in MISPLACED {
        read_by(role, toml, dir.path(), &MODES[..2]).await?;
    }
    for (name, value) in [
        ("DRAIN_SECONDS", "hush5ecret"),
        ("RECEIPTS", "hush5ecret"),
        ("ADVERTISE_URL", "wss://me:hush5ecret@h/"),
        ("KAFKA__BROKERS", "me:hush5ecret@h:1,h:2"),
        ("KAFKA__PROPERTIES__SASL_PASWORD", "hush5ecret"),
        ("KAFKA__PROPERTIES__PASSWORT", "hush5ecret"),
        ("AUTH__KEYS", "[{secret_file=\"hush5ecret\"}]"),
        ("TLS__KEY_FILE", "hush5ecret"),
    ] {
        for mode in &MODES[..2] {
            let mut command = role("access")?;
            command.env(format!("BARID_ACCESS_{name}"), value).args(*mode);
            check(&told(command).await?, &format!("{mode:?} with {name}={value}"))?;
        }
    }
    Ok(())
}

/// What `/metrics` and `/readyz` serve.
async fn served(port: u16) -> Result<String> {
    let mut all = String::new();
    for path in ["/metrics", "/readyz", "/healthz"] {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_string(&mut all).await?;
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_121_no_secret_is_logged_or_served_during_an_outage() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (at, (name, url)) in [
        ("access", REDIS_URLS[0]),
        ("purger", REDIS_URLS[1]),
        ("delayer", "redis://me:a%2Fhush5ecret@127.0.0.1:1"),
        ("dispatcher", REDIS_URLS[0]),
    ]
    .into_iter()
    .enumerate()
    {
        let port = free_port();
        let mut toml = valid(name, url).replace("127.0.0.1:0", &format!("127.0.0.1:{port}"));
        if name == "access" {
            let key_set =
                with_key_set(KEY_SETS[0]).replace("127.0.0.1:0", &format!("127.0.0.1:{port}"));
            toml = format!("listen = \"127.0.0.1:0\"\ngrpc_listen = \"127.0.0.1:0\"\n{key_set}");
        }
        let file = dir.path().join(format!("{at}.toml"));
        std::fs::write(&file, &toml)?;
        let mut command = role(name)?;
        let mut child = command.arg("--config").arg(&file).spawn()?;
        sleep(Duration::from_millis(2_500)).await;
        let served = served(port).await.with_context(|| format!("{name} does not run"));
        child.start_kill()?;
        let output = child.wait_with_output().await?;
        let logged = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        let served = served.with_context(|| logged.clone())?;
        check(&served, &format!("{name} serves"))?;
        check(&logged, &format!("{name} logs"))?;
        ensure!(logged.contains("127.0.0.1:1") || logged.contains("no-such-host"), "{logged}");
        let warned = logged.lines().filter(|line| line.contains(" WARN ")).count();
        ensure!(warned < 15, "{name} warns {warned} times in 2.5 s:\n{logged}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hazard_121_no_secret_of_the_command_line_is_printed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut lines: Vec<Vec<&str>> = Vec::new();
    for url in REDIS_URLS {
        lines.push(vec!["inspect", "user", "alice", "--redis", url]);
        lines.push(vec!["dev", "--once", "--redis", url]);
    }
    let key = "hush5ecret-hush5ecret-hush5ecret";
    lines.push(vec!["listen", "--url", "ws://127.0.0.1:1", "--secret", key, "--for", "1s"]);
    lines.push(vec!["listen", "--url", "ws://me:hush5ecret@127.0.0.1:1", "--for", "1s"]);
    lines.push(vec!["token", "--user", "alice", "--secret", "hush5ecret", "--ttl", "x"]);
    lines.push(vec!["token", "--user", "alice", "--secert", "hush5ecret"]);
    for setting in
        ["sasl.password:hush5ecret", "sasl.pasword=hush5ecret", "sasl.password=hush5ecret"]
    {
        let kafka = ["--brokers", "127.0.0.1:1", "--timeout", "1s", "-X", setting];
        for command in [&["inspect", "dead"][..], &["inspect", "receipts"], &["revoke", "list"]] {
            lines.push([command, &kafka[..]].concat());
        }
        lines.push([&["revoke", "user", "alice"], &kafka[..]].concat());
        lines.push([&["send", "--user", "alice", "--wait", "acked", "hello"], &kafka[..]].concat());
    }
    for token in ["hush5ecret.hush5ecret.hush5ecret", "hush5ecret"] {
        lines.push(vec!["token", "check", token, "--secret", key]);
        lines.push(vec!["listen", "--url", "ws://127.0.0.1:1", "--token", token, "--for", "1s"]);
    }
    lines.push(vec!["kick", "--everyone", "--yes", "--redis", REDIS_URLS[0]]);
    lines.push(vec!["--help", "--redis", REDIS_URLS[0]]);
    for line in lines {
        let mut command = Command::new(paths::binary("barid")?);
        command.args(&line).env("BARID_DEV_STATE", dir.path().join("dev.json"));
        command.env("BARID_REDIS", REDIS_URLS[0]).kill_on_drop(true);
        check(&told(command).await?, &line.join(" "))?;
    }
    Ok(())
}
