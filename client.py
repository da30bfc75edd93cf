"""Send the events of a file to the server, each exactly once, then exit.

FILE.delivery keeps the delivery's producer id from before the first request
until every line has been answered. With it and a line's number the system
recognises a line that is sent again: after a kill, run the same command again.
EVENTS_AUTHORIZATION is sent as the Authorization header.

Example: python client.py events.jsonl --url http://localhost:8000/liveEvent
"""
# The parts, in order: what is printed; the delivery of a file; batches; requests; the run. This file needs Python's
# standard library alone and can be copied to any machine by itself.
import argparse
import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import http.client
import json
import os
import random
import re
import secrets
import signal
import sys
import threading
import time
import urllib.request

if sys.version_info < (3, 11):
    sys.exit("client.py needs Python 3.11 or newer.")
try:
    import fcntl
except ImportError:
    sys.exit("client.py locks files with fcntl: it needs Linux or macOS, or WSL on Windows.")

BATCH_BYTES = 512 * 1024  # in a request's body
CONCURRENT_REQUESTS = 4
BATCHES_AHEAD = 2 * CONCURRENT_REQUESTS  # read and not yet answered: all that is held in memory
REQUEST_SECONDS = 10  # without a byte from the server
MAX_ANSWER_BYTES = 8 * 1024 * 1024  # 10,000 lines with an error each
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.05, 5.0
SILENT_SECONDS = 1  # the step in which the time without success is counted; after one, we say that we wait
PROGRESS_SECONDS = 0.5

ADVICE = {401: " Set EVENTS_AUTHORIZATION to the value that the server was started with.", 413: " Lower --batch-size."}
JSON, NDJSON = "application/json", "application/x-ndjson"
BLANK_LINE = re.compile(rb"\n[ \t\r\v\f]*+(?=\n)")  # with the newline before it


class Failure(Exception):
    """Something that ends the run: a sentence that says what is wrong and what to do."""


class Retry(Exception):
    """Why a request failed that may succeed when it is sent again."""


# ---- What is printed ------------------------------------------------------------------------------------------------

def write(stream, line, end="\n"):
    """Write a line on stdout or stderr, without what a terminal would obey and without the password of a URL. A line
    without an end shows progress: on a terminal the next one takes its place, elsewhere it is left out. A stream that
    is closed, full or broken raises nothing, and nothing stays in a buffer to fail when Python exits."""
    line = re.sub(r"(?<=/)[^\s/:]*:\S*@", "", line)
    line = "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in line])
    with contextlib.suppress(OSError, ValueError, AttributeError):
        terminal = stream.isatty()
        if terminal or end:
            os.write(stream.fileno(), ("\r\033[K" * terminal + line + end).encode(stream.encoding, "backslashreplace"))


def warn(line):
    """Print a line on stderr."""
    write(sys.stderr, line)


# ---- The delivery of a file -----------------------------------------------------------------------------------------

def open_regular(path, flags):
    """Open a regular file, or raise Failure if it is something else, such as a pipe, which is not waited for. If flags
    allow it, the file is written with write_all()."""
    file = open(path, "rb", opener=lambda path, _: os.open(path, flags | os.O_NONBLOCK, 0o640))
    if not os.path.isfile(file.fileno()):
        raise Failure(f"{path} is not a regular file. Name a file that has an event on each line.")
    return file


def write_all(file, data):
    """Write bytes at once, or raise OSError; what a short write left is written, too, or its error is raised."""
    while data:
        data = data[os.write(file.fileno(), data):]


