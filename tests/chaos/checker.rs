//! The checker: a pure function from what was collected to what is wrong with it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use crate::facts::{Facts, Record, Session};

/// The ways in which a run can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// Promised, and not at its place in Kafka.
    Lost,
    /// More than one record of one upload.
    Duplicate,
    /// Not what was promised, or never promised.
    Wrong,
    /// Not over when all is over.
    Stuck,
    /// Bytes that belong to nobody.
    Orphan,
    /// Not in the order of promise for its key.
    Order,
}

impl Verdict {
    pub(crate) const ALL: [Self; 6] = [Self::Lost, Self::Duplicate, Self::Wrong, Self::Stuck, Self::Orphan, Self::Order];
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "lost",
            Self::Duplicate => "duplicates",
            Self::Wrong => "wrong",
            Self::Stuck => "stuck",
            Self::Orphan => "orphans",
            Self::Order => "out of order",
        })
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) verdict: Verdict,
    pub(crate) what: String,
}

const FINAL: [&str; 4] = ["published", "aborted", "expired", "rejected"];

/// The facts, with the ways through them that every check needs.
struct Check<'a> {
    facts: &'a Facts,
    records: HashMap<Uuid, Vec<&'a Record>>,
    /// When each promise was first asked for and first heard.
    promised: HashMap<Uuid, (Duration, Duration)>,
    findings: Vec<Finding>,
}

/// Everything that is wrong with the facts.
pub(crate) fn check(facts: &Facts) -> Vec<Finding> {
    let mut records: HashMap<Uuid, Vec<&Record>> = HashMap::new();
    for record in &facts.records {
        records.entry(record.upload_id.unwrap_or_default()).or_default().push(record);
    }
    let mut promised: HashMap<Uuid, (Duration, Duration)> = HashMap::new();
    for promise in &facts.known.promises {
        let (asked_at, heard_at) = promised.entry(promise.id).or_insert((promise.asked_at, promise.heard_at));
        (*asked_at, *heard_at) = (promise.asked_at.min(*asked_at), promise.heard_at.min(*heard_at));
    }
    let mut check = Check { facts, records, promised, findings: Vec::new() };
    check.promises();
    check.records();
    check.sessions();
    check.bytes();
    check.order();
    for what in facts.known.unexpected.iter().chain(&facts.complaints) {
        check.find(Verdict::Wrong, what.clone());
    }
    check.findings
}

