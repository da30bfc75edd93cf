"""The system's promises, tested on the real scripts as processes and on a real PostgreSQL.

    python -m unittest                                    all of it, some minutes
    TORTURE_SECONDS=600 TORTURE_SEED=7 python -m unittest test_system.Torture

The database is the one that the environment names; a scratch database is created in it and dropped.
"""
import collections
import contextlib
import decimal
import io
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
from decimal import Decimal
from pathlib import Path

import psycopg2
import psycopg2.extensions

import data_processor

HERE = Path(__file__).resolve().parent
EVENT = b'{"userId": "user1", "name": "add_revenue", "value": 1}'
TORTURE_SECONDS = float(os.environ.get("TORTURE_SECONDS", "20"))
TORTURE_SEED = int(os.environ.get("TORTURE_SEED") or secrets.randbelow(10**6))
SCRATCH = f"events_test_{os.getpid()}_{secrets.token_hex(4)}"

administration = None  # a connection to the database that the environment names


def setUpModule():
    """Create the scratch database and point the environment, so that every child finds it, at it."""
    global administration
    try:
        administration = data_processor.connect(connect_timeout=10)
    except psycopg2.OperationalError as error:
        raise RuntimeError(f"No PostgreSQL to test with ({str(error).strip()}). Start one, or name another with PGHOST, "
                           "PGPORT, PGUSER and PGPASSWORD, or let Debian's postgresql-common start a throwaway one: "
                           "pg_virtualenv python -m unittest") from None
    administration.autocommit = True
    administer(f"CREATE DATABASE {SCRATCH} ENCODING 'UTF8' TEMPLATE template0")
    info = administration.info
    settings = {key: info.dsn_parameters.get(key) for key in ("host", "hostaddr", "port", "user", "sslmode")}
    settings |= {"password": info.password, "dbname": SCRATCH}
    os.environ["DATABASE_URL"] = psycopg2.extensions.make_dsn(**{k: v for k, v in settings.items() if v})
    os.environ.pop("EVENTS_AUTHORIZATION", None)


def tearDownModule():
    """Drop the scratch database."""
    administer(f"DROP DATABASE {SCRATCH} WITH (FORCE)")
    administration.close()


def administer(statement):
    """Run a statement in the database that the environment names."""
    with administration.cursor() as sql:
        sql.execute(statement)


def query(statement, parameters=None):
    """Run a statement in the scratch database and return its rows."""
    connection = psycopg2.connect(os.environ["DATABASE_URL"])
    try:
        with connection, connection.cursor() as sql:
            sql.execute(statement, parameters)
            return sql.fetchall() if sql.description else []
    finally:
        connection.close()


def wait_until(condition, what, seconds=20):
    """Return condition's first true result, or fail."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain until {what}")
        time.sleep(0.01)
    return result


def free_port():
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def oracle(*paths):
    """Return {user: sum} over event files: the independent reckoning."""
    totals = collections.defaultdict(Decimal)
    for path in paths:
        for event in map(json.loads, Path(path).read_text().split("\n")[:-1]):
            sign = 1 if event["name"] == "add_revenue" else -1
            totals[event["userId"]] += sign * Decimal(str(event["value"]))
    return dict(totals)


def write_events(path, count, seed=0, users=50):
    """Write random events to a file and return its path."""
    chance = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            name = chance.choice(["add_revenue", "subtract_revenue"])
            file.write(json.dumps({"userId": f"user{chance.randrange(users)}", "name": name,
                                   "value": chance.randrange(10**6)}) + "\n")
    return path


def named(producer, sequence, user="user1", value=1):
    """Return a log's line as a server writes it."""
    return (f'{{"userId": "{user}", "name": "add_revenue", "value": {value}, '
            f'"producerId": "{producer}", "sequence": {sequence}}}\n')


def silence():
    """Return a context in which nothing is printed by this process."""
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


