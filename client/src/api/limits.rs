//! The limits of S3 and the rules of the API that the broker and its clients share.

/// The most parts of a multipart upload (Amazon S3, "Multipart upload limits").
pub const MAX_PARTS: u64 = 10_000;
/// The smallest part except the last one, in bytes (same source).
pub const MIN_PART_BYTES: u64 = 5 << 20;
/// The largest single PUT, in bytes (same source).
pub const MAX_PUT_BYTES: u64 = 5 << 30;
/// The largest part, in bytes: each part is one PUT.
pub const MAX_PART_BYTES: u64 = MAX_PUT_BYTES;
/// The largest object, in bytes (Amazon S3: 5 TiB).
pub const MAX_OBJECT_BYTES: u64 = 5 << 40;
/// The size of a part if the caller sets none, in bytes. It grows with the file.
pub const DEFAULT_PART_BYTES: u64 = 16 << 20;
/// The most part numbers in one `/parts` call, and the most part URLs in one response.
pub const PARTS_PER_CALL: usize = 100;

/// The longest file name, in bytes: the limit of most file systems.
const MAX_FILENAME_BYTES: usize = 255;

/// The size of a part of an upload of `size` bytes: the preferred size, or as many whole MiB as are needed to stay within
/// [`MAX_PARTS`].
pub fn part_bytes(size: u64, preferred: u64) -> u64 {
    const MIB: u64 = 1 << 20;
    let needed = size.div_ceil(MAX_PARTS);
    if preferred >= needed { preferred } else { needed.div_ceil(MIB) * MIB }
}

/// Whether a download may get this file name: 1 to 255 bytes, no slash, no backslash, no control character, and neither
/// `.` nor `..`.
pub fn is_valid_filename(name: &str) -> bool {
    (1..=MAX_FILENAME_BYTES).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.contains(|c: char| c.is_control() || matches!(c, '/' | '\\'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_grows_in_whole_mib_when_the_file_needs_more_than_10_000_parts() {
        const MIB: u64 = 1 << 20;
        for (size, preferred, expected) in [
            (0, DEFAULT_PART_BYTES, DEFAULT_PART_BYTES),
            (160_000 * MIB, DEFAULT_PART_BYTES, DEFAULT_PART_BYTES),
            (160_000 * MIB + 1, DEFAULT_PART_BYTES, 17 * MIB),
            (160_000 * MIB + 1, 17 * MIB + 1, 17 * MIB + 1),
            (MAX_OBJECT_BYTES, MIN_PART_BYTES, 525 * MIB),
        ] {
            assert_eq!(part_bytes(size, preferred), expected, "{size} {preferred}");
            assert!(size.div_ceil(part_bytes(size, preferred)) <= MAX_PARTS);
        }
    }

    #[test]
    fn a_file_name_is_one_segment_of_a_path() {
        for name in ["a", "a b.tar.gz", "Zoë", "...", &"x".repeat(255)] {
            assert!(is_valid_filename(name), "{name}");
        }
        for name in ["", ".", "..", "a/b", "a\\b", "a\nb", "a\u{7f}", "a\u{85}", &"x".repeat(256)] {
            assert!(!is_valid_filename(name), "{name:?}");
        }
    }
}
