"""The server asks the database, which may be slow, silent, or not there."""

import collections
import contextlib
import gc
import os
import select
import socket
import struct
import threading
import time
import unittest
import unittest.mock
import weakref

import psycopg2
import psycopg2.extensions

import data_processor
import server as server_module
from tests.tools import Server, SystemTest, free_port, wait_until
from tests.tools_database import (
    locked_users,
    query,
    setUpModule,
    stopped_backend,
    terminate_backends,
    waiting,
)
from tests.tools_events import EVENT, ids_in
from tests.tools_http import read_answer, request, serving
from tests.tools_parts import warnings_of

USER1 = "/userEvents/user1"
IMPATIENT = "server.DATABASE_SECONDS = 1"


def find_revenues(database, users):
    """Return what a Revenues of this process answers for each of users, in any order."""
    answers = []
    threads = []
    for user in users:
        arguments = [user, answers.append]
        threads.append(threading.Thread(target=database.find_revenue, args=arguments))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return answers


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        """Return the time."""
        return self.now

    def wait_until(self, moment, deadline):
        """Let time pass until a moment, or until the deadline; then raise TimeoutError."""
        self.now = max(self.now, min(moment, deadline))
        if moment > deadline:
            raise TimeoutError


@contextlib.contextmanager
def distant(connecting, querying):
    """Return a context in which connecting to the database and a query take so many seconds, of a
    Clock."""
    clock = Clock()

    class Connecting(data_processor.Connecting):
        def __init__(self, **parameters):
            super().__init__(**parameters)
            self.made = clock.now + connecting

        def wait(self, deadline):
            clock.wait_until(self.made, deadline)
            super().wait(time.monotonic() + 20)

    def wait_for(connection, deadline):
        clock.wait_until(clock.now + querying, deadline)
        data_processor.wait_for(connection, time.monotonic() + 20)

    changed = {"time": clock, "Connecting": Connecting, "wait_for": wait_for}
    with unittest.mock.patch.multiple(server_module, **changed):
        yield


