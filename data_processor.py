"""Apply what is new in the server's logs to each user's revenue in PostgreSQL.

Every event counts exactly once, whatever is killed, run again, run twice at once, copied, cut or rotated in between:
one transaction adds revenue and the names (producer, sequence) of the events that it came from; see count_once.

What an event is, and how the database is reached, is defined here, once; server.py imports both.
"""
import argparse
import bisect
import collections
import decimal
import fcntl
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path

try:
    import psycopg2
except ImportError:
    sys.exit("The PostgreSQL driver is missing; install it with: python -m pip install -r requirements.txt")

DEFAULT_LOG = "server-events.jsonl"
TABLES = Path(__file__).with_name("create_table.sql")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".Z")
CLIENT_FILES = (".delivery", ".delivery.new", ".rejected", ".rejected.new")  # client.py's, should it be given a log

MAX_EVENT_BYTES = 64 * 1024
MAX_DEPTH = 100  # levels of nesting: far below every parser's own limit, which moves with the Python and the stack
MAX_SEQUENCE = 2**53 - 1
VALUE_LIMIT = 10**18
VALUE_DIGITS = 18

BLOCK_BYTES = 256 * 1024  # read and decoded at a time
CHUNK_BYTES = 64 * 1024 * 1024  # one transaction: large, as each one updates every user whom it meets
CHUNK_SECONDS = 15  # of reading, during which the transaction is idle
CHUNK_REJECTED = 10_000  # a chunk ends early after so many bad lines, whose reports are kept until it commits
DIGEST_BYTES = 64 * 1024  # hashed before a position, to know the log again

IDLE_SECONDS = 60  # a processor that vanished with its host, or stands still, holds its locks no longer
ATTEMPTS = 6  # at one chunk, 0.2 to 3.2 s apart: a PostgreSQL that restarts is back by then
POLL_SECONDS = 1.0
PROGRESS_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 30.0
TABLES_LOCK = 0x65766E74  # advisory; "evnt"

# 36 digits an amount, and room for 10**64 of them; a sum that still does not fit raises instead of rounding.
EXACT = decimal.Context(prec=100, traps=[decimal.InvalidOperation, decimal.Overflow, decimal.Inexact])


class Failure(Exception):
    """Something in the user's world that ends the run: one sentence that says what to do."""


# ---- An event -------------------------------------------------------------------------------------------------------

JSON_STRING = re.compile(r'(?s)"(?:[^"\\]|\\.)*+"?')  # unterminated, too: it must be found in linear time
SURROGATE = re.compile("[\ud800-\udfff]")
PRODUCER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
STAMP = re.compile(rb', (?:"log": "[0-9a-f]+", )?"producerId": "[A-Za-z0-9_-]{1,64}", "sequence": [0-9]{1,16}\}$')


def _refuse_constant(text):
    raise ValueError(text)


_decode_json = json.JSONDecoder(parse_float=Decimal, parse_constant=_refuse_constant).decode


def decode_lines(block):
    """Decode a block of bytes that ends with LF; return a list with, for each line, its JSON object as a dict, None for
    a blank line, or the ValueError that decode_event raises.

    Decoding many lines as one JSON array takes half the time. That gives the same result when every line is a flat
    object: the block's only braces open and close its lines, so a line that is no object of its own would make one
    object fewer than there are lines. (A line over 64 KiB would leave a window of 32 KiB without LF.)
    """
    window = MAX_EVENT_BYTES // 2
    try:
        text = block.decode()
        count = text.count("\n")
        if (text.startswith("{") and text.endswith("}\n") and "[" not in text
                and text.count("{") == text.count("}") == text.count("}\n{") + 1 == count
                and all(block.find(b"\n", at, at + window) >= 0 for at in range(0, len(block) - window, window))):
            events = _decode_json("[" + text[:-1].replace("\n", ",") + "]")
            if len(events) == count:
                return events
    except (ValueError, ArithmeticError):
        pass  # the line that is at fault is found below
    return [_decode_or_error(line) for line in block[:-1].split(b"\n")]


