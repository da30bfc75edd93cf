"""Measure the three scripts against the floor under any program of their kind, and print one table.

A figure is the median over the runs, a ratio the median of the runs' own ratios: a figure and its limit are measured
one right after the other, so that whatever slows the machine down slows both. After every run of data_processor.py
each user's revenue in the database is compared with a sum made when the events were generated; a difference ends the
benchmark.

Needs Linux (peak memory is read from /proc), PostgreSQL, and wrk for the single requests.
"""
import argparse
import collections
import contextlib
import http.server
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
from decimal import Decimal
from pathlib import Path

import psycopg2
from psycopg2.extensions import make_dsn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data_processor import DEFAULT_LOG, Failure, connect, first_line  # noqa: E402

USERS = 100_000
PRODUCER_EVENTS = 1000  # of each producer in the log of many producers
BATCH_EVENTS = 100  # ten batches a producer there, scattered over the whole log
REPEATED_BATCHES = 0.1
NEW_EVENTS = 100_000  # appended to the large log
BLOCKS = 5  # what takes milliseconds is repeated in each run, in turn with its limit
LATENCY_REQUESTS = 200  # in a block
BACKLOG = 4096  # server.py's
STOP_SECONDS = 60

EVENT = b'{"userId": "user123", "name": "add_revenue", "value": 100}'
WRK_SCRIPT = f"wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/json'\nwrk.body = '{EVENT.decode()}'\n"
REQUEST = (b"POST /liveEvent HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
           b"Content-Length: %d\r\n\r\n%b" % (len(EVENT), EVENT))

