"""Receive events over HTTP, append them durably to a log, and answer each user's
revenue from PostgreSQL.

The answer 200 is sent only after the event's line was written and synced, so
that it survives kill -9 and a power cut.

EVENTS_AUTHORIZATION holds the value that a request's Authorization header must
have; without it the server listens on loopback addresses only. The database is
the one that DATABASE_URL or libpq's variables (PGHOST, ...) name; events are
taken without one, too.

Example: python server.py --port 8080
"""
# Requests that arrive during a sync share the next one (group commit): see LogWriter.append.
#
# The parts in order: settings; the log (LogWriter); the database (Database); HTTP (Handler, one for each connection);
# processes (Worker, supervise); the command line.
import argparse
import concurrent.futures
import contextlib
import email.utils
import errno
import functools
import hmac
import http.server
import ipaddress
import json
import os
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
import urllib.parse

from data_processor import (  # before fcntl and psycopg2: it says in a sentence that one of them is missing
    DEFAULT_LOG, MAX_SEQUENCE, SURROGATE, Failure, Troubles, add_log_field, as_line, check_event, check_id, connect,
    end_of_events, is_plain, leads_to, open_regular, say, sentence, stamp, sync_file, usable_cores, warn)

import fcntl
import resource

import psycopg2

MAX_BODY_BYTES, MAX_LINES = 1024 * 1024, 10_000  # of a request
MAX_HEAD_BYTES = 64 * 1024  # of a request line and headers; of a chunk's size and trailers
DECODED_BATCHES = 8  # at once, in each worker, until the log has taken their lines
GROUP_BYTES = 16 * 1024 * 1024  # of lines that wait for the disk, in each worker, before further ones wait for them

REQUEST_SECONDS = 30  # from a request's first byte to its last
IDLE_SECONDS = 75  # to take an answer and to begin the next request; load balancers reuse a connection for 60
DATABASE_SECONDS = 2
# After a refusal, to read on and discard: closing at once could destroy the answer. After a deadline, to send it.
DRAIN_SECONDS, DRAIN_BYTES = 2, 16 * 1024 * 1024
STOP_SECONDS, BACKLOG_SECONDS = 10, 1  # at a stop, to finish what was received; of them, to accept from the backlog
LOCK_PAUSE_SECONDS = 0.0002  # before another attempt to lock the log, which another worker holds for about so long
PAUSE_SECONDS = 0.005  # before accept() is tried again when connections, descriptors or threads have run out
RESTART_SECONDS = 0.5  # before a worker is replaced, so that one that crashes at once does not become a fork loop

MAX_CONNECTIONS, DESCRIPTORS = 1000, 2048  # per worker: one each, and some more; further ones wait in the backlog
BACKLOG = 4096  # the kernel lowers it to its own limit (net.core.somaxconn)

EXIT_SYNC_FAILED = 3  # status of a worker whose log can no longer be trusted; the parent then stops the server
NO_SPACE = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


# ---- The log --------------------------------------------------------------------------------------------------------

