"""What each of the three tables must be, and what becomes of one that is not."""

import os
from decimal import Decimal

from tests.tools import SystemTest, next_line, wait_until
from tests.tools_database import (  # noqa: F401
    database_url,
    give_tables_to_owner,
    open_transaction,
    query,
    setUpModule,
)
from tests.tools_events import with_id

# A users_revenue with a partition, which takes every user.
PARTITIONED = (
    "DROP TABLE users_revenue, event_producers, event_logs;"
    "CREATE TABLE users_revenue (user_id text PRIMARY KEY, revenue numeric NOT NULL) "
    "PARTITION BY LIST (user_id);"
    "CREATE TABLE part0 PARTITION OF users_revenue DEFAULT;"
)

ROUNDING = (
    "CREATE OR REPLACE FUNCTION rounds() RETURNS trigger LANGUAGE plpgsql AS "
    "'BEGIN NEW.revenue := round(NEW.revenue, 2); RETURN NEW; END';"
)


class Shape(SystemTest):
    """A table that does not fit is refused; the statement that the refusal ends with mends it."""

    FAULTS = {
        "unlogged": (
            "ALTER TABLE users_revenue SET UNLOGGED",
            "is emptied when PostgreSQL crashes",
        ),
        "unlogged producers": (
            "ALTER TABLE event_producers SET UNLOGGED",
            "event_producers is empt",
        ),
        "unlogged logs": (
            "ALTER TABLE event_logs SET UNLOGGED",
            "event_logs is emptied when PostgreSQL crashes",
        ),
        "an heir": (
            "CREATE TABLE heir () INHERITS (users_revenue)",
            "has the inheritance child heir",
        ),
        "a rule": (
            "CREATE RULE nothing AS ON INSERT TO users_revenue DO INSTEAD NOTHING",
            "has a rule",
        ),
        "a rounding trigger": (
            ROUNDING + "CREATE TRIGGER rounding BEFORE INSERT OR UPDATE ON users_revenue "
            "FOR EACH ROW EXECUTE FUNCTION rounds()",
            "has a trigger that changes what is written",
        ),
        "a swallowing trigger": (
            "CREATE OR REPLACE FUNCTION swallows() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN RETURN NULL; END';"
            "CREATE TRIGGER swallowing BEFORE UPDATE ON users_revenue "
            "FOR EACH ROW EXECUTE FUNCTION swallows()",
            "has a trigger that changes what is written",
        ),
        "serial": (
            "ALTER TABLE users_revenue ADD id serial",
            "which ends before 64 bits are full",
        ),
        "a small identity": (
            "ALTER TABLE users_revenue ADD id int GENERATED ALWAYS AS IDENTITY",
            "which ends before 64 bits are full",
        ),
        "a trigger that changes users": (
            "CREATE OR REPLACE FUNCTION lowers() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN NEW.user_id := lower(NEW.user_id); RETURN NEW; END';"
            "CREATE TRIGGER lowering BEFORE INSERT ON users_revenue "
            "FOR EACH ROW EXECUTE FUNCTION lowers()",
            "has a trigger that changes what is written",
        ),
        "a trigger that rounds afterwards": (
            "CREATE OR REPLACE FUNCTION rounds_later() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN UPDATE users_revenue SET revenue = round(revenue, 2) "
            "WHERE user_id = NEW.user_id AND revenue <> round(revenue, 2); RETURN NULL; END';"
            "CREATE TRIGGER rounding AFTER INSERT OR UPDATE ON users_revenue "
            "FOR EACH ROW EXECUTE FUNCTION rounds_later()",
            "has a trigger that changes what is written",
        ),
        "a second key without case": (
            "CREATE COLLATION IF NOT EXISTS nocase (provider = icu, deterministic = false, "
            "locale = 'und-u-ks-level2');"
            "CREATE UNIQUE INDEX second ON users_revenue (user_id COLLATE nocase)",
            "takes different rows for one",
        ),
        "rounded": (
            "ALTER TABLE users_revenue ALTER revenue TYPE numeric(12,2)",
            "numeric(12,2)",
        ),
        "floating": (
            "ALTER TABLE users_revenue ALTER revenue TYPE double precision",
            "double precision",
        ),
        "users without case": (
            "CREATE COLLATION IF NOT EXISTS nocase (provider = icu, deterministic = false, "
            "locale = 'und-u-ks-level2');"
            "ALTER TABLE users_revenue ALTER user_id TYPE text COLLATE nocase",
            "keeps user_id as text with the collation nocase",
        ),
        "a default that no cast takes along": (
            "ALTER TABLE users_revenue ALTER revenue TYPE text;"
            "ALTER TABLE users_revenue ALTER revenue SET DEFAULT '0'",
            "keeps revenue as text",
        ),
        "a small column of a large sequence": (
            "CREATE SEQUENCE IF NOT EXISTS large;"
            "ALTER TABLE users_revenue ADD id int DEFAULT nextval('large')",
            "which ends before 64 bits are full; mend it with: ALTER TABLE users_revenue "
            "ALTER COLUMN id TYPE bigint\n",
        ),
        "a text of a small sequence": (
            "CREATE SEQUENCE IF NOT EXISTS small AS smallint;"
            "ALTER SEQUENCE small AS smallint MAXVALUE 32767;"
            "ALTER TABLE users_revenue ADD id text DEFAULT 'n' || nextval('small')",
            "which ends before 64 bits are full; mend it with: ALTER SEQUENCE small AS bigint "
            "NO MAXVALUE\n",
        ),
        "a sequence with an end": (
            "CREATE SEQUENCE IF NOT EXISTS short; ALTER SEQUENCE short MAXVALUE 3;"
            "ALTER TABLE users_revenue ADD id bigint DEFAULT nextval('short')",
            "users_revenue uses up the sequence short, which ends",
        ),
        "a sequence that ends below": (
            "CREATE SEQUENCE IF NOT EXISTS down INCREMENT -1 MINVALUE -5;"
            "ALTER TABLE users_revenue ADD id bigint DEFAULT nextval('down')",
            "mend it with: ALTER SEQUENCE down AS bigint NO MINVALUE\n",
        ),
        "a domain of small numbers": (
            "DROP DOMAIN IF EXISTS few CASCADE; CREATE DOMAIN few AS smallint;"
            "CREATE SEQUENCE IF NOT EXISTS large;"
            "ALTER TABLE users_revenue ADD id few DEFAULT nextval('large')",
            "mend it with: ALTER TABLE users_revenue ALTER COLUMN id TYPE bigint\n",
        ),
        "a text of few characters": (
            "CREATE SEQUENCE IF NOT EXISTS large;"
            "ALTER TABLE users_revenue ADD id varchar(2) DEFAULT nextval('large')::text",
            "mend it with: ALTER TABLE users_revenue ALTER COLUMN id TYPE text\n",
        ),
        "a trigger that allows no debts": (
            "CREATE OR REPLACE FUNCTION lifts() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN NEW.revenue := greatest(NEW.revenue, 0); RETURN NEW; END';"
            "CREATE TRIGGER lifting BEFORE INSERT OR UPDATE ON users_revenue "
            "FOR EACH ROW EXECUTE FUNCTION lifts()",
            "has a trigger that changes what is written",
        ),
        "a trigger that rounds small sums": (
            "CREATE OR REPLACE FUNCTION rounds_small() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN IF NEW.revenue < 9 THEN NEW.revenue := round(NEW.revenue, 2); END IF; "
            "RETURN NEW; END';"
            "CREATE TRIGGER rounding BEFORE UPDATE ON users_revenue "
            "FOR EACH ROW EXECUTE FUNCTION rounds_small()",
            "has a trigger that changes what is written",
        ),
        "a serial of producers": (
            "ALTER TABLE event_producers ADD id serial",
            "event_producers uses up the sequence",
        ),
        "an unlogged partition": (
            PARTITIONED + "ALTER TABLE part0 SET UNLOGGED",
            "part0 is emptied when PostgreSQL crashes",
        ),
        "a trigger of a partition": (
            PARTITIONED + ROUNDING + "CREATE TRIGGER rounding BEFORE INSERT ON part0 "
            "FOR EACH ROW EXECUTE FUNCTION rounds()",
            "part0 has a trigger, which may change what is written",
        ),
        "a deferred trigger": (
            "CREATE OR REPLACE FUNCTION deletes() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN DELETE FROM users_revenue WHERE user_id = NEW.user_id; RETURN NULL; END';"
            "CREATE CONSTRAINT TRIGGER deleting AFTER INSERT ON users_revenue "
            "INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION deletes()",
            "users_revenue has a trigger that changes what is written",
        ),
        "a trigger that forgets ids": (
            "CREATE OR REPLACE FUNCTION swallows() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN RETURN NULL; END';"
            "CREATE TRIGGER swallowing BEFORE UPDATE ON event_producers "
            "FOR EACH ROW EXECUTE FUNCTION swallows()",
            "event_producers has a trigger, which may change what is written",
        ),
        "a trigger that forgets positions": (
            "CREATE OR REPLACE FUNCTION forgets() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN NEW.position := 0; RETURN NEW; END';"
            "CREATE TRIGGER forgetting BEFORE UPDATE ON event_logs "
            "FOR EACH ROW EXECUTE FUNCTION forgets()",
            "event_logs has a trigger, which may change what is written",
        ),
        "producers without a key": (
            "ALTER TABLE event_producers DROP CONSTRAINT event_producers_pkey",
            "event_producers has no unique key on producer_id",
        ),
        "logs without a key": (
            "ALTER TABLE event_logs DROP CONSTRAINT event_logs_pkey",
            "event_logs has no unique key on log_id",
        ),
        "a deferrable key of producers": (
            "ALTER TABLE event_producers DROP CONSTRAINT event_producers_pkey, "
            "ADD UNIQUE (producer_id) DEFERRABLE",
            "event_producers has a deferrable unique key",
        ),
        "a second key of producers": (
            "CREATE UNIQUE INDEX second ON event_producers (lower(producer_id))",
            "event_producers has the unique key second, which takes different rows for one",
        ),
        "a second key of logs": (
            "ALTER TABLE event_logs ADD UNIQUE (position)",
            "event_logs has the unique key event_logs_position_key",
        ),
        "producers without case": (
            "CREATE COLLATION IF NOT EXISTS nocase (provider = icu, deterministic = false, "
            "locale = 'und-u-ks-level2');"
            "ALTER TABLE event_producers ALTER producer_id TYPE text COLLATE nocase",
            "keeps producer_id as text with the collation nocase",
        ),
        "ids that may be NULL": (
            "ALTER TABLE event_producers ALTER applied DROP NOT NULL, ALTER applied DROP DEFAULT",
            "event_producers needs a default for applied, and no NULL",
        ),
        "no ids": (
            "ALTER TABLE event_producers DROP applied",
            "event_producers has no column applied",
        ),
        "a small position": (
            "ALTER TABLE event_logs ALTER position TYPE int",
            "event_logs keeps position as integer",
        ),
        "no position": (
            "ALTER TABLE event_logs DROP position",
            "event_logs has no column position",
        ),
    }

    def test_a_table_that_does_not_fit_is_refused_and_mended_as_proposed(self):
        for fault, (statement, words) in self.FAULTS.items():
            with self.subTest(fault):
                query("DROP TABLE IF EXISTS heir")
                self.setUp()
                log = self.path("log", with_id("p", 1, "Alice", "0.0001"))
                query(statement)
                _, errors = self.processor(log, status=1)
                self.assertIn(words, errors)
                query(errors.partition("mend it with: ")[2])
                self.processor(log)
                self.processor("--from-start", log)
                self.assertRevenue({"Alice": Decimal("0.0001")})
        query("DROP TABLE IF EXISTS heir")

    def test_a_follower_counts_nothing_into_a_table_that_was_altered(self):
        log = self.path("log", with_id("p", 1, "u", "0.004"))
        follower = self.start("data_processor.py", "--follow", log)
        wait_until(lambda: query("SELECT 1 FROM users_revenue"), "it follows")
        query("ALTER TABLE users_revenue ALTER revenue TYPE numeric(12,3)")
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2, "u", "0.0004"))
        self.assertIn("numeric(12,3)", next_line(follower.stderr))
        query("ALTER TABLE users_revenue ALTER revenue TYPE numeric")
        self.assertIn("they are applied again", next_line(follower.stderr))
        ((revenue,),) = query("SELECT trim_scale(revenue)::text FROM users_revenue")
        self.assertEqual(revenue, "0.0044")

    def test_a_table_with_a_bigserial_or_a_harmless_trigger_is_kept(self):
        query(
            "ALTER TABLE users_revenue ADD id bigserial, ADD changed timestamptz;"
            "CREATE OR REPLACE FUNCTION notes() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN NEW.changed := now(); RETURN NEW; END';"
            "CREATE TRIGGER noting BEFORE INSERT OR UPDATE ON users_revenue "
            "FOR EACH ROW EXECUTE FUNCTION notes()"
        )
        self.processor(self.path("log", with_id("p", 1) + with_id("p", 2)))
        self.assertEqual(
            query("SELECT user_id, revenue FROM users_revenue"), [("user1", 2)]
        )

    def test_a_partitioned_table_is_kept(self):
        query(
            PARTITIONED + "CREATE TABLE part1 PARTITION OF users_revenue "
            "FOR VALUES IN ('user2', 'user5')"
        )
        lines = "".join(
            with_id("p", number, f"user{number}") for number in range(1, 10)
        )
        self.processor(self.path("log", lines))
        self.assertRevenue({f"user{number}": 1 for number in range(1, 10)})

    def test_the_tables_fit_although_identifiers_are_quoted(self):
        url = os.environ["DATABASE_URL"]
        query("DROP TABLE users_revenue, event_producers, event_logs")
        options = {"PGOPTIONS": "-c quote_all_identifiers=on", "DATABASE_URL": url}
        self.processor(self.path("log", with_id("p", 1)), **options)
        self.assertRevenue({"user1": 1})

    def test_rows_that_row_level_security_may_hide_are_refused(self):
        query(
            "DROP ROLE IF EXISTS events_test_writer; CREATE ROLE events_test_writer;"
            "GRANT ALL ON users_revenue, event_producers, event_logs TO events_test_writer;"
            "ALTER TABLE event_producers ENABLE ROW LEVEL SECURITY;"
            "CREATE POLICY new_ones ON event_producers FOR INSERT WITH CHECK (true)"
        )
        self.addCleanup(query, "DROP OWNED BY events_test_writer; DROP ROLE events_test_writer")
        log = self.path("log", with_id("p", 1))
        writer = {"PGOPTIONS": "-c role=events_test_writer"}
        _, errors = self.processor(log, status=1, **writer)
        self.assertIn("event_producers has row level security, which may hide rows", errors)
        query(errors.partition("mend it with: ")[2])
        self.processor(log, **writer)
        self.assertRevenue({"user1": 1})

    def test_an_owner_whom_row_level_security_binds_is_told_to_lift_it(self):
        give_tables_to_owner(self)
        query("ALTER TABLE event_logs ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        log = self.path("log", with_id("p", 1))
        owner = {"PGOPTIONS": "-c role=events_test_owner"}
        _, errors = self.processor(log, status=1, **owner)
        self.assertIn("ALTER TABLE event_logs NO FORCE ROW LEVEL SECURITY", errors)
        query(errors.partition("mend it with: ")[2])
        self.processor(log, **owner)
        self.assertRevenue({"user1": 1})

    def test_the_owner_of_tables_with_row_level_security_sees_every_row(self):
        give_tables_to_owner(self)
        for table in ("users_revenue", "event_producers", "event_logs"):
            query(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        owner = {"PGOPTIONS": "-c role=events_test_owner"}
        self.processor(self.path("log", with_id("p", 1)), **owner)
        self.assertRevenue({"user1": 1})

    def test_what_is_no_table_is_refused(self):
        query("DROP FOREIGN DATA WRAPPER IF EXISTS elsewhere CASCADE")
        query("CREATE FOREIGN DATA WRAPPER elsewhere")
        self.addCleanup(query, "DROP FOREIGN DATA WRAPPER elsewhere CASCADE")
        query("CREATE SERVER there FOREIGN DATA WRAPPER elsewhere")
        kinds = {
            "VIEW": "AS SELECT * FROM renamed",
            "MATERIALIZED VIEW": "AS SELECT * FROM renamed",
            "FOREIGN TABLE": "(user_id text, revenue numeric) SERVER there",
        }
        for kind, content in kinds.items():
            with self.subTest(kind):
                self.setUp()
                query(
                    "ALTER TABLE users_revenue RENAME TO renamed;"
                    f"CREATE {kind} users_revenue {content}"
                )
                try:
                    _, errors = self.processor(self.path("log", with_id("p", 1)), status=1)
                finally:
                    query(f"DROP {kind} users_revenue; DROP TABLE renamed")
                self.assertIn("users_revenue is no table; rename it", errors)

    def test_a_table_that_is_partitioned_by_another_column_is_refused(self):
        for key in ("revenue", "user_id, revenue", "lower(user_id)"):
            with self.subTest(key):
                query(
                    "DROP TABLE IF EXISTS users_revenue, event_producers, event_logs;"
                    "CREATE TABLE users_revenue (user_id text, revenue numeric NOT NULL) "
                    f"PARTITION BY HASH ({key})"
                )
                _, errors = self.processor(self.path("log", with_id("p", 1)), status=1)
                self.assertIn("users_revenue is partitioned by another column", errors)
        query("DROP TABLE users_revenue")

    def test_partitioned_tables_of_ids_and_positions_are_kept(self):
        query(
            "DROP TABLE event_producers, event_logs;"
            "CREATE TABLE event_producers (producer_id text PRIMARY KEY, "
            "applied int8multirange NOT NULL DEFAULT '{}') PARTITION BY HASH (producer_id);"
            "CREATE TABLE part1 PARTITION OF event_producers "
            "FOR VALUES WITH (MODULUS 1, REMAINDER 0);"
            "CREATE TABLE event_logs (log_id bytea PRIMARY KEY, position bigint NOT NULL DEFAULT 0,"
            " digest bytea NOT NULL DEFAULT sha256('')) PARTITION BY HASH (log_id);"
            "CREATE TABLE part2 PARTITION OF event_logs FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
        )
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        self.processor("--from-start", log)
        self.assertRevenue({"user1": 1})

    def test_a_follower_counts_nothing_into_a_partition_that_was_altered(self):
        query(PARTITIONED)
        log = self.path("log", with_id("p", 1, "Alice", "0.004"))
        follower = self.start("data_processor.py", "--follow", log)
        wait_until(lambda: query("SELECT 1 FROM users_revenue"), "it follows")
        query("ALTER TABLE part0 SET UNLOGGED")
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2, "Alice"))
        self.assertIn("part0 is emptied when PostgreSQL crashes", next_line(follower.stderr))
        query("ALTER TABLE part0 SET LOGGED")
        self.assertIn("they are applied again", next_line(follower.stderr))
        self.assertRevenue({"Alice": Decimal("1.004")})

    def test_an_index_is_created_concurrently_while_events_are_counted(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        with open_transaction("LOCK TABLE event_logs IN SHARE UPDATE EXCLUSIVE MODE"):
            query("ALTER TABLE users_revenue ALTER revenue SET STATISTICS 100")  # another shape
            with open(log, "a", encoding="utf-8") as file:
                file.write(with_id("p", 2))
            self.processor(log)
        self.assertRevenue({"user1": 2})

    def test_the_first_events_are_counted_while_a_partition_is_vacuumed(self):
        query(PARTITIONED)
        with open_transaction("LOCK TABLE part0 IN SHARE UPDATE EXCLUSIVE MODE"):
            self.processor(self.path("log", with_id("p", 1)))
        self.assertRevenue({"user1": 1})

    def test_a_path_to_temporary_tables_alone_is_refused(self):
        dsn = database_url(options="-c search_path=pg_temp")
        _, errors = self.processor(self.path("log", with_id("p", 1)), status=1, DATABASE_URL=dsn)
        self.assertIn("leads to temporary tables alone", errors)

    def test_the_tables_fit_although_strings_have_escapes(self):
        dsn = database_url(options="-c standard_conforming_strings=off")
        log = self.path("log", with_id("p", 1))
        for _ in range(2):
            self.processor(log, DATABASE_URL=dsn)
        self.assertRevenue({"user1": 1})
