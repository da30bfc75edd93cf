"""What pipeline.py and compare.py share, from the parts to the whole: programs, events whose sums
are known, a scratch database, wrk, the three scripts, and what is measured of them.

It needs Linux (for /proc) and PostgreSQL. The scripts are only run as a user runs them; nothing is
imported from them. """
import argparse
import collections
import contextlib
import functools
import http.client
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import psycopg2

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# With so many users, a million events change each user about ten times.
USERS = 100_000
# The log of many producers has so many events of each, in batches that are scattered over the log,
# some of them twice.
PRODUCER_EVENTS = 1000
BATCH_EVENTS = 100
REPEATED = 0.1
# The log of long user ids has so many bytes.
LONG_ID_BYTES = 64 * 1024 * 1024
LONG_ID = 255
# So many events are new after the large log.
NEW_EVENTS = 100_000
# A request to the server alone, and a pipeline of Redis, has so many events, on so many
# connections.
BULK_EVENTS = 1000
BULK_CONNECTIONS = 8
# The revenue queries ask for so many users in turn, on so many connections. So many answers are
# compared with the sums before.
ASKED_USERS = 1000
QUERY_CONNECTIONS = 32
CHECKED_USERS = 200
# What takes milliseconds is repeated so many times in a run.
REPEATS = 5
# A program that does not start, or does not stop when it is told to, within this time has failed.
START_SECONDS = 30
STOP_SECONDS = 60
# How long PostgreSQL may take to start a process for a new connection.
BACKEND_SECONDS = 2


class Failure(Exception):
    """The benchmark cannot go on, or a result was wrong; the text says why."""


class Missing(Exception):
    """A row cannot be measured because of something that is not installed; the text says what."""


def usable_cores():
    """Return on how many cores this process may run."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, where only the table can be tested
        return os.cpu_count()
    return len(os.sched_getaffinity(0))


def say(words):
    """Tell on stderr how far the benchmark is."""
    print(words, file=sys.stderr, flush=True)


# ---- Programs ------------------------------------------------------------------------------------

class Finished(NamedTuple):
    seconds: float  # from its start to its end
    peak_mb: float  # the peak memory of the largest of its processes


def run_program(*command, cwd, cores=None, when_started=None):
    """Run a program on so many cores (None: all) to its end, and call when_started() after its
    start. Return Finished, or raise Failure with its stderr."""
    cores = cores or usable_cores()
    command = [str(word) for word in command]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", HERE / "stopwatch.py", str(cores), *command],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        if when_started is not None:
            when_started()
        output, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode != 0:
        words = errors or output
        raise Failure(f"{shlex.join(command)} exited with status {process.returncode}: {words}")
    measured = output.splitlines()[-1]
    seconds, kilobytes = measured.split()
    return Finished(float(seconds), int(kilobytes) * 1024 / 1e6)


def free_port():
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _, port = listener.getsockname()
    return port


def is_listening(port):
    """Return whether somebody listens on the port of 127.0.0.1."""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def running(command, port, cwd):
    """Run a program that listens on port, with its own children in one process group, and end all
    of them. Raise Failure if it does not listen within START_SECONDS."""
    command = [str(word) for word in command]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, process_group=0)
    try:
        until = time.monotonic() + START_SECONDS
        while not is_listening(port):
            if process.poll() is not None or time.monotonic() > until:
                raise Failure(f"{shlex.join(command)} does not listen on port {port}.")
            time.sleep(0.05)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def largest_child_mb(pid):
    """Return the peak memory in MB of the largest child of a process."""
    peaks = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        status = Path(f"/proc/{child}/status").read_text()
        kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status)[1]
        peaks.append(int(kilobytes) * 1024 / 1e6)
    return max(peaks)


def count_lines(path):
    """Return the number of lines of a file."""
    lines = 0
    with open(path, "rb") as file:
        while block := file.read(1024 * 1024):
            lines += block.count(b"\n")
    return lines


# ---- wrk -----------------------------------------------------------------------------------------

class Answers(NamedTuple):
    per_second: float
    count: int


def wrk(port, connections, seconds, script, arguments=()):
    """Return the Answers that one thread of wrk gets to the requests that the Lua script makes.
    Raise Failure if a request fails, Missing if wrk is not installed."""
    if not shutil.which("wrk"):
        raise Missing("wrk is not installed")
    output = subprocess.check_output(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", HERE / script,
         f"http://127.0.0.1:{port}/liveEvent", "--", *arguments], text=True)
    if "Non-2xx" in output or "Socket errors" in output:
        raise Failure(f"Requests failed:\n{output}")
    per_second = re.search(r"Requests/sec:\s+([0-9.]+)", output)[1]
    count = re.search(r"(\d+) requests in", output)[1]
    return Answers(float(per_second), int(count))


def ask_for_revenue(port, revenue, seconds, checked=CHECKED_USERS):
    """Return the Answers to revenue queries, by server.py or a program that stands in for it. Raise
    Failure if one of the first answers is wrong: so many are checked, before anything is measured.

    They are sent for twice as long, and the first half is not counted: connections to the database
    are opened then, and Node compiles what it runs often.
    """
    users = list(revenue)[:ASKED_USERS]
    check_answers(port, users[:checked], revenue)
    wrk(port, QUERY_CONNECTIONS, seconds, "get_users.lua", users)
    return wrk(port, QUERY_CONNECTIONS, seconds, "get_users.lua", users)


def check_answers(port, users, revenue):
    """Raise Failure unless the answers about these users are their sums in revenue."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    with contextlib.closing(connection):
        for user in users:
            connection.request("GET", f"/userEvents/{user}")
            with connection.getresponse() as response:
                text = response.read().decode()
            answer = json.loads(text, parse_float=Decimal)
            if answer != {"userId": user, "revenue": revenue[user]}:
                raise Failure(f"WRONG RESULT: {text}, but the revenue is {revenue[user]}.")


