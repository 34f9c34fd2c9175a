//! What an operator asks for: a pointer tried again now, and how much of everything there is.

use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::pool::{WORK_WITHIN, within};
use super::sessions::fold_history;
use super::{Error, Store};

/// How much there is, and how old the oldest promise is that Kafka has not.
#[derive(Debug)]
pub(crate) struct Depths {
    /// Sessions by the name of their state.
    pub(crate) sessions: Vec<(String, i64)>,
    pub(crate) oldest_verified_at: Option<OffsetDateTime>,
    /// Pointers in the outbox that Kafka has not refused.
    pub(crate) waiting: i64,
    /// Pointers that Kafka refused.
    pub(crate) parked: i64,
}

impl Store {
    /// Makes a verified session's pointer due now and forgets why it was not taken; with `clear_partition` the key, or
    /// chance, decides where it goes. `false` when the session is not verified any more.
    pub(crate) async fn redrive(&self, id: Uuid, clear_partition: bool, by: &str, now: OffsetDateTime) -> Result<bool, Error> {
        // One statement: the row that is sent and the session that is shown never name two partitions.
        let redriven = query_scalar!(
            r#"with waiting as materialized (
                   -- First, as the relay and `discard` lock them.
                   select number from outbox where session_id = $1 for update),
               moved as (
                   update upload_sessions
                   set version = version + 1, updated_at = $2, error_code = null, error_detail = null, error_items = null,
                       record_partition = case when $3 then null else record_partition end
                   where (select count(*) from waiting) >= 0 and id = $1 and state = 'verified' returning id, version),
               told as (
                   insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
                   select id, version, $2, 'verified', 'verified',
                          case when $3 then 'redrive to any partition was asked for' else 'redrive was asked for' end, $4
                   from moved),
               due as (
                   -- Below zero: the relay tries it even where it remembers that Kafka refuses the topic.
                   update outbox set next_try_at = $2, error = null, attempts = -1, partition = case when $3 then null else partition end
                   where session_id in (select id from moved))
               select exists (select from moved) as "redriven!""#,
            id,
            now,
            clear_partition,
            by
        );
        let redriven = redriven.fetch_one(&self.pool).await?;
        fold_history(&self.pool, id).await?;
        Ok(redriven)
    }

    /// Ends a verified session for good whose pointer Kafka refuses: its reason becomes the session's. `false` when the
    /// pointer is not parked: it was not refused, is being sent, or is published.
    pub(crate) async fn discard(&self, id: Uuid, by: &str, now: OffsetDateTime) -> Result<bool, Error> {
        let discarded = query_scalar!(
            r#"with parked as (
                   select session_id, error from outbox
                   where session_id = $1 and batch is null and error is not null for update),
               moved as (
                   update upload_sessions session
                   set state = 'rejected', version = version + 1, updated_at = $2, cleanup_due_at = $2,
                       error_code = 'unpublishable', error_detail = parked.error, error_items = null,
                       verified_at = null, integrity = null, pointer = null
                   from parked where session.id = parked.session_id and session.state = 'verified'
                   returning session.id, session.version),
               told as (
                   insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
                   select id, version, $2, 'verified', 'rejected', 'Kafka refuses the pointer, and it was discarded', $3 from moved),
               gone as (delete from outbox where session_id in (select id from moved))
               select exists (select from moved) as "discarded!""#,
            id,
            now,
            by
        );
        Ok(discarded.fetch_one(&self.pool).await?)
    }

    /// Counts everything: with millions of sessions it takes a second.
    pub(crate) async fn depths(&self) -> Result<Depths, Error> {
        let outbox = query!(
            r#"select count(*) filter (where error is null) as "waiting!", count(*) filter (where error is not null) as "parked!",
                      (select min(verified_at) from upload_sessions where state = 'verified') as oldest
               from outbox"#
        );
        // First, because it is quick: a database that does not answer is noticed by it.
        let outbox = outbox.fetch_one(&self.pool).await?;
        // In two, because there is an index for each: the whole rows are never read.
        let sessions = query!(
            r#"select 'published' as "state!", count(*) as "count!" from upload_sessions where state = 'published' having count(*) > 0
               union all select state, count(*) from upload_sessions where state <> 'published' group by state"#
        );
        let sessions = within(WORK_WITHIN, async { Ok(sessions.fetch_all(self.pool.unbounded()).await?) }).await?;
        Ok(Depths {
            sessions: sessions.into_iter().map(|row| (row.state, row.count)).collect(),
            oldest_verified_at: outbox.oldest,
            waiting: outbox.waiting,
            parked: outbox.parked,
        })
    }
}
