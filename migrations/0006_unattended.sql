-- no-transaction
-- The verifier's choice, tenant by tenant: many sessions of one that wait to be read do not hide another's.
create index concurrently if not exists upload_sessions_unattended on upload_sessions (tenant, lease_until) where state = 'completing';