# ---- The database --------------------------------------------------------------------------------

def connect():
    """Return a connection to the database that libpq's variables name."""
    return psycopg2.connect("", connect_timeout=10)


class Database:
    """A scratch database on a server of the user's. libpq's variables name it as long as it exists.

    name: what it is called.
    description: what PostgreSQL says of itself.
    """

    def __init__(self, server):
        """Take a connection to any other database of that server."""
        server.autocommit = True
        self._server = server
        self.name = f"events_benchmark_{os.getpid()}"
        with server.cursor() as sql:
            sql.execute("SELECT current_setting('server_version'), current_setting('fsync')")
            version, fsync = sql.fetchone()
        self.description = f"PostgreSQL {version} with fsync {fsync}"

    def renew(self, tables):
        """Create the database anew, with the tables of the file create_table.sql of a version of
        the scripts. PostgreSQL makes a checkpoint when it drops the old one, so that no measurement
        has to write what another one changed."""
        self.drop()
        with self._server.cursor() as sql:
            sql.execute(f"CREATE DATABASE {self.name} ENCODING 'UTF8' TEMPLATE template0")
        with contextlib.closing(connect()) as connection:
            with connection, connection.cursor() as sql:
                sql.execute(tables.read_text(encoding="utf-8"))

    def drop(self):
        """Drop the database, if there is one."""
        with self._server.cursor() as sql:
            sql.execute(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")

    def bind_to_core(self, core):
        """Wait until a script has connected, and bind the process of PostgreSQL that serves it to a
        core. Raise OSError where that is not allowed or the process is not on this machine."""
        backends = []
        until = time.monotonic() + BACKEND_SECONDS
        with self._server.cursor() as sql:
            while not backends and time.monotonic() < until:
                sql.execute("SELECT pid FROM pg_stat_activity WHERE datname = %s", [self.name])
                backends = sql.fetchall()
                time.sleep(0.005)
        if not backends:
            raise TimeoutError("no script has connected to the database")
        for (pid,) in backends:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if not words.startswith(b"postgres: "):
                raise ProcessLookupError(f"process {pid} is not PostgreSQL's")
            os.sched_setaffinity(pid, {core})


@contextlib.contextmanager
def scratch_database():
    """Yield a Database on the server that DATABASE_URL or libpq's variables name, and drop it in
    the end. Until then PGHOST, PGPORT, PGUSER, PGPASSWORD and PGDATABASE name it for all programs;
    of DATABASE_URL and PGSERVICE nothing else is kept, because they come before those."""
    server = psycopg2.connect(os.environ.get("DATABASE_URL", ""), connect_timeout=10)
    with contextlib.closing(server):
        database = Database(server)
        os.environ.pop("DATABASE_URL", None)
        os.environ.pop("PGSERVICE", None)
        os.environ["PGHOST"] = server.info.host
        os.environ["PGPORT"] = str(server.info.port)
        os.environ["PGUSER"] = server.info.user
        os.environ["PGDATABASE"] = database.name
        if server.info.password:
            os.environ["PGPASSWORD"] = server.info.password
        try:
            yield database
        finally:
            database.drop()


def check_revenue(revenue):
    """Raise Failure unless the database has these sums, {user: sum}, and no others."""
    with contextlib.closing(connect()) as connection, connection.cursor() as sql:
        sql.execute("SELECT user_id, revenue FROM users_revenue")
        found = dict(sql.fetchall())
    wrong = {user for user, _ in found.items() ^ revenue.items()}
    if wrong:
        raise Failure(f"WRONG RESULT: {len(wrong):,} users have another sum than their events.")


# ---- The scripts ---------------------------------------------------------------------------------

class Server(NamedTuple):
    port: int
    pid: int  # of its parent process
    log: Path


class Scripts:
    """One version of server.py, client.py, data_processor.py and create_table.sql, in the directory
    root."""

    def __init__(self, root):
        self.root = root

    @contextlib.contextmanager
    def server(self, directory):
        """Run server.py with its defaults in a directory; yield a Server. Raise Failure unless it
        ends well."""
        directory.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, self.root / "server.py", "--port", "0"],
            cwd=directory, text=True, stdout=subprocess.PIPE)
        try:
            greeting = process.stdout.readline()
            listening = re.match(r"Listening on http://127\.0\.0\.1:(\d+), ", greeting)
            if not listening:
                raise Failure("server.py does not say where it listens.")
            yield Server(int(listening[1]), process.pid, directory / "server-events.jsonl")
        finally:
            process.terminate()
            process.communicate(timeout=STOP_SECONDS)
        if process.returncode != 0:
            raise Failure(f"server.py exited with status {process.returncode}.")

    def send(self, events, server):
        """Run client.py on a file of events; return Finished."""
        url = f"http://127.0.0.1:{server.port}/liveEvent"
        return run_program(
            sys.executable, self.root / "client.py", events, "--url", url, cwd=events.parent)

    def process(self, log, revenue, cores=None, when_started=None):
        """Run data_processor.py on a log and compare the database with revenue; return Finished."""
        finished = run_program(
            sys.executable, self.root / "data_processor.py", log,
            cwd=log.parent, cores=cores, when_started=when_started)
        check_revenue(revenue)
        return finished

    def start(self):
        """Return the seconds in which data_processor.py is read, with all that it imports."""
        finished = run_program(sys.executable, "-c", "import data_processor", cwd=self.root)
        return finished.seconds


