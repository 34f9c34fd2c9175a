-- What a completion or an end leaves behind in a session's row.

alter table upload_sessions
    add column checksum_by_complete boolean not null default false,
    add column bytes_held_until timestamptz;
comment on column upload_sessions.checksum_by_complete is 'The checksum came with a complete, not with open: it is dropped when that completion ends with the session open again.';
comment on column upload_sessions.bytes_held_until is 'The session has failed, but until then a URL may still bring its bytes, so that they still count in tenants.reserved_bytes. Null: they do not count.';
comment on column tenants.reserved_bytes is 'The sum of their promised sizes in bytes, and of those of failed sessions until upload_sessions.bytes_held_until.';
comment on table upload_history is 'The transitions of every session. Those that repeat are kept twice, the first time and the last; at most 1,000 a session.';