def _decode_or_error(line):
    try:
        return decode_event(line) if line.strip() else None
    except ValueError as error:
        return error


def decode_event(line):
    """Return the JSON object in line (bytes, with or without the server's stamp) as a dict with numbers as int or
    Decimal, or raise ValueError."""
    if len(line) > MAX_EVENT_BYTES and len(STAMP.sub(b"}", line)) > MAX_EVENT_BYTES:
        raise ValueError("an event must be at most 64 KiB long")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _too_deep(text):
        raise ValueError(f"an event must be nested at most {MAX_DEPTH} levels deep")
    try:
        event = _decode_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, ArithmeticError):
        raise ValueError("a number is out of range, NaN or Infinity") from None
    if type(event) is not dict:
        raise ValueError("an event must be a JSON object")
    return event


def _too_deep(text):
    depth = 0
    for bracket in re.findall(r"[][{}]", JSON_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def amount_of(event):
    """Return what the decoded event adds to its user's revenue, an exact int or Decimal, or raise ValueError with the
    rule that it breaks."""
    user, name, value = event.get("userId"), event.get("name"), event.get("value")
    if (type(user) is not str or not 1 <= len(user) <= 255 or "\0" in user
            or not user.isascii() and SURROGATE.search(user)):
        raise ValueError("userId must be a string of 1 to 255 characters, without NUL or a lone surrogate")
    if type(value) is int:
        if not -VALUE_LIMIT < value < VALUE_LIMIT:
            raise ValueError("value must be a number below 10^18")
    elif type(value) is not Decimal:
        raise ValueError("value must be a number")
    elif value.adjusted() >= VALUE_DIGITS:
        raise ValueError("value must be a number below 10^18")
    elif value.as_tuple().exponent < -VALUE_DIGITS:
        raise ValueError("value must have at most 18 decimal places")
    if name == "add_revenue":
        return value
    if name == "subtract_revenue":
        return -value if type(value) is int else value.copy_negate()  # unary minus would round
    raise ValueError("name must be add_revenue or subtract_revenue")


def check_name(producer, sequence):
    """Raise ValueError unless producer and sequence can name an event."""
    if type(producer) is not str or not PRODUCER_ID.fullmatch(producer):
        raise ValueError("producerId must be 1 to 64 of A-Z, a-z, 0-9, _ and -")
    if type(sequence) is not int or not 1 <= sequence <= MAX_SEQUENCE:
        raise ValueError("sequence must be an integer from 1 to 2^53 - 1")


def check_unnamed(event):
    """Raise ValueError if the decoded event has a field with which the server would name it."""
    if len(event) > 3:
        for field in ("producerId", "sequence", "log"):
            if field in event:
                raise ValueError(f"{field} belongs to the server; name events with the headers Producer-Id and "
                                 "Sequence")


# ---- A log and its chunks -------------------------------------------------------------------------------------------

def end_of_lines(fd, size):
    """Return the offset behind the last LF in the first size bytes of the file, 0 when there is none."""
    while size:
        start = max(0, size - BLOCK_BYTES)
        newline = os.pread(fd, size - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        size = start
    return 0


def leads_to(path, fd):
    """Tell whether path still leads to the open file fd, which was neither renamed nor removed."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


class Progress:
    """A line on stderr about the reading of a log, written anew a few times a second, after the first, when stderr is a
    terminal."""

    def __init__(self, name):
        self._name = name
        self._begun = time.monotonic()
        self._next = self._begun + 1
        self._events = self._bytes = 0
        self._shown = False

    def show(self, events, size, left):
        """Count events and bytes that were read just now; left are the bytes still to be read."""
        self._events += events
        self._bytes += size
        now = time.monotonic()
        if now >= self._next and sys.stderr.isatty():
            self._next, self._shown = now + PROGRESS_SECONDS, True
            seconds = now - self._begun
            print(f"\r{self._name}: {self._events:,} events, {self._bytes / (self._bytes + left):.0%}, "
                  f"{self._events / seconds:,.0f}/s, {left * seconds / self._bytes:.0f} s left\033[K",
                  end="", file=sys.stderr, flush=True)

    def clear(self):
        """Remove the line."""
        if self._shown:
            self._shown = False
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Log:
    """One log file, open for reading. end is the offset behind the last whole line, unfinished the bytes after it."""

    def __init__(self, path):
        """Open path, or raise OSError."""
        self.path = path
        self.file = open(path, "rb", buffering=0)
        self.drained = None  # the end up to which this run has applied it
        self.refused = False  # an event without a name was rejected, as it may have been counted
        self.log_id = None
        self.end = self.unfinished = 0

    def take_end(self):
        """Set end and unfinished, and begin to show progress. The lock keeps out a server that is about to take a
        failed write back."""
        fd = self.file.fileno()
        fcntl.flock(fd, fcntl.LOCK_SH)
        try:
            size = os.fstat(fd).st_size
            self.end = end_of_lines(fd, size)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
        self.unfinished = size - self.end
        self.progress = Progress(self.path)
        if self.end and not self.log_id:
            # A block holds every line that the server writes.
            self.log_id = hashlib.sha256(b"".join(self.read(0, BLOCK_BYTES).partition(b"\n")[:2])).digest()

    def read(self, offset, length):
        """Return length bytes at offset, fewer only at the end of the file."""
        data = os.pread(self.file.fileno(), length, offset)
        while 0 < len(data) < length and (more := os.pread(self.file.fileno(), length - len(data), offset + len(data))):
            data += more
        return data

    def digest(self, position):
        """Return the SHA-256 of the up to 64 KiB before position, or None when the file is shorter."""
        start = max(0, position - DIGEST_BYTES)
        data = self.read(start, position - start)
        return hashlib.sha256(data).digest() if len(data) == position - start else None

    def blocks(self, offset):
        """Yield (offset, whole lines, offset behind them) up to end. Of a line longer than a block only the beginning
        is kept in memory and yielded, which is still too long to be an event."""
        while offset < self.end:
            block = self.read(offset, min(BLOCK_BYTES, self.end - offset))
            whole = block.rfind(b"\n") + 1
            if whole:
                yield offset, block[:whole], offset + whole
                offset += whole
                self.progress.show(block.count(b"\n"), whole, self.end - offset)
            else:
                start, offset, piece = offset, offset + len(block), block
                while piece and b"\n" not in piece:
                    piece = self.read(offset, BLOCK_BYTES)
                    offset += piece.find(b"\n") + 1 or len(piece)
                if not piece:
                    return  # the file was truncated meanwhile
                yield start, block + b"\n", offset


class Ranges:
    """A set of integers as disjoint half-open ranges: the even items of bounds begin one, the odd items end it."""

    def __init__(self):
        self.bounds = []

    def missing(self, low, high):
        """Return the parts of [low, high) that are not in the set, in order."""
        first, last = bisect.bisect_left(self.bounds, low), bisect.bisect_right(self.bounds, high)
        edges = [low] * (first % 2 == 0) + self.bounds[first:last] + [high] * (last % 2 == 0)
        return [(a, b) for a, b in zip(edges[::2], edges[1::2]) if a < b]

    def add(self, low, high):
        """Add [low, high). In ascending order each takes the same time, however many ranges there are."""
        first, last = bisect.bisect_left(self.bounds, low), bisect.bisect_right(self.bounds, high)
        self.bounds[first:last] = [low] * (first % 2 == 0) + [high] * (last % 2 == 0)

    def __str__(self):
        """Return an int8multirange literal."""
        return "{%s}" % ",".join([f"[{low},{high})" for low, high in zip(self.bounds[::2], self.bounds[1::2])])


class Chunk:
    """The events between two offsets of a log, decoded, and not yet counted.

    users[i] and amounts[i] are one event. A run (producer, first, end, i) says that the events from i on have the names
    from (producer, first) to (producer, end - 1). Events without a name are named ("", i), which are never the same.
    """

    def __init__(self, log, start, nameless_allowed):
        """Read log from offset start. Lines without a name are rejected unless nameless_allowed."""
        self.start = self.end = start
        self.users, self.amounts, self.runs, self.rejected = [], [], [], []
        self._log, self._nameless_allowed = log, nameless_allowed
        self._producer, self._expected = object(), None  # no run has begun
        deadline = time.monotonic() + CHUNK_SECONDS
        for offset, block, self.end in log.blocks(start):
            self._add(offset, block)
            if (self.end - start >= CHUNK_BYTES or len(self.rejected) >= CHUNK_REJECTED
                    or time.monotonic() > deadline):
                break
        stops = [at for _, _, at in self.runs[1:]] + [len(self.users)]
        # In the order of their names, in which Ranges are fast.
        self.runs = sorted([(producer or "", first, first + stop - at, at)
                            for (producer, first, at), stop in zip(self.runs, stops)])

    def _add(self, offset, block):
        users, amounts = self.users, self.amounts
        producer, expected = self._producer, self._expected
        rejected = []
        for number, event in enumerate(decode_lines(block)):
            if type(event) is not dict:
                if event is not None:
                    rejected.append((number, event))
                continue
            try:
                amount = amount_of(event)
                sequence = event.get("sequence")
                if sequence is None:
                    if producer is not None:
                        self._begin_nameless_run()
                        producer = expected = None
                    check_unnamed(event)
                else:
                    named_by = event.get("producerId")
                    if (sequence != expected or named_by != producer or sequence > MAX_SEQUENCE
                            or type(sequence) is not int):
                        check_name(named_by, sequence)
                        self.runs.append((named_by, sequence, len(users)))
                        producer = named_by
                    expected = sequence + 1
            except ValueError as error:
                rejected.append((number, error))
                continue
            users.append(event["userId"])
            amounts.append(amount)
        self._producer, self._expected = producer, expected
        if rejected:
            offsets = list(itertools.accumulate([len(line) + 1 for line in block.split(b"\n")], initial=offset))
            self.rejected += [(offsets[number], str(error)) for number, error in rejected]

    def _begin_nameless_run(self):
        if not self._nameless_allowed:
            self._log.refused = True
            raise ValueError("an event without producerId and sequence, in a log that is not the one read before: "
                             "whether it was counted cannot be known (move the file aside and send what is new in it "
                             "with python client.py FILE)")
        self.runs.append((None, len(self.users), len(self.users)))

    def names(self):
        """Return {producer: Ranges of its sequences}."""
        names = collections.defaultdict(Ranges)
        for producer, first, end, _ in self.runs:
            if producer:
                names[producer].add(first, end)
        return names

    def totals(self, counted):
        """Return {user: exact sum} over the events whose names are not in counted, {producer: Ranges}, and how many
        they are. Add their names there, so that an event that stands in this chunk twice is taken once."""
        totals, count = {}, 0
        with decimal.localcontext(EXACT):
            for producer, first, end, start in self.runs:
                for low, high in counted[producer].missing(first, end):
                    events = slice(start + low - first, start + high - first)
                    for user, amount in zip(self.users[events], self.amounts[events]):
                        totals[user] = totals.get(user, 0) + amount
                    count += high - low
                counted[producer].add(first, end)
        return totals, count


Tally = collections.namedtuple("Tally", "start end applied repeated rejected")  # offsets, and numbers of lines


# ---- Exactly once ---------------------------------------------------------------------------------------------------

def apply_chunk(connection, log, offset, report):
    """Apply the next chunk of log in one transaction, the only place that commits, and return its Tally.

    The chunk begins where the database says that this log was read to, or, when the bytes before that position are not
    those that were read (a copy, a cut, a restored backup), at offset: how far this run came, 0 at first. Then the
    position stays until the run has come to the end and refused nothing.
    """
    with connection, connection.cursor() as sql:
        sql.execute("SET LOCAL idle_in_transaction_session_timeout = %s", [int(IDLE_SECONDS * 1000)])
        sql.execute("INSERT INTO event_logs (log_id) VALUES (%s) ON CONFLICT DO NOTHING", [log.log_id])
        sql.execute("SELECT position, digest FROM event_logs WHERE log_id = %s FOR UPDATE", [log.log_id])
        position, digest = sql.fetchone()
        known = log.digest(position) == bytes(digest)
        chunk = Chunk(log, position if known else offset, nameless_allowed=known)
        counted = count_once(sql, chunk)
        if chunk.end > position and (known or chunk.end >= log.end and not log.refused):
            sql.execute("UPDATE event_logs SET position = %s, digest = %s WHERE log_id = %s",
                        [chunk.end, log.digest(chunk.end), log.log_id])
        for at, reason in chunk.rejected:
            report(log, at, reason)  # before the commit: better twice than, after a kill, never
    return Tally(chunk.start, chunk.end, counted, len(chunk.users) - counted, len(chunk.rejected))


def count_once(sql, chunk):
    """Add to users_revenue every event of chunk whose name is not yet in event_producers, and its name there, in the
    caller's transaction; return how many were added.

    READ COMMITTED. Each producer's row is locked before it is read, and exists before it is locked, so of two
    processors that meet the same name the second waits and then sees what the first has committed. Producers, then
    users, are taken in the order of their bytes, so that two processors cannot each wait for the other.
    """
    names = chunk.names()
    ranges = json.dumps({producer: str(names[producer]) for producer in sorted(names)})
    sql.execute("""
        INSERT INTO event_producers (producer_id)
        SELECT producer_id FROM json_each_text(%s) AS chunk (producer_id, ranges) ORDER BY producer_id COLLATE "C"
        ON CONFLICT DO NOTHING""", [ranges])
    sql.execute("""
        SELECT FROM event_producers WHERE producer_id = ANY (%s) ORDER BY producer_id COLLATE "C" FOR UPDATE""",
                [list(names)])
    sql.execute("""
        SELECT producer_id, lower(repeated), upper(repeated)
        FROM json_each_text(%s) AS chunk (producer_id, ranges)
        JOIN event_producers USING (producer_id), unnest(applied * ranges::int8multirange) AS repeated""", [ranges])
    applied = collections.defaultdict(Ranges)
    for producer, low, high in sql:
        applied[producer].add(low, high)

    totals, count = chunk.totals(applied)
    if count:
        sql.execute("""
            UPDATE event_producers AS known SET applied = applied + ranges::int8multirange
            FROM json_each_text(%s) AS chunk (producer_id, ranges)
            WHERE known.producer_id = chunk.producer_id AND NOT applied @> ranges::int8multirange""", [ranges])
        # One JSON text takes a fifth of the time that 100,000 adapted parameters do.
        sql.execute("""
            INSERT INTO users_revenue AS known (user_id, revenue)
            SELECT user_id, amount::numeric FROM json_each_text(%s) AS new (user_id, amount)
            ORDER BY user_id COLLATE "C"
            ON CONFLICT (user_id) DO UPDATE SET revenue = coalesce(known.revenue, 0) + excluded.revenue""",
                    [json.dumps(totals, default=str)])
    return count


# ---- The database ---------------------------------------------------------------------------------------------------

def connect(**options):
    """Return a psycopg2 connection to the database that the environment names, or raise psycopg2.OperationalError."""
    url = os.environ.get("DATABASE_URL")
    variables = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGSERVICE")
    if not url and not any(os.environ.get(variable) for variable in variables):
        options = {"host": "localhost", "port": 5432, "dbname": "postgres", "user": "postgres"} | options
        if not os.path.exists(os.environ.get("PGPASSFILE") or os.path.expanduser("~/.pgpass")):
            options["password"] = "password1!"
    # A host that vanished is noticed after a minute; by default it takes two hours.
    options = {"application_name": Path(sys.argv[0]).name, "client_encoding": "UTF8", "keepalives_idle": 30,
               "keepalives_interval": 10, "keepalives_count": 3} | options
    return psycopg2.connect(url or "", **options)


def first_line(error):
    """Return the first line of a database error, without libpq's prefixes."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("FATAL:  ").strip()


def open_database(readonly=False):
    """Return a connection to a database that has the tables, creating those that are missing. Raise Failure when there
    is none or it does not fit, or psycopg2.Error when it fails while that is being looked at."""
    try:
        connection = connect(connect_timeout=10)
    except psycopg2.Error as error:
        raise Failure(f"No database: {first_line(error)}. Start PostgreSQL, or name another one with DATABASE_URL or "
                      "PGHOST, PGPORT, PGUSER, PGPASSWORD and PGDATABASE.") from error
    prepare_database(connection, readonly)
    return connection


def prepare_database(connection, readonly):
    """Create the tables that are missing; raise Failure when the database or its tables do not fit."""
    connection.set_session(isolation_level="READ COMMITTED", readonly=readonly)
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise Failure(f"The database {connection.info.dbname} is encoded in {encoding}; create one with: "
                      "createdb --encoding=UTF8 --template=template0 NAME, and set PGDATABASE to its name.")
    with connection, connection.cursor() as sql:
        sql.execute("SELECT to_regclass('users_revenue'), to_regclass('event_producers'), to_regclass('event_logs')")
        if None in sql.fetchone():
            if readonly:
                raise Failure("The tables do not exist yet; run data_processor.py without --verify first.")
            # Two processors that create the same table at once collide, even with IF NOT EXISTS.
            sql.execute("SELECT pg_advisory_xact_lock(%s)", [TABLES_LOCK])
            sql.execute(TABLES.read_text())
    with connection, connection.cursor() as sql:
        sql.execute("""
            SELECT attname, format_type(atttypid, atttypmod), atttypmod FROM pg_attribute
            WHERE attrelid = 'users_revenue'::regclass AND attnum > 0 AND NOT attisdropped""")
        columns = {name: (kind, modifier) for name, kind, modifier in sql}
    check_columns(columns)


def check_columns(columns):
    """Raise Failure unless users_revenue, given as {column: (type, type modifier)}, can hold every user and sum."""
    revenue, _ = columns.get("revenue", (None, None))
    if revenue != "numeric":
        raise Failure(f"users_revenue.revenue is {revenue or 'missing'}, which cannot hold every sum exactly; mend it "
                      "with: ALTER TABLE users_revenue ALTER COLUMN revenue TYPE numeric")
    user, modifier = columns.get("user_id", (None, None))
    if user != "text" and not (user and user.startswith("character varying") and not 0 <= modifier < 255 + 4):
        raise Failure(f"users_revenue.user_id is {user or 'missing'}, which cannot hold every user; mend it with: "
                      "ALTER TABLE users_revenue ALTER COLUMN user_id TYPE text")


# ---- The run --------------------------------------------------------------------------------------------------------

class Processor:
    """One run over some logs: its connection, the logs that it holds open, and what came of them."""

    def __init__(self, follow=False, audit=False):
        self.follow, self.audit = follow, audit
        self.connection = None
        self.logs = {}  # path: Log; held open, so that a renamed log is still read to its end
        self.failed = False  # something was rejected or could not be read
        self._said = set()  # about which files something was said that is not repeated

    def run_once(self, named):
        """Apply what is new in the named logs, or in the default log and its rotated siblings; raise Failure when
        nothing can be done at all."""
        if self.connection is None:
            self._patiently(lambda connection: None)
        paths = named or [DEFAULT_LOG]
        if self.follow or not named:
            paths = [sibling for path in paths for sibling in self._siblings(path)]
        if not paths:
            raise Failure(f"{DEFAULT_LOG}: no such file; start server.py in this directory, or name a log.")
        for path in [*paths, *(self.logs.keys() - set(paths))]:
            try:
                self._apply_path(path)
            except OSError as error:
                self.failed = True
                print(f"{path}: {error.strerror}.", file=sys.stderr)

    def _siblings(self, path):
        """Return the rotated siblings of a log and then itself, as far as they exist or are waited for."""
        directory, name = os.path.split(path)
        try:
            entries = os.listdir(directory or ".")
        except OSError as error:
            raise Failure(f"{directory or '.'}: {error.strerror}.") from error
        rotated = sorted(os.path.join(directory, entry) for entry in entries
                         if entry.startswith(name + ".") and not entry.endswith(CLIENT_FILES))
        for compressed in [entry for entry in rotated if entry.endswith(COMPRESSED)]:
            self._say_once(compressed, "compressed, left alone.")
        plain = [entry for entry in rotated if not entry.endswith(COMPRESSED)]
        return plain + [path] * (self.follow or os.path.exists(path))

    def _say_once(self, path, words):
        if path not in self._said:
            self._said.add(path)
            print(f"{path}: {words}", file=sys.stderr)

    def _apply_path(self, path):
        log = self.logs.get(path)
        if log and not leads_to(path, log.file.fileno()):
            # The server writes nothing more to it, once the lock was taken after the renaming.
            self._drain(log)
            self.logs.pop(path).file.close()
            log = None
        if not log and self.follow and not os.path.exists(path):
            return self._say_once(path, "is not there; waiting for it.")
        if not log:
            log = self.logs[path] = Log(path)
        self._drain(log)
        if not self.follow:
            self.logs.pop(path).file.close()

    def _drain(self, log):
        log.take_end()
        if log.end == log.drained and self.follow:
            return
        applied = repeated = rejected = offset = 0
        while log.end:
            tally = self._patiently(apply_chunk, log, offset, self._report)
            applied += tally.applied
            repeated += tally.repeated
            rejected += tally.rejected
            offset = tally.end
            if offset >= log.end or offset == tally.start:
                break
        log.drained = log.end
        log.progress.clear()
        left = f"; {log.unfinished:,} bytes of an unfinished last line left" if log.unfinished else ""
        if not self.audit and (not self.follow or applied or repeated or rejected):
            print(f"{log.path}: {applied:,} applied, {repeated:,} repeated, {rejected:,} rejected{left}", flush=True)

    def _patiently(self, action, *arguments):
        """Return action(connection, *arguments). A deadlock or a lost connection, even during COMMIT, takes back what
        the database has not got, so it is tried again a few times before Failure is raised."""
        attempts = 1 if self.audit else ATTEMPTS  # an audit's tables are gone with its connection
        for attempt in range(attempts):
            known = self.connection is not None
            try:
                if not known or self.connection.closed:
                    self.connection = open_database()
                return action(self.connection, *arguments)
            except (psycopg2.Error, Failure) as error:
                passing = isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError))
                if attempt == attempts - 1 or not (passing or known and self.connection.closed):
                    raise Failure(str(error) if isinstance(error, Failure) else
                                  f"Stopped at a database error: {first_line(error)}.") from error
                time.sleep(0.1 * 2 ** (attempt + 1))

    def _report(self, log, offset, reason):
        if self.audit:
            return
        self.failed = True
        log.progress.clear()
        print(f"{log.path}: byte {offset}: {reason}", file=sys.stderr)


