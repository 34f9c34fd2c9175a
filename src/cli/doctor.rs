//! `doctor`: tries what uploads need on the real servers, and says what is wrong and why.

use std::fmt::Display;

use serde::Serialize;
use uuid::Uuid;

use super::{Error, talk};
use crate::app;
use crate::kafka::{CheckError, Kafka};
use crate::objects::{Capabilities, Objects};
use crate::store::{self, Store};

/// How much a finding matters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Ok,
    /// A risk that the settings accept, or that the broker itself deals with.
    Warn,
    Fail,
}

/// What was looked at, and what it came to.
#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    /// It works, and somebody should know.
    warning: bool,
    text: String,
}

/// All that `doctor` found; with `--json` it is printed whole, whatever is away.
#[derive(Serialize)]
struct Findings {
    ok: bool,
    checks: Vec<Check>,
    /// What the store was seen to do, if it could be tried.
    capabilities: Option<Capabilities>,
    #[serde(skip)]
    json: bool,
}

impl Findings {
    /// Notes a check, and tells people at once: the next may take its time.
    fn add(&mut self, name: &'static str, level: Level, text: String) -> Result<(), Error> {
        let word = match level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        if !self.json {
            talk::data(&format!("{word} {name}: {text}"))?;
        }
        self.ok &= level != Level::Fail;
        self.checks.push(Check { name, ok: level != Level::Fail, warning: level == Level::Warn, text });
        Ok(())
    }

    fn add_outcome<E: Display>(&mut self, name: &'static str, outcome: Result<&str, E>) -> Result<(), Error> {
        match outcome {
            Ok(text) => self.add(name, Level::Ok, text.to_owned()),
            Err(error) => self.add(name, Level::Fail, error.to_string()),
        }
    }
}

pub(super) async fn doctor(settings: app::Settings, json: bool) -> Result<(), Error> {
    let mut found = Findings { ok: true, checks: Vec::new(), capabilities: None, json };
    found.add_outcome("settings", settings.check().map(|()| "sound"))?;
    let store = Store::connect(&settings.store);
    let database = async {
        let store = store.as_ref().map_err(ToString::to_string)?;
        database(store).await.map_err(|error| error.to_string())
    };
    found.add_outcome("database", database.await.map(|()| "reachable, schema current, takes writes"))?;
    let deployment = match &store {
        Ok(store) => store.deployment().await.map_or(Uuid::nil(), |deployment| deployment.id),
        Err(_) => Uuid::nil(),
    };
    let kafka = kafka(&settings, deployment).await;
    found.add_outcome("kafka", kafka.map(|()| "reachable, and a producer can write"))?;
    objects(&settings, store.as_ref().ok(), &mut found).await?;
    if json {
        talk::data(&talk::json(&found))?;
    }
    if found.ok { Ok(()) } else { Err(Error::Failed("something is not as the broker needs it".to_owned())) }
}

async fn database(store: &Store) -> Result<(), store::Error> {
    store.check_schema().await?;
    store.check_write().await
}

async fn kafka(settings: &app::Settings, deployment: Uuid) -> Result<(), CheckError> {
    Kafka::connect(&settings.kafka)?.check(deployment).await
}

/// Tries the default bucket out, or else the first that a policy names; and a PUT into each other that policies name.
async fn objects(settings: &app::Settings, store: Option<&Store>, found: &mut Findings) -> Result<(), Error> {
    let objects = match Objects::connect(&settings.objects).await {
        Ok(objects) => objects,
        Err(error) => return found.add("s3", Level::Fail, error.to_string()),
    };
    let mut buckets: Vec<String> = settings.objects.bucket.iter().cloned().collect();
    if let Some(store) = store {
        let named = store.policy_buckets().await.unwrap_or_default();
        buckets.extend(named.into_iter().filter(|bucket| Some(bucket) != settings.objects.bucket.as_ref()));
    }
    let Some((first, others)) = buckets.split_first() else {
        let text = "LFS_BROKER_S3_BUCKET is not set and no policy names a bucket, so the store cannot be tried";
        return found.add("s3", Level::Fail, text.to_owned());
    };
    match objects.probe(first).await {
        Ok(capabilities) => {
            for (level, text) in told(&capabilities, settings.must_refuse_copy_source()) {
                let text = if level == Level::Ok { text.to_owned() } else { format!("NOT: {text}") };
                found.add("s3", level, text)?;
            }
            found.capabilities = Some(capabilities);
        }
        Err(error) => found.add("s3", Level::Fail, format!("bucket {first}: {error}"))?,
    }
    for bucket in others {
        let text = format!("bucket {bucket}, which a policy names, takes a signed PUT");
        let outcome =
            objects.try_put(bucket, None).await.map(|()| text.as_str()).map_err(|error| format!("bucket {bucket}: {error}"));
        found.add_outcome("s3", outcome)?;
    }
    Ok(())
}

/// What the store must do, and whether it does. `serve` starts on a store that accepts a copy-source unless that is a risk
/// nobody accepted; other things complete refuses later; browsers are told of only.
fn told(found: &Capabilities, must_refuse_copy_source: bool) -> Vec<(Level, &'static str)> {
    let must = |is_so: bool| if is_so { Level::Ok } else { Level::Fail };
    let may = |is_so: bool| if is_so { Level::Ok } else { Level::Warn };
    let copy = if must_refuse_copy_source { must } else { may };
    let mut told = vec![
        (must(found.keeps_token), "keeps the write token"),
        (must(found.refuses_wrong_bytes), "refuses wrong bytes"),
        (must(found.refuses_other_size), "refuses another size"),
        (must(found.refuses_overwrite), "refuses an overwrite"),
        (copy(found.refuses_copy_source()), "refuses an unsigned copy-source"),
        (may(found.refuses_unsigned_acl), "keeps objects private whatever x-amz-acl says"),
        (
            may(found.refuses_unsigned_checksum_algorithm),
            "holds a PUT to its signed checksum whatever x-amz-checksum-algorithm says",
        ),
    ];
    if !(found.refuses_unsigned_content_encoding && found.refuses_unsigned_tagging && found.refuses_unsigned_storage_class) {
        told.push((Level::Ok, "stores headers that were not signed (encoding, tags or class): complete refuses such objects"));
    }
    if found.object_lock {
        told.push((Level::Ok, "has Object Lock: what failed uploads leave stays until its retention ends"));
    }
    let cors = match found.answers_cors {
        Some(true) => "answers browsers (CORS)",
        Some(false) => "does not answer browsers (no CORS rule): browsers cannot upload",
        None => "its public endpoint cannot be reached from here, so CORS was not tried",
    };
    told.push((Level::Ok, cors));
    told
}
