-- What failed uploads may still bring through their URLs is counted beside the quota, not in it.

alter table tenants add column held_bytes bigint not null default 0;
comment on column tenants.held_bytes is 'The promised sizes of failed sessions whose URLs may still bring the bytes. With reserved_bytes at most twice the quota.';
comment on column tenants.reserved_bytes is 'The sum of their promised sizes in bytes.';
comment on column upload_sessions.bytes_held_until is 'The session has failed, but until then a URL may still bring its bytes, so that they count in tenants.held_bytes. Null: they do not count.';
