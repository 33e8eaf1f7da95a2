//! Choice of the node to connect to: the server is asked for the least loaded nodes.

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use rand::seq::IndexedRandom as _;
use serde::Deserialize;
use tokio_tungstenite::tungstenite::http::Uri;
use ureq::tls::RootCerts;

use crate::settings::{Settings, address};
use crate::token::Token;
use crate::trust::Trust;

/// Bound of an answer, bytes.
const BYTES_MAX: u64 = 64 << 10;
/// Bound of the request. After it, the configured address is used.
const LIMIT: Duration = Duration::from_secs(3);

#[derive(Debug, Deserialize)]
struct Offer {
    zone: String,
    nodes: Vec<Offered>,
}

#[derive(Debug, Deserialize)]
struct Offered {
    url: String,
    zone: String,
    load: u64,
}

/// One of the least loaded nodes of `zone`, according to the configured server; that server if it does not answer.
/// `avoid` is a node that was unreachable a moment ago.
pub(crate) async fn choose(
    settings: &Settings,
    zone: &str,
    token: &Token,
    avoid: Option<&Uri>,
) -> Uri {
    let seed = &settings.uri;
    let Some(url) = nodes_url(seed, zone) else { return seed.clone() };
    let bearer = format!("Bearer {}", token.expose());
    let roots = settings.trust.as_ref().map_or(RootCerts::WebPki, Trust::roots);
    let asked = tokio::task::spawn_blocking(move || ask(&url, &bearer, roots)).await;
    let offer = match asked.map_err(|error| error.to_string()).and_then(|asked| asked) {
        Ok(offer) => offer,
        Err(error) => {
            tracing::debug!(error, "cannot get the least loaded nodes");
            return seed.clone();
        }
    };
    pick(&offer, seed, avoid).unwrap_or_else(|| seed.clone())
}

/// Chooses one of the offered nodes at random; less loaded nodes are more likely. The loads are some seconds old, and
/// devices that connect at the same time should not all choose the same node.
fn pick(offer: &Offer, seed: &Uri, avoid: Option<&Uri>) -> Option<Uri> {
    let offered = offer.nodes.iter().filter_map(|node| {
        let uri = address(&node.url).ok()?;
        // An answer must not make the client send its token in plaintext.
        let safe = uri.scheme() == seed.scheme() || uri.scheme_str() == Some("wss");
        (safe && Some(&uri) != avoid).then_some((node, uri))
    });
    let (near, far): (Vec<_>, Vec<_>) = offered.partition(|(node, _)| node.zone == offer.zone);
    let nodes = if near.is_empty() { far } else { near };
    let weight = |(node, _): &(&Offered, Uri)| 1.0 / (node.load as f64 + 1.0);
    nodes.choose_weighted(&mut rand::rng(), weight).ok().map(|(_, uri)| uri.clone())
}

/// Turns `ws://HOST/…` into `http://HOST/v1/nodes?zone=…`.
fn nodes_url(seed: &Uri, zone: &str) -> Option<String> {
    let scheme = if seed.scheme_str()? == "wss" { "https" } else { "http" };
    let mut url = format!("{scheme}://{}/v1/nodes", seed.authority()?);
    if !zone.is_empty() {
        url.push_str("?zone=");
        for byte in zone.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    url.push(byte.into());
                }
                other => url.push_str(&format!("%{other:02X}")),
            }
        }
    }
    Some(url)
}

fn ask(url: &str, bearer: &str, roots: RootCerts) -> Result<Offer, String> {
    let tls = ureq::tls::TlsConfig::builder()
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .root_certs(roots)
        .build();
    let agent = ureq::Agent::new_with_config(
        ureq::Agent::config_builder().tls_config(tls).timeout_global(Some(LIMIT)).build(),
    );
    let response =
        agent.get(url).header("authorization", bearer).call().map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    let mut body = response.into_body();
    body.as_reader().take(BYTES_MAX).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    serde_json::from_slice(&bytes).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_goes_where_the_device_would_go() {
        let url = |seed: &str, zone| nodes_url(&seed.parse().unwrap(), zone);
        let plain = "http://h:7080/v1/nodes";
        assert_eq!(url("ws://h:7080/v1/connect?x=y", "").as_deref(), Some(plain));
        let secure = "https://h/v1/nodes?zone=eu%201%26";
        assert_eq!(url("wss://h/v1/connect", "eu 1&").as_deref(), Some(secure));
    }

    #[test]
    fn fewer_devices_draw_more_and_neither_zone_nor_tls_is_left() {
        let node =
            |url: &str, zone: &str, load| Offered { url: url.into(), zone: zone.into(), load };
        let offer = Offer {
            zone: "a".into(),
            nodes: vec![
                node("wss://full", "a", 99),
                node("wss://empty", "a", 9),
                node("wss://far", "b", 0),
                node("ws://plain", "a", 0),
                node("nonsense", "a", 0),
            ],
        };
        let seed: Uri = "wss://seed/v1/connect".parse().unwrap();
        let empty: Uri = "wss://empty/v1/connect".parse().unwrap();
        let picked: Vec<_> = (0..2000).filter_map(|_| pick(&offer, &seed, None)).collect();
        let empties = picked.iter().filter(|uri| **uri == empty).count();
        // Ten to one, and never another.
        assert!((1700..1950).contains(&empties), "{empties}");
        assert!(picked.iter().all(|uri| *uri == empty || uri.host() == Some("full")));
        let other = pick(&offer, &seed, Some(&empty));
        assert_eq!(other.as_ref().and_then(|uri| uri.host()), Some("full"));
        let nothing = Offer { zone: String::new(), nodes: Vec::new() };
        assert_eq!(pick(&nothing, &seed, None), None);
    }
}
