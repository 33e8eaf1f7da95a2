//! The addresses that a process listens on, announced once all are bound. The system may have chosen the ports.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

/// The bound addresses by listener name. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Announcements {
    addresses: Arc<Mutex<BTreeMap<&'static str, SocketAddr>>>,
    done: watch::Sender<bool>,
    ready_file: Option<PathBuf>,
}

impl Announcements {
    pub(crate) fn new(ready_file: Option<PathBuf>) -> Self {
        Self { addresses: Arc::default(), done: watch::Sender::new(false), ready_file }
    }

    pub(crate) fn add(&self, listener: &'static str, address: SocketAddr) {
        self.addresses.lock().insert(listener, address);
    }

    pub(crate) fn done(&self) -> std::io::Result<()> {
        if let Some(path) = &self.ready_file {
            let text = serde_json::to_vec(&*self.addresses.lock())?;
            // Renamed into place, so that a reader never sees a partial file.
            let part = path.with_extension("part");
            std::fs::write(&part, text)?;
            std::fs::rename(&part, path)?;
        }
        self.done.send_replace(true);
        Ok(())
    }

    /// The address of a listener, if it is bound.
    pub fn get(&self, listener: &str) -> Option<SocketAddr> {
        self.addresses.lock().get(listener).copied()
    }

    /// Waits until all listeners are bound. Returns their addresses.
    pub async fn wait(&self) -> BTreeMap<&'static str, SocketAddr> {
        // The sender lives in self, so waiting cannot fail.
        let _ = self.done.subscribe().wait_for(|done| *done).await;
        self.addresses.lock().clone()
    }
}
