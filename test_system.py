"""The system's promises, tested on the real scripts as processes and on a real PostgreSQL.

    python -m unittest                                    all of it, some minutes
    TORTURE_SECONDS=600 TORTURE_SEED=7 python -m unittest test_system.Torture

The database is the one that the environment names, or the default one. When the environment names none and the default one
cannot be used, the tests run again inside a throwaway PostgreSQL of Debian's pg_virtualenv. A scratch database is created
and dropped.
"""
import collections
import contextlib
import decimal
import errno
import fcntl
import hashlib
import http.client
import http.server
import io
import itertools
import json
import os
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import unittest.mock
from decimal import Decimal
from pathlib import Path

import psycopg2
import psycopg2.extensions

import client as client_module
import data_processor
import server as server_module

HERE = Path(__file__).resolve().parent
EVENT = b'{"userId": "user1", "name": "add_revenue", "value": 1}'
TORTURE_SECONDS = float(os.environ.get("TORTURE_SECONDS", "20"))
TORTURE_SEED = int(os.environ.get("TORTURE_SEED") or secrets.randbelow(10**6))
SCRATCH = f"events_test_{os.getpid()}_{secrets.token_hex(4)}"

# PGPORT and PGPASSWORD are missing here: alone they name no database, they change the port or the password of the default.
NAME_A_DATABASE = ("DATABASE_URL", "PGHOST", "PGHOSTADDR", "PGUSER", "PGDATABASE", "PGSERVICE")
THROWAWAY = "EVENTS_TEST_THROWAWAY"  # set in the environment of the tests that run inside a throwaway PostgreSQL

administration = None  # a connection to the database that the environment names


def setUpModule():
    """Create the scratch database and point the environment at it, so that every child finds it.

    Without a usable database, run the tests again inside a throwaway PostgreSQL, or fail: a skipped test proves nothing.
    """
    try:
        create_scratch_database()
    except psycopg2.Error as error:
        if command := throwaway_command(os.environ):
            sys.stdout.flush()
            sys.stderr.flush()
            os.execvpe(command[0], command, throwaway_environment(os.environ))
        raise RuntimeError(f"No PostgreSQL to test with ({str(error).strip()}). Start one, or name another with PGHOST, "
                           "PGPORT, PGUSER and PGPASSWORD, or install Debian's postgresql-common: without those variables "
                           "the tests then start a throwaway one with pg_virtualenv.") from None


def create_scratch_database():
    """Create the scratch database in the database that the environment names, or raise psycopg2.Error."""
    global administration
    administration = data_processor.connect(connect_timeout=10)
    administration.autocommit = True
    administer(f"CREATE DATABASE {SCRATCH} ENCODING 'UTF8' TEMPLATE template0")
    info = administration.info
    settings = {key: info.dsn_parameters.get(key) for key in ("host", "hostaddr", "port", "user", "sslmode")}
    settings |= {"password": info.password, "dbname": SCRATCH}
    os.environ["DATABASE_URL"] = psycopg2.extensions.make_dsn(**{k: v for k, v in settings.items() if v})
    os.environ.pop("EVENTS_AUTHORIZATION", None)


def throwaway_command(environment):
    """Return the command that runs these tests again inside a throwaway PostgreSQL.

    Return None when the environment names a database, when this is the second run already, or when Debian's pg_virtualenv
    is missing.
    """
    if THROWAWAY in environment or any(environment.get(variable) for variable in NAME_A_DATABASE):
        return None
    if not shutil.which("pg_virtualenv", path=environment.get("PATH")):
        return None
    return ["pg_virtualenv", "-t", sys.executable, *sys.orig_argv[1:]]  # sys.executable: stay in a virtual environment


def throwaway_environment(environment):
    """Return the environment for throwaway_command()."""
    # pg_virtualenv would give PGPORT to its cluster, and that port may be taken. LC_ALL makes the encoding UTF8.
    rest = {name: value for name, value in environment.items() if name not in ("PGPORT", "PGPASSWORD")}
    return rest | {THROWAWAY: "1", "LC_ALL": "C.UTF-8"}


def tearDownModule():
    """Drop the scratch database."""
    administer(f"DROP DATABASE {SCRATCH} WITH (FORCE)")
    administration.close()


def administer(statement):
    """Run a statement in the database that the environment names."""
    with administration.cursor() as sql:
        sql.execute(statement)


def query(statement, parameters=None):
    """Run a statement in the scratch database and return its rows."""
    connection = psycopg2.connect(os.environ["DATABASE_URL"])
    try:
        with connection, connection.cursor() as sql:
            sql.execute(statement, parameters)
            return sql.fetchall() if sql.description else []
    finally:
        connection.close()


def waiting():
    """Return the process ids of the database's sessions that wait for a lock, those that want users_revenue last."""
    return [pid for pid, in query("""
        SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
        ORDER BY query ~ 'users_revenue'""")]


@contextlib.contextmanager
def locked_users():
    """Return a context in which everyone else waits for users_revenue."""
    with contextlib.closing(psycopg2.connect(os.environ["DATABASE_URL"])) as connection, connection.cursor() as sql:
        sql.execute("LOCK TABLE users_revenue")
        yield


def wait_until(condition, what, seconds=20):
    """Return condition's first true result, or fail."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain until {what}")
        time.sleep(0.01)
    return result


def can_bind(port):
    """Tell whether a port is free."""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True


def free_port():
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def oracle(*paths):
    """Return {user: sum} over event files: the independent reckoning."""
    totals = collections.defaultdict(Decimal)
    for path in paths:
        for event in map(json.loads, Path(path).read_text().split("\n")[:-1]):
            sign = 1 if event["name"] == "add_revenue" else -1
            totals[event["userId"]] += sign * Decimal(str(event["value"]))
    return dict(totals)


def write_events(path, count, seed=0, users=50):
    """Write random events to a file and return its path."""
    chance = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            name = chance.choice(["add_revenue", "subtract_revenue"])
            file.write(json.dumps({"userId": f"user{chance.randrange(users)}", "name": name,
                                   "value": chance.randrange(10**6)}) + "\n")
    return path


def named(producer, sequence, user="user1", value=1):
    """Return a log's line as a server writes it."""
    return (f'{{"userId": "{user}", "name": "add_revenue", "value": {value}, '
            f'"producerId": "{producer}", "sequence": {sequence}}}\n')


def names_in(*logs):
    """Return the (producer, sequence) of every line of the logs."""
    return [(event["producerId"], event["sequence"]) for log in logs
            for event in map(json.loads, Path(log).read_text().split("\n")[:-1])]


class Server:
    """A running server.py with a log of its own."""

    def __init__(self, test, *arguments, log="server-events.jsonl", port=0, script=None, **environment):
        self.log = test.directory / log
        self.errors = test.directory / f"stderr-{secrets.token_hex(4)}"
        if port:
            wait_until(lambda: can_bind(port), "the port is free")
        command = [sys.executable, *(script or [HERE / "server.py"]), "--port", str(port), "--log", self.log, *arguments]
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(command, cwd=test.directory, stdout=subprocess.PIPE, stderr=errors, text=True,
                                            env=os.environ | environment)
        test.addCleanup(self.check_and_end, test)
        self.announcement = self.process.stdout.readline()
        if not self.announcement:
            raise AssertionError(f"the server did not start: {self.errors.read_text()}")
        self.port = int(re.search(r":(\d+),", self.announcement)[1])
        self.url = f"http://127.0.0.1:{self.port}/liveEvent"

    def check_and_end(self, test):
        """End the server; whatever was done to it, it must not have printed a traceback."""
        self.kill()
        test.assertNotIn("Traceback", self.errors.read_text())

    def workers(self):
        """Return the workers' process ids."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        if children.exists():
            return [int(pid) for pid in children.read_text().split()]
        listing = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in listing.stdout.split()]

    def stop(self, number=signal.SIGTERM):
        """Ask the server to stop and return its exit status."""
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.process.stdout.close()
        return status

    def kill(self):
        """SIGKILL the parent, if it lives."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def connect(self):
        """Return a socket to the server."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, method, path, body=None, headers=None):
        """Return (status, headers, body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def post(self, body, media="application/json", **headers):
        """POST a body of events and return (status, decoded answer)."""
        headers = {"Content-Type": media} | {name.replace("_", "-"): str(value) for name, value in headers.items()}
        status, _, answer = self.ask("POST", "/liveEvent", body, headers)
        return status, json.loads(answer)

    def raw(self, *pieces):
        """Send bytes as they are and return (status, headers, body) of the answer."""
        with self.connect() as wire:
            for piece in pieces:
                wire.sendall(piece)
            return read_answer(wire)


class Answers(io.BufferedReader):
    """The receiving side of a socket, from which one answer after the other is read."""

    def __init__(self, wire):
        super().__init__(socket.SocketIO(wire, "r"))

    def makefile(self, _mode):
        """Stand in for a socket."""
        return self

    def close(self):
        """Outlive the answer."""


def silence():
    """Return a context in which nothing is printed by this process."""
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


def read_answer(wire, method="GET"):
    """Return (status, headers, body) of the next answer on a socket."""
    answer = http.client.HTTPResponse(wire, method=method)
    answer.begin()
    return answer.status, answer.headers, answer.read()


class SystemTest(unittest.TestCase):
    """A test with an empty directory and empty tables."""

    def setUp(self):
        self.directory = Path(tempfile.mkdtemp(prefix="events-test-"))
        self.addCleanup(shutil.rmtree, self.directory)
        query("DROP TABLE IF EXISTS users_revenue, event_producers, event_logs")
        query((HERE / "create_table.sql").read_text())

    def path(self, name, content=None):
        """Return a path in the test's directory, written if there is content."""
        path = self.directory / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def start(self, script, *arguments, **environment):
        """Start a script in the test's directory."""
        process = subprocess.Popen([sys.executable, HERE / script, *map(str, arguments)], cwd=self.directory, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)

        def end():
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.addCleanup(end)
        return process

    def run_script(self, script, *arguments, status=0, **environment):
        """Run a script to its end, check its exit status, and return (stdout, stderr)."""
        process = self.start(script, *arguments, **environment)
        output, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, status, output + errors)
        self.assertNotIn("Traceback", errors)
        return output, errors

    def client(self, *arguments, **options):
        """Run client.py."""
        return self.run_script("client.py", *arguments, **options)

    def processor(self, *logs, **options):
        """Run data_processor.py."""
        return self.run_script("data_processor.py", *logs, **options)

    def assertRevenue(self, expected):
        """Check the whole table."""
        self.assertEqual(dict(query("SELECT user_id, revenue FROM users_revenue")), expected)


