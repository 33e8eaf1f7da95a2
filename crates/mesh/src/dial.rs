//! Connections to other roles.

use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
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
                    connector.connect(peer.server_name(), stream).await.map(TokioIo::new)
                }
            });
            endpoint.connect_with_connector(connect).await
        }
    };
    connected.map_err(|error| describe(&error))
}

/// The error with its sources: tonic's own text is only "transport error".
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