# ---- Events --------------------------------------------------------------------------------------

class Input(NamedTuple):
    log: Path  # with an event id on each line
    lines: int  # of the log
    revenue: dict  # {user: sum} of the events
    events: Path | None = None  # the file that was sent, where the log came from server.py


def write_events(path, count, seed):
    """Write count random events, the same for the same seed; return {user: sum}."""
    chance = random.Random(seed).random
    revenue = collections.Counter()
    with open(path, "w") as file:
        for _ in range(count):
            user = f"user{int(chance() * USERS)}"
            value = int(chance() * 1000)
            if chance() < 0.8:
                name = "add_revenue"
                revenue[user] += value
            else:
                name = "subtract_revenue"
                revenue[user] -= value
            file.write(f'{{"userId": "{user}", "name": "{name}", "value": {value}}}\n')
    return revenue


def with_id(line, producer, sequence):
    """Return the line of an event without an id as it stands in a log."""
    event = line.rstrip("\n").removesuffix("}")
    return f'{event}, "producerId": "{producer}", "sequence": {sequence}}}\n'


class Inputs:
    """Events and logs, each made when it is first asked for, and kept: they take part in no
    measurement.

    scripts: the version that writes the logs.
    directory: where the files are.
    events, large_events: how many events the usual and the large log have.
    """

    def __init__(self, scripts, directory, events, large_events=None):
        self.scripts = scripts
        self.directory = directory
        self.events = events
        self.large_events = large_events

    @functools.cached_property
    def usual(self):
        """Return the Input of the log that client.py and server.py make of random events."""
        return self._send("usual", self.events, seed=1)

    @functools.cached_property
    def large(self):
        """Return an Input like the usual one, with large_events."""
        return self._send("large", self.large_events, seed=2)

    @functools.cached_property
    def new(self):
        """Return the Input of a small log that comes after the large one."""
        return self._send("new", NEW_EVENTS, seed=3)

    @contextlib.contextmanager
    def large_and_new(self):
        """Yield the Input of the large log with the new one appended to it, until it is cut off."""
        size = self.large.log.stat().st_size
        try:
            with open(self.large.log, "ab") as log, open(self.new.log, "rb") as new:
                shutil.copyfileobj(new, log)
            revenue = collections.Counter(self.large.revenue)
            revenue.update(self.new.revenue)  # a Counter adds
            yield Input(self.large.log, self.large.lines + self.new.lines, revenue)
        finally:
            os.truncate(self.large.log, size)

    def _send(self, name, count, seed):
        """Return the Input of so many random events that were sent."""
        say(f"  preparing {count:,} events")
        directory = self.directory / name
        directory.mkdir()
        events = directory / "events.jsonl"
        revenue = write_events(events, count, seed)
        with self.scripts.server(directory) as server:
            self.scripts.send(events, server)
        return Input(server.log, count, revenue, events)

    @functools.cached_property
    def copy(self):
        """Return the Input of a copy of the usual log: its first line is the last one, so that it
        is another log."""
        path = self.directory / "copy.jsonl"
        with open(self.usual.log, "rb") as log, open(path, "wb") as copy:
            first = log.readline()
            shutil.copyfileobj(log, copy)
            copy.write(first)
        return self.usual._replace(log=path)

    @functools.cached_property
    def many(self):
        """Return the Input of the usual events as clients deliver them that each sent a part of
        them, in batches that came in any order, some of them twice."""
        say("  preparing many producers")
        with open(self.usual.events) as file:
            lines = file.readlines()
        chance = random.Random(1)
        batches = [range(first, min(first + BATCH_EVENTS, len(lines)))
                   for first in range(0, len(lines), BATCH_EVENTS)]
        batches += chance.sample(batches, round(REPEATED * len(batches)))
        chance.shuffle(batches)
        producers = collections.defaultdict(lambda: secrets.token_urlsafe(16))
        path = self.directory / "many.jsonl"
        with open(path, "w") as log:
            for batch in batches:
                for number in batch:
                    producer, before = divmod(number, PRODUCER_EVENTS)
                    log.write(with_id(lines[number], producers[producer], before + 1))
        return Input(path, count_lines(path), self.usual.revenue)

    @functools.cached_property
    def long(self):
        """Return the Input of a log of users whose ids take as much memory as ids can."""
        say("  preparing long user ids")
        digits = 6
        id_bytes = digits + (LONG_ID - digits) * len("\U0001f600".encode())
        count = LONG_ID_BYTES // id_bytes
        revenue = {}
        path = self.directory / "long.jsonl"
        with open(path, "w", encoding="utf-8") as log:
            for number in range(count):
                user = f"{number:0{digits}}".ljust(LONG_ID, "\U0001f600")
                event = f'{{"userId": "{user}", "name": "add_revenue", "value": 1}}'
                log.write(with_id(event, "long", number + 1))
                revenue[user] = 1
        return Input(path, count, revenue)


