"""Rules of the processor that no other test would miss."""

import os
import socket
import subprocess
import sys
import threading
import unittest.mock

import data_processor
from tests.tools import SystemTest, fill, wait_until
from tests.tools_database import open_transaction, setUpModule, waiting  # noqa: F401
from tests.tools_events import with_id
from tests.tools_parts import captured


class SlowReaders(SystemTest):
    """A reader that is only slow is waited for; one that reads nothing is not."""

    def test_a_reader_that_takes_its_time_is_waited_for(self):
        reading, writing = os.pipe()
        fill(writing)
        reader = threading.Timer(0.3, os.read, [reading, 65536])
        reader.start()
        with open(writing, "w", encoding="utf-8") as stream:
            self.assertTrue(data_processor.write(stream, "x" * 1000, 20))
        reader.join()
        os.close(reading)

    def test_a_socket_that_nobody_reads_delays_nothing(self):
        reader, writer = socket.socketpair()
        with reader, writer:
            fill(writer.fileno())
            log = self.path("log", with_id("p", 1))
            command = [sys.executable, data_processor.__file__, log]
            subprocess.run(command, stdout=writer, timeout=20, check=True)
        self.assertRevenue({"user1": 1})

class FarEdits(SystemTest):
    """An edit that the recorded digest cannot see."""

    def test_an_edit_far_before_the_position_is_noticed_between_the_tallies(self):
        known = with_id("p", 2)
        repeats = known * (data_processor.DIGEST_BYTES // len(known) + 2)
        self.processor(self.path("known", known))
        log = self.path("log", with_id("p", 1) + known + with_id("p", 3) + repeats)
        edited = with_id("p", 1) + known + with_id("p", 9) + repeats
        mark_lines = data_processor.mark_lines
        edits = []

        def edit(*arguments):
            if not edits:
                edits.append(log.write_text(edited, encoding="utf-8"))
            return mark_lines(*arguments)

        with captured() as printed, unittest.mock.patch.object(data_processor, "mark_lines", edit):
            self.assertFalse(data_processor.run([str(log)]))
            self.assertEqual(len(edits), 1)
            self.assertIn("was changed while it was read", printed())
        self.assertRevenue({"user1": 1})

class Positions(SystemTest):
    """What is remembered of a log, when the log or the database has changed."""

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

    def test_a_log_that_was_cut_has_its_new_bad_lines_named(self):
        log = self.path("log", "bad one\n" * 50 + with_id("p", 1))
        applier = data_processor.Follower([str(log)])
        self.addCleanup(applier.database.close)
        self.addCleanup(lambda: [held.close() for held in applier.held.values()])
        with captured() as output:
            applier.prepare()
            applier.look()
            before = len(output())
            log.write_text("bad two\n" + with_id("p", 2), encoding="utf-8")
            applier.look()
            self.assertIn("byte 0: not JSON", output()[before:])
