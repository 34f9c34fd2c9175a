//! The S3 that `lfs-broker dev` and the hermetic tests put their objects into.
//!
//! `s3s` speaks the protocol (signatures, XML, ranges); this room adds a guard in front of it and a small store of
//! files behind it. It answers as AWS documents it where the broker relies on an answer, and says 501 to the rest.

mod api;
mod checksum;
mod conditions;
mod content;
mod front;
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
use front::Front;
use store::Store;

/// How long requests in flight may take to end when the server stops.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a connection may be idle. Longer than clients keep theirs (90 s is usual), so that it is they who close.
const IDLE: Duration = Duration::from_secs(300);

/// Where the store listens, where it keeps its objects, and the one credential it accepts.
#[derive(Clone)]
pub struct Settings {
    /// The address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The directory of the objects, made if it is not there. One server at a time can use it.
    pub root: PathBuf,
    /// The name of the credential.
    pub access_key_id: String,
    /// The secret of the credential.
    pub secret_access_key: String,
}

impl fmt::Debug for Settings {
    /// Shows everything but the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { listen, root, access_key_id, .. } = self;
        let mut shown = f.debug_struct("Settings");
        shown.field("listen", listen).field("root", root).field("access_key_id", access_key_id).finish_non_exhaustive()
    }
}

/// What keeps the store from starting.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is taken, or not ours.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Another server has the directory open.
    #[error("{} is in use by another server", .0.display())]
    Busy(PathBuf),
    /// A file or directory of the store cannot be read or written.
    #[error("{}: {source}", path.display())]
    Root {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A record on disk is not one of ours.
    #[error("{} is no record: {source}", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A record names bytes that are not there.
    #[error("{} names bytes that are not there", .0.display())]
    Incomplete(PathBuf),
    /// S3 does not allow this name for a bucket.
    #[error("{0:?} cannot be the name of a bucket")]
    BucketName(String),
    /// The thread that was to do it ended.
    #[error("interrupted: {0}")]
    Interrupted(#[from] tokio::task::JoinError),
}

/// A running store.
pub struct Server {
    address: SocketAddr,
    store: Arc<Store>,
    stopping: watch::Sender<bool>,
    running: JoinHandle<()>,
}

impl Server {
    /// Opens the store and serves it on the current runtime until [`Server::stop`], or until the server is dropped.
    pub async fn start(settings: Settings) -> Result<Self, Error> {
        let Settings { listen, root, access_key_id, secret_access_key } = settings;
        let failed = |source| Error::Listen { address: listen, source };
        let store = Arc::new(tokio::task::spawn_blocking(move || Store::open(&root)).await??);
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let front = Front::new(Api::new(Arc::clone(&store)), access_key_id, &secret_access_key);
        let (stopping, stopped) = watch::channel(false);
        let running = tokio::spawn(run(listener, front, stopped));
        Ok(Self { address, store, stopping, running })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens, as S3 clients want to be told.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Makes a bucket, if it is not there already.
    pub async fn create_bucket(&self, name: &str) -> Result<(), Error> {
        let (store, name) = (Arc::clone(&self.store), name.to_owned());
        tokio::task::spawn_blocking(move || store.create_bucket(&name)).await??;
        Ok(())
    }

    /// Stops accepting, and gives requests in flight five seconds to end.
    pub async fn stop(self) {
        // Without a receiver the server has ended already.
        let _ = self.stopping.send(true);
        if let Err(error) = self.running.await {
            tracing::error!(%error, "the embedded S3 server ended badly");
        }
    }
}

async fn run(listener: TcpListener, front: Front, mut stopping: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(stream, front.clone(), stopping.clone()));
                }
                Err(error) => {
                    // Out of file descriptors, most likely: a moment later some are free.
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            // The sender is told to stop, or is gone.
            _ = stopping.changed() => break,
        }
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(FAREWELL, ended).await.is_err() {
        connections.shutdown().await;
    }
}

async fn serve(stream: TcpStream, front: Front, mut stopping: watch::Receiver<bool>) {
    // Answers are small and complete: waiting for more to send only delays them.
    let _ = stream.set_nodelay(true);
    let service = hyper::service::service_fn(move |request| {
        let front = front.clone();
        async move { front.answer(request).await }
    });
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(error, "a connection to the embedded S3 server ended early");
    }
}

/// What a client is told when a disk or a thread fails; the log has the reason.
fn broken(error: impl std::error::Error + Send + Sync + 'static) -> S3Error {
    tracing::error!(%error, "the embedded S3 server could not do it");
    S3Error::with_message(S3ErrorCode::InternalError, "We encountered an internal error. Please try again.")
}
