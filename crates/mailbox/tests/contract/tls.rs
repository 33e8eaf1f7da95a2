//! `rediss://`: trusted authorities and client certificates.

use std::path::PathBuf;
use std::time::Duration;

use barid_mailbox::{Mailbox, NodeRole, NodeTable, RedisConfig, TrackedRoutes};
use barid_runtime::SecretUrl;
use barid_testkit::Redis;
use barid_testkit::certificates::{Authority, Issued};
use barid_testkit::ports::free_port;
use barid_testkit::redis::RedisOptions;

/// A redis-server that also listens with TLS, and the files of its authority.
struct Tls {
    redis: Redis,
    authority: Authority,
    dir: tempfile::TempDir,
    port: u16,
}

impl Tls {
    async fn start(more: &[(&str, &str)]) -> Self {
        let authority = Authority::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let Issued { pem, key } = authority.issue().unwrap();
        let port = free_port();
        let mut settings = vec![("tls-port".to_owned(), port.to_string())];
        for (name, setting, text) in [
            ("ca.pem", "tls-ca-cert-file", authority.pem()),
            ("server.pem", "tls-cert-file", pem),
            ("server.key", "tls-key-file", key),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            settings.push((setting.to_owned(), path.display().to_string()));
        }
        settings.extend(more.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        let options = RedisOptions { settings, ..Default::default() };
        let redis = Redis::start_with(options).await.expect("redis-server has TLS");
        Self { redis, authority, dir, port }
    }

    fn file(&self, name: &str, text: &str) -> Option<PathBuf> {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    }

    fn config(&self, ca: Option<PathBuf>, client: Option<&Issued>) -> RedisConfig {
        RedisConfig {
            url: SecretUrl::new(format!("rediss://127.0.0.1:{}", self.port)),
            ca_file: ca,
            certificate_file: client.and_then(|issued| self.file("client.pem", &issued.pem)),
            key_file: client.and_then(|issued| self.file("client.key", &issued.key)),
            ..Default::default()
        }
    }

    fn ca(&self) -> Option<PathBuf> {
        Some(self.dir.path().join("ca.pem"))
    }
}

async fn open(config: &RedisConfig) -> Result<Mailbox, String> {
    let opened = Mailbox::open(config, &prometheus::Registry::new()).await;
    opened.map_err(|error| error.to_string())
}

async fn eventually(what: &str, check: impl AsyncFn() -> bool) {
    let began = std::time::Instant::now();
    while !check().await {
        assert!(began.elapsed() < Duration::from_secs(60), "not yet: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Every kind of connection that Barid has: calls, the tracked one, the subscriber.
async fn works(tls: &Tls, config: &RedisConfig) {
    let mailbox = open(config).await.unwrap();
    mailbox.nodes().await.unwrap();
    let _table = NodeTable::watch(&mailbox, NodeRole::Access, Duration::from_secs(60));
    let routes = TrackedRoutes::open(config).await.unwrap();
    eventually("routes are tracked", async || *routes.tracking().borrow()).await;
    eventually("the subscriber is there", async || {
        let channels: Vec<String> = tls.redis.query(&["PUBSUB", "CHANNELS"]).await.unwrap();
        !channels.is_empty()
    })
    .await;
}

#[tokio::test]
async fn hazard_60_redis_with_an_authority_of_its_own_is_trusted_where_it_is_named() {
    let tls = Tls::start(&[("tls-auth-clients", "no")]).await;
    works(&tls, &tls.config(tls.ca(), None)).await;
    // And only there.
    let unknown = open(&tls.config(None, None)).await.err().expect("nobody vouches for it");
    assert!(unknown.contains("certificate"), "{unknown}");
    let other = tls.file("other.pem", &Authority::new().unwrap().pem());
    let other = open(&tls.config(other, None)).await.err().expect("another authority");
    assert!(other.contains("certificate"), "{other}");
}

#[tokio::test]
async fn hazard_60_redis_that_wants_to_know_its_clients_is_shown_a_certificate() {
    let tls = Tls::start(&[("tls-auth-clients", "yes")]).await;
    let nobody = open(&tls.config(tls.ca(), None)).await;
    assert!(nobody.is_err(), "a client without a certificate is let in");
    let client = tls.authority.issue().unwrap();
    works(&tls, &tls.config(tls.ca(), Some(&client))).await;
}

#[tokio::test]
async fn hazard_60_the_masters_of_a_cluster_are_trusted_likewise() {
    let bus = free_port().to_string();
    let tls = Tls::start(&[
        ("tls-auth-clients", "yes"),
        ("cluster-enabled", "yes"),
        ("tls-cluster", "yes"),
        ("cluster-port", &bus),
        ("cluster-announce-ip", "127.0.0.1"),
    ])
    .await;
    let _: String = tls.redis.query(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await.unwrap();
    eventually("the cluster is ready", async || {
        let info: String = tls.redis.query(&["CLUSTER", "INFO"]).await.unwrap();
        info.contains("cluster_state:ok")
    })
    .await;
    let client = tls.authority.issue().unwrap();
    works(&tls, &RedisConfig { cluster: true, ..tls.config(tls.ca(), Some(&client)) }).await;
}

#[test]
fn hazard_60_files_that_are_no_certificates_are_named_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    };
    let authority = Authority::new().unwrap();
    let (ca, issued) = (file("ca.pem", &authority.pem()), authority.issue().unwrap());
    let other = authority.issue().unwrap();
    let certificate_file = file("client.pem", &issued.pem);
    let tls = RedisConfig { url: SecretUrl::new("rediss://h:1"), ..Default::default() };
    let error = |config: RedisConfig| config.check().unwrap_err();
    let whole = RedisConfig { ca_file: ca.clone(), ..tls.clone() };
    assert_eq!(whole.check(), Ok(()));
    let absent = RedisConfig { ca_file: Some("/nowhere/ca.pem".into()), ..tls.clone() };
    assert!(error(absent).starts_with("redis.ca_file /nowhere/ca.pem: No such file"));
    let empty = RedisConfig { ca_file: file("empty.pem", "nothing"), ..tls.clone() };
    assert_eq!(error(empty), "redis.ca_file holds no certificate");
    let alone = RedisConfig { certificate_file: certificate_file.clone(), ..whole.clone() };
    assert_eq!(error(alone), "redis.certificate_file and redis.key_file belong together");
    let key_file = file("other.key", &other.key);
    let foreign =
        RedisConfig { certificate_file: certificate_file.clone(), key_file, ..whole.clone() };
    assert!(error(foreign).starts_with("redis.certificate_file and redis.key_file: "));
    let key_file = file("client.key", "no key");
    let keyless = RedisConfig { certificate_file, key_file, ..whole };
    assert!(error(keyless).starts_with("redis.key_file holds no private key"));
    let plain = RedisConfig { ca_file: ca, ..Default::default() };
    assert!(error(plain).starts_with("redis.url redis://127.0.0.1:6379 is not encrypted"));
}
