"""An acknowledged event survives a disk that is full, slow or broken."""

import collections
import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import tempfile
import unittest
import unittest.mock

from tests.tools import Server, SystemTest, wait_until
from tests.tools_database import setUpModule
from tests.tools_events import EVENT, ids_in, with_id
from tests.tools_faults import traced_fsync
from tests.tools_http import Answers, post, read_answer, request
from tests.tools_parts import append, captured, opened_log


class Disk(SystemTest):
    """The server answers as its disk does."""

    def test_the_log_is_for_its_user_and_group_alone(self):
        previous = os.umask(0)
        try:
            self.assertEqual(stat.S_IMODE(Server(self).log.stat().st_mode), 0o640)
        finally:
            os.umask(previous)

    def test_a_file_system_that_cannot_sync_directories_is_no_failure(self):
        server = Server(
            self,
            patch="""
import errno, os
def fail(fd):
    raise OSError(errno.EINVAL, "Invalid argument")
os.fsync = fail
""",
        )
        self.assertEqual(server.post(EVENT)[0], 200)

    def test_a_log_that_cannot_be_opened_any_more_is_waited_for(self):
        self.path("logs").mkdir()
        server = Server(self, "--workers", "1", log="logs/log")
        self.assertEqual(server.post(EVENT)[0], 200)
        self.path("logs").rename(self.path("gone"))
        (worker,) = server.workers()
        self.assertEqual([server.post(EVENT)[0] for _ in range(2)], [503, 503])
        self.path("logs").mkdir()
        self.assertEqual(server.post(EVENT)[0], 200)
        self.assertEqual((server.workers(), len(ids_in(server.log))), ([worker], 1))
        expected = [
            "the log cannot be written: No such file or directory.",
            "the log can be written again.",
        ]
        wait_until(
            lambda: [line.split(": ", 1)[1] for line in server.said()] == expected,
            "the trouble and its end are said",
        )

    def test_a_failed_sync_of_the_directory_is_final_too(self):
        path = self.path("log")
        with opened_log(path) as log, captured():
            path.rename(self.path("rotated"))
            with unittest.mock.patch.object(
                os, "fsync", side_effect=OSError(errno.EIO, "Input/output error")
            ):
                self.assertRaises(OSError, append, log, with_id("p", 1).encode())
            self.assertRaises(OSError, append, log, with_id("p", 1).encode())
            self.assertIn("sync failed", log.failure)

    def test_a_new_log_has_its_directory_synced(self):
        steps = []
        elsewhere = tempfile.mkdtemp(dir=self.directory)
        os.symlink(self.path("log"), f"{elsewhere}/link")
        with unittest.mock.patch.object(os, "fsync", traced_fsync(self, steps)):
            for path in (f"{elsewhere}/link", self.path("log")):
                with opened_log(path):
                    pass
        self.assertEqual(steps, 2 * ["sync directory"])

    def small_disk(self):
        """Return a directory on a disk of 64 KiB, or None where none can be mounted."""
        disk = self.path("disk")
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            return None
        self.addCleanup(subprocess.run, ["umount", "--lazy", disk])
        return disk

    def test_a_full_disk_is_answered_with_507_until_there_is_space(self):
        disk = self.small_disk()
        server = Server(self, log="disk/log")

        def limit_files(size):
            for worker in server.workers():
                resource.prlimit(worker, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        if not disk:
            limit_files(64 * 1024)
        acknowledged = set()
        statuses = collections.Counter()
        batch = b"".join(EVENT[:-1] + b', "pad": "' + b"x" * 1000 + b'"}\n' for _ in range(10))
        for sequence in range(1, 200, 10):
            status, _ = server.post(
                batch, "application/x-ndjson", Producer_Id="p", Sequence=sequence
            )
            statuses[status] += 1
            if status == 200:
                acknowledged |= {("p", n) for n in range(sequence, sequence + 10)}
        self.assertEqual(set(statuses), {200, 507})
        self.assertEqual(set(ids_in(server.log)), acknowledged)
        self.assertEqual(server.ask("GET", "/health")[0], 200)
        if disk:
            subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        else:
            limit_files(resource.RLIM_INFINITY)
        self.assertEqual(
            server.post(batch, "application/x-ndjson", Producer_Id="p", Sequence=1001)[0], 200
        )
        self.assertEqual(
            set(ids_in(server.log)), acknowledged | {("p", n) for n in range(1001, 1011)}
        )
        words = "No space left on device"
        if not disk:
            words = "File too large"
        expected = {f"the log cannot be written: {words}.", "the log can be written again."}
        wait_until(
            lambda: {line.split(": ", 1)[1] for line in server.said()} == expected,
            "the trouble and its end are said",
        )

    SLOW_DISK = (
        "import time; real = server.sync_file; server.STOP_SECONDS = 60\n"
        "server.sync_file = lambda fd: (time.sleep(0.5), real(fd))"
    )

    def test_answers_keep_their_order_on_a_slow_disk(self):
        server = Server(self, "--workers", "1", patch=self.SLOW_DISK)
        with contextlib.ExitStack() as stack:
            pipelined, closing = (
                [stack.enter_context(server.connect()) for _ in range(4)] for _ in range(2)
            )
            for (
                wire
            ) in pipelined:  # some lead their group, the others' answers are sent by its leader
                wire.sendall(post(body=EVENT) + request("GET", "/health"))
            for wire in closing:
                wire.sendall(post("Connection: close", body=EVENT))
            for wire in pipelined:
                answers = Answers(wire)
                self.assertIn(b"received", read_answer(answers)[2])
                self.assertIn(b"ok", read_answer(answers)[2])
            for wire in closing:
                self.assertEqual(read_answer(wire)[0], 200)

    def test_a_server_that_stops_answers_everyone_on_a_slow_disk(self):
        server = Server(self, "--workers", "1", patch=self.SLOW_DISK)
        self.assertEqual(server.post(EVENT)[0], 200)
        with server.connect(), server.connect() as waiting:  # an idle connection holds nothing up
            size = server.log.stat().st_size
            waiting.sendall(post(body=EVENT))
            wait_until(
                lambda: server.log.stat().st_size > size, "the event is written, and being synced"
            )
            (worker,) = server.workers()
            os.kill(worker, signal.SIGSTOP)
            with contextlib.ExitStack() as stack:
                late = [
                    stack.enter_context(server.connect()) for _ in range(50)
                ]  # accepted by the kernel alone
                for wire in late:
                    wire.sendall(post(body=EVENT))
                for number in (
                    signal.SIGTERM,
                    signal.SIGINT,
                ):  # a terminal or systemd tells everyone
                    os.kill(worker, number)
                server.process.terminate()
                os.kill(worker, signal.SIGCONT)
                self.assertEqual({read_answer(wire)[0] for wire in (waiting, *late)}, {200})
            self.assertEqual(server.process.wait(20), 0)

    def test_a_failed_sync_ends_the_server_without_an_acknowledgement(self):
        trigger = self.path("trigger")
        server = Server(
            self,
            patch=f"""
import errno, os, time
real, failed = server.sync_file, []
def sync(fd):
    if os.path.exists({str(trigger)!r}) and not failed:
        failed.append(time.sleep(0.2))
        raise OSError(errno.ENOSPC, "No space left on device")
    real(fd)
server.sync_file = sync
""",
        )
        self.assertEqual(server.post(EVENT)[0], 200)
        trigger.touch()
        wires = [server.connect() for _ in range(10)]
        answers = []
        for wire in wires:
            wire.sendall(post(body=EVENT))
        for wire in wires:
            with wire, contextlib.suppress(
                ConnectionError
            ):  # the server ends: some are not accepted any more
                status, _, body = read_answer(wire)
                answers.append(status)
                self.assertIn(b"may or may not count", body)
        self.assertEqual(set(answers), {503})
        self.assertEqual(server.process.wait(10), 1)
        errors = server.errors.read_text()
        self.assertIn("No space left on device", errors)
        self.assertIn("Look at the end of the log, whose last lines", errors)
        self.assertIn(f"such as {server.log}.1", errors)