class LogWriter:
    """The log as one worker process appends to it; the other workers append to the same file."""

    def __init__(self, path):
        self.path = path
        self.failed = None  # the error of a sync, after which this process writes nothing more
        self._fd = None  # opened by this process: the lock of an inherited descriptor would not exclude the others
        self._group = []  # [(lines, done)] that are written and synced together next
        self._group_bytes = 0
        self._group_lock = threading.Condition(threading.Lock())  # guards these two; notified when a group is closed
        self._file_lock = threading.Lock()  # held by the one thread that writes
        self._troubles = Troubles()

    def append(self, lines, done):
        """Make lines (bytes, whole lines) durable, then call done(None); if that fails, call done(error): the lines
        must not be acknowledged.

        The first thread of a group writes for all of it and calls every done; the others return at once. (If each of
        them were woken to send its own answer, a third fewer requests would be served.)
        """
        with self._group_lock:
            self._group_lock.wait_for(lambda: self._group_bytes < GROUP_BYTES)
            self._group.append((lines, done))
            self._group_bytes += len(lines)
            if len(self._group) > 1:
                return
        with self._file_lock:
            with self._group_lock:  # only now, so that the group includes everyone who came during the previous sync
                group, self._group, self._group_bytes = self._group, [], 0
                self._group_lock.notify_all()
            error = self._write(group)
            for _, done in group:  # before the next group is written, so that these peers' next requests can join it
                try:
                    done(error)
                except Exception:  # one answer that fails must not cost the others theirs
                    sys.excepthook(*sys.exc_info())

    def _write(self, group):
        """Make the lines of a group durable and return None, or return the exception that prevented it."""
        try:
            data = b"".join([lines for lines, _ in group])
            end = self._lock()
            # The processor recognises a log by its first line, which gets a random field.
            try:
                self._write_all(add_log_field(data) if data and end == 0 else data)
            except OSError:
                os.ftruncate(self._fd, end)  # the disk is full: what was written will not be acknowledged
                raise
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # other workers may write now: the sync takes the whole file
            self._sync(sync_file, self._fd)
        except Exception as error:
            with contextlib.suppress(OSError, TypeError):  # it cannot be unlocked, or it could not even be opened
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._troubles.begin(self.path, f"the log cannot be written: {sentence(error)}.")
            return error
        self._troubles.end(self.path, "the log can be written again.")
        return None

    def _write_all(self, data):
        while data:
            data = data[os.write(self._fd, data):]

    def _lock(self):
        """Open and lock the file to which path leads, and return where its last line ends. The lock of a file that was
        renamed is not waited for: a stopped processor or an administrator may hold it for ever."""
        while not self.failed:
            if self._fd is None:
                self._fd = self.open()
            end = None
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end = self._end_last_line()  # of a renamed file, too: it may be concatenated with others
            if not leads_to(self.path, self._fd):
                fd, self._fd = self._fd, None
                os.close(fd)
            elif end is not None:
                return end
            else:
                time.sleep(LOCK_PAUSE_SECONDS)
        raise self.failed

    def _end_last_line(self):
        """Make the file end with a whole line, and return its end. What follows the last LF was never acknowledged: cut
        it off, unless it is a whole event, which the processor may have counted and which gets its LF."""
        size = os.fstat(self._fd).st_size
        if size == 0 or os.pread(self._fd, 1, size - 1) == b"\n":
            return size
        end = end_of_events(self._fd, size)
        if end == size:
            self._write_all(b"\n")
            return size + 1
        os.ftruncate(self._fd, end)
        warn(f"{self.path}: cut off {size - end} bytes of an unfinished line at byte {end}.")
        return end

    def open(self):
        """Open the log, creating it when it is missing, make its name durable, and return its descriptor; or raise
        OSError."""
        directory = os.open(os.path.dirname(os.path.realpath(self.path)), os.O_RDONLY)
        try:
            fd = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            self._sync(os.fsync, directory, harmless=(errno.EINVAL, errno.ENOTSUP))  # a file system without
        finally:
            os.close(directory)
        return fd

    def _sync(self, sync, fd, harmless=()):
        """Call sync(fd). If it fails, with another error than the harmless ones, nothing is written any more: the
        kernel may have dropped what was written, and a second sync could then lie."""
        try:
            sync(fd)
        except OSError as error:
            if error.errno not in harmless:
                self.failed = OSError(errno.EIO, f"a sync failed ({error.strerror}), and its last lines may not be on "
                                      "the disk. Move the log aside before you start the server again")
                raise self.failed from error


# ---- The database ---------------------------------------------------------------------------------------------------

