"""One update of a model: gradient, clipping, a decision, and the step. Everything that trains goes through here.

A batch never changes. When some of its rows do not fit into memory, half as many are computed at a time, the batch
starts again, and the run says so. Values stay on the device until `step` reads them, in one host synchronisation: the
loss and the norm decide whether the step is taken.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nanochat_cli.errors import ConfigError
from nanochat_cli.training.distributed.owned import Owned
from nanochat_cli.training.state import TrainState

Metrics = dict[str, Tensor]
Loss = Callable[[slice], tuple[Tensor, Metrics]]
"""What some rows of a batch add to the objective, with a gradient, and to each metric: 0-dim, sums over the batch.

One of the metrics is `loss/objective`.
"""


def update(state: TrainState, rows: int, loss: Loss) -> dict[str, float]:
    """Train on one batch of so many rows; its metrics, see `step`."""
    return step(state, gradient(state, rows, loss))


def gradient(state: TrainState, rows: int, loss: Loss) -> Metrics:
    """The gradient of a batch in the parameters' `.grad`, which start from zero, and its metrics.

    Raises ConfigError when not even a single row fits into memory.
    """
    while True:
        state.optimizers.zero_grad()
        for part in state.parts:
            part.begin(state.progress)
        failed = True
        try:
            if state.owned is None:
                metrics = accumulate(state, slice(0, rows), loss)
            else:
                metrics = accumulate_units(state, state.owned, loss)
            failed = False
            return metrics
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _halve(state, error)
        finally:
            for part in state.parts:
                part.end(failed=failed)


def accumulate_units(state: TrainState, owned: Owned, loss: Loss) -> Metrics:
    """`accumulate` over the units of this rank, and the sums over those of all ranks, which lack memory all alike."""
    counters = [counter for part in state.parts for counter in part.counters()]
    owned.begin(counters)
    failure = None
    try:
        for unit in owned.units:
            owned.collect(unit, accumulate(state, owned.rows_of(unit), loss))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if owned.lockstep:
            raise ConfigError(
                "out of memory, and the ranks of distributed.mode = fsdp cannot start a step again; lower "
                "train.batch_size (and raise train.grad_accum), or set train.gradient_checkpointing = true"
            ) from error
        failure = error
    if owned.group.any(failure is not None):
        raise failure or MemoryError("on another rank")
    return owned.finish(counters)


def accumulate(state: TrainState, rows: slice, loss: Loss) -> Metrics:
    """Forward and backward over rows of the batch, `progress.micro_batch` at a time; the sums of the metrics."""
    sums: Metrics = {}
    size = state.progress.micro_batch
    for start in range(rows.start, rows.stop, size):
        with state.phases("forward"):
            objective, metrics = loss(slice(start, min(start + size, rows.stop)))
        with state.phases("backward"):
            objective.backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
    return sums


def step(state: TrainState, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Clip the gradient, move the weights along it and quantise them; or skip a gradient that is not to be trusted.

    Returns the metrics with those of the parts, `training/grad_norm` before clipping, and `training/lr`, 0 where the
    step was skipped. The caller counts the step. Raises Diverged.
    """
    progress, optimizers, owned = state.progress, state.optimizers, state.owned
    with state.phases("optimizer"):
        norm = (optimizers if owned is None else owned).clip_grad_norm(state.grad_clip)
    measured = {**metrics, "training/grad_norm": norm}
    for part in state.parts:
        measured |= part.metrics(progress)
    values = read(measured)
    reason = state.skip_policy.reason_to_skip(values["loss/objective"], values["training/grad_norm"], state.last_good)
    factor = 0.0
    if reason is None:
        with state.phases("optimizer"):
            factor = optimizers.step(progress.step, progress.known_total, progress.warm_ups)
            if owned is None:
                state.model.requantize()
            else:
                owned.publish()
    else:
        state.reporter.info(f"{state.unit} {progress.step + 1} skipped: {reason}")
    optimizers.zero_grad()
    for part in state.parts:
        part.after_step(progress, values, taken=reason is None)
    state.phases.end_step()
    return {**values, "training/lr": factor * optimizers.config.lr}


def read(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """0-dim tensors of one device as numbers, in one host synchronisation."""
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's out-of-memory error and for the CPU allocator's plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _halve(state: TrainState, error: BaseException) -> None:
    before = state.progress.micro_batch
    if before == 1:
        raise ConfigError(
            f"out of memory with one sequence per micro-batch; lower {state.to_save_memory}, "
            "or set train.gradient_checkpointing = true"
        ) from error
    if state.model.device.type == "cuda":
        torch.cuda.empty_cache()
    state.progress.micro_batch = before // 2
    state.reporter.warn(
        f"out of memory: micro-batch {before} → {state.progress.micro_batch}, the global batch stays the same"
    )
