//! `consume`: follows a topic and saves what its records stand for, each proved and whole before its place is noted.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::{Client, Value};
use serde_json::{Value as Json, json};

use super::{Config, Connection, Error, asked_to_end, log, talk};
use crate::kafka::{Follower, Incoming, Start};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The topic
    #[arg(long)]
    topic: String,
    /// Save files here, named after the record's topic, partition and offset
    #[arg(long, value_name = "DIRECTORY")]
    dir: PathBuf,
    /// The consumer group that remembers where it was; without one nothing is remembered
    #[arg(long)]
    group: Option<String>,
    /// Where to begin where nothing is remembered
    #[arg(long, value_enum, default_value = "earliest")]
    from: From,
    /// End after so many records
    #[arg(long, value_name = "N")]
    max_records: Option<u64>,
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
    let client = arguments.connection.client()?;
    let settings = arguments.config.load_kafka(arguments.kafka.as_deref())?;
    std::fs::create_dir_all(&arguments.dir).map_err(|error| unwritten(&arguments.dir, &error))?;
    let start = match arguments.from {
        From::Earliest => Start::Earliest,
        From::Latest => Start::Latest,
    };
    let follower = Follower::begin(&settings, &arguments.topic, arguments.group.as_deref(), start).await?;
    let outcome = follow(&client, &arguments, &follower).await;
    follower.end().await;
    outcome
}

/// Saves record after record, until there were enough or the end is asked for.
async fn follow(client: &Client, arguments: &Arguments, follower: &Follower) -> Result<(), Error> {
    let ending = asked_to_end();
    tokio::pin!(ending);
    let mut saved = 0;
    while arguments.max_records.is_none_or(|most| saved < most) {
        let record = tokio::select! {
            record = follower.next() => record?,
            () = &mut ending => break,
        };
        let Some(record) = record else { continue };
        // Ctrl-C in the middle leaves the record for the next time: its file appears only when it is whole.
        let told = tokio::select! {
            told = save(client, arguments, &record) => told?,
            () = &mut ending => break,
        };
        if let Some(told) = told {
            talk::data(&told.to_string())?;
        }
        if let Err(error) = follower.done(&record).await {
            // Whoever has the partition now saves the same bytes under the same name.
            eprintln!("note: the place after {} was not noted: {error}", place(&arguments.topic, &record));
        }
        saved += 1;
    }
    Ok(())
}

/// Saves what a record stands for; `None` for a tombstone, which stands for nothing.
async fn save(client: &Client, arguments: &Arguments, record: &Incoming) -> Result<Option<Json>, Error> {
    let place = place(&arguments.topic, record);
    let Some(value) = &record.value else {
        eprintln!("note: {place} is a tombstone");
        return Ok(None);
    };
    let pointer = match Value::of(value) {
        Ok(Value::Pointer(pointer)) => pointer,
        Ok(Value::Inline(bytes)) => {
            let path = arguments.dir.join(&place);
            write(&path, bytes).map_err(|error| unwritten(&path, &error))?;
            let sha256 = Some(Sha256::of(bytes).to_string());
            return Ok(Some(told(arguments, record, &path, bytes.len() as u64, sha256)));
        }
        Err(error) => return Err(Error::of_file(error.into(), &place)),
    };
    let version = record.headers.iter().find(|(name, _)| name == "lfs-version-id");
    let version = version.map(|(_, value)| String::from_utf8_lossy(value).into_owned());
    let of_record = |error| Error::of_file(error, &place);
    let download = client.fetch_version(value, version.as_deref()).await.map_err(of_record)?;
    let path = arguments.dir.join(format!("{place}{}", extension(download.resolved().filename.as_deref())));
    download.to_file(&path).await.map_err(of_record)?;
    Ok(Some(told(arguments, record, &path, pointer.size, pointer.sha256.map(|sha256| sha256.to_string()))))
}

fn told(arguments: &Arguments, record: &Incoming, path: &Path, size: u64, sha256: Option<String>) -> Json {
    let key = record.key.as_deref();
    let text = key.and_then(|key| std::str::from_utf8(key).ok());
    let mut line = json!({
        "topic": arguments.topic, "partition": record.partition, "offset": record.offset, "key": text,
        "path": path.display().to_string(), "size": size, "sha256": sha256,
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

/// Writes a file that appears only when it is whole and on disk.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    std::fs::File::open(directory)?.sync_all()
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
