"""--verify finds each user whose revenue is not the sum of the logs."""

import contextlib
import gzip
import os
import time
import unittest
import unittest.mock

import data_processor
from tests.tools import SystemTest
from tests.tools_database import database_url, drop_tables, query, setUpModule
from tests.tools_events import EVENT, with_id, with_user
from tests.tools_parts import captured


class Audit(SystemTest):
    """--verify compares the revenue with the logs and changes nothing."""

    def logs(self):
        """Return two logs with a repeated event, an event without an id, and a line that is no
        event."""
        dimes = "".join(with_id("p", n, f"user{n % 3}", "0.10") for n in (1, 2, 3, 4))
        return [
            self.path("one", dimes + EVENT.decode() + "\n"),
            self.path(
                "two",
                with_id("p", 4, "user1", "0.10")
                + with_id("p", 5, "user9", -7)
                + "nonsense\n",
            ),
        ]

    def test_verify_applies_nothing(self):
        self.processor("--verify", *self.logs(), status=1)
        self.assertEqual(query("SELECT * FROM event_logs"), [])

    def test_verify_finds_that_applied_logs_agree(self):
        tables = (
            "SELECT * FROM event_logs, event_producers, users_revenue "
            "ORDER BY 1, 2, 3, 4, 5, 6, 7"
        )
        logs = self.logs()
        self.processor(*logs, status=1)
        before = query(tables)
        copy = self.path(
            "copy", logs[0].read_bytes() + EVENT.replace(b"1}", b"0}") + b"\n"
        )
        output, _ = self.processor("--verify", *logs, copy)
        self.assertEqual(output, "users_revenue and the logs agree on 4 users.\n")
        self.assertEqual(query(tables), before)

    def test_verify_takes_its_time_between_two_statements(self):
        logs = [
            str(self.path("log.1", with_id("p", 1))),
            str(self.path("log", with_id("p", 2))),
        ]
        self.processor(*logs)
        find_end = data_processor.LogReader.find_end

        def find_end_slowly(log, seconds):
            time.sleep(0.25)
            return find_end(log, seconds)

        slowly = unittest.mock.patch.object(
            data_processor.LogReader, "find_end", find_end_slowly
        )
        impatient = {"PGOPTIONS": "-c idle_in_transaction_session_timeout=100ms"}
        for case, environment in {
            "our own limit": {},
            "the role's limit": impatient,
        }.items():
            with (
                self.subTest(case),
                captured() as printed,
                unittest.mock.patch.object(data_processor, "IDLE_SECONDS", 0.1),
                unittest.mock.patch.dict(os.environ, environment),
                slowly,
            ):
                self.assertTrue(data_processor.verify(logs), printed())

    def test_verify_sees_what_was_stored_before_it_read_the_logs(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        find_end = data_processor.LogReader.find_end

        def count_another(reader, seconds):
            found = find_end(reader, seconds)
            query("UPDATE users_revenue SET revenue = 2")
            return found

        meanwhile = unittest.mock.patch.object(
            data_processor.LogReader, "find_end", count_another
        )
        with captured() as printed, meanwhile:
            self.assertTrue(data_processor.verify([str(log)]), printed())
        self.assertRevenue({"user1": 2})

    def test_verify_compares_user_ids_of_another_collation(self):
        log = self.path("log", with_id("p", 1) + with_id("p", 2, "user2"))
        query(
            'ALTER TABLE users_revenue ALTER COLUMN user_id TYPE text COLLATE "en-x-icu"'
        )
        self.processor(log)
        self.assertIn("agree on 2 users", self.processor("--verify", log)[0])

    def test_verify_prints_each_user_whose_revenue_differs(self):
        logs = self.logs()
        self.processor(*logs, status=1)
        query(
            "UPDATE users_revenue SET revenue = revenue + 1e30 + 0.01 WHERE user_id = 'user2'"
        )
        query("DELETE FROM users_revenue WHERE user_id = 'user9'")
        query("INSERT INTO users_revenue VALUES ('older', 5)")
        output, _ = self.processor("--verify", *logs, status=1)
        self.assertEqual(
            output.splitlines()[:3],
            [
                "older: 5 in users_revenue, 0 in the logs, difference 5",
                f"user2: 1{0:030}.11 in users_revenue, 0.10 in the logs, difference 1{0:030}.01",
                "user9: 0 in users_revenue, -7 in the logs, difference 7",
            ],
        )
        self.assertIn("3 users differ", output)

    def test_no_room_for_the_list_of_users_is_said(self):
        query("INSERT INTO users_revenue VALUES ('older', 5)")
        full = (
            "import tempfile\n"
            "tempfile.tempdir = '/full'\n"
            "def open_full(**options): return open('/dev/full', 'wb', **options)\n"
            "tempfile.TemporaryFile = open_full"
        )
        log = self.path("log", with_id("p", 1))
        output, errors = self.processor("--verify", log, status=1, patch=full)
        self.assertEqual(output, "")
        words = "/full: No space left on device: no room for a temporary file"
        self.assertEqual(errors, f"{words} (TMPDIR names another directory).\n")

    def test_a_missing_directory_for_temporary_files_is_said(self):
        none = (
            "import errno, tempfile\n"
            "def none(**_): raise FileNotFoundError(errno.ENOENT, 'No usable directory')\n"
            "tempfile.TemporaryFile = tempfile.gettempdir = none"
        )
        packed = self.path("log.gz", gzip.compress(with_id("p", 1).encode()))
        for arguments in (["--verify", packed], [packed]):
            _, errors = self.processor(*arguments, status=1, patch=none)
            self.assertIn("temporary files: No usable directory: no room for a", errors)
            self.assertNotIn("server.py", errors)

    def test_verify_hides_the_tables_wherever_the_search_path_has_temporary_ones(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        query("UPDATE users_revenue SET revenue = 5")
        dsn = database_url(options="-c search_path=public,pg_temp")
        output, _ = self.processor("--verify", log, status=1, DATABASE_URL=dsn)
        self.assertIn("user1: 5 in users_revenue, 1 in the logs, difference 4", output)

    def test_users_whom_a_policy_hides_are_no_difference(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        query(
            "DROP ROLE IF EXISTS events_test_reader; CREATE ROLE events_test_reader;"
            "GRANT SELECT ON users_revenue, event_producers, event_logs TO events_test_reader;"
            "ALTER TABLE users_revenue ENABLE ROW LEVEL SECURITY"
        )
        self.addCleanup(query, "DROP OWNED BY events_test_reader; DROP ROLE events_test_reader")
        reader = {"PGOPTIONS": "-c role=events_test_reader"}
        output, errors = self.processor("--verify", log, status=1, **reader)
        self.assertEqual(output, "")
        self.assertIn('row-level security policy for table "users_revenue"', errors)

    def test_a_log_that_cannot_be_read_is_no_agreement(self):
        self.processor(self.path("log", EVENT + b"\n"))
        output, errors = self.processor("--verify", "log", "missing", status=1)
        self.assertIn("missing: No such file", errors)

    def test_without_tables_it_creates_none(self):
        drop_tables()
        _, errors = self.processor("--verify", self.path("log", EVENT + b"\n"), status=1)
        self.assertIn("do not exist yet", errors)
        self.assertEqual(query("SELECT to_regclass('users_revenue')"), [(None,)])

    def test_nothing_outlives_its_transaction_on_a_connection(self):
        self.path("log", with_id("p", 1))
        query("DROP TABLE event_producers, event_logs")  # which the first run creates
        settings = """
            SELECT name, setting FROM pg_settings
            WHERE (source = 'session' OR context = 'user') AND name NOT LIKE 'plpgsql.%'
            ORDER BY name"""
        tables = """
            SELECT nspname, relname
            FROM pg_namespace JOIN pg_class ON pg_namespace.oid = relnamespace
            WHERE relpersistence = 't'"""
        shared = data_processor.connect()
        pooled = unittest.mock.Mock(wraps=shared, closed=0, spec=shared)
        pooled.close = shared.rollback  # what a pooler does at the end of a transaction
        connect = unittest.mock.patch.object(
            data_processor, "connect", lambda **_: pooled
        )
        log = str(self.path("log"))
        with contextlib.closing(shared), shared.cursor() as sql, captured():
            for run in (data_processor.run, data_processor.verify):
                for statement in (settings, tables):
                    sql.execute(statement)
                    before = sql.fetchall()
                    shared.rollback()
                    with connect:
                        run([log])
                    sql.execute(statement)
                    self.assertEqual(sql.fetchall(), before, run)
                    shared.rollback()
        self.assertRevenue({"user1": 1})

    def test_a_user_id_cannot_forge_a_verdict(self):
        log = self.path(
            "log",
            with_user('"a\\r\\u001b[2Kusers_revenue agrees\\n\\u202e\\u009b1m"') + b"\n",
        )
        self.processor(self.path("empty", b""))
        output, _ = self.processor("--verify", log, status=1)
        self.assertIn(
            "a\\r\\x1b[2Kusers_revenue agrees\\n\\u202e\\x9b1m: 0 in users_revenue, 1 in the logs",
            output,
        )
        self.assertEqual(output.count("\n"), 2)
