"""Several cores count what one would count, in bounded memory."""

import errno
import itertools
import os
import random
import signal
import time
import unittest
import unittest.mock
from decimal import Decimal

import data_processor
from tests.tools import SystemTest, alive, children_of, wait_until
from tests.tools_database import empty_tables, query, setUpModule
from tests.tools_events import EVENT, TORTURE_SEED, with_id
from tests.tools_parts import apply, captured, opened_reader, small_slices


class Chunks(SystemTest):
    """Each core tallies a slice of a chunk."""

    def test_every_core_tallies_a_slice_and_the_sums_are_those_of_one(self):
        log = self.path(
            "log",
            "".join(with_id(f"p{n % 3}", n, f"user{n % 7}", f"{n}.5") for n in range(1, 1001)),
        )
        expected = {
            f"user{user}": sum(Decimal(f"{n}.5") for n in range(1, 1001) if n % 7 == user)
            for user in range(7)
        }
        for cores in (1, 2, 5):
            with self.subTest(cores=cores):
                empty_tables()
                children = unittest.mock.Mock(side_effect=data_processor.TallyProcess)
                with small_slices(cores, TallyProcess=children):
                    apply(log)
                self.assertEqual(children.call_count, cores)
                self.assertRevenue(expected)

    def test_a_slice_counts_what_is_new_in_it(self):
        lines = [with_id("p", n, f"user{n % 5}", n) for n in range(1, 101)]
        others = [EVENT.decode() + "\n"] * 10 + ["bad\n", "\n"]
        everything = {
            f"user{user}": sum(n for n in range(1, 101) if n % 5 == user) for user in range(5)
        }
        everything["user1"] += 10
        for seed in range(TORTURE_SEED, TORTURE_SEED + 10):
            with self.subTest(seed=seed):
                empty_tables()
                chance = random.Random(seed)
                some = self.path("some", "".join(chance.sample(lines, chance.choice([1, 50, 99]))))
                rest = lines + others + chance.choices(lines, k=chance.choice([1, 50, 200]))
                chance.shuffle(rest)
                others_first = with_id("other", 1, value=0) + "".join(rest)
                with small_slices(chance.choice([1, 2, 3])):
                    apply(some, self.path("rest", others_first))
                self.assertRevenue(everything)

    def test_a_child_that_dies_is_no_part_of_a_sum(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))
        once = self.path("once")
        parent = os.getpid()
        steps = ("send_tally", "read_events", "add_amounts", "sums_as_json")
        for step, forever in itertools.product(steps, (False, True)):
            real = getattr(data_processor, step)

            def die(*arguments):
                if os.getpid() != parent and (forever or once.exists()):
                    once.unlink(missing_ok=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            with self.subTest(step, forever=forever), small_slices(2, ATTEMPTS=2, **{step: die}):
                empty_tables()
                once.touch()
                if forever:
                    with self.assertRaisesRegex(
                        data_processor.ChildDied, "log ended too early: out of memory"
                    ):
                        apply(log)
                    self.assertRevenue({})
                else:
                    apply(log)
                    self.assertFalse(once.exists(), "no child died")
                    self.assertRevenue({"user1": 100})

    def test_children_end_when_their_parent_is_killed(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 50_001)))
        patch = (
            "import time\n"
            "data_processor.usable_cores = lambda: 3\n"
            "data_processor.SLICE_BYTES = 1000\n"
            "tally_slice = data_processor.tally_slice\n"
            "def slow(*arguments):\n"
            "    time.sleep(1)\n"
            "    return tally_slice(*arguments)\n"
            "data_processor.tally_slice = slow"
        )
        processor = self.start("data_processor.py", log, patch=patch)
        children = wait_until(lambda: children_of(processor.pid), "it has forked")
        processor.kill()
        processor.communicate()
        wait_until(lambda: not any(map(alive, children)), "its children have ended")
        self.processor(log)
        self.assertRevenue({"user1": 50_000})

    def test_a_log_that_cannot_be_read_in_a_child_is_said(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))
        error = OSError(errno.EIO, "Input/output error")
        broken = unittest.mock.Mock(side_effect=error)
        with captured() as printed, small_slices(2, read_events=broken):
            self.assertFalse(data_processor.run([str(log)]))
            self.assertEqual(printed(), f"{log}: Input/output error.\n")

    def test_a_chunk_ends_early_rather_than_keep_too_much(self):
        repeated = 300 * with_id("p", 1)  # a span for each line
        users = "".join(with_id("p", n, f"u{n}") for n in range(1, 301))
        ids = "".join(with_id("p", n, f"{n:0100}") for n in range(1, 301))
        logs = {
            "seconds": (repeated, {"READ_SECONDS": -1}),
            "bad lines": (300 * "x\n", {"KEPT_BYTES": 10_000}),
            "spans": (repeated, {"KEPT_BYTES": 3000}),
            "users": (users, {"KEPT_BYTES": 3000}),
            "the users' ids": (ids, {"KEPT_BYTES": 6000}),
        }
        for what, (content, limits) in logs.items():
            last = {}  # {cores: where the chunk ends}
            for cores in (1, 3):
                with (
                    self.subTest(what, cores=cores),
                    small_slices(cores, **limits),
                    opened_reader(self.path("log", content)) as log,
                ):
                    tallies = data_processor.tally_chunk(log, 0, log.end, data_processor.COUNT)
                    ends = [0] + [tally.end for tally in tallies]
                    self.assertEqual([tally.part.start for tally in tallies], ends[:-1])
                    self.assertTrue(0 < ends[-1] < len(content), ends)
                    last[cores] = ends[-1]
            if "KEPT_BYTES" in limits:
                self.assertLess(last[3], last[1], f"{what}: the slices share the limit")
        self.assertLess(3 * data_processor.READ_SECONDS, data_processor.IDLE_SECONDS)

    def test_a_chunk_has_about_the_size_that_is_asked_for(self):
        content = 300 * with_id("p", 1)
        for cores in (1, 3):
            with (
                self.subTest(cores=cores),
                small_slices(cores),
                opened_reader(self.path("log", content)) as log,
            ):
                tallies = data_processor.tally_chunk(log, 0, 3000, data_processor.COUNT)
                size = tallies[-1].end
                self.assertLess(abs(size - 3000), len(with_id("p", 1)))

    def test_new_events_are_read_once(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))
        read_events = data_processor.read_events
        reads = self.path("reads", b"")

        def read_and_note(*arguments):
            with open(reads, "a") as file:  # which the child shares with this process
                file.write("read\n")
            return read_events(*arguments)

        with unittest.mock.patch.object(data_processor, "read_events", read_and_note):
            apply(log)
        self.assertEqual(reads.read_text(), "read\n")
        self.assertRevenue({"user1": 100})

    def test_a_second_tally_is_made_for_mixed_slices_alone(self):
        lines = [with_id("p", n) for n in range(11, 41)]  # which have the same length
        cases = {
            "all are new": ([], []),
            "none is new": (lines, []),
            "a slice is known": (lines[:10], []),
            "an event of the second slice is known": (lines[15:16], [1]),
            "an event of the first and of the last is known": ([lines[9], lines[20]], [0, 2]),
        }
        starts = [first * len(lines[0]) for first in (0, 10, 20)]
        for case, (before, mixed) in cases.items():
            with self.subTest(case):
                empty_tables()
                apply(self.path("before", "".join(before)))
                tallied = []
                process = data_processor.TallyProcess

                def note(log, slice, marks=None):
                    tallied.append((slice.start, marks is not None))
                    return process(log, slice, marks)

                with small_slices(3, TallyProcess=note):
                    apply(self.path("log", "".join(lines)))
                again = [start for start, has_marks in tallied if has_marks]
                self.assertEqual(again, [starts[number] for number in mixed])
                self.assertRevenue({"user1": 30})

    def test_a_log_with_a_tenth_of_repeats_counts_each_event_once(self):
        chance = random.Random(TORTURE_SEED)
        lines = [with_id(f"p{n % 3}", n, f"user{n % 7}", n) for n in range(1, 2001)]
        expected = {f"user{user}": sum(range(user or 7, 2001, 7)) for user in range(7)}
        repeated = lines + chance.sample(lines, 200)
        chance.shuffle(repeated)
        log = self.path("log", "".join(repeated))
        for cores in (1, 3):
            with self.subTest(cores=cores, seed=TORTURE_SEED):
                empty_tables()
                with captured() as printed, small_slices(cores):
                    data_processor.run([str(log)])
                    self.assertIn("2,000 applied, 200 repeated, 0 rejected", printed())
                self.assertRevenue(expected)

    def changed_between_its_tallies(self, change):
        """Apply a log of three events, of which one is known, and which change(path) changes after
        its first tally; return its path, whether all was well, and what was printed."""
        query("TRUNCATE users_revenue, event_producers, event_logs")
        self.processor(self.path("known", with_id("p", 2)))
        path = self.path("log", "".join(with_id("p", n) for n in (1, 2, 3)))
        mark_lines = data_processor.mark_lines
        changed = []

        def change_it(*arguments):
            if not changed:
                change(path)
                changed.append(path)
            return mark_lines(*arguments)

        patch = unittest.mock.patch.object(data_processor, "mark_lines", change_it)
        with captured() as printed, patch:
            well = data_processor.run([str(path)])
            self.assertEqual(changed, [path])
            return path, well, printed()

    def assertNothingCounts(self, change):
        """Check that nothing counts of a log that is changed between its tallies."""
        path, well, printed = self.changed_between_its_tallies(change)
        self.assertFalse(well)
        self.assertEqual(
            printed, f"{path}: was changed while it was read; it is read again next time.\n"
        )
        self.assertRevenue({"user1": 1})
        self.assertEqual(query("SELECT applied::text FROM event_producers"), [("{[2,3)}",)])

    def edit(self, line):
        """Return what puts a line in the place of the third one, which has the same length."""
        self.assertEqual(len(line), len(with_id("p", 3)))
        return lambda path: path.write_text(with_id("p", 1) + with_id("p", 2) + line)

    def test_an_edit_of_equal_length_between_the_tallies_of_a_slice_is_noticed(self):
        edits = {
            "an event id": with_id("p", 9),
            "a known event id": with_id("p", 2),
            "a producer": with_id("q", 3),
            "a line that is no event": "x" * (len(with_id("p", 3)) - 1) + "\n",
            "a blank line": " " * (len(with_id("p", 3)) - 1) + "\n",
        }
        for edit, line in edits.items():
            with self.subTest(edit):
                self.assertNothingCounts(self.edit(line))

    def test_an_amount_or_a_user_that_is_edited_between_the_tallies_is_not_counted(self):
        for user, value in (("user1", 9), ("user9", 1)):
            with self.subTest(user=user, value=value):
                self.assertNothingCounts(self.edit(with_id("p", 3, user, value)))

    def test_a_log_that_is_cut_between_its_tallies_is_not_counted(self):
        for length in (0, len(with_id("p", 1))):
            with self.subTest(length):
                self.assertNothingCounts(lambda path: os.truncate(path, length))

    def test_the_position_behind_the_end_of_a_log_has_another_digest(self):
        path = self.path("log", with_id("p", 1) + with_id("p", 2))
        with opened_reader(path) as log:
            whole = log.digest(log.end)
            os.truncate(path, len(with_id("p", 1)))
            self.assertNotEqual(log.digest(log.end), whole, "it could seem unchanged")

    def test_no_child_outlives_its_chunk(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))

        def slow(reader, part, marks=None):
            if part.start == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(20)

        before = set(children_of(os.getpid()))
        with small_slices(2, tally_slice=slow, ATTEMPTS=1):
            self.assertRaises(data_processor.ChildDied, apply, log)
        self.assertLessEqual(set(children_of(os.getpid())), before)

    def test_an_edit_far_before_the_position_is_noticed_between_the_tallies(self):
        known = with_id("p", 2)
        repeats = known * (data_processor.DIGEST_BYTES // len(known) + 2)
        self.processor(self.path("known", known))
        log = self.path("log", with_id("p", 1) + known + with_id("p", 3) + repeats)
        edited = with_id("p", 1) + known + with_id("p", 9) + repeats
        mark_lines = data_processor.mark_lines
        edits = []

        def edit(*arguments):
            if not edits:
                edits.append(log.write_text(edited, encoding="utf-8"))
            return mark_lines(*arguments)

        with captured() as printed, unittest.mock.patch.object(data_processor, "mark_lines", edit):
            self.assertFalse(data_processor.run([str(log)]))
            self.assertEqual(len(edits), 1)
            self.assertIn("was changed while it was read", printed())
        self.assertRevenue({"user1": 1})
