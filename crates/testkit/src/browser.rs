//! A headless Chromium with one page, which a test drives through the DevTools protocol.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::process::Process;
use crate::spawner::Scratch;

/// For a start of Chromium and for each condition, on a machine that runs other tests as well.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at a condition.
const LOOK: Duration = Duration::from_millis(20);

/// No sandbox, which root cannot have; no requests of Chromium's own; a port for DevTools that it chooses.
const FLAGS: [&str; 11] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "about:blank",
];

/// A running browser with one page. It ends when this is dropped; [`Browser::close`] leaves no files behind.
#[derive(Debug)]
pub struct Browser {
    process: Process,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: Option<String>,
    calls: u64,
    _profile: Scratch,
}

impl Browser {
    /// Starts Chromium and opens `url`.
    ///
    /// # Errors
    /// Returns an error with Chromium's output if it is missing or does not start.
    pub async fn open(url: &str) -> Result<Self> {
        let profile = Scratch::new("barid-chromium-")?;
        let log = profile.path().join("chromium.log");
        let mut process = Process::spawn("chromium", "chromium", &log, |command| {
            command.args(FLAGS).arg(format!("--user-data-dir={}", profile.path().display()));
            command.env("TMPDIR", profile.path()); // a killed Chromium leaves files
        })?;
        let address = devtools(&mut process, profile.path()).await?;
        let (socket, _) = timeout(LIMIT, connect_async(address)).await??;
        let mut browser = Self { process, socket, session: None, calls: 0, _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": url })).await?;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", attach).await?;
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        let loaded =
            format!("location.href === {} && document.readyState === 'complete'", json!(url));
        browser.until(&loaded).await?;
        Ok(browser)
    }

    /// The value of a JavaScript expression in the page.
    ///
    /// # Errors
    /// Returns an error if the expression throws, or Chromium does not answer.
    pub async fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let params = json!({ "expression": expression, "returnByValue": true });
        let mut answer = self.call("Runtime.evaluate", params).await?;
        ensure!(
            answer["exceptionDetails"].is_null(),
            "{expression}: {}",
            answer["exceptionDetails"]
        );
        Ok(answer["result"]["value"].take())
    }

    /// Waits until a JavaScript expression is true in the page.
    ///
    /// # Errors
    /// Returns an error with the page's text if it does not become true in time.
    pub async fn until(&mut self, condition: &str) -> Result<()> {
        let start = Instant::now();
        loop {
            // While a page loads, the expression may have no document, or one that is replaced.
            let outcome = self.evaluate(condition).await;
            if matches!(outcome, Ok(Value::Bool(true))) {
                return Ok(());
            }
            if start.elapsed() > LIMIT {
                let text = self.evaluate("document.body.innerText").await?;
                bail!("not within {LIMIT:?}: {condition}: {outcome:?}; the page shows {text}");
            }
            sleep(LOOK).await;
        }
    }

    /// Ends Chromium and waits until it has ended.
    ///
    /// # Errors
    /// Returns an error if it does not end in time.
    pub async fn close(mut self) -> Result<()> {
        self.session = None;
        self.call("Browser.close", json!({})).await?;
        self.process.wait(LIMIT).await?;
        Ok(())
    }

    async fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.calls += 1;
        let mut call = json!({ "id": self.calls, "method": method, "params": params });
        if let Some(session) = &self.session {
            call["sessionId"] = json!(session);
        }
        let answer = async {
            self.socket.send(Frame::text(call.to_string())).await?;
            while let Some(frame) = self.socket.next().await {
                let Frame::Text(text) = frame? else { continue };
                let answer: Value = serde_json::from_str(&text)?;
                // Others are events.
                if answer["id"] == call["id"] {
                    return Ok(answer);
                }
            }
            bail!("Chromium has closed the connection")
        };
        let mut answer =
            timeout(LIMIT, answer).await.with_context(|| format!("{method} hangs"))??;
        ensure!(answer["error"].is_null(), "{method}: {}", answer["error"]);
        Ok(answer["result"].take())
    }
}

/// The address of Chromium's DevTools, which it writes to its profile: a port, and on the next line a path.
async fn devtools(process: &mut Process, profile: &Path) -> Result<String> {
    let file = profile.join("DevToolsActivePort");
    let start = Instant::now();
    loop {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        if let Some((port, path)) = text.split_once('\n')
            && path.starts_with("/devtools/browser/")
        {
            return Ok(format!("ws://127.0.0.1:{port}{path}"));
        }
        process.must_run().context("scripts/setup.sh test installs Chromium")?;
        if start.elapsed() > LIMIT {
            bail!("Chromium does not start:\n{}", process.tail(40));
        }
        sleep(LOOK).await;
    }
}
