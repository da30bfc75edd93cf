"""What tests of the client share."""

import json
import os
import signal
import subprocess
import sys

import client as client_module
from tests.tools import TEXT, SystemTest, free_port, patched


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
