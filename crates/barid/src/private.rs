//! Files that only this user may have written. Directory and file are opened without following links, and their owner
//! is checked on the opened handles: between a check by name and the use, another user could exchange them.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, openat, renameat, unlinkat};
use rustix::io::Errno;

/// More than a state file or a secret contains.
const BYTES_MAX: u64 = 64 << 10;

/// A file in a directory of this user.
#[derive(Debug)]
pub struct PrivateFile {
    path: PathBuf,
    dir: OwnedFd,
}

impl PrivateFile {
    /// Opens the directory. `None`: there is none.
    pub fn find(path: &Path) -> anyhow::Result<Option<Self>> {
        let parent = parent(path);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = match openat(CWD, parent, flags, Mode::empty()) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::NOTDIR) => {
                bail!("{} is not a directory, or a link to one", parent.display())
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot open {}", parent.display()));
            }
        };
        check_owner(&dir, parent)?;
        Ok(Some(Self { path: path.into(), dir }))
    }

    /// As [`Self::find`], but creates a missing directory.
    pub fn prepare(path: &Path) -> anyhow::Result<Self> {
        let parent = parent(path);
        let problem = || format!("cannot create {}", parent.display());
        DirBuilder::new().recursive(true).mode(0o700).create(parent).with_context(problem)?;
        Self::find(path)?.with_context(problem)
    }

    /// Its contents; `None`: there is no file.
    pub fn read(&self) -> anyhow::Result<Option<Vec<u8>>> {
        // A pipe would block the opening.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.dir, self.name()?, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => bail!("{} is a link; remove it", self.path.display()),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", self.path.display()));
            }
        };
        let status = check_owner(&file, &self.path)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            bail!("{} is not a file; remove it", self.path.display());
        }
        let mut text = Vec::new();
        let read = File::from(file).take(BYTES_MAX).read_to_end(&mut text);
        read.with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(Some(text))
    }

    /// Replaces it. Others cannot read it, and never see a part of it.
    pub fn write(&self, text: &[u8]) -> anyhow::Result<()> {
        self.replace(text).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Fails where [`Self::write`] would.
    pub fn check(&self) -> anyhow::Result<()> {
        let problem = || format!("cannot write {}", self.path.display());
        let (new, _) = self.create().with_context(problem)?;
        unlinkat(&self.dir, &new, AtFlags::empty()).with_context(problem)
    }

    fn replace(&self, text: &[u8]) -> io::Result<()> {
        let (new, mut file) = self.create()?;
        file.write_all(text)?;
        Ok(renameat(&self.dir, &new, &self.dir, self.name()?)?)
    }

    /// Creates the file that will replace it, and returns its name as well.
    fn create(&self) -> io::Result<(OsString, File)> {
        let mut new = self.name()?.to_owned();
        new.push(".new");
        let _ = unlinkat(&self.dir, &new, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&self.dir, &new, flags, Mode::RUSR | Mode::WUSR)?;
        Ok((new, file.into()))
    }

    /// Removes it if it exists.
    pub fn remove(&self) {
        if let Ok(name) = self.name() {
            let _ = unlinkat(&self.dir, name, AtFlags::empty());
        }
    }

    fn name(&self) -> io::Result<&OsStr> {
        self.path.file_name().ok_or_else(|| io::Error::other("it is a directory"))
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn check_owner(handle: impl AsFd, path: &Path) -> anyhow::Result<rustix::fs::Stat> {
    let status = fstat(handle)?;
    if status.st_uid != rustix::process::geteuid().as_raw() {
        bail!("{} belongs to another user", path.display());
    }
    Ok(status)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    #[test]
    fn hazard_120_links_in_place_of_file_or_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own/dev.json");
        assert!(PrivateFile::find(&path).unwrap().is_none());
        let file = PrivateFile::prepare(&path).unwrap();
        assert!(file.read().unwrap().is_none());
        file.write(b"mine").unwrap();
        assert_eq!(file.read().unwrap().unwrap(), b"mine");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);

        let refused = |path: &Path, why: &str| {
            let read = PrivateFile::find(path).and_then(|file| file.unwrap().read());
            let error = read.unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        // A link to a file of this user passes each check that follows it.
        let link = dir.path().join("own/link.json");
        symlink(&path, &link).unwrap();
        refused(&link, "is a link");
        let elsewhere = dir.path().join("elsewhere");
        symlink(dir.path().join("own"), &elsewhere).unwrap();
        refused(&elsewhere.join("dev.json"), "is not a directory, or a link to one");
        std::fs::create_dir(dir.path().join("own/dir.json")).unwrap();
        refused(&dir.path().join("own/dir.json"), "is not a file");

        // A link where the new file is prepared is replaced, not written through.
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "kept").unwrap();
        symlink(&victim, dir.path().join("own/dev.json.new")).unwrap();
        file.write(b"again").unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"kept");
        assert_eq!(file.read().unwrap().unwrap(), b"again");
        file.check().unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("own")).unwrap().count(), 3, "no trace of it");
        file.remove();
        assert!(!path.exists());
    }
}
