//! Which parts of a multipart upload S3 holds as they were declared.

use std::collections::{HashMap, HashSet};

use lfs_broker_client::checksum::Sha256;

use crate::objects::Part;
use crate::session::Session;

/// The listed parts that are what was promised: of the right size, and of the right hash where S3 tells it.
pub(super) fn sound_parts(session: &Session, listed: Vec<Part>, hashes: &[(u32, Sha256)]) -> Vec<Part> {
    let layout = session.promise.layout;
    let promised: HashMap<u32, Sha256> = hashes.iter().copied().collect();
    listed
        .into_iter()
        .filter(|part| layout.part(part.number, session.promise.size_bytes).is_some_and(|(_, bytes)| bytes == part.size_bytes))
        .filter(|part| !layout.has_part_hashes() || (part.sha256.is_some() && part.sha256.as_ref() == promised.get(&part.number)))
        .collect()
}

/// The numbers of a session's parts that S3 holds and that are sound, with their sizes.
pub(crate) fn present(session: &Session, listed: Vec<Part>, hashes: &[(u32, Sha256)]) -> Vec<(u32, u64)> {
    let mut present: Vec<(u32, u64)> =
        sound_parts(session, listed, hashes).into_iter().map(|part| (part.number, part.size_bytes)).collect();
    present.sort_unstable();
    present
}

/// The numbers up to `parts` that are not held, in order.
pub(crate) fn missing(parts: u32, held: impl IntoIterator<Item = u32>) -> impl Iterator<Item = u32> {
    let held: HashSet<u32> = held.into_iter().collect();
    (1..=parts).filter(move |number| !held.contains(number))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use lfs_broker_client::checksum::Algorithm;
    use time::OffsetDateTime;
    use uuid::Uuid;

    use super::*;
    use crate::session::tests::promise;
    use crate::session::{Hashes, Layout, Promise};

    /// The time that it takes to hold so many parts against their promise.
    fn time_for(parts: u32) -> Duration {
        let layout = Layout::Multipart { part_bytes: 1, parts, hashes: Hashes::Given };
        let promise = Promise { size_bytes: parts.into(), layout, ..promise(Algorithm::None) };
        let now = OffsetDateTime::UNIX_EPOCH;
        let session = Session::open(Uuid::from_u128(7), "acme", "sub", ("b".into(), "k".into()), promise, now);
        let hashes: Vec<(u32, Sha256)> = (1..=parts).map(|number| (number, Sha256::of(&number.to_be_bytes()))).collect();
        let part = |(number, sha256): &(u32, Sha256)| Part {
            number: *number,
            size_bytes: 1,
            etag: String::new(),
            sha256: Some(*sha256),
        };
        let listed: Vec<Part> = hashes.iter().map(part).collect();
        let begun = Instant::now();
        let present = present(&session, listed, &hashes);
        let lacking = missing(parts, present.iter().map(|(number, _)| *number)).count();
        let took = begun.elapsed();
        assert_eq!((present.len(), lacking), (parts as usize, 0));
        took
    }

    #[test]
    fn ten_times_the_parts_take_about_ten_times_as_long_and_not_a_hundred() {
        // The quickest of some: the machine may be busy.
        let quickest = |parts| (0..50).map(|_| time_for(parts)).min().unwrap();
        let (few, many) = (quickest(1000), quickest(10_000));
        assert!(many < few * 40, "{few:?}, then {many:?}");
    }

    #[test]
    fn what_is_missing_is_told_in_order() {
        assert_eq!(missing(5, [4, 2]).collect::<Vec<_>>(), [1, 3, 5]);
    }
}
