"""Send the events of a file to the server, each exactly once, then exit.

The promise is kept by the file FILE.delivery and the class StateFile, which can be read alone.
The parts of this file, in order: what is printed; files; the state file; the source file;
requests; the end of a delivery; the command line. It needs Python's standard library alone and
can be copied to any machine by itself.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import email.utils
import errno
import functools
import hashlib
import http.client
import json
import math
import os
import random
import re
import secrets
import select
import signal
import socket
import stat
import sys
import threading
import time
import typing
import urllib.error
import urllib.parse
import urllib.request
import zlib

if sys.version_info < (3, 11):
    sys.exit("client.py needs Python 3.11 or newer.")
try:
    import fcntl
except ImportError:
    sys.exit("client.py locks files with fcntl: it needs Linux or macOS, or WSL on Windows.")
try:
    import ssl
except ImportError:
    ssl = None

# What --help says. It is no docstring, because python -OO removes those.
DESCRIPTION = """\
Send the events of a file to the server, each exactly once, then exit.

FILE.delivery keeps the id of the delivery and how far it is, until every line has been answered.
If the client is interrupted, run the same command again: it goes on, and nothing counts twice.
EVENTS_AUTHORIZATION is sent as the Authorization header.

Example: python client.py events.jsonl --url http://localhost:8000/liveEvent
"""

# Bytes of a request's body, at most. The server takes 1 MiB.
BATCH_BYTES = 512 * 1024
# Bytes of the first batches, and those below which batches do not become smaller: the slowest line
# and the slowest server can take these in time.
SMALLEST_BATCH_BYTES = 4 * 1024
# A batch that is too slow is sent again in so many parts, and the next ones are as small as these.
PARTS = 8
# An answer that took at most this share of the time that it has lets the next batches be twice as
# large as its own: they then take about half of that time.
FAST_SHARE = 0.25
# Bytes that are read at once from the file for its hash, and from a line longer than a batch.
READ_BYTES = 256 * 1024
# Requests that are under way at once: enough to keep the server busy while answers travel.
CONCURRENT_REQUESTS = 4
# Batches that are read and not yet answered. All that is held in memory are these, the one that is
# read and the one that was answered last. So many that no request waits for the file.
BATCHES_AHEAD = CONCURRENT_REQUESTS + 2
# Bytes that are read at once from an answer. Most answers are shorter.
ANSWER_BLOCK_BYTES = 16 * 1024
# Bytes of an answer, at most: 10,000 rejected lines with an error each.
MAX_ANSWER_BYTES = 8 * 1024 * 1024
# Bytes of a note in FILE.delivery, at most: a batch whose bytes are all escaped, and more.
MAX_NOTE_BYTES = 8 * BATCH_BYTES
# Characters of a server's words that are shown.
MAX_WORDS = 300

# Seconds for an address to take a connection; then the next address is tried.
CONNECT_SECONDS = 5.0
# Seconds for the network to take a byte of a request; then the request has failed.
STALL_SECONDS = 10.0
# Seconds for an answer to arrive although its request could not be sent whole.
REFUSAL_SECONDS = 1.0
# Seconds between two probes of a peer that says nothing. After this number of probes without an
# answer its host has vanished, and nobody waits for it any more.
PROBE_SECONDS = 5
PROBES = 3
# Seconds that a socket waits at most, however large --give-up-after is: a day.
LONGEST_WAIT_SECONDS = 86_400.0
# Seconds before a request is sent again for the first time. The pause doubles each time.
FIRST_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 5.0
# Seconds without success are counted in steps of this length. After the first step, we say that we
# wait. We do the same when stdout does not take the receipt.
STEP_SECONDS = 1.0
# Where requests have succeeded, and none has failed since, we say it after so many seconds: a disk
# of the server that is slow for a moment is no trouble.
SILENT_SECONDS = 5.0
# Seconds that a line on stderr, or the help, waits for a reader that is only slow.
READER_SECONDS = 0.1

JSON = "application/json"
NDJSON = "application/x-ndjson"
# Statuses by which a server of single events refuses one event and not the request.
EVENT_REFUSALS = (400, 413, 422)
# Statuses with which a server answers OPTIONS that does not know it.
OPTIONS_UNKNOWN = (404, 405, 501)
# What to do about a status, where we know more than the server says.
ADVICE = {
    401: " Set EVENTS_AUTHORIZATION to the value that the server was started with.",
    413: " Lower --batch-size.",
}
# What to do when no request succeeds: in general, when the server cannot be reached, and when the
# proxy cannot be reached.
RETRY_ADVICE = "When that has ended, run this command again to go on."
SERVER_ADVICE = (
    "Start the server, or name another with --url; then run this command again to go on."
)
PROXY_ADVICE = (
    "Correct http_proxy or https_proxy, or name the server in no_proxy; then run this command "
    "again to go on."
)
# What to do about a delivery that cannot go on.
TWICE = "lines that were already delivered then count twice."
RESTART_ADVICE = (
    f"Restore it, or run again with --restart to send the whole file as a new delivery; {TWICE}"
)
# What http.client says when a proxy answers CONNECT with 4xx. With 408 or 429 it may do it later.
PROXY_REFUSAL = re.compile("Tunnel connection failed: 4(?!08|29)")
# A producer id as the server takes it.
PRODUCER_ID = re.compile("[A-Za-z0-9_-]{1,64}")
# How FILE.delivery begins.
STATE_BEGINNING = b'{"producerId": "'


class Failure(Exception):
    """Something that ends the run; each argument is a sentence that says what is wrong or what to
    do."""


# ---- What is printed ----------------------------------------------------------------------

# client.py must run without the other scripts. So these are copies of functions of
# data_processor.py, under the same names and with the same contracts: write,
# write_without_waiting, printable, is_terminal, write_line, show_progress, open_regular, leads_to
# and, far below, Parser. (write_all is one of server.py's, PRODUCER_ID one of data_processor.py's.)
# Whoever changes one changes both.


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


def show_progress(words):
    """Show words on stderr, if that is a terminal, in one line that the next output replaces."""
    if is_terminal(sys.stderr):
        width = 80
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(sys.stderr.fileno()).columns or width
        write(sys.stderr, "\r\033[K" + printable(words)[: width - 1])


class Stderr:
    """Lines on stderr. Only the main thread prints.

    dropped  how many lines were dropped since the last one that was written
    """

    def __init__(self):
        self.dropped = 0

    def line(self, words):
        """Write a line. A reader that is only slow is waited for; after a line that was dropped,
        nothing waits until something can be written again."""
        if self.dropped:
            # The last one may have been written in part.
            notice = f"\n({self.dropped} lines could not be printed here.)\n"
            if not write(sys.stderr, notice):
                self.dropped += 1
                return
            self.dropped = 0
        if not write_line(sys.stderr, words, READER_SECONDS):
            self.dropped += 1


STDERR = Stderr()


def warn(words):
    """Print a line to stderr."""
    STDERR.line(words)


def hide_password(words):
    """Return words without what stands between "://" and "@" in a URL that was typed."""
    shown = []
    for word in words.split(" "):
        scheme, separator, rest = word.partition("://")
        _, at, address = rest.rpartition("@")
        if at:
            word = scheme + separator + address
        shown.append(word)
    return " ".join(shown)


# ---- Files --------------------------------------------------------------------------------


def open_regular(path, flags, mode=0o640):
    """Return a descriptor of the regular file at path, or raise OSError, also if it is anything
    else."""
    # O_NONBLOCK: a named pipe would wait for a writer.
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "is not a regular file", path)


def leads_to(path, fd):
    """Tell whether path still leads to the open file fd, which was neither renamed nor removed."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False


