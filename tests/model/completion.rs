//! Completion: one session from open until it is verified or has failed, and what remains of it in S3.
//!
//! Two tasks at a time work on the session, as in `completion.rs` and `broker/complete.rs`, beside its client, two requests
//! that create its multipart upload (`broker/open.rs`), and the sweeper. A task may be of any replica. The model has no
//! lease owner, only the attempt, because only the attempt tells two tasks of one replica apart. The row's version is not
//! a number: a task's knowledge of the row is current or not.

mod system;

use stateright::{Model, Property};

use system::{
    Bytes, CleanUp, CleanupState, CleanupStep, Creation, Failure, JoinResult, Put, SessionState, Step, SystemState, Task, Upload,
    Verdict,
};

/// The decisions of the protocol. A design with one of them changed is broken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Design {
    /// A presigned PUT carries a signed `If-None-Match: *`.
    pub(crate) signs_if_none_match: bool,
    /// A transition is written only if the row still has the state and version that its writer has read.
    pub(crate) checks_version: bool,
    /// A completion without a claim is written only if the session is open and the row has the version that was read.
    pub(crate) checks_version_unclaimed: bool,
    /// A completion without a claim ends only a session whose object is as declared. Everything else needs a claim.
    pub(crate) claims_what_is_not_verified: bool,
    /// The object in S3 decides, not the response to the join of the parts.
    pub(crate) trusts_stored_state: bool,
    /// The session ends in PostgreSQL before any of its data is removed from S3.
    pub(crate) ends_session_first: bool,
    /// S3 is cleaned up a second time when no request of the session can arrive any more.
    pub(crate) cleans_up_twice: bool,
    /// Every multipart upload of the key is aborted, not only the one in the session's row.
    pub(crate) aborts_every_upload: bool,
}

impl Design {
    /// The current design.
    pub(crate) const CURRENT: Self = Self {
        signs_if_none_match: true,
        checks_version: true,
        checks_version_unclaimed: true,
        claims_what_is_not_verified: true,
        trusts_stored_state: true,
        ends_session_first: true,
        cleans_up_twice: true,
        aborts_every_upload: true,
    };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// A single PUT.
    Single,
    /// A single PUT that S3 cannot verify: the broker reads its bytes back.
    ReadBack,
    /// Parts; one part stands for all.
    Multipart,
}

pub(crate) const SAME_BYTES: &str = "the object of a verified session is the verified object";
pub(crate) const NOTHING_LEFT: &str = "at rest a failed session has no object and no multipart upload";
pub(crate) const ONLY_WRONG_REJECTED: &str = "only wrong bytes are rejected";
pub(crate) const ONE_END: &str = "no session ends twice";
pub(crate) const ALL_END: &str = "at rest the session has ended";

/// A design, and the bounds within which every state is checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) design: Design,
    pub(crate) layout: Layout,
    /// How often the client requests completion.
    pub(crate) completes: u8,
    pub(crate) crashes: u8,
    /// The number of all other faults.
    pub(crate) faults: u8,
}

/// One atomic step of a process. A process may stay between two steps while others continue: so a pause, a zombie and a
/// late PUT are orders of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    StartPut(Bytes),
    PutLands(usize),
    RequestComplete,
    Abort,
    PassExpiry,
    Expire,
    RequestCreation,
    Create(usize, Creation),
    /// The task's next step follows from its current one.
    RunTask(usize, Task),
    TakeOver,
    LateJoinLands(usize),
    /// The lease's task is dead or has released it.
    LeaseEnds,
    CleanUp,

    CrashTask(usize),
    CrashCreation(usize),
    CrashSweeper,
    /// The lease's task lives, but is stopped or cut off from PostgreSQL.
    LeaseOfLivingTaskEnds,
    /// S3 does not answer.
    NoResponse(usize),
    /// S3 refuses permanently: the session is open for its client again.
    Refuse(usize),
    /// S3 has not answered, and the session's maximum lifetime is over: the session expires instead of a release.
    ExpireUnverified(usize),
    /// S3 creates the upload, but its response is lost.
    CreateUnanswered(usize),
}

impl Completion {
    pub(crate) fn current(layout: Layout, completes: u8, crashes: u8, faults: u8) -> Self {
        Self { design: Design::CURRENT, layout, completes, crashes, faults }
    }

    fn is_multipart(&self) -> bool {
        self.layout == Layout::Multipart
    }

