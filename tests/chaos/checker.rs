//! The checker: a pure function from the observations to the findings.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use crate::observed::{Observed, Record, Session, upload_id};

/// The kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FindingKind {
    /// Acknowledged, but not at its position in Kafka.
    Lost,
    /// More than one record of one upload.
    Duplicate,
    /// Different from the acknowledged upload, or never acknowledged.
    Wrong,
    /// Not finished at the end of the run.
    Stuck,
    /// An object or multipart upload without a pointer.
    Orphan,
    /// Records of one key that are not in the order of their acknowledgements.
    Order,
}

impl FindingKind {
    pub(crate) const ALL: [Self; 6] = [Self::Lost, Self::Duplicate, Self::Wrong, Self::Stuck, Self::Orphan, Self::Order];
}

impl fmt::Display for FindingKind {
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

/// One inconsistency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) kind: FindingKind,
    pub(crate) description: String,
}

const FINAL: [&str; 4] = ["published", "aborted", "expired", "rejected"];

/// The observations, with the indexes that the checks use.
struct Check<'a> {
    observed: &'a Observed,
    records: HashMap<Uuid, Vec<&'a Record>>,
    /// When each acknowledgement was first requested and first received.
    acknowledged: HashMap<Uuid, (Duration, Duration)>,
    findings: Vec<Finding>,
}

/// Every inconsistency of the observations.
pub(crate) fn check(observed: &Observed) -> Vec<Finding> {
    let mut records: HashMap<Uuid, Vec<&Record>> = HashMap::new();
    for record in &observed.records {
        records.entry(record.upload_id.unwrap_or_default()).or_default().push(record);
    }
    let mut acknowledged: HashMap<Uuid, (Duration, Duration)> = HashMap::new();
    for acknowledgement in &observed.clients.acknowledged {
        let (requested_at, received_at) =
            acknowledged.entry(acknowledgement.id).or_insert((acknowledgement.requested_at, acknowledgement.received_at));
        (*requested_at, *received_at) =
            (acknowledgement.requested_at.min(*requested_at), acknowledgement.received_at.min(*received_at));
    }
    let mut check = Check { observed, records, acknowledged, findings: Vec::new() };
    check.acknowledged();
    check.records();
    check.sessions();
    check.bytes();
    check.order();
    for description in observed.clients.unexpected.iter().chain(&observed.errors) {
        check.find(FindingKind::Wrong, description.clone());
    }
    check.findings
}

