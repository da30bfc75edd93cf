"""Each event counts once, whatever fails in one run of the processor."""

import errno
import itertools
import os
import subprocess
import sys
import unittest
import unittest.mock

import psycopg2

import data_processor
from tests.tools import SystemTest, patched
from tests.tools_database import empty_tables, query, setUpModule, terminate_backends
from tests.tools_events import EVENT, with_id
from tests.tools_faults import FaultyConnection
from tests.tools_parts import apply, captured, opened_processor, poll, small_slices


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
            with (
                opened_processor(log) as processor,
                captured(),
                unittest.mock.patch.multiple(data_processor, CHUNK_BYTES=700, BLOCK_BYTES=200),
            ):
                processor.run()
            self.assertEqual(processor.failed, failed)
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
        self.processor(log)
        self.assertRevenue({"user1": 2001})
        self.assertEqual(query("SELECT position FROM event_logs"), [(log.stat().st_size,)])

    def test_what_is_counted_was_synced_before(self):
        log = self.path("log", with_id("p", 1))
        with (
            captured(),
            opened_processor(log, follow=True) as processor,
            unittest.mock.patch.object(
                data_processor, "sync_file", side_effect=OSError(errno.EIO, "broken")
            ),
            unittest.mock.patch.object(
                data_processor.time, "sleep", side_effect=AssertionError("it goes on")
            ),
        ):
            self.assertRaisesRegex(SystemExit, f"^{log}: a sync failed [(]broken[)]", processor.run)
        arguments, environment = patched(
            "data_processor",
            (
                "import errno\ndef broken(fd): raise OSError(errno.EIO, 'broken')\n"
                "data_processor.sync_file = broken"
            ),
        )
        run = subprocess.run(
            [sys.executable, *arguments, log],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        self.assertEqual((run.returncode, run.stdout), (1, ""))
        self.assertEqual(run.stderr, f"{log}: a sync failed (broken), so it is not counted.\n")
        self.assertEqual(
            (query("SELECT * FROM event_producers"), query("SELECT * FROM event_logs")), ([], [])
        )
        apply(log)
        with unittest.mock.patch.object(data_processor, "sync_file") as sync:
            apply(log)
        sync.assert_not_called()  # nothing was new
        self.assertRevenue({"user1": 1})

    def test_a_log_is_synced_once_for_all_of_its_chunks(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 41)))
        with (
            captured(),
            small_slices(1, CHUNK_BYTES=500),
            opened_processor(log) as processor,
            unittest.mock.patch.object(data_processor, "sync_file") as sync,
        ):
            processor.run()
        sync.assert_called_once()
        self.assertRevenue({"user1": 40})

    def test_a_run_gives_up_after_attempts_without_progress_alone(self):
        log = self.path("log", "".join(with_id("p", n) for n in range(1, 41)))
        apply_chunk, calls = data_processor.apply_chunk, itertools.count(1)

        def fail_often(*arguments):
            if next(calls) % 4:
                raise psycopg2.OperationalError("down")
            return apply_chunk(*arguments)

        with (
            captured(),
            small_slices(1, CHUNK_BYTES=1000),
            opened_processor(log) as processor,
            unittest.mock.patch.object(data_processor.time, "sleep"),
            unittest.mock.patch.object(data_processor, "apply_chunk", fail_often),
        ):
            processor.run()
        self.assertGreater(next(calls), 2 * data_processor.ATTEMPTS)
        self.assertRevenue({"user1": 40})

    def test_how_far_a_run_came_ends_with_its_connection(self):
        older = self.path("older", with_id("p", 1) + with_id("p", 2))
        log = self.path(
            "log",
            with_id("p", 1) + with_id("q", 1) + "".join(with_id("p", n) for n in range(2, 41)),
        )
        self.processor(older)  # the log was changed since: it is read again from its start
        apply_chunk, chunks = data_processor.apply_chunk, []

        def replace_database(*arguments):
            chunks.append(arguments)
            if len(chunks) == 3:  # after two chunks an older database takes the place of this one
                empty_tables()
                self.processor(older)
                terminate_backends()
            return apply_chunk(*arguments)

        with (
            captured(),
            small_slices(1, CHUNK_BYTES=500),
            opened_processor(log) as processor,
            unittest.mock.patch.object(data_processor, "apply_chunk", replace_database),
        ):
            processor.run()
        self.assertGreater(len(chunks), 8)
        self.assertRevenue({"user1": 41})

    def test_which_logs_a_run_has_applied_ends_with_its_connection(self):
        log = self.path("log", with_id("p", 1) + with_id("p", 2) + with_id("p", 3))
        with captured(), opened_processor(log, follow=True) as processor:
            poll(processor)
            log.write_text(with_id("p", 1) + with_id("q", 1))  # which moves no position
            poll(processor)
            self.assertRevenue({"user1": 4})
            query(
                "UPDATE users_revenue SET revenue = 3; "
                "DELETE FROM event_producers WHERE producer_id = 'q'"
            )
            terminate_backends()  # the database was replaced by an older one
            poll(processor)
        self.assertRevenue({"user1": 4})

    def test_a_run_notices_that_the_database_knows_less_than_before(self):
        logs = [self.path("log.1", with_id("p", 1)), self.path("log", with_id("p", 2))]
        with captured(), opened_processor(logs[1], follow=True) as processor:
            poll(processor)
            empty_tables()  # restored, and no connection was lost
            poll(processor)
        self.assertRevenue({"user1": 2})
        apply_log, restored = data_processor.Processor.apply_log, []

        def restore_after_first(processor, log):
            found = apply_log(processor, log)
            if not restored:
                restored.append(empty_tables())
            return found

        with (
            captured(),
            opened_processor(logs[1]) as processor,
            unittest.mock.patch.object(data_processor.Processor, "apply_log", restore_after_first),
        ):
            processor.run()
        self.assertRevenue({"user1": 2})

    def test_a_chunk_counts_once_although_any_step_fails(self):
        def lines(*sequences):
            return "".join(with_id("p", n, f"user{n % 3}") for n in sequences)

        logs = [
            str(self.path("one", lines(1, 2, 3, 2, 8) + f"bad\n{EVENT.decode()}\n")),
            str(self.path("two", lines(3, 4, 8) + with_id("q", 1))),
        ]
        expected = {"user0": 1, "user1": 4, "user2": 2}

        def run():
            with opened_processor(*logs) as processor:
                try:
                    processor.run()
                    return True
                except (data_processor.Failure, psycopg2.Error, SystemExit):
                    return False

        connect, sleep = data_processor.connect, unittest.mock.patch.object(
            data_processor.time, "sleep"
        )
        faulty = unittest.mock.patch.object(
            data_processor,
            "connect",
            lambda **options: connect(**options, connection_factory=FaultyConnection),
        )
        with sleep, faulty:
            for error in (psycopg2.OperationalError, psycopg2.errors.DeadlockDetected, SystemExit):
                survived = 0
                for at in range(1, 1000):
                    empty_tables()
                    FaultyConnection.fail(error, at)
                    with self.subTest(error.__name__, step=at), captured() as printed:
                        survived += run()
                        if FaultyConnection.steps < at:
                            break
                        FaultyConnection.fail(None, 0)
                        self.assertTrue(run())
                        self.assertIn("not JSON", printed(), "a bad line is reported at least once")
                        self.assertRevenue(expected)
                self.assertGreater(at, 40)
                self.assertRevenue(expected)
                self.assertEqual(survived > 20, error is not SystemExit)
