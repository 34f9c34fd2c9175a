//! Shows that the checker can fail: valid observations are changed in one way at a time.

use std::time::Duration;

use serde_json::json;
use uuid::{Builder, Uuid};

use crate::Failure;
use crate::checker::{FindingKind, check};
use crate::database_rollback::{LostCommits, remove_explained};
use crate::journal::{Acknowledgement, DeclaredUpload};
use crate::observed::{Object, Observed, Record, Session};

const SHA256: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// The id of an upload that was opened this many seconds after the start of the run.
fn id_at(seconds: u64) -> Uuid {
    Builder::from_unix_timestamp_millis(seconds * 1000, &[0; 10]).into_uuid()
}

fn object_key(number: u128) -> String {
    format!("default/a/lfs/2026/11/21/{}", id(number))
}

fn pointer(number: u128) -> String {
    json!({"kfs_lfs": 1, "bucket": "chaos", "key": object_key(number), "size": 5, "sha256": SHA256}).to_string()
}

fn session(number: u128, state: &str) -> Session {
    let published = state == "published";
    let entered = ["open", "completing", "verified"].iter().take(if published { 3 } else { 1 });
    Session {
        state: state.into(),
        topic: "a".into(),
        object_key: object_key(number),
        pointer: published.then(|| pointer(number)),
        position: published.then(|| (0, i64::try_from(number).expect("a small number"))),
        cleanup_due: false,
        verified_at: None,
        published_at: None,
        error: None,
        entered: entered.copied().chain([state]).map(str::to_owned).collect(),
    }
}

fn record(number: u128) -> Record {
    Record {
        topic: "a".into(),
        partition: 0,
        offset: i64::try_from(number).expect("a small number"),
        key: Some(b"k".to_vec()),
        value: pointer(number),
        upload_id: Some(id(number)),
    }
}

/// Uploads 1 and 2 are published one after the other; 3 was aborted.
fn valid() -> Observed {
    let mut observed = Observed::default();
    for number in [1, 2] {
        observed.sessions.insert(id(number), session(number, "published"));
        observed.records.push(record(number));
        observed.objects.insert(object_key(number), Object { size_bytes: 5, sha256: Some(SHA256.into()) });
        let at = |more: u64| Duration::from_secs(u64::try_from(number).expect("a small number") * 10 + more);
        let pointer = serde_json::from_str(&pointer(number)).expect("it is JSON");
        let position = Some((0, i64::try_from(number).expect("a small number")));
        observed.clients.acknowledged.push(Acknowledgement {
            id: id(number),
            pointer,
            position,
            requested_at: at(0),
            received_at: at(1),
        });
    }
    observed.sessions.insert(id(3), session(3, "aborted"));
    observed.clients.failed.insert(id(3), "aborted".into());
    for number in 1..=3 {
        let upload = DeclaredUpload {
            topic: "a".into(),
            key: Some("k".into()),
            size_bytes: 5,
            sha256: SHA256.into(),
            sends_right_bytes: true,
        };
        observed.clients.declared.insert(id(number), upload);
        let opened_at = Duration::from_secs(u64::try_from(number).expect("a small number") * 10 - 1);
        observed.clients.opened_at.insert(id(number), opened_at);
    }
    observed
}

type Change = fn(&mut Observed);

/// Changes to the observations, with the findings that the checker must report.
const CHANGES: [(&str, &[FindingKind], Change); 24] = [
    ("a record is missing", &[FindingKind::Lost], |f| drop(f.records.pop())),
    ("a record is at another offset", &[FindingKind::Lost], |f| f.records[1].offset = 9),
    ("an acknowledged session is gone", &[FindingKind::Lost, FindingKind::Wrong, FindingKind::Orphan], |f| {
        drop(f.sessions.remove(&id(2)))
    }),
    ("an acknowledged upload is not published", &[FindingKind::Lost, FindingKind::Wrong, FindingKind::Stuck], |f| {
        let verified = f.sessions.get_mut(&id(2)).expect("the entry exists");
        (verified.state, verified.position) = ("verified".into(), None);
        verified.entered.pop();
    }),
    ("an upload has two records", &[FindingKind::Duplicate], |f| f.records.push(Record { offset: 3, ..record(2) })),
    ("a record has no upload id", &[FindingKind::Wrong], |f| f.records.push(Record { upload_id: None, key: None, ..record(9) })),
    ("a record is of an unknown upload", &[FindingKind::Wrong], |f| f.records.push(record(9))),
    ("an aborted upload is in Kafka", &[FindingKind::Wrong], |f| f.records.push(record(3))),
    ("a record has another value", &[FindingKind::Wrong], |f| f.records[0].value = pointer(2)),
    ("a record has another key", &[FindingKind::Wrong], |f| f.records[0].key = None),
    ("a wrong position was acknowledged", &[FindingKind::Wrong], |f| f.clients.acknowledged[0].position = Some((1, 1))),
    ("a wrong pointer was acknowledged", &[FindingKind::Wrong], |f| f.clients.acknowledged[0].pointer = json!({"size": 6})),
    ("an acknowledged upload was reported as failed", &[FindingKind::Wrong], |f| {
        f.clients.failed.insert(id(1), "expired".into());
    }),
    ("wrong bytes are acknowledged", &[FindingKind::Wrong], |f| {
        f.clients.declared.get_mut(&id(1)).expect("the entry exists").sends_right_bytes = false;
    }),
    ("other bytes were declared", &[FindingKind::Wrong], |f| {
        f.clients.declared.get_mut(&id(1)).expect("the entry exists").size_bytes = 6;
    }),
    ("an object is missing", &[FindingKind::Wrong], |f| drop(f.objects.remove(&object_key(1)))),
    ("an object has other bytes", &[FindingKind::Wrong], |f| {
        f.objects.get_mut(&object_key(1)).expect("the entry exists").sha256 = Some("00".into());
    }),
    ("a session is in two final states", &[FindingKind::Wrong], |f| {
        f.sessions.get_mut(&id(3)).expect("the entry exists").entered.push("expired".into());
    }),
    ("a response is not allowed, or the audit reports a finding", &[FindingKind::Wrong], |f| f.errors.push("500".into())),
    ("a session has not ended", &[FindingKind::Stuck], |f| {
        f.sessions.insert(id(4), session(4, "open"));
        f.sessions.get_mut(&id(4)).expect("the entry exists").entered.pop();
    }),
    ("a cleanup is still due", &[FindingKind::Stuck], |f| {
        f.sessions.get_mut(&id(3)).expect("the entry exists").cleanup_due = true
    }),
    ("a pointer waits", &[FindingKind::Stuck], |f| f.waiting.push(id(1))),
    ("an object and a multipart upload have no pointer", &[FindingKind::Orphan], |f| {
        f.objects.insert(object_key(3), Object { size_bytes: 5, sha256: None });
        f.uploads.push(format!("{} in a directory", id(3)));
    }),
    ("records of a key are in the wrong order", &[FindingKind::Order], |f| {
        let (before, after) = f.clients.acknowledged.split_at_mut(1);
        std::mem::swap(&mut before[0].requested_at, &mut after[0].requested_at);
        std::mem::swap(&mut before[0].received_at, &mut after[0].received_at);
    }),
];

