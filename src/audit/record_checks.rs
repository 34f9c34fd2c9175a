//! PostgreSQL against Kafka: each partition is read once, beside the sessions that are published in it.

use std::collections::{HashMap, HashSet};

use lfs_broker_client::pointer::Pointer;
use uuid::Uuid;

use super::object_checks::is_failed;
use super::report::{FindingKind, NewFinding, ReportBuilder};
use super::{Error, PUBLISH_GRACE, Run, parse_object_key};
use crate::kafka::{ScannedRange, ScannedRecord};
use crate::session::RecordMetadata;
use crate::store::SessionStatus;

/// A partition that the audit reads.
pub(super) struct PartitionLog<'a> {
    topic: &'a str,
    pub(super) partition: i32,
    /// Compaction removes older records of a key, so a missing record is not a finding.
    is_compacted: bool,
}

impl PartitionLog<'_> {
    fn position(&self, offset: i64) -> String {
        format!("{} partition {} at offset {offset}", self.topic, self.partition)
    }
}

impl Run<'_> {
    /// Checks every topic of the broker. A topic that Kafka does not have was deleted together with its records.
    pub(super) async fn check_records(&self, report: &mut ReportBuilder) -> Result<(), Error> {
        for topic in self.store.topics_in_use().await? {
            let Some(partitions) = self.kafka.partition_count(&topic).await? else { continue };
            let is_compacted = self.kafka.is_compacted(&topic).await;
            for partition in 0..partitions {
                self.check_partition(&PartitionLog { topic: &topic, partition, is_compacted }, report).await?;
            }
        }
        Ok(())
    }

    async fn check_partition(&self, log: &PartitionLog<'_>, report: &mut ReportBuilder) -> Result<(), Error> {
        let mut scan = self.kafka.scan(log.topic, log.partition).await?;
        while let Some(batch) = scan.next().await? {
            report.records += batch.record_count;
            let unmatched = self.check_published(log, &batch, report).await?;
            self.check_unmatched(log, unmatched, report).await?;
        }
        // Sessions with an offset beyond the end of the log: the topic was deleted and created again.
        let mut after = (scan.end_offset - 1, Uuid::max());
        loop {
            let page = self.store.published_sessions((log.topic, log.partition), after, i64::MAX).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = (last.offset, last.id);
            // The end is read after the rows, so the log already contains the records of these rows.
            let (_, end) = self.kafka.watermarks(log.topic, log.partition).await?;
            for row in page.iter().filter(|row| row.offset >= end) {
                let position = log.position(row.offset);
                let example = format!("upload {} should be in {position}, but the log ends at {end}", row.id);
                let bytes = row.size_bytes.unsigned_abs();
                report.add(NewFinding { kind: FindingKind::RecordMissing, bytes, fixed: false, example });
            }
        }
    }

    /// Compares one batch of the log with the sessions published in it. Returns the records that belong to none of them.
    async fn check_published<'b>(
        &self,
        log: &PartitionLog<'_>,
        batch: &'b ScannedRange,
        report: &mut ReportBuilder,
    ) -> Result<Vec<&'b ScannedRecord>, Error> {
        let by_offset: HashMap<i64, &ScannedRecord> = batch.records.iter().map(|record| (record.offset, record)).collect();
        let (mut matched, mut after) = (HashSet::new(), (batch.from - 1, Uuid::max()));
        loop {
            let page = self.store.published_sessions((log.topic, log.partition), after, batch.to).await?;
            let Some(last) = page.last() else { break };
            after = (last.offset, last.id);
            let mut missing = Vec::new();
            for row in page {
                let bytes = row.size_bytes.unsigned_abs();
                let position = log.position(row.offset);
                let mismatch = |example| NewFinding { kind: FindingKind::RecordMismatch, bytes, fixed: false, example };
                match by_offset.get(&row.offset) {
                    None => missing.push(row),
                    Some(record) if record.upload_id != row.id => {
                        let found = record.upload_id;
                        report.add(mismatch(format!("upload {} should be in {position}, but upload {found} is", row.id)));
                    }
                    Some(record) => {
                        matched.insert(row.offset);
                        if record.value != row.pointer.as_bytes() {
                            report.add(mismatch(format!("the record of upload {} in {position} has another value", row.id)));
                        }
                    }
                }
            }
            if missing.is_empty() || log.is_compacted {
                continue;
            }
            // Retention may have deleted records since the start of the scan.
            let (start, _) = self.kafka.watermarks(log.topic, log.partition).await?;
            for row in missing.iter().filter(|row| row.offset >= start) {
                let example = format!("upload {} should be in {}", row.id, log.position(row.offset));
                let bytes = row.size_bytes.unsigned_abs();
                report.add(NewFinding { kind: FindingKind::RecordMissing, bytes, fixed: false, example });
            }
        }
        Ok(batch.records.iter().filter(|record| !matched.contains(&record.offset)).collect())
    }

    /// Checks records at offsets where no session is published.
    async fn check_unmatched(
        &self,
        log: &PartitionLog<'_>,
        unmatched: Vec<&ScannedRecord>,
        report: &mut ReportBuilder,
    ) -> Result<(), Error> {
        if unmatched.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = unmatched.iter().map(|record| record.upload_id).collect();
        let statuses = self.store.session_statuses(&ids).await?;
        let statuses: HashMap<Uuid, SessionStatus> = statuses.into_iter().map(|status| (status.id, status)).collect();
        let mut accepted = HashSet::new();
        for record in unmatched {
            let Some(session) = statuses.get(&record.upload_id) else {
                self.report_unknown(log, record, report);
                continue;
            };
            // A tool that copies records from one topic to another copies their headers too.
            if session.topic != log.topic {
                continue;
            }
            let (bytes, position) = (session.size_bytes.unsigned_abs(), log.position(record.offset));
            let mut add = |kind, example| report.add(NewFinding { kind, bytes, fixed: false, example });
            // The relay saved no offset, because it did not find the record. There is only one, so it is this record.
            let is_here = session.offset == Some(RecordMetadata::UNKNOWN_OFFSET)
                || (session.partition, session.offset) == (Some(log.partition), Some(record.offset));
            match session.state.as_str() {
                // The relay saved the publication between the two queries.
                "published" if is_here && session.pointer.as_deref().map(str::as_bytes) == Some(&record.value) => {}
                "published" if is_here => {
                    add(
                        FindingKind::RecordMismatch,
                        format!("the record of upload {} in {position} has another value", session.id),
                    );
                }
                "published" => add(FindingKind::RecordDuplicate, format!("upload {} is also in {position}", session.id)),
                // In a current database a failed upload has no record. An old database may have let a published upload fail.
                state if is_failed(state) && !self.database_is_older => {
                    add(FindingKind::RecordUnpromised, format!("upload {} is {state}, but is in {position}", session.id));
                }
                _ if accepted.contains(&session.id) => {
                    add(FindingKind::RecordDuplicate, format!("upload {} is also in {position}", session.id));
                }
                _ => {
                    if self.check_unpublished_record(log, record, session, report).await? {
                        accepted.insert(session.id);
                    }
                }
            }
        }
        Ok(())
    }

    /// Reports a record whose upload is not in the database. Records of other programs are ignored.
    fn report_unknown(&self, log: &PartitionLog<'_>, record: &ScannedRecord, report: &mut ReportBuilder) {
        let Ok(pointer) = Pointer::parse(&record.value) else { return };
        let is_ours = parse_object_key(&pointer.key).is_some_and(|(_, topic, id)| topic == log.topic && id == record.upload_id);
        if is_ours && self.prefixes_by_bucket.contains_key(&pointer.bucket) {
            let example = format!("upload {} in {}", record.upload_id, log.position(record.offset));
            report.add(NewFinding { kind: FindingKind::RecordUnknown, bytes: pointer.size, fixed: false, example });
        }
    }

    /// Checks a record of a session that is not published: Kafka is ahead of the database, the relay is about to save the
    /// publication, or the record is forged. Returns whether the record belongs to the session.
    async fn check_unpublished_record(
        &self,
        log: &PartitionLog<'_>,
        record: &ScannedRecord,
        session: &SessionStatus,
        report: &mut ReportBuilder,
    ) -> Result<bool, Error> {
        let (bytes, position) = (session.size_bytes.unsigned_abs(), log.position(record.offset));
        let found = match self.verify_record(log, record, session).await? {
            Ok(found) => found,
            Err(reason) => {
                // The relay sends no pointer of a failed session, so such a session cannot get a second record.
                report.unverified_records += u64::from(!is_failed(&session.state));
                let kind = if session.pointer.is_some() { FindingKind::RecordMismatch } else { FindingKind::RecordUnpromised };
                let (id, state) = (session.id, &session.state);
                let example = format!("upload {id} is {state}, but is in {position}; the record is not verified: {reason}");
                report.add(NewFinding { kind, bytes, fixed: false, example });
                return Ok(false);
            }
        };
        let fixed = self.fix && self.store.mark_published_from_record(&found, self.store.now().await?).await?;
        // Between the commit in Kafka and the update of the database every record is in this state.
        let is_fresh = session.verified_at.is_some_and(|at| at > self.started_at - PUBLISH_GRACE);
        if self.database_is_older || !(session.is_claimed && is_fresh) {
            let example = format!("upload {} is {}, but is in {position}", session.id, session.state);
            report.add(NewFinding { kind: FindingKind::KafkaAhead, bytes, fixed, example });
        }
        Ok(true)
    }
}