def verify(named):
    """Compare users_revenue with what the named or default logs give when they are read from their starts; print the
    users that differ, and return whether there are none.

    It is an ordinary run, into temporary tables that hide the real ones, in a session that can write nothing else.
    """
    processor = Processor(audit=True)
    processor.connection = connection = open_database(readonly=True)
    with connection, connection.cursor() as sql:
        sql.execute("SELECT 'users_revenue'::regclass::oid")
        real, = sql.fetchone()
    connection.set_session(readonly=False)
    with connection, connection.cursor() as sql:
        sql.execute(TABLES.read_text().replace("CREATE TABLE IF NOT EXISTS", "CREATE TEMPORARY TABLE"))
        sql.execute("SELECT %s::regclass::text", [real])
        real = sql.fetchone()[0]  # with its schema, as it is hidden now
    connection.set_session(readonly=True)
    processor.run_once(named)
    with connection, connection.cursor() as sql:
        sql.execute(f"""
            SELECT user_id, coalesce(stored.revenue, 0) AS stored, coalesce(logged.revenue, 0) AS logged
            FROM {real} AS stored FULL JOIN users_revenue AS logged USING (user_id)
            WHERE coalesce(stored.revenue, 0) <> coalesce(logged.revenue, 0) ORDER BY user_id""")
        for user, stored, logged in sql:
            print(f"{user}: {stored:f} in users_revenue, {logged:f} in the logs, "
                  f"difference {EXACT.subtract(stored, logged):f}")
        differing = sql.rowcount
        sql.execute("SELECT count(*) FROM users_revenue")
        users, = sql.fetchone()
    if differing:
        print(f"{differing:,} users differ. Revenue from before these logs is a difference, and so are events that are "
              "not applied yet: run data_processor.py first, and name every log.")
    else:
        print(f"users_revenue and the logs agree on {users:,} users.")
    return not differing and not processor.failed


