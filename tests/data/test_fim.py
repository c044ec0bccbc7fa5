"""Fill-in-the-middle: no byte is lost at a cut, rows keep their places, and the order depends on nothing else."""

import random
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.cli.app import main
from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.fim import FimConfig
from nanochat_cli.data.async_loader import AsyncLoader
from nanochat_cli.data.batches import Batch, Batches
from nanochat_cli.data.fim import FEWEST_TOKENS, FimBatches, Gap, _draws, cut, infill_prompt
from nanochat_cli.data.loader import source_spec
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.engine import Engine
from nanochat_cli.errors import DataError
from nanochat_cli.evaluation.held_out import TokenArray
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training.shard_data import ShardData
from tests.data.corpora import random_text
from tests.e2e.tiny import TINY, write_corpus
from tests.training.synthetic import tiny_config

TOKENIZER = Tokenizer.train([random_text(random.Random(seed), 2000) for seed in range(20)], 512)
EOS, PREFIX, MIDDLE, SUFFIX = 0, 2, 3, 4
WIDTH = 96
SHARES = st.floats(0, 1, exclude_max=True)


@cache
def stream(longest: int) -> TokenArray:
    """50,000 tokens of documents of up to `longest` characters."""
    rng = random.Random(longest)
    ids: list[int] = []
    while len(ids) < 50_000:
        ids += [*TOKENIZER.encode(random_text(rng, rng.randrange(5, longest))), EOS]
    return TokenArray(np.array(ids[:50_000], dtype=np.int64), EOS, ())


def plain(longest: int = 600, batch_size: int = 6, shift: int = 0) -> Batches:
    return Batches(stream(longest), batch_size, WIDTH, seed=9, shift=shift)


def filled(source: Batches, rate: float = 1.0, spm_rate: float = 0.5, seed: int = 3) -> FimBatches:
    fim = FimConfig(rate=rate, spm_rate=spm_rate)
    return FimBatches(source, TOKENIZER, fim, seed, source.batch_size, source.shift)


def whole(batch: Batch) -> list[list[int]]:
    """Rows with their last target; checks that targets are the inputs shifted."""
    inputs, targets = batch
    assert inputs.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    return np.concatenate((inputs, targets[:, -1:]), axis=1).tolist()


def fragments(row: list[int]) -> list[list[int]]:
    """What lies between ends of documents, each with its end where it has one."""
    found: list[list[int]] = [[]]
    for token in row:
        found[-1].append(token)
        if token == EOS:
            found.append([])
    return [fragment for fragment in found if fragment]


def parts(fragment: list[int]) -> tuple[str, bytes, bytes, bytes]:
    """Order, prefix, middle and suffix of a transformed fragment, read token by token."""
    assert fragment[-1] == EOS
    texts: dict[int, list[int]] = {}
    now = 0
    for token in fragment[:-1]:
        if token in (PREFIX, MIDDLE, SUFFIX):
            assert token not in texts
            now = token
            texts[now] = []
        else:
            texts[now].append(token)
    prefix, middle, suffix = (TOKENIZER.decode_bytes(texts[name]) for name in (PREFIX, MIDDLE, SUFFIX))
    if list(texts) == [PREFIX, SUFFIX, MIDDLE]:
        return "psm", prefix, middle, suffix
    assert list(texts) == [SUFFIX, PREFIX, MIDDLE]
    return "spm", prefix, middle, suffix


@given(content=st.binary() | st.text().map(str.encode), shares=st.tuples(SHARES, SHARES))
def test_prefix_middle_and_suffix_are_the_document_byte_for_byte(content: bytes, shares: tuple[float, float]) -> None:
    assert b"".join(cut(content, *shares)) == content


@given(text=st.text(st.characters(exclude_categories=["Cs"])), shares=st.tuples(SHARES, SHARES))
def test_no_character_is_cut_in_two(text: str, shares: tuple[float, float]) -> None:
    assert "".join(part.decode() for part in cut(text.encode(), *shares)) == text


def test_every_place_between_characters_is_cut_equally_often() -> None:
    rng = random.Random(0)
    counts = Counter(len(cut("aé日😀".encode(), rng.random(), 0.999)[0].decode()) for _ in range(5000))
    assert set(counts) == {0, 1, 2, 3, 4}
    # 5000 draws with p = 1/5: mean 1000, standard deviation 28.
    assert all(abs(count - 1000) < 150 for count in counts.values())


