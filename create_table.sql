-- The whole schema. Safe to run again: what exists is kept, and it is checked whether it fits.
-- data_processor.py runs this whenever it connects, and before and after it counts.
DO $$
DECLARE
    -- data_processor.py --verify makes the tables there.
    temporary constant boolean := current_setting('search_path') = 'pg_temp';
    -- A user whom a trigger may change: lower case, trimmed or not in ASCII.
    probe constant text := ' Pröbe, which create_table.sql tries and takes back ';
    stored numeric;
    written boolean := false;
    fault text;
    created text[] := '{}';
    -- The next arrays are of users_revenue, event_producers and event_logs, in this order.
    tables oid[];
    files oid[];
    stamps text[];  -- what their comments say of the tables that belong together
    holds_now boolean[];  -- whether each holds what was counted
    held_before boolean[];  -- whether it did when it was stamped
    same_table boolean[];  -- whether it has the oid that it had then
    same_file boolean[];  -- and the file
    cluster text;
    shape text;
    state text;  -- what stands behind the id in a stamp
    known_stamp text;
    known text[];  -- its parts
    same_database boolean;  -- whether they were stamped in this database
    together boolean;
    ids_are_lost boolean;  -- whether another table than users_revenue is at fault
    may_stamp boolean;
    recount_sql text;
    begin_at_zero_sql text;
    new_id text;
    new_stamp text;
    old_comment text;
