"""The database is not there, and the processor says so."""

import os
import signal

import psycopg2
import psycopg2.extensions

from tests.tools import SystemTest, free_port, wait_until
from tests.tools_database import locked_users, query, setUpModule, waiting
from tests.tools_events import EVENT, with_id


class Outages(SystemTest):
    """An outage of the database is said in a sentence."""

    def test_ctrl_c_ends_a_processor_that_waits_for_the_database_quietly(self):
        log = self.path("log", EVENT + b"\n")
        with locked_users():
            for number, arguments in enumerate(([], ["--follow"]), 1):
                processor = self.start("data_processor.py", log, *arguments)
                wait_until(lambda: len(waiting()) == number, "the processor waits")
                processor.send_signal(signal.SIGINT)
                self.assertEqual(
                    (processor.communicate(timeout=20), processor.returncode), (("", ""), 130)
                )
        self.processor(log)
        self.assertRevenue({"user1": 1})

    def test_a_database_that_is_not_there_is_named_in_a_sentence(self):
        log = self.path("log", EVENT + b"\n")
        parts = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
        nowhere = {"host": "127.0.0.1", "hostaddr": "127.0.0.1", "port": free_port()}
        cases = {
            "a missing database": (
                {"dbname": "missing"},
                "exist. Start PostgreSQL, or correct DATABASE_URL",
            ),
            "a port where nothing listens": (nowhere, "refused. Start PostgreSQL"),
            "an unknown user": ({"user": "nobody-such"}, "No database"),
        }
        if parts.get("password"):
            cases["a wrong password"] = {"password": "wrong"}, "password"
        for case, (wrong, words) in cases.items():
            for arguments in ([], ["--verify"]):
                with self.subTest(case, arguments=arguments):
                    dsn = psycopg2.extensions.make_dsn(**(parts | wrong))
                    _, errors = self.processor(log, *arguments, status=1, DATABASE_URL=dsn)
                    self.assertIn(words, errors)
                    self.assertEqual(errors.count("\n"), 1)
        _, errors = self.processor(log, status=1, DATABASE_URL="foo")
        self.assertEqual(errors.count("\n"), 1)

    def test_the_reason_why_a_backend_ended_in_mid_statement_is_told(self):
        log = self.path("log", with_id("p", 1))
        with locked_users():
            run = self.start("data_processor.py", log, patch="data_processor.ATTEMPTS = 1")
            (backend,) = wait_until(waiting, "the processor waits")
            query("SELECT pg_terminate_backend(%s)", [backend])
            _, errors = run.communicate(timeout=30)
        self.assertEqual(run.returncode, 1)
        self.assertIn("terminating connection due to administrator command", errors)
        self.assertNotIn("already closed", errors)
        self.assertEqual(errors.count("\n"), 1)
        self.assertRevenue({})

    def test_words_that_are_not_utf8_are_told_in_a_sentence(self):
        log = self.path("log", EVENT + b"\n")
        user = "m\udcfcller"  # its bytes are Latin-1
        url = os.environ["DATABASE_URL"]
        place = psycopg2.extensions.parse_dsn(url)
        place.pop("user", None)
        without_user = psycopg2.extensions.make_dsn(**place)
        # Some versions of psycopg2 drop words that are not UTF-8: then the error's kind is said.
        no_user = r"\ANo database: (.*m.*ller.*|OperationalError)\. Start PostgreSQL, or correct "
        cases = {
            "a user": ({"DATABASE_URL": without_user, "PGUSER": user}, no_user),
            "a URL": ({"DATABASE_URL": f"postgresql://{user}@localhost/x"}, "malformed"),
        }
        for case, (environment, words) in cases.items():
            with self.subTest(case):
                _, errors = self.processor(log, status=1, **environment)
                self.assertRegex(errors, words)
                self.assertEqual(errors.count("\n"), 1)

    def test_without_a_database_the_processor_says_to_start_one(self):
        self.path("server-events.jsonl", with_id("p", 1))
        _, errors = self.processor(
            status=1, DATABASE_URL=f"postgresql://localhost:{free_port()}/nowhere"
        )
        self.assertEqual(errors.count("\n"), 1)
        self.assertIn("Start PostgreSQL", errors)
