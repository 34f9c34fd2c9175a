//! Claims batches: one statement gives the due rows of many shards to their owner.

use std::collections::BTreeMap;

use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{OutboxRow, ShardLease};
use crate::store::pool::{WORKER_TIMEOUT, with_timeout};
use crate::store::{Error, Store};

/// How many refused rows one batch retries. The number is small, because rows that were never refused wait until the retried rows
/// are deferred again. When Kafka accepts the retried rows, the next batch follows at once.
const MAX_RETRIED_ROWS: i64 = 20;

/// A shard whose next batch is to be claimed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClaimRequest {
    pub(crate) lease: ShardLease,
    /// The last batch number that the owner knows; `None` if the owner has not taken over the shard yet. Then no row is
    /// claimed.
    pub(crate) last_batch: Option<i64>,
}

/// The outcome of claiming the next batch of a shard.
#[derive(Debug)]
pub(crate) enum Claim {
    /// These rows have the batch's number now and must be sent.
    Claimed { batch: i64, rows: Vec<OutboxRow> },
    /// No row is due. A shard that is not taken over has no rows at all.
    Idle,
    /// The shard has rows, but the owner must take it over first.
    NotTakenOver,
    /// Another transaction has locked or just changed the shard, so no row was claimed. The owner should try again.
    Busy,
    /// Another owner or a later epoch has the shard.
    ShardLost,
    /// The shard's state differs from the state that its owner wrote last, so no row was claimed. The database lost commits, or
    /// another process wrote to the shard.
    Changed {
        last_batch: i64,
        /// Whether rows are claimed although the owner left none claimed.
        has_claimed_rows: bool,
    },
}

impl Store {
    /// Claims the next batch of each shard in one statement: it writes a new batch number to at most `limit` rows of the shard.
    /// It requires that the shard is as its owner left it: the last batch number is `last_batch`, and no row is claimed. The
    /// claims are in the order of the requests.
    ///
    /// Rows that were never refused come first, then refused rows that may be retried. So many refused rows do not delay the
    /// others. No row overtakes an earlier row of its topic and key. A row that was never refused is due at once, whatever its
    /// `next_try_at`. A row waits while an earlier row of its key is refused, even if that row is due, because the batch may have
    /// no room for it. So at most one refused row of each key is chosen, and the order among refused rows does not matter. They
    /// are ordered by `next_try_at`: ordering them by number would make PostgreSQL search the whole outbox.
    ///
    /// All parts of the statement see the same snapshot, but `for update` reads the newest version of a shard's row and compares
    /// owner and epoch again. So an owner that lost the shard meanwhile claims nothing, and neither does one whose earlier claim
    /// was committed without its knowledge: then the last batch number differs. A locked shard is skipped, so it does not delay
    /// the others. Only shards with due rows are locked, because a lock makes the commit wait for the disk.
    pub(crate) async fn claim_batches(
        &self,
        requests: &[ClaimRequest],
        limit: i64,
        now: OffsetDateTime,
    ) -> Result<Vec<Claim>, Error> {
        let shards: Vec<i32> = requests.iter().map(|request| request.lease.shard).collect();
        let owners: Vec<Uuid> = requests.iter().map(|request| request.lease.owner).collect();
        let epochs: Vec<i64> = requests.iter().map(|request| request.lease.epoch).collect();
        let last_batches: Vec<Option<i64>> = requests.iter().map(|request| request.last_batch).collect();
        let claims = sqlx::query_as!(
            ClaimedRow,
            r#"with request as (
                   select * from unnest($1::int[], $2::uuid[], $3::bigint[], $4::bigint[]) as r(shard, owner, epoch, known_batch)),
               -- Each search is ordered as its index is. An `exists` could scan the rows of all other shards.
               found as materialized (
                   select request.*, lease.last_batch,
                       (select batch from outbox where shard = request.shard and batch is not null order by batch limit 1) as claimed_batch,
                       (select number from outbox where shard = request.shard and batch is null and error is null
                        order by number limit 1) as fresh_number,
                       (select next_try_at from outbox where shard = request.shard and batch is null and error is not null
                        order by next_try_at limit 1) as next_retry_at
                   from request join relay_shards lease using (shard, owner, epoch)),
               leased as (
                   select *, claimed_batch is not null as has_claimed, fresh_number is not null or next_retry_at is not null as has_unclaimed,
                       coalesce(fresh_number is not null or next_retry_at <= $5, false) as has_due from found),
               locked as (
                   select lease.shard, lease.last_batch from leased join relay_shards lease using (shard, owner, epoch)
                   where leased.known_batch = leased.last_batch and leased.has_due and not leased.has_claimed
                   for update of lease skip locked),
               due as materialized (
                   select leased.shard, leased.known_batch + 1 as batch, array(
                       select number from (
                           (select fresh.number, false as refused from outbox fresh
                            where fresh.shard = leased.shard and fresh.batch is null and fresh.error is null
                              and not exists (select from outbox earlier where earlier.shard = leased.shard and earlier.error is not null
                                                  and earlier.ordering = fresh.ordering and earlier.number < fresh.number)
                            order by fresh.number limit $6)
                           union all
                           (select retried.number, true from outbox retried
                            where retried.shard = leased.shard and retried.batch is null and retried.error is not null
                              and retried.next_try_at <= $5
                              and not exists (select from outbox earlier where earlier.shard = leased.shard and earlier.error is not null
                                                  and earlier.ordering = retried.ordering and earlier.number < retried.number)
                            order by retried.next_try_at limit least($6, $7))) candidate
                       order by refused, number limit $6) as numbers
                   from leased join locked on locked.shard = leased.shard and locked.last_batch = leased.known_batch),
               claimed as (
                   update outbox set batch = due.batch, attempts = attempts + 1 from due
                   where outbox.shard = due.shard and outbox.number = any(due.numbers) returning outbox.*),
               numbered as (
                   update relay_shards set last_batch = claimed.batch
                   from (select distinct shard, batch from claimed) claimed where relay_shards.shard = claimed.shard)
               select request.shard as "shard!", leased.shard is not null as "is_leased!",
                      coalesce(locked.last_batch, leased.last_batch) as last_batch,
                      coalesce(leased.has_claimed, false) as "has_claimed_rows!",
                      coalesce(leased.has_unclaimed, false) as "has_unclaimed_rows!",
                      coalesce(leased.has_due and locked.shard is null, false) as "is_busy!", claimed.batch,
                      claimed.session_id as "session_id?", claimed.topic as "topic?", claimed.partition, claimed.key,
                      claimed.value as "value?", claimed.headers as "headers?: Json<Vec<(String, String)>>",
                      claimed.attempts as "attempts?"
               from request left join leased using (shard) left join locked using (shard) left join claimed using (shard)
               order by request.shard, claimed.number"#,
            &shards,
            &owners,
            &epochs,
            &last_batches as &[Option<i64>],
            now,
            limit,
            MAX_RETRIED_ROWS
        );
        let rows = with_timeout(WORKER_TIMEOUT, async { Ok(claims.fetch_all(self.pool.worker_pool()).await?) }).await?;
        Ok(claims_of(requests, rows))
    }
}