class Pipeline(SystemTest):
    """From file to database."""

    def test_the_sample_events_give_50_and_200_and_twice_that_when_they_are_sent_again(self):
        server = Server(self)
        shutil.copy(HERE / "events.jsonl", self.directory)
        for times in (1, 2):
            self.client("--url", server.url)
            self.processor()
            output, _ = self.processor()
            self.assertIn("0 applied, 0 repeated, 0 rejected", output)
            for user, revenue in (("user1", 50), ("user2", 200)):
                status, _, body = server.ask("GET", f"/userEvents/{user}")
                self.assertEqual((status, body.decode()),
                                 (200, f'{{"userId": "{user}", "revenue": {revenue * times}}}'))

    def test_create_table_sql_runs_in_psql_and_runs_again(self):
        query("DROP TABLE users_revenue, event_producers, event_logs")
        for _ in range(2):
            subprocess.run(["psql", "-v", "ON_ERROR_STOP=1", "-q", "-d", os.environ["DATABASE_URL"],
                            "-f", HERE / "create_table.sql"], check=True, capture_output=True)
        self.assertRevenue({})

    def test_sums_are_exact(self):
        server = Server(self)
        for user, name, value in (("tenths", "add_revenue", "0.1"), ("tenths", "add_revenue", "0.2"),
                                  ("wide", "add_revenue", "999999999999999999.999999999999999999"),
                                  ("wide", "subtract_revenue", "0.000000000000000001"),
                                  ("debtor", "subtract_revenue", "999999999999999999.999999999999999999"),
                                  ("round", "add_revenue", "1200.500"), ("nought", "subtract_revenue", "0.00")):
            self.assertEqual(server.post(f'{{"userId": "{user}", "name": "{name}", "value": {value}}}')[0], 200)
        self.processor()
        for user, revenue in (("tenths", "0.3"), ("wide", "999999999999999999.999999999999999998"),
                              ("debtor", "-999999999999999999.999999999999999999"), ("round", "1200.5"), ("nought", "0")):
            self.assertEqual(server.ask("GET", f"/userEvents/{user}")[2].decode(),
                             f'{{"userId": "{user}", "revenue": {revenue}}}')

    def test_users_are_told_apart_by_every_character(self):
        server = Server(self)
        users = ["user1", "User1", " user1", "a/b", "a%2Fb", "a+b", "100%", "юзер", "\U0001f600", '"', "\\", "a\u2028b",
                 "\x7f", "x" * 255]
        batch = "".join(json.dumps({"userId": user, "name": "add_revenue", "value": i}) + "\n"
                        for i, user in enumerate(users))
        self.assertEqual(server.post(batch, "application/x-ndjson"),
                         (200, {"message": "Events received", "accepted": len(users), "rejected": []}))
        self.processor()
        for i, user in enumerate(users):
            status, _, body = server.ask("GET", "/userEvents/" + "".join(f"%{byte:02X}" for byte in user.encode()))
            self.assertEqual((status, json.loads(body)), (200, {"userId": user, "revenue": i}))
        self.assertEqual(json.loads(server.ask("GET", "/userEvents/a+b")[2])["revenue"], users.index("a+b"))

    def test_a_plain_log_is_applied_once_and_so_is_what_is_appended_to_it(self):
        logs = [write_events(self.path(f"plain{seed}"), 100, seed) for seed in (1, 2)]
        for appended in (False, True):
            for log in logs:
                if appended:
                    log.write_bytes(log.read_bytes() + write_events(self.path("more"), 50, seed=3).read_bytes())
                self.processor(log)
                self.processor(log)
            self.assertRevenue(oracle(*logs))

    def test_a_plain_log_that_was_edited_is_refused_where_it_cannot_be_known(self):
        log = write_events(self.path("plain.jsonl"), 3)
        first, second, third = log.read_bytes().splitlines(keepends=True)
        self.processor(log)
        expected = oracle(log)
        log.write_bytes(first + third + second.replace(b"user", b"loser") + named("p", 1, "new", 5).encode())
        _, errors = self.processor(log, status=1)
        self.assertIn(f"plain.jsonl: byte {len(first)}: an event without producerId and sequence", errors)
        self.assertRevenue(expected | {"new": 5})
        log.write_bytes(first * 50 + log.read_bytes())  # whatever is shifted behind the position
        self.processor(log, status=1)
        self.assertRevenue(expected | {"new": 5})

    def test_the_client_reports_and_collects_bad_lines_and_delivers_the_rest(self):
        server = Server(self)
        bad = [b"nonsense\n", b'{"userId": "user1", "name": "add_revenue", "value": "1"}\n']
        events = self.path("events.jsonl", EVENT + b"\n" + bad[0] + b"\n" + EVENT + b"\r\n" + bad[1] + EVENT)
        self.path("events.jsonl.rejected", "older")
        output, errors = self.client("--url", server.url, "--batch-size", 2, status=1)
        self.assertIn("3 events accepted, 2 rejected", output)
        self.assertIn("events.jsonl:2: not JSON", errors)
        self.assertIn("events.jsonl:5: value must be a number\n", errors)
        self.assertEqual(self.path("events.jsonl.rejected").read_bytes(), b"".join(bad))
        self.assertEqual(sorted(path.name for path in self.directory.glob("events.jsonl*")),
                         ["events.jsonl", "events.jsonl.rejected"])
        self.assertEqual(sorted(sequence for _, sequence in names_in(server.log)), [1, 4, 6])
        self.assertEqual(events.read_bytes().count(b"\n"), 5)

    def test_the_processor_reports_bad_lines_once_and_applies_the_rest(self):
        lines = [EVENT + b"\n", b'{"userId": "user1"}\n', b"\xff\n", b"\n", EVENT + b"\n", b"x" * 300_000 + b"\n", EVENT + b"\n",
                 EVENT]
        log = self.path("server-events.jsonl", b"".join(lines))
        output, errors = self.processor(status=1)
        self.assertEqual(output, f"server-events.jsonl: 3 applied, 0 repeated, 3 rejected; {len(EVENT)} bytes of an "
                                 "unfinished last line left\n")
        starts = [sum(map(len, lines[:i])) for i in (1, 2, 5)]
        self.assertEqual([line.split(": ")[:2] for line in errors.splitlines()],
                         [["server-events.jsonl", f"byte {start}"] for start in starts])
        self.assertEqual(log.read_bytes(), b"".join(lines))
        self.assertEqual(self.processor()[1], "")
        self.assertRevenue({"user1": 3})

    def test_rotation_under_load_loses_nothing_and_the_processor_finds_the_rotated_logs(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 30_000)
        client = self.start("client.py", "--url", server.url, "--batch-size", 20)
        for number in range(1, 8):
            wait_until(lambda: server.log.exists() and server.log.stat().st_size > 100_000 or client.poll() is not None,
                       "the log grew")
            if server.log.exists():
                server.log.rename(self.path(f"server-events.jsonl.{number}"))
        self.assertEqual(client.communicate()[0][:22], "30,000 events accepted")
        logs = sorted(self.directory.glob("server-events.jsonl*"))
        self.assertGreater(len(logs), 5)
        self.assertEqual(len({log.read_text().partition("\n")[0] for log in logs}), len(logs))
        for ending in (".0.gz", ".delivery", ".rejected"):
            self.path(f"server-events.jsonl{ending}", EVENT + b"\n")
        _, errors = self.processor()
        self.assertEqual(errors, "server-events.jsonl.0.gz: compressed, left alone.\n")
        self.assertRevenue(oracle(events))
        self.assertEqual(server.errors.read_text(), "")

    def test_follow_applies_new_events_through_rotations_and_outages_until_it_is_told_to_stop(self):
        server = Server(self)
        follower = self.start("data_processor.py", "--follow", "server-events.jsonl")

        def revenue():
            return query("SELECT revenue FROM users_revenue")
        server.post(EVENT)
        wait_until(lambda: revenue() == [(1,)], "the first event was applied")
        server.post(EVENT)
        server.log.rename(self.path("renamed"))
        server.post(EVENT)
        wait_until(lambda: revenue() == [(3,)], "both logs were read")
        follower.send_signal(signal.SIGSTOP)
        for number in (1, 2):  # two rotations while nobody looks
            server.log.rename(self.path(f"server-events.jsonl.{number}"))
            server.post(EVENT)
        follower.send_signal(signal.SIGCONT)
        wait_until(lambda: revenue() == [(5,)], "all logs were read")
        terminate_backends()
        server.post(EVENT)
        wait_until(lambda: revenue() == [(6,)], "the connection was made again")
        server.log.rename(self.path("server-events.jsonl.3"))  # and no log is begun in its place
        for total in (7, 8):
            with open(self.path("server-events.jsonl.3"), "a") as log:
                log.write(named("p", total))
            wait_until(lambda: revenue() == [(total,)], "the renamed log is read once more")
        follower.terminate()
        self.assertEqual(follower.wait(10), 0)
        self.assertRegex(follower.stderr.read(), r"\A(server-events.jsonl: is not there; waiting for it.\n)*\Z")

    def test_follow_waits_for_a_directory_and_a_log_that_are_not_there_yet(self):
        follower = self.start("data_processor.py", "--follow", "new/log")
        self.assertEqual(follower.stderr.readline(), "new: No such file or directory. Trying again in 1 s.\n")
        self.path("new").mkdir()
        self.assertEqual(follower.stderr.readline(), "new/log: is not there; waiting for it.\n")
        self.path("new/log", EVENT + b"\n")
        wait_until(lambda: query("SELECT revenue FROM users_revenue") == [(1,)], "the log is applied")

    def test_ctrl_c_ends_the_processor_quietly_even_while_it_waits_for_the_database(self):
        log = self.path("log", EVENT + b"\n")
        with locked_users():
            for number, arguments in enumerate(([], ["--follow"]), 1):
                processor = self.start("data_processor.py", log, *arguments)
                wait_until(lambda: len(waiting()) == number, "the processor waits")
                processor.send_signal(signal.SIGINT)
                self.assertEqual((processor.communicate(timeout=5), processor.returncode), (("", ""), 130))
        self.processor(log)
        self.assertRevenue({"user1": 1})

    def test_what_is_wrong_with_the_database_is_said_in_a_sentence(self):
        log = self.path("log", EVENT + b"\n")
        parts = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
        for wrong, words in (({"password": "wrong"}, "password"), ({"dbname": "missing"}, "does not exist"),
                             ({"host": "127.0.0.1", "hostaddr": "127.0.0.1", "port": free_port()}, "refused"),
                             ({"user": "nobody-such"}, "No database")):
            dsn = psycopg2.extensions.make_dsn(**(parts | wrong))
            if "password" in wrong and not parts.get("password"):
                continue
            for arguments in ([], ["--verify"]):
                _, errors = self.processor(log, *arguments, status=1, DATABASE_URL=dsn)
                self.assertIn(words, errors)
                self.assertEqual(errors.count("\n"), 1)
        _, errors = self.processor(log, status=1, DATABASE_URL="foo")
        self.assertEqual(errors.count("\n"), 1)
        administer(f"CREATE DATABASE {SCRATCH}_ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
        self.addCleanup(administer, f"DROP DATABASE {SCRATCH}_ascii")
        dsn = psycopg2.extensions.make_dsn(**(parts | {"dbname": f"{SCRATCH}_ascii"}))
        self.assertIn("is encoded in SQL_ASCII; create one with", self.processor(log, status=1, DATABASE_URL=dsn)[1])
        query("ALTER TABLE users_revenue RENAME COLUMN user_id TO someone")
        _, errors = self.processor(log, status=1)
        self.assertIn("users_revenue.user_id is missing", errors)
        for arguments, words in (([self.directory], "Is a directory"), (["missing"], "No such file")):
            query("DROP TABLE users_revenue")
            query((HERE / "create_table.sql").read_text())
            _, errors = self.processor(*arguments, status=1)
            self.assertIn(words, errors)
        _, errors = self.processor(status=1)
        self.assertIn("server-events.jsonl: no such file; start server.py", errors)

    def test_without_a_database_events_are_taken_and_everyone_is_told(self):
        nowhere = {"DATABASE_URL": f"postgresql://localhost:{free_port()}/nowhere"}
        server = Server(self, **nowhere)
        self.assertEqual(server.post(EVENT)[0], 200)
        status, headers, _ = server.ask("GET", "/userEvents/user1")
        self.assertEqual((status, headers["Retry-After"]), (503, "2"))
        self.assertEqual(server.ask("GET", "/health")[0], 200)
        _, errors = self.processor(status=1, **nowhere)
        self.assertEqual(errors.count("\n"), 1)
        self.assertIn("Start PostgreSQL", errors)
        self.assertEqual(len(names_in(server.log)), 1)

    def test_a_database_that_hangs_starves_no_post(self):
        server = Server(self, "--workers", "1")
        self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 404)
        with locked_users():
            asking = [threading.Thread(target=server.ask, args=["GET", "/userEvents/user1"]) for _ in range(20)]
            for thread in asking:
                thread.start()
            self.assertEqual(server.post(EVENT)[0], 200)
            self.assertTrue(all(thread.is_alive() for thread in asking))
            self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 503)
            for thread in asking:
                thread.join()
            wait_until(lambda: not waiting(), "no query is left waiting")
        wait_until(lambda: server.ask("GET", "/userEvents/user1")[0] == 404, "the database answers again")
        terminate_backends()
        self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 404)

    def test_a_database_that_falls_silent_is_not_waited_for(self):
        welcome = b"R" + struct.pack(">II", 8, 0)
        for setting in (b"client_encoding\0UTF8\0", b"DateStyle\0ISO\0", b"standard_conforming_strings\0on\0"):
            welcome += b"S" + struct.pack(">I", 4 + len(setting)) + setting
        with socket.create_server(("127.0.0.1", 0)) as database:
            database.settimeout(20)
            url = f"postgresql://127.0.0.1:{database.getsockname()[1]}/x?sslmode=disable&gssencmode=disable"
            server = Server(self, "--workers", "1", DATABASE_URL=url)
            server.ask("GET", "/health")
            self.assertFalse(select.select([database], [], [], 0)[0], "health has nothing to do with the database")
            for greeting in (welcome + b"Z" + struct.pack(">I", 5) + b"I", b""):  # silent after it, and from the start
                answers = []
                asking = threading.Thread(target=lambda: answers.append(server.ask("GET", "/userEvents/user1")[0]))
                asking.start()
                wire, _ = database.accept()
                with wire:
                    wire.sendall(greeting)
                    asking.join()
                self.assertEqual(answers, [503])

    def test_before_the_tables_exist_a_user_is_unknown_and_the_processor_creates_them(self):
        query("DROP TABLE users_revenue, event_producers, event_logs")
        server = Server(self)
        self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 404)
        server.post(EVENT)
        processors = [self.start("data_processor.py") for _ in range(4)]
        for processor in processors:
            self.assertEqual(processor.wait(20), 0, processor.stderr.read())
        self.assertRevenue({"user1": 1})

    def test_of_two_processors_that_create_the_tables_the_second_waits(self):
        query("DROP TABLE users_revenue, event_producers, event_logs")
        log = self.path("log", EVENT + b"\n")
        first = psycopg2.connect(os.environ["DATABASE_URL"])
        with contextlib.closing(first), first.cursor() as sql:
            sql.execute("SELECT pg_advisory_xact_lock(%s)", [data_processor.TABLES_LOCK])
            sql.execute((HERE / "create_table.sql").read_text())
            second = self.start("data_processor.py", log)
            wait_until(waiting, "the second waits")
            first.commit()
            self.assertEqual(second.wait(20), 0, second.stderr.read())
        self.assertRevenue({"user1": 1})

    def test_a_revenue_column_that_would_round_is_refused_and_a_kept_table_is_added_to(self):
        log = self.path("log", EVENT + b"\n")
        for kind in ("double precision", "numeric(10, 2)", "bigint"):
            query(f"ALTER TABLE users_revenue ALTER COLUMN revenue TYPE {kind}")
            _, errors = self.processor(log, status=1)
            self.assertIn("ALTER TABLE users_revenue ALTER COLUMN revenue TYPE numeric\n", errors)
        query("DROP TABLE users_revenue")
        query("CREATE TABLE users_revenue (id serial, user_id varchar(255) PRIMARY KEY, revenue numeric)")
        query("INSERT INTO users_revenue (user_id, revenue) VALUES ('user1', 0.5), ('user2', NULL)")
        self.processor(log, self.path("other", named("p", 1, "user2")))
        self.assertRevenue({"user1": Decimal("1.5"), "user2": 1})


def terminate_backends():
    """End the server side of every connection to the scratch database."""
    return query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                 "WHERE datname = current_database() AND pid <> pg_backend_pid()")


def count(path, connection):
    """Count the events of a log in a connection's transaction."""
    log = data_processor.Log(path)
    with contextlib.closing(log.file), connection.cursor() as sql:
        log.take_end()
        data_processor.count_once(sql, data_processor.Chunk(log, 0, True))


