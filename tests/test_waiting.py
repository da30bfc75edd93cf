"""A processor waits for nobody without a bound and a word, and one trouble stops only itself."""
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
import unittest.mock

import psycopg2

import data_processor
from tests.tools import SystemTest, alive, children_of, patched, wait_until
from tests.tools_database import query, setUpModule  # noqa: F401
from tests.tools_events import with_id
from tests.tools_parts import captured


def settings(**values):
    """Return a context with other settings in this process."""
    return unittest.mock.patch.multiple(data_processor, **values)


def run_patched(patch, *arguments, **options):
    """Start data_processor.py after lines of Python have changed it; return the process."""
    command, environment = patched("data_processor", patch)
    return subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@contextlib.contextmanager
def open_transaction(statement):
    """Return a context in which somebody has executed a statement and does not commit."""
    connection = psycopg2.connect(os.environ["DATABASE_URL"])
    with contextlib.closing(connection), connection.cursor() as sql:
        sql.execute(statement)
        yield connection


class Locks(SystemTest):
    """What somebody else has locked is waited for in bounded steps."""

    STATEMENTS = {
        "a user": "UPDATE users_revenue SET revenue = revenue",
        "a producer": "SELECT FROM event_producers FOR UPDATE",
        "a log": "SELECT FROM event_logs FOR UPDATE",
        "all of users_revenue": "LOCK TABLE users_revenue",
        "One of the tables": "LOCK TABLE event_logs",
    }
    TABLES = {
        "a user": "users_revenue",
        "a producer": "event_producers",
        "a log": "event_logs",
        "all of users_revenue": "One of the tables",
    }

    def test_a_lock_is_named_and_waited_for_so_often(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        for case, statement in self.STATEMENTS.items():
            with self.subTest(case), open_transaction(statement):
                with open(log, "a", encoding="utf-8") as file:
                    file.write(with_id("p", os.fstat(file.fileno()).st_size))
                with captured() as output, settings(LOCK_SECONDS=0.1, ATTEMPTS=3):
                    with self.assertRaises(data_processor.Locked) as raised:
                        data_processor.run([str(log)])
                    said = output()
                table = self.TABLES.get(case, case)
                self.assertTrue(str(raised.exception).startswith(f"{table} is locked"))
                self.assertEqual(said.count("Waiting: "), 1)
                question = str(raised.exception).partition("which: ")[2]
                shown = query(question)
                self.assertTrue(shown, "the statement shows who it is")

    def test_a_run_goes_on_when_the_lock_is_free(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2))
        with open_transaction("UPDATE users_revenue SET revenue = revenue") as connection:
            run = run_patched("data_processor.LOCK_SECONDS = 0.2", log)
            self.assertIn("Waiting: users_revenue is locked", run.stderr.readline())
            connection.rollback()
        self.assertEqual(run.wait(20), 0, run.communicate())
        self.assertRevenue({"user1": 2})
        run.communicate()

    def test_ctrl_c_ends_a_run_that_waits_for_a_lock_at_once(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2))
        with open_transaction("UPDATE users_revenue SET revenue = revenue"):
            run = self.start("data_processor.py", log)
            waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            wait_until(lambda: query(waiting), "it waits for the lock")
            run.send_signal(signal.SIGINT)
            self.assertEqual(run.wait(5), 130)

    def test_a_log_that_a_stranger_locks_stops_only_itself(self):
        locked = self.path("locked", with_id("p", 1))
        other = self.path("other", with_id("q", 1))
        with open(locked, "rb") as stranger:
            fcntl.flock(stranger, fcntl.LOCK_EX)
            run = run_patched("data_processor.LogReader.find_end.__defaults__ = (0.1,)\n"
                              "data_processor.LOCK_SECONDS = 0.1", locked, other)
            _, errors = run.communicate(timeout=30)
        self.assertEqual(run.returncode, 1)
        self.assertIn(f"{locked}: another program holds its lock", errors)
        self.assertRevenue({"user1": 1})

    def test_a_follower_goes_on_although_a_stranger_locks_a_renamed_log(self):
        log = self.path("server-events.jsonl", with_id("p", 1))
        follower = run_patched("data_processor.LOCK_SECONDS = 0.3", "--follow", log)
        self.addCleanup(follower.communicate)
        self.addCleanup(follower.kill)
        wait_until(lambda: query("SELECT 1 FROM users_revenue"), "it follows")
        with open(log, "rb") as stranger:
            fcntl.flock(stranger, fcntl.LOCK_EX)
            log.rename(self.directory / "archived")
            self.path("server-events.jsonl", with_id("q", 1))
            wait_until(
                lambda: query("SELECT revenue FROM users_revenue") == [(2,)],
                "the new log is applied",
            )


