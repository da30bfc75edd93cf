"""Send the events of a file to the server, then exit.

Every line is delivered once: all requests carry the delivery's producer id and the line's number as its sequence, so
that the system counts a line once however often it is sent. What a killed client needs to go on under the same id is
in FILE.delivery from before the first request until every line has been answered.

This file needs Python's standard library alone and can be copied to any machine by itself.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import email.message
import fcntl
import hashlib
import http.client
import json
import os
import random
import re
import secrets
import signal
import stat
import sys
import threading
import time
import urllib.parse
import urllib.request

BATCH_BYTES = 512 * 1024  # also the longest line that is sent at all
CONCURRENT_REQUESTS = 4
BATCHES_AHEAD = 2 * CONCURRENT_REQUESTS  # read and not yet answered: all that is held in memory
REQUEST_SECONDS = 10
MAX_ANSWER_BYTES = 8 * 1024 * 1024  # 10,000 lines with an error each
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.05, 5.0
PROGRESS_SECONDS = 0.2

JSON, NDJSON = "application/json", "application/x-ndjson"


class Failure(Exception):
    """Something that ends the run: one sentence that says what to do."""


class Retry(Exception):
    """Why a request failed that may succeed when it is sent again."""


# ---- The file and its delivery --------------------------------------------------------------------------------------

def sync_directory(path):
    """Make the names in path's directory durable."""
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def publish(file, path):
    """Make an open temporary file durable under the name path, replacing what was there."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    sync_directory(path)


class Delivery:
    """The sending of one file's content under one producer id, kept in FILE.delivery while it lasts."""

    def __init__(self, path, restart=False):
        """Lock the file and go on with its unfinished delivery, or begin a new one; raise Failure or OSError."""
        self.path = path
        self.state_path = path + ".delivery"
        self.resumed = False
        self.file = open(path, "rb")
        if not stat.S_ISREG(os.fstat(self.file.fileno()).st_mode):
            raise Failure(f"{path} is not a regular file.")
        self._lock(self.file)
        self.size = os.fstat(self.file.fileno()).st_size
        content = {"size": self.size, "sha256": hashlib.file_digest(self.file, "sha256").hexdigest()}
        self.file.seek(0)
        with contextlib.suppress(FileNotFoundError):
            self._state = open(self.state_path)
            self._lock(self._state)  # whoever sends a file that was at this path before still needs it
            self.resumed = not restart
        if self.resumed:
            self.producer = self._resume(content)
        else:
            self.producer = secrets.token_urlsafe(16)
            self._state = open(self.state_path + ".new", "w")
            self._lock(self._state)
            json.dump({"producerId": self.producer} | content, self._state)
            publish(self._state, self.state_path)

    def _lock(self, file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"{self.path} is being sent by another client; wait until it is done.") from None

    def _resume(self, content):
        advice = ("Restore it, or run again with --restart to send the whole file as a new delivery; lines that were "
                  "already delivered then count twice.")
        try:
            state = json.load(self._state)
            producer = state.pop("producerId")
            if not isinstance(producer, str) or not producer:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Failure(f"{self.state_path} cannot be understood. {advice}") from None
        if state != content:
            raise Failure(f"{self.path} has changed since its unfinished delivery began. {advice}")
        return producer

    def close(self):
        """Forget the delivery: every line was answered."""
        os.unlink(self.state_path)
        sync_directory(self.state_path)


class Batch:
    """Consecutive lines of the file, from number first on.

    lines is what is to be sent, a blank line for one that is too long; offsets are where in the file they begin, and
    the end of the last one; rejected holds (line number, error).
    """

    def __init__(self, first, offset):
        self.first = first
        self.lines, self.offsets, self.rejected = [], [offset], []
        self.size = 0  # bytes in lines
        self.undelivered = first  # lines before this one were answered
        self.accepted = 0

    @property
    def last(self):
        """The number of the last line."""
        return self.first + len(self.lines) - 1

    def add(self, line, end):
        """Add a line that ends at an offset of the file."""
        self.lines.append(line)
        self.offsets.append(end)
        self.size += len(line)

    def events(self):
        """Return how many lines are not blank."""
        return sum([not line.isspace() for line in self.lines])


