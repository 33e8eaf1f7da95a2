//! Reads the files that a configuration names, within bounds: a slip in a path must not make a process hang.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::OFlags;

/// Maximum bytes of a file: four times the certificate authorities of a usual system.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Reads a file.
///
/// # Errors
/// It cannot be read, is not a regular file (but a pipe, a device, a directory), or is larger than [`FILE_BYTES_MAX`].
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a device may have effects, so it is looked at first.
    check_regular(path)?;
    // Something else may have taken its place: a pipe would wait for its writer.
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).unwrap_or_default();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    check_kind(&file.metadata()?)?;
    let mut bytes = Vec::new();
    // The size of what the kernel makes up, as in /proc, is unknown before.
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("it is larger than {FILE_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

/// As [`read`], for text.
///
/// # Errors
/// As [`read`]; or it is not UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|_| io::Error::other("it is not UTF-8"))
}

/// Checks that there is a regular file, for readers that would wait for a pipe, or read a device for ever.
///
/// # Errors
/// Returns an error that names what is there, unless it is a regular file.
pub fn check_regular(path: &Path) -> io::Result<()> {
    check_kind(&std::fs::metadata(path)?)
}

fn check_kind(found: &Metadata) -> io::Result<()> {
    let kind = found.file_type();
    let kind = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Err(io::Error::other(format!("it is {kind}; write the path of a regular file")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn hazard_151_pipes_devices_directories_and_huge_files_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let told = |path: &Path| read(path).unwrap_err().to_string();
        let pipe = dir.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert_eq!(told(&pipe), "it is a pipe; write the path of a regular file");
        assert!(told(Path::new("/dev/zero")).starts_with("it is a device; "));
        assert!(told(dir.path()).starts_with("it is a directory; "));
        let socket = dir.path().join("socket");
        let _listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(told(&socket).starts_with("it is a socket; "));
        let large = dir.path().join("large");
        File::create(&large).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        assert_eq!(told(&large), "it is larger than 1048576 bytes");
        File::create(&large).unwrap().set_len(FILE_BYTES_MAX).unwrap();
        assert_eq!(read(&large).unwrap().len() as u64, FILE_BYTES_MAX);
        assert!(told(&dir.path().join("none")).starts_with("No such file"));
        // Kubernetes mounts files as links.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&large, &link).unwrap();
        assert!(read(&link).is_ok());
        // Its length is 0 before it is read.
        assert!(!read(Path::new("/proc/self/status")).unwrap().is_empty());
    }
}