class Asking(SystemTest):
    """Each question has its answer in time, whatever the database does."""

    def database(self):
        """Return a Revenues of this process, whose connection is closed at the end."""
        database = server_module.Revenues()
        self.addCleanup(database._disconnect)
        return database

    def ask_at_once(self, server, count):
        """Ask for one user in so many threads, and return the threads and the statuses."""
        statuses = []

        def ask():
            statuses.append(server.ask("GET", USER1)[0])

        threads = [threading.Thread(target=ask) for _ in range(count)]
        for thread in threads:
            thread.start()
        return threads, statuses

    def test_without_a_database_the_server_takes_events(self):
        server = Server(self, DATABASE_URL=f"postgresql://localhost:{free_port()}/nowhere")
        self.assertEqual(server.post(EVENT)[0], 200)
        status, headers, _ = server.ask("GET", USER1)
        self.assertEqual((status, headers["Retry-After"]), (503, "2"))
        self.assertEqual(server.ask("GET", "/health")[0], 200)
        self.assertEqual(len(ids_in(server.log)), 1)

    def test_a_query_that_hangs_starves_no_post(self):
        over = self.path("over")
        server = Server(
            self,
            "--workers",
            "1",
            patch=f"""
import os, time
def wait_for(connection, deadline, real=server.wait_for):
    open("begun", "w").close()
    while not os.path.exists({str(over)!r}):
        time.sleep(0.01)
    real(connection, deadline)
server.wait_for = wait_for
""",
        )
        asking, statuses = self.ask_at_once(server, 20)
        wait_until(self.path("begun").exists, "a query hangs")
        self.assertEqual(server.post(EVENT)[0], 200)
        self.assertEqual(statuses, [])
        over.touch()
        for thread in asking:
            thread.join(20)
        self.assertEqual(len(statuses), 20)

    def test_a_database_that_hangs_is_not_waited_for_long(self):
        server = Server(self, "--workers", "1")
        self.assertEqual(server.ask("GET", USER1)[0], 404)
        with locked_users():
            asking, statuses = self.ask_at_once(server, 20)
            self.assertEqual(server.post(EVENT)[0], 200)
            self.assertEqual(server.ask("GET", USER1)[0], 503)
            for thread in asking:
                thread.join()
            wait_until(lambda: not waiting(), "no query is left waiting")
        self.assertEqual(statuses, [503] * 20)
        self.assertEqual(server.ask("GET", USER1)[0], 404)
        terminate_backends()
        self.assertEqual(server.ask("GET", USER1)[0], 404)

    def test_a_backend_that_stands_still_is_left_for_another_one(self):
        server = Server(self, "--workers", "1")
        self.assertEqual(server.ask("GET", USER1)[0], 404)
        ((backend,),) = query(
            "SELECT pid FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'server.py'"
        )
        with stopped_backend(backend):
            self.assertEqual(server.ask("GET", USER1)[0], 503)
            self.assertEqual(server.ask("GET", USER1)[0], 404)

    def test_a_database_that_falls_silent_is_not_waited_for(self):
        welcome = b"R" + struct.pack(">II", 8, 0)
        for setting in (
            b"client_encoding\0UTF8\0",
            b"DateStyle\0ISO\0",
            b"standard_conforming_strings\0on\0",
        ):
            welcome += b"S" + struct.pack(">I", 4 + len(setting)) + setting
        ready = b"Z" + struct.pack(">I", 5) + b"I"
        with socket.create_server(("127.0.0.1", 0)) as database:
            database.settimeout(20)
            port = database.getsockname()[1]
            url = f"postgresql://127.0.0.1:{port}/x?sslmode=disable&gssencmode=disable"
            server = Server(self, "--workers", "1", patch=IMPATIENT, DATABASE_URL=url)
            server.ask("GET", "/health")
            self.assertFalse(
                select.select([database], [], [], 0)[0],
                "health has nothing to do with the database",
            )
            for case, greeting in {"after it": welcome + ready, "from the start": b""}.items():
                with self.subTest(case):
                    (asking,), statuses = self.ask_at_once(server, 1)
                    wire, _ = database.accept()
                    with wire:
                        wire.sendall(greeting)
                        asking.join()
                    self.assertEqual(statuses, [503])

    def test_many_who_ask_a_distant_database_do_not_wait_for_each_other(self):
        server = Server(
            self,
            "--workers",
            "1",
            patch="""
import time
def wait_for(connection, deadline, real=server.wait_for):
    time.sleep(0.03)
    real(connection, deadline)
server.wait_for = wait_for
""",
        )
        asking, statuses = self.ask_at_once(server, 200)
        for thread in asking:
            thread.join()
        self.assertEqual(statuses, [404] * 200)

    def test_a_name_that_is_looked_up_for_ever_holds_up_nobody(self):
        found = self.path("found")
        server = Server(
            self,
            "--workers",
            "1",
            patch=f"""
import data_processor, os, time
def connect(real=data_processor.connect, **parameters):
    while not os.path.exists({str(found)!r}):
        time.sleep(0.01)
    return real(**parameters)
data_processor.connect = connect
{IMPATIENT}
""",
        )
        asking, statuses = self.ask_at_once(server, 20)
        self.assertEqual(server.post(EVENT)[0], 200)
        self.assertEqual(server.ask("GET", USER1)[0], 503)
        for thread in asking:
            thread.join()
        self.assertEqual(statuses, [503] * 20)
        found.touch()
        wait_until(lambda: server.ask("GET", USER1)[0] == 404, "the connection is there")

    def test_an_attempt_that_fails_after_its_round_costs_the_next_round_nothing(self):
        over = threading.Event()
        attempts = []

        def connect(real=data_processor.connect, **parameters):
            attempts.append(parameters)
            if len(attempts) == 1:
                over.wait(20)
                raise psycopg2.OperationalError("it was not there yet")
            return real(**parameters)

        database = self.database()
        soon = unittest.mock.patch.object(server_module, "DATABASE_SECONDS", 0.2)
        with unittest.mock.patch.object(data_processor, "connect", connect):
            with soon, warnings_of(data_processor) as said:
                (answer,) = find_revenues(database, ["user1"])
            self.assertIsInstance(answer, server_module.NoAnswer)
            self.assertEqual(said, ["The database: no answer within 0.2 seconds."])
            over.set()
            wait_until(database._opening.has_failed, "the first attempt has failed")
            self.assertEqual(find_revenues(database, ["user1"]), [None])
        self.assertEqual(len(attempts), 2)

    def test_a_name_server_that_is_silent_stops_no_other_thread(self):
        # Its answer is waited for in C. psycopg2 lets other threads run meanwhile only if the
        # connection is synchronous and there is no wait callback.
        made = []

        def connect(*arguments, real=psycopg2.connect, **parameters):
            callback = psycopg2.extensions.get_wait_callback()
            made.append((parameters.get("async_", False), callback))
            return real(*arguments, **parameters)

        with unittest.mock.patch.object(psycopg2, "connect", connect):
            for _ in range(2):  # the second time, there was a query
                self.assertEqual(find_revenues(self.database(), ["user1"]), [None])
        self.assertEqual(made, [(False, None)] * 2)

    def test_whoever_has_waited_for_too_long_is_answered_before_the_others(self):
        database = self.database()
        find_revenues(database, ["user1"])  # connects
        now = time.monotonic()
        answers = []
        early = server_module.Question("user1", now + 0.5)
        late = server_module.Question("user2", now + 60)
        members = collections.deque()
        for question in (early, late):
            members.append(server_module.Member(question, answers.append))
        working = threading.Thread(target=database._answer_round, args=[members])
        with locked_users():
            working.start()
            wait_until(lambda: answers, "the first one has its answer")
            self.assertIsInstance(answers[0], server_module.NoAnswer)
            self.assertEqual((len(answers), working.is_alive()), (1, True))
        working.join(20)
        self.assertEqual(answers[1:], [None])

    def test_the_reason_why_the_database_does_not_answer_is_said_once(self):
        server = Server(self, "--workers", "1", patch=IMPATIENT)
        with locked_users():
            self.assertEqual([server.ask("GET", USER1)[0] for _ in range(2)], [503, 503])
        wait_until(lambda: server.ask("GET", USER1)[0] == 404, "the database answers")
        wait_until(lambda: len(server.said()) == 2, "both are said")
        began, ended = server.said()
        self.assertRegex(
            began, "The database: (no answer within 1 seconds|canceling statement due to .*)"
        )
        self.assertEqual(ended, "The database: it answers again.")

    def test_a_wrong_database_is_named_in_a_sentence(self):
        cases = {
            "a missing one": (
                f"{os.environ['DATABASE_URL']} dbname=nowhere",
                '"nowhere" does not exist',
            ),
            "a malformed URL": (
                "postgresql+psycopg2://app:S3cret@db/shop",
                "DATABASE_URL is malformed",
            ),
        }
        for case, (url, words) in cases.items():
            with self.subTest(case):
                server = Server(self, "--workers", "1", DATABASE_URL=url, log=case)
                for _ in range(2):
                    status, headers, _ = server.ask("GET", USER1)
                    self.assertEqual((status, headers["Retry-After"]), (503, "2"))
                (said,) = wait_until(server.said, "the reason is said")
                self.assertIn(words, said)
                self.assertNotIn("S3cret", said)

    def test_a_query_leaves_nothing_behind_in_its_session(self):
        database = self.database()
        self.assertEqual(find_revenues(database, ["user1"]), [None])
        connection = database._connection
        with connection.cursor() as sql:
            sql.execute("SHOW statement_timeout")
            self.assertEqual((sql.fetchone(), connection.notices), (("0",), []))

    def test_whoever_asks_for_the_same_user_has_the_same_answer(self):
        query("INSERT INTO users_revenue VALUES ('user1', 1.50), ('user2', -2)")
        users = ["user1", "user2", "user1", "nobody"] * 10
        answers = find_revenues(self.database(), users)
        self.assertCountEqual(answers, ["1.5", "-2", "1.5", None] * 10)

    def test_a_user_id_that_no_event_has_is_not_asked_for(self):
        with serving(unittest.mock.Mock(failure=""), MAX_CONNECTIONS=1) as worker:
            worker.revenues = unittest.mock.Mock()
            with socket.create_connection(worker.address, timeout=20) as wire:
                for user in ("", "%00", "user%00", "x" * 256, "x" * 60_000):
                    wire.sendall(request("GET", f"/userEvents/{user}"))
                    self.assertEqual(read_answer(wire)[0], 404)
            worker.revenues.find_revenue.assert_not_called()

    def test_ten_thousand_who_wait_share_one_query(self):
        query("INSERT INTO users_revenue SELECT 'user' || n, n FROM generate_series(0, 9999) AS n")
        database = self.database()
        find_revenues(database, ["user1"])  # connects
        answers = []
        threads = []
        with locked_users():
            for number in range(2):  # they work, this round and the next one
                arguments = [f"user{number}", answers.append]
                threads.append(threading.Thread(target=database.find_revenue, args=arguments))
                threads[-1].start()
                wait_until(waiting, "the first one asks")
            wait_until(lambda: database._rounds._members, "the second one waits")
            for number in range(2, 10_000):
                database.find_revenue(f"user{number}", answers.append)
        for thread in threads:
            thread.join(20)
        self.assertCountEqual(answers, [str(number) for number in range(10_000)])

    def test_nothing_is_kept_of_what_waited_in_vain(self):
        class Answer:
            def __call__(self, revenue):
                answers.append(revenue)

        database = self.database()
        answers = []
        answer = Answer()
        kept = weakref.ref(answer)
        soon = unittest.mock.patch.object(server_module, "DATABASE_SECONDS", 1)
        with locked_users(), contextlib.redirect_stderr(None), soon:
            database.find_revenue("user1", answer)
        self.assertIsInstance(answers.pop(), server_module.NoAnswer)
        del answer
        gc.collect()
        self.assertIsNone(kept())

    def test_a_distant_database_answers(self):
        cases = {
            "at once, whoever had to connect": (0.7, 0.5, [True, True, True]),
            "at once, after more than a second": (0.1, 1.4, [True, True, True]),
            "on the connection that came too late": (2.5, 0.9, [False, True, True]),
            "on the connection that left too little time": (1.2, 1.0, [False, True, True]),
            "never in time": (0.1, 2.1, [False, False, False]),
        }
        for case, (connecting, querying, expected) in cases.items():
            with self.subTest(case), distant(connecting, querying), warnings_of(data_processor):
                database = self.database()
                answers = [find_revenues(database, ["user1"]) for _ in expected]
                self.assertEqual([answer == [None] for answer in answers], expected)

    def test_everyone_is_told_that_memory_is_missing(self):
        database = self.database()
        answers = []
        members = collections.deque()
        for user in ("user1", "user2"):
            question = server_module.Question(user, time.monotonic() + 20)
            members.append(server_module.Member(question, answers.append))
        missing = unittest.mock.Mock(side_effect=MemoryError)
        changed = {"wait_for": missing, "sentence": missing, "NoAnswer": missing}
        with (
            unittest.mock.patch.multiple(server_module, **changed),
            contextlib.suppress(MemoryError),
        ):
            database._answer_round(members)
        missing.assert_called()
        self.assertEqual([type(answer) for answer in answers], [server_module.NoAnswer] * 2)

    def test_without_a_thread_for_a_connection_the_database_does_not_answer(self):
        database = self.database()
        with (
            unittest.mock.patch.object(
                server_module.threading.Thread,
                "start",
                side_effect=RuntimeError("can't start new thread"),
            ),
            warnings_of(data_processor) as said,
        ):
            answers = []
            database.find_revenue("user1", answers.append)
            self.assertIsInstance(answers[0], server_module.NoAnswer)
        with warnings_of(data_processor) as said_again:
            self.assertEqual(find_revenues(database, ["user1"]), [None])
        words = "The database: There is no room for a thread: can't start new thread."
        self.assertEqual(said, [words])
        self.assertEqual(said_again, ["The database: it answers again."])
