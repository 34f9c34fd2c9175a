//! The writes that create a session and that save its state changes.

use lfs_broker_client::api::UploadState;
use lfs_broker_client::checksum::Sha256;
use sqlx::postgres::PgDatabaseError;
use sqlx::types::Json;
use sqlx::{PgConnection, query, query_scalar};
use time::OffsetDateTime;
use tracing::warn;
use uuid::Uuid;

use super::row::{self, Row, StateColumns, record_headers, session_rows};
use super::{CreateOutcome, Quota, Transition};
use crate::session::{Session, State, Verification, ordering_key, shard};
use crate::store::pool::Pool;
use crate::store::{Error, Store};

/// Up to this version a history is not compacted. A session without failures ends at version 4.
const COMPACT_AFTER_VERSION: i64 = 6;
/// How many state changes a repeated cycle may have to be recognised: a completion whose read-back fails has four.
const MAX_CYCLE_LENGTH: i64 = 4;
/// How many history rows a session keeps at most: one page of the API.
const MAX_HISTORY_ROWS: i64 = 1000;

fn size_bytes(session: &Session) -> i64 {
    i64::try_from(session.spec.size_bytes).expect("a policy allows 5 TiB at most")
}

fn numbered(hashes: &[Sha256]) -> Vec<(u32, Sha256)> {
    (1..).zip(hashes.iter().copied()).collect()
}

fn part_columns(parts: &[(u32, Sha256)]) -> (Vec<i32>, Vec<Vec<u8>>) {
    let number = |number: u32| i32::try_from(number).expect("at most 10,000 parts");
    parts.iter().map(|(part, sha256)| (number(*part), sha256.0.to_vec())).unzip()
}

pub(super) async fn insert_parts(connection: &mut PgConnection, id: Uuid, parts: &[(u32, Sha256)]) -> Result<(), Error> {
    if parts.is_empty() {
        return Ok(());
    }
    let (numbers, hashes) = part_columns(parts);
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

/// Writes a new session, its part hashes, its idempotency key and its quota usage: all of it or nothing.
///
/// It is one statement, because every open of a tenant waits for the tenant's row. So no round trip happens while the row is
/// locked.
pub(super) async fn create(
    store: &Store,
    session: &Session,
    part_hashes: &[Sha256],
    idempotency: Option<(&str, &[u8])>,
    quota: Quota,
) -> Result<CreateOutcome, Error> {
    match insert(&store.pool, session, part_hashes, idempotency, quota).await {
        Ok(true) => Ok(CreateOutcome::Created),
        Ok(false) => {
            // An earlier request with the same key may have used the quota. Then this request is a replay of it.
            if let Some((key, _)) = idempotency
                && store.session_by_idempotency_key(&session.tenant, &session.subject, key).await?.is_some()
            {
                return Ok(CreateOutcome::KeyExists);
            }
            let open_sessions = query_scalar!("select open_sessions from tenants where tenant = $1", session.tenant);
            let open_sessions = open_sessions.fetch_optional(&store.pool).await?.unwrap_or(0);
            let has_too_many = quota.open_sessions > 0 && open_sessions >= quota.open_sessions;
            Ok(if has_too_many { CreateOutcome::TooManySessions } else { CreateOutcome::TooManyBytes })
        }
        Err(error) => match error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>()) {
            // 23505, unique_violation: the key exists already, and nothing was written.
            Some(error) if error.code() == "23505" && error.constraint() == Some("idempotency_keys_pkey") => {
                Ok(CreateOutcome::KeyExists)
            }
            // 55P03, lock_not_available: another transaction is storing the same key.
            Some(error) if error.code() == "55P03" && error.r#where().is_some_and(|at| at.contains("idempotency_keys")) => {
                Ok(CreateOutcome::KeyInFlight)
            }
            _ => Err(error.into()),
        },
    }
}

