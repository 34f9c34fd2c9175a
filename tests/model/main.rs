//! A model of the protocol, checked in every order of steps and faults within bounds. The rejected designs are refuted.
//!
//! A state of the model is what PostgreSQL, S3 and Kafka hold, what is in flight, and what each process has in memory. The
//! checker takes every step that any process may take next. So every check includes a process that pauses between two
//! steps while others continue: a zombie, a late PUT, a commit that arrives after its sender has died.
//! Only the number of faults is bounded: a behaviour ends when no process has a step left.
//!
//! Two models share nothing and meet where a pointer is queued, which ends the first and begins the second. `completion`:
//! the session's state, version, lease and attempt; claim, HEAD, join of the parts, read-back, release; client, URL, PUT,
//! abort and expiry; both cleanups. `publication`: the outbox number and the commit that queues the pointer; a shard with
//! its lease and epoch; claims, transaction, fence, marker, publication and deferral; PostgreSQL that goes back to a
//! backup while the relays keep running, and the audit that lets them publish again. In both: crashes at any step,
//! leases that expire while their owner lives, lost requests and responses.
//!
//! `designs` lists the checks with their bounds, and what each rejected design breaks. `cargo test -p lfs-broker-model --
//! --nocapture` prints the size and time of each check, and a shortest behaviour that breaks each rejected design.
//!
//! Not modelled: time is an order and not a number, so the model assumes that the second cleanup waits long enough; there
//! are one session, one part, one shard and two replicas, and three values of bytes; tenants, quota, idempotency keys and
//! `at_least_once`; a completion whose database is restored, a database that is restored twice, and other tasks of
//! `audit`. Statements of PostgreSQL and requests to S3 are atomic, S3 shows immediately what it stored, and Kafka fences
//! producers of one transactional id as documented.

mod checker;
mod completion;
mod designs;
mod publication;