def read_batches(delivery, batch_size):
    """Yield the lines of the delivery as batches of at most batch_size lines and 512 KiB."""
    file, offset = delivery.file, 0
    batch = Batch(1, 0)
    while offset < delivery.size:
        line = file.readline(min(BATCH_BYTES + 1, delivery.size - offset))
        offset += len(line)
        if not line:
            raise Failure(f"{delivery.path} was shortened while it was read.")
        if len(batch.lines) == batch_size or batch.size + len(line) > BATCH_BYTES and batch.lines:
            yield batch
            batch = Batch(batch.last + 1, batch.offsets[-1])
        if len(line) > BATCH_BYTES:
            while not line.endswith(b"\n") and offset < delivery.size and line:
                line = file.readline(min(BATCH_BYTES, delivery.size - offset))
                offset += len(line)
            batch.rejected.append((batch.last + 1, f"a line must be at most {BATCH_BYTES // 1024} KiB long"))
            line = b"\n"
        batch.add(line, offset)
    if batch.lines:
        yield batch


class Rejects:
    """The rejected lines: named on stderr, and collected in FILE.rejected."""

    def __init__(self, delivery):
        self._delivery = delivery
        self._path = delivery.path + ".rejected"
        self._file = None
        self.count = 0

    def add(self, batch):
        """Report and collect the rejected lines of a delivered batch."""
        for number, error in sorted(batch.rejected):
            self.count += 1
            print(f"{self._delivery.path}:{number}: {error}", file=sys.stderr)
            if self._file is None:
                self._file = open(self._path + ".new", "wb")
            offset, end = batch.offsets[number - batch.first:][:2]
            ended = False
            while piece := os.pread(self._delivery.file.fileno(), min(BATCH_BYTES, end - offset), offset):
                self._file.write(piece)
                offset += len(piece)
                ended = piece.endswith(b"\n")
            if not ended:
                self._file.write(b"\n")

    def publish(self):
        """Make FILE.rejected durable, replacing an older one, if there is anything in it."""
        if self._file:
            with self._file:
                publish(self._file, self._path)


# ---- The requests ---------------------------------------------------------------------------------------------------

