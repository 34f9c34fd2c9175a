//! lfs-broker: the claim check pattern for Kafka. File data goes to S3, and a pointer record goes to Kafka.
//!
//! The modules, from the top layer to the bottom layer. Imports point in the same direction.
//!
//! - [`cli`] parses the command line, [`config`] loads the settings, and `dev` runs the whole product on one machine. `dev`
//!   exists only with the cargo feature `dev`; its servers are in the crate `lfs-broker-embedded`.
//! - [`app`] connects the components, runs the workers, and shuts them down in order.
//! - [`http`] serves the API. It is the only module that knows axum and HTTP status codes.
//! - [`broker`] handles requests. The verifier, the relay and the [`sweeper`] are background workers: the verifier reads
//!   objects, the relay publishes pointers from the outbox, the sweeper cleans up. They share state only through the
//!   store and never call each other. [`completion`] is the part that the broker and the verifier both run under a lease.
//! - `readiness` probes everything that an upload needs, and keeps the last outcome for health checks.
//! - [`audit`] compares PostgreSQL, S3 and Kafka. [`restore_check`] detects a database that is older than Kafka, before
//!   the broker deletes or publishes anything.
//! - [`store`] contains the SQL, [`objects`] the S3 calls, [`kafka`] the Kafka calls, and [`auth`] verifies tokens.
//! - [`session`] and [`policy`] are pure rules: what is allowed, without I/O, clock or randomness.
//!
//! [`notify`] wakes the workers and the waiting requests, and `replica_link` carries this to other replicas. `telemetry` writes the log: one line for each event,
//! with untrusted text escaped. `failpoint` lets tests inject faults between two side effects; a release has no failpoints.

pub mod app;
pub mod audit;
pub mod auth;
pub mod broker;
pub mod cli;
pub mod completion;
pub mod config;
#[cfg(feature = "dev")]
pub mod dev;
mod failpoint;
pub mod http;
pub mod kafka;
pub mod notify;
pub mod objects;
pub mod policy;
mod readiness;
mod relay;
mod replica_link;
pub mod restore_check;
pub mod session;
pub mod store;
pub mod sweeper;
mod telemetry;
mod verifier;