class Database:
    """One connection, used by one thread of its own, so that a database that hangs holds up nothing else."""

    # One round trip and one transaction, with which the setting ends: a pooler may share the connection.
    QUERY = f"""
        SET LOCAL statement_timeout = {DATABASE_SECONDS * 1000};
        SELECT (SELECT trim_scale(revenue)::text FROM users_revenue WHERE user_id = %s)"""

    def __init__(self):
        self._connection = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._troubles = Troubles()

    def revenue(self, user):
        """Return the user's revenue as exact decimal text, or None without any; raise Failure if the database gives no
        answer within DATABASE_SECONDS."""
        try:
            query = self._thread.submit(self._query, user)  # or RuntimeError: no more threads
            answered, _ = concurrent.futures.wait([query], DATABASE_SECONDS)
            query.cancel()  # if it has not begun: no queue grows behind one that hangs
            if not answered:
                raise Failure(f"no answer within {DATABASE_SECONDS} seconds")
            revenue = query.result()
        except (psycopg2.Error, Failure, RuntimeError) as error:
            self._troubles.begin("The database", f"{sentence(error)}.")
            raise Failure("the database does not answer") from None
        self._troubles.end("The database", "it answers again.")
        return revenue

    def _query(self, user):
        fresh = self._connection is None or self._connection.closed
        if fresh:
            # tcp_user_timeout: when the database's host vanishes, nobody is left to enforce statement_timeout.
            self._connection = connect(connect_timeout=DATABASE_SECONDS, tcp_user_timeout=DATABASE_SECONDS * 1000)
            self._connection.autocommit = True
        try:
            with self._connection.cursor() as sql:
                sql.execute(self.QUERY, [user])
                return sql.fetchone()[0]
        except psycopg2.errors.UndefinedTable:
            return None
        except psycopg2.Error as error:
            self._connection.close()
            if fresh or isinstance(error, psycopg2.errors.QueryCanceled):
                raise
        return self._query(user)  # the database was restarted, perhaps


# ---- HTTP -----------------------------------------------------------------------------------------------------------

# A HEADER is a line, HEADERS are all of them with the empty line. Groups of a HEAD: method, target, version, HEADERS.
# A CHUNK is the line of its size; the last one has trailers, which look like HEADERS. ONCE must not be repeated.
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
HEADER = re.compile(rf"({TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n")
HEADERS = rf"((?:{HEADER.pattern})*+)\r\n"
HEAD = re.compile(rf"(?:\r\n)?({TOKEN}) ([!-~\x80-\xff]+) (HTTP/[0-9]\.[0-9])\r\n{HEADERS}")
CHUNK = re.compile(rf"([0-9A-Fa-f]{{1,15}})[ \t]*(?:;[^\0\r\n]*)?\r\n(?:{HEADERS})?")
ABSOLUTE_FORM = re.compile(r"(?i)https?://([^/?#]*)(/.*)")
LOOPBACK_HOST = re.compile(r"(?i)(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]*)?")
ONCE = {"host", "authorization", "content-length", "transfer-encoding", "content-type", "content-encoding",
        "producer-id", "sequence", "expect"}

METHODS = {"/liveEvent": "POST, OPTIONS", "/userEvents/": "GET, HEAD", "/health": "GET, HEAD"}
JSON, NDJSON = "application/json", "application/x-ndjson"
ACCEPT_POST = {"Accept-Post": f"{JSON}, {NDJSON}"}
TOO_LARGE = 413, f"the body must be at most {MAX_BODY_BYTES:,} bytes long"
NOT_WHOLE = 408, f"the request ended early or took longer than {REQUEST_SECONDS} seconds"

http_date = functools.lru_cache(maxsize=1)(email.utils.formatdate)


class Refusal(Exception):
    """A request that is answered with an error: its status, the words for its sender, and headers, if any."""


def require(condition, *answer):
    """Raise Refusal unless condition holds."""
    if not condition:
        raise Refusal(*answer)


