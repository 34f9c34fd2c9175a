//! Publication: pointers from the outbox in PostgreSQL to one committed record each in Kafka.
//!
//! Two replicas relay one shard, as in `relay.rs`, `store/outbox.rs` and `kafka/shard.rs`. Lost leases and fenced producers
//! are flags that other steps set, not epochs, so that states that differ only in numbers are the same.
//!
//! A batch sends its records and its marker together, so the marker lists uploads and not offsets. A new owner decides by
//! the last committed marker alone which rows are published. Then it reads the topics, but only to learn the offsets of the
//! listed rows that PostgreSQL does not show as published. A listed row is published even if its topic no longer has the
//! record. The model has no offsets: here the lookup is one more step during which everything else may happen, and the
//! rejected designs believe its answer. A topic whose records are removed before this step is a fault of its own.

mod system;

use stateright::{Model, Property};

use system::{Claims, Marker, Owner, POINTERS, Pointer, REPLICAS, Relay, Shard, Step, SystemState, Transaction};

/// The decisions of the protocol. A design with one of them changed is broken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Design {
    /// A shard has one owner. Without owners each relay takes rows that no other has claimed (`for update skip locked`).
    pub(crate) has_owner: bool,
    /// Acquiring a shard makes Kafka fence the previous owner and abort its open transaction.
    pub(crate) fences_old_owner: bool,
    /// An owner gives a shard back to balance the replicas only when no batch of it runs.
    pub(crate) gives_back_after_batch: bool,
    pub(crate) resolution: Resolution,
    /// No new batch is claimed while an older claim is unresolved.
    pub(crate) resolves_first: bool,
    /// Only the shard's owner releases a batch.
    pub(crate) only_owner_releases: bool,
    /// A relay defers a row only if the row belongs to the relay's own batch.
    pub(crate) defers_only_own_claim: bool,
    /// A deferred row blocks the later ones of its topic and key.
    pub(crate) deferral_blocks_key: bool,
    /// An outbox number is drawn under a lock on topic and key.
    pub(crate) locks_key: bool,
    /// A batch takes rows above the highest published number instead of unclaimed rows.
    pub(crate) has_cursor: bool,
    /// A new owner publishes nothing if the marker's batch is newer than the last claimed batch.
    pub(crate) refuses_when_behind_marker: bool,
    /// A batch is claimed only if the shard's last batch number is the one that the relay knows.
    pub(crate) checks_batch_number: bool,
    /// A batch is claimed only if no row of the shard is claimed.
    pub(crate) claims_only_when_resolved: bool,
    /// After a restore the shard's next owner gets an epoch that was never used before.
    pub(crate) has_unique_epochs: bool,
    /// The marker is part of the batch's transaction, and an owner reads only committed markers. Otherwise an owner reads
    /// the marker as soon as it is sent.
    pub(crate) reads_committed_marker: bool,
    /// A listed row is published even if its record is no longer in its topic.
    pub(crate) trusts_marker_without_record: bool,
    /// Every row that the marker lists is marked published, claimed or not.
    pub(crate) marks_all_listed: bool,
    /// A row that Kafka holds is never released, even if it was marked published before.
    pub(crate) keeps_claims_of_published: bool,
    /// Only the shard's owner defers a row.
    pub(crate) only_owner_defers: bool,
    /// An audit unblocks the shard up to the marker that was the last one when the audit began to read records.
    pub(crate) audits_from_first_marker: bool,
}

/// What a new owner does with rows that are claimed and not marked published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resolution {
    /// Rows that the last marker lists are published.
    ByList,
    /// Rows of batches up to the last marker's batch are published.
    ByNumber,
    /// The marker is not read: all rows are sent again.
    NotRead,
}

impl Design {
    /// The current design.
    pub(crate) const CURRENT: Self = Self {
        has_owner: true,
        fences_old_owner: true,
        gives_back_after_batch: true,
        resolution: Resolution::ByList,
        resolves_first: true,
        only_owner_releases: true,
        defers_only_own_claim: true,
        deferral_blocks_key: true,
        locks_key: true,
        has_cursor: false,
        refuses_when_behind_marker: true,
        checks_batch_number: true,
        claims_only_when_resolved: true,
        has_unique_epochs: true,
        reads_committed_marker: true,
        trusts_marker_without_record: true,
        marks_all_listed: true,
        keeps_claims_of_published: true,
        only_owner_defers: true,
        audits_from_first_marker: true,
    };
}

