//! Publication: pointers on their way from PostgreSQL's promise to one committed record each in Kafka.
//!
//! Two replicas relay one shard, as `relay.rs`, `store/outbox.rs` and `kafka/shard.rs` do. Who is ousted and who is
//! fenced is kept as what the others did meanwhile, not as epochs: two worlds that differ in numbers only are one.

mod world;

use stateright::{Model, Property};

use world::{Marker, Owner, POINTERS, Pointer, REPLICAS, Relay, Shard, Stamps, Step, Transaction, World};

/// The decisions of the protocol. One of them changed is a broken design.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Design {
    /// A shard has one owner. Without, each relay takes rows that no other has in hand (`for update skip locked`).
    pub(crate) has_owner: bool,
    /// Taking a shard makes Kafka refuse whoever had it before, and abort what that one had not committed.
    pub(crate) fences: bool,
    pub(crate) settling: Settling,
    /// No new batch while an older stamp is unsettled.
    pub(crate) settles_first: bool,
    /// Only the shard's owner takes a stamp back.
    pub(crate) unstamps_as_owner: bool,
    /// A row is parked only while it bears the stamp of who parks it.
    pub(crate) parks_by_stamp: bool,
    /// A parked row holds up the later ones of its topic and key.
    pub(crate) parks_the_key: bool,
    /// An outbox number is drawn under a lock on topic and key.
    pub(crate) locks_the_key: bool,
    /// A batch takes rows above the highest number that was published, instead of those without a stamp.
    pub(crate) has_cursor: bool,
    /// Whoever takes the shard sends nothing when the marker's batch is later than the last stamp.
    pub(crate) refuses_ahead: bool,
    /// A batch is stamped only if the last batch number is the one that the relay knows.
    pub(crate) claims_by_number: bool,
    /// A batch is stamped only if no row of the shard bears a stamp.
    pub(crate) claims_when_settled: bool,
    /// A database that went back gives the shard's next owner an epoch that nobody had before.
    pub(crate) has_fresh_epochs: bool,
    /// What the marker lists is published, stamped or not.
    pub(crate) settles_all_listed: bool,
    /// No stamp is taken back of what Kafka holds, also where that was written down already.
    pub(crate) leaves_what_is_published: bool,
    /// Only the shard's owner parks a row.
    pub(crate) parks_as_owner: bool,
    /// An audit lets the shard go on up to the marker that was the last one when it began to read the records.
    pub(crate) audits_from_the_marker: bool,
}

/// What a new owner makes of rows that were stamped and not marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settling {
    /// Those that the last marker lists are published.
    ByList,
    /// Those of batches up to the last marker's are published.
    ByNumber,
    /// No marker is read: all are sent again.
    Unread,
}

impl Design {
    /// The design of this house.
    pub(crate) const HOUSE: Self = Self {
        has_owner: true,
        fences: true,
        settling: Settling::ByList,
        settles_first: true,
        unstamps_as_owner: true,
        parks_by_stamp: true,
        parks_the_key: true,
        locks_the_key: true,
        has_cursor: false,
        refuses_ahead: true,
        claims_by_number: true,
        claims_when_settled: true,
        has_fresh_epochs: true,
        settles_all_listed: true,
        leaves_what_is_published: true,
        parks_as_owner: true,
        audits_from_the_marker: true,
    };
}

/// Kafka holds nothing of a transaction that was aborted.
const NONE: [bool; POINTERS] = [false; POINTERS];

pub(crate) const NEVER_LOST: &str = "at rest each promised pointer is published and has one record";
pub(crate) const NEVER_TWICE: &str = "no pointer has two committed records";
pub(crate) const IN_ORDER: &str = "records of one key stand in the order of their promises";
pub(crate) const TRULY_MARKED: &str = "what is marked published is in Kafka";
pub(crate) const ONE_TRANSACTION: &str = "a shard has one open transaction at most";
pub(crate) const NEVER_AHEAD: &str = "the marker is never ahead of the stamps, so no relay takes the database for a backup";

