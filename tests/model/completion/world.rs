//! The world of a completion: what PostgreSQL and S3 hold, what is in flight, and what each process knows.

/// What PostgreSQL and S3 hold, what is in flight, and what each process has in memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(super) state: State,
    /// The multipart upload that the row names.
    pub(super) upload: Option<usize>,
    /// How often the session was promised or has failed.
    pub(super) ends: u8,

    pub(super) object: Option<Bytes>,
    pub(super) uploads: [Upload; 2],
    /// Requests to join an upload of these bytes, whose senders wait no more.
    pub(super) finishes: Vec<(usize, Bytes)>,

    pub(super) puts: [Put; 2],
    pub(super) asks_left: u8,
    pub(super) may_abort: bool,
    /// The end of the session has passed, and with it the end of every URL.
    pub(super) is_over: bool,

    pub(super) tasks: [Option<Task>; 2],
    pub(super) makings: [Option<Making>; 2],
    /// Passes may be repeated, so one sweeper stands for all.
    pub(super) sweep: Option<Sweep>,
    pub(super) crashes_left: u8,
    pub(super) faults_left: u8,
}

/// Where the session stands, as its row says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum State {
    Open,
    Completing { lease: Lease, must_read: bool },
    Verified(Bytes),
    Failed(Failure, Cleanup),
}

