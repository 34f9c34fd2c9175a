//! PostgreSQL against Kafka: each partition is read once, side by side with the sessions published in it.

use std::collections::{HashMap, HashSet};

use lfs_broker_client::pointer::Pointer;
use uuid::Uuid;

use super::bytes::is_failed;
use super::report::{Kind, Tally, Told};
use super::{Error, PROMPT, Run, shape};
use crate::kafka::{Batch, Seen};
use crate::store::Standing;

/// A partition that is being read.
pub(super) struct Log<'a> {
    topic: &'a str,
    pub(super) partition: i32,
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
                // Where the database is current a failed upload has no record; an old one may have let it fail.
                state if is_failed(state) && !self.is_older => {
                    tell(Kind::RecordUnpromised, format!("{} is {state}, and in {}", session.id, log.at(seen.offset)));
                }
                _ if met.contains(&session.id) => {
                    tell(Kind::RecordDuplicate, format!("{} also in {}", session.id, log.at(seen.offset)));
                }
                _ => {
                    if self.waiting(log, seen, session, tally).await? {
                        met.insert(session.id);
                    }
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

    /// A record of a session that is not published: Kafka is ahead of the database, or the relay is about to write it
    /// down, or it is forged. `true`: it is the session's.
    async fn waiting(&self, log: &Log<'_>, seen: &Seen, session: &Standing, tally: &mut Tally) -> Result<bool, Error> {
        let (bytes, place) = (session.size_bytes.unsigned_abs(), log.at(seen.offset));
        let found = match self.prove(log, seen, session).await? {
            Ok(found) => found,
            Err(why) => {
                // What has failed is not sent, so it can become no second record.
                tally.doubts += u64::from(!is_failed(&session.state));
                let kind = if session.pointer.is_some() { Kind::RecordMismatch } else { Kind::RecordUnpromised };
                let example = format!("{} is {}, and in {place}, not proved: {why}", session.id, session.state);
                tally.tell(Told { kind, bytes, fixed: false, example });
                return Ok(false);
            }
        };
        let fixed = self.fix && self.store.adopt(&found, self.store.now().await?).await?;
        // Between the commit in Kafka and the mark in the database every record is in this state.
        let is_fresh = session.verified_at.is_some_and(|at| at > self.now - PROMPT);
        if self.is_older || !(session.is_stamped && is_fresh) {
            let example = format!("{} is {}, and in {place}", session.id, session.state);
            tally.tell(Told { kind: Kind::KafkaAhead, bytes, fixed, example });
        }
        Ok(true)
    }
}
