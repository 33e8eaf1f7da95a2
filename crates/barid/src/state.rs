//! The file in which a running `barid dev` leaves its addresses for the other commands.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use barid_core::Secret;
use serde::{Deserialize, Serialize};

use crate::output::Coded;
use crate::private::PrivateFile;

/// Variable with the path of the file.
pub const STATE_FILE: &str = "BARID_DEV_STATE";

/// The addresses of a development cluster, and the key of its tokens. Only the user can read the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevState {
    /// Process id.
    pub pid: u32,
    /// Kafka's brokers.
    pub brokers: String,
    /// The broker is a part of the process, and supports only what producers and consumers need.
    #[serde(default)]
    pub in_process_kafka: bool,
    /// Redis's URL.
    pub redis: String,
    /// URL for devices.
    pub url: String,
    /// The admin endpoints of its roles.
    #[serde(default)]
    pub admin: Vec<String>,
    /// Directory of its authority and certificates.
    pub tls: PathBuf,
    /// Id of the key.
    pub key_id: String,
    /// Secret of the key.
    pub secret: String,
}

impl DevState {
    /// The running cluster, if there is one.
    ///
    /// # Errors
    /// Returns an error if there is a file, and it cannot be read or is not one of `barid dev`.
    pub fn running() -> anyhow::Result<Option<Self>> {
        Self::read(&path()).map_err(unusable)
    }

    fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        let Some(file) = PrivateFile::find(path)? else { return Ok(None) };
        let Some(text) = file.read()? else { return Ok(None) };
        let state: Self = serde_json::from_slice(&text).map_err(|error| {
            anyhow!("{} is not a state file of `barid dev` ({error}); remove it", path.display())
        })?;
        Ok(state.is_alive().then_some(state))
    }

    /// Fails where [`Self::publish`] would.
    pub fn check() -> anyhow::Result<()> {
        PrivateFile::prepare(&path()).and_then(|file| file.check()).map_err(unusable)
    }

    /// Writes the file. It is removed when the guard is dropped.
    pub fn publish(&self) -> anyhow::Result<Published> {
        let file = PrivateFile::prepare(&path()).map_err(unusable)?;
        file.write(&serde_json::to_vec_pretty(self)?).map_err(unusable)?;
        Ok(Published { file })
    }

    /// Whether the process is running: a killed `barid dev` does not remove its file.
    fn is_alive(&self) -> bool {
        let stat = Path::new("/proc").join(self.pid.to_string());
        stat.exists() || !Path::new("/proc/self").exists()
    }
}

fn unusable(error: anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    let or = if text.ends_with("remove it") { ", or" } else { ";" };
    Coded::config(format!("{text}{or} set {STATE_FILE} to a file elsewhere")).into()
}

/// Removes the file on drop.
#[derive(Debug)]
pub struct Published {
    file: PrivateFile,
}

impl Drop for Published {
    fn drop(&mut self) {
        self.file.remove();
    }
}

/// The secret that signs the tokens of `barid dev`: in a file, so that tokens outlive a restart.
///
/// # Errors
/// Returns an error if the file cannot be read or written, or holds no secret.
pub fn kept_secret(new: impl FnOnce() -> String) -> anyhow::Result<Secret> {
    let beside = path().with_extension("secret");
    let kept = kept_secret_path().filter(|path| PrivateFile::prepare(path).is_ok());
    kept_in(&kept.unwrap_or(beside), new).map_err(unusable)
}

fn kept_in(path: &Path, new: impl FnOnce() -> String) -> anyhow::Result<Secret> {
    let file = PrivateFile::prepare(path)?;
    if let Some(kept) = file.read()? {
        let kept = String::from_utf8(kept).ok().filter(|kept| !kept.is_empty());
        let kept =
            kept.with_context(|| format!("{} holds no secret; remove it", path.display()))?;
        return Ok(Secret::new(kept));
    }
    let secret = new();
    file.write(secret.as_bytes())?;
    Ok(Secret::new(secret))
}

/// `barid/dev.secret` in the user's directory for state (XDG), which outlives a restart of the machine; `None` if
/// `BARID_DEV_STATE` is set or the user has no such directory: then it is beside the state.
fn kept_secret_path() -> Option<PathBuf> {
    if std::env::var_os(STATE_FILE).is_some_and(|path| !path.is_empty()) {
        return None;
    }
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(state.join("barid").join("dev.secret"))
}

/// `BARID_DEV_STATE`, else `barid/dev.json` in the user's runtime directory, else
/// `/tmp/barid-dev-<uid>/dev.json`.
fn path() -> PathBuf {
    if let Some(path) = std::env::var_os(STATE_FILE).filter(|path| !path.is_empty()) {
        return path.into();
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    if let Some(runtime) = runtime.filter(|dir| dir.is_absolute() && dir.is_dir()) {
        return runtime.join("barid").join("dev.json");
    }
    std::env::temp_dir()
        .join(format!("barid-dev-{}", rustix::process::geteuid().as_raw()))
        .join("dev.json")
}
