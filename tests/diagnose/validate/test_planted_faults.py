"""A fault planted into the product fails the stage that looks for it, with a message that names the fault."""

import re
import shutil
import sys
from importlib import metadata

import pytest
import torch

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.diagnose.validate.matmul_case import MatmulCase
from nanochat_cli.diagnose.validate.stage import StageOutcome, Workspace
from nanochat_cli.diagnose.validate.stages import require_no_failure, run_stages
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.model.cache import KVCache
from tests.gguf_bytes import without_checksum

Patch = pytest.MonkeyPatch


def failure(name: str, place: Workspace) -> str:
    """The text of a stage's only outcome, which must be a failure that ends the command with exit code 4."""
    if name == "train":  # it trains the run again
        shutil.rmtree(place.run)
    outcomes: list[StageOutcome] = run_stages([name], place)
    assert [outcome.verdict for outcome in outcomes] == ["failed"], outcomes
    with pytest.raises(ValidationFailure, match=f"^{re.escape(name)}: ") as raised:
        require_no_failure(outcomes)
    assert raised.value.exit_code == 4
    return outcomes[0].text


def passes(name: str, place: Workspace) -> None:
    outcomes = run_stages([name], place)
    assert [outcome.verdict for outcome in outcomes] == ["passed"], outcomes


# --- before training --------------------------------------------------------------------------------------------------


def test_environment_an_old_package(place, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "tokenizers" else version(name))
    assert failure("environment", place).startswith("tokenizers 0.1 does not fit: pip install 'tokenizers>=")


def test_environment_a_missing_package(place, monkeypatch):
    version = metadata.version

    def missing(name: str) -> str:
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert failure("environment", place).startswith("gguf is not installed: pip install 'gguf>=")


def test_kernels_codes_unpacked_wrongly(place, monkeypatch):
    from nanochat_cli.diagnose.validate import three_way_parity
    from nanochat_kernels.cpu import operations

    unpack = operations.unpack
    monkeypatch.setattr(operations, "unpack", lambda *arguments: unpack(*arguments) * 0)
    monkeypatch.setattr(three_way_parity, "fewest_cases", lambda: [MatmulCase(17, 128, 1)])
    text = failure("kernels", place)
    assert text.startswith("kernels: cpu differs from the reference: 17×128, M 1, scale row: unpack.codes: ")


def test_hyper_connections_weights_that_do_not_sum_to_one(place, monkeypatch):
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: softmax(self, dim) * 1.001)
    assert "is not doubly stochastic" in failure("hyper-connections", place)


def test_hyper_connections_a_residual_that_is_scaled(place, monkeypatch):
    from nanochat_cli.diagnose.validate import hyper_connections

    write = hyper_connections.write_streams
    monkeypatch.setattr(hyper_connections, "write_streams", lambda x, y, post, res: write(x * (1 + 1e-6), y, post, res))
    assert "is not the plain residual bit for bit" in failure("hyper-connections", place)


def test_hyper_connections_streams_read_in_the_wrong_order(place, monkeypatch):
    from nanochat_cli.diagnose.validate import hyper_connections

    read = hyper_connections.read_streams
    monkeypatch.setattr(hyper_connections, "read_streams", lambda x, pre: read(x, pre.flip(-1)))
    assert "reading or writing streams differs from its definition by" in failure("hyper-connections", place)


def test_tokenizer_decodes_with_ids_off_by_one(place, monkeypatch):
    decode = Tokenizer.decode_bytes
    monkeypatch.setattr(Tokenizer, "decode_bytes", lambda self, ids: decode(self, [max(0, i - 1) for i in ids]))
    assert failure("tokenizer", place).startswith("decode(encode(text)) differs from 'def ")
    passes("export", place)


def test_tokenizer_lets_text_make_a_special_token(place, monkeypatch):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, allow_special=False: encode(self, text, True))
    assert "is encoded with the end-of-text token" in failure("tokenizer", place)


# --- training ---------------------------------------------------------------------------------------------------------


