"""Parts of the scripts in the process of the test."""

import contextlib
import os
import tempfile
import time
import unittest
import unittest.mock
from decimal import Decimal

import client as client_module
import data_processor
import server as server_module


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
def opened_follower(*paths):
    """Return a context with a Follower in this process, whose logs and connection are closed at
    its end."""
    follower = data_processor.Follower([str(path) for path in paths])
    try:
        yield follower
    finally:
        for log in follower.held.values():
            log.close()
        for renamed in follower.renamed:
            renamed.log.close()
        follower.database.close()


def apply(*paths):
    """Apply what is new in logs, in this process; return whether all was well."""
    with captured():
        return data_processor.run([str(path) for path in paths])


class Polled(Exception):
    """A follower waits for its next poll."""


def poll(follower):
    """Let a follower in this process go on until it waits for its next poll."""

    def sleep(seconds):
        if seconds == data_processor.POLL_SECONDS:
            raise Polled

    with (
        contextlib.suppress(Polled),
        unittest.mock.patch.object(data_processor.time, "sleep", sleep),
    ):
        follower.follow()


@contextlib.contextmanager
def opened_log(path):
    """Return a context with a server's log in this process, which is closed at its end."""
    log = server_module.LogWriter(str(path))
    log._fd = log._open()
    try:
        yield log
    finally:
        if log._fd is not None:
            os.close(log._fd)


def append_for(log, line, answer):
    """Append a line to a server's log, as a request does that is whole now."""
    deadline = time.monotonic() + server_module.LOCK_SECONDS
    log.append(line, deadline, answer, 0)


def append(log, line):
    """Append a line to a server's log, or raise what kept it from being durable."""
    outcome = []
    append_for(log, line, outcome.append)
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
    with opened_reader(path) as log, connection.cursor() as sql:
        tallies = data_processor.tally_chunk(log, 0, log.end, data_processor.COUNT)
        data_processor.count_once(sql, log, tallies)


def read_lines(text, start=0):
    """Return the BlockEvents of lines that begin at an offset of a log."""
    block = data_processor.Block(start, text, start + len(text), text)
    return data_processor.read_events(block, data_processor.COUNT)


def small_slices(cores, **settings):
    """Return a context in which a log of a few lines has slices for so many cores."""
    settings = {"BLOCK_BYTES": 200, "SLICE_BYTES": 300, "usable_cores": lambda: cores} | settings
    return unittest.mock.patch.multiple(data_processor, **settings)


def events_of(found):
    """Return what each event of BlockEvents means."""
    return [normal(data_processor.LogLine._make(row)) for row in found.rows]


def normal(line):
    """Return what a LogLine means: user, amount, producer and sequence."""
    amount = Decimal(line.amount.decode())
    if line.kind == b"subtract":
        amount = amount.copy_negate()
    return line.user, amount, line.producer, line.sequence
