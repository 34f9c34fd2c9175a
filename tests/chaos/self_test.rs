//! Shows that the checker can fail: sound facts, then each thing that may be wrong with them, one at a time.

use std::time::Duration;

use serde_json::json;
use uuid::Uuid;

use crate::Failure;
use crate::checker::{Verdict, check};
use crate::facts::{Facts, Object, Record, Session};
use crate::goes_back::{Lost, forgive};
use crate::journal::{Intent, Promise};

const SHA256: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
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
        place: published.then(|| (0, i64::try_from(number).expect("a small number"))),
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
fn sound() -> Facts {
    let mut facts = Facts::default();
    for number in [1, 2] {
        facts.sessions.insert(id(number), session(number, "published"));
        facts.records.push(record(number));
        facts.objects.insert(object_key(number), Object { size_bytes: 5, sha256: Some(SHA256.into()) });
        let at = |more: u64| Duration::from_secs(u64::try_from(number).expect("a small number") * 10 + more);
        let pointer = serde_json::from_str(&pointer(number)).expect("it is JSON");
        let place = Some((0, i64::try_from(number).expect("a small number")));
        facts.known.promises.push(Promise { id: id(number), pointer, place, asked_at: at(0), heard_at: at(1) });
    }
    facts.sessions.insert(id(3), session(3, "aborted"));
    facts.known.failed.insert(id(3), "aborted".into());
    for number in 1..=3 {
        let intent = Intent { topic: "a".into(), key: Some("k".into()), size_bytes: 5, sha256: SHA256.into(), is_sound: true };
        facts.known.intents.insert(id(number), intent);
        let opened_at = Duration::from_secs(u64::try_from(number).expect("a small number") * 10 - 1);
        facts.known.opened_at.insert(id(number), opened_at);
    }
    facts
}

type Spoil = fn(&mut Facts);

/// What may be wrong, and what the checker has to say to it.
const SPOILT: [(&str, &[Verdict], Spoil); 24] = [
    ("a record is missing", &[Verdict::Lost], |f| drop(f.records.pop())),
    ("a record is elsewhere", &[Verdict::Lost], |f| f.records[1].offset = 9),
    ("a promised session is gone", &[Verdict::Lost, Verdict::Wrong, Verdict::Orphan], |f| drop(f.sessions.remove(&id(2)))),
    ("a promise is not kept", &[Verdict::Lost, Verdict::Wrong, Verdict::Stuck], |f| {
        let verified = f.sessions.get_mut(&id(2)).expect("it is there");
        (verified.state, verified.place) = ("verified".into(), None);
        verified.entered.pop();
    }),
    ("a record comes twice", &[Verdict::Duplicate], |f| f.records.push(Record { offset: 3, ..record(2) })),
    ("a record is of nobody", &[Verdict::Wrong], |f| f.records.push(Record { upload_id: None, key: None, ..record(9) })),
    ("a record is of an unknown upload", &[Verdict::Wrong], |f| f.records.push(record(9))),
    ("an aborted upload is in Kafka", &[Verdict::Wrong], |f| f.records.push(record(3))),
    ("a record has another value", &[Verdict::Wrong], |f| f.records[0].value = pointer(2)),
    ("a record has another key", &[Verdict::Wrong], |f| f.records[0].key = None),
    ("a place was told wrongly", &[Verdict::Wrong], |f| f.known.promises[0].place = Some((1, 1))),
    ("a pointer was told wrongly", &[Verdict::Wrong], |f| f.known.promises[0].pointer = json!({"size": 6})),
    ("a promised upload was told to have failed", &[Verdict::Wrong], |f| {
        f.known.failed.insert(id(1), "expired".into());
    }),
    ("wrong bytes are promised", &[Verdict::Wrong], |f| {
        f.known.intents.get_mut(&id(1)).expect("it is there").is_sound = false;
    }),
    ("other bytes were meant", &[Verdict::Wrong], |f| {
        f.known.intents.get_mut(&id(1)).expect("it is there").size_bytes = 6;
    }),
    ("an object is missing", &[Verdict::Wrong], |f| drop(f.objects.remove(&object_key(1)))),
    ("an object has other bytes", &[Verdict::Wrong], |f| {
        f.objects.get_mut(&object_key(1)).expect("it is there").sha256 = Some("00".into());
    }),
    ("a session is in two final states", &[Verdict::Wrong], |f| {
        f.sessions.get_mut(&id(3)).expect("it is there").entered.push("expired".into());
    }),
    ("an answer is not allowed, or audit finds something", &[Verdict::Wrong], |f| f.complaints.push("500".into())),
    ("a session is not over", &[Verdict::Stuck], |f| {
        f.sessions.insert(id(4), session(4, "open"));
        f.sessions.get_mut(&id(4)).expect("it is there").entered.pop();
    }),
    ("nobody has cleaned up", &[Verdict::Stuck], |f| f.sessions.get_mut(&id(3)).expect("it is there").cleanup_due = true),
    ("a pointer waits", &[Verdict::Stuck], |f| f.waiting.push(id(1))),
    ("an object or a multipart upload is nobody's", &[Verdict::Orphan], |f| {
        f.objects.insert(object_key(3), Object { size_bytes: 5, sha256: None });
        f.uploads.push(format!("{} in a directory", id(3)));
    }),
    ("records of a key are in the wrong order", &[Verdict::Order], |f| {
        let (before, after) = f.known.promises.split_at_mut(1);
        std::mem::swap(&mut before[0].asked_at, &mut after[0].asked_at);
        std::mem::swap(&mut before[0].heard_at, &mut after[0].heard_at);
    }),
];

