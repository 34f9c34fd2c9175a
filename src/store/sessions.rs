//! Sessions: opened once, moved under their version, read in many ways.

mod list;
mod row;
mod walk;
mod write;

use lfs_broker_client::api::UploadState;
use lfs_broker_client::checksum::Sha256;
use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

pub(crate) use list::Listed;
pub(super) use row::record_headers;
use row::{Row, rows};
pub(super) use write::fold_history;

use super::pool::{WORK_WITHIN, within};
use super::{Error, Store};
use crate::failpoint;
use crate::session::Session;

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
    /// The idempotency key is being stored by another request, and has been for a while.
    KeyInFlight,
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
    pub(crate) version: i64,
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
        let created = self
            .pool
            .in_time(async {
                let _turn = self.turns.wait(&session.tenant).await;
                write::create(self, session, part_hashes, idempotency, quota).await
            })
            .await?;
        failpoint::reach("open.stored").await?;
        Ok(created)
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
        let row = rows!("select ", " from upload_sessions where id = $1", id).fetch_optional(&self.pool).await?;
        row.map(Session::try_from).transpose()
    }

    /// The versions of these sessions.
    pub(crate) async fn versions(&self, ids: &[Uuid]) -> Result<Vec<(Uuid, i64)>, Error> {
        let rows = query!("select id, version from upload_sessions where id = any($1)", ids).fetch_all(&self.pool).await?;
        Ok(rows.into_iter().map(|row| (row.id, row.version)).collect())
    }

    /// The session whose object this is.
    pub(crate) async fn session_of_object(&self, bucket: &str, object_key: &str) -> Result<Option<Session>, Error> {
        let row = rows!("select ", " from upload_sessions where object_key = $1 and bucket = $2", object_key, bucket)
            .fetch_optional(&self.pool)
            .await?;
        row.map(Session::try_from).transpose()
    }

    /// Writes a session's new state, if nobody moved it first.
    ///
    /// One statement: the session, its history, the tenant's quota where it leaves {open, completing}, and where
    /// it becomes verified its outbox row. That row's number is drawn under a lock on topic and key, so that
    /// numbers of one key are in the order of commit.
    pub(crate) async fn save(&self, step: &Move<'_>, shards: i32) -> Result<Session, Error> {
        let row = self
            .pool
            .in_time(async {
                let _turn = self.turns.wait(&step.to.tenant).await;
                write::save(&self.pool, step, shards).await?.ok_or(Error::Moved(step.to.id))
            })
            .await?;
        write::fold_if_long(&self.pool, &row).await;
        let saved = Session::try_from(row)?;
        failpoint::reach(saved_as(saved.state.name())).await?;
        Ok(saved)
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

    /// Remembers the multipart upload made for an open session, whose end slides to `expires_at`. Gives the end that holds
    /// now; `None`: another was first, abort this one.
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

    /// Lets a session end soon for which no URL could be signed.
    pub(crate) async fn end_unopened(&self, id: Uuid, expires_at: OffsetDateTime) -> Result<(), Error> {
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
        self.pool
            .in_time(async {
                let mut lent = self.pool.lend().await?;
                write::insert_parts(&mut lent, id, parts).await?;
                lent.give_back();
                Ok(())
            })
            .await?;
        let numbers: Vec<u32> = parts.iter().map(|(number, _)| *number).collect();
        self.part_hashes_of(id, &numbers).await
    }

    /// The promised hashes of a session's parts, in order.
    pub(crate) async fn part_hashes(&self, id: Uuid) -> Result<Vec<(u32, Sha256)>, Error> {
        let rows = sqlx::query_as!(
            PartHash,
            "select part_number, sha256 from upload_parts where session_id = $1 order by part_number",
            id
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(|row| row.read(id)).collect()
    }

    /// The same of these numbers only, where they are promised: a session may have 10,000.
    pub(crate) async fn part_hashes_of(&self, id: Uuid, numbers: &[u32]) -> Result<Vec<(u32, Sha256)>, Error> {
        let numbers: Vec<i32> = numbers.iter().filter_map(|number| i32::try_from(*number).ok()).collect();
        let rows = sqlx::query_as!(
            PartHash,
            "select part_number, sha256 from upload_parts where session_id = $1 and part_number = any($2) order by part_number",
            id,
            &numbers
        );
        rows.fetch_all(&self.pool).await?.into_iter().map(|row| row.read(id)).collect()
    }

    /// Transitions of a session after this version, oldest first.
    pub(crate) async fn history(&self, id: Uuid, after: i64, limit: i64) -> Result<Vec<Transition>, Error> {
        let rows = sqlx::query_as!(
            Transition,
            "select version, at, from_state, to_state, reason, by from upload_history
             where session_id = $1 and version > $2 order by version limit $3",
            id,
            after,
            limit
        );
        Ok(rows.fetch_all(&self.pool).await?)
    }

    /// Open sessions whose time is over. A row that cannot be one holds the others up nowhere: it comes as an error beside them.
    pub(crate) async fn overdue(&self, now: OffsetDateTime, limit: i64) -> Result<Vec<Result<Session, Error>>, Error> {
        let rows = rows!(
            "select ",
            " from upload_sessions where state = 'open' and expires_at <= $1 order by expires_at limit $2",
            now,
            limit
        );
        Ok(rows.fetch_all(&self.pool).await?.into_iter().map(Session::try_from).collect())
    }

    /// Completing sessions that nobody works on: a lease ran out, or bytes wait to be read. The oldest `each` of every
    /// tenant by name after `after`, of a few tenants, and without those that are `busy`.
    pub(crate) async fn unattended(
        &self,
        now: OffsetDateTime,
        after: &str,
        busy: &[String],
        each: i64,
    ) -> Result<Vec<(String, Result<Session, Error>)>, Error> {
        // From tenant to tenant by the index, not through all that wait.
        let rows = rows!(
            "with recursive waiting as (
                 (select tenant as name from upload_sessions where state = 'completing' and tenant > $2 order by tenant limit 1)
                 union all
                 select (select tenant from upload_sessions where state = 'completing' and tenant > waiting.name order by tenant limit 1)
                 from waiting where waiting.name is not null)
             select ",
            " from (select name from waiting where name is not null and name <> all($3) limit 20) waiting
              cross join lateral (
                  select * from upload_sessions where state = 'completing' and tenant = name and lease_until <= $1
                  order by lease_until limit $4) due
              order by tenant, lease_until",
            now,
            after,
            busy,
            each
        );
        let rows = rows.fetch_all(self.pool.unbounded()).await?;
        Ok(rows.into_iter().map(|row| (row.tenant.clone(), Session::try_from(row))).collect())
    }

    /// Failed sessions whose traces in S3 are due to be removed, taken until `until`: no other replica takes them before.
    pub(crate) async fn take_cleanups(
        &self,
        now: OffsetDateTime,
        until: OffsetDateTime,
        limit: i64,
    ) -> Result<Vec<Result<Session, Error>>, Error> {
        let rows = rows!(
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

    /// Those of these sessions that have failed.
    pub(crate) async fn failed(&self, ids: &[Uuid]) -> Result<Vec<Uuid>, Error> {
        let failed = query_scalar!(
            "select id from upload_sessions where id = any($1) and state in ('aborted', 'expired', 'rejected')",
            ids
        );
        Ok(failed.fetch_all(&self.pool).await?)
    }

    /// Says when a failed session's traces are due again; `None`: they are gone for good.
    pub(crate) async fn set_cleanup(&self, id: Uuid, due_at: Option<OffsetDateTime>) -> Result<(), Error> {
        // What still holds bytes of the quota stays where the sweeper looks for it.
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

    /// Failed sessions whose bytes count in the quota although their last URL has ended.
    pub(crate) async fn held(&self, now: OffsetDateTime, limit: i64) -> Result<Vec<Uuid>, Error> {
        let ids = query_scalar!(
            "select id from upload_sessions where bytes_held_until <= $1 order by bytes_held_until limit $2",
            now,
            limit
        );
        within(WORK_WITHIN, async { Ok(ids.fetch_all(self.pool.unbounded()).await?) }).await
    }

    /// No longer counts a failed session's bytes against its tenant, once.
    pub(crate) async fn free_held(&self, id: Uuid) -> Result<(), Error> {
        query!(
            "with freed as (
                 update upload_sessions set bytes_held_until = null where id = $1 and bytes_held_until is not null
                 returning tenant, size_bytes)
             update tenants t set held_bytes = t.held_bytes - freed.size_bytes from freed where t.tenant = freed.tenant",
            id
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Forgets the promised hashes of a failed session's parts: 10,000 of them take a megabyte, and nobody asks again.
    pub(crate) async fn forget_parts(&self, id: Uuid) -> Result<(), Error> {
        query!("delete from upload_parts where session_id = $1", id).execute(&self.pool).await?;
        Ok(())
    }

    /// Forgets idempotency keys of sessions that have been final since before `before`, the oldest first.
    pub(crate) async fn forget_keys(&self, before: OffsetDateTime, limit: i64) -> Result<u64, Error> {
        // A key is as old as its session, so that only old ones are looked at. What another replica forgets is passed over.
        let gone = query!(
            "delete from idempotency_keys where ctid = any(array(
                 select k.ctid from idempotency_keys k join upload_sessions s on s.id = k.session_id
                 where k.created_at < $1 and s.state in ('published', 'aborted', 'expired', 'rejected') and s.updated_at < $1
                 order by k.created_at limit $2 for update of k skip locked))",
            before,
            limit
        );
        within(WORK_WITHIN, async { Ok(gone.execute(self.pool.unbounded()).await?.rows_affected()) }).await
    }
}

struct PartHash {
    part_number: i32,
    sha256: Vec<u8>,
}

impl PartHash {
    fn read(self, id: Uuid) -> Result<(u32, Sha256), Error> {
        let sha256 = self.sha256.try_into().map_err(|_| Error::Corrupt { id, what: "a part's hash has not 32 bytes".into() })?;
        Ok((self.part_number.unsigned_abs(), Sha256(sha256)))
    }
}

/// The failpoint between the COMMIT of a move and the word of it.
fn saved_as(state: UploadState) -> &'static str {
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
