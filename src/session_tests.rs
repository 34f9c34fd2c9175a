//! Tests of the session: every transition in every state, and what each transition checks.

use super::*;
use lfs_broker_client::api::ErrorCode;
use lfs_broker_client::checksum::composite;
use time::macros::datetime;

const NOW: OffsetDateTime = datetime!(2026-11-21 06:35 UTC);

/// The spec of an upload of `hello` in one PUT.
pub(crate) fn spec(algorithm: Algorithm) -> UploadSpec {
    let mut hasher = algorithm.hasher();
    hasher.update(b"hello");
    UploadSpec {
        topic: "t".into(),
        key: None,
        partition: None,
        headers: vec![],
        traceparent: None,
        content_type: "a/b".into(),
        filename: None,
        size_bytes: 5,
        algorithm,
        digest: (algorithm != Algorithm::None).then(|| hasher.finish()),
        min_integrity: Integrity::Size,
        layout: Layout::Single,
        kms_key_id: None,
        url_seconds: 900,
        session_seconds: 3600,
        session_max_seconds: 7200,
    }
}

fn open(spec: UploadSpec) -> Session {
    Session::open(Uuid::from_u128(7), "acme", "sub", ("b".into(), "k".into()), spec, NOW)
}

fn completing(spec: UploadSpec) -> Session {
    open(spec).claim(Uuid::from_u128(1), NOW, NOW + Duration::seconds(30)).unwrap()
}

fn object() -> Object {
    Object {
        size_bytes: 5,
        token: Some(Uuid::from_u128(7).to_string()),
        etag: Some("e".into()),
        sha256: Some(Sha256::of(b"hello")),
        ..Object::default()
    }
}

fn every_state() -> Vec<Session> {
    let base = open(spec(Algorithm::Sha256));
    let verified = completing(spec(Algorithm::Sha256)).verify(&object(), &[], NOW).unwrap();
    let State::Verified(verification) = verified.state.clone() else { panic!("not verified") };
    let published = State::Published(verification, RecordMetadata::new(Uuid::from_u128(7), 0, 0, NOW));
    let with = |state| Session { state, ..base.clone() };
    vec![
        base.clone(),
        completing(spec(Algorithm::Sha256)),
        completing(spec(Algorithm::Sha256)).require_read_back(NOW + Duration::seconds(30)),
        verified,
        with(published),
        with(State::Aborted),
        with(State::Expired),
        with(State::Rejected(SessionError::ForeignObject.failure())),
    ]
}

fn outcome_name(outcome: Result<Session, SessionError>) -> String {
    match outcome {
        Ok(session) => session.state.name().to_string(),
        Err(error) => error.code().to_string(),
    }
}

#[test]
fn every_transition_answers_every_state() {
    let later = NOW + Duration::seconds(31);
    let until = later + Duration::seconds(30);
    let cause = SessionError::ForeignObject;
    let expected = [
        // claim, claim once the lease has run out, verify, reopen, reject, abort
        ["completing", "completing", "state-conflict", "state-conflict", "state-conflict", "aborted"],
        ["completion-in-progress", "completing", "verified", "open", "rejected", "completion-in-progress"],
        ["completion-in-progress", "completing", "verified", "open", "rejected", "aborted"],
        ["state-conflict", "state-conflict", "state-conflict", "state-conflict", "state-conflict", "state-conflict"],
        ["state-conflict", "state-conflict", "state-conflict", "state-conflict", "state-conflict", "state-conflict"],
        ["upload-aborted", "upload-aborted", "state-conflict", "state-conflict", "state-conflict", "ended"],
        ["upload-expired", "upload-expired", "state-conflict", "state-conflict", "state-conflict", "ended"],
        ["object-foreign", "object-foreign", "state-conflict", "state-conflict", "state-conflict", "ended"],
    ];
    for (session, expected) in every_state().into_iter().zip(expected) {
        let owner = Uuid::from_u128(2);
        let abort = match session.clone().abort() {
            Ok(None) => "ended".to_owned(),
            Ok(Some(session)) => outcome_name(Ok(session)),
            Err(error) => outcome_name(Err(error)),
        };
        let answers = [
            outcome_name(session.clone().claim(owner, NOW, until)),
            outcome_name(session.clone().claim(owner, later, until)),
            outcome_name(session.clone().verify(&object(), &[], NOW)),
            outcome_name(session.clone().reopen(&cause)),
            outcome_name(session.clone().reject(&cause)),
            abort,
        ];
        assert_eq!(answers, expected, "from {}", session.state.name());
    }
}

