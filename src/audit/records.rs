//! PostgreSQL against Kafka: each partition is read once, side by side with the sessions published in it.

use std::collections::{HashMap, HashSet};

use lfs_broker_client::api::Integrity;
use lfs_broker_client::pointer::Pointer;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::report::{Kind, Tally, Told};
use super::{Error, PROMPT, Run, shape};
use crate::kafka::{Batch, Seen};
use crate::objects::Place;
use crate::store::{Found, Standing};

/// A partition that is being read.
struct Log<'a> {
    topic: &'a str,
    partition: i32,
    /// Older records of a key go: their absence means nothing.
    is_compacted: bool,
}

impl Log<'_> {
    fn at(&self, offset: i64) -> String {
        format!("{}/{} at {offset}", self.topic, self.partition)
    }
}

impl Run<'_> {
    /// Every topic of ours. One that Kafka lacks was deleted by somebody, and its records with it.
    pub(super) async fn records(&self, tally: &mut Tally) -> Result<(), Error> {
        for topic in self.store.topics_in_use().await? {
            let Some(partitions) = self.kafka.partitions(&topic).await? else { continue };
            let is_compacted = self.kafka.is_compacted(&topic).await;
            for partition in 0..partitions {
                self.partition(&Log { topic: &topic, partition, is_compacted }, tally).await?;
            }
        }
        Ok(())
    }

    async fn partition(&self, log: &Log<'_>, tally: &mut Tally) -> Result<(), Error> {
        let mut scan = self.kafka.scan(log.topic, log.partition).await?;
        while let Some(batch) = scan.next().await? {
            tally.records += batch.looked_at;
            let strangers = self.published(log, &batch, tally).await?;
            self.strangers(log, strangers, tally).await?;
        }
        // What is said to be behind the end, where there is nothing: the topic is another than it was.
        let mut after = (scan.end - 1, Uuid::max());
        loop {
            let page = self.store.published_between((log.topic, log.partition), after, i64::MAX).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = (last.offset, last.id);
            // Asked after the rows were read: whatever they tell of is in the log by now.
            let (_, end) = self.kafka.range(log.topic, log.partition).await?;
            for row in page.iter().filter(|row| row.offset >= end) {
                let example = format!("{} should be in {}, which ends at {end}", row.id, log.at(row.offset));
                let bytes = row.size_bytes.unsigned_abs();
                tally.tell(Told { kind: Kind::RecordMissing, bytes, fixed: false, example });
            }
        }
    }

    /// Holds a stretch of the log against the sessions published in it; gives the records that are none of theirs.
    async fn published<'b>(&self, log: &Log<'_>, batch: &'b Batch, tally: &mut Tally) -> Result<Vec<&'b Seen>, Error> {
        let by_offset: HashMap<i64, &Seen> = batch.records.iter().map(|seen| (seen.offset, seen)).collect();
        let (mut known, mut after) = (HashSet::new(), (batch.from - 1, Uuid::max()));
        loop {
            let page = self.store.published_between((log.topic, log.partition), after, batch.to).await?;
            let Some(last) = page.last() else { break };
            after = (last.offset, last.id);
            let mut missing = Vec::new();
            for row in page {
                let bytes = row.size_bytes.unsigned_abs();
                let place = log.at(row.offset);
                let mismatch = |example| Told { kind: Kind::RecordMismatch, bytes, fixed: false, example };
                match by_offset.get(&row.offset) {
                    None => missing.push(row),
                    Some(seen) if seen.upload_id != row.id => {
                        tally.tell(mismatch(format!("{} should be in {place}, but {} is", row.id, seen.upload_id)));
                    }
                    Some(seen) => {
                        known.insert(row.offset);
                        if seen.value != row.pointer.as_bytes() {
                            tally.tell(mismatch(format!("{} in {place} has another value", row.id)));
                        }
                    }
                }
            }
            if missing.is_empty() || log.is_compacted {
                continue;
            }
            // Retention goes on while we read.
            let (start, _) = self.kafka.range(log.topic, log.partition).await?;
            for row in missing.iter().filter(|row| row.offset >= start) {
                let example = format!("{} should be in {}", row.id, log.at(row.offset));
                let bytes = row.size_bytes.unsigned_abs();
                tally.tell(Told { kind: Kind::RecordMissing, bytes, fixed: false, example });
            }
        }
        Ok(batch.records.iter().filter(|seen| !known.contains(&seen.offset)).collect())
    }

    /// Records at places where no session says that it was published.
    async fn strangers(&self, log: &Log<'_>, strangers: Vec<&Seen>, tally: &mut Tally) -> Result<(), Error> {
        if strangers.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = strangers.iter().map(|seen| seen.upload_id).collect();
        let standing = self.store.standing(&ids).await?;
        let standing: HashMap<Uuid, Standing> = standing.into_iter().map(|standing| (standing.id, standing)).collect();
        let mut met = HashSet::new();
        for seen in strangers {
            let Some(session) = standing.get(&seen.upload_id) else {
                self.unknown(log, seen, tally);
                continue;
            };
            // Whoever copies records from topic to topic copies their headers too.
            if session.topic != log.topic {
                continue;
            }
            let bytes = session.size_bytes.unsigned_abs();
            let mut tell = |kind, example| tally.tell(Told { kind, bytes, fixed: false, example });
            let is_here = (session.partition, session.offset) == (Some(log.partition), Some(seen.offset));
            match session.state.as_str() {
                // It was written down between our two questions.
                "published" if is_here && session.pointer.as_deref().map(str::as_bytes) == Some(&seen.value) => {}
                "published" if is_here => {
                    tell(Kind::RecordMismatch, format!("{} in {} has another value", session.id, log.at(seen.offset)));
                }
                "published" => tell(Kind::RecordDuplicate, format!("{} also in {}", session.id, log.at(seen.offset))),
                "verified" | "open" | "completing" if !met.insert(session.id) => {
                    tell(Kind::RecordDuplicate, format!("{} also in {}", session.id, log.at(seen.offset)));
                }
                "verified" | "open" | "completing" => self.waiting(log, seen, session, tally).await?,
                state => {
                    tell(Kind::RecordUnpromised, format!("{} is {state}, and in {}", session.id, log.at(seen.offset)));
                }
            }
        }
        Ok(())
    }

    /// A record of an upload that the database never heard of, or lost; others' records are none of ours.
    fn unknown(&self, log: &Log<'_>, seen: &Seen, tally: &mut Tally) {
        let Ok(pointer) = Pointer::parse(&seen.value) else { return };
        let names_it = shape(&pointer.key).is_some_and(|(_, topic, id)| topic == log.topic && id == seen.upload_id);
        if names_it && self.places.contains_key(&pointer.bucket) {
            let example = format!("{} in {}", seen.upload_id, log.at(seen.offset));
            tally.tell(Told { kind: Kind::RecordUnknown, bytes: pointer.size, fixed: false, example });
        }
    }

    /// A record of a session that still waits: Kafka is ahead of the database, or the relay is about to write it down.
    async fn waiting(&self, log: &Log<'_>, seen: &Seen, session: &Standing, tally: &mut Tally) -> Result<(), Error> {
        let (bytes, place) = (session.size_bytes.unsigned_abs(), log.at(seen.offset));
        let Some(found) = self.believe(log, seen, session).await? else {
            tally.doubts += 1;
            let kind = if session.pointer.is_some() { Kind::RecordMismatch } else { Kind::RecordUnpromised };
            let example = format!("{} is {}, and in {place} with what was not proved", session.id, session.state);
            tally.tell(Told { kind, bytes, fixed: false, example });
            return Ok(());
        };
        let fixed = self.fix && self.store.adopt(&found, self.store.now().await?).await?;
        // Between the commit in Kafka and the mark in the database every record is in this state.
        let is_fresh = session.verified_at.is_some_and(|at| at > self.now - PROMPT);
        if !(session.is_stamped && is_fresh) {
            let example = format!("{} is {}, and in {place}", session.id, session.state);
            tally.tell(Told { kind: Kind::KafkaAhead, bytes, fixed, example });
        }
        Ok(())
    }

    /// What a record says of its session, if it can be believed: the promised bytes where there is a promise, else a
    /// pointer to the session's own object, which must be what it says.
    async fn believe(&self, log: &Log<'_>, seen: &Seen, session: &Standing) -> Result<Option<Found>, Error> {
        let Ok(pointer) = Pointer::parse(&seen.value) else { return Ok(None) };
        let Ok(value) = String::from_utf8(seen.value.clone()) else { return Ok(None) };
        match &session.pointer {
            Some(promised) if *promised != value && !is_same_but_older(promised, &pointer) => return Ok(None),
            Some(_) => {}
            None => {
                let place = Place { bucket: session.bucket.clone(), key: session.object_key.clone() };
                let size_bytes = session.size_bytes.unsigned_abs();
                if pointer.bucket != place.bucket || pointer.key != place.key || pointer.size != size_bytes {
                    return Ok(None);
                }
                let found = self.objects.head(&place, seen.version_id.as_deref()).await?;
                let is_ours = |found: &crate::session::Object| {
                    found.size_bytes == size_bytes && found.token == Some(session.id.to_string())
                };
                if !found.as_ref().is_some_and(is_ours) {
                    return Ok(None);
                }
            }
        }
        let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(seen.timestamp_ms) * 1_000_000);
        let at = at.unwrap_or(self.now);
        let said = seen.integrity.as_deref();
        let integrity = Integrity::ALL.into_iter().find(|level| Some(level.name()) == said).unwrap_or(Integrity::Size);
        Ok(Some(Found {
            id: session.id,
            partition: log.partition,
            offset: seen.offset,
            at,
            verified_at: pointer.created_at.and_then(|at| OffsetDateTime::parse(&at, &Rfc3339).ok()).unwrap_or(at),
            integrity: integrity.name().to_owned(),
            version_id: seen.version_id.clone(),
            pointer: value,
            sha256: pointer.sha256.map(|sha256| sha256.0.to_vec()),
        }))
    }
}

/// Whether a record says of an object what was promised of it, at another time: a database that went back to before the
/// proof has the upload proved, and promised, a second time.
fn is_same_but_older(promised: &str, found: &Pointer) -> bool {
    Pointer::parse(promised.as_bytes())
        .is_ok_and(|promised| Pointer { created_at: None, ..promised } == Pointer { created_at: None, ..found.clone() })
}