def write_all(fd, data):
    """Write all bytes to fd, or raise OSError."""
    while data:
        written = os.write(fd, data)
        data = data[written:]


@contextlib.contextmanager
def naming(path):
    """Let an OSError of a descriptor name the file that it belongs to."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


def sync(fd):
    """Return when a file or directory is on the disk, or raise OSError.

    A file system that has no sync at all does not stop a delivery: it is safe from a kill there,
    and from a power cut nothing is.
    """
    try:
        if hasattr(fcntl, "F_FULLFSYNC") and stat.S_ISREG(os.fstat(fd).st_mode):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # macOS: fsync stops at the drive's cache
        else:
            os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise


def sync_directory_of(path):
    """Return when the names in a file's directory are on the disk, or raise OSError."""
    directory = os.path.dirname(path)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with naming(directory):
            sync(fd)
    finally:
        os.close(fd)


def decode_object(text):
    """Return the JSON object in text, or None if it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return value
    return None


def is_count(value):
    """Tell whether a JSON value is a whole number from 0 on. (True is an int in Python.)"""
    return type(value) is int and value >= 0


# ---- The state file -----------------------------------------------------------------------


class Content(typing.NamedTuple):
    """What is in the source file when a delivery begins."""

    size: int  # in bytes; what is appended later is not sent
    sha256: str  # in hexadecimal


class Progress(typing.NamedTuple):
    """How far the source file is answered, from its start and without a gap."""

    lines: int = 0  # blank ones included
    offset: int = 0  # where the next line begins, in bytes
    accepted: int = 0  # events
    rejected: int = 0  # events

    def words(self):
        """Return how many events were answered, in words."""
        return f"{self.accepted:,} events accepted, {self.rejected:,} rejected"


class Note(typing.NamedTuple):
    """A line of FILE.delivery behind the first one."""

    progress: Progress  # when it was written
    rejected_lines: list  # since the note before, as they were sent, in bytes, without line ends
    rejected_name: str | None = None  # of the file that gets the rejected lines of all notes

    def encode(self):
        """Return the line, in bytes."""
        texts = [line.decode("latin-1") for line in self.rejected_lines]  # any bytes are a text so
        fields = {"rejectedLines": texts, "rejectedLinesIn": self.rejected_name}
        return encode_line(self.progress._asdict() | fields)


def decode_note(line):
    """Return the Note that line holds, or None if it is none that is whole. (Those of clients of
    earlier versions had no checksum: their deliveries begin anew, with the same event ids.)"""
    fields = decode_line(line)
    if fields is None or not line.endswith(b"\n"):
        return None
    progress = Progress(*[fields[name] for name in Progress._fields])
    rejected_lines = [text.encode("latin-1") for text in fields["rejectedLines"]]
    return Note(progress, rejected_lines, fields.get("rejectedLinesIn"))


def encode_line(fields):
    """Return a line of FILE.delivery, in bytes, with its checksum as one more field."""
    return json.dumps({**fields, "crc32": checksum(fields)}).encode() + b"\n"


def decode_line(line):
    """Return the fields that encode_line() was given, or None if line is not what it returned, with
    or without its line end."""
    fields = decode_object(line)
    if fields is None:
        return None
    crc32 = fields.pop("crc32", None)
    if crc32 != checksum(fields):
        return None
    return fields


def checksum(fields):
    """Return the CRC-32 of fields as JSON."""
    return zlib.crc32(json.dumps(fields).encode())


class StateFile:
    """FILE.delivery: the lock and the memory of one delivery. The client's promise is kept here.

    The first line holds the producer id and the content of the source file. It is durable before
    the first request. Line i of the source file is always sent with the event id (producer id, i),
    by which the system recognises it when it is sent again. So a client that goes on with the same
    producer id counts nothing twice, wherever the one before was killed.

    Behind the first line stands a note for each answered batch. With it a client goes on where the
    one before was, and loses no rejected line. Notes are not made durable at once: what a power
    cut takes is sent again, and rejected again. The last note of a complete delivery with rejected
    lines names the file that gets them, see collect_rejected_lines().

    The file is changed only under its lock and only through the descriptor that is locked, so
    that nobody's delivery is touched by name.

    path           of the file
    producer_id    of the delivery, once load() has found or begin() has made one
    progress       of the last note
    rejected_path  path of the file of rejected lines, once it is named here; None before
    _source        path of the source file
    _fd            the descriptor, which holds the lock; it has one position, so that only one
                   reader may use it at a time
    _end           where the last whole line ends, in bytes; the next one is written there
    """

    def __init__(self, source):
        """Open and lock FILE.delivery of a source file; raise Failure or OSError.

        It is created if it is missing.
        """
        self._source = source
        self.path = source + ".delivery"
        self.producer_id = None
        self.progress = Progress()
        self.rejected_path = None
        self._end = 0
        self._fd = self._lock()

    def _lock(self):
        """Return the descriptor of the file, locked; create the file if it is missing. Raise
        Failure or OSError."""
        while True:
            # O_RDWR: a file on NFS can only be locked by somebody who may write it.
            fd = open_regular(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                with naming(self.path):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                words = f"{self._source} is being sent by another client. Wait until it is done."
                raise Failure(words) from None
            # Another client may have ended, and removed the file, before we locked it.
            if leads_to(self.path, fd):
                return fd
            os.close(fd)

    def load(self, restart):
        """Learn the state of the unfinished delivery, and return the Content that it is of; or
        return None to begin one, with restart in any case but one: a file that client.py did not
        write is never overwritten. Raise Failure if neither is right."""
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            line = file.readline(MAX_NOTE_BYTES).rstrip(b"\0")  # a power cut can leave these
        if not line.startswith(STATE_BEGINNING) and not STATE_BEGINNING.startswith(line):
            words = f"{self.path} was not written by client.py, or is damaged."
            raise Failure(f"{words} Restore it, or rename it to begin a new delivery; {TWICE}")
        # A first line that was not written to its end means that nothing was sent.
        is_whole = b"}" in line or line.endswith(b"\n")
        if restart or not is_whole:
            return None
        state = decode_line(line)
        if state is None:
            # Clients of earlier versions wrote no checksum, and no line end either.
            state = decode_object(line) or {}
        producer_id = state.get("producerId")
        is_known = state.keys() == {"producerId", *Content._fields} and isinstance(producer_id, str)
        if not is_known or not PRODUCER_ID.fullmatch(producer_id):
            raise Failure(f"{self.path} cannot be understood. {RESTART_ADVICE}")
        self.producer_id = producer_id
        self._end = len(line)
        for note, end in self._read_notes():
            self.progress = note.progress
            self._end = end
            if note.rejected_name:
                self.rejected_path = os.path.join(os.path.dirname(self.path), note.rejected_name)
        return Content(state["size"], state["sha256"])

    def rejected_lines(self):
        """Yield the rejected lines of all notes."""
        for note, _ in self._read_notes():
            yield from note.rejected_lines

    def _read_notes(self):
        """Yield each Note and where it ends in the file, up to the first that is not whole."""
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            end = len(file.readline(MAX_NOTE_BYTES))
            while True:
                line = file.readline(MAX_NOTE_BYTES)
                note = decode_note(line)
                if note is None:
                    return
                end += len(line)
                yield note, end

    def begin(self, content):
        """Begin a delivery under a new producer id; return when that is durable, or raise
        OSError."""
        self.producer_id = secrets.token_urlsafe(16)
        self.progress = Progress()
        state = {"producerId": self.producer_id, **content._asdict()}
        self._end = 0
        self._append(encode_line(state))
        self._sync_with_name()

    def resume(self):
        """Go on with the delivery that load() found; return when it is durable. (The client before
        may have been killed before that was done.) Raise OSError."""
        with naming(self.path):
            last_byte = os.pread(self._fd, 1, self._end - 1)
        if last_byte != b"\n":  # the first line has no end
            self._append(b"\n")
        self._sync_with_name()

    def note(self, progress, rejected_lines):
        """Note that a batch was answered, and its rejected lines; raise OSError if they cannot be
        kept."""
        try:
            self._append(Note(progress, rejected_lines).encode())
        except OSError:
            # A note's counts are totals: without rejected lines, the next one says all that this
            # one would have said.
            if rejected_lines:
                raise
        self.progress = progress

    def note_rejected_path(self, path):
        """Note which file, in this directory, gets the rejected lines; return when all notes are
        durable, or raise OSError."""
        self._append(Note(self.progress, [], os.path.basename(path)).encode())
        with naming(self.path):
            sync(self._fd)
        self.rejected_path = path

    def _append(self, line):
        """Write a line behind those that are whole, or raise OSError."""
        with naming(self.path):
            # No line may stand behind a torn one, which a failed write may have left.
            os.ftruncate(self._fd, self._end)
            write_all(self._fd, line)
        self._end += len(line)

    def _sync_with_name(self):
        """Return when the file and its name are on the disk, or raise OSError."""
        with naming(self.path):
            sync(self._fd)
        sync_directory_of(self.path)

    def is_in_place(self):
        """Tell whether the path still leads to this file."""
        return leads_to(self.path, self._fd)

    def forget(self):
        """End the delivery: the next client begins a new one. Raise OSError if it cannot be ended.

        Once the file is empty, nothing more can go wrong: should it come back after a power cut,
        then only the receipt is printed once more.
        """
        with naming(self.path):
            os.ftruncate(self._fd, 0)
        with contextlib.suppress(OSError):
            sync(self._fd)
        # Somebody may have renamed the file, and another client may have made a new one.
        with contextlib.suppress(OSError):
            if self.is_in_place():
                os.unlink(self.path)
                sync_directory_of(self.path)

    def close(self):
        """Release the lock."""
        os.close(self._fd)


# ---- The source file ----------------------------------------------------------------------


class Batch(typing.NamedTuple):
    """Consecutive lines that are sent together."""

    first: int  # the number of the first line in the file, from 1 on
    lines: int
    events: int  # lines that are not blank
    body: bytes  # what is sent: the lines, each with its line end
    end: int = 0  # where it ends in the file, in bytes; a part that is sent again has none

    def parts(self):
        """Return the same lines, which are two at least, as up to PARTS batches."""
        lines = self.body.split(b"\n")
        lines.pop()  # what is behind the last line end: nothing
        step = math.ceil(self.lines / PARTS)
        return [
            make_batch(self.first + begin, lines[begin : begin + step])
            for begin in range(0, self.lines, step)
        ]


def make_batch(first, lines):
    """Return the Batch of some lines, given without their line ends."""
    events = [line for line in lines if line.strip()]
    body = b"\n".join([*lines, b""])
    return Batch(first, len(lines), len(events), body)


class BatchSize:
    """How large the next batch may be.

    The main thread sets lines before the first batch, and reads both; the threads of requests
    change bytes. It is only a guess, so that it needs no lock: two of them may overwrite each
    other's change.

    lines  at most
    bytes  at most, unless a line alone is longer
    """

    def __init__(self, lines):
        self.lines = lines
        self.bytes = SMALLEST_BATCH_BYTES

    def answered_fast(self, length):
        """Let batches grow to twice the length, in bytes, of one that was answered fast."""
        # Not to twice what they are now: of several that are under way at once, each would double
        # it. And a line that is longer than the others says little about them.
        grown = 2 * min(length, self.bytes)
        self.bytes = max(self.bytes, min(grown, BATCH_BYTES))

    def timed_out(self):
        """Let batches become smaller."""
        self.bytes = max(self.bytes // PARTS, SMALLEST_BATCH_BYTES)


class Source:
    """The file that is sent, as long as it was when the run began.

    It is read twice: measure() reads it to its end for its hash, and batches() reads what is to be
    sent. is_unchanged() tells whether both found the same.

    name      as the user typed it
    content   the Content that measure() found
    _path     from where it was opened
    _fd       the descriptor
    _offset   up to here, in bytes, the file is in batches
    _hash     SHA-256 of the bytes before _offset, as they were sent; those that were sent by an
              earlier run are as measure() found them
    """

    def __init__(self, name, path):
        """Open the file at path, or raise OSError."""
        self.name = name
        self.content = None
        self._path = path
        try:
            self._fd = open_regular(path, os.O_RDONLY)
        except OSError as error:
            error.filename = name
            raise
        self._offset = 0
        self._hash = hashlib.sha256()

    def is_in_place(self):
        """Tell whether the path still leads to this file."""
        return leads_to(self._path, self._fd)

    def measure(self, offset):
        """Read the file to learn its content. Batches will begin at offset. Raise OSError."""
        digest = hashlib.sha256()
        self._offset = self._hash_between(0, offset, digest)
        self._hash = digest.copy()
        size = self._hash_between(self._offset, math.inf, digest)
        self.content = Content(size, digest.hexdigest())

    def _hash_between(self, position, end, digest):
        """Feed digest with the bytes from a position to an end, or to the end of the file; return
        where they end."""
        while position < end:
            data = os.pread(self._fd, min(READ_BYTES, end - position), position)
            if not data:
                break
            digest.update(data)
            position += len(data)
        return position

    def batches(self, first, size):
        """Yield the lines of the file from the first one on, which begins at the offset given to
        measure(), as batches of at most a BatchSize. Raise Failure if the file became shorter."""
        while self._offset < self.content.size:
            batch = self._next_batch(first, size)
            yield batch
            first += batch.lines

    def _next_batch(self, first, size):
        """Return the next Batch, and move _offset behind it.

        Of a line that is longer than BATCH_BYTES, the beginning is sent with "..." behind it: it
        is no JSON then, and the server rejects it.
        """
        lines = self._next_lines(size)
        if lines:
            batch = make_batch(first, lines)
            self._pass_over(batch.body)
        else:
            batch = make_batch(first, [self._pass_over_long_line()])
        return batch._replace(end=self._offset)

    def _next_lines(self, size):
        """Return as many whole lines as size allows, without their line ends; none if the first
        one is longer than BATCH_BYTES."""
        lines = self._read(size.bytes).split(b"\n", size.lines)
        lines.pop()  # what is behind the last line end, or behind the last line that is allowed
        if not lines:  # the first one is longer than size.bytes
            lines = self._read(BATCH_BYTES).split(b"\n", 1)
            lines.pop()
        return lines

    def _read(self, length):
        """Return at most length bytes that follow on _offset, or raise Failure if there are none.

        If fewer than length bytes are left, what is returned ends with a line end, also if nothing
        is left (then it is the line end alone).
        """
        left = self.content.size - self._offset
        data = os.pread(self._fd, min(length, left), self._offset)
        if left and not data:
            words = f"{self.name} was shortened while it was read. "
            raise Failure(words + "Restore it, then run this command again.")
        if len(data) == left < length and not data.endswith(b"\n"):
            data += b"\n"
        return data

    def _pass_over(self, data):
        """Move _offset behind data, which was read there."""
        in_file = data[: self.content.size - self._offset]  # without a line end of our own
        self._hash.update(in_file)
        self._offset += len(in_file)

    def _pass_over_long_line(self):
        """Move _offset behind a line longer than BATCH_BYTES; return its beginning, marked as
        such. The whole line is never in memory."""
        mark = b"..."
        data = self._read(BATCH_BYTES)
        line, _, _ = data.partition(b"\n")  # the file may have changed since it had none there
        beginning = line[: BATCH_BYTES - len(mark) - 1] + mark
        while b"\n" not in data:
            self._pass_over(data)
            data = self._read(READ_BYTES)
        end = data.index(b"\n") + 1
        self._pass_over(data[:end])
        return beginning

    def is_unchanged(self):
        """Tell whether what was sent is what measure() found."""
        return self._hash.hexdigest() == self.content.sha256

    def has_same_size(self):
        """Tell whether the file is still as long as measure() found it."""
        return os.fstat(self._fd).st_size == self.content.size

    def close(self):
        """Close the file."""
        os.close(self._fd)


# ---- Requests -----------------------------------------------------------------------------


class Retry(Exception):
    """Why a request failed that may succeed when it is sent again.

    pause   for so many seconds the server does not want to see it again
    advice  what the user can do
    """

    def __init__(self, words, pause=0.0, advice=RETRY_ADVICE):
        super().__init__(words)
        self.pause = pause
        self.advice = advice


class TooSlow(Retry):
    """A request was not sent, or not answered, in time: a smaller one may be."""


class ConnectFailed(OSError):
    """No address of a host took a connection; the text says why, for each."""


def connect_to(target, timeout, failures):
    """Return a socket connected to target (host, port) and its address, or raise ConnectFailed.

    A host may have several addresses. Each has its share of timeout, and at most CONNECT_SECONDS.
    failures says when each last failed, {address: time}. The time-out of the socket is the one for
    sending.
    """
    host, port = target
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectFailed(f"{host}: {words_of(error)}") from error
    # The one that failed last is tried last: a dead one costs its time only once.
    found.sort(key=lambda entry: failures.get(entry[4], 0.0))
    seconds = min(CONNECT_SECONDS, timeout / len(found))
    reasons = []
    for family, kind, protocol, _, address in found:
        connection = None
        try:
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(seconds)
            connection.connect(address)
            set_probes(connection)
            connection.settimeout(STALL_SECONDS)
            return connection, address
        except OSError as error:
            failures[address] = time.monotonic()
            reasons.append(f"{address[0]}: {words_of(error)}")
            if connection:
                connection.close()
    raise ConnectFailed("; ".join(reasons))


def set_probes(connection):
    """Let the kernel probe a peer that says nothing: one that is slow is waited for, and one whose
    host has vanished is not."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": PROBE_SECONDS,
        "TCP_KEEPALIVE": PROBE_SECONDS,  # macOS calls it so
        "TCP_KEEPINTVL": PROBE_SECONDS,
        "TCP_KEEPCNT": PROBES,
    }
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class FinalResponse(http.client.HTTPResponse):
    """The answer to a request, without the interim ones (1xx) that may come before it."""

    def begin(self):
        """Read the head of the answer. http.client itself passes over status 100 alone."""
        super().begin()
        while 101 < self.status < 200:
            self.headers = None  # else begin() takes the head for read
            super().begin()


