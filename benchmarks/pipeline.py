"""Measure the three scripts beside baselines and print one table and one chart.

A baseline is measured in the same run: it is the least that any program of that kind must do, or
what people would use instead. A figure is the median over the runs, a ratio the median of the runs'
own ratios: whatever slows the machine down slows a figure and its baseline in the same run.

Each row of the table is one function below, with its text, its unit and its baseline beside it.
After every run of data_processor.py each user's revenue in the database is compared with a sum that
was made when the events were generated; a difference ends the benchmark.

It needs Linux (for /proc) and PostgreSQL. It leaves out, with a word, what is not installed: wrk
(for requests), Redis, DuckDB's module, Node with express and pg, and FastAPI with uvicorn and
asyncpg.
"""
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import baselines
from shared import (BULK_CONNECTIONS, BULK_EVENTS, NEW_EVENTS, ROOT, Bench, Failure, Inputs,
                    Missing, Scripts, at_least_one, new_parser, print_table, run_benchmark, say,
                    usable_cores)

# How the figures of a row are written.
RATE = "{:,.0f}/s"
SECONDS = "{:.2f} s"
MS = "{:.2f} ms"
# No process of the scripts should take more memory than this, with usual user ids.
MEMORY_MB = 80
# The processor is measured on each of these numbers of cores, and on all of them.
CORES = [2**power for power in range(10) if 2**power < usable_cores()]

LEGEND = """\
Measured is the median over the runs. The baseline was measured beside it in the same run. The ratio
is measured / baseline, as the median of the runs' own ratios. Wanted is the ratio that the project
has set itself to reach; a row without one is there for information.
"""


class Run(NamedTuple):
    measured: float  # in the row's unit
    baseline: float | None  # in the same unit; None: it is not installed
    ratio: float | None  # measured / baseline
    peaks: dict  # {"client", "worker" or "processor": peak memory in MB}


class Row(NamedTuple):
    name: str  # of the function, by which --rows selects it
    work: str  # what is done, with the options in braces
    unit: str  # one of RATE, SECONDS and MS
    baseline: str  # what the figure is compared with, with the options in braces
    wanted: str  # the ratio to reach, or nothing
    memory_mb: int  # no process should take more
    large: bool  # measured once, and only with --large
    measure: Callable  # the function: it takes a Bench and returns a Run


ROWS = {}


def row(work, *, unit, baseline, wanted="", memory_mb=MEMORY_MB, large=False, name=None):
    """Return a decorator that makes a function a row of the table."""
    def add(measure):
        key = name or measure.__name__
        ROWS[key] = Row(key, work, unit, baseline, wanted, memory_mb, large, measure)
        return measure
    return add


def beside(measured, baseline):
    """Return the Run of a Measured figure and of its baseline, which may be None."""
    ratio = None
    if baseline is not None:
        ratio = measured.value / baseline
    return Run(measured.value, baseline, ratio, measured.peaks)


# The text of a row says what its function measures.

# ---- The rows: server.py -------------------------------------------------------------------------

@row(
    "single requests, wrk -t1 -c32",
    unit=RATE,
    baseline="empty handler",
    wanted="≥ 0.70",
)
def single_32(bench):
    measured = bench.single_requests(32)
    return beside(measured, baselines.empty_handler(bench, 32))


@row(
    "single requests, wrk -t1 -c128",
    unit=RATE,
    baseline="empty handler",
    wanted="≥ 0.85",
)
def single_128(bench):
    measured = bench.single_requests(128)
    return beside(measured, baselines.empty_handler(bench, 128))


@row(
    "latency at one connection",
    unit=MS,
    baseline="empty handler, then a sync",
    wanted="≤ 2.00",
)
def latency(bench):
    measured = bench.single_requests(1)
    milliseconds = 1000 / measured.value
    empty_ms = 1000 / baselines.empty_handler(bench, 1)
    return beside(measured._replace(value=milliseconds), empty_ms + baselines.sync_ms(bench))