/// What a database that lost the commits of upload 1 takes away, and what it does not: whatever is in Kafka is there once,
/// where it was told to be, and its bytes are in S3.
const LOST: [(&str, &[Verdict], Spoil); 10] = [
    ("an upload and its promise are gone, its record is there", &[], |f| drop(f.sessions.remove(&id(1)))),
    ("a promise is gone that was not sent", &[], |f| {
        f.sessions.insert(id(1), session(1, "expired"));
        f.records.remove(0);
        f.objects.remove(&object_key(1));
        f.known.promises[0].place = None;
    }),
    ("an abort is gone", &[], |f| {
        f.known.failed.insert(id(1), "aborted".into());
        f.known.failed_at.insert(id(1), Duration::from_secs(12));
    }),
    ("an unknown record is told", &[], |f| f.complaints.push("audit: record-unknown: {}".into())),
    (
        "a record of an upload that is gone comes twice",
        &[Verdict::Lost, Verdict::Duplicate, Verdict::Wrong, Verdict::Orphan],
        |f| {
            f.sessions.remove(&id(1));
            f.records.insert(1, Record { offset: 3, ..record(1) });
        },
    ),
    ("a record comes twice", &[Verdict::Duplicate], |f| f.records.insert(1, Record { offset: 3, ..record(1) })),
    ("the object of a record is gone with its upload", &[Verdict::Lost, Verdict::Wrong], |f| {
        f.sessions.remove(&id(1));
        f.objects.remove(&object_key(1));
    }),
    ("a record that was told of is missing", &[Verdict::Lost, Verdict::Wrong, Verdict::Orphan], |f| {
        f.sessions.remove(&id(1));
        f.records.remove(0);
    }),
    ("an upload is gone that was opened afterwards", &[Verdict::Lost, Verdict::Wrong, Verdict::Orphan], |f| {
        f.sessions.remove(&id(2));
    }),
    ("records of a key are in the wrong order", &[Verdict::Order], |f| f.records.swap(0, 1)),
];

/// Runs the checker over all of it; says how many ways to fail it knows.
pub(crate) fn run() -> Result<usize, Failure> {
    let findings = check(&sound());
    if !findings.is_empty() {
        return Err(Failure(format!("the checker finds fault with sound facts: {findings:?}")));
    }
    for (name, expected, spoil) in SPOILT {
        let mut facts = sound();
        spoil(&mut facts);
        expect(name, &facts, expected)?;
    }
    let second = Duration::from_secs(1);
    let lost = Lost { between: vec![(5 * second, 15 * second)], ..Lost::default() };
    for (name, expected, spoil) in LOST {
        let mut facts = sound();
        spoil(&mut facts);
        forgive(&mut facts, &lost);
        expect(&format!("after a loss, {name}"), &facts, expected)?;
    }
    Ok(SPOILT.len() + LOST.iter().filter(|(_, expected, _)| !expected.is_empty()).count())
}

fn expect(name: &str, facts: &Facts, expected: &[Verdict]) -> Result<(), Failure> {
    let mut found: Vec<Verdict> = check(facts).into_iter().map(|finding| finding.verdict).collect();
    found.sort_unstable();
    found.dedup();
    (found == expected).then_some(()).ok_or_else(|| Failure(format!("{name}: the checker says {found:?}, not {expected:?}")))
}
