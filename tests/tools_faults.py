"""Faults: of system calls, of the database, of the network."""

import contextlib
import errno
import fcntl
import functools
import itertools
import os
import random
import select
import socket
import stat
import threading
from unittest import mock

import psycopg2
import psycopg2.extensions


# Python that opens more descriptors than select() can tell apart.
MANY_DESCRIPTORS = """
import os, resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
for _ in range(1100):
    os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
"""


class FaultyCalls:
    """The system calls of a script, one of which goes wrong.

    The scripts make them through stand-ins for the modules os and fcntl, see made_by(). A subclass
    looks at each call in before() and after().

    fault   what goes wrong, one of FAULTS, or None
    at      at which call; only writes are counted for the faults of a write
    count   how many calls were made
    fired   the call that went wrong, or None as long as none did
    """

    CALLS = "open fstat stat pread write ftruncate fdatasync fsync unlink flock close".split()
    WRITE_FAULTS = ("short write", "short write, then ENOSPC", "killed within a write")
    FAULTS = ("EIO", "ENOSPC", "EIO for good", "killed before", "killed after", *WRITE_FAULTS)
    KILLED = 9  # the exit status of a process that was killed here

    def __init__(self, fault=None, at=0):
        """Let nothing go wrong, or one thing at one call."""
        self.fault = fault
        self.at = at
        self.count = 0
        self.fired = None

    @contextlib.contextmanager
    def made_by(self, *scripts):
        """Return a context in which scripts make their system calls through this object."""
        with contextlib.ExitStack() as stack:
            for script, module in itertools.product(scripts, (os, fcntl)):
                stand_in = StandIn(module, self)
                stack.enter_context(mock.patch.object(script, module.__name__, stand_in))
            yield

    def before(self, name, arguments):
        """Look at a call that is about to be made."""

    def after(self, name, arguments):
        """Look at a call that was made."""

    def make(self, name, real, *arguments, **options):
        """Make a call, or let it go wrong."""
        self.before(name, arguments)
        if self.is_due(name):
            result = self.go_wrong(name, real, arguments, options)
        else:
            result = real(*arguments, **options)
        self.after(name, arguments)
        return result

    def is_due(self, name):
        """Count a call, and tell whether it goes wrong."""
        if self.fault in self.WRITE_FAULTS and name != "write":
            return False
        self.count += 1
        if self.fault == "EIO for good":
            return self.count >= self.at
        if self.fault == "short write, then ENOSPC":
            return self.count in (self.at, self.at + 1)
        return self.count == self.at

    def go_wrong(self, name, real, arguments, options):
        """Raise an error, end the process, or write half; return what the call returns."""
        again = self.fired is not None
        self.fired = name
        if self.fault == "ENOSPC" or self.fault == "short write, then ENOSPC" and again:
            raise OSError(errno.ENOSPC, "no space (injected)")
        if self.fault in ("EIO", "EIO for good"):
            raise OSError(errno.EIO, "input/output error (injected)")
        if self.fault == "killed before":
            os._exit(self.KILLED)
        if self.fault == "killed after":
            real(*arguments, **options)
            os._exit(self.KILLED)
        file, data = arguments
        half = bytes(data)[: len(data) // 2]
        written = real(file, half)
        if self.fault == "killed within a write":
            os._exit(self.KILLED)
        return written


class StandIn:
    """The module os or fcntl whose calls are counted."""

    def __init__(self, module, calls):
        """Stand in for module; calls are the FaultyCalls that make its calls."""
        self._module = module
        self._calls = calls

    def __getattr__(self, name):
        """Return what the module has under that name, but counted if it is one of CALLS."""
        real = getattr(self._module, name)
        if name not in self._calls.CALLS:
            return real
        return functools.partial(self._calls.make, name, real)


def traced_fsync(test, steps):
    """Return a stand-in for os.fsync that adds what it would sync to steps.

    A directory must be the one of the test.
    """

    def fsync(fd):
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode):
            steps.append("sync file")
            return
        test.assertTrue(os.path.samestat(status, os.stat(test.directory)))
        steps.append("sync directory")

    return fsync


class FaultyConnection(psycopg2.extensions.connection):
    """A connection that raises an error at one step.

    A step is before a statement, at COMMIT, or just after COMMIT, and for OperationalError also
    after a statement: it breaks the connection, and any answer can be lost. Steps are counted over
    all connections.
    """

    steps = 0
    fail_at = 0
    error = None

    @classmethod
    def fail(cls, error, at):
        """Count from 0 again, and raise error at that step; there is no step 0."""
        cls.error = error
        cls.fail_at = at
        cls.steps = 0

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

    def commit(self):
        """Commit between two steps."""
        self.step()
        super().commit()
        self.step()  # COMMIT was done, and nobody knows


class FaultyCursor(psycopg2.extensions.cursor):
    """A cursor of a FaultyConnection."""

    def execute(self, *arguments):
        """Execute a statement after one step or between two."""
        self.connection.step()
        super().execute(*arguments)
        if self.connection.error is psycopg2.OperationalError:
            self.connection.step()  # the statement was done, and nobody knows


class FaultyProxy:
    """A TCP proxy that passes each connection on to one of some ports, and cuts half of them.

    ports   where connections are passed on to
    cuts    how many connections were cut
    calm    whether it cuts no more; the test may set it
    """

    CUTS = (None, None, None, "request", "answer", "answer", "answer later")

    def __init__(self, ports, seed):
        """Begin to pass connections on."""
        self.ports = ports
        self.cuts = 0
        self.calm = False
        self._chance = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        """Take no more connections."""
        with contextlib.suppress(OSError):  # which wakes accept()
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        """Choose for each connection its server and where it is cut."""
        while True:
            try:
                wire, _ = self._listener.accept()
            except OSError:
                return
            port = self._chance.choice(self.ports)
            sent, received = self._limits()
            arguments = [wire, port, sent, received]
            threading.Thread(target=self._pass, args=arguments, daemon=True).start()

    def _limits(self):
        """Return after how many bytes of the requests and of the answers a connection is cut."""
        endless = 10**9
        cut = self._chance.choice(self.CUTS)
        some = self._chance.randrange(1, 20_000)
        if self.calm or cut is None:
            return endless, endless
        if cut == "request":
            return some, endless
        if cut == "answer":
            return endless, 0
        return endless, some % 150

    def _pass(self, wire, port, sent, received):
        """Pass bytes both ways until an end closes the connection or it is cut."""
        with contextlib.suppress(OSError), wire:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as server:
                others = {wire: server, server: wire}
                limits = {wire: sent, server: received}
                while True:
                    readable, _, _ = select.select([wire, server], [], [], 20)
                    if not readable:
                        return
                    for source in readable:
                        data = source.recv(65536)
                        if not data:
                            return
                        others[source].sendall(data[: limits[source]])
                        limits[source] -= len(data)
                        if limits[source] < 0:
                            self.cuts += 1
                            return
