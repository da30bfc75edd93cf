"""The client tries again what is not answered for certain, and nothing else."""

import collections
import concurrent.futures
import http.client
import json
import signal
import socket
import struct
import threading
import time
from unittest import mock

import client as client_module
from tests.tools import Server, free_port, next_line, wait_until
from tests.tools_client import ACCEPTED, ClientTest, RawServer
from tests.tools_database import setUpModule
from tests.tools_events import EVENT, ids_in, write_events
from tests.tools_http import BATCHES, Recorder, dribbling
from tests.tools_parts import captured


class Requests(ClientTest):
    """A batch is sent until its answer is certain."""

    def test_it_waits_for_a_server_that_is_not_up_yet(self):
        port = free_port()
        write_events(self.path("events.jsonl"), 3)
        client = self.start("client.py", "--url", f"http://localhost:{port}/liveEvent")
        self.assertIn("Waiting for http://localhost", next_line(client.stderr))
        Server(self, port=port)
        output, errors = client.communicate(timeout=20)
        self.assertEqual(
            (output[:17], errors),
            ("3 events accepted", f"http://localhost:{port}/liveEvent answers.\n"),
        )

    def test_the_random_pause_before_a_retry_doubles(self):
        spans = []
        with Recorder(
            options=[(503, {}, b"")] * 12 + [BATCHES], post=None
        ) as server, mock.patch.object(
            client_module.random, "uniform", lambda *span: spans.append(span) or 0
        ):
            size = client_module.BatchSize(1)
            sender = client_module.Sender(server.url, "producer", size, 30)
            self.assertTrue(sender.takes_batches())
        self.assertTrue(all(low < high for low, high in spans))
        self.assertEqual(
            [high for _, high in spans],
            [min(spans[0][1] * 2**n, client_module.MAX_BACKOFF_SECONDS) for n in range(12)],
        )

    def test_an_answer_within_a_quarter_of_its_time_lets_batches_grow(self):
        cases = {  # {(--give-up-after, seconds of the answer): whether it is fast}
            (30, 7.4): True,
            (30, 7.6): False,
            (2, 0.4): True,  # though an answer has longer, the client would give up
            (2, 0.6): False,
            (0, 0.2): True,
        }
        headers = http.client.HTTPMessage()
        headers["Content-Type"] = "application/json"
        answer = client_module.Answer(200, headers, ACCEPTED)
        batch = client_module.make_batch(1, [EVENT])
        for (patience, seconds), is_fast in cases.items():
            size = client_module.BatchSize(5000)
            size.bytes = len(batch.body)
            sender = client_module.Sender("http://localhost/", "producer", size, patience)
            clock = mock.patch.object(client_module.time, "monotonic", side_effect=[5, 5 + seconds])
            with self.subTest((patience, seconds)), clock:
                with mock.patch.object(sender, "_post", return_value=answer):
                    sender.post_batch(batch)
                self.assertEqual(size.bytes > len(batch.body), is_fast)

    def test_a_server_that_takes_its_time_is_sent_larger_batches(self):
        def answer(_number, body):
            time.sleep(1.1)
            return 200, {}, b'{"accepted": %d, "rejected": []}' % body.count(b"\n")

        self.path("events.jsonl", (EVENT + b"\n") * (40_000 // len(EVENT)))
        with Recorder(options=[BATCHES], post=answer) as server:
            self.client("--url", server.url)
        sizes = [len(body) for _, body in server.posts]
        self.assertGreater(max(sizes), client_module.SMALLEST_BATCH_BYTES)

    def test_a_server_that_falls_silent_is_named_when_it_is_no_short_pause(self):
        for steps, is_said in ((3, False), (5, True)):
            patience = client_module.Patience("http://server/", 30)
            patience.succeeded()
            future = concurrent.futures.Future()
            waits = []

            def wait(futures, _seconds, real=concurrent.futures.wait):
                if len(waits) == steps:
                    future.set_result("an answer")
                waits.append(futures)
                return real(futures, 0)

            waiting = mock.patch.object(client_module.concurrent.futures, "wait", wait)
            with self.subTest(steps), waiting, captured() as printed:
                self.assertEqual(patience.wait_for(future), "an answer")
                said = "Waiting for http://server/: no answer yet.\nhttp://server/ answers.\n"
                self.assertEqual(printed(), said * is_said)

    def test_it_gives_up_so_long_after_the_last_success(self):
        steps = collections.Counter()  # {future: how often it was waited for}
        is_refused = threading.Event()

        def answer(_count, body):
            if body.strip() == b"4":
                return 503, {}, b'{"error": "full"}'
            return success

        def fail(patience, failure, real=client_module.Patience.failed):
            real(patience, failure)
            is_refused.set()

        def wait(futures, seconds, real=concurrent.futures.wait):
            """Wait two steps in vain for what succeeds, and all steps for what does not."""
            self.assertEqual(seconds, client_module.STEP_SECONDS)
            [future] = futures
            steps[future] += 1
            if steps[future] > 2:
                wait_until(lambda: future.done() or is_refused.is_set(), "it is answered")
                return real(futures, 0)
            return real([], 0)._replace(done=[])

        self.path("events.jsonl", b"1\n2\n3\n4\n")
        for case, options, success in (
            ("batches", BATCHES, (200, {}, b'{"accepted": 1, "rejected": []}')),
            ("single events", (404, {}, b""), (200, {}, b'{"message": ""}')),
        ):
            steps.clear()
            is_refused.clear()
            with (
                self.subTest(case),
                Recorder(options=[options], post=answer) as server,
                mock.patch.object(client_module, "CONCURRENT_REQUESTS", 1),
                mock.patch.object(client_module.Patience, "failed", fail),
                mock.patch.object(client_module.concurrent.futures, "wait", wait),
                captured() as printed,
            ):
                arguments = [self.path("events.jsonl"), "--url", server.url, "--batch-size", 1]
                status = self.run_here(*arguments, "--give-up-after", 2.5, "--restart")
                self.assertEqual(status, 1)
                self.assertIn("Gave up after 2.5 s", printed())
                self.assertIn("status 503: full", printed())
                self.assertTrue(printed().endswith("\nDelivery is unknown from line 4 on.\n"))
                self.assertEqual(set(steps.values()), {3})

    def test_whatever_succeeds_keeps_it_from_giving_up(self):
        waiting_for = list("23456")

        def answer(_count, body):
            line = body.decode().strip()
            if line != "1":
                time.sleep(1)
                waiting_for.remove(line)
            elif waiting_for:  # it is refused until the others have succeeded, one after the other
                return 503, {}, b""
            return success

        success = 200, {}, b'{"accepted": 1, "rejected": []}'
        self.path("events.jsonl", b"1\n2\n3\n4\n5\n6\n")
        with Recorder(options=[BATCHES], post=answer) as server:
            arguments = ("--url", server.url, "--batch-size", 1, "--give-up-after", 4)
            patch = "client.CONCURRENT_REQUESTS = 2"
            _, output, errors = self.run_client(*arguments, patch=patch)
        self.assertIn("6 events accepted", output, errors)

    def test_a_server_that_dribbles_is_not_waited_for_without_end(self):
        for method in (b"OPTIONS", b"POST"):
            with self.subTest(method), dribbling(method) as url:
                self.path("events.jsonl", EVENT)
                begun = time.monotonic()
                _, errors = self.client("--url", url, "--give-up-after", 0, "--restart", status=1)
                self.assertIn("Gave up after 0 s", errors)
                self.assertLess(time.monotonic() - begun, 20)

    def test_a_stopped_client_does_not_count_the_time_that_it_stood_still(self):
        seen = threading.Event()

        def answer(_count, _body):
            seen.set()
            time.sleep(3)
            return 200, {}, b'{"accepted": 1, "rejected": []}'

        self.path("events.jsonl", EVENT)
        with Recorder(options=[BATCHES], post=answer) as server:
            client = self.start("client.py", "--url", server.url, "--give-up-after", "1")
            seen.wait(10)
            client.send_signal(signal.SIGSTOP)
            time.sleep(2.5)
            client.send_signal(signal.SIGCONT)
            output, errors = client.communicate(timeout=20)
            self.assertIn("1 events accepted", output, errors)

    def test_a_wrong_secret_stops_it_with_the_words_of_the_server(self):
        secret = {"EVENTS_AUTHORIZATION": "Bearer s\u00e9cret"}
        server = Server(self, **secret)
        write_events(self.path("events.jsonl"), 3)
        for case, wrong in {
            "none": {},
            "a blank": {"EVENTS_AUTHORIZATION": " "},
            "another": {"EVENTS_AUTHORIZATION": "other"},
        }.items():
            with self.subTest(case):
                _, errors = self.client("--url", server.url, status=1, **wrong)
                words = (
                    "status 401: the Authorization header is missing or wrong. "
                    "Set EVENTS_AUTHORIZATION"
                )
                self.assertIn(words, errors)
                self.assertNotIn("other", errors)
        self.client("--url", server.url, **secret)
        self.assertEqual(len(ids_in(server.log)), 3)

    def test_blanks_around_the_secret_are_not_sent(self):
        self.path("events.jsonl", EVENT)
        for secret, sent in (("\t a b \t", "a b"), (" \t", None), ("", None)):
            with self.subTest(secret), Recorder(
                options=[BATCHES],
                post=lambda count, body: (200, {}, b'{"accepted": 1, "rejected": []}'),
            ) as server:
                self.client("--url", server.url, EVENTS_AUTHORIZATION=secret)
                self.assertEqual([headers["Authorization"] for headers, _ in server.posts], [sent])

    def test_a_server_of_single_events_is_sent_one_at_a_time(self):
        def answer(_count, body):
            return (
                (refused, {}, b'{"error": "no"}')
                if b"bad" in body
                else (200, {}, b'{"message": "Event received"}')
            )

        for options, refused in ((404, 400), (405, 413), (501, 422), (200, 400)):
            with self.subTest(options=options), Recorder(
                options=[(options, {}, b"")], post=answer
            ) as server:
                self.path(
                    "events.jsonl",
                    EVENT + b"\n\n" + EVENT.replace(b"user1", b"bad") + b"\r\n" + EVENT,
                )
                output, errors = self.client("--url", server.url, "--batch-size", 3, status=1)
                self.assertIn("2 events accepted, 1 rejected", output)
                self.assertIn("events.jsonl:3: no\n", errors)
                self.assertEqual(
                    [
                        (headers["Content-Type"], headers["Sequence"], json.loads(body)["userId"])
                        for headers, body in sorted(
                            server.posts, key=lambda sent: sent[0]["Sequence"]
                        )
                    ],
                    [
                        ("application/json", sequence, user)
                        for sequence, user in (("1", "user1"), ("3", "bad"), ("4", "user1"))
                    ],
                )
                self.assertEqual(len({headers["Producer-Id"] for headers, _ in server.posts}), 1)

    def test_a_line_too_long_for_a_batch_is_rejected_by_a_server_of_single_events(self):
        def answer(_count, body):
            try:
                json.loads(body)
            except ValueError:
                return 413, {}, b'{"error": "too long"}'
            return 200, {}, b'{"message": "Event received"}'

        long = EVENT + b" " * 600_000  # JSON, if it were sent whole or cut among the blanks
        self.path("events.jsonl", long + b"\n" + EVENT)
        with Recorder(options=[(404, {}, b"")], post=answer) as server:
            output, errors = self.client("--url", server.url, status=1)
        self.assertIn("1 events accepted, 1 rejected", output)
        self.assertIn("events.jsonl:1: too long\n", errors)
        self.assertEqual(self.rejected_files(), [long[: 512 * 1024 - 4] + b"...\n"])
        self.assertLessEqual(max(len(body) for _, body in server.posts), 512 * 1024)

    def test_a_page_of_somebody_else_refuses_no_single_event(self):
        page = {"Content-Type": "text/html"}
        answers = {
            "a page": (400, page, b"<h1>400 Bad Request</h1>"),
            "JSON that says it is a page": (413, page, b'{"error": "too long"}'),
            "JSON without an error": (422, {}, b'{"detail": "wrong"}'),
            "an error that is no text": (400, {}, b'{"error": 400}'),
            "nothing": (400, {}, b""),
        }
        self.path("events.jsonl", EVENT)
        producers = set()
        for case, answer in answers.items():
            single = Recorder(options=[(404, {}, b"")], post=lambda *_: answer)
            with self.subTest(case), single as server:
                _, errors = self.client("--url", server.url, status=1)
                self.assertIn(f"answered with status {answer[0]}", errors)
                self.assertIn("\nDelivery is unknown from line 1 on.\n", errors)
                self.assertEqual((len(server.posts), self.rejected_files()), (1, []))
                producers.add(server.posts[0][0]["Producer-Id"])
        self.assertEqual(producers, {self.producer_id()})

    FULL = b'{"accepted": 2, "rejected": [{"line": 2, "error": "e"}]}'

    def assertTriedAgain(self, answers):
        """Check that a batch with each of {case: answer} is sent again under the same id, four of
        them in a run."""
        cases = list(answers)
        for group in [cases[first : first + 4] for first in range(0, len(cases), 4)]:
            now = [answers[case] for case in group] + [(200, {}, self.FULL)]
            with self.subTest(", ".join(group)), Recorder(
                options=[(503, {}, b""), None, BATCHES], post=lambda count, body: now[count]
            ) as server:
                self.path("events.jsonl", (EVENT + b"\n") * 3 + b"\n")
                output, errors = self.client("--url", server.url, status=1)
                self.assertIn("2 events accepted, 1 rejected", output)
                self.assertIn("events.jsonl:2: e\n", errors)
                self.assertEqual(len(server.posts), len(now))
                self.assertEqual(
                    len(
                        {
                            (headers["Producer-Id"], headers["Sequence"], body)
                            for headers, body in server.posts
                        }
                    ),
                    1,
                )

    def test_a_batch_without_a_final_status_is_tried_again_under_the_same_id(self):
        self.assertTriedAgain(
            {
                "500": (500, {}, b"oops"),
                "503 with Retry-After": (503, {"Retry-After": "1"}, b""),
                "507": (507, {}, b"{}"),
                "429": (429, {}, b""),
                "201": (201, {}, self.FULL),
                "a cut connection": None,
                "501": (501, {}, b""),
                "502": (502, {}, b""),
                "malformed chunks": (200, {"Transfer-Encoding": "chunked"}, self.FULL),
            }
        )

    def test_a_batch_without_a_complete_answer_is_tried_again_under_the_same_id(self):
        def rejected(accepted, *lines):
            entries = ", ".join(f'{{"line": {line}, "error": "e"}}' for line in lines)
            return f'{{"accepted": {accepted}, "rejected": [{entries}]}}'.encode()

        self.assertTriedAgain(
            {
                case: (200, {}, body)
                for case, body in {
                    "nothing": b"",
                    "HTML": b"<html>",
                    "an array": b"[]",
                    "nested too deep": b"[" * 100_000,
                    "no rejected": b'{"accepted": 3}',
                    "too few accepted": rejected(1),
                    "an endless line number": rejected(2, "1e999"),
                    "a fraction for a line number": rejected(2, "2.0"),
                    "an empty line rejected": rejected(2, 4),
                    "a line behind the batch": rejected(2, 9),
                    "a line twice": rejected(1, 2, 2),
                    "no accepted": b'{"rejected": []}',
                    "a line twice, one too many": rejected(2, 2, 2),
                    "a negative number accepted": rejected(-1, 1, 2, 3, 4),
                }.items()
            }
        )

    def test_fast_answers_alone_let_batches_grow(self):
        def accept(_number, body):
            lengths.append(len(body))
            return 200, {}, b'{"accepted": %d, "rejected": []}' % body.count(b"\n")

        self.path("events.jsonl", (EVENT + b"\n") * 3000)
        first = client_module.SMALLEST_BATCH_BYTES
        for share, grow in ((0, False), (1, True)):
            lengths = []
            with self.subTest(share), Recorder(options=[BATCHES], post=accept) as server:
                arguments = ("--url", server.url)
                run = self.run_client(*arguments, patch=f"client.FAST_SHARE = {share}")
                self.assertEqual(run[0], 0, run[2])
                self.assertLessEqual(lengths[0], first)
                self.assertEqual(max(lengths) > first, grow, lengths)

    def test_a_redirect_or_a_refused_batch_is_no_delivery(self):
        elsewhere = {"Location": "/elsewhere"}
        for status, headers, advice in (
            (301, elsewhere, ""),
            (302, elsewhere, ""),
            (303, {}, ""),
            (403, {}, ""),
            (413, {}, " Lower --batch-size."),
        ):
            with self.subTest(status=status), Recorder(
                options=[BATCHES], post=lambda count, body: (status, headers, b'{"error": "words"}')
            ) as server:
                self.path("events.jsonl", EVENT)
                _, errors = self.client("--url", server.url, "--restart", status=1)
                self.assertIn(
                    f"answered with status {status}: words.{advice}\n"
                    "Delivery is unknown from line 1 on.\n",
                    errors,
                )
                self.assertEqual(len(server.posts), 1)

    ANSWERS = {
        "1": (200, {}, b'{"accepted": 1, "rejected": []}'),
        "2": (401, {}, b""),
        "3": (503, {}, b""),
        "4": (200, {}, b'{"accepted": 1, "rejected": []}'),
    }  # to the user of each line

    def answer_to(self, _count, body):
        """Return the answer to a line, or cut off a client that ended in the midst."""
        if not body:
            return None
        return self.ANSWERS[json.loads(body)["userId"]]

    def test_a_refusal_is_one_also_if_its_text_is_cut(self):
        heads = {
            "the length is too large": b"Content-Length: 9000\r\n\r\nwho",
            "a chunk is missing": b"Transfer-Encoding: chunked\r\n\r\n3\r\nwho",
            "the connection is reset": b"\r\nwho",
        }
        self.path("events.jsonl", EVENT + b"\n")
        for case, head in heads.items():

            def refuse(wire, _head, head=head):
                wire.sendall(b"HTTP/1.1 401 Unauthorized\r\n" + head)
                reset_at_close = struct.pack("ii", 1, 0)
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_at_close)

            with self.subTest(case), RawServer(refuse) as server:
                arguments = ("--url", server.url, "--give-up-after", 5)
                status, _, errors = self.run_client(*arguments)
                self.assertEqual((status, server.posts), (1, 1), errors)
                self.assertIn("answered with status 401", errors)

    def test_a_refusal_ends_the_run_with_the_first_line_that_is_unknown(self):
        self.path("events.jsonl", "".join(f'{{"userId": "{user}"}}\n' for user in self.ANSWERS))
        for case, options in (("batches", BATCHES), ("single events", (404, {}, b""))):
            recorder = Recorder(options=[options], post=self.answer_to)
            with self.subTest(case), recorder as server:
                _, errors = self.client(
                    "--url", server.url, "--batch-size", 1, "--give-up-after", 1000, status=1
                )
                self.assertTrue(errors.endswith("\nDelivery is unknown from line 2 on.\n"), errors)
