"""A delivery that was interrupted anywhere is continued, and loses and doubles nothing."""

import contextlib
import errno
import itertools
import json
import os
import re
import subprocess
import sys
from unittest import mock

import client as client_module
from tests.tools import Server, free_port, run_in_child
from tests.tools_client import ClientTest
from tests.tools_database import HERE, setUpModule
from tests.tools_events import EVENT, ids_in
from tests.tools_faults import FaultyCalls, traced_fsync
from tests.tools_http import BATCHES, Recorder
from tests.tools_parts import captured

UNAUTHORIZED = (401, {}, b'{"error": "stop here"}')


def answer_to(body):
    """Return the answer to a batch whose lines without a brace are wrong."""
    accepted = 0
    rejected = []
    for number, line in enumerate(body.split(b"\n"), 1):
        if b"{" in line:
            accepted += 1
        elif line:
            rejected.append({"line": number, "error": "bad"})
    return 200, {}, json.dumps({"accepted": accepted, "rejected": rejected}).encode()


class Continued(ClientTest):
    """A client goes on where the one before was."""

    def deliver(self, answered, *arguments, status=1):
        """Run the client against a server that answers so many batches and refuses the others;
        return the first lines of what was answered, stdout and stderr."""
        sent = []

        def answer(number, body):
            if number >= answered:
                return UNAUTHORIZED
            return answer_to(body)

        patch = "client.CONCURRENT_REQUESTS = 1"
        with Recorder(options=[BATCHES], post=answer) as server:
            arguments = ("--batch-size", 2, *arguments)
            ended, output, errors = self.run_client("--url", server.url, *arguments, patch=patch)
            self.assertEqual(ended, status, errors)
            for headers, _ in server.posts[:answered]:
                sent.append(int(headers["Sequence"]))
        return sent, output, errors

    def test_a_client_goes_on_where_the_one_before_was(self):
        self.path("events.jsonl", (EVENT + b"\n") * 9)
        self.assertEqual(self.deliver(2)[0], [1, 3])
        self.assertEqual(self.deliver(1)[0], [5])
        sent, output, _ = self.deliver(9, status=0)
        self.assertEqual(sent, [7, 9])
        self.assertIn("9 events accepted, 0 rejected", output)
        self.assertFalse(self.state.exists())

    def test_a_note_that_is_torn_or_makes_no_sense_is_sent_again(self):
        self.path("events.jsonl", (EVENT + b"\n") * 5)
        self.deliver(2)
        first, one, two = self.state.read_bytes().splitlines(keepends=True)
        cases = {
            "torn": (one + two[:-1], [3, 5]),
            "torn before": (one[:30] + b"\n" + two, [1, 3, 5]),
            "zeros before": (b"\0" * len(one) + two, [1, 3, 5]),
            "no notes": (b"", [1, 3, 5]),
            "no line end": (None, [1, 3, 5]),
            "nested": (b"[" * 100_000 + b"\n" + two, [1, 3, 5]),
            "another number": (one.replace(b'"lines": 2', b'"lines": 3'), [1, 3, 5]),
            "no checksum": (re.sub(b', "crc32": .*}', b"}", one), [1, 3, 5]),
            "whole": (one + two, [5]),
        }
        for case, (notes, expected) in cases.items():
            with self.subTest(case):
                self.state.write_bytes(first + (notes or b""))
                if notes is None:
                    self.state.write_bytes(first.rstrip(b"\n"))
                sent, output, _ = self.deliver(9, status=0)
                self.assertEqual(sent, expected)
                self.assertIn("5 events accepted", output)

    def test_no_byte_of_a_state_file_is_believed_that_was_not_written(self):
        events = self.path("events.jsonl", (EVENT + b"\n") * 5)
        self.deliver(2)
        written = self.state.read_bytes()
        with contextlib.closing(client_module.StateFile(str(events))) as state:
            content = state.load(False)
        progress = [client_module.Progress(*[n, n * len(EVENT + b"\n"), n, 0]) for n in (0, 2, 4)]
        self.assertEqual(state.progress, progress[2])
        refused = 0
        for at, bit in itertools.product(range(len(written)), range(8)):
            damaged = bytearray(written)
            damaged[at] ^= 1 << bit
            self.state.write_bytes(damaged)
            with contextlib.closing(client_module.StateFile(str(events))) as found:
                try:
                    self.assertEqual(found.load(False), content)
                except client_module.Failure:
                    refused += 1
                    continue
                self.assertEqual(found.producer_id, state.producer_id)
                self.assertIn(found.progress, progress)
        self.assertGreater(refused, 500)

    def test_the_rejected_lines_of_all_clients_are_together_in_the_end(self):
        self.path("events.jsonl", b"\xff\x00bad\r\n" + EVENT + b"\n\n" + EVENT + b"\nworse")
        self.deliver(2)
        self.assertEqual(self.rejected_files(), [])
        _, output, errors = self.deliver(1)
        self.assertIn("2 events accepted, 2 rejected", output, errors)
        self.assertEqual(self.rejected_files(), [b"\xff\x00bad\r\nworse\n"])
        self.assertIn("events.jsonl:5: bad\n", errors)

    def test_rejected_lines_that_were_published_are_the_users(self):
        dealt_with = {
            "mended": lambda collected: collected.write_bytes(EVENT),
            "removed": lambda collected: collected.unlink(),
        }
        for case, deal_with in dealt_with.items():
            with self.subTest(case):
                self.path("events.jsonl", b"bad\n" + EVENT + b"\n")
                with open("/dev/full", "w") as full:
                    with Recorder(
                        options=[BATCHES], post=lambda _, body: answer_to(body)
                    ) as server:
                        status, _, errors = self.run_client("--url", server.url, stdout=full)
                self.assertIn("the receipt cannot be printed: No space left on device", errors)
                self.assertEqual((status, self.rejected_files()), (1, [b"bad\n"]))
                [collected] = self.directory.glob("events.jsonl.rejected-*")
                deal_with(collected)
                before = self.rejected_files()
                sent, output, errors = self.deliver(0)
                self.assertEqual((sent, self.rejected_files()), ([], before))
                self.assertIn(f"put the rejected lines into {collected.name} (or ", errors)
                self.assertIn("1 events accepted, 1 rejected", output)
                self.assertFalse(self.state.exists())
                collected.unlink(missing_ok=True)

    def test_the_file_of_rejected_lines_is_noted_with_all_that_was_answered(self):
        self.path("events.jsonl", b"bad\n\n" + EVENT + b"\n")
        append = client_module.StateFile._append
        notes = []

        def append_no_second_note(state, line):
            notes.append(line)
            if len(notes) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(state, line)

        with (
            Recorder(options=[BATCHES], post=lambda _, body: answer_to(body)) as server,
            mock.patch.object(client_module.StateFile, "_append", append_no_second_note),
            captured(),
            open("/dev/full", "w") as sys.stdout,
        ):
            arguments = (self.path("events.jsonl"), "--url", server.url, "--batch-size", 2)
            self.assertEqual(self.run_here(*arguments), 1)
        self.assertEqual(len(notes), 4)
        sent, output, errors = self.deliver(0)
        self.assertEqual(sent, [])
        self.assertIn("An earlier run has put", errors)
        self.assertIn("1 events accepted, 1 rejected", output)

    def test_a_file_that_is_in_the_way_of_rejected_lines_is_not_overwritten(self):
        self.path("events.jsonl", b"bad\n" + EVENT)
        producer_id = self.interrupted()
        other = self.path(f"events.jsonl.rejected-{producer_id}", b"ba")
        sent, _, errors = self.deliver(9)
        self.assertEqual((sent, other.read_bytes()), ([], b"ba"))
        self.assertIn(f"{other} is in the way", errors)
        other.unlink()

        def answer(_number, body):
            other.write_bytes(b"ba")
            return answer_to(body)

        with Recorder(options=[BATCHES], post=answer) as server:
            _, errors = self.client("--url", server.url, status=1)
        self.assertIn(f"{other} is in the way", errors)
        other.rename(self.path("other"))
        self.assertEqual(self.deliver(9)[0], [])
        self.assertEqual(self.rejected_files(), [b"bad\n"])

    def test_a_name_too_long_for_rejected_lines_is_said_before_a_request(self):
        name = "n" * 220
        self.path(name, b"bad\n")
        with Recorder(options=[BATCHES], post=lambda _, body: answer_to(body)) as server:
            _, errors = self.client(name, "--url", server.url, status=1)
            self.assertIn("The rejected lines cannot be kept in", errors)
            self.assertIn("File name too long", errors)
            self.assertEqual(server.posts, [])
            longest = "n" * (255 - len(".rejected-.unfinished") - 22)
            self.path(longest, b"bad\n")
            _, errors = self.client(longest, "--url", server.url, status=1)
            self.assertIn("mend them, then send that file", errors)

    def test_a_killed_clients_unfinished_file_is_in_nobodys_way(self):
        self.path("events.jsonl", b"bad\n" + EVENT)
        producer_id = self.interrupted()
        left = self.path(f"events.jsonl.rejected-{producer_id}.unfinished", b"ba")
        self.deliver(9)
        self.assertEqual((self.rejected_files(), left.exists()), ([b"bad\n"], False))

    def test_a_receipt_that_could_not_be_printed_is_printed_later(self):
        self.path("events.jsonl", EVENT + b"\n")
        receiver, broken = os.pipe()
        os.close(receiver)
        server = Server(self)
        with open("/dev/full", "w") as full, open(broken, "w") as pipe:
            for case, stdout, words in (
                ("full", full, "No space left on device"),
                ("broken", pipe, "Broken pipe"),
            ):
                with self.subTest(case):
                    before = len(ids_in(server.log))
                    ended, _, errors = self.run_client("--url", server.url, stdout=stdout)
                    self.assertEqual((ended, self.state.exists()), (1, True))
                    self.assertIn(f"the receipt cannot be printed: {words}", errors)
                    nowhere = f"http://localhost:{free_port()}/"
                    output, errors = self.client("--url", nowhere)
                    self.assertIn("1 events accepted, 0 rejected", output)
                    self.assertFalse(self.state.exists())
                    self.assertEqual(len(ids_in(server.log)) - before, 1)

    def test_a_stdout_that_was_closed_from_the_start_asks_for_no_receipt(self):
        self.path("events.jsonl", EVENT + b"\n")
        server = Server(self)
        command = f'exec "{sys.executable}" "{HERE}/client.py" --url {server.url} >&-'
        run = subprocess.run(["sh", "-c", command], cwd=self.directory)
        self.assertEqual(run.returncode, 0)
        self.assertFalse(self.state.exists())


