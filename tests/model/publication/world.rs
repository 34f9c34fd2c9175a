//! The world of a publication: what PostgreSQL and Kafka hold, and what a relay knows.

pub(super) const REPLICAS: usize = 2;
/// Most pointers of a check.
pub(super) const POINTERS: usize = 3;

/// By pointer: the batch that its row was stamped with, as somebody knows it.
pub(super) type Stamps = [Option<u8>; POINTERS];

/// What PostgreSQL and Kafka hold, and what each relay has in memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(super) pointers: Vec<Pointer>,
    /// The pointers with an outbox number, by number.
    pub(super) drawn: Vec<usize>,
    /// The pointers whose promise was committed, in that order.
    pub(super) promised: Vec<usize>,
    pub(super) shard: Shard,
    pub(super) relays: [Relay; REPLICAS],
    /// The committed records. Those of an open transaction get no place here before its commit: where Kafka fences,
    /// no other can be open beside it.
    pub(super) log: Vec<usize>,
    pub(super) open: Vec<Transaction>,
    /// The last one that was committed.
    pub(super) marker: Option<Marker>,
    pub(super) crashes_left: u8,
    pub(super) faults_left: u8,
    pub(super) backups_left: u8,
    pub(super) backup: Option<Backup>,
    /// The pointers that were in Kafka, or on their way from a relay's memory, when PostgreSQL went back to its backup.
    pub(super) sent_before: Option<[bool; POINTERS]>,
    /// An audit is under way, and began when this was the last marker's batch.
    pub(super) audit: Option<u8>,
}

/// PostgreSQL as it once was: a backup, or a standby that lacks the last commits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Backup {
    pointers: Vec<Pointer>,
    drawn: Vec<usize>,
    promised: Vec<usize>,
    shard: Shard,
    /// The shard's epoch is still the one of the backup.
    is_epoch: bool,
    /// The relays that go by the epoch of the backup.
    knows_epoch: [bool; REPLICAS],
}

