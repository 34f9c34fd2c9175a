//! The outbox: pointers that Kafka has not acknowledged, and who may send them.

use sqlx::types::Json;
use sqlx::{PgConnection, query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::pool::{WORK_WITHIN, within};
use super::{Error, Store};
use crate::failpoint;

/// Refused rows that a batch tries again. What was never refused waits until all of them are written back, so they are
/// few; once Kafka takes them, batch follows batch.
const REFUSED_AT_ONCE: i64 = 20;

/// A pointer that waits for Kafka.
#[derive(Debug, Clone)]
pub(crate) struct Waiting {
    pub(crate) number: i64,
    pub(crate) session_id: Uuid,
    pub(crate) topic: String,
    pub(crate) partition: Option<i32>,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) attempts: i32,
    pub(crate) batch: Option<i64>,
}

/// A pointer that Kafka holds.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub(crate) session_id: Uuid,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) at: OffsetDateTime,
}

/// What became of the claim of a shard's next batch.
#[derive(Debug)]
pub(crate) enum Claim {
    /// These rows bear the batch's number now, and are to be sent.
    Stamped { batch: i64, rows: Vec<Waiting> },
    /// Nothing is due.
    Idle,
    /// Another owner or epoch has the shard.
    Taken,
    /// The shard is not as its holder left it, so nothing was stamped: the database lost commits, or somebody else wrote.
    Changed {
        last_batch: i64,
        /// Rows that are stamped, although the holder left none.
        is_unsettled: bool,
    },
}

/// A pointer that Kafka refused, and what is to be written down of it.
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) session_id: Uuid,
    pub(crate) error: String,
    pub(crate) next_try_at: OffsetDateTime,
}

/// The right to relay one shard: good while nobody took it over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ownership {
    pub(crate) shard: i32,
    pub(crate) owner: Uuid,
    pub(crate) epoch: i64,
}

impl Store {
    /// Takes every shard that is free or was ours, and renews the lease to `until`.
    ///
    /// A new epoch is the time in microseconds, so that a database which lost commits never gives out one a second time:
    /// a batch that has been under way since before would be taken for the new owner's.
    pub(crate) async fn own_shards(
        &self,
        owner: Uuid,
        now: OffsetDateTime,
        until: OffsetDateTime,
    ) -> Result<Vec<Ownership>, Error> {
        let rows = query!(
            "update relay_shards set owner = $1, until = $3,
                 epoch = case when owner is distinct from $1 or until <= $2
                              then greatest(epoch + 1, (extract(epoch from $2) * 1000000)::bigint) else epoch end
             where owner is null or owner = $1 or until <= $2
             returning shard, epoch",
            owner,
            now,
            until
        )
        .fetch_all(&self.pool)
        .await?;
        let mut owned: Vec<Ownership> =
            rows.into_iter().map(|row| Ownership { shard: row.shard, owner, epoch: row.epoch }).collect();
        owned.sort_by_key(|owned| owned.shard);
        Ok(owned)
    }

    /// Gives a replica's shards back, so that another need not wait for the lease to end.
    pub(crate) async fn disown_shards(&self, owner: Uuid) -> Result<(), Error> {
        query!("update relay_shards set owner = null, until = null where owner = $1", owner).execute(&self.pool).await?;
        Ok(())
    }

    /// Whether a shard has anything to send or to settle.
    pub(crate) async fn has_waiting(&self, shard: i32) -> Result<bool, Error> {
        let waiting = query_scalar!(
            r#"select exists (select from outbox where shard = $1 and batch is null)
                   or exists (select from outbox where shard = $1 and batch is not null) as "waiting!""#,
            shard
        );
        Ok(waiting.fetch_one(&self.pool).await?)
    }

    /// Rows of a shard that were stamped and not settled: sent, or about to be, when their relay stopped.
    pub(crate) async fn stamped(&self, shard: i32) -> Result<Vec<Waiting>, Error> {
        let rows = sqlx::query_as!(
            Row,
            r#"select number, session_id, topic, partition, key, value, headers as "headers: Json<Vec<(String, String)>>", attempts, batch
               from outbox where shard = $1 and batch is not null order by number"#,
            shard
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(Waiting::from).collect())
    }

