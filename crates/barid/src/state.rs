//! The file in which a running `barid dev` leaves its addresses for the other commands.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

/// The addresses of a development cluster, and the key of its tokens. Only the user can read the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevState {
    /// Process id.
    pub pid: u32,
    /// Kafka's brokers.
    pub brokers: String,
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
    pub fn running() -> anyhow::Result<Option<Self>> {
        let path = path()?;
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        if fs::metadata(&path)?.uid() != own_uid()? {
            bail!("{} belongs to another user; remove it, or set BARID_DEV_STATE", path.display());
        }
        let state: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not a state file of `barid dev`", path.display()))?;
        Ok(state.is_alive().then_some(state))
    }

    /// Writes the file. It is removed when the guard is dropped.
    pub fn publish(&self) -> anyhow::Result<Published> {
        let path = path()?;
        let problem = || format!("cannot write {}", path.display());
        if let Some(dir) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(problem)?;
            if fs::metadata(dir)?.uid() != own_uid()? {
                bail!("{} belongs to another user; set BARID_DEV_STATE to a file", dir.display());
            }
        }
        let new = path.with_extension("new");
        let _ = fs::remove_file(&new);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .with_context(problem)?;
        file.write_all(&serde_json::to_vec_pretty(self)?).with_context(problem)?;
        fs::rename(&new, &path).with_context(problem)?;
        Ok(Published { path })
    }

    /// Whether the process is running: a killed `barid dev` does not remove its file.
    fn is_alive(&self) -> bool {
        let stat = Path::new("/proc").join(self.pid.to_string());
        stat.exists() || !Path::new("/proc/self").exists()
    }
}

/// Removes the file on drop.
#[derive(Debug)]
pub struct Published {
    path: PathBuf,
}

impl Drop for Published {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// `BARID_DEV_STATE`, else `barid/dev.json` in the user's runtime directory, else
/// `/tmp/barid-dev-<uid>/dev.json`.
fn path() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("BARID_DEV_STATE").filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    if let Some(runtime) = runtime.filter(|dir| dir.is_absolute() && dir.is_dir()) {
        return Ok(runtime.join("barid").join("dev.json"));
    }
    Ok(std::env::temp_dir().join(format!("barid-dev-{}", own_uid()?)).join("dev.json"))
}

fn own_uid() -> io::Result<u32> {
    Ok(fs::metadata("/proc/self")?.uid())
}