/// The session from its proof on, and its row in the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Pointer {
    Proved,
    /// The transaction that promises it is open, and has drawn its number.
    Drawn,
    Promised {
        batch: Option<u8>,
        parked: bool,
    },
    Published,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shard {
    pub(super) owner: Owner,
    /// The lease ran out.
    pub(super) is_free: bool,
    pub(super) last_batch: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    Nobody,
    Replica(usize),
    /// A process that crashed. Its successor has another identity, so the lease must run out.
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Relay {
    pub(super) step: Step,
    /// The shard's epoch is not the one that this relay knows.
    pub(super) is_ousted: bool,
    /// Kafka refuses its producer.
    pub(super) is_fenced: bool,
    /// The last batch number that it has read or written; kept only where PostgreSQL may go back.
    pub(super) last_batch: u8,
}

/// How far a relay is, and what it knows: as old as its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Idle,
    /// The lease is ours.
    Owning,
    Fenced,
    /// The marker was read.
    Asked(Option<Marker>),
    /// The last batch number was read too, and the marker is not ahead of it.
    Compared(Option<Marker>),
    /// The marker is ahead: nothing is sent before an audit.
    Refused,
    /// The stamped rows were read; which of them the marker lists.
    Settling(Stamps, [bool; POINTERS]),
    /// Kafka does not hold these, but for some.
    Unstamping(Stamps, [bool; POINTERS]),
    /// Nor these, and it may be the producer's fault: the shard is to be taken anew.
    Retaking(Stamps),
    Ready,
    /// The stamps are committed.
    Stamped(Stamps),
    /// Records and marker are in the open transaction.
    Sent(Stamps),
    Committing(Stamps),
    /// Kafka said yes.
    Marking(Stamps),
    /// The transaction was aborted, because Kafka refused one record.
    Parking(Stamps, usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Transaction {
    pub(super) lists: Stamps,
    /// The relay that waits for its end.
    pub(super) waiter: Option<usize>,
    /// The commit is on its way, and may arrive when nobody waits any more.
    pub(super) is_committing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Marker {
    pub(super) lists: [bool; POINTERS],
    pub(super) batch: u8,
}

impl World {
    pub(super) fn records(&self, pointer: usize) -> usize {
        self.log.iter().filter(|record| **record == pointer).count()
    }

    /// Whether the first records of these pointers stand in the order of their promises.
    pub(super) fn is_in_order(&self, of_key: impl Fn(&&usize) -> bool) -> bool {
        let offset = |pointer: &usize| self.log.iter().position(|record| record == pointer);
        self.promised.iter().filter(of_key).filter_map(offset).is_sorted()
    }

    pub(super) fn is_published(&self) -> bool {
        self.pointers.iter().all(|pointer| *pointer == Pointer::Published)
    }

    pub(super) fn has_waiting(&self) -> bool {
        self.pointers.iter().any(|pointer| matches!(pointer, Pointer::Promised { .. }))
    }

    /// Whether a relay has read such a list of what is published.
    pub(super) fn settles(&self, is_such: impl Fn(&[bool; POINTERS]) -> bool) -> bool {
        self.relays.iter().any(|relay| matches!(&relay.step, Step::Settling(_, listed) if is_such(listed)))
    }

    pub(super) fn transaction_of(&self, replica: usize) -> Option<usize> {
        self.open.iter().position(|open| open.waiter == Some(replica))
    }

    /// The stamps that stand in the outbox.
    pub(super) fn stamps(&self) -> Stamps {
        std::array::from_fn(|pointer| match self.pointers.get(pointer) {
            Some(Pointer::Promised { batch, .. }) => *batch,
            _ => None,
        })
    }

    /// Takes the shard's lease: whoever knew its epoch knows it no more.
    pub(super) fn own(&mut self, replica: usize) {
        self.shard = Shard { owner: Owner::Replica(replica), is_free: false, ..self.shard };
        if let Some(backup) = &mut self.backup {
            backup.is_epoch = false;
        }
        for relay in self.relays.iter_mut().filter(|relay| relay.step != Step::Idle) {
            relay.is_ousted = true;
        }
    }

    pub(super) fn stamp(&mut self, due: &[usize]) -> Stamps {
        self.shard.last_batch += 1;
        let mut stamps = [None; POINTERS];
        for pointer in due {
            stamps[*pointer] = Some(self.shard.last_batch);
            self.pointers[*pointer] = Pointer::Promised { batch: stamps[*pointer], parked: false };
        }
        stamps
    }

    /// Takes back what bears the number of a batch and is not among those that Kafka holds.
    pub(super) fn unstamp(&mut self, stamps: Stamps, published: [bool; POINTERS]) {
        for (pointer, is_published) in self.pointers.iter_mut().zip(published) {
            if let Pointer::Promised { batch, .. } = pointer
                && batch.is_some_and(|batch| stamps.contains(&Some(batch)))
                && !is_published
            {
                *batch = None;
            }
        }
    }

    /// Moves sessions to published, and deletes their rows whoever has stamped them. Says whether all of them are so
    /// now: a database that went back may not know that they were promised.
    pub(super) fn mark(&mut self, published: [bool; POINTERS]) -> bool {
        let mut is_whole = true;
        for (pointer, _) in published.into_iter().enumerate().filter(|(_, is_published)| *is_published) {
            match self.pointers[pointer] {
                Pointer::Promised { .. } => self.pointers[pointer] = Pointer::Published,
                Pointer::Published => {}
                Pointer::Proved | Pointer::Drawn => is_whole = false,
            }
        }
        is_whole
    }

    /// Kafka knows of a batch that PostgreSQL never stamped, or of one with a pointer that PostgreSQL never promised.
    pub(super) fn is_ahead(&self) -> bool {
        let is_promised = |state: &Pointer| matches!(state, Pointer::Promised { .. } | Pointer::Published);
        self.marker.is_some_and(|marker| {
            let mut states = self.pointers.iter().zip(marker.lists);
            marker.batch > self.shard.last_batch || states.any(|(state, is_listed)| is_listed && !is_promised(state))
        })
    }

    pub(super) fn back_up(&mut self) {
        self.backups_left -= 1;
        self.backup = Some(Backup {
            pointers: self.pointers.clone(),
            drawn: self.drawn.clone(),
            promised: self.promised.clone(),
            shard: self.shard,
            is_epoch: true,
            knows_epoch: self.relays.map(|relay| relay.step != Step::Idle && !relay.is_ousted),
        });
    }

    /// PostgreSQL is as it was. The relays live on, with what they have in memory.
    pub(super) fn go_back(&mut self, is_free: bool) {
        let Some(backup) = self.backup.take() else { return };
        let is_stamped = |relay: &Relay, pointer: usize| match relay.step {
            Step::Stamped(stamps) | Step::Sent(stamps) => stamps[pointer].is_some(),
            _ => false,
        };
        let on_its_way = |pointer: usize| {
            self.open.iter().any(|open| open.lists[pointer].is_some())
                || self.relays.iter().any(|relay| is_stamped(relay, pointer))
        };
        self.sent_before = Some(std::array::from_fn(|pointer| self.records(pointer) > 0 || on_its_way(pointer)));
        self.pointers = backup.pointers;
        // A transaction that was open at the time of the backup is not part of it.
        for pointer in self.pointers.iter_mut().filter(|pointer| **pointer == Pointer::Drawn) {
            *pointer = Pointer::Proved;
        }
        self.drawn = backup.drawn;
        self.drawn.retain(|pointer| self.pointers[*pointer] != Pointer::Proved);
        self.promised = backup.promised;
        self.shard = Shard { is_free: is_free || backup.shard.is_free, ..backup.shard };
        for (relay, knows) in self.relays.iter_mut().zip(backup.knows_epoch) {
            relay.is_ousted = relay.step != Step::Idle && !knows;
        }
    }

    /// Writes down what Kafka holds, whatever the sessions wait for.
    pub(super) fn adopt(&mut self) {
        for record in &self.log {
            self.pointers[*record] = Pointer::Published;
        }
    }

    /// Notes, for the day PostgreSQL goes back, by which epoch a relay takes the shard.
    pub(super) fn note_epoch(&mut self, replica: usize) {
        if let Some(backup) = &mut self.backup {
            backup.knows_epoch[replica] = backup.is_epoch;
        }
    }

    /// Nobody waits for the relay's transaction any more. One whose commit was not sent is as good as aborted.
    pub(super) fn leave(&mut self, replica: usize) {
        if let Some(number) = self.transaction_of(replica) {
            self.open[number].waiter = None;
            if !self.open[number].is_committing {
                self.open.remove(number);
            }
        }
    }

    pub(super) fn commit(&mut self, number: usize) {
        let committed = self.open.remove(number);
        let is_sent = |pointer: &usize| committed.lists[*pointer].is_some();
        self.log.extend(self.drawn.iter().copied().filter(is_sent));
        // Of those that PostgreSQL has forgotten no order is known.
        self.log.extend((0..POINTERS).filter(|pointer| is_sent(pointer) && !self.drawn.contains(pointer)));
        let batch = committed.lists.into_iter().flatten().max().unwrap_or_default();
        self.marker = Some(Marker { lists: committed.lists.map(|stamp| stamp.is_some()), batch });
        if let Some(replica) = committed.waiter {
            self.turn(replica, Step::Marking(committed.lists));
        }
    }

    /// Where a relay stands now. One that is idle remembers nothing.
    pub(super) fn turn(&mut self, replica: usize, step: Step) {
        let relay = &mut self.relays[replica];
        *relay = if step == Step::Idle { Relay::IDLE } else { Relay { step, ..*relay } };
        if let Some(backup) = &mut self.backup {
            backup.knows_epoch[replica] &= step != Step::Idle;
        }
    }

    /// A transaction is aborted by its own producer, who goes on.
    pub(super) fn give_up(&mut self, replica: usize, next: impl Fn(Stamps) -> Step) {
        if let Step::Sent(stamps) = self.relays[replica].step {
            self.leave(replica);
            self.turn(replica, next(stamps));
        }
    }

    pub(super) fn crash(&mut self, replica: usize) {
        self.leave(replica);
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
    pub(super) const IDLE: Self = Self { step: Step::Idle, is_ousted: false, is_fenced: false, last_batch: 0 };
}
