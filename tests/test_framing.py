"""Where a request ends, and what is no request."""

import io
import tracemalloc
import unittest

import server as server_module
from tests.tools import Server
from tests.tools_database import setUpModule
from tests.tools_events import EVENT, ids_in
from tests.tools_http import Answers, chunked, post, read_answer, request
from tests.tools_requests import RequestTest


EXPECTED_HEAD = ("POST", "/liveEvent", "HTTP/1.1")


class Framing(RequestTest):
    """A request, byte by byte, is answered with the status that the standard wants."""

    def test_a_valid_request_is_accepted(self):
        upper = b"%X" % len(EVENT)
        cases = {
            "a length": [post(body=EVENT)],
            "one chunk": [chunked(EVENT)],
            "two chunks": [chunked(EVENT[:10], EVENT[10:])],
            "an extension and a trailer": [chunked(EVENT, end=b"0;x=y\r\nX-Trailer: 1\r\n\r\n")],
            "a last chunk of three zeros": [chunked(EVENT, end=b"000\r\n\r\n")],
            "upper case in a chunk's size and its coding": [
                post("Transfer-Encoding: Chunked")
                + upper
                + b" ; a=\"b\"\r\n"
                + EVENT
                + b"\r\n0\r\n\r\n"
            ],
            "upper case and a parameter in the media type": [
                post(body=EVENT, media="Application/JSON; charset=utf-8")
            ],
            "a query": [post(body=EVENT, target="/liveEvent?query")],
            "an absolute target, which wins over Host": [
                post(body=EVENT, target="http://LOCALHOST:1/liveEvent", host="elsewhere")
            ],
            "an empty line before the request": [b"\r\n" + post(body=EVENT)],
            "HTTP/1.0": [post(body=EVENT, version="1.0")],
            "repeated and empty fields": [
                post("Accept: a", "Accept: b", "X-Empty:", "Connection: close", body=EVENT)
            ],
            "a tab and a letter outside ASCII in a field": [post("X: a\tb\u00e4", body=EVENT)],
            "the identity coding": [post("Content-Encoding: Identity", body=EVENT)],
            "a byte at a time": [bytes([byte]) for byte in post(body=EVENT)],
            "line ends within the event": [post(body=b"\r\n{\r\n" + EVENT[1:-1] + b"\n}\n")],
            "5,000 zeros before the length": [
                post("Content-Length: " + "0" * 5000 + str(len(EVENT))) + EVENT
            ],
        }
        server = Server(self)
        for rule, pieces in cases.items():
            with self.subTest(rule):
                self.assertStatus(server, 200, *pieces)
        self.assertEqual((len(cases), len(ids_in(server.log))), (17, 17))

    def test_a_malformed_length_is_refused_with_400(self):
        values = {
            "a plus sign": "+54",
            "a minus sign": "-54",
            "4,400 digits and a letter": "5" * 4400 + "x",
            "an underscore": "5_4",
            "digits of another script": "\u0665\u0664".encode().decode("latin-1"),
            "hexadecimal digits": "0x36",
            "a list of equal lengths": "54, 54",
            "nothing": "",
            "a space between the digits": "5 4",
            "an exponent": "54e0",
            "a semicolon": "54;",
        }
        self.assertRefused(
            400, {rule: post(f"Content-Length: {value}") + EVENT for rule, value in values.items()}
        )

    def test_a_body_whose_end_is_ambiguous_is_refused_with_400(self):
        length = f"Content-Length: {len(EVENT)}"
        coding = "Transfer-Encoding: chunked"
        cases = {
            "two equal lengths": [length, length],
            "two different lengths": [length, "Content-Length: 7"],
            "a length and chunks": [length, coding],
            "an unknown coding": ["Transfer-Encoding: gzip"],
            "an unknown coding before chunks": ["Transfer-Encoding: gzip, chunked"],
            "chunks in chunks": ["Transfer-Encoding: chunked, chunked"],
            "the identity coding": ["Transfer-Encoding: identity"],
            "no coding": ["Transfer-Encoding:"],
            "two fields with a coding": [coding] * 2,
            "a space before the colon": ["Transfer-Encoding : chunked"],
            "a coding whose name ends alike": ["Transfer-Encoding: xchunked"],
        }
        self.assertRefused(400, {rule: post(*fields) + EVENT for rule, fields in cases.items()})

    def test_a_malformed_field_is_refused_with_400(self):
        cases = {
            "a folded line": [" folded"],
            "a line folded by a tab": ["\tfolded"],
            "no colon": ["no colon"],
            "no name": [": no name"],
            "a space in a name": ["sp ace: x"],
            "a CR in a value": ["X: a\rb"],
            "a NUL in a value": ["X: a\0b"],
            "a NUL in a name": ["X\0: a"],
            "a bare LF before another field": ["X: a\nTransfer-Encoding: chunked"],
            "a second Host": ["Host: 127.0.0.1"],
            "two Authorizations": ["Authorization: a", "Authorization: b"],
            "a second Content-Type": ["Content-Type: application/json"],
            "a letter outside ASCII in a name": ["n\u00e4me: x"],
            "a BEL in a value": ["X: a\ab"],
            "a DEL in a value": ["X: a\x7f"],
            "an ESC in a value": ["X: \x1b"],
        }
        length = f"Content-Length: {len(EVENT)}"
        self.assertRefused(
            400,
            {rule: post(length, *fields) + EVENT for rule, fields in cases.items()}
            | {
                "a CR before the line's end": chunked(EVENT).replace(
                    b"Transfer", b"X: \r\r\nTransfer", 1
                )
            },
        )

    def test_a_malformed_event_id_is_refused_with_400(self):
        cases = {
            "a producer without a sequence": ["Producer-Id: p"],
            "a sequence without a producer": ["Sequence: 1"],
            "two producers": ["Producer-Id: p", "Producer-Id: q", "Sequence: 1"],
            "two sequences": ["Producer-Id: p", "Sequence: 1", "Sequence: 2"],
        }
        pairs = {
            "an empty producer": ("", 1),
            "a producer of 65 characters": ("p" * 65, 1),
            "a space in the producer": ("p p", 1),
            "a dot in the producer": ("p.", 1),
            "a letter outside ASCII in the producer": ("\u00e4", 1),
            "sequence 0": ("p", 0),
            "a negative sequence": ("p", -1),
            "a plus sign in the sequence": ("p", "+1"),
            "sequence 2**53": ("p", 2**53),
            "a fraction in the sequence": ("p", "1.0"),
            "an empty sequence": ("p", ""),
            "a superscript sequence": ("p", "\u00b2"),
        }
        cases |= {
            rule: [f"Producer-Id: {producer}", f"Sequence: {sequence}"]
            for rule, (producer, sequence) in pairs.items()
        }
        self.assertRefused(400, {rule: post(*fields, body=EVENT) for rule, fields in cases.items()})

    def test_a_malformed_chunk_is_refused_with_400(self):
        coding = post("Transfer-Encoding: chunked")
        rest = b"\r\n" + EVENT + b"\r\n0\r\n\r\n"
        sizes = {
            "a minus sign": b"-36",
            "a plus sign": b"+36",
            "a hexadecimal prefix": b"0x36",
            "an underscore": b"3_6",
            "no size": b"",
            "a letter that is no digit": b"g",
            "a space before the size": b" 36",
            "a NUL behind the size": b"36\0",
            "a NUL in an extension": b"36;\0",
            "a CR in an extension": b"36;a\rb",
            "a size that is one too small": b"35",
        }
        self.assertRefused(
            400,
            {rule: coding + size + rest for rule, size in sizes.items()}
            | {
                "a bare LF behind the size": chunked(EVENT).replace(b"36\r\n", b"36\n"),
                "no line end behind the data": chunked(EVENT).replace(b"}\r\n", b"}xx"),
                "bare LFs behind the last chunk": chunked(EVENT, end=b"0\n\n"),
                "a trailer without a colon": chunked(EVENT, end=b"0\r\nno colon\r\n\r\n"),
                "chunks in HTTP/1.0": post("Transfer-Encoding: chunked", version="1.0")
                + b"36"
                + rest,
            },
        )

    def test_a_malformed_head_is_refused_with_400(self):
        def head(first, second, third):
            return b"GET /health HTTP/1.1%bHost: localhost%b%b" % (first, second, third)

        self.assertRefused(
            400,
            {
                "no Host": post(body=EVENT, host=None),
                "no Host and an absolute target": post(
                    body=EVENT, host=None, target="http://localhost/liveEvent"
                ),
                "HTTP/0.9": b"GET /health\r\n\r\n",
                "a method alone": b"GET\r\n\r\n",
                "bare LFs": b"GET /health HTTP/1.1\n\n",
                "two spaces": b"GET  /health HTTP/1.1\r\n\r\n",
                "a space behind the version": b"GET /health HTTP/1.1 \r\n\r\n",
                "a space in the target": b"GET /hea lth HTTP/1.1\r\n\r\n",
                "a small http": b"GET /health http/1.1\r\n\r\n",
                "a letter outside ASCII in the method": b"G\xcbT /health HTTP/1.1\r\n\r\n",
                "a NUL": b"\0\r\n\r\n",
                "nothing but line ends": b"\r\n\r\n\r\n",
                "a bare LF behind the request line": head(b"\n", b"\r\n", b"\r\n"),
                "a bare LF behind a field": head(b"\r\n", b"\n", b"\r\n"),
                "a bare LF behind the head": head(b"\r\n", b"\r\n", b"\n"),
                "an escape that is not hexadecimal": request("GET", "/userEvents/%zz"),
                "a user who is not UTF-8": request("GET", "/userEvents/%FF"),
            },
        )

    def test_a_body_without_an_event_is_refused_with_400(self):
        self.assertRefused(
            400,
            {
                "an empty object": post(body=b"{}"),
                "1 MiB of spaces": post(body=b" " * 2**20),
                "1 MiB of spaces in chunks": chunked(*[b" " * 2**16] * 16),
                "length 0": post("Content-Length: 0"),
            },
        )

    def test_what_does_not_exist_is_answered_with_404(self):
        self.assertRefused(
            404,
            {
                "the root": request("GET", "/"),
                "another path": post(body=EVENT, target="/liveEvents"),
                "a slash at the end": post(body=EVENT, target="/liveEvent/"),
                "an unknown user": request("GET", "/userEvents/nobody"),
                "a NUL for a user": request("GET", "/userEvents/%00"),
                "no user": request("GET", "/userEvents"),
                "the server as a whole": request("OPTIONS", "*"),
                "a tunnel": request("CONNECT", "localhost:80"),
            },
        )

    def test_a_body_without_a_length_is_refused_with_411(self):
        self.assertRefused(411, {"neither a length nor chunks": post()})

    def test_a_body_that_is_too_large_is_refused_with_413(self):
        lengths = {
            "a length of one byte too much": 2**20 + 1,
            "a length of 31 digits": 10**30,
            "a length of 10,000 digits": "9" * 10_000,
            "a length of 4,001 digits": "1" + "0" * 4000,
        }
        self.assertRefused(
            413,
            {rule: post(f"Content-Length: {length}") for rule, length in lengths.items()}
            | {
                "chunks over 1 MiB": chunked(*[b"x" * 65536] * 17),
                "a chunk of 15 digits": post("Transfer-Encoding: chunked") + b"f" * 15 + b"\r\n",
                "10,001 lines": post(body=b"\n" * 10_001, media="application/x-ndjson"),
            },
        )

    def test_a_target_that_is_too_long_is_refused_with_414(self):
        self.assertRefused(414, {"70,000 bytes": b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"})

    def test_another_media_type_is_refused_with_415(self):
        media = {
            "none": None,
            "text": "text/plain",
            "one that begins alike": "application/jsonx",
            "a form": "application/x-www-form-urlencoded",
        }
        self.assertRefused(
            415, {rule: post(body=EVENT, media=value) for rule, value in media.items()}
        )

    def test_a_compressed_body_is_refused_with_415(self):
        sent = {
            coding: post(f"Content-Encoding: {coding}", body=EVENT, media=media)
            for coding, media in (
                ("gzip", "application/x-ndjson"),
                ("br", "application/json"),
                ("identity, gzip", "application/json"),
            )
        }
        self.assertRefused(415, sent)
        _, headers, _ = Server(self, log="second").raw(sent["gzip"])
        self.assertEqual(headers["Accept-Encoding"], "identity")

    def test_an_unknown_expectation_is_refused_with_417(self):
        self.assertRefused(417, {"miracles": post("Expect: miracles", body=EVENT)})

    def test_a_head_that_is_too_large_is_refused_with_431(self):
        self.assertRefused(
            431,
            {
                "101 fields": post(*["X: x"] * 98, body=EVENT),
                "10,000 fields": post(*[f"X-{i}: x" for i in range(10_000)], body=EVENT),
                "a field of 70,000 bytes": post("X: " + "x" * 70_000, body=EVENT),
                "a trailer of 20,000 fields": chunked(
                    EVENT, end=b"0\r\n" + b"X: x\r\n" * 20_000 + b"\r\n"
                ),
                "20 fields of 8,000 bytes": post(
                    *[f"X-{i}: " + "x" * 8000 for i in range(20)], body=EVENT
                ),
            },
        )

    def test_a_hundred_fields_are_accepted(self):
        server = Server(self)
        self.assertStatus(server, 200, post(*["X: x"] * 97, body=EVENT))

    def test_another_version_is_refused_with_505(self):
        self.assertRefused(
            505,
            {
                "HTTP/2.0": b"GET /health HTTP/2.0\r\n\r\n",
                "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            },
        )

    def test_pipelined_requests_are_answered_in_order(self):
        server = Server(self)
        with server.connect() as wire:
            wire.sendall(
                post(body=EVENT) * 2
                + request("GET", "/health")
                + request("GET", "/other")
                + chunked(EVENT)
                + request("GET", "/health", "Connection: close")
                + post(body=EVENT)
            )
            answers = Answers(wire)
            self.assertEqual(
                [read_answer(answers)[0] for _ in range(6)], [200, 200, 200, 404, 200, 200]
            )
            self.assertEqual(answers.read(), b"")
        self.assertEqual(len(ids_in(server.log)), 3)

    def test_nothing_is_read_after_the_last_request_of_a_connection(self):
        server = Server(self)
        for rule, last in {
            "Connection: Close": request("GET", "/health", "Connection: Close"),
            "HTTP/1.0": request("GET", "/health", version="1.0"),
            "HTTP/1.0 with keep-alive": request(
                "GET", "/health", "Connection: keep-alive", version="1.0"
            ),
        }.items():
            with self.subTest(rule), server.connect() as wire:
                wire.sendall(last + post(body=EVENT))
                answers = Answers(wire)
                self.assertEqual(
                    (read_answer(answers)[1]["Connection"], answers.read()), ("close", b"")
                )
        self.assertEqual(server.log.read_bytes(), b"")

    def test_an_unread_body_is_never_taken_for_a_request(self):
        server = Server(self)
        smuggled = post(body=EVENT)
        for method, path, media in (
            ("POST", "/other", "application/json"),
            ("GET", "/health", None),
            ("PUT", "/liveEvent", None),
            ("POST", "/liveEvent", "text/plain"),
        ):
            with self.subTest(f"{method} {path}"), server.connect() as wire:
                wire.sendall(request(method, path, body=smuggled, media=media) + smuggled)
                _, headers, _ = read_answer(wire)
                self.assertEqual(headers["Connection"], "close")
                self.assertEqual(wire.recv(1), b"")
        self.assertEqual(server.log.read_bytes(), b"")

    def test_a_request_is_accepted_as_node_streams_it(self):
        server = Server(self, EVENTS_AUTHORIZATION="secret")
        head = (
            b"POST /liveEvent HTTP/1.1\r\nContent-Type: application/json\r\n"
            b"Authorization: secret\r\n"
            b"Host: localhost:8000\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self.assertStatus(server, 200, head, b"%x\r\n" % len(EVENT), EVENT, b"\r\n", b"0\r\n\r\n")
        self.assertEqual(len(ids_in(server.log)), 1)


class Dribble(io.RawIOBase):
    """A connection on which two bytes come at a time."""

    def __init__(self, sent):
        super().__init__()
        self._sent = io.BytesIO(sent)

    def readable(self):
        """Be read."""
        return True

    def readinto(self, buffer):
        """Receive."""
        piece = self._sent.read(2)
        buffer[: len(piece)] = piece
        return len(piece)


class Reading(unittest.TestCase):
    """A request is read as it stands there, whoever sent it."""

    def read(self, sent):
        """Read a request with a body, and return its head, its body, and what follows it."""
        rfile = io.BytesIO(sent)
        head = server_module.read_request(rfile)
        framing = server_module.find_framing(head)
        pieces = []
        body = server_module.read_body(rfile, framing, pieces.append)
        self.assertGreaterEqual(sum(pieces), len(body))
        return head, body, rfile.read()

    def test_a_request_ends_where_its_framing_says(self):
        for case, sent in {"a length": post(body=EVENT), "chunks": chunked(EVENT, EVENT)}.items():
            with self.subTest(case):
                head, body, rest = self.read(sent + b"GET")
                self.assertEqual((head.command, head.path, head.version), EXPECTED_HEAD)
                self.assertEqual((body.replace(EVENT, b""), rest), (b"", b"GET"))

    def test_fields_are_found_in_any_case(self):
        head, _, _ = self.read(post("X-One: a", "x-one: b", body=EVENT))
        self.assertEqual(head.headers["X-ONE"], "a, b")
        self.assertEqual(head.headers.get("x-One"), "a, b")
        self.assertIn("Content-Length", head.headers)
        self.assertIsNone(head.headers.get("X-Two"))

    def test_a_request_that_ends_early_is_not_whole_at_any_byte(self):
        for sent in (post(body=EVENT), chunked(EVENT[:20], EVENT[20:])):
            for end in range(len(sent)):
                with self.subTest(end=end), self.assertRaises(server_module.Refusal) as caught:
                    self.read(sent[:end])
                self.assertEqual(caught.exception.status, 408)

    def test_a_body_that_comes_in_small_pieces_takes_little_memory(self):
        body = b"x" * 200_000
        for case, sent in {"a length": post(body=body), "a chunk": chunked(body)}.items():
            rfile = io.BufferedReader(Dribble(sent))
            head = server_module.read_request(rfile)
            framing = server_module.find_framing(head)
            tracemalloc.start()
            try:
                received = server_module.read_body(rfile, framing, lambda count: None)
                _, most = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            with self.subTest(case):
                self.assertEqual(received, body)
                self.assertLess(most, 3 * len(body))

    def test_a_length_of_many_zeros_costs_no_time(self):
        head, body, _ = self.read(post("Content-Length: " + "0" * 60_000 + "3") + b"abc")
        self.assertEqual(body, b"abc")