def check_lines(body, count):
    """Return the events in body, which has count lines, as {index of a line: that line}, how many they are, and what is
    wrong with the others, as [{"line": number, "error": words}]; blank lines are skipped. If all lines are plain, the
    first one's entry holds them all.

    With count 1, body is one event, however many line ends stand around its tokens: two events in it are none.
    """
    if is_plain(body + b"\n") and (count > 1 or b"\n" not in body):
        return {0: body + b"\n"}, count, []
    accepted, rejected = {}, []
    for index, line in enumerate(body.split(b"\n", count - 1)):
        try:
            if line.strip():
                if b"\n" in line or not is_plain(line + b"\n"):
                    check_event(line)
                accepted[index] = as_line(line) + b"\n"
        except ValueError as error:  # only its words are kept: an exception drags its frames along
            rejected.append({"line": index + 1, "error": str(error)})
    return accepted, len(accepted), rejected


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Every request is read with strict framing (RFC 9112) and answered in one send."""

    disable_nagle_algorithm = True

    def handle(self):
        """Answer one request after the other, while the connection is kept."""
        self.owed = threading.Lock()  # held from a request's first byte until whichever thread has sent its answer
        self.close_connection = self.unread = False
        with contextlib.suppress(OSError):  # the peer is gone
            while not self.close_connection and self.rfile.peek(1):
                self.owed.acquire()
                if self.close_connection:  # as the previous answer has announced
                    return
                self.set_deadline(REQUEST_SECONDS)
                self.handle_one_request()
        self.owed.acquire()
        if self.unread:
            self.linger()

    def handle_one_request(self):
        """Read one request and answer it, or have it answered by the log."""
        self.command, self.unread = None, True
        try:
            self.parse_request()
            self.find_method()()
        except Refusal as refusal:
            self.send_error(*refusal.args)
        except OSError:  # the peer is gone; the attempt to answer releases owed
            self.send_error(*NOT_WHOLE)
        except Exception:  # nobody but this program can have made it
            sys.excepthook(*sys.exc_info())
            self.send_error(500, "internal error")

    def set_deadline(self, seconds):
        """Allow this connection so many seconds from now for what it does next; see Worker.cut_off_overdue."""
        self.server.deadlines[self.connection] = time.monotonic() + seconds

    # -- Reading

    def parse_request(self):
        """Read and check the request line and the headers, or raise Refusal."""
        match = HEAD.fullmatch(self.read_head())
        require(match, 400, "malformed request line or header")
        self.command, target, self.request_version, lines = match.group(1, 2, 3, 4)
        require(self.request_version.startswith("HTTP/1."), 505, "the server speaks HTTP/1.1")
        self.headers = {}
        for name, value in HEADER.findall(lines):
            name, value = name.lower(), value.strip(" \t")
            require(name not in self.headers or name not in ONCE, 400, "a header is repeated that must stand once")
            self.headers[name] = f"{self.headers[name]}, {value}" if name in self.headers else value
        self.check_framing()
        if absolute := ABSOLUTE_FORM.fullmatch(target):  # RFC 9112, 3.2.2: it overrides Host
            self.headers["host"], target = absolute.groups()
        self.path = target.partition("?")[0]  # still percent-encoded
        self.check_access()

    def read_head(self, head=""):
        """Return head, which is nothing or a line, and the lines behind it up to an empty one, or raise Refusal.

        An empty line before all others does not end them (RFC 9112, 2.2: some clients send one too many after a body).
        Bare line feeds do: they make a malformed head, which must be refused and not waited for.
        """
        while not head.endswith(("\n\r\n", "\n\n")):
            head += self.read_line(MAX_HEAD_BYTES - len(head), 431 if head else 414)
        return head

    def read_line(self, limit, too_long):
        """Return the next line, or raise Refusal, with the status too_long if it has more than limit bytes."""
        line = self.rfile.readline(limit)
        if not line.endswith(b"\n"):
            require(len(line) == limit, *NOT_WHOLE)
            raise Refusal(too_long, "the request line, the headers or a chunk's size are too long")
        return line.decode("latin-1")

    def check_framing(self):
        """Set close_connection, chunked, unread and length, the number of the body's bytes, or None if it is chunked or
        there is none. Or raise Refusal."""
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        old = self.request_version == "HTTP/1.0"
        require(coding is None or (length is None and coding.lower() == "chunked" and not old), 400,
                "a body must have either one Content-Length or, in HTTP/1.1, Transfer-Encoding: chunked")
        require(length is None or re.fullmatch("[0-9]+", length), 400, "malformed Content-Length")
        require(old or "host" in self.headers, 400, "the Host header is missing")
        self.chunked = coding is not None
        # Sixteen digits already exceed every limit, and int() refuses more than 4,300.
        self.length = None if length is None else int(length.lstrip("0")[:16] or "0")
        self.unread = self.chunked or bool(self.length)
        self.close_connection = old or "close" in self.headers.get("connection", "").lower()

    def check_access(self):
        """Raise Refusal unless the sender may ask."""
        secret = self.server.authorization
        if secret is None:
            # DNS rebinding: a web page can make a local browser send requests here under the page's own host name.
            require(LOOPBACK_HOST.fullmatch(self.headers.get("host", "")), 421,
                    "without EVENTS_AUTHORIZATION the Host header must be localhost or a loopback address")
        elif self.path != "/health":
            require(hmac.compare_digest(self.headers.get("authorization", "").encode("latin-1"), secret), 401,
                    "the Authorization header is missing or wrong", {"WWW-Authenticate": "Bearer"})

    def read_body(self):
        """Return the body, without chunked framing; ask for it when the sender waits to be asked. Or raise Refusal."""
        require(self.chunked or self.length is not None, 411, "the request must have a Content-Length or be chunked")
        require(self.chunked or self.length <= MAX_BODY_BYTES, *TOO_LARGE)
        if "expect" in self.headers and self.unread and self.request_version != "HTTP/1.0":  # RFC 9110, 10.1.1
            require(self.headers["expect"].lower() == "100-continue", 417, "the only known expectation is 100-continue")
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.read_chunks() if self.chunked else self.read_exactly(self.length)
        self.unread = False
        return body

    def read_exactly(self, length):
        """Return length bytes, or raise Refusal."""
        data = self.rfile.read(length)
        require(len(data) == length, *NOT_WHOLE)
        return data

    def read_chunks(self):
        """Return the body of a chunked request (RFC 9112, 7.1); extensions and trailers are read and dropped."""
        body = bytearray()
        while True:
            line = self.read_line(MAX_HEAD_BYTES, 400)
            match = CHUNK.fullmatch(line)
            require(match, 400, "malformed chunk size")
            size = int(match[1], 16)
            if size == 0:
                require(CHUNK.fullmatch(self.read_head(line)), 400, "malformed trailer")
                return bytes(body)
            require(len(body) + size <= MAX_BODY_BYTES, *TOO_LARGE)
            body += self.read_exactly(size)
            require(self.read_exactly(2) == b"\r\n", 400, "a chunk is longer than its size")

    # -- The methods: each sends its answer, or raises Refusal

    def find_method(self):
        """Return the method that answers the request, or raise Refusal."""
        methods = METHODS.get("/userEvents/" if self.path.startswith("/userEvents/") else self.path)
        require(methods, 404, "no such path; there are /liveEvent, /userEvents/<userId> and /health")
        require(self.command in methods.split(", "), 405, f"the methods here are: {methods}", {"Allow": methods})
        return getattr(self, f"do_{self.command}")

    def do_OPTIONS(self):
        """Answer what may be sent."""
        self.send(204, b"", {"Allow": METHODS["/liveEvent"]} | ACCEPT_POST)

    def do_GET(self):
        """Answer that the server is well, or a user's revenue, digit for digit."""
        if self.path == "/health":
            return self.send(200, b'{"status": "ok"}')
        encoded = self.path.removeprefix("/userEvents/").encode("latin-1")
        # What is not UTF-8 becomes lone surrogates.
        user = urllib.parse.unquote_to_bytes(encoded).decode(errors="surrogateescape")
        require(not re.search(b"%(?![0-9A-Fa-f]{2})", encoded) and not SURROGATE.search(user), 400,
                "the userId must be percent-encoded UTF-8")
        try:
            # psycopg2 refuses a NUL with ValueError: no such user can be stored.
            revenue = None if "\0" in user else self.server.database.revenue(user)
        except Failure as failure:
            raise Refusal(503, str(failure), {"Retry-After": "2"}) from None
        require(revenue is not None, 404, "no revenue is known for this user")
        self.send(200, f'{{"userId": {json.dumps(user)}, "revenue": {revenue}}}'.encode())

    do_HEAD = do_GET  # render() leaves the body out

    def do_POST(self):
        """Log the one event, or the valid lines of the batch, and answer when they are durable."""
        media = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        require(media in (JSON, NDJSON), 415, f"the Content-Type must be {JSON} or {NDJSON}", ACCEPT_POST)
        require(self.headers.get("content-encoding", "identity").lower() == "identity", 415,
                "the body must not be compressed", {"Accept-Encoding": "identity"} | ACCEPT_POST)
        producer, first = self.read_id()
        body = self.read_body().removesuffix(b"\n")
        count = 1 if media == JSON else body.count(b"\n") + 1
        require(count <= MAX_LINES, 413, f"a batch must have at most {MAX_LINES} lines")
        require(producer is None or first + count - 1 <= MAX_SEQUENCE, 400,
                "the last line's sequence would be above 2^53 - 1")
        self.set_deadline(float("inf"))  # the request is whole: from now on the delay is ours, not the peer's
        with self.server.decoding[media]:
            accepted, events, rejected = check_lines(body, count)
            lines = self.stamp_lines(accepted, events, producer, first)
            if media == NDJSON:
                answer = {"message": "Events received", "accepted": events, "rejected": rejected}
                return self.log_lines(lines, json.dumps(answer).encode())
            require(events, 400, rejected[0]["error"] if rejected else "the body is empty")
            self.log_lines(lines, b'{"message": "Event received"}')

    def read_id(self):
        """Return the producer id and the sequence that the sender gave, or None and None; or raise Refusal."""
        producer, sequence = self.headers.get("producer-id"), self.headers.get("sequence")
        if producer is None and sequence is None:
            return None, None
        try:
            sequence = int(sequence) if re.fullmatch("[0-9]{1,16}", sequence or "") else None
            check_id(producer, sequence)
        except ValueError as error:
            raise Refusal(400, f"both Producer-Id and Sequence are needed, or neither: {error}") from None
        return producer, sequence

    def stamp_lines(self, accepted, events, producer, first):
        """Return the accepted lines, which are events in number, with ids: the sender's or, without, this worker's."""
        if producer is None:  # consecutive ids for the events alone: every gap would stay in the database
            return stamp(b"".join(accepted.values()), *self.server.assign_ids(events))
        return b"".join([stamp(lines, producer, first + index) for index, lines in accepted.items()])

    # -- Answering

    def log_lines(self, lines, body):
        """Have lines logged and then answered with 200 and body, or with an error, by the thread that syncs them."""
        def answer(error):
            """Send what came of it: nothing, or an exception."""
            if error is None:
                return self.send(200, body)
            status = 507 if getattr(error, "errno", None) in NO_SPACE else 503
            self.send_error(status, f"the log cannot be written: {sentence(error)}")
        self.server.log.append(lines, answer)

    def send_error(self, status, error, headers=()):
        """Send the answer that is owed: what was wrong."""
        self.send(status, json.dumps({"error": error}).encode(), headers)

    def send(self, status, body, headers=()):
        """Send the answer that is owed without waiting or, should the peer not read, in a thread of its own."""
        self.set_deadline(IDLE_SECONDS)
        try:
            data = self.render(status, body, headers)
            with contextlib.suppress(BlockingIOError):
                data = data[self.connection.send(data, socket.MSG_DONTWAIT):]
            if data:
                threading.Thread(target=self.send_rest, args=[data], daemon=True).start()
                return
        except (OSError, RuntimeError, MemoryError):  # the peer is gone; or there is no thread or memory for its answer
            _shut(self.connection, socket.SHUT_RDWR)
        self.owed.release()

    def send_rest(self, data):
        """Send what is left of the answer that is owed, however long the peer takes."""
        with contextlib.suppress(OSError):  # the peer is gone, or was cut off
            self.connection.sendall(data)
        self.owed.release()

    def render(self, status, body, headers):
        """Return the bytes of an answer, which ends the connection if a part of the request was not read."""
        self.close_connection |= self.unread or self.server.stopping
        date = http_date(int(time.time()), usegmt=True)
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Date: {date}"]
        lines += [f"{name}: {value}" for name, value in dict(headers).items()]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        if self.close_connection:
            lines.append("Connection: close")
        head = "\r\n".join([*lines, "", ""]).encode()
        return head if self.command == "HEAD" else head + body

    def linger(self):
        """Read on for DRAIN_SECONDS, until Worker ends it, or up to DRAIN_BYTES, and discard: closing a socket with
        unread data resets the connection, and the answer may be lost on its way (RFC 9112, 9.6)."""
        self.set_deadline(DRAIN_SECONDS)
        self.connection.shutdown(socket.SHUT_WR)
        left = DRAIN_BYTES
        while left > 0 and (data := self.rfile.read1(65536)):
            left -= len(data)


