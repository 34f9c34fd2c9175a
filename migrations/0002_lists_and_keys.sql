-- What grows with every upload is found by an index, however much there is.

-- version > 0 holds for every row, and only the statement of a list without a tenant says so: a tenant's list goes by the
-- tenant's own index, though the planner may think that going through everybody's newest is as short.
create index upload_sessions_newest_of_all on upload_sessions (created_at desc, id desc) where version > 0;
comment on index upload_sessions_newest_of_all is 'An administrator''s list over all tenants, newest first.';
create index upload_sessions_unpublished on upload_sessions (tenant, state, created_at desc, id desc) where state <> 'published';
comment on index upload_sessions_unpublished is 'Lists of the states that few are in, and their counts: most sessions are published.';
create index idempotency_keys_oldest on idempotency_keys (created_at);
comment on index idempotency_keys_oldest is 'The sweeper''s search for keys to forget, oldest first.';

-- Two comments that said what is not so.
comment on column upload_sessions.version is 'Grows by one with every change of state, of a lease''s outcome or of the error; a move names the version it read. A lease renewed, an end slid or a cleanup put off leaves it alone.';
comment on column upload_history.by is 'client:<sub>, broker, verifier, relay, sweeper or audit.';
