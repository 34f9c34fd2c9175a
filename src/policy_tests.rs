//! Tests of request validation, topic policies, and the layout of uploads.

use super::*;
use lfs_broker_client::api::{Headers, Integrity};
use proptest::prelude::*;
use time::macros::datetime;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

fn request(size: u64) -> OpenUpload {
    OpenUpload { topic: "videos".into(), size, ..OpenUpload::default() }
}

fn invalid_members(request: OpenUpload) -> Vec<String> {
    match validate(request) {
        Err(PolicyViolation::Invalid(errors)) => errors.into_iter().map(|error| error.pointer).collect(),
        other => panic!("{other:?}"),
    }
}

fn layout_of(request: OpenUpload) -> Layout {
    let (spec, _) = apply_policy(validate(request).unwrap(), &Policy::default(), &Settings::default(), None).unwrap();
    spec.layout
}

fn violation(request: OpenUpload, policy: &Policy) -> PolicyViolation {
    apply_policy(validate(request).unwrap(), policy, &Settings::default(), None).unwrap_err()
}

#[test]
fn every_invalid_member_is_listed() {
    let hash = Sha256::of(b"x");
    let base = || request(20 * MIB);
    let cases: Vec<(OpenUpload, &str)> = vec![
        (OpenUpload { topic: "a/b".into(), ..base() }, "/topic"),
        (OpenUpload { topic: "..".into(), ..base() }, "/topic"),
        (OpenUpload { topic: "x".repeat(250), ..base() }, "/topic"),
        (request(1 << 63), "/size"),
        (OpenUpload { partition: Some(-1), ..base() }, "/partition"),
        (OpenUpload { key: Some("k".repeat(4097)), ..base() }, "/key"),
        (OpenUpload { key_base64: Some("%".into()), ..base() }, "/key_base64"),
        (OpenUpload { key: Some("a".into()), key_base64: Some("YQ==".into()), ..base() }, "/key_base64"),
        (OpenUpload { content_type: Some("html".into()), ..base() }, "/content_type"),
        (OpenUpload { content_type: Some("a/b\r\nx: y".into()), ..base() }, "/content_type"),
        (OpenUpload { filename: Some("../etc/passwd".into()), ..base() }, "/filename"),
        (OpenUpload { filename: Some("a\nb".into()), ..base() }, "/filename"),
        (OpenUpload { headers: Headers(vec![("LFS-upload-id".into(), "x".into())]), ..base() }, "/headers/LFS-upload-id"),
        (
            OpenUpload { headers: Headers(vec![("a/b".into(), String::new()), (String::new(), String::new())]), ..base() },
            "/headers/",
        ),
        (OpenUpload { sha256: Some(hash), checksum: Some("00".into()), ..base() }, "/checksum"),
        (OpenUpload { checksum: Some("00".into()), ..base() }, "/checksum_alg"),
        (OpenUpload { checksum_alg: Some(Algorithm::Crc32), ..base() }, "/checksum"),
        (OpenUpload { checksum_alg: Some(Algorithm::Crc32), checksum: Some("0".into()), ..base() }, "/checksum"),
        (OpenUpload { part_sha256: Some(vec![hash]), ..base() }, "/part_size"),
        (OpenUpload { part_sha256: Some(vec![hash]), part_size: Some(5 * MIB), ..base() }, "/part_sha256"),
        (OpenUpload { part_size: Some(5 * MIB - 1), ..base() }, "/part_size"),
        (OpenUpload { part_size: Some(5 * MIB), ..request(60_000 * MIB) }, "/part_size"),
    ];
    for (request, pointer) in cases {
        assert!(invalid_members(request.clone()).iter().any(|found| found == pointer), "{pointer}: {request:?}");
    }
    let large = OpenUpload { headers: Headers(vec![("a".into(), "x".repeat(8192))]), ..base() };
    assert_eq!(validate(large).unwrap_err(), PolicyViolation::RecordTooLarge(8193));
}

