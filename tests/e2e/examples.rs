//! The examples in docs/examples: devices and producers in other languages, and a page in a real browser, without
//! an SDK.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use barid_core::ReceiptSet;
use barid_testkit::device::PATIENCE;
use barid_testkit::token::{APP, SECRET, sign};
use barid_testkit::{Browser, Cluster, Role, paths, records};
use barid_wire::record::Push;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// For a run of an example, and a start of `barid dev`.
const LIMIT: Duration = Duration::from_secs(60);

/// A language with an example that produces three pushes and receives them.
#[derive(Debug, Clone, Copy)]
enum Language {
    Python,
    Node,
    Go,
}

impl Language {
    const ALL: [Self; 3] = [Self::Python, Self::Node, Self::Go];

    /// The command that the example documents; `folder` is the one into which its files were copied.
    fn command(self, folder: &Path) -> Result<Command> {
        let target = paths::target_dir()?;
        let (program, script) = match self {
            Self::Python => (target.join("python/bin/python"), "python/push_and_receive.py"),
            Self::Node => ("node".into(), "node/push_and_receive.mjs"),
            // `go run` would compile the same.
            Self::Go => (target.join("examples/go/push_and_receive"), ""),
        };
        if program.is_absolute() {
            ensure!(program.is_file(), "{}: run scripts/setup.sh test", program.display());
        }
        let mut command = Command::new(program);
        if !script.is_empty() {
            let name = script.rsplit('/').next().unwrap_or(script);
            std::fs::copy(examples().join(script), folder.join(name))?;
            command.arg(name);
        }
        if matches!(self, Self::Node) {
            let packages = target.join("examples/node/node_modules");
            std::os::unix::fs::symlink(packages, folder.join("node_modules"))?;
        }
        command.current_dir(folder).stdin(Stdio::null()).kill_on_drop(true);
        Ok(command)
    }

    /// Runs the example with these arguments.
    async fn run(self, arguments: &[&str]) -> Result<Output> {
        let folder = tempfile::tempdir()?;
        let run = self.command(folder.path())?.args(arguments).output();
        Ok(timeout(LIMIT, run).await.with_context(|| format!("{self:?} hangs"))??)
    }
}

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples")
}

/// Checks that a run has succeeded, and gives what it printed.
fn succeeded(run: &Output) -> Result<String> {
    let printed = String::from_utf8_lossy(&run.stdout).into_owned();
    let errors = String::from_utf8_lossy(&run.stderr);
    ensure!(run.status.success() && errors.is_empty(), "{}: {printed}\n{errors}", run.status);
    Ok(printed)
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_push_and_receive_with_packages_of_their_language() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let (url, brokers) = (cluster.url(0).await?, cluster.brokers());
    let topic = cluster.topics().push.clone();
    for language in Language::ALL {
        let user = format!("{language:?}");
        let token = cluster.token(&user);
        let arguments = ["--brokers", &brokers, "--topic", &topic, "--url", &url];
        let who = ["--user", &user, "--token", &token];
        let printed = succeeded(&language.run(&[&arguments[..], &who].concat()).await?)?;
        let lines: Vec<_> = printed.lines().collect();
        ensure!(lines.len() == 4, "{language:?}: {printed}");
        for (number, (line, name)) in lines.iter().zip(["greeting", "order", "bytes"]).enumerate() {
            let start = format!("received {} {name}-", number + 1);
            ensure!(line.starts_with(&start), "{language:?}: {line}, not {start}…");
        }
        assert_eq!(lines[3], "all received and acknowledged", "{language:?}");
        everything_is_acknowledged(&cluster, &user).await?;
    }
    Ok(())
}

