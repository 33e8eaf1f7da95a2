//! Figures of the real binaries that other work on the machine would change: the tests run one at a time, and
//! `cargo test` runs one test binary at a time.

mod bursts;
mod density;
mod growth;
mod void;

use tokio::sync::{Mutex, MutexGuard};

/// Waits until no other test runs; none begins before this is dropped.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}
