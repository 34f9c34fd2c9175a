//! Sessions: creating them, saving their state changes under optimistic locking, and reading them.

mod create;
mod list;
mod row;
mod scan;
mod verify;
mod write;

use lfs_broker_client::api::{ErrorCode, UploadState};
use lfs_broker_client::checksum::Sha256;
use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

pub(crate) use create::{NewSession, StoredPolicy};
pub(crate) use list::SessionPage;
#[cfg(feature = "dev")]
pub(super) use row::record_headers;
use row::{Row, session_rows};
pub(crate) use verify::VerifiedPut;
pub(super) use write::compact_history;

use super::pool::{WORKER_TIMEOUT, with_timeout};
use super::{Error, Store};
use crate::failpoint;
use crate::session::Session;

/// The limits of one tenant; 0 means no limit.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    /// `LFS_BROKER_TENANT_OPEN_SESSIONS`: how many sessions may be open or completing.
    pub open_sessions: i64,
    /// `LFS_BROKER_TENANT_RESERVED_BYTES`: the sum of their declared sizes in bytes.
    pub reserved_bytes: i64,
}

impl Default for Quota {
    fn default() -> Self {
        Self { open_sessions: 100_000, reserved_bytes: 100 << 40 }
    }
}

/// The outcome of [`Store::create`].
#[derive(Debug, PartialEq)]
pub(crate) enum CreateOutcome {
    Created,
    /// Another request has stored the same idempotency key.
    KeyExists,
    /// Another request is storing the same idempotency key, and held its lock until `lock_timeout`.
    KeyInFlight,
    /// The stored policy of the topic is not the one that allowed the session.
    PolicyChanged,
    TooManySessions,
    TooManyBytes,
}

/// A state change of a session: its previous state, the new session, the reason and the actor.
pub(crate) struct Transition<'a> {
    pub(crate) from: UploadState,
    pub(crate) to: &'a Session,
    pub(crate) reason: &'a str,
    pub(crate) by: &'a str,
    pub(crate) now: OffsetDateTime,
}

/// A row of `upload_history`: one saved state change.
pub(crate) struct HistoryEntry {
    pub(crate) version: i64,
    pub(crate) at: OffsetDateTime,
    pub(crate) from_state: Option<String>,
    pub(crate) to_state: String,
    pub(crate) reason: String,
    pub(crate) by: String,
}

/// Which sessions a list contains.
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

/// Where a page begins: after this session, newest first. `None`: at the newest session.
pub(crate) type Cursor = Option<(OffsetDateTime, Uuid)>;

