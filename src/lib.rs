//! lfs-broker: the claim check for Kafka.

#![allow(dead_code)]

pub mod dev;
pub mod policy;
pub mod session;
pub mod store;
