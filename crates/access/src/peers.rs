//! Other access nodes. When a session replaces one on another node, that node is asked to close the old session. This
//! is best-effort: an old session that is missed closes at its next confirmation.

use std::sync::Arc;
use std::time::Duration;

use barid_core::{DeviceId, SessionRef};
use barid_mailbox::{NodeRecord, NodeTable, UserKey};
use barid_mesh::{Credentials, Party, dial};
use barid_wire::internal::CloseRequest;
use barid_wire::internal::access_peer_client::AccessPeerClient;
use tokio::sync::Semaphore;
use tonic::transport::Endpoint;

/// Concurrent calls.
const CALLS_MAX: usize = 256;
/// Bound of one call, connecting included.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Attempts to close one session, and the wait between two: together longer than the node table takes to learn of a
/// node.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// Calls to other nodes. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    nodes: NodeTable,
    credentials: Credentials,
    calls: Arc<Semaphore>,
}

impl Peers {
    /// Creates the calls to the nodes of a table.
    pub fn new(nodes: NodeTable, credentials: Credentials) -> Self {
        Self { nodes, credentials, calls: Arc::new(Semaphore::new(CALLS_MAX)) }
    }

    /// The access nodes that hold a lease, this one included.
    pub fn snapshot(&self) -> Arc<Vec<NodeRecord>> {
        self.nodes.snapshot()
    }

    /// Asks the node of `session` to close it, in a task of its own. It is tried a few times, because a node that has
    /// just started is not in the table yet. Failures are only logged. Returns false if too many calls are in
    /// progress; then the node is not asked.
    #[must_use]
    pub fn close(&self, user: &UserKey, device: &DeviceId, session: SessionRef) -> bool {
        let Ok(permit) = Arc::clone(&self.calls).try_acquire_owned() else { return false };
        let request = CloseRequest {
            app: user.app.to_string(),
            user: user.user.to_string(),
            device: device.to_string(),
            connection: session.connection.0,
            incarnation: session.incarnation.0,
        };
        let (nodes, credentials) = (self.nodes.clone(), self.credentials.clone());
        tokio::spawn(async move {
            let _permit = permit;
            for _ in 0..TRIES {
                match try_close(&nodes, &credentials, &session, &request).await {
                    Ok(()) => return,
                    Err(error) => {
                        tracing::debug!(%session, error, "cannot close the replaced session on its node");
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        true
    }
}

async fn try_close(
    nodes: &NodeTable,
    credentials: &Credentials,
    session: &SessionRef,
    request: &CloseRequest,
) -> Result<(), String> {
    let address = match nodes.snapshot().iter().find(|node| node.id == session.node) {
        // The incarnation is not compared: the session may live on under a later one of the same process.
        Some(node) if node.incarnation >= session.incarnation => node.address.clone(),
        _ => return Err("the node is not in the table".into()),
    };
    let settings = |endpoint: Endpoint| endpoint.timeout(TIMEOUT);
    let channel = dial(credentials, Party::Access, &address, TIMEOUT, settings).await?;
    let mut client = AccessPeerClient::new(channel);
    client.close(request.clone()).await.map(|_| ()).map_err(|status| status.code().to_string())
}