class NoRoom(ClientTest):
    """A disk without room for notes stops no more than it must."""

    def deliver_without_room(self, room):
        """Run the client in this process while its state file has so many bytes of room behind
        its first line; return the exit status and what it printed."""
        real = os.write

        def write(fd, data):
            if os.path.samestat(os.fstat(fd), os.stat(self.state)):
                begun = self.state.read_bytes().find(b"\n") + 1
                left = begun + room - os.fstat(fd).st_size
                if begun and left <= 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                if begun:
                    data = data[:left]
            return real(fd, data)

        with (
            Recorder(options=[BATCHES], post=lambda _, body: answer_to(body)) as server,
            captured() as printed,
            mock.patch.object(client_module.os, "write", write),
        ):
            events = self.path("events.jsonl")
            status = self.run_here(events, "--url", server.url, "--batch-size", 2)
            return status, printed()

    def test_a_disk_without_room_for_notes_stops_no_delivery(self):
        self.path("events.jsonl", (EVENT + b"\n") * 9)
        status, printed = self.deliver_without_room(100)
        self.assertEqual(status, 0, printed)
        self.assertIn("9 events accepted", printed)

    def test_rejected_lines_that_cannot_be_kept_stop_the_client_until_there_is_room(self):
        self.path("events.jsonl", (EVENT + b"\n") * 4 + b"bad\n")
        status, printed = self.deliver_without_room(20)
        self.assertEqual((status, self.rejected_files()), (1, []))
        self.assertIn("events.jsonl.delivery: No space left on device", printed)
        self.assertIn("Delivery is unknown from line 5 on.", printed)
        status, printed = self.deliver_without_room(10_000)
        self.assertEqual((status, self.rejected_files()), (1, [b"bad\n"]))
        self.assertIn("4 events accepted, 1 rejected", printed)


