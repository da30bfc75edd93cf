"""The server's room: for connections, bodies, answers that nobody reads, descriptors."""

import contextlib
import http.client
import math
import select
import selectors
import socket
import threading
import unittest
import unittest.mock

import server as server_module
from tests.tools import Server, wait_until
from tests.tools_database import setUpModule
from tests.tools_events import EVENT
from tests.tools_faults import MANY_DESCRIPTORS
from tests.tools_http import chunked, post, read_answer, request, serving
from tests.tools_requests import RequestTest


class Room(RequestTest):
    """Peers who do nothing, or are never done, keep nobody else out."""

    def connect(self, worker):
        """Return a socket to a worker of this process, which is closed at the end."""
        wire = socket.create_connection(worker.address, timeout=20)
        self.addCleanup(wire.close)
        return wire

    def assertHealthy(self, wire):
        """Check that a request on a socket is answered."""
        wire.sendall(request("GET", "/health"))
        self.assertEqual(read_answer(wire)[0], 200)

    def test_whoever_was_silent_for_longest_makes_room_for_the_next_one(self):
        with serving(unittest.mock.Mock(failure=""), MAX_CONNECTIONS=3) as worker:
            half, idle, third = [self.connect(worker) for _ in range(3)]
            half.sendall(b"GET /health HTTP/1.1\r\nHo")
            wait_until(lambda: len(worker.connections) == 3, "all are accepted")
            for wire in (idle, third):
                self.assertHealthy(wire)
            self.assertHealthy(self.connect(worker))
            self.assertEqual(read_answer(half)[0], 408)
            self.assertEqual(half.recv(1), b"")
            self.assertHealthy(idle)
            self.assertHealthy(self.connect(worker))
            self.assertEqual(third.recv(1), b"")
            self.assertHealthy(idle)

    def test_peers_who_ask_for_health_again_and_again_keep_nobody_out(self):
        over = threading.Event()

        def ask_again_and_again():
            while not over.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    with socket.create_connection(worker.address, timeout=20) as wire:
                        while not over.wait(0.3):
                            self.assertHealthy(wire)

        with serving(unittest.mock.Mock(failure=""), MAX_CONNECTIONS=4) as worker:
            threads = [threading.Thread(target=ask_again_and_again) for _ in range(4)]
            for thread in threads:
                thread.start()
            try:
                wait_until(lambda: len(worker.connections) == 4, "there is no room")
                for _ in range(3):
                    with socket.create_connection(worker.address, timeout=20) as wire:
                        self.assertHealthy(wire)
            finally:
                over.set()
                for thread in threads:
                    thread.join(20)

    def test_peers_who_send_a_byte_now_and_then_keep_nobody_out(self):
        over = threading.Event()
        health = request("GET", "/health")

        def send_byte_after_byte(wires):
            for number in range(10_000):
                for wire in wires:
                    with contextlib.suppress(OSError):
                        wire.send(health[number % len(health) :][:1])
                if over.wait(0.05):
                    return

        with serving(unittest.mock.Mock(failure=""), MAX_CONNECTIONS=4) as worker:
            wires = [self.connect(worker) for _ in range(4)]
            thread = threading.Thread(target=send_byte_after_byte, args=[wires])
            thread.start()
            try:
                wait_until(lambda: len(worker.connections) == 4, "there is no room")
                for _ in range(2):
                    self.assertHealthy(self.connect(worker))
                self.assertGreaterEqual(len(worker.connections), 3, "the others have stayed")
            finally:
                over.set()
                thread.join(20)

    def test_one_connection_makes_room_for_one(self):
        for ended in (0, 1):
            with self.subTest(ended=ended), contextlib.ExitStack() as stack:
                listener = stack.enter_context(server_module.listen("127.0.0.1", 0))
                worker = server_module.Worker(listener, unittest.mock.Mock(), None)
                stack.enter_context(worker._selector).register(listener, selectors.EVENT_READ)
                idle = {
                    name: unittest.mock.Mock(deadline=1, received=0, is_leaving=False)
                    for name in ("one", "another")
                }
                worker.connections = dict(idle)
                worker._most_connections = len(idle)
                stack.enter_context(socket.create_connection(listener.getsockname(), timeout=20))

                def end_some(_seconds):
                    for _ in range(ended):
                        worker.connections.popitem()

                with unittest.mock.patch.object(server_module.time, "sleep", end_some):
                    self.assertFalse(worker.accept())
                left = sum(connection.leave.call_count for connection in idle.values())
                self.assertEqual(left + ended, 1)

    def test_whoever_has_just_sent_something_is_not_closed_at_once(self):
        settings = {"MAX_CONNECTIONS": 1, "ROOM_SECONDS": 60}
        with serving(unittest.mock.Mock(failure=""), **settings) as worker:
            first = self.connect(worker)
            self.assertHealthy(first)
            second = self.connect(worker)
            wait_until(lambda: worker._crowded_since < math.inf, "the second one waits for room")
            self.assertHealthy(first)
            first.close()
            self.assertHealthy(second)

    def test_a_peer_who_reads_nothing_makes_room_at_once(self):
        bad = post(body=b"x\n" * 10_000, media="application/x-ndjson")
        settings = {"MAX_CONNECTIONS": 1, "DRAIN_SECONDS": 30}
        with serving(unittest.mock.Mock(failure=""), **settings) as worker:
            with socket.socket() as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.connect(worker.address)
                deaf.sendall(bad * 20)
                (connection,) = wait_until(lambda: list(worker.connections.values()), "it came")
                wait_until(lambda: connection.is_slow, "it does not read")
                self.assertHealthy(self.connect(worker))

    def test_whoever_waits_for_an_answer_keeps_the_connection(self):
        pending = []
        log = unittest.mock.Mock(
            failure="", append=lambda lines, deadline, answer, size: pending.append(answer)
        )
        revenues = unittest.mock.Mock(find_revenue=lambda user, answer: pending.append(answer))
        cases = {
            "of the log": (post(body=EVENT), None),
            "of the database": (request("GET", "/userEvents/user1"), "1.5"),
        }
        settings = {"MAX_CONNECTIONS": 1, "ROOM_SECONDS": 0.1}
        for case, (sent, outcome) in cases.items():
            with self.subTest(case), serving(log, **settings) as worker:
                worker.revenues = revenues
                first = self.connect(worker)
                first.sendall(sent)
                wait_until(lambda: pending, "the request waits")
                second = self.connect(worker)
                second.sendall(request("GET", "/health"))
                self.assertFalse(select.select([first, second], [], [], 0.5)[0])
                pending.pop()(outcome)
                status, headers, _ = read_answer(first)
                self.assertEqual((status, headers["Connection"]), (200, None))
                self.assertEqual(read_answer(second)[0], 200)

    def test_bodies_that_are_not_whole_are_bounded_together(self):
        length = f"Content-Length: {len(EVENT)}"
        parts = {
            "with a length": post(length) + EVENT[:40],
            "in chunks": post("Transfer-Encoding: chunked") + b"28\r\n" + EVENT[:40],
        }
        log = unittest.mock.Mock(
            failure="", append=lambda lines, deadline, answer, size: answer(None)
        )
        for case, part in parts.items():
            with (
                self.subTest(case),
                serving(log, HELD_BODY_BYTES=len(EVENT) + 30, DRAIN_SECONDS=2) as worker,
            ):
                first = self.connect(worker)
                first.sendall(part)
                wait_until(lambda: worker.bodies._left == 30 + len(EVENT) - 40, "it is counted")
                second = self.connect(worker)
                second.sendall(post(body=EVENT))
                status, headers, _ = read_answer(second)
                self.assertEqual((status, headers["Connection"]), (503, "close"))
                self.assertHealthy(self.connect(worker))
                first.close()
                wait_until(lambda: worker.bodies._left == 30 + len(EVENT), "it is given back")
                third = self.connect(worker)
                third.sendall(post(body=EVENT))
                self.assertEqual(read_answer(third)[0], 200)

    def test_a_body_is_counted_until_its_request_is_over(self):
        def append(lines, deadline, answer, size):
            counted.append(1000 - worker.bodies._left - size)
            answer(outcome)

        counted = []
        batch = EVENT + b"\nx\n"
        cases = {
            "an event is logged": (post(body=EVENT), None, 200),
            "a batch is logged": (post(body=batch, media="application/x-ndjson"), None, 200),
            "the log cannot be written": (post(body=EVENT), OSError("broken"), 503),
            "it holds no event": (post(body=b"x"), None, 400),
            "its end is malformed": (chunked(EVENT, end=b"x\r\n"), None, 400),
        }
        log = unittest.mock.Mock(failure="", append=append)
        with serving(log, HELD_BODY_BYTES=1000) as worker:
            for case, (sent, outcome, expected) in cases.items():
                with self.subTest(case):
                    wire = self.connect(worker)
                    wire.sendall(sent)
                    self.assertEqual(read_answer(wire)[0], expected)
                    wait_until(lambda: worker.bodies._left == 1000, "it is given back")
        self.assertEqual(counted, [len(EVENT), len(batch), len(EVENT)])

    def test_answers_that_nobody_reads_are_bounded_together(self):
        bad = post(body=b"x\n" * 10_000, media="application/x-ndjson")
        settings = {"UNREAD_ANSWER_BYTES": 1000, "DRAIN_SECONDS": 30}
        with serving(unittest.mock.Mock(failure=""), **settings) as worker:
            with socket.socket() as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.connect(worker.address)
                with contextlib.suppress(OSError):
                    deaf.sendall(bad * 20)
                wait_until(lambda: not worker.connections, "it is cut off")
            self.assertEqual(worker.unread_answers._left, 1000)

    def test_descriptors_of_any_number_are_served(self):
        server = Server(
            self,
            "--workers",
            "1",
            patch=MANY_DESCRIPTORS,
        )
        self.assertEqual(server.post(EVENT)[0], 200)
        self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 404)

    def test_connections_leave_descriptors_for_the_log_and_the_database(self):
        server = Server(
            self,
            "--workers",
            "1",
            patch="""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
""",
        )
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(server.connect())
            self.assertEqual(server.post(EVENT)[0], 200)
            server.log.rename(self.path("rotated"))
            self.assertEqual(server.post(EVENT)[0], 200)
            self.assertEqual(server.ask("GET", "/userEvents/user1")[0], 404)
        self.assertEqual(server.said(), [])

    def test_a_limit_of_descriptors_that_cannot_be_raised_is_no_failure(self):
        for error in ("ValueError", "PermissionError"):
            with self.subTest(error):
                server = Server(
                    self,
                    log=error,
                    patch=f"""
import resource
def refuse(*_):
    raise {error}("not allowed")
resource.setrlimit = refuse
resource.getrlimit = lambda _: (256, resource.RLIM_INFINITY)
""",
                )
                self.assertEqual(server.post(EVENT)[0], 200)
