"""An acknowledged event survives a fault at any step."""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import socket
import sys
import threading
import time
import unittest
import unittest.mock

import data_processor
import server as server_module
from tests.tools import Server, SystemTest, run_in_child, wait_until
from tests.tools_database import setUpModule
from tests.tools_events import EVENT, ids_in, with_id
from tests.tools_faults import FaultyCalls
from tests.tools_http import post, read_answer, serving
from tests.tools_parts import append, append_for, captured, opened_log, warnings_of


class LogCalls(FaultyCalls):
    """The system calls of a server for its log.

    locked   whether the log is locked
    synced   what was in the log when it was synced last
    named    whether the directory was synced after the log was opened last
    """

    def __init__(self, log, fault=None, at=0):
        """Look at the calls for a log, one of which goes wrong."""
        super().__init__(fault, at)
        self.log = log
        self.locked = False
        self.synced = b""
        self.named = False

    def before(self, name, arguments):
        """Check that nothing is written without the lock."""
        if name == "flock":
            self.locked = arguments[1] != fcntl.LOCK_UN
        elif name in ("write", "ftruncate") and not self.locked:
            raise AssertionError(f"{name} without the lock")

    def after(self, name, arguments):
        """Keep what is synced."""
        if name == "fdatasync":
            self.synced = self.log.read_bytes()
        if name == "open" and arguments[1:] != (os.O_RDONLY,):  # the log, and not its directory
            self.named = False
        if name == "fsync":
            self.named = True