def sync(file):
    """Make a file durable, and its name or the loss of it, if its file system can sync directories."""
    os.fsync(file.fileno())
    fcntl.fcntl(file, getattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFD))  # macOS: fsync stops at the drive's cache
    directory = os.open(os.path.dirname(file.name), os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(directory)


class Delivery:
    """The sending of a file's content under one producer id.

    FILE.delivery is its lock and its memory. It is created, locked, and then filled with one line, which is durable
    before the first request. A line that lacks its newline says that nothing was sent.
    """

    def __init__(self, name, restart=False):
        """Lock the file's delivery and go on with it, or begin a new one; raise Failure or OSError."""
        self.name, self.begun = name, time.monotonic()
        path = os.path.realpath(name)  # a file has one delivery, whichever link leads to it
        self._file = open_regular(path, os.O_RDONLY)
        self._state = self._lock(f"{path}.delivery")
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        self.size = self._file.tell()  # lines that are appended from now on are not sent
        content = {"size": self.size, "sha256": digest}
        self.producer = None if restart else self._unfinished(content)
        if self.producer:
            warn(f"{name}: going on with the delivery that was interrupted.")
        else:
            self.producer = secrets.token_urlsafe(16)
            os.ftruncate(self._state.fileno(), 0)
            write_all(self._state, json.dumps({"producerId": self.producer} | content).encode() + b"\n")
        sync(self._state)  # when it goes on, too: the client before may have been killed just here
        self.answered = self.accepted = self.rejected = 0  # lines, of which events
        self._rejected_path = f"{path}.rejected-{self.producer}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._rejected_path)  # a killed client wrote it: all lines are sent, and collected, again

    def _lock(self, path):
        """Return FILE.delivery, open and locked, or raise Failure if another client has locked it."""
        while True:
            state = open_regular(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Failure(f"{self.name} is being sent by another client; wait until it is done.") from None
            with contextlib.suppress(FileNotFoundError):  # then another client has just finished and removed it
                if os.path.samestat(os.fstat(state.fileno()), os.stat(path)):
                    return state

    def _unfinished(self, content):
        """Return the producer id of an unfinished delivery of this content, or None if nothing was sent yet; raise
        Failure if something else was sent."""
        line = os.pread(self._state.fileno(), os.fstat(self._state.fileno()).st_size, 0)
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            state = json.loads(line)
            if state | content == state and re.fullmatch("[A-Za-z0-9_-]{1,64}", state["producerId"]):
                return state["producerId"]  # also without a newline: earlier versions of this client wrote none
        if line.endswith(b"\n"):
            raise Failure(f"{self.name} has changed since its unfinished delivery began, or {self._state.name} cannot "
                          "be understood. Restore it, or run again with --restart to send the whole file as a new "
                          "delivery; lines that were already delivered then count twice.")
        return None

    def read(self, offset, size):
        """Return size bytes from an offset on or, if less is left, that, with a newline if the file ends without one;
        raise Failure if the file became shorter."""
        left = self.size - offset
        self._file.seek(offset)
        data = self._file.read(min(size, left))
        if len(data) < min(size, left):
            raise Failure(f"{self.name} was shortened while it was read. Restore it, then run this command again.")
        return data + b"\n" * (left < size and not data.endswith(b"\n"))

    def end_of_line(self, offset):
        """Return where the line ends that an offset lies in."""
        while b"\n" not in (block := self.read(offset, BATCH_BYTES)):
            offset += len(block)
        return offset + block.index(b"\n") + 1

    def settle(self, batch, errors):
        """Count an answered batch; report and collect its rejected lines, given their errors by their numbers."""
        if errors and not self.rejected:
            self._rejected_file = open_regular(self._rejected_path, os.O_WRONLY | os.O_CREAT)
        lines = re.finditer(rb".*+\n", batch.body) if errors else []
        for number, line in enumerate(lines, batch.first):
            if number in errors:
                warn(f"{self.name}:{number}: {errors[number]}")
                # From the file, because a batch may hold the beginning of a line alone.
                begin, end = batch.begin + line.start(), batch.end - len(batch.body) + line.end()
                for offset in range(begin, end, BATCH_BYTES):
                    write_all(self._rejected_file, self.read(offset, min(BATCH_BYTES, end - offset)))
        self.rejected += len(errors)
        self.accepted += batch.events - len(errors)
        self.answered += batch.lines

    def end(self):
        """Make the collected lines durable, print the receipt, and forget the delivery: every line was answered.

        A client that is killed before it forgets goes on when it is run again.
        """
        if self.rejected:
            sync(self._rejected_file)
            warn(f"The rejected lines are in {self._rejected_path}; mend them, then send that file.")
        seconds = time.monotonic() - self.begun
        write(sys.stdout, f"{self.accepted:,} events accepted, {self.rejected:,} rejected, in {seconds:.1f} s")
        with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
            os.unlink(self._state.name)
        with contextlib.suppress(OSError):  # it may come back after a power cut: to go on then changes nothing
            sync(self._state)


# ---- Batches --------------------------------------------------------------------------------------------------------

# Consecutive lines of a delivery: the first one's number, how many lines and events they are, where they begin and end
# in the file, and what is sent.
Batch = collections.namedtuple("Batch", "producer first lines events begin end body")


def read_batches(delivery, batch_size):
    """Yield all lines of a delivery as batches of at most batch_size lines and BATCH_BYTES.

    Of a line that is longer, the beginning is sent with "..." after it: the server rejects it by its own rule, and it
    is no JSON in any case.
    """
    whole_lines = re.compile(rb"(?:.*+\n){1,%d}+" % batch_size)
    first, begin = 1, 0
    while begin < delivery.size:
        block = delivery.read(begin, BATCH_BYTES)
        if match := whole_lines.match(block):
            body, end = match[0], begin + match.end()
        else:
            body, end = block[:-4] + b"...\n", delivery.end_of_line(begin)
        lines = body.count(b"\n")
        events = lines - len(BLANK_LINE.findall(b"\n" + body))
        yield Batch(delivery.producer, first, lines, events, begin, end, body)
        first, begin = first + lines, end


# ---- Requests -------------------------------------------------------------------------------------------------------

class EveryAnswer(urllib.request.HTTPErrorProcessor):
    """Takes every answer as it is: a redirect is not followed, because it is an error and no delivery."""

    def http_response(self, request, response):
        """Return the response, whatever its status is."""
        return response

    https_response = http_response


class Sender:
    """Requests to one server, from several threads at once, each repeated until it is answered."""

    def __init__(self, url, give_up_after):
        """Prepare requests; nothing is sent yet."""
        self._url, self._give_up_after = url, give_up_after
        authorization = os.environb.get(b"EVENTS_AUTHORIZATION", b"").strip(b" \t")
        self._headers = {"Authorization": authorization} if authorization else {}
        self._threads = concurrent.futures.ThreadPoolExecutor(CONCURRENT_REQUESTS)
        self.stopped = threading.Event()  # set it to let each thread end after the attempt that is under way
        self._reason = "no answer yet"  # why the last attempt failed; None after a success
        local = re.match(r"(?i)https?://(localhost|127\.0\.0\.1|\[::1\])(?![\w.-])", url)  # not for a proxy
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if local else None), EveryAnswer)

    def ask(self):
        """Find out and tell whether the server takes batches, waiting for it if it is not up yet; raise Failure."""
        self._takes_batches = self._first_result([self._threads.submit(self._until_answered, self._ask)])
        return self._takes_batches

    def answers(self, batches):
        """Deliver batches, a few at once; yield each in order with the errors of its rejected lines; raise Failure."""
        pending = []
        while True:
            while len(pending) < BATCHES_AHEAD and (batch := next(batches, None)):
                pending.append((batch, self._threads.submit(self._until_answered, self._post, batch)))
            if not pending:
                return
            errors = self._first_result([answer for _, answer in pending])
            yield pending.pop(0)[0], errors

    def _until_answered(self, attempt, *arguments):
        """Return what attempt returns; while it raises Retry, repeat it with exponential backoff and jitter."""
        pause, backoff = 0, FIRST_BACKOFF_SECONDS
        while not self.stopped.wait(pause):
            try:
                return attempt(*arguments)
            except Retry as error:
                self._reason = str(error)
            pause, backoff = random.uniform(backoff / 2, backoff), min(2 * backoff, MAX_BACKOFF_SECONDS)

    def _first_result(self, futures):
        """Return the result of the first of some futures. Say on stderr that the server keeps us waiting, and raise
        Failure when none of them has succeeded for too long, even if an answer is still coming in.

        Only the seconds that we wait here are counted: not those that a stopped client stood still.
        """
        silence, said = 0, False
        answered = sum(future.done() for future in futures)
        while not concurrent.futures.wait(futures[:1], SILENT_SECONDS).done:
            before, answered = answered, sum(future.done() for future in futures)
            silence = 0 if answered > before else silence + SILENT_SECONDS
            if silence and self._reason and not said:
                said = True
                warn(f"Waiting for {self._url}: {self._reason}.")
            if silence > self._give_up_after:
                raise Failure(f"Gave up after {self._give_up_after:g} s without success at {self._url}: "
                              f"{self._reason or 'no answer'}. Start the server, or name another with --url; then run "
                              "this command again to go on.")
        if said:
            warn(f"{self._url} answers.")
        self._reason = None
        return futures[0].result()

    def _ask(self):
        _, headers, _ = self._request("OPTIONS", None, {}, expected=(404, 405, 501))
        return NDJSON in headers.get("Accept-Post", "")

    def _post(self, batch):
        """Return the errors of the rejected lines by their numbers; lines that are all blank are not sent."""
        if not batch.events:
            return {}
        content_type, expected = (NDJSON, ()) if self._takes_batches else (JSON, (400, 413, 422))
        headers = {"Content-Type": content_type, "Producer-Id": batch.producer, "Sequence": str(batch.first)}
        status, _, payload = self._request("POST", batch.body, headers, expected)
        if self._takes_batches:
            return _rejected_lines(batch, status, payload)
        return {batch.first: _words(payload)} if status in expected else {}

    def _request(self, method, body, headers, expected):
        """Return (status, headers, payload) for a status of success or an expected one; else raise Retry or Failure."""
        status, headers, payload = self._exchange(method, body, headers)
        if 200 <= status < 300 or status in expected:
            return status, headers, payload
        words = f"status {status}: {_words(payload)}"
        if status in (408, 429) or status >= 500:
            raise Retry(words)
        raise Failure(f"{self._url} answered with {words}.{ADVICE.get(status, '')}")

    def _exchange(self, method, body, headers):
        """Return (status, headers, payload), or raise Retry when there is no answer."""
        request = urllib.request.Request(self._url, body, self._headers | headers, method=method)
        try:
            with self._opener.open(request, timeout=REQUEST_SECONDS) as response:
                return response.status, response.headers, response.read(MAX_ANSWER_BYTES)
        except (ValueError, http.client.InvalidURL) as error:  # whose words may hold a password
            raise Failure(f"{self._url}, the proxy or EVENTS_AUTHORIZATION is malformed. Correct it.") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise Retry(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__) from error