class StandStill(SystemTest):
    """Whoever stands still is given up."""

    def test_a_child_that_is_stopped_is_given_up(self):
        log = self.path("log", with_id("p", 1))
        stop = (
            "import os, signal\n"
            "data_processor.CHILD_SECONDS = 0.5\n"
            "send_tally = data_processor.send_tally\n"
            "def stopped_once(*arguments):\n"
            f"    with open({str(self.path('stopped'))!r}, 'a+') as marker:\n"
            "        first = marker.tell() == 0\n"
            "        marker.write('x')\n"
            "    if first: os.kill(os.getpid(), signal.SIGSTOP)\n"
            "    send_tally(*arguments)\n"
            "data_processor.send_tally = stopped_once"
        )
        run = run_patched(stop, log)
        _, errors = run.communicate(timeout=30)
        self.assertEqual(run.returncode, 0, errors)
        self.assertEqual(self.path("stopped").read_text(), "xx", "a child was stopped once")
        self.assertRevenue({"user1": 1})

    def test_a_child_that_is_stopped_in_the_midst_of_its_result_is_given_up(self):
        log = self.path("log", with_id("p", 1))
        stop = (
            "import os, signal\n"
            "data_processor.CHILD_SECONDS = 0.5\n"
            "data_processor.ATTEMPTS = 2\n"
            "def half(log, part, marks, pipe):\n"
            "    os.write(pipe, b'half of a result')\n"
            "    os.kill(os.getpid(), signal.SIGSTOP)\n"
            "data_processor.send_tally = half"
        )
        run = run_patched(stop, log)
        _, errors = run.communicate(timeout=30)
        self.assertEqual(run.returncode, 1)
        self.assertIn("stood still for 0.5 seconds", errors)
        self.assertRevenue({})

    def test_a_stopped_child_of_a_killed_parent_holds_no_transaction(self):
        log = self.path("log", with_id("p", 1))
        stop = (
            "import os, signal, time\n"
            "send_tally = data_processor.send_tally\n"
            "def stopped(*arguments):\n"
            "    data_processor.tally_slice = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)\n"
            "    send_tally(*arguments)\n"
            "data_processor.send_tally = stopped"
        )
        run = run_patched(stop, log)
        (child,) = wait_until(lambda: children_of(run.pid), "there is a child")

        def is_stopped():
            with open(f"/proc/{child}/stat", encoding="ascii") as stat:
                return stat.read().rpartition(") ")[2][0] == "T"

        try:
            wait_until(is_stopped, "the child is stopped")
            run.kill()
            run.communicate()
            idle = (
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
                "AND state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()"
            )
            wait_until(lambda: not query(idle), "the transaction has ended")
        finally:
            os.kill(child, signal.SIGKILL)
            wait_until(lambda: not alive(child), "the child has ended")

    def test_a_database_that_stands_still_is_given_up(self):
        log = self.path("log", with_id("p", 1))
        database = data_processor.Database()
        database.connect()
        backend = database.connection.get_backend_pid()
        os.kill(backend, signal.SIGSTOP)
        try:
            with settings(STATEMENT_SECONDS=0.2), self.assertRaises(data_processor.Silent):
                database.recorded_positions()
            self.assertTrue(database.connection.closed)
        finally:
            os.kill(backend, signal.SIGCONT)
        self.processor(log)

    def test_the_network_is_watched_while_data_is_unacknowledged(self):
        with contextlib.closing(data_processor.connect()) as connection:
            parameters = connection.info.dsn_parameters
        self.assertEqual(parameters["tcp_user_timeout"], "60000")

    def test_a_processor_that_stands_still_while_it_reads_ids_releases_its_locks(self):
        # So many ranges that PostgreSQL cannot send all of them into the buffers of a connection.
        lines = "".join(with_id("p", 2 * number) for number in range(1, 100_001))
        log = self.path("log", lines)
        stop = (
            "import os, signal\n"
            "data_processor.IDLE_SECONDS = 1\n"
            "make = data_processor.NewIds._make\n"
            "def stop_once(row):\n"
            "    data_processor.NewIds._make = make\n"
            "    os.kill(os.getpid(), signal.SIGSTOP)\n"
            "    return make(row)\n"
            "data_processor.NewIds._make = stop_once"
        )
        stopped = run_patched(stop, log)
        _, status = os.waitpid(stopped.pid, os.WUNTRACED)
        self.assertTrue(os.WIFSTOPPED(status))
        try:
            self.processor(log)
            self.assertRevenue({"user1": 100_000})
        finally:
            stopped.kill()
            stopped.communicate()


