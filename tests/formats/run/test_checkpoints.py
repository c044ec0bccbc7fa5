"""Checkpoints: exact round trip, crash safety at every instant, and damage that is reported, never hidden."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nanochat_cli.errors import DataError
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.formats.run.checkpoints import load, prepare, prune, publish, save, steps, write
from nanochat_cli.formats.run.same_model import require_same_model

MODEL = {"dim": 8, "n_layers": 2, "quant": {"scale": "row"}}
SAVING_PROCESS = Path(__file__).with_name("saving_process.py")


def simple(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((3, 4), float(step))}, "optimizer": {"count": step}}


def save_steps(run_dir: Path, *numbers: int) -> None:
    for number in numbers:
        save(run_dir, number, simple(number), {"data_position": number}, model_config=MODEL)


def same(left: Any, right: Any) -> bool:
    """Exact equality of nested values, with types, dtypes, shapes and NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.numpy(force=True).tobytes() == right.numpy(force=True).tobytes()
        )
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# --- round trip ---------------------------------------------------------------------------------------------------


def test_everything_comes_back_with_its_type_dtype_shape_and_bits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    shared = torch.randn(4, 6, generator=generator)
    tensors = {
        "model": {
            "embedding.weight": shared,
            "blocks.0.wq.weight": shared.t(),
            "codes": torch.randint(-1, 2, (5, 128), generator=generator, dtype=torch.int8),
            "view": shared[1:3, ::2],
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 4),
            "flag": torch.tensor([True, False]),
            "parameter": torch.nn.Parameter(torch.tensor([float("nan"), -0.0, 1e-45])).detach(),
        },
        "optimizer": {
            "groups": [
                {"lr": 0.02, "betas": (0.8, 0.95), "step": torch.tensor(12)},
                {"lr": math.inf, "names": ["a", "b"]},
            ],
            "state": {0: {"momentum": torch.randn(2, 2, generator=generator).double()}, 1: {}},
            "rng": checkpoints.rng_state(),
            "nothing": None,
        },
        "plain": {"only": [1, 2.5, "x", True]},
    }
    state = {
        "step": 5,
        "best_bpb": 2.0371234567890123,
        "skips": {"mean": float("nan"), "window": [(1, 2.0)]},
        "name": "é",
    }
    save(tmp_path, 5, tensors, state, model_config=MODEL)
    loaded = load(tmp_path)
    assert loaded.step == 5
    assert loaded.model_config == MODEL
    assert same(loaded.tensors, tensors)
    assert same(loaded.state, state)


