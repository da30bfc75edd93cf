"""A file is delivered whole, or the client says which lines are not delivered."""

import fcntl
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import time
import unittest
import unittest.mock

import client as client_module
from tests.tools import Server, free_port, run_in_child, wait_until
from tests.tools_client import ClientTest
from tests.tools_database import setUpModule
from tests.tools_events import EVENT, ids_in, oracle, write_events
from tests.tools_faults import FaultyCalls, traced_fsync
from tests.tools_http import BATCHES, Recorder, dribbling
from tests.tools_parts import captured, opened_delivery


class Delivery(ClientTest):
    """A file has one delivery, and a delivery is of one file."""

    def test_the_client_syncs_what_it_needs_after_a_power_cut(self):
        steps = []

        def trace(name, real):
            return lambda *arguments: (steps.append(name), real(*arguments))[1]

        answer = trace(
            "request",
            lambda *_: (200, {}, b'{"accepted": 0, "rejected": [{"line": 1, "error": "wrong"}]}'),
        )
        self.path("events.jsonl", EVENT)
        calls = {"fsync": traced_fsync(self, steps), "unlink": trace("unlink", os.unlink)}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        with Recorder(
            options=[BATCHES], post=answer
        ) as server, captured(), unittest.mock.patch.multiple(os, **calls):
            self.assertEqual(
                client_module.main([str(self.path("events.jsonl")), "--url", server.url]), 1
            )
        sync = ["sync file", "sync directory"]
        self.assertEqual(steps, [*sync, "unlink", "request", *sync, "unlink", *sync])

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
                _, errors = self.client(*nowhere, "--give-up-after", 0, *arguments, status=1)
                self.assertIn("is being sent by another client", errors)
                self.assertEqual(
                    {path: path.read_bytes() for path in self.directory.iterdir()}, before
                )

    def test_a_file_that_was_replaced_while_it_was_sent_is_not_sent_by_another_client(self):
        self.path("events.jsonl", EVENT + b"\n")
        url = f"http://127.0.0.1:{free_port()}/liveEvent"
        first = self.start("client.py", "--url", url)
        wait_until(
            lambda: self.state.exists() and self.state.read_text(), "the first client has begun"
        )
        self.path("new", EVENT + b"\n").rename(self.path("events.jsonl"))
        _, errors = self.client("--restart", "--url", url, status=1)
        self.assertIn("is being sent by another client", errors)
        first.kill()
        _, errors = self.client("--url", url, "--give-up-after", "0", status=1)
        self.assertIn("going on", errors)

    def test_a_client_that_opened_a_removed_delivery_opens_it_anew(self):
        self.path("events.jsonl", EVENT)
        removed, flock = [], fcntl.flock

        def remove_once(file, operation):
            if not removed:
                removed.append(os.unlink(self.state))  # as a client does that is done just now
            flock(file, operation)

        with unittest.mock.patch.object(client_module.fcntl, "flock", remove_once), opened_delivery(
            self.path("events.jsonl")
        ) as delivery:
            self.assertEqual(json.loads(self.state.read_text())["producerId"], delivery.producer)

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
        self.assertEqual({producer for producer, _ in ids_in(server.log)}, {state["producerId"]})

    def test_a_delivery_that_an_older_client_began_is_continued(self):
        self.path("events.jsonl", EVENT + b"\n")
        producer = self.interrupted()
        self.state.write_text(self.state.read_text().rstrip("\n"))
        server = Server(self)
        self.client("--url", server.url)
        self.assertEqual(ids_in(server.log), [(producer, 1)])

    def test_it_refuses_to_go_on_with_a_changed_file_until_it_is_told_to_restart(self):
        server, state = Server(self), self.state
        events = write_events(self.path("events.jsonl"), 3)
        changes = {
            "a line was added": (
                lambda: events.write_bytes(events.read_bytes() + EVENT),
                "has changed",
            ),
            "a byte was changed": (
                lambda: events.write_bytes(events.read_bytes().replace(b': "user', b': "User')),
                "has changed",
            ),
            "the producer id is empty": (
                lambda: state.write_text(re.sub(r'Id": "[^"]+"', 'Id": ""', state.read_text())),
                "cannot be understood",
            ),
            "the state is not UTF-8": (
                lambda: state.write_bytes(b"\xff{\n"),
                "cannot be understood",
            ),
            "the state is an array": (lambda: state.write_text("[]\n"), "cannot be understood"),
            "the state is an empty line": (lambda: state.write_text("\n"), "cannot be understood"),
            "the state is nested too deep": (
                lambda: state.write_text("[" * 100_000 + "\n"),
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
        for length in range(len(line)):
            self.state.write_bytes(line[:length])
            with opened_delivery(self.path("events.jsonl")) as delivery:
                self.assertEqual(
                    json.loads(self.state.read_text())["producerId"], delivery.producer
                )
                self.assertNotIn(delivery.producer.encode(), line)

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
                    self.run_client("--url", server.url, patch=patch.format(reason))[0], status
                )
                self.assertEqual(len(ids_in(server.log)) - before, 1 - status)

    def test_a_file_that_is_shortened_meanwhile_is_not_taken_for_delivered(self):
        port = free_port()
        events = write_events(self.path("events.jsonl"), 3)
        client = self.start("client.py", "--url", f"http://localhost:{port}/liveEvent")
        wait_until(lambda: self.state.exists() and self.state.read_text(), "the client has begun")
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
                client = self.start("client.py", "--url", server.url, "--batch-size", "50")
                wait_until(
                    lambda: server.log.stat().st_size > size + 100_000, "the client is at it"
                )
                client.send_signal(number)
                output, errors = client.communicate(timeout=5)
                self.assertEqual((output, client.returncode), ("", status))
                self.assertNotIn("Traceback", errors)
                producers.add(json.loads(self.state.read_text())["producerId"])
        self.client("--url", server.url)
        self.assertEqual({producer for producer, _ in ids_in(server.log)}, producers)
        self.processor()
        self.assertRevenue(oracle(events))

    def test_a_hanging_server_does_not_hold_up_the_end(self):
        self.path("events.jsonl", EVENT)
        with dribbling(b"POST") as url:
            client = self.start("client.py", "--url", url)
            wait_until(
                lambda: self.state.exists() and self.state.read_text(), "the client has begun"
            )
            time.sleep(0.5)
            client.send_signal(signal.SIGTERM)
            self.assertEqual((client.wait(2), self.state.exists()), (143, True))


class DeliveryCalls(FaultyCalls):
    """The system calls of a client, with (device, inode) of the files that it synced."""

    def __init__(self, fault, at):
        """Look at the calls of a client, one of which goes wrong."""
        super().__init__(fault, at)
        self.synced = set()

    def after(self, name, arguments):
        """Keep what is synced."""
        if name == "fsync":
            status = os.fstat(arguments[0])
            self.synced.add((status.st_dev, status.st_ino))


class KilledAnywhere(ClientTest):
    """No call that fails, or is the last one, loses or doubles a line."""

    def deliver_with(self, sent, fault=None, at=0, restart=False):
        """Run the client in a child in which one call goes wrong; return its status, or None when
        it made fewer calls.

        The server is a stand-in that adds (producer id, sequence, line) to the file sent, and
        rejects lines without a brace.
        """
        calls = DeliveryCalls(fault, at)

        def exchange(_sender, method, body, headers):
            if method == "OPTIONS":
                return BATCHES
            synced = {
                path
                for path in (self.state, self.directory)
                if (path.stat().st_dev, path.stat().st_ino) in calls.synced
            }
            if synced != {self.state, self.directory} or not self.state.read_bytes().endswith(
                b"\n"
            ):
                os._exit(98)
            lines, first = body.split(b"\n")[:-1], int(headers["Sequence"])
            with open(sent, "a") as file:
                file.writelines(
                    f"{headers['Producer-Id']} {number} {line.decode()}\n"
                    for number, line in enumerate(lines, first)
                    if b"{" in line
                )
            bad = [
                {"line": number, "error": "bad"}
                for number, line in enumerate(lines, 1)
                if b"{" not in line
            ]
            return (
                200,
                {},
                json.dumps({"accepted": len(lines) - len(bad), "rejected": bad}).encode(),
            )

        def run():
            sys.stdout = sys.stderr = None
            arguments = [str(self.path("events.jsonl")), "--batch-size", "2"]
            if restart:
                arguments.append("--restart")
            server = unittest.mock.patch.object(client_module.Sender, "_exchange", exchange)
            with server, calls.made_by(client_module):
                status = client_module.main(arguments)
            if fault and not calls.fired:
                status = 97
            os._exit(status)

        status = run_in_child(run)
        self.assertNotIn(
            status, (98, 99), "sent before .delivery was safe" if status == 98 else "an exception"
        )
        return None if status == 97 else status

    LINES = b"".join(b'{"line": %d}\n' % number for number in range(1, 5)) + b"bad\n"

    def begin_with(self, fault, at):
        """Run the client on fresh files with one call that goes wrong; return its status and the
        file it sent to."""
        for path in self.directory.iterdir():
            path.unlink()
        self.path("events.jsonl", self.LINES)
        sent = self.path("sent", b"")
        return self.deliver_with(sent, fault, at), sent

    def assertSentOnce(self, sent, lines=LINES):
        """Check that every line was sent under one id, and that the bad one was collected once."""
        entries = {tuple(line.split(" ", 2)) for line in sent.read_text().splitlines()}
        texts = sorted(text for _, _, text in entries)
        self.assertEqual(texts, sorted(line for line in lines.decode().splitlines() if "{" in line))
        self.assertEqual(self.rejected_files(), [b"bad\n"])

    def test_no_call_that_fails_or_is_the_last_one_loses_or_doubles_a_line(self):
        for fault in FaultyCalls.FAULTS:
            for at in itertools.count(1):
                status, sent = self.begin_with(fault, at)
                if status is None:
                    break
                with self.subTest(fault=fault, call=at):
                    if self.state.exists():  # else nothing was sent, or the delivery is complete
                        self.assertEqual(self.deliver_with(sent), 1)
                    elif not sent.read_bytes():
                        self.assertEqual(self.deliver_with(sent), 1)
                    self.assertSentOnce(sent)
            least = 2 if fault in FaultyCalls.WRITE_FAULTS else 20
            self.assertGreater(at, least, f"{fault} was not injected")

    def test_a_file_that_changed_after_a_kill_is_sent_once_or_refused(self):
        other = b'{"line": 9}\nbad\n'
        changes = {
            "replaced": lambda events: self.path("new", other).rename(events),
            "cut": lambda events: os.truncate(events, self.LINES.index(b"\n") + 1),
            "appended": lambda events: events.write_bytes(self.LINES + other),
        }
        for case, change in changes.items():
            for at in itertools.count(1):
                status, sent = self.begin_with("killed before", at)
                if status is None:
                    break
                began = self.state.exists() and self.state.read_bytes().endswith(b"\n")
                before = sent.read_bytes()
                if not began and before:
                    break  # the delivery was complete
                change(self.path("events.jsonl"))
                with self.subTest(case, call=at):
                    if began:
                        self.assertEqual(self.deliver_with(sent), 1)
                        self.assertEqual(sent.read_bytes(), before)
                    sent.write_bytes(b"")
                    self.deliver_with(sent, restart=began)
                    texts = [line.split(" ", 2)[2] for line in sent.read_text().splitlines()]
                    lines = self.path("events.jsonl").read_text().splitlines()
                    self.assertEqual(sorted(texts), sorted(line for line in lines if "{" in line))
            self.assertGreater(at, 20, "the kills were not injected")