def _shut(connection, how):
    with contextlib.suppress(OSError):  # closed meanwhile
        connection.shutdown(how)


# ---- The processes --------------------------------------------------------------------------------------------------

class Worker:
    """One process's share of the server, which handlers know as self.server: a thread for each connection, on a
    listening socket that all workers share."""

    def __init__(self, listener, log, authorization):
        self.log, self.authorization = log, authorization
        self.database = Database()
        self.decoding = {NDJSON: threading.Semaphore(DECODED_BATCHES), JSON: contextlib.nullcontext()}
        self.stopping = False  # when it is True, every answer ends its connection
        self.deadlines = {}  # {connection: when it is cut off, in seconds of time.monotonic}, for all that are open
        self._listener = listener
        self._accepted = None  # the (connection, address) that has no thread yet
        self._producer, self._next_sequence = secrets.token_urlsafe(16), 1
        self._id_lock = threading.Lock()

    def run(self, lifeline):
        """Serve until lifeline, a pipe's reading end, reports that the parent stops or is dead, or until a sync of the
        log fails; then finish what was received, for at most STOP_SECONDS. Return the exit status."""
        threading.Thread(target=self.cut_off_overdue, daemon=True).start()
        ready = []
        while lifeline not in ready and not self.log.failed:
            self.accept()
            ready, _, _ = select.select([self._listener, lifeline], [], [], 0.1)  # log.failed wakes nobody
        self.stopping, now = True, time.monotonic()
        while time.monotonic() < now + BACKLOG_SECONDS and self.accept():
            pass  # take what the kernel has accepted: those peers may have sent requests
        _shut(self._listener, socket.SHUT_RD)  # for all processes that have it: whoever comes later is refused at once
        self._listener.close()
        for connection in list(self.deadlines):
            _shut(connection, socket.SHUT_RD)  # what has arrived can still be read on Linux; elsewhere it may be lost
        while self.deadlines and time.monotonic() < now + STOP_SECONDS:
            time.sleep(0.01)
        return EXIT_SYNC_FAILED if self.log.failed else 0

    def accept(self):
        """Serve a connection from the backlog in a thread of its own; return False if that is not possible now."""
        try:
            if len(self.deadlines) >= MAX_CONNECTIONS:
                raise OSError("too many connections")
            if self._accepted is None:
                self._accepted = connection, _ = self._listener.accept()
                connection.setblocking(True)  # on macOS an accepted socket inherits the listener's non-blocking mode
                self.deadlines[connection] = time.monotonic() + IDLE_SECONDS
            threading.Thread(target=self.serve_connection, args=self._accepted, daemon=True).start()
        except BlockingIOError:  # there is none, or another worker was faster
            return False
        except (OSError, RuntimeError):  # too many connections, descriptors or threads: wait until one ends
            time.sleep(PAUSE_SECONDS)
            return False
        self._accepted = None
        return True

    def serve_connection(self, connection, address):
        """Serve a connection to its end."""
        try:
            with contextlib.suppress(OSError):  # the peer is gone
                Handler(connection, address, self)
        finally:
            self.deadlines.pop(connection, None)
            connection.close()

    def assign_ids(self, count):
        """Return ids for count events that come without: this worker's producer id and the first sequence."""
        with self._id_lock:
            self._next_sequence += count
            return self._producer, self._next_sequence - count

    def cut_off_overdue(self):
        """Cut off the connections that are past their deadlines: first their reading, so that an answer can still be
        sent, and DRAIN_SECONDS later everything."""
        while not self.stopping:
            time.sleep(DRAIN_SECONDS / 4)
            with contextlib.suppress(MemoryError):  # for the next look there may be some
                for connection, deadline in list(self.deadlines.items()):
                    overdue = time.monotonic() - deadline
                    if overdue > 0:
                        _shut(connection, socket.SHUT_RD if overdue < DRAIN_SECONDS else socket.SHUT_RDWR)