def test_model_file_is_plain_safetensors_with_the_names_of_the_state_dict(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    folder = save(tmp_path, 500, {"model": layer.state_dict()}, {}, model_config=MODEL)
    assert folder == tmp_path / "checkpoints" / "step-000500"
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert same(dict(sorted(stored.items())), dict(sorted(layer.state_dict().items())))
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000500\n"


def test_random_numbers_continue_where_they_were_saved(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(17)
    save(tmp_path, 1, {"optimizer": {"rng": checkpoints.rng_state()}}, {}, model_config=MODEL)
    expected = torch.randn(100)
    checkpoints.restore_rng_state(load(tmp_path).tensors["optimizer"]["rng"])
    assert torch.equal(torch.randn(100), expected)


def test_values_that_are_neither_tensors_nor_plain_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^a/b: cannot save a object"):
        save(tmp_path, 1, {"optimizer": {"a": {"b": object()}}}, {}, model_config=MODEL)
    with pytest.raises(TypeError, match=r"state/rng: a tensor belongs in"):
        save(tmp_path, 1, {}, {"rng": torch.zeros(1)}, model_config=MODEL)
    with pytest.raises(TypeError, match=r"two tensors have the key 'a/b'"):
        save(tmp_path, 1, {"model": {"a/b": torch.zeros(1), "a": {"b": torch.zeros(1)}}}, {}, model_config=MODEL)
    assert steps(tmp_path) == []


# --- several processes --------------------------------------------------------------------------------------------


def saved_by_three(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's folder, and what three processes have written into it together."""
    generator = torch.Generator().manual_seed(11)
    weights = {f"blocks.{i}.weight": torch.randn(3, i + 1, generator=generator) for i in range(5)}
    state = {name: {"momentum": torch.randn(2, 2, generator=generator), "step": 4} for name in weights}
    whole = {"model": weights, "optimizer": {"matrix": state, "scalar": {}}, "random": {"cpu": torch.tensor([7])}}
    prepare(run_dir, 7)
    written = []
    for process in range(3):
        names = list(weights)[process::3]
        share: dict[str, Any] = {
            "model": {name: weights[name] for name in names},
            "optimizer": {"matrix": {name: state[name] for name in names}} | ({} if process else {"scalar": {}}),
            "random": {} if process else whole["random"],
        }
        written.append(json.loads(json.dumps(write(run_dir, 7, share, process, 3))))
    return publish(run_dir, 7, written, {"step": 7}, model_config=MODEL, best=True), whole


def in_order(tree: Any) -> Any:
    return {key: in_order(tree[key]) for key in sorted(tree)} if isinstance(tree, dict) else tree


def test_what_several_processes_wrote_comes_back_as_one(tmp_path: Path) -> None:
    folder, whole = saved_by_three(tmp_path)
    loaded = load(tmp_path, "best")
    assert same(in_order(loaded.tensors), in_order(whole))
    assert (loaded.step, loaded.state, set(loaded.sha256)) == (7, {"step": 7}, {"model", "optimizer", "random"})
    numbers = [f"-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    files = [f"{part}{number}" for part in ("model", "optimizer") for number in numbers]
    assert sorted(path.name for path in folder.iterdir()) == [*files, f"random{numbers[0]}", "state.json"]
    assert set(safetensors.torch.load_file(folder / f"model{numbers[1]}")) == {"blocks.1.weight", "blocks.4.weight"}
    save(tmp_path, 7, whole, {}, model_config=MODEL)  # as a run does that goes on in one process
    assert same(load(tmp_path).tensors, whole)
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("number", [1, 2, 3])
def test_damage_to_the_file_of_any_process_is_an_error(tmp_path: Path, number: int) -> None:
    save_steps(tmp_path, 1)
    folder, _ = saved_by_three(tmp_path)
    file = folder / f"optimizer-0000{number}-of-00003.safetensors"
    flip_bit(file, -1)
    with pytest.raises(DataError, match=f"{file.name} does not match its SHA-256; the newest intact one is step 1"):
        load(tmp_path)


# --- pointers and pruning -----------------------------------------------------------------------------------------


def test_latest_best_and_a_step_number_choose_the_checkpoint(tmp_path: Path) -> None:
    for number in (10, 20, 30):
        save(tmp_path, number, simple(number), {}, model_config=MODEL, best=number == 20)
    assert [load(tmp_path, which).step for which in ("latest", "best", 10)] == [30, 20, 10]
    assert checkpoints.latest_step(tmp_path) == 30
    with pytest.raises(DataError, match=r"no checkpoint of step 15 \(saved steps: 10, 20, 30\)"):
        load(tmp_path, 15)


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no `latest` checkpoint .*train first"):
        load(tmp_path)
    assert checkpoints.latest_step(tmp_path) is None
    assert prune(tmp_path, 2) == []


def test_prune_keeps_the_last_the_best_and_the_pointed_and_removes_leftovers(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for number in range(1, 8):
        save(tmp_path, number, simple(number), {}, model_config=MODEL, best=number == 3)
    for leftover in (".tmp-step-000009", ".removed-step-000001"):
        (root / leftover).mkdir()
        (root / leftover / "model.safetensors").write_bytes(b"half")
    (root / ".tmp-latest").write_text("step-")
    assert prune(tmp_path, 2, best_step=2) == [1, 4, 5]
    assert steps(tmp_path) == [2, 3, 6, 7]
    assert sorted(path.name for path in root.iterdir() if path.name.startswith(".")) == []


def test_prune_after_continuing_from_an_earlier_step_leaves_the_later_ones(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 8, 9, 4)
    assert prune(tmp_path, 2) == [1, 2]
    assert steps(tmp_path) == [3, 4, 8, 9]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    save(tmp_path, 2, simple(99), {"again": True}, model_config=MODEL)
    loaded = load(tmp_path)
    assert loaded.state == {"again": True}
    assert loaded.tensors["model"]["weight"][0, 0] == 99
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-000001",
        "step-000002",
    ]


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: flip_bit(folder / "model.safetensors", -1), "model.safetensors does not match its SHA-256"),
        (lambda folder: os.truncate(folder / "model.safetensors", 40), "model.safetensors has 40 bytes instead of"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: os.truncate(folder / "state.json", 30), "state.json is not a state file"),
        (lambda folder: (folder / "state.json").write_text("[]"), "state.json is not a state file"),
        (
            lambda folder: (folder / "state.json").write_text(
                (folder / "state.json").read_text().replace('"data_position": 3', '"data_position": 7')
            ),
            "state.json does not match its SHA-256",
        ),
    ],
)
def test_damage_is_an_error_that_names_the_newest_intact_checkpoint(
    tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "checkpoints" / "step-000003")
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert told in str(caught.value)
    assert "newest intact one is step 2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load(tmp_path, 2).state == {"data_position": 2}


def test_when_every_checkpoint_is_damaged_the_error_says_so(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for number in (1, 2):
        flip_bit(tmp_path / "checkpoints" / f"step-00000{number}" / "model.safetensors", -1)
    with pytest.raises(DataError, match=r"step-000002 is damaged: .*; no other is intact"):
        load(tmp_path)


def test_a_damaged_pointer_is_an_error(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "checkpoints" / "latest").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match=r"latest holds .*write the name of a checkpoint folder"):
        load(tmp_path)


# --- crash safety -------------------------------------------------------------------------------------------------


def test_kill_at_random_moments_always_leaves_a_whole_checkpoint_no_older_than_the_last_finished_save(
    tmp_path: Path,
) -> None:
    sys.path.insert(0, str(SAVING_PROCESS.parent))
    try:
        from saving_process import tensors_of
    finally:
        sys.path.pop(0)
    moments = random.Random(1234)
    count, acknowledged = 0, -1
    with subprocess.Popen(
        [sys.executable, str(SAVING_PROCESS), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for _ in range(15):
            server.stdin.write(f"{count}\n")
            server.stdin.flush()
            child = int(server.stdout.readline().removeprefix("child "))
            saves = moments.randint(1, 4)
            started = time.perf_counter()
            for _ in range(saves):
                acknowledged = int(server.stdout.readline().removeprefix("saved "))
            # The moment of the kill: a random share of two saves after the last acknowledged one.
            until = time.perf_counter() + moments.uniform(0, 2) * (time.perf_counter() - started) / saves
            while time.perf_counter() < until:
                pass
            os.kill(child, signal.SIGKILL)
            while (line := server.stdout.readline()) != "dead\n":
                acknowledged = int(line.removeprefix("saved "))
            loaded = load(tmp_path)
            count = loaded.state["count"]
            assert acknowledged <= count <= acknowledged + 1
            assert loaded.step == count % 10
            assert same(loaded.tensors, tensors_of(count))
            assert load(tmp_path, "best").state["count"] % 3 == 0 or count < 3
            count += 1
        server.stdin.close()


FILE_OPERATIONS = [
    (os, "mkdir"),
    (os, "open"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (checkpoints.shutil, "rmtree"),
    (checkpoints.safetensors_torch, "save_file"),
    (Path, "open"),
]


@pytest.mark.parametrize("existing", [False, True], ids=["new step", "step saved again"])
def test_a_failure_of_any_file_operation_is_one_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    save_steps(tmp_path, 1, *([2] if existing else []))
    allowed = 0

    def failing_after(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal remaining
            if kwargs.get("ignore_errors"):
                return original(*args, **kwargs)
            remaining -= 1
            if remaining < 0:
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        return operation

    while True:
        remaining = allowed
        with monkeypatch.context() as patch:
            for module, name in FILE_OPERATIONS:
                patch.setattr(module, name, failing_after(getattr(module, name)))
            try:
                save(tmp_path, 2, simple(20 + allowed), {"data_position": 20 + allowed}, model_config=MODEL, best=True)
                message = None
            except DataError as error:
                message = str(error)
        loaded = load(tmp_path)
        # Whole, and one that was there before: an attempt that failed after its rename has replaced step 2 already.
        assert same(loaded.tensors, simple(loaded.state["data_position"]))
        assert loaded.state["data_position"] in {2 if existing else 1, *range(20, 21 + allowed)}
        if message is None:
            break
        assert "No space left on device" in message
        assert "\n" not in message
        allowed += 1
    assert allowed > 12, "the operations of a save are really being failed one after the other"
    assert load(tmp_path).state == {"data_position": 20 + allowed} == load(tmp_path, "best").state
    prune(tmp_path, 2)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_disk_that_is_full_is_one_error_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # The kernel refuses to let any file grow past 64 KiB, in the middle of the tensors.
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(
            DataError, match=r"cannot save the checkpoint of step 2 .*the checkpoint of step 1 is intact"
        ):
            save(tmp_path, 2, {"model": {"weight": torch.zeros(65536)}}, {}, model_config=MODEL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert load(tmp_path).step == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000001"]


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot save the checkpoint of step 1 in .*checkpoints"):
        save(tmp_path, 1, simple(1), {}, model_config=MODEL)


# --- another model ------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_names_the_first_key_or_tensor_that_differs(tmp_path: Path) -> None:
    save(tmp_path, 1, {"model": {"w": torch.zeros(2, 3)}}, {}, model_config=MODEL)
    checkpoint = load(tmp_path)
    require_same_model(checkpoint, MODEL, {"w": torch.ones(2, 3)})
    require_same_model(checkpoint, {**MODEL, "added_later": 1}, {"w": torch.ones(2, 3)})
    with pytest.raises(DataError, match=r"another model: model.n_layers is 2 there and 3 here"):
        require_same_model(checkpoint, {**MODEL, "n_layers": 3}, {"w": torch.ones(2, 3)})
    with pytest.raises(DataError, match=r"model.quant.scale is 'row' there and 128 here"):
        require_same_model(checkpoint, {**MODEL, "quant": {"scale": 128}}, {"w": torch.ones(2, 3)})
    with pytest.raises(DataError, match=r"tensor w is \[2, 3\] there and \[3, 2\] here"):
        require_same_model(checkpoint, MODEL, {"w": torch.ones(3, 2)})
    with pytest.raises(DataError, match=r"it has no tensor v \[1\]"):
        require_same_model(checkpoint, MODEL, {"w": torch.ones(2, 3), "v": torch.ones(1)})
    with pytest.raises(DataError, match=r"its tensor w \[2, 3\] has no place here"):
        require_same_model(checkpoint, MODEL, {})


def test_fingerprint_depends_on_values_and_not_on_key_order() -> None:
    assert checkpoints.fingerprint({"a": 1, "b": [2]}) == checkpoints.fingerprint({"b": [2], "a": 1})
    assert checkpoints.fingerprint({"a": 1, "b": [2]}) != checkpoints.fingerprint({"a": 1, "b": [3]})


# --- a training that goes on ----------------------------------------------------------------------------------------


def test_a_checkpoint_removed_while_being_read_is_read_again_and_a_named_one_is_an_error(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)
    verify, moved = checkpoints._verified_document, []

    def verify_late(folder: Path) -> dict[str, Any]:
        if not moved:
            moved.append(folder)
            save_steps(tmp_path, 3, 4)
            prune(tmp_path, keep_last=1)
        return verify(folder)

    monkeypatch.setattr(checkpoints, "_verified_document", verify_late)
    found = load(tmp_path)
    assert moved[0].name == "step-000002"
    assert (found.step, found.state) == (4, {"data_position": 4})
    moved.clear()
    save_steps(tmp_path, 2, 4)  # `latest` is 4 again
    with pytest.raises(DataError, match=r"there is no checkpoint of step 2 \(saved steps: 4\)"):
        load(tmp_path, 2)


def test_a_checkpoint_replaced_while_being_read_is_read_again(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    verify, replaced = checkpoints._verified_document, []

    def verify_across(folder: Path) -> dict[str, Any]:
        document = verify(folder)
        if not replaced:
            replaced.append(folder)
            save(tmp_path, 1, simple(7), {"data_position": 7}, model_config=MODEL)
            raise checkpoints._DamageError("half of it is new")
        return document

    monkeypatch.setattr(checkpoints, "_verified_document", verify_across)
    assert load(tmp_path).state == {"data_position": 7}
