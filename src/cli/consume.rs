//! `consume`: consumes a topic and saves the data of each record. It commits an offset only after the file is verified and
//! complete.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lfs_broker_client::api::SignedRequest;
use lfs_broker_client::consumer::Content;
use lfs_broker_client::{self as client, Access, Consumer, ObjectLocation, SavedFile};
use serde_json::{Value as Json, json};

use super::connection::Connection;
use super::output::{ProgressReporter, print_data, print_note, shell_quote};
use super::{Config, Error, init_logging, remove_partial_downloads, shutdown_signal};
use crate::config;
use crate::kafka::{self, ConsumerRecord, StartOffset, TopicConsumer};
use crate::objects::{self, Objects};

/// The lifetime of a presigned GET for a referenced object. After it expires, the client asks for a new URL.
const REFERENCE_URL_LIFETIME: Duration = Duration::from_secs(900);

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The topic
    #[arg(long)]
    topic: String,
    /// The directory for the files, which are named by topic, partition and offset
    #[arg(long, value_name = "DIRECTORY")]
    dir: PathBuf,
    /// The consumer group whose offsets are committed; without a group no offset is stored
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    group: Option<String>,
    /// The position to start from if no offset is stored
    #[arg(long, value_enum, default_value = "earliest")]
    from: From,
    /// Stop after this number of records
    #[arg(long, value_name = "N")]
    max_records: Option<u64>,
    /// The bucket of reference records (header `S3-REF-FILE-PATH`, no value), read with the AWS settings of the environment
    #[arg(long, value_name = "BUCKET")]
    reference_bucket: Option<String>,
    /// Kafka's bootstrap servers [default: KAFKA_BOOTSTRAP_SERVERS]
    #[arg(long, value_name = "HOST:PORT")]
    kafka: Option<String>,
    #[command(flatten)]
    config: Config,
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum From {
    Earliest,
    Latest,
}

pub(super) async fn consume(arguments: Arguments) -> Result<(), Error> {
    init_logging("lfs_broker=warn,error");
    let consumer = consumer(&arguments).await?;
    let settings = arguments.config.load_kafka(arguments.kafka.as_deref()).map_err(|error| match error {
        Error::Config(missing @ config::Error::Missing(_)) => Error::Usage(format!(
            "{missing}: name Kafka's servers with --kafka HOST:PORT; for a running `lfs-broker dev`, use the value of \
             kafka_bootstrap in its dev.json"
        )),
        error => error,
    })?;
    std::fs::create_dir_all(&arguments.dir).map_err(|error| write_error(&arguments.dir, &error))?;
    remove_partial_downloads(Some(&arguments.dir));
    let start = match arguments.from {
        From::Earliest => StartOffset::Earliest,
        From::Latest => StartOffset::Latest,
    };
    let follower = TopicConsumer::start(&settings, &arguments.topic, arguments.group.as_deref(), start).await;
    let follower = follower.map_err(|error| match error {
        kafka::Error::Unreachable(reason) => {
            kafka::Error::Unreachable(format!("no answer from {}: {reason}", settings.bootstrap_servers))
        }
        error => error,
    })?;
    let result = save_records(&consumer, &arguments, &follower, &settings.bootstrap_servers).await;
    follower.close().await;
    result
}

/// Saves records until the maximum is reached or a signal arrives.
async fn save_records(consumer: &Consumer, arguments: &Arguments, follower: &TopicConsumer, servers: &str) -> Result<(), Error> {
    let shutdown = shutdown_signal();
    tokio::pin!(shutdown);
    let (mut saved, mut is_unavailable) = (0, false);
    while arguments.max_records.is_none_or(|max_records| saved < max_records) {
        let record = tokio::select! {
            record = next_record(follower, &mut is_unavailable) => record?,
            () = &mut shutdown => break,
        };
        let Some(record) = record else { continue };
        // After Ctrl-C the next run saves this record again, because its file appears only when it is complete.
        let line = tokio::select! {
            line = save(consumer, arguments, &record) => {
                line.map_err(|error| with_skip_command(error, arguments, servers, &record))?
            }
            () = &mut shutdown => break,
        };
        if let Some(line) = line {
            print_data(&line.to_string())?;
        }
        if let Err(error) = follower.commit(&record).await {
            // The new owner of the partition saves the same bytes under the same name.
            let name = record_name(&arguments.topic, &record);
            print_note(&format!("note: the offset after {name} was not committed: {error}; the record may be saved again"));
        }
        saved += 1;
    }
    Ok(())
}