/// A design, and the bounds within which all of it is looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Publication {
    pub(crate) design: Design,
    /// The topic and key of each pointer.
    pub(crate) keys: &'static [u8],
    pub(crate) crashes: u8,
    /// Everything else that goes wrong: so often in all.
    pub(crate) faults: u8,
    /// How often a backup of PostgreSQL is made, which may be restored once while everybody else lives on.
    pub(crate) backups: u8,
}

/// One atomic step of somebody. Whoever is between two steps may stay there while the others go on: a pause, a zombie
/// and a late message are orders of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Draw(usize),
    Promise(usize),
    /// What a relay does next follows from where it stands.
    Relay(usize, Step),
    /// A relay that is ready stamps the first rows that are due: one, or all.
    Stamp(usize, usize),
    /// The owner's lease was lost, and its replica takes it again behind the back of the batch under way.
    Renew(usize),
    DeadLeaseEnds,
    CommitLands(usize),
    ParkingEnds(usize),
    /// An operator has the records read, where a relay refuses the shard.
    AuditBegins,
    AuditEnds,

    Crash(usize),
    /// The transaction that promises is rolled back.
    RollBack(usize),
    /// The owner lives, and is stopped or cut off from PostgreSQL.
    LeaseEnds,
    /// Somebody did not answer: what was asked for is done or not, and the relay drops the shard.
    Unheard(usize),
    /// Kafka refuses one record for good.
    Refuse(usize, usize),
    /// Kafka takes nothing of a batch, and nobody is to blame; the relay goes on with the same producer, or a new one.
    Abort(usize),
    AbortAnew(usize),
    /// Kafka gives up a transaction that took too long, and its producer with it.
    TimeOut(usize),
    /// PostgreSQL as it is now is kept: as a backup, or as what a standby has.
    BackUp,
    /// PostgreSQL is as it was; the lease of then may be over.
    GoBack(bool),
    /// As `Renew` after that, and under the number that the epoch of the batch under way has.
    RenewAlike(usize),
}

impl Publication {
    pub(crate) fn house(keys: &'static [u8], crashes: u8, faults: u8) -> Self {
        Self { design: Design::HOUSE, keys, crashes, faults, backups: 0 }
    }

    pub(crate) fn with_backup(self) -> Self {
        Self { backups: 1, ..self }
    }

    fn offer_usual(&self, world: &World, offers: &mut Vec<Action>) {
        for (pointer, state) in world.pointers.iter().enumerate() {
            let of_key = |state: Pointer| {
                (0..self.keys.len())
                    .filter(move |other| self.keys[*other] == self.keys[pointer] && world.pointers[*other] == state)
            };
            match *state {
                // Those of one key that nobody has begun are alike: the first stands for all.
                Pointer::Proved if world.sent_before.is_none() && of_key(Pointer::Proved).next() != Some(pointer) => {}
                Pointer::Proved if self.design.locks_the_key && of_key(Pointer::Drawn).next().is_some() => {}
                Pointer::Proved => offers.push(Action::Draw(pointer)),
                Pointer::Drawn => offers.push(Action::Promise(pointer)),
                Pointer::Promised { parked: true, .. } => offers.push(Action::ParkingEnds(pointer)),
                Pointer::Promised { .. } | Pointer::Published => {}
            }
        }
        if world.shard.owner == Owner::Dead && !world.shard.is_free {
            offers.push(Action::DeadLeaseEnds);
        }
        let landing = world.open.iter().enumerate().filter(|(_, open)| open.is_committing);
        offers.extend(landing.map(|(number, _)| Action::CommitLands(number)));
        // Whoever promises one of them at this moment is waited for.
        let may_adopt = world.log.iter().all(|record| world.pointers[*record] != Pointer::Drawn);
        match world.audit {
            Some(_) => offers.extend(may_adopt.then_some(Action::AuditEnds)),
            None => offers.extend((may_adopt && world.is_ahead()).then_some(Action::AuditBegins)),
        }
        let is_free = world.shard.is_free || world.shard.owner == Owner::Nobody;
        // Two idle replicas are alike where neither is the owner: the first stands for both.
        let is_alike = world.backup.is_none();
        let idle = world.relays.iter().position(|relay| relay.step == Step::Idle);
        for replica in 0..REPLICAS {
            let relay = &world.relays[replica];
            match relay.step {
                Step::Idle => {
                    let may_own =
                        if is_free { idle == Some(replica) || !is_alike } else { world.shard.owner == Owner::Replica(replica) };
                    if (may_own || !self.design.has_owner) && world.has_waiting() {
                        offers.push(Action::Relay(replica, relay.step));
                    }
                    continue;
                }
                Step::Refused if world.is_ahead() => {}
                Step::Ready if !relay.is_ousted && !self.is_changed(world, relay) => {
                    let due = self.due(world).len();
                    offers.extend((due > 0).then_some(Action::Stamp(replica, 1)));
                    offers.extend((due > 1).then_some(Action::Stamp(replica, due)));
                }
                Step::Committing(_) if world.transaction_of(replica).is_some() => {}
                _ => offers.push(Action::Relay(replica, relay.step)),
            }
            if world.shard.is_free {
                offers.push(Action::Renew(replica));
                if !self.design.has_fresh_epochs && world.sent_before.is_some() {
                    offers.push(Action::RenewAlike(replica));
                }
            }
        }
    }

