//! Completion: one session from its open to its promise or its failure, and what is left of it in S3.
//!
//! Two tasks at a time work on it, as `finish.rs` and `broker/complete.rs` do, beside its client, two requests that
//! make its multipart upload (`broker/open.rs`) and the sweeper. A task is of any replica, or all are of one: who holds
//! a lease is not modelled, only its attempt, for that is all that tells two tasks of one replica apart. The version
//! of the row is not counted: a task's knowledge of it is current, or it is not.

mod world;

use stateright::{Model, Property};

use world::{Answer, Bytes, Cleanup, Failure, Making, Put, State, Step, Sweep, Sweeping, Task, Upload, Verdict, World};

/// The decisions of the protocol. One of them changed is a broken design.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Design {
    /// A presigned PUT carries a signed `If-None-Match: *`.
    pub(crate) puts_once: bool,
    /// A move is written under the state and the version that its writer has read.
    pub(crate) guards_moves: bool,
    /// What S3 holds decides, whatever it answered when it was asked to join the parts.
    pub(crate) looks_again: bool,
    /// A session is ended in PostgreSQL before anything of it is destroyed in S3.
    pub(crate) decides_first: bool,
    /// S3 is swept once more when nothing can land in it any more.
    pub(crate) sweeps_twice: bool,
    /// Every multipart upload of the key is aborted, not only the one that the row names.
    pub(crate) sweeps_all: bool,
}

impl Design {
    /// The design of this house.
    pub(crate) const HOUSE: Self = Self {
        puts_once: true,
        guards_moves: true,
        looks_again: true,
        decides_first: true,
        sweeps_twice: true,
        sweeps_all: true,
    };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One PUT.
    Single,
    /// One PUT whose bytes S3 cannot prove: they are read back.
    ReadBack,
    /// Parts, of which one stands for all.
    Multipart,
}

pub(crate) const SAME_BYTES: &str = "the object of a promised session is the one that was verified";
pub(crate) const NOTHING_LEFT: &str = "at rest a failed session has no object and no multipart upload";
pub(crate) const JUSTLY_REJECTED: &str = "only what is wrong is rejected";
pub(crate) const ONE_END: &str = "no session ends in two ways";
pub(crate) const ALL_END: &str = "at rest the session has ended";

/// A design, and the bounds within which all of it is looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) design: Design,
    pub(crate) layout: Layout,
    /// How often its client asks to complete it.
    pub(crate) asks: u8,
    pub(crate) crashes: u8,
    /// Everything else that goes wrong: so often in all.
    pub(crate) faults: u8,
}

/// One atomic step of somebody. Whoever is between two steps may stay there while the others go on: a pause, a zombie
/// and a late PUT are orders of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    PutBegins(Bytes),
    PutLands(usize),
    AskToComplete,
    Abort,
    TimePasses,
    Expire,
    AskForUpload,
    Make(usize, Making),
    /// What a task does next follows from where it stands.
    Work(usize, Task),
    TakeOver,
    FinishLands(usize),
    /// Its holder is dead, or has given up.
    LeaseEnds,
    Sweep,

    CrashTask(usize),
    CrashMaking(usize),
    CrashSweeper,
    /// Its holder lives, and is stopped or cut off from PostgreSQL.
    LivingLeaseEnds,
    /// S3 does not answer.
    Silence(usize),
    /// S3 refuses, and would refuse again: the session is given back to its client.
    Refuse(usize),
    /// S3 has not answered, and the session's last end is over: it is ended instead of given back.
    GiveUp(usize),
    /// S3 makes the upload, and its answer is lost.
    MakeUnheard(usize),
}

impl Completion {
    pub(crate) fn house(layout: Layout, asks: u8, crashes: u8, faults: u8) -> Self {
        Self { design: Design::HOUSE, layout, asks, crashes, faults }
    }

    fn is_multipart(&self) -> bool {
        self.layout == Layout::Multipart
    }

    fn offer_usual(&self, world: &World, offers: &mut Vec<Action>) {
        self.offer_client(world, offers);
        for (making, step) in world.makings.iter().enumerate().filter_map(|(making, step)| Some((making, (*step)?))) {
            offers.push(Action::Make(making, step));
        }
        for (number, task) in world.tasks.iter().enumerate().filter_map(|(number, task)| Some((number, (*task)?))) {
            offers.push(Action::Work(number, task));
        }
        offers.extend((0..world.finishes.len()).map(Action::FinishLands));
        if world.is_over {
            let releasing =
                world.tasks.iter().enumerate().filter(|(_, task)| task.is_some_and(|task| task.step == Step::Releasing));
            offers.extend(releasing.map(|(number, _)| Action::GiveUp(number)));
        }
        if let State::Completing { lease, .. } = world.state {
            match lease.is_over {
                true if world.tasks.contains(&None) => offers.push(Action::TakeOver),
                false if !world.is_worked_on(lease) => offers.push(Action::LeaseEnds),
                _ => {}
            }
        }
        if world.sweep.is_some() || self.next_sweep(world).is_some() {
            offers.push(Action::Sweep);
        }
    }

