"""`nanochat bench optim`: optimizers with reduced state against those with full state.

Three measurements. State bytes are counted from the actual tensors, for every preset on the meta device. Step times are
of the whole optimizer on random gradients, the contenders taking turns in one thread of one process. Held-out loss is
that of small byte-level models after the same steps on the same batches of the standard library's sources, each
contender at its own best rate for the matrices: all try the same factors on their default rates, on a seed that is not
compared.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cli.config import presets
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config, ModelConfig, OptimConfig, TrainConfig
from nanochat_cli.data.corpus import Document, open_corpus
from nanochat_cli.errors import Diverged
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import Optimizers, build_optimizer
from nanochat_cli.report.reporter import Progress, QuietReporter, Reporter
from nanochat_cli.report.result_file import Claim, Result, summarise
from nanochat_cli.training.build import build_state
from nanochat_cli.training.next_token import train_step

GALORE = {"enabled": True}
CONTENDERS: dict[str, dict[str, object]] = {
    "adamw-fp32": {"matrix": "adamw", "lr": 0.003},
    "muon-fp32": {},
    "muon-8bit": {"eight_bit": True},
    "galore": {"galore": GALORE},
    "hybrid": {"galore": GALORE, "eight_bit": True},
    "gum": {"galore": GALORE | {"unbiased": True}},
}
SMALLEST = {"galore": GALORE, "eight_bit": True, "other": "lion", "state_block": 2048}
"""For bytes only: the smallest state that the configuration allows."""
MUON_AND_LION = {"eight_bit": True, "other": "lion"}
"""For bytes only: as published."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""On the learning rate of the matrices, to tune a contender."""
TUNING_SEED = 1000
TIME_LIMIT = 1.1
BYTES = 256


@dataclass(frozen=True)
class Size:
    """A model and its training. rank and update_freq: GaLore's, in proportion to the model and the steps."""

    dim: int
    n_layers: int
    rank: int
    vocab_size: int = BYTES
    steps: int = 0
    update_freq: int = 20
    seq_len: int = 64
    batch_size: int = 8

    def __str__(self) -> str:
        return f"{self.dim} × {self.n_layers}"

    def model(self) -> Transformer:
        shape = ModelConfig(
            vocab_size=self.vocab_size,
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=4,
            n_kv_heads=2,
            ffn_dim=4 * self.dim,
            max_seq_len=self.seq_len,
            qk_norm=True,
            tie_embeddings=False,
            head_std=0.001,
        )
        return Transformer(shape)

    def optim(self, options: Mapping[str, object]) -> OptimConfig:
        galore = options.get("galore")
        if isinstance(galore, dict):
            options = {**options, "galore": galore | {"rank": self.rank, "update_freq": self.update_freq}}
        return OptimConfig.model_validate({"warmup_steps": 5, **options})


