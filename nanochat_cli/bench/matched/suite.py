"""`nanochat bench e3` and `bench ab`: runs a plan, one process after the other, and makes its report.

The folder of a suite holds the plan, every run with its log and how it ended, and the report, which is written anew
after each run. With a plan that tunes, the runs that look for learning rates come first. A suite that was interrupted
goes on with what is missing: runs that have ended stay as they are, and one that was in the middle continues from its
checkpoint.
"""

import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from nanochat_cli.bench.matched.claims import TUNING, judge, load_claims
from nanochat_cli.bench.matched.measures import Outcome, read_run, relate
from nanochat_cli.bench.matched.noise import noise_note
from nanochat_cli.bench.matched.plan import (
    PLAN_FILE,
    Entry,
    Plan,
    entries,
    load_plan,
    resolve,
    save_plan,
    stands_for,
    tuning_entries,
)
from nanochat_cli.bench.matched.records import FAILED, FINISHED, INTERRUPTED, MEASURES, RunRecord, Suite, write_suite
from nanochat_cli.bench.matched.report.sections import NOTES
from nanochat_cli.bench.matched.suite_child import read_outcome
from nanochat_cli.bench.matched.suite_data import load_suite_data, prepare_suite_data
from nanochat_cli.bench.matched.suite_runs import Place, run_in_process
from nanochat_cli.bench.matched.suite_view import SuiteView
from nanochat_cli.bench.matched.tuning import SEED, Tuned, choose, load_tuned, rates, save_tuned, tuning_notes
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError, DataError, Interrupted, NanochatError
from nanochat_cli.folders import held_folder
from nanochat_cli.formats.run.find import DEFAULT_FOLDER, new_folder, require_writable
from nanochat_cli.report.environment import environment, read_environment
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Result
from nanochat_cli.training.stop_signals import StopSignals

RUNS = "runs the suite in"
AGAIN = FAILED, INTERRUPTED
"""How a run may have ended that a resumed suite starts or continues again."""


def begin_suite(plan: Plan, out: Path | None, reporter: Reporter, report: Path | None = None) -> Suite:
    """Prepare the data, make the folder of a suite, and run it; `out`, or the next of this kind in ./runs.

    report: a folder that gets a copy of the report. Raises ConfigError when the folder is taken, DataError, and what
    `resume_suite` raises.
    """
    with _new_folder(plan, out) as folder:
        prepare_suite_data((resolve(plan, Entry(one, 0), folder) for one in plan.contenders), folder, reporter)
        save_plan(plan, folder)
        return _run(folder, reporter, report)


def resume_suite(folder: Path, reporter: Reporter, report: Path | None = None) -> Suite:
    """Run what the plan in `folder` lacks, write and show the report. report: a folder that gets a copy of it.

    Raises Interrupted after the current run has saved everything, NanochatError when no run has finished, and HeldError
    while another process runs the suite.
    """
    with held_folder(folder, RUNS):
        return _run(folder, reporter, report)


def find_folder(suite: str, out: Path | None) -> Path:
    """The folder of the suite to continue: `out`, or the latest of this kind in ./runs. Raises DataError."""
    if out is not None:
        load_plan(out)
        return out
    plans = [path for path in DEFAULT_FOLDER.glob(f"{suite}-*/{PLAN_FILE}") if load_plan(path.parent).suite == suite]
    if not plans:
        raise DataError(f"{DEFAULT_FOLDER}: no suite to continue here; name its folder with --out")
    return max(plans, key=lambda path: path.stat().st_mtime_ns).parent


@contextmanager
def _new_folder(plan: Plan, out: Path | None) -> Iterator[Path]:
    """The folder of a suite that begins, held by this process."""
    if out is None:
        with new_folder(DEFAULT_FOLDER, plan.suite, RUNS) as folder:
            yield folder
        return
    _require_free(out)
    require_writable(out)
    with held_folder(out, RUNS):
        _require_free(out)  # another process may have been faster
        yield out


