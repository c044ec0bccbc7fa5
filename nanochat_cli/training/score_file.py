"""Scores of a training split, one per token, beside the shards: what `nanochat score` writes and Collider reads.

A safetensors file with `scores`, float16 [tokens of the training split]: the cross-entropy in nats of the token at each
place, given what precedes it in its window; 0 for the first token, which nothing predicts. Its metadata names the data.
A file of the first windows only, in the order in which a run with this seed reads them, holds NaN elsewhere.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanochat_cli.atomic_write import whole
from nanochat_cli.config.schema import Config
from nanochat_cli.data.batches import IGNORE_INDEX, Batches
from nanochat_cli.data.mixture import shares_of
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.errors import DataError, reason
from nanochat_cli.formats.run.dataset import split_fingerprint
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.losses import token_scores

ROWS = 8


@torch.no_grad()
def write_scores(
    model: Transformer,
    reader: ShardReader,
    seq_len: int,
    path: Path,
    reporter: Reporter,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
) -> tuple[int, float]:
    """Score the tokens of the training split in windows of seq_len; returns how many and their mean in nats.

    max_tokens: only so many (rounded up to whole windows), those that a run with this seed and seq_len reads first.
    Raises DataError.
    """
    stream = reader.tokens("train")
    scores = torch.full((len(stream),), float("nan"), dtype=torch.float16)
    scores[0] = 0
    part = max_tokens is not None and max_tokens < len(stream) - 1
    if max_tokens is not None and part:
        order = Batches(stream, 1, seq_len, seed, shares=shares_of(reader.manifest))
        chosen = sorted(set(order.starts(0, min(-(-max_tokens // seq_len), order.windows))))
    else:
        chosen = range(0, len(stream) - 1, seq_len)
    with reporter.progress("scoring", min(len(chosen) * seq_len, len(stream) - 1), "tokens") as progress:
        for first in range(0, len(chosen), ROWS):
            starts = list(chosen[first : first + ROWS])
            rows = [torch.from_numpy(stream[start : start + seq_len + 1]) for start in starts]
            tokens = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
            flat = tokens[:, 1:].reshape(-1)
            inputs = tokens[:, :-1].masked_fill(tokens[:, :-1] == IGNORE_INDEX, stream.eos_id)
            hidden = model(inputs.to(model.device)).flatten(0, 1)
            losses, _ = token_scores(hidden, model.unembedding, flat.to(model.device))
            places = torch.tensor(starts)[:, None] + 1 + torch.arange(inputs.shape[1])
            scores[places.reshape(-1)[flat >= 0]] = losses.cpu()[flat >= 0].to(torch.float16)
            progress.advance(int((flat >= 0).sum()))
    metadata = {"train": split_fingerprint(reader, "train")}
    if part:
        metadata["order"] = f"the first {len(chosen)} windows of {seq_len} tokens with run.seed = {seed}"
    try:
        with whole(path) as temporary:
            temporary.write_bytes(save({"scores": scores}, metadata))  # save_file replaces a device by a file
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write {path}: {reason(error)}; free space or choose another --out") from error
    known = scores[1:].float()
    known = known[~known.isnan()]
    return len(known), float(known.mean())


class ScoreBatches:
    """Scores of the tokens that a step predicts, in the order of `data.batches`."""

    def __init__(self, path: Path, reader: ShardReader, config: Config, shift: int = 0) -> None:
        """Raises DataError if it is not such a file, belongs to other data, or lacks what the first step needs."""
        self._path = path
        try:
            path.open("rb").close()  # safe_open gives no reason
            with safe_open(path, framework="pt") as file:
                self._scores: Tensor = file.get_tensor("scores")
                metadata = file.metadata() or {}
                found, self._part = metadata.get("train"), metadata.get("order")
        except (OSError, SafetensorError, RuntimeError) as error:  # torch's for a failing disk
            raise DataError(f"collider.scores = {path}: not a file of nanochat score ({reason(error)})") from error
        stream = reader.tokens("train")
        if found != split_fingerprint(reader, "train") or self._scores.shape != (len(stream),):
            raise DataError(f"collider.scores = {path}: scores of other data; run nanochat score on this data set")
        train = config.train
        batch_size = train.batch_size * train.grad_accum
        shares = shares_of(reader.manifest)
        self._batches = Batches(stream, batch_size, train.seq_len, config.run.seed, shift=shift, shares=shares)
        if not shift:  # else the run has begun with other batches
            self.batch(0)

    def batch(self, step: int) -> Tensor:
        """float32 [batch_size × grad_accum, T], beside the targets of the step's batch. Raises DataError."""
        batches, length = self._batches, self._batches.seq_len
        places = torch.tensor(batches.starts_of(step)).unsqueeze(1) + 1 + torch.arange(length)
        found = self._scores[places].float()
        if self._part is not None and bool(found.isnan().any()):
            raise DataError(
                f"{self._path}: it has scores of {self._part}, and step {step} needs others: "
                "run nanochat score with more --max-tokens, or without"
            )
        return found
