//! What opening and moving a session write, inside the transaction of whoever asked.

use lfs_broker_client::api::UploadState;
use lfs_broker_client::checksum::Sha256;
use sqlx::types::Json;
use sqlx::{PgConnection, query};
use time::OffsetDateTime;
use uuid::Uuid;

use super::row::{self, Columns, Row, record_headers, rows};
use super::{Created, Move, Quota};
use crate::session::{Session, State, ordering, shard};
use crate::store::Error;

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

pub(super) async fn insert_parts(connection: &mut PgConnection, id: Uuid, parts: &[(u32, Sha256)]) -> Result<(), Error> {
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

pub(super) async fn create(
    tx: &mut PgConnection,
    session: &Session,
    part_hashes: &[Sha256],
    idempotency: Option<(&str, &[u8])>,
    quota: Quota,
) -> Result<Created, Error> {
    insert(tx, session).await?;
    insert_parts(tx, session.id, &number(part_hashes)).await?;
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
        .await
        .map_err(Error::from);
        match taken.map(|taken| taken.rows_affected()) {
            // It waited for whoever stores the same key.
            Err(Error::Busy) => return Ok(Created::KeyInFlight),
            Err(error) => return Err(error),
            Ok(0) => return Ok(Created::KeyTaken),
            Ok(_) => {}
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
    Ok(Created::New)
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

/// `None`: somebody moved the session first.
pub(super) async fn save(tx: &mut PgConnection, step: &Move<'_>, shards: i32) -> Result<Option<Row>, Error> {
    let session = step.to;
    let key = session.promise.key.as_deref();
    if let (State::Verified(_), Some(ordering)) = (&session.state, ordering(&session.promise.topic, key)) {
        query!("select pg_advisory_xact_lock($1)", ordering).execute(&mut *tx).await?;
    }
    let Some(row) = update(tx, step).await? else { return Ok(None) };
    remember(tx, step, row.version).await?;
    // Whoever goes straight has four transitions.
    if row.version > STRAIGHT {
        fold_history(tx, session.id).await?;
    }
    let held = |state| matches!(state, UploadState::Open | UploadState::Completing);
    if held(step.from) && !held(session.state.name()) {
        query!(
            "update tenants set open_sessions = open_sessions - 1, reserved_bytes = reserved_bytes - $2 where tenant = $1",
            session.tenant,
            // What a URL may still bring counts until it ends.
            if Columns::of(session, step.now).bytes_held_until.is_some() { 0 } else { size(session) }
        )
        .execute(&mut *tx)
        .await?;
    }
    if let State::Verified(_) = &session.state {
        promise_pointer(tx, session, shards, step.now).await?;
    }
    Ok(Some(row))
}

/// Signing parts slides a session's end and leaves its version alone: whoever ends it asks for the end that holds now.
async fn update(tx: &mut PgConnection, step: &Move<'_>) -> Result<Option<Row>, Error> {
    let session = step.to;
    let c = Columns::of(session, step.now);
    let row = rows!(
        "update upload_sessions set version = version + 1, updated_at = $4, state = $3,
             checksum = $5, traceparent = $6, lease_owner = $7, lease_until = $8, lease_attempt = $9, must_read = $10,
             verified_at = $11, integrity = $12, object_etag = $13, object_version_id = $14, pointer = $15,
             error_code = $16, error_detail = $17, error_items = $18, cleanup_due_at = $19,
             checksum_by_complete = $21, bytes_held_until = $22
         where id = $1 and version = $2 and state = $20 and ($3 <> 'expired' or expires_at <= $4) returning ",
        "",
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
        step.from.name(),
        session.digest_by_complete,
        c.bytes_held_until
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

/// Keeps a history from growing with what repeats itself, such as a complete that comes too early a thousand times: of
/// a round of transitions the first and the last are kept. Whatever else happens, [`HISTORY`] rows are kept at most: the
/// first and the newest.
pub(in crate::store) async fn fold_history(connection: &mut PgConnection, id: Uuid) -> Result<(), Error> {
    let last = query!(
        "select version, from_state, to_state, reason from upload_history where session_id = $1 order by version desc limit $2",
        id,
        3 * LONGEST_ROUND
    );
    let last = last.fetch_all(&mut *connection).await?;
    let transitions: Vec<_> = last.iter().map(|row| (&row.from_state, &row.to_state, &row.reason)).collect();
    let versions: Vec<i64> = repeated(&transitions).map(|index| last[index].version).collect();
    query!(
        "delete from upload_history where session_id = $1 and (version = any($2) or version in (
             select version from upload_history where session_id = $1 and from_state is not null order by version desc offset $3))",
        id,
        &versions,
        HISTORY - 1
    )
    .execute(connection)
    .await?;
    Ok(())
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