#[test]
fn only_a_verified_upload_can_be_discarded_and_it_keeps_the_cause() {
    for session in every_state() {
        let name = session.state.name();
        match session.discard("topic gone".to_owned()) {
            Ok(discarded) => {
                assert_eq!(name, UploadState::Verified);
                let claimed_again = discarded.claim(Uuid::from_u128(2), NOW, NOW + Duration::seconds(1)).unwrap_err();
                assert_eq!(
                    (claimed_again.code().as_str(), claimed_again.to_string().as_str()),
                    ("unpublishable", "Kafka refuses the pointer: topic gone")
                );
            }
            Err(error) => assert_eq!((error, name == UploadState::Verified), (SessionError::WrongState(name), false)),
        }
    }
}

#[test]
fn the_integrity_is_never_higher_than_the_algorithm_proves() {
    for (algorithm, expected) in [
        (Algorithm::Sha256, Integrity::Sha256),
        (Algorithm::Md5, Integrity::Checksum),
        (Algorithm::Crc32c, Integrity::Checksum),
        (Algorithm::None, Integrity::Size),
    ] {
        let spec = spec(algorithm);
        let mut found = object();
        found.checksums = spec.digest.iter().cloned().collect();
        found.etag = spec.digest.as_ref().map(|digest| format!("\"{}\"", digest.hex()));
        match completing(spec).verify(&found, &[], NOW).unwrap().state {
            State::Verified(verification) => assert_eq!(verification.integrity, expected),
            other => panic!("{algorithm}: {other:?}"),
        }
    }
}

#[test]
fn an_object_without_an_s3_checksum_is_read_back() {
    let without_checksum = Object { sha256: None, ..object() };
    for algorithm in [Algorithm::Sha256, Algorithm::Md5, Algorithm::Crc32, Algorithm::Crc64nvme] {
        let session = completing(spec(algorithm)).verify(&without_checksum, &[], NOW).unwrap();
        assert!(matches!(session.state, State::Completing { must_read: true, .. }), "{algorithm}");
        let mut hasher = algorithm.hasher();
        hasher.update(b"hello");
        let read = hasher.finish();
        let verified = session.clone().verify_read_back(&without_checksum, &read, 5, NOW).unwrap();
        assert!(
            matches!(verified.state, State::Verified(Verification { integrity, .. }) if integrity == max_integrity(algorithm))
        );
        assert_eq!(outcome_name(session.verify_read_back(&without_checksum, &read, 4, NOW)), "size-mismatch");
    }
}

#[test]
fn part_hashes_reach_parts_sha256_and_nothing_higher() {
    let hashes = [Sha256::of(b"hel"), Sha256::of(b"lo")];
    let mut spec = spec(Algorithm::Sha256);
    spec.layout = Layout::Multipart { part_bytes: 3, part_count: 2, part_hashes: PartHashMode::Given };
    let found = Object { sha256: None, composite_sha256: Some(composite(&hashes)), ..object() };
    let state = completing(spec.clone()).verify(&found, &hashes, NOW).unwrap().state;
    assert!(matches!(state, State::Verified(Verification { integrity: Integrity::PartsSha256, .. })), "{state:?}");

    let other = [Sha256::of(b"hel"), Sha256::of(b"lo!")];
    assert_eq!(outcome_name(completing(spec.clone()).verify(&found, &other, NOW)), "checksum-mismatch");

    spec.min_integrity = Integrity::Sha256;
    let state = completing(spec).verify(&found, &hashes, NOW).unwrap().state;
    assert!(
        matches!(state, State::Completing { must_read: true, .. }),
        "a policy that needs a higher integrity makes the broker read the bytes"
    );
}

