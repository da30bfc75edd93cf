"""Each event counts once, whatever fails in one run of the processor."""

import errno
import itertools
import unittest
import unittest.mock

import psycopg2

import data_processor
from tests.tools import SystemTest, wait_until
from tests.tools_database import (
    empty_tables,
    open_transaction,
    query,
    setUpModule,
    terminate_backends,
    waiting,
)
from tests.tools_events import EVENT, with_id
from tests.tools_faults import FaultyConnection
from tests.tools_parts import apply, captured, opened_follower, poll, small_slices


class ExactlyOnce(SystemTest):
    """Each event counts once, whatever is killed, retried, run again or copied in between."""

    def test_a_log_that_is_not_the_one_read_before_is_read_to_its_end_in_chunks(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 4)))
        with unittest.mock.patch.multiple(data_processor, CHUNK_BYTES=1, BLOCK_BYTES=150):
            apply(log)
            log.write_text(with_id("p", 1) + "".join(with_id("q", n) for n in range(1, 6)))
            apply(log)
        self.assertRevenue({"user1": 8})

    def test_every_chunk_of_a_changed_log_has_its_lines_without_an_id_refused(self):
        log = self.path("log", with_id("p", 1) + 3 * (EVENT.decode() + "\n"))
        for failed in (False, True, True):
            with unittest.mock.patch.multiple(data_processor, CHUNK_BYTES=700, BLOCK_BYTES=200):
                self.assertEqual(apply(log), not failed)
            log.write_text(
                "".join(with_id("p", n) for n in range(1, 11))
                + 4 * (EVENT.decode() + "\n")
                + "".join(with_id("p", n) for n in range(11, 31))
            )
        self.assertRevenue({"user1": 3 + 30})

    def test_a_position_never_moves_back(self):
        content = "".join(with_id("p", sequence) for sequence in range(1, 2001))
        log = self.path("log", content)
        self.processor(log)
        position = query("SELECT position FROM event_logs")
        log.write_text(content[: len(content) // 2].rpartition("\n")[0] + "\n")
        output, _ = self.processor(log)
        self.assertIn(" 0 applied", output)
        self.assertEqual(query("SELECT position FROM event_logs"), position)

    def test_a_log_that_was_rewritten_is_read_from_its_start(self):
        content = "".join(with_id("p", sequence) for sequence in range(1, 2001))
        log = self.path("log", content)
        self.processor(log)
        log.write_text(content[: len(content) // 2].rpartition("\n")[0] + "\n")
        self.processor(log)
        rewritten = content.partition("\n")[2].replace("user1", "User1")
        log.write_text(with_id("p", 1) + rewritten + with_id("p", 2001))
        output, _ = self.processor(log)
        self.assertIn("1 applied, 2,000 repeated", output)
        self.assertRevenue({"user1": 2001})
        self.assertEqual(query("SELECT position FROM event_logs"), [(log.stat().st_size,)])

    def test_a_position_that_is_deleted_while_it_is_waited_for_is_begun_anew(self):
        self.processor(self.path("other", with_id("q", 1) + with_id("q", 2)))
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        position = log.stat().st_size
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2))
        with open_transaction("SELECT FROM event_logs FOR UPDATE") as connection:
            run = self.start("data_processor.py", log)
            wait_until(waiting, "it waits for the position")
            with connection.cursor() as sql:
                sql.execute("DELETE FROM event_logs WHERE position = %s", [position])
                self.assertEqual(sql.rowcount, 1)
            connection.commit()
        _, errors = run.communicate(timeout=30)
        self.assertEqual((run.returncode, errors), (0, ""))
        self.assertRevenue({"user1": 4})

    def test_what_is_counted_was_synced_before(self):
        log = self.path("log", with_id("p", 1))
        words = f"{log}: a sync failed (broken), so it is not counted. "
        broken = unittest.mock.patch.object(
            data_processor, "sync_file", side_effect=OSError(errno.EIO, "broken")
        )
        asleep = unittest.mock.patch.object(
            data_processor.time, "sleep", side_effect=AssertionError("it goes on")
        )
        with captured(), opened_follower(log) as follower, broken, asleep:
            with self.assertRaises(data_processor.SyncFailed) as raised:
                follower.follow()
        self.assertTrue(str(raised.exception).startswith(words))
        patch = (
            "import errno\n"
            "def broken(fd): raise OSError(errno.EIO, 'broken')\n"
            "data_processor.sync_file = broken"
        )
        output, errors = self.processor(log, status=1, patch=patch)
        self.assertEqual(output, "")
        self.assertTrue(errors.startswith(words), errors)
        self.assertEqual(query("SELECT * FROM event_producers"), [])
        self.assertEqual(query("SELECT * FROM event_logs"), [])
        apply(log)
        self.assertRevenue({"user1": 1})

    def test_a_log_without_anything_new_is_not_synced(self):
        log = self.path("log", with_id("p", 1))
        apply(log)
        with unittest.mock.patch.object(data_processor, "sync_file") as sync:
            apply(log)
        sync.assert_not_called()

    def test_a_log_without_anything_new_needs_no_transaction_of_its_own(self):
        logs = [self.path(f"log{number}", with_id(f"p{number}", 1)) for number in range(5)]
        apply(*logs)
        counting = unittest.mock.Mock(side_effect=data_processor.Database.counting)
        with unittest.mock.patch.object(data_processor.Database, "counting", counting):
            self.assertTrue(apply(*logs))
        counting.assert_not_called()

    def test_a_log_is_synced_once_for_all_of_its_chunks(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 41)))
        with (
            small_slices(1, CHUNK_BYTES=500),
            unittest.mock.patch.object(data_processor, "sync_file") as sync,
        ):
            apply(log)
        sync.assert_called_once()
        self.assertRevenue({"user1": 40})

    def test_a_run_gives_up_after_attempts_without_progress_alone(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 41)))
        apply_chunk = data_processor.apply_chunk
        calls = itertools.count(1)

        def fail_often(*arguments):
            if next(calls) % 4:
                raise psycopg2.OperationalError("down")
            return apply_chunk(*arguments)

        with (
            small_slices(1, CHUNK_BYTES=1000),
            unittest.mock.patch.object(data_processor.time, "sleep"),
            unittest.mock.patch.object(data_processor, "apply_chunk", fail_often),
        ):
            apply(log)
        self.assertGreater(next(calls), 2 * data_processor.ATTEMPTS)
        self.assertRevenue({"user1": 40})

    def test_how_far_a_run_came_ends_with_its_connection(self):
        older = self.path("older", with_id("p", 1) + with_id("p", 2))
        log = self.path(
            "log",
            with_id("p", 1) + with_id("q", 1) + "".join(with_id("p", n) for n in range(2, 41)),
        )
        self.processor(older)  # the log was changed since: it is read again from its start
        apply_chunk = data_processor.apply_chunk
        chunks = []

        def replace_database(*arguments):
            chunks.append(arguments)
            if len(chunks) == 3:  # after two chunks an older database takes the place of this one
                empty_tables()
                self.processor(older)
                terminate_backends()
            return apply_chunk(*arguments)

        with (
            small_slices(1, CHUNK_BYTES=500),
            unittest.mock.patch.object(data_processor, "apply_chunk", replace_database),
        ):
            apply(log)
        self.assertGreater(len(chunks), 8)
        self.assertRevenue({"user1": 41})

    def test_which_logs_a_run_has_applied_ends_with_its_connection(self):
        log = self.path("log", with_id("p", 1) + with_id("p", 2) + with_id("p", 3))
        with captured(), opened_follower(log) as follower:
            poll(follower)
            log.write_text(with_id("p", 1) + with_id("q", 1))  # which moves no position
            poll(follower)
            self.assertRevenue({"user1": 4})
            query(
                "UPDATE users_revenue SET revenue = 3; "
                "DELETE FROM event_producers WHERE producer_id = 'q'"
            )
            terminate_backends()  # the database was replaced by an older one
            poll(follower)
        self.assertRevenue({"user1": 4})

    def test_a_run_notices_that_the_database_knows_less_than_before(self):
        logs = [self.path("log.1", with_id("p", 1)), self.path("log", with_id("p", 2))]
        with captured(), opened_follower(logs[1]) as follower:
            poll(follower)
            empty_tables()  # restored, and no connection was lost
            poll(follower)
        self.assertRevenue({"user1": 2})

    def test_a_run_notices_it_between_two_logs(self):
        self.path("log.1", with_id("p", 1))
        log = self.path("log", with_id("p", 2))
        apply_log = data_processor.Applier.apply
        restored = []

        def restore_after_first(applier, reader):
            found = apply_log(applier, reader)
            if not restored:
                restored.append(reader.path)
                empty_tables()
            return found

        with unittest.mock.patch.object(data_processor.Applier, "apply", restore_after_first):
            apply(log)
        self.assertEqual(restored, [f"{log}.1"])
        self.assertRevenue({"user1": 2})

    def test_a_chunk_counts_once_although_any_step_fails(self):
        def lines(*sequences):
            return "".join(with_id("p", n, f"user{n % 3}") for n in sequences)

        one = str(self.path("one", lines(1, 2, 3, 2, 8) + f"bad\n{EVENT.decode()}\n"))
        two = str(self.path("two", lines(3, 4, 8) + with_id("q", 1)))
        both = {"user0": 1, "user1": 4, "user2": 2}
        # A run that ends remembers nothing: one log shows it as well as two.
        self.assertCountsOnce(psycopg2.OperationalError, [one, two], both)
        self.assertCountsOnce(psycopg2.errors.DeadlockDetected, [one, two], both)
        self.assertCountsOnce(SystemExit, [one], {"user0": 1, "user1": 2, "user2": 2})

    def assertCountsOnce(self, error, logs, expected):
        """Check that logs, of which the first has a bad line, count once although an error comes at
        any step of the database."""

        def survives():
            """Run to the end, or return False if an error ends it."""
            try:
                data_processor.run(logs)
                return True
            except (data_processor.Failure, psycopg2.Error, SystemExit):
                return False

        connect = data_processor.connect

        def connect_faulty(**options):
            return connect(**options, connection_factory=FaultyConnection)

        survived = 0
        asleep = unittest.mock.patch.object(data_processor.time, "sleep")
        with asleep, unittest.mock.patch.object(data_processor, "connect", connect_faulty):
            for at in itertools.count(1):
                empty_tables()
                FaultyConnection.fail(error, at)
                with self.subTest(error.__name__, step=at), captured() as printed:
                    is_done = survives()
                    if FaultyConnection.steps < at:
                        break
                    survived += is_done
                    FaultyConnection.fail(None, 0)
                    if not is_done:
                        self.assertTrue(survives())
                    self.assertIn("not JSON", printed(), "a bad line is reported at least once")
                    self.assertRevenue(expected)
        self.assertGreater(at, 20)
        self.assertRevenue(expected)
        self.assertEqual(survived > 20, error is not SystemExit)