def _rejected_lines(batch, status, payload):
    """Return the errors of a batch's rejected lines by their numbers, or raise Retry if the answer does not account for
    every line."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        answer = json.loads(payload)
        errors = {entry["line"]: str(entry["error"]) for entry in answer["rejected"]}
        lines = batch.body.split(b"\n") if errors else []
        # Each rejected line is one that is there, named once, and not blank; all the other events are accepted.
        if (status == 200 and len(errors) == len(answer["rejected"])
                and all(line in range(1, len(lines)) and lines[line - 1].strip() for line in errors)
                and 0 <= answer["accepted"] == batch.events - len(errors)):
            return {batch.first + line - 1: error for line, error in errors.items()}
    raise Retry(f"the answer {_words(payload)} does not account for every line")


def _words(payload):
    """Return the error that a JSON answer states, or the beginning of another answer."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads(payload)["error"])
    return repr(payload[:80].decode(errors="replace"))


# ---- The run --------------------------------------------------------------------------------------------------------

def send(delivery, sender, batch_size):
    """Deliver every line, showing on a terminal how far it is, or raise Failure or OSError."""
    shown = delivery.begun
    try:
        for batch, errors in sender.answers(read_batches(delivery, batch_size if sender.ask() else 1)):
            delivery.settle(batch, errors)
            if time.monotonic() - shown >= PROGRESS_SECONDS:
                shown = time.monotonic()
                write(sys.stderr, f"{delivery.accepted:,} events, {batch.end / delivery.size:.0%}", end="")
    finally:
        sender.stopped.set()


