"""Measure the three scripts against the floor under any program of their kind and against what people would use
instead; print one table and one chart. It needs Linux (for /proc) and PostgreSQL, and leaves out what is not installed:
wrk (for requests), Redis, and DuckDB's module.

A figure is the median over the runs, a ratio the median of the runs' own ratios: whatever slows the machine down slows
a figure and its limit in the same run. After every run of data_processor.py each user's revenue in the database is
compared with a sum made when the events were generated; a difference ends the benchmark.
"""
import argparse
import collections
import contextlib
import http.server
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
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
import timeit
from decimal import Decimal
from pathlib import Path

import psycopg2
from psycopg2.extensions import make_dsn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data_processor import DEFAULT_LOG, Failure, connect, explain, usable_cores  # noqa: E402

FORK = multiprocessing.get_context("fork")
DATABASE = f"events_benchmark_{os.getpid()}"
USERS = 100_000
PRODUCER_EVENTS, BATCH_EVENTS, REPEATED = 1000, 100, 0.1  # of many producers, whose batches are scattered over a log
LONG_ID_BYTES = 64 * 1024 * 1024  # the log of long user ids
NEW_EVENTS = 100_000  # appended to the large log
BULK_EVENTS, BULK_CONNECTIONS = 1000, 8  # in a request to the server alone, and in a pipeline of Redis
BLOCKS = 5  # what takes milliseconds is repeated in each run, in turn with its limit
STOP_SECONDS = 60
CORES = [2**power for power in range(10) if 2**power < usable_cores()]  # and then all of them

EVENT = b'{"userId": "user123", "name": "add_revenue", "value": 100}\n'
REDIS = ("redis-server --bind 127.0.0.1 --port {port} --save '' --appendonly yes --appendfsync always "
         "--auto-aof-rewrite-percentage 0")  # rewriting its log meanwhile would make it slower
REDIS_BENCHMARK = (f"redis-benchmark -p {{port}} -n 1000000 -P {BULK_EVENTS} -c {BULK_CONNECTIONS} --csv "
                   "XADD events '*' userId user123 name add_revenue value 100")
LUA = "wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/{}'\nwrk.body = string.rep([[\n{}]], {})\n"
POST_ONE, POST_BULK = LUA.format("json", EVENT.decode(), 1), LUA.format("x-ndjson", EVENT.decode(), BULK_EVENTS)
DUCKDB = f"""
import os, duckdb, psycopg2
duckdb.execute('''
    COPY (SELECT "userId", sum(CASE name WHEN 'add_revenue' THEN value ELSE -value END)
          FROM read_json('{DEFAULT_LOG}', format = 'newline_delimited',
                         columns = {{'userId': 'VARCHAR', 'name': 'VARCHAR', 'value': 'DECIMAL(38, 18)'}})
          GROUP BY 1) TO 'sums.csv' (FORMAT csv, HEADER false)''')
with psycopg2.connect(os.environ["DATABASE_URL"]) as connection, connection.cursor() as sql, open("sums.csv") as sums:
    sql.execute("CREATE TABLE duckdb (LIKE users_revenue INCLUDING ALL)")
    sql.copy_expert("COPY duckdb FROM STDIN (FORMAT csv)", sums)
"""
BIND_BACKEND = (f"until pid=$(pgrep -f '^postgres: .* {DATABASE} '); do sleep 0.01; done; "
                f"taskset -p -c {min(os.sched_getaffinity(0))} $pid")