class SystemTest(unittest.TestCase):
    """A test with an empty directory and empty tables."""

    def setUp(self):
        self.directory = Path(tempfile.mkdtemp(prefix="events-test-"))
        self.addCleanup(shutil.rmtree, self.directory)
        query("DROP TABLE IF EXISTS users_revenue, event_producers, event_logs")
        query((HERE / "create_table.sql").read_text())

    def path(self, name, content=None):
        """Return a path in the test's directory, written if there is content."""
        path = self.directory / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def start(self, script, *arguments, **environment):
        """Start a script in the test's directory."""
        process = subprocess.Popen([sys.executable, HERE / script, *map(str, arguments)], cwd=self.directory, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)

        def end():
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.addCleanup(end)
        return process

    def run_script(self, script, *arguments, status=0, **environment):
        """Run a script to its end, check its exit status, and return (stdout, stderr)."""
        process = self.start(script, *arguments, **environment)
        output, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, status, output + errors)
        self.assertNotIn("Traceback", errors)
        return output, errors

    def client(self, *arguments, **options):
        """Run client.py."""
        return self.run_script("client.py", *arguments, **options)

    def processor(self, *logs, **options):
        """Run data_processor.py."""
        return self.run_script("data_processor.py", *logs, **options)

    def assertRevenue(self, expected):
        """Check the whole table."""
        self.assertEqual(dict(query("SELECT user_id, revenue FROM users_revenue")), expected)


