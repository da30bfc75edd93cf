"""The database is not there, hangs, or falls silent."""

import contextlib
import os
import select
import signal
import socket
import struct
import threading
import time
import unittest
import unittest.mock

import psycopg2
import psycopg2.extensions

import data_processor
import server as server_module
from tests.tools import Server, SystemTest, free_port, wait_until
from tests.tools_database import locked_users, setUpModule, terminate_backends, waiting
from tests.tools_events import EVENT, ids_in, with_id
from tests.tools_parts import warnings_of


class Outages(SystemTest):
    """An outage of the database stops no event, and is said in a sentence."""

    def test_ctrl_c_ends_a_processor_that_waits_for_the_database_quietly(self):
        log = self.path("log", EVENT + b"\n")
        with locked_users():
            for number, arguments in enumerate(([], ["--follow"]), 1):
                processor = self.start("data_processor.py", log, *arguments)
                wait_until(lambda: len(waiting()) == number, "the processor waits")
                processor.send_signal(signal.SIGINT)
                self.assertEqual(
                    (processor.communicate(timeout=5), processor.returncode), (("", ""), 130)
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

    def test_without_a_database_the_server_takes_events(self):
        server = Server(self, DATABASE_URL=f"postgresql://localhost:{free_port()}/nowhere")
        self.assertEqual(server.post(EVENT)[0], 200)
        status, headers, _ = server.ask("GET", "/userEvents/user1")
        self.assertEqual((status, headers["Retry-After"]), (503, "2"))
        self.assertEqual(server.ask("GET", "/health")[0], 200)
        self.assertEqual(len(ids_in(server.log)), 1)

    def test_without_a_database_the_processor_says_to_start_one(self):
        self.path("server-events.jsonl", with_id("p", 1))
        _, errors = self.processor(
            status=1, DATABASE_URL=f"postgresql://localhost:{free_port()}/nowhere"
        )
        self.assertEqual(errors.count("\n"), 1)
        self.assertIn("Start PostgreSQL", errors)

    def test_a_database_that_hangs_starves_no_post(self):
        server = Server(self, "--workers", "1")
        self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 404)
        with locked_users():
            asking = [
                threading.Thread(target=server.ask, args=["GET", "/userEvents/user1"])
                for _ in range(20)
            ]
            for thread in asking:
                thread.start()
            self.assertEqual(server.post(EVENT)[0], 200)
            self.assertTrue(all(thread.is_alive() for thread in asking))
            self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 503)
            for thread in asking:
                thread.join()
            wait_until(lambda: not waiting(), "no query is left waiting")
        wait_until(
            lambda: server.ask("GET", "/userEvents/user1")[0] == 404, "the database answers again"
        )
        terminate_backends()
        self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 404)

    def test_a_database_that_falls_silent_is_not_waited_for(self):
        welcome = b"R" + struct.pack(">II", 8, 0)
        for setting in (
            b"client_encoding\0UTF8\0",
            b"DateStyle\0ISO\0",
            b"standard_conforming_strings\0on\0",
        ):
            welcome += b"S" + struct.pack(">I", 4 + len(setting)) + setting
        with socket.create_server(("127.0.0.1", 0)) as database:
            database.settimeout(20)
            port = database.getsockname()[1]
            url = f"postgresql://127.0.0.1:{port}/x?sslmode=disable&gssencmode=disable"
            server = Server(self, "--workers", "1", DATABASE_URL=url)
            server.ask("GET", "/health")
            self.assertFalse(
                select.select([database], [], [], 0)[0],
                "health has nothing to do with the database",
            )
            for greeting in (
                welcome + b"Z" + struct.pack(">I", 5) + b"I",
                b"",
            ):  # silent after it, and from the start
                answers = []
                asking = threading.Thread(
                    target=lambda: answers.append(server.ask("GET", "/userEvents/user1")[0])
                )
                asking.start()
                wire, _ = database.accept()
                with wire:
                    wire.sendall(greeting)
                    asking.join()
                self.assertEqual(answers, [503])

    def test_the_reason_why_the_database_does_not_answer_is_said_once(self):
        server = Server(self, "--workers", "1")
        with locked_users():
            self.assertEqual(
                [server.ask("GET", "/userEvents/user1")[0] for _ in range(2)], [503, 503]
            )
        wait_until(
            lambda: server.ask("GET", "/userEvents/user1")[0] == 404, "the database answers again"
        )
        began, ended = server.said()
        self.assertRegex(
            began, "The database: (no answer within 2 seconds|canceling statement due to .*)"
        )
        self.assertEqual(ended, "The database: it answers again.")

    def test_a_wrong_database_is_named_in_a_sentence(self):
        cases = {
            "a missing one": (
                f"{os.environ['DATABASE_URL']} dbname=nowhere",
                '"nowhere" does not exist',
            ),
            "a malformed URL": (
                "postgresql+psycopg2://app:S3cret@db/shop",
                "DATABASE_URL is malformed",
            ),
        }
        for case, (url, words) in cases.items():
            with self.subTest(case):
                server = Server(self, "--workers", "1", DATABASE_URL=url, log=case)
                for _ in range(2):
                    status, headers, _ = server.ask("GET", "/userEvents/user1")
                    self.assertEqual((status, headers["Retry-After"]), (503, "2"))
                (said,) = server.said()
                self.assertIn(words, said)
                self.assertNotIn("S3cret", said)

    def test_a_query_leaves_nothing_behind_in_its_session(self):
        database = server_module.Database()
        self.assertIsNone(database.revenue("user1"))
        connection = database._connection
        with contextlib.closing(connection), connection.cursor() as sql:
            sql.execute("SHOW statement_timeout")
            self.assertEqual((sql.fetchone(), connection.notices), (("0",), []))

    def test_a_query_that_takes_too_long_is_cancelled_by_the_database(self):
        database = server_module.Database()
        self.addCleanup(lambda: database._connection.close())
        last_resort = threading.Timer(10, terminate_backends)
        last_resort.start()
        self.addCleanup(last_resort.cancel)
        with locked_users():
            begun = time.monotonic()
            self.assertRaises(psycopg2.errors.QueryCanceled, database._query, "user1")
            self.assertLess(time.monotonic() - begun, 3)

    def test_without_a_thread_for_the_query_the_database_does_not_answer(self):
        database = server_module.Database()
        error = RuntimeError("can't start new thread")
        with (
            unittest.mock.patch.object(database._thread, "submit", side_effect=error),
            warnings_of(data_processor) as said,
        ):
            self.assertRaises(data_processor.Failure, database.revenue, "user1")
        self.assertEqual(said, ["The database: can't start new thread."])
