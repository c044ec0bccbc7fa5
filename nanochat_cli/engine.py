"""Engine: the commands that make or use one model: tokenize, train, measure, generate, export.

It knows the order of the steps and the layout of a run, and nothing of the command line. Heavy modules
are imported inside the methods that need them, so that importing the Engine costs nothing.
"""

import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_cli.config.paths import anchor
from nanochat_cli.config.schema import Config, ExportConfig
from nanochat_cli.errors import ConfigError
from nanochat_cli.folders import held_file
from nanochat_cli.formats.run.create import TRAINS, create_run, provenance, run_folder, write_config
from nanochat_cli.report.quantities import format_quantity
from nanochat_cli.report.reporter import Reporter

if TYPE_CHECKING:
    from nanochat_cli.data.fim import Gap
    from nanochat_cli.data.shards import ShardReader
    from nanochat_cli.data.tokenizer import Tokenizer
    from nanochat_cli.formats.open import LoadedRun
    from nanochat_cli.formats.run.checkpoints import Which
    from nanochat_cli.inference.packed_model import PackedTransformer
    from nanochat_cli.inference.sampling import SamplingConfig
    from nanochat_cli.model.mtp import MTP
    from nanochat_cli.model.transformer import Transformer
    from nanochat_cli.training.distributed.group import Group
    from nanochat_cli.training.progress import TrainResult

GGUF_FILE = "model.gguf"
QUICKSTART_TOKENS = 64


