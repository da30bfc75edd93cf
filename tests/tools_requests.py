"""What tests of the server's answers share."""

import json

from tests.tools import Server, SystemTest
from tests.tools_events import EVENT
from tests.tools_http import post


class RequestTest(SystemTest):
    """A test that sends requests byte by byte."""

    def assertStatus(self, server, status, *pieces):
        """Check an answer's status and shape, and return (headers, decoded body)."""
        answer, headers, body = server.raw(*pieces)
        self.assertEqual(
            (answer, headers.get_content_type()),
            (status, "application/json"),
            (pieces[0][:100], body),
        )
        body = json.loads(body)
        if status >= 400:
            self.assertEqual(list(body), ["error"])
        return headers, body

    def assertRefused(self, status, cases):
        """Check that each of {rule: request} gets a status, that none is logged, and that the
        server goes on."""
        server = Server(self)
        for rule, sent in cases.items():
            with self.subTest(rule):
                self.assertStatus(server, status, sent)
        self.assertEqual(server.log.read_bytes(), b"")
        self.assertStatus(server, 200, post(body=EVENT))
