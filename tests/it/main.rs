//! Every test through the front door, in one binary.
//!
//! Hermetic by default: a real PostgreSQL, an S3 server that checks signatures and checksums, and a broker that speaks
//! Kafka, all embedded. With the variables `LFS_TEST_*` (see `harness::servers`) the same tests run against real ones.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends where it is")]

mod harness;
mod stores;

mod abort;
mod access;
mod audit;
mod cli;
mod client;
mod conformance;
mod consume;
mod copies;
mod crowds;
mod database;
mod database_goes_back;
mod dependencies;
mod dev;
mod edge;
mod embedded;
mod expiry;
mod failpoints;
mod faults;
mod growth;
mod hostile;
mod house;
mod idempotency;
mod integrity;
mod kafscale;
mod listing;
mod lock;
mod logs;
mod migrate;
mod multipart;
mod noisy;
mod openapi;
mod operate;
mod order;
mod parts;
mod peer;
mod problems;
mod readiness;
mod reading;
mod refusals;
mod relay;
mod resolve;
mod restart;
mod restored;
mod secrets;
mod single;
mod tls;
mod tokens;
mod topics;
mod undeclared;
mod versions;
