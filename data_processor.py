"""Apply what is new in the server's logs to each user's revenue in PostgreSQL, then exit."""
# One transaction adds revenue and the ids of the events that it came from. What it does is in
# apply_chunk and count_once, in the section "Exactly once": the place to start reading.
#
#   event id  a producer id and a sequence number; the server stamps every line with one
#   span      lines that follow each other and have consecutive event ids of one producer
#   log       a file of events; it is read in chunks
#   chunk     what one transaction applies; it is tallied in slices
#   slice     whole lines of a chunk, which one child process tallies; it is read in blocks
#   tally     what a slice holds: its sums, its spans and its bad lines
#
# The parts in order: settings; failures; what server.py uses, too (printing, an event, the file of
# a log, the machine, the connection to PostgreSQL); reading a log; the tally of a slice; exactly
# once; the tables; applying logs; the modes (run, follow, verify); the command line.
#
# multiprocessing, pickle and tempfile are imported where they are needed, because that takes 15 ms:
# most runs of a processor that is started every minute find nothing new.
import argparse
import bisect
import collections
import contextlib
import decimal
import errno
import functools
import hashlib
import importlib
import itertools
import json
import operator
import os
import re
import select
import signal
import stat
import sys
import threading
import time
from decimal import Decimal
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.exit("This program needs Python 3.11 or newer.")
try:
    import fcntl
    import psycopg2
    import psycopg2.errors
    import psycopg2.extensions
    import resource
except ImportError as missing:
    sys.exit(
        f"{missing}. This needs Linux or macOS (on Windows, WSL) "
        "and python -m pip install -r requirements.txt."
    )

# Otherwise psycopg2 may send a statement of its own once it has connected, whose answer it awaits
# without a bound.
os.environ["PGDATESTYLE"] = "ISO"

HELP = """\
Apply what is new in the server's logs to each user's revenue in PostgreSQL, then exit.

Every event counts exactly once, whatever is killed, run again, run twice at once,
copied, cut or rotated in between. A LOG means the file and its rotated siblings:
LOG.1, LOG-20261124 and the like.

Example: python data_processor.py server-events.jsonl

The database is the one that DATABASE_URL or libpq's variables (PGHOST, PGPORT, PGUSER,
PGPASSWORD, PGDATABASE) name; without any of them localhost:5432, database postgres,
user postgres, password password1!.
"""
DEFAULT_LOG = "server-events.jsonl"
TABLES = os.path.join(os.path.dirname(os.path.realpath(__file__)), "create_table.sql")

# Bounds of an event. MAX_DEPTH is far below where json itself gives up, which differs by version
# and stack: server and processor must agree. VALUE_DIGITS may stand before the decimal point, and
# as many behind it; the grammar below says so, too.
MAX_EVENT_BYTES = 64 * 1024
MAX_DEPTH = 100
VALUE_DIGITS = 18
MAX_SEQUENCE = 2**53 - 1

# How many bytes are read and decoded at a time: more than the longest event with its stamp.
BLOCK_BYTES = 256 * 1024
# How many bytes one transaction applies: many, because it updates every user in them once.
CHUNK_BYTES = 128 * 1024 * 1024
# A chunk is not cut into smaller slices than that.
SLICE_BYTES = 2 * 1024 * 1024
# After a failure that may come from its size, a chunk is this many times smaller, down to
# SMALLEST_CHUNK_BYTES, until all logs were looked at.
SHRINK = 4
SMALLEST_CHUNK_BYTES = 64 * 1024
# Estimated memory of what the children of one chunk send to the parent. A child stops early at
# its share. The parent needs about four times that memory, because the same sums are in the text
# that a child sent, in the tally, in the SQL statement and in the driver's buffer.
KEPT_BYTES = 24 * 1024 * 1024
# In that estimate: a span or a rejected line, and the sum of a user besides the user id.
SPAN_BYTES = 100
SUM_BYTES = 16
# The hash of so many bytes before a position tells whether the log is unchanged.
DIGEST_BYTES = 64 * 1024

# A child reads for at most so long before it sends what it has.
READ_SECONDS = 15
# A child that sends nothing for so long stands still, and is given up.
SILENT_CHILD_SECONDS = 30
# PostgreSQL ends a transaction that is idle for so long: a processor that vanished or stands
# still releases its locks. It is longer than a tally, during which the transaction is idle: that
# takes READ_SECONDS and a little. If a chunk needs a second tally (see marked_sums), that one has
# no deadline of its own, but reads the same lines, and takes about as long.
IDLE_SECONDS = 60
# A lock that somebody else holds, on a log or on rows, is waited for in steps of so long.
LOCK_SECONDS = 10
# An address of PostgreSQL that takes no connection for so long is given up for the next one.
CONNECT_SECONDS = 10
# PostgreSQL cancels a statement after so long. One without an answer for a tenth more has failed:
# its host or its process stands still.
STATEMENT_SECONDS = 120
# Both times for --verify, which holds no row: it may decompress logs between two statements, and
# compares all users in one.
VERIFY_SECONDS = 3600
# A run ends after so many attempts without any progress, 0.2 to 3.2 s apart: a PostgreSQL that
# restarts is back by then, and a lock was waited for a minute.
ATTEMPTS = 6
# The pause between two looks with --follow; after errors it grows up to the second one.
POLL_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 30.0
# So many rejected lines of a log are named at a time; the others are a number.
NAMED_LINES = 100
# So many logs that PostgreSQL refuses for one reason, which may concern all of them, are named in
# one look at the logs.
NAMED_REFUSALS = 10
# The help, and the list of --verify, wait so long for a reader of stdout that takes nothing.
READER_SECONDS = 1.0

# An amount has at most 18 + 18 digits; 100 hold the sum of 10**64 of them. If one still does not
# fit, Inexact raises.
EXACT = decimal.Context(
    prec=100, traps=[decimal.InvalidOperation, decimal.Overflow, decimal.Inexact]
)


# ---- Failures -----------------------------------------------------------------------------


class Failure(Exception):
    """Something in the user's world that ends the work: what is wrong and what to do."""


class ChildDied(Failure):
    """A child process ended or stood still before it gave its result."""


class Silent(Failure):
    """PostgreSQL, or what lies between, stands still."""


class Locked(Failure):
    """Somebody else holds a lock for longer than LOCK_SECONDS."""


class Disturbed(Failure):
    """Somebody deleted rows that were about to be locked."""

    def __init__(self, table):
        super().__init__(f"Somebody deletes rows of {table}; the transaction was rolled back.")


class Refused(Failure):
    """PostgreSQL refuses what one log holds (a CHECK, a foreign key, no partition, an index), or
    it cannot serve any log (no permission, a full disk): each is tried, and some are named."""


class SyncFailed(Exception):
    """A log could not be synced. It ends every mode: a second sync could lie."""


# What PostgreSQL began and gave up. If it does so in the last attempt, too, it refuses that log.
GIVEN_UP = (psycopg2.errors.QueryCanceled, psycopg2.errors.OutOfMemory)
# What may come from the size of a chunk.
TOO_MUCH = (*GIVEN_UP, ChildDied, Silent, MemoryError)
# What was waited for already: it is named at once.
WAITED = (Locked, Silent)
# What ends with a transaction or a connection, so that another attempt may succeed. (If a table is
# missing, the next connection finds out what to do about it.)
PASSING = (
    *TOO_MUCH,
    Locked,
    Disturbed,
    psycopg2.OperationalError,
    psycopg2.InterfaceError,
    psycopg2.errors.UndefinedTable,
)
# How the codes begin of errors that are no refusal: a lost connection, an idle transaction, a
# deadlock, no memory, a lock, a time-out or a stop. (psycopg2's classes do not tell: an entry
# that is too long for an index is an OperationalError, too.)
PASSING_CODES = ("08", "25P03", "40", "53200", "55P03", "57")


# ---- What server.py uses, too -------------------------------------------------------------

# ---- Printing


def write(stream, text, patience=0.0):
    """Write text to sys.stdout or sys.stderr, or drop what the stream does not take at once.

    The stream may be closed, full, broken or stopped, or its encoding may lack a character:
    nothing is raised, and nothing stays in a buffer. With patience (seconds), a stream that takes
    nothing is waited for that long. Return False if something was dropped.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        data = text.encode(stream.encoding, "backslashreplace")
        while data:
            written = write_without_waiting(stream.fileno(), data, patience)
            if not written:
                return False
            data = data[written:]
        return True
    return False


def write_without_waiting(fd, data, patience):
    """Write the beginning of data to fd once it takes something; return how many bytes, 0 when it
    took nothing for patience seconds. Raise OSError."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.write(fd, data)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(patience * 1000):
        return 0
    # What is ready may have less room than data needs, and would wait for the rest. A descriptor
    # of its own can refuse to wait without changing the one that other programs share.
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        own_fd = os.open(f"/dev/fd/{fd}", flags)
    except OSError:  # a socket, or somebody else's pipe: one that is ready takes so much
        return os.write(fd, data[:512])
    try:
        if os.get_blocking(own_fd):  # macOS gives the same one once more
            data = data[:512]
        return os.write(own_fd, data)
    except BlockingIOError:
        return 0
    finally:
        os.close(own_fd)


def printable(words):
    """Return words with a backslash escape for what a terminal could obey or not show."""
    escaped = []
    for character in words:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        escaped.append(character)
    return "".join(escaped)


