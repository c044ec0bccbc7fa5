"""The model `nanochat` of lm-evaluation-harness (the extra [lm-eval]): a run or a GGUF file on the packed runtime.

Importing this module registers the model. `python -m nanochat_cli.evaluation.lm_eval` is the harness's command line
with it. Knows the harness's requests; tasks, metrics and reports are the harness's own.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nanochat_cli.errors import ConfigError, DataError, NanochatError
from nanochat_cli.formats.open import load_target
from nanochat_cli.formats.run.find import find_run_or_gguf
from nanochat_cli.inference.batched import continue_tokens
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.training.update import is_out_of_memory

_log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""For tasks that do not set `max_gen_toks`."""
_SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "until", "max_gen_toks"}

AUTOMATIC = 32
"""Sequences scored together at first, where no number was given."""

Pair = tuple[Any, list[int], list[int]]
"""(request, tokens of the context, tokens of the continuation)."""


@register_model("nanochat")
class NanochatLM(TemplateLM):
    """`target`: a run, by path or name, or a .gguf file; default: the latest run.

    batch_size: sequences scored together; `auto` and `auto:N` start with AUTOMATIC. It is halved when memory runs out.
    seed: for tasks that sample. backend: of the kernels. device: ignored with a warning, since the model runs on the
    CPU. Raises ConfigError and DataError.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        backend: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if device not in (None, "", "cpu"):
            _log.warning("device = %s (the harness's default is cuda:0) is ignored: this model runs on the CPU", device)
        path = find_run_or_gguf(None if target is None else Path(target))
        model, tokenizer, _ = load_target(path)
        self.path, self.tokens, self.seed = path, tokenizer, seed
        self.model = PackedTransformer.from_model(model, backend)
        self.batch_size = _rows(batch_size)
        if max_batch_size is not None:
            self.batch_size = min(self.batch_size, max_batch_size)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer that cached requests belong to: a run retrained at the same path may have another."""
        return f"{self.path}@{hashlib.sha256(self.tokens.to_str().encode()).hexdigest()[:16]}"

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_id

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads."""
        return self.model.config.max_seq_len

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Empty, since there is no template. Raises ConfigError when one is requested."""
        if chat_template:
            raise ConfigError("--apply_chat_template: models of nanochat continue text and have no chat template")
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises ConfigError, like `chat_template`."""
        return self.chat_template(True)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.tokens.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both in the tokens of the whole text; encoded separately where a token spans their border."""
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        before, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if context and whole[: len(before)] == before and len(whole) > len(before):
            return before, whole[len(before) :]
        return before or [self.eot_token_id], self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request (log-probability of the continuation in nats, whether greedy decoding yields it)."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="nanochat: log-likelihoods", disable=disable_tqdm) as progress:
            while len(answers) < len(order):
                chosen = order[len(answers) : len(answers) + self.batch_size]
                try:
                    scored = list(self._score([requests[i][1:] for i in chosen]))
                except (RuntimeError, MemoryError) as error:
                    if self.batch_size == 1 or not is_out_of_memory(error):
                        raise
                    self.batch_size = max(1, self.batch_size // 2)
                    _log.warning("out of memory: %d sequences together from here on", self.batch_size)
                    continue
                for i, answer in zip(chosen, scored, strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                progress.update(len(chosen))
        return [answers[i] for i in range(len(requests))]

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Score pairs in one batch, padded on the right, where no earlier position attends."""
        inputs = []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise DataError(
                    f"a continuation has {len(continuation)} tokens and the model reads at most {self.max_length}"
                )
            inputs.append((context + continuation)[-self.max_length - 1 : -1])  # drops the context's beginning
        width = max(len(ids) for ids in inputs)
        padded = [ids + [self.eot_token_id] * (width - len(ids)) for ids in inputs]
        hidden = self.model(torch.tensor(padded, dtype=torch.int64, device=self.model.device))
        for row, ids, (_, continuation) in zip(hidden, inputs, pairs, strict=True):
            logits = self.model.logits(row[len(ids) - len(continuation) : len(ids)]).float()
            targets = torch.tensor(continuation, dtype=torch.int64, device=logits.device)
            nats = logits.log_softmax(-1).gather(1, targets[:, None]).double().sum()
            yield float(nats), bool((logits.argmax(-1) == targets).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text in nats, in windows of the context that share no predicted token."""
        totals = []
        for request in requests:
            text = request.args[0]
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(nats for nats, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
            totals.append(float(total))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to `until`, greedy unless a task asks to sample."""
        texts = []
        for request in tqdm(requests, desc="nanochat: generating", disable=disable_tqdm):
            context, asked = cast("tuple[str, dict[str, Any]]", request.args)
            settings = _sampling(asked)
            ids = self.tok_encode(context) or [self.eot_token_id]
            kept = max(self.max_length - settings.max_tokens, self.max_length // 2)  # of too long a context
            (completion,) = continue_tokens(self.model, self.tokens, [ids[-kept:]], settings, [self.seed])
            texts.append(completion.text)
            self.cache_hook.add_partial("generate_until", (context, asked), completion.text)
        return texts


def _rows(asked: int | str | None) -> int:
    """Sequences to score together. Raises ConfigError unless it is a number or automatic."""
    text = str(asked or "auto")
    if text.partition(":")[0] == "auto":
        return AUTOMATIC
    try:
        rows = int(text)
    except ValueError:
        rows = 0
    if rows < 1:
        raise ConfigError(f"--batch_size {text}: needs a number of at least 1, or auto")
    return rows


def _sampling(asked: dict[str, Any]) -> SamplingConfig:
    """The settings of a task. Raises ConfigError for an unknown one."""
    if unknown := sorted(asked.keys() - _SAMPLING):
        raise ConfigError(f"generation_kwargs {unknown[0]}: unknown; choose from {', '.join(sorted(_SAMPLING))}")
    until = asked.get("until") or []
    temperature = float(asked.get("temperature") or 0.0)
    if asked.get("do_sample") and temperature == 0:
        temperature = 1.0
    return SamplingConfig(
        max_tokens=int(asked.get("max_gen_toks") or MAX_NEW_TOKENS),
        temperature=temperature if asked.get("do_sample", temperature > 0) else 0.0,
        top_k=int(asked.get("top_k") or 0),
        top_p=float(asked.get("top_p") or 1.0),
        repetition_penalty=float(asked.get("repetition_penalty") or 1.0),
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except NanochatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