/// Inserts a new session. `false`: it would exceed the tenant's quota.
async fn insert(
    pool: &Pool,
    session: &Session,
    part_hashes: &[Sha256],
    idempotency: Option<(&str, &[u8])>,
    quota: Quota,
) -> Result<bool, sqlx::Error> {
    let spec = &session.spec;
    let (mode, part_bytes, parts, hashes) = row::layout_columns(spec.layout);
    let (numbers, part_hashes) = part_columns(&numbered(part_hashes));
    let (key, request_sha256) = idempotency.unzip();
    let created = query_scalar!(
        r#"with reserved as (
             insert into tenants as t (tenant, open_sessions, reserved_bytes)
             select $2::text, 1, $14::bigint where $27::bigint = 0 or $14 <= $27
             on conflict (tenant) do update set open_sessions = t.open_sessions + 1,
                 reserved_bytes = t.reserved_bytes + excluded.reserved_bytes
             where ($26::bigint = 0 or t.open_sessions < $26)
                 and ($27 = 0 or t.reserved_bytes + excluded.reserved_bytes <= $27
                     -- Together with the bytes that URLs of failed uploads may still store, at most twice the quota.
                     and t.reserved_bytes + excluded.reserved_bytes + t.held_bytes - $27 <= $27)
             returning tenant),
         opened as (
             insert into upload_sessions (
                 id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at,
                 topic, record_key, record_partition, record_headers, traceparent, content_type, filename,
                 size_bytes, checksum_alg, checksum, min_integrity, bucket, object_key, kms_key_id,
                 mode, part_size_bytes, part_count, part_hashes, url_seconds, session_seconds)
             select $1, tenant, $3, 'open', $4, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20,
                 $21, $22, $23, $24, $25, $28
             from reserved),
         history as (
             insert into upload_history (session_id, version, at, to_state, reason, by)
             select $1, 1, $4, 'open', 'opened', 'client:' || $3 from reserved),
         part_hashes as (
             insert into upload_parts (session_id, part_number, sha256)
             select $1, number, sha256 from reserved, unnest($29::int[], $30::bytea[]) as p(number, sha256)),
         idempotency_key as (
             insert into idempotency_keys (tenant, subject, key, request_sha256, session_id, created_at)
             select tenant, $3, $31::text, $32, $1, $4 from reserved where $31 is not null)
         select exists (select from reserved) as "created!""#,
        session.id,
        session.tenant,
        session.subject,
        session.created_at,
        session.expires_at,
        session.expires_latest_at,
        spec.topic,
        spec.key,
        spec.partition,
        Json(&spec.headers) as _,
        spec.traceparent,
        spec.content_type,
        spec.filename,
        size_bytes(session),
        spec.algorithm.name(),
        spec.digest.as_ref().map(|digest| digest.value.as_slice()),
        spec.min_integrity.name(),
        session.bucket,
        session.object_key,
        spec.kms_key_id,
        mode,
        part_bytes,
        parts,
        hashes,
        row::seconds_column(spec.url_seconds),
        quota.open_sessions,
        quota.reserved_bytes,
        row::seconds_column(spec.session_seconds),
        &numbers,
        &part_hashes,
        key,
        request_sha256
    );
    created.fetch_one(pool).await
}

/// Saves a session's state change. `None`: another writer changed the session first.
///
/// An expiry also compares `expires_at` with the current time, because signing parts extends it without a new version. It is
/// one statement, as [`create`]. The lock on topic and key is taken before anything else and held until the commit.
pub(super) async fn save(pool: &Pool, transition: &Transition<'_>, shards: i32) -> Result<Option<Row>, Error> {
    let session = transition.to;
    let spec = &session.spec;
    let uses_quota = |state| matches!(state, UploadState::Open | UploadState::Completing);
    let releases_quota = uses_quota(transition.from) && !uses_quota(session.state.name());
    let ordering = ordering_key(&spec.topic, spec.key.as_deref());
    let headers = match &session.state {
        State::Verified(verification) => Some(all_headers(session, verification)),
        _ => None,
    };
    let columns = StateColumns::of(session, transition.now);
    let row = session_rows!(
        "with ordering_lock as materialized (select pg_advisory_xact_lock($21) where $21::bigint is not null and $3 = 'verified'),
         saved as (
             update upload_sessions set version = version + 1, updated_at = $4, state = $3,
                 checksum = $5, traceparent = $6, lease_owner = $7, lease_until = $8, lease_attempt = $9, must_read = $10,
                 verified_at = $11, integrity = $12, object_etag = $13, object_version_id = $14, pointer = $15,
                 error_code = $16, error_detail = $17, error_items = $18, cleanup_due_at = $19,
                 checksum_by_complete = $27, bytes_held_until = $28
             where (select count(*) from ordering_lock) >= 0
                 and id = $1 and version = $2 and state = $20 and ($3 <> 'expired' or expires_at <= $4)
             returning *),
         history as (
             insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
             select id, version, $4, $20, $3, $22, $23 from saved),
         released_quota as (
             update tenants t set open_sessions = t.open_sessions - 1,
                 reserved_bytes = t.reserved_bytes - saved.size_bytes,
                 held_bytes = t.held_bytes + case when $28::timestamptz is null then 0 else saved.size_bytes end
             from saved where $24::bool and t.tenant = saved.tenant),
         enqueued as (
             insert into outbox (session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at)
             select id, $25, topic, $21, record_partition, record_key, pointer, $26, $4, $4 from saved where $3 = 'verified')
         select ",
        " from saved",
        session.id,
        session.version,
        session.state.name().name(),
        transition.now,
        columns.checksum,
        spec.traceparent,
        columns.lease_owner,
        columns.lease_until,
        columns.lease_attempt,
        columns.must_read,
        columns.verified_at,
        columns.integrity,
        columns.etag,
        columns.version_id,
        columns.pointer,
        columns.error_code,
        columns.error_detail,
        columns.error_items as _,
        columns.cleanup_due_at,
        transition.from.name(),
        ordering,
        transition.reason,
        transition.by,
        releases_quota,
        shard(&spec.topic, spec.key.as_deref(), session.id, shards),
        headers.map(Json) as _,
        session.digest_by_complete,
        // The bytes that a URL may still store count in the quota until the URL expires.
        columns.bytes_held_until
    );
    Ok(row.fetch_optional(pool).await?)
}