    fn offer_client(&self, world: &World, offers: &mut Vec<Action>) {
        if !world.is_over {
            offers.push(Action::TimePasses);
            if !self.is_multipart() || world.upload.is_some() {
                match world.puts {
                    [Put::Unsent, _] => offers.extend([Action::PutBegins(Bytes::Right), Action::PutBegins(Bytes::Wrong)]),
                    [_, Put::Unsent] => offers.push(Action::PutBegins(Bytes::AlsoRight)),
                    _ => {}
                }
            }
        }
        let in_flight = (0..world.puts.len()).filter(|put| matches!(world.puts[*put], Put::InFlight(..)));
        offers.extend(in_flight.map(Action::PutLands));
        let is_open = world.state == State::Open;
        if is_open && !world.is_over && world.asks_left > 0 && world.tasks.contains(&None) {
            offers.push(Action::AskToComplete);
        }
        if world.may_abort && (is_open || matches!(world.state, State::Completing { must_read: true, .. })) {
            offers.push(Action::Abort);
        }
        if is_open && world.is_over && self.design.decides_first {
            offers.push(Action::Expire);
        }
        let unborn = world.uploads.iter().filter(|upload| **upload == Upload::Unborn).count();
        let asked = world.makings.iter().filter(|making| **making == Some(Making::Asked)).count();
        let may_ask = self.is_multipart() && is_open && !world.is_over && world.upload.is_none();
        if may_ask && asked < unborn && world.makings.contains(&None) {
            offers.push(Action::AskForUpload);
        }
    }

    fn offer_faults(&self, world: &World, offers: &mut Vec<Action>) {
        let tasks = || world.tasks.iter().enumerate().filter_map(|(number, task)| Some((number, (*task)?)));
        let makings = || world.makings.iter().enumerate().filter_map(|(making, step)| Some((making, (*step)?)));
        if world.crashes_left > 0 {
            offers.extend(tasks().map(|(number, _)| Action::CrashTask(number)));
            offers.extend(makings().map(|(making, _)| Action::CrashMaking(making)));
            offers.extend(world.sweep.map(|_| Action::CrashSweeper));
        }
        if world.faults_left > 0 {
            let asks_s3 = |task: &Task| !matches!(task.step, Step::Claiming | Step::Decided(_) | Step::Releasing);
            for (number, _) in tasks().filter(|(_, task)| asks_s3(task)) {
                offers.extend([Action::Silence(number), Action::Refuse(number)]);
            }
            let asked = makings().filter(|(_, step)| *step == Making::Asked);
            offers.extend(asked.map(|(making, _)| Action::MakeUnheard(making)));
            if let State::Completing { lease, .. } = world.state
                && !lease.is_over
                && world.is_worked_on(lease)
            {
                offers.push(Action::LivingLeaseEnds);
            }
        }
    }

    /// Whether nothing happens any more unless something fails.
    fn is_at_rest(&self, world: &World) -> bool {
        let mut offers = Vec::new();
        self.offer_usual(world, &mut offers);
        offers.is_empty()
    }

    /// One step of a task; `None` when it has ended.
    fn work(&self, world: &mut World, task: Task) -> Option<Task> {
        let step = match task.step {
            Step::Claiming => return world.claim(task),
            Step::Look if self.is_multipart() && task.attempt == 1 => Step::List,
            Step::Look => match world.object {
                Some(bytes) if task.must_read => Step::Read(bytes),
                Some(bytes) => self.found(bytes),
                None if self.is_multipart() => Step::List,
                None => Step::Decided(Verdict::Missing),
            },
            Step::List => match world.upload.map(|upload| world.uploads[upload]) {
                Some(Upload::Begun(Some(bytes))) => Step::Finish(bytes),
                Some(Upload::Begun(None)) | None => Step::Decided(Verdict::Missing),
                Some(_) => Step::LookAgain(Answer::Unlisted),
            },
            Step::Finish(bytes) => Step::LookAgain(world.upload.map_or(Answer::Any, |upload| world.join(upload, bytes))),
            Step::LookAgain(answer) => match (world.object, answer) {
                (_, Answer::Refused) if !self.design.looks_again => Step::Decided(Verdict::Wrong),
                (Some(bytes), _) => self.found(bytes),
                (None, Answer::Any) => Step::Releasing,
                (None, Answer::Refused) => Step::Decided(Verdict::Missing),
                (None, Answer::Unlisted) => {
                    world.upload = None;
                    Step::Decided(Verdict::Missing)
                }
            },
            Step::Tidy(bytes) => {
                world.abort_uploads(None);
                Step::Decided(judge(bytes))
            }
            // `If-Match`: other bytes than those that were looked at are an error.
            Step::Read(bytes) if world.object == Some(bytes) => Step::Decided(judge(bytes)),
            Step::Read(_) => Step::Releasing,
            Step::Decided(verdict) => {
                let is_ours = task.is_current && matches!(world.state, State::Completing { .. });
                if is_ours || !self.design.guards_moves {
                    world.decide(verdict);
                }
                return None;
            }
            Step::Releasing => {
                world.release(task.attempt);
                return None;
            }
        };
        Some(Task { step, ..task })
    }