class DeliveryCalls(FaultyCalls):
    """The system calls of a client, with (device, inode) of the files that it synced."""

    CALLS = [*FaultyCalls.CALLS, "rename"]

    def __init__(self, fault, at):
        """Look at the calls of a client, one of which goes wrong."""
        super().__init__(fault, at)
        self.synced = set()

    def after(self, name, arguments):
        """Keep what is synced."""
        if name == "fsync":
            status = os.fstat(arguments[0])
            self.synced.add((status.st_dev, status.st_ino))

    def has_synced(self, *paths):
        """Tell whether all of these files were synced."""
        files = {(path.stat().st_dev, path.stat().st_ino) for path in paths}
        return files <= self.synced


class KilledAnywhere(ClientTest):
    """No call that fails, or is the last one, loses or doubles a line."""

    LINES = b"".join(b'{"line": %d}\n' % number for number in range(1, 5)) + b"bad\n"
    NOT_SAFE = 98  # exit status: a line was sent before .delivery was safe
    NOT_FIRED = 97  # exit status: the client made fewer calls

    def setUp(self):
        """Name the files of what was sent and printed."""
        super().setUp()
        self.sent = self.path("sent")
        self.receipts = self.path("receipts")

    def deliver_with(self, fault=None, at=0, restart=False):
        """Run the client in a child in which one call goes wrong; return its status, or None when
        it made fewer calls.

        The server is a stand-in that adds (producer id, sequence, line) to the file of what was
        sent, and rejects lines without a brace.
        """
        calls = DeliveryCalls(fault, at)

        def send_once(_sender, method, body, headers, _expected):
            answer = http_answer(*BATCHES)
            if method == "POST":
                begun = b"\n" in self.state.read_bytes()
                if not begun or not calls.has_synced(self.state, self.directory):
                    os._exit(self.NOT_SAFE)
                self.record(_sender._headers["Producer-Id"], headers["Sequence"], body)
                answer = http_answer(*answer_to(body))
            return answer

        def run():
            arguments = [str(self.path("events.jsonl")), "--batch-size", "2"]
            if restart:
                arguments.append("--restart")
            server = mock.patch.object(client_module.Sender, "_send_once", send_once)
            sys.stderr = None
            with (
                open(self.receipts, "a") as sys.stdout,
                server,
                calls.made_by(client_module),
            ):
                status = client_module.main(arguments)
            if fault and not calls.fired:
                status = self.NOT_FIRED
            os._exit(status)

        status = run_in_child(run)
        self.assertNotEqual(status, self.NOT_SAFE, "sent before .delivery was safe")
        self.assertIn(status, (0, 1, FaultyCalls.KILLED, self.NOT_FIRED), "an exception")
        if status == self.NOT_FIRED:
            return None
        return status

    def record(self, producer_id, first, body):
        """Add the good lines of a batch to the file of what was sent."""
        with open(self.sent, "a") as file:
            for number, line in enumerate(body.decode().splitlines(), int(first)):
                if "{" in line:
                    file.write(f"{producer_id} {number} {line}\n")

    def begin_with(self, fault, at):
        """Run the client on fresh files with one call that goes wrong; return its status."""
        for path in self.directory.iterdir():
            path.unlink()
        self.path("events.jsonl", self.LINES)
        self.path("sent", b"")
        self.path("receipts", b"")
        return self.deliver_with(fault, at)

    def is_unfinished(self):
        """Tell whether a delivery is to be continued."""
        return self.state.exists() and b"\n" in self.state.read_bytes()

    def assertSentOnce(self):
        """Check that every line was sent under one id, and that the bad one was collected once."""
        entries = {tuple(line.split(" ", 2)) for line in self.sent.read_text().splitlines()}
        texts = sorted(text for _, _, text in entries)
        good = sorted(line for line in self.LINES.decode().splitlines() if "{" in line)
        self.assertEqual(texts, good)
        self.assertEqual(self.rejected_files(), [b"bad\n"])
        self.assertIn("4 events accepted, 1 rejected", self.receipts.read_text())

    def test_no_call_that_fails_or_is_the_last_one_loses_or_doubles_a_line(self):
        for fault in FaultyCalls.FAULTS:
            for at in itertools.count(1):
                status = self.begin_with(fault, at)
                if status is None:
                    break
                with self.subTest(fault=fault, call=at):
                    # Else the delivery is complete.
                    if self.is_unfinished() or not self.sent.read_bytes():
                        self.assertEqual(self.deliver_with(), 1)
                    self.assertSentOnce()
            least = 20
            if fault in FaultyCalls.WRITE_FAULTS:
                least = 4
            self.assertGreater(at, least, f"{fault} was not injected")

    def test_rejected_lines_that_the_user_removed_never_come_back(self):
        unfinished = 0
        for fault, at in itertools.product(("killed before", "killed after"), range(1, 100)):
            if self.begin_with(fault, at) is None:
                continue
            published = list(self.directory.glob("events.jsonl.rejected-*[!d]"))
            for path in published:
                path.unlink()
            if not self.is_unfinished():
                continue
            with self.subTest(fault=fault, call=at):
                unfinished += len(published)
                self.assertEqual(self.deliver_with(), 1)
                expected = [b"bad\n"]
                if published:
                    expected = []
                self.assertEqual(self.rejected_files(), expected)
        self.assertGreater(unfinished, 5, "no kill came between the file and the end")

    def test_a_file_that_changed_after_a_kill_is_sent_once_or_refused(self):
        other = b'{"line": 9}\nbad\n'
        changes = {
            "replaced": lambda events: self.path("new", other).rename(events),
            "cut": lambda events: os.truncate(events, self.LINES.index(b"\n") + 1),
            "appended": lambda events: events.write_bytes(self.LINES + other),
        }
        for case, change in changes.items():
            for at in itertools.count(1):
                if self.begin_with("killed before", at) is None:
                    break
                began = self.is_unfinished()
                before = self.sent.read_bytes()
                if not began and before:
                    break  # the delivery was complete
                change(self.path("events.jsonl"))
                with self.subTest(case, call=at):
                    if began:
                        self.assertEqual(self.deliver_with(), 1)
                        self.assertEqual(self.sent.read_bytes(), before)
                    self.sent.write_bytes(b"")
                    self.deliver_with(restart=began)
                    sent = self.sent.read_text().splitlines()
                    texts = sorted(line.split(" ", 2)[2] for line in sent)
                    lines = self.path("events.jsonl").read_text().splitlines()
                    self.assertEqual(texts, sorted(line for line in lines if "{" in line))
            self.assertGreater(at, 20, "the kills were not injected")

    def test_what_must_survive_a_power_cut_is_synced_before_it_is_relied_on(self):
        steps = []

        def answer(_number, body):
            steps.append("request")
            return answer_to(body)

        rename = os.rename

        def traced_rename(old, new):
            steps.append("rename")
            rename(old, new)

        def ftruncate(fd, length):
            steps.append("cut")
            os.truncate(fd, length)

        self.path("events.jsonl", EVENT + b"\nbad\n")
        calls = {"fsync": traced_fsync(self, steps), "ftruncate": ftruncate}
        calls |= {"rename": traced_rename, "unlink": lambda path: None}
        with (
            Recorder(options=[BATCHES], post=answer) as server,
            captured(),
            mock.patch.multiple(os, **calls),
        ):
            self.assertEqual(self.run_here(self.path("events.jsonl"), "--url", server.url), 1)
        begun = ["cut", "sync file", "sync directory"]
        note = ["cut"]
        collected = ["sync file", "sync directory"]
        last_note = ["cut", "sync file"]
        published = ["rename", "sync directory"]
        receipt = ["sync file"]
        end = ["cut", "sync file", "sync directory"]
        expected = [*begun, "request", *note, *collected, *last_note, *published, *receipt, *end]
        self.assertEqual(steps, expected)


def http_answer(status, headers, body):
    """Return the client's Answer."""
    message = client_module.http.client.HTTPMessage()
    for name, value in {"Content-Type": "application/json", **headers}.items():
        message[name] = value
    return client_module.Answer(status, message, body)
