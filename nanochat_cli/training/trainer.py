"""The training loop: which batch comes next, and when to evaluate, save and stop.

What a step does is `training.update`, what a run consists of is `training.build`. Batch order is a pure function of
(seed, step), and everything else a step depends on is in the checkpoint, so that a resumed run equals the
uninterrupted one bit for bit.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.errors import Interrupted
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.formats.run.metrics import open_metrics
from nanochat_cli.formats.run.same_model import require_same_model
from nanochat_cli.optim.schedules import WarmUps
from nanochat_cli.report.live import LiveView
from nanochat_cli.report.metrics_log import MetricsLog
from nanochat_cli.report.quantities import counted
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.announcement import announcement
from nanochat_cli.training.bits_per_byte import HeldOut
from nanochat_cli.training.build import build_state
from nanochat_cli.training.compilation import Decision, compile_blocks, decide, run_eagerly, why_not_compiled
from nanochat_cli.training.devices import choose_device
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.distributed.save import save_together
from nanochat_cli.training.flops import measured_peak, training_flops_per_token
from nanochat_cli.training.held_out import score, score_text
from nanochat_cli.training.initial_weights import load_initial_weights
from nanochat_cli.training.next_token import train_step
from nanochat_cli.training.number_formats import choose_number_formats, use_number_formats
from nanochat_cli.training.phases import make_phases
from nanochat_cli.training.progress import Progress, TrainResult
from nanochat_cli.training.resume import data_name, require_resumable, restored_progress, shift_of
from nanochat_cli.training.staging import Staging
from nanochat_cli.training.state import TrainState
from nanochat_cli.training.stop_signals import StopSignals
from nanochat_cli.training.time_budget import TimeBudget
from nanochat_cli.training.training_data import TrainingData


class Trainer:
    """Trains in `run_dir`. `fit` runs to the end, or raises Interrupted after saving.

    group: the ranks that train together, in mode `owned` or `fsdp`; each has a trainer, and rank 0 measures, decides
    and writes for all.
    """

    config: Config
    # What changes from step to step, and is saved.
    state: TrainState
    # What is read.
    data: TrainingData
    batches: Staging
    device: torch.device
    group: Group
    # What is written.
    run_dir: Path
    log: MetricsLog
    view: LiveView
    reporter: Reporter
    # How long it takes.
    warm_ups: WarmUps
    """As configured; `progress.warm_ups` are those that fit the run."""
    budget: TimeBudget | None
    flops_per_token: float
    """Where every token takes part in the backward pass."""
    peak_flops: float

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        run_dir: Path,
        reporter: Reporter,
        *,
        resume: bool = False,
        group: Group | None = None,
    ) -> None:
        train = config.train
        self.config, self.data, self.run_dir, self.reporter = config, data, run_dir, reporter
        self.device = choose_device(train.device) if group is None else group.device
        self.group = Group(self.device) if group is None else group
        self.batches = Staging(data, self.device)
        self._save_is_due = False
        torch.manual_seed(config.run.seed)
        self.state = build_state(config, self.device, reporter, data=data, group=group)
        self.state.phases = make_phases(config.telemetry.phases, self.device)
        self.flops_per_token = training_flops_per_token(config)
        self.peak_flops = self._measured_peak()
        self.warm_ups = WarmUps.configured(config.optim, max((p.warmup_steps for p in self.state.parts), default=0))
        budget = train.time_budget
        self.budget = None if budget is None else TimeBudget(budget, config.optim, train.total_steps)
        if resume:
            self._restore()
        else:
            self._begin()
        self._follow_first()
        use_number_formats(self.state, config)
        if self.progress.compiled:
            compile_blocks(self.state.model)
        resumed_step = self.progress.step if resume else None
        self.log = open_metrics(run_dir, config, resumed_step) if self.group.is_first else MetricsLog(None, False)
        self.view = LiveView(
            reporter, self.progress.total_steps, train.log_interval, title=run_dir.name, peak_flops=self.peak_flops
        )
        for line in self._announcement():
            reporter.info(line)

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self.state.progress

    def fit(self) -> TrainResult:
        """Train until `total_steps`, evaluate on the held-out documents, save, and return the figures."""
        try:
            return self._fit()
        finally:
            self.data.close()

    def _fit(self) -> TrainResult:
        state, progress = self.state, self.progress
        state.model.train()
        if progress.step == 0:
            for part in state.parts:
                part.start(progress)
        with StopSignals(self._say_stopping) as stop, self.log, self.view:
            if state.owned is not None:
                state.owned.stop_here = lambda: stop.requested
                state.owned.publish()
            self.view.phase("compiling, first step" if progress.compiled else "first step")
            while progress.step < progress.total_steps:
                self._step()
                self._between_steps()
                stopping = stop.requested if state.owned is None else state.owned.stop
                if stopping and progress.step < progress.total_steps:
                    self.save()
                    raise Interrupted(
                        f"stopped by {stop.name or 'a signal to another rank'} after step {progress.step}, everything "
                        f"saved; continue with: nanochat train --resume {self.run_dir}"
                    )
            held_out = self._finish()
        seconds = max(progress.seconds, 1e-9)
        return TrainResult(
            progress=progress,
            held_out=held_out,
            skipped=state.skip_policy.skipped,
            tokens_per_second=progress.tokens / seconds,
            utilisation=progress.flops / seconds / self.peak_flops,
            peak_flops=self.peak_flops,
            parameters=sum(p.numel() for p in state.model.parameters()),
            optimizer_bytes=int(self.group.add(torch.tensor(state.optimizers.state_bytes(), device=self.device))),
        )

    # -- steps -------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._before_step()
        started = time.perf_counter()
        progress = self.progress
        inputs, targets = self.batches.batch(progress.step)
        waited = time.perf_counter() - started
        metrics = self._update(inputs, targets)
        seconds = time.perf_counter() - started
        owned = self.state.owned
        tokens = inputs.numel() if owned is None else owned.rows * inputs.shape[1]
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        if self.budget is not None and not progress.total_is_final:
            self.budget.fit(progress, self.warm_ups, seconds)
            self._follow_first()
        self._record(metrics, tokens, waited, seconds)

    def _before_step(self) -> None:
        """Metrics from between two steps belong to the next one, so that a resume logs them neither twice nor never."""
        started = time.perf_counter()
        if metrics := self.state.before_step():
            self.progress.seconds += time.perf_counter() - started
            self._log(metrics, self.progress.step + 1)

    def _update(self, inputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Where a block cannot be compiled after all, eagerly from here on."""
        try:
            return train_step(self.state, inputs, targets)
        except RuntimeError as error:
            reason = why_not_compiled(error, self.device) if self.progress.compiled else None
            if reason is None:
                raise
        run_eagerly(self.state.model)
        self.progress.compiled = False
        self.view.event(f"eager from here on, the model cannot be compiled: {reason}")
        return train_step(self.state, inputs, targets)

    def _record(self, metrics: dict[str, float], tokens: int, waited: float, seconds: float) -> None:
        """Show a step, and log it when it is due."""
        progress, skipped, share = self.progress, self.state.skip_policy.skipped, self.state.backward_share
        kept = 1.0 if share is None else share
        per_token = self.flops_per_token if kept == 1 else training_flops_per_token(self.config, kept)
        progress.flops += tokens * per_token
        utilisation = tokens * per_token / seconds / self.peak_flops
        self.view.phase()
        self.view.total_steps = progress.total_steps
        self.view.update(
            progress.step,
            loss=metrics["loss/main"],
            tokens_per_second=tokens / seconds,
            utilisation=utilisation,
            data_wait_ms=waited * 1e3,
            lr=metrics["training/lr"],
            grad_norm=metrics["training/grad_norm"],
            skipped=skipped,
            kept_share=share,
        )
        metrics |= {
            "training/skipped": skipped,
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/utilisation": utilisation,
            "throughput/data_wait_ms": waited * 1e3,
            "throughput/busy_fraction": 1 - waited / seconds,
            "throughput/step_ms": seconds * 1e3,
        }
        observed = self.state.observe()
        if observed or progress.step % self.config.train.log_interval == 0 or progress.step == progress.total_steps:
            self._log(metrics | observed | self.state.phases.read())

    def _log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        progress = self.progress
        where = {"tokens": progress.tokens, "seconds": progress.seconds}
        self.log.log(progress.step if step is None else step, {**where, **metrics})

    # -- between steps -----------------------------------------------------------------------------------------

    def _between_steps(self) -> None:
        """A checkpoint that falls due while steps are skipped waits for the next one that is taken."""
        progress = self.progress
        last = progress.step >= progress.total_steps
        if last or progress.step % self.config.eval.interval == 0:
            self._evaluate()
        self._save_is_due |= progress.step % self.config.checkpoint.interval == 0
        if not last and self._save_is_due and self.state.is_good:
            self.save()

    def _finish(self) -> HeldOut:
        """Score all held-out tokens (or eval.final_max_tokens), which the periodic evaluations sample, and save."""
        held_out = self._score(self.config.eval.final_max_tokens)
        if not math.isfinite(held_out.loss):
            raise self.state.skip_policy.divergence(f"the held-out loss is {held_out.loss}", self.state.last_good)
        if self.progress.final_step != self.progress.step:  # else: a finished run was resumed
            own = {f"final/{name}": value for name, value in held_out.as_dict().items()}
            self._log(own | self._score_text("final", self.config.eval.final_max_tokens))
            self.progress.final_step = self.progress.step
        self.save()
        return held_out

    def _score(self, max_tokens: int | None) -> HeldOut:
        found, dtype = {}, self.state.score.autocast_dtype
        if self.group.is_first or self._lockstep:
            step, provisional = self.progress.step, self.state.provisional
            found = asdict(score(self.state.model, self.data, self.view, step, max_tokens, dtype, provisional))
        return HeldOut(**self.group.share(found))

    def _score_text(self, group: str, max_tokens: int | None) -> dict[str, float]:
        """Metrics of data.base, if there is one."""
        if self.config.data.base is None:
            return {}
        dtype = self.state.score.autocast_dtype
        found = score_text(self.state.model, self.data, self.view, max_tokens, dtype)
        return {f"{group}/base_bits_per_byte": found.bits_per_byte, f"{group}/base_loss": found.loss}

    def _evaluate(self) -> None:
        """A periodic evaluation: the same sample of the held-out tokens every time, so that points compare.

        Those of a provisional model have a name of their own: no curve joins them, and none is the best.
        """
        progress, provisional = self.progress, self.state.provisional is not None
        held_out = self._score(self.config.eval.max_tokens)
        if not any(past["step"] == progress.step for past in progress.evaluations):  # else: resumed after it
            group = "provisional" if provisional else "eval"
            own = {f"{group}/{name}": value for name, value in held_out.as_dict().items()}
            self._log(own | self._score_text(group, self.config.eval.max_tokens))
            where = {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds}
            where |= {"provisional": 1.0} if provisional else {}
            progress.evaluations.append({**held_out.as_dict(), **where})
        best = progress.best_bits_per_byte if progress.best_bits_per_byte is not None else math.inf
        if not provisional and held_out.bits_per_byte < best:  # false for NaN
            progress.best_bits_per_byte, progress.best_step = held_out.bits_per_byte, progress.step
            if self.config.checkpoint.keep_best:
                self.save(best=True)

    def _say_stopping(self, signal_name: str) -> None:
        """Said at once, since the current step or evaluation may take a while."""
        lost = "everything" if self.progress.good_step is None else f"what came after step {self.progress.good_step}"
        self.view.event(
            f"{signal_name}: stopping after what is being done now ({self.view.doing}), then saving; "
            f"Ctrl-C once more ends at once and loses {lost}"
        )

    # -- beginning, saving, resuming ---------------------------------------------------------------------------

    def _begin(self) -> None:
        progress, train = self.progress, self.config.train
        progress.total_is_final = self.budget is None
        progress.warm_ups = self.warm_ups if self.budget else self.warm_ups.within(train.total_steps)
        if train.init is not None:
            load_initial_weights(self.state.model, train.init)
            self.reporter.info(f"the weights are those of {train.init}")
        decision = self._decision()
        progress.compiled = decision.compile
        self.reporter.info(f"{'compiled' if decision.compile else 'eager'}: {decision.reason}")
        if self.group.is_first:
            choose_number_formats(self.state, self.config, self.reporter)

    def _follow_first(self) -> None:
        """Have the progress of rank 0, whose clock and measurements decide."""
        if self.group.size > 1:
            for name, value in self.group.share(asdict(self.progress)).items():
                setattr(self.progress, name, WarmUps(**value) if name == "warm_ups" and value else value)

    def _measured_peak(self) -> float:
        """FLOP/s of all devices."""
        dtype = self.state.score.autocast_dtype or torch.float32
        return self.group.share(measured_peak(self.device, dtype) * self.group.size if self.group.is_first else None)

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of everything that the next step depends on, and drop those no longer kept."""
        state, progress = self.state, self.progress
        self.view.phase("saving")
        if self.group.is_first:
            self.log.sync()
        self._save_is_due = False
        if state.is_good:
            self._name_good(progress.step)
        values = {"data": data_name(self.config.data), "config": self.config.model_dump(mode="json")}
        save_together(
            self.group,
            self.run_dir,
            progress.step,
            state.tensors(),
            state.values() | values,
            model_config=self.config.model.model_dump(mode="json"),
            best=best,
        )
        if self.group.is_first and state.is_good:  # else what it is saved beside may be all that is good
            best_step = progress.best_step if self.config.checkpoint.keep_best else None
            checkpoints.prune(self.run_dir, self.config.checkpoint.keep_last, best_step)
        self.view.phase()

    def _restore(self) -> None:
        config, state = self.config, self.state
        checkpoint = checkpoints.load(self.run_dir, device=self.device)
        require_same_model(checkpoint, config.model.model_dump(mode="json"), state.model.state_dict())
        changed = require_resumable(checkpoint, self.run_dir, config)
        state.restore(checkpoint.tensors, checkpoint.state)
        saved = checkpoint.state["progress"]
        progress = state.progress = restored_progress(saved, config, changed, self.warm_ups)
        if "flops" not in saved:
            progress.flops = progress.tokens * self.flops_per_token
        if "train.compile" in changed or self._lockstep:
            progress.compiled = self._decision().compile
        formats = {"train.attention", "train.forward", "train.backward", "train.grad_input", "optim.muon_format"}
        if self.group.is_first and formats & set(changed):
            choose_number_formats(state, config, self.reporter)
        self._name_good(progress.step if state.is_good else progress.good_step)
        if shift := shift_of(progress, config):
            self.data.shift(shift)
        if "train.seq_len" in changed:
            self.reporter.warn(
                f"train.seq_len = {config.train.seq_len}, not {changed['train.seq_len']}: the text is cut into "
                "other windows; of this epoch some is read twice and some not at all"
            )
        self.reporter.info(f"resumed at step {progress.step} of {progress.total_steps}")

    def _name_good(self, step: int | None) -> None:
        """The last checkpoint that was saved while no steps were being skipped."""
        self.progress.good_step = step
        self.state.last_good = None if step is None else f"step {step}"

    @property
    def _lockstep(self) -> bool:
        return self.state.owned is not None and self.state.owned.lockstep

    def _decision(self) -> Decision:
        if self._lockstep:
            return Decision(False, "distributed.mode = fsdp")
        return decide(self.config.train.compile, self.device, self._expected_seconds())

    def _expected_seconds(self) -> float:
        """From the configuration alone (no clock): a resumed run must come to the same decision."""
        train = self.config.train
        tokens = train.total_steps * train.batch_size * train.grad_accum * train.seq_len
        nominal = 5e10 if self.device.type == "cpu" else 2e14
        expected = tokens * self.flops_per_token / nominal
        return min(expected, train.time_budget or expected)

    def _announcement(self) -> list[str]:
        name = f"{self.device}, {'fp32' if self.state.score.autocast_dtype is None else 'bf16'}"
        if self.device.type == "cpu":
            name = f"{name}, {counted(torch.get_num_threads(), 'thread')}"
        if self.group.size > 1:
            name = f"{self.group.size} × {name}"
        return announcement(
            self.config, self.progress, name, flops_per_token=self.flops_per_token, peak_flops=self.peak_flops
        )
