//! `get`: downloads the object of a pointer, and verifies the bytes while they arrive.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::Arc;

use lfs_broker_client::api::ReadUpload;
use lfs_broker_client::json_words::in_words;
use lfs_broker_client::{Client, Download};
use serde::Deserialize as _;
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use uuid::Uuid;

use super::connection::{Connection, upload_id};
use super::output::{ProgressReporter, format_size, print_data};
use super::{Error, remove_partial_downloads, shutdown_signal};

/// The longest input. Every pointer is much shorter, so a longer input is not a pointer.
const MAX_INPUT_BYTES: u64 = 64 << 10;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Use the pointer of this upload instead of a pointer from standard input
    #[arg(long, value_name = "ID", value_parser = upload_id)]
    upload: Option<Uuid>,
    /// The output file, which appears only after all bytes are verified [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The version of the object: the record's header `lfs-version-id`
    #[arg(long, value_name = "ID")]
    version_id: Option<String>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

impl Arguments {
    pub(super) fn json(&self) -> bool {
        self.connection.json
    }
}

pub(super) async fn get(arguments: Arguments) -> Result<(), Error> {
    let outcome = match arguments.output {
        Some(_) => "nothing was written",
        None => "the written bytes are incomplete",
    };
    tokio::select! {
        result = fetch(arguments) => result,
        // The dropped download removes its partial file.
        () = shutdown_signal() => Err(Error::Interrupted { outcome: outcome.to_owned(), resume_command: None }),
    }
}

async fn fetch(arguments: Arguments) -> Result<(), Error> {
    let client = arguments.connection.client()?;
    let value = match arguments.upload {
        Some(id) => pointer_of(&client, id).await?,
        None => pointer_from_stdin().await?,
    };
    let download = client.fetch_version(&value, arguments.version_id.as_deref()).await?;
    let Some(output) = &arguments.output else { return copy(download, tokio::io::stdout()).await };
    let name = output.display().to_string();
    // A symbolic link remains, and its target is replaced.
    let path = output.canonicalize().unwrap_or_else(|_| output.clone());
    if path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        // A device or a pipe is written to and not replaced.
        let device = tokio::fs::OpenOptions::new().write(true).open(&path).await.map_err(Error::Output)?;
        return copy(download, device).await;
    }
    if path.is_dir() {
        return Err(Error::Failed(format!("{name} is a directory: --output needs the name of a file")));
    }
    remove_partial_downloads(path.parent());
    let (size, verified) = (download.size(), download.digest().is_some());
    let sha256 = download.pointer().and_then(|pointer| pointer.sha256);
    let integrity = download.resolved().and_then(|resolved| resolved.integrity);
    let reporter = Arc::new(ProgressReporter::new(&name, arguments.json()));
    let progress_reporter = Arc::clone(&reporter);
    let result = download.on_progress(move |done_bytes| progress_reporter.report(done_bytes, size)).to_file(path).await;
    reporter.clear();
    result.map_err(|error| Error::file(error, &name))?;
    let verification = if verified { "verified" } else { "the pointer has no checksum, so the bytes could not be verified" };
    reporter.finish(&format!("{}, {verification}", format_size(size)));
    if arguments.json() {
        let mut line = serde_json::json!({"path": name, "size": size, "sha256": sha256, "integrity": integrity});
        if !verified {
            line["verified"] = false.into();
        }
        print_data(&line.to_string())?;
    }
    Ok(())
}

async fn copy(mut download: Download, mut output: impl AsyncWrite + Unpin) -> Result<(), Error> {
    while let Some(chunk) = download.chunk().await? {
        output.write_all(&chunk).await.map_err(Error::Output)?;
    }
    output.flush().await.map_err(Error::Output)
}

async fn pointer_of(client: &Client, id: Uuid) -> Result<Vec<u8>, Error> {
    let upload = client.read(id, &ReadUpload::default()).await?;
    match upload.pointer {
        Some(pointer) => Ok(pointer.to_json().into_bytes()),
        None => Err(Error::Failed(format!("upload {id} is {}: it has no pointer", upload.state))),
    }
}

/// The pointer from standard input: the value of a record, or a line that `put` printed, which has the pointer as a member.
async fn pointer_from_stdin() -> Result<Vec<u8>, Error> {
    if std::io::stdin().is_terminal() {
        return Err(Error::Usage("no pointer is given: pass one on standard input, or use --upload ID".to_owned()));
    }
    let mut value = Vec::new();
    let read = tokio::io::stdin().take(MAX_INPUT_BYTES).read_to_end(&mut value).await;
    read.map_err(|error| Error::Failed(format!("cannot read standard input: {error}")))?;
    let value = value.trim_ascii();
    if value.is_empty() {
        return Err(Error::Failed("standard input is empty: pass a pointer on it, or use --upload ID".to_owned()));
    }
    let mut values = serde_json::Deserializer::from_slice(value).into_iter::<serde_json::Value>();
    let (completed, next) = (values.next().and_then(Result::ok), values.next());
    if completed.is_some() && matches!(next, Some(Ok(_))) {
        return Err(Error::Usage("standard input has more than one pointer: pass one, for example with `head -n 1`".to_owned()));
    }
    // Input that only starts with valid JSON is not a pointer.
    let completed = completed.filter(|_| next.is_none());
    match completed.as_ref().and_then(|completed| completed.get("pointer")) {
        // Parse the member as a pointer, because a JSON map would change the order of its members.
        Some(pointer) if completed.as_ref().is_some_and(|completed| completed.get("kfs_lfs").is_none()) => {
            let pointer = lfs_broker_client::pointer::Pointer::deserialize(pointer);
            Ok(pointer
                .map_err(|error| Error::Failed(format!("the pointer cannot be read: {}", in_words(&error.to_string()))))?
                .to_json()
                .into_bytes())
        }
        _ => Ok(value.to_vec()),
    }
}