    fn offer_faults(&self, world: &World, offers: &mut Vec<Action>) {
        let has_memory =
            |replica: &usize| world.relays[*replica].step != Step::Idle || world.shard.owner == Owner::Replica(*replica);
        offers.extend((world.backups_left > 0).then_some(Action::BackUp));
        if world.backup.is_some() {
            offers.extend([Action::GoBack(false), Action::GoBack(true)]);
        }
        if world.crashes_left > 0 {
            offers.extend((0..REPLICAS).filter(has_memory).map(Action::Crash));
        }
        if world.faults_left == 0 {
            return;
        }
        offers.extend((0..self.keys.len()).filter(|pointer| world.pointers[*pointer] == Pointer::Drawn).map(Action::RollBack));
        if matches!(world.shard.owner, Owner::Replica(_)) && !world.shard.is_free {
            offers.push(Action::LeaseEnds);
        }
        offers.extend((0..world.open.len()).map(Action::TimeOut));
        for (replica, relay) in world.relays.iter().enumerate() {
            match relay.step {
                Step::Idle => continue,
                Step::Sent(stamps) if !relay.is_fenced => {
                    offers.extend([Action::Abort(replica), Action::AbortAnew(replica)]);
                    let sent = (0..POINTERS).filter(|pointer| stamps[*pointer].is_some());
                    offers.extend(sent.map(|pointer| Action::Refuse(replica, pointer)));
                }
                _ => {}
            }
            offers.push(Action::Unheard(replica));
        }
    }

    /// Whether nothing happens any more unless something fails.
    fn is_at_rest(&self, world: &World) -> bool {
        let mut offers = Vec::new();
        self.offer_usual(world, &mut offers);
        offers.is_empty()
    }

    /// The pointers that the next batch may take, by number.
    fn due(&self, world: &World) -> Vec<usize> {
        let mut due = Vec::new();
        let mut held_up = Vec::new();
        for (place, pointer) in world.drawn.iter().enumerate() {
            match world.pointers[*pointer] {
                Pointer::Promised { parked: true, .. } if self.design.parks_the_key => held_up.push(self.keys[*pointer]),
                Pointer::Promised { batch: None, parked: false }
                    if !held_up.contains(&self.keys[*pointer]) && !self.is_passed(world, place) =>
                {
                    due.push(*pointer);
                }
                _ => {}
            }
        }
        due
    }

    /// Whether the shard is not as its holder left it: then no batch of it is stamped.
    fn is_changed(&self, world: &World, relay: &Relay) -> bool {
        let is_other = self.backups > 0 && relay.last_batch != world.shard.last_batch;
        (self.design.claims_by_number && is_other) || (self.design.claims_when_settled && world.stamps() != [None; POINTERS])
    }

