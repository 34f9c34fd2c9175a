//! lfs-broker: the claim check for Kafka.
