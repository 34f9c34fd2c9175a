//! What opening and moving a session write.

use lfs_broker_client::api::UploadState;
use lfs_broker_client::checksum::Sha256;
use sqlx::postgres::PgDatabaseError;
use sqlx::types::Json;
use sqlx::{PgConnection, query, query_scalar};
use time::OffsetDateTime;
use tracing::warn;
use uuid::Uuid;

use super::row::{self, Columns, Row, record_headers, rows};
use super::{Created, Move, Quota};
use crate::session::{Proof, Session, State, ordering, shard};
use crate::store::pool::Pool;
use crate::store::{Error, Store};

/// The versions of a session that nothing went wrong with, and a few more: their history is short as it is.
const STRAIGHT: i64 = 6;
/// The longest round of transitions that is known for a repeated one: a completion whose bytes are read in vain has four.
const LONGEST_ROUND: i64 = 4;
/// Rows of history that a session has at most: one page of the API.
const HISTORY: i64 = 1000;

fn size(session: &Session) -> i64 {
    i64::try_from(session.promise.size_bytes).expect("a policy allows 5 TiB at most")
}

fn number(hashes: &[Sha256]) -> Vec<(u32, Sha256)> {
    (1..).zip(hashes.iter().copied()).collect()
}

fn columns(parts: &[(u32, Sha256)]) -> (Vec<i32>, Vec<Vec<u8>>) {
    let number = |number: u32| i32::try_from(number).expect("at most 10,000");
    parts.iter().map(|(part, sha256)| (number(*part), sha256.0.to_vec())).unzip()
}

pub(super) async fn insert_parts(connection: &mut PgConnection, id: Uuid, parts: &[(u32, Sha256)]) -> Result<(), Error> {
    if parts.is_empty() {
        return Ok(());
    }
    let (numbers, hashes) = columns(parts);
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

/// Writes a new session, its part hashes, its idempotency key and its share of the quota: all of it, or nothing.
///
/// One statement, because every open of a tenant waits for the tenant's row: it is held for no round trip.
pub(super) async fn create(
    store: &Store,
    session: &Session,
    part_hashes: &[Sha256],
    idempotency: Option<(&str, &[u8])>,
    quota: Quota,
) -> Result<Created, Error> {
    match insert(&store.pool, session, part_hashes, idempotency, quota).await {
        Ok(true) => Ok(Created::New),
        Ok(false) => {
            // Perhaps the request that was first under this key took the room: then this one is its replay.
            if let Some((key, _)) = idempotency
                && store.idempotent(&session.tenant, &session.subject, key).await?.is_some()
            {
                return Ok(Created::KeyTaken);
            }
            let held = query_scalar!("select open_sessions from tenants where tenant = $1", session.tenant);
            let held = held.fetch_optional(&store.pool).await?.unwrap_or(0);
            let is_full = quota.open_sessions > 0 && held >= quota.open_sessions;
            Ok(if is_full { Created::TooManySessions } else { Created::TooManyBytes })
        }
        Err(error) => match error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>()) {
            // 23505: the key is there already, and nothing was written.
            Some(error) if error.code() == "23505" && error.constraint() == Some("idempotency_keys_pkey") => {
                Ok(Created::KeyTaken)
            }
            // 55P03, lock_timeout: it waited for whoever stores the same key.
            Some(error) if error.code() == "55P03" && error.r#where().is_some_and(|at| at.contains("idempotency_keys")) => {
                Ok(Created::KeyInFlight)
            }
            _ => Err(error.into()),
        },
    }
}

