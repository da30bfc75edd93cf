"""A processor waits for nobody without a bound and a word."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import unittest.mock

import psycopg2

import data_processor
from tests.tools import (
    SystemTest,
    alive,
    children_of,
    fill,
    next_line,
    open_terminal,
    wait_until,
)
from tests.tools_database import (
    drop_tables,
    open_transaction,
    query,
    setUpModule,
    stopped_backend,
    waiting,
)
from tests.tools_events import with_id
from tests.tools_parts import captured


def settings(**values):
    """Return a context with other settings in this process."""
    return unittest.mock.patch.multiple(data_processor, **values)


def without_place(url):
    """Return a function that gives the parts of a database URL but for host and port."""
    parts = psycopg2.extensions.parse_dsn(url)
    parts.pop("host", None)
    parts.pop("port", None)
    return lambda _: parts


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
                question = str(raised.exception).partition("pg_prepared_xacts): ")[2]
                shown = query(question)
                self.assertTrue(shown, "the statement shows who it is")

    def test_the_holder_of_the_advisory_lock_is_shown_before_there_are_tables(self):
        drop_tables()
        log = self.path("log", with_id("p", 1))
        holding = "SELECT pg_advisory_xact_lock(hashtext('create_table.sql'))"
        with open_transaction(holding) as holder, settings(LOCK_SECONDS=0.1, ATTEMPTS=1):
            with self.assertRaises(data_processor.Locked) as raised:
                data_processor.run([str(log)])
            question = str(raised.exception).partition("pg_prepared_xacts): ")[2]
            shown = query(question)
            self.assertIn(holder.get_backend_pid(), [row[0] for row in shown])

    def test_a_run_goes_on_when_the_lock_is_free(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2))
        with open_transaction("UPDATE users_revenue SET revenue = revenue") as connection:
            quick = "data_processor.LOCK_SECONDS = 0.2"
            run = self.start("data_processor.py", log, patch=quick)
            self.assertIn("Waiting: users_revenue is locked", next_line(run.stderr))
            connection.rollback()
        _, errors = run.communicate(timeout=30)
        self.assertEqual(run.returncode, 0, errors)
        self.assertRevenue({"user1": 2})

    def test_rows_that_are_deleted_while_they_are_waited_for_lose_nothing(self):
        log = self.path("log", with_id("a", 1) + with_id("p", 1))
        self.processor(log)
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("a", 2) + with_id("p", 2))
        held = "SELECT FROM event_producers WHERE producer_id = 'a' FOR UPDATE"
        with open_transaction(held) as connection:
            run = self.start("data_processor.py", log)
            wait_until(waiting, "it waits for the producers")
            query("DELETE FROM event_producers WHERE producer_id = 'p'")
            connection.rollback()
        _, errors = run.communicate(timeout=30)
        self.assertEqual(run.returncode, 0, errors)
        self.assertRevenue({"user1": 4})

    def test_a_line_that_is_mended_while_rows_are_waited_for_is_counted(self):
        mended = with_id("p", 3).replace(" 1,", "  1,", 1)
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2) + mended.replace("  1,", ' "",'))
        with open_transaction("UPDATE users_revenue SET revenue = revenue") as connection:
            run = self.start("data_processor.py", log)
            wait_until(waiting, "it waits for a user")
            text = log.read_text(encoding="utf-8")
            log.write_text(text.replace(' "",', "  1,"), encoding="utf-8")
            connection.rollback()
        _, errors = run.communicate(timeout=30)
        self.assertEqual(run.returncode, 1, errors)
        self.assertIn("was changed while it was read", errors)
        self.processor(log)
        self.assertRevenue({"user1": 3})

    def test_ctrl_c_ends_a_run_that_waits_for_a_lock_at_once(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2))
        with open_transaction("UPDATE users_revenue SET revenue = revenue"):
            run = self.start("data_processor.py", log)
            wait_until(waiting, "it waits for the lock")
            run.send_signal(signal.SIGINT)
            self.assertEqual(run.wait(20), 130)

    def test_a_log_that_a_stranger_locks_stops_only_itself(self):
        locked = self.path("locked", with_id("p", 1))
        other = self.path("other", with_id("q", 1))
        with open(locked, "rb") as stranger:
            fcntl.flock(stranger, fcntl.LOCK_EX)
            quick = (
                "data_processor.LogReader.find_end.__defaults__ = (0.1,)\n"
                "data_processor.LOCK_SECONDS = 0.1"
            )
            _, errors = self.processor(locked, other, status=1, patch=quick)
        self.assertIn(f"{locked}: another program holds its lock", errors)
        self.assertRevenue({"user1": 1})

    def test_verify_names_the_table_that_is_locked(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        with open_transaction("LOCK TABLE users_revenue"), settings(LOCK_SECONDS=0.1):
            with captured(), self.assertRaises(data_processor.Locked):
                data_processor.verify([str(log)])

    def test_a_silent_database_is_named_at_once(self):
        log = self.path("log", with_id("p", 1))
        silent = [data_processor.Silent("It is silent."), unittest.mock.DEFAULT]
        once = unittest.mock.patch.object(
            data_processor, "apply_chunk", side_effect=silent, wraps=data_processor.apply_chunk
        )
        with captured() as output, once:
            self.assertTrue(data_processor.run([str(log)]))
            said = output()
        self.assertIn("Waiting: It is silent.", said)
        self.assertRevenue({"user1": 1})

    def test_a_log_that_is_renamed_and_stays_locked_is_named(self):
        log = self.path("log", with_id("p", 1))
        self.processor(self.path("other", with_id("q", 1)))
        for mode in ([], ["--verify"]):
            with self.subTest(mode), open(log, "rb") as stranger:
                fcntl.flock(stranger, fcntl.LOCK_EX)
                rename = (
                    "import os\n"
                    "find_end = data_processor.LogReader.find_end\n"
                    "def rename(self, seconds):\n"
                    "    os.rename('log', 'archived')\n"
                    "    return find_end(self, seconds)\n"
                    "data_processor.LogReader.find_end = rename"
                )
                _, errors = self.processor(*mode, "log", status=1, patch=rename)
                self.assertIn("log: was renamed; another program locks it.", errors)
            self.path("archived").rename(log)

    def test_a_follower_goes_on_although_a_stranger_locks_a_renamed_log(self):
        log = self.path("server-events.jsonl", with_id("p", 1))
        quick = "data_processor.LOCK_SECONDS = 0.3"
        self.start("data_processor.py", "--follow", log, patch=quick)
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
            "data_processor.SILENT_CHILD_SECONDS = 0.5\n"
            "send_tally = data_processor.send_tally\n"
            "def stopped_once(*arguments):\n"
            f"    with open({str(self.path('stopped'))!r}, 'a+') as marker:\n"
            "        first = marker.tell() == 0\n"
            "        marker.write('x')\n"
            "    if first: os.kill(os.getpid(), signal.SIGSTOP)\n"
            "    send_tally(*arguments)\n"
            "data_processor.send_tally = stopped_once"
        )
        self.processor(log, patch=stop)
        self.assertEqual(self.path("stopped").read_text(), "xx", "a child was stopped once")
        self.assertRevenue({"user1": 1})

    def test_a_child_that_is_stopped_in_the_midst_of_its_result_is_given_up(self):
        log = self.path("log", with_id("p", 1))
        stop = (
            "import os, signal\n"
            "data_processor.SILENT_CHILD_SECONDS = 0.5\n"
            "data_processor.ATTEMPTS = 2\n"
            "def half(log, part, marks, pipe):\n"
            "    os.write(pipe, b'half of a result')\n"
            "    os.kill(os.getpid(), signal.SIGSTOP)\n"
            "data_processor.send_tally = half"
        )
        _, errors = self.processor(log, status=1, patch=stop)
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
        run = self.start("data_processor.py", log, patch=stop)
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
        with settings(STATEMENT_SECONDS=2):
            database.connect()
        backend = database.connection.get_backend_pid()
        with stopped_backend(backend):
            with self.assertRaises(data_processor.Silent):
                database.recorded_positions([])
            self.assertTrue(database.connection.closed)
        self.processor(log)

    def test_nothing_is_asked_once_a_connection_is_made(self):
        # psycopg2 would wait for the answer without a bound.
        (database,) = query("SELECT current_database()")[0]
        query(f"ALTER DATABASE {database} SET datestyle = 'German'")
        try:
            with contextlib.closing(data_processor.connect()) as connection:
                pid = connection.get_backend_pid()
                asked = query("SELECT query FROM pg_stat_activity WHERE pid = %s", [pid])
                self.assertEqual(asked, [("",)])
        finally:
            query(f"ALTER DATABASE {database} RESET datestyle")

    def test_a_silent_host_is_given_up_for_the_next(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            server = query("SELECT host(inet_server_addr()), inet_server_port()")
            ((host, port),) = server
            parameters = {
                "host": f"127.0.0.1,{host or 'localhost'}",
                "port": f"{silent.getsockname()[1]},{port or os.environ.get('PGPORT', '5432')}",
                "connect_timeout": 2,
            }
            connect = data_processor.connect
            with unittest.mock.patch.object(
                data_processor, "connect", lambda **_: connect(**parameters)
            ), unittest.mock.patch.object(
                data_processor, "parse_database_url", without_place(os.environ["DATABASE_URL"])
            ):
                connection = data_processor.open_connection(60)
        with contextlib.closing(connection), connection.cursor() as sql:
            sql.execute("SELECT 1")
            self.assertEqual(sql.fetchall(), [(1,)])

    def test_a_statement_that_takes_too_long_makes_the_chunk_smaller(self):
        self.refuse_large_chunks("SELECT pg_sleep(10)")

    def test_a_postgresql_without_memory_makes_the_chunk_smaller(self):
        self.refuse_large_chunks("DO $$ BEGIN RAISE 'none' USING ERRCODE = '53200'; END $$")

    def refuse_large_chunks(self, statement):
        """Check that a log is applied although this statement fails in each large chunk."""
        log = self.path("log", "".join(with_id("p", number) for number in range(1, 5001)))
        slow = (
            "data_processor.STATEMENT_SECONDS = 1\n"
            "data_processor.SLICE_BYTES = 1024\n"
            "data_processor.CHUNK_BYTES = 512 * 1024\n"
            "count_once = data_processor.count_once\n"
            "def count(sql, log, tallies):\n"
            "    events = sum(tally.events for tally in tallies)\n"
            f"    if events > 2000: sql.execute({statement!r})\n"
            "    return count_once(sql, log, tallies)\n"
            "data_processor.count_once = count"
        )
        self.processor(log, patch=slow)
        self.assertRevenue({"user1": 5000})

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
            "data_processor.IDLE_SECONDS = 4\n"
            "make = data_processor.NewIds._make\n"
            "def stop_once(row):\n"
            "    data_processor.NewIds._make = make\n"
            "    os.kill(os.getpid(), signal.SIGSTOP)\n"
            "    return make(row)\n"
            "data_processor.NewIds._make = stop_once"
        )
        stopped = self.start("data_processor.py", log, patch=stop)
        _, status = os.waitpid(stopped.pid, os.WUNTRACED)
        self.assertTrue(os.WIFSTOPPED(status))
        try:
            self.processor(log)
            self.assertRevenue({"user1": 100_000})
        finally:
            stopped.kill()
            stopped.communicate()


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
                        reading, writing = open_terminal()
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
        reading, writing = open_terminal()
        os.set_blocking(reading, False)
        with open(writing, "w", encoding="utf-8") as terminal:
            size = unittest.mock.patch.object(
                os, "get_terminal_size", lambda fd: os.terminal_size((20, 5))
            )
            with size, contextlib.redirect_stderr(terminal):
                data_processor.show_progress("x" * 100)
        self.assertEqual(os.read(reading, 1000), b"\r\x1b[K" + b"x" * 19)
        os.close(reading)