def follow(processor, named):
    """Apply what is new every second, through database outages, until interrupted."""
    backoff = POLL_SECONDS
    while True:
        try:
            processor.run_once(named)
            backoff = POLL_SECONDS
        except Failure as error:
            print(f"{error} Trying again in {backoff:.0f} s.", file=sys.stderr)
            processor.connection = None
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
        time.sleep(backoff)


def exit_on(statuses):
    """From now on end the process on these signals with their statuses, at once: the database takes back what is under
    way, and may be what the process waits for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, statuses)
    threading.Thread(target=lambda: os._exit(statuses[signal.sigwait(statuses)]), daemon=True).start()


def main(arguments=None):
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        description="Apply what is new in the server's logs to each user's revenue in PostgreSQL, then exit.",
        epilog="Example: python data_processor.py server-events.jsonl. The database is the one that DATABASE_URL or "
               "libpq's variables (PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE) name; without any of them "
               "localhost:5432, database postgres, user postgres, password password1!.")
    parser.add_argument("logs", metavar="LOG", nargs="*",
                        help=f"logs to read (default: {DEFAULT_LOG} and its rotated siblings {DEFAULT_LOG}.*)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--follow", action="store_true", help="look for new events every second until interrupted")
    mode.add_argument("--verify", action="store_true",
                      help="change nothing; compare the sums over the logs with the database")
    options = parser.parse_args(arguments)
    processor = Processor(options.follow)
    exit_on({signal.SIGINT: 130} | ({signal.SIGTERM: 0} if options.follow else {}))
    try:
        if options.follow:
            follow(processor, options.logs)
        if options.verify:
            return 0 if verify(options.logs) else 1
        processor.run_once(options.logs)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}.", file=sys.stderr)
        return 1
    except (Failure, psycopg2.Error) as failure:
        print(failure if isinstance(failure, Failure) else f"Stopped at a database error: {first_line(failure)}.",
              file=sys.stderr)
        return 1
    return 1 if processor.failed else 0


if __name__ == "__main__":
    sys.exit(main())