@pytest.mark.parametrize("longest", [60, 600, 6000])
def test_a_transformed_fragment_holds_its_document_but_for_an_end_that_makes_room(longest: int) -> None:
    source, seen = plain(longest), Counter()
    batches = filled(source)
    for index in range(20):
        for before, after in zip(whole(source.batch(index)), whole(batches.batch(index)), strict=True):
            old, new = fragments(before), fragments(after)
            assert [len(one) for one in old] == [len(one) for one in new]
            for number, (one, other) in enumerate(zip(old, new, strict=True)):
                if one == other:
                    seen["unchanged" if len(one) >= FEWEST_TOKENS else "short"] += 1
                    continue
                order, prefix, middle, suffix = parts(other)
                text = TOKENIZER.decode_bytes([token for token in one if token != EOS])
                kept = prefix + middle + suffix
                assert kept in text
                # The beginning is left out in a row's first fragment, else the end, as long as there is something.
                assert text.startswith(kept) or number == 0 or not suffix
                assert text.endswith(kept) or number > 0 or not prefix
                # Four tokens are new, or three beside the end that was there, and the cuts split others.
                assert len(TOKENIZER.encode_bytes(text)) - len(TOKENIZER.encode_bytes(kept)) <= 12
                seen[order] += 1
                seen["ended"] += one[-1] == EOS
                seen["torn"] += one[-1] != EOS
    assert min(seen["psm"], seen["spm"]) > 20
    assert seen["torn"] > 10
    assert seen["unchanged"] < 0.1 * (seen["psm"] + seen["spm"])
    assert longest == 6000 or seen["ended"] > 20


def test_the_shares_are_those_of_the_configuration() -> None:
    orders: Counter[str] = Counter()
    batches = filled(plain(longest=6000, batch_size=50), rate=0.3, spm_rate=0.25)
    for index in range(12):
        for row in whole(batches.batch(index)):
            orders.update(
                {PREFIX: "psm", SUFFIX: "spm"}.get(one[0], "plain") for one in fragments(row) if len(one) >= WIDTH
            )
    transformed = orders["psm"] + orders["spm"]
    # Standard deviations of 0.02 and 0.035, for about 500 fragments of which 150 are transformed.
    assert transformed / orders.total() == pytest.approx(0.3, abs=0.08)
    assert orders["spm"] / transformed == pytest.approx(0.25, abs=0.14)
    assert whole(filled(plain(), rate=0.0).batch(0)) == whole(plain().batch(0))


def test_a_row_depends_on_seed_and_place_only() -> None:
    expected = [whole(filled(plain()).batch(index)) for index in range(8)]
    again = filled(plain())
    for index in reversed(range(8)):
        assert whole(again.batch(index)) == expected[index]
    assert whole(filled(plain(), seed=4).batch(0)) != expected[0]
    small = filled(plain(batch_size=2))
    assert [row for index in range(6) for row in whole(small.batch(index))] == expected[0] + expected[1]
    # A run that goes on with other batches after three of two rows.
    large = filled(plain(shift=3 * 2 - 3 * 6))
    assert whole(large.batch(3)) == [row for index in (3, 4, 5) for row in whole(small.batch(index))]


def test_another_epoch_cuts_the_same_window_elsewhere() -> None:
    source = Batches(TokenArray(stream(6000).ids[: WIDTH + 1], EOS, ()), 1, WIDTH, seed=9)  # a single window
    batches = filled(source)
    rows = {tuple(whole(batches.batch(index))[0]) for index in range(20)}
    assert len(rows) > 15


def test_the_draws_are_pinned_so_that_old_runs_resume_alike() -> None:
    assert [round(value, 6) for value in _draws(1337, 5, 1)] == [0.782781, 0.153736, 0.503613, 0.228004]


def test_a_fragment_with_a_special_token_is_left_alone() -> None:
    ids = np.array(TOKENIZER.encode(random_text(random.Random(0), 4000))[: WIDTH + 1])
    for special in (False, True):
        ids[40] = TOKENIZER.special_tokens["<|im_start|>"] if special else ids[40]
        batches = filled(Batches(TokenArray(ids, EOS, ()), 1, WIDTH, seed=9))
        unchanged = [whole(batches.batch(index))[0] == ids.tolist() for index in range(10)]
        assert all(unchanged) if special else not any(unchanged)


# -- on the way to the trainer -----------------------------------------------------------------------------------------


def prepared(folder: Path, *, on_the_fly: bool = False, **sections: dict[str, object]) -> tuple[ShardReader, Config]:
    write_corpus(folder / "text")
    config = Config.model_validate(
        {
            "model": {"vocab_size": 300},
            "train": {"batch_size": 2, "grad_accum": 2, "seq_len": 32},
            "data": {"glob": "*.py"},
            "loader": {"on_the_fly": on_the_fly},
            "fim": {"rate": 0.5},
            **sections,
        }
    )
    prepare_dataset(str(folder / "text"), folder / "data", config, QuietReporter())
    return ShardReader(folder / "data"), config


@pytest.mark.parametrize(("on_the_fly", "numbers"), [(False, (1, 2, 3, 4)), (True, (3,))], ids=["shards", "on the fly"])
def test_any_number_of_workers_gives_the_batches_of_one_reader(
    tmp_path: Path, on_the_fly: bool, numbers: tuple[int, ...]
) -> None:
    reader, config = prepared(tmp_path, on_the_fly=on_the_fly)
    spec = source_spec(reader, config, QuietReporter())
    direct = spec.open()
    expected = [direct.batch(index) for index in range(12)]
    assert any(PREFIX in inputs for inputs, _ in expected)
    for workers in numbers:
        with AsyncLoader(spec, workers, 3) as loader:
            for index, (inputs, targets) in enumerate(expected):
                found = loader.batch(index)
                np.testing.assert_array_equal(found[0], inputs)
                np.testing.assert_array_equal(found[1], targets)


