"""Whoever comes while work is under way shares the next round."""

import threading
import unittest
import unittest.mock

import server as server_module
from tests.tools import wait_until


class Work:
    """Work whose first round lasts until it may go on."""

    def __init__(self, limit):
        self.goes_on = threading.Event()
        self.rounds = []  # the items of each
        self.answers = []
        self.reports = []  # what join() returned, but for None
        self.rounds_of_work = server_module.Rounds(self.do, limit)
        self.threads = []

    def do(self, members):
        """Do a round."""
        items = [member.item for member in members]
        self.rounds.append(items)
        self.goes_on.wait(20)
        for member in members:
            self.rounds_of_work.tell(member, member.item)
        return items

    def join(self, item, answer):
        """Join, in this thread."""
        report = self.rounds_of_work.join(item, answer)
        if report is not None:
            self.reports.append(report)

    def start(self, item, answer=None):
        """Join in a thread of its own."""
        thread = threading.Thread(target=self.join, args=[item, answer or self.answers.append])
        thread.start()
        self.threads.append(thread)

    def finish(self):
        """Let the first round go on, and wait for all threads."""
        self.goes_on.set()
        for thread in self.threads:
            thread.join(20)


class Sharing(unittest.TestCase):
    """Many who wait cost one round."""

    def begin(self, limit=1000):
        """Return work whose first round is under way, with item 0."""
        work = Work(limit)
        self.addCleanup(work.finish)
        work.start(0)
        wait_until(lambda: work.rounds, "the first round has begun")
        return work

    def test_whoever_comes_during_a_round_shares_the_next_one(self):
        work = self.begin()
        for item in range(1, 10):
            work.start(item)
        wait_until(
            lambda: sum(thread.is_alive() for thread in work.threads) == 2,
            "but for the one that works next, the others have returned",
        )
        work.finish()
        self.assertEqual([sorted(items) for items in work.rounds], [[0], list(range(1, 10))])
        self.assertEqual(sorted(work.answers), list(range(10)))
        self.assertEqual(work.reports, work.rounds)

    def test_a_round_that_is_full_lets_nobody_join(self):
        work = self.begin(limit=3)
        for item in range(1, 8):
            work.start(item)
        work.finish()
        self.assertLessEqual(max(len(items) for items in work.rounds), 3)
        self.assertEqual(sorted(work.answers), list(range(8)))

    def test_an_answer_that_fails_costs_nobody_else_theirs(self):
        def fail(_item):
            raise MemoryError

        work = self.begin()
        with unittest.mock.patch.object(server_module, "warn") as warn:
            work.start(1, fail)
            work.start(2)
            work.finish()
        self.assertEqual(sorted(work.answers), [0, 2])
        warn.assert_called_with("MemoryError")

    def test_a_lack_of_memory_for_a_traceback_costs_nobody_an_answer(self):
        def fail(_item):
            raise MemoryError

        work = self.begin()
        missing = unittest.mock.patch.object(
            server_module.traceback, "format_exc", side_effect=MemoryError
        )
        with missing as format_exc:
            work.start(1, fail)
            wait_until(lambda: len(work.rounds_of_work._members) == 1, "it is the first one")
            work.start(2)
            work.finish()
        format_exc.assert_called()
        self.assertEqual(sorted(work.answers), [0, 2])
