//! A broker in this process on a runtime of its own, so that it can be dropped at once like a killed process.

use std::net::SocketAddr;
use std::time::Duration;

use lfs_broker::app::{self, Running};
use lfs_broker::store::Store;
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;

/// A broker that runs, or has run, in this process.
pub(crate) struct InProcessBroker {
    store: Store,
    running: Option<Running>,
    runtime: Option<Runtime>,
    address: SocketAddr,
}

impl InProcessBroker {
    /// Starts a broker whose clock is this far ahead.
    pub(crate) async fn start(settings: &app::Settings, clock_advance: Duration) -> Self {
        // No logs unless RUST_LOG is set. Only the first test of the process can set the subscriber.
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("off"));
        let log = tracing_subscriber::fmt().with_env_filter(filter);
        let _ = log.with_test_writer().try_init();
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime is made");
        let settings = settings.clone();
        let start = runtime.spawn(async move {
            let store = Store::connect(&settings.store).expect("the database has a URL");
            store.advance_clock(clock_advance);
            let running = app::start_on(settings, store.clone()).await.expect("the broker starts");
            (store, running)
        });
        let (store, running) = start.await.expect("the broker starts");
        let address = running.address();
        Self { store, running: Some(running), runtime: Some(runtime), address }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn advance_clock(&self, duration: Duration) {
        self.store.advance_clock(duration);
    }

    /// Shuts the broker down in order.
    pub(crate) async fn stop(mut self) {
        let running = self.running.take().expect("the broker runs");
        let runtime = self.runtime.as_ref().expect("it has a runtime until it is dropped");
        runtime.spawn(running.stop()).await.expect("the broker ends in order");
    }

    /// Drops every task at once, requests and completions included: nothing is completed and no lease is released.
    pub(crate) fn crash(self) {
        drop(self);
    }
}

impl Drop for InProcessBroker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Threads that block on Kafka keep running, like a request in flight when its sender is killed.
            runtime.shutdown_background();
        }
    }
}
