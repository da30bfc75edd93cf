"""Totals are exact for random events and random spans."""

import collections
import decimal
import os
import random
import subprocess
import sys
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

    def random_tallies(self, chance):
        """Return the tallies of a chunk, with spans of two producers and of events without
        an id."""
        tallies = []
        for number in range(chance.randrange(1, 4)):
            spans = []
            line = 0
            for _ in range(chance.randrange(6)):
                line += chance.randrange(2)
                producer = chance.choice(["p", "q", ""])
                first = chance.randrange(30)
                count = chance.randrange(1, 9)
                if not producer:
                    first = 1000 * number + line
                spans.append(data_processor.Span(producer, first, first + count, line))
                line += count
            tallies.append(data_processor.Tally(None, 0, line, 0, 0, spans, [], b"{}", b""))
        return tallies

    def test_new_ids_are_found_as_sets_would_find_them(self):
        for seed in range(TORTURE_SEED, TORTURE_SEED + 300):
            chance = random.Random(seed)
            known = {(producer, n) for producer in "pq" for n in range(30) if chance.random() < 0.3}
            tallies = self.random_tallies(chance)
            ids = []  # of each line of each tally
            for tally in tallies:
                row = [None] * tally.lines
                for span in tally.spans:
                    for number in range(span.end - span.first):
                        row[span.line + number] = (span.producer, span.first + number)
                ids.append(row)
            everything = [event_id for row in ids for event_id in row if event_id]
            fresh = {event_id for event_id in everything if event_id[0]} - known
            new = [data_processor.NewIds(producer, n, n + 1) for producer, n in fresh]
            chosen = []
            for row, marks in zip(ids, data_processor.mark_lines(tallies, new)):
                chosen += [event_id for event_id, mark in zip(row, marks) if mark]
            with self.subTest(seed=seed):
                self.assertEqual(sorted(key for key in chosen if key[0]), sorted(fresh))
                plain = [key for key in everything if not key[0]]
                self.assertEqual([key for key in chosen if not key[0]], plain)
