"""Receive events over HTTP, append them durably to a log, and answer each user's revenue.

The answer 200 is sent only after the event's line was written and synced, so that the event
survives kill -9 and a power cut.
"""
# The parts in order: settings; work that is shared (Rounds); lines of events; the log
# (LogWriter); the database (Revenues); requests as they are read; their answers (Handler, one for
# each connection); processes (Worker, Supervisor); the command line.
import collections
import contextlib
import email.utils
import errno
import functools
import hmac
import http.server
import io
import ipaddress
import json
import math
import operator
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from typing import NamedTuple

# With python -P, the directory of this script is not searched for data_processor.
sys.path.append(os.path.dirname(os.path.realpath(__file__)))

# data_processor comes first: if fcntl or psycopg2 is missing, importing it ends the program with
# a sentence.
from data_processor import (
    BLOCK_BYTES,
    CONNECT_SECONDS,
    DEFAULT_LOG,
    EVENT,
    LOCK_SECONDS,
    MAX_SEQUENCE,
    Connecting,
    Failure,
    Parser,
    Troubles,
    amount_of,
    check_id,
    check_reserved,
    decode_event,
    decode_log_line,
    end_of_events,
    is_user_id,
    is_utf8,
    leads_to,
    lock_log,
    open_regular,
    say,
    sentence,
    sync_file,
    usable_cores,
    wait_for,
    warn,
)

import fcntl
import resource

import psycopg2
import psycopg2.errors
import psycopg2.extensions

HELP = """\
Receive events over HTTP, append them durably to a log, and answer each user's revenue
from PostgreSQL.

The answer 200 is sent only after the event's line was written and synced, so that the
event survives kill -9 and a power cut.

EVENTS_AUTHORIZATION holds the value that a request's Authorization header must have;
without it the server takes requests from this machine alone. The database is the one
that DATABASE_URL or libpq's variables (PGHOST, ...) name; events are taken without one,
too.

Example: python server.py --port 8080
"""

# Bounds of one request.
MAX_BODY_BYTES = 1024 * 1024
MAX_LINES = 10_000
# The request line and the headers together; also the size line of a chunk, and the trailers.
MAX_HEAD_BYTES = 64 * 1024
# Headers of a request. As long as a connection is open, its last ones are kept, and many short ones
# hold far more memory than their bytes.
MAX_FIELDS = 100

# Bounds of what all requests of a worker hold in memory together.
# Bodies, and the answers of batches, until their lines are given to the log. What is over it gets
# 503.
HELD_BODY_BYTES = 64 * 1024 * 1024
# Answers that their peers do not read. A connection whose answer is over it is cut off.
UNREAD_ANSWER_BYTES = 64 * 1024 * 1024
# Lines that wait for the disk, and their answers; further ones wait until these are being written.
GROUP_BYTES = 16 * 1024 * 1024
# A body is read in pieces of at most that size.
PIECE_BYTES = 64 * 1024

# A request must be whole so long after its first byte.
REQUEST_SECONDS = 30
# A peer may take so long to read an answer and to begin the next request. Load balancers reuse a
# connection for 60 seconds.
PEER_IDLE_SECONDS = 75
# A round waits for the log's lock until LOCK_SECONDS after its oldest request was whole, but at
# least so long: a slow sync of the round before may have used that time up, and another worker may
# hold the lock for a moment.
LEAST_LOCK_SECONDS = 1
# A question to the database is answered within that time, if only with 503.
DATABASE_SECONDS = 2
# After a refusal, the rest of the request is read and discarded for so long and up to so many
# bytes: closing at once could destroy the answer. Whoever is past a deadline has that time to be
# sent an answer.
DRAIN_SECONDS = 2
DRAIN_BYTES = 16 * 1024 * 1024
# A worker that is told to stop finishes what it received for at most STOP_SECONDS. For at most the
# first BACKLOG_SECONDS of them it takes the connections that the kernel has accepted.
STOP_SECONDS = 10
BACKLOG_SECONDS = 1
# The parent waits for its workers so much longer, and then kills them.
KILL_SECONDS = 3
# How often a worker looks whether its log has failed (no descriptor becomes ready then), and tries
# again to accept a connection.
LOOK_SECONDS = 0.1
# A worker without room waits so long for a connection to end, or for another worker to take the
# one that waits.
PAUSE_SECONDS = 0.001
# A connection from which something has come so recently is closed to make room only when somebody
# has waited so long for it: more may be on its way, but peers that send a byte now and then must
# not keep everyone out. A worker ends if it has no room for so long, and no connection either.
ROOM_SECONDS = 0.5

# Connections of a worker; further ones wait in the backlog until one is closed to make room.
MAX_CONNECTIONS = 1000
# Descriptors that no connection takes: for the log, the database, name look-ups.
RESERVED_DESCRIPTORS = 16
# The kernel lowers that to its own limit (net.core.somaxconn).
BACKLOG = 4096
# Each connection needs a descriptor, and some may be inherited. macOS allows 256 at first.
DESCRIPTORS = 8192

# A worker that died is replaced after that pause.
RESTART_SECONDS = 0.5
# When so many workers in a row died so soon after their start, the next ones would, too. (It is
# longer than ROOM_SECONDS, for which a worker tries to accept its first connection, if one waits.)
QUICK_DEATH_SECONDS = 2
QUICK_DEATHS = 5
# Exit status of a worker whose log can no longer be trusted. The parent then stops the server.
EXIT_SYNC_FAILED = 3

# The disk is full, or a limit of it is reached.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A connection could not be accepted: descriptors or memory have run out.
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def report_bug():
    """Print the traceback of the exception that is being handled: only a bug can have raised it."""
    for line in traceback.format_exc().splitlines():
        warn(line)


# ---- Work that is shared ------------------------------------------------------------------------


class Member(NamedTuple):
    """Somebody's share in a round."""

    item: object  # what is to be done
    answer: object  # a function of its outcome, which neither waits nor prints


class Rounds:
    """Work in rounds: whoever comes while a round is under way shares the next one.

    The thread that finds no members is the first of a new round, and will work for it. It waits
    until the round before is over. Meanwhile other threads add themselves to the members and return
    at once. Then the first one takes all members, does the work for them, and calls their answers.

    It calls the others' answers because they would else have to wait, and to be woken one by one:
    then a third fewer requests would be served. The price is that an answer holds up all answers
    after it, so it must not wait.
    """

    def __init__(self, work, limit=math.inf):
        """Prepare rounds of work(members), a deque. It must give each of them an outcome with
        tell(), or the member waits for ever; and it must neither raise anything nor return None.

        Once the sizes of a round's members reach limit, further ones wait until it has begun.
        """
        self._work = work
        self._limit = limit
        self._lock = threading.Condition(threading.Lock())  # guards the next two
        self._members = collections.deque()  # of the next round
        self._size = 0  # of these members together
        self._working = threading.Lock()  # held during a round, by the thread that works
        self._bugs = []  # lines of tracebacks; only the thread that works touches them

    def join(self, item, answer, size=1):
        """Have item done and its outcome given to answer. Return what work returned if this thread
        has worked for the round. Return None if another one does: it may answer at any moment, and
        whoever called does nothing more with the item, and nothing that can fail."""
        with self._lock:
            self._lock.wait_for(self._has_room)
            is_first = not self._members
            self._members.append(Member(item, answer))
            self._size += size
        if not is_first:
            return None
        with self._working:  # the round before is over
            members = self._begin()
            report = self._work(members)
            bugs = self._bugs
            self._bugs = []
        for bug in bugs:
            warn(bug)
        return report

    def _has_room(self):
        """Tell whether another member may be added to the next round."""
        return self._size < self._limit

    def _begin(self):
        """Return the members of the next round; whoever comes from now on is in the one after."""
        with self._lock:
            members = self._members
            self._members = collections.deque()
            self._size = 0
            self._lock.notify_all()
        return members

    def tell(self, member, outcome):
        """Give a member its outcome. An answer that fails costs nobody else theirs."""
        try:
            member.answer(outcome)
        except Exception:
            with contextlib.suppress(MemoryError):
                self._bugs.extend(traceback.format_exc().splitlines())


# ---- Lines of events ----------------------------------------------------------------------------

# The grammar without its groups: nobody asks for them here, and they cost a tenth of the time.
# Every "(" without "?" behind it begins a group; EVENT has no other "(", in a class or escaped.
PLAIN_EVENT = re.sub(rb"\((?!\?)", rb"(?:", EVENT)
PLAIN_EVENTS = re.compile(rb"(?:%b\}\n)+" % PLAIN_EVENT)


class EventId(NamedTuple):
    """The id of an event, or of the first one of consecutive events."""

    producer: str
    sequence: int


