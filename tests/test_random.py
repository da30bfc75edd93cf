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
from tests.tools_events import TORTURE_SEED


class Properties(SystemTest):
    """Totals are exact for random events, batches, repetitions, orders, logs and processors."""

    def random_batches(self, chance):
        """Return ({user: sum}, batches): lists of lines with ids, with gaps in their sequences."""
        totals, batches = collections.defaultdict(Decimal), []
        for producer in range(chance.randrange(1, 6)):
            sequence = 1
            for _ in range(chance.randrange(1, 30)):
                lines = []
                for _ in range(chance.choice([1, 1, 2, 10, 100])):
                    value = chance.choice(
                        [
                            str(chance.randrange(-1000, 1000)),
                            f"{chance.randrange(10**6)}.{chance.randrange(100):02}",
                            f"{chance.randrange(10**18)}.{chance.randrange(10**18):018}",
                            "1e3",
                            "-2.5E-3",
                        ]
                    )
                    user = f"user{chance.randrange(chance.choice([1, 10, 1000]))}"
                    name = chance.choice(["add_revenue", "subtract_revenue"])
                    totals[user] += Decimal(value) * (1 if name == "add_revenue" else -1)
                    lines.append(
                        f'{{"userId": "{user}", "name": "{name}", "value": {value}, '
                        f'"producerId": "p{producer}", "sequence": {sequence}}}\n'
                    )
                    sequence += chance.choice([1, 1, 1, 1, 1, 7])
                batches.append(lines)
        return totals, batches

    def test_totals_equal_the_oracle(self):
        self.addCleanup(print, f"[seed {TORTURE_SEED}]", end=" ", file=sys.stderr)
        for seed in range(TORTURE_SEED, TORTURE_SEED + 6):
            chance = random.Random(seed)
            empty_tables()
            with decimal.localcontext(decimal.Context(prec=80)):
                totals, batches = self.random_batches(chance)
            batches += [
                batch[chance.randrange(len(batch)) :]
                for batch in chance.choices(batches, k=len(batches))
            ]
            chance.shuffle(batches)
            logs = [self.path(f"log{seed}-{n}", "") for n in range(chance.randrange(1, 6))]
            for batch in batches:
                with open(chance.choice(logs), "a") as log:
                    log.write("".join(chance.choice([batch, chance.sample(batch, len(batch))])))
            script, path = patched(
                "data_processor",
                f"""
data_processor.CHUNK_BYTES = {chance.choice([1, 5000, 10**6])}
data_processor.BLOCK_BYTES = {chance.choice([200, 1000, 262144])}
""",
            )
            processors = [
                subprocess.Popen(
                    [
                        sys.executable,
                        *script,
                        *chance.sample(logs, chance.randrange(1, len(logs) + 1)),
                    ],
                    stdout=subprocess.DEVNULL,
                    env=os.environ | path,
                )
                for _ in range(chance.randrange(1, 4))
            ]
            self.assertEqual({processor.wait(60) for processor in processors}, {0}, f"seed {seed}")
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