#[test]
fn a_rewritten_object_has_at_most_the_integrity_that_s3_checksums_prove() {
    let hashes = [Sha256::of(b"hel"), Sha256::of(b"lo")];
    let crc = |bytes: &[u8]| {
        let mut hasher = Algorithm::Crc32.hasher();
        hasher.update(bytes);
        vec![hasher.finish()]
    };
    let rewritten = || Object { etag: Some("another".into()), sha256: None, ..object() };
    let recheck = |session: &Session, found: &Object| match session.recheck(session.state.verification().unwrap(), found, &hashes)
    {
        Ok(integrity) => integrity.name().to_owned(),
        Err(error) => error.code().to_string(),
    };

    let whole = completing(spec(Algorithm::Sha256)).verify(&object(), &[], NOW).unwrap();
    assert_eq!(recheck(&whole, &Object { sha256: None, ..object() }), "sha256", "the ETag is unchanged");
    assert_eq!(recheck(&whole, &rewritten()), "checksum-mismatch");
    assert_eq!(recheck(&whole, &Object { sha256: Some(Sha256::of(b"hello")), ..rewritten() }), "sha256");
    assert_eq!(recheck(&whole, &Object { sha256: Some(Sha256::of(b"olleh")), ..rewritten() }), "checksum-mismatch");
    assert_eq!(recheck(&whole, &Object { token: None, ..object() }), "object-foreign");
    assert_eq!(recheck(&whole, &Object { size_bytes: 6, ..object() }), "size-mismatch");

    let sum = completing(spec(Algorithm::Crc32)).verify(&Object { checksums: crc(b"hello"), ..object() }, &[], NOW).unwrap();
    assert_eq!(recheck(&sum, &Object { checksums: crc(b"hello"), ..rewritten() }), "checksum");
    assert_eq!(recheck(&sum, &Object { checksums: crc(b"olleh"), ..rewritten() }), "checksum-mismatch");

    let mut spec = spec(Algorithm::Sha256);
    spec.layout = Layout::Multipart { part_bytes: 3, part_count: 2, part_hashes: PartHashMode::Given };
    let found = Object { sha256: None, composite_sha256: Some(composite(&hashes)), ..object() };
    let parts = completing(spec).verify(&found, &hashes, NOW).unwrap();
    assert_eq!(recheck(&parts, &rewritten()), "checksum-mismatch");
    assert_eq!(recheck(&parts, &Object { etag: Some("another".into()), ..found.clone() }), "parts-sha256");
    assert_eq!(recheck(&parts, &Object { composite_sha256: Some(composite(&hashes[..1])), ..rewritten() }), "checksum-mismatch");
}

#[test]
fn no_session_lives_longer_than_its_maximum() {
    let session = open(UploadSpec { session_seconds: 3600, session_max_seconds: 60, ..spec(Algorithm::Sha256) });
    assert_eq!((session.expires_at - NOW).whole_seconds(), 60);
    assert_eq!((session.extended_expiry(NOW + Duration::seconds(30)) - NOW).whole_seconds(), 60);
}

#[test]
fn the_first_hundred_missing_parts_are_listed_and_the_others_counted() {
    let missing = |numbers: std::ops::RangeInclusive<u32>| {
        SessionError::PartsIncomplete { missing: numbers.collect(), parts: 250 }.failure()
    };
    assert_eq!(missing(1..=100).items.len(), 100);
    let items = missing(1..=250).items;
    assert_eq!((items.len(), items[99].pointer.as_str(), items[100].pointer.as_str()), (101, "/parts/99", "/parts"));
    assert_eq!(items[100].detail, "150 more are missing, from part 101 on");
}

#[test]
fn an_object_with_another_token_size_or_checksum_fails_verification() {
    let session = || completing(spec(Algorithm::Sha256));
    assert_eq!(outcome_name(session().verify(&Object { token: None, ..object() }, &[], NOW)), "object-foreign");
    assert_eq!(outcome_name(session().verify(&Object { token: Some("x".into()), ..object() }, &[], NOW)), "object-foreign");
    assert_eq!(outcome_name(session().verify(&Object { size_bytes: 6, ..object() }, &[], NOW)), "size-mismatch");
    assert_eq!(
        outcome_name(session().verify(&Object { sha256: Some(Sha256::of(b"x")), ..object() }, &[], NOW)),
        "checksum-mismatch"
    );
}

#[test]
fn the_sha256_is_declared_at_open_or_at_complete_and_never_changes() {
    let known = Sha256::of(b"hello");
    let without_sha256 = || {
        let mut spec = spec(Algorithm::Sha256);
        spec.digest = None;
        open(spec)
    };
    assert_eq!(outcome_name(without_sha256().declare_sha256(None)), "validation-failed");
    assert_eq!(without_sha256().declare_sha256(Some(known)).unwrap().spec.digest, Some(known.into()));
    assert!(open(spec(Algorithm::Sha256)).declare_sha256(None).is_ok());
    assert_eq!(outcome_name(open(spec(Algorithm::Sha256)).declare_sha256(Some(Sha256::of(b"x")))), "validation-failed");
}

#[test]
fn a_sha256_from_complete_is_dropped_when_that_completion_fails() {
    let known = Sha256::of(b"hello");
    let claimed = |at_complete: bool| {
        let mut spec = spec(Algorithm::Sha256);
        spec.digest = spec.digest.filter(|_| !at_complete);
        let session = open(spec).declare_sha256(Some(known)).unwrap();
        session.claim(Uuid::from_u128(1), NOW, NOW + Duration::seconds(30)).unwrap()
    };
    let reopened = claimed(true).reopen(&SessionError::ObjectMissing).unwrap();
    assert_eq!((&reopened.spec.digest, reopened.digest_by_complete), (&None, false));
    assert_eq!(claimed(false).reopen(&SessionError::ObjectMissing).unwrap().spec.digest, Some(known.into()));
    assert_eq!(claimed(true).verify(&object(), &[], NOW).unwrap().spec.digest, Some(known.into()));
}