class Lines(NamedTuple):
    """Consecutive lines of a batch that are events."""

    index: int  # of the first one, counted from 0
    text: bytes  # each with its LF


class Judgement(NamedTuple):
    """What is right and what is wrong with a batch."""

    accepted: list  # of Lines
    events: int  # how many these are
    rejected: list  # of {"line": its number, counted from 1, "error": words}


def is_plain(lines):
    """Tell whether each of the lines, which end with LF, is an event as everyone prints it."""
    match = PLAIN_EVENTS.match(lines)
    return match is not None and match.end() == len(lines) and is_utf8(lines)


def judge_event(body):
    """Return the one event in body as a line with its LF, or raise ValueError in words for its
    sender. Line ends around its tokens become spaces, and white space after it is dropped."""
    if b"\n" not in body and is_plain(body + b"\n"):
        return body + b"\n"
    check_event(body)
    return body.rstrip().replace(b"\r", b" ").replace(b"\n", b" ") + b"\n"


def check_event(text):
    """Raise ValueError, in words for its sender, unless text is an event that may be sent."""
    event = decode_event(text)
    amount_of(event)
    check_reserved(event)


def judge_batch(lines):
    """Return the Judgement of lines, each with its LF; blank ones are skipped."""
    if is_plain(lines):
        return Judgement([Lines(0, lines)], lines.count(b"\n"), [])
    accepted = []
    rejected = []
    for index, line in enumerate(lines.removesuffix(b"\n").split(b"\n")):
        if not line.strip():
            continue
        try:
            accepted.append(Lines(index, judge_event(line)))
        except ValueError as error:
            # Only its words are kept: an exception drags its frames along.
            rejected.append({"line": index + 1, "error": str(error)})
    return Judgement(accepted, len(accepted), rejected)


def stamp(lines, first_id):
    """Return lines (each an object and LF) with consecutive event ids, from first_id on, put into
    them."""
    # b'{...}\n{...}\n' becomes the template b'{..., "sequence": %d}\n{..., "sequence": %d}\n'.
    # No LF stands inside a line, so "}" and LF are always the end of one.
    end = b', "producerId": "%b", "sequence": %%d}\n' % first_id.producer.encode()
    template = lines.replace(b"%", b"%%").replace(b"}\n", end)
    count = lines.count(b"\n")
    sequences = range(first_id.sequence, first_id.sequence + count)
    return template % tuple(sequences)


def add_log_field(lines):
    """Return stamped lines with a random field "log" in the first one's stamp.

    The processor recognises a log by its first line: no two logs may begin alike.
    """
    end = lines.index(b"\n")
    at = lines.rindex(b', "producerId": ', 0, end)
    field = b', "log": "%b"' % secrets.token_hex(16).encode()
    return lines[:at] + field + lines[at:]


# ---- The log ------------------------------------------------------------------------------------

UNCERTAIN = (
    "the lines of this request may or may not count, so only a sender that gives event ids may "
    "send it again"
)


class Pending(NamedTuple):
    """Lines that wait for their round."""

    text: bytes
    deadline: float  # until then the log's lock is waited for, in seconds of time.monotonic


class Report(NamedTuple):
    """What is to be printed of a round, after all its members were answered."""

    error: object  # the exception that kept the lines from being durable, or None
    remarks: list  # what was mended in the log


class LogWriter:
    """The log as one worker appends to it; the other workers append to the same file.

    Only the thread that works for a round touches _fd and _remarks.
    """

    def __init__(self, path):
        self.path = path
        # Why this process writes nothing more, or "". The thread that works for a round writes it.
        self.failure = ""
        self._rounds = Rounds(self._write_round, GROUP_BYTES)
        self._troubles = Troubles()
        # Opened for the first round of this process: the lock of an inherited descriptor would not
        # exclude the others.
        self._fd = None
        self._remarks = []  # what was mended in this round

    def append(self, lines, deadline, answer, answer_bytes):
        """Make lines (bytes, whole lines) durable, then call answer(None), or answer(error): then
        they must not be acknowledged. The log's lock is waited for until the deadline, in seconds
        of time.monotonic. answer_bytes is the memory that answer holds until it is called."""
        size = len(lines) + answer_bytes
        report = self._rounds.join(Pending(lines, deadline), answer, size)
        if report is not None:  # else another thread works, and prints its report
            self._print(report)

    def check(self):
        """Raise OSError if the log cannot be opened and synced."""
        fd = self._open()
        try:
            sync_file(fd)
        finally:
            os.close(fd)

    def _print(self, report):
        """Print what came of a round."""
        for remark in report.remarks:
            warn(f"{self.path}: {remark}")
        if report.error is None:
            self._troubles.end(self.path, "the log can be written again.")
            return
        words = f"the log cannot be written: {sentence(report.error)}."
        if self.failure:
            words += (
                " The server ends. Look at the end of the log, whose last lines may be lost or "
                "damaged. Then rename it to a name that the processor reads, such as "
                f"{self.path}.1, and start the server again."
            )
        self._troubles.begin(self.path, words)

    def _write_round(self, members):
        """Make the lines of a round durable and tell its members; return the Report."""
        self._remarks = []
        error = None
        try:
            self._write(members)
        except Exception as caught:  # also MemoryError: everyone gets an answer
            error = caught
            self._close()  # which releases the lock
        # Before the next round, so that the next requests of these peers can share it.
        for member in members:
            self._rounds.tell(member, error)
        return Report(error, self._remarks)

    def _write(self, members):
        """Make the lines of a round durable, or raise the reason why they are not."""
        data = b"".join([member.item.text for member in members])
        # Who has waited longest decides for all of them.
        deadline = min([member.item.deadline for member in members])
        end = self._open_locked(deadline)
        if end == 0:
            data = add_log_field(data)
        try:
            write_all(self._fd, data)
        except OSError:
            self._take_back(end)
            raise
        # The lock is not held during the sync, so that other workers can write and share it. A
        # processor may read the lines before they are synced: it syncs them before it counts.
        try:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        except OSError as error:
            raise OSError(errno.EIO, f"{sentence(error)}; {UNCERTAIN}") from None
        try:
            sync_file(self._fd)
        except OSError as error:
            # Nothing more is written: the kernel may have dropped what was written, and a second
            # sync could lie.
            self.failure = f"a sync failed ({sentence(error)}); {UNCERTAIN}"
            raise OSError(errno.EIO, self.failure) from None

    def _open_locked(self, deadline):
        """Open and lock the file that path leads to, wait for its lock until the deadline, and
        return where its last line ends. Or raise OSError."""
        while True:
            if self.failure:
                raise OSError(errno.EIO, self.failure)
            if self._fd is None:
                self._fd = self._open()
            patience = max(LEAST_LOCK_SECONDS, deadline - time.monotonic())
            locked = lock_log(self.path, self._fd, fcntl.LOCK_EX, patience)
            if locked:
                # Also if it was renamed: with a torn end, a later line would be glued to it when
                # logs are concatenated.
                end = self._end_last_line()
                if leads_to(self.path, self._fd):
                    return end
            self._close()  # it was renamed or removed

    def _end_last_line(self):
        """Make the locked file end with a whole line, and return its end.

        What follows the last LF was never acknowledged: cut it off, unless it is a whole event,
        which the processor may have counted. That gets its LF.
        """
        size = os.fstat(self._fd).st_size
        if size == 0 or os.pread(self._fd, 1, size - 1) == b"\n":
            return size
        end = end_of_events(self._fd, size)
        if end == size:
            write_all(self._fd, b"\n")
            return size + 1
        os.ftruncate(self._fd, end)
        remark = f"cut off {size - end} bytes of an unfinished line at byte {end}."
        self._remarks.append(remark)
        return end

    def _take_back(self, end):
        """Cut off what a failed write left after end: it will not be acknowledged."""
        try:
            os.ftruncate(self._fd, end)
        except OSError as error:
            raise OSError(errno.EIO, f"{sentence(error)}; {UNCERTAIN}") from None

    def _close(self):
        """Close the file, which also releases its lock."""
        if self._fd is None:
            return
        fd = self._fd
        self._fd = None
        with contextlib.suppress(OSError):  # nothing that was acknowledged depends on it
            os.close(fd)

    def _open(self):
        """Open the log, creating it when it is missing, and make its name durable. Return its
        descriptor; or raise OSError, also when it is somebody's file."""
        # First the directory: no file is to be created whose name cannot be made durable.
        directory = os.open(os.path.dirname(os.path.realpath(self.path)), os.O_RDONLY)
        try:
            fd = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            try:
                if not is_log(fd):
                    words = "its first line is no event, so it is no log, and is left as it is"
                    raise OSError(errno.EINVAL, words, self.path)
                self._sync_directory(directory)
            except BaseException:
                os.close(fd)
                raise
        finally:
            os.close(directory)
        return fd

    def _sync_directory(self, directory):
        """Make the names in the directory durable, or raise OSError."""
        try:
            os.fsync(directory)
        except OSError as error:
            # Some file systems cannot sync directories, which is no failure.
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                return
            # As final as that of the log itself.
            self.failure = f"a sync failed of the directory that it is in ({sentence(error)})"
            raise OSError(errno.EIO, self.failure) from None


