"""One trouble stops only itself, and a log can be read anew."""

import contextlib
import os
import re
import unittest.mock

import data_processor
from tests.tools import SystemTest, next_line
from tests.tools_database import query, setUpModule  # noqa: F401
from tests.tools_events import with_id
from tests.tools_faults import MANY_DESCRIPTORS
from tests.tools_parts import Polled, captured, opened_follower, poll


class OneTrouble(SystemTest):
    """One trouble stops only itself."""

    def test_an_event_that_postgresql_refuses_stops_its_log_alone(self):
        def trigger(code, column="user_id"):
            return (
                "CREATE OR REPLACE FUNCTION refuses() RETURNS trigger LANGUAGE plpgsql AS "
                f"'BEGIN IF NEW.{column} = ''bad'' THEN RAISE EXCEPTION ''no bad user'' "
                f"USING ERRCODE = ''{code}''; END IF; RETURN NEW; END';"
            )

        customers = (
            "CREATE TABLE IF NOT EXISTS customers (id text PRIMARY KEY);"
            "INSERT INTO customers VALUES ('good') ON CONFLICT DO NOTHING;"
            "ALTER TABLE users_revenue ADD FOREIGN KEY (user_id) REFERENCES customers "
        )
        refusals = {
            "a check": "ALTER TABLE users_revenue ADD CHECK (user_id <> 'bad')",
            "a check of producers": "ALTER TABLE event_producers ADD CHECK (producer_id <> 'bad')",
            "a check of logs": "ALTER TABLE event_logs ADD CONSTRAINT bad "
            f"CHECK (position <> {len(with_id('bad', 1, 'bad'))})",
            "a foreign key": customers,
            "a deferred foreign key": customers + "DEFERRABLE INITIALLY DEFERRED",
            "a deferred foreign key of producers": (
                "CREATE TABLE IF NOT EXISTS senders AS SELECT 'q' COLLATE \"C\" AS id;"
                "ALTER TABLE senders DROP CONSTRAINT IF EXISTS senders_key, "
                "ADD CONSTRAINT senders_key UNIQUE (id);"
                "ALTER TABLE event_producers ADD FOREIGN KEY (producer_id) "
                "REFERENCES senders (id) DEFERRABLE INITIALLY DEFERRED"
            ),
        }
        for code in ("P0001", "42501", "53100", "54000", "57014"):
            refusals[f"a trigger with the code {code}"] = (
                trigger(code) + "CREATE TRIGGER refusing BEFORE INSERT ON users_revenue "
                "FOR EACH ROW EXECUTE FUNCTION refuses()"
            )
        for refusal, statement in refusals.items():
            with self.subTest(refusal):
                self.setUp()
                query(statement)
                self.path("log.1", with_id("bad", 1, "bad"))
                log = self.path("log", with_id("q", 1, "good"))
                _, errors = self.processor(log, status=1)
                self.assertRegex(errors, r"^\S*/log\.1: PostgreSQL (refused it|gave it up): .*bad")
                self.assertEqual(errors.count("\n"), 1)
                self.assertRevenue({"good": 1})
        query("DROP TABLE users_revenue; DROP TABLE customers")

    def test_what_concerns_every_log_is_not_said_of_each(self):
        query(
            "CREATE OR REPLACE FUNCTION refuses() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN IF NEW.user_id = ''user1'' THEN RAISE EXCEPTION ''no''; END IF; "
            "RETURN NEW; END';"
            "CREATE TRIGGER refusing BEFORE INSERT ON users_revenue "
            "FOR EACH ROW EXECUTE FUNCTION refuses()"
        )
        for number in range(30):
            self.path(f"log.{number}", with_id(f"p{number}", 1))
        _, errors = self.processor("log.0", "log", status=1)
        self.assertEqual(errors.count("refused it"), data_processor.NAMED_REFUSALS)

    def test_what_concerns_every_log_is_said_again_when_it_comes_back(self):
        refuse = "ALTER TABLE users_revenue ADD CONSTRAINT no CHECK (user_id <> 'user1') NOT VALID"
        for number in range(30):
            self.path(f"log.{number}", with_id(f"p{number}", 1))
        at_once = unittest.mock.patch.object(data_processor, "MAX_BACKOFF_SECONDS", 0)
        with captured() as output, at_once, opened_follower(self.path("log")) as follower:
            query(refuse)
            follower.look()
            query("ALTER TABLE users_revenue DROP CONSTRAINT no")
            follower.look()
            before = output()
            query(refuse)
            for number in range(30):
                self.path(f"log.{number}", with_id(f"p{number}", 1) + with_id(f"p{number}", 2))
            follower.look()
            after = output()[len(before) :]
        for said in (before, after):
            self.assertEqual(said.count("refused it"), data_processor.NAMED_REFUSALS)
            self.assertEqual(said.count("Further logs that are refused for this reason"), 1)
        self.assertRevenue({"user1": 30})

    def test_logs_that_are_gone_keep_none_from_being_named(self):
        query("ALTER TABLE users_revenue ADD CONSTRAINT no CHECK (user_id <> 'user1') NOT VALID")
        for number in range(data_processor.NAMED_REFUSALS):
            self.path(f"log.{number}", with_id(f"p{number}", 1))
        with captured() as output, opened_follower(self.path("log")) as follower:
            follower.look()
            for number in range(data_processor.NAMED_REFUSALS):
                self.path(f"log.{number}").rename(self.path(f"old.{number}"))
            self.path("log.99", with_id("q", 1))
            follower.look()
            self.assertRegex(output(), r"\S*/log\.99: PostgreSQL refused it")

    def test_a_follower_whose_table_is_dropped_says_what_to_do(self):
        pauses = []

        def sleep(seconds):
            pauses.append(seconds)
            if len(pauses) == 2:
                raise Polled

        log = self.path("log", with_id("p", 1))
        with captured() as output, opened_follower(log) as follower:
            poll(follower)
            query("DROP TABLE users_revenue")
            self.path("log.1", with_id("q", 1))
            with (
                contextlib.suppress(Polled),
                unittest.mock.patch.object(data_processor.time, "sleep", sleep),
            ):
                follower.follow()
            self.assertIn("missing: users_revenue. To count everything again", output())

    def test_no_partition_for_a_user_stops_its_log_alone(self):
        query(
            "DROP TABLE users_revenue, event_producers, event_logs;"
            "CREATE TABLE users_revenue (user_id text PRIMARY KEY, revenue numeric NOT NULL) "
            "PARTITION BY LIST (user_id);"
            "CREATE TABLE good_users PARTITION OF users_revenue FOR VALUES IN ('good')"
        )
        self.path("log.1", with_id("p", 1, "bad"))
        log = self.path("log", with_id("q", 1, "good"))
        _, errors = self.processor(log, status=1)
        self.assertIn("no partition of relation", errors)
        self.assertRevenue({"good": 1})

    def test_a_rotated_log_that_cannot_be_opened_is_named(self):
        self.path("log", with_id("p", 1))
        self.path("log.1").mkdir()
        self.path("log.2").symlink_to("nowhere")
        os.mkfifo(self.path("log.3"))
        for mode in ([], ["--verify"]):
            _, errors = self.processor(*mode, "log", status=1)
            self.assertEqual(errors.count(": is not a regular file"), 2)
            self.assertIn("log.2: No such file or directory.\n", errors)
        self.assertRevenue({"user1": 1})

    def test_a_rotated_log_that_vanishes_is_passed_over(self):
        log = self.path("log", with_id("p", 1))
        vanishing = self.path("log.1")
        vanish = (
            "import os\n"
            "opening = data_processor.LogReader.__init__\n"
            "def vanish(self, path):\n"
            f"    if path.endswith('.1'): os.unlink({str(vanishing)!r})\n"
            "    opening(self, path)\n"
            "data_processor.LogReader.__init__ = vanish"
        )
        for mode in ([], ["--verify"]):
            with self.subTest(mode):
                vanishing.write_text(with_id("q", 1), encoding="utf-8")
                _, errors = self.processor(*mode, log, patch=vanish)
                self.assertEqual(errors, "")
                self.assertFalse(vanishing.exists())
                self.assertRevenue({"user1": 1})

    def test_a_log_where_nothing_can_be_synced_is_read(self):
        log = self.path("log", with_id("p", 1))
        for name in ("EINVAL", "ENOTSUP", "EROFS"):
            with self.subTest(name):
                self.setUp()
                no_sync = (
                    "import errno, os\n"
                    "def no_sync(fd): raise OSError(errno.%s, 'no sync here')\n"
                    "data_processor.sync_file = no_sync" % name
                )
                log = self.path("log", with_id("p", 1))
                _, errors = self.processor(log, patch=no_sync)
                self.assertEqual(errors, "")
                self.assertRevenue({"user1": 1})

    def test_a_log_that_is_truncated_while_it_is_read_stops_only_itself(self):
        log = self.path("log.1", with_id("p", 1) + with_id("p", 2))
        self.path("log", with_id("q", 1))
        cut = (
            "import os\n"
            "count_once = data_processor.count_once\n"
            "def cut(sql, log, tallies):\n"
            f"    if log.path.endswith('.1'): os.truncate({str(log)!r}, 10)\n"
            "    return count_once(sql, log, tallies)\n"
            "data_processor.count_once = cut"
        )
        _, errors = self.processor(self.path("log"), status=1, patch=cut)
        self.assertIn("log.1: was changed while it was read", errors)
        self.assertRevenue({"user1": 1})

    def test_a_chunk_becomes_smaller_after_the_death_of_a_child(self):
        log = self.path(
            "log", "".join(with_id("p", number) for number in range(1, 20_001))
        )
        die = (
            "import os\n"
            "data_processor.CHUNK_BYTES = 1024 * 1024\n"
            "send_tally = data_processor.send_tally\n"
            "def die_of_much(log, part, marks, pipe):\n"
            "    if part.end - part.start > 300 * 1024: os._exit(1)\n"
            "    send_tally(log, part, marks, pipe)\n"
            "data_processor.send_tally = die_of_much"
        )
        self.assertGreater(log.stat().st_size, 1024 * 1024)
        self.processor(log, patch=die)
        self.assertRevenue({"user1": 20_000})

    def test_a_missing_process_is_not_blamed_on_the_log(self):
        log = self.path("log", with_id("p", 1))
        missing = {
            "a process": "multiprocessing.get_context('fork').Process.start = fail",
            "a pipe": "os.pipe = fail",
            "a descriptor in the child": "os.listdir = fail_there",
        }
        for what, patch in missing.items():
            with self.subTest(what):
                fail = (
                    "import errno, multiprocessing, os\n"
                    "data_processor.ATTEMPTS = 2\n"
                    "listdir = os.listdir\n"
                    "def fail(*_): raise OSError(errno.EAGAIN, 'none is left', '/there')\n"
                    "def fail_there(path): return fail() if path == '/dev/fd' else listdir(path)\n"
                    + patch
                )
                _, errors = self.processor(log, status=1, patch=fail)
                self.assertRegex(errors, r"\ANo [a-z ]*child process.*: none is left\.\n\Z")

    def test_descriptors_of_any_number_are_served(self):
        self.processor(self.path("log", with_id("p", 1)), patch=MANY_DESCRIPTORS)
        self.assertRevenue({"user1": 1})

    def test_no_room_for_a_thread_is_said(self):
        full = (
            "def full(thread): raise RuntimeError('it is full')\n"
            "data_processor.threading.Thread.start = full"
        )
        _, errors = self.processor(self.path("log", with_id("p", 1)), status=1, patch=full)
        self.assertEqual(errors, "There is no room for a thread: it is full.\n")

    def test_a_hundred_lines_are_named_and_the_others_counted(self):
        log = self.path("log", "nonsense\n" * 1500 + with_id("p", 1))
        _, errors = self.processor(log, status=1)
        self.assertEqual(len(re.findall("byte [0-9]+: not JSON", errors)), 100)
        self.assertIn("log: 1,400 more lines were rejected.\n", errors)

    def test_a_follower_says_nothing_twice(self):
        plain = '{"userId": "u", "name": "add_revenue", "value": 1}\n'
        log = self.path("log", plain * 200)
        with captured() as output, opened_follower(log) as applier:
            applier.look()
            log.write_text(
                plain + plain.replace("1", "2") + plain * 198, encoding="utf-8"
            )
            applier.look()
            first = output()
            for _ in range(3):
                with open(log, "a", encoding="utf-8") as file:
                    file.write(with_id("p", os.fstat(file.fileno()).st_size))
                applier.look()
            later = output()[len(first) :]
        self.assertEqual(first.count("byte "), 100)
        self.assertNotIn("byte ", later)
        self.assertRevenue({"u": 200, "user1": 3})

    def test_another_log_in_the_same_file_has_its_own_lines_named(self):
        log = self.path("log", with_id("p", 1) + "bad\n")
        with captured() as output, opened_follower(log) as follower:
            follower.look()
            log.write_text("bad too\n" + 3 * with_id("q", 1), encoding="utf-8")
            follower.look()
            said = output()
        self.assertEqual(said.count("not JSON"), 2, said)
        self.assertIn("byte 0: not JSON", said)
        self.assertRevenue({"user1": 2})

    def test_logs_that_are_renamed_at_once_are_read_although_one_fails(self):
        first = self.path("a", with_id("p", 1))
        second = self.path("b", with_id("q", 1))
        with captured(), opened_follower(first, second) as follower:
            follower.look()
            for log, producer in ((first, "p"), (second, "q")):
                with open(log, "a", encoding="utf-8") as file:
                    file.write(with_id(producer, 2))
                log.rename(self.directory / f"archived-{producer}")
            follower.notice_renamed()
            apply = data_processor.Applier.apply

            def fail_for_b(applier, log):
                if log.path == str(second):
                    raise data_processor.ChildDied("It died.")
                return apply(applier, log)

            with unittest.mock.patch.object(data_processor.Applier, "apply", fail_for_b):
                with self.assertRaises(data_processor.ChildDied):
                    follower.apply_renamed()
            follower.apply_renamed()
            self.assertEqual(follower.renamed, [])
        self.assertRevenue({"user1": 4})

    def test_two_logs_with_one_first_line_have_their_own_bad_lines_named(self):
        first = with_id("p", 1)
        self.path("log.1", first + with_id("p", 2) + "bad one\n")
        log = self.path("log", first + "bad two\n")
        _, errors = self.processor(log, status=1)
        self.assertEqual(errors.count("not JSON"), 2)

    def test_a_directory_that_became_a_file_stops_only_its_log(self):
        directory = self.path("a")
        directory.mkdir()
        (directory / "log").write_text(with_id("p", 1), encoding="utf-8")
        other = self.path("log", with_id("q", 1))
        with captured(), opened_follower(directory / "log", other) as follower:
            follower.look()
            directory.rename(self.directory / "a.old")
            self.path("a", "")
            with open(other, "a", encoding="utf-8") as file:
                file.write(with_id("q", 2))
            follower.look()
        self.assertRevenue({"user1": 3})

    def test_many_logs_are_looked_up_in_one_listing(self):
        logs = [str(self.path(f"log{number}", "")) for number in range(50)]
        with unittest.mock.patch.object(os, "listdir", wraps=os.listdir) as listdir:
            found = data_processor.Applier(None, logs).find_logs()
        self.assertEqual(found, logs)
        self.assertEqual(listdir.call_count, 1)