class Sender:
    """Requests to one server, from several threads at once."""

    def __init__(self, url, producer, give_up_after):
        self._url = url
        self._headers = {"Producer-Id": producer}
        if authorization := os.environ.get("EVENTS_AUTHORIZATION"):
            self._headers["Authorization"] = os.fsencode(authorization)
        self._give_up_after = give_up_after
        self._last_success = time.monotonic()
        self._stopped = threading.Event()
        self.takes_batches = False
        # Without the handlers that follow redirects and raise exceptions: a redirect is an error, not a delivery.
        self._opener = urllib.request.OpenerDirector()
        local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        for handler in (urllib.request.ProxyHandler({} if local else None), urllib.request.HTTPHandler(),
                        urllib.request.HTTPSHandler()):
            self._opener.add_handler(handler)

    def ask(self):
        """Find out whether the server takes batches, waiting for it if it is not up yet; raise Failure."""
        self.takes_batches = self._persist(self._ask_once)

    def _ask_once(self):
        status, headers, payload = self._exchange("OPTIONS", None, {})
        if status in (404, 405, 501):
            return False
        self._check(status, payload)
        return NDJSON in headers.get("Accept-Post", "")

    def deliver(self, batch):
        """Deliver a batch and set what was accepted and rejected of it, or raise Failure."""
        if self.takes_batches:
            rejected = self._persist(self._post_batch, batch)
        else:
            rejected = []
            for number, line in enumerate(batch.lines, batch.first):
                batch.undelivered = number
                if not line.isspace() and (error := self._persist(self._post_event, number, line)):
                    rejected.append((number, error))
        batch.accepted = batch.events() - len(rejected)
        batch.rejected += rejected
        batch.undelivered = batch.last + 1

    def _post_batch(self, batch):
        status, _, payload = self._exchange("POST", b"".join(batch.lines),
                                            {"Content-Type": NDJSON, "Sequence": str(batch.first)})
        self._check(status, payload)
        try:
            answer = json.loads(payload)
            rejected = {batch.first + entry["line"] - 1: str(entry["error"]) for entry in answer["rejected"]}
            numbers = range(batch.first, batch.last + 1)
            complete = (status == 200 and len(rejected) == len(answer["rejected"])
                        and all(number in numbers and not batch.lines[number - batch.first].isspace()
                                for number in rejected)
                        and 0 <= answer["accepted"] == batch.events() - len(rejected))
        except (ValueError, KeyError, TypeError, RecursionError):
            complete = False
        if not complete:
            raise Retry(f"the answer {_excerpt(payload)} does not account for every line")
        return rejected.items()

    def _post_event(self, number, line):
        status, _, payload = self._exchange("POST", line.strip(), {"Content-Type": JSON, "Sequence": str(number)})
        if status in (400, 413, 422):
            return _words(payload) or f"refused with status {status}"
        self._check(status, payload)
        return None

    def stop(self):
        """Make every thread's attempts end after the one under way."""
        self._stopped.set()

    def _persist(self, attempt, *arguments):
        """Return what attempt returns; repeat it while it raises Retry, with exponential backoff and jitter, until
        nothing at all has succeeded for too long, then raise Failure."""
        backoff = FIRST_BACKOFF_SECONDS
        while not self._stopped.is_set():
            try:
                result = attempt(*arguments)
                self._last_success = time.monotonic()
                return result
            except Retry as error:
                reason = error
            if time.monotonic() - self._last_success > self._give_up_after:
                raise Failure(f"Gave up after {self._give_up_after:g} s without success at {self._url}: {reason}. "
                              "Start the server, or name another with --url; then run this command again to go on.")
            self._stopped.wait(random.uniform(backoff / 2, backoff))
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
        raise Failure("Stopped.")

    def _exchange(self, method, body, headers):
        """Return (status, headers, payload), or raise Retry when there is no answer."""
        request = urllib.request.Request(self._url, body, self._headers | headers, method=method)
        try:
            with self._opener.open(request, timeout=REQUEST_SECONDS) as response:
                return response.status, response.headers or email.message.Message(), response.read(MAX_ANSWER_BYTES)
        except ValueError as error:
            raise Failure(f"--url or EVENTS_AUTHORIZATION is malformed: {error}.") from error
        except (OSError, http.client.HTTPException) as error:
            raise Retry(getattr(error, "reason", None) or error or type(error).__name__) from error

    def _check(self, status, payload):
        """Return after a status of success; else raise Retry or Failure."""
        if 200 <= status < 300:
            return
        words = _words(payload) or _excerpt(payload)
        if status in (408, 429) or status >= 500:
            raise Retry(f"status {status}, {words}")
        if status == 401:
            words += "; set EVENTS_AUTHORIZATION to the value that the server was started with"
        raise Failure(f"{self._url} answered with status {status}: {words}.")


