"""Parts of the scripts in the process of the test."""

import contextlib
import os
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from decimal import Decimal

import client as client_module
import data_processor
import server as server_module
from tests.tools import patched


@contextlib.contextmanager
def warnings_of(module):
    """Return a context with the list of what a module prints to stderr."""
    lines = []
    with unittest.mock.patch.object(module, "warn", lines.append):
        yield lines


@contextlib.contextmanager
def captured():
    """Return a context in which this process prints to a file; it yields a function that returns
    what is in it."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield lambda: os.pread(file.fileno(), 10**6, 0).decode()


@contextlib.contextmanager
def opened_processor(*paths, **options):
    """Return a context with a Processor in this process, whose logs and connection are closed at
    its end."""
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

    with (
        contextlib.suppress(Polled),
        unittest.mock.patch.object(data_processor.time, "sleep", sleep),
    ):
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


def append(log, line):
    """Append a line to a server's log, or raise what kept it from being durable."""
    outcome = []
    log.append(line, outcome.append)
    if outcome != [None]:
        raise outcome[0]


@contextlib.contextmanager
def opened_delivery(path, restart=False):
    """Return a context with the source file and the state file of a delivery in this process."""
    with (
        contextlib.closing(client_module.Source(str(path), str(path))) as source,
        contextlib.closing(client_module.StateFile(str(path))) as state,
    ):
        with captured():
            client_module.begin_or_resume(state, source, restart)
        yield source, state


@contextlib.contextmanager
def opened_reader(path):
    """Return a context with a LogReader whose end is known."""
    with contextlib.closing(data_processor.LogReader(str(path))) as log:
        log.find_end()
        yield log


def apply_uncommitted(path, connection):
    """Count the events of a log in a connection's transaction."""
    with (
        opened_reader(path) as log,
        data_processor.tallied(log, 0, False) as tallies,
        connection.cursor() as sql,
    ):
        data_processor.count_once(sql, tallies)


def small_slices(cores, **settings):
    """Return a context in which a log of a few lines has slices for so many cores."""
    settings = {"BLOCK_BYTES": 200, "SLICE_BYTES": 300, "usable_cores": lambda: cores} | settings
    return unittest.mock.patch.multiple(data_processor, **settings)


def normal(row):
    """Return what a row of the tally means: user, amount, producer and sequence."""
    user, sign, value, producer, sequence, _ = row
    return user, Decimal(value.decode()) * (1 if sign == b"add" else -1), producer, sequence


def run_patched(patch, *arguments, **options):
    """Start data_processor.py after lines of Python have changed it; return the process."""
    command, environment = patched("data_processor", patch)
    return subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