@row(
    "revenue queries, wrk -t1 -c32",
    unit=RATE,
    baseline="empty handler",
)
def queries(bench):
    bench.fill(bench.inputs.usual)
    measured = bench.queries()
    return beside(measured, baselines.empty_queries(bench))


@row(
    "revenue queries, wrk -t1 -c32",
    unit=RATE,
    baseline="Express + pg",
    wanted="≥ 2.00",
)
def queries_express(bench):
    bench.fill(bench.inputs.usual)
    measured = bench.queries()
    return beside(measured, baselines.express(bench))


@row(
    "revenue queries, wrk -t1 -c32",
    unit=RATE,
    baseline="FastAPI + asyncpg",
)
def queries_fastapi(bench):
    bench.fill(bench.inputs.usual)
    measured = bench.queries()
    return beside(measured, baselines.fastapi(bench))


@row(
    f"batches of {BULK_EVENTS:,} events, wrk -t1 -c{BULK_CONNECTIONS}",
    unit=RATE,
    baseline="Redis Streams",
    wanted="≥ 3.50",
)
def batches(bench):
    measured = bench.batches()
    return beside(measured, baselines.redis(bench))


# ---- The rows: client.py -------------------------------------------------------------------------

@row(
    "client.py, {events:,} events",
    unit=RATE,
    baseline="bare decoding",
    wanted="≥ 1.20",
)
def client(bench):
    measured = bench.client(bench.inputs.usual)
    seconds = baselines.decode_log(bench.inputs.usual.log)
    return beside(measured, bench.inputs.usual.lines / seconds)


# ---- The rows: data_processor.py -----------------------------------------------------------------

PROCESSOR = "data_processor.py, {events:,} events"


@row(
    PROCESSOR,
    unit=SECONDS,
    baseline="decode and sum",
    wanted="≤ 0.65",
)
def processor(bench):
    measured = bench.processor(bench.inputs.usual)
    return beside(measured, baselines.sum_log(bench.inputs.usual.log))


@row(
    PROCESSOR,
    unit=SECONDS,
    baseline="DuckDB + COPY",
    wanted="≤ 2.10",
)
def processor_duckdb(bench):
    measured = bench.processor(bench.inputs.usual)
    return beside(measured, baselines.duckdb(bench))


def add_cores_row(cores):
    """Add the row of the processor on so many cores."""
    @row(
        f"{PROCESSOR}, on cores: {cores}",
        unit=SECONDS,
        baseline="decode and sum",
        name=f"processor_on_{cores}",
    )
    def processor_on_cores(bench):
        measured = bench.processor(bench.inputs.usual, cores=cores)
        return beside(measured, baselines.sum_log(bench.inputs.usual.log))


for number in CORES:
    add_cores_row(number)


@row(
    f"{PROCESSOR}, one core with PostgreSQL",
    unit=SECONDS,
    baseline="decode and sum",
    wanted="≤ 1.30",
)
def processor_one_core(bench):
    first_core = min(os.sched_getaffinity(0))

    def bind_postgresql():
        try:
            bench.database.bind_to_core(first_core)
        except OSError as error:
            raise Missing(f"PostgreSQL could not be bound to a core ({error})") from None

    measured = bench.processor(bench.inputs.usual, cores=1, when_started=bind_postgresql)
    return beside(measured, baselines.sum_log(bench.inputs.usual.log))


@row(
    "data_processor.py, many producers, out of order, 10 % twice",
    unit=SECONDS,
    baseline="plain, per line",
    wanted="≤ 1.90",
)
def many_producers(bench):
    usual = bench.inputs.usual
    many = bench.inputs.many
    measured = bench.processor(many)
    plain = bench.processor(usual)
    return beside(measured, plain.value * many.lines / usual.lines)


@row(
    f"{PROCESSOR}, a copy of the log",
    unit=SECONDS,
    baseline="the first time",
    wanted="≤ 1.00",
)
def copy_of_the_log(bench):
    copy = bench.inputs.copy
    first = bench.processor(bench.inputs.usual)
    measured = bench.processor_again(copy)
    return beside(measured, first.value)


