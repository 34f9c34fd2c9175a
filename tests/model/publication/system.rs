//! The state of the publication model: what PostgreSQL and Kafka hold, and what each relay knows.

pub(super) const REPLICAS: usize = 2;
/// The maximum number of pointers in a check.
pub(super) const POINTERS: usize = 3;

/// By pointer: the batch that has claimed its row, as a process knows it.
pub(super) type Claims = [Option<u8>; POINTERS];

/// What PostgreSQL and Kafka hold, and what each relay has in memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct SystemState {
    pub(super) pointers: Vec<Pointer>,
    /// The pointers with an outbox number, by number.
    pub(super) numbered: Vec<usize>,
    /// The queued pointers, in the order of their commits.
    pub(super) queued: Vec<usize>,
    pub(super) shard: Shard,
    pub(super) relays: [Relay; REPLICAS],
    /// The committed records. Records of an open transaction are added at its commit: with fencing no second transaction
    /// can be open beside it.
    pub(super) log: Vec<usize>,
    /// The pointers whose committed record is no longer in its topic.
    pub(super) removed: [bool; POINTERS],
    pub(super) transactions: Vec<Transaction>,
    /// The last committed marker.
    pub(super) marker: Option<Marker>,
    pub(super) crashes_left: u8,
    pub(super) faults_left: u8,
    pub(super) removals_left: u8,
    pub(super) backups_left: u8,
    pub(super) backup: Option<Backup>,
    /// The pointers that were in Kafka, or in a relay's memory on their way to it, when the backup was restored.
    pub(super) sent_before: Option<[bool; POINTERS]>,
    /// The last marker's batch when the running audit began.
    pub(super) audit: Option<u8>,
}

/// An earlier state of PostgreSQL: a backup, or a standby that lacks the last commits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Backup {
    pointers: Vec<Pointer>,
    numbered: Vec<usize>,
    queued: Vec<usize>,
    shard: Shard,
    /// The shard's epoch is still the one of the backup.
    is_epoch: bool,
    /// The relays that know the epoch of the backup.
    knows_epoch: [bool; REPLICAS],
}

