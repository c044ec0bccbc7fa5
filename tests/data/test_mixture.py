"""Mixtures of sources: what batches draw, against counting, and data sets of several sources."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat_cli.cli.app import main
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.config.source_parts import Part, is_part, parts_of
from nanochat_cli.data.async_loader import AsyncLoader
from nanochat_cli.data.batches import Batches
from nanochat_cli.data.loader import source_spec
from nanochat_cli.data.manifest import SPLITS, Manifest, Split
from nanochat_cli.data.mixture import BLOCK, Mixture, Share, shares_of, too_often
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation.held_out import document_languages
from nanochat_cli.evaluation.run_bits_per_byte import bits_per_byte_results, measure_bits_per_byte
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import PlainReporter, QuietReporter
from nanochat_cli.training.bits_per_byte import evaluate
from nanochat_cli.training.losses import token_scores
from nanochat_cli.training.score_file import ScoreBatches, write_scores
from nanochat_cli.training.shard_data import ShardData
from tests.data.corpora import make_config, write_folder

# -- which window comes at which place -------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (0.1, 3, 1), (1000, 1), (1,)])
def test_every_block_has_each_source_in_its_share_and_every_epoch_each_window_once(weights: tuple[float, ...]) -> None:
    seq_len = 8
    shares = [Share(f"s{number}", 8 * 50 * (number + 1) + 3, weight) for number, weight in enumerate(weights)]
    mixture = Mixture(shares, seq_len, seed=5)
    starts = [mixture.start(place) for place in range(3 * BLOCK)]
    offsets = np.cumsum([0, *(share.tokens for share in shares)])
    source = np.searchsorted(offsets, starts, side="right") - 1
    for block in range(3):
        counts = Counter(source[block * BLOCK : (block + 1) * BLOCK].tolist())
        for number, weight in enumerate(weights):
            assert counts[number] == pytest.approx(BLOCK * weight / sum(weights), abs=len(weights))
            assert counts[number] >= 1
    for number, share in enumerate(shares):
        own = np.array(starts)[source == number] - offsets[number]
        windows = (share.tokens - 1) // seq_len
        assert set((own % seq_len).tolist()) == {0}
        assert own.max() + seq_len + 1 <= share.tokens
        # Each window is read as often as any other, up to the epoch that is not complete.
        counts = Counter(own.tolist())
        if len(own) >= windows:
            assert len(counts) == windows
        assert max(counts.values()) - min(counts.values()) <= 1
        assert mixture.epochs(3 * BLOCK)[share.name] == pytest.approx(len(own) / windows)


def test_the_order_of_a_mixture_is_mixed_and_changes_with_the_seed() -> None:
    shares = [Share("a", 50_000, 1), Share("b", 50_000, 1)]
    first, other = (Mixture(shares, 8, seed) for seed in (1, 2))
    sources = np.array([first.source_at(place)[0] for place in range(BLOCK)])
    # Runs of one source: about half of the places begin one (standard deviation 32).
    assert abs(int((np.diff(sources) != 0).sum()) - BLOCK // 2) < 160
    assert [first.start(place) for place in range(50)] != [other.start(place) for place in range(50)]
    assert [first.start(place) for place in reversed(range(50))] == [first.start(place) for place in range(50)][::-1]


def test_a_source_shorter_than_a_window_is_named() -> None:
    with pytest.raises(
        DataError, match=r"source b has 8 training tokens, less than one sequence of train\.seq_len = 8"
    ):
        Mixture([Share("a", 100, 1), Share("b", 8, 1)], 8, 0)


def test_sources_that_are_read_too_often_are_named() -> None:
    epochs = Mixture([Share("a", 10_001, 1), Share("b", 101, 3)], 10, 0).epochs(400)
    assert epochs["b"] == pytest.approx(30, rel=0.01)
    assert too_often(epochs) == "more than 4 epochs of a source help little: b 30.0 times; lower its weight"
    assert too_often({"a": 4.0}) is None


# -- how sources are written -----------------------------------------------------------------------------


def test_sources_are_written_with_a_name_and_a_weight() -> None:
    assert parts_of(["py=~/src:2", "hub=hf:org/name:train:0.5", "plain=/a/b"]) == [
        Part("py", "~/src", 2),
        Part("hub", "hf:org/name:train", 0.5),
        Part("plain", "/a/b", 1),
    ]
    assert [str(part) for part in parts_of(["a=x", "b=y:0.25"])] == ["a=x:1", "b=y:0.25"]
    assert not any(map(is_part, ["stdlib", "hf:org/name:train", "~/src", "1=x"]))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a=x", "y"], r"must name each of several sources as NAME=SOURCE or NAME=SOURCE:WEIGHT, not 'y'"),
        (["a=x", "a=y"], r"must have different names; a is given twice"),
        (["a=x:0", "b=y"], r"must have weights above 0; leave out a"),
        ([f"s{number}=x" for number in range(65)], r"must name at most 64 sources, not 65"),
        (["a=", "b=x"], r"must name each of several sources .* not 'a='"),
    ],
)
def test_sources_that_make_no_sense_are_one_line(sources: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_config(["quickstart"], options={"--source": {"data.sources": sources}})
    assert "\n" not in str(caught.value)
    assert "(--source)" in str(caught.value)


# -- data sets -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Manifest, list[list[bytes]]]:
    """A data set of two sources, one of which holds copies of the other's documents; and their contents."""
    folder = tmp_path_factory.mktemp("mixture")
    contents = [
        write_folder(folder / name, count, seed=seed, size=900)
        for seed, (name, count) in enumerate((("py", 60), ("rust", 30)))
    ]
    (folder / "rust" / "shared.rs").write_bytes(b"// copied\n" + contents[0][7])
    contents[1].append(b"// copied\n" + contents[0][7])
    config = make_config(
        data={"sources": [f"py={folder / 'py'}:3", f"rs={folder / 'rust'}"], "dedup": "none"},
        train={"seq_len": 16, "batch_size": 3, "grad_accum": 2},
        model={"vocab_size": 300, "dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 64},
    )
    manifest = prepare_dataset("", folder / "data", config, QuietReporter())
    return folder / "data", config, manifest, contents


def documents_of(reader: ShardReader, split: Split, number: int) -> list[bytes]:
    """The documents of one source, by the counts in the manifest."""
    parts = reader.manifest.parts
    first = sum(part.side(split).documents for part in parts[:number])
    return list(itertools.islice(reader.documents(split), first, first + parts[number].side(split).documents))


def test_each_source_has_its_own_shards_and_its_own_share_held_out(
    made: tuple[Path, Config, Manifest, list[list[bytes]]],
) -> None:
    out, _, manifest, contents = made
    reader = ShardReader(out)
    assert [(part.name, part.weight) for part in manifest.parts] == [("py", 3), ("rs", 1)]
    for number, part in enumerate(manifest.parts):
        sides = {split: documents_of(reader, split, number) for split in SPLITS}
        assert Counter(sides["train"] + sides["val"]) == Counter(contents[number])
        assert part.val.bytes == sum(map(len, sides["val"]))
        assert 0.05 < part.val.bytes / sum(map(len, contents[number])) < 0.3
        shards = [shard for shard in manifest.train.shards if shard.file.startswith(f"train-{part.name}-")]
        assert (len(shards), sum(shard.tokens for shard in shards)) == (part.train.shards, part.train.tokens)
    for split in SPLITS:
        assert sum(part.side(split).tokens for part in manifest.parts) == manifest.split(split).tokens
    train, val = (set(reader.documents(split)) for split in SPLITS)
    twins = {contents[0][7], contents[1][-1]}
    assert twins <= train or twins <= val  # near-duplicates of different sources stay together


def test_the_same_sources_are_prepared_once_and_found_again(
    made: tuple[Path, Config, Manifest, list[list[bytes]]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, config, manifest, _ = made
    assert prepare_dataset("", out, config, PlainReporter()) == manifest
    assert "already prepared" in capsys.readouterr().err
    other = config.model_copy(deep=True)
    other.data.sources = (other.data.sources[0], other.data.sources[1].replace(":1", ":2"))
    with pytest.raises(RuntimeError, match="source"):
        prepare_dataset("", out, other, QuietReporter(), lambda changed: _refuse(changed))
    assert document_languages(ShardReader(out), config, QuietReporter()).count("rs") <= 1


def _refuse(changed: str) -> None:
    raise RuntimeError(changed)


def test_the_order_is_the_same_for_any_number_of_workers_and_wherever_it_starts(
    made: tuple[Path, Config, Manifest, list[list[bytes]]],
) -> None:
    out, config, manifest, _ = made
    reader = ShardReader(out)
    spec = source_spec(reader, config, QuietReporter())
    expected = [spec.open().batch(index) for index in range(30)]
    stream = reader.tokens("train")[:]
    mixture = Mixture(shares_of(manifest), 16, config.run.seed)
    for index, (inputs, targets) in enumerate(expected):
        starts = [mixture.start(place) for place in range(6 * index, 6 * index + 6)]
        np.testing.assert_array_equal(inputs, [stream[start : start + 16] for start in starts])
        np.testing.assert_array_equal(targets, [stream[start + 1 : start + 17] for start in starts])
    for workers in (1, 2, 4):
        with AsyncLoader(spec, workers, prefetch=5) as loader:
            for index in (*range(12, 30), *range(5)):
                np.testing.assert_array_equal(loader.batch(index)[0], expected[index][0])


def test_another_batch_size_goes_on_where_the_run_stopped(
    made: tuple[Path, Config, Manifest, list[list[bytes]]],
) -> None:
    out, _, manifest, _ = made
    stream, shares = ShardReader(out).tokens("train"), shares_of(manifest)
    small = Batches(stream, 2, 16, seed=9, shares=shares)
    large = Batches(stream, 6, 16, seed=9, shift=3 * 2 - 3 * 6, shares=shares)
    expected = np.concatenate([small.batch(index)[0] for index in (3, 4, 5)])
    np.testing.assert_array_equal(large.batch(3)[0], expected)


def test_bits_per_byte_of_each_source_are_those_of_its_documents(
    made: tuple[Path, Config, Manifest, list[list[bytes]]],
) -> None:
    out, config, manifest, _ = made
    reader = ShardReader(out)
    torch.manual_seed(0)
    model = Transformer(config.model).eval()
    measured = measure_bits_per_byte(model, reader.tokenizer, reader, config, QuietReporter())
    assert list(measured.sources) == ["py", "rs"]
    # Windows of 16 tokens from the beginning of the stream: each target belongs to one source.
    tokens, length = torch.from_numpy(reader.tokens("val")[:]), reader.tokenizer.byte_lengths()
    first = manifest.parts[0].val.tokens
    for name, begin, end in (("py", 1, first), ("rs", first, len(tokens))):
        pairs = []
        for start in range(0, len(tokens) - 1, 16):
            inputs, targets = tokens[start : start + 17][:-1].clone(), tokens[start : start + 17][1:].clone()
            places = torch.arange(start + 1, start + 1 + len(targets))
            targets[(places < begin) | (places >= end)] = -100
            pairs.append((inputs[None], targets[None]))
        alone = evaluate(model, (pair for pair in pairs if (pair[1] >= 0).any()), torch.from_numpy(length))
        assert measured.sources[name].tokens == alone.tokens
        assert measured.sources[name].bytes == alone.bytes
        assert measured.sources[name].bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-5)
        assert measured.sources[name].accuracy == pytest.approx(alone.accuracy)
    named = {one.case for one in bits_per_byte_results(measured)}
    assert {"held-out documents, source py", "held-out documents, source rs"} <= named


def test_scores_of_what_a_run_reads_first_are_those_of_its_first_batches(
    made: tuple[Path, Config, Manifest, list[list[bytes]]], tmp_path: Path
) -> None:
    out, config, _, _ = made
    reader, path = ShardReader(out), tmp_path / "scores.safetensors"
    torch.manual_seed(0)
    model = Transformer(config.model).eval()
    write_scores(model, reader, 16, path, QuietReporter(), seed=config.run.seed, max_tokens=2 * 6 * 16)
    batches = ScoreBatches(path, reader, config)
    spec = source_spec(reader, config, QuietReporter())
    for step in range(2):
        inputs, targets = (torch.from_numpy(tokens) for tokens in spec.open().batch(step))
        expected, _ = token_scores(model(inputs).flatten(0, 1), model.unembedding, targets.flatten())
        torch.testing.assert_close(batches.batch(step).flatten(), expected.float(), atol=0.01, rtol=0.01)
    with pytest.raises(DataError, match="step 2 needs others"):
        batches.batch(2)


def test_sources_that_a_run_will_read_too_often_are_named_before_it(
    made: tuple[Path, Config, Manifest, list[list[bytes]]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, config, _, _ = made
    for steps, said in ((3, False), (1000, True)):
        long = config.model_copy(deep=True)
        long.train.total_steps = steps
        ShardData(ShardReader(out), long, PlainReporter()).warn_of_epochs()
        assert ("epochs of a source help little: py " in capsys.readouterr().err) == said


def test_a_mixture_cannot_be_tokenised_on_the_fly(made: tuple[Path, Config, Manifest, list[list[bytes]]]) -> None:
    out, config, _, _ = made
    on_the_fly = config.model_copy(deep=True)
    on_the_fly.loader.on_the_fly = True
    with pytest.raises(DataError, match=r"is a mixture, which loader\.on_the_fly does not read"):
        source_spec(ShardReader(out), on_the_fly, QuietReporter())


def test_a_source_without_documents_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "full", 12)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.png").write_bytes(b"\0")
    config = make_config(data={"sources": [f"a={tmp_path / 'full'}", f"b={tmp_path / 'empty'}"]})
    with pytest.raises(DataError, match=r"b: .*empty has no usable document; leave the source out"):
        prepare_dataset("", tmp_path / "data", config, QuietReporter())


# -- the command -----------------------------------------------------------------------------------------


def test_sources_are_named_on_the_command_line_or_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "one", 20)
    write_folder(tmp_path / "two", 20, seed=1)
    small = ["--vocab-size", "300", "--set", "data.val_fraction=0.2"]
    assert main(["tokenize", "--source", "a=one:2", "--source", "b=two", *small]) == 0
    manifest = ShardReader(tmp_path / "data" / "a-b").manifest
    assert [(part.name, part.weight) for part in manifest.parts] == [("a", 2), ("b", 1)]
    assert "train of b" in capsys.readouterr().out
    (tmp_path / "mix.toml").write_text('[data]\nsources = ["a=one:2", "b=two"]\n')
    assert main(["tokenize", "--config", "mix.toml", "--out", "again", *small]) == 0
    assert ShardReader(tmp_path / "again").manifest.content == manifest.content
    capsys.readouterr()
    assert main(["tokenize", "--source", "one", "--source", "two", *small]) == 2
    assert "must name each of several sources as NAME=SOURCE" in capsys.readouterr().err
    assert main(["tokenize", "--source", "a=one", "--source", "b=nowhere", *small]) == 3
    assert "--source nowhere: no such file or folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_mixture_reports_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "one", 20)
    write_folder(tmp_path / "two", 20, seed=1)
    small = ["--vocab-size", "300", "--set", "data.val_fraction=0.2"]
    assert main(["tokenize", "--source", "a=one:30", "--source", "b=two", "--out", "data", *small]) == 0
    tiny = ["model.n_layers=1", "model.dim=64", "model.ffn_dim=64", "train.time_budget=none", "train.seq_len=16"]
    tiny += ["train.batch_size=8", "train.compile=off", "telemetry.tensorboard=false", "data.path=data"]
    run = ["train", "--preset", "quickstart", "--preset", "cpu", *(word for key in tiny for word in ("--set", key))]
    capsys.readouterr()
    steps = ["--set", "train.total_steps=90", "--set", "optim.warmup_steps=5", "--set", "run.name=whole"]
    assert main([*run, *steps]) == 0
    said = capsys.readouterr()
    assert "more than 4 epochs of a source help little: a " in said.err
    assert "epochs of a" in said.out
    assert "epochs.b" in (tmp_path / "runs" / "whole" / "report.md").read_text()
