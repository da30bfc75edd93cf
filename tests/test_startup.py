"""The tests find a PostgreSQL, or say in a sentence that there is none."""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path

from tests.tools import free_port
from tests.tools_database import (
    HERE,
    THROWAWAY,
    setUpModule,
    throwaway_command,
    throwaway_environment,
)


class StartUp(unittest.TestCase):
    """The tests find a PostgreSQL, or say in a sentence that there is none."""

    def setUp(self):
        """Make an environment that names no database and in which pg_virtualenv is installed."""
        directory = tempfile.mkdtemp(prefix="events-test-")
        self.addCleanup(shutil.rmtree, directory)
        self.environment = {"PATH": directory, "HOME": "/", "PGHOST": ""}
        self.tool = Path(directory, "pg_virtualenv")
        self.tool.touch(0o755)

    def test_without_a_named_database_the_same_command_runs_in_a_throwaway_one(self):
        with unittest.mock.patch.object(
            sys, "orig_argv", ["python", "-m", "unittest", "-v", "tests.test_framing"]
        ):
            self.assertEqual(
                throwaway_command(self.environment),
                [
                    "pg_virtualenv",
                    "-t",
                    sys.executable,
                    "-m",
                    "unittest",
                    "-v",
                    "tests.test_framing",
                ],
            )

    def test_a_port_or_a_password_alone_names_no_database(self):
        for variable in ("PGPORT", "PGPASSWORD"):
            with self.subTest(variable):
                self.assertTrue(throwaway_command(self.environment | {variable: "5433"}))

    def test_a_named_database_is_not_replaced_by_a_throwaway_one(self):
        for variable in (
            "DATABASE_URL",
            "PGHOST",
            "PGHOSTADDR",
            "PGUSER",
            "PGDATABASE",
            "PGSERVICE",
        ):
            with self.subTest(variable):
                self.assertIsNone(throwaway_command(self.environment | {variable: "x"}))

    def test_a_throwaway_one_is_not_started_inside_another(self):
        self.assertIsNone(throwaway_command(throwaway_environment(self.environment)))

    def test_a_throwaway_one_takes_no_settings_of_the_default_one(self):
        environment = throwaway_environment(
            self.environment | {"PGPORT": "5432", "PGPASSWORD": "x", "LC_ALL": "C"}
        )
        self.assertEqual(environment, self.environment | {"LC_ALL": "C.UTF-8", THROWAWAY: "1"})

    def test_without_pg_virtualenv_nothing_is_started(self):
        self.tool.unlink()
        self.assertIsNone(throwaway_command(self.environment))

    def test_without_any_postgresql_the_tests_fail_with_a_sentence(self):
        nowhere = {"PGHOST": "127.0.0.1", "PGPORT": str(free_port())}
        environment = {
            name: value for name, value in os.environ.items() if name != "DATABASE_URL"
        } | nowhere
        run = subprocess.run(
            [sys.executable, "-m", "unittest", "tests.test_startup"],
            cwd=HERE,
            env=environment,
            capture_output=True,
            text=True,
        )
        self.assertIn(run.returncode, (1, 5))  # 5 since Python 3.12: no test was run
        self.assertIn("RuntimeError: No PostgreSQL to test with", run.stderr)
        self.assertIn("FAILED (errors=1)", run.stderr)
