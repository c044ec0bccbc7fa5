"""`nanochat bench e3` and `bench ab`: runs a plan, one process after the other, and writes its report.

The folder of a suite holds the plan, every run with its log and outcome, and the report, which is rewritten after each
run. If the plan tunes, the runs that search for learning rates come first. An interrupted suite resumes with what is
missing: finished runs stay as they are, and a run that was cut off continues from its checkpoint.
"""

import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from nanochat_cli.bench.matched.claims import TUNING, judge, load_claims
from nanochat_cli.bench.matched.measures import RunOutcome, read_run, relate
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
from nanochat_cli.bench.matched.report.notes import NOTES
from nanochat_cli.bench.matched.run_record import FAILED, FINISHED, INTERRUPTED, MEASURES, RunRecord, Suite, write_suite
from nanochat_cli.bench.matched.suite_child import read_outcome
from nanochat_cli.bench.matched.suite_data import load_suite_data, prepare_suite_data
from nanochat_cli.bench.matched.suite_runs import Place, run_in_process
from nanochat_cli.bench.matched.suite_view import SuiteView
from nanochat_cli.bench.matched.tuning import SEED, Tuned, choose, load_tuned, rates, save_tuned, tuning_notes
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError, DataError, Interrupted, NanochatError
from nanochat_cli.folders import held_folder
from nanochat_cli.formats.run.find import DEFAULT_FOLDER, new_folder, require_writable
from nanochat_cli.report.environment import environment
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Result
from nanochat_cli.training.stop_signals import StopSignals

RUNS = "runs the suite in"
AGAIN = FAILED, INTERRUPTED
"""Outcomes after which a resumed suite runs the run again."""


def begin_suite(plan: Plan, out: Path | None, reporter: Reporter, report: Path | None = None) -> Suite:
    """Prepare the data, create the suite's folder (`out`, or the next of this kind in ./runs), and run the suite.

    report: a folder that gets a copy of the report. Raises ConfigError if the folder is taken, DataError, and whatever
    `resume_suite` raises.
    """
    with _new_folder(plan, out) as folder:
        prepare_suite_data((resolve(plan, Entry(one, 0), folder) for one in plan.contenders), folder, reporter)
        save_plan(plan, folder)
        return _run(folder, reporter, report)


def resume_suite(folder: Path, reporter: Reporter, report: Path | None = None) -> Suite:
    """Run what is missing of the plan in `folder`, then write and show the report. report: a folder that gets a copy.

    Raises Interrupted after the current run has saved everything, NanochatError if no run has finished, and HeldError
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
    """The folder for a new suite, held by this process."""
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
    """Copies of the files in `folder`. Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copyfile(file, folder / file.name)) for file in files]
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}; choose another --report") from error


def collect(plan: Plan, folder: Path) -> Suite:
    """The suite of all runs in `folder` that have ended, in whichever process."""
    planned = [_ended(folder, Entry(contender, seed)) for seed in range(plan.seeds) for contender in plan.contenders]
    runs = relate([run for run in planned if run is not None], plan.baseline.name)
    settings, results, tuned = plan.settings(), compared(runs, plan), load_tuned(folder)
    if tuned is not None:
        settings[TUNING] = asdict(tuned)
        results += _tried(tuned)
    recorded = next((run.environment for run in runs if run.environment), None)
    suite = Suite(plan.suite, recorded or environment(), settings, results, [], runs)
    if plan.suite == "e3":
        suite.claims.extend(judge(spec, suite) for spec in load_claims())
        settings[NOTES] = tuning_notes(tuned)
    if (note := noise_note(suite)) is not None:
        settings.setdefault(NOTES, []).append(note)
    return suite


def _ended(folder: Path, entry: Entry) -> RunRecord | None:
    """The record of a run, once it has ended."""
    outcome = read_outcome(Place(folder, entry.name).outcome)
    return None if outcome is None else read_run(folder, entry.run, entry.contender.name, entry.seed, outcome)


def _tried(tuned: Tuned) -> list[Result]:
    """The chosen rates, and the result of every rate that was tried."""
    chosen = [Result(name, f"chosen {tuned.key}", rate, "") for name, rate in tuned.chosen.items()]
    return chosen + [
        Result(name, f"bits per byte after {tuned.steps} steps, {tuned.key} {rate:g}", bits, "bits/byte")
        for name, grid in tuned.tried.items()
        for rate, bits in grid.items()
        if bits is not None
    ]


def compared(runs: Sequence[RunRecord], plan: Plan) -> list[Result]:
    """Every measure of every configuration over its finished runs; ratios are paired with the baseline by seed."""
    results: list[Result] = []
    finished = [run for run in runs if run.status == FINISHED]
    baseline = {run.seed: run for run in finished if run.config == plan.baseline.name}
    for contender in plan.contenders:
        own = [run for run in finished if run.config == contender.name]
        for name in MEASURES:
            values = {run.seed: value for run in own if (value := run.measures.get(name)) is not None}
            if values:
                peers = {} if contender == plan.baseline else {s: run.measures.get(name) for s, run in baseline.items()}
                results.append(_result(contender.name, name, values, peers, plan.baseline.name))
    return results


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


def _run_all(plan: Plan, folder: Path, reporter: Reporter) -> None:
    def say_stopping(signal: str) -> None:
        reporter.info(f"{signal}: waiting until the current run has saved; press Ctrl-C again to stop at once")

    tuned, data = load_tuned(folder), load_suite_data(folder)
    order = [*(tuning_entries(plan) if tuned is None else ()), *entries(plan)]
    with StopSignals(say_stopping) as stop, SuiteView(reporter, [entry.name for entry in order]) as view:
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
            if isinstance(config, RunOutcome):
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
    """Choose, report and save every contender's rate, and delete the tuning runs' checkpoints, which nothing needs."""
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
    """The result of a tuning run, if it finished."""
    run = _ended(folder, entry)
    return run.measures["bits_per_byte"] if run is not None and run.status == FINISHED else None


def _configured(plan: Plan, entry: Entry, folder: Path, tuned: Tuned | None) -> Config | RunOutcome:
    """The configuration of a run, or its outcome if it cannot start because the baseline left no time to match."""
    rate = None if tuned is None else tuned.chosen.get(entry.contender.name)
    if plan.match != "time" or entry.contender == plan.baseline or entry.rate is not None:
        return resolve(plan, entry, folder, rate=rate)
    reference = Entry(plan.baseline, entry.seed)
    outcome = read_outcome(Place(folder, reference.name).outcome)
    if outcome is None or outcome.status != FINISHED:
        return RunOutcome(FAILED, f"{reference.name} has not finished, so there is no training time to match")
    record = read_run(folder, reference.run, plan.baseline.name, entry.seed, outcome)
    return resolve(plan, entry, folder, record.measures["train_seconds"], rate)
