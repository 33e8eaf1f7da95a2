//! Stores of a device's position, for restarts of the program.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use barid_core::limits::{GENERATION_MAX, WIRE_NUMBER_MAX};
use barid_core::{Chain, Epoch, Generation, Position, Seq};
use serde::{Deserialize, Serialize};

/// The state of a device that is saved.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The number of the last connection attempt.
    pub attempt: u64,
    /// The position of the last handled message; `None`: there is none.
    #[serde(default, with = "position")]
    pub position: Option<Position>,
    /// Hashes (`xxh3_64`) of the ids handled last, oldest first. After the positions have started anew, they identify
    /// messages that the application has handled.
    #[serde(default)]
    pub recent: Vec<u64>,
    /// Hashes of handled ids that may be received again after the position: they were handled before an earlier
    /// message, or the positions started anew.
    #[serde(default)]
    pub ahead: Vec<u64>,
}

impl Checkpoint {
    /// Removes numbers that every server refuses, so that the device can connect.
    pub(crate) fn bounded(mut self) -> Self {
        self.attempt = if self.attempt < WIRE_NUMBER_MAX { self.attempt } else { 0 };
        self.position = self.position.filter(|position| {
            position.epoch.0 <= WIRE_NUMBER_MAX
                && position.seq.0 <= WIRE_NUMBER_MAX
                && position.generation.0 <= GENERATION_MAX
        });
        self
    }
}

/// A store of a device's checkpoint. It is called on a thread that may block.
pub trait PositionStore: Send + Sync + 'static {
    /// Loads the last checkpoint; `None`: there is none.
    ///
    /// # Errors
    /// It cannot be read. Then the client does not start, because it might show messages again.
    fn load(&self) -> io::Result<Option<Checkpoint>>;

    /// Replaces the checkpoint. Called before the messages in it are acknowledged.
    ///
    /// # Errors
    /// It cannot be written. The client reports an event, and continues.
    fn save(&self, checkpoint: &Checkpoint) -> io::Result<()>;
}

/// Keeps the checkpoint in memory. Share one store between a program's clients of the same device.
#[derive(Debug, Default)]
pub struct MemoryStore(Mutex<Option<Checkpoint>>);

impl PositionStore for MemoryStore {
    fn load(&self) -> io::Result<Option<Checkpoint>> {
        Ok(self.0.lock().unwrap_or_else(|e| e.into_inner()).clone())
    }

    fn save(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = Some(checkpoint.clone());
        Ok(())
    }
}

/// Keeps the checkpoint in a small JSON file, which is replaced atomically and synced, so that it survives a power
/// cut. A file that cannot be read is renamed (`.broken`), and the server's position of the device is used.
#[derive(Debug, Clone)]
pub struct FileStore {
    path: PathBuf,
}

impl FileStore {
    /// Creates a store in this file. Its directory must exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails where something else than a file is: a device such as /dev/null would be replaced.
    fn check(&self) -> io::Result<()> {
        match std::fs::metadata(&self.path) {
            Ok(status) if !status.is_file() => {
                let path = self.path.display();
                Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{path} is not a file")))
            }
            _ => Ok(()),
        }
    }
}

impl PositionStore for FileStore {
    fn load(&self) -> io::Result<Option<Checkpoint>> {
        self.check()?;
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match serde_json::from_slice(&bytes) {
            Ok(checkpoint) => Ok(Some(checkpoint)),
            // The disk has lost synced data. The server knows the device's position.
            Err(error) => {
                let broken = self.beside(".broken");
                tracing::warn!(path = %self.path.display(), %error, "cannot read the stored position");
                let _ = std::fs::rename(&self.path, broken);
                Ok(None)
            }
        }
    }

    fn save(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        self.check()?;
        let new = self.beside(".new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(checkpoint)?)?;
        // Otherwise a power cut could leave the renamed file without its contents.
        file.sync_all()?;
        drop(file);
        std::fs::rename(&new, &self.path)?;
        let directory = self.path.parent().filter(|directory| !directory.as_os_str().is_empty());
        // Best effort: some platforms cannot open or sync directories.
        if let Ok(directory) = File::open(directory.unwrap_or(Path::new("."))) {
            let _ = directory.sync_all();
        }
        Ok(())
    }
}

impl FileStore {
    fn beside(&self, suffix: &str) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(suffix);
        path.into()
    }
}