class FromStart(SystemTest):
    """--from-start reads every log from its first byte."""

    def test_a_line_that_was_mended_is_counted(self):
        first = with_id("p", 1)
        mended = with_id("p", 2).replace(" 1,", "  1,", 1)
        bad = mended.replace("  1,", ' "",')
        rest = "".join(with_id("p", number) for number in range(3, 2000))
        self.assertGreater(len(rest), data_processor.DIGEST_BYTES)
        log = self.path("log", first + bad + rest)
        self.processor(log, status=1)
        log.write_text(first + mended + rest, encoding="utf-8")
        self.processor(log)
        self.assertRevenue({"user1": 1998})
        output, _ = self.processor("--from-start", log)
        self.assertIn("1 applied, 1,998 repeated", output)
        self.assertRevenue({"user1": 1999})

    def test_a_plain_log_counts_once_although_it_is_read_from_its_start(self):
        plain = '{"userId": "u", "name": "add_revenue", "value": 1}\n'
        bad = "x" * (len(plain) - 1) + "\n"
        rest = plain * 2000
        self.assertGreater(len(rest), data_processor.DIGEST_BYTES)
        log = self.path("log", plain + bad + rest)
        self.processor(log, status=1)
        with open(log, "a", encoding="utf-8") as file:
            file.write(plain * 3)
        output, errors = self.processor("--from-start", log, status=1)
        self.assertIn(f"byte {len(plain)}: not JSON", errors, "it is read from its start")
        self.assertIn("3 applied, 0 repeated, 1 rejected", output)
        self.assertRevenue({"u": 2004})

    def test_a_follower_reads_a_log_from_its_start_once(self):
        log = self.path("log", with_id("p", 1))
        self.processor(log)
        follower = self.start("data_processor.py", "--follow", "--from-start", log)
        self.assertIn("0 applied, 1 repeated", next_line(follower.stdout))
        with open(log, "a", encoding="utf-8") as file:
            file.write(with_id("p", 2))
        self.assertIn("1 applied, 0 repeated", next_line(follower.stdout))

    def test_a_log_is_read_from_its_start_again_on_a_new_connection(self):
        log = str(self.path("log", with_id("p", 1) + with_id("p", 2)))
        self.processor(log)
        follower = data_processor.Follower([log], from_start=True)
        self.addCleanup(follower.database.close)
        self.addCleanup(lambda: [held.close() for held in follower.held.values()])
        with captured():
            follower.look()
            query(
                "UPDATE event_producers SET applied = '{[1,2)}'; "
                "UPDATE users_revenue SET revenue = 1"
            )
            follower.database.close()  # another database took the place of the first one
            follower.look()
        self.assertRevenue({"user1": 2})

    def test_verify_says_when_it_would_help(self):
        log = self.path("log", with_id("p", 1))
        query("INSERT INTO users_revenue VALUES ('other', 1)")
        output, _ = self.processor("--verify", log, status=1)
        self.assertIn("--from-start", output)
