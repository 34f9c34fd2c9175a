-- no-transaction
-- Lists of every tenant's uploads in the states that few are in: an administrator looks for what is stuck or has failed.
create index concurrently if not exists upload_sessions_unpublished_of_all on upload_sessions (state, created_at desc, id desc) where state <> 'published';