@row(
    f"{PROCESSOR}, nothing new",
    unit=MS,
    baseline="start-up",
    wanted="≤ 1.50",
)
def nothing_new(bench):
    bench.fill(bench.inputs.usual)
    measured = bench.nothing_new(bench.inputs.usual)
    return beside(measured, bench.start_up())


@row(
    "data_processor.py, 64 MiB of user ids of 255 emoji",
    unit=SECONDS,
    baseline="decode and sum",
    memory_mb=250,
)
def long_user_ids(bench):
    measured = bench.processor(bench.inputs.long)
    return beside(measured, baselines.sum_log(bench.inputs.long.log))


# ---- The rows: growth ----------------------------------------------------------------------------

LARGE = "data_processor.py after {large:,} events"


@row(
    "client.py, {large:,} events",
    unit=RATE,
    baseline="with {events:,}",
    wanted="≈ 1",
    large=True,
)
def large_client(bench):
    measured = bench.client(bench.inputs.large)
    usual = bench.client(bench.inputs.usual)
    return beside(measured, usual.value)


@row(
    "data_processor.py, {large:,} events",
    unit=SECONDS,
    baseline="with {events:,}, multiplied",
    wanted="≈ 1",
    large=True,
)
def large_processor(bench):
    usual = bench.inputs.usual
    large = bench.inputs.large
    measured = bench.processor(large)
    plain = bench.processor(usual)
    return beside(measured, plain.value * large.lines / usual.lines)


@row(
    f"{LARGE}, nothing new",
    unit=MS,
    baseline="start-up",
    wanted="≤ 1.50",
    large=True,
)
def large_nothing_new(bench):
    bench.fill(bench.inputs.large)
    measured = bench.nothing_new(bench.inputs.large)
    return beside(measured, bench.start_up())


@row(
    f"{LARGE}, {NEW_EVENTS:,} new",
    unit=SECONDS,
    baseline="with an empty log before them",
    wanted="≈ 1",
    large=True,
)
def large_new(bench):
    new = bench.inputs.new
    alone = bench.processor(new)
    bench.fill(bench.inputs.large)
    with bench.inputs.large_and_new() as both:
        measured = bench.processor_again(both)
    return beside(measured, alone.value)


# ---- The table and the chart ---------------------------------------------------------------------

class Cells(NamedTuple):
    """A line of the table."""

    work: str
    measured: str
    baseline: str
    ratio: str
    wanted: str
    memory: str


HEADING = Cells("work", "measured", "baseline", "ratio", "wanted", "peak memory")


class Bar(NamedTuple):
    label: str
    row: str  # its name
    field: str  # of a Run


BARS = [
    Bar(f"server.py, cores: {usable_cores()}", "batches", "measured"),
    Bar("Redis Streams, cores: 1", "batches", "baseline"),
    Bar(f"data_processor.py, cores: {usable_cores()}", "processor", "measured"),
    Bar("decode and sum, cores: 1", "processor", "baseline"),
    Bar(f"DuckDB + COPY, cores: {usable_cores()}", "processor_duckdb", "baseline"),
]


def median(runs, field):
    """Return the median over the runs of a field of Run; None if there is no run or no value."""
    values = [getattr(run, field) for run in runs]
    if not values or None in values:
        return None
    return statistics.median(values)


def peaks_text(runs, limit_mb):
    """Return the highest peak memory of each process, beside what it should not exceed."""
    highest = {}
    for run in runs:
        for process, peak in run.peaks.items():
            highest[process] = max(peak, highest.get(process, 0))
    return ", ".join(f"{process} {peak:.0f} MB (< {limit_mb})" for process, peak in highest.items())


def run_text(run):
    """Return the figures of one run, in the row's unit."""
    peaks = ", ".join(f"{process} {peak:.0f} MB" for process, peak in run.peaks.items())
    if run.baseline is None:
        return f"{run.measured:,.6g}; {peaks}"
    return f"{run.measured:,.6g} / {run.baseline:,.6g}; {peaks}"


