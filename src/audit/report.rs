//! What was found: how often, how many bytes, whether it is repaired, and the first few by name.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

/// Examples a kind; the counts go on.
const EXAMPLES: usize = 20;

/// The ways in which the three can disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A row breaks the rules of its state. Not repaired: nobody knows what it should be.
    Corrupt,
    /// A promised object is not in S3. Not repaired: the bytes are gone.
    ObjectMissing,
    /// A promised object has another size, write token or SHA-256. Not repaired.
    ObjectMismatch,
    /// A failed session's object is there, and nobody will remove it. Repaired: the sweeper is told.
    ObjectOrphan,
    /// An object with our write token whose session does not exist. Never removed: it may be the only copy.
    ObjectUnknown,
    /// An open multipart upload of a session that is over. Repaired: aborted.
    UploadOrphan,
    /// An open multipart upload under a key of ours whose session does not exist. Aborted once it is older than any
    /// session can be.
    UploadUnknown,
    /// Verified for more than a minute and not published. Not repaired: see why, then `redrive`.
    Unpublished,
    /// Verified, and no pointer waits in the outbox. Repaired, where Kafka does not have it: promised again.
    OutboxMissing,
    /// A pointer waits in the outbox, and its session is not verified. Repaired, where it is published: taken out.
    OutboxStray,
    /// No record of a published session at its place, which the log still covers. Not repaired.
    RecordMissing,
    /// The record at a published session's place is another session's, or a record has another value than was promised.
    /// Not repaired.
    RecordMismatch,
    /// More than one record of one upload. Not repaired: records cannot be taken back. With `at_least_once` it may happen.
    RecordDuplicate,
    /// A record of an upload of ours whose session does not exist. Not repaired.
    RecordUnknown,
    /// A record of an upload that was never verified, or failed, and that is not proved. Not repaired.
    RecordUnpromised,
    /// Kafka holds the pointer of a session that is not published: the database is older than Kafka. Repaired: published.
    KafkaAhead,
    /// Kafka holds a later batch of a shard than the database knows. Repaired, once no record is left in doubt.
    MarkerAhead,
    /// A tenant's row is not what its sessions add up to. Repaired: counted again.
    Quota,
}

impl Kind {
    /// The kind in one sentence.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Corrupt => "rows that break the rules of their state",
            Self::ObjectMissing => "promised objects that S3 does not hold",
            Self::ObjectMismatch => "promised objects that S3 holds with another size, write token or checksum",
            Self::ObjectOrphan => "objects of failed uploads that nobody will remove; --fix has the sweeper remove them",
            Self::ObjectUnknown => "objects written through our URLs whose upload is not known; never removed by --fix",
            Self::UploadOrphan => "open multipart uploads of uploads that are over; --fix aborts them",
            Self::UploadUnknown => "open multipart uploads whose upload is not known; --fix aborts those older than 7 days",
            Self::Unpublished => "uploads verified for more than a minute that are not published",
            Self::OutboxMissing => "verified uploads that nothing would publish; --fix promises their pointers again",
            Self::OutboxStray => "pointers waiting to be sent whose upload is not verified; --fix drops those published",
            Self::RecordMissing => "published uploads without a record at their place in Kafka",
            Self::RecordMismatch => "records that are not what was promised",
            Self::RecordDuplicate => "second records of one upload",
            Self::RecordUnknown => "records of uploads that are not known",
            Self::RecordUnpromised => "records of uploads that are not verified, and that could not be proved",
            Self::KafkaAhead => "uploads that Kafka holds and that are not published here; --fix writes it down",
            Self::MarkerAhead => "shards of which Kafka knows more than the database; --fix lets them go on once all is settled",
            Self::Quota => "tenants whose quota is not what their uploads add up to; --fix counts again",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The name in JSON, so that whoever reads both finds the same word.
        self.serialize(f)
    }
}

/// One kind of disagreement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which.
    pub kind: Kind,
    /// The kind in one sentence.
    pub meaning: &'static str,
    /// How often.
    pub count: u64,
    /// How many bytes of uploads it is about.
    pub bytes: u64,
    /// How many of them were repaired.
    pub fixed: u64,
    /// The first of them.
    pub examples: Vec<String>,
}

/// The outcome of an audit.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Whether nothing was found.
    pub clean: bool,
    /// Sessions looked at.
    pub sessions: u64,
    /// Objects listed.
    pub objects: u64,
    /// Records read.
    pub records: u64,
    /// What was found, by kind.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The finding of a kind.
    pub fn finding(&self, kind: Kind) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.kind == kind)
    }
}

/// One disagreement.
pub(super) struct Told {
    pub(super) kind: Kind,
    pub(super) bytes: u64,
    pub(super) fixed: bool,
    pub(super) example: String,
}

/// The report while it is being made.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) sessions: u64,
    pub(super) objects: u64,
    pub(super) records: u64,
    /// Records of sessions that still wait and could not be written down: sending those would be a second time.
    pub(super) doubts: u64,
    findings: BTreeMap<Kind, Finding>,
}

impl Tally {
    pub(super) fn tell(&mut self, told: Told) {
        let kind = told.kind;
        let empty = || Finding { kind, meaning: kind.meaning(), count: 0, bytes: 0, fixed: 0, examples: Vec::new() };
        let finding = self.findings.entry(kind).or_insert_with(empty);
        finding.count += 1;
        finding.bytes = finding.bytes.saturating_add(told.bytes);
        finding.fixed += u64::from(told.fixed);
        if finding.examples.len() < EXAMPLES {
            finding.examples.push(told.example);
        }
    }

    /// Whether Kafka may hold what the database would send.
    pub(super) fn in_doubt(&self) -> bool {
        self.doubts > 0
    }

    pub(super) fn report(self) -> Report {
        Report {
            clean: self.findings.is_empty(),
            sessions: self.sessions,
            objects: self.objects,
            records: self.records,
            findings: self.findings.into_values().collect(),
        }
    }
}
