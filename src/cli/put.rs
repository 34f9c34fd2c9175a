//! `put`: uploads files or standard input, and prints the broker's answer with the pointer and the record.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lfs_broker_client::api::{Completed, ErrorCode, Headers, Mode, Policy, ReadUpload, UploadState};
use lfs_broker_client::{self as client, Client, UploadOptions};
use uuid::Uuid;

use super::output::{ProgressReporter, print_data, print_note, shell_path, shell_quote, to_json};
use super::{Connection, Error, shutdown_signal};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The files to upload; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The topic of the pointers
    #[arg(long)]
    topic: String,
    /// The key of the records
    #[arg(long)]
    key: Option<OsString>,
    /// A header of the records; may repeat
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// The media type of the files
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// Wait until the pointer is in Kafka; otherwise return as soon as the upload is verified
    #[arg(long)]
    wait: bool,
    /// The longest wait, in seconds
    #[arg(long, value_name = "N", default_value_t = 3600, requires = "wait")]
    wait_seconds: u64,
    /// Resume an interrupted upload
    #[arg(long, value_name = "ID")]
    resume: Option<Uuid>,
    #[command(flatten)]
    connection: Connection,
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a header must have the form NAME=VALUE".to_owned()),
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
        return Err(Error::Usage("--resume needs exactly one file, and cannot use standard input".to_owned()));
    }
    if arguments.files.iter().filter(|file| is_stdin(file)).count() > 1 {
        return Err(Error::Usage("standard input can be read only once".to_owned()));
    }
    let mut names = BTreeSet::new();
    if let Some((name, _)) = arguments.headers.iter().find(|(name, _)| !names.insert(name)) {
        return Err(Error::Usage(format!("--header {name} is given twice, but an upload has each header at most once")));
    }
    let client = arguments.connection.client()?;
    let min_bytes = min_bytes(&client, &arguments.topic).await?;
    let mut shutdown = pin!(shutdown_signal());
    let mut failed = Vec::new();
    for (number, file) in arguments.files.iter().enumerate() {
        let upload = put_one(&client, &arguments, file, shutdown.as_mut()).await;
        let outcome = upload.and_then(|completed| print_outcome(&arguments, file, min_bytes, &completed));
        match outcome {
            Ok(()) => {}
            Err(error) if arguments.files.len() > 1 && error.concerns_one_file() => {
                error.print_with_hint();
                failed.push(error);
            }
            Err(error) => {
                print_not_started(&arguments.files[number + 1..]);
                return Err(error);
            }
        }
    }
    let failed_count = failed.len();
    match failed.into_iter().next() {
        Some(first) => Err(Error::Files { failed: failed_count, total: arguments.files.len(), first: Box::new(first) }),
        None => Ok(()),
    }
}

/// Prints the broker's answer to stdout, and advice to stderr.
fn print_outcome(arguments: &Arguments, file: &Path, min_bytes: u64, completed: &Completed) -> Result<(), Error> {
    print_data(&to_json(completed))?;
    let (topic, name) = (&arguments.topic, display_name(file));
    let size = completed.pointer.as_ref().map(|pointer| pointer.size);
    if let Some(size) = size.filter(|size| *size < min_bytes && !arguments.json()) {
        print_note(&format!(
            "note: {name} has {size} bytes, and {topic} advises uploads from {min_bytes} on (min_bytes): \
             smaller data fits into a record"
        ));
    }
    match completed.state {
        UploadState::Verified if arguments.wait => {
            let (id, seconds) = (completed.id, arguments.wait_seconds);
            Err(Error::Failed(format!(
                "{name}: upload {id} is verified, but not yet in Kafka after {seconds} s; it will be published"
            )))
        }
        _ => Ok(()),
    }
}

/// Prints the files whose upload was not started because of an earlier error.
fn print_not_started(files: &[PathBuf]) {
    if !files.is_empty() {
        let names: Vec<String> = files.iter().map(|file| shell_path(file)).collect();
        print_note(&format!("note: not started: {}", names.join(" ")));
    }
}

/// The smallest size for which the policy of the topic advises an upload.
async fn min_bytes(client: &Client, topic: &str) -> Result<u64, Error> {
    match client.topic(topic).await {
        Ok(policy) => Ok(policy.min_bytes),
        Err(error) if error.is_problem(ErrorCode::TopicNotFound) => Ok(Policy::default().min_bytes),
        // The broker is unreachable. Without this error the upload would fail only after all retries were repeated.
        Err(error @ client::Error::Unreachable { .. }) => Err(error.into()),
        // The size is only advice. The broker decides at open whether the upload is allowed.
        Err(_) => Ok(0),
    }
}

