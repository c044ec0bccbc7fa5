"""A plan as tables: parameters, memory, and the run, with the device and number format behind its time."""

from collections.abc import Sequence
from dataclasses import asdict

import torch

from nanochat_cli.config.schema import Config
from nanochat_cli.config.size import format_parameters
from nanochat_cli.diagnose.plan.plan import Plan, make_plan
from nanochat_cli.diagnose.plan.ranks import Exchange, Link, OwnedPlan
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.gguf.architecture import destination_of
from nanochat_cli.report.environment import cpu_model
from nanochat_cli.report.quantities import counted, format_quantity, format_span
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.devices import choose_autocast, choose_device
from nanochat_cli.training.distributed.ranks import is_cut
from nanochat_cli.training.flops import measured_peak


def show_plan(
    config: Config,
    reporter: Reporter,
    *,
    tokens: int | None,
    utilisation: float,
    peak_flops: float | None,
    ranks: int | None = None,
    per_machine: int = 1,
) -> None:
    """Print the plan of a configuration. peak_flops: by default that of train.device, measured, if it is here.

    ranks: that train together in distributed.mode, `per_machine` of them on a machine; None: one process, as ever.
    """
    peak, of_what = (peak_flops, "--peak-flops") if peak_flops is not None else _peak(config)
    owned = None if ranks is None else plan_of(config, ranks)
    all_flops = peak if peak is None or owned is None else peak * owned.speed_up
    plan = make_plan(config, tokens=tokens, utilisation=utilisation, peak_flops=all_flops)
    destination = destination_of(config.model)
    counts = plan.parameters
    parts = {**asdict(counts), "multi-token prediction (not in the file)": plan.mtp_parameters}
    del parts["inactive"]
    rows = [(name.replace("_", " "), f"{count:,}") for name, count in parts.items() if count]
    rows += [
        ("total of the model", format_parameters(counts.total)),
        ("a token uses", format_parameters(counts.active)),
    ]
    reporter.table("parameters", ("part", "number"), rows)
    memory, where = plan.memory.as_dict(), ""
    if owned is not None:
        memory, where = owned.memory(plan.memory).as_dict(), f" on the fullest of {counted(owned.ranks, 'rank')}"
    sizes = [(name.replace("_", " "), format_quantity(size, "B")) for name, size in memory.items() if size]
    reporter.table(f"memory of a training step{where}, eager, float32 activations", ("part", "size"), sizes)
    basis = of_what if peak is None else f"{utilisation:.0%} of {peak:.3g} FLOP/s ({of_what})"
    reporter.table(
        "run",
        ("measure", "value"),
        [
            ("GGUF architecture", destination.arch or "none"),
            ("runs in llama.cpp", destination.answer),
            ("GGUF file (TQ2_0)", format_quantity(plan.gguf_bytes, "B")),
            ("FLOPs per token, forward and backward", f"{plan.flops_per_token:.3g}"),
            *([("layers", config.model.quant.in_words())] if config.model.quant.begins_in_float else []),
            ("ends by", _end(plan, config)),
            ("training tokens", "not known" if plan.tokens is None else f"{plan.tokens:,}"),
            ("training time", "not known" if plan.seconds is None else format_span(plan.seconds)),
            ("based on", basis if owned is None else f"{basis} on each rank, without the exchange"),
        ],
    )
    if owned is not None:
        computing = None if all_flops is None else plan.flops_per_token * plan.tokens_per_step / utilisation / all_flops
        _show_exchange(reporter, owned.links(per_machine), computing)
    reporter.result(
        {
            "parameters": {**parts, "total": counts.total, "active": counts.active},
            "memory": memory,
            "flops_per_token": plan.flops_per_token,
            "gguf_bytes": plan.gguf_bytes,
            "arch": destination.arch,
            "llama_cpp": destination.runs_in_llama_cpp,
            "tokens": plan.tokens,
            "seconds": plan.seconds,
            "bound": plan.bound,
            "peak_flops": peak,
            "peak_of": of_what,
        }
    )


def plan_of(config: Config, ranks: int) -> OwnedPlan:
    """That of distributed.mode."""
    if not is_cut(config, ranks):
        return OwnedPlan(config, ranks)
    from nanochat_cli.diagnose.plan.sharded_ranks import ShardedPlan  # FSDP2 takes a while to import

    return ShardedPlan(config, ranks)


def _show_exchange(reporter: Reporter, links: Sequence[Link], computing: float | None) -> None:
    """computing: seconds of a step without the exchange, if they are known."""
    rows = [
        (
            f"{link.name}, of a {link.of}",
            format_quantity(link.rate, "B") + "/s",
            *(format_quantity(size, "B") for size in asdict(link.exchange).values()),
            format_span(link.seconds),
        )
        for link in links
    ]
    columns = ("link", "rate", *(name.replace("_", " ") for name in Exchange.__dataclass_fields__), "time")
    span = "" if computing is None else f"; computing takes {format_span(computing)}"
    reporter.table(f"exchange of a step over the busiest link{span}", columns, rows)
    reporter.result({"step_seconds": computing, "links": [link.as_dict() for link in links]})


def _peak(config: Config) -> tuple[float | None, str]:
    """FLOP/s of the training device, if it is here, and its name with the number format."""
    train = config.train
    try:
        device = choose_device(train.device)
    except ConfigError:
        return None, f"nothing: this machine has no train.device = {train.device}; give its --peak-flops"
    dtype = choose_autocast(train.dtype, device) or torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model() or "the CPU of this machine"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    format_name = "bf16" if dtype == torch.bfloat16 else "fp32"
    return measured_peak(device, dtype), f"{name}{threads}, {format_name}, measured"


def _end(plan: Plan, config: Config) -> str:
    if plan.bound == "--tokens":
        return "--tokens"
    if plan.bound == "train.total_steps":
        return f"train.total_steps = {config.train.total_steps:,}"
    fitting = "" if plan.steps is None else f", about {plan.steps:,} of at most {config.train.total_steps:,} steps"
    return f"train.time_budget = {config.train.time_budget:g} s{fitting}"
