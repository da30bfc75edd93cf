"""Apply what is new in the server's logs to each user's revenue in PostgreSQL, then exit.

Every event counts exactly once, whatever is killed, run again, run twice at once, copied, cut or rotated in between. A
LOG means the file and its rotated siblings: LOG.1, LOG-20261124 and the like.

Example: python data_processor.py server-events.jsonl

The database is the one that DATABASE_URL or libpq's variables (PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE) name;
without any of them localhost:5432, database postgres, user postgres, password password1!.
"""
# One transaction adds revenue and the ids of the events that it came from: apply_chunk and count_once are that
# transaction, and the place to start reading.
#
# A log is read in chunks, a transaction each; a chunk in slices, a child process each, which makes a Tally; a slice in
# blocks. A span is a stretch of lines whose event ids ascend with them. A stamp is an event id at the end of a line.
#
# The parts in order: what is printed; an event (its grammar, its rules, its stamp); files; a log and its reader; the
# tally of a slice; exactly once; the database; the run. server.py imports what both scripts must agree on.
import argparse
import collections
import contextlib
import decimal
import errno
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from decimal import Decimal
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit("This program needs Python 3.11 or newer.")
try:
    import fcntl
    import psycopg2
    import psycopg2.errors
    import psycopg2.extensions
except ImportError as error:
    sys.exit(f"{error}. This needs Linux or macOS (on Windows, WSL) and python -m pip install -r requirements.txt.")

DEFAULT_LOG = "server-events.jsonl"
TABLES = Path(__file__).resolve().with_name("create_table.sql")
DECOMPRESSORS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "compression.zstd"}  # the last is of Python 3.14
COMPRESSED = (*DECOMPRESSORS, ".lz4", ".Z")

MAX_EVENT_BYTES = 64 * 1024
MAX_DEPTH = 100  # far below where json itself gives up, which differs by version and stack: all must agree
MAX_SEQUENCE = 2**53 - 1
VALUE_DIGITS = 18  # before the decimal point, and as many behind it; the grammar below says so, too

BLOCK_BYTES = 256 * 1024  # read and decoded at a time; more than the longest event with its stamp
CHUNK_BYTES = 128 * 1024 * 1024  # one transaction: large, because each one updates every user in it once
SLICE_BYTES = 2 * 1024 * 1024  # a chunk is not cut into smaller slices than that
IDLE_SECONDS = 60  # PostgreSQL ends a transaction idle for so long: a vanished or stopped processor releases its locks
CHUNK_SECONDS = 15  # of reading a slice; the transaction is idle then, during a second reading and during the sync
KEPT_BYTES = 24 * 1024 * 1024  # that children send the parent for a chunk, as it is estimated; it needs some times more
SPAN_BYTES, SUM_BYTES = 100, 16  # a span or a rejected line in that, and a user's sum besides the user id
DIGEST_BYTES = 64 * 1024  # the hash of so many bytes before a position tells whether the log is unchanged

ATTEMPTS = 6  # without any progress, 0.2 to 3.2 s apart: a PostgreSQL that restarts is back by then
POLL_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 30.0  # between two looks at the logs with --follow; after errors, at most

# An amount has at most 18 + 18 digits; 100 hold the sum of 10**64 of them. If one still does not fit, Inexact raises.
EXACT = decimal.Context(prec=100, traps=[decimal.InvalidOperation, decimal.Overflow, decimal.Inexact])


class Failure(Exception):
    """Something in the user's world that ends the run: one sentence that says what is wrong and what to do."""


class ChildDied(Failure):
    """A child process ended before it gave its result: out of memory, or killed."""


# ---- What is printed ------------------------------------------------------------------------------------------------

def write(stream, words, end="\n"):
    """Write words to sys.stdout or sys.stderr at once, with a backslash escape for what a terminal could obey or not
    show. Words without an end show progress: on a terminal the next ones take their place, elsewhere they are left out.

    The stream may be closed, full or broken, or its encoding may lack a character: nothing is raised, and nothing stays
    in a buffer that could fail at exit or be printed by a child.
    """
    words = "".join([character if character.isprintable() else ascii(character)[1:-1] for character in words])
    with contextlib.suppress(OSError, ValueError, AttributeError):
        terminal = stream.isatty()
        if terminal or end:
            os.write(stream.fileno(), ("\r\033[K" * terminal + words + end).encode(stream.encoding, "backslashreplace"))


def say(words):
    """Print a line to stdout."""
    write(sys.stdout, words)


def warn(words):
    """Print a line to stderr."""
    write(sys.stderr, words)


class Troubles:
    """What is wrong at present: each subject is named on stderr once when its trouble begins and once when it ends."""

    def __init__(self):
        self._subjects = {}

    def begin(self, subject, words):
        """Say what is wrong with subject, unless that is known."""
        begun = object()
        if self._subjects.setdefault(subject, begun) is begun:  # atomic: of several threads of server.py, one says it
            warn(f"{subject}: {words}")

    def end(self, subject, words):
        """Say that nothing is wrong with subject any more, if something was."""
        if self._subjects.pop(subject, None):
            warn(f"{subject}: {words}")


# ---- An event -------------------------------------------------------------------------------------------------------

# The grammar: an event as everyone prints it, with these fields in this order, without escapes, and with one space or
# none behind ":" and ",". A line outside of it is not wrong yet: decode_event and amount_of decide, and say why.
# (Possessive quantifiers like *+ give nothing back, so that hostile input takes linear time.)
EVENT = (rb'\{"userId": ?"([^"\\\x00-\x1f]{1,255}+)", ?"name": ?"(add|subtract)_revenue", ?'
         rb'"value": ?(-?(?:0|[1-9][0-9]{0,17}+)(?:\.[0-9]{1,18}+)?)')