/// A [`Position`] as `{"epoch":…,"generation":…,"seq":…,"chain":…}`.
mod position {
    use super::*;
    use serde::{Deserializer, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Saved {
        epoch: u64,
        generation: u32,
        seq: u64,
        #[serde(default)]
        chain: Option<u32>,
    }

    pub(super) fn serialize<S: Serializer>(
        position: &Option<Position>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let saved = position.map(|p| Saved {
            epoch: p.epoch.0,
            generation: p.generation.0,
            seq: p.seq.0,
            chain: p.chain.map(|c| c.0),
        });
        saved.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Position>, D::Error> {
        let saved = Option::<Saved>::deserialize(deserializer)?;
        Ok(saved.map(|s| Position {
            epoch: Epoch(s.epoch),
            generation: Generation(s.generation),
            seq: Seq(s.seq),
            chain: s.chain.map(Chain),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_61_a_checkpoint_with_numbers_that_no_server_takes_is_forgotten() {
        for number in [0, 1, WIRE_NUMBER_MAX - 1, WIRE_NUMBER_MAX, 1 << 53, 1 << 63, u64::MAX] {
            let position = |epoch, seq, generation| Position {
                epoch: Epoch(epoch),
                generation: Generation(generation),
                seq: Seq(seq),
                chain: None,
            };
            let kept = |position| {
                let checkpoint = Checkpoint { position: Some(position), ..Default::default() };
                checkpoint.bounded().position.is_some()
            };
            let fits = number <= WIRE_NUMBER_MAX;
            assert_eq!(kept(position(number, 1, 0)), fits);
            assert_eq!(kept(position(1, number, 0)), fits);
            let attempt = Checkpoint { attempt: number, ..Default::default() }.bounded().attempt;
            assert!(attempt < WIRE_NUMBER_MAX && (attempt == number || attempt == 0));
        }
        for (generation, fits) in [(GENERATION_MAX, true), (GENERATION_MAX + 1, false)] {
            let position = Position {
                epoch: Epoch(1),
                generation: Generation(generation),
                seq: Seq(1),
                chain: None,
            };
            let checkpoint = Checkpoint { position: Some(position), ..Default::default() };
            assert_eq!(checkpoint.bounded().position.is_some(), fits);
        }
    }

    #[test]
    fn a_file_brings_back_what_was_saved_last() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::new(dir.path().join("phone.json"));
        assert_eq!(store.load().unwrap(), None);
        let position = Position {
            epoch: Epoch(7),
            generation: Generation(2),
            seq: Seq(9),
            chain: Some(Chain(u32::MAX)),
        };
        for recent in [vec![], vec![u64::MAX, 1]] {
            let checkpoint =
                Checkpoint { attempt: 5, position: Some(position), recent, ahead: vec![1] };
            store.save(&checkpoint).unwrap();
            assert_eq!(store.load().unwrap(), Some(checkpoint));
        }
    }

    #[test]
    fn hazard_42_an_empty_or_torn_file_does_not_stop_the_client() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("phone.json");
        let store = FileStore::new(&path);
        let checkpoint = Checkpoint { attempt: 5, recent: vec![1, 2], ..Default::default() };
        store.save(&checkpoint).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for torn in 0..whole.len() {
            std::fs::write(&path, &whole[..torn]).unwrap();
            assert_eq!(store.load().unwrap(), None, "{torn} bytes of it");
            assert!(!path.exists() && dir.path().join("phone.json.broken").exists());
        }
        std::fs::write(&path, [0; 64]).unwrap();
        assert_eq!(store.load().unwrap(), None);
        store.save(&checkpoint).unwrap();
        assert_eq!(store.load().unwrap(), Some(checkpoint));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_device_node_is_neither_read_nor_replaced() {
        let store = FileStore::new("/dev/null");
        assert!(store.load().unwrap_err().to_string().contains("is not a file"));
        assert!(store.save(&Checkpoint::default()).is_err());
        assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
    }

    /// `fsync` of /dev/null is an error: a position that is not on the disk takes no other's place.
    #[cfg(target_os = "linux")]
    #[test]
    fn hazard_42_what_cannot_be_synced_does_not_replace_what_was_saved_before() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::new(dir.path().join("phone.json"));
        let checkpoint = Checkpoint { attempt: 5, ..Default::default() };
        store.save(&checkpoint).unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join("phone.json.new")).unwrap();
        assert!(store.save(&Checkpoint { attempt: 6, ..Default::default() }).is_err());
        assert_eq!(store.load().unwrap(), Some(checkpoint));
    }

    #[test]
    fn what_cannot_be_read_at_all_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(FileStore::new(dir.path()).load().is_err());
    }
}