def on_step(monkeypatch: Patch, step: int, metric: str, factor: float) -> None:
    """Multiply a metric of the gradient that is computed as number `step`, counted from 0."""
    from nanochat_cli.training import update

    compute, calls = update.accumulate, iter(range(10**6))

    def changed(*arguments):
        metrics = compute(*arguments)
        return metrics | {metric: metrics[metric] * factor} if next(calls) == step else metrics

    monkeypatch.setattr(update, "accumulate", changed)


def shorter(monkeypatch: Patch, steps: int, stop_after: int) -> None:
    from nanochat_cli.diagnose.validate import training

    monkeypatch.setattr(training, "STEPS", steps)
    monkeypatch.setattr(training, "STOP_AFTER", stop_after)


def test_train_a_loss_that_is_not_a_number(place, monkeypatch):
    shorter(monkeypatch, 4, 2)
    on_step(monkeypatch, 2, "loss/main", float("nan"))
    assert failure("train", place) == "loss/main of step 3 is not finite"


def test_train_a_step_that_is_skipped(place, monkeypatch):
    shorter(monkeypatch, 4, 2)
    on_step(monkeypatch, 1, "loss/objective", float("inf"))
    assert failure("train", place) == "loss/objective of step 2 is not finite"


def test_train_weights_that_never_change(place, monkeypatch):
    from nanochat_cli.optim.build import Optimizers

    shorter(monkeypatch, 4, 2)
    monkeypatch.setattr(Optimizers, "step", lambda self, *args, **kwargs: 1.0)
    text = failure("train", place)
    assert re.search(r"^the training loss went from 6\.\d+ to 6\.", text)
    assert text.endswith("it must fall by 2")


def resumable(place: Workspace, monkeypatch: Patch) -> None:
    """Replaces the chain's run by an uninterrupted one of four steps."""
    from nanochat_cli.diagnose.validate.tiny_run import train_run

    shorter(monkeypatch, 4, 2)
    shutil.rmtree(place.run)
    train_run(place, place.run.name, 4)


def test_resume_without_the_state_of_the_optimizer(place, monkeypatch):
    from nanochat_cli.optim.build import Optimizers

    resumable(place, monkeypatch)
    monkeypatch.setattr(Optimizers, "load_state_dict", lambda self, state: None)
    assert " differs between 2 + 2 steps and 4 steps" in failure("resume", place)


def test_resume_that_reads_the_first_batches_again(place, monkeypatch):
    from nanochat_cli.training.trainer import Trainer

    resumable(place, monkeypatch)
    restore = Trainer._restore

    def forgetful(self):
        restore(self)
        read = self.batches.batch
        self.batches.batch = lambda step: read(step - 2)

    monkeypatch.setattr(Trainer, "_restore", forgetful)
    assert "differs between 2 + 2 steps and 4 steps" in failure("resume", place)


def test_methods_filtering_that_keeps_every_token(place, monkeypatch):
    from nanochat_cli.training.build import METHODS
    from nanochat_cli.training.methods.collider import TokenFilter

    monkeypatch.delitem(METHODS, TokenFilter)
    assert (
        failure("methods", place) == "no finite collider/kept_fraction in metrics.jsonl of a run with every method on"
    )


def test_methods_float_state_where_int8_was_asked_for(place, monkeypatch):
    from nanochat_cli.diagnose.validate import methods

    monkeypatch.setitem(methods.METHODS, "optim", {**methods.METHODS["optim"], "eight_bit": False})
    assert failure("methods", place).startswith("the optimizer has no int8 projection of ")


def test_methods_a_loader_that_is_one_batch_ahead(place, monkeypatch):
    from nanochat_cli.data.async_loader import AsyncLoader

    read = AsyncLoader.batch
    monkeypatch.setattr(AsyncLoader, "batch", lambda self, index: read(self, index + 1))
    assert failure("methods", place) == "batch 0 read ahead differs from the one read directly"


# --- the file and its readers -----------------------------------------------------------------------------------------


def flip_a_code(place: Workspace) -> None:
    """Change one ternary code of the exported file, whose checksum nobody reads."""
    tensor = GGUFFile(place.gguf).tensors["blk.1.ffn_down.weight"]
    content = bytearray(without_checksum(place.gguf.read_bytes()))
    at = int(tensor.data_offset) + 5
    lowest = content[at] & 3
    content[at] = content[at] & ~3 | (lowest + 1) % 3
    place.gguf.write_bytes(content)


