//! The contract of lfs-broker as code.
