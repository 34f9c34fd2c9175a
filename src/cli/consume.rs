//! `consume`: follows a topic and saves what its records stand for, each proved and whole before its place is noted.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lfs_broker_client::api::SignedRequest;
use lfs_broker_client::consumer::Content;
use lfs_broker_client::{self as client, Access, Consumer, Place, Saved};
use serde_json::{Value as Json, json};

use super::talk::{self, Meter};
use super::{Config, Connection, Error, asked_to_end, log, sweep};
use crate::kafka::{self, Follower, Incoming, Start};
use crate::objects::{self, Objects};

/// How long a signed GET of a referenced object may be begun with; one that ran out is signed again.
const REFERENCE_LIFE: Duration = Duration::from_secs(900);

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The topic
    #[arg(long)]
    topic: String,
    /// Save files here, named after the record's topic, partition and offset
    #[arg(long, value_name = "DIRECTORY")]
    dir: PathBuf,
    /// The consumer group that remembers where it was; without one nothing is remembered
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    group: Option<String>,
    /// Where to begin where nothing is remembered
    #[arg(long, value_enum, default_value = "earliest")]
    from: From,
    /// End after so many records
    #[arg(long, value_name = "N")]
    max_records: Option<u64>,
    /// The bucket of records that are references (header `S3-REF-FILE-PATH`, no value); read with the AWS settings of the
    /// environment
    #[arg(long, value_name = "BUCKET")]
    reference_bucket: Option<String>,
    /// Kafka's bootstrap servers [default: KAFKA_BOOTSTRAP_SERVERS]
    #[arg(long, value_name = "HOST:PORT")]
    kafka: Option<String>,
    #[command(flatten)]
    config: Config,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum From {
    Earliest,
    Latest,
}

pub(super) async fn consume(arguments: Arguments) -> Result<(), Error> {
    log("lfs_broker=warn,error");
    let consumer = opener(&arguments).await?;
    let settings = arguments.config.load_kafka(arguments.kafka.as_deref())?;
    std::fs::create_dir_all(&arguments.dir).map_err(|error| unwritten(&arguments.dir, &error))?;
    sweep(Some(&arguments.dir));
    let start = match arguments.from {
        From::Earliest => Start::Earliest,
        From::Latest => Start::Latest,
    };
    let follower = Follower::begin(&settings, &arguments.topic, arguments.group.as_deref(), start).await?;
    let outcome = follow(&consumer, &arguments, &follower, &settings.bootstrap_servers).await;
    follower.end().await;
    outcome
}

/// Saves record after record, until there were enough or the end is asked for.
async fn follow(consumer: &Consumer, arguments: &Arguments, follower: &Follower, servers: &str) -> Result<(), Error> {
    let ending = asked_to_end();
    tokio::pin!(ending);
    let (mut saved, mut is_away) = (0, false);
    while arguments.max_records.is_none_or(|most| saved < most) {
        let record = tokio::select! {
            record = hear(follower, &mut is_away) => record?,
            () = &mut ending => break,
        };
        let Some(record) = record else { continue };
        // Ctrl-C in the middle leaves the record for the next time: its file appears only when it is whole.
        let told = tokio::select! {
            told = save(consumer, arguments, &record) => told.map_err(|error| held_up(error, arguments, servers, &record))?,
            () = &mut ending => break,
        };
        if let Some(told) = told {
            talk::data(&told.to_string())?;
        }
        if let Err(error) = follower.done(&record).await {
            // Whoever has the partition now saves the same bytes under the same name.
            talk::note(&format!("note: the place after {} was not noted: {error}", place(&arguments.topic, &record)));
        }
        saved += 1;
    }
    Ok(())
}

/// The next record, if one came within a moment. Kafka's absence is told once, and its return.
async fn hear(follower: &Follower, is_away: &mut bool) -> Result<Option<Incoming>, Error> {
    let heard = match follower.next().await {
        Err(kafka::Error::Unreachable(reason)) => {
            // One connection that ends is nothing yet: librdkafka makes another.
            if !*is_away && !follower.is_reached().await {
                *is_away = true;
                talk::note(&format!("note: Kafka is away ({reason}); waiting for it"));
            }
            return Ok(None);
        }
        heard => heard?,
    };
    if *is_away && (heard.is_some() || follower.is_reached().await) {
        *is_away = false;
        talk::note("note: Kafka is back");
    }
    Ok(heard)
}

/// What was promised and is not there any more, or is something else, stays so; all else may pass by itself.
fn held_up(error: Error, arguments: &Arguments, servers: &str, record: &Incoming) -> Error {
    match (error, &arguments.group) {
        (Error::OfFile { name: place, source }, Some(group))
            if source.is_corrupt() || matches!(source, client::Error::Gone(_) | client::Error::Missing) =>
        {
            Error::OfRecord { place, source, past: past(servers, &arguments.topic, group, record) }
        }
        (error, _) => error,
    }
}

