//! The queries and the few repairs of the audit.
//!
//! Results are read in pages, and each result comes from the snapshot of one statement. So a broker that works meanwhile cannot
//! make two correct results contradict each other.

use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::pool::{WORKER_TIMEOUT, with_timeout};
use super::{Error, Store};

/// How many rows a page has.
pub(crate) const PAGE_SIZE: i64 = 1000;

/// The state of a session, for comparison with Kafka's records.
#[derive(Debug, Clone)]
pub(crate) struct SessionStatus {
    pub(crate) id: Uuid,
    pub(crate) state: String,
    pub(crate) topic: String,
    pub(crate) size_bytes: i64,
    pub(crate) verified_at: Option<OffsetDateTime>,
    pub(crate) pointer: Option<String>,
    pub(crate) partition: Option<i32>,
    pub(crate) offset: Option<i64>,
    /// Whether its outbox row is claimed: a relay is sending it, or stopped before it recorded the outcome.
    pub(crate) is_claimed: bool,
}

/// The session that owns an object, for comparison with the objects in S3.
#[derive(Debug, Clone)]
pub(crate) struct ObjectOwner {
    pub(crate) id: Uuid,
    pub(crate) object_key: String,
    pub(crate) state: String,
    /// Whether the sweeper will still clean up its S3 objects.
    pub(crate) cleanup_due: bool,
}

/// A published session and the offset of its record.
#[derive(Debug, Clone)]
pub(crate) struct PublishedSession {
    pub(crate) id: Uuid,
    pub(crate) offset: i64,
    pub(crate) pointer: String,
    pub(crate) size_bytes: i64,
}

/// A verified session that should be published by now, or whose pointer is missing from the outbox.
#[derive(Debug, Clone)]
pub(crate) struct Stuck {
    pub(crate) id: Uuid,
    pub(crate) topic: String,
    pub(crate) size_bytes: i64,
    pub(crate) verified_at: OffsetDateTime,
    /// Whether the outbox has its pointer.
    pub(crate) is_in_outbox: bool,
    pub(crate) error: Option<String>,
}

/// A session that is not verified although its pointer is in the outbox.
#[derive(Debug, Clone)]
pub(crate) struct OrphanedOutboxRow {
    pub(crate) id: Uuid,
    pub(crate) state: String,
    pub(crate) size_bytes: i64,
}

/// A tenant whose stored quota usage differs from the sum over its sessions.
#[derive(Debug, Clone)]
pub(crate) struct QuotaMismatch {
    pub(crate) tenant: String,
    pub(crate) stored_sessions: i64,
    pub(crate) stored_bytes: i64,
    pub(crate) stored_held_bytes: i64,
    pub(crate) sessions: i64,
    pub(crate) bytes: i64,
    pub(crate) held_bytes: i64,
}

/// A record that the audit found in Kafka, with the verification results for its session.
#[derive(Debug, Clone)]
pub(crate) struct ObservedRecord {
    pub(crate) id: Uuid,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) at: OffsetDateTime,
    pub(crate) verified_at: OffsetDateTime,
    pub(crate) integrity: String,
    pub(crate) etag: Option<String>,
    pub(crate) version_id: Option<String>,
    pub(crate) pointer: String,
    pub(crate) sha256: Option<Vec<u8>>,
    /// Whether a failed session may become published: only a restored database can let a published session fail.
    pub(crate) may_have_failed: bool,
}