class Connection(http.client.HTTPConnection):
    """A connection on which a request lasts as long as bytes move, and its answer is read although
    the request could not be sent whole.

    A server that refuses a request may answer as soon as it knows the headers, and close.

    urllib makes a Connection for each request, in do_open(), and calls request(), which calls
    send(), and then getresponse(). send() and getresponse() are ours; the others are http.client's.

    response_class      what http.client's getresponse() returns
    _create_connection  http.client's connect() calls it, as socket.create_connection is called,
                        before it asks a proxy for a tunnel and before TLS begins. http.client does
                        not document it: if a new Python drops it, the test
                        test_the_reasons_of_all_addresses_are_said fails
    _failures           {address: when it last failed}; all connections share it, and replace whole
                        values only
    _address            that took the connection; None before that
    _send_error         why the request could not be sent whole, or None
    """

    response_class = FinalResponse

    def __init__(self, host, failures, **options):
        super().__init__(host, **options)
        self._create_connection = self._connect_to_an_address
        self._failures = failures
        self._address = None
        self._send_error = None

    def send(self, data):
        """Send bytes. Each part that the network takes has a time-out of its own.

        After an error nothing more is sent: getresponse() returns the answer that may be there, or
        raises that error.
        """
        if self.sock is None:
            with self._noting_failure():
                self.connect()
        unsent = memoryview(data)
        while unsent and self._send_error is None:
            try:
                sent = self.sock.send(unsent)
                unsent = unsent[sent:]
            except OSError as error:
                self._send_error = error

    def getresponse(self):
        """Return the answer, or raise what kept the request from being sent."""
        with self._noting_failure():
            if self._send_error is None:
                self.sock.settimeout(self.timeout)
                return super().getresponse()
            self.sock.settimeout(REFUSAL_SECONDS)
            try:
                return super().getresponse()
            except (OSError, http.client.HTTPException):
                raise self._send_error from None

    def _connect_to_an_address(self, target, timeout, _source_address):
        connection, self._address = connect_to(target, timeout, self._failures)
        return connection

    @contextlib.contextmanager
    def _noting_failure(self):
        """Let an address that takes connections, and then gives no answer, be tried last."""
        try:
            yield
        except (OSError, http.client.HTTPException):
            if self._address:
                self._failures[self._address] = time.monotonic()
            raise


