"""The system's promises, tested on the real scripts as processes and on a real PostgreSQL.

    python -m unittest                                    all of it, some minutes
    TORTURE_SECONDS=600 TORTURE_SEED=7 python -m unittest test_system.Torture

The tests make a scratch database and drop it: in the database that the environment names, or in the default one. When
the environment names none and the default one cannot be used, they run again inside a throwaway PostgreSQL of
Debian's pg_virtualenv.

promise                                                                              class
-----------------------------------------------------------------------------------  -----------
The events of a file add up exactly to the revenue that the server answers.          Pipeline
Each event counts once, whatever is killed, retried, run again or run at once.       ExactlyOnce
Several cores count what one would count, in bounded memory.                         Cores
An acknowledged event survives a fault at any step, a full disk and a power cut.     Durability
Server and processor agree on what an event is.                                      Events
All that holds for random events, batches, orders, logs and processors.              Properties
A request is accepted or refused as the HTTP standard says, and no peer does harm.   Http
The server's processes are replaced when they die, and stop in time.                 Processes
A file is delivered whole, or the client says which lines are not delivered.         Client
Rotated logs are found, and --follow reads on through rotations and outages.         Following
--verify finds each user whose revenue is not the sum of the logs.                   Audit
What goes wrong is said in a sentence, and printing it decides nothing.              Words
The promises hold for several machines with one database.                            Machines
What the README shows is what happens.                                               Readme
The tests find a PostgreSQL, or say in a sentence that there is none.                StartUp
Each event counts once while everything happens at once, at random.                  Torture

The tools come first, in the order of their banners; a test class needs nothing that stands below it.
"""
import bz2
import collections
import contextlib
import decimal
import errno
import fcntl
import gzip
import hashlib
import http.client
import http.server
import io
import itertools
import json
import lzma
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
import tracemalloc
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
README = (HERE / "README.md").read_text()
EVENT = b'{"userId": "user1", "name": "add_revenue", "value": 1}'
TORTURE_SECONDS = float(os.environ.get("TORTURE_SECONDS", "20"))
TORTURE_SEED = int(os.environ.get("TORTURE_SEED") or secrets.randbelow(10**6))
SCRATCH = f"events_test_{os.getpid()}_{secrets.token_hex(4)}"

# PGPORT and PGPASSWORD are missing here: alone they name no database, they change the default one's port or password.
NAME_A_DATABASE = ("DATABASE_URL", "PGHOST", "PGHOSTADDR", "PGUSER", "PGDATABASE", "PGSERVICE")
THROWAWAY = "EVENTS_TEST_THROWAWAY"  # set in the environment of the tests that run inside a throwaway PostgreSQL

administration = None  # a connection to the database that the environment names


# ---- Tools: the database --------------------------------------------------------------------------------------------

def setUpModule():
    """Create the scratch database and point the environment at it, so that every child finds it.

    Without a usable database, run the tests again inside a throwaway PostgreSQL, or fail: a skipped test proves
    nothing.
    """
    try:
        create_scratch_database()
    except (psycopg2.Error, data_processor.Failure) as error:
        if command := throwaway_command(os.environ):
            sys.stdout.flush()
            sys.stderr.flush()
            os.execvpe(command[0], command, throwaway_environment(os.environ))
        raise RuntimeError(f"No PostgreSQL to test with ({str(error).strip()}). Start one, or name another with "
                           "PGHOST, PGPORT, PGUSER and PGPASSWORD, or install Debian's postgresql-common: without "
                           "those variables the tests then start a throwaway one with pg_virtualenv.") from None


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

    Return None when the environment names a database, when this is the second run already, or when Debian's
    pg_virtualenv is missing.
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


def empty_tables():
    """Remove every row, as an older dump that is restored does."""
    query("TRUNCATE users_revenue, event_producers, event_logs")


def drop_tables():
    """Drop the tables that are there."""
    query("DROP TABLE IF EXISTS users_revenue, event_producers, event_logs")


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


def terminate_backends():
    """End the server side of every connection to the scratch database."""
    return query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                 "WHERE datname = current_database() AND pid <> pg_backend_pid()")


# ---- Tools: events and logs -----------------------------------------------------------------------------------------

def with_id(producer, sequence, user="user1", value=1):
    """Return a log's line as a server writes it."""
    return (f'{{"userId": "{user}", "name": "add_revenue", "value": {value}, '
            f'"producerId": "{producer}", "sequence": {sequence}}}\n')


def ids_in(*logs):
    """Return the (producer, sequence) of every line of the logs."""
    return [(event["producerId"], event["sequence"]) for log in logs
            for event in map(json.loads, Path(log).read_text().split("\n")[:-1])]


def nested(depth):
    """Return an event that is nested so many levels deep."""
    return EVENT[:-1] + b', "x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def with_value(value):
    """Return an event with a value as it is written."""
    return b'{"userId": "user1", "name": "add_revenue", "value": %b}' % value.encode()


def with_user(user):
    """Return an event with a userId as it is written."""
    return b'{"userId": %b, "name": "add_revenue", "value": 1}' % (user if isinstance(user, bytes) else user.encode())


def padded(size):
    """Return an event of so many bytes."""
    return EVENT[:-1] + b', "pad": "' + b"x" * (size - len(EVENT) - 11) + b'"}'


def write_events(path, count, seed=0, users=50):
    """Write random events to a file and return its path."""
    chance = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            name = chance.choice(["add_revenue", "subtract_revenue"])
            file.write(json.dumps({"userId": f"user{chance.randrange(users)}", "name": name,
                                   "value": chance.randrange(10**6)}) + "\n")
    return path


def oracle(*paths):
    """Return {user: sum} over event files: the independent reckoning."""
    totals = collections.defaultdict(Decimal)
    for path in paths:
        for event in map(json.loads, Path(path).read_text().split("\n")[:-1]):
            sign = 1 if event["name"] == "add_revenue" else -1
            totals[event["userId"]] += sign * Decimal(str(event["value"]))
    return dict(totals)


def append(log, line):
    """Append a line to a server's log, or raise what kept it from being durable."""
    outcome = []
    log.append(line, outcome.append)
    if outcome != [None]:
        raise outcome[0]


def apply_uncommitted(path, connection):
    """Count the events of a log in a connection's transaction."""
    with opened_reader(path) as log, data_processor.tallied(log, 0, False) as tallies, connection.cursor() as sql:
        data_processor.count_once(sql, tallies)


@contextlib.contextmanager
def opened_reader(path):
    """Return a context with a LogReader whose end is known."""
    with contextlib.closing(data_processor.LogReader(str(path))) as log:
        log.find_end()
        yield log


def small_slices(cores, **settings):
    """Return a context in which a log of a few lines has slices for so many cores."""
    settings = {"BLOCK_BYTES": 200, "SLICE_BYTES": 300, "usable_cores": lambda: cores} | settings
    return unittest.mock.patch.multiple(data_processor, **settings)


def normal(row):
    """Return what a row of the tally means: user, amount, producer and sequence."""
    user, sign, value, producer, sequence, _ = row
    return user, Decimal(value.decode()) * (1 if sign == b"add" else -1), producer, sequence


USERS = ["u", "user1", "x" * 255, "x" * 256, "\u00e9" * 127, "\u00e9" * 128, "\u00e9" * 255, "\u00e9" * 256,
         "\u65e5\u672c", "\u2028", "\u0085", "\x7f", "\\u00e9", "a\\\"b", "\\u0000", "\\ud800", "\\ud83d\\ude00",
         "\U0001f600" * 255, "", "a}b", "%d", " ", "\t", "\x01", "\0", "{", '"', "\ud800"]
VALUES = ["0", "-0", "1", "-1", "0.1", "-0.10", "1.", ".5", "01", "-01", "1e5", "1E+2", "9" * 18, "1" + "0" * 18,
          "-" + "9" * 18, "0." + "1" * 18, "0." + "1" * 19, "1." + "0" * 18, "true", "null", '"1"', "NaN", "-",
          "9" * 17, "9" * 19, "0e18", "1e-18", "1e-19", "00", "+1", "1_0", "[1]", "\u0661"]
SEQUENCES = ["1", "999999999999999", "1000000000000000", "9007199254740991", "9007199254740992", "0", "-1", "01",
             "1.0", "1e3", '"1"', "true", "null", "9" * 20]
PRODUCERS = ["p", "p" * 64, "p" * 65, "", "A-_z9", "p.q", "p\\u0071", "\u00e9"]


