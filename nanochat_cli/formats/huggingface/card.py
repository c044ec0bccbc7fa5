"""README.md of a Hugging Face folder: what the model is, what was measured about it, and how to run it.

Only what was measured is in it, and nothing is rounded up: a figure that is missing has no line. The header is YAML
whose values are JSON, which YAML contains. Knows plain values.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import DataError, reason
from nanochat_cli.formats.huggingface.files import CARD
from nanochat_cli.report.quantities import format_quantity

_FIGURES = {
    "bits_per_byte": ("held-out bits per byte", "{:.4f}"),
    "loss": ("held-out loss, nats per token", "{:.4f}"),
    "perplexity": ("held-out perplexity", "{:.2f}"),
    "accuracy": ("held-out next-token accuracy", "{:.4f}"),
    "bytes": ("held-out bytes scored", "{:,.0f}"),
    "training_tokens": ("training tokens", "{:,.0f}"),
    "steps": ("optimizer steps", "{:,.0f}"),
}
"""Figures of `results.json`, in the order of the table."""
_SCORES = ("bits_per_byte", "loss", "perplexity", "accuracy")
_INT8 = "Activations were rounded to int8 in training and are not here"


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of. Figures and scores are as measured: name → value; sizes in bytes.

    place: what a program names to load it. origin: the model that was imported, if it was. suites: (suite, metric) →
    value. checks: lines of the verification.
    """

    name: str
    place: str
    config: ModelConfig
    kind: str
    version: str
    step: int
    weight_bytes: int
    dataset: str | None = None
    license: str | None = None
    origin: str | None = None
    gguf: str | None = None
    gguf_bytes: int = 0
    chat: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)
    suites: Mapping[tuple[str, str], float] = field(default_factory=dict)
    checks: Sequence[str] = ()


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md. Raises DataError."""
    try:
        write_atomically(folder / CARD, model_card(facts).encode())
    except OSError as error:
        raise DataError(f"cannot write {folder / CARD}: {reason(error)}; free space or choose another --out") from error


def model_card(facts: CardFacts) -> str:
    """The text of README.md."""
    parts = [f"---\n{_header(facts)}---", f"# {facts.name}", _description(facts), "## Use", _use(facts)]
    rows = _rows(facts)
    if rows:
        table = "\n".join(f"| {name} | {value} |" for name, value in rows)
        parts += ["## Measured", f"| measure | value |\n| --- | --- |\n{table}"]
    if facts.checks:
        parts += ["## Verified", "\n".join(f"- {line.removeprefix('verified: ')}" for line in facts.checks)]
    return "\n\n".join(parts) + "\n"


def _header(facts: CardFacts) -> str:
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(["ternary", "1.58-bit", "bitnet"] if facts.config.quant.enabled else []), "nanochat-ternary"],
    }
    if facts.gguf is not None:
        values["tags"].append("gguf")
    if facts.license is not None:
        values["license"] = facts.license
    scores = [
        {"type": name, "name": _FIGURES[name][0], "value": facts.figures[name]}
        for name in _SCORES
        if name in facts.figures
    ]
    if scores and facts.dataset is not None:
        held_out = {"type": facts.dataset, "name": f"held-out documents of {facts.dataset}"}
        result = {"task": {"type": "text-generation"}, "dataset": held_out, "metrics": scores}
        values["model-index"] = [{"name": facts.name, "results": [result]}]
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def _description(facts: CardFacts) -> str:
    config = facts.config
    total = format_quantity(config.count_parameters().total, "parameters")
    kind = "ternary (1.58-bit)" if config.quant.enabled else "float"
    source = f"imported from {facts.origin}" if facts.origin else f"trained on {facts.dataset}" if facts.dataset else ""
    lines = [
        f"A {kind} language model of {total}{f', {source}' if source else ''}: width {config.dim}, "
        f"{config.n_layers} layers, {config.n_heads} heads ({config.n_kv_heads} for keys and values), vocabulary "
        f"{config.vocab_size}, context {config.max_seq_len}. "
        f"{'Exported' if facts.origin else f'Step {facts.step}, exported'} by nanochat {facts.version}.",
    ]
    if config.quant.enabled:
        size = f"The float16 weights of this folder take {format_quantity(facts.weight_bytes, 'B')}"
        small = (
            f"; the same weights in {facts.gguf} take {format_quantity(facts.gguf_bytes, 'B')}" if facts.gguf else ""
        )
        lines.append(f"Every matrix of a block holds −1, 0 or 1 times a scale. {size}{small}.")
        if config.quant.activations:
            lines.append(f"{_INT8}; what that changes is under *Verified*, if it was measured.")
    return " ".join(lines)


def _use(facts: CardFacts) -> str:
    prompt = (
        'ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, '
        'return_tensors="pt", return_dict=True)'
        if facts.chat
        else 'ids = tokenizer("def ", return_tensors="pt")'
    )
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{facts.place}")  # {facts.kind}, without code of its own',
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.place}")',
        prompt,
        "print(tokenizer.decode(model.generate(**ids)[0]))",
        "```",
        "",
        "AutoTokenizer reads the names of special tokens in a text as those tokens.",
    ]
    if facts.gguf is not None:
        lines += ["", f"llama.cpp runs the GGUF file: `llama-cli -m {facts.gguf}`. Its converter does not know this "
                  "tokenizer, so use that file rather than converting the folder."]  # fmt: skip
    return "\n".join(lines)


def _rows(facts: CardFacts) -> list[tuple[str, str]]:
    rows = [(name, form.format(facts.figures[key])) for key, (name, form) in _FIGURES.items() if key in facts.figures]
    rows += [(f"held-out bits per byte, {name}", f"{value:.4f}") for name, value in facts.baselines.items()]
    return rows + [(f"{suite}: {metric}", f"{value:.4f}") for (suite, metric), value in facts.suites.items()]
