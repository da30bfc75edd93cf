-- The whole schema. Safe to run again: what exists is kept, and it is checked whether it fits.

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

-- The check, which data_processor.py runs whenever it connects (its role needs plpgsql, which all have by default): a
-- table that was there before may not hold every user and every sum, each user once. ON CONFLICT takes neither a
-- partial key nor one of several columns, and it refuses a deferrable one even beside a good one.
DO $$
DECLARE
    fault text;
BEGIN
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE EXCEPTION 'The database % is encoded in %; create one with: createdb --encoding=UTF8 '
            '--template=template0 NAME, and set PGDATABASE to its name',
            current_database(), current_setting('server_encoding');
    END IF;
    IF (SELECT count(DISTINCT relnamespace) FROM pg_class WHERE oid IN (
            to_regclass('users_revenue'), to_regclass('event_producers'), to_regclass('event_logs'))) > 1 THEN
        RAISE EXCEPTION 'users_revenue, event_producers and event_logs are in different schemas; set search_path so '
            'that all three are found in one: ALTER ROLE NAME SET search_path = SCHEMA';
    END IF;
    SELECT CASE
        WHEN revenue IS NULL THEN
            'has no column revenue; mend it with: ALTER TABLE users_revenue '
            || 'ADD COLUMN revenue numeric NOT NULL DEFAULT 0'
        WHEN revenue <> 'numeric' THEN
            format('keeps revenue as %s, which cannot hold every sum exactly; mend it with: ALTER TABLE users_revenue '
                   'ALTER COLUMN revenue TYPE numeric USING revenue::numeric', revenue)
        WHEN user_id IS NULL THEN
            'has no column user_id; mend it with: ALTER TABLE users_revenue '
            || 'ADD COLUMN user_id text COLLATE "C" UNIQUE'
        WHEN NOT deterministic OR user_id !~ '^(text|character varying)([(]|$)'
                OR substring(user_id FROM '[0-9]+')::int < 255 THEN
            format('keeps user_id as %s, which cannot hold every user or tell all of them apart; mend it with: '
                   'ALTER TABLE users_revenue ALTER COLUMN user_id TYPE text COLLATE "C"', user_id)
        WHEN deferrable_key IS NOT NULL OR NOT has_key THEN
            'has no unique key on user_id that is not deferrable; mend it with: ALTER TABLE users_revenue '
            || coalesce('DROP CONSTRAINT ' || quote_ident(deferrable_key) || ', ', '') || 'ADD UNIQUE (user_id)'
        END INTO fault
    FROM (SELECT max(format_type(atttypid, atttypmod)) FILTER (WHERE attname = 'revenue') AS revenue
          FROM pg_attribute WHERE attrelid = 'users_revenue'::regclass AND NOT attisdropped) AS of_revenue
    LEFT JOIN (
        SELECT format_type(atttypid, atttypmod) AS user_id, collisdeterministic IS NOT false AS deterministic,
            EXISTS (SELECT FROM pg_index WHERE indrelid = attrelid AND indkey[0] = attnum AND indnkeyatts = 1
                    AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL) AS has_key,
            (SELECT min(conname) FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum]
             AND condeferrable AND contype IN ('p', 'u')) AS deferrable_key
        FROM pg_attribute LEFT JOIN pg_collation ON pg_collation.oid = attcollation
        WHERE attrelid = 'users_revenue'::regclass AND attname = 'user_id') AS of_user_id ON true;
    IF fault IS NOT NULL THEN
        RAISE EXCEPTION 'users_revenue %', fault;
    END IF;
END $$;
