"""Training on conversations: only answers count, and documents that share a row do not see each other."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat_cli.cli.app import main
from nanochat_cli.config.schema import Config
from nanochat_cli.data.async_loader import AsyncLoader
from nanochat_cli.data.chat import CHATML, chat_tokens
from nanochat_cli.data.conversation_rules import require_combinable
from nanochat_cli.data.loader import source_spec
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.errors import ConfigError, DataError, NanochatError
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.open import open_run
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.formats.run.origin import read_chat_template
from nanochat_cli.model.documents import document_mask
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import PlainReporter, QuietReporter
from nanochat_cli.training.bits_per_byte import evaluate
from nanochat_cli.training.build import build_state
from nanochat_cli.training.chat_data import ChatData, open_data
from nanochat_cli.training.next_token import next_token_loss
from nanochat_cli.training.shard_data import ShardData
from nanochat_cli.training.trainer import Trainer
from nanochat_cli.training.update import gradient
from tests.data.chat_sets import VOCAB, chat_set, messages
from tests.data.corpora import make_config, write_folder
from tests.inference.tiny_models import spread_model
from tests.inference.tiny_models import tiny_config as tiny_model
from tests.training.synthetic import tiny_config

SEQ_LEN = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    chat_set(folder, messages(60))
    chat_set(folder, [{"prompt": f"{n}?", "completion": "yes " * (n % 7 + 1)} for n in range(90)], "short")
    return folder


def config_for(folder: Path, run_dir: Path, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": VOCAB, "max_seq_len": SEQ_LEN},
        "train": {"seq_len": SEQ_LEN, "total_steps": 6},
        "data": {"path": folder / "chat"},
        "eval": {"interval": 3, "batch_size": 2},
        "checkpoint": {"interval": 3},
    }
    return tiny_config(run_dir, **{name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


def opened(folder: Path, run_dir: Path, name: str = "chat", **sections: dict[str, Any]) -> tuple[ChatData, Config]:
    config = config_for(folder, run_dir, **sections)
    data = open_data(ShardReader(folder / name), config)
    assert isinstance(data, ChatData)
    return data, config


# -- rows of several documents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [True, False])
def test_a_conversation_in_a_row_is_computed_as_it_is_alone(activations: bool) -> None:
    """With the same roundings to int8, since positions begin again with every document."""
    stop = 3
    model = spread_model(tiny_model(vocab_size=64, quant={"enabled": True, "activations": activations}))
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(4, 64, (length,), generator=generator) for length in (9, 1, 20)]
    ended = [torch.cat((document, torch.tensor([stop]))) for document in documents]
    row = torch.cat((*ended, torch.tensor([stop] * 4)))
    model.document_end = stop
    with torch.no_grad():
        together = model(row.unsqueeze(0))[0]
        start = 0
        for document in ended:
            model.document_end = None
            alone = model(document.unsqueeze(0))[0]
            torch.testing.assert_close(together[start : start + len(document)], alone, atol=2e-5, rtol=1e-5)
            start += len(document)


def test_the_mask_says_who_sees_whom() -> None:
    tokens = torch.tensor([[5, 9, 5, 5, 9, 9]])
    mask, positions = document_mask(tokens, end=9)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    expected = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril(), torch.ones(1, 1)).bool()
    assert torch.equal(mask, expected[None, None])


def test_a_cache_reads_one_stream(folder: Path) -> None:
    from nanochat_cli.model.cache import KVCache

    model = spread_model(tiny_model(vocab_size=64))
    tokens = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, KVCache(model.config, 1, 16, model.dtype, model.device))
        model.document_end = int(tokens[0, 4])
        found = model(tokens, KVCache(model.config, 1, 16, model.dtype, model.device))
    assert torch.equal(found, expected)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_targets_are_the_answers_each_once_per_epoch(folder: Path, tmp_path: Path) -> None:
    data, _ = opened(folder, tmp_path)
    reader = ShardReader(folder / "chat")
    rows, size = len(data._training_rows), 8
    steps = math.ceil(rows / size)
    targets = torch.cat([data.batch(step)[1] for step in range(steps)])[:rows]
    inputs = torch.cat([data.batch(step)[0] for step in range(steps)])[:rows]
    shards = reader.shards("train")
    found = data._training_rows.conversations
    trained = [ids[mask] for ids, mask in (found[number] for number in range(len(found)))]
    assert sorted(np.concatenate(trained).tolist()) == sorted(targets[targets >= 0].tolist())
    assert (targets[:, :-1][targets[:, :-1] >= 0] == inputs[:, 1:][targets[:, :-1] >= 0]).all()
    whole = sum(int(shard.loss_mask.sum()) for shard in shards if shard.loss_mask is not None)
    assert found.cut + found.left_out > 0
    assert sum(map(len, trained)) < whole, "what is longer than a row loses its end"


def test_any_number_of_workers_gives_the_batches_of_one_reader(folder: Path, tmp_path: Path) -> None:
    _, config = opened(folder, tmp_path, data={"base": folder / "base"}, train={"mix": 0.4})
    spec = source_spec(ShardReader(folder / "chat"), config, QuietReporter())
    direct = spec.open()
    with AsyncLoader(spec, 2, 3) as loader:
        for index in range(6):
            for ours, theirs in zip(loader.batch(index), direct.batch(index), strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_the_share_of_text_is_that_of_the_mix_and_every_target_of_it_counts(folder: Path, tmp_path: Path) -> None:
    data, _ = opened(folder, tmp_path, data={"base": folder / "base"}, train={"mix": 0.25})
    targets = torch.cat([data.batch(step)[1] for step in range(512)])  # 4096 rows: one block of the mixture
    assert int((targets >= 0).all(1).sum()) == pytest.approx(1024, abs=1)
    text = ShardReader(folder / "base").tokens("train")
    windows = {tuple(text[start + 1 : start + SEQ_LEN + 1].tolist()) for start in range(0, len(text), SEQ_LEN)}
    assert all(tuple(row.tolist()) in windows for row in targets[(targets >= 0).all(1)][:50])


# -- the loss ----------------------------------------------------------------------------------------------------------


def float64_loss(model: Transformer, inputs: Tensor, targets: Tensor, stop: int) -> tuple[float, dict[str, Tensor]]:
    """Mean over all targets of the batch, every document alone, and its gradient, in float64 and in plain words."""
    twin = Transformer(model.config).double()
    twin.load_state_dict(model.state_dict())
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        start = 0
        while start < len(row):
            end = row.index(stop, start) + 1 if stop in row[start:] else len(row)
            logits = twin.logits(twin(torch.tensor([row[start:end]])))[0].log_softmax(-1)
            for place, target in enumerate(wanted[start:end]):
                if target >= 0:
                    total, count = total - logits[place, target], count + 1
            start = end
    mean = total / count
    mean.backward()
    return mean.item(), {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_loss_and_gradient_are_the_plain_mean_over_answers_however_the_batch_is_cut(
    folder: Path, tmp_path: Path, micro_batch: int
) -> None:
    float_model = {"quant": {"enabled": False}, "n_layers": 1, "max_seq_len": 128}
    data, config = opened(folder, tmp_path, "short", model=float_model, train={"seq_len": 128})
    model = spread_model(config.model)
    state = build_state(config, CPU, QuietReporter(), model=model, data=data)
    state.progress.micro_batch = micro_batch
    inputs, targets = data.batch(2)
    counts = (targets >= 0).sum(1)
    assert len(set(counts.tolist())) > 1, "rows differ in their targets"
    assert data.document_end is not None
    packing = data._training_rows.packing
    assert max(len(packing.row(place)) for place in range(16, 24)) > 1, "rows hold several conversations"
    expected, gradients = float64_loss(model, inputs, targets, data.document_end)
    metrics = gradient(state, len(inputs), next_token_loss(state, inputs, targets))
    assert metrics["loss/main"].item() == pytest.approx(expected, rel=1e-5)
    assert metrics["loss/objective"].item() == pytest.approx(expected, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), gradients[name], atol=2e-6, rtol=1e-3)


def test_the_held_out_loss_is_that_of_answers_and_text_is_scored_as_a_base_model_is(
    folder: Path, tmp_path: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {"data": {"base": folder / "base"}, "train": {"mix": 0.2}}
    data, config = opened(folder, tmp_path, **sections)
    (tmp_path / "run").mkdir()
    result = Trainer(config, data, tmp_path / "run", QuietReporter()).fit()
    final = read_metrics(tmp_path / "run")[-1]
    model = Transformer(config.model)
    model.load_state_dict(checkpoints.load(tmp_path / "run").tensors["model"])
    model.requantize()
    model.eval()
    reader = ShardReader(folder / "base")
    plain = ShardData(reader, config.model_copy(update={"data": Config().data}))
    base = evaluate(model, plain.held_out(None), plain.token_bytes)
    assert final["final/base_bits_per_byte"] == pytest.approx(base.bits_per_byte, rel=1e-6)
    assert final["final/base_loss"] == pytest.approx(base.loss, rel=1e-6)
    inputs, targets = (torch.cat(parts) for parts in zip(*data.held_out(None), strict=True))
    stop = chat_tokens(reader.tokenizer).stop
    model.document_end = stop
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model.logits(model(inputs)).flatten(0, 1).double(), targets.flatten(), ignore_index=-100
        )
    assert result.held_out.loss == pytest.approx(losses.item(), rel=1e-5)
    assert result.held_out.tokens == int((targets >= 0).sum())
    text = data.token_bytes[targets[targets >= 0]].sum()
    assert result.held_out.bytes == int(text)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_continues_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {"data": {"base": folder / "base"}, "train": {"mix": 0.3}}

    def trainer(name: str, *, resume: bool = False) -> Trainer:
        data, config = opened(folder, tmp_path, **sections)
        (tmp_path / name).mkdir(exist_ok=True)
        return Trainer(config, data, tmp_path / name, QuietReporter(), resume=resume)

    trainer("whole").fit()
    part = trainer("part")
    with part.log:
        for _ in range(4):
            part._step()
            part._between_steps()
        part.save()
    trainer("part", resume=True).fit()
    one, other = (checkpoints.load(tmp_path / name).tensors["model"] for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    metrics = [
        [
            {k: v for k, v in line.items() if k.startswith(("loss/", "eval/", "final/"))}
            for line in read_metrics(tmp_path / name)
        ]
        for name in ("whole", "part")
    ]
    assert metrics[0] == metrics[1]


REFUSED: list[tuple[dict[str, dict[str, Any]], str]] = [
    ({"mtp": {"enabled": True}}, "mtp.enabled = true"),
    ({"collider": {"enabled": True}}, "collider.enabled = true"),
    ({"distill": {"teacher": "runs/teacher"}}, "distill.teacher"),
    ({"fim": {"rate": 0.5}}, "fim.rate above 0"),
    ({"loader": {"on_the_fly": True}}, "loader.on_the_fly = true"),
    ({"bigram_init": {"steps": 3}}, "bigram_init.steps above 0"),
    ({"model": {"deltanet": {"ratio": 0.5}}}, "model.deltanet"),
]


@pytest.mark.parametrize(("sections", "setting"), REFUSED, ids=[setting for _, setting in REFUSED])
def test_what_conversations_do_not_go_with_is_named(
    folder: Path, tmp_path: Path, sections: dict[str, dict[str, Any]], setting: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"holds conversations, which {setting} does not fit: .*; turn it off"
    ) as error:
        require_combinable(config_for(folder, tmp_path, **sections), chats=True)
    assert "\n" not in str(error.value)


def test_other_ways_to_be_wrong_are_one_line(folder: Path, tmp_path: Path) -> None:
    def message(**sections: dict[str, Any]) -> str:
        with pytest.raises(NanochatError) as error:
            opened(folder, tmp_path, **sections)[0].warn_of_epochs()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no conversation has an answer within train.seq_len = 2" in message(train={"seq_len": 2})
    write_folder(tmp_path / "text", 20)
    prepare_dataset(str(tmp_path / "text"), tmp_path / "other", make_config(model={"vocab_size": 380}), QuietReporter())
    assert "other: has another tokenizer than" in message(data={"base": tmp_path / "other"})
    assert "it is for text" in message(data={"base": folder / "chat"})
    with pytest.raises(ConfigError, match="leave out --nproc"):
        open_data(ShardReader(folder / "chat"), config_for(folder, tmp_path), None, range(4))
    with pytest.raises(ValueError, match=r"train\.mix needs data\.base"):
        config_for(folder, tmp_path, train={"mix": 0.1})
    with pytest.raises(ConfigError, match=r"data\.base belongs to training on conversations"):
        require_combinable(config_for(folder, tmp_path, data={"base": folder / "base"}), chats=False)


def test_conversations_that_do_not_fit_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(folder, tmp_path)
    data = open_data(ShardReader(folder / "chat"), config, PlainReporter())
    data.warn_of_epochs()
    said = capsys.readouterr().err
    assert "filled; an epoch is" in said
    assert "conversations lose their end" in said
    assert "begins from random weights" in said


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_a_base_run_to_an_exported_chat_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands; the second takes model and tokenizer from the first run, and its template goes on from there."""
    monkeypatch.chdir(tmp_path)
    small = "model.dim=64 model.n_layers=1 model.n_heads=2 model.n_kv_heads=1 model.ffn_dim=64 bigram_init.steps=0"
    quick = "train.time_budget=none train.total_steps=2 train.seq_len=64 train.batch_size=2 train.compile=off "
    quick += "telemetry.tensorboard=false train.backward=exact train.attention=torch optim.muon_format=fp32"

    def train(preset: str, name: str, *words: str) -> int:
        sets = [part for word in (*quick.split(), *words) for part in ("--set", word)]
        return main(["train", "--preset", preset, "--preset", "cpu", "--name", name, *sets])

    assert train("quickstart", "base", *small.split(), f"data.path={folder / 'base'}") == 0
    keys = [f"data.path={folder / 'chat'}", f"data.base={folder / 'base'}", "train.mix=0.2", "train.init=base"]
    assert train("sft", "tuned", *keys, "train.total_steps=3") == 0
    base, tuned = open_run(Path("runs/base")), open_run(Path("runs/tuned"))
    assert tuned.config.model == base.config.model
    assert read_chat_template(Path("runs/tuned")) == CHATML
    assert read_chat_template(Path("runs/base")) is None
    moved = [name for name, p in tuned.model.named_parameters() if not torch.equal(p, base.model.get_parameter(name))]
    assert moved
    start = read_metrics(Path("runs/tuned"))[0]["loss/main"]
    assert start < math.log(VOCAB), "it does not begin from random weights"
    assert "base_bits_per_byte" in (Path("runs/tuned/results.json").read_text())
    assert main(["eval", "tuned"]) == 0
    assert main(["eval", "tuned", "--suite", "bpb", "--json", "bpb.json"]) == 0
    assert main(["train", "--resume", "tuned", "--set", "train.total_steps=4"]) == 0
    assert main(["export", "tuned", "--gguf", "--out", "tuned.gguf", "--no-verify"]) == 0
    assert GGUFFile(Path("tuned.gguf")).fields["tokenizer.chat_template"] == CHATML


def test_a_data_set_in_other_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    from nanochat_cli.formats.initial import initial_template
    from tests.evaluation.saved_runs import save_run

    save_run(tmp_path / "run")
    with pytest.raises(DataError, match=r"has another tokenizer than .*chat, whose tokens would mean something else"):
        initial_template(tmp_path / "run", ShardReader(folder / "chat"))