/// `false`: the tenant has no room for it.
async fn insert(
    pool: &Pool,
    session: &Session,
    part_hashes: &[Sha256],
    idempotency: Option<(&str, &[u8])>,
    quota: Quota,
) -> Result<bool, sqlx::Error> {
    let promise = &session.promise;
    let (mode, part_bytes, parts, hashes) = row::layout_columns(promise.layout);
    let (numbers, part_hashes) = columns(&number(part_hashes));
    let (key, request_sha256) = idempotency.unzip();
    let created = query_scalar!(
        r#"with held as (
             insert into tenants as t (tenant, open_sessions, reserved_bytes)
             select $2::text, 1, $14::bigint where $27::bigint = 0 or $14 <= $27
             on conflict (tenant) do update set open_sessions = t.open_sessions + 1,
                 reserved_bytes = t.reserved_bytes + excluded.reserved_bytes
             where ($26::bigint = 0 or t.open_sessions < $26)
                 and ($27 = 0 or t.reserved_bytes + excluded.reserved_bytes <= $27
                     -- With what URLs of failed uploads may still bring, twice the quota.
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
             from held),
         told as (
             insert into upload_history (session_id, version, at, to_state, reason, by)
             select $1, 1, $4, 'open', 'opened', 'client:' || $3 from held),
         hashed as (
             insert into upload_parts (session_id, part_number, sha256)
             select $1, number, sha256 from held, unnest($29::int[], $30::bytea[]) as p(number, sha256)),
         keyed as (
             insert into idempotency_keys (tenant, subject, key, request_sha256, session_id, created_at)
             select tenant, $3, $31::text, $32, $1, $4 from held where $31 is not null)
         select exists (select from held) as "created!""#,
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
        quota.open_sessions,
        quota.reserved_bytes,
        row::int(promise.session_seconds),
        &numbers,
        &part_hashes,
        key,
        request_sha256
    );
    created.fetch_one(pool).await
}

/// Moves a session. `None`: somebody moved it first. A session that ends asks for the end that holds now, for signing
/// parts slides it and leaves its version alone.
///
/// One statement, as [`create`]. The lock of its topic and key is taken before anything else, and held until the commit.
pub(super) async fn save(pool: &Pool, step: &Move<'_>, shards: i32) -> Result<Option<Row>, Error> {
    let session = step.to;
    let promise = &session.promise;
    let is_held = |state| matches!(state, UploadState::Open | UploadState::Completing);
    let is_freed = is_held(step.from) && !is_held(session.state.name());
    let ordering = ordering(&promise.topic, promise.key.as_deref());
    let headers = match &session.state {
        State::Verified(proof) => Some(all_headers(session, proof)),
        _ => None,
    };
    let c = Columns::of(session, step.now);
    let row = rows!(
        "with turn as materialized (select pg_advisory_xact_lock($21) where $21::bigint is not null and $3 = 'verified'),
         moved as (
             update upload_sessions set version = version + 1, updated_at = $4, state = $3,
                 checksum = $5, traceparent = $6, lease_owner = $7, lease_until = $8, lease_attempt = $9, must_read = $10,
                 verified_at = $11, integrity = $12, object_etag = $13, object_version_id = $14, pointer = $15,
                 error_code = $16, error_detail = $17, error_items = $18, cleanup_due_at = $19,
                 checksum_by_complete = $27, bytes_held_until = $28
             where (select count(*) from turn) >= 0
                 and id = $1 and version = $2 and state = $20 and ($3 <> 'expired' or expires_at <= $4)
             returning *),
         told as (
             insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
             select id, version, $4, $20, $3, $22, $23 from moved),
         freed as (
             update tenants t set open_sessions = t.open_sessions - 1,
                 reserved_bytes = t.reserved_bytes - moved.size_bytes,
                 held_bytes = t.held_bytes + case when $28::timestamptz is null then 0 else moved.size_bytes end
             from moved where $24::bool and t.tenant = moved.tenant),
         promised as (
             insert into outbox (session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at)
             select id, $25, topic, $21, record_partition, record_key, pointer, $26, $4, $4 from moved where $3 = 'verified')
         select ",
        " from moved",
        session.id,
        session.version,
        session.state.name().name(),
        step.now,
        c.checksum,
        promise.traceparent,
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
        step.from.name(),
        ordering,
        step.reason,
        step.by,
        is_freed,
        shard(&promise.topic, promise.key.as_deref(), session.id, shards),
        headers.map(Json) as _,
        session.digest_by_complete,
        // What a URL may still bring counts until it ends.
        c.bytes_held_until
    );
    Ok(row.fetch_optional(pool).await?)
}

