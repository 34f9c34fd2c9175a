//! Stores new sessions. Opens of one tenant that arrive together are stored by one statement.

use std::sync::Arc;

use lfs_broker_client::api::Policy;
use lfs_broker_client::checksum::Sha256;
use sqlx::postgres::PgDatabaseError;
use sqlx::types::Json;
use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::row;
use super::{CreateOutcome, Quota};
use crate::failpoint;
use crate::session::Session;
use crate::store::group_commit::{for_each_call, may_be_one_calls_fault};
use crate::store::{Error, Store};

/// A session with more part hashes is stored alone: others must not wait for its 10,000 rows.
const MAX_GROUPED_PART_HASHES: usize = 100;

/// The policy of a topic, and the JSON that the database holds; `None`: the topic has none.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StoredPolicy {
    pub(crate) policy: Option<Policy>,
    pub(crate) json: Option<serde_json::Value>,
}

/// A session to store, with what is stored beside it.
pub(crate) struct NewSession {
    pub(crate) session: Session,
    pub(crate) part_hashes: Vec<Sha256>,
    /// The idempotency key and the digest of the request.
    pub(crate) idempotency: Option<(String, Sha256)>,
    /// The policy that allowed the session. It must still be the stored one.
    pub(crate) policy: Arc<StoredPolicy>,
}

/// A [`NewSession`] as the statement reads it. Bytes are in PostgreSQL's hex format.
#[derive(serde::Serialize)]
struct NewRow<'a> {
    id: Uuid,
    subject: &'a str,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    expires_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    expires_latest_at: OffsetDateTime,
    topic: &'a str,
    record_key: Option<String>,
    record_partition: Option<i32>,
    record_headers: &'a [(String, String)],
    traceparent: Option<&'a str>,
    content_type: &'a str,
    filename: Option<&'a str>,
    size_bytes: u64,
    checksum_alg: &'a str,
    checksum: Option<String>,
    min_integrity: &'a str,
    bucket: &'a str,
    object_key: &'a str,
    kms_key_id: Option<&'a str>,
    mode: &'a str,
    part_size_bytes: Option<i64>,
    part_count: Option<i32>,
    part_hashes: &'a str,
    url_seconds: u32,
    session_seconds: u32,
    part_sha256: Vec<String>,
    policy: Option<&'a serde_json::Value>,
    key: Option<&'a str>,
    request_sha256: Option<String>,
}

impl<'a> From<&'a NewSession> for NewRow<'a> {
    fn from(new: &'a NewSession) -> Self {
        let (session, spec) = (&new.session, &new.session.spec);
        let (mode, part_size_bytes, part_count, part_hashes) = row::layout_columns(spec.layout);
        Self {
            id: session.id,
            subject: &session.subject,
            created_at: session.created_at,
            expires_at: session.expires_at,
            expires_latest_at: session.expires_latest_at,
            topic: &spec.topic,
            record_key: spec.key.as_deref().map(hex),
            record_partition: spec.partition,
            record_headers: &spec.headers,
            traceparent: spec.traceparent.as_deref(),
            content_type: &spec.content_type,
            filename: spec.filename.as_deref(),
            size_bytes: spec.size_bytes,
            checksum_alg: spec.algorithm.name(),
            checksum: spec.digest.as_ref().map(|digest| hex(&digest.value)),
            min_integrity: spec.min_integrity.name(),
            bucket: &session.bucket,
            object_key: &session.object_key,
            kms_key_id: spec.kms_key_id.as_deref(),
            mode,
            part_size_bytes,
            part_count,
            part_hashes,
            url_seconds: spec.url_seconds,
            session_seconds: spec.session_seconds,
            part_sha256: new.part_hashes.iter().map(|sha256| hex(&sha256.0)).collect(),
            policy: new.policy.json.as_ref(),
            key: new.idempotency.as_ref().map(|(key, _)| key.as_str()),
            request_sha256: new.idempotency.as_ref().map(|(_, sha256)| hex(&sha256.0)),
        }
    }
}