/// A verified session, and its row in the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Pointer {
    Verified,
    /// The transaction that queues the pointer is open, and has drawn its number.
    Numbered,
    Queued {
        batch: Option<u8>,
        deferred: bool,
    },
    Published,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shard {
    pub(super) owner: Owner,
    /// The lease has expired.
    pub(super) is_free: bool,
    pub(super) last_batch: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    None,
    Replica(usize),
    /// A process that crashed. Its successor has another identity, so the lease must expire first.
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Relay {
    pub(super) step: Step,
    /// The shard's epoch is not the one that this relay knows.
    pub(super) has_lost_lease: bool,
    /// Kafka refuses the relay's producer.
    pub(super) is_fenced: bool,
    /// The last batch number that the relay has read or written. It is set only in checks with backups.
    pub(super) last_batch: u8,
}

/// The progress of a relay. Its knowledge is as old as its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Idle,
    /// The relay has the lease.
    LeaseAcquired,
    Fenced,
    /// The relay has read the marker.
    MarkerRead(Option<Marker>),
    /// The relay has read the last batch number too, and the marker is not ahead of it.
    BatchCompared(Option<Marker>),
    /// The marker is ahead: the relay publishes nothing before an audit.
    Refused,
    /// The relay has read the claimed rows, and which rows the marker lists. It looks for their records in their topics.
    LookingUp(Claims, [bool; POINTERS]),
    /// The relay knows which rows are published.
    Resolving(Claims, [bool; POINTERS]),
    /// Kafka does not hold these rows, except for some.
    Releasing(Claims, [bool; POINTERS]),
    /// Kafka does not hold these rows, and the producer may be broken: the relay fences again next.
    ReleasingToFence(Claims),
    Ready,
    /// The claims are committed.
    Claimed(Claims),
    /// Records and marker are in the open transaction.
    Sent(Claims),
    Committing(Claims),
    /// Kafka has committed.
    MarkingPublished(Claims),
    /// The transaction was aborted, because Kafka refused one record.
    Deferring(Claims, usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Transaction {
    pub(super) lists: Claims,
    /// The relay that waits for its end.
    pub(super) waiter: Option<usize>,
    /// The commit is in flight, and may arrive when no relay waits any more.
    pub(super) is_committing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Marker {
    pub(super) lists: [bool; POINTERS],
    pub(super) batch: u8,
}

impl SystemState {
    pub(super) fn records(&self, pointer: usize) -> usize {
        self.log.iter().filter(|record| **record == pointer).count()
    }

    /// Whether a reader of committed records finds the pointer in its topic.
    pub(super) fn has_record(&self, pointer: usize) -> bool {
        self.records(pointer) > 0 && !self.removed[pointer]
    }

    /// Whether the first records of these pointers are in the order in which they were queued.
    pub(super) fn is_in_order(&self, of_key: impl Fn(&&usize) -> bool) -> bool {
        let offset = |pointer: &usize| self.log.iter().position(|record| record == pointer);
        self.queued.iter().filter(of_key).filter_map(offset).is_sorted()
    }

    pub(super) fn is_published(&self) -> bool {
        self.pointers.iter().all(|pointer| *pointer == Pointer::Published)
    }

    pub(super) fn has_queued(&self) -> bool {
        self.pointers.iter().any(|pointer| matches!(pointer, Pointer::Queued { .. }))
    }

    /// Whether a relay has a list of published rows that meets the condition.
    pub(super) fn resolves(&self, meets_condition: impl Fn(&[bool; POINTERS]) -> bool) -> bool {
        self.relays.iter().any(|relay| matches!(&relay.step, Step::Resolving(_, listed) if meets_condition(listed)))
    }

    pub(super) fn transaction_of(&self, replica: usize) -> Option<usize> {
        self.transactions.iter().position(|transaction| transaction.waiter == Some(replica))
    }

    /// The claims in the outbox.
    pub(super) fn claims(&self) -> Claims {
        std::array::from_fn(|pointer| match self.pointers.get(pointer) {
            Some(Pointer::Queued { batch, .. }) => *batch,
            _ => None,
        })
    }

    /// A live owner gives the shard back: another replica has joined.
    pub(super) fn give_back(&mut self, replica: usize) {
        self.shard.owner = Owner::None;
        match self.relays[replica].step {
            Step::Ready => self.set_step(replica, Step::Idle),
            _ => self.relays[replica].has_lost_lease = true,
        }
    }

    /// Acquires the shard's lease: other relays no longer know its epoch.
    pub(super) fn acquire_shard(&mut self, replica: usize) {
        self.shard = Shard { owner: Owner::Replica(replica), is_free: false, ..self.shard };
        if let Some(backup) = &mut self.backup {
            backup.is_epoch = false;
        }
        for relay in self.relays.iter_mut().filter(|relay| relay.step != Step::Idle) {
            relay.has_lost_lease = true;
        }
    }

    pub(super) fn claim_batch(&mut self, due: &[usize]) -> Claims {
        self.shard.last_batch += 1;
        let mut claims = [None; POINTERS];
        for pointer in due {
            claims[*pointer] = Some(self.shard.last_batch);
            self.pointers[*pointer] = Pointer::Queued { batch: claims[*pointer], deferred: false };
        }
        claims
    }

    /// Releases the rows of these batches, except those that Kafka holds.
    pub(super) fn release_batch(&mut self, claims: Claims, published: [bool; POINTERS]) {
        for (pointer, is_published) in self.pointers.iter_mut().zip(published) {
            if let Pointer::Queued { batch, .. } = pointer
                && batch.is_some_and(|batch| claims.contains(&Some(batch)))
                && !is_published
            {
                *batch = None;
            }
        }
    }

    /// Marks sessions published and deletes their rows, whichever batch has claimed them. Returns whether all of them are
    /// published now: after a restore PostgreSQL may not know that they were queued.
    pub(super) fn mark_published(&mut self, published: [bool; POINTERS]) -> bool {
        let mut are_all_published = true;
        for (pointer, _) in published.into_iter().enumerate().filter(|(_, is_published)| *is_published) {
            match self.pointers[pointer] {
                Pointer::Queued { .. } => self.pointers[pointer] = Pointer::Published,
                Pointer::Published => {}
                Pointer::Verified | Pointer::Numbered => are_all_published = false,
            }
        }
        are_all_published
    }

    /// Kafka has a batch that PostgreSQL never claimed, or a batch with a pointer that PostgreSQL never queued.
    pub(super) fn is_kafka_ahead(&self) -> bool {
        let is_queued = |state: &Pointer| matches!(state, Pointer::Queued { .. } | Pointer::Published);
        self.marker.is_some_and(|marker| {
            let mut states = self.pointers.iter().zip(marker.lists);
            marker.batch > self.shard.last_batch || states.any(|(state, is_listed)| is_listed && !is_queued(state))
        })
    }

    pub(super) fn make_backup(&mut self) {
        self.backups_left -= 1;
        self.backup = Some(Backup {
            pointers: self.pointers.clone(),
            numbered: self.numbered.clone(),
            queued: self.queued.clone(),
            shard: self.shard,
            is_epoch: true,
            knows_epoch: self.relays.map(|relay| relay.step != Step::Idle && !relay.has_lost_lease),
        });
    }

    /// PostgreSQL returns to the backup. The relays keep running with what they have in memory.
    pub(super) fn restore_backup(&mut self, is_free: bool) {
        let Some(backup) = self.backup.take() else { return };
        let is_claimed = |relay: &Relay, pointer: usize| match relay.step {
            Step::Claimed(claims) | Step::Sent(claims) => claims[pointer].is_some(),
            _ => false,
        };
        let in_flight = |pointer: usize| {
            self.transactions.iter().any(|transaction| transaction.lists[pointer].is_some())
                || self.relays.iter().any(|relay| is_claimed(relay, pointer))
        };
        self.sent_before = Some(std::array::from_fn(|pointer| self.records(pointer) > 0 || in_flight(pointer)));
        self.pointers = backup.pointers;
        // A transaction that was open at the time of the backup is not part of it.
        for pointer in self.pointers.iter_mut().filter(|pointer| **pointer == Pointer::Numbered) {
            *pointer = Pointer::Verified;
        }
        self.numbered = backup.numbered;
        self.numbered.retain(|pointer| self.pointers[*pointer] != Pointer::Verified);
        self.queued = backup.queued;
        self.shard = Shard { is_free: is_free || backup.shard.is_free, ..backup.shard };
        for (relay, knows) in self.relays.iter_mut().zip(backup.knows_epoch) {
            relay.has_lost_lease = relay.step != Step::Idle && !knows;
        }
    }

    /// Marks every pointer published that has a record in Kafka, whatever its session's state.
    pub(super) fn adopt_records(&mut self) {
        for record in &self.log {
            self.pointers[*record] = Pointer::Published;
        }
    }

    /// Records, for a later restore, under which epoch a relay acquires the shard.
    pub(super) fn record_epoch(&mut self, replica: usize) {
        if let Some(backup) = &mut self.backup {
            backup.knows_epoch[replica] = backup.is_epoch;
        }
    }

    /// The relay no longer waits for its transaction. Without a sent commit the transaction counts as aborted.
    pub(super) fn abandon_transaction(&mut self, replica: usize) {
        if let Some(number) = self.transaction_of(replica) {
            self.transactions[number].waiter = None;
            if !self.transactions[number].is_committing {
                self.transactions.remove(number);
            }
        }
    }

    pub(super) fn commit(&mut self, number: usize) {
        let committed = self.transactions.remove(number);
        let is_sent = |pointer: &usize| committed.lists[*pointer].is_some();
        self.log.extend(self.numbered.iter().copied().filter(is_sent));
        // The order of pointers that PostgreSQL has lost is unknown.
        self.log.extend((0..POINTERS).filter(|pointer| is_sent(pointer) && !self.numbered.contains(pointer)));
        self.set_marker(committed.lists);
        if let Some(replica) = committed.waiter {
            self.set_step(replica, Step::MarkingPublished(committed.lists));
        }
    }

    /// Makes the marker of a batch the last one that an owner reads.
    pub(super) fn set_marker(&mut self, lists: Claims) {
        let batch = lists.into_iter().flatten().max().unwrap_or_default();
        self.marker = Some(Marker { lists: lists.map(|claim| claim.is_some()), batch });
    }

    /// Sets the relay's step. An idle relay has no memory.
    pub(super) fn set_step(&mut self, replica: usize, step: Step) {
        let relay = &mut self.relays[replica];
        *relay = if step == Step::Idle { Relay::IDLE } else { Relay { step, ..*relay } };
        if let Some(backup) = &mut self.backup {
            backup.knows_epoch[replica] &= step != Step::Idle;
        }
    }

    /// The relay's own producer aborts its transaction, and the relay continues.
    pub(super) fn abort_transaction(&mut self, replica: usize, next: impl Fn(Claims) -> Step) {
        if let Step::Sent(claims) = self.relays[replica].step {
            self.abandon_transaction(replica);
            self.set_step(replica, next(claims));
        }
    }

    pub(super) fn crash(&mut self, replica: usize) {
        self.abandon_transaction(replica);
        self.relays[replica] = Relay::IDLE;
        if self.shard.owner == Owner::Replica(replica) {
            self.shard.owner = Owner::Dead;
        }
        if let Some(backup) = &mut self.backup {
            backup.knows_epoch[replica] = false;
            if backup.shard.owner == Owner::Replica(replica) {
                backup.shard.owner = Owner::Dead;
            }
        }
        self.crashes_left -= 1;
    }
}

impl Relay {
    pub(super) const IDLE: Self = Self { step: Step::Idle, has_lost_lease: false, is_fenced: false, last_batch: 0 };
}