    fn add_normal_actions(&self, system: &SystemState, actions: &mut Vec<Action>) {
        self.add_client_actions(system, actions);
        for (creation, step) in system.creations.iter().enumerate().filter_map(|(creation, step)| Some((creation, (*step)?))) {
            actions.push(Action::Create(creation, step));
        }
        for (number, task) in system.tasks.iter().enumerate().filter_map(|(number, task)| Some((number, (*task)?))) {
            actions.push(Action::RunTask(number, task));
        }
        actions.extend((0..system.late_joins.len()).map(Action::LateJoinLands));
        if system.is_expired {
            let releasing =
                system.tasks.iter().enumerate().filter(|(_, task)| task.is_some_and(|task| task.step == Step::Releasing));
            actions.extend(releasing.map(|(number, _)| Action::ExpireUnverified(number)));
        }
        if let SessionState::Completing { lease, .. } = system.session {
            match lease.is_expired {
                true if system.tasks.contains(&None) => actions.push(Action::TakeOver),
                false if !system.is_worked_on(lease) => actions.push(Action::LeaseEnds),
                _ => {}
            }
        }
        if system.cleanup.is_some() || self.next_cleanup(system).is_some() {
            actions.push(Action::CleanUp);
        }
    }

    fn add_client_actions(&self, system: &SystemState, actions: &mut Vec<Action>) {
        if !system.is_expired {
            actions.push(Action::PassExpiry);
            if !self.is_multipart() || system.upload.is_some() {
                match system.puts {
                    [Put::Unsent, _] => actions.extend([Action::StartPut(Bytes::Right), Action::StartPut(Bytes::Wrong)]),
                    [_, Put::Unsent] => actions.push(Action::StartPut(Bytes::AlsoRight)),
                    _ => {}
                }
            }
        }
        let in_flight = (0..system.puts.len()).filter(|put| matches!(system.puts[*put], Put::InFlight(..)));
        actions.extend(in_flight.map(Action::PutLands));
        let is_open = system.session == SessionState::Open;
        if is_open && !system.is_expired && system.completes_left > 0 && system.tasks.contains(&None) {
            actions.push(Action::RequestComplete);
        }
        if system.may_abort && (is_open || matches!(system.session, SessionState::Completing { must_read: true, .. })) {
            actions.push(Action::Abort);
        }
        if is_open && system.is_expired && self.design.ends_session_first {
            actions.push(Action::Expire);
        }
        let not_created = system.uploads.iter().filter(|upload| **upload == Upload::NotCreated).count();
        let requested = system.creations.iter().filter(|creation| **creation == Some(Creation::Requested)).count();
        let may_create = self.is_multipart() && is_open && !system.is_expired && system.upload.is_none();
        if may_create && requested < not_created && system.creations.contains(&None) {
            actions.push(Action::RequestCreation);
        }
    }

    fn add_faults(&self, system: &SystemState, actions: &mut Vec<Action>) {
        let tasks = || system.tasks.iter().enumerate().filter_map(|(number, task)| Some((number, (*task)?)));
        let creations = || system.creations.iter().enumerate().filter_map(|(creation, step)| Some((creation, (*step)?)));
        if system.crashes_left > 0 {
            actions.extend(tasks().map(|(number, _)| Action::CrashTask(number)));
            actions.extend(creations().map(|(creation, _)| Action::CrashCreation(creation)));
            actions.extend(system.cleanup.map(|_| Action::CrashSweeper));
        }
        if system.faults_left > 0 {
            let waits_for_s3 = |task: &Task| {
                !matches!(task.step, Step::Claiming | Step::ClaimingFor(_) | Step::Found(_) | Step::Decided(_) | Step::Releasing)
            };
            for (number, _) in tasks().filter(|(_, task)| waits_for_s3(task)) {
                actions.extend([Action::NoResponse(number), Action::Refuse(number)]);
            }
            let requested = creations().filter(|(_, step)| *step == Creation::Requested);
            actions.extend(requested.map(|(creation, _)| Action::CreateUnanswered(creation)));
            if let SessionState::Completing { lease, .. } = system.session
                && !lease.is_expired
                && system.is_worked_on(lease)
            {
                actions.push(Action::LeaseOfLivingTaskEnds);
            }
        }
    }

    /// Whether no step is left except faults.
    fn is_at_rest(&self, system: &SystemState) -> bool {
        let mut actions = Vec::new();
        self.add_normal_actions(system, &mut actions);
        actions.is_empty()
    }

