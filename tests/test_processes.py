"""The server's processes are replaced when they die, and stop in time."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
import unittest.mock

import server as server_module
from tests.tools import (
    Server,
    SystemTest,
    alive,
    can_bind,
    children_of,
    fill,
    free_port,
    patched,
    wait_until,
)
from tests.tools_database import HERE, setUpModule
from tests.tools_events import EVENT, ids_in, write_events
from tests.tools_http import post, read_answer, serving


class Processes(SystemTest):
    """The server's processes are replaced, wait for what is missing, and stop in time."""

    def test_a_server_has_a_worker_per_usable_core(self):
        cores = range(os.cpu_count())
        if hasattr(os, "sched_getaffinity"):
            cores = os.sched_getaffinity(0)
        self.assertEqual(len(Server(self).workers()), len(cores))
        if hasattr(os, "sched_setaffinity"):
            self.addCleanup(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, {min(cores)})
            self.assertEqual(len(Server(self, log="second").workers()), 1)

    def test_a_server_that_stops_refuses_new_connections_at_once(self):
        slow = self.path("slow")
        server = Server(
            self,
            patch=f"""
import os, time
server.STOP_SECONDS = 60
def sync(fd, real=server.sync_file):
    while os.path.exists({str(slow)!r}):
        time.sleep(0.01)
    real(fd)
server.sync_file = sync
""",
        )
        slow.touch()
        with server.connect() as wire:
            wire.sendall(post(body=EVENT))
            wait_until(server.log.read_bytes, "its line is written, and waits for the disk")
            server.process.terminate()

            def refused():
                with contextlib.suppress(ConnectionRefusedError), server.connect():
                    return False
                return True

            wait_until(refused, "it refuses connections")
            self.assertIsNone(server.process.poll(), "it ended before anything could be tested")
            slow.unlink()
            self.assertEqual(read_answer(wire)[0], 200)
        self.assertEqual(server.process.wait(20), 0)

    def test_a_worker_that_dies_is_replaced(self):
        # Also with a child of another program, whose exit status is 3, with SIGCHLD ignored, a full
        # disk below stderr, and a fork that fails.
        server = Server(
            self,
            "--workers",
            "2",
            patch="""
import os, signal, time
fork = os.fork
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
if not fork():
    while not os.path.exists("end"):
        time.sleep(0.01)
    os._exit(3)
def fork_or_fail():
    forks.append(1)
    if len(forks) == 3:
        os.open("", 0)
    return fork()
forks, os.fork = [], fork_or_fail
sys.stderr = open("/dev/full", "w", 1)
""",
        )
        stranger, *workers = server.workers()
        self.path("end", b"")
        wait_until(
            lambda: server.workers() == workers,
            "the stranger has ended and is reaped, and the workers stay",
        )
        os.kill(workers[0], signal.SIGKILL)
        wait_until(
            lambda: len(server.workers()) == 2 and workers[0] not in server.workers(),
            "there are two workers",
        )
        for _ in range(8):
            self.assertEqual(server.post(EVENT)[0], 200)

    def test_the_port_is_free_after_the_parent_was_killed(self):
        server = Server(self, "--workers", "3")
        workers = server.workers()
        self.assertEqual(len(workers), 3)
        idle = server.connect()
        self.addCleanup(idle.close)
        server.kill()
        wait_until(
            lambda: can_bind(server.port) and not any(map(alive, workers)),
            "port and workers are gone",
        )

    def test_a_server_that_is_told_to_stop_finishes_what_it_received(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            server = Server(self, log=f"log{number}")
            client = self.start(
                "client.py",
                write_events(self.path(f"events{number}"), 50_000),
                "--url",
                server.url,
                "--give-up-after",
                "0",
            )
            wait_until(
                lambda: server.log.exists() and server.log.stat().st_size > 100_000,
                "the client is at it",
            )
            for worker in server.workers():  # a terminal tells everyone
                os.kill(worker, number)
            self.assertEqual(server.post(EVENT)[0], 200)
            self.assertEqual(server.stop(number), 0)
            client.wait(20)
            self.assertTrue(server.log.read_bytes().endswith(b"}\n"))
            self.assertEqual(server.errors.read_text(), "")

    def test_a_server_that_was_started_with_blocked_signals_can_be_stopped(self):
        blocked = {signal.SIGTERM, signal.SIGINT, signal.SIGALRM}
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            server = Server(self, "--workers", "1")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
        self.assertEqual(server.stop(), 0)

    def test_an_alarm_from_elsewhere_kills_no_worker_of_others(self):
        server = Server(self, "--workers", "2")
        survivor, worker = server.workers()

        def is_replaced():
            # It may have begun a moment ago, with its parent's handler, which does nothing.
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGALRM)
            return len(set(server.workers()) - {worker}) == 2

        wait_until(is_replaced, "it is replaced")
        self.assertIn(survivor, server.workers())
        os.kill(server.process.pid, signal.SIGALRM)
        self.assertEqual(server.process.wait(20), 0)
        self.assertEqual(server.said(), ["A worker ended with status -14; starting another."])

    def test_a_server_that_is_told_to_stop_leaves_those_who_keep_connecting(self):
        server = Server(self, patch="server.BACKLOG_SECONDS = 0.2")
        over = threading.Event()

        def connect_again_and_again():
            while not over.is_set():
                with contextlib.suppress(OSError), server.connect() as wire:
                    wire.settimeout(1)
                    wire.sendall(post("Connection: close", body=EVENT))
                    wire.recv(100)

        threads = [threading.Thread(target=connect_again_and_again) for _ in range(64)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(ids_in(server.log)) > 100, "they are at it")
            begun = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - begun, 5)
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def test_a_worker_that_stops_empties_the_backlog_for_a_bounded_time(self):
        log = unittest.mock.Mock(failure="")
        begun = time.monotonic()
        with unittest.mock.patch.object(
            server_module.Worker, "accept", return_value=True
        ):  # one more is always there
            with serving(log, BACKLOG_SECONDS=0.1):
                pass
            self.assertLess(time.monotonic() - begun, 5)

    def test_a_worker_that_stops_waits_for_the_disk_for_a_bounded_time(self):
        pending = []
        log = unittest.mock.Mock(
            failure="", append=lambda lines, deadline, done, size: pending.append(done)
        )
        with contextlib.ExitStack() as stack:
            with serving(log, BACKLOG_SECONDS=0.1, STOP_SECONDS=0.3) as worker:
                wire = stack.enter_context(socket.create_connection(worker.address, timeout=20))
                wire.sendall(post(body=EVENT))
                wait_until(lambda: pending, "the event waits for the disk")
                begun = time.monotonic()
            self.assertLess(time.monotonic() - begun, 5)
            pending[0](None)

    def test_without_threads_connections_wait_for_one(self):
        for connections in (1, 10):
            with self.subTest(connections=connections):
                self.assertAllServed(connections)

    def assertAllServed(self, connections):
        server = Server(
            self,
            "--workers",
            "1",
            log=f"log{connections}",
            patch="""
import threading
start, started = threading.Thread.start, []
def start_or_fail(self):
    started.append(self)
    if 2 < len(started) < 8:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = start_or_fail
""",
        )
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(server.connect()) for _ in range(connections)]
            for wire in wires:
                wire.sendall(post(body=EVENT))
            self.assertEqual({read_answer(wire)[0] for wire in wires}, {200})
        self.assertEqual(server.said(), [])

    def test_the_server_outlives_its_output(self):
        for case, streams in {"closed": "1>&- 2>&-", "full": "1>/dev/full 2>/dev/full"}.items():
            with self.subTest(case):
                port = free_port()
                process = subprocess.Popen(
                    [
                        "sh",
                        "-c",
                        f'exec "$@" {streams}',
                        "sh",
                        sys.executable,
                        HERE / "server.py",
                        "--port",
                        str(port),
                    ],
                    cwd=self.directory,
                    env=os.environ | {"DATABASE_URL": "postgresql://localhost:1/x"},
                )
                self.addCleanup(process.kill)
                wait_until(lambda: not can_bind(port), "it listens")
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                with contextlib.closing(connection):
                    connection.request(
                        "GET", "/userEvents/user1"
                    )  # about which it has something to say
                    self.assertEqual(connection.getresponse().status, 503)
                process.terminate()
                self.assertEqual(process.wait(20), 0)

    def assertEnds(self, patch, *words):
        """Check that a server with a patch ends with status 1 and says these words."""
        patch = "server.RESTART_SECONDS = 0.05\n" + patch
        _, errors = self.run_script("server.py", "--port", 0, status=1, patch=patch)
        for word in words:
            self.assertIn(word, errors)

    def test_a_server_whose_workers_cannot_work_ends_and_says_why(self):
        no_threads = """
import threading
def fail(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = fail
"""
        no_thread_for_connections = """
import threading
start, started = threading.Thread.start, []
def start_or_fail(self):
    started.append(self)
    if len(started) > 1:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = start_or_fail
"""
        no_processes = """
import os
forks = []
def fork(real=os.fork):
    if forks:
        raise OSError(11, "Resource temporarily unavailable")
    forks.append(1)
    pid = real()
    if not pid:
        os._exit(1)
    return pid
os.fork = fork
"""
        killed = """
import os
def die(*_):
    os.kill(os.getpid(), 9)
server.Worker.run = die
"""
        self.assertEnds(no_threads, "can't start new thread", "in a row")
        self.assertEnds(no_thread_for_connections, "can't start new thread", "in a row")
        self.assertEnds(killed, "status -9", "in a row")
        self.assertEnds(no_processes, "Resource temporarily unavailable")

    def test_a_worker_that_can_serve_nobody_makes_way_for_another_one(self):
        no_thread = """
import threading
start, started = threading.Thread.start, []
def start_or_fail(self):
    started.append(self)
    if len(started) > 2:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = start_or_fail
"""
        no_descriptor = """
import errno, socket
def accept(self):
    raise OSError(errno.EMFILE, "Too many open files")
socket.socket.accept = accept
"""
        cases = {"can't start new thread": no_thread, "Too many open files": no_descriptor}
        for reason, patch in cases.items():
            with self.subTest(reason):
                settings = "server.ROOM_SECONDS = 0.1\nserver.RESTART_SECONDS = 0.01\n"
                server = Server(self, "--workers", "1", log=reason, patch=settings + patch)
                with contextlib.ExitStack() as stack:
                    for _ in range(server_module.QUICK_DEATHS):
                        stack.enter_context(server.connect())
                    self.assertEqual(server.process.wait(20), 1)
                said = server.said()
                self.assertIn(f"A worker cannot work: {reason}.", said)
                self.assertIn("workers in a row", said[-1])

    def test_a_worker_that_dies_again_and_again_is_replaced_while_another_one_lives(self):
        server = Server(self, "--workers", "2", patch="server.RESTART_SECONDS = 0.01")
        survivor, worker = server.workers()
        time.sleep(server_module.QUICK_DEATH_SECONDS)
        for _ in range(server_module.QUICK_DEATHS + 3):
            os.kill(worker, signal.SIGKILL)
            (worker,) = wait_until(
                lambda: set(server.workers()) - {survivor, worker}, "there is another one"
            )
        self.assertEqual(server.post(EVENT)[0], 200)
        self.assertEqual(server.stop(), 0)

    def test_a_server_that_is_told_to_stop_before_it_replaces_a_worker_stops(self):
        server = Server(self, "--workers", "1", patch="server.RESTART_SECONDS = 1")
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        wait_until(server.said, "its end is noticed")
        self.assertEqual(server.stop(), 0)
        self.assertEqual(server.said(), ["A worker ended with status -9; starting another."])

    def test_a_worker_that_stands_still_keeps_no_server_from_its_end(self):
        server = Server(self, patch="server.STOP_SECONDS = server.KILL_SECONDS = 0.2")
        workers = server.workers()
        os.kill(workers[0], signal.SIGSTOP)
        self.assertEqual(server.stop(), 1)
        wait_until(lambda: not any(map(alive, workers)), "no worker is left")

    def test_whoever_tells_a_server_again_to_stop_does_not_defer_its_end(self):
        server = Server(self, patch="server.STOP_SECONDS = server.KILL_SECONDS = 0.2")
        os.kill(server.workers()[0], signal.SIGSTOP)

        def ended():
            server.process.terminate()
            return server.said()

        (said,) = wait_until(ended, "the worker that stands still is given up")
        self.assertIn("were killed", said)

    def test_a_worker_never_runs_the_handlers_of_the_parent(self):
        server = Server(
            self,
            "--workers",
            "2",
            patch="""
import os, signal
def fork(real=os.fork):
    process = real()
    if not process:
        os.kill(os.getpid(), signal.SIGTERM)
        os.close(os.open("told", os.O_CREAT))
    return process
def stop(self, *_, real=server.Supervisor._stop):
    with open("handled", "a") as handled:
        print(os.getpid(), file=handled)
    real(self)
os.fork, server.Supervisor._stop = fork, stop
""",
        )
        wait_until(self.path("told").exists, "a worker was told to stop when it had begun")
        self.assertEqual(server.post(EVENT)[0], 200)
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.path("handled").read_text().split(), [str(server.process.pid)])

    def test_a_stderr_that_takes_nothing_holds_up_nobody(self):
        failing = self.path("failing")
        script, path = patched(
            "server",
            f"""
import os
def sync(fd, real=server.sync_file):
    if os.path.exists({str(failing)!r}):
        raise OSError(28, "No space left on device")
    real(fd)
def write_all(fd, data, real=server.write_all):
    if os.path.exists({str(failing)!r}):
        raise OSError(28, "No space left on device")
    real(fd, data)
server.write_all = write_all
""",
        )
        port = free_port()
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        self.addCleanup(os.close, writing)
        fill(writing)
        process = subprocess.Popen(
            [sys.executable, *script, "--port", str(port), "--workers", "1"],
            cwd=self.directory,
            env=os.environ | path | {"DATABASE_URL": "postgresql://localhost:1/x"},
            stdout=subprocess.DEVNULL,
            stderr=writing,
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)

        def status_of(*arguments):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            with contextlib.closing(connection):
                connection.request(*arguments)
                return connection.getresponse().status

        event = ("POST", "/liveEvent", EVENT, {"Content-Type": "application/json"})
        wait_until(lambda: not can_bind(port), "it listens")
        self.assertEqual(status_of(*event), 200)
        failing.touch()
        self.assertEqual([status_of(*event) for _ in range(3)], [507] * 3)
        self.assertEqual(status_of("GET", "/userEvents/user1"), 503)
        (worker,) = children_of(process.pid)
        os.kill(worker, signal.SIGKILL)
        wait_until(
            lambda: children_of(process.pid) not in ([], [worker]), "there is another worker"
        )
        failing.unlink()
        self.assertEqual(status_of(*event), 200)
        process.terminate()
        self.assertEqual(process.wait(20), 0)

    def test_a_server_in_development_mode_has_nothing_to_say(self):
        server = Server(self, "--workers", "1", PYTHONDEVMODE="1")
        self.assertEqual(server.post(EVENT)[0], 200)
        self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 404)
        self.assertEqual(server.post(b"x\n" * 100, "application/x-ndjson")[0], 200)
        self.assertEqual(server.stop(), 0)
        self.assertEqual(server.said(), [])