/// Bytes in the hex format of `bytea` (PostgreSQL, 8.4.1).
pub(super) fn hex(bytes: &[u8]) -> String {
    format!("\\x{}", hex::encode(bytes))
}

impl Store {
    /// Stores a new session, its part hashes, its idempotency key and its quota usage: all of it or nothing, and only while
    /// its policy is the stored one.
    pub(crate) async fn create(&self, new: NewSession, quota: Quota) -> Result<CreateOutcome, Error> {
        let store = self.clone();
        let create = move |group: Vec<Arc<NewSession>>| {
            let store = store.clone();
            async move { store.create_group(&group, quota).await }
        };
        let tenant = new.session.tenant.clone();
        let outcome = self
            .pool
            .with_timeout(async {
                match new.part_hashes.len() {
                    0..=MAX_GROUPED_PART_HASHES => self.opens.run(&tenant, Arc::new(new), create).await,
                    _ => self.create_one(&Arc::new(new), quota).await,
                }
            })
            .await?;
        failpoint::reach("open.stored").await?;
        Ok(outcome)
    }

    /// Stores a group of sessions of one tenant. If not all can be stored together, each is stored alone.
    async fn create_group(&self, group: &[Arc<NewSession>], quota: Quota) -> Vec<Result<CreateOutcome, Error>> {
        if let [new] = group {
            return vec![self.create_one(new, quota).await];
        }
        match self.insert(group, quota).await {
            Ok(outcomes) if !outcomes.contains(&None) => outcomes.into_iter().flatten().map(Ok).collect(),
            Err(error) if !may_be_one_calls_fault(&error) && !is_key_locked(&error) => for_each_call(&error, group.len()),
            Ok(_) | Err(_) => {
                let mut outcomes = Vec::with_capacity(group.len());
                for new in group {
                    outcomes.push(self.create_one(new, quota).await);
                }
                outcomes
            }
        }
    }

    async fn create_one(&self, new: &Arc<NewSession>, quota: Quota) -> Result<CreateOutcome, Error> {
        match self.insert(std::slice::from_ref(new), quota).await {
            Ok(outcomes) => match outcomes.into_iter().flatten().next() {
                Some(outcome) => Ok(outcome),
                None => {
                    let open_sessions = query_scalar!("select open_sessions from tenants where tenant = $1", new.session.tenant);
                    let open_sessions = open_sessions.fetch_optional(&self.pool).await?.unwrap_or(0);
                    let has_too_many = quota.open_sessions > 0 && open_sessions >= quota.open_sessions;
                    Ok(if has_too_many { CreateOutcome::TooManySessions } else { CreateOutcome::TooManyBytes })
                }
            },
            Err(error) if is_duplicate_key(&error) => Ok(CreateOutcome::KeyExists),
            Err(error) if is_key_locked(&error) => Ok(CreateOutcome::KeyInFlight),
            Err(error) => Err(error.into()),
        }
    }