    /// One step of a task; `None` when the task has ended.
    fn work(&self, system: &mut SystemState, task: Task) -> Option<Task> {
        let step = match task.step {
            Step::Looking => match system.object {
                Some(bytes) if self.layout == Layout::Single && bytes != Bytes::Wrong => Step::Found(Verdict::Good(bytes)),
                None if !self.design.claims_what_is_not_verified => Step::Found(Verdict::Wrong),
                None => Step::ClaimingFor(Verdict::Missing),
                Some(_) if self.layout == Layout::ReadBack => Step::ClaimingFor(Verdict::MustRead),
                Some(bytes) => Step::ClaimingFor(verdict_of(bytes)),
            },
            Step::ClaimingFor(verdict) => {
                return system.claim(task).map(|claimed| Task { step: Step::Decided(verdict), ..claimed });
            }
            Step::Found(verdict) => {
                let is_unchanged = task.is_current && system.session == SessionState::Open;
                if is_unchanged || !self.design.checks_version_unclaimed {
                    system.decide(verdict);
                }
                return None;
            }
            Step::Claiming => return system.claim(task),
            Step::Head if self.is_multipart() && task.attempt == 1 => Step::List,
            Step::Head => match system.object {
                Some(bytes) if task.must_read => Step::ReadBack(bytes),
                Some(bytes) => self.after_head(bytes),
                None if self.is_multipart() => Step::List,
                None => Step::Decided(Verdict::Missing),
            },
            Step::List => match system.upload.map(|upload| system.uploads[upload]) {
                Some(Upload::Open(Some(bytes))) => Step::Join(bytes),
                Some(Upload::Open(None)) | None => Step::Decided(Verdict::Missing),
                Some(_) => Step::HeadAgain(JoinResult::NotSent),
            },
            Step::Join(bytes) => Step::HeadAgain(system.upload.map_or(JoinResult::Unknown, |upload| system.join(upload, bytes))),
            Step::HeadAgain(result) => match (system.object, result) {
                (_, JoinResult::Refused) if !self.design.trusts_stored_state => Step::Decided(Verdict::Wrong),
                (Some(bytes), _) => self.after_head(bytes),
                (None, JoinResult::Unknown) => Step::Releasing,
                (None, JoinResult::Refused) => Step::Decided(Verdict::Missing),
                (None, JoinResult::NotSent) => {
                    system.upload = None;
                    Step::Decided(Verdict::Missing)
                }
            },
            Step::AbortStray(bytes) => {
                system.abort_uploads(None);
                Step::Decided(verdict_of(bytes))
            }
            // `If-Match`: it is an error if the object has other bytes than at the HEAD.
            Step::ReadBack(bytes) if system.object == Some(bytes) => Step::Decided(verdict_of(bytes)),
            Step::ReadBack(_) => Step::Releasing,
            Step::Decided(verdict) => {
                let is_ours = task.is_current && matches!(system.session, SessionState::Completing { .. });
                if is_ours || !self.design.checks_version {
                    system.decide(verdict);
                }
                return None;
            }
            Step::Releasing => {
                system.release(task.attempt);
                return None;
            }
        };
        Some(Task { step, ..task })
    }

    /// The step after a HEAD that finds the object.
    fn after_head(&self, bytes: Bytes) -> Step {
        match self.layout {
            Layout::Single => Step::Decided(verdict_of(bytes)),
            Layout::ReadBack => Step::Decided(Verdict::MustRead),
            Layout::Multipart => Step::AbortStray(bytes),
        }
    }

    fn land_put(&self, system: &mut SystemState, put: usize) {
        let Put::InFlight(bytes, upload) = system.puts[put] else { return };
        system.puts[put] = Put::Done;
        match upload.map(|upload| &mut system.uploads[upload]) {
            Some(Upload::Open(part)) => *part = Some(bytes),
            // Amazon S3 documents for AbortMultipartUpload that parts in flight may succeed, and to abort again.
            Some(upload @ Upload::Aborted) => *upload = Upload::Leftover,
            Some(_) => {}
            None if system.object.is_none() || !self.design.signs_if_none_match => system.object = Some(bytes),
            None => {}
        }
    }

    fn next_cleanup(&self, system: &SystemState) -> Option<CleanUp> {
        let is_last = system.is_quiet();
        let is_undecided = system.session == SessionState::Open && system.is_expired && !self.design.ends_session_first;
        let is_due = match system.session {
            SessionState::Failed(_, CleanupState::FirstDue) => true,
            SessionState::Failed(_, CleanupState::SecondDue) => is_last,
            _ => is_undecided,
        };
        is_due.then_some(CleanUp { step: CleanupStep::Uploads, is_last, is_undecided })
    }

