"""Receive events over HTTP, append them to a log, and answer each user's revenue from PostgreSQL.

No event is acknowledged before its line is written and synced: a 200 that was sent survives kill -9 and a power cut.
Requests that arrive during a sync share the next one (group commit).
"""
import argparse
import concurrent.futures
import contextlib
import email.utils
import errno
import fcntl
import functools
import hmac
import http.server
import ipaddress
import json
import os
import re
import resource
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse

import psycopg2

from data_processor import (DEFAULT_LOG, MAX_SEQUENCE, amount_of, check_name, check_unnamed, connect, decode_event,
                            decode_lines, end_of_lines, leads_to)

MAX_BODY_BYTES = 1024 * 1024
MAX_LINES = 10_000
MAX_LINE_BYTES = 16 * 1024  # a request line, a header field, a chunk's size
MAX_HEAD_BYTES = 64 * 1024
MAX_FIELDS = 100

REQUEST_SECONDS = 30  # from a request's first byte to its last; an idle connection has as long to begin one
DATABASE_SECONDS = 2
DRAIN_SECONDS = 2  # reading what a refused request still sends, so that its sender sees the answer and not a reset
DRAIN_BYTES = 16 * 1024 * 1024
STOP_SECONDS = 10  # for the requests that were received when the server stops
MAX_CONNECTIONS = 1000  # a worker's; more wait in the backlog
DESCRIPTORS = 2048  # a worker's, if the system allows
BACKLOG = 4096  # the kernel lowers it to its own limit (net.core.somaxconn)
RESTART_SECONDS = 0.5  # between the death of a worker and its replacement, lest a broken one fills the machine

EXIT_SYNC_FAILED = 3  # a worker's status: its parent ends the server
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def say(words):
    """Print words to stderr, if possible: a disk that is full below it must not end the server."""
    with contextlib.suppress(OSError):
        print(words, file=sys.stderr)


# ---- The log --------------------------------------------------------------------------------------------------------

