"""The plan of several ranks against what they send and hold: torch's fake group of any size, real ones over gloo."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_cli.bench.micro.architectures import HONEST_MEMORY
from nanochat_cli.cli.app import main
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.diagnose.plan.memory import training_memory
from nanochat_cli.diagnose.plan.ranks import Exchange, OwnedPlan
from nanochat_cli.diagnose.plan.sharded_ranks import ShardedPlan
from nanochat_cli.diagnose.plan.show import plan_of
from nanochat_cli.report.reporter import SilentReporter
from nanochat_cli.training.build import build_state
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.distributed.sharded import Sharded
from nanochat_cli.training.next_token import next_token_loss
from nanochat_cli.training.update import gradient

NARROW = ["model.dim=128", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1", "model.ffn_dim=256"]
TINY = [*NARROW, "model.vocab_size=300", "train.batch_size=1", "train.seq_len=32", "optim.muon_format=fp32"]


def configured(units: int, *overrides: str) -> Config:
    return resolve_config(["quickstart"], None, [*TINY, f"train.grad_accum={units}", *overrides])


class Counted(TorchDispatchMode):
    """What a rank gives to collectives and takes from them, in bytes."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.sent = self.received = self.weights = self.small = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.alltoall_base_.default:
            output, given, _, *splits = args[:5]
            came, gone = (of[self.rank] if of else given.numel() // dist.get_world_size() for of in splits)
            self.sent += given.nbytes - gone * given.itemsize
            self.received += output.nbytes - came * output.itemsize
            output.zero_()  # which may be codes; nobody sends any
        elif func is torch.ops.c10d.broadcast_.default:
            for tensor in args[0] if args[2] != self.rank else ():
                self.weights += tensor.nbytes
                tensor.zero_()
        elif func is torch.ops.c10d._allgather_base_.default:
            self.weights += args[0].nbytes - args[1].nbytes
            args[0].zero_()
        elif func is torch.ops.c10d.allreduce_.default:
            self.small += sum(tensor.nbytes for tensor in args[0])
        else:
            assert "c10d" not in str(func), f"{func} is not counted"
        return func(*args, **(kwargs or {}))


@contextmanager
def one_of(ranks: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    """The rank alone, in a group whose collectives do nothing."""
    launched = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield Group(torch.device("cpu"), FakeStore(), 1)
    finally:
        dist.destroy_process_group()


def exchanged(config: Config, group: Group) -> Counted:
    owned = build_state(config, group.device, SilentReporter(), group=group).owned
    assert owned is not None
    with Counted(group.rank) as counted:
        owned.begin([])
        for unit in owned.units:
            owned.collect(unit, {"loss/main": torch.zeros(())})  # zeros for gradients
        owned.finish([])
        owned.publish()
    return counted


@pytest.mark.parametrize(
    ("ranks", "rank", "units", "overrides"),
    [
        (8, 0, 8, []),
        (8, 3, 21, ["mtp.enabled=true", "mtp.n_tokens=2"]),
        (8, 7, 9, ["model.quant.scale=64"]),
        (64, 1, 64, ["model.moe.enabled=true", "model.moe.experts=4"]),
        (1024, 2, 1024, []),
        (1024, 1023, 1500, []),
    ],
)
def test_bytes_of_a_step_are_those_that_a_rank_gives_to_collectives(monkeypatch, ranks, rank, units, overrides):
    config = configured(units, *overrides)
    with one_of(ranks, rank, monkeypatch) as group:
        found = exchanged(config, group)
    planned = OwnedPlan(config, ranks).exchange(range(rank, rank + 1), range(ranks))
    assert planned == Exchange(found.sent, found.received, found.weights)
    assert found.small < 0.02 * planned.total  # what the plan leaves out


FSDP = "distributed.mode=fsdp"


def storages(tensors: Any) -> int:
    """Bytes of memory behind tensors that share none."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize(
    ("ranks", "rank", "turns", "overrides"),
    [(8, 3, 2, []), (2, 1, 3, ["mtp.enabled=true", "mtp.n_tokens=2"]), (64, 5, 1, ["model.quant.scale=64"])],
)
def test_bytes_and_memory_of_mode_fsdp_are_those_that_a_rank_exchanges_and_holds(
    monkeypatch, ranks, rank, turns, overrides
):
    config = configured(turns * ranks, FSDP, *overrides)
    plan = ShardedPlan(config, ranks)
    with one_of(ranks, rank, monkeypatch) as group:
        state = build_state(config, group.device, SilentReporter(), group=group)
        owned = state.owned
        assert isinstance(owned, Sharded)
        with Counted(rank):
            owned.publish()
        tokens = torch.zeros(turns, config.train.seq_len, dtype=torch.int64)
        with Counted(rank) as counted:
            gradient(state, turns, next_token_loss(state, tokens, tokens))
            owned.publish()
        planned, rows = plan.exchange(range(rank, rank + 1), range(ranks)), sum(plan.rows) // ranks
        # rows go back as gradients came, by the same collective
        assert counted.sent - planned.gradients_sent == pytest.approx(plan.rows[rank] * (1 - 1 / ranks), abs=8)
        assert counted.received + counted.weights == planned.gradients_received + planned.weights
        assert sum(plan.rows) <= 0.141 * 2 * sum(plan.cut)  # of bf16; with a scale for 64 weights it is 9 / 64
        held = [name for name in owned.parameters if name in owned.mine or name not in owned.layers]
        memory = plan.memory_of(rank, training_memory(config))
        assert sum(owned.parameters[name].nbytes for name in held) == memory.latents
        forgotten = 4 * (len(owned.parameters) - len(held))
        assert storages(owned.parameters.values()) == memory.latents + forgotten
        assert state.optimizers.state_bytes() == memory.optimizer
        assert sum(shard.rows.numel() for shard in owned.shards.values()) == rows
        assert storages(layer.operand for name, layer in owned.layers.items() if owned.is_cut(name)) == 0


@pytest.mark.parametrize("ranks", [2, 8, 24])
def test_what_all_ranks_send_is_what_all_receive_and_machines_carry_what_leaves_them(ranks):
    plan = OwnedPlan(configured(24), ranks)
    every = range(ranks)
    alone = [plan.exchange(every[rank : rank + 1], every) for rank in every]
    assert sum(one.gradients_sent for one in alone) == sum(one.gradients_received for one in alone)
    machines = [every[: ranks // 2], every[ranks // 2 :]]
    inside = [plan.exchange(every[rank : rank + 1], machine) for machine in machines for rank in machine]
    between = [plan.exchange(machine, every) for machine in machines]
    assert sum(one.gradients_sent for one in (*inside, *between)) == sum(one.gradients_sent for one in alone)
    assert between[0].gradients_sent == between[1].gradients_received
    assert sum(one.weights for one in between) == sum(plan.weights)


def test_a_matrix_that_has_one_owner_is_received_from_every_rank():
    """Beyond as many ranks as matrices the busiest receives in proportion to the ranks."""
    few, many = (OwnedPlan(configured(512), ranks).links(ranks)[0].exchange for ranks in (256, 512))
    assert many.gradients_received == pytest.approx(2 * few.gradients_received, rel=0.01)
    assert many.gradients_sent == few.gradients_sent


def test_links_are_those_of_ranks_within_a_machine_and_of_machines():
    plan = OwnedPlan(configured(8), 8)
    assert {link.of for link in plan.links(8)} == {"rank"}
    assert {link.of for link in plan.links(4)} == {"rank", "machine"}
    assert {link.of for link in plan.links(1)} == {"machine"}
    for link in plan.links(4):
        one = link.exchange
        assert link.seconds == (max(one.gradients_sent, one.gradients_received) + one.weights) / link.rate


def real(ranks: int, overrides: list[str]) -> list[dict[str, int]]:
    """What so many processes measure."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.diagnose.exchanging_rank", "quickstart", *overrides],
            env={
                **{**os.environ, **HONEST_MEMORY, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    return sorted(found, key=lambda one: one["rank"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "units", "mode"),
    [(2, 2, "owned"), (2, 7, "owned"), (4, 4, "owned"), (4, 6, "owned"), (2, 4, "fsdp"), (4, 4, "fsdp")],
)
def test_bytes_of_a_step_are_those_that_gloo_s_connections_carry(ranks, units, mode):
    overrides = [
        f"distributed.mode={mode}",
        *NARROW,
        "train.batch_size=1",
        "train.seq_len=32",
        f"train.grad_accum={units}",
        "optim.muon_format=fp32",
    ]
    found = real(ranks, overrides)
    plan = plan_of(resolve_config(["quickstart"], None, overrides), ranks)
    planned = [plan.exchange(range(rank, rank + 1), range(ranks)) for rank in range(ranks)]
    for one, measured in zip(planned, found, strict=True):
        assert measured["received"] == pytest.approx(one.gradients_received + one.weights, rel=0.02)
        assert measured["sent"] >= one.gradients_sent
    total = sum(one.gradients_sent + one.weights for one in planned)
    assert sum(measured["sent"] for measured in found) == pytest.approx(total, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["owned", "fsdp"])
@pytest.mark.parametrize("overrides", [["train.grad_accum=2"], ["train.grad_accum=8", "train.batch_size=2"]])
def test_predicted_memory_of_a_rank_is_within_ten_percent_of_the_measured(overrides, mode):
    overrides = [*overrides, f"distributed.mode={mode}"]
    config = resolve_config(["quickstart"], None, overrides)
    predicted = plan_of(config, 2).memory(training_memory(config)).peak
    assert predicted == pytest.approx(max(one["peak_bytes"] for one in real(2, overrides)), rel=0.10)


def test_a_rank_holds_its_own_latents_and_state_and_everything_else_whole():
    config = configured(4)
    whole = training_memory(config)
    ranks = OwnedPlan(config, 4)
    of_ranks = [ranks.memory_of(rank, whole) for rank in range(4)]
    with torch.device("meta"):
        state = build_state(config, torch.device("meta"), SilentReporter())
    ternary = 4 * sum(layer.weight.numel() for layer in state.linears.values())
    assert sum(one.latents for one in of_ranks) == ternary + 4 * (whole.latents - ternary)
    assert sum(one.optimizer for one in of_ranks) == whole.optimizer
    assert {one.quantised for one in of_ranks} == {whole.quantised}
    assert {one.gradients for one in of_ranks} == {whole.gradients}


@pytest.mark.parametrize(("ranks", "units", "most"), [(1, 8, 3), (2, 8, 2), (8, 8, 0), (2, 6, 2), (4, 6, 1)])
def test_sums_of_earlier_units_are_as_many_as_a_balanced_tree_leaves(ranks, units, most):
    """Of 8 units on one rank, while the last is computed: those of 4, of 2 and of 1."""
    config = configured(units)
    plan, whole = OwnedPlan(config, ranks), training_memory(config)
    of_ranks = [plan.memory_of(rank, whole) for rank in range(ranks)]
    assert max(one.earlier_gradients for one in of_ranks) == most * whole.gradients


def planned(capsys: pytest.CaptureFixture[str], tmp_path: Any, *words: str) -> tuple[dict[str, Any], str]:
    file = tmp_path / "plan.json"
    overrides = [word for setting in (*TINY, "train.grad_accum=16") for word in ("--set", setting)]
    assert main(["plan", *overrides, "--peak-flops", "1e12", "--tokens", "100000", *words, "--json", str(file)]) == 0
    return json.loads(file.read_text()), capsys.readouterr().out


def test_plan_prints_memory_bytes_and_time_of_ranks(capsys, tmp_path):
    alone, _ = planned(capsys, tmp_path)
    found, text = planned(capsys, tmp_path, "--devices", "16", "--mode", "owned", "--per-machine", "4")
    assert "on the fullest of 16 ranks" in text
    assert "NVLink 4, of a rank" in text
    assert "10 Gb/s network, of a machine" in text
    assert found["memory"]["latents"] < alone["memory"]["latents"]
    assert found["seconds"] == pytest.approx(alone["seconds"] / 16)
    assert found["links"][0]["name"] == "NVLink 4"
    assert "links" not in alone
    cut, _ = planned(capsys, tmp_path, "--devices", "16", "--mode", "fsdp", "--per-machine", "4")
    assert cut["memory"]["latents"] == found["memory"]["latents"]
    assert cut["memory"]["peak"] < found["memory"]["peak"]
    assert cut["links"][0]["exchange"]["weights"] > found["links"][0]["exchange"]["weights"]


def test_more_ranks_than_units_are_refused_as_in_training(capsys):
    assert main(["plan", "--devices", "4"]) == 2
    assert "4 ranks need at least one micro-batch each" in capsys.readouterr().err