    fn cleanup(&self, system: &mut SystemState) {
        let Some(cleanup) = system.cleanup else {
            system.cleanup = self.next_cleanup(system);
            return;
        };
        let next = match cleanup.step {
            CleanupStep::Uploads => {
                let known = system.upload;
                system.abort_uploads(if self.design.aborts_every_upload { None } else { Some(known) });
                Some(CleanupStep::Object)
            }
            CleanupStep::Object => Some(CleanupStep::Recording(system.object.take().is_some())),
            CleanupStep::Recording(_) => {
                if cleanup.is_undecided && system.session == SessionState::Open {
                    system.fail(Failure::Expired);
                }
                if let SessionState::Failed(_, cleanup_state) = &mut system.session {
                    *cleanup_state = if cleanup.is_last || !self.design.cleans_up_twice {
                        CleanupState::Done
                    } else {
                        CleanupState::SecondDue
                    };
                }
                None
            }
        };
        system.cleanup = next.map(|step| CleanUp { step, ..cleanup });
    }
}

fn verdict_of(bytes: Bytes) -> Verdict {
    if bytes == Bytes::Wrong { Verdict::Wrong } else { Verdict::Good(bytes) }
}

impl Model for Completion {
    type State = SystemState;
    type Action = Action;

    fn init_states(&self) -> Vec<SystemState> {
        vec![SystemState {
            session: SessionState::Open,
            upload: None,
            ends: 0,
            object: None,
            uploads: [Upload::NotCreated; 2],
            late_joins: Vec::new(),
            puts: [Put::Unsent; 2],
            completes_left: self.completes,
            may_abort: true,
            is_expired: false,
            tasks: [None; 2],
            creations: [None; 2],
            cleanup: None,
            crashes_left: self.crashes,
            faults_left: self.faults,
        }]
    }

    fn actions(&self, system: &SystemState, actions: &mut Vec<Action>) {
        self.add_normal_actions(system, actions);
        self.add_faults(system, actions);
    }

