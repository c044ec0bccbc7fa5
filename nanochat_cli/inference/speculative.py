"""Self-speculative decoding: a run's own multi-token prediction drafts, the model checks several tokens at once.

Lossless for any sampling: the token at every position is drawn from the model's own logits with the draw that plain
decoding would use, and a draft only counts as long as it is that token (for greedy decoding the rule of
arXiv:2211.17192). What was read beyond is forgotten: keys and values by length, recurrent states from a snapshot.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nanochat_cli.errors import ConfigError
from nanochat_cli.inference.language_model import LanguageModel
from nanochat_cli.inference.sampling import SamplingConfig, as_ids, generators, sample
from nanochat_cli.inference.stopwatch import Rate
from nanochat_cli.model.cache import KVCache, Snapshot
from nanochat_cli.model.mtp import MTP, block_config
from nanochat_cli.model.rope import rope_table


class DraftedModel(LanguageModel, Protocol):
    """What checking drafts needs of a model besides generation: hidden states and logits of every position."""

    def __call__(self, tokens: Tensor, cache: KVCache | None = None, /) -> Tensor: ...
    def embed(self, tokens: Tensor, /) -> Tensor: ...
    def logits(self, hidden: Tensor, /) -> Tensor: ...


@dataclass
class Acceptance:
    """drafted, accepted: tokens; checks: passes of the model over drafts; tokens: produced in them, EOS not counted.

    prompt: its tokens, in the pass that reads them. new: tokens of all later passes, with drafts or without, and the
    time of passes, drafting and forgetting.
    """

    drafted: int = 0
    accepted: int = 0
    checks: int = 0
    tokens: int = 0
    prompt: Rate = field(default_factory=Rate)
    new: Rate = field(default_factory=Rate)

    @property
    def rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_check(self) -> float | None:
        return self.tokens / self.checks if self.checks else None


class Drafter(Protocol):
    """Guesses tokens after those that the model has chosen."""

    def reset(self) -> None:
        """A new text, from position 0."""
        ...

    def draft(self, hidden: Tensor, next_tokens: Tensor, count: int) -> list[int]:
        """At most `count` tokens after the last of next_tokens.

        hidden: [1, n, C] of the n positions read since the last call; next_tokens: int64 [1, n], the token after each.
        """
        ...


class HeadDrafter:
    """Head i guesses the token i + 2 after the last position that was read."""

    def __init__(self, model: DraftedModel, mtp: MTP) -> None:
        self.model, self.heads = model, mtp.heads

    def reset(self) -> None:
        pass

    def draft(self, hidden: Tensor, next_tokens: Tensor, count: int) -> list[int]:
        last = hidden[:, -1]
        return [int(self.model.logits(head(last)).argmax()) for head in list(self.heads)[:count]]


class NextNDrafter:
    """The block of `nextn` with keys and values of its own; each further guess continues from its own hidden state."""

    def __init__(self, model: DraftedModel, mtp: MTP) -> None:
        assert mtp.nextn is not None
        config = block_config(mtp.model_config)
        self.model, self.nextn = model, mtp.nextn
        self.cache = KVCache(config, 1, device=model.device)
        self.cos, self.sin = (
            table.to(model.device)
            for table in rope_table(config.max_seq_len, config.resolved_head_dim, config.rope_theta)
        )

    def reset(self) -> None:
        self.cache.clear()

    def draft(self, hidden: Tensor, next_tokens: Tensor, count: int) -> list[int]:
        state = self._read(hidden, next_tokens)
        known = self.cache.length
        guesses: list[int] = []
        while len(guesses) < count:
            token = self.model.logits(state[:, -1]).argmax(dim=-1)
            guesses.append(int(token))
            if len(guesses) < count and self.cache.length < self.cache.max_seq_len:
                state = self._read(state[:, -1:], token[None])
            else:
                break
        self.cache.truncate(known)
        return guesses

    def _read(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        start = self.cache.length
        end = start + tokens.shape[1]
        embedded = self.model.embed(tokens).float()
        state = self.nextn(hidden.float(), embedded, self.cos[start:end], self.sin[start:end], self.cache)
        self.cache.advance(tokens.shape[1])
        return state


def make_drafter(model: DraftedModel, mtp: MTP) -> Drafter:
    """ConfigError for a kind that cannot draft."""
    if mtp.nextn is not None:
        return NextNDrafter(model, mtp)
    if not len(mtp.heads):
        raise ConfigError(f"mtp.kind = {mtp.config.kind} has nothing that drafts: train with mtp.kind = heads or nextn")
    return HeadDrafter(model, mtp)


@torch.no_grad()
def speculate_tokens(
    model: DraftedModel,
    drafter: Drafter,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    n_drafts: int,
    eos_id: int | None = None,
    acceptance: Acceptance | None = None,
    never: Sequence[int] = (),
) -> Iterator[int]:
    """The tokens that `generate_tokens` yields for one prompt, n_drafts guessed ahead; counts in `acceptance`."""
    acceptance = Acceptance() if acceptance is None else acceptance
    context = model.config.max_seq_len
    history = torch.tensor([list(prompt)], dtype=torch.int64, device=model.device)
    if history.shape[1] > context:
        raise ConfigError(f"the prompt has {history.shape[1]} tokens and the model's context holds {context}")
    size = min(context, history.shape[1] + sampling.max_tokens)
    cache = KVCache(model.config, 1, size, model.dtype, model.device)
    seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=model.device)
    seen.scatter_(1, history, True)
    rows = generators(sampling.seed, 1)
    left_out = as_ids(never, model.device)
    drafter.reset()
    unread, drafts = history, list[int]()
    produced, rate = 0, acceptance.prompt
    while produced < sampling.max_tokens:
        started = time.perf_counter()
        if cache.length + unread.shape[1] > context:
            cache.clear()
            drafter.reset()
            unread, drafts = history[:, -max(1, context // 2) :], []
        drafts = drafts[: cache.max_seq_len - cache.length - unread.shape[1]]
        before, snapshot = cache.length, cache.snapshot() if drafts and cache.recurrent else None
        inputs = torch.cat((unread, torch.tensor([drafts], dtype=torch.int64, device=model.device)), dim=1)
        hidden = model(inputs, cache)
        chosen, ended = list[Tensor](), False
        for place in range(len(drafts) + 1):
            at = unread.shape[1] - 1 + place
            token = sample(model.logits(hidden[:, at]), sampling, seen, rows, left_out)
            chosen.append(token)
            seen.scatter_(1, token[:, None], True)
            produced += 1
            ended = int(token) == eos_id or produced == sampling.max_tokens
            if ended or place == len(drafts) or int(token) != drafts[place]:
                break
        found = [token for token in torch.cat(chosen).tolist() if token != eos_id]
        if drafts:
            acceptance.checks += 1
            acceptance.drafted += len(drafts)
            acceptance.accepted += sum(int(token) == draft for token, draft in zip(chosen, drafts, strict=False))
            acceptance.tokens += len(found)
        rate.tokens += len(found) if rate is acceptance.new else history.shape[1]
        rate.seconds += time.perf_counter() - started
        rate = acceptance.new
        yield from found
        if ended:
            return
        started = time.perf_counter()
        valid = unread.shape[1] + len(chosen) - 1
        _forget(model, cache, before, inputs[:, :valid], snapshot)
        new = torch.stack(chosen, dim=1)
        following = torch.cat((unread[:, 1:], new), dim=1)
        history = torch.cat((history, new), dim=1)[:, -context:]
        left = sampling.max_tokens - produced - 1
        drafts = drafter.draft(hidden[:, :valid], following, min(n_drafts, left)) if left > 0 else []
        unread = new[:, -1:]
        rate.seconds += time.perf_counter() - started


def _forget(model: DraftedModel, cache: KVCache, before: int, valid: Tensor, snapshot: Snapshot | None) -> None:
    """Leave only the valid inputs in the cache; a recurrent state reads them again from the snapshot."""
    if cache.length == before + valid.shape[1]:
        return
    if snapshot is None:
        cache.truncate(before + valid.shape[1])
        return
    cache.restore(snapshot)
    model(valid, cache)