if ssl:

    class TlsConnection(Connection, http.client.HTTPSConnection):
        """A Connection through TLS: its send() and getresponse() are those of Connection, its
        connect() is that of HTTPSConnection, which wraps the socket."""


class OpenUrls(urllib.request.HTTPHandler):
    """Opens http and https URLs through a Connection."""

    https_request = urllib.request.HTTPHandler.http_request

    def __init__(self, tls):
        """Prepare for https URLs with tls, an ssl.SSLContext; None means Python's own."""
        super().__init__()
        self._failures = {}
        self._tls = tls

    def http_open(self, request):
        """Return the response to a request."""
        return self.do_open(Connection, request, failures=self._failures)

    def https_open(self, request):
        """Return the response to a request."""
        return self.do_open(TlsConnection, request, failures=self._failures, context=self._tls)


def find_proxy(url):
    """Return the proxy through which url is asked, or None; raise Failure if it cannot be used."""
    # A local server is not asked through a proxy.
    if re.match(r"https?://(localhost|127\.0\.0\.1|\[::1\])(?![\w.-])", url, re.IGNORECASE):
        return None
    target = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if not proxy or urllib.request.proxy_bypass(target.netloc):
        return None
    usable = ["http"]
    # With a proxy that speaks TLS, urllib would ask for a tunnel, and tell the password, in clear.
    if ssl and target.scheme == "http":
        usable.append("https")
    kind, separator, _ = proxy.partition("://")
    if separator and kind.lower() not in usable:
        raise Failure(
            f"The proxy in {target.scheme}_proxy begins with {printable(kind)}://, which client.py "
            f"cannot use for {target.scheme}:// URLs. Name an http:// proxy, or name the server in "
            "no_proxy."
        )
    return proxy