impl Check<'_> {
    fn find(&mut self, verdict: Verdict, what: String) {
        self.findings.push(Finding { verdict, what });
    }

    /// What was promised is published, at its place, with the words that were heard.
    fn promises(&mut self) {
        let facts = self.facts;
        for promise in &facts.known.promises {
            let id = promise.id;
            let Some(session) = facts.sessions.get(&id) else {
                self.find(Verdict::Lost, format!("{id} was promised and is not known any more"));
                continue;
            };
            if session.state != "published" {
                self.find(Verdict::Lost, format!("{id} was promised and is {}", session.state));
            }
            if promise.place.is_some_and(|place| Some(place) != session.place) {
                let what = format!("{id} was told to be at {:?} and is at {:?}", promise.place, session.place);
                self.find(Verdict::Wrong, what);
            }
            let stored: Option<Value> = session.pointer.as_deref().and_then(|pointer| serde_json::from_str(pointer).ok());
            if stored.as_ref() != Some(&promise.pointer) {
                self.find(Verdict::Wrong, format!("{id} was promised as {} and is {stored:?}", promise.pointer));
            }
            if let Some(why) = facts.known.failed.get(&id) {
                self.find(Verdict::Wrong, format!("{id} was promised and told to be {why}"));
            }
            if facts.known.intents.get(&id).is_some_and(|intent| !intent.is_sound) {
                self.find(Verdict::Wrong, format!("{id} was promised, but wrong bytes were sent"));
            }
        }
        for (id, session) in &facts.sessions {
            let Some(place) = session.place else { continue };
            let there = self.records.get(id).into_iter().flatten();
            if !there.into_iter().any(|record| record.topic == session.topic && (record.partition, record.offset) == place) {
                self.find(Verdict::Lost, format!("{id} is published, and no record of it is at {} {place:?}", session.topic));
            }
        }
    }

    /// Every record is of a published session, the only one of it, and says what the session says.
    fn records(&mut self) {
        let facts = self.facts;
        for (id, records) in &self.records {
            if id.is_nil() {
                self.findings.extend(records.iter().map(|record| Finding {
                    verdict: Verdict::Wrong,
                    what: format!("the record at {} {}/{} names no upload", record.topic, record.partition, record.offset),
                }));
                continue;
            }
            if records.len() > 1 {
                let places: Vec<_> = records.iter().map(|record| (record.partition, record.offset)).collect();
                self.findings.push(Finding { verdict: Verdict::Duplicate, what: format!("{id} is at {places:?}") });
            }
            let wrong = match facts.sessions.get(id) {
                None => Some("is not known".to_owned()),
                Some(session) if session.state != "published" => Some(format!("is {}", session.state)),
                Some(session) if records.iter().any(|record| Some(&record.value) != session.pointer.as_ref()) => {
                    Some(format!("has the pointer {:?}, and Kafka {}", session.pointer, records[0].value))
                }
                Some(_) => facts.known.failed.get(id).map(|why| format!("was told to be {why}")),
            };
            let key = facts.known.intents.get(id).map(|intent| intent.key.as_ref().map(|key| key.as_bytes().to_vec()));
            let strange = records.iter().find(|record| key.as_ref().is_some_and(|key| *key != record.key));
            let strange = strange.map(|record| format!("has the key {key:?}, and Kafka {:?}", record.key));
            self.findings.extend(
                wrong
                    .into_iter()
                    .chain(strange)
                    .map(|wrong| Finding { verdict: Verdict::Wrong, what: format!("{id} is in Kafka and {wrong}") }),
            );
        }
    }

    /// Every session is over, in one way, and nothing waits.
    fn sessions(&mut self) {
        let facts = self.facts;
        for (id, session) in &facts.sessions {
            let why = session.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
            if !FINAL.contains(&session.state.as_str()) {
                self.find(Verdict::Stuck, format!("{id} is {}{why}", session.state));
            }
            if session.cleanup_due {
                self.find(Verdict::Stuck, format!("{id} is {} and not cleaned up{why}", session.state));
            }
            let ends = session.entered.iter().position(|state| FINAL.contains(&state.as_str()));
            let in_order = match ends {
                Some(end) => end + 1 == session.entered.len() && session.entered[end] == session.state,
                None => !FINAL.contains(&session.state.as_str()),
            };
            if !in_order {
                self.find(Verdict::Wrong, format!("{id} is {} after {}", session.state, session.entered.join(", ")));
            }
        }
        for id in &facts.waiting {
            self.find(Verdict::Stuck, format!("the pointer of {id} waits in the outbox"));
        }
        let opened = facts.known.intents.keys().filter(|id| !facts.sessions.contains_key(id));
        for id in opened.copied().collect::<Vec<_>>() {
            self.find(Verdict::Wrong, format!("{id} was opened and is not known any more"));
        }
    }

    /// Every pointer's object is what it says and what was meant, and there is no other.
    fn bytes(&mut self) {
        let facts = self.facts;
        let mut owners: BTreeMap<&str, &Session> = BTreeMap::new();
        for (id, session) in &facts.sessions {
            let Some(pointer) = session.pointer.as_deref() else { continue };
            owners.insert(&session.object_key, session);
            let pointer: Value = serde_json::from_str(pointer).unwrap_or_default();
            let found = facts.objects.get(&session.object_key);
            let says = (pointer["size"].as_u64(), pointer["sha256"].as_str());
            let holds = found.map(|object| (Some(object.size_bytes), object.sha256.as_deref()));
            if holds != Some(says) || pointer["key"] != session.object_key.as_str() {
                self.find(Verdict::Wrong, format!("{id}: the pointer says {pointer}, S3 holds {found:?}"));
            }
            let meant = facts.known.intents.get(id);
            if meant.is_some_and(|meant| (Some(meant.size_bytes), Some(meant.sha256.as_str())) != says) {
                self.find(Verdict::Wrong, format!("{id}: the pointer says {pointer}, {meant:?} was meant"));
            }
        }
        for key in facts.objects.keys().filter(|key| !owners.contains_key(key.as_str())) {
            let session = facts.sessions.iter().find(|(_, session)| session.object_key == **key);
            let whose = session.map_or("nobody".to_owned(), |(id, session)| format!("{id}, which is {}", session.state));
            self.find(Verdict::Orphan, format!("object {key} of {whose}"));
        }
        for upload in &facts.uploads {
            let id = upload.split(' ').next().and_then(|id| id.parse().ok());
            let session = id.and_then(|id: Uuid| facts.sessions.get(&id));
            let state = session.map_or("not known", |session| session.state.as_str());
            self.find(Verdict::Orphan, format!("multipart upload of {upload}, which is {state}"));
        }
    }

    /// Who was promised before another of the same key was asked for is before it in Kafka.
    fn order(&mut self) {
        let facts = self.facts;
        let mut keys: BTreeMap<(&str, &[u8]), Vec<&Record>> = BTreeMap::new();
        // They come by topic, partition and offset.
        for record in &facts.records {
            if let Some(key) = &record.key {
                keys.entry((&record.topic, key)).or_default().push(record);
            }
        }
        for ((topic, key), records) in keys {
            let key = String::from_utf8_lossy(key).into_owned();
            if records.iter().any(|record| record.partition != records[0].partition) {
                self.find(Verdict::Order, format!("{key} of {topic} is in several partitions"));
            }
            // The latest that anything before was asked for.
            let mut latest: Option<(Duration, Uuid)> = None;
            for record in records {
                let Some(id) = record.upload_id else { continue };
                let Some((asked_at, heard_at)) = self.promised.get(&id).copied() else { continue };
                if let Some((_, before)) = latest.filter(|(asked_at, _)| heard_at < *asked_at) {
                    let what = format!("{id} of key {key} was promised before {before} was asked for, and comes after it");
                    self.find(Verdict::Order, what);
                }
                latest = latest.max(Some((asked_at, id)));
            }
        }
    }
}
