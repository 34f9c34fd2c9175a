//! What the audit asks of the database, and the few things that it repairs.
//!
//! Everything is asked in pages and answered from one statement's snapshot, so that a broker at work meanwhile cannot
//! make two true answers contradict each other.

use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::pool::{WORK_WITHIN, within};
use super::{Error, Store};

/// Rows a page.
pub(crate) const PAGE: i64 = 1000;

/// A session as Kafka's records are held against it.
#[derive(Debug, Clone)]
pub(crate) struct Standing {
    pub(crate) id: Uuid,
    pub(crate) state: String,
    pub(crate) topic: String,
    pub(crate) size_bytes: i64,
    pub(crate) verified_at: Option<OffsetDateTime>,
    pub(crate) pointer: Option<String>,
    pub(crate) partition: Option<i32>,
    pub(crate) offset: Option<i64>,
    /// The relay is sending it at this moment, or was when it stopped.
    pub(crate) is_stamped: bool,
}

/// A session as S3's objects are held against it.
#[derive(Debug, Clone)]
pub(crate) struct Owner {
    pub(crate) id: Uuid,
    pub(crate) object_key: String,
    pub(crate) state: String,
    /// The sweeper is still to come.
    pub(crate) cleanup_due: bool,
}

/// A published session by its place in Kafka.
#[derive(Debug, Clone)]
pub(crate) struct Published {
    pub(crate) id: Uuid,
    pub(crate) offset: i64,
    pub(crate) pointer: String,
    pub(crate) size_bytes: i64,
}

/// A verified session that should not be so any more.
#[derive(Debug, Clone)]
pub(crate) struct Stuck {
    pub(crate) id: Uuid,
    pub(crate) topic: String,
    pub(crate) size_bytes: i64,
    pub(crate) verified_at: OffsetDateTime,
    /// Whether the outbox has its pointer.
    pub(crate) waits: bool,
    pub(crate) error: Option<String>,
}

/// A pointer in the outbox whose session does not wait for it.
#[derive(Debug, Clone)]
pub(crate) struct Stray {
    pub(crate) id: Uuid,
    pub(crate) state: String,
    pub(crate) size_bytes: i64,
}

/// A tenant whose row is not what its sessions add up to.
#[derive(Debug, Clone)]
pub(crate) struct Miscount {
    pub(crate) tenant: String,
    pub(crate) told_sessions: i64,
    pub(crate) told_bytes: i64,
    pub(crate) told_held_bytes: i64,
    pub(crate) sessions: i64,
    pub(crate) bytes: i64,
    pub(crate) held_bytes: i64,
}

/// What a record in Kafka says about its session.
#[derive(Debug, Clone)]
pub(crate) struct Found {
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
    /// Whether a session that has failed is taken back: only an old database can have let a published one fail.
    pub(crate) may_have_failed: bool,
}

