//! PEM files that a configuration names.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use barid_core::pem::{self, CertificateDer, PrivateKeyDer};

/// The contents of a file in PEM. Every error names the key and the file: `redis.ca_file /etc/ca.pem: …`.
pub struct PemFile {
    key: &'static str,
    path: PathBuf,
    /// The contents of the file; may be a private key.
    pub bytes: Vec<u8>,
}

impl PemFile {
    /// Reads the file that the configuration's `key` names.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(key: &'static str, path: &Path) -> Result<Self, String> {
        let mut file = Self { key, path: path.into(), bytes: Vec::new() };
        file.bytes = std::fs::read(path).map_err(|error| file.error(error))?;
        Ok(file)
    }

    /// Its certificates, at least one.
    ///
    /// # Errors
    /// It holds none, or is not PEM.
    pub fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        pem::certificates(&self.bytes).map_err(|error| self.error(error))
    }

    /// Its first private key.
    ///
    /// # Errors
    /// It holds none, or is not PEM.
    pub fn private_key(&self) -> Result<PrivateKeyDer<'static>, String> {
        pem::private_key(&self.bytes).map_err(|error| self.error(error))
    }

    /// A problem with the file, after its key and its path.
    pub fn error(&self, problem: impl Display) -> String {
        format!("{} {}: {problem}", self.key, self.path.display())
    }
}
