"""Requests and answers, byte by byte, and servers that stand in for another."""

import contextlib
import http.client
import http.server
import io
import os
import socket
import threading
import time
import unittest
import unittest.mock

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
    """Return the bytes of a request with the usual fields and those that are given."""
    lines = [f"{method} {target} HTTP/{version}"]
    lines += [f"Host: {host}"] * (host is not None) + [f"Content-Type: {media}"] * bool(media)
    lines += [f"Content-Length: {len(body)}"] * (length and bool(body))
    return "\r\n".join([*lines, *fields, "", ""]).encode("latin-1") + body


def post(*fields, body=b"", target="/liveEvent", **options):
    """Return the bytes of a request that sends events."""
    return request("POST", target, *fields, body=body, **options)


def chunked(*chunks, end=b"0\r\n\r\n"):
    """Return a request whose body is sent in chunks."""
    return (
        post("Transfer-Encoding: chunked")
        + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        + end
    )


def read_answer(wire, method="GET"):
    """Return (status, headers, body) of the next answer on a socket."""
    answer = http.client.HTTPResponse(wire, method=method)
    answer.begin()
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
    """Return a context in which this process is a worker, with other settings than the server's
    own."""
    lifeline, hold = os.pipe()
    with unittest.mock.patch.multiple(server_module, **settings), server_module.listen(
        "127.0.0.1", 0
    ) as listener:
        worker = server_module.Worker(listener, log, None)
        worker.address = listener.getsockname()
        thread = threading.Thread(target=worker.run, args=[lifeline], daemon=True)
        thread.start()
        try:
            yield worker
        finally:
            os.close(hold)
            thread.join(20)
            os.close(lifeline)


BATCHES = (204, {"Accept-Post": "application/x-ndjson"}, b"")  # an answer to OPTIONS


class Recorder:
    """An HTTP server that answers what it is told to and records what it is sent; the answer None
    cuts a connection."""

    def __init__(self, options, post):
        """Answer OPTIONS with each of options, the last one for ever, and a POST with post(its
        number, its body)."""
        recorder = self
        self.posts = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_OPTIONS(self):
                self.answer(options.pop(0) if len(options) > 1 else options[0])

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                recorder.posts.append((self.headers, body))
                self.answer(post(len(recorder.posts) - 1, body))

            def do_GET(self):
                raise AssertionError("the client must not follow a redirect")

            def answer(self, answer):
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/liveEvent"

    def __enter__(self):
        """Begin to serve."""
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def dribbling(method):
    """Return a context with the URL of a server that takes batches, and answers requests of a
    method with a byte each half second."""

    def serve(wire):
        with wire, contextlib.suppress(OSError):
            request = wire.recv(65536)
            answer = (
                b"HTTP/1.1 204 No Content\r\nAccept-Post: application/x-ndjson\r\n"
                b"Connection: close\r\n\r\n"
            )
            if not request.startswith(method):
                return wire.sendall(answer)
            for byte in answer[:17] + b"a" * 1000:
                wire.sendall(bytes([byte]))
                time.sleep(0.5)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/liveEvent"
