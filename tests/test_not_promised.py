"""What the README says that it does not promise is what happens, and no more."""

import os

from tests.tools import Server, SystemTest
from tests.tools_database import query, setUpModule  # noqa: F401
from tests.tools_events import EVENT, with_id


class NotPromised(SystemTest):
    """A few of these points; the others stand beside the promise that they limit."""

    def test_two_hard_links_to_a_file_have_a_delivery_each(self):
        first = self.path("first.jsonl", EVENT + b"\n")
        second = self.path("second.jsonl")
        os.link(first, second)
        server = Server(self)
        for name in (first, second):
            self.client(name, "--url", server.url)
        self.processor()
        self.assertRevenue({"user1": 2})

    def test_no_answer_lets_a_web_page_from_elsewhere_read_it(self):
        server = Server(self, EVENTS_AUTHORIZATION="secret")
        asked = {"Origin": "https://elsewhere.example", "Authorization": "secret"}
        for method, path in (("OPTIONS", "/liveEvent"), ("GET", "/health")):
            with self.subTest(method):
                status, headers, _ = server.ask(method, path, headers=asked)
                self.assertLess(status, 300)
                names = [name.lower() for name in headers.keys()]
                self.assertFalse([name for name in names if name.startswith("access-control")])

    def test_plain_logs_that_are_put_together_count_again(self):
        plain = '{"userId": "u", "name": "add_revenue", "value": 1}\n'
        first = self.path("first", plain)
        second = self.path("second", plain.replace("1", "2"))
        self.processor(first, second)
        both = self.path("both", plain.replace("1", "4") + plain)
        self.processor(both)
        self.assertRevenue({"u": 8})

    def test_an_id_that_is_used_again_is_a_repeated_delivery(self):
        log = self.path("log", with_id("p", 1, "user1", 1) + with_id("p", 1, "user2", 5))
        output, _ = self.processor(log)
        self.assertIn("1 applied, 1 repeated", output)
        self.assertEqual(query("SELECT sum(revenue) FROM users_revenue"), [(1,)])

    def test_verify_shows_that_a_table_was_emptied_and_filled_again(self):
        log = self.path("log", with_id("p", 1, "user1", 1))
        self.processor(log)
        query("TRUNCATE users_revenue; INSERT INTO users_revenue VALUES ('user2', 5)")
        self.processor(log)
        output, _ = self.processor("--verify", log, status=1)
        self.assertIn("user1: 0 in users_revenue, 1 in the logs, difference -1", output)
        query("TRUNCATE users_revenue, event_producers, event_logs")
        self.processor(log)
        self.assertRevenue({"user1": 1})