def is_log(fd):
    """Tell whether the open file may be a log: it is empty, its first line is an event, or it has
    no whole line yet and begins as a torn first line does. Anything else is somebody's file."""
    beginning = os.pread(fd, BLOCK_BYTES, 0)
    line, newline, _ = beginning.partition(b"\n")
    if not newline:
        line = line.rstrip(b"\0")  # which a power cut can leave
    with contextlib.suppress(ValueError):
        decode_log_line(line)
        return True
    return not newline and is_torn(line, beginning)


# So begins an event, whatever is left of it.
TORN_EVENT = re.compile(rb'\{[ \t]*(?:"|\Z)')


def is_torn(line, beginning):
    """Tell whether line may be what a kill or a power cut left of a log's first line; beginning is
    the first BLOCK_BYTES of the file, with the NULs behind the line."""
    if beginning[:1] in (b"", b"\0"):
        return True
    # A whole object, which is no event, is not torn; and no event is as long as a block.
    if len(line) == BLOCK_BYTES or not TORN_EVENT.match(line):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def write_all(fd, data):
    """Write all of data to fd, or raise OSError, when a part of it may be written."""
    left = memoryview(data)
    while left:
        written = os.write(fd, left)
        left = left[written:]


# ---- The database -------------------------------------------------------------------------------


class Question(NamedTuple):
    """A question for a user's revenue."""

    user: str
    deadline: float  # when it must have its answer, in seconds of time.monotonic


class NoAnswer(Exception):
    """The database did not say in time whether a user has revenue."""


class Revenues:
    """Users' revenue in the database. Questions come in rounds, one query each, on one connection.

    Only the thread that works for a round touches _connection, _opening and _unanswered.
    """

    # One round trip and one transaction, with which the setting ends: a pooler may share the
    # connection. The limit frees the database of queries that nobody waits for any more.
    QUERY = f"""
        SET LOCAL statement_timeout = {DATABASE_SECONDS * 1000};
        SELECT user_id, trim_scale(revenue)::text FROM users_revenue WHERE user_id = ANY (%s)"""

    def __init__(self):
        self._rounds = Rounds(self._answer_round)
        self._troubles = Troubles()
        self._connection = None
        self._opening = None  # the Connecting of the last _open(), until that gave a connection
        # A deque of the members of this round that have no answer yet, in the order in which they
        # came: so the first one's deadline is the next one. Who is told its outcome is removed.
        self._unanswered = None
        # Made here, because memory may be missing when it is needed.
        self._no_answer = NoAnswer()

    def find_revenue(self, user, answer):
        """Call answer(revenue), exact decimal text or None for a user without any, or
        answer(NoAnswer), within DATABASE_SECONDS."""
        question = Question(user, time.monotonic() + DATABASE_SECONDS)
        reason = self._rounds.join(question, answer)
        if reason is None:
            return  # another thread asks, and prints what is to be said
        if reason:
            self._troubles.begin("The database", f"{reason}.")
        else:
            self._troubles.end("The database", "it answers again.")

    def _answer_round(self, members):
        """Answer the members of a round; return why the database did not, or ""."""
        count = len(members)
        self._unanswered = members
        try:
            revenues = self._query()
        except Exception as error:  # whatever it is: everyone gets an answer
            while self._unanswered:
                self._tell_next(self._no_answer)
            self._disconnect()
            return sentence(error)
        are_all_in_time = len(self._unanswered) == count
        while self._unanswered:
            user = self._unanswered[0].item.user
            self._tell_next(revenues.get(user))
        if are_all_in_time:
            return ""
        return str(too_late())

    def _tell_next(self, outcome):
        """Give the first member without an answer its outcome."""
        member = self._unanswered.popleft()
        self._rounds.tell(member, outcome)

    def _query(self):
        """Return {user: revenue} of the users for whom somebody waits, or raise the reason why
        that is not possible. A connection that was lost is replaced, once."""
        replaced = False
        while True:
            if self._connection is None:
                self._connection = self._open()
            try:
                return self._select()
            except psycopg2.errors.QueryCanceled:  # an OperationalError, but nothing was lost
                raise
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                if replaced:
                    raise
            self._disconnect()  # the database was restarted, perhaps
            replaced = True

    def _select(self):
        """Run the query on the connection, with the result and the exceptions of _query."""
        users = list({member.item.user for member in self._unanswered})
        # psycopg2 calls it instead of waiting in libpq, which knows no deadline. It does so for
        # every connection of the process.
        psycopg2.extensions.set_wait_callback(self._wait_for_database)
        try:
            with self._connection.cursor() as sql:
                sql.execute(self.QUERY, [users])
                return dict(sql.fetchall())
        except psycopg2.errors.UndefinedTable:
            return {}  # before the tables exist, no user has revenue
        finally:
            psycopg2.extensions.set_wait_callback(None)

    def _wait_for_database(self, connection):
        """Return when the statement on the connection is done; refuse who cannot wait so long."""
        self._wait_or_refuse(functools.partial(wait_for, connection))

    def _open(self):
        """Return a new connection, or one that came too late for an earlier round; or raise the
        reason why there is none."""
        begun = time.monotonic()
        half = DATABASE_SECONDS / 2
        opening = self._opening
        if opening is None or opening.has_failed():  # in its round, or when none waited any more
            # tcp_user_timeout: after that time libpq gives up an address that is dead, and goes on
            # to the next one.
            opening = Connecting(connect_timeout=CONNECT_SECONDS, tcp_user_timeout=int(1000 * half))
            self._opening = opening
        self._wait_or_refuse(opening.wait)
        connection = opening.result()
        # A query that is given up costs its connection. If this one were asked when little time is
        # left, each round could connect anew, and none would ever have an answer.
        if time.monotonic() > begun + half:
            raise Failure(f"connecting took longer than {half:g} s")  # the next round finds it
        self._opening = None
        connection.autocommit = True  # a round is one query, and its transaction ends with it
        return connection

    def _wait_or_refuse(self, wait):
        """Call wait(deadline) with the next deadline, again and again until it returns in time.
        Meanwhile refuse the members whose deadline passes. Raise Failure when none is left."""
        while self._unanswered:
            try:
                wait(self._unanswered[0].item.deadline)
                return
            except TimeoutError:
                now = time.monotonic()
                while self._unanswered and self._unanswered[0].item.deadline <= now:
                    self._tell_next(self._no_answer)
        raise too_late()

    def _disconnect(self):
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def too_late():
    """Return the exception for a database that took too long."""
    return Failure(f"no answer within {DATABASE_SECONDS} seconds")


# ---- Requests, as they are read -----------------------------------------------------------------

# The rules of RFC 9110 and 9112. A field is a line of the headers or of the trailers.
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
VALUE = r"[^\x00-\x08\x0a-\x1f\x7f]*"
FIELD = re.compile(rf"(?P<name>{TOKEN}):(?P<value>{VALUE})\r\n")
FIELDS = rf"(?:{TOKEN}:{VALUE}\r\n)*+"
# An empty line before a request is skipped: some clients send one too many after a body.
HEAD = re.compile(
    rf"(?:\r\n)?(?P<command>{TOKEN}) (?P<target>[!-~\x80-\xff]+) (?P<version>HTTP/[0-9]\.[0-9])\r\n"
    rf"(?P<fields>{FIELDS})\r\n"
)
CHUNK_SIZE = re.compile(r"(?P<size>[0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0\r\n]*)?\r\n")
LENGTH = re.compile("[0-9]+")
TRAILERS = re.compile(rf"{FIELDS}\r\n")
ABSOLUTE_FORM = re.compile(r"(?i)https?://(?P<host>[^/?#]*)(?P<path>/.*)")

# Fields that may stand once in a request.
SINGLE_FIELDS = {
    "host",
    "authorization",
    "content-length",
    "transfer-encoding",
    "content-type",
    "content-encoding",
    "producer-id",
    "sequence",
    "expect",
}