def random_line(chance):
    """Return a line: an event as everyone prints it, or one that breaks one or two rules, or one of another kind."""
    def often(usual, others, odds=0.07):
        return chance.choice(others) if chance.random() < odds else usual
    colon, comma = often(": ", [":", ":  ", " : "]), often(", ", [",", " ,", ",\t"])
    fields = [("userId", '"%s"' % often("user1", USERS, 0.2)),
              ("name", '"%s"' % often(chance.choice(["add_revenue", "subtract_revenue"]),
                                      ["add", "Add_revenue", "add_revenue "])),
              ("value", often("5", VALUES, 0.3))]
    if chance.random() < 0.4:
        fields += [("producerId", '"%s"' % often("p", PRODUCERS)), ("sequence", often("1", SEQUENCES, 0.15))]
    if chance.random() < 0.1:
        fields.insert(chance.randrange(len(fields) + 1), chance.choice(
            [("log", '"' + "a" * 32 + '"'), ("x", "[{}]"), ("userId", '"z"'), ("value", "3"), ("val\\u0075e", "4")]))
    if chance.random() < 0.05:
        fields.pop(chance.randrange(len(fields)))
    if chance.random() < 0.05:
        chance.shuffle(fields)
    text = "{%s}" % comma.join(f'"{name}"{colon}{value}' for name, value in fields)
    before, behind = often("", [" ", "\ufeff", "\r", "x"], 0.04), often("", ["\r", " ", "}", ",", "\0", "{}"], 0.04)
    line = (before + text + behind).encode("utf-8", "surrogatepass")
    if chance.random() < 0.05:
        at = chance.randrange(len(line))
        other = chance.choice([b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\0", b'"', b"\\", b""])
        line = line[:at] + other + line[at + 1:]
    return line.replace(b"\n", b"")


# ---- Tools: valid and invalid events --------------------------------------------------------------------------------

EXTRA = EVENT[:-1] + b', "x": %b}'
VALID_EVENTS = {
    "an event": EVENT, "white space around it": b" \t" + EVENT + b" \t", "no white space": EVENT.replace(b" ", b""),
    "64 KiB": padded(65536), "64 KiB with white space": EVENT + b" " * (65536 - len(EVENT)), "100 levels": nested(100),
    **{f"the value {value}": with_value(value) for value in (
        "0", "-0", "0.0", "-0.00", "1e17", "1E+17", "-999999999999999999", "999999999999999999", "0E17",
        "999999999999999999." + "9" * 18, "0." + "0" * 17 + "1", "1e-18", "0e-18", "0." + "0" * 18, "1.5e3")},
    "a user of 1 character": with_user('"x"'), "a user of 255 characters": with_user('"' + "x" * 255 + '"'),
    "a user of 255 characters of 4 bytes": with_user('"' + "\U0001f600" * 255 + '"'),
    "a user with an escaped pair": with_user('"\\ud83d\\ude00"'), "a user with an escape": with_user('"\\u00e9"'),
    "a user with a letter of 2 bytes": with_user('"\u00e9"'),
    "a user with line ends of Unicode": with_user('"\u2028\u0085\x7f"'),
    "a user with JSON's signs": with_user('"{}[],:\\"\\\\"'), "a user with a byte order mark": with_user('"\ufeff"'),
    "a user with a line end": with_user('"\\n"'), "a user with a space": with_user('" "'),
    "another field null": EXTRA % b"null", "another field with a lone surrogate": EXTRA % b'"\\ud800"',
    "another field with a huge number": EXTRA % b"1e400", "another field with an array": EXTRA % b"[1, {\"a\": null}]",
    "another field with brackets in a string": EXTRA % b'"[[[{{{"',
    "another field with 4,000 digits": EXTRA % (b"9" * 4000),
    "a repeated field": EVENT[:-1] + b', "name": "subtract_revenue", "value": 3}',
    "a repeated field whose first value is invalid": b'{"userId": 5, ' + EVENT[1:],
    "a field like a reserved one": EVENT[:-1] + b', "Sequence": 1}',
    "a repeated field with an object in it": b'{"value": {"value": [1]}, ' + EVENT[1:],
    "an escape in a field's name": EVENT.replace(b"value", b"val\\u0075e")}
NO_EVENTS = {
    "no JSON": b"nonsense", "half an object": b"{", "an array": b"[]", "a number": b"1", "null": b"null",
    "a string": b'"x"', "an empty object": b"{}", "a comma behind": EVENT + b",", "two events": EVENT + EVENT,
    "an event in an array": b"[" + EVENT + b"]", "no end": EVENT[:-1], "no beginning": EVENT[1:],
    "a comma before the end": EVENT[:-1] + b",}", "a byte order mark": b"\xef\xbb\xbf" + EVENT,
    "UTF-16": EVENT.decode().encode("utf-16"), "UTF-16 without a mark": EVENT.decode().encode("utf-16-le"),
    "a NUL before": b"\0" + EVENT, "a NUL behind": EVENT + b"\0",
    "a byte that is not UTF-8": EVENT.replace(b"user1", b"us\xffer"),
    "a surrogate in UTF-8": EVENT.replace(b"user1", b"\xed\xa0\x80"),
    "a CR in a string": EVENT.replace(b"user1", b"us\rer"), "a tab in a string": EVENT.replace(b"user1", b"us\ter"),
    "single quotes": EVENT.replace(b'"', b"'"), "a line end of Unicode before": b"\xc2\x85" + EVENT,
    "a space of Unicode": EVENT.replace(b" ", b"\xc2\xa0"), "64 KiB and a byte": padded(65537),
    "64 KiB and a byte with white space": EVENT + b" " * (65537 - len(EVENT)),
    **{f"{levels:,} levels": nested(levels) for levels in (101, 900, 100_000)},
    "20,000 open brackets": EXTRA % (b"[" * 20_000),
    "open brackets and an open string of quotes": (EXTRA % (b"[" * 101 + b'"' + b'\\"' * 32_000))[:-1],
    "990 levels in a repeated field": EXTRA % (b"[" * 990 + b"]" * 990 + b', "x": 1')}
INVALID_VALUES = {f"the value {value[:30]} ({len(value):,})": with_value(value) for value in (
    "1000000000000000000", "-1000000000000000000", "1e18", "0e18", "1e-19", "0e-19", "0." + "0" * 19,
    "0." + "0" * 18 + "1", "true", "null", '"1"', "[1]", "{}", "NaN", "Infinity", "-Infinity", "01", "+1", "1.", ".5",
    "1e", "0x1", "1_0", "\u0661", "9" * 5000, "1." + "0" * 5000, "1e9999999999999999999", "0E-20000", "1E+500000",
    "-1e9999999999999999999")}
INVALID_USERS = {
    "an empty user": with_user('""'), "a user of 256 characters": with_user('"' + "x" * 256 + '"'),
    "a user of 256 characters of 2 bytes": with_user('"' + "\u00e9" * 256 + '"'),
    "a NUL in a user": with_user('"\\u0000"'), "a lone surrogate for a user": with_user('"\\ud800"'),
    "a lone surrogate in a user": with_user('"a\\udc00"'),
    "a number for a user": with_user("1"), "null for a user": with_user("null"), "an array for a user": with_user("[]"),
    "true for a user": with_user("true"), "an unknown escape in a user": with_user('"\\x41"'),
    "a user without an end": with_user('"a')}
INVALID_FIELDS = {
    "NaN in another field": EXTRA % b"NaN", "Infinity in another field": EXTRA % b"Infinity",
    "5,000 digits in another field": EXTRA % (b"9" * 5000),
    "an exponent of 19 digits in another field": EXTRA % b"1e9999999999999999999",
    "two values in another field": EXTRA % b"1 2", "an unknown name": EVENT.replace(b"add_revenue", b"add"),
    "an array for a name": EVENT.replace(b'"add_revenue"', b"[]"),
    "null for a name": EVENT.replace(b'"add_revenue"', b"null"),
    "upper case in a name": EVENT.replace(b"add_revenue", b"Add_revenue"),
    "a repeated field whose last value is invalid": EVENT[:-1] + b', "value": "1"}',
    "no userId": EVENT.replace(b"userId", b"userid"), "a sequence alone": EVENT[:-1] + b', "sequence": 1}',
    "an escaped producerId alone": EVENT[:-1] + b', "producer\\u0049d": "p"}',
    "a null producerId alone": EVENT[:-1] + b', "producerId": null}'}
INVALID_EVENTS = NO_EVENTS | INVALID_VALUES | INVALID_USERS | INVALID_FIELDS
RESERVED = {  # invalid for the server, but a log may hold these
    "a producerId and a sequence": EVENT[:-1] + b', "producerId": "p", "sequence": 1}',
    "a log": EVENT[:-1] + b', "log": 1}'}


# ---- Tools: processes -----------------------------------------------------------------------------------------------

def wait_until(condition, what, seconds=20):
    """Return condition's first true result, or fail."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain until {what}")
        time.sleep(0.01)
    return result


def alive(pid):
    """Tell whether a process runs (a zombie does not)."""
    if Path("/proc/self/stat").exists():
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


def children_of(pid):
    """Return the ids of a process's children, the oldest first, with those that ended and are not reaped."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    listing = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)  # macOS
    return [int(child) for child in listing.stdout.split()]


def can_bind(port):
    """Tell whether a port is free."""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True


def free_port():
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def warnings_of(module):
    """Return a context with the list of what a module prints to stderr."""
    lines = []
    with unittest.mock.patch.object(module, "warn", lines.append):
        yield lines


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


def patched(module, patch):
    """Return (interpreter's arguments, environment) that run a script after some lines of Python have changed it."""
    return (["-c", f"import sys, {module}\n{patch}\nsys.exit({module}.main())"], {"PYTHONPATH": str(HERE)})


@contextlib.contextmanager
def captured():
    """Return a context in which this process prints to a file; it yields a function that returns what is in it."""
    with (tempfile.TemporaryFile("w+", encoding="utf-8") as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        yield lambda: os.pread(file.fileno(), 10**6, 0).decode()


@contextlib.contextmanager
def opened_processor(*paths, **options):
    """Return a context with a Processor in this process, whose logs and connection are closed at its end."""
    processor = data_processor.Processor(list(map(str, paths)), **options)
    try:
        yield processor
    finally:
        for log in processor.held.values():
            log.close()
        if processor.connection:
            processor.connection.close()


def apply(*paths):
    """Apply what is new in logs, in this process."""
    with captured(), opened_processor(*paths) as processor:
        processor.run()


class Polled(Exception):
    """A follower waits for its next poll."""


def poll(processor):
    """Run a follower in this process until it waits for its next poll."""
    def sleep(seconds):
        if seconds == data_processor.POLL_SECONDS:
            raise Polled
    with contextlib.suppress(Polled), unittest.mock.patch.object(data_processor.time, "sleep", sleep):
        processor.run()


@contextlib.contextmanager
def opened_log(path):
    """Return a context with a server's log in this process, which is closed at its end."""
    log = server_module.LogWriter(str(path))
    log._fd = log.open()
    try:
        yield log
    finally:
        if log._fd is not None:
            os.close(log._fd)


@contextlib.contextmanager
def opened_delivery(path, restart=False):
    """Return a context with the Delivery of a file in this process."""
    with captured():
        delivery = client_module.Delivery(str(path), restart)
    with delivery._file, delivery._state:
        yield delivery


class Server:
    """A running server.py with a log of its own; patch is Python that runs before main()."""

    def __init__(self, test, *arguments, log="server-events.jsonl", port=0, patch=None, **environment):
        """Start server.py and return when it listens, or fail."""
        self.log = test.directory / log
        self.errors = test.directory / f"stderr-{secrets.token_hex(4)}"
        if port:
            wait_until(lambda: can_bind(port), "the port is free")
        script, path = patched("server", patch) if patch else ([HERE / "server.py"], {})
        command = [sys.executable, *script, "--port", str(port), "--log", self.log, *arguments]
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(command, cwd=test.directory, stdout=subprocess.PIPE, stderr=errors,
                                            text=True, env=os.environ | path | environment)
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
        return children_of(self.process.pid)

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

    def said(self):
        """Return the lines on stderr."""
        return self.errors.read_text().splitlines()

    def raw(self, *pieces):
        """Send bytes as they are and return (status, headers, body) of the answer."""
        with self.connect() as wire:
            for piece in pieces:
                wire.sendall(piece)
            return read_answer(wire)


class SystemTest(unittest.TestCase):
    """A test with an empty directory and empty tables."""

    def setUp(self):
        """Make the directory and the tables."""
        self.directory = Path(tempfile.mkdtemp(prefix="events-test-"))
        self.addCleanup(shutil.rmtree, self.directory)
        drop_tables()
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


# ---- Tools: HTTP ----------------------------------------------------------------------------------------------------

def request(method, target, *fields, body=b"", version="1.1", host="127.0.0.1", media="application/json", length=True):
    """Return the bytes of a request with the usual fields and those that are given."""
    lines = [f"{method} {target} HTTP/{version}"]
    lines += [f"Host: {host}"] * (host is not None) + [f"Content-Type: {media}"] * bool(media)
    lines += [f"Content-Length: {len(body)}"] * (length and bool(body))
    return "\r\n".join([*lines, *fields, "", ""]).encode("latin-1") + body


def post(*fields, body=b"", target="/liveEvent", **options):
    """Return the bytes of a request that sends events."""
    return request("POST", target, *fields, body=body, **options)


def chunked(*chunks, end=b"0\r\n\r\n"):
    """Return a request whose body is sent in chunks."""
    return post("Transfer-Encoding: chunked") + b"".join(
        b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def read_answer(wire, method="GET"):
    """Return (status, headers, body) of the next answer on a socket."""
    answer = http.client.HTTPResponse(wire, method=method)
    answer.begin()
    return answer.status, answer.headers, answer.read()


class Answers(io.BufferedReader):
    """The receiving side of a socket, from which one answer after the other is read."""

    def __init__(self, wire):
        """Read from a socket."""
        super().__init__(socket.SocketIO(wire, "r"))

    def makefile(self, _mode):
        """Stand in for a socket."""
        return self

    def close(self):
        """Outlive the answer."""


@contextlib.contextmanager
def serving(log, **settings):
    """Return a context in which this process is a worker, with other settings than the server's own."""
    lifeline, hold = os.pipe()
    with unittest.mock.patch.multiple(server_module, **settings), server_module.listen("127.0.0.1", 0) as listener:
        worker = server_module.Worker(listener, log, None)
        worker.address = listener.getsockname()
        thread = threading.Thread(target=worker.run, args=[lifeline], daemon=True)
        thread.start()
        try:
            yield worker
        finally:
            os.close(hold)
            thread.join(20)
            os.close(lifeline)


BATCHES = (204, {"Accept-Post": "application/x-ndjson"}, b"")  # an answer to OPTIONS


class Recorder:
    """An HTTP server that answers what it is told to and records what it is sent; the answer None cuts a connection."""

    def __init__(self, options, post):
        """Answer OPTIONS with each of options, the last one for ever, and a POST with post(its number, its body)."""
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
        """Begin to serve."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def dribbling(method):
    """Return a context with the URL of a server that takes batches, and answers requests of a method with a byte each
    half second."""
    def serve(wire):
        with wire, contextlib.suppress(OSError):
            request = wire.recv(65536)
            answer = b"HTTP/1.1 204 No Content\r\nAccept-Post: application/x-ndjson\r\nConnection: close\r\n\r\n"
            if not request.startswith(method):
                return wire.sendall(answer)
            for byte in answer[:17] + b"a" * 1000:
                wire.sendall(bytes([byte]))
                time.sleep(0.5)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/liveEvent"


# ---- Tools: faults --------------------------------------------------------------------------------------------------

class FaultySystem:
    """The os or fcntl module with one call, counted over all of them, that goes wrong in a chosen way."""

    CALLS = ("open", "fstat", "stat", "pread", "write", "ftruncate", "fdatasync", "fsync", "flock", "close")
    FAULTS = ("EIO", "ENOSPC", "EIO for good", "short", "short, then ENOSPC", "killed before", "killed after")

    def __init__(self, module, state, log):
        """Stand in for module; state says what goes wrong at which call, and holds what happened."""
        self._module, self._state, self._log = module, state, log

    def __getattr__(self, name):
        """Return what the module has under that name, but counted if it is one of CALLS."""
        real = getattr(self._module, name)
        if name not in self.CALLS:
            return real
        return lambda *arguments, **options: self._call(name, real, *arguments, **options)

    def _call(self, name, real, *arguments, **options):
        """Make a call that may go wrong, and keep in the state what is locked and synced by it."""
        state = self._state
        state["count"] += 1
        if name == "flock":
            state["locked"] = arguments[1] != fcntl.LOCK_UN
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


def faulty(system, state, log):
    """Return a context in which the server makes its system calls for the log through a FaultySystem."""
    stack = contextlib.ExitStack()
    for user in (server_module, data_processor):
        for module in (os, fcntl):
            stack.enter_context(unittest.mock.patch.object(user, module.__name__, system(module, state, log)))
    return stack


class FaultyConnection(psycopg2.extensions.connection):
    """A connection that raises an error at one step: before or after a statement, at COMMIT, or just after it.

    Steps are counted over all connections. OperationalError breaks the connection, too.
    """

    steps = fail_at = 0
    error = None

    @classmethod
    def fail(cls, error, at):
        """Count from 0 again, and raise error at that step; there is no step 0."""
        cls.error, cls.fail_at, cls.steps = error, at, 0

    def step(self):
        """Count a step, or fail."""
        FaultyConnection.steps += 1
        if self.steps == self.fail_at:
            if self.error is psycopg2.OperationalError:
                self.close()
            raise self.error("injected")

    def cursor(self, *arguments, **options):
        """Return a cursor whose statements are steps."""
        return super().cursor(*arguments, cursor_factory=FaultyCursor, **options)

    def __exit__(self, kind, error, trace):
        """Commit between two steps, or roll back."""
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


class FaultyCursor(psycopg2.extensions.cursor):
    """A cursor of a FaultyConnection."""

    def execute(self, *arguments):
        """Execute a statement between two steps."""
        self.connection.step()
        super().execute(*arguments)
        self.connection.step()


class FaultyCalls:
    """The os or fcntl module of a client with one call, counted over both, that fails, is short, or is the last one."""

    CALLS = ("open", "fstat", "stat", "pread", "write", "ftruncate", "fsync", "unlink", "flock", "close")

    def __init__(self, module, calls):
        """Stand in for module; calls says what goes wrong at which call, and holds what happened."""
        self._module, self._calls = module, calls

    def __getattr__(self, name):
        """Return what the module has under that name, but counted if it is one of CALLS."""
        real = getattr(self._module, name)
        if name not in self.CALLS:
            return real
        return lambda *arguments, **options: self._call(name, real, *arguments, **options)

    def _call(self, name, real, *arguments, **options):
        """Make a call that may go wrong, and keep which files it synced."""
        calls = self._calls
        calls.count += 1
        due = calls.count == calls.at
        if due and calls.fault == "killed before":
            os._exit(9)
        if due and isinstance(calls.fault, int):
            raise OSError(calls.fault, "fault")
        if due and calls.fault == "short" and name == "write":
            real(arguments[0], arguments[1][:len(arguments[1]) // 2])
            os._exit(9)
        result = real(*arguments, **options)
        if due and calls.fault == "killed after":
            os._exit(9)
        if name == "fsync":
            status = os.fstat(arguments[0])
            calls.synced.add((status.st_dev, status.st_ino))
        return result


class FaultyProxy:
    """A TCP proxy that passes each connection on to one of some ports, and often cuts it: before or within the request,
    before the answer, or after some bytes of it."""

    def __init__(self, ports, seed):
        """Begin to pass connections on."""
        self.ports, self._chance = ports, random.Random(seed)
        self.cuts = 0
        self.calm = False  # cut no more
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        """Choose for each connection its server and where it is cut."""
        while True:
            try:
                wire, _ = self._listener.accept()
            except OSError:
                return
            cut = self._chance.choice([None, None, None, "request", "answer", "answer", "answer later"])
            port, budget = self._chance.choice(self.ports), self._chance.randrange(1, 20_000)
            arguments = [wire, port, None if self.calm else cut, budget]
            threading.Thread(target=self._pass, args=arguments, daemon=True).start()

    def _pass(self, wire, port, cut, budget):
        """Pass bytes both ways until an end closes the connection or it is cut."""
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


# ---- Tools: the README ----------------------------------------------------------------------------------------------

def blocks(language):
    """Return the README's code blocks of a language."""
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if name == language]


# ---- From file to database ------------------------------------------------------------------------------------------

class Pipeline(SystemTest):
    """The events of a file add up to the revenue that the server answers."""

    def test_the_sample_events_count_each_time_they_are_sent(self):
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

    def test_create_table_sql_can_run_twice_in_psql(self):
        drop_tables()
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
                              ("debtor", "-999999999999999999.999999999999999999"), ("round", "1200.5"),
                              ("nought", "0")):
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

    def test_each_line_of_a_plain_log_that_grows_is_applied_once(self):
        logs = [write_events(self.path(f"plain{seed}"), 100, seed) for seed in (1, 2)]
        for appended in (False, True):
            for log in logs:
                if appended:
                    log.write_bytes(log.read_bytes() + write_events(self.path("more"), 50, seed=3).read_bytes())
                self.processor(log)
                self.processor(log)
            self.assertRevenue(oracle(*logs))

    def test_an_edited_plain_log_has_its_lines_without_an_id_refused(self):
        log = write_events(self.path("plain.jsonl"), 3)
        first, second, third = log.read_bytes().splitlines(keepends=True)
        self.processor(log)
        expected = oracle(log)
        log.write_bytes(first + third + second.replace(b"user", b"loser") + with_id("p", 1, "new", 5).encode())
        _, errors = self.processor(log, status=1)
        self.assertIn(f"plain.jsonl: byte {len(first)}: an event without producerId and sequence", errors)
        self.assertRevenue(expected | {"new": 5})
        log.write_bytes(first * 50 + log.read_bytes())  # whatever is shifted behind the position
        self.processor(log, status=1)
        self.assertRevenue(expected | {"new": 5})

    def test_an_edited_plain_log_that_is_put_right_is_known_again(self):
        log = write_events(self.path("plain.jsonl"), 3)
        content = log.read_bytes()
        self.processor(log)
        log.write_bytes(content.splitlines(keepends=True)[0] + content + EVENT + b"\n")
        for _ in range(2):
            _, errors = self.processor(log, status=1)
            self.assertEqual(errors.count("an event without producerId and sequence"), 5)
        log.write_bytes(content + EVENT + b"\n")
        self.processor(log)
        self.assertRevenue(oracle(log))

    def test_the_client_delivers_the_other_lines_of_a_file_with_bad_ones(self):
        server = Server(self)
        bad = [b"nonsense\n", b'{"userId": "user1", "name": "add_revenue", "value": "1"}\n']
        events = self.path("events.jsonl", EVENT + b"\n" + bad[0] + b"\n" + EVENT + b"\r\n" + bad[1] + EVENT)
        output, errors = self.client("--url", server.url, "--batch-size", 2, status=1)
        self.assertIn("3 events accepted, 2 rejected", output)
        self.assertIn("events.jsonl:2: not JSON", errors)
        self.assertIn("events.jsonl:5: value must be a number\n", errors)
        _, rejected = sorted(self.directory.glob("events.jsonl*"))
        self.assertEqual(rejected.read_bytes(), b"".join(bad))
        self.assertEqual(sorted(sequence for _, sequence in ids_in(server.log)), [1, 4, 6])
        self.assertEqual(events.read_bytes().count(b"\n"), 5)

    def test_the_processor_applies_the_other_lines_of_a_log_with_bad_ones(self):
        lines = [EVENT + b"\n", b'{"userId": "user1"}\n', b"\xff\n", b"\n", EVENT + b"\n", b"x" * 300_000 + b"\n",
                 EVENT + b"\n", EVENT[:-1]]
        log = self.path("server-events.jsonl", b"".join(lines))
        output, errors = self.processor(status=1)
        self.assertEqual(output, "server-events.jsonl: 3 applied, 0 repeated, 3 rejected; "
                                 f"{len(EVENT) - 1} bytes of an unfinished last line left\n")
        starts = [sum(map(len, lines[:i])) for i in (1, 2, 5)]
        self.assertEqual([line.split(": ")[:2] for line in errors.splitlines()],
                         [["server-events.jsonl", f"byte {start}"] for start in starts])
        self.assertEqual(log.read_bytes(), b"".join(lines))
        self.assertEqual(self.processor()[1], "")
        self.assertRevenue({"user1": 3})

    def test_rotation_under_load_loses_nothing(self):
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
        for ending in (".0.gz", ".delivery", ".rejected-p"):
            self.path(f"server-events.jsonl{ending}", EVENT + b"\n")
        _, errors = self.processor()
        self.assertEqual(errors, "server-events.jsonl.0.gz: is compressed and was not read; name it to read it.\n")
        self.assertRevenue(oracle(events))
        self.assertEqual(server.errors.read_text(), "")

    def test_ctrl_c_ends_a_processor_that_waits_for_the_database_quietly(self):
        log = self.path("log", EVENT + b"\n")
        with locked_users():
            for number, arguments in enumerate(([], ["--follow"]), 1):
                processor = self.start("data_processor.py", log, *arguments)
                wait_until(lambda: len(waiting()) == number, "the processor waits")
                processor.send_signal(signal.SIGINT)
                self.assertEqual((processor.communicate(timeout=5), processor.returncode), (("", ""), 130))
        self.processor(log)
        self.assertRevenue({"user1": 1})

    def test_a_database_that_is_not_there_is_named_in_a_sentence(self):
        log = self.path("log", EVENT + b"\n")
        parts = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
        nowhere = {"host": "127.0.0.1", "hostaddr": "127.0.0.1", "port": free_port()}
        cases = {"a missing database": ({"dbname": "missing"}, "exist. Start PostgreSQL, or correct DATABASE_URL"),
                 "a port where nothing listens": (nowhere, "refused. Start PostgreSQL"),
                 "an unknown user": ({"user": "nobody-such"}, "No database")}
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

    def test_a_database_that_is_not_in_utf8_is_refused(self):
        administer(f"CREATE DATABASE {SCRATCH}_ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
        self.addCleanup(administer, f"DROP DATABASE {SCRATCH}_ascii")
        parts = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
        dsn = psycopg2.extensions.make_dsn(**(parts | {"dbname": f"{SCRATCH}_ascii"}))
        _, errors = self.processor(self.path("log", EVENT + b"\n"), status=1, DATABASE_URL=dsn)
        self.assertIn("is encoded in SQL_ASCII; create one with", errors)

    def test_a_table_of_another_shape_is_refused(self):
        query("ALTER TABLE users_revenue RENAME COLUMN user_id TO someone")
        _, errors = self.processor(self.path("log", EVENT + b"\n"), status=1)
        self.assertIn("; mend it with: ALTER TABLE users_revenue ADD COLUMN user_id", errors)

    def test_a_log_that_cannot_be_read_is_named_in_a_sentence(self):
        cases = {"a directory": ([self.directory], "is not a regular file"),
                 "a missing log": (["missing"], "missing: No such file"),
                 "the default log": ([], "server-events.jsonl: No such file or directory; start server.py")}
        for case, (arguments, words) in cases.items():
            with self.subTest(case):
                self.assertIn(words, self.processor(*arguments, status=1)[1])

    def test_without_a_database_the_server_takes_events(self):
        server = Server(self, DATABASE_URL=f"postgresql://localhost:{free_port()}/nowhere")
        self.assertEqual(server.post(EVENT)[0], 200)
        status, headers, _ = server.ask("GET", "/userEvents/user1")
        self.assertEqual((status, headers["Retry-After"]), (503, "2"))
        self.assertEqual(server.ask("GET", "/health")[0], 200)
        self.assertEqual(len(ids_in(server.log)), 1)

    def test_without_a_database_the_processor_says_to_start_one(self):
        self.path("server-events.jsonl", with_id("p", 1))
        _, errors = self.processor(status=1, DATABASE_URL=f"postgresql://localhost:{free_port()}/nowhere")
        self.assertEqual(errors.count("\n"), 1)
        self.assertIn("Start PostgreSQL", errors)

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

    def test_the_reason_why_the_database_does_not_answer_is_said_once(self):
        server = Server(self, "--workers", "1")
        with locked_users():
            self.assertEqual([server.ask("GET", "/userEvents/user1")[0] for _ in range(2)], [503, 503])
        wait_until(lambda: server.ask("GET", "/userEvents/user1")[0] == 404, "the database answers again")
        began, ended = server.said()
        self.assertRegex(began, "The database: (no answer within 2 seconds|canceling statement due to .*)")
        self.assertEqual(ended, "The database: it answers again.")

    def test_a_wrong_database_is_named_in_a_sentence(self):
        cases = {"a missing one": (f"{os.environ['DATABASE_URL']} dbname=nowhere", '"nowhere" does not exist'),
                 "a malformed URL": ("postgresql+psycopg2://app:S3cret@db/shop", "DATABASE_URL is malformed")}
        for case, (url, words) in cases.items():
            with self.subTest(case):
                server = Server(self, "--workers", "1", DATABASE_URL=url, log=case)
                for _ in range(2):
                    status, headers, _ = server.ask("GET", "/userEvents/user1")
                    self.assertEqual((status, headers["Retry-After"]), (503, "2"))
                said, = server.said()
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
        with (unittest.mock.patch.object(database._thread, "submit", side_effect=error),
              warnings_of(data_processor) as said):
            self.assertRaises(data_processor.Failure, database.revenue, "user1")
        self.assertEqual(said, ["The database: can't start new thread."])

    def test_before_the_tables_exist_every_user_is_unknown(self):
        drop_tables()
        self.assertEqual(Server(self).ask("GET", "/userEvents/user1")[0], 404)

    def test_processors_at_once_create_the_missing_tables(self):
        drop_tables()
        Server(self).post(EVENT)
        processors = [self.start("data_processor.py") for _ in range(4)]
        for processor in processors:
            self.assertEqual(processor.wait(20), 0, processor.stderr.read())
        self.assertRevenue({"user1": 1})

    def test_of_two_processors_that_create_the_tables_the_second_waits(self):
        drop_tables()
        log = self.path("log", EVENT + b"\n")
        first = psycopg2.connect(os.environ["DATABASE_URL"])
        with contextlib.closing(first), first.cursor() as sql:
            sql.execute("SELECT pg_advisory_xact_lock(hashtext('create_table.sql'))")
            sql.execute((HERE / "create_table.sql").read_text())
            second = self.start("data_processor.py", log)
            wait_until(waiting, "the second waits")
            first.commit()
            self.assertEqual(second.wait(20), 0, second.stderr.read())
        self.assertRevenue({"user1": 1})

    def test_a_revenue_column_that_would_round_is_refused(self):
        log = self.path("log", EVENT + b"\n")
        for kind in ("double precision", "numeric(10, 2)", "bigint"):
            with self.subTest(kind):
                query(f"ALTER TABLE users_revenue ALTER COLUMN revenue TYPE {kind}")
                _, errors = self.processor(log, status=1)
                statement = "ALTER TABLE users_revenue ALTER COLUMN revenue TYPE numeric USING"
                self.assertIn(f"; mend it with: {statement}", errors)

    def test_the_rows_of_an_older_table_are_added_to(self):
        query("DROP TABLE users_revenue")
        query("CREATE TABLE users_revenue (id serial, user_id varchar(255) PRIMARY KEY, revenue numeric)")
        query("INSERT INTO users_revenue (user_id, revenue) VALUES ('user1', 0.5), ('user2', NULL)")
        self.processor(self.path("log", EVENT + b"\n"), self.path("other", with_id("p", 1, "user2")))
        self.assertRevenue({"user1": Decimal("1.5"), "user2": 1})

    def test_a_compressed_log_is_read_when_it_is_named(self):
        content = "".join(with_id("p", n) for n in range(1, 1001)).encode()
        for ending, module in ((".1.gz", gzip), (".2.bz2", bz2), (".3.xz", lzma)):
            with self.subTest(ending):
                empty_tables()
                log = self.path("log" + ending, module.compress(content))
                self.assertIn("1,000 applied", self.processor(log)[0])
                self.assertIn("agree on 1 users", self.processor("--verify", log)[0])
                log.write_bytes(log.read_bytes()[:-20])
                self.assertIn(f"{log}: cannot be decompressed", self.processor(log, status=1)[1])
        log, named = self.path("other", with_id("q", 1)), self.path("other.1.gz", gzip.compress(content))
        self.assertEqual(self.processor(log, named)[1], "", "it is not said to be left alone")
        for name, words in (("log.lz4", ": '.lz4'"), ("plain.gz", ": Not a gzipped file")):
            with self.subTest(name):
                output, errors = self.processor(self.path(name, EVENT + b"\n"), status=1)
                self.assertIn("cannot be decompressed" + words, errors)

    def test_a_compressed_log_is_decompressed_once(self):
        log = self.path("log.gz", gzip.compress(with_id("p", 1).encode()))
        decompress = unittest.mock.Mock(side_effect=data_processor.decompress)
        with unittest.mock.patch.object(data_processor, "decompress", decompress):
            apply(log)
            self.assertEqual(decompress.call_count, 1)
            with captured(), opened_processor(log, follow=True) as processor:
                poll(processor)
                poll(processor)
            self.assertEqual(decompress.call_count, 2)
        self.assertRevenue({"user1": 1})


# ---- Exactly once ---------------------------------------------------------------------------------------------------

class ExactlyOnce(SystemTest):
    """Each event counts once, whatever is killed, retried, run again or copied in between."""

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
        ids = ids_in(server.log)
        self.assertEqual({(ids[0][0], line) for line in range(1, 100_001)}, set(ids))
        self.assertGreater(len(ids), 100_000)
        output, _ = self.processor()
        self.assertIn(f"100,000 applied, {len(ids) - 100_000:,} repeated", output)
        self.assertRevenue(oracle(events))

    def test_processors_at_once_count_once_although_some_are_killed(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 100_000)
        self.client("--url", server.url)
        lines = server.log.read_text().splitlines(keepends=True)
        logs = [server.log, self.path("reversed", "".join(reversed(lines))),
                self.path("second half", "".join(lines[50_000:]))]
        with locked_users():
            processors = [self.start("data_processor.py", log) for log in logs * 2]
            wait_until(lambda: len(waiting()) == len(processors), "all wait for each other")
            processors[0].kill()
            query("SELECT pg_terminate_backend(%s)", [waiting()[-1]])
        self.assertEqual([processor.wait(60) for processor in processors], [-signal.SIGKILL] + 5 * [0])
        self.processor(*logs)
        self.assertRevenue(oracle(events))
        self.assertEqual(query("SELECT applied::text FROM event_producers"), [("{[1,100001)}",)])

    def test_one_request_to_two_servers_counts_once_in_whatever_order_logs_are_processed(self):
        one, two = Server(self, log="one"), Server(self, log="two")
        for server, first in ((one, 1), (two, 1), (one, 2), (two, 3)):
            body = b"".join(EVENT.replace(b"user1", b"user%d" % sequence) + b"\n" for sequence in (first, first + 1))
            status, _ = server.post(body, "application/x-ndjson", Producer_Id="sender", Sequence=first)
            self.assertEqual(status, 200)
        first, second = one.log, two.log
        both = first.read_bytes() + second.read_bytes()
        lines = both.splitlines(keepends=True)
        orders = {"one after the other": [first, second], "the other way round": [second, first],
                  "after their concatenation": [self.path("both", both), first, second],
                  "after a cut log and a double one": [self.path("head", b"".join(lines[:5])),
                                                       self.path("again", both + both), second, first],
                  "reversed": [self.path("reversed", b"".join(reversed(lines)))],
                  "with a copy between them": [first, self.path("copy", both), second]}
        for order, logs in orders.items():
            with self.subTest(order):
                empty_tables()
                for log in logs:
                    self.processor(log)
                self.processor(*logs)
                self.assertRevenue({f"user{sequence}": 1 for sequence in (1, 2, 3, 4)})

    def test_two_logs_of_one_producer_processed_at_the_same_moment_count_once(self):
        for attempt in range(3):
            empty_tables()
            logs = [self.path(f"log{part}", "".join(with_id(f"p{producer}", sequence, f"user{sequence % 7}")
                                                    for producer in random.sample(range(30), 30)
                                                    for sequence in range(1 + 20 * part, 101 + 20 * part)))
                    for part in range(3)]
            processors = [self.start("data_processor.py", log) for log in logs]
            for processor in processors:
                self.assertEqual(processor.wait(60), 0, processor.stderr.read())
            self.assertEqual(query("SELECT sum(revenue) FROM users_revenue"), [(30 * 140,)])
            self.assertEqual(query("SELECT DISTINCT applied::text FROM event_producers"), [("{[1,141)}",)])

    def test_of_two_processors_that_meet_a_producer_the_second_waits(self):
        for start in (1, 3):
            first, second = (self.path(f"log{n}", with_id("p", n) + with_id("p", n + 1)) for n in (start, start + 1))
            connection = psycopg2.connect(os.environ["DATABASE_URL"])
            with contextlib.closing(connection):
                apply_uncommitted(first, connection)
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
        first, second = (self.path(f"log{n}", with_id("p", n) + with_id("p", 2)) for n in (1, 3))
        self.processor(self.path("known", with_id("p", 9)))
        select_new, other = data_processor.select_new, []

        def decide(*arguments):  # between the reading of the producers and the writing
            other.append(self.start("data_processor.py", second))
            wait_until(lambda: other[0].poll() is not None or waiting(), "the other waits")
            return select_new(*arguments)
        with contextlib.closing(psycopg2.connect(os.environ["DATABASE_URL"])) as connection, connection, \
                unittest.mock.patch.object(data_processor, "select_new", decide):
            apply_uncommitted(first, connection)
        self.assertEqual(other[0].wait(20), 0)
        self.assertRevenue({"user1": 4})

    def test_two_processors_come_between_any_two_statements_of_a_third(self):
        connect = psycopg2.connect

        def intrude(path):
            connection = connect(os.environ["DATABASE_URL"], options="-c lock_timeout=20ms")
            with contextlib.closing(connection), contextlib.suppress(psycopg2.errors.LockNotAvailable):
                apply_uncommitted(path, connection)
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
        paths = [self.path(f"log{a}{b}", with_id("p", a) + with_id("p", b)) for a, b in ((1, 2), (2, 3), (1, 3))]
        for intrusions in itertools.combinations_with_replacement(range(5), 2):
            with self.subTest(intrusions=intrusions):
                empty_tables()
                connection = connect(os.environ["DATABASE_URL"], connection_factory=Interrupted)
                with contextlib.closing(connection):
                    apply_uncommitted(paths[0], connection)
                    connection.commit()
                    self.assertTrue(connection.steps, "nobody came between")
                for path in paths:
                    intrude(path)
                self.assertEqual(query("SELECT revenue FROM users_revenue"), [(3,)])

    def test_two_processors_never_wait_for_each_other(self):
        users = [f"user{number}" for number in range(10_000)]
        logs = [self.path(producer, "".join(with_id(producer, number, user) for number, user in enumerate(order, 1)))
                for producer, order in (("p", users), ("q", users[::-1]))]
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        before = query(deadlocks)
        with locked_users():
            processors = [self.start("data_processor.py", log) for log in logs]
            wait_until(lambda: len(waiting()) == 2, "both wait")
        self.assertEqual([processor.wait(30) for processor in processors], [0, 0])
        wait_until(lambda: query(sessions) == [(1,)], "their sessions have ended and counted their deadlocks")
        self.assertEqual(query(deadlocks), before)

    def test_a_processor_that_commits_while_another_is_at_work_counts_once(self):
        self.processor(self.path("known", with_id("p", 9)))
        paths = [self.path(f"log{n}", with_id("p", n) + with_id("p", n + 1)) for n in (1, 2)]
        connect, begun = psycopg2.connect, []

        def begin_other():
            other = connect(os.environ["DATABASE_URL"], options="-c lock_timeout=100ms")
            self.addCleanup(other.close)
            with contextlib.suppress(psycopg2.errors.LockNotAvailable):
                apply_uncommitted(paths[1], other)
                begun.append(threading.Timer(0.3, other.commit))  # by then the first waits, or is done
                begun[-1].start()

        class Cursor(psycopg2.extensions.cursor):
            def execute(self, *arguments):
                if self.connection.steps == at:
                    begin_other()
                self.connection.steps += 1
                super().execute(*arguments)

        class Interrupted(psycopg2.extensions.connection):
            steps = 0

            def cursor(self, *arguments, **options):
                return super().cursor(*arguments, cursor_factory=Cursor, **options)
        for at in range(4):
            with self.subTest(statement=at):
                query("UPDATE event_producers SET applied = '{[9,10)}'; UPDATE users_revenue SET revenue = 1; "
                      "TRUNCATE event_logs")
                connection = connect(os.environ["DATABASE_URL"], connection_factory=Interrupted)
                with contextlib.closing(connection):
                    apply_uncommitted(paths[0], connection)
                    connection.commit()
                for timer in begun:
                    timer.join()
                self.processor(*paths)
                self.assertRevenue({"user1": 4})
        self.assertGreater(len(begun), 1, "nobody came between")

    def test_rows_are_locked_in_the_order_of_their_bytes(self):
        names = [f"n{number:02}" for number in range(40)]
        backwards = "".join(with_id(name, 1, name) for name in reversed(names))
        held, later = names[20], names[21:]
        lock = {"new producers": "INSERT INTO event_producers (producer_id) SELECT unnest(%s)",
                "known producers": "SELECT FROM event_producers WHERE producer_id = ANY (%s) FOR UPDATE",
                "users": "SELECT FROM users_revenue WHERE user_id = ANY (%s) FOR UPDATE"}
        for case, statement in lock.items():
            connection = psycopg2.connect(os.environ["DATABASE_URL"])
            with self.subTest(case), contextlib.closing(connection), connection.cursor() as sql:
                empty_tables()
                if case != "new producers":
                    query("INSERT INTO event_producers (producer_id) SELECT unnest(%s)", [names[::-1]])
                    query("INSERT INTO users_revenue SELECT unnest(%s), 0", [names[::-1]])
                sql.execute(statement, [[held]])
                processor = self.start("data_processor.py", self.path("log", backwards))
                wait_until(waiting, "the processor waits for what is held")
                sql.execute("SET LOCAL lock_timeout = 100")
                sql.execute(statement, [later])  # which it has not locked yet
                connection.rollback()
                self.assertEqual(processor.wait(20), 0, processor.stderr.read())
                self.assertRevenue(dict.fromkeys(names, 1))

    def test_the_isolation_is_read_committed_whatever_the_database_prefers(self):
        with (unittest.mock.patch.dict(os.environ, PGOPTIONS="-c default_transaction_isolation=serializable"),
              opened_processor(self.path("log")) as processor):
            processor.connect()
            with processor.transaction() as sql:
                sql.execute("SHOW transaction_isolation")
                self.assertEqual(sql.fetchone(), ("read committed",))

    def test_a_processor_that_stands_still_does_not_hold_up_the_others_for_long(self):
        log = self.path("log", with_id("p", 1))
        count_once, outputs = data_processor.count_once, []

        def stand_still(sql, tallies):
            counted = count_once(sql, tallies)
            if not outputs:
                outputs.append(self.processor(log)[0])
            return counted
        with opened_processor(log) as processor, captured(), \
                unittest.mock.patch.multiple(data_processor, count_once=stand_still, IDLE_SECONDS=0.2):
            processor.run()
        self.assertIn("1 applied", outputs[0])
        self.assertRevenue({"user1": 1})

    def test_a_log_that_is_not_the_one_read_before_is_read_to_its_end_in_chunks(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 4)))
        with unittest.mock.patch.multiple(data_processor, CHUNK_BYTES=1, BLOCK_BYTES=150):
            apply(log)
            log.write_text(with_id("p", 1) + "".join(with_id("q", n) for n in range(1, 6)))
            apply(log)
        self.assertRevenue({"user1": 8})

    def test_every_chunk_of_a_changed_log_has_its_lines_without_an_id_refused(self):
        log = self.path("log", with_id("p", 1) + 3 * (EVENT.decode() + "\n"))
        for failed in (False, True, True):
            with opened_processor(log) as processor, captured(), \
                    unittest.mock.patch.multiple(data_processor, CHUNK_BYTES=700, BLOCK_BYTES=200):
                processor.run()
            self.assertEqual(processor.failed, failed)
            log.write_text("".join(with_id("p", n) for n in range(1, 11)) + 4 * (EVENT.decode() + "\n")
                           + "".join(with_id("p", n) for n in range(11, 31)))
        self.assertRevenue({"user1": 3 + 30})

    def test_a_position_never_moves_back(self):
        content = "".join(with_id("p", sequence) for sequence in range(1, 2001))
        log = self.path("log", content)
        self.processor(log)
        position = query("SELECT position FROM event_logs")
        log.write_text(content[:len(content) // 2].rpartition("\n")[0] + "\n")
        output, _ = self.processor(log)
        self.assertIn(" 0 applied", output)
        self.assertEqual(query("SELECT position FROM event_logs"), position)

    def test_a_log_that_was_rewritten_is_read_from_its_start(self):
        content = "".join(with_id("p", sequence) for sequence in range(1, 2001))
        log = self.path("log", content)
        self.processor(log)
        log.write_text(content[:len(content) // 2].rpartition("\n")[0] + "\n")
        self.processor(log)
        rewritten = content.partition("\n")[2].replace("user1", "User1")
        log.write_text(with_id("p", 1) + rewritten + with_id("p", 2001))
        self.processor(log)
        self.assertRevenue({"user1": 2001})
        self.assertEqual(query("SELECT position FROM event_logs"), [(log.stat().st_size,)])

    def test_what_is_counted_was_synced_before(self):
        log = self.path("log", with_id("p", 1))
        with (captured(), opened_processor(log, follow=True) as processor,
              unittest.mock.patch.object(data_processor, "sync_file", side_effect=OSError(errno.EIO, "broken")),
              unittest.mock.patch.object(data_processor.time, "sleep", side_effect=AssertionError("it goes on"))):
            self.assertRaisesRegex(SystemExit, f"^{log}: a sync failed [(]broken[)]", processor.run)
        arguments, environment = patched("data_processor", (
            "import errno\ndef broken(fd): raise OSError(errno.EIO, 'broken')\ndata_processor.sync_file = broken"))
        run = subprocess.run([sys.executable, *arguments, log], env=os.environ | environment, capture_output=True,
                             text=True)
        self.assertEqual((run.returncode, run.stdout), (1, ""))
        self.assertEqual(run.stderr, f"{log}: a sync failed (broken), so it is not counted.\n")
        self.assertEqual((query("SELECT * FROM event_producers"), query("SELECT * FROM event_logs")), ([], []))
        apply(log)
        with unittest.mock.patch.object(data_processor, "sync_file") as sync:
            apply(log)
        sync.assert_not_called()  # nothing was new
        self.assertRevenue({"user1": 1})

    def test_a_last_event_without_its_line_end_counts_once_however_the_log_goes_on(self):
        last = {"without an id": EVENT, "with an id": with_id("p", 1).encode()[:-1]}
        more = {"a line end and an event": b"\n" + EVENT, "CR LF": b"\r\n" + EVENT + b"\n",
                "a blank line": b"\n\n" + EVENT, "the next event on its line": EVENT + b"\n", "a space": b" \n" + EVENT}
        for (what, event), (how, rest) in itertools.product(last.items(), more.items()):
            for beginning in (EVENT + b"\n", b""):
                if not beginning and not rest.startswith(b"\n") and event == EVENT:
                    continue  # with another first line it is another log
                with self.subTest(last=what, more=how, beginning=beginning):
                    empty_tables()
                    log = self.path("log", beginning + event)
                    for _ in range(2):
                        self.assertNotIn("unfinished", self.processor(log)[0])
                    log.write_bytes(log.read_bytes() + rest)
                    glued = not beginning and rest.startswith(EVENT)  # the first line of another log, and no event
                    for status in (int(glued), 0):
                        self.processor(log, status=status)
                    self.assertRevenue({"user1": 2 + bool(beginning) - glued})

    def test_a_log_is_synced_once_for_all_of_its_chunks(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 41)))
        with (captured(), small_slices(1, CHUNK_BYTES=500), opened_processor(log) as processor,
              unittest.mock.patch.object(data_processor, "sync_file") as sync):
            processor.run()
        sync.assert_called_once()
        self.assertRevenue({"user1": 40})

    def test_a_run_gives_up_after_attempts_without_progress_alone(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 41)))
        apply_chunk, calls = data_processor.apply_chunk, itertools.count(1)

        def fail_often(*arguments):
            if next(calls) % 4:
                raise psycopg2.OperationalError("down")
            return apply_chunk(*arguments)
        with (captured(), small_slices(1, CHUNK_BYTES=1000), opened_processor(log) as processor,
              unittest.mock.patch.object(data_processor.time, "sleep"),
              unittest.mock.patch.object(data_processor, "apply_chunk", fail_often)):
            processor.run()
        self.assertGreater(next(calls), 2 * data_processor.ATTEMPTS)
        self.assertRevenue({"user1": 40})

    def test_how_far_a_run_came_ends_with_its_connection(self):
        older = self.path("older", with_id("p", 1) + with_id("p", 2))
        log = self.path("log", with_id("p", 1) + with_id("q", 1) + "".join(with_id("p", n) for n in range(2, 41)))
        self.processor(older)  # the log was changed since: it is read again from its start
        apply_chunk, chunks = data_processor.apply_chunk, []

        def replace_database(*arguments):
            chunks.append(arguments)
            if len(chunks) == 3:  # after two chunks an older database takes the place of this one
                empty_tables()
                self.processor(older)
                terminate_backends()
            return apply_chunk(*arguments)
        with (captured(), small_slices(1, CHUNK_BYTES=500), opened_processor(log) as processor,
              unittest.mock.patch.object(data_processor, "apply_chunk", replace_database)):
            processor.run()
        self.assertGreater(len(chunks), 8)
        self.assertRevenue({"user1": 41})

    def test_which_logs_a_run_has_applied_ends_with_its_connection(self):
        log = self.path("log", with_id("p", 1) + with_id("p", 2) + with_id("p", 3))
        with captured(), opened_processor(log, follow=True) as processor:
            poll(processor)
            log.write_text(with_id("p", 1) + with_id("q", 1))  # which moves no position
            poll(processor)
            self.assertRevenue({"user1": 4})
            query("UPDATE users_revenue SET revenue = 3; DELETE FROM event_producers WHERE producer_id = 'q'")
            terminate_backends()  # the database was replaced by an older one
            poll(processor)
        self.assertRevenue({"user1": 4})

    def test_a_run_notices_that_the_database_knows_less_than_before(self):
        logs = [self.path("log.1", with_id("p", 1)), self.path("log", with_id("p", 2))]
        with captured(), opened_processor(logs[1], follow=True) as processor:
            poll(processor)
            empty_tables()  # restored, and no connection was lost
            poll(processor)
        self.assertRevenue({"user1": 2})
        apply_log, restored = data_processor.Processor.apply_log, []

        def restore_after_first(processor, log):
            found = apply_log(processor, log)
            if not restored:
                restored.append(empty_tables())
            return found
        with (captured(), opened_processor(logs[1]) as processor,
              unittest.mock.patch.object(data_processor.Processor, "apply_log", restore_after_first)):
            processor.run()
        self.assertRevenue({"user1": 2})


# ---- Slices of a chunk ----------------------------------------------------------------------------------------------

class Cores(SystemTest):
    """Each core tallies a slice of a chunk."""

    def test_every_core_tallies_a_slice_and_the_sums_are_those_of_one(self):
        log = self.path("log", "".join(with_id(f"p{n % 3}", n, f"user{n % 7}", f"{n}.5") for n in range(1, 1001)))
        expected = {f"user{user}": sum(Decimal(f"{n}.5") for n in range(1, 1001) if n % 7 == user) for user in range(7)}
        for cores in (1, 2, 5):
            with self.subTest(cores=cores):
                empty_tables()
                children = unittest.mock.Mock(side_effect=data_processor.TallyInChild)
                with (captured(), small_slices(cores), opened_processor(log) as processor,
                      unittest.mock.patch.object(data_processor, "TallyInChild", children)):
                    processor.run()
                self.assertEqual(children.call_count, cores)
                self.assertRevenue(expected)

    def test_a_slice_counts_what_is_new_in_it(self):
        lines = [with_id("p", n, f"user{n % 5}", n) for n in range(1, 101)]
        others = [EVENT.decode() + "\n"] * 10 + ["bad\n", "\n"]
        everything = {f"user{user}": sum(n for n in range(1, 101) if n % 5 == user) for user in range(5)}
        everything["user1"] += 10
        for seed in range(TORTURE_SEED, TORTURE_SEED + 10):
            with self.subTest(seed=seed):
                empty_tables()
                chance = random.Random(seed)
                some = self.path("some", "".join(chance.sample(lines, chance.choice([1, 50, 99]))))
                rest = lines + others + chance.choices(lines, k=chance.choice([1, 50, 200]))
                chance.shuffle(rest)
                with captured(), small_slices(chance.choice([1, 2, 3])), opened_processor(
                        some, self.path("rest", with_id("other", 1, value=0) + "".join(rest))) as processor:
                    processor.run()
                self.assertRevenue(everything)

    def test_a_child_that_dies_is_no_part_of_a_sum(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))
        once, parent = self.path("once"), os.getpid()

        class Dying(data_processor.Tally):
            def __getattribute__(tally, name):
                if name == step and os.getpid() != parent and (forever or once.exists()):
                    once.unlink(missing_ok=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__getattribute__(name)
        for step, forever in itertools.product(("report", "sums", "_add"), (False, True)):
            with self.subTest(step, forever=forever):
                empty_tables()
                once.touch()
                with (captured(), small_slices(2), opened_processor(log) as processor,
                      unittest.mock.patch.multiple(data_processor, Tally=Dying, ATTEMPTS=2)):
                    if forever:
                        with self.assertRaisesRegex(data_processor.ChildDied, "log ended too early: out of memory"):
                            processor.run()
                    else:
                        processor.run()
                        self.assertFalse(once.exists(), "no child died")
                self.assertRevenue({} if forever else {"user1": 100})

    def test_children_end_when_their_parent_is_killed(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 50_001)))
        patch = ("import time; data_processor.usable_cores = lambda: 3; data_processor.SLICE_BYTES = 1000\n"
                 "sums = data_processor.Tally.sums\n"
                 "data_processor.Tally.sums = lambda *arguments: (time.sleep(1), sums(*arguments))[1]")
        arguments, environment = patched("data_processor", patch)
        processor = subprocess.Popen([sys.executable, *arguments, log], env=os.environ | environment)
        self.addCleanup(processor.wait)
        children = wait_until(lambda: children_of(processor.pid), "it has forked")
        processor.kill()
        wait_until(lambda: not any(map(alive, children)), "its children have ended")
        self.processor(log)
        self.assertRevenue({"user1": 50_000})

    def test_a_log_that_cannot_be_read_in_a_child_is_said(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))
        error = OSError(errno.EIO, "Input/output error")
        with (captured() as printed, small_slices(2), opened_processor(log) as processor,
              unittest.mock.patch.object(data_processor, "read_rows", side_effect=error)):
            processor.run()
            self.assertEqual((printed(), processor.failed), (f"{log}: Input/output error.\n", True))

    def test_a_chunk_ends_early_rather_than_keep_too_much(self):
        repeated = 300 * with_id("p", 1)  # a span for each line
        users, ids = ("".join(with_id("p", n, user) for n, user in enumerate(names, 1)) for names in (
            [f"u{n}" for n in range(300)], [f"{n:0100}" for n in range(300)]))
        logs = {"bytes": (repeated, {"CHUNK_BYTES": 1000}), "seconds": (repeated, {"CHUNK_SECONDS": -1}),
                "bad lines": (300 * "x\n", {"KEPT_BYTES": 10_000}), "spans": (repeated, {"KEPT_BYTES": 3000}),
                "users": (users, {"KEPT_BYTES": 3000}), "the users' ids": (ids, {"KEPT_BYTES": 6000})}
        for what, (content, limits) in logs.items():
            last = {}  # {cores: where the chunk ends}
            for cores in (1, 3):
                with (self.subTest(what, cores=cores), small_slices(cores, **limits),
                      opened_reader(self.path("log", content)) as log):
                    with data_processor.tallied(log, 0, False) as tallies:
                        ends = [0] + [tally.report.end for tally in tallies]
                    self.assertEqual([tally.report.start for tally in tallies], ends[:-1])
                    self.assertTrue(0 < ends[-1] < len(content), ends)
                    last[cores] = ends[-1]
            if "KEPT_BYTES" in limits:
                self.assertLess(last[3], last[1], f"{what}: the slices share the limit")
        self.assertLess(3 * data_processor.CHUNK_SECONDS, data_processor.IDLE_SECONDS)

    def test_new_events_are_read_once(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))
        read_rows, reads = data_processor.read_rows, self.path("reads", b"")

        def read_and_note(*arguments):
            with open(reads, "a") as file:  # which the child shares with this process
                file.write("read\n")
            return read_rows(*arguments)
        with unittest.mock.patch.object(data_processor, "read_rows", read_and_note):
            apply(log)
        self.assertEqual(reads.read_text(), "read\n")
        self.assertRevenue({"user1": 100})

    def test_a_log_that_is_cut_between_its_readings_is_not_counted(self):
        for length in (0, len(with_id("p", 1))):
            path = self.path("log", with_id("p", 1) + with_id("p", 2) + with_id("p", 3))
            with self.subTest(length), opened_reader(path) as log:
                tally = data_processor.Tally(log, 0, log.end, False, 10**6)
                os.truncate(path, length)
                self.assertRaisesRegex(OSError, "was changed while it was read", tally.sums, b"\1\0\1")
                self.assertIsNone(log.digest(log.end), "the position behind the end could seem unchanged")

    def test_no_child_outlives_its_chunk(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))

        class Slow(data_processor.Tally):
            def __init__(self, log, start, *arguments):
                if start == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(20)
        with (captured(), small_slices(2), opened_processor(log) as processor,
              unittest.mock.patch.multiple(data_processor, Tally=Slow, ATTEMPTS=1)):
            before = set(children_of(os.getpid()))
            self.assertRaises(data_processor.ChildDied, processor.run)
            self.assertLessEqual(set(children_of(os.getpid())), before)