    /// Whether a cursor stands behind this place already.
    fn is_passed(&self, world: &World, place: usize) -> bool {
        self.design.has_cursor && world.drawn[place..].iter().any(|later| world.pointers[*later] == Pointer::Published)
    }

    /// What a relay does next, and where it stands then.
    fn go(&self, world: &mut World, replica: usize) -> Step {
        let Relay { step, is_ousted, is_fenced, .. } = world.relays[replica];
        match step {
            Step::Idle => {
                if self.design.has_owner && (world.shard.is_free || world.shard.owner != Owner::Replica(replica)) {
                    world.own(replica);
                }
                world.note_epoch(replica);
                world.relays[replica].is_ousted = false;
                Step::Owning
            }
            Step::Owning => {
                self.fence(world, replica);
                Step::Fenced
            }
            Step::Fenced => Step::Asked(world.marker.filter(|_| self.design.settling != Settling::Unread)),
            Step::Asked(_) if self.design.refuses_ahead && world.is_ahead() => Step::Refused,
            Step::Asked(marker) if self.backups > 0 => {
                world.relays[replica].last_batch = world.shard.last_batch;
                Step::Compared(marker)
            }
            Step::Asked(marker) | Step::Compared(marker) => self.read_stamps(world, marker),
            Step::Settling(_, listed) if !world.mark(listed) => Step::Idle,
            Step::Settling(stamps, listed) => {
                Step::Unstamping(stamps, listed.map(|is_listed| is_listed && self.design.leaves_what_is_published))
            }
            Step::Unstamping(..) | Step::Retaking(_) if is_ousted && self.design.unstamps_as_owner => Step::Idle,
            Step::Unstamping(stamps, published) => {
                world.unstamp(stamps, published);
                Step::Ready
            }
            Step::Retaking(stamps) => {
                world.unstamp(stamps, NONE);
                Step::Owning
            }
            // The epoch that was read on renewing is another, or the shard is not as it was left, or was audited.
            Step::Ready | Step::Refused => Step::Idle,
            Step::Stamped(_) | Step::Sent(_) if is_fenced => {
                world.leave(replica);
                Step::Idle
            }
            Step::Stamped(stamps) => {
                world.open.push(Transaction { lists: stamps, waiter: Some(replica), is_committing: false });
                Step::Sent(stamps)
            }
            Step::Sent(stamps) => {
                if let Some(number) = world.transaction_of(replica) {
                    world.open[number].is_committing = true;
                }
                Step::Committing(stamps)
            }
            // The transaction is gone: Kafka refuses the commit.
            Step::Committing(_) => Step::Idle,
            Step::Marking(stamps) => {
                if world.mark(stamps.map(|stamp| stamp.is_some())) {
                    Step::Ready
                } else {
                    Step::Idle
                }
            }
            Step::Parking(stamps, refused) => {
                if let Pointer::Promised { batch, .. } = world.pointers[refused]
                    && (batch == stamps[refused] || !self.design.parks_by_stamp)
                    && !(is_ousted && self.design.parks_as_owner)
                {
                    world.pointers[refused] = Pointer::Promised { batch: None, parked: true };
                }
                Step::Unstamping(stamps, NONE)
            }
        }
    }

    /// What the marker lists and what is stamped: whether anything is to be settled.
    fn read_stamps(&self, world: &World, marker: Option<Marker>) -> Step {
        let stamps = world.stamps();
        let listed = self.listed(stamps, marker);
        let is_settled = |(state, is_listed): (&Pointer, bool)| !is_listed || *state == Pointer::Published;
        if stamps == [None; POINTERS] && world.pointers.iter().zip(listed).all(is_settled) {
            Step::Ready
        } else {
            Step::Settling(stamps, listed)
        }
    }

    fn begin_audit(&self, world: &mut World) {
        if !self.design.audits_from_the_marker {
            world.adopt();
        }
        world.audit = world.marker.map(|marker| marker.batch);
    }