    /// Stamps the next batch of a shard with a fresh number, under the shard's row lock, if the shard is as its holder
    /// left it: `last_batch` is the last number, and no row is stamped.
    pub(crate) async fn stamp(&self, owned: Ownership, last_batch: i64, limit: i64, now: OffsetDateTime) -> Result<Claim, Error> {
        let claim = within(WORK_WITHIN, async {
            let mut tx = self.pool.unbounded().begin().await?;
            let claim = stamp(&mut tx, owned, last_batch, limit, now).await?;
            match claim {
                Claim::Stamped { .. } => tx.commit().await?,
                _ => tx.rollback().await?,
            }
            Ok(claim)
        })
        .await?;
        if matches!(claim, Claim::Stamped { .. }) {
            failpoint::reach("relay.stamped").await?;
        }
        Ok(claim)
    }

    /// Takes the stamps of these batches back, but for those that Kafka holds, whether or not that is written down: the
    /// database may have lost it again. `false`, and nothing is done, when the shard is not ours any more: what stands
    /// there now may be the next owner's.
    pub(crate) async fn unstamp(&self, owned: Ownership, batches: &[i64], placed: &[Placed]) -> Result<bool, Error> {
        let published: Vec<Uuid> = placed.iter().map(|placed| placed.session_id).collect();
        let unstamped = query!(
            "with ours as (select shard from relay_shards where shard = $1 and owner = $2 and epoch = $3),
                  free as (update outbox set batch = null
                           where shard = (select shard from ours) and batch = any($4) and session_id <> all($5))
             select exists (select from ours) as \"ours!\"",
            owned.shard,
            owned.owner,
            owned.epoch,
            batches,
            &published
        );
        Ok(unstamped.fetch_one(&self.pool).await?.ours)
    }

    /// Parks rows of a batch, and with each the later ones of its topic and key: Kafka refused them. Nothing is done
    /// to a row that is not stamped as we know it, because another owner has settled it, nor when the shard is not ours
    /// any more: a database that lost commits gives the next owner the same numbers again, of batches and of rows.
    pub(crate) async fn park(&self, owned: Ownership, batch: i64, parked: &[Parked], now: OffsetDateTime) -> Result<(), Error> {
        let ids: Vec<Uuid> = parked.iter().map(|parked| parked.session_id).collect();
        let errors: Vec<String> = parked.iter().map(|parked| parked.error.clone()).collect();
        let times: Vec<OffsetDateTime> = parked.iter().map(|parked| parked.next_try_at).collect();
        query!(
            "with refused as (
                 select * from unnest($1::uuid[], $2::text[], $3::timestamptz[]) as r(session_id, error, next_try_at)),
             parked as (
                 update outbox set batch = null, error = refused.error, next_try_at = refused.next_try_at
                 from refused, relay_shards ours
                 where outbox.session_id = refused.session_id and outbox.batch = $4
                   and ours.shard = $6 and ours.owner = $7 and ours.epoch = $8
                 returning outbox.session_id, outbox.error)
             update upload_sessions session
             set error_code = 'dependency-unavailable', error_detail = parked.error, version = version + 1, updated_at = $5
             from parked
             where session.id = parked.session_id and session.state = 'verified'
               and session.error_detail is distinct from parked.error",
            &ids,
            &errors,
            &times,
            batch,
            now,
            owned.shard,
            owned.owner,
            owned.epoch
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Writes on uploads that wait for a shard why nothing of it is published: on those that say nothing yet, as many as
    /// take no time, behind the outbox row with number `after`. Says on which, and up to which number. They are not parked: they are sent as soon as the shard goes on.
    pub(crate) async fn tell_waiting(
        &self,
        shard: i32,
        why: &str,
        after: i64,
        now: OffsetDateTime,
    ) -> Result<(Vec<Uuid>, i64), Error> {
        let told = query!(
            r#"with waiting as (
                   select number, session_id from outbox
                   where shard = $1 and batch is null and error is null and number > $4 order by number limit 500),
               told as (
                   update upload_sessions session
                   set error_code = 'dependency-unavailable', error_detail = $2, version = version + 1, updated_at = $3
                   from waiting
                   where session.id = waiting.session_id and session.state = 'verified' and session.error_code is null
                   returning session.id)
               select coalesce((select max(number) from waiting), $4) as "last!", array(select id from told) as "ids!""#,
            shard,
            why,
            now,
            after
        );
        let told = within(WORK_WITHIN, async { Ok(told.fetch_one(self.pool.unbounded()).await?) }).await?;
        Ok((told.ids, told.last))
    }

