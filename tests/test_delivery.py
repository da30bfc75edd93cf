"""A file is delivered whole, or the client says which lines are not delivered."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import signal
import threading
import time
import unittest
import unittest.mock

import client as client_module
from tests.tools import Server, free_port, wait_until
from tests.tools_client import ClientTest
from tests.tools_database import setUpModule
from tests.tools_events import EVENT, ids_in, oracle, write_events
from tests.tools_http import BATCHES, Recorder, dribbling
from tests.tools_parts import opened_delivery


class StoppingServer(Recorder):
    """A server of batches that answers no POST before it is told to."""

    def __init__(self, test, answer=b'{"accepted": 1, "rejected": []}'):
        """Prepare the answer to each POST."""
        super().__init__([BATCHES], self.wait_and_answer)
        self._answer = answer
        self._asked = threading.Event()
        self._told = threading.Event()
        test.addCleanup(self.go_on)

    def wait_and_answer(self, _number, _body):
        """Answer a POST when it is time."""
        self._asked.set()
        self._told.wait(60)
        return 200, {}, self._answer

    def wait_for_a_post(self):
        """Return when a POST has come, or fail."""
        if not self._asked.wait(20):
            raise AssertionError("no POST has come")

    def go_on(self):
        """Answer what has come and what comes."""
        self._told.set()


class Delivery(ClientTest):
    """A file has one delivery, and a delivery is of one file."""

    def test_a_second_client_on_the_same_file_is_refused(self):
        write_events(self.path("events.jsonl"), 3)
        nowhere = "--url", f"http://localhost:{free_port()}/liveEvent"
        self.start("client.py", *nowhere)
        wait_until(
            lambda: self.state.exists() and self.state.read_text(),
            "the first client waits for a server",
        )
        before = {path: path.read_bytes() for path in self.directory.iterdir()}
        for arguments in ([], ["--restart"]):
            with self.subTest(arguments=arguments):
                _, errors = self.client(
                    *nowhere, "--give-up-after", 0, *arguments, status=1
                )
                self.assertIn("is being sent by another client", errors)
                self.assertEqual(
                    {path: path.read_bytes() for path in self.directory.iterdir()},
                    before,
                )

    def test_a_file_that_was_replaced_while_it_was_sent_is_not_sent_by_another_client(
        self,
    ):
        self.path("events.jsonl", EVENT + b"\n")
        url = f"http://127.0.0.1:{free_port()}/liveEvent"
        first = self.start("client.py", "--url", url)
        wait_until(
            lambda: self.state.exists() and self.state.read_text(),
            "the first client has begun",
        )
        self.path("new", EVENT + b"\n").rename(self.path("events.jsonl"))
        _, errors = self.client("--restart", "--url", url, status=1)
        self.assertIn("is being sent by another client", errors)
        first.kill()
        _, errors = self.client("--url", url, "--give-up-after", "0", status=1)
        self.assertIn("going on", errors)

    def test_a_client_that_opened_a_removed_delivery_opens_it_anew(self):
        self.path("events.jsonl", EVENT)
        removed = []
        flock = fcntl.flock

        def remove_once(file, operation):
            if not removed:
                removed.append(
                    os.unlink(self.state)
                )  # as a client does that is done just now
            flock(file, operation)

        with unittest.mock.patch.object(
            client_module.fcntl, "flock", remove_once
        ), opened_delivery(self.path("events.jsonl")) as (_, state):
            self.assertEqual(self.producer_id(), state.producer_id)

    def test_a_file_that_is_renamed_before_its_delivery_is_locked_is_not_sent(self):
        events = self.path("events.jsonl", EVENT + b"\n")
        renamed = self.path("events.jsonl.old")
        flock = fcntl.flock

        def rename_and_lock(file, operation):
            events.rename(renamed)
            flock(file, operation)

        with unittest.mock.patch.object(client_module.fcntl, "flock", rename_and_lock):
            with self.assertRaisesRegex(client_module.Failure, "renamed meanwhile"):
                with opened_delivery(events):
                    pass
        self.assertTrue(renamed.exists())
        self.assertEqual(self.state.read_bytes(), b"")

    def test_a_delivery_that_is_renamed_while_the_file_is_read_is_not_begun(self):
        events = self.path("events.jsonl", EVENT + b"\n")
        renamed = self.path("events.jsonl.old.delivery")
        measure = client_module.Source.measure

        def measure_and_rename(source, offset):
            measure(source, offset)
            self.state.rename(renamed)

        with unittest.mock.patch.object(client_module.Source, "measure", measure_and_rename):
            with self.assertRaisesRegex(client_module.Failure, "renamed meanwhile"):
                with opened_delivery(events):
                    pass
        self.assertEqual(renamed.read_bytes(), b"")

    def test_a_directory_that_became_a_file_does_not_spoil_the_end(self):
        self.path("in").mkdir()
        moved = self.path("moved")
        events = self.path("in/events.jsonl", EVENT + b"\n")
        with opened_delivery(events) as (_, state):
            events.parent.rename(moved)
            events.parent.write_bytes(b"")
            state.forget()
        self.assertEqual((moved / "events.jsonl.delivery").read_bytes(), b"")

    def test_nothing_fails_once_a_delivery_is_forgotten(self):
        events = self.path("events.jsonl", EVENT + b"\n")
        refused = PermissionError(errno.EACCES, "Permission denied")
        stat = unittest.mock.patch.object(client_module.os, "stat", side_effect=refused)
        with opened_delivery(events) as (_, state):
            with stat as asked:
                state.forget()
            asked.assert_called_once()
        self.assertEqual(self.state.read_bytes(), b"")

    def test_a_file_that_somebody_else_has_locked_is_sent(self):
        server = Server(self)
        with open(self.path("events.jsonl", EVENT + b"\n"), "rb") as moved_log:
            fcntl.flock(moved_log, fcntl.LOCK_EX)
            self.client("--url", server.url, "--give-up-after", 5)
        self.assertEqual(len(ids_in(server.log)), 1)

    def test_a_file_has_one_delivery_whichever_link_leads_to_it(self):
        self.path("elsewhere").mkdir()
        self.path("events.jsonl", EVENT + b"\n")
        self.path("elsewhere/link").symlink_to("../events.jsonl")
        producer = self.interrupted("elsewhere/link")
        server = Server(self)
        self.client("--url", server.url)
        self.assertEqual(ids_in(server.log), [(producer, 1)])

    def test_a_delivery_that_was_given_up_is_continued_later(self):
        events = write_events(self.path("events.jsonl"), 30)
        nowhere = f"http://localhost:{free_port()}/liveEvent"
        _, errors = self.client("--url", nowhere, "--give-up-after", "0.2", status=1)
        self.assertIn("\nDelivery is unknown from line 1 on.\n", errors)
        self.assertIn("Connection refused", errors)
        state = json.loads(self.state.read_text())
        self.assertEqual(
            (state["size"], state["sha256"]),
            (events.stat().st_size, hashlib.sha256(events.read_bytes()).hexdigest()),
        )
        server = Server(self)
        self.client("--url", server.url)
        self.assertEqual(
            {producer for producer, _ in ids_in(server.log)}, {state["producerId"]}
        )

    def test_a_delivery_that_an_older_client_began_is_continued(self):
        self.path("events.jsonl", EVENT + b"\n")
        server = Server(self)
        expected = []
        for end in ("", "\n", "\0\0"):
            with self.subTest(end=end):
                expected.append((self.interrupted(), 1))
                line = re.sub(', "crc32": .*\n', "}" + end, self.state.read_text())
                self.state.write_text(line)
                self.client("--url", server.url)
                self.assertEqual(ids_in(server.log), expected)

    def test_it_refuses_to_go_on_with_a_changed_file_until_it_is_told_to_restart(self):
        server = Server(self)
        state = self.state
        events = write_events(self.path("events.jsonl"), 3)
        changes = {
            "a line was added": (
                lambda: events.write_bytes(events.read_bytes() + EVENT),
                "has changed",
            ),
            "a byte was changed": (
                lambda: events.write_bytes(
                    events.read_bytes().replace(b': "user', b': "User')
                ),
                "has changed",
            ),
            "the producer id is empty": (
                lambda: state.write_text(
                    re.sub(r'Id": "[^"]+"', 'Id": ""', state.read_text())
                ),
                "cannot be understood",
            ),
        }
        for case, (change, words) in changes.items():
            with self.subTest(case):
                self.interrupted("--restart")
                change()
                before = state.read_bytes()
                _, errors = self.client("--url", server.url, status=1)
                self.assertIn(words, errors)
                self.assertIn("--restart", errors)
                self.assertEqual(state.read_bytes(), before)
        self.assertFalse(server.log.read_bytes())
        self.client("--url", server.url, "--restart")
        self.assertEqual(len(ids_in(server.log)), 4)

    def test_a_torn_delivery_never_needs_restart(self):
        self.path("events.jsonl", EVENT + b"\n")
        self.interrupted()
        line = self.state.read_bytes()
        self.path("events.jsonl", EVENT + b"\n" + EVENT + b"\n")
        for length in range(len(line) - 1):  # without its line end it would be whole
            self.state.write_bytes(line[:length])
            with opened_delivery(self.path("events.jsonl")) as (_, state):
                self.assertEqual(self.producer_id(), state.producer_id)
                self.assertNotIn(state.producer_id.encode(), line)

    def test_a_directory_that_cannot_be_synced_is_no_failure(self):
        self.path("events.jsonl", EVENT)
        patch = (
            "import errno, os, stat\nreal = os.fsync\n"
            "def fsync(fd):\n"
            " if stat.S_ISDIR(os.fstat(fd).st_mode): raise OSError(errno.{0}, '{0}')\n"
            " real(fd)\n"
            "os.fsync = fsync"
        )
        server = Server(self)
        for reason, status in (("EINVAL", 0), ("ENOTSUP", 0), ("EIO", 1)):
            with self.subTest(reason):
                before = len(ids_in(server.log))
                self.assertEqual(
                    self.run_client("--url", server.url, patch=patch.format(reason))[0],
                    status,
                )
                self.assertEqual(len(ids_in(server.log)) - before, 1 - status)

    def test_a_file_that_is_shortened_meanwhile_is_not_taken_for_delivered(self):
        port = free_port()
        events = write_events(self.path("events.jsonl"), 3)
        client = self.start("client.py", "--url", f"http://localhost:{port}/liveEvent")
        wait_until(
            lambda: self.state.exists() and self.state.read_text(),
            "the client has begun",
        )
        os.truncate(events, events.read_bytes().index(b"\n") + 1)
        Server(self, port=port)
        self.assertIn("was shortened", client.communicate(timeout=20)[1])
        self.assertEqual((client.returncode, self.state.exists()), (1, True))

    def test_a_delivery_that_a_signal_ended_is_continued_later(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 100_000)
        producers = set()
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(number.name):
                size = server.log.stat().st_size
                client = self.start(
                    "client.py", "--url", server.url, "--batch-size", "50"
                )
                wait_until(
                    lambda: server.log.stat().st_size > size + 100_000,
                    "the client is at it",
                )
                client.send_signal(number)
                output, errors = client.communicate(timeout=20)
                self.assertEqual((output, client.returncode), ("", status))
                self.assertNotIn("Traceback", errors)
                producers.add(self.producer_id())
        self.client("--url", server.url)
        self.assertEqual({producer for producer, _ in ids_in(server.log)}, producers)
        self.processor()
        self.assertRevenue(oracle(events))

    def test_a_hanging_server_does_not_hold_up_the_end(self):
        self.path("events.jsonl", EVENT)
        ends = {signal.SIGTERM, signal.SIGINT}
        # A parent that waits for signals with sigwait() has blocked them, also for its children.
        self.addCleanup(signal.pthread_sigmask, signal.SIG_UNBLOCK, ends)
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        with dribbling(b"POST") as url:
            client = self.start("client.py", "--url", url)
            wait_until(
                lambda: self.state.exists() and self.state.read_text(),
                "the client has begun",
            )
            time.sleep(0.5)
            client.send_signal(signal.SIGTERM)
            self.assertEqual((client.wait(20), self.state.exists()), (143, True))

    def test_only_what_a_client_wrote_is_overwritten(self):
        self.path("events.jsonl", EVENT + b"\n")
        others = {
            "notes": b"my notes\n",
            "no line end": b"my notes",
            "another object": b'{"producer": 1',
            "behind zeros": b"\0\0x",
            "no UTF-8": b"\xff{\n",
            "an array": b"[]\n",
            "an empty line": b"\n",
            "nested too deep": b"[" * 100_000 + b"\n",
            "events": EVENT + b"\n",
        }
        for (case, text), restart in itertools.product(others.items(), ([], ["--restart"])):
            with self.subTest(case, restart=restart):
                self.state.write_bytes(text)
                status, _, errors = self.run_client(*restart)
                self.assertEqual((status, self.state.read_bytes()), (1, text))
                self.assertIn("was not written by client.py, or is damaged", errors)

    def test_a_first_line_without_its_end_means_begun_when_it_is_whole(self):
        events = self.path("events.jsonl", EVENT + b"\n")
        self.interrupted()
        line = self.state.read_bytes()
        self.state.write_bytes(line[:-1] + b"x")
        _, errors = self.client(status=1)
        self.assertIn("cannot be understood", errors)
        self.state.write_bytes(line)
        with contextlib.closing(client_module.StateFile(str(events))) as state:
            self.assertIsNone(state.load(restart=True))
            self.assertIsNotNone(state.load(restart=False))

    def test_a_whole_first_line_without_a_line_end_means_begun(self):
        events = self.path("events.jsonl", EVENT + b"\n")
        self.interrupted()
        self.state.write_bytes(self.state.read_bytes().rstrip(b"\n"))
        before = self.state.read_bytes()
        events.write_bytes(events.read_bytes() + EVENT + b"\n")
        _, errors = self.client(status=1)
        self.assertIn("has changed since", errors)
        self.assertEqual(self.state.read_bytes(), before)

    def test_a_client_ends_the_delivery_that_it_holds_and_no_other(self):
        with StoppingServer(self) as server:
            self.path("events.jsonl", EVENT + b"\n")
            first = self.start(
                "client.py", "--url", server.url, "--give-up-after", 1000
            )
            server.wait_for_a_post()
            self.path("events.jsonl").rename(self.path("events.jsonl.old"))
            self.state.rename(self.path("events.jsonl.old.delivery"))
            self.path("events.jsonl", EVENT + b"\n")
            second = self.interrupted()
            server.go_on()
            self.assertIn("1 events accepted", first.communicate(timeout=20)[0])
        self.assertEqual(self.producer_id(), second)
        self.assertEqual(self.path("events.jsonl.old.delivery").read_bytes(), b"")

    def test_a_delivery_that_is_moved_without_its_rejected_lines_says_where_they_are(self):
        self.path("events.jsonl", EVENT + b"\nbad\n")
        answer = b'{"accepted": 1, "rejected": [{"line": 2, "error": "bad"}]}'
        with StoppingServer(self, answer) as server:
            client = self.start("client.py", "--url", server.url)
            server.wait_for_a_post()
            name = f"events.jsonl.rejected-{self.producer_id()}"
            self.path(name, b"somebody else's")
            server.go_on()
            _, errors = client.communicate(timeout=20)
            self.assertIn(f"{name} is in the way", errors)
        self.path("moved").mkdir()
        for moved in ("events.jsonl", "events.jsonl.delivery"):
            self.path(moved).rename(self.path(f"moved/{moved}"))
        _, errors = self.client("moved/events.jsonl", status=1)
        self.assertIn(f"put the rejected lines into {name} (or {name}.unfinished), in the", errors)
        self.assertIn("directory where moved/events.jsonl was then.", errors)
        self.assertEqual(self.path(f"{name}.unfinished").read_bytes(), b"bad\n")

    def test_a_file_that_is_rewritten_while_it_is_sent_is_said(self):
        lines = EVENT + b"\n" + b"first" + b"\n"
        answer = b'{"accepted": 1, "rejected": [{"line": 2, "error": "wrong"}]}'
        with StoppingServer(self, answer=answer) as server:
            events = self.path("events.jsonl", lines)
            client = self.start(
                "client.py", "--url", server.url, "--give-up-after", 1000
            )
            server.wait_for_a_post()
            events.write_bytes(lines.replace(b"first", b"other"))
            server.go_on()
            output, errors = client.communicate(timeout=20)
        self.assertEqual(self.rejected_files(), [b"first\n"])
        self.assertIn("1 events accepted, 1 rejected", output)
        self.assertNotIn("changed while it was sent", errors)  # it was read before

    def test_a_file_that_is_replaced_while_it_is_sent_is_said(self):
        events = self.path("events.jsonl")
        changes = {
            "replaced": lambda: self.path("new", EVENT + b"\n" + EVENT).rename(events),
            "removed": lambda: events.unlink(),
        }
        for case, change in changes.items():
            with self.subTest(case), StoppingServer(self) as server:
                events.write_bytes(EVENT)
                client = self.start("client.py", "--url", server.url, "--give-up-after", 1000)
                server.wait_for_a_post()
                change()
                server.go_on()
                output, errors = client.communicate(timeout=20)
                self.assertIn("changed while it was sent: its name leads to another", errors)
                self.assertEqual((output[:17], client.returncode), ("1 events accepted", 1))

    def test_a_file_that_grows_while_it_is_sent_is_said(self):
        appended = {"whole lines": (EVENT + b"\n", EVENT + b"\n"), "half a line": (b"{", b"}\n")}
        for case, (before, after) in appended.items():
            with self.subTest(case), StoppingServer(self) as server:
                events = self.path("events.jsonl", before)
                client = self.start("client.py", "--url", server.url, "--give-up-after", 1000)
                server.wait_for_a_post()
                events.write_bytes(before + after)
                server.go_on()
                output, errors = client.communicate(timeout=20)
                said = f"changed while it was sent: it is no longer {len(before)} bytes long"
                self.assertIn(said, errors)
                self.assertEqual((output[:17], client.returncode), ("1 events accepted", 1))
                self.assertEqual((len(server.posts), self.state.exists()), (1, False))

    def test_new_content_after_a_whole_delivery_is_told_what_was_delivered(self):
        server = Server(self)
        events = self.path("events.jsonl", EVENT + b"\n" + EVENT + b"\nbad\n")
        with open("/dev/full", "w") as full:
            self.run_client("--url", server.url, stdout=full)
        before = self.state.read_bytes()
        events.write_bytes(EVENT + b"\n")
        _, errors = self.client("--url", server.url, status=1)
        self.assertIn("delivery began (so far 2 events accepted, 1 rejected). Restore it", errors)
        self.assertEqual(self.state.read_bytes(), before)
        self.client("--url", server.url, "--restart")
        self.assertEqual(len(ids_in(server.log)), 3)

    def test_a_file_that_is_rewritten_before_it_is_read_is_said(self):
        port = free_port()
        events = self.path("events.jsonl", EVENT + b"\n")
        client = self.start("client.py", "--url", f"http://localhost:{port}/liveEvent")
        wait_until(
            lambda: self.state.exists() and self.state.read_text(),
            "the client has begun",
        )
        events.write_bytes(EVENT.replace(b"user1", b"user9") + b"\n")
        server = Server(self, port=port)
        output, errors = client.communicate(timeout=20)
        self.assertIn("events.jsonl changed while it was sent", errors)
        self.assertEqual((output[:17], client.returncode), ("1 events accepted", 1))
        self.assertEqual(server.log.read_bytes().count(b"user9"), 1)