impl Store {
    /// The session that was opened with an idempotency key, and the digest of the request that opened it.
    pub(crate) async fn session_by_idempotency_key(
        &self,
        tenant: &str,
        subject: &str,
        key: &str,
    ) -> Result<Option<(Uuid, Vec<u8>)>, Error> {
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

    /// The session with this id.
    pub(crate) async fn session(&self, id: Uuid) -> Result<Option<Session>, Error> {
        let row = session_rows!("select ", " from upload_sessions where id = $1", id).fetch_optional(&self.pool).await?;
        row.map(Session::try_from).transpose()
    }

    /// The current versions of these sessions.
    pub(crate) async fn versions(&self, ids: &[Uuid]) -> Result<Vec<(Uuid, i64)>, Error> {
        let rows = query!("select id, version from upload_sessions where id = any($1)", ids).fetch_all(&self.pool).await?;
        Ok(rows.into_iter().map(|row| (row.id, row.version)).collect())
    }

    /// The session that owns this object.
    pub(crate) async fn session_of_object(&self, bucket: &str, object_key: &str) -> Result<Option<Session>, Error> {
        let row = session_rows!("select ", " from upload_sessions where object_key = $1 and bucket = $2", object_key, bucket)
            .fetch_optional(&self.pool)
            .await?;
        row.map(Session::try_from).transpose()
    }

    /// Saves a session's new state, unless another writer changed the session first (optimistic locking by version).
    ///
    /// One statement writes the session and its history. It also updates the tenant's quota when the session leaves
    /// {open, completing}, and inserts the outbox row when the session becomes verified. The outbox number is drawn under a
    /// lock on topic and key, so the numbers of one key follow the order of commit.
    pub(crate) async fn save(&self, transition: &Transition<'_>) -> Result<Session, Error> {
        let shards = self.deployment().await?.shards;
        let row = self
            .pool
            .with_timeout(async {
                let _permit = self.tenant_limiter.acquire(&transition.to.tenant).await;
                write::save(&self.pool, transition, shards).await?.ok_or(Error::VersionConflict(transition.to.id))
            })
            .await?;
        write::compact_history_if_long(&self.pool, row.id, row.version).await;
        let saved = Session::try_from(row)?;
        failpoint::reach(saved_failpoint(saved.state.name())).await?;
        Ok(saved)
    }

    /// Expires an overdue session. `false`: it is not overdue, or another writer changed it first.
    pub(crate) async fn expire(&self, session: Session, now: OffsetDateTime) -> Result<bool, Error> {
        let Some(expired) = session.expire(now) else { return Ok(false) };
        let reason = "the upload was not completed before its expiry";
        match self.save(&Transition { from: UploadState::Open, to: &expired, reason, by: "sweeper", now }).await {
            Ok(_) => Ok(true),
            Err(Error::VersionConflict(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Renews the lease of a completing session. `false`: the lease was taken over or the session is no longer completing.
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

    /// Releases a lease and stores the failure, a code and its detail. Workers do not take the session before `until`.
    pub(crate) async fn release_lease(
        &self,
        id: Uuid,
        owner: Uuid,
        attempt: i32,
        failure: (ErrorCode, &str),
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
            failure.0.as_str(),
            failure.1
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Stores the multipart upload of an open session and extends the session's expiry to `expires_at`. Returns the expiry
    /// that now applies. `None`: another request stored its upload first or the session is not open, so abort this upload.
    pub(crate) async fn set_s3_upload(
        &self,
        id: Uuid,
        s3_upload_id: &str,
        expires_at: OffsetDateTime,
    ) -> Result<Option<OffsetDateTime>, Error> {
        let expires_at = query_scalar!(
            "update upload_sessions set s3_upload_id = $2, expires_at = least(greatest(expires_at, $3), expires_latest_at)
             where id = $1 and s3_upload_id is null and state = 'open' returning expires_at",
            id,
            s3_upload_id,
            expires_at
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(expires_at)
    }

    /// Lets a session expire by `expires_at`, because no URL could be signed for it.
    pub(crate) async fn shorten_expiry(&self, id: Uuid, expires_at: OffsetDateTime) -> Result<(), Error> {
        query!(
            "update upload_sessions set expires_at = least(expires_at, $2)
             where id = $1 and s3_upload_id is null and state = 'open'",
            id,
            expires_at
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Clears the id of a multipart upload that S3 no longer knows.
    pub(crate) async fn clear_s3_upload(&self, id: Uuid, s3_upload_id: &str) -> Result<(), Error> {
        query!("update upload_sessions set s3_upload_id = null where id = $1 and s3_upload_id = $2", id, s3_upload_id)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Extends the expiry of an open session. Returns the expiry that now applies; `None`: the session is no longer open.
    pub(crate) async fn extend_expiry(&self, id: Uuid, expires_at: OffsetDateTime) -> Result<Option<OffsetDateTime>, Error> {
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

    /// Stores declared part hashes; a hash that is already stored stays. Returns the stored hashes of these parts.
    pub(crate) async fn store_part_hashes(&self, id: Uuid, parts: &[(u32, Sha256)]) -> Result<Vec<(u32, Sha256)>, Error> {
        self.pool
            .with_timeout(async {
                let mut connection = self.pool.acquire().await?;
                write::insert_parts(&mut connection, id, parts).await?;
                connection.release();
                Ok(())
            })
            .await?;
        let numbers: Vec<u32> = parts.iter().map(|(number, _)| *number).collect();
        self.part_hashes_of(id, &numbers).await
    }

    /// The declared hashes of a session's parts, in order of part number.
    pub(crate) async fn part_hashes(&self, id: Uuid) -> Result<Vec<(u32, Sha256)>, Error> {
        let rows = sqlx::query_as!(
            PartHash,
            "select part_number, sha256 from upload_parts where session_id = $1 order by part_number",
            id
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(|row| row.parse(id)).collect()
    }

    /// The declared hashes of these parts only: a session may have 10,000 parts.
    pub(crate) async fn part_hashes_of(&self, id: Uuid, numbers: &[u32]) -> Result<Vec<(u32, Sha256)>, Error> {
        let numbers: Vec<i32> = numbers.iter().filter_map(|number| i32::try_from(*number).ok()).collect();
        let rows = sqlx::query_as!(
            PartHash,
            "select part_number, sha256 from upload_parts where session_id = $1 and part_number = any($2) order by part_number",
            id,
            &numbers
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(|row| row.parse(id)).collect()
    }

    /// State changes of a session after version `after`, oldest first.
    pub(crate) async fn history(&self, id: Uuid, after: i64, limit: i64) -> Result<Vec<HistoryEntry>, Error> {
        let rows = sqlx::query_as!(
            HistoryEntry,
            "select version, at, from_state, to_state, reason, by from upload_history
             where session_id = $1 and version > $2 order by version limit $3",
            id,
            after,
            limit
        );
        Ok(rows.fetch_all(&self.pool).await?)
    }

    /// Open sessions that have expired. A corrupt row is returned as an error beside the others, so it does not block them.
    pub(crate) async fn overdue(&self, now: OffsetDateTime, limit: i64) -> Result<Vec<Result<Session, Error>>, Error> {
        let rows = session_rows!(
            "select ",
            " from upload_sessions where state = 'open' and expires_at <= $1 order by expires_at limit $2",
            now,
            limit
        );
        Ok(rows.fetch_all(&self.pool).await?.into_iter().map(Session::try_from).collect())
    }

    /// Completing sessions whose lease has ended: its owner stopped, or the object must be read back. Returns the oldest
    /// `limit_per_tenant` sessions of each of 20 tenants at most, in order of tenant name after `after_tenant`. Tenants in
    /// `busy_tenants` are skipped.
    pub(crate) async fn sessions_with_expired_lease(
        &self,
        now: OffsetDateTime,
        after_tenant: &str,
        busy_tenants: &[String],
        limit_per_tenant: i64,
    ) -> Result<Vec<(String, Result<Session, Error>)>, Error> {
        // A loose index scan: it jumps from tenant to tenant in the index and does not read all waiting sessions.
        let rows = session_rows!(
            "with recursive waiting_tenants as (
                 (select tenant as name from upload_sessions where state = 'completing' and tenant > $2 order by tenant limit 1)
                 union all
                 select (select tenant from upload_sessions where state = 'completing' and tenant > waiting_tenants.name
                         order by tenant limit 1)
                 from waiting_tenants where waiting_tenants.name is not null)
             select ",
            " from (select name from waiting_tenants where name is not null and name <> all($3) limit 20) waiting_tenants
              cross join lateral (
                  select * from upload_sessions where state = 'completing' and tenant = name and lease_until <= $1
                  order by lease_until limit $4) due
              order by tenant, lease_until",
            now,
            after_tenant,
            busy_tenants,
            limit_per_tenant
        );
        let rows = rows.fetch_all(self.pool.worker_pool()).await?;
        Ok(rows.into_iter().map(|row| (row.tenant.clone(), Session::try_from(row))).collect())
    }

    /// Claims failed sessions whose S3 clean-up is due. No other replica claims them before `until`.
    pub(crate) async fn claim_cleanups(
        &self,
        now: OffsetDateTime,
        until: OffsetDateTime,
        limit: i64,
    ) -> Result<Vec<Result<Session, Error>>, Error> {
        let rows = session_rows!(
            "update upload_sessions set cleanup_due_at = $2
             where id in (
                 select due.id from upload_sessions due where due.cleanup_due_at <= $1
                 order by due.cleanup_due_at limit $3 for update skip locked)
             returning ",
            "",
            now,
            until,
            limit
        );
        Ok(rows.fetch_all(&self.pool).await?.into_iter().map(Session::try_from).collect())
    }

    /// Those of these sessions that are in a failed state.
    pub(crate) async fn filter_failed(&self, ids: &[Uuid]) -> Result<Vec<Uuid>, Error> {
        let failed = query_scalar!(
            "select id from upload_sessions where id = any($1) and state in ('aborted', 'expired', 'rejected')",
            ids
        );
        Ok(failed.fetch_all(&self.pool).await?)
    }

    /// Sets when the next S3 clean-up of a failed session is due; `None`: no further clean-up is needed.
    pub(crate) async fn schedule_cleanup(&self, id: Uuid, due_at: Option<OffsetDateTime>) -> Result<(), Error> {
        // While the session's bytes count in the quota, it keeps a due time, so that the sweeper finds it again.
        query!(
            "update upload_sessions set cleanup_due_at = case when bytes_held_until is null then $2 else coalesce($2, cleanup_due_at) end
             where id = $1 and state in ('aborted', 'expired', 'rejected')",
            id,
            due_at
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Failed sessions whose bytes still count in the quota although their last URL has expired.
    pub(crate) async fn sessions_with_releasable_bytes(&self, now: OffsetDateTime, limit: i64) -> Result<Vec<Uuid>, Error> {
        let ids = query_scalar!(
            "select id from upload_sessions where bytes_held_until <= $1 order by bytes_held_until limit $2",
            now,
            limit
        );
        with_timeout(WORKER_TIMEOUT, async { Ok(ids.fetch_all(self.pool.worker_pool()).await?) }).await
    }

    /// Removes a failed session's bytes from its tenant's quota. A repeated call changes nothing.
    pub(crate) async fn release_held_bytes(&self, id: Uuid) -> Result<(), Error> {
        query!(
            "with released as (
                 update upload_sessions set bytes_held_until = null where id = $1 and bytes_held_until is not null
                 returning tenant, size_bytes)
             update tenants t set held_bytes = t.held_bytes - released.size_bytes from released where t.tenant = released.tenant",
            id
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Deletes the part hashes of a failed session: 10,000 of them take 1 MB, and no request reads them again.
    pub(crate) async fn delete_part_hashes(&self, id: Uuid) -> Result<(), Error> {
        query!("delete from upload_parts where session_id = $1", id).execute(&self.pool).await?;
        Ok(())
    }

    /// Deletes idempotency keys of sessions that have been final since before `before`, oldest first. Returns how many.
    pub(crate) async fn delete_idempotency_keys(&self, before: OffsetDateTime, limit: i64) -> Result<u64, Error> {
        // A key is as old as its session, so only old keys are scanned. Keys that another replica is deleting are skipped.
        let deleted = query!(
            "delete from idempotency_keys where ctid = any(array(
                 select k.ctid from idempotency_keys k join upload_sessions s on s.id = k.session_id
                 where k.created_at < $1 and s.state in ('published', 'aborted', 'expired', 'rejected') and s.updated_at < $1
                 order by k.created_at limit $2 for update of k skip locked))",
            before,
            limit
        );
        with_timeout(WORKER_TIMEOUT, async { Ok(deleted.execute(self.pool.worker_pool()).await?.rows_affected()) }).await
    }
}

struct PartHash {
    part_number: i32,
    sha256: Vec<u8>,
}

impl PartHash {
    fn parse(self, id: Uuid) -> Result<(u32, Sha256), Error> {
        let sha256 =
            self.sha256.try_into().map_err(|_| Error::Corrupt { id, reason: "a part hash does not have 32 bytes".into() })?;
        Ok((self.part_number.unsigned_abs(), Sha256(sha256)))
    }
}

/// The failpoint between the COMMIT of a state change and the return to the caller.
fn saved_failpoint(state: UploadState) -> &'static str {
    match state {
        UploadState::Open => "saved.open",
        UploadState::Completing => "saved.completing",
        UploadState::Verified => "saved.verified",
        UploadState::Published => "relay.marked",
        UploadState::Aborted => "saved.aborted",
        UploadState::Expired => "saved.expired",
        UploadState::Rejected => "saved.rejected",
    }
}
