//! lfs-broker: the claim check for Kafka.
//!
//! A tour of the house, from the front door down; imports point the same way.
//!
//! - [`cli`] reads the command line, [`config`] the settings; [`dev`] is the whole product on one machine.
//! - [`app`] wires the parts, keeps the workers going, and ends them in order.
//! - [`http`] is the door: the only place that knows axum and status codes.
//! - [`broker`] moves when it is asked; the verifier, the relay and the [`sweeper`] are ticks that move when bytes must be
//!   read, when a pointer waits, and as time passes. They meet in the store and never call each other. [`finish`] is
//!   what the broker and the verifier both do under a lease.
//! - `readiness` tries what an upload needs, and keeps the last outcome for whoever asks.
//! - [`audit`] asks whether PostgreSQL, S3 and Kafka tell the same story; [`restore_check`] whether the database is older
//!   than Kafka, before anything is deleted.
//! - [`store`] speaks SQL, [`objects`] speaks S3, [`kafka`] speaks Kafka, [`auth`] reads tokens: one language a room.
//! - [`session`] and [`policy`] are the pure core: what is legal, without I/O, clock or chance.
//!
//! `telemetry` writes the log, one line an event, whatever strangers' words hold. `failpoint` is where the tests strike between two side effects; a release has none.

pub mod app;
pub mod audit;
pub mod auth;
pub mod broker;
pub mod cli;
pub mod config;
pub mod dev;
mod failpoint;
pub mod finish;
pub mod http;
pub mod kafka;
pub mod objects;
pub mod policy;
mod readiness;
mod relay;
pub mod restore_check;
pub mod session;
pub mod store;
pub mod sweeper;
mod telemetry;
mod verifier;
mod wakes;
