//! The state of the completion model: what PostgreSQL and S3 hold, what is in flight, and what each process knows.

/// What PostgreSQL and S3 hold, what is in flight, and what each process has in memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct SystemState {
    pub(super) session: SessionState,
    /// The multipart upload in the session's row.
    pub(super) upload: Option<usize>,
    /// How often the session was verified or has failed.
    pub(super) ends: u8,

    pub(super) object: Option<Bytes>,
    pub(super) uploads: [Upload; 2],
    /// Requests to join an upload with these bytes, whose senders no longer wait.
    pub(super) late_joins: Vec<(usize, Bytes)>,

    pub(super) puts: [Put; 2],
    pub(super) completes_left: u8,
    pub(super) may_abort: bool,
    /// The session has expired, and with it every URL.
    pub(super) is_expired: bool,

    pub(super) tasks: [Option<Task>; 2],
    pub(super) creations: [Option<Creation>; 2],
    /// A cleanup may be repeated, so one sweeper stands for all.
    pub(super) cleanup: Option<CleanUp>,
    pub(super) crashes_left: u8,
    pub(super) faults_left: u8,
}

/// The session's state in its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum SessionState {
    Open,
    Completing { lease: Lease, must_read: bool },
    Verified(Bytes),
    Failed(Failure, CleanupState),
}

