"""Several cores count what one would count, in bounded memory."""

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
import unittest
import unittest.mock
from decimal import Decimal

import data_processor
from tests.tools import SystemTest, alive, children_of, patched, wait_until
from tests.tools_database import empty_tables, setUpModule
from tests.tools_events import EVENT, TORTURE_SEED, with_id
from tests.tools_parts import apply, captured, opened_processor, opened_reader, small_slices


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
                children = unittest.mock.Mock(side_effect=data_processor.TallyInChild)
                with (
                    captured(),
                    small_slices(cores),
                    opened_processor(log) as processor,
                    unittest.mock.patch.object(data_processor, "TallyInChild", children),
                ):
                    processor.run()
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
                with (
                    captured(),
                    small_slices(chance.choice([1, 2, 3])),
                    opened_processor(
                        some, self.path("rest", with_id("other", 1, value=0) + "".join(rest))
                    ) as processor,
                ):
                    processor.run()
                self.assertRevenue(everything)

    def test_a_child_that_dies_is_no_part_of_a_sum(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))
        once, parent = self.path("once"), os.getpid()

        class Dying(data_processor.Tally):
            def __getattribute__(tally, name):
                if name == step and os.getpid() != parent and (forever or once.exists()):
                    once.unlink(missing_ok=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__getattribute__(name)

        for step, forever in itertools.product(("report", "sums", "_add"), (False, True)):
            with self.subTest(step, forever=forever):
                empty_tables()
                once.touch()
                with (
                    captured(),
                    small_slices(2),
                    opened_processor(log) as processor,
                    unittest.mock.patch.multiple(data_processor, Tally=Dying, ATTEMPTS=2),
                ):
                    if forever:
                        with self.assertRaisesRegex(
                            data_processor.ChildDied, "log ended too early: out of memory"
                        ):
                            processor.run()
                    else:
                        processor.run()
                        self.assertFalse(once.exists(), "no child died")
                self.assertRevenue({} if forever else {"user1": 100})

    def test_children_end_when_their_parent_is_killed(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 50_001)))
        patch = (
            "import time\ndata_processor.usable_cores = lambda: 3\n"
            "data_processor.SLICE_BYTES = 1000\n"
            "sums = data_processor.Tally.sums\n"
            "data_processor.Tally.sums = lambda *arguments: (time.sleep(1), sums(*arguments))[1]"
        )
        arguments, environment = patched("data_processor", patch)
        processor = subprocess.Popen(
            [sys.executable, *arguments, log], env=os.environ | environment
        )
        self.addCleanup(processor.wait)
        children = wait_until(lambda: children_of(processor.pid), "it has forked")
        processor.kill()
        wait_until(lambda: not any(map(alive, children)), "its children have ended")
        self.processor(log)
        self.assertRevenue({"user1": 50_000})

    def test_a_log_that_cannot_be_read_in_a_child_is_said(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))
        error = OSError(errno.EIO, "Input/output error")
        with (
            captured() as printed,
            small_slices(2),
            opened_processor(log) as processor,
            unittest.mock.patch.object(data_processor, "read_rows", side_effect=error),
        ):
            processor.run()
            self.assertEqual((printed(), processor.failed), (f"{log}: Input/output error.\n", True))

    def test_a_chunk_ends_early_rather_than_keep_too_much(self):
        repeated = 300 * with_id("p", 1)  # a span for each line
        users, ids = (
            "".join(with_id("p", n, user) for n, user in enumerate(names, 1))
            for names in ([f"u{n}" for n in range(300)], [f"{n:0100}" for n in range(300)])
        )
        logs = {
            "bytes": (repeated, {"CHUNK_BYTES": 1000}),
            "seconds": (repeated, {"CHUNK_SECONDS": -1}),
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
                    with data_processor.tallied(log, 0, False) as tallies:
                        ends = [0] + [tally.report.end for tally in tallies]
                    self.assertEqual([tally.report.start for tally in tallies], ends[:-1])
                    self.assertTrue(0 < ends[-1] < len(content), ends)
                    last[cores] = ends[-1]
            if "KEPT_BYTES" in limits:
                self.assertLess(last[3], last[1], f"{what}: the slices share the limit")
        self.assertLess(3 * data_processor.CHUNK_SECONDS, data_processor.IDLE_SECONDS)

    def test_new_events_are_read_once(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))
        read_rows, reads = data_processor.read_rows, self.path("reads", b"")

        def read_and_note(*arguments):
            with open(reads, "a") as file:  # which the child shares with this process
                file.write("read\n")
            return read_rows(*arguments)

        with unittest.mock.patch.object(data_processor, "read_rows", read_and_note):
            apply(log)
        self.assertEqual(reads.read_text(), "read\n")
        self.assertRevenue({"user1": 100})

    def test_a_log_that_is_cut_between_its_readings_is_not_counted(self):
        for length in (0, len(with_id("p", 1))):
            path = self.path("log", with_id("p", 1) + with_id("p", 2) + with_id("p", 3))
            with self.subTest(length), opened_reader(path) as log:
                tally = data_processor.Tally(log, 0, log.end, False, 10**6)
                os.truncate(path, length)
                self.assertRaisesRegex(
                    OSError, "was changed while it was read", tally.sums, b"\1\0\1"
                )
                self.assertIsNone(
                    log.digest(log.end), "the position behind the end could seem unchanged"
                )

    def test_no_child_outlives_its_chunk(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 101)))

        class Slow(data_processor.Tally):
            def __init__(self, log, start, *arguments):
                if start == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(20)

        with (
            captured(),
            small_slices(2),
            opened_processor(log) as processor,
            unittest.mock.patch.multiple(data_processor, Tally=Slow, ATTEMPTS=1),
        ):
            before = set(children_of(os.getpid()))
            self.assertRaises(data_processor.ChildDied, processor.run)
            self.assertLessEqual(set(children_of(os.getpid())), before)
