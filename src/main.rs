//! The `lfs-broker` program: passes its arguments to [`lfs_broker::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    lfs_broker::cli::main()
}