def _require_free(folder: Path) -> None:
    if (folder / PLAN_FILE).exists():
        raise ConfigError(f"{folder}: a suite is here; continue it with --resume, or choose another --out")


def _run(folder: Path, reporter: Reporter, report: Path | None) -> Suite:
    from nanochat_cli.bench.matched.report.comparison import show_comparison, write_comparison

    plan = load_plan(folder)
    reporter.info(f"suite: {folder}")
    _run_all(plan, folder, reporter)
    suite = collect(plan, folder)
    written = [write_suite(folder, suite), *write_comparison(folder, suite)]
    if not any(run.status == FINISHED for run in suite.runs):
        raise NanochatError(f"no run has finished, the first because: {suite.runs[0].reason}; see {folder / 'logs'}")
    show_comparison(suite, reporter)
    if report is not None:
        written = _copied(written, report)
    reporter.info(f"report: {', '.join(str(path) for path in written)}")
    reporter.result({"folder": str(folder), **asdict(suite)})
    return suite


def _copied(files: Sequence[Path], folder: Path) -> list[Path]:
    """Raises DataError when they cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copyfile(file, folder / file.name)) for file in files]
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}; choose another --report") from error


def collect(plan: Plan, folder: Path) -> Suite:
    """What the runs that have ended say, whoever ran them."""
    runs: list[RunRecord] = []
    found_environment = None
    for seed in range(plan.seeds):
        for contender in plan.contenders:
            entry = Entry(contender, seed)
            outcome = read_outcome(Place(folder, entry.name).outcome)
            if outcome is not None:
                runs.append(read_run(folder, entry.run, contender.name, seed, outcome))
                found_environment = found_environment or read_environment(folder / entry.run)
    runs = relate(runs, plan.baseline.name)
    settings, results, tuned = plan.settings(), compared(runs, plan), load_tuned(folder)
    if tuned is not None:
        settings[TUNING] = asdict(tuned)
        results += _tried(tuned)
    suite = Suite(plan.suite, found_environment or environment(), settings, results, [], runs)
    if plan.suite == "e3":
        suite.claims.extend(judge(spec, suite) for spec in load_claims())
        settings[NOTES] = tuning_notes(tuned)
    if (note := noise_note(suite)) is not None:
        settings.setdefault(NOTES, []).append(note)
    return suite


def _tried(tuned: Tuned) -> list[Result]:
    """The rates that were tried, as results with the value that was found, and the one that was chosen."""
    found = [Result(name, f"chosen {tuned.key}", rate, "") for name, rate in tuned.chosen.items()]
    return found + [
        Result(name, f"bits per byte after {tuned.steps} steps, {tuned.key} {rate:g}", bits, "bits/byte")
        for name, grid in tuned.tried.items()
        for rate, bits in grid.items()
        if bits is not None
    ]


def compared(runs: Sequence[RunRecord], plan: Plan) -> list[Result]:
    """Every measure of every configuration over its finished runs; ratios are paired with the baseline by seed."""
    found: list[Result] = []
    finished = [run for run in runs if run.status == FINISHED]
    baseline = {run.seed: run for run in finished if run.config == plan.baseline.name}
    for contender in plan.contenders:
        own = [run for run in finished if run.config == contender.name]
        for name in MEASURES:
            values = {run.seed: value for run in own if (value := run.measures.get(name)) is not None}
            if values:
                peers = {} if contender == plan.baseline else {s: run.measures.get(name) for s, run in baseline.items()}
                found.append(_result(contender.name, name, values, peers, plan.baseline.name))
    return found


def _result(config: str, name: str, values: dict[int, float], peers: dict[int, float | None], baseline: str) -> Result:
    measure, runs = MEASURES[name], list(values.values())
    pairs = [(value, peer) for seed, value in values.items() if (peer := peers.get(seed))]
    ratios = [(peer / mine if measure.smaller_is_better else mine / peer) for mine, peer in pairs if mine]
    return Result(
        case=config,
        metric=name,
        value=statistics.median(runs),
        unit=measure.unit,
        peer=baseline if ratios else None,
        ratio=statistics.median(ratios) if ratios else None,
        runs=runs,
        spread=(min(runs), max(runs)),
    )


def _say_stopping(reporter: Reporter) -> Callable[[str], None]:
    return lambda name: reporter.info(f"{name}: the current run saves and ends; Ctrl-C once more does not wait for it")


def _run_all(plan: Plan, folder: Path, reporter: Reporter) -> None:
    tuned, data = load_tuned(folder), load_suite_data(folder)
    order = [*(tuning_entries(plan) if tuned is None else ()), *entries(plan)]
    with StopSignals(_say_stopping(reporter)) as stop, SuiteView(reporter, [entry.name for entry in order]) as view:
        for number, entry in enumerate(order):
            if entry.rate is None and tuned is None and plan.tuning is not None:
                tuned = _finish_tuning(plan, folder, reporter)
            place = Place(folder, entry.name)
            past = read_outcome(place.outcome)
            if past is not None and past.status not in AGAIN:
                view.known(number, past.status)
                continue
            view.start(number)
            config = _configured(plan, entry, folder, tuned)
            if isinstance(config, Outcome):
                outcome = config
                place.record(outcome)
            else:
                data.fix(config)
                outcome = run_in_process(place, config, view.update, lambda: stop.requested)
            view.finish(outcome.status, outcome.reason)
            write_suite(folder, collect(plan, folder))
            if stop.requested:
                raise Interrupted(
                    f"stopped by {stop.name}, everything saved; continue with: "
                    f"nanochat bench {plan.suite} --resume --out {folder}"
                )


def _finish_tuning(plan: Plan, folder: Path, reporter: Reporter) -> Tuned:
    """Choose every contender's rate, say what was tried, and keep it; checkpoints of these runs serve nobody."""
    assert plan.tuning is not None
    tried: dict[str, dict[float, float | None]] = {}
    for contender in plan.contenders:
        source = stands_for(plan, contender)
        grid = [Entry(source, 0, rate) for rate in rates(resolve(plan, Entry(source, 0), folder), plan.tuning)]
        tried[contender.name] = {entry.rate: _bits_per_byte(folder, entry) for entry in grid if entry.rate is not None}
    for entry in tuning_entries(plan):
        shutil.rmtree(folder / entry.run / "checkpoints", ignore_errors=True)
    steps = max(1, round(plan.tuning.share * resolve(plan, Entry(plan.baseline, 0), folder).train.total_steps))
    tuned = choose(tried, seed=SEED, steps=steps)
    save_tuned(folder, tuned)
    for name, grid in tried.items():
        shown = ", ".join(f"{rate:g}: {'–' if bits is None else f'{bits:.4f}'}" for rate, bits in grid.items())
        reporter.info(f"{name}: {tuned.key} = {tuned.chosen.get(name, 'its own')} (bits per byte at {shown})")
    return tuned


def _bits_per_byte(folder: Path, entry: Entry) -> float | None:
    """Of a tuning run; None for one that did not finish."""
    outcome = read_outcome(Place(folder, entry.name).outcome)
    if outcome is None:
        return None
    run = read_run(folder, entry.run, entry.contender.name, entry.seed, outcome)
    return run.measures["bits_per_byte"] if run.status == FINISHED else None


def _configured(plan: Plan, entry: Entry, folder: Path, tuned: Tuned | None) -> Config | Outcome:
    """The configuration of a run; the outcome of one that cannot begin, since the baseline sets its time."""
    rate = None if tuned is None else tuned.chosen.get(entry.contender.name)
    if plan.match != "time" or entry.contender == plan.baseline or entry.rate is not None:
        return resolve(plan, entry, folder, rate=rate)
    reference = Entry(plan.baseline, entry.seed)
    outcome = read_outcome(Place(folder, reference.name).outcome)
    if outcome is None or outcome.status != FINISHED:
        return Outcome(FAILED, f"{reference.name} has not finished, so there is no training time to match")
    record = read_run(folder, reference.run, plan.baseline.name, entry.seed, outcome)
    return resolve(plan, entry, folder, record.measures["train_seconds"], rate)
