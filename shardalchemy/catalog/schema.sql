-- The catalog of one shard, version 2. Every statement may run again.
CREATE SCHEMA IF NOT EXISTS shardalchemy;

-- Which cluster this database belongs to, and as which shard: one row.
CREATE TABLE IF NOT EXISTS shardalchemy.catalog (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    version integer NOT NULL,
    cluster uuid NOT NULL,
    shard text NOT NULL
);

-- Every epoch of the topology, the same rows on all shards.
CREATE TABLE IF NOT EXISTS shardalchemy.topology (
    epoch bigint PRIMARY KEY,
    document jsonb NOT NULL,
    since timestamptz NOT NULL DEFAULT now()
);

-- The tables that are not only at home, by schema and name, with what was declared.
CREATE TABLE IF NOT EXISTS shardalchemy.placement (
    table_schema text NOT NULL,
    table_name text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('sharded', 'reference')),
    PRIMARY KEY (table_schema, table_name)
);

-- A cross-shard transaction's marker on each participant, or the tombstone by which
-- recovery keeps a participant from ever preparing: the unique key lets only one in.
CREATE TABLE IF NOT EXISTS shardalchemy.txn (
    gid text PRIMARY KEY,
    outcome text NOT NULL CHECK (outcome IN ('committed', 'aborted')),
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
-- Since version 2: the local transaction, by which a snapshot finds those that have
-- committed since another snapshot.
ALTER TABLE shardalchemy.txn
    ADD COLUMN IF NOT EXISTS xid xid8 NOT NULL DEFAULT pg_current_xact_id();
CREATE INDEX IF NOT EXISTS txn_xid ON shardalchemy.txn (xid);
-- What housekeeping has noted of a row that no process has removed: since when it knows
-- it to be done with, and what was open then, by virtual transaction id.
ALTER TABLE shardalchemy.txn
    ADD COLUMN IF NOT EXISTS noted timestamptz,
    ADD COLUMN IF NOT EXISTS open_then text[];

-- The highest fencing token that has written under each named lock.
CREATE TABLE IF NOT EXISTS shardalchemy.fence (
    name text PRIMARY KEY,
    token bigint NOT NULL
);

-- On the home shard: which backends are one session's, of sessions that wait for a lock.
-- Each process renews its own rows while they wait; a crash may lose them.
CREATE UNLOGGED TABLE IF NOT EXISTS shardalchemy.waiting (
    process text NOT NULL,
    session bigint NOT NULL,
    shard text NOT NULL,
    pid integer NOT NULL,
    xact_start timestamptz NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (process, session, shard)
);
