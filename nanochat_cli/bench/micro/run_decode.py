"""`nanochat bench decode`: chooses the model and its file, measures, shows and writes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat_cli.bench.micro.decode import Job, measure
from nanochat_cli.config.schema import Config, ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError
from nanochat_cli.export import llama_cpp
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.formats.open import load_run
from nanochat_cli.formats.run.find import require_writable
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import write_results

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 128, 7
QUICK_PROMPT_TOKENS, QUICK_NEW_TOKENS, QUICK_ROUNDS = 128, 32, 5
SETTINGS = {
    "nanochat": "float32 key/value cache",
    "llama.cpp": "defaults: float16 key/value cache, flash attention auto, repacked weights allowed; top_k 1",
}
"""How each side was set up, for the result file."""


def run_decode(
    reporter: Reporter,
    target: Path | None,
    config: Config | None,
    *,
    quick: bool = False,
    n_threads: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    out: Path | None = None,
) -> None:
    """Measure a run or a GGUF file or, without a target, a model in the shape of `config` with random weights.

    Raises ConfigError without xllamacpp or if the tokens do not fit the model's context; DataError for a bad file.
    """
    if not llama_cpp.is_available():
        raise ConfigError("bench decode compares with llama.cpp: install the extra [llama-cpp] of nanochat")
    if out is not None:
        require_writable(out)
    usual = (QUICK_PROMPT_TOKENS, QUICK_NEW_TOKENS) if quick else (PROMPT_TOKENS, NEW_TOKENS)
    n_threads = n_threads or torch.get_num_threads()
    with _gguf(target, config, (prompt_tokens or usual[0]) + (new_tokens or usual[1]), reporter) as (path, name):
        vocab_size, context = _sizes(path)
        prompt_tokens, new_tokens = fitting(context, prompt_tokens, new_tokens, usual)
        if prompt_tokens + new_tokens > context:
            raise ConfigError(
                f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones do not fit the context of {context} of "
                f"{name}: lower --prompt-tokens or --new-tokens"
            )
        if sum(usual) > context:
            reporter.info(
                f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones: {name} has a context of {context}"
            )
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, vocab_size, (prompt_tokens,), generator=generator).tolist()
        case = f"{name}, {n_threads} threads" if n_threads > 1 else f"{name}, 1 thread"
        results = measure(Job(path, n_threads, prompt, new_tokens), case, QUICK_ROUNDS if quick else ROUNDS, reporter)
    rows = [
        (result.case.removeprefix(f"{case}, "), result.value, peer.value, result.ratio)
        for result, peer in zip(results[::2], results[1::2], strict=True)
    ]
    reporter.table(case, ("", "ours, tokens/s", "llama.cpp, tokens/s", "ratio"), rows)
    details = {"settings": SETTINGS, "threads": n_threads, "quick": quick}
    reporter.result({"suite": "decode", "results": [asdict(result) for result in results], **details})
    if out is not None:
        reporter.info(f"wrote {write_results(out, 'decode', results, **details)}")


def fitting(context: int, prompt: int | None, new: int | None, usual: tuple[int, int]) -> tuple[int, int]:
    """How many prompt and new tokens: as requested, else the usual number or what fits into the context."""
    new = new or max(2, min(usual[1], context // 4 if prompt is None else context - prompt))
    return prompt or max(1, min(usual[0], context - new)), new


@contextmanager
def _gguf(target: Path | None, config: Config | None, positions: int, reporter: Reporter) -> Iterator[tuple[Path, str]]:
    """The file to measure and a name for it; temporary unless `target` is a file itself."""
    if target is not None and target.suffix == ".gguf":
        yield target, target.name
        return
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as folder:
        path = Path(folder) / "model.gguf"
        if target is not None:
            model, tokenizer, run_config = load_run(target)
            name, export = target.name, run_config.export
        else:
            assert config is not None
            model, tokenizer = random_model(config, positions)
            name, export = f"random weights, {_shape(model)}", ExportConfig(type="tq2_0")
        reporter.info(f"writing {name} as {export.type}")
        export_gguf(model, tokenizer, path, export, {})
        yield path, name


def random_model(config: Config, positions: int) -> tuple[Transformer, Tokenizer]:
    """A model of this shape with a context of at least `positions`, and a tokenizer that fits it."""
    torch.manual_seed(0)
    context = max(config.model.max_seq_len, positions)
    model = Transformer(config.model.model_copy(update={"max_seq_len": context})).eval()
    return model, Tokenizer.train(["a few words, a few words"], min(config.model.vocab_size, 300))


def _shape(model: Transformer) -> str:
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{config.dim} × {config.n_layers}, {parameters:.0f} M parameters"


def _sizes(path: Path) -> tuple[int, int]:
    """Sizes of vocabulary and context. DataError for a file that is not a GGUF."""
    file = GGUFFile(path)
    arch = file.fields["general.architecture"]
    return len(file.fields["tokenizer.ggml.tokens"]), int(file.fields[f"{arch}.context_length"])