impl Store {
    /// All topics that may hold the broker's records: those of sessions in any state and those of policies. In a restored
    /// database, a failed session may have a record in Kafka.
    pub(crate) async fn topics_in_use(&self) -> Result<Vec<String>, Error> {
        // A loose index scan: it jumps from topic to topic in the index and does not read every row.
        let topics = query_scalar!(
            r#"with recursive tenant_topics as (
                   (select tenant, topic from upload_sessions order by tenant, topic limit 1)
                   union all
                   select next.tenant, next.topic from tenant_topics cross join lateral (
                       select s.tenant, s.topic from upload_sessions s
                       where (s.tenant, s.topic) > (tenant_topics.tenant, tenant_topics.topic)
                       order by s.tenant, s.topic limit 1) next)
               select topic as "topic!" from tenant_topics union select topic from topics order by 1"#
        );
        with_worker_timeout(topics.fetch_all(self.pool.worker_pool())).await
    }

    /// Published sessions of a partition by (offset, id), after `after` and before offset `before`; one page.
    pub(crate) async fn published_sessions(
        &self,
        (topic, partition): (&str, i32),
        after: (i64, Uuid),
        before: i64,
    ) -> Result<Vec<PublishedSession>, Error> {
        let rows = sqlx::query_as!(
            PublishedSession,
            r#"select id, published_offset as "offset!", pointer as "pointer!", size_bytes from upload_sessions
               where state = 'published' and topic = $1 and published_partition = $2
                 and (published_offset, id) > ($3, $4) and published_offset < $5
               order by published_offset, id limit $6"#,
            topic,
            partition,
            after.0,
            after.1,
            before,
            PAGE_SIZE
        );
        with_worker_timeout(rows.fetch_all(self.pool.worker_pool())).await
    }

    /// The states of these sessions.
    pub(crate) async fn session_statuses(&self, ids: &[Uuid]) -> Result<Vec<SessionStatus>, Error> {
        let rows = sqlx::query_as!(
            SessionStatus,
            r#"select s.id as "id!", s.state as "state!", s.topic as "topic!", s.size_bytes as "size_bytes!",
                      s.verified_at, s.pointer, s.published_partition as partition, s.published_offset as "offset",
                      coalesce(o.batch is not null, false) as "is_claimed!"
               from upload_sessions s left join outbox o on o.session_id = s.id where s.id = any($1)"#,
            ids
        );
        with_worker_timeout(rows.fetch_all(self.pool.worker_pool())).await
    }

    /// The sessions that own these objects.
    pub(crate) async fn object_owners(&self, bucket: &str, object_keys: &[String]) -> Result<Vec<ObjectOwner>, Error> {
        let rows = sqlx::query_as!(
            ObjectOwner,
            r#"select id, object_key, state, cleanup_due_at is not null as "cleanup_due!" from upload_sessions
               where object_key = any($2) and bucket = $1"#,
            bucket,
            object_keys
        );
        with_worker_timeout(rows.fetch_all(self.pool.worker_pool())).await
    }

    /// Sessions that were verified before `before`, or whose pointer is missing from the outbox; one page after `after`.
    pub(crate) async fn stuck(&self, before: OffsetDateTime, after: Uuid) -> Result<Vec<Stuck>, Error> {
        let rows = sqlx::query_as!(
            Stuck,
            r#"select s.id as "id!", s.topic as "topic!", s.size_bytes as "size_bytes!", s.verified_at as "verified_at!",
                      o.number is not null as "is_in_outbox!", o.error
               from upload_sessions s left join outbox o on o.session_id = s.id
               where s.state = 'verified' and s.id > $1 and (s.verified_at < $2 or o.number is null) order by s.id limit $3"#,
            after,
            before,
            PAGE_SIZE
        );
        with_worker_timeout(rows.fetch_all(self.pool.worker_pool())).await
    }

    /// Sessions that are not verified although their pointers are in the outbox; one page after `after`.
    pub(crate) async fn orphaned_outbox_rows(&self, after: Uuid) -> Result<Vec<OrphanedOutboxRow>, Error> {
        let rows = sqlx::query_as!(
            OrphanedOutboxRow,
            "select s.id, s.state, s.size_bytes from outbox o join upload_sessions s on s.id = o.session_id
             where s.state <> 'verified' and s.id > $1 order by s.id limit $2",
            after,
            PAGE_SIZE
        );
        with_worker_timeout(rows.fetch_all(self.pool.worker_pool())).await
    }

    /// Deletes a published session's pointer from the outbox: sending it would publish it twice.
    pub(crate) async fn delete_orphaned_outbox_row(&self, id: Uuid) -> Result<bool, Error> {
        let deleted = query!(
            "delete from outbox using upload_sessions s where s.id = outbox.session_id and s.id = $1 and s.state = 'published'",
            id
        );
        Ok(with_worker_timeout(deleted.execute(self.pool.worker_pool())).await?.rows_affected() == 1)
    }

    /// Tenants whose stored quota usage differs from the sum over their sessions.
    pub(crate) async fn quota_mismatches(&self) -> Result<Vec<QuotaMismatch>, Error> {
        let rows = sqlx::query_as!(
            QuotaMismatch,
            r#"select coalesce(t.tenant, counted.tenant) as "tenant!", coalesce(t.open_sessions, 0) as "stored_sessions!",
                      coalesce(t.reserved_bytes, 0) as "stored_bytes!", coalesce(t.held_bytes, 0) as "stored_held_bytes!",
                      coalesce(counted.sessions, 0) as "sessions!", coalesce(counted.bytes, 0) as "bytes!",
                      coalesce(counted.held_bytes, 0) as "held_bytes!"
               from tenants t full join (
                   select tenant, count(*) filter (where state in ('open', 'completing')) as sessions,
                          sum(size_bytes) filter (where state in ('open', 'completing'))::bigint as bytes,
                          sum(size_bytes) filter (where bytes_held_until is not null)::bigint as held_bytes
                   from upload_sessions
                   where state in ('open', 'completing') or bytes_held_until is not null
                   group by tenant) counted on counted.tenant = t.tenant
               where (coalesce(t.open_sessions, 0), coalesce(t.reserved_bytes, 0), coalesce(t.held_bytes, 0))
                     is distinct from (coalesce(counted.sessions, 0), coalesce(counted.bytes, 0), coalesce(counted.held_bytes, 0))
               order by 1"#
        );
        with_worker_timeout(rows.fetch_all(self.pool.worker_pool())).await
    }

    /// Sets every tenant's quota usage to the sum over its sessions. Returns how many rows were wrong.
    pub(crate) async fn recount_quotas(&self) -> Result<u64, Error> {
        with_timeout(WORKER_TIMEOUT, async {
            let mut tx = self.pool.worker_pool().begin().await?;
            // Calls that open or end a session wait for this lock and then change the corrected number. Without the lock, the sum
            // could be older than the row that it replaces.
            query!("lock table tenants in share row exclusive mode").execute(&mut *tx).await?;
            let recounted = query!(
                "insert into tenants (tenant, open_sessions, reserved_bytes, held_bytes)
                 select coalesce(t.tenant, counted.tenant), coalesce(counted.sessions, 0), coalesce(counted.bytes, 0),
                        coalesce(counted.held_bytes, 0)
                 from tenants t full join (
                     select tenant, count(*) filter (where state in ('open', 'completing')) as sessions,
                            sum(size_bytes) filter (where state in ('open', 'completing'))::bigint as bytes,
                            sum(size_bytes) filter (where bytes_held_until is not null)::bigint as held_bytes
                     from upload_sessions
                     where state in ('open', 'completing') or bytes_held_until is not null
                     group by tenant) counted on counted.tenant = t.tenant
                 where (coalesce(t.open_sessions, 0), coalesce(t.reserved_bytes, 0), coalesce(t.held_bytes, 0))
                       is distinct from (coalesce(counted.sessions, 0), coalesce(counted.bytes, 0), coalesce(counted.held_bytes, 0))
                 on conflict (tenant) do update set open_sessions = excluded.open_sessions,
                     reserved_bytes = excluded.reserved_bytes, held_bytes = excluded.held_bytes"
            );
            let wrong = recounted.execute(&mut *tx).await?.rows_affected();
            tx.commit().await?;
            Ok(wrong)
        })
        .await
    }

    /// The last batch number of a shard.
    pub(crate) async fn last_batch(&self, shard: i32) -> Result<i64, Error> {
        let last = query_scalar!("select last_batch from relay_shards where shard = $1", shard);
        Ok(last.fetch_optional(&self.pool).await?.unwrap_or(0))
    }

    /// The last batch number of each shard.
    pub(crate) async fn last_batches(&self) -> Result<Vec<(i32, i64)>, Error> {
        let rows = query!("select shard, last_batch from relay_shards order by shard").fetch_all(&self.pool).await?;
        Ok(rows.into_iter().map(|row| (row.shard, row.last_batch)).collect())
    }

    /// Raises a shard's last batch number to `batch`, which Kafka knows already. So the next batch gets a later number.
    pub(crate) async fn raise_last_batch(&self, shard: i32, batch: i64) -> Result<(), Error> {
        let raised = query!("update relay_shards set last_batch = greatest(last_batch, $2) where shard = $1", shard, batch);
        with_worker_timeout(raised.execute(self.pool.worker_pool())).await?;
        Ok(())
    }

    /// Marks a session published from its record in Kafka. `false`: the session is published already, or it failed and
    /// `may_have_failed` is not set.
    ///
    /// Verification results that the database lost are taken from the record. The pointer always comes from the record, because
    /// Kafka is the authority on what was published.
    pub(crate) async fn mark_published_from_record(&self, record: &ObservedRecord, now: OffsetDateTime) -> Result<bool, Error> {
        let is_published = query_scalar!(
            r#"with previous as (
                   select id, state in ('open', 'completing') as is_open, state, tenant, size_bytes,
                          bytes_held_until is not null as holds_bytes from upload_sessions
                   where id = $1 and (state in ('open', 'completing', 'verified')
                                      or $12 and state in ('aborted', 'expired', 'rejected')) for update),
               published as (
                   update upload_sessions s
                   set state = 'published', version = s.version + 1, updated_at = $2,
                       published_partition = $3, published_offset = $4, published_at = $5,
                       verified_at = coalesce(s.verified_at, $6), integrity = coalesce(s.integrity, $7),
                       object_version_id = coalesce(s.object_version_id, $8), pointer = $9,
                       checksum = coalesce(s.checksum, $10), object_etag = coalesce(s.object_etag, $11),
                       lease_owner = null, lease_until = null, must_read = false, cleanup_due_at = null, bytes_held_until = null,
                       error_code = null, error_detail = null, error_items = null
                   from previous where s.id = previous.id
                   returning s.id, s.version, previous.state, previous.is_open, previous.holds_bytes, previous.tenant,
                             previous.size_bytes),
               history as (
                   insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
                   select id, version, $2, state, 'published', 'Kafka holds its pointer', 'audit' from published),
               released_quota as (
                   update tenants t
                   set open_sessions = t.open_sessions - published.is_open::int,
                       reserved_bytes = t.reserved_bytes - published.is_open::int * published.size_bytes,
                       held_bytes = t.held_bytes - published.holds_bytes::int * published.size_bytes
                   from published where t.tenant = published.tenant and (published.is_open or published.holds_bytes)),
               deleted as (delete from outbox where session_id in (select id from published))
               select exists (select from published) as "is_published!""#,
            record.id,
            now,
            record.partition,
            record.offset,
            record.at,
            record.verified_at,
            record.integrity,
            record.version_id,
            record.pointer,
            record.sha256,
            record.etag,
            record.may_have_failed
        );
        with_worker_timeout(is_published.fetch_one(self.pool.worker_pool())).await
    }
}

/// Runs a query with the timeout of workers: it may take longer than a client waits.
async fn with_worker_timeout<T>(query: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Error> {
    with_timeout(WORKER_TIMEOUT, async { Ok(query.await?) }).await
}
