//! Files that are read again when they change.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::interval;

/// How often the modification times are checked.
const LOOK: Duration = Duration::from_secs(2);

/// Notices that one of some files was changed, by its modification time, and SIGHUP. Create it before the files are
/// first read, so that a change after that is noticed, whenever [`Self::reload`] begins.
#[derive(Debug, Clone)]
pub struct FileWatch<const N: usize> {
    paths: [PathBuf; N],
    known: [Option<SystemTime>; N],
}

impl<const N: usize> FileWatch<N> {
    /// Notes how the files are now.
    pub fn new(paths: [PathBuf; N]) -> Self {
        let known = changed_at(&paths);
        Self { paths, known }
    }

    /// Calls `read` when a file was changed since the last call, and at SIGHUP, then `apply` with its result. If `read`
    /// failed, `apply` gets `None`, and the last good files stay. `what` names them in the log. Call within a runtime;
    /// never returns.
    pub async fn reload<T>(
        mut self,
        what: &str,
        read: impl Fn() -> Result<T, String>,
        mut apply: impl FnMut(Option<T>),
    ) {
        let mut look = interval(LOOK);
        let mut hangup = signal(SignalKind::hangup()).ok();
        loop {
            let asked = async {
                match &mut hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            let asked = tokio::select! {
                _ = look.tick() => false,
                _ = asked => true,
            };
            let now = changed_at(&self.paths);
            if !asked && now == self.known {
                continue;
            }
            self.known = now;
            match read() {
                Ok(new) => {
                    apply(Some(new));
                    tracing::info!(what, "files reloaded");
                }
                Err(error) => {
                    apply(None);
                    tracing::error!(
                        what,
                        error,
                        "cannot use the changed files; the last good ones stay"
                    );
                }
            }
        }
    }
}

/// Follows symbolic links: a mounted Kubernetes secret is a link, which is replaced at an update.
fn changed_at<const N: usize>(paths: &[PathBuf; N]) -> [Option<SystemTime>; N] {
    paths.each_ref().map(|path| std::fs::metadata(path).and_then(|file| file.modified()).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[tokio::test(start_paused = true)]
    async fn hazard_107_a_change_between_the_first_reading_and_the_watch_is_noticed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        let watch = FileWatch::new([path.clone()]);
        let write = |text: &str, seconds: u64| {
            std::fs::write(&path, text).unwrap();
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            std::fs::File::options().write(true).open(&path).unwrap().set_modified(at).unwrap();
        };
        write("one", 1);
        let seen = Mutex::new(Vec::new());
        let read = || match std::fs::read_to_string(&path).unwrap() {
            text if text == "broken" => Err(text),
            text => Ok(text),
        };
        let keeping = watch.reload("file", read, |text| seen.lock().push(text));
        let changing = async {
            for (text, at) in [("broken", 2), ("two", 3), ("two", 3)] {
                tokio::time::sleep(2 * LOOK).await;
                write(text, at);
            }
            tokio::time::sleep(2 * LOOK).await;
        };
        tokio::select! {
            () = keeping => (),
            () = changing => (),
        }
        let seen = seen.into_inner();
        assert_eq!(seen, [Some("one".to_owned()), None, Some("two".to_owned())]);
    }
}
