"""What trained hyper-connections look like: the evidence for the verdicts of `nanochat inspect --mhc`.

    python benchmarks/stream_health.py [--steps 80] [--seeds 1] [--out benchmarks/results/stream_health.json]

Trains small models (width 64, 4 layers) with 2 and 4 residual streams from every initial mixing, and with a plain
residual, on half a megabyte of the standard library, and measures their streams before and after. If a model learns as
well as the plain one but fails a verdict, that verdict says nothing about health. (With 2 streams, balanced and
high-entropy are the same.)
"""

import argparse
import tempfile
from pathlib import Path
from typing import get_args

import torch

from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.mhc import MHCConfig
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.report.result_file import Result, summarise, write_results
from nanochat_cli.training.health.streams import StreamReport, measure_streams
from nanochat_cli.training.shard_data import ShardData
from nanochat_cli.training.trainer import Trainer

INITS = get_args(MHCConfig.model_fields["init"].annotation)
VOCAB, SEQ_LEN = 512, 64


def config_of(folder: Path, name: str, streams: int, init: str, seed: int, steps: int) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(folder), "name": name, "seed": seed},
            "model": {
                **{"vocab_size": VOCAB, "dim": 64, "n_layers": 4, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 256},
                **{"max_seq_len": SEQ_LEN, "mhc": {"streams": streams, "init": init}},
            },
            "data": {"max_bytes": 500_000},
            "train": {"total_steps": steps, "batch_size": 8, "seq_len": SEQ_LEN, "compile": "off", "device": "cpu"},
            "eval": {"interval": 10 * steps, "final_max_tokens": 8_192},
            "optim": {"warmup_steps": 20},
            "telemetry": {"tensorboard": False},
        }
    )


def trained(config: Config) -> tuple[float, StreamReport | None, StreamReport | None]:
    """Held-out loss in nats, and the streams before and after training; None for a plain residual."""
    reporter = QuietReporter()
    data = ShardData(ShardReader(cached_dataset(config, reporter), vocab_size=VOCAB), config, reporter)
    folder = config.run.dir / str(config.run.name)
    folder.mkdir()
    trainer = Trainer(config, data, folder, reporter)
    inputs, targets = data.batch(10**6)
    several = config.model.mhc.streams > 1
    before = measure_streams(trainer.state.model, inputs, targets) if several else None
    loss = trainer.fit().held_out.loss
    return loss, before, measure_streams(trainer.state.model, inputs, targets) if several else None


def results_of(case: str, losses: list[float], before: list[StreamReport], after: list[StreamReport]) -> list[Result]:
    """Over seeds and sublayers; the diversity omits the first sublayer, whose streams are copies by construction."""
    results = [summarise(case, "held-out loss", "nats", losses)]
    for when, reports in (("at the start", before), ("trained", after)):
        layers = [layer for report in reports for layer in report.layers]
        later = [layer for report in reports for layer in report.layers[1:]]
        results += [
            summarise(case, f"alpha, {when}", "share", [layer.alpha for layer in layers]),
            summarise(case, f"diversity, {when}", "1 - cosine", [layer.diversity for layer in later]),
            summarise(case, f"gain, {when}", "1", [layer.gain for layer in layers]),
        ]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stream_health.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [(n, init) for n in (2, 4) for init in INITS if (n, init) != (2, "high-entropy")]
        for streams, init in [(1, INITS[0]), *cases]:
            case = "plain residual" if streams == 1 else f"{streams} streams, {init}"
            runs = [
                trained(config_of(Path(folder), f"{streams}-{init}-{seed}", streams, init, seed, arguments.steps))
                for seed in range(arguments.seeds)
            ]
            before, after = [run[1] for run in runs if run[1]], [run[2] for run in runs if run[2]]
            losses = [run[0] for run in runs]
            plain = [summarise(case, "held-out loss", "nats", losses)]
            new = results_of(case, losses, before, after) if before else plain
            results += new
            for result in new:
                print(f"{case}: {result.metric} {result.value:.5g} {result.spread}", flush=True)
    print(f"wrote {write_results(arguments.out, 'stream_health', results, steps=arguments.steps)}")


if __name__ == "__main__":
    main()
