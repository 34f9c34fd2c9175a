//! The embedded S3 server of `lfs-broker dev` and of tests without external servers.
//!
//! `s3s` implements the protocol (signatures, XML, ranges). This module adds request checks before it and a small file
//! store behind it. Where the broker depends on a response, it is the one that AWS documents. Unsupported operations get
//! 501.

mod api;
mod checksum;
mod conditions;
mod content;
mod handler;
mod listing;
mod multipart;
mod objects;
mod record;
mod store;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use s3s::{S3Error, S3ErrorCode};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use api::Api;
use handler::RequestHandler;
use store::Store;

/// How long running requests may take to finish when the server stops.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may be idle. Clients usually close theirs after 90 s, so they close first.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// The address of the server, the directory of its objects, and the one credential that it accepts.
#[derive(Clone)]
pub struct Settings {
    /// The address to listen on. With port 0, any free port.
    pub listen: SocketAddr,
    /// The directory of the objects. A missing directory is created. Only one server at a time can use it.
    pub root: PathBuf,
    /// The access key id.
    pub access_key_id: String,
    /// The secret access key.
    pub secret_access_key: String,
}

impl fmt::Debug for Settings {
    /// Omits the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { listen, root, access_key_id, .. } = self;
        let mut shown = f.debug_struct("Settings");
        shown.field("listen", listen).field("root", root).field("access_key_id", access_key_id).finish_non_exhaustive()
    }
}

/// An error of the embedded S3 server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server cannot listen on the address.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Another server uses the directory.
    #[error("{} is in use by another server", .0.display())]
    InUse(PathBuf),
    /// A file or directory of the store cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A metadata file of the store is malformed.
    #[error("the metadata file {} is malformed: {source}", path.display())]
    Metadata {
        /// The metadata file.
        path: PathBuf,
        /// The parse error.
        source: serde_json::Error,
    },
    /// A metadata file refers to missing content.
    #[error("the metadata file {} refers to content that is missing or has another size", .0.display())]
    MissingContent(PathBuf),
    /// S3 does not allow this bucket name.
    #[error("{0:?} is not a valid bucket name")]
    BucketName(String),
    /// The thread of the operation ended.
    #[error("a thread of the embedded S3 server ended: {0}")]
    Interrupted(#[from] tokio::task::JoinError),
}

/// A running S3 server.
pub struct Server {
    address: SocketAddr,
    store: Arc<Store>,
    stopping: watch::Sender<bool>,
    running: JoinHandle<()>,
}

impl Server {
    /// Opens the store and serves it on the current runtime. [`Server::stop`] or dropping the server stops it.
    pub async fn start(settings: Settings) -> Result<Self, Error> {
        let Settings { listen, root, access_key_id, secret_access_key } = settings;
        let failed = |source| Error::Listen { address: listen, source };
        let store = Arc::new(tokio::task::spawn_blocking(move || Store::open(&root)).await??);
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let handler = RequestHandler::new(Api::new(Arc::clone(&store)), access_key_id, &secret_access_key);
        let (stopping, stopped) = watch::channel(false);
        let running = tokio::spawn(run(listener, handler, stopped));
        Ok(Self { address, store, stopping, running })
    }

    /// The address of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The endpoint for S3 clients.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Creates a bucket if it does not exist.
    pub async fn create_bucket(&self, name: &str) -> Result<(), Error> {
        let (store, name) = (Arc::clone(&self.store), name.to_owned());
        tokio::task::spawn_blocking(move || store.create_bucket(&name)).await??;
        Ok(())
    }

    /// Stops accepting connections, and waits up to five seconds for running requests.
    pub async fn stop(self) {
        // Without a receiver, the server has already ended.
        let _ = self.stopping.send(true);
        if let Err(error) = self.running.await {
            tracing::error!(%error, "the embedded S3 server failed");
        }
    }
}

async fn run(listener: TcpListener, handler: RequestHandler, mut stopping: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(stream, handler.clone(), stopping.clone()));
                }
                Err(error) => {
                    // Most likely no file descriptor is free. Retry after a short wait.
                    tracing::warn!(%error, "the embedded S3 server could not accept a connection, retrying in 50 ms");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            // The server is stopping, or its handle was dropped.
            _ = stopping.changed() => break,
        }
    }
    drop(listener);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(SHUTDOWN_TIMEOUT, all_closed).await.is_err() {
        connections.shutdown().await;
    }
}

async fn serve(stream: TcpStream, handler: RequestHandler, mut stopping: watch::Receiver<bool>) {
    // Responses are written at once, so Nagle's algorithm would only delay them.
    let _ = stream.set_nodelay(true);
    let service = hyper::service::service_fn(move |request| {
        let handler = handler.clone();
        async move { handler.handle(request).await }
    });
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(error, "a connection to the embedded S3 server failed");
    }
}

/// Converts a disk or thread error to an internal error of S3. Only the log contains the reason.
fn internal_error(error: impl std::error::Error + Send + Sync + 'static) -> S3Error {
    tracing::error!(%error, "an operation of the embedded S3 server failed, the client gets InternalError");
    S3Error::with_message(S3ErrorCode::InternalError, "We encountered an internal error. Please try again.")
}