# ---- What is measured ----------------------------------------------------------------------------

class Measured(NamedTuple):
    value: float  # events, requests or queries a second; or seconds, or milliseconds
    peaks: dict  # {"client", "worker" or "processor": its peak memory in MB}


class Bench:
    """Measures one version of the scripts. Each measurement begins with a new directory or a new
    database.

    scripts: the version.
    inputs, database: what is used; versions that are compared share them.
    directory: where temporary ones are made, on the disk that is synced.
    seconds: how long wrk sends requests.
    """

    def __init__(self, scripts, inputs, database, directory, seconds):
        self.scripts = scripts
        self.inputs = inputs
        self.database = database
        self.directory = directory
        self.seconds = seconds

    @contextlib.contextmanager
    def new_directory(self):
        """Yield a directory that is removed in the end. What was written before is on the disk
        then, so that no measurement pays for another one."""
        os.sync()
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            yield Path(directory)

    def renew_database(self):
        """Let the database have new, empty tables. What was written before is on the disk then."""
        os.sync()
        self.database.renew(self.scripts.root / "create_table.sql")

    @contextlib.contextmanager
    def new_server(self):
        """Yield a Server with a log of its own."""
        with self.new_directory() as directory, self.scripts.server(directory) as server:
            yield server

    def single_requests(self, connections):
        """Return the Measured requests a second of one event each."""
        return self._posts(connections, "post_one.lua", 1)

    def batches(self):
        """Return the Measured events a second in requests of BULK_EVENTS."""
        return self._posts(BULK_CONNECTIONS, "post_batch.lua", BULK_EVENTS)

    def _posts(self, connections, script, events):
        """Return the Measured events a second in requests of so many events. Raise Failure if the
        log lacks some."""
        with self.new_server() as server:
            answers = wrk(server.port, connections, self.seconds, script, [str(events)])
            peak = largest_child_mb(server.pid)
            if count_lines(server.log) < events * answers.count:
                raise Failure("WRONG RESULT: more events were acknowledged than logged.")
        return Measured(events * answers.per_second, {"worker": peak})

    def queries(self):
        """Return the Measured revenue queries a second; fill() comes before."""
        with self.new_server() as server:
            answers = ask_for_revenue(server.port, self.inputs.usual.revenue, self.seconds)
            peak = largest_child_mb(server.pid)
        return Measured(answers.per_second, {"worker": peak})

    def client(self, data):
        """Return the Measured events a second that client.py delivers. Raise Failure if the log
        lacks some."""
        with self.new_server() as server:
            finished = self.scripts.send(data.events, server)
            peak = largest_child_mb(server.pid)
            logged = count_lines(server.log)
            if logged != data.lines:
                raise Failure(f"WRONG RESULT: {logged:,} of {data.lines:,} events were logged.")
        return Measured(data.lines / finished.seconds, {"client": finished.peak_mb, "worker": peak})

    def fill(self, data):
        """Let the database hold the sums of a log, and nothing else."""
        self.processor(data)

    def processor(self, data, cores=None, when_started=None):
        """Return the Measured seconds of data_processor.py with a log that is new to it."""
        self.renew_database()
        return self.processor_again(data, cores, when_started)

    def processor_again(self, data, cores=None, when_started=None):
        """Return the Measured seconds of data_processor.py with a log whose events the database may
        know."""
        finished = self.scripts.process(data.log, data.revenue, cores, when_started)
        return Measured(finished.seconds, {"processor": finished.peak_mb})

    def nothing_new(self, data):
        """Return the Measured milliseconds of data_processor.py when its log has not grown; fill()
        comes before."""
        runs = [self.processor_again(data) for _ in range(REPEATS)]
        seconds = statistics.median(run.value for run in runs)
        peak = max(run.peaks["processor"] for run in runs)
        return Measured(1000 * seconds, {"processor": peak})

    def start_up(self):
        """Return the milliseconds in which data_processor.py is read, with all that it imports."""
        seconds = statistics.median(self.scripts.start() for _ in range(REPEATS))
        return 1000 * seconds