    /// What a look at the object leads to.
    fn found(&self, bytes: Bytes) -> Step {
        match self.layout {
            Layout::Single => Step::Decided(judge(bytes)),
            Layout::ReadBack => Step::Decided(Verdict::MustRead),
            Layout::Multipart => Step::Tidy(bytes),
        }
    }

    fn land(&self, world: &mut World, put: usize) {
        let Put::InFlight(bytes, upload) = world.puts[put] else { return };
        world.puts[put] = Put::Over;
        match upload.map(|upload| &mut world.uploads[upload]) {
            Some(Upload::Begun(part)) => *part = Some(bytes),
            // Amazon S3 says of AbortMultipartUpload that parts in flight may succeed, and to abort again.
            Some(upload @ Upload::Aborted) => *upload = Upload::Leftover,
            Some(_) => {}
            None if world.object.is_none() || !self.design.puts_once => world.object = Some(bytes),
            None => {}
        }
    }

    fn next_sweep(&self, world: &World) -> Option<Sweep> {
        let is_last = world.is_quiet();
        let is_undecided = world.state == State::Open && world.is_over && !self.design.decides_first;
        let is_due = match world.state {
            State::Failed(_, Cleanup::Due) => true,
            State::Failed(_, Cleanup::DueLate) => is_last,
            _ => is_undecided,
        };
        is_due.then_some(Sweep { step: Sweeping::Uploads, is_last, is_undecided })
    }

    fn sweep(&self, world: &mut World) {
        let Some(sweep) = world.sweep else {
            world.sweep = self.next_sweep(world);
            return;
        };
        let next = match sweep.step {
            Sweeping::Uploads => {
                let known = world.upload;
                world.abort_uploads(if self.design.sweeps_all { None } else { Some(known) });
                Some(Sweeping::Object)
            }
            Sweeping::Object => Some(Sweeping::Noting(world.object.take().is_some())),
            Sweeping::Noting(_) => {
                if sweep.is_undecided && world.state == State::Open {
                    world.fail(Failure::Expired);
                }
                if let State::Failed(_, cleanup) = &mut world.state {
                    *cleanup = if sweep.is_last || !self.design.sweeps_twice { Cleanup::Done } else { Cleanup::DueLate };
                }
                None
            }
        };
        world.sweep = next.map(|step| Sweep { step, ..sweep });
    }
}

fn judge(bytes: Bytes) -> Verdict {
    if bytes == Bytes::Wrong { Verdict::Wrong } else { Verdict::Good(bytes) }
}

