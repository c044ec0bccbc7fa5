"""What mode `owned` asks of W ranks, from the configuration alone: memory of a rank, bytes of a step, time on a link.

Who owns what, which sums of gradients a rank sends and how many bytes a weight takes are the trainer's own functions.
Here are the formulae. Rank r owns P_r of P trained numbers, which take B_r of B bytes on the wire: two bits each and a
scale per row where they are ternary, float32 elsewhere. Its units leave n_r of n sums of gradients. In a step

    gradients   r sends 4 · n_r · (P − P_r) bytes to the owners, and receives 4 · P_r · (n − n_r)
    weights     r receives B − B_r; whoever passes them on, each crosses the link of every other rank once

and likewise the ranks of a machine together, whose link leads to the other machines. Norms, losses and counters are
some kilobytes and not counted, nor is latency. Nothing overlaps: gradients travel after the last unit.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

from nanochat_cli.config.schema import Config
from nanochat_cli.diagnose.plan.memory import MUON_COPIES, Memory, largest_stack
from nanochat_cli.model.mtp import build_mtp
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer
from nanochat_cli.optim.build import trained_parameters
from nanochat_cli.training.build import divide
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.distributed.ranks import units_of
from nanochat_cli.training.distributed.tree import Node, TreeSum, nodes_of
from nanochat_cli.training.part import linears_of

OF_A_RANK = {"NVLink 4": 450e9, "PCIe 4.0 × 16": 31.5e9}
"""Between the ranks of a machine: bytes per second in each direction, of each rank's own link."""
OF_A_MACHINE = {"100 Gb/s network": 12.5e9, "10 Gb/s network": 1.25e9}
"""Between machines: of a link that the ranks of a machine share."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. peak: the largest of the end of a forward or backward pass, the exchange, and the step."""

    latents: int
    """Of the matrices that it owns, and all other parameters."""
    quantised: int
    """Codes and scales of all matrices."""
    optimizer: int
    earlier_gradients: int
    """Sums of the units before one."""
    gradients: int
    """Of a unit."""
    activations: int
    logits: int
    exchange: int
    """Gradients as they are sent, once apart and once joined, and what arrives from all ranks."""
    step: int
    """Gradients of what it owns, and temporary memory of the optimizer."""

    @property
    def peak(self) -> int:
        held = self.latents + self.quantised + self.optimizer
        unit = self.earlier_gradients + max(self.activations + self.logits, self.gradients)
        return held + max(unit, self.exchange, self.step)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "peak": self.peak}


@dataclass(frozen=True)
class Exchange:
    """Bytes that cross a link in a step: gradients to their owners, out and in, and weights from their owners."""

    gradients_sent: int
    gradients_received: int
    weights: int

    @property
    def total(self) -> int:
        """In the busier direction: a link carries both at once."""
        return max(self.gradients_sent, self.gradients_received) + self.weights


@dataclass(frozen=True)
class Link:
    """What every rank, or every machine, has one of; exchange: over the busiest. rate: bytes per second."""

    name: str
    of: Literal["rank", "machine"]
    rate: float
    exchange: Exchange

    @property
    def seconds(self) -> float:
        return self.exchange.total / self.rate

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "seconds": self.seconds}


class OwnedPlan:
    """By rank: numbers that it owns, their bytes on the wire, and how many sums of gradients it sends."""

    def __init__(self, config: Config, ranks: int) -> None:
        self.config, self.ranks, units = config, ranks, config.train.grad_accum
        with torch.device("meta"):
            self._model = Transformer(config.model)
            mtp = build_mtp(config.model, config.mtp)
        self._beside: dict[str, nn.Module] = {} if mtp is None else {"mtp": mtp}
        group = Group(torch.device("meta"))
        group.size = ranks
        parameters = trained_parameters(self._model, self._beside)
        self._owned = divide(config, group, parameters, linears_of(self._model, self._beside), self._model)
        self.numbers = [sum(self._owned.parameters[n].numel() for n in names) for names in self._owned.names]
        self.weights = self._owned.weight_bytes
        self.units = [units_of(rank, ranks, units) for rank in range(ranks)]
        self.sums = [len(nodes_of(run, units)) for run in self.units]

    def memory(self, whole: Memory) -> RankMemory:
        """Of the rank that needs the most. whole: of a single process, on the same device."""
        return max((self.memory_of(rank, whole) for rank in range(self.ranks)), key=lambda memory: memory.peak)

    def memory_of(self, rank: int, whole: Memory) -> RankMemory:
        owned, optim, all_numbers = self._owned, self.config.optim, sum(self.numbers)
        of_rank = {name: owned.parameters[name] for name in owned.names[rank]}
        ternary = [owned.layers[name] for name in of_rank if name in owned.layers]
        elsewhere = sum(layer.weight.numel() for name, layer in owned.layers.items() if owned.owner[name] != rank)
        buffers = MUON_COPIES * 4 * largest_stack(ternary) if optim.matrix == "muon" else 0
        travelling = 2 * self.sums[rank] * all_numbers + self.numbers[rank] * sum(self.sums)
        return RankMemory(
            latents=4 * (all_numbers - elsewhere),
            quantised=whole.quantised,
            optimizer=build_optimizer(self._model, optim, self._beside, of_rank).state_bytes(),
            earlier_gradients=4 * all_numbers * self._most_sums(rank),
            gradients=4 * all_numbers,
            activations=whole.activations,
            logits=whole.logits,
            exchange=4 * travelling if self.ranks > 1 else 0,
            step=4 * self.numbers[rank] + buffers,
        )

    def _most_sums(self, rank: int) -> int:
        """Of gradients that the rank holds while it computes a unit."""
        tree: TreeSum[None] = TreeSum(self.config.train.grad_accum, lambda left, right: None)
        held = []
        for unit in self.units[rank]:
            held.append(len(tree.nodes))
            tree.put(Node(0, unit), None)
        return max(held)

    @property
    def speed_up(self) -> float:
        """Of computing alone: all wait for those that have the most units."""
        return self.config.train.grad_accum / max(len(run) for run in self.units)

    def exchange(self, here: range, around: range) -> Exchange:
        """What the ranks `here` exchange with the others of `around`; weights: of all others, wherever they are."""
        numbers, sums, weights = (sum(of[here.start : here.stop]) for of in (self.numbers, self.sums, self.weights))
        others, other_sums = (sum(of[around.start : around.stop]) for of in (self.numbers, self.sums))
        return Exchange(4 * sums * (others - numbers), 4 * numbers * (other_sums - sums), sum(self.weights) - weights)

    def links(self, per_machine: int) -> list[Link]:
        """Of the ranks, where several share a machine, and of the machines, where there are several."""
        every = range(self.ranks)
        machines = [every[first : first + per_machine] for first in range(0, self.ranks, per_machine)]
        links: list[Link] = []
        if per_machine > 1:
            inside = [self.exchange(every[rank : rank + 1], machine) for machine in machines for rank in machine]
            links += _links(OF_A_RANK, "rank", inside)
        if len(machines) > 1:
            links += _links(OF_A_MACHINE, "machine", [self.exchange(machine, every) for machine in machines])
        return links


def _links(rates: dict[str, float], of: Literal["rank", "machine"], exchanges: Iterable[Exchange]) -> list[Link]:
    busiest = max(exchanges, key=lambda one: one.total)
    return [Link(name, of, rate, busiest) for name, rate in rates.items()]