/// No pointer is in Kafka, because the transaction was aborted.
const NONE: [bool; POINTERS] = [false; POINTERS];

pub(crate) const NEVER_LOST: &str = "at rest each queued pointer is published and has one record";
pub(crate) const NEVER_TWICE: &str = "no pointer has two committed records";
pub(crate) const IN_ORDER: &str = "records of one key are in the order in which they were queued";
pub(crate) const PUBLISHED_IS_IN_KAFKA: &str = "a pointer that is marked published is in Kafka";
pub(crate) const ONE_TRANSACTION: &str = "a shard has at most one open transaction";
pub(crate) const NEVER_AHEAD: &str = "the marker is never ahead of the claims, so no relay mistakes the database for a backup";

/// A design, and the bounds within which every state is checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Publication {
    pub(crate) design: Design,
    /// The topic and key of each pointer.
    pub(crate) keys: &'static [u8],
    pub(crate) crashes: u8,
    /// The number of all other faults.
    pub(crate) faults: u8,
    /// How many records are removed from their topic after their commit: by compaction, by retention, or with the topic.
    pub(crate) removals: u8,
    /// How many backups of PostgreSQL are made. One may be restored once while every process keeps running.
    pub(crate) backups: u8,
}

/// One atomic step of a process. A process may stay between two steps while others continue: so a pause, a zombie and a
/// late message are orders of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    DrawNumber(usize),
    Enqueue(usize),
    /// The relay's next step follows from its current one.
    Relay(usize, Step),
    /// A ready relay claims the first rows that are due: one, or all.
    ClaimBatch(usize, usize),
    /// The owner has lost its lease, and its replica acquires the shard again while the batch is in flight.
    Renew(usize),
    DeadLeaseEnds,
    CommitLands(usize),
    DeferralEnds(usize),
    /// An operator starts an audit because a relay refuses the shard.
    AuditBegins,
    AuditEnds,

    Crash(usize),
    /// The transaction that queues the pointer is rolled back.
    RollBack(usize),
    /// The owner lives, but is stopped or cut off from PostgreSQL.
    LeaseEnds,
    /// The owner has more than its share of the shards and gives this one back.
    GiveBack(usize),
    /// A request is not answered: it was executed or not, and the relay drops the shard.
    NoResponse(usize),
    /// Kafka refuses one record permanently.
    Refuse(usize, usize),
    /// Kafka refuses a whole batch without naming a record. The relay continues with the same producer, or with a new one.
    Abort(usize),
    AbortAndReplaceProducer(usize),
    /// Kafka aborts a transaction that took too long, and fences its producer.
    TimeOut(usize),
    /// A committed record is removed from its topic.
    RemoveRecord(usize),
    /// The current PostgreSQL becomes the backup, or a standby that lacks later commits.
    MakeBackup,
    /// The backup is restored; the lease in it may have expired.
    RestoreBackup(bool),
    /// Like `Renew` after a restore, but under an epoch number that the batch in flight already has.
    RenewWithSameEpoch(usize),
}

impl Publication {
    pub(crate) fn current(keys: &'static [u8], crashes: u8, faults: u8) -> Self {
        Self { design: Design::CURRENT, keys, crashes, faults, removals: 0, backups: 0 }
    }

    pub(crate) fn with_backup(self) -> Self {
        Self { backups: 1, ..self }
    }

    pub(crate) fn with_removals(self, removals: u8) -> Self {
        Self { removals, ..self }
    }

