//! One measuring test at a time.

use tokio::sync::{Mutex, MutexGuard};

/// Waits until no other test of this process measures; none begins before the guard is dropped. `cargo test` runs one
/// test binary at a time, so put tests whose figures suffer from other work into a binary of their own.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}
