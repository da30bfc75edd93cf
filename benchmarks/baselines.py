"""What the three scripts are compared with: the least that any program of their kind must do, and
what people would use instead. A baseline that is not installed is None."""
import contextlib
import csv
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from decimal import Decimal

from shared import (BULK_CONNECTIONS, BULK_EVENTS, HERE, Failure, ask_for_revenue, connect,
                    free_port, run_program, running, usable_cores, wrk)

FORK = multiprocessing.get_context("fork")
# One sync takes so little time that it is measured over so many.
SYNCS = 1000
EVENT = b'{"userId": "user123", "name": "add_revenue", "value": 100}\n'
# Redis answers after a sync, as server.py does. It does not rewrite its log meanwhile, which would
# make it slower.
REDIS_SETTINGS = ["--save", "", "--appendonly", "yes", "--appendfsync", "always",
                  "--auto-aof-rewrite-percentage", "0"]
REDIS_REQUESTS = 1_000_000
REDIS_COMMAND = ["XADD", "events", "*", "userId", "user123", "name", "add_revenue", "value", "100"]
DUCKDB_DIFFERENCES = """
    (TABLE duckdb EXCEPT TABLE users_revenue) UNION ALL (TABLE users_revenue EXCEPT TABLE duckdb)
"""


# ---- Of server.py --------------------------------------------------------------------------------

@contextlib.contextmanager
def web_server(bench, *command):
    """Run a program that takes a port and a number of processes; yield its port. It has as many
    processes as server.py."""
    port = free_port()
    with bench.new_directory() as directory:
        with running([*command, port, usable_cores()], port, directory):
            yield port


def empty_handler(bench, connections):
    """Return the requests a second that http.server takes when it does nothing for them."""
    with web_server(bench, sys.executable, HERE / "empty_handler.py") as port:
        answers = wrk(port, connections, bench.seconds, "post_one.lua")
    return answers.per_second


def empty_queries(bench):
    """Return the revenue queries a second that http.server takes when it does nothing for them."""
    with web_server(bench, sys.executable, HERE / "empty_handler.py") as port:
        answers = ask_for_revenue(port, bench.inputs.usual.revenue, bench.seconds, checked=0)
    return answers.per_second


def sync_ms(bench):
    """Return the milliseconds in which one event is appended to a file and synced."""
    with bench.new_directory() as directory:
        with open(directory / "synced", "ab", buffering=0) as file:
            begun = time.perf_counter()
            for _ in range(SYNCS):
                file.write(EVENT)
                os.fdatasync(file.fileno())
            seconds = time.perf_counter() - begun
    return 1000 * seconds / SYNCS


def redis(bench):
    """Return the events a second that Redis Streams take."""
    if not shutil.which("redis-server") or not shutil.which("redis-benchmark"):
        return None
    port = free_port()
    with bench.new_directory() as directory:
        server = ["redis-server", "--bind", "127.0.0.1", "--port", port, *REDIS_SETTINGS]
        with running(server, port, directory):
            output = subprocess.check_output(
                ["redis-benchmark", "-p", str(port), "-n", str(REDIS_REQUESTS),
                 "-P", str(BULK_EVENTS), "-c", str(BULK_CONNECTIONS), "--csv", *REDIS_COMMAND],
                text=True)
    # The first line names the columns; the second one is the result.
    result = next(csv.DictReader(output.splitlines()))
    return float(result["rps"])


def express(bench):
    """Return the revenue queries a second that Express and pg answer; bench.fill() comes before."""
    if not shutil.which("node"):
        return None
    found = subprocess.run(
        ["node", "-e", "require('express'); require('pg')"], stderr=subprocess.DEVNULL)
    if found.returncode != 0:
        return None
    node = ["env", "NODE_ENV=production", "node"]  # as Express is run where it matters
    with web_server(bench, *node, HERE / "express_pg.js") as port:
        answers = ask_for_revenue(port, bench.inputs.usual.revenue, bench.seconds)
    return answers.per_second


def fastapi(bench):
    """Return the revenue queries a second that FastAPI and asyncpg answer; bench.fill() comes
    before."""
    if not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "asyncpg"))):
        return None
    with web_server(bench, sys.executable, HERE / "fastapi_asyncpg.py") as port:
        answers = ask_for_revenue(port, bench.inputs.usual.revenue, bench.seconds)
    return answers.per_second


# ---- Of client.py and data_processor.py ----------------------------------------------------------

def in_child(function, *arguments):
    """Return what function returns in a process of its own, with a heap of its own."""
    with FORK.Pool(1) as pool:
        return pool.apply(function, arguments)


def decode_log(path):
    """Return the seconds that one core needs to decode a log's lines, already read, and to do
    nothing else."""
    return in_child(_decode_log, path)


def _decode_log(path):
    decode = json.JSONDecoder(parse_float=Decimal).decode
    seconds = 0.0
    with open(path, encoding="utf-8", newline="\n") as log:
        while lines := log.readlines(8 * 1024 * 1024):
            begun = time.perf_counter()
            for line in lines:
                decode(line)
            seconds += time.perf_counter() - begun
    return seconds


def sum_log(path):
    """Return the seconds that one core needs to read and decode a log's lines and to sum them into
    a dict."""
    return in_child(_sum_log, path)


def _sum_log(path):
    decode = json.JSONDecoder(parse_float=Decimal).decode
    revenue = {}
    begun = time.perf_counter()
    with open(path, encoding="utf-8", newline="\n") as log:
        for line in log:
            event = decode(line)
            user = event["userId"]
            value = event["value"]
            if event["name"] == "subtract_revenue":
                value = -value
            revenue[user] = revenue.get(user, 0) + value
    return time.perf_counter() - begun


def duckdb(bench):
    """Return the seconds of a program that sums the usual log with DuckDB and copies the sums to
    PostgreSQL. Raise Failure unless they are those of users_revenue; bench.fill() comes before."""
    if not importlib.util.find_spec("duckdb"):
        return None
    with bench.new_directory() as directory:
        finished = run_program(
            sys.executable, HERE / "duckdb_copy.py", bench.inputs.usual.log, cwd=directory)
    with contextlib.closing(connect()) as connection, connection.cursor() as sql:
        sql.execute(DUCKDB_DIFFERENCES)
        if sql.rowcount > 0:
            raise Failure(f"WRONG RESULT: the sums of DuckDB differ in {sql.rowcount:,} rows.")
    return finished.seconds
