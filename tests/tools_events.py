"""Events, logs, and the independent reckoning of their sums."""

import collections
import json
import os
import random
import secrets
from decimal import Decimal
from pathlib import Path

EVENT = b'{"userId": "user1", "name": "add_revenue", "value": 1}'

# Whatever is random begins with this seed; a test that fails prints it.
TORTURE_SEED = int(os.environ.get("TORTURE_SEED") or secrets.randbelow(10**6))

TORTURE_SECONDS = float(os.environ.get("TORTURE_SECONDS", "10"))


def with_id(producer, sequence, user="user1", value=1):
    """Return a log's line as a server writes it."""
    return (
        f'{{"userId": "{user}", "name": "add_revenue", "value": {value}, '
        f'"producerId": "{producer}", "sequence": {sequence}}}\n'
    )


def with_field(field):
    """Return an event with another field, written as it is given."""
    return EVENT[:-1] + b", " + field + b"}"


def with_value(value):
    """Return an event with a value as it is written."""
    return b'{"userId": "user1", "name": "add_revenue", "value": %b}' % value.encode()


def with_user(user):
    """Return an event with a userId as it is written."""
    return b'{"userId": %b, "name": "add_revenue", "value": 1}' % user.encode()


def nested(depth):
    """Return an event that is nested so many levels deep."""
    return with_field(b'"x": ' + b"[" * (depth - 1) + b"]" * (depth - 1))


def padded(size):
    """Return an event of so many bytes."""
    pad = size - len(with_field(b'"pad": ""'))
    return with_field(b'"pad": "' + b"x" * pad + b'"')


def write_events(path, count, seed=0, users=50):
    """Write random events to a file and return its path."""
    chance = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            event = {
                "userId": f"user{chance.randrange(users)}",
                "name": chance.choice(["add_revenue", "subtract_revenue"]),
                "value": chance.randrange(10**6),
            }
            file.write(json.dumps(event) + "\n")
    return path


def read_events(path):
    """Return the events in a file, each of whose lines must be whole."""
    text = Path(path).read_bytes()
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def ids_in(*logs):
    """Return the (producer, sequence) of every line of the logs."""
    return [(event["producerId"], event["sequence"]) for log in logs for event in read_events(log)]


def oracle(*paths):
    """Return {user: sum} over event files: the independent reckoning."""
    signs = {"add_revenue": 1, "subtract_revenue": -1}
    totals = collections.defaultdict(Decimal)
    for path in paths:
        for event in read_events(path):
            totals[event["userId"]] += signs[event["name"]] * Decimal(str(event["value"]))
    return dict(totals)
