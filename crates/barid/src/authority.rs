//! `barid cluster ca`: a certificate authority for a small installation, and the certificates of the roles.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use barid_mesh::{Credentials, InternalTlsConfig, Party};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use serde::Serialize;
use time::{Duration, OffsetDateTime};

use crate::output::{Coded, Output, Tone};

const CA_FILE: &str = "ca.pem";
const CA_KEY_FILE: &str = "ca.key";
/// Validity of the authority, days.
const CA_DAYS: i64 = 3_650;
/// Validity before now, for clocks that are late.
const LATE: Duration = Duration::hours(1);

/// Options of `barid cluster ca`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of the files; created if it does not exist
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// How long the certificates of the roles are valid, days. The authority is valid for ten years
    #[arg(long, default_value_t = 397, value_parser = clap::value_parser!(u32).range(1..=3_650))]
    pub days: u32,
}

#[derive(Serialize)]
struct Issued<'a> {
    event: &'static str,
    dir: &'a Path,
    new_authority: bool,
    certificates: [&'static str; 5],
    valid_until: String,
}

/// Creates the authority unless it exists, and issues a new certificate for each role and for operators.
pub fn run(args: &Args, out: Output) -> anyhow::Result<ExitCode> {
    let days = Duration::days(args.days.into());
    // The directory, or what it holds, has to be changed.
    let new_authority =
        issue(&args.dir, days).map_err(|error| Coded::config(format!("{error:#}")))?;
    let valid_until = (OffsetDateTime::now_utc() + days).date().to_string();
    let issued = Issued {
        event: "issued",
        dir: &args.dir,
        new_authority,
        certificates: Party::ALL.map(Party::as_str),
        valid_until,
    };
    if out.is_json() {
        out.object(&issued)?;
    } else {
        explain(&issued, out)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn explain(issued: &Issued<'_>, out: Output) -> anyhow::Result<()> {
    let dir = issued.dir.display();
    let authority = if issued.new_authority { "created" } else { "kept" };
    out.line(format_args!("{dir}/{CA_FILE}, {CA_KEY_FILE}: authority, {authority}"))?;
    for name in issued.certificates {
        let until = &issued.valid_until;
        out.line(format_args!("{dir}/{name}.pem, {name}.key: valid until {until}"))?;
    }
    out.line(out.paint(Tone::Strong, "\nOn each machine: ca.pem, and the two files of its role"))?;
    out.line("  [internal_tls]")?;
    out.line("  ca_file = \"/etc/barid/tls/ca.pem\"")?;
    out.line("  certificate_file = \"/etc/barid/tls/access.pem\"")?;
    out.line("  key_file = \"/etc/barid/tls/access.key\"")?;
    out.line("The roles read changed files within seconds: run this again before they expire.")?;
    out.line("operator.pem and operator.key are for `barid kick`.")?;
    out.line(format_args!("Keep {CA_KEY_FILE} elsewhere: it makes certificates for every role."))?;
    Ok(())
}

/// Writes the files; returns whether the authority is new.
///
/// # Errors
/// Only one of the authority's files exists, they do not belong together, or a file cannot be written.
pub fn issue(dir: &Path, valid: Duration) -> anyhow::Result<bool> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot create {}", dir.display()))?;
    let (certificate, key) = (dir.join(CA_FILE), dir.join(CA_KEY_FILE));
    let (key_pair, is_new) = match (certificate.exists(), key.exists()) {
        (true, true) => {
            let text = fs::read_to_string(&key)
                .with_context(|| format!("cannot read {}", key.display()))?;
            let key_pair = KeyPair::from_pem(&text)
                .with_context(|| format!("{} is not a private key", key.display()))?;
            (key_pair, false)
        }
        (false, false) => {
            let key_pair = KeyPair::generate()?;
            let own = authority()?.self_signed(&key_pair)?;
            write(&key, &key_pair.serialize_pem(), 0o600)?;
            write(&certificate, &own.pem(), 0o644)?;
            (key_pair, true)
        }
        (has_certificate, _) => {
            let missing = if has_certificate { &key } else { &certificate };
            bail!("{} is missing: the authority needs both of its files", missing.display());
        }
    };
    let issuer = Issuer::new(authority()?, key_pair);
    for party in Party::ALL {
        let [pem, key] = ["pem", "key"].map(|end| dir.join(format!("{}.{end}", party.as_str())));
        let key_pair = KeyPair::generate()?;
        let issued = role(party, valid)?.signed_by(&key_pair, &issuer)?;
        write(&key, &key_pair.serialize_pem(), 0o600)?;
        write(&pem, &issued.pem(), 0o644)?;
        Credentials::read(&files(dir, party), party).map_err(anyhow::Error::msg)?;
    }
    Ok(is_new)
}

/// The configuration that names the files of a role.
pub fn files(dir: &Path, party: Party) -> InternalTlsConfig {
    InternalTlsConfig {
        ca_file: Some(dir.join(CA_FILE)),
        certificate_file: Some(dir.join(format!("{}.pem", party.as_str()))),
        key_file: Some(dir.join(format!("{}.key", party.as_str()))),
    }
}

/// Equal at each run, apart from the time, so that the authority's own certificate need not be parsed to sign further
/// ones: an issuer is known by its name and its key.
fn authority() -> anyhow::Result<CertificateParams> {
    let mut params = named("Barid cluster authority", Duration::days(CA_DAYS), Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn role(party: Party, valid: Duration) -> anyhow::Result<CertificateParams> {
    let mut params = named(party.as_str(), valid, vec![party.dns_name().into()])?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.extended_key_usages = both.to_vec();
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn named(name: &str, valid: Duration, names: Vec<String>) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - LATE, now + valid);
    Ok(params)
}

/// Replaces a file as a whole.
fn write(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    let problem = || format!("cannot write {}", path.display());
    let _ = fs::remove_file(&new);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&new)
        .with_context(problem)?;
    file.write_all(text.as_bytes()).with_context(problem)?;
    fs::rename(&new, path).with_context(problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn an_authority_is_kept_and_certificates_are_renewed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("tls");
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        assert!(issue(&dir, Duration::days(1)).unwrap());
        let (ca, purger) = (read(CA_FILE), read("purger.pem"));
        assert!(!issue(&dir, Duration::days(1)).unwrap());
        assert_eq!(read(CA_FILE), ca);
        assert_ne!(read("purger.pem"), purger);
        for name in [CA_KEY_FILE, "purger.key", "operator.key"] {
            assert_eq!(fs::metadata(dir.join(name)).unwrap().mode() & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn half_an_authority_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        issue(dir.path(), Duration::days(1)).unwrap();
        fs::remove_file(dir.path().join(CA_KEY_FILE)).unwrap();
        let error = issue(dir.path(), Duration::days(1)).unwrap_err().to_string();
        assert!(error.contains("ca.key is missing"), "{error}");
    }

    #[test]
    fn an_authority_with_the_key_of_another_is_an_error() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&one, &other] {
            issue(dir.path(), Duration::days(1)).unwrap();
        }
        fs::copy(other.path().join(CA_KEY_FILE), one.path().join(CA_KEY_FILE)).unwrap();
        let error = issue(one.path(), Duration::days(1)).unwrap_err().to_string();
        assert!(error.contains("purger.pem"), "{error}");
    }
}
