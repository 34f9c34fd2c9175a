//! Sessions: opened once, moved under their version, read in many ways.

mod row;

use lfs_broker_client::api::UploadState;
use lfs_broker_client::checksum::Sha256;
use sqlx::types::Json;
use sqlx::{PgConnection, query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

pub(super) use row::record_headers;
use row::{Columns, Row};

use super::{Error, Store};
use crate::session::{Session, State, ordering, shard};

/// How much a tenant may hold at once; 0 is no limit.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    /// `LFS_BROKER_TENANT_OPEN_SESSIONS`: sessions that are open or completing.
    pub open_sessions: i64,
    /// `LFS_BROKER_TENANT_RESERVED_BYTES`: their promised sizes in bytes.
    pub reserved_bytes: i64,
}

impl Default for Quota {
    fn default() -> Self {
        Self { open_sessions: 100_000, reserved_bytes: 100 << 40 }
    }
}

/// What came of opening a session.
#[derive(Debug, PartialEq)]
pub(crate) enum Created {
    New,
    /// The idempotency key was taken meanwhile.
    KeyTaken,
    TooManySessions,
    TooManyBytes,
}

/// A session's move: where it came from, why, and who moved it.
pub(crate) struct Move<'a> {
    pub(crate) from: UploadState,
    pub(crate) to: &'a Session,
    pub(crate) reason: &'a str,
    pub(crate) by: &'a str,
    pub(crate) now: OffsetDateTime,
}

/// A transition as it is remembered.
pub(crate) struct Transition {
    pub(crate) at: OffsetDateTime,
    pub(crate) from_state: Option<String>,
    pub(crate) to_state: String,
    pub(crate) reason: String,
    pub(crate) by: String,
}

/// Which sessions a list shows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// `None`: every tenant, for administrators.
    pub(crate) tenant: Option<String>,
    pub(crate) topic: Option<String>,
    /// Topics the caller may see: exact names and prefixes. `None`: all.
    pub(crate) topics: Option<(Vec<String>, Vec<String>)>,
    pub(crate) states: Vec<String>,
    pub(crate) key_prefix: Option<Vec<u8>>,
    pub(crate) created_after: Option<OffsetDateTime>,
    pub(crate) created_before: Option<OffsetDateTime>,
}

/// Where a page begins: after this session, going back in time.
pub(crate) type Page = Option<(OffsetDateTime, Uuid)>;

impl Store {
    /// Opens a session: its row, its part hashes, its idempotency key and its share of the quota, or nothing.
    pub(crate) async fn create(
        &self,
        session: &Session,
        part_hashes: &[Sha256],
        idempotency: Option<(&str, &[u8])>,
        quota: Quota,
    ) -> Result<Created, Error> {
        let mut tx = self.pool.begin().await?;
        insert(&mut tx, session).await?;
        insert_parts(&mut tx, session.id, &number(part_hashes)).await?;
        if let Some((key, request_sha256)) = idempotency {
            let taken = query!(
                "insert into idempotency_keys (tenant, subject, key, request_sha256, session_id, created_at)
                 values ($1, $2, $3, $4, $5, $6) on conflict do nothing",
                session.tenant,
                session.subject,
                key,
                request_sha256,
                session.id,
                session.created_at
            )
            .execute(&mut *tx)
            .await?;
            if taken.rows_affected() == 0 {
                return Ok(Created::KeyTaken);
            }
        }
        // Last, because every open of one tenant waits for this row.
        let held = query!(
            "insert into tenants (tenant, open_sessions, reserved_bytes) values ($1, 1, $2)
             on conflict (tenant) do update set open_sessions = tenants.open_sessions + 1,
                 reserved_bytes = tenants.reserved_bytes + excluded.reserved_bytes
             returning open_sessions, reserved_bytes",
            session.tenant,
            size(session)
        )
        .fetch_one(&mut *tx)
        .await?;
        if quota.open_sessions > 0 && held.open_sessions > quota.open_sessions {
            return Ok(Created::TooManySessions);
        }
        if quota.reserved_bytes > 0 && held.reserved_bytes > quota.reserved_bytes {
            return Ok(Created::TooManyBytes);
        }
        tx.commit().await?;
        Ok(Created::New)
    }

