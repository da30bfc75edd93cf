"""Each event counts once while everything happens at once, at random."""

import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import time

from tests.tools import Server, SystemTest, children_of, patched
from tests.tools_database import HERE, query, setUpModule
from tests.tools_events import TORTURE_SECONDS, TORTURE_SEED, ids_in, oracle, write_events
from tests.tools_faults import FaultyProxy


class Torture(SystemTest):
    """Everything at once, at random, and then equality with the oracle."""

    def test_every_event_counts_exactly_once(self):
        chance = random.Random(TORTURE_SEED)
        print(
            f"[torture: seed {TORTURE_SEED}, {TORTURE_SECONDS:g} s]",
            end=" ",
            file=sys.stderr,
            flush=True,
        )
        self.counts = collections.Counter()
        self.servers = [Server(self, log=f"log{n}") for n in (1, 2)]
        self.proxy = FaultyProxy([server.port for server in self.servers], TORTURE_SEED)
        self.addCleanup(self.proxy.close)
        self.files, self.delivering, self.processors = [], [], []
        self.chance = chance
        actions = [
            self.kill_client,
            self.kill_client,
            self.kill_server,
            self.kill_worker,
            self.kill_processor,
            self.kill_processor,
            self.kill_child,
            self.terminate_backend,
            self.pause,
            self.pause,
            self.rotate,
        ]
        end = time.monotonic() + TORTURE_SECONDS
        while time.monotonic() < end:
            self.keep_busy()
            time.sleep(chance.uniform(0, 0.1))
            chance.choice(actions)()
        self.settle()
        logs = sorted(self.directory.glob("log*"))
        repeats = len(ids_in(*logs)) - len(set(ids_in(*logs)))
        kills = sum(count for name, count in self.counts.items() if name.startswith("kill"))
        print(
            f"[{dict(self.counts)}, {self.proxy.cuts} cuts, {kills} kills, "
            f"{len(self.files)} files, "
            f"{repeats} repeated deliveries]",
            end=" ",
            file=sys.stderr,
            flush=True,
        )
        self.assertRevenue(oracle(*self.files))
        for fault in (kills, repeats, self.proxy.cuts, self.counts["pause"], self.counts["rotate"]):
            self.assertGreater(fault, 0, "a fault was not injected")

    def start_client(self, events, *arguments):
        """Start a client through the proxy."""
        command = [
            sys.executable,
            HERE / "client.py",
            events,
            "--url",
            f"http://127.0.0.1:{self.proxy.port}/liveEvent",
            "--batch-size",
            str(self.chance.choice([10, 100, 1000])),
            *arguments,
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def keep_busy(self):
        """Keep two deliveries and two processors going, and both servers up."""
        self.keep_servers_up()
        for delivery in list(self.delivering):
            events, client = delivery
            if client.poll() is not None:
                output, errors = client.communicate()
                self.delivering.remove(delivery)
                if "events accepted" not in output:  # the receipt
                    self.assertIn(client.returncode, (-signal.SIGKILL, 1), errors)
                    self.assertNotIn("Traceback", errors)
                    self.delivering.append((events, self.start_client(events)))
        while len(self.delivering) < 2:
            events = write_events(
                self.path(f"events{len(self.files)}"),
                self.chance.choice([10, 1000, 5000]),
                seed=self.chance.random(),
            )
            self.files.append(events)
            self.delivering.append((events, self.start_client(events)))
        for processor in [
            processor for processor in self.processors if processor.poll() is not None
        ]:
            self.processors.remove(processor)
            errors = processor.communicate()[1]
            self.assertTrue(
                processor.returncode in (0, -signal.SIGKILL) or "No such file" in errors, errors
            )
        while len(self.processors) < 2:
            logs = sorted(self.directory.glob("log*"))
            self.chance.shuffle(logs)
            slices = "data_processor.SLICE_BYTES = 20_000; data_processor.usable_cores = lambda: 3"
            script, path = self.chance.choice(
                [([HERE / "data_processor.py"], {}), patched("data_processor", slices)]
            )
            self.processors.append(
                subprocess.Popen(
                    [sys.executable, *script, *logs[:20]],
                    cwd=self.directory,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | path,
                )
            )

    def keep_servers_up(self):
        """Start the servers again that were killed."""
        for n, server in enumerate(self.servers):
            if server.process.poll() is not None:
                self.servers[n] = Server(self, log=server.log.name, port=server.port)

    def kill(self, name, process):
        """SIGKILL a process that runs."""
        if process.poll() is None:
            process.kill()
            self.counts[f"kill {name}"] += 1

    def kill_client(self):
        """Kill one of the clients."""
        self.kill("client", self.chance.choice(self.delivering)[1])

    def kill_processor(self):
        """Kill one of the processors."""
        self.kill("processor", self.chance.choice(self.processors))

    def kill_child(self):
        """Kill a process that one of the processors forked (on Linux, which lists them)."""
        for _ in range(100 if sys.platform == "linux" else 0):  # they live for some milliseconds
            if children := [
                pid for processor in self.processors for pid in children_of(processor.pid)
            ]:
                return self.kill_pid("child", self.chance.choice(children))
            time.sleep(0.002)

    def kill_server(self):
        """Kill a server's parent."""
        self.kill("server", self.chance.choice(self.servers).process)

    def kill_worker(self):
        """Kill one worker."""
        if workers := self.chance.choice(self.servers).workers():
            self.kill_pid("worker", self.chance.choice(workers))

    def kill_pid(self, name, pid):
        """SIGKILL a process that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.counts[f"kill {name}"] += 1

    def terminate_backend(self):
        """End one of the database's processes."""
        query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1"
        )
        self.counts["terminate"] += 1

    def pause(self):
        """Stop a process for a moment."""
        processes = [client for _, client in self.delivering] + self.processors
        pids = [process.pid for process in processes if process.poll() is None]
        pids += [worker for server in self.servers for worker in server.workers()]
        if pids:
            pid = self.chance.choice(pids)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self.chance.uniform(0, 0.3))
                os.kill(pid, signal.SIGCONT)
                self.counts["pause"] += 1

    def rotate(self):
        """Rename a log."""
        log = self.chance.choice(self.servers).log
        if log.exists():
            log.rename(f"{log}.{self.counts['rotate']}")
            self.counts["rotate"] += 1

    def settle(self):
        """Let every delivery and then the processor come to their ends."""
        self.proxy.calm = True
        for processor in self.processors:
            processor.kill()
            processor.communicate()
        self.keep_servers_up()
        for events, client in self.delivering:
            while "events accepted" not in client.communicate(timeout=60)[0]:
                client = self.start_client(events)
        self.processor(*sorted(self.directory.glob("log*")))
