"""Who may ask the server, and how it starts."""

import secrets
import subprocess
import sys

from tests.tools import Server
from tests.tools_database import HERE, setUpModule
from tests.tools_events import EVENT
from tests.tools_http import post, request
from tests.tools_requests import RequestTest


class Access(RequestTest):
    """The server is open to those alone whom it is meant for."""

    def test_a_directory_that_cannot_be_used_is_said_at_the_start(self):
        faults = {
            "synced": "def fsync(fd):\n    raise OSError(5, 'Input/output error')\n"
            "os.fsync = fsync",
            "opened": "def open(path, *mode, real=os.open):\n    if os.path.isdir(path):\n"
            "        raise PermissionError(13, 'Permission denied', path)\n"
            "    return real(path, *mode)\nos.open = open",
        }
        for case, fault in faults.items():
            with self.subTest(case):
                self.assertNotStarted(f"import os\n{fault}")

    def assertNotStarted(self, patch):
        """Check that a server with a patch ends at its start with a sentence about its log."""
        output, errors = self.run_script("server.py", "--port", 0, status=1, patch=patch)
        self.assertRegex(errors, r"\ACannot write the log .*\n\Z")
        self.assertEqual(output, "")

    def test_a_loopback_host_is_accepted(self):
        server = Server(self)
        for host in (
            "localhost",
            "LOCALHOST:8000",
            "127.0.0.1:8000",
            "127.8.9.10",
            "[::1]:8000",
            "[::1]",
        ):
            with self.subTest(host):
                self.assertStatus(server, 200, request("GET", "/health", host=host))

    def test_a_foreign_host_is_refused_with_421(self):
        hosts = {
            "another name": "example.com",
            "a name below localhost's": "localhost.example.com",
            "a name that begins with an address": "127.0.0.1.example.com",
            "an address for a user": "127.0.0.1@example.com",
            "another IPv6 address": "[::2]",
            "an empty name": "",
            "a port that is no number": "localhost:x",
            "the address of all interfaces": "0.0.0.0",
        }
        self.assertRefused(
            421,
            {rule: post(body=EVENT, host=host) for rule, host in hosts.items()}
            | {
                path: request("GET", path, host="example.com")
                for path in ("/health", "/userEvents/user1", "/other")
            },
        )

    def test_everything_but_health_needs_the_secret(self):
        for secret in ("secret", "Bearer s\u00e9cret"):
            server = Server(
                self,
                "--host",
                "0.0.0.0",
                EVENTS_AUTHORIZATION=secret,
                log="log" + secrets.token_hex(4),
            )
            right = "Authorization: " + secret.encode().decode("latin-1")
            wrong = {
                "missing": [],
                "empty": ["Authorization: "],
                "in upper case": ["Authorization: Secret"],
                "longer": ["Authorization: secrets"],
                "right and longer": [right + "x"],
            }
            for rule, fields in wrong.items():
                for method, path in (
                    ("POST", "/liveEvent"),
                    ("GET", "/userEvents/user1"),
                    ("OPTIONS", "/liveEvent"),
                    ("GET", "/x"),
                ):
                    with self.subTest(f"{rule}: {method} {path}"):
                        sent = request(method, path, *fields, body=EVENT, host="example.com")
                        headers, _ = self.assertStatus(server, 401, sent)
                        self.assertTrue(headers["WWW-Authenticate"])
            self.assertEqual(server.log.read_bytes(), b"")
            self.assertStatus(server, 200, request("GET", "/health", host="example.com"))
            self.assertStatus(
                server, 404, request("GET", "/userEvents/user1", right, host="example.com")
            )
            self.assertStatus(server, 200, post(right, body=EVENT, host="example.com"))

    def test_blanks_around_the_secret_do_not_count(self):
        server = Server(self, EVENTS_AUTHORIZATION=" \tsecret \t")
        self.assertStatus(server, 200, post("Authorization:   secret ", body=EVENT))

    def test_what_is_no_secret_is_refused_at_the_start(self):
        cases = {
            "a line end": "Bearer S3cret\n",
            "a CR": "S3\rcret",
            "a DEL": "S3cret\x7f",
            "nothing": "",
            "blanks": " \t",
            "a scheme without credentials": "Bearer",
            "a scheme and a blank": "Bearer ",
            "a scheme that few use": "PrivateToken",
            "a comma": "Bearer ,",
            "neither user nor password": "Basic Og==",
            "another scheme": "Basic",
            "a scheme in other letters": "bEARER",
            "a scheme and a colon": "Bearer: ",
            "the whole header": "Authorization: Bearer S3cret",
            "a variable": "Bearer $S3CRET",
            "a variable in braces": "${S3CRET}",
        }
        for case, secret in cases.items():
            with self.subTest(case):
                _, errors = self.run_script(
                    "server.py", "--port", 0, status=1, EVENTS_AUTHORIZATION=secret
                )
                self.assertRegex(errors, r"\ACannot use EVENTS_AUTHORIZATION: .*\n\Z")
                self.assertNotIn("S3", errors)

    def test_without_a_secret_the_server_listens_on_loopback_alone(self):
        for host in ("0.0.0.0", "::", ""):
            with self.subTest(host):
                _, errors = self.run_script("server.py", "--host", host, "--port", 0, status=1)
                self.assertIn("EVENTS_AUTHORIZATION", errors)
                self.assertEqual(errors.count("\n"), 1)

    def test_a_server_that_cannot_start_says_why_in_a_line(self):
        server = Server(self)
        cases = {
            "a port in use": (["--port", server.port], "Address already in use"),
            "a missing directory": (
                ["--log", self.directory / "none" / "log"],
                "No such file or directory",
            ),
            "a directory for a log": (["--log", self.directory], "Is a directory"),
            "a device for a log": (["--log", "/dev/null"], "not a regular file"),
            "a pipe for a log": (["--log", "/dev/stdout"], "not a regular file"),
            "a malformed host": (["--host", "a..b"], "Cannot listen on a..b"),
            "an unknown host": (["--host", "a.invalid"], "Cannot listen on a.invalid"),
        }
        for case, (arguments, words) in cases.items():
            with self.subTest(case):
                _, errors = self.run_script("server.py", "--port", 0, *arguments, status=1)
                self.assertIn(words, errors)
                self.assertEqual(errors.count("\n"), 1)
        for option, value in (("--workers", 0), ("--port", 70_000), ("--port", -1)):
            with self.subTest(option, value=value):
                self.run_script("server.py", option, value, status=2)
        ended = subprocess.run(
            [sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; import server"],
            cwd=HERE,
            capture_output=True,
            text=True,
        )
        self.assertEqual(ended.returncode, 1)
        self.assertRegex(ended.stderr, r"\A.*Linux or macOS.*\n\Z")

    def test_a_request_that_shows_a_proxy_or_a_page_needs_the_secret(self):
        fields = {
            "Forwarded": "Forwarded: for=192.0.2.1",
            "X-Forwarded-For": "X-Forwarded-For: 127.0.0.1",
            "X-Forwarded-Proto": "x-forwarded-proto: https",
            "X-Real-IP": "X-Real-IP: 192.0.2.1",
            "Via": "Via: 1.1 proxy",
            "the Origin of a page": "Origin: http://example.com",
            "an Origin that hides": "Origin: null",
            "an Origin that begins alike": "Origin: http://localhost.example.com",
            "no Origin": "Origin:",
        }
        requests = {rule: post(field, body=EVENT) for rule, field in fields.items()}
        requests["health"] = request("GET", "/health", "Via: 1.1 proxy")
        self.assertRefused(421, requests)
        server = Server(self, log="second")
        _, answer = self.assertStatus(server, 421, post("Via: 1.1 proxy", body=EVENT))
        self.assertIn("set EVENTS_AUTHORIZATION", answer["error"])
        for origin in ("http://localhost", "https://127.0.0.1:3000", "http://[::1]:8000"):
            self.assertStatus(server, 200, post(f"Origin: {origin}", body=EVENT))
        open_to_all = Server(self, log="third", EVENTS_AUTHORIZATION="secret")
        for rule, field in fields.items():
            with self.subTest(rule):
                sent = post(field, "Authorization: secret", body=EVENT)
                self.assertStatus(open_to_all, 200, sent)

    def test_what_is_no_log_is_refused_and_left_as_it_is(self):
        contents = {
            "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
            "a text": b"Dear diary\n",
            "other JSON lines": b'{"a": 1}\n',
            "a text without a line end": b"Dear diary",
        }
        for case, content in contents.items():
            with self.subTest(case):
                path = self.path("file", content)
                _, errors = self.run_script("server.py", "--port", 0, "--log", path, status=1)
                self.assertRegex(errors, r"\ACannot write the log .* it is no log.*\n\Z")
                self.assertEqual(path.read_bytes(), content)

    def test_a_file_system_without_sync_is_refused_at_the_start(self):
        self.assertNotStarted(
            "def fail(fd):\n    raise OSError(22, 'Invalid argument')\nserver.sync_file = fail"
        )

    def test_the_server_starts_whatever_options_python_has(self):
        for option in ("-P", "-OO", "-I"):
            with self.subTest(option):
                ended = subprocess.run(
                    [sys.executable, option, HERE / "server.py", "--help"],
                    cwd=self.directory,
                    capture_output=True,
                    text=True,
                )
                self.assertEqual((ended.returncode, ended.stderr), (0, ""))
                self.assertIn("Example: python server.py", ended.stdout)