class Durability(SystemTest):
    """An acknowledged event survives, although every step fails once."""

    def append_with_fault(self, log_path, fault, at):
        """Append three events in a child, one system call of which goes wrong.

        Return (exit status, what happened).
        """
        report = self.path("report", b"")
        calls = LogCalls(log_path, fault, at)

        def append_three(out):
            log = server_module.LogWriter(str(log_path))
            for sequence in range(1, 4):
                if sequence == 3 and log_path.exists():  # a rotation in between
                    log_path.rename(self.path("rotated"))
                line = with_id("p", sequence).encode()
                try:
                    append(log, line)
                except OSError:
                    continue
                end = line[-20:]  # "log" may have been put into the line
                if end not in calls.synced or not calls.named:
                    out.write(b"acknowledged before the sync\n")
                out.write(b"acknowledged %d\n" % sequence)

        def child():
            sys.stdout = sys.stderr = None  # what is printed is no system call of the log
            with open(report, "ab", buffering=0) as out:
                with calls.made_by(server_module, data_processor):
                    append_three(out)
                if calls.fired:
                    out.write(b"injected\n")

        status = run_in_child(child)
        return status, report.read_text()

    def assertAppendSurvives(self, fault, at):
        """Append with a fault at a call, restart, and check the logs.

        Return whether there was such a call, and the acknowledged ids.
        """
        for name in ("log", "rotated"):
            self.path(name).unlink(missing_ok=True)
        path = self.path("log", with_id("earlier", 1) + '{"torn')
        status, report = self.append_with_fault(path, fault, at)
        self.assertIn(status, (0, FaultyCalls.KILLED))
        self.assertNotIn("before the sync", report)
        with opened_log(path) as log, captured():  # the restart
            append(log, with_id("later", 1).encode())
        logs = [path for path in (self.path("rotated"), path) if path.exists()]
        ids = ids_in(*logs)  # fails on a glued line
        self.assertEqual(len(ids), len(set(ids)))
        acknowledged = {("p", int(n)) for n in re.findall(r"acknowledged (\d)", report)}
        always = {("earlier", 1), ("later", 1)}
        self.assertLessEqual(acknowledged | always, set(ids), report)
        self.assertLessEqual(set(ids), always | {("p", 1), ("p", 2), ("p", 3)})
        return status == FaultyCalls.KILLED or "injected" in report, acknowledged

    def test_an_append_survives_a_fault_at_any_step(self):
        for fault in FaultyCalls.FAULTS:
            for at in itertools.count(1):
                with self.subTest(fault=fault, call=at):
                    injected, acknowledged = self.assertAppendSurvives(fault, at)
                if not injected:
                    break
            self.assertEqual(len(acknowledged), 3, fault)
            least = 20
            if fault in FaultyCalls.WRITE_FAULTS:
                least = 3
            self.assertGreater(at, least, f"{fault} was not injected")

    def test_an_event_that_comes_at_any_step_of_another_is_answered(self):
        first = with_id("p", 1).encode()
        second = with_id("p", 2).encode()

        class Interrupted(FaultyCalls):
            def before(self, name, arguments):
                if self.count == at and not other.ident:
                    other.start()
                    wait_until(lambda: log._rounds._members, "the other has joined a round")

        for at in itertools.count():
            path = self.path(f"log{at}")
            outcomes = []
            with opened_log(path) as log:
                arguments = [log, second, outcomes.append]
                other = threading.Thread(target=append_for, args=arguments)
                with Interrupted().made_by(server_module, data_processor):
                    append_for(log, first, outcomes.append)
                    if not other.ident:  # it was not started: there was no such call
                        break
                    other.join(20)
            self.assertEqual(outcomes, [None, None], at)
            self.assertEqual(ids_in(path), [("p", 1), ("p", 2)], at)
        self.assertGreater(at, 5)

    def test_whoever_comes_during_a_sync_shares_the_next_one(self):
        goes_on = threading.Event()
        syncs = []
        done = []
        sync = unittest.mock.patch.object(
            server_module, "sync_file", lambda fd: syncs.append(fd) or goes_on.wait(20)
        )
        with opened_log(self.path("log")) as log, sync:
            threads = []
            for number in range(10):
                arguments = [log, with_id("p", number).encode(), done.append]
                threads.append(threading.Thread(target=append_for, args=arguments))
            threads[0].start()
            wait_until(lambda: syncs, "the first is syncing")
            for thread in threads[1:]:
                thread.start()
            wait_until(
                lambda: sum(thread.is_alive() for thread in threads) == 2,
                "one of the others stays to sync for all",
            )
            goes_on.set()
            for thread in threads:
                thread.join()
        self.assertEqual((len(syncs), done), (2, [None] * 10))

    def test_few_lines_are_written_at_once(self):
        line = with_id("p", 1).encode()
        first_is_synced = threading.Event()
        sizes = []
        done = []

        def sync(fd):
            sizes.append(os.fstat(fd).st_size)
            first_is_synced.wait(20)

        with (
            unittest.mock.patch.object(server_module, "GROUP_BYTES", 3 * len(line)),
            unittest.mock.patch.object(server_module, "sync_file", sync),
            opened_log(self.path("log")) as log,
        ):
            threads = []
            for _ in range(11):
                arguments = [log, line, done.append]
                threads.append(threading.Thread(target=append_for, args=arguments))
                threads[-1].start()
                wait_until(lambda: sizes, "the first is syncing")
            time.sleep(0.2)
            first_is_synced.set()
            for thread in threads:
                thread.join(20)
        groups = [end - begin for begin, end in itertools.pairwise(sizes)]
        self.assertLessEqual(max(groups), 3 * len(line))
        self.assertEqual(sum(groups), 10 * len(line))
        self.assertEqual(done, [None] * 11)

    def test_answers_that_wait_for_the_disk_count_as_lines_do(self):
        joined = []

        def join(pending, answer, size):
            joined.append((len(pending.text), size))

        log = server_module.LogWriter("log")
        with unittest.mock.patch.object(log._rounds, "join", join):
            log.append(b"{}\n", 0, None, 1000)
        self.assertEqual(joined, [(3, 1003)])

    def test_a_lock_that_cannot_be_released_keeps_nobody_from_an_answer(self):
        flock = fcntl.flock
        done = []

        def fail(fd, operation):
            if operation == fcntl.LOCK_UN:
                raise OSError(errno.EIO, "stale")
            flock(fd, operation)

        with (
            opened_log(self.path("log")) as log,
            captured(),
            unittest.mock.patch.object(server_module.fcntl, "flock", fail),
        ):
            append_for(log, with_id("p", 1).encode(), done.append)
        (error,) = done
        self.assertRegex(error.strerror, "stale; .* may or may not count")

    def test_without_memory_for_an_answer_its_connection_ends(self):
        with (
            opened_log(self.path("log")) as log,
            serving(log, DRAIN_SECONDS=1) as worker,
            contextlib.ExitStack() as stack,
        ):
            wires = [
                stack.enter_context(socket.create_connection(worker.address, timeout=20))
                for _ in range(2)
            ]
            with unittest.mock.patch.object(
                server_module.Handler, "render", side_effect=MemoryError
            ):
                wires[0].sendall(post(body=EVENT))
                self.assertEqual(wires[0].recv(1), b"")
            wires[1].sendall(post(body=EVENT))
            self.assertEqual(read_answer(wires[1])[0], 200)

    def test_nobody_waits_for_the_lock_of_a_renamed_log(self):
        server = Server(self, "--workers", "1")
        self.assertEqual(server.post(EVENT)[0], 200)
        with open(server.log, "rb") as moved:
            fcntl.flock(moved, fcntl.LOCK_EX)  # as a client that sends it does
            waiting = threading.Thread(target=server.post, args=[EVENT])
            waiting.start()
            waiting.join(0.5)
            self.assertTrue(waiting.is_alive(), "the lock of the log itself is waited for")
            server.log.rename(self.path("moved"))
            waiting.join(5)
            self.assertFalse(waiting.is_alive())
        self.assertEqual([len(ids_in(path)) for path in (self.path("moved"), server.log)], [1, 1])

    def test_a_last_line_is_ended_if_it_is_whole_and_else_cut_off(self):
        line = with_id("p", 1).encode()
        new = with_id("new", 1).encode()
        kept = {"an event with an id": line[:-1], "an event without one": EVENT}
        cut = {f"{end} bytes": line[:end] for end in range(1, len(line) - 1)} | {
            "NULs": b"\0" * 10,
            "two events glued": line[:-1] * 2,
            "300 KB": b"x" * 300_000,
            "half a character": b"\xe2\x82",
        }
        path = self.path("log")
        for case, tail in (kept | cut).items():
            with (
                self.subTest(case),
                opened_log(self.path("log", line + tail)) as log,
                warnings_of(server_module) as said,
            ):
                append(log, new)
                if case in kept:
                    self.assertEqual(path.read_bytes(), line + tail + b"\n" + new)
                    self.assertEqual(said, [])
                else:
                    self.assertEqual(path.read_bytes(), line + new)
                    self.assertEqual(len(said), 1)

    def test_a_renamed_log_has_its_last_line_ended_too(self):
        path = self.path("log")
        with opened_log(path) as log, warnings_of(server_module):
            append(log, with_id("p", 1).encode())
            size = path.stat().st_size
            with path.open("a") as torn:
                torn.write("unfinish")  # by another worker, killed then
            path.rename(self.path("renamed"))
            append(log, with_id("p", 2).encode())
        self.assertEqual((self.path("renamed").stat().st_size, ids_in(path)), (size, [("p", 2)]))

    def test_a_log_that_is_rotated_while_it_is_opened_anew_is_followed(self):
        path = self.path("log")
        with opened_log(path) as log:
            path.write_text("unfinish")  # by another worker, killed then
            path.rename(self.path("first"))
            reopen = log._open

            def open_and_rotate():
                fd = reopen()
                if not self.path("second").exists():
                    path.rename(self.path("second"))
                return fd

            with unittest.mock.patch.object(log, "_open", open_and_rotate), captured():
                append(log, with_id("p", 1).encode())
        self.assertEqual([self.path(name).stat().st_size for name in ("first", "second")], [0, 0])
        self.assertEqual(ids_in(path), [("p", 1)])

    def test_a_stranger_who_locks_the_log_is_named_and_not_waited_for_long(self):
        soon = "server.LOCK_SECONDS = server.LEAST_LOCK_SECONDS = 0.5"
        server = Server(self, "--workers", "1", patch=soon)
        self.assertEqual(server.post(EVENT)[0], 200)
        with open(server.log, "rb") as stranger:
            fcntl.flock(stranger, fcntl.LOCK_EX)
            answers = []
            threads = [
                threading.Thread(target=lambda: answers.append(server.post(EVENT)))
                for _ in range(10)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            self.assertEqual(server.ask("GET", "/health")[0], 200)
        self.assertEqual([status for status, _ in answers], [503] * 10)
        self.assertIn("holds its lock", answers[0][1]["error"])
        self.assertEqual(server.post(EVENT)[0], 200)
        wait_until(lambda: len(server.said()) == 2, "the trouble and its end are said, once each")
        self.assertEqual(len(ids_in(server.log)), 2)

    def test_the_lock_is_waited_for_until_the_deadline_of_the_first_line(self):
        waits = []

        def lock(path, fd, operation, seconds):
            waits.append(seconds)
            return True

        now = 1000.0
        deadlines = {
            "its request was whole just now": ([now + server_module.LOCK_SECONDS], 10.0),
            "it waited for the round before": ([now + 3], 3.0),
            "one waited for longer than others": ([now + 9, now + 2, now + 5], 2.0),
            "it waited too long": ([now - 20], 1.0),
        }
        with (
            opened_log(self.path("log")) as log,
            unittest.mock.patch.object(server_module, "lock_log", lock),
            unittest.mock.patch.object(server_module.time, "monotonic", lambda: now),
        ):
            for case, (ends, expected) in deadlines.items():
                with self.subTest(case):
                    members = []
                    for number, end in enumerate(ends):
                        pending = server_module.Pending(with_id("p", number).encode(), end)
                        members.append(server_module.Member(pending, lambda error: None))
                    log._write(members)
                    self.assertEqual(waits.pop(), expected)

    def test_a_file_that_took_the_place_of_the_log_is_left_as_it_is(self):
        server = Server(self, "--workers", "1")
        self.assertEqual(server.post(EVENT)[0], 200)
        server.log.rename(self.path("rotated"))
        self.path(server.log.name, b"Dear diary, unfinish")
        status, answer = server.post(EVENT)
        self.assertEqual(status, 503)
        self.assertIn("no log", answer["error"])
        self.assertEqual(server.log.read_bytes(), b"Dear diary, unfinish")
        server.log.unlink()
        self.assertEqual(server.post(EVENT)[0], 200)

    def test_only_what_may_be_a_torn_first_line_is_taken_for_one(self):
        stamped = with_id("p", 1).encode()
        taken = {
            "nothing": b"",
            "a brace": b"{",
            "a part": stamped[:20],
            "all but the line end": stamped[:-1],
            "an event before NULs": EVENT + bytes(300_000),
            "a part before NULs": stamped[:20] + bytes(300_000),
            "NULs": bytes(300_000),
        }
        left = {
            "a whole object": b'{"a": 1}',
            "a long object": b'{"a": "' + b"x" * 300_000 + b'"}',
            "a part of a long object": b'{"a": "' + b"x" * 300_000,
            "a long line": b'{"a": "' + b"x" * 300_000 + b'"}\n',
            "a text in braces": b"{\\rtf1 text",
            "an array": b'["a", ',
        }
        for case, content in (taken | left).items():
            path = self.path(case)
            path.write_bytes(content)
            with self.subTest(case):
                if case in taken:
                    with opened_log(path) as log, captured():
                        append(log, stamped)
                    self.assertEqual(ids_in(path)[-1], ("p", 1))
                else:
                    with self.assertRaisesRegex(OSError, "is no log"), opened_log(path):
                        pass
                    self.assertEqual(path.read_bytes(), content)

    def test_a_log_that_cannot_be_opened_at_first_is_opened_later(self):
        path = self.path("log", b"Dear diary")
        log = server_module.LogWriter(str(path))
        self.addCleanup(log._close)
        with warnings_of(data_processor) as said:
            with self.assertRaisesRegex(OSError, "is no log"):
                append(log, with_id("p", 1).encode())
            path.unlink()
            append(log, with_id("p", 1).encode())
        failed, mended = said
        self.assertRegex(failed, "the log cannot be written: .* is no log")
        self.assertIn("can be written again", mended)
        self.assertEqual(ids_in(path), [("p", 1)])

    def test_lines_that_cannot_be_taken_back_are_said_to_be_uncertain(self):
        outcomes = []
        error = OSError(errno.ENOSPC, "No space left on device")

        def write_a_part(fd, data):
            os.write(fd, data)
            raise error

        with (
            opened_log(self.path("log")) as log,
            captured(),
            unittest.mock.patch.object(server_module, "write_all", write_a_part),
            unittest.mock.patch.object(os, "ftruncate", side_effect=OSError(errno.EIO, "I/O")),
        ):
            append_for(log, with_id("p", 1).encode(), outcomes.append)
        self.assertRegex(outcomes[0].strerror, "I/O; .* may or may not count")
