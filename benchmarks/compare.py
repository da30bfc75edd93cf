"""Measure an older commit beside the work tree, in turns, and print one table of ratios.

    python benchmarks/compare.py --before HEAD~1 --pairs 5

A pair is one measurement of each version, one directly after the other; every second pair begins
with the work tree. Both read the same files, on the same PostgreSQL, each with a new database and a
new log. A ratio is the median of the pairs' own ratios: whatever slows the machine down slows both.
Every result is checked: each user's revenue, the number of events in the log, the first answers.

It needs what pipeline.py needs, and git.
"""
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from shared import (BULK_CONNECTIONS, BULK_EVENTS, QUERY_CONNECTIONS, ROOT, Bench, Failure, Inputs,
                    Measured, Missing, Scripts, at_least_one, new_parser, print_table,
                    run_benchmark, say)

# What is measured of a version. The work tree is copied, too, so that an edit meanwhile does no
# harm.
FILES = ["server.py", "client.py", "data_processor.py", "create_table.sql"]
# How the figures of a row are written, and which is better.
RATE = "{:,.0f}/s"
SECONDS = "{:.2f} s"
MS = "{:.1f} ms"
BETTER = {RATE: "higher", SECONDS: "lower", MS: "lower"}

LEGEND = """\
Before and after are medians over the pairs. The ratio is after / before: the median of the pairs'
own ratios, and in brackets the lowest and the highest one."""


class Pair(NamedTuple):
    before: Measured
    after: Measured


class Row(NamedTuple):
    work: str  # what is done, with the options in braces
    unit: str  # one of RATE, SECONDS and MS
    measure: Callable  # the function: it takes a Bench and returns Measured


ROWS = {}


def row(work, unit):
    """Return a decorator that makes a function a row of the table, which --rows selects by the
    function's name."""
    def add(measure):
        ROWS[measure.__name__] = Row(work, unit, measure)
        return measure
    return add


# ---- The rows ------------------------------------------------------------------------------------

@row("data_processor.py, {events:,} events", SECONDS)
def processor(bench):
    return bench.processor(bench.inputs.usual)


@row("data_processor.py, many producers, out of order, 10 % twice", SECONDS)
def many_producers(bench):
    return bench.processor(bench.inputs.many)


@row("data_processor.py, {events:,} events, nothing new", MS)
def nothing_new(bench):
    bench.fill(bench.inputs.usual)
    return bench.nothing_new(bench.inputs.usual)


@row("client.py, {events:,} events", RATE)
def client(bench):
    return bench.client(bench.inputs.usual)


@row("single requests, wrk -t1 -c32", RATE)
def single_32(bench):
    return bench.single_requests(32)


@row("single requests, wrk -t1 -c128", RATE)
def single_128(bench):
    return bench.single_requests(128)


@row(f"batches of {BULK_EVENTS:,} events, wrk -t1 -c{BULK_CONNECTIONS}", RATE)
def batches(bench):
    return bench.batches()


@row(f"revenue queries, wrk -t1 -c{QUERY_CONNECTIONS}", RATE)
def queries(bench):
    bench.fill(bench.inputs.usual)
    return bench.queries()


# ---- The two versions ----------------------------------------------------------------------------

def check_out(commit, directory):
    """Return the Scripts of a commit, which are written to a directory."""
    directory.mkdir()
    archive = directory / "scripts.tar"
    command = ["git", "-C", ROOT, "archive", "--format=tar", f"--output={archive}", commit, *FILES]
    archived = subprocess.run(command)
    if archived.returncode != 0:
        raise Failure(f"git archive does not write the scripts of {commit}.")
    shutil.unpack_archive(archive, directory)
    return Scripts(directory)


def copy_work_tree(directory):
    """Return the Scripts of the work tree, which are copied to a directory."""
    directory.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, directory)
    return Scripts(directory)


# ---- The table -----------------------------------------------------------------------------------

class Cells(NamedTuple):
    """A line of the table."""

    work: str
    before: str
    after: str
    ratio: str
    better: str
    memory: str


HEADING = Cells("work", "before", "after", "ratio", "better", "peak memory: before, after: ratio")


def ratio_text(ratios):
    """Return the median of some ratios with their range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def memory_text(pairs):
    """Return the peak memory of each process of both versions, with their ratio."""
    texts = []
    for process in pairs[0].before.peaks:
        before = statistics.median(pair.before.peaks[process] for pair in pairs)
        after = statistics.median(pair.after.peaks[process] for pair in pairs)
        ratio = statistics.median(
            pair.after.peaks[process] / pair.before.peaks[process] for pair in pairs)
        texts.append(f"{process} {before:.0f}, {after:.0f} MB: {ratio:.2f}")
    return "; ".join(texts)


def table_line(line, pairs, options):
    """Return the Cells of a Row."""
    work = line.work.format(**vars(options))
    if not pairs:
        return Cells(work, "not measured", "", "", "", "")
    before = statistics.median(pair.before.value for pair in pairs)
    after = statistics.median(pair.after.value for pair in pairs)
    ratios = [pair.after.value / pair.before.value for pair in pairs]
    return Cells(
        work,
        line.unit.format(before),
        line.unit.format(after),
        ratio_text(ratios),
        BETTER[line.unit],
        memory_text(pairs),
    )


# ---- The pairs -----------------------------------------------------------------------------------

def measure_pair(line, before, after, *, after_first):
    """Return a Pair of a Row; before and after are the Bench of each version."""
    if after_first:
        second = line.measure(after)
        first = line.measure(before)
    else:
        first = line.measure(before)
        second = line.measure(after)
    return Pair(first, second)


def measure(options, directory, database):
    """Measure the rows in options, one after the other, and print the results."""
    old = check_out(options.before, directory / "before")
    new = copy_work_tree(directory / "after")
    inputs = Inputs(old, directory, options.events)  # the older version writes the logs of both
    before = Bench(old, inputs, database, directory, options.seconds)
    after = Bench(new, inputs, database, directory, options.seconds)
    lines = [HEADING]
    for name in options.rows:
        pairs = []
        try:
            for number in range(options.pairs):
                pair = measure_pair(ROWS[name], before, after, after_first=number % 2 == 1)
                pairs.append(pair)
                say(f"  {name}: {pair.before.value:,.6g}, {pair.after.value:,.6g}")
        except Missing as reason:
            say(f"  {name}: not measured: {reason}")
        lines.append(table_line(ROWS[name], pairs, options))
    print_table(lines)
    print(f"\n{LEGEND}\n{options.pairs} pairs; {database.description}")


def main(arguments=None):
    """Run the command line and return its exit status."""
    parser = new_parser(
        "Measure an older commit beside the work tree, in turns.",
        "pg_virtualenv -o fsync=on python benchmarks/compare.py --before HEAD~1 --pairs 5",
        list(ROWS))
    parser.add_argument("--before", required=True, metavar="COMMIT", help="the older version")
    parser.add_argument("--pairs", type=at_least_one, default=5, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    return run_benchmark(options, measure)


if __name__ == "__main__":
    sys.exit(main())
