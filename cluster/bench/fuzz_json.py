"""Changes to JSON texts: to the objects in them, and to how they are written.

What ``json.dumps`` never writes is where readers of JSON differ: a name twice, numbers without
bound, halves of surrogate pairs, bytes that are not UTF-8, and depth.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from cluster.bench.fuzz_mutators import mutate_document

_REWRITTEN = 0.25  # of texts, once their values have been changed
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')
_STRANGE_NUMBERS = (
    *(b"1e999", b"-1e999", b"1e-999", b"NaN", b"Infinity", b"-Infinity", b"-0", b"1.0", b"01"),
    *(b"1E400", b"0x10", b"1_0", b"9" * 400, b"-" + b"9" * 1800, b"0." + b"3" * 1800),
)
_STRANGE_TEXTS = (
    *(rb"\ud800", rb"\udfff", rb"\u0000", rb"\ud83d\ude00", rb"\x00", rb"\q"),
    *(b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\n", b"\xe2\x80\xa8"),
)
_DEPTHS = (2, 20, 150, 600, 1000)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON text with values changed, and often written strangely; what is none is only written
    so."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return rewrite_json(data, rng)
    if isinstance(document, dict) and len(document) > 1 and rng.random() < 0.1:
        one, other = rng.sample(list(document), 2)
        document[one], document[other] = document[other], document[one]
    if rng.random() < 0.9:
        document = mutate_document(document, rng)
    try:
        text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    except RecursionError:
        return rewrite_json(data, rng)
    changed = text.encode("utf-8", "surrogatepass")
    return rewrite_json(changed, rng) if rng.random() < _REWRITTEN else changed


def rewrite_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON text written as no library would write it."""
    return rng.choice(_REWRITERS)(data, rng)


def splice_json(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The first object with one to three of the second one's names; ``data`` where they are none.

    Names go to the top, or into an object or a list inside.
    """
    try:
        taken, given = json.loads(data), json.loads(other)
    except (ValueError, RecursionError):
        return data
    if not isinstance(taken, dict) or not isinstance(given, dict) or not given:
        return data
    for name in rng.sample(list(given), min(len(given), rng.randint(1, 3))):
        place: Any = taken
        while rng.random() < 0.2:
            inside = [value for value in _values(place) if isinstance(value, dict | list)]
            if not inside:
                break
            place = rng.choice(inside)
        if isinstance(place, dict):
            place[name] = given[name]
        else:
            place.append(given[name])
    try:
        return json.dumps(taken).encode()
    except RecursionError:
        return data


def words_of(documents: Iterable[Any]) -> list[bytes]:
    """Every name and short text in JSON values, as JSON writes them, for libFuzzer's dictionary."""
    words: set[str] = set()

    def add(value: Any) -> None:
        if isinstance(value, str):
            words.add(value)
        elif isinstance(value, dict):
            words.update(value)
        for inner in _values(value):
            add(inner)

    for document in documents:
        add(document)
    return [json.dumps(word).encode() for word in sorted(words) if len(word) <= 40]


def _values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _twice(data: bytes, rng: random.Random) -> bytes:
    """A name of the text once more, with another value, in front of an object's first."""
    names = re.findall(rb'"[^"\\]*"(?=\s*:)', data) or [b'"a"']
    starts = [match.end() for match in re.finditer(rb"\{(?!\s*\})", data)]
    if not starts:
        return data
    place = rng.choice(starts)
    values = [match.group() for match in _VALUE.finditer(data)] or names
    return data[:place] + rng.choice(names) + b": " + rng.choice(values) + b", " + data[place:]


def _number(data: bytes, rng: random.Random) -> bytes:
    return _replace(data, _NUMBER, rng.choice(_STRANGE_NUMBERS), rng)


def _text(data: bytes, rng: random.Random) -> bytes:
    quotes = [match.end() for match in re.finditer(rb'"', data)]
    place = rng.choice(quotes) if quotes else 0
    return data[:place] + rng.choice(_STRANGE_TEXTS) + data[place:]


def _deep(data: bytes, rng: random.Random) -> bytes:
    depth = rng.choice(_DEPTHS)
    lists = b"[" * depth + b"]" * depth
    objects = b'{"a":' * depth + b"1" + b"}" * depth
    return _replace(data, _VALUE, rng.choice((lists, objects)), rng)


def _encoded(data: bytes, rng: random.Random) -> bytes:
    name = rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"))
    return data.decode(errors="replace").encode(name, "replace")


def _around(data: bytes, rng: random.Random) -> bytes:
    before, after = rng.choice(
        ((b"", b"}"), (b"", data), (b" \t\r\n", b" \n"), (b"[", b"]"), (b"", b"\0"), (b"//\n", b""))
    )
    return before + data + after


def _replace(data: bytes, pattern: re.Pattern[bytes], new: bytes, rng: random.Random) -> bytes:
    found = [match.span() for match in pattern.finditer(data)]
    if not found:
        return new
    start, end = rng.choice(found)
    return data[:start] + new + data[end:]


_REWRITERS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_twice, _number, _text, _deep),
    *(_encoded, _around),
)
