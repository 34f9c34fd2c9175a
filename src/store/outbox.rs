//! The outbox: pointers that Kafka has not acknowledged, and the leases on its shards.

mod claim;

use sqlx::types::Json;
use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::pool::{WORKER_TIMEOUT, with_timeout};
use super::{Error, Store};
use crate::failpoint;
use crate::session::RecordMetadata;

pub(crate) use claim::{Claim, ClaimRequest};

/// A row of the outbox: a pointer that Kafka has not acknowledged.
#[derive(Debug, Clone)]
pub(crate) struct OutboxRow {
    pub(crate) session_id: Uuid,
    pub(crate) topic: String,
    pub(crate) partition: Option<i32>,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) attempts: i32,
    pub(crate) batch: Option<i64>,
}

/// A pointer that Kafka refused, with the error and the time of the next attempt.
#[derive(Debug)]
pub(crate) struct Deferred {
    pub(crate) session_id: Uuid,
    pub(crate) error: String,
    pub(crate) next_try_at: OffsetDateTime,
}

/// The sessions of a marker whose publication the database has not recorded.
#[derive(Debug)]
pub(crate) struct Unrecorded {
    pub(crate) verified: Vec<UnrecordedSession>,
    /// How many of the sessions are neither verified nor published, although Kafka holds their records.
    pub(crate) unfinished: i64,
}

/// A verified session whose pointer Kafka holds.
#[derive(Debug)]
pub(crate) struct UnrecordedSession {
    pub(crate) id: Uuid,
    pub(crate) topic: String,
    pub(crate) pointer: String,
}

/// The lease on one shard. It is valid until another owner takes the shard over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ShardLease {
    pub(crate) shard: i32,
    pub(crate) owner: Uuid,
    pub(crate) epoch: i64,
}

impl Store {
    /// Claimed rows of a shard whose outcome is not recorded: their relay stopped before, during or after sending them.
    pub(crate) async fn claimed(&self, shard: i32) -> Result<Vec<OutboxRow>, Error> {
        let rows = sqlx::query_as!(
            RawOutboxRow,
            r#"select session_id, topic, partition, key, value, headers as "headers: Json<Vec<(String, String)>>", attempts, batch
               from outbox where shard = $1 and batch is not null order by number"#,
            shard
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(OutboxRow::from).collect())
    }

    /// Releases the rows of these batches, except those in `published`, which Kafka holds. Their state in the database does not
    /// matter, because the database may have lost it again. Returns `false` if the lease was lost: then no row was released,
    /// because the rows may now belong to the next owner.
    pub(crate) async fn release_batch(
        &self,
        lease: ShardLease,
        batches: &[i64],
        published: &[RecordMetadata],
    ) -> Result<bool, Error> {
        let published_ids: Vec<Uuid> = published.iter().map(|published| published.upload_id).collect();
        let released = query!(
            "with lease as (select shard from relay_shards where shard = $1 and owner = $2 and epoch = $3),
                  released as (update outbox set batch = null
                               where shard = (select shard from lease) and batch = any($4) and session_id <> all($5))
             select exists (select from lease) as \"is_leased!\"",
            lease.shard,
            lease.owner,
            lease.epoch,
            batches,
            &published_ids
        );
        Ok(released.fetch_one(&self.pool).await?.is_leased)
    }

    /// Defers rows of a batch that Kafka refused. Later rows of the same topic and key wait with them. A row with another batch
    /// number is not changed, because another owner has recorded its outcome. No row is changed after the lease was lost: a
    /// database that lost commits gives the next owner the same batch and row numbers again.
    pub(crate) async fn defer(
        &self,
        lease: ShardLease,
        batch: i64,
        deferred: &[Deferred],
        now: OffsetDateTime,
    ) -> Result<(), Error> {
        let ids: Vec<Uuid> = deferred.iter().map(|deferred| deferred.session_id).collect();
        let errors: Vec<String> = deferred.iter().map(|deferred| deferred.error.clone()).collect();
        let times: Vec<OffsetDateTime> = deferred.iter().map(|deferred| deferred.next_try_at).collect();
        query!(
            "with refused as (
                 select * from unnest($1::uuid[], $2::text[], $3::timestamptz[]) as r(session_id, error, next_try_at)),
             deferred as (
                 update outbox set batch = null, error = refused.error, next_try_at = refused.next_try_at
                 from refused, relay_shards lease
                 where outbox.session_id = refused.session_id and outbox.batch = $4
                   and lease.shard = $6 and lease.owner = $7 and lease.epoch = $8
                 returning outbox.session_id, outbox.error)
             update upload_sessions session
             set error_code = 'dependency-unavailable', error_detail = deferred.error, version = version + 1, updated_at = $5
             from deferred
             where session.id = deferred.session_id and session.state = 'verified'
               and session.error_detail is distinct from deferred.error",
            &ids,
            &errors,
            &times,
            batch,
            now,
            lease.shard,
            lease.owner,
            lease.epoch
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Stores on waiting sessions of a shard why the shard publishes nothing. It changes at most 500 sessions without an error,
    /// whose outbox rows follow number `after`, and returns their ids and the last number. Their rows are not deferred: they
    /// are sent as soon as the shard continues.
    pub(crate) async fn write_stall_reason(
        &self,
        shard: i32,
        reason: &str,
        after: i64,
        now: OffsetDateTime,
    ) -> Result<(Vec<Uuid>, i64), Error> {
        let updated = query!(
            r#"with waiting as (
                   select number, session_id from outbox
                   where shard = $1 and batch is null and error is null and number > $4 order by number limit 500),
               updated as (
                   update upload_sessions session
                   set error_code = 'dependency-unavailable', error_detail = $2, version = version + 1, updated_at = $3
                   from waiting
                   where session.id = waiting.session_id and session.state = 'verified' and session.error_code is null
                   returning session.id)
               select coalesce((select max(number) from waiting), $4) as "last!", array(select id from updated) as "ids!""#,
            shard,
            reason,
            now,
            after
        );
        let updated = with_timeout(WORKER_TIMEOUT, async { Ok(updated.fetch_one(self.pool.worker_pool()).await?) }).await?;
        Ok((updated.ids, updated.last))
    }

