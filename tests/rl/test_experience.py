"""The experience library: what it keeps, draws and prunes, and what survives crashes and other processes."""

import json
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nanochat_cli import atomic_write
from nanochat_cli.errors import DataError
from nanochat_cli.rl.experience import (
    Experience,
    ExperienceLibrary,
    LibraryStatistics,
    few_shot_prompt,
    log_probabilities,
)
from tests.rl import library_process


def made(index: int, **values) -> Experience:
    fields = {"prompt": f"prompt {index % 7}", "response": f"response {index}", "reward": 0.25, "advantage": 0.5}
    return Experience(**{**fields, "created_at": 1000.0 + index, "metadata": {"task": index}, **values})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "library.jsonl"


# --- persistence ------------------------------------------------------------------------------------------------------


def test_additions_are_read_back_equal_by_another_library(path):
    strange = 'a\nb\r\u2028\x85\0"\\ \ud800 é 𝄞'
    added = [made(0), made(1, prompt=strange, response=strange, metadata={"terms": {strange: [1, None, 0.1]}})]
    ExperienceLibrary(path).add(added)
    assert list(ExperienceLibrary(path).experiences) == added
    assert [json.loads(line)["response"] for line in path.read_text().split("\n")[:-1]] == [e.response for e in added]


def test_a_new_library_is_empty_and_its_folder_is_made(tmp_path):
    library = ExperienceLibrary(tmp_path / "deep" / "library.jsonl")
    assert library.experiences == ()
    assert library.statistics() == LibraryStatistics(0, 0)
    assert library.sample(3, np.random.default_rng(0)) == []
    library.add([])
    assert len(library) == 0


def test_one_library_sees_what_another_adds_and_prunes(path):
    ours, theirs = ExperienceLibrary(path), ExperienceLibrary(path)
    theirs.add([made(0, advantage=0.1), made(1, advantage=0.9)])
    assert len(ours) == 2
    ours.add([made(2, advantage=0.2)])
    theirs.add([made(3, advantage=0.3)])
    assert theirs.prune(max_size=2) == 2
    assert [e.metadata["task"] for e in ours.experiences] == [1, 3]
    assert ours.experiences == theirs.experiences


@pytest.mark.parametrize("cut", [1, 10, 60, "all but one"])
def test_a_torn_last_line_is_dropped_and_the_rest_stays(path, cut):
    library = ExperienceLibrary(path)
    library.add([made(0), made(1)])
    whole = path.read_bytes()
    last = whole.split(b"\n")[1]
    torn = last[:1] if cut == "all but one" else last[:-cut]
    path.write_bytes(whole[: len(whole) - len(last) - 1] + torn)
    reader = ExperienceLibrary(path)
    assert list(reader.experiences) == [made(0)]
    assert reader.dropped_bytes == len(torn)
    reader.add([made(2)])
    assert list(ExperienceLibrary(path).experiences) == [made(0), made(2)]


def test_a_line_torn_while_a_library_is_open_does_not_swallow_the_next(path):
    library = ExperienceLibrary(path)
    library.add([made(0)])
    with path.open("ab") as file:
        file.write(b'{"prompt": "unfin')
    library.add([made(1)])
    assert list(library.experiences) == [made(0), made(1)]
    assert library.dropped_bytes == 17


def test_a_whole_last_line_without_its_end_is_kept(path):
    ExperienceLibrary(path).add([made(0), made(1)])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as an editor leaves it
    library = ExperienceLibrary(path)
    library.add([made(2)])
    assert list(ExperienceLibrary(path).experiences) == [made(0), made(1), made(2)]
    assert library.dropped_bytes == 0


def test_zeros_that_a_power_cut_leaves_at_the_end_are_dropped(path):
    ExperienceLibrary(path).add([made(0)])
    with path.open("ab") as file:
        file.write(b"\0" * 4096)
    assert list(ExperienceLibrary(path).experiences) == [made(0)]


def test_when_the_disk_is_full_nothing_is_left_behind(path, monkeypatch):
    library = ExperienceLibrary(path)
    library.add([made(0)])
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic_write.os, "fsync", full)
        with pytest.raises(DataError, match=r"library\.jsonl: cannot write .*No space left"):
            library.add([made(1)])
    assert path.read_bytes() == before
    library.add([made(2)])
    assert list(library.experiences) == [made(0), made(2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "not JSON"),
        ("[1, 2]", "its keys must be prompt, response"),
        ('{"prompt": "a"}', "its keys must be prompt, response"),
        (json.dumps({**vars(made(0)), "reward": "high"}), "reward has the wrong type"),
        (json.dumps({**vars(made(0)), "reward": True}), "reward has the wrong type"),
        (json.dumps({**vars(made(0)), "advantage": math.inf}), "advantage = inf is not finite"),
        (json.dumps({**vars(made(0)), "reward": 10**400}), "too large"),
        (json.dumps({**vars(made(0)), "more": 1}), "its keys must be"),
        ("[" * 100_000, "nested too deep"),
        ("\udcff", "not JSON"),
    ],
    ids=["text", "list", "keys", "string", "true", "inf", "huge", "extra", "deep", "bytes"],
)
def test_a_bad_line_is_named(path, line, message):
    content = json.dumps(vars(made(0))) + "\n" + line + "\n" + json.dumps(vars(made(1))) + "\n"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=rf"library\.jsonl:2: not an experience \(.*{message}") as failure:
        ExperienceLibrary(path)
    assert "\n" not in str(failure.value)