#[test]
fn an_unverified_completion_expires_at_the_latest_expiry_and_not_before() {
    let latest = NOW + Duration::seconds(7200);
    for session in every_state() {
        let is_completing = matches!(session.state, State::Completing { .. });
        assert!(session.clone().expire_completing(latest - Duration::seconds(1)).is_none());
        let ended = session.expire_completing(latest).map(|ended| ended.state);
        assert_eq!(ended, is_completing.then_some(State::Expired));
    }
}

#[test]
fn the_last_url_of_an_ended_session_expires_with_the_session_or_earlier() {
    let session = open(spec(Algorithm::Sha256));
    assert_eq!(session.urls_expire_at(NOW), NOW + Duration::seconds(960), "a URL signed at the end, and one minute");
    assert_eq!(
        session.urls_expire_at(NOW + Duration::seconds(3500)),
        NOW + Duration::seconds(3600),
        "no URL outlives its session"
    );
}

#[test]
fn signing_parts_extends_the_expiry_up_to_its_maximum_and_no_url_outlives_it() {
    let session = open(spec(Algorithm::Sha256));
    assert_eq!(session.extended_expiry(NOW + Duration::seconds(60)), NOW + Duration::seconds(3660));
    assert_eq!(session.extended_expiry(NOW + Duration::seconds(7000)), NOW + Duration::seconds(7200));
    assert_eq!(session.url_lifetime(NOW).as_secs(), 900);
    assert_eq!(session.url_lifetime(NOW + Duration::seconds(3590)).as_secs(), 10);
    assert!(session.clone().expire(NOW + Duration::seconds(3599)).is_none());
    assert!(session.expire(NOW + Duration::seconds(3600)).is_some());
}

#[test]
fn part_ranges_cover_the_whole_object_without_gaps() {
    let layout = Layout::Multipart { part_bytes: 3, part_count: 4, part_hashes: PartHashMode::None };
    let parts: Vec<_> = (0..=5).map(|number| layout.part_range(number, 10)).collect();
    assert_eq!(parts, [None, Some((0, 3)), Some((3, 3)), Some((6, 3)), Some((9, 1)), None]);
}

#[test]
fn records_of_one_key_share_one_shard() {
    for shards in [1, 4, 7] {
        let of = |key: Option<&[u8]>, id| shard("t", key, Uuid::from_u128(id), shards);
        assert_eq!(of(Some(b"k"), 1), of(Some(b"k"), 2));
        assert!((0..100).all(|id| (0..shards).contains(&of(None, id))));
    }
    assert_ne!(ordering_key("t", Some(b"k")), ordering_key("u", Some(b"k")));
    assert_eq!(ordering_key("t", None), None);
}

#[test]
fn an_object_with_an_undeclared_header_is_foreign() {
    let with = |name: &str, value: &str| Object { undeclared_headers: vec![(name.to_owned(), value.to_owned())], ..object() };
    let session = || completing(spec(Algorithm::Sha256));
    for (name, value) in [("content-encoding", "gzip"), ("x-amz-tagging-count", "1"), ("cache-control", "no-cache, public")] {
        let error = session().verify(&with(name, value), &[], NOW).unwrap_err();
        assert_eq!(error.code(), ErrorCode::ObjectForeign);
        assert!(error.to_string().contains(&format!("{name}: {value}")), "{error}");
        let read = session().verify_read_back(&with(name, value), &Sha256::of(b"hello").into(), 5, NOW);
        assert_eq!(read.unwrap_err().code(), ErrorCode::ObjectForeign);
    }
    for (name, value) in [("content-encoding", "identity"), ("cache-control", "No-Cache, max-age=0")] {
        assert!(session().verify(&with(name, value), &[], NOW).is_ok(), "{name}: {value}");
    }
    // A declared header is not foreign. After the first verification, an operator may change headers.
    let key = with("x-amz-server-side-encryption", "aws:kms");
    let kms = UploadSpec { kms_key_id: Some("k".into()), ..spec(Algorithm::Sha256) };
    assert!(completing(kms).verify(&key, &[], NOW).is_ok());
    let verified = session().verify(&object(), &[], NOW).unwrap();
    let verification = verified.state.verification().unwrap().clone();
    assert!(verified.recheck(&verification, &with("x-amz-storage-class", "GLACIER"), &[]).is_ok());
}