/// The next record, if one arrives within one poll. It prints once when Kafka becomes unavailable, and once when it returns.
async fn next_record(follower: &TopicConsumer, is_unavailable: &mut bool) -> Result<Option<ConsumerRecord>, Error> {
    let record = match follower.poll().await {
        Err(kafka::Error::Unreachable(reason)) => {
            // A single lost connection is no outage, because librdkafka opens another one.
            if !*is_unavailable && !follower.is_reachable().await {
                *is_unavailable = true;
                print_note(&format!("note: Kafka is unavailable ({reason}); waiting for it"));
            }
            return Ok(None);
        }
        record => record?,
    };
    if *is_unavailable && (record.is_some() || follower.is_reachable().await) {
        *is_unavailable = false;
        print_note("note: Kafka is available again");
    }
    Ok(record)
}

/// Adds the command that skips the record, if a retry cannot help because the object is missing or has other bytes.
fn with_skip_command(error: Error, arguments: &Arguments, servers: &str, record: &ConsumerRecord) -> Error {
    match (error, &arguments.group) {
        (Error::File { name, source }, Some(group))
            if source.is_corrupt() || matches!(source, client::Error::Gone(_) | client::Error::Missing) =>
        {
            Error::Record { record: name, source, skip_command: skip_command(servers, &arguments.topic, group, record) }
        }
        (error, _) => error,
    }
}

/// The command of Kafka's own tool that moves the offset of a group behind a record.
fn skip_command(servers: &str, topic: &str, group: &str, record: &ConsumerRecord) -> String {
    let (servers, partition, next) = (shell_quote(servers), record.partition, record.offset + 1);
    let group = shell_quote(group);
    format!(
        "kafka-consumer-groups.sh --bootstrap-server {servers} --group {group} --topic {topic}:{partition} \
         --reset-offsets --to-offset {next} --execute"
    )
}

/// The client that opens records. It also downloads reference records, if a bucket for them is named.
async fn consumer(arguments: &Arguments) -> Result<Consumer, Error> {
    let consumer = Consumer::new(arguments.connection.client()?);
    let Some(bucket) = &arguments.reference_bucket else { return Ok(consumer) };
    let objects = Objects::connect(&arguments.config.load_objects()?).await?;
    let access = Access::signed_by(move |requested: ObjectLocation| {
        let objects = objects.clone();
        async move {
            let location = objects::ObjectLocation { bucket: requested.bucket, key: requested.key };
            let version_id = requested.version_id.as_deref();
            let presigned = objects.presign_get(&location, version_id, None, None, REFERENCE_URL_LIFETIME).await;
            presigned.map(|url| SignedRequest::get(url.url, url.expires_in)).map_err(client::Error::signing)
        }
    });
    Ok(consumer.with_references(bucket, access)?)
}

/// Saves the data of a record and returns the output line; `None` for a tombstone, which has no data.
async fn save(consumer: &Consumer, arguments: &Arguments, record: &ConsumerRecord) -> Result<Option<Json>, Error> {
    let record_name = record_name(&arguments.topic, record);
    let record_error = |error| Error::file(error, &record_name);
    let headers = record.headers.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
    let content = consumer.open_record(&arguments.topic, record.value.as_deref(), headers).await.map_err(record_error)?.content;
    let (name, size, unverified) = match &content {
        Content::Pointer(download) | Content::Reference(download) => {
            let name = download.resolved().and_then(|resolved| resolved.filename.as_deref());
            (name, download.size(), download.digest().is_none())
        }
        Content::Tombstone | Content::Inline(_) => (None, 0, false),
    };
    let path = arguments.dir.join(format!("{record_name}{}", extension(name)));
    let reporter = Arc::new(ProgressReporter::new(&path.display().to_string(), arguments.connection.json));
    let progress_reporter = Arc::clone(&reporter);
    let saved = content.on_progress(move |done_bytes| progress_reporter.report(done_bytes, size)).save(&path).await;
    reporter.clear();
    let Some(saved) = saved.map_err(record_error)? else {
        print_note(&format!("note: {record_name} is a tombstone"));
        return Ok(None);
    };
    let mut line = output_line(arguments, record, &path, &saved);
    if unverified {
        print_note(&format!("note: {record_name} has no checksum, so its bytes could not be verified"));
        line["verified"] = false.into();
    }
    Ok(Some(line))
}

fn output_line(arguments: &Arguments, record: &ConsumerRecord, path: &Path, saved: &SavedFile) -> Json {
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

/// The unique name of a record, so that a repeated save writes the same file. The producer of the record can choose only the
/// extension of the file.
fn record_name(topic: &str, record: &ConsumerRecord) -> String {
    format!("{topic}-{}-{}", record.partition, record.offset)
}

fn extension(filename: Option<&str>) -> String {
    let extension = filename.and_then(|name| name.rsplit_once('.')).map(|(_, extension)| extension);
    let is_safe = |text: &&str| (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    extension.filter(is_safe).map(|text| format!(".{text}")).unwrap_or_default()
}

fn write_error(path: &Path, error: &std::io::Error) -> Error {
    Error::Failed(format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_of_a_producer_cannot_lead_to_another_directory() {
        for (name, expected) in [
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
            assert_eq!(extension(name), expected, "{name:?}");
        }
    }
}
