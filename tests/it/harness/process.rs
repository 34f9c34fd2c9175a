//! One broker on a runtime of its own, so that it can be dropped whole, as a killed process is.

use std::net::SocketAddr;
use std::time::Duration;

use lfs_broker::app::{self, Running};
use lfs_broker::store::Store;
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;

/// A broker that runs, or did.
pub(crate) struct Process {
    store: Store,
    running: Option<Running>,
    runtime: Option<Runtime>,
    address: SocketAddr,
}

impl Process {
    /// Starts a broker whose clock is pushed by this much.
    pub(crate) async fn start(settings: &app::Settings, pushed: Duration) -> Self {
        // Silent unless RUST_LOG is set; only the first of all tests can set it.
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("off"));
        let log = tracing_subscriber::fmt().with_env_filter(filter);
        let _ = log.with_test_writer().try_init();
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime is made");
        let settings = settings.clone();
        let start = runtime.spawn(async move {
            let store = Store::connect(&settings.store).expect("the database has a URL");
            store.push_clock(pushed);
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

    pub(crate) fn push_clock(&self, by: Duration) {
        self.store.push_clock(by);
    }

    /// Ends it in order.
    pub(crate) async fn stop(mut self) {
        let running = self.running.take().expect("it runs");
        let runtime = self.runtime.as_ref().expect("it has a runtime until it is dropped");
        runtime.spawn(running.stop()).await.expect("the broker ends in order");
    }

    /// Drops whatever it does, requests, completions and all: nothing is finished, nothing given back.
    pub(crate) fn crash(self) {
        drop(self);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // What blocks on Kafka goes on in its thread, as a request that is under way when its sender dies.
            runtime.shutdown_background();
        }
    }
}
