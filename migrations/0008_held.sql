-- no-transaction
-- Failed sessions whose bytes count until their last URL has ended.
create index concurrently if not exists upload_sessions_held on upload_sessions (bytes_held_until) where bytes_held_until is not null;