def make_opener(url, proxy):
    """Return what opens requests to url through a proxy, or None; raise Failure if TLS cannot be
    used."""
    scheme = urllib.parse.urlsplit(url).scheme
    proxies = {}
    if proxy:
        proxies[scheme] = proxy
    tls = None
    if scheme == "https":
        try:
            tls = ssl.create_default_context()
            tls.set_alpn_protocols(["http/1.1"])
        except OSError as error:
            # Among others, this reads the files of SSLKEYLOGFILE and of OpenSSL's configuration.
            words = f"TLS cannot be used: {error.filename or 'OpenSSL'}: {words_of(error)}."
            raise Failure(f"{words} Correct SSLKEYLOGFILE or OPENSSL_CONF.") from error
    # These two handlers alone take every answer as it is. (Those that build_opener() adds would
    # follow a redirect, which is an error and no delivery.)
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler(proxies))
    opener.add_handler(OpenUrls(tls))
    return opener


def certificate_advice():
    """Return what to do about a certificate that is not trusted."""
    path = os.environ.get("SSL_CERT_FILE")
    try:
        # Python passes over a file that is missing or holds no certificates.
        ssl.create_default_context(cafile=path)
    except OSError as error:
        return f"SSL_CERT_FILE={path} cannot be used: {words_of(error)}. Correct it."
    return "Correct --url, or name its authority with SSL_CERT_FILE."