def is_terminal(stream):
    """Tell whether stream is a terminal; a closed one is not."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return stream.isatty()
    return False


def write_line(stream, words, patience=0.0):
    """Write a line; on a terminal it takes the place of the progress."""
    line = printable(words) + "\n"
    if is_terminal(stream):
        line = "\r\033[K" + line
    return write(stream, line, patience)


def say(words):
    """Print a line to stdout."""
    write_line(sys.stdout, words)


def warn(words):
    """Print a line to stderr."""
    write_line(sys.stderr, words)


def show_progress(words):
    """Show words on stderr, if that is a terminal, in one line that the next output replaces."""
    if is_terminal(sys.stderr):
        width = 80
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(sys.stderr.fileno()).columns or width
        write(sys.stderr, "\r\033[K" + printable(words)[: width - 1])


class Parser(argparse.ArgumentParser):
    """A parser of command lines that prints as everything here is printed."""

    def __init__(self, description):
        """Prepare a parser whose help begins with the description, with its own line ends."""
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def print_help(self, file=None):
        """Print the help to stdout."""
        write(sys.stdout, self.format_help(), READER_SECONDS)

    def error(self, message):
        """Say what is wrong with the command line, and exit with status 2."""
        for line in self.format_usage().splitlines():
            warn(line)
        warn(f"{self.prog}: error: {message}")
        raise SystemExit(2)


class Troubles:
    """What is wrong at present: each subject is named on stderr once when its trouble begins and
    once when it ends. Several threads may use it."""

    def __init__(self):
        self._subjects = set()
        self._lock = threading.Lock()  # guards changes of _subjects; nothing is printed under it

    def __contains__(self, subject):
        return subject in self._subjects

    def begin(self, subject, words):
        """Say what is wrong with subject, unless that is known."""
        with self._lock:
            known = subject in self._subjects
            self._subjects.add(subject)
        if not known:
            warn(f"{subject}: {words}")

    def end(self, subject, words):
        """Say that nothing is wrong with subject any more, if something was."""
        with self._lock:
            known = subject in self._subjects
            self._subjects.discard(subject)
        if known:
            warn(f"{subject}: {words}")


# ---- An event

# The grammar: an event as everyone prints it, with these fields in this order, without escapes,
# and with one space or none behind ":" and ",". It ends before the "}", where a log has the stamp.
# A line outside of it is not wrong yet: decode_event and amount_of decide, and say why. So the
# user id may be limited in bytes here, although its limit is in characters. (Possessive
# quantifiers like *+ give nothing back, so that hostile input takes linear time.)
EVENT = (
    rb'\{"userId": ?"([^"\\\x00-\x1f]{1,255}+)", ?"name": ?"(add|subtract)_revenue", ?'
    rb'"value": ?(-?(?:0|[1-9][0-9]{0,17}+)(?:\.[0-9]{1,18}+)?)'
)
# What the server adds to an event. The first line of a log has the field log, too: see
# add_log_field in server.py. (STAMP below is the stamp of every other line.)
STAMP_AT_END = re.compile(
    rb'(?:, "log": "[0-9a-f]+")?, "producerId": "[^"]+", "sequence": [0-9]+\}$'
)
# A string, also an unterminated one, so that it is found in linear time.
JSON_STRING = re.compile(r'(?s)"(?:[^"\\]|\\.)*+"?')
BRACKET = re.compile("[][{}]")
SURROGATE = re.compile("[\ud800-\udfff]")
PRODUCER_ID = re.compile("[A-Za-z0-9_-]{1,64}")
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def is_utf8(data):
    """Tell whether data is strict UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def check(condition, rule):
    """Raise ValueError, which names the rule, unless condition holds."""
    if not condition:
        raise ValueError(rule)


def _refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


_decode_json = json.JSONDecoder(parse_float=Decimal, parse_constant=_refuse_constant).decode


def decode_event(line):
    """Return the JSON object in line (bytes, with or without a stamp) as a dict with numbers as
    int or Decimal, or raise ValueError with the rule that it breaks."""
    if len(line) > MAX_EVENT_BYTES:
        without_stamp = STAMP_AT_END.sub(b"}", line)
        check(len(without_stamp) <= MAX_EVENT_BYTES, "an event must be at most 64 KiB long")
    utf16 = b"\0" in line[:2]
    check(
        not utf16 and not line.startswith(BYTE_ORDER_MARKS),
        "an event must be UTF-8 without a byte order mark (BOM), and not UTF-16",
    )
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"an event must be UTF-8; byte {error.start} of it is not") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check(
            depth(text) <= MAX_DEPTH,
            f"an event must be nested at most {MAX_DEPTH} levels deep",
        )
    try:
        event = _decode_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, ArithmeticError):  # the latter from Decimal, for a huge exponent
        raise ValueError("a number is out of range, NaN or Infinity") from None
    check(type(event) is dict, "an event must be a JSON object")
    return event


def depth(text):
    """Return how deep the brackets of a JSON text are nested."""
    deepest = 0
    level = 0
    for bracket in BRACKET.findall(JSON_STRING.sub("", text)):
        if bracket in "[{":
            level += 1
            deepest = max(deepest, level)
        else:
            level -= 1
    return deepest


def is_user_id(user):
    """Tell whether an event may have user (anything that JSON can say) as its userId."""
    return (
        type(user) is str
        and 1 <= len(user) <= 255
        and "\0" not in user
        and not SURROGATE.search(user)
    )


def amount_of(event):
    """Return what the decoded event adds to its user's revenue, an exact Decimal, or raise
    ValueError with the rule that it breaks."""
    check(
        is_user_id(event.get("userId")),
        "userId must be a string of 1 to 255 characters, without NUL or a lone surrogate",
    )
    value = event.get("value")
    check(type(value) in (int, Decimal), "value must be a number")
    value = Decimal(value)
    # A number counts as it is written: 0e18 is zero, but adjusted() gives 18, as for 1e18.
    check(
        value.adjusted() < VALUE_DIGITS,
        "value must be a number below 10^18, written with at most 18 digits before the point",
    )
    check(
        value.as_tuple().exponent >= -VALUE_DIGITS,
        "value must have at most 18 decimal places",
    )
    name = event.get("name")
    check(
        name in ("add_revenue", "subtract_revenue"),
        "name must be add_revenue or subtract_revenue",
    )
    if name == "add_revenue":
        return value
    return value.copy_negate()  # unary minus would round to 28 digits here, outside of EXACT


def check_id(producer, sequence):
    """Raise ValueError unless producer and sequence make an event id."""
    check(
        type(producer) is str and PRODUCER_ID.fullmatch(producer),
        "producerId must be 1 to 64 of A-Z, a-z, 0-9, _ and -",
    )
    check(
        type(sequence) is int and 1 <= sequence <= MAX_SEQUENCE,
        "sequence must be an integer from 1 to 2^53 - 1",
    )


def check_reserved(event):
    """Raise ValueError if the decoded event has a field that the server adds."""
    for field in ("producerId", "sequence", "log"):
        check(
            field not in event,
            f"{field} belongs to the server; headers give event ids: Producer-Id and Sequence",
        )


# ---- The file of a log


def open_regular(path, flags, mode=0o640):
    """Return a descriptor of the regular file at path, or raise OSError, also if it is anything
    else."""
    # O_NONBLOCK: a named pipe would wait for a writer.
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "is not a regular file; name one that is", path)


def sync_file(fd):
    """Return when the file's data is on the disk, or raise OSError."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # macOS: fsync stops at the drive's cache
    else:
        os.fdatasync(fd)


def leads_to(path, fd):
    """Tell whether path still leads to the open file fd, which was neither renamed nor removed."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False


def lock_log(path, fd, operation, seconds=LOCK_SECONDS):
    """Lock the log that was opened as fd from path (operation is LOCK_SH or LOCK_EX of fcntl).

    Return True when it is locked, and False when somebody else holds the lock of a file that path
    no longer leads to: that may last for ever. Raise OSError when the lock was not to be had
    within seconds.
    """
    deadline = time.monotonic() + seconds
    pause = 0.0002  # a server's writer holds the lock for about so long
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            return True
        if not leads_to(path, fd):
            return False
        if time.monotonic() >= deadline:
            words = "another program holds its lock (lsof shows which)"
            raise OSError(errno.EAGAIN, words, path)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def end_of_events(fd, size):
    """Return the offset where the events in the first size bytes of a log end: after the last LF
    or, if what follows is a whole event that lacks only its LF, size."""
    end = end_of_lines(fd, size)
    rest = os.pread(fd, min(size - end, BLOCK_BYTES), end)
    if rest:
        with contextlib.suppress(ValueError):
            decode_log_line(rest)
            return size
    return end


def end_of_lines(fd, size):
    """Return the offset after the last LF in the first size bytes of a file, 0 without one."""
    end = size
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


class LogLine(NamedTuple):
    """A line of a log: an event, or other. The fields are the groups of LOG_LINE, in bytes."""

    user: bytes  # as JSON writes it, without the quotes
    kind: bytes  # add or subtract
    amount: bytes
    producer: bytes  # b"" for an event without an id, as is sequence
    sequence: bytes
    other: bytes  # any other line; then the fields before are b""


def decode_log_line(line):
    """Return a line of a log as a LogLine, or raise ValueError if it is no event."""
    event = decode_event(line)
    amount = str(amount_of(event)).encode()
    # A plain user id gets the bytes that it has in a line which LOG_LINE takes.
    user = json.dumps(event["userId"], ensure_ascii=False)[1:-1].encode()
    producer = event.get("producerId")
    sequence = event.get("sequence")
    kind = b"add"  # also for a subtraction, whose amount has its sign already
    if sequence is None:
        check_reserved(event)  # a part of a stamp is no stamp
        return LogLine(user, kind, amount, b"", b"", b"")
    check_id(producer, sequence)
    return LogLine(user, kind, amount, producer.encode(), b"%d" % sequence, b"")


# ---- The machine


