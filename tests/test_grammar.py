"""What an event is."""

import os
import random
import re
import subprocess
import sys

import data_processor
import server as server_module
from tests.event_tables import INVALID_EVENTS, RESERVED, VALID_EVENTS
from tests.random_lines import random_line
from tests.tools import Server, SystemTest, patched
from tests.tools_database import empty_tables, query, setUpModule
from tests.tools_events import EVENT, TORTURE_SEED, with_id, with_value
from tests.tools_parts import captured, events_of, normal, read_lines


class Events(SystemTest):
    """The server and the processor agree on what an event is."""

    def mixed(self):
        """Return all events in a random order, and the numbers of the invalid ones."""
        mixed = [*VALID_EVENTS.values(), *INVALID_EVENTS.values()]
        random.Random(1).shuffle(mixed)
        return mixed, [
            number
            for number, event in enumerate(mixed)
            if event in INVALID_EVENTS.values()
        ]

    def test_the_server_agrees_with_the_processor_on_every_event(self):
        server = Server(self)
        revenue = "SELECT user_id, revenue FROM users_revenue ORDER BY user_id"
        for events, status in ((VALID_EVENTS, 200), (INVALID_EVENTS | RESERVED, 400)):
            for case, event in events.items():
                with self.subTest(case):
                    self.assertEqual(server.post(event)[0], status)
        self.assertIn(
            f"{len(VALID_EVENTS)} applied, 0 repeated, 0 rejected", self.processor()[0]
        )
        expected = query(revenue)
        empty_tables()
        mixed, wrong = self.mixed()
        output, errors = self.processor(
            self.path("plain", b"\n".join(mixed) + b"\n"), status=1
        )
        self.assertIn(
            f"{len(VALID_EVENTS)} applied, 0 repeated, {len(wrong)} rejected", output
        )
        starts = [sum(len(event) + 1 for event in mixed[:number]) for number in wrong]
        self.assertEqual(
            [
                int(line.split(": ")[1].removeprefix("byte "))
                for line in errors.splitlines()
            ],
            starts,
        )
        self.assertEqual(query(revenue), expected)

    def test_the_lines_of_a_batch_are_judged_one_by_one(self):
        server = Server(self)
        mixed, wrong = self.mixed()
        accepted = 0
        rejected = []
        for first in range(0, len(mixed), 8):
            _, answer = server.post(
                b"\n".join(mixed[first : first + 8]), "application/x-ndjson"
            )
            accepted += answer["accepted"]
            rejected += [first + entry["line"] - 1 for entry in answer["rejected"]]
        self.assertEqual((accepted, rejected), (len(VALID_EVENTS), wrong))

    def assertIdsInLog(self, valid, invalid):
        """Check that lines with {case: (producerId, sequence)} are applied or rejected, one by one
        and together."""

        def line(producer, sequence):
            fields = {"producerId": producer, "sequence": sequence}
            return (
                EVENT[:-1]
                + b"".join(
                    b', "%b": %b' % (name.encode(), value)
                    for name, value in fields.items()
                    if value is not None
                )
                + b"}\n"
            )

        for cases, counts in (
            (valid, "1 applied, 0 repeated, 0 rejected"),
            (invalid, "0 applied, 0 repeated, 1 rejected"),
        ):
            for case, event_id in cases.items():
                with self.subTest(case), captured() as printed:
                    empty_tables()
                    data_processor.run([str(self.path("single", line(*event_id)))])
                    self.assertIn(counts, printed())
        empty_tables()
        lines = [
            line(*event_id) for cases in (invalid, valid) for event_id in cases.values()
        ]
        output, _ = self.processor(self.path("log", b"".join(lines)), status=1)
        self.assertIn(
            f"{len(valid)} applied, 0 repeated, {len(invalid)} rejected", output
        )

    def test_an_event_id_in_a_log_must_be_valid(self):
        self.assertIdsInLog(
            {
                "sequence 1": (b'"p"', b"1"),
                "sequence 2**53 - 1": (b'"p"', b"9007199254740991"),
                "a producer of 64 characters": (b'"' + b"p" * 64 + b'"', b"1"),
                "sequence 2": (b'"q"', b"2"),
                "sequence 2**53 - 1 of another producer": (b'"q"', b"9007199254740991"),
            },
            {
                "an empty producer alone": (b'""', None),
                "sequence 0": (b'"p"', b"0"),
                "sequence 2**53": (b'"p"', b"9007199254740992"),
                "a negative sequence": (b'"p"', b"-1"),
                "a fraction": (b'"p"', b"1.0"),
                "a string for a sequence": (b'"p"', b'"1"'),
                "true for a sequence": (b'"p"', b"true"),
                "null for a sequence": (b'"p"', b"null"),
                "null for a producer": (b"null", b"1"),
                "an empty producer": (b'""', b"1"),
                "a producer of 65 characters": (b'"' + b"p" * 65 + b'"', b"1"),
                "a dot in a producer": (b'"p.p"', b"1"),
                "a NUL in a producer": (b'"\\u0000"', b"1"),
                "an array for a producer": (b"[]", b"1"),
                "a sequence alone": (None, b"3"),
                "a producer alone": (b'"p"', None),
                "another fraction": (b'"q"', b"2.0"),
                "sequence 2**53 of another producer": (b'"q"', b"9007199254740992"),
            },
        )

    def test_an_invalid_sequence_continues_no_span(self):
        lines = [with_id("q", sequence) for sequence in (2, "3.0", 2**53 - 1, 2**53)]
        output, _ = self.processor(self.path("log", "".join(lines)), status=1)
        self.assertIn("2 applied, 0 repeated, 2 rejected", output)

    def test_producers_that_alternate_have_spans_of_their_own(self):
        self.processor(
            self.path("alternating", "".join(map(with_id, "rssr", (1, 2, 3, 4))))
        )
        self.assertEqual(
            query("SELECT applied::text FROM event_producers ORDER BY producer_id"),
            [("{[1,2),[4,5)}",), ("{[2,4)}",)],
        )

    def test_lines_without_an_id_count_each_time_between_others(self):
        plain = EVENT.decode() + "\n"
        mixed = self.path(
            "mixed", plain + with_id("t", 1) + plain + plain + with_id("t", 1) + plain
        )
        self.assertIn("5 applied, 1 repeated, 0 rejected", self.processor(mixed)[0])

    def test_the_grammar_accepts_what_the_rules_accept_with_the_same_values(self):
        chance = random.Random(TORTURE_SEED)
        plain = 0
        odd = 0
        for _ in range(30_000):
            line = random_line(chance)
            with self.subTest(line=line, seed=TORTURE_SEED):
                try:
                    expected = [normal(data_processor.decode_log_line(line))]
                except ValueError:
                    expected = []
                    odd += 1
                self.assertEqual(
                    events_of(read_lines(line + b"\n")), expected
                )
                if server_module.is_plain(line + b"\n"):
                    plain += 1
                    server_module.check_event(line)
        self.assertGreater(min(plain, odd), 3000)

    def test_no_line_is_read_otherwise_for_its_neighbours(self):
        chance = random.Random(TORTURE_SEED)
        for _ in range(2000):
            lines = [random_line(chance) + b"\n" for _ in range(chance.randrange(1, 8))]
            alone = []
            rejected = []
            start = 0
            for number, line in enumerate(lines):
                found = read_lines(line, start)
                alone += [(number, event) for event in events_of(found)]
                rejected += found.rejected
                start += len(line)
            together = read_lines(b"".join(lines))
            rows = events_of(together)
            self.assertEqual(list(zip(together.numbers, rows)), alone, TORTURE_SEED)
            self.assertEqual(together.rejected, rejected, TORTURE_SEED)

    def test_the_encodings_of_windows_tools_are_called_by_their_names(self):
        text = EVENT.decode()
        cases = {
            "UTF-8 with a mark": ("utf-8-sig", "byte order mark (BOM)"),
            "UTF-16 with a mark": ("utf-16", "not UTF-16"),
            "UTF-16, little-endian": ("utf-16-le", "not UTF-16"),
            "UTF-16, big-endian": ("utf-16-be", "not UTF-16"),
        }
        for case, (encoding, words) in cases.items():
            with self.subTest(case), self.assertRaisesRegex(ValueError, re.escape(words)):
                server_module.check_event(text.encode(encoding))

    def test_a_value_that_is_too_wide_says_how_it_must_be_written(self):
        words = "below 10^18, written with at most 18 digits before the point"
        for value in ("0e999", "0e18", "1e18", "-1" + "0" * 18):
            with self.subTest(value), self.assertRaisesRegex(
                ValueError, re.escape(words)
            ):
                server_module.check_event(with_value(value))

    def test_bad_lines_cost_their_messages_alone(self):
        log = self.path("log", b"x\n" * 300_000)
        limit = (
            f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({2**29}, {2**29}))"
        )
        arguments, environment = patched("data_processor", limit)
        run = subprocess.run(
            [sys.executable, *arguments, log],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        self.assertIn(
            "0 applied, 0 repeated, 300,000 rejected", run.stdout, run.stderr[-1000:]
        )
        self.assertEqual(run.stderr.count("\n"), data_processor.NAMED_LINES + 1)

    def test_a_line_that_begins_with_many_blanks_is_too_long(self):
        log = self.path(
            "log", EVENT + b"\n" + b" " * 300_000 + EVENT + b"\n" + EVENT + b"\n"
        )
        output, errors = self.processor(log, status=1)
        self.assertIn("2 applied, 0 repeated, 1 rejected", output)
        self.assertIn(
            f"byte {len(EVENT) + 1}: an event must be at most 64 KiB long", errors
        )
