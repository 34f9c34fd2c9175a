-- The rows of a shard are found by shard and number. With an index on the number alone, PostgreSQL could search the rows of all other
-- shards for those of one shard: a long backlog of one shard then delayed every claim of the others.
-- The table has one row for each pointer that waits, so this takes moments even while some thousands wait.
alter table outbox drop constraint outbox_pkey;
alter table outbox add primary key (shard, number);
-- The primary key, outbox_fresh and outbox_refused replace it.
drop index outbox_due;
