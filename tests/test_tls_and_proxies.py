"""The client delivers through TLS and proxies."""

import contextlib
import socket
import ssl
import subprocess
import threading

from tests.tools_client import ACCEPTED, ClientTest, RawServer, send_answer
from tests.tools_database import setUpModule
from tests.tools_events import EVENT

OFFER = b"HTTP/1.1 204 OK\r\nAccept-Post: application/x-ndjson\r\n\r\n"


def read_request(wire, request=b""):
    """Return a request, of which a part may have come: a POST of EVENT, or one without a body."""
    while True:
        _, end, body = request.partition(b"\r\n\r\n")
        if end and (body == EVENT + b"\n" or not request.startswith(b"POST")):
            return request
        data = wire.recv(1000)
        if not data:
            raise ConnectionError("the client closed")
        request += data


def pass_on(source, target):
    """Send all that comes from one socket to another one."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def serving(serve):
    """Let serve(wire) handle each connection to a port, one after the other; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    serve(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)  # which wakes accept()


class TlsAndProxies(ClientTest):
    """A proxy is asked with its password, and only a trusted certificate is believed."""

    def setUp(self):
        """Make a certificate of localhost and example.invalid, and a file of one event."""
        super().setUp()
        self.path("events.jsonl", EVENT)
        self.certificate = self.path("certificate.pem")
        key = self.path("key.pem")
        names = "subjectAltName=DNS:localhost,DNS:example.invalid"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key]
        command += ["-out", self.certificate, "-subj", "/CN=localhost", "-addext", names]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(self.certificate, key)
        self.heads = []  # what clear requests began with
        self.secret_heads = []  # what requests through TLS began with

    def serve(self, wire, head):
        """Answer a clear POST, or open a tunnel to serve_tls()."""
        self.heads.append(head)
        if head.startswith(b"POST"):
            read_request(wire, head)
            send_answer(wire)
            return
        wire.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        near, far = socket.socketpair()
        threads = [
            threading.Thread(target=pass_on, args=(wire, near), daemon=True),
            threading.Thread(target=self.serve_tls, args=[far], daemon=True),
        ]
        with near:
            for thread in threads:
                thread.start()
            pass_on(near, wire)
            for thread in threads:
                thread.join(20)

    def serve_tls(self, wire):
        """Answer a request through TLS."""
        with wire, contextlib.suppress(OSError):
            with self.context.wrap_socket(wire, server_side=True) as secret:
                head = read_request(secret)
                self.secret_heads.append(head)
                if head.startswith(b"POST"):
                    send_answer(secret, ACCEPTED)
                else:
                    secret.sendall(OFFER)

    def test_events_are_delivered_through_tls_to_a_trusted_server_alone(self):
        with serving(self.serve_tls) as port:
            arguments = ("--url", f"https://localhost:{port}/liveEvent")
            _, errors = self.client(*arguments, status=1)
            self.assertIn("the server's certificate is not trusted", errors)
            self.assertEqual(self.secret_heads, [])
            output, _ = self.client(*arguments, SSL_CERT_FILE=str(self.certificate))
            self.assertIn("1 events accepted", output)
            methods = [head.split()[0] for head in self.secret_heads]
            self.assertEqual(methods, [b"OPTIONS", b"POST"])

    def test_what_is_wrong_with_a_certificate_is_said(self):
        missing = self.path("missing.pem")
        empty = self.path("empty.pem", b"")
        trusted = self.certificate
        cases = {
            "no file": ("localhost", missing, f"={missing} cannot be used: No such file or d"),
            "no certificates": ("localhost", empty, f"={empty} cannot be used: "),
            "another name": ("127.0.0.1", trusted, "'127.0.0.1'. Correct --url, or name"),
        }
        with serving(self.serve_tls) as port:
            for case, (host, path, words) in cases.items():
                arguments = ("--url", f"https://{host}:{port}/")
                with self.subTest(case):
                    _, errors = self.client(*arguments, status=1, SSL_CERT_FILE=str(path))
                    self.assertIn(words, errors)
                    self.assertIn("certificate is not trusted: ", errors)

    def test_a_server_that_speaks_no_tls_is_named_at_once(self):
        def refuse(wire):
            with wire:
                wire.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        with serving(refuse) as port:
            url = f"https://localhost:{port}/"
            _, errors = self.client("--url", url, "--give-up-after", 5, status=1)
        self.assertIn(f"{url} cannot be asked: what answers there does not speak TLS. Cor", errors)

    def test_a_proxy_that_speaks_tls_is_told_no_password_in_clear(self):
        with RawServer(self.serve) as proxy:
            port = proxy.url.removesuffix("/liveEvent").split(":")[2]
            address = f"https://till:secret@127.0.0.1:{port}"
            arguments = ("--url", "https://example.invalid/x", "--give-up-after", 0)
            _, errors = self.client(*arguments, status=1, https_proxy=address)
        self.assertEqual(self.heads, [])
        self.assertIn("begins with https://, which client.py cannot use for https:// URLs.", errors)

    def test_a_proxy_passes_requests_on(self):
        with RawServer(self.serve) as proxy:
            address = proxy.url.removesuffix("/liveEvent").replace("://", "://till:secret@")
            output, _ = self.client("--url", "http://example.invalid/x", http_proxy=address)
        self.assertIn("1 events accepted", output)
        [head] = self.heads
        self.assertTrue(head.startswith(b"POST http://example.invalid/x HTTP/1.1\r\n"), head)
        self.assertIn(b"Proxy-Authorization: Basic dGlsbDpzZWNyZXQ=\r\n", head)

    def test_a_proxy_opens_tunnels_and_reads_nothing(self):
        with RawServer(self.serve) as proxy:
            address = proxy.url.removesuffix("/liveEvent").replace("://", "://till:secret@")
            trusted = {"SSL_CERT_FILE": str(self.certificate), "https_proxy": address}
            output, _ = self.client("--url", "https://example.invalid/x", **trusted)
        self.assertIn("1 events accepted", output)
        self.assertEqual(len(self.heads), 2)
        for head in self.heads:
            self.assertTrue(head.startswith(b"CONNECT example.invalid:443 "), head)
            self.assertIn(b"Proxy-Authorization: Basic dGlsbDpzZWNyZXQ=\r\n", head)
        for head in self.secret_heads:
            self.assertIn(head.split()[:2], ([b"OPTIONS", b"/x"], [b"POST", b"/x"]))
            self.assertNotIn(b"Proxy", head)
        self.assertEqual(len(self.secret_heads), 2)