/// Attempts count from 1 again when the session was given back to its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Lease {
    pub(super) attempt: u8,
    /// It ran out, or was given back.
    pub(super) is_over: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Failure {
    Aborted,
    Expired,
    Rejected,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Cleanup {
    Due,
    /// Due when nothing of the session can land in S3 any more.
    DueLate,
    Done,
}

/// `Right` and `AlsoRight` both pass the proof that was promised (of the size alone), and yet are different.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Bytes {
    Right,
    AlsoRight,
    Wrong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Upload {
    Unborn,
    Begun(Option<Bytes>),
    Joined,
    Aborted,
    /// A part landed after the abort: S3 stores it until the upload is aborted once more.
    Leftover,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Put {
    Unsent,
    InFlight(Bytes, Option<usize>),
    Over,
}

/// A completion under way: what it knows is as old as its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Task {
    pub(super) step: Step,
    pub(super) attempt: u8,
    pub(super) must_read: bool,
    /// Nobody has moved the row since this task read or wrote it.
    pub(super) is_current: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Step {
    /// The row was read; the claim is not written yet.
    Claiming,
    Look,
    List,
    /// These bytes were listed.
    Finish(Bytes),
    LookAgain(Answer),
    /// The object has these bytes; uploads that were not used are aborted next.
    Tidy(Bytes),
    /// These bytes were looked at.
    Read(Bytes),
    Decided(Verdict),
    /// S3 gave no verdict.
    Releasing,
}

/// What came of CompleteMultipartUpload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Answer {
    /// It was not sent: S3 lists no such upload.
    Unlisted,
    Refused,
    /// Done, gone, or nothing was heard: the look that follows decides.
    Any,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Verdict {
    Missing,
    MustRead,
    Wrong,
    Good(Bytes),
}

/// A request that makes the session's multipart upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Making {
    Asked,
    Made(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Sweep {
    pub(super) step: Sweeping,
    /// Nothing could land any more when the pass began.
    pub(super) is_last: bool,
    /// What was overdue is destroyed before it is ended.
    pub(super) is_undecided: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Sweeping {
    Uploads,
    Object,
    /// Whether there was an object.
    Noting(bool),
}

impl World {
    /// Whether a task has the lease and renews it.
    pub(super) fn is_worked_on(&self, lease: Lease) -> bool {
        self.tasks.iter().flatten().any(|task| task.attempt == lease.attempt && task.step != Step::Claiming)
    }

    /// Whether nothing that was begun for the session can land in S3 any more: the longest PUT, the longest request
    /// and S3's time-out have passed since its URLs and leases ended.
    pub(super) fn is_quiet(&self) -> bool {
        let is_landing = self.puts.iter().any(|put| matches!(put, Put::InFlight(..))) || !self.finishes.is_empty();
        self.is_over && !is_landing && self.makings == [None; 2]
    }

    /// Reads the row to complete the session.
    pub(super) fn begin(&mut self, attempt: u8, must_read: bool) {
        if let Some(free) = self.tasks.iter_mut().find(|task| task.is_none()) {
            *free = Some(Task { step: Step::Claiming, attempt, must_read, is_current: true });
        }
    }

    pub(super) fn claim(&mut self, task: Task) -> Option<Task> {
        if !task.is_current {
            return None;
        }
        let lease = Lease { attempt: task.attempt, is_over: false };
        self.write(State::Completing { lease, must_read: task.must_read });
        Some(Task { step: Step::Look, ..task })
    }

    /// Writes the row: whoever read it before knows its version no more.
    pub(super) fn write(&mut self, state: State) {
        self.state = state;
        for task in self.tasks.iter_mut().flatten() {
            task.is_current = false;
        }
    }

    pub(super) fn decide(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Missing => self.write(State::Open),
            Verdict::Wrong => self.fail(Failure::Rejected),
            Verdict::MustRead => {
                if let State::Completing { lease, .. } = self.state {
                    self.write(State::Completing { lease: Lease { is_over: true, ..lease }, must_read: true });
                }
            }
            Verdict::Good(bytes) => {
                self.write(State::Verified(bytes));
                self.end();
            }
        }
    }

    pub(super) fn fail(&mut self, failure: Failure) {
        self.write(State::Failed(failure, Cleanup::Due));
        self.end();
    }

    /// Nobody asks for anything any more: worlds that differ only in what could have been asked are one.
    pub(super) fn end(&mut self) {
        self.ends += 1;
        self.asks_left = 0;
        self.may_abort = false;
    }

    /// Gives a lease back: named by its attempt, not by the session's version.
    pub(super) fn release(&mut self, attempt: u8) {
        if let State::Completing { lease, must_read } = self.state
            && lease.attempt == attempt
        {
            self.write(State::Completing { lease: Lease { is_over: true, ..lease }, must_read });
        }
    }

    /// What S3 does on CompleteMultipartUpload with `If-None-Match: *`, naming the bytes that were listed.
    pub(super) fn join(&mut self, upload: usize, listed: Bytes) -> Answer {
        match self.uploads[upload] {
            Upload::Begun(_) if self.object.is_some() => Answer::Refused,
            Upload::Begun(part) if part != Some(listed) => Answer::Refused,
            Upload::Begun(_) => {
                self.uploads[upload] = Upload::Joined;
                self.object = Some(listed);
                Answer::Any
            }
            _ => Answer::Any,
        }
    }

    /// Aborts all uploads of the key, or only one that is named, if any.
    pub(super) fn abort_uploads(&mut self, only: Option<Option<usize>>) {
        for (number, upload) in self.uploads.iter_mut().enumerate() {
            let is_meant = only.is_none_or(|only| only == Some(number));
            if is_meant && matches!(upload, Upload::Begun(_) | Upload::Leftover) {
                *upload = Upload::Aborted;
            }
        }
    }

    pub(super) fn begin_upload(&mut self) -> Option<usize> {
        let unborn = self.uploads.iter().position(|upload| *upload == Upload::Unborn)?;
        self.uploads[unborn] = Upload::Begun(None);
        Some(unborn)
    }

    pub(super) fn make(&mut self, making: usize) {
        self.makings[making] = match self.makings[making] {
            Some(Making::Asked) => self.begin_upload().map(Making::Made),
            // Stored where none is yet and the session is open; whoever comes second aborts its own.
            Some(Making::Made(made)) => {
                match self.upload {
                    None if self.state == State::Open => self.upload = Some(made),
                    _ => self.abort_uploads(Some(Some(made))),
                }
                None
            }
            None => None,
        };
    }

    /// S3 does not answer a task. What was to be finished is perhaps still finished, however late.
    pub(super) fn silence(&mut self, number: usize) {
        let Some(task) = &mut self.tasks[number] else { return };
        task.step = match task.step {
            Step::Finish(bytes) => {
                self.finishes.extend(self.upload.map(|upload| (upload, bytes)));
                Step::LookAgain(Answer::Any)
            }
            _ => Step::Releasing,
        };
    }
}
