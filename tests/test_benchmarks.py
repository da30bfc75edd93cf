"""The benchmarks' tables say what was measured. Nothing is measured here."""

import argparse
import sys
import unittest
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import compare  # noqa: E402
import pipeline  # noqa: E402
from shared import Measured  # noqa: E402

OPTIONS = argparse.Namespace(events=1_000_000, large=10_000_000)
WANTED = r"^([≥≤] \d\.\d\d|≈ 1|)$"
BRACES = "[{}]"


class Rows(unittest.TestCase):
    """A row of a table is one function with its text beside it."""

    def test_each_row_of_the_pipeline_is_whole(self):
        measured = Measured(3.0, {"worker": 40.0})
        run = pipeline.beside(measured, 2.0)
        for name, row in pipeline.ROWS.items():
            with self.subTest(name):
                cells = pipeline.table_line(row, [run], OPTIONS)
                figure = row.unit.format(2.0)
                self.assertRegex(cells.work, "[a-z]")
                self.assertEqual(cells.measured, row.unit.format(3.0))
                self.assertRegex(cells.baseline, f"^{figure} [a-zA-Z]")
                self.assertEqual(cells.ratio, "1.50")
                self.assertRegex(cells.wanted, WANTED)
                self.assertIn("worker 40 MB", cells.memory)
                self.assertNotRegex("".join(cells), BRACES)

    def test_each_row_of_a_comparison_is_whole(self):
        before = Measured(2.0, {"client": 50.0})
        after = Measured(3.0, {"client": 40.0})
        pair = compare.Pair(before, after)
        for name, row in compare.ROWS.items():
            with self.subTest(name):
                cells = compare.table_line(row, [pair], OPTIONS)
                self.assertRegex(cells.work, "[a-z]")
                self.assertEqual(cells.before, row.unit.format(2.0))
                self.assertEqual(cells.after, row.unit.format(3.0))
                self.assertEqual(cells.ratio, "1.50 (1.50 to 1.50)")
                self.assertIn(cells.better, ("higher", "lower"))
                self.assertEqual(cells.memory, "client 50, 40 MB: 0.80")
                self.assertNotRegex("".join(cells), BRACES)

    def test_each_bar_of_the_chart_is_a_figure_of_a_row(self):
        for bar in pipeline.BARS:
            with self.subTest(bar.label):
                self.assertIn(bar.row, pipeline.ROWS)
                self.assertIn(bar.field, pipeline.Run._fields)


class Figures(unittest.TestCase):
    """What is printed follows from what was measured."""

    def test_a_ratio_is_the_median_of_the_runs_own_ratios(self):
        runs = []
        for measured, baseline in ((1.0, 1.0), (2.0, 4.0), (9.0, 3.0)):
            run = pipeline.beside(Measured(measured, {}), baseline)
            runs.append(run)
        row = pipeline.ROWS["processor"]
        cells = pipeline.table_line(row, runs, OPTIONS)
        self.assertEqual(cells.measured, "2.00 s")
        self.assertEqual(cells.baseline, "3.00 s decode and sum")
        self.assertEqual(cells.ratio, "1.00")

    def test_a_baseline_that_is_not_installed_is_named(self):
        run = pipeline.beside(Measured(1000.0, {}), None)
        row = pipeline.ROWS["batches"]
        cells = pipeline.table_line(row, [run], OPTIONS)
        self.assertEqual(cells.baseline, "not installed: Redis Streams")
        self.assertEqual(cells.ratio, "")

    def test_the_versions_of_a_pair_are_not_exchanged(self):
        orders = {False: ["before", "after"], True: ["after", "before"]}
        for after_first, order in orders.items():
            with self.subTest(order):
                asked = []

                def measure(version):
                    asked.append(version)
                    return version

                row = compare.Row("work", compare.SECONDS, measure)
                pair = compare.measure_pair(row, "before", "after", after_first=after_first)
                self.assertEqual(asked, order)
                self.assertEqual(pair, ("before", "after"))