    fn add_normal_actions(&self, system: &SystemState, actions: &mut Vec<Action>) {
        for (pointer, state) in system.pointers.iter().enumerate() {
            let of_key = |state: Pointer| {
                (0..self.keys.len())
                    .filter(move |other| self.keys[*other] == self.keys[pointer] && system.pointers[*other] == state)
            };
            match *state {
                // Pointers of one key without a number are interchangeable: the first stands for all.
                Pointer::Verified if system.sent_before.is_none() && of_key(Pointer::Verified).next() != Some(pointer) => {}
                Pointer::Verified if self.design.locks_key && of_key(Pointer::Numbered).next().is_some() => {}
                Pointer::Verified => actions.push(Action::DrawNumber(pointer)),
                Pointer::Numbered => actions.push(Action::Enqueue(pointer)),
                Pointer::Queued { deferred: true, .. } => actions.push(Action::DeferralEnds(pointer)),
                Pointer::Queued { .. } | Pointer::Published => {}
            }
        }
        if system.shard.owner == Owner::Dead && !system.shard.is_free {
            actions.push(Action::DeadLeaseEnds);
        }
        let committing = system.transactions.iter().enumerate().filter(|(_, transaction)| transaction.is_committing);
        actions.extend(committing.map(|(number, _)| Action::CommitLands(number)));
        // An audit waits for open transactions that queue one of these pointers.
        let may_adopt = system.log.iter().all(|record| system.pointers[*record] != Pointer::Numbered);
        match system.audit {
            Some(_) => actions.extend(may_adopt.then_some(Action::AuditEnds)),
            None => actions.extend((may_adopt && system.is_kafka_ahead()).then_some(Action::AuditBegins)),
        }
        let is_free = system.shard.is_free || system.shard.owner == Owner::None;
        // Two idle replicas are interchangeable if neither is the owner: the first stands for both.
        let are_interchangeable = system.backup.is_none();
        let idle = system.relays.iter().position(|relay| relay.step == Step::Idle);
        for replica in 0..REPLICAS {
            let relay = &system.relays[replica];
            match relay.step {
                Step::Idle => {
                    let may_own = if is_free {
                        idle == Some(replica) || !are_interchangeable
                    } else {
                        system.shard.owner == Owner::Replica(replica)
                    };
                    if (may_own || !self.design.has_owner) && system.has_queued() {
                        actions.push(Action::Relay(replica, relay.step));
                    }
                    continue;
                }
                Step::Refused if system.is_kafka_ahead() => {}
                Step::Ready if !relay.has_lost_lease && !self.is_changed(system, relay) => {
                    let due = self.due(system).len();
                    actions.extend((due > 0).then_some(Action::ClaimBatch(replica, 1)));
                    actions.extend((due > 1).then_some(Action::ClaimBatch(replica, due)));
                }
                Step::Committing(_) if system.transaction_of(replica).is_some() => {}
                _ => actions.push(Action::Relay(replica, relay.step)),
            }
            if system.shard.is_free {
                actions.push(Action::Renew(replica));
                if !self.design.has_unique_epochs && system.sent_before.is_some() {
                    actions.push(Action::RenewWithSameEpoch(replica));
                }
            }
        }
    }

    fn add_faults(&self, system: &SystemState, actions: &mut Vec<Action>) {
        let has_memory =
            |replica: &usize| system.relays[*replica].step != Step::Idle || system.shard.owner == Owner::Replica(*replica);
        actions.extend((system.backups_left > 0).then_some(Action::MakeBackup));
        if system.backup.is_some() {
            actions.extend([Action::RestoreBackup(false), Action::RestoreBackup(true)]);
        }
        if system.crashes_left > 0 {
            actions.extend((0..REPLICAS).filter(has_memory).map(Action::Crash));
        }
        // Nobody looks for the record of a pointer that is marked published.
        let may_be_looked_up = |pointer: &usize| system.has_record(*pointer) && system.pointers[*pointer] != Pointer::Published;
        if system.removals_left > 0 {
            actions.extend((0..self.keys.len()).filter(may_be_looked_up).map(Action::RemoveRecord));
        }
        if system.faults_left == 0 {
            return;
        }
        actions
            .extend((0..self.keys.len()).filter(|pointer| system.pointers[*pointer] == Pointer::Numbered).map(Action::RollBack));
        if matches!(system.shard.owner, Owner::Replica(_)) && !system.shard.is_free {
            actions.push(Action::LeaseEnds);
        }
        actions.extend((0..system.transactions.len()).map(Action::TimeOut));
        for (replica, relay) in system.relays.iter().enumerate() {
            match relay.step {
                Step::Idle => continue,
                Step::Sent(claims) if !relay.is_fenced => {
                    actions.extend([Action::Abort(replica), Action::AbortAndReplaceProducer(replica)]);
                    let sent = (0..POINTERS).filter(|pointer| claims[*pointer].is_some());
                    actions.extend(sent.map(|pointer| Action::Refuse(replica, pointer)));
                }
                _ => {}
            }
            actions.push(Action::NoResponse(replica));
            let may_give_back = match relay.step {
                Step::Ready => true,
                Step::Claimed(_) | Step::Sent(_) | Step::Committing(_) | Step::MarkingPublished(_) => {
                    !self.design.gives_back_after_batch
                }
                _ => false,
            };
            if may_give_back && system.shard.owner == Owner::Replica(replica) && !system.shard.is_free {
                actions.push(Action::GiveBack(replica));
            }
        }
    }