def usable_cores():
    """Return on how many cores this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


# ---- The connection to PostgreSQL


def connect(**parameters):
    """Return a psycopg2 connection to the database that the environment names.

    parameters are libpq's, for what the environment does not say. Raise Failure when DATABASE_URL
    makes no sense, or psycopg2.OperationalError.
    """
    url = os.environ.get("DATABASE_URL", "")
    names_database = bool(url)
    for variable in ("PGHOST", "PGHOSTADDR", "PGUSER", "PGDATABASE", "PGSERVICE"):
        names_database = names_database or bool(os.environ.get(variable))
    # What is chosen later replaces what was chosen before: first what we prefer to libpq's own
    # values. (A host that vanished is noticed after a minute, instead of two hours.)
    chosen = {
        "fallback_application_name": os.path.basename(sys.argv[0]),
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": int(1000 * IDLE_SECONDS),
    }
    if not names_database:
        chosen.update(host="localhost", dbname="postgres", user="postgres")
        passwords = os.environ.get("PGPASSFILE") or os.path.expanduser("~/.pgpass")
        if not os.environ.get("PGPASSWORD") and not os.path.exists(passwords):
            chosen["password"] = "password1!"
    chosen.update(parameters)
    if os.environ.get("PGCONNECT_TIMEOUT"):
        chosen.pop("connect_timeout", None)  # libpq itself takes the variable then
    chosen.update(parse_database_url(url))
    chosen["client_encoding"] = "UTF8"
    try:
        return psycopg2.connect(**chosen)
    except UnicodeDecodeError as error:  # PostgreSQL's words, or ours in them, are not UTF-8
        raise psycopg2.OperationalError(error.object.decode(errors="backslashreplace")) from None


def parse_database_url(url):
    """Return the parts of DATABASE_URL, or raise Failure, without quoting any of it: where a URL
    is malformed, any part of it may be a part of the password."""
    with contextlib.suppress(psycopg2.ProgrammingError, UnicodeError):
        parts = psycopg2.extensions.parse_dsn(url)
        # libpq would take an unescaped @ / or : of a password for a host or a port, and print it:
        # in postgresql://user:pass@word@host it finds the host word@host.
        is_url = "://" in url
        one_at = re.fullmatch("postgres(ql)?://([^@/]*@)?[^@]*", url)
        ports = re.fullmatch("[0-9,]*", parts.get("port", ""))
        if ports and (one_at or not is_url):
            return parts
    raise Failure(
        "DATABASE_URL is malformed. It must look like postgresql://user:password@host:5432/"
        "database, with each / @ : % in the password percent-encoded (%2F %40 %3A %25)."
    )


class Connecting:
    """A connection to the database that a thread of its own is making.

    It can take long, for looking up a name, too. Nobody can interrupt it, and no signal's handler
    runs meanwhile in the thread that connects.
    """

    def __init__(self, **parameters):
        """Begin connect(**parameters). Raise Failure if there is no room for a thread."""
        # psycopg2 has one wait callback for the whole process; whoever needs one sets it when there
        # is a connection. With one, psycopg2 would look up a name while it holds the interpreter's
        # lock, which stops all threads, and would try only the first of several addresses.
        psycopg2.extensions.set_wait_callback(None)
        # The connection, or the exception that was raised. The thread writes it before it ends.
        self._outcome = None
        self._thread = threading.Thread(target=self._connect, kwargs=parameters, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise Failure(f"There is no room for a thread: {error}.") from error

    def _connect(self, **parameters):
        """Connect, and keep the outcome."""
        try:
            self._outcome = connect(**parameters)
        except BaseException as error:
            self._outcome = error

    def has_failed(self):
        """Tell whether it is known that there will be no connection."""
        return isinstance(self._outcome, BaseException)

    def wait(self, deadline):
        """Return when there is a connection or none will come. Raise TimeoutError at the deadline
        (in seconds of time.monotonic)."""
        self._thread.join(max(0, deadline - time.monotonic()))
        if self._thread.is_alive():
            raise TimeoutError

    def result(self):
        """Wait for the connection, and return it, or raise what connect() has raised."""
        self._thread.join()
        if self.has_failed():
            raise self._outcome
        return self._outcome


def wait_for(connection, deadline):
    """Return when the connection has done what it was told: what a wait callback of psycopg2 is to
    do. Raise TimeoutError at the deadline (in seconds of time.monotonic), or psycopg2.Error."""
    while True:
        state = connection.poll()
        if state == psycopg2.extensions.POLL_OK:
            return
        wanted = select.POLLIN
        if state == psycopg2.extensions.POLL_WRITE:
            wanted = select.POLLOUT
        poll = select.poll()
        poll.register(connection.fileno(), wanted)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            raise TimeoutError


def sentence(error):
    """Return what an exception says is wrong, in one line without a full stop."""
    lines = (getattr(error, "strerror", None) or str(error)).splitlines()
    if isinstance(error, psycopg2.Error):
        diagnosis = error.diag
        if diagnosis.message_primary:
            lines = [diagnosis.message_primary, diagnosis.message_detail or ""]
        else:
            # libpq's own words: a line for each address that it tried, and indented advice.
            lines = [line for line in lines if not line.startswith("\t")]
    sentences = []
    for line in lines:
        words = " ".join(line.split()).rstrip(".")
        if words:
            sentences.append(words)
    return "; ".join(sentences) or type(error).__name__


# ---- Reading a log ------------------------------------------------------------------------

STAMP = rb', "producerId": "([A-Za-z0-9_-]{1,64}+)", "sequence": ([1-9][0-9]{0,14}+)'
# The groups of a line are the fields of LogLine.
LOG_LINE = re.compile(rb"(?:%b(?:%b)?\}|([^\n]*+))\n" % (EVENT, STAMP))

DECOMPRESSORS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
COMPRESSED = (*DECOMPRESSORS, ".zst", ".lz4", ".lzo", ".lzma", ".br", ".z", ".zip", ".7z")


def is_compressed(path):
    """Tell whether a file's name says that it is compressed."""
    return path.lower().endswith(COMPRESSED)


