//! File descriptors: each connection takes one, and whoever has none left serves nobody.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Kept for PostgreSQL (20), Kafka, files, S3 (two for each of 256 uploads that are completed), and the connections that ask
/// for health beyond all seats (64).
const RESERVED: u64 = 640;
/// What macOS allows where the hard limit says that there is none.
const OPEN_MAX: u64 = 10_240;

/// Raises the soft limit to the hard one. Systems start programs with 1,024 for the sake of `select`, which is not used here.
pub(crate) fn raise() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    if let Err(error) = raised.or_else(|_| setrlimit(Resource::Nofile, Rlimit { current: Some(OPEN_MAX), ..limit })) {
        warn!(%error, limit = limit.current, "cannot raise the limit of open files: {error}");
    }
}

/// How many connections of those wanted the limit has room for.
pub(super) fn room(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile).current;
    // The parent process may have left files open.
    let open = std::fs::read_dir("/dev/fd").map_or(0, Iterator::count);
    let free = limit.map(|limit| limit.saturating_sub(u64::try_from(open).unwrap_or(u64::MAX)));
    let fits = room_under(free, wanted);
    if fits < wanted {
        warn!(fits, wanted, limit, open, "the limit of open files has room for {fits} connections only: raise it (ulimit -n)");
    }
    fits
}

fn room_under(limit: Option<u64>, wanted: usize) -> usize {
    let Some(limit) = limit else { return wanted };
    // Half of a very small limit, which is for trying things out.
    let most = limit.saturating_sub(RESERVED).max(limit / 2).max(1);
    wanted.min(usize::try_from(most).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_the_rest() {
        assert_eq!(room_under(None, 4096), 4096);
        assert_eq!(room_under(Some(1 << 20), 4096), 4096);
        assert_eq!(room_under(Some(1024), 4096), 512);
        assert_eq!(room_under(Some(4096), 4096), 3456);
        assert_eq!((room_under(Some(100), 4096), room_under(Some(1), 4), room_under(Some(1024), 4)), (50, 1, 4));
    }
}
