//! The writes that save a session's state changes.

use lfs_broker_client::api::UploadState;
use lfs_broker_client::checksum::Sha256;
use sqlx::types::Json;
use sqlx::{PgConnection, query};
use time::OffsetDateTime;
use tracing::warn;
use uuid::Uuid;

use super::Transition;
use super::row::{Row, StateColumns, record_headers, session_rows};
use crate::session::{Session, State, Verification, ordering_key, shard};
use crate::store::Error;
use crate::store::pool::Pool;

/// Up to this version a history is not compacted. A session without failures ends at version 4.
const COMPACT_AFTER_VERSION: i64 = 6;
/// How many state changes a repeated cycle may have to be recognised: a completion whose read-back fails has four.
const MAX_CYCLE_LENGTH: i64 = 4;
/// How many history rows a session keeps at most: one page of the API.
const MAX_HISTORY_ROWS: i64 = 1000;

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

/// Saves a session's state change. `None`: another writer changed the session first.
///
/// An expiry also compares `expires_at` with the current time, because signing parts extends it without a new version. It is
/// one statement, because every open and end of a tenant's uploads waits for the tenant's row. The lock on topic and key is taken before anything else and held until the commit.
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
pub(super) async fn compact_history_if_long(pool: &Pool, id: Uuid, version: i64) {
    if version <= COMPACT_AFTER_VERSION {
        return;
    }
    if let Err(error) = compact_history(pool, id).await {
        warn!(session.id = %id, %error, "compacting the history of {id} failed: {error}; the next state change retries it");
    }
}

pub(super) fn all_headers(session: &Session, verification: &Verification) -> Vec<(String, String)> {
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