BEGIN
    -- ---- The database ----------------------------------------------------------------------

    IF current_setting('server_version_num')::int < 140000 THEN
        RAISE EXCEPTION 'PostgreSQL 14 or newer is needed; this is %',
            current_setting('server_version');
    END IF;
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE EXCEPTION 'The database % is encoded in %; create one with: createdb '
            '--encoding=UTF8 --template=template0 NAME, and set PGDATABASE to its name',
            current_database(), current_setting('server_encoding');
    END IF;

    -- ---- The tables that are missing -------------------------------------------------------

    IF to_regclass('users_revenue') IS NULL OR to_regclass('event_producers') IS NULL
            OR to_regclass('event_logs') IS NULL THEN
        IF NOT temporary THEN
            -- Two that create the same table at once collide, even with IF NOT EXISTS.
            PERFORM pg_advisory_xact_lock(hashtext('create_table.sql'));
            -- All three stand in one schema: where users_revenue is, if it is anywhere.
            PERFORM set_config('search_path', quote_ident(nspname), true)
            FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
            WHERE pg_class.oid = to_regclass('users_revenue');
        END IF;
        -- The result: one row a user. NUMERIC without precision never rounds. Half of each page
        -- is left free so that an update stays on its page and touches no index (measured: half
        -- the time of an update in full pages).
        IF to_regclass('users_revenue') IS NULL THEN
            created := created || 'users_revenue'::text;
            CREATE TABLE users_revenue (
                user_id text COLLATE "C" PRIMARY KEY,
                revenue numeric NOT NULL
            ) WITH (fillfactor = 50);
        END IF;

        -- What has been counted: per producer, the sequence numbers whose events are in
        -- users_revenue.
        IF to_regclass('event_producers') IS NULL THEN
            created := created || 'event_producers'::text;
            CREATE TABLE event_producers (
                producer_id text COLLATE "C" PRIMARY KEY,
                applied int8multirange NOT NULL DEFAULT '{}'
            );
        END IF;

        -- A shortcut: how far each log was read. log_id is the SHA-256 of the log's first line,
        -- digest that of the up to 64 KiB before position; the shortcut is taken only when those
        -- bytes are still there.
        IF to_regclass('event_logs') IS NULL THEN
            created := created || 'event_logs'::text;
            CREATE TABLE event_logs (
                log_id bytea PRIMARY KEY,
                position bigint NOT NULL DEFAULT 0,
                digest bytea NOT NULL DEFAULT sha256('')
            );
        END IF;
    END IF;
    IF temporary THEN
        RETURN;
    END IF;

    -- ---- Whether anything has changed ------------------------------------------------------

    -- The comment of each table ends with the same stamp: [events ID CLUSTER OIDS FILES SHAPE
    -- HELD]. ID is random. OIDS and FILES are those that the three tables had when they were
    -- checked; in another CLUSTER (or database) they mean nothing. SHAPE says what the catalogue
    -- said of them, HELD which of them held what was counted. If all of that is as it was, the
    -- tables were checked as they are.
    --
    -- xmin is the transaction that last wrote a row of the catalogue; VACUUM and ANALYZE update in
    -- place and leave it. A changed function of a trigger, or type of a sequence, is not seen: it
    -- is found at the next change of a table.
    tables := ARRAY['users_revenue'::regclass, 'event_producers'::regclass,
                    'event_logs'::regclass];
    cluster := (SELECT system_identifier FROM pg_control_system()) || '.'
               || (SELECT oid FROM pg_database WHERE datname = current_database());
    shape := md5((
        SELECT string_agg(version::text, ' ' ORDER BY version::text)
        FROM (
            SELECT 'table', oid, xmin FROM pg_class WHERE oid = ANY (tables)
            UNION ALL SELECT 'column ' || attnum, attrelid, xmin
                FROM pg_attribute WHERE attrelid = ANY (tables)
            UNION ALL SELECT 'index', indexrelid, xmin
                FROM pg_index WHERE indrelid = ANY (tables)
            UNION ALL SELECT 'trigger', oid, xmin FROM pg_trigger WHERE tgrelid = ANY (tables)
            UNION ALL SELECT 'rule', oid, xmin FROM pg_rewrite WHERE ev_class = ANY (tables)
            UNION ALL SELECT 'heir', inhrelid, xmin
                FROM pg_inherits WHERE inhparent = ANY (tables)
        ) AS version));
    FOR number IN 1..3 LOOP
        stamps[number] := substring(obj_description(tables[number], 'pg_class')
                                    FROM '\[events ([^]]*)\]');
        files[number] := coalesce(pg_relation_filenode(tables[number]), 0);
    END LOOP;
    PERFORM FROM users_revenue LIMIT 1;
    holds_now[1] := FOUND;
    PERFORM FROM event_producers WHERE applied <> '{}' LIMIT 1;
    holds_now[2] := FOUND;
    PERFORM FROM event_logs WHERE position > 0 LIMIT 1;
    holds_now[3] := FOUND;
    state := concat_ws(' ', cluster, array_to_string(tables, ' '), array_to_string(files, ' '),
                       shape, array_to_string(holds_now, ' '));
    -- known[1] is ID, [2] CLUSTER, [3..5] OIDS, [6..8] FILES, [9] SHAPE, [10..12] HELD (t or f).
    -- known[1] is ID, [2] CLUSTER, [3..5] OIDS, [6..8] FILES, [9] SHAPE, [10..12] HELD (t or f).
    known := string_to_array(stamps[1], ' ');
    IF stamps[1] = known[1] || ' ' || state AND stamps[2] = stamps[1] AND stamps[3] = stamps[1] THEN
        RETURN;
    END IF;

    -- ---- What each table must be -----------------------------------------------------------

    IF (SELECT count(DISTINCT relnamespace) > 1 FROM pg_class WHERE oid = ANY (tables)) THEN
        RAISE EXCEPTION 'users_revenue, event_producers and event_logs are in different '
            'schemas; set search_path so that all three are found in one: ALTER ROLE NAME SET '
            'search_path = SCHEMA';
    END IF;

    -- A permanent table, ordinary or partitioned, without heirs and rules. (The branches of CASE
    -- and the condition below list the same cases.)
    SELECT format(CASE
            WHEN relkind NOT IN ('r', 'p') THEN
                '%1$s is no table; rename it, so that a table can be created'
            WHEN relpersistence = 'u' THEN
                '%1$s is emptied when PostgreSQL crashes; mend it with: ALTER TABLE %1$s '
                'SET LOGGED'
            WHEN relpersistence <> 'p' THEN
                '%1$s is temporary and hides the real one; mend it with: DROP TABLE pg_temp.%1$s'
            WHEN relkind = 'r' AND EXISTS (SELECT FROM pg_inherits
                                           WHERE inhparent = pg_class.oid) THEN
                '%1$s has heirs, whose rows it would show as its own; mend it with: '
                'ALTER TABLE %2$s NO INHERIT %1$s'
            ELSE
                '%1$s has a rule, which changes what is written; mend it with: DROP RULE %3$I '
                'ON %1$s'
        END, relname,
        (SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = pg_class.oid LIMIT 1),
        (SELECT rulename FROM pg_rewrite WHERE ev_class = pg_class.oid LIMIT 1)) INTO fault
    FROM pg_class
    WHERE oid = ANY (tables) AND (
        relkind NOT IN ('r', 'p') OR relpersistence <> 'p'
        OR (relkind = 'r' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = pg_class.oid))
        OR EXISTS (SELECT FROM pg_rewrite WHERE ev_class = pg_class.oid))
    ORDER BY array_position(tables, oid) LIMIT 1;
    IF fault IS NOT NULL THEN
        RAISE EXCEPTION '%', fault;
    END IF;

    -- The columns, with types that hold every value exactly.
    SELECT CASE WHEN attname IS NULL THEN
            format('%s has no column %s; mend it with: ALTER TABLE %s ADD COLUMN %s %s',
                   table_name, column_name, table_name, column_name, definition)
        ELSE
            format('%s keeps %s as %s, which cannot hold every value exactly; mend it with: '
                   'ALTER TABLE %s ALTER COLUMN %s TYPE %s USING %s::%s',
                   table_name, column_name, format_type(atttypid, atttypmod), table_name,
                   column_name, type_name, column_name, type_name)
        END INTO fault
    FROM (VALUES
        (1, 'users_revenue', 'revenue', 'numeric', 'numeric NOT NULL DEFAULT 0'),
        (2, 'event_producers', 'producer_id', 'text', 'text COLLATE "C" PRIMARY KEY'),
        (3, 'event_producers', 'applied', 'int8multirange',
         'int8multirange NOT NULL DEFAULT ''{}'''),
        (4, 'event_logs', 'log_id', 'bytea', 'bytea PRIMARY KEY'),
        (5, 'event_logs', 'position', 'bigint', 'bigint NOT NULL DEFAULT 0'),
        (6, 'event_logs', 'digest', 'bytea', 'bytea NOT NULL DEFAULT sha256('''')')
    ) AS required (number, table_name, column_name, type_name, definition)
    LEFT JOIN pg_attribute ON attrelid = table_name::regclass AND attname = column_name
        AND NOT attisdropped
    WHERE attname IS NULL OR atttypid <> type_name::regtype OR atttypmod <> -1
    ORDER BY number LIMIT 1;
    IF fault IS NOT NULL THEN
        RAISE EXCEPTION '%', fault;
    END IF;

    -- user_id tells 255 characters apart, each from every other.
    SELECT CASE WHEN attname IS NULL THEN
            'users_revenue has no column user_id; mend it with: ALTER TABLE users_revenue '
            'ADD COLUMN user_id text COLLATE "C" UNIQUE'
        ELSE
            format('users_revenue keeps user_id as %s%s, which cannot hold every user or tell '
                   'all of them apart; mend it with: ALTER TABLE users_revenue ALTER COLUMN '
                   'user_id TYPE text COLLATE "C"', format_type(atttypid, atttypmod),
                   ' with the collation ' || quote_ident(collname))
        END INTO fault
    FROM (VALUES ('user_id')) AS required (column_name)
    LEFT JOIN pg_attribute ON attrelid = tables[1] AND attname = column_name
        AND NOT attisdropped
    LEFT JOIN pg_collation ON pg_collation.oid = attcollation
    WHERE attname IS NULL OR NOT collisdeterministic
        OR NOT (atttypid = 'text'::regtype OR (atttypid = 'varchar'::regtype
                AND (atttypmod = -1 OR atttypmod - 4 >= 255)));
    IF fault IS NOT NULL THEN
        RAISE EXCEPTION '%', fault;
    END IF;

    -- user_id alone has a unique key that ON CONFLICT accepts: not partial, not deferrable (one
    -- deferrable key spoils the others), and none that takes two users for one.
    WITH keys AS (
        SELECT indexrelid, conname, indimmediate,
            indisvalid AND indpred IS NULL AND indexprs IS NULL AS accepted,
            coalesce((SELECT collisdeterministic FROM pg_collation
                      WHERE pg_collation.oid = indcollation[0]), true) AS exact
        FROM pg_index
        JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
        LEFT JOIN pg_constraint ON conindid = indexrelid AND contype IN ('p', 'u')
        WHERE indrelid = tables[1] AND indisunique AND indnkeyatts = 1 AND attname = 'user_id'
    )
    SELECT CASE
        WHEN EXISTS (SELECT FROM keys WHERE NOT exact) THEN
            (SELECT format('users_revenue has the unique key %s, which takes different users '
                           'for one; mend it with: %s', indexrelid::regclass,
                           coalesce('ALTER TABLE users_revenue DROP CONSTRAINT '
                                    || quote_ident(conname),
                                    'DROP INDEX ' || indexrelid::regclass))
             FROM keys WHERE NOT exact LIMIT 1)
        WHEN EXISTS (SELECT FROM keys WHERE NOT indimmediate) THEN
            (SELECT format('users_revenue has a deferrable unique key, which ON CONFLICT refuses; '
                           'mend it with: ALTER TABLE users_revenue DROP CONSTRAINT %I, '
                           'ADD UNIQUE (user_id)', conname)
             FROM keys WHERE NOT indimmediate ORDER BY conname LIMIT 1)
        WHEN NOT EXISTS (SELECT FROM keys WHERE accepted) THEN
            'users_revenue has no unique key on user_id; mend it with: '
            'ALTER TABLE users_revenue ADD UNIQUE (user_id)'
        END INTO fault;
    IF fault IS NOT NULL THEN
        RAISE EXCEPTION '%', fault;
    END IF;

    -- No column takes its value from a sequence that ends: every upsert uses up one, also for a
    -- user who is there already. (DEFAULT nextval(): the default, a row of pg_attrdef, depends on
    -- the sequence. IDENTITY: the sequence depends on the column, with deptype i.)
    SELECT format('users_revenue uses up the sequence %s, which has less than 64 bits; mend it '
                  'with: ALTER TABLE users_revenue ALTER COLUMN %I TYPE bigint; ALTER SEQUENCE '
                  '%s AS bigint', seqrelid::regclass, attname, seqrelid::regclass) INTO fault
    FROM pg_attribute
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    JOIN pg_depend ON (classid = 'pg_attrdef'::regclass AND objid = pg_attrdef.oid
                       AND refclassid = 'pg_class'::regclass)
        OR (classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass
            AND refobjid = attrelid AND refobjsubid = attnum AND deptype = 'i')
    JOIN pg_sequence ON seqrelid = CASE classid WHEN 'pg_attrdef'::regclass THEN refobjid
                                   ELSE objid END
    WHERE attrelid = tables[1] AND attnum > 0 AND NOT attisdropped
        AND (seqtypid <> 'bigint'::regtype OR atttypid IN ('int'::regtype, 'smallint'::regtype))
    LIMIT 1;
    IF fault IS NOT NULL THEN
        RAISE EXCEPTION '%', fault;
    END IF;

    -- A trigger that may change a row is tried: two amounts are added and taken back. (The
    -- variables keep their values.)
    IF EXISTS (SELECT FROM pg_trigger WHERE tgrelid = tables[1] AND NOT tgisinternal
               AND tgenabled <> 'D') THEN
        BEGIN
            FOR number IN 1..2 LOOP
                INSERT INTO users_revenue AS old (user_id, revenue)
                VALUES (probe, 111111111111111111.111111111111111111)
                ON CONFLICT (user_id) DO UPDATE SET revenue = old.revenue + excluded.revenue;
            END LOOP;
            SELECT revenue INTO stored FROM users_revenue WHERE user_id = probe;
            written := true;
            RAISE EXCEPTION USING ERRCODE = 'ZZZZZ';  -- takes the row back
        EXCEPTION
            WHEN OTHERS THEN NULL;  -- also when this user is refused: others may be let through
        END;
        IF written AND stored IS DISTINCT FROM 222222222222222222.222222222222222222 THEN
            SELECT format('users_revenue has a trigger that changes what is written; mend it '
                          'with: ALTER TABLE users_revenue DISABLE TRIGGER %I', tgname) INTO fault
            FROM pg_trigger WHERE tgrelid = tables[1] AND NOT tgisinternal AND tgenabled <> 'D'
            ORDER BY tgname LIMIT 1;
            RAISE EXCEPTION '%', fault;
        END IF;
    END IF;

    -- ---- The tables belong together --------------------------------------------------------

    -- By the stamps it is noticed when one was emptied, or came back without the others:
    --   stamps differ, or one lacks it and its file is another   came back without the others
    --   some oids are those of the stamp, and some are not       came back without the others
    --     (if none is, all three were dumped and restored: that is right)
    --   a table held something and holds nothing                 was emptied; the last is named
    --     (but with 2 and 3 empty and all files new, one TRUNCATE emptied all: that is right)
    SELECT bool_and(pg_has_role(relowner, 'USAGE')) INTO may_stamp
    FROM pg_class WHERE oid = ANY (tables);

    SELECT min(stamp), count(DISTINCT stamp) < 2 INTO known_stamp, together
    FROM unnest(stamps) AS stamp;
    known := string_to_array(known_stamp, ' ');
    same_database := known[2] = cluster;
    FOR number IN 1..3 LOOP
        held_before[number] := coalesce(known[9 + number] = 't', false);
        same_table[number] := coalesce(
            same_database AND known[2 + number] = tables[number]::text, false);
        same_file[number] := coalesce(
            same_database AND known[5 + number] = files[number]::text, false);
        -- A table may have lost its stamp because somebody replaced its comment. It is the same
        -- one if the others' stamp names its file.
        IF known_stamp IS NOT NULL AND stamps[number] IS NULL AND NOT same_file[number] THEN
            together := false;
        END IF;
    END LOOP;
    IF true = ANY (same_table) AND false = ANY (same_table) THEN
        together := false;
    END IF;
    IF together THEN
        FOR number IN 1..3 LOOP
            IF held_before[number] AND NOT holds_now[number] THEN
                fault := format('%s was emptied', tables[number]::regclass);
                ids_are_lost := number > 1;
            END IF;
        END LOOP;
        -- After one TRUNCATE of all three, somebody may have put opening balances into
        -- users_revenue.
        IF NOT holds_now[2] AND NOT holds_now[3] AND NOT true = ANY (same_file) THEN
            fault := NULL;
        END IF;
    ELSE
        fault := 'one of them came back without the others';
        IF created <> '{}' THEN
            fault := format('missing: %s', array_to_string(created, ', '));
        END IF;
        ids_are_lost := stamps[2] IS DISTINCT FROM stamps[3] OR same_table[2] <> same_table[3]
            OR 'event_producers' = ANY (created);
    END IF;
    -- A role that does not own the tables cannot renew the stamp, so HELD is as old as the owner's
    -- last run. Two losses show all the same: there are counted ids, but no user; or there are
    -- users now and were none at the stamp, so that they came from events, but no ids and no
    -- positions are left.
    IF NOT may_stamp AND known_stamp IS NOT NULL AND fault IS NULL THEN
        IF holds_now[2] AND NOT holds_now[1] THEN
            fault := 'users_revenue was emptied';
            ids_are_lost := false;
        ELSIF holds_now[1] AND NOT held_before[1] AND NOT holds_now[2] AND NOT holds_now[3] THEN
            fault := 'event_producers was emptied';
            ids_are_lost := true;
        END IF;
    END IF;
    -- Nothing is wrong while none of them holds anything. RAISE takes back the tables that were
    -- just created: what is advised may name only those that were there before.
    IF fault IS NOT NULL AND true = ANY (holds_now) THEN
        recount_sql := 'TRUNCATE users_revenue, event_producers, event_logs';
        IF created <> '{}' THEN
            SELECT 'DROP TABLE ' || string_agg(listed::regclass::text, ', ') INTO recount_sql
            FROM unnest(tables) AS listed
            WHERE listed::regclass::text <> ALL (created);
        END IF;
        IF ids_are_lost THEN  -- nobody knows what was counted
            begin_at_zero_sql := 'move the logs to where data_processor.py does not look, '
                'and then: ' || recount_sql;
        ELSE  -- tables without stamps are taken as they are: what was counted stays known
            begin_at_zero_sql := 'COMMENT ON TABLE event_producers IS NULL; '
                'COMMENT ON TABLE event_logs IS NULL';
            IF created = '{}' THEN
                begin_at_zero_sql := 'TRUNCATE users_revenue; '
                    'COMMENT ON TABLE users_revenue IS NULL; ' || begin_at_zero_sql;
            END IF;
        END IF;
        IF NOT may_stamp THEN
            recount_sql := recount_sql || ' (as the owner of the tables)';
            begin_at_zero_sql := begin_at_zero_sql
                || ' (as the owner of the tables, who then runs create_table.sql)';
        END IF;
        RAISE EXCEPTION 'users_revenue, event_producers and event_logs do not belong together: '
            '%. To count everything again from the logs: %; then run data_processor.py with all '
            'of them. To begin at zero: %', fault, recount_sql, begin_at_zero_sql;
    END IF;

    IF may_stamp THEN
        new_id := known[1];
        IF new_id IS NULL OR NOT together THEN
            new_id := md5(random()::text || clock_timestamp());
        END IF;
        new_stamp := new_id || ' ' || state;
        FOR number IN 1..3 LOOP
            IF stamps[number] IS DISTINCT FROM new_stamp THEN
                old_comment := coalesce(obj_description(tables[number], 'pg_class'), '');
                old_comment := regexp_replace(old_comment, ' ?\[events [^]]*\]', '');
                EXECUTE format('COMMENT ON TABLE %s IS %L', tables[number]::regclass,
                               ltrim(format('%s [events %s]', old_comment, new_stamp)));
            END IF;
        END LOOP;
    END IF;
END $$;