/// Changes after a database has lost the commits of upload 1: what the loss explains, and what it does not. Each record
/// must still exist once, at the acknowledged position, with its bytes in S3.
const CHANGES_AFTER_LOSS: [(&str, &[FindingKind], Change); 13] = [
    ("an upload and its acknowledgement are gone, but its record exists", &[], |f| drop(f.sessions.remove(&id(1)))),
    ("an acknowledged upload is gone that was not sent to Kafka", &[], |f| {
        f.sessions.insert(id(1), session(1, "expired"));
        f.records.remove(0);
        f.objects.remove(&object_key(1));
        f.clients.acknowledged[0].position = None;
    }),
    ("an abort is gone", &[], |f| {
        f.clients.failed.insert(id(1), "aborted".into());
        f.clients.failed_at.insert(id(1), Duration::from_secs(12));
    }),
    ("the audit reports an unknown record", &[], |f| f.errors.push("audit: record-unknown: {}".into())),
    (
        "an upload that is gone has two records",
        &[FindingKind::Lost, FindingKind::Duplicate, FindingKind::Wrong, FindingKind::Orphan],
        |f| {
            f.sessions.remove(&id(1));
            f.records.insert(1, Record { offset: 3, ..record(1) });
        },
    ),
    ("an upload has two records", &[FindingKind::Duplicate], |f| f.records.insert(1, Record { offset: 3, ..record(1) })),
    ("the object of a record is gone with its upload", &[FindingKind::Lost, FindingKind::Wrong], |f| {
        f.sessions.remove(&id(1));
        f.objects.remove(&object_key(1));
    }),
    ("an acknowledged record is missing", &[FindingKind::Lost, FindingKind::Wrong, FindingKind::Orphan], |f| {
        f.sessions.remove(&id(1));
        f.records.remove(0);
    }),
    ("an upload is gone that was opened afterwards", &[FindingKind::Lost, FindingKind::Wrong, FindingKind::Orphan], |f| {
        f.sessions.remove(&id(2));
    }),
    ("records of a key are in the wrong order", &[FindingKind::Order], |f| f.records.swap(0, 1)),
    ("a multipart upload exists that no client knows, opened in the interval", &[], |f| {
        f.uploads.push(format!("{} in PATH", id_at(10)));
    }),
    ("a multipart upload exists that no client knows, opened afterwards", &[FindingKind::Orphan], |f| {
        f.uploads.push(format!("{} in PATH", id_at(17)));
    }),
    ("a multipart upload of a known session exists, opened in the interval", &[FindingKind::Orphan], |f| {
        f.sessions.insert(id_at(10), session(3, "aborted"));
        f.uploads.push(format!("{} in PATH", id_at(10)));
    }),
];

/// Runs the checker over every change and returns how many changes it must detect.
pub(crate) fn run() -> Result<usize, Failure> {
    let findings = check(&valid());
    if !findings.is_empty() {
        return Err(Failure(format!("the checker reports findings for valid observations: {findings:?}")));
    }
    for (name, expected, change) in CHANGES {
        let mut observed = valid();
        change(&mut observed);
        expect(name, &observed, expected)?;
    }
    let second = Duration::from_secs(1);
    let lost = LostCommits { intervals: vec![(5 * second, 15 * second)], ..LostCommits::default() };
    for (name, expected, change) in CHANGES_AFTER_LOSS {
        let mut observed = valid();
        change(&mut observed);
        remove_explained(&mut observed, &lost);
        expect(&format!("after a loss, {name}"), &observed, expected)?;
    }
    Ok(CHANGES.len() + CHANGES_AFTER_LOSS.iter().filter(|(_, expected, _)| !expected.is_empty()).count())
}

fn expect(name: &str, observed: &Observed, expected: &[FindingKind]) -> Result<(), Failure> {
    let mut found: Vec<FindingKind> = check(observed).into_iter().map(|finding| finding.kind).collect();
    found.sort_unstable();
    found.dedup();
    (found == expected).then_some(()).ok_or_else(|| Failure(format!("{name}: the checker says {found:?}, not {expected:?}")))
}
