//! `barid-access`: holds the devices' sockets.

use std::process::ExitCode;

/// Many small, long-lived allocations that come and go in waves: it keeps them dense, and gives back what
/// a wave leaves (`.cargo/config.toml` says how soon).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    barid_runtime::main::<barid_access::Access>()
}