# A measurement's line in the table; unit is how its figures are written, memory_mb what each of its processes may take.
RATE, SECONDS, MS = "{:,.0f}/s", "{:.2f} s", "{:.2f} ms"
Row = collections.namedtuple("Row", "work unit limit wanted memory_mb", defaults=["", 80])
PROCESSOR, LARGE = "data_processor.py, {events:,} events", "data_processor.py after {large:,} events"
ROWS = {
    "single 32": Row("single requests, wrk -t1 -c32", RATE, "empty handler", "≥ 0.70"),
    "single 128": Row("single requests, wrk -t1 -c128", RATE, "empty handler", "≥ 0.85"),
    "latency": Row("latency at one connection", MS, "empty handler, then a sync", "≤ 2.00"),
    "revenue": Row("revenue queries, wrk -t1 -c32", RATE, "empty handler"),
    "batches": Row(f"batches of {BULK_EVENTS:,} events, wrk -t1 -c{BULK_CONNECTIONS}", RATE, "Redis Streams", "≥ 3.50"),
    "client": Row("client.py, {events:,} events", RATE, "bare decoding", "≥ 1.20"),
    "processor": Row(PROCESSOR, SECONDS, "decode and sum", "≤ 0.80"),
    "duckdb": Row(PROCESSOR, SECONDS, "DuckDB + COPY", "≤ 2.60"),
    **{f"cores {count}": Row(f"{PROCESSOR}, on cores: {count}", SECONDS, "decode and sum") for count in CORES},
    "one core": Row(f"{PROCESSOR}, one core with PostgreSQL", SECONDS, "decode and sum", "≤ 1.30"),
    "many": Row("data_processor.py, many producers, out of order, 10 % twice", SECONDS, "plain, per line", "≤ 1.30"),
    "copy": Row(f"{PROCESSOR}, a copy of the log", SECONDS, "the first time", "≤ 1.00"),
    "again": Row(f"{PROCESSOR}, nothing new", MS, "start-up", "≤ 1.50"),
    "long": Row("data_processor.py, 64 MiB of user ids of 255 emoji", SECONDS, "decode and sum", memory_mb=250),
    "large client": Row("client.py, {large:,} events", RATE, "with {events:,}", "≈ 1"),
    "large processor": Row("data_processor.py, {large:,} events", SECONDS, "with {events:,}, multiplied", "≈ 1"),
    "large again": Row(f"{LARGE}, nothing new", MS, "start-up", "≤ 1.50"),
    "large new": Row(f"{LARGE}, {NEW_EVENTS:,} new", SECONDS, "with an empty log before them", "≈ 1"),
}
CHART = (("server.py", "batches", 0), ("Redis Streams", "batches", 1), ("data_processor.py", "processor", 0),
         ("decode and sum", "processor", 1), ("DuckDB + COPY", "duckdb", 1))

# Linux counts the memory of whoever calls exec into the peak of the program that it becomes. Started by a process this
# small, a script is not reported with the size of the benchmark.
STOPWATCH = """
import os, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
begun = time.perf_counter()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - begun, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


# ---- Events ---------------------------------------------------------------------------------------------------------

def write_events(path, count, seed):
    """Write count random events, the same for the same seed; return {user: sum}."""
    chance, revenue = random.Random(seed).random, collections.Counter()
    with open(path, "w") as file:
        for _ in range(count):
            user, value = f"user{int(chance() * USERS)}", int(chance() * 1000)
            name, sign = ("add_revenue", 1) if chance() < 0.8 else ("subtract_revenue", -1)
            file.write(f'{{"userId": "{user}", "name": "{name}", "value": {value}}}\n')
            revenue[user] += sign * value
    return revenue


def write_many_producers(events, log):
    """Write the log of clients that each sent a part of the events, in batches that came in any order, some of them
    twice; return its number of lines."""
    chance, lines = random.Random(1), events.read_text().splitlines()
    batches = [range(len(lines))[first:first + BATCH_EVENTS] for first in range(0, len(lines), BATCH_EVENTS)]
    batches += chance.sample(batches, round(REPEATED * len(batches)))
    chance.shuffle(batches)
    producers = collections.defaultdict(lambda: secrets.token_urlsafe(16))
    with open(log, "w") as file:
        for number in itertools.chain(*batches):
            producer, before = divmod(number, PRODUCER_EVENTS)
            file.write(f'{lines[number][:-1]}, "producerId": "{producers[producer]}", "sequence": {before + 1}}}\n')
    return sum(map(len, batches))


def write_long_ids(path):
    """Write a log of events of users whose ids take as much memory as ids can; return {user: sum}."""
    users = [f"{number:06}".ljust(255, "\U0001f600") for number in range(LONG_ID_BYTES // (6 + 249 * 4))]
    with open(path, "w", encoding="utf-8") as log:
        for number, user in enumerate(users, 1):
            event = {"userId": user, "name": "add_revenue", "value": 1, "producerId": "long", "sequence": number}
            log.write(json.dumps(event, ensure_ascii=False) + "\n")
    return dict.fromkeys(users, 1)


# ---- The limits -----------------------------------------------------------------------------------------------------

class EmptyHandler(http.server.BaseHTTPRequestHandler):
    """The least that http.server can do for a request: read its body and answer ok."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # buffered: head and body leave in one send
    disable_nagle_algorithm = True

    def do_POST(self):
        """Answer ok."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    do_GET = do_POST

    def log_message(self, *arguments):
        """Say nothing."""


@contextlib.contextmanager
def empty_server():
    """Run EmptyHandler in as many processes as server.py has; yield the port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyHandler) as empty:
        empty.socket.listen(4096)  # as server.py does
        empty.socket.setblocking(False)  # all workers wake for a connection that one of them gets
        empty.handle_error = lambda *_: None  # wrk resets its connections when its time is up, and checks every answer
        workers = [FORK.Process(target=empty.serve_forever, daemon=True) for _ in range(usable_cores())]
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a worker ends
        for worker in workers:
            worker.start()
        signal.signal(signal.SIGINT, before)
        try:
            yield empty.server_port
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def in_child(function, *arguments):
    """Return what function returns in a process of its own, with a heap of its own."""
    with FORK.Pool(1) as pool:
        return pool.apply(function, arguments)