/// The claims in the order of the requests, from the result of the statement.
fn claims_of(requests: &[ClaimRequest], rows: Vec<ClaimedRow>) -> Vec<Claim> {
    let mut by_shard: BTreeMap<i32, Vec<ClaimedRow>> = BTreeMap::new();
    for row in rows {
        by_shard.entry(row.shard).or_default().push(row);
    }
    requests.iter().map(|request| claim(*request, by_shard.remove(&request.lease.shard).unwrap_or_default())).collect()
}

/// The claim of one shard, from its rows in the result of the statement.
fn claim(request: ClaimRequest, rows: Vec<ClaimedRow>) -> Claim {
    let Some(first) = rows.first().filter(|first| first.is_leased) else { return Claim::ShardLost };
    let (found, has_claimed_rows) = (first.last_batch.unwrap_or_default(), first.has_claimed_rows);
    let (has_unclaimed_rows, is_busy) = (first.has_unclaimed_rows, first.is_busy);
    let Some(known) = request.last_batch else {
        return if has_claimed_rows || has_unclaimed_rows { Claim::NotTakenOver } else { Claim::Idle };
    };
    if found != known || has_claimed_rows {
        return Claim::Changed { last_batch: found, has_claimed_rows };
    }
    let rows: Vec<OutboxRow> = rows.into_iter().filter_map(ClaimedRow::into_outbox_row).collect();
    match rows.is_empty() {
        true if is_busy => Claim::Busy,
        true => Claim::Idle,
        false => Claim::Claimed { batch: known + 1, rows },
    }
}

/// A row of the statement that claims batches: what it found out about a shard, and one claimed row.
struct ClaimedRow {
    shard: i32,
    is_leased: bool,
    last_batch: Option<i64>,
    has_claimed_rows: bool,
    has_unclaimed_rows: bool,
    is_busy: bool,
    session_id: Option<Uuid>,
    topic: Option<String>,
    partition: Option<i32>,
    key: Option<Vec<u8>>,
    value: Option<String>,
    headers: Option<Json<Vec<(String, String)>>>,
    attempts: Option<i32>,
    batch: Option<i64>,
}

impl ClaimedRow {
    /// The claimed row; `None` if no row of the shard was claimed.
    fn into_outbox_row(self) -> Option<OutboxRow> {
        Some(OutboxRow {
            session_id: self.session_id?,
            topic: self.topic?,
            partition: self.partition,
            key: self.key,
            value: self.value?,
            headers: self.headers?.0,
            attempts: self.attempts?,
            batch: self.batch,
        })
    }
}
