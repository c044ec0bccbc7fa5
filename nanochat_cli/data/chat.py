"""Conversations as token ids: ChatML, rendered from ids, so that no text can ever become a special token.

    <|im_start|>ROLE\\nTEXT<|im_end|>\\n … <|endoftext|>

What is between two special tokens is encoded as one text, as every program does that tokenises the rendered template;
so the ids are those of transformers and llama.cpp, wherever the text does not spell a special token. Knows turns and
tokens; knows nothing of records, files or models.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.tokenizer import EOS, Tokenizer
from nanochat_cli.errors import DataError

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
ANSWERS = "assistant"
"""The role whose turns are trained."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The same as Jinja, for programs that render text: it goes into exported files."""


class Turn(NamedTuple):
    role: str
    text: str


class ChatTokens(NamedTuple):
    """Ids of the tokens around a turn, and of the one after a conversation, which attention does not cross."""

    start: int
    end: int
    stop: int


class Rendered(NamedTuple):
    """tokens: int64 [n], the stop token included; trained: bool [n], answers and the token that ends them."""

    tokens: NDArray[np.int64]
    trained: NDArray[np.bool_]


def chat_tokens(tokenizer: Tokenizer) -> ChatTokens:
    """Raises DataError for a vocabulary without them."""
    special = tokenizer.special_tokens
    if missing := [name for name in (START, END) if name not in special]:
        raise DataError(
            f"conversations need {' and '.join(missing)} in the vocabulary; tokenizers that `nanochat tokenize` trains "
            "have them"
        )
    stop = special.get(EOS, tokenizer.eos_id)
    if stop == special[END]:
        raise DataError(f"conversations need a token that ends a document, besides {END}: the vocabulary has no {EOS}")
    return ChatTokens(special[START], special[END], stop)


def render(conversations: Sequence[Sequence[Turn]], tokenizer: Tokenizer) -> list[Rendered]:
    """Every conversation, whose texts are valid Unicode. Raises DataError as `chat_tokens` does."""
    names = chat_tokens(tokenizer)
    header, line_end = tokenizer.encode(f"{ANSWERS}\n"), tokenizer.encode("\n")
    encoded = iter(tokenizer.encode_batch([f"{role}\n{text}" for turns in conversations for role, text in turns]))
    found = []
    for turns in conversations:
        tokens: list[int] = []
        trained: list[bool] = []
        for role, _ in turns:
            ids = next(encoded)
            # A token that joins the end of the header with the text belongs to the text.
            before = _common(ids, header) if role == ANSWERS else len(ids)
            tokens += [names.start, *ids, names.end, *line_end]
            trained += [False] * (1 + before) + [True] * (len(ids) - before) + [role == ANSWERS]
            trained += [False] * len(line_end)
        tokens.append(names.stop)
        found.append(Rendered(np.array(tokens, dtype=np.int64), np.array([*trained, False], dtype=bool)))
    return found


def prompt_ids(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """The conversation up to where the assistant answers, as in training."""
    names = chat_tokens(tokenizer)
    parts = [part for role, text in turns for part in (names.start, f"{role}\n{text}", names.end, "\n")]
    return ids_of([*parts, names.start, f"{ANSWERS}\n"], tokenizer)


def ids_of(parts: Iterable[int | str], tokenizer: Tokenizer) -> list[int]:
    """Ids as they are, and texts, in which a special token is plain characters."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else tokenizer.encode(part)
    return ids


def rendered_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a rendered template, with its special tokens.

    Texts that went into it have to be `escaped`: those that they spell would be taken for the template's.
    """
    special = tokenizer.special_tokens
    longest_first = sorted(special, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return ids_of((special.get(part, part.replace(_MARK, "")) for part in parts), tokenizer)


def escaped(text: str, tokenizer: Tokenizer) -> str:
    """The text with a mark inside every special token that it spells, which `rendered_ids` takes out again.

    The mark is a noncharacter of Unicode, which texts for interchange do not hold; one that is there is left out.
    """
    for name in sorted(tokenizer.special_tokens, key=len, reverse=True):
        text = text.replace(name, name[:1] + _MARK + name[1:])
    return text


_MARK = "\ufdd0"


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