def test_a_folder_in_place_of_the_file_is_one_clear_line(path):
    path.mkdir()
    with pytest.raises(DataError, match=r"library\.jsonl: cannot .*directory"):
        ExperienceLibrary(path)


def test_numbers_and_metadata_that_json_does_not_hold_are_refused(path):
    with pytest.raises(ValueError, match="reward = nan"):
        made(0, reward=math.nan)
    library = ExperienceLibrary(path)
    for bad in ({"x": math.nan}, {"x": object()}):
        with pytest.raises(ValueError, match=r"metadata|JSON"):
            library.add([made(0), made(1, metadata=bad)])
    assert len(ExperienceLibrary(path)) == 0


def test_two_processes_that_write_at_once_lose_nothing(path):
    count = 60
    command = [sys.executable, library_process.__file__, str(path)]
    processes = [
        subprocess.Popen([*command, name, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    found = [experience.response.split()[:2] for experience in ExperienceLibrary(path).experiences]
    for name in ("a", "b"):
        assert [index for writer, index in found if writer == name] == [str(index) for index in range(count)]


def test_threads_that_share_a_library_lose_nothing(path):
    library = ExperienceLibrary(path)

    def write(name: int) -> None:
        for index in range(20):
            library.add([made(index, response=f"{name}-{index}")])
            library.prune(max_size=1000)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"{name}-{index}" for name in range(4) for index in range(20)}
    assert {experience.response for experience in library.experiences} == expected
    assert len(ExperienceLibrary(path)) == len(expected)


def test_ten_thousand_experiences_load_within_a_second_of_processor_time(path):
    text = 'fn main() { println!("{}", 1); }\n' * 20
    ExperienceLibrary(path).add(made(index, response=f"{text}{index}") for index in range(10_000))
    start = time.process_time()
    assert len(ExperienceLibrary(path)) == 10_000
    assert time.process_time() - start < 1


# --- groups -----------------------------------------------------------------------------------------------------------


def test_answers_above_the_threshold_of_a_group_are_kept(path):
    library = ExperienceLibrary(path, clock=lambda: 77.0)
    rewards = [0.0, 1.0, 0.5, 0.5]
    data = [{"index": index} for index in range(4)]
    kept = library.add_group("p", ["a", "b", "c", "d"], rewards, metadata=data)
    assert kept == [Experience("p", "b", 1.0, 0.5, 77.0, {"index": 1})]
    assert list(library.experiences) == kept
    assert len(library.add_group("p", ["a", "b", "c", "d"], rewards, threshold=-0.1)) == 3
    (best,) = library.add_group("p", ["a", "b", "c", "d"], rewards, standardise=True)
    assert best.advantage == pytest.approx(0.5 / math.sqrt(1 / 6), rel=1e-3)


def test_a_group_of_equal_rewards_leaves_nothing(path):
    library = ExperienceLibrary(path)
    assert library.add_group("p", ["a", "b", "c"], [0.1, 0.1, 0.1]) == []
    assert len(library) == 0


@pytest.mark.parametrize(
    ("responses", "rewards"),
    [(["a"], [1.0]), (["a", "b"], [1.0]), (["a", "b", "c"], [1, 0]), (["a", "b"], [1, math.nan])],
)
def test_a_group_of_one_and_lengths_that_differ_are_refused(path, responses, rewards):
    library = ExperienceLibrary(path)
    with pytest.raises(ValueError):  # noqa: PT011 - whichever of the three
        library.add_group("p", responses, rewards, threshold=-1)
    assert len(library) == 0


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_probabilities_are_the_softmax(temperature):
    advantages = [0.1, 0.5, 0.9, -0.3]
    weights = [math.exp(value / temperature) for value in advantages]
    expected = [weight / sum(weights) for weight in weights]
    assert np.exp(log_probabilities(advantages, temperature)).tolist() == pytest.approx(expected, rel=1e-12)


def test_extreme_advantages_and_temperatures_do_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        found = np.exp(log_probabilities([1e308, -1e308, 1e308, 0.0], 1e-300))
    assert found.tolist() == [0.5, 0, 0.5, 0]
    assert np.exp(log_probabilities([1e300, 0.0], 1e308)).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        log_probabilities([1.0], temperature)


def test_draws_have_the_probabilities_of_sequential_drawing(path):
    library = ExperienceLibrary(path)
    advantages = [0.0, 0.5, 1.0]
    library.add(made(index, advantage=advantage) for index, advantage in enumerate(advantages))
    random, n = np.random.default_rng(1), 20_000
    found = Counter(tuple(e.metadata["task"] for e in library.sample(2, random, temperature=0.7)) for _ in range(n))
    weights = [math.exp(advantage / 0.7) for advantage in advantages]
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            p = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
            # Five standard deviations of a binomial share.
            assert found[first, second] / n == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


def test_a_cold_draw_is_the_best_and_a_seed_repeats_a_draw(path):
    library = ExperienceLibrary(path)
    library.add(made(index, advantage=index / 10) for index in range(10))
    cold = library.sample(3, np.random.default_rng(0), temperature=1e-300)
    assert [e.metadata["task"] for e in cold] == [9, 8, 7]
    draws = [library.sample(4, np.random.default_rng(seed)) for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]


def test_the_current_prompt_is_left_out_and_no_pair_occurs_twice(path):
    library = ExperienceLibrary(path)
    library.add([made(index) for index in range(14)] + [made(1)] * 5)
    drawn = library.sample(100, np.random.default_rng(0), exclude_prompt="prompt 3")
    assert len(drawn) == 12
    assert len({(e.prompt, e.response) for e in drawn}) == 12
    assert "prompt 3" not in {e.prompt for e in drawn}


def test_white_space_at_the_end_of_a_prompt_does_not_let_its_answers_through(path):
    library = ExperienceLibrary(path)
    for prompt in ("def f():\n", "def f():", "def f():\n    ", "def g():\n"):
        library.add_group(prompt, ["right", "wrong"], [1.0, 0.0])
    for asked in ("def f():", "def f():\n"):
        assert {one.prompt for one in library.without([asked])} == {"def g():\n"}
        drawn = library.sample(100, np.random.default_rng(0), exclude_prompt=asked)
        assert {one.prompt for one in drawn} == {"def g():\n"}


# --- pruning, statistics, prompts -------------------------------------------------------------------------------------


def test_pruning_goes_by_age_and_then_keeps_the_best_in_their_order(path):
    library = ExperienceLibrary(path, clock=lambda: 1009.0)
    advantages = [0.9, 0.1, 0.3, 0.8, 0.2, 0.8, 0.1, 0.1, 0.4, 0.0]
    library.add(made(index, advantage=advantage) for index, advantage in enumerate(advantages))
    assert library.prune() == 0
    assert library.prune(max_age=7.0) == 2  # the best of all is among the old ones
    assert library.prune(max_age=7.0, max_size=3) == 5
    assert [e.metadata["task"] for e in library.experiences] == [3, 5, 8]
    assert list(ExperienceLibrary(path).experiences) == list(library.experiences)
    assert library.prune(max_size=0) == 3
    assert len(library) == 0


def test_equal_advantages_are_pruned_by_reward_and_then_by_age(path):
    library = ExperienceLibrary(path)
    library.add([made(0, reward=1.0), made(1, reward=0.5), made(2, reward=0.5)])
    library.prune(max_size=2)
    assert [e.metadata["task"] for e in library.experiences] == [0, 2]


def test_statistics_count_and_average(path):
    library = ExperienceLibrary(path)
    library.add(made(index, reward=index / 10, advantage=index / 20) for index in range(9))
    found = library.statistics()
    assert (found.experiences, found.prompts, found.best_reward) == (9, 7, 0.8)
    assert (found.oldest, found.newest) == (1000.0, 1008.0)
    assert (found.mean_reward, found.mean_advantage) == pytest.approx((0.4, 0.2))


def test_examples_precede_the_prompt_with_the_best_one_last():
    examples = [
        made(0, prompt="P0:", response="R0\n", advantage=0.2),
        made(1, prompt="P1:", response="R1", advantage=0.9),
        made(2, prompt="P2:", response="R2", advantage=0.5),
    ]
    assert few_shot_prompt(examples, "Q:") == "P0:R0\n\nP2:R2\n\nP1:R1\n\nQ:"
    assert few_shot_prompt(examples, "Q:", fits=lambda text: len(text) <= 16) == "P2:R2\n\nP1:R1\n\nQ:"
    assert few_shot_prompt(examples, "Q:", fits=lambda _: False) == "Q:"
    assert few_shot_prompt([], "Q:") == "Q:"
