//! What a broker needs around it, for one machine: for `dev` and for the tests.

pub mod kafka;
pub mod postgres;
