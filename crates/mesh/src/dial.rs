//! Connections to other roles.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use barid_runtime::words;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Status;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::{Credentials, Party};

/// Opens a connection to `address` (`host:port`) and checks that its certificate names `peer`, if this process has
/// credentials. Connecting and the TLS handshake take at most `limit`. `settings` adds to the endpoint.
///
/// # Errors
/// Returns why, with all causes.
pub async fn dial(
    credentials: &Credentials,
    peer: Party,
    address: &str,
    limit: Duration,
    settings: impl FnOnce(Endpoint) -> Endpoint,
) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| format!("address {address:?}: {error}"))?
        .connect_timeout(limit)
        .tcp_nodelay(true);
    let endpoint = settings(endpoint);
    let connected = match credentials.client() {
        None => endpoint.connect().await,
        Some(config) => {
            let (connector, address) = (TlsConnector::from(config), Arc::<str>::from(address));
            let connect = service_fn(move |_: Uri| {
                let (connector, address) = (connector.clone(), Arc::clone(&address));
                async move {
                    let stream = TcpStream::connect(&*address).await?;
                    stream.set_nodelay(true)?;
                    let stream = connector.connect(peer.server_name(), stream).await?;
                    check(&stream, peer)?;
                    std::io::Result::Ok(TokioIo::new(stream))
                }
            });
            endpoint.connect_with_connector(connect).await
        }
    };
    // tonic's own text is only "transport error".
    connected.map_err(|error| words::causes(&error))
}

/// Checks that the certificate names the peer in full. TLS has verified it, and would accept a wildcard.
fn check(stream: &TlsStream<TcpStream>, peer: Party) -> std::io::Result<()> {
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    if certificate.is_some_and(|certificate| Party::named_by(certificate).contains(&peer)) {
        return Ok(());
    }
    let name = peer.dns_name();
    Err(std::io::Error::other(format!(
        "the certificate does not name {name}; wildcards do not count"
    )))
}

/// A call's failure in words: the peer's message with its code, or the causes if the connection failed.
pub(crate) fn reason(status: &Status) -> String {
    match (status.source(), status.message()) {
        (Some(source), _) => words::causes(source),
        (None, "") => status.code().description().to_owned(),
        (None, message) => format!("{message} ({})", status.code().description()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_137_the_failure_of_a_call_is_told_in_words() {
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert_eq!(reason(&Status::from_error(Box::new(broken))), "broken pipe");
        let denied = Status::permission_denied("your certificate is for access");
        let told = "your certificate is for access (The caller does not have permission to execute the specified operation)";
        assert_eq!(reason(&denied), told);
    }
}
