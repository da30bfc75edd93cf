"""Random lines: events as everyone prints them, and lines that break a rule or two."""

USERS = [
    "u",
    "user1",
    "x" * 255,
    "x" * 256,
    "\u00e9" * 127,
    "\u00e9" * 128,
    "\u00e9" * 255,
    "\u00e9" * 256,
    "\u65e5\u672c",
    "\u2028",
    "\u0085",
    "\x7f",
    "\\u00e9",
    "a\\\"b",
    "\\u0000",
    "\\ud800",
    "\\ud83d\\ude00",
    "\U0001f600" * 255,
    "",
    "a}b",
    "%d",
    " ",
    "\t",
    "\x01",
    "\0",
    "{",
    '"',
    "\ud800",
]

VALUES = [
    "0",
    "-0",
    "1",
    "-1",
    "0.1",
    "-0.10",
    "1.",
    ".5",
    "01",
    "-01",
    "1e5",
    "1E+2",
    "9" * 18,
    "1" + "0" * 18,
    "-" + "9" * 18,
    "0." + "1" * 18,
    "0." + "1" * 19,
    "1." + "0" * 18,
    "true",
    "null",
    '"1"',
    "NaN",
    "-",
    "9" * 17,
    "9" * 19,
    "0e18",
    "1e-18",
    "1e-19",
    "00",
    "+1",
    "1_0",
    "[1]",
    "\u0661",
]

SEQUENCES = [
    "1",
    "999999999999999",
    "1000000000000000",
    "9007199254740991",
    "9007199254740992",
    "0",
    "-1",
    "01",
    "1.0",
    "1e3",
    '"1"',
    "true",
    "null",
    "9" * 20,
]

OTHER_FIELDS = [
    ("log", '"' + "a" * 32 + '"'),
    ("x", "[{}]"),
    ("userId", '"z"'),
    ("value", "3"),
    ("val\\u0075e", "4"),
]

PRODUCERS = ["p", "p" * 64, "p" * 65, "", "A-_z9", "p.q", "p\\u0071", "\u00e9"]


def random_line(chance):
    """Return a line: an event as everyone prints it, or one that breaks one or two rules, or one
    of another kind."""
    line = random_text(chance).encode("utf-8", "surrogatepass")
    if chance.random() < 0.05:
        at = chance.randrange(len(line))
        other = chance.choice([b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\0", b'"', b"\\", b""])
        line = line[:at] + other + line[at + 1 :]
    return line.replace(b"\n", b"")


def random_text(chance):
    """Return the text of a random line."""
    colon = usually(chance, ": ", [":", ":  ", " : "])
    comma = usually(chance, ", ", [",", " ,", ",\t"])
    fields = random_fields(chance)
    text = comma.join(f'"{name}"{colon}{value}' for name, value in fields)
    before = usually(chance, "", [" ", "\ufeff", "\r", "x"], 0.04)
    behind = usually(chance, "", ["\r", " ", "}", ",", "\0", "{}"], 0.04)
    return before + "{" + text + "}" + behind


def random_fields(chance):
    """Return the (name, value) of each field of a random line."""
    name = chance.choice(["add_revenue", "subtract_revenue"])
    fields = [
        ("userId", quoted(usually(chance, "user1", USERS, 0.2))),
        ("name", quoted(usually(chance, name, ["add", "Add_revenue", "add_revenue "]))),
        ("value", usually(chance, "5", VALUES, 0.3)),
    ]
    if chance.random() < 0.4:
        fields.append(("producerId", quoted(usually(chance, "p", PRODUCERS))))
        fields.append(("sequence", usually(chance, "1", SEQUENCES, 0.15)))
    if chance.random() < 0.1:
        fields.insert(chance.randrange(len(fields) + 1), chance.choice(OTHER_FIELDS))
    if chance.random() < 0.05:
        fields.pop(chance.randrange(len(fields)))
    if chance.random() < 0.05:
        chance.shuffle(fields)
    return fields


def usually(chance, value, others, odds=0.07):
    """Return value, or with these odds one of the others."""
    if chance.random() < odds:
        return chance.choice(others)
    return value


def quoted(text):
    """Return text between quotes, as it is."""
    return f'"{text}"'
