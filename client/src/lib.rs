//! The contract of lfs-broker as code: what a producer or a consumer builds against.
//!
//! [`api`] holds the requests, answers and problems of the HTTP interface, [`pointer`] the value of
//! the record in Kafka, [`checksum`] the digests that both speak of. Nothing here knows a server.
//!
//! Where this crate says *upload*, the broker's database says *session*, S3 says *object*
//! and Kafka says *pointer*: one thing at four stations.

pub mod api;
pub mod checksum;
pub mod pointer;