def supervise(new_worker, count, announcement):
    """Start count processes that run new_worker().run(lifeline), say announcement, and replace those that die, until
    SIGTERM, Ctrl-C or a failed sync; return the exit status, or raise OSError if they cannot be started.

    lifeline is the reading end of a pipe whose only writing end is the parent's. Closing that, on purpose or by dying,
    is what tells the workers to stop.
    """
    lifeline, writing_end = os.pipe()
    hold = open(writing_end, "wb", buffering=0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it were ignored, the kernel would not report a worker's end
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: hold.close())
    workers, status = {fork_worker(new_worker, lifeline, hold) for _ in range(count)}, 0
    say(announcement)
    while workers:
        pid, ended = os.wait()
        if pid not in workers:
            continue  # started before this process became server.py, or an orphan that a container's process 1 adopts
        workers.remove(pid)
        code = os.waitstatus_to_exitcode(ended)
        if code == EXIT_SYNC_FAILED:
            status = 1
            hold.close()
        elif not hold.closed:
            warn(f"A worker ended with status {code}; starting another.")
        while len(workers) < count and not hold.closed:
            time.sleep(RESTART_SECONDS)
            with contextlib.suppress(OSError):  # there is no room for another process now
                workers.add(fork_worker(new_worker, lifeline, hold))
    return status


