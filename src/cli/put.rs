//! `put`: bytes up, the pointer's record out.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lfs_broker_client::api::{Completed, Headers, Mode, Policy, ReadUpload, UploadState};
use lfs_broker_client::{self as client, Client, UploadOptions};
use uuid::Uuid;

use super::talk::{self, Meter};
use super::{Connection, Error, asked_to_end};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// What to upload; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The topic that gets the pointers
    #[arg(long)]
    topic: String,
    /// The records' key
    #[arg(long)]
    key: Option<OsString>,
    /// A header of the records; may repeat
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// The bytes' media type
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// Wait until Kafka has the pointer; the broker's promise is enough otherwise
    #[arg(long)]
    wait: bool,
    /// How long to wait, in seconds
    #[arg(long, value_name = "N", default_value_t = 3600, requires = "wait")]
    wait_seconds: u64,
    /// Go on with an upload that was interrupted
    #[arg(long, value_name = "ID")]
    resume: Option<Uuid>,
    #[command(flatten)]
    connection: Connection,
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a header is NAME=VALUE".to_owned()),
    }
}

impl Arguments {
    pub(super) fn json(&self) -> bool {
        self.connection.json
    }

    fn options(&self) -> UploadOptions {
        UploadOptions {
            key: self.key.clone().map(OsString::into_encoded_bytes),
            headers: Headers(self.headers.clone()),
            content_type: self.content_type.clone(),
            wait_published: self.wait,
            wait_timeout: Duration::from_secs(self.wait_seconds),
            ..UploadOptions::to(&self.topic)
        }
    }
}

pub(super) async fn put(arguments: Arguments) -> Result<(), Error> {
    if arguments.resume.is_some() && (arguments.files.len() > 1 || is_stdin(&arguments.files[0])) {
        return Err(Error::Usage("--resume takes exactly one file, and not standard input".to_owned()));
    }
    if arguments.files.iter().filter(|file| is_stdin(file)).count() > 1 {
        return Err(Error::Usage("standard input can be read only once".to_owned()));
    }
    let mut names = BTreeSet::new();
    if let Some((twice, _)) = arguments.headers.iter().find(|(name, _)| !names.insert(name)) {
        return Err(Error::Usage(format!("--header names {twice} twice, and an upload has one of a name")));
    }
    let client = arguments.connection.client()?;
    let min_bytes = min_bytes(&client, &arguments.topic).await?;
    let mut end = pin!(asked_to_end());
    let mut failed = Vec::new();
    for (number, file) in arguments.files.iter().enumerate() {
        let done = put_one(&client, &arguments, file, end.as_mut()).await;
        let told = done.and_then(|completed| tell(&arguments, file, min_bytes, &completed));
        match told {
            Ok(()) => {}
            Err(error) if arguments.files.len() > 1 && error.is_of_one_file() => {
                error.tell();
                failed.push(error);
            }
            Err(error) => {
                tell_rest(&arguments.files[number + 1..]);
                return Err(error);
            }
        }
    }
    let count = failed.len();
    match failed.into_iter().next() {
        Some(first) => Err(Error::OfFiles { failed: count, of: arguments.files.len(), first: Box::new(first) }),
        None => Ok(()),
    }
}

/// Says what became of a file's upload: the answer to machines, advice to people.
fn tell(arguments: &Arguments, file: &Path, min_bytes: u64, completed: &Completed) -> Result<(), Error> {
    talk::data(&talk::json(completed))?;
    let (topic, name) = (&arguments.topic, name(file));
    let size = completed.pointer.as_ref().map(|pointer| pointer.size);
    if let Some(size) = size.filter(|size| *size < min_bytes && !arguments.json()) {
        talk::note(&format!(
            "note: {name} has {size} bytes, and {topic} advises uploads from {min_bytes} on (min_bytes): \
             it could be a record's own value"
        ));
    }
    match completed.state {
        UploadState::Verified if arguments.wait => {
            let (id, seconds) = (completed.id, arguments.wait_seconds);
            Err(Error::Failed(format!("{name}: upload {id} is promised, and not yet in Kafka after {seconds} s")))
        }
        _ => Ok(()),
    }
}

/// Says which files wait until the reason is gone.
fn tell_rest(files: &[PathBuf]) {
    if !files.is_empty() {
        let names: Vec<String> = files.iter().map(|file| talk::file(file)).collect();
        talk::note(&format!("note: not begun: {}", names.join(" ")));
    }
}

/// From how many bytes on the topic's policy advises an upload.
async fn min_bytes(client: &Client, topic: &str) -> Result<u64, Error> {
    match client.topic(topic).await {
        Ok(policy) => Ok(policy.min_bytes),
        Err(error) if error.is_problem("topic-not-found") => Ok(Policy::default().min_bytes),
        // Where nobody answers, the upload would find it out after the same patience once more.
        Err(error @ client::Error::Unreachable { .. }) => Err(error.into()),
        // It is only advice: whether the upload may be is not decided here.
        Err(_) => Ok(0),
    }
}