/// Attempts count from 1 again after the session was opened again for its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Lease {
    pub(super) attempt: u8,
    /// The lease has expired or was released.
    pub(super) is_expired: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Failure {
    Aborted,
    Expired,
    Rejected,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum CleanupState {
    FirstDue,
    /// Due when no request of the session can arrive in S3 any more.
    SecondDue,
    Done,
}

/// `Right` and `AlsoRight` both match the declaration (if it is the size only), but are different.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Bytes {
    Right,
    AlsoRight,
    Wrong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Upload {
    NotCreated,
    Open(Option<Bytes>),
    Joined,
    Aborted,
    /// A part arrived after the abort: S3 stores it until the upload is aborted once more.
    Leftover,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Put {
    Unsent,
    InFlight(Bytes, Option<usize>),
    Done,
}

/// A running completion. Its knowledge is as old as its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Task {
    pub(super) step: Step,
    pub(super) attempt: u8,
    pub(super) must_read: bool,
    /// The row was not changed since this task has read or written it.
    pub(super) is_current: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Step {
    /// The task has read the row, and looks at the object of a single PUT before it claims anything.
    Looking,
    /// Without a claim, the HEAD has found an object with this verdict.
    Found(Verdict),
    /// The task has read the row, but has not written the claim yet.
    Claiming,
    /// The same, after a HEAD whose verdict needs a claim.
    ClaimingFor(Verdict),
    Head,
    List,
    /// S3 has listed these bytes.
    Join(Bytes),
    HeadAgain(JoinResult),
    /// The object has these bytes; next the unused uploads are aborted.
    AbortStray(Bytes),
    /// The HEAD has found these bytes.
    ReadBack(Bytes),
    Decided(Verdict),
    /// S3 has not answered, so the lease is released.
    Releasing,
}

/// The result of CompleteMultipartUpload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum JoinResult {
    /// The request was not sent: S3 lists no such upload.
    NotSent,
    Refused,
    /// Done, gone, or without a response: the HEAD that follows decides.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Verdict {
    Missing,
    MustRead,
    Wrong,
    Good(Bytes),
}

/// A request that creates the session's multipart upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Creation {
    Requested,
    Created(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct CleanUp {
    pub(super) step: CleanupStep,
    /// No request could arrive any more when this cleanup began.
    pub(super) is_last: bool,
    /// An overdue session's data is removed before the session ends.
    pub(super) is_undecided: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum CleanupStep {
    Uploads,
    Object,
    /// Whether there was an object.
    Recording(bool),
}

impl SystemState {
    /// Whether a task has the lease and renews it.
    pub(super) fn is_worked_on(&self, lease: Lease) -> bool {
        let has_claimed =
            |task: &&Task| !matches!(task.step, Step::Looking | Step::Found(_) | Step::Claiming | Step::ClaimingFor(_));
        self.tasks.iter().flatten().filter(has_claimed).any(|task| task.attempt == lease.attempt)
    }

    /// Whether no request of the session can arrive in S3 any more: the longest PUT, the longest request and S3's timeout
    /// have passed since its URLs and leases expired.
    pub(super) fn is_quiet(&self) -> bool {
        let is_in_flight = self.puts.iter().any(|put| matches!(put, Put::InFlight(..))) || !self.late_joins.is_empty();
        self.is_expired && !is_in_flight && self.creations == [None; 2]
    }

    /// Starts a task that reads the row to complete the session.
    pub(super) fn start_task(&mut self, step: Step, attempt: u8, must_read: bool) {
        if let Some(free) = self.tasks.iter_mut().find(|task| task.is_none()) {
            *free = Some(Task { step, attempt, must_read, is_current: true });
        }
    }

    pub(super) fn claim(&mut self, task: Task) -> Option<Task> {
        if !task.is_current {
            return None;
        }
        let lease = Lease { attempt: task.attempt, is_expired: false };
        self.write(SessionState::Completing { lease, must_read: task.must_read });
        Some(Task { step: Step::Head, ..task })
    }

    /// Writes the row. Tasks that have read it before no longer know its version.
    pub(super) fn write(&mut self, session: SessionState) {
        self.session = session;
        for task in self.tasks.iter_mut().flatten() {
            task.is_current = false;
        }
    }

    pub(super) fn decide(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Missing => self.write(SessionState::Open),
            Verdict::Wrong => self.fail(Failure::Rejected),
            Verdict::MustRead => {
                if let SessionState::Completing { lease, .. } = self.session {
                    self.write(SessionState::Completing { lease: Lease { is_expired: true, ..lease }, must_read: true });
                }
            }
            Verdict::Good(bytes) => {
                self.write(SessionState::Verified(bytes));
                self.end();
            }
        }
    }

    pub(super) fn fail(&mut self, failure: Failure) {
        self.write(SessionState::Failed(failure, CleanupState::FirstDue));
        self.end();
    }

    /// Ends the client's requests, so that states that differ only in possible requests are the same.
    pub(super) fn end(&mut self) {
        self.ends += 1;
        self.completes_left = 0;
        self.may_abort = false;
    }

    /// Releases a lease by its attempt, not by the session's version.
    pub(super) fn release(&mut self, attempt: u8) {
        if let SessionState::Completing { lease, must_read } = self.session
            && lease.attempt == attempt
        {
            self.write(SessionState::Completing { lease: Lease { is_expired: true, ..lease }, must_read });
        }
    }

    /// What S3 does for CompleteMultipartUpload with `If-None-Match: *` and the listed bytes.
    pub(super) fn join(&mut self, upload: usize, listed: Bytes) -> JoinResult {
        match self.uploads[upload] {
            Upload::Open(_) if self.object.is_some() => JoinResult::Refused,
            Upload::Open(part) if part != Some(listed) => JoinResult::Refused,
            Upload::Open(_) => {
                self.uploads[upload] = Upload::Joined;
                self.object = Some(listed);
                JoinResult::Unknown
            }
            _ => JoinResult::Unknown,
        }
    }

    /// Aborts all uploads of the key, or only the given one.
    pub(super) fn abort_uploads(&mut self, only: Option<Option<usize>>) {
        for (number, upload) in self.uploads.iter_mut().enumerate() {
            let is_selected = only.is_none_or(|only| only == Some(number));
            if is_selected && matches!(upload, Upload::Open(_) | Upload::Leftover) {
                *upload = Upload::Aborted;
            }
        }
    }

    pub(super) fn create_upload(&mut self) -> Option<usize> {
        let not_created = self.uploads.iter().position(|upload| *upload == Upload::NotCreated)?;
        self.uploads[not_created] = Upload::Open(None);
        Some(not_created)
    }

    pub(super) fn create(&mut self, creation: usize) {
        self.creations[creation] = match self.creations[creation] {
            Some(Creation::Requested) => self.create_upload().map(Creation::Created),
            // Stored if the session is open and has no upload yet; the second request aborts its own upload.
            Some(Creation::Created(created)) => {
                match self.upload {
                    None if self.session == SessionState::Open => self.upload = Some(created),
                    _ => self.abort_uploads(Some(Some(created))),
                }
                None
            }
            None => None,
        };
    }

    /// S3 refuses a task permanently. Before the claim this only leads to the claim.
    pub(super) fn refuse(&mut self, number: usize) {
        self.lose_response(number);
        self.tasks[number] = self.tasks[number].map(|task| match task.step {
            Step::Claiming => task,
            _ => Task { step: Step::Decided(Verdict::Missing), ..task },
        });
    }

    /// S3 does not answer a task. A join may still be executed at any later time.
    pub(super) fn lose_response(&mut self, number: usize) {
        let Some(task) = &mut self.tasks[number] else { return };
        task.step = match task.step {
            Step::Join(bytes) => {
                self.late_joins.extend(self.upload.map(|upload| (upload, bytes)));
                Step::HeadAgain(JoinResult::Unknown)
            }
            // Nothing was claimed yet, and the claim follows.
            Step::Looking => Step::Claiming,
            _ => Step::Releasing,
        };
    }
}