    /// Inserts new sessions of one tenant. `None`: they would exceed the tenant's quota together, so none was inserted.
    ///
    /// It is one statement, because every open of a tenant waits for the tenant's row. So no round trip happens while the row
    /// is locked.
    async fn insert(&self, group: &[Arc<NewSession>], quota: Quota) -> Result<Vec<Option<CreateOutcome>>, sqlx::Error> {
        let tenant = &group[0].session.tenant;
        let rows: Vec<NewRow<'_>> = group.iter().map(|new| NewRow::from(&**new)).collect();
        let _permit = self.tenant_limiter.acquire(tenant).await;
        let inserted = query!(
            r#"with opening as materialized (
                 select o.*, o.policy is not distinct from (select t.policy from topics t where t.topic = o.topic) as has_current_policy,
                     -- Not `exists`: PostgreSQL would rather hash all keys of the tenant than look up a hundred.
                     coalesce((select true from idempotency_keys k where k.tenant = $1 and k.subject = o.subject and k.key = o.key
                         limit 1), false) as key_exists
                 from jsonb_to_recordset($2::jsonb) as o(
                     id uuid, subject text, created_at timestamptz, expires_at timestamptz, expires_latest_at timestamptz,
                     topic text, record_key bytea, record_partition int, record_headers jsonb, traceparent text,
                     content_type text, filename text, size_bytes bigint, checksum_alg text, checksum bytea, min_integrity text,
                     bucket text, object_key text, kms_key_id text, mode text, part_size_bytes bigint, part_count int,
                     part_hashes text, url_seconds int, session_seconds int, part_sha256 text[], policy jsonb, key text,
                     request_sha256 bytea)),
             accepted as (select * from opening where has_current_policy and not key_exists),
             reserved as (
                 insert into tenants as t (tenant, open_sessions, reserved_bytes)
                 select $1::text, count(*), sum(size_bytes)::bigint from accepted
                 having count(*) > 0 and ($3::bigint = 0 or count(*) <= $3) and ($4::bigint = 0 or sum(size_bytes) <= $4)
                 on conflict (tenant) do update set open_sessions = t.open_sessions + excluded.open_sessions,
                     reserved_bytes = t.reserved_bytes + excluded.reserved_bytes
                 where ($3 = 0 or t.open_sessions + excluded.open_sessions <= $3)
                     and ($4 = 0 or t.reserved_bytes + excluded.reserved_bytes <= $4
                         -- Together with the bytes that URLs of failed uploads may still store, at most twice the quota.
                         and t.reserved_bytes + excluded.reserved_bytes + t.held_bytes - $4 <= $4)
                 returning tenant),
             opened as (
                 insert into upload_sessions (
                     id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at,
                     topic, record_key, record_partition, record_headers, traceparent, content_type, filename,
                     size_bytes, checksum_alg, checksum, min_integrity, bucket, object_key, kms_key_id,
                     mode, part_size_bytes, part_count, part_hashes, url_seconds, session_seconds)
                 select id, tenant, subject, 'open', created_at, created_at, expires_at, expires_latest_at,
                     topic, record_key, record_partition, record_headers, traceparent, content_type, filename,
                     size_bytes, checksum_alg, checksum, min_integrity, bucket, object_key, kms_key_id,
                     mode, part_size_bytes, part_count, part_hashes, url_seconds, session_seconds
                 from accepted, reserved),
             history as (
                 insert into upload_history (session_id, version, at, to_state, reason, by)
                 select id, 1, created_at, 'open', 'opened', 'client:' || subject from accepted, reserved),
             part_hashes as (
                 insert into upload_parts (session_id, part_number, sha256)
                 select id, part.number, part.sha256::bytea
                 from accepted, reserved, unnest(part_sha256) with ordinality as part(sha256, number)),
             idempotency_key as (
                 insert into idempotency_keys (tenant, subject, key, request_sha256, session_id, created_at)
                 select tenant, subject, key, request_sha256, id, created_at from accepted, reserved where key is not null)
             select id as "id!", has_current_policy as "has_current_policy!", key_exists as "key_exists!",
                 exists (select from reserved) as "is_reserved!"
             from opening"#,
            tenant,
            Json(rows) as _,
            quota.open_sessions,
            quota.reserved_bytes
        );
        let inserted = inserted.fetch_all(&self.pool).await?;
        let outcome = |new: &Arc<NewSession>| {
            let row = inserted.iter().find(|row| row.id == new.session.id)?;
            match (row.key_exists, row.has_current_policy, row.is_reserved) {
                (true, _, _) => Some(CreateOutcome::KeyExists),
                (false, false, _) => Some(CreateOutcome::PolicyChanged),
                (false, true, true) => Some(CreateOutcome::Created),
                (false, true, false) => None,
            }
        };
        Ok(group.iter().map(outcome).collect())
    }
}

/// 23505, unique_violation: another request has stored the same idempotency key meanwhile.
fn is_duplicate_key(error: &sqlx::Error) -> bool {
    let error = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.is_some_and(|error| error.code() == "23505" && error.constraint() == Some("idempotency_keys_pkey"))
}

/// 55P03, lock_not_available: another request is storing the same idempotency key.
fn is_key_locked(error: &sqlx::Error) -> bool {
    let error = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.is_some_and(|error| error.code() == "55P03" && error.r#where().is_some_and(|at| at.contains("idempotency_keys")))
}