# Addresses of this machine, as a Host or an Origin gives them.
LOOPBACK = r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]*)?"
LOOPBACK_HOST = re.compile(rf"(?i){LOOPBACK}")
LOOPBACK_ORIGIN = re.compile(rf"(?i)https?://{LOOPBACK}")
# So begin the names of the fields that a proxy adds.
PROXY_FIELDS = ("forwarded", "via", "x-forwarded", "x-real-ip")

JSON = "application/json"
NDJSON = "application/x-ndjson"
ACCEPT_POST = {"Accept-Post": f"{JSON}, {NDJSON}"}


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status, words, headers=None):
        super().__init__(status, words)
        self.status = status
        self.words = words  # for the sender
        self.headers = headers or {}  # of the answer


def too_large():
    """Return the Refusal of a body that is too long."""
    return Refusal(413, f"the body must be at most {MAX_BODY_BYTES:,} bytes long")


def not_whole():
    """Return the Refusal of a request whose end did not come."""
    return Refusal(408, f"the request ended early or took longer than {REQUEST_SECONDS} seconds")


class Headers(dict):
    """{name: value}, with names in lower case. The values of a repeated field are joined.

    Names are found in any case: whoever adds a method to Handler expects that of http.server.
    """

    def __getitem__(self, name):
        return super().__getitem__(name.lower())

    def __contains__(self, name):
        return super().__contains__(name.lower())

    def get(self, name, default=None):
        """Return the value of a field, or default without one."""
        return super().get(name.lower(), default)


class Request(NamedTuple):
    """The head of a request."""

    command: str  # GET
    path: str  # with a query, as it was sent
    version: str  # HTTP/1.1
    headers: Headers


class Framing(NamedTuple):
    """Where the body of a request ends."""

    length: int | None  # its bytes; None without a Content-Length
    chunked: bool


def read_request(rfile):
    """Read the head of a request, and return it; or raise Refusal."""
    head = HEAD.fullmatch(read_lines(rfile))
    if head is None:
        raise Refusal(400, "malformed request line or header")
    version = head["version"]
    if not version.startswith("HTTP/1."):
        raise Refusal(505, "the server speaks HTTP/1.1")
    if head["fields"].count("\n") > MAX_FIELDS:
        raise Refusal(431, f"a request must have at most {MAX_FIELDS} headers")
    headers = Headers()
    for name, value in FIELD.findall(head["fields"]):
        name = name.lower()
        value = value.strip(" \t")
        if name in headers:
            if name in SINGLE_FIELDS:
                raise Refusal(400, "a header is repeated that must stand once")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    if version != "HTTP/1.0" and "host" not in headers:
        raise Refusal(400, "the Host header is missing")
    path = head["target"]
    absolute = ABSOLUTE_FORM.fullmatch(path)
    if absolute is not None:  # RFC 9112, 3.2.2: it overrides Host
        headers["host"] = absolute["host"]
        path = absolute["path"]
    return Request(head["command"], path, version, headers)


def read_lines(rfile, first=b""):
    """Return first, which is nothing or a line, and the lines after it up to an empty one, or
    raise Refusal.

    An empty line that comes first ends nothing, as there is no line end before it. Two bare line
    feeds end the lines, too: they make a malformed head, which must be refused and not waited for.
    """
    lines = first
    while not lines.endswith((b"\n\r\n", b"\n\n")):
        status = 414  # the request line is too long
        if lines:
            status = 431
        lines += read_line(rfile, MAX_HEAD_BYTES - len(lines), status)
    return lines.decode("latin-1")


def read_line(rfile, limit, too_long):
    """Return the next line, or raise Refusal, with the status too_long if it has more than limit
    bytes, which may be none."""
    line = rfile.readline(limit)
    if line.endswith(b"\n"):
        return line
    if len(line) < limit:
        raise not_whole()
    raise Refusal(too_long, "the request line, the headers or a chunk's size are too long")


def find_framing(request):
    """Return how the body of a request is framed, or raise Refusal (RFC 9112, 6.3)."""
    coding = request.headers.get("transfer-encoding")
    length = request.headers.get("content-length")
    if coding is not None:
        known = coding.lower() == "chunked" and request.version != "HTTP/1.0"
        if length is not None or not known:
            words = "a body must have either one Content-Length or, in HTTP/1.1, "
            raise Refusal(400, words + "Transfer-Encoding: chunked")
        return Framing(None, True)
    if length is None:
        return Framing(None, False)
    if LENGTH.fullmatch(length) is None:
        raise Refusal(400, "malformed Content-Length")
    # Sixteen digits already exceed every limit, and int() refuses more than 4,300.
    digits = length.lstrip("0")[:16]
    return Framing(int(digits or "0"), False)


def read_body(rfile, framing, hold):
    """Read a body, and return it without its framing. Call hold(count) for each piece of so many
    bytes, which may refuse them. Or raise Refusal."""
    if framing.chunked:
        body = read_chunks(rfile, hold)
    else:
        body = read_exactly(rfile, framing.length, hold)
    return bytes(body)


def read_exactly(rfile, length, hold):
    """Return length bytes, as a bytearray, or raise Refusal."""
    # The pieces are not kept: many small ones would hold far more memory than their bytes.
    result = bytearray()
    while len(result) < length:
        left = length - len(result)
        piece = rfile.read1(min(left, PIECE_BYTES))
        if not piece:
            raise not_whole()
        hold(len(piece))
        result += piece
    return result


def read_chunks(rfile, hold):
    """Return the body of a chunked request (RFC 9112, 7.1), as a bytearray, or raise Refusal.
    Extensions and trailers are read and dropped."""
    body = bytearray()
    while True:
        line = read_line(rfile, MAX_HEAD_BYTES, 400)
        match = CHUNK_SIZE.fullmatch(line.decode("latin-1"))
        if match is None:
            raise Refusal(400, "malformed chunk size")
        size = int(match["size"], 16)
        if size == 0:
            break
        if len(body) + size > MAX_BODY_BYTES:
            raise too_large()
        body += read_exactly(rfile, size, hold)
        if read_exactly(rfile, 2, hold) != b"\r\n":
            raise Refusal(400, "a chunk is longer than its size")
    # Without trailers, the empty line comes directly behind the size line of the last chunk, and
    # read_lines must see that line's end.
    trailers = read_lines(rfile, line)
    if TRAILERS.fullmatch(trailers, len(line)) is None:
        raise Refusal(400, "malformed trailer")
    return body


def check_local(headers):
    """Raise Refusal if a request shows that it comes from elsewhere than this machine.

    A web page can make a local browser send requests here under the page's own host name (DNS
    rebinding), and a proxy on this machine passes on what comes from anywhere.
    """
    foreign = find_foreign(headers)
    if foreign:
        words = f"the request does not come from this machine: {foreign}. For such requests, set "
        raise Refusal(421, words + "EVENTS_AUTHORIZATION for the server")


def find_foreign(headers):
    """Return what shows that a request comes from elsewhere than this machine, or ""."""
    for name in headers:
        if name.startswith(PROXY_FIELDS):
            return f"its field {name} shows a proxy"
    origin = headers.get("origin")
    if origin is not None and LOOPBACK_ORIGIN.fullmatch(origin) is None:
        return "its Origin is not localhost or a loopback address"
    if LOOPBACK_HOST.fullmatch(headers.get("host", "")) is None:
        return "its Host is not localhost or a loopback address"
    return ""


def check_authorization(headers, secret):
    """Raise Refusal unless the request has the secret (bytes)."""
    given = headers.get("authorization", "").encode("latin-1")
    if not hmac.compare_digest(given, secret):
        words = "the Authorization header is missing or wrong"
        raise Refusal(401, words, {"WWW-Authenticate": "Bearer"})


def read_media_type(headers):
    """Return JSON or NDJSON, or raise Refusal."""
    media, _, _ = headers.get("content-type", "").partition(";")
    media = media.strip().lower()
    if media not in (JSON, NDJSON):
        raise Refusal(415, f"the Content-Type must be {JSON} or {NDJSON}", ACCEPT_POST)
    if headers.get("content-encoding", "identity").lower() != "identity":
        advice = {"Accept-Encoding": "identity", **ACCEPT_POST}
        raise Refusal(415, "the body must not be compressed", advice)
    return media


def read_event_id(headers):
    """Return the EventId that the sender gave to the first line, None without one; or raise
    Refusal."""
    producer = headers.get("producer-id")
    digits = headers.get("sequence")
    if producer is None and digits is None:
        return None
    sequence = None
    if digits is not None and re.fullmatch("[0-9]{1,16}", digits):
        sequence = int(digits)
    try:
        check_id(producer, sequence)
    except ValueError as error:
        words = f"both Producer-Id and Sequence are needed, or neither: {error}"
        raise Refusal(400, words) from None
    return EventId(producer, sequence)