class ExactlyOnce(SystemTest):
    """Whatever is killed, retried, run again or copied in between."""

    def test_a_killed_client_is_continued_through_a_restart_of_the_server(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 100_000)
        client = self.start("client.py", "--url", server.url)
        wait_until(lambda: server.log.exists() and server.log.stat().st_size > 3_000_000, "the client is half way")
        client.kill()
        client.wait()
        self.assertTrue(self.path("events.jsonl.delivery").exists(), "the client was killed too late")
        server.kill()
        server = Server(self, port=server.port)
        _, errors = self.client("--url", server.url)
        self.assertIn("going on", errors)
        self.assertFalse(self.path("events.jsonl.delivery").exists())
        names = names_in(server.log)
        self.assertEqual({(names[0][0], line) for line in range(1, 100_001)}, set(names))
        self.assertGreater(len(names), 100_000)
        output, _ = self.processor()
        self.assertIn(f"100,000 applied, {len(names) - 100_000:,} repeated", output)
        self.assertRevenue(oracle(events))

    def test_processors_at_once_one_of_them_killed_and_the_backend_of_one_terminated(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 100_000)
        self.client("--url", server.url)
        lines = server.log.read_text().splitlines(keepends=True)
        logs = [server.log, self.path("reversed", "".join(reversed(lines))), self.path("second half", "".join(lines[50_000:]))]
        with locked_users():
            processors = [self.start("data_processor.py", log) for log in logs * 2]
            wait_until(lambda: len(waiting()) == len(processors), "all wait for each other")
            processors[0].kill()
            query("SELECT pg_terminate_backend(%s)", [waiting()[-1]])
        self.assertEqual([processor.wait(60) for processor in processors], [-signal.SIGKILL] + 5 * [0])
        self.processor(*logs)
        self.assertRevenue(oracle(events))
        self.assertEqual(query("SELECT applied::text FROM event_producers"), [("{[1,100001)}",)])

    def test_when_the_parent_is_killed_its_workers_end_and_the_port_is_free(self):
        server = Server(self, "--workers", "3")
        workers = server.workers()
        self.assertEqual(len(workers), 3)
        idle = server.connect()
        self.addCleanup(idle.close)
        server.kill()

        wait_until(lambda: can_bind(server.port) and not any(map(alive, workers)), "port and workers are gone", seconds=1)

    def test_a_worker_that_dies_is_replaced(self):
        self.assertEqual(len(Server(self, log="other").workers()), os.cpu_count())
        # Also with a child of another program, whose exit status is 3, with SIGCHLD ignored, a full disk below stderr,
        # and a fork that fails.
        script = ["-c", "import os, signal, sys, time, server; fork = os.fork\n"
                        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
                        "if not fork():\n"
                        "    while not os.path.exists('end'):\n"
                        "        time.sleep(0.01)\n"
                        "    os._exit(3)\n"
                        "def fork_or_fail():\n"
                        "    forks.append(1)\n"
                        "    return fork() if len(forks) != 3 else os.open('', 0)\n"
                        "forks, os.fork = [], fork_or_fail\n"
                        "sys.stderr = open('/dev/full', 'w', 1); sys.path[0] = ''; sys.exit(server.main())"]
        with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):
            server = Server(self, "--workers", "2", script=script)
        stranger, *workers = server.workers()
        self.path("end", b"")
        wait_until(lambda: not alive(stranger), "the stranger has ended")
        self.assertEqual(server.workers(), workers)
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda: len(server.workers()) == 2 and workers[0] not in server.workers(), "there are two workers")
        for _ in range(8):
            self.assertEqual(server.post(EVENT)[0], 200)

    def test_a_server_that_is_told_to_stop_finishes_what_it_received(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            server = Server(self, log=f"log{number}")
            client = self.start("client.py", write_events(self.path(f"events{number}"), 50_000), "--url", server.url,
                                "--give-up-after", "0")
            wait_until(lambda: server.log.exists() and server.log.stat().st_size > 100_000, "the client is at it")
            for worker in server.workers():  # a terminal tells everyone
                os.kill(worker, number)
            self.assertEqual(server.post(EVENT)[0], 200)
            self.assertEqual(server.stop(number), 0)
            client.wait(20)
            self.assertTrue(server.log.read_bytes().endswith(b"}\n"))
            self.assertEqual(server.errors.read_text(), "")

    def test_one_request_to_two_servers_counts_once_in_whatever_order_logs_are_processed(self):
        one, two = Server(self, log="one"), Server(self, log="two")
        for server, first in ((one, 1), (two, 1), (one, 2), (two, 3)):
            body = b"".join(EVENT.replace(b"user1", b"user%d" % sequence) + b"\n" for sequence in (first, first + 1))
            self.assertEqual(server.post(body, "application/x-ndjson", Producer_Id="sender", Sequence=first)[0], 200)
        logs = [one.log, two.log]
        both = one.log.read_bytes() + two.log.read_bytes()
        lines = both.splitlines(keepends=True)
        orders = [[logs[0], logs[1]], [logs[1], logs[0]], [self.path("both", both), *logs],
                  [self.path("head", b"".join(lines[:5])), self.path("again", both + both), logs[1], logs[0]],
                  [self.path("reversed", b"".join(reversed(lines)))], [logs[0], self.path("copy", both), logs[1]]]
        for order in orders:
            query("TRUNCATE users_revenue, event_producers, event_logs")
            for log in order:
                self.processor(log)
            self.processor(*order)
            self.assertRevenue({f"user{sequence}": 1 for sequence in (1, 2, 3, 4)})

    def test_two_logs_of_one_producer_processed_at_the_same_moment_count_once(self):
        for attempt in range(3):
            query("TRUNCATE users_revenue, event_producers, event_logs")
            logs = [self.path(f"log{part}", "".join(named(f"p{producer}", sequence, f"user{sequence % 7}")
                                                    for producer in random.sample(range(30), 30)
                                                    for sequence in range(1 + 20 * part, 101 + 20 * part)))
                    for part in range(3)]
            processors = [self.start("data_processor.py", log) for log in logs]
            for processor in processors:
                self.assertEqual(processor.wait(60), 0, processor.stderr.read())
            self.assertEqual(query("SELECT sum(revenue) FROM users_revenue"), [(30 * 140,)])
            self.assertEqual(query("SELECT DISTINCT applied::text FROM event_producers"), [("{[1,141)}",)])

    def test_of_two_processors_that_meet_a_producer_new_or_known_the_second_waits(self):
        for start in (1, 3):
            first, second = (self.path(f"log{n}", named("p", n) + named("p", n + 1)) for n in (start, start + 1))
            connection = data_processor.open_database()
            with contextlib.closing(connection):
                count(first, connection)
                other = self.start("data_processor.py", second)
                wait_until(waiting, "the other waits")
                connection.commit()
                self.assertEqual(other.wait(20), 0, other.stderr.read())
            self.assertRevenue({"user1": start + 2})

    def test_processors_at_once_on_a_plain_log_count_it_once(self):
        log = self.path("plain", EVENT + b"\n")
        self.processor(log)
        log.write_bytes(2 * log.read_bytes())
        with locked_users():
            processors = [self.start("data_processor.py", log) for _ in range(3)]
            wait_until(lambda: len(waiting()) == 3, "all wait")
        self.assertEqual([processor.wait(20) for processor in processors], [0, 0, 0])
        self.assertRevenue({"user1": 2})

    def test_a_producer_that_was_read_is_not_changed_by_others_until_the_commit(self):
        first, second = (self.path(f"log{n}", named("p", n) + named("p", 2)) for n in (1, 3))
        self.processor(self.path("known", named("p", 9)))
        totals, other = data_processor.Chunk.totals, []

        def decide(chunk, *arguments):  # between the reading of the producers and the writing
            other.append(self.start("data_processor.py", second))
            wait_until(lambda: other[0].poll() is not None or waiting(), "the other waits")
            return totals(chunk, *arguments)
        connection = data_processor.open_database()
        with contextlib.closing(connection), connection, unittest.mock.patch.object(data_processor.Chunk, "totals", decide):
            count(first, connection)
        self.assertEqual(other[0].wait(20), 0)
        self.assertRevenue({"user1": 4})

    def test_two_processors_come_between_any_two_statements_of_a_third(self):
        connect = psycopg2.connect

        def intrude(path):
            connection = connect(os.environ["DATABASE_URL"], options="-c lock_timeout=20ms")
            with contextlib.closing(connection), contextlib.suppress(psycopg2.errors.LockNotAvailable):
                count(path, connection)
                connection.commit()

        class Cursor(psycopg2.extensions.cursor):
            def execute(self, *arguments):
                for at, path in zip(intrusions, paths[1:]):
                    if at == self.connection.steps:
                        intrude(path)
                self.connection.steps += 1
                super().execute(*arguments)

        class Interrupted(psycopg2.extensions.connection):
            steps = 0

            def cursor(self, *arguments, **options):
                return super().cursor(*arguments, cursor_factory=Cursor, **options)
        paths = [self.path(f"log{a}{b}", named("p", a) + named("p", b)) for a, b in ((1, 2), (2, 3), (1, 3))]
        for first in range(5):
            for second in range(first, 5):
                intrusions = first, second
                query("TRUNCATE users_revenue, event_producers, event_logs")
                with contextlib.closing(connect(os.environ["DATABASE_URL"], connection_factory=Interrupted)) as connection:
                    count(paths[0], connection)
                    connection.commit()
                    self.assertTrue(connection.steps, "nobody came between")
                for path in paths:
                    intrude(path)
                self.assertEqual(query("SELECT revenue FROM users_revenue"), [(3,)], intrusions)

    def test_two_processors_never_wait_for_each_other(self):
        users = [f"user{number}" for number in range(10_000)]
        logs = [self.path(producer, "".join(named(producer, number, user) for number, user in enumerate(order, 1)))
                for producer, order in (("p", users), ("q", users[::-1]))]
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        before = query(deadlocks)
        with locked_users():
            processors = [self.start("data_processor.py", log) for log in logs]
            wait_until(lambda: len(waiting()) == 2, "both wait")
        self.assertEqual([processor.wait(30) for processor in processors], [0, 0])
        wait_until(lambda: query("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()") == [(1,)],
                   "their sessions have ended and counted their deadlocks")
        self.assertEqual(query(deadlocks), before)

    def test_a_processor_that_stands_still_does_not_hold_up_the_others_for_long(self):
        log = self.path("log", named("p", 1))
        count_once, outputs = data_processor.count_once, []

        def stand_still(sql, chunk):
            counted = count_once(sql, chunk)
            if not outputs:
                outputs.append(self.processor(log)[0])
            return counted
        processor = data_processor.Processor()
        with silence(), unittest.mock.patch.multiple(data_processor, count_once=stand_still, IDLE_SECONDS=0.2):
            processor.run_once([str(log)])
        processor.connection.close()
        self.assertIn("1 applied", outputs[0])
        self.assertRevenue({"user1": 1})

    def test_a_chunk_is_bounded_in_bytes_in_time_and_in_bad_lines(self):
        for line, limits in ((named("p", 1), {"CHUNK_BYTES": 1000}), (named("p", 1), {"CHUNK_SECONDS": -1}),
                             ("x\n", {"CHUNK_REJECTED": 100})):
            log = data_processor.Log(self.path("log", 1000 * line))
            with contextlib.closing(log.file), unittest.mock.patch.multiple(data_processor, BLOCK_BYTES=500, **limits):
                log.take_end()
                chunk = data_processor.Chunk(log, 0, True)
            self.assertEqual(len(chunk.users) + len(chunk.rejected), chunk.end // len(line))
            self.assertLess(chunk.end, 2000)

    def test_a_log_that_is_not_the_one_read_before_is_read_to_its_end_in_chunks(self):
        log = self.path("log", "".join(named("p", n) for n in range(1, 4)))
        processor = data_processor.Processor()
        with silence(), unittest.mock.patch.object(data_processor, "CHUNK_BYTES", 1), \
                unittest.mock.patch.object(data_processor, "BLOCK_BYTES", 150):
            processor.run_once([str(log)])
            log.write_text(named("p", 1) + "".join(named("q", n) for n in range(1, 6)))
            processor.run_once([str(log)])
        processor.connection.close()
        self.assertRevenue({"user1": 8})

    def test_a_log_without_names_that_was_changed_is_refused_in_every_chunk(self):
        log = self.path("log", named("p", 1) + 3 * (EVENT.decode() + "\n"))
        for failed in (False, True, True):
            processor = data_processor.Processor()
            with silence(), unittest.mock.patch.multiple(data_processor, CHUNK_BYTES=700, BLOCK_BYTES=200):
                processor.run_once([str(log)])
            processor.connection.close()
            self.assertEqual(processor.failed, failed)
            log.write_text("".join(named("p", n) for n in range(1, 11)) + 4 * (EVENT.decode() + "\n")
                           + "".join(named("p", n) for n in range(11, 31)))
        self.assertRevenue({"user1": 3 + 30})

    def test_a_position_never_moves_back_and_a_restored_log_goes_on_from_its_start(self):
        content = "".join(named("p", sequence) for sequence in range(1, 2001))
        log = self.path("log", content)
        self.processor(log)
        position = query("SELECT position FROM event_logs")
        log.write_text(content[:len(content) // 2].rpartition("\n")[0] + "\n")
        output, _ = self.processor(log)
        self.assertIn(" 0 applied", output)
        self.assertEqual(query("SELECT position FROM event_logs"), position)
        log.write_text(named("p", 1) + content.partition("\n")[2].replace("user1", "User1") + named("p", 2001))
        self.processor(log)
        self.assertRevenue({"user1": 2001})
        self.assertEqual(query("SELECT position FROM event_logs"), [(log.stat().st_size,)])


README = (HERE / "README.md").read_text()


def blocks(language):
    """Return the README's code blocks of a language."""
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if name == language]


def alive(pid):
    """Tell whether a process runs (a zombie does not)."""
    if Path("/proc/self/stat").exists():
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


class Client(SystemTest):
    """The delivery of a file."""

    def test_a_second_client_on_the_same_file_is_refused(self):
        write_events(self.path("events.jsonl"), 3)
        nowhere = "--url", f"http://localhost:{free_port()}/liveEvent"
        self.start("client.py", *nowhere)
        wait_until(self.path("events.jsonl.delivery").exists, "the first client waits for a server")
        _, errors = self.client(*nowhere, "--give-up-after", 0, status=1)
        self.assertIn("is being sent by another client", errors)

    def test_a_file_that_was_replaced_while_it_was_sent_is_not_sent_by_another_client(self):
        self.path("events.jsonl", EVENT + b"\n")
        url = f"http://127.0.0.1:{free_port()}/liveEvent"
        first = self.start("client.py", "--url", url)
        wait_until(self.path("events.jsonl.delivery").exists, "the first client has begun")
        self.path("new", EVENT + b"\n").rename(self.path("events.jsonl"))
        _, errors = self.client("--restart", "--url", url, status=1)
        self.assertIn("is being sent by another client", errors)
        first.kill()
        _, errors = self.client("--url", url, "--give-up-after", "0", status=1)
        self.assertIn("going on", errors)

    def test_it_waits_for_a_server_that_is_not_up_yet(self):
        port = free_port()
        events = write_events(self.path("events.jsonl"), 3)
        client = self.start("client.py", "--url", f"http://localhost:{port}/liveEvent")
        wait_until(self.path("events.jsonl.delivery").exists, "the client has begun")
        events.write_bytes(events.read_bytes() + EVENT)  # what is appended now belongs to another delivery
        Server(self, port=port)
        self.assertEqual(client.communicate(timeout=20)[0][:17], "3 events accepted")

    def test_a_file_that_is_shortened_meanwhile_is_not_taken_for_delivered(self):
        port = free_port()
        events = write_events(self.path("events.jsonl"), 3)
        client = self.start("client.py", "--url", f"http://localhost:{port}/liveEvent")
        wait_until(self.path("events.jsonl.delivery").exists, "the client has begun")
        os.truncate(events, events.read_bytes().index(b"\n") + 1)
        Server(self, port=port)
        self.assertIn("was shortened", client.communicate(timeout=20)[1])
        self.assertEqual((client.returncode, self.path("events.jsonl.delivery").exists()), (1, True))

    def test_a_rejected_line_that_is_cut_off_meanwhile_is_reported_all_the_same(self):
        events = self.path("events.jsonl", b"x\n")
        with unittest.mock.patch.object(client_module, "publish"), silence():
            delivery = client_module.Delivery(str(events))
            batch, = client_module.read_batches(delivery, 1)
            batch.rejected.append((1, "wrong"))
            os.truncate(events, 0)
            rejects = client_module.Rejects(delivery)
            rejects.add(batch)
            rejects.publish()
        self.assertEqual((rejects.count, self.path("events.jsonl.rejected.new").read_bytes()), (1, b"\n"))
        delivery.file.close()
        delivery._state.close()

    def test_batches_and_what_is_read_ahead_are_bounded(self):
        first, attempts = EVENT.replace(b"user1", b"first"), []

        def post(count, body):
            if first in body:
                attempts.append(count)
            if first in body and len(attempts) < 5:
                return 503, {}, b""
            return 200, {}, b'{"accepted": %d, "rejected": []}' % body.count(b"\n")
        with Recorder(options=[BATCHES], post=post) as server:
            self.path("events.jsonl", first + b"\n" + (EVENT + b"\n") * 100)
            self.client("--url", server.url, "--batch-size", 1)
            self.assertEqual({body.count(b"\n") for _, body in server.posts}, {1})
            self.assertLess(attempts[-1], 5 + client_module.BATCHES_AHEAD)  # the others waited for the first
            self.client(self.path("large", (padded(60_000) + b"\n") * 30), "--url", server.url)
        self.assertLessEqual(max(len(body) for _, body in server.posts), 512 * 1024)

    def test_retries_come_later_each_time_and_at_random(self):
        spans = []
        with Recorder(options=[(503, {}, b"")] * 12 + [BATCHES], post=None) as server, \
                unittest.mock.patch.object(client_module.random, "uniform", lambda *span: spans.append(span) or 0):
            client_module.Sender(server.url, "p", 30).ask()
        self.assertTrue(all(low < high for low, high in spans))
        self.assertEqual([high for _, high in spans],
                         [min(spans[0][1] * 2**n, client_module.MAX_BACKOFF_SECONDS) for n in range(12)])

    def test_it_gives_up_so_long_after_the_last_success_and_not_after_the_start(self):
        success, refusal = (200, {}, b'{"accepted": 1, "rejected": []}'), (400, {}, b'{"error": "words"}')
        events = str(self.path("events.jsonl", (EVENT + b"\n") * 4))
        for options, second in ((BATCHES, success), ((404, {}, b""), refusal)):
            clock, answers = itertools.count(6, 6), {1: success, 3: second, 5: success}
            now = [0]

            def post(count, body):
                now[0] = next(clock)
                return answers.get(count, (503, {}, b""))
            with Recorder(options=[options], post=post) as server, \
                    unittest.mock.patch.object(client_module, "time", types.SimpleNamespace(monotonic=lambda: now[0])):
                delivery = client_module.Delivery(events)
                with delivery.file, delivery._state:
                    batches = list(client_module.read_batches(delivery, 1))
                sender = client_module.Sender(server.url, delivery.producer, 10)
                sender.ask()
                for batch in batches[:3]:
                    sender.deliver(batch)
                self.assertRaises(client_module.Failure, sender.deliver, batches[3])
                self.assertEqual(len(server.posts), 8)

    def test_a_server_that_does_not_answer_is_not_waited_for_without_end(self):
        with socket.create_server(("127.0.0.1", 0)) as silent, \
                unittest.mock.patch.object(client_module, "REQUEST_SECONDS", 0.1):
            sender = client_module.Sender(f"http://127.0.0.1:{silent.getsockname()[1]}/liveEvent", "p", 0)
            self.assertRaises(client_module.Failure, sender.ask)

    def test_progress_is_shown_on_a_terminal_alone(self):
        for terminal in (True, False):
            stderr = io.StringIO()
            stderr.isatty = lambda: terminal
            with contextlib.redirect_stderr(stderr), unittest.mock.patch.object(
                    client_module, "time", types.SimpleNamespace(monotonic=itertools.count(0, 5).__next__)):
                client_module.Progress(1000).show(10, 500)
            self.assertEqual("10 events, 50%" in stderr.getvalue(), terminal)

    def test_it_gives_up_and_says_what_was_not_delivered_and_goes_on_later(self):
        events = write_events(self.path("events.jsonl"), 30)
        _, errors = self.client("--url", f"http://localhost:{free_port()}/liveEvent", "--give-up-after", "0.2", status=1)
        self.assertIn("Not delivered: every line from 1 on.", errors)
        state = json.loads(self.path("events.jsonl.delivery").read_text())
        self.assertEqual((state["size"], state["sha256"]),
                         (events.stat().st_size, hashlib.sha256(events.read_bytes()).hexdigest()))
        server = Server(self)
        self.client("--url", server.url)
        self.assertEqual({producer for producer, _ in names_in(server.log)}, {state["producerId"]})

    def test_it_refuses_to_go_on_with_a_changed_file_until_it_is_told_to_restart(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 3)
        gone = f"http://localhost:{free_port()}/liveEvent"
        for spoil in (lambda: events.write_bytes(events.read_bytes() + EVENT),
                      lambda: events.write_bytes(events.read_bytes().replace(b': "user', b': "User')),
                      lambda: self.path("events.jsonl.delivery", re.sub(
                          r'Id": "[^"]+"', 'Id": ""', self.path("events.jsonl.delivery").read_text())),
                      lambda: self.path("events.jsonl.delivery", b"\xff{"), lambda: self.path("events.jsonl.delivery", "[]"),
                      lambda: self.path("events.jsonl.delivery", "[" * 100_000)):
            self.client("--url", gone, "--give-up-after", "0", "--restart", status=1)
            spoil()
            _, errors = self.client("--url", server.url, status=1)
            self.assertIn("--restart", errors)
        self.assertFalse(server.log.read_bytes())
        self.client("--url", server.url, "--restart")
        self.assertEqual(len(names_in(server.log)), 4)

    def test_a_wrong_secret_stops_it_at_once_with_the_servers_words(self):
        secret = {"EVENTS_AUTHORIZATION": "Bearer s\u00e9cret"}
        server = Server(self, **secret)
        write_events(self.path("events.jsonl"), 3)
        _, errors = self.client("--url", server.url, status=1)
        self.assertIn("status 401: the Authorization header is missing or wrong", errors)
        self.client("--url", server.url, **secret)
        self.assertEqual(len(names_in(server.log)), 3)

    def test_a_server_of_single_events_is_served_one_at_a_time(self):
        for options, refused in ((404, 400), (405, 413), (501, 422), (200, 400)):
            with Recorder(options=[(options, {}, b"")], post=lambda count, body: (
                    (refused, {}, b'{"error": "no"}') if b"bad" in body else (200, {}, b"Event received"))) as server:
                self.path("events.jsonl", EVENT + b"\n\n" + EVENT.replace(b"user1", b"bad") + b"\r\n" + EVENT)
                output, errors = self.client("--url", server.url, "--batch-size", 3, status=1)
            self.assertIn("2 events accepted, 1 rejected", output)
            self.assertIn("events.jsonl:3: no\n", errors)
            self.assertEqual([(headers["Content-Type"], headers["Sequence"], json.loads(body)["userId"])
                              for headers, body in sorted(server.posts, key=lambda post: post[0]["Sequence"])],
                             [("application/json", sequence, user)
                              for sequence, user in (("1", "user1"), ("3", "bad"), ("4", "user1"))])
            self.assertEqual(len({headers["Producer-Id"] for headers, _ in server.posts}), 1)

    def test_whatever_is_no_full_answer_is_tried_again_under_the_same_name(self):
        full = b'{"accepted": 2, "rejected": [{"line": 2, "error": "e"}]}'
        entries = [b'{"line": %d, "error": "e"}' % line for line in range(1, 10)]
        incomplete = [b"", b"<html>", b"[]", b"[" * 100_000, b'{"accepted": 3}', b'{"accepted": 1, "rejected": []}',
                      b'{"accepted": 2, "rejected": [{"line": 1e999, "error": "e"}]}',
                      b'{"accepted": 2, "rejected": [{"line": 2.0, "error": "e"}]}', b'{"accepted": 2, "rejected": [%b]}' % entries[3],
                      b'{"accepted": 2, "rejected": [%b]}' % entries[8], b'{"accepted": 1, "rejected": [%b, %b]}' % (entries[1], entries[1]),
                      b'{"rejected": []}', b'{"accepted": 2, "rejected": [%b, %b]}' % (entries[1], entries[1]),
                      b'{"accepted": -1, "rejected": [%b]}' % b", ".join(entries[:4])]
        answers = [(500, {}, b"oops"), (503, {"Retry-After": "1"}, b""), (507, {}, b"{}"), (429, {}, b""), (201, {}, full), None,
                   (408, {}, b""), (502, {}, b""), (200, {"Transfer-Encoding": "chunked"}, full),
                   *((200, {}, body) for body in incomplete)]
        for first in range(0, len(answers), 4):
            now = answers[first:first + 4] + [(200, {}, full)]
            with Recorder(options=[(503, {}, b""), None, BATCHES],
                          post=lambda count, body: now[count]) as server:
                self.path("events.jsonl", (EVENT + b"\n") * 3 + b"\n")
                output, errors = self.client("--url", server.url, status=1)
            self.assertIn("2 events accepted, 1 rejected", output)
            self.assertIn("events.jsonl:2: e\n", errors)
            self.assertEqual(len(server.posts), len(now))
            self.assertEqual(len({(headers["Producer-Id"], headers["Sequence"], body) for headers, body in server.posts}), 1)

    def test_a_redirect_or_a_refused_batch_is_no_delivery(self):
        for status, headers in ((301, {"Location": "/elsewhere"}), (302, {"Location": "/elsewhere"}), (303, {}), (413, {}),
                                (403, {})):
            with Recorder(options=[BATCHES], post=lambda count, body: (status, headers, b'{"error": "words"}')) as server:
                self.path("events.jsonl", EVENT)
                _, errors = self.client("--url", server.url, "--restart", status=1)
            self.assertIn(f"answered with status {status}: words.\nNot delivered: line 1.", errors)
            self.assertEqual(len(server.posts), 1)

    def test_a_refusal_ends_the_run_and_names_the_lines_that_were_not_answered(self):
        together, seen = threading.Barrier(4), set()
        answers = {"1": (200, {}, b'{"accepted": 1, "rejected": []}'), "2": (401, {}, b""), "3": (503, {}, b""),
                   "4": (200, {}, b'{"accepted": 1, "rejected": []}')}

        def post(count, body):
            user = json.loads(body)["userId"]
            if user not in seen:
                seen.add(user)
                together.wait(5)
            return answers[user]
        self.path("events.jsonl", "".join(f'{{"userId": "{user}"}}\n' for user in answers))
        with Recorder(options=[BATCHES], post=post) as server:
            _, errors = self.client("--url", server.url, "--batch-size", 1, "--give-up-after", 1000, status=1)
        self.assertIn("Not delivered: lines 2 to 3.\n", errors)
        with Recorder(options=[(404, {}, b"")], post=lambda count, body: answers[json.loads(body)["userId"]]) as server:
            _, errors = self.client("--url", server.url, status=1)
        self.assertIn("Not delivered: lines 2 to 4.\n", errors)

    def test_odd_files(self):
        server = Server(self)
        huge = b'{"userId": "' + b"x" * 600_000 + b'"}'
        bom, long = b"\xef\xbb\xbf" + EVENT, EVENT[:-1] + b', "pad": "' + b"x" * 100_000 + b'"}'
        for content, accepted, rejected in ((b"", 0, []), (b"\n\r\n \n", 0, []), (EVENT, 1, []), (EVENT + b"\r\n", 1, []),
                                            (bom + b"\n" + EVENT, 1, [bom]), (huge, 0, [huge]), (long, 0, [long]),
                                            (EVENT + b"\n" + huge + b"\n" + long + b"\n" + EVENT, 2, [huge, long]),
                                            (EVENT + b"\r" + EVENT, 0, [EVENT + b"\r" + EVENT])):
            events = self.path(f"events{secrets.token_hex(4)}", content)
            output, _ = self.client(events, "--url", server.url, status=1 if rejected else 0)
            self.assertIn(f"{accepted} events accepted, {len(rejected)} rejected", output)
            if rejected:
                self.assertEqual(Path(f"{events}.rejected").read_bytes(), b"\n".join(rejected) + b"\n")
        self.processor()

    def test_a_delivery_is_kept_until_answers_rejected_lines_and_receipt_are_safe(self):
        state, seen = self.path("events.jsonl.delivery"), []

        def post(_count, _body):
            seen.append(state.exists())
            return 200, {}, b'{"accepted": 1, "rejected": [{"line": 2, "error": "wrong"}]}'
        receiver, gone = os.pipe()
        os.close(receiver)
        self.addCleanup(os.close, gone)
        self.path("events.jsonl", (EVENT + b"\n") * 40)
        with Recorder(options=[(204, {"Accept-Post": "application/x-ndjson"}, b"")], post=post) as server:
            arguments = ["--url", server.url, "--batch-size", "2"]
            self.path("events.jsonl.rejected").mkdir()
            self.assertIn("Is a directory", self.client(*arguments, status=1)[1])
            self.assertTrue(state.exists(), "forgotten before the rejected lines were kept")
            self.path("events.jsonl.rejected").rmdir()
            subprocess.run([sys.executable, HERE / "client.py", *arguments], cwd=self.directory, stdout=gone,
                           stderr=subprocess.DEVNULL)
            self.assertTrue(state.exists(), "forgotten before the receipt was given")
            self.client(*arguments, status=1)
            self.assertFalse(state.exists())
        self.assertEqual(seen, [True] * 60)
        self.assertEqual(len({headers["Producer-Id"] for headers, _ in server.posts}), 1)

    def test_ctrl_c_ends_it_quietly_and_it_goes_on_later(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 100_000)
        client = self.start("client.py", "--url", server.url, "--batch-size", "50")
        wait_until(lambda: server.log.stat().st_size > 100_000, "the client is at it")
        client.send_signal(signal.SIGINT)
        self.assertEqual((client.communicate(timeout=5), client.returncode), (("", ""), 130))
        self.client("--url", server.url)
        self.processor()
        self.assertRevenue(oracle(events))

    def test_what_is_typed_wrong_is_said_in_a_sentence(self):
        for arguments, status, words in ((["missing"], 1, "missing: No such file or directory"),
                                         ([self.directory], 1, "Is a directory"),
                                         (["--batch-size", "0"], 2, "--batch-size must be"),
                                         (["--batch-size", "10001"], 2, "--batch-size must be"),
                                         (["--give-up-after", "-1"], 2, "--give-up-after must"),
                                         (["--url", "localhost:8000"], 2, "--url must look like"),
                                         (["--url", "http://[::1/"], 2, "--url must look like"),
                                         (["--url", "http://localhost:99999/"], 2, "--url must look like"),
                                         (["--url", "ftp://x/"], 2, "--url must look like"),
                                         ([self.path("e", EVENT), "--url", "http://a..b/liveEvent"], 1, "is malformed")):
            _, errors = self.client(*arguments, status=status)
            self.assertIn(words, errors)


BATCHES = (204, {"Accept-Post": "application/x-ndjson"}, b"")  # an answer to OPTIONS


class Recorder:
    """An HTTP server that answers what it is told to and records what it is sent. An answer None cuts the connection."""

    def __init__(self, options, post):
        recorder = self
        self.posts = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_OPTIONS(self):
                self.answer(options.pop(0) if len(options) > 1 else options[0])

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                recorder.posts.append((self.headers, body))
                self.answer(post(len(recorder.posts) - 1, body))

            def do_GET(self):
                raise AssertionError("the client must not follow a redirect")

            def answer(self, answer):
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/liveEvent"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()



def request(method="POST", target="/liveEvent", *fields, body=b"", version="1.1", host="127.0.0.1", media="application/json",
            length=True):
    """Return the bytes of a request with the usual fields and those that are given."""
    lines = [f"{method} {target} HTTP/{version}"]
    lines += [f"Host: {host}"] * (host is not None) + [f"Content-Type: {media}"] * bool(media)
    lines += [f"Content-Length: {len(body)}"] * (length and bool(body))
    return "\r\n".join([*lines, *fields, "", ""]).encode("latin-1") + body


def chunked(*chunks, end=b"0\r\n\r\n"):
    """Return a request whose body is sent in chunks."""
    return request("POST", "/liveEvent", "Transfer-Encoding: chunked") + b"".join(
        b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


@contextlib.contextmanager
def serving(log, **settings):
    """Return a context in which this process is a worker, with other settings than the server's own."""
    with unittest.mock.patch.multiple(server_module, **settings), server_module.listen("127.0.0.1", 0) as listener:
        worker = server_module.Worker(listener, log, None)
        thread = threading.Thread(target=worker.serve_forever, args=[0.05])
        thread.start()
        try:
            yield worker
        finally:
            worker.shutdown()
            thread.join()


class Http(SystemTest):
    """Requests as bytes, answers by status."""

    def assertStatus(self, server, status, *pieces):
        """Check an answer's status and shape, and return (headers, decoded body)."""
        answer, headers, body = server.raw(*pieces)
        self.assertEqual((answer, headers.get_content_type()), (status, "application/json"), (pieces[0][:100], body))
        body = json.loads(body)
        if status >= 400:
            self.assertEqual(list(body), ["error"])
        return headers, body

    def test_requests_that_are_fine(self):
        server = Server(self)
        for pieces in ([request(body=EVENT)], [chunked(EVENT)], [chunked(EVENT[:10], EVENT[10:])],
                       [chunked(EVENT, end=b"0;x=y\r\nX-Trailer: 1\r\n\r\n")], [chunked(EVENT, end=b"000\r\n\r\n")],
                       [request("POST", "/liveEvent", "Transfer-Encoding: Chunked") + b"%X ; a=\"b\"\r\n" % len(EVENT) + EVENT
                        + b"\r\n0\r\n\r\n"],
                       [request(body=EVENT, media="Application/JSON; charset=utf-8")],
                       [request("POST", "/liveEvent?query", body=EVENT)],
                       [request("POST", "http://LOCALHOST:1/liveEvent", body=EVENT, host="elsewhere")],
                       [b"\r\n" + request(body=EVENT)], [request(body=EVENT, version="1.0")],
                       [request("POST", "/liveEvent", "Accept: a", "Accept: b", "X-Empty:", "Connection: close", body=EVENT)],
                       [bytes([byte]) for byte in request(body=EVENT)],
                       [request(body=b"\r\n{\r\n" + EVENT[1:-1] + b"\n}\n")]):
            self.assertStatus(server, 200, *pieces)
        self.assertStatus(server, 200, request("POST", "/liveEvent", "Content-Length: " + "0" * 5000 + str(len(EVENT))) + EVENT)
        self.assertEqual(len(names_in(server.log)), 15)
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.8.9.10", "[::1]:8000", "[::1]"):
            self.assertStatus(server, 200, request("GET", "/health", host=host))

    def test_malformed_requests_are_refused_and_none_of_them_is_logged(self):
        server = Server(self)
        length = f"Content-Length: {len(EVENT)}"
        bad = {400: [
            request("POST", "/liveEvent", f"Content-Length: {value}", length=False) + EVENT
            for value in ("+54", "-54", "5" * 4400 + "x", "5_4", "\u0665\u0664".encode().decode("latin-1"), "0x36", "54, 54", "", "5 4",
                          "54e0", "54;")] + [
            request("POST", "/liveEvent", *fields) + EVENT for fields in (
                [length, length], [length, "Content-Length: 7"], [length, "Transfer-Encoding: chunked"],
                ["Transfer-Encoding: gzip"], ["Transfer-Encoding: gzip, chunked"], ["Transfer-Encoding: chunked, chunked"],
                ["Transfer-Encoding: identity"], ["Transfer-Encoding:"], ["Transfer-Encoding: chunked"] * 2,
                ["Transfer-Encoding : chunked"], ["Transfer-Encoding: xchunked"], [length, " folded"], [length, "\tfolded"],
                [length, "no colon"], [length, ": no name"], [length, "sp ace: x"], [length, "X: a\rb"], [length, "X: a\0b"],
                [length, "X\0: a"], [length, "X: a\nTransfer-Encoding: chunked"], [length, "Host: 127.0.0.1"],
                [length, "Authorization: a", "Authorization: b"], [length, "Content-Type: application/json"],
                [length, "n\u00e4me: x"], [length, "Producer-Id: p"], [length, "Sequence: 1"],
                [length, "Producer-Id: p", "Producer-Id: q", "Sequence: 1"], [length, "Producer-Id: p", "Sequence: 1", "Sequence: 2"],
                *([length, f"Producer-Id: {producer}", f"Sequence: {sequence}"] for producer, sequence in (
                    ("", 1), ("p" * 65, 1), ("p p", 1), ("p.", 1), ("\u00e4", 1), ("p", 0), ("p", -1), ("p", "+1"),
                    ("p", 2**53), ("p", "1.0"), ("p", ""), ("p", "\u00b2"))))] + [
            chunked(EVENT).replace(b"Transfer", b"X: \r\r\nTransfer", 1),
            *(request("POST", "/liveEvent", "Transfer-Encoding: chunked") + size + b"\r\n" + EVENT + b"\r\n0\r\n\r\n"
              for size in (b"-36", b"+36", b"0x36", b"3_6", b"", b"g", b" 36", b"36\0", b"36;\0", b"36;a\rb")),
            chunked(EVENT).replace(b"36\r\n", b"36\n"), chunked(EVENT).replace(b"}\r\n", b"}xx"), chunked(EVENT, end=b"0\n\n"),
            chunked(EVENT, end=b"0\r\nno colon\r\n\r\n"),
            request("POST", "/liveEvent", "Transfer-Encoding: chunked") + b"35\r\n" + EVENT + b"\r\n0\r\n\r\n",
            request("POST", "/liveEvent", "Transfer-Encoding: chunked", version="1.0") + b"36\r\n" + EVENT + b"\r\n0\r\n\r\n",
            request(body=EVENT, host=None), b"GET /health\r\n\r\n", b"GET\r\n\r\n", b"GET /health HTTP/1.1\n\n",
            b"GET  /health HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.1 \r\n\r\n", b"GET /hea lth HTTP/1.1\r\n\r\n",
            b"GET /health http/1.1\r\n\r\n", b"G\xcbT /health HTTP/1.1\r\n\r\n", b"\0\r\n\r\n", b"\r\n\r\n\r\n",
            *(b"GET /health HTTP/1.1%bHost: localhost%b%b" % ends for ends in (
                (b"\n", b"\r\n", b"\r\n"), (b"\r\n", b"\n", b"\r\n"), (b"\r\n", b"\r\n", b"\n"))),
            request("GET", "/userEvents/%zz"), request("GET", "/userEvents/%FF"),
            request(body=b"{}"), request(body=b" " * 2**20), chunked(*[b" " * 2**16] * 16), request(body=b"", length=False).replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n")],
            404: [request("GET", "/"), request("POST", "/liveEvents", body=EVENT), request("POST", "/liveEvent/", body=EVENT),
                  request("GET", "/userEvents/nobody"), request("GET", "/userEvents/%00"), request("GET", "/userEvents"),
                  request("OPTIONS", "*"), request("CONNECT", "localhost:80")],
            411: [request()],
            413: [request("POST", "/liveEvent", f"Content-Length: {n}") for n in (2**20 + 1, 10**30, "9" * 10_000,
                                                                                          "1" + "0" * 4000)] + [
                chunked(*[b"x" * 65536] * 17), request("POST", "/liveEvent", "Transfer-Encoding: chunked") + b"f" * 15 + b"\r\n",
                request(body=b"\n" * 10_001, media="application/x-ndjson")],
            414: [b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"],
            415: [request(body=EVENT, media=media) for media in (None, "text/plain", "application/jsonx",
                                                                 "application/x-www-form-urlencoded")],
            417: [request("POST", "/liveEvent", "Expect: miracles", body=EVENT)],
            421: [request("GET", path, host="example.com") for path in ("/health", "/userEvents/user1", "/other")] + [
                request(body=EVENT, host=host) for host in ("example.com", "localhost.example.com", "127.0.0.1.example.com",
                                                              "127.0.0.1@example.com", "[::2]", "", "localhost:x", "0.0.0.0")],
            431: [request("POST", "/liveEvent", *[f"X-{i}: x" for i in range(300)], body=EVENT),
                  request("POST", "/liveEvent", "X: " + "x" * 70_000, body=EVENT),
                  chunked(EVENT, end=b"0\r\n" + b"X: x\r\n" * 300 + b"\r\n"),
                  request("POST", "/liveEvent", *[f"X-{i}: " + "x" * 8000 for i in range(20)], body=EVENT)],
            505: [b"GET /health HTTP/2.0\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]}
        for status, requests in bad.items():
            for sent in requests:
                self.assertStatus(server, status, sent)
        self.assertEqual(server.log.read_bytes(), b"")
        self.assertStatus(server, 200, request(body=EVENT))

    def test_every_method_on_every_path(self):
        server = Server(self)
        allowed = {"/liveEvent": "POST, OPTIONS", "/health": "GET", "/userEvents/user1": "GET", "/other": None}
        for path, methods in allowed.items():
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"):
                if methods and method in methods.split(", "):
                    continue
                with server.connect() as wire:
                    wire.sendall(request(method, path, body=b"" if method == "HEAD" else EVENT))
                    status, headers, body = read_answer(wire, method)
                self.assertEqual((status, headers["Allow"]), (405, methods) if methods else (404, None), (method, path))
                self.assertEqual(bool(body), method != "HEAD")
        status, headers, body = server.ask("OPTIONS", "/liveEvent")
        self.assertEqual((status, headers["Allow"], headers["Accept-Post"], body),
                         (204, "POST, OPTIONS", "application/json, application/x-ndjson", b""))
        self.assertEqual(server.raw(request(body=EVENT, media="text/plain"))[1]["Accept-Post"], headers["Accept-Post"])
        with server.connect() as wire:
            wire.sendall(request("HEAD", "/health", "Connection: close"))
            self.assertTrue(wire.makefile("rb").read().endswith(b"\r\n\r\n"))
        self.assertEqual(server.log.read_bytes(), b"")

    def test_a_connection_is_kept_and_pipelined_requests_are_answered_in_order(self):
        server = Server(self)
        with server.connect() as wire:
            wire.sendall(request(body=EVENT) * 2 + request("GET", "/health") + request("GET", "/other") + chunked(EVENT)
                         + request("GET", "/health", "Connection: close") + request(body=EVENT))
            answers = Answers(wire)
            self.assertEqual([read_answer(answers)[0] for _ in range(6)], [200, 200, 200, 404, 200, 200])
            self.assertEqual(answers.read(), b"")
        self.assertEqual(len(names_in(server.log)), 3)
        for last in (request("GET", "/health", "Connection: Close"), request("GET", "/health", version="1.0"),
                     request("GET", "/health", "Connection: keep-alive", version="1.0")):
            with server.connect() as wire:
                wire.sendall(last + request(body=EVENT))
                answers = Answers(wire)
                self.assertEqual((read_answer(answers)[1]["Connection"], answers.read()), ("close", b""))
        self.assertEqual(len(names_in(server.log)), 3)

    def test_an_unread_body_is_never_taken_for_a_request(self):
        server = Server(self)
        smuggled = request(body=EVENT)
        for method, path, media in (("POST", "/other", "application/json"), ("GET", "/health", None), ("PUT", "/liveEvent", None),
                                    ("POST", "/liveEvent", "text/plain")):
            with server.connect() as wire:
                wire.sendall(request(method, path, body=smuggled, media=media) + smuggled)
                _, headers, _ = read_answer(wire)
                self.assertEqual(headers["Connection"], "close")
                self.assertEqual(wire.recv(1), b"")
        self.assertEqual(server.log.read_bytes(), b"")

    def test_a_refusal_is_seen_although_a_large_body_is_on_its_way(self):
        server = Server(self, EVENTS_AUTHORIZATION="secret")
        body = b"x" * 3_000_000
        for status, fields in ((401, []), (413, ["Authorization: secret"])):
            for _ in range(5):
                self.assertStatus(server, status, request("POST", "/liveEvent", *fields, body=body))
            with server.connect() as wire:
                head, _, _ = request("POST", "/liveEvent", *fields, body=body).partition(body)
                wire.sendall(head)
                select.select([wire], [], [], 20)  # the answer is there, and the sender does not look yet
                for start in range(0, len(body), 100_000):
                    wire.sendall(body[start:start + 100_000])
                self.assertEqual(read_answer(wire)[0], status)

    def test_a_body_is_asked_for_only_when_it_is_wanted(self):
        server = Server(self)
        expect = "Expect: 100-Continue"
        for status, sent in ((415, request("POST", "/liveEvent", expect, "Content-Length: 5", media="text/plain")),
                             (413, request("POST", "/liveEvent", expect, f"Content-Length: {2**20 + 1}")),
                             (404, request("POST", "/x", expect, "Content-Length: 5")),
                             (400, request("POST", "/liveEvent", expect, "Content-Length: 0")),
                             (400, request("POST", "/liveEvent", expect, "Content-Length: 5", "Sequence: 1"))):
            with server.connect() as wire:
                wire.sendall(sent)
                self.assertTrue(wire.recv(65536).startswith(b"HTTP/1.1 %d " % status))
        with server.connect() as wire:
            wire.sendall(request("POST", "/liveEvent", expect, f"Content-Length: {len(EVENT)}"))
            self.assertEqual(wire.recv(65536), b"HTTP/1.1 100 Continue\r\n\r\n")
            wire.sendall(EVENT)
            self.assertEqual(read_answer(wire)[0], 200)
        for unasked in (request(body=EVENT), request("POST", "/liveEvent", expect, body=EVENT, version="1.0")):
            with server.connect() as wire:
                wire.sendall(unasked)
                self.assertTrue(wire.recv(65536).startswith(b"HTTP/1.1 200 "))

    def test_access_with_a_secret(self):
        for secret in ("secret", "Bearer s\u00e9cret"):
            server = Server(self, "--host", "0.0.0.0", EVENTS_AUTHORIZATION=secret, log="log" + secrets.token_hex(4))
            right = "Authorization: " + secret.encode().decode("latin-1")
            for fields in ([], ["Authorization: "], ["Authorization: Secret"], ["Authorization: secrets"], [right + "x"]):
                for method, path in (("POST", "/liveEvent"), ("GET", "/userEvents/user1"), ("OPTIONS", "/liveEvent"), ("GET", "/x")):
                    headers, _ = self.assertStatus(server, 401, request(method, path, *fields, body=EVENT, host="example.com"))
                    self.assertTrue(headers["WWW-Authenticate"])
            self.assertEqual(server.log.read_bytes(), b"")
            self.assertStatus(server, 200, request("GET", "/health", host="example.com"))
            self.assertStatus(server, 404, request("GET", "/userEvents/user1", right, host="example.com"))
            self.assertStatus(server, 200, request("POST", "/liveEvent", right, body=EVENT, host="example.com"))

    def test_without_a_secret_the_server_listens_on_loopback_alone(self):
        for secret in (None, ""):
            for host in ("0.0.0.0", "::", ""):
                _, errors = self.run_script("server.py", "--host", host, "--port", 0, status=1,
                                            **({} if secret is None else {"EVENTS_AUTHORIZATION": secret}))
                self.assertIn("EVENTS_AUTHORIZATION", errors)
                self.assertEqual(errors.count("\n"), 1)
        self.assertEqual(Server(self, EVENTS_AUTHORIZATION="").post(EVENT)[0], 200)

    def test_a_port_in_use_and_an_unwritable_log_are_said_in_a_line(self):
        server = Server(self)
        for arguments, words in ((["--port", server.port], "Address already in use"),
                                 (["--port", 0, "--log", self.directory / "none" / "log"], "No such file or directory"),
                                 (["--port", 0, "--log", self.directory], "Is a directory")):
            _, errors = self.run_script("server.py", *arguments, status=1)
            self.assertIn(words, errors)
            self.assertEqual(errors.count("\n"), 1)
        self.run_script("server.py", "--workers", 0, status=2)

    def test_a_request_as_node_streams_it(self):
        server = Server(self, EVENTS_AUTHORIZATION="secret")
        self.assertStatus(server, 200, b"POST /liveEvent HTTP/1.1\r\nContent-Type: application/json\r\nAuthorization: secret\r\n"
                          b"Host: localhost:8000\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n",
                          b"%x\r\n" % len(EVENT), EVENT, b"\r\n", b"0\r\n\r\n")
        self.assertEqual(len(names_in(server.log)), 1)

    def test_a_thousand_connections_at_once_are_served(self):
        wires = []
        with contextlib.ExitStack() as stack:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # as macOS begins
            server = Server(self, "--workers", "2")
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
            for worker in server.workers():
                os.kill(worker, signal.SIGSTOP)
            for number in range(1000):
                if number == 100:  # these wait in the backlog
                    for worker in server.workers():
                        os.kill(worker, signal.SIGCONT)
                wires.append(stack.enter_context(server.connect()))
            for wire in wires:
                wire.sendall(request(body=EVENT))
            self.assertEqual({read_answer(wire)[0] for wire in wires}, {200})
        self.assertEqual(len(set(names_in(server.log))), 1000)

    def test_whatever_a_peer_does_or_not_its_connection_ends(self):
        health, large = request("GET", "/health"), request("POST", "/liveEvent", f"Content-Length: {2**30}")
        log = unittest.mock.Mock(failed=None, append=lambda lines, done: threading.Timer(0.1, done, [None]).start())
        errors = io.StringIO()
        for begins, goes_on, settings in (
                (request(body=EVENT), b"", {"REQUEST_SECONDS": 0.2, "DRAIN_SECONDS": 0.2}),  # idle
                (health, b"", {"REQUEST_SECONDS": 0.2, "DRAIN_SECONDS": 0.2}),
                (health, 1000 * health, {"REQUEST_SECONDS": 0.2, "DRAIN_SECONDS": 0.2}),  # reads no answer
                (large, b"x" * 10_000, {"DRAIN_BYTES": 2**30, "DRAIN_SECONDS": 0.2}),  # has not heard of the refusal
                (large, b"x" * 10_000, {"DRAIN_BYTES": 10**6, "DRAIN_SECONDS": 30})):
            with contextlib.redirect_stderr(errors), serving(log, **settings) as worker, socket.socket() as wire:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                wire.connect(worker.server_address)
                wire.sendall(begins)
                wait_until(lambda: worker.deadlines, "the connection is accepted")
                wire.setblocking(False)

                def ended():
                    with contextlib.suppress(OSError):
                        wire.send(goes_on)
                    return not worker.deadlines
                wait_until(ended, f"the connection is given up, with {settings}")
        self.assertEqual(errors.getvalue(), "")

    def test_a_slow_disk_is_waited_for(self):
        pending = []
        log = unittest.mock.Mock(failed=None, append=lambda lines, done: pending.append(done))
        with serving(log, REQUEST_SECONDS=0.1, DRAIN_SECONDS=0.1) as worker:
            with socket.create_connection(worker.server_address, timeout=20) as waiting:
                waiting.sendall(request(body=EVENT))
                wait_until(lambda: pending, "the event waits for the disk")
                for _ in range(3):
                    with socket.create_connection(worker.server_address, timeout=20) as idle:
                        self.assertEqual(idle.recv(1), b"")
                pending[0](None)
                self.assertEqual(read_answer(waiting)[0], 200)

    def test_what_is_wrong_with_the_server_has_its_status(self):
        log = unittest.mock.Mock(failed=None)
        for error, status in ((None, 200), (OSError(errno.ENOSPC, ""), 507), (OSError(errno.EDQUOT, ""), 507),
                              (OSError(errno.EFBIG, ""), 507), (OSError(errno.EIO, ""), 503), (MemoryError(), 503),
                              (server_module.SyncFailed(errno.ENOSPC, ""), 503)):
            log.append = lambda lines, done: done(error)
            with serving(log, DRAIN_SECONDS=2) as worker, socket.create_connection(worker.server_address, timeout=20) as wire:
                wire.sendall(request(body=EVENT))
                self.assertEqual(read_answer(wire)[0], status, error)
        with serving(log, DRAIN_SECONDS=2) as worker, socket.create_connection(worker.server_address, timeout=20) as wire:
            worker.database.revenue = unittest.mock.Mock(side_effect=ZeroDivisionError)
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                wire.sendall(request("GET", "/userEvents/user1"))
                self.assertEqual(read_answer(wire)[0], 500)
            self.assertIn("ZeroDivisionError", errors.getvalue())

    def test_a_worker_takes_no_more_connections_than_it_may_hold(self):
        with server_module.listen("127.0.0.1", 0) as listener, contextlib.ExitStack() as stack:
            worker = server_module.Worker(listener, None, None)
            for _ in range(2):
                stack.enter_context(socket.create_connection(listener.getsockname()))
            with unittest.mock.patch.object(server_module, "MAX_CONNECTIONS", 1):
                first, _ = worker.get_request()
                self.assertRaises(BlockingIOError, worker.get_request)
                worker.shutdown_request(first)
                worker.shutdown_request(worker.get_request()[0])

    def test_a_peer_that_vanishes_at_any_stage_leaves_no_trace(self):
        server = Server(self)
        whole = chunked(EVENT)
        for end in range(0, len(whole), 3):
            for linger in (b"\0" * 8, b"\1\0\0\0\0\0\0\0"):  # a plain close, and a reset
                with server.connect() as wire:
                    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    wire.sendall(whole[:end])
        with server.connect() as wire:
            wire.sendall(whole[:-1])
            wire.shutdown(socket.SHUT_WR)
            self.assertEqual(wire.recv(1), b"")
        with server.connect() as wire:  # what came of this batch is a batch, too
            wire.sendall(request("POST", "/liveEvent", f"Content-Length: {3 * len(EVENT)}", media="application/x-ndjson") + EVENT + b"\n")
            wire.shutdown(socket.SHUT_WR)
            self.assertEqual(wire.recv(1), b"")
        self.assertEqual(server.log.read_bytes(), b"")
        self.assertStatus(server, 200, whole)

    def test_a_slow_request_and_an_idle_connection_are_cut_off(self):
        script = ["-c", "import sys, server; server.REQUEST_SECONDS = 1; server.DRAIN_SECONDS = 1; "
                        "sys.path[0] = ''; sys.exit(server.main())"]
        with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):
            server = Server(self, script=script)
        with server.connect() as idle, server.connect() as slow, server.connect() as deaf:
            deaf.sendall(request("POST", "/liveEvent", f"Content-Length: {2**20 + 1}"))
            for byte in request(body=EVENT)[:-1]:
                slow.sendall(bytes([byte]))
                if select.select([slow], [], [], 0.05)[0]:
                    break
            self.assertEqual(read_answer(slow)[0], 408)
            self.assertEqual(idle.recv(1), b"")
            read_answer(deaf)
            self.assertEqual(deaf.recv(1), b"")

    def test_no_two_logs_begin_alike(self):
        for name in ("one", "two"):
            self.assertEqual(Server(self, log=name).post(EVENT, Producer_Id="p", Sequence=1)[0], 200)
        self.assertNotEqual(self.path("one").read_bytes(), self.path("two").read_bytes())

    def test_batches(self):
        server = Server(self)
        lines = [EVENT, b"", b"{", EVENT + b"\r", b" \t\r", EVENT.replace(b"1}", b"NaN}")]
        for producer in ({}, {"Producer_Id": "p", "Sequence": 2**53 - 6}):
            status, answer = server.post(b"\n".join(lines), "application/x-ndjson", **producer)
            self.assertEqual((status, answer["message"], answer["accepted"]), (200, "Events received", 2))
            self.assertEqual([entry["line"] for entry in answer["rejected"]], [3, 6])
        self.assertEqual([sequence for _, sequence in names_in(server.log)][2:], [2**53 - 6, 2**53 - 3])
        self.assertEqual(server.post(EVENT + b"\n" + EVENT, "application/x-ndjson", Producer_Id="p", Sequence=2**53 - 1)[0], 400)
        self.assertEqual(server.post(b"", "application/x-ndjson")[1]["accepted"], 0)
        self.assertEqual(server.post((EVENT + b"\n") * 10_000, "application/x-ndjson")[1]["accepted"], 10_000)
        for _ in range(10):  # whichever worker takes it
            server.post(b"\n".join(lines), "application/x-ndjson")
            server.post(EVENT)
        names = names_in(server.log)[2:]
        self.assertEqual(len(set(names)), len(names))

    def test_the_log_holds_the_text_as_received_with_the_stamp_behind_it(self):
        server = Server(self)
        text = '{"userId":"\u2028\u0085\\u00e9",\r\n "extra": [1.50, {}],"name" :"add_revenue","value":1.50}'.encode()
        server.post(b"\n" + text + b" \r\n", Producer_Id="p", Sequence=7)
        server.post(EVENT)
        first, second = server.log.read_bytes().split(b"\n")[:-1]
        self.assertRegex(first, re.escape(b" " + text.replace(b"\r\n", b"  ")[:-1])
                         + rb', "log": "[0-9a-f]{32}", "producerId": "p", "sequence": 7}')
        self.assertRegex(second, re.escape(EVENT[:-1]) + rb', "producerId": "[A-Za-z0-9_-]{22}", "sequence": 1}')


def nested(depth):
    """Return an event that is nested so many levels deep."""
    return EVENT[:-1] + b', "x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def valued(value):
    """Return an event with a value as it is written."""
    return b'{"userId": "user1", "name": "add_revenue", "value": %b}' % value.encode()


def users(user):
    """Return an event with a userId as it is written."""
    return b'{"userId": %b, "name": "add_revenue", "value": 1}' % (user if isinstance(user, bytes) else user.encode())


def padded(size):
    """Return an event of so many bytes."""
    return EVENT[:-1] + b', "pad": "' + b"x" * (size - len(EVENT) - 11) + b'"}'


EXTRA = EVENT[:-1] + b', "x": %b}'
VALID_EVENTS = [
    EVENT, b" \t" + EVENT + b" \t", EVENT.replace(b" ", b""), padded(65536), EVENT + b" " * (65536 - len(EVENT)), nested(100),
    *map(valued, ["0", "-0", "0.0", "-0.00", "1e17", "1E+17", "-999999999999999999", "999999999999999999", "0E17",
                  "999999999999999999." + "9" * 18, "0." + "0" * 17 + "1", "1e-18", "0e-18", "0." + "0" * 18, "1.5e3"]),
    *map(users, ['"x"', '"' + "x" * 255 + '"', '"' + "\U0001f600" * 255 + '"', '"\\ud83d\\ude00"', '"\\u00e9"', '"\u00e9"',
                 '"\u2028\u0085\x7f"', '"{}[],:\\"\\\\"', '"\ufeff"', '"\\n"', '" "']),
    EXTRA % b"NULL".lower(), EXTRA % b'"\\ud800"', EXTRA % b"1e400", EXTRA % b"[1, {\"a\": null}]", EXTRA % b'"[[[{{{"',
    EVENT[:-1] + b', "name": "subtract_revenue", "value": 3}', b'{"userId": 5, ' + EVENT[1:], EVENT[:-1] + b', "Sequence": 1}',
    b'{"value": {"value": [1]}, ' + EVENT[1:], EVENT.replace(b"value", b"val\\u0075e"), EXTRA % (b"9" * 4000)]
INVALID_EVENTS = [
    b"nonsense", b"{", b"[]", b"1", b"null", b'"x"', b"{}", EVENT + b",", EVENT + EVENT, b"[" + EVENT + b"]", EVENT[:-1], EVENT[1:],
    EVENT[:-1] + b",}", b"\xef\xbb\xbf" + EVENT, EVENT.decode().encode("utf-16"), EVENT.decode().encode("utf-16-le"),
    b"\0" + EVENT, EVENT + b"\0", EVENT.replace(b"user1", b"us\xffer"), EVENT.replace(b"user1", b"\xed\xa0\x80"),
    EVENT.replace(b"user1", b"us\rer"), EVENT.replace(b"user1", b"us\ter"), EVENT.replace(b'"', b"'"), b"\xc2\x85" + EVENT,
    EVENT.replace(b" ", b"\xc2\xa0"), padded(65537), EVENT + b" " * (65537 - len(EVENT)), nested(101), nested(900), nested(100_000),
    EVENT[:-1] + b', "x": ' + b"[" * 20_000 + b"}", EVENT[:-1] + b', "x": ' + b"[" * 101 + b'"' + b'\\"' * 32_000, EVENT[:-1] + b', "x": ' + b"[" * 990 + b"]" * 990 + b', "x": 1}',
    *map(valued, ["1000000000000000000", "-1000000000000000000", "1e18", "0e18", "1e-19", "0e-19", "0." + "0" * 19,
                  "0." + "0" * 18 + "1", "true", "null", '"1"', "[1]", "{}", "NaN", "Infinity", "-Infinity", "01", "+1", "1.", ".5",
                  "1e", "0x1", "1_0", "\u0661", "9" * 5000, "1." + "0" * 5000, "1e9999999999999999999", "0E-20000", "1E+500000",
                  "-1e9999999999999999999"]),
    *map(users, ['""', '"' + "x" * 256 + '"', '"' + "\u00e9" * 256 + '"', '"\\u0000"', '"\\ud800"', '"a\\udc00"', "1", "null", "[]",
                 "true", '"\\x41"', '"a']),
    EXTRA % b"NaN", EXTRA % b"Infinity", EXTRA % (b"9" * 5000), EXTRA % b"1e9999999999999999999", EXTRA % b"1 2",
    EVENT.replace(b"add_revenue", b"add"), EVENT.replace(b'"add_revenue"', b"[]"), EVENT.replace(b'"add_revenue"', b"null"),
    EVENT.replace(b"add_revenue", b"Add_revenue"), EVENT[:-1] + b', "value": "1"}', EVENT.replace(b"userId", b"userid"),
    EVENT[:-1] + b', "sequence": 1}', EVENT[:-1] + b', "producer\\u0049d": "p"}', EVENT[:-1] + b', "producerId": null}']
RESERVED = [EVENT[:-1] + b', "producerId": "p", "sequence": 1}', EVENT[:-1] + b', "log": 1}']  # a log may hold these


class Events(SystemTest):
    """What an event is: the server and the processor agree."""

    def test_server_and_processor_agree_on_every_event(self):
        server = Server(self)
        for events, status in ((VALID_EVENTS, 200), (INVALID_EVENTS + RESERVED, 400)):
            for event in events:
                self.assertEqual(server.post(event)[0], status, event[:200])
        logged = self.processor()[0]
        self.assertIn(f"{len(VALID_EVENTS)} applied, 0 repeated, 0 rejected", logged)
        expected = query("SELECT user_id, revenue FROM users_revenue ORDER BY user_id")
        query("TRUNCATE users_revenue, event_producers, event_logs")

        mixed = VALID_EVENTS + INVALID_EVENTS
        random.Random(1).shuffle(mixed)
        wrong = [number for number, event in enumerate(mixed) if event in INVALID_EVENTS]
        accepted, rejected = 0, []
        for first in range(0, len(mixed), 8):
            _, answer = server.post(b"\n".join(mixed[first:first + 8]), "application/x-ndjson")
            accepted += answer["accepted"]
            rejected += [first + entry["line"] - 1 for entry in answer["rejected"]]
        self.assertEqual((accepted, rejected), (len(VALID_EVENTS), wrong))

        log = self.path("plain", b"\n".join(mixed) + b"\n")
        output, errors = self.processor(log, status=1)
        self.assertIn(f"{len(VALID_EVENTS)} applied, 0 repeated, {len(wrong)} rejected", output)
        starts = [sum(len(event) + 1 for event in mixed[:number]) for number in wrong]
        self.assertEqual([int(line.split(": ")[1].removeprefix("byte ")) for line in errors.splitlines()], starts)
        self.assertEqual(query("SELECT user_id, revenue FROM users_revenue ORDER BY user_id"), expected)

    def test_a_name_in_a_log_is_a_producer_and_a_sequence(self):
        stamp = EVENT[:-1] + b', "producerId": %b, "sequence": %b}\n'
        valid = [stamp % name for name in ((b'"p"', b"1"), (b'"p"', b"9007199254740991"), (b'"' + b"p" * 64 + b'"', b"1"))]
        invalid = [stamp % name for name in ((b'"p"', b"0"), (b'"p"', b"9007199254740992"), (b'"p"', b"-1"), (b'"p"', b"1.0"),
                                             (b'"p"', b'"1"'), (b'"p"', b"true"), (b'"p"', b"null"), (b"null", b"1"), (b'""', b"1"),
                                             (b'"' + b"p" * 65 + b'"', b"1"), (b'"p.p"', b"1"), (b'"\\u0000"', b"1"), (b"[]", b"1"))]
        invalid += [EVENT[:-1] + b', "sequence": 3}\n', EVENT[:-1] + b', "producerId": "p"}\n']
        invalid.insert(0, EVENT[:-1] + b', "producerId": ""}\n')
        for sequence in (b"2", b"2.0", b"9007199254740991", b"9007199254740992"):  # what would continue a run
            (valid if sequence in (b"2", b"9007199254740991") else invalid).append(stamp % (b'"q"', sequence))
        output, _ = self.processor(self.path("log", b"".join(invalid + valid)), status=1)
        self.assertIn(f"{len(valid)} applied, 0 repeated, {len(invalid)} rejected", output)

    def test_no_line_is_decoded_otherwise_for_its_neighbours(self):
        split = [b'{"a":1},{"b":2\n"c":3}', b'{"a":"x}\n{","b":1}', b'{"a":1\n"b":2}', b'{"a":"x}\n{","b":1}\n{"a":1},{"b":2}',
                 b'5,{"a":"x}\n{","b":1}', b'{"a":"x}\n{","b":1},5']
        for event in VALID_EVENTS + INVALID_EVENTS + RESERVED + split:
            for block in (event, EVENT + b"\n" + event, event + b"\n" + EVENT):
                lines = [data_processor._decode_or_error(line) for line in block.split(b"\n")]
                self.assertEqual(repr(data_processor.decode_lines(block + b"\n")), repr(lines), block[:200])

    def test_what_would_continue_a_run_is_a_name_all_the_same(self):
        lines = [named("q", sequence) for sequence in (2, "3.0", 2**53 - 1, 2**53)]
        self.assertIn("2 applied, 0 repeated, 2 rejected", self.processor(self.path("log", "".join(lines)), status=1)[0])
        self.processor(self.path("alternating", "".join(map(named, "rssr", (1, 2, 3, 4)))))
        nameless = EVENT.decode() + "\n"
        mixed = self.path("mixed", nameless + named("t", 1) + nameless + nameless + named("t", 1) + nameless)
        self.assertIn("5 applied, 1 repeated, 0 rejected", self.processor(mixed)[0])
        self.assertEqual(query("SELECT applied::text FROM event_producers WHERE producer_id IN ('r', 's') ORDER BY producer_id"),
                         [("{[1,2),[4,5)}",), ("{[2,4)}",)])

    def test_decoding_a_block_at_once_is_decoding_it_line_by_line(self):
        chance = random.Random(TORTURE_SEED)
        self.addCleanup(print, f"[seed {TORTURE_SEED}]", end=" ", file=sys.stderr)
        pieces = [b"{", b"}", b'"', b"\\", b",", b":", b"[", b"]", b"{}", b'"a"', b'"a":1', b'{"a":1}', b"}\n{", b"\n", b" ", b"\r",
                  b"1", b"5,", b'{"a":"}', b'{":1}', b'"},{"', b"\xc3\xa9", b"\xff", b"x" * 33_000]
        flat = 0
        for _ in range(20_000):
            lines = [chance.choice([b'{"a":1}', EVENT, b'{"b":"x"}', b'{"c":2,"c":3}']) for _ in range(chance.randrange(1, 5))]
            block = bytearray(b"\n".join(lines) + b"\n")
            for _ in range(chance.choice([0, 1, 1, 2, 3])):
                at = chance.randrange(len(block))
                block[at:at + chance.choice([0, 0, 1, 2])] = chance.choice(pieces)
            block = bytes(block).removesuffix(b"\n") + b"\n"
            one_by_one = [data_processor._decode_or_error(line) for line in block[:-1].split(b"\n")]
            with unittest.mock.patch.object(data_processor, "_decode_or_error", side_effect=AssertionError("line by line")):
                try:
                    at_once = data_processor.decode_lines(block)
                except AssertionError:
                    continue
            flat += 1
            self.assertEqual(at_once, one_by_one, block)
        self.assertGreater(flat, 3000)


def append(log, line):
    """Append a line to a server's log, or raise what kept it from being durable."""
    outcome = []
    log.append(line, outcome.append)
    if outcome != [None]:
        raise outcome[0]


def run_in_child(action):
    """Run action in a forked process and return its wait status: a kill there is a kill."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            action()
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class FaultySystem:
    """The os or fcntl module with one call, counted over all of them, that goes wrong in a chosen way."""

    CALLS = ("open", "fstat", "stat", "pread", "write", "ftruncate", "fdatasync", "fsync", "flock", "close")
    FAULTS = ("EIO", "ENOSPC", "EIO for good", "short", "short, then ENOSPC", "killed before", "killed after")

    def __init__(self, module, state, log):
        self._module, self._state, self._log = module, state, log

    def __getattr__(self, name):
        real = getattr(self._module, name)
        return (lambda *arguments, **options: self._call(name, real, *arguments, **options)) if name in self.CALLS else real

    def _call(self, name, real, *arguments, **options):
        state = self._state
        state["count"] += 1
        if name == "flock":
            state["locked"] = arguments[1] == fcntl.LOCK_EX
        elif name in ("write", "ftruncate") and not state.get("locked"):
            raise AssertionError(f"{name} without the lock")
        fault = state["fault"]
        due = state["count"] == state["at"] or state["count"] > state["at"] and fault == "EIO for good"
        if state["short"] and name == "write":
            state["short"] = False
            raise OSError(errno.ENOSPC, "no space")
        if due:
            state["fired"] = name
            if fault == "killed before":
                os._exit(9)
            if fault.startswith("short") and name == "write":
                state["short"] = fault != "short"
                return real(arguments[0], bytes(arguments[1])[:len(arguments[1]) // 2])
            if fault.startswith("short"):
                state["fired"] = None  # nothing here that could be short
            elif fault != "killed after":
                raise OSError(errno.ENOSPC if fault == "ENOSPC" else errno.EIO, fault)
        result = real(*arguments, **options)
        if name == "fdatasync":
            state["synced"] = self._log.read_bytes()
        if name in ("open", "fsync") and arguments[1:] != (os.O_RDONLY,):
            state["named"] = name == "fsync"  # the directory is synced after the log was opened
        if due and fault == "killed after":
            os._exit(9)
        return result


class Faults(SystemTest):
    """Every step fails once."""

    def append_with_fault(self, log_path, fault, at):
        """Append three events in a child, one system call of which goes wrong; return (exit status, what happened)."""
        report = self.path("report", b"")

        def child():
            state = {"count": 0, "at": at, "fault": fault, "fired": None, "short": False, "synced": b"", "named": False}
            with (unittest.mock.patch.object(server_module, "os", FaultySystem(os, state, log_path)),
                  unittest.mock.patch.object(server_module, "fcntl", FaultySystem(fcntl, state, log_path)),
                  silence(), open(report, "ab", buffering=0) as out):
                try:
                    log = server_module.Log(str(log_path))
                except OSError:
                    log = None
                for sequence in range(1, 4) if log else ():
                    if sequence == 3:  # a rotation in between
                        log_path.rename(self.path("rotated"))
                    line = named("p", sequence).encode()
                    try:
                        append(log, line)
                    except OSError:
                        continue
                    # "log" may have been put into the line
                    if line[-20:] not in state["synced"] or not state["named"]:
                        out.write(b"acknowledged before the sync\n")
                    out.write(b"acknowledged %d\n" % sequence)
                out.write(b"fired %s\n" % str(state["fired"]).encode())
        status = run_in_child(child)
        return status, report.read_text()

    def test_every_step_of_an_append(self):
        fired = collections.Counter()
        for fault in FaultySystem.FAULTS:
            for at in range(1, 200):
                for name in ("log", "rotated"):
                    self.path(name).unlink(missing_ok=True)
                whole = named("earlier", 1).encode()
                log = self.path("log", whole + b'{"torn')
                status, report = self.append_with_fault(log, fault, at)
                self.assertIn(status, (0, 9))
                self.assertNotIn("before the sync", report)
                server_module_log = server_module.Log(str(log))  # the restart
                with silence():
                    append(server_module_log, named("later", 1).encode())
                os.close(server_module_log._fd)
                logs = [path for path in (self.path("rotated"), log) if path.exists()]
                names = names_in(*logs)  # fails on a glued line
                self.assertEqual(len(names), len(set(names)))
                acknowledged = {("p", int(n)) for n in re.findall(r"acknowledged (\d)", report)}
                self.assertLessEqual(acknowledged | {("earlier", 1), ("later", 1)}, set(names), (fault, at, report))
                self.assertLessEqual(set(names), {("earlier", 1), ("later", 1), ("p", 1), ("p", 2), ("p", 3)})
                if status == 0 and "fired None" in report:
                    if fault.startswith("short"):
                        if at < 60:
                            continue
                    self.assertEqual(len(acknowledged), 3)
                    break
                fired[fault] += 1
            else:
                self.fail("the run never completed untouched")
        self.assertGreater(min(fired[fault] for fault in FaultySystem.FAULTS if not fault.startswith("short")), 20)
        self.assertGreaterEqual(min(fired.values()), 3)

    def test_an_event_that_comes_at_any_step_of_another_is_logged_and_answered(self):
        first, second = named("p", 1).encode(), named("p", 2).encode()

        class Interrupted(FaultySystem):
            def _call(self, name, real, *arguments, **options):
                self._state["count"] += 1
                if self._state["count"] == at:
                    others.append(threading.Thread(target=log.append, args=[second, outcomes.append]))
                    others[0].start()
                    wait_until(lambda: second in [lines for lines, _ in log._group], "the other has joined a group")
                return real(*arguments, **options)
        for at in itertools.count(1):
            path, state, outcomes, others = self.path(f"log{at}"), {"count": 0}, [], []
            log = server_module.Log(str(path))
            with unittest.mock.patch.multiple(server_module, os=Interrupted(os, state, path), fcntl=Interrupted(fcntl, state, path)):
                log.append(first, outcomes.append)
                for other in others:
                    other.join(20)
            os.close(log._fd)
            if not others:
                break
            self.assertEqual((outcomes, names_in(path)), ([None, None], [("p", 1), ("p", 2)]), at)
        self.assertGreater(at, 5)

    def test_whoever_comes_during_a_sync_shares_the_next_one(self):
        log, goes_on, syncs, done = server_module.Log(str(self.path("log"))), threading.Event(), [], []
        threads = [threading.Thread(target=log.append, args=[named("p", n).encode(), done.append]) for n in range(10)]
        with unittest.mock.patch.object(server_module, "sync_file", lambda fd: syncs.append(fd) or goes_on.wait(20)):
            threads[0].start()
            wait_until(lambda: syncs, "the first is syncing")
            for thread in threads[1:]:
                thread.start()
            wait_until(lambda: sum(thread.is_alive() for thread in threads) == 2, "one of the others stays to sync for all")
            goes_on.set()
            for thread in threads:
                thread.join()
        os.close(log._fd)
        self.assertEqual((len(syncs), done), (2, [None] * 10))

    def test_a_failed_sync_of_the_directory_is_final_too(self):
        path = self.path("log")
        log = server_module.Log(str(path))
        path.rename(self.path("rotated"))
        with unittest.mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "Input/output error")):
            self.assertRaises(server_module.SyncFailed, append, log, named("p", 1).encode())
        self.assertRaises(server_module.SyncFailed, append, log, named("p", 1).encode())
        os.close(log._fd)

    def test_an_answer_that_is_not_read_yet_is_sent_by_a_thread_of_its_own(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(20)
            handler = server_module.Handler.__new__(server_module.Handler)
            handler.connection, handler.answered = ours, threading.Event()
            handler.send_without_waiting(b"x" * 10**7)
            self.assertFalse(handler.answered.is_set())
            with theirs.makefile("rb") as answer:
                self.assertEqual(len(answer.read(10**7)), 10**7)
            self.assertTrue(handler.answered.wait(20))

    def test_every_step_of_a_chunk(self):
        """Raise at each statement, at COMMIT, and just after it; break the connection, or end the run."""
        logs = [self.path("one", "".join(named("p", n, f"user{n % 3}") for n in (1, 2, 3, 2, 8)) + f"bad\n{EVENT.decode()}\n"),
                self.path("two", "".join(named("p", n, f"user{n % 3}") for n in (3, 4, 8)) + named("q", 1))]
        expected = {"user0": 1, "user1": 4, "user2": 2}

        class Faulty(psycopg2.extensions.connection):
            steps = fail_at = 0
            broken = None

            def step(self):
                Faulty.steps += 1
                if Faulty.steps == Faulty.fail_at:
                    if Faulty.broken is psycopg2.OperationalError:
                        self.close()
                    raise Faulty.broken("injected")

            def cursor(self, *arguments, **options):
                return super().cursor(*arguments, cursor_factory=Cursor, **options)

            def __exit__(self, kind, error, trace):
                if kind is None:
                    try:
                        self.step()  # at COMMIT
                    except BaseException:
                        if not self.closed:
                            self.rollback()
                        raise
                super().__exit__(kind, error, trace)
                if kind is None:
                    self.step()  # COMMIT was done, and nobody knows

        class Cursor(psycopg2.extensions.cursor):
            def execute(self, *arguments):
                self.connection.step()
                super().execute(*arguments)
                self.connection.step()

        def run():
            processor = data_processor.Processor()
            try:
                processor.run_once(list(map(str, logs)))
                return True
            except (data_processor.Failure, SystemExit):
                return False
            finally:
                for log in processor.logs.values():
                    log.file.close()
                if processor.connection:
                    processor.connection.close()

        connect, sleep = data_processor.connect, unittest.mock.patch.object(data_processor.time, "sleep")
        patched = unittest.mock.patch.object(data_processor, "connect", lambda **options: connect(**options,
                                                                                                  connection_factory=Faulty))
        with sleep, patched, silence():
            for Faulty.broken in (psycopg2.OperationalError, psycopg2.errors.DeadlockDetected, SystemExit):
                survived = 0
                for Faulty.fail_at in range(1, 1000):
                    query("TRUNCATE users_revenue, event_producers, event_logs")
                    Faulty.steps = 0
                    errors = io.StringIO()
                    with contextlib.redirect_stderr(errors):
                        complete = run()
                    survived += complete
                    if Faulty.steps < Faulty.fail_at:
                        break
                    Faulty.fail_at = 0
                    with contextlib.redirect_stderr(errors):
                        self.assertTrue(run())
                    self.assertRevenue(expected)
                    self.assertIn("not JSON", errors.getvalue(), "a bad line is reported at least once")
                self.assertGreater(Faulty.fail_at, 40)
                self.assertRevenue(expected)
                self.assertEqual(survived > 20, Faulty.broken is not SystemExit)

    TAILS = [b"\0" * 10, b"\0" * 10 + b"\n", b"\n", b"\n\n\n", b"\xe2\x82", b"\xe2\x82\n", b'{"userId": "user1", "na', EVENT,
             named("p", 9).encode()[:-1], b"}" * 5 + b"\n", b"\r", b"\r\n", b" ", b'"\n', b"x" * 300_000, b"x" * 300_000 + b"\n",
             b"{" * 1000, b"\xff\xfe\n", named("p", 9).encode()[:-1] * 2]

    def test_every_byte_of_a_tail_and_garbage_in_a_dozen_shapes(self):
        lines = [named("p", n, f"user{n}").encode() for n in range(1, 6)]
        content = b"".join(lines)
        shapes = [content[:end] for end in range(len(b"".join(lines[:2])), len(content) + 1)]
        shapes += [content + tail for tail in self.TAILS]
        self.assertGreater(len(shapes), 250)
        processor = data_processor.Processor()
        with silence():
            for shape in shapes:
                query("TRUNCATE users_revenue, event_producers, event_logs")
                whole = [line for line in lines if shape.startswith(content[:content.index(line)] + line)]
                path = self.path("log", shape)
                expected = {f"user{n}": 1 for n in range(1, len(whole) + 1)}
                for log in processor.logs.values():
                    log.file.close()
                processor.logs.clear()
                processor.run_once([str(path)])
                self.assertRevenue(expected)
                log = server_module.Log(str(path))
                append(log, named("new", 1, "new").encode())
                os.close(log._fd)
                self.assertEqual(path.read_bytes(), shape[:shape.rindex(b"\n") + 1] + named("new", 1, "new").encode())
                processor.run_once([str(path)])
                self.assertRevenue(expected | {"new": 1})
        for log in processor.logs.values():
            log.file.close()
        processor.connection.close()

    def test_no_line_is_taken_while_a_server_may_take_it_back(self):
        log = self.path("log", named("p", 1))
        with open(log, "ab") as server:
            fcntl.flock(server, fcntl.LOCK_EX)
            server.write(named("p", 2).encode())
            server.flush()
            processor = self.start("data_processor.py", log)
            with self.assertRaises(subprocess.TimeoutExpired):
                processor.wait(1)
            server.truncate(len(named("p", 1)))
        self.assertEqual(processor.wait(20), 0)
        self.assertRevenue({"user1": 1})

    def test_a_log_that_is_rotated_while_it_is_opened_anew_is_followed(self):
        path = self.path("log")
        log = server_module.Log(str(path))
        path.write_text("unfinish")  # by another worker, killed then
        path.rename(self.path("first"))
        reopen = log._open

        def open_and_rotate():
            fd = reopen()
            if not self.path("second").exists():
                path.rename(self.path("second"))
            return fd
        with unittest.mock.patch.object(log, "_open", open_and_rotate), silence():
            append(log, named("p", 1).encode())
        os.close(log._fd)
        self.assertEqual([self.path(name).stat().st_size for name in ("first", "second")], [0, 0])
        self.assertEqual(names_in(path), [("p", 1)])

    def test_what_a_power_cut_must_not_take_is_synced_in_order(self):
        steps = []

        def trace(name, real):
            return lambda *arguments: (steps.append(name), real(*arguments))[1]

        def fsync(fd):
            directory = stat.S_ISDIR(os.fstat(fd).st_mode)
            self.assertTrue(not directory or os.path.samestat(os.fstat(fd), os.stat(self.directory)))
            steps.append("sync directory" if directory else "sync file")
        elsewhere = tempfile.mkdtemp(dir=self.directory)
        os.symlink(self.path("log"), f"{elsewhere}/link")
        with unittest.mock.patch.object(os, "fsync", fsync):
            for path in (f"{elsewhere}/link", self.path("log")):
                os.close(server_module.Log(str(path))._fd)
        self.assertEqual(steps, 2 * ["sync directory"])
        steps.clear()
        answer = trace("request", lambda *_: (200, {}, b'{"accepted": 0, "rejected": [{"line": 1, "error": "wrong"}]}'))
        self.addCleanup(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        with (Recorder(options=[(204, {"Accept-Post": "application/x-ndjson"}, b"")], post=answer) as server, silence(),
              unittest.mock.patch.multiple(os, fsync=fsync, replace=trace("rename", os.replace), unlink=trace("unlink", os.unlink))):
            self.assertEqual(client_module.main([str(self.path("events.jsonl", EVENT)), "--url", server.url]), 1)
        publish = ["sync file", "rename", "sync directory"]
        self.assertEqual(steps, [*publish, "request", *publish, "unlink", "sync directory"])

    def test_a_full_disk_is_answered_with_507_and_service_returns_with_space(self):
        disk = self.path("disk")
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode == 0
        if mounted:
            self.addCleanup(subprocess.run, ["umount", "--lazy", disk])
        server = Server(self, log="disk/log")
        if not mounted:
            for worker in server.workers():
                resource.prlimit(worker, resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))
        acknowledged, statuses = set(), collections.Counter()
        batch = b"".join(valued("1")[:-1] + b', "pad": "' + b"x" * 1000 + b'"}\n' for _ in range(10))
        for sequence in range(1, 200, 10):
            status, _ = server.post(batch, "application/x-ndjson", Producer_Id="p", Sequence=sequence)
            statuses[status] += 1
            if status == 200:
                acknowledged |= {("p", n) for n in range(sequence, sequence + 10)}
        self.assertEqual(set(statuses), {200, 507})
        self.assertEqual(set(names_in(server.log)), acknowledged)
        self.assertEqual(server.ask("GET", "/health")[0], 200)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        else:
            for worker in server.workers():
                resource.prlimit(worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self.assertEqual(server.post(batch, "application/x-ndjson", Producer_Id="p", Sequence=1001)[0], 200)
        self.assertEqual(set(names_in(server.log)), acknowledged | {("p", n) for n in range(1001, 1011)})
        self.assertEqual(server.errors.read_text(), "")

    def test_every_answer_goes_out_in_order_however_slow_the_disk_and_when_the_server_stops(self):
        script = ["-c", "import sys, time, server; real = server.sync_file\n"
                        "server.sync_file = lambda fd: (time.sleep(0.5), real(fd)); server.STOP_SECONDS = 60; "
                        "sys.path[0] = ''; sys.exit(server.main())"]
        with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):
            server = Server(self, "--workers", "1", script=script)
        with contextlib.ExitStack() as stack:
            pipelined, closing = ([stack.enter_context(server.connect()) for _ in range(4)] for _ in range(2))
            for wire in pipelined:  # some lead their group, the others' answers are sent by its leader
                wire.sendall(request(body=EVENT) + request("GET", "/health"))
            for wire in closing:
                wire.sendall(request("POST", "/liveEvent", "Connection: close", body=EVENT))
            for wire in pipelined:
                answers = Answers(wire)
                self.assertIn(b"received", read_answer(answers)[2])
                self.assertIn(b"ok", read_answer(answers)[2])
            for wire in closing:
                self.assertEqual(read_answer(wire)[0], 200)
        with server.connect(), server.connect() as waiting:  # an idle connection holds nothing up
            size = server.log.stat().st_size
            waiting.sendall(request(body=EVENT))
            wait_until(lambda: server.log.stat().st_size > size, "the event is written, and being synced")
            worker, = server.workers()
            os.kill(worker, signal.SIGSTOP)
            with contextlib.ExitStack() as stack:
                late = [stack.enter_context(server.connect()) for _ in range(50)]  # accepted by the kernel alone
                for wire in late:
                    wire.sendall(request(body=EVENT))
                for number in (signal.SIGTERM, signal.SIGINT):  # a terminal or systemd tells everyone
                    os.kill(worker, number)
                server.process.terminate()
                os.kill(worker, signal.SIGCONT)
                self.assertEqual({read_answer(wire)[0] for wire in (waiting, *late)}, {200})
            self.assertEqual(server.process.wait(20), 0)

    def test_a_failed_sync_is_no_acknowledgement_and_ends_the_server(self):
        trigger = self.path("trigger")
        script = ["-c", "import errno, os, sys, time, server; real = server.sync_file\n"
                        "def sync(fd):\n"
                        f"    if os.path.exists({str(trigger)!r}) and not failed:\n"
                        "        failed.append(time.sleep(0.2))\n"
                        "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
                        "    real(fd)\n"
                        "failed = []; server.sync_file = sync; sys.path[0] = ''; sys.exit(server.main())"]
        with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):
            server = Server(self, script=script)
        self.assertEqual(server.post(EVENT)[0], 200)
        trigger.touch()
        wires = [server.connect() for _ in range(10)]
        answers = []
        for wire in wires:
            wire.sendall(request(body=EVENT))
        for wire in wires:
            with wire, contextlib.suppress(ConnectionError):  # the server ends: some are not accepted any more
                answers.append(read_answer(wire)[0])
        self.assertEqual(set(answers), {503})
        self.assertEqual(server.process.wait(10), 1)
        self.assertIn("Move the log aside", server.errors.read_text())

    def test_a_directory_that_cannot_be_synced_ends_the_server(self):
        script = ["-c", "import os, sys, server\n"
                        "def fail(fd):\n"
                        "    raise OSError(5, 'Input/output error')\n"
                        "os.fsync = fail; sys.path[0] = ''; sys.exit(server.main())"]
        with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):
            server = Server(self, script=script)
        self.assertEqual(server.process.wait(20), 1)
        self.assertIn("Cannot write the log", server.errors.read_text())


class Properties(SystemTest):
    """Random events, batches, repetitions, orders, logs and processors."""

    def test_totals_equal_the_oracle(self):
        seed = TORTURE_SEED
        self.addCleanup(print, f"[seed {seed}]", end=" ", file=sys.stderr)
        for seed in range(seed, seed + 6):
            chance = random.Random(seed)
            query("TRUNCATE users_revenue, event_producers, event_logs")
            totals, batches = collections.defaultdict(Decimal), []
            with decimal.localcontext(decimal.Context(prec=80)):
                for producer in range(chance.randrange(1, 6)):
                    sequence = 1
                    for _ in range(chance.randrange(1, 30)):
                        lines = []
                        for _ in range(chance.choice([1, 1, 2, 10, 100])):
                            value = chance.choice([str(chance.randrange(-1000, 1000)), f"{chance.randrange(10**6)}.{chance.randrange(100):02}",
                                                   f"{chance.randrange(10**18)}.{chance.randrange(10**18):018}", "1e3", "-2.5E-3"])
                            user = f"user{chance.randrange(chance.choice([1, 10, 1000]))}"
                            name = chance.choice(["add_revenue", "subtract_revenue"])
                            totals[user] += Decimal(value) * (1 if name == "add_revenue" else -1)
                            lines.append(f'{{"userId": "{user}", "name": "{name}", "value": {value}, '
                                         f'"producerId": "p{producer}", "sequence": {sequence}}}\n')
                            sequence += chance.choice([1, 1, 1, 1, 1, 7])
                        batches.append(lines)
            batches += [batch[chance.randrange(len(batch)):] for batch in chance.choices(batches, k=len(batches))]
            chance.shuffle(batches)
            logs = [self.path(f"log{seed}-{n}") for n in range(chance.randrange(1, 6))]
            for log in logs:
                log.write_text("")
            for batch in batches:
                with open(chance.choice(logs), "a") as log:
                    log.write("".join(chance.choice([lambda b: b, lambda b: chance.sample(b, len(b))])(batch)))
            with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):
                small = ["-c", f"import sys, data_processor as d; d.CHUNK_BYTES = {chance.choice([1, 5000, 10**6])}; "
                               f"d.BLOCK_BYTES = {chance.choice([200, 1000, 262144])}; sys.exit(d.main())"]
                processors = [subprocess.Popen([sys.executable, *small, *chance.sample(logs, chance.randrange(1, len(logs) + 1))],
                                               stdout=subprocess.DEVNULL) for _ in range(chance.randrange(1, 4))]
            self.assertEqual({processor.wait(60) for processor in processors}, {0}, f"seed {seed}")
            self.processor(*logs)
            self.assertRevenue(totals)

    def test_ranges_are_sets(self):
        chance = random.Random(TORTURE_SEED)
        for _ in range(300):
            ranges, members = data_processor.Ranges(), set()
            for _ in range(20):
                low = chance.randrange(60)
                high = low + chance.randrange(1, 12)
                missing = [n for a, b in ranges.missing(low, high) for n in range(a, b)]
                ranges.add(low, high)
                self.assertEqual(missing, sorted(set(range(low, high)) - members))
                members |= set(range(low, high))
                pairs = list(zip(ranges.bounds[::2], ranges.bounds[1::2]))
                self.assertEqual({n for a, b in pairs for n in range(a, b)}, members)
                self.assertTrue(all(b < c for (_, b), (c, _) in zip(pairs, pairs[1:])), "neighbours are merged")


class FaultyProxy:
    """A TCP proxy that passes each connection on to one of some ports, and often cuts it: before or within the request,
    before the answer, or after some bytes of it."""

    def __init__(self, ports, seed):
        self.ports, self._chance = ports, random.Random(seed)
        self.cuts = 0
        self.calm = False  # cut no more
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                wire, _ = self._listener.accept()
            except OSError:
                return
            cut = None if self.calm else self._chance.choice([None, None, None, "request", "answer", "answer", "answer later"])
            threading.Thread(target=self._pass, args=[wire, self._chance.choice(self.ports), cut, self._chance.randrange(1, 20_000)],
                             daemon=True).start()

    def _pass(self, wire, port, cut, budget):
        with contextlib.suppress(OSError), wire, socket.create_connection(("127.0.0.1", port), timeout=20) as server:
            limits = {wire: budget if cut == "request" else 10**9,
                      server: {"answer": 0, "answer later": budget % 150}.get(cut, 10**9)}
            while True:
                for source in select.select([wire, server], [], [], 20)[0] or [None]:
                    data = source and source.recv(65536)
                    if not data:
                        return
                    part = data[:limits[source]]
                    limits[source] -= len(data)
                    (server if source is wire else wire).sendall(part)
                    if limits[source] < 0:
                        self.cuts += 1
                        return

    def close(self):
        """Take no more connections."""
        self._listener.close()


class Audit(SystemTest):
    """data_processor.py --verify."""

    def test_books_that_agree_books_that_differ_and_that_nothing_is_changed(self):
        logs = [self.path("one", "".join(named("p", n, f"user{n % 3}", "0.10") for n in (1, 2, 3, 4)) + EVENT.decode() + "\n"),
                self.path("two", named("p", 4, "user1", "0.10") + named("p", 5, "user9", -7) + "nonsense\n")]
        _, errors = self.processor("--verify", *logs, status=1)
        self.assertEqual(query("SELECT * FROM event_logs"), [])
        self.processor(*logs, status=1)
        copy = shutil.copy(logs[0], self.path("copy"))
        before = query("SELECT * FROM event_logs, event_producers, users_revenue ORDER BY 1, 2, 3, 4, 5, 6, 7")
        self.path("copy").write_bytes(logs[0].read_bytes() + EVENT.replace(b"1}", b"0}") + b"\n")
        output, _ = self.processor("--verify", *logs, copy)
        self.assertEqual(output, "users_revenue and the logs agree on 4 users.\n")
        self.assertEqual(query("SELECT * FROM event_logs, event_producers, users_revenue ORDER BY 1, 2, 3, 4, 5, 6, 7"), before)
        query("UPDATE users_revenue SET revenue = revenue + 1e30 + 0.01 WHERE user_id = 'user2'")
        query("DELETE FROM users_revenue WHERE user_id = 'user9'")
        query("INSERT INTO users_revenue VALUES ('older', 5)")
        output, _ = self.processor("--verify", *logs, status=1)
        self.assertEqual(output.splitlines()[:3], ["older: 5 in users_revenue, 0 in the logs, difference 5",
                                                   f"user2: 1{0:030}.11 in users_revenue, 0.10 in the logs, difference 1{0:030}.01",
                                                   "user9: 0 in users_revenue, -7 in the logs, difference 7"])
        self.assertIn("3 users differ", output)

    def test_a_log_that_cannot_be_read_is_no_agreement(self):
        self.processor(self.path("log", EVENT + b"\n"))
        output, errors = self.processor("--verify", "log", "missing", status=1)
        self.assertIn("missing: No such file", errors)

    def test_without_tables_it_creates_none(self):
        query("DROP TABLE users_revenue, event_producers, event_logs")
        _, errors = self.processor("--verify", self.path("log", EVENT + b"\n"), status=1)
        self.assertIn("do not exist yet", errors)
        self.assertEqual(query("SELECT to_regclass('users_revenue')"), [(None,)])


class Machines(SystemTest):
    """Three servers with a log each behind a load balancer, on one database."""

    def balance(self, ports):
        """Start nginx, or a round-robin proxy when it is not installed; return the port."""
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        if not nginx:
            proxy = FaultyProxy(ports, 0)
            proxy.calm = True
            self.addCleanup(proxy.close)
            return proxy.port
        port = free_port()
        site, = blocks("nginx")  # the README's, without TLS
        site = re.sub(r" *ssl_certificate.*\n", "", site).replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
        site = site.replace("server 127.0.0.1:8000;", "".join(f"server 127.0.0.1:{port} max_fails=0; " for port in ports))
        temporary = "".join(f"{kind}_temp_path {self.directory}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        configuration = self.path("nginx.conf", f"""
            daemon off; pid {self.directory}/nginx.pid; error_log {self.directory}/nginx.log; events {{}}
            http {{ access_log off; {temporary} {site} }}""")
        balancer = subprocess.Popen([nginx, "-c", configuration, "-p", self.directory], stderr=subprocess.DEVNULL)

        def end():
            balancer.terminate()
            balancer.wait()
        self.addCleanup(end)
        wait_until(lambda: not can_bind(port), "nginx listens")
        return port

    def test_exact_totals_while_servers_are_killed_and_processors_run(self):
        secret = {"EVENTS_AUTHORIZATION": "secret"}
        servers = [Server(self, log=f"log{n}", **secret) for n in range(3)]
        port = self.balance([server.port for server in servers])
        files = [write_events(self.path(f"events{n}"), 60_000, seed=n) for n in range(3)]
        clients = [self.start("client.py", events, "--url", f"http://127.0.0.1:{port}/liveEvent", "--batch-size", 100,
                              **secret) for events in files]
        followers = [self.start("data_processor.py", "--follow", server.log) for server in servers]
        kills = 0
        while any(client.poll() is None for client in clients):
            n = kills % 3
            size = servers[n].log.stat().st_size
            wait_until(lambda: servers[n].log.stat().st_size > size + 100_000 or all(client.poll() is not None for client in clients),
                       "the log grows")
            servers[n].kill()
            kills += 1
            servers[n] = Server(self, log=f"log{n}", port=servers[n].port, **secret)
        for client in clients:
            output, errors = client.communicate()
            self.assertEqual(client.returncode, 0, errors)
        for follower in followers:
            follower.terminate()
            self.assertEqual(follower.wait(20), 0)
        self.processor(*[server.log for server in servers])
        self.assertRevenue(oracle(*files))
        self.processor("--verify", *[server.log for server in servers])
        self.assertGreater(kills, 2)
        self.assertTrue(all(server.log.stat().st_size for server in servers))


class StartUp(unittest.TestCase):
    """Where the tests find a PostgreSQL."""

    def setUp(self):
        directory = tempfile.mkdtemp(prefix="events-test-")
        self.addCleanup(shutil.rmtree, directory)
        self.environment = {"PATH": directory, "HOME": "/", "PGHOST": ""}
        self.tool = Path(directory, "pg_virtualenv")
        self.tool.touch(0o755)

    def test_without_a_named_database_the_same_command_runs_in_a_throwaway_one(self):
        with unittest.mock.patch.object(sys, "orig_argv", ["python", "-m", "unittest", "-v", "test_system.Http"]):
            self.assertEqual(throwaway_command(self.environment), ["pg_virtualenv", "-t", sys.executable, "-m", "unittest", "-v",
                                                                   "test_system.Http"])

    def test_a_port_or_a_password_alone_names_no_database(self):
        for variable in ("PGPORT", "PGPASSWORD"):
            with self.subTest(variable):
                self.assertTrue(throwaway_command(self.environment | {variable: "5433"}))

    def test_a_named_database_is_not_replaced_by_a_throwaway_one(self):
        for variable in ("DATABASE_URL", "PGHOST", "PGHOSTADDR", "PGUSER", "PGDATABASE", "PGSERVICE"):
            with self.subTest(variable):
                self.assertIsNone(throwaway_command(self.environment | {variable: "x"}))

    def test_a_throwaway_one_is_not_started_inside_another(self):
        self.assertIsNone(throwaway_command(throwaway_environment(self.environment)))

    def test_a_throwaway_one_has_a_port_of_its_own_and_utf8(self):
        environment = throwaway_environment(self.environment | {"PGPORT": "5432", "PGPASSWORD": "x", "LC_ALL": "C"})
        self.assertEqual(environment, self.environment | {"LC_ALL": "C.UTF-8", THROWAWAY: "1"})

    def test_without_pg_virtualenv_nothing_is_started(self):
        self.tool.unlink()
        self.assertIsNone(throwaway_command(self.environment))

    def test_without_any_postgresql_the_tests_fail_with_a_sentence(self):
        nowhere = {"PGHOST": "127.0.0.1", "PGPORT": str(free_port())}
        environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"} | nowhere
        run = subprocess.run([sys.executable, "-m", "unittest", "test_system.StartUp"], cwd=HERE, env=environment,
                             capture_output=True, text=True)
        self.assertEqual(run.returncode, 1)
        self.assertIn("RuntimeError: No PostgreSQL to test with", run.stderr)
        self.assertIn("FAILED (errors=1)", run.stderr)


class Readme(SystemTest):
    """What the README shows is what happens."""

    def setUp(self):
        super().setUp()
        self.port = free_port()
        for name in ("server.py", "client.py", "data_processor.py", "create_table.sql", "events.jsonl"):
            shutil.copy(HERE / name, self.directory)

    def shell(self, script):
        """Run a part of the README, at another port, and return what it prints."""
        script = (script.replace("server.py &", f"server.py --port {self.port} &")
                  .replace("client.py", f"client.py --url http://localhost:{self.port}/liveEvent")
                  .replace("localhost:8000", f"localhost:{self.port}"))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        run = subprocess.run(["sh", "-c", script], cwd=self.directory, capture_output=True, text=True, timeout=60,
                             env=os.environ | {"PATH": path})
        self.assertEqual(run.stderr, "")
        return run.stdout.replace(f":{self.port}", ":8000").replace("\r", "")

    def test_the_first_command_prints_what_the_readme_shows(self):
        command, output = blocks("sh")[0], re.sub(".* cluster .*\n", "", blocks("")[0])  # pg_virtualenv's words
        script = re.search(r"pg_virtualenv -t sh -c '(.*)'\n", command, re.S)[1]

        def normal(text):
            return re.sub(r"in [\d.]+ s", "in 0.1 s", re.sub(r"\d+ workers", "2 workers", text))
        self.assertEqual(normal(self.shell(script)), output)

    def test_the_second_command_runs_the_documented_tests(self):
        self.assertEqual(blocks("sh")[1], "bash .ci/run\n")
        self.assertIn('\n"$environment/bin/python" -m unittest ', (HERE / ".ci/run").read_text())
        self.assertIn("`python -m unittest`", README)
        self.assertNotIn("pg_virtualenv -t python", README)

    def test_the_console_session_prints_what_the_readme_shows(self):
        Server(self, port=self.port)
        session, = blocks("console")
        for step in re.split(r"^\$ ", session, flags=re.M)[1:]:
            lines = step.splitlines(keepends=True)
            continued = [line[2:] for line in lines[1:] if line.startswith("> ")]
            expected = "".join(lines[1 + len(continued):])
            self.assertEqual(self.shell(lines[0] + "".join(continued)), expected, lines[0])

    def test_the_safe_sender_sends_each_event_once(self):
        script, = blocks("python")
        sender = subprocess.Popen([sys.executable, "-c", script + "\nfor value in (1, 2):\n    send({'userId': 'user1', "
                                   f"'name': 'add_revenue', 'value': value}}, 'http://localhost:{self.port}/liveEvent')\n"])
        server = Server(self, port=self.port)
        self.assertEqual(sender.wait(20), 0)
        names = names_in(server.log)
        self.assertEqual([sequence for _, sequence in names], [1, 2])
        self.assertEqual(len({producer for producer, _ in names}), 1)

    def test_help_fits_a_screen_and_knows_every_option_of_the_readme(self):
        for script in ("server.py", "client.py", "data_processor.py"):
            output, _ = self.run_script(script, "--help", COLUMNS="80")
            self.assertLessEqual(output.count("\n"), 24)
            self.assertIn("Example: python " + script, " ".join(output.split()))
            usage = re.search(rf"^    python {script}(.*)$", README, re.M)[1]
            options = re.findall(r"--[a-z-]+", usage)
            self.assertEqual(set(re.findall(r"^  (--[a-z-]+)", output, re.M)), set(options))

    def test_the_rotation_by_logrotate_loses_nothing(self):
        rules = next(block for block in blocks("") if "rotate 90" in block)
        rules = self.path("rules", "dateext\n" + rules.replace("/var/lib/events", str(self.directory)))
        rules.chmod(0o644)
        logrotate = shutil.which("logrotate", path=os.environ["PATH"] + ":/usr/sbin")
        server = Server(self)
        for number in (1, 2, 3):
            server.post(EVENT)
            if logrotate:
                subprocess.run([logrotate, "--force", "--state", self.path("state"), rules], check=True, capture_output=True)
            else:
                server.log.rename(f"{server.log}.{number}")
        server.post(EVENT)
        self.assertEqual(len(list(self.directory.glob("server-events.jsonl*"))), 4)
        self.processor()
        self.assertRevenue({"user1": 4})


class Torture(SystemTest):
    """Everything at once, at random, and then equality with the oracle."""

    def test_every_event_counts_exactly_once(self):
        chance = random.Random(TORTURE_SEED)
        print(f"[torture: seed {TORTURE_SEED}, {TORTURE_SECONDS:g} s]", end=" ", file=sys.stderr, flush=True)
        self.counts = collections.Counter()
        self.servers = [Server(self, log=f"log{n}") for n in (1, 2)]
        self.proxy = FaultyProxy([server.port for server in self.servers], TORTURE_SEED)
        self.addCleanup(self.proxy.close)
        self.files, self.delivering, self.processors = [], [], []
        self.chance = chance
        actions = [self.kill_client, self.kill_client, self.kill_server, self.kill_worker, self.kill_processor, self.kill_processor,
                   self.terminate_backend, self.pause, self.pause, self.rotate]
        end = time.monotonic() + TORTURE_SECONDS
        while time.monotonic() < end:
            self.keep_busy()
            time.sleep(chance.uniform(0, 0.1))
            chance.choice(actions)()
        self.settle()
        logs = sorted(self.directory.glob("log*"))
        repeats = len(names_in(*logs)) - len(set(names_in(*logs)))
        kills = sum(count for name, count in self.counts.items() if name.startswith("kill"))
        print(f"[{dict(self.counts)}, {self.proxy.cuts} cuts, {kills} kills, {len(self.files)} files, "
              f"{repeats} repeated deliveries]", end=" ", file=sys.stderr, flush=True)
        self.assertRevenue(oracle(*self.files))
        for fault in (kills, repeats, self.proxy.cuts, self.counts["pause"], self.counts["rotate"]):
            self.assertGreater(fault, 0, "a fault was not injected")

    def start_client(self, events, *arguments):
        """Start a client through the proxy."""
        return subprocess.Popen([sys.executable, HERE / "client.py", events, "--url", f"http://127.0.0.1:{self.proxy.port}/liveEvent",
                                 "--batch-size", str(self.chance.choice([10, 100, 1000])), *arguments],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def keep_busy(self):
        """Keep two deliveries and two processors going, and both servers up."""
        for n, server in enumerate(self.servers):
            if server.process.poll() is not None:
                self.servers[n] = Server(self, log=server.log.name, port=server.port)
        for delivery in list(self.delivering):
            events, client = delivery
            if client.poll() is not None:
                output, errors = client.communicate()
                self.delivering.remove(delivery)
                if "events accepted" not in output:  # the receipt
                    self.assertIn(client.returncode, (-signal.SIGKILL, 1), errors)
                    self.assertNotIn("Traceback", errors)
                    self.delivering.append((events, self.start_client(events)))
        while len(self.delivering) < 2:
            events = write_events(self.path(f"events{len(self.files)}"), self.chance.choice([10, 1000, 5000]),
                                  seed=self.chance.random())
            self.files.append(events)
            self.delivering.append((events, self.start_client(events)))
        for processor in [processor for processor in self.processors if processor.poll() is not None]:
            self.processors.remove(processor)
            errors = processor.communicate()[1]
            self.assertTrue(processor.returncode in (0, -signal.SIGKILL) or "No such file" in errors, errors)
        while len(self.processors) < 2:
            logs = sorted(self.directory.glob("log*"))
            self.chance.shuffle(logs)
            self.processors.append(subprocess.Popen([sys.executable, HERE / "data_processor.py", *logs[:20]], cwd=self.directory,
                                                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))

    def kill(self, name, process):
        """SIGKILL a process that runs."""
        if process.poll() is None:
            process.kill()
            self.counts[f"kill {name}"] += 1

    def kill_client(self):
        """Kill one of the clients."""
        self.kill("client", self.chance.choice(self.delivering)[1])

    def kill_processor(self):
        """Kill one of the processors."""
        self.kill("processor", self.chance.choice(self.processors))

    def kill_server(self):
        """Kill a server's parent."""
        self.kill("server", self.chance.choice(self.servers).process)

    def kill_worker(self):
        """Kill one worker."""
        if workers := self.chance.choice(self.servers).workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chance.choice(workers), signal.SIGKILL)
                self.counts["kill worker"] += 1

    def terminate_backend(self):
        """End one of the database's processes."""
        query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
              "AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1")
        self.counts["terminate"] += 1

    def pause(self):
        """Stop a process for a moment."""
        processes = [client for _, client in self.delivering] + self.processors
        pids = [process.pid for process in processes if process.poll() is None]
        pids += [worker for server in self.servers for worker in server.workers()]
        if pids:
            pid = self.chance.choice(pids)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self.chance.uniform(0, 0.3))
                os.kill(pid, signal.SIGCONT)
                self.counts["pause"] += 1

    def rotate(self):
        """Rename a log."""
        log = self.chance.choice(self.servers).log
        if log.exists():
            log.rename(f"{log}.{self.counts['rotate']}")
            self.counts["rotate"] += 1

    def settle(self):
        """Let every delivery and then the processor come to their ends."""
        self.proxy.calm = True
        for processor in self.processors:
            processor.kill()
            processor.communicate()
        for n, server in enumerate(self.servers):
            if server.process.poll() is not None:
                self.servers[n] = Server(self, log=server.log.name, port=server.port)
        for events, client in self.delivering:
            while "events accepted" not in client.communicate(timeout=60)[0]:
                client = self.start_client(events)
        self.processor(*sorted(self.directory.glob("log*")))


if __name__ == "__main__":
    unittest.main()
