//! Self-signed certificates for 127.0.0.1, good until 2130, and their keys. They prove nothing: the keys are
//! public.

/// A certificate and its key, PEM.
#[derive(Debug, Clone, Copy)]
pub struct Certificate {
    /// To be trusted, and served.
    pub pem: &'static str,
    /// To be served with.
    pub key: &'static str,
}

/// One.
pub const ONE: Certificate = Certificate {
    pem: include_str!("../certificates/one.pem"),
    key: include_str!("../certificates/one.key"),
};

/// Another.
pub const TWO: Certificate = Certificate {
    pem: include_str!("../certificates/two.pem"),
    key: include_str!("../certificates/two.key"),
};