def words_of(error):
    """Return an error in words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Answer(typing.NamedTuple):
    """What a server answered."""

    status: int
    headers: http.client.HTTPMessage
    payload: bytes

    def json_object(self):
        """Return the JSON object that this is, or None."""
        if self.headers.get_content_type() != JSON:
            return None
        return decode_object(self.payload)

    def error(self):
        """Return the error that an answer states in JSON, whatever media type it names, or None."""
        error = (decode_object(self.payload) or {}).get("error")
        if isinstance(error, str):
            return shortened(error)
        return None

    def words(self):
        """Return the status and the error, or the beginning of another text."""
        error = self.error()
        if error is not None:
            return f"status {self.status}: {error}"
        if not self.payload:
            return f"status {self.status}"
        media = self.headers.get("Content-Type", "no Content-Type")
        beginning = self.payload[:80].decode(errors="replace")
        return f"status {self.status}, {shortened(media)}: {beginning!r}"

    def retry_after(self):
        """Return the seconds that the server asks us to wait, 0 if it does not."""
        text = self.headers.get("Retry-After", "").strip()
        if re.fullmatch("[0-9]{1,9}", text):
            return float(text)
        try:
            date = email.utils.parsedate_to_datetime(text)
            seconds = date.timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
        return max(seconds, 0.0)


def shortened(words):
    """Return words, or their beginning if they are many."""
    if len(words) > MAX_WORDS:
        return words[:MAX_WORDS] + "..."
    return words


class Patience:
    """Whether requests succeed, and for how long the main thread waits while none does.

    The threads of requests report to it; the main thread waits in wait_for().

    _lock       guards the two below
    _successes  how many requests have succeeded
    _failure    the Retry of the last one that failed, or None after a success
    """

    def __init__(self, url, give_up_after):
        """Wait for url for at most give_up_after seconds."""
        self._url = url
        self._give_up_after = give_up_after
        self._lock = threading.Lock()
        self._successes = 0
        self._failure = Retry("no answer yet", advice=SERVER_ADVICE)

    def succeeded(self):
        """Report that a request was answered."""
        with self._lock:
            self._successes += 1
            self._failure = None

    def failed(self, failure):
        """Report that a request failed, with its Retry."""
        with self._lock:
            self._failure = failure

    def wait_for(self, future):
        """Return the result of a request, or raise what it has raised, or Failure after too long
        without any success. Say that the server keeps us waiting.

        Only the seconds that we wait here count, and not those that a stopped client stood still.
        """
        silent_seconds = 0.0
        said = False
        with self._lock:
            successes_before = self._successes
        while not concurrent.futures.wait([future], STEP_SECONDS).done:
            with self._lock:
                successes = self._successes
                failure = self._failure
            silent_seconds += STEP_SECONDS
            if successes > successes_before:
                silent_seconds = 0.0
            successes_before = successes
            must_say = silent_seconds >= SILENT_SECONDS or (failure and silent_seconds)
            if must_say and not said:
                warn(f"Waiting for {self._url}: {failure or 'no answer yet'}.")
                said = True
            if silent_seconds > self._give_up_after:
                raise self._given_up(failure)
        if said:
            warn(f"{self._url} answers.")
        return future.result()

    def _given_up(self, failure):
        failure = failure or Retry("no answer")
        seconds = f"{self._give_up_after:g} s"
        words = f"Gave up after {seconds} without success at {self._url}: {failure}."
        return Failure(f"{words} {failure.advice}")


class Sender:
    """Requests to one server, from several threads at once, each repeated until it is answered.

    A caller uses takes_batches(), deliver() and stop(). The methods stand from the outermost to
    the innermost: deliver a batch, retry a request, check its answer, send it once.

    _size            the BatchSize of what is read, which learns from the answers
    _answer_seconds  after which an answer times out
    _fast_seconds    within which an answer lets batches grow
    _stopped         is set by the main thread, and lets each thread end after the try that is under
                     way
    """

    def __init__(self, url, producer_id, size, give_up_after):
        """Prepare requests; nothing is sent yet. Raise Failure."""
        self._url = url
        self._size = size
        self._headers = {"Producer-Id": producer_id}
        authorization = os.environb.get(b"EVENTS_AUTHORIZATION", b"").strip(b" \t")
        if authorization:
            self._headers["Authorization"] = authorization
        # Patience ends the run when no request has succeeded for give_up_after. So an answer times
        # out, and its request is sent again, only while other requests succeed.
        self._answer_seconds = min(max(give_up_after, STALL_SECONDS), LONGEST_WAIT_SECONDS)
        # With less patience than STALL_SECONDS, the run ends before an answer times out.
        seconds = min(max(give_up_after, STEP_SECONDS), self._answer_seconds)
        self._fast_seconds = FAST_SHARE * seconds
        self._proxy = find_proxy(url)
        self._opener = make_opener(url, self._proxy)
        self._threads = concurrent.futures.ThreadPoolExecutor(CONCURRENT_REQUESTS)
        self._patience = Patience(url, give_up_after)
        self._stopped = threading.Event()

    def takes_batches(self):
        """Ask the server what it takes: return True for batches, False for single events alone.
        Wait for a server that is not up yet; raise Failure."""
        future = self._submit(self._retry, self._ask)
        return self._patience.wait_for(future)

    def deliver(self, batches, post):
        """Deliver batches, a few at once, with post_batch or post_event; yield each in order with
        the errors of its rejected lines, {line number: error}; raise Failure."""
        pending = collections.deque()
        for batch in batches:
            pending.append((batch, self._submit(self._deliver_batch, batch, post)))
            if len(pending) == BATCHES_AHEAD:
                oldest, future = pending.popleft()
                yield oldest, self._patience.wait_for(future)
        for oldest, future in pending:
            yield oldest, self._patience.wait_for(future)

    def stop(self):
        """Let the threads end."""
        self._stopped.set()

    def _submit(self, function, *arguments):
        """Return the future result of a function in another thread, or raise Failure."""
        try:
            return self._threads.submit(function, *arguments)
        except RuntimeError as error:
            words = f"client.py needs a thread, and the system gives it none ({error}). "
            advice = "Allow more processes (ulimit -u) or memory, then run this command again."
            raise Failure(words + advice) from error

    # ---- In the threads of requests

    def _deliver_batch(self, batch, post):
        """Return the errors of a batch's rejected lines, {line number: error}. What is too slow is
        sent again in parts, in which every line keeps its event id."""
        errors = {}
        unsent = [batch]
        while unsent:
            part = unsent.pop(0)
            if not part.events:
                continue
            attempt = functools.partial(post, part)
            try:
                errors |= self._retry(attempt, until_too_slow=part.lines > 1)
            except TooSlow:
                self._size.timed_out()
                unsent = part.parts() + unsent
        return errors

    def _retry(self, attempt, until_too_slow=False):
        """Return what attempt returns; while it raises Retry, repeat it with exponential backoff
        and jitter. With until_too_slow, TooSlow is raised after the pause, and not repeated."""
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            try:
                result = attempt()
                self._patience.succeeded()
                return result
            except Retry as failure:
                self._patience.failed(failure)
                pause = max(random.uniform(backoff / 2, backoff), failure.pause)
                if self._stopped.wait(min(pause, LONGEST_WAIT_SECONDS)):
                    raise Failure("Nobody waits for this request any more.") from None
                if until_too_slow and isinstance(failure, TooSlow):
                    raise
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def _ask(self):
        """Return whether the server takes batches, or raise Retry or Failure."""
        answer = self._send_checked("OPTIONS", None, {}, OPTIONS_UNKNOWN)
        offers = ",".join(answer.headers.get_all("Accept-Post", []))
        for offer in offers.split(","):
            media, _, _ = offer.partition(";")
            if media.strip().lower() == NDJSON:
                return True
        return False

    def post_batch(self, batch):
        """Send a batch once; return the errors of its rejected lines, {line number: error}, or
        raise Retry or Failure. Each line must be accounted for."""
        begun = time.monotonic()
        answer = self._post(batch, NDJSON, ())
        result = answer.json_object()
        if answer.status != 200 or result is None:
            raise Retry(f"{answer.words()}, which is no answer to a batch")
        errors = read_errors(result, batch)
        if errors is None or result.get("accepted") != batch.events - len(errors):
            raise Retry(f"{answer.words()}, which does not account for every line")
        if time.monotonic() - begun <= self._fast_seconds:
            self._size.answered_fast(len(batch.body))
        return errors

    def post_event(self, batch):
        """Send a batch of one line once, as post_batch does, to a server of single events."""
        answer = self._post(batch, JSON, EVENT_REFUSALS)
        result = answer.json_object()
        if answer.status in EVENT_REFUSALS:
            # Anything between us and the server may answer so, too. Then we do not know whether the
            # event was counted.
            if result is None or answer.error() is None:
                words = f"{self._url} answered with {answer.words()}"
                raise Failure(f"{words}, which does not say what is wrong with the event.")
            return {batch.first: answer.error()}
        says_so = result is not None and isinstance(result.get("message"), str)
        if answer.status != 200 or not says_so or "error" in result:
            raise Retry(f"{answer.words()}, which is no answer to an event")
        return {}

    def _post(self, batch, media, expected):
        headers = {"Content-Type": media, "Sequence": str(batch.first)}
        return self._send_checked("POST", batch.body, headers, expected)

    def _send_checked(self, method, body, headers, expected):
        """Send a request once; return an Answer whose status is 2xx or expected, or raise Retry or
        Failure."""
        answer = self._send_once(method, body, headers, expected)
        status = answer.status
        if 200 <= status < 300 or status in expected:
            return answer
        if status in (408, 504):
            raise TooSlow(answer.words(), answer.retry_after())
        if status == 429 or status >= 500:
            raise Retry(answer.words(), answer.retry_after())
        advice = ADVICE.get(status, "")
        raise Failure(f"{self._url} answered with {answer.words()}.{advice}")

    def _send_once(self, method, body, headers, expected):
        """Send a request; return its Answer, or raise Retry or Failure when there is none."""
        request = urllib.request.Request(self._url, body, self._headers | headers, method=method)
        try:
            with self._opener.open(request, timeout=self._answer_seconds) as response:
                # Who refuses from the headers alone may close before all of the answer is read: its
                # status is enough, unless the answer is looked into.
                may_be_cut = 400 <= response.status < 500 and response.status not in expected
                payload = read_payload(response, may_be_cut)
                return Answer(response.status, response.headers, payload)
        except urllib.error.URLError as error:
            raise self._meaning(error.reason) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._meaning(error) from error

    def _meaning(self, error):
        """Return the Retry or Failure that the error of a request means.

        The order matters, because some errors belong to several classes: one of a certificate is a
        ValueError and an OSError, too.
        """
        if ssl and isinstance(error, ssl.SSLCertVerificationError):
            reason = error.verify_message.rstrip(".")
            words = f"{self._url}: the server's certificate is not trusted: {reason}."
            return Failure(f"{words} {certificate_advice()}")
        if ssl and isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
            words = f"{self._url} cannot be asked: what answers there does not speak TLS."
            return Failure(f"{words} Correct --url: another port, or http:// for https://.")
        if isinstance(error, str):  # a URLError may give its reason in words
            return Failure(f"{self._url} cannot be asked: {error}.")
        if isinstance(error, (ValueError, http.client.InvalidURL)):
            # The error's own words may hold a password.
            words = f"{self._url}, the proxy or EVENTS_AUTHORIZATION is malformed. Correct it."
            return Failure(words)
        if isinstance(error, ConnectFailed):
            if self._proxy:
                words = f"no connection to the proxy: {words_of(error)}"
                return Retry(words, advice=PROXY_ADVICE)
            return Retry(words_of(error), advice=SERVER_ADVICE)
        if PROXY_REFUSAL.match(str(error)):
            words = f"{self._url} cannot be asked: the proxy refuses: {words_of(error)}."
            return Failure(f"{words} Correct https_proxy.")
        if isinstance(error, TimeoutError):
            return TooSlow("timed out")
        if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
            return Retry(f"no answer in HTTP ({type(error).__name__}: {shortened(str(error))})")
        return Retry(words_of(error))


def read_payload(response, may_be_cut):
    """Return the body of a response, or its beginning if it may be cut and is. Else raise the
    exception of http.client; raise Retry if it is longer than any answer."""
    payload = bytearray()
    while len(payload) <= MAX_ANSWER_BYTES:
        try:
            # Not read(): it would allocate what a malformed chunk announces.
            block = response.read1(ANSWER_BLOCK_BYTES)
        except (OSError, ValueError, http.client.HTTPException):
            if not may_be_cut:
                raise
            block = b""
        if not block:
            return bytes(payload)
        payload += block
    raise Retry(f"status {response.status} with an answer that does not end")


def read_errors(result, batch):
    """Return the errors in an answer to a batch, {line number in the file: error}, or None if it is
    no such answer.

    Each rejected line must be one that is there, not blank, and named once.
    """
    rejected = result.get("rejected")
    if not isinstance(rejected, list) or not is_count(result.get("accepted")):
        return None
    errors = {}
    lines = []
    if rejected:
        lines = batch.body.split(b"\n")  # the last one, behind the last line end, is blank
    for entry in rejected:
        if not isinstance(entry, dict):
            return None
        number = entry.get("line")  # in the batch, from 1 on
        error = entry.get("error")
        if not is_count(number) or not 1 <= number <= len(lines) or not isinstance(error, str):
            return None
        line = batch.first + number - 1
        if line in errors or not lines[number - 1].strip():
            return None
        errors[line] = shortened(error)
    return errors


# ---- The end of a delivery ----------------------------------------------------------------


def unfinished_path(path):
    """Return the name that the file of rejected lines has before it gets its own."""
    return path + ".unfinished"


def check_rejected_path(path):
    """Raise Failure unless the file of rejected lines can get this name."""
    try:
        # We ask whether the longer one of its two names is possible. What stands there is a killed
        # client's, and is replaced.
        os.lstat(unfinished_path(path))
    except FileNotFoundError:
        pass
    except OSError as error:
        words = f"The rejected lines cannot be kept in {path}: {words_of(error)}."
        raise Failure(f"{words} Give the file a name for which this is possible.") from error
    if os.path.lexists(path):
        words = f"{path} is in the way: the rejected lines will get that name."
        raise Failure(f"{words} Rename it, then run this command again.")


def collect_rejected_lines(state, path):
    """Write the rejected lines of a complete delivery to the file that will be renamed to path,
    and note that; return when both are durable, or raise OSError.

    The note is the turning point. Before it, a client that goes on writes the file anew. After it,
    a client that goes on renames the file, if it is still there under its unfinished name. If it
    is not, it is the user's, who may have mended, sent and removed it: it is never written again.
    """
    collected = unfinished_path(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(collected)  # a killed client's
    fd = os.open(collected, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
    try:
        with naming(collected):
            for line in state.rejected_lines():
                write_all(fd, line + b"\n")
            sync(fd)
    finally:
        os.close(fd)
    sync_directory_of(collected)
    state.note_rejected_path(path)


def publish_rejected_lines(path):
    """Rename the collected lines to path; return False if an earlier run has done that. Raise
    Failure or OSError."""
    collected = unfinished_path(path)
    is_collected = os.path.lexists(collected)
    if is_collected:
        check_rejected_path(path)
        os.rename(collected, path)
    sync_directory_of(path)
    return is_collected


def print_receipt(words):
    """Write a line to stdout whole, however long that takes, or raise OSError. A stdout that was
    closed from the start asks for no receipt."""
    if sys.stdout is None:
        return
    if is_terminal(sys.stdout):
        words = "\r\033[K" + words
    data = (words + "\n").encode(sys.stdout.encoding, "backslashreplace")
    fd = sys.stdout.fileno()
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(STEP_SECONDS * 1000):
        warn("All is delivered. The receipt waits for stdout, which takes nothing at present.")
    while data:
        poll.poll()
        with contextlib.suppress(BlockingIOError):
            written = os.write(fd, data)
            data = data[written:]
    if stat.S_ISREG(os.fstat(fd).st_mode):
        sync(fd)  # some file systems tell only now that they are full


# ---- The command line ---------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser of command lines that prints as everything here is printed."""

    def print_help(self, file=None):
        """Print the help to stdout."""
        write(sys.stdout, self.format_help(), READER_SECONDS)

    def error(self, message):
        """Say what is wrong with the command line, and exit with status 2."""
        for line in self.format_usage().splitlines():
            warn(line)
        warn(hide_password(f"{self.prog}: error: {message}"))
        raise SystemExit(2)


