"""The client believes no foreign answer, and is patient with slow networks alone."""

import contextlib
import email.utils
import socket
import threading
import time
from unittest import mock

import client as client_module
from tests.tools import free_port, wait_until
from tests.tools_client import ACCEPTED, ClientTest, RawServer, send_answer
from tests.tools_database import setUpModule
from tests.tools_events import EVENT, padded
from tests.tools_http import BATCHES, Recorder
from tests.tools_parts import captured

HTML = {"Content-Type": "text/html; charset=utf-8"}
UNAUTHORIZED = (401, {}, b"")
PAGE = b"<html>Down for maintenance</html>"
# Lines of Python that give a client's connections small buffers, so that it sees what the network
# takes.
SMALL_BUFFERS = """
import socket
probes = client.set_probes
def set_probes(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    probes(connection)
client.set_probes = set_probes
"""


class Believing(ClientTest):
    """Only the answer of a server of events is a delivery."""

    def assertNothingDelivered(self, options, post, words):
        """Check that such an answer is no delivery, and is named.

        The request is sent again; the answer to that ends the client.
        """

        def answer(number, _body):
            if number == 0:
                return post
            wait_until(lambda: words in printed(), "the answer is named")
            return UNAUTHORIZED

        self.path("events.jsonl", EVENT + b"\n")
        quick = mock.patch.object(client_module, "STEP_SECONDS", 0.02)
        with captured() as printed, quick, Recorder([options], answer) as server:
            events = self.path("events.jsonl")
            self.assertEqual(self.run_here(events, "--url", server.url, "--restart"), 1)
            self.assertIn(words, printed())
            self.assertNotIn("events accepted", printed())
            self.assertTrue(printed().endswith("Delivery is unknown from line 1 on.\n"))

    def test_a_page_that_answers_everything_is_no_delivery(self):
        page = (200, HTML, PAGE)
        named = (
            "status 200, text/html; charset=utf-8: '<html>Down for maintenance</html>'"
        )
        not_found = (404, HTML, PAGE)
        for case, options in {
            "200": page,
            "404": not_found,
            "batches": BATCHES,
        }.items():
            with self.subTest(case):
                self.assertNothingDelivered(options, page, named)

    def test_what_is_no_answer_to_an_event_is_no_delivery(self):
        answers = {
            "no JSON": (200, {}, b"Event received"),
            "an array": (200, {}, b'["message"]'),
            "no message": (200, {}, b'{"messages": ""}'),
            "a message that is no text": (200, {}, b'{"message": 1}'),
            "an error beside a message": (200, {}, b'{"message": "", "error": "full"}'),
            "another media type": (
                200,
                {"Content-Type": "text/plain"},
                b'{"message": ""}',
            ),
            "another success": (202, {}, b'{"message": ""}'),
            "no content": (204, {}, b""),
        }
        for case, answer in answers.items():
            with self.subTest(case):
                self.assertNothingDelivered(
                    (404, {}, b""), answer, f"status {answer[0]}"
                )

    def test_a_hostile_answer_is_no_delivery(self):
        answers = {
            "true for a number": b'{"accepted": true, "rejected": []}',
            "true for a line": b'{"accepted": 0, "rejected": [{"line": true, "error": "e"}]}',
            "not a number": b'{"accepted": NaN, "rejected": []}',
            "a number in a text": b'{"accepted": "1", "rejected": []}',
            "a huge number": b'{"accepted": 1%b, "rejected": []}' % (b"0" * 10_000),
            "rejected is an object": b'{"accepted": 1, "rejected": {}}',
            "rejected is null": b'{"accepted": 1, "rejected": null}',
            "a rejected line is a number": b'{"accepted": 0, "rejected": [1]}',
            "an error that is no text": b'{"accepted": 0, "rejected": [{"line": 1, "error": 1}]}',
            "a negative line": b'{"accepted": 0, "rejected": [{"line": -1, "error": "e"}]}',
            "deep": b'{"accepted": 1, "rejected": []' + b"[" * 100_000,
            "two answers": ACCEPTED * 2,
        }
        for case, body in answers.items():
            with self.subTest(case):
                self.assertNothingDelivered(BATCHES, (200, {}, body), "status 200")

    def test_an_answer_without_end_is_no_delivery(self):
        def send_without_end(wire, _head):
            wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{")
            while True:
                wire.sendall(b" " * 100_000)

        self.path("events.jsonl", EVENT)
        with RawServer(send_without_end) as server:
            patch = "client.MAX_ANSWER_BYTES = 1_000_000"
            arguments = ("--url", server.url, "--give-up-after", 0)
            status, _, errors = self.run_client(*arguments, patch=patch)
        self.assertEqual(status, 1)
        self.assertIn("an answer that does not end", errors)

    def test_only_an_offer_of_batches_is_one(self):
        offers = {
            "text/application/x-ndjson-2": False,
            "application/json": False,
            "application/json, Application/X-NDJSON;q=1": True,
        }
        for offer, taken in offers.items():
            answer = (204, {"Accept-Post": offer}, b"")
            with self.subTest(offer), Recorder([answer], None) as server:
                size = client_module.BatchSize(1)
                sender = client_module.Sender(server.url, "producer", size, 30)
                self.assertEqual(sender.takes_batches(), taken)

    def test_words_of_any_length_are_shown_in_part(self):
        hostile = "/:" * 40_000
        body = b'{"error": "%b"}' % hostile.encode()
        self.assertNothingDelivered(BATCHES, (401, {}, body), hostile[:300] + "....")
        headers = {"Content-Type": hostile[:9000]}
        self.assertNothingDelivered(BATCHES, (401, headers, b"x"), "/:/:...")

    def test_a_password_in_a_url_is_searched_in_linear_time(self):
        hostile = "://" * 300_000
        self.assertEqual(client_module.hide_password(hostile), hostile)
        hidden = client_module.hide_password("http://u:p@w/" + hostile + "@h")
        self.assertEqual(hidden, "http://h")


class Patient(ClientTest):
    """A try lasts as long as bytes move, and what is too slow becomes smaller."""

    def test_a_slow_line_carries_a_request_however_long_that_takes(self):
        def read_slowly(wire, head):
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            left = length - len(head.split(b"\r\n\r\n", 1)[1])
            while left:
                time.sleep(0.25)
                left -= len(wire.recv(min(left, 4096)))
            send_answer(wire)

        self.path("events.jsonl", padded(60_000))
        with RawServer(read_slowly) as server:
            patch = SMALL_BUFFERS + "client.STALL_SECONDS = 2"
            arguments = ("--url", server.url, "--give-up-after", 60)
            status, output, errors = self.run_client(*arguments, patch=patch)
        self.assertEqual((status, server.posts), (0, 1), errors)
        self.assertIn("1 events accepted", output)

    def test_a_line_on_which_nothing_moves_is_given_up(self):
        over = threading.Event()
        self.addCleanup(over.set)
        self.path("events.jsonl", padded(60_000))
        with RawServer(lambda wire, head: over.wait(20)) as server:
            patch = (
                SMALL_BUFFERS
                + "client.STALL_SECONDS = 0.2\nclient.REFUSAL_SECONDS = 0.1\n"
                + "client.STEP_SECONDS = 0.2"
            )
            arguments = ("--url", server.url, "--give-up-after", 1.5)
            status, _, errors = self.run_client(*arguments, patch=patch)
        self.assertEqual(status, 1)
        self.assertGreater(server.posts, 1)
        self.assertIn("timed out", errors)

    def test_an_answer_is_waited_for_as_long_as_there_is_patience(self):
        def answer_late(wire, request):
            # A body that was not read would reset the connection.
            while not request.endswith(b"}\n"):
                request += wire.recv(1000)
            time.sleep(3)
            send_answer(wire)

        self.path("events.jsonl", EVENT)
        with RawServer(answer_late) as server:
            arguments = ("--url", server.url, "--give-up-after", 20)
            status, output, _ = self.run_client(
                *arguments, patch="client.STALL_SECONDS = 2"
            )
        self.assertEqual((status, server.posts), (0, 1))
        self.assertIn("1 events accepted", output)

    def test_an_answer_from_the_headers_alone_is_read(self):
        def refuse(wire, _head):
            time.sleep(0.2)
            send_answer(wire, b'{"error": "too large"}', b"413 Too Large")

        self.path("events.jsonl", padded(60_000))
        with RawServer(refuse) as server:
            arguments = ("--url", server.url, "--give-up-after", 5)
            status, _, errors = self.run_client(*arguments, patch=SMALL_BUFFERS)
        self.assertEqual((status, server.posts), (1, 1))
        self.assertIn(
            "answered with status 413: too large. Lower --batch-size.", errors
        )

    def test_a_batch_that_is_too_slow_is_sent_in_parts_under_the_same_ids(self):
        def answer(_number, body):
            lines = body.split(b"\n")[:-1]
            if len(lines) > 2:
                return status, {}, b""
            rejected = []
            for number, line in enumerate(lines, 1):
                if line == b"bad":
                    rejected.append(b'{"line": %d, "error": "wrong"}' % number)
            accepted = len(lines) - len(rejected)
            answer = b'{"accepted": %d, "rejected": [%b]}' % (
                accepted,
                b",".join(rejected),
            )
            return 200, {}, answer

        lines = [b"1", b"2", b"bad", b"4", b"5", b"6", b"7", b"bad", b"9"]
        self.path("events.jsonl", b"\n".join(lines))
        for status in (408, 504):
            with self.subTest(status), Recorder(
                options=[BATCHES], post=answer
            ) as server:
                output, errors = self.client(
                    "--url", server.url, "--give-up-after", 60, status=1
                )
                self.assertIn("7 events accepted, 2 rejected", output)
                self.assertIn("events.jsonl:3: wrong\nevents.jsonl:8: wrong\n", errors)
                delivered = {}
                for headers, body in server.posts:
                    for number, line in enumerate(
                        body.split(b"\n")[:-1], int(headers["Sequence"])
                    ):
                        self.assertEqual(
                            delivered.setdefault(number, line), lines[number - 1]
                        )
                self.assertEqual(len(delivered), 9)
                self.assertEqual(
                    len({headers["Producer-Id"] for headers, _ in server.posts}), 1
                )

    def test_the_first_batches_are_so_small_that_a_slow_server_takes_them_in_time(self):
        sizes = []

        def answer(_number, body):
            lines = body.count(b"\n")
            sizes.append(lines)
            time.sleep(0.002 * lines)
            return 200, {}, b'{"accepted": %d, "rejected": []}' % lines

        # In one batch, these lines would need twice as long as the client waits for a success.
        self.path("events.jsonl", (EVENT + b"\n") * 1000)
        patch = "client.STALL_SECONDS = 0.5"
        with Recorder(options=[BATCHES], post=answer) as server:
            arguments = ("--url", server.url, "--give-up-after", 1)
            run = self.run_client(*arguments, patch=patch)
        self.assertEqual((run[0], sum(sizes)), (0, 1000), (sizes, run[2]))
        self.assertIn("1,000 events accepted", run[1])

    def test_batches_grow_with_fast_answers_and_shrink_after_time_outs(self):
        size = client_module.BatchSize(5000)
        first = size.bytes
        for _ in range(4):  # which were under way at once
            size.answered_fast(first - 10)
            self.assertEqual(size.bytes, 2 * first - 20)
        size.answered_fast(client_module.BATCH_BYTES)  # a long line alone
        self.assertEqual(size.bytes, 2 * (2 * first - 20))
        for _ in range(20):
            size.answered_fast(size.bytes)
        self.assertEqual(size.bytes, client_module.BATCH_BYTES)
        size.timed_out()
        self.assertEqual(size.bytes, client_module.BATCH_BYTES // client_module.PARTS)
        for _ in range(20):
            size.timed_out()
        self.assertEqual(size.bytes, client_module.SMALLEST_BATCH_BYTES)

    def test_a_server_that_asks_for_a_pause_gets_it(self):
        times = []

        def answer(number, _body):
            times.append(time.monotonic())
            if number == 0:
                return 429, {"Retry-After": retry_after()}, b""
            return 200, {}, ACCEPTED

        cases = {
            "seconds": lambda: "1",
            "a date": lambda: email.utils.formatdate(time.time() + 2, usegmt=True),
        }
        self.path("events.jsonl", EVENT)
        for case, retry_after in cases.items():
            times.clear()
            with self.subTest(case), Recorder(options=[BATCHES], post=answer) as server:
                self.client("--url", server.url)
                self.assertGreater(times[1] - times[0], 0.5)

    def test_a_pause_that_makes_no_sense_is_none(self):
        for text in ("", "soon", "-5", "1" * 5000, "Fri, 99 Foo 2026", "nan", "\u0663"):
            with self.subTest(text[:20]):
                headers = client_module.http.client.HTTPMessage()
                headers["Retry-After"] = text
                self.assertEqual(
                    client_module.Answer(503, headers, b"").retry_after(), 0
                )


class Reaching(ClientTest):
    """A server is reached by whichever of its addresses works, or the reason is said."""

    def test_an_address_that_does_not_work_is_tried_once(self):
        dead = free_port()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            good = listener.getsockname()
            entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            found = [(*entry, ("127.0.0.1", dead)), (*entry, good)]
            tried = []

            class Socket(socket.socket):
                def connect(self, address):
                    tried.append(address[1])
                    super().connect(address)

            failures = {}
            calls = {"getaddrinfo": lambda *_, **__: list(found), "socket": Socket}
            with mock.patch.multiple(client_module.socket, **calls):
                for _ in range(3):
                    connection, address = client_module.connect_to(("server", 80), 30, failures)
                    connection.close()
                    self.assertEqual(address, good)
        self.assertEqual(tried, [dead, good[1], good[1], good[1]])

    def test_an_address_that_gives_no_answer_is_tried_last(self):
        self.path("events.jsonl", EVENT)
        silent = threading.Event()
        self.addCleanup(silent.set)
        deaf = {
            "it closes": lambda wire: None,
            "it says nothing": lambda wire: silent.wait(20),
            "it speaks no HTTP": lambda wire: wire.sendall(b"SSH-2.0-x\r\n"),
        }
        for case, answer in deaf.items():
            taken = []
            with (
                self.subTest(case),
                Recorder(options=[BATCHES], post=lambda *_: (200, {}, ACCEPTED)) as server,
                socket.create_server(("127.0.0.1", 0)) as listener,
            ):
                def take():
                    with contextlib.suppress(OSError):
                        while True:
                            wire, _ = listener.accept()
                            with wire:
                                taken.append(wire.recv(1000))
                                answer(wire)

                threading.Thread(target=take, daemon=True).start()
                good = int(server.url.split(":")[2].split("/")[0])
                entry = "(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', {0}))"
                bad = listener.getsockname()[1]
                found = f"[{entry.format(bad)}, {entry.format(good)}]"
                patch = f"import socket; socket.getaddrinfo = lambda *_, **__: {found}"
                patch += "\nclient.STALL_SECONDS = 0.5"
                url = "http://server/liveEvent"
                arguments = ("--url", url, "--give-up-after", 0.5, "--restart")
                _, output, errors = self.run_client(*arguments, patch=patch)
                self.assertIn("1 events accepted", output, errors)
                self.assertEqual(len(taken), 1)
                listener.shutdown(socket.SHUT_RDWR)

    def test_an_interim_answer_is_passed_over(self):
        interim = b"HTTP/1.1 100 Continue\r\n\r\n" + (
            b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nConnection: close\r\n\r\n"
            b"HTTP/1.1 102 Processing\r\n\r\n"
        )

        def answer(wire, request):
            while not request.endswith(EVENT.strip() + b"\n"):
                request += wire.recv(1000)  # to close before it has come would be a reset
            wire.sendall(interim)
            send_answer(wire)

        self.path("events.jsonl", EVENT)
        with RawServer(answer) as server:
            output, _ = self.client("--url", server.url)
        self.assertIn("1 events accepted", output)
        self.assertEqual(server.posts, 1)

    def test_the_reasons_of_all_addresses_are_said(self):
        self.path("events.jsonl", EVENT)
        entry = "(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('{0}', 9))"
        found = f"[{entry.format('127.0.0.1')}, {entry.format('127.0.0.2')}]"
        patch = f"import socket\nsocket.getaddrinfo = lambda *_, **__: {found}"
        arguments = ("--url", "http://server:9/", "--give-up-after", 0)
        _, _, errors = self.run_client(*arguments, patch=patch)
        self.assertIn(
            "127.0.0.1: Connection refused; 127.0.0.2: Connection refused. Start",
            errors,
        )

    def test_what_can_never_work_is_said_at_once(self):
        self.path("events.jsonl", EVENT)
        untrusted = (
            "import ssl\n"
            "def connect(self):\n"
            "    error = ssl.SSLCertVerificationError(1, 'failed')\n"
            "    error.verify_message = 'self-signed certificate'\n"
            "    raise error\n"
            "client.TlsConnection.connect = connect"
        )
        no_threads = (
            "def submit(*_):\n"
            '    raise RuntimeError("can\'t start new thread")\n'
            "client.concurrent.futures.ThreadPoolExecutor.submit = submit"
        )
        no_memory = "def ask(self):\n    raise MemoryError\nclient.Sender._ask = ask"
        https = "https://localhost/"
        distant = "http://example.invalid/"
        secure = "https://example.invalid/"
        socks = {
            "http_proxy": "socks5://127.0.0.1:1",
            "https_proxy": "socks5h://127.0.0.1:1",
        }
        cases = {
            "an untrusted certificate": (
                https,
                untrusted,
                {},
                "not trusted: self-signed",
            ),
            "no threads": (https, no_threads, {}, "ulimit -u"),
            "a socks proxy": (
                distant,
                "",
                socks,
                "begins with socks5://, which client.py cannot use",
            ),
            "a socks proxy for https": (secure, "", socks, "with socks5h://, which"),
            "a file of keys": (secure, "", {"SSLKEYLOGFILE": "/none/keys"}, "used: /none/keys: No"),
            "no memory": (distant, no_memory, {}, "not enough memory"),
        }
        for case, (url, patch, environment, words) in cases.items():
            with self.subTest(case):
                arguments = ("--url", url, "--give-up-after", 1000)
                run = self.run_client(*arguments, patch=patch, environment=environment)
                self.assertEqual(run[0], 1)
                self.assertIn(words, run[2])
                self.assertNotIn("Start the server", run[2])

    def test_what_is_wrong_with_a_proxy_is_said_of_the_proxy(self):
        self.path("events.jsonl", EVENT)
        dead = f"http://127.0.0.1:{free_port()}"
        with RawServer(lambda wire, _head: send_answer(wire, b"", b"407 Not you")) as server:
            refusing = server.url.removesuffix("/liveEvent")
            cases = {
                "it is down": ("http", dead, 0, "no connection to the proxy: 127.0.0.1: Conn"),
                "it is down for TLS": ("https", dead, 0, "name the server in no_proxy"),
                "it refuses a tunnel": ("https", refusing, 99, "refuses: Tunnel connection failed"),
            }
            for case, (scheme, proxy, patience, words) in cases.items():
                with self.subTest(case):
                    url = f"{scheme}://example.invalid/"
                    arguments = ("--url", url, "--give-up-after", patience)
                    _, errors = self.client(*arguments, status=1, **{f"{scheme}_proxy": proxy})
                    self.assertIn(words, errors)
                    self.assertNotIn("Start the server", errors)

    def test_a_local_server_is_not_asked_through_a_proxy(self):
        self.path("events.jsonl", EVENT)
        with Recorder(options=[BATCHES], post=lambda *_: (200, {}, ACCEPTED)) as server:
            self.client("--url", server.url, http_proxy="socks5://127.0.0.1:1")
        self.assertEqual(len(server.posts), 1)
