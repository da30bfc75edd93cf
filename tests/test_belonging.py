"""The three tables belong together, and still have the shape that was checked."""

import json
import os
import subprocess
import unittest.mock

import data_processor
from tests.tools import HERE, SystemTest, next_line, wait_until
from tests.tools_database import (  # noqa: F401
    database_url,
    empty_tables,
    give_tables_to_owner,
    query,
    setUpModule,
    waiting,
)
from tests.tools_events import with_id
from tests.tools_parts import captured

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
        self.assertIn("users_revenue was emptied", next_line(follower.stderr))
        self.assertRevenue({})

    def test_a_comment_that_was_replaced_is_stamped_again(self):
        query("COMMENT ON TABLE users_revenue IS 'docs'")
        self.append_more()
        self.processor(self.log)
        self.assertRevenue({"user1": 301})
        ((comment,),) = query("SELECT obj_description('users_revenue'::regclass)")
        self.assertRegex(comment, r"^docs \[event tables ")

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
            "ids and positions": ("TRUNCATE event_producers, event_logs", "event_logs was emptied"),
            "ids": ("TRUNCATE event_producers", "event_producers was emptied"),
            "positions": ("DELETE FROM event_logs", "event_logs was emptied"),
        }
        for case, (statement, words) in losses.items():
            with self.subTest(case):
                query(f"TRUNCATE {ALL_TABLES}")
                query((HERE / "create_table.sql").read_text(encoding="utf-8"))
                self.processor(self.log, **writer)
                query(statement)
                _, errors = self.processor(self.log, status=1, **writer)
                self.assertIn(words, errors)

    def test_who_does_not_own_the_tables_goes_on_when_the_owner_began_at_zero(self):
        query(
            "DROP ROLE IF EXISTS events_test_writer; CREATE ROLE events_test_writer;"
            f"GRANT ALL ON {ALL_TABLES} TO events_test_writer"
        )
        self.addCleanup(query, "DROP OWNED BY events_test_writer; DROP ROLE events_test_writer")
        writer = {"PGOPTIONS": "-c role=events_test_writer"}
        query("TRUNCATE users_revenue")
        _, errors = self.processor(self.log, status=1, **writer)
        self.assertIn("users_revenue was emptied", errors)
        query(statement_after("begin at zero:", errors).partition(" (as the owner")[0])
        query((HERE / "create_table.sql").read_text(encoding="utf-8"))
        self.append_more()
        self.processor(self.log, **writer)
        self.assertRevenue({"user1": 1})

    def test_an_owner_without_the_right_to_write_stamps_the_tables(self):
        give_tables_to_owner(self)
        for table in ALL_TABLES.split(", "):
            query(
                f"COMMENT ON TABLE {table} IS NULL;"
                f"REVOKE ALL ON {table} FROM events_test_owner;"
                f"GRANT SELECT ON {table} TO events_test_owner"
            )
        query("SET ROLE events_test_owner")
        query((HERE / "create_table.sql").read_text(encoding="utf-8"))
        query("RESET ROLE")
        query("TRUNCATE event_producers")
        self.refused("event_producers was emptied")

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
        self.assertRegex(comment, r"^ours \[event tables \{[^]]*\}\]$")

    def stamp_elsewhere(self):
        """Stamp the tables as if they came from another cluster, where only event_logs had another
        oid: what a fresh cluster gives. (Some tables get the oids that they had.)"""
        ((comment,),) = query("SELECT obj_description('users_revenue'::regclass)")
        stamp = json.loads(comment.partition("[event tables ")[2][:-1])
        stamp["database"] = "another.cluster"
        stamp["event_logs"]["oid"] = "1"
        for table in ALL_TABLES.split(", "):
            query(f"COMMENT ON TABLE {table} IS '[event tables {json.dumps(stamp)}]'")

    def test_a_backup_in_another_cluster_whose_oids_are_alike_in_part_is_complete(self):
        self.stamp_elsewhere()
        self.append_more()
        self.processor(self.log)
        self.assertRevenue({"user1": 301})

    def test_a_table_without_a_stamp_among_those_of_another_cluster_is_refused(self):
        self.stamp_elsewhere()
        query("COMMENT ON TABLE event_producers IS NULL")
        self.count_again(self.refused("came back without the others"))

    def test_ids_that_were_not_restored_elsewhere_are_noticed(self):
        self.stamp_elsewhere()
        query("TRUNCATE event_producers, event_logs")
        self.count_again(self.refused("was emptied"))

    def test_tables_without_stamps_are_taken_as_they_are(self):
        for table in ALL_TABLES.split(", "):
            query(f"COMMENT ON TABLE {table} IS 'ours'")
        self.append_more()
        self.processor(self.log)
        self.assertRevenue({"user1": 301})
        ((comment,),) = query("SELECT obj_description('users_revenue'::regclass)")
        self.assertRegex(comment, r"^ours \[event tables \{[^]]*\}\]$")

    def test_a_table_that_was_rewritten_and_lost_its_stamp_is_the_same(self):
        query("COMMENT ON TABLE users_revenue IS NULL")
        vacuum = ["psql", "-qc", "VACUUM FULL users_revenue", os.environ["DATABASE_URL"]]
        subprocess.run(vacuum, check=True)
        self.append_more()
        self.processor(self.log)
        self.assertRevenue({"user1": 301})

    def test_users_who_were_rewritten_are_no_opening_balances(self):
        query("TRUNCATE event_producers, event_logs")
        vacuum = ["psql", "-qc", "VACUUM FULL users_revenue", os.environ["DATABASE_URL"]]
        subprocess.run(vacuum, check=True)
        self.count_again(self.refused("was emptied"))

    def test_advice_names_tables_that_are_there_although_identifiers_are_quoted(self):
        query("DROP TABLE event_logs")
        quoting = {"PGOPTIONS": "-c quote_all_identifiers=on"}
        _, errors = self.processor(self.log, status=1, **quoting)
        self.assertIn("missing: event_logs", errors)
        self.append_more()
        self.count_again(errors)

    def test_missing_tables_are_created_beside_those_that_are_left(self):
        query("DROP SCHEMA IF EXISTS own CASCADE; CREATE SCHEMA own; DROP TABLE users_revenue")
        self.addCleanup(query, "DROP SCHEMA own CASCADE")
        dsn = database_url(options="-c search_path=own,public")
        _, errors = self.processor(self.log, status=1, DATABASE_URL=dsn)
        self.assertIn("missing: users_revenue", errors)

    def test_words_in_a_comment_that_look_like_a_stamp_are_none(self):
        query("COMMENT ON TABLE users_revenue IS 'Revenue [events 2026 to 2027]'")
        self.append_more()
        self.processor(self.log)
        self.assertRevenue({"user1": 301})
        ((comment,),) = query("SELECT obj_description('users_revenue'::regclass)")
        self.assertRegex(comment, r"^Revenue \[events 2026 to 2027\] \[event tables ")

    def test_a_processor_that_connects_does_not_replace_a_stamp_that_says_more(self):
        empty_tables()
        nothing = self.path("nothing", "")
        run_create_table = data_processor.run_create_table
        calls = []  # when this processor connects, before it counts, and afterwards
        others = []

        def connect_another_one(sql):
            """Let another processor connect when this one has counted and stamped."""
            run_create_table(sql)
            calls.append(sql)
            if len(calls) == 1:  # without stamps, the other one will want to stamp, too
                for table in ALL_TABLES.split(", "):
                    sql.execute(f"COMMENT ON TABLE {table} IS NULL")
            if len(calls) == 3:
                others.append(self.start("data_processor.py", nothing))
                wait_until(waiting, "the other waits")

        with (
            captured(),
            unittest.mock.patch.object(data_processor, "run_create_table", connect_another_one),
        ):
            data_processor.run([str(self.log)])
        self.assertEqual(others[0].wait(20), 0, others[0].stderr.read())
        query("DELETE FROM event_producers")
        self.refused("event_producers was emptied")
