//! Paths: the target directory, the binaries of this build, Kafka's jars.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The directory of this build's binaries: `target/debug`, or that of the test executable.
///
/// # Errors
/// Returns an error if the path of the running executable is unknown.
pub fn profile_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("path of the test executable")?;
    let dir = exe.parent().context("the test executable has no directory")?;
    let is_deps = dir.file_name().is_some_and(|name| name == "deps");
    Ok(if is_deps { dir.parent().unwrap_or(dir) } else { dir }.to_path_buf())
}

/// Cargo's target directory.
///
/// # Errors
/// As [`profile_dir`].
pub fn target_dir() -> Result<PathBuf> {
    let profile = profile_dir()?;
    Ok(profile.parent().unwrap_or(&profile).to_path_buf())
}

/// The binary `name` of this workspace, as built by `cargo build --workspace --bins`.
///
/// # Errors
/// Returns an error if it was not built. Cargo builds a package's binaries only for that package's own tests,
/// so tests of a whole cluster need the command before them, as in `make test`.
pub fn binary(name: &str) -> Result<PathBuf> {
    let path = profile_dir()?.join(name);
    if !path.is_file() {
        bail!("{} is missing: run `cargo build --workspace --bins` first", path.display());
    }
    Ok(path)
}

/// Apache Kafka's jars, as a Java class path.
///
/// # Errors
/// Returns an error that says how to fetch them if they are missing.
pub fn kafka_class_path() -> Result<String> {
    let libs = match std::env::var_os("BARID_KAFKA_LIBS") {
        Some(libs) => PathBuf::from(libs),
        None => target_dir()?.join("kafka/libs"),
    };
    if !has_jars(&libs) {
        bail!(
            "Apache Kafka's jars are not in {}: run scripts/kafka.sh, or name another directory \
             in BARID_KAFKA_LIBS",
            libs.display()
        );
    }
    Ok(format!("{}/*", libs.display()))
}

fn has_jars(dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("kafka_2.13-"))
}
