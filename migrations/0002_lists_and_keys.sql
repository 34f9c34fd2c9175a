-- What grows with every upload is found by an index, however much there is.

-- version > 0 holds for every row, and only the statement of a list without a tenant says so: a tenant's list goes by the
-- tenant's own index, though the planner may think that going through everybody's newest is as short.
create index upload_sessions_newest_of_all on upload_sessions (created_at desc, id desc) where version > 0;
comment on index upload_sessions_newest_of_all is 'An administrator''s list over all tenants, newest first.';
create index upload_sessions_unpublished on upload_sessions (tenant, state, created_at desc, id desc) where state <> 'published';
comment on index upload_sessions_unpublished is 'Lists of the states that few are in, and their counts: most sessions are published.';
create index idempotency_keys_oldest on idempotency_keys (created_at);
comment on index idempotency_keys_oldest is 'The sweeper''s search for keys to forget, oldest first.';
