//! PEM files that a configuration names.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use barid_core::pem::{self, CertificateDer, PrivateKeyDer};
use rustls_pki_types::UnixTime;
use webpki::{EndEntityCert, KeyUsage};

use crate::{files, words};

/// The year 10000: later than any date that a certificate can name, s since the Unix epoch.
const NEVER_S: u64 = 253_402_300_800;

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
    /// The file cannot be read: see [`files::read`].
    pub fn read(key: &'static str, path: &Path) -> Result<Self, String> {
        let mut file = Self { key, path: path.into(), bytes: Vec::new() };
        file.bytes = files::read(path).map_err(|error| file.error(error))?;
        Ok(file)
    }

    /// Reads several files.
    ///
    /// # Errors
    /// Returns all that cannot be read, one a line.
    pub fn read_all<const N: usize>(
        files: [(&'static str, &Path); N],
    ) -> Result<[Self; N], String> {
        let read = files.map(|(key, path)| Self::read(key, path));
        let problems: Vec<&str> =
            read.iter().filter_map(|one| one.as_ref().err()).map(String::as_str).collect();
        if !problems.is_empty() {
            return Err(problems.join("\n"));
        }
        let read = read.into_iter().flatten().collect::<Vec<_>>();
        let rest = read.len();
        read.try_into().map_err(|_| format!("{rest} files instead of {N}"))
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

    /// A problem with the file, after its key and its path. What does not look like a path is not shown.
    pub fn error(&self, problem: impl Display) -> String {
        let problem = words::plain(&problem.to_string());
        format!("{} {}: {problem}", self.key, words::shown_path(&self.path))
    }
}

/// When the first of a chain's certificates expires, s since the Unix epoch; 0 if there is none.
pub fn expires_s(chain: &[CertificateDer<'_>]) -> i64 {
    chain.iter().filter_map(not_after_s).min().unwrap_or(0)
}

fn not_after_s(certificate: &CertificateDer<'_>) -> Option<i64> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    // webpki checks the dates before anything else; its error contains the one that has passed.
    let late = UnixTime::since_unix_epoch(Duration::from_secs(NEVER_S));
    match certificate.verify_for_usage(&[], &[], &[], late, KeyUsage::server_auth(), None, None) {
        Err(webpki::Error::CertExpired { not_after, .. }) => {
            Some(i64::try_from(not_after.as_secs()).unwrap_or(i64::MAX))
        }
        _ => None,
    }
}
