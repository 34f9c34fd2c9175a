//! The protocol, checked: every order of steps and faults within bounds, and the broken designs refuted.
//!
//! A world is what PostgreSQL, S3 and Kafka hold, what is in flight, and what each process has in memory. The checker
//! takes every step that anybody may take next. That one process waits for long between two of its steps while others
//! go on is therefore part of every check: a zombie, a late PUT, a commit that arrives after its sender's death.
//! Faults are bounded in number, nothing else is: a behaviour ends when nobody has anything left to do.
//!
//! Two models that share nothing meet in the promise, which ends the one and begins the other. `completion`: a
//! session's state, version, lease and attempt; claim, look, joining of parts, reading back, release; client, URL,
//! PUT, abort and expiry; both passes of the cleanup. `publication`: the draw of an outbox number and the commit of
//! the promise; a shard with its lease and epoch; stamps, transaction, fence, marker, marks, parking; PostgreSQL that
//! goes back to what it was while the relays live on, and the audit that lets them go on. In both: crashes anywhere,
//! leases that run out on the living, lost requests and answers.
//!
//! `designs` says what is checked within which bounds, and what each broken design breaks. How large and how long each
//! check is, and a shortest way to each breach: `cargo test -p lfs-broker-model -- --nocapture`.
//!
//! Left out: time is an order, not a number, so that the second pass waits long enough is an assumption; one session,
//! one part, one shard, two replicas; bytes are three values; tenants, quota and idempotency keys; `at_least_once`;
//! a completion whose database is restored, a database that is restored twice, and what else `audit` does. PostgreSQL's statements and S3's requests are atomic, S3 shows what
//! it stored at once, and Kafka keeps its word about producers of one transactional id.

mod checker;
mod completion;
mod designs;
mod publication;
