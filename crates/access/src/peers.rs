//! Other access nodes: a session that a newer one on this node replaced is closed where it is, as
//! far as that can be done at once. What is missed is found by that session's next confirmation.

use std::sync::Arc;
use std::time::Duration;

use barid_core::{DeviceId, SessionRef};
use barid_mailbox::{NodeRecord, NodeTable, UserKey};
use barid_wire::internal::CloseRequest;
use barid_wire::internal::access_peer_client::AccessPeerClient;
use tokio::sync::Semaphore;
use tonic::transport::Endpoint;

/// Calls at once.
const CALLS_MAX: usize = 256;
/// For one call, connection included.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Tries to close one session, and the wait between them: longer than the table needs to learn of a node.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// The way to other nodes. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    nodes: NodeTable,
    calls: Arc<Semaphore>,
}

impl Peers {
    /// Finds nodes by their leases.
    pub fn new(nodes: NodeTable) -> Self {
        Self { nodes, calls: Arc::new(Semaphore::new(CALLS_MAX)) }
    }

    /// The access nodes that have a lease, this one among them.
    pub fn snapshot(&self) -> Arc<Vec<NodeRecord>> {
        self.nodes.snapshot()
    }

    /// Asks the node that holds `session` to close it, a few times if need be: a node that started
    /// just now is not in the table yet. Does not wait, and may fail silently.
    pub fn close(&self, user: &UserKey, device: &DeviceId, session: SessionRef) {
        let Ok(permit) = Arc::clone(&self.calls).try_acquire_owned() else { return };
        let request = CloseRequest {
            app: user.app.to_string(),
            user: user.user.to_string(),
            device: device.to_string(),
            connection: session.connection.0,
            incarnation: session.incarnation.0,
        };
        let nodes = self.nodes.clone();
        tokio::spawn(async move {
            let _permit = permit;
            for _ in 0..TRIES {
                match try_close(&nodes, &session, &request).await {
                    Ok(()) => return,
                    Err(error) => {
                        tracing::debug!(%session, error, "replaced session not closed on its node");
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
}

async fn try_close(
    nodes: &NodeTable,
    session: &SessionRef,
    request: &CloseRequest,
) -> Result<(), String> {
    let address = match nodes.snapshot().iter().find(|node| node.id == session.node) {
        // In another life of the process the session may live on; the node knows.
        Some(node) if node.incarnation >= session.incarnation => node.address.clone(),
        _ => return Err("the node is not in the table".into()),
    };
    call(&address, request.clone()).await
}

async fn call(address: &str, request: CloseRequest) -> Result<(), String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| error.to_string())?
        .connect_timeout(TIMEOUT)
        .timeout(TIMEOUT);
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    let mut client = AccessPeerClient::new(channel);
    client.close(request).await.map(|_| ()).map_err(|status| status.code().to_string())
}
