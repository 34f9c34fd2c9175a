//! `serve` and `migrate`: the broker against real servers.

use std::pin::pin;

use super::{Error, asked_to_end, log, talk};
use crate::store::{self, Store};
use crate::{app, http};

pub(super) async fn serve(settings: app::Settings, check_only: bool) -> Result<(), Error> {
    settings.check().map_err(Error::Settings)?;
    if check_only {
        talk::note("the settings are sound");
        return Ok(());
    }
    log("lfs_broker=info,warn");
    http::raise_descriptors();
    let delay = settings.http.shutdown_delay;
    let mut end = pin!(asked_to_end());
    let running = tokio::select! {
        running = app::start(settings) => running?,
        () = &mut end => return Ok(()),
    };
    end.await;
    let mut end_at_once = pin!(asked_to_end());
    tracing::info!("ending: not ready from now on, no new requests in {} s", delay.as_secs_f32());
    running.announce_end();
    let in_order = async {
        tokio::time::sleep(delay).await;
        running.stop().await;
    };
    tokio::select! {
        () = in_order => {}
        () = &mut end_at_once => tracing::warn!("asked to end twice: what is under way is dropped"),
    }
    Ok(())
}

pub(super) async fn migrate(settings: store::Settings) -> Result<(), Error> {
    let store = Store::connect(&settings)?;
    store.migrate().await?;
    store.close().await;
    talk::note("the schema is up to date");
    Ok(())
}
