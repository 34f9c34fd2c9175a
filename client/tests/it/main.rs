//! The client against canned answers over real sockets: what it sends, and what it makes of what comes back.

// The helpers of tests are tests as well, though clippy sees no `#[test]` on them.
#![allow(clippy::unwrap_used)]

mod calls;
mod canned;
mod consumers;
mod downloads;
mod mishaps;
mod uploads;