def sync_file(fd):
    """Return when the file's data is on the disk, or raise OSError."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # macOS: fsync stops at the drive's cache
    else:
        os.fdatasync(fd)


class SyncFailed(OSError):
    """The kernel may have dropped what was written; no later sync can be believed."""


class Log:
    """The log as one worker process appends to it; the others append to the same file."""

    def __init__(self, path):
        """Open the log, creating it when it is missing, or raise OSError."""
        self.path = path
        self.failed = None  # the SyncFailed after which nothing is written
        self._group = []  # [(lines, done)] that are written and synced together next
        self._joining = threading.Lock()  # guards _group
        self._writing = threading.Lock()  # held by the one thread that writes
        self._fd = self._open()

    def _open(self):
        directory = os.open(os.path.dirname(os.path.realpath(self.path)), os.O_RDONLY)
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._sync(os.fsync, directory)  # the name must be as durable as the lines
        finally:
            os.close(directory)
        return fd

    def _sync(self, sync, fd):
        try:
            sync(fd)
        except OSError as error:
            self.failed = SyncFailed(error.errno, error.strerror)
            raise self.failed from error

    def append(self, lines, done):
        """Have lines (bytes, whole lines) made durable and then done(error) called, with None or the exception for
        which they must not be acknowledged.

        The first thread of a group writes for all of it, as soon as the group before is on the disk, and calls every
        done; the others return at once. (Were each of them woken to send its own answer, a third fewer requests would
        be served.)
        """
        with self._joining:
            group = self._group
            group.append((lines, done))
            if len(group) > 1:
                return
        error = None
        with self._writing:
            try:
                self._commit(group)
            except Exception as failure:
                error = failure
            for _, done in group:  # before the next group is written: who is answered now may still join it
                done(error)

    def _commit(self, group):
        try:
            try:
                end = self._lock()
            finally:
                with self._joining:
                    self._group = []  # not before: whoever came during the last sync, or this lock, is in
            data = b"".join([lines for lines, _ in group])
            if end == 0:
                data = _name_log(data)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._fd, rest):]
            except OSError:
                os.ftruncate(self._fd, end)
                raise
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._sync(sync_file, self._fd)

    def _lock(self):
        """Lock the file that path leads to, opening it anew after a rotation, and return the end of its last line."""
        if self.failed:
            raise self.failed
        while True:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            end = self._cut_off_unfinished_line()  # also of a renamed log: it may be concatenated with others
            if leads_to(self.path, self._fd):
                return end
            new = self._open()
            os.close(self._fd)
            self._fd = new

    def _cut_off_unfinished_line(self):
        """Cut off what a killed or failed writer left, a line without LF, which was never acknowledged; return the end
        of the file."""
        end = size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            end = end_of_lines(self._fd, size)
            os.ftruncate(self._fd, end)
            say(f"{self.path}: cut off {size - end} bytes of an unfinished line at byte {end}.")
        return end


def _name_log(data):
    """Put a random field "log" into the stamp of the first line, so that no two logs begin alike."""
    end = data.index(b"\n")
    at = data.rindex(b', "producerId": ', 0, end)
    return b'%b, "log": "%b"%b' % (data[:at], secrets.token_hex(16).encode(), data[at:])


def stamp(text, producer, sequence):
    """Return the line to be logged for the event in text, a JSON object, without LF."""
    text = text.rstrip().replace("\r", " ").replace("\n", " ")
    return f'{text[:-1]}, "producerId": "{producer}", "sequence": {sequence}}}'


# ---- The database ---------------------------------------------------------------------------------------------------

class DatabaseUnavailable(Exception):
    """The database gave no answer in time."""


class Database:
    """One connection, used by one thread of its own, so that a database that hangs holds up nothing else."""

    def __init__(self):
        self._connection = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def revenue(self, user):
        """Return the user's revenue as exact decimal text, None without any; raise DatabaseUnavailable after 2 s."""
        query = self._thread.submit(self._query, user)
        try:
            return query.result(DATABASE_SECONDS)
        except (psycopg2.Error, TimeoutError) as error:
            query.cancel()
            raise DatabaseUnavailable from error

    def _query(self, user):
        reused = self._connection is not None and not self._connection.closed
        if not reused:
            # The last ends the wait for a host that vanished, of which statement_timeout would hear nothing.
            self._connection = connect(connect_timeout=DATABASE_SECONDS, tcp_user_timeout=DATABASE_SECONDS * 1000)
            self._connection.autocommit = True
        try:
            with self._connection.cursor() as sql:
                if not reused:
                    sql.execute("SET statement_timeout = %s", [DATABASE_SECONDS * 1000])
                sql.execute("SELECT trim_scale(revenue)::text FROM users_revenue WHERE user_id = %s", [user])
                row = sql.fetchone()
                return row and row[0]
        except psycopg2.errors.UndefinedTable:
            return None
        except psycopg2.errors.QueryCanceled:
            raise
        except (psycopg2.OperationalError, psycopg2.InterfaceError):
            self._connection.close()
            if reused:
                return self._query(user)  # the database was restarted since
            raise


# ---- HTTP -----------------------------------------------------------------------------------------------------------

REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r\n")
FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\0\r\n]*)\r\n")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0\r\n]*)?\r\n")
ABSOLUTE_FORM = re.compile(rb"(?i)https?://([^/?#]*)(/.*)")
LOOPBACK_HOST = re.compile(rb"(?i)(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]*)?")
ONCE = {b"host", b"authorization", b"content-length", b"transfer-encoding", b"content-type", b"producer-id",
        b"sequence", b"expect"}

JSON, NDJSON = "application/json", "application/x-ndjson"
ACCEPT_POST = {"Accept-Post": f"{JSON}, {NDJSON}"}
RECEIVED = b'{"message": "Event received"}'
TOO_LARGE = 413, "the body must be at most 1 MiB long"


class Refusal(Exception):
    """A request that is answered with an error: its status, the words for its sender, and headers."""

    def __init__(self, status, error, headers=()):
        super().__init__(error)
        self.answer = status, json.dumps({"error": error}).encode(), dict(headers)


class PeerGone(OSError):
    """The connection ended where a request should have gone on, or began none."""


@functools.lru_cache(maxsize=1)
def http_date(second):
    """Return the Date header's value for a POSIX time."""
    return email.utils.formatdate(second, usegmt=True)