/// Folds the history of a session that was saved, where it may be long. What fails is left to the next time.
pub(super) async fn fold_if_long(pool: &Pool, saved: &Row) {
    // Whoever goes straight has four transitions.
    if saved.version <= STRAIGHT {
        return;
    }
    if let Err(error) = fold_history(pool, saved.id).await {
        warn!(session.id = %saved.id, %error, "could not fold the history of {}: {error}", saved.id);
    }
}

fn all_headers(session: &Session, proof: &Proof) -> Vec<(String, String)> {
    let promise = &session.promise;
    let integrity = proof.integrity.name();
    record_headers(session.id, integrity, proof.version_id.clone(), promise.traceparent.clone(), promise.headers.clone())
}

/// Keeps a history from growing with what repeats itself, such as a complete that comes too early a thousand times: of
/// a round of transitions the first and the last are kept. Whatever else happens, [`HISTORY`] rows are kept at most: the
/// first and the newest.
///
/// The session is locked first: two concurrent calls would read the same rows, delete rounds that are shifted by one
/// transition, and leave half a round.
pub(in crate::store) async fn fold_history(pool: &Pool, id: Uuid) -> Result<(), Error> {
    let folded = async {
        let mut tx = pool.begin().await?;
        query!("select from upload_sessions where id = $1 for no key update", id).execute(&mut *tx).await?;
        let last = query!(
            "select version, from_state, to_state, reason, by from upload_history
             where session_id = $1 order by version desc limit $2",
            id,
            3 * LONGEST_ROUND
        );
        let last = last.fetch_all(&mut *tx).await?;
        let transitions: Vec<_> = last.iter().map(|row| (&row.from_state, &row.to_state, &row.reason, &row.by)).collect();
        let versions: Vec<i64> = repeated(&transitions).map(|index| last[index].version).collect();
        let deleted = query!(
            "delete from upload_history where session_id = $1 and (version = any($2) or version in (
                 select version from upload_history
                 where session_id = $1 and from_state is not null order by version desc offset $3))",
            id,
            &versions,
            HISTORY - 1
        );
        deleted.execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    };
    pool.in_time(folded).await
}

/// Which of the transitions, the newest first, repeat those before them and are repeated by those after.
fn repeated<T: PartialEq>(newest_first: &[T]) -> std::ops::Range<usize> {
    let is_thrice = |length: &usize| match newest_first.get(..3 * length) {
        Some(three) => three[..2 * length] == three[*length..],
        None => false,
    };
    let longest = usize::try_from(LONGEST_ROUND).expect("a few");
    (1..=longest).find(is_thrice).map_or(0..0, |length| length..2 * length)
}

pub(super) async fn promise_pointer(
    tx: &mut PgConnection,
    session: &Session,
    shards: i32,
    now: OffsetDateTime,
) -> Result<(), Error> {
    let State::Verified(proof) = &session.state else { return Ok(()) };
    let promise = &session.promise;
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
        Json(all_headers(session, proof)) as _,
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
    fn of_a_round_that_repeats_itself_the_first_and_the_last_are_kept() {
        let kept = |told: &str| {
            let mut history: Vec<char> = Vec::new();
            for transition in told.chars() {
                history.push(transition);
                let newest_first: Vec<char> = history.iter().rev().copied().take(12).collect();
                let gone = repeated(&newest_first);
                history.drain(history.len() - gone.end..history.len() - gone.start);
            }
            history.into_iter().collect::<String>()
        };
        assert_eq!(kept("oabcd"), "oabcd");
        assert_eq!(kept("oabab"), "oabab", "an order is never broken");
        assert_eq!(kept(&format!("o{}", "ab".repeat(100))), "oabab");
        assert_eq!(kept(&format!("o{}", "a".repeat(100))), "oaa");
        assert_eq!(kept(&format!("o{}z", "abcd".repeat(100))), "oabcdabcdz");
    }
}
