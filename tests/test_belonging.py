"""The three tables belong together, and still have the shape that was checked."""

import os
import subprocess

from tests.tools import HERE, SystemTest, wait_until
from tests.tools_database import query, setUpModule  # noqa: F401
from tests.tools_events import with_id

ALL_TABLES = "users_revenue, event_producers, event_logs"


def statement_after(words, errors):
    """Return the statement that a refusal proposes after some words."""
    beginning = errors.index(words) + len(words)
    return errors[beginning:].split("; then")[0].strip().rstrip(".")


class Belonging(SystemTest):
    """A table that was emptied, is missing or came back alone is noticed before anything counts."""

    def setUp(self):
        super().setUp()
        self.log = self.path(
            "log", "".join(with_id("p", number) for number in range(1, 301))
        )
        self.processor(self.log)
        self.assertRevenue({"user1": 300})
        self.more = with_id("p", 301)

    def append_more(self):
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(self.more)

    def refused(self, words):
        """Check that a run changes nothing and says these words; return all that it says."""
        self.append_more()
        before = self.contents()
        _, errors = self.processor(self.log, status=1)
        self.assertIn("do not belong together", errors)
        self.assertIn(words, errors)
        self.assertEqual(self.contents(), before)
        return errors

    def contents(self):
        """Return what is in the tables that exist."""
        found = {}
        for table in ALL_TABLES.split(", "):
            ((exists,),) = query("SELECT to_regclass(%s) IS NOT NULL", [table])
            if exists:
                found[table] = query(f"SELECT * FROM {table} ORDER BY 1")
        return found

    def count_again(self, errors):
        """Execute the statement that counts everything again, and check that it does."""
        query(statement_after("again from the logs:", errors))
        self.processor(self.log)
        self.assertRevenue({"user1": 301})

    def begin_at_zero(self, errors):
        """Execute the statements that begin at zero, and check that only new events count."""
        query(statement_after("begin at zero:", errors))
        self.processor(self.log)
        self.assertRevenue({"user1": 1})

    def test_an_emptied_users_revenue_is_refused(self):
        for how in ("TRUNCATE", "DELETE FROM"):
            with self.subTest(how):
                self.setUp()
                query(f"{how} users_revenue")
                self.count_again(self.refused("users_revenue was emptied"))

    def test_with_an_emptied_users_revenue_one_can_begin_at_zero(self):
        query("TRUNCATE users_revenue")
        self.begin_at_zero(self.refused("users_revenue was emptied"))

    def test_a_missing_users_revenue_is_refused(self):
        losses = {
            "dropped": "DROP TABLE users_revenue",
            "renamed": "ALTER TABLE users_revenue RENAME TO old; ALTER INDEX users_revenue_pkey "
            "RENAME TO old_pkey",
        }
        for how, statement in losses.items():
            with self.subTest(how):
                query("DROP TABLE IF EXISTS old")
                self.setUp()
                query(statement)
                self.count_again(self.refused("missing: users_revenue"))

    def test_with_a_missing_users_revenue_one_can_begin_at_zero(self):
        query("DROP TABLE users_revenue")
        self.begin_at_zero(self.refused("missing: users_revenue"))

    def test_emptied_producers_are_refused(self):
        query("TRUNCATE event_producers")
        self.count_again(self.refused("event_producers was emptied"))

    def test_emptied_logs_are_refused(self):
        query("DELETE FROM event_logs")
        self.count_again(self.refused("event_logs was emptied"))

    def test_two_emptied_tables_are_refused(self):
        query("TRUNCATE event_producers, event_logs")
        self.refused("was emptied")

    def test_missing_producers_and_logs_are_refused(self):
        query("DROP TABLE event_producers, event_logs")
        self.count_again(self.refused("missing: event_producers, event_logs"))

    def test_a_users_revenue_that_came_back_alone_is_refused(self):
        dump = subprocess.run(
            ["pg_dump", "-t", "users_revenue", os.environ["DATABASE_URL"]],
            capture_output=True,
            check=True,
        ).stdout
        query("DROP TABLE users_revenue")
        restored = subprocess.run(
            ["psql", "-q", "-v", "ON_ERROR_STOP=1", os.environ["DATABASE_URL"]],
            input=dump,
            capture_output=True,
        )
        self.assertEqual(restored.returncode, 0, restored.stderr)
        self.count_again(self.refused("came back without the others"))

    def test_tables_that_came_back_together_go_on(self):
        dump = subprocess.run(
            [
                "pg_dump",
                "-t",
                "users_revenue",
                "-t",
                "event_*",
                os.environ["DATABASE_URL"],
            ],
            capture_output=True,
            check=True,
        ).stdout
        query(f"DROP TABLE {ALL_TABLES}")
        subprocess.run(
            ["psql", "-q", os.environ["DATABASE_URL"]], input=dump, check=True
        )
        self.append_more()
        self.processor(self.log)
        self.assertRevenue({"user1": 301})

    def test_tables_that_were_emptied_together_are_begun_anew(self):
        query(
            f"TRUNCATE {ALL_TABLES}; INSERT INTO users_revenue VALUES ('user1', 1000)"
        )
        self.processor(self.log)
        self.assertRevenue({"user1": 1300})

    def test_an_emptied_table_is_noticed_by_a_follower(self):
        follower = self.start("data_processor.py", "--follow", self.log)
        self.append_more()
        wait_until(
            lambda: query("SELECT revenue FROM users_revenue") == [(301,)], "it follows"
        )
        query("DELETE FROM users_revenue")
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(with_id("p", 302))
        self.assertIn("users_revenue was emptied", follower.stderr.readline())
        self.assertRevenue({})

    def test_a_backup_in_another_cluster_whose_oids_are_alike_in_part_is_complete(self):
        # What a fresh cluster gives: some tables get the oids that they had, and others do not.
        ((comment,),) = query("SELECT obj_description('users_revenue'::regclass)")
        parts = comment.split(" ")
        parts[2] = "another.cluster"
        parts[3] = "1"
        for table in ALL_TABLES.split(", "):
            query(f"COMMENT ON TABLE {table} IS '{' '.join(parts)}'")
        self.append_more()
        self.processor(self.log)
        self.assertRevenue({"user1": 301})

    def test_a_comment_that_was_replaced_is_stamped_again(self):
        query("COMMENT ON TABLE users_revenue IS 'docs'")
        self.append_more()
        self.processor(self.log)
        self.assertRevenue({"user1": 301})
        ((comment,),) = query("SELECT obj_description('users_revenue'::regclass)")
        self.assertRegex(comment, r"^docs \[events ")

    def test_an_emptied_table_is_noticed_although_all_were_rewritten(self):
        query("TRUNCATE users_revenue")
        for table in ALL_TABLES.split(", "):
            vacuum = ["psql", "-qc", f"VACUUM FULL {table}", os.environ["DATABASE_URL"]]
            subprocess.run(vacuum, check=True)
        self.refused("users_revenue was emptied")

    def test_who_does_not_own_the_tables_notices_a_loss(self):
        query(
            "DROP ROLE IF EXISTS events_test_writer; CREATE ROLE events_test_writer;"
            f"GRANT ALL ON {ALL_TABLES} TO events_test_writer"
        )
        self.addCleanup(query, "DROP OWNED BY events_test_writer; DROP ROLE events_test_writer")
        writer = {"PGOPTIONS": "-c role=events_test_writer"}
        losses = {
            "users": ("TRUNCATE users_revenue", "users_revenue was emptied"),
            "ids": ("TRUNCATE event_producers, event_logs", "event_producers was emptied"),
        }
        for case, (statement, words) in losses.items():
            with self.subTest(case):
                query(f"TRUNCATE {ALL_TABLES}")
                query((HERE / "create_table.sql").read_text(encoding="utf-8"))
                self.processor(self.log, **writer)
                query(statement)
                _, errors = self.processor(self.log, status=1, **writer)
                self.assertIn(words, errors)

    def test_a_rewritten_table_is_the_same_table(self):
        vacuum = [
            "psql",
            "-qc",
            "VACUUM FULL users_revenue",
            os.environ["DATABASE_URL"],
        ]
        subprocess.run(vacuum, check=True)
        self.append_more()
        self.processor(self.log)
        self.assertRevenue({"user1": 301})

    def test_the_comment_of_a_kept_table_is_kept(self):
        query("COMMENT ON TABLE users_revenue IS 'ours'")
        query(
            "COMMENT ON TABLE event_producers IS NULL; COMMENT ON TABLE event_logs IS NULL"
        )
        self.append_more()
        self.processor(self.log)
        ((comment,),) = query("SELECT obj_description('users_revenue'::regclass)")
        self.assertRegex(comment, r"^ours \[events [0-9a-f]{32} [^]]* t t t\]$")