async fn put_one(
    client: &Client,
    arguments: &Arguments,
    file: &Path,
    end: Pin<&mut impl Future<Output = ()>>,
) -> Result<Completed, Error> {
    let name = name(file);
    let meter = Arc::new(Meter::new(&name, arguments.json()));
    let (opened, progress) = (Arc::new(OnceLock::new()), Arc::clone(&meter));
    let (found, told) = (Arc::clone(&opened), Arc::clone(&meter));
    let uploader = client
        .upload(arguments.options())
        .on_open(move |upload| {
            // A replayed open says the same again.
            let first = found.set((upload.id, upload.mode)).is_ok();
            if first && upload.mode == Mode::Multipart {
                // Whoever kills the program needs it to go on.
                told.say_anyway(&format!("upload {}", upload.id));
            }
        })
        .on_progress(move |at| progress.tell_parts(at.bytes_done, at.bytes_total, (at.parts_done, at.parts_total)));
    let work = async {
        match arguments.resume {
            Some(id) => uploader.resume(id, file).await,
            None if is_stdin(file) => uploader.spooled(tokio::io::stdin()).await,
            None => uploader.file(file).await,
        }
    };
    let outcome = tokio::select! {
        outcome = work => Some(outcome),
        () = end => None,
    };
    meter.wipe();
    // Only parts of a file can be gone on with: a single PUT begins anew, and standard input is read.
    let kept = opened.get().filter(|(_, mode)| *mode == Mode::Multipart && !is_stdin(file)).map(|(id, _)| *id);
    match (outcome, kept) {
        (Some(Ok(completed)), _) => {
            meter.end(&ending(&completed));
            Ok(completed)
        }
        (Some(Err(source)), Some(id)) if source.is_transient() || is_signed_out(&source) => {
            Err(Error::Upload { source, resume: resume(arguments, file, id) })
        }
        (Some(Err(source)), _) => Err(Error::of_file(source, &name)),
        (None, Some(id)) => {
            let what = match hurried(client.read(id, &ReadUpload::default())).await {
                Some(Ok(upload)) => format!("upload {id} is {}", upload.state),
                _ => format!("upload {id} is left as it is"),
            };
            Err(Error::Interrupted { what, resume: Some(resume(arguments, file, id)) })
        }
        (None, None) => {
            let what = match opened.get() {
                Some((id, _)) => abort(client, *id).await,
                None => "nothing was uploaded".to_owned(),
            };
            Err(Error::Interrupted { what, resume: None })
        }
    }
}

/// Takes an upload back, and says what became of it.
async fn abort(client: &Client, id: Uuid) -> String {
    match hurried(client.abort(id)).await {
        Some(Ok(())) => format!("upload {id} was aborted"),
        Some(Err(error)) if error.is_problem("state-conflict") => {
            format!("upload {id} is promised: its pointer will reach Kafka")
        }
        Some(Err(error)) if error.is_problem("completion-in-progress") => format!("upload {id} is being completed"),
        _ => format!("upload {id} could not be aborted; it expires by itself"),
    }
}

/// What came of it, unless somebody asks to end once more.
async fn hurried<T>(work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        done = work => Some(done),
        () = asked_to_end() => None,
    }
}

/// Whether the token ended on the way: with another the upload goes on.
fn is_signed_out(error: &client::Error) -> bool {
    error.problem().is_some_and(|problem| problem.status == 401)
}

fn resume(arguments: &Arguments, file: &Path, id: Uuid) -> String {
    let (file, topic) = (talk::file(file), talk::quoted(&arguments.topic));
    let broker = talk::quoted(&arguments.connection.broker);
    let wait = if arguments.wait { " --wait" } else { "" };
    format!("lfs-broker put {file} --topic {topic} --resume {id}{wait} --broker {broker}")
}

fn ending(completed: &Completed) -> String {
    let proof = completed.integrity.map_or("unknown", |integrity| integrity.name());
    match &completed.record {
        Some(record) => {
            format!("in {} at partition {}, offset {}, proved by {proof}", record.topic, record.partition, record.offset)
        }
        None if completed.state == UploadState::Verified => format!("proved by {proof}; its pointer will reach Kafka"),
        None => completed.state.to_string(),
    }
}

fn name(file: &Path) -> String {
    if is_stdin(file) { "standard input".to_owned() } else { file.display().to_string() }
}

fn is_stdin(file: &Path) -> bool {
    file.as_os_str() == "-"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changed_while_it_was_sent_ends_no_batch() {
        let of_storage = |status, code: &str| {
            let source = client::Error::Storage { status, code: code.to_owned(), message: String::new() };
            Error::of_file(source, "a").is_of_one_file()
        };
        assert!(of_storage(400, "BadDigest"));
        assert!(!of_storage(403, "AccessDenied"), "the next file would meet the same");
    }
}