def decode_log(path):
    """Return the seconds that one core needs to decode the log's lines, already read, and to do nothing else."""
    decode, seconds = json.JSONDecoder(parse_float=Decimal).decode, 0.0
    with open(path, encoding="utf-8", newline="\n") as log:
        while lines := log.readlines(8 * 1024 * 1024):
            begun = time.perf_counter()
            for line in lines:
                decode(line)
            seconds += time.perf_counter() - begun
    return seconds


def sum_log(path):
    """Return the seconds that one core needs to read and decode the log's lines and to sum them into a dict."""
    decode, revenue = json.JSONDecoder(parse_float=Decimal).decode, {}
    begun = time.perf_counter()
    with open(path, encoding="utf-8", newline="\n") as log:
        for line in log:
            event = decode(line)
            user, value = event["userId"], event["value"]
            revenue[user] = revenue.get(user, 0) + (value if event["name"] == "add_revenue" else -value)
    return time.perf_counter() - begun


def redis_rate(directory):
    """Return how many events a second Redis Streams take, answered after a sync, or None where Redis is missing."""
    if not shutil.which("redis-server") or not shutil.which("redis-benchmark"):
        return None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(shlex.split(REDIS.format(port=port)), cwd=directory, stdout=subprocess.PIPE, text=True)
    try:
        any("Ready to accept" in line for line in process.stdout)  # reads up to there
        output = subprocess.check_output(shlex.split(REDIS_BENCHMARK.format(port=port)), text=True)
    finally:
        process.terminate()
        process.communicate(timeout=STOP_SECONDS)
    return float(output.splitlines()[-1].split('","')[1])


# ---- The scripts ----------------------------------------------------------------------------------------------------

