//! Compares the parts of a multipart upload that S3 has with the declared ones.

use std::collections::{HashMap, HashSet};

use lfs_broker_client::checksum::Sha256;

use crate::objects::Part;
use crate::session::Session;

/// The listed parts that have the declared size and, if the upload declares part hashes, the declared hash.
pub(super) fn valid_parts(session: &Session, listed: Vec<Part>, hashes: &[(u32, Sha256)]) -> Vec<Part> {
    let layout = session.spec.layout;
    let declared: HashMap<u32, Sha256> = hashes.iter().copied().collect();
    listed
        .into_iter()
        .filter(|part| layout.part_range(part.number, session.spec.size_bytes).is_some_and(|(_, bytes)| bytes == part.size_bytes))
        .filter(|part| !layout.has_part_hashes() || (part.sha256.is_some() && part.sha256.as_ref() == declared.get(&part.number)))
        .collect()
}

/// The numbers and sizes of the valid parts that S3 has, in ascending order.
pub(crate) fn uploaded_parts(session: &Session, listed: Vec<Part>, hashes: &[(u32, Sha256)]) -> Vec<(u32, u64)> {
    let mut uploaded: Vec<(u32, u64)> =
        valid_parts(session, listed, hashes).into_iter().map(|part| (part.number, part.size_bytes)).collect();
    uploaded.sort_unstable();
    uploaded
}

/// The part numbers up to `part_count` that are not uploaded, in ascending order.
pub(crate) fn missing_part_numbers(part_count: u32, uploaded: impl IntoIterator<Item = u32>) -> impl Iterator<Item = u32> {
    let uploaded: HashSet<u32> = uploaded.into_iter().collect();
    (1..=part_count).filter(move |number| !uploaded.contains(number))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use lfs_broker_client::checksum::Algorithm;
    use time::OffsetDateTime;
    use uuid::Uuid;

    use super::*;
    use crate::session::tests::spec;
    use crate::session::{Layout, PartHashMode, UploadSpec};

    /// The time it takes to compare this many parts with the declared ones.
    fn time_for(part_count: u32) -> Duration {
        let layout = Layout::Multipart { part_bytes: 1, part_count, part_hashes: PartHashMode::Given };
        let spec = UploadSpec { size_bytes: part_count.into(), layout, ..spec(Algorithm::None) };
        let now = OffsetDateTime::UNIX_EPOCH;
        let session = Session::open(Uuid::from_u128(7), "acme", "sub", ("b".into(), "k".into()), spec, now);
        let hashes: Vec<(u32, Sha256)> = (1..=part_count).map(|number| (number, Sha256::of(&number.to_be_bytes()))).collect();
        let part = |(number, sha256): &(u32, Sha256)| Part {
            number: *number,
            size_bytes: 1,
            etag: String::new(),
            sha256: Some(*sha256),
        };
        let listed: Vec<Part> = hashes.iter().map(part).collect();
        let begun = Instant::now();
        let uploaded = uploaded_parts(&session, listed, &hashes);
        let missing = missing_part_numbers(part_count, uploaded.iter().map(|(number, _)| *number)).count();
        let took = begun.elapsed();
        assert_eq!((uploaded.len(), missing), (part_count as usize, 0));
        took
    }

    #[test]
    fn comparing_ten_times_the_parts_takes_about_ten_times_as_long() {
        // The fastest of 50 runs: the machine may be busy.
        let quickest = |parts| (0..50).map(|_| time_for(parts)).min().unwrap();
        let (few, many) = (quickest(1000), quickest(10_000));
        assert!(many < few * 40, "{few:?}, then {many:?}");
    }

    #[test]
    fn missing_part_numbers_are_in_ascending_order() {
        assert_eq!(missing_part_numbers(5, [4, 2]).collect::<Vec<_>>(), [1, 3, 5]);
    }
}