class Parser(argparse.ArgumentParser):
    """A parser of command lines that prints as everything here is printed."""

    def _print_message(self, message, file=None):
        for line in message.splitlines():
            write(file or sys.stderr, line)


def parse_command_line(arguments):
    """Return the options, or exit with status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="events.jsonl", help="events, one a line (default: %(default)s)")
    parser.add_argument("--url", default="http://localhost:8000/liveEvent", help="of the server (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=5000, metavar="LINES", help="(default: %(default)s)")
    parser.add_argument("--give-up-after", type=float, default=30, metavar="SECONDS", help="(default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="send the whole file as a new delivery in any case")
    parser.color = False  # Python 3.14 would use escapes, which are not printed
    options = parser.parse_args(arguments)
    if not 1 <= options.batch_size <= 10_000:
        parser.error("--batch-size must be from 1 to 10000")
    if not options.give_up_after >= 0:
        parser.error("--give-up-after must not be negative")
    url = re.fullmatch(r"https?://(?:[\w.-]+|\[[\w.:%]+\])(?::(\d{1,5}))?(?:[/?][!-~]*)?", options.url, re.ASCII)
    if not url or not 1 <= int(url[1] or 80) <= 65_535:
        parser.error("--url must look like http://localhost:8000/liveEvent; a password belongs in EVENTS_AUTHORIZATION")
    if options.url.startswith("https") and not hasattr(http.client, "HTTPSConnection"):
        parser.error("--url cannot begin with https: this Python has no ssl module")
    return options


def main(arguments=None):
    """Run the command line and return its exit status."""
    for number in signal.SIGINT, signal.SIGTERM:  # at once: .delivery is all that the next run needs
        signal.signal(number, lambda number, _: os._exit(128 + number))
    options = parse_command_line(arguments)
    delivery = None
    try:
        sender = Sender(options.url, options.give_up_after)
        delivery = Delivery(options.file, options.restart)
        send(delivery, sender, options.batch_size)
        delivery.end()
        return 1 if delivery.rejected else 0
    except Failure as failure:
        warn(str(failure))
    except OSError as error:
        warn(f"{error.filename or options.file}: {error.strerror}. Give client.py a file that it can read, in a "
             "directory where it can write, then run this command again.")
    if delivery:
        warn(f"Delivery is unknown from line {delivery.answered + 1} on.")
    return 1


if __name__ == "__main__":
    os._exit(main())  # sys.exit would wait for threads whose requests hang; no output is left in a buffer