def table_line(line, runs, options):
    """Return the Cells of a Row."""
    work = line.work.format(**vars(options))
    baseline_name = line.baseline.format(**vars(options))
    if not runs:
        return Cells(work, "not measured", baseline_name, "", line.wanted, "")
    measured = line.unit.format(median(runs, "measured"))
    peaks = peaks_text(runs, line.memory_mb)
    baseline = median(runs, "baseline")
    if baseline is None:
        missing = f"not installed: {baseline_name}"
        return Cells(work, measured, missing, "", line.wanted, peaks)
    compared = f"{line.unit.format(baseline)} {baseline_name}"
    ratio = median(runs, "ratio")
    return Cells(work, measured, compared, f"{ratio:.2f}", line.wanted, peaks)


def print_chart(figures, options):
    """Print a bar chart of events a second, for Mermaid."""
    labels = []
    values = []
    for bar in BARS:
        value = median(figures.get(bar.row, []), bar.field)
        if value is None:
            continue
        if ROWS[bar.row].unit == SECONDS:
            value = options.events / value
        labels.append(bar.label)
        values.append(round(value))
    if labels:
        print("```mermaid", "xychart-beta", sep="\n")
        print(f"    x-axis {json.dumps(labels)}")
        print('    y-axis "events per second"')
        print(f"    bar {values}")
        print("```\n")


def print_results(figures, options, database):
    """Print the table and the chart, and what they were measured on."""
    lines = [HEADING]
    for name, runs in figures.items():
        lines.append(table_line(ROWS[name], runs, options))
    print_table(lines)
    print(f"\n{LEGEND}")
    print_chart(figures, options)
    cpu = Path("/proc/cpuinfo").read_text()
    model = re.search(r"(?m)^model name\s*:\s*(.*)", cpu)
    machine = platform.machine()
    if model:
        machine = model[1]
    print(f"{usable_cores()} cores, {machine}; {platform.system()} {platform.release()}; "
          f"Python {platform.python_version()}; {database.description}")
    print(shlex.join(["python", *sys.argv]))


# ---- The runs ------------------------------------------------------------------------------------

def measure(options, directory, database):
    """Measure the rows in options, run by run, and print the results."""
    scripts = Scripts(ROOT)
    inputs = Inputs(scripts, directory, options.events, options.large)
    bench = Bench(scripts, inputs, database, directory, options.seconds)
    figures = {name: [] for name in options.rows}
    for number in range(1, options.runs + 1):
        say(f"Run {number} of {options.runs}")
        for name, runs in figures.items():
            if ROWS[name].large and number > 1:
                continue
            try:
                run = ROWS[name].measure(bench)
            except Missing as reason:
                say(f"  {name}: not measured: {reason}")
                continue
            say(f"  {name}: {run_text(run)}")
            runs.append(run)
    print_results(figures, options, database)


def main(arguments=None):
    """Run the command line and return its exit status."""
    parser = new_parser(
        "Measure server.py, client.py and data_processor.py beside baselines of the same run.",
        "pg_virtualenv -o fsync=on python benchmarks/pipeline.py --runs 5 --large 10000000",
        list(ROWS))
    parser.add_argument("--runs", type=at_least_one, default=3, help="(default: %(default)s)")
    parser.add_argument("--large", type=at_least_one, metavar="EVENTS",
                        help="also measure the growth up to so many, once")
    parser.add_argument("--node-modules", metavar="DIRECTORY",
                        help="where express and pg are installed (default: as NODE_PATH says)")
    options = parser.parse_args(arguments)
    if not options.large:
        options.rows = [name for name in options.rows if not ROWS[name].large]
    if not options.rows:
        parser.error("these rows need --large")
    if options.node_modules:
        os.environ["NODE_PATH"] = str(Path(options.node_modules).resolve())
    return run_benchmark(options, measure)


if __name__ == "__main__":
    sys.exit(main())