def decompress(path, file):
    """Return a temporary file with what the open compressed file holds, or raise OSError."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in DECOMPRESSORS:
        words = f"cannot be read: decompress it first ({suffix} is not among "
        raise OSError(errno.EINVAL, words + f"{', '.join(DECOMPRESSORS)})", path)
    opener = importlib.import_module(DECOMPRESSORS[suffix]).open
    with contextlib.ExitStack() as on_failure:
        unpacked = on_failure.enter_context(temporary_file())
        file.seek(0)
        with opener(file) as content:
            while block := read_compressed(path, content):
                write_temporary(unpacked, block)
        on_failure.pop_all()
    return unpacked


def read_compressed(path, content):
    """Return the next bytes of the opened compressed file, or raise OSError."""
    try:
        return content.read(BLOCK_BYTES)
    except Exception as error:  # each of the modules raises others
        if getattr(error, "errno", None):
            raise
        words = str(error) or type(error).__name__
        raise OSError(errno.EINVAL, f"cannot be decompressed: {words}", path) from error


def temporary_file():
    """Return an unbuffered temporary file without a name, or raise OSError."""
    import tempfile

    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        raise no_temporary_file(error) from error


def write_temporary(file, data):
    """Write all of data to a temporary file, or raise OSError, which names its directory."""
    try:
        while data:
            written = file.write(data)  # less than all if the disk gets full
            data = data[written:]
    except OSError as error:
        raise no_temporary_file(error) from error


def no_temporary_file(error):
    """Return an OSError that names the temporary directory, not the log that needs it."""
    import tempfile

    words = f"{sentence(error)}: no room for a temporary file (TMPDIR names another directory)"
    try:
        directory = tempfile.gettempdir()
    except OSError:
        directory = "temporary files"  # no directory takes one
    return OSError(error.errno, words, directory)


class Block(NamedTuple):
    """Whole lines of a log."""

    start: int  # the offset of the first line
    lines: bytes  # each with its LF
    end: int  # the offset after the last line
    raw: bytes  # the file's own bytes that end at end, for the digest: lines may have got an LF


class LogReader:
    """A log that is open for reading.

    path        the name by which it was opened
    file        the file on the disk
    content     what is read: that file or, for a compressed log, a temporary one
    end         the offset where its events end; this and the next two are set by find_end
    unfinished  how many bytes follow that are no whole line
    log_id      the SHA-256 of the first line, as far as one block holds it; None without a line
    """

    def __init__(self, path):
        """Open the log at path, or raise OSError."""
        self.path = path
        self.file = open(open_regular(path, os.O_RDONLY), "rb", buffering=0)
        self.content = self.file
        self.end = 0
        self.unfinished = 0
        self.log_id = None
        self._synced = 0

    def close(self):
        """Close the log."""
        self.content.close()
        self.file.close()

    def find_end(self, seconds=LOCK_SECONDS):
        """Set end, unfinished and log_id; decompress the log first, if its name says so.

        It is done under the log's lock, when no server is in the midst of a write, which it could
        still take back. (Nobody writes to a decompressed log: its lock is free.) Return False if
        the path does not lead to this file any more and somebody holds its lock. Raise OSError if
        the lock was not to be had within seconds, or the file is no log.
        """
        if is_compressed(self.path):
            content = decompress(self.path, self.file)
            if self.content is not self.file:
                self.content.close()
            self.content = content
        fd = self.content.fileno()
        if not lock_log(self.path, fd, fcntl.LOCK_SH, seconds):
            return False
        try:
            size = os.fstat(fd).st_size
            self.end = end_of_events(fd, size)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
        self.unfinished = size - self.end
        # So begins a torn first line, also one of which a power cut has left no byte.
        if self.unfinished and not self.end and self.read(0, 1) not in (b"{", b"\0"):
            words = "is no log: it has no whole line, and does not begin as an event does"
            raise OSError(errno.EINVAL, words, self.path)
        self.log_id = None
        if self.end:
            beginning = self.read(0, min(BLOCK_BYTES, self.end))
            first_line = beginning.partition(b"\n")[0]
            self.log_id = hashlib.sha256(first_line + b"\n").digest()
        return True

    def sync(self):
        """Make what was read durable before it is counted: a power cut could put other lines in
        its place. A file system that has no sync has not failed. Raise SyncFailed."""
        if self._synced == self.end:
            return
        try:
            sync_file(self.file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
                raise SyncFailed(f"{self.path}: a sync failed ({error.strerror}), so it is not "
                                 "counted. Look at the disk before you run this again.") from error
        self._synced = self.end

    def read(self, offset, length):
        """Return length bytes at offset, fewer only at the end of the file."""
        try:
            return os.pread(self.content.fileno(), length, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error

    def before(self, position):
        """Return the up to DIGEST_BYTES before position; fewer if the log is shorter than that."""
        start = max(0, position - DIGEST_BYTES)
        return self.read(start, position - start)

    def digest(self, position):
        """Return the SHA-256 of the up to DIGEST_BYTES before position."""
        return hashlib.sha256(self.before(position)).digest()

    def slices(self, start, size):
        """Return pairs of offsets that cut about size bytes from start on into whole lines: one
        for each core, or one alone when there is little to read."""
        size = min(self.end - start, size)
        count = max(1, min(usable_cores(), size // SLICE_BYTES))
        cuts = [start]
        for number in range(1, count + 1):
            cuts.append(self.next_line(start + size * number // count))
        return [(low, high) for low, high in itertools.pairwise(cuts) if low < high]

    def next_line(self, offset):
        """Return offset if a line begins there, else where the next line begins, or end. (offset is
        above 0: it is inside of a log that is not empty, or at its end.)"""
        before = offset - 1  # an LF there tells that a line begins at offset
        while before + 1 < self.end:
            data = self.read(before, BLOCK_BYTES)
            newline = data.find(b"\n")
            if newline >= 0:
                return min(before + newline + 1, self.end)
            if not data:
                break  # the file was truncated
            before += len(data)
        return self.end

    def blocks(self, start, end):
        """Yield the lines from start up to end as Blocks; they end early where the file was
        truncated.

        Of a line longer than a block only the beginning is yielded, with "..." behind it: it is
        too long for an event in any case.
        """
        while start < end:
            data = self.read(start, min(BLOCK_BYTES, end - start))
            if not data:
                return
            block = self._whole_lines(start, data)
            yield block
            start = block.end

    def _whole_lines(self, start, data):
        """Return the Block of the whole lines at the beginning of data, which was read at offset
        start; see blocks()."""
        end = start + len(data)
        newline = data.rfind(b"\n")
        if end == self.end and newline < len(data) - 1:
            return Block(start, data + b"\n", end, data)  # the last event of the log lacks it
        if newline >= 0:
            lines = data[: newline + 1]
            return Block(start, lines, start + len(lines), lines)
        end = self.next_line(end)
        return Block(start, data + b"...\n", end, self.before(end))


# ---- The tally of a slice -----------------------------------------------------------------

NO_ID = (
    "an event without producerId and sequence, in a log that was changed since it was read: "
    "whether it was counted cannot be known (rename the file to a name that is no log's, and "
    "send what is new in it with python client.py FILE)"
)
# What is done with an event without an id: only the position that is recorded of its log tells
# whether it was counted (see RecordedPosition).
COUNT = "count"  # it stands after the position: it was not
PASS_OVER = "pass over"  # it stands before the position: it was
REJECT = "reject"  # the log was changed before its position, which tells nothing then


class Slice(NamedTuple):
    """What a child process is told to tally."""

    start: int  # offset in the log
    end: int
    no_id_rule: str  # COUNT, PASS_OVER or REJECT
    kept_bytes: int  # about so much may be kept of it


class Span(NamedTuple):
    """Lines of a slice that follow each other and have consecutive event ids of one producer."""

    producer: str  # "" for events without an id
    first: int  # the sequence of the first line
    end: int  # the sequence after that of the last line
    line: int  # the number of the first line in its slice, from 0


class Rejected(NamedTuple):
    """A line that is no event, or one that may not be counted."""

    offset: int
    reason: str


class Tally(NamedTuple):
    """What a slice holds, up to where it took too long or too much memory."""

    part: Slice
    end: int  # the offset after the last line
    lines: int
    events: int
    no_id_rejected: int  # how many events were rejected because they have no id
    spans: list
    rejected: list
    sums: bytes  # {user: amount} as a JSON text
    digest: bytes  # the SHA-256 of the up to DIGEST_BYTES before end


class BlockEvents(NamedTuple):
    """The lines of a block that are events."""

    numbers: list  # of these lines in the block, from 0
    rows: list  # tuples with the fields of LogLine
    rejected: list  # of the other lines
    no_id_rejected: int


# Each returns a field of LogLine from a tuple with its fields. (To make a LogLine of each line
# would take a tenth of the time.)
user_of = operator.itemgetter(LogLine._fields.index("user"))
producer_of = operator.itemgetter(LogLine._fields.index("producer"))


def tally_slice(log, part, marks=None):
    """Return the Tally of a Slice of log; raise OSError.

    With marks, a byte for each line of the slice (see mark_lines), its sums hold only the events
    whose line is marked with 1; all else is of the whole slice.
    """
    deadline = time.monotonic() + READ_SECONDS
    sums = {}
    spans = []
    rejected = []
    end = part.start
    before_end = log.before(part.start)
    lines = events = no_id_rejected = user_bytes = 0
    for block in log.blocks(part.start, part.end):
        found = read_events(block, part.no_id_rule)
        add_spans(spans, found, lines)
        rows = found.rows
        if marks is not None:
            rows = marked_rows(found, marks, lines)
        known_users = len(sums)
        add_amounts(sums, rows)
        # A dict keeps its order: the new users are its last ones.
        new_users = itertools.islice(reversed(sums), len(sums) - known_users)
        user_bytes += sum(map(len, new_users))
        rejected += found.rejected
        no_id_rejected += found.no_id_rejected
        events += len(found.numbers)
        lines += block.lines.count(b"\n")
        end = block.end
        before_end = (before_end + block.raw)[-DIGEST_BYTES:]
        entries = len(spans) + len(rejected)
        kept_bytes = user_bytes + SUM_BYTES * len(sums) + SPAN_BYTES * entries
        # A second tally, with marks, must end where the first one did.
        if marks is None and (kept_bytes > part.kept_bytes or time.monotonic() > deadline):
            break
    text = sums_as_json(sums)
    digest = hashlib.sha256(before_end).digest()
    return Tally(part, end, lines, events, no_id_rejected, spans, rejected, text, digest)


def read_events(block, no_id_rule):
    """Return the BlockEvents of a Block. A blank line is no event and no error."""
    if not is_utf8(block.lines):
        lines = block.lines.split(b"\n")[:-1]
        rows = [LogLine(b"", b"", b"", b"", b"", line) for line in lines]
        return read_each_line(block, rows, no_id_rule)
    rows = LOG_LINE.findall(block.lines)
    # A line outside of the grammar has neither a user nor a producer here.
    if no_id_rule == COUNT:
        all_are_events = all(map(user_of, rows))
    else:
        all_are_events = all(map(producer_of, rows))  # the rule is for those without an id
    if all_are_events:
        return BlockEvents(range(len(rows)), rows, [], 0)
    return read_each_line(block, rows, no_id_rule)


def read_each_line(block, rows, no_id_rule):
    """Return the BlockEvents of a Block, whose lines LOG_LINE has made rows, one by one."""
    numbers = []
    events = []
    rejected = []
    no_id_rejected = 0
    offset = block.start
    lines = block.lines.split(b"\n")  # one more, behind the last LF, which zip leaves out
    for number, (line, row) in enumerate(zip(lines, rows)):
        try:
            event = LogLine._make(row)
            if event.other.strip():
                event = decode_log_line(event.other)
            is_blank = not event.user
            has_id = bool(event.producer)
            if has_id or (no_id_rule == COUNT and not is_blank):
                numbers.append(number)
                events.append(event)
            elif no_id_rule == REJECT and not is_blank:
                no_id_rejected += 1
                rejected.append(Rejected(offset, NO_ID))
            # Others are left out: blank lines and, with PASS_OVER, events without an id.
        except ValueError as error:  # only its words are kept: it drags its frames along
            rejected.append(Rejected(offset, str(error)))
        offset += len(line) + 1
    return BlockEvents(numbers, events, rejected, no_id_rejected)


def add_spans(spans, found, lines_before):
    """Add the event ids of found, the BlockEvents of a block, to spans. The block has lines_before
    lines of its slice before it. A span ends with its block at the latest.

    An event without an id takes the number of its line for a sequence.
    """
    producer = None  # of the span that is being extended, as are the next three
    first = 0
    end = 0
    first_number = 0  # of its first line in the block
    for number, (_, _, _, line_producer, sequence_text, _) in zip(found.numbers, found.rows):
        if line_producer:
            sequence = int(sequence_text)
        else:
            sequence = lines_before + number
        # The next id on the next line extends the span.
        if line_producer == producer and sequence == end and number - first_number == end - first:
            end += 1
            continue
        if producer is not None:
            spans.append(Span(producer.decode(), first, end, lines_before + first_number))
        producer = line_producer
        first = sequence
        end = sequence + 1
        first_number = number
    if producer is not None:
        spans.append(Span(producer.decode(), first, end, lines_before + first_number))


def marked_rows(found, marks, lines_before):
    """Return the rows of found that are marked. For found and lines_before see add_spans."""
    is_marked = [marks[lines_before + number] for number in found.numbers]
    return list(itertools.compress(found.rows, is_marked))


def add_amounts(sums, rows):
    """Add the amounts of rows to sums, {user as JSON writes it: int or Decimal}, exactly."""
    try:
        amounts = [int(text) for _, _, text, _, _, _ in rows]
    except ValueError:
        amounts = [Decimal(text.decode()) for _, _, text, _, _, _ in rows]
    with decimal.localcontext(EXACT):
        for (user, kind, _, _, _, _), amount in zip(rows, amounts):
            if kind == b"subtract":
                amount = -amount
            sums[user] = sums.get(user, 0) + amount


def sums_as_json(sums):
    """Return sums as a JSON text."""
    members = [b'"%b":%b' % (user, str(amount).encode()) for user, amount in sums.items()]
    return b"{%b}" % b",".join(members)


# ---- Child processes


class TallyProcess:
    """A child process that makes one Tally and sends it back. (Why no pool: its idle workers
    outlive a parent that is killed. This child ends when it sends its Tally.)"""

    def __init__(self, log, part, marks=None):
        """Start it, or raise ChildDied if there is no room for another process."""
        self._path = log.path
        try:
            self._reading_end, writing_end = os.pipe()
        except OSError as error:
            raise ChildDied(f"No pipe to a child process: {error.strerror}.") from error
        try:
            job = (log, part, marks, writing_end)
            import multiprocessing  # see the top of this file

            fork = multiprocessing.get_context("fork")
            self._child = fork.Process(target=send_tally, args=job, daemon=True)
            self._child.start()
        except OSError as error:
            os.close(self._reading_end)
            raise ChildDied(f"No child process can start: {error.strerror}.") from error
        finally:
            os.close(writing_end)  # so that the child's end is the only one, and its death is seen

    def receive(self):
        """Return the Tally, or raise ChildDied, or what the child has raised, such as OSError."""
        import pickle

        sent = bytearray()
        poll = select.poll()
        poll.register(self._reading_end, select.POLLIN)
        while True:
            if not poll.poll(1000 * SILENT_CHILD_SECONDS):
                raise ChildDied(
                    f"A process that reads {self._path} stood still for "
                    f"{SILENT_CHILD_SECONDS} seconds."
                )
            data = os.read(self._reading_end, 1024 * 1024)
            if not data:
                break
            sent += data
        try:
            result = pickle.loads(sent)
        except (EOFError, pickle.UnpicklingError) as error:
            raise ChildDied(
                f"A process that read {self._path} ended too early: out of memory, or killed."
            ) from error
        if isinstance(result, Exception):
            raise result
        return result

    def close(self):
        """End the child."""
        os.close(self._reading_end)
        self._child.kill()
        self._child.join()


def send_tally(log, part, marks, writing_end):
    """Be the child: write the Tally of a Slice, or the exception that it raised, to a pipe."""
    import pickle

    try:
        close_all_but({log.content.fileno(), writing_end})
        result = tally_slice(log, part, marks)
    except Exception as error:
        result = error
    # BrokenPipeError: the parent was killed. MemoryError: it will see that the result ends early.
    with contextlib.suppress(BrokenPipeError, MemoryError):
        with open(writing_end, "wb") as pipe:
            pickle.dump(result, pipe, protocol=pickle.HIGHEST_PROTOCOL)


def close_all_but(kept):
    """Close every descriptor but kept, or raise ChildDied. A stopped child must not keep a dead
    parent's connection to PostgreSQL open, nor a pipe that somebody reads to its end."""
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        names = os.listdir("/dev/fd")
    except OSError as error:
        raise ChildDied(f"No child process can start: {error.strerror}.") from error
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    for name in names:
        fd = int(name)
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):  # it was the descriptor of this listing
                os.close(fd)