class Pipeline(SystemTest):
    """From file to database."""

    def test_create_table_sql_runs_in_psql_and_runs_again(self):
        query("DROP TABLE users_revenue, event_producers, event_logs")
        for _ in range(2):
            subprocess.run(["psql", "-v", "ON_ERROR_STOP=1", "-q", "-d", os.environ["DATABASE_URL"],
                            "-f", HERE / "create_table.sql"], check=True, capture_output=True)
        self.assertRevenue({})

    def test_a_plain_log_is_applied_once_and_so_is_what_is_appended_to_it(self):
        log = write_events(self.path("plain.jsonl"), 100)
        for _ in range(2):
            self.processor(log)
            self.assertRevenue(oracle(log))
        with open(log, "a") as file:
            file.write(write_events(self.path("more.jsonl"), 50, seed=1).read_text())
        for _ in range(2):
            self.processor(log)
            self.assertRevenue(oracle(log))

    def test_a_plain_log_that_was_edited_is_refused_where_it_cannot_be_known(self):
        log = write_events(self.path("plain.jsonl"), 3)
        first, second, third = log.read_bytes().splitlines(keepends=True)
        self.processor(log)
        expected = oracle(log)
        log.write_bytes(first + third + second.replace(b"user", b"loser") + named("p", 1, "new", 5).encode())
        _, errors = self.processor(log, status=1)
        self.assertIn(f"plain.jsonl: byte {len(first)}: an event without producerId and sequence", errors)
        self.assertRevenue(expected | {"new": 5})
        log.write_bytes(first * 50 + log.read_bytes())  # whatever is shifted behind the position
        self.processor(log, status=1)
        self.assertRevenue(expected | {"new": 5})

    def test_the_processor_reports_bad_lines_once_and_applies_the_rest(self):
        lines = [EVENT + b"\n", b'{"userId": "user1"}\n', b"\xff\n", b"\n", EVENT + b"\n", b"x" * 300_000 + b"\n", EVENT + b"\n",
                 EVENT]
        log = self.path("server-events.jsonl", b"".join(lines))
        output, errors = self.processor(status=1)
        self.assertEqual(output, f"server-events.jsonl: 3 applied, 0 repeated, 3 rejected; {len(EVENT)} bytes of an "
                                 "unfinished last line left\n")
        starts = [sum(map(len, lines[:i])) for i in (1, 2, 5)]
        self.assertEqual([line.split(": ")[:2] for line in errors.splitlines()],
                         [["server-events.jsonl", f"byte {start}"] for start in starts])
        self.assertEqual(log.read_bytes(), b"".join(lines))
        self.assertEqual(self.processor()[1], "")
        self.assertRevenue({"user1": 3})

    def test_ctrl_c_ends_the_processor_quietly_even_while_it_waits_for_the_database(self):
        log = self.path("log", EVENT + b"\n")
        blocker = psycopg2.connect(os.environ["DATABASE_URL"])
        with contextlib.closing(blocker), blocker.cursor() as sql:
            sql.execute("LOCK TABLE users_revenue IN EXCLUSIVE MODE")
            for waiting, arguments in enumerate(([], ["--follow"]), 1):
                processor = self.start("data_processor.py", log, *arguments)
                wait_until(lambda: query("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                                         "AND wait_event_type = 'Lock'") == [(waiting,)], "the processor waits")
                processor.send_signal(signal.SIGINT)
                self.assertEqual((processor.communicate(timeout=5), processor.returncode), (("", ""), 130))
        self.processor(log)
        self.assertRevenue({"user1": 1})

    def test_what_is_wrong_with_the_database_is_said_in_a_sentence(self):
        log = self.path("log", EVENT + b"\n")
        parts = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
        for wrong, words in (({"password": "wrong"}, "password"), ({"dbname": "missing"}, "does not exist"),
                             ({"host": "127.0.0.1", "hostaddr": "127.0.0.1", "port": free_port()}, "refused"),
                             ({"user": "nobody-such"}, "No database")):
            dsn = psycopg2.extensions.make_dsn(**(parts | wrong))
            if "password" in wrong and not parts.get("password"):
                continue
            for arguments in ([], ["--verify"]):
                _, errors = self.processor(log, *arguments, status=1, DATABASE_URL=dsn)
                self.assertIn(words, errors)
                self.assertEqual(errors.count("\n"), 1)
        _, errors = self.processor(log, status=1, DATABASE_URL="foo")
        self.assertEqual(errors.count("\n"), 1)
        query("ALTER TABLE users_revenue RENAME COLUMN user_id TO someone")
        _, errors = self.processor(log, status=1)
        self.assertIn("users_revenue.user_id is missing", errors)
        for arguments, words in (([self.directory], "Is a directory"), (["missing"], "No such file")):
            query("DROP TABLE users_revenue")
            query((HERE / "create_table.sql").read_text())
            _, errors = self.processor(*arguments, status=1)
            self.assertIn(words, errors)
        _, errors = self.processor(status=1)
        self.assertIn("server-events.jsonl: no such file; start server.py", errors)

    def test_a_revenue_column_that_would_round_is_refused_and_a_kept_table_is_added_to(self):
        log = self.path("log", EVENT + b"\n")
        for kind in ("double precision", "numeric(10, 2)", "bigint"):
            query(f"ALTER TABLE users_revenue ALTER COLUMN revenue TYPE {kind}")
            _, errors = self.processor(log, status=1)
            self.assertIn("ALTER TABLE users_revenue ALTER COLUMN revenue TYPE numeric\n", errors)
        query("DROP TABLE users_revenue")
        query("CREATE TABLE users_revenue (id serial, user_id varchar(255) PRIMARY KEY, revenue numeric)")
        query("INSERT INTO users_revenue (user_id, revenue) VALUES ('user1', 0.5)")
        self.processor(log)
        self.assertEqual(query("SELECT user_id, revenue FROM users_revenue"), [("user1", Decimal("1.5"))])


def terminate_backends():
    """End the server side of every connection to the scratch database."""
    return query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                 "WHERE datname = current_database() AND pid <> pg_backend_pid()")


class ExactlyOnce(SystemTest):
    """Whatever is killed, retried, run again or copied in between."""

    def test_two_logs_of_one_producer_processed_at_the_same_moment_count_once(self):
        for attempt in range(3):
            query("TRUNCATE users_revenue, event_producers, event_logs")
            logs = [self.path(f"log{part}", "".join(named(f"p{producer}", sequence, f"user{sequence % 7}")
                                                    for producer in random.sample(range(30), 30)
                                                    for sequence in range(1 + 20 * part, 101 + 20 * part)))
                    for part in range(3)]
            processors = [self.start("data_processor.py", log) for log in logs]
            for processor in processors:
                self.assertEqual(processor.wait(60), 0, processor.stderr.read())
            self.assertEqual(query("SELECT sum(revenue) FROM users_revenue"), [(30 * 140,)])
            self.assertEqual(query("SELECT DISTINCT applied::text FROM event_producers"), [("{[1,141)}",)])

    def test_of_two_processors_that_meet_a_producer_new_or_known_the_second_waits(self):
        for start in (1, 3):
            first, second = (self.path(f"log{n}", named("p", n) + named("p", n + 1)) for n in (start, start + 1))
            connection = data_processor.open_database()
            with contextlib.closing(connection), connection.cursor() as sql:
                log = data_processor.Log(first)
                self.addCleanup(log.file.close)
                log.take_end()
                data_processor.count_once(sql, data_processor.Chunk(log, 0, True))
                other = self.start("data_processor.py", second)
                wait_until(lambda: query("SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
                                         "AND wait_event_type = 'Lock'"), "the other waits")
                connection.commit()
                self.assertEqual(other.wait(20), 0, other.stderr.read())
            self.assertRevenue({"user1": start + 2})

    def test_processors_at_once_on_a_plain_log_count_it_once(self):
        log = self.path("plain", EVENT + b"\n")
        self.processor(log)
        log.write_bytes(2 * log.read_bytes())
        blocker = psycopg2.connect(os.environ["DATABASE_URL"])
        with contextlib.closing(blocker), blocker.cursor() as sql:
            sql.execute("LOCK TABLE users_revenue IN EXCLUSIVE MODE")
            processors = [self.start("data_processor.py", log) for _ in range(3)]
            wait_until(lambda: query("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                                     "AND wait_event_type = 'Lock'") == [(3,)], "all wait")
        self.assertEqual([processor.wait(20) for processor in processors], [0, 0, 0])
        self.assertRevenue({"user1": 2})

    def test_a_producer_that_was_read_is_not_changed_by_others_until_the_commit(self):
        first, second = (self.path(f"log{n}", named("p", n) + named("p", 2)) for n in (1, 3))
        self.processor(self.path("known", named("p", 9)))
        log = data_processor.Log(first)
        self.addCleanup(log.file.close)
        log.take_end()
        totals, other = data_processor.Chunk.totals, []

        def decide(chunk, *arguments):  # between the reading of the producers and the writing
            other.append(self.start("data_processor.py", second))
            wait_until(lambda: other[0].poll() is not None or query(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"), "the other waits")
            return totals(chunk, *arguments)
        connection = data_processor.open_database()
        with contextlib.closing(connection), connection, unittest.mock.patch.object(data_processor.Chunk, "totals", decide):
            with connection.cursor() as sql:
                data_processor.count_once(sql, data_processor.Chunk(log, 0, True))
        self.assertEqual(other[0].wait(20), 0)
        self.assertRevenue({"user1": 4})

    def test_a_log_that_is_not_the_one_read_before_is_read_to_its_end_in_chunks(self):
        log = self.path("log", "".join(named("p", n) for n in range(1, 4)))
        processor = data_processor.Processor()
        with silence(), unittest.mock.patch.object(data_processor, "CHUNK_BYTES", 1), \
                unittest.mock.patch.object(data_processor, "BLOCK_BYTES", 150):
            processor.run_once([str(log)])
            log.write_text(named("p", 1) + "".join(named("q", n) for n in range(1, 6)))
            processor.run_once([str(log)])
        processor.connection.close()
        self.assertRevenue({"user1": 8})

    def test_a_position_never_moves_back_and_a_restored_log_goes_on_from_its_start(self):
        content = "".join(named("p", sequence) for sequence in range(1, 2001))
        log = self.path("log", content)
        self.processor(log)
        position = query("SELECT position FROM event_logs")
        log.write_text(content[:len(content) // 2].rpartition("\n")[0] + "\n")
        output, _ = self.processor(log)
        self.assertIn(" 0 applied", output)
        self.assertEqual(query("SELECT position FROM event_logs"), position)
        log.write_text(named("p", 1) + content.partition("\n")[2].replace("user1", "User1") + named("p", 2001))
        self.processor(log)
        self.assertRevenue({"user1": 2001})


class Properties(SystemTest):
    """Random events, batches, repetitions, orders, logs and processors."""

    def test_totals_equal_the_oracle(self):
        seed = TORTURE_SEED
        self.addCleanup(print, f"[seed {seed}]", end=" ", file=sys.stderr)
        for seed in range(seed, seed + 6):
            chance = random.Random(seed)
            query("TRUNCATE users_revenue, event_producers, event_logs")
            totals, batches = collections.defaultdict(Decimal), []
            with decimal.localcontext(decimal.Context(prec=80)):
                for producer in range(chance.randrange(1, 6)):
                    sequence = 1
                    for _ in range(chance.randrange(1, 30)):
                        lines = []
                        for _ in range(chance.choice([1, 1, 2, 10, 100])):
                            value = chance.choice([str(chance.randrange(-1000, 1000)), f"{chance.randrange(10**6)}.{chance.randrange(100):02}",
                                                   f"{chance.randrange(10**18)}.{chance.randrange(10**18):018}", "1e3", "-2.5E-3"])
                            user = f"user{chance.randrange(chance.choice([1, 10, 1000]))}"
                            name = chance.choice(["add_revenue", "subtract_revenue"])
                            totals[user] += Decimal(value) * (1 if name == "add_revenue" else -1)
                            lines.append(f'{{"userId": "{user}", "name": "{name}", "value": {value}, '
                                         f'"producerId": "p{producer}", "sequence": {sequence}}}\n')
                            sequence += chance.choice([1, 1, 1, 1, 1, 7])
                        batches.append(lines)
            batches += [batch[chance.randrange(len(batch)):] for batch in chance.choices(batches, k=len(batches))]
            chance.shuffle(batches)
            logs = [self.path(f"log{seed}-{n}") for n in range(chance.randrange(1, 6))]
            for log in logs:
                log.write_text("")
            for batch in batches:
                with open(chance.choice(logs), "a") as log:
                    log.write("".join(chance.choice([lambda b: b, lambda b: chance.sample(b, len(b))])(batch)))
            with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):
                small = ["-c", f"import sys, data_processor as d; d.CHUNK_BYTES = {chance.choice([1, 5000, 10**6])}; "
                               f"d.BLOCK_BYTES = {chance.choice([200, 1000, 262144])}; sys.exit(d.main())"]
                processors = [subprocess.Popen([sys.executable, *small, *chance.sample(logs, chance.randrange(1, len(logs) + 1))],
                                               stdout=subprocess.DEVNULL) for _ in range(chance.randrange(1, 4))]
            self.assertEqual({processor.wait(60) for processor in processors}, {0}, f"seed {seed}")
            self.processor(*logs)
            self.assertRevenue(totals)

    def test_ranges_are_sets(self):
        chance = random.Random(TORTURE_SEED)
        for _ in range(300):
            ranges, members = data_processor.Ranges(), set()
            for _ in range(20):
                low = chance.randrange(60)
                high = low + chance.randrange(1, 12)
                missing = [n for a, b in ranges.missing(low, high) for n in range(a, b)]
                ranges.add(low, high)
                self.assertEqual(missing, sorted(set(range(low, high)) - members))
                members |= set(range(low, high))
                pairs = list(zip(ranges.bounds[::2], ranges.bounds[1::2]))
                self.assertEqual({n for a, b in pairs for n in range(a, b)}, members)
                self.assertTrue(all(b < c for (_, b), (c, _) in zip(pairs, pairs[1:])), "neighbours are merged")


class Audit(SystemTest):
    """data_processor.py --verify."""

    def test_books_that_agree_books_that_differ_and_that_nothing_is_changed(self):
        logs = [self.path("one", "".join(named("p", n, f"user{n % 3}", "0.10") for n in (1, 2, 3, 4)) + EVENT.decode() + "\n"),
                self.path("two", named("p", 4, "user1", "0.10") + named("p", 5, "user9", -7) + "nonsense\n")]
        _, errors = self.processor("--verify", *logs, status=1)
        self.assertEqual(query("SELECT * FROM event_logs"), [])
        self.processor(*logs, status=1)
        copy = shutil.copy(logs[0], self.path("copy"))
        before = query("SELECT * FROM event_logs, event_producers, users_revenue ORDER BY 1, 2, 3, 4, 5, 6, 7")
        self.path("copy").write_bytes(logs[0].read_bytes() + EVENT.replace(b"1}", b"0}") + b"\n")
        output, _ = self.processor("--verify", *logs, copy)
        self.assertEqual(output, "users_revenue and the logs agree on 4 users.\n")
        self.assertEqual(query("SELECT * FROM event_logs, event_producers, users_revenue ORDER BY 1, 2, 3, 4, 5, 6, 7"), before)
        query("UPDATE users_revenue SET revenue = revenue + 0.01 WHERE user_id = 'user2'")
        query("DELETE FROM users_revenue WHERE user_id = 'user9'")
        query("INSERT INTO users_revenue VALUES ('older', 5)")
        output, _ = self.processor("--verify", *logs, status=1)
        self.assertEqual(output.splitlines()[:3], ["older: 5 in users_revenue, 0 in the logs, difference 5",
                                                   "user2: 0.11 in users_revenue, 0.10 in the logs, difference 0.01",
                                                   "user9: 0 in users_revenue, -7 in the logs, difference 7"])
        self.assertIn("3 users differ", output)

    def test_a_log_that_cannot_be_read_is_no_agreement(self):
        self.processor(self.path("log", EVENT + b"\n"))
        output, errors = self.processor("--verify", "log", "missing", status=1)
        self.assertIn("missing: No such file", errors)

    def test_without_tables_it_creates_none(self):
        query("DROP TABLE users_revenue, event_producers, event_logs")
        _, errors = self.processor("--verify", self.path("log", EVENT + b"\n"), status=1)
        self.assertIn("do not exist yet", errors)
        self.assertEqual(query("SELECT to_regclass('users_revenue')"), [(None,)])


if __name__ == "__main__":
    unittest.main()
