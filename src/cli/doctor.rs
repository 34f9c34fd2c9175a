//! `doctor`: tests the servers that uploads need, and prints which of them fails and why.

use std::fmt::Display;

use serde::Serialize;
use uuid::Uuid;

use super::Error;
use super::output::{print_data, to_json};
use crate::app;
use crate::kafka::{CheckError, Kafka};
use crate::objects::{Capabilities, Objects};
use crate::store::{self, Store};

/// The result of a check.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Ok,
    /// A risk that the settings accept, or that the broker handles.
    Warn,
    Fail,
}

/// One check and its result.
#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    /// The check passes, but there is a risk that the operator should know.
    warning: bool,
    text: String,
}

/// The results of all checks. With `--json` they are printed as one object, also if a server is unreachable.
#[derive(Serialize)]
struct Results {
    ok: bool,
    checks: Vec<Check>,
    /// The result of the probe of the S3 store, if it ran.
    capabilities: Option<Capabilities>,
    #[serde(skip)]
    json: bool,
}

impl Results {
    /// Adds a check and prints it at once, because the next check may take long.
    fn add(&mut self, name: &'static str, level: Level, text: String) -> Result<(), Error> {
        let label = match level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        if !self.json {
            print_data(&format!("{label} {name}: {text}"))?;
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
    let mut results = Results { ok: true, checks: Vec::new(), capabilities: None, json };
    results.add_outcome("settings", settings.check().map(|()| "valid"))?;
    let store = Store::connect(&settings.store);
    let database = async {
        let store = store.as_ref().map_err(ToString::to_string)?;
        database(store).await.map_err(|error| error.to_string())
    };
    results.add_outcome("database", database.await.map(|()| "reachable, schema current, takes writes"))?;
    let deployment = match &store {
        Ok(store) => store.deployment().await.map_or(Uuid::nil(), |deployment| deployment.id),
        Err(_) => Uuid::nil(),
    };
    let kafka = kafka(&settings, deployment).await;
    results.add_outcome("kafka", kafka.map(|()| "reachable, and a producer can write"))?;
    objects(&settings, store.as_ref().ok(), &mut results).await?;
    if json {
        print_data(&to_json(&results))?;
    }
    let failed = results.checks.iter().filter(|check| !check.ok).count();
    if results.ok { Ok(()) } else { Err(Error::Failed(format!("{failed} of {} checks failed", results.checks.len()))) }
}

async fn database(store: &Store) -> Result<(), store::Error> {
    store.check_schema().await?;
    store.check_write().await
}

async fn kafka(settings: &app::Settings, deployment: Uuid) -> Result<(), CheckError> {
    Kafka::connect(&settings.kafka)?.check(deployment).await
}

/// Probes the default bucket, or else the first bucket of a policy. Then puts one object into each other bucket of a policy.
async fn objects(settings: &app::Settings, store: Option<&Store>, results: &mut Results) -> Result<(), Error> {
    let objects = match Objects::connect(&settings.objects).await {
        Ok(objects) => objects,
        Err(error) => return results.add("s3", Level::Fail, error.to_string()),
    };
    let mut buckets: Vec<String> = settings.objects.bucket.iter().cloned().collect();
    if let Some(store) = store {
        let policy_buckets = store.policy_buckets().await.unwrap_or_default();
        buckets.extend(policy_buckets.into_iter().filter(|bucket| Some(bucket) != settings.objects.bucket.as_ref()));
    }
    let Some((first, others)) = buckets.split_first() else {
        let text = "LFS_BROKER_S3_BUCKET is not set and no policy names a bucket, so the store cannot be tested";
        return results.add("s3", Level::Fail, text.to_owned());
    };
    match objects.probe(first).await {
        Ok(capabilities) => {
            for (level, text) in store_checks(&capabilities, settings.must_refuse_copy_source()) {
                let text = if level == Level::Ok { text.to_owned() } else { format!("NOT: {text}") };
                results.add("s3", level, text)?;
            }
            results.capabilities = Some(capabilities);
        }
        Err(error) => results.add("s3", Level::Fail, format!("bucket {first}: {error}"))?,
    }
    for bucket in others {
        let text = format!("bucket {bucket}, which a policy names, accepts a presigned PUT");
        let put = objects.probe_put(bucket, None).await;
        let outcome = put.map(|()| text.as_str()).map_err(|error| format!("bucket {bucket}: {error}"));
        results.add_outcome("s3", outcome)?;
    }
    Ok(())
}

/// The requirements for the store and their results. An accepted copy-source fails only if the settings do not accept this
/// risk. `complete` rejects objects with unsigned headers later, so these pass. CORS is reported only.
fn store_checks(capabilities: &Capabilities, must_refuse_copy_source: bool) -> Vec<(Level, &'static str)> {
    let must = |holds: bool| if holds { Level::Ok } else { Level::Fail };
    let may = |holds: bool| if holds { Level::Ok } else { Level::Warn };
    let copy = if must_refuse_copy_source { must } else { may };
    let mut checks = vec![
        (must(capabilities.keeps_token), "keeps the write token"),
        (must(capabilities.refuses_wrong_bytes), "refuses wrong bytes"),
        (must(capabilities.refuses_other_size), "refuses another size"),
        (must(capabilities.refuses_overwrite), "refuses an overwrite"),
        (copy(capabilities.refuses_copy_source()), "refuses an unsigned copy-source"),
        (may(capabilities.refuses_unsigned_acl), "keeps objects private despite an unsigned x-amz-acl"),
        (
            may(capabilities.refuses_unsigned_checksum_algorithm),
            "enforces the signed checksum despite an unsigned x-amz-checksum-algorithm",
        ),
    ];
    if !(capabilities.refuses_unsigned_content_encoding
        && capabilities.refuses_unsigned_tagging
        && capabilities.refuses_unsigned_storage_class)
    {
        checks.push((Level::Ok, "stores unsigned headers (encoding, tags or storage class): complete rejects such objects"));
    }
    if capabilities.object_lock {
        checks.push((Level::Ok, "has Object Lock: objects of failed uploads remain until their retention ends"));
    }
    let cors = match capabilities.answers_cors {
        Some(true) => "allows uploads from browsers (CORS)",
        Some(false) => "has no CORS rule for other origins: browsers cannot upload",
        None => "its public endpoint cannot be reached from here, so CORS was not tested",
    };
    checks.push((Level::Ok, cors));
    checks
}