#[test]
fn uploads_are_split_into_the_parts_that_were_asked_for() {
    assert_eq!(layout_of(request(0)), Layout::Single);
    assert_eq!(layout_of(request(64 * MIB)), Layout::Single);
    let parts = |request| match layout_of(request) {
        Layout::Multipart { part_bytes, part_count, .. } => (part_bytes, part_count),
        Layout::Single => panic!("single"),
    };
    assert_eq!(parts(request(64 * MIB + 1)), (16 * MIB, 5));
    assert_eq!(parts(OpenUpload { part_size: Some(8 * MIB), ..request(41_943_041) }), (8 * MIB, 6));
    assert_eq!(layout_of(OpenUpload { part_size: Some(8 * MIB), ..request(8 * MIB) }), Layout::Single);
    assert_eq!(parts(OpenUpload { part_hashes: Some(PartHashes::Deferred), ..request(1) }), (16 * MIB, 1));
    let (part_bytes, count) = parts(request(5 << 40));
    assert!(count <= 10_000 && part_bytes % MIB == 0, "{count} parts of {part_bytes}");
}

#[test]
fn a_policy_limits_size_content_type_and_checksum() {
    let policy = Policy { max_bytes: 10, content_types: vec!["video/*".into(), "text/plain".into()], ..Policy::default() };
    assert_eq!(violation(request(11), &policy), PolicyViolation::TooLarge { size_bytes: 11, max_bytes: 10 });
    assert!(matches!(violation(request(1), &policy), PolicyViolation::ContentTypeNotAllowed(_)));
    for good in ["video/mp4", "VIDEO/MP4; codecs=x", "text/plain; charset=utf-8"] {
        let request = OpenUpload { content_type: Some(good.into()), ..request(1) };
        assert!(apply_policy(validate(request).unwrap(), &policy, &Settings::default(), None).is_ok(), "{good}");
    }
    let disabled = Policy { enabled: false, ..Policy::default() };
    assert_eq!(violation(request(1), &disabled), PolicyViolation::TopicNotEnabled("videos".into()));
    let crc = OpenUpload { checksum_alg: Some(Algorithm::Crc32), checksum: Some("cbf43926".into()), ..request(9) };
    assert!(matches!(violation(crc.clone(), &Policy::default()), PolicyViolation::ChecksumNotAllowed(_)));
    let with_all_checksums = Policy { checksums: Algorithm::ALL.to_vec(), ..Policy::default() };
    assert!(
        matches!(violation(crc.clone(), &with_all_checksums), PolicyViolation::ChecksumNotAllowed(_)),
        "crc32 cannot reach parts-sha256"
    );
    let without_min_integrity = Policy { min_integrity: Integrity::Size, ..with_all_checksums };
    assert!(apply_policy(validate(crc).unwrap(), &without_min_integrity, &Settings::default(), None).is_ok());
    let md5 = OpenUpload { checksum_alg: Some(Algorithm::Md5), checksum: Some("0".repeat(32)), ..request(65 * MIB) };
    assert!(
        matches!(violation(md5, &without_min_integrity), PolicyViolation::ChecksumNotAllowed(_)),
        "md5 verifies single PUTs only"
    );
}

#[test]
fn a_contradictory_policy_is_refused_with_the_member() {
    let invalid: Vec<(Policy, &str)> = vec![
        (Policy { session_seconds: 0, ..Policy::default() }, "/session_seconds"),
        (Policy { url_seconds: 604_801, ..Policy::default() }, "/url_seconds"),
        (Policy { checksums: vec![], ..Policy::default() }, "/checksums"),
        (Policy { checksums: vec![Algorithm::Crc32], ..Policy::default() }, "/min_integrity"),
        (Policy { prefix: Some("a/../b".into()), ..Policy::default() }, "/prefix"),
        (Policy { prefix: Some("/a".into()), ..Policy::default() }, "/prefix"),
        (Policy { bucket: Some("A_b".into()), ..Policy::default() }, "/bucket"),
        (Policy { content_types: vec!["video".into()], ..Policy::default() }, "/content_types"),
    ];
    for (policy, pointer) in invalid {
        assert_eq!(validate_policy(&policy).first().map(|error| error.pointer.as_str()), Some(pointer));
    }
    assert_eq!(validate_policy(&Policy::default()), []);
}

