-- What the broker promised. Kafka is the authority on what was published, S3 on what the bytes are.
-- Every move of a session is one update guarded by its state and version.

create table deployment (
    only_row boolean primary key default true check (only_row),
    id uuid not null default gen_random_uuid(),
    shards int not null default 4 check (shards between 1 and 1024),
    created_at timestamptz not null default clock_timestamp()
);
insert into deployment default values;
comment on table deployment is 'One row: the identity that all replicas on this database share.';
comment on column deployment.id is 'Part of every Kafka transactional.id, so that two deployments on one Kafka never fence each other.';
comment on column deployment.shards is 'How many shards the outbox has. Changing it is only safe while the outbox is empty.';

create table topics (
    topic text primary key,
    policy jsonb not null,
    updated_at timestamptz not null
);
comment on table topics is 'The policies that an administrator stored; a topic without a row follows the broker''s default.';
comment on column topics.policy is 'The whole policy as the API shows it.';

create table tenants (
    tenant text primary key,
    open_sessions bigint not null default 0,
    reserved_bytes bigint not null default 0
);
comment on table tenants is 'What each tenant holds now, changed in the transaction that enters or leaves {open, completing}.';
comment on column tenants.open_sessions is 'Sessions that are open or completing.';
comment on column tenants.reserved_bytes is 'The sum of their promised sizes in bytes.';

