"""What the processor reads: plain logs, compressed ones, unfinished lines."""

import bz2
import contextlib
import fcntl
import gzip
import itertools
import json
import lzma
import unittest
import unittest.mock
from pathlib import Path
from typing import NamedTuple

import data_processor
from tests.tools import SystemTest
from tests.tools_database import empty_tables, setUpModule
from tests.tools_events import EVENT, oracle, with_id, write_events
from tests.tools_parts import append, apply, captured, opened_follower, opened_log, poll


class TornLog(NamedTuple):
    """A log whose last line may be unfinished."""

    path: Path
    user: str  # whose events it holds
    kept: bytes  # what is left of it once a server has gone on with it
    events: int  # how many events are left


def is_event(text):
    """Tell whether text is a whole event, judged by Python's own parser."""
    try:
        return set(json.loads(text)) >= {"userId", "name", "value"}
    except (ValueError, TypeError):
        return False


class Logs(SystemTest):
    """Each line of a log is applied or rejected, whatever stands beside it."""

    def test_each_line_of_a_plain_log_that_grows_is_applied_once(self):
        logs = [write_events(self.path(f"plain{seed}"), 100, seed) for seed in (1, 2)]
        for appended in (False, True):
            for log in logs:
                if appended:
                    log.write_bytes(
                        log.read_bytes() + write_events(self.path("more"), 50, seed=3).read_bytes()
                    )
                self.processor(log)
                self.processor(log)
            self.assertRevenue(oracle(*logs))

    def test_an_edited_plain_log_has_its_lines_without_an_id_refused(self):
        log = write_events(self.path("plain.jsonl"), 3)
        first, second, third = log.read_bytes().splitlines(keepends=True)
        self.processor(log)
        expected = oracle(log)
        log.write_bytes(
            first + third + second.replace(b"user", b"loser") + with_id("p", 1, "new", 5).encode()
        )
        _, errors = self.processor(log, status=1)
        self.assertIn(
            f"plain.jsonl: byte {len(first)}: an event without producerId and sequence", errors
        )
        self.assertRevenue(expected | {"new": 5})
        log.write_bytes(first * 50 + log.read_bytes())  # whatever is shifted behind the position
        self.processor(log, status=1)
        self.assertRevenue(expected | {"new": 5})

    def test_an_edited_plain_log_that_is_put_right_is_known_again(self):
        log = write_events(self.path("plain.jsonl"), 3)
        content = log.read_bytes()
        self.processor(log)
        log.write_bytes(content.splitlines(keepends=True)[0] + content + EVENT + b"\n")
        for _ in range(2):
            _, errors = self.processor(log, status=1)
            self.assertEqual(errors.count("an event without producerId and sequence"), 5)
        log.write_bytes(content + EVENT + b"\n")
        self.processor(log)
        self.assertRevenue(oracle(log))

    def test_the_processor_applies_the_other_lines_of_a_log_with_bad_ones(self):
        lines = [
            EVENT + b"\n",
            b'{"userId": "user1"}\n',
            b"\xff\n",
            b"\n",
            EVENT + b"\n",
            b"x" * 300_000 + b"\n",
            EVENT + b"\n",
            EVENT[:-1],
        ]
        log = self.path("server-events.jsonl", b"".join(lines))
        output, errors = self.processor(status=1)
        self.assertEqual(
            output,
            "server-events.jsonl: 3 applied, 0 repeated, 3 rejected; "
            f"{len(EVENT) - 1} bytes of an unfinished last line left\n",
        )
        starts = [sum(map(len, lines[:i])) for i in (1, 2, 5)]
        self.assertEqual(
            [line.split(": ")[:2] for line in errors.splitlines()],
            [["server-events.jsonl", f"byte {start}"] for start in starts],
        )
        self.assertEqual(log.read_bytes(), b"".join(lines))
        self.assertEqual(self.processor()[1], "")
        self.assertRevenue({"user1": 3})

    def test_a_log_that_cannot_be_read_is_named_in_a_sentence(self):
        cases = {
            "a directory": ([self.directory], "is not a regular file"),
            "a missing log": (["missing"], "missing: No such file"),
            "the default log": (
                [],
                "server-events.jsonl: No such file or directory; start server.py",
            ),
        }
        for case, (arguments, words) in cases.items():
            with self.subTest(case):
                self.assertIn(words, self.processor(*arguments, status=1)[1])

    def test_a_compressed_log_is_read_when_it_is_named(self):
        content = "".join(with_id("p", n) for n in range(1, 1001)).encode()
        for ending, module in ((".1.gz", gzip), (".2.bz2", bz2), (".3.xz", lzma)):
            with self.subTest(ending):
                empty_tables()
                log = self.path("log" + ending, module.compress(content))
                self.assertIn("1,000 applied", self.processor(log)[0])
                self.assertIn("agree on 1 users", self.processor("--verify", log)[0])
                log.write_bytes(log.read_bytes()[:-20])
                self.assertIn(f"{log}: cannot be decompressed", self.processor(log, status=1)[1])
        log = self.path("other", with_id("q", 1))
        named = self.path("other.1.gz", gzip.compress(content))
        self.assertEqual(self.processor(log, named)[1], "", "it is not said to be left alone")
        _, errors = self.processor(self.path("plain.gz", EVENT + b"\n"), status=1)
        self.assertIn("plain.gz: cannot be decompressed: Not a gzipped file", errors)

    COMPRESSED = "gz bz2 xz zst lz4 lzo lzma br z zip 7z GZ ZIP Z".split()

    def test_a_compressed_log_beside_a_named_one_is_left_alone(self):
        log = self.path("log", with_id("p", 1))
        for ending in self.COMPRESSED:
            self.path(f"log.1.{ending}", with_id(ending, 1))
        _, errors = self.processor(log)
        said = "is compressed and was not read; name it to read it."
        for ending in self.COMPRESSED:
            self.assertIn(f"{log}.1.{ending}: {said}\n", errors)
        self.assertEqual(errors.count("\n"), len(self.COMPRESSED))
        self.assertRevenue({"user1": 1})

    def test_a_log_that_cannot_be_decompressed_says_what_to_do(self):
        for ending in ("zst", "lz4", "lzo", "lzma", "br", "Z", "zip", "ZIP", "7z"):
            with self.subTest(ending):
                log = self.path(f"log.{ending}", with_id("p", 1))
                _, errors = self.processor(log, status=1)
                words = (
                    f"{log}: cannot be read: decompress it first "
                    f"(.{ending.lower()} is not among .gz, .bz2, .xz).\n"
                )
                self.assertEqual(errors, words)
                self.assertRevenue({})

    def test_a_file_that_begins_as_no_event_does_is_named(self):
        self.path("log", with_id("p", 1))
        self.path("log.2", gzip.compress(with_id("p", 2).encode()))
        self.path("log.3", '{"userId": "us')  # a torn line
        self.path("log.4", b"\0" * 100)  # what a power cut may leave of it
        self.path("log.5", b"")
        output, errors = self.processor("log", status=1)
        self.assertRegex(errors, r"^log\.2: is no log: [^\n]*\n$")
        self.assertIn("log.3: 0 applied", output)
        self.assertIn("log.4: 0 applied", output)
        self.assertRevenue({"user1": 1})

    def test_a_log_is_decompressed_whatever_the_case_of_its_ending(self):
        self.processor(self.path("log.GZ", gzip.compress(with_id("p", 1).encode())))
        self.assertRevenue({"user1": 1})

    def test_no_room_for_a_temporary_file_is_not_blamed_on_the_log(self):
        log = self.path("log.gz", gzip.compress(with_id("p", 1).encode()))
        places = {
            "a directory that is missing": (
                "import tempfile\ntempfile.tempdir = '/nowhere'",
                "/nowhere: No such file or directory",
            ),
            "a full disk": (
                "import errno, tempfile\n"
                "tempfile.tempdir = '/full'\n"
                "open_file = tempfile.TemporaryFile\n"
                "def open_full(**options): return open('/dev/full', 'wb', **options)\n"
                "tempfile.TemporaryFile = open_full",
                "/full: No space left on device",
            ),
            "a disk that gets full at the end": (
                "import resource, tempfile\n"
                "tempfile.tempdir = '/tmp'\n"
                "resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))",
                "/tmp: File too large",
            ),
        }
        for place, (patch, words) in places.items():
            with self.subTest(place):
                _, errors = self.processor(log, status=1, patch=patch)
                advice = "no room for a temporary file (TMPDIR names another directory)"
                self.assertEqual(errors, f"{log}: {words}: {advice}.\n")
        self.assertRevenue({})

    def test_a_compressed_log_is_decompressed_once(self):
        log = self.path("log.gz", gzip.compress(with_id("p", 1).encode()))
        decompress = unittest.mock.Mock(side_effect=data_processor.decompress)
        with unittest.mock.patch.object(data_processor, "decompress", decompress):
            apply(log)
            self.assertEqual(decompress.call_count, 1)
            with captured(), opened_follower(log) as follower:
                poll(follower)
                poll(follower)
            self.assertEqual(decompress.call_count, 2)
        self.assertRevenue({"user1": 1})

    TAILS = {
        "NULs": b"\0" * 10,
        "a line of NULs": b"\0" * 10 + b"\n",
        "an empty line": b"\n",
        "empty lines": b"\n\n\n",
        "half a character": b"\xe2\x82",
        "a line with half a character": b"\xe2\x82\n",
        "half a field": b'{"userId": "user1", "na',
        "an event without a line end": EVENT,
        "an event with an id without a line end": with_id("p", 9).encode()[:-1],
        "a line of braces": b"}" * 5 + b"\n",
        "CR": b"\r",
        "CRLF": b"\r\n",
        "a space": b" ",
        "a line with a quote": b'"\n',
        "300 KB": b"x" * 300_000,
        "a line of 300 KB": b"x" * 300_000 + b"\n",
        "open braces": b"{" * 1000,
        "a line of UTF-16's mark": b"\xff\xfe\n",
        "two events glued": with_id("p", 9).encode()[:-1] * 2,
    }

    def test_a_last_event_without_its_line_end_counts_once_however_the_log_goes_on(self):
        ways = ("a line end", "CR LF", "a blank line", "the next event on its line", "a space")
        logs = {}  # {log: what is appended to it}
        expected = {}
        for way, has_id, begun in itertools.product(ways, (True, False), (True, False)):
            user = f"{way}, {has_id}, {begun}"
            plain = EVENT.replace(b"user1", user.encode())
            last = plain
            if has_id:
                last = with_id(f"p{len(logs)}", 1, user).encode()[:-1]
            if not has_id and not begun and way not in ("a line end", "a blank line"):
                continue  # with another first line it is another log
            content = last
            expected[user] = 2
            if begun:
                content = plain + b"\n" + last
                expected[user] = 3
            elif way == "the next event on its line":
                expected[user] = 1  # the first line of another log, and no event
            rest = {
                "a line end": b"\n" + plain,
                "CR LF": b"\r\n" + plain + b"\n",
                "a blank line": b"\n\n" + plain,
                "the next event on its line": plain + b"\n",
                "a space": b" \n" + plain,
            }
            logs[self.path(f"log{len(logs)}", content)] = rest[way]
        for _ in range(2):
            self.assertNotIn("unfinished", self.processor(*logs)[0])
        for log, rest in logs.items():
            log.write_bytes(log.read_bytes() + rest)
        _, errors = self.processor(*logs, status=1)
        self.assertEqual(errors.count("\n"), 1, "of the glued lines, one begins another log")
        self.processor(*logs)
        self.assertRevenue(expected)

    def torn_logs(self):
        """Return logs that were cut at any byte of their last line, or have an odd tail."""
        lines = b"".join(with_id("p", n).encode() for n in range(1, 6))
        shapes = [lines[:end] for end in range(len(lines) * 4 // 5, len(lines) + 1)]
        shapes += [lines + tail for tail in self.TAILS.values()]
        logs = []
        for number, shape in enumerate(shapes):
            user = b"user%d" % number
            content = shape.replace(b'"user1', b'"' + user).replace(b'"p"', b'"p%d"' % number)
            whole, _, last = content.rpartition(b"\n")
            kept = whole + b"\n"
            if is_event(last):
                kept = content + b"\n"
            events = sum(map(is_event, kept.split(b"\n")))
            path = self.path(f"torn{number}", content)
            logs.append(TornLog(path, user.decode(), kept, events))
        return logs

    def test_an_unfinished_last_line_harms_no_other_line(self):
        logs = self.torn_logs()
        self.assertGreater(len(logs), 100)
        paths = [log.path for log in logs]
        self.processor(*paths, status=1)  # of the tails, some are lines without an event
        self.assertRevenue({log.user: log.events for log in logs})
        for number, log in enumerate(logs):
            new = with_id(f"new{number}", 1, log.user).encode()
            with self.subTest(log.path.read_bytes()[-50:]):
                with opened_log(log.path) as writer, captured():
                    append(writer, new)
                self.assertEqual(log.path.read_bytes(), log.kept + new)
        self.processor(*paths)
        self.assertRevenue({log.user: log.events + 1 for log in logs})

    def test_no_line_is_taken_while_a_server_may_take_it_back(self):
        log = self.path("log", with_id("p", 1))
        with open(log, "ab") as server:
            fcntl.flock(server, fcntl.LOCK_EX)
            server.write(with_id("p", 2).encode())
            server.flush()
            reader = data_processor.LogReader(str(log))
            with contextlib.closing(reader), self.assertRaises(BlockingIOError):
                reader.find_end(0.1)
            server.truncate(len(with_id("p", 1)))
        self.processor(log)
        self.assertRevenue({"user1": 1})

    def test_a_new_log_with_the_identity_of_a_removed_one_is_read(self):
        applier = data_processor.Applier(data_processor.Database(), [str(self.path("log"))])
        old = self.path("log.1", with_id("p", 1) + with_id("p", 2))
        self.path("log", with_id("q", 1))
        with contextlib.closing(applier.database), captured():
            applier.look()
            old.write_text(with_id("r", 1))  # as if the file system had given the number again
            applier.look()
        self.assertRevenue({"user1": 4})

    def test_a_log_that_was_cut_has_its_new_bad_lines_named(self):
        log = self.path("log", "bad one\n" * 50 + with_id("p", 1))
        with captured() as printed, opened_follower(log) as follower:
            poll(follower)
            before = len(printed())
            log.write_text("bad two\n" + with_id("p", 2), encoding="utf-8")
            poll(follower)
            self.assertIn("byte 0: not JSON", printed()[before:])
