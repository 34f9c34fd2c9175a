//! `serve` and `migrate`: the broker against real servers.

use super::{Error, asked_to_end, log, talk};
use crate::app;
use crate::store::{self, Store};

pub(super) async fn serve(settings: app::Settings, check_only: bool) -> Result<(), Error> {
    settings.check().map_err(Error::Settings)?;
    if check_only {
        talk::note("the settings are sound");
        return Ok(());
    }
    log("lfs_broker=info,warn");
    let running = app::start(settings).await?;
    asked_to_end().await;
    tracing::info!("ending");
    running.stop().await;
    Ok(())
}

pub(super) async fn migrate(settings: store::Settings) -> Result<(), Error> {
    let store = Store::connect(&settings)?;
    store.migrate().await?;
    store.close().await;
    talk::note("the schema is up to date");
    Ok(())
}
