"""The library in a few lines: train a run, load a model, continue, complete, score, converse, export and evaluate.

    import nanochat_cli as nanochat

    model = nanochat.load("runs/quickstart-1")
    print(model.generate("def ", max_tokens=40))

A facade over the Engine and the rooms that it uses, as the command line is another one: the same settings do the same.
Importing this module imports no torch: what computes does, once its target exists.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.run.find import find_run, find_run_or_gguf

if TYPE_CHECKING:
    from nanochat_cli.config.schema import Config
    from nanochat_cli.data.tokenizer import Tokenizer
    from nanochat_cli.inference.packed_model import PackedTransformer
    from nanochat_cli.inference.writer import Writer
    from nanochat_cli.model.transformer import Transformer
    from nanochat_cli.report.reporter import Reporter
    from nanochat_cli.training.bits_per_byte import HeldOut

Which = Literal["latest", "best"] | int
"""A checkpoint of a run: one of these two, or a step that was kept."""
Target = str | os.PathLike[str]


class Sampling(TypedDict, total=False):
    """Settings of a continuation: the fields of `inference.sampling.SamplingConfig`, which describes each."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]


class Run:
    """A run on disk, by path or by its name in `runs/`. Raises DataError if it is none."""

    def __init__(self, path: Target) -> None:
        self.path = find_run(Path(path))

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"nanochat_cli.Run({str(self.path)!r})"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was measured, in the order of the steps: the lines of its metrics.jsonl."""
        from nanochat_cli.report.metrics_log import read_metrics

        return read_metrics(self.path)

    @property
    def results(self) -> dict[str, Any]:
        """Its figures, by section, as in results.json: `results`, `export`, `verification`, …"""
        from nanochat_cli.report.run_results import read_results

        return read_results(self.path)

    def export(
        self,
        form: Literal["gguf", "hf"] = "gguf",
        out: Target | None = None,
        *,
        checkpoint: Which = "latest",
        overrides: Mapping[str, object] | None = None,
        quiet: bool = False,
    ) -> Path:
        """Write it as a GGUF file, or as a Hugging Face folder, and verify what was written; returns where that is.

        out: by default model.gguf or hf/ in the run. overrides: keys of [export], such as {"export.type": "tq1_0"}.
        quiet: print only warnings. Raises ConfigError for a model or a setting that the form cannot hold,
        ValidationFailure if what was written computes something else.
        """
        from nanochat_cli.config.load import run_config
        from nanochat_cli.engine import GGUF_FILE, Engine

        if form not in ("gguf", "hf"):
            raise ConfigError(f'form = "{form}": must be "gguf" or "hf"')
        reporter = _reporter(quiet)
        settings = run_config(self.path, *_changes(overrides), reporter.warn).export
        target = self.path / (GGUF_FILE if form == "gguf" else "hf") if out is None else Path(out)
        if form == "gguf":
            Engine(reporter).export(self.path, target, settings, checkpoint)
        else:
            from nanochat_cli.export.huggingface import export_huggingface

            export_huggingface(self.path, target, settings, checkpoint, reporter)
        return target


def train(
    preset: str | Sequence[str] = (),
    *,
    config: Target | None = None,
    overrides: Mapping[str, object] | None = None,
    name: str | None = None,
    resume: Target | None = None,
    quiet: bool = False,
) -> Run:
    """Train a new run, as `nanochat train` does, or continue one.

    preset: one or several, left to right; config: a TOML file, applied after them; overrides: keys and values, applied
    last, such as {"train.total_steps": 100}, None for no value; name: of the run. resume: a run to continue instead,
    with its own configuration and the overrides. quiet: print only warnings. Raises ConfigError for a setting,
    DataError for data.
    """
    from nanochat_cli.config import presets
    from nanochat_cli.config.load import resolve_config, run_config, with_default_model
    from nanochat_cli.engine import Engine

    reporter = _reporter(quiet)
    unset, changes = _changes(overrides)
    if resume is not None:
        if preset or config is not None or name is not None:
            raise ConfigError("resume continues a run with its own configuration: leave out preset, config and name")
        run = find_run(Path(resume))
        begun = run_config(run, unset, changes, reporter.warn)
        if begun.grpo.source is not None:
            raise ConfigError(f"{run}: a run of nanochat grpo, which continues it: nanochat grpo --resume {run}")
        return Run(Engine(reporter).train(begun, run))
    named, file = [preset] if isinstance(preset, str) else list(preset), None if config is None else Path(config)
    based = with_default_model(named, file, "quickstart")
    resolved = resolve_config(based, file, unset, {**changes, "name": {"run.name": name}}, reporter.warn, reporter.info)
    models = [one for one in named if not presets.load(one).is_overlay]
    stem = models[0] if models else "quickstart" if file is None else file.stem
    return Run(Engine(reporter).train(resolved, None, Path(stem).name))


def evaluate(
    target: Target | None = None,
    suite: str | None = None,
    *,
    checkpoint: Which = "latest",
    out: Target | None = None,
    data: Target | None = None,
    backend: str | None = None,
    quiet: bool = False,
    **drawing: Any,
) -> dict[str, Any]:
    """Measure a run or a GGUF file as `nanochat eval` does; returns what its --json would hold.

    suite: as there; None: a run's held-out documents as a whole. out, data: folders, by default those of the command.
    drawing: of suites that draw completions, the fields of `evaluation.suites.SuiteOptions`, such as samples, ks and
    temperatures. Raises ConfigError and DataError.
    """
    from nanochat_cli.engine import Engine
    from nanochat_cli.evaluation.evaluate_target import evaluate_target
    from nanochat_cli.evaluation.suites import BITS_PER_BYTE, SuiteOptions

    path, reporter = find_run_or_gguf(None if target is None else Path(target)), _reporter(quiet)
    unknown = drawing.keys() - SuiteOptions.__dataclass_fields__.keys()
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))}: not a setting of a suite")
    if suite is None and path.suffix != ".gguf" and out is None and data is None:
        Engine(reporter).evaluate(path, checkpoint)
    else:
        evaluate_target(
            *(path, suite or BITS_PER_BYTE, SuiteOptions(**drawing), reporter),
            which=checkpoint,
            out=None if out is None else Path(out),
            data=None if data is None else Path(data),
            backend=backend,
        )
    return dict(reporter.results)


def _changes(overrides: Mapping[str, object] | None) -> tuple[list[str], dict[str, dict[str, object]]]:
    """Keys without a value and keys with one, in the two forms that `config.load` takes."""
    values = {key: str(one) if isinstance(one, os.PathLike) else one for key, one in (overrides or {}).items()}
    unset = [f"{key}=none" for key, value in values.items() if value is None]
    return unset, {"overrides": {key: value for key, value in values.items() if value is not None}}


def _reporter(quiet: bool) -> "Reporter":
    from nanochat_cli.report.reporter import open_reporter

    return open_reporter(quiet=quiet)


def load(
    target: Target | None = None,
    *,
    checkpoint: Which = "latest",
    backend: str | None = None,
) -> "Model":
    """Load a run, by path or by its name in `runs/`, or a `.gguf` file; default: the latest run in `runs/`.

    checkpoint: a run's `latest`, `best` or a kept step; a GGUF file has only one. backend: the kernels' (reference,
    cpu, triton); None: the fastest that works here. Raises DataError for a target that is neither or is damaged,
    ValueError for an unknown backend.
    """
    path = find_run_or_gguf(None if target is None else Path(target))
    from nanochat_cli.formats.gguf.read import load_gguf
    from nanochat_cli.formats.open import load_run
    from nanochat_kernels.backends import requested_backend

    requested_backend(backend)  # refuses an unknown name before anything large is read
    if path.suffix == ".gguf":
        if checkpoint != "latest":
            raise DataError(f"{path}: a GGUF file holds one model; only a run has checkpoint = {checkpoint}")
        return Model(path, *load_gguf(path), None, backend)
    return Model(path, *load_run(path, checkpoint), backend)


class Model:
    """A model in float32 on the CPU, with its tokenizer. One thread at a time.

    path: where it was loaded from. network: the PyTorch module (tokens int64 [B, T] to hidden states, which
    `network.logits` takes). config: the resolved configuration of its run; None for a GGUF file.
    """

    def __init__(
        self,
        path: Path,
        network: "Transformer",
        tokenizer: "Tokenizer",
        config: "Config | None",
        backend: str | None = None,
    ) -> None:
        self.path, self.network, self.tokenizer, self.config = path, network, tokenizer, config
        self._backend = backend

    def __repr__(self) -> str:
        return f"nanochat_cli.Model({str(self.path)!r})"

    def generate(self, prompt: str = "", **sampling: Unpack[Sampling]) -> str:
        """The continuation of `prompt`, without it; an empty prompt starts a new document.

        Raises ConfigError for a setting out of range, DataError for a prompt longer than the context of the model.
        """
        return "".join(self.stream(prompt, **sampling))

    def stream(self, prompt: str = "", **sampling: Unpack[Sampling]) -> Iterator[str]:
        """Like `generate`, but yields whole characters as they come."""
        from nanochat_cli.inference.generate import generate
        from nanochat_cli.inference.sampling import SamplingConfig

        return generate(self._packed, self.tokenizer, prompt, SamplingConfig(**sampling))

    def infill(self, prefix: str, suffix: str, **sampling: Unpack[Sampling]) -> str:
        """What belongs between two texts, for a model trained with fill-in-the-middle (`fim.rate`).

        Of what does not fit the context the parts next to the gap are kept. Raises ConfigError for a setting out of
        range, DataError for a vocabulary without the tokens.
        """
        from nanochat_cli.data.fim import Gap
        from nanochat_cli.formats.open import trained_fim
        from nanochat_cli.inference.generate import generate
        from nanochat_cli.inference.infill import infill_request
        from nanochat_cli.inference.sampling import SamplingConfig

        fim, context = trained_fim(self.path, self.config), self.network.config.max_seq_len
        ids, settings = infill_request(self.tokenizer, Gap(prefix, suffix), fim, SamplingConfig(**sampling), context)
        return "".join(generate(self._packed, self.tokenizer, ids, settings))

    def chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Unpack[Sampling]) -> str:
        """The answer to a conversation: messages with `role` and `content`, the last one usually the user's.

        What two conversations have in common is not read again. Raises ConfigError for a model without a chat template,
        and for messages that it refuses; DataError for a conversation longer than the context of the model.
        """
        from nanochat_cli.inference.sampling import SamplingConfig

        return "".join(self._writer.stream(self._writer.answer(messages, SamplingConfig(**sampling))))

    def score(self, text: str) -> "HeldOut":
        """Loss, perplexity, accuracy and bits per byte of `text`, read as a document from its beginning.

        Text longer than the context is scored in windows, as held-out documents are: the first token of a window is
        predicted from the last one of the window before. Raises DataError for an empty text.
        """
        import numpy as np
        import torch

        from nanochat_cli.data.batches import evaluation_batches
        from nanochat_cli.evaluation.held_out import TokenArray
        from nanochat_cli.training.bits_per_byte import evaluate

        ids = self.tokenizer.encode(text)
        if not ids:
            raise DataError("the text is empty: there is nothing to score")
        eos = self.tokenizer.eos_id
        tokens = TokenArray(np.array([eos, *ids], dtype=np.int64), eos, (len(ids),))
        seq_len = self.network.config.max_seq_len
        if self.config is not None:
            seq_len = min(seq_len, self.config.train.seq_len)
        windows = evaluation_batches(tokens, 1, seq_len)
        batches = ((torch.from_numpy(inputs), torch.from_numpy(targets)) for inputs, targets in windows)
        return evaluate(self.network, batches, torch.from_numpy(self.tokenizer.byte_lengths()))

    @cached_property
    def _packed(self) -> "PackedTransformer":
        """The fast form for inference, made on first use."""
        from nanochat_cli.inference.packed_model import PackedTransformer

        return PackedTransformer.from_model(self.network, self._backend)

    @cached_property
    def _writer(self) -> "Writer":
        from nanochat_cli.inference.chat_template import find_template
        from nanochat_cli.inference.writer import Writer

        return Writer(self._packed, self.tokenizer, find_template(self.path))
