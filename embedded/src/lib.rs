//! The servers that `lfs-broker dev` and the tests embed. Each one runs in this process or is supervised by it, listens on
//! loopback only, and stops with this process.
//!
//! - [`s3`] is an S3 server that checks signatures and checksums and keeps its objects in a directory.
//! - [`kafka`] is an in-memory server that speaks the Kafka protocol.
//! - [`postgres`] runs the installed PostgreSQL and supervises it.
//!
//! This crate does not depend on the broker. The broker's crate starts the servers together, behind its feature `dev`.

pub mod kafka;
pub mod postgres;
pub mod s3;
