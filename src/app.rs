//! The app: connects the dependencies, runs the workers, and shuts down in order.

mod workers;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::auth::{self, Auth, Mode};
use crate::broker::{self, Broker, BrokerDeps};
use crate::completion::{self, CompletionWorker, Tasks};
use crate::http::{self, App, Tls};
use crate::kafka::{self, Kafka};
use crate::notify::{self, ChangeNotifier};
use crate::objects::{self, Capabilities, Objects, PROBE_TIMEOUT};
use crate::policy;
use crate::readiness::{self, ReadinessChecker, ReadinessState, put_check_failure};
use crate::relay::Relay;
use crate::replica_link::ReplicaLink;
use crate::restore_check::{self, RestoreCheck};
use crate::store::{self, Store};
use crate::sweeper::{self, Sweeper};
use crate::verifier::Verifier;
use workers::{run_change_poller, run_relay, run_restore_check, run_sweeper, run_until_shutdown, run_verifier};

/// How long running completions may take at least, even if the requests used up the whole grace period.
const COMPLETION_GRACE: Duration = Duration::from_secs(1);
/// How long the link may take to send the last messages to the other replicas.
const LINK_GRACE: Duration = Duration::from_secs(1);

/// How long the start waits for the markers. An open transaction of a crashed replica can hide them for a minute.
const MARKERS_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the start waits for the S3 probe to end.
const PROBE_WAIT: Duration = Duration::from_secs(3);
/// The longest pause between two probes if S3 does not answer.
const MAX_PROBE_RETRY_PAUSE: Duration = Duration::from_secs(60);
/// How long the cleanup of old probe objects waits before it retries.
const CLEANUP_RETRY_PAUSE: Duration = Duration::from_secs(5);

/// All settings of `serve`.
#[derive(Clone)]
pub struct Settings {
    /// `LFS_BROKER_LISTEN`.
    pub listen: SocketAddr,
    /// `LFS_BROKER_PUBLIC_URL`: base URL of the `Location` header.
    pub public_url: Option<String>,
    /// `LFS_BROKER_CORS_ORIGINS`: origins that browsers may call the API from.
    pub cors_origins: Vec<String>,
    /// PostgreSQL.
    pub store: store::Settings,
    /// S3.
    pub objects: objects::Settings,
    /// Kafka.
    pub kafka: kafka::Settings,
    /// The HTTP server.
    pub http: http::Settings,
    /// Authentication.
    pub auth: auth::Settings,
    /// Part sizes, deadlines and topic defaults.
    pub policy: policy::Settings,
    /// Wait times, quotas and concurrency.
    pub broker: broker::Settings,
    /// Completion leases.
    pub completion: completion::Settings,
    /// The sweeper.
    pub sweeper: sweeper::Settings,
    /// The leases of the outbox's shards, and the polls for what no notification reported.
    pub notify: notify::Settings,
}