    fn end_audit(&self, world: &mut World) {
        let mut began = world.audit.take();
        if self.design.audits_from_the_marker {
            world.adopt();
        } else {
            began = world.marker.map(|marker| marker.batch);
        }
        world.shard.last_batch = world.shard.last_batch.max(began.unwrap_or_default());
    }

    /// `init_transactions`.
    fn fence(&self, world: &mut World, replica: usize) {
        if self.design.fences {
            world.open.clear();
            for relay in world.relays.iter_mut().filter(|relay| relay.step != Step::Idle) {
                relay.is_fenced = true;
            }
        }
        world.relays[replica].is_fenced = false;
    }

    /// What is published, of the stamped rows or of all.
    fn listed(&self, stamps: Stamps, marker: Option<Marker>) -> [bool; POINTERS] {
        std::array::from_fn(|pointer| match (stamps[pointer], marker) {
            (Some(batch), Some(marker)) if self.design.settling == Settling::ByNumber => batch <= marker.batch,
            (Some(_), Some(marker)) => marker.lists[pointer],
            (None, Some(marker)) => marker.lists[pointer] && self.design.settles_all_listed,
            _ => false,
        })
    }

    /// An error on the way: the relay drops the shard, and whoever takes it fences and settles.
    fn fail(&self, world: &mut World, replica: usize) {
        let goes_on = !self.design.settles_first && matches!(world.relays[replica].step, Step::Marking(_));
        world.leave(replica);
        world.turn(replica, if goes_on { Step::Ready } else { Step::Idle });
    }
}