class OneTrouble(SystemTest):
    """One trouble stops only itself."""

    def test_an_event_that_postgresql_refuses_stops_its_log_alone(self):
        refusals = {
            "a check": "ALTER TABLE users_revenue ADD CHECK (user_id <> 'bad')",
            "a foreign key": "CREATE TABLE IF NOT EXISTS customers (id text PRIMARY KEY);"
            "INSERT INTO customers VALUES ('good') ON CONFLICT DO NOTHING;"
            "ALTER TABLE users_revenue ADD FOREIGN KEY (user_id) REFERENCES customers",
            "a trigger": "CREATE OR REPLACE FUNCTION refuses() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN IF NEW.user_id = ''bad'' THEN RAISE EXCEPTION ''no bad user''; END IF; "
            "RETURN NEW; END';"
            "CREATE TRIGGER refusing BEFORE INSERT ON users_revenue "
            "FOR EACH ROW EXECUTE FUNCTION refuses()",
        }
        for refusal, statement in refusals.items():
            with self.subTest(refusal):
                self.setUp()
                query(statement)
                self.path("log.1", with_id("p", 1, "bad"))
                log = self.path("log", with_id("q", 1, "good"))
                _, errors = self.processor(log, status=1)
                self.assertRegex(errors, r"^\S*/log\.1: PostgreSQL refused it: .*bad")
                self.assertEqual(errors.count("\n"), 1)
                self.assertRevenue({"good": 1})
        query("DROP TABLE users_revenue; DROP TABLE customers")

    def test_no_partition_for_a_user_stops_its_log_alone(self):
        query(
            "DROP TABLE users_revenue, event_producers, event_logs;"
            "CREATE TABLE users_revenue (user_id text PRIMARY KEY, revenue numeric NOT NULL) "
            "PARTITION BY LIST (user_id);"
            "CREATE TABLE good_users PARTITION OF users_revenue FOR VALUES IN ('good')"
        )
        self.path("log.1", with_id("p", 1, "bad"))
        log = self.path("log", with_id("q", 1, "good"))
        _, errors = self.processor(log, status=1)
        self.assertIn("no partition of relation", errors)
        self.assertRevenue({"good": 1})

    def test_what_is_named_like_a_rotated_log_and_is_none_is_passed_over(self):
        log = self.path("log", with_id("p", 1))
        self.path("log.1").mkdir()
        self.path("log.2").symlink_to("nowhere")
        os.mkfifo(self.path("log.3"))
        self.processor(log)
        self.processor("--verify", log)
        self.assertRevenue({"user1": 1})

    def test_a_rotated_log_that_vanishes_is_passed_over(self):
        log = self.path("log", with_id("p", 1))
        vanishing = self.path("log.1", with_id("q", 1))
        vanish = (
            "import os\n"
            "opening = data_processor.LogReader.__init__\n"
            "def vanish(self, path):\n"
            f"    if path.endswith('.1'): os.unlink({str(vanishing)!r})\n"
            "    opening(self, path)\n"
            "data_processor.LogReader.__init__ = vanish"
        )
        run = run_patched(vanish, log)
        _, errors = run.communicate(timeout=30)
        self.assertEqual((run.returncode, errors), (0, ""))
        self.assertFalse(vanishing.exists())
        self.assertRevenue({"user1": 1})

    def test_a_log_where_nothing_can_be_synced_is_read(self):
        log = self.path("log", with_id("p", 1))
        for name in ("EINVAL", "ENOTSUP", "EROFS"):
            with self.subTest(name):
                self.setUp()
                no_sync = (
                    "import errno, os\n"
                    "def no_sync(fd): raise OSError(errno.%s, 'no sync here')\n"
                    "data_processor.sync_file = no_sync" % name
                )
                log = self.path("log", with_id("p", 1))
                run = run_patched(no_sync, log)
                self.assertEqual(run.communicate(timeout=30)[1], "")
                self.assertRevenue({"user1": 1})

    def test_a_log_that_is_truncated_while_it_is_read_stops_only_itself(self):
        log = self.path("log.1", with_id("p", 1) + with_id("p", 2))
        self.path("log", with_id("q", 1))
        cut = (
            "import os\n"
            "count_once = data_processor.count_once\n"
            "def cut(sql, log, tallies):\n"
            f"    if log.path.endswith('.1'): os.truncate({str(log)!r}, 10)\n"
            "    return count_once(sql, log, tallies)\n"
            "data_processor.count_once = cut"
        )
        run = run_patched(cut, self.path("log"))
        _, errors = run.communicate(timeout=30)
        self.assertEqual(run.returncode, 1)
        self.assertIn("log.1: was changed while it was read", errors)
        self.assertRevenue({"user1": 1})

    def test_a_chunk_becomes_smaller_after_the_death_of_a_child(self):
        log = self.path("log", "".join(with_id("p", number) for number in range(1, 20_001)))
        die = (
            "import os\n"
            "data_processor.CHUNK_BYTES = 1024 * 1024\n"
            "send_tally = data_processor.send_tally\n"
            "def die_of_much(log, part, marks, pipe):\n"
            "    if part.end - part.start > 300 * 1024: os._exit(1)\n"
            "    send_tally(log, part, marks, pipe)\n"
            "data_processor.send_tally = die_of_much\n"
            "init = data_processor.Applier.__init__\n"
            "def small(self, *arguments):\n"
            "    init(self, *arguments)\n"
            "    self.chunk_bytes = data_processor.CHUNK_BYTES\n"
            "data_processor.Applier.__init__ = small"
        )
        self.assertGreater(log.stat().st_size, 1024 * 1024)
        run = run_patched(die, log)
        _, errors = run.communicate(timeout=60)
        self.assertEqual(run.returncode, 0, errors)
        self.assertRevenue({"user1": 20_000})

    def test_a_missing_process_is_not_blamed_on_the_log(self):
        log = self.path("log", with_id("p", 1))
        no_fork = (
            "import errno, multiprocessing\n"
            "data_processor.ATTEMPTS = 2\n"
            "def no_fork(self): raise OSError(errno.EAGAIN, 'Resource temporarily unavailable')\n"
            "multiprocessing.get_context('fork').Process.start = no_fork"
        )
        run = run_patched(no_fork, log)
        _, errors = run.communicate(timeout=30)
        self.assertEqual(run.returncode, 1)
        self.assertEqual(
            errors, "No child process can start: Resource temporarily unavailable.\n"
        )

    def test_a_hundred_lines_are_named_and_the_others_counted(self):
        log = self.path("log", "nonsense\n" * 1500 + with_id("p", 1))
        _, errors = self.processor(log, status=1)
        self.assertEqual(len(re.findall("byte [0-9]+: not JSON", errors)), 100)
        self.assertIn("log: 1,400 more lines were rejected.\n", errors)

    def test_a_follower_says_nothing_twice(self):
        plain = '{"userId": "u", "name": "add_revenue", "value": 1}\n'
        log = self.path("log", plain * 200)
        applier = data_processor.Follower([str(log)])
        self.addCleanup(applier.database.close)
        self.addCleanup(lambda: [held.close() for held in applier.held.values()])
        with captured() as output:
            applier.prepare()
            applier.look()
            log.write_text(plain + plain.replace("1", "2") + plain * 198, encoding="utf-8")
            applier.look()
            first = output()
            for _ in range(3):
                with open(log, "a", encoding="utf-8") as file:
                    file.write(with_id("p", os.fstat(file.fileno()).st_size))
                applier.prepare()
                applier.look()
            later = output()[len(first) :]
        self.assertEqual(first.count("byte "), 100)
        self.assertNotIn("byte ", later)
        self.assertRevenue({"u": 200, "user1": 3})

    def test_many_logs_are_looked_up_in_one_listing(self):
        logs = [str(self.path(f"log{number}", "")) for number in range(50)]
        with unittest.mock.patch.object(os, "listdir", wraps=os.listdir) as listdir:
            found = data_processor.Applier(None).find_logs(logs)
        self.assertEqual(found, logs)
        self.assertEqual(listdir.call_count, 1)