    /// The session that an idempotency key opened, and the digest of the request that did.
    pub(crate) async fn idempotent(&self, tenant: &str, subject: &str, key: &str) -> Result<Option<(Uuid, Vec<u8>)>, Error> {
        let row = query!(
            "select session_id, request_sha256 from idempotency_keys where tenant = $1 and subject = $2 and key = $3",
            tenant,
            subject,
            key
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|row| (row.session_id, row.request_sha256)))
    }

    /// A session.
    pub(crate) async fn session(&self, id: Uuid) -> Result<Option<Session>, Error> {
        let row = sqlx::query_as!(Row, "select * from upload_sessions where id = $1", id).fetch_optional(&self.pool).await?;
        row.map(Session::try_from).transpose()
    }

    /// The session whose object this is.
    pub(crate) async fn session_of_object(&self, bucket: &str, object_key: &str) -> Result<Option<Session>, Error> {
        let row = sqlx::query_as!(Row, "select * from upload_sessions where object_key = $1 and bucket = $2", object_key, bucket)
            .fetch_optional(&self.pool)
            .await?;
        row.map(Session::try_from).transpose()
    }

    /// Writes a session's new state, if nobody moved it first.
    ///
    /// One transaction: the session, its history, the tenant's quota where it leaves {open, completing}, and where
    /// it becomes verified its outbox row. That row's number is drawn under a lock on topic and key, so that
    /// numbers of one key are in the order of commit.
    pub(crate) async fn save(&self, step: &Move<'_>, shards: i32) -> Result<Session, Error> {
        let session = step.to;
        let mut tx = self.pool.begin().await?;
        let key = session.promise.key.as_deref();
        if let (State::Verified(_), Some(ordering)) = (&session.state, ordering(&session.promise.topic, key)) {
            query!("select pg_advisory_xact_lock($1)", ordering).execute(&mut *tx).await?;
        }
        let row = update(&mut tx, step).await?.ok_or(Error::Moved(session.id))?;
        remember(&mut tx, step, row.version).await?;
        let held = |state| matches!(state, UploadState::Open | UploadState::Completing);
        if held(step.from) && !held(session.state.name()) {
            query!(
                "update tenants set open_sessions = open_sessions - 1, reserved_bytes = reserved_bytes - $2 where tenant = $1",
                session.tenant,
                size(session)
            )
            .execute(&mut *tx)
            .await?;
        }
        if let State::Verified(_) = &session.state {
            promise_pointer(&mut tx, session, shards, step.now).await?;
        }
        tx.commit().await?;
        Session::try_from(row)
    }

    /// Renews the lease on a session that is being completed. `false`: somebody took it over.
    pub(crate) async fn renew_lease(&self, id: Uuid, owner: Uuid, attempt: i32, until: OffsetDateTime) -> Result<bool, Error> {
        let renewed = query!(
            "update upload_sessions set lease_until = $4
             where id = $1 and state = 'completing' and lease_owner = $2 and lease_attempt = $3",
            id,
            owner,
            attempt,
            until
        )
        .execute(&self.pool)
        .await?;
        Ok(renewed.rows_affected() == 1)
    }

    /// Gives a lease back with what went wrong (a code and words); workers leave it alone until `until`.
    pub(crate) async fn release_lease(
        &self,
        id: Uuid,
        owner: Uuid,
        attempt: i32,
        trouble: (&str, &str),
        now: OffsetDateTime,
        until: OffsetDateTime,
    ) -> Result<(), Error> {
        query!(
            "update upload_sessions set lease_until = $5, error_code = $6, error_detail = $7, version = version + 1, updated_at = $4
             where id = $1 and state = 'completing' and lease_owner = $2 and lease_attempt = $3",
            id,
            owner,
            attempt,
            now,
            until,
            trouble.0,
            trouble.1
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Remembers the multipart upload made for an open session. `false`: another was first, abort this one.
    pub(crate) async fn set_s3_upload(&self, id: Uuid, s3_upload_id: &str) -> Result<bool, Error> {
        let set = query!(
            "update upload_sessions set s3_upload_id = $2 where id = $1 and s3_upload_id is null and state = 'open'",
            id,
            s3_upload_id
        )
        .execute(&self.pool)
        .await?;
        Ok(set.rows_affected() == 1)
    }

    /// Forgets a multipart upload that S3 no longer knows.
    pub(crate) async fn forget_s3_upload(&self, id: Uuid, s3_upload_id: &str) -> Result<(), Error> {
        query!("update upload_sessions set s3_upload_id = null where id = $1 and s3_upload_id = $2", id, s3_upload_id)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Slides an open session's end. Gives the end that holds now; `None` when it is not open any more.
    pub(crate) async fn slide(&self, id: Uuid, expires_at: OffsetDateTime) -> Result<Option<OffsetDateTime>, Error> {
        let expires_at = query_scalar!(
            "update upload_sessions set expires_at = least(greatest(expires_at, $2), expires_latest_at)
             where id = $1 and state = 'open' returning expires_at",
            id,
            expires_at
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(expires_at)
    }

    /// Promises hashes of parts; a promise that stands already stays. Gives all that stand for these numbers.
    pub(crate) async fn promise_parts(&self, id: Uuid, parts: &[(u32, Sha256)]) -> Result<Vec<(u32, Sha256)>, Error> {
        let mut connection = self.pool.acquire().await?;
        insert_parts(&mut connection, id, parts).await?;
        drop(connection);
        let numbers: Vec<u32> = parts.iter().map(|(number, _)| *number).collect();
        let standing = self.part_hashes(id).await?;
        Ok(standing.into_iter().filter(|(number, _)| numbers.contains(number)).collect())
    }

    /// The promised hashes of a session's parts, in order.
    pub(crate) async fn part_hashes(&self, id: Uuid) -> Result<Vec<(u32, Sha256)>, Error> {
        let rows = query!("select part_number, sha256 from upload_parts where session_id = $1 order by part_number", id)
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter()
            .map(|row| {
                let sha256 =
                    row.sha256.try_into().map_err(|_| Error::Corrupt { id, what: "a part's hash has not 32 bytes".into() })?;
                Ok((row.part_number.unsigned_abs(), Sha256(sha256)))
            })
            .collect()
    }

    /// Every transition of a session, oldest first.
    pub(crate) async fn history(&self, id: Uuid) -> Result<Vec<Transition>, Error> {
        let rows = sqlx::query_as!(
            Transition,
            "select at, from_state, to_state, reason, by from upload_history where session_id = $1 order by version",
            id
        );
        Ok(rows.fetch_all(&self.pool).await?)
    }

    /// Sessions, newest first.
    pub(crate) async fn list(&self, filter: &Filter, page: Page, limit: i64) -> Result<Vec<Session>, Error> {
        let (page_at, page_id) = page.unzip();
        let (names, prefixes) = filter.topics.clone().unzip();
        let rows = sqlx::query_as!(
            Row,
            "select * from upload_sessions
             where ($1::text is null or tenant = $1)
               and ($2::text is null or topic = $2)
               and (cardinality($3::text[]) = 0 or state = any($3))
               and ($4::bytea is null or substring(record_key from 1 for octet_length($4)) = $4)
               and ($5::timestamptz is null or created_at >= $5)
               and ($6::timestamptz is null or created_at < $6)
               and ($7::timestamptz is null or (created_at, id) < ($7, $8::uuid))
               and ($9::text[] is null or topic = any($9) or exists (select from unnest($10::text[]) as p where starts_with(topic, p)))
             order by created_at desc, id desc limit $11",
            filter.tenant,
            filter.topic,
            &filter.states,
            filter.key_prefix,
            filter.created_after,
            filter.created_before,
            page_at,
            page_id,
            names.as_deref(),
            prefixes.as_deref(),
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Session::try_from).collect()
    }

    /// Open sessions whose time is over.
    pub(crate) async fn overdue(&self, now: OffsetDateTime, limit: i64) -> Result<Vec<Session>, Error> {
        let rows = sqlx::query_as!(
            Row,
            "select * from upload_sessions where state = 'open' and expires_at <= $1 order by expires_at limit $2",
            now,
            limit
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Session::try_from).collect()
    }

    /// Completing sessions that nobody works on: a lease ran out, or bytes wait to be read.
    pub(crate) async fn unattended(&self, now: OffsetDateTime, limit: i64) -> Result<Vec<Session>, Error> {
        let rows = sqlx::query_as!(
            Row,
            "select * from upload_sessions where state = 'completing' and lease_until <= $1 order by lease_until limit $2",
            now,
            limit
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Session::try_from).collect()
    }

    /// Failed sessions whose traces in S3 are due to be removed.
    pub(crate) async fn cleanup_due(&self, now: OffsetDateTime, limit: i64) -> Result<Vec<Session>, Error> {
        let rows = sqlx::query_as!(
            Row,
            "select * from upload_sessions where cleanup_due_at <= $1 order by cleanup_due_at limit $2",
            now,
            limit
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(Session::try_from).collect()
    }

    /// Says when a failed session's traces are due again; `None`: they are gone for good.
    pub(crate) async fn set_cleanup(&self, id: Uuid, due_at: Option<OffsetDateTime>) -> Result<(), Error> {
        query!(
            "update upload_sessions set cleanup_due_at = $2 where id = $1 and state in ('aborted', 'expired', 'rejected')",
            id,
            due_at
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Forgets idempotency keys of sessions that have been final since before `before`.
    pub(crate) async fn forget_keys(&self, before: OffsetDateTime, limit: i64) -> Result<u64, Error> {
        let gone = query!(
            "delete from idempotency_keys where (tenant, subject, key) in (
                 select k.tenant, k.subject, k.key from idempotency_keys k join upload_sessions s on s.id = k.session_id
                 where s.state in ('published', 'aborted', 'expired', 'rejected') and s.updated_at < $1 limit $2)",
            before,
            limit
        )
        .execute(&self.pool)
        .await?;
        Ok(gone.rows_affected())
    }
}

fn size(session: &Session) -> i64 {
    i64::try_from(session.promise.size_bytes).expect("a policy allows 5 TiB at most")
}

fn number(hashes: &[Sha256]) -> Vec<(u32, Sha256)> {
    (1..).zip(hashes.iter().copied()).collect()
}

async fn insert_parts(connection: &mut PgConnection, id: Uuid, parts: &[(u32, Sha256)]) -> Result<(), Error> {
    if parts.is_empty() {
        return Ok(());
    }
    let numbers: Vec<i32> = parts.iter().map(|(number, _)| i32::try_from(*number).expect("at most 10,000")).collect();
    let hashes: Vec<Vec<u8>> = parts.iter().map(|(_, sha256)| sha256.0.to_vec()).collect();
    query!(
        "insert into upload_parts (session_id, part_number, sha256)
         select $1, number, sha256 from unnest($2::int[], $3::bytea[]) as p(number, sha256) on conflict do nothing",
        id,
        &numbers,
        &hashes
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn insert(tx: &mut PgConnection, session: &Session) -> Result<(), Error> {
    let promise = &session.promise;
    let (mode, part_bytes, parts, hashes) = row::layout_columns(promise.layout);
    query!(
        "with told as (
             insert into upload_history (session_id, version, at, to_state, reason, by)
             values ($1, 1, $4, 'open', 'opened', 'client:' || $3))
         insert into upload_sessions (
             id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at,
             topic, record_key, record_partition, record_headers, traceparent, content_type, filename,
             size_bytes, checksum_alg, checksum, min_integrity, bucket, object_key, kms_key_id,
             mode, part_size_bytes, part_count, part_hashes, url_seconds, session_seconds)
         values ($1, $2, $3, 'open', $4, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20,
                 $21, $22, $23, $24, $25, $26)",
        session.id,
        session.tenant,
        session.subject,
        session.created_at,
        session.expires_at,
        session.expires_latest_at,
        promise.topic,
        promise.key,
        promise.partition,
        Json(&promise.headers) as _,
        promise.traceparent,
        promise.content_type,
        promise.filename,
        size(session),
        promise.algorithm.name(),
        promise.digest.as_ref().map(|digest| digest.value.as_slice()),
        promise.min_integrity.name(),
        session.bucket,
        session.object_key,
        promise.kms_key_id,
        mode,
        part_bytes,
        parts,
        hashes,
        row::int(promise.url_seconds),
        row::int(promise.session_seconds),
    )
    .execute(tx)
    .await?;
    Ok(())
}

async fn update(tx: &mut PgConnection, step: &Move<'_>) -> Result<Option<Row>, Error> {
    let session = step.to;
    let c = Columns::of(session, step.now);
    let row = sqlx::query_as!(
        Row,
        "update upload_sessions set version = version + 1, updated_at = $4, state = $3,
             checksum = $5, traceparent = $6, lease_owner = $7, lease_until = $8, lease_attempt = $9, must_read = $10,
             verified_at = $11, integrity = $12, object_etag = $13, object_version_id = $14, pointer = $15,
             error_code = $16, error_detail = $17, error_items = $18, cleanup_due_at = $19
         where id = $1 and version = $2 and state = $20 returning *",
        session.id,
        session.version,
        session.state.name().name(),
        step.now,
        c.checksum,
        session.promise.traceparent,
        c.lease_owner,
        c.lease_until,
        c.lease_attempt,
        c.must_read,
        c.verified_at,
        c.integrity,
        c.etag,
        c.version_id,
        c.pointer,
        c.error_code,
        c.error_detail,
        c.error_items as _,
        c.cleanup_due_at,
        step.from.name()
    )
    .fetch_optional(tx)
    .await?;
    Ok(row)
}

async fn remember(tx: &mut PgConnection, step: &Move<'_>, version: i64) -> Result<(), Error> {
    query!(
        "insert into upload_history (session_id, version, at, from_state, to_state, reason, by) values ($1, $2, $3, $4, $5, $6, $7)",
        step.to.id,
        version,
        step.now,
        step.from.name(),
        step.to.state.name().name(),
        step.reason,
        step.by
    )
    .execute(tx)
    .await?;
    Ok(())
}

async fn promise_pointer(tx: &mut PgConnection, session: &Session, shards: i32, now: OffsetDateTime) -> Result<(), Error> {
    let State::Verified(proof) = &session.state else { return Ok(()) };
    let promise = &session.promise;
    let headers = record_headers(
        session.id,
        proof.integrity.name(),
        proof.version_id.clone(),
        promise.traceparent.clone(),
        promise.headers.clone(),
    );
    query!(
        "insert into outbox (session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9)",
        session.id,
        shard(&promise.topic, promise.key.as_deref(), session.id, shards),
        promise.topic,
        ordering(&promise.topic, promise.key.as_deref()),
        promise.partition,
        promise.key,
        proof.pointer,
        Json(headers) as _,
        now
    )
    .execute(tx)
    .await?;
    Ok(())
}
