//! The app: parts wired together, workers kept going, and an orderly end.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Notify, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::auth::{self, Auth, Mode};
use crate::broker::{self, Broker, Parts};
use crate::finish::{self, Finisher, Tasks};
use crate::http::{self, App, Tls};
use crate::kafka::{self, Kafka};
use crate::objects::{self, Capabilities, LONGEST_TRIAL, Objects};
use crate::policy;
use crate::readiness::{self, Checks, Outcomes, put_failure};
use crate::relay::Relay;
use crate::restore_check::{self, RestoreCheck};
use crate::store::{self, Store};
use crate::sweeper::{self, Sweeper};
use crate::verifier::Verifier;
use crate::wakes::Wakes;

/// How often the relay and the verifier look by themselves; they are woken sooner.
const LOOK: Duration = Duration::from_millis(500);
/// How often the sessions that somebody waits for are looked at, for another replica may have moved them.
const LOOK_OUT: Duration = Duration::from_millis(100);
/// How long after a failure a worker tries again.
const PAUSE: Duration = Duration::from_secs(1);
/// A completion that is nearly done ends well also where requests took all the time that there was.
const LAST_WORD: Duration = Duration::from_secs(1);

/// How long the start may take to read the markers: a crashed replica's open transaction can hide them for a minute.
const MARKERS: Duration = Duration::from_secs(2);
/// How soon the database is compared with Kafka again where it was found older, or could not be compared yet.
const COMPARE_AGAIN: Duration = Duration::from_secs(2);

/// How long the start waits to see what the store does, and the longest pause until it is tried again where it did not
/// answer.
const TRIAL: Duration = Duration::from_secs(3);
const TRY_AGAIN: Duration = Duration::from_secs(60);
/// How soon what trials have left is looked for again, where S3 did not answer.
const CLEAN_AGAIN: Duration = Duration::from_secs(5);

/// Everything that `serve` can be told.
#[derive(Clone)]
pub struct Settings {
    /// `LFS_BROKER_LISTEN`.
    pub listen: SocketAddr,
    /// `LFS_BROKER_PUBLIC_URL`: base of `Location`.
    pub public_url: Option<String>,
    /// `LFS_BROKER_CORS_ORIGINS`: origins whose pages may call the API.
    pub cors_origins: Vec<String>,
    /// PostgreSQL.
    pub store: store::Settings,
    /// S3.
    pub objects: objects::Settings,
    /// Kafka.
    pub kafka: kafka::Settings,
    /// The door.
    pub http: http::Settings,
    /// Tokens.
    pub auth: auth::Settings,
    /// How uploads are cut.
    pub policy: policy::Settings,
    /// Patience and generosity.
    pub broker: broker::Settings,
    /// Leases.
    pub finish: finish::Settings,
    /// Sweeping.
    pub sweeper: sweeper::Settings,
}

