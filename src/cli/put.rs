//! `put`: uploads files or standard input, and prints the broker's response with the pointer and the record.

mod files;
mod upload;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _, stream};
use lfs_broker_client::api::{Completed, DEFAULT_PART_BYTES, ErrorCode, Headers, Policy, UploadState};
use lfs_broker_client::{self as client, Client, UploadOptions};
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::connection::{Connection, upload_id};
use super::output::{print_data, print_note, shell_path, to_json};
use super::{Error, shutdown_signal};
use files::{display_name, is_stdin};

/// How many small files are uploaded at the same time. The upload of a small file mostly waits for responses.
const CONCURRENT_FILES: u32 = 8;

/// A file of at least this size is uploaded alone. If it is larger, its parts are already sent concurrently.
const LARGE_FILE_BYTES: u64 = DEFAULT_PART_BYTES;

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
    /// The partition of the records [default: Kafka's partitioner chooses it by the key]
    #[arg(long, value_name = "P", value_parser = partition)]
    partition: Option<i32>,
    /// The media type of the files [default: by the extension of the file name]
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// The file name that a download gets; only for one file [default: the name of the file]
    #[arg(long, value_name = "NAME")]
    filename: Option<String>,
    /// Upload the files of directories and of their subdirectories
    #[arg(long, short)]
    recursive: bool,
    /// Wait until the pointer is in Kafka; otherwise return as soon as the upload is verified
    #[arg(long)]
    wait: bool,
    /// The longest wait, in seconds
    #[arg(long, value_name = "N", default_value_t = 3600, requires = "wait")]
    wait_seconds: u64,
    /// Resume an interrupted upload
    #[arg(long, value_name = "ID", value_parser = upload_id)]
    resume: Option<Uuid>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

fn partition(text: &str) -> Result<i32, String> {
    let number = text.parse().ok().filter(|number| *number >= 0);
    number.ok_or_else(|| "a partition is a whole number, 0 or more".to_owned())
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

    fn check(&self) -> Result<(), Error> {
        let is_one_file = self.files.len() == 1 && !self.recursive;
        if self.resume.is_some() && (!is_one_file || is_stdin(&self.files[0])) {
            return Err(Error::Usage("--resume needs exactly one file, and cannot use standard input".to_owned()));
        }
        if self.filename.is_some() && !is_one_file {
            return Err(Error::Usage("--filename needs exactly one file".to_owned()));
        }
        if self.files.iter().filter(|file| is_stdin(file)).count() > 1 {
            return Err(Error::Usage("standard input can be read only once".to_owned()));
        }
        let mut names = BTreeSet::new();
        match self.headers.iter().find(|(name, _)| !names.insert(name)) {
            Some((name, _)) => {
                Err(Error::Usage(format!("--header {name} is given twice, but an upload has each header at most once")))
            }
            None => Ok(()),
        }
    }

    fn options(&self, file: &Path) -> UploadOptions {
        let name = self.filename.as_deref().map_or(file, Path::new);
        let guessed = || mime_guess::from_path(name).first_raw().map(str::to_owned);
        UploadOptions {
            key: self.key.clone().map(OsString::into_encoded_bytes),
            headers: Headers(self.headers.clone()),
            content_type: self.content_type.clone().or_else(guessed),
            filename: self.filename.clone(),
            partition: self.partition,
            wait_published: self.wait,
            wait_timeout: Duration::from_secs(self.wait_seconds),
            ..UploadOptions::to(&self.topic)
        }
    }
}

pub(super) async fn put(arguments: Arguments) -> Result<(), Error> {
    arguments.check()?;
    let files = files::expand(&arguments.files, arguments.recursive)?;
    let client = arguments.connection.client()?;
    let mut outcomes = Outcomes::new(&arguments, min_bytes(&client, &arguments.topic).await?, files.len());
    let shutdown = shutdown_signal().shared();
    let (is_stopped, permits) = (Cell::new(false), Semaphore::new(CONCURRENT_FILES as usize));
    let upload = async |file: &Path| {
        let size = if is_stdin(file) { u64::MAX } else { file.metadata().map_or(0, |found| found.len()) };
        let _permits = permits.acquire_many(if size < LARGE_FILE_BYTES { 1 } else { CONCURRENT_FILES }).await;
        if is_stopped.get() {
            return None;
        }
        let uploaded = upload::upload(&client, &arguments, file, shutdown.clone()).await;
        is_stopped.set(is_stopped.get() || uploaded.as_ref().is_err_and(|error| !error.concerns_one_file()));
        Some(uploaded)
    };
    // The first file shows whether uploads work at all. If not, the others are not started.
    let (first, others) = files.split_first().expect("at least one file");
    let uploaded = upload(first).await;
    is_stopped.set(!outcomes.add(first, uploaded));
    let mut uploads =
        stream::iter(others).map(|file| upload(file).map(move |uploaded| (file, uploaded))).buffered(CONCURRENT_FILES as usize);
    while let Some((file, uploaded)) = uploads.next().await {
        if !outcomes.add(file, uploaded) {
            is_stopped.set(true);
        }
    }
    outcomes.finish()
}