def run_python(*arguments, cwd, cores=usable_cores(), meanwhile=lambda: None):
    """Run Python on so many cores to its end, and meanwhile() after its start. Return (seconds with start-up, peak
    memory in MB of the largest of its processes), or raise Failure with its stderr."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", STOPWATCH, str(cores), sys.executable, *map(str, arguments)], cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        meanwhile()
        output, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        raise Failure(f"{shlex.join(map(str, arguments))} exited with status {process.returncode}: {errors or output}")
    seconds, kilobytes = output.splitlines()[-1].split()
    return float(seconds), int(kilobytes) * 1024 / 1e6


@contextlib.contextmanager
def server(directory):
    """Run server.py with its defaults in a new directory; yield (port, pid). Raise Failure unless it ends well."""
    directory.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, ROOT / "server.py", "--port", "0"], cwd=directory, text=True,
                               stdout=subprocess.PIPE)
    try:
        port = re.match(r"Listening on http://127\.0\.0\.1:(\d+), ", process.stdout.readline())
        if not port:
            raise Failure("server.py does not say where it listens.")
        yield int(port[1]), process.pid
    finally:
        process.terminate()
        process.communicate(timeout=STOP_SECONDS)
    if process.returncode:
        raise Failure(f"server.py exited with status {process.returncode}.")


def worker_mb(pid):
    """Return the peak memory in MB of the largest worker of the server that is running as pid."""
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    peaks = [re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{worker}/status").read_text())[1] for worker in workers]
    return max(map(int, peaks)) * 1024 / 1e6


def send_events(directory, port):
    """Run client.py on the events.jsonl of directory; return (seconds, peak memory)."""
    return run_python(ROOT / "client.py", "--url", f"http://127.0.0.1:{port}/liveEvent", cwd=directory)


def process_log(log, revenue, **how):
    """Run data_processor.py on log and compare the database with revenue; return (seconds, peak memory)."""
    result = run_python(ROOT / "data_processor.py", log, cwd=log.parent, **how)
    with contextlib.closing(connect()) as connection, connection.cursor() as sql:
        sql.execute("SELECT user_id, revenue FROM users_revenue")
        found = dict(sql)
    if differing := found.items() ^ revenue.items():
        raise Failure(f"WRONG RESULT: {len(differing):,} sums are not those of the events, or are missing or too many.")
    return result


def duckdb_seconds(directory):
    """Return the seconds that a program needs which sums the log in directory with DuckDB and copies the sums to
    PostgreSQL, or None where DuckDB is missing; raise Failure unless its sums are those of users_revenue."""
    if not importlib.util.find_spec("duckdb"):
        return None
    seconds, _ = run_python("-c", DUCKDB, cwd=directory)
    with contextlib.closing(connect()) as connection, connection.cursor() as sql:
        sql.execute("(TABLE duckdb EXCEPT TABLE users_revenue) UNION ALL (TABLE users_revenue EXCEPT TABLE duckdb)")
        if sql.rowcount:
            raise Failure(f"WRONG RESULT: DuckDB and data_processor.py differ in {sql.rowcount:,} rows.")
    return seconds


def empty_tables():
    """Give the scratch database new tables."""
    with contextlib.closing(connect()) as connection, connection, connection.cursor() as sql:
        sql.execute("DROP TABLE IF EXISTS users_revenue, event_producers, event_logs, duckdb")
        sql.execute((ROOT / "create_table.sql").read_text())


@contextlib.contextmanager
def scratch_database():
    """Create a database and let the environment name it, until it is dropped; yield what PostgreSQL says of itself."""
    with contextlib.closing(connect(connect_timeout=10)) as connection, connection.cursor() as sql:
        connection.autocommit = True
        sql.execute("SELECT current_setting('server_version'), current_setting('fsync')")
        version, fsync = sql.fetchone()
        sql.execute(f"CREATE DATABASE {DATABASE} ENCODING 'UTF8' TEMPLATE template0")
        password = {"password": connection.info.password} if connection.info.password else {}  # the dsn shows xxx
        os.environ["DATABASE_URL"] = make_dsn(connection.dsn, dbname=DATABASE, **password)
        try:
            yield f"PostgreSQL {version} with fsync {fsync}"
        finally:
            sql.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")


# ---- The measurements -----------------------------------------------------------------------------------------------

class Figures(dict):
    """{name in ROWS: [(measured, limit, ratio, {process: peak memory in MB}) of each run]}. Without a limit, because
    something is not installed, limit and ratio are None."""

    def add(self, name, measured, limit, **peaks):
        """Add what one run measured, and show it."""
        self.setdefault(name, []).append((measured, limit, limit and measured / limit, peaks))
        print(f"  {name}: {measured:,.6g} / {limit or 0:,.6g}", peaks or "", file=sys.stderr, flush=True)

    def median(self, name, place=0):
        """Return the median over the runs of the measured figures, limits (1) or ratios (2), or None."""
        values = [run[place] for run in self.get(name, ())]
        return statistics.median(values) if values and None not in values else None

    def add_processor(self, name, log, revenue, limit, *, new_tables=True, **how):
        """Add a run of data_processor.py; return its seconds."""
        if new_tables:
            empty_tables()
        seconds, peak = process_log(log, revenue, **how)
        self.add(name, seconds, limit, processor=peak)
        return seconds

    def add_nothing_new(self, name, log, revenue):
        """Add runs of data_processor.py on a log without anything new, in turn with its start-up alone, in ms."""
        pairs = [(process_log(log, revenue)[0], run_python("-c", "import data_processor", cwd=ROOT)[0])
                 for _ in range(BLOCKS)]
        self.add(name, *[1e3 * statistics.median(times) for times in zip(*pairs)])


def wrk(directory, port, connections, seconds, script, path="/liveEvent"):
    """Return the answers per second that one thread of wrk gets, and their number; raise Failure if a request fails."""
    (directory / "wrk.lua").write_text(script)
    command = f"wrk -t1 -c{connections} -d{seconds}s -s wrk.lua http://127.0.0.1:{port}{path}"
    output = subprocess.check_output(command.split(), cwd=directory, text=True)
    if "Non-2xx" in output or "Socket errors" in output:
        raise Failure(f"Requests failed:\n{output}")
    return float(re.search(r"Requests/sec:\s+([0-9.]+)", output)[1]), int(re.search(r"(\d+) requests in", output)[1])


def measure_requests(figures, directory, options, user, port, pid):
    """Measure requests to the server, which knows user and has logged a run's events, each kind next to its limit."""
    logged = options.events
    with empty_server() as empty:
        for name, connections, *request in (
                ("single 32", 32, POST_ONE), ("single 128", 128, POST_ONE), ("latency", 1, POST_ONE),
                ("revenue", 32, "", f"/userEvents/{user}")):
            rate, count = wrk(directory, port, connections, options.seconds, *request)
            limit, _ = wrk(directory, empty, connections, options.seconds, *request)
            if name == "latency":
                with open(directory / "synced", "ab", buffering=0) as file:
                    sync = timeit.timeit(lambda: (file.write(EVENT), os.fdatasync(file.fileno())), number=1000)
                rate, limit = 1e3 / rate, 1e3 / limit + sync  # in ms; sync is the seconds of 1000
            figures.add(name, rate, limit, worker=worker_mb(pid))
            logged += count if name != "revenue" else 0
    rate, count = wrk(directory, port, BULK_CONNECTIONS, options.seconds, POST_BULK)
    figures.add("batches", BULK_EVENTS * rate, redis_rate(directory), worker=worker_mb(pid))
    with open(directory / DEFAULT_LOG, "rb") as log:
        if sum(block.count(b"\n") for block in iter(lambda: log.read(2**20), b"")) < logged + BULK_EVENTS * count:
            raise Failure("WRONG RESULT: more events were acknowledged than logged.")


