//! TLS: a certificate and its key, read again when their files change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{error, info};

/// Where the certificate is.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_TLS_CERTIFICATE_FILE`: PEM, the broker's own first, then those between it and the root.
    pub certificate_file: PathBuf,
    /// `LFS_BROKER_TLS_KEY_FILE`: PEM.
    pub key_file: PathBuf,
    /// How often the files are looked at: whoever renews them does it days before the old one ends.
    pub look_every: Duration,
}

impl Settings {
    /// These two files, looked at every five seconds.
    pub fn new(certificate_file: impl Into<PathBuf>, key_file: impl Into<PathBuf>) -> Self {
        Self { certificate_file: certificate_file.into(), key_file: key_file.into(), look_every: Duration::from_secs(5) }
    }
}

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is not there.
    #[error("cannot read {0}: {1}")]
    File(PathBuf, std::io::Error),
    /// A file is not what it should be.
    #[error("{0} is not PEM of a {1}: {2}")]
    Pem(PathBuf, &'static str, rustls::pki_types::pem::Error),
    /// There is nothing to show.
    #[error("{0} has no certificate")]
    Empty(PathBuf),
    /// They do not belong together, or are of a kind that is not known.
    #[error("the certificate and the key cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
}

/// The two files as they were read.
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

    fn pair(&self, settings: &Settings) -> Result<CertifiedKey, Error> {
        let (certificate_file, key_file) = (settings.certificate_file.clone(), settings.key_file.clone());
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.certificate).collect();
        let chain = chain.map_err(|error| Error::Pem(certificate_file.clone(), "certificate", error))?;
        if chain.is_empty() {
            return Err(Error::Empty(certificate_file));
        }
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| Error::Pem(key_file, "private key", error))?;
        Ok(CertifiedKey::from_der(chain, key, &default_provider())?)
    }
}

/// What is shown to clients at this moment.
#[derive(Debug)]
struct Shown(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Takes TLS off a connection.
#[derive(Clone)]
pub(crate) struct Tls {
    acceptor: TlsAcceptor,
    shown: Arc<Shown>,
    seen: Arc<Files>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// When they cannot be used.
    pub(crate) fn open(settings: &Settings) -> Result<Self, Error> {
        let files = Files::read(settings)?;
        let shown = Arc::new(Shown(RwLock::new(Arc::new(files.pair(settings)?))));
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&shown) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), shown, seen: Arc::new(files) })
    }

    pub(super) async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.acceptor.accept(stream).await
    }

    /// Shows a new pair as soon as its files make one; until then the old one is shown, and the log says why.
    pub(crate) async fn keep_current(self, settings: Settings, mut stopped: watch::Receiver<bool>) {
        let mut seen = self.seen;
        loop {
            tokio::select! {
                () = tokio::time::sleep(settings.look_every) => {}
                _ = stopped.wait_for(|stopped| *stopped) => return,
            }
            let found = match Files::read(&settings) {
                Ok(found) if found == *seen => continue,
                Ok(found) => found,
                Err(error) => {
                    // They may be between two names; each failure is another line.
                    error!(%error, "keeping the old certificate: {error}");
                    continue;
                }
            };
            match found.pair(&settings) {
                Ok(pair) => {
                    *self.shown.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(pair);
                    info!("the certificate was renewed");
                }
                Err(error) => error!(%error, "keeping the old certificate: {error}"),
            }
            seen = Arc::new(found);
        }
    }
}
