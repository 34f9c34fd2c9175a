//! `serve`, `migrate` and `doctor`: the broker against real servers.

use std::fmt::Display;

use serde::Serialize;

use super::{Error, asked_to_end, log, talk};
use crate::app;
use crate::kafka::Kafka;
use crate::objects::{Capabilities, Objects};
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

/// What was looked at, and what it came to.
#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    text: String,
}

/// All that `doctor` found; with `--json` it is printed whole, whatever is away.
#[derive(Serialize)]
struct Findings {
    ok: bool,
    checks: Vec<Check>,
    /// What the store was seen to do, if it could be tried.
    capabilities: Option<Capabilities>,
}

impl Findings {
    /// Notes a check, and tells people at once: the next may take its time.
    fn add<E: Display>(&mut self, json: bool, name: &'static str, outcome: Result<String, E>) -> Result<(), Error> {
        let (ok, text) = match outcome {
            Ok(text) => (true, text),
            Err(error) => (false, error.to_string()),
        };
        self.ok &= ok;
        if !json {
            talk::data(&format!("{} {name}: {text}", if ok { "ok  " } else { "FAIL" }))?;
        }
        self.checks.push(Check { name, ok, text });
        Ok(())
    }
}

pub(super) async fn doctor(settings: app::Settings, json: bool) -> Result<(), Error> {
    let mut found = Findings { ok: true, checks: Vec::new(), capabilities: None };
    found.add(json, "settings", settings.check().map(|()| "sound".to_owned()))?;
    found.add(json, "database", database(&settings).await.map(|()| "reachable, schema current".to_owned()))?;
    found.add(json, "kafka", kafka(&settings).await.map(|()| "reachable".to_owned()))?;
    match store(&settings).await {
        Ok(capabilities) => {
            for (ok, text) in told(&capabilities) {
                found.add(json, "s3", if ok { Ok(text.to_owned()) } else { Err(format!("NOT: {text}")) })?;
            }
            found.capabilities = Some(capabilities);
        }
        Err(error) => found.add(json, "s3", Err(error))?,
    }
    if json {
        talk::data(&talk::json(&found))?;
    }
    if found.ok { Ok(()) } else { Err(Error::Failed("something is not as the broker needs it".to_owned())) }
}

async fn database(settings: &app::Settings) -> Result<(), store::Error> {
    Store::connect(&settings.store)?.check_schema().await
}

async fn kafka(settings: &app::Settings) -> Result<(), crate::kafka::Error> {
    let kafka = Kafka::connect(&settings.kafka)?;
    kafka.reachable().await?;
    kafka.check_marker_policy().await
}

async fn store(settings: &app::Settings) -> Result<Capabilities, Error> {
    let Some(bucket) = &settings.objects.bucket else {
        return Err(Error::Failed("LFS_BROKER_S3_BUCKET is not set, so the store cannot be tried".to_owned()));
    };
    Ok(Objects::connect(&settings.objects).await?.probe(bucket).await?)
}

/// What the store must do, and whether it does; browsers are told of only.
fn told(found: &Capabilities) -> [(bool, &'static str); 6] {
    let cors = match found.answers_cors {
        Some(true) => "answers browsers (CORS)",
        Some(false) => "does not answer browsers (no CORS rule): browsers cannot upload",
        None => "its public endpoint cannot be reached from here, so CORS was not tried",
    };
    [
        (found.keeps_token, "keeps the write token"),
        (found.refuses_wrong_bytes, "refuses wrong bytes"),
        (found.refuses_other_size, "refuses another size"),
        (found.refuses_overwrite, "refuses an overwrite"),
        (found.refuses_copy_source(), "refuses an unsigned copy-source"),
        (true, cors),
    ]
}