create table upload_sessions (
    id uuid primary key,
    tenant text not null,
    subject text not null,
    state text not null check (state in ('open', 'completing', 'verified', 'published', 'aborted', 'expired', 'rejected')),
    version bigint not null default 1,

    topic text not null,
    record_key bytea check (octet_length(record_key) <= 4096),
    record_partition int check (record_partition >= 0),
    record_headers jsonb not null default '[]',
    traceparent text,
    content_type text not null,
    filename text,

    size_bytes bigint not null check (size_bytes >= 0),
    checksum_alg text not null check (checksum_alg in ('sha256', 'crc64nvme', 'crc32c', 'crc32', 'md5', 'none')),
    checksum bytea,
    min_integrity text not null check (min_integrity in ('size', 'checksum', 'parts-sha256', 'sha256')),

    bucket text not null,
    object_key text not null unique,
    kms_key_id text,
    mode text not null check (mode in ('single', 'multipart')),
    part_size_bytes bigint,
    part_count int check (part_count between 1 and 10000),
    part_hashes text not null check (part_hashes in ('none', 'given', 'deferred')),
    s3_upload_id text,

    url_seconds int not null check (url_seconds >= 1),
    session_seconds int not null check (session_seconds >= 1),
    created_at timestamptz not null,
    updated_at timestamptz not null,
    expires_at timestamptz not null,
    expires_latest_at timestamptz not null,

    lease_owner uuid,
    lease_until timestamptz,
    lease_attempt int not null default 0,
    must_read boolean not null default false,

    verified_at timestamptz,
    integrity text check (integrity in ('size', 'checksum', 'parts-sha256', 'sha256')),
    object_etag text,
    object_version_id text,
    pointer text,

    published_partition int,
    published_offset bigint,
    published_at timestamptz,

    error_code text,
    error_detail text,
    error_items jsonb,
    cleanup_due_at timestamptz,

    constraint multipart_has_parts check ((mode = 'multipart') = (part_size_bytes is not null and part_count is not null)),
    constraint single_has_no_part_hashes check (mode = 'multipart' or part_hashes = 'none'),
    constraint completing_has_a_lease check ((state = 'completing') = (lease_owner is not null and lease_until is not null)),
    constraint only_completing_reads check (state = 'completing' or not must_read),
    constraint verified_has_proof check (
        (state in ('verified', 'published'))
        = (verified_at is not null and integrity is not null and pointer is not null)),
    constraint published_has_an_offset check (
        (state = 'published')
        = (published_partition is not null and published_offset is not null and published_at is not null)),
    constraint rejected_says_why check (state <> 'rejected' or error_code is not null),
    constraint cleanup_only_of_what_failed check (cleanup_due_at is null or state in ('aborted', 'expired', 'rejected')),
    constraint ends_in_time check (expires_at <= expires_latest_at)
);
comment on table upload_sessions is 'One row an upload: what a client promised, where it stands, what was proved, where its pointer is.';
comment on column upload_sessions.id is 'UUID version 7; also the write token in the object''s metadata and the last part of its key.';
comment on column upload_sessions.tenant is 'The tenant of the token that opened it; nobody else can see it.';
comment on column upload_sessions.subject is 'The token''s sub.';
comment on column upload_sessions.state is 'open, completing, verified, then published; or aborted, expired, rejected.';
comment on column upload_sessions.version is 'Grows by one with every change; every update names the version it read.';
comment on column upload_sessions.topic is 'The Kafka topic that gets the pointer.';
comment on column upload_sessions.record_key is 'The record''s key, the client''s bytes; null for none.';
comment on column upload_sessions.record_partition is 'The partition the client asked for; null: the key decides.';
comment on column upload_sessions.record_headers is 'The client''s record headers as [[name, value], ...], in order.';
comment on column upload_sessions.traceparent is 'W3C trace context of the request that opened it, else of complete.';
comment on column upload_sessions.content_type is 'Media type of the bytes.';
comment on column upload_sessions.filename is 'The name that a download is offered under.';
comment on column upload_sessions.size_bytes is 'The promised size.';
comment on column upload_sessions.checksum_alg is 'How the bytes are promised.';
comment on column upload_sessions.checksum is 'The promised digest; null for none, or for sha256 until complete brings it.';
comment on column upload_sessions.min_integrity is 'The least proof to publish with, as the policy said at open.';
comment on column upload_sessions.bucket is 'The S3 bucket.';
comment on column upload_sessions.object_key is 'The S3 key; nothing in it but the topic comes from the client.';
comment on column upload_sessions.kms_key_id is 'The KMS key the object is encrypted with.';
comment on column upload_sessions.mode is 'single: one PUT. multipart: part_count PUTs of part_size_bytes, the last one shorter.';
comment on column upload_sessions.part_size_bytes is 'Size of every part but the last.';
comment on column upload_sessions.part_count is 'How many parts there are.';
comment on column upload_sessions.part_hashes is 'none: the bytes are re-read. given at open, or deferred to the signing of each part: S3 checks each part.';
comment on column upload_sessions.s3_upload_id is 'The multipart upload in S3; null until it was made.';
comment on column upload_sessions.url_seconds is 'How long a presigned URL lives.';
comment on column upload_sessions.session_seconds is 'How far signing parts slides expires_at.';
comment on column upload_sessions.expires_at is 'When an open session ends. No URL lives longer.';
comment on column upload_sessions.expires_latest_at is 'The end that sliding never passes.';
comment on column upload_sessions.lease_owner is 'Who completes it now.';
comment on column upload_sessions.lease_until is 'When the lease runs out and anyone may take over.';
comment on column upload_sessions.lease_attempt is 'How many leases there were.';
comment on column upload_sessions.must_read is 'The object is whole, but its bytes must be read to prove them.';
comment on column upload_sessions.verified_at is 'When the bytes were proved; created_at of the pointer.';
comment on column upload_sessions.integrity is 'How far they were proved: size < checksum < parts-sha256 < sha256.';
comment on column upload_sessions.object_etag is 'The ETag that S3 gave.';
comment on column upload_sessions.object_version_id is 'The version, in a versioned bucket.';
comment on column upload_sessions.pointer is 'The record''s value in Kafka, byte for byte.';
comment on column upload_sessions.published_partition is 'The partition of the record in Kafka.';
comment on column upload_sessions.published_offset is 'Its offset.';
comment on column upload_sessions.published_at is 'Its timestamp.';
comment on column upload_sessions.error_code is 'Why it was rejected, went back to open, or is not published yet.';
comment on column upload_sessions.error_detail is 'The same in words, with the numbers.';
comment on column upload_sessions.error_items is 'The places or parts that are wrong, as in the API''s errors member.';
comment on column upload_sessions.cleanup_due_at is 'When the sweeper next removes what S3 may hold; null when that is done.';

