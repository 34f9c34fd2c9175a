//! TLS: the broker serves its own certificate and reloads it while it runs.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lfs_broker::http::tls::Settings;
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::harness::{TestBroker, sha256};

/// Longer than any of these tests.
const LONG: Duration = Duration::from_secs(120);

/// A root certificate and its signing key.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: rcgen::Certificate,
}

impl Authority {
    fn new() -> Self {
        let (key, mut root) = (KeyPair::generate().unwrap(), CertificateParams::new(Vec::new()).unwrap());
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Self { root: root.self_signed(&key).unwrap(), issuer: Issuer::new(root, key) }
    }

    /// Writes a certificate for 127.0.0.1 and its key into a directory, and returns the certificate.
    fn write(&self, directory: &Path) -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        std::fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();
        std::fs::write(directory.join("certificate.pem"), certificate.pem()).unwrap();
        certificate.der().to_vec()
    }

    async fn connect(&self, broker: &TestBroker, protocols: &[&[u8]]) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        let stream = broker.connect().await.0;
        TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("127.0.0.1").unwrap(), stream).await
    }

    /// The certificate that the broker serves.
    async fn served_certificate(&self, broker: &TestBroker) -> Vec<u8> {
        let stream = self.connect(broker, &[]).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    }
}

async fn start_with_tls(directory: &Path, header_timeout: Duration) -> TestBroker {
    TestBroker::start_with(|settings| {
        let files = Settings::new(directory.join("certificate.pem"), directory.join("key.pem"));
        settings.http.tls = Some(Settings { check_interval: Duration::from_millis(50), ..files });
        settings.http.header_timeout = header_timeout;
    })
    .await
}

#[tokio::test]
async fn the_broker_serves_http_1_1_over_tls() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    authority.write(directory.path());
    let broker = start_with_tls(directory.path(), LONG).await;
    let url = broker.url().replace("http://", "https://");
    let root = reqwest::Certificate::from_der(authority.root.der()).unwrap();
    let client = reqwest::Client::builder().tls_certs_only([root]).build().unwrap();
    let opened = client.post(format!("{url}/lfs/uploads"));
    let opened = opened.json(&json!({"topic": broker.topic, "size": 1, "sha256": sha256(b"x")})).send().await.unwrap();
    assert_eq!((opened.status().as_u16(), opened.version()), (201, reqwest::Version::HTTP_11));
    let stranger = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    assert!(stranger.get(format!("{url}/healthz")).send().await.is_err());

    // Most clients offer HTTP/2 first.
    for offered in [vec![b"h2".as_slice(), b"http/1.1"], vec![b"http/1.1"]] {
        let stream = authority.connect(&broker, &offered).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"http/1.1".as_slice()));
    }
    assert!(authority.connect(&broker, &[b"h2"]).await.is_err());

    // Limits and final responses are the same over TLS.
    let mut stream = authority.connect(&broker, &[]).await.unwrap();
    stream.write_all(&[b"GET / HTTP/1.1\r\nx: ".as_slice(), &[b'x'; 200_000]].concat()).await.unwrap();
    let mut received = String::new();
    stream.read_to_string(&mut received).await.unwrap();
    assert!(received.starts_with("HTTP/1.1 431 ") && received.contains("\"headers-too-large\""), "{received}");
}

#[tokio::test]
async fn a_client_that_does_not_speak_tls_is_disconnected() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    authority.write(directory.path());
    let broker = start_with_tls(directory.path(), Duration::from_millis(1500)).await;
    let begun = Instant::now();
    let mut silent = broker.connect().await.0;
    let mut plain = broker.connect().await.0;
    plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    for stream in [&mut plain, &mut silent] {
        let mut received = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut received)).await;
        let _ = read.expect("the broker ends the connection");
        assert!(!String::from_utf8_lossy(&received).contains("HTTP"), "{received:?}");
    }
    assert!(begun.elapsed() >= Duration::from_millis(1400), "the broker did not wait for the handshake: {:?}", begun.elapsed());
}

#[tokio::test]
async fn a_renewed_certificate_is_served_and_a_broken_one_is_not() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    let first = authority.write(directory.path());
    let broker = start_with_tls(directory.path(), LONG).await;
    assert_eq!(authority.served_certificate(&broker).await, first);
    let mut open = authority.connect(&broker, &[]).await.unwrap();

    let wait_for_certificate = async |expected: &[u8]| {
        broker
            .eventually("the new certificate is served", async || authority.served_certificate(&broker).await == expected)
            .await;
    };
    let second = authority.write(directory.path());
    wait_for_certificate(&second).await;

    let (certificate, key) = (directory.path().join("certificate.pem"), directory.path().join("key.pem"));
    let original = std::fs::read(&certificate).unwrap();
    let other_key = KeyPair::generate().unwrap().serialize_pem();
    for (path, broken) in [
        (&certificate, b"-----BEGIN CERTIFICATE-----\nbroken".to_vec()),
        (&certificate, Vec::new()),
        (&certificate, original[..original.len() / 2].to_vec()),
        (&key, b"no key".to_vec()),
        (&key, other_key.into_bytes()),
    ] {
        let before = std::fs::read(path).unwrap();
        std::fs::write(path, broken).unwrap();
        // The broker checks the files every 50 ms.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(authority.served_certificate(&broker).await, second);
        std::fs::write(path, before).unwrap();
    }
    std::fs::remove_file(&key).unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(authority.served_certificate(&broker).await, second);
    let third = authority.write(directory.path());
    wait_for_certificate(&third).await;

    // An open connection stays open.
    open.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut received = String::new();
    open.read_to_string(&mut received).await.unwrap();
    assert!(received.starts_with("HTTP/1.1 200 "), "{received}");
}

#[tokio::test]
async fn unusable_tls_files_are_named_before_the_broker_starts() {
    let (authority, directory) = (Authority::new(), tempfile::tempdir().unwrap());
    authority.write(directory.path());
    let mut settings = TestBroker::start().await.settings.clone();
    let (certificate, key) = (directory.path().join("certificate.pem"), directory.path().join("key.pem"));
    let mut check_files = |certificate: &Path, key: &Path| {
        settings.http.tls = Some(Settings::new(certificate, key));
        settings.check().err().map(|error| error.to_string())
    };
    assert_eq!(check_files(&certificate, &key), None);
    for (certificate, key, named) in [
        (directory.path().join("no.pem"), key.clone(), "no.pem"),
        (key.clone(), key.clone(), "key.pem has no certificate"),
        (certificate.clone(), certificate.clone(), "certificate.pem does not hold a private key in PEM format"),
    ] {
        let error = check_files(&certificate, &key).expect("the files are refused");
        assert!(error.contains(named), "{error}");
    }
}
