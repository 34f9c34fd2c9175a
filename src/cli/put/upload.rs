//! The upload of one file: progress, the command that resumes it, and the abort after a signal.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use lfs_broker_client::api::{Completed, ErrorCode, Mode, ReadUpload, UploadState};
use lfs_broker_client::{self as client, Client};
use uuid::Uuid;

use super::Arguments;
use super::files::{display_name, is_stdin};
use crate::cli::output::{ProgressReporter, shell_path, shell_quote};
use crate::cli::{Error, shutdown_signal};

pub(super) async fn upload(
    client: &Client,
    arguments: &Arguments,
    file: &Path,
    shutdown: impl Future<Output = ()>,
) -> Result<Completed, Error> {
    let name = display_name(file);
    let reporter = Arc::new(ProgressReporter::new(&name, arguments.json()));
    let opened = Arc::new(OnceLock::new());
    let (opened_by_broker, open_reporter) = (Arc::clone(&opened), Arc::clone(&reporter));
    let (hash_reporter, progress_reporter) = (Arc::clone(&reporter), Arc::clone(&reporter));
    let uploader = client
        .upload(arguments.options(file))
        .on_open(move |upload| {
            // A retried open calls this again with the same upload.
            let is_first = opened_by_broker.set((upload.id, upload.mode)).is_ok();
            if is_first && upload.mode == Mode::Multipart {
                // If the program is killed, the user needs the id to resume the upload.
                open_reporter.eprintln_always(&format!("upload {}", upload.id));
            }
        })
        .on_hash_progress(move |done_bytes, total_bytes| hash_reporter.report_hashing(done_bytes, total_bytes))
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
                None => "no bytes were uploaded".to_owned(),
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
