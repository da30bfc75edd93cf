"""The system's promises, tested on the real scripts as processes and on a real PostgreSQL.

    python -m unittest                         all of it, some minutes
    python -m unittest tests.test_framing      one file of it, some seconds
    TORTURE_SECONDS=600 TORTURE_SEED=7 python -m unittest tests.test_torture

The tests create a database of their own and drop it at the end. They do so on the PostgreSQL that
the environment names, or on the default one; where neither is there, they start a throwaway one
with Debian's pg_virtualenv and run again inside it.

Begin to read here: PROMISES says which file tests which promise. Then Pipeline shows the system at
work, UnderKills shows its promise, and Readme executes what the README shows. What the tests share
is in tests/tools*.py; a method named assert... is a check with a name.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock

import data_processor
from tests.tools import README, TEXT, Server, SystemTest, blocks, free_port, wait_until
from tests.tools_database import HERE, empty_tables, locked_users, query, setUpModule, waiting
from tests.tools_events import EVENT, ids_in, oracle, write_events
from tests.tools_http import Recorder

# {file: what it tests}, from the promise itself to the tools
PROMISES = {
    "test_system": "The events of a file add up exactly to the revenue that the server answers; "
    "each counts once under kills; what the README shows is what happens.",
    "test_exactly_once": "Each event counts once, whatever fails, is retried or run again.",
    "test_at_once": "Each event counts once when processors run at once.",
    "test_machines": "Each event counts once with several servers that are killed.",
    "test_torture": "Each event counts once while everything happens at once, at random.",
    "test_random": "Sums are exact for random events, batches, orders, logs and processors.",
    "test_grammar": "Server and processor agree on what an event is.",
    "test_framing": "A request is accepted or refused as the HTTP standard says.",
    "test_answers": "Each request has the answer that its sender needs.",
    "test_limits": "No peer does harm, and none is waited for without end.",
    "test_room": "Peers who do nothing, or are never done, keep nobody else out.",
    "test_access": "The server is open to those alone whom it is meant for.",
    "test_queries": "A revenue is answered in time, or the sender hears when to ask again.",
    "test_rounds": "Whoever comes while work is under way shares the next round.",
    "test_durability": "An acknowledged event survives a fault at any step and a power cut.",
    "test_durability_disk": "It survives a disk that is full, slow or broken.",
    "test_processes": "The server's processes are replaced when they die, and stop in time.",
    "test_networks": "Foreign answers, slow networks and stuck streams harm no delivery.",
    "test_tls_and_proxies": "A delivery goes through TLS and through proxies.",
    "test_delivery": "A file is delivered once, whatever is killed in between.",
    "test_continued": "A delivery that was interrupted anywhere goes on where it was.",
    "test_lines": "Each line of a file is delivered or rejected, and a rejected one is kept.",
    "test_requests": "The client tries again until an answer is certain.",
    "test_client_words": "What the client prints is a sentence, and decides nothing.",
    "test_logs": "Each line of a log is applied or rejected, whatever stands beside it.",
    "test_chunks": "Several cores count what one would count, in bounded memory.",
    "test_following": "Rotated logs are found, and --follow reads on through outages.",
    "test_waiting": "The processor waits for nobody without a bound and a word.",
    "test_troubles": "The trouble of one log stops that log alone.",
    "test_tables": "The tables are created where they are missing, and found where they are.",
    "test_shapes": "A table that does not fit is refused with what mends it.",
    "test_belonging": "Tables that do not belong together are refused.",
    "test_outages": "An outage of the database is said in a sentence.",
    "test_audit": "--verify finds each user whose revenue is not the sum of the logs.",
    "test_printing": "What the processor prints is a sentence, and decides nothing.",
    "test_not_promised": "What is not promised is what the README says.",
    "test_benchmarks": "The tables of the benchmarks name what was measured.",
    "test_startup": "The tests find a PostgreSQL, or say in a sentence that there is none.",
}

# {the beginning of a point under "What it does not promise": the file that tests where the promise
# ends, or why none does}
NOT_PROMISED = {
    "A sender that gives no event ids": "test_requests",
    "So can `client.py` if": "nobody else keeps the ids",
    "An event id that is used again": "test_exactly_once",
    "Two hard links": "test_not_promised",
    "A table that was emptied": "test_not_promised",
    "Keep the logs until": "test_following",
    "`copytruncate` of logrotate": "test_following",
    "A log without event ids": "test_logs",
    "The database keeps one row": "it is a matter of space",
    "A line that is longer": "test_lines",
    "The server sends no CORS headers": "test_not_promised",
}


class Pipeline(SystemTest):
    """The events of a file add up to the revenue that the server answers."""

    def test_the_sample_events_count_each_time_they_are_sent(self):
        server = Server(self)
        shutil.copy(HERE / "events.jsonl", self.directory)
        for times in (1, 2):
            self.client("--url", server.url)
            self.processor()
            output, _ = self.processor()  # a second run finds nothing new
            self.assertIn("0 applied, 0 repeated, 0 rejected", output)
            self.assertAnswered(server, "user1", 50 * times)
            self.assertAnswered(server, "user2", 200 * times)

    def assertAnswered(self, server, user, revenue):
        """Check the server's answer to a query for a user's revenue, to the letter."""
        expected = f'{{"userId": "{user}", "revenue": {revenue}}}'
        self.assertEqual(server.revenue_of(user), (200, expected))

    def test_sums_are_exact(self):
        server = Server(self)
        widest = "999999999999999999.999999999999999999"
        for user, name, value in (
            ("tenths", "add_revenue", "0.1"),
            ("tenths", "add_revenue", "0.2"),
            ("wide", "add_revenue", widest),
            ("wide", "subtract_revenue", "0.000000000000000001"),
            ("debtor", "subtract_revenue", widest),
            ("round", "add_revenue", "1200.500"),
            ("nought", "subtract_revenue", "0.00"),
        ):
            event = f'{{"userId": "{user}", "name": "{name}", "value": {value}}}'
            self.assertEqual(server.post(event), (200, {"message": "Event received"}))
        self.processor()
        self.assertAnswered(server, "tenths", "0.3")
        self.assertAnswered(server, "wide", "999999999999999999.999999999999999998")
        self.assertAnswered(server, "debtor", "-" + widest)
        self.assertAnswered(server, "round", "1200.5")
        self.assertAnswered(server, "nought", "0")

    def test_users_are_told_apart_by_every_character(self):
        server = Server(self)
        users = [
            "user1",
            "User1",
            " user1",
            "a/b",
            "a%2Fb",
            "a+b",
            "100%",
            "юзер",
            "\U0001f600",
            '"',
            "\\",
            "a\u2028b",
            "\x7f",
            "x" * 255,
        ]
        revenues = {user: number for number, user in enumerate(users)}
        batch = ""
        for user, revenue in revenues.items():
            event = {"userId": user, "name": "add_revenue", "value": revenue}
            batch += json.dumps(event) + "\n"
        everything = {"message": "Events received", "accepted": len(users), "rejected": []}
        self.assertEqual(server.post(batch, "application/x-ndjson"), (200, everything))
        self.processor()
        for user, revenue in revenues.items():
            with self.subTest(user):
                status, text = server.revenue_of(user)
                self.assertEqual(status, 200)
                self.assertEqual(json.loads(text), {"userId": user, "revenue": revenue})
        _, _, body = server.ask("GET", "/userEvents/a+b")  # in a path, + is no blank
        self.assertEqual(json.loads(body), {"userId": "a+b", "revenue": revenues["a+b"]})

    def test_rotation_under_load_loses_nothing(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 30_000)
        client = self.start("client.py", "--url", server.url, "--batch-size", 20)

        def is_long_enough():
            return server.log.exists() and server.log.stat().st_size > 100_000

        for number in range(1, 7):
            wait_until(is_long_enough, "the log grew")
            server.log.rename(self.path(f"server-events.jsonl.{number}"))
        output, _ = client.communicate(timeout=60)
        self.assertIn("30,000 events accepted", output)
        logs = sorted(self.directory.glob("server-events.jsonl*"))
        self.assertEqual(len(logs), 7)
        first_lines = {log.read_text().partition("\n")[0] for log in logs}
        self.assertEqual(len(first_lines), 7, "each has a log id of its own")
        for ending in (".0.gz", ".delivery", ".rejected-p"):
            self.path(f"server-events.jsonl{ending}", EVENT + b"\n")
        _, errors = self.processor()
        self.assertEqual(
            errors,
            "server-events.jsonl.0.gz: is compressed and was not read; name it to read it.\n",
        )
        self.assertRevenue(oracle(events))
        self.assertEqual(server.errors.read_text(), "")


class UnderKills(SystemTest):
    """Each event counts once, whatever is killed and whatever is repeated."""

    def test_a_killed_client_is_continued_through_a_restart_of_the_server(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 100_000)
        client = self.start("client.py", "--url", server.url)
        wait_until(lambda: server.log.stat().st_size > 3_000_000, "the client is at it")
        client.kill()
        client.wait()
        delivery = self.path("events.jsonl.delivery")
        self.assertTrue(delivery.exists(), "the client was killed too late")
        server.kill()
        server = Server(self, port=server.port)
        _, errors = self.client("--url", server.url)
        self.assertIn("going on", errors)
        self.assertFalse(delivery.exists())
        ids = ids_in(server.log)
        ((producer, _), *_) = ids
        self.assertEqual(set(ids), {(producer, line) for line in range(1, 100_001)})
        repeated = len(ids) - 100_000
        self.assertGreater(repeated, 0, "nothing was under way")
        output, _ = self.processor()
        self.assertIn(f"100,000 applied, {repeated:,} repeated", output)
        self.assertRevenue(oracle(events))

    def test_processors_at_once_count_once_although_some_are_killed(self):
        server = Server(self)
        events = write_events(self.path("events.jsonl"), 100_000)
        self.client("--url", server.url)
        lines = server.log.read_text().splitlines(keepends=True)
        logs = [
            server.log,
            self.path("reversed", "".join(reversed(lines))),
            self.path("second half", "".join(lines[50_000:])),
        ]
        with locked_users():
            processors = [self.start("data_processor.py", log) for log in logs * 2]
            wait_until(lambda: len(waiting()) == len(processors), "all wait for each other")
            killed, *others = processors
            killed.kill()
            *_, backend = waiting()
            query("SELECT pg_terminate_backend(%s)", [backend])
        self.assertEqual(killed.wait(60), -signal.SIGKILL)
        for processor in others:
            _, errors = processor.communicate(timeout=60)
            self.assertEqual(processor.returncode, 0, errors)
        self.processor(*logs)
        self.assertRevenue(oracle(events))
        self.assertEqual(query("SELECT applied::text FROM event_producers"), [("{[1,100001)}",)])

    def test_one_request_to_two_servers_counts_once_in_whatever_order_logs_are_processed(self):
        one, two = Server(self, log="one"), Server(self, log="two")
        for server, first in ((one, 1), (two, 1), (one, 2), (two, 3)):
            body = b""
            for sequence in (first, first + 1):
                body += EVENT.replace(b"user1", b"user%d" % sequence) + b"\n"
            event_id = {"Producer_Id": "sender", "Sequence": first}
            status, _ = server.post(body, "application/x-ndjson", **event_id)
            self.assertEqual(status, 200)
        first, second = one.log, two.log
        both = first.read_bytes() + second.read_bytes()
        lines = both.splitlines(keepends=True)
        orders = {
            "one after the other": [first, second],
            "the other way round": [second, first],
            "after their concatenation": [self.path("both", both), first, second],
            "after a cut log and a double one": [
                self.path("head", b"".join(lines[:5])),
                self.path("again", both + both),
                second,
                first,
            ],
            "reversed": [self.path("reversed", b"".join(reversed(lines)))],
            "with a copy between them": [first, self.path("copy", both), second],
        }
        for order, logs in orders.items():
            with self.subTest(order):
                empty_tables()
                for log in logs:
                    self.processor(log)
                self.processor(*logs)
                self.assertRevenue({f"user{sequence}": 1 for sequence in (1, 2, 3, 4)})


class Table(unittest.TestCase):
    """The tables above name every file of tests and every point of the README."""

    def claims_of(self, name):
        """Return the names of the tests in a file."""
        path = HERE / "tests" / f"{name}.py"
        if name == "test_system":
            path = HERE / "test_system.py"
        return re.findall(r"^    def (test_\w+)", path.read_text(encoding="utf-8"), re.M)

    def test_every_file_of_tests_has_its_promise(self):
        files = {path.stem for path in HERE.glob("tests/test_*.py")} | {"test_system"}
        self.assertEqual(files, set(PROMISES))
        for name, promise in PROMISES.items():
            with self.subTest(name):
                self.assertTrue(self.claims_of(name))
                self.assertTrue(promise.endswith("."))

    def test_what_is_not_promised_has_its_test(self):
        section = README.partition("## What it does not promise\n")[2].partition("\n## ")[0]
        points = re.findall(r"^\* (.*)", section, re.M)
        self.assertGreater(len(points), 5)
        for point in points:
            with self.subTest(point):
                found = [begins for begins in NOT_PROMISED if point.startswith(begins)]
                self.assertEqual(len(found), 1)
        for begins, name in NOT_PROMISED.items():
            with self.subTest(begins):
                self.assertTrue(any(point.startswith(begins) for point in points))
                if name.startswith("test_"):
                    self.assertIn(name, PROMISES)


class Readme(SystemTest):
    """What the README shows is what happens."""

    SCRIPTS = ("server.py", "client.py", "data_processor.py")

    def setUp(self):
        """Copy the scripts into the directory."""
        super().setUp()
        self.port = free_port()
        for name in (*self.SCRIPTS, "create_table.sql", "events.jsonl"):
            shutil.copy(HERE / name, self.directory)

    def shell(self, script):
        """Run a part of the README, at another port, and return what it prints."""
        script = (
            script.replace("server.py &", f"server.py --port {self.port} &")
            .replace("client.py", f"client.py --url http://localhost:{self.port}/liveEvent")
            .replace("localhost:8000", f"localhost:{self.port}")
        )
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        run = subprocess.run(
            ["sh", "-c", script],
            cwd=self.directory,
            env=os.environ | {"PATH": path},
            capture_output=True,
            timeout=60,
            **TEXT,
        )
        self.assertEqual(run.stderr, "")
        return run.stdout.replace(f":{self.port}", ":8000").replace("\r", "")

    def test_the_first_command_prints_what_the_readme_shows(self):
        command = blocks("sh")[0]
        output = re.sub(".* cluster .*\n", "", blocks("")[0])  # without pg_virtualenv's words
        script = re.search(r"pg_virtualenv -t sh -c '(.*)'\n", command, re.S)[1]

        def comparable(text):
            text = re.sub(r"\d+ workers", "2 workers", text)
            return re.sub(r"in [\d.]+ s", "in 0.1 s", text)

        self.assertEqual(comparable(self.shell(script)), output)

    def test_the_second_command_runs_the_documented_tests(self):
        self.assertEqual(blocks("sh")[1], "bash .ci/run\n")
        self.assertIn(
            '\n"$environment/bin/python" -m unittest ',
            (HERE / ".ci/run").read_text(encoding="utf-8"),
        )
        self.assertIn("`python -m unittest`", README)
        self.assertNotIn("pg_virtualenv -t python", README)

    def test_docker_and_psql_use_the_default_database(self):
        password = re.search(
            r"docker run .*-p (\d+):5432 .*POSTGRES_PASSWORD='(.*?)' postgres`", README
        )
        place = re.search(r"`psql -h (\S+) -U (\S+) -d (\S+) -f create_table.sql`", README)
        home = {"HOME": str(self.directory)}  # without a .pgpass
        alone = mock.patch.dict(os.environ, home, clear=True)
        with alone, mock.patch("psycopg2.connect") as connect:
            data_processor.connect()
        used = connect.call_args.kwargs
        self.assertEqual([used["host"], used["user"], used["dbname"]], list(place.groups()))
        self.assertEqual([used.get("port", "5432"), used["password"]], list(password.groups()))

    def test_the_places_to_start_reading_exist(self):
        places = re.findall(r"^\* `([\w.]+)` in `(\w+)\.py`(?:, with `(\w+)`)?", README, re.M)
        self.assertEqual(len(places), 3)
        for name, module, helper in places:
            source = (HERE / f"{module}.py").read_text(encoding="utf-8")
            for definition in [*name.split("."), *filter(None, [helper])]:
                self.assertRegex(source, rf"(?m)^ *(?:def|class) {definition}\b")

    def test_the_console_session_prints_what_the_readme_shows(self):
        Server(self, port=self.port)
        (session,) = blocks("console")
        for step in re.split(r"^\$ ", session, flags=re.M)[1:]:
            lines = step.splitlines(keepends=True)
            continued = [line[2:] for line in lines[1:] if line.startswith("> ")]
            expected = "".join(lines[1 + len(continued) :])
            self.assertEqual(self.shell(lines[0] + "".join(continued)), expected, lines[0])

    def test_the_safe_sender_sends_each_event_once(self):
        (script,) = blocks("python")
        script += (
            "\nfor value in (1, 2):\n"
            "    send({'userId': 'user1', 'name': 'add_revenue', 'value': value}, "
            f"'http://localhost:{self.port}/liveEvent')\n"
        )
        sender = subprocess.Popen([sys.executable, "-c", script])
        server = Server(self, port=self.port)
        self.assertEqual(sender.wait(20), 0)
        ids = ids_in(server.log)
        self.assertEqual([sequence for _, sequence in ids], [1, 2])
        self.assertEqual(len({producer for producer, _ in ids}), 1)

    def test_the_safe_sender_takes_no_other_page_for_a_delivery(self):
        (script,) = blocks("python")
        pages = {
            "a redirect": (302, {"Location": "/elsewhere"}, b'{"message": "Event received"}'),
            "a page": (200, {"Content-Type": "text/html"}, b"<html>Down</html>"),
            "other JSON": (200, {}, b'{"message": "Welcome"}'),
        }
        for case, page in pages.items():
            last = 400, {}, b'{"error": "enough"}'
            answers = [page, last]
            with self.subTest(case), Recorder([last], lambda number, _: answers[number]) as server:
                event = {"userId": "user1", "name": "add_revenue", "value": 1}
                send = f"\nsend({event!r}, {server.url!r})\nprint('delivered')\n"
                command = [sys.executable, "-c", script + send]
                sender = subprocess.run(command, capture_output=True, timeout=60, **TEXT)
                self.assertEqual(sender.stdout, "")
                self.assertRegex(sender.stderr, "HTTP Error (302|400)")
                self.assertEqual({body[:1] for _, body in server.posts}, {b"{"}, "no GET")

    def test_help_fits_a_screen(self):
        for script in self.SCRIPTS:
            with self.subTest(script):
                output, _ = self.run_script(script, "--help", COLUMNS="80")
                self.assertLessEqual(output.count("\n"), 24)
                self.assertIn("Example: python " + script, " ".join(output.split()))

    def test_help_knows_every_option_of_the_readme(self):
        for script in self.SCRIPTS:
            with self.subTest(script):
                output, _ = self.run_script(script, "--help", COLUMNS="80")
                usage = re.search(rf"^    python {script}(.*)$", README, re.M)[1]
                options = re.findall(r"--[a-z-]+", usage)
                self.assertEqual(set(re.findall(r"^  (--[a-z-]+)", output, re.M)), set(options))
                for option, default in re.findall(r"\[(--[a-z-]+) ([^]|N]\S*)\]", usage):
                    self.assertRegex(
                        " ".join(output.split()),
                        rf"{option} [^()]*\(default: {re.escape(default)}\)",
                    )

    def test_a_rejected_line_is_reported_and_copied_as_the_readme_says(self):
        report = re.search(r"reported as `(events\.jsonl:(\d+): .*?)`", README)
        copies = re.search(r"copied to `(.*)<producer id>`", README)[1]
        bad = EVENT.replace(b"1}", b"true}") + b"\n"
        self.path("events.jsonl", (EVENT + b"\n") * (int(report[2]) - 1) + bad)
        server = Server(self)
        _, errors = self.client("--url", server.url, status=1)
        self.assertIn(report[1], errors.splitlines())
        (copy,) = self.directory.glob(copies + "*")
        self.assertEqual(copy.read_bytes(), bad)
        copy.write_bytes(bad.replace(b"true", b"1"))
        self.client(copy, "--url", server.url)
        self.processor()
        self.assertRevenue({"user1": int(report[2])})

    def test_the_rotation_by_logrotate_loses_nothing(self):
        block = next(block for block in blocks("") if "rotate 90" in block)
        block = block.replace("    su events events\n", "")  # there is no such user here
        block = block.replace("/var/lib/events", str(self.directory))
        rules = self.path("rules", "dateext\n" + block)
        rules.chmod(0o644)
        logrotate = shutil.which("logrotate", path=os.environ["PATH"] + ":/usr/sbin")
        server = Server(self)
        for number in (1, 2, 3):
            server.post(EVENT)
            if logrotate:
                subprocess.run(
                    [logrotate, "--force", "--state", self.path("state"), rules],
                    check=True,
                    capture_output=True,
                )
            else:
                server.log.rename(f"{server.log}.{number}")
        server.post(EVENT)
        self.assertEqual(len(list(self.directory.glob("server-events.jsonl*"))), 4)
        self.processor()
        self.assertRevenue({"user1": 4})


if __name__ == "__main__":
    unittest.main()