def read_user(path):
    """Return the user id in /userEvents/<user id>, or raise Refusal."""
    encoded = path.removeprefix("/userEvents/")
    words = "the userId must be percent-encoded UTF-8"
    if re.search("%(?![0-9A-Fa-f]{2})", encoded):
        raise Refusal(400, words)
    try:
        return urllib.parse.unquote_to_bytes(encoded.encode("latin-1")).decode()
    except UnicodeDecodeError:
        raise Refusal(400, words) from None


# ---- Their answers ------------------------------------------------------------------------------

METHODS = {
    "/liveEvent": ("POST", "OPTIONS"),
    "/userEvents/": ("GET", "HEAD"),
    "/health": ("GET", "HEAD"),
}


class Logged(NamedTuple):
    """What is to be logged of a request, and what is then answered."""

    lines: bytes  # stamped; empty if no line of a batch is valid
    answer: bytes  # the body of the answer 200


@functools.lru_cache(maxsize=1)  # for the answers of one second
def http_date(second):
    """Return the second (of time.time) as HTTP writes it."""
    return email.utils.formatdate(second, usegmt=True)


class Connection:
    """What a worker knows of a connection. Any thread may read the fields. Who writes them:

    socket      the worker's main thread, once
    received    the connection's own thread, the handler's: when bytes last came
    deadline    the thread that has the right to answer: when the connection is cut off; math.inf
                while the server works on a whole request
    is_slow     the thread that has the right to answer: whether the peer does not read its answer,
                which a thread of its own goes on sending
    is_leaving  the worker's main thread: whether the connection ends with its next answer, or at
                once if none is owed

    The handler's thread takes the right to answer when it begins a request, and may hand it over
    with the request. The thread that has sent the answer gives it back. Times are in seconds of
    time.monotonic.
    """

    def __init__(self, wire):
        self.socket = wire
        self.received = time.monotonic()
        self.deadline = self.received + PEER_IDLE_SECONDS
        self.is_slow = False
        self.is_leaving = False
        # The right to answer. (With an Event, 6 % fewer requests are served.)
        self._answering = threading.Lock()

    def begin_answering(self):
        """Wait until no answer is owed, and take the right to answer."""
        self._answering.acquire()

    def end_answering(self):
        """Give the right to answer back: the answer was sent, or cannot be sent."""
        self._answering.release()

    def leave(self):
        """End the connection politely: what it has received is answered."""
        # First is_leaving is set, then is_slow is read; send_in_thread() does it the other way
        # round. So if both happen at once, one of the two threads sees it and ends the connection.
        self.is_leaving = True
        if self.is_slow:
            self.shut(socket.SHUT_RDWR)
        else:
            self.shut(socket.SHUT_RD)

    def cut_off(self, overdue):
        """End a connection that is overdue by so many seconds: at first its reading alone, so
        that it can still be sent an answer."""
        if overdue < DRAIN_SECONDS:
            self.shut(socket.SHUT_RD)
        else:
            self.shut(socket.SHUT_RDWR)

    def shut(self, how):
        """Shut a direction of the socket, or both; never raise."""
        with contextlib.suppress(OSError):  # it is closed already
            self.socket.shutdown(how)


