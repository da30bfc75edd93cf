"""The scripts as processes, and what every test needs."""

import contextlib
import faulthandler
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import psycopg2.extensions

from tests.tools_database import HERE, drop_tables, query
from tests.tools_events import TORTURE_SECONDS
from tests.tools_http import read_answer

README = (HERE / "README.md").read_text(encoding="utf-8")
CREATE_TABLE = (HERE / "create_table.sql").read_text(encoding="utf-8")

# A test that takes longer hangs: it ends the run, and says where each thread stands.
HANG_SECONDS = 600 + TORTURE_SECONDS

# How what a script prints is read, whatever the locale of the tests.
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}


def wait_until(condition, what, seconds=20):
    """Return condition's first true result, or fail."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s in vain until {what}")


def next_line(stream, seconds=60):
    """Return the next line that a process prints to a stream, "" at its end, or fail."""
    lines = []
    reader = threading.Thread(target=lambda: lines.append(stream.readline()), daemon=True)
    reader.start()
    reader.join(seconds)
    if not lines:
        raise AssertionError(f"waited {seconds} s in vain for a line")
    return lines[0]


def alive(pid):
    """Tell whether a process runs (a zombie does not)."""
    if Path("/proc/self/stat").exists():
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text(**TEXT).rpartition(") ")[2]
            return state[0] != "Z"
        return False
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, **TEXT)
    return listing.stdout.strip()[:1] not in ("", "Z")


def children_of(pid):
    """Return the ids of a process's children, the oldest first, also of those not reaped yet."""
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(OSError):
        return list(map(int, listing.read_bytes().split()))
    listing = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, **TEXT)  # macOS
    return list(map(int, listing.stdout.split()))


def can_bind(port):
    """Tell whether a port is free."""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def free_port():
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def open_terminal():
    """Return the descriptors of both sides of a new terminal, or fail with a sentence."""
    try:
        return os.openpty()
    except OSError as error:
        raise AssertionError(f"No terminal can be opened here: mount devpts ({error}).") from None


def fill(fd):
    """Write to a pipe or terminal until it takes nothing more."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"x" * 1000)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"x")
    os.set_blocking(fd, True)


def run_in_child(action):
    """Run action in a forked process and return its exit status: a kill there is a kill."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            action()
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def patched(module, patch):
    """Return how to run a script after some lines of Python have changed it.

    These are the interpreter's arguments and an environment.
    """
    code = f"import sys, {module}\n{patch}\nsys.exit({module}.main())"
    return ["-c", code], {"PYTHONPATH": str(HERE)}


def blocks(language):
    """Return the README's code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for name, text in found if name == language]


class Server:
    """A running server.py with a log of its own.

    log       its log
    errors    the file of what it prints to stderr
    process   its parent process
    port      where it listens
    url       where it takes events
    """

    def __init__(
        self, test, *arguments, log="server-events.jsonl", port=0, patch=None, **environment
    ):
        """Start server.py and return when it listens, or fail.

        patch is Python that runs before its main().
        """
        self.log = test.directory / log
        self.errors = test.directory / f"stderr-{secrets.token_hex(4)}"
        if port:
            wait_until(lambda: can_bind(port), "the port is free")
        script = [HERE / "server.py"]
        path = {}
        if patch:
            script, path = patched("server", patch)
        command = [sys.executable, *script, "--port", str(port), "--log", self.log, *arguments]
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=test.directory,
                env=os.environ | path | environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                **TEXT,
            )
        test.addCleanup(self.check_and_end, test)
        self.announcement = next_line(self.process.stdout)
        if not self.announcement:
            raise AssertionError(f"the server did not start: {self.printed()}")
        self.port = int(re.search(r":(\d+),", self.announcement)[1])
        self.url = f"http://127.0.0.1:{self.port}/liveEvent"

    def check_and_end(self, test):
        """End the server; whatever was done to it, it must not have printed a traceback."""
        self.kill()
        test.assertNotIn("Traceback", self.printed())

    def printed(self):
        """Return what it printed to stderr."""
        return self.errors.read_text(**TEXT)

    def said(self):
        """Return the lines that it printed to stderr."""
        return self.printed().splitlines()

    def workers(self):
        """Return the workers' process ids."""
        return children_of(self.process.pid)

    def stop(self, number=signal.SIGTERM):
        """Ask the server to stop and return its exit status."""
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.process.stdout.close()
        return status

    def kill(self):
        """SIGKILL the parent, if it lives."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def connect(self):
        """Return a socket to the server."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, method, path, body=None, headers=None):
        """Return (status, headers, body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def post(self, body, media="application/json", **headers):
        """POST a body of events and return (status, decoded answer)."""
        fields = {"Content-Type": media}
        for name, value in headers.items():
            fields[name.replace("_", "-")] = str(value)
        status, _, answer = self.ask("POST", "/liveEvent", body, fields)
        return status, json.loads(answer)

    def revenue_of(self, user):
        """Return (status, text) of the answer to a query for a user's revenue."""
        quoted = "".join(f"%{byte:02X}" for byte in user.encode())
        status, _, body = self.ask("GET", f"/userEvents/{quoted}")
        return status, body.decode()

    def raw(self, *pieces):
        """Send bytes as they are and return (status, headers, body) of the answer."""
        with self.connect() as wire:
            for piece in pieces:
                wire.sendall(piece)
            return read_answer(wire)


class SystemTest(unittest.TestCase):
    """A test with an empty directory and empty tables."""

    def setUp(self):
        """Make the directory and the tables."""
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        psycopg2.extensions.set_wait_callback(None)  # the process's, of an earlier test
        self.directory = Path(tempfile.mkdtemp(prefix="events-test-"))
        self.addCleanup(shutil.rmtree, self.directory)
        drop_tables()
        query(CREATE_TABLE)

    def path(self, name, content=None):
        """Return a path in the test's directory, written if there is content."""
        path = self.directory / name
        if isinstance(content, str):
            content = content.encode()
        if content is not None:
            path.write_bytes(content)
        return path

    def start(self, script, *arguments, patch=None, **environment):
        """Start a script in the test's directory; patch is Python that runs before its main()."""
        command = [HERE / script]
        path = {}
        if patch:
            command, path = patched(script.removesuffix(".py"), patch)
        process = subprocess.Popen(
            [sys.executable, *command, *map(str, arguments)],
            cwd=self.directory,
            env=os.environ | path | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **TEXT,
        )

        def end():
            if process.poll() is None:
                process.kill()
            process.communicate()

        self.addCleanup(end)
        return process

    def run_script(self, script, *arguments, status=0, **options):
        """Run a script to its end, check its exit status, and return (stdout, stderr).

        The options are those of start().
        """
        process = self.start(script, *arguments, **options)
        output, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, status, output + errors)
        self.assertNotIn("Traceback", errors)
        return output, errors

    def client(self, *arguments, **options):
        """Run client.py."""
        return self.run_script("client.py", *arguments, **options)

    def processor(self, *logs, **options):
        """Run data_processor.py."""
        return self.run_script("data_processor.py", *logs, **options)

    def assertRevenue(self, expected):
        """Check the whole table."""
        self.assertEqual(dict(query("SELECT user_id, revenue FROM users_revenue")), expected)
