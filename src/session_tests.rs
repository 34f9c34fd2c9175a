//! Every move against every state.

use super::*;
use lfs_broker_client::checksum::composite;
use time::macros::datetime;

const NOW: OffsetDateTime = datetime!(2026-11-21 06:35 UTC);

/// A promise of `hello` in one PUT.
pub(crate) fn promise(algorithm: Algorithm) -> Promise {
    let mut hasher = algorithm.hasher();
    hasher.update(b"hello");
    Promise {
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

fn open(promise: Promise) -> Session {
    Session::open(Uuid::from_u128(7), "acme", "sub", ("b".into(), "k".into()), promise, NOW)
}

fn completing(promise: Promise) -> Session {
    open(promise).claim(Uuid::from_u128(1), NOW, NOW + Duration::seconds(30)).unwrap()
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
    let base = open(promise(Algorithm::Sha256));
    let verified = completing(promise(Algorithm::Sha256)).verify(&object(), &[], NOW).unwrap();
    let State::Verified(proof) = verified.state.clone() else { panic!("not verified") };
    let published = State::Published(proof, Place { partition: 0, offset: 0, at: NOW });
    let with = |state| Session { state, ..base.clone() };
    vec![
        base.clone(),
        completing(promise(Algorithm::Sha256)),
        completing(promise(Algorithm::Sha256)).needing_a_read(NOW + Duration::seconds(30)),
        verified,
        with(published),
        with(State::Aborted),
        with(State::Expired),
        with(State::Rejected(Refusal::Foreign.trouble())),
    ]
}

fn tell(outcome: Result<Session, Refusal>) -> String {
    match outcome {
        Ok(session) => session.state.name().to_string(),
        Err(refusal) => refusal.code().to_owned(),
    }
}

#[test]
fn every_move_answers_every_state() {
    let later = NOW + Duration::seconds(31);
    let until = later + Duration::seconds(30);
    let why = Refusal::Foreign;
    let expected = [
        // claim, claim once the lease has run out, verify, reopen, reject, abort
        ["completing", "completing", "state-conflict", "state-conflict", "state-conflict", "aborted"],
        ["completion-in-progress", "completing", "verified", "open", "rejected", "completion-in-progress"],
        ["completion-in-progress", "completing", "verified", "open", "rejected", "aborted"],
        ["state-conflict", "state-conflict", "state-conflict", "state-conflict", "state-conflict", "state-conflict"],
        ["state-conflict", "state-conflict", "state-conflict", "state-conflict", "state-conflict", "state-conflict"],
        ["upload-aborted", "upload-aborted", "state-conflict", "state-conflict", "state-conflict", "over"],
        ["upload-expired", "upload-expired", "state-conflict", "state-conflict", "state-conflict", "over"],
        ["object-foreign", "object-foreign", "state-conflict", "state-conflict", "state-conflict", "over"],
    ];
    for (session, expected) in every_state().into_iter().zip(expected) {
        let owner = Uuid::from_u128(2);
        let abort = match session.clone().abort() {
            Ok(None) => "over".to_owned(),
            Ok(Some(session)) => tell(Ok(session)),
            Err(refusal) => tell(Err(refusal)),
        };
        let answers = [
            tell(session.clone().claim(owner, NOW, until)),
            tell(session.clone().claim(owner, later, until)),
            tell(session.clone().verify(&object(), &[], NOW)),
            tell(session.clone().reopen(&why)),
            tell(session.clone().reject(&why)),
            abort,
        ];
        assert_eq!(answers, expected, "from {}", session.state.name());
    }
}

#[test]
fn only_a_verified_upload_is_discarded_and_says_why_for_ever() {
    for session in every_state() {
        let name = session.state.name();
        match session.discard("topic gone".to_owned()) {
            Ok(discarded) => {
                assert_eq!(name, UploadState::Verified);
                let told = discarded.claim(Uuid::from_u128(2), NOW, NOW + Duration::seconds(1)).unwrap_err();
                assert_eq!((told.code(), told.to_string().as_str()), ("unpublishable", "Kafka refuses the pointer: topic gone"));
            }
            Err(refusal) => assert_eq!((refusal, name == UploadState::Verified), (Refusal::State(name), false)),
        }
    }
}

#[test]
fn a_pointer_never_overstates_its_proof() {
    for (algorithm, expected) in [
        (Algorithm::Sha256, Integrity::Sha256),
        (Algorithm::Md5, Integrity::Checksum),
        (Algorithm::Crc32c, Integrity::Checksum),
        (Algorithm::None, Integrity::Size),
    ] {
        let promise = promise(algorithm);
        let mut found = object();
        found.checksums = promise.digest.iter().cloned().collect();
        found.etag = promise.digest.as_ref().map(|digest| format!("\"{}\"", digest.hex()));
        match completing(promise).verify(&found, &[], NOW).unwrap().state {
            State::Verified(proof) => assert_eq!(proof.integrity, expected),
            other => panic!("{algorithm}: {other:?}"),
        }
    }
}

#[test]
fn what_s3_does_not_vouch_for_is_read() {
    let silent = Object { sha256: None, ..object() };
    for algorithm in [Algorithm::Sha256, Algorithm::Md5, Algorithm::Crc32, Algorithm::Crc64nvme] {
        let session = completing(promise(algorithm)).verify(&silent, &[], NOW).unwrap();
        assert!(matches!(session.state, State::Completing { must_read: true, .. }), "{algorithm}");
        let mut hasher = algorithm.hasher();
        hasher.update(b"hello");
        let read = hasher.finish();
        let verified = session.clone().verify_read(&silent, &read, 5, NOW).unwrap();
        assert!(matches!(verified.state, State::Verified(Proof { integrity, .. }) if integrity == reachable(algorithm)));
        assert_eq!(tell(session.verify_read(&silent, &read, 4, NOW)), "size-mismatch");
    }
}

#[test]
fn part_hashes_prove_parts_and_no_more() {
    let hashes = [Sha256::of(b"hel"), Sha256::of(b"lo")];
    let mut promise = promise(Algorithm::Sha256);
    promise.layout = Layout::Multipart { part_bytes: 3, parts: 2, hashes: Hashes::Given };
    let found = Object { sha256: None, composite_sha256: Some(composite(&hashes)), ..object() };
    let state = completing(promise.clone()).verify(&found, &hashes, NOW).unwrap().state;
    assert!(matches!(state, State::Verified(Proof { integrity: Integrity::PartsSha256, .. })), "{state:?}");

    let other = [Sha256::of(b"hel"), Sha256::of(b"lo!")];
    assert_eq!(tell(completing(promise.clone()).verify(&found, &other, NOW)), "checksum-mismatch");

    promise.min_integrity = Integrity::Sha256;
    let state = completing(promise).verify(&found, &hashes, NOW).unwrap().state;
    assert!(matches!(state, State::Completing { must_read: true, .. }), "a policy that asks for more has the bytes read");
}

#[test]
fn an_object_that_was_written_again_is_proved_no_further_than_s3_vouches_for_it() {
    let hashes = [Sha256::of(b"hel"), Sha256::of(b"lo")];
    let crc = |bytes: &[u8]| {
        let mut hasher = Algorithm::Crc32.hasher();
        hasher.update(bytes);
        vec![hasher.finish()]
    };
    let again = || Object { etag: Some("another".into()), sha256: None, ..object() };
    let told = |session: &Session, found: &Object| match session.holds(session.state.proof().unwrap(), found, &hashes) {
        Ok(integrity) => integrity.name().to_owned(),
        Err(refusal) => refusal.code().to_owned(),
    };

    let whole = completing(promise(Algorithm::Sha256)).verify(&object(), &[], NOW).unwrap();
    assert_eq!(told(&whole, &Object { sha256: None, ..object() }), "sha256", "it is the object that was proved");
    assert_eq!(told(&whole, &again()), "checksum-mismatch");
    assert_eq!(told(&whole, &Object { sha256: Some(Sha256::of(b"hello")), ..again() }), "sha256");
    assert_eq!(told(&whole, &Object { sha256: Some(Sha256::of(b"olleh")), ..again() }), "checksum-mismatch");
    assert_eq!(told(&whole, &Object { token: None, ..object() }), "object-foreign");
    assert_eq!(told(&whole, &Object { size_bytes: 6, ..object() }), "size-mismatch");

    let sum = completing(promise(Algorithm::Crc32)).verify(&Object { checksums: crc(b"hello"), ..object() }, &[], NOW).unwrap();
    assert_eq!(told(&sum, &Object { checksums: crc(b"hello"), ..again() }), "checksum");
    assert_eq!(told(&sum, &Object { checksums: crc(b"olleh"), ..again() }), "checksum-mismatch");

    let mut promise = promise(Algorithm::Sha256);
    promise.layout = Layout::Multipart { part_bytes: 3, parts: 2, hashes: Hashes::Given };
    let found = Object { sha256: None, composite_sha256: Some(composite(&hashes)), ..object() };
    let parts = completing(promise).verify(&found, &hashes, NOW).unwrap();
    assert_eq!(told(&parts, &again()), "checksum-mismatch");
    assert_eq!(told(&parts, &Object { etag: Some("another".into()), ..found.clone() }), "parts-sha256");
    assert_eq!(told(&parts, &Object { composite_sha256: Some(composite(&hashes[..1])), ..again() }), "checksum-mismatch");
}

#[test]
fn no_session_outlives_the_hard_maximum() {
    let session = open(Promise { session_seconds: 3600, session_max_seconds: 60, ..promise(Algorithm::Sha256) });
    assert_eq!((session.expires_at - NOW).whole_seconds(), 60);
    assert_eq!((session.slid(NOW + Duration::seconds(30)) - NOW).whole_seconds(), 60);
}

#[test]
fn missing_parts_are_named_and_the_rest_counted() {
    let missing =
        |numbers: std::ops::RangeInclusive<u32>| Refusal::PartsIncomplete { missing: numbers.collect(), parts: 250 }.trouble();
    assert_eq!(missing(1..=100).items.len(), 100);
    let items = missing(1..=250).items;
    assert_eq!((items.len(), items[99].pointer.as_str(), items[100].pointer.as_str()), (101, "/parts/99", "/parts"));
    assert_eq!(items[100].detail, "150 more are missing, from part 101 on");
}

#[test]
fn foreign_or_wrong_objects_are_refused() {
    let session = || completing(promise(Algorithm::Sha256));
    assert_eq!(tell(session().verify(&Object { token: None, ..object() }, &[], NOW)), "object-foreign");
    assert_eq!(tell(session().verify(&Object { token: Some("x".into()), ..object() }, &[], NOW)), "object-foreign");
    assert_eq!(tell(session().verify(&Object { size_bytes: 6, ..object() }, &[], NOW)), "size-mismatch");
    assert_eq!(tell(session().verify(&Object { sha256: Some(Sha256::of(b"x")), ..object() }, &[], NOW)), "checksum-mismatch");
}

#[test]
fn the_sha256_comes_at_open_or_at_complete_and_never_changes() {
    let known = Sha256::of(b"hello");
    let late = || {
        let mut promise = promise(Algorithm::Sha256);
        promise.digest = None;
        open(promise)
    };
    assert_eq!(tell(late().promise_sha256(None)), "validation-failed");
    assert_eq!(late().promise_sha256(Some(known)).unwrap().promise.digest, Some(known.into()));
    assert!(open(promise(Algorithm::Sha256)).promise_sha256(None).is_ok());
    assert_eq!(tell(open(promise(Algorithm::Sha256)).promise_sha256(Some(Sha256::of(b"x")))), "validation-failed");
}

#[test]
fn a_sha256_that_complete_brought_goes_with_a_completion_that_proves_nothing() {
    let known = Sha256::of(b"hello");
    let claimed = |brought: bool| {
        let mut promise = promise(Algorithm::Sha256);
        promise.digest = promise.digest.filter(|_| !brought);
        let session = open(promise).promise_sha256(Some(known)).unwrap();
        session.claim(Uuid::from_u128(1), NOW, NOW + Duration::seconds(30)).unwrap()
    };
    let reopened = claimed(true).reopen(&Refusal::ObjectMissing).unwrap();
    assert_eq!((&reopened.promise.digest, reopened.digest_by_complete), (&None, false));
    assert_eq!(claimed(false).reopen(&Refusal::ObjectMissing).unwrap().promise.digest, Some(known.into()));
    assert_eq!(claimed(true).verify(&object(), &[], NOW).unwrap().promise.digest, Some(known.into()));
}

#[test]
fn a_completion_that_proves_nothing_ends_with_the_last_end_and_not_before() {
    let last = NOW + Duration::seconds(7200);
    for session in every_state() {
        let is_completing = matches!(session.state, State::Completing { .. });
        assert!(session.clone().give_up(last - Duration::seconds(1)).is_none());
        let ended = session.give_up(last).map(|ended| ended.state);
        assert_eq!(ended, is_completing.then_some(State::Expired));
    }
}

#[test]
fn the_last_url_of_an_ended_session_ends_no_later_than_it_may() {
    let session = open(promise(Algorithm::Sha256));
    assert_eq!(session.urls_end_at(NOW), NOW + Duration::seconds(960), "one signed at the end, and a minute");
    assert_eq!(session.urls_end_at(NOW + Duration::seconds(3500)), NOW + Duration::seconds(3600), "no URL outlives its session");
}

#[test]
fn an_end_slides_to_its_maximum_and_no_url_outlives_it() {
    let session = open(promise(Algorithm::Sha256));
    assert_eq!(session.slid(NOW + Duration::seconds(60)), NOW + Duration::seconds(3660));
    assert_eq!(session.slid(NOW + Duration::seconds(7000)), NOW + Duration::seconds(7200));
    assert_eq!(session.url_life(NOW).as_secs(), 900);
    assert_eq!(session.url_life(NOW + Duration::seconds(3590)).as_secs(), 10);
    assert!(session.clone().expire(NOW + Duration::seconds(3599)).is_none());
    assert!(session.expire(NOW + Duration::seconds(3600)).is_some());
}

#[test]
fn parts_tile_the_whole() {
    let layout = Layout::Multipart { part_bytes: 3, parts: 4, hashes: Hashes::None };
    let parts: Vec<_> = (0..=5).map(|number| layout.part(number, 10)).collect();
    assert_eq!(parts, [None, Some((0, 3)), Some((3, 3)), Some((6, 3)), Some((9, 1)), None]);
}

#[test]
fn one_key_has_one_shard() {
    for shards in [1, 4, 7] {
        let of = |key: Option<&[u8]>, id| shard("t", key, Uuid::from_u128(id), shards);
        assert_eq!(of(Some(b"k"), 1), of(Some(b"k"), 2));
        assert!((0..100).all(|id| (0..shards).contains(&of(None, id))));
    }
    assert_ne!(ordering("t", Some(b"k")), ordering("u", Some(b"k")));
    assert_eq!(ordering("t", None), None);
}

#[test]
fn an_object_stored_with_more_than_was_declared_is_foreign() {
    let with = |name: &str, value: &str| Object { undeclared: vec![(name.to_owned(), value.to_owned())], ..object() };
    let session = || completing(promise(Algorithm::Sha256));
    for (name, value) in [("content-encoding", "gzip"), ("x-amz-tagging-count", "1"), ("cache-control", "no-cache, public")] {
        let refusal = session().verify(&with(name, value), &[], NOW).unwrap_err();
        assert_eq!(refusal.code(), "object-foreign");
        assert!(refusal.to_string().contains(&format!("{name}: {value}")), "{refusal}");
        let read = session().verify_read(&with(name, value), &Sha256::of(b"hello").into(), 5, NOW);
        assert_eq!(read.unwrap_err().code(), "object-foreign");
    }
    for (name, value) in [("content-encoding", "identity"), ("cache-control", "No-Cache, max-age=0")] {
        assert!(session().verify(&with(name, value), &[], NOW).is_ok(), "{name}: {value}");
    }
    // What is declared is not foreign, and what changes after the first verification is the operator's.
    let key = with("x-amz-server-side-encryption", "aws:kms");
    let kms = Promise { kms_key_id: Some("k".into()), ..promise(Algorithm::Sha256) };
    assert!(completing(kms).verify(&key, &[], NOW).is_ok());
    let verified = session().verify(&object(), &[], NOW).unwrap();
    let proof = verified.state.proof().unwrap().clone();
    assert!(verified.holds(&proof, &with("x-amz-storage-class", "GLACIER"), &[]).is_ok());
}
