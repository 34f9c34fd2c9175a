//! `get`: a pointer in, its bytes out, proved while they pass.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::Arc;

use lfs_broker_client::api::ReadUpload;
use lfs_broker_client::{Client, Download};
use serde::Deserialize as _;
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use uuid::Uuid;

use super::talk::{self, Meter};
use super::{Connection, Error, asked_to_end, sweep};

/// Far more than any pointer: what is longer is the data itself, or something else altogether.
const POINTER_BYTES: u64 = 64 << 10;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Follow the pointer of this upload, not one from standard input
    #[arg(long, value_name = "ID")]
    upload: Option<Uuid>,
    /// Write here: appears only when it is whole and proved [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The version of the object: the record's header `lfs-version-id`
    #[arg(long, value_name = "ID")]
    version_id: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

impl Arguments {
    pub(super) fn json(&self) -> bool {
        self.connection.json
    }
}

pub(super) async fn get(arguments: Arguments) -> Result<(), Error> {
    let what = match arguments.output {
        Some(_) => "nothing was written",
        None => "what was written is not whole",
    };
    tokio::select! {
        outcome = fetch(arguments) => outcome,
        // What was dropped half-way removes its file.
        () = asked_to_end() => Err(Error::Interrupted { what: what.to_owned(), resume: None }),
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
    // A link stays one, and what it leads to is replaced.
    let path = output.canonicalize().unwrap_or_else(|_| output.clone());
    if path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        // A device or a pipe is written to, not replaced.
        let device = tokio::fs::OpenOptions::new().write(true).open(&path).await.map_err(Error::Output)?;
        return copy(download, device).await;
    }
    sweep(path.parent());
    let (size, verified) = (download.size(), download.digest().is_some());
    let sha256 = download.pointer().and_then(|pointer| pointer.sha256);
    let integrity = download.resolved().and_then(|resolved| resolved.integrity);
    let meter = Arc::new(Meter::new(&name, arguments.json()));
    let progress = Arc::clone(&meter);
    let outcome = download.on_progress(move |done| progress.tell(done, size)).to_file(path).await;
    meter.wipe();
    outcome.map_err(|error| Error::of_file(error, &name))?;
    let proof = if verified { "as promised" } else { "which is all that the pointer says of them: they could not be verified" };
    meter.end(&format!("{}, {proof}", talk::size(size)));
    if arguments.json() {
        let mut line = serde_json::json!({"path": name, "size": size, "sha256": sha256, "integrity": integrity});
        if !verified {
            line["verified"] = false.into();
        }
        talk::data(&line.to_string())?;
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

/// A record's value; what `put` prints has it as a member.
async fn pointer_from_stdin() -> Result<Vec<u8>, Error> {
    if std::io::stdin().is_terminal() {
        return Err(Error::Usage("no pointer: give one on standard input, or --upload ID".to_owned()));
    }
    let mut value = Vec::new();
    let read = tokio::io::stdin().take(POINTER_BYTES).read_to_end(&mut value).await;
    read.map_err(|error| Error::Failed(format!("cannot read standard input: {error}")))?;
    let value = value.trim_ascii();
    let mut values = serde_json::Deserializer::from_slice(value).into_iter::<serde_json::Value>();
    let (completed, next) = (values.next().and_then(Result::ok), values.next());
    if completed.is_some() && matches!(next, Some(Ok(_))) {
        return Err(Error::Usage("standard input has more than one pointer: give one, for instance by `head -n 1`".to_owned()));
    }
    // Data that only begins like JSON is no pointer.
    let completed = completed.filter(|_| next.is_none());
    match completed.as_ref().and_then(|completed| completed.get("pointer")) {
        // Read as a pointer first: a map would give it back in another order.
        Some(pointer) if completed.as_ref().is_some_and(|completed| completed.get("kfs_lfs").is_none()) => {
            let pointer = lfs_broker_client::pointer::Pointer::deserialize(pointer);
            Ok(pointer.map_err(|error| Error::Failed(format!("the pointer cannot be read: {error}")))?.to_json().into_bytes())
        }
        _ => Ok(value.to_vec()),
    }
}
