"""Stages `generation` and `speculative`: all ways to continue a prompt agree with each other.

Where a pass over several positions is compared with one pass per position, int8 rounding of activations is off: the
orders of summation differ in the last bit, and a value halfway between two codes would turn that into another token.
"""

from pathlib import Path

import torch

from nanochat_cli.config.load import load_run_config
from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.diagnose.validate.stage import Figure, Value, Workspace
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.formats.open import load_mtp, load_run
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.inference.generate import generate, generate_tokens
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.speculative import Acceptance, make_drafter, speculate_tokens
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.transformer import Transformer

TOLERANCE = 1e-4
"""Largest difference of logits between one pass over a prompt and a pass per token."""
PROMPTS = (
    "def read_line(line):\n    return ",
    "    if not token:\n        ",
    '"""Count the key of a tree',
    "value + 12",
)
WIDTH = 8
"""Tokens of a prompt; in a batch all must have equally many."""
N_TOKENS, N_DRAFTS = 32, 2
GREEDY = SamplingConfig(max_tokens=N_TOKENS, temperature=0)
SAMPLED = SamplingConfig(max_tokens=N_TOKENS, temperature=1.0, top_k=100, repetition_penalty=1.1, seed=11)
OTHER_SEED = SamplingConfig(max_tokens=N_TOKENS, temperature=1.0, top_k=100, repetition_penalty=1.1, seed=12)


def generation(workspace: Workspace) -> Figure:
    """Prefill = step by step; equal seeds give equal texts, others do not; a batch = its rows alone."""
    model, tokenizer, _ = load_run(workspace.run)
    exact = without_activation_rounding(workspace.run)
    prompts = prompt_tokens(tokenizer)
    difference = max(_prefill_difference(exact, prompt) for prompt in prompts)
    if not difference <= TOLERANCE:
        raise ValidationFailure(
            f"reading a prompt at once and token by token gives logits {difference:.1e} apart (allowed: {TOLERANCE:g})"
        )
    _require_determinism(PackedTransformer.from_model(model), tokenizer)
    compared = _require_rows_alone(exact, prompts)
    return Figure(
        f"prefill = step by step within {difference:.1e}; {compared} tokens of a batch = single; one text per seed",
        [
            Value("largest difference of logits, prefill against step by step", difference, "1"),
            Value("tokens of a batch equal to those of its rows alone", compared, "tokens"),
        ],
    )


def speculative(workspace: Workspace) -> Figure:
    """Drafts of the run's own multi-token prediction change no token, greedy or sampled."""
    mtp = load_mtp(workspace.run)
    if mtp is None:
        raise ValidationFailure(f"{workspace.run} was trained with multi-token prediction, but its checkpoint has none")
    _, tokenizer, _ = load_run(workspace.run)
    model = without_activation_rounding(workspace.run)
    acceptance, compared = Acceptance(), 0
    for prompt in prompt_tokens(tokenizer):
        for sampling in (GREEDY, SAMPLED):
            plain = [row[0] for row in generate_tokens(model, [prompt], sampling)]
            drafter = make_drafter(model, mtp)
            found = list(speculate_tokens(model, drafter, prompt, sampling, N_DRAFTS, acceptance=acceptance))
            if found != plain:
                at = next((i for i, (a, b) in enumerate(zip(found, plain, strict=False)) if a != b), len(found))
                how = "greedy" if sampling is GREEDY else "sampled"
                raise ValidationFailure(f"speculative decoding ({how}) differs from plain decoding at token {at}")
            compared += len(found)
    if not 0 < acceptance.accepted < acceptance.drafted:
        raise ValidationFailure(
            f"{acceptance.accepted} of {acceptance.drafted} drafts were accepted: some must be, and some must not"
        )
    return Figure(
        f"{compared} tokens equal to plain decoding; {acceptance.accepted} of {acceptance.drafted} drafts accepted",
        [
            Value("tokens equal to plain decoding", compared, "tokens"),
            Value("drafts", acceptance.drafted, "tokens"),
            Value("drafts accepted", acceptance.accepted, "tokens"),
        ],
    )


def without_activation_rounding(run: Path) -> Transformer:
    """The model of a run with its ternary weights, but with float activations."""
    config = load_run_config(run).model.model_dump()
    config["quant"]["activations"] = False
    model = Transformer(ModelConfig.model_validate(config))
    model.load_state_dict(checkpoints.load(run).tensors["model"])
    model.requantize()
    return model.eval()


def prompt_tokens(tokenizer: Tokenizer) -> list[list[int]]:
    """WIDTH token ids for each of PROMPTS."""
    return [(tokenizer.encode(prompt) * WIDTH)[:WIDTH] for prompt in PROMPTS]


@torch.no_grad()
def _prefill_difference(model: Transformer, prompt: list[int]) -> float:
    """Largest difference of logits after every position: one pass, one pass with a cache, a pass per token."""
    tokens = torch.tensor([prompt])
    at_once = model.logits(model(tokens))[0]
    cached = model.logits(model(tokens, KVCache(model.config, 1)))[0]
    cache = KVCache(model.config, 1)
    stepwise = torch.cat([model.next_logits(tokens[:, i : i + 1], cache) for i in range(len(prompt))])
    return float(torch.maximum((at_once - stepwise).abs(), (at_once - cached).abs()).max())


def _require_determinism(model: PackedTransformer, tokenizer: Tokenizer) -> None:
    def text(sampling: SamplingConfig) -> str:
        return "".join(generate(model, tokenizer, PROMPTS[0], sampling))

    first = text(SAMPLED)
    if text(SAMPLED) != first:
        raise ValidationFailure("the same seed gives a different text the second time")
    if text(OTHER_SEED) == first:
        raise ValidationFailure("another seed gives the same text")
    if text(GREEDY) != text(GREEDY):
        raise ValidationFailure("greedy generation gives a different text the second time")


def _require_rows_alone(model: Transformer, prompts: list[list[int]]) -> int:
    """How many tokens of a batch equal those of its rows generated alone: all, or ValidationFailure."""
    batch = [list(row) for row in zip(*generate_tokens(model, prompts, SAMPLED), strict=True)]
    for row, prompt in enumerate(prompts):
        settings = SamplingConfig(**{**vars(SAMPLED), "seed": SAMPLED.seed + row})
        alone = [tokens[0] for tokens in generate_tokens(model, [prompt], settings)]
        if batch[row] != alone:
            raise ValidationFailure(f"row {row} of a batch is continued differently than alone")
    return sum(map(len, batch))
