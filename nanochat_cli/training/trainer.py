"""The training loop: batches in, checkpoints and metrics out.

Knows the order of things in a step: batch, gradient, clip, skip or update, quantise once, measure. Leaves to
others how each is done. Batch order is a pure function of (seed, step), and everything else a step depends on is in
the checkpoint, so that a resumed run equals the uninterrupted one bit for bit.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config, DataConfig
from nanochat_cli.errors import Interrupted
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.mtp import build_mtp
from nanochat_cli.model.transformer import Transformer, use_forms
from nanochat_cli.optim import build_optimizer
from nanochat_cli.optim.schedules import WarmUps
from nanochat_cli.report.live import LiveView
from nanochat_cli.report.metrics_log import MetricsLog
from nanochat_cli.report.quantities import counted
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.announcement import announcement
from nanochat_cli.training.bigram_init import fit_bigrams
from nanochat_cli.training.bits_per_byte import HeldOut
from nanochat_cli.training.collider import KeptShare, TokenFilter
from nanochat_cli.training.compilation import compile_blocks, decide, run_eagerly, why_not_compiled
from nanochat_cli.training.devices import choose_autocast, choose_device, require_float8
from nanochat_cli.training.expert_load import forget_load, measure_load
from nanochat_cli.training.fire import Fire
from nanochat_cli.training.flops import measured_peak, training_flops_per_token
from nanochat_cli.training.gradient_step import BatchLoss, GradientStep
from nanochat_cli.training.held_out import score
from nanochat_cli.training.phases import make_phases
from nanochat_cli.training.progress import Progress, TrainResult
from nanochat_cli.training.reference_model import reference_model
from nanochat_cli.training.resume import require_resumable, restored_progress, shift_of
from nanochat_cli.training.run_state import restore_tensors, tensors_of
from nanochat_cli.training.skip_policy import SkipPolicy
from nanochat_cli.training.staging import Staging
from nanochat_cli.training.stop_signals import StopSignals
from nanochat_cli.training.telemetry import TernaryTelemetry
from nanochat_cli.training.time_budget import TimeBudget
from nanochat_cli.training.training_data import TrainingData

STREAMS_INTERVAL = 100
"""Steps between measurements of residual streams, where there are several."""


class Trainer:
    """Trains `model` in `run_dir`. `fit` runs to the end, or raises Interrupted after saving."""

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        run_dir: Path,
        reporter: Reporter,
        *,
        resume: bool = False,
    ) -> None:
        self.config, self.data, self.run_dir, self.reporter = config, data, run_dir, reporter
        self.device = choose_device(config.train.device)
        self.batches = Staging(data, self.device)
        self.autocast_dtype = choose_autocast(config.train.dtype, self.device)
        torch.manual_seed(config.run.seed)
        self.model = Transformer(config.model).to(self.device)
        self.model.gradient_checkpointing = config.train.gradient_checkpointing
        self.mtp = build_mtp(config.model, config.mtp)
        form = None if config.train.forward == "auto" else config.train.forward
        self.model.use_forms(form)
        if self.mtp is not None:
            self.mtp.to(self.device)
            use_forms(self.mtp.linears(), form)
        require_float8(config.train.grad_input, self.device)
        for _, layer in self.model.ternary_layers():
            layer.grad_input = config.train.grad_input
        self.optimizers = build_optimizer(self.model, config.optim, self.mtp)
        self.fire = Fire(config.fire, self.model, self.mtp, self.optimizers) if config.fire.enabled else None
        self.skip_policy = SkipPolicy(config.train.spike_factor, config.train.max_skipped_steps)
        self.kept_share = KeptShare(config.collider)
        self.telemetry = TernaryTelemetry()
        self._save_is_due = False
        self.global_batch = config.train.batch_size * config.train.grad_accum
        self.flops_per_token = training_flops_per_token(config)
        self.peak_flops = measured_peak(self.device, self.autocast_dtype or torch.float32)
        budget = config.train.time_budget
        self.budget = None if budget is None else TimeBudget(budget, config.optim, config.train.total_steps)
        self.progress = Progress(config.train.total_steps, total_is_final=self.budget is None)
        self._asked_warm_ups = asked = WarmUps.configured(config.optim, config.collider.warmup_steps)
        self.progress.warm_ups = asked if self.budget else asked.within(config.train.total_steps)
        if resume:
            self._restore()
        else:
            decision = decide(config.train.compile, self.device, self._expected_seconds())
            self.progress.compiled = decision.compile
            self.progress.micro_batch = config.train.batch_size
            reporter.info(f"{'compiled' if decision.compile else 'eager'}: {decision.reason}")
        self.gradient_step = GradientStep(
            self.model,
            config.train,
            self.autocast_dtype,
            reporter.warn,
            self.mtp,
            self._token_filter(),
            reference_model(config.collider, config.model.vocab_size, self.device),
        )
        self.gradient_step.micro_batch = self.progress.micro_batch
        self.phases = self.gradient_step.phases = make_phases(config.telemetry.phases, self.device)
        if self.progress.compiled:
            compile_blocks(self.model)
        self.log = MetricsLog(run_dir, config.telemetry.tensorboard, self.progress.step if resume else None)
        self.view = LiveView(
            reporter,
            self.progress.total_steps,
            config.train.log_interval,
            title=run_dir.name,
            peak_flops=self.peak_flops,
        )
        for line in self._announcement():
            reporter.info(line)

    def _announcement(self) -> list[str]:
        name = f"{self.device}, {'fp32' if self.autocast_dtype is None else 'bf16'}"
        if self.device.type == "cpu":
            name = f"{name}, {counted(torch.get_num_threads(), 'thread')}"
        return announcement(
            self.config, self.progress, name, flops_per_token=self.flops_per_token, peak_flops=self.peak_flops
        )

    def _token_filter(self) -> TokenFilter | None:
        """Of Collider; a compiled forward pass cannot gather a number of rows that only the run knows."""
        if not self.config.collider.enabled:
            return None
        modules = [self.model] if self.mtp is None else [self.model, self.mtp]
        linears = [layer for module in modules for _, layer in module.linears()]
        return TokenFilter(self.config.collider, linears, gather=not self.progress.compiled)

    def fit(self) -> TrainResult:
        """Train until `total_steps`, evaluate on the held-out documents, save, and return the figures."""
        try:
            return self._fit()
        finally:
            self.data.close()

    def _fit(self) -> TrainResult:
        self.model.train()
        if self.progress.step == 0 and self.config.bigram_init.steps:
            self._start_from_bigrams()
        with StopSignals(self._say_stopping) as stop, self.log, self.view:
            self.view.phase("compiling, first step" if self.progress.compiled else "first step")
            while self.progress.step < self.progress.total_steps:
                if self.fire is not None:
                    self._reinitialize(self.fire)
                self._step()
                self._between_steps()
                if stop.requested and self.progress.step < self.progress.total_steps:
                    self.save()
                    raise Interrupted(
                        f"stopped by {stop.name} after step {self.progress.step}, everything saved; "
                        f"continue with: nanochat train --resume {self.run_dir}"
                    )
            held_out = self._finish()
        tokens_per_second = self.progress.tokens / max(self.progress.seconds, 1e-9)
        return TrainResult(
            progress=self.progress,
            held_out=held_out,
            skipped=self.skip_policy.skipped,
            tokens_per_second=tokens_per_second,
            utilisation=self.progress.flops / max(self.progress.seconds, 1e-9) / self.peak_flops,
            peak_flops=self.peak_flops,
            parameters=sum(p.numel() for p in self.model.parameters()),
            optimizer_bytes=self.optimizers.state_bytes(),
        )

    def _say_stopping(self, signal_name: str) -> None:
        """At once, as the step or the evaluation that goes on may take a while."""
        lost = "everything" if self.progress.good_step is None else f"what came after step {self.progress.good_step}"
        self.view.event(
            f"{signal_name}: stopping after what is being done now ({self.view.doing}), then saving; "
            f"Ctrl-C once more ends at once and loses {lost}"
        )

    def _start_from_bigrams(self) -> None:
        """Counts as training time."""
        started = time.perf_counter()
        losses = []
        with self.reporter.progress("bigram start", self.config.bigram_init.steps, "steps") as shown:
            for loss in fit_bigrams(self.model, self.data.bigrams(), self.config.bigram_init):
                losses.append(loss)
                shown.advance(1)
        self.progress.seconds += time.perf_counter() - started
        self.reporter.info(
            f"bigram start: {losses[0]:.3f} → {losses[-1]:.3f} nats per token in {self.progress.seconds:.1f} s"
        )

    def _step(self) -> None:
        started = time.perf_counter()
        progress, optim = self.progress, self.config.optim
        inputs, targets = self.batches.batch(progress.step)
        waited = time.perf_counter() - started
        self.gradient_step.progress = progress.step / progress.total_steps
        self.gradient_step.filtering = progress.step >= (progress.warm_ups or self._asked_warm_ups).filtering
        scores = self.data.scores(progress.step) if self.config.collider.scores is not None else None
        scores = None if scores is None else scores.to(self.device)
        loss = self._gradient(inputs, targets, scores)
        progress.micro_batch = self.gradient_step.micro_batch
        with self.phases("optimizer"):
            norm = self.optimizers.clip_grad_norm(self.config.train.grad_clip)
        loss_value, objective, norm_value, *auxiliary = read_scalars(loss, norm)
        reason = self.skip_policy.reason_to_skip(objective, norm_value, self._last_good())
        if reason is None:
            with self.phases("optimizer"):
                multiplier = self._update()
        else:
            multiplier = 0.0
            self.view.event(f"step {progress.step + 1} skipped: {reason}")
        self.optimizers.zero_grad()
        self.phases.end_step()
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.tokens += inputs.numel()
        progress.seconds += seconds
        if self.budget is not None and not progress.total_is_final:
            self.budget.fit(progress, self._asked_warm_ups, seconds)
        names = [f"loss/mtp_{i + 1}" for i in range(len(loss.ahead))]
        names += ["collider/kept_fraction", "collider/kept_loss"][: len(loss.filtering)]
        extra = dict(zip(names, auxiliary, strict=True)) | self._expert_load()
        self._record(loss_value, objective, norm_value, multiplier * optim.lr, inputs.numel(), waited, seconds, extra)

    def _gradient(self, inputs: Tensor, targets: Tensor, scores: Tensor | None) -> BatchLoss:
        """Of the global batch; where a block cannot be compiled after all, eagerly from here on."""
        try:
            return self.gradient_step(inputs, targets, self.optimizers.zero_grad, scores)
        except RuntimeError as error:
            reason = why_not_compiled(error, self.device) if self.progress.compiled else None
            if reason is None:
                raise
        run_eagerly(self.model)
        self.progress.compiled = False
        if self.gradient_step.collider is not None:
            self.gradient_step.collider.gather = True
        self.view.event(f"eager from here on, the model cannot be compiled: {reason}")
        return self.gradient_step(inputs, targets, self.optimizers.zero_grad, scores)

    def _update(self) -> float:
        """Apply the gradients and quantise what they changed; returns the schedule's factor on the learning rate."""
        progress = self.progress
        multiplier = self.optimizers.step(progress.step, progress.known_total, progress.warm_ups)
        self.model.requantize()
        if self.mtp is not None:
            self.mtp.requantize()
        for _, moe in self.model.mixtures():
            moe.update_balance()
        return multiplier

    def _reinitialize(self, fire: Fire) -> None:
        """Before a step: its metrics belong to that step, so that a resume logs them neither twice nor never."""
        started = time.perf_counter()
        metrics, line = fire.before_step(self.progress.step, self.data.batch, self.progress.total_steps)
        if line is not None:
            self.view.event(f"after step {self.progress.step}: {line}")
        if metrics:
            self.progress.seconds += time.perf_counter() - started
            where = {"tokens": self.progress.tokens, "seconds": self.progress.seconds}
            self.log.log(self.progress.step + 1, where | metrics)

    def _expert_load(self) -> dict[str, float]:
        """Of the steps since it was logged last; nothing without a mixture."""
        mixtures = [moe for _, moe in self.model.mixtures()]
        logged = bool(mixtures) and self.progress.step % self.config.train.log_interval == 0
        metrics = measure_load(mixtures) if logged else {}
        if logged or self.config.model.moe.balance == "bias":  # the bias follows the load of one step
            forget_load(mixtures)
        return metrics

    def _record(
        self,
        loss: float,
        objective: float,
        norm: float,
        lr: float,
        tokens: int,
        waited: float,
        seconds: float,
        extra: Mapping[str, float],
    ) -> None:
        progress = self.progress
        rate = tokens / seconds
        kept = extra.get("collider/kept_fraction", 1.0)
        flops = tokens * (self.flops_per_token if kept == 1 else training_flops_per_token(self.config, kept))
        progress.flops += flops
        utilisation = flops / seconds / self.peak_flops
        self.view.phase()
        self.view.total_steps = progress.total_steps
        self.view.update(
            progress.step,
            loss=loss,
            tokens_per_second=rate,
            utilisation=utilisation,
            data_wait_ms=waited * 1e3,
            lr=lr,
            grad_norm=norm,
            skipped=self.skip_policy.skipped,
            kept_share=extra.get("collider/kept_fraction"),
        )
        if (notice := self.kept_share.notice(extra.get("collider/kept_fraction"))) is not None:
            self.reporter.warn(notice)
        metrics = {
            "loss/main": loss,
            "loss/objective": objective,
            "training/lr": lr,
            "training/grad_norm": norm,
            "training/skipped": self.skip_policy.skipped,
            "throughput/tokens_per_second": rate,
            "throughput/utilisation": utilisation,
            "throughput/data_wait_ms": waited * 1e3,
            "throughput/busy_fraction": 1 - waited / seconds,
            "throughput/step_ms": seconds * 1e3,
            **extra,
        }
        measured = progress.step % self.config.telemetry.interval == 0 and self.config.model.quant.enabled
        if measured:
            metrics |= self._ternary_statistics()
        if self.config.model.mhc.streams > 1 and progress.step % STREAMS_INTERVAL == 0:
            metrics |= self._stream_statistics()
            measured = True
        if measured or progress.step % self.config.train.log_interval == 0 or progress.step == progress.total_steps:
            self._log(metrics | self.phases.read())

    def _log(self, metrics: Mapping[str, float]) -> None:
        progress = self.progress
        self.log.log(progress.step, {"tokens": progress.tokens, "seconds": progress.seconds, **metrics})

    def _ternary_statistics(self) -> dict[str, float]:
        layers = []
        for name, layer in self.model.ternary_layers():
            ternary = layer.ternary()
            layers.append((name, ternary.codes, layer.weight.detach(), ternary.scales))
        overall, _ = self.telemetry.measure(layers)
        return overall.scalars()

    def _stream_statistics(self) -> dict[str, float]:
        """Of the hyper-connections, on one sequence of the step that comes next; changes nothing of it."""
        from nanochat_cli.training.health.streams import measure_streams

        inputs, targets = (t[:1].to(self.device) for t in self.data.batch(self.progress.step))
        return measure_streams(self.model, inputs, targets).scalars()

    def _between_steps(self) -> None:
        """A checkpoint that falls due while steps are skipped waits for the next one that is taken."""
        progress = self.progress
        last = progress.step >= progress.total_steps
        if last or progress.step % self.config.eval.interval == 0:
            self._evaluate()
        self._save_is_due |= progress.step % self.config.checkpoint.interval == 0
        if not last and self._save_is_due and not self.skip_policy.consecutive:
            self.save()

    def _last_good(self) -> str | None:
        return None if self.progress.good_step is None else f"step {self.progress.good_step}"

    def _finish(self) -> HeldOut:
        """Score all held-out tokens (or eval.final_max_tokens), which the periodic evaluations sample, and save."""
        held_out = self._score(self.config.eval.final_max_tokens)
        if not math.isfinite(held_out.loss):
            raise self.skip_policy.divergence(f"the held-out loss is {held_out.loss}", self._last_good())
        if self.progress.final_step != self.progress.step:  # else: a finished run was resumed
            self._log({f"final/{name}": value for name, value in held_out.as_dict().items()})
            self.progress.final_step = self.progress.step
        self.save()
        return held_out

    def _score(self, max_tokens: int | None) -> HeldOut:
        return score(self.model, self.data, self.view, self.progress.step, max_tokens, self.autocast_dtype)

    def _evaluate(self) -> None:
        """A periodic evaluation: the same sample of the held-out tokens every time, so that points compare."""
        progress = self.progress
        held_out = self._score(self.config.eval.max_tokens)
        if not any(past["step"] == progress.step for past in progress.evaluations):  # else: resumed after it
            self._log({f"eval/{name}": value for name, value in held_out.as_dict().items()})
            where = {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds}
            progress.evaluations.append({**held_out.as_dict(), **where})
        best = progress.best_bits_per_byte if progress.best_bits_per_byte is not None else math.inf
        if held_out.bits_per_byte < best:  # false for NaN
            progress.best_bits_per_byte, progress.best_step = held_out.bits_per_byte, progress.step
            if self.config.checkpoint.keep_best:
                self.save(best=True)

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of everything that the next step depends on, and drop those no longer kept."""
        self.view.phase("saving")
        self.log.sync()
        self._save_is_due = False
        good = self.skip_policy.consecutive == 0
        if good:
            self.progress.good_step = self.progress.step
        state = {
            "progress": asdict(self.progress),
            "skip_policy": self.skip_policy.state_dict(),
            "data": data_name(self.config.data),
            "config": self.config.model_dump(mode="json"),
        }
        if self.fire is not None:
            state["fire"] = self.fire.state_dict()
        checkpoints.save(
            self.run_dir,
            self.progress.step,
            tensors_of(self.model, self.mtp, self.optimizers, self.telemetry),
            state,
            model_config=self.config.model.model_dump(mode="json"),
            best=best,
        )
        self.view.phase()
        best_step = self.progress.best_step if self.config.checkpoint.keep_best else None
        if good:  # else what it is saved beside may be all that is good
            checkpoints.prune(self.run_dir, self.config.checkpoint.keep_last, best_step)

    def _restore(self) -> None:
        checkpoint = checkpoints.load(self.run_dir, device=self.device)
        checkpoints.require_same_model(checkpoint, self.config.model.model_dump(mode="json"), self.model.state_dict())
        changed = require_resumable(checkpoint, self.run_dir, self.config)
        restore_tensors(checkpoint.tensors, self.model, self.mtp, self.optimizers, self.telemetry, self.device)
        self.skip_policy.load_state_dict(checkpoint.state["skip_policy"])
        self.progress = restored_progress(checkpoint.state["progress"], self.config, changed, self._asked_warm_ups)
        if "flops" not in checkpoint.state["progress"]:
            self.progress.flops = self.progress.tokens * self.flops_per_token
        if "train.compile" in changed:
            self.progress.compiled = decide(self.config.train.compile, self.device, self._expected_seconds()).compile
        if not self.skip_policy.consecutive:
            self.progress.good_step = self.progress.step
        if shift := shift_of(self.progress, self.config):
            self.data.shift(shift)
        if "train.seq_len" in changed:
            self.reporter.warn(
                f"train.seq_len = {self.config.train.seq_len}, not {changed['train.seq_len']}: the text is cut into "
                "other windows; of this epoch some is read twice and some not at all"
            )
        if self.fire is not None:
            saved, here = checkpoint.state, data_name(self.config.data)
            self.fire.load_state_dict(saved.get("fire"), data_changed=saved.get("data", here) != here)
        self.reporter.info(f"resumed at step {self.progress.step} of {self.progress.total_steps}")

    def _expected_seconds(self) -> float:
        """From the configuration alone (no clock): a resumed run must come to the same decision."""
        tokens = self.config.train.total_steps * self.global_batch * self.config.train.seq_len
        nominal = 5e10 if self.device.type == "cpu" else 2e14
        expected = tokens * self.flops_per_token / nominal
        return min(expected, self.config.train.time_budget or expected)


def read_scalars(loss: BatchLoss, norm: Tensor) -> list[float]:
    """Cross-entropy, objective, gradient norm, then those of tokens ahead and of filtering: a step's one host sync."""
    headline = torch.stack((loss.cross_entropy, loss.objective, norm.float()))
    return torch.cat((headline, loss.ahead, loss.filtering)).tolist()


def data_name(data: DataConfig) -> str:
    """What a run is trained on, to notice that it goes on with something else."""
    return data.source if data.path is None else str(data.path.resolve())