    /// Whether no step is left except faults.
    fn is_at_rest(&self, system: &SystemState) -> bool {
        let mut actions = Vec::new();
        self.add_normal_actions(system, &mut actions);
        actions.is_empty()
    }

    /// The pointers that the next batch may take, by number.
    fn due(&self, system: &SystemState) -> Vec<usize> {
        let mut due = Vec::new();
        let mut blocked = Vec::new();
        for (index, pointer) in system.numbered.iter().enumerate() {
            match system.pointers[*pointer] {
                Pointer::Queued { deferred: true, .. } if self.design.deferral_blocks_key => blocked.push(self.keys[*pointer]),
                Pointer::Queued { batch: None, deferred: false }
                    if !blocked.contains(&self.keys[*pointer]) && !self.is_passed(system, index) =>
                {
                    due.push(*pointer);
                }
                _ => {}
            }
        }
        due
    }

    /// Whether the shard differs from what its owner knows: then the owner claims no batch.
    fn is_changed(&self, system: &SystemState, relay: &Relay) -> bool {
        let is_other_batch = self.backups > 0 && relay.last_batch != system.shard.last_batch;
        (self.design.checks_batch_number && is_other_batch)
            || (self.design.claims_only_when_resolved && system.claims() != [None; POINTERS])
    }

    /// Whether a cursor is already behind this outbox number.
    fn is_passed(&self, system: &SystemState, index: usize) -> bool {
        self.design.has_cursor && system.numbered[index..].iter().any(|later| system.pointers[*later] == Pointer::Published)
    }

