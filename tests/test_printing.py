"""What the processor prints."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import unittest
import unittest.mock
from pathlib import Path

import psycopg2

import data_processor
from tests.tools import SystemTest, fill, free_port
from tests.tools_database import HERE, empty_tables, query, setUpModule
from tests.tools_events import EVENT, with_id


class Printing(SystemTest):
    """What goes wrong in a user's world is one sentence, and printing it decides nothing."""

    def test_what_is_no_regular_file_is_refused(self):
        for path in ("/dev/stdin", "/dev/null", self.directory):
            with self.subTest(path):
                self.assertIn(f"{path}: is not a regular file", self.processor(path, status=1)[1])

    def test_a_closed_or_full_stream_changes_no_outcome(self):
        log = self.path("log", with_id("p", 1) + "bad\n")
        for redirection in (
            ">&-",
            "2>&-",
            ">&- 2>&-",
            "<&- >&- 2>&-",
            ">/dev/full",
            "2>/dev/full",
            "| true",
            "</dev/null >/dev/full 2>&1",
        ):
            for arguments, status in (("log", 1), ("--verify log", 0)):
                with self.subTest(redirection, arguments=arguments):
                    empty_tables()
                    if "verify" in arguments:
                        self.processor(log, status=1)
                    script = f"{sys.executable} {HERE}/data_processor.py {arguments} {redirection}"
                    run = subprocess.run(
                        ["bash", "-c", f"set -o pipefail; {script}"],
                        cwd=self.directory,
                        capture_output=True,
                        text=True,
                    )
                    self.assertEqual(
                        (run.returncode, "Traceback" in run.stderr), (status, False), run.stderr
                    )
                    self.assertRevenue({"user1": 1})

    def test_an_encoding_that_lacks_characters_changes_no_outcome(self):
        ascii_output = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"}
        odd = os.fsdecode(b"log.1\xff")
        Path(self.directory / odd).write_text(with_id("q", 1))
        log = self.path("log", with_id("p", 1, "\u0436\u0443\u0440\u043d\u0430\u043b"))
        output, _ = self.processor(log, **ascii_output)
        self.assertIn("log.1\\udcff: 1 applied", output)
        query("DELETE FROM users_revenue")
        output, _ = self.processor("--verify", log, status=1, **ascii_output)
        self.assertIn(
            "\\u0436\\u0443\\u0440\\u043d\\u0430\\u043b: 0 in users_revenue, 1 in the logs", output
        )

    def test_no_message_holds_a_password(self):
        log = self.path("log", EVENT + b"\n")
        port = free_port()
        cases = {
            "another scheme": "postgresql+psycopg2://app:S3cret@db/shop",
            "a slash": "postgresql://app:p/S3cret@db/shop",
            "an at sign": "postgresql://app:S3@cret@db/shop",
            "a percent sign": "postgresql://app:50%S3cret@db/shop",
            "a digit and a slash": "postgresql://app:1/S3cret@db/shop",
            "a malformed DSN": "host=db password=S3cret x",
            "no fault": f"postgresql://app:S3cret@127.0.0.1:{port}/shop",
            "a colon": f"postgresql://app:S3cret:x@127.0.0.1:{port}/shop",
        }
        for (case, url), arguments in itertools.product(cases.items(), ([], ["--verify"])):
            with self.subTest(case, arguments=arguments):
                _, errors = self.processor(log, *arguments, status=1, DATABASE_URL=url)
                self.assertNotIn("cret", errors)
                self.assertEqual(errors.count("\n"), 1)

    def test_the_reasons_of_all_addresses_are_told(self):
        first = 'connection to server at "localhost" (::1), port 5432 failed: '
        second = 'connection to server at "localhost" (127.0.0.1), port 5432 failed: '
        error = psycopg2.OperationalError(
            f"{first}Connection refused\n\tIs the server running on that host?\n"
            f"{second}FATAL:  password authentication failed\n"
        )
        self.assertEqual(
            data_processor.sentence(error),
            f"{first}Connection refused; {second}FATAL: password authentication failed",
        )

    def test_the_detail_of_a_refusal_names_the_user(self):
        query("ALTER TABLE users_revenue ADD CHECK (user_id <> 'user7')")
        _, errors = self.processor(
            self.path("log", with_id("p", 1) + with_id("p", 2, "user7")), status=1
        )
        self.assertRegex(
            errors,
            "^.*log: PostgreSQL refused it: .*check constraint.*"
            "Failing row contains \\(user7, 1\\).\n$",
        )
        self.assertRevenue({})

    def test_what_the_environment_says_is_not_overridden(self):
        names = [name for name in os.environ if name.startswith("PG")] + ["DATABASE_URL"]
        nothing = {
            "host": "localhost",
            "dbname": "postgres",
            "user": "postgres",
            "password": "password1!",
            "connect_timeout": 10,
        }
        url = "postgresql://db?connect_timeout=3&keepalives_idle=7"
        cases = {
            "nothing": ({}, nothing),
            "the port": ({"PGPORT": "5433"}, nothing),
            "the password": ({"PGPASSWORD": "x"}, {**nothing, "password": None}),
            "a password file": (
                {"PGPASSFILE": str(self.path("pgpass", ""))},
                {**nothing, "password": None},
            ),
            "a host": (
                {"PGHOST": "db"},
                {"host": None, "password": None, "dbname": None, "connect_timeout": 10},
            ),
            "a service": ({"PGSERVICE": "s"}, {"host": None, "user": None}),
            "a time-out": ({"PGCONNECT_TIMEOUT": "3"}, {**nothing, "connect_timeout": None}),
            "a URL": (
                {"DATABASE_URL": url},
                {
                    "host": "db",
                    "connect_timeout": "3",
                    "keepalives_idle": "7",
                    "keepalives_count": 3,
                    "user": None,
                },
            ),
        }
        for what, (said, expected) in cases.items():
            with (
                self.subTest(what),
                unittest.mock.patch.dict(os.environ),
                unittest.mock.patch("psycopg2.connect") as connect,
            ):
                for name in names:
                    os.environ.pop(name, None)
                os.environ.update({"PGPASSFILE": "/none"} | said)
                data_processor.connect(connect_timeout=10)
                options = connect.call_args[1]
                self.assertEqual({name: options.get(name) for name in expected}, expected)

    def test_help_is_there_although_docstrings_are_not(self):
        for options in ([], ["-O"], ["-OO"]):
            with self.subTest(options):
                run = subprocess.run(
                    [sys.executable, *options, HERE / "data_processor.py", "--help"],
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                self.assertEqual((run.returncode, run.stderr), (0, ""))
                self.assertIn("Example: python data_processor.py server-events.jsonl", run.stdout)
                self.assertIn("--from-start", run.stdout)

    def test_on_windows_the_scripts_say_what_they_need(self):
        for script in ("server", "client", "data_processor"):
            code = f"import sys; sys.modules['fcntl'] = None; import {script}"
            run = subprocess.run(
                [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True
            )
            self.assertRegex(run.stderr, "\\A.*needs Linux or macOS.*\n\\Z")
            self.assertEqual(run.returncode, 1)


class SlowReaders(SystemTest):
    """A reader that is only slow is waited for; one that reads nothing is not."""

    def test_a_reader_that_takes_its_time_is_waited_for(self):
        reading, writing = os.pipe()
        fill(writing)
        reader = threading.Timer(0.3, os.read, [reading, 65536])
        reader.start()
        with open(writing, "w", encoding="utf-8") as stream:
            self.assertTrue(data_processor.write(stream, "x" * 1000, 20))
        reader.join()
        os.close(reading)

    def test_help_and_usage_that_nobody_reads_delay_nothing(self):
        reading, writing = os.pipe()
        fill(writing)
        for script in ("server.py", "client.py", "data_processor.py"):
            for argument, status in (("--help", 0), ("--unknown", 2)):
                with self.subTest(script, argument=argument):
                    command = [sys.executable, HERE / script, argument]
                    run = subprocess.run(command, stdout=writing, stderr=writing, timeout=20)
                    self.assertEqual(run.returncode, status)
        os.close(reading)
        os.close(writing)

    def test_no_terminal_obeys_a_wrong_argument(self):
        for script in ("server.py", "client.py", "data_processor.py"):
            with self.subTest(script):
                command = [sys.executable, HERE / script, "--\x1b[31mred"]
                run = subprocess.run(command, capture_output=True, text=True)
                self.assertEqual(run.returncode, 2)
                self.assertIn(r"--\x1b[31mred", run.stderr)

    def test_a_socket_that_nobody_reads_delays_nothing(self):
        reader, writer = socket.socketpair()
        with reader, writer:
            fill(writer.fileno())
            log = self.path("log", with_id("p", 1))
            command = [sys.executable, data_processor.__file__, log]
            subprocess.run(command, stdout=writer, timeout=20, check=True)
        self.assertRevenue({"user1": 1})