/// Waits until the user's only device has acknowledged all three messages: a node batches acks.
async fn everything_is_acknowledged(cluster: &Cluster, user: &str) -> Result<()> {
    let inspect = ["--json", "inspect", "user", user, "--redis", &cluster.redis.url()];
    let start = Instant::now();
    loop {
        let stored: Value = serde_json::from_str(&barid(&inspect, None).await?)?;
        if stored["devices"][0]["seq"] == 3 {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{user} has not acknowledged: {stored}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Runs `barid` with these arguments, beside the `barid dev` that has this state file.
async fn barid(arguments: &[&str], state: Option<&Path>) -> Result<String> {
    let mut command = Command::new(paths::binary("barid")?);
    command.args(arguments).envs(state.map(|state| (STATE, state))).kill_on_drop(true);
    let run = timeout(LIMIT, command.output()).await.context("barid hangs")??;
    ensure!(run.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&run.stderr));
    Ok(String::from_utf8(run.stdout)?.trim().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_is_told_why_a_node_refuses() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let (url, brokers) = (cluster.url(0).await?, cluster.brokers());
    for language in Language::ALL {
        let arguments = ["--brokers", &brokers, "--url", &url, "--token", "no-token"];
        let run = language.run(&arguments).await?;
        let errors = String::from_utf8_lossy(&run.stderr);
        let wanted = "refused by the node: 401 not a valid token: a signed JWT has three parts\n";
        assert_eq!((run.status.code(), errors.as_ref()), (Some(1), wanted), "{language:?}");
    }
    Ok(())
}

/// As README and the examples say: `barid dev`, `barid token`, `barid send`, and no other option, unless a usual port
/// is in use.
#[tokio::test(flavor = "multi_thread")]
async fn hazard_122_the_examples_run_beside_barid_dev_as_documented() -> Result<()> {
    let dev = Dev::start().await?;
    let token = dev.barid(&["token", "--user", "alice"]).await?;
    for language in Language::ALL {
        let mut arguments = vec!["--user", "alice", "--token", &token];
        if dev.brokers != "127.0.0.1:9092" {
            arguments.extend(["--brokers", &dev.brokers]);
        }
        if dev.url != USUAL_URL {
            arguments.extend(["--url", &dev.url]);
        }
        let printed = succeeded(&language.run(&arguments).await?)?;
        ensure!(printed.ends_with("\nall received and acknowledged\n"), "{language:?}: {printed}");
    }
    let mut page = Page::open().await?;
    if dev.url != USUAL_URL {
        page.fill("url", &dev.url).await?;
    }
    page.connect(&token).await?;
    page.is("good", "Connected as alice").await?;
    let send = ["send", "--user", "alice", "--device", "browser", "hello, page"];
    dev.barid(&[&send[..], &["--wait", "accepted,acked"]].concat()).await?;
    page.shows("hello, page").await?;
    page.0.close().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_shows_each_message_once_and_acknowledges_it_also_after_its_node_was_killed()
-> Result<()> {
    let mut cluster = Cluster::start().await?;
    let business = cluster.business()?;
    let mut page = Page::open().await?;
    page.fill("url", &cluster.url(0).await?).await?;
    page.connect(&cluster.token("alice")).await?;
    page.is("good", "Connected as alice").await?;
    let receipts = cluster.reader(&cluster.topics().receipts)?;
    for text in ["before", "after"] {
        let push = Push { receipts: ReceiptSet::ACKED, ..records::text("alice", text, text) };
        business.send(&push).await?;
        page.shows(text).await?;
        // The killed node may have lost the first ack after its receipt: then there is a second one.
        while receipts.next(PATIENCE).await?.json()?["id"] != text {}
        if text == "before" {
            cluster.kill(Role::Access, 0)?;
            page.is("wait", "No connection to the node.").await?;
            cluster.launch(Role::Access, 0).await?;
            page.is("good", "Connected as alice").await?;
        }
    }
    let shown = page.0.evaluate("[...document.querySelectorAll('pre')].map((e) => e.textContent)");
    assert_eq!(shown.await?, json!(["after", "before"]));
    page.0.close().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_whose_token_is_refused_says_so_and_does_not_reconnect() -> Result<()> {
    let mut cluster = Cluster::start().await?;
    let mut page = Page::open().await?;
    page.fill("url", &cluster.url(0).await?).await?;
    let (old, later) = (1_000_000_000_u64, 4_000_000_000_u64);
    let claims = |expiry: u64| json!({ "app": APP, "sub": "alice", "exp": expiry });
    let other_secret = "a-secret-that-is-not-the-cluster's";
    for (token, status) in [
        (sign(&claims(later), other_secret), "Closed with 4500: the token's signature"),
        (sign(&claims(old), SECRET), "Closed with 4004: the token has expired"),
    ] {
        page.connect(&token).await?;
        page.is("bad", status).await?;
        // Neither a connection nor a timer that would open one.
        let idle = page.0.evaluate("socket === undefined && timers.retry === undefined").await?;
        assert_eq!(idle, json!(true), "{status}");
    }
    // It is not the page that is broken.
    page.connect(&cluster.token("alice")).await?;
    page.is("good", "Connected as alice").await?;
    page.0.close().await
}

/// docs/examples/browser in Chromium.
struct Page(Browser);

impl Page {
    async fn open() -> Result<Self> {
        let file = examples().join("browser/index.html").canonicalize()?;
        Browser::open(&format!("file://{}", file.display())).await.map(Self)
    }

    async fn fill(&mut self, field: &str, text: &str) -> Result<()> {
        let fill = format!("document.getElementById('{field}').value = {}", json!(text));
        self.0.evaluate(&fill).await.map(drop)
    }

    /// Enters the token and presses the button.
    async fn connect(&mut self, token: &str) -> Result<()> {
        self.fill("token", token).await?;
        self.0.evaluate("document.getElementById('button').click()").await.map(drop)
    }

    /// Waits until the status has this class and begins with `text`.
    async fn is(&mut self, class: &str, text: &str) -> Result<()> {
        let status = "document.getElementById('status')";
        let text = json!(text);
        let wanted =
            format!("{status}.className === '{class}' && {status}.textContent.startsWith({text})");
        self.0.until(&wanted).await
    }

    /// Waits until a message with this text is in the list.
    async fn shows(&mut self, text: &str) -> Result<()> {
        let texts = "[...document.querySelectorAll('#messages pre')].map((e) => e.textContent)";
        self.0.until(&format!("{texts}.includes({})", json!(text))).await
    }
}

const STATE: &str = "BARID_DEV_STATE";
const USUAL_URL: &str = "ws://127.0.0.1:7080/v1/connect";

/// A running `barid dev`.
struct Dev {
    url: String,
    brokers: String,
    state: PathBuf,
    _dir: TempDir,
    _process: Child,
}

impl Dev {
    async fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let state = dir.path().join("dev.json");
        let mut process = Command::new(paths::binary("barid")?)
            .args(["--json", "dev"])
            .env(STATE, &state)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(process.stdout.take().context("no stdout")?).lines();
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                let line: Value = serde_json::from_str(&line)?;
                if line["event"] == "ready" {
                    return Ok(line);
                }
            }
            bail!("barid dev ended")
        };
        let ready = timeout(LIMIT, ready).await.context("not ready")??;
        // The demonstration goes on.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let text = |key: &str| ready[key].as_str().unwrap_or_default().to_owned();
        let url = format!("{}/v1/connect", text("url"));
        Ok(Self { url, brokers: text("brokers"), state, _dir: dir, _process: process })
    }

    async fn barid(&self, arguments: &[&str]) -> Result<String> {
        barid(arguments, Some(&self.state)).await
    }
}