/// The outcomes of all files, in the order of the files.
struct Outcomes<'a> {
    arguments: &'a Arguments,
    /// The smallest size for which the policy of the topic advises an upload.
    min_bytes: u64,
    files: usize,
    /// The number of files that failed for a reason of their own. The other files continue.
    failed: usize,
    first_failure: Option<Error>,
    /// The first error that would occur for every file.
    fatal: Option<Error>,
    not_started: Vec<PathBuf>,
    /// Name and size of the first file that is smaller than advised, and the number of such files.
    first_small: Option<(String, u64)>,
    small: usize,
}

impl<'a> Outcomes<'a> {
    fn new(arguments: &'a Arguments, min_bytes: u64, files: usize) -> Self {
        let (failed, first_failure, fatal, not_started) = (0, None, None, Vec::new());
        Self { arguments, min_bytes, files, failed, first_failure, fatal, not_started, first_small: None, small: 0 }
    }

    /// Prints the outcome of a file; `None` means that it was not started. Returns false if no other file should start.
    fn add(&mut self, file: &Path, uploaded: Option<Result<Completed, Error>>) -> bool {
        let Some(uploaded) = uploaded else {
            self.not_started.push(file.to_owned());
            return false;
        };
        match uploaded.and_then(|completed| self.print(file, &completed)) {
            Ok(()) => true,
            Err(error) if self.files > 1 && error.concerns_one_file() => {
                error.print_with_hint(None, None);
                self.failed += 1;
                self.first_failure.get_or_insert(error);
                true
            }
            Err(error) => {
                match &self.fatal {
                    // The first error is printed at the end.
                    None => self.fatal = Some(error),
                    Some(_) => error.print_with_hint(None, None),
                }
                false
            }
        }
    }

    /// Prints the broker's response to stdout.
    fn print(&mut self, file: &Path, completed: &Completed) -> Result<(), Error> {
        print_data(&to_json(completed))?;
        let name = display_name(file);
        let size = completed.pointer.as_ref().map(|pointer| pointer.size);
        if let Some(size) = size.filter(|size| *size < self.min_bytes) {
            self.first_small.get_or_insert_with(|| (name.clone(), size));
            self.small += 1;
        }
        match completed.state {
            UploadState::Verified if self.arguments.wait => {
                let (id, seconds) = (completed.id, self.arguments.wait_seconds);
                Err(Error::Failed(format!(
                    "{name}: upload {id} is verified, but not yet in Kafka after {seconds} s; it will be published"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Prints the advice about small files, and the files that were not started.
    fn finish(self) -> Result<(), Error> {
        if let Some((name, size)) = self.first_small.filter(|_| !self.arguments.json()) {
            let others = match self.small - 1 {
                0 => String::new(),
                1 => "; 1 more file is smaller too".to_owned(),
                others => format!("; {others} more files are smaller too"),
            };
            let limit = match self.min_bytes % (1 << 20) {
                0 => format!("{} MiB", self.min_bytes >> 20),
                _ => format!("{} bytes", self.min_bytes),
            };
            print_note(&format!(
                "note: {name} is small ({size} bytes): below {limit} (the policy member min_bytes of {}) a normal Kafka record \
                 is usually better{others}",
                self.arguments.topic
            ));
        }
        if !self.not_started.is_empty() {
            let names: Vec<String> = self.not_started.iter().map(|file| shell_path(file)).collect();
            print_note(&format!("note: not started: {}", names.join(" ")));
        }
        match (self.fatal, self.first_failure) {
            (Some(error), _) => Err(error),
            (None, Some(first)) => Err(Error::Files { failed: self.failed, total: self.files, first: Box::new(first) }),
            (None, None) => Ok(()),
        }
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
