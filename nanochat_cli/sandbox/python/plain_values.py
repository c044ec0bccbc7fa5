"""The messages between a program under test and its grader: tagged JSON, plain data only.

Copied into the sandbox beside both scripts; standard library only. `decode` returns built-in types, so that no method
of the program (`__eq__`, `__class__`) takes part in a comparison.
"""

import json
from typing import Any

LONGEST = 1 << 20
"""Most bytes of a message."""

_NUMBERS: Any = ((int, lambda value: hex(int.__index__(value))), (float, float.__repr__), (complex, complex.__repr__))
_MANY: Any = ((list, list.__iter__), (tuple, tuple.__iter__), (set, set.__iter__), (frozenset, frozenset.__iter__))
"""Types with accessors that a subclass cannot override."""


class Refused(Exception):
    """A message that is too long or malformed."""


def encode(value: Any, refer: Any) -> Any:
    """The JSON form of a value. `refer` numbers an object that is not plain data."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    for base, text in _NUMBERS:
        if issubclass(kind, base):
            return [base.__name__, text(value)]
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    for base, items in _MANY:
        if issubclass(kind, base):
            return [base.__name__, [encode(item, refer) for item in items(value)]]
    if issubclass(kind, dict):
        return ["dict", [[encode(key, refer), encode(item, refer)] for key, item in dict.items(value)]]
    return ["object", refer(value)]


def decode(form: Any, resolve: Any) -> Any:
    """The value of a JSON form. `resolve` returns the object of a number.

    Raises Refused, TypeError, ValueError, OverflowError.
    """
    if form is None or isinstance(form, (bool, str)):
        return form
    if not isinstance(form, list) or len(form) != 2:
        raise Refused("not a value")
    kind, content = form
    simple = {"int": lambda text: int(text, 16), "float": float, "complex": complex, "bytes": bytes.fromhex}
    if kind in simple:
        return simple[kind](content)
    many: Any = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if kind in many:
        return many[kind]([decode(item, resolve) for item in content])
    if kind == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in content}
    if kind == "object":
        return resolve(content)
    raise Refused("not a value")


def write(stream: Any, message: dict[str, Any]) -> None:
    """Send one message. Raises OSError."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def read(stream: Any) -> dict[str, Any] | None:
    """The next message; None at the end. Raises Refused."""
    line = stream.readline(LONGEST + 1)
    if not line:
        return None
    try:
        if len(line) > LONGEST:
            raise Refused("a value of more than a megabyte")
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused("not a message") from error
    if not isinstance(message, dict):
        raise Refused("not a message")
    return message
