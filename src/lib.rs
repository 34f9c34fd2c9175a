//! lfs-broker: the claim check for Kafka.

#![allow(dead_code)]

pub mod app;
pub mod auth;
pub mod broker;
pub mod cli;
pub mod config;
pub mod dev;
pub mod finish;
pub mod http;
pub mod kafka;
pub mod objects;
pub mod policy;
mod relay;
pub mod session;
pub mod store;
pub mod sweeper;
mod verifier;
mod wakes;
