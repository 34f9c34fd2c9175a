//! Saves single PUTs that were verified without a claim. Those of one tenant that are verified together are saved by one statement.

use std::sync::Arc;

use sqlx::query_scalar;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::create::hex;
use super::write::{self, all_headers};
use crate::failpoint;
use crate::session::{Session, State, ordering_key, shard};
use crate::store::group_commit::{for_each_call, may_be_one_calls_fault};
use crate::store::{Error, Store};

/// A session that was open and is verified, before it is saved.
pub(crate) struct VerifiedPut {
    /// The verified session, with the version that it had while it was open.
    pub(crate) session: Session,
    /// When the completion began.
    pub(crate) claimed_at: OffsetDateTime,
    /// Who asked for the completion, for the history.
    pub(crate) by: String,
    /// What was verified, for the history.
    pub(crate) reason: String,
}

/// A [`VerifiedPut`] as the statement reads it.
#[derive(serde::Serialize)]
struct VerifiedRow<'a> {
    id: Uuid,
    version: i64,
    #[serde(with = "time::serde::rfc3339")]
    claimed_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    verified_at: OffsetDateTime,
    by: &'a str,
    reason: &'a str,
    checksum: Option<String>,
    checksum_by_complete: bool,
    traceparent: Option<&'a str>,
    integrity: &'a str,
    object_etag: Option<&'a str>,
    object_version_id: Option<&'a str>,
    pointer: &'a str,
    shard: i32,
    ordering: Option<i64>,
    headers: Vec<(String, String)>,
}

impl<'a> VerifiedRow<'a> {
    /// `None`: the session is not verified.
    fn of(put: &'a VerifiedPut, shards: i32) -> Option<Self> {
        let session = &put.session;
        let State::Verified(verification) = &session.state else { return None };
        let spec = &session.spec;
        Some(Self {
            id: session.id,
            version: session.version,
            claimed_at: put.claimed_at,
            verified_at: verification.verified_at,
            by: &put.by,
            reason: &put.reason,
            checksum: spec.digest.as_ref().map(|digest| hex(&digest.value)),
            checksum_by_complete: session.digest_by_complete,
            traceparent: spec.traceparent.as_deref(),
            integrity: verification.integrity.name(),
            object_etag: verification.etag.as_deref(),
            object_version_id: verification.version_id.as_deref(),
            pointer: &verification.pointer,
            shard: shard(&spec.topic, spec.key.as_deref(), session.id, shards),
            ordering: ordering_key(&spec.topic, spec.key.as_deref()),
            headers: all_headers(session, verification),
        })
    }
}

impl Store {
    /// Saves a single PUT that was verified without a claim, with its outbox row, unless another writer changed the session first.
    pub(crate) async fn save_verified(&self, put: VerifiedPut) -> Result<Session, Error> {
        let shards = self.deployment().await?.shards;
        let store = self.clone();
        let save = move |group: Vec<Arc<VerifiedPut>>| {
            let store = store.clone();
            async move { store.save_verified_group(&group, shards).await }
        };
        let tenant = put.session.tenant.clone();
        let saved = self.pool.with_timeout(self.verified_puts.run(&tenant, Arc::new(put), save)).await?;
        write::compact_history_if_long(&self.pool, saved.id, saved.version).await;
        failpoint::reach("saved.verified").await?;
        Ok(saved)
    }

    /// Saves a group of verified PUTs of one tenant. If one may have made the statement fail, each is saved alone.
    async fn save_verified_group(&self, group: &[Arc<VerifiedPut>], shards: i32) -> Vec<Result<Session, Error>> {
        match self.update_verified(group, shards).await {
            Ok(saved) => group.iter().map(|put| saved_session(put, &saved)).collect(),
            Err(error) if group.len() == 1 => vec![Err(error.into())],
            Err(error) if !may_be_one_calls_fault(&error) => for_each_call(&error, group.len()),
            Err(_) => {
                let mut results = Vec::with_capacity(group.len());
                for put in group {
                    let saved = self.update_verified(std::slice::from_ref(put), shards).await;
                    results.push(saved.map_err(Error::from).and_then(|saved| saved_session(put, &saved)));
                }
                results
            }
        }
    }

    /// Moves sessions of one tenant from open through completing to verified. Returns the ids of those that no other writer
    /// changed first.
    ///
    /// It writes what a claim and its outcome write one after the other: two changes of state, the quota and the outbox row.
    /// The locks on topic and key are taken before anything else, in one order, and held until the commit.
    async fn update_verified(&self, group: &[Arc<VerifiedPut>], shards: i32) -> Result<Vec<Uuid>, sqlx::Error> {
        let tenant = &group[0].session.tenant;
        let rows: Vec<VerifiedRow<'_>> = group.iter().filter_map(|put| VerifiedRow::of(put, shards)).collect();
        let _permit = self.tenant_limiter.acquire(tenant).await;
        let saved = query_scalar!(
            r#"with verified as materialized (
                 select * from jsonb_to_recordset($2::jsonb) as v(
                     id uuid, version bigint, claimed_at timestamptz, verified_at timestamptz, by text, reason text, checksum bytea,
                     checksum_by_complete bool, traceparent text, integrity text, object_etag text, object_version_id text,
                     pointer text, shard int, ordering bigint, headers jsonb)),
             ordering_locks as materialized (
                 select pg_advisory_xact_lock(ordering)
                 from (select distinct ordering from verified where ordering is not null order by ordering) keys),
             saved as (
                 update upload_sessions session set version = session.version + 2, state = 'verified', updated_at = v.verified_at,
                     checksum = v.checksum, checksum_by_complete = v.checksum_by_complete, traceparent = v.traceparent,
                     verified_at = v.verified_at, integrity = v.integrity, object_etag = v.object_etag,
                     object_version_id = v.object_version_id, pointer = v.pointer,
                     error_code = null, error_detail = null, error_items = null
                 from verified v
                 where (select count(*) from ordering_locks) >= 0
                     and session.id = v.id and session.version = v.version and session.state = 'open'
                 returning session.id, session.version, session.size_bytes, session.topic, session.record_partition,
                     session.record_key, session.pointer, session.verified_at, v.claimed_at, v.by, v.reason, v.shard, v.ordering,
                     v.headers),
             history as (
                 insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
                 select id, version - 1, claimed_at, 'open', 'completing', 'the client requested completion', by from saved
                 union all
                 select id, version, verified_at, 'completing', 'verified', reason, 'broker' from saved),
             released_quota as (
                 update tenants t set open_sessions = t.open_sessions - ended.sessions,
                     reserved_bytes = t.reserved_bytes - ended.bytes
                 from (select count(*) as sessions, sum(size_bytes)::bigint as bytes from saved) ended
                 where t.tenant = $1 and ended.sessions > 0),
             enqueued as (
                 insert into outbox (session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at)
                 select id, shard, topic, ordering, record_partition, record_key, pointer, headers, verified_at, verified_at
                 from saved)
             select id from saved"#,
            tenant,
            Json(rows) as _
        );
        saved.fetch_all(&self.pool).await
    }
}

/// The session as it was saved, if it is among those that were saved.
fn saved_session(put: &VerifiedPut, saved: &[Uuid]) -> Result<Session, Error> {
    let session = put.session.clone();
    match (&session.state, saved.contains(&session.id)) {
        (State::Verified(verification), true) => {
            Ok(Session { version: session.version + 2, updated_at: verification.verified_at, ..session })
        }
        _ => Err(Error::VersionConflict(session.id)),
    }
}
