"""Log-probabilities of drawn tokens and of whole prompts, in OpenAI's two forms. Natural, at temperature 1."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.inference.packed_model import PackedTransformer

POSITIONS = 128
"""Of a prompt whose logits are in memory together."""


@dataclass
class Scored:
    """Tokens with the log-probability of each, and of the `top` most probable ones at its place; None: not known."""

    top: int
    tokens: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    best: list[list[tuple[int, float]] | None] = field(default_factory=list)
    sent: int = 0
    """Tokens that `fresh` has given away."""

    def observe(self, logits: Tensor, token: int) -> None:
        """logits: [V], from which the token was drawn."""
        self.add(logits[None], [token])

    def add(self, logits: Tensor, tokens: Sequence[int]) -> None:
        """logits: [n, V], of n tokens."""
        scores = logits.float().log_softmax(dim=-1)
        best = scores.topk(max(1, self.top), dim=-1)
        own = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
        self.tokens += tokens
        self.values += own
        self.best += [
            list(zip(ids, values, strict=True))[: self.top]
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def fresh(self) -> "Scored":
        """What has come since the last call."""
        start, self.sent = self.sent, len(self.best)  # the thread that adds writes `best` last
        here = slice(start, self.sent)
        return Scored(self.top, self.tokens[here], self.values[here], self.best[here])


@torch.no_grad()
def score_prompt(model: PackedTransformer, ids: list[int], top: int) -> Scored:
    """Every token of a prompt after those before it; nothing is known of the first."""
    found = Scored(top, [ids[0]], [None], [None])
    hidden = model(torch.tensor([ids], dtype=torch.int64, device=model.device))[0]
    for start in range(0, len(ids) - 1, POSITIONS):
        targets = ids[start + 1 : start + 1 + POSITIONS]
        found.add(model.logits(hidden[start : start + len(targets)]), targets)
    return found


def legacy(scored: Sequence[Scored], tokenizer: Tokenizer, length: int | None) -> dict[str, Any]:
    """The object `logprobs` of /v1/completions, of parts that follow each other.

    length: characters of the text, beyond which tokens are those of a stop string, and left out; None: there are none.
    """
    decoder, offset = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in scored:
        for token, value, best in zip(part.tokens, part.values, part.best, strict=True):
            if length is not None and offset >= length:
                return found
            found["tokens"].append(token_text(tokenizer, token))
            found["token_logprobs"].append(value)
            found["top_logprobs"].append(best and {token_text(tokenizer, other): score for other, score in best})
            found["text_offset"].append(offset)
            offset += len(decoder.decode(tokenizer.token_bytes(token)))
    return found


def of_chat(scored: Scored, tokenizer: Tokenizer) -> dict[str, Any]:
    """The object `logprobs` of a choice of /v1/chat/completions."""

    def entry(token: int, value: float | None) -> dict[str, Any]:
        content = tokenizer.token_bytes(token)
        return {"token": token_text(tokenizer, token), "logprob": value, "bytes": list(content)}

    return {
        "content": [
            {**entry(token, value), "top_logprobs": [entry(*one) for one in best or ()]}
            for token, value, best in zip(scored.tokens, scored.values, scored.best, strict=True)
        ],
        "refusal": None,
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """As text, or as OpenAI spells bytes that are a part of a character."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
