"""Processors that run at once count each event once."""

import contextlib
import itertools
import os
import random
import threading
import unittest
import unittest.mock

import psycopg2
import psycopg2.extensions

import data_processor
from tests.tools import SystemTest, wait_until
from tests.tools_database import connect, empty_tables, locked_users, query, setUpModule, waiting
from tests.tools_events import EVENT, with_id
from tests.tools_parts import apply_uncommitted, captured


class Interrupting(psycopg2.extensions.cursor):
    """A cursor of an Interrupted connection."""

    def execute(self, *arguments):
        """Let others come between, then execute a statement."""
        self.connection.come_between(self.connection.statements)
        self.connection.statements += 1
        super().execute(*arguments)


class Interrupted(psycopg2.extensions.connection):
    """A connection between whose statements others come.

    statements    how many were executed
    come_between  what is called with that number before each
    """

    statements = 0
    come_between = None

    def cursor(self, *arguments, **options):
        """Return a cursor that lets others come between."""
        return super().cursor(*arguments, cursor_factory=Interrupting, **options)


class AtOnce(SystemTest):
    """Processors at once wait for each other, and never for ever."""

    def test_two_logs_of_one_producer_processed_at_the_same_moment_count_once(self):
        for attempt in range(3):
            empty_tables()
            logs = [
                self.path(
                    f"log{part}",
                    "".join(
                        with_id(f"p{producer}", sequence, f"user{sequence % 7}")
                        for producer in random.sample(range(30), 30)
                        for sequence in range(1 + 20 * part, 101 + 20 * part)
                    ),
                )
                for part in range(3)
            ]
            processors = [self.start("data_processor.py", log) for log in logs]
            for processor in processors:
                self.assertEqual(processor.wait(60), 0, processor.stderr.read())
            self.assertEqual(query("SELECT sum(revenue) FROM users_revenue"), [(30 * 140,)])
            self.assertEqual(
                query("SELECT DISTINCT applied::text FROM event_producers"), [("{[1,141)}",)]
            )

    def test_of_two_processors_that_meet_a_producer_the_second_waits(self):
        for start in (1, 3):
            middle = start + 1
            first = self.path("first", with_id("p", start) + with_id("p", middle))
            second = self.path("second", with_id("p", middle) + with_id("p", middle + 1))
            with contextlib.closing(connect()) as connection:
                apply_uncommitted(first, connection)
                other = self.start("data_processor.py", second)
                wait_until(waiting, "the other waits")
                connection.commit()
                self.assertEqual(other.wait(20), 0, other.stderr.read())
            self.assertRevenue({"user1": start + 2})

    def test_processors_at_once_on_a_plain_log_count_it_once(self):
        log = self.path("plain", EVENT + b"\n")
        self.processor(log)
        log.write_bytes(2 * log.read_bytes())
        with locked_users():
            processors = [self.start("data_processor.py", log) for _ in range(3)]
            wait_until(lambda: len(waiting()) == 3, "all wait")
        self.assertEqual([processor.wait(20) for processor in processors], [0, 0, 0])
        self.assertRevenue({"user1": 2})

    def test_a_producer_that_was_read_is_not_changed_by_others_until_the_commit(self):
        first = self.path("first", with_id("p", 1) + with_id("p", 2))
        second = self.path("second", with_id("p", 3) + with_id("p", 2))
        self.processor(self.path("known", with_id("p", 9)))
        make = data_processor.NewIds._make
        other = []

        def wait_for_other(row):  # between the reading of the producers and the writing
            if not other:
                other.append(self.start("data_processor.py", second))
                wait_until(lambda: other[0].poll() is not None or waiting(), "the other waits")
            return make(row)

        with (
            contextlib.closing(connect()) as connection,
            connection,
            unittest.mock.patch.object(data_processor.NewIds, "_make", wait_for_other),
        ):
            apply_uncommitted(first, connection)
        self.assertEqual(other[0].wait(20), 0)
        self.assertRevenue({"user1": 4})

    def test_two_processors_come_between_any_two_statements_of_a_third(self):
        pairs = [(1, 2), (2, 3), (1, 3)]
        paths = [self.path(f"log{a}{b}", with_id("p", a) + with_id("p", b)) for a, b in pairs]

        def intrude(path):
            with contextlib.closing(connect(options="-c lock_timeout=20ms")) as connection:
                with contextlib.suppress(data_processor.Locked):
                    apply_uncommitted(path, connection)
                    connection.commit()

        for intrusions in itertools.combinations_with_replacement(range(5), 2):
            with self.subTest(intrusions=intrusions):
                empty_tables()
                begun = []

                def come_between(statement):
                    for at, path in zip(intrusions, paths[1:]):
                        if at == statement:
                            begun.append(path)
                            intrude(path)

                connection = connect(connection_factory=Interrupted)
                with contextlib.closing(connection):
                    connection.come_between = come_between
                    apply_uncommitted(paths[0], connection)
                    connection.commit()
                self.assertTrue(begun, "nobody came between")
                for path in paths:
                    intrude(path)
                self.assertEqual(query("SELECT revenue FROM users_revenue"), [(3,)])

    def test_two_processors_never_wait_for_each_other(self):
        users = [f"user{number}" for number in range(10_000)]
        logs = [
            self.path(
                producer,
                "".join(with_id(producer, number, user) for number, user in enumerate(order, 1)),
            )
            for producer, order in (("p", users), ("q", users[::-1]))
        ]
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        before = query(deadlocks)
        with locked_users():
            processors = [self.start("data_processor.py", log) for log in logs]
            wait_until(lambda: len(waiting()) == 2, "both wait")
        self.assertEqual([processor.wait(30) for processor in processors], [0, 0])
        wait_until(
            lambda: query(sessions) == [(1,)],
            "their sessions have ended and counted their deadlocks",
        )
        self.assertEqual(query(deadlocks), before)

    def test_a_processor_that_commits_while_another_is_at_work_counts_once(self):
        self.processor(self.path("known", with_id("p", 9)))
        paths = [self.path(f"log{n}", with_id("p", n) + with_id("p", n + 1)) for n in (1, 2)]
        begun = []

        def begin_other(statement):
            if statement != at:
                return
            other = connect(options="-c lock_timeout=100ms")
            self.addCleanup(other.close)
            with contextlib.suppress(data_processor.Locked):
                apply_uncommitted(paths[1], other)
                # By then the first waits, or is done.
                begun.append(threading.Timer(0.3, other.commit))
                begun[-1].start()

        for at in range(5):
            with self.subTest(statement=at):
                query(
                    "UPDATE event_producers SET applied = '{[9,10)}'; "
                    "UPDATE users_revenue SET revenue = 1"
                )
                connection = connect(connection_factory=Interrupted)
                with contextlib.closing(connection):
                    connection.come_between = begin_other
                    apply_uncommitted(paths[0], connection)
                    connection.commit()
                for timer in begun:
                    timer.join()
                self.processor("--from-start", *paths)
                self.assertRevenue({"user1": 4})
        self.assertGreater(len(begun), 1, "nobody came between")

    def test_rows_are_locked_in_the_order_of_their_bytes(self):
        names = [f"n{number:02}" for number in range(40)]
        backwards = "".join(with_id(name, 1, name) for name in reversed(names))
        held = names[20]
        later = names[21:]
        lock = {
            "new producers": "INSERT INTO event_producers (producer_id) SELECT unnest(%s)",
            "known producers": "SELECT FROM event_producers "
            "WHERE producer_id = ANY (%s) FOR UPDATE",
            "users": "SELECT FROM users_revenue WHERE user_id = ANY (%s) FOR UPDATE",
        }
        for case, statement in lock.items():
            connection = connect()
            with self.subTest(case), contextlib.closing(connection), connection.cursor() as sql:
                query("TRUNCATE users_revenue, event_producers, event_logs")
                if case != "new producers":
                    query(
                        "INSERT INTO event_producers (producer_id) SELECT unnest(%s)", [names[::-1]]
                    )
                    query("INSERT INTO users_revenue SELECT unnest(%s), 0", [names[::-1]])
                sql.execute(statement, [[held]])
                processor = self.start("data_processor.py", self.path("log", backwards))
                wait_until(waiting, "the processor waits for what is held")
                sql.execute("SET LOCAL lock_timeout = 100")
                sql.execute(statement, [later])  # which it has not locked yet
                connection.rollback()
                self.assertEqual(processor.wait(20), 0, processor.stderr.read())
                self.assertRevenue(dict.fromkeys(names, 1))

    def test_the_isolation_is_read_committed_whatever_the_database_prefers(self):
        preference = {"PGOPTIONS": "-c default_transaction_isolation=serializable"}
        database = data_processor.Database()
        with unittest.mock.patch.dict(os.environ, preference), contextlib.closing(database):
            database.connect()
            with database.counting() as sql:
                sql.execute("SHOW default_transaction_isolation")
                self.assertEqual(sql.fetchone(), ("serializable",))
                sql.execute("SHOW transaction_isolation")
                self.assertEqual(sql.fetchone(), ("read committed",))

    def test_a_processor_that_stands_still_does_not_hold_up_the_others_for_long(self):
        log = self.path("log", with_id("p", 1))
        count_once = data_processor.count_once
        outputs = []

        def stand_still(*arguments):
            counted = count_once(*arguments)
            if not outputs:
                output, _ = self.processor(log)
                outputs.append(output)
            return counted

        with (
            captured(),
            unittest.mock.patch.multiple(data_processor, count_once=stand_still, IDLE_SECONDS=0.2),
        ):
            data_processor.run([str(log)])
        self.assertIn("1 applied", outputs[0])
        self.assertRevenue({"user1": 1})
