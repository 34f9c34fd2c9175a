//! TLS: the certificate and its key are reloaded when their files change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{error, info};

/// The files of the certificate and its key.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_TLS_CERTIFICATE_FILE`: PEM; the server certificate first, then the intermediate certificates.
    pub certificate_file: PathBuf,
    /// `LFS_BROKER_TLS_KEY_FILE`: PEM.
    pub key_file: PathBuf,
    /// How often the files are checked. Certificates are usually renewed days before they expire.
    pub check_interval: Duration,
}

impl Settings {
    /// These two files, checked every five seconds.
    pub fn new(certificate_file: impl Into<PathBuf>, key_file: impl Into<PathBuf>) -> Self {
        Self { certificate_file: certificate_file.into(), key_file: key_file.into(), check_interval: Duration::from_secs(5) }
    }
}

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {0}: {1}")]
    File(PathBuf, std::io::Error),
    /// A file does not hold the expected PEM.
    #[error("{0} does not hold a {1} in PEM format: {2}")]
    Pem(PathBuf, &'static str, rustls::pki_types::pem::Error),
    /// The certificate file is empty.
    #[error("{0} has no certificate")]
    NoCertificate(PathBuf),
    /// The key does not match the certificate, or its type is not supported.
    #[error("the certificate and the key cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
}

/// The contents of both files.
#[derive(PartialEq, Eq)]
struct Files {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Files {
    fn read(settings: &Settings) -> Result<Self, Error> {
        let read = |path: &Path| std::fs::read(path).map_err(|error| Error::File(path.to_owned(), error));
        Ok(Self { certificate: read(&settings.certificate_file)?, key: read(&settings.key_file)? })
    }

    fn certified_key(&self, settings: &Settings) -> Result<CertifiedKey, Error> {
        let (certificate_file, key_file) = (settings.certificate_file.clone(), settings.key_file.clone());
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.certificate).collect();
        let chain = chain.map_err(|error| Error::Pem(certificate_file.clone(), "certificate", error))?;
        if chain.is_empty() {
            return Err(Error::NoCertificate(certificate_file));
        }
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| Error::Pem(key_file, "private key", error))?;
        Ok(CertifiedKey::from_der(chain, key, &default_provider())?)
    }
}

/// The certificate that new connections get.
#[derive(Debug)]
struct CurrentCertificate(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for CurrentCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Accepts TLS connections.
#[derive(Clone)]
pub(crate) struct Tls {
    acceptor: TlsAcceptor,
    current: Arc<CurrentCertificate>,
    files: Arc<Files>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// If they cannot be used.
    pub(crate) fn open(settings: &Settings) -> Result<Self, Error> {
        let files = Files::read(settings)?;
        let current = Arc::new(CurrentCertificate(RwLock::new(Arc::new(files.certified_key(settings)?))));
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), current, files: Arc::new(files) })
    }

    pub(super) async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.acceptor.accept(stream).await
    }

    /// Uses a new certificate and key as soon as both files match. Until then the old ones stay in use, and the log says why.
    pub(crate) async fn reload_on_change(self, settings: Settings) {
        let mut known = self.files;
        loop {
            tokio::time::sleep(settings.check_interval).await;
            let found = match Files::read(&settings) {
                Ok(found) if found == *known => continue,
                Ok(found) => found,
                Err(error) => {
                    // The files may be in the middle of a replacement. Each failure is logged.
                    error!(%error, "the certificate cannot be reloaded, so the old one stays in use: {error}");
                    continue;
                }
            };
            match found.certified_key(&settings) {
                Ok(renewed) => {
                    *self.current.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(renewed);
                    info!("the certificate was reloaded");
                }
                Err(error) => error!(%error, "the certificate cannot be reloaded, so the old one stays in use: {error}"),
            }
            known = Arc::new(found);
        }
    }
}
