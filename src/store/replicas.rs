//! The replicas that publish, and how they share the shards of the outbox.

use sqlx::{query, query_as};
use time::OffsetDateTime;
use uuid::Uuid;

use super::outbox::ShardLease;
use super::{Error, Store};

/// What a replica wants from a renewal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RenewalRequest<'a> {
    pub(crate) owner: Uuid,
    pub(crate) now: OffsetDateTime,
    /// Until when the replica counts, and until when its leases last.
    pub(crate) until: OffsetDateTime,
    /// Shards with a running batch. Their leases are renewed even if the replica owns more than its share.
    pub(crate) running: &'a [i32],
    /// The replica shuts down: it no longer counts and gives back every shard without a running batch.
    pub(crate) is_leaving: bool,
}

/// The outcome of a renewal.
#[derive(Debug)]
pub(crate) struct Renewal {
    shards: Vec<i32>,
    epochs: Vec<i64>,
    /// The replica did not count before.
    pub(crate) has_joined: bool,
    pub(crate) has_acquired: bool,
    pub(crate) has_given_back: bool,
    /// One of the shards has rows in the outbox.
    pub(crate) has_outbox_rows: bool,
    /// A completing session has a lease that has expired.
    pub(crate) has_expired_lease: bool,
    pub(crate) has_other_replicas: bool,
    /// An owner of shards is not among the replicas: a program of an older version, which sends no notifications.
    pub(crate) has_unlisted_owner: bool,
    /// The first time at which another replica or the lease of another replica's shard ends, unless it is renewed.
    pub(crate) next_end: Option<OffsetDateTime>,
}

impl Renewal {
    /// The shards of this replica. A shard that is above the share and has a batch running is not among them.
    pub(crate) fn leases(&self, owner: Uuid) -> Vec<ShardLease> {
        let shards = self.shards.iter().zip(&self.epochs);
        shards.map(|(shard, epoch)| ShardLease { shard: *shard, owner, epoch: *epoch }).collect()
    }
}

impl Store {
    /// Renews the membership of a replica and the leases of its shards, and balances the shards. Afterwards the replica owns
    /// at most its share; what it lacks it takes from the shards that are free or whose lease has expired.
    ///
    /// The shares of all replicas together are exactly the shards: each gets the same number, and the oldest get the
    /// remaining ones. So no two replicas want the same shard, and a replica that joins moves as few shards as possible.
    ///
    /// A new epoch is the database's time in microseconds, so a database that lost commits never issues the same epoch twice.
    /// Otherwise a batch that an earlier owner is still sending could be mistaken for the new owner's.
    ///
    /// The rows of the own shards are locked in the order of their numbers; every other transaction that locks several of them
    /// must keep this order.
    pub(crate) async fn renew_replica(&self, request: RenewalRequest<'_>) -> Result<Renewal, Error> {
        let renewal = query_as!(
            Renewal,
            r#"with other as (
                   select owner, since, until from relay_replicas where owner <> $1 and until > $2),
               own_replica as (
                   insert into relay_replicas (owner, since, until) select $1, $2, $3 where not $5
                   on conflict (owner) do update set until = excluded.until
                   returning since),
               ended as (
                   delete from relay_replicas where owner in (
                       select owner from relay_replicas where case when owner = $1 then $5 else until <= $2 end
                       for update skip locked)),
               share as (
                   select coalesce((
                       select total / replicas + case when older < total % replicas then 1 else 0 end
                       from own_replica
                       cross join (select count(*) as total from relay_shards) shards
                       cross join lateral (
                           select count(*) + 1 as replicas,
                                  count(*) filter (where (other.since, other.owner) < (own_replica.since, $1)) as older
                           from other) counted), 0) as shards),
               own as (
                   select shard, until <= $2 as has_expired, shard = any($4) as is_running,
                          row_number() over (order by shard = any($4) desc, shard) as place
                   from (select shard, until from relay_shards where owner = $1 order by shard for no key update) locked),
               free as (
                   select shard from relay_shards
                   where (owner is null or until <= $2) and owner is distinct from $1
                   order by shard
                   limit (select greatest(shards - (select count(*) from own), 0) from share)
                   for no key update skip locked),
               change as (
                   select shard, place <= shards as is_in_share, is_running or place <= shards as is_kept, has_expired as is_new
                   from own, share
                   union all select shard, true, true, true from free),
               changed as (
                   update relay_shards
                   set owner = case when is_kept then $1 end, until = case when is_kept then $3 end,
                       epoch = case when is_new
                                    then greatest(epoch + 1, (extract(epoch from clock_timestamp()) * 1000000)::bigint)
                                    else epoch end
                   from change where relay_shards.shard = change.shard
                   returning relay_shards.shard, epoch, is_in_share, is_kept, is_new)
               select coalesce(array_agg(shard order by shard) filter (where is_in_share), '{}') as "shards!",
                      coalesce(array_agg(epoch order by shard) filter (where is_in_share), '{}') as "epochs!",
                      exists (select from own_replica where since = $2) as "has_joined!",
                      coalesce(bool_or(is_new), false) as "has_acquired!",
                      coalesce(bool_or(not is_kept), false) as "has_given_back!",
                      coalesce(bool_or(is_in_share and (
                          select number from outbox where outbox.shard = changed.shard order by number limit 1) is not null), false)
                          as "has_outbox_rows!",
                      exists (select from upload_sessions where state = 'completing' and lease_until <= $2)
                          as "has_expired_lease!",
                      exists (select from other) as "has_other_replicas!",
                      exists (select from relay_shards leased
                              where leased.owner <> $1 and leased.until > $2
                                and not exists (select from other where other.owner = leased.owner)) as "has_unlisted_owner!",
                      least((select min(until) from other),
                            (select min(until) from relay_shards where owner <> $1 and until > $2)) as next_end
               from changed"#,
            request.owner,
            request.now,
            request.until,
            request.running,
            request.is_leaving
        );
        Ok(renewal.fetch_one(&self.pool).await?)
    }

    /// Releases all shards of a replica and removes it, so that other replicas do not wait for its leases to end.
    pub(crate) async fn remove_replica(&self, owner: Uuid) -> Result<(), Error> {
        let removed = query!(
            "with removed as (delete from relay_replicas where owner = $1)
             update relay_shards set owner = null, until = null where owner = $1",
            owner
        );
        removed.execute(&self.pool).await?;
        Ok(())
    }
}
