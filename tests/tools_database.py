"""One scratch database for all tests of a run."""

import atexit
import contextlib
import errno
import os
import secrets
import shutil
import signal
import sys
from pathlib import Path

import psycopg2
import psycopg2.extensions

import data_processor

HERE = Path(__file__).resolve().parent.parent  # where the scripts are

SCRATCH = f"events_test_{os.getpid()}_{secrets.token_hex(4)}"

# PGPORT and PGPASSWORD are missing here: alone they name no database, they change the default
# one's port or password.
NAME_A_DATABASE = ("DATABASE_URL", "PGHOST", "PGHOSTADDR", "PGUSER", "PGDATABASE", "PGSERVICE")

# Set in the environment of the tests that run inside a throwaway PostgreSQL.
THROWAWAY = "EVENTS_TEST_THROWAWAY"

administration = None  # a connection to the database that the environment names
asking = None  # the connection of query(), to the scratch database
no_database = None  # the sentence with which setUpModule() failed


def setUpModule():
    """Create the scratch database and point the environment at it, so that every child finds it.

    Each file of tests has this function; the first one that runs creates the database for all of
    them. Without a usable database, run the tests again inside a throwaway PostgreSQL, or fail: a
    skipped test proves nothing.
    """
    global no_database
    if administration:
        return
    if no_database:
        raise RuntimeError(no_database)
    try:
        create_scratch_database()
    except (psycopg2.Error, data_processor.Failure) as error:
        command = throwaway_command(os.environ)
        if command:
            sys.stdout.flush()
            sys.stderr.flush()
            os.execvpe(command[0], command, throwaway_environment(os.environ))
        no_database = (
            f"No PostgreSQL to test with ({str(error).strip()}). Start one, or name another with "
            "PGHOST, PGPORT, PGUSER and PGPASSWORD, or install Debian's postgresql-common: without "
            "those variables the tests then start a throwaway one with pg_virtualenv."
        )
        raise RuntimeError(no_database) from None
    atexit.register(drop_scratch_database, os.getpid())


def create_scratch_database():
    """Create the scratch database in the database that the environment names.

    Raise psycopg2.Error if that cannot be done.
    """
    global administration
    connection = data_processor.connect(connect_timeout=10)
    connection.autocommit = True
    administration = connection
    try:
        administer(f"CREATE DATABASE {SCRATCH} ENCODING 'UTF8' TEMPLATE template0")
    except psycopg2.Error:
        administration = None
        connection.close()
        raise
    used = connection.info.dsn_parameters
    settings = {"dbname": SCRATCH}
    for name in ("host", "hostaddr", "port", "user", "sslmode"):
        if used.get(name):
            settings[name] = used[name]
    if connection.info.password:
        settings["password"] = connection.info.password
    os.environ["DATABASE_URL"] = psycopg2.extensions.make_dsn(**settings)
    os.environ.pop("EVENTS_AUTHORIZATION", None)


def drop_scratch_database(owner):
    """Drop the scratch database at the end of its owner, the process that created it.

    A forked process that ends keeps it.
    """
    if os.getpid() == owner:
        administer(f"DROP DATABASE {SCRATCH} WITH (FORCE)")
        administration.close()


def throwaway_command(environment):
    """Return the command that runs these tests again inside a throwaway PostgreSQL.

    Return None when the environment names a database, when this is the second run already, or when
    Debian's pg_virtualenv is missing.
    """
    if THROWAWAY in environment or any(environment.get(name) for name in NAME_A_DATABASE):
        return None
    if not shutil.which("pg_virtualenv", path=environment.get("PATH")):
        return None
    python = sys.executable  # stays in a virtual environment
    return ["pg_virtualenv", "-t", python, *sys.orig_argv[1:]]


def throwaway_environment(environment):
    """Return the environment for throwaway_command()."""
    inside = dict(environment)
    for name in ("PGPORT", "PGPASSWORD"):  # PGPORT would be the cluster's, and may be taken
        inside.pop(name, None)
    inside[THROWAWAY] = "1"
    inside["LC_ALL"] = "C.UTF-8"  # the cluster's encoding is then UTF8
    return inside


def administer(statement):
    """Run a statement in the database that the environment names."""
    with administration.cursor() as sql:
        sql.execute(statement)


def connect(**options):
    """Return a connection to the scratch database."""
    return psycopg2.connect(os.environ["DATABASE_URL"], **options)


def query(statement, parameters=None):
    """Run a statement in the scratch database and return its rows.

    The statement is a transaction of its own, on one connection that stays open.
    """
    global asking
    if asking is None:
        asking = connect()
        asking.autocommit = True
    with asking.cursor() as sql:
        sql.execute(statement, parameters)
        if sql.description:
            return sql.fetchall()
        return []


def database_url(**changes):
    """Return the address of the scratch database with other parameters."""
    parameters = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
    return psycopg2.extensions.make_dsn(**parameters | changes)


def empty_tables():
    """Remove every row, as an older dump that is restored does."""
    query("DELETE FROM users_revenue; DELETE FROM event_producers; DELETE FROM event_logs")


def drop_tables():
    """Drop the tables that are there, and what is temporary on the connection of query()."""
    query("DROP TABLE IF EXISTS users_revenue, event_producers, event_logs; DISCARD TEMP")


def give_tables_to_owner(test):
    """Make the role events_test_owner own the tables as long as the test runs."""
    query("DROP ROLE IF EXISTS events_test_owner; CREATE ROLE events_test_owner")
    test.addCleanup(
        query,
        "RESET ROLE; REASSIGN OWNED BY events_test_owner TO CURRENT_USER;"
        "DROP OWNED BY events_test_owner; DROP ROLE events_test_owner",
    )
    for table in ("users_revenue", "event_producers", "event_logs"):
        query(f"ALTER TABLE {table} OWNER TO events_test_owner")


def waiting():
    """Return the process ids of the database's sessions that wait for a lock.

    Those that want users_revenue come last.
    """
    sessions = query("""
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'
        ORDER BY query ~ 'users_revenue'""")
    return [pid for (pid,) in sessions]


@contextlib.contextmanager
def open_transaction(statement):
    """Return a context with a connection on which a statement was executed, and which does not
    commit by itself."""
    with contextlib.closing(connect()) as connection, connection.cursor() as sql:
        sql.execute(statement)
        yield connection


def locked_users():
    """Return a context in which everyone else waits for users_revenue."""
    return open_transaction("LOCK TABLE users_revenue")


def terminate_backends():
    """End the server side of every connection to the scratch database."""
    query("""
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()""")


@contextlib.contextmanager
def stopped_backend(pid):
    """Return a context in which the server side of a connection stands still.

    Fail with a sentence if PostgreSQL runs on another machine, or as another user.
    """
    try:
        if sys.platform == "linux" and b"postgres" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            raise ProcessLookupError(errno.ESRCH, "it does not run on this machine")
        os.kill(pid, signal.SIGSTOP)
    except OSError as error:
        raise AssertionError(
            f"A backend of PostgreSQL cannot be stopped ({error.strerror}): this test needs one "
            "on this machine that runs as this user, such as pg_virtualenv starts."
        ) from None
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
