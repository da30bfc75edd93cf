"""A baseline for requests: the least that http.server can do for one. Usage: python
empty_handler.py PORT PROCESSES"""
import http.server
import os
import signal
import sys


class EmptyHandler(http.server.BaseHTTPRequestHandler):
    """Read the body of a request and answer ok."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # buffered: head and body leave in one send
    disable_nagle_algorithm = True

    def do_POST(self):
        """Answer ok."""
        length = self.headers.get("Content-Length", 0)
        self.rfile.read(int(length))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    do_GET = do_POST

    def log_message(self, *arguments):
        """Say nothing."""


class EmptyServer(http.server.ThreadingHTTPServer):
    """Serve from several processes on one socket."""

    request_queue_size = 4096  # as server.py

    def server_activate(self):
        """Listen. The socket does not block: all processes wake for a connection, and one of them
        gets it."""
        super().server_activate()
        self.socket.setblocking(False)

    def handle_error(self, request, client_address):
        """Say nothing: wrk resets its connections when its time is up, and it checks every answer
        itself."""


def main():
    """Serve until SIGTERM, which shared.py sends to all processes together."""
    port = int(sys.argv[1])
    processes = int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark decides when this ends
    with EmptyServer(("127.0.0.1", port), EmptyHandler) as server:
        for _ in range(processes - 1):
            if os.fork() == 0:
                break
        server.serve_forever()


if __name__ == "__main__":
    main()