def tally_all(log, jobs):
    """Return the Tally of each (Slice, marks) of jobs, made by a process each, at the same time.
    (Also a single one: what a process takes of memory is given back, and the parent survives it.)
    """
    with contextlib.ExitStack() as stack:
        processes = []
        for part, marks in jobs:
            process = TallyProcess(log, part, marks)
            stack.callback(process.close)
            processes.append(process)
        return [process.receive() for process in processes]


# ---- Exactly once -------------------------------------------------------------------------


# Two positions of a log must not be confused. Both are offsets.
#   Reading            how far this attempt has read it; each attempt begins at 0
#   RecordedPosition   how far it was read by whoever came furthest; the database keeps it, and it
#                      only grows


class Reading(NamedTuple):
    """How far an attempt to apply a log has read it."""

    read_up_to: int = 0
    no_id_rejected: int = 0  # how many events without an id it has rejected so far


class RecordedPosition(NamedTuple):
    """How far a log was read, as the database knows it."""

    position: int
    digest: bytes  # the SHA-256 of the up to DIGEST_BYTES before the position


NOTHING_RECORDED = RecordedPosition(0, b"")  # only its position is looked at


class AppliedChunk(NamedTuple):
    """What came of a chunk."""

    reading: Reading  # behind it
    recorded: int  # the position that is recorded now
    applied: int
    repeated: int
    rejected: list


def apply_chunk(sql, log, reading, from_start=False, size=CHUNK_BYTES):
    """Apply the next chunk of log, of about size bytes, in the caller's transaction, which commits
    all of it or nothing; return an AppliedChunk. Raise OSError, Failure or psycopg2.Error.

    The log's recorded position is a shortcut as long as the bytes before it are unchanged:

        the bytes before it            the chunk begins      an event without an id
        unchanged                      at the position       is counted
        unchanged, with from_start     where reading ended   is passed over: it was counted
          (up to the position)
        changed                        where reading ended   is rejected: perhaps it was counted

    A changed log keeps its position until it was read to its end and no event was rejected for
    want of an id: if the old bytes come back before that, the old position is right again. A
    position never moves back, so that a log which was cut below it is read whole at every run.
    """
    position, digest = lock_position(sql, log)
    unchanged = log.digest(position) == digest
    if not unchanged:
        start = reading.read_up_to
        no_id_rule = REJECT
    elif from_start and reading.read_up_to < position:
        start = reading.read_up_to
        size = min(size, position - start)  # after the position another rule holds
        no_id_rule = PASS_OVER
    else:
        start = position
        no_id_rule = COUNT
    tallies = tally_chunk(log, start, size, no_id_rule)
    end = start
    if tallies:  # else another processor has applied the rest meanwhile
        log.sync()
        end = tallies[-1].end
    if end == start and end < log.end:
        raise change_of(log)  # it was truncated
    applied = count_once(sql, log, tallies)
    repeated = sum(tally.events for tally in tallies) - applied
    rejected = list(itertools.chain.from_iterable(tally.rejected for tally in tallies))
    no_id_rejected = reading.no_id_rejected + sum(tally.no_id_rejected for tally in tallies)
    nothing_left_out = end >= log.end and no_id_rejected == 0
    if end > position and (unchanged or nothing_left_out):
        position = end
        record_position(sql, log, RecordedPosition(end, tallies[-1].digest))
    return AppliedChunk(Reading(end, no_id_rejected), position, applied, repeated, rejected)


def lock_position(sql, log):
    """Lock the row of log, which is created first if it is missing, and return its
    RecordedPosition. (A new row has the position 0 and the digest of no bytes, by its defaults: to
    these, every log is unchanged.)"""
    with naming_lock("event_logs"):
        sql.execute(
            "INSERT INTO event_logs (log_id) VALUES (%s) ON CONFLICT DO NOTHING", [log.log_id]
        )
        sql.execute(
            "SELECT position, digest FROM event_logs WHERE log_id = %s FOR UPDATE", [log.log_id]
        )
    if not sql.rowcount:
        raise Disturbed("event_logs")
    position, digest = sql.fetchone()
    return RecordedPosition(position, bytes(digest))


def record_position(sql, log, recorded):
    """Record a RecordedPosition of log. Raise OSError if the bytes before it are not those that
    were read: they may have been changed before all of them were counted."""
    if log.digest(recorded.position) != recorded.digest:
        raise change_of(log)
    sql.execute(
        "UPDATE event_logs SET position = %s, digest = %s WHERE log_id = %s",
        [recorded.position, recorded.digest, log.log_id],
    )


def change_of(log):
    """Return the OSError of a log that somebody edits or cuts while it is read."""
    words = "was changed while it was read; it is read again next time"
    return OSError(errno.ESTALE, words, log.path)