class Output(SystemTest):
    """Output that cannot be written at once is dropped."""

    def test_output_that_nobody_reads_delays_nothing(self):
        log = self.path("log", "nonsense\n" * 90 + with_id("p", 1))
        for stream in ("stdout", "stderr"):
            for kind in ("pipe", "terminal"):
                with self.subTest(kind, stream=stream):
                    self.setUp()
                    self.path("log", "nonsense\n" * 90 + with_id("p", 1))
                    if kind == "pipe":
                        reading, writing = os.pipe()
                    else:
                        reading, writing = os.openpty()
                    fill(writing)
                    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                    streams[stream] = writing
                    begun = time.monotonic()
                    run = subprocess.run(
                        [sys.executable, data_processor.__file__, log], timeout=20, **streams
                    )
                    os.close(reading)
                    os.close(writing)
                    self.assertEqual(run.returncode, 1)
                    self.assertLess(time.monotonic() - begun, 15)
                    self.assertRevenue({"user1": 1})

    def test_progress_fits_into_a_line_of_the_terminal(self):
        reading, writing = os.openpty()
        with open(writing, "w", encoding="utf-8") as terminal:
            size = unittest.mock.patch.object(
                os, "get_terminal_size", lambda fd: os.terminal_size((20, 5))
            )
            with size, contextlib.redirect_stderr(terminal):
                data_processor.show_progress("x" * 100)
        self.assertEqual(os.read(reading, 1000), b"\r\x1b[K" + b"x" * 19)
        os.close(reading)