def test_held_out_documents_are_read_from_left_to_right(tmp_path: Path) -> None:
    reader, config = prepared(tmp_path, fim={"rate": 1.0})
    for inputs, targets in ShardData(reader, config).held_out(None):
        assert not torch.isin(inputs, torch.tensor([PREFIX, MIDDLE, SUFFIX])).any()
        assert not torch.isin(targets, torch.tensor([PREFIX, MIDDLE, SUFFIX])).any()
    plain_data = ShardData(reader, config.model_copy(update={"fim": FimConfig()}))
    for ours, theirs in zip(ShardData(reader, config).held_out(None), plain_data.held_out(None), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_a_stopped_run_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With targets further ahead, which cross the special tokens, and filtered tokens."""
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path / "text")
    whole_run, part = train(tmp_path, "whole", 4), train(tmp_path, "part", 2)
    train(tmp_path, "part", 4, resume=part)
    one, other = (checkpoints.load(run).tensors["model"] for run in (whole_run, part))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(tensor.isfinite().all() for tensor in one.values())
    with pytest.raises(DataError, match=r"with another fim\.rate \(0\.5, not 0\.9\)"):
        train(tmp_path, "part", 8, resume=part, rate=0.9)


def train(folder: Path, name: str, steps: int, *, rate: float = 0.5, resume: Path | None = None) -> Path:
    config = tiny_config(
        folder / "runs",
        run={"name": name},
        model={"vocab_size": 300, "max_seq_len": 32, "n_layers": 1},
        train={"total_steps": steps, "seq_len": 32},
        data={"source": str(folder / "text"), "glob": "*.py"},
        eval={"interval": 100},
        checkpoint={"interval": 100},
        telemetry={"interval": 100},
        optim={"schedule": "constant"},
        fim={"rate": rate},
        mtp={"enabled": True, "n_tokens": 2},
        collider={"enabled": True, "sparsity": 0.4},
    )
    Engine(QuietReporter()).fit(config, resume)
    return folder / "runs" / name


def test_a_vocabulary_without_the_tokens_is_one_line_before_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanochat_cli.data.tokenizer.SPECIAL_TOKENS", ("<|endoftext|>", "<|fim_middle|>"))
    prepared(tmp_path)
    line = ["train", *TINY, "--set", "data.path=data", "--set", "fim.rate=0.5", "--quiet"]
    assert main(line) == 3
    error = capsys.readouterr().err
    assert "fill-in-the-middle (fim.rate) needs <|fim_prefix|>, <|fim_suffix|> in the vocabulary" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_scores_of_shards_do_not_fit_rows_that_were_changed() -> None:
    collider = {"enabled": True, "score": "excess", "scores": "scores.safetensors"}
    with pytest.raises(ValueError, match=r"needs loader\.on_the_fly = false and fim\.rate = 0"):
        Config.model_validate({"collider": collider, "fim": {"rate": 0.5}})


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_the_beginning_of_a_transformed_fragment() -> None:
    before, after = "def f(x):\n    ret", "urn x\n"
    ids = infill_prompt(TOKENIZER, Gap(before, after), 1000, spm=False)
    assert ids == [PREFIX, *TOKENIZER.encode(before), SUFFIX, *TOKENIZER.encode(after), MIDDLE]
    ids = infill_prompt(TOKENIZER, Gap(before, after), 1000, spm=True)
    assert ids == [SUFFIX, *TOKENIZER.encode(after), PREFIX, *TOKENIZER.encode(before), MIDDLE]


@given(before=st.text(max_size=80), after=st.text(max_size=80), room=st.integers(8, 60), spm=st.booleans())
def test_a_prompt_fits_and_keeps_what_is_next_to_the_cursor(before: str, after: str, room: int, spm: bool) -> None:
    ids = infill_prompt(TOKENIZER, Gap(before, after), room, spm=spm)
    assert len(ids) <= room + 1
    at = {name: ids.index(name) for name in (PREFIX, SUFFIX, MIDDLE)}
    prefix = ids[at[PREFIX] + 1 : at[MIDDLE] if spm else at[SUFFIX]]
    suffix = ids[at[SUFFIX] + 1 : at[PREFIX] if spm else at[MIDDLE]]
    assert TOKENIZER.encode(before)[-len(prefix) :] == prefix or not prefix
    assert TOKENIZER.encode(after)[: len(suffix)] == suffix
    assert len(prefix) == min(len(TOKENIZER.encode(before)), 3 * (room // 4))
    assert len(suffix) == min(len(TOKENIZER.encode(after)), room // 4 - 2)