#[test]
fn an_object_key_names_its_tenant_and_topic_only_in_the_exact_form() {
    let id = Uuid::from_u128(1);
    let key = object_key(Some("eu/one"), "acme", "videos", id, datetime!(2026-01-02 23:30 -3));
    assert_eq!(key, format!("eu/one/acme/videos/lfs/2026/01/03/{id}"));
    assert_eq!(parse_object_key(Some("eu/one"), &key), Some(("acme", "videos")));
    for bad in
        ["acme/videos/lfs", "acme/videos/lfs/../x", "acme/videos/other/x", "/videos/lfs/x", "acme/../lfs/x", "acme/videos/lfs//x"]
    {
        assert_eq!(parse_object_key(None, bad), None, "{bad}");
    }
    assert_eq!(parse_object_key(Some("eu/one"), "eu/onemore/acme/videos/lfs/x"), None);
}

proptest! {
    #[test]
    fn every_layout_is_within_s3_limits(size in 0u64..=MAX_OBJECT_BYTES, part_size in proptest::option::of(0u64..6 << 30)) {
        let asked = OpenUpload { part_size, ..request(size) };
        if let Ok(validated) = validate(asked) {
            let (spec, _) = apply_policy(validated, &Policy::default(), &Settings::default(), None).unwrap();
            if let Layout::Multipart { part_count, .. } = spec.layout {
                prop_assert!((1..=10_000).contains(&part_count));
                let mut end = 0;
                for number in [1, 2, part_count - 1, part_count] {
                    if let Some((offset, bytes)) = spec.layout.part_range(number, size) {
                        prop_assert!(bytes > 0 && (number == part_count || bytes >= MIN_PART_BYTES) && bytes <= MAX_PART_BYTES);
                        end = end.max(offset + bytes);
                    }
                }
                prop_assert_eq!(end, size);
            } else {
                prop_assert!(size <= 64 << 20);
            }
        }
    }

    #[test]
    fn no_text_makes_the_validation_panic(topic in ".*", key in proptest::option::of(".*"), name in ".*", content_type in ".*") {
        let asked = OpenUpload { topic, key_base64: key, filename: Some(name), content_type: Some(content_type), ..request(1) };
        let _ = validate(asked);
    }

    #[test]
    fn an_accepted_policy_is_within_every_limit(
        (min_bytes, max_bytes, seconds) in (any::<u64>(), any::<u64>(), any::<[u64; 3]>()),
        (bucket, prefix, kind) in ("[ -~]{0,8}", "[ -~]{0,8}", "[ -~]{0,8}"),
    ) {
        let [session_seconds, session_max_seconds, url_seconds] = seconds.map(|seconds| seconds % (2 * MAX_LIFETIME_SECONDS));
        let asked = Policy {
            min_bytes,
            max_bytes,
            session_seconds,
            session_max_seconds,
            url_seconds,
            bucket: Some(bucket.clone()),
            prefix: Some(prefix.clone()),
            content_types: vec![kind],
            ..Policy::default()
        };
        let is_accepted = |policy: &Policy| validate_policy(policy).is_empty();
        let is_safe = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte));
        for policy in [asked.clone(), Policy { bucket: None, prefix: None, content_types: vec!["*/*".to_owned()], ..asked.clone() }] {
            if is_accepted(&policy) {
                prop_assert!(policy.max_bytes <= MAX_OBJECT_BYTES && policy.min_bytes <= MAX_OBJECT_BYTES);
                let limits = [policy.session_seconds, policy.session_max_seconds, policy.url_seconds];
                prop_assert!(limits.iter().all(|limit| (1..=MAX_LIFETIME_SECONDS).contains(limit)));
                prop_assert!(policy.bucket.as_deref().is_none_or(is_safe) && policy.prefix.as_deref().is_none_or(is_safe));
            }
        }
        for prefix in [prefix, bucket] {
            let policy = Policy { prefix: Some(prefix.clone()), ..Policy::default() };
            let is_valid = !prefix.is_empty()
                && is_safe(&prefix)
                && prefix.split('/').all(|part| !matches!(part, "" | "." | ".."));
            prop_assert_eq!(is_accepted(&policy), is_valid, "{}", prefix);
        }
    }
}

#[test]
fn no_part_is_larger_than_s3_allows_for_any_configured_part_size() {
    let settings = Settings { part_size_bytes: MAX_PART_BYTES + 1, ..Settings::default() };
    let policy = Policy::default();
    let size = MAX_PART_BYTES + 1;
    let (spec, _) = apply_policy(validate(request(size)).unwrap(), &policy, &settings, None).unwrap();
    assert_eq!(spec.layout, Layout::Multipart { part_bytes: MAX_PART_BYTES, part_count: 2, part_hashes: PartHashMode::None });
}
