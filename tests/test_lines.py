"""Each line of a file is delivered or rejected."""

import itertools
import random
import re
import unittest
import unittest.mock
from pathlib import Path

import client as client_module
from tests.tools import Server
from tests.tools_client import ClientTest
from tests.tools_database import setUpModule
from tests.tools_events import EVENT, ids_in, padded
from tests.tools_http import BATCHES, Recorder
from tests.tools_parts import opened_delivery


class Lines(ClientTest):
    """Each line of a file is delivered or rejected, and kept when it is rejected."""

    def test_the_client_delivers_the_other_lines_of_a_file_with_bad_ones(self):
        server = Server(self)
        bad = [b"nonsense\n", b'{"userId": "user1", "name": "add_revenue", "value": "1"}\n']
        events = self.path(
            "events.jsonl", EVENT + b"\n" + bad[0] + b"\n" + EVENT + b"\r\n" + bad[1] + EVENT
        )
        output, errors = self.client("--url", server.url, "--batch-size", 2, status=1)
        self.assertIn("3 events accepted, 2 rejected", output)
        self.assertIn("events.jsonl:2: not JSON", errors)
        self.assertIn("events.jsonl:5: value must be a number\n", errors)
        _, rejected = sorted(self.directory.glob("events.jsonl*"))
        self.assertEqual(rejected.read_bytes(), b"".join(bad))
        self.assertEqual(sorted(sequence for _, sequence in ids_in(server.log)), [1, 4, 6])
        self.assertEqual(events.read_bytes().count(b"\n"), 5)

    def test_the_rejected_lines_of_an_earlier_delivery_are_kept(self):
        server = Server(self)
        self.path("events.jsonl", b"monday\n" + EVENT)
        _, errors = self.client("--url", server.url, status=1)
        name = re.search(
            r"The rejected lines are in (\S+); mend them, then send that file\.\n$", errors
        )[1]
        self.assertEqual(Path(name).read_bytes(), b"monday\n")
        self.path("events.jsonl", b"tuesday\n" + EVENT)
        self.client("--url", server.url, status=1)
        self.assertEqual(self.rejected_files(), [b"monday\n", b"tuesday\n"])

    def test_a_delivery_is_kept_until_its_results_are_safe(self):
        seen = []

        def answer(_count, _body):
            seen.append(self.state.exists())
            return 200, {}, b'{"accepted": 1, "rejected": [{"line": 2, "error": "wrong"}]}'

        self.path("events.jsonl", (EVENT + b"\n") * 40)
        producer = self.interrupted()
        with Recorder(options=[BATCHES], post=answer) as server:
            arguments = ["--url", server.url, "--batch-size", "2"]
            self.path(f"events.jsonl.rejected-{producer}").mkdir()
            self.client(*arguments, status=1)
            self.assertTrue(self.state.exists(), "forgotten before the rejected lines were kept")
            self.path(f"events.jsonl.rejected-{producer}").rmdir()
            seen.clear()
            output, _ = self.client(*arguments, status=1)
            self.assertIn("20 events accepted, 20 rejected", output)
            self.assertFalse(self.state.exists())
        self.assertEqual(seen, [True] * 20)
        self.assertEqual({headers["Producer-Id"] for headers, _ in server.posts}, {producer})

    def test_batches_are_the_lines_of_the_file(self):
        chance = random.Random(5)
        lines = [
            b"",
            b" \t",
            b"\r",
            b"x",
            b"x" * 7,
            b"\x85\x0b",
            "é\u2028".encode(),
            b"x" * 63,
            b"x" * 64,
            b"y" * 200,
        ]
        for _ in range(300):
            text = b"\n".join(chance.choices(lines, k=chance.randrange(60))) + chance.choice(
                [b"", b"\n"]
            )
            events, size = self.path("events.jsonl", text), chance.choice([1, 2, 5, 100])
            reading = chance.choice([1, 7, 64, 1000])
            with unittest.mock.patch.multiple(
                client_module, BATCH_BYTES=64, READ_BYTES=reading
            ), opened_delivery(events, restart=True) as (source, _):
                batches = list(source.batches(1, client_module.BatchSize(size)))
                self.assertTrue(source.is_unchanged())
            expected = (
                text.split(b"\n")[:-1]
                if text.endswith(b"\n")
                else text.split(b"\n") if text else []
            )
            sent = [
                (number, line)
                for batch in batches
                for number, line in enumerate(batch.body.split(b"\n")[:-1], batch.first)
            ]
            long = {number for number, line in enumerate(expected, 1) if len(line) > 63}
            self.assertEqual(
                sent,
                [
                    (number, line[:60] + b"..." if number in long else line)
                    for number, line in enumerate(expected, 1)
                ],
            )
            ends = list(itertools.accumulate(len(line) + 1 for line in expected))
            self.assertEqual(
                [batch.end for batch in batches],
                [min(ends[batch.first + batch.lines - 2], len(text)) for batch in batches],
            )
            self.assertEqual(
                [batch.lines for batch in batches if batch.first in long], [1] * len(long)
            )
            self.assertEqual(
                sum(batch.events for batch in batches), sum(bool(line.strip()) for _, line in sent)
            )
            self.assertLessEqual(max((batch.lines for batch in batches), default=0), size)
            self.assertLessEqual(max((len(batch.body) for batch in batches), default=0), 64)
            for batch, following in itertools.pairwise(batches):  # none could have been larger
                self.assertTrue(
                    batch.first in long
                    or following.first in long
                    or batch.lines == size
                    or len(batch.body) + following.body.index(b"\n") + 1 > 64
                )

    def test_each_line_of_an_odd_file_is_delivered_or_rejected(self):
        server = Server(self)
        huge = b'{"userId": "' + b"x" * 1_600_000 + b'"}'
        sent = huge[: 512 * 1024 - 4] + b"..."
        bom, long = b"\xef\xbb\xbf" + EVENT, EVENT[:-1] + b', "pad": "' + b"x" * 100_000 + b'"}'
        files = {
            "empty": (b"", 0, []),
            "empty lines": (b"\n\r\n \n", 0, []),
            "no line end": (EVENT, 1, []),
            "CRLF": (EVENT + b"\r\n", 1, []),
            "a byte order mark": (bom + b"\n" + EVENT, 1, [bom]),
            "a line larger than a batch": (huge, 0, [sent]),
            "a line larger than an event": (long, 0, [long]),
            "large lines between others": (b"\n".join([EVENT, huge, long, EVENT]), 2, [sent, long]),
            "a line of two blocks": (
                b"x" * 2 * 512 * 1024,
                0,
                [b"x" * (512 * 1024 - 4) + b"..."],
            ),
            "a line of blanks": (
                b" " * 600_000 + b"\n" + EVENT,
                1,
                [b" " * (512 * 1024 - 4) + b"..."],
            ),
            "CR for a line end": (EVENT + b"\r" + EVENT, 0, [EVENT + b"\r" + EVENT]),
        }
        for case, (content, accepted, rejected) in files.items():
            with self.subTest(case):
                for path in self.directory.glob("events.jsonl*"):
                    path.unlink()
                self.path("events.jsonl", content)
                output, _ = self.client("--url", server.url, status=1 if rejected else 0)
                self.assertIn(f"{accepted} events accepted, {len(rejected)} rejected", output)
                self.assertEqual(
                    self.rejected_files(), [b"\n".join(rejected) + b"\n"] if rejected else []
                )
        self.processor()

    def test_reading_ahead_is_bounded(self):
        first, attempts = EVENT.replace(b"user1", b"first"), []

        def answer(count, body):
            if first in body:
                attempts.append(count)
            if first in body and len(attempts) < 5:
                return 503, {}, b""
            return 200, {}, b'{"accepted": %d, "rejected": []}' % body.count(b"\n")

        with Recorder(options=[BATCHES], post=answer) as server:
            self.path("events.jsonl", first + b"\n" + (EVENT + b"\n") * 100)
            self.client("--url", server.url, "--batch-size", 1)
        self.assertEqual({body.count(b"\n") for _, body in server.posts}, {1})
        self.assertLess(
            attempts[-1], 5 + client_module.BATCHES_AHEAD
        )  # the others waited for the first

    def test_a_batch_is_bounded_in_bytes(self):
        def answer(_count, body):
            return 200, {}, b'{"accepted": %d, "rejected": []}' % body.count(b"\n")

        with Recorder(options=[BATCHES], post=answer) as server:
            self.client(self.path("large", (padded(60_000) + b"\n") * 30), "--url", server.url)
        self.assertLessEqual(max(len(body) for _, body in server.posts), 512 * 1024)