def fork_worker(new_worker, lifeline, hold):
    """Return the id of a new process that exits with what new_worker().run(lifeline) returns, or raise OSError."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        # A terminal or systemd tells every process to stop, but the parent decides.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        hold.close()
        status = new_worker().run(lifeline)
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)  # without waiting for a thread that hangs in a database


# ---- The command line -----------------------------------------------------------------------------------------------

def parse_command_line(arguments):
    """Return the options, or exit with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any (default: %(default)s)")
    parser.add_argument("--log", default=DEFAULT_LOG, help="file to append to (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="(default: one per core, %(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        parser.error("--port must be from 0 to 65535")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def read_authorization():
    """Return the value that the Authorization header must have, None if it may be missing; or raise Failure."""
    value = os.environb.get(b"EVENTS_AUTHORIZATION", b"").strip(b" \t")
    if not HEADER.fullmatch(f"Authorization:{value.decode('latin-1')}\r\n"):
        raise Failure("it has a line end or another control character in it, which no header can carry")
    return value or None


def listen(host, port):
    """Return a listening socket, or raise OSError, or UnicodeError for a malformed host."""
    addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = addresses[0]
    listener = socket.create_server(address, family=family, backlog=BACKLOG)
    listener.setblocking(False)  # every worker wakes for each connection, and accept() must not block the later ones
    return listener


def main(arguments=None):
    """Run the command line and return its exit status."""
    options = parse_command_line(arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until supervise() takes it over, Ctrl-C ends the process quietly
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # macOS begins with 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(DESCRIPTORS, hard)), hard))
    log = LogWriter(options.log)
    try:
        task = "use EVENTS_AUTHORIZATION"
        authorization = read_authorization()
        task = f"listen on {options.host} port {options.port} (choose others with --host and --port)"
        listener = listen(options.host, options.port)
        host, port = listener.getsockname()[:2]
        if authorization is None and not ipaddress.ip_address(host).is_loopback:
            raise Failure("everyone could send events there. Set EVENTS_AUTHORIZATION to the value that the "
                          "Authorization header of every request must have, or listen on 127.0.0.1")
        task = f"write the log {options.log} (name another with --log)"
        os.close(log.open())
        shown = f"[{host}]" if ":" in host else host
        task = f"start {options.workers} processes (choose another number with --workers)"
        return supervise(functools.partial(Worker, listener, log, authorization), options.workers,
                         f"Listening on http://{shown}:{port}, logging to {options.log}, {options.workers} workers.")
    except (Failure, OSError, UnicodeError) as error:
        warn(f"Cannot {task}: {sentence(error)}.")
        return 1


if __name__ == "__main__":
    sys.exit(main())
