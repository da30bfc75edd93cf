"""What the client prints."""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import termios
from unittest import mock

import client as client_module
from tests.tools import TEXT, Server, fill, free_port, next_line, open_terminal, wait_until
from tests.tools_client import ClientTest
from tests.tools_database import HERE, setUpModule
from tests.tools_events import EVENT, ids_in
from tests.tools_faults import MANY_DESCRIPTORS
from tests.tools_http import BATCHES, Recorder


class ClientWords(ClientTest):
    """What goes wrong in a sender's world is one sentence, and printing it decides nothing."""

    def test_progress_is_shown_on_a_terminal_alone(self):
        parent, terminal = open_terminal()
        self.addCleanup(os.close, parent)
        self.path("events.jsonl", EVENT + b"\n")
        with Recorder(
            options=[BATCHES],
            post=lambda count, body: (200, {}, b'{"accepted": 1, "rejected": []}'),
        ) as server:
            arguments = ("--url", server.url, "--give-up-after", 1000)
            self.assertEqual(self.run_client(*arguments, stderr=terminal)[0], 0)
            os.close(terminal)
            self.assertIn(b"\r\033[K1 events, 100%", os.read(parent, 10_000))
            self.assertNotIn("100%", self.run_client(*arguments)[2])

    def test_stderr_that_cannot_be_written_changes_no_outcome(self):
        server = Server(self)
        receiver, broken = os.pipe()
        os.close(receiver)
        self.addCleanup(os.close, broken)
        full = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, full)
        for case, stream in {"broken": broken, "full": full, "closed": None}.items():
            with self.subTest(case):
                before = len(ids_in(server.log))
                self.path("events.jsonl", EVENT + b"\nbad\n")
                command = [sys.executable, HERE / "client.py", "--url", server.url]
                if stream is None:
                    command = ["sh", "-c", 'exec 2>&-; exec "$@"', "sh", *command]
                run = subprocess.run(
                    command, cwd=self.directory, stdout=subprocess.PIPE, stderr=stream, **TEXT
                )
                self.assertIn("1 events accepted, 1 rejected", run.stdout)
                self.assertEqual((run.returncode, self.state.exists()), (1, False))
                self.assertEqual(len(ids_in(server.log)) - before, 1)
        for arguments, status in ((["--help"], 0), (["--unknown"], 2)):
            run = subprocess.run(
                [sys.executable, HERE / "client.py", *arguments],
                cwd=self.directory,
                stdout=full,
                stderr=full,
            )
            self.assertEqual(run.returncode, status)

    def test_a_stderr_that_takes_nothing_is_not_waited_for(self):
        receiver, full = os.pipe()
        terminal_side, terminal = open_terminal()
        for descriptor in (receiver, full, terminal_side, terminal):
            self.addCleanup(os.close, descriptor)
        fill(full)
        termios.tcflow(terminal, termios.TCOOFF)  # as Ctrl-S does
        wire, peer = socket.socketpair()
        self.addCleanup(wire.close)
        self.addCleanup(peer.close)
        fill(wire.fileno())
        server = Server(self)
        streams = {"a full pipe": full, "a stopped terminal": terminal, "a socket": wire.fileno()}
        for case, stream in streams.items():
            with self.subTest(case):
                self.path("events.jsonl", EVENT + b"\n" + b"bad\n" * 2000)
                status, output, _ = self.run_client("--url", server.url, stderr=stream)
                self.assertIn("1 events accepted, 2,000 rejected", output)
                self.assertEqual((status, self.state.exists()), (1, False))
                self.assertTrue(os.get_blocking(stream))

    def test_how_many_lines_were_dropped_is_said(self):
        receiver, sender = os.pipe()
        self.addCleanup(os.close, receiver)
        os.set_blocking(receiver, False)  # what is not there yet does not come
        with open(sender, "w") as stream, mock.patch.object(sys, "stderr", stream):
            lines = 0
            while not client_module.STDERR.dropped:
                lines += 1
                client_module.warn("x" * 1000)
            for _ in range(2):
                client_module.warn("dropped, too")
            printed = os.read(receiver, 10**6)
            client_module.warn("at last")
            self.assertEqual(client_module.STDERR.dropped, 0)
        self.assertEqual(printed.count(b"x" * 1000 + b"\n"), lines - 1)
        said = b"(3 lines could not be printed here.)\nat last\n"
        self.assertTrue(os.read(receiver, 10**6).endswith(said))

    def test_a_receipt_is_waited_for(self):
        receiver, full = os.pipe()
        self.addCleanup(os.close, receiver)
        fill(full)
        server = Server(self)
        self.path("events.jsonl", EVENT)
        command = [sys.executable, HERE / "client.py", "--url", server.url]
        with subprocess.Popen(
            command, cwd=self.directory, stdout=full, stderr=subprocess.PIPE, **TEXT
        ) as client:
            self.addCleanup(client.kill)
            os.close(full)
            self.assertIn("The receipt waits for stdout", next_line(client.stderr))
            self.assertTrue(self.state.read_bytes())
            printed = bytearray()
            os.set_blocking(receiver, False)

            def printed_all():
                with contextlib.suppress(BlockingIOError):
                    printed.extend(os.read(receiver, 100_000))
                return printed.endswith(b" s\n")

            wait_until(printed_all, "the receipt is printed")
            self.assertEqual(client.wait(20), 0)
        self.assertIn(b"x1 events accepted, 0 rejected", printed)
        self.assertFalse(self.state.exists())

    def test_progress_fits_the_terminal(self):
        terminal_side, terminal = open_terminal()
        self.addCleanup(os.close, terminal_side)
        os.set_blocking(terminal_side, False)
        termios.tcsetwinsize(terminal, (24, 20))
        with open(terminal, "w") as stream, mock.patch.object(sys, "stderr", stream):
            client_module.show_progress("1234567890" * 10)
            self.assertEqual(os.read(terminal_side, 1000), b"\r\033[K1234567890123456789")

    def test_a_name_with_an_at_sign_is_shown_whole(self):
        name = "in/2026-11-28T10:15@till7.jsonl"
        _, errors = self.client(name, status=1)
        self.assertIn(f"{name}: No such file or directory", errors)

    def test_help_is_there_without_docstrings(self):
        command = [sys.executable, "-OO", HERE / "client.py", "--help"]
        run = subprocess.run(command, capture_output=True, **TEXT)
        self.assertIn("python client.py events.jsonl --url", run.stdout)
        self.assertEqual((run.returncode, run.stderr), (0, ""))

    def test_what_is_opened_is_closed(self):
        server = Server(self)
        self.path("events.jsonl", EVENT + b"\nbad\n")
        code = "import gc, client; status = client.main(); gc.collect(); raise SystemExit(status)"
        command = [sys.executable, "-X", "dev", "-W", "always", "-c", code]
        for url in (server.url, f"http://localhost:{free_port()}/"):
            with self.subTest(url):
                run = subprocess.run(
                    [*command, "--url", url, "--give-up-after", "0"],
                    cwd=self.directory,
                    env=os.environ | {"PYTHONPATH": str(HERE)},
                    capture_output=True,
                    **TEXT,
                )
                self.assertEqual(run.returncode, 1)
                self.assertNotIn("Warning", run.stderr)

    def test_no_text_from_elsewhere_is_obeyed_by_a_terminal(self):
        name = os.fsdecode("журнал".encode() + b"\xff\033[2J.jsonl")
        events = self.path(name, EVENT)
        words = json.dumps({"error": "a\033[31mb\r\nc\u0085 \u202e \ud800 é"}).encode()
        with Recorder(
            options=[(404, {}, b"")], post=lambda count, body: (400, {}, words)
        ) as server:
            for encoding, name in (
                ("ascii", "\\u0436\\u0443\\u0440\\u043d\\u0430\\u043b"),
                ("utf-8", "журнал"),
            ):
                with self.subTest(encoding):
                    _, errors = self.client(
                        events.name,
                        "--url",
                        server.url,
                        "--restart",
                        status=1,
                        PYTHONUTF8="1",  # whatever the locale of the tests
                        PYTHONIOENCODING=encoding,
                    )
                    self.assertIn(
                        f"{name}\\udcff\\x1b[2J.jsonl:1: a\\x1b[31mb\\r\\nc\\x85 \\u202e \\ud800 ",
                        errors,
                    )
                    self.assertTrue(errors.replace("\n", "").isprintable())

    def test_no_password_is_printed(self):
        self.path("events.jsonl", EVENT)
        cases = {
            "in --url": (["--url", "http://till:S3cret@localhost:1/liveEvent"], {}, 2),
            "in --url, with a slash": (
                ["--url", "http://till:S3cret/x@localhost:1/liveEvent"],
                {},
                2,
            ),
            "in the place of the file": (["http://till:S3cret@localhost/"], {}, 1),
            "in the place of nothing": (["events.jsonl", "http://till:S3cret@localhost/"], {}, 2),
            "in a header with a line end": ([], {"EVENTS_AUTHORIZATION": "S3cret\r\nX: y"}, 1),
            "in a header with a NUL's neighbour": ([], {"EVENTS_AUTHORIZATION": "S3cret\x01"}, 1),
            "in a header": (
                ["--url", "http://127.0.0.1:1/"],
                {"EVENTS_AUTHORIZATION": "S3cret"},
                1,
            ),
            "in a malformed proxy": (
                ["--url", "http://example.invalid/"],
                {"http_proxy": "http://u:S3cret"},
                1,
            ),
        }
        for case, (arguments, environment, status) in cases.items():
            with self.subTest(case):
                output, errors = self.client(
                    *arguments, "--give-up-after", 0, status=status, **environment
                )
                self.assertNotIn("S3cret", output + errors)
                self.assertTrue(errors)
        self.assertIn(
            "EVENTS_AUTHORIZATION is malformed",
            self.client(status=1, EVENTS_AUTHORIZATION="a\nb")[1],
        )

    def test_what_is_typed_wrong_is_said_in_a_sentence(self):
        os.mkfifo(self.path("pipe"))
        self.path("e", EVENT)
        cases = {
            "a missing file": (["missing"], 1, "missing: No such file or directory"),
            "a directory": ([self.directory], 1, "is not a regular file. Give"),
            "a pipe": (["pipe"], 1, "pipe: is not a regular file."),
            "a device": (["/dev/null"], 1, "/dev/null: is not a regular file."),
            "a directory that is missing": (["missing/e"], 1, "No such file or directory"),
            "batches of 0": (["--batch-size", "0"], 2, "--batch-size must be"),
            "batches of 10,001": (["--batch-size", "10001"], 2, "--batch-size must be"),
            "a negative time": (["--give-up-after", "-1"], 2, "--give-up-after must"),
            "a URL without a scheme": (["--url", "localhost:8000"], 2, "--url must look like"),
            "a URL with half an address": (["--url", "http://[::1/"], 2, "--url must look like"),
            "a URL with a port too large": (
                ["--url", "http://localhost:99999/"],
                2,
                "--url must look like",
            ),
            "an empty name": ([""], 2, "the name of the file is empty"),
            "a URL of FTP": (["--url", "ftp://x/"], 2, "--url must look like"),
            "a malformed host": (["e", "--url", "http://a..b/liveEvent"], 1, "is malformed"),
        }
        for case, (arguments, status, words) in cases.items():
            with self.subTest(case):
                _, errors = self.client(*arguments, status=status)
                self.assertIn(words, errors)

    def test_a_full_disk_is_said_in_a_sentence(self):
        self.path("events.jsonl", EVENT)
        _, _, errors = self.run_client(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        )
        self.assertIn(
            "events.jsonl.delivery: File too large. Give client.py a file that it can read, "
            "in a directory where it can write, then",
            errors,
        )

    def test_descriptors_of_any_number_are_served(self):
        server = Server(self)
        self.path("events.jsonl", EVENT)
        self.client("--url", server.url, patch=MANY_DESCRIPTORS)
        self.assertEqual(len(ids_in(server.log)), 1)

    def test_a_missing_module_is_said_in_a_sentence(self):
        server = Server(self)
        self.path("events.jsonl", EVENT)
        run = subprocess.run(
            [sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; import client"],
            cwd=HERE,
            capture_output=True,
            text=True,
        )
        self.assertEqual(
            (run.returncode, run.stderr),
            (1, "client.py locks files with fcntl: it needs Linux or macOS, or WSL on Windows.\n"),
        )
        without = [
            "-c",
            "import sys; sys.modules['ssl'] = None; import client; sys.exit(client.main())",
        ]
        for url, status, words in (("https://localhost/", 2, "no ssl module"), (server.url, 0, "")):
            with self.subTest(url):
                run = subprocess.run(
                    [sys.executable, *without, "--url", url],
                    cwd=self.directory,
                    capture_output=True,
                    text=True,
                    env=os.environ | {"PYTHONPATH": str(HERE)},
                )
                self.assertEqual((run.returncode, words in run.stderr), (status, True), run.stderr)
