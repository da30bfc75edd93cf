"""The tables of the database: created, found, refused, mended."""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import unittest.mock
from decimal import Decimal

import data_processor
from tests.tools import CREATE_TABLE, Server, SystemTest, wait_until
from tests.tools_database import (
    HERE,
    SCRATCH,
    administer,
    connect,
    database_url,
    drop_tables,
    open_transaction,
    query,
    setUpModule,
    waiting,
)
from tests.tools_events import EVENT, with_id
from tests.tools_parts import apply


class Tables(SystemTest):
    """The processor counts in tables that fit, and says what mends those that do not."""

    def test_create_table_sql_can_run_twice_in_psql(self):
        drop_tables()
        for _ in range(2):
            command = [
                "psql",
                "-v",
                "ON_ERROR_STOP=1",
                "-q",
                "-f",
                HERE / "create_table.sql",
            ]
            command.append(os.environ["DATABASE_URL"])
            subprocess.run(command, check=True, capture_output=True)
        self.assertRevenue({})

    def test_a_database_that_is_not_in_utf8_is_refused(self):
        administer(
            f"CREATE DATABASE {SCRATCH}_ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"
        )
        self.addCleanup(administer, f"DROP DATABASE {SCRATCH}_ascii")
        dsn = database_url(dbname=f"{SCRATCH}_ascii")
        _, errors = self.processor(
            self.path("log", EVENT + b"\n"), status=1, DATABASE_URL=dsn
        )
        self.assertIn("is encoded in SQL_ASCII; create one with", errors)

    def test_an_older_postgresql_is_refused(self):
        before, required, _ = CREATE_TABLE.partition("140000")
        self.assertTrue(required)
        self.assertNotIn("multirange", before, "an older PostgreSQL would stop there")
        newer = self.path("newer.sql", CREATE_TABLE.replace("140000", "9990000"))
        ((version,),) = query("SHOW server_version")
        words = f"PostgreSQL 14 or newer is needed; this is {version}"
        with unittest.mock.patch.object(data_processor, "TABLES", str(newer)):
            with self.assertRaises(data_processor.Failure) as raised:
                apply(self.path("log", EVENT + b"\n"))
        self.assertEqual(str(raised.exception), words)

    def test_a_table_of_another_shape_is_refused(self):
        query("ALTER TABLE users_revenue RENAME COLUMN user_id TO someone")
        _, errors = self.processor(self.path("log", EVENT + b"\n"), status=1)
        self.assertIn(
            "; mend it with: ALTER TABLE users_revenue ADD COLUMN user_id", errors
        )

    def test_before_the_tables_exist_every_user_is_unknown(self):
        drop_tables()
        self.assertEqual(Server(self).ask("GET", "/userEvents/user1")[0], 404)

    def test_processors_at_once_create_the_missing_tables(self):
        drop_tables()
        Server(self).post(EVENT)
        processors = [self.start("data_processor.py") for _ in range(4)]
        for processor in processors:
            self.assertEqual(processor.wait(20), 0, processor.stderr.read())
        self.assertRevenue({"user1": 1})

    def test_of_two_processors_that_create_the_tables_the_second_waits(self):
        drop_tables()
        log = self.path("log", EVENT + b"\n")
        with contextlib.closing(connect()) as first, first.cursor() as sql:
            sql.execute("SELECT pg_advisory_xact_lock(hashtext('create_table.sql'))")
            sql.execute(CREATE_TABLE)
            second = self.start("data_processor.py", log)
            wait_until(waiting, "the second waits")
            first.commit()
            self.assertEqual(second.wait(20), 0, second.stderr.read())
        self.assertRevenue({"user1": 1})

    def test_tables_that_are_filled_while_they_are_looked_at_are_not_taken_for_emptied(self):
        counted = (
            "LOCK TABLE {} IN ACCESS EXCLUSIVE MODE;"
            "INSERT INTO users_revenue VALUES ('user2', 1);"
            "INSERT INTO event_producers VALUES ('q', '{{[1,2)}}');"
            "INSERT INTO event_logs VALUES ('q', 9)"
        )
        for table in ("event_producers", "event_logs"):
            with self.subTest(table):
                self.setUp()
                log = self.path("log", with_id("p", 1))
                with open_transaction(counted.format(table)) as first:
                    second = self.start("data_processor.py", log)
                    wait_until(waiting, "the second waits")
                    first.commit()
                self.assertEqual(second.wait(20), 0, second.stderr.read())
                self.assertRevenue({"user1": 1, "user2": 1})

    def test_a_revenue_column_that_would_round_is_refused(self):
        log = self.path("log", EVENT + b"\n")
        for kind in ("double precision", "numeric(10, 2)", "bigint"):
            with self.subTest(kind):
                query(f"ALTER TABLE users_revenue ALTER COLUMN revenue TYPE {kind}")
                _, errors = self.processor(log, status=1)
                statement = (
                    "ALTER TABLE users_revenue ALTER COLUMN revenue TYPE numeric USING"
                )
                self.assertIn(f"; mend it with: {statement}", errors)

    def test_the_rows_of_an_older_table_are_added_to(self):
        drop_tables()
        query(
            "CREATE TABLE users_revenue "
            "(id bigserial, user_id varchar(255) PRIMARY KEY, revenue numeric)"
        )
        query(
            "INSERT INTO users_revenue (user_id, revenue) VALUES ('user1', 0.5), ('user2', NULL)"
        )
        self.processor(
            self.path("log", EVENT + b"\n"), self.path("other", with_id("p", 1, "user2"))
        )
        self.assertRevenue({"user1": Decimal("1.5"), "user2": 1})

    def test_an_error_about_users_revenue_proposes_what_mends_it(self):
        tables = {
            "double precision": "user_id text PRIMARY KEY, revenue double precision DEFAULT 0",
            "no revenue": "user_id text UNIQUE",
            "rounded": "user_id text PRIMARY KEY, revenue numeric(10, 2)",
            "money as text": "user_id text UNIQUE, revenue text",
            "bigint": "user_id text UNIQUE, revenue bigint",
            "no user_id": "id serial PRIMARY KEY, revenue numeric",
            "short ids": "user_id varchar(20) PRIMARY KEY, revenue numeric",
            "padded ids": "user_id char(300) UNIQUE, revenue numeric",
            "numbers": "user_id bigint PRIMARY KEY, revenue numeric",
            "no key": "user_id text, revenue numeric",
            "a deferrable key": "user_id text UNIQUE DEFERRABLE, revenue numeric",
            "a deferrable key beside a good one": "user_id text PRIMARY KEY UNIQUE DEFERRABLE, "
            "revenue numeric",
            "two columns": "user_id text, revenue numeric, UNIQUE (user_id, revenue)",
            "a key for some users": "user_id text, revenue numeric); "
            "CREATE UNIQUE INDEX ON users_revenue (user_id) WHERE (revenue > 0",
            "ids without case": "user_id text COLLATE caseless UNIQUE, revenue numeric",
            "nothing": "x int",
        }
        query(
            "CREATE COLLATION caseless "
            "(provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
        )
        self.addCleanup(query, "DROP COLLATION caseless CASCADE")
        for what, columns in tables.items():
            with self.subTest(what):
                drop_tables()
                query(f"CREATE TABLE users_revenue ({columns})")
                producer = secrets.token_hex(4)
                users = ["x" * 255, "X" * 255]
                lines = [
                    with_id(producer, number, user)
                    for number, user in enumerate(users, 1)
                ]
                log = self.path(f"log-{producer}", "".join(lines))
                for _ in range(4):
                    run = self.start("data_processor.py", log)
                    _, errors = run.communicate(timeout=60)
                    if run.returncode == 0:
                        break
                    query(
                        re.fullmatch(
                            "users_revenue .*; mend it with: (ALTER TABLE users_revenue .*)\n",
                            errors,
                        )[1]
                    )
                self.assertRevenue(dict.fromkeys(users, 1))

    def test_a_deferrable_foreign_key_is_no_unique_key(self):
        query(
            "CREATE TABLE others (id text PRIMARY KEY); INSERT INTO others VALUES ('user1')"
        )
        self.addCleanup(query, "DROP TABLE others CASCADE")
        query(
            "ALTER TABLE users_revenue ADD FOREIGN KEY (user_id) REFERENCES others DEFERRABLE"
        )
        self.processor(self.path("log", with_id("p", 1)))
        self.assertRevenue({"user1": 1})

    def test_tables_are_created_where_users_revenue_is(self):
        query(
            "DROP TABLE event_producers, event_logs; "
            "DROP SCHEMA IF EXISTS own CASCADE; CREATE SCHEMA own"
        )
        self.addCleanup(query, "DROP SCHEMA own CASCADE")
        dsn = database_url(options="-c search_path=own,public")
        self.processor(self.path("log", with_id("p", 1)), DATABASE_URL=dsn)
        self.assertRevenue({"user1": 1})
        self.assertEqual(
            query(
                "SELECT to_regclass('public.event_logs') IS NULL, to_regclass('own.users_revenue')"
            ),
            [(False, None)],
        )

    def test_tables_in_different_schemas_are_refused(self):
        query("DROP SCHEMA IF EXISTS own CASCADE; CREATE SCHEMA own")
        query(
            "CREATE TABLE own.users_revenue (user_id text PRIMARY KEY, revenue numeric)"
        )
        self.addCleanup(query, "DROP SCHEMA own CASCADE")
        dsn = database_url(options="-c search_path=own,public")
        _, errors = self.processor(
            self.path("log", with_id("p", 1)), status=1, DATABASE_URL=dsn
        )
        self.assertIn("are in different schemas; set search_path", errors)

    def test_a_script_that_is_called_by_a_link_finds_its_schema(self):
        drop_tables()
        os.symlink(HERE / "data_processor.py", self.path("link.py"))
        subprocess.run(
            [sys.executable, self.path("link.py"), self.path("log", with_id("p", 1))],
            check=True,
            capture_output=True,
        )
        self.assertRevenue({"user1": 1})
