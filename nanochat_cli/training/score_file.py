"""Scores of a training split, one per token, beside the shards: what `nanochat score` writes and Collider reads.

A safetensors file with `scores`, float16 [tokens of the training split]: the cross-entropy in nats of the token at each
place, given what precedes it in its window; 0 for the first token, which nothing predicts. Its metadata names the data.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.data.batches import Batches, evaluation_batches
from nanochat_cli.data.run_data import split_fingerprint
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.durable import whole
from nanochat_cli.errors import DataError
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.losses import token_scores

ROWS = 8


@torch.no_grad()
def write_scores(model: Transformer, reader: ShardReader, seq_len: int, path: Path, reporter: Reporter) -> float:
    """Score every token of the training split in windows of seq_len; returns their mean in nats. Raises DataError."""
    stream = reader.tokens("train")
    scores = torch.zeros(len(stream), dtype=torch.float16)
    place = 1
    with reporter.progress("scoring", len(stream) - 1, "tokens") as progress:
        for inputs, targets in evaluation_batches(stream, ROWS, seq_len):
            flat = torch.from_numpy(targets).reshape(-1)
            hidden = model(torch.from_numpy(inputs).to(model.device)).flatten(0, 1)
            losses, _ = token_scores(hidden, model.unembedding, flat.to(model.device))
            found = losses.cpu()[flat >= 0]
            scores[place : place + len(found)] = found.to(torch.float16)
            place += len(found)
            progress.advance(len(found))
    try:
        with whole(path) as temporary:
            save_file({"scores": scores}, temporary, metadata={"train": split_fingerprint(reader, "train")})
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write {path}: {error}") from error
    return float(scores[1:].float().mean())


class ScoreBatches:
    """Scores of the tokens that a step predicts, in the order of `data.batches`."""

    def __init__(self, path: Path, reader: ShardReader, config: Config) -> None:
        """Raises DataError for a file that is none, or is of other data."""
        try:
            with safe_open(path, framework="pt") as file:
                self._scores: Tensor = file.get_tensor("scores")
                found = (file.metadata() or {}).get("train")
        except (OSError, SafetensorError) as error:
            raise DataError(f"collider.scores = {path}: not a file of nanochat score ({error})") from error
        stream = reader.tokens("train")
        if found != split_fingerprint(reader, "train") or self._scores.shape != (len(stream),):
            raise DataError(f"collider.scores = {path}: scores of other data; run nanochat score on this data set")
        train = config.train
        self._batches = Batches(stream, train.batch_size * train.grad_accum, train.seq_len, config.run.seed)

    def batch(self, step: int) -> Tensor:
        """float32 [batch_size × grad_accum, T], beside the targets of the step's batch."""
        batches, length = self._batches, self._batches.seq_len
        windows = batches.window_order(step * batches.batch_size, batches.batch_size)
        places = torch.tensor(windows).unsqueeze(1) * length + 1 + torch.arange(length)
        return self._scores[places].float()