STAMP = rb', "producerId": "([A-Za-z0-9_-]{1,64}+)", "sequence": ([1-9][0-9]{0,14}+)'
PLAIN_EVENTS = re.compile(rb"(?:%b\}\n)+" % EVENT)
LOG_LINE = re.compile(rb"(?:%b(?:%b)?\}|([^\n]*+))\n" % (EVENT, STAMP))  # a row; its last group holds any other line

STAMP_AT_END = re.compile(rb'(?:, "log": "[0-9a-f]+")?, "producerId": "[^"]+", "sequence": [0-9]+\}$')
JSON_STRING = re.compile(r'(?s)"(?:[^"\\]|\\.)*+"?')  # also an unterminated one, so that it is found in linear time
SURROGATE = re.compile("[\ud800-\udfff]")
PRODUCER_ID = re.compile("[A-Za-z0-9_-]{1,64}")
NO_ID = ("an event without producerId and sequence, in a log that was changed since it was read: whether it was "
         "counted cannot be known (move the file aside, and send what is new in it with python client.py FILE)")


def is_utf8(data):
    """Tell whether data is strict UTF-8."""
    return data.isascii() or data.decode(errors="ignore").encode() == data


def is_plain(lines):
    """Tell whether every line of lines, which end with LF, is an event as everyone prints it, without a stamp."""
    match = PLAIN_EVENTS.match(lines)
    return match is not None and match.end() == len(lines) and is_utf8(lines)


def stamp(lines, producer, first):
    """Return lines, each an object and LF, with the event ids (producer, first), (producer, first + 1), … put into
    them."""
    stamped = b', "producerId": "%b", "sequence": %%d}\n' % producer.encode()
    template = lines.replace(b"%", b"%%").replace(b"}\n", stamped)
    return template % tuple(range(first, first + lines.count(b"\n")))


def add_log_field(lines):
    """Return lines with a random field "log" in the first one's stamp, so that no two logs begin alike."""
    at = lines.rindex(b', "producerId": ', 0, lines.index(b"\n"))
    return b'%b, "log": "%b"%b' % (lines[:at], secrets.token_hex(16).encode(), lines[at:])


def as_line(event):
    """Return the text of an event without LF: line ends around its tokens become spaces, those behind it go."""
    return event.rstrip().replace(b"\r", b" ").replace(b"\n", b" ")


def check(condition, rule):
    """Raise ValueError, which names the rule, unless condition holds."""
    if not condition:
        raise ValueError(rule)


def check_event(line):
    """Raise ValueError, in words for its sender, unless line is an event that may be sent to the server."""
    event = decode_event(line)
    amount_of(event)
    check_reserved(event)


def decode_log_line(line):
    """Return a log's line as a row, the six groups of LOG_LINE: user id as JSON writes it, b"add", amount, producer,
    sequence, b""; the last two ids are b"" for an event without an id. Raise ValueError if the line is no event."""
    event = decode_event(line)
    amount = str(amount_of(event)).encode()
    user = json.dumps(event["userId"], ensure_ascii=False)[1:-1].encode()  # a plain user id is written as it is
    producer, sequence = event.get("producerId"), event.get("sequence")
    if sequence is None:
        check_reserved(event)
        return user, b"add", amount, b"", b"", b""
    check_id(producer, sequence)
    return user, b"add", amount, producer.encode(), b"%d" % sequence, b""


_decode_json = json.JSONDecoder(parse_float=Decimal, parse_constant=int).decode  # int() refuses NaN and Infinity


def decode_event(line):
    """Return the JSON object in line (bytes, with or without a stamp) as a dict with numbers as int or Decimal, or
    raise ValueError with the rule that it breaks."""
    check(len(line) <= MAX_EVENT_BYTES or len(STAMP_AT_END.sub(b"}", line)) <= MAX_EVENT_BYTES,
          "an event must be at most 64 KiB long")
    check(not line.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) and b"\0" not in line[:2],
          "an event must be UTF-8 without a byte order mark (BOM), and not UTF-16")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"an event must be UTF-8, which ends at byte {error.start}") from None
    check(text.count("[") + text.count("{") <= MAX_DEPTH or _depth(text) <= MAX_DEPTH,
          f"an event must be nested at most {MAX_DEPTH} levels deep")
    try:
        event = _decode_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, ArithmeticError):
        raise ValueError("a number is out of range, NaN or Infinity") from None
    check(type(event) is dict, "an event must be a JSON object")
    return event


def _depth(text):
    brackets = re.findall("[][{}]", JSON_STRING.sub("", text))
    return max(itertools.accumulate([1 if bracket in "[{" else -1 for bracket in brackets]), default=0)


def amount_of(event):
    """Return what the decoded event adds to its user's revenue, an exact int or Decimal, or raise ValueError with the
    rule that it breaks."""
    user, name, value = event.get("userId"), event.get("name"), event.get("value")
    check(type(user) is str and 1 <= len(user) <= 255 and "\0" not in user and not SURROGATE.search(user),
          "userId must be a string of 1 to 255 characters, without NUL or a lone surrogate")
    check(type(value) in (int, Decimal), "value must be a number")
    value = Decimal(value)
    check(value.adjusted() < VALUE_DIGITS, "value must be a number below 10^18")
    check(value.as_tuple().exponent >= -VALUE_DIGITS, "value must have at most 18 decimal places")
    check(name in ("add_revenue", "subtract_revenue"), "name must be add_revenue or subtract_revenue")
    # copy_negate, because unary minus would round to 28 digits here, outside of EXACT
    return value if name == "add_revenue" else value.copy_negate()


