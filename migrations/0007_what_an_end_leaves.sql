-- What a completion or an end leaves behind in a session's row, and what failed uploads may still bring through their URLs.

alter table upload_sessions
    add column checksum_by_complete boolean not null default false,
    add column bytes_held_until timestamptz;
alter table tenants add column held_bytes bigint not null default 0;
comment on column upload_sessions.checksum_by_complete is 'The checksum came with a complete, not with open: it is dropped when that completion ends with the session open again.';
comment on column upload_sessions.bytes_held_until is 'The session has failed, but until then a URL may still bring its bytes, so that they count in tenants.held_bytes. Null: they do not count.';
comment on column tenants.held_bytes is 'The promised sizes of failed sessions whose URLs may still bring the bytes. With reserved_bytes at most twice the quota.';
comment on table upload_history is 'The transitions of every session. Those that repeat are kept twice, the first time and the last; at most 1,000 a session.';
