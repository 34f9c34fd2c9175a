//! lfs-broker: the claim check for Kafka.

pub mod dev;
pub mod kafka;