def parse_command_line(arguments):
    """Return the options, or exit with status 2."""
    parser = Parser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", nargs="?", default="events.jsonl", help="events, one a line (default: %(default)s)"
    )
    parser.add_argument(
        "--url",
        default="http://localhost:8000/liveEvent",
        help="of the server (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=5000,
        metavar="LINES",
        help="at most, in a request (default: %(default)s)",
    )
    parser.add_argument(
        "--give-up-after",
        type=float,
        default=30,
        metavar="SECONDS",
        help="without any success (default: %(default)s)",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="send the whole file as a new delivery",
    )
    parser.color = False  # Python 3.14 would use escapes, which are not printed
    options = parser.parse_args(arguments)
    if not options.file:
        parser.error("the name of the file is empty")
    if not 1 <= options.batch_size <= 10_000:
        parser.error("--batch-size must be from 1 to 10000")
    if math.isnan(options.give_up_after) or options.give_up_after < 0:
        parser.error("--give-up-after must not be negative")
    # Not urlsplit(): it takes nearly everything, blanks and passwords included.
    host = r"(?:[\w.-]+|\[[\w.:%]+\])"
    url = re.fullmatch(rf"https?://{host}(?::(\d{{1,5}}))?(?:[/?][!-~]*)?", options.url, re.ASCII)
    if not url or not 1 <= int(url[1] or 80) <= 65_535:
        parser.error(
            "--url must look like http://localhost:8000/liveEvent; a password belongs in "
            "EVENTS_AUTHORIZATION"
        )
    if options.url.startswith("https") and not ssl:
        parser.error("--url cannot begin with https: this Python has no ssl module")
    return options


