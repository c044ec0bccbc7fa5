"""`nanochat eval --suite`: one suite on a run or a GGUF file, with a table and `results.json` as its results."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import DataError, Interrupted
from nanochat_cli.evaluation.suites import BITS_PER_BYTE, COMPILE, COMPLETION, MEMORISED, SuiteOptions, problem_suite
from nanochat_cli.report.quantities import counted
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Result, write_results

if TYPE_CHECKING:
    from nanochat_cli.data.shards import ShardReader
    from nanochat_cli.data.tokenizer import Tokenizer
    from nanochat_cli.evaluation.problem import Problem
    from nanochat_cli.formats.open import LoadedRun
    from nanochat_cli.formats.run.checkpoints import Which
    from nanochat_cli.inference.packed_model import PackedTransformer
    from nanochat_cli.sandbox.pool import SandboxPool

RESULTS = "results.json"
COMPLETIONS = "completions.jsonl"
TASKS, PLACES = 100, 200
"""Of each kind and language in `completion`, and on each side in `memorised`, unless --limit says otherwise."""
TRAINING_TOKENS = 20_000_000
"""Most tokens that the peers of `completion` index."""


def evaluate_target(
    target: Path,
    suite: str,
    options: SuiteOptions,
    reporter: Reporter,
    *,
    which: "Which" = "latest",
    out: Path | None = None,
    resume: bool = False,
    data: Path | None = None,
    backend: str | None = None,
) -> None:
    """Evaluate a checkpoint of a run or a GGUF file.

    which: the checkpoint of a run: `latest`, `best` or a step. out: the folder for completions and results, by default
    beside the target. data: the data set for suites on held-out documents, by default the run's. Raises ConfigError and
    DataError.
    """
    if suite == BITS_PER_BYTE:
        _bits_per_byte(target, which, reporter, out, data)
        return
    if suite == COMPLETION:
        _completion(target, which, options, reporter, out, data, backend)
        return
    if suite == MEMORISED:
        _memorised(target, which, options, reporter, out, data, backend)
        return
    from nanochat_cli.evaluation.complete_problems import complete_problems, drawing, fingerprint
    from nanochat_cli.evaluation.contamination_report import manifest_of, report_contamination
    from nanochat_cli.evaluation.prompt_boundary import at_token_boundaries
    from nanochat_cli.evaluation.sample_file import SampleFile
    from nanochat_cli.evaluation.suite_report import results, scores, table
    from nanochat_cli.formats.open import load_target
    from nanochat_cli.inference.packed_model import PackedTransformer
    from nanochat_cli.sandbox.pool import SandboxPool
    from nanochat_cli.sandbox.sandbox import Sandbox

    sandbox = Sandbox()
    with SandboxPool(sandbox) as pool:
        # Before weights are loaded, so that a suite that cannot run fails at once.
        problems = None if suite == COMPILE else problem_suite(suite, options.limit, reporter)
        for language in sorted({problem.language for problem in problems or ()}):
            sandbox.toolchain(language)
        reporter.info(f"sandbox: {sandbox.isolation.description}")
        model, tokenizer, run = load_target(target, which)
        if run is not None:
            reporter.info(str(run))
        if problems is None:
            problems = _held_out_functions(target, run, data, options, pool, reporter)
        noted = report_contamination(manifest_of(target, run, data), reporter)
        problems = at_token_boundaries(problems, tokenizer.encode)
        packed = PackedTransformer.from_model(model, backend)
        del model
        identity = identity_of(target, run)
        settings = {"suite": suite, **identity, **options.drawn(), "problems": fingerprint(problems)}
        folder = out if out is not None else default_folder(target, suite, run)
        with SampleFile(folder, settings, resume=resume) as file:
            try:
                complete_problems(problems, drawing(packed, tokenizer, options), pool, options, file, reporter, suite)
            except KeyboardInterrupt as error:
                raise Interrupted(f"stopped; finished problems are in {file.path}: continue with --resume") from error
            scored = scores(file.records, options.ks, options.temperatures)
    too_long = scored[0].too_long
    if too_long:
        reporter.warn(
            f"{too_long} of {len(problems)} prompts are longer than the context of {packed.config.max_seq_len} tokens; "
            "they count as failed"
        )
    title = f"{target}: {suite}, {counted(options.samples, 'completion')} of each problem"
    reporter.table(title, *table(suite, scored))
    values = [asdict(score) for score in scored]
    details = {"settings": settings, "isolation": sandbox.isolation.description, "scores": values, **noted}
    _finish(target, suite, folder, results(suite, scored), details, reporter)


def identity_of(target: Path, run: "LoadedRun | None") -> dict[str, Any]:
    """The identity of the weights: the SHA-256 of their file, and the step of a run."""
    if run is not None:
        return {"target": target.name, "step": run.step, "sha256": run.sha256}
    try:
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{target}: cannot read: {error.strerror}") from error
    return {"target": target.name, "step": None, "sha256": digest}


def default_folder(target: Path, suite: str, run: "LoadedRun | None") -> Path:
    """RUN/eval/SUITE-step-000500, or eval/FILE-SUITE beside a GGUF file; a file of problems goes by its name."""
    name = Path(suite).name.split(".")[0].replace("@", "-")
    if run is None:
        return target.parent / "eval" / f"{target.stem}-{name}"
    return target / "eval" / f"{name}-step-{run.step:06d}"


def _held_out_functions(
    target: Path,
    run: "LoadedRun | None",
    data: Path | None,
    options: SuiteOptions,
    pool: "SandboxPool",
    reporter: Reporter,
) -> "list[Problem]":
    from nanochat_cli.evaluation.compile_rate import PROMPTS, function_problems
    from nanochat_cli.evaluation.held_out import document_languages, open_held_out

    reader = open_held_out(target, run, data, reporter)
    languages = document_languages(reader, Config() if run is None else run.config, reporter)
    texts = (content.decode("utf-8", "replace") for content in reader.documents("val"))
    return function_problems(zip(languages, texts, strict=True), options.limit or PROMPTS, pool, reporter)


def _bits_per_byte(target: Path, which: "Which", reporter: Reporter, out: Path | None, data: Path | None) -> None:
    from nanochat_cli.evaluation.contamination_report import report_contamination
    from nanochat_cli.evaluation.held_out import open_held_out
    from nanochat_cli.evaluation.run_bits_per_byte import bits_per_byte_results, measure_bits_per_byte
    from nanochat_cli.formats.open import load_target

    model, tokenizer, run = load_target(target, which)
    if run is not None:
        reporter.info(str(run))
    reader = open_held_out(target, run, data, reporter)
    config = None if run is None else run.config
    measured = measure_bits_per_byte(model, tokenizer, reader, config, reporter)
    rows = [
        (name, held_out.bits_per_byte, held_out.loss, held_out.accuracy, held_out.tokens, held_out.bytes)
        for name, held_out in measured.named().items()
    ]
    columns = ("held-out documents", "bits per byte", "loss", "accuracy", "tokens", "bytes")
    reporter.table(str(target), columns, rows)
    noted = report_contamination(reader.manifest, reporter)
    groups = {
        kind: {name: one.as_dict() for name, one in found.items()}
        for kind, found in (("languages", measured.languages), ("sources", measured.sources))
    }
    reporter.result({**measured.whole.as_dict(), **groups})
    folder = out if out is not None else default_folder(target, BITS_PER_BYTE, run)
    details = {"settings": {"suite": BITS_PER_BYTE, **identity_of(target, run), "data": str(reader.folder)}, **noted}
    _finish(target, BITS_PER_BYTE, folder, bits_per_byte_results(measured), details, reporter)


def _completion(
    target: Path,
    which: "Which",
    options: SuiteOptions,
    reporter: Reporter,
    out: Path | None,
    data: Path | None,
    backend: str | None,
) -> None:
    from nanochat_cli.evaluation import completion
    from nanochat_cli.evaluation.completion_tasks import completion_tasks
    from nanochat_cli.evaluation.contamination_report import report_contamination
    from nanochat_cli.evaluation.held_out import known_languages
    from nanochat_cli.evaluation.training_index import TrainingIndex
    from nanochat_cli.formats.open import trained_fim

    model, tokenizer, run, reader = _open_with_training_text(target, which, reporter, data, backend)
    config = None if run is None else run.config
    fim = trained_fim(target, config)
    if not fim.rate:
        reporter.info(
            f"{target} was trained without fill-in-the-middle (fim.rate = 0): it completes from left to right"
        )
    languages = known_languages(reader, config or Config(), reporter)
    texts = (content.decode("utf-8", "replace") for content in reader.documents("val"))
    tasks = completion_tasks(zip(languages, texts, strict=True), options.limit or TASKS)
    if not tasks:
        raise DataError(f"{reader.folder}: its held-out documents have no lines to complete")
    trained_on = reader.tokens("train")[: TRAINING_TOKENS + 1]
    if len(trained_on) > TRAINING_TOKENS:
        reporter.warn(f"the peers know only the first {TRAINING_TOKENS:,} training tokens")
    completers = completion.model_completers(model, tokenizer, fim, options.max_tokens)
    index = TrainingIndex(trained_on[:TRAINING_TOKENS], tokenizer.vocab_size)
    completers |= completion.training_completers(index, tokenizer, options.max_tokens)
    answered = completion.complete_tasks(tasks, completers, reporter)
    scored = completion.completion_scores(answered)
    reporter.table(f"{target}: lines of held-out files", *completion.completion_table(scored))
    folder = out if out is not None else default_folder(target, COMPLETION, run)
    _write_lines(folder / COMPLETIONS, [one.as_dict() for one in answered])
    settings = {"suite": COMPLETION, **identity_of(target, run), "data": str(reader.folder), "fim": fim.model_dump()}
    settings |= {"limit": options.limit or TASKS, "max_tokens": options.max_tokens}
    details = {"settings": settings, **report_contamination(reader.manifest, reporter)}
    _finish(target, COMPLETION, folder, completion.completion_results(scored), details, reporter)


def _memorised(
    target: Path,
    which: "Which",
    options: SuiteOptions,
    reporter: Reporter,
    out: Path | None,
    data: Path | None,
    backend: str | None,
) -> None:
    from nanochat_cli.evaluation import memorised
    from nanochat_cli.evaluation.contamination_report import report_contamination

    model, tokenizer, run, reader = _open_with_training_text(target, which, reporter, data, backend)
    special = sorted(tokenizer.special_tokens.values())
    count = options.limit or PLACES
    stretches = {
        "training": memorised.places_to_recite(reader.tokens("train"), special, count),
        "held-out": memorised.places_to_recite(reader.tokens("val"), special, count),
    }
    with reporter.progress("places", sum(map(len, stretches.values())), "places") as progress:
        recited = {name: memorised.recite(model, tokenizer, some, progress.advance) for name, some in stretches.items()}
    results = memorised.memorised_results(recited)
    rows = [(one.case, one.metric, one.value, one.unit) for one in results]
    reporter.table(f"{target}: recited text", ("text", "measure", "value", "unit"), rows)
    folder = out if out is not None else default_folder(target, MEMORISED, run)
    settings = {"suite": MEMORISED, **identity_of(target, run), "data": str(reader.folder), "limit": count}
    details = {"settings": settings, "recited": list(recited["training"].texts)}
    details |= report_contamination(reader.manifest, reporter)
    _finish(target, MEMORISED, folder, results, details, reporter)


def _open_with_training_text(
    target: Path, which: "Which", reporter: Reporter, data: Path | None, backend: str | None
) -> "tuple[PackedTransformer, Tokenizer, LoadedRun | None, ShardReader]":
    """Model, tokenizer, run and a data set in the same tokens. Raises ConfigError and DataError."""
    from nanochat_cli.evaluation.held_out import open_held_out
    from nanochat_cli.formats.open import load_target
    from nanochat_cli.inference.packed_model import PackedTransformer

    model, tokenizer, run = load_target(target, which)
    if run is not None:
        reporter.info(str(run))
    reader = open_held_out(target, run, data, reporter, ("train", "val"))
    if tokenizer.to_str() != reader.tokenizer.to_str():
        raise DataError(f"{reader.folder} has a different tokenizer from {target}; give the data set of its training")
    return PackedTransformer.from_model(model, backend), tokenizer, run, reader


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def _finish(
    target: Path, suite: str, folder: Path, results: list[Result], details: dict[str, Any], reporter: Reporter
) -> None:
    path = write_results(folder / RESULTS, f"eval {suite}", results, **details)
    reporter.info(f"results: {path}")
    reporter.result({"target": str(target), "suite": suite, "results": results_as_values(results), **details})


def results_as_values(results: list[Result]) -> list[dict[str, Any]]:
    """The results as JSON values, without the fields that are not set here."""
    return [{"case": one.case, "metric": one.metric, "value": one.value, "unit": one.unit} for one in results]
