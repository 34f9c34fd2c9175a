-- The replicas that share the shards of the outbox.

create table relay_replicas (
    owner uuid primary key,
    since timestamptz not null,
    until timestamptz not null
);
comment on table relay_replicas is 'The replicas that publish. Each may own an equal share of the shards in relay_shards.';
comment on column relay_replicas.owner is 'The id of the replica, as in relay_shards.owner. A restarted replica has a new one.';
comment on column relay_replicas.since is 'When the replica joined. If the shards cannot be divided equally, the oldest replicas own one more.';
comment on column relay_replicas.until is 'The replica counts until then. It renews this time together with the leases of its shards.';