TRAINED = (Size(128, 2, 32, steps=120), Size(256, 2, 64, steps=60))
TIMED = tuple(Size(dim, 2, dim // 4, vocab_size=4096, update_freq=200) for dim in (256, 512, 1024))


def measure_optim(reporter: Reporter, *, quick: bool) -> tuple[list[Result], list[Claim]]:
    """Bytes of every preset, step times and held-out losses at two sizes; quick: few presets, one size each."""
    names = ["d20", "e3/baseline"] if quick else [p.name for p in presets.available() if not p.is_overlay]
    results = [result for name in names for result in state_bytes(name)]
    for size in TIMED[:1] if quick else TIMED:
        results += step_times(size, 3 if quick else 7, reporter)
    for size in TRAINED[:1] if quick else TRAINED:
        results += held_out_losses(size, 20 if quick else size.steps, [0] if quick else [0, 1, 2], reporter)
    return results, claims(results)


def state_bytes(preset: str) -> list[Result]:
    """State of every contender for a preset's shapes, whole and of the matrices; ratios are AdamW's bytes / ours."""
    model_config = resolve_config([preset]).model
    with torch.device("meta"):
        model = Transformer(model_config)
    whole, matrices = {}, {}
    for name, options in {**CONTENDERS, "muon-8bit, lion": MUON_AND_LION, "hybrid, lion, block 2048": SMALLEST}.items():
        optimizers = build_optimizer(model, OptimConfig.model_validate(options))
        whole[name] = float(optimizers.state_bytes())
        matrices[name] = float(optimizers.groups[0].state_bytes())
    peer = "adamw-fp32"
    return [
        Result(f"{preset} / {name}", metric, value, "B", peer, held[peer] / value)
        for metric, held in (("state bytes", whole), (MATRIX_BYTES, matrices))
        for name, value in held.items()
    ]


def step_times(size: Size, rounds: int, reporter: Reporter) -> list[Result]:
    """Milliseconds of a step without a new subspace, whole and of the matrices; ratios are fp32 Muon's time / ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread is least disturbed by other load on the machine
    optimizers = {name: _ready(size, options) for name, options in CONTENDERS.items()}
    whole: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    matrices: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with reporter.progress(f"step times, {size}", rounds * len(CONTENDERS), "steps") as progress:
        for _ in range(rounds):
            for name, optimizer in optimizers.items():
                started = time.perf_counter()
                optimizer.groups[0].optimizer.step(1e-4)
                of_matrices = time.perf_counter()
                for group in optimizer.groups[1:]:
                    group.optimizer.step(1e-4)
                whole[name].append(1e3 * (time.perf_counter() - started))
                matrices[name].append(1e3 * (of_matrices - started))
                progress.advance()
    torch.set_num_threads(threads)
    results = []
    for metric, times in (("step", whole), ("step of the matrices", matrices)):
        for name, runs in times.items():
            peer_runs = times["muon-fp32"] if name != "muon-fp32" else None
            peer = None if peer_runs is None else "muon-fp32"
            case = f"{size} / {name}"
            results.append(summarise(case, metric, "ms", runs, peer=peer, peer_runs=peer_runs, smaller_is_better=True))
    return results


def _ready(size: Size, options: Mapping[str, object]) -> Optimizers:
    """An optimizer with random gradients, after its first step; the group of the matrices comes first."""
    torch.manual_seed(0)
    model = size.model()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers = build_optimizer(model, size.optim(options))
    optimizers.step(0, 1000)
    return optimizers


def held_out_losses(size: Size, steps: int, seeds: Sequence[int], reporter: Reporter) -> list[Result]:
    """Nats per byte after the same batches, and the rates; ratios are fp32 Muon's loss / ours, paired by seed."""
    streams = byte_stream(2_000_000)
    losses: dict[str, list[float]] = {}
    runs = (len(FACTORS) + len(seeds)) * len(CONTENDERS)
    results = []
    with reporter.progress(f"held-out loss, {size}", runs * steps, "steps") as progress:
        for name, options in CONTENDERS.items():
            own = size.optim(options).lr
            tried = {
                factor * own: held_out_loss(size, steps, TUNING_SEED, options | {"lr": factor * own}, streams, progress)
                for factor in FACTORS
            }
            best = min(tried, key=tried.__getitem__)
            metric = f"learning rate of the matrices, tuned over {steps} steps"
            results.append(Result(f"{size} / {name}", metric, best, "", spread=(min(tried), max(tried))))
            losses[name] = [
                held_out_loss(size, steps, seed, options | {"lr": best}, streams, progress) for seed in seeds
            ]
    for name, values in losses.items():
        peer_runs = losses["muon-fp32"] if name != "muon-fp32" else None
        peer = None if peer_runs is None else "muon-fp32"
        case, metric = f"{size} / {name}", f"held-out loss after {steps} steps"
        results.append(summarise(case, metric, "nats", values, peer=peer, peer_runs=peer_runs, smaller_is_better=True))
    return results


def held_out_loss(
    size: Size,
    steps: int,
    seed: int,
    options: Mapping[str, object],
    streams: tuple[Tensor, Tensor],
    progress: Progress,
) -> float:
    """Nats per byte after training with `options`; `seed` sets batches and weights. inf for a run that diverged."""
    train, held_out = streams
    torch.manual_seed(seed)
    settings = TrainConfig(
        total_steps=steps, batch_size=size.batch_size, seq_len=size.seq_len, dtype="fp32", max_skipped_steps=1
    )
    model = size.model()
    config = Config(model=model.config, train=settings, optim=size.optim(options))
    state = build_state(config, torch.device("cpu"), QuietReporter(), model=model, methods={})
    state.skip_policy.spike_factor = math.inf
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        windows = _windows(train, size, size.batch_size, generator)
        try:
            train_step(state, windows[:, :-1], windows[:, 1:])
        except Diverged:
            progress.advance(steps - step)
            return math.inf
        state.progress.step += 1
        progress.advance()
    with torch.no_grad():
        loss = float(_loss(state.model, _windows(held_out, size, 128, torch.Generator().manual_seed(0))))
    return loss if math.isfinite(loss) else math.inf


def byte_stream(limit: int) -> tuple[Tensor, Tensor]:
    """int64 bytes of the standard library's sources up to the limit; every tenth document is held out."""
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for index, document in enumerate(d for d in open_corpus("stdlib") if isinstance(d, Document)):
        splits[index % 10 == 9].append(document.content)
        total += len(document.content)
        if total > limit:
            break
    train, held_out = (torch.frombuffer(bytearray(b"".join(s)), dtype=torch.uint8).long() for s in splits)
    return train, held_out


def _windows(stream: Tensor, size: Size, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count, seq_len + 1]"""
    starts = torch.randint(len(stream) - size.seq_len - 1, (count, 1), generator=generator)
    return stream[starts + torch.arange(size.seq_len + 1)]


def _loss(model: Transformer, windows: Tensor) -> Tensor:
    logits = model.logits(model(windows[:, :-1])).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def claims(results: Sequence[Result]) -> list[Claim]:
    """Promised and measured state, time and quality."""
    found = {(r.case, r.metric): r for r in results}
    judged = []
    for (name, metric), (peer, at_least, source) in PROMISED.items():
        saved = 1 - found[f"d20 / {name}", metric].value / found[f"d20 / {peer}", metric].value
        what = "state of the matrices" if metric == MATRIX_BYTES else "optimizer state"
        judged.append(
            Claim(
                id=f"{name} {metric}",
                statement=f"{what} of d20 with {name} is {100 * at_least:g} % less than that of {peer}",
                source=source,
                expected=f"at least {100 * at_least:g} %",
                measured=f"{100 * saved:.1f} %",
                verdict="supported" if saved >= at_least else "not supported",
            )
        )
    for name in ("muon-8bit", "galore", "hybrid"):
        slower = [1 / r.ratio for r in results if r.metric == "step" and r.case.endswith(f"/ {name}") and r.ratio]
        judged.append(
            Claim(
                id=f"{name} time",
                statement=f"a step with {name} takes at most {TIME_LIMIT} × the time of Muon in float32, at every size",
                source="our own target",
                expected=f"≤ {TIME_LIMIT}",
                measured=f"{max(slower):.2f}",
                verdict="supported" if max(slower) <= TIME_LIMIT else "not supported",
                interval=(min(slower), max(slower)),
            )
        )
    return judged + [
        parity(r, found[f"{r.case.split(' / ')[0]} / muon-fp32", r.metric]) for r in results if _is_8bit(r)
    ]


def parity(ours: Result, peer: Result) -> Claim:
    """Is the mean difference of loss, paired by seed, within the spread of float32 Muon's seeds?"""
    gaps = [a - b for a, b in zip(ours.runs, peer.runs, strict=True)]
    gap, spread = sum(gaps) / len(gaps), max(peer.runs) - min(peer.runs)
    verdict = "supported" if abs(gap) <= spread else "not supported"
    return Claim(
        id=f"{ours.case} parity",
        statement=f"{ours.metric} of {ours.case} differs from Muon's in float32 by no more than its seeds do",
        source="our own target",
        expected=f"≤ {spread:.4f} nats",
        measured=f"{gap:+.4f} nats",
        verdict=verdict if len(gaps) >= MIN_SEEDS else "not measurable here",
        interval=(min(gaps), max(gaps)),
        seeds=len(gaps),
    )


def _is_8bit(result: Result) -> bool:
    return result.metric.startswith("held-out loss") and result.case.endswith("/ muon-8bit")


MATRIX_BYTES = "state bytes of the matrices"
MIN_SEEDS = 3
OUR_TARGET = "our own target"
PROMISED = {
    ("muon-8bit", MATRIX_BYTES): ("muon-fp32", 0.74, OUR_TARGET),
    ("muon-8bit", "state bytes"): ("adamw-fp32", 0.86, "arXiv:2509.23106, with AdamW for what is no matrix"),
    ("muon-8bit, lion", "state bytes"): ("adamw-fp32", 0.86, "arXiv:2509.23106, with Lion for what is no matrix"),
    ("galore", MATRIX_BYTES): ("adamw-fp32", 0.655, "arXiv:2403.03507"),
    ("hybrid", MATRIX_BYTES): ("adamw-fp32", 0.95, OUR_TARGET),
    ("hybrid, lion, block 2048", "state bytes"): ("adamw-fp32", 0.95, OUR_TARGET),
}
"""(Contender, kind of bytes) -> the peer, the least share of the peer's bytes that is saved on d20, and the source."""