/// Why the broker does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The listen address cannot be bound.
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, std::io::Error),
    /// Without tokens, any client on the network could write.
    #[error("auth mode none is refused on {0}: it is for loopback addresses only")]
    NoAuthOnPublicAddress(SocketAddr),
    /// A presigned PUT could copy any object that the broker may read.
    #[error(
        "this S3 store accepts an unsigned x-amz-copy-source, so a presigned PUT could copy any object that the broker may read: \
         set LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID to a write-only credential, or LFS_BROKER_S3_ALLOW_COPY_SOURCE=true"
    )]
    CopySource,
    /// The token settings are incomplete or invalid.
    #[error("{0}")]
    Auth(#[from] auth::BadSettings),
    /// The certificate cannot be used.
    #[error("{0}")]
    Tls(#[from] http::tls::Error),
    /// The database failed.
    #[error("{0}")]
    Store(#[from] store::Error),
    /// S3 failed.
    #[error("{0}")]
    Objects(#[from] objects::Error),
    /// Kafka failed.
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
    /// Kafka holds newer batches than the database: the database was restored from a backup.
    #[error("{0}")]
    DatabaseRestored(restore_check::KafkaAhead),
}

/// A running broker.
pub struct Running {
    address: SocketAddr,
    store: Store,
    /// Cancels the token of all workers, also when it is dropped.
    stop: DropGuard,
    shutdown: http::Shutdown,
    grace: Duration,
    workers: Vec<JoinHandle<()>>,
    completions: Tasks,
    link: Link,
}

/// The running link to the other replicas. It ends last, so that they learn what the shutdown of this replica changes.
struct Link {
    /// Cancels the link's token, also when it is dropped.
    stop: DropGuard,
    task: JoinHandle<()>,
}

impl Settings {
    /// Checks everything that needs no connection to a server.
    ///
    /// # Errors
    /// If settings contradict each other or are not safe.
    pub fn check(&self) -> Result<(), Error> {
        if self.auth.mode == Mode::None && !self.listen.ip().is_loopback() {
            return Err(Error::NoAuthOnPublicAddress(self.listen));
        }
        Auth::new(&self.auth)?;
        self.http.tls.as_ref().map(Tls::open).transpose()?;
        self.objects.check()?;
        Kafka::connect(&self.kafka)?;
        Store::connect(&self.store)?;
        Ok(())
    }

    /// Whether presigned URLs are safe only on a store that refuses an unsigned copy-source. This is so if there is more
    /// than one tenant and the signing credential may also read.
    pub(crate) fn must_refuse_copy_source(&self) -> bool {
        let objects = &self.objects;
        self.auth.mode != Mode::None && objects.signing_access_key_id.is_none() && !objects.allow_copy_source
    }
}

/// Starts the broker. It accepts requests when this returns.
///
/// # Errors
/// If the settings are not safe, the schema is not current, or the address is in use.
pub async fn start(settings: Settings) -> Result<Running, Error> {
    let store = Store::connect(&settings.store)?;
    start_on(settings, store).await
}

/// Like [`start`], but with a store that is already open: a test can move that store's clock.
///
/// # Errors
/// As [`start`].
pub async fn start_on(settings: Settings, store: Store) -> Result<Running, Error> {
    settings.check()?;
    store.check_schema().await?;
    let objects = Objects::connect(&settings.objects).await?;
    let kafka = Kafka::connect(&settings.kafka)?;
    let deployment = store.deployment().await?;
    let restore_check = RestoreCheck::new(store.clone(), kafka.clone(), deployment);
    let readiness = Arc::new(ReadinessState::default());
    let (probed, ()) =
        tokio::try_join!(probe_store(&settings, &objects, &store, &readiness), check_not_restored(&restore_check))?;
    let (capabilities, probing) = probed;
    let notifier = Arc::new(ChangeNotifier::new(settings.notify.clone()));
    let owner = Uuid::new_v4();
    let completion_worker = CompletionWorker {
        store: store.clone(),
        objects: objects.clone(),
        notifier: Arc::clone(&notifier),
        settings: settings.completion.clone(),
        owner,
        tasks: Tasks::default(),
    };
    let completions = completion_worker.tasks.clone();
    let relay = Relay::new(store.clone(), kafka.clone(), Arc::clone(&notifier), deployment, restore_check.clone(), owner);
    let sweeper = Sweeper {
        store: store.clone(),
        objects: objects.clone(),
        notifier: Arc::clone(&notifier),
        settings: settings.sweeper.clone(),
        restore_check: restore_check.clone(),
        lease: settings.completion.lease,
    };
    let checks = ReadinessChecker::new(store.clone(), objects.clone(), kafka.clone(), deployment, Arc::clone(&readiness));
    let broker = Broker::new(BrokerDeps {
        store: store.clone(),
        objects,
        kafka,
        notifier: Arc::clone(&notifier),
        completion_worker: completion_worker.clone(),
        restore_check: restore_check.clone(),
        policy: settings.policy.clone(),
        settings: settings.broker.clone(),
        capabilities,
        readiness,
        must_refuse_copy_source: settings.must_refuse_copy_source(),
    });
    let tls = settings.http.tls.as_ref().map(Tls::open).transpose()?;
    let link_stopped = CancellationToken::new();
    let link = ReplicaLink::new(store.clone(), Arc::clone(&notifier), owner);
    let stopped = CancellationToken::new();
    let shutdown = http::Shutdown { announced: CancellationToken::new(), stopped: stopped.clone() };
    let (stop, grace) = (stopped.clone().drop_guard(), settings.http.shutdown_grace);
    let (address, server) = listen(&settings, broker, tls.clone(), shutdown.clone()).await?;
    let mut workers = vec![
        tokio::spawn(serve(server, grace, stopped.clone())),
        tokio::spawn(run_relay(relay, Arc::clone(&notifier), stopped.clone())),
        tokio::spawn(run_verifier(Verifier::new(completion_worker), Arc::clone(&notifier), stopped.clone())),
        tokio::spawn(run_sweeper(sweeper, stopped.clone())),
        tokio::spawn(run_restore_check(restore_check, stopped.clone())),
        tokio::spawn(run_change_poller(store.clone(), notifier, stopped.clone())),
    ];
    workers.push(tokio::spawn(run_until_shutdown(stopped.clone(), async move { drop(probing.join_all().await) })));
    workers.push(tokio::spawn(run_until_shutdown(stopped.clone(), checks.run())));
    let scheme = if tls.is_some() { "https" } else { "http" };
    if let (Some(tls), Some(files)) = (tls, settings.http.tls) {
        workers.push(tokio::spawn(run_until_shutdown(stopped, tls.reload_on_change(files))));
    }
    let link = Link { stop: link_stopped.clone().drop_guard(), task: tokio::spawn(link.run(link_stopped)) };
    info!(%address, "serving on {scheme}://{address}");
    Ok(Running { address, store, stop, shutdown, grace, workers, completions, link })
}

/// Binds the listen address. Returns it with the future that serves it until the shutdown.
async fn listen(
    settings: &Settings,
    broker: Broker,
    tls: Option<Tls>,
    shutdown: http::Shutdown,
) -> Result<(SocketAddr, impl Future<Output = ()> + use<>), Error> {
    let listener = TcpListener::bind(settings.listen).await.map_err(|error| Error::Listen(settings.listen, error))?;
    let address = listener.local_addr().map_err(|error| Error::Listen(settings.listen, error))?;
    let public_url = settings.public_url.as_deref().unwrap_or_default();
    let auth = Auth::new(&settings.auth)?;
    auth.prefetch_keys();
    let http = settings.http.clone().limited_by_open_files();
    let app = App::new(broker, auth, public_url, http.clone(), shutdown.clone());
    let base_path = app.base_path.clone();
    let router = http::router(app, &settings.cors_origins);
    Ok((address, http::serve(listener, router, base_path, tls, http, shutdown)))
}

impl Running {
    /// The address that the broker listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The broker's store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Announces the shutdown: `/readyz` answers 503, and every response closes its connection. Requests are still served.
    pub fn announce_shutdown(&self) {
        self.shutdown.announced.cancel();
    }

    /// Shuts down in order: accepts no new requests, finishes the running ones, and lets the relay finish its batch and release
    /// its shards.
    pub async fn stop(self) {
        self.shutdown.announced.cancel();
        let deadline = Instant::now() + self.grace;
        drop(self.stop);
        let drained = async {
            for worker in self.workers {
                if let Err(error) = worker.await {
                    error!(%error, "a worker task failed: {error}");
                }
            }
        };
        if tokio::time::timeout_at(deadline, drained).await.is_err() {
            let seconds = self.grace.as_secs_f32();
            warn!("workers did not stop within {seconds} s; other replicas continue their work when their leases end");
        }
        // Most completions take milliseconds. Another replica starts a long read again.
        if tokio::time::timeout_at(deadline.max(Instant::now() + COMPLETION_GRACE), self.completions.wait()).await.is_err() {
            warn!("uploads were still completing at shutdown; another replica continues them when their leases end");
        }
        drop(self.link.stop);
        if tokio::time::timeout(LINK_GRACE, self.link.task).await.is_err() {
            info!("the last messages to the other replicas were not sent; they poll for what they missed");
        }
        self.store.close().await;
    }

    /// Drops the broker as a crash would: finishes no work and releases no lease.
    pub fn kill(self) {
        for worker in &self.workers {
            worker.abort();
        }
        self.completions.abort();
        self.link.task.abort();
    }
}

/// Probes the S3 store. Returns its capabilities, and the task that continues to probe if the store did not answer at once.
///
/// # Errors
/// If uploads would not be safe on this store, or if the probe that must prove their safety fails.
async fn probe_store(
    settings: &Settings,
    objects: &Objects,
    store: &Store,
    readiness: &Arc<ReadinessState>,
) -> Result<(Arc<OnceLock<Capabilities>>, JoinSet<()>), Error> {
    let mut probing = JoinSet::new();
    let capabilities = Arc::new(OnceLock::new());
    let bucket = match objects.default_bucket() {
        Some(bucket) => Some(bucket.to_owned()),
        None => store.policy_bucket().await?,
    };
    // Nothing can be uploaded yet. The broker probes a bucket when the first policy names one.
    let Some(bucket) = bucket else {
        warn!("{}; no upload can be opened until then", objects::NO_BUCKET);
        return Ok((capabilities, probing));
    };
    if settings.must_refuse_copy_source() {
        let found = objects.probe(&bucket).await?;
        if !found.refuses_copy_source() {
            return Err(Error::CopySource);
        }
        let _ = capabilities.set(found);
        readiness.storage.record(Ok(()));
    }
    let (objects, store, readiness, known) = (objects.clone(), store.clone(), Arc::clone(readiness), Arc::clone(&capabilities));
    let (probe_done, probe_ended) = oneshot::channel::<()>();
    probing.spawn(async move {
        let mut pause = readiness::RETRY_INTERVAL;
        while known.get().is_none() {
            match objects.probe(&bucket).await {
                Ok(found) => {
                    if found.object_lock {
                        info!("bucket {bucket} has Object Lock: objects of failed uploads stay until their retention ends");
                    }
                    readiness.storage.record(Ok(()));
                    drop(known.set(found));
                }
                Err(error) => {
                    readiness.storage.record(Err(put_check_failure(&bucket, &error)));
                    let seconds = pause.as_secs_f32();
                    warn!(%error, "the probe of bucket {bucket} failed: {error}; retrying in {seconds} s");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_PROBE_RETRY_PAUSE);
                }
            }
        }
        drop(probe_done);
        let in_policies = store.policy_buckets().await.unwrap_or_default();
        let others = in_policies.into_iter().filter(|other| *other != bucket);
        for bucket in std::iter::once(bucket.clone()).chain(others) {
            while let Err(error) = objects.remove_stale_probes(&bucket, PROBE_TIMEOUT).await {
                info!(%error, "could not remove old probe objects from bucket {bucket}: {error}");
                if matches!(error, objects::Error::Refused { .. }) {
                    break;
                }
                tokio::time::sleep(CLEANUP_RETRY_PAUSE).await;
            }
        }
    });
    // `/readyz` then shows the capabilities right after the start. A slow store does not prevent the start.
    let _ = tokio::time::timeout(PROBE_WAIT, probe_ended).await;
    Ok((capabilities, probing))
}

/// Refuses a database that was restored from a backup. The broker also starts if Kafka does not answer in time: the relay
/// checks again before it publishes a shard, and the sweeper before it deletes.
async fn check_not_restored(restore_check: &RestoreCheck) -> Result<(), Error> {
    match tokio::time::timeout(MARKERS_TIMEOUT, restore_check.compare()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(restore_check::Error::KafkaAhead(ahead))) => Err(Error::DatabaseRestored(ahead)),
        Ok(Err(error)) => {
            info!(%error, "could not compare the database with Kafka yet: {error}; nothing is deleted or published until then");
            Ok(())
        }
        Err(_) => {
            let seconds = MARKERS_TIMEOUT.as_secs();
            info!("could not compare the database with Kafka within {seconds} s; nothing is deleted or published until then");
            Ok(())
        }
    }
}

async fn serve(server: impl Future<Output = ()>, grace: Duration, stopped: CancellationToken) {
    let grace_ended = async {
        stopped.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        () = server => {}
        () = grace_ended => warn!("dropped requests that did not finish within {} s of the shutdown", grace.as_secs_f32()),
    }
}
