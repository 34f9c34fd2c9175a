//! Why a shard cannot be published.

use crate::{kafka, store};

/// Why a shard cannot be published now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Store(#[from] store::Error),
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
    #[error("another relay has taken over the shard")]
    ShardLost,
    /// Sending could publish pointers twice: Kafka has records that the database does not know.
    #[error(
        "kafka holds batch {marker} of shard {shard}, but the last batch in the database is {last_batch}: the database was \
         restored from a backup; nothing of this shard is published until `lfs-broker audit --fix` has reconciled them"
    )]
    KafkaAhead { shard: i32, marker: i64, last_batch: i64 },
    /// Like `KafkaAhead`, but the batch numbers are equal.
    #[error(
        "kafka holds {unfinished} pointers of batch {batch} of shard {shard} whose uploads are unfinished in the database: the \
         database was restored from a backup; nothing of this shard is published until `lfs-broker audit --fix` has \
         reconciled them"
    )]
    UnfinishedInDatabase { shard: i32, batch: i64, unfinished: i64 },
    /// The shard is not as this relay left it, so no batch was claimed.
    #[error(
        "the last batch of shard {shard} is {found}{} in the database, but {known} in this relay, which left no row claimed: \
         PostgreSQL lost commits (a restore, a failover), or another program wrote to it",
        if *has_claimed_rows { " and has claimed rows" } else { "" }
    )]
    ShardChanged { shard: i32, known: i64, found: i64, has_claimed_rows: bool },
    /// Kafka holds records of sessions that are no longer verified in the database.
    #[error(
        "kafka holds {published} pointers of batch {batch} of shard {shard}, but the database recorded {written} of them: \
         PostgreSQL lost commits (a restore, a failover)"
    )]
    PublishedNotRecorded { shard: i32, batch: i64, published: usize, written: usize },
}
