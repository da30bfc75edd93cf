"""The limits of the server: connections, time, memory."""

import contextlib
import os
import resource
import select
import signal
import socket
import threading
import time
import unittest
import unittest.mock

import server as server_module
from tests.tools import Server, wait_until
from tests.tools_database import setUpModule
from tests.tools_events import EVENT, ids_in
from tests.tools_http import chunked, post, read_answer, request, serving
from tests.tools_parts import warnings_of
from tests.tools_requests import RequestTest


class Limits(RequestTest):
    """No peer does harm, and nobody waits for ever."""

    def test_a_thousand_connections_at_once_are_served(self):
        wires = []
        with contextlib.ExitStack() as stack:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # as macOS begins
            server = Server(self, "--workers", "2")
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
            for worker in server.workers():
                os.kill(worker, signal.SIGSTOP)
            for number in range(1000):
                if number == 100:  # these wait in the backlog
                    for worker in server.workers():
                        os.kill(worker, signal.SIGCONT)
                wires.append(stack.enter_context(server.connect()))
            for wire in wires:
                wire.sendall(post(body=EVENT))
            self.assertEqual({read_answer(wire)[0] for wire in wires}, {200})
        self.assertEqual(len(set(ids_in(server.log))), 1000)

    def test_no_peer_keeps_its_connection_for_ever(self):
        health = request("GET", "/health")
        large = post(f"Content-Length: {2**30}")
        log = unittest.mock.Mock(
            failure="",
            append=lambda lines, deadline, done, size: threading.Timer(0.1, done, [None]).start(),
        )
        soon = {"PEER_IDLE_SECONDS": 0.2, "DRAIN_SECONDS": 0.2}
        cases = {
            "idle after an event": (post(body=EVENT), b"", soon),
            "idle after health": (health, b"", soon),
            "reads no answer": (health, 1000 * health, soon),
            "has not heard of the refusal": (
                large,
                b"x" * 10_000,
                {"DRAIN_BYTES": 2**30, "DRAIN_SECONDS": 0.2},
            ),
            "sends on and on": (large, b"x" * 10_000, {"DRAIN_BYTES": 10**6, "DRAIN_SECONDS": 30}),
        }
        for case, (begins, goes_on, settings) in cases.items():
            with (
                self.subTest(case),
                warnings_of(server_module) as said,
                serving(log, **settings) as worker,
                socket.socket() as wire,
            ):
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                wire.connect(worker.address)
                wire.sendall(begins)
                wait_until(lambda: worker.connections, "the connection is accepted")
                wire.setblocking(False)

                def ended():
                    with contextlib.suppress(OSError):
                        wire.send(goes_on)
                    return not worker.connections

                wait_until(ended, "the connection is given up")
                self.assertEqual(said, [])

    def test_a_slow_disk_is_waited_for(self):
        pending = []
        log = unittest.mock.Mock(
            failure="", append=lambda lines, deadline, done, size: pending.append(done)
        )
        with serving(log, REQUEST_SECONDS=0.1, PEER_IDLE_SECONDS=0.1, DRAIN_SECONDS=0.1) as worker:
            with socket.create_connection(worker.address, timeout=20) as waiting:
                waiting.sendall(post(body=EVENT))
                wait_until(lambda: pending, "the event waits for the disk")
                for _ in range(3):
                    with socket.create_connection(worker.address, timeout=20) as idle:
                        self.assertEqual(idle.recv(1), b"")
                pending[0](None)
                self.assertEqual(read_answer(waiting)[0], 200)

    def test_a_lack_of_memory_ends_no_deadline(self):
        class Connections(dict):
            def values(connections):
                if not missing:
                    missing.append("memory")
                    raise MemoryError
                return super().values()

        missing = []
        log = unittest.mock.Mock(failure="")
        with serving(log, PEER_IDLE_SECONDS=1, DRAIN_SECONDS=1) as worker:
            worker.connections = Connections()
            with socket.create_connection(worker.address, timeout=20) as idle:
                self.assertEqual(idle.recv(1), b"")
            self.assertEqual(missing, ["memory"])

    def test_one_batch_at_a_time_is_decoded(self):
        judge_batch = server_module.judge_batch
        decoding = []
        most = []

        def count(body):
            decoding.append(body)
            most.append(len(decoding))
            time.sleep(0.1)
            decoding.pop()
            return judge_batch(body)

        log = unittest.mock.Mock(failure="", append=lambda lines, deadline, done, size: done(None))
        with (
            unittest.mock.patch.object(server_module, "judge_batch", count),
            contextlib.ExitStack() as stack,
            serving(log, MAX_CONNECTIONS=10) as worker,
        ):
            wires = [
                stack.enter_context(socket.create_connection(worker.address, timeout=20))
                for _ in range(8)
            ]
            for wire in wires:
                wire.sendall(post(body=EVENT, media="application/x-ndjson"))
            self.assertEqual({read_answer(wire)[0] for wire in wires}, {200})
        self.assertEqual(most, [1] * 8)

    def test_a_batch_waits_for_the_disk_no_longer_because_of_other_batches(self):
        judge_batch = server_module.judge_batch
        decoded = []  # when it began
        deadlines = []
        goes_on = threading.Event()

        def judge(body):
            decoded.append(time.monotonic())
            return judge_batch(body)

        def append(lines, deadline, answer, size):
            deadlines.append(deadline)
            goes_on.wait(20)
            answer(None)

        log = unittest.mock.Mock(failure="", append=append)
        with (
            unittest.mock.patch.object(server_module, "judge_batch", judge),
            contextlib.ExitStack() as stack,
            serving(log, MAX_CONNECTIONS=10) as worker,
        ):
            wires = []
            for _ in range(2):
                wire = socket.create_connection(worker.address, timeout=20)
                wires.append(stack.enter_context(wire))
                wire.sendall(post(body=EVENT, media="application/x-ndjson"))
            try:
                wait_until(lambda: len(deadlines) == 2, "both batches wait for the disk")
            finally:
                goes_on.set()
            self.assertEqual({read_answer(wire)[0] for wire in wires}, {200})
        # They count from the moment when the body was whole.
        self.assertLessEqual(min(deadlines), min(decoded) + server_module.LOCK_SECONDS)
        self.assertLessEqual(max(deadlines), max(decoded) + server_module.LOCK_SECONDS)

    def test_a_peer_that_vanishes_at_any_stage_leaves_no_trace(self):
        server = Server(self)
        whole = chunked(EVENT)
        for end in range(0, len(whole), 3):
            for linger in (b"\0" * 8, b"\1\0\0\0\0\0\0\0"):  # a plain close, and a reset
                with server.connect() as wire:
                    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    wire.sendall(whole[:end])
        length = f"Content-Length: {3 * len(EVENT)}"
        for case, part in {
            "an event": whole[:-1],
            "a batch whose first part is a batch, too": post(length, media="application/x-ndjson")
            + EVENT
            + b"\n",
        }.items():
            with self.subTest(case), server.connect() as wire:
                wire.sendall(part)
                wire.shutdown(socket.SHUT_WR)
                status, headers, _ = read_answer(wire)
                self.assertEqual((status, headers["Connection"]), (408, "close"))
        self.assertEqual(server.log.read_bytes(), b"")
        self.assertStatus(server, 200, whole)

    def test_an_idle_connection_has_longer_than_a_request(self):
        # Load balancers reuse a connection for 60.
        self.assertGreaterEqual(server_module.PEER_IDLE_SECONDS, 75)
        server = Server(
            self,
            patch="server.REQUEST_SECONDS = server.DRAIN_SECONDS = 0.2\n"
            "server.PEER_IDLE_SECONDS = 20",
        )
        with server.connect() as wire:
            for sent in (request("GET", "/health"), post(body=EVENT)) * 2:
                time.sleep(0.7)
                wire.sendall(sent)
                self.assertEqual(read_answer(wire)[0], 200)

    def test_an_unfinished_request_has_less_time_than_an_idle_connection(self):
        health = request("GET", "/health")
        parts = {
            "a byte": (b"", b"G"),
            "a part of a head": (b"", health[:-1]),
            "a part of a body": (b"", post(body=EVENT)[:-1]),
            "a part of a later request": (health, health[:-1]),
        }
        settings = {"REQUEST_SECONDS": 0.2, "PEER_IDLE_SECONDS": 60}
        for case, (whole, part) in parts.items():
            with (
                self.subTest(case),
                serving(unittest.mock.Mock(failure=""), **settings) as worker,
                socket.create_connection(worker.address, timeout=20) as wire,
            ):
                if whole:
                    wire.sendall(whole)
                    self.assertEqual(read_answer(wire)[0], 200)
                wire.sendall(part)
                self.assertEqual(read_answer(wire)[0], 408)

    def test_a_connection_that_is_too_slow_is_cut_off(self):
        server = Server(
            self,
            patch="server.REQUEST_SECONDS = server.PEER_IDLE_SECONDS = 1\n"
            "server.DRAIN_SECONDS = 1",
        )
        with server.connect() as idle, server.connect() as slow, server.connect() as deaf:
            deaf.sendall(post(f"Content-Length: {2**20 + 1}"))
            for byte in post(body=EVENT)[:-1]:
                slow.sendall(bytes([byte]))
                if select.select([slow], [], [], 0.05)[0]:
                    break
            self.assertEqual(read_answer(slow)[0], 408)
            self.assertEqual(idle.recv(1), b"")
            read_answer(deaf)
            self.assertEqual(deaf.recv(1), b"")
