//! `barid-access`: holds the devices' sockets.

use std::process::ExitCode;

/// Many small, long-lived allocations: it keeps them denser than the system's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    barid_runtime::main::<barid_access::Access>()
}