def test_export_as_another_type(place, monkeypatch):
    from nanochat_cli.formats.gguf import write as gguf

    monkeypatch.setattr(gguf, "choose_type", lambda *arguments: "f16")
    assert "has the type tq2_0" in failure("export", place)


def test_gguf_one_code_flipped(place):
    flip_a_code(place)
    assert "tensor blk.1.ffn_down.weight differs from the model, first in the weight at [" in failure("gguf", place)
    passes("generation", place)


def test_packed_one_code_flipped_in_the_file(place):
    flip_a_code(place)
    text = failure("packed", place)
    assert text.startswith("the packed runtime's logits from the exported file differ from the model's by ")


def test_packed_a_weight_perturbed_while_packing(place, monkeypatch):
    from nanochat_cli.inference import pack

    exact = pack._packed

    def perturbed(layer):
        packed = exact(layer)
        packed.scales[0] *= 1.01
        return packed

    monkeypatch.setattr(pack, "_packed", perturbed)
    text = failure("packed", place)
    assert text.startswith("the packed runtime's logits differ from the trained model's by ")
    passes("gguf", place)


def test_llama_cpp_reads_a_file_with_a_wrong_scale(place):
    pytest.importorskip("xllamacpp")
    file = GGUFFile(place.gguf)
    tensor = file.tensors["output_norm.weight"]
    content = bytearray(place.gguf.read_bytes())
    start = int(tensor.data_offset)
    values = torch.frombuffer(content[start : start + tensor.n_bytes], dtype=torch.float32) * 1.5
    content[start : start + tensor.n_bytes] = values.numpy().tobytes()
    place.gguf.write_bytes(content)
    assert failure("llama.cpp", place).startswith("llama.cpp and the model disagree: ")


# --- generation -------------------------------------------------------------------------------------------------------


def test_generation_a_cache_that_is_one_position_off(place, monkeypatch):
    update = KVCache.update

    def shifted(self, layer, keys, values):
        keys, values = update(self, layer, keys, values)
        return (keys.roll(1, dims=2), values) if self.length else (keys, values)

    monkeypatch.setattr(KVCache, "update", shifted)
    assert failure("generation", place).startswith("reading a prompt at once and token by token gives logits ")


def seeded(monkeypatch, begin):
    """Have every row draw from `begin(its generator)`."""
    from nanochat_cli.inference.continuous_batch import Row

    original = Row.__init__

    def changed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.generator = begin(self.generator)

    monkeypatch.setattr(Row, "__init__", changed)


def test_generation_a_seed_that_is_ignored(place, monkeypatch):
    seeded(monkeypatch, lambda generator: torch.Generator().manual_seed(0))
    assert failure("generation", place) == "another seed gives the same text"


def test_generation_without_a_seed(place, monkeypatch):
    seeds = iter(range(100, 10**6))
    seeded(monkeypatch, lambda generator: torch.Generator().manual_seed(next(seeds)))
    assert failure("generation", place) == "the same seed gives a different text the second time"


def test_generation_rows_that_share_their_random_numbers(place, monkeypatch):
    shared = torch.Generator()
    seeded(monkeypatch, lambda generator: shared.manual_seed(generator.initial_seed()))
    assert "of a batch is continued differently than alone" in failure("generation", place)


def test_speculative_a_draft_accepted_without_a_check(place, monkeypatch):
    from nanochat_cli.inference import speculative

    sample = speculative.sample

    def trusting(logits, *arguments):
        caller = sys._getframe(1).f_locals
        if caller["place"] < len(caller["drafts"]):
            return torch.tensor([caller["drafts"][caller["place"]]])
        return sample(logits, *arguments)

    monkeypatch.setattr(speculative, "sample", trusting)
    assert "differs from plain decoding at token" in failure("speculative", place)
    passes("generation", place)


def test_speculative_a_cache_that_keeps_rejected_drafts(place, monkeypatch):
    from nanochat_cli.inference import speculative

    def stale(model, cache, before, valid, snapshot):
        cache.length = before + valid.shape[1]
        cache.keys.mul_(1.5)

    monkeypatch.setattr(speculative, "_forget", stale)
    assert "differs from plain decoding at token" in failure("speculative", place)
