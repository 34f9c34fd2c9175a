//! What `lfs-broker dev` brings along so that one machine needs nothing else.

pub mod s3;
