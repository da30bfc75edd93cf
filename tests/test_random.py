"""Totals are exact for random events and random spans."""

import collections
import decimal
import os
import random
import subprocess
import sys
import types
from decimal import Decimal

import data_processor
from tests.tools import SystemTest, patched
from tests.tools_database import empty_tables, setUpModule
from tests.tools_events import TORTURE_SEED, with_id


class Properties(SystemTest):
    """Totals are exact for random events, batches, repetitions, orders, logs and processors."""

    def random_value(self, chance):
        """Return a value as it may be written: whole, with cents, wide, or with an exponent."""
        whole = str(chance.randrange(-1000, 1000))
        cents = f"{chance.randrange(10**6)}.{chance.randrange(100):02}"
        wide = f"{chance.randrange(10**18)}.{chance.randrange(10**18):018}"
        return chance.choice([whole, cents, wide, "1e3", "-2.5E-3"])

    def random_batches(self, chance, sizes):
        """Return ({user: sum}, batches): lists of lines with ids, with gaps in their sequences."""
        signs = {"add_revenue": 1, "subtract_revenue": -1}
        totals = collections.defaultdict(Decimal)
        batches = []
        for producer in range(chance.randrange(1, 6)):
            sequence = 1
            for _ in range(chance.randrange(1, 30)):
                lines = []
                for _ in range(chance.choice(sizes)):
                    value = self.random_value(chance)
                    user = f"user{chance.randrange(chance.choice([1, 10, 1000]))}"
                    name = chance.choice(list(signs))
                    totals[user] += signs[name] * Decimal(value)
                    line = with_id(f"p{producer}", sequence, user, value)
                    lines.append(line.replace("add_revenue", name))
                    sequence += chance.choice([1, 1, 1, 1, 1, 7])
                batches.append(lines)
        return totals, batches

    def write_logs(self, chance, batches):
        """Write batches to some logs, half of them in a random order, and return the logs."""
        logs = [self.path(f"log{n}", "") for n in range(chance.randrange(1, 6))]
        for batch in batches:
            shuffled = chance.sample(batch, len(batch))
            with open(chance.choice(logs), "a", encoding="utf-8") as log:
                log.write("".join(chance.choice([batch, shuffled])))
        return logs

    def test_totals_equal_the_oracle(self):
        self.addCleanup(print, f"[seed {TORTURE_SEED}]", end=" ", file=sys.stderr)
        # A chunk of a line or two is a transaction for each of them: there are fewer lines then.
        settings = [(1, [1, 2]), (5000, [1, 2, 10, 100]), (10**6, [1, 2, 10, 100])]
        for seed, (chunk_bytes, sizes) in enumerate(settings * 2, TORTURE_SEED):
            chance = random.Random(seed)
            empty_tables()
            with decimal.localcontext(decimal.Context(prec=80)):
                totals, batches = self.random_batches(chance, sizes)
            for batch in chance.choices(batches, k=len(batches)):  # repeated in whole or in part
                batches.append(batch[chance.randrange(len(batch)) :])
            chance.shuffle(batches)
            logs = self.write_logs(chance, batches)
            script, path = patched(
                "data_processor",
                f"data_processor.CHUNK_BYTES = {chunk_bytes}\n"
                f"data_processor.BLOCK_BYTES = {chance.choice([200, 1000, 262144])}",
            )
            processors = []
            for _ in range(chance.randrange(1, 4)):
                some = chance.sample(logs, chance.randrange(1, len(logs) + 1))
                command = [sys.executable, *script, *some]
                processors.append(
                    subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | path)
                )
            with self.subTest(seed=seed):
                self.assertEqual(
                    [processor.wait(60) for processor in processors], [0] * len(processors)
                )
                self.processor(*logs)
                self.assertRevenue(totals)

    def random_slices(self, chance):
        """Return the reports of a chunk's slices, with spans of two producers and of events without
        an id."""
        reports = []
        for number in range(chance.randrange(1, 4)):
            spans, line = [], 0
            for _ in range(chance.randrange(6)):
                line += chance.randrange(2)
                producer, first, count = (
                    chance.choice(["p", "q", ""]),
                    chance.randrange(30),
                    chance.randrange(1, 9),
                )
                if not producer:
                    first = 1000 * number + line
                spans.append((producer, first, first + count, line))
                line += count
            reports.append(data_processor.Report(0, 0, line, 0, spans, []))
        return reports

    def test_new_ids_are_found_as_sets_would_find_them(self):
        for seed in range(TORTURE_SEED, TORTURE_SEED + 300):
            chance = random.Random(seed)
            known = {(producer, n) for producer in "pq" for n in range(30) if chance.random() < 0.3}
            reports = self.random_slices(chance)
            ids = [[None] * report.lines for report in reports]  # of each slice, that of each line
            for report, row in zip(reports, ids):
                for producer, first, end, line in report.spans:
                    row[line : line + end - first] = [(producer, n) for n in range(first, end)]
            everything = [key for row in ids for key in row if key]
            fresh = {key for key in everything if key[0]} - known
            new = [(producer, n, n + 1) for producer, n in fresh]
            chosen = data_processor.select_new(
                [types.SimpleNamespace(report=report) for report in reports], new
            )
            chosen = [
                key for row, marks in zip(ids, chosen) for key, mark in zip(row, marks) if mark
            ]
            with self.subTest(seed=seed):
                self.assertEqual(sorted(key for key in chosen if key[0]), sorted(fresh))
                self.assertEqual(
                    sum(not key[0] for key in chosen), sum(not key[0] for key in everything)
                )
