//! `serve`, `migrate` and `doctor`: the broker against real servers.

use super::{Error, asked_to_end, log};
use crate::app;
use crate::kafka::Kafka;
use crate::objects::Objects;
use crate::store::{self, Store};

pub(super) async fn serve(settings: app::Settings, check_only: bool) -> Result<(), Error> {
    if check_only {
        settings.check()?;
        eprintln!("the settings are sound");
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
    eprintln!("the schema is up to date");
    Ok(())
}

pub(super) async fn doctor(settings: app::Settings, json: bool) -> Result<(), Error> {
    let mut sound = true;
    let mut tell = |name: &str, outcome: Result<String, String>| {
        sound &= outcome.is_ok();
        let (mark, text) = match outcome {
            Ok(text) => ("ok  ", text),
            Err(text) => ("FAIL", text),
        };
        if !json {
            println!("{mark} {name}: {text}");
        }
    };
    let checked = settings.check().map(|()| "sound".to_owned()).map_err(|error| error.to_string());
    tell("settings", checked);
    let store = Store::connect(&settings.store)?;
    let schema = store.check_schema().await.map(|()| "reachable, schema current".to_owned()).map_err(|error| error.to_string());
    tell("database", schema);
    let kafka = Kafka::connect(&settings.kafka).map_err(|error| Error::Failed(error.to_string()))?;
    let reached = kafka.reachable().await.map(|()| "reachable".to_owned()).map_err(|error| error.to_string());
    tell("kafka", reached);
    let objects = Objects::connect(&settings.objects).await?;
    let Some(bucket) = objects.default_bucket() else {
        return Err(Error::Failed("LFS_BROKER_S3_BUCKET is not set, so the store cannot be tried".to_owned()));
    };
    match objects.probe(bucket).await {
        Ok(found) => {
            let yes = |ok: bool, text: &str| if ok { Ok(text.to_owned()) } else { Err(format!("NOT: {text}")) };
            tell("s3", yes(found.keeps_token, "keeps the write token"));
            tell("s3", yes(found.refuses_wrong_bytes, "refuses wrong bytes"));
            tell("s3", yes(found.refuses_other_size, "refuses another size"));
            tell("s3", yes(found.refuses_overwrite, "refuses an overwrite"));
            tell("s3", yes(found.refuses_copy_source(), "refuses an unsigned copy-source"));
            let cors = match found.answers_cors {
                Some(true) => "answers browsers (CORS)",
                Some(false) => "does not answer browsers (no CORS rule): browsers cannot upload",
                None => "its public endpoint cannot be reached from here, so CORS was not tried",
            };
            tell("s3", Ok(cors.to_owned()));
            if json {
                println!("{}", serde_json::to_string(&found).expect("capabilities are flags"));
            }
        }
        Err(error) => tell("s3", Err(error.to_string())),
    }
    if sound { Ok(()) } else { Err(Error::Failed("something is not as the broker needs it".to_owned())) }
}