async fn put_one(
    client: &Client,
    arguments: &Arguments,
    file: &Path,
    shutdown: Pin<&mut impl Future<Output = ()>>,
) -> Result<Completed, Error> {
    let name = display_name(file);
    let reporter = Arc::new(ProgressReporter::new(&name, arguments.json()));
    let opened = Arc::new(OnceLock::new());
    let (opened_by_broker, open_reporter, progress_reporter) =
        (Arc::clone(&opened), Arc::clone(&reporter), Arc::clone(&reporter));
    let uploader = client
        .upload(arguments.options())
        .on_open(move |upload| {
            // A retried open calls this again with the same upload.
            let is_first = opened_by_broker.set((upload.id, upload.mode)).is_ok();
            if is_first && upload.mode == Mode::Multipart {
                // If the program is killed, the user needs the id to resume the upload.
                open_reporter.eprintln_always(&format!("upload {}", upload.id));
            }
        })
        .on_progress(move |progress| {
            let parts = (progress.parts_done, progress.parts_total);
            progress_reporter.report_parts(progress.bytes_done, progress.bytes_total, parts);
        });
    let upload = async {
        match arguments.resume {
            Some(id) => uploader.resume(id, file).await,
            None if is_stdin(file) => uploader.spooled(tokio::io::stdin()).await,
            None => uploader.file(file).await,
        }
    };
    let outcome = tokio::select! {
        outcome = upload => Some(outcome),
        () = shutdown => None,
    };
    reporter.clear();
    // Only a multipart upload of a file can be resumed. A single PUT starts again, and standard input cannot be read twice.
    let resumable = opened.get().filter(|(_, mode)| *mode == Mode::Multipart && !is_stdin(file)).map(|(id, _)| *id);
    match (outcome, resumable) {
        (Some(Ok(completed)), _) => {
            reporter.finish(&outcome_text(&completed));
            Ok(completed)
        }
        (Some(Err(source)), Some(id)) if source.is_transient() || is_unauthorized(&source) => {
            Err(Error::Upload { source, resume_command: resume_command(arguments, file, id) })
        }
        (Some(Err(source)), _) => Err(Error::file(source, &name)),
        (None, Some(id)) => {
            let outcome = match unless_interrupted(client.read(id, &ReadUpload::default())).await {
                Some(Ok(upload)) => format!("upload {id} is {}", upload.state),
                _ => format!("upload {id} was not changed"),
            };
            Err(Error::Interrupted { outcome, resume_command: Some(resume_command(arguments, file, id)) })
        }
        (None, None) => {
            let outcome = match opened.get() {
                Some((id, _)) => abort(client, *id).await,
                None => "nothing was uploaded".to_owned(),
            };
            Err(Error::Interrupted { outcome, resume_command: None })
        }
    }
}

/// Aborts an upload and returns the outcome as text.
async fn abort(client: &Client, id: Uuid) -> String {
    match unless_interrupted(client.abort(id)).await {
        Some(Ok(())) => format!("upload {id} was aborted"),
        Some(Err(error)) if error.is_problem(ErrorCode::StateConflict) => {
            format!("upload {id} is already verified, so its pointer will be published")
        }
        Some(Err(error)) if error.is_problem(ErrorCode::CompletionInProgress) => {
            format!("upload {id} was not aborted, because the broker is completing it")
        }
        _ => format!("upload {id} could not be aborted; it will expire"),
    }
}

/// The output of the future; `None` if another signal arrives first.
async fn unless_interrupted<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        output = future => Some(output),
        () = shutdown_signal() => None,
    }
}

/// Whether the token was rejected, for example because it expired. With another token the upload can be resumed.
fn is_unauthorized(error: &client::Error) -> bool {
    error.problem().is_some_and(|problem| problem.status == 401)
}

fn resume_command(arguments: &Arguments, file: &Path, id: Uuid) -> String {
    let (file, topic) = (shell_path(file), shell_quote(&arguments.topic));
    let broker = shell_quote(&arguments.connection.broker);
    let wait = if arguments.wait { " --wait" } else { "" };
    format!("lfs-broker put {file} --topic {topic} --resume {id}{wait} --broker {broker}")
}

fn outcome_text(completed: &Completed) -> String {
    let integrity = completed.integrity.map_or("unknown", |integrity| integrity.name());
    match &completed.record {
        Some(record) => {
            format!(
                "published to {}, partition {}, offset {}; verified by {integrity}",
                record.topic, record.partition, record.offset
            )
        }
        None if completed.state == UploadState::Verified => format!("verified by {integrity}; its pointer will be published"),
        None => completed.state.to_string(),
    }
}

fn display_name(file: &Path) -> String {
    if is_stdin(file) { "standard input".to_owned() } else { file.display().to_string() }
}

fn is_stdin(file: &Path) -> bool {
    file.as_os_str() == "-"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changes_during_its_upload_does_not_stop_the_other_files() {
        let concerns_one_file = |status, code: &str| {
            let source = client::Error::Storage { status, code: code.to_owned(), message: String::new() };
            Error::file(source, "a").concerns_one_file()
        };
        assert!(concerns_one_file(400, "BadDigest"));
        assert!(!concerns_one_file(403, "AccessDenied"), "the next file would fail with the same error");
    }
}
