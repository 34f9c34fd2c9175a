//! File descriptors: each connection needs one, so the limit of open files bounds the number of connections.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Reserved for PostgreSQL (20), Kafka, files, S3 (two for each of 256 concurrent completions), and the connections that are
/// kept free for health checks (64).
const RESERVED_FILES: u64 = 640;
/// The largest limit that macOS accepts, even if its hard limit is "unlimited".
const MACOS_MAX_FILES: u64 = 10_240;

/// Raises the soft limit to the hard limit. The usual soft limit of 1,024 exists for programs that use `select`.
pub(crate) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    if let Err(error) = raised.or_else(|_| setrlimit(Resource::Nofile, Rlimit { current: Some(MACOS_MAX_FILES), ..limit })) {
        let current = limit.current.unwrap_or(u64::MAX);
        warn!(%error, limit = limit.current, "cannot raise the limit of open files above {current}: {error}");
    }
}

/// How many connections fit within the limit of open files, at most `wanted`.
pub(super) fn connections_within_limit(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile).current;
    // The process may have inherited open files from its parent.
    let open = std::fs::read_dir("/dev/fd").map_or(0, Iterator::count);
    let free = limit.map(|limit| limit.saturating_sub(u64::try_from(open).unwrap_or(u64::MAX)));
    let capacity = capacity_under(free, wanted);
    if capacity < wanted {
        warn!(
            fits = capacity,
            wanted, limit, open, "the limit of open files allows {capacity} of {wanted} connections: raise it (ulimit -n)"
        );
    }
    capacity
}

fn capacity_under(limit: Option<u64>, wanted: usize) -> usize {
    let Some(limit) = limit else { return wanted };
    // A very small limit is for experiments: then half of it may be connections.
    let capacity = limit.saturating_sub(RESERVED_FILES).max(limit / 2).max(1);
    wanted.min(usize::try_from(capacity).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_other_uses() {
        assert_eq!(capacity_under(None, 4096), 4096);
        assert_eq!(capacity_under(Some(1 << 20), 4096), 4096);
        assert_eq!(capacity_under(Some(1024), 4096), 512);
        assert_eq!(capacity_under(Some(4096), 4096), 3456);
        assert_eq!((capacity_under(Some(100), 4096), capacity_under(Some(1), 4), capacity_under(Some(1024), 4)), (50, 1, 4));
    }
}