class Incoming(io.RawIOBase):
    """What a connection receives. It notes when that was."""

    def __init__(self, connection):
        super().__init__()
        self._connection = connection
        self._receive = connection.socket.recv_into

    def readable(self):
        """Tell io.BufferedReader that this can be read."""
        return True

    def readinto(self, buffer):
        """Wait for bytes, put them into buffer and return their number, 0 at the end."""
        count = self._receive(buffer)
        self._connection.received = time.monotonic()
        return count


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Every request is read with strict framing, and answered once, in one send.

    The connection's own thread reads the requests. What must wait for the disk or the database is
    answered by the thread that works for the round, see Rounds:

        handler's thread   do_POST -> LogWriter.append -> Rounds.join, and returns
        working thread     Rounds.tell -> answer_in_round -> answer_logged -> answer
                           -> end_answering
        handler's thread   await_request -> begin_answering, which waits for end_answering

    As no request is begun before the previous one was answered, no two threads use the fields at
    once. (close_connection alone is looked at earlier, see await_request.)

    http.server's class opens and closes the files, and names the statuses. Its methods of reading
    and answering are replaced, and keep their contracts. These fields are ours:

    state     the Connection
    framing   the Framing of the request
    unread    whether a part of the request was not read: then the connection must end, so that
              the rest is never taken for a request
    held      how many bytes of the request and its answer are in the worker's account, until
              handle_one_request() returns
    answered  whether the request has its answer, which may still be on its way to the peer
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        """As http.server does, and note when bytes come."""
        super().setup()
        self.state = self.server.connections[self.connection]
        self.rfile = io.BufferedReader(Incoming(self.state))
        self.close_connection = False
        self.command = None
        self.unread = False
        self.held = 0
        self.answered = False

    def handle(self):
        """Answer one request after the other, while the connection is kept."""
        while self.await_request():
            self.handle_one_request()
        if self.unread:
            self.linger()

    def await_request(self):
        """Wait until the previous request is answered and the next one begins. Return True if it
        does, and False if the connection is to be closed. In both cases this thread then has the
        right to answer."""
        begins = False
        # The next request is waited for first: in the other order, this thread would be woken
        # twice a request. If the previous request already ends the connection, none will come.
        if not self.close_connection:
            with contextlib.suppress(OSError):  # the peer is gone
                begins = bool(self.rfile.peek(1))
        self.state.begin_answering()
        # The previous answer may have said that the connection ends.
        return begins and not self.close_connection

    def handle_one_request(self):
        """Read one request, and answer it or have it answered."""
        self.state.deadline = time.monotonic() + REQUEST_SECONDS
        self.answered = False
        try:
            if self.parse_request():
                method = self.find_method()
                method()
        except Refusal as refusal:
            self.refuse(refusal)
        except OSError:  # while the request was read: the peer is gone, or was cut off
            self.refuse(not_whole())
        except MemoryError:
            self.server.is_short_of_memory = True
            # Else this thread worked for a round, its answer among them, and printing failed.
            # (After another thread took the answer over, nothing here can fail: see Rounds.join.)
            if not self.answered:
                self.refuse(Refusal(503, "the server has not enough memory for this request"))
        except Exception:
            report_bug()
            if not self.answered:
                self.send_error(500)
        finally:
            # If its lines are still to be written, they and its answer count to GROUP_BYTES now.
            self.server.bodies.give_back(self.held)
            self.held = 0

    # -- Reading

    def parse_request(self):
        """Read the head of a request. Return True, with the results in command, path,
        request_version, headers, framing, unread and close_connection; or, as http.server does,
        refuse it and return False."""
        try:
            self.read_head()
        except Refusal as refusal:
            self.refuse(refusal)
            return False
        return True

    def read_head(self):
        """Do the work of parse_request, or raise Refusal."""
        self.command = None
        self.unread = True
        request = read_request(self.rfile)
        self.command = request.command
        self.path = request.path
        self.request_version = request.version
        self.headers = request.headers
        connection = self.headers.get("connection", "").lower()
        self.close_connection = request.version == "HTTP/1.0" or "close" in connection
        self.framing = find_framing(request)
        self.unread = self.framing.chunked or bool(self.framing.length)
        self.check_access()

    def check_access(self):
        """Raise Refusal unless the sender may ask."""
        secret = self.server.authorization
        if secret is None:
            check_local(self.headers)
        elif self.resource() != "/health":  # for which load balancers ask without a secret
            check_authorization(self.headers, secret)

    def resource(self):
        """Return the path without its query, still percent-encoded."""
        resource, _, _ = self.path.partition("?")
        return resource

    def find_method(self):
        """Return the method that answers the request, or raise Refusal."""
        resource = self.resource()
        if resource.startswith("/userEvents/"):
            resource = "/userEvents/"
        methods = METHODS.get(resource)
        if methods is None:
            words = "no such path; there are /liveEvent, /userEvents/<userId> and /health"
            raise Refusal(404, words)
        if self.command not in methods:
            allowed = ", ".join(methods)
            raise Refusal(405, f"the methods here are: {allowed}", {"Allow": allowed})
        return getattr(self, "do_" + self.command)

    def read_body(self):
        """Return the body; ask for it when its sender waits to be asked. Or raise Refusal."""
        framing = self.framing
        if framing.length is None and not framing.chunked:
            raise Refusal(411, "the request must have a Content-Length or be chunked")
        if not framing.chunked and framing.length > MAX_BODY_BYTES:
            raise too_large()
        expected = self.headers.get("expect")
        if expected is not None and self.unread and self.request_version != "HTTP/1.0":
            if expected.lower() != "100-continue":  # RFC 9110, 10.1.1
                raise Refusal(417, "the only known expectation is 100-continue")
            if self.send_at_once(b"HTTP/1.1 100 Continue\r\n\r\n"):
                raise OSError("the peer does not read")
        body = read_body(self.rfile, framing, self.hold)
        self.unread = False
        return body

    def hold(self, count):
        """Put bytes of the body or the answer into the worker's account, or raise Refusal when it
        is full."""
        if not self.server.bodies.take(count):
            raise Refusal(503, "the server holds too many requests that wait or are not whole yet")
        self.held += count

    # -- The methods: each answers, has somebody else answer, or raises Refusal

    def do_OPTIONS(self):
        """Answer what may be sent."""
        allowed = ", ".join(METHODS["/liveEvent"])
        self.answer(204, b"", {"Allow": allowed, **ACCEPT_POST})

    def do_GET(self):
        """Answer that the server is well, or have a user's revenue answered."""
        resource = self.resource()
        if resource == "/health":
            self.answer(200, b'{"status": "ok"}')
            return
        user = read_user(resource)
        if not is_user_id(user):  # the database is not asked for what no event has
            self.answer_revenue(user, None)
            return
        self.state.deadline = math.inf  # from now on the delay is the server's
        answer = functools.partial(self.answer_in_round, self.answer_revenue, user)
        self.server.revenues.find_revenue(user, answer)

    def do_HEAD(self):
        """Answer as to GET; render() leaves the body out."""
        self.do_GET()

    def do_POST(self):
        """Log the one event, or the valid lines of the batch, and have that answered when they
        are durable."""
        media = read_media_type(self.headers)
        first_id = read_event_id(self.headers)
        body = self.read_body()
        self.state.deadline = math.inf  # from now on the delay is the server's
        deadline = time.monotonic() + LOCK_SECONDS
        if media == JSON:
            logged = self.stamp_event(body, first_id)
        else:
            with self.server.decoding:
                logged = self.stamp_batch(body, first_id)
        if logged.lines:
            answer_bytes = len(logged.answer)
            self.hold(answer_bytes)
            answer = functools.partial(self.answer_in_round, self.answer_logged, logged.answer)
            self.server.log.append(logged.lines, deadline, answer, answer_bytes)
        else:
            self.answer(200, logged.answer)

    def stamp_event(self, body, event_id):
        """Return the Logged event in body, under event_id or, without one, an id of this worker;
        or raise Refusal."""
        if not body.strip():
            raise Refusal(400, "the body is empty")
        try:
            # Many senders end the line; without its end, most events are plain.
            line = judge_event(body.removesuffix(b"\n"))
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        if event_id is None:
            event_id = self.server.assign_ids(1)
        return Logged(stamp(line, event_id), b'{"message": "Event received"}')

    def stamp_batch(self, body, first_id):
        """Return the Logged valid lines of body, under ids from first_id on or, without one, ids of
        this worker; or raise Refusal."""
        if not body.endswith(b"\n"):
            body += b"\n"
        count = body.count(b"\n")
        if count > MAX_LINES:
            raise Refusal(413, f"a batch must have at most {MAX_LINES} lines")
        if first_id is not None and first_id.sequence + count - 1 > MAX_SEQUENCE:
            raise Refusal(400, "the last line's sequence would be above 2^53 - 1")
        accepted, events, rejected = judge_batch(body)
        result = {"message": "Events received", "accepted": events, "rejected": rejected}
        answer = json.dumps(result).encode()
        if not accepted:
            return Logged(b"", answer)
        if first_id is None:
            # Consecutive ids for the events alone: every gap would stay in the database.
            text = b"".join([lines.text for lines in accepted])
            return Logged(stamp(text, self.server.assign_ids(events)), answer)
        stamped = []
        for lines in accepted:
            event_id = EventId(first_id.producer, first_id.sequence + lines.index)
            stamped.append(stamp(lines.text, event_id))
        return Logged(b"".join(stamped), answer)

    # -- Answering, in any thread: nothing here waits or prints

    def answer_in_round(self, answer, *arguments):
        """Call answer(*arguments) in the thread that works for a round. If it fails, end the
        connection: its own thread would wait for the answer for ever."""
        try:
            answer(*arguments)
        except BaseException:
            self.state.shut(socket.SHUT_RDWR)
            self.state.end_answering()
            raise

    def answer_logged(self, body, error):
        """Answer that lines are durable, with body, or why they are not."""
        if error is None:
            self.answer(200, body)
            return
        status = 503
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            status = 507
        self.refuse(Refusal(status, f"the log cannot be written: {sentence(error)}"))

    def answer_revenue(self, user, revenue):
        """Answer a user's revenue, digit for digit, or that it is not known."""
        if isinstance(revenue, NoAnswer):
            self.refuse(Refusal(503, "the database does not answer", {"Retry-After": "2"}))
        elif revenue is None:
            self.refuse(Refusal(404, "no revenue is known for this user"))
        elif revenue.endswith(("NaN", "Infinity")):  # somebody else wrote it; JSON cannot say it
            self.refuse(Refusal(500, f"the revenue in the database is {revenue}"))
        else:
            self.answer(200, f'{{"userId": {json.dumps(user)}, "revenue": {revenue}}}'.encode())

    def send_error(self, code, message=None, explain=None):
        """Answer with an error, as http.server does, but in JSON."""
        words = explain or message or self.responses[code][1]
        self.refuse(Refusal(code, words))

    def refuse(self, refusal):
        """Answer with an error."""
        body = json.dumps({"error": refusal.words}).encode()
        self.answer(refusal.status, body, refusal.headers)

    def answer(self, status, body, headers=None):
        """Send the answer that is owed or, if the peer does not read, have it sent by a thread of
        its own. If that is not possible, end the connection."""
        self.state.deadline = time.monotonic() + PEER_IDLE_SECONDS
        if self.unread or self.state.is_leaving or self.server.stopping:
            self.close_connection = True
        try:
            unsent = self.send_at_once(self.render(status, body, headers or {}))
            self.answered = True
            if unsent:
                self.send_in_thread(unsent)
                return  # that thread ends the answering
        except (OSError, RuntimeError, MemoryError):  # the peer is gone, or there is no room
            self.answered = True
            self.state.shut(socket.SHUT_RDWR)
        self.state.end_answering()

    def render(self, status, body, headers):
        """Return the bytes of an answer."""
        phrase, _ = self.responses[status]
        date = http_date(int(time.time()))
        head = f"{self.protocol_version} {status} {phrase}\r\nDate: {date}\r\n"
        for name, value in headers.items():
            head += f"{name}: {value}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if self.close_connection:
            head += "Connection: close\r\n"
        head += "\r\n"
        if self.command == "HEAD":
            body = b""
        return head.encode() + body

    def send_at_once(self, data):
        """Send what the kernel takes without waiting, and return the rest."""
        try:
            sent = self.connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        return data[sent:]

    def send_in_thread(self, unsent):
        """Go on sending in a thread of its own. Or raise the reason if there is no room for that:
        OSError, RuntimeError for too many threads, or MemoryError."""
        if not self.server.unread_answers.take(len(unsent)):
            raise OSError(errno.ENOBUFS, "too many answers are unread")
        try:
            # First is_slow is set, then is_leaving is read; leave() does it the other way round.
            self.state.is_slow = True
            if self.state.is_leaving:
                raise OSError("the connection is to make room")
            threading.Thread(target=self.send_rest, args=[unsent], daemon=True).start()
        except BaseException:
            self.server.unread_answers.give_back(len(unsent))
            raise

    def send_rest(self, unsent):
        """Send the rest of the answer that is owed, until the connection is cut off."""
        try:
            self.connection.sendall(unsent)
        except OSError:  # the peer is gone, or was cut off
            self.state.shut(socket.SHUT_RDWR)
        self.server.unread_answers.give_back(len(unsent))
        self.state.is_slow = False
        self.state.end_answering()

    def linger(self):
        """Read on for DRAIN_SECONDS, until the worker ends it, or up to DRAIN_BYTES, and discard.

        Closing a socket with unread data resets the connection, and the answer may be lost on its
        way (RFC 9112, 9.6).
        """
        self.state.deadline = time.monotonic() + DRAIN_SECONDS
        self.connection.shutdown(socket.SHUT_WR)
        left = DRAIN_BYTES
        while left > 0:
            discarded = self.rfile.read1(PIECE_BYTES)
            if not discarded:
                break
            left -= len(discarded)


# ---- The processes ------------------------------------------------------------------------------