impl Model for Publication {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            pointers: vec![Pointer::Proved; self.keys.len()],
            drawn: Vec::new(),
            promised: Vec::new(),
            shard: Shard { owner: Owner::Nobody, is_free: false, last_batch: 0 },
            relays: [Relay::IDLE; REPLICAS],
            log: Vec::new(),
            open: Vec::new(),
            marker: None,
            crashes_left: self.crashes,
            faults_left: self.faults,
            backups_left: self.backups,
            backup: None,
            sent_before: None,
            audit: None,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        self.offer_usual(world, actions);
        self.offer_faults(world, actions);
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Draw(pointer) => {
                world.pointers[pointer] = Pointer::Drawn;
                world.drawn.push(pointer);
            }
            Action::Promise(pointer) => {
                world.pointers[pointer] = Pointer::Promised { batch: None, parked: false };
                world.promised.push(pointer);
            }
            Action::Relay(replica, _) => {
                let next = self.go(&mut world, replica);
                world.turn(replica, next);
            }
            Action::Stamp(replica, rows) => {
                let due = self.due(&world);
                let stamped = Step::Stamped(world.stamp(&due[..rows]));
                world.turn(replica, stamped);
                if self.backups > 0 {
                    world.relays[replica].last_batch = world.shard.last_batch;
                }
            }
            Action::Renew(replica) => world.own(replica),
            Action::DeadLeaseEnds => world.shard.is_free = true,
            Action::CommitLands(number) => world.commit(number),
            Action::ParkingEnds(pointer) => world.pointers[pointer] = Pointer::Promised { batch: None, parked: false },
            Action::AuditBegins => self.begin_audit(&mut world),
            Action::AuditEnds => self.end_audit(&mut world),
            Action::Crash(replica) => world.crash(replica),
            Action::BackUp => world.back_up(),
            Action::GoBack(is_free) => world.go_back(is_free),
            Action::RenewAlike(replica) => {
                world.own(replica);
                world.relays[replica].is_ousted = false;
            }
            fault => {
                world.faults_left -= 1;
                match fault {
                    Action::RollBack(pointer) => {
                        world.pointers[pointer] = Pointer::Proved;
                        world.drawn.retain(|drawn| *drawn != pointer);
                    }
                    Action::LeaseEnds => world.shard.is_free = true,
                    Action::Unheard(replica) => self.fail(&mut world, replica),
                    Action::Refuse(replica, refused) => world.give_up(replica, |stamps| Step::Parking(stamps, refused)),
                    Action::Abort(replica) if self.design.settles_first => {
                        world.give_up(replica, |stamps| Step::Unstamping(stamps, NONE));
                    }
                    Action::Abort(replica) => world.give_up(replica, |_| Step::Ready),
                    Action::AbortAnew(replica) => world.give_up(replica, Step::Retaking),
                    Action::TimeOut(number) => {
                        if let Some(replica) = world.open.remove(number).waiter {
                            world.relays[replica].is_fenced = true;
                        }
                    }
                    _ => {}
                }
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(NEVER_LOST, |house: &Self, world: &World| {
                let is_kept = world.is_published() && (0..house.keys.len()).all(|pointer| world.records(pointer) == 1);
                is_kept || !house.is_at_rest(world)
            }),
            Property::always(NEVER_TWICE, |_, world: &World| (0..POINTERS).all(|pointer| world.records(pointer) <= 1)),
            Property::always(IN_ORDER, |house: &Self, world: &World| {
                // What was sent of a promise that PostgreSQL has forgotten has no order with the promises of later.
                let counts = |pointer: usize| world.sent_before.is_none_or(|sent| !sent[pointer]);
                house.keys.iter().all(|key| world.is_in_order(|pointer| house.keys[**pointer] == *key && counts(**pointer)))
            }),
            Property::always(TRULY_MARKED, |_, world: &World| {
                let is_so = |(pointer, state): (usize, &Pointer)| *state != Pointer::Published || world.records(pointer) > 0;
                world.pointers.iter().enumerate().all(is_so)
            }),
            Property::always(ONE_TRANSACTION, |house: &Self, world: &World| !house.design.fences || world.open.len() <= 1),
            Property::always(NEVER_AHEAD, |_, world: &World| !world.is_ahead() || world.sent_before.is_some()),
            Property::sometimes("all pointers are published in one batch", |house: &Self, world: &World| {
                world.marker.is_some_and(|marker| marker.lists[..house.keys.len()].iter().all(|listed| *listed))
            }),
        ];
        if self.crashes > 0 {
            properties.extend([
                Property::sometimes("after a crash all pointers are published", |_, world: &World| {
                    world.crashes_left == 0 && world.is_published()
                }),
                Property::sometimes("a batch that nobody marked is found in the marker", |_, world: &World| {
                    world.settles(|listed| listed.contains(&true))
                }),
                Property::sometimes("a batch is not in the marker, and is to be sent again", |_, world: &World| {
                    world.settles(|listed| !listed.contains(&true))
                }),
            ]);
        }
        if self.backups > 0 {
            properties.extend([
                Property::sometimes("a relay that lived on refuses the shard", |house: &Self, world: &World| {
                    world.crashes_left == house.crashes && world.relays.iter().any(|relay| relay.step == Step::Refused)
                }),
                Property::sometimes("what was lost is published after an audit", |_, world: &World| {
                    world.sent_before.is_some_and(|sent| sent.contains(&true)) && world.is_published() && !world.is_ahead()
                }),
            ]);
        }
        if self.faults > 0 && self.backups == 0 {
            properties.extend([
                Property::sometimes("a zombie's commit is fenced while the new owner sends", |_, world: &World| {
                    let is_zombie = |relay: &Relay| matches!(relay.step, Step::Committing(_)) && relay.is_fenced;
                    let sends = |relay: &Relay| matches!(relay.step, Step::Sent(_)) && !relay.is_fenced;
                    world.relays.iter().any(is_zombie) && world.relays.iter().any(sends)
                }),
                Property::sometimes("a commit is on its way that nobody waits for", |_, world: &World| {
                    world.open.iter().any(|open| open.is_committing && open.waiter.is_none())
                }),
                Property::sometimes("a pointer is parked", |_, world: &World| {
                    world.pointers.iter().any(|pointer| matches!(pointer, Pointer::Promised { parked: true, .. }))
                }),
            ]);
        }
        properties
    }
}