def fill(fd):
    """Write to a pipe or terminal until it takes nothing more."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"x" * 1000)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"x")
    os.set_blocking(fd, True)


class FromStart(SystemTest):
    """--from-start reads every log from its first byte."""

    def test_a_line_that_was_mended_is_counted(self):
        first = with_id("p", 1)
        mended = with_id("p", 2).replace(" 1,", "  1,", 1)
        bad = mended.replace("  1,", ' "",')
        rest = "".join(with_id("p", number) for number in range(3, 2000))
        self.assertGreater(len(rest), data_processor.DIGEST_BYTES)
        log = self.path("log", first + bad + rest)
        self.processor(log, status=1)
        log.write_text(first + mended + rest, encoding="utf-8")
        self.processor(log)
        self.assertRevenue({"user1": 1998})
        output, _ = self.processor("--from-start", log)
        self.assertIn("1 applied, 1,998 repeated", output)
        self.assertRevenue({"user1": 1999})

    def test_a_plain_log_counts_once(self):
        plain = '{"userId": "u", "name": "add_revenue", "value": 1}\n'
        log = self.path("log", plain * 10)
        self.processor(log)
        with open(log, "a", encoding="utf-8") as file:
            file.write(plain * 3)
        output, _ = self.processor("--from-start", log)
        self.assertIn("3 applied", output)
        self.assertRevenue({"u": 13})

    def test_a_follower_reads_a_log_from_its_start_once(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        follower = self.start("data_processor.py", "--follow", "--from-start", log)
        self.assertIn("0 applied, 1 repeated", follower.stdout.readline())
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2))
        self.assertIn("1 applied, 0 repeated", follower.stdout.readline())

    def test_verify_says_when_it_would_help(self):
        log = self.path("log", with_id("p", 1))
        query("INSERT INTO users_revenue VALUES ('other', 1)")
        output, _ = self.processor("--verify", log, status=1)
        self.assertIn("--from-start", output)