class Engine:
    """One method per command that makes or uses a model. Results go to the reporter; every error is a NanochatError."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def tokenize(self, source: str, out: Path, config: Config, *, replace: bool = True) -> None:
        """Prepare `source` as a data set in `out`; does nothing if it is there already.

        replace: whether another data set in `out` may be deleted. Raises ConfigError if it may not, or is in use.
        """
        from nanochat_cli.data.documents import printable
        from nanochat_cli.data.prepare import prepare_dataset
        from nanochat_cli.formats.run.dataset import require_replaceable

        manifest = prepare_dataset(
            source, out, config, self.reporter, lambda changed: require_replaceable(out, changed, force=replace)
        )
        rows = [
            (name, split.documents, split.bytes, split.tokens, split.bytes / max(split.tokens, 1))
            for name, split in (("train", manifest.train), ("val", manifest.val))
        ]
        rows += [
            (f"{name} of {part.name}", side.documents, side.bytes, side.tokens, side.bytes / max(side.tokens, 1))
            for part in manifest.parts
            for name, side in (("train", part.train), ("val", part.val))
        ]
        self.reporter.table(str(out), ("split", "documents", "bytes", "tokens", "bytes per token"), rows)
        self.reporter.info(f"next: nanochat train --set data.path={out}")
        self.reporter.result({"dataset": printable(str(out)), **manifest.model_dump(mode="json")})

    def train(self, config: Config, resume: Path | None, stem: str = "run", *, show: bool = False) -> Path:
        """Train a new run in `run.dir/run.name`, or continue `resume`; returns the run's folder.

        stem: names a run that has no name, with a counter. show: serve TensorBoard meanwhile. A run that was stopped
        before its first checkpoint starts from the beginning. Raises ConfigError if the name is taken, or while another
        process trains the run.
        """
        from nanochat_cli.training.summary import summarise

        with self._claimed(config, resume, stem) as (run_dir, group):
            if group is not None and not group.is_first:
                self._fit(config, run_dir, group, resume=resume is not None)
                return run_dir
            with self._shown(run_dir, show):
                result, reader = self._fit(config, run_dir, group, resume=resume is not None)
                sample = summarise(run_dir, config, result, reader, self.reporter)
        answers = reader.manifest.chat is not None
        try_it = f"chat {run_dir}" if answers else f"generate {run_dir} -p {shlex.quote(sample.beginning)}"
        self.reporter.info(f"next: nanochat {try_it}   or: nanochat export {run_dir} --gguf")
        self.reporter.result({"run": str(run_dir), **asdict(result)})
        return run_dir

    def _shown(self, run_dir: Path, show: bool) -> AbstractContextManager[object]:
        from nanochat_cli.report.tensorboard_server import tensorboard

        return tensorboard(run_dir, self.reporter) if show else nullcontext()

    def fit(self, config: Config, resume: Path | None) -> "TrainResult":
        """Like `train`, but returns the figures instead of reporting them."""
        with self._claimed(config, resume, "run") as (run_dir, group):
            return self._fit(config, run_dir, group, resume=resume is not None)[0]

    @contextmanager
    def _claimed(self, config: Config, resume: Path | None, stem: str) -> "Iterator[tuple[Path, Group | None]]":
        """The folder of a run, which rank 0 holds for all, and the ranks that train it together."""
        from nanochat_cli.training.distributed.ranks import is_owned

        if not is_owned(config):
            with run_folder(config, resume, TRAINS, stem) as run_dir:
                yield run_dir, None
            return
        from nanochat_cli.training.distributed.group import open_group

        with open_group(config) as group:
            claim = run_folder(config, resume, TRAINS, stem) if group.is_first else nullcontext()
            with claim as claimed:
                run_dir = Path(group.share(None if claimed is None else str(claimed.absolute())))
                config.run.name = run_dir.name
                yield run_dir if claimed is None else claimed, group

    def _fit(
        self, config: Config, run_dir: Path, group: "Group | None", *, resume: bool
    ) -> "tuple[TrainResult, ShardReader]":
        from nanochat_cli.data.chat import CHATML
        from nanochat_cli.data.conversation_rules import require_combinable
        from nanochat_cli.data.prepare import cached_dataset
        from nanochat_cli.data.shards import ShardReader
        from nanochat_cli.formats.gguf.architecture import destination_of
        from nanochat_cli.formats.initial import initial_template
        from nanochat_cli.formats.run.checkpoints import is_empty
        from nanochat_cli.formats.run.dataset import record_of, require_same_tokenizer, write_record
        from nanochat_cli.formats.run.find import source_runs
        from nanochat_cli.formats.run.origin import require_trained_here
        from nanochat_cli.training.chat_data import open_data
        from nanochat_cli.training.devices import choose_device, require_float8, require_nvfp4
        from nanochat_cli.training.distributed.ranks import rows_of, turns_of
        from nanochat_cli.training.trainer import Trainer

        # Before any data is prepared.
        require_trained_here(run_dir)
        device = choose_device(config.train.device)
        require_float8(config.train, device)
        require_nvfp4(config.train, device)
        self.reporter.info(str(destination_of(config.model)))
        resumable = resume and not is_empty(run_dir)
        anchor(config, source=not resumable)
        with nullcontext() if group is None else group.first_alone():
            if resumable:
                reader = self._data_to_continue(run_dir, config)
            else:
                reader = ShardReader(cached_dataset(config, self.reporter), vocab_size=config.model.vocab_size)
        if (reference := config.collider.reference_in_use) is not None:
            require_same_tokenizer(reference, reader, ", or name another collider.reference")
        for key, run in source_runs(config, begins=not resumable).items():
            require_same_tokenizer(run, reader, f", or name another {key}")
        chats = reader.manifest.chat is not None
        require_combinable(config, chats=chats)
        begins_with = None if resumable else config.train.init
        template = None if begins_with is None else initial_template(begins_with, reader)
        turns = 1 if group is None else turns_of(config, group.size)
        rows = None if group is None else rows_of(group.rank, group.size, config.train, turns)
        data = open_data(reader, config, self.reporter, rows, turns)
        data.warn_of_epochs()
        writes = group is None or group.is_first
        if writes and not resumable:
            create_run(run_dir, config, reader.tokenizer, record_of(reader), CHATML if chats else template)
            if resume:
                self.reporter.warn(f"{run_dir}: no checkpoint yet; it starts from the beginning")
        trainer = Trainer(config, data, run_dir, self.reporter, resume=resumable, group=group)
        if writes and resumable:
            write_record(run_dir, record_of(reader))
            write_config(config, run_dir)  # only now: the trainer has refused what does not fit the checkpoint
        return trainer.fit(), reader

    def evaluate(self, run: Path, which: "Which" = "latest") -> None:
        """Measure a checkpoint of a run on all of its held-out documents."""
        from nanochat_cli.evaluation.contamination_report import report_contamination
        from nanochat_cli.evaluation.held_out import open_held_out
        from nanochat_cli.training.bits_per_byte import evaluate
        from nanochat_cli.training.chat_data import open_data

        loaded = self._open(run, which)
        model = loaded.model
        reader = open_held_out(run, loaded, None, self.reporter)
        data = open_data(reader, loaded.config)
        model.document_end = data.document_end
        with self.reporter.progress("held-out documents", len(reader.tokens("val")) - 1, "tokens") as progress:

            def counted() -> Any:
                for inputs, targets in data.held_out(None):
                    yield inputs, targets
                    progress.advance(int((targets >= 0).sum()))

            held_out = evaluate(model, counted(), data.token_bytes)
        self.reporter.table(str(run), ("measure", "value"), list(held_out.as_dict().items()))
        noted = report_contamination(reader.manifest, self.reporter)
        self.reporter.result({"run": str(run), "step": loaded.step, **held_out.as_dict(), **noted})

    def score(self, run: Path, which: "Which" = "latest", *, out: Path, max_tokens: int | None = None) -> None:
        """Write the losses of the run's training tokens, or of those read first, as a file for collider.scores."""
        from nanochat_cli.formats.run.dataset import open_run_data
        from nanochat_cli.training.score_file import write_scores

        loaded = self._open(run, which)
        config = loaded.config
        reader = open_run_data(run, config, self.reporter, ("train",))
        count, mean = write_scores(
            loaded.model,
            reader,
            config.train.seq_len,
            out,
            self.reporter,
            seed=config.run.seed,
            max_tokens=max_tokens,
        )
        self.reporter.info(f"{out}: {count:,} tokens, mean loss {mean:.3f} nats")
        self.reporter.result({"file": str(out), "tokens": count, "mean_loss": mean})

    def generate(
        self,
        target: Path,
        prompt: "str | Gap",
        *,
        which: "Which" = "latest",
        stream: bool,
        backend: str | None = None,
        speculate: int = 0,
        **sampling: Any,
    ) -> str:
        """Continue `prompt` with a run or a GGUF file, or fill a gap; sampling: the fields of SamplingConfig.

        Writes the prompt and its continuation, or what belongs in the gap, and returns the new text. backend: the
        kernels' (reference, cpu, triton); None: the device's default. speculate: tokens to draft with the run's
        multi-token prediction.
        """
        from nanochat_cli.formats.open import load_target, trained_fim
        from nanochat_cli.inference.generate import encode_prompt, generate
        from nanochat_cli.inference.infill import infill_request
        from nanochat_cli.inference.packed_model import PackedTransformer
        from nanochat_cli.inference.sampling import SamplingConfig
        from nanochat_cli.inference.stopwatch import Stopwatch

        settings = SamplingConfig(**sampling)
        trained, tokenizer, run = load_target(target, which)
        if run is not None:
            self.reporter.info(str(run))
        mtp = self._require_mtp(target, run) if speculate else None
        if isinstance(prompt, str):
            ids, shown = encode_prompt(tokenizer, prompt), prompt
        else:
            fim = trained_fim(target, None if run is None else run.config)
            ids, settings = infill_request(tokenizer, prompt, fim, settings, trained.config.max_seq_len)
            prompt, shown = tokenizer.decode(ids), ""
            if not fim.rate:
                self.reporter.warn(f"{target} was trained without fill-in-the-middle (fim.rate = 0): this is a guess")
        packed = PackedTransformer.from_model(trained, backend)
        del trained, run
        if mtp is not None:
            text, rates = self._speculate(packed, mtp, tokenizer, ids, shown, settings, speculate, stream=stream)
        else:
            model = Stopwatch(packed)
            text = self._write_text(shown, generate(model, tokenizer, ids, settings), stream=stream)
            rates = {"prompt": model.prompt.tokens_per_second, "new": model.new.tokens_per_second}
        self.reporter.result({"target": str(target), "prompt": prompt, "text": text, "tokens_per_second": rates})
        return text

    def _write_text(self, prompt: str, pieces: Iterator[str], *, stream: bool) -> str:
        """Write the prompt and its continuation; an error in the first piece is raised before anything is written."""
        written = [next(pieces, "")]
        if stream:
            self.reporter.write(prompt + written[0])
        for piece in pieces:
            written.append(piece)
            if stream:
                self.reporter.write(piece)
        text = "".join(written)
        self.reporter.write("\n" if stream else f"{prompt}{text}\n")
        return text

    @staticmethod
    def _require_mtp(target: Path, run: "LoadedRun | None") -> "MTP":
        if run is None:
            raise ConfigError(f"{target}: a GGUF file has no MTP modules: name the run, or leave out --speculate")
        mtp = run.mtp()
        if mtp is None:
            raise ConfigError(
                f"{target} was trained without multi-token prediction: train with --set mtp.enabled=true, "
                "or leave out --speculate"
            )
        return mtp

    def _speculate(
        self,
        model: "PackedTransformer",
        mtp: "MTP",
        tokenizer: "Tokenizer",
        ids: list[int],
        shown: str,
        settings: "SamplingConfig",
        n_drafts: int,
        *,
        stream: bool,
    ) -> tuple[str, dict[str, float | None]]:
        """The text that follows `ids`, written after `shown`, and the rates; also reports how many drafts counted."""
        from nanochat_cli.inference.speculative import Acceptance, make_drafter, speculate_tokens
        from nanochat_cli.inference.text_stream import as_text

        acceptance = Acceptance()
        drafter = make_drafter(model, mtp)
        never = tokenizer.never_sampled
        tokens = speculate_tokens(model, drafter, ids, settings, n_drafts, tokenizer.eos_id, acceptance, never)
        text = self._write_text(shown, as_text(tokens, tokenizer, settings.stop), stream=stream)
        if acceptance.rate is not None:
            self.reporter.info(
                f"{acceptance.accepted} of {acceptance.drafted} drafts accepted ({acceptance.rate:.0%}), "
                f"{acceptance.tokens_per_check:.2f} tokens per pass"
            )
        self.reporter.result({"acceptance_rate": acceptance.rate, "tokens_per_pass": acceptance.tokens_per_check})
        return text, {"prompt": acceptance.prompt.tokens_per_second, "new": acceptance.new.tokens_per_second}

    def export(self, run: Path, out: Path, export: ExportConfig, which: "Which" = "latest") -> None:
        """Write a checkpoint of a run as GGUF, and verify it unless `export.verify` is off.

        Raises ConfigError while another process writes `out`.
        """
        from nanochat_cli.formats.run.origin import read_chat_template
        from nanochat_cli.report.run_results import add_results

        loaded = self._open(run, which)
        loaded.require_ternary()
        described = provenance(run, loaded.config, loaded.step, self.reporter, paths=export.paths)
        with held_file(out, "writes"):
            sections = self._export(loaded.model, loaded.tokenizer, out, export, described, read_chat_template(run))
            add_results(run, **sections)
        self.reporter.result({"run": str(run)})

    def _export(
        self,
        model: "Transformer",
        tokenizer: "Tokenizer",
        out: Path,
        export: ExportConfig,
        provenance: dict[str, object],
        chat_template: str | None = None,
    ) -> dict[str, object]:
        """Write and verify the file; returns its sections of `results.json`."""
        from nanochat_cli.export.verify import verify_gguf
        from nanochat_cli.formats.gguf.tensor_types import support_table
        from nanochat_cli.formats.gguf.write import export_gguf

        model = self._folded(model, out)
        report = export_gguf(model, tokenizer, out, export, provenance, chat_template)
        for line in report.fallbacks:
            self.reporter.warn(line)
        self.reporter.info(
            f"{out}: arch {report.arch}, {format_quantity(report.bytes, 'B')}, "
            f"{report.bits_per_weight:.3g} bits per ternary weight"
        )
        columns, rows = support_table([*report.linear_types.values(), report.head_type])
        self.reporter.table("where llama.cpp has kernels for these types", columns, rows)
        self.reporter.result({"export": asdict(report)})
        sections: dict[str, object] = {"export": asdict(report)}
        if export.verify:
            verified = verify_gguf(out, model, tokenizer)
            for line in verified.lines():
                self.reporter.info(line)
            self.reporter.result({"verify": asdict(verified)})
            sections["verification"] = asdict(verified)
        return sections

    def _folded(self, model: "Transformer", out: Path) -> "Transformer":
        """The model with its residual streams folded into a plain residual if that is exact; reports the outcome."""
        from nanochat_cli.formats.gguf.mhc_fold import fold
        from nanochat_cli.formats.gguf.mhc_sidecar import write_sidecar

        mhc = model.config.mhc
        if mhc.streams == 1:
            return model
        if not mhc.dynamic:
            write_sidecar(model, out.with_suffix(".mhc"))
        folded = fold(model)
        self.reporter.result({"fold": {"exact": folded.model is not None, "residual": repr(folded.residual)}})
        if folded.model is None:
            self.reporter.warn(
                f"hyper-connections cannot be folded into a llama.cpp architecture: {folded.reason}; the file has "
                "our own, which nanochat generate runs (for llama.cpp train with model.mhc.streams = 1)"
            )
            return model
        self.reporter.info(f"hyper-connections folded into a plain residual: logits within {folded.difference:.1e}")
        return folded.model

    def quickstart(self, config: Config) -> None:
        """The whole chain in a new run: data, training, figures, a GGUF file, llama.cpp running it."""
        from nanochat_cli.data.shards import TOKENIZER
        from nanochat_cli.data.tokenizer import Tokenizer
        from nanochat_cli.export import llama_cpp
        from nanochat_cli.report.run_results import read_results

        run = self.train(config, None, "quickstart")
        gguf = run / GGUF_FILE
        self.export(run, gguf, config.export)
        if not llama_cpp.is_available():
            self.reporter.warn("llama.cpp is not installed: install the extra [llama-cpp] (make quickstart does)")
            return
        prompt = read_results(run)["samples"][0]["prompt"]  # empty if no held-out document is long enough
        start = prompt or [Tokenizer.load(run / TOKENIZER).eos_id]
        text = llama_cpp.llama_cpp_generate(gguf, start, QUICKSTART_TOKENS)
        self.reporter.info("llama.cpp continues the held-out document, greedily:")
        self.reporter.write(f"{prompt}{text}\n")
        self.reporter.result({"llama_cpp": prompt + text})
        self.reporter.info(f"done: {run / 'report.md'} has everything; {gguf} is what llama.cpp ran")

    def _open(self, run: Path, which: "Which") -> "LoadedRun":
        from nanochat_cli.formats.open import open_run

        loaded = open_run(run, which)
        self.reporter.info(str(loaded))
        return loaded

    def _data_to_continue(self, run_dir: Path, config: Config) -> "ShardReader":
        """The data set that the run began with, or the other one that its configuration now names."""
        from nanochat_cli.config.load import load_run_config
        from nanochat_cli.data.prepare import cached_dataset
        from nanochat_cli.data.shards import ShardReader
        from nanochat_cli.formats.run.dataset import open_run_data, require_same_tokenizer

        begun = load_run_config(run_dir)
        anchor(begun, source=False)
        if (begun.data, begun.tokenizer) == (config.data, config.tokenizer):
            instead = ", or continue on another data set of the same tokenizer: --set data.path=DIR"
            return open_run_data(run_dir, config, self.reporter, ("train", "val"), instead=instead)
        reader = ShardReader(cached_dataset(config, self.reporter), vocab_size=config.model.vocab_size)
        require_same_tokenizer(run_dir, reader, ", or start a new run")
        return reader