class Account:
    """Bytes that the connections of a worker hold together, up to a limit."""

    def __init__(self, limit):
        self._left = limit
        self._lock = threading.Lock()  # guards _left

    def take(self, count):
        """Count more bytes and return True; or return False if that would exceed the limit."""
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True

    def give_back(self, count):
        """Count that many bytes less."""
        with self._lock:
            self._left += count


class Worker:
    """One process's share of the server, which handlers know as self.server: a thread for each
    connection, on a listening socket that all workers share."""

    def __init__(self, listener, log, authorization):
        # These are for all threads.
        self.log = log
        self.authorization = authorization
        self.revenues = Revenues()
        self.bodies = Account(HELD_BODY_BYTES)
        self.unread_answers = Account(UNREAD_ANSWER_BYTES)
        # Held while a batch is decoded and stamped: all share one core, and with several of them a
        # new connection would wait for all of their turns.
        self.decoding = threading.Lock()
        # {socket: Connection} of all that are open. The main thread adds them, and each one's own
        # thread removes it.
        self.connections = {}
        # When it is True, every answer ends its connection. The main thread writes it.
        self.stopping = False
        # Whether memory was missing for a request. Any thread writes it.
        self.is_short_of_memory = False
        # The ids for events that come without.
        self._id_lock = threading.Lock()  # guards the next two
        self._producer = secrets.token_urlsafe(16)
        self._next_sequence = 1
        # These are for the main thread alone.
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        # A socket and its address for which there was no thread; the next accept() takes it up.
        self._accepted = None
        self._most_connections = most_connections()
        # Since when somebody has waited for room; math.inf if nobody does. make_room() sets it;
        # accept() with a connection, and run() when nobody waits, set it back.
        self._crowded_since = math.inf

    def run(self, lifeline):
        """Serve until lifeline, a pipe's reading end, reports that the parent stops or is dead, or
        until a sync of the log fails; then finish what was received. Return the exit status, or
        raise OSError or RuntimeError if there is no descriptor or thread for a connection."""
        threading.Thread(target=self.look_after, daemon=True).start()
        # Without room for another thread it could serve nobody: it ends now, not with the first
        # connection, so that the server ends if none of its workers can have one.
        one_more = threading.Thread(target=time.monotonic)
        one_more.start()
        one_more.join()
        with self._selector:
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._selector.register(lifeline, selectors.EVENT_READ)
            ready = set()
            while lifeline not in ready and not self.log.failure:
                if self._listener in ready or self._accepted is not None:
                    self.accept()  # without room, it pauses; the next look tries again
                else:
                    self._crowded_since = math.inf
                ready = self.wait(LOOK_SECONDS)
        self.stop()
        if self.log.failure:
            return EXIT_SYNC_FAILED
        return 0

    def wait(self, seconds):
        """Return which of the listener and the lifeline are ready, for at most so many seconds."""
        return {key.fileobj for key, _ in self._selector.select(seconds)}

    def accept(self):
        """Serve a connection from the backlog, in a thread of its own, and return True. Return
        False if there is none, or no room for it now: try again later. Raise the reason if this
        worker has no connection, and yet has had no room for ROOM_SECONDS: another worker, or a
        new one in place of this one, may have some."""
        count = len(self.connections)
        try:
            self.begin_connection()
        except (OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno not in NO_ROOM:
                return False  # another worker was faster, or the peer is gone
            if self.stopping:
                return False  # stop() ends all connections; the selector is closed already
            self.make_room(count)
            waited = time.monotonic() - self._crowded_since
            if not count and waited >= ROOM_SECONDS:
                raise
            return False
        self._crowded_since = math.inf  # who comes next has not waited for this worker yet
        return True

    def begin_connection(self):
        """Accept a connection, and start its thread. Or raise the reason why there is none or no
        room for it: OSError, RuntimeError for too many threads, or MemoryError."""
        if len(self.connections) >= self._most_connections:
            raise OSError(errno.EMFILE, "too many connections are open")
        if self._accepted is None:  # else one is left for which there was no thread
            self._accepted = self._listener.accept()
        wire, _ = self._accepted
        wire.setblocking(True)  # on macOS it inherits the listener's non-blocking mode
        self.connections[wire] = Connection(wire)
        try:
            target = self.serve_connection
            threading.Thread(target=target, args=self._accepted, daemon=True).start()
        except BaseException:
            del self.connections[wire]
            raise
        self._accepted = None

    def serve_connection(self, wire, address):
        """Serve a connection to its end."""
        try:
            with contextlib.suppress(OSError):  # the peer is gone
                Handler(wire, address, self)  # as in socketserver, this calls setup() and handle()
        except MemoryError:
            self.is_short_of_memory = True
        finally:
            del self.connections[wire]
            wire.close()

    def make_room(self, count):
        """Make room for a connection that waits, if it still does after a pause, and if none of
        the count connections has ended: have the one leave from which nothing has come for the
        longest time."""
        time.sleep(PAUSE_SECONDS)  # one may end, or another worker may take the one that waits
        if self._accepted is None and self._listener not in self.wait(0):
            return
        if len(self.connections) < count:
            return  # there is room now
        now = time.monotonic()
        self._crowded_since = min(self._crowded_since, now)
        # Others have a whole request, on which the server works.
        idle = [
            connection
            for connection in list(self.connections.values())
            if connection.deadline != math.inf
        ]
        if not idle or any(connection.is_leaving for connection in idle):
            return  # one is enough for now
        longest = min(idle, key=operator.attrgetter("received"))
        silent = now - longest.received
        waited = now - self._crowded_since
        if max(silent, waited) >= ROOM_SECONDS:
            longest.leave()

    def stop(self):
        """Refuse new connections and finish what was received, for at most STOP_SECONDS."""
        self.stopping = True
        begun = time.monotonic()
        # The kernel has accepted some, and those peers may have sent requests.
        while time.monotonic() < begun + BACKLOG_SECONDS:
            if not self.accept():
                break
        with contextlib.suppress(OSError):  # another worker was faster
            self._listener.shutdown(socket.SHUT_RD)  # for all processes that have it
        self._listener.close()
        for connection in list(self.connections.values()):
            # What has arrived can still be read on Linux; elsewhere it may be lost.
            connection.shut(socket.SHUT_RD)
        while self.connections and time.monotonic() < begun + STOP_SECONDS:
            time.sleep(0.01)

    def assign_ids(self, count):
        """Return the first one of count event ids, for events that come without."""
        with self._id_lock:
            first_id = EventId(self._producer, self._next_sequence)
            self._next_sequence += count
        return first_id

    def look_after(self):
        """Again and again, cut off the connections that are past their deadlines, and say when
        memory begins to be short and when it is no more. (Once the worker stops, STOP_SECONDS
        bounds all of them.)"""
        troubles = Troubles()
        while not self.stopping:
            time.sleep(DRAIN_SECONDS / 4)
            with contextlib.suppress(MemoryError):  # for the next look there may be some
                self.cut_off_overdue()
                if self.is_short_of_memory:
                    self.is_short_of_memory = False
                    troubles.begin("Memory", "there is not enough; some requests are refused.")
                else:
                    troubles.end("Memory", "there is enough again.")

    def cut_off_overdue(self):
        """Cut off the connections that are past their deadlines."""
        now = time.monotonic()
        for connection in list(self.connections.values()):
            overdue = now - connection.deadline
            if overdue > 0:
                connection.cut_off(overdue)


def most_connections():
    """Return how many connections a worker may have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    opened = 0
    with contextlib.suppress(OSError):  # without it, the reserve is enough for those
        opened = len(os.listdir("/dev/fd"))
    return max(1, min(MAX_CONNECTIONS, limit - opened - RESERVED_DESCRIPTORS))


class WorkersStuck(Exception):
    """Workers did not end in time after they were told to, and were killed."""


class Supervisor:
    """Keeps a number of workers running. Only the parent's one thread, and the handlers of its
    signals, use it."""

    def __init__(self, new_worker, count):
        self._new_worker = new_worker
        self._count = count
        self._started = {}  # {process id: when it was started} of the workers that run
        self._quick_deaths = 0  # in a row
        self._status = 0
        # The lifeline is a pipe's reading end, which every worker watches. Only this process has
        # the writing end: closing it, on purpose or by dying, tells the workers to stop.
        self._lifeline, writing_end = os.pipe()
        self._writing_end = open(writing_end, "wb", buffering=0)

    def run(self, announcement):
        """Start the workers, say announcement, and replace workers that die, until SIGTERM,
        Ctrl-C or a failed sync. Return the exit status, or raise OSError if one of the first
        workers cannot be started."""
        # If SIGCHLD were ignored, the kernel would not report a worker's end.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, self._kill)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        # Whoever started this process may have blocked them.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        try:
            for _ in range(self._count):
                self._start_worker()
            say(announcement)
            while self._started:
                self._reap()
                self._start_missing()
        except WorkersStuck:
            warn("Workers did not stop in time and were killed; some requests have no answer.")
            return 1
        finally:
            signal.alarm(0)
            self._writing_end.close()
            os.close(self._lifeline)
        return self._status

    def _stop(self, *_):
        """Tell the workers to stop, and kill those that do not end in time. (Also the handler of
        SIGTERM and SIGINT, whose arguments do not matter.)"""
        if self._is_stopping():
            return  # who asks again gives them no more time
        self._writing_end.close()
        signal.alarm(math.ceil(STOP_SECONDS + KILL_SECONDS))

    def _is_stopping(self):
        """Tell whether the workers were told to stop."""
        return self._writing_end.closed

    def _kill(self, *_):
        """Kill the workers, which did not end in time, and raise WorkersStuck: as this is the
        handler of SIGALRM, that ends whatever run() is doing, such as its wait for a worker. If
        nobody has told them to stop, the signal came from elsewhere: tell them now."""
        if not self._is_stopping():
            self._stop()
            return
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        raise WorkersStuck

    def _reap(self):
        """Take note of all workers that have ended. Wait for the first one if there is nothing
        else to do, because no worker is to be started."""
        options = 0  # wait
        if self._is_missing_one():
            options = os.WNOHANG
        while self._started:
            # The handler of a signal runs while this waits, and then the waiting goes on.
            process, wait_status = os.waitpid(-1, options)
            if not process:
                return
            started = self._started.pop(process, None)
            # Others are of an earlier program in this process, or orphans, if this is process 1.
            if started is not None:
                self._worker_ended(os.waitstatus_to_exitcode(wait_status), started)
                options = os.WNOHANG  # for those that have ended meanwhile

    def _is_missing_one(self):
        """Tell whether a worker is to be started."""
        return len(self._started) < self._count and not self._is_stopping()

    def _worker_ended(self, status, started):
        """Say that a worker, which was started at that time, ended with a status; stop the server
        if its log failed or no worker lives long."""
        if status == EXIT_SYNC_FAILED:
            self._status = 1
            self._stop()
        elif not self._is_stopping():
            warn(f"A worker ended with status {status}; starting another.")
            self._count_quick_death(started)

    def _count_quick_death(self, started):
        """Stop the server when QUICK_DEATHS workers in a row have died soon after their start. It
        goes on as long as one lives longer, also if another one dies again and again."""
        recently = time.monotonic() - QUICK_DEATH_SECONDS
        oldest = min([started, *self._started.values()])
        if oldest < recently:
            self._quick_deaths = 0
            return
        self._quick_deaths += 1
        if self._quick_deaths >= QUICK_DEATHS:
            warn(f"The server ends: {QUICK_DEATHS} workers in a row ended soon after their start.")
            self._status = 1
            self._stop()

    def _start_missing(self):
        """Start a worker if one is missing and the server does not stop."""
        if not self._is_missing_one():
            return
        time.sleep(RESTART_SECONDS)
        # If the server is told to stop meanwhile, the lifeline tells the new worker, too.
        try:
            self._start_worker()
        except OSError as error:  # there is no room for another process now
            if not self._started:  # which ends run(), too
                warn(f"The server ends: no worker can be started ({sentence(error)}).")
                self._status = 1

    def _start_worker(self):
        """Start a process that exits with what the worker's run() returns, or raise OSError."""
        # A terminal or systemd tells every process to stop, but the parent decides. From its first
        # moment on, a worker must not run the parent's handlers, which would kill the others: both
        # signals stay blocked in it.
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            process = os.fork()
            if not process:
                self._work()  # it does not return
            self._started[process] = time.monotonic()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)

    def _work(self):
        """Be a worker, and exit with what its run() returns."""
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            self._writing_end.close()
            status = self._new_worker().run(self._lifeline)
        except (OSError, RuntimeError, MemoryError) as error:  # it lacks a descriptor or a thread
            warn(f"A worker cannot work: {sentence(error)}.")
        except BaseException:
            report_bug()
        finally:
            os._exit(status)  # without waiting for a thread that hangs in a name look-up