# Linux counts the memory of whoever calls exec into the peak of the program that it becomes. Started by a process this
# small, a script is not reported with the size of the benchmark.
STOPWATCH = """
import os, sys, time
begun = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - begun, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


# ---- Events ---------------------------------------------------------------------------------------------------------

def write_events(path, count, seed, revenue):
    """Write count random events, the same for the same seed, and add them to revenue, {user: sum}."""
    chance = random.Random(seed).random
    with open(path, "w") as file:
        for _ in range(count):
            user, value = f"user{int(chance() * USERS)}", int(chance() * 1000)
            name, sign = ("add_revenue", 1) if chance() < 0.8 else ("subtract_revenue", -1)
            file.write(f'{{"userId": "{user}", "name": "{name}", "value": {value}}}\n')
            revenue[user] += sign * value


def write_many_producers(events_path, log_path):
    """Write the log that a crowd of clients leaves behind when each sends a part of the events: its batches in any
    order, some of them twice. Return its number of lines."""
    chance, lines = random.Random(1), 0
    with open(events_path, "rb") as events, open(log_path, "w") as log:
        ends = itertools.accumulate(map(len, events), initial=0)
        batches = list(enumerate(itertools.islice(ends, 0, None, BATCH_EVENTS)))
        batches += chance.sample(batches, round(REPEATED_BATCHES * len(batches)))
        chance.shuffle(batches)
        producers = collections.defaultdict(lambda: secrets.token_urlsafe(16))
        field = f', "log": "{secrets.token_hex(16)}"'
        for number, offset in batches:
            producer, first = divmod(number * BATCH_EVENTS, PRODUCER_EVENTS)
            events.seek(offset)
            for sequence, line in enumerate(itertools.islice(events, BATCH_EVENTS), first + 1):
                name = f'"producerId": "{producers[producer]}", "sequence": {sequence}'
                log.write(f"{line.decode()[:-2]}{field}, {name}}}\n")
                field = ""  # only in the first line
                lines += 1
    return lines


# ---- The limits -----------------------------------------------------------------------------------------------------

class EmptyHandler(http.server.BaseHTTPRequestHandler):
    """The least that http.server can do for a request: read its body and answer ok."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # buffered: head and body leave in one send
    disable_nagle_algorithm = True

    def do_POST(self):
        """Answer ok."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *arguments):
        """Say nothing."""


def serve_empty(listener):
    """Serve EmptyHandler on a listening socket that is shared with other processes, until SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    server = http.server.ThreadingHTTPServer(listener.getsockname(), EmptyHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.handle_error = lambda *_: None  # wrk resets its connections when its time is up, and checks every answer
    server.serve_forever()


@contextlib.contextmanager
def empty_server():
    """Run the empty handler in as many processes as server.py has; yield the port."""
    context = multiprocessing.get_context("fork")
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        listener.setblocking(False)  # all workers wake for a connection that one of them gets
        workers = [context.Process(target=serve_empty, args=[listener], daemon=True) for _ in range(os.cpu_count())]
        for worker in workers:
            worker.start()
        try:
            yield listener.getsockname()[1]
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()


def in_child(function, *arguments):
    """Return what function returns in a process of its own, with a heap of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
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


def sync_times(path, count):
    """Return the seconds of count fdatasyncs, each of one more line at the end of the file."""
    times = []
    with open(path, "ab", buffering=0) as file:
        for _ in range(count):
            file.write(EVENT + b"\n")
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    return times


# ---- The scripts ----------------------------------------------------------------------------------------------------

def run_python(*arguments, cwd):
    """Run Python to its end; return (seconds with start-up, peak memory in MB), or raise Failure with its stderr."""
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", STOPWATCH, sys.executable, *map(str, arguments)],
                               cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
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


def worker_peak(pid):
    """Return the peak memory in MB of the largest worker of the server that is running as pid."""
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    peaks = [re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{worker}/status").read_text())[1] for worker in workers]
    return max(map(int, peaks)) * 1024 / 1e6


def send_events(directory, port):
    """Run client.py on the events.jsonl of directory; return (seconds, peak memory)."""
    return run_python(ROOT / "client.py", "--url", f"http://127.0.0.1:{port}/liveEvent", cwd=directory)


def process_log(directory, revenue):
    """Run data_processor.py in directory and compare the database with revenue; return (seconds, peak memory)."""
    result = run_python(ROOT / "data_processor.py", cwd=directory)
    with contextlib.closing(connect()) as connection, connection.cursor() as sql:
        sql.execute("SELECT user_id, revenue FROM users_revenue")
        found = dict(sql)
    if found != revenue:
        raise Failure(f"WRONG RESULT: {len(found):,} users with {sum(found.values()):,} in all are in the database, "
                      f"instead of {len(revenue):,} users with {sum(revenue.values()):,}.")
    return result


def empty_tables():
    """Give the scratch database new tables."""
    with contextlib.closing(connect()) as connection, connection, connection.cursor() as sql:
        sql.execute("DROP TABLE IF EXISTS users_revenue, event_producers, event_logs")
        sql.execute((ROOT / "create_table.sql").read_text())


@contextlib.contextmanager
def scratch_database():
    """Create a database on the server that the environment names, and let the environment name it; yield the versions
    that the server states; drop it."""
    name = f"events_benchmark_{os.getpid()}"
    with contextlib.closing(connect(connect_timeout=10)) as connection, connection.cursor() as sql:
        connection.autocommit = True
        sql.execute("SELECT current_setting('server_version'), current_setting('fsync')")
        version, fsync = sql.fetchone()
        sql.execute(f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0")
        password = connection.info.password  # connection.dsn shows it as xxx
        os.environ["DATABASE_URL"] = make_dsn(connection.dsn, dbname=name, **{"password": password} if password else {})
        try:
            yield f"PostgreSQL {version} with fsync {fsync}"
        finally:
            sql.execute(f"DROP DATABASE {name} WITH (FORCE)")


# ---- The measurements -----------------------------------------------------------------------------------------------

class Figures(dict):
    """{name: the values of all runs}."""

    def add(self, **values):
        """Add one value to each of the names, and show it."""
        for name, value in values.items():
            self.setdefault(name, []).append(value)
            print(f"  {name} {value:,.6g}", file=sys.stderr, flush=True)

    def median(self, name):
        """Return the median of the runs."""
        return statistics.median(self[name])

    def ratio(self, name, limit):
        """Return the median of the runs' own ratios."""
        return statistics.median(value / base for value, base in zip(self[name], self[limit], strict=True))


def wrk(port, connections, seconds, script):
    """Return the requests per second that one thread of wrk gets answered, and how many that were; raise Failure
    unless all of them succeeded."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", script, f"http://127.0.0.1:{port}/liveEvent"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise Failure(f"Requests failed:\n{output}")
    return float(re.search(r"Requests/sec:\s+([0-9.]+)", output)[1]), int(re.search(r"(\d+) requests in", output)[1])


def request_times(port, count):
    """Return the seconds of count requests, one after the other on one connection."""
    times = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(count):
            begun = time.perf_counter()
            connection.sendall(REQUEST)
            answer = connection.recv(65536)  # both servers send it in one piece
            times.append(time.perf_counter() - begun)
            if not answer.startswith(b"HTTP/1.1 200 ") or not answer.endswith((b"ok", b"}")):
                raise Failure(f"A request was answered with {answer}.")
    return times


def measure_requests(figures, directory, seconds):
    """Measure single requests to a new server and to the empty handler, in turn."""
    script = directory.with_suffix(".lua")
    script.write_text(WRK_SCRIPT)
    times = collections.defaultdict(list)
    with server(directory) as (port, pid), empty_server() as empty:
        answered = BLOCKS * LATENCY_REQUESTS
        for connections in (32, 128) if shutil.which("wrk") else ():
            rate, count = wrk(port, connections, seconds, script)
            limit, _ = wrk(empty, connections, seconds, script)
            figures.add(**{f"wrk_{connections}": rate, f"empty_wrk_{connections}": limit})
            answered += count
        for _ in range(BLOCKS):
            times["latency"] += request_times(port, LATENCY_REQUESTS)
            times["empty_latency"] += request_times(empty, LATENCY_REQUESTS)
            times["sync"] += sync_times(directory / "synced", LATENCY_REQUESTS)
        figures.add(**{name: statistics.median(values) for name, values in times.items()},
                    single_worker_peak=worker_peak(pid))
    figures.add(latency_limit=figures["empty_latency"][-1] + figures["sync"][-1])
    with open(directory / DEFAULT_LOG, "rb") as log:
        if (logged := sum(1 for _ in log)) < answered:
            raise Failure(f"WRONG RESULT: {answered:,} requests were acknowledged, but {logged:,} events logged.")


def measure_batches(figures, directory, events, revenue):
    """Measure client.py, and data_processor.py on the log that it fills, each next to its limit."""
    with server(directory) as (port, pid):
        seconds, peak = send_events(events.parent, port)
        figures.add(client=seconds, client_peak=peak, worker_peak=worker_peak(pid))
    log = directory / DEFAULT_LOG
    figures.add(decode=in_child(decode_log, log))
    empty_tables()
    seconds, peak = process_log(directory, revenue)
    figures.add(processor=seconds, processor_peak=peak, sum=in_child(sum_log, log))
    measure_again(figures, directory, revenue, "again")


def measure_again(figures, directory, revenue, name):
    """Measure data_processor.py on a log without anything new, next to its start-up alone."""
    times, startups = [], []
    for _ in range(BLOCKS):
        times.append(process_log(directory, revenue)[0])
        startups.append(run_python("-c", "import data_processor", cwd=ROOT)[0])
    figures.add(**{name: statistics.median(times), f"{name}_startup": statistics.median(startups)})


def measure_many_producers(figures, directory, lines, events, revenue):
    """Measure data_processor.py on the log of many producers, per line, next to the plain log of the same run."""
    empty_tables()
    seconds, peak = process_log(directory, revenue)
    figures.add(many=seconds / lines, many_processor_peak=peak, plain=figures["processor"][-1] / events)


def measure_growth(figures, directory, count, runs):
    """Measure the scripts once with many events, then runs times with some new ones behind them and without those."""
    directory.mkdir()
    revenue = collections.defaultdict(int)
    write_events(directory / "events.jsonl", count, 2, revenue)
    with server(directory) as (port, pid):
        seconds, peak = send_events(directory, port)
        figures.add(large_client=seconds, large_client_peak=peak, large_worker_peak=worker_peak(pid))
        empty_tables()
        seconds, peak = process_log(directory, revenue)
        figures.add(large_processor=seconds, large_processor_peak=peak)
        for run in range(runs):
            measure_again(figures, directory, revenue, "large_again")
            write_events(directory / "events.jsonl", NEW_EVENTS, 3 + run, revenue)
            send_events(directory, port)
            figures.add(appended=process_log(directory, revenue)[0])
    for run in range(runs):
        alone = collections.defaultdict(int)
        write_events(directory / "events.jsonl", NEW_EVENTS, 3 + run, alone)
        with server(directory / f"alone-{run}") as (port, _):
            send_events(directory, port)
        empty_tables()
        figures.add(alone=process_log(directory / f"alone-{run}", alone)[0])


def measure(options, directory):
    """Return the figures of all runs."""
    figures, revenue = Figures(), collections.defaultdict(int)
    events, crowd = directory / "events.jsonl", directory / "crowd"
    crowd.mkdir()
    print("Generating events", file=sys.stderr)
    write_events(events, options.events, 1, revenue)
    lines = write_many_producers(events, crowd / DEFAULT_LOG)
    for run in range(1, options.runs + 1):
        print(f"Run {run} of {options.runs}", file=sys.stderr)
        measure_requests(figures, directory / f"requests-{run}", options.seconds)
        measure_batches(figures, directory / f"batches-{run}", events, revenue)
        measure_many_producers(figures, crowd, lines, options.events, revenue)
        shutil.rmtree(directory / f"requests-{run}")
        shutil.rmtree(directory / f"batches-{run}")
    if options.large:
        print("Growth", file=sys.stderr)
        measure_growth(figures, directory / "large", options.large, options.runs)
    return figures


# ---- The table ------------------------------------------------------------------------------------------------------

def rows(figures, options):
    """Return the table: work, measured, limit, ratio, wanted, peak memory."""
    median, ratio = figures.median, figures.ratio
    table = [("work", "measured", "limit", "ratio", "wanted", "peak memory")]
    for connections, wanted in (32, "≥ 0.70"), (128, "≥ 0.85"):
        work, name, limit = (text + str(connections) for text in ("single requests, wrk -t1 -c", "wrk_", "empty_wrk_"))
        table.append((work, f"{median(name):,.0f}/s", f"{median(limit):,.0f}/s empty handler",
                      f"{ratio(name, limit):.2f}", wanted, peak(figures, "single_worker", 60)) if name in figures else
                     (work, "wrk is missing", "", "", wanted, ""))
    events = f"{options.events:,} events"
    return table + [
        ("latency at one connection", f"{1e3 * median('latency'):.2f} ms",
         f"{1e3 * median('empty_latency'):.2f} ms empty handler + {1e3 * median('sync'):.2f} ms sync",
         f"{ratio('latency', 'latency_limit'):.2f}", "≤ 2.00", ""),
        (f"client.py, {events}", f"{options.events / median('client'):,.0f}/s",
         f"{options.events / median('decode'):,.0f}/s bare decoding", f"{ratio('decode', 'client'):.2f}", "≥ 0.60",
         peak(figures, "client", 60) + ", " + peak(figures, "worker", 60)),
        (f"data_processor.py, {events}", f"{median('processor'):.2f} s", f"{median('sum'):.2f} s decode and sum",
         f"{ratio('processor', 'sum'):.2f}", "≤ 1.30", peak(figures, "processor", 150)),
        again_row(figures, "again", f"data_processor.py after {events}, nothing new"),
        ("data_processor.py, many producers", f"{1e6 * median('many'):.2f} µs a line",
         f"{1e6 * median('plain'):.2f} µs a line of the plain log", f"{ratio('many', 'plain'):.2f}", "≤ 1.20",
         peak(figures, "many_processor", 150)),
        *(growth_rows(figures, options) if options.large else ())]


def growth_rows(figures, options):
    """Return the rows of the large log. The limit of each script is its own time with fewer events, multiplied."""
    median, times, events = figures.median, options.large / options.events, f"{options.large:,} events"
    client, processor = (median(f"large_{script}") / median(script) / times for script in ("client", "processor"))
    return [
        (f"client.py, {events}", f"{median('large_client'):.2f} s", f"{times:.3g} × {median('client'):.2f} s",
         f"{client:.2f}", "≈ 1", peak(figures, "client", 60, "large_") + ", " + peak(figures, "worker", 60, "large_")),
        (f"data_processor.py, {events}", f"{median('large_processor'):.2f} s",
         f"{times:.3g} × {median('processor'):.2f} s", f"{processor:.2f}", "≈ 1",
         peak(figures, "processor", 150, "large_")),
        again_row(figures, "large_again", f"data_processor.py after {events}, nothing new"),
        (f"data_processor.py after {events}, {NEW_EVENTS:,} new", f"{median('appended'):.2f} s",
         f"{median('alone'):.2f} s with an empty log before them", f"{figures.ratio('appended', 'alone'):.2f}", "≈ 1",
         "")]


def again_row(figures, name, work):
    """Return the row of a data_processor.py that finds nothing new."""
    seconds, startup = figures.median(name), figures.median(f"{name}_startup")
    return work, f"{seconds:.3f} s", f"{startup:.3f} s start-up", f"{1e3 * (seconds - startup):+.0f} ms", "< +50 ms", ""


def peak(figures, script, wanted, large=""):
    """Return words for a script's peak memory in MB, and with large for its growth."""
    base, most = max(figures[f"{script}_peak"]), max(figures[f"{large}{script}_peak"])
    growth = f" = {most / base:.2f} × {base:.0f}" if large else ""
    return f"{script.split('_')[-1]} {most:.0f} MB (< {wanted}){growth}"


def print_table(table):
    """Print rows as a Markdown table; the first one is the heading."""
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in [table[0], ["-" * width for width in widths], *table[1:]]:
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths)), "|")


