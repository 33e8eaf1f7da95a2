//! Certificates and private keys in PEM.

use rustls_pki_types::pem::{Error, PemObject as _};
pub use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Why a text cannot be used as PEM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PemError {
    /// The text has no section with a certificate.
    #[error("it holds no certificate; write it in PEM, beginning with -----BEGIN CERTIFICATE-----")]
    NoCertificate,
    /// The text has no section with a private key, or only an encrypted one.
    #[error(
        "it holds no private key; write it in PEM, not encrypted, beginning with -----BEGIN PRIVATE KEY-----"
    )]
    NoPrivateKey,
    /// A section is broken.
    #[error("it is not valid PEM: {0}")]
    Malformed(#[from] Error),
}

/// Returns all certificates of a PEM text, at least one. Sections of another kind are ignored. What a certificate
/// holds is not checked.
///
/// # Errors
/// The text has no certificate, or a broken section.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>()?;
    if certificates.is_empty() { Err(PemError::NoCertificate) } else { Ok(certificates) }
}

/// Returns the first private key of a PEM text.
///
/// # Errors
/// The text has no private key, or a broken section before it.
pub fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, PemError> {
    PrivateKeyDer::from_pem_slice(text).map_err(|error| match error {
        Error::NoItemsFound => PemError::NoPrivateKey,
        error => error.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(kind: &str) -> String {
        format!("-----BEGIN {kind}-----\nAAAA\n-----END {kind}-----\n")
    }

    #[test]
    fn certificates_and_keys_are_found_among_other_sections() {
        let text = ["CERTIFICATE", "PRIVATE KEY", "CERTIFICATE"].map(section).concat();
        assert_eq!(certificates(text.as_bytes()).unwrap().len(), 2);
        assert_eq!(private_key(text.as_bytes()).unwrap().secret_der(), [0; 3]);
    }

    #[test]
    fn errors_say_what_to_write() {
        let certificates = |text: &str| certificates(text.as_bytes()).unwrap_err().to_string();
        let private_key = |text: &str| private_key(text.as_bytes()).unwrap_err().to_string();
        for text in ["", "nothing", &section("ENCRYPTED PRIVATE KEY")] {
            assert!(certificates(text).starts_with("it holds no certificate; "), "{text}");
            assert!(private_key(text).starts_with("it holds no private key; "), "{text}");
        }
        let broken = section("CERTIFICATE").replace("AAAA", "*");
        assert!(certificates(&broken).starts_with("it is not valid PEM: "));
        assert!(private_key(&broken).starts_with("it is not valid PEM: "));
    }
}
