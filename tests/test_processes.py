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
from tests.tools import Server, SystemTest, alive, can_bind, free_port, wait_until
from tests.tools_database import HERE, setUpModule
from tests.tools_events import EVENT, ids_in, write_events
from tests.tools_http import post, read_answer, serving


class Processes(SystemTest):
    """The server's processes are replaced, wait for what is missing, and stop in time."""

    def test_a_server_has_a_worker_per_usable_core(self):
        cores = (
            os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
        )
        self.assertEqual(len(Server(self).workers()), len(cores))
        if hasattr(os, "sched_setaffinity"):
            self.addCleanup(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, {min(cores)})
            self.assertEqual(len(Server(self, log="second").workers()), 1)

    def test_a_server_that_stops_refuses_new_connections_at_once(self):
        server = Server(self)
        # Its answer, which it does not read, keeps the server for some seconds.
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", server.port))
            deaf.sendall(post(body=b"x\n" * 10_000, media="application/x-ndjson") * 20)
            time.sleep(0.5)
            server.process.terminate()

            def refused():
                with contextlib.suppress(ConnectionRefusedError), server.connect():
                    return False
                return True

            wait_until(refused, "it refuses connections", 5)
            self.assertIsNone(server.process.poll(), "it ended before anything could be tested")
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
    return fork() if len(forks) != 3 else os.open("", 0)
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
            seconds=1,
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
        log, begun = unittest.mock.Mock(failed=None), time.monotonic()
        with unittest.mock.patch.object(
            server_module.Worker, "accept", return_value=True
        ):  # one more is always there
            with serving(log, BACKLOG_SECONDS=0.1):
                pass
            self.assertLess(time.monotonic() - begun, 5)

    def test_a_worker_that_stops_waits_for_the_disk_for_a_bounded_time(self):
        pending = []
        log = unittest.mock.Mock(failed=None, append=lambda lines, done: pending.append(done))
        with contextlib.ExitStack() as stack:
            with serving(log, BACKLOG_SECONDS=0.1, STOP_SECONDS=0.3) as worker:
                wire = stack.enter_context(socket.create_connection(worker.address, timeout=20))
                wire.sendall(post(body=EVENT))
                wait_until(lambda: pending, "the event waits for the disk")
                begun = time.monotonic()
            self.assertLess(time.monotonic() - begun, 5)
            pending[0](None)

    def test_without_threads_connections_wait_for_one(self):
        server = Server(
            self,
            "--workers",
            "1",
            patch="""
import threading
start, started = threading.Thread.start, []
def start_or_fail(self):
    started.append(self)
    if 3 < len(started) < 20:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = start_or_fail
""",
        )
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(server.connect()) for _ in range(10)]
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
