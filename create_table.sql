-- The whole schema. Safe to run again: what exists is kept, and it is checked whether it fits.
-- data_processor.py runs this when it connects, and before and after it counts: so that nothing is
-- counted into tables that were altered, emptied or replaced meanwhile. A fault is one sentence;
-- if a statement mends it, that is its end. The sections:
--
--     The database                   its version and its encoding
--     The tables that are missing    are created
--     Whether a table was altered    since its shape was checked
--     What each table must be        checked if one was altered
--     The tables belong together     one that was emptied or replaced would count events twice
DO $$
DECLARE
    -- data_processor.py --verify sets this path. It counts into temporary tables, which are empty
    -- and not checked.
    temporary constant boolean := current_setting('search_path') = 'pg_temp';
    created text[] := '{}';  -- the tables that were missing
    tables oid[];  -- all three
    listed regclass;  -- one of them
    relations oid[];  -- the three, and the partitions of those that are partitioned
    shape text;  -- what the catalogue says of the relations, as a hash
    -- (No pattern has a backslash: it means another thing if standard_conforming_strings is off.)
    stamp_pattern constant text := '[[]event tables ([{][^]]*[}])[]]';
    faults text[];
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

    -- Such an ordinary run could not be told from --verify.
    IF temporary AND (SELECT reset_val FROM pg_settings WHERE name = 'search_path') = 'pg_temp' THEN
        RAISE EXCEPTION 'The search_path of % leads to temporary tables alone; set another: '
            'ALTER ROLE NAME SET search_path = SCHEMA', current_user;
    END IF;

    -- ---- The tables that are missing -------------------------------------------------------

    IF to_regclass('users_revenue') IS NULL OR to_regclass('event_producers') IS NULL
            OR to_regclass('event_logs') IS NULL THEN
        IF NOT temporary THEN
            -- Two that create the same table at once collide, even with IF NOT EXISTS.
            PERFORM pg_advisory_xact_lock(hashtext('create_table.sql'));
            -- All three stand in one schema: where one of them is already, if it is anywhere. The
            -- path is kept until the transaction ends.
            PERFORM set_config('search_path', quote_ident(nspname), true)
            FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
            WHERE pg_class.oid = coalesce(to_regclass('users_revenue'),
                                          to_regclass('event_producers'),
                                          to_regclass('event_logs'));
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

    -- ---- Whether a table was altered -------------------------------------------------------

    -- The comment of each table ends with the same stamp: [event tables {...}]. It holds, as JSON,
    -- what the tables were when they were checked:
    --
    --     database            in which cluster, and in which database of it
    --     shape               the hash below
    --     and, for each table by its name:
    --         oid, file       of the table, in that database
    --         holds           whether anything was counted in it
    --
    -- The shape is made of xmin, the transaction that last wrote a row of the catalogue: whatever
    -- alters a table writes one. VACUUM and ANALYZE update in place and leave xmin. What changes
    -- the function of a trigger, or the type of a sequence, is not seen: it is found the next time
    -- that a table is altered.
    tables := ARRAY['users_revenue'::regclass, 'event_producers'::regclass,
                    'event_logs'::regclass];
    relations := tables || ARRAY(SELECT relid::oid FROM unnest(tables) AS given (id),
                                 pg_partition_tree(id) WHERE level > 0);
    shape := md5((
        SELECT string_agg(version::text, ' ' ORDER BY version::text)
        FROM (
            SELECT 'table', oid, xmin FROM pg_class WHERE oid = ANY (relations)
            UNION ALL SELECT 'column ' || attnum, attrelid, xmin
                FROM pg_attribute WHERE attrelid = ANY (relations)
            UNION ALL SELECT 'index', indexrelid, xmin
                FROM pg_index WHERE indrelid = ANY (relations)
            UNION ALL SELECT 'trigger', oid, xmin FROM pg_trigger WHERE tgrelid = ANY (relations)
            UNION ALL SELECT 'rule', oid, xmin FROM pg_rewrite WHERE ev_class = ANY (relations)
            UNION ALL SELECT 'child', inhrelid, xmin
                FROM pg_inherits WHERE inhparent = ANY (relations)
        ) AS version));

    -- ---- What each table must be -----------------------------------------------------------

    -- Row level security hides no row. This depends on the role, too, so it is checked every time.
    FOREACH listed IN ARRAY tables LOOP
        IF row_security_active(listed) THEN
            RAISE EXCEPTION '% has row level security, which may hide rows from %; mend it with: %',
                listed, current_user, CASE
                WHEN pg_has_role((SELECT relowner FROM pg_class WHERE oid = listed), 'USAGE')
                THEN format('ALTER TABLE %s NO FORCE ROW LEVEL SECURITY', listed)
                ELSE format('ALTER ROLE %I BYPASSRLS', current_user) END;
        END IF;
    END LOOP;

    -- Each check gives a sentence for each fault that it finds; the first one is raised. If a
    -- stamp has this shape, all of this was checked before. (The checks stand in a string because
    -- PL/pgSQL parses all else each time: this takes a sixth off a run that finds nothing changed.)
    IF NOT EXISTS (SELECT FROM unnest(tables) AS given (id)
                   WHERE strpos(obj_description(id, 'pg_class'), shape) > 0) THEN
        EXECUTE $checks$
        SELECT ARRAY(
            SELECT 'users_revenue, event_producers and event_logs are in different schemas; set '
                'search_path so that all three are found in one: ALTER ROLE NAME SET search_path '
                '= SCHEMA'
            FROM pg_class WHERE oid = ANY (tables) HAVING count(DISTINCT relnamespace) > 1)

        -- Each is a permanent table, ordinary (r) or partitioned (p). (What is given as $1 and $2
        -- is named tables and relations at the end of this string.)
        || ARRAY(
            SELECT format('%s is no table; rename it, so that a table can be created', relname)
            FROM pg_class WHERE oid = ANY (tables) AND relkind NOT IN ('r', 'p'))
        || ARRAY(
            SELECT format('%s is partitioned by another column than its key, which cannot be '
                          'unique then; rename it, so that a table can be created', relname)
            FROM pg_class
            JOIN pg_partitioned_table ON partrelid = pg_class.oid
            LEFT JOIN pg_attribute ON attrelid = partrelid AND attnum = partattrs[0]
            WHERE pg_class.oid = ANY (tables) AND (partnatts > 1 OR attname IS NULL
                OR attname NOT IN ('user_id', 'producer_id', 'log_id')))
        || ARRAY(
            SELECT format('%1$s is temporary and hides the real one; mend it with: DROP TABLE '
                          'pg_temp.%1$s', relname)
            FROM pg_class WHERE oid = ANY (tables) AND relpersistence = 't')
        || ARRAY(
            SELECT format('%1$s is emptied when PostgreSQL crashes; mend it with: ALTER TABLE '
                          '%1$s SET LOGGED', oid::regclass)
            FROM pg_class WHERE oid = ANY (relations) AND relkind = 'r' AND relpersistence = 'u')

        -- It shows no rows of others, and keeps what is written. (Harmless triggers may belong to
        -- a users_revenue that was there before: these are tried below.)
        || ARRAY(
            SELECT format('%1$s has the inheritance child %2$s, whose rows it would show as its '
                          'own; mend it with: ALTER TABLE %2$s NO INHERIT %1$s',
                          inhparent::regclass, inhrelid::regclass)
            FROM pg_inherits JOIN pg_class ON pg_class.oid = inhparent
            WHERE inhparent = ANY (tables) AND relkind = 'r')
        || ARRAY(
            SELECT format('%1$s has a rule, which changes what is written; mend it with: '
                          'DROP RULE %2$I ON %1$s', ev_class::regclass, rulename)
            FROM pg_rewrite WHERE ev_class = ANY (tables))
        || ARRAY(
            SELECT format('The partition %1$s is a foreign table; mend it with: ALTER TABLE %2$s '
                          'DETACH PARTITION %1$s', inhrelid::regclass, inhparent::regclass)
            FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
            WHERE inhrelid = ANY (relations) AND relkind = 'f')
        || ARRAY(
            SELECT format('%1$s has a trigger, which may change what is written; mend it with: '
                          'ALTER TABLE %1$s DISABLE TRIGGER %2$I', tgrelid::regclass, tgname)
            FROM pg_trigger
            WHERE tgrelid = ANY (relations) AND tgrelid <> 'users_revenue'::regclass
            AND tgparentid = 0  -- not a partition's copy of its parent's trigger
            AND NOT tgisinternal AND tgenabled <> 'D')

        -- The columns hold every value exactly, and tell all keys apart. In event_producers and
        -- event_logs, what INSERT does not give has a default and is never NULL. (A column that
        -- is required here without a default is the key.)
        || ARRAY(
            WITH required (table_name, name, type, collation_clause, default_value) AS (VALUES
                ('users_revenue', 'user_id', 'text', ' COLLATE "C"', NULL),
                ('users_revenue', 'revenue', 'numeric', '', '0'),
                ('event_producers', 'producer_id', 'text', ' COLLATE "C"', NULL),
                ('event_producers', 'applied', 'int8multirange', '', '''{}'''),
                ('event_logs', 'log_id', 'bytea', '', NULL),
                ('event_logs', 'position', 'bigint', '', '0'),
                ('event_logs', 'digest', 'bytea', '', 'sha256('''')')
            ), columns AS (
                SELECT required.*, atttypid, atttypmod, attcollation, attnotnull, atthasdef,
                    attname IS NOT NULL AS exists,
                    -- atttypmod is -1 without a length or precision; else the length plus 4.
                    atttypid = type::regtype AND atttypmod = -1
                    OR name = 'user_id' AND atttypid = 'varchar'::regtype
                        AND (atttypmod = -1 OR atttypmod >= 255 + 4) AS fits,
                    pg_get_expr(adbin, adrelid) AS old_default
                FROM required
                LEFT JOIN pg_attribute ON attrelid = table_name::regclass AND attname = name
                    AND NOT attisdropped
                LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            )
            SELECT format('%1$s has no column %2$s; mend it with: ALTER TABLE %1$s ADD COLUMN '
                          '%2$s %3$s%4$s %5$s', table_name, name, type, collation_clause,
                          coalesce('NOT NULL DEFAULT ' || default_value, 'UNIQUE'))
            FROM columns WHERE NOT exists
            UNION ALL
            -- (PostgreSQL does not cast every default by itself.)
            SELECT format('%1$s keeps %2$s as %3$s, which cannot hold every value exactly; mend '
                          'it with: ALTER TABLE %1$s ', table_name, name,
                          format_type(atttypid, atttypmod))
                || CASE WHEN old_default IS NOT NULL
                   THEN format('ALTER COLUMN %s DROP DEFAULT, ', name) ELSE '' END
                || format('ALTER COLUMN %1$s TYPE %2$s%3$s USING %1$s::%2$s', name, type,
                          collation_clause)
                || CASE WHEN old_default IS NOT NULL
                   THEN format(', ALTER COLUMN %s SET DEFAULT (%s)::%s', name, old_default, type)
                   ELSE '' END
            FROM columns WHERE NOT fits
            UNION ALL
            SELECT format('%1$s keeps %2$s as text with the collation %3$I, to which different '
                          'values are equal; mend it with: ALTER TABLE %1$s ALTER COLUMN %2$s '
                          'TYPE %4$s%5$s', table_name, name, collname, type, collation_clause)
            FROM columns JOIN pg_collation ON pg_collation.oid = attcollation
            WHERE NOT collisdeterministic
            UNION ALL
            SELECT format('%1$s needs a default for %2$s, and no NULL; mend it with: ALTER TABLE '
                          '%1$s ALTER COLUMN %2$s SET DEFAULT %3$s, ALTER COLUMN %2$s SET NOT NULL',
                          table_name, name, default_value)
            FROM columns
            WHERE table_name <> 'users_revenue' AND default_value IS NOT NULL
            AND NOT (attnotnull AND atthasdef))

        -- The key is unique, by an index that ON CONFLICT accepts: valid, not partial, of this
        -- column alone, and not deferrable (one deferrable index spoils the others). For
        -- users_revenue ON CONFLICT names the column; for the other two it names none, and looks
        -- at every unique index.
        || ARRAY(
            WITH keys (table_name, column_name) AS (VALUES
                ('users_revenue', 'user_id'),
                ('event_producers', 'producer_id'),
                ('event_logs', 'log_id')
            ), indexes AS (
                SELECT keys.*, indexrelid::regclass AS index, indimmediate AS is_immediate,
                    indisvalid AND indpred IS NULL AS is_complete,
                    indisunique AND indnkeyatts = 1 AND attname IS NOT NULL AS is_of_key,
                    coalesce(collisdeterministic, true) AS is_exact,
                    coalesce('ALTER TABLE ' || table_name || ' DROP CONSTRAINT '
                             || quote_ident(conname),
                             'DROP INDEX ' || indexrelid::regclass) AS removal
                FROM keys
                JOIN pg_index ON indrelid = table_name::regclass
                    AND (indisunique OR indisexclusion)
                LEFT JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
                    AND attname = column_name
                LEFT JOIN pg_collation ON pg_collation.oid = indcollation[0]
                LEFT JOIN pg_constraint ON conindid = indexrelid AND contype IN ('p', 'u', 'x')
            )
            SELECT format('%s has the unique key %s, which takes different rows for one; mend it '
                          'with: %s', table_name, index, removal)
            FROM indexes
            WHERE is_of_key AND NOT is_exact OR NOT is_of_key AND table_name <> 'users_revenue'
            UNION ALL
            -- (Only a constraint can be deferrable: removal is an ALTER TABLE, which can go on.)
            SELECT format('%s has a deferrable unique key, which ON CONFLICT refuses; mend it '
                          'with: %s, ADD UNIQUE (%s)', table_name, removal, column_name)
            FROM indexes WHERE is_of_key AND NOT is_immediate
            UNION ALL
            SELECT format('%1$s has no unique key on %2$s; mend it with: ALTER TABLE %1$s ADD '
                          'UNIQUE (%2$s)', table_name, column_name)
            FROM keys
            WHERE NOT EXISTS (SELECT FROM indexes WHERE indexes.table_name = keys.table_name
                              AND is_of_key AND is_complete))

        -- No column takes its value from a sequence that ends: every row that is inserted or
        -- updated uses up one value, because ON CONFLICT draws it before it finds the row.
        || ARRAY(
            WITH uses (relation, column_number, sequence) AS (
                -- DEFAULT nextval(): the default depends on the sequence.
                SELECT adrelid, adnum, refobjid
                FROM pg_attrdef JOIN pg_depend ON classid = 'pg_attrdef'::regclass
                    AND objid = pg_attrdef.oid AND refclassid = 'pg_class'::regclass
                WHERE adrelid = ANY (tables)
                UNION ALL
                -- IDENTITY: the sequence depends on the column.
                SELECT refobjid, refobjsubid, objid
                FROM pg_depend
                WHERE classid = 'pg_class'::regclass AND deptype = 'i'
                AND refclassid = 'pg_class'::regclass AND refobjid = ANY (tables)
            )
            SELECT format('%s uses up the sequence %s, which ends before 64 bits are full; mend it '
                          'with: ', relation::regclass, seqrelid::regclass)
                || concat_ws('; ', column_change, sequence_change)
            FROM uses
            JOIN pg_sequence ON seqrelid = sequence
            JOIN pg_attribute ON attrelid = relation AND attnum = column_number,
            LATERAL (
                SELECT CASE WHEN typcategory = 'S' THEN 'text' ELSE 'bigint' END AS wide_type,
                    CASE WHEN seqincrement > 0 THEN 'NO MAXVALUE' ELSE 'NO MINVALUE' END AS no_end,
                    -- (A domain may be narrow, whatever it is based on.)
                    atttypid IN ('bigint'::regtype, 'numeric'::regtype, 'text'::regtype,
                                 'varchar'::regtype) AND atttypmod = -1 AS is_wide,
                    seqtypid = 'bigint'::regtype
                    AND (seqmax = 9223372036854775807 OR seqincrement < 0)
                    AND (seqmin = -9223372036854775808 OR seqincrement > 0) AS is_endless
                FROM pg_type WHERE pg_type.oid = atttypid
            ) AS found,
            LATERAL (SELECT
                CASE WHEN NOT is_wide
                THEN format('ALTER TABLE %s ALTER COLUMN %I TYPE %s', relation::regclass, attname,
                            wide_type) END,
                CASE WHEN NOT is_endless
                THEN format('ALTER SEQUENCE %s AS bigint %s', seqrelid::regclass, no_end) END
            ) AS changes (column_change, sequence_change)
            WHERE column_change IS NOT NULL OR sequence_change IS NOT NULL)
        FROM (SELECT $1, $2) AS given (tables, relations)
        $checks$ INTO faults USING tables, relations;
        IF faults <> '{}' THEN
            RAISE EXCEPTION '%', faults[1];
        END IF;

        -- A trigger of users_revenue may be harmless, or change what is written. So if there is
        -- one, a row is written and taken back: the key is in mixed case, not trimmed and not in
        -- ASCII; a trigger may change any of that.
        DECLARE
            trigger_name name := (
                SELECT min(tgname) FROM pg_trigger
                WHERE tgrelid = 'users_revenue'::regclass AND NOT tgisinternal
                AND tgenabled <> 'D');
            probe constant text := ' Pröbe, which create_table.sql tries and takes back ';
            -- Small and large ones, and a sum below zero: a trigger may look at only some of them.
            amounts constant numeric[] := '{0.000000000000000001, 0.000000000000000001,
                111111111111111111.1, -222222222222222222.2}';
            amount numeric;
            is_as_written boolean;
        BEGIN
            IF trigger_name IS NOT NULL THEN
                BEGIN
                    FOREACH amount IN ARRAY amounts LOOP
                        INSERT INTO users_revenue AS old (user_id, revenue) VALUES (probe, amount)
                        ON CONFLICT (user_id)
                        DO UPDATE SET revenue = old.revenue + excluded.revenue;
                    END LOOP;
                    SET CONSTRAINTS ALL IMMEDIATE;  -- runs deferred triggers now
                    is_as_written := EXISTS (
                        SELECT FROM users_revenue WHERE user_id = probe
                        AND revenue = (SELECT sum(each) FROM unnest(amounts) AS each));
                    RAISE EXCEPTION USING ERRCODE = 'ZZZZZ';  -- takes the row back
                EXCEPTION
                    -- ZZZZZ: variables keep their values. Anything else refused the probe, perhaps
                    -- only its key: is_as_written is NULL then, and that is no fault.
                    WHEN OTHERS THEN NULL;
                END;
                IF NOT is_as_written THEN
                    RAISE EXCEPTION '%', format(
                        'users_revenue has a trigger that changes what is written; mend it with: '
                        'ALTER TABLE users_revenue DISABLE TRIGGER %I', trigger_name);
                END IF;
            END IF;
        END;
    END IF;

    -- ---- The tables belong together --------------------------------------------------------

    DECLARE
        -- What there is now, and what there was when the tables were stamped.
        users_now boolean;  -- whether there are any
        ids_now boolean;
        positions_now boolean;
        users_then boolean;  -- NULL without a stamp
        ids_then boolean;
        positions_then boolean;

        -- The stamps, and what they say.
        database text;
        stamps text[];  -- of all three
        new_stamp text;
        can_stamp_later boolean;  -- the stamps are right but for the shape or a file
        shape_or_file constant text := '"(shape|file)": [^,}]*';
        is_locked boolean := false;  -- against others who stamp, if this role may lock
        old_stamp jsonb;
        have_one_origin boolean;
        -- event_producers and event_logs are: what was counted is known, whatever became of users.
        record_is_in_place boolean;
        were_truncated_at_once boolean;
        rewritten_and_empty text;  -- such a table, perhaps by TRUNCATE
        may_stamp boolean;

        -- The verdict.
        emptied text;  -- the table that lost what it held
        fault text;
        record_is_lost boolean;
        existing text;
        recount text;
        begin_at_zero text;
        old_comment text;
    BEGIN
        SELECT system_identifier || '.' || oid INTO database
        FROM pg_control_system(), pg_database WHERE datname = current_database();
        LOOP
            -- Others may count meanwhile. So first the stamps are read, and then, in one statement,
            -- which sees one moment, what the tables hold: it may be more than the stamps say, not
            -- less.
            stamps := ARRAY(SELECT substring(obj_description(id, 'pg_class') FROM stamp_pattern)
                            FROM unnest(tables) WITH ORDINALITY AS given (id, number)
                            ORDER BY number);
            SELECT EXISTS (SELECT FROM users_revenue),
                EXISTS (SELECT FROM event_producers WHERE applied <> '{}'),
                EXISTS (SELECT FROM event_logs WHERE position > 0)
            INTO users_now, ids_now, positions_now;
            SELECT jsonb_build_object('database', database, 'shape', shape)
                || jsonb_object_agg(name, jsonb_build_object(
                    'oid', id, 'file', pg_relation_filenode(id), 'holds', holds))
            INTO new_stamp
            FROM (VALUES
                ('users_revenue', 'users_revenue'::regclass::oid, users_now),
                ('event_producers', 'event_producers'::regclass, ids_now),
                ('event_logs', 'event_logs'::regclass, positions_now)
            ) AS listed (name, id, holds);
            IF new_stamp = ALL (stamps) THEN
                RETURN;
            END IF;
            SELECT bool_and(pg_has_role(relowner, 'USAGE')) INTO may_stamp
            FROM pg_class WHERE oid = ANY (tables);
            EXIT WHEN is_locked OR NOT may_stamp;

            -- This is to be stamped. But another one may have counted and stamped since the tables
            -- were looked at, and its stamp would be lost. So all who stamp take this lock, and
            -- look again. (CREATE INDEX CONCURRENTLY holds it, too, while it waits for this
            -- transaction to end. So if only the shape or a file differs from the stamps, the lock
            -- is not waited for, and the stamp is left to a later run.)
            can_stamp_later := regexp_replace(new_stamp, shape_or_file, '', 'g') = ALL (
                SELECT regexp_replace(stamp, shape_or_file, '', 'g') FROM unnest(stamps) AS stamp);
            BEGIN
                IF can_stamp_later THEN
                    LOCK TABLE ONLY users_revenue, ONLY event_producers, ONLY event_logs
                        IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
                ELSE
                    LOCK TABLE ONLY users_revenue, ONLY event_producers, ONLY event_logs
                        IN SHARE UPDATE EXCLUSIVE MODE;
                END IF;
            EXCEPTION
                -- An owner without the right to UPDATE may COMMENT, but not LOCK.
                WHEN insufficient_privilege THEN NULL;
                WHEN lock_not_available THEN
                    IF can_stamp_later THEN
                        EXIT;
                    END IF;
                    RAISE;
            END;
            is_locked := true;
        END LOOP;

        -- A table is in place if it is the one that its stamp names: in that database, with that
        -- oid. One that was created anew, or restored from a dump, is not. Whether the three have
        -- one origin:
        --
        --     no stamp at all                     yes: they are taken as they are
        --     the same stamp, all in place        yes
        --     the same stamp, none in place       yes: a dump of all three was restored
        --     a table lacks the stamp of the      yes: somebody replaced its comment; the stamp
        --     others, which says that it is       of the others is its own, too
        --     in place
        --     anything else                       no
        --
        -- (old_stamp is any of the stamps: it matters only if they have one origin.)
        WITH stamped AS (
            SELECT relname::text AS name, oid::text, relfilenode::text AS file,
                xmin::text AS written_by, stamps[array_position(tables, oid)] AS stamp
            FROM pg_class WHERE oid = ANY (tables)
        ), named AS (
            -- known: its own stamp or, if it has none, that of the others
            SELECT *, coalesce(stamp, max(stamp) OVER ())::jsonb AS known FROM stamped
        ), compared AS (
            SELECT *, known -> name ->> 'file' <> file AS has_new_file, coalesce(
                known ->> 'database' = database AND known -> name ->> 'oid' = oid, false
            ) AS is_in_place
            FROM named
        )
        SELECT
            count(DISTINCT (is_in_place, CASE WHEN is_in_place THEN known ELSE stamp::jsonb END))
                = 1,
            bool_and(is_in_place) FILTER (WHERE name <> 'users_revenue'),
            -- One transaction gave a new file to all three.
            bool_and(is_in_place AND has_new_file) AND count(DISTINCT written_by) = 1,
            min(name) FILTER (
                WHERE has_new_file AND new_stamp::jsonb -> name ->> 'holds' = 'false'),
            max(stamp)::jsonb
        INTO have_one_origin, record_is_in_place, were_truncated_at_once, rewritten_and_empty,
            old_stamp
        FROM compared;
        users_then := old_stamp -> 'users_revenue' ->> 'holds';
        ids_then := old_stamp -> 'event_producers' ->> 'holds';
        positions_then := old_stamp -> 'event_logs' ->> 'holds';

        -- Each event fills users_revenue and event_logs, and one with an id event_producers, too: a
        -- table that is empty beside filled ones has lost what it held. Without a stamp, what
        -- there was is NULL, no case applies, and the tables are taken as they are.
        emptied := CASE
            -- One TRUNCATE emptied all; users are opening balances.
            WHEN were_truncated_at_once AND NOT ids_now AND NOT positions_now THEN NULL
            -- What was there is gone.
            WHEN positions_then AND NOT positions_now THEN 'event_logs'
            WHEN ids_then AND NOT ids_now THEN 'event_producers'
            WHEN users_then AND NOT users_now THEN 'users_revenue'
            -- Only the owner of the tables can stamp them. So others may have counted since then:
            -- ids came, and what came with them is gone.
            WHEN ids_now AND NOT ids_then AND NOT positions_now THEN 'event_logs'
            WHEN ids_now AND NOT ids_then AND NOT users_now THEN 'users_revenue'
            -- Users came, and no position; or an empty table is another file than it was. This may
            -- be right (opening balances; VACUUM FULL). A role that may stamp takes it as right,
            -- also when data_processor.py runs as this role. Any other role stops here until the
            -- owner has run this file.
            WHEN may_stamp THEN NULL
            WHEN users_now AND NOT users_then AND NOT positions_now THEN 'event_logs'
            ELSE rewritten_and_empty
        END;
        IF NOT (users_now OR ids_now OR positions_now) THEN
            fault := NULL;  -- nothing was counted yet, or all of it is to be counted again
        ELSIF have_one_origin THEN
            fault := emptied || ' was emptied';  -- NULL if none was
            record_is_lost := emptied <> 'users_revenue';
        ELSE
            fault := 'one of them came back without the others';
            IF created <> '{}' THEN
                fault := 'missing: ' || array_to_string(created, ', ');
            END IF;
            record_is_lost := NOT record_is_in_place;
        END IF;

        IF fault IS NOT NULL THEN
            -- RAISE takes back the tables that were just created: what is advised may name only
            -- those that were there before.
            SELECT string_agg(relname, ', ' ORDER BY array_position(tables, oid)) INTO existing
            FROM pg_class WHERE oid = ANY (tables) AND relname <> ALL (created);
            recount := 'TRUNCATE ' || existing;
            IF record_is_lost THEN  -- nobody knows what was counted
                begin_at_zero := 'move the logs to where data_processor.py does not look, and '
                    'then: ' || recount;
            ELSE  -- tables without stamps are taken as they are: what was counted stays known
                begin_at_zero := 'COMMENT ON TABLE event_producers IS NULL; '
                    'COMMENT ON TABLE event_logs IS NULL';
                IF created = '{}' THEN  -- else users_revenue itself was missing
                    begin_at_zero := 'TRUNCATE users_revenue; '
                        'COMMENT ON TABLE users_revenue IS NULL; ' || begin_at_zero;
                END IF;
            END IF;
            IF NOT may_stamp THEN
                recount := recount || ' (as the owner of the tables)';
                begin_at_zero := begin_at_zero
                    || ' (as the owner of the tables, who then runs create_table.sql)';
            END IF;
            RAISE EXCEPTION 'users_revenue, event_producers and event_logs do not belong together: '
                '%. To count everything again from the logs: %; then run data_processor.py with '
                'all of them. To begin at zero: %', fault, recount, begin_at_zero;
        END IF;

        IF is_locked THEN
            FOREACH listed IN ARRAY tables LOOP
                old_comment := coalesce(obj_description(listed, 'pg_class'), '');
                old_comment := regexp_replace(old_comment, ' ?' || stamp_pattern, '', 'g');
                EXECUTE format('COMMENT ON TABLE %s IS %L', listed,
                               ltrim(format('%s [event tables %s]', old_comment, new_stamp)));
            END LOOP;
        END IF;
    END;
END $$;
