-- no-transaction
-- The refused pointers that are due next, without sorting all that were refused.
create index concurrently if not exists outbox_refused on outbox (shard, next_try_at) where batch is null and error is not null;
