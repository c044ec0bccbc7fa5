"""Tokens per second of packed models, one row, greedily: with the CUDA graph of a step, and launched kernel by kernel.

The float twin in bf16, launched kernel by kernel, is the peer. Both ways of the packed model must choose the same
tokens.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_sections.task import Task
from benchmarks.gpu_sections.training import PRESETS, SIZES, TINY
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.result_file import summarise

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 128, 5
NextLogits = Callable[[Tensor, KVCache], Tensor]
"""Reads tokens [1, T] into the cache and returns logits [1, V]."""


def run(task: Task) -> None:
    for size, overrides in SIZES.items():
        if task.left() < 0:
            task.leave_out(size, "no time was left")
            continue
        config = resolve_config(PRESETS, None, [*overrides, *(TINY if task.quick else ())]).model
        with task.attempt(size):
            decode(task, size.removeprefix("training-"), config)


@torch.no_grad()
def decode(task: Task, size: str, config: ModelConfig) -> None:
    """All ways in turn, a round each."""
    prompt_tokens, new_tokens = (4, 4) if task.quick else (PROMPT_TOKENS, NEW_TOKENS)
    dtype = torch.bfloat16 if task.cuda else torch.float32
    torch.manual_seed(0)
    model = Transformer(config).to(task.device).eval()
    twin = Transformer(config.model_copy(update={"quant": config.quant.model_copy(update={"enabled": False})}))
    twin = twin.to(task.device, dtype).eval()
    packed = PackedTransformer.from_model(model, dtype=dtype)
    del model
    ways: dict[str, NextLogits] = {
        f"float twin, {dtype}".replace("torch.", ""): twin.next_logits,
        "packed, kernel by kernel": lambda t, cache: packed.logits(packed(t, cache)[:, -1]),
    }
    if task.cuda:
        ways["packed, CUDA graph"] = packed.next_logits
    else:
        task.leave_out("packed, CUDA graph", "only on CUDA")
    prompt = torch.randint(config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    caches = {name: KVCache(config, 1, prompt_tokens + new_tokens, dtype, task.device) for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    chosen: dict[str, list[int]] = {}
    for turn in range(2 if task.quick else ROUNDS + 1):
        for name, next_logits in ways.items():
            tokens, elapsed = generate(task, next_logits, caches[name], prompt.to(task.device), new_tokens)
            chosen[name] = tokens.tolist()
            if turn:  # the first compiles and captures
                seconds[name].append(elapsed)
    case = f"{size}, one row, {new_tokens} tokens after {prompt_tokens}"
    rates = {name: [new_tokens / s for s in values] for name, values in seconds.items()}
    peer = next(iter(ways))
    for name, values in rates.items():
        than = {} if name == peer else {"peer": peer, "peer_runs": rates[peer]}
        task.add([summarise(f"{case}: {name}", "decode rate", "tokens/s", values, **than)])
    graph, plain = chosen.get("packed, CUDA graph"), chosen["packed, kernel by kernel"]
    if graph is not None and graph != plain:
        same = sum(one == other for one, other in zip(graph, plain, strict=True))
        raise ValidationFailure(f"with the CUDA graph, only {same} of {new_tokens} tokens are those without it")


def generate(task: Task, next_logits: NextLogits, cache: KVCache, prompt: Tensor, count: int) -> tuple[Tensor, float]:
    """`count` tokens after the prompt, and the seconds that they took. The host never waits for a token."""
    cache.clear()
    tokens = torch.empty(count, dtype=torch.int64, device=task.device)
    token = next_logits(prompt, cache).argmax(dim=-1, keepdim=True)
    started = _now(task)
    for position in range(count):
        tokens[position] = token[0, 0]
        token = next_logits(token, cache).argmax(dim=-1, keepdim=True)
    return tokens, _now(task) - started


def _now(task: Task) -> float:
    """Seconds, once the device has done what it was given."""
    if task.cuda:
        torch.cuda.synchronize(task.device)
    return time.perf_counter()
