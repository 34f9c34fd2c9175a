-- no-transaction
-- What was never refused is found without passing what was: a topic that is gone may have many thousands of pointers.
create index concurrently if not exists outbox_fresh on outbox (shard, number) where batch is null and error is null;