    /// Marks sessions published whose records Kafka holds. Returns how many of them are published now. A repeated call changes
    /// nothing.
    ///
    /// The number is smaller when the database has lost a session, or lost that it was verified. All their outbox rows are
    /// deleted: Kafka holds the records, so none may be sent again.
    pub(crate) async fn mark_published(&self, published: &[RecordMetadata], now: OffsetDateTime) -> Result<usize, Error> {
        let ids: Vec<Uuid> = published.iter().map(|published| published.upload_id).collect();
        let partitions: Vec<i32> = published.iter().map(|published| published.partition).collect();
        let offsets: Vec<i64> = published.iter().map(|published| published.offset).collect();
        let times: Vec<OffsetDateTime> = published.iter().map(RecordMetadata::timestamp).collect();
        let count = with_timeout(WORKER_TIMEOUT, async {
            let mut connection = self.pool.worker_pool().acquire().await?;
            let marking = query_scalar!(
                r#"with kafka_record as (
                     select * from unnest($1::uuid[], $2::int[], $3::bigint[], $4::timestamptz[]) as p(id, partition, number, at)),
                 published as (
                     update upload_sessions session
                     set state = 'published', version = version + 1, updated_at = $5, error_code = null, error_detail = null,
                         published_partition = kafka_record.partition, published_offset = kafka_record.number,
                         published_at = kafka_record.at
                     from kafka_record where session.id = kafka_record.id and session.state = 'verified'
                     returning session.id, session.version),
                 history as (
                     insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
                     select id, version, $5, 'verified', 'published', 'Kafka acknowledged the pointer', 'relay' from published),
                 deleted as (delete from outbox where session_id = any($1))
                 select (select count(*) from published) + (
                     select count(*) from upload_sessions where id = any($1) and state = 'published') as "count!""#,
                &ids,
                &partitions,
                &offsets,
                &times,
                now
            );
            let count = marking.fetch_one(&mut *connection).await?;
            connection.release();
            Ok(usize::try_from(count).unwrap_or_default())
        })
        .await?;
        failpoint::reach("relay.marked").await?;
        Ok(count)
    }

    /// Which of these sessions are not marked published. They need not have outbox rows.
    pub(crate) async fn unrecorded(&self, published: &[Uuid]) -> Result<Unrecorded, Error> {
        let rows = query!(
            "select id, topic, pointer, state = 'verified' as \"is_verified!\" from upload_sessions
             where id = any($1) and state <> 'published'",
            published
        )
        .fetch_all(&self.pool)
        .await?;
        let mut unrecorded = Unrecorded { verified: Vec::new(), unfinished: 0 };
        for row in rows {
            match row.pointer {
                Some(pointer) if row.is_verified => {
                    unrecorded.verified.push(UnrecordedSession { id: row.id, topic: row.topic, pointer });
                }
                _ => unrecorded.unfinished += 1,
            }
        }
        Ok(unrecorded)
    }

    /// How many of these sessions are neither verified nor published in the database, although Kafka holds their records.
    pub(crate) async fn count_unverified(&self, published: &[Uuid]) -> Result<i64, Error> {
        let count = query_scalar!(
            r#"select count(*) as "count!" from upload_sessions where id = any($1) and state not in ('verified', 'published')"#,
            published
        );
        Ok(count.fetch_one(&self.pool).await?)
    }

    /// All published records in order of topic, partition and offset: the embedded Kafka is reloaded from them.
    #[cfg(feature = "dev")]
    pub(crate) async fn published_records(&self) -> Result<Vec<(RecordMetadata, OutboxRow)>, Error> {
        let rows = query!(
            r#"select id, topic, record_key, pointer as "pointer!", record_headers as "headers: Json<Vec<(String, String)>>", integrity as "integrity!",
                      object_version_id, traceparent,
                      published_partition as "partition!", published_offset as "offset!", published_at as "at!"
               from upload_sessions where state = 'published' order by topic, published_partition, published_offset"#
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| {
                let headers = super::sessions::record_headers(
                    row.id,
                    &row.integrity,
                    row.object_version_id,
                    row.traceparent,
                    row.headers.0,
                );
                let metadata = RecordMetadata::new(row.id, row.partition, row.offset, row.at);
                let outbox_row = OutboxRow {
                    session_id: row.id,
                    topic: row.topic,
                    partition: Some(row.partition),
                    key: row.record_key,
                    value: row.pointer,
                    headers,
                    attempts: 1,
                    batch: None,
                };
                (metadata, outbox_row)
            })
            .collect())
    }
}

/// An [`OutboxRow`] as the columns have it, with its headers in JSON.
struct RawOutboxRow {
    session_id: Uuid,
    topic: String,
    partition: Option<i32>,
    key: Option<Vec<u8>>,
    value: String,
    headers: Json<Vec<(String, String)>>,
    attempts: i32,
    batch: Option<i64>,
}

impl From<RawOutboxRow> for OutboxRow {
    fn from(row: RawOutboxRow) -> Self {
        Self {
            session_id: row.session_id,
            topic: row.topic,
            partition: row.partition,
            key: row.key,
            value: row.value,
            headers: row.headers.0,
            attempts: row.attempts,
            batch: row.batch,
        }
    }
}
