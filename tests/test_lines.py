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


def is_beginning(batch):
    """Tell whether a batch holds the beginning of a line that is too long."""
    return batch.body.endswith(b"...\n")


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

    ODD_LINES = [
        b"",
        b" \t",
        b"\r",
        b"x",
        b"x" * 7,
        b"\x85\x0b",
        "é\u2028".encode(),
        b"x" * 31,
        b"x" * 63,
        b"x" * 64,
        b"y" * 200,
    ]

    def test_batches_are_the_lines_of_the_file(self):
        chance = random.Random(5)
        sizes = {"BATCH_BYTES": 64, "SMALLEST_BATCH_BYTES": 64}
        for _ in range(300):
            lines = chance.choices(self.ODD_LINES, k=chance.randrange(60))
            text = b"\n".join(lines) + chance.choice([b"", b"\n"])
            events = self.path("events.jsonl", text)
            size = chance.choice([1, 2, 5, 100])
            reading = chance.choice([1, 7, 64, 1000])
            with (
                unittest.mock.patch.multiple(client_module, **sizes, READ_BYTES=reading),
                opened_delivery(events, restart=True) as (source, _),
            ):
                batches = list(source.batches(1, client_module.BatchSize(size)))
                self.assertTrue(source.is_unchanged())
            self.assertBatchesOf(text, batches)
            self.assertBatchesAreFull(batches, size)

    def assertBatchesOf(self, text, batches):
        """Assert that batches of at most 64 bytes hold each line of text, or its beginning."""
        lines = text.split(b"\n")
        if not lines[-1]:  # it is behind the last line end
            lines.pop()
        sendable = []
        for line in lines:
            if len(line) > 63:
                line = line[:60] + b"..."
            sendable.append(line)
        ends = list(itertools.accumulate(len(line) + 1 for line in lines))
        sent = []
        for batch in batches:
            self.assertEqual(batch.first, len(sent) + 1)
            body = batch.body.split(b"\n")
            self.assertEqual(body.pop(), b"")
            self.assertEqual(batch.lines, len(body))
            self.assertEqual(batch.events, sum(bool(line.strip()) for line in body))
            sent += body
            self.assertEqual(batch.end, min(ends[len(sent) - 1], len(text)))
        self.assertEqual(sent, sendable)

    def assertBatchesAreFull(self, batches, size):
        """Assert that none is larger than it may be, and that none could have been larger."""
        for batch in batches:
            self.assertLessEqual(batch.lines, size)
            self.assertLessEqual(len(batch.body), 64)
            if is_beginning(batch):
                self.assertEqual(batch.lines, 1)
        for batch, following in itertools.pairwise(batches):
            if batch.lines < size and not is_beginning(batch) and not is_beginning(following):
                next_line_end = following.body.index(b"\n") + 1
                self.assertGreater(len(batch.body) + next_line_end, 64)

    BEGINNING_BYTES = 512 * 1024 - 4  # of a line that is too long, before "..." and LF

    def test_each_line_of_an_odd_file_is_delivered_or_rejected(self):
        server = Server(self)
        huge = b'{"userId": "' + b"x" * 1_600_000 + b'"}'
        sent = huge[: self.BEGINNING_BYTES] + b"..."
        bom = b"\xef\xbb\xbf" + EVENT
        long = EVENT[:-1] + b', "pad": "' + b"x" * 100_000 + b'"}'
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
                [b"x" * self.BEGINNING_BYTES + b"..."],
            ),
            "a line of blanks": (
                b" " * 600_000 + b"\n" + EVENT,
                1,
                [b" " * self.BEGINNING_BYTES + b"..."],
            ),
            "CR for a line end": (EVENT + b"\r" + EVENT, 0, [EVENT + b"\r" + EVENT]),
        }
        for case, (content, accepted, rejected) in files.items():
            with self.subTest(case):
                for path in self.directory.glob("events.jsonl*"):
                    path.unlink()
                self.path("events.jsonl", content)
                status = 0
                rejected_files = []
                if rejected:
                    status = 1
                    rejected_files = [b"\n".join(rejected) + b"\n"]
                output, _ = self.client("--url", server.url, status=status)
                self.assertIn(f"{accepted} events accepted, {len(rejected)} rejected", output)
                self.assertEqual(self.rejected_files(), rejected_files)
        self.processor()

    def test_reading_ahead_is_bounded(self):
        first = EVENT.replace(b"user1", b"first")
        attempts = []

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
        # The others waited for the first.
        self.assertLess(attempts[-1], 5 + client_module.BATCHES_AHEAD)

    def test_a_batch_is_bounded_in_bytes(self):
        def answer(_count, body):
            return 200, {}, b'{"accepted": %d, "rejected": []}' % body.count(b"\n")

        with Recorder(options=[BATCHES], post=answer) as server:
            self.client(self.path("large", (padded(60_000) + b"\n") * 30), "--url", server.url)
        self.assertLessEqual(max(len(body) for _, body in server.posts), 512 * 1024)
