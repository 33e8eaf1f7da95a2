//! Files that are read again when they change.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Interval, interval};

/// How often the modification times are checked.
const LOOK: Duration = Duration::from_secs(2);

/// Notices that one of some files was changed, by its modification time, and SIGHUP.
pub struct FileWatch<const N: usize> {
    paths: [PathBuf; N],
    known: [Option<SystemTime>; N],
    look: Interval,
    hangup: Option<Signal>,
}

impl<const N: usize> FileWatch<N> {
    /// Watches these files. Call within a runtime.
    pub fn new(paths: [PathBuf; N]) -> Self {
        let known = changed_at(&paths);
        let hangup = signal(SignalKind::hangup()).ok();
        Self { paths, known, look: interval(LOOK), hangup }
    }

    /// Waits for the next change of a file, or SIGHUP. Cancel-safe.
    pub async fn changed(&mut self) {
        loop {
            let asked = async {
                match &mut self.hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            let asked = tokio::select! {
                _ = self.look.tick() => false,
                _ = asked => true,
            };
            let now = changed_at(&self.paths);
            if asked || now != self.known {
                self.known = now;
                return;
            }
        }
    }
}

/// Follows symbolic links: a mounted Kubernetes secret is a link, which is replaced at an update.
fn changed_at<const N: usize>(paths: &[PathBuf; N]) -> [Option<SystemTime>; N] {
    paths.each_ref().map(|path| std::fs::metadata(path).and_then(|file| file.modified()).ok())
}
