"""Valid and invalid events, each under the name of the rule that it keeps or breaks."""

from tests.tools_events import EVENT, nested, padded, with_user, with_value

EXTRA = EVENT[:-1] + b', "x": %b}'


VALID_EVENTS = {
    "an event": EVENT,
    "white space around it": b" \t" + EVENT + b" \t",
    "no white space": EVENT.replace(b" ", b""),
    "64 KiB": padded(65536),
    "64 KiB with white space": EVENT + b" " * (65536 - len(EVENT)),
    "100 levels": nested(100),
    **{
        f"the value {value}": with_value(value)
        for value in (
            "0",
            "-0",
            "0.0",
            "-0.00",
            "1e17",
            "1E+17",
            "-999999999999999999",
            "999999999999999999",
            "0E17",
            "999999999999999999." + "9" * 18,
            "0." + "0" * 17 + "1",
            "1e-18",
            "0e-18",
            "0." + "0" * 18,
            "1.5e3",
        )
    },
    "a user of 1 character": with_user('"x"'),
    "a user of 255 characters": with_user('"' + "x" * 255 + '"'),
    "a user of 255 characters of 4 bytes": with_user('"' + "\U0001f600" * 255 + '"'),
    "a user with an escaped pair": with_user('"\\ud83d\\ude00"'),
    "a user with an escape": with_user('"\\u00e9"'),
    "a user with a letter of 2 bytes": with_user('"\u00e9"'),
    "a user with line ends of Unicode": with_user('"\u2028\u0085\x7f"'),
    "a user with JSON's signs": with_user('"{}[],:\\"\\\\"'),
    "a user with a byte order mark": with_user('"\ufeff"'),
    "a user with a line end": with_user('"\\n"'),
    "a user with a space": with_user('" "'),
    "another field null": EXTRA % b"null",
    "another field with a lone surrogate": EXTRA % b'"\\ud800"',
    "another field with a huge number": EXTRA % b"1e400",
    "another field with an array": EXTRA % b"[1, {\"a\": null}]",
    "another field with brackets in a string": EXTRA % b'"[[[{{{"',
    "another field with 4,000 digits": EXTRA % (b"9" * 4000),
    "a repeated field": EVENT[:-1] + b', "name": "subtract_revenue", "value": 3}',
    "a repeated field whose first value is invalid": b'{"userId": 5, ' + EVENT[1:],
    "a field like a reserved one": EVENT[:-1] + b', "Sequence": 1}',
    "a repeated field with an object in it": b'{"value": {"value": [1]}, ' + EVENT[1:],
    "an escape in a field's name": EVENT.replace(b"value", b"val\\u0075e"),
}


NO_EVENTS = {
    "no JSON": b"nonsense",
    "half an object": b"{",
    "an array": b"[]",
    "a number": b"1",
    "null": b"null",
    "a string": b'"x"',
    "an empty object": b"{}",
    "a comma behind": EVENT + b",",
    "two events": EVENT + EVENT,
    "an event in an array": b"[" + EVENT + b"]",
    "no end": EVENT[:-1],
    "no beginning": EVENT[1:],
    "a comma before the end": EVENT[:-1] + b",}",
    "a byte order mark": b"\xef\xbb\xbf" + EVENT,
    "UTF-16": EVENT.decode().encode("utf-16"),
    "UTF-16 without a mark": EVENT.decode().encode("utf-16-le"),
    "a NUL before": b"\0" + EVENT,
    "a NUL behind": EVENT + b"\0",
    "a byte that is not UTF-8": EVENT.replace(b"user1", b"us\xffer"),
    "a surrogate in UTF-8": EVENT.replace(b"user1", b"\xed\xa0\x80"),
    "a CR in a string": EVENT.replace(b"user1", b"us\rer"),
    "a tab in a string": EVENT.replace(b"user1", b"us\ter"),
    "single quotes": EVENT.replace(b'"', b"'"),
    "a line end of Unicode before": b"\xc2\x85" + EVENT,
    "a space of Unicode": EVENT.replace(b" ", b"\xc2\xa0"),
    "64 KiB and a byte": padded(65537),
    "64 KiB and a byte with white space": EVENT + b" " * (65537 - len(EVENT)),
    **{f"{levels:,} levels": nested(levels) for levels in (101, 900, 100_000)},
    "20,000 open brackets": EXTRA % (b"[" * 20_000),
    "open brackets and an open string of quotes": (EXTRA % (b"[" * 101 + b'"' + b'\\"' * 32_000))[
        :-1
    ],
    "990 levels in a repeated field": EXTRA % (b"[" * 990 + b"]" * 990 + b', "x": 1'),
}


INVALID_VALUES = {
    f"the value {value[:30]} ({len(value):,})": with_value(value)
    for value in (
        "1000000000000000000",
        "-1000000000000000000",
        "1e18",
        "0e18",
        "1e-19",
        "0e-19",
        "0." + "0" * 19,
        "0." + "0" * 18 + "1",
        "true",
        "null",
        '"1"',
        "[1]",
        "{}",
        "NaN",
        "Infinity",
        "-Infinity",
        "01",
        "+1",
        "1.",
        ".5",
        "1e",
        "0x1",
        "1_0",
        "\u0661",
        "9" * 5000,
        "1." + "0" * 5000,
        "1e9999999999999999999",
        "0E-20000",
        "1E+500000",
        "-1e9999999999999999999",
    )
}


INVALID_USERS = {
    "an empty user": with_user('""'),
    "a user of 256 characters": with_user('"' + "x" * 256 + '"'),
    "a user of 256 characters of 2 bytes": with_user('"' + "\u00e9" * 256 + '"'),
    "a NUL in a user": with_user('"\\u0000"'),
    "a lone surrogate for a user": with_user('"\\ud800"'),
    "a lone surrogate in a user": with_user('"a\\udc00"'),
    "a number for a user": with_user("1"),
    "null for a user": with_user("null"),
    "an array for a user": with_user("[]"),
    "true for a user": with_user("true"),
    "an unknown escape in a user": with_user('"\\x41"'),
    "a user without an end": with_user('"a'),
}


INVALID_FIELDS = {
    "NaN in another field": EXTRA % b"NaN",
    "Infinity in another field": EXTRA % b"Infinity",
    "5,000 digits in another field": EXTRA % (b"9" * 5000),
    "an exponent of 19 digits in another field": EXTRA % b"1e9999999999999999999",
    "two values in another field": EXTRA % b"1 2",
    "an unknown name": EVENT.replace(b"add_revenue", b"add"),
    "an array for a name": EVENT.replace(b'"add_revenue"', b"[]"),
    "null for a name": EVENT.replace(b'"add_revenue"', b"null"),
    "upper case in a name": EVENT.replace(b"add_revenue", b"Add_revenue"),
    "a repeated field whose last value is invalid": EVENT[:-1] + b', "value": "1"}',
    "no userId": EVENT.replace(b"userId", b"userid"),
    "a sequence alone": EVENT[:-1] + b', "sequence": 1}',
    "an escaped producerId alone": EVENT[:-1] + b', "producer\\u0049d": "p"}',
    "a null producerId alone": EVENT[:-1] + b', "producerId": null}',
}


INVALID_EVENTS = NO_EVENTS | INVALID_VALUES | INVALID_USERS | INVALID_FIELDS


RESERVED = {  # invalid for the server, but a log may hold these
    "a producerId and a sequence": EVENT[:-1] + b', "producerId": "p", "sequence": 1}',
    "a log": EVENT[:-1] + b', "log": 1}',
}
