"""Rotated logs are found, and --follow reads on through rotations and outages."""

import errno
import fcntl
import gzip
import os
import signal
import threading
import time
import unittest
import unittest.mock

import psycopg2

import data_processor
from tests.tools import Server, SystemTest, wait_until
from tests.tools_database import (
    empty_tables,
    locked_users,
    query,
    setUpModule,
    terminate_backends,
    waiting,
)
from tests.tools_events import EVENT, with_id
from tests.tools_parts import captured, opened_follower, poll

SOON = "data_processor.POLL_SECONDS = 0.1"


class Following(SystemTest):
    """The processor finds the rotated logs and, with --follow, reads on through rotations and
    outages."""

    def follow(self, log):
        """Start data_processor.py --follow and return it with a function that waits for a revenue
        of user1."""
        follower = self.start("data_processor.py", "--follow", log, patch=SOON)

        def wait_for_revenue(expected, what):
            wait_until(lambda: query("SELECT revenue FROM users_revenue") == [(expected,)], what)

        return follower, wait_for_revenue

    def assertStops(self, follower):
        """Check that a follower ends quietly when it is told to."""
        follower.terminate()
        self.assertEqual(follower.wait(20), 0)
        began = "server-events.jsonl: No such file.*\n"
        ended = "server-events.jsonl: is read again.\n"
        self.assertRegex(follower.stderr.read(), rf"\A({began}({ended})?)*\Z")

    def test_follow_reads_through_rotations(self):
        server = Server(self)
        follower, wait_for_revenue = self.follow("server-events.jsonl")
        server.post(EVENT)
        wait_for_revenue(1, "the first event was applied")
        server.post(EVENT)
        server.log.rename(self.path("renamed"))
        server.post(EVENT)
        wait_for_revenue(3, "both logs were read")
        follower.send_signal(signal.SIGSTOP)
        for number in (1, 2):  # two rotations while nobody looks
            server.log.rename(self.path(f"server-events.jsonl.{number}"))
            server.post(EVENT)
        follower.send_signal(signal.SIGCONT)
        wait_for_revenue(5, "all logs were read")
        server.log.rename(self.path("server-events.jsonl.3"))  # and no log is begun in its place
        for total in (6, 7):
            with open(self.path("server-events.jsonl.3"), "a") as log:
                log.write(with_id("p", total))
            wait_for_revenue(total, "the renamed log is read once more")
        self.assertStops(follower)

    def test_follow_reads_through_a_lost_connection(self):
        server = Server(self)
        follower, wait_for_revenue = self.follow("server-events.jsonl")
        server.post(EVENT)
        wait_for_revenue(1, "the first event was applied")
        server.log.rename(self.path("renamed"))
        server.post(EVENT)
        wait_for_revenue(2, "both logs were read")
        terminate_backends()
        server.post(EVENT)
        wait_for_revenue(3, "the connection was made again")
        self.assertStops(follower)

    def test_follow_waits_for_what_is_not_there_yet(self):
        log = self.path("new/log")
        with captured() as printed, opened_follower(log) as follower:
            poll(follower)
            self.path("new").mkdir()
            poll(follower)
            log.write_bytes(EVENT + b"\n")
            poll(follower)
            said = printed()
        self.assertEqual(said.count("No such file or directory; start server.py"), 1)
        self.assertIn(f"{log}: is read again.\n", said)
        self.assertRevenue({"user1": 1})

    def test_a_named_log_means_its_rotated_siblings_too(self):
        log = self.path("server-events.jsonl", with_id("p", 1))
        for number, name in enumerate((".1", ".2", "-20261124", ".2026-11-25"), 2):
            self.processor("server-events.jsonl")
            with open(log, "a") as file:
                file.write(with_id("p", number))
            log.rename(self.path(f"server-events.jsonl{name}"))
            log.write_text(with_id("q", number))
        self.processor("server-events.jsonl")
        self.assertRevenue({"user1": 9})

    def test_a_directory_that_cannot_be_listed_is_no_directory_without_rotated_logs(self):
        log = self.path("server-events.jsonl", with_id("p", 1))
        broken = (
            "import errno, os\n"
            "listdir = os.listdir\n"
            "def broken(path):\n"
            "    if path == '/dev/fd': return listdir(path)\n"
            "    raise OSError(errno.EACCES, 'Permission denied', path)\n"
            "os.listdir = broken"
        )
        for mode in ([], ["--verify"]):
            with self.subTest(mode):
                _, errors = self.processor(*mode, log, status=1, patch=broken)
                self.assertEqual(errors, f"{self.directory}: Permission denied.\n")
        self.assertRevenue({"user1": 1})

    def test_other_files_beside_a_log_are_no_logs(self):
        self.path("server-events.jsonl", with_id("p", 1))
        for name in (
            ".new",
            ".1.delivery",
            ".1.rejected-abc",
            ".delivery",
            ".old.1",
            "x.1",
            "-old",
            ".bak",
        ):
            self.path("server-events.jsonl" + name, with_id("q", 1))
        for arguments in ([], ["server-events.jsonl"]):
            self.processor(*arguments)
        self.assertRevenue({"user1": 1})

    def test_a_database_that_was_restored_is_brought_up_to_date(self):
        for number in (1, 2):
            self.path(f"log.{number}", with_id(f"p{number}", 1))
        self.path("log", with_id("p", 1))
        self.start("data_processor.py", "--follow", "log", patch=SOON)
        wait_until(
            lambda: query("SELECT revenue FROM users_revenue") == [(3,)], "all logs are applied"
        )
        empty_tables()  # an older state
        terminate_backends()
        wait_until(
            lambda: query("SELECT revenue FROM users_revenue") == [(3,)],
            "all logs are applied again",
        )

    def test_more_rotated_logs_than_descriptors_are_followed(self):
        self.follow_many_logs([])

    def test_more_named_logs_than_descriptors_are_followed(self):
        self.follow_many_logs([f"log.{number}" for number in range(90)])

    def follow_many_logs(self, names):
        """Check that 90 rotated logs and the live one are followed with 40 descriptors, whether
        they are named or not."""
        for number in range(90):
            self.path(f"log.{number}", with_id(f"p{number}", 1))
        limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
        follower = self.start(
            "data_processor.py", "--follow", *names, "log", patch=f"{limit}\n{SOON}"
        )
        try:
            self.path("log", with_id("p", 1))
            wait_until(
                lambda: query("SELECT revenue FROM users_revenue") == [(91,)],
                "all logs are applied",
            )
            with open(self.path("log"), "a") as log:
                log.write(with_id("p", 2))
            wait_until(
                lambda: query("SELECT revenue FROM users_revenue") == [(92,)],
                "the live log is read",
            )
        finally:
            follower.terminate()
            self.assertNotIn("Too many", follower.communicate(timeout=20)[1])

    def test_an_outage_is_said_when_it_begins_and_when_it_ends(self):
        log = self.path("log", with_id("p", 1))
        connect = data_processor.connect
        broken = [True] * 3

        def connect_later(**options):
            if broken:
                broken.pop()
                raise psycopg2.OperationalError("down")
            return connect(**options)

        with (
            captured() as printed,
            opened_follower(log) as follower,
            unittest.mock.patch.multiple(data_processor, connect=connect_later),
            unittest.mock.patch.object(
                data_processor.time, "sleep", side_effect=3 * [None] + [SystemExit]
            ),
        ):
            self.assertRaises(SystemExit, follower.follow)
            lines = printed().splitlines()
        self.assertRegex(
            lines[0],
            "^Events are not applied: trying again until it is mended. No database: down. "
            "Start PostgreSQL, or correct .*",
        )
        self.assertEqual(
            lines[1:],
            [
                f"{log}: 1 applied, 0 repeated, 0 rejected",
                "Events are not applied: they are applied again.",
            ],
        )

    def test_an_outage_of_any_length_is_tried_again_at_least_every_30_seconds(self):
        log = self.path("log", with_id("p", 1))
        pauses = []
        apply_chunk = data_processor.apply_chunk
        broken = [True] * 40

        def apply_later(*arguments):
            if broken:
                broken.pop()
                raise psycopg2.OperationalError("down")
            return apply_chunk(*arguments)

        def pause(seconds):
            pauses.append(seconds)
            if not broken and seconds == data_processor.POLL_SECONDS:
                raise SystemExit

        with (
            captured(),
            opened_follower(log) as follower,
            unittest.mock.patch.object(data_processor, "apply_chunk", apply_later),
            unittest.mock.patch.object(data_processor.time, "sleep", pause),
        ):
            self.assertRaises(SystemExit, follower.follow)
        self.assertLessEqual(max(pauses), 30)
        self.assertRevenue({"user1": 1})

    def test_follow_reads_nothing_of_a_log_that_has_not_grown(self):
        with (
            captured(),
            opened_follower(self.path("log", with_id("p", 1))) as follower,
        ):
            poll(follower)
            with unittest.mock.patch.object(data_processor, "apply_chunk") as apply_chunk:
                poll(follower)
        apply_chunk.assert_not_called()

    def test_a_compressed_log_that_is_not_whole_yet_is_read_later(self):
        whole = gzip.compress("".join(with_id("p", n) for n in range(1, 101)).encode())
        log = self.path("log.gz", whole[:50])
        with captured() as printed, opened_follower(log) as follower:
            for content, applied in ((whole[:50], []), (whole, [(100,)])):
                log.write_bytes(content)
                for _ in range(2):
                    poll(follower)
                    self.assertEqual(query("SELECT revenue FROM users_revenue"), applied)
            self.assertRegex(
                printed(),
                "^.*log.gz: cannot be decompressed: .*\n.*: 100 applied.*\n.*is read again.\n$",
            )

    def test_a_log_that_cannot_be_read_to_its_end_makes_way_for_a_new_one(self):
        lines = "".join(with_id("p", number) for number in range(1, 101)).encode()
        whole = gzip.compress(lines)
        cases = {
            "a compressed log that was cut": ("log.gz", whole[:50], whole),
            "a disk that cannot be read": ("log", lines, lines),
        }
        broken = []

        def pread(fd, length, offset, real=os.pread):
            if os.fstat(fd).st_ino in broken:
                failed.append(fd)
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, length, offset)

        for case, (name, old, new) in cases.items():
            empty_tables()
            log = self.path(name, old)
            broken[:] = [log.stat().st_ino]
            failed = []
            with (
                self.subTest(case),
                captured() as printed,
                unittest.mock.patch.object(os, "pread", pread),
                opened_follower(log) as follower,
            ):
                poll(follower)
                self.assertEqual(query("SELECT revenue FROM users_revenue"), [])
                self.assertIn(f"{name}: ", printed())
                self.path("new", new).rename(log)
                for _ in range(2):
                    poll(follower)
                self.assertRegex(printed(), "100 applied.*\n.*: is read again.\n$")
                with unittest.mock.patch.object(data_processor, "LOCK_SECONDS", 0):
                    for _ in range(3):
                        poll(follower)
                self.assertEqual(follower.renamed, [], "the old one is not kept")
                self.assertTrue(failed or name == "log.gz", "no read failed")
                self.assertRevenue({"user1": 100})

    def test_a_log_that_was_renamed_is_closed(self):
        log = self.path("log", with_id("p", 1))
        with captured(), opened_follower(log) as follower:
            poll(follower)
            renamed = follower.held[str(log)]
            log.rename(self.path("renamed"))
            self.path("log", with_id("p", 2))
            poll(follower)
        self.assertTrue(renamed.file.closed)
        self.assertRevenue({"user1": 2})

    def test_sigterm_ends_a_run_with_143_and_a_follower_with_0(self):
        log = self.path("log", EVENT + b"\n")
        with locked_users():
            for number, (arguments, status) in enumerate((([], 143), (["--follow"], 0)), 1):
                processor = self.start("data_processor.py", log, *arguments)
                wait_until(lambda: len(waiting()) == number, "the processor waits")
                processor.terminate()
                self.assertEqual(
                    (processor.communicate(timeout=20), processor.returncode), (("", ""), status)
                )

    def test_a_renamed_log_is_read_when_its_writer_is_done(self):
        self.path("archive").mkdir()
        path = self.path("log", with_id("p", 1))
        patient = unittest.mock.patch.object(data_processor, "POLL_SECONDS", 20)
        with (
            patient,  # so long it waits for the lock of a renamed log
            captured(),
            opened_follower(path) as follower,
            open(path, "ab", buffering=0) as writer,
        ):
            poll(follower)
            fcntl.flock(writer, fcntl.LOCK_EX)
            path.rename(self.path("archive/old"))
            self.path("log", with_id("q", 1))
            run = threading.Thread(target=poll, args=[follower])
            run.start()
            time.sleep(0.3)  # it waits for the lock
            writer.write(with_id("p", 2).encode())
            fcntl.flock(writer, fcntl.LOCK_UN)
            run.join(20)
        self.assertRevenue({"user1": 3})

    def test_the_rotated_logs_of_a_linked_log_are_found(self):
        self.path("data").mkdir()
        os.symlink("data/log", self.path("log"))
        self.path("data/log.1", with_id("p", 1))
        self.path("data/log", with_id("p", 2))
        self.processor("log")
        self.assertRevenue({"user1": 2})

    def test_copytruncate_loses_lines_but_counts_none_twice(self):
        server = Server(self)
        server.post(EVENT)
        self.processor("server-events.jsonl")
        server.post(EVENT)
        self.path("server-events.jsonl.1", server.log.read_bytes())
        server.post(EVENT)  # between the copy and the cut: it is lost
        os.truncate(server.log, 0)
        for _ in range(2):
            server.post(EVENT)
            self.processor("server-events.jsonl")
        self.assertRevenue({"user1": 4})
