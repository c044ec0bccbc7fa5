"""How much held-out figures move when near-duplicates stay on one side: small runs on the standard library.

    python benchmarks/near_duplicates.py [--seeds 3] [--steps 150] [--out benchmarks/results/near_duplicates.json]

Three data sets with the same tokenizer, and for each seed a run of the quickstart's shape on each:

    by document  the old rule: a document is held out by the hash of its own content
    purged       the same documents held out, and their near-duplicates left out of training
    by cluster   the rule of `nanochat_cli.data.split`

The first two are measured on the same documents, with and without those that have a near-duplicate in the first's
training part, so that they differ only in what the model saw. The third holds out other documents: its figure shows
what a reader will see, not what causes it. The file is written again after each run.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.data.batches import evaluation_batches
from nanochat_cli.data.corpus import open_corpus
from nanochat_cli.data.manifest import MANIFEST, SPLITS
from nanochat_cli.data.near_duplicates import THRESHOLD, NearDuplicates
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import TOKENIZER, ShardReader, ShardWriter
from nanochat_cli.data.split import HASH_RANGE, split_key
from nanochat_cli.data.word_runs import words_of
from nanochat_cli.engine import Engine
from nanochat_cli.evaluation.held_out import encode_held_out
from nanochat_cli.formats.open import load_run
from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.report.result_file import Result, summarise, write_results
from nanochat_cli.training.bits_per_byte import evaluate_groups

TWIN, ALONE = "with a near-duplicate in training", "without one"


def config_of(arguments: argparse.Namespace, folder: Path, seed: int, data: Path | None) -> Config:
    overrides = [
        f"data.source={arguments.source}",
        f"run.seed={seed}",
        f"run.dir={folder / 'runs'}",
        f"train.total_steps={arguments.steps}",
        f"train.batch_size={arguments.batch_size}",
        "train.time_budget=none",
        "train.compile=off",
        f"eval.interval={arguments.steps}",
        "eval.max_tokens=512",
        "eval.final_max_tokens=512",
        "telemetry.tensorboard=false",
        f"checkpoint.interval={arguments.steps}",
    ]
    overrides += [] if data is None else [f"data.path={data}", f"run.name={data.name}-{seed}"]
    return resolve_config(["quickstart"], overrides=overrides)


def write_dataset(folder: Path, like: ShardReader, sides: dict[bytes, str]) -> None:
    """A data set of documents and the tokenizer of `like`; sides: train, val or neither, for each document."""
    folder.mkdir()
    (folder / TOKENIZER).write_bytes((like.folder / TOKENIZER).read_bytes())
    size = like.tokenizer.vocab_size
    with ShardWriter(folder, "train", size) as train, ShardWriter(folder, "val", size) as val:
        writers = {"train": train, "val": val}
        for part in SPLITS:
            for ids in like.tokens(part).documents():
                content = like.tokenizer.decode_bytes(ids.tolist())
                if (side := sides.pop(content, "")) in writers:  # once, even if the corpus repeats it
                    writers[side].add(np.append(ids, like.tokenizer.eos_id), len(content))
        manifest = like.manifest.model_copy(update={"train": train.finish(), "val": val.finish()})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))


def make_datasets(folder: Path, config: Config, documents: list[bytes]) -> tuple[set[bytes], list[Result]]:
    """Write the three data sets. Returns the documents with a twin that the old rule holds out, and the counts."""
    prepare_dataset(config.data.source, folder / "by-cluster", config, PlainReporter())
    reader = ShardReader(folder / "by-cluster")
    with NearDuplicates(folder) as near:
        for content in documents:
            near.add(split_key(content), words_of(content).hashes)
        clusters = dict(zip(documents, near.clusters().tolist(), strict=True))
    threshold = config.data.val_fraction * HASH_RANGE
    sides = {content: "val" if split_key(content) < threshold else "train" for content in documents}
    held_out = [content for content, side in sides.items() if side == "val"]
    trained_on = {clusters[content] for content, side in sides.items() if side == "train"}
    twins = {content for content in held_out if clusters[content] in trained_on}
    write_dataset(folder / "by-document", reader, dict(sides))
    families = {clusters[content] for content in twins}
    purged = {c: "" if side == "train" and clusters[c] in families else side for c, side in sides.items()}
    write_dataset(folder / "purged", reader, dict(purged))
    counts = {
        "documents": (len(documents), "documents"),
        "near-duplicates of another": (getattr(reader.manifest.near_duplicates, "documents", 0), "documents"),
        "clusters of them": (getattr(reader.manifest.near_duplicates, "clusters", 0), "clusters"),
        "held out by document": (len(held_out), "documents"),
        "held out by document, with a near-duplicate in training": (len(twins), "documents"),
        "their share of the held-out bytes": (100 * sum(map(len, twins)) / sum(map(len, held_out)), "%"),
        "documents of their families in training": (sum(not side for side in purged.values()), "documents"),
        "held out by cluster": (reader.manifest.val.documents, "documents"),
        "bytes held out by document": (100 * sum(map(len, held_out)) / sum(map(len, documents)), "%"),
        "bytes held out by cluster": (100 * reader.manifest.val.bytes / sum(map(len, documents)), "%"),
    }
    case = f"{config.data.source}, similarity from {THRESHOLD} on"
    return twins, [Result(case, name, float(value), unit) for name, (value, unit) in counts.items()]


def measure(run: Path, data: Path, twins: set[bytes]) -> dict[str, float]:
    """Bits per byte of all held-out documents, of those with a near-duplicate in training, and of the others."""
    model, tokenizer, config = load_run(run)
    reader = ShardReader(data)
    tokens = encode_held_out(reader, tokenizer)
    group = torch.tensor([int(content not in twins) for content in reader.documents("val")])

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for inputs, targets in evaluation_batches(tokens, config.eval.batch_size, config.train.seq_len):
            yield torch.from_numpy(inputs), torch.from_numpy(targets)

    groups = group.repeat_interleave(torch.tensor(tokens.lengths))[1:]
    lengths = torch.from_numpy(tokenizer.byte_lengths())
    whole, parts = evaluate_groups(model, batches(), lengths, groups, (TWIN, ALONE))
    return {"all": whole.bits_per_byte, **{name: part.bits_per_byte for name, part in parts.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib", help="another one is only for trying the script")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "near_duplicates.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    documents = list(dict.fromkeys(document.content for document in open_corpus(arguments.source)))
    values: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="nanochat-near-duplicates-") as name:
        folder = Path(name)
        twins, counted = make_datasets(folder, config_of(arguments, folder, 0, None), documents)
        write_results(arguments.out, "near_duplicates", counted)
        case = f"quickstart's shape, {arguments.steps} steps of {arguments.batch_size} × 256 tokens"
        for seed in range(arguments.seeds):
            for data in ("by-document", "purged", "by-cluster"):
                config = config_of(arguments, folder, seed, folder / data)
                Engine(PlainReporter()).fit(config, None)
                run = config.run.dir / str(config.run.name)
                for group, value in measure(run, folder / data, twins).items():
                    if data != "by-cluster" or group == "all":
                        values.setdefault((data.replace("-", " "), group), []).append(value)
                results = [
                    summarise(case, f"split {split}, held-out documents, {group}", "bits/byte", runs)
                    for (split, group), runs in values.items()
                ]
                print(f"wrote {write_results(arguments.out, 'near_duplicates', [*counted, *results])}", flush=True)


if __name__ == "__main__":
    main()
