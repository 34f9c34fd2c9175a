//! The audit report: for each kind of finding the count, the bytes, the repairs and the first examples.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

/// Examples per kind; further findings are only counted.
const MAX_EXAMPLES: usize = 20;

/// The ways in which PostgreSQL, S3 and Kafka can disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// A row breaks the rules of its state. Not repaired, because the correct content is unknown.
    Corrupt,
    /// S3 does not hold the object of a verified upload. Not repaired, because the bytes are lost.
    ObjectMissing,
    /// The object of a verified upload has another size, write token or checksum. Not repaired.
    ObjectMismatch,
    /// The object of a failed upload exists, and no cleanup is due. Repaired: a cleanup is scheduled for the sweeper.
    ObjectOrphan,
    /// An object with a write token whose session does not exist. Never removed, because it may be the only copy.
    ObjectUnknown,
    /// An open multipart upload of a finished session. Repaired: aborted.
    UploadOrphan,
    /// An open multipart upload under a key of the broker whose session does not exist. Repaired: aborted, if it is older
    /// than any session can be.
    UploadUnknown,
    /// Verified for more than a minute and not published. Not repaired: remove the cause, then use `redrive`.
    Unpublished,
    /// Verified, but the outbox has no pointer. Repaired, if Kafka does not hold the record: queued in the outbox again.
    OutboxMissing,
    /// The outbox has a pointer of a session that is not verified. Repaired, if the session is published: row deleted.
    OutboxStray,
    /// The record of a published session is missing at its offset, although the log still covers it. Not repaired.
    RecordMissing,
    /// The record at the offset of a published session belongs to another session, or has another value than the stored
    /// pointer. Not repaired.
    RecordMismatch,
    /// An upload has more than one record. Not repaired, because records cannot be removed. `at_least_once` allows this.
    RecordDuplicate,
    /// A record of an upload of this deployment whose session does not exist. Not repaired.
    RecordUnknown,
    /// A record of an upload that was never verified, or that failed, and the record cannot be verified. Not repaired.
    RecordUnpromised,
    /// Kafka holds the pointer of a session that is not published: the database is older than Kafka. Repaired: published.
    KafkaAhead,
    /// Kafka holds a later batch of a shard than the database knows. Repaired, if all records of unpublished uploads were
    /// verified.
    MarkerAhead,
    /// The row of a tenant is not the sum of its sessions. Repaired: counted again.
    Quota,
}

impl FindingKind {
    /// The meaning of the kind in one sentence.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Corrupt => "rows that break the rules of their state",
            Self::ObjectMissing => "verified uploads whose object S3 does not hold",
            Self::ObjectMismatch => "verified uploads whose object in S3 has another size, write token or checksum",
            Self::ObjectOrphan => "objects of failed uploads without a planned cleanup; --fix schedules a cleanup",
            Self::ObjectUnknown => "objects written through URLs of the broker whose upload is unknown; --fix never removes them",
            Self::UploadOrphan => "open multipart uploads of finished uploads; --fix aborts them",
            Self::UploadUnknown => "open multipart uploads whose upload is unknown; --fix aborts those older than 7 days",
            Self::Unpublished => "uploads verified more than a minute ago that are not published",
            Self::OutboxMissing => "verified uploads without a pointer in the outbox; --fix queues their pointers again",
            Self::OutboxStray => "pointers in the outbox whose upload is not verified; --fix deletes those already published",
            Self::RecordMissing => "published uploads without a record at their offset in Kafka",
            Self::RecordMismatch => "records whose value is not the pointer of their upload",
            Self::RecordDuplicate => "second records of one upload",
            Self::RecordUnknown => "records whose upload is unknown",
            Self::RecordUnpromised => "records of uploads that are not verified; the records could not be verified either",
            Self::KafkaAhead => "uploads that Kafka holds but that are not published here; --fix saves them as published",
            Self::MarkerAhead => {
                "shards whose last batch in Kafka is unknown here; --fix lets them continue if all records were verified"
            }
            Self::Quota => "tenants whose counters differ from the sum of their uploads; --fix counts again",
        }
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The same name as in JSON.
        self.serialize(f)
    }
}

/// All findings of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The kind of the findings.
    pub kind: FindingKind,
    /// The meaning of the kind in one sentence.
    pub meaning: &'static str,
    /// The number of findings.
    pub count: u64,
    /// The bytes of the affected uploads.
    pub bytes: u64,
    /// The number of repaired findings.
    pub fixed: u64,
    /// The first findings, at most 20.
    pub examples: Vec<String>,
}

/// The outcome of an audit.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Whether there are no findings.
    pub clean: bool,
    /// Sessions checked.
    pub sessions: u64,
    /// Objects listed.
    pub objects: u64,
    /// Records read.
    pub records: u64,
    /// The findings by kind.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The findings of one kind, if there are any.
    pub fn finding(&self, kind: FindingKind) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.kind == kind)
    }
}

/// One finding, before it is added to the report.
pub(super) struct NewFinding {
    pub(super) kind: FindingKind,
    pub(super) bytes: u64,
    pub(super) fixed: bool,
    pub(super) example: String,
}

/// Collects the findings of a run.
#[derive(Default)]
pub(super) struct ReportBuilder {
    pub(super) sessions: u64,
    pub(super) objects: u64,
    pub(super) records: u64,
    /// The records that could not be verified and whose sessions are still to be published. Sending those pointers could
    /// create a second record.
    pub(super) unverified_records: u64,
    findings: BTreeMap<FindingKind, Finding>,
}

impl ReportBuilder {
    pub(super) fn add(&mut self, new: NewFinding) {
        let kind = new.kind;
        let empty = || Finding { kind, meaning: kind.meaning(), count: 0, bytes: 0, fixed: 0, examples: Vec::new() };
        let finding = self.findings.entry(kind).or_insert_with(empty);
        finding.count += 1;
        finding.bytes = finding.bytes.saturating_add(new.bytes);
        finding.fixed += u64::from(new.fixed);
        if finding.examples.len() < MAX_EXAMPLES {
            finding.examples.push(new.example);
        }
    }

    /// Whether Kafka may already hold a pointer that the relay would send.
    pub(super) fn has_unverified_records(&self) -> bool {
        self.unverified_records > 0
    }

    pub(super) fn build(self) -> Report {
        Report {
            clean: self.findings.is_empty(),
            sessions: self.sessions,
            objects: self.objects,
            records: self.records,
            findings: self.findings.into_values().collect(),
        }
    }
}