# ---- Durability -----------------------------------------------------------------------------------------------------

class Durability(SystemTest):
    """An acknowledged event survives, although every step fails once."""

    def append_with_fault(self, log_path, fault, at):
        """Append three events in a child, one system call of which goes wrong; return (exit status, what happened)."""
        report = self.path("report", b"")

        def child():
            state = {"count": 0, "at": at, "fault": fault, "fired": None, "short": False, "synced": b"", "named": False}
            sys.stdout = sys.stderr = None  # what is printed is no system call of the log
            with faulty(FaultySystem, state, log_path), open(report, "ab", buffering=0) as out:
                log = server_module.LogWriter(str(log_path))
                for sequence in range(1, 4):
                    if sequence == 3 and log_path.exists():  # a rotation in between
                        log_path.rename(self.path("rotated"))
                    line = with_id("p", sequence).encode()
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

    def assertAppendSurvives(self, fault, at):
        """Append with a fault at a call, restart, check the logs; return (exit status, report, acknowledged ids)."""
        for name in ("log", "rotated"):
            self.path(name).unlink(missing_ok=True)
        path = self.path("log", with_id("earlier", 1) + '{"torn')
        status, report = self.append_with_fault(path, fault, at)
        self.assertIn(status, (0, 9))
        self.assertNotIn("before the sync", report)
        with opened_log(path) as log, captured():  # the restart
            append(log, with_id("later", 1).encode())
        ids = ids_in(*[path for path in (self.path("rotated"), path) if path.exists()])  # fails on a glued line
        self.assertEqual(len(ids), len(set(ids)))
        acknowledged = {("p", int(n)) for n in re.findall(r"acknowledged (\d)", report)}
        self.assertLessEqual(acknowledged | {("earlier", 1), ("later", 1)}, set(ids), (fault, at, report))
        self.assertLessEqual(set(ids), {("earlier", 1), ("later", 1), ("p", 1), ("p", 2), ("p", 3)})
        return status, report, acknowledged

    def test_an_append_survives_a_fault_at_any_step(self):
        fired = collections.Counter()
        for fault in FaultySystem.FAULTS:
            for at in range(1, 200):
                status, report, acknowledged = self.assertAppendSurvives(fault, at)
                if status == 0 and "fired None" in report:
                    if fault.startswith("short"):
                        if at < 60:
                            continue
                    self.assertEqual(len(acknowledged), 3)
                    break
                fired[fault] += 1
            else:
                self.fail("no append was completed without the fault")
        self.assertGreater(min(fired[fault] for fault in FaultySystem.FAULTS if not fault.startswith("short")), 20)
        self.assertGreaterEqual(min(fired.values()), 3)

    def test_an_event_that_comes_at_any_step_of_another_is_answered(self):
        first, second = with_id("p", 1).encode(), with_id("p", 2).encode()

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
            with opened_log(path) as log, faulty(Interrupted, state, path):
                log.append(first, outcomes.append)
                for other in others:
                    other.join(20)
            if not others:
                break
            self.assertEqual((outcomes, ids_in(path)), ([None, None], [("p", 1), ("p", 2)]), at)
        self.assertGreater(at, 5)

    def test_whoever_comes_during_a_sync_shares_the_next_one(self):
        goes_on, syncs, done = threading.Event(), [], []
        sync = unittest.mock.patch.object(server_module, "sync_file", lambda fd: syncs.append(fd) or goes_on.wait(20))
        with opened_log(self.path("log")) as log, sync:
            threads = [threading.Thread(target=log.append, args=[with_id("p", n).encode(), done.append])
                       for n in range(10)]
            threads[0].start()
            wait_until(lambda: syncs, "the first is syncing")
            for thread in threads[1:]:
                thread.start()
            wait_until(lambda: sum(thread.is_alive() for thread in threads) == 2,
                       "one of the others stays to sync for all")
            goes_on.set()
            for thread in threads:
                thread.join()
        self.assertEqual((len(syncs), done), (2, [None] * 10))

    def test_few_lines_wait_for_the_disk_at_once(self):
        goes_on, syncs, done = threading.Event(), [], []
        sync = unittest.mock.patch.object(server_module, "sync_file", lambda fd: syncs.append(fd) or goes_on.wait(20))
        line = with_id("p", 1).encode()
        with (opened_log(self.path("log")) as log, sync,
              unittest.mock.patch.object(server_module, "GROUP_BYTES", 3 * len(line))):
            threads = [threading.Thread(target=log.append, args=[line, done.append], daemon=True) for _ in range(11)]
            threads[0].start()
            wait_until(lambda: syncs, "the first is syncing")
            for thread in threads[1:]:
                thread.start()
            wait_until(lambda: len(log._group) >= 3, "a group is full")
            time.sleep(0.2)
            self.assertEqual(len(log._group), 3)
            goes_on.set()
            wait_until(lambda: done == [None] * 11, "all are answered", seconds=10)
            for thread in threads:
                thread.join(20)

    def test_an_answer_that_cannot_be_sent_keeps_nobody_else_from_theirs(self):
        goes_on, done, syncs = threading.Event(), [], []

        def fail(_error):
            raise MemoryError
        sync = unittest.mock.patch.object(server_module, "sync_file", lambda fd: syncs.append(fd) or goes_on.wait(20))
        with opened_log(self.path("log")) as log, sync, unittest.mock.patch("sys.excepthook") as hook:
            answers = [done.append, fail, done.append]
            threads = [threading.Thread(target=log.append, args=[with_id("p", number).encode(), answer])
                       for number, answer in enumerate([done.append, *answers], 1)]
            threads[0].start()
            wait_until(lambda: syncs, "the first is syncing")
            for thread in threads[1:]:
                thread.start()
            wait_until(lambda: len(log._group) == 3, "the others are a group")
            goes_on.set()
            for thread in threads:
                thread.join(20)
        self.assertEqual((done, len(ids_in(self.path("log")))), ([None] * 3, 4))
        self.assertIs(hook.call_args[0][0], MemoryError)

    def test_a_lock_that_cannot_be_released_keeps_nobody_from_an_answer(self):
        flock, done = fcntl.flock, []

        def fail(fd, operation):
            if operation == fcntl.LOCK_UN:
                raise OSError(errno.EIO, "stale")
            flock(fd, operation)
        with opened_log(self.path("log")) as log, captured(), \
                unittest.mock.patch.object(server_module.fcntl, "flock", fail):
            log.append(with_id("p", 1).encode(), done.append)
        self.assertEqual([error.strerror for error in done], ["stale"])

    def test_without_memory_for_an_answer_its_connection_ends(self):
        with (opened_log(self.path("log")) as log, serving(log, DRAIN_SECONDS=1) as worker,
              contextlib.ExitStack() as stack):
            wires = [stack.enter_context(socket.create_connection(worker.address, timeout=20)) for _ in range(2)]
            with unittest.mock.patch.object(server_module.Handler, "render", side_effect=MemoryError):
                wires[0].sendall(post(body=EVENT))
                self.assertEqual(wires[0].recv(1), b"")
            wires[1].sendall(post(body=EVENT))
            self.assertEqual(read_answer(wires[1])[0], 200)

    def test_nobody_waits_for_the_lock_of_a_renamed_log(self):
        server = Server(self, "--workers", "1")
        self.assertEqual(server.post(EVENT)[0], 200)
        with open(server.log, "rb") as moved:
            fcntl.flock(moved, fcntl.LOCK_EX)  # as a client that sends it does
            waiting = threading.Thread(target=server.post, args=[EVENT])
            waiting.start()
            waiting.join(0.5)
            self.assertTrue(waiting.is_alive(), "the lock of the log itself is waited for")
            server.log.rename(self.path("moved"))
            waiting.join(5)
            self.assertFalse(waiting.is_alive())
        self.assertEqual([len(ids_in(path)) for path in (self.path("moved"), server.log)], [1, 1])

    def test_a_last_line_is_ended_if_it_is_whole_and_else_cut_off(self):
        line, new = with_id("p", 1).encode(), with_id("new", 1).encode()
        kept = {"an event with an id": line[:-1], "an event without one": EVENT}
        cut = {f"{end} bytes": line[:end] for end in range(1, len(line) - 1)} | {
            "NULs": b"\0" * 10, "two events glued": line[:-1] * 2, "300 KB": b"x" * 300_000,
            "half a character": b"\xe2\x82"}
        path = self.path("log")
        for case, tail in (kept | cut).items():
            with self.subTest(case), opened_log(self.path("log", line + tail)) as log, \
                    warnings_of(server_module) as said:
                append(log, new)
                self.assertEqual(path.read_bytes(), line + (tail + b"\n" if case in kept else b"") + new)
                self.assertEqual(len(said), case in cut)

    def test_a_renamed_log_has_its_last_line_ended_too(self):
        path = self.path("log")
        with opened_log(path) as log, warnings_of(server_module):
            append(log, with_id("p", 1).encode())
            size = path.stat().st_size
            with path.open("a") as torn:
                torn.write("unfinish")  # by another worker, killed then
            path.rename(self.path("renamed"))
            append(log, with_id("p", 2).encode())
        self.assertEqual((self.path("renamed").stat().st_size, ids_in(path)), (size, [("p", 2)]))

    def test_the_log_is_for_its_user_and_group_alone(self):
        previous = os.umask(0)
        try:
            self.assertEqual(stat.S_IMODE(Server(self).log.stat().st_mode), 0o640)
        finally:
            os.umask(previous)

    def test_a_file_system_that_cannot_sync_directories_is_no_failure(self):
        server = Server(self, patch="""
import errno, os
def fail(fd):
    raise OSError(errno.EINVAL, "Invalid argument")
os.fsync = fail
""")
        self.assertEqual(server.post(EVENT)[0], 200)

    def test_a_log_that_cannot_be_opened_any_more_is_waited_for(self):
        self.path("logs").mkdir()
        server = Server(self, "--workers", "1", log="logs/log")
        self.assertEqual(server.post(EVENT)[0], 200)
        self.path("logs").rename(self.path("gone"))
        worker, = server.workers()
        self.assertEqual([server.post(EVENT)[0] for _ in range(2)], [503, 503])
        self.path("logs").mkdir()
        self.assertEqual(server.post(EVENT)[0], 200)
        self.assertEqual((server.workers(), len(ids_in(server.log))), ([worker], 1))
        self.assertEqual([line.split(": ", 1)[1] for line in server.said()],
                         ["the log cannot be written: No such file or directory.", "the log can be written again."])

    def test_a_failed_sync_of_the_directory_is_final_too(self):
        path = self.path("log")
        with opened_log(path) as log, captured():
            path.rename(self.path("rotated"))
            with unittest.mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "Input/output error")):
                self.assertRaises(OSError, append, log, with_id("p", 1).encode())
            self.assertRaises(OSError, append, log, with_id("p", 1).encode())
            self.assertIn("sync failed", log.failed.strerror)

    def test_an_answer_that_is_not_read_yet_is_sent_by_a_thread_of_its_own(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(20)
            handler = server_module.Handler.__new__(server_module.Handler)
            handler.connection, handler.owed, handler.command = ours, threading.Lock(), "POST"
            handler.server = types.SimpleNamespace(deadlines={}, stopping=False)
            handler.close_connection = handler.unread = False
            handler.owed.acquire()
            handler.send(200, b"x" * 10**7)
            self.assertTrue(handler.owed.locked())
            status, _, body = read_answer(theirs)
            self.assertEqual((status, len(body)), (200, 10**7))
            self.assertTrue(handler.owed.acquire(timeout=20))

    def test_a_chunk_counts_once_although_any_step_fails(self):
        def lines(*sequences):
            return "".join(with_id("p", n, f"user{n % 3}") for n in sequences)
        logs = [str(self.path("one", lines(1, 2, 3, 2, 8) + f"bad\n{EVENT.decode()}\n")),
                str(self.path("two", lines(3, 4, 8) + with_id("q", 1)))]
        expected = {"user0": 1, "user1": 4, "user2": 2}

        def run():
            with opened_processor(*logs) as processor:
                try:
                    processor.run()
                    return True
                except (data_processor.Failure, psycopg2.Error, SystemExit):
                    return False

        connect, sleep = data_processor.connect, unittest.mock.patch.object(data_processor.time, "sleep")
        faulty = unittest.mock.patch.object(
            data_processor, "connect", lambda **options: connect(**options, connection_factory=FaultyConnection))
        with sleep, faulty:
            for error in (psycopg2.OperationalError, psycopg2.errors.DeadlockDetected, SystemExit):
                survived = 0
                for at in range(1, 1000):
                    empty_tables()
                    FaultyConnection.fail(error, at)
                    with self.subTest(error.__name__, step=at), captured() as printed:
                        survived += run()
                        if FaultyConnection.steps < at:
                            break
                        FaultyConnection.fail(None, 0)
                        self.assertTrue(run())
                        self.assertIn("not JSON", printed(), "a bad line is reported at least once")
                        self.assertRevenue(expected)
                self.assertGreater(at, 40)
                self.assertRevenue(expected)
                self.assertEqual(survived > 20, error is not SystemExit)

    TAILS = {
        "NULs": b"\0" * 10, "a line of NULs": b"\0" * 10 + b"\n", "an empty line": b"\n", "empty lines": b"\n\n\n",
        "half a character": b"\xe2\x82", "a line with half a character": b"\xe2\x82\n",
        "half a field": b'{"userId": "user1", "na', "an event without a line end": EVENT,
        "an event with an id without a line end": with_id("p", 9).encode()[:-1], "a line of braces": b"}" * 5 + b"\n",
        "CR": b"\r", "CRLF": b"\r\n", "a space": b" ", "a line with a quote": b'"\n', "300 KB": b"x" * 300_000,
        "a line of 300 KB": b"x" * 300_000 + b"\n", "open braces": b"{" * 1000,
        "a line of UTF-16's mark": b"\xff\xfe\n", "two events glued": with_id("p", 9).encode()[:-1] * 2}

    def test_an_unfinished_last_line_harms_no_other_line(self):
        lines = [with_id("p", n, f"user{n}").encode() for n in range(1, 6)]
        content, new = b"".join(lines), with_id("new", 1, "new").encode()
        shapes = {f"cut at byte {end}": content[:end]
                  for end in range(len(b"".join(lines[:2])), len(content) + 1)}
        shapes |= {case: content + tail for case, tail in self.TAILS.items()}
        self.assertGreater(len(shapes), 250)
        with opened_processor(self.path("log"), follow=True) as processor, captured():
            for case, shape in shapes.items():
                with self.subTest(case):
                    empty_tables()
                    last = shape.rpartition(b"\n")[2]
                    kept = shape + b"\n" if self.is_event(last) else shape.removesuffix(last)
                    expected = {f"user{n}": 1 for n, line in enumerate(lines, 1) if line in kept}
                    if case == "an event without a line end":
                        expected["user1"] += 1
                    elif case.startswith("an event with an id"):
                        expected["user1"] += 1
                    path = self.path("log", shape)
                    poll(processor)
                    self.assertRevenue(expected)
                    with opened_log(path) as log:
                        append(log, new)
                    self.assertEqual(path.read_bytes(), kept + new)
                    poll(processor)
                    self.assertRevenue(expected | {"new": 1})

    def is_event(self, text):
        """Tell whether text is a whole event, judged by Python's own parser."""
        try:
            return set(json.loads(text)) >= {"userId", "name", "value"}
        except ValueError:
            return False

    def test_no_line_is_taken_while_a_server_may_take_it_back(self):
        log = self.path("log", with_id("p", 1))
        with open(log, "ab") as server:
            fcntl.flock(server, fcntl.LOCK_EX)
            server.write(with_id("p", 2).encode())
            server.flush()
            processor = self.start("data_processor.py", log)
            with self.assertRaises(subprocess.TimeoutExpired):
                processor.wait(1)
            server.truncate(len(with_id("p", 1)))
        self.assertEqual(processor.wait(20), 0)
        self.assertRevenue({"user1": 1})

    def test_a_log_that_is_rotated_while_it_is_opened_anew_is_followed(self):
        path = self.path("log")
        with opened_log(path) as log:
            path.write_text("unfinish")  # by another worker, killed then
            path.rename(self.path("first"))
            reopen = log.open

            def open_and_rotate():
                fd = reopen()
                if not self.path("second").exists():
                    path.rename(self.path("second"))
                return fd
            with unittest.mock.patch.object(log, "open", open_and_rotate), captured():
                append(log, with_id("p", 1).encode())
        self.assertEqual([self.path(name).stat().st_size for name in ("first", "second")], [0, 0])
        self.assertEqual(ids_in(path), [("p", 1)])

    def traced_fsync(self, steps):
        """Return a stand-in for os.fsync that adds what it would sync to steps; a directory must be the test's own."""
        def fsync(fd):
            directory = stat.S_ISDIR(os.fstat(fd).st_mode)
            self.assertTrue(not directory or os.path.samestat(os.fstat(fd), os.stat(self.directory)))
            steps.append("sync directory" if directory else "sync file")
        return fsync

    def test_a_new_log_has_its_directory_synced(self):
        steps = []
        elsewhere = tempfile.mkdtemp(dir=self.directory)
        os.symlink(self.path("log"), f"{elsewhere}/link")
        with unittest.mock.patch.object(os, "fsync", self.traced_fsync(steps)):
            for path in (f"{elsewhere}/link", self.path("log")):
                with opened_log(path):
                    pass
        self.assertEqual(steps, 2 * ["sync directory"])

    def test_the_client_syncs_what_it_needs_after_a_power_cut(self):
        steps = []

        def trace(name, real):
            return lambda *arguments: (steps.append(name), real(*arguments))[1]
        answer = trace("request", lambda *_: (200, {}, b'{"accepted": 0, "rejected": [{"line": 1, "error": "wrong"}]}'))
        self.path("events.jsonl", EVENT)
        calls = {"fsync": self.traced_fsync(steps), "unlink": trace("unlink", os.unlink)}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        with Recorder(options=[BATCHES], post=answer) as server, captured(), unittest.mock.patch.multiple(os, **calls):
            self.assertEqual(client_module.main([str(self.path("events.jsonl")), "--url", server.url]), 1)
        sync = ["sync file", "sync directory"]
        self.assertEqual(steps, [*sync, "unlink", "request", *sync, "unlink", *sync])

    def small_disk(self):
        """Return a directory on a disk of 64 KiB, or None where none can be mounted."""
        disk = self.path("disk")
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            return None
        self.addCleanup(subprocess.run, ["umount", "--lazy", disk])
        return disk

    def test_a_full_disk_is_answered_with_507_until_there_is_space(self):
        disk = self.small_disk()
        server = Server(self, log="disk/log")

        def limit_files(size):
            for worker in server.workers():
                resource.prlimit(worker, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        if not disk:
            limit_files(64 * 1024)
        acknowledged, statuses = set(), collections.Counter()
        batch = b"".join(EVENT[:-1] + b', "pad": "' + b"x" * 1000 + b'"}\n' for _ in range(10))
        for sequence in range(1, 200, 10):
            status, _ = server.post(batch, "application/x-ndjson", Producer_Id="p", Sequence=sequence)
            statuses[status] += 1
            if status == 200:
                acknowledged |= {("p", n) for n in range(sequence, sequence + 10)}
        self.assertEqual(set(statuses), {200, 507})
        self.assertEqual(set(ids_in(server.log)), acknowledged)
        self.assertEqual(server.ask("GET", "/health")[0], 200)
        if disk:
            subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        else:
            limit_files(resource.RLIM_INFINITY)
        self.assertEqual(server.post(batch, "application/x-ndjson", Producer_Id="p", Sequence=1001)[0], 200)
        self.assertEqual(set(ids_in(server.log)), acknowledged | {("p", n) for n in range(1001, 1011)})
        self.assertEqual({line.split(": ", 1)[1] for line in server.said()},
                         {"the log cannot be written: No space left on device.", "the log can be written again."})

    SLOW_DISK = ("import time; real = server.sync_file; server.STOP_SECONDS = 60\n"
                 "server.sync_file = lambda fd: (time.sleep(0.5), real(fd))")

    def test_answers_keep_their_order_on_a_slow_disk(self):
        server = Server(self, "--workers", "1", patch=self.SLOW_DISK)
        with contextlib.ExitStack() as stack:
            pipelined, closing = ([stack.enter_context(server.connect()) for _ in range(4)] for _ in range(2))
            for wire in pipelined:  # some lead their group, the others' answers are sent by its leader
                wire.sendall(post(body=EVENT) + request("GET", "/health"))
            for wire in closing:
                wire.sendall(post("Connection: close", body=EVENT))
            for wire in pipelined:
                answers = Answers(wire)
                self.assertIn(b"received", read_answer(answers)[2])
                self.assertIn(b"ok", read_answer(answers)[2])
            for wire in closing:
                self.assertEqual(read_answer(wire)[0], 200)

    def test_a_server_that_stops_answers_everyone_on_a_slow_disk(self):
        server = Server(self, "--workers", "1", patch=self.SLOW_DISK)
        self.assertEqual(server.post(EVENT)[0], 200)
        with server.connect(), server.connect() as waiting:  # an idle connection holds nothing up
            size = server.log.stat().st_size
            waiting.sendall(post(body=EVENT))
            wait_until(lambda: server.log.stat().st_size > size, "the event is written, and being synced")
            worker, = server.workers()
            os.kill(worker, signal.SIGSTOP)
            with contextlib.ExitStack() as stack:
                late = [stack.enter_context(server.connect()) for _ in range(50)]  # accepted by the kernel alone
                for wire in late:
                    wire.sendall(post(body=EVENT))
                for number in (signal.SIGTERM, signal.SIGINT):  # a terminal or systemd tells everyone
                    os.kill(worker, number)
                server.process.terminate()
                os.kill(worker, signal.SIGCONT)
                self.assertEqual({read_answer(wire)[0] for wire in (waiting, *late)}, {200})
            self.assertEqual(server.process.wait(20), 0)

    def test_a_failed_sync_ends_the_server_without_an_acknowledgement(self):
        trigger = self.path("trigger")
        server = Server(self, patch=f"""
import errno, os, time
real, failed = server.sync_file, []
def sync(fd):
    if os.path.exists({str(trigger)!r}) and not failed:
        failed.append(time.sleep(0.2))
        raise OSError(errno.ENOSPC, "No space left on device")
    real(fd)
server.sync_file = sync
""")
        self.assertEqual(server.post(EVENT)[0], 200)
        trigger.touch()
        wires = [server.connect() for _ in range(10)]
        answers = []
        for wire in wires:
            wire.sendall(post(body=EVENT))
        for wire in wires:
            with wire, contextlib.suppress(ConnectionError):  # the server ends: some are not accepted any more
                answers.append(read_answer(wire)[0])
        self.assertEqual(set(answers), {503})
        self.assertEqual(server.process.wait(10), 1)
        self.assertIn("Move the log aside", server.errors.read_text())

    def test_a_directory_that_cannot_be_used_is_said_at_the_start(self):
        faults = {"synced": "def fsync(fd):\n    raise OSError(5, 'Input/output error')\nos.fsync = fsync",
                  "opened": "def open(path, *mode, real=os.open):\n    if os.path.isdir(path):\n"
                            "        raise PermissionError(13, 'Permission denied', path)\n"
                            "    return real(path, *mode)\nos.open = open"}
        for case, fault in faults.items():
            with self.subTest(case):
                script, path = patched("server", f"import os\n{fault}")
                ended = subprocess.run([sys.executable, *script, "--port", "0"], cwd=self.directory, timeout=20,
                                       env=os.environ | path, capture_output=True, text=True)
                self.assertEqual((ended.returncode, ended.stdout, ended.stderr.count("\n")), (1, "", 1))
                self.assertIn("Cannot write the log", ended.stderr)


# ---- What an event is -----------------------------------------------------------------------------------------------

class Events(SystemTest):
    """The server and the processor agree on what an event is."""

    def mixed(self):
        """Return all events in a random order, and the numbers of the invalid ones."""
        mixed = [*VALID_EVENTS.values(), *INVALID_EVENTS.values()]
        random.Random(1).shuffle(mixed)
        return mixed, [number for number, event in enumerate(mixed) if event in INVALID_EVENTS.values()]

    def test_the_server_agrees_with_the_processor_on_every_event(self):
        server, revenue = Server(self), "SELECT user_id, revenue FROM users_revenue ORDER BY user_id"
        for events, status in ((VALID_EVENTS, 200), (INVALID_EVENTS | RESERVED, 400)):
            for case, event in events.items():
                with self.subTest(case):
                    self.assertEqual(server.post(event)[0], status)
        self.assertIn(f"{len(VALID_EVENTS)} applied, 0 repeated, 0 rejected", self.processor()[0])
        expected = query(revenue)
        empty_tables()
        mixed, wrong = self.mixed()
        output, errors = self.processor(self.path("plain", b"\n".join(mixed) + b"\n"), status=1)
        self.assertIn(f"{len(VALID_EVENTS)} applied, 0 repeated, {len(wrong)} rejected", output)
        starts = [sum(len(event) + 1 for event in mixed[:number]) for number in wrong]
        self.assertEqual([int(line.split(": ")[1].removeprefix("byte ")) for line in errors.splitlines()], starts)
        self.assertEqual(query(revenue), expected)

    def test_the_lines_of_a_batch_are_judged_one_by_one(self):
        server, (mixed, wrong) = Server(self), self.mixed()
        accepted, rejected = 0, []
        for first in range(0, len(mixed), 8):
            _, answer = server.post(b"\n".join(mixed[first:first + 8]), "application/x-ndjson")
            accepted += answer["accepted"]
            rejected += [first + entry["line"] - 1 for entry in answer["rejected"]]
        self.assertEqual((accepted, rejected), (len(VALID_EVENTS), wrong))

    def test_lines_without_an_event_leave_no_gap_in_the_ids_that_the_server_gives(self):
        server = Server(self, "--workers", "1")
        odd = EVENT[:-1] + b', "x": 1}'
        for _ in range(2):
            server.post(b"\n".join([EVENT, b"", b"{", odd, EVENT]), "application/x-ndjson")
        server.post(EVENT)
        self.assertEqual([sequence for _, sequence in ids_in(server.log)], [1, 2, 3, 4, 5, 6, 7])

    def test_lines_keep_the_ids_that_their_sender_gave(self):
        server = Server(self)
        lines = [EVENT, EVENT[:-1] + b', "x": 1}', b"{", EVENT, b"", EVENT + b" ", EVENT]
        server.post(b"\n".join(lines), "application/x-ndjson", Producer_Id="p", Sequence=11)
        self.assertEqual(ids_in(server.log), [("p", number) for number in (11, 12, 14, 16, 17)])

    def test_one_event_is_one_line(self):
        server = Server(self)
        for body in (EVENT + b"\n" + EVENT, EVENT + b"\n" + EVENT + b"\n"):
            self.assertEqual(server.post(body)[0], 400)
        self.assertEqual(server.post(EVENT + b"\n")[0], 200)
        self.assertEqual(server.log.read_bytes().count(b"\n"), 1)

    def assertIdsInLog(self, valid, invalid):
        """Check that lines with {case: (producerId, sequence)} are applied or rejected, one by one and together."""
        def line(producer, sequence):
            fields = {"producerId": producer, "sequence": sequence}
            return EVENT[:-1] + b"".join(b', "%b": %b' % (name.encode(), value)
                                         for name, value in fields.items() if value is not None) + b"}\n"
        for cases, counts in ((valid, "1 applied, 0 repeated, 0 rejected"),
                              (invalid, "0 applied, 0 repeated, 1 rejected")):
            for case, event_id in cases.items():
                with (self.subTest(case), opened_processor(self.path("single", line(*event_id))) as processor,
                      captured() as printed):
                    empty_tables()
                    processor.run()
                    self.assertIn(counts, printed())
        empty_tables()
        lines = [line(*event_id) for cases in (invalid, valid) for event_id in cases.values()]
        output, _ = self.processor(self.path("log", b"".join(lines)), status=1)
        self.assertIn(f"{len(valid)} applied, 0 repeated, {len(invalid)} rejected", output)

    def test_an_event_id_in_a_log_must_be_valid(self):
        self.assertIdsInLog(
            {"sequence 1": (b'"p"', b"1"), "sequence 2**53 - 1": (b'"p"', b"9007199254740991"),
             "a producer of 64 characters": (b'"' + b"p" * 64 + b'"', b"1"), "sequence 2": (b'"q"', b"2"),
             "sequence 2**53 - 1 of another producer": (b'"q"', b"9007199254740991")},
            {"an empty producer alone": (b'""', None), "sequence 0": (b'"p"', b"0"),
             "sequence 2**53": (b'"p"', b"9007199254740992"), "a negative sequence": (b'"p"', b"-1"),
             "a fraction": (b'"p"', b"1.0"), "a string for a sequence": (b'"p"', b'"1"'),
             "true for a sequence": (b'"p"', b"true"), "null for a sequence": (b'"p"', b"null"),
             "null for a producer": (b"null", b"1"), "an empty producer": (b'""', b"1"),
             "a producer of 65 characters": (b'"' + b"p" * 65 + b'"', b"1"), "a dot in a producer": (b'"p.p"', b"1"),
             "a NUL in a producer": (b'"\\u0000"', b"1"), "an array for a producer": (b"[]", b"1"),
             "a sequence alone": (None, b"3"), "a producer alone": (b'"p"', None), "another fraction": (b'"q"', b"2.0"),
             "sequence 2**53 of another producer": (b'"q"', b"9007199254740992")})

    def test_an_invalid_sequence_continues_no_span(self):
        lines = [with_id("q", sequence) for sequence in (2, "3.0", 2**53 - 1, 2**53)]
        output, _ = self.processor(self.path("log", "".join(lines)), status=1)
        self.assertIn("2 applied, 0 repeated, 2 rejected", output)

    def test_producers_that_alternate_have_spans_of_their_own(self):
        self.processor(self.path("alternating", "".join(map(with_id, "rssr", (1, 2, 3, 4)))))
        self.assertEqual(query("SELECT applied::text FROM event_producers ORDER BY producer_id"),
                         [("{[1,2),[4,5)}",), ("{[2,4)}",)])

    def test_lines_without_an_id_count_each_time_between_others(self):
        plain = EVENT.decode() + "\n"
        mixed = self.path("mixed", plain + with_id("t", 1) + plain + plain + with_id("t", 1) + plain)
        self.assertIn("5 applied, 1 repeated, 0 rejected", self.processor(mixed)[0])

    def test_the_grammar_accepts_what_the_rules_accept_with_the_same_values(self):
        chance, plain, odd = random.Random(TORTURE_SEED), 0, 0
        for _ in range(30_000):
            line = random_line(chance)
            with self.subTest(line=line, seed=TORTURE_SEED):
                try:
                    expected = normal(data_processor.decode_log_line(line))
                except ValueError:
                    expected = None
                _, rows = data_processor.read_rows(line + b"\n", 0, False, [])
                self.assertEqual(list(map(normal, rows)), [expected] if expected else [])
                if data_processor.is_plain(line + b"\n"):
                    plain += 1
                    data_processor.check_event(line)
                odd += expected is None
        self.assertGreater(min(plain, odd), 3000)

    def test_no_line_is_read_otherwise_for_its_neighbours(self):
        chance = random.Random(TORTURE_SEED)
        for _ in range(2000):
            lines = [random_line(chance) for _ in range(chance.randrange(1, 8))]
            alone, bad_alone, bad_together, at = [], [], [], 0
            for number, line in enumerate(lines):
                _, rows = data_processor.read_rows(line + b"\n", at, False, bad_alone)
                alone += [(number, normal(row)) for row in rows]
                at += len(line) + 1
            numbers, rows = data_processor.read_rows(b"\n".join(lines) + b"\n", 0, False, bad_together)
            together = list(zip(numbers, map(normal, rows)))
            self.assertEqual((together, bad_together), (alone, bad_alone), TORTURE_SEED)

    def test_a_stamp_is_put_into_each_line(self):
        lines = b'{"userId": "a%d}%%", "name": "add_revenue", "value": 1}\n{"userId": "b", "x": {}}\n'
        stamped = data_processor.stamp(lines, "p", 7).split(b"\n")[:-1]
        expected = [event | {"producerId": "p", "sequence": sequence}
                    for sequence, event in enumerate(map(json.loads, lines.split(b"\n")[:-1]), 7)]
        self.assertEqual(list(map(json.loads, stamped)), expected)
        self.assertRegex(data_processor.add_log_field(b"\n".join(stamped) + b"\n"),
                         rb'\A.*1, "log": "[0-9a-f]{32}", "producerId": "p", "sequence": 7}\n.*{}, "producerId".*\n\Z')

    def test_the_encodings_of_windows_tools_are_called_by_their_names(self):
        text = EVENT.decode()
        cases = {"UTF-8 with a mark": ("utf-8-sig", "byte order mark (BOM)"),
                 "UTF-16 with a mark": ("utf-16", "not UTF-16"),
                 "UTF-16, little-endian": ("utf-16-le", "not UTF-16"),
                 "UTF-16, big-endian": ("utf-16-be", "not UTF-16")}
        for case, (encoding, words) in cases.items():
            with self.subTest(case), self.assertRaisesRegex(ValueError, re.escape(words)):
                data_processor.check_event(text.encode(encoding))

    def test_bad_lines_cost_their_messages_alone(self):
        log = self.path("log", b"x\n" * 500_000)
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({2**29}, {2**29}))"
        arguments, environment = patched("data_processor", limit)
        run = subprocess.run([sys.executable, *arguments, log], env=os.environ | environment, capture_output=True,
                             text=True)
        self.assertIn("0 applied, 0 repeated, 500,000 rejected", run.stdout, run.stderr[-1000:])

    def test_a_line_that_begins_with_many_blanks_is_too_long(self):
        log = self.path("log", EVENT + b"\n" + b" " * 300_000 + EVENT + b"\n" + EVENT + b"\n")
        output, errors = self.processor(log, status=1)
        self.assertIn("2 applied, 0 repeated, 1 rejected", output)
        self.assertIn(f"byte {len(EVENT) + 1}: an event must be at most 64 KiB long", errors)


# ---- Random input ---------------------------------------------------------------------------------------------------

class Properties(SystemTest):
    """Totals are exact for random events, batches, repetitions, orders, logs and processors."""

    def random_batches(self, chance):
        """Return ({user: sum}, batches): lists of lines with ids, with gaps in their sequences."""
        totals, batches = collections.defaultdict(Decimal), []
        for producer in range(chance.randrange(1, 6)):
            sequence = 1
            for _ in range(chance.randrange(1, 30)):
                lines = []
                for _ in range(chance.choice([1, 1, 2, 10, 100])):
                    value = chance.choice([
                        str(chance.randrange(-1000, 1000)), f"{chance.randrange(10**6)}.{chance.randrange(100):02}",
                        f"{chance.randrange(10**18)}.{chance.randrange(10**18):018}", "1e3", "-2.5E-3"])
                    user = f"user{chance.randrange(chance.choice([1, 10, 1000]))}"
                    name = chance.choice(["add_revenue", "subtract_revenue"])
                    totals[user] += Decimal(value) * (1 if name == "add_revenue" else -1)
                    lines.append(f'{{"userId": "{user}", "name": "{name}", "value": {value}, '
                                 f'"producerId": "p{producer}", "sequence": {sequence}}}\n')
                    sequence += chance.choice([1, 1, 1, 1, 1, 7])
                batches.append(lines)
        return totals, batches

    def test_totals_equal_the_oracle(self):
        self.addCleanup(print, f"[seed {TORTURE_SEED}]", end=" ", file=sys.stderr)
        for seed in range(TORTURE_SEED, TORTURE_SEED + 6):
            chance = random.Random(seed)
            empty_tables()
            with decimal.localcontext(decimal.Context(prec=80)):
                totals, batches = self.random_batches(chance)
            batches += [batch[chance.randrange(len(batch)):] for batch in chance.choices(batches, k=len(batches))]
            chance.shuffle(batches)
            logs = [self.path(f"log{seed}-{n}", "") for n in range(chance.randrange(1, 6))]
            for batch in batches:
                with open(chance.choice(logs), "a") as log:
                    log.write("".join(chance.choice([batch, chance.sample(batch, len(batch))])))
            script, path = patched("data_processor", f"""
data_processor.CHUNK_BYTES = {chance.choice([1, 5000, 10**6])}
data_processor.BLOCK_BYTES = {chance.choice([200, 1000, 262144])}
""")
            processors = [subprocess.Popen(
                [sys.executable, *script, *chance.sample(logs, chance.randrange(1, len(logs) + 1))],
                stdout=subprocess.DEVNULL, env=os.environ | path) for _ in range(chance.randrange(1, 4))]
            self.assertEqual({processor.wait(60) for processor in processors}, {0}, f"seed {seed}")
            self.processor(*logs)
            self.assertRevenue(totals)

    def random_slices(self, chance):
        """Return the reports of a chunk's slices, with spans of two producers and of events without an id."""
        reports = []
        for number in range(chance.randrange(1, 4)):
            spans, line = [], 0
            for _ in range(chance.randrange(6)):
                line += chance.randrange(2)
                producer, first, count = chance.choice(["p", "q", ""]), chance.randrange(30), chance.randrange(1, 9)
                if not producer:
                    first = 1000 * number + line
                spans.append((producer, first, first + count, line))
                line += count
            reports.append(data_processor.Report(0, 0, line, 0, spans, []))
        return reports

    def test_new_ids_are_found_as_sets_would_find_them(self):
        for seed in range(TORTURE_SEED, TORTURE_SEED + 300):
            chance = random.Random(seed)
            known = {(producer, n) for producer in "pq" for n in range(30) if chance.random() < 0.3}
            reports = self.random_slices(chance)
            ids = [[None] * report.lines for report in reports]  # of each slice, that of each line
            for report, row in zip(reports, ids):
                for producer, first, end, line in report.spans:
                    row[line:line + end - first] = [(producer, n) for n in range(first, end)]
            everything = [key for row in ids for key in row if key]
            fresh = {key for key in everything if key[0]} - known
            new = [(producer, n, n + 1) for producer, n in fresh]
            chosen = data_processor.select_new([types.SimpleNamespace(report=report) for report in reports], new)
            chosen = [key for row, marks in zip(ids, chosen) for key, mark in zip(row, marks) if mark]
            with self.subTest(seed=seed):
                self.assertEqual(sorted(key for key in chosen if key[0]), sorted(fresh))
                self.assertEqual(sum(not key[0] for key in chosen), sum(not key[0] for key in everything))


# ---- HTTP -----------------------------------------------------------------------------------------------------------

class Http(SystemTest):
    """A request, byte by byte, is answered with the status that the standard wants."""

    def assertStatus(self, server, status, *pieces):
        """Check an answer's status and shape, and return (headers, decoded body)."""
        answer, headers, body = server.raw(*pieces)
        self.assertEqual((answer, headers.get_content_type()), (status, "application/json"), (pieces[0][:100], body))
        body = json.loads(body)
        if status >= 400:
            self.assertEqual(list(body), ["error"])
        return headers, body

    def assertRefused(self, status, cases):
        """Check that each of {rule: request} gets a status, that none is logged, and that the server goes on."""
        server = Server(self)
        for rule, sent in cases.items():
            with self.subTest(rule):
                self.assertStatus(server, status, sent)
        self.assertEqual(server.log.read_bytes(), b"")
        self.assertStatus(server, 200, post(body=EVENT))

    def test_a_valid_request_is_accepted(self):
        upper = b"%X" % len(EVENT)
        cases = {
            "a length": [post(body=EVENT)], "one chunk": [chunked(EVENT)],
            "two chunks": [chunked(EVENT[:10], EVENT[10:])],
            "an extension and a trailer": [chunked(EVENT, end=b"0;x=y\r\nX-Trailer: 1\r\n\r\n")],
            "a last chunk of three zeros": [chunked(EVENT, end=b"000\r\n\r\n")],
            "upper case in a chunk's size and its coding": [
                post("Transfer-Encoding: Chunked") + upper + b" ; a=\"b\"\r\n" + EVENT + b"\r\n0\r\n\r\n"],
            "upper case and a parameter in the media type": [
                post(body=EVENT, media="Application/JSON; charset=utf-8")],
            "a query": [post(body=EVENT, target="/liveEvent?query")],
            "an absolute target, which wins over Host": [
                post(body=EVENT, target="http://LOCALHOST:1/liveEvent", host="elsewhere")],
            "an empty line before the request": [b"\r\n" + post(body=EVENT)],
            "HTTP/1.0": [post(body=EVENT, version="1.0")],
            "repeated and empty fields": [
                post("Accept: a", "Accept: b", "X-Empty:", "Connection: close", body=EVENT)],
            "a tab and a letter outside ASCII in a field": [post("X: a\tb\u00e4", body=EVENT)],
            "the identity coding": [post("Content-Encoding: Identity", body=EVENT)],
            "a byte at a time": [bytes([byte]) for byte in post(body=EVENT)],
            "line ends within the event": [post(body=b"\r\n{\r\n" + EVENT[1:-1] + b"\n}\n")],
            "5,000 zeros before the length": [post("Content-Length: " + "0" * 5000 + str(len(EVENT))) + EVENT]}
        server = Server(self)
        for rule, pieces in cases.items():
            with self.subTest(rule):
                self.assertStatus(server, 200, *pieces)
        self.assertEqual((len(cases), len(ids_in(server.log))), (17, 17))

    def test_a_loopback_host_is_accepted(self):
        server = Server(self)
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.8.9.10", "[::1]:8000", "[::1]"):
            with self.subTest(host):
                self.assertStatus(server, 200, request("GET", "/health", host=host))

    def test_a_malformed_length_is_refused_with_400(self):
        values = {"a plus sign": "+54", "a minus sign": "-54", "4,400 digits and a letter": "5" * 4400 + "x",
                  "an underscore": "5_4", "digits of another script": "\u0665\u0664".encode().decode("latin-1"),
                  "hexadecimal digits": "0x36", "a list of equal lengths": "54, 54", "nothing": "",
                  "a space between the digits": "5 4", "an exponent": "54e0", "a semicolon": "54;"}
        self.assertRefused(400, {rule: post(f"Content-Length: {value}") + EVENT for rule, value in values.items()})

    def test_a_body_whose_end_is_ambiguous_is_refused_with_400(self):
        length, coding = f"Content-Length: {len(EVENT)}", "Transfer-Encoding: chunked"
        cases = {"two equal lengths": [length, length], "two different lengths": [length, "Content-Length: 7"],
                 "a length and chunks": [length, coding], "an unknown coding": ["Transfer-Encoding: gzip"],
                 "an unknown coding before chunks": ["Transfer-Encoding: gzip, chunked"],
                 "chunks in chunks": ["Transfer-Encoding: chunked, chunked"],
                 "the identity coding": ["Transfer-Encoding: identity"], "no coding": ["Transfer-Encoding:"],
                 "two fields with a coding": [coding] * 2,
                 "a space before the colon": ["Transfer-Encoding : chunked"],
                 "a coding whose name ends alike": ["Transfer-Encoding: xchunked"]}
        self.assertRefused(400, {rule: post(*fields) + EVENT for rule, fields in cases.items()})

    def test_a_malformed_field_is_refused_with_400(self):
        cases = {"a folded line": [" folded"], "a line folded by a tab": ["\tfolded"], "no colon": ["no colon"],
                 "no name": [": no name"], "a space in a name": ["sp ace: x"], "a CR in a value": ["X: a\rb"],
                 "a NUL in a value": ["X: a\0b"], "a NUL in a name": ["X\0: a"],
                 "a bare LF before another field": ["X: a\nTransfer-Encoding: chunked"],
                 "a second Host": ["Host: 127.0.0.1"], "two Authorizations": ["Authorization: a", "Authorization: b"],
                 "a second Content-Type": ["Content-Type: application/json"],
                 "a letter outside ASCII in a name": ["n\u00e4me: x"], "a BEL in a value": ["X: a\ab"],
                 "a DEL in a value": ["X: a\x7f"], "an ESC in a value": ["X: \x1b"]}
        length = f"Content-Length: {len(EVENT)}"
        self.assertRefused(400, {rule: post(length, *fields) + EVENT for rule, fields in cases.items()} | {
            "a CR before the line's end": chunked(EVENT).replace(b"Transfer", b"X: \r\r\nTransfer", 1)})

    def test_a_malformed_event_id_is_refused_with_400(self):
        cases = {"a producer without a sequence": ["Producer-Id: p"], "a sequence without a producer": ["Sequence: 1"],
                 "two producers": ["Producer-Id: p", "Producer-Id: q", "Sequence: 1"],
                 "two sequences": ["Producer-Id: p", "Sequence: 1", "Sequence: 2"]}
        pairs = {"an empty producer": ("", 1), "a producer of 65 characters": ("p" * 65, 1),
                 "a space in the producer": ("p p", 1), "a dot in the producer": ("p.", 1),
                 "a letter outside ASCII in the producer": ("\u00e4", 1), "sequence 0": ("p", 0),
                 "a negative sequence": ("p", -1), "a plus sign in the sequence": ("p", "+1"),
                 "sequence 2**53": ("p", 2**53), "a fraction in the sequence": ("p", "1.0"),
                 "an empty sequence": ("p", ""), "a superscript sequence": ("p", "\u00b2")}
        cases |= {rule: [f"Producer-Id: {producer}", f"Sequence: {sequence}"]
                  for rule, (producer, sequence) in pairs.items()}
        self.assertRefused(400, {rule: post(*fields, body=EVENT) for rule, fields in cases.items()})

    def test_a_malformed_chunk_is_refused_with_400(self):
        coding, rest = post("Transfer-Encoding: chunked"), b"\r\n" + EVENT + b"\r\n0\r\n\r\n"
        sizes = {"a minus sign": b"-36", "a plus sign": b"+36", "a hexadecimal prefix": b"0x36",
                 "an underscore": b"3_6", "no size": b"", "a letter that is no digit": b"g",
                 "a space before the size": b" 36",
                 "a NUL behind the size": b"36\0", "a NUL in an extension": b"36;\0",
                 "a CR in an extension": b"36;a\rb",
                 "a size that is one too small": b"35"}
        self.assertRefused(400, {rule: coding + size + rest for rule, size in sizes.items()} | {
            "a bare LF behind the size": chunked(EVENT).replace(b"36\r\n", b"36\n"),
            "no line end behind the data": chunked(EVENT).replace(b"}\r\n", b"}xx"),
            "bare LFs behind the last chunk": chunked(EVENT, end=b"0\n\n"),
            "a trailer without a colon": chunked(EVENT, end=b"0\r\nno colon\r\n\r\n"),
            "chunks in HTTP/1.0": post("Transfer-Encoding: chunked", version="1.0") + b"36" + rest})

    def test_a_malformed_head_is_refused_with_400(self):
        def head(first, second, third):
            return b"GET /health HTTP/1.1%bHost: localhost%b%b" % (first, second, third)
        self.assertRefused(400, {
            "no Host": post(body=EVENT, host=None),
            "no Host and an absolute target": post(body=EVENT, host=None, target="http://localhost/liveEvent"),
            "HTTP/0.9": b"GET /health\r\n\r\n",
            "a method alone": b"GET\r\n\r\n", "bare LFs": b"GET /health HTTP/1.1\n\n",
            "two spaces": b"GET  /health HTTP/1.1\r\n\r\n",
            "a space behind the version": b"GET /health HTTP/1.1 \r\n\r\n",
            "a space in the target": b"GET /hea lth HTTP/1.1\r\n\r\n", "a small http": b"GET /health http/1.1\r\n\r\n",
            "a letter outside ASCII in the method": b"G\xcbT /health HTTP/1.1\r\n\r\n", "a NUL": b"\0\r\n\r\n",
            "nothing but line ends": b"\r\n\r\n\r\n",
            "a bare LF behind the request line": head(b"\n", b"\r\n", b"\r\n"),
            "a bare LF behind a field": head(b"\r\n", b"\n", b"\r\n"),
            "a bare LF behind the head": head(b"\r\n", b"\r\n", b"\n"),
            "an escape that is not hexadecimal": request("GET", "/userEvents/%zz"),
            "a user who is not UTF-8": request("GET", "/userEvents/%FF")})

    def test_a_body_without_an_event_is_refused_with_400(self):
        self.assertRefused(400, {
            "an empty object": post(body=b"{}"), "1 MiB of spaces": post(body=b" " * 2**20),
            "1 MiB of spaces in chunks": chunked(*[b" " * 2**16] * 16), "length 0": post("Content-Length: 0")})

    def test_what_does_not_exist_is_answered_with_404(self):
        self.assertRefused(404, {
            "the root": request("GET", "/"), "another path": post(body=EVENT, target="/liveEvents"),
            "a slash at the end": post(body=EVENT, target="/liveEvent/"),
            "an unknown user": request("GET", "/userEvents/nobody"),
            "a NUL for a user": request("GET", "/userEvents/%00"),
            "no user": request("GET", "/userEvents"), "the server as a whole": request("OPTIONS", "*"),
            "a tunnel": request("CONNECT", "localhost:80")})

    def test_a_body_without_a_length_is_refused_with_411(self):
        self.assertRefused(411, {"neither a length nor chunks": post()})

    def test_a_body_that_is_too_large_is_refused_with_413(self):
        lengths = {"a length of one byte too much": 2**20 + 1, "a length of 31 digits": 10**30,
                   "a length of 10,000 digits": "9" * 10_000, "a length of 4,001 digits": "1" + "0" * 4000}
        self.assertRefused(413, {rule: post(f"Content-Length: {length}") for rule, length in lengths.items()} | {
            "chunks over 1 MiB": chunked(*[b"x" * 65536] * 17),
            "a chunk of 15 digits": post("Transfer-Encoding: chunked") + b"f" * 15 + b"\r\n",
            "10,001 lines": post(body=b"\n" * 10_001, media="application/x-ndjson")})

    def test_a_target_that_is_too_long_is_refused_with_414(self):
        self.assertRefused(414, {"70,000 bytes": b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"})

    def test_another_media_type_is_refused_with_415(self):
        media = {"none": None, "text": "text/plain", "one that begins alike": "application/jsonx",
                 "a form": "application/x-www-form-urlencoded"}
        self.assertRefused(415, {rule: post(body=EVENT, media=value) for rule, value in media.items()})

    def test_a_compressed_body_is_refused_with_415(self):
        sent = {coding: post(f"Content-Encoding: {coding}", body=EVENT, media=media) for coding, media in (
            ("gzip", "application/x-ndjson"), ("br", "application/json"), ("identity, gzip", "application/json"))}
        self.assertRefused(415, sent)
        _, headers, _ = Server(self, log="second").raw(sent["gzip"])
        self.assertEqual(headers["Accept-Encoding"], "identity")

    def test_an_unknown_expectation_is_refused_with_417(self):
        self.assertRefused(417, {"miracles": post("Expect: miracles", body=EVENT)})

    def test_a_foreign_host_is_refused_with_421(self):
        hosts = {"another name": "example.com", "a name below localhost's": "localhost.example.com",
                 "a name that begins with an address": "127.0.0.1.example.com",
                 "an address for a user": "127.0.0.1@example.com", "another IPv6 address": "[::2]", "an empty name": "",
                 "a port that is no number": "localhost:x", "the address of all interfaces": "0.0.0.0"}
        self.assertRefused(421, {rule: post(body=EVENT, host=host) for rule, host in hosts.items()} | {
            path: request("GET", path, host="example.com") for path in ("/health", "/userEvents/user1", "/other")})

    def test_a_head_that_is_too_large_is_refused_with_431(self):
        self.assertRefused(431, {
            "10,000 fields": post(*[f"X-{i}: x" for i in range(10_000)], body=EVENT),
            "a field of 70,000 bytes": post("X: " + "x" * 70_000, body=EVENT),
            "a trailer of 20,000 fields": chunked(EVENT, end=b"0\r\n" + b"X: x\r\n" * 20_000 + b"\r\n"),
            "20 fields of 8,000 bytes": post(*[f"X-{i}: " + "x" * 8000 for i in range(20)], body=EVENT)})

    def test_another_version_is_refused_with_505(self):
        self.assertRefused(505, {"HTTP/2.0": b"GET /health HTTP/2.0\r\n\r\n",
                                 "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"})

    def test_another_method_is_refused_with_405(self):
        server = Server(self)
        allowed = {"/liveEvent": "POST, OPTIONS", "/health": "GET, HEAD", "/userEvents/user1": "GET, HEAD",
                   "/other": None}
        for path, methods in allowed.items():
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"):
                if methods and method in methods.split(", "):
                    continue
                with self.subTest(f"{method} {path}"), server.connect() as wire:
                    wire.sendall(request(method, path, body=b"" if method == "HEAD" else EVENT))
                    status, headers, body = read_answer(wire, method)
                    self.assertEqual((status, headers["Allow"]), (405, methods) if methods else (404, None))
                    self.assertEqual(bool(body), method != "HEAD")
        self.assertEqual(server.log.read_bytes(), b"")

    def test_options_lists_what_is_accepted(self):
        server, media = Server(self), "application/json, application/x-ndjson"
        status, headers, body = server.ask("OPTIONS", "/liveEvent")
        self.assertEqual((status, headers["Allow"], headers["Accept-Post"], body), (204, "POST, OPTIONS", media, b""))
        self.assertEqual(server.raw(post(body=EVENT, media="text/plain"))[1]["Accept-Post"], media)

    def test_head_is_answered_as_get_without_the_body(self):
        query("INSERT INTO users_revenue VALUES ('user1', 5)")
        server = Server(self)
        for path, status in {"/health": 200, "/userEvents/user1": 200, "/userEvents/nobody": 404,
                             "/liveEvent": 405, "/other": 404}.items():
            with self.subTest(path):
                answers = []
                for method in ("GET", "HEAD"):
                    with server.connect() as wire:
                        wire.sendall(request(method, path, "Connection: close"))
                        answers.append(wire.makefile("rb").read().partition(b"\r\n\r\n"))
                (got, _, body), (head, _, nothing) = [
                    (re.sub(b"Date: .*", b"", head), end, body) for head, end, body in answers]
                self.assertEqual((head, nothing, int(head.split()[1])), (got, b"", status))
                self.assertTrue(body)

    def test_pipelined_requests_are_answered_in_order(self):
        server = Server(self)
        with server.connect() as wire:
            wire.sendall(post(body=EVENT) * 2 + request("GET", "/health") + request("GET", "/other") + chunked(EVENT)
                         + request("GET", "/health", "Connection: close") + post(body=EVENT))
            answers = Answers(wire)
            self.assertEqual([read_answer(answers)[0] for _ in range(6)], [200, 200, 200, 404, 200, 200])
            self.assertEqual(answers.read(), b"")
        self.assertEqual(len(ids_in(server.log)), 3)

    def test_nothing_is_read_after_the_last_request_of_a_connection(self):
        server = Server(self)
        for rule, last in {"Connection: Close": request("GET", "/health", "Connection: Close"),
                           "HTTP/1.0": request("GET", "/health", version="1.0"),
                           "HTTP/1.0 with keep-alive": request("GET", "/health", "Connection: keep-alive",
                                                               version="1.0")}.items():
            with self.subTest(rule), server.connect() as wire:
                wire.sendall(last + post(body=EVENT))
                answers = Answers(wire)
                self.assertEqual((read_answer(answers)[1]["Connection"], answers.read()), ("close", b""))
        self.assertEqual(server.log.read_bytes(), b"")

    def test_an_unread_body_is_never_taken_for_a_request(self):
        server = Server(self)
        smuggled = post(body=EVENT)
        for method, path, media in (("POST", "/other", "application/json"), ("GET", "/health", None),
                                    ("PUT", "/liveEvent", None), ("POST", "/liveEvent", "text/plain")):
            with self.subTest(f"{method} {path}"), server.connect() as wire:
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
                self.assertStatus(server, status, post(*fields, body=body))
            with server.connect() as wire:
                head, _, _ = post(*fields, body=body).partition(body)
                wire.sendall(head)
                select.select([wire], [], [], 20)  # the answer is there, and the sender does not look yet
                for start in range(0, len(body), 100_000):
                    wire.sendall(body[start:start + 100_000])
                self.assertEqual(read_answer(wire)[0], status)

    def test_a_body_that_would_be_refused_is_not_asked_for(self):
        server, expect = Server(self), "Expect: 100-Continue"
        cases = {"another media type": (415, post(expect, "Content-Length: 5", media="text/plain")),
                 "too long": (413, post(expect, f"Content-Length: {2**20 + 1}")),
                 "another path": (404, post(expect, "Content-Length: 5", target="/x")),
                 "an empty body": (400, post(expect, "Content-Length: 0")),
                 "a malformed event id": (400, post(expect, "Content-Length: 5", "Sequence: 1"))}
        for rule, (status, sent) in cases.items():
            with self.subTest(rule), server.connect() as wire:
                wire.sendall(sent)
                self.assertTrue(wire.recv(65536).startswith(b"HTTP/1.1 %d " % status))

    def test_a_body_is_asked_for_when_its_sender_waits(self):
        with Server(self).connect() as wire:
            wire.sendall(post("Expect: 100-Continue", f"Content-Length: {len(EVENT)}"))
            self.assertEqual(wire.recv(65536), b"HTTP/1.1 100 Continue\r\n\r\n")
            wire.sendall(EVENT)
            self.assertEqual(read_answer(wire)[0], 200)

    def test_a_body_is_not_asked_for_when_its_sender_does_not_wait(self):
        server = Server(self)
        for rule, sent in {"no expectation": post(body=EVENT),
                           "HTTP/1.0": post("Expect: 100-Continue", body=EVENT, version="1.0")}.items():
            with self.subTest(rule), server.connect() as wire:
                wire.sendall(sent)
                self.assertTrue(wire.recv(65536).startswith(b"HTTP/1.1 200 "))

    def test_everything_but_health_needs_the_secret(self):
        for secret in ("secret", "Bearer s\u00e9cret"):
            server = Server(self, "--host", "0.0.0.0", EVENTS_AUTHORIZATION=secret, log="log" + secrets.token_hex(4))
            right = "Authorization: " + secret.encode().decode("latin-1")
            wrong = {"missing": [], "empty": ["Authorization: "], "in upper case": ["Authorization: Secret"],
                     "longer": ["Authorization: secrets"], "right and longer": [right + "x"]}
            for rule, fields in wrong.items():
                for method, path in (("POST", "/liveEvent"), ("GET", "/userEvents/user1"), ("OPTIONS", "/liveEvent"),
                                     ("GET", "/x")):
                    with self.subTest(f"{rule}: {method} {path}"):
                        sent = request(method, path, *fields, body=EVENT, host="example.com")
                        headers, _ = self.assertStatus(server, 401, sent)
                        self.assertTrue(headers["WWW-Authenticate"])
            self.assertEqual(server.log.read_bytes(), b"")
            self.assertStatus(server, 200, request("GET", "/health", host="example.com"))
            self.assertStatus(server, 404, request("GET", "/userEvents/user1", right, host="example.com"))
            self.assertStatus(server, 200, post(right, body=EVENT, host="example.com"))

    def test_blanks_around_the_secret_do_not_count(self):
        server = Server(self, EVENTS_AUTHORIZATION=" \tsecret \t")
        self.assertStatus(server, 200, post("Authorization:   secret ", body=EVENT))
        self.assertEqual(Server(self, EVENTS_AUTHORIZATION=" \t", log="second").post(EVENT)[0], 200)

    def test_a_secret_that_no_header_can_carry_is_refused_at_the_start(self):
        for case, secret in {"a line end": "Bearer S3cret\n", "a CR": "S3\rcret", "a DEL": "S3cret\x7f"}.items():
            with self.subTest(case):
                _, errors = self.run_script("server.py", "--port", 0, status=1, EVENTS_AUTHORIZATION=secret)
                self.assertRegex(errors, r"\ACannot use EVENTS_AUTHORIZATION: .*\n\Z")
                self.assertNotIn("S3", errors)

    def test_without_a_secret_the_server_listens_on_loopback_alone(self):
        secrets_missing = {"no secret": {}, "an empty secret": {"EVENTS_AUTHORIZATION": ""}}
        for (case, environment), host in itertools.product(secrets_missing.items(), ("0.0.0.0", "::", "")):
            with self.subTest(case, host=host):
                _, errors = self.run_script("server.py", "--host", host, "--port", 0, status=1, **environment)
                self.assertIn("EVENTS_AUTHORIZATION", errors)
                self.assertEqual(errors.count("\n"), 1)
        self.assertEqual(Server(self, EVENTS_AUTHORIZATION="").post(EVENT)[0], 200)

    def test_a_server_that_cannot_start_says_why_in_a_line(self):
        server = Server(self)
        cases = {"a port in use": (["--port", server.port], "Address already in use"),
                 "a missing directory": (["--log", self.directory / "none" / "log"], "No such file or directory"),
                 "a directory for a log": (["--log", self.directory], "Is a directory"),
                 "a device for a log": (["--log", "/dev/null"], "not a regular file"),
                 "a pipe for a log": (["--log", "/dev/stdout"], "not a regular file"),
                 "a malformed host": (["--host", "a..b"], "Cannot listen on a..b"),
                 "an unknown host": (["--host", "a.invalid"], "Cannot listen on a.invalid")}
        for case, (arguments, words) in cases.items():
            with self.subTest(case):
                _, errors = self.run_script("server.py", "--port", 0, *arguments, status=1)
                self.assertIn(words, errors)
                self.assertEqual(errors.count("\n"), 1)
        for option, value in (("--workers", 0), ("--port", 70_000), ("--port", -1)):
            with self.subTest(option, value=value):
                self.run_script("server.py", option, value, status=2)
        ended = subprocess.run([sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; import server"],
                               cwd=HERE, capture_output=True, text=True)
        self.assertEqual(ended.returncode, 1)
        self.assertRegex(ended.stderr, r"\A.*Linux or macOS.*\n\Z")

    def test_a_request_is_accepted_as_node_streams_it(self):
        server = Server(self, EVENTS_AUTHORIZATION="secret")
        head = (b"POST /liveEvent HTTP/1.1\r\nContent-Type: application/json\r\nAuthorization: secret\r\n"
                b"Host: localhost:8000\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.assertStatus(server, 200, head, b"%x\r\n" % len(EVENT), EVENT, b"\r\n", b"0\r\n\r\n")
        self.assertEqual(len(ids_in(server.log)), 1)

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
                wire.sendall(post(body=EVENT))
            self.assertEqual({read_answer(wire)[0] for wire in wires}, {200})
        self.assertEqual(len(set(ids_in(server.log))), 1000)

    def test_no_peer_keeps_its_connection_for_ever(self):
        health, large = request("GET", "/health"), post(f"Content-Length: {2**30}")
        log = unittest.mock.Mock(failed=None, append=lambda lines, done: threading.Timer(0.1, done, [None]).start())
        soon = {"IDLE_SECONDS": 0.2, "DRAIN_SECONDS": 0.2}
        cases = {"idle after an event": (post(body=EVENT), b"", soon), "idle after health": (health, b"", soon),
                 "reads no answer": (health, 1000 * health, soon),
                 "has not heard of the refusal": (large, b"x" * 10_000, {"DRAIN_BYTES": 2**30, "DRAIN_SECONDS": 0.2}),
                 "sends on and on": (large, b"x" * 10_000, {"DRAIN_BYTES": 10**6, "DRAIN_SECONDS": 30})}
        for case, (begins, goes_on, settings) in cases.items():
            with self.subTest(case), warnings_of(server_module) as said, serving(log, **settings) as worker, \
                    socket.socket() as wire:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                wire.connect(worker.address)
                wire.sendall(begins)
                wait_until(lambda: worker.deadlines, "the connection is accepted")
                wire.setblocking(False)

                def ended():
                    with contextlib.suppress(OSError):
                        wire.send(goes_on)
                    return not worker.deadlines
                wait_until(ended, "the connection is given up")
                self.assertEqual(said, [])

    def test_a_slow_disk_is_waited_for(self):
        pending = []
        log = unittest.mock.Mock(failed=None, append=lambda lines, done: pending.append(done))
        with serving(log, REQUEST_SECONDS=0.1, IDLE_SECONDS=0.1, DRAIN_SECONDS=0.1) as worker:
            with socket.create_connection(worker.address, timeout=20) as waiting:
                waiting.sendall(post(body=EVENT))
                wait_until(lambda: pending, "the event waits for the disk")
                for _ in range(3):
                    with socket.create_connection(worker.address, timeout=20) as idle:
                        self.assertEqual(idle.recv(1), b"")
                pending[0](None)
                self.assertEqual(read_answer(waiting)[0], 200)

    def test_a_failed_append_has_its_status(self):
        log = unittest.mock.Mock(failed=None)
        cases = {"none": (None, 200), "no space": (OSError(errno.ENOSPC, ""), 507),
                 "quota": (OSError(errno.EDQUOT, ""), 507), "file too large": (OSError(errno.EFBIG, ""), 507),
                 "input/output": (OSError(errno.EIO, ""), 503),
                 "memory": (MemoryError(), 503)}
        for case, (error, status) in cases.items():
            def fail(_lines, done):
                done(error)
            log.append = fail
            with self.subTest(case), serving(log, DRAIN_SECONDS=2) as worker, \
                    socket.create_connection(worker.address, timeout=20) as wire:
                wire.sendall(post(body=EVENT))
                self.assertEqual(read_answer(wire)[0], status)

    def test_a_bug_is_answered_with_500(self):
        with serving(unittest.mock.Mock(failed=None), DRAIN_SECONDS=2) as worker, \
                socket.create_connection(worker.address, timeout=20) as wire:
            worker.database.revenue = unittest.mock.Mock(side_effect=ZeroDivisionError)
            with unittest.mock.patch("sys.excepthook") as hook:
                wire.sendall(request("GET", "/userEvents/user1"))
                self.assertEqual(read_answer(wire)[0], 500)
            self.assertIs(hook.call_args[0][0], ZeroDivisionError)

    def test_a_lack_of_memory_ends_no_deadline(self):
        class Deadlines(dict):
            def items(deadlines):
                if not missing:
                    missing.append("memory")
                    raise MemoryError
                return super().items()
        missing, log = [], unittest.mock.Mock(failed=None)
        with serving(log, IDLE_SECONDS=1, DRAIN_SECONDS=1) as worker:
            worker.deadlines = Deadlines()
            with socket.create_connection(worker.address, timeout=20) as idle:
                self.assertEqual(idle.recv(1), b"")
            self.assertEqual(missing, ["memory"])

    def test_a_worker_takes_no_more_connections_than_it_may_hold(self):
        with serving(unittest.mock.Mock(failed=None), MAX_CONNECTIONS=1) as worker, contextlib.ExitStack() as stack:
            first, second = [stack.enter_context(socket.create_connection(worker.address)) for _ in range(2)]
            for wire in (first, second):
                wire.sendall(request("GET", "/health"))
            self.assertEqual(read_answer(first)[0], 200)
            self.assertFalse(select.select([second], [], [], 0.3)[0], "the second is not served yet")
            first.close()
            self.assertEqual(read_answer(second)[0], 200)

    def test_lines_that_wait_for_the_disk_are_bounded(self):
        line, done, goes_on = with_id("p", 1).encode(), [], threading.Event()
        with (opened_log(self.path("log")) as log, unittest.mock.patch.multiple(
                server_module, GROUP_BYTES=2 * len(line), sync_file=lambda fd: goes_on.wait(20))):
            threads = [threading.Thread(target=log.append, args=[line, done.append]) for _ in range(10)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(log._group) == 2, "the second group is full")
            time.sleep(0.2)
            self.assertEqual(len(log._group), 2)
            goes_on.set()
            for thread in threads:
                thread.join(20)
        self.assertEqual(done, [None] * 10)

    def test_few_batches_are_decoded_at_once(self):
        check_lines, decoding, most = server_module.check_lines, [], []

        def count(body, lines):
            decoding.append(body)
            most.append(len(decoding))
            time.sleep(0.1)
            decoding.pop()
            return check_lines(body, lines)
        log = unittest.mock.Mock(failed=None, append=lambda lines, done: done(None))
        with (unittest.mock.patch.object(server_module, "check_lines", count), contextlib.ExitStack() as stack,
              serving(log, DECODED_BATCHES=3) as worker):
            wires = [stack.enter_context(socket.create_connection(worker.address, timeout=20)) for _ in range(8)]
            for wire in wires:
                wire.sendall(post(body=EVENT, media="application/x-ndjson"))
            self.assertEqual({read_answer(wire)[0] for wire in wires}, {200})
        self.assertEqual((len(most), max(most)), (8, 3))

    def test_a_rejected_line_costs_its_message_alone(self):
        tracemalloc.start()
        try:
            accepted, events, rejected = server_module.check_lines(b"x\n" * 10_000, 10_001)
            self.assertLess(tracemalloc.get_traced_memory()[1] / 10_000, 700)
        finally:
            tracemalloc.stop()
        self.assertEqual((accepted, events, len(rejected)), ({}, 0, 10_000))

    def test_a_peer_that_vanishes_at_any_stage_leaves_no_trace(self):
        server = Server(self)
        whole = chunked(EVENT)
        for end in range(0, len(whole), 3):
            for linger in (b"\0" * 8, b"\1\0\0\0\0\0\0\0"):  # a plain close, and a reset
                with server.connect() as wire:
                    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    wire.sendall(whole[:end])
        length = f"Content-Length: {3 * len(EVENT)}"
        for case, part in {"an event": whole[:-1],
                           "a batch whose first part is a batch, too": post(length, media="application/x-ndjson")
                           + EVENT + b"\n"}.items():
            with self.subTest(case), server.connect() as wire:
                wire.sendall(part)
                wire.shutdown(socket.SHUT_WR)
                status, headers, _ = read_answer(wire)
                self.assertEqual((status, headers["Connection"]), (408, "close"))
        self.assertEqual(server.log.read_bytes(), b"")
        self.assertStatus(server, 200, whole)

    def test_an_idle_connection_has_longer_than_a_request(self):
        self.assertGreaterEqual(server_module.IDLE_SECONDS, 75)  # load balancers reuse a connection for 60
        server = Server(self, patch="server.REQUEST_SECONDS = server.DRAIN_SECONDS = 0.2; server.IDLE_SECONDS = 20")
        with server.connect() as wire:
            for sent in (request("GET", "/health"), post(body=EVENT)) * 2:
                time.sleep(1.5)
                wire.sendall(sent)
                self.assertEqual(read_answer(wire)[0], 200)

    def test_answers_of_a_server_that_stops_end_their_connections(self):
        pending = []
        log = unittest.mock.Mock(failed=None, append=lambda lines, done: pending.append(done))
        with contextlib.ExitStack() as stack:
            with serving(log, DRAIN_SECONDS=1) as worker:
                wire = stack.enter_context(socket.create_connection(worker.address, timeout=20))
                wire.sendall(post(body=EVENT))
                wait_until(lambda: pending, "the event waits for the disk")
                threading.Timer(0.5, lambda: pending[0](None)).start()
            self.assertEqual(read_answer(wire)[1]["Connection"], "close")

    def test_a_connection_that_is_too_slow_is_cut_off(self):
        server = Server(self, patch="server.REQUEST_SECONDS = server.IDLE_SECONDS = server.DRAIN_SECONDS = 1")
        with server.connect() as idle, server.connect() as slow, server.connect() as deaf:
            deaf.sendall(post(f"Content-Length: {2**20 + 1}"))
            for byte in post(body=EVENT)[:-1]:
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

    LINES = [EVENT, b"", b"{", EVENT + b"\r", b" \t\r", EVENT.replace(b"1}", b"NaN}")]  # the third and the last are bad

    def test_a_batch_has_its_bad_lines_listed(self):
        server = Server(self)
        for producer in ({}, {"Producer_Id": "p", "Sequence": 2**53 - 6}):
            status, answer = server.post(b"\n".join(self.LINES), "application/x-ndjson", **producer)
            self.assertEqual((status, answer["message"], answer["accepted"]), (200, "Events received", 2))
            self.assertEqual([entry["line"] for entry in answer["rejected"]], [3, 6])
        self.assertEqual([sequence for _, sequence in ids_in(server.log)][2:], [2**53 - 6, 2**53 - 3])

    def test_a_batch_ends_at_the_last_sequence(self):
        two = EVENT + b"\n" + EVENT
        status, _ = Server(self).post(two, "application/x-ndjson", Producer_Id="p", Sequence=2**53 - 1)
        self.assertEqual(status, 400)

    def test_a_batch_has_0_to_10_000_lines(self):
        server = Server(self)
        self.assertEqual(server.post(b"", "application/x-ndjson")[1]["accepted"], 0)
        self.assertEqual(server.post((EVENT + b"\n") * 10_000, "application/x-ndjson")[1]["accepted"], 10_000)

    def test_no_id_that_the_server_gives_is_given_twice(self):
        server = Server(self)
        server.post((EVENT + b"\n") * 10_000, "application/x-ndjson")
        for _ in range(10):  # whichever worker takes it
            server.post(b"\n".join(self.LINES), "application/x-ndjson")
            server.post(EVENT)
        ids = ids_in(server.log)
        self.assertEqual((len(ids), len(set(ids))), (10_030, 10_030))

    def test_the_log_holds_the_text_as_received_with_the_stamp_behind_it(self):
        server = Server(self)
        text = '{"userId":"\u2028\u0085\\u00e9",\r\n "extra": [1.50, {}],"name" :"add_revenue","value":1.50}'.encode()
        server.post(b"\n" + text + b" \r\n", Producer_Id="p", Sequence=7)
        server.post(EVENT)
        first, second = server.log.read_bytes().split(b"\n")[:-1]
        self.assertRegex(first, re.escape(b" " + text.replace(b"\r\n", b"  ")[:-1])
                         + rb', "log": "[0-9a-f]{32}", "producerId": "p", "sequence": 7}')
        self.assertRegex(second, re.escape(EVENT[:-1]) + rb', "producerId": "[A-Za-z0-9_-]{22}", "sequence": 1}')


# ---- The server's processes -----------------------------------------------------------------------------------------

class Processes(SystemTest):
    """The server's processes are replaced, wait for what is missing, and stop in time."""

    def test_a_server_has_a_worker_per_usable_core(self):
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
        self.assertEqual(len(Server(self).workers()), len(cores))
        if hasattr(os, "sched_setaffinity"):
            self.addCleanup(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, {min(cores)})
            self.assertEqual(len(Server(self, log="second").workers()), 1)

    def test_a_server_that_stops_refuses_new_connections_at_once(self):
        server = Server(self)
        with socket.socket() as deaf:  # its answer, which it does not read, keeps the server for some seconds
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", server.port))
            deaf.sendall(post(body=b"x\n" * 10_000, media="application/x-ndjson") * 20)
            time.sleep(0.5)
            server.process.terminate()

            def refused():
                with contextlib.suppress(ConnectionRefusedError), server.connect():
                    return False
                return True
            wait_until(refused, "it refuses connections", 5)
            self.assertIsNone(server.process.poll(), "it ended before anything could be tested")
        self.assertEqual(server.process.wait(20), 0)

    def test_a_worker_that_dies_is_replaced(self):
        # Also with a child of another program, whose exit status is 3, with SIGCHLD ignored, a full disk below stderr,
        # and a fork that fails.
        server = Server(self, "--workers", "2", patch="""
import os, signal, time
fork = os.fork
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
if not fork():
    while not os.path.exists("end"):
        time.sleep(0.01)
    os._exit(3)
def fork_or_fail():
    forks.append(1)
    return fork() if len(forks) != 3 else os.open("", 0)
forks, os.fork = [], fork_or_fail
sys.stderr = open("/dev/full", "w", 1)
""")
        stranger, *workers = server.workers()
        self.path("end", b"")
        wait_until(lambda: server.workers() == workers, "the stranger has ended and is reaped, and the workers stay")
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda: len(server.workers()) == 2 and workers[0] not in server.workers(), "there are two workers")
        for _ in range(8):
            self.assertEqual(server.post(EVENT)[0], 200)

    def test_the_port_is_free_after_the_parent_was_killed(self):
        server = Server(self, "--workers", "3")
        workers = server.workers()
        self.assertEqual(len(workers), 3)
        idle = server.connect()
        self.addCleanup(idle.close)
        server.kill()
        wait_until(lambda: can_bind(server.port) and not any(map(alive, workers)), "port and workers are gone",
                   seconds=1)

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

    def test_a_server_that_is_told_to_stop_leaves_those_who_keep_connecting(self):
        server = Server(self, patch="server.BACKLOG_SECONDS = 0.2")
        over = threading.Event()

        def connect_again_and_again():
            while not over.is_set():
                with contextlib.suppress(OSError), server.connect() as wire:
                    wire.settimeout(1)
                    wire.sendall(post("Connection: close", body=EVENT))
                    wire.recv(100)
        threads = [threading.Thread(target=connect_again_and_again) for _ in range(64)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(ids_in(server.log)) > 100, "they are at it")
            begun = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - begun, 5)
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def test_a_worker_that_stops_empties_the_backlog_for_a_bounded_time(self):
        log, begun = unittest.mock.Mock(failed=None), time.monotonic()
        with unittest.mock.patch.object(server_module.Worker, "accept", return_value=True):  # one more is always there
            with serving(log, BACKLOG_SECONDS=0.1):
                pass
            self.assertLess(time.monotonic() - begun, 5)

    def test_a_worker_that_stops_waits_for_the_disk_for_a_bounded_time(self):
        pending = []
        log = unittest.mock.Mock(failed=None, append=lambda lines, done: pending.append(done))
        with contextlib.ExitStack() as stack:
            with serving(log, BACKLOG_SECONDS=0.1, STOP_SECONDS=0.3) as worker:
                wire = stack.enter_context(socket.create_connection(worker.address, timeout=20))
                wire.sendall(post(body=EVENT))
                wait_until(lambda: pending, "the event waits for the disk")
                begun = time.monotonic()
            self.assertLess(time.monotonic() - begun, 5)
            pending[0](None)

    def test_without_threads_connections_wait_for_one(self):
        server = Server(self, "--workers", "1", patch="""
import threading
start, started = threading.Thread.start, []
def start_or_fail(self):
    started.append(self)
    if 3 < len(started) < 20:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = start_or_fail
""")
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(server.connect()) for _ in range(10)]
            for wire in wires:
                wire.sendall(post(body=EVENT))
            self.assertEqual({read_answer(wire)[0] for wire in wires}, {200})
        self.assertEqual(server.said(), [])

    def test_the_server_outlives_its_output(self):
        for case, streams in {"closed": "1>&- 2>&-", "full": "1>/dev/full 2>/dev/full"}.items():
            with self.subTest(case):
                port = free_port()
                process = subprocess.Popen(
                    ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, HERE / "server.py", "--port", str(port)],
                    cwd=self.directory, env=os.environ | {"DATABASE_URL": "postgresql://localhost:1/x"})
                self.addCleanup(process.kill)
                wait_until(lambda: not can_bind(port), "it listens")
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                with contextlib.closing(connection):
                    connection.request("GET", "/userEvents/user1")  # about which it has something to say
                    self.assertEqual(connection.getresponse().status, 503)
                process.terminate()
                self.assertEqual(process.wait(20), 0)


# ---- The client -----------------------------------------------------------------------------------------------------

class Client(SystemTest):
    """The client delivers a file whole, or says what is not delivered."""

    def setUp(self):
        """Name the file that keeps a delivery."""
        super().setUp()
        self.state = self.path("events.jsonl.delivery")

    def run_client(self, *arguments, patch="", **options):
        """Run client.py, after some lines of Python have changed it, and return its status, stdout and stderr."""
        code, environment = patched("client", patch)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        run = subprocess.run([sys.executable, *code, *map(str, arguments)], cwd=self.directory, timeout=60, text=True,
                             env=os.environ | environment | options.pop("environment", {}), **options)
        self.assertNotIn("Traceback", run.stderr or "")
        return run.returncode, run.stdout, run.stderr

    def interrupted(self, *arguments):
        """Begin a delivery that finds no server, and return the producer id that it keeps."""
        self.client(*arguments, "--url", f"http://localhost:{free_port()}/liveEvent", "--give-up-after", 0, status=1)
        return json.loads(self.state.read_text())["producerId"]

    def rejected_files(self):
        """Return the contents of the files of rejected lines, the oldest first."""
        files = sorted(self.directory.glob("events.jsonl.rejected-*"), key=lambda path: path.stat().st_mtime_ns)
        return [path.read_bytes() for path in files]

    # -- one delivery of a file --

    def test_a_second_client_on_the_same_file_is_refused(self):
        write_events(self.path("events.jsonl"), 3)
        nowhere = "--url", f"http://localhost:{free_port()}/liveEvent"
        self.start("client.py", *nowhere)
        wait_until(lambda: self.state.exists() and self.state.read_text(), "the first client waits for a server")
        before = {path: path.read_bytes() for path in self.directory.iterdir()}
        for arguments in ([], ["--restart"]):
            with self.subTest(arguments=arguments):
                _, errors = self.client(*nowhere, "--give-up-after", 0, *arguments, status=1)
                self.assertIn("is being sent by another client", errors)
                self.assertEqual({path: path.read_bytes() for path in self.directory.iterdir()}, before)

    def test_a_file_that_was_replaced_while_it_was_sent_is_not_sent_by_another_client(self):
        self.path("events.jsonl", EVENT + b"\n")
        url = f"http://127.0.0.1:{free_port()}/liveEvent"
        first = self.start("client.py", "--url", url)
        wait_until(lambda: self.state.exists() and self.state.read_text(), "the first client has begun")
        self.path("new", EVENT + b"\n").rename(self.path("events.jsonl"))
        _, errors = self.client("--restart", "--url", url, status=1)
        self.assertIn("is being sent by another client", errors)
        first.kill()
        _, errors = self.client("--url", url, "--give-up-after", "0", status=1)
        self.assertIn("going on", errors)

    def test_a_client_that_opened_a_removed_delivery_opens_it_anew(self):
        self.path("events.jsonl", EVENT)
        removed, flock = [], fcntl.flock

        def remove_once(file, operation):
            if not removed:
                removed.append(os.unlink(self.state))  # as a client does that is done just now
            flock(file, operation)
        with unittest.mock.patch.object(client_module.fcntl, "flock", remove_once), \
                opened_delivery(self.path("events.jsonl")) as delivery:
            self.assertEqual(json.loads(self.state.read_text())["producerId"], delivery.producer)

    def test_a_file_that_somebody_else_has_locked_is_sent(self):
        server = Server(self)
        with open(self.path("events.jsonl", EVENT + b"\n"), "rb") as moved_log:
            fcntl.flock(moved_log, fcntl.LOCK_EX)
            self.client("--url", server.url, "--give-up-after", 5)
        self.assertEqual(len(ids_in(server.log)), 1)

    def test_a_file_has_one_delivery_whichever_link_leads_to_it(self):
        self.path("elsewhere").mkdir()
        self.path("events.jsonl", EVENT + b"\n")
        self.path("elsewhere/link").symlink_to("../events.jsonl")
        producer = self.interrupted("elsewhere/link")
        server = Server(self)
        self.client("--url", server.url)
        self.assertEqual(ids_in(server.log), [(producer, 1)])

    def test_a_delivery_that_was_given_up_is_continued_later(self):
        events = write_events(self.path("events.jsonl"), 30)
        nowhere = f"http://localhost:{free_port()}/liveEvent"
        _, errors = self.client("--url", nowhere, "--give-up-after", "0.2", status=1)
        self.assertIn("\nDelivery is unknown from line 1 on.\n", errors)
        self.assertIn("Connection refused", errors)
        state = json.loads(self.state.read_text())
        self.assertEqual((state["size"], state["sha256"]),
                         (events.stat().st_size, hashlib.sha256(events.read_bytes()).hexdigest()))
        server = Server(self)
        self.client("--url", server.url)
        self.assertEqual({producer for producer, _ in ids_in(server.log)}, {state["producerId"]})

    def test_a_delivery_that_an_older_client_began_is_continued(self):
        self.path("events.jsonl", EVENT + b"\n")
        producer = self.interrupted()
        self.state.write_text(self.state.read_text().rstrip("\n"))
        server = Server(self)
        self.client("--url", server.url)
        self.assertEqual(ids_in(server.log), [(producer, 1)])

    def test_it_refuses_to_go_on_with_a_changed_file_until_it_is_told_to_restart(self):
        server, state = Server(self), self.state
        events = write_events(self.path("events.jsonl"), 3)
        changes = {"a line was added": (lambda: events.write_bytes(events.read_bytes() + EVENT), "has changed"),
                   "a byte was changed": (lambda: events.write_bytes(
                       events.read_bytes().replace(b': "user', b': "User')), "has changed"),
                   "the producer id is empty": (lambda: state.write_text(
                       re.sub(r'Id": "[^"]+"', 'Id": ""', state.read_text())), "cannot be understood"),
                   "the state is not UTF-8": (lambda: state.write_bytes(b"\xff{\n"), "cannot be understood"),
                   "the state is an array": (lambda: state.write_text("[]\n"), "cannot be understood"),
                   "the state is an empty line": (lambda: state.write_text("\n"), "cannot be understood"),
                   "the state is nested too deep": (lambda: state.write_text("[" * 100_000 + "\n"),
                                                    "cannot be understood")}
        for case, (change, words) in changes.items():
            with self.subTest(case):
                self.interrupted("--restart")
                change()
                before = state.read_bytes()
                _, errors = self.client("--url", server.url, status=1)
                self.assertIn(words, errors)
                self.assertIn("--restart", errors)
                self.assertEqual(state.read_bytes(), before)
        self.assertFalse(server.log.read_bytes())
        self.client("--url", server.url, "--restart")
        self.assertEqual(len(ids_in(server.log)), 4)

    # -- killed or failing at any call --

    def deliver_with(self, sent, fault=None, at=0, restart=False):
        """Run the client in a child in which one call goes wrong; return its status, or None when it made fewer calls.

        The server is a stand-in that adds (producer id, sequence, line) to the file sent, and rejects lines without a
        brace.
        """
        calls = types.SimpleNamespace(count=0, fault=fault, at=at, synced=set())
        systems = {name: FaultyCalls(getattr(client_module, name), calls) for name in ("os", "fcntl")}

        def exchange(_sender, method, body, headers):
            if method == "OPTIONS":
                return BATCHES
            synced = {path for path in (self.state, self.directory)
                      if (path.stat().st_dev, path.stat().st_ino) in calls.synced}
            if synced != {self.state, self.directory} or not self.state.read_bytes().endswith(b"\n"):
                os._exit(98)
            lines, first = body.split(b"\n")[:-1], int(headers["Sequence"])
            with open(sent, "a") as file:
                file.writelines(f"{headers['Producer-Id']} {number} {line.decode()}\n"
                                for number, line in enumerate(lines, first) if b"{" in line)
            bad = [{"line": number, "error": "bad"} for number, line in enumerate(lines, 1) if b"{" not in line]
            return 200, {}, json.dumps({"accepted": len(lines) - len(bad), "rejected": bad}).encode()

        def run():
            sys.stdout = sys.stderr = None
            with unittest.mock.patch.multiple(client_module, **systems), \
                    unittest.mock.patch.object(client_module.Sender, "_exchange", exchange):
                status = client_module.main([str(self.path("events.jsonl")), "--batch-size", "2"]
                                            + ["--restart"] * restart)
            os._exit(97 if fault and calls.count < at else status)
        status = run_in_child(run)
        self.assertNotIn(status, (98, 99), "sent before .delivery was safe" if status == 98 else "an exception")
        return None if status == 97 else status

    LINES = b"".join(b'{"line": %d}\n' % number for number in range(1, 5)) + b"bad\n"

    def begin_with(self, fault, at):
        """Run the client on fresh files with one call that goes wrong; return its status and the file it sent to."""
        for path in self.directory.iterdir():
            path.unlink()
        self.path("events.jsonl", self.LINES)
        sent = self.path("sent", b"")
        return self.deliver_with(sent, fault, at), sent

    def assertSentOnce(self, sent, lines=LINES):
        """Check that every line was sent under one id, and that the bad one was collected once."""
        entries = {tuple(line.split(" ", 2)) for line in sent.read_text().splitlines()}
        texts = sorted(text for _, _, text in entries)
        self.assertEqual(texts, sorted(line for line in lines.decode().splitlines() if "{" in line))
        self.assertEqual(self.rejected_files(), [b"bad\n"])

    def test_no_call_that_fails_or_is_the_last_one_loses_or_doubles_a_line(self):
        for fault in (errno.EIO, errno.ENOSPC, "short", "killed before", "killed after"):
            for at in itertools.count(1):
                status, sent = self.begin_with(fault, at)
                if status is None:
                    break
                with self.subTest(fault=fault, call=at):
                    if self.state.exists():  # else nothing was sent, or the delivery is complete
                        self.assertEqual(self.deliver_with(sent), 1)
                    elif not sent.read_bytes():
                        self.assertEqual(self.deliver_with(sent), 1)
                    self.assertSentOnce(sent)
            self.assertGreater(at, 20, "the faults were not injected")

    def test_a_file_that_changed_after_a_kill_is_sent_once_or_refused(self):
        other = b'{"line": 9}\nbad\n'
        changes = {"replaced": lambda events: self.path("new", other).rename(events),
                   "cut": lambda events: os.truncate(events, self.LINES.index(b"\n") + 1),
                   "appended": lambda events: events.write_bytes(self.LINES + other)}
        for case, change in changes.items():
            for at in itertools.count(1):
                status, sent = self.begin_with("killed before", at)
                if status is None:
                    break
                began = self.state.exists() and self.state.read_bytes().endswith(b"\n")
                before = sent.read_bytes()
                if not began and before:
                    break  # the delivery was complete
                change(self.path("events.jsonl"))
                with self.subTest(case, call=at):
                    if began:
                        self.assertEqual(self.deliver_with(sent), 1)
                        self.assertEqual(sent.read_bytes(), before)
                    sent.write_bytes(b"")
                    self.deliver_with(sent, restart=began)
                    texts = [line.split(" ", 2)[2] for line in sent.read_text().splitlines()]
                    lines = self.path("events.jsonl").read_text().splitlines()
                    self.assertEqual(sorted(texts), sorted(line for line in lines if "{" in line))
            self.assertGreater(at, 20, "the kills were not injected")

    def test_a_torn_delivery_never_needs_restart(self):
        self.path("events.jsonl", EVENT + b"\n")
        self.interrupted()
        line = self.state.read_bytes()
        self.path("events.jsonl", EVENT + b"\n" + EVENT + b"\n")
        for length in range(len(line)):
            self.state.write_bytes(line[:length])
            with opened_delivery(self.path("events.jsonl")) as delivery:
                self.assertEqual(json.loads(self.state.read_text())["producerId"], delivery.producer)
                self.assertNotIn(delivery.producer.encode(), line)

    def test_a_directory_that_cannot_be_synced_is_no_failure(self):
        self.path("events.jsonl", EVENT)
        patch = ("import errno, os, stat\nreal = os.fsync\n"
                 "def fsync(fd):\n if stat.S_ISDIR(os.fstat(fd).st_mode): raise OSError(errno.{0}, '{0}')\n real(fd)\n"
                 "os.fsync = fsync")
        server = Server(self)
        for reason, status in (("EINVAL", 0), ("ENOTSUP", 0), ("EIO", 1)):
            with self.subTest(reason):
                before = len(ids_in(server.log))
                self.assertEqual(self.run_client("--url", server.url, patch=patch.format(reason))[0], status)
                self.assertEqual(len(ids_in(server.log)) - before, 1 - status)

    # -- rejected lines --

    def test_the_rejected_lines_of_an_earlier_delivery_are_kept(self):
        server = Server(self)
        self.path("events.jsonl", b"monday\n" + EVENT)
        _, errors = self.client("--url", server.url, status=1)
        name = re.search(r"The rejected lines are in (\S+); mend them, then send that file\.\n$", errors)[1]
        self.assertEqual(Path(name).read_bytes(), b"monday\n")
        self.path("events.jsonl", b"tuesday\n" + EVENT)
        self.client("--url", server.url, status=1)
        self.assertEqual(self.rejected_files(), [b"monday\n", b"tuesday\n"])

    def test_the_rejected_lines_of_a_continued_delivery_are_not_doubled(self):
        server = Server(self)
        for line, rejected in ((b"bad\n", [b"bad\n"]), (EVENT, [])):
            self.path("events.jsonl", line)
            producer = self.interrupted()
            stale = self.path(f"events.jsonl.rejected-{producer}", b"bad\nand what a killed client wrote")
            self.client("--url", server.url, status=len(rejected))
            self.assertEqual(self.rejected_files(), rejected)
            stale.unlink(missing_ok=True)

    def test_a_delivery_is_kept_until_its_results_are_safe(self):
        seen = []

        def answer(_count, _body):
            seen.append(self.state.exists())
            return 200, {}, b'{"accepted": 1, "rejected": [{"line": 2, "error": "wrong"}]}'
        self.path("events.jsonl", (EVENT + b"\n") * 40)
        producer = self.interrupted()
        with Recorder(options=[BATCHES], post=answer) as server:
            arguments = ["--url", server.url, "--batch-size", "2"]
            self.path(f"events.jsonl.rejected-{producer}").mkdir()
            self.client(*arguments, status=1)
            self.assertTrue(self.state.exists(), "forgotten before the rejected lines were kept")
            self.path(f"events.jsonl.rejected-{producer}").rmdir()
            seen.clear()
            output, _ = self.client(*arguments, status=1)
            self.assertIn("20 events accepted, 20 rejected", output)
            self.assertFalse(self.state.exists())
        self.assertEqual(seen, [True] * 20)
        self.assertEqual({headers["Producer-Id"] for headers, _ in server.posts}, {producer})

    # -- lines and batches --

    def test_batches_are_the_lines_of_the_file(self):
        chance = random.Random(5)
        lines = [b"", b" \t", b"\r", b"x", b"x" * 7, b"\x85\x0b", "é\u2028".encode(), b"x" * 63, b"x" * 64, b"y" * 200]
        for _ in range(300):
            text = b"\n".join(chance.choices(lines, k=chance.randrange(60))) + chance.choice([b"", b"\n"])
            events, size = self.path("events.jsonl", text), chance.choice([1, 2, 5, 100])
            with unittest.mock.patch.object(client_module, "BATCH_BYTES", 64), \
                    opened_delivery(events, restart=True) as delivery:
                batches = list(client_module.read_batches(delivery, size))
            expected = text.split(b"\n")[:-1] if text.endswith(b"\n") else text.split(b"\n") if text else []
            sent = [(number, line) for batch in batches
                    for number, line in enumerate(batch.body.split(b"\n")[:-1], batch.first)]
            long = {number for number, line in enumerate(expected, 1) if len(line) > 63}
            self.assertEqual(sent, [(number, line[:60] + b"..." if number in long else line)
                                    for number, line in enumerate(expected, 1)])
            ends = list(itertools.accumulate(len(line) + 1 for line in expected))
            self.assertEqual([(batch.begin, batch.end) for batch in batches], [
                (([0] + ends)[batch.first - 1], ends[batch.first + batch.lines - 2]) for batch in batches])
            self.assertEqual([batch.lines for batch in batches if batch.first in long], [1] * len(long))
            self.assertEqual(sum(batch.events for batch in batches), sum(bool(line.strip()) for _, line in sent))
            self.assertLessEqual(max((batch.lines for batch in batches), default=0), size)
            self.assertLessEqual(max((len(batch.body) for batch in batches), default=0), 64)
            for batch, following in itertools.pairwise(batches):  # none could have been larger
                self.assertTrue(batch.first in long or following.first in long or batch.lines == size
                                or len(batch.body) + following.body.index(b"\n") + 1 > 64)

    def test_each_line_of_an_odd_file_is_delivered_or_rejected(self):
        server = Server(self)
        huge = b'{"userId": "' + b"x" * 1_600_000 + b'"}'
        bom, long = b"\xef\xbb\xbf" + EVENT, EVENT[:-1] + b', "pad": "' + b"x" * 100_000 + b'"}'
        files = {"empty": (b"", 0, []), "empty lines": (b"\n\r\n \n", 0, []), "no line end": (EVENT, 1, []),
                 "CRLF": (EVENT + b"\r\n", 1, []), "a byte order mark": (bom + b"\n" + EVENT, 1, [bom]),
                 "a line larger than a batch": (huge, 0, [huge]), "a line larger than an event": (long, 0, [long]),
                 "large lines between others": (b"\n".join([EVENT, huge, long, EVENT]), 2, [huge, long]),
                 "a line of two blocks": (b"x" * 2 * 512 * 1024, 0, [b"x" * 2 * 512 * 1024]),
                 "a line of blanks": (b" " * 600_000 + b"\n" + EVENT, 1, [b" " * 600_000]),
                 "CR for a line end": (EVENT + b"\r" + EVENT, 0, [EVENT + b"\r" + EVENT])}
        for case, (content, accepted, rejected) in files.items():
            with self.subTest(case):
                for path in self.directory.glob("events.jsonl*"):
                    path.unlink()
                self.path("events.jsonl", content)
                output, _ = self.client("--url", server.url, status=1 if rejected else 0)
                self.assertIn(f"{accepted} events accepted, {len(rejected)} rejected", output)
                self.assertEqual(self.rejected_files(), [b"\n".join(rejected) + b"\n"] if rejected else [])
        self.processor()

    def test_reading_ahead_is_bounded(self):
        first, attempts = EVENT.replace(b"user1", b"first"), []

        def answer(count, body):
            if first in body:
                attempts.append(count)
            if first in body and len(attempts) < 5:
                return 503, {}, b""
            return 200, {}, b'{"accepted": %d, "rejected": []}' % body.count(b"\n")
        with Recorder(options=[BATCHES], post=answer) as server:
            self.path("events.jsonl", first + b"\n" + (EVENT + b"\n") * 100)
            self.client("--url", server.url, "--batch-size", 1)
        self.assertEqual({body.count(b"\n") for _, body in server.posts}, {1})
        self.assertLess(attempts[-1], 5 + client_module.BATCHES_AHEAD)  # the others waited for the first

    def test_a_batch_is_bounded_in_bytes(self):
        def answer(_count, body):
            return 200, {}, b'{"accepted": %d, "rejected": []}' % body.count(b"\n")
        with Recorder(options=[BATCHES], post=answer) as server:
            self.client(self.path("large", (padded(60_000) + b"\n") * 30), "--url", server.url)
        self.assertLessEqual(max(len(body) for _, body in server.posts), 512 * 1024)

    def test_a_file_that_is_shortened_meanwhile_is_not_taken_for_delivered(self):
        port = free_port()
        events = write_events(self.path("events.jsonl"), 3)
        client = self.start("client.py", "--url", f"http://localhost:{port}/liveEvent")
        wait_until(lambda: self.state.exists() and self.state.read_text(), "the client has begun")
        os.truncate(events, events.read_bytes().index(b"\n") + 1)
        Server(self, port=port)
        self.assertIn("was shortened", client.communicate(timeout=20)[1])
        self.assertEqual((client.returncode, self.state.exists()), (1, True))

    # -- requests --

    def test_it_waits_for_a_server_that_is_not_up_yet(self):
        port = free_port()
        events = write_events(self.path("events.jsonl"), 3)
        client = self.start("client.py", "--url", f"http://localhost:{port}/liveEvent")
        self.assertIn("Waiting for http://localhost", client.stderr.readline())
        events.write_bytes(events.read_bytes() + EVENT)  # what is appended now belongs to another delivery
        Server(self, port=port)
        output, errors = client.communicate(timeout=20)
        self.assertEqual((output[:17], errors), ("3 events accepted", f"http://localhost:{port}/liveEvent answers.\n"))

    def test_the_random_pause_before_a_retry_doubles(self):
        spans = []
        with Recorder(options=[(503, {}, b"")] * 12 + [BATCHES], post=None) as server, \
                unittest.mock.patch.object(client_module.random, "uniform", lambda *span: spans.append(span) or 0):
            self.assertTrue(client_module.Sender(server.url, 30).ask())
        self.assertTrue(all(low < high for low, high in spans))
        self.assertEqual([high for _, high in spans],
                         [min(spans[0][1] * 2**n, client_module.MAX_BACKOFF_SECONDS) for n in range(12)])

    def test_it_gives_up_so_long_after_the_last_success(self):
        times = {}

        def answer(_count, body):
            times.setdefault(body, time.monotonic())
            if body.strip() == b"4":
                return 503, {}, b'{"error": "full"}'
            time.sleep(1)  # three of these take longer than --give-up-after
            return success
        self.path("events.jsonl", b"1\n2\n3\n4\n")
        for case, options, success in (("batches", BATCHES, (200, {}, b'{"accepted": 1, "rejected": []}')),
                                       ("single events", (404, {}, b""), (200, {}, b""))):
            times.clear()
            with self.subTest(case), Recorder(options=[options], post=answer) as server:
                status, _, errors = self.run_client(
                    "--url", server.url, "--batch-size", 1, "--give-up-after", 2.5, "--restart",
                    patch="client.CONCURRENT_REQUESTS = 1")
                self.assertEqual(status, 1)
                self.assertIn("Gave up after 2.5 s", errors)
                self.assertIn("status 503: full", errors)
                self.assertIn("\nDelivery is unknown from line 4 on.\n", errors)
                self.assertGreater(time.monotonic() - max(times.values()), 2.4)

    def test_whatever_succeeds_keeps_it_from_giving_up(self):
        waiting_for = list("234567")

        def answer(_count, body):
            line = body.decode().strip()
            if line == "1":  # is refused until the others have succeeded, two after two
                return (503, {}, b"") if waiting_for else success
            time.sleep(1.3)
            waiting_for.remove(line)
            return success
        success = 200, {}, b'{"accepted": 1, "rejected": []}'
        self.path("events.jsonl", b"1\n2\n3\n4\n5\n6\n7\n")
        with Recorder(options=[BATCHES], post=answer) as server:
            output, _ = self.client("--url", server.url, "--batch-size", 1, "--give-up-after", 2.5)
        self.assertIn("7 events accepted", output)

    def test_a_server_that_dribbles_is_not_waited_for_without_end(self):
        for method in (b"OPTIONS", b"POST"):
            with self.subTest(method), dribbling(method) as url:
                self.path("events.jsonl", EVENT)
                begun = time.monotonic()
                _, errors = self.client("--url", url, "--give-up-after", "1", "--restart", status=1)
                self.assertIn("Gave up after 1 s", errors)
                self.assertLess(time.monotonic() - begun, 10)

    def test_a_stopped_client_does_not_count_the_time_that_it_stood_still(self):
        seen = threading.Event()

        def answer(_count, _body):
            seen.set()
            time.sleep(3)
            return 200, {}, b'{"accepted": 1, "rejected": []}'
        self.path("events.jsonl", EVENT)
        with Recorder(options=[BATCHES], post=answer) as server:
            client = self.start("client.py", "--url", server.url, "--give-up-after", "1")
            seen.wait(10)
            client.send_signal(signal.SIGSTOP)
            time.sleep(2.5)
            client.send_signal(signal.SIGCONT)
            output, errors = client.communicate(timeout=20)
            self.assertIn("1 events accepted", output, errors)

    def test_a_wrong_secret_stops_it_with_the_words_of_the_server(self):
        secret = {"EVENTS_AUTHORIZATION": "Bearer s\u00e9cret"}
        server = Server(self, **secret)
        write_events(self.path("events.jsonl"), 3)
        for case, wrong in {"none": {}, "a blank": {"EVENTS_AUTHORIZATION": " "},
                            "another": {"EVENTS_AUTHORIZATION": "other"}}.items():
            with self.subTest(case):
                _, errors = self.client("--url", server.url, status=1, **wrong)
                words = "status 401: the Authorization header is missing or wrong. Set EVENTS_AUTHORIZATION"
                self.assertIn(words, errors)
                self.assertNotIn("other", errors)
        self.client("--url", server.url, **secret)
        self.assertEqual(len(ids_in(server.log)), 3)

    def test_blanks_around_the_secret_are_not_sent(self):
        self.path("events.jsonl", EVENT)
        for secret, sent in (("\t a b \t", "a b"), (" \t", None), ("", None)):
            with self.subTest(secret), Recorder(options=[BATCHES], post=lambda count, body: (
                    200, {}, b'{"accepted": 1, "rejected": []}')) as server:
                self.client("--url", server.url, EVENTS_AUTHORIZATION=secret)
                self.assertEqual([headers["Authorization"] for headers, _ in server.posts], [sent])

    def test_a_server_of_single_events_is_sent_one_at_a_time(self):
        def answer(_count, body):
            return (refused, {}, b'{"error": "no"}') if b"bad" in body else (200, {}, b"Event received")
        for options, refused in ((404, 400), (405, 413), (501, 422), (200, 400)):
            with self.subTest(options=options), Recorder(options=[(options, {}, b"")], post=answer) as server:
                self.path("events.jsonl", EVENT + b"\n\n" + EVENT.replace(b"user1", b"bad") + b"\r\n" + EVENT)
                output, errors = self.client("--url", server.url, "--batch-size", 3, status=1)
                self.assertIn("2 events accepted, 1 rejected", output)
                self.assertIn("events.jsonl:3: no\n", errors)
                self.assertEqual([(headers["Content-Type"], headers["Sequence"], json.loads(body)["userId"])
                                  for headers, body in sorted(server.posts, key=lambda sent: sent[0]["Sequence"])],
                                 [("application/json", sequence, user)
                                  for sequence, user in (("1", "user1"), ("3", "bad"), ("4", "user1"))])
                self.assertEqual(len({headers["Producer-Id"] for headers, _ in server.posts}), 1)

    def test_a_line_too_long_for_a_batch_is_rejected_by_a_server_of_single_events(self):
        def answer(_count, body):
            try:
                json.loads(body)
            except ValueError:
                return 413, {}, b'{"error": "too long"}'
            return 200, {}, b"Event received"
        long = EVENT + b" " * 600_000  # JSON, if it were sent whole or cut among the blanks
        self.path("events.jsonl", long + b"\n" + EVENT)
        with Recorder(options=[(404, {}, b"")], post=answer) as server:
            output, errors = self.client("--url", server.url, status=1)
        self.assertIn("1 events accepted, 1 rejected", output)
        self.assertIn("events.jsonl:1: too long\n", errors)
        self.assertEqual(self.rejected_files(), [long + b"\n"])
        self.assertLessEqual(max(len(body) for _, body in server.posts), 512 * 1024)

    FULL = b'{"accepted": 2, "rejected": [{"line": 2, "error": "e"}]}'

    def assertTriedAgain(self, answers):
        """Check that a batch with each of {case: answer} is sent again under the same id, four of them in a run."""
        cases = list(answers)
        for group in [cases[first:first + 4] for first in range(0, len(cases), 4)]:
            now = [answers[case] for case in group] + [(200, {}, self.FULL)]
            with self.subTest(", ".join(group)), Recorder(options=[(503, {}, b""), None, BATCHES],
                                                          post=lambda count, body: now[count]) as server:
                self.path("events.jsonl", (EVENT + b"\n") * 3 + b"\n")
                output, errors = self.client("--url", server.url, status=1)
                self.assertIn("2 events accepted, 1 rejected", output)
                self.assertIn("events.jsonl:2: e\n", errors)
                self.assertEqual(len(server.posts), len(now))
                self.assertEqual(len({(headers["Producer-Id"], headers["Sequence"], body)
                                      for headers, body in server.posts}), 1)

    def test_a_batch_without_a_final_status_is_tried_again_under_the_same_id(self):
        self.assertTriedAgain({
            "500": (500, {}, b"oops"), "503 with Retry-After": (503, {"Retry-After": "1"}, b""),
            "507": (507, {}, b"{}"), "429": (429, {}, b""), "201": (201, {}, self.FULL),
            "a cut connection": None, "408": (408, {}, b""),
            "502": (502, {}, b""), "malformed chunks": (200, {"Transfer-Encoding": "chunked"}, self.FULL)})

    def test_a_batch_without_a_complete_answer_is_tried_again_under_the_same_id(self):
        def rejected(accepted, *lines):
            entries = ", ".join(f'{{"line": {line}, "error": "e"}}' for line in lines)
            return f'{{"accepted": {accepted}, "rejected": [{entries}]}}'.encode()
        self.assertTriedAgain({case: (200, {}, body) for case, body in {
            "nothing": b"", "HTML": b"<html>", "an array": b"[]", "nested too deep": b"[" * 100_000,
            "no rejected": b'{"accepted": 3}', "too few accepted": rejected(1),
            "an endless line number": rejected(2, "1e999"),
            "a fraction for a line number": rejected(2, "2.0"), "an empty line rejected": rejected(2, 4),
            "a line behind the batch": rejected(2, 9), "a line twice": rejected(1, 2, 2),
            "no accepted": b'{"rejected": []}', "a line twice, one too many": rejected(2, 2, 2),
            "a negative number accepted": rejected(-1, 1, 2, 3, 4)}.items()})

    def test_a_redirect_or_a_refused_batch_is_no_delivery(self):
        elsewhere = {"Location": "/elsewhere"}
        for status, headers, advice in ((301, elsewhere, ""), (302, elsewhere, ""), (303, {}, ""), (403, {}, ""),
                                        (413, {}, " Lower --batch-size.")):
            with self.subTest(status=status), Recorder(options=[BATCHES], post=lambda count, body: (
                    status, headers, b'{"error": "words"}')) as server:
                self.path("events.jsonl", EVENT)
                _, errors = self.client("--url", server.url, "--restart", status=1)
                self.assertIn(f"answered with status {status}: words.{advice}\nDelivery is unknown from line 1 on.\n",
                              errors)
                self.assertEqual(len(server.posts), 1)

    ANSWERS = {"1": (200, {}, b'{"accepted": 1, "rejected": []}'), "2": (401, {}, b""), "3": (503, {}, b""),
               "4": (200, {}, b'{"accepted": 1, "rejected": []}')}  # to the user of each line

    def test_a_refusal_ends_the_run_with_the_first_line_that_is_unknown(self):
        self.path("events.jsonl", "".join(f'{{"userId": "{user}"}}\n' for user in self.ANSWERS))
        for case, options in (("batches", BATCHES), ("single events", (404, {}, b""))):
            with self.subTest(case), Recorder(options=[options], post=lambda count, body: (
                    self.ANSWERS[json.loads(body)["userId"]] if body else None)) as server:  # it ended in the midst
                _, errors = self.client("--url", server.url, "--batch-size", 1, "--give-up-after", 1000, status=1)
                self.assertTrue(errors.endswith("\nDelivery is unknown from line 2 on.\n"), errors)

    # -- what is printed --

    def test_progress_is_shown_on_a_terminal_alone(self):
        parent, terminal = os.openpty()
        self.addCleanup(os.close, parent)
        self.path("events.jsonl", EVENT + b"\n")
        patch = ("import itertools, time, types\n"
                 "client.time = types.SimpleNamespace(sleep=time.sleep, monotonic=itertools.count(0, 5).__next__)")
        with Recorder(options=[BATCHES],
                      post=lambda count, body: (200, {}, b'{"accepted": 1, "rejected": []}')) as server:
            arguments = ("--url", server.url, "--give-up-after", 1000)
            self.assertEqual(self.run_client(*arguments, patch=patch, stderr=terminal)[0], 0)
            os.close(terminal)
            self.assertIn(b"\r\033[K1 events, 100%", os.read(parent, 10_000))
            self.assertNotIn("100%", self.run_client(*arguments, patch=patch)[2])

    def test_output_that_cannot_be_written_changes_no_outcome(self):
        server = Server(self)
        receiver, broken = os.pipe()
        os.close(receiver)
        self.addCleanup(os.close, broken)
        full = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, full)
        for name, closing in (("stdout", "exec >&-"), ("stderr", "exec 2>&-")):
            for case, stream in (("broken", broken), ("full", full), ("closed", None)):
                with self.subTest(name, case=case):
                    before = len(ids_in(server.log))
                    self.path("events.jsonl", EVENT + b"\nbad\n")
                    command = [sys.executable, HERE / "client.py", "--url", server.url]
                    if stream is None:
                        command = ["sh", "-c", f'{closing}; exec "$@"', "sh", *command]
                    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                    run = subprocess.run(command, cwd=self.directory, **streams | ({name: stream} if stream else {}))
                    self.assertEqual((run.returncode, self.state.exists()), (1, False))
                    self.assertEqual(len(ids_in(server.log)) - before, 1)
        self.path("events.jsonl", EVENT)
        for arguments in (["--url", server.url], ["--help"]):
            run = subprocess.run([sys.executable, HERE / "client.py", *arguments], cwd=self.directory, stdout=full)
            self.assertEqual(run.returncode, 0)

    def test_no_text_from_elsewhere_is_obeyed_by_a_terminal(self):
        events = self.path("журнал\udcff\033[2J.jsonl", EVENT)
        words = json.dumps({"error": "a\033[31mb\r\nc\u0085 \u202e \ud800 é"}).encode()
        with Recorder(options=[(404, {}, b"")], post=lambda count, body: (400, {}, words)) as server:
            for encoding, name in (("ascii", "\\u0436\\u0443\\u0440\\u043d\\u0430\\u043b"), ("utf-8", "журнал")):
                with self.subTest(encoding):
                    _, errors = self.client(events.name, "--url", server.url, "--restart", status=1,
                                            PYTHONIOENCODING=encoding)
                    self.assertIn(f"{name}\\udcff\\x1b[2J.jsonl:1: a\\x1b[31mb\\r\\nc\\x85 \\u202e \\ud800 ", errors)
                    self.assertTrue(errors.replace("\n", "").isprintable())

    def test_no_password_is_printed(self):
        self.path("events.jsonl", EVENT)
        cases = {"in --url": (["--url", "http://till:S3cret@localhost:1/liveEvent"], {}, 2),
                 "in --url, with a slash": (["--url", "http://till:S3cret/x@localhost:1/liveEvent"], {}, 2),
                 "in the place of the file": (["http://till:S3cret@localhost/"], {}, 1),
                 "in the place of nothing": (["events.jsonl", "http://till:S3cret@localhost/"], {}, 2),
                 "in a header with a line end": ([], {"EVENTS_AUTHORIZATION": "S3cret\r\nX: y"}, 1),
                 "in a header with a NUL's neighbour": ([], {"EVENTS_AUTHORIZATION": "S3cret\x01"}, 1),
                 "in a header": (["--url", "http://127.0.0.1:1/"], {"EVENTS_AUTHORIZATION": "S3cret"}, 1),
                 "in a malformed proxy": (["--url", "http://example.invalid/"], {"http_proxy": "http://u:S3cret"}, 1)}
        for case, (arguments, environment, status) in cases.items():
            with self.subTest(case):
                output, errors = self.client(*arguments, "--give-up-after", 0, status=status, **environment)
                self.assertNotIn("S3cret", output + errors)
                self.assertTrue(errors)
        self.assertIn("EVENTS_AUTHORIZATION is malformed", self.client(status=1, EVENTS_AUTHORIZATION="a\nb")[1])

    def test_what_is_typed_wrong_is_said_in_a_sentence(self):
        os.mkfifo(self.path("pipe"))
        self.path("e", EVENT)
        cases = {"a missing file": (["missing"], 1, "missing: No such file or directory"),
                 "a directory": ([self.directory], 1, "Is a directory"),
                 "a pipe": (["pipe"], 1, "pipe is not a regular file."),
                 "a device": (["/dev/null"], 1, "/dev/null is not a regular file."),
                 "a directory that is missing": (["missing/e"], 1, "No such file or directory"),
                 "batches of 0": (["--batch-size", "0"], 2, "--batch-size must be"),
                 "batches of 10,001": (["--batch-size", "10001"], 2, "--batch-size must be"),
                 "a negative time": (["--give-up-after", "-1"], 2, "--give-up-after must"),
                 "a URL without a scheme": (["--url", "localhost:8000"], 2, "--url must look like"),
                 "a URL with half an address": (["--url", "http://[::1/"], 2, "--url must look like"),
                 "a URL with a port too large": (["--url", "http://localhost:99999/"], 2, "--url must look like"),
                 "a URL of FTP": (["--url", "ftp://x/"], 2, "--url must look like"),
                 "a malformed host": (["e", "--url", "http://a..b/liveEvent"], 1, "is malformed")}
        for case, (arguments, status, words) in cases.items():
            with self.subTest(case):
                _, errors = self.client(*arguments, status=status)
                self.assertIn(words, errors)

    def test_a_full_disk_is_said_in_a_sentence(self):
        self.path("events.jsonl", EVENT)
        _, _, errors = self.run_client(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20)))
        self.assertIn("events.jsonl: File too large. Give client.py a file that it can read, in a directory where it "
                      "can write, then", errors)

    def test_a_missing_module_is_said_in_a_sentence(self):
        server = Server(self)
        self.path("events.jsonl", EVENT)
        run = subprocess.run([sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; import client"],
                             cwd=HERE, capture_output=True, text=True)
        self.assertEqual((run.returncode, run.stderr),
                         (1, "client.py locks files with fcntl: it needs Linux or macOS, or WSL on Windows.\n"))
        without = ["-c", "import sys; sys.modules['ssl'] = None; import client; sys.exit(client.main())"]
        for url, status, words in (("https://localhost/", 2, "no ssl module"), (server.url, 0, "")):
            with self.subTest(url):
                run = subprocess.run([sys.executable, *without, "--url", url], cwd=self.directory, capture_output=True,
                                     text=True, env=os.environ | {"PYTHONPATH": str(HERE)})
                self.assertEqual((run.returncode, words in run.stderr), (status, True), run.stderr)

    # -- signals --

    def test_a_delivery_that_a_signal_ended_is_continued_later(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 100_000)
        producers = set()
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(number.name):
                size = server.log.stat().st_size
                client = self.start("client.py", "--url", server.url, "--batch-size", "50")
                wait_until(lambda: server.log.stat().st_size > size + 100_000, "the client is at it")
                client.send_signal(number)
                output, errors = client.communicate(timeout=5)
                self.assertEqual((output, client.returncode), ("", status))
                self.assertNotIn("Traceback", errors)
                producers.add(json.loads(self.state.read_text())["producerId"])
        self.client("--url", server.url)
        self.assertEqual({producer for producer, _ in ids_in(server.log)}, producers)
        self.processor()
        self.assertRevenue(oracle(events))

    def test_a_hanging_server_does_not_hold_up_the_end(self):
        self.path("events.jsonl", EVENT)
        with dribbling(b"POST") as url:
            client = self.start("client.py", "--url", url)
            wait_until(lambda: self.state.exists() and self.state.read_text(), "the client has begun")
            time.sleep(0.5)
            client.send_signal(signal.SIGTERM)
            self.assertEqual((client.wait(2), self.state.exists()), (143, True))


# ---- Rotations and outages ------------------------------------------------------------------------------------------

class Following(SystemTest):
    """The processor finds the rotated logs and, with --follow, reads on through rotations and outages."""

    def follow(self, log):
        """Start data_processor.py --follow and return it with a function that waits for a revenue of user1."""
        follower = self.start("data_processor.py", "--follow", log)

        def wait_for_revenue(expected, what):
            wait_until(lambda: query("SELECT revenue FROM users_revenue") == [(expected,)], what)
        return follower, wait_for_revenue

    def assertStops(self, follower):
        """Check that a follower ends quietly when it is told to."""
        follower.terminate()
        self.assertEqual(follower.wait(10), 0)
        began, ended = "server-events.jsonl: No such file.*\n", "server-events.jsonl: is read again.\n"
        self.assertRegex(follower.stderr.read(), rf"\A({began}({ended})?)*\Z")

    def test_follow_reads_through_rotations(self):
        server = Server(self)
        follower, wait_for_revenue = self.follow("server-events.jsonl")
        server.post(EVENT)
        wait_for_revenue(1, "the first event was applied")
        server.post(EVENT)
        server.log.rename(self.path("renamed"))
        server.post(EVENT)
        wait_for_revenue(3, "both logs were read")
        follower.send_signal(signal.SIGSTOP)
        for number in (1, 2):  # two rotations while nobody looks
            server.log.rename(self.path(f"server-events.jsonl.{number}"))
            server.post(EVENT)
        follower.send_signal(signal.SIGCONT)
        wait_for_revenue(5, "all logs were read")
        server.log.rename(self.path("server-events.jsonl.3"))  # and no log is begun in its place
        for total in (6, 7):
            with open(self.path("server-events.jsonl.3"), "a") as log:
                log.write(with_id("p", total))
            wait_for_revenue(total, "the renamed log is read once more")
        self.assertStops(follower)

    def test_follow_reads_through_a_lost_connection(self):
        server = Server(self)
        follower, wait_for_revenue = self.follow("server-events.jsonl")
        server.post(EVENT)
        wait_for_revenue(1, "the first event was applied")
        server.log.rename(self.path("renamed"))
        server.post(EVENT)
        wait_for_revenue(2, "both logs were read")
        terminate_backends()
        server.post(EVENT)
        wait_for_revenue(3, "the connection was made again")
        self.assertStops(follower)

    def test_follow_waits_for_what_is_not_there_yet(self):
        follower = self.start("data_processor.py", "--follow", "new/log")
        self.assertIn("new/log: No such file or directory; start server.py", follower.stderr.readline())
        self.path("new").mkdir()
        time.sleep(1.5)  # it looks again
        self.path("new/log", EVENT + b"\n")
        self.assertEqual(follower.stderr.readline(), "new/log: is read again.\n")
        wait_until(lambda: query("SELECT revenue FROM users_revenue") == [(1,)], "the log is applied")

    def test_a_named_log_means_its_rotated_siblings_too(self):
        log = self.path("server-events.jsonl", with_id("p", 1))
        for number, name in enumerate((".1", ".2", "-20261124", ".2026-11-25"), 2):
            self.processor("server-events.jsonl")
            with open(log, "a") as file:
                file.write(with_id("p", number))
            log.rename(self.path(f"server-events.jsonl{name}"))
            log.write_text(with_id("q", number))
        self.processor("server-events.jsonl")
        self.assertRevenue({"user1": 9})

    def test_a_directory_that_cannot_be_listed_is_no_directory_without_rotated_logs(self):
        log = self.path("server-events.jsonl", with_id("p", 1))
        for run, arguments in (("apply", []), ("verify", ["--verify"])):
            with self.subTest(run):
                script, environment = patched("data_processor", (
                    "import errno, os\ndef broken(path): raise OSError(errno.EACCES, 'Permission denied', path)\n"
                    "os.listdir = broken"))
                run = subprocess.run([sys.executable, *script, *arguments, log], env=os.environ | environment,
                                     capture_output=True, text=True)
                self.assertEqual((run.returncode, run.stderr), (1, f"{self.directory}: Permission denied.\n"))

    def test_other_files_beside_a_log_are_no_logs(self):
        self.path("server-events.jsonl", with_id("p", 1))
        for name in (".new", ".1.delivery", ".1.rejected-abc", ".delivery", ".old.1", "x.1", "-old", ".bak"):
            self.path("server-events.jsonl" + name, with_id("q", 1))
        for arguments in ([], ["server-events.jsonl"]):
            self.processor(*arguments)
        self.assertRevenue({"user1": 1})

    def test_a_database_that_was_restored_is_brought_up_to_date(self):
        for number in (1, 2):
            self.path(f"log.{number}", with_id(f"p{number}", 1))
        self.path("log", with_id("p", 1))
        self.start("data_processor.py", "--follow", "log")
        wait_until(lambda: query("SELECT revenue FROM users_revenue") == [(3,)], "all logs are applied")
        empty_tables()  # an older state
        terminate_backends()
        wait_until(lambda: query("SELECT revenue FROM users_revenue") == [(3,)], "all logs are applied again")

    def test_more_rotated_logs_than_descriptors_are_followed(self):
        for number in range(90):
            self.path(f"log.{number}", with_id(f"p{number}", 1))
        limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
        arguments, environment = patched("data_processor", limit)
        follower = subprocess.Popen([sys.executable, *arguments, "--follow", "log"], cwd=self.directory, text=True,
                                    env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            self.path("log", with_id("p", 1))
            wait_until(lambda: query("SELECT revenue FROM users_revenue") == [(91,)], "all logs are applied")
            with open(self.path("log"), "a") as log:
                log.write(with_id("p", 2))
            wait_until(lambda: query("SELECT revenue FROM users_revenue") == [(92,)], "the live log is read")
        finally:
            follower.terminate()
            self.assertNotIn("Too many", follower.communicate()[1])

    def test_an_outage_is_said_when_it_begins_and_when_it_ends(self):
        log = self.path("log", with_id("p", 1))
        connect, broken = data_processor.connect, [True] * 3

        def connect_later(**options):
            if broken:
                broken.pop()
                raise psycopg2.OperationalError("down")
            return connect(**options)
        with (captured() as printed, opened_processor(log, follow=True) as processor,
              unittest.mock.patch.multiple(data_processor, connect=connect_later),
              unittest.mock.patch.object(data_processor.time, "sleep", side_effect=3 * [None] + [SystemExit])):
            self.assertRaises(SystemExit, processor.run)
            lines = printed().splitlines()
        self.assertRegex(lines[0], "^Events are not applied: trying again until it is mended. No database: down. "
                                   "Start PostgreSQL, or correct .*")
        self.assertEqual(lines[1:], [f"{log}: 1 applied, 0 repeated, 0 rejected",
                                     "Events are not applied: this is over."])

    def test_an_outage_of_any_length_is_tried_again_at_least_every_30_seconds(self):
        log, pauses = self.path("log", with_id("p", 1)), []
        apply_chunk, broken = data_processor.apply_chunk, [True] * 40

        def apply_later(*arguments):
            if broken:
                broken.pop()
                raise psycopg2.OperationalError("down")
            return apply_chunk(*arguments)

        def pause(seconds):
            pauses.append(seconds)
            if not broken and seconds == data_processor.POLL_SECONDS:
                raise SystemExit
        with (captured(), opened_processor(log, follow=True) as processor,
              unittest.mock.patch.object(data_processor, "apply_chunk", apply_later),
              unittest.mock.patch.object(data_processor.time, "sleep", pause)):
            self.assertRaises(SystemExit, processor.run)
        self.assertLessEqual(max(pauses), data_processor.MAX_BACKOFF_SECONDS)
        self.assertRevenue({"user1": 1})

    def test_follow_reads_nothing_of_a_log_that_has_not_grown(self):
        with captured(), opened_processor(self.path("log", with_id("p", 1)), follow=True) as processor:
            poll(processor)
            with unittest.mock.patch.object(data_processor, "apply_chunk") as apply_chunk:
                poll(processor)
        apply_chunk.assert_not_called()

    def test_a_compressed_log_that_is_not_whole_yet_is_read_later(self):
        whole = gzip.compress("".join(with_id("p", n) for n in range(1, 101)).encode())
        log = self.path("log.gz", whole[:50])
        with captured() as printed, opened_processor(log, follow=True) as processor:
            for content, applied in ((whole[:50], []), (whole, [(100,)])):
                log.write_bytes(content)
                for _ in range(2):
                    poll(processor)
                    self.assertEqual(query("SELECT revenue FROM users_revenue"), applied)
            self.assertRegex(printed(), "^.*log.gz: cannot be decompressed: .*\n.*: 100 applied.*\n.*is read again.\n$")

    def test_a_log_that_was_renamed_is_closed(self):
        log = self.path("log", with_id("p", 1))
        with captured(), opened_processor(log, follow=True) as processor:
            poll(processor)
            renamed = processor.held[str(log)]
            log.rename(self.path("renamed"))
            self.path("log", with_id("p", 2))
            poll(processor)
        self.assertTrue(renamed.file.closed)
        self.assertRevenue({"user1": 2})

    def test_sigterm_ends_a_run_with_143_and_a_follower_with_0(self):
        log = self.path("log", EVENT + b"\n")
        with locked_users():
            for number, (arguments, status) in enumerate((([], 143), (["--follow"], 0)), 1):
                processor = self.start("data_processor.py", log, *arguments)
                wait_until(lambda: len(waiting()) == number, "the processor waits")
                processor.terminate()
                self.assertEqual((processor.communicate(timeout=5), processor.returncode), (("", ""), status))

    def test_a_renamed_log_is_read_when_its_writer_is_done(self):
        self.path("archive").mkdir()
        path = self.path("log", with_id("p", 1))
        with captured(), opened_processor(path, follow=True) as processor, open(path, "ab", buffering=0) as writer:
            poll(processor)
            fcntl.flock(writer, fcntl.LOCK_EX)
            path.rename(self.path("archive/old"))
            self.path("log", with_id("q", 1))
            run = threading.Thread(target=poll, args=[processor])
            run.start()
            time.sleep(0.3)  # it waits for the lock
            writer.write(with_id("p", 2).encode())
            fcntl.flock(writer, fcntl.LOCK_UN)
            run.join(20)
        self.assertRevenue({"user1": 3})

    def test_the_rotated_logs_of_a_linked_log_are_found(self):
        self.path("data").mkdir()
        os.symlink("data/log", self.path("log"))
        self.path("data/log.1", with_id("p", 1))
        self.path("data/log", with_id("p", 2))
        self.processor("log")
        self.assertRevenue({"user1": 2})


# ---- Auditing -------------------------------------------------------------------------------------------------------

class Audit(SystemTest):
    """--verify compares the revenue with the logs and changes nothing."""

    def logs(self):
        """Return two logs with a repeated event, an event without an id, and a line that is no event."""
        dimes = "".join(with_id("p", n, f"user{n % 3}", "0.10") for n in (1, 2, 3, 4))
        return [self.path("one", dimes + EVENT.decode() + "\n"),
                self.path("two", with_id("p", 4, "user1", "0.10") + with_id("p", 5, "user9", -7) + "nonsense\n")]

    def test_verify_applies_nothing(self):
        self.processor("--verify", *self.logs(), status=1)
        self.assertEqual(query("SELECT * FROM event_logs"), [])

    def test_verify_finds_that_applied_logs_agree(self):
        tables = "SELECT * FROM event_logs, event_producers, users_revenue ORDER BY 1, 2, 3, 4, 5, 6, 7"
        logs = self.logs()
        self.processor(*logs, status=1)
        before = query(tables)
        copy = self.path("copy", logs[0].read_bytes() + EVENT.replace(b"1}", b"0}") + b"\n")
        output, _ = self.processor("--verify", *logs, copy)
        self.assertEqual(output, "users_revenue and the logs agree on 4 users.\n")
        self.assertEqual(query(tables), before)

    def test_verify_takes_its_time_between_two_statements(self):
        logs = [str(self.path("log.1", with_id("p", 1))), str(self.path("log", with_id("p", 2)))]
        self.processor(*logs)
        find_end = data_processor.LogReader.find_end

        def find_end_slowly(log):
            time.sleep(0.5)
            find_end(log)
        with (captured(), unittest.mock.patch.object(data_processor, "IDLE_SECONDS", 0.2),
              unittest.mock.patch.object(data_processor.LogReader, "find_end", find_end_slowly)):
            self.assertTrue(data_processor.verify(logs))

    def test_verify_compares_user_ids_of_another_collation(self):
        log = self.path("log", with_id("p", 1) + with_id("p", 2, "user2"))
        query('ALTER TABLE users_revenue ALTER COLUMN user_id TYPE text COLLATE "en-x-icu"')
        self.processor(log)
        self.assertIn("agree on 2 users", self.processor("--verify", log)[0])

    def test_verify_prints_each_user_whose_revenue_differs(self):
        logs = self.logs()
        self.processor(*logs, status=1)
        query("UPDATE users_revenue SET revenue = revenue + 1e30 + 0.01 WHERE user_id = 'user2'")
        query("DELETE FROM users_revenue WHERE user_id = 'user9'")
        query("INSERT INTO users_revenue VALUES ('older', 5)")
        output, _ = self.processor("--verify", *logs, status=1)
        self.assertEqual(output.splitlines()[:3], [
            "older: 5 in users_revenue, 0 in the logs, difference 5",
            f"user2: 1{0:030}.11 in users_revenue, 0.10 in the logs, difference 1{0:030}.01",
            "user9: 0 in users_revenue, -7 in the logs, difference 7"])
        self.assertIn("3 users differ", output)

    def test_verify_hides_the_tables_wherever_the_search_path_has_temporary_ones(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        query("UPDATE users_revenue SET revenue = 5")
        parts = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
        dsn = psycopg2.extensions.make_dsn(**(parts | {"options": "-c search_path=public,pg_temp"}))
        output, _ = self.processor("--verify", log, status=1, DATABASE_URL=dsn)
        self.assertIn("user1: 5 in users_revenue, 1 in the logs, difference 4", output)

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
            WHERE (source = 'session' OR context = 'user') AND name NOT LIKE 'plpgsql.%' ORDER BY name"""
        tables = """
            SELECT nspname, relname FROM pg_namespace JOIN pg_class ON pg_namespace.oid = relnamespace
            WHERE relpersistence = 't'"""
        shared = data_processor.connect()
        pooled = unittest.mock.Mock(wraps=shared, closed=0, spec=shared)
        pooled.__enter__, pooled.__exit__ = (lambda _: shared.__enter__()), (lambda _, *error: shared.__exit__(*error))
        pooled.close = shared.rollback  # what a pooler does at the end of a transaction
        with contextlib.closing(shared), shared.cursor() as sql, captured():
            for run in (lambda paths: data_processor.Processor(paths).run(), data_processor.verify):
                for statement in (settings, tables):
                    sql.execute(statement)
                    before = sql.fetchall()
                    shared.rollback()
                    with unittest.mock.patch.object(data_processor, "connect", lambda **_: pooled):
                        run([str(self.path("log"))])
                    sql.execute(statement)
                    self.assertEqual(sql.fetchall(), before, run)
                    shared.rollback()
        self.assertRevenue({"user1": 1})

    def test_a_user_id_cannot_forge_a_verdict(self):
        log = self.path("log", with_user('"a\\r\\u001b[2Kusers_revenue agrees\\n\\u202e\\u009b1m"') + b"\n")
        self.processor(self.path("empty", b""))
        output, _ = self.processor("--verify", log, status=1)
        self.assertIn("a\\r\\x1b[2Kusers_revenue agrees\\n\\u202e\\x9b1m: 0 in users_revenue, 1 in the logs", output)
        self.assertEqual(output.count("\n"), 2)


# ---- What is printed ------------------------------------------------------------------------------------------------

class Words(SystemTest):
    """What goes wrong in a user's world is one sentence, and printing it decides nothing."""

    def test_what_is_no_regular_file_is_refused(self):
        log = self.path("log", with_id("p", 1))
        os.mkfifo(self.path("log.5"))
        output, errors = self.processor(log, status=1)
        self.assertEqual((output, errors), (f"{log}: 1 applied, 0 repeated, 0 rejected\n",
                                            f"{log}.5: is not a regular file; name one that is.\n"))
        for path in ("/dev/stdin", "/dev/null", self.directory):
            with self.subTest(path):
                self.assertIn(f"{path}: is not a regular file", self.processor(path, status=1)[1])

    def test_a_closed_or_full_stream_changes_no_outcome(self):
        log = self.path("log", with_id("p", 1) + "bad\n")
        for redirection in (">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", "| true",
                            "</dev/null >/dev/full 2>&1"):
            for arguments, status in (("log", 1), ("--verify log", 0)):
                with self.subTest(redirection, arguments=arguments):
                    empty_tables()
                    if "verify" in arguments:
                        self.processor(log, status=1)
                    script = f"{sys.executable} {HERE}/data_processor.py {arguments} {redirection}"
                    run = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], cwd=self.directory,
                                         capture_output=True, text=True)
                    self.assertEqual((run.returncode, "Traceback" in run.stderr), (status, False), run.stderr)
                    self.assertRevenue({"user1": 1})

    def test_an_encoding_that_lacks_characters_changes_no_outcome(self):
        odd = os.fsdecode(b"log.1\xff")
        Path(self.directory / odd).write_text(with_id("q", 1))
        log = self.path("log", with_id("p", 1, "\u0436\u0443\u0440\u043d\u0430\u043b"))
        output, _ = self.processor(log, PYTHONIOENCODING="ascii")
        self.assertIn("log.1\\udcff: 1 applied", output)
        query("DELETE FROM users_revenue")
        output, _ = self.processor("--verify", log, status=1, PYTHONIOENCODING="ascii")
        self.assertIn("\\u0436\\u0443\\u0440\\u043d\\u0430\\u043b: 0 in users_revenue, 1 in the logs", output)

    def test_no_message_holds_a_password(self):
        log = self.path("log", EVENT + b"\n")
        port = free_port()
        cases = {"another scheme": "postgresql+psycopg2://app:S3cret@db/shop",
                 "a slash": "postgresql://app:p/S3cret@db/shop", "an at sign": "postgresql://app:S3@cret@db/shop",
                 "a percent sign": "postgresql://app:50%S3cret@db/shop",
                 "a digit and a slash": "postgresql://app:1/S3cret@db/shop",
                 "a malformed DSN": "host=db password=S3cret x",
                 "no fault": f"postgresql://app:S3cret@127.0.0.1:{port}/shop",
                 "a colon": f"postgresql://app:S3cret:x@127.0.0.1:{port}/shop"}
        for (case, url), arguments in itertools.product(cases.items(), ([], ["--verify"])):
            with self.subTest(case, arguments=arguments):
                _, errors = self.processor(log, *arguments, status=1, DATABASE_URL=url)
                self.assertNotIn("cret", errors)
                self.assertEqual(errors.count("\n"), 1)

    def test_the_reasons_of_all_addresses_are_told(self):
        first, second = (f'connection to server at "localhost" ({address}), port 5432 failed: '
                         for address in ("::1", "127.0.0.1"))
        error = psycopg2.OperationalError(f"{first}Connection refused\n\tIs the server running on that host?\n"
                                          f"{second}FATAL:  password authentication failed\n")
        self.assertEqual(data_processor.sentence(error),
                         f"{first}Connection refused; {second}FATAL: password authentication failed")

    def test_the_detail_of_a_refusal_names_the_user(self):
        query("ALTER TABLE users_revenue ADD CHECK (user_id <> 'user7')")
        _, errors = self.processor(self.path("log", with_id("p", 1) + with_id("p", 2, "user7")), status=1)
        self.assertRegex(errors, "^Stopped at a database error: .*check constraint.*"
                                 "Failing row contains \\(user7, 1\\).\n$")
        self.assertRevenue({})

    def test_what_the_environment_says_is_not_overridden(self):
        names = [name for name in os.environ if name.startswith("PG")] + ["DATABASE_URL"]
        nothing = {"host": "localhost", "dbname": "postgres", "user": "postgres", "password": "password1!",
                   "connect_timeout": 10}
        url = "postgresql://db?connect_timeout=3&keepalives_idle=7"
        cases = {"nothing": ({}, nothing), "the port": ({"PGPORT": "5433"}, nothing),
                 "the password": ({"PGPASSWORD": "x"}, {**nothing, "password": None}),
                 "a password file": ({"PGPASSFILE": str(self.path("pgpass", ""))}, {**nothing, "password": None}),
                 "a host": ({"PGHOST": "db"}, {"host": None, "password": None, "dbname": None, "connect_timeout": 10}),
                 "a service": ({"PGSERVICE": "s"}, {"host": None, "user": None}),
                 "a time-out": ({"PGCONNECT_TIMEOUT": "3"}, {**nothing, "connect_timeout": None}),
                 "a URL": ({"DATABASE_URL": url}, {"host": "db", "connect_timeout": "3", "keepalives_idle": "7",
                                                   "keepalives_count": 3, "user": None})}
        for what, (said, expected) in cases.items():
            with (self.subTest(what), unittest.mock.patch.dict(os.environ),
                  unittest.mock.patch("psycopg2.connect") as connect):
                for name in names:
                    os.environ.pop(name, None)
                os.environ.update({"PGPASSFILE": "/none"} | said)
                data_processor.connect(connect_timeout=10)
                options = connect.call_args[1]
                self.assertEqual({name: options.get(name) for name in expected}, expected)

    def test_an_error_about_users_revenue_proposes_what_mends_it(self):
        tables = {"double precision": "user_id text PRIMARY KEY, revenue double precision DEFAULT 0",
                  "no revenue": "user_id text UNIQUE", "rounded": "user_id text PRIMARY KEY, revenue numeric(10, 2)",
                  "money as text": "user_id text UNIQUE, revenue text",
                  "bigint": "user_id text UNIQUE, revenue bigint",
                  "no user_id": "id serial PRIMARY KEY, revenue numeric",
                  "short ids": "user_id varchar(20) PRIMARY KEY, revenue numeric",
                  "padded ids": "user_id char(300) UNIQUE, revenue numeric",
                  "numbers": "user_id bigint PRIMARY KEY, revenue numeric", "no key": "user_id text, revenue numeric",
                  "a deferrable key": "user_id text UNIQUE DEFERRABLE, revenue numeric",
                  "a deferrable key beside a good one": "user_id text PRIMARY KEY UNIQUE DEFERRABLE, revenue numeric",
                  "two columns": "user_id text, revenue numeric, UNIQUE (user_id, revenue)",
                  "a key for some users": "user_id text, revenue numeric); "
                                          "CREATE UNIQUE INDEX ON users_revenue (user_id) WHERE (revenue > 0",
                  "ids without case": "user_id text COLLATE caseless UNIQUE, revenue numeric", "nothing": "x int"}
        query("CREATE COLLATION caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
        self.addCleanup(query, "DROP COLLATION caseless CASCADE")
        for what, columns in tables.items():
            with self.subTest(what):
                query(f"DROP TABLE users_revenue; CREATE TABLE users_revenue ({columns})")
                producer, users = secrets.token_hex(4), ["x" * 255, "X" * 255]
                lines = [with_id(producer, number, user) for number, user in enumerate(users, 1)]
                log = self.path(f"log-{producer}", "".join(lines))
                for _ in range(4):
                    run = self.start("data_processor.py", log)
                    _, errors = run.communicate()
                    if run.returncode == 0:
                        break
                    query(re.fullmatch("users_revenue .*; mend it with: (ALTER TABLE users_revenue .*)\n", errors)[1])
                self.assertRevenue(dict.fromkeys(users, 1))

    def test_a_deferrable_foreign_key_is_no_unique_key(self):
        query("CREATE TABLE others (id text PRIMARY KEY); INSERT INTO others VALUES ('user1')")
        self.addCleanup(query, "DROP TABLE others CASCADE")
        query("ALTER TABLE users_revenue ADD FOREIGN KEY (user_id) REFERENCES others DEFERRABLE")
        self.processor(self.path("log", with_id("p", 1)))
        self.assertRevenue({"user1": 1})

    def test_tables_are_created_where_users_revenue_is(self):
        parts = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
        query("DROP TABLE event_producers, event_logs; DROP SCHEMA IF EXISTS own CASCADE; CREATE SCHEMA own")
        self.addCleanup(query, "DROP SCHEMA own CASCADE")
        dsn = psycopg2.extensions.make_dsn(**(parts | {"options": "-c search_path=own,public"}))
        self.processor(self.path("log", with_id("p", 1)), DATABASE_URL=dsn)
        self.assertRevenue({"user1": 1})
        self.assertEqual(query("SELECT to_regclass('public.event_logs') IS NULL, to_regclass('own.users_revenue')"),
                         [(False, None)])

    def test_tables_in_different_schemas_are_refused(self):
        parts = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
        query("DROP SCHEMA IF EXISTS own CASCADE; CREATE SCHEMA own")
        query("CREATE TABLE own.users_revenue (user_id text PRIMARY KEY, revenue numeric)")
        self.addCleanup(query, "DROP SCHEMA own CASCADE")
        dsn = psycopg2.extensions.make_dsn(**(parts | {"options": "-c search_path=own,public"}))
        _, errors = self.processor(self.path("log", with_id("p", 1)), status=1, DATABASE_URL=dsn)
        self.assertIn("are in different schemas; set search_path", errors)

    def test_a_script_that_is_called_by_a_link_finds_its_schema(self):
        drop_tables()
        os.symlink(HERE / "data_processor.py", self.path("link.py"))
        subprocess.run([sys.executable, self.path("link.py"), self.path("log", with_id("p", 1))], check=True,
                       capture_output=True)
        self.assertRevenue({"user1": 1})

    def test_on_windows_the_scripts_say_what_they_need(self):
        for script in ("server", "client", "data_processor"):
            code = f"import sys; sys.modules['fcntl'] = None; import {script}"
            run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
            self.assertRegex(run.stderr, "\\A.*needs Linux or macOS.*\n\\Z")
            self.assertEqual(run.returncode, 1)


# ---- Several machines -----------------------------------------------------------------------------------------------

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
        upstream = "".join(f"server 127.0.0.1:{port} max_fails=0; " for port in ports)
        site = site.replace("server 127.0.0.1:8000;", upstream)
        temporary = "".join(f"{kind}_temp_path {self.directory}; "
                            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
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

    def test_totals_are_exact_although_servers_are_killed(self):
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
            wait_until(lambda: servers[n].log.stat().st_size > size + 100_000
                       or all(client.poll() is not None for client in clients), "the log grows")
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


# ---- The README -----------------------------------------------------------------------------------------------------

class Readme(SystemTest):
    """What the README shows is what happens."""

    def setUp(self):
        """Copy the scripts into the directory."""
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

        def comparable(text):
            return re.sub(r"in [\d.]+ s", "in 0.1 s", re.sub(r"\d+ workers", "2 workers", text))
        self.assertEqual(comparable(self.shell(script)), output)

    def test_the_second_command_runs_the_documented_tests(self):
        self.assertEqual(blocks("sh")[1], "bash .ci/run\n")
        self.assertIn('\n"$environment/bin/python" -m unittest ', (HERE / ".ci/run").read_text())
        self.assertIn("`python -m unittest`", README)
        self.assertNotIn("pg_virtualenv -t python", README)

    def test_docker_and_psql_use_the_default_database(self):
        password = re.search(r"docker run .*-p (\d+):5432 .*POSTGRES_PASSWORD='(.*?)' postgres`", README)
        place = re.search(r"`psql -h (\S+) -U (\S+) -d (\S+) -f create_table.sql`", README)
        home = {"HOME": str(self.directory)}  # without a .pgpass
        with unittest.mock.patch.dict(os.environ, home, clear=True), unittest.mock.patch("psycopg2.connect") as connect:
            data_processor.connect()
        used = connect.call_args.kwargs
        self.assertEqual([used["host"], used["user"], used["dbname"]], list(place.groups()))
        self.assertEqual([used.get("port", "5432"), used["password"]], list(password.groups()))

    def test_the_places_to_start_reading_exist(self):
        places = re.findall(r"^\* `([\w.]+)` in `(\w+)\.py`(?:, with `(\w+)`)?", README, re.M)
        self.assertEqual(len(places), 3)
        for name, module, helper in places:
            source = (HERE / f"{module}.py").read_text()
            for definition in [*name.split("."), *filter(None, [helper])]:
                self.assertRegex(source, rf"(?m)^ *(?:def|class) {definition}\b")

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
        script += ("\nfor value in (1, 2):\n    send({'userId': 'user1', 'name': 'add_revenue', 'value': value}, "
                   f"'http://localhost:{self.port}/liveEvent')\n")
        sender = subprocess.Popen([sys.executable, "-c", script])
        server = Server(self, port=self.port)
        self.assertEqual(sender.wait(20), 0)
        ids = ids_in(server.log)
        self.assertEqual([sequence for _, sequence in ids], [1, 2])
        self.assertEqual(len({producer for producer, _ in ids}), 1)

    SCRIPTS = ("server.py", "client.py", "data_processor.py")

    def test_help_fits_a_screen(self):
        for script in self.SCRIPTS:
            with self.subTest(script):
                output, _ = self.run_script(script, "--help", COLUMNS="80")
                self.assertLessEqual(output.count("\n"), 24)
                self.assertIn("Example: python " + script, " ".join(output.split()))

    def test_help_knows_every_option_of_the_readme(self):
        for script in self.SCRIPTS:
            with self.subTest(script):
                output, _ = self.run_script(script, "--help", COLUMNS="80")
                usage = re.search(rf"^    python {script}(.*)$", README, re.M)[1]
                options = re.findall(r"--[a-z-]+", usage)
                self.assertEqual(set(re.findall(r"^  (--[a-z-]+)", output, re.M)), set(options))
                for option, default in re.findall(r"\[(--[a-z-]+) ([^]|N]\S*)\]", usage):
                    self.assertRegex(" ".join(output.split()), rf"{option} [^()]*\(default: {re.escape(default)}\)")

    def test_a_rejected_line_is_reported_and_copied_as_the_readme_says(self):
        report = re.search(r"reported as `(events\.jsonl:(\d+): .*?)`", README)
        copies = re.search(r"copied to `(.*)<producer id>`", README)[1]
        bad = EVENT.replace(b"1}", b"true}") + b"\n"
        self.path("events.jsonl", (EVENT + b"\n") * (int(report[2]) - 1) + bad)
        server = Server(self)
        _, errors = self.client("--url", server.url, status=1)
        self.assertIn(report[1], errors.splitlines())
        copy, = self.directory.glob(copies + "*")
        self.assertEqual(copy.read_bytes(), bad)
        copy.write_bytes(bad.replace(b"true", b"1"))
        self.client(copy, "--url", server.url)
        self.processor()
        self.assertRevenue({"user1": int(report[2])})

    def test_the_rotation_by_logrotate_loses_nothing(self):
        rules = next(block for block in blocks("") if "rotate 90" in block)
        rules = self.path("rules", "dateext\n" + rules.replace("/var/lib/events", str(self.directory)))
        rules.chmod(0o644)
        logrotate = shutil.which("logrotate", path=os.environ["PATH"] + ":/usr/sbin")
        server = Server(self)
        for number in (1, 2, 3):
            server.post(EVENT)
            if logrotate:
                subprocess.run([logrotate, "--force", "--state", self.path("state"), rules], check=True,
                               capture_output=True)
            else:
                server.log.rename(f"{server.log}.{number}")
        server.post(EVENT)
        self.assertEqual(len(list(self.directory.glob("server-events.jsonl*"))), 4)
        self.processor()
        self.assertRevenue({"user1": 4})


# ---- The start of the tests -----------------------------------------------------------------------------------------

class StartUp(unittest.TestCase):
    """The tests find a PostgreSQL, or say in a sentence that there is none."""

    def setUp(self):
        """Make an environment that names no database and in which pg_virtualenv is installed."""
        directory = tempfile.mkdtemp(prefix="events-test-")
        self.addCleanup(shutil.rmtree, directory)
        self.environment = {"PATH": directory, "HOME": "/", "PGHOST": ""}
        self.tool = Path(directory, "pg_virtualenv")
        self.tool.touch(0o755)

    def test_without_a_named_database_the_same_command_runs_in_a_throwaway_one(self):
        with unittest.mock.patch.object(sys, "orig_argv", ["python", "-m", "unittest", "-v", "test_system.Http"]):
            self.assertEqual(throwaway_command(self.environment),
                             ["pg_virtualenv", "-t", sys.executable, "-m", "unittest", "-v", "test_system.Http"])

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

    def test_a_throwaway_one_takes_no_settings_of_the_default_one(self):
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
        self.assertIn(run.returncode, (1, 5))  # 5 since Python 3.12: no test was run
        self.assertIn("RuntimeError: No PostgreSQL to test with", run.stderr)
        self.assertIn("FAILED (errors=1)", run.stderr)


# ---- Torture --------------------------------------------------------------------------------------------------------

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
        actions = [self.kill_client, self.kill_client, self.kill_server, self.kill_worker, self.kill_processor,
                   self.kill_processor, self.kill_child, self.terminate_backend, self.pause, self.pause, self.rotate]
        end = time.monotonic() + TORTURE_SECONDS
        while time.monotonic() < end:
            self.keep_busy()
            time.sleep(chance.uniform(0, 0.1))
            chance.choice(actions)()
        self.settle()
        logs = sorted(self.directory.glob("log*"))
        repeats = len(ids_in(*logs)) - len(set(ids_in(*logs)))
        kills = sum(count for name, count in self.counts.items() if name.startswith("kill"))
        print(f"[{dict(self.counts)}, {self.proxy.cuts} cuts, {kills} kills, {len(self.files)} files, "
              f"{repeats} repeated deliveries]", end=" ", file=sys.stderr, flush=True)
        self.assertRevenue(oracle(*self.files))
        for fault in (kills, repeats, self.proxy.cuts, self.counts["pause"], self.counts["rotate"]):
            self.assertGreater(fault, 0, "a fault was not injected")

    def start_client(self, events, *arguments):
        """Start a client through the proxy."""
        command = [sys.executable, HERE / "client.py", events, "--url", f"http://127.0.0.1:{self.proxy.port}/liveEvent",
                   "--batch-size", str(self.chance.choice([10, 100, 1000])), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def keep_busy(self):
        """Keep two deliveries and two processors going, and both servers up."""
        self.keep_servers_up()
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
            slices = "data_processor.SLICE_BYTES = 20_000; data_processor.usable_cores = lambda: 3"
            script, path = self.chance.choice([([HERE / "data_processor.py"], {}), patched("data_processor", slices)])
            self.processors.append(subprocess.Popen(
                [sys.executable, *script, *logs[:20]], cwd=self.directory, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, env=os.environ | path))

    def keep_servers_up(self):
        """Start the servers again that were killed."""
        for n, server in enumerate(self.servers):
            if server.process.poll() is not None:
                self.servers[n] = Server(self, log=server.log.name, port=server.port)

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

    def kill_child(self):
        """Kill a process that one of the processors forked (on Linux, which lists them)."""
        for _ in range(100 if sys.platform == "linux" else 0):  # they live for some milliseconds
            if children := [pid for processor in self.processors for pid in children_of(processor.pid)]:
                return self.kill_pid("child", self.chance.choice(children))
            time.sleep(0.002)

    def kill_server(self):
        """Kill a server's parent."""
        self.kill("server", self.chance.choice(self.servers).process)

    def kill_worker(self):
        """Kill one worker."""
        if workers := self.chance.choice(self.servers).workers():
            self.kill_pid("worker", self.chance.choice(workers))

    def kill_pid(self, name, pid):
        """SIGKILL a process that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.counts[f"kill {name}"] += 1

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
        self.keep_servers_up()
        for events, client in self.delivering:
            while "events accepted" not in client.communicate(timeout=60)[0]:
                client = self.start_client(events)
        self.processor(*sorted(self.directory.glob("log*")))


if __name__ == "__main__":
    unittest.main()