def check_id(producer, sequence):
    """Raise ValueError unless producer and sequence make an event id."""
    check(type(producer) is str and PRODUCER_ID.fullmatch(producer),
          "producerId must be 1 to 64 of A-Z, a-z, 0-9, _ and -")
    check(type(sequence) is int and 1 <= sequence <= MAX_SEQUENCE, "sequence must be an integer from 1 to 2^53 - 1")


def check_reserved(event):
    """Raise ValueError if the decoded event has a field that the server adds."""
    for field in ("producerId", "sequence", "log"):
        check(field not in event, f"{field} belongs to the server; headers give event ids: Producer-Id and Sequence")


# ---- Files ----------------------------------------------------------------------------------------------------------

def open_regular(path, flags, mode=0o640):
    """Return a descriptor of the regular file at path, or raise OSError, also if it is anything else."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)  # O_NONBLOCK: a named pipe would wait for a writer
    if os.path.isfile(fd):
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
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False


def end_of_events(fd, size):
    """Return the offset where the events in the first size bytes of a log end: behind the last LF or, if what follows
    is a whole event that lacks only its LF, size."""
    end, newline = size, -1
    while end and newline < 0:
        start = max(0, end - BLOCK_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        end = start + newline + 1
    try:
        decode_log_line(os.pread(fd, min(size - end, BLOCK_BYTES), end))
    except ValueError:
        return end
    return size


def rotated_logs(path):
    """Return the paths of the files that rotation made of the log at path: its name, a dot or a hyphen, a digit, …
    Raise OSError if its directory cannot be read."""
    directory, name = os.path.split(path)
    # client.py leaves files with .delivery and .rejected in their names beside a rotated log that it sends.
    rotated = re.compile(re.escape(name) + r"[.-][0-9](?!.*\.(?:delivery|rejected))", re.DOTALL)
    entries = os.listdir(directory or ".") if os.path.isdir(directory or ".") else []
    return sorted([os.path.join(directory, entry) for entry in entries if rotated.match(entry)])


def decompress(file, suffix):
    """Return a temporary file with what the compressed file holds, or raise OSError."""
    unpacked = tempfile.TemporaryFile()
    file.seek(0)
    try:
        with importlib.import_module(DECOMPRESSORS[suffix]).open(file) as content:
            shutil.copyfileobj(content, unpacked)
        unpacked.flush()
    except Exception as error:  # each of the modules raises others
        unpacked.close()
        if getattr(error, "errno", None):
            raise
        raise OSError(errno.EINVAL, f"cannot be decompressed: {str(error) or type(error).__name__}") from error
    return unpacked


# ---- A log ----------------------------------------------------------------------------------------------------------

def usable_cores():
    """Return on how many cores this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class LogReader:
    """A log that is open for reading: file is the one on the disk, content what is read, which is another one if the
    log is compressed. find_end() finds where its events end, how many bytes are behind that, and its log_id."""

    def __init__(self, path):
        """Open the log at path, or raise OSError."""
        self.path = path
        self.file = self.content = open(open_regular(path, os.O_RDONLY), "rb", buffering=0)
        self.log_id = None
        self.end = self.unfinished = self._synced = 0

    def close(self):
        """Close the log."""
        self.content.close()
        self.file.close()

    def state(self):
        """Return the file's identity (device, inode), and its version (size, time of the last change)."""
        status = os.fstat(self.file.fileno())
        return (status.st_dev, status.st_ino), (status.st_size, status.st_mtime_ns)

    def find_end(self):
        """Set end, unfinished and log_id, or raise OSError. A log whose name says that it is compressed is decompressed
        first. Under the lock no server is in the midst of a write, which it could still take back."""
        if self.path.endswith(COMPRESSED):
            self.content = decompress(self.file, os.path.splitext(self.path)[1])
        fd = self.content.fileno()
        fcntl.flock(fd, fcntl.LOCK_SH)
        try:
            size = os.fstat(fd).st_size
            self.end = end_of_events(fd, size)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
        self.unfinished = size - self.end
        if self.end:
            self.log_id = hashlib.sha256(self.read(0, min(BLOCK_BYTES, self.end)).partition(b"\n")[0] + b"\n").digest()

    def sync(self):
        """Make what was read durable before it is counted: a power cut could put other lines in its place. If that
        fails, raise SystemExit, because a Failure would be retried, and a second sync could lie."""
        if self._synced != self.end:
            try:
                sync_file(self.file.fileno())
            except OSError as error:
                raise SystemExit(f"{self.path}: a sync failed ({error.strerror}), so it is not counted.") from error
            self._synced = self.end

    def read(self, offset, length):
        """Return length bytes at offset, fewer only at the end of the file."""
        return os.pread(self.content.fileno(), length, offset)

    def digest(self, position):
        """Return the SHA-256 of the up to DIGEST_BYTES before position, or None if the log is shorter than that."""
        start = max(0, position - DIGEST_BYTES)
        data = self.read(start, position - start)
        return hashlib.sha256(data).digest() if len(data) == position - start else None

    def slices(self, start):
        """Return pairs of offsets that cut up to CHUNK_BYTES from start on into whole lines: one for each core, or one
        alone when there is little to read."""
        size = min(self.end - start, CHUNK_BYTES)
        count = max(1, min(usable_cores(), size // SLICE_BYTES))
        cuts = [start] + [self._behind_line(start + size * (i + 1) // count) for i in range(count)]
        return [(low, high) for low, high in itertools.pairwise(cuts) if low < high]

    def _behind_line(self, offset):
        """Return the offset itself if a line begins there, else where the next one begins, or end."""
        while offset < self.end and (data := self.read(offset - 1, BLOCK_BYTES)):
            if newline := data.find(b"\n") + 1:
                return min(offset - 1 + newline, self.end)
            offset += len(data)
        return self.end

    def blocks(self, start, end):
        """Yield (offset, whole lines, offset behind them) from start up to end. Of a line longer than a block only the
        beginning is yielded, with "..." behind it, which is too long for an event in any case."""
        while start < end and (block := self.read(start, min(BLOCK_BYTES, end - start))):
            behind = start + len(block)
            if behind == self.end and not block.endswith(b"\n"):
                block += b"\n"  # the last event of the log lacks it
            elif b"\n" in block:
                block = block[:block.rindex(b"\n") + 1]
                behind = start + len(block)
            else:
                block += b"...\n"  # so that it is not blank, whatever it begins with
                behind = self._behind_line(behind)
            yield start, block, behind
            start = behind


# ---- A tally --------------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")

# What stands between two offsets of a log. A span (producer, first, end, line) says that the lines from that one on (0
# is the first) have the event ids from (producer, first) to (producer, end - 1). rejected holds the (offset, reason) of
# each rejected line.
Report = collections.namedtuple("Report", "start end lines events spans rejected")


class Tally:
    """What the events of a log add up to, from offset start to end, or to where that took CHUNK_SECONDS or would keep
    more than limit bytes. With ids_only, events without an id are rejected."""

    def __init__(self, log, start, end, ids_only, limit):
        self._log, self._ids_only = log, ids_only
        self._sums, self._counts = {}, collections.Counter()  # of each user id in UTF-8, as JSON writes it
        spans, rejected, lines, user_bytes = [], [], 0, 0
        behind, deadline = start, time.monotonic() + CHUNK_SECONDS
        for offset, block, behind in log.blocks(start, end):
            users = len(self._sums)
            numbers, rows = read_rows(block, offset, ids_only, rejected)
            add_spans(spans, numbers, rows, offset, lines)
            self._add(rows, 1)
            lines += block.count(b"\n")
            # A dict keeps its order: the new users are its last ones.
            user_bytes += sum(map(len, itertools.islice(reversed(self._sums), len(self._sums) - users)))
            kept = user_bytes + SUM_BYTES * len(self._sums) + SPAN_BYTES * (len(spans) + len(rejected))
            if kept > limit or time.monotonic() > deadline:
                break
        self.report = Report(start, behind, lines, sum(self._counts.values()), spans, rejected)

    def _add(self, rows, sign):
        """Add the amounts of rows exactly and count them or, with sign -1, take them off again."""
        values = [row[2] for row in rows]
        try:
            amounts = list(map(int, values))
        except ValueError:
            amounts = [Decimal(value.decode()) for value in values]
        sums, plus = self._sums, b"add" if sign > 0 else b"subtract"
        with decimal.localcontext(EXACT):
            for row, amount in zip(rows, amounts):
                sums[row[0]] = sums.get(row[0], 0) + (amount if row[1] == plus else -amount)
        (self._counts.update if sign > 0 else self._counts.subtract)([row[0] for row in rows])

    def sums(self, new):
        """Return {user: amount} as a JSON text for the events whose lines are 1 in new, a byte for each line: read the
        others once more and take them off, once and for all. Raise OSError if the log was changed meanwhile."""
        events, marks = new.count(1), iter(new)
        again = self._log.blocks(self.report.start, self.report.end) if events < self.report.events else ()
        for offset, block, _ in again:
            others = [line + b"\n" for line, mark in zip(block.split(b"\n")[:-1], marks) if not mark]
            _, rows = read_rows(b"".join(others), offset, self._ids_only, [])
            self._add(rows, -1)
        if sum(self._counts.values()) != events:
            raise OSError(errno.ESTALE, "was changed while it was read", self._log.path)
        return b"{%b}" % b",".join([b'"%b":%b' % (user, str(amount).encode())
                                    for user, amount in self._sums.items() if self._counts[user]])


class TallyInChild:
    """A Tally that a child process makes. It ends with its parent, at its next read or write of the pipe. (The idle
    workers of a pool outlive a parent that is killed.)"""

    def __init__(self, *arguments):
        """Begin a Tally."""
        self._path = arguments[0].path
        self._pipe, theirs = FORK.Pipe()
        self._child = FORK.Process(target=self._serve, args=(theirs, arguments), daemon=True)
        with theirs:
            self._child.start()  # beside a thread that waits for a signal and holds no lock

    def _serve(self, pipe, arguments):
        self._pipe.close()
        with contextlib.suppress(EOFError, ConnectionError, MemoryError):  # the parent was killed, or will say so
            try:
                tally = Tally(*arguments)
                pipe.send(tally.report)
                pipe.send(tally.sums(pipe.recv()))
            except OSError as error:
                pipe.send(error)

    def receive(self):
        """Return the Tally's report when the child has it, and after choose() its sums; raise the OSError that reading
        the log raised, or ChildDied."""
        try:
            result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ChildDied(f"A process that read {self._path} ended too early: out of memory, or killed.") from error
        if isinstance(result, OSError):
            raise result
        return result

    def choose(self, new):
        """Have the child begin the sums of the events whose lines are 1 in new."""
        with contextlib.suppress(ConnectionError):  # it died, as receive() will see
            self._pipe.send(new)

    def close(self):
        """End the child."""
        self._pipe.close()
        self._child.kill()
        self._child.join()


def read_rows(block, offset, ids_only, rejected):
    """Return the numbers and the rows of the lines of block that are events, and add the others to rejected, but for
    blank ones. block is whole lines at offset of a log."""
    rows = (LOG_LINE.findall(block) if is_utf8(block) else
            [(b"", b"", b"", b"", b"", line) for line in block[:-1].split(b"\n")])
    if all([row[3 if ids_only else 0] for row in rows]):  # a line with an id is plain, too
        return range(len(rows)), rows
    good = {}
    offsets = itertools.accumulate([len(line) + 1 for line in block.split(b"\n")], initial=offset)
    for number, (at, row) in enumerate(zip(offsets, rows)):
        try:
            if row[5].strip():
                row = decode_log_line(row[5])
            check(row[3] or not row[0] or not ids_only, NO_ID)
        except ValueError as error:
            rejected.append((at, str(error)))
        else:
            if row[0]:
                good[number] = row
    return list(good), list(good.values())


def add_spans(spans, numbers, rows, offset, lines):
    """Add to spans the ids of rows, whose lines have these numbers in a block at offset, behind lines of the slice.

    An event without an id gets one that no other has in this chunk: no producer, and a number that grows with offset.
    """
    # Neighbours belong to one span when they have one producer and their sequences ascend as their lines do.
    keys = [(row[3], int(row[4] or offset + number) - i, number - i)
            for i, number, row in zip(itertools.count(), numbers, rows)]
    at = 0
    for (producer, base, skipped), group in itertools.groupby(keys):
        count = len(list(group))
        spans.append((producer.decode(), base + at, base + at + count, lines + skipped + at))
        at += count


# ---- Exactly once ---------------------------------------------------------------------------------------------------

# What came of a chunk: the offsets where it began and ended, the position that is recorded now, how many events were
# applied and how many repeated, the (offset, reason) of each rejected line, and whether events without an id were among
# them since the reading began. Chunk() stands before the first one.
Chunk = collections.namedtuple("Chunk", "start end position applied repeated rejected without_id",
                               defaults=(None, 0, -1, 0, 0, (), False))


def apply_chunk(sql, log, previous):
    """Apply the next chunk of log in the caller's transaction, which commits all of it or nothing; return a Chunk.

    It starts at the recorded position if the bytes before that are unchanged. Otherwise (a copy, a cut, a restored
    backup) the log is being read again from byte 0, and the chunk starts where the previous one ended. Then the
    position stays where it is until the end is reached without rejecting an event that has no id, so that a log that
    is put right again is known again. It never moves back, also when a shorter copy is read.
    """
    sql.execute("INSERT INTO event_logs (log_id) VALUES (%s) ON CONFLICT DO NOTHING", [log.log_id])
    sql.execute("SELECT position, digest FROM event_logs WHERE log_id = %s FOR UPDATE", [log.log_id])
    position, digest = sql.fetchone()
    unchanged = log.digest(position) == bytes(digest)
    start = position if unchanged else previous.end
    with tallied(log, start, ids_only=not unchanged) as tallies:
        reports = [tally.report for tally in tallies]
        if reports:
            log.sync()
        applied = count_once(sql, tallies)
    end = reports[-1].end if reports else start
    rejected = [line for report in reports for line in report.rejected]
    without_id = previous.without_id or any(reason == NO_ID for _, reason in rejected)
    if end > position and (unchanged or end >= log.end and not without_id):
        position = end
        sql.execute("UPDATE event_logs SET position = %s, digest = %s WHERE log_id = %s",
                    [end, log.digest(end), log.log_id])
    repeated = sum(report.events for report in reports) - applied
    return Chunk(start, end, position, applied, repeated, rejected, without_id)


@contextlib.contextmanager
def tallied(log, start, ids_only):
    """Return a context with the tallies of the next chunk of log, from offset start on: one for each core, or one alone
    when there is little to read, or none. What lies behind one that ended early belongs to the chunk after this one."""
    with contextlib.ExitStack() as stack:
        cuts = log.slices(start)
        jobs = [(log, low, high, ids_only, KEPT_BYTES // len(cuts)) for low, high in cuts]
        tallies = [stack.enter_context(contextlib.closing(TallyInChild(*job))) for job in jobs]
        adjoining, end = [], start
        for tally, (low, _) in zip(tallies, cuts):
            if low == end:  # no slice before it ended early
                tally.report = tally.receive()
                adjoining.append(tally)
                end = tally.report.end
        yield adjoining


def count_once(sql, tallies):
    """Add to users_revenue every event of tallies whose id is not yet in event_producers, and its id there, in the
    caller's transaction; return how many were added.

    READ COMMITTED. Each producer's row exists before it is locked, and is locked before it is read: of two processors
    that meet the same id, the second waits and then sees what the first has committed. Producers, then users, are taken
    in the order of their bytes, so that two processors cannot each wait for the other.
    """
    ranges = ranges_of(tallies)
    chunk = json.dumps(ranges)
    sql.execute("""
        INSERT INTO event_producers (producer_id)
        SELECT producer_id FROM json_object_keys(%s) AS producer_id ORDER BY producer_id COLLATE "C"
        ON CONFLICT DO NOTHING""", [chunk])
    sql.execute('SELECT FROM event_producers WHERE producer_id = ANY (%s) ORDER BY producer_id COLLATE "C" FOR UPDATE',
                [list(ranges)])
    sql.execute("""
        WITH chunk AS MATERIALIZED (
            SELECT producer_id, ranges::int8multirange AS ranges FROM json_each_text(%s) AS ids (producer_id, ranges)
        ), changed AS (
            UPDATE event_producers AS stored SET applied = stored.applied + ranges
            FROM chunk JOIN event_producers AS before USING (producer_id)
            WHERE stored.producer_id = chunk.producer_id AND NOT before.applied @> ranges
            RETURNING chunk.producer_id, ranges - before.applied AS new -- stored is what it became
        )
        SELECT producer_id, lower(span), upper(span) FROM changed, unnest(new) AS span""", [chunk])
    chosen = [(tally, new) for tally, new in zip(tallies, select_new(tallies, sql.fetchall())) if 1 in new]
    for tally, new in chosen:
        tally.choose(new)
    # A JSON text for each tally takes a fifth of the time that 100,000 adapted parameters do.
    sql.execute("""
        INSERT INTO users_revenue AS stored (user_id, revenue)
        SELECT user_id COLLATE "C", sum(amount::numeric)
        FROM unnest(%s::json[]) AS sums, json_each_text(sums) AS new (user_id, amount) GROUP BY 1 ORDER BY 1
        ON CONFLICT (user_id) DO UPDATE SET revenue = coalesce(stored.revenue, 0) + excluded.revenue""",
                [[psycopg2.extensions.QuotedString(tally.receive()) for tally, _ in chosen]])
    return sum(new.count(1) for _, new in chosen)


def ranges_of(tallies):
    """Return {producer: its sequences in tallies, as an int8multirange literal}."""
    ranges = collections.defaultdict(list)
    for producer, first, end, _ in itertools.chain.from_iterable([tally.report.spans for tally in tallies]):
        ranges[producer].append(f"[{first},{end})")
    return {producer: "{%s}" % ",".join(texts) for producer, texts in ranges.items() if producer}


def select_new(tallies, new):
    """Return for each tally a byte for each of its lines: 1 for an event whose id is in new, [(producer, first, end)],
    and for every event without an id.

    Of several lines with one id, the first span in the order of ids gets it: both lists ascend, and what a span takes
    of new is not there for the next. (An id before the current span would lie in an earlier one, which has taken it.)
    """
    spans = sorted([(*span, number) for number, tally in enumerate(tallies) for span in tally.report.spans])
    new = collections.deque(sorted(new + [span[:3] for span in spans if not span[0]]))
    selections = [bytearray(tally.report.lines) for tally in tallies]
    for producer, first, end, line, number in spans:
        while new and new[0][0] == producer and new[0][1] < end:
            _, low, high = new.popleft()
            if high > end:
                new.appendleft((producer, end, high))
                high = end
            selections[number][line + low - first:line + high - first] = b"\1" * (high - low)
    return selections


# ---- The database ---------------------------------------------------------------------------------------------------

def connect(**defaults):
    """Return a psycopg2 connection to the database that the environment names. defaults are libpq's parameters where it
    says nothing. Raise Failure when DATABASE_URL makes no sense, or psycopg2.OperationalError."""
    url = os.environ.get("DATABASE_URL", "")
    # A host that vanished is noticed after a minute; by default it takes two hours.
    defaults |= {"fallback_application_name": Path(sys.argv[0]).name, "keepalives_idle": 30, "keepalives_interval": 10,
                 "keepalives_count": 3}
    if not url and not any(map(os.environ.get, ("PGHOST", "PGHOSTADDR", "PGUSER", "PGDATABASE", "PGSERVICE"))):
        defaults |= {"host": "localhost", "dbname": "postgres", "user": "postgres"}
        passwords = os.environ.get("PGPASSFILE") or os.path.expanduser("~/.pgpass")
        if not os.environ.get("PGPASSWORD") and not os.path.exists(passwords):
            defaults["password"] = "password1!"
    if os.environ.get("PGCONNECT_TIMEOUT"):
        defaults.pop("connect_timeout", None)
    return psycopg2.connect(**(defaults | _parse_url(url) | {"client_encoding": "UTF8"}))


def _parse_url(url):
    """Return the parts of DATABASE_URL, or raise Failure, without quoting any of it: where a URL is malformed, any part
    of it may be a part of the password."""
    with contextlib.suppress(psycopg2.ProgrammingError):
        parts = psycopg2.extensions.parse_dsn(url)
        escaped = "://" not in url or re.fullmatch("postgres(ql)?://([^@/]*@)?[^@]*", url)
        if escaped and re.fullmatch("[0-9,]*", parts.get("port", "")):
            return parts
    raise Failure("DATABASE_URL is malformed. It must look like postgresql://user:password@host:5432/database, with "
                  "each / @ : % in the password percent-encoded (%2F %40 %3A %25).")


def sentence(error):
    """Return what an exception says is wrong, in one line without a full stop."""
    lines = (getattr(error, "strerror", None) or str(error)).splitlines()
    if isinstance(error, psycopg2.Error):  # libpq's own words are a line for each address that it tried, and advice
        diagnosis = [error.diag.message_primary, error.diag.message_detail or ""]
        lines = diagnosis if diagnosis[0] else [line for line in lines if not line.startswith("\t")]
    return "; ".join([" ".join(line.split()).rstrip(".") for line in lines if line.strip()]) or type(error).__name__


def prepare_tables(sql, create=True):
    """Create the tables that are missing, in the schema where users_revenue is, and check that all of them fit. Raise
    Failure or, in the words of create_table.sql, psycopg2.errors.RaiseException."""
    statements = TABLES.read_text()
    sql.execute("SELECT to_regclass('users_revenue'), to_regclass('event_producers'), to_regclass('event_logs')")
    if None not in sql.fetchone():
        statements = statements[statements.index("DO $$"):]  # CREATE needs a right, even IF NOT EXISTS
    elif not create:
        raise Failure("The tables do not exist yet; run data_processor.py without --verify first.")
    else:
        # Two processors that create the same table at once collide, even with IF NOT EXISTS.
        sql.execute("SELECT pg_advisory_xact_lock(hashtext('create_table.sql'))")
        sql.execute("""SELECT set_config('search_path', relnamespace::regnamespace::text, true)
                       FROM pg_class WHERE oid = to_regclass('users_revenue')""")
    sql.execute(statements)


# ---- The run --------------------------------------------------------------------------------------------------------

class Processor:
    """Runs over some logs and their rotated siblings. What it remembers of a database ends with its connection."""

    def __init__(self, paths, follow=False, verifying=False):
        self.paths, self.follow, self.verifying = paths, follow, verifying
        self.failed = False  # something was rejected or could not be read
        self.connection = None
        self.done = {}  # {file: (its version, log_id, recorded position)} of each log when all of it was applied
        self.counts = collections.defaultdict(collections.Counter)  # {path: what came of it and was not said yet}
        self.held = {}  # {path: LogReader} of the logs that are written to, so that they are still read when renamed
        self.troubles = Troubles()
        self.failures = 0  # since something last succeeded

    def run(self):
        """Apply what is new in every log; with follow look again every second, through database outages, and never
        return. Raise Failure or psycopg2.Error when the database does not let it.

        After a deadlock, a lost connection or a child's death, try again a few times on a new connection: the
        transaction was rolled back, or it was committed and its events will be recognised.
        """
        while True:
            try:
                found = self.run_once()
                self.failures = 0
                self.troubles.end("Events are not applied", "this is over.")
                if self.follow:
                    time.sleep(POLL_SECONDS)
                elif not found:
                    return
            except (Failure, OSError, psycopg2.Error) as error:
                self.failures += 1
                passing = isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError, ChildDied))
                if self.connection is None or not passing or self.failures >= ATTEMPTS:
                    if not self.follow:
                        raise
                    self.troubles.begin("Events are not applied", f"trying again until it is mended. {explain(error)}")
                if self.connection:
                    self.connection.close()
                time.sleep(min(0.1 * 2 ** min(self.failures, 10), MAX_BACKOFF_SECONDS))

    def run_once(self):
        """Apply what is new in every log, and return whether there was one to look at: one that was not done yet, that
        the database knows less of than it did (it was restored), or, with follow, that has changed."""
        if self.connection is None or self.connection.closed:
            self.connect()
        with self.transaction() as sql:
            sql.execute("SELECT log_id, position FROM event_logs")
            recorded = {bytes(log_id): position for log_id, position in sql}
        self.done = {file: done for file, done in self.done.items() if recorded.get(done[1], -1) >= done[2]}
        found = False
        for path in self.find_logs():
            try:
                found |= self.apply_path(path)
                self.troubles.end(path, "is read again.")
            except OSError as error:
                self.failed = True
                advice = "; start server.py in its directory, or name another log" * (error.errno == errno.ENOENT)
                self.troubles.begin(path, f"{error.strerror}{advice}.")
        return found

    def find_logs(self):
        """Return the paths of the logs, rotated ones before the one that they were renamed from."""
        found = []
        for path in self.paths:
            rotated = rotated_logs(path) + (rotated_logs(os.path.realpath(path)) if os.path.islink(path) else [])
            for sibling in rotated:
                if not sibling.endswith(COMPRESSED):
                    found.append(sibling)
                elif sibling not in self.paths:
                    self.troubles.begin(sibling, "is compressed and was not read; name it to read it.")
            if self.follow or os.path.exists(path) or not rotated:
                found.append(path)
        return list(dict.fromkeys(found))

    def apply_path(self, path):
        """Apply what is new in the log at path and, before that, in the one that it led to before; return whether there
        was anything to look at, or raise OSError."""
        log = self.held.get(path)
        if log and not leads_to(path, log.file.fileno()):
            # Renamed. Once find_end has had the lock, nobody writes to it any more: writers look at the name first.
            self.done.pop(log.state()[0], None)  # also if it has not grown: its writer may hold the lock
            self.apply_log(log)
            self.held.pop(path).close()
        log = self.held.get(path) or LogReader(path)
        if self.follow and path in self.paths:
            self.held[path] = log
            return self.apply_log(log)
        with contextlib.closing(log):
            return self.apply_log(log)

    def apply_log(self, log):
        """Apply an open log chunk by chunk, from where the database knows it, and say what came of it; return False if
        it is done already and, with follow, has not changed since."""
        file, version = log.state()
        if file in self.done and (self.done[file][0] == version or not self.follow):
            return False
        log.find_end()
        counts, chunk = self.counts[log.path], Chunk()
        while chunk.start != chunk.end < log.end:  # a chunk of no length: the file was truncated meanwhile
            with self.transaction() as sql:
                chunk = apply_chunk(sql, log, chunk)
                for at, reason in [] if self.verifying else chunk.rejected:
                    self.failed = True
                    warn(f"{log.path}: byte {at}: {reason}")  # before the commit: after a kill twice rather than never
            if chunk.applied:
                self.failures = 0
            counts.update(applied=chunk.applied, repeated=chunk.repeated, rejected=len(chunk.rejected))
            write(sys.stderr, f"{log.path}: {chunk.end / log.end:.0%}, {sum(counts.values()):,} events", end="")
        write(sys.stderr, "", end="")
        self.done[file] = version, log.log_id, chunk.position
        del self.counts[log.path]
        left = f"; {log.unfinished:,} bytes of an unfinished last line left" if log.unfinished else ""
        if not self.verifying and (not self.follow or any(counts.values())):
            say(f"{log.path}: {counts['applied']:,} applied, {counts['repeated']:,} repeated, "
                f"{counts['rejected']:,} rejected{left}")
        return True

    @contextlib.contextmanager
    def transaction(self):
        """Return a context with the cursor of one transaction: nothing else commits. A verifying run never does, and
        takes its time between two statements."""
        with contextlib.nullcontext() if self.verifying else self.connection, self.connection.cursor() as sql:
            if not self.verifying:
                sql.execute("SET LOCAL idle_in_transaction_session_timeout = %s", [f"{IDLE_SECONDS}s"])
            yield sql

    def connect(self):
        """Connect to the database and forget what was remembered of another one; see that its tables fit."""
        self.done = {}
        self.connection = connect(connect_timeout=10)
        self.connection.set_session(isolation_level="READ COMMITTED")
        with self.transaction() as sql:
            prepare_tables(sql, create=not self.verifying)


def verify(paths):
    """Print the users whose revenue differs from what the logs give; return whether there are none.

    It is a run from the logs' starts into temporary tables, which hide the real ones, in a transaction that is never
    committed. Raise Failure or psycopg2.Error when the database does not let it.
    """
    processor = Processor(paths, verifying=True)
    processor.connect()
    with contextlib.closing(processor.connection), processor.connection.cursor() as sql:
        sql.execute("SELECT 'users_revenue'::regclass::oid")
        real = sql.fetchone()
        sql.execute(TABLES.read_text().replace("CREATE TABLE IF NOT EXISTS", "CREATE TEMPORARY TABLE"))
        sql.execute("SELECT set_config('search_path', 'pg_temp, ' || current_setting('search_path'), true)")
        processor.run_once()
        if processor.failed:
            say("Not every log could be read, so nothing was compared.")
            return False
        sql.execute("SELECT %s::regclass::text, count(*) FROM users_revenue", real)
        real, users = sql.fetchone()  # with its schema, because it is hidden now
        sql.execute(f"""
            SELECT user_id, stored, logged, stored - logged
            FROM (SELECT coalesce(old.user_id, new.user_id) COLLATE "C" AS user_id,
                         coalesce(old.revenue, 0) AS stored, coalesce(new.revenue, 0) AS logged
                  FROM {real} AS old FULL JOIN users_revenue AS new ON old.user_id = new.user_id COLLATE "C") AS users
            WHERE stored <> logged ORDER BY user_id""")
        for row in sql:
            say("{}: {:f} in users_revenue, {:f} in the logs, difference {:f}".format(*row))
        if sql.rowcount:
            say(f"{sql.rowcount:,} users differ. Revenue from before these logs is a difference, and so are events "
                "that are not applied yet: run data_processor.py first, and name every log.")
        else:
            say(f"users_revenue and the logs agree on {users:,} users.")
        return not sql.rowcount


def explain(error):
    """Return the sentence that says why a run ended with a Failure, an OSError or a psycopg2.Error, and what to do."""
    if isinstance(error, Failure):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, psycopg2.errors.RaiseException):  # by create_table.sql
        return sentence(error)
    if isinstance(error, psycopg2.OperationalError) and not error.pgcode:
        return (f"No database: {sentence(error)}. Start PostgreSQL, or correct DATABASE_URL or PGHOST, PGPORT, PGUSER, "
                "PGPASSWORD and PGDATABASE.")
    return f"Stopped at a database error: {sentence(error)}."


def exit_on(statuses):
    """End the process at once, with the given status, when one of these signals comes. PostgreSQL then rolls back the
    open transaction. (A thread waits for them, because a Python handler does not run while libpq waits for a lock.)"""
    signal.pthread_sigmask(signal.SIG_BLOCK, statuses)
    threading.Thread(target=lambda: os._exit(statuses[signal.sigwait(statuses)]), daemon=True).start()


def parse_command_line(arguments):
    """Return the options, or exit with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", metavar="LOG", nargs="*", default=[DEFAULT_LOG], help=f"(default: {DEFAULT_LOG})")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--follow", action="store_true", help="look for new events every second until interrupted")
    mode.add_argument("--verify", action="store_true", help="change nothing; compare the database with the logs")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run the command line and return its exit status."""
    options = parse_command_line(arguments)
    exit_on({signal.SIGINT: 130, signal.SIGTERM: 0 if options.follow else 143})
    try:
        if options.verify:
            return 0 if verify(options.logs) else 1
        processor = Processor(options.logs, options.follow)
        processor.run()
        return 1 if processor.failed else 0
    except (Failure, OSError, psycopg2.Error) as error:
        warn(explain(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
