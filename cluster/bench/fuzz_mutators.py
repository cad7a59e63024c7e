"""Changes to valid messages that bytes alone seldom make: fields and keys with unlikely values."""

from __future__ import annotations

import copy
import random
from typing import Any

import yaml
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

_INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    16,
    17,
    20,
    21,
    128,
    129,
    999,
    1000,
    2**31 - 1,
    -(2**31),
    2**63 - 1,
    -(2**63),
)
_FLOATS = (
    0.0,
    -0.0,
    1.0,
    0.5,
    -1.0,
    2.0,
    -2.0,
    2.1,
    100.0,
    1e-30,
    1e308,
    3e38,
    float("inf"),
    float("-inf"),
    float("nan"),
)
_TEXTS = ("", "a", "model", "é\u0000", "x" * 300, "\U0001f600" * 20, "../..", "null", "1e9")
_VALUES: tuple[Any, ...] = (*_INTEGERS, *_FLOATS, *_TEXTS, None, True, [], {}, [1], {"a": 1}, [[]])
_MAX_CHANGES = 3
# libyaml's, which is ten times faster, where PyYAML has it.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def mutate_message(message: Message, rng: random.Random) -> None:
    """Changes one to three fields of a message, or of one inside it."""
    for _ in range(rng.randint(1, _MAX_CHANGES)):
        _mutate_field(message, rng)


def mutate_encoded(kind: type[Message], data: bytes, rng: random.Random) -> bytes:
    """``mutate_message`` of an encoded message; ``data`` itself where it is none."""
    try:
        message = kind.FromString(data)
    except DecodeError:
        return data
    mutate_message(message, rng)
    return message.SerializeToString()


def mutate_behind_first(data: bytes, rng: random.Random) -> bytes:
    """``mutate_bytes``, but of the first byte, which says what the input is."""
    return data[:1] + mutate_bytes(data[1:], rng)


def mutate_document(document: Any, rng: random.Random) -> Any:
    """A YAML document with one to three keys or values changed; the given one is used up."""
    for _ in range(rng.randint(1, _MAX_CHANGES)):
        document = _mutate_value(document, rng)
    return document


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, bytes put in or taken out, the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place:place] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del changed[place : place + rng.randint(1, 8)]
        else:
            del changed[place:]
    return bytes(changed)


def dump_document(document: Any) -> bytes:
    """A document as YAML."""
    text: str = yaml.dump(document, Dumper=_DUMPER, allow_unicode=True)
    return text.encode("utf-8", "surrogatepass")


def _mutate_field(message: Message, rng: random.Random) -> None:
    fields = list(message.DESCRIPTOR.fields)
    if not fields:  # that such a message is there says all
        return
    field: Any = rng.choice(fields)
    name = field.name
    if rng.random() < 0.15:
        message.ClearField(name)
        return
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        keys = getattr(message, name)
        keys[rng.choice((0, 1, -1, 999, 1000))] = rng.choice(_FLOATS)
    elif field.is_repeated:
        _mutate_list(getattr(message, name), field, rng)
    elif field.message_type is not None:
        inner = getattr(message, name)
        inner.SetInParent()
        _mutate_field(inner, rng)
    else:
        _try(lambda: setattr(message, name, _scalar(field, rng)))


def _mutate_list(values: Any, field: FieldDescriptor, rng: random.Random) -> None:
    if values and rng.random() < 0.3:
        del values[rng.randrange(len(values))]
    elif field.message_type is not None:
        if values and rng.random() < 0.7:
            _mutate_field(rng.choice(values), rng)
        else:
            _mutate_field(values.add(), rng)
    elif values and rng.random() < 0.5:
        place = rng.randrange(len(values))
        _try(lambda: values.__setitem__(place, _scalar(field, rng)))
    else:
        copies = rng.choice((1, 1, 1, 20, 600))
        value = _scalar(field, rng)
        _try(lambda: values.extend([value] * copies))


def _scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    kinds = {
        FieldDescriptor.CPPTYPE_STRING: _TEXTS,
        FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
        FieldDescriptor.CPPTYPE_DOUBLE: _FLOATS,
        FieldDescriptor.CPPTYPE_BOOL: (True, False),
    }
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 1, 8, 64, 1000)))
    return rng.choice(kinds.get(field.cpp_type, _INTEGERS))


def _try(change: Any) -> None:
    """A value that the field cannot hold at all never reaches the wire."""
    try:
        change()
    except (ValueError, TypeError, UnicodeEncodeError):
        return


def _mutate_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.2:
            value[rng.choice(_TEXTS)] = value.pop(key)
        elif kind < 0.3:
            value[f"{key}x"] = value[key]
        else:
            value[key] = _mutate_value(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        value[place] = _mutate_value(value[place], rng)
        return value
    if rng.random() < 0.6:  # else little comes past the check of its type
        alike = [other for other in _VALUES if type(other) is type(value)]
        return copy.deepcopy(rng.choice(alike)) if alike else value
    return copy.deepcopy(rng.choice(_VALUES))  # a list of them may be changed later