/// Compacts the history of a saved session if it may be long. After a failure the next state change tries again.
pub(super) async fn compact_history_if_long(pool: &Pool, saved: &Row) {
    if saved.version <= COMPACT_AFTER_VERSION {
        return;
    }
    if let Err(error) = compact_history(pool, saved.id).await {
        warn!(
            session.id = %saved.id, %error,
            "compacting the history of {} failed: {error}; the next state change retries it", saved.id
        );
    }
}

fn all_headers(session: &Session, verification: &Verification) -> Vec<(String, String)> {
    let spec = &session.spec;
    let integrity = verification.integrity.name();
    record_headers(session.id, integrity, verification.version_id.clone(), spec.traceparent.clone(), spec.headers.clone())
}

/// Deletes repeated cycles of state changes, such as those of a client that completes too early a thousand times. The first and
/// the last cycle are kept. In any case at most [`MAX_HISTORY_ROWS`] rows are kept: the first and the newest.
///
/// The session is locked first. Otherwise two concurrent calls would read the same rows, delete cycles that are shifted by one
/// state change, and leave half a cycle.
pub(in crate::store) async fn compact_history(pool: &Pool, id: Uuid) -> Result<(), Error> {
    let compacting = async {
        let mut tx = pool.begin().await?;
        query!("select from upload_sessions where id = $1 for no key update", id).execute(&mut *tx).await?;
        let newest = query!(
            "select version, from_state, to_state, reason, by from upload_history
             where session_id = $1 order by version desc limit $2",
            id,
            3 * MAX_CYCLE_LENGTH
        );
        let newest = newest.fetch_all(&mut *tx).await?;
        let transitions: Vec<_> = newest.iter().map(|row| (&row.from_state, &row.to_state, &row.reason, &row.by)).collect();
        let versions: Vec<i64> = repeated_cycle(&transitions).map(|index| newest[index].version).collect();
        let deleted = query!(
            "delete from upload_history where session_id = $1 and (version = any($2) or version in (
                 select version from upload_history
                 where session_id = $1 and from_state is not null order by version desc offset $3))",
            id,
            &versions,
            MAX_HISTORY_ROWS - 1
        );
        deleted.execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    };
    pool.with_timeout(compacting).await
}

/// The middle one of three equal cycles at the newest end, as indexes; empty if there are no three.
fn repeated_cycle<T: PartialEq>(newest_first: &[T]) -> std::ops::Range<usize> {
    let is_repeated = |length: &usize| match newest_first.get(..3 * length) {
        Some(cycles) => cycles[..2 * length] == cycles[*length..],
        None => false,
    };
    let longest = usize::try_from(MAX_CYCLE_LENGTH).expect("it is small");
    (1..=longest).find(is_repeated).map_or(0..0, |length| length..2 * length)
}

/// Inserts a verified session's pointer into the outbox.
pub(super) async fn enqueue_pointer(
    tx: &mut PgConnection,
    session: &Session,
    shards: i32,
    now: OffsetDateTime,
) -> Result<(), Error> {
    let State::Verified(verification) = &session.state else { return Ok(()) };
    let spec = &session.spec;
    query!(
        "insert into outbox (session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9)",
        session.id,
        shard(&spec.topic, spec.key.as_deref(), session.id, shards),
        spec.topic,
        ordering_key(&spec.topic, spec.key.as_deref()),
        spec.partition,
        spec.key,
        verification.pointer,
        Json(all_headers(session, verification)) as _,
        now
    )
    .execute(tx)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_repeated_cycle_of_state_changes_the_first_and_the_last_are_kept() {
        let kept = |changes: &str| {
            let mut history: Vec<char> = Vec::new();
            for change in changes.chars() {
                history.push(change);
                let newest_first: Vec<char> = history.iter().rev().copied().take(12).collect();
                let deleted = repeated_cycle(&newest_first);
                history.drain(history.len() - deleted.end..history.len() - deleted.start);
            }
            history.into_iter().collect::<String>()
        };
        assert_eq!(kept("oabcd"), "oabcd");
        assert_eq!(kept("oabab"), "oabab", "two repetitions are not deleted");
        assert_eq!(kept(&format!("o{}", "ab".repeat(100))), "oabab");
        assert_eq!(kept(&format!("o{}", "a".repeat(100))), "oaa");
        assert_eq!(kept(&format!("o{}z", "abcd".repeat(100))), "oabcdabcdz");
    }
}