impl Store {
    /// Every topic that may hold records of ours: of sessions, whatever their state, and of policies. In a restored
    /// database a session may have failed whose record is in Kafka.
    pub(crate) async fn topics_in_use(&self) -> Result<Vec<String>, Error> {
        // From one tenant's topic to the next by the index, not through every row.
        let topics = query_scalar!(
            r#"with recursive named as (
                   (select tenant, topic from upload_sessions order by tenant, topic limit 1)
                   union all
                   select next.tenant, next.topic from named cross join lateral (
                       select s.tenant, s.topic from upload_sessions s
                       where (s.tenant, s.topic) > (named.tenant, named.topic) order by s.tenant, s.topic limit 1) next)
               select topic as "topic!" from named union select topic from topics order by 1"#
        );
        patient(topics.fetch_all(self.pool.unbounded())).await
    }

    /// Published sessions of a partition from one offset up to, without, another, after `after`.
    pub(crate) async fn published_between(
        &self,
        (topic, partition): (&str, i32),
        after: (i64, Uuid),
        before: i64,
    ) -> Result<Vec<Published>, Error> {
        let rows = sqlx::query_as!(
            Published,
            r#"select id, published_offset as "offset!", pointer as "pointer!", size_bytes from upload_sessions
               where state = 'published' and topic = $1 and published_partition = $2
                 and (published_offset, id) > ($3, $4) and published_offset < $5
               order by published_offset, id limit $6"#,
            topic,
            partition,
            after.0,
            after.1,
            before,
            PAGE
        );
        patient(rows.fetch_all(self.pool.unbounded())).await
    }

    /// Where these sessions stand.
    pub(crate) async fn standing(&self, ids: &[Uuid]) -> Result<Vec<Standing>, Error> {
        let rows = sqlx::query_as!(
            Standing,
            r#"select s.id as "id!", s.state as "state!", s.topic as "topic!", s.size_bytes as "size_bytes!",
                      s.verified_at, s.pointer, s.published_partition as partition, s.published_offset as "offset",
                      coalesce(o.batch is not null, false) as "is_stamped!"
               from upload_sessions s left join outbox o on o.session_id = s.id where s.id = any($1)"#,
            ids
        );
        patient(rows.fetch_all(self.pool.unbounded())).await
    }

    /// The sessions whose objects these are.
    pub(crate) async fn owners(&self, bucket: &str, object_keys: &[String]) -> Result<Vec<Owner>, Error> {
        let rows = sqlx::query_as!(
            Owner,
            r#"select id, object_key, state, cleanup_due_at is not null as "cleanup_due!" from upload_sessions
               where object_key = any($2) and bucket = $1"#,
            bucket,
            object_keys
        );
        patient(rows.fetch_all(self.pool.unbounded())).await
    }

    /// Verified sessions since before `before`, and those whose pointer is not in the outbox; a page after `after`.
    pub(crate) async fn stuck(&self, before: OffsetDateTime, after: Uuid) -> Result<Vec<Stuck>, Error> {
        let rows = sqlx::query_as!(
            Stuck,
            r#"select s.id as "id!", s.topic as "topic!", s.size_bytes as "size_bytes!", s.verified_at as "verified_at!",
                      o.number is not null as "waits!", o.error
               from upload_sessions s left join outbox o on o.session_id = s.id
               where s.state = 'verified' and s.id > $1 and (s.verified_at < $2 or o.number is null) order by s.id limit $3"#,
            after,
            before,
            PAGE
        );
        patient(rows.fetch_all(self.pool.unbounded())).await
    }

    /// Pointers in the outbox whose sessions are not verified; a page after `after`.
    pub(crate) async fn strays(&self, after: Uuid) -> Result<Vec<Stray>, Error> {
        let rows = sqlx::query_as!(
            Stray,
            "select s.id, s.state, s.size_bytes from outbox o join upload_sessions s on s.id = o.session_id
             where s.state <> 'verified' and s.id > $1 order by s.id limit $2",
            after,
            PAGE
        );
        patient(rows.fetch_all(self.pool.unbounded())).await
    }

    /// Takes a pointer out of the outbox whose session is published: sending it would be a second time.
    pub(crate) async fn forget_stray(&self, id: Uuid) -> Result<bool, Error> {
        let gone = query!(
            "delete from outbox using upload_sessions s where s.id = outbox.session_id and s.id = $1 and s.state = 'published'",
            id
        );
        Ok(patient(gone.execute(self.pool.unbounded())).await?.rows_affected() == 1)
    }

    /// Tenants whose rows differ from a count of their open and completing sessions.
    pub(crate) async fn miscounts(&self) -> Result<Vec<Miscount>, Error> {
        let rows = sqlx::query_as!(
            Miscount,
            r#"select coalesce(t.tenant, counted.tenant) as "tenant!", coalesce(t.open_sessions, 0) as "told_sessions!",
                      coalesce(t.reserved_bytes, 0) as "told_bytes!", coalesce(t.held_bytes, 0) as "told_held_bytes!",
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
        patient(rows.fetch_all(self.pool.unbounded())).await
    }

    /// Sets every tenant's row to what its sessions add up to; says how many were wrong.
    pub(crate) async fn recount(&self) -> Result<u64, Error> {
        within(WORK_WITHIN, async {
            let mut tx = self.pool.unbounded().begin().await?;
            // Who opens or ends a session meanwhile waits a moment, and then adds to the right number: without the lock the
            // count could be older than the row that it replaces.
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

    /// The last batch number that was stamped in a shard.
    pub(crate) async fn last_batch(&self, shard: i32) -> Result<i64, Error> {
        let last = query_scalar!("select last_batch from relay_shards where shard = $1", shard);
        Ok(last.fetch_optional(&self.pool).await?.unwrap_or(0))
    }

    /// The last batch number that was stamped in each shard.
    pub(crate) async fn last_batches(&self) -> Result<Vec<(i32, i64)>, Error> {
        let rows = query!("select shard, last_batch from relay_shards order by shard").fetch_all(&self.pool).await?;
        Ok(rows.into_iter().map(|row| (row.shard, row.last_batch)).collect())
    }

    /// Raises a shard's last batch number: Kafka knows of a later one, so a fresh stamp must be later still.
    pub(crate) async fn raise_batch(&self, shard: i32, batch: i64) -> Result<(), Error> {
        let raised = query!("update relay_shards set last_batch = greatest(last_batch, $2) where shard = $1", shard, batch);
        patient(raised.execute(self.pool.unbounded())).await?;
        Ok(())
    }

    /// Writes down that Kafka holds a session's pointer, whatever the session was waiting for; `false` when it is over.
    /// One that an old database let fail is over only where the database is current.
    ///
    /// What was proved and is not known any more is taken from the record, and the pointer always: Kafka is the authority
    /// on what was published.
    pub(crate) async fn adopt(&self, found: &Found, now: OffsetDateTime) -> Result<bool, Error> {
        let adopted = query_scalar!(
            r#"with was as (
                   select id, state in ('open', 'completing') as is_open, state, tenant, size_bytes,
                          bytes_held_until is not null as holds_bytes from upload_sessions
                   where id = $1 and (state in ('open', 'completing', 'verified')
                                      or $12 and state in ('aborted', 'expired', 'rejected')) for update),
               moved as (
                   update upload_sessions s
                   set state = 'published', version = s.version + 1, updated_at = $2,
                       published_partition = $3, published_offset = $4, published_at = $5,
                       verified_at = coalesce(s.verified_at, $6), integrity = coalesce(s.integrity, $7),
                       object_version_id = coalesce(s.object_version_id, $8), pointer = $9,
                       checksum = coalesce(s.checksum, $10), object_etag = coalesce(s.object_etag, $11),
                       lease_owner = null, lease_until = null, must_read = false, cleanup_due_at = null, bytes_held_until = null,
                       error_code = null, error_detail = null, error_items = null
                   from was where s.id = was.id
                   returning s.id, s.version, was.state, was.is_open, was.holds_bytes, was.tenant, was.size_bytes),
               told as (
                   insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
                   select id, version, $2, state, 'published', 'Kafka holds its pointer', 'audit' from moved),
               freed as (
                   update tenants t
                   set open_sessions = t.open_sessions - moved.is_open::int,
                       reserved_bytes = t.reserved_bytes - moved.is_open::int * moved.size_bytes,
                       held_bytes = t.held_bytes - moved.holds_bytes::int * moved.size_bytes
                   from moved where t.tenant = moved.tenant and (moved.is_open or moved.holds_bytes)),
               sent as (delete from outbox where session_id in (select id from moved))
               select exists (select from moved) as "adopted!""#,
            found.id,
            now,
            found.partition,
            found.offset,
            found.at,
            found.verified_at,
            found.integrity,
            found.version_id,
            found.pointer,
            found.sha256,
            found.etag,
            found.may_have_failed
        );
        patient(adopted.fetch_one(self.pool.unbounded())).await
    }
}

/// Bounds a question that may take longer than a client would wait for.
async fn patient<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Error> {
    within(WORK_WITHIN, async { Ok(work.await?) }).await
}