class Shape(SystemTest):
    """What a table must be, and what becomes of one that is not."""

    FAULTS = {
        "unlogged": (
            "ALTER TABLE users_revenue SET UNLOGGED",
            "is emptied when PostgreSQL crashes",
        ),
        "unlogged producers": (
            "ALTER TABLE event_producers SET UNLOGGED",
            "event_producers is empt",
        ),
        "an heir": ("CREATE TABLE heir () INHERITS (users_revenue)", "has heirs"),
        "a rule": (
            "CREATE RULE nothing AS ON INSERT TO users_revenue DO INSTEAD NOTHING",
            "has a rule",
        ),
        "a rounding trigger": (
            "CREATE FUNCTION pg_temp.nothing() RETURNS void LANGUAGE sql AS '';"
            "CREATE OR REPLACE FUNCTION rounds() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN NEW.revenue := round(NEW.revenue, 2); RETURN NEW; END';"
            "CREATE TRIGGER rounding BEFORE INSERT OR UPDATE ON users_revenue "
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
            "which has less than 64 bits",
        ),
        "a small identity": (
            "ALTER TABLE users_revenue ADD id int GENERATED ALWAYS AS IDENTITY",
            "which has less than 64 bits",
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
            "takes different users for one",
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
    }

    def test_a_table_that_does_not_fit_is_refused_and_mended_as_proposed(self):
        for fault, (statement, words) in self.FAULTS.items():
            with self.subTest(fault):
                query("DROP TABLE IF EXISTS heir")
                self.setUp()
                log = self.path("log", with_id("p", 1, "Alice"))
                query(statement)
                _, errors = self.processor(log, status=1)
                self.assertIn(words, errors)
                query(errors.partition("mend it with: ")[2])
                self.processor(log)
                self.assertRevenue({"Alice": 1})
        query("DROP TABLE IF EXISTS heir")

    def test_a_follower_counts_nothing_into_a_table_that_was_altered(self):
        log = self.path("log", with_id("p", 1, "u", "0.004"))
        follower = self.start("data_processor.py", "--follow", log)
        wait_until(lambda: query("SELECT 1 FROM users_revenue"), "it follows")
        query("ALTER TABLE users_revenue ALTER revenue TYPE numeric(12,3)")
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2, "u", "0.0004"))
        self.assertIn("numeric(12,3)", follower.stderr.readline())
        query("ALTER TABLE users_revenue ALTER revenue TYPE numeric")
        self.assertIn("they are applied again", follower.stderr.readline())
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
            f"DROP TABLE {ALL_TABLES};"
            "CREATE TABLE users_revenue (user_id text PRIMARY KEY, revenue numeric NOT NULL) "
            "PARTITION BY HASH (user_id);"
            "CREATE TABLE part0 PARTITION OF users_revenue "
            "FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
            "CREATE TABLE part1 PARTITION OF users_revenue FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
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
