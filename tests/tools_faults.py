"""Faults: of system calls, of the database, of the network."""

import contextlib
import errno
import fcntl
import os
import random
import select
import socket
import stat
import threading
import unittest
import unittest.mock

import psycopg2
import psycopg2.extensions

import data_processor
import server as server_module


class FaultySystem:
    """The os or fcntl module with one call, counted over all of them, that goes wrong in a chosen
    way."""

    CALLS = (
        "open",
        "fstat",
        "stat",
        "pread",
        "write",
        "ftruncate",
        "fdatasync",
        "fsync",
        "flock",
        "close",
    )
    FAULTS = (
        "EIO",
        "ENOSPC",
        "EIO for good",
        "short",
        "short, then ENOSPC",
        "killed before",
        "killed after",
    )

    def __init__(self, module, state, log):
        """Stand in for module; state says what goes wrong at which call, and holds what
        happened."""
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
        due = (
            state["count"] == state["at"]
            or state["count"] > state["at"]
            and fault == "EIO for good"
        )
        if state["short"] and name == "write":
            state["short"] = False
            raise OSError(errno.ENOSPC, "no space")
        if due:
            state["fired"] = name
            if fault == "killed before":
                os._exit(9)
            if fault.startswith("short") and name == "write":
                state["short"] = fault != "short"
                return real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
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
    """Return a context in which the server makes its system calls for the log through a
    FaultySystem."""
    stack = contextlib.ExitStack()
    for user in (server_module, data_processor):
        for module in (os, fcntl):
            stack.enter_context(
                unittest.mock.patch.object(user, module.__name__, system(module, state, log))
            )
    return stack


class FaultyConnection(psycopg2.extensions.connection):
    """A connection that raises an error at one step: before or after a statement, at COMMIT, or
    just after it.

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
    """The os or fcntl module of a client with one call, counted over both, that fails, is short, or
    is the last one."""

    CALLS = (
        "open",
        "fstat",
        "stat",
        "pread",
        "write",
        "ftruncate",
        "fsync",
        "unlink",
        "flock",
        "close",
    )

    def __init__(self, module, calls):
        """Stand in for module; calls says what goes wrong at which call, and holds what
        happened."""
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
            real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os._exit(9)
        result = real(*arguments, **options)
        if due and calls.fault == "killed after":
            os._exit(9)
        if name == "fsync":
            status = os.fstat(arguments[0])
            calls.synced.add((status.st_dev, status.st_ino))
        return result


class FaultyProxy:
    """A TCP proxy that passes each connection on to one of some ports, and often cuts it: before or
    within the request, before the answer, or after some bytes of it."""

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
            cut = self._chance.choice(
                [None, None, None, "request", "answer", "answer", "answer later"]
            )
            port, budget = self._chance.choice(self.ports), self._chance.randrange(1, 20_000)
            arguments = [wire, port, None if self.calm else cut, budget]
            threading.Thread(target=self._pass, args=arguments, daemon=True).start()

    def _pass(self, wire, port, cut, budget):
        """Pass bytes both ways until an end closes the connection or it is cut."""
        with contextlib.suppress(OSError), wire, socket.create_connection(
            ("127.0.0.1", port), timeout=20
        ) as server:
            limits = {
                wire: budget if cut == "request" else 10**9,
                server: {"answer": 0, "answer later": budget % 150}.get(cut, 10**9),
            }
            while True:
                for source in select.select([wire, server], [], [], 20)[0] or [None]:
                    data = source and source.recv(65536)
                    if not data:
                        return
                    part = data[: limits[source]]
                    limits[source] -= len(data)
                    (server if source is wire else wire).sendall(part)
                    if limits[source] < 0:
                        self.cuts += 1
                        return

    def close(self):
        """Take no more connections."""
        self._listener.close()


def traced_fsync(test, steps):
    """Return a stand-in for os.fsync that adds what it would sync to steps; a directory must be the
    test's own."""

    def fsync(fd):
        directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        test.assertTrue(not directory or os.path.samestat(os.fstat(fd), os.stat(test.directory)))
        steps.append("sync directory" if directory else "sync file")

    return fsync