impl Model for Completion {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            state: State::Open,
            upload: None,
            ends: 0,
            object: None,
            uploads: [Upload::Unborn; 2],
            finishes: Vec::new(),
            puts: [Put::Unsent; 2],
            asks_left: self.asks,
            may_abort: true,
            is_over: false,
            tasks: [None; 2],
            makings: [None; 2],
            sweep: None,
            crashes_left: self.crashes,
            faults_left: self.faults,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        self.offer_usual(world, actions);
        self.offer_faults(world, actions);
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::PutBegins(bytes) => {
                let unsent = world.puts.iter().position(|put| *put == Put::Unsent)?;
                world.puts[unsent] = Put::InFlight(bytes, world.upload);
            }
            Action::PutLands(put) => self.land(&mut world, put),
            Action::AskToComplete => {
                world.asks_left -= 1;
                world.begin(1, false);
            }
            Action::TakeOver => {
                if let State::Completing { lease, must_read } = world.state {
                    world.begin(lease.attempt + 1, must_read);
                }
            }
            Action::Work(number, task) => {
                world.tasks[number] = None;
                world.tasks[number] = self.work(&mut world, task);
            }
            Action::FinishLands(number) => {
                let (upload, bytes) = world.finishes.remove(number);
                world.join(upload, bytes);
            }
            Action::Abort => world.fail(Failure::Aborted),
            Action::Expire => world.fail(Failure::Expired),
            Action::TimePasses => world.is_over = true,
            Action::AskForUpload => {
                let free = world.makings.iter().position(Option::is_none)?;
                world.makings[free] = Some(Making::Asked);
            }
            Action::Make(making, _) => world.make(making),
            Action::Sweep => self.sweep(&mut world),
            Action::LeaseEnds | Action::LivingLeaseEnds => {
                if let State::Completing { lease, .. } = &mut world.state {
                    lease.is_over = true;
                }
            }
            Action::CrashTask(number) => world.tasks[number] = None,
            Action::CrashMaking(making) => world.makings[making] = None,
            Action::CrashSweeper => world.sweep = None,
            Action::Silence(number) => world.silence(number),
            Action::Refuse(number) => {
                world.silence(number);
                world.tasks[number] = world.tasks[number].map(|task| Task { step: Step::Decided(Verdict::Missing), ..task });
            }
            Action::GiveUp(number) => {
                let task = world.tasks[number].take()?;
                if task.is_current && matches!(world.state, State::Completing { .. }) {
                    world.fail(Failure::Expired);
                }
            }
            Action::MakeUnheard(making) => {
                world.begin_upload();
                world.makings[making] = None;
            }
        }
        match action {
            Action::CrashTask(_) | Action::CrashMaking(_) | Action::CrashSweeper => world.crashes_left -= 1,
            Action::LivingLeaseEnds | Action::Silence(_) | Action::Refuse(_) | Action::MakeUnheard(_) => world.faults_left -= 1,
            _ => {}
        }
        // Tasks have no names, nor have requests: worlds that differ in their order are one.
        world.tasks.sort_unstable();
        world.makings.sort_unstable();
        world.finishes.sort_unstable();
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(SAME_BYTES, |_, world: &World| match world.state {
                State::Verified(bytes) => world.object == Some(bytes),
                _ => true,
            }),
            Property::always(NOTHING_LEFT, |house: &Self, world: &World| {
                let is_kept = |upload: &Upload| matches!(upload, Upload::Begun(_) | Upload::Leftover);
                let is_clean = world.object.is_none() && !world.uploads.iter().any(is_kept);
                is_clean || !matches!(world.state, State::Failed(..)) || !house.is_at_rest(world)
            }),
            Property::always(JUSTLY_REJECTED, |_, world: &World| {
                let rejects = |task: &Task| task.step == Step::Decided(Verdict::Wrong) && task.is_current;
                world.object == Some(Bytes::Wrong) || !world.tasks.iter().flatten().any(rejects)
            }),
            Property::always(ONE_END, |_, world: &World| world.ends <= 1),
            Property::always(ALL_END, |house: &Self, world: &World| {
                matches!(world.state, State::Verified(_) | State::Failed(_, Cleanup::Done)) || !house.is_at_rest(world)
            }),
            Property::sometimes("a session is promised", |_, world: &World| matches!(world.state, State::Verified(_))),
            Property::sometimes("a session is aborted", |_, world: &World| has_failed(world, Failure::Aborted)),
            Property::sometimes("a session expires", |_, world: &World| has_failed(world, Failure::Expired)),
            Property::sometimes("a session is rejected", |_, world: &World| has_failed(world, Failure::Rejected)),
            Property::sometimes("a session that S3 does not prove is given up", |_, world: &World| {
                let is_last = |task: &Task| task.step == Step::Releasing && task.is_current;
                world.is_over && world.tasks.iter().flatten().any(is_last)
            }),
            Property::sometimes("two tasks work at once", |_, world: &World| {
                world.tasks.iter().flatten().filter(|task| task.step != Step::Claiming).count() == 2
            }),
            Property::sometimes("a zombie's verdict comes after the promise", |_, world: &World| {
                let is_late = |task: &Task| matches!(task.step, Step::Decided(_)) && !task.is_current;
                matches!(world.state, State::Verified(_)) && world.tasks.iter().flatten().any(is_late)
            }),
            Property::sometimes("a takeover proves the object that somebody else has left", |_, world: &World| {
                let proves = |task: &Task| task.attempt > 1 && matches!(task.step, Step::Decided(Verdict::Good(_)));
                world.tasks.iter().flatten().any(|task| proves(task) && task.is_current)
            }),
        ];
        if self.is_multipart() {
            properties.extend([
                Property::sometimes("two multipart uploads stand side by side", |_, world: &World| {
                    world.uploads.iter().all(|upload| matches!(upload, Upload::Begun(_)))
                }),
                Property::sometimes("a part lands after the abort of its upload", |_, world: &World| {
                    world.uploads.contains(&Upload::Leftover)
                }),
            ]);
        } else {
            properties.push(Property::sometimes("the second pass removes the object of a late PUT", |_, world: &World| {
                let is_second = matches!(world.state, State::Failed(_, Cleanup::DueLate));
                is_second && world.sweep.is_some_and(|sweep| sweep.step == Sweeping::Noting(true))
            }));
        }
        properties
    }
}

fn has_failed(world: &World, how: Failure) -> bool {
    matches!(world.state, State::Failed(failure, Cleanup::Done) if failure == how)
}