/// Why the broker does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, std::io::Error),
    /// Without tokens anyone on the network could write.
    #[error("auth mode none is refused on {0}: it is for loopback only")]
    OpenToTheWorld(SocketAddr),
    /// A presigned PUT could copy whatever the broker may read.
    #[error(
        "this S3 store accepts an unsigned x-amz-copy-source, so a presigned PUT could copy what the broker may read: \
         set LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID to a write-only credential, or LFS_BROKER_S3_ALLOW_COPY_SOURCE=true"
    )]
    CopySource,
    /// Tokens cannot be checked.
    #[error("{0}")]
    Auth(#[from] auth::BadSettings),
    /// The certificate.
    #[error("{0}")]
    Tls(#[from] http::tls::Error),
    /// The database.
    #[error("{0}")]
    Store(#[from] store::Error),
    /// S3.
    #[error("{0}")]
    Objects(#[from] objects::Error),
    /// Kafka.
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
    /// The database is older than what Kafka holds.
    #[error("{0}")]
    Restored(restore_check::Ahead),
}

/// A broker that runs.
pub struct Running {
    address: SocketAddr,
    store: Store,
    stop: watch::Sender<bool>,
    ending: http::Ending,
    grace: Duration,
    work: Vec<JoinHandle<()>>,
    tasks: Tasks,
}

impl Settings {
    /// Checks what can be checked without any server.
    ///
    /// # Errors
    /// What contradicts itself or is not safe.
    pub fn check(&self) -> Result<(), Error> {
        if self.auth.mode == Mode::None && !self.listen.ip().is_loopback() {
            return Err(Error::OpenToTheWorld(self.listen));
        }
        Auth::new(&self.auth)?;
        self.http.tls.as_ref().map(Tls::open).transpose()?;
        self.objects.check()?;
        Kafka::connect(&self.kafka)?;
        Store::connect(&self.store)?;
        Ok(())
    }

    /// Whether URLs are safe only on a store that refuses an unsigned copy-source: tenants are told apart, and what signs
    /// may also read.
    pub(crate) fn must_refuse_copy_source(&self) -> bool {
        let objects = &self.objects;
        self.auth.mode != Mode::None && objects.signing_access_key_id.is_none() && !objects.allow_copy_source
    }
}

/// Starts the broker: it serves when this returns.
///
/// # Errors
/// When the settings are not safe, the schema is not current, or the address is taken.
pub async fn start(settings: Settings) -> Result<Running, Error> {
    let store = Store::connect(&settings.store)?;
    start_on(settings, store).await
}

/// The same on a store that is open already, whose clock a test may push.
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
    let outcomes = Arc::new(Outcomes::default());
    let (tried, ()) = tokio::try_join!(try_store(&settings, &objects, &store, &outcomes), refuse_restored(&restore_check))?;
    let (capabilities, trying) = tried;
    let wakes = Arc::new(Wakes::default());
    let owner = Uuid::new_v4();
    let finisher = Finisher {
        store: store.clone(),
        objects: objects.clone(),
        wakes: Arc::clone(&wakes),
        settings: settings.finish.clone(),
        shards: deployment.shards,
        owner,
        tasks: Tasks::default(),
    };
    let tasks = finisher.tasks.clone();
    let relay = Relay::new(store.clone(), kafka.clone(), Arc::clone(&wakes), deployment, restore_check.clone(), owner);
    let sweeper = Sweeper {
        store: store.clone(),
        objects: objects.clone(),
        wakes: Arc::clone(&wakes),
        settings: settings.sweeper.clone(),
        restore_check: restore_check.clone(),
        lease: settings.finish.lease,
        shards: deployment.shards,
    };
    let checks = Checks::new(store.clone(), objects.clone(), kafka.clone(), deployment, Arc::clone(&outcomes));
    let broker = Broker::new(Parts {
        store: store.clone(),
        objects,
        kafka,
        wakes: Arc::clone(&wakes),
        finisher: finisher.clone(),
        restore_check: restore_check.clone(),
        deployment,
        policy: settings.policy.clone(),
        settings: settings.broker.clone(),
        capabilities,
        outcomes,
        must_refuse_copy_source: settings.must_refuse_copy_source(),
    });
    let tls = settings.http.tls.as_ref().map(Tls::open).transpose()?;
    let (stop, stopped) = watch::channel(false);
    let (ending, grace) = (http::Ending::new(stopped.clone()), settings.http.shutdown_grace);
    let (address, door) = listen(&settings, broker, tls.clone(), ending.clone()).await?;
    let mut work = vec![
        tokio::spawn(serve(door, grace, stopped.clone())),
        tokio::spawn(run_relay(relay, Arc::clone(&wakes), stopped.clone())),
        tokio::spawn(run_verifier(Verifier::new(finisher), Arc::clone(&wakes), stopped.clone())),
        tokio::spawn(run_sweeper(sweeper, stopped.clone())),
        tokio::spawn(run_restore_check(restore_check, stopped.clone())),
        tokio::spawn(run_lookout(store.clone(), wakes, stopped.clone())),
    ];
    work.extend([tokio::spawn(until(stopped.clone(), trying)), tokio::spawn(checks.run(stopped.clone()))]);
    let scheme = if tls.is_some() { "https" } else { "http" };
    if let (Some(tls), Some(files)) = (tls, settings.http.tls) {
        work.push(tokio::spawn(tls.keep_current(files, stopped)));
    }
    info!(%address, "serving on {scheme}://{address}");
    Ok(Running { address, store, stop, ending, grace, work, tasks })
}

/// Opens the address, and gives what serves it until the end is asked for.
async fn listen(
    settings: &Settings,
    broker: Broker,
    tls: Option<Tls>,
    ending: http::Ending,
) -> Result<(SocketAddr, impl Future<Output = ()> + use<>), Error> {
    let listener = TcpListener::bind(settings.listen).await.map_err(|error| Error::Listen(settings.listen, error))?;
    let address = listener.local_addr().map_err(|error| Error::Listen(settings.listen, error))?;
    let public_url = settings.public_url.as_deref().unwrap_or_default();
    let auth = Auth::new(&settings.auth)?;
    auth.warm();
    let http = settings.http.clone().fitted();
    let app = App::new(broker, auth, public_url, http.clone(), ending.clone());
    let base_path = app.base_path.clone();
    let router = http::router(app, &settings.cors_origins);
    Ok((address, http::serve(listener, router, base_path, tls, http, ending)))
}

impl Running {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Says that the end is near: `/readyz` is not ready, and every answer ends its connection. All is still served.
    pub fn announce_end(&self) {
        self.ending.announce();
    }

    /// Ends it in order: no new requests, those under way finish, the relay finishes its batch and gives its shards back.
    pub async fn stop(self) {
        self.ending.announce();
        let deadline = Instant::now() + self.grace;
        let _ = self.stop.send(true);
        let drained = async {
            for work in self.work {
                if let Err(error) = work.await {
                    error!(%error, "a worker ended badly");
                }
            }
        };
        if tokio::time::timeout_at(deadline, drained).await.is_err() {
            warn!("stopped without waiting any longer; leases will run out");
        }
        // Most completions take milliseconds. A long reading begins again elsewhere.
        if tokio::time::timeout_at(deadline.max(Instant::now() + LAST_WORD), self.tasks.ended()).await.is_err() {
            warn!("uploads were still being completed at the end; their leases will run out");
        }
        self.store.close().await;
    }

    /// Drops it as a crash would: nothing is finished, nothing given back.
    pub fn kill(self) {
        for work in &self.work {
            work.abort();
        }
        self.tasks.abort();
    }
}

/// What the store was seen to do, and the task that goes on looking where it was not seen at once.
///
/// # Errors
/// Where uploads would not be safe on this store, or that cannot be found out.
async fn try_store(
    settings: &Settings,
    objects: &Objects,
    store: &Store,
    outcomes: &Arc<Outcomes>,
) -> Result<(Arc<OnceLock<Capabilities>>, JoinSet<()>), Error> {
    let mut trying = JoinSet::new();
    let seen = Arc::new(OnceLock::new());
    let bucket = match objects.default_bucket() {
        Some(bucket) => Some(bucket.to_owned()),
        None => store.policy_bucket().await?,
    };
    // Nothing can be uploaded yet: the first policy that names a bucket has it tried.
    let Some(bucket) = bucket else { return Ok((seen, trying)) };
    if settings.must_refuse_copy_source() {
        let found = objects.probe(&bucket).await?;
        if !found.refuses_copy_source() {
            return Err(Error::CopySource);
        }
        let _ = seen.set(found);
        outcomes.storage.record(Ok(()));
    }
    let (objects, store, outcomes, noted) = (objects.clone(), store.clone(), Arc::clone(outcomes), Arc::clone(&seen));
    let (tried, is_tried) = oneshot::channel::<()>();
    trying.spawn(async move {
        let mut pause = readiness::AGAIN;
        while noted.get().is_none() {
            match objects.probe(&bucket).await {
                Ok(found) => {
                    if found.object_lock {
                        info!("bucket {bucket} has Object Lock: what failed uploads leave there stays until its retention ends");
                    }
                    outcomes.storage.record(Ok(()));
                    drop(noted.set(found));
                }
                Err(error) => {
                    outcomes.storage.record(Err(put_failure(&bucket, &error)));
                    warn!(%error, "the store could not be tried out yet: {error}");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(TRY_AGAIN);
                }
            }
        }
        drop(tried);
        let named = store.policy_buckets().await.unwrap_or_default();
        let others = named.into_iter().filter(|named| *named != bucket);
        for bucket in std::iter::once(bucket.clone()).chain(others) {
            while let Err(error) = objects.clean_after_trials(&bucket, LONGEST_TRIAL).await {
                info!(%error, "what trials have left in bucket {bucket} could not be removed yet: {error}");
                if matches!(error, objects::Error::Refused { .. }) {
                    break;
                }
                tokio::time::sleep(CLEAN_AGAIN).await;
            }
        }
    });
    // Who asks whether the broker is ready right after its start sees it all; a slow store keeps nothing from starting.
    let _ = tokio::time::timeout(TRIAL, is_tried).await;
    Ok((seen, trying))
}

/// Refuses a database that was restored from a backup. A Kafka that does not answer, or not in time, keeps nothing from
/// starting: the relay looks again before it sends anything of a shard, and the sweeper before it deletes anything.
async fn refuse_restored(restore_check: &RestoreCheck) -> Result<(), Error> {
    match tokio::time::timeout(MARKERS, restore_check.compare()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(restore_check::Error::Older(ahead))) => Err(Error::Restored(ahead)),
        Ok(Err(error)) => {
            info!(%error, "the database is not compared with Kafka yet: {error}; nothing is deleted or sent before");
            Ok(())
        }
        Err(_) => {
            let seconds = MARKERS.as_secs();
            info!("the database is not compared with Kafka yet: no answer within {seconds} s; nothing is deleted or sent before");
            Ok(())
        }
    }
}

async fn serve(door: impl Future<Output = ()>, grace: Duration, mut stopped: watch::Receiver<bool>) {
    let late = async {
        let _ = stopped.wait_for(|stopped| *stopped).await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        () = door => {}
        () = late => warn!("requests were still under way at the end"),
    }
}

/// Keeps tasks going until the end is asked for; dropped, it drops them.
async fn until(mut stopped: watch::Receiver<bool>, mut tasks: JoinSet<()>) {
    tokio::select! {
        _ = tasks.join_next() => {}
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
}

async fn run_relay(relay: Relay, wakes: Arc<Wakes>, stopped: watch::Receiver<bool>) {
    let relay = Arc::new(Mutex::new(relay));
    let tick = || async { relay.lock().await.tick().await };
    keep_going("relay", tick, LOOK, &wakes.relay, stopped).await;
    relay.lock().await.stop().await;
}

async fn run_verifier(verifier: Verifier, wakes: Arc<Wakes>, stopped: watch::Receiver<bool>) {
    keep_going("verifier", || verifier.tick(), LOOK, &wakes.verifier, stopped).await;
}

async fn run_sweeper(sweeper: Sweeper, stopped: watch::Receiver<bool>) {
    let wakes = Arc::clone(&sweeper.wakes);
    let every = sweeper.settings.every;
    // Each for itself: an S3 that is slow keeps no quota from being freed. Time alone wakes the ones that nobody wakes.
    let never = Notify::new();
    tokio::join!(
        keep_going("sweeper of overdue uploads", || sweeper.end_overdue(), every, &never, stopped.clone()),
        keep_going("sweeper of held bytes", || sweeper.free_held(), every, &never, stopped.clone()),
        keep_going("sweeper", || sweeper.clean_up(), every, &wakes.sweeper, stopped.clone()),
        keep_going("sweeper of keys", || sweeper.forget_keys(), every, &never, stopped),
    );
}

/// Compares the database with Kafka until that was done once, and again while the database is older: readiness says so,
/// and must say when it was reconciled. Otherwise whoever would delete or send compares by themselves.
async fn run_restore_check(restore_check: RestoreCheck, mut stopped: watch::Receiver<bool>) {
    let tick = || async {
        if !restore_check.is_passed() {
            // What keeps it from being compared is logged by those who have something to delete or to send.
            let _ = restore_check.check().await;
        }
        Ok::<usize, store::Error>(0)
    };
    let never = Notify::new();
    tokio::select! {
        () = keep_going("comparison with Kafka", tick, COMPARE_AGAIN, &never, stopped.clone()) => {}
        // A Kafka that does not answer must not hold up the end.
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
}

/// Looks for what other replicas did to the sessions that somebody waits for: one question for all of them.
async fn run_lookout(store: Store, wakes: Arc<Wakes>, stopped: watch::Receiver<bool>) {
    let tick = || async {
        let awaited = wakes.all_awaited();
        if !awaited.is_empty() {
            wakes.are_now(&store.versions(&awaited).await?);
        }
        Ok::<usize, store::Error>(0)
    };
    keep_going("lookout", tick, LOOK_OUT, &Notify::new(), stopped).await;
}

/// Runs a worker until the end is asked for: at once again while there is work, else when woken or after `every`.
async fn keep_going<T, F, E>(name: &str, mut tick: T, every: Duration, wake: &Notify, mut stopped: watch::Receiver<bool>)
where
    T: FnMut() -> F,
    F: Future<Output = Result<usize, E>>,
    E: std::fmt::Display,
{
    while !*stopped.borrow() {
        // A worker that is gone would let promises pile up unseen: it is told, and goes on with what is next.
        let pause = match AssertUnwindSafe(tick()).catch_unwind().await {
            Ok(Ok(0)) => every,
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => {
                warn!(%error, "the {name} tries again: {error}");
                PAUSE
            }
            Err(_) => {
                error!("the {name} panicked, which is a bug, and tries again");
                PAUSE
            }
        };
        // Replicas that were started together must not stay in step.
        let jittered = pause.mul_f64(0.75 + fastrand::f64() / 2.0);
        tokio::select! {
            () = tokio::time::sleep(jittered) => {}
            () = wake.notified() => {}
            _ = stopped.wait_for(|stopped| *stopped) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_worker_that_panics_goes_on() {
        let (stop, stopped) = watch::channel(false);
        let (mut ticks, wake) = (0, Notify::new());
        let tick = || {
            ticks += 1;
            let (ticks, stop) = (ticks, stop.clone());
            async move {
                assert!(ticks > 1, "as the test wants");
                stop.send_replace(true);
                Ok::<usize, store::Error>(0)
            }
        };
        let worked = keep_going("worker", tick, LOOK, &wake, stopped);
        tokio::time::timeout(Duration::from_secs(20), worked).await.expect("it goes on, and ends when it is asked to");
        assert_eq!(ticks, 2);
    }
}