    /// Takes the relay's next step and returns its new one.
    fn advance(&self, system: &mut SystemState, replica: usize) -> Step {
        let Relay { step, has_lost_lease, is_fenced, .. } = system.relays[replica];
        match step {
            Step::Idle => {
                if self.design.has_owner && (system.shard.is_free || system.shard.owner != Owner::Replica(replica)) {
                    system.acquire_shard(replica);
                }
                system.record_epoch(replica);
                system.relays[replica].has_lost_lease = false;
                Step::LeaseAcquired
            }
            Step::LeaseAcquired => {
                self.fence(system, replica);
                Step::Fenced
            }
            Step::Fenced => Step::MarkerRead(system.marker.filter(|_| self.design.resolution != Resolution::NotRead)),
            Step::MarkerRead(_) if self.design.refuses_when_behind_marker && system.is_kafka_ahead() => Step::Refused,
            Step::MarkerRead(marker) if self.backups > 0 => {
                system.relays[replica].last_batch = system.shard.last_batch;
                Step::BatchCompared(marker)
            }
            Step::MarkerRead(marker) | Step::BatchCompared(marker) => self.read_claims(system, marker),
            Step::LookingUp(claims, listed) => Step::Resolving(claims, self.look_up(system, listed)),
            Step::Resolving(_, listed) if !system.mark_published(listed) => Step::Idle,
            Step::Resolving(claims, listed) => {
                Step::Releasing(claims, listed.map(|is_listed| is_listed && self.design.keeps_claims_of_published))
            }
            Step::Releasing(..) | Step::ReleasingToFence(_) if has_lost_lease && self.design.only_owner_releases => Step::Idle,
            Step::Releasing(claims, published) => {
                system.release_batch(claims, published);
                Step::Ready
            }
            Step::ReleasingToFence(claims) => {
                system.release_batch(claims, NONE);
                Step::LeaseAcquired
            }
            // A renewal has read another epoch, or the shard has changed or was audited.
            Step::Ready | Step::Refused => Step::Idle,
            Step::Claimed(_) | Step::Sent(_) if is_fenced => {
                system.abandon_transaction(replica);
                Step::Idle
            }
            Step::Claimed(claims) => {
                self.send(system, replica, claims);
                Step::Sent(claims)
            }
            Step::Sent(claims) => {
                if let Some(number) = system.transaction_of(replica) {
                    system.transactions[number].is_committing = true;
                }
                Step::Committing(claims)
            }
            // The transaction is gone, so Kafka refuses the commit.
            Step::Committing(_) => Step::Idle,
            Step::MarkingPublished(claims) => {
                if system.mark_published(claims.map(|claim| claim.is_some())) {
                    Step::Ready
                } else {
                    Step::Idle
                }
            }
            Step::Deferring(claims, refused) => {
                if let Pointer::Queued { batch, .. } = system.pointers[refused]
                    && (batch == claims[refused] || !self.design.defers_only_own_claim)
                    && !(has_lost_lease && self.design.only_owner_defers)
                {
                    system.pointers[refused] = Pointer::Queued { batch: None, deferred: true };
                }
                Step::Releasing(claims, NONE)
            }
        }
    }

    /// Sends the records and their marker in a new transaction.
    fn send(&self, system: &mut SystemState, replica: usize, claims: Claims) {
        system.transactions.push(Transaction { lists: claims, waiter: Some(replica), is_committing: false });
        if !self.design.reads_committed_marker {
            system.set_marker(claims);
        }
    }

    /// Compares the marker with the claimed rows: whether any row must be resolved.
    fn read_claims(&self, system: &SystemState, marker: Option<Marker>) -> Step {
        let claims = system.claims();
        let listed = self.listed(claims, marker);
        let is_resolved = |(state, is_listed): (&Pointer, bool)| !is_listed || *state == Pointer::Published;
        if claims == [None; POINTERS] && system.pointers.iter().zip(listed).all(is_resolved) {
            Step::Ready
        } else {
            Step::LookingUp(claims, listed)
        }
    }

    /// Looks for the records of the listed rows in their topics, and returns the rows that count as published.
    fn look_up(&self, system: &SystemState, listed: [bool; POINTERS]) -> [bool; POINTERS] {
        std::array::from_fn(|pointer| listed[pointer] && (self.design.trusts_marker_without_record || system.has_record(pointer)))
    }

    fn begin_audit(&self, system: &mut SystemState) {
        if !self.design.audits_from_first_marker {
            system.adopt_records();
        }
        system.audit = system.marker.map(|marker| marker.batch);
    }

    fn end_audit(&self, system: &mut SystemState) {
        let mut began = system.audit.take();
        if self.design.audits_from_first_marker {
            system.adopt_records();
        } else {
            began = system.marker.map(|marker| marker.batch);
        }
        system.shard.last_batch = system.shard.last_batch.max(began.unwrap_or_default());
    }

    /// `init_transactions`.
    fn fence(&self, system: &mut SystemState, replica: usize) {
        if self.design.fences_old_owner {
            system.transactions.clear();
            for relay in system.relays.iter_mut().filter(|relay| relay.step != Step::Idle) {
                relay.is_fenced = true;
            }
        }
        system.relays[replica].is_fenced = false;
    }

    /// Which rows the marker shows as published: among the claimed rows, or among all.
    fn listed(&self, claims: Claims, marker: Option<Marker>) -> [bool; POINTERS] {
        std::array::from_fn(|pointer| match (claims[pointer], marker) {
            (Some(batch), Some(marker)) if self.design.resolution == Resolution::ByNumber => batch <= marker.batch,
            (Some(_), Some(marker)) => marker.lists[pointer],
            (None, Some(marker)) => marker.lists[pointer] && self.design.marks_all_listed,
            _ => false,
        })
    }