-- The operator's questions: newest first, by tenant, topic and state; what is due; what is stuck.
create index upload_sessions_newest on upload_sessions (tenant, created_at desc, id desc);
create index upload_sessions_by_topic on upload_sessions (tenant, topic, created_at desc, id desc);
create index upload_sessions_open on upload_sessions (expires_at) where state = 'open';
create index upload_sessions_completing on upload_sessions (lease_until) where state = 'completing';
create index upload_sessions_verified on upload_sessions (verified_at) where state = 'verified';
create index upload_sessions_cleanup on upload_sessions (cleanup_due_at) where cleanup_due_at is not null;
create index upload_sessions_record on upload_sessions (topic, published_partition, published_offset) where state = 'published';

create table upload_parts (
    session_id uuid not null references upload_sessions on delete cascade,
    part_number int not null check (part_number between 1 and 10000),
    sha256 bytea not null check (octet_length(sha256) = 32),
    primary key (session_id, part_number)
);
comment on table upload_parts is 'The promised hash of each part, where part_hashes is given or deferred. A promise never changes.';
comment on column upload_parts.part_number is 'From 1.';
comment on column upload_parts.sha256 is 'SHA-256 of the part''s bytes, signed into its URL.';

create table upload_history (
    session_id uuid not null references upload_sessions on delete cascade,
    version bigint not null,
    at timestamptz not null,
    from_state text,
    to_state text not null,
    reason text not null,
    by text not null,
    primary key (session_id, version)
);
comment on table upload_history is 'Every transition of every session.';
comment on column upload_history.version is 'The session''s version after the transition.';
comment on column upload_history.from_state is 'Null for the first.';
comment on column upload_history.reason is 'Why.';
comment on column upload_history.by is 'client:<sub>, broker, verifier, relay or sweeper.';

create table idempotency_keys (
    tenant text not null,
    subject text not null,
    key text not null,
    request_sha256 bytea not null,
    session_id uuid not null references upload_sessions on delete cascade,
    created_at timestamptz not null,
    primary key (tenant, subject, key)
);
create index idempotency_keys_session on idempotency_keys (session_id);
comment on table idempotency_keys is 'Which session an Idempotency-Key opened; kept until the session is final and 24 hours more.';
comment on column idempotency_keys.request_sha256 is 'Digest of the parsed request: another request under the same key is refused.';

create table outbox (
    number bigint generated always as identity primary key,
    session_id uuid not null unique references upload_sessions,
    shard int not null check (shard >= 0),
    topic text not null,
    ordering bigint,
    partition int,
    key bytea,
    value text not null,
    headers jsonb not null,
    created_at timestamptz not null,
    batch bigint,
    attempts int not null default 0,
    next_try_at timestamptz not null,
    error text
);
create index outbox_due on outbox (shard, number) where batch is null;
create index outbox_stamped on outbox (shard, batch) where batch is not null;
create index outbox_parked on outbox (shard, ordering, number) where error is not null;
comment on table outbox is 'Pointers that Kafka has not acknowledged yet. A row is made with the promise and goes with the offset.';
comment on column outbox.number is 'Order of promise; for one key also the order of commit, because promises of one key are made one at a time.';
comment on column outbox.shard is 'Hash of topic and key (keyless: of the session) over deployment.shards: one relay at a time owns a shard.';
comment on column outbox.ordering is 'Hash of topic and key; rows that share it are sent in order of number. Null: no order.';
comment on column outbox.value is 'The final bytes: sending again sends the same.';
comment on column outbox.headers is 'All record headers as [[name, value], ...].';
comment on column outbox.batch is 'The batch it was stamped with before it was sent; null: not sent.';
comment on column outbox.next_try_at is 'Kafka refused the record: neither it nor a later one of its key is tried before.';
comment on column outbox.error is 'What Kafka said.';

create table relay_shards (
    shard int primary key,
    owner uuid,
    until timestamptz,
    epoch bigint not null default 0,
    last_batch bigint not null default 0
);
insert into relay_shards (shard) select generate_series(0, (select shards - 1 from deployment));
comment on table relay_shards is 'Who relays which shard of the outbox. The lease spares work; safety is Kafka''s fence.';
comment on column relay_shards.epoch is 'Grows with every new owner; a relay stamps only under its own.';
comment on column relay_shards.last_batch is 'The last batch number that was stamped.';