impl Check<'_> {
    fn find(&mut self, kind: FindingKind, description: String) {
        self.findings.push(Finding { kind, description });
    }

    /// Every acknowledged upload is published, at its position, with the acknowledged pointer.
    fn acknowledged(&mut self) {
        let observed = self.observed;
        for acknowledgement in &observed.clients.acknowledged {
            let id = acknowledgement.id;
            let Some(session) = observed.sessions.get(&id) else {
                self.find(FindingKind::Lost, format!("{id} was acknowledged, but its session does not exist"));
                continue;
            };
            if session.state != "published" {
                self.find(FindingKind::Lost, format!("{id} was acknowledged, but is {}", session.state));
            }
            if acknowledgement.position.is_some_and(|position| Some(position) != session.position) {
                let description =
                    format!("{id} was reported at {:?}, but is at {:?}", acknowledgement.position, session.position);
                self.find(FindingKind::Wrong, description);
            }
            let stored: Option<Value> = session.pointer.as_deref().and_then(|pointer| serde_json::from_str(pointer).ok());
            if stored.as_ref() != Some(&acknowledgement.pointer) {
                self.find(FindingKind::Wrong, format!("{id} was acknowledged as {}, but is {stored:?}", acknowledgement.pointer));
            }
            if let Some(reason) = observed.clients.failed.get(&id) {
                self.find(FindingKind::Wrong, format!("{id} was acknowledged and also reported as {reason}"));
            }
            if observed.clients.declared.get(&id).is_some_and(|upload| !upload.sends_right_bytes) {
                self.find(FindingKind::Wrong, format!("{id} was acknowledged, but wrong bytes were sent"));
            }
        }
        for (id, session) in &observed.sessions {
            let Some(position) = session.position else { continue };
            let records = self.records.get(id).into_iter().flatten();
            if !records.into_iter().any(|record| record.topic == session.topic && (record.partition, record.offset) == position) {
                self.find(FindingKind::Lost, format!("{id} is published, but has no record at {} {position:?}", session.topic));
            }
        }
    }

    /// Every record is the only one of a published session, and has the session's pointer and key.
    fn records(&mut self) {
        let observed = self.observed;
        for (id, records) in &self.records {
            if id.is_nil() {
                self.findings.extend(records.iter().map(|record| Finding {
                    kind: FindingKind::Wrong,
                    description: format!(
                        "the record at {} {}/{} has no upload id",
                        record.topic, record.partition, record.offset
                    ),
                }));
                continue;
            }
            if records.len() > 1 {
                let positions: Vec<_> = records.iter().map(|record| (record.partition, record.offset)).collect();
                self.findings
                    .push(Finding { kind: FindingKind::Duplicate, description: format!("{id} has records at {positions:?}") });
            }
            let wrong = match observed.sessions.get(id) {
                None => Some("has no session".to_owned()),
                Some(session) if session.state != "published" => Some(format!("is {}", session.state)),
                Some(session) if records.iter().any(|record| Some(&record.value) != session.pointer.as_ref()) => {
                    Some(format!("has the pointer {:?}, but Kafka has {}", session.pointer, records[0].value))
                }
                Some(_) => observed.clients.failed.get(id).map(|reason| format!("was reported as {reason}")),
            };
            let key = observed.clients.declared.get(id).map(|upload| upload.key.as_ref().map(|key| key.as_bytes().to_vec()));
            let other_key = records.iter().find(|record| key.as_ref().is_some_and(|key| *key != record.key));
            let other_key = other_key.map(|record| format!("has the key {key:?}, but Kafka has {:?}", record.key));
            self.findings.extend(
                wrong
                    .into_iter()
                    .chain(other_key)
                    .map(|wrong| Finding { kind: FindingKind::Wrong, description: format!("{id} is in Kafka and {wrong}") }),
            );
        }
    }

    /// Every session has ended, in exactly one final state, and no pointer waits.
    fn sessions(&mut self) {
        let observed = self.observed;
        for (id, session) in &observed.sessions {
            let reason = session.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
            if !FINAL.contains(&session.state.as_str()) {
                self.find(FindingKind::Stuck, format!("{id} is {}{reason}", session.state));
            }
            if session.cleanup_due {
                self.find(FindingKind::Stuck, format!("{id} is {} and not cleaned up{reason}", session.state));
            }
            let first_final = session.entered.iter().position(|state| FINAL.contains(&state.as_str()));
            let in_order = match first_final {
                Some(end) => end + 1 == session.entered.len() && session.entered[end] == session.state,
                None => !FINAL.contains(&session.state.as_str()),
            };
            if !in_order {
                self.find(FindingKind::Wrong, format!("{id} is {} after {}", session.state, session.entered.join(", ")));
            }
        }
        for id in &observed.waiting {
            self.find(FindingKind::Stuck, format!("the pointer of {id} still waits in the outbox"));
        }
        let opened = observed.clients.declared.keys().filter(|id| !observed.sessions.contains_key(id));
        for id in opened.copied().collect::<Vec<_>>() {
            self.find(FindingKind::Wrong, format!("{id} was opened, but its session does not exist"));
        }
    }

    /// Every pointer's object has the declared size and hash, and there is no other object.
    fn bytes(&mut self) {
        let observed = self.observed;
        let mut owners: BTreeMap<&str, &Session> = BTreeMap::new();
        for (id, session) in &observed.sessions {
            let Some(pointer) = session.pointer.as_deref() else { continue };
            owners.insert(&session.object_key, session);
            let pointer: Value = serde_json::from_str(pointer).unwrap_or_default();
            let found = observed.objects.get(&session.object_key);
            let pointer_says = (pointer["size"].as_u64(), pointer["sha256"].as_str());
            let s3_holds = found.map(|object| (Some(object.size_bytes), object.sha256.as_deref()));
            if s3_holds != Some(pointer_says) || pointer["key"] != session.object_key.as_str() {
                self.find(FindingKind::Wrong, format!("{id}: the pointer says {pointer}, S3 holds {found:?}"));
            }
            let declared = observed.clients.declared.get(id);
            if declared.is_some_and(|declared| (Some(declared.size_bytes), Some(declared.sha256.as_str())) != pointer_says) {
                self.find(FindingKind::Wrong, format!("{id}: the pointer says {pointer}, the client declared {declared:?}"));
            }
        }
        for key in observed.objects.keys().filter(|key| !owners.contains_key(key.as_str())) {
            let session = observed.sessions.iter().find(|(_, session)| session.object_key == **key);
            let owner = session.map_or("no session".to_owned(), |(id, session)| format!("{id}, which is {}", session.state));
            self.find(FindingKind::Orphan, format!("object {key} of {owner}"));
        }
        for upload in &observed.uploads {
            let session = upload_id(upload).and_then(|id| observed.sessions.get(&id));
            let state = session.map_or("unknown", |session| session.state.as_str());
            self.find(FindingKind::Orphan, format!("multipart upload of {upload}, which is {state}"));
        }
    }

    /// If one upload was acknowledged before another of the same key was requested, its record comes first in Kafka.
    fn order(&mut self) {
        let observed = self.observed;
        let mut keys: BTreeMap<(&str, &[u8]), Vec<&Record>> = BTreeMap::new();
        // The records are sorted by topic, partition and offset.
        for record in &observed.records {
            if let Some(key) = &record.key {
                keys.entry((&record.topic, key)).or_default().push(record);
            }
        }
        for ((topic, key), records) in keys {
            let key = String::from_utf8_lossy(key).into_owned();
            if records.iter().any(|record| record.partition != records[0].partition) {
                self.find(FindingKind::Order, format!("{key} of {topic} is in several partitions"));
            }
            // The latest request time of the records before.
            let mut latest: Option<(Duration, Uuid)> = None;
            for record in records {
                let Some(id) = record.upload_id else { continue };
                let Some((requested_at, received_at)) = self.acknowledged.get(&id).copied() else { continue };
                if let Some((_, before)) = latest.filter(|(requested_at, _)| received_at < *requested_at) {
                    let description =
                        format!("{id} of key {key} was acknowledged before {before} was requested, but its record is later");
                    self.find(FindingKind::Order, description);
                }
                latest = latest.max(Some((requested_at, id)));
            }
        }
    }
}
