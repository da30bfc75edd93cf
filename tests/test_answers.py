"""What the server answers, and what it writes."""

import contextlib
import errno
import json
import re
import select
import socket
import threading
import tracemalloc
import unittest
import unittest.mock

import data_processor
import server as server_module
from tests.tools import Server, wait_until
from tests.tools_database import query, setUpModule
from tests.tools_events import EVENT, ids_in
from tests.tools_http import Answers, post, read_answer, request, serving
from tests.tools_parts import warnings_of
from tests.tools_requests import RequestTest


class Answering(RequestTest):
    """Each request has the answer that its sender needs."""

    def test_an_answer_that_is_not_read_yet_is_sent_later(self):
        bad = post(body=b"x\n" * 10_000, media="application/x-ndjson")
        with (
            serving(unittest.mock.Mock(failure=""), DRAIN_SECONDS=2) as worker,
            socket.socket() as slow,
        ):
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.settimeout(20)
            slow.connect(worker.address)
            slow.sendall(bad * 20)

            def is_slow():
                return any(connection.is_slow for connection in worker.connections.values())

            wait_until(is_slow, "the server cannot send everything at once")
            answers = Answers(slow)
            for _ in range(20):
                status, _, body = read_answer(answers)
                self.assertEqual((status, len(json.loads(body)["rejected"])), (200, 10_000))
            wait_until(lambda: not is_slow(), "everything is sent")

    def test_lines_without_an_event_leave_no_gap_in_the_ids_that_the_server_gives(self):
        server = Server(self, "--workers", "1")
        odd = EVENT[:-1] + b', "x": 1}'
        for _ in range(2):
            server.post(b"\n".join([EVENT, b"", b"{", odd, EVENT]), "application/x-ndjson")
        server.post(EVENT)
        self.assertEqual([sequence for _, sequence in ids_in(server.log)], [1, 2, 3, 4, 5, 6, 7])

    def test_lines_keep_the_ids_that_their_sender_gave(self):
        server = Server(self)
        lines = [EVENT, EVENT[:-1] + b', "x": 1}', b"{", EVENT, b"", EVENT + b" ", EVENT]
        server.post(b"\n".join(lines), "application/x-ndjson", Producer_Id="p", Sequence=11)
        self.assertEqual(ids_in(server.log), [("p", number) for number in (11, 12, 14, 16, 17)])

    def test_one_event_is_one_line(self):
        server = Server(self)
        for body in (EVENT + b"\n" + EVENT, EVENT + b"\n" + EVENT + b"\n"):
            self.assertEqual(server.post(body)[0], 400)
        self.assertEqual(server.post(EVENT + b"\n")[0], 200)
        self.assertEqual(server.log.read_bytes().count(b"\n"), 1)

    def test_a_stamp_is_put_into_each_line(self):
        lines = (
            b'{"userId": "a%d}%%", "name": "add_revenue", "value": 1}\n{"userId": "b", "x": {}}\n'
        )
        stamped = server_module.stamp(lines, server_module.EventId("p", 7)).split(b"\n")[:-1]
        expected = [
            event | {"producerId": "p", "sequence": sequence}
            for sequence, event in enumerate(map(json.loads, lines.split(b"\n")[:-1]), 7)
        ]
        self.assertEqual(list(map(json.loads, stamped)), expected)
        self.assertRegex(
            server_module.add_log_field(b"\n".join(stamped) + b"\n"),
            rb'\A.*1, "log": "[0-9a-f]{32}", "producerId": "p", "sequence": 7}\n'
            rb'.*{}, "producerId".*\n\Z',
        )

    def test_another_method_is_refused_with_405(self):
        server = Server(self)
        allowed = {
            "/liveEvent": (405, "POST, OPTIONS"),
            "/health": (405, "GET, HEAD"),
            "/userEvents/user1": (405, "GET, HEAD"),
            "/other": (404, None),
        }
        for path, (expected, methods) in allowed.items():
            for method in (
                "GET",
                "HEAD",
                "POST",
                "PUT",
                "DELETE",
                "PATCH",
                "OPTIONS",
                "TRACE",
                "FOO",
            ):
                if methods and method in methods.split(", "):
                    continue
                sent = EVENT
                if method == "HEAD":
                    sent = b""
                with self.subTest(f"{method} {path}"), server.connect() as wire:
                    wire.sendall(request(method, path, body=sent))
                    status, headers, body = read_answer(wire, method)
                    self.assertEqual(status, expected)
                    self.assertEqual(headers["Allow"], methods)
                    self.assertEqual(bool(body), method != "HEAD")
        self.assertEqual(server.log.read_bytes(), b"")

    def test_options_lists_what_is_accepted(self):
        server = Server(self)
        media = "application/json, application/x-ndjson"
        status, headers, body = server.ask("OPTIONS", "/liveEvent")
        self.assertEqual(
            (status, headers["Allow"], headers["Accept-Post"], body),
            (204, "POST, OPTIONS", media, b""),
        )
        self.assertEqual(server.raw(post(body=EVENT, media="text/plain"))[1]["Accept-Post"], media)

    def test_head_is_answered_as_get_without_the_body(self):
        query("INSERT INTO users_revenue VALUES ('user1', 5)")
        server = Server(self)
        for path, status in {
            "/health": 200,
            "/userEvents/user1": 200,
            "/userEvents/nobody": 404,
            "/liveEvent": 405,
            "/other": 404,
        }.items():
            with self.subTest(path):
                answers = []
                for method in ("GET", "HEAD"):
                    with server.connect() as wire:
                        wire.sendall(request(method, path, "Connection: close"))
                        answers.append(wire.makefile("rb").read().partition(b"\r\n\r\n"))
                (got, _, body), (head, _, nothing) = [
                    (re.sub(b"Date: .*", b"", head), end, body) for head, end, body in answers
                ]
                self.assertEqual((head, nothing, int(head.split()[1])), (got, b"", status))
                self.assertTrue(body)

    def test_a_refusal_is_seen_although_a_large_body_is_on_its_way(self):
        server = Server(self, EVENTS_AUTHORIZATION="secret")
        body = b"x" * 3_000_000
        for status, fields in ((401, []), (413, ["Authorization: secret"])):
            for _ in range(5):
                self.assertStatus(server, status, post(*fields, body=body))
            with server.connect() as wire:
                head, _, _ = post(*fields, body=body).partition(body)
                wire.sendall(head)
                select.select(
                    [wire], [], [], 20
                )  # the answer is there, and the sender does not look yet
                for start in range(0, len(body), 100_000):
                    wire.sendall(body[start : start + 100_000])
                self.assertEqual(read_answer(wire)[0], status)

    def test_a_body_that_would_be_refused_is_not_asked_for(self):
        server = Server(self)
        expect = "Expect: 100-Continue"
        cases = {
            "another media type": (415, post(expect, "Content-Length: 5", media="text/plain")),
            "too long": (413, post(expect, f"Content-Length: {2**20 + 1}")),
            "another path": (404, post(expect, "Content-Length: 5", target="/x")),
            "an empty body": (400, post(expect, "Content-Length: 0")),
            "a malformed event id": (400, post(expect, "Content-Length: 5", "Sequence: 1")),
        }
        for rule, (status, sent) in cases.items():
            with self.subTest(rule), server.connect() as wire:
                wire.sendall(sent)
                self.assertTrue(wire.recv(65536).startswith(b"HTTP/1.1 %d " % status))

    def test_a_body_is_asked_for_when_its_sender_waits(self):
        with Server(self).connect() as wire:
            wire.sendall(post("Expect: 100-Continue", f"Content-Length: {len(EVENT)}"))
            self.assertEqual(wire.recv(65536), b"HTTP/1.1 100 Continue\r\n\r\n")
            wire.sendall(EVENT)
            self.assertEqual(read_answer(wire)[0], 200)

    def test_a_body_is_not_asked_for_when_its_sender_does_not_wait(self):
        server = Server(self)
        for rule, sent in {
            "no expectation": post(body=EVENT),
            "HTTP/1.0": post("Expect: 100-Continue", body=EVENT, version="1.0"),
        }.items():
            with self.subTest(rule), server.connect() as wire:
                wire.sendall(sent)
                self.assertTrue(wire.recv(65536).startswith(b"HTTP/1.1 200 "))

    def test_a_failed_append_has_its_status(self):
        log = unittest.mock.Mock(failure="")
        cases = {
            "none": (None, 200),
            "no space": (OSError(errno.ENOSPC, ""), 507),
            "quota": (OSError(errno.EDQUOT, ""), 507),
            "file too large": (OSError(errno.EFBIG, ""), 507),
            "input/output": (OSError(errno.EIO, ""), 503),
            "memory": (MemoryError(), 503),
        }
        for case, (error, status) in cases.items():

            def fail(_lines, _deadline, done, _size):
                done(error)

            log.append = fail
            with self.subTest(case), serving(
                log, DRAIN_SECONDS=2
            ) as worker, socket.create_connection(worker.address, timeout=20) as wire:
                wire.sendall(post(body=EVENT))
                self.assertEqual(read_answer(wire)[0], status)

    def test_a_lack_of_memory_is_answered_with_503_and_said_once(self):
        log = unittest.mock.Mock(
            failure="", append=lambda lines, deadline, answer, size: answer(None)
        )
        with (
            warnings_of(server_module) as said,
            unittest.mock.patch.object(data_processor, "warn", said.append),
            serving(log, DRAIN_SECONDS=1) as worker,
            socket.create_connection(worker.address, timeout=20) as wire,
        ):
            with unittest.mock.patch.object(server_module, "judge_event", side_effect=MemoryError):
                for _ in range(3):
                    wire.sendall(post(body=EVENT))
                    self.assertEqual(read_answer(wire)[0], 503)
            wait_until(lambda: len(said) == 2, "it is said that it is over")
            wire.sendall(post(body=EVENT))
            self.assertEqual(read_answer(wire)[0], 200)
        self.assertEqual(
            said,
            [
                "Memory: there is not enough; some requests are refused.",
                "Memory: there is enough again.",
            ],
        )

    def test_what_fails_after_an_answer_gives_no_second_one(self):
        handler = server_module.Handler
        send_rest = handler.send_rest
        render = unittest.mock.Mock(side_effect=handler.render)
        is_over = threading.Event()

        def answer_and_fail(_lines, _deadline, answer, _size):
            answer(None)
            raise MemoryError

        def wait_and_send(self, unsent):
            is_over.wait(20)
            send_rest(self, unsent)

        log = unittest.mock.Mock(failure="", append=answer_and_fail)
        with (
            unittest.mock.patch.object(handler, "send_at_once", lambda self, data: data),
            unittest.mock.patch.object(handler, "send_rest", wait_and_send),
            unittest.mock.patch.object(handler, "render", lambda *given: render(*given)),
            serving(log, DRAIN_SECONDS=2) as worker,
            socket.create_connection(worker.address, timeout=20) as wire,
        ):
            # handle_one_request() does this last.
            worker.bodies.give_back = lambda size: is_over.set()
            wire.sendall(post(body=EVENT))
            self.assertEqual(read_answer(wire)[0], 200)
            self.assertTrue(is_over.is_set())
            self.assertEqual(render.call_count, 1)

    def test_a_bug_is_answered_with_500(self):
        with serving(
            unittest.mock.Mock(failure=""), DRAIN_SECONDS=2
        ) as worker, socket.create_connection(worker.address, timeout=20) as wire:
            worker.revenues.find_revenue = unittest.mock.Mock(side_effect=ZeroDivisionError)
            with warnings_of(server_module) as said:
                wire.sendall(request("GET", "/userEvents/user1"))
                self.assertEqual(read_answer(wire)[0], 500)
            self.assertEqual(said[-1], "ZeroDivisionError")

    def test_an_answer_from_another_thread_is_not_lost_with_an_unread_body(self):
        asked = []
        with (
            serving(unittest.mock.Mock(failure=""), DRAIN_SECONDS=5) as worker,
            socket.create_connection(worker.address, timeout=20) as wire,
        ):
            worker.revenues.find_revenue = lambda _user, answer: asked.append(answer)
            wire.sendall(request("GET", "/userEvents/user1", "Content-Length: 100000"))
            wait_until(lambda: asked, "the revenue is asked for")
            [connection] = worker.connections.values()
            before = connection.received
            wire.sendall(b"x" * 100_000)
            wait_until(lambda: connection.received > before, "the body comes")
            [answer] = asked
            answer("1")
            status, headers, _ = read_answer(wire)
            self.assertEqual((status, headers["Connection"]), (200, "close"))
            self.assertEqual(wire.recv(1), b"", "the end of the connection, and no reset")

    def test_a_rejected_line_costs_its_message_alone(self):
        tracemalloc.start()
        try:
            judged = server_module.judge_batch(b"x\n" * 10_000)
            self.assertLess(tracemalloc.get_traced_memory()[1] / 10_000, 700)
        finally:
            tracemalloc.stop()
        self.assertEqual((judged.accepted, judged.events, len(judged.rejected)), ([], 0, 10_000))

    def test_answers_of_a_server_that_stops_end_their_connections(self):
        pending = []
        log = unittest.mock.Mock(
            failure="", append=lambda lines, deadline, done, size: pending.append(done)
        )
        with contextlib.ExitStack() as stack:
            with serving(log, DRAIN_SECONDS=1) as worker:
                wire = stack.enter_context(socket.create_connection(worker.address, timeout=20))
                wire.sendall(post(body=EVENT))
                wait_until(lambda: pending, "the event waits for the disk")
                threading.Timer(0.5, lambda: pending[0](None)).start()
            self.assertEqual(read_answer(wire)[1]["Connection"], "close")

    def test_no_two_logs_begin_alike(self):
        for name in ("one", "two"):
            self.assertEqual(
                Server(self, log=name).post(EVENT, Producer_Id="p", Sequence=1)[0], 200
            )
        self.assertNotEqual(self.path("one").read_bytes(), self.path("two").read_bytes())

    LINES = [
        EVENT,
        b"",
        b"{",
        EVENT + b"\r",
        b" \t\r",
        EVENT.replace(b"1}", b"NaN}"),
    ]  # the third and the last are bad

    def test_a_batch_has_its_bad_lines_listed(self):
        server = Server(self)
        for producer in ({}, {"Producer_Id": "p", "Sequence": 2**53 - 6}):
            status, answer = server.post(b"\n".join(self.LINES), "application/x-ndjson", **producer)
            self.assertEqual(
                (status, answer["message"], answer["accepted"]), (200, "Events received", 2)
            )
            self.assertEqual([entry["line"] for entry in answer["rejected"]], [3, 6])
        self.assertEqual(
            [sequence for _, sequence in ids_in(server.log)][2:], [2**53 - 6, 2**53 - 3]
        )

    def test_a_batch_ends_at_the_last_sequence(self):
        two = EVENT + b"\n" + EVENT
        status, _ = Server(self).post(
            two, "application/x-ndjson", Producer_Id="p", Sequence=2**53 - 1
        )
        self.assertEqual(status, 400)

    def test_a_batch_has_0_to_10_000_lines(self):
        server = Server(self)
        self.assertEqual(server.post(b"", "application/x-ndjson")[1]["accepted"], 0)
        self.assertEqual(
            server.post((EVENT + b"\n") * 10_000, "application/x-ndjson")[1]["accepted"], 10_000
        )

    def test_no_id_that_the_server_gives_is_given_twice(self):
        server = Server(self)
        server.post((EVENT + b"\n") * 10_000, "application/x-ndjson")
        for _ in range(10):  # whichever worker takes it
            server.post(b"\n".join(self.LINES), "application/x-ndjson")
            server.post(EVENT)
        ids = ids_in(server.log)
        self.assertEqual((len(ids), len(set(ids))), (10_030, 10_030))

    def test_the_log_holds_the_text_as_received_with_the_stamp_behind_it(self):
        server = Server(self)
        text = (
            '{"userId":"\u2028\u0085\\u00e9",\r\n "extra": [1.50, {}],'
            '"name" :"add_revenue","value":1.50}'
        ).encode()
        server.post(b"\n" + text + b" \r\n", Producer_Id="p", Sequence=7)
        server.post(EVENT)
        first, second = server.log.read_bytes().split(b"\n")[:-1]
        self.assertRegex(
            first,
            re.escape(b" " + text.replace(b"\r\n", b"  ")[:-1])
            + rb', "log": "[0-9a-f]{32}", "producerId": "p", "sequence": 7}',
        )
        self.assertRegex(
            second, re.escape(EVENT[:-1]) + rb', "producerId": "[A-Za-z0-9_-]{22}", "sequence": 1}'
        )

    def test_a_handler_finds_what_http_server_promises(self):
        class Echo(server_module.Handler):
            def do_GET(self):
                if self.path == "/health?short":
                    self.send_error(404)
                else:
                    self.send_error(418, self.headers["HOST"], self.path)

        errors = []
        with (
            serving(unittest.mock.Mock(failure=""), Handler=Echo) as worker,
            socket.create_connection(worker.address, timeout=20) as wire,
        ):
            for target, status in {"/health?x=1": 418, "/health?short": 404}.items():
                wire.sendall(request("GET", target))
                answer, _, body = read_answer(wire)
                self.assertEqual(answer, status)
                errors.append(json.loads(body)["error"])
        self.assertEqual(errors, ["/health?x=1", "Nothing matches the given URI"])