    /// Writes down what Kafka holds, and says of how many sessions it is written now. Saying it twice changes nothing.
    ///
    /// It is fewer than were given where the database does not know a session any more, or does not know that it was
    /// verified. No row of any of them stays in the outbox: Kafka holds their records, so none is to be sent.
    pub(crate) async fn published(&self, placed: &[Placed], now: OffsetDateTime) -> Result<usize, Error> {
        let ids: Vec<Uuid> = placed.iter().map(|placed| placed.session_id).collect();
        let partitions: Vec<i32> = placed.iter().map(|placed| placed.partition).collect();
        let offsets: Vec<i64> = placed.iter().map(|placed| placed.offset).collect();
        let times: Vec<OffsetDateTime> = placed.iter().map(|placed| placed.at).collect();
        let written = within(WORK_WITHIN, async {
            let mut lent = self.pool.unbounded().lend().await?;
            let marking = query_scalar!(
                r#"with placed as (
                     select * from unnest($1::uuid[], $2::int[], $3::bigint[], $4::timestamptz[]) as p(id, partition, number, at)),
                 moved as (
                     update upload_sessions session
                     set state = 'published', version = version + 1, updated_at = $5, error_code = null, error_detail = null,
                         published_partition = placed.partition, published_offset = placed.number, published_at = placed.at
                     from placed where session.id = placed.id and session.state = 'verified'
                     returning session.id, session.version),
                 told as (
                     insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
                     select id, version, $5, 'verified', 'published', 'Kafka acknowledged the pointer', 'relay' from moved),
                 sent as (delete from outbox where session_id = any($1))
                 select (select count(*) from moved) + (
                     select count(*) from upload_sessions where id = any($1) and state = 'published') as "written!""#,
                &ids,
                &partitions,
                &offsets,
                &times,
                now
            );
            let written = marking.fetch_one(&mut *lent).await?;
            lent.give_back();
            Ok(usize::try_from(written).unwrap_or_default())
        })
        .await?;
        failpoint::reach("relay.marked").await?;
        Ok(written)
    }

    /// How many of these sessions, whose pointers Kafka holds, the database takes for unfinished or failed.
    pub(crate) async fn unfinished(&self, published: &[Uuid]) -> Result<i64, Error> {
        let count = query_scalar!(
            r#"select count(*) as "count!" from upload_sessions where id = any($1) and state not in ('verified', 'published')"#,
            published
        );
        Ok(count.fetch_one(&self.pool).await?)
    }

    /// The records that Kafka holds of us, by topic, partition and offset: an embedded broker is rebuilt from them.
    pub(crate) async fn published_records(&self) -> Result<Vec<(Placed, Waiting)>, Error> {
        let rows = query!(
            r#"select id, topic, record_key, pointer as "pointer!", record_headers as "headers: Json<Vec<(String, String)>>", integrity as "integrity!",
                      object_version_id, traceparent,
                      published_partition as "partition!", published_offset as "offset!", published_at as "at!"
               from upload_sessions where state = 'published' order by topic, published_partition, published_offset"#
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| {
                let headers = super::sessions::record_headers(
                    row.id,
                    &row.integrity,
                    row.object_version_id,
                    row.traceparent,
                    row.headers.0,
                );
                let placed = Placed { session_id: row.id, partition: row.partition, offset: row.offset, at: row.at };
                let waiting = Waiting {
                    number: 0,
                    session_id: row.id,
                    topic: row.topic,
                    partition: Some(row.partition),
                    key: row.record_key,
                    value: row.pointer,
                    headers,
                    attempts: 1,
                    batch: None,
                };
                (placed, waiting)
            })
            .collect())
    }
}

