//! The background workers: each repeats its tick, pauses while there is no work, and ends at the shutdown.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::{Mutex, Notify};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::notify::ChangeNotifier;
use crate::relay::Relay;
use crate::restore_check::RestoreCheck;
use crate::store::{self, Store};
use crate::sweeper::Sweeper;
use crate::verifier::Verifier;

/// How often the verifier polls for work. The relay wakes it when it renews its leases and finds work for it.
const VERIFIER_POLL_INTERVAL: Duration = Duration::from_secs(30);
/// How long a worker waits after a failure before it retries.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How often the database is compared with Kafka while it is older than Kafka or the comparison has not succeeded yet.
const COMPARE_INTERVAL: Duration = Duration::from_secs(2);

/// Runs a task until it ends, or drops it at the shutdown.
pub(super) async fn run_until_shutdown(stopped: CancellationToken, task: impl Future<Output = ()>) {
    stopped.run_until_cancelled(task).await;
}

pub(super) async fn run_relay(relay: Relay, notifier: Arc<ChangeNotifier>, stopped: CancellationToken) {
    let relay = Arc::new(Mutex::new(relay));
    let tick = || async {
        let ticked = relay.lock().await.tick().await;
        if ticked.is_err() {
            // Perhaps the leases were not renewed, so the renewal did not look for work of the verifier either.
            notifier.verifier.notify_one();
        }
        ticked
    };
    // No tick runs while the worker pauses, so the lock is free.
    let pause = || relay.try_lock().map_or(RETRY_PAUSE, |relay| relay.pause());
    run_worker("relay", tick, pause, &notifier.relay, stopped).await;
    relay.lock().await.stop().await;
}

pub(super) async fn run_verifier(verifier: Verifier, notifier: Arc<ChangeNotifier>, stopped: CancellationToken) {
    run_worker("verifier", || verifier.tick(), || VERIFIER_POLL_INTERVAL, &notifier.verifier, stopped).await;
}

pub(super) async fn run_sweeper(sweeper: Sweeper, stopped: CancellationToken) {
    let notifier = Arc::clone(&sweeper.notifier);
    let every = || sweeper.settings.interval;
    // Each worker runs independently, so that a slow S3 does not delay the release of quotas. `never` is never notified: the
    // workers that use it run at each interval only.
    let never = Notify::new();
    tokio::join!(
        run_worker("sweeper of overdue uploads", || sweeper.expire_overdue(), every, &never, stopped.clone()),
        run_worker("sweeper of reserved bytes", || sweeper.release_held_bytes(), every, &never, stopped.clone()),
        run_worker("sweeper", || sweeper.clean_up(), every, &notifier.sweeper, stopped.clone()),
        run_worker("sweeper of idempotency keys", || sweeper.delete_expired_keys(), every, &never, stopped),
    );
}

/// Compares the database with Kafka until the comparison passes, so that readiness reports when the two are reconciled. The
/// relay and the sweeper compare again before they publish or delete.
pub(super) async fn run_restore_check(restore_check: RestoreCheck, stopped: CancellationToken) {
    let tick = || async {
        if !restore_check.is_passed() {
            // The relay and the sweeper log why a comparison failed, when they have something to publish or delete.
            let _ = restore_check.check().await;
        }
        Ok::<usize, store::Error>(0)
    };
    let never = Notify::new();
    // An unresponsive Kafka must not delay the shutdown.
    run_until_shutdown(stopped.clone(), run_worker("comparison with Kafka", tick, || COMPARE_INTERVAL, &never, stopped)).await;
}

/// Polls the versions of the subscribed sessions while other replicas may change them without a message: one query for all
/// of them.
pub(super) async fn run_change_poller(store: Store, notifier: Arc<ChangeNotifier>, stopped: CancellationToken) {
    let tick = || async {
        let ids = if notifier.replicas.must_poll() { notifier.subscribed_ids() } else { Vec::new() };
        if !ids.is_empty() {
            notifier.notify_if_newer(&store.versions(&ids).await?);
        }
        Ok::<usize, store::Error>(0)
    };
    let pause = || notifier.settings.poll_interval / 5;
    run_worker("change poller", tick, pause, &Notify::new(), stopped).await;
}

/// Runs a worker until the shutdown. The next tick follows at once while there is work, else after a notification or the time
/// that `pause` returns.
async fn run_worker<T, F, E>(name: &str, mut tick: T, pause: impl Fn() -> Duration, wake: &Notify, stopped: CancellationToken)
where
    T: FnMut() -> F,
    F: Future<Output = Result<usize, E>>,
    E: std::fmt::Display,
{
    while !stopped.is_cancelled() {
        // If a panic ended the worker, queued uploads would pile up unnoticed: log the panic and continue.
        let pause = match AssertUnwindSafe(tick()).catch_unwind().await {
            Ok(Ok(0)) => pause(),
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => {
                warn!(%error, "the {name} failed: {error}; retrying in about {} s", RETRY_PAUSE.as_secs());
                RETRY_PAUSE
            }
            Err(_) => {
                error!("the {name} panicked, which is a bug; retrying in about {} s", RETRY_PAUSE.as_secs());
                RETRY_PAUSE
            }
        };
        // Jitter: replicas that start together must not stay synchronized.
        let jittered = pause.mul_f64(0.75 + fastrand::f64() / 2.0);
        tokio::select! {
            () = tokio::time::sleep(jittered) => {}
            () = wake.notified() => {}
            () = stopped.cancelled() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_worker_continues_after_a_panic() {
        let stopped = CancellationToken::new();
        let (mut ticks, wake) = (0, Notify::new());
        let tick = || {
            ticks += 1;
            let (ticks, stop) = (ticks, stopped.clone());
            async move {
                assert!(ticks > 1, "the test needs a panic");
                stop.cancel();
                Ok::<usize, store::Error>(0)
            }
        };
        let worker = run_worker("worker", tick, || RETRY_PAUSE, &wake, stopped.clone());
        tokio::time::timeout(Duration::from_secs(20), worker).await.expect("the worker continues, and stops when asked");
        assert_eq!(ticks, 2);
    }
}
