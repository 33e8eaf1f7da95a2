//! `/v1/nodes`: the nodes that a device should connect to.

use percent_encoding::percent_decode_str;
use tokio_tungstenite::tungstenite::http::Method;
use tokio_tungstenite::tungstenite::http::header::ORIGIN;

use super::{check_origin, verify};
use crate::admission::Evicted;
use crate::http::{self, Answer, Ended, Request};
use crate::labels::Handshake;
use crate::node::Node;
use crate::offer::offer;

/// The path of the request.
pub(super) const PATH: &str = "/v1/nodes";
/// Methods and headers that a page may send to `/v1/nodes`, for its browser's preflight (WHATWG Fetch).
const PREFLIGHT_HEADERS: &str = "Access-Control-Allow-Methods: GET\r\n\
    Access-Control-Allow-Headers: Authorization\r\nAccess-Control-Max-Age: 600\r\n";

/// Answers with the nodes that a device should connect to. Any valid token is accepted.
pub(super) async fn answer(
    node: &Node,
    request: &Request,
    evicted: &mut Evicted,
) -> Result<Answer, Ended> {
    check_origin(&node.policy, request)?;
    // A page of an allowed origin may read the answer, whatever it is.
    let origin = request.headers().get(ORIGIN).and_then(|origin| origin.to_str().ok());
    let allow = origin.map(|origin| format!("Access-Control-Allow-Origin: {origin}\r\n"));
    let headers = format!("Vary: Origin\r\n{}", allow.unwrap_or_default());
    if request.method() == Method::OPTIONS {
        let headers = format!("{headers}{PREFLIGHT_HEADERS}");
        return Ok(Answer::empty(Handshake::Preflight, headers));
    }
    let verified = verify(node, request, &http::protocols(request), evicted).await;
    verified.map_err(|ended| match ended {
        Ended::Answered(answer) => Ended::Answered(answer.with_headers(&headers)),
        Ended::Gone => Ended::Gone,
    })?;
    let zone = http::query(request, "zone").map_or_else(
        || node.zone.clone(),
        |zone| percent_decode_str(zone).decode_utf8_lossy().into_owned(),
    );
    let nodes = node.peers.snapshot();
    let text = serde_json::to_string(&offer(&nodes, &zone)).unwrap_or_default();
    let headers = format!("Cache-Control: no-store\r\n{headers}");
    Ok(Answer::json(Handshake::Nodes, text, headers))
}
