//! lfs-broker: the claim check for Kafka.
pub mod objects;
