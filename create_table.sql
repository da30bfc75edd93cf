-- The whole schema. Safe to run again: what exists is kept.

-- The result: one row a user. NUMERIC without precision never rounds. Half of each page is left free so that an update
-- stays on its page and touches no index (measured: half the time of an update in full pages).
CREATE TABLE IF NOT EXISTS users_revenue (
    user_id text COLLATE "C" PRIMARY KEY,
    revenue numeric NOT NULL
) WITH (fillfactor = 50);

-- What has been counted: per producer, the sequence numbers whose events are in users_revenue.
CREATE TABLE IF NOT EXISTS event_producers (
    producer_id text COLLATE "C" PRIMARY KEY,
    applied int8multirange NOT NULL DEFAULT '{}'
);

-- A shortcut: how far each log was read. log_id is the SHA-256 of the log's first line, digest that of the up to
-- 64 KiB before position; the shortcut is taken only when those bytes are still there.
CREATE TABLE IF NOT EXISTS event_logs (
    log_id bytea PRIMARY KEY,
    position bigint NOT NULL DEFAULT 0,
    digest bytea NOT NULL DEFAULT sha256('')
);
