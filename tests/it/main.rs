//! What a stranger sees of lfs-broker, through its doors.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod conformance;
mod embedded;
mod stores;
