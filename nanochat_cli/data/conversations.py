"""Conversations in records: which of four forms a record has, and its turns.

    {"messages": [{"role": "user", "content": "…"}, …]}             the form of OpenAI's API
    {"conversations": [{"from": "human", "value": "…"}, …]}         ShareGPT
    {"prompt": "…", "completion": "…"}                              texts, or messages
    {"instruction": "…", "input": "…", "output": "…"}               Alpaca; input and system may be missing

Unlike a text, a record that is none of them is an error: what is left out of instructions would go unnoticed. Knows
values of JSON; `chat` knows tokens, `corpus` files.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nanochat_cli.data.chat import ANSWERS, ROLES, Turn
from nanochat_cli.data.records import BadRecord

FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "Alpaca": ("instruction", "output"),
}
"""Form → the fields that it is recognised by, in the order in which they are looked for."""
_SPEAKERS = {"human": "user", "gpt": ANSWERS, "function_response": "tool"}
"""Names of ShareGPT → ours."""


class Conversation(NamedTuple):
    form: str
    turns: list[Turn]


def conversation_of(record: object) -> Conversation:
    """Raises BadRecord for what is no conversation with an answer in it."""
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {type(record).__name__}, expected an object")
    form = next((form for form, fields in FORMS.items() if all(field in record for field in fields)), None)
    if form is None:
        known = "; ".join(f"{' and '.join(fields)} ({form})" for form, fields in FORMS.items())
        raise BadRecord(f"no conversation: it has {', '.join(map(str, record)) or 'no field'}, expected {known}")
    turns = list(_TURNS[form](record))
    if not turns:
        raise BadRecord("an empty conversation")
    if not any(turn.role == ANSWERS for turn in turns):
        raise BadRecord(f"no turn of the {ANSWERS}, so there is nothing to train")
    return Conversation(form, turns)


def to_bytes(turns: Sequence[Turn]) -> bytes:
    """One document: every text after a line with its role and its length in bytes, which no text can imitate."""
    encoded = ((role, text.encode()) for role, text in turns)
    return b"".join(b"%s %d\n%s\n" % (role.encode(), len(text), text) for role, text in encoded)


def from_bytes(content: bytes) -> list[Turn]:
    """The inverse of `to_bytes`."""
    turns, place = [], 0
    while place < len(content):
        start = content.index(b"\n", place) + 1
        role, length = content[place : start - 1].split()
        place = start + int(length) + 1
        turns.append(Turn(role.decode(), content[start : place - 1].decode()))
    return turns


def _messages(record: Mapping[str, Any]) -> Iterator[Turn]:
    yield from _listed(record["messages"], "role", "content")


def _share_gpt(record: Mapping[str, Any]) -> Iterator[Turn]:
    if record.get("system"):
        yield _turn("system", record["system"], "system")
    yield from _listed(record["conversations"], "from", "value")


def _completion(record: Mapping[str, Any]) -> Iterator[Turn]:
    for field, role in (("prompt", "user"), ("completion", ANSWERS)):
        if isinstance(record[field], str):
            yield _turn(role, record[field], field)
        else:
            yield from _listed(record[field], "role", "content")


def _alpaca(record: Mapping[str, Any]) -> Iterator[Turn]:
    if record.get("system"):
        yield _turn("system", record["system"], "system")
    asked = _turn("user", record["instruction"], "instruction")
    given = _turn("user", record.get("input") or "", "input").text
    yield asked._replace(text=f"{asked.text}\n\n{given}") if given else asked
    yield _turn(ANSWERS, record["output"], "output")


_TURNS = dict(zip(FORMS, (_messages, _share_gpt, _completion, _alpaca), strict=True))


def _listed(messages: object, role_field: str, text_field: str) -> Iterator[Turn]:
    if not isinstance(messages, list):
        raise BadRecord(f"a {type(messages).__name__} where the list of messages should be")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {role_field, text_field} <= message.keys():
            raise BadRecord(f"message {number} is no object with {role_field!r} and {text_field!r}")
        if message.get("tool_calls"):
            raise BadRecord(f"message {number} has tool_calls, which are not supported: write them as its text")
        role = message[role_field]
        known = _SPEAKERS.get(role, role) if isinstance(role, str) else None
        if known not in ROLES:
            raise BadRecord(f"message {number} has the unknown role {role!r}; known: {', '.join(ROLES)}")
        yield _turn(known, message[text_field], f"the text of message {number}")


def _turn(role: str, text: object, what: str) -> Turn:
    if not isinstance(text, str):
        raise BadRecord(f"{what} is {type(text).__name__}, expected text")
    if role == ANSWERS and not text:
        raise BadRecord(f"{what} is empty, and it is an answer")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        raise BadRecord(f"{what} is not valid Unicode") from None
    return Turn(role, text)
