"""Requests and answers, byte by byte, and servers that stand in for another."""

import contextlib
import http.client
import http.server
import io
import os
import socket
import threading
from unittest import mock

import server as server_module


def request(
    method,
    target,
    *fields,
    body=b"",
    version="1.1",
    host="127.0.0.1",
    media="application/json",
    length=True,
):
    """Return the bytes of a request with the usual fields and those that are given.

    Without a host, a media type or a length, the field is left out.
    """
    lines = [f"{method} {target} HTTP/{version}"]
    if host is not None:
        lines.append(f"Host: {host}")
    if media:
        lines.append(f"Content-Type: {media}")
    if body and length:
        lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join([*lines, *fields, "", ""])
    return head.encode("latin-1") + body


def post(*fields, body=b"", target="/liveEvent", **options):
    """Return the bytes of a request that sends events."""
    return request("POST", target, *fields, body=body, **options)


def chunked(*chunks, end=b"0\r\n\r\n"):
    """Return a request whose body is sent in chunks."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return post("Transfer-Encoding: chunked") + body + end


def read_answer(wire, method="GET"):
    """Return (status, headers, body) of the next answer on a socket."""
    answer = http.client.HTTPResponse(wire, method=method)
    answer.begin()
    with answer:
        return answer.status, answer.headers, answer.read()


class Answers(io.BufferedReader):
    """The receiving side of a socket, from which one answer after the other is read."""

    def __init__(self, wire):
        """Read from a socket."""
        super().__init__(socket.SocketIO(wire, "r"))

    def makefile(self, _mode):
        """Stand in for a socket."""
        return self

    def close(self):
        """Outlive the answer."""


@contextlib.contextmanager
def serving(log, **settings):
    """Return a context in which this process is a worker.

    Its settings may be others than the server's own.
    """
    lifeline, hold = os.pipe()
    statuses = []
    changed = mock.patch.multiple(server_module, **settings)
    with changed, server_module.listen("127.0.0.1", 0) as listener:
        worker = server_module.Worker(listener, log, None)
        worker.address = listener.getsockname()
        thread = threading.Thread(
            target=lambda: statuses.append(worker.run(lifeline)), daemon=True
        )
        thread.start()
        try:
            yield worker
        finally:
            os.close(hold)
            thread.join(20)
            os.close(lifeline)
        if not statuses:
            raise AssertionError("the worker did not end, or with an exception")


BATCHES = (204, {"Accept-Post": "application/x-ndjson"}, b"")  # an answer to OPTIONS


class Recorder:
    """An HTTP server that answers what it is told to and records what it is sent.

    An answer is (status, headers, body), in JSON unless its headers say otherwise; None cuts the
    connection.

    posts   (headers, body) of each POST, in the order in which they came
    url     where it takes events
    """

    def __init__(self, options, post):
        """Listen, but do not serve yet.

        OPTIONS is answered with each of options, with the last one for ever; a POST is answered
        with post(its number, its body).
        """
        self.posts = []
        self._options = options
        self._post = post
        self._server = RecordingServer(("127.0.0.1", 0), RecordingHandler)
        self._server.recorder = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/liveEvent"

    def __enter__(self):
        """Begin to serve."""
        thread = threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        return self

    def __exit__(self, *_):
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()

    def next_options(self):
        """Return the answer to an OPTIONS."""
        if len(self._options) > 1:
            return self._options.pop(0)
        return self._options[0]

    def record(self, headers, body):
        """Keep a POST and return the answer to it."""
        number = len(self.posts)
        self.posts.append((headers, body))
        return self._post(number, body)


class RecordingServer(http.server.ThreadingHTTPServer):
    """The server of a Recorder."""

    def handle_error(self, request, client_address):
        """Print nothing: a client may end before its answer."""


class RecordingHandler(http.server.BaseHTTPRequestHandler):
    """The handler of a Recorder."""

    def do_OPTIONS(self):
        """Answer what the recorder was told to."""
        self.answer(self.server.recorder.next_options())

    def do_POST(self):
        """Record the request and answer it."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(self.server.recorder.record(self.headers, body))

    def do_GET(self):
        """Be told by nobody: the client must not follow a redirect."""
        self.server.recorder.posts.append((self.headers, b"GET"))
        self.close_connection = True

    def answer(self, answer):
        """Send an answer, or cut the connection."""
        if answer is None:
            self.close_connection = True
            return
        status, headers, body = answer
        self.send_response(status)
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Print nothing."""


@contextlib.contextmanager
def dribbling(method):
    """Return a context with the URL of a server that takes batches.

    It answers requests of a method with a byte each half second.
    """
    over = threading.Event()
    answer = (
        b"HTTP/1.1 204 No Content\r\nAccept-Post: application/x-ndjson\r\n"
        b"Connection: close\r\n\r\n"
    )
    endless = answer[:17] + b"a" * 1000

    def serve(wire):
        with wire, contextlib.suppress(OSError):
            if not wire.recv(65536).startswith(method):
                wire.sendall(answer)
                return
            for byte in endless:
                wire.sendall(bytes([byte]))
                if over.wait(0.5):
                    return

    def accept():
        with contextlib.suppress(OSError):
            while True:
                wire, _ = listener.accept()
                threading.Thread(target=serve, args=[wire], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/liveEvent"
        finally:
            over.set()
            with contextlib.suppress(OSError):  # which wakes accept()
                listener.shutdown(socket.SHUT_RDWR)