    fn next_state(&self, last: &SystemState, action: Action) -> Option<SystemState> {
        let mut system = last.clone();
        match action {
            Action::StartPut(bytes) => {
                let unsent = system.puts.iter().position(|put| *put == Put::Unsent)?;
                system.puts[unsent] = Put::InFlight(bytes, system.upload);
            }
            Action::PutLands(put) => self.land_put(&mut system, put),
            Action::RequestComplete => {
                system.completes_left -= 1;
                let first = if self.is_multipart() { Step::Claiming } else { Step::Looking };
                system.start_task(first, 1, false);
            }
            Action::TakeOver => {
                if let SessionState::Completing { lease, must_read } = system.session {
                    system.start_task(Step::Claiming, lease.attempt + 1, must_read);
                }
            }
            Action::RunTask(number, task) => {
                system.tasks[number] = None;
                system.tasks[number] = self.work(&mut system, task);
            }
            Action::LateJoinLands(number) => {
                let (upload, bytes) = system.late_joins.remove(number);
                system.join(upload, bytes);
            }
            Action::Abort => system.fail(Failure::Aborted),
            Action::Expire => system.fail(Failure::Expired),
            Action::PassExpiry => system.is_expired = true,
            Action::RequestCreation => {
                let free = system.creations.iter().position(Option::is_none)?;
                system.creations[free] = Some(Creation::Requested);
            }
            Action::Create(creation, _) => system.create(creation),
            Action::CleanUp => self.cleanup(&mut system),
            Action::LeaseEnds | Action::LeaseOfLivingTaskEnds => {
                if let SessionState::Completing { lease, .. } = &mut system.session {
                    lease.is_expired = true;
                }
            }
            Action::CrashTask(number) => system.tasks[number] = None,
            Action::CrashCreation(creation) => system.creations[creation] = None,
            Action::CrashSweeper => system.cleanup = None,
            Action::NoResponse(number) => system.lose_response(number),
            Action::Refuse(number) => system.refuse(number),
            Action::ExpireUnverified(number) => {
                let task = system.tasks[number].take()?;
                if task.is_current && matches!(system.session, SessionState::Completing { .. }) {
                    system.fail(Failure::Expired);
                }
            }
            Action::CreateUnanswered(creation) => {
                system.create_upload();
                system.creations[creation] = None;
            }
        }
        match action {
            Action::CrashTask(_) | Action::CrashCreation(_) | Action::CrashSweeper => system.crashes_left -= 1,
            Action::LeaseOfLivingTaskEnds | Action::NoResponse(_) | Action::Refuse(_) | Action::CreateUnanswered(_) => {
                system.faults_left -= 1
            }
            _ => {}
        }
        // Tasks and requests have no identity: states that differ only in their order are the same.
        system.tasks.sort_unstable();
        system.creations.sort_unstable();
        system.late_joins.sort_unstable();
        Some(system)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(SAME_BYTES, |_, system: &SystemState| match system.session {
                SessionState::Verified(bytes) => system.object == Some(bytes),
                _ => true,
            }),
            Property::always(NOTHING_LEFT, |model: &Self, system: &SystemState| {
                let is_in_s3 = |upload: &Upload| matches!(upload, Upload::Open(_) | Upload::Leftover);
                let is_clean = system.object.is_none() && !system.uploads.iter().any(is_in_s3);
                is_clean || !matches!(system.session, SessionState::Failed(..)) || !model.is_at_rest(system)
            }),
            Property::always(ONLY_WRONG_REJECTED, |_, system: &SystemState| {
                let is_wrong = |step| matches!(step, Step::Decided(Verdict::Wrong) | Step::Found(Verdict::Wrong));
                let rejects = |task: &Task| is_wrong(task.step) && task.is_current;
                system.object == Some(Bytes::Wrong) || !system.tasks.iter().flatten().any(rejects)
            }),
            Property::always(ONE_END, |_, system: &SystemState| system.ends <= 1),
            Property::always(ALL_END, |model: &Self, system: &SystemState| {
                matches!(system.session, SessionState::Verified(_) | SessionState::Failed(_, CleanupState::Done))
                    || !model.is_at_rest(system)
            }),
            Property::sometimes("a session is verified", |_, system: &SystemState| {
                matches!(system.session, SessionState::Verified(_))
            }),
            Property::sometimes("a session is aborted", |_, system: &SystemState| has_failed(system, Failure::Aborted)),
            Property::sometimes("a session expires", |_, system: &SystemState| has_failed(system, Failure::Expired)),
            Property::sometimes("a session is rejected", |_, system: &SystemState| has_failed(system, Failure::Rejected)),
            Property::sometimes("a session that S3 does not verify expires", |_, system: &SystemState| {
                let is_last = |task: &Task| task.step == Step::Releasing && task.is_current;
                system.is_expired && system.tasks.iter().flatten().any(is_last)
            }),
            Property::sometimes("two tasks run at the same time", |_, system: &SystemState| {
                system.tasks.iter().flatten().filter(|task| task.step != Step::Claiming).count() == 2
            }),
            Property::sometimes("a zombie decides after the session is verified", |_, system: &SystemState| {
                let is_late = |task: &Task| matches!(task.step, Step::Decided(_)) && !task.is_current;
                matches!(system.session, SessionState::Verified(_)) && system.tasks.iter().flatten().any(is_late)
            }),
            Property::sometimes("a takeover verifies the object of an earlier attempt", |_, system: &SystemState| {
                let proves = |task: &Task| task.attempt > 1 && matches!(task.step, Step::Decided(Verdict::Good(_)));
                system.tasks.iter().flatten().any(|task| proves(task) && task.is_current)
            }),
        ];
        if self.is_multipart() {
            properties.extend([
                Property::sometimes("two multipart uploads are open at the same time", |_, system: &SystemState| {
                    system.uploads.iter().all(|upload| matches!(upload, Upload::Open(_)))
                }),
                Property::sometimes("a part arrives after the abort of its upload", |_, system: &SystemState| {
                    system.uploads.contains(&Upload::Leftover)
                }),
            ]);
        } else {
            properties.push(Property::sometimes(
                "the second cleanup removes the object of a late PUT",
                |_, system: &SystemState| {
                    let is_second = matches!(system.session, SessionState::Failed(_, CleanupState::SecondDue));
                    is_second && system.cleanup.is_some_and(|cleanup| cleanup.step == CleanupStep::Recording(true))
                },
            ));
        }
        if self.layout == Layout::Single {
            properties.extend(unclaimed_properties());
        }
        properties
    }
}

/// What a completion without a claim can meet.
fn unclaimed_properties() -> [Property<Completion>; 2] {
    [
        Property::sometimes("two tasks find the object without a claim", |_, system: &SystemState| {
            system.tasks.iter().flatten().filter(|task| has_found(task)).count() == 2
        }),
        Property::sometimes("a session fails while a task without a claim looks at its object", |_, system: &SystemState| {
            matches!(system.session, SessionState::Failed(..)) && system.tasks.iter().flatten().any(has_found)
        }),
    ]
}

fn has_found(task: &Task) -> bool {
    matches!(task.step, Step::Found(_))
}

fn has_failed(system: &SystemState, failure_kind: Failure) -> bool {
    matches!(system.session, SessionState::Failed(failure, CleanupState::Done) if failure == failure_kind)
}
