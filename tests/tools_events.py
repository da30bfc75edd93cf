"""Events, logs, and the independent reckoning of their sums."""

import collections
import json
import os
import random
import secrets
from decimal import Decimal
from pathlib import Path

EVENT = b'{"userId": "user1", "name": "add_revenue", "value": 1}'


TORTURE_SECONDS = float(os.environ.get("TORTURE_SECONDS", "20"))


TORTURE_SEED = int(os.environ.get("TORTURE_SEED") or secrets.randbelow(10**6))


def with_id(producer, sequence, user="user1", value=1):
    """Return a log's line as a server writes it."""
    return (
        f'{{"userId": "{user}", "name": "add_revenue", "value": {value}, '
        f'"producerId": "{producer}", "sequence": {sequence}}}\n'
    )


def ids_in(*logs):
    """Return the (producer, sequence) of every line of the logs."""
    return [
        (event["producerId"], event["sequence"])
        for log in logs
        for event in map(json.loads, Path(log).read_text().split("\n")[:-1])
    ]


def nested(depth):
    """Return an event that is nested so many levels deep."""
    return EVENT[:-1] + b', "x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def with_value(value):
    """Return an event with a value as it is written."""
    return b'{"userId": "user1", "name": "add_revenue", "value": %b}' % value.encode()


def with_user(user):
    """Return an event with a userId as it is written."""
    return b'{"userId": %b, "name": "add_revenue", "value": 1}' % (
        user if isinstance(user, bytes) else user.encode()
    )


def padded(size):
    """Return an event of so many bytes."""
    return EVENT[:-1] + b', "pad": "' + b"x" * (size - len(EVENT) - 11) + b'"}'


def write_events(path, count, seed=0, users=50):
    """Write random events to a file and return its path."""
    chance = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            name = chance.choice(["add_revenue", "subtract_revenue"])
            file.write(
                json.dumps(
                    {
                        "userId": f"user{chance.randrange(users)}",
                        "name": name,
                        "value": chance.randrange(10**6),
                    }
                )
                + "\n"
            )
    return path


def oracle(*paths):
    """Return {user: sum} over event files: the independent reckoning."""
    totals = collections.defaultdict(Decimal)
    for path in paths:
        for event in map(json.loads, Path(path).read_text().split("\n")[:-1]):
            sign = 1 if event["name"] == "add_revenue" else -1
            totals[event["userId"]] += sign * Decimal(str(event["value"]))
    return dict(totals)