    /// After an error the relay drops the shard; the next owner fences and resolves it.
    fn fail(&self, system: &mut SystemState, replica: usize) {
        let continues = !self.design.resolves_first && matches!(system.relays[replica].step, Step::MarkingPublished(_));
        system.abandon_transaction(replica);
        system.set_step(replica, if continues { Step::Ready } else { Step::Idle });
    }
}

impl Model for Publication {
    type State = SystemState;
    type Action = Action;

    fn init_states(&self) -> Vec<SystemState> {
        vec![SystemState {
            pointers: vec![Pointer::Verified; self.keys.len()],
            numbered: Vec::new(),
            queued: Vec::new(),
            shard: Shard { owner: Owner::None, is_free: false, last_batch: 0 },
            relays: [Relay::IDLE; REPLICAS],
            log: Vec::new(),
            removed: [false; POINTERS],
            transactions: Vec::new(),
            marker: None,
            crashes_left: self.crashes,
            faults_left: self.faults,
            removals_left: self.removals,
            backups_left: self.backups,
            backup: None,
            sent_before: None,
            audit: None,
        }]
    }

    fn actions(&self, system: &SystemState, actions: &mut Vec<Action>) {
        self.add_normal_actions(system, actions);
        self.add_faults(system, actions);
    }

    fn next_state(&self, last: &SystemState, action: Action) -> Option<SystemState> {
        let mut system = last.clone();
        match action {
            Action::DrawNumber(pointer) => {
                system.pointers[pointer] = Pointer::Numbered;
                system.numbered.push(pointer);
            }
            Action::Enqueue(pointer) => {
                system.pointers[pointer] = Pointer::Queued { batch: None, deferred: false };
                system.queued.push(pointer);
            }
            Action::Relay(replica, _) => {
                let next = self.advance(&mut system, replica);
                system.set_step(replica, next);
            }
            Action::ClaimBatch(replica, rows) => {
                let due = self.due(&system);
                let claimed = Step::Claimed(system.claim_batch(&due[..rows]));
                system.set_step(replica, claimed);
                if self.backups > 0 {
                    system.relays[replica].last_batch = system.shard.last_batch;
                }
            }
            Action::Renew(replica) => system.acquire_shard(replica),
            Action::DeadLeaseEnds => system.shard.is_free = true,
            Action::CommitLands(number) => system.commit(number),
            Action::DeferralEnds(pointer) => system.pointers[pointer] = Pointer::Queued { batch: None, deferred: false },
            Action::AuditBegins => self.begin_audit(&mut system),
            Action::AuditEnds => self.end_audit(&mut system),
            Action::Crash(replica) => system.crash(replica),
            Action::RemoveRecord(pointer) => {
                system.removed[pointer] = true;
                system.removals_left -= 1;
            }
            Action::MakeBackup => system.make_backup(),
            Action::RestoreBackup(is_free) => system.restore_backup(is_free),
            Action::RenewWithSameEpoch(replica) => {
                system.acquire_shard(replica);
                system.relays[replica].has_lost_lease = false;
            }
            fault => {
                system.faults_left -= 1;
                match fault {
                    Action::RollBack(pointer) => {
                        system.pointers[pointer] = Pointer::Verified;
                        system.numbered.retain(|numbered| *numbered != pointer);
                    }
                    Action::LeaseEnds => system.shard.is_free = true,
                    Action::GiveBack(replica) => system.give_back(replica),
                    Action::NoResponse(replica) => self.fail(&mut system, replica),
                    Action::Refuse(replica, refused) => {
                        system.abort_transaction(replica, |claims| Step::Deferring(claims, refused))
                    }
                    Action::Abort(replica) if self.design.resolves_first => {
                        system.abort_transaction(replica, |claims| Step::Releasing(claims, NONE));
                    }
                    Action::Abort(replica) => system.abort_transaction(replica, |_| Step::Ready),
                    Action::AbortAndReplaceProducer(replica) => system.abort_transaction(replica, Step::ReleasingToFence),
                    Action::TimeOut(number) => {
                        if let Some(replica) = system.transactions.remove(number).waiter {
                            system.relays[replica].is_fenced = true;
                        }
                    }
                    _ => {}
                }
            }
        }
        Some(system)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(NEVER_LOST, |model: &Self, system: &SystemState| {
                let is_published_once =
                    system.is_published() && (0..model.keys.len()).all(|pointer| system.records(pointer) == 1);
                is_published_once || !model.is_at_rest(system)
            }),
            Property::always(NEVER_TWICE, |_, system: &SystemState| (0..POINTERS).all(|pointer| system.records(pointer) <= 1)),
            Property::always(IN_ORDER, |model: &Self, system: &SystemState| {
                // A pointer that was sent and then lost by PostgreSQL has no order with pointers queued later.
                let counts = |pointer: usize| system.sent_before.is_none_or(|sent| !sent[pointer]);
                model.keys.iter().all(|key| system.is_in_order(|pointer| model.keys[**pointer] == *key && counts(**pointer)))
            }),
            Property::always(PUBLISHED_IS_IN_KAFKA, |_, system: &SystemState| {
                let is_in_kafka =
                    |(pointer, state): (usize, &Pointer)| *state != Pointer::Published || system.records(pointer) > 0;
                system.pointers.iter().enumerate().all(is_in_kafka)
            }),
            Property::always(ONE_TRANSACTION, |model: &Self, system: &SystemState| {
                !model.design.fences_old_owner || system.transactions.len() <= 1
            }),
            Property::always(NEVER_AHEAD, |_, system: &SystemState| !system.is_kafka_ahead() || system.sent_before.is_some()),
            Property::sometimes("all pointers are published in one batch", |model: &Self, system: &SystemState| {
                system.marker.is_some_and(|marker| marker.lists[..model.keys.len()].iter().all(|listed| *listed))
            }),
        ];
        if self.crashes > 0 {
            properties.extend([
                Property::sometimes("after a crash all pointers are published", |_, system: &SystemState| {
                    system.crashes_left == 0 && system.is_published()
                }),
                Property::sometimes("a batch that was not marked published is found in the marker", |_, system: &SystemState| {
                    system.resolves(|listed| listed.contains(&true))
                }),
                Property::sometimes("a batch is not in the marker and must be sent again", |_, system: &SystemState| {
                    system.resolves(|listed| !listed.contains(&true))
                }),
            ]);
        }
        if self.removals > 0 {
            properties.push(Property::sometimes("a listed record is not found in its topic", |_, system: &SystemState| {
                system.resolves(|listed| (0..POINTERS).any(|pointer| listed[pointer] && !system.has_record(pointer)))
            }));
        }
        if self.backups > 0 {
            properties.extend([
                Property::sometimes("a relay that kept running refuses the shard", |model: &Self, system: &SystemState| {
                    system.crashes_left == model.crashes && system.relays.iter().any(|relay| relay.step == Step::Refused)
                }),
                Property::sometimes("a lost pointer is published after an audit", |_, system: &SystemState| {
                    system.sent_before.is_some_and(|sent| sent.contains(&true))
                        && system.is_published()
                        && !system.is_kafka_ahead()
                }),
            ]);
        }
        if self.faults > 0 && self.backups == 0 {
            properties.extend([
                Property::sometimes("a zombie's commit is fenced while the new owner sends", |_, system: &SystemState| {
                    let is_zombie = |relay: &Relay| matches!(relay.step, Step::Committing(_)) && relay.is_fenced;
                    let sends = |relay: &Relay| matches!(relay.step, Step::Sent(_)) && !relay.is_fenced;
                    system.relays.iter().any(is_zombie) && system.relays.iter().any(sends)
                }),
                Property::sometimes("a commit is in flight whose relay no longer waits", |_, system: &SystemState| {
                    system.transactions.iter().any(|transaction| transaction.is_committing && transaction.waiter.is_none())
                }),
                Property::sometimes("a pointer is deferred", |_, system: &SystemState| {
                    system.pointers.iter().any(|pointer| matches!(pointer, Pointer::Queued { deferred: true, .. }))
                }),
            ]);
        }
        properties
    }
}