def render(status, body, headers, close):
    """Return the bytes of an answer."""
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Date: {http_date(int(time.time()))}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if status != 204:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode() + body


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Every request is read with strict framing (RFC 9112) and answered in one send."""

    disable_nagle_algorithm = True

    def setup(self):
        """No answer is pending yet."""
        super().setup()
        self.answered = threading.Event()
        self.answered.set()

    def finish(self):
        """Let the last answer go out before the connection is closed."""
        self.answered.wait()
        super().finish()

    def handle_one_request(self):
        """Answer one request; keep the connection only when all of the request was read."""
        self.close_connection = True
        self.unread = True
        self.method = None
        if self.answered.is_set():
            self.set_deadline(REQUEST_SECONDS)
        try:
            self.read_head()
            answer = self.route()
            if answer is None:
                return  # it is sent when the events are on the disk
        except Refusal as refusal:
            answer = refusal.answer
        except OSError:  # the connection broke, or we ended its reading
            if not self.server.overdue(self.connection) or self.method is None:
                return
            answer = Refusal(408, "the request took longer than 30 seconds").answer
        except Exception:
            traceback.print_exc()
            answer = Refusal(500, "internal error").answer
        self.set_deadline(REQUEST_SECONDS)
        self.send_answer(*answer)

    def set_deadline(self, seconds):
        """Allow this connection so many seconds from now for what it does next."""
        self.server.deadlines[self.connection] = time.monotonic() + seconds

    # -- Reading

    def read_line(self, too_long=431):
        """Return the next line of the head or of the chunked framing, or raise PeerGone or Refusal."""
        line = self.rfile.readline(MAX_LINE_BYTES + 1)
        if not line.endswith(b"\n"):
            if len(line) > MAX_LINE_BYTES:
                raise Refusal(too_long, f"a line is longer than {MAX_LINE_BYTES} bytes")
            raise PeerGone
        return line

    def read_head(self):
        """Read and check a request's line and fields, or raise PeerGone or Refusal."""
        if not self.rfile.peek(1):
            raise PeerGone
        self.answered.wait()
        self.set_deadline(REQUEST_SECONDS)
        self.method = b""  # a request has begun
        line = self.read_line(414)
        if line == b"\r\n":  # RFC 9112, 2.2: some clients send one too many after a body
            line = self.read_line(414)
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            raise Refusal(400, "malformed request line")
        self.method, self.target, major, minor = match.groups()
        if major != b"1":
            raise Refusal(505, "the server speaks HTTP/1.1")
        self.fields = self.read_fields()
        if absolute := ABSOLUTE_FORM.fullmatch(self.target):  # RFC 9112, 3.2.2: it overrides Host
            self.fields[b"host"], self.target = absolute.groups()
        self.path = self.target.partition(b"?")[0].decode("latin-1")  # still percent-encoded
        self.persistent = minor != b"0"
        self.check_framing()
        self.check_access()

    def read_fields(self):
        """Return {lower-case name: value} of the fields up to the empty line."""
        fields, size = {}, 0
        for _ in range(MAX_FIELDS + 1):
            line = self.read_line()
            if line == b"\r\n":
                return fields
            size += len(line)
            match = FIELD.fullmatch(line)
            if not match:
                raise Refusal(400, "malformed header field")
            name, value = match[1].lower(), match[2].strip(b" \t")
            if name in fields:
                if name in ONCE:
                    raise Refusal(400, f"repeated header {name.decode().title()}")
                value = fields[name] + b", " + value
            fields[name] = value
            if size > MAX_HEAD_BYTES:
                break
        raise Refusal(431, "too many header fields")

    def check_framing(self):
        """Find out how long the body is: length is a number of bytes, None for a chunked body or no body at all."""
        coding, length = self.fields.get(b"transfer-encoding"), self.fields.get(b"content-length")
        if coding is not None and (length is not None or coding.lower() != b"chunked" or not self.persistent):
            raise Refusal(400, "a body must have either one Content-Length or, in HTTP/1.1, Transfer-Encoding: chunked")
        if length is not None and not length.isdigit():  # of bytes: ASCII digits
            raise Refusal(400, "malformed Content-Length")
        if self.persistent and b"host" not in self.fields:
            raise Refusal(400, "the Host header is missing")
        self.chunked = coding is not None
        # Sixteen digits are too large, and 4,301 are more than int() takes.
        self.length = None if length is None else int(length.lstrip(b"0")[:16] or b"0")
        self.unread = self.chunked or bool(self.length)
        self.close_connection = not self.persistent or b"close" in self.fields.get(b"connection", b"").lower()

    def check_access(self):
        """Refuse who may not ask."""
        secret = self.server.authorization
        if secret is None:
            # A web page in a browser on this machine can reach a loopback address by a name of its own.
            if not LOOPBACK_HOST.fullmatch(self.fields.get(b"host", b"")):
                raise Refusal(421, "without EVENTS_AUTHORIZATION only requests to a loopback host are served")
        elif self.path != "/health":
            if not hmac.compare_digest(self.fields.get(b"authorization", b""), secret):
                raise Refusal(401, "the Authorization header is missing or wrong", {"WWW-Authenticate": "Bearer"})

    def read_body(self):
        """Return the body, decoded; ask for it first when the sender waits to be asked."""
        if not self.chunked and self.length is None:
            raise Refusal(411, "the request must have a Content-Length or be chunked")
        if self.length is not None and self.length > MAX_BODY_BYTES:
            raise Refusal(*TOO_LARGE)
        expect = self.fields.get(b"expect")
        if expect is not None and self.unread and self.persistent:  # HTTP/1.0 knows none (RFC 9110, 10.1.1)
            if expect.lower() != b"100-continue":
                raise Refusal(417, "the only known expectation is 100-continue")
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.read_chunks() if self.chunked else self.read_exactly(self.length)
        self.unread = False
        return body

    def read_exactly(self, length):
        """Return length bytes, or raise PeerGone."""
        data = self.rfile.read(length)
        if len(data) < length:
            raise PeerGone
        return data

    def read_chunks(self):
        """Return the body of a chunked request (RFC 9112, 7.1); extensions and trailers are read and dropped."""
        chunks, total = [], 0
        while True:
            match = CHUNK_SIZE.fullmatch(self.read_line(400))
            if not match:
                raise Refusal(400, "malformed chunk size")
            size = int(match[1], 16)
            if size == 0:
                self.read_fields()
                return b"".join(chunks)
            total += size
            if total > MAX_BODY_BYTES:
                raise Refusal(*TOO_LARGE)
            chunks.append(self.read_exactly(size))
            if self.read_exactly(2) != b"\r\n":
                raise Refusal(400, "a chunk is longer than its size")

    # -- Answering

    def route(self):
        """Return (status, body, headers) for the request that was read, or None when it will be answered later."""
        methods = self.ROUTES.get("/userEvents/" if self.path.startswith("/userEvents/") else self.path)
        if methods is None:
            raise Refusal(404, "no such path; there are /liveEvent, /userEvents/<userId> and /health")
        if self.method not in methods:
            allowed = ", ".join([method.decode() for method in methods])
            raise Refusal(405, f"the methods here are: {allowed}", {"Allow": allowed})
        return methods[self.method](self)

    def post_events(self):
        """Log one event, or a batch, and answer when it is durable."""
        media = self.fields.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
        if media not in (JSON, NDJSON):
            raise Refusal(415, f"the Content-Type must be {JSON} or {NDJSON}", ACCEPT_POST)
        producer, first = self.read_name()
        body = self.read_body()
        if media == NDJSON:
            return self.log_batch(body, producer, first)
        try:
            event = decode_event(body)
            amount_of(event)
            check_unnamed(event)
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        if producer is None:
            producer, first = self.server.take_names(1)
        return self.log(stamp(body.decode(), producer, first) + "\n", RECEIVED)

    def read_name(self):
        """Return the producer id and the sequence that the sender gave, or None and None."""
        producer, sequence = self.fields.get(b"producer-id"), self.fields.get(b"sequence")
        if producer is None and sequence is None:
            return None, None
        if producer is None or sequence is None:
            raise Refusal(400, "Producer-Id and Sequence must be sent together")
        try:
            producer = producer.decode("latin-1")
            sequence = int(sequence) if re.fullmatch(rb"[0-9]{1,16}", sequence) else None
            check_name(producer, sequence)
        except ValueError as error:
            raise Refusal(400, f"Producer-Id and Sequence: {error}") from None
        return producer, sequence

    def log_batch(self, body, producer, first):
        """Log the valid lines of an NDJSON body, and answer how many they were and what is wrong with the others."""
        if not body.endswith(b"\n"):
            body += b"\n"
        lines = body.count(b"\n")
        if lines > MAX_LINES:
            raise Refusal(413, f"a batch must have at most {MAX_LINES:,} lines")
        if producer is not None and first + lines - 1 > MAX_SEQUENCE:
            raise Refusal(400, "the last line's sequence would be above 2^53 - 1")
        accepted, rejected = [], []
        for number, event in enumerate(decode_lines(body)):
            try:
                if type(event) is dict:
                    amount_of(event)
                    check_unnamed(event)
                    accepted.append(number)
                elif event is not None:
                    raise event
            except ValueError as error:
                rejected.append({"line": number + 1, "error": str(error)})
        answer = json.dumps({"message": "Events received", "accepted": len(accepted), "rejected": rejected}).encode()
        if not accepted:
            return 200, answer, {}
        if producer is None:
            producer, first = self.server.take_names(lines)
        texts = body.split(b"\n")
        return self.log("\n".join([stamp(texts[i].decode(), producer, first + i) for i in accepted]) + "\n", answer)

    def log(self, lines, body):
        """Have lines logged and then answered with 200 and body, or with an error, by the thread that syncs them."""
        lines, close = lines.encode(), self.close_connection

        def answer(error):
            status, content = 200, body
            if error:
                full = getattr(error, "errno", None) in NO_SPACE and not isinstance(error, SyncFailed)
                status = 507 if full else 503
                content = Refusal(status, f"the log cannot be written: {getattr(error, 'strerror', error)}").answer[1]
            self.set_deadline(REQUEST_SECONDS)
            self.send_without_waiting(render(status, content, {}, close))
        self.set_deadline(float("inf"))  # however long the disk takes
        self.answered.clear()
        self.server.log.append(lines, answer)

    def send_without_waiting(self, data):
        """Send data, in a thread of its own should the peer not read what it was sent before."""
        try:
            with contextlib.suppress(BlockingIOError):
                data = data[self.connection.send(data, socket.MSG_DONTWAIT):]
            if data:
                threading.Thread(target=self.send_rest, args=[data], daemon=True).start()
                return
        except OSError:
            pass  # the peer is gone
        except RuntimeError:  # no more threads: this peer loses its answer, the others must not
            _shut(self.connection, socket.SHUT_RDWR)
        self.answered.set()

    def send_rest(self, data):
        """Send data, however long the peer takes."""
        with contextlib.suppress(OSError):  # the peer is gone, or was cut off
            self.connection.sendall(data)
        self.answered.set()

    def get_revenue(self):
        """Answer a user's revenue, digit for digit."""
        encoded = self.path.removeprefix("/userEvents/")
        try:
            if re.search("%(?![0-9A-Fa-f]{2})", encoded):
                raise ValueError
            user = urllib.parse.unquote_to_bytes(encoded.encode("latin-1")).decode()
        except ValueError:
            raise Refusal(400, "the userId must be percent-encoded UTF-8") from None
        try:
            # psycopg2 refuses a NUL with ValueError: no such user can be stored.
            revenue = None if "\0" in user else self.server.database.revenue(user)
        except DatabaseUnavailable:
            raise Refusal(503, "the database does not answer", {"Retry-After": "2"}) from None
        if revenue is None:
            raise Refusal(404, "no revenue is known for this user")
        return 200, f'{{"userId": {json.dumps(user)}, "revenue": {revenue}}}'.encode(), {}

    ROUTES = {
        "/liveEvent": {b"POST": post_events,
                       b"OPTIONS": lambda self: (204, b"", {"Allow": "POST, OPTIONS"} | ACCEPT_POST)},
        "/userEvents/": {b"GET": get_revenue},
        "/health": {b"GET": lambda self: (200, b'{"status": "ok"}', {})}}

    def send_answer(self, status, body, headers):
        """Send the answer in one piece, and end a connection on which a part of the request was not read."""
        if self.unread:
            self.close_connection = True
        answer = render(status, body, headers, self.close_connection)
        self.connection.sendall(answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if self.method == b"HEAD" else answer)
        if self.unread:
            self.linger()

    def linger(self):
        """Read on for a moment without looking: closing a socket with unread data resets the connection, and the answer
        may be lost on its way (RFC 9112, 9.6)."""
        self.set_deadline(DRAIN_SECONDS)
        self.connection.shutdown(socket.SHUT_WR)
        drained = 0
        while drained < DRAIN_BYTES and not self.server.overdue(self.connection) and (data := self.rfile.read1(65536)):
            drained += len(data)