def deliver_file(options):
    """Deliver a file and print the receipt; return the exit status, or raise Failure or OSError."""
    begun = time.monotonic()
    path = os.path.realpath(options.file)  # a file has one delivery, whichever link leads to it
    # The source file is opened first: where there is none, no state file is made.
    with contextlib.closing(Source(options.file, path)) as source:
        with contextlib.closing(StateFile(path)) as state:
            begin_or_resume(state, source, options.restart)
            rejected_path = f"{path}.rejected-{state.producer_id}"
            if state.progress.offset < source.content.size:
                check_rejected_path(rejected_path)
                send(state, source, options)
            return finish(state, source, rejected_path, begun)


def begin_or_resume(state, source, restart):
    """Go on with the unfinished delivery of a file, or begin a new one; raise Failure or
    OSError."""
    unfinished = state.load(restart)
    source.measure(state.progress.offset)
    # Whoever renames a file renames its state file with it, and must have found both. From here
    # on, both are there.
    if not source.is_in_place() or not state.is_in_place():
        raise Failure(f"{source.name} was renamed meanwhile. Run this command again.")
    if unfinished is None:
        state.begin(source.content)
    elif unfinished == source.content:
        state.resume()
        warn(f"{source.name}: going on with the delivery that was interrupted.")
    else:
        words = f"{source.name} has changed since its unfinished delivery began"
        raise Failure(f"{words} (so far {state.progress.words()}). {RESTART_ADVICE}")


def send(state, source, options):
    """Send every line that is not answered yet, and note each answer; raise Failure."""
    size = BatchSize(options.batch_size)
    sender = Sender(options.url, state.producer_id, size, options.give_up_after)
    try:
        if sender.takes_batches():
            post = sender.post_batch
        else:
            post = sender.post_event
            size.lines = 1
        batches = source.batches(state.progress.lines + 1, size)
        for batch, errors in sender.deliver(batches, post):
            note_answer(state, source, batch, errors)
            part = state.progress.offset / source.content.size
            show_progress(f"{state.progress.accepted:,} events, {part:.0%}")
    except (Failure, MemoryError, OSError) as error:
        line = state.progress.lines + 1
        unknown = f"Delivery is unknown from line {line} on."
        raise Failure(*in_words(error, source.name), unknown) from error
    finally:
        sender.stop()


def note_answer(state, source, batch, errors):
    """Note an answered batch, and report its rejected lines, given their errors by number."""
    before = state.progress
    progress = Progress(
        lines=before.lines + batch.lines,
        offset=batch.end,
        accepted=before.accepted + batch.events - len(errors),
        rejected=before.rejected + len(errors),
    )
    numbers = sorted(errors)
    rejected_lines = []
    if errors:
        lines = batch.body.split(b"\n")
        rejected_lines = [lines[number - batch.first] for number in numbers]
    state.note(progress, rejected_lines)
    for number in numbers:
        warn(f"{source.name}:{number}: {errors[number]}")


def what_changed(source, state):
    """Return how the file changed since its delivery began, as the end of a sentence, or None."""
    if not source.is_unchanged():
        return (
            ". What was sent is what was read, a part of it before and a part after the change: "
            "check the revenue of its users."
        )
    if not source.has_same_size():
        return (
            f": it is no longer {source.content.size} bytes long. So many were sent, and maybe a "
            "part of a last line. Send what was appended in a file of its own; this file sent "
            "again counts twice."
        )
    # Whoever renames the file renames its state file with it.
    if state.is_in_place() and not source.is_in_place():
        return (
            ": its name leads to another file now, or to none. The old content was sent. The new "
            "one is another delivery: the events that are in both count twice."
        )
    return None


def finish(state, source, rejected_path, begun):
    """End a delivery whose lines are all answered; return the exit status, or raise Failure or
    OSError.

    What the user needs is safe before the delivery is forgotten: a client that is killed or fails
    in between is continued by the same command, which sends nothing again.
    """
    progress = state.progress
    status = 0
    change = what_changed(source, state)
    if change:
        status = 1
        warn(f"{source.name} changed while it was sent{change}")
    if progress.rejected:
        status = 1
        if not state.rejected_path:
            collect_rejected_lines(state, rejected_path)
        if publish_rejected_lines(state.rejected_path):
            words = f"The rejected lines are in {state.rejected_path};"
            warn(f"{words} mend them, then send that file.")
        else:
            # The delivery may have been moved since, without that file.
            name = os.path.basename(state.rejected_path)
            words = f"An earlier run has put the rejected lines into {name} (or {name}.unfinished)"
            warn(f"{words}, in the directory where {source.name} was then.")
    seconds = time.monotonic() - begun
    try:
        print_receipt(f"{progress.words()}, in {seconds:.1f} s")
    except OSError as error:
        words = f"All is delivered, but the receipt cannot be printed: {words_of(error)}."
        advice = "Run this command again to get it; nothing is sent again."
        raise Failure(f"{words} {advice}") from error
    try:
        state.forget()
    except OSError as error:
        words = f"All is delivered, but {state.path} cannot be emptied: {words_of(error)}."
        raise Failure(f"{words} Remove it before you send the file anew.") from error
    return status


def in_words(error, name):
    """Return the list of sentences for a Failure, a MemoryError, or an OSError, which is about the
    file of that name unless it says about which."""
    if isinstance(error, Failure):
        return list(error.args)
    if isinstance(error, MemoryError):
        return ["There is not enough memory. Allow more, then run this command again."]
    file = hide_password(str(error.filename or name))
    advice = "Give client.py a file that it can read, in a directory where it can write"
    return [f"{file}: {words_of(error)}. {advice}, then run this command again."]


def end_at_once(number, _frame):
    """End at once because of a signal: FILE.delivery is all that the next run needs."""
    os._exit(128 + number)


def main(arguments=None):
    """Run the command line and return its exit status."""
    signal.signal(signal.SIGINT, end_at_once)
    signal.signal(signal.SIGTERM, end_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])  # maybe inherited
    options = parse_command_line(arguments)
    try:
        return deliver_file(options)
    except (Failure, MemoryError, OSError) as error:
        for sentence in in_words(error, options.file):
            warn(sentence)
        return 1


if __name__ == "__main__":
    os._exit(main())  # sys.exit would wait for threads whose requests hang
