"""What tests of the client share."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import client as client_module
from tests.tools import TEXT, SystemTest, free_port, patched


ACCEPTED = b'{"accepted": 1, "rejected": []}'


class RawServer:
    """A server of batches that lets a function handle each POST on the socket.

    posts   how many POSTs have come
    url     where it takes them
    """

    def __init__(self, handle):
        """Listen; handle(wire, head) gets what has come of a POST, its head at least."""
        self.posts = 0
        self._handle = handle
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(20)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/liveEvent"

    def __enter__(self):
        """Begin to serve."""
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        """Serve no more."""
        with contextlib.suppress(OSError):  # which wakes accept()
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                wire, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[wire], daemon=True).start()

    def _serve(self, wire):
        with wire, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                data = wire.recv(1000)
                if not data:
                    return
                head += data
            if head.startswith(b"OPTIONS"):
                wire.sendall(
                    b"HTTP/1.1 204 OK\r\nAccept-Post: application/x-ndjson\r\n\r\n"
                )
                return
            self.posts += 1
            self._handle(wire, head)


def send_answer(wire, body=ACCEPTED, status=b"200 OK"):
    """Send an answer in JSON and close."""
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n\r\n" % status
    wire.sendall(head + body)


class ClientTest(SystemTest):
    """A test that delivers the file events.jsonl."""

    def setUp(self):
        """Name the file that keeps a delivery."""
        super().setUp()
        self.state = self.path("events.jsonl.delivery")

    def run_client(self, *arguments, patch="", **options):
        """Run client.py, after some lines of Python have changed it, and return its status, stdout
        and stderr."""
        code, environment = patched("client", patch)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        run = subprocess.run(
            [sys.executable, *code, *map(str, arguments)],
            cwd=self.directory,
            timeout=60,
            env=os.environ | environment | options.pop("environment", {}),
            **TEXT,
            **options,
        )
        self.assertNotIn("Traceback", run.stderr or "")
        return run.returncode, run.stdout, run.stderr

    def run_here(self, *arguments):
        """Run client.py in this process and return its exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        return client_module.main(list(map(str, arguments)))

    def interrupted(self, *arguments):
        """Begin a delivery that finds no server, and return the producer id that it keeps."""
        nowhere = f"http://localhost:{free_port()}/liveEvent"
        arguments = (*arguments, "--url", nowhere, "--give-up-after", 0)
        status, _, errors = self.run_client(*arguments, patch="client.STEP_SECONDS = 0.01")
        self.assertEqual(status, 1, errors)
        return self.producer_id()

    def producer_id(self):
        """Return the producer id of the delivery."""
        first_line, *_ = self.state.read_text().splitlines()
        return json.loads(first_line)["producerId"]

    def rejected_files(self):
        """Return the contents of the files of rejected lines, the oldest first."""
        files = list(self.directory.glob("events.jsonl.rejected-*"))
        files.sort(key=lambda path: path.stat().st_mtime_ns)
        return [path.read_bytes() for path in files]