# ---- The command line ---------------------------------------------------------------------------


def parse_command_line(arguments):
    """Return the options, or exit with status 2."""
    parser = Parser(HELP)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on, 0 for any (default: %(default)s)"
    )
    parser.add_argument(
        "--log", default=DEFAULT_LOG, help="file to append to (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="(default: one per core, %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        parser.error("--port must be from 0 to 65535")
    if not options.log:
        parser.error("--log must name a file")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


# Names of authentication schemes: IANA's registry, and others in use. A scheme without credentials
# is no secret: the variable that should have held them was not set.
SCHEMES = (
    b"basic bearer concealed digest dpop gnap hoba mutual negotiate oauth privatetoken scram-sha-1 "
    b"scram-sha-256 vapid apikey aws4-hmac-sha256 hmac ntlm token"
)


def read_authorization():
    """Return the value that the Authorization header must have, None if EVENTS_AUTHORIZATION is
    not set; or raise Failure, with words for doing(), when it holds no secret."""
    value = os.environb.get(b"EVENTS_AUTHORIZATION")
    if value is None:
        return None
    value = value.strip(b" \t")
    if not value:
        raise Failure("it is set, but empty. Put a secret into it, or unset it")
    if not FIELD.fullmatch(f"Authorization:{value.decode('latin-1')}\r\n"):
        raise Failure("it has a line end or another control character, which no header can carry")
    if value.lower().startswith(b"authorization:"):
        raise Failure("it begins with the name of the header. Put only its value there")
    scheme, _, credentials = value.partition(b" ")
    if scheme.lower().rstrip(b":") in SCHEMES.split():
        # "Bearer ," had two empty variables. "Og==" is base64 of ":", without user and password.
        if not re.search(rb"[0-9A-Za-z]", credentials) or credentials.strip() == b"Og==":
            raise Failure("it names a scheme, but the credentials after it are missing")
    # A shell would put the variable's value there; systemd's EnvironmentFile does not.
    if re.search(rb"(^|\s)[$](\w+|[{]\w+[}])$", value):
        raise Failure("it has the name of a variable where its value should be")
    return value


def listen(host, port):
    """Return a listening socket, or raise OSError, or UnicodeError for a malformed host."""
    addresses = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, address = addresses[0]
    listener = socket.create_server(address, family=family, backlog=BACKLOG)
    # Every worker wakes for each connection, and accept() must not block those that come late.
    listener.setblocking(False)
    return listener


def check_listener(listener):
    """Raise Failure, with words for doing(), if others than this machine can reach the listener."""
    host, *_ = listener.getsockname()
    if not ipaddress.ip_address(host).is_loopback:
        raise Failure(
            "everyone could send events there. Set EVENTS_AUTHORIZATION to the value that the "
            "Authorization header of every request must have, or listen on 127.0.0.1"
        )


def raise_descriptor_limit():
    """Allow this process enough descriptors, if it is permitted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):  # fewer connections find room then
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def doing(task):
    """Raise Failure, which names the task, if what is done in this context fails."""
    try:
        yield
    except (Failure, OSError, UnicodeError) as error:
        raise Failure(f"Cannot {task}: {sentence(error)}.") from error


def serve(options):
    """Serve as the options say and return the exit status, or raise Failure."""
    log = LogWriter(options.log)
    with contextlib.ExitStack() as stack:
        with doing("use EVENTS_AUTHORIZATION"):
            authorization = read_authorization()
        place = f"{options.host or 'all addresses'} port {options.port}"
        with doing(f"listen on {place} (choose others with --host and --port)"):
            listener = stack.enter_context(listen(options.host, options.port))
            if authorization is None:
                check_listener(listener)
        with doing(f"write the log {options.log} (name another with --log)"):
            log.check()
        host, port, *_ = listener.getsockname()
        if ":" in host:
            host = f"[{host}]"
        announcement = (
            f"Listening on http://{host}:{port}, logging to {options.log}, "
            f"{options.workers} workers."
        )
        new_worker = functools.partial(Worker, listener, log, authorization)
        with doing(f"start {options.workers} processes (choose another number with --workers)"):
            return Supervisor(new_worker, options.workers).run(announcement)


def main(arguments=None):
    """Run the command line and return its exit status."""
    options = parse_command_line(arguments)
    # Until the supervisor takes it over, Ctrl-C ends the process quietly.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise_descriptor_limit()
    try:
        return serve(options)
    except Failure as failure:
        warn(str(failure))
        return 1


if __name__ == "__main__":
    sys.exit(main())