/// Stamps what is due: first what was never refused, then, where there is room, what was and may be tried again, so
/// that many refused rows hold up nobody else.
///
/// Neither passes a row of its topic and key. One that was never refused is due at once, whatever its clock said when it
/// was written, and goes before all that were. And every row waits while an earlier one of its key is refused, also
/// when that one is due: it might find no room. So of a key's refused rows one at most is chosen, and which come first
/// of them all does not matter; by number PostgreSQL would look for them in the whole outbox.
async fn stamp(
    tx: &mut PgConnection,
    owned: Ownership,
    last_batch: i64,
    limit: i64,
    now: OffsetDateTime,
) -> Result<Claim, Error> {
    // A stamp that another owner adds while this waits for the lock is not seen, but the epoch is another then.
    let shard = query!(
        r#"select last_batch, exists (select from outbox where shard = $1 and batch is not null) as "is_unsettled!"
           from relay_shards where shard = $1 and owner = $2 and epoch = $3 for update"#,
        owned.shard,
        owned.owner,
        owned.epoch
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(shard) = shard else { return Ok(Claim::Taken) };
    if shard.last_batch != last_batch || shard.is_unsettled {
        return Ok(Claim::Changed { last_batch: shard.last_batch, is_unsettled: shard.is_unsettled });
    }
    let batch = last_batch + 1;
    let rows = sqlx::query_as!(
        Row,
        r#"update outbox set batch = $3, attempts = attempts + 1
           where number in (
               select number from (
                   (select due.number, false as refused from outbox due
                    where due.shard = $1 and due.batch is null and due.error is null
                      and not exists (
                          select from outbox parked
                          where parked.shard = $1 and parked.error is not null
                            and parked.ordering = due.ordering and parked.number < due.number)
                    order by due.number limit $2)
                   union all
                   (select due.number, true from outbox due
                    where due.shard = $1 and due.batch is null and due.error is not null and due.next_try_at <= $4
                      and not exists (
                          select from outbox parked
                          where parked.shard = $1 and parked.error is not null
                            and parked.ordering = due.ordering and parked.number < due.number)
                    order by due.next_try_at limit least($2, $5))) due
               order by refused, number limit $2)
           returning number, session_id, topic, partition, key, value,
                     headers as "headers: Json<Vec<(String, String)>>", attempts, batch"#,
        owned.shard,
        limit,
        batch,
        now,
        REFUSED_AT_ONCE
    )
    .fetch_all(&mut *tx)
    .await?;
    if rows.is_empty() {
        return Ok(Claim::Idle);
    }
    query!("update relay_shards set last_batch = $2 where shard = $1", owned.shard, batch).execute(&mut *tx).await?;
    let mut rows: Vec<Waiting> = rows.into_iter().map(Waiting::from).collect();
    rows.sort_by_key(|row| row.number);
    Ok(Claim::Stamped { batch, rows })
}

struct Row {
    number: i64,
    session_id: Uuid,
    topic: String,
    partition: Option<i32>,
    key: Option<Vec<u8>>,
    value: String,
    headers: Json<Vec<(String, String)>>,
    attempts: i32,
    batch: Option<i64>,
}

impl From<Row> for Waiting {
    fn from(row: Row) -> Self {
        Self {
            number: row.number,
            session_id: row.session_id,
            topic: row.topic,
            partition: row.partition,
            key: row.key,
            value: row.value,
            headers: row.headers.0,
            attempts: row.attempts,
            batch: row.batch,
        }
    }
}