/// How a group's place is moved behind a record that cannot be saved, by Kafka's own tool.
fn past(servers: &str, topic: &str, group: &str, record: &Incoming) -> String {
    let (servers, partition, next) = (talk::quoted(servers), record.partition, record.offset + 1);
    let group = talk::quoted(group);
    format!(
        "kafka-consumer-groups.sh --bootstrap-server {servers} --group {group} --topic {topic}:{partition} \
         --reset-offsets --to-offset {next} --execute"
    )
}

/// Opens records, and follows references where a bucket is named for them.
async fn opener(arguments: &Arguments) -> Result<Consumer, Error> {
    let consumer = Consumer::new(arguments.connection.client()?);
    let Some(bucket) = &arguments.reference_bucket else { return Ok(consumer) };
    let objects = Objects::connect(&arguments.config.load_objects()?).await?;
    let access = Access::signed_by(move |place: Place| {
        let objects = objects.clone();
        async move {
            let at = objects::Place { bucket: place.bucket, key: place.key };
            let signed = objects.sign_get(&at, place.version_id.as_deref(), None, None, REFERENCE_LIFE).await;
            signed.map(|signed| SignedRequest::get(signed.url, signed.expires_in)).map_err(client::Error::signing)
        }
    });
    Ok(consumer.with_references(bucket, access)?)
}

/// Saves what a record stands for; `None` for a tombstone, which stands for nothing.
async fn save(consumer: &Consumer, arguments: &Arguments, record: &Incoming) -> Result<Option<Json>, Error> {
    let place = place(&arguments.topic, record);
    let of_record = |error| Error::of_file(error, &place);
    let headers = record.headers.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
    let content = consumer.open_record(&arguments.topic, record.value.as_deref(), headers).await.map_err(of_record)?.content;
    let (name, size, unverified) = match &content {
        Content::Pointer(download) | Content::Reference(download) => {
            let name = download.resolved().and_then(|resolved| resolved.filename.as_deref());
            (name, download.size(), download.digest().is_none())
        }
        Content::Nothing | Content::Inline(_) => (None, 0, false),
    };
    let path = arguments.dir.join(format!("{place}{}", extension(name)));
    let meter = Arc::new(Meter::new(&path.display().to_string(), arguments.connection.json));
    let progress = Arc::clone(&meter);
    let saved = content.on_progress(move |done| progress.tell(done, size)).save(&path).await;
    meter.wipe();
    let Some(saved) = saved.map_err(of_record)? else {
        talk::note(&format!("note: {place} is a tombstone"));
        return Ok(None);
    };
    let mut line = told(arguments, record, &path, &saved);
    if unverified {
        talk::note(&format!("note: nothing says what the bytes of {place} must be: they could not be verified"));
        line["verified"] = false.into();
    }
    Ok(Some(line))
}

fn told(arguments: &Arguments, record: &Incoming, path: &Path, saved: &Saved) -> Json {
    let key = record.key.as_deref();
    let text = key.and_then(|key| std::str::from_utf8(key).ok());
    let mut line = json!({
        "topic": arguments.topic, "partition": record.partition, "offset": record.offset, "key": text,
        "path": path.display().to_string(), "size": saved.size, "sha256": saved.sha256,
    });
    if let (Some(key), None) = (key, text) {
        use base64::Engine as _;
        line["key_base64"] = base64::engine::general_purpose::STANDARD.encode(key).into();
    }
    line
}

/// A name of its own for every record: saved twice, it is the same file. Nothing of it comes from the record's producer
/// but an extension.
fn place(topic: &str, record: &Incoming) -> String {
    format!("{topic}-{}-{}", record.partition, record.offset)
}

fn extension(filename: Option<&str>) -> String {
    let extension = filename.and_then(|name| name.rsplit_once('.')).map(|(_, extension)| extension);
    let short = |text: &&str| (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    extension.filter(short).map(|text| format!(".{text}")).unwrap_or_default()
}

fn unwritten(path: &Path, error: &std::io::Error) -> Error {
    Error::Failed(format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_name_leads_elsewhere() {
        for (name, wanted) in [
            (Some("a.mp4"), ".mp4"),
            (Some("a.tar.gz"), ".gz"),
            (Some("a"), ""),
            (Some("a."), ""),
            (Some("a./../../etc/passwd"), ""),
            (Some("a.b/c"), ""),
            (Some("a.\0"), ""),
            (Some("a.muchtoolongforone"), ""),
            (None, ""),
        ] {
            assert_eq!(extension(name), wanted, "{name:?}");
        }
    }
}
