//! Verification keys. Each is bound to one algorithm.

use std::path::Path;

use barid_core::{AppId, Secret};
use barid_runtime::files;
use barid_runtime::words::{is_path, shown_path};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};

use crate::config::{KeyAlgorithmName, KeyConfig};

/// The shortest secret of HS256, bytes: RFC 7518, 3.2 asks for one at least as long as the hash.
pub const SECRET_BYTES_MIN: usize = 32;

/// Part of the first line of every private key in PEM.
const PRIVATE: &[u8] = b"PRIVATE KEY-----";

/// A key for exactly one algorithm.
#[derive(Clone)]
pub(super) struct Key {
    pub(super) id: Option<String>,
    pub(super) algorithm: Algorithm,
    pub(super) decoding: DecodingKey,
    apps: Vec<AppId>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .field("algorithm", &self.algorithm)
            .finish_non_exhaustive()
    }
}

impl Key {
    /// `at`: its place in `auth.keys`.
    pub(super) fn from_config(at: usize, config: &KeyConfig) -> Result<Self, String> {
        let fail = |problem: String| format!("auth.keys[{at}]{problem}");
        let (algorithm, decoding) = decoding(config).map_err(fail)?;
        let id = (!config.id.is_empty()).then(|| config.id.clone());
        let apps = apps(&config.apps).map_err(|problem| fail(format!(".apps: {problem}")))?;
        Ok(Self { id, algorithm, decoding, apps })
    }

    /// A key of a key set; `None` if it is of another type or use. Symmetric keys are ignored, because a key set is
    /// public.
    pub(super) fn from_jwk(jwk: &Jwk, apps: &[AppId]) -> Option<Self> {
        if matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption)) {
            return None;
        }
        let algorithm = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => Algorithm::RS256,
            AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
                Algorithm::ES256
            }
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
                Algorithm::EdDSA
            }
            _ => return None,
        };
        let named = match jwk.common.key_algorithm {
            None => Some(algorithm),
            Some(KeyAlgorithm::RS256) => Some(Algorithm::RS256),
            Some(KeyAlgorithm::ES256) => Some(Algorithm::ES256),
            Some(KeyAlgorithm::EdDSA) => Some(Algorithm::EdDSA),
            Some(_) => None,
        };
        Some(Self {
            id: jwk.common.key_id.clone(),
            algorithm: named.filter(|named| *named == algorithm)?,
            decoding: DecodingKey::from_jwk(jwk).ok()?,
            apps: apps.to_vec(),
        })
    }

    /// The key of a set that may have signed a token with this algorithm and key id: the one with this id, or, if the
    /// token or the key has none, the only one of the algorithm. Others are not tried: a set may have many keys, and a
    /// signature costs some 50 µs.
    pub(super) fn of_set<'a>(
        set: &'a [Self],
        algorithm: Algorithm,
        id: Option<&str>,
    ) -> Option<&'a Self> {
        let mut of_algorithm = set.iter().filter(|key| key.algorithm == algorithm);
        let named = |key: &&Self| id.is_some() && key.id.as_deref() == id;
        of_algorithm.clone().find(named).or_else(|| {
            let only = of_algorithm.next().filter(|_| of_algorithm.next().is_none())?;
            only.fits(algorithm, id).then_some(only)
        })
    }

    /// Whether this key may have signed a token with this algorithm and key id. The id is compared if both have one.
    pub(super) fn fits(&self, algorithm: Algorithm, id: Option<&str>) -> bool {
        let same_id = match (&self.id, id) {
            (Some(mine), Some(named)) => mine == named,
            _ => true,
        };
        same_id && self.algorithm == algorithm
    }

    pub(super) fn speaks_for(&self, app: &AppId) -> bool {
        self.apps.is_empty() || self.apps.contains(app)
    }
}

pub(super) fn apps(names: &[String]) -> Result<Vec<AppId>, String> {
    names.iter().map(|name| AppId::new(name).map_err(|error| error.to_string())).collect()
}

/// Errors begin with the key below that of the entry.
fn decoding(config: &KeyConfig) -> Result<(Algorithm, DecodingKey), String> {
    if config.algorithm == KeyAlgorithmName::HS256 {
        return Ok((Algorithm::HS256, DecodingKey::from_secret(&secret(config)?)));
    }
    let Some(path) = &config.public_key_file else {
        return Err(format!(": {:?} needs public_key_file", config.algorithm));
    };
    let fail = |problem: &str| format!(".public_key_file {}: {problem}", shown_path(path));
    let pem = files::read(path).map_err(|error| fail(&error.to_string()))?;
    if pem.windows(PRIVATE.len()).any(|part| part == PRIVATE) {
        return Err(fail("it is a private key; write its public key: openssl pkey -pubout"));
    }
    let (algorithm, key) = match config.algorithm {
        KeyAlgorithmName::RS256 => (Algorithm::RS256, DecodingKey::from_rsa_pem(&pem)),
        KeyAlgorithmName::ES256 => (Algorithm::ES256, DecodingKey::from_ec_pem(&pem)),
        _ => (Algorithm::EdDSA, DecodingKey::from_ed_pem(&pem)),
    };
    let key = key.map_err(|error| {
        fail(&format!("it is not a {:?} public key in PEM: {error}", config.algorithm))
    })?;
    Ok((algorithm, key))
}

fn secret(config: &KeyConfig) -> Result<Vec<u8>, String> {
    let secret = match (&config.secret, &config.secret_file) {
        (secret, None) if !secret.is_empty() => Secret::expose(secret).as_bytes().to_vec(),
        (secret, Some(path)) if secret.is_empty() => read_secret(path)?,
        _ => return Err(": HS256 needs either secret or secret_file".into()),
    };
    if secret.len() < SECRET_BYTES_MIN {
        return Err(format!(
            ": the secret has {} bytes, at least {SECRET_BYTES_MIN} are needed",
            secret.len()
        ));
    }
    Ok(secret)
}

fn read_secret(path: &Path) -> Result<Vec<u8>, String> {
    let read = files::read(path).map_err(|error| {
        // The secret itself may have been written there.
        let is_path = path.to_str().is_some_and(is_path);
        let hint = if is_path { "" } else { "; a secret itself belongs in secret" };
        format!(".secret_file {}: {error}{hint}", shown_path(path))
    });
    Ok(read?.trim_ascii().to_vec())
}