# ---- The command line ----------------------------------------------------------------------------

def at_least_one(text):
    """Return the number in an argument; raise ValueError unless it is at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def new_parser(description, example, rows):
    """Return an ArgumentParser with the options that both programs have; rows are the names of what
    they measure."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"Example: {example}. Works in a scratch database, which it creates and drops, on "
               "the server that DATABASE_URL or libpq's variables name.")
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=rows, default=rows,
                        help=f"measure only these: {', '.join(rows)}")
    parser.add_argument("--events", type=at_least_one, default=1_000_000,
                        help="in the usual log (default: %(default)s)")
    parser.add_argument("--seconds", type=at_least_one, default=4,
                        help="of each wrk (default: %(default)s)")
    parser.add_argument("--directory", default=".",
                        help="where a temporary one is made, on the disk to be synced")
    return parser


def run_benchmark(options, measure):
    """Call measure(options, directory, database) with a temporary directory and a scratch database,
    and return the exit status: 1 with a sentence when something failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is also ended
    os.environ.pop("EVENTS_AUTHORIZATION", None)
    try:
        with (tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.directory) as directory,
              scratch_database() as database):
            measure(options, Path(directory).resolve(), database)
    except (Failure, OSError, psycopg2.Error, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def print_table(lines):
    """Print rows of texts as a Markdown table; the first one is the heading."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    heading, *rows = lines
    rule = ["-" * width for width in widths]
    for line in [heading, rule, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        print("|", " | ".join(cells), "|")
