//! Functions for operators: redrive or discard a pointer, and count sessions and outbox rows.

use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::pool::{WORKER_TIMEOUT, with_timeout};
use super::sessions::compact_history;
use super::{Error, Store};

/// Counts of sessions and outbox rows, and the age of the oldest unpublished session.
#[derive(Debug)]
pub(crate) struct Stats {
    /// The number of sessions by state name.
    pub(crate) sessions: Vec<(String, i64)>,
    pub(crate) oldest_verified_at: Option<OffsetDateTime>,
    /// Outbox rows that Kafka has not refused.
    pub(crate) waiting: i64,
    /// Outbox rows that Kafka refused; the API calls them parked.
    pub(crate) parked: i64,
}

impl Store {
    /// Makes a verified session's pointer due now and clears its error. With `clear_partition` it also clears the declared
    /// partition, so the key or chance decides. `false`: the session is not verified.
    pub(crate) async fn redrive(&self, id: Uuid, clear_partition: bool, by: &str, now: OffsetDateTime) -> Result<bool, Error> {
        // One statement, so that the outbox row and the session always name the same partition.
        let redriving = query_scalar!(
            r#"with outbox_row as materialized (
                   -- Locked first, in the same order as by the relay and `discard`.
                   select number from outbox where session_id = $1 for update),
               updated as (
                   update upload_sessions
                   set version = version + 1, updated_at = $2, error_code = null, error_detail = null, error_items = null,
                       record_partition = case when $3 then null else record_partition end
                   where (select count(*) from outbox_row) >= 0 and id = $1 and state = 'verified' returning id, version),
               history as (
                   insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
                   select id, version, $2, 'verified', 'verified',
                          case when $3 then 'redrive to any partition was asked for' else 'redrive was asked for' end, $4
                   from updated),
               due as (
                   -- A negative count makes the relay try the row even while it pauses a topic that Kafka refused.
                   update outbox set next_try_at = $2, error = null, attempts = -1, partition = case when $3 then null else partition end
                   where session_id in (select id from updated))
               select exists (select from updated) as "is_redriven!""#,
            id,
            now,
            clear_partition,
            by
        );
        let is_redriven = redriving.fetch_one(&self.pool).await?;
        compact_history(&self.pool, id).await?;
        Ok(is_redriven)
    }

    /// Rejects a verified session for good whose pointer Kafka refuses, and stores Kafka's error on it. `false`: the pointer is
    /// not deferred, because Kafka has not refused it, or it is being sent or is published.
    pub(crate) async fn discard(&self, id: Uuid, by: &str, now: OffsetDateTime) -> Result<bool, Error> {
        let discarding = query_scalar!(
            r#"with refused as (
                   select session_id, error from outbox
                   where session_id = $1 and batch is null and error is not null for update),
               discarded as (
                   update upload_sessions session
                   set state = 'rejected', version = version + 1, updated_at = $2, cleanup_due_at = $2,
                       error_code = 'unpublishable', error_detail = refused.error, error_items = null,
                       verified_at = null, integrity = null, pointer = null
                   from refused where session.id = refused.session_id and session.state = 'verified'
                   returning session.id, session.version),
               history as (
                   insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
                   select id, version, $2, 'verified', 'rejected', 'Kafka refuses the pointer, and it was discarded', $3 from discarded),
               deleted as (delete from outbox where session_id in (select id from discarded))
               select exists (select from discarded) as "is_discarded!""#,
            id,
            now,
            by
        );
        Ok(discarding.fetch_one(&self.pool).await?)
    }

    /// Counts all sessions and outbox rows. With millions of sessions it takes 1 s.
    pub(crate) async fn stats(&self) -> Result<Stats, Error> {
        let outbox = query!(
            r#"select count(*) filter (where error is null) as "waiting!", count(*) filter (where error is not null) as "parked!",
                      (select min(verified_at) from upload_sessions where state = 'verified') as oldest
               from outbox"#
        );
        // This fast query runs first, so that an unresponsive database is noticed soon.
        let outbox = outbox.fetch_one(&self.pool).await?;
        // Two selects, because each has its own index: so no table row is read.
        let sessions = query!(
            r#"select 'published' as "state!", count(*) as "count!" from upload_sessions where state = 'published' having count(*) > 0
               union all select state, count(*) from upload_sessions where state <> 'published' group by state"#
        );
        let sessions = with_timeout(WORKER_TIMEOUT, async { Ok(sessions.fetch_all(self.pool.worker_pool()).await?) }).await?;
        Ok(Stats {
            sessions: sessions.into_iter().map(|row| (row.state, row.count)).collect(),
            oldest_verified_at: outbox.oldest,
            waiting: outbox.waiting,
            parked: outbox.parked,
        })
    }
}
