//! `barid-access`: holds the devices' sockets.

use std::process::ExitCode;

/// Keeps many small, long-lived allocations dense, and returns memory after a peak (`.cargo/config.toml` sets the delay).
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    barid_runtime::main::<barid_access::Access>()
}