def tally_chunk(log, start, size, no_id_rule):
    """Return the tallies of the next chunk of log, of about size bytes from offset start on, one
    after the other. What follows one that ended early belongs to the chunk after this one."""
    cuts = log.slices(start, size)
    jobs = []
    for low, high in cuts:
        part = Slice(low, high, no_id_rule, KEPT_BYTES // len(cuts))
        jobs.append((part, None))
    tallies = []
    end = start
    for tally in tally_all(log, jobs):
        if tally.part.start == end:  # else one before it ended early
            tallies.append(tally)
            end = tally.end
    return tallies


def count_once(sql, log, tallies):
    """Add to users_revenue every event of tallies whose id is not yet in event_producers, and its
    id there, in the caller's transaction; return how many were added.

    READ COMMITTED. Each producer's row exists before it is locked, and is locked before it is
    read: of two processors that meet the same id, the second waits and then sees what the first
    has committed. Producers, then users, are taken in the order of their bytes, so that two
    processors cannot each wait for the other.
    """
    ids = ids_by_producer(tallies)
    with naming_lock("event_producers"):
        lock_producers(sql, ids)
    new = add_ids(sql, ids)
    marks = mark_lines(tallies, new)
    sums = marked_sums(log, tallies, marks)
    with naming_lock("users_revenue"):
        add_revenue(sql, sums)
    return sum(lines.count(1) for lines in marks)


def ids_by_producer(tallies):
    """Return {producer: its sequences in tallies, as the text of an int8multirange}."""
    ranges = collections.defaultdict(list)
    for tally in tallies:
        for span in tally.spans:
            if span.producer:
                ranges[span.producer].append(f"[{span.first},{span.end})")
    return {producer: "{%s}" % ",".join(texts) for producer, texts in ranges.items()}


def lock_producers(sql, ids):
    """Lock the rows of the producers in ids; those that are missing are created first."""
    sql.execute(
        """
        INSERT INTO event_producers (producer_id)
        SELECT producer_id FROM unnest(%s::text[]) AS producer_id
        ORDER BY producer_id COLLATE "C"
        ON CONFLICT DO NOTHING""",
        [list(ids)],
    )
    # This returns a number, and no rows: a processor that stands still while PostgreSQL sends it
    # much would keep the locks for ever.
    sql.execute(
        """
        SELECT count(*) FROM (
            SELECT FROM event_producers WHERE producer_id = ANY (%s::text[])
            ORDER BY producer_id COLLATE "C" FOR UPDATE
        ) AS locked""",
        [list(ids)],
    )
    (locked,) = sql.fetchone()
    if locked < len(ids):
        raise Disturbed("event_producers")


class NewIds(NamedTuple):
    """Consecutive event ids that were not applied before."""

    producer: str
    first: int
    end: int  # the sequence after the last one


def add_ids(sql, ids):
    """Add ids to what was applied of their producers, and return the NewIds among them."""
    ids_as_json = json.dumps(ids)
    # A cursor in PostgreSQL, so that few rows at a time are sent while the locks are held.
    with sql.connection.cursor("new_ids") as cursor:
        cursor.itersize = 500
        cursor.execute(
            """
            SELECT producer_id, lower(span), upper(span)
            FROM json_each_text(%s) AS chunk (producer_id, ranges)
            JOIN event_producers USING (producer_id),
                unnest(ranges::int8multirange - applied) AS span""",
            [ids_as_json],
        )
        new = [NewIds._make(row) for row in cursor]
    if new:
        # Rows that gain nothing are not written.
        sql.execute(
            """
            UPDATE event_producers AS stored SET applied = applied + ranges::int8multirange
            FROM json_each_text(%s) AS chunk (producer_id, ranges)
            WHERE stored.producer_id = chunk.producer_id
            AND NOT applied @> ranges::int8multirange""",
            [ids_as_json],
        )
    return new


def mark_lines(tallies, new):
    """Return for each tally a byte for each of its lines: 1 for an event whose id is among new,
    and for every event without an id. Of several lines with one id, one is marked.

    The spans, in the order of their ids, take their ids from the new ones:

        new ids  1..19
        span A   ids 1..9 on the lines 0..8      takes 1..9: lines 0..8
        span B   ids 5..19 on the lines 40..54   takes 10..19: lines 45..54
    """
    marks = [bytearray(tally.lines) for tally in tallies]
    spans = []
    for number, tally in enumerate(tallies):
        for span in tally.spans:
            if span.producer:
                spans.append((span, number))
            else:
                mark(marks[number], span.line, span.end - span.first)
    unclaimed = collections.deque(sorted(new))
    for span, number in sorted(spans):
        for ids in claim(unclaimed, span):
            line = span.line + ids.first - span.first
            mark(marks[number], line, ids.end - ids.first)
    return marks


def claim(unclaimed, span):
    """Take those ids that span has from the unclaimed ones, a sorted deque of NewIds, and yield
    them as NewIds.

    Every new id is in some span, and the spans come in the order of their first ids. So the first
    unclaimed id is in this span, or in a later one.
    """
    while unclaimed:
        ids = unclaimed[0]
        if ids.producer != span.producer or ids.first >= span.end:
            return
        unclaimed.popleft()
        if ids.end > span.end:
            unclaimed.appendleft(ids._replace(first=span.end))
            ids = ids._replace(end=span.end)
        yield ids


def mark(lines, first, count):
    """Set the bytes of count lines from the first one on to 1."""
    lines[first : first + count] = b"\1" * count


def marked_sums(log, tallies, marks):
    """Return JSON texts, {user: amount}, which together hold the amounts of the marked lines.

    The sums of a tally hold all of its events. Where only some of them count, which is rare, the
    slice is tallied once more, for these alone. Raise OSError if the log was changed meanwhile:
    ids of one reading and amounts of another are never mixed.
    """
    sums = []
    mixed = []
    jobs = []
    for tally, lines in zip(tallies, marks):
        marked = lines.count(1)
        if marked == tally.events:
            sums.append(tally.sums)
        elif marked:
            mixed.append(tally)
            jobs.append((tally.part._replace(end=tally.end), lines))
    for tally, again in zip(mixed, tally_all(log, jobs)):
        if without_sums(again) != without_sums(tally):
            raise change_of(log)
        sums.append(again.sums)
    return sums


def without_sums(tally):
    """Return what must be the same in two tallies of the same lines. (The part of the second one
    ends where the first tally ended.)"""
    return tally._replace(part=None, sums=None)


def add_revenue(sql, sums):
    """Add the amounts in sums, JSON texts as bytes, to users_revenue."""
    # QuotedString takes the bytes of the children as they are. (PostgreSQL takes a text of 100,000
    # sums in a fifth of the time that as many parameters take.)
    texts = [psycopg2.extensions.QuotedString(text) for text in sums]
    if not texts:
        return
    # A table that was there before this program may hold NULL. (mogrify makes the statement that
    # execute would make, and its copies of the sums are gone when libpq makes one more: for 4 MB of
    # sums, that is 3 MB less.)
    statement = sql.mogrify(
        """
        INSERT INTO users_revenue AS stored (user_id, revenue)
        SELECT user_id COLLATE "C", sum(amount::numeric)
        FROM unnest(%s::json[]) AS sums, json_each_text(sums) AS new (user_id, amount)
        GROUP BY 1 ORDER BY 1
        ON CONFLICT (user_id)
        DO UPDATE SET revenue = coalesce(stored.revenue, 0) + excluded.revenue""",
        [texts],
    )
    sql.execute(statement)


# ---- The database and its tables ----------------------------------------------------------


@contextlib.contextmanager
def naming_lock(table):
    """Return a context for statements that wait for a lock on table or rows of it. It takes no lock
    itself: it turns a time-out of LOCK_SECONDS into Locked, which names table."""
    try:
        yield
    except psycopg2.errors.LockNotAvailable as error:
        raise Locked(
            f"{table} is locked by another transaction. This shows which (one without a pid is "
            "prepared: see pg_prepared_xacts): SELECT DISTINCT pid, usename, state, xact_start, "
            "query FROM pg_locks LEFT JOIN pg_stat_activity USING (pid) WHERE granted AND "
            "(relation IN (to_regclass('users_revenue'), to_regclass('event_producers'), "
            "to_regclass('event_logs')) OR locktype = 'advisory')"
        ) from error


@contextlib.contextmanager
def naming_refusal():
    """Return a context for the statements that apply one log's chunk: it turns what PostgreSQL
    refuses into Refused."""
    try:
        yield
    except psycopg2.Error as error:
        # Without a code, the error is of the connection.
        if not error.pgcode or error.pgcode.startswith(PASSING_CODES):
            raise
        raise Refused(f"PostgreSQL refused it: {sentence(error)}.") from error


class Database:
    """The connection to PostgreSQL, and the only owner of transactions: nothing else commits."""

    def __init__(self):
        self.connection = None  # until the first one was made; then perhaps a closed one

    def is_open(self):
        """Tell whether there is a connection, as far as is known."""
        return self.connection is not None and not self.connection.closed

    def connect(self):
        """Connect, and check that the tables fit. Raise Failure or psycopg2.Error."""
        self.connection = open_connection(STATEMENT_SECONDS)
        with self.transaction() as sql:
            run_create_table(sql)

    def close(self):
        """Close the connection, if there is one."""
        if self.connection is not None:
            self.connection.close()

    @contextlib.contextmanager
    def transaction(self):
        """Return a context with the cursor of one transaction. It is committed or, when anything
        is raised, rolled back; the first error is the one that is raised."""
        try:
            with self.connection.cursor() as sql:
                set_time_limits(sql, IDLE_SECONDS, STATEMENT_SECONDS)
                yield sql
            self.connection.commit()
        except BaseException:
            # (This waits for nothing after Silent: psycopg2 has closed the connection.)
            with contextlib.suppress(psycopg2.Error):
                self.connection.rollback()
            raise

    @contextlib.contextmanager
    def counting(self):
        """Return a context with the cursor of a transaction that may change the tables.

        Nobody can ALTER, DROP or TRUNCATE them meanwhile. They are checked before, for what others
        did to them, and afterwards, so that the stamps in their comments say what they hold.
        """
        with self.transaction() as sql:
            for table in ("users_revenue", "event_producers", "event_logs"):
                with naming_lock(table):
                    sql.execute(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE")
            run_create_table(sql)
            with naming_refusal():
                yield sql
                # A constraint that is deferred to COMMIT refuses now, as any other does.
                sql.execute("SET CONSTRAINTS ALL IMMEDIATE")
            run_create_table(sql)

    def recorded_positions(self, log_ids):
        """Return {log_id: RecordedPosition} of these logs, as far as the database knows them; of
        every log if log_ids is empty, because a run knows no log before its first look."""
        recorded = {}
        with self.transaction() as sql, naming_lock("event_logs"):
            sql.execute(
                "SELECT log_id, position, digest FROM event_logs "
                "WHERE %s OR log_id = ANY (%s::bytea[])",
                [not log_ids, log_ids],
            )
            for log_id, position, digest in sql:
                recorded[bytes(log_id)] = RecordedPosition(position, bytes(digest))
        return recorded


def run_create_table(sql):
    """Create the tables that are missing, and check all of them if anything about them has changed
    since they were last checked. Raise Failure or psycopg2.Error."""
    with open(TABLES, encoding="utf-8") as file:
        statements = file.read()
    try:
        with naming_lock("One of the tables"):
            sql.execute(statements)
    except psycopg2.errors.RaiseException as error:
        raise Failure(sentence(error)) from error  # it may end with a statement to be copied


def set_time_limits(sql, idle_seconds, statement_seconds):
    """Have PostgreSQL end the transaction of a processor that vanished or stands still, and give up
    a lock after LOCK_SECONDS, and a statement after statement_seconds, unless another limit of
    statements is set already."""
    sql.execute(
        "SELECT set_config('idle_in_transaction_session_timeout', %s, true), "
        "set_config('lock_timeout', %s, true), "
        "set_config('statement_timeout', CASE current_setting('statement_timeout') "
        "WHEN '0' THEN %s ELSE current_setting('statement_timeout') END, true)",
        [f"{idle_seconds} s", f"{LOCK_SECONDS} s", f"{statement_seconds} s"],
    )


def open_connection(statement_seconds):
    """Return a connection whose statements are waited for a little longer than statement_seconds.
    Raise Failure or psycopg2.Error."""
    connection = Connecting(connect_timeout=CONNECT_SECONDS).result()
    psycopg2.extensions.set_wait_callback(
        functools.partial(wait_for_statement, 1.1 * statement_seconds)
    )
    connection.set_session(isolation_level="READ COMMITTED")
    return connection


def wait_for_statement(seconds, connection):
    """Wait until PostgreSQL has answered: psycopg2 calls this instead of waiting in libpq, where a
    signal's handler would not run. Raise Silent after some seconds."""
    try:
        wait_for(connection, time.monotonic() + seconds)
    except TimeoutError:
        raise Silent(f"PostgreSQL has not answered for {seconds:.0f} seconds.") from None


# ---- Applying logs ------------------------------------------------------------------------


def rotated_logs(path, list_directory):
    """Return the paths of the files that rotation made of the log at path: its name, a dot or a
    hyphen, a digit, ... list_directory returns the sorted names in a directory, or raises OSError.
    """
    directory, name = os.path.split(path)
    names = list_directory(directory or ".")
    # client.py leaves files with .delivery and .rejected in their names beside a rotated log.
    rotated = re.compile(r"[.-][0-9](?!.*\.(?:delivery|rejected))", re.DOTALL)
    found = []
    for number in range(bisect.bisect_left(names, name), len(names)):
        if not names[number].startswith(name):
            break
        if rotated.match(names[number], len(name)):
            found.append(os.path.join(directory, names[number]))
    return found


def sorted_names(directory):
    """Return the sorted names in a directory, none without one, or raise OSError."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


class Summary:
    """How many events and lines of a log had which fate in one look at it."""

    def __init__(self):
        self.applied = 0
        self.repeated = 0
        self.rejected = 0  # lines that were not named before


class FileRecord:
    """What an Applier knows of a file, for as long as the file is the same log.

    log_id        of that log
    version       of the file when it was done: applied to its end, or refused; None if it is to be
                  applied
    position      that was recorded then
    again_at      when a refused log is tried again, in seconds of time.monotonic
    was_read      whether it was read to its end on this connection: with from_start, it is not
                  read from its start again
    named_up_to   the offset up to which its rejected lines were named
    """

    def __init__(self, log_id):
        self.log_id = log_id
        self.version = None
        self.position = 0
        self.again_at = NEVER
        self.was_read = False
        self.named_up_to = 0


NEVER = float("inf")


class Applier:
    """Applies logs, and remembers what it did.

    database     the Database
    paths        the logs that were named, each once, in their order: a dict without values
    from_start   whether recorded positions are not used for a file that is read for the first time
    files        {identity of a file: FileRecord}; record_of() alone adds to it, and none is removed
    recorded     {log_id: RecordedPosition} at the beginning of this look at the logs
    refused      {what PostgreSQL refused: how many logs it refused for that in this look}
    failed       whether a line was rejected, or a log could not be applied
    failures     how many attempts in a row have failed since events were applied
    troubles     what is wrong at present
    chunk_bytes  the size of a chunk, smaller after failures
    """

    def __init__(self, database, paths, from_start=False):
        self.database = database
        self.paths = dict.fromkeys(paths)
        self.from_start = from_start
        self.files = {}
        self.recorded = {}
        self.refused = collections.Counter()
        self.failed = False
        self.failures = 0
        self.troubles = Troubles()
        self.chunk_bytes = CHUNK_BYTES

    def look(self):
        """Apply the logs that are not done yet. Return whether there were any: then there may be
        more, because logs were rotated meanwhile. Raise Failure or psycopg2.Error when no log can
        be applied."""
        self.prepare()
        found = False
        for path in self.find_logs():
            log = self.open(path)
            if log is None:
                continue
            try:
                if not self.is_done(log) and self.apply(log):
                    found = True
            finally:
                self.close(log)
        return found

    def prepare(self):
        """Connect, if there is no connection, and have every log applied again of which the
        database may know less than before. Raise Failure or psycopg2.Error."""
        if not self.database.is_open():
            # It may be another database now, or one that was restored.
            for record in self.files.values():
                record.version = None
                record.was_read = False
            self.database.connect()
        known_logs = [record.log_id for record in self.files.values()]
        self.recorded = self.database.recorded_positions(known_logs)
        self.refused.clear()
        for record in self.files.values():
            known = self.recorded.get(record.log_id, NOTHING_RECORDED)
            if known.position < record.position:
                record.version = None

    def find_logs(self):
        """Return the paths of the logs, rotated ones before the one that they were renamed from.
        A directory that cannot be listed is named."""
        list_directory = functools.cache(sorted_names)  # once, however many logs are in it
        found = []
        for path in self.paths:
            siblings = []
            try:
                siblings += rotated_logs(path, list_directory)
                if os.path.islink(path):
                    siblings += rotated_logs(os.path.realpath(path), list_directory)
            except OSError as error:
                self.say_trouble(error.filename, error)
            for sibling in siblings:
                if not is_compressed(sibling):
                    found.append(sibling)
                elif sibling not in self.paths:
                    words = "is compressed and was not read; name it to read it."
                    self.troubles.begin(sibling, words)
            if os.path.lexists(path) or not siblings:  # open() names one that is missing
                found.append(path)
        return list(dict.fromkeys(found))

    def open(self, path):
        """Return a LogReader, or None if it cannot be opened: that is named, unless the path was
        found beside a named one and has vanished meanwhile."""
        try:
            return LogReader(path)
        except OSError as error:
            if path in self.paths or os.path.lexists(path):
                self.say_trouble(path, error)
            return None

    def close(self, log):
        """Close a log that open() has returned."""
        log.close()

    def say_trouble(self, path, error):
        """Name the log at path and the OSError that keeps it from being applied, once."""
        self.failed = True
        words = error.strerror
        if error.filename not in (None, path):
            words = f"{error.filename}: {words}"
        elif error.errno == errno.ENOENT and path in self.paths:
            words += "; start server.py in its directory, or name another log"
        self.troubles.begin(path, f"{words}.")

    def is_done(self, log):
        """Tell whether this run has applied the file of an open log, or PostgreSQL has refused it,
        also if it has grown since then: else a run would not end as long as the server writes. (A
        smaller or an older one is another file, with a removed one's identity.)"""
        record = self.files.get(identity_of(log))
        if record is None or record.version is None:
            return False
        return record.version <= version_of(log)

    def record_of(self, log):
        """Return the FileRecord of an open log whose end is known. It is a new one if the file has
        another first line than before: a new file may get the identity of one that was removed."""
        identity = identity_of(log)
        record = self.files.get(identity)
        if record is None or record.log_id != log.log_id:
            record = FileRecord(log.log_id)
            self.files[identity] = record
        return record

    def apply(self, log):
        """Apply an open log from where the database knows it, and say what came of it.

        Return whether the log is done now: it was applied to its end, or PostgreSQL refused it. If
        it cannot be read, that is named. Raise Failure or psycopg2.Error when no log can be
        applied.
        """
        lock_seconds = LOCK_SECONDS
        if log.path in self.troubles:
            lock_seconds = POLL_SECONDS  # it may be the lock, which was waited for already
        try:
            version = version_of(log)  # of now: what is written later is not applied by this
            if not log.find_end(lock_seconds):
                raise OSError(errno.EAGAIN, "was renamed; another program locks it", log.path)
            self.apply_or_refuse(log)
        except OSError as error:
            self.say_unread(log, error)
            return False
        self.record_of(log).version = version
        return True

    def say_unread(self, log, error):
        """Name an open log and the OSError that keeps it from being applied, once."""
        self.say_trouble(log.path, error)

    def apply_or_refuse(self, log):
        """Apply an open log whose end is known; if PostgreSQL refuses it, name that and have it
        tried again later. Raise OSError."""
        record = self.record_of(log)
        try:
            self.apply_what_is_new(log)
        except Refused as error:
            self.refuse(log, str(error))
        except GIVEN_UP as error:
            if self.failures + 1 < ATTEMPTS:
                raise  # the next attempt is with a smaller chunk
            self.refuse(log, f"PostgreSQL gave it up: {sentence(error)}.")
        else:
            record.was_read = True
            record.again_at = NEVER
            self.troubles.end(log.path, "is read again.")

    def refuse(self, log, words):
        """Name a log that PostgreSQL refuses, and have it tried again later."""
        self.failed = True
        self.record_of(log).again_at = time.monotonic() + MAX_BACKOFF_SECONDS
        self.refused[words] += 1
        alike = self.refused[words]
        if alike == NAMED_REFUSALS:
            words += " (Further logs that are refused for this reason are not named now.)"
        if alike <= NAMED_REFUSALS:
            self.troubles.begin(log.path, words)

    def apply_what_is_new(self, log):
        """Apply an open log whose end is known, and say what came of it."""
        record = self.record_of(log)
        summary = Summary()
        from_start = self.from_start and not record.was_read
        if not from_start and self.is_all_recorded(log):
            record.position = log.end
        else:
            self.apply_chunks(log, from_start, summary)
        show_progress("")
        self.say_summary(log, summary)

    def is_all_recorded(self, log):
        """Tell whether the position that is recorded of a log is its end: nothing in it is new."""
        at_end = RecordedPosition(log.end, log.digest(log.end))
        return self.recorded.get(log.log_id) == at_end

    def apply_chunks(self, log, from_start, summary):
        """Apply an open log chunk by chunk, and add to summary what comes of it."""
        reading = Reading()
        while reading.read_up_to < log.end:
            chunk = None
            try:
                with self.database.counting() as sql:
                    chunk = apply_chunk(sql, log, reading, from_start, self.chunk_bytes)
            finally:
                # When COMMIT fails, it may have been done: then the next attempt begins behind
                # these lines.
                if chunk is not None:
                    self.say_rejected(log, chunk.rejected, summary)
            reading = chunk.reading
            self.record_of(log).position = chunk.recorded
            if chunk.applied:
                self.failures = 0
            summary.applied += chunk.applied
            summary.repeated += chunk.repeated
            events = summary.applied + summary.repeated + summary.rejected
            show_progress(f"{log.path}: {reading.read_up_to / log.end:.0%}, {events:,} events")

    def say_rejected(self, log, rejected, summary):
        """Name rejected lines of a log that were not named before, and count them in summary."""
        record = self.record_of(log)
        if record.named_up_to > log.end:
            record.named_up_to = 0  # it was cut, and may have other lines there now
        for line in rejected:
            self.failed = True
            if line.offset < record.named_up_to:
                continue
            record.named_up_to = line.offset + 1
            summary.rejected += 1
            if summary.rejected <= NAMED_LINES:
                warn(f"{log.path}: byte {line.offset}: {line.reason}")

    def say_summary(self, log, summary):
        """Say what came of a log."""
        if summary.rejected > NAMED_LINES:
            warn(f"{log.path}: {summary.rejected - NAMED_LINES:,} more lines were rejected.")
        words = (
            f"{log.path}: {summary.applied:,} applied, {summary.repeated:,} repeated, "
            f"{summary.rejected:,} rejected"
        )
        if log.unfinished:
            words += f"; {log.unfinished:,} bytes of an unfinished last line left"
        say(words)

    def is_lasting(self, error):
        """Tell whether a failure, which was counted, makes another attempt useless: it is of a kind
        that does not pass, it is the last of ATTEMPTS without progress, or the database was never
        reached: that is rather a wrong name than a restart."""
        passes = isinstance(error, PASSING) and self.database.connection is not None
        return not passes or self.failures >= ATTEMPTS

    def recover(self, error):
        """Pause, and close the connection: prepare() then takes no file for done. Whether the last
        COMMIT was done is not known (if it was, its events are recognised), nor whether the next
        connection leads to the same database."""
        if isinstance(error, TOO_MUCH):
            self.chunk_bytes = max(self.chunk_bytes // SHRINK, SMALLEST_CHUNK_BYTES)
        self.database.close()
        time.sleep(backoff_seconds(self.failures))


def identity_of(log):
    """Return what tells the file of an open log from all others, whatever its name is."""
    status = os.fstat(log.file.fileno())
    return status.st_dev, status.st_ino


def version_of(log):
    """Return what differs when the file of an open log has changed, and rises when it grows."""
    status = os.fstat(log.file.fileno())
    return status.st_size, status.st_mtime_ns


def backoff_seconds(failures):
    """Return how long to pause after so many failures in a row."""
    return min(0.1 * 2 ** min(failures, 10), MAX_BACKOFF_SECONDS)


# ---- The modes ----------------------------------------------------------------------------


def run(paths, from_start=False):
    """Apply what is new in every log; return whether nothing was rejected and every log was read.

    After a deadlock, a lost connection, a lock or a child's death it tries again a few times.
    Raise Failure, MemoryError or psycopg2.Error when the database does not let it.
    """
    applier = Applier(Database(), paths, from_start)
    with contextlib.closing(applier.database):
        while True:
            try:
                while applier.look():
                    pass
                return not applier.failed
            except PASSING as error:
                applier.failures += 1
                if applier.is_lasting(error):
                    raise
                if isinstance(error, WAITED):
                    applier.troubles.begin("Waiting", str(error))
                applier.recover(error)


def most_held():
    """Return how many logs may be held open: children and the database need descriptors, too."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most // 2


class Renamed(NamedTuple):
    """A log that was renamed while it was held open."""

    log: LogReader
    since: float  # in seconds of time.monotonic


class Follower(Applier):
    """Applies what is new in the logs again and again.

    held     {path: LogReader} of the named logs, which are written to, as far as descriptors allow
             it: what comes in after the last look is still read when they are renamed
    renamed  those that were, until they are read to their end
    """

    def __init__(self, paths, from_start=False):
        super().__init__(Database(), paths, from_start)
        self.held = {}
        self.renamed = []

    def follow(self):
        """Apply what is new every second, through database outages, and never return. Raise
        SyncFailed."""
        while True:
            try:
                self.look()
            except (Failure, OSError, MemoryError, psycopg2.Error) as error:
                self.failures += 1
                if self.is_lasting(error) or isinstance(error, WAITED):
                    words = f"trying again until it is mended. {explain(error)}"
                    self.troubles.begin("Events are not applied", words)
                self.recover(error)
            else:
                self.failures = 0
                self.chunk_bytes = CHUNK_BYTES
                self.troubles.end("Events are not applied", "they are applied again.")
                time.sleep(POLL_SECONDS)

    def prepare(self):
        """Connect as an Applier does, and read logs that were renamed to their end."""
        super().prepare()
        self.notice_renamed()
        self.apply_renamed()

    def notice_renamed(self):
        """Take logs that were renamed or removed from held to renamed."""
        for path, log in list(self.held.items()):
            try:
                renamed = not leads_to(path, log.file.fileno())
            except OSError as error:
                self.say_trouble(path, error)
                continue
            if renamed:
                del self.held[path]
                self.renamed.append(Renamed(log, time.monotonic()))

    def apply_renamed(self):
        """Read renamed logs to their end. Once find_end has had the lock, no server writes to one
        any more: a writer that has the lock looks at the name before it writes. One that cannot be
        read to its end is given up after LOCK_SECONDS: it may be found under its new name."""
        for renamed in list(self.renamed):
            if not self.apply(renamed.log):
                if time.monotonic() < renamed.since + LOCK_SECONDS:
                    continue
                words = "was renamed, and could not be read to its end under its old name."
                self.troubles.begin(renamed.log.path, words)
            self.renamed.remove(renamed)  # each by itself: applying the next one may raise
            renamed.log.close()

    def open(self, path):
        """Return the LogReader that is held for path. If there is none, open the log, and hold it
        if it was named and if descriptors allow it."""
        log = self.held.get(path)
        if log is None:
            log = super().open(path)
            if log is not None and path in self.paths and len(self.held) < most_held():
                self.held[path] = log
        return log

    def close(self, log):
        """Close a log unless it is held."""
        if log.path not in self.held:
            log.close()

    def is_done(self, log):
        """Tell whether an open log is as it was when it was done: here, what has grown is new. One
        that PostgreSQL refuses is also new when it is time to try it again."""
        record = self.files.get(identity_of(log))
        if record is None or record.version != version_of(log):
            return False
        return time.monotonic() < record.again_at

    def say_unread(self, log, error):
        """Name an open log that cannot be read, unless it was renamed: its path may lead to another
        log by now. apply_renamed() tries it again, and names it in the end."""
        with contextlib.suppress(OSError):
            if not leads_to(log.path, log.file.fileno()):
                return
        super().say_unread(log, error)

    def say_summary(self, log, summary):
        """Say what came of a log, if anything did."""
        if summary.applied or summary.repeated or summary.rejected:
            super().say_summary(log, summary)


class TemporaryTables(Database):
    """A Database whose tables are temporary ones, which hide the real ones, in one transaction that
    is never committed.

    _table      the real users_revenue with its schema, because it is hidden
    """

    def __init__(self):
        super().__init__()
        self._table = None

    def connect(self):
        """Connect and make the temporary tables. Raise Failure or psycopg2.Error."""
        self.connection = open_connection(VERIFY_SECONDS)
        with self.transaction() as sql:
            # What is stored is seen as of now: what is logged and counted meanwhile would be taken
            # for a difference by whoever has read the log already.
            sql.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            set_time_limits(sql, VERIFY_SECONDS, VERIFY_SECONDS)
            # PostgreSQL then refuses to read a table of which a policy hides rows.
            sql.execute("SET LOCAL row_security = off")
            sql.execute(
                """
                SELECT format('%I.%I', nspname, relname), current_setting('search_path')
                FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
                WHERE pg_class.oid = to_regclass('users_revenue')
                AND to_regclass('event_producers') IS NOT NULL
                AND to_regclass('event_logs') IS NOT NULL"""
            )
            found = sql.fetchone()
            if found is None:
                raise Failure(
                    "The tables do not exist yet; run data_processor.py without --verify first."
                )
            self._table, search_path = found
            # create_table.sql knows by exactly this value that it is to create temporary tables,
            # and to check and stamp nothing.
            sql.execute("SELECT set_config('search_path', 'pg_temp', true)")
            run_create_table(sql)
            sql.execute("SELECT set_config('search_path', 'pg_temp, ' || %s, true)", [search_path])

    def close(self):
        """Forget it all: roll the transaction back, because a pooler may keep the connection."""
        if self.is_open():
            with contextlib.suppress(psycopg2.Error):
                self.connection.rollback()
        super().close()

    @contextlib.contextmanager
    def transaction(self):
        """Return a context with a cursor of the one transaction, which psycopg2 begins with the
        first statement, and which goes on behind the context."""
        with self.connection.cursor() as sql:
            yield sql

    def counting(self):
        """Return a context with a cursor of the one transaction, whose tables nobody else sees.

        When something is raised in it, nothing is rolled back: what a log that failed has left is
        wrong. Then verify() compares nothing, because Applier.failed stays True.
        """
        return self.transaction()

    def count_users(self):
        """Return how many users the logs know."""
        with self.transaction() as sql:
            sql.execute("SELECT count(*) FROM users_revenue")
            (users,) = sql.fetchone()
            return users

    def differences(self):
        """Yield a line for each user whose revenue in the logs is not what is stored."""
        with naming_lock("users_revenue"), self.connection.cursor("differences") as sql:
            sql.execute(
                f"""
                SELECT user_id, stored, logged, stored - logged AS difference
                FROM (
                    SELECT coalesce(old.user_id, new.user_id) COLLATE "C" AS user_id,
                        coalesce(old.revenue, 0) AS stored, coalesce(new.revenue, 0) AS logged
                    FROM {self._table} AS old
                    FULL JOIN users_revenue AS new ON old.user_id = new.user_id COLLATE "C"
                ) AS users
                WHERE stored <> logged ORDER BY user_id"""
            )
            for user, stored, logged, difference in sql:
                yield (
                    f"{user}: {stored:f} in users_revenue, {logged:f} in the logs, "
                    f"difference {difference:f}"
                )


class Audit(Applier):
    """Applies logs and says nothing of what came of them: it was not applied for good."""

    def say_rejected(self, log, rejected, summary):
        """Say nothing: lines that are no events do not count here either."""

    def say_summary(self, log, summary):
        """Say nothing."""


def verify(paths):
    """Print the users whose revenue differs from what the logs give; return whether there are
    none. Raise Failure, OSError or psycopg2.Error."""
    tables = TemporaryTables()
    audit = Audit(tables, paths)
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(temporary_file())
        differing = 0
        with contextlib.closing(tables):
            while audit.look():
                pass
            if audit.failed:
                say("Not every log could be read, so nothing was compared.")
                return False
            users = tables.count_users()
            for line in tables.differences():
                differing += 1
                text = printable(line) + "\n"
                write_temporary(lines, text.encode())
        # Only now, when no transaction is open, is anything printed.
        print_file(lines)
    if differing:
        say(
            f"{differing:,} users differ. Revenue from before these logs is a difference, and so "
            "are events that are not applied yet: run data_processor.py first, and name every log."
            " What was mended in a log that was read before is applied by --from-start."
        )
    else:
        say(f"users_revenue and the logs agree on {users:,} users.")
    return not differing


def print_file(file):
    """Print an open file to stdout, as far as it takes something every READER_SECONDS."""
    file.seek(0)
    with open(file.fileno(), encoding="utf-8", closefd=False) as text:
        for line in text:
            if not write(sys.stdout, line, READER_SECONDS):
                return


def explain(error):
    """Return the sentence that says why a run ended with an error, and what to do."""
    if isinstance(error, MemoryError):
        return "There is not enough memory."
    if isinstance(error, (Failure, SyncFailed)):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, psycopg2.OperationalError) and not error.pgcode:
        return (
            f"No database: {sentence(error)}. Start PostgreSQL, or correct DATABASE_URL or "
            "PGHOST, PGPORT, PGUSER, PGPASSWORD and PGDATABASE."
        )
    return f"Stopped at a database error: {sentence(error)}."


# ---- The command line ---------------------------------------------------------------------


def exit_on(number, status):
    """End the process at once, with the given status, when this signal comes. PostgreSQL then
    rolls back the open transaction."""
    signal.signal(number, lambda *_: os._exit(status))


def open_standard_descriptors():
    """Open the descriptors 0, 1 and 2 that are closed, so that no log gets their numbers: messages
    would be written into the log, and children replace the three."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)


def parse_command_line(arguments):
    """Return the options, or exit with status 2."""
    parser = Parser(HELP)
    parser.add_argument(
        "logs",
        metavar="LOG",
        nargs="*",
        default=[DEFAULT_LOG],
        help=f"(default: {DEFAULT_LOG})",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--follow",
        action="store_true",
        help="look for new events every second until interrupted",
    )
    mode.add_argument(
        "--verify",
        action="store_true",
        help="change nothing; compare the database with the logs",
    )
    parser.add_argument(
        "--from-start",
        action="store_true",
        help="read every log from its first byte, as --verify always does; what was counted does "
        "not count again",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run the command line and return its exit status."""
    options = parse_command_line(arguments)
    open_standard_descriptors()
    exit_on(signal.SIGINT, 130)
    exit_on(signal.SIGTERM, 143)
    try:
        good = False
        if options.verify:
            good = verify(options.logs)
        elif options.follow:
            exit_on(signal.SIGTERM, 0)
            Follower(options.logs, options.from_start).follow()
        else:
            good = run(options.logs, options.from_start)
    except (Failure, SyncFailed, OSError, MemoryError, psycopg2.Error) as error:
        warn(explain(error))
        return 1
    if good:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
