//! `serve` and `migrate`: the broker with an external PostgreSQL, S3 and Kafka.

use std::pin::pin;

use super::output::print_note;
use super::{Error, init_logging, shutdown_signal};
use crate::store::{self, Store};
use crate::{app, http};

pub(super) async fn serve(settings: app::Settings, check_only: bool) -> Result<(), Error> {
    settings.check().map_err(Error::Settings)?;
    if check_only {
        print_note("the settings are valid");
        return Ok(());
    }
    init_logging("lfs_broker=info,warn");
    http::raise_file_limit();
    let shutdown_delay = settings.http.shutdown_delay;
    let mut shutdown = pin!(shutdown_signal());
    let running = tokio::select! {
        running = app::start(settings) => running?,
        () = &mut shutdown => return Ok(()),
    };
    shutdown.await;
    let mut second_signal = pin!(shutdown_signal());
    tracing::info!(
        "shutting down: /readyz fails from now on, and the broker stops accepting requests in {} s",
        shutdown_delay.as_secs_f32()
    );
    running.announce_shutdown();
    let graceful = async {
        tokio::time::sleep(shutdown_delay).await;
        running.stop().await;
    };
    tokio::select! {
        () = graceful => {}
        () = &mut second_signal => tracing::warn!("a second signal arrived: stopping at once and dropping requests in progress"),
    }
    Ok(())
}

pub(super) async fn migrate(settings: store::Settings) -> Result<(), Error> {
    let store = Store::connect(&settings)?;
    store.migrate().await?;
    store.close().await;
    print_note("the schema is up to date");
    Ok(())
}