def machine(database):
    """Return one line about what the figures were measured on."""
    model = re.search(r"(?m)^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return (f"{os.cpu_count()} cores, {model[1] if model else platform.machine()}; {platform.system()} "
            f"{platform.release()}; Python {platform.python_version()}; {database}")


def main(arguments=None):
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        description="Measure server.py, client.py and data_processor.py against limits measured in the same run.",
        epilog="Example: pg_virtualenv -t python benchmarks/pipeline.py --runs 5 --large 10000000. Works in a scratch "
               "database, which it creates and drops, on the server that DATABASE_URL or libpq's variables name.")
    parser.add_argument("--runs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--events", type=int, default=1_000_000, help="in a run (default: %(default)s)")
    parser.add_argument("--large", type=int, metavar="EVENTS",
                        help="also measure how the cost grows up to so many events (default: do not)")
    parser.add_argument("--seconds", type=int, default=4, help="of each wrk (default: %(default)s)")
    parser.add_argument("--directory", default=".", help="where to make a temporary directory, which decides what a "
                        "sync costs (default: the current one)")
    options = parser.parse_args(arguments)
    if min(options.runs, options.events, options.seconds, options.large or 1) < 1:
        parser.error("numbers must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was begun is also ended
    os.environ.pop("EVENTS_AUTHORIZATION", None)
    if not shutil.which("wrk"):
        print("wrk is missing, so single requests are not measured; install it with: apt-get install wrk",
              file=sys.stderr)
    try:
        with (tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.directory) as directory,
              scratch_database() as database):
            figures = measure(options, Path(directory).resolve())
    except psycopg2.Error as error:
        print(f"No benchmark without the database: {first_line(error)}.", file=sys.stderr)
        return 1
    except (Failure, OSError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print_table(rows(figures, options))
    print(f"\n{machine(database)}\n{shlex.join(['python', *sys.argv])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
