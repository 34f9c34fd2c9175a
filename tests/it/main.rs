//! Every test against the public interfaces of the broker, in one binary.
//!
//! By default the tests need no servers. They embed a real PostgreSQL, an S3 server that checks signatures and
//! checksums, and a server that speaks the Kafka protocol. `LFS_TEST_*` variables select real servers (see `harness::servers`).

#![allow(clippy::unwrap_used, reason = "a test that cannot continue fails where it is")]

mod harness;
mod s3_server;

mod abort;
mod access;
mod admin;
mod architecture;
mod audit;
mod bounded_growth;
mod check_order;
mod cli;
mod client;
mod conformance;
mod connections;
mod consume;
mod copy_source;
mod database;
mod database_loses_commits;
mod database_restored;
mod dependencies;
mod dev;
mod dev_restart;
mod embedded_s3;
mod expiry;
mod failpoints;
mod first_hour;
mod generated_clients;
mod get_upload;
mod hostile;
mod http_limits;
mod idempotency;
mod import_circles;
mod integrity;
mod kafscale_reader;
mod kafscale_regressions;
mod listing;
mod logs;
mod migrate;
mod multipart;
mod noisy_neighbour;
mod object_lock;
mod openapi;
mod presign_parts;
mod problems;
mod readiness;
mod relay;
mod replicas;
mod resolve;
mod restart;
mod s3_faults;
mod s3_refusals;
mod secrets;
mod settings;
mod shared_limits;
mod single_put;
mod takeover;
mod tls;
mod tokens;
mod topics;
mod undeclared_headers;
mod versioned_buckets;
