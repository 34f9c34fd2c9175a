//! The `lfs-broker` program: hands its arguments to [`lfs_broker::cli`].

fn main() {}
