"""Proof that transformers makes the same model of a Hugging Face folder: logits, greedy tokens, token ids.

AutoModelForCausalLM and AutoTokenizer load the folder as a person would, without the network and without code from it.
No weight may be missing, left over or of another shape: transformers itself only warns, and starts it at random. Needs
the package transformers (extra `hf`), which is imported when it is asked.
"""

import importlib.util
import inspect
import json
import textwrap
import typing
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, ValidationFailure
from nanochat_cli.inference.generate import generate_tokens
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.model.transformer import Transformer

TOLERANCE = 1e-4
"""Largest difference of logits, in units of their standard deviation: two orders of summation in float32."""
GREEDY_TOKENS = 16
PROMPTS, PROMPT_LENGTH = 8, 24
TEXT_LENGTH, TEXTS_OF_A_FILE = 400, 50
OTHER_TEXTS = (
    "",
    " ",
    "\n\n\n  x",
    "def f(x):\n\treturn x  # é∑😀\r\n",
    "it's 1234567 'll 3.14e-10",
    "Größe, naïve, 東京, Ελλάδα",
)


@dataclass(frozen=True)
class TransformersComparison:
    """A successful comparison; a failed one raises ValidationFailure. Differences are of logits."""

    version: str
    kind: str
    n_prompts: int
    max_difference: float
    logit_std: float
    n_greedy: int
    """Greedy tokens that were equal, of all prompts."""
    n_texts: int

    def lines(self) -> list[str]:
        return [
            f"verified: transformers {self.version} loads it as {self.kind}: logits of {self.n_prompts} prompts within "
            f"{self.max_difference:.1e} (their standard deviation is {self.logit_std:.2g}), {self.n_greedy} greedy "
            f"tokens and the ids of {self.n_texts} texts equal"
        ]


def is_available() -> bool:
    """Whether transformers is installed; imports nothing."""
    return importlib.util.find_spec("transformers") is not None


def require() -> None:
    """Raise ConfigError, with the command that installs it, if transformers is missing."""
    if not is_available():
        raise ConfigError(
            "transformers is not installed, so nothing can be verified: pip install 'nanochat-ternary[hf]'"
        )


@torch.no_grad()
def compare_with_transformers(folder: Path, model: Transformer, tokenizer: Tokenizer) -> TransformersComparison:
    """Compare what transformers loads from a folder with the float model and the tokenizer that it should hold."""
    require()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = _load(folder)
    prompts = sample_prompts(tokenizer, model.config.max_seq_len)
    worst, spread = 0.0, 0.0
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        ours = model.logits(model(tokens))
        found: Tensor = theirs(tokens).logits
        if found.shape != ours.shape:
            raise ValidationFailure(
                f"{folder}: transformers computes logits {list(found.shape)}, not {list(ours.shape)}"
            )
        worst, spread = max(worst, float((found - ours).abs().max())), max(spread, float(ours.std()))
    if not worst <= TOLERANCE * spread:
        raise ValidationFailure(
            f"{folder}: transformers computes logits {worst:.1e} away from the model's, whose standard deviation is "
            f"{spread:.2g}; do not use this folder"
        )
    n_greedy = _greedy_equal(folder, theirs, model, tokenizer, prompts)
    n_texts = _ids_equal(folder, tokenizer)
    return TransformersComparison(
        transformers.__version__, type(theirs).__name__, len(prompts), worst, spread, n_greedy, n_texts
    )


def sample_prompts(tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """Token ids of pieces of the standard library's sources, which leave room for the greedy tokens."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    length = max(1, min(PROMPT_LENGTH, context - GREEDY_TOKENS) - len(start))
    ids = tokenizer.encode(inspect.getsource(textwrap))
    step = max(1, (len(ids) - length) // PROMPTS)
    return [[*start, *ids[at * step :][:length]] for at in range(PROMPTS)]


def greedy_tokens(model: Transformer, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The most probable continuation of each prompt, of equal lengths; the end of a text does not end it."""
    settings = SamplingConfig(max_tokens=GREEDY_TOKENS, temperature=0.0)
    steps = generate_tokens(model, prompts, settings)
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def sample_texts() -> list[str]:
    """Some 200 texts: pieces of sources, which hold indentation and numbers, and what else is split in its own way."""
    sources = (inspect.getsource(module) for module in (json, textwrap, typing, zipfile, inspect))
    pieces = [
        source[at : at + TEXT_LENGTH]
        for source in sources
        for at in range(0, min(len(source), TEXTS_OF_A_FILE * TEXT_LENGTH), TEXT_LENGTH)
    ]
    return [*OTHER_TEXTS, *pieces]


def _load(folder: Path) -> Any:
    """The model in float32. Raises ValidationFailure if transformers refuses the folder, or does not fill the model."""
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained  # its type leaves out what output_loading_info adds
    try:
        model, info = load(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, RuntimeError, TypeError, AttributeError) as error:
        raise ValidationFailure(
            f"{folder}: transformers cannot load it: {' '.join(str(error).split())[:300]}"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            first = sorted(map(str, info[what]))[0]
            raise ValidationFailure(f"{folder}: transformers reports {what.replace('_', ' ')}: {first}; do not use it")
    return model.eval()


def _greedy_equal(folder: Path, theirs: Any, model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]]) -> int:
    """The number of tokens that were equal, up to the end of a text, at which transformers stops."""
    tokens, eos = torch.tensor(prompts), tokenizer.eos_id
    settings = {"max_new_tokens": GREEDY_TOKENS, "do_sample": False, "eos_token_id": eos, "pad_token_id": eos}
    continued = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    n_equal = 0
    for found, ours in zip(continued[:, tokens.shape[1] :].tolist(), greedy_tokens(model, prompts), strict=True):
        end = found.index(eos) + 1 if eos in found else len(found)
        if not found or found[:end] != ours[:end]:
            raise ValidationFailure(
                f"{folder}: transformers continues a prompt with the tokens {found[:end]} and the model with {ours}; "
                "do not use this folder"
            )
        n_equal += end
    return n_equal


def _ids_equal(folder: Path, tokenizer: Tokenizer) -> int:
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, RuntimeError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValidationFailure(f"{folder}: transformers cannot load the tokenizer: {why}") from error
    texts = sample_texts()
    for text in texts:
        found, ours = theirs(text, add_special_tokens=False)["input_ids"], tokenizer.encode(text, allow_special=True)
        if found != ours:
            raise ValidationFailure(
                f"{folder}: AutoTokenizer splits {text[:40]!r} into {found[:8]}, we into {ours[:8]}"
            )
    if theirs.eos_token_id != tokenizer.eos_id:
        raise ValidationFailure(
            f"{folder}: AutoTokenizer ends a text with {theirs.eos_token_id}, and the model with {tokenizer.eos_id}"
        )
    return len(texts)
