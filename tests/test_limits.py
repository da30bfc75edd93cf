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
from tests.tools_events import EVENT, ids_in, with_id
from tests.tools_http import chunked, post, read_answer, request, serving
from tests.tools_parts import opened_log, warnings_of
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
        health, large = request("GET", "/health"), post(f"Content-Length: {2**30}")
        log = unittest.mock.Mock(
            failed=None, append=lambda lines, done: threading.Timer(0.1, done, [None]).start()
        )
        soon = {"IDLE_SECONDS": 0.2, "DRAIN_SECONDS": 0.2}
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
                wait_until(lambda: worker.deadlines, "the connection is accepted")
                wire.setblocking(False)

                def ended():
                    with contextlib.suppress(OSError):
                        wire.send(goes_on)
                    return not worker.deadlines

                wait_until(ended, "the connection is given up")
                self.assertEqual(said, [])

    def test_a_slow_disk_is_waited_for(self):
        pending = []
        log = unittest.mock.Mock(failed=None, append=lambda lines, done: pending.append(done))
        with serving(log, REQUEST_SECONDS=0.1, IDLE_SECONDS=0.1, DRAIN_SECONDS=0.1) as worker:
            with socket.create_connection(worker.address, timeout=20) as waiting:
                waiting.sendall(post(body=EVENT))
                wait_until(lambda: pending, "the event waits for the disk")
                for _ in range(3):
                    with socket.create_connection(worker.address, timeout=20) as idle:
                        self.assertEqual(idle.recv(1), b"")
                pending[0](None)
                self.assertEqual(read_answer(waiting)[0], 200)

    def test_a_lack_of_memory_ends_no_deadline(self):
        class Deadlines(dict):
            def items(deadlines):
                if not missing:
                    missing.append("memory")
                    raise MemoryError
                return super().items()

        missing, log = [], unittest.mock.Mock(failed=None)
        with serving(log, IDLE_SECONDS=1, DRAIN_SECONDS=1) as worker:
            worker.deadlines = Deadlines()
            with socket.create_connection(worker.address, timeout=20) as idle:
                self.assertEqual(idle.recv(1), b"")
            self.assertEqual(missing, ["memory"])

    def test_a_worker_takes_no_more_connections_than_it_may_hold(self):
        with (
            serving(unittest.mock.Mock(failed=None), MAX_CONNECTIONS=1) as worker,
            contextlib.ExitStack() as stack,
        ):
            first, second = [
                stack.enter_context(socket.create_connection(worker.address)) for _ in range(2)
            ]
            for wire in (first, second):
                wire.sendall(request("GET", "/health"))
            self.assertEqual(read_answer(first)[0], 200)
            self.assertFalse(
                select.select([second], [], [], 0.3)[0], "the second is not served yet"
            )
            first.close()
            self.assertEqual(read_answer(second)[0], 200)

    def test_lines_that_wait_for_the_disk_are_bounded(self):
        line, done, goes_on = with_id("p", 1).encode(), [], threading.Event()
        with (
            opened_log(self.path("log")) as log,
            unittest.mock.patch.multiple(
                server_module, GROUP_BYTES=2 * len(line), sync_file=lambda fd: goes_on.wait(20)
            ),
        ):
            threads = [
                threading.Thread(target=log.append, args=[line, done.append]) for _ in range(10)
            ]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(log._group) == 2, "the second group is full")
            time.sleep(0.2)
            self.assertEqual(len(log._group), 2)
            goes_on.set()
            for thread in threads:
                thread.join(20)
        self.assertEqual(done, [None] * 10)

    def test_few_batches_are_decoded_at_once(self):
        check_lines, decoding, most = server_module.check_lines, [], []

        def count(body, lines):
            decoding.append(body)
            most.append(len(decoding))
            time.sleep(0.1)
            decoding.pop()
            return check_lines(body, lines)

        log = unittest.mock.Mock(failed=None, append=lambda lines, done: done(None))
        with (
            unittest.mock.patch.object(server_module, "check_lines", count),
            contextlib.ExitStack() as stack,
            serving(log, DECODED_BATCHES=3) as worker,
        ):
            wires = [
                stack.enter_context(socket.create_connection(worker.address, timeout=20))
                for _ in range(8)
            ]
            for wire in wires:
                wire.sendall(post(body=EVENT, media="application/x-ndjson"))
            self.assertEqual({read_answer(wire)[0] for wire in wires}, {200})
        self.assertEqual((len(most), max(most)), (8, 3))

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
        self.assertGreaterEqual(
            server_module.IDLE_SECONDS, 75
        )  # load balancers reuse a connection for 60
        server = Server(
            self,
            patch="server.REQUEST_SECONDS = server.DRAIN_SECONDS = 0.2; server.IDLE_SECONDS = 20",
        )
        with server.connect() as wire:
            for sent in (request("GET", "/health"), post(body=EVENT)) * 2:
                time.sleep(1.5)
                wire.sendall(sent)
                self.assertEqual(read_answer(wire)[0], 200)

    def test_a_connection_that_is_too_slow_is_cut_off(self):
        server = Server(
            self, patch="server.REQUEST_SECONDS = server.IDLE_SECONDS = server.DRAIN_SECONDS = 1"
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
