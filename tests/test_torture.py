"""Each event counts once while everything happens at once, at random."""

import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.tools import TEXT, Server, SystemTest, children_of, patched
from tests.tools_database import HERE, query, setUpModule
from tests.tools_events import TORTURE_SECONDS, TORTURE_SEED, ids_in, oracle, write_events
from tests.tools_faults import FaultyProxy


class Delivery(NamedTuple):
    """A file that is being sent."""

    events: Path
    client: subprocess.Popen


class Torture(SystemTest):
    """Everything at once, at random, and then equality with the oracle.

    chance       what is random
    counts       {what was done: how often}
    servers      two servers with a log each
    proxy        what cuts the clients' connections to them
    files        every file that a client was given
    delivering   two deliveries
    processors   two processors
    """

    def test_every_event_counts_exactly_once(self):
        self.say(f"torture: seed {TORTURE_SEED}, {TORTURE_SECONDS:g} s")
        self.chance = random.Random(TORTURE_SEED)
        self.counts = collections.Counter()
        self.servers = [Server(self, log=f"log{n}") for n in (1, 2)]
        self.proxy = FaultyProxy([server.port for server in self.servers], TORTURE_SEED)
        self.addCleanup(self.proxy.close)
        self.files = []
        self.delivering = []
        self.processors = []
        self.addCleanup(self.end_all)
        self.torture()
        self.settle()
        self.assertRevenue(oracle(*self.files))
        ids = ids_in(*self.logs())
        repeats = len(ids) - len(set(ids))
        counts = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        self.say(
            f"{counts}, {self.proxy.cuts} cut, {len(self.files)} files, "
            f"{repeats} repeated deliveries"
        )
        self.assertGreater(repeats, 0, "no event was delivered twice")

    def say(self, words):
        """Print words beside the dots of the tests."""
        print(f"[{words}]", end=" ", file=sys.stderr, flush=True)

    def torture(self):
        """Do everything at random for so long, and until everything was done."""
        faults = {
            "kill client": self.kill_client,
            "kill server": self.kill_server,
            "kill worker": self.kill_worker,
            "kill processor": self.kill_processor,
            "kill child": self.kill_child,
            "terminate backend": self.terminate_backend,
            "pause": self.pause,
            "rotate": self.rotate,
        }
        if sys.platform != "linux":
            del faults["kill child"]  # nobody lists the children of a process in time
        often = ["kill client", "kill processor", "pause"]
        end = time.monotonic() + TORTURE_SECONDS
        while time.monotonic() < end or not self.proxy.cuts or set(faults) - set(self.counts):
            self.assertLess(time.monotonic(), end + 120, f"not everything was done: {self.counts}")
            self.keep_busy()
            time.sleep(self.chance.uniform(0, 0.1))
            fault = self.chance.choice([*faults, *often])
            if faults[fault]():
                self.counts[fault] += 1

    def logs(self):
        """Return the logs of both servers, also the renamed ones."""
        return sorted(self.directory.glob("log*"))

    # -- what goes on --

    def keep_busy(self):
        """Keep two deliveries and two processors going, and both servers up."""
        self.keep_servers_up()
        self.delivering = [self.continued(delivery) for delivery in self.delivering]
        self.delivering = [delivery for delivery in self.delivering if delivery]
        while len(self.delivering) < 2:
            count = self.chance.choice([10, 1000, 5000])
            path = self.path(f"events{len(self.files)}")
            events = write_events(path, count, seed=self.chance.random())
            self.files.append(events)
            self.delivering.append(self.deliver(events))
        for processor in list(self.processors):
            if processor.poll() is not None:
                self.processors.remove(processor)
                self.check_processor(processor)
        while len(self.processors) < 2:
            self.processors.append(self.start_processor())

    def keep_servers_up(self):
        """Start the servers again that were killed."""
        for n, server in enumerate(self.servers):
            if server.process.poll() is not None:
                self.servers[n] = Server(self, log=server.log.name, port=server.port)

    def deliver(self, events):
        """Start a client that sends a file through the proxy, and return the delivery."""
        size = str(self.chance.choice([10, 100, 1000]))
        url = f"http://127.0.0.1:{self.proxy.port}/liveEvent"
        command = [sys.executable, HERE / "client.py", events, "--url", url, "--batch-size", size]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **TEXT)
        return Delivery(events, client)

    def continued(self, delivery):
        """Return a delivery, begun again if its client was killed, or None when it is done."""
        if delivery.client.poll() is None:
            return delivery
        output, errors = delivery.client.communicate()
        if "events accepted" in output:  # the receipt
            return None
        self.assertIn(delivery.client.returncode, (-signal.SIGKILL, 1), errors)
        self.assertNotIn("Traceback", errors)
        return self.deliver(delivery.events)

    def start_processor(self):
        """Start a processor on some logs, in half of the cases with many slices."""
        logs = self.logs()
        self.chance.shuffle(logs)
        many_slices = "data_processor.SLICE_BYTES = 20_000\ndata_processor.usable_cores = lambda: 3"
        script, environment = patched("data_processor", self.chance.choice(["", many_slices]))
        return subprocess.Popen(
            [sys.executable, *script, *logs[:20]],
            cwd=self.directory,
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **TEXT,
        )

    def check_processor(self, processor):
        """Check that a processor that ended was killed, or did what it could."""
        _, errors = processor.communicate()
        if "No such file" not in errors:  # it was renamed before it was opened
            self.assertIn(processor.returncode, (0, -signal.SIGKILL), errors)

    # -- what goes wrong: each returns whether it was done --

    def kill_client(self):
        """Kill one of the clients."""
        return self.kill(self.chance.choice(self.delivering).client)

    def kill_processor(self):
        """Kill one of the processors."""
        return self.kill(self.chance.choice(self.processors))

    def kill_server(self):
        """Kill a server's parent."""
        return self.kill(self.chance.choice(self.servers).process)

    def kill(self, process):
        """SIGKILL a process, if it runs."""
        running = process.poll() is None
        process.kill()
        return running

    def kill_child(self):
        """Kill a process that one of the processors forked."""
        for _ in range(100):  # they live for some milliseconds
            children = []
            for processor in self.processors:
                children += children_of(processor.pid)
            if children:
                return self.signal(self.chance.choice(children), signal.SIGKILL)
            time.sleep(0.002)
        return False

    def kill_worker(self):
        """Kill one worker."""
        workers = self.chance.choice(self.servers).workers()
        return bool(workers) and self.signal(self.chance.choice(workers), signal.SIGKILL)

    def signal(self, pid, number):
        """Send a signal to a process that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def terminate_backend(self):
        """End one of the database's processes."""
        ended = query("""
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid()
            ORDER BY random() LIMIT 1""")
        return bool(ended)

    def pause(self):
        """Stop a process for a moment."""
        processes = [delivery.client for delivery in self.delivering] + self.processors
        pids = [process.pid for process in processes if process.poll() is None]
        for server in self.servers:
            pids += server.workers()
        if not pids:
            return False
        pid = self.chance.choice(pids)
        stopped = self.signal(pid, signal.SIGSTOP)
        time.sleep(self.chance.uniform(0, 0.3))
        self.signal(pid, signal.SIGCONT)
        return stopped

    def rotate(self):
        """Rename a log."""
        log = self.chance.choice(self.servers).log
        if not log.exists():
            return False
        log.rename(f"{log}.{self.counts['rotate']}")
        return True

    # -- the end --

    def settle(self):
        """Let every delivery and then the processor come to their ends."""
        self.proxy.calm = True
        for processor in self.processors:
            processor.kill()
            processor.communicate()
        self.processors = []
        self.keep_servers_up()
        while self.delivering:
            self.delivering[0].client.wait(60)
            delivery = self.continued(self.delivering.pop(0))
            if delivery:
                self.delivering.append(delivery)
        self.processor(*self.logs())

    def end_all(self):
        """End what a failed test has left."""
        for process in [*self.processors, *[delivery.client for delivery in self.delivering]]:
            process.kill()
            process.communicate()
