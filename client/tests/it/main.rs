//! Tests of the client against scripted responses over real sockets: which requests it sends, and what it makes of the
//! responses.

// Helper functions are test code too, but clippy sees no `#[test]` on them.
#![allow(clippy::unwrap_used)]

mod calls;
mod connection_errors;
mod consumers;
mod downloads;
mod mock_server;
mod upload_errors;
mod uploads;
