//! lfs-broker: the claim check for Kafka.

#![allow(dead_code)]

pub mod auth;
mod broker;
pub mod dev;
mod finish;
pub mod kafka;
pub mod objects;
pub mod policy;
mod relay;
pub mod session;
pub mod store;
mod sweeper;
mod verifier;
mod wakes;