def measure_processor(figures, log, revenue):
    """Measure data_processor.py on log, next to what else could sum it up, and on a copy; return its seconds."""
    bare = in_child(sum_log, log)
    seconds = figures.add_processor("processor", log, revenue, bare)
    figures.add("duckdb", seconds, duckdb_seconds(log.parent))
    for cores in CORES:
        figures.add_processor(f"cores {cores}", log, revenue, bare, cores=cores)
    try:
        figures.add_processor("one core", log, revenue, bare, cores=1, meanwhile=lambda: subprocess.run(
            BIND_BACKEND, shell=True, check=True, timeout=2, stdout=subprocess.DEVNULL))
    except subprocess.SubprocessError:
        print("  PostgreSQL could not be bound to the same core, so only data_processor.py was", file=sys.stderr)
    figures.add_nothing_new("again", log, revenue)
    with open(log, "r+b") as file:  # with another first line it is another log, and nothing is known but the ids
        os.pwrite(file.fileno(), file.readline().replace(b'"log"', b'"old"'), 0)
    figures.add_processor("copy", log, revenue, seconds, new_tables=False)
    return seconds


def measure_growth(figures, directory, options):
    """Measure the scripts with many events, then with some new ones behind them and with those alone."""
    directory.mkdir()
    log, alone = directory / DEFAULT_LOG, directory / "alone" / DEFAULT_LOG
    revenue = write_events(directory / "events.jsonl", options.large, 2)
    with server(directory) as (port, pid):
        took, peak = send_events(directory, port)
        figures.add("large client", options.large / took, figures.median("client"), client=peak, worker=worker_mb(pid))
        figures.add_processor("large processor", log, revenue,
                              figures.median("processor") * options.large / options.events)
        figures.add_nothing_new("large again", log, revenue)
        revenue.update(new := write_events(directory / "events.jsonl", NEW_EVENTS, 3))
        send_events(directory, port)
        seconds, _ = process_log(log, revenue)
    with server(alone.parent) as (port, _):
        send_events(directory, port)
    empty_tables()
    figures.add("large new", seconds, process_log(alone, new)[0])