def _words(payload):
    """Return the error that a JSON answer states, or None."""
    try:
        return str(json.loads(payload)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _excerpt(payload):
    return repr(payload[:80].decode(errors="replace"))


# ---- The run --------------------------------------------------------------------------------------------------------

class Progress:
    """A line on stderr that is written anew a few times a second, after the first, when stderr is a terminal."""

    def __init__(self, size):
        self._size = size
        self._begun = time.monotonic()
        self._next = self._begun + 1
        self._shown = False

    def show(self, events, done):
        """Show a number of events, and how many bytes of the file they are."""
        now = time.monotonic()
        if now < self._next or not sys.stderr.isatty():
            return
        self._next = now + PROGRESS_SECONDS
        self._shown = True
        seconds = max(now - self._begun, 1e-6)
        left = seconds * (self._size - done) / max(done, 1)
        print(f"\r{events:,} events, {done / max(self._size, 1):.0%}, {events / seconds:,.0f}/s, "
              f"{left:.0f} s left\033[K", end="", file=sys.stderr, flush=True)

    def clear(self):
        """Remove the line."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def send(delivery, sender, batch_size):
    """Deliver every line; return (events accepted, lines rejected), or raise Failure naming the lines that were not
    delivered."""
    accepted = 0
    last, end = 0, 0  # the last line that is being sent, and where it ends in the file
    rejects, progress = Rejects(delivery), Progress(delivery.size)
    pending = collections.deque()  # (batch, future), in the order of the file

    def settle():
        nonlocal accepted
        batch, future = pending[0]
        future.result()
        pending.popleft()
        rejects.add(batch)
        accepted += batch.accepted
        progress.show(accepted, batch.offsets[-1])

    with concurrent.futures.ThreadPoolExecutor(CONCURRENT_REQUESTS) as threads:
        try:
            sender.ask()
            for batch in read_batches(delivery, batch_size):
                pending.append((batch, threads.submit(sender.deliver, batch)))
                last, end = batch.last, batch.offsets[-1]
                if len(pending) == BATCHES_AHEAD:
                    settle()
            while pending:
                settle()
        except Failure as failure:
            sender.stop()
            missing = [(batch.undelivered, batch.last) for batch, future in pending if future.exception()]
            if end < delivery.size:
                missing.append((last + 1, None))
            raise Failure(f"{failure}\nNot delivered: {describe_lines(missing)}.") from failure
        finally:
            sender.stop()
            progress.clear()
    rejects.publish()
    return accepted, rejects.count


def describe_lines(ranges):
    """Return words for ascending ranges (first, last) of line numbers; last is None for the end of the file."""
    merged = []
    for first, last in ranges:
        if merged and merged[-1][1] == first - 1:
            first = merged.pop()[0]
        merged.append((first, last))
    return ", ".join([f"every line from {first} on" if last is None else f"lines {first} to {last}" if last > first
                      else f"line {first}" for first, last in merged]) or "nothing"


def parse_command_line(arguments):
    """Return the options, or exit with status 2."""
    parser = argparse.ArgumentParser(
        description="Send the events of a file to the server, each exactly once, then exit. A client that was stopped "
                    "goes on where it was when it is started again.",
        epilog="Example: python client.py events.jsonl --url http://localhost:8000/liveEvent. EVENTS_AUTHORIZATION is "
               "sent as the Authorization header.")
    parser.add_argument("file", nargs="?", default="events.jsonl", help="events, one a line (default: %(default)s)")
    parser.add_argument("--url", default="http://localhost:8000/liveEvent", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1000, metavar="LINES",
                        help="at most so many events a request (default: %(default)s)")
    parser.add_argument("--give-up-after", type=float, default=30, metavar="SECONDS",
                        help="stop after so long without any success (default: %(default)s)")
    parser.add_argument("--restart", action="store_true",
                        help="forget an unfinished delivery and send the whole file as a new one")
    options = parser.parse_args(arguments)
    if not 1 <= options.batch_size <= 10_000:
        parser.error("--batch-size must be from 1 to 10000")
    if not options.give_up_after >= 0:
        parser.error("--give-up-after must not be negative")
    try:
        url = urllib.parse.urlsplit(options.url)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        valid = False
    if not valid or not re.fullmatch("[!-~]+", options.url):
        parser.error(f"--url must look like http://localhost:8000/liveEvent, not {options.url}")
    return options


def main(arguments=None):
    """Run the command line and return its exit status."""
    options = parse_command_line(arguments)
    begun = time.monotonic()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # at once: .delivery is all that the next run needs
    try:
        delivery = Delivery(options.file, options.restart)
        if delivery.resumed:
            print(f"{options.file}: going on with the delivery that was interrupted.", file=sys.stderr)
        sender = Sender(options.url, delivery.producer, options.give_up_after)
        accepted, rejected = send(delivery, sender, options.batch_size)
        # The receipt comes before the delivery is forgotten: killed without it, the client is run again and goes on.
        print(f"{accepted:,} events accepted, {rejected:,} rejected, in {time.monotonic() - begun:.1f} s", flush=True)
        delivery.close()
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or options.file}: {error.strerror}.", file=sys.stderr)
        return 1
    if rejected:
        print(f"The rejected lines are in {options.file}.rejected; mend them, then send that file.", file=sys.stderr)
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
