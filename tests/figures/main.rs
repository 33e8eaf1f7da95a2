//! Figures of the real binaries that other work on the machine would change: the tests run one at a time, and
//! `cargo test` runs one test binary at a time.

mod bursts;
mod density;
mod growth;
mod void;