def measure(options, directory):
    """Return the figures of all runs."""
    figures, log = Figures(), directory / "run" / DEFAULT_LOG
    events, crowd, long = (directory / name for name in ("events.jsonl", "crowd.jsonl", "long.jsonl"))
    print("Generating events", file=sys.stderr)
    revenue = write_events(events, options.events, 1)
    lines = write_many_producers(events, crowd)
    long_revenue = write_long_ids(long)
    for run in range(1, options.runs + 1):
        print(f"Run {run} of {options.runs}", file=sys.stderr)
        with server(log.parent) as (port, pid):
            seconds, peak = send_events(directory, port)
            figures.add("client", options.events / seconds, options.events / in_child(decode_log, log), client=peak,
                        worker=worker_mb(pid))
            seconds = measure_processor(figures, log, revenue)
            if shutil.which("wrk"):
                measure_requests(figures, log.parent, options, min(revenue), port, pid)
        shutil.rmtree(log.parent)
        figures.add_processor("many", crowd, revenue, seconds * lines / options.events)
        figures.add_processor("long", long, long_revenue, in_child(sum_log, long))
    if options.large:
        measure_growth(figures, directory / "large", options)
    return figures


# ---- The table ------------------------------------------------------------------------------------------------------

def table(figures, options):
    """Return the lines of the table, the heading first."""
    lines = [("work", "measured", "limit", "ratio", "wanted", "peak memory")]
    for name, row in ROWS.items():
        if options.large or not name.startswith("large"):
            measured, limit, ratio = (figures.median(name, place) for place in (0, 1, 2))
            peaks = collections.defaultdict(int)
            for process, peak in itertools.chain(*[run[3].items() for run in figures.get(name, ())]):
                peaks[process] = max(peak, peaks[process])
            lines.append((row.work.format(**vars(options)), row.unit.format(measured) if measured else "not measured",
                          f"{row.unit.format(limit) if limit else 'no'} {row.limit.format(**vars(options))}",
                          f"{ratio:.2f}" if ratio else "", row.wanted,
                          ", ".join(f"{process} {peak:.0f} MB (< {row.memory_mb})" for process, peak in peaks.items())))
    return lines


def print_results(figures, options, database):
    """Print the table and, for Mermaid, a bar chart of events per second; then what they were measured on."""
    lines = table(figures, options)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in [lines[0], ["-" * width for width in widths], *lines[1:]]:
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(line, widths)), "|")
    values = [(label, figures.median(name, place), ROWS[name].unit) for label, name, place in CHART]
    bars = {label: round(value if unit == RATE else options.events / value) for label, value, unit in values if value}
    print(f'\n```mermaid\nxychart-beta\n    x-axis {json.dumps(list(bars))}\n    y-axis "events per second"\n'
          f"    bar {list(bars.values())}\n```\n")
    model = re.search(r"(?m)^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    print(f"{usable_cores()} cores, {model[1] if model else platform.machine()}; {platform.system()} "
          f"{platform.release()}; Python {platform.python_version()}; {database}\n{shlex.join(['python', *sys.argv])}")


def main(arguments=None):
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        description="Measure server.py, client.py and data_processor.py against limits measured in the same run.",
        epilog="Example: pg_virtualenv -t python benchmarks/pipeline.py --runs 5 --large 10000000. Works in a scratch "
               "database, which it creates and drops, on the server that DATABASE_URL or libpq's variables name.")
    parser.add_argument("--runs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--events", type=int, default=1_000_000, help="in a run (default: %(default)s)")
    parser.add_argument("--large", type=int, metavar="EVENTS", help="also measure the growth up to so many")
    parser.add_argument("--seconds", type=int, default=4, help="of each wrk (default: %(default)s)")
    parser.add_argument("--directory", default=".", help="where a temporary one is made, on the disk to be synced")
    options = parser.parse_args(arguments)
    if min(options.runs, options.events, options.seconds, options.large or 1) < 1:
        parser.error("numbers must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was begun is also ended
    os.environ.pop("EVENTS_AUTHORIZATION", None)
    try:
        with (tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.directory) as directory,
              scratch_database() as database):
            figures = measure(options, Path(directory).resolve())
    except (Failure, OSError, psycopg2.Error, subprocess.SubprocessError) as error:
        print(explain(error) if isinstance(error, psycopg2.Error) else error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print_results(figures, options, database)
    return 0


if __name__ == "__main__":
    sys.exit(main())