# ---- The processes --------------------------------------------------------------------------------------------------

class Worker(http.server.ThreadingHTTPServer):
    """One process's share of the server: a thread a connection, on a listening socket that all workers share."""

    def __init__(self, listener, log, authorization):
        super().__init__(listener.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.log = log
        self._producer, self._next_sequence = secrets.token_urlsafe(16), 1
        self._naming = threading.Lock()
        self.database = Database()
        self.authorization = authorization
        self.deadlines = {}  # connection: when it is cut off, in seconds of time.monotonic
        self._next_look = 0.0

    def run(self, lifeline):
        """Serve until the lifeline, a pipe's reading end, reports that the parent stops or is dead, or until the log
        fails; finish what was received, and return the exit status."""
        threading.Thread(target=self._await_end, args=[lifeline], daemon=True).start()
        self.serve_forever(poll_interval=0.1)
        try:
            while True:
                self.process_request(*self.get_request())  # the backlog: it may have sent its requests
        except (OSError, RuntimeError):
            self.socket.close()
        for connection in list(self.deadlines):
            _shut(connection, socket.SHUT_RD)  # on Linux, what has arrived can still be read
        end = time.monotonic() + STOP_SECONDS
        while self.deadlines and time.monotonic() < end:
            time.sleep(0.01)
        return EXIT_SYNC_FAILED if self.log.failed else 0

    def _await_end(self, lifeline):
        os.read(lifeline, 1)
        self.shutdown()

    def get_request(self):
        """Accept a connection, or raise OSError when another worker was faster or when there are too many."""
        if len(self.deadlines) >= MAX_CONNECTIONS:
            time.sleep(0.05)
            raise BlockingIOError
        try:
            connection, address = self.socket.accept()
        except BlockingIOError:
            raise
        except OSError:
            time.sleep(0.05)  # out of descriptors: until one is free
            raise
        connection.setblocking(True)  # macOS hands the listener's mode on
        self.deadlines[connection] = time.monotonic() + REQUEST_SECONDS
        return connection, address

    def shutdown_request(self, request):
        """Forget and close a connection."""
        self.deadlines.pop(request, None)
        super().shutdown_request(request)

    def take_names(self, count):
        """Return the names for count events that come without: this worker's producer id, and the first's sequence."""
        with self._naming:
            self._next_sequence += count
            return self._producer, self._next_sequence - count

    def overdue(self, connection):
        """Tell whether the connection has passed its deadline."""
        return time.monotonic() > self.deadlines.get(connection, 0)

    def service_actions(self):
        """Once a second cut off the connections that are overdue: first their reading, so that the answer can still be
        sent, then everything."""
        now = time.monotonic()
        if self.log.failed:
            threading.Thread(target=self.shutdown, daemon=True).start()
        if now < self._next_look:
            return
        self._next_look = now + 1
        for connection, deadline in list(self.deadlines.items()):
            if now > deadline:
                _shut(connection, socket.SHUT_RD if now < deadline + DRAIN_SECONDS else socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """Report a defect of ours; a peer that went away is none."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


def _shut(connection, how):
    with contextlib.suppress(OSError):  # closed meanwhile
        connection.shutdown(how)


class Supervisor:
    """The parent: it keeps the workers alive, and they end when it does.

    Workers hold the reading end of a pipe whose only writing end is the parent's. Closing it, on purpose or by dying,
    is the one signal to stop.
    """

    def __init__(self, start_worker, count):
        self._start_worker, self._count = start_worker, count
        self._lifeline, self._hold = os.pipe()
        self._stopping = False
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it gets no children from os.wait
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        self._workers = {self._fork() for _ in range(count)}

    def run(self):
        """Keep the workers running until SIGTERM, Ctrl-C or a failed sync; return the exit status."""
        status = 0
        while self._workers:
            pid, ended = os.wait()
            if pid not in self._workers:
                continue  # a child of the program that this process was before, or an orphan that PID 1 inherits
            self._workers.remove(pid)
            code = os.waitstatus_to_exitcode(ended)
            if code == EXIT_SYNC_FAILED:
                status = 1
                self._stop()
            while len(self._workers) < self._count and not self._stopping:
                say(f"A worker ended with status {code}; starting another.")
                time.sleep(RESTART_SECONDS)
                with contextlib.suppress(OSError):  # no room for another process now
                    self._workers.add(self._fork())
        return status

    def _stop(self):
        if not self._stopping:
            self._stopping = True
            os.close(self._hold)

    def _fork(self):
        if pid := os.fork():
            return pid
        status = 1
        try:
            # A terminal or systemd tells every process to stop, but the parent decides.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            if not self._stopping:
                os.close(self._hold)
            status = self._start_worker(self._lifeline)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)  # without waiting for a thread that hangs in a database


def listen(host, port):
    """Return a listening socket, or raise OSError."""
    addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = addresses[0]
    listener = socket.create_server(address, family=family, backlog=BACKLOG)
    listener.setblocking(False)  # all workers wake for a connection that one of them gets
    return listener


def parse_command_line(arguments):
    """Return the options, or exit with status 2."""
    parser = argparse.ArgumentParser(
        description="Receive events over HTTP, append them durably to a log, and answer each user's revenue.",
        epilog="Example: python server.py --port 8080. EVENTS_AUTHORIZATION holds the value that a request's "
               "Authorization header must have; without it the server listens on loopback addresses only. The "
               "database is the one that DATABASE_URL or libpq's variables (PGHOST, ...) name; events are taken "
               "without one, too.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any (default: %(default)s)")
    parser.add_argument("--log", default=DEFAULT_LOG, help="file to append to (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes (default: one per core, %(default)s)")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def allow_descriptors():
    """Raise the process's limit of open files; macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
        wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(listener, path, authorization, lifeline):
    """Run a worker on the listening socket and the log at path; return the process's exit status."""
    try:
        # Opened after the fork: a lock taken through an inherited descriptor would not exclude the other workers.
        log = Log(path)
    except OSError as error:
        say(f"Cannot write the log {path}: {error.strerror}.")
        return EXIT_SYNC_FAILED if isinstance(error, SyncFailed) else 1
    status = Worker(listener, log, authorization).run(lifeline)
    if log.failed:
        say(f"{path}: a sync failed ({log.failed.strerror}); its last lines may not be on the disk. Move the log "
            "aside, so that a new one is begun, before starting the server again.")
    return status


def main(arguments=None):
    """Run the command line and return its exit status."""
    options = parse_command_line(arguments)
    allow_descriptors()
    authorization = os.fsencode(os.environ.get("EVENTS_AUTHORIZATION", "")) or None
    try:
        listener = listen(options.host, options.port)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if getattr(error, "errno", 0) in errno.errorcode else error
        say(f"Cannot listen on {options.host} port {options.port}: {reason}. Choose another with --host and --port.")
        return 1
    host, port = listener.getsockname()[:2]
    if authorization is None and not ipaddress.ip_address(host).is_loopback:
        say(f"Refusing to listen on {host} for everyone: set EVENTS_AUTHORIZATION to the value that the Authorization "
            "header of every request must have, or listen on 127.0.0.1.")
        return 1
    try:
        os.close(os.open(options.log, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644))
    except OSError as error:
        say(f"Cannot write the log {options.log}: {error.strerror}. Name another with --log.")
        return 1
    supervisor = Supervisor(functools.partial(serve, listener, options.log, authorization), options.workers)
    shown = f"[{host}]" if ":" in host else host
    print(f"Listening on http://{shown}:{port}, logging to {options.log}, {options.workers} workers.", flush=True)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
